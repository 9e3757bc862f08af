"""What several test files need."""
import os

os.environ["OMP_NUM_THREADS"] = "1"  # for small tensors one thread is the fastest; before torch is imported
import pytest
import sklearn
import torch

import backbones
import data
import train

sklearn.set_config(assume_finite=True, skip_parameter_validation=True)  # most of the time of small tests

TINY = ["--backbone", "convnext_atto", "--weights", "none", "--image-size", "32", "--batch-size", "8", "--device", "cpu",
        "--lr", "1e-3", "--epochs", "3", "--swa-start", "2"]


def close(ours, theirs, tolerance=1e-9):
    """Fails with the largest difference, relative to the largest value, if it is above the tolerance."""
    ours, theirs = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (ours, theirs))
    assert ours.shape == theirs.shape, f"shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
    assert ours.isfinite().all(), "not finite"
    difference, scale = (ours - theirs).abs(), theirs.abs().max().clamp(min=1e-300)
    assert difference.max() <= tolerance * scale, (
        f"largest difference {difference.max() / scale:.2e} of the largest value, mean {difference.mean() / scale:.2e}")


def randomise(module, seed=0, spread=0.05):
    """Every parameter and batch-norm statistic moved away from its initial value, which hides mistakes: ConvNeXt's layer scale
    starts at 1e-6, biases and the attention's values at 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if value.is_floating_point() and not backbones.DERIVED.search(name):
            noise = torch.empty_like(value).uniform_(-2 * spread, 2 * spread, generator=generator)
            value.add_(noise.abs() if name.endswith("running_var") else noise)
    return module


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    """The folder of a small synthetic SPC: 60 cases, 25 / 12 / 23."""
    return data.synthesize(tmp_path_factory.mktemp("data") / "spc", cases=60, height=48)


@pytest.fixture(scope="session")
def finished(release, tmp_path_factory):
    """The folder of a run that nothing disturbed. Copy it before you change it."""
    folder = tmp_path_factory.mktemp("runs")
    train.main(["--data", str(release), "--cache", str(folder / "cache"), *TINY, "--out", str(folder / "run")])
    return folder / "run"
