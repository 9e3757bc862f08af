"""What several test files need."""
import csv
import os
from functools import partial
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # for small tensors one thread is the fastest; before torch is imported
import pytest
import sklearn
import torch
from torch import nn

import backbones
import data
import train

sklearn.set_config(assume_finite=True, skip_parameter_validation=True)  # most of the time of small tests

# A backbone of one block a stage, which costs a tenth of the smallest of backbones.py.
backbones.BACKBONES["convnext_mini"] = backbones.Backbone(
    partial(backbones.ConvNeXt, (1, 1, 1, 1), (8, 16, 24, 32)), backbones.CONVNEXT_NAMES, None)
TINY = ["--backbone", "convnext_mini", "--weights", "none", "--image-size", "32", "--batch-size", "8", "--device",
        "cpu",
        "--lr", "1e-3", "--epochs", "3", "--swa-start", "2"]

def close(ours, theirs, tolerance=1e-9):
    """Fails with the largest difference, relative to the largest value, if it is above the tolerance."""
    ours, theirs = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (ours, theirs))
    assert ours.shape == theirs.shape, f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    difference, scale = (ours - theirs).abs(), theirs.abs().max().clamp(min=1e-300)
    largest = difference.max()
    assert largest.isfinite(), "not finite"
    assert largest <= tolerance * scale, (
        f"largest difference {largest / scale:.2e} of the largest value, mean {difference.mean() / scale:.2e}")

def randomise(module, seed=0, spread=0.05):
    """Every parameter and batch-norm statistic moved away from its initial value, which hides mistakes: ConvNeXt's
    layer scale starts at 1e-6, biases and the attention's values at 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not backbones.DERIVED.search(name):
            noise = torch.empty_like(value).uniform_(-2 * spread, 2 * spread, generator=generator)
            value.add_(noise.abs() if name.endswith("running_var") else noise)
    return module

def undrawn():
    """In this context networks begin with zeros. To draw their initial values takes longer than most of the tests."""
    draws = ("normal_", "uniform_", "trunc_normal_", "xavier_uniform_", "kaiming_normal_", "kaiming_uniform_")
    return mock.patch.multiple(nn.init, **dict.fromkeys(draws, lambda value, *_, **__: nn.init.zeros_(value)))

@pytest.fixture(scope="session")
def release(tmp_path_factory):
    """The folder of a small synthetic SPC: 60 cases, 25 / 12 / 23."""
    folder = tmp_path_factory.mktemp("data") / "spc"
    data.synthesize(folder, cases=60, height=48)
    return folder

@pytest.fixture(scope="session")
def pairs(release):
    """The same lesions as your own CSV file: two tasks, masks and words, 40 cases, 16 / 10 / 14, and 20 in new.csv."""
    with open(release / "meta" / "meta.csv", newline="") as file:
        drawn = list(csv.DictReader(file))
    rows = []
    for n, lesion in enumerate(drawn):
        diagnosis = [name for name in ("nevus", "melanoma", "") if name in lesion["diagnosis"]][0] or "other"
        rows.append((n, f"spc/images/{lesion['clinic']}", f"spc/images/{lesion['derm']}",
                     f"spc/images/derm{n:04}_segmentation.png",
                     data.SPLITS[(n >= 16) + (n >= 26)], lesion["sex"], 10 * (n % 9), diagnosis,
                     lesion["blue_whitish_veil"]))
    columns = ["case", "clinical", "dermoscopy", "mask", "split", "sex", "age", "diagnosis", "veil"]
    for name, part in (("pairs", rows[:40]), ("new", rows[40:])):
        with open(release.parent / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([columns, *part])
    return release.parent / "pairs.csv"

@pytest.fixture(scope="session")
def finished(pairs, tmp_path_factory):
    """The folder of a run that nothing disturbed. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("runs")
    train.main(["--data", str(pairs), "--cache", str(folder / "cache"), *TINY, "--out", str(folder / "run")])
    return folder / "run"
