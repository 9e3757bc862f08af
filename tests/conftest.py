"""What several test files need."""

import csv
import os
from functools import partial
from unittest import mock

# For small tensors one thread is the fastest. It must be set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import sklearn
import torch
from torch import nn

import backbones
import data
import evaluate

# Scikit-learn's checks take most of the time of small tests.
sklearn.set_config(assume_finite=True, skip_parameter_validation=True)
# A backbone of one block a stage, which costs a tenth of the smallest of backbones.py.
backbones.BACKBONES["convnext_mini"] = backbones.Backbone(
    partial(backbones.ConvNeXt, depths=(1, 1, 1, 1), channels=(8, 16, 24, 32)),
    head="classifier.2",
    published=None,
)
# The flags of finished_run. The top of test_train.py says what they mean.
TINY = "--backbone convnext_mini --weights none --image-size 32 --batch-size 8 --lr 1e-3".split()
TINY += "--epochs 3 --swa-start 2 --device cpu".split()
FASTER_EVALUATION = {"RESAMPLES": 50, "STEPS": 6}  # instead of evaluate.py's 1000 and 20


def close(ours, expected, tolerance=1e-9):
    """Fails if the largest difference, as a share of the largest expected value, is above the
    tolerance. 1e-9 is what float64 allows after some layers; float32 allows about 1e-6.
    """
    ours = torch.as_tensor(ours, dtype=torch.float64).detach()
    expected = torch.as_tensor(expected, dtype=torch.float64).detach()
    assert ours.shape == expected.shape, f"shapes {tuple(ours.shape)} and {tuple(expected.shape)}"
    difference = (ours - expected).abs()
    scale = expected.abs().max().clamp(min=1e-300)
    assert difference.max().isfinite(), "not finite"
    largest, mean = difference.max() / scale, difference.mean() / scale
    message = f"largest difference {largest:.2e} of the largest value, mean {mean:.2e}"
    assert difference.max() <= tolerance * scale, message


def randomise(module, seed=0, spread=0.05):
    """Moves every parameter and batch-norm statistic away from its initial value, in place.

    Initial values hide mistakes: ConvNeXt's layer scale starts at 1e-6, biases and the attention's
    values at 0. Returns the module.
    """
    generator = torch.Generator().manual_seed(seed)
    computed = ("relative_position_index", "relative_coords_table")  # Swin's constants
    moved = set()  # a shared module stands in the state dict under two names
    for name, value in module.state_dict().items():
        if not value.is_floating_point() or name.endswith(computed) or value.data_ptr() in moved:
            continue
        moved.add(value.data_ptr())
        noise = torch.empty_like(value).uniform_(-2 * spread, 2 * spread, generator=generator)
        value.add_(noise.abs() if name.endswith("running_var") else noise)
    return module


def as_if_trained(module, spread=0.05):
    """The module randomised, in float64 and in evaluation mode."""
    return randomise(module, spread=spread).double().eval()


def without_init():
    """In this context networks begin with zeros. To draw their initial values takes longer than
    most of the tests.
    """

    def zeros(tensor, *_, **__):
        return nn.init.zeros_(tensor)

    return mock.patch.multiple(
        nn.init,
        normal_=zeros,
        uniform_=zeros,
        trunc_normal_=zeros,
        xavier_uniform_=zeros,
        kaiming_normal_=zeros,
        kaiming_uniform_=zeros,
    )


@pytest.fixture(scope="session")
def spc_folder(tmp_path_factory):
    """The folder of a small synthetic SPC: 60 cases, 25 / 12 / 23."""
    folder = tmp_path_factory.mktemp("data") / "spc"
    data.synthesize(folder, cases=60, height=48)
    return folder


@pytest.fixture(scope="session")
def pairs_csv(spc_folder):
    """40 of these lesions as an own CSV file, 16 / 10 / 14, with two tasks, masks and words.

    The other 20 are new.csv beside it.
    """
    with open(spc_folder / "meta" / "meta.csv", newline="") as file:
        lesions = list(csv.DictReader(file))
    rows = []
    for n, lesion in enumerate(lesions):
        split = "train" if n < 16 else "valid" if n < 26 else "test"
        diagnosis = "other"
        for name in ("nevus", "melanoma"):
            if name in lesion["diagnosis"]:
                diagnosis = name
        clinical, dermoscopy = f"spc/images/{lesion['clinic']}", f"spc/images/{lesion['derm']}"
        mask = f"spc/images/derm{n:04}_segmentation.png"
        age = (45, 70)[n % 2]  # two ages only: each subgroup of the test split is measured
        about = (lesion["sex"], age, diagnosis, lesion["blue_whitish_veil"])
        rows.append((n, clinical, dermoscopy, mask, split, *about))
    columns = ["case", "clinical", "dermoscopy", "mask", "split", "sex", "age", "diagnosis", "veil"]
    for name, part in (("pairs", rows[:40]), ("new", rows[40:])):
        with open(spc_folder.parent / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([columns, *part])
    return spc_folder.parent / "pairs.csv"


@pytest.fixture(scope="session")
def finished_run(pairs_csv, tmp_path_factory):
    """The folder of a run that nothing disturbed. Copy it before you change it."""
    import train

    folder = tmp_path_factory.mktemp("runs")
    flags = ["--data", str(pairs_csv), "--cache", str(folder / "cache"), *TINY]
    with mock.patch.multiple(evaluate, **FASTER_EVALUATION):
        train.main([*flags, "--out", str(folder / "run")])
    return folder / "run"
