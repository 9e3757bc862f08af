"""Tests of train.py: the recipe by hand, then runs that are stopped, broken or moved.

The first part is the second half of what train.py teaches. Each part of the recipe is worked out
with a few numbers and then stands beside torch's own: cosine annealing, the batches, one epoch of
Adam, the average of the weights, the batch-norm statistics. Then a whole run is trained again in 25
lines of plain torch and ends with the same weights, a stopped run goes on to the same bits, and a
network learns what its lesions show. From "a run's folder" on, the tests guard what a user relies
on; a reader of the method can skip them.

close(ours, expected, tolerance) of conftest.py fails if the largest difference, as a share of the
largest expected value, is above the tolerance. Without one it is 1e-9, which suits float64; float32
needs 1e-6.
"""

import copy
import csv
import errno
import functools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn

import backbones
import data
import evaluate
import loss
import model
import train
from conftest import FASTER_EVALUATION, TINY, close, randomise
from train import RunError

CPU = torch.device("cpu")

# The flags of almost every run in this file, among them finished_run of conftest.py. A run has 16
# training lesions, so two batches an epoch, and the weights after epochs 2 and 3 are averaged. It
# takes a third of a second and learns next to nothing.
TINY_FLAGS = {
    "backbone": "convnext_mini",  # one small block a stage, see conftest.py
    "weights": "none",
    "image_size": 32,
    "batch_size": 8,
    "lr": 1e-3,
    "epochs": 3,
    "swa_start": 2,
    "device": "cpu",
}
ONE_EPOCH = ["--epochs", "1", "--swa-start", "1"]


# ------------------------------------------------------------------------ the parts of the recipe


def test_the_learning_rate_on_paper():
    """Four epochs from 8 on: half of 8 * (1 + cos) at 0, 45, 90 and 135 degrees."""
    cos_45 = math.sqrt(1 / 2)
    rates = [train.learning_rate(8.0, epoch, epochs=4) for epoch in range(4)]
    close(rates, [8, 4 + 4 * cos_45, 4, 4 - 4 * cos_45])


def test_learning_rate_is_torchs_cosine_annealing_every_epoch():
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=3e-5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=250)
    for epoch in range(250):
        expected = optimizer.param_groups[0]["lr"]
        close(train.learning_rate(3e-5, epoch, epochs=250), expected)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "num_rows, batch_size, lengths",
    [
        (48, 24, [24, 24]),
        (50, 24, [24, 24, 2]),
        (49, 24, [24, 25]),  # batch norm cannot do with one: the last joins
        (3, 2, [3]),
        (5, 24, [5]),
    ],
)
def test_each_lesion_comes_once_and_none_alone(num_rows, batch_size, lengths):
    rows = torch.arange(100, 100 + num_rows)
    batches = train.shuffled_batches(rows, batch_size)
    assert [len(batch) for batch in batches] == lengths
    assert torch.equal(torch.cat(batches).sort().values, rows)


def test_an_epoch_sees_the_training_lesions_alone_each_time_in_another_way(release):
    numbers = torch.arange(40).view(40, 1)
    release = replace(release, labels=numbers)  # so a batch tells which lesions are in it
    torch.manual_seed(0)
    orders = []
    photos = []
    for _ in range(2):
        batches = list(train.augmented_batches(release, 8, CPU, "title"))
        order = torch.cat([batch["labels"] for batch in batches]).flatten()
        shown = torch.cat([batch["dermoscopy"] for batch in batches])
        assert order.sort().values.tolist() == list(range(16))
        orders.append(order)
        photos.append(shown[order.argsort()])
    assert not torch.equal(orders[0], orders[1]), "not shuffled"
    assert not torch.equal(photos[0], photos[1]), "not augmented"


class OneLayer(nn.Module):
    """The smallest network with the contract of model.py: a batch in, a dict of branches out."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, batch):
        return {"fusion": [self.layer(batch["x"])]}


def batches_of_numbers(count):
    """Batches for OneLayer, four lesions each."""
    batches = []
    for _ in range(count):
        x = torch.randn(4, 5, dtype=torch.float64)
        batches.append({"x": x, "labels": torch.randint(0, 3, (4, 1))})
    return batches


def test_adams_first_step_on_paper():
    """It divides each gradient by its own size, so every weight moves by the learning rate.

    By the bias of a class the cross-entropy has the gradient p - y: the probability, minus 1 for
    the true class. Adam moves against it.
    """
    torch.manual_seed(0)
    batch = batches_of_numbers(1)[0]
    network = OneLayer().double()
    bias_before = network.layer.bias.detach().clone()
    p = network.layer(batch["x"]).detach().softmax(1)  # (4, 3)
    y = F.one_hot(batch["labels"][:, 0], num_classes=3)
    gradient = (p - y).mean(0)

    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    criterion = loss.make_criterion({"model": "pemm", "loss": "equal"})
    train.train_one_epoch(network, [batch], criterion, optimizer, nullcontext)
    close(network.layer.bias - bias_before, -0.01 * gradient.sign(), 1e-5)


def test_an_epoch_is_a_step_of_adam_for_each_batch():
    """The same steps in plain torch: the gradients of one batch do not reach the next."""
    torch.manual_seed(0)
    batches = batches_of_numbers(6)
    network = OneLayer().double()
    twin = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2, fused=True)
    criterion = loss.make_criterion({"model": "pemm", "loss": "equal"})
    losses = train.train_one_epoch(network, batches, criterion, optimizer, nullcontext)

    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-2)
    for batch, batch_losses in zip(batches, losses):
        expected = F.cross_entropy(twin.layer(batch["x"]), batch["labels"][:, 0])
        close(batch_losses["loss"], expected)
        close(batch_losses["loss_fusion"], expected)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    close(network.layer.weight, twin.layer.weight)
    close(network.layer.bias, twin.layer.bias)


def test_the_average_on_paper():
    """After three epochs the only weight is 1, 3 and 8: the means are 1, 2 and 4."""
    network = nn.Linear(1, 1, bias=False)
    average = [torch.zeros(1, 1)]
    means = []
    for num_before, weight in enumerate((1.0, 3.0, 8.0)):
        nn.init.constant_(network.weight, weight)
        train.update_average(average, num_before, network)
        means.append(average[0].item())
    close(means, [1, 2, 4], 1e-6)
    assert network.weight.item() == 8, "the training itself goes on with the last weight"
    train.use_average(average, network)
    close(network.weight, [[4]], 1e-6)


def test_update_average_is_torchs_averaged_model():
    network = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    average = [torch.zeros_like(parameter) for parameter in network.parameters()]
    twin = AveragedModel(network)
    for num_averaged in range(20):
        randomise(network, seed=num_averaged, spread=1.0)
        train.update_average(average, num_averaged, network)
        twin.update_parameters(network)
    for mean, expected in zip(average, twin.module.parameters()):
        close(mean, expected, 1e-14)
    train.use_average(average, network)
    for parameter, expected in zip(network.parameters(), twin.module.parameters()):
        close(parameter, expected, 1e-14)


def test_batch_norm_statistics_on_paper():
    """Two batches of two numbers: their means are 2 and 7, their variances (n - 1) 2 and 8."""
    norm = nn.BatchNorm1d(1)
    nn.init.constant_(norm.running_mean, 100.0)  # of the weights before they were averaged
    batches = [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0]])]
    train.update_batch_norm(norm, batches, nullcontext)
    close(norm.running_mean, [(2 + 7) / 2], 1e-6)
    close(norm.running_var, [(2 + 8) / 2], 1e-6)


def test_update_batch_norm_is_torchs_update_bn():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5)
    )
    network = randomise(network.double())
    twin = copy.deepcopy(network)
    batches = [torch.randn(size, 3, 4, 4, dtype=torch.float64) for size in (8, 8, 3)]
    train.update_batch_norm(network, batches, nullcontext)
    update_bn(batches, twin)
    expected = twin.state_dict()
    for name, value in network.state_dict().items():
        close(value, expected[name], 1e-12)
    assert expected["1.num_batches_tracked"] == 3, "the twin's have been estimated"


# ------------------------------------------------------------------------------ the whole recipe
#
# From here on there are whole runs. First what they need.


@pytest.fixture(scope="module")
def common_flags(pairs_csv, finished_run):
    """The flags of finished_run but --out. The photos are in its cache."""
    return ["--data", str(pairs_csv), "--cache", str(finished_run.parent / "cache"), *TINY]


@pytest.fixture
def train_tiny(common_flags, tmp_path):
    """A function that trains as finished_run was trained, in a folder of tmp_path.

    Further flags come last and override the others.
    """

    def run(name, *flags):
        return train.main([*common_flags, "--out", str(tmp_path / name), *flags])

    return run


@pytest.fixture(scope="module")
def release(pairs_csv, finished_run):
    """The 40 lesions that finished_run has used, 16 / 10 / 14."""
    return data.read(pairs_csv, 32, finished_run.parent / "cache")


def stop_in_epoch_2(title, figures, speed):
    """Instead of train.print_epoch: Ctrl-C after all work of the epoch, before it is saved."""
    if title.startswith("epoch 2"):
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def stopped_run(common_flags, tmp_path_factory):
    """A run like finished_run, but stopped in its second epoch: last.pt holds the first."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SAVE_EVERY", 0)
        patch.setattr(train, "print_epoch", stop_in_epoch_2)
        with pytest.raises(KeyboardInterrupt, match="python train.py --resume"):
            train.main([*common_flags, "--out", str(run)])
    return run


@pytest.fixture
def stopped_copy(stopped_run, tmp_path):
    """A copy of stopped_run that a test may change and go on with."""
    return shutil.copytree(stopped_run, tmp_path / "stopped")


@pytest.fixture
def no_evaluation(monkeypatch):
    """Runs end with model.pt. Else the evaluation takes half of such a short run's time."""
    monkeypatch.setattr(evaluate, "evaluate_run", lambda *_: {})
    monkeypatch.setattr(evaluate, "print_tables", lambda _: None)


def load(path):
    """Faster than with weights_only=True, as train.py and model.py themselves load these files."""
    return torch.load(path, weights_only=False)


def log_of(run):
    with open(run / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path, columns, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def assert_same_weights(run, other):
    """Two runs have the same log and, to the bit, the same weights."""
    assert (run / "log.csv").read_bytes() == (other / "log.csv").read_bytes()
    weights = load(run / "model.pt")["network"]
    others = load(other / "model.pt")["network"]
    assert weights.keys() == others.keys()
    for name in weights:
        assert torch.equal(weights[name], others[name]), name


def assert_bit_identical(run, other):
    """Two runs have the same log, weights, predictions and results."""
    assert_same_weights(run, other)
    for name in ("predictions.csv", "results.json"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


def test_the_runs_here_have_these_flags(finished_run):
    flags = load(finished_run / "last.pt")["flags"]
    for name, value in TINY_FLAGS.items():
        assert flags[name] == value, name


def auc_on_validation(network, release):
    """By scikit-learn: the mean over the three diagnoses and the veil. The branches count alike."""
    rows = release.rows("valid")
    with torch.no_grad():
        outputs = network.eval()(data.make_batch(release, rows, CPU))
    aucs = []
    for t, k in ((0, 0), (0, 1), (0, 2), (1, 1)):  # task and class; "absent" is no finding
        mean = sum(logits[t].double().log_softmax(1) for logits in outputs.values()) / len(outputs)
        p = mean.softmax(1)
        aucs.append(roc_auc_score(release.labels[rows, t] == k, p[:, k]))
    return sum(aucs) / 4


def test_a_run_is_the_recipe_in_plain_torch(train_tiny, no_evaluation, release, tmp_path):
    """The same seed, the same order of random numbers, and so the same weights but for rounding."""
    train_tiny("run", "--no-amp")

    rows = release.rows("train")

    def augmented_batches():
        order = rows[torch.randperm(len(rows))]
        for batch_rows in order.split(8):
            yield data.make_batch(release, batch_rows, CPU, torch.default_generator)

    torch.manual_seed(0)
    network = model.PEMM("convnext_mini", num_classes=(3, 2))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)  # fused as in train.py
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
    average = AveragedModel(network)
    for epoch in (1, 2, 3):
        for batch in augmented_batches():
            total, _ = loss.biased_loss(network(batch), batch["labels"])
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        scheduler.step()
        if epoch >= 2:  # --swa-start
            average.update_parameters(network)
    update_bn(augmented_batches(), average)

    ours = load(tmp_path / "run" / "model.pt")["network"]
    for name, expected in average.module.state_dict().items():
        close(ours[name], expected, 1e-5)
    last = load(tmp_path / "run" / "last.pt")["network"]
    for name, expected in network.named_parameters():
        close(last[name], expected, 1e-5)
    last_epoch = log_of(tmp_path / "run")[-1]
    close(float(last_epoch["valid_auc"]), auc_on_validation(network, release))


def test_the_optimizer_is_adam_as_it_comes(finished_run):
    """No weight decay, no other betas: the paper names none."""
    ours = load(finished_run / "last.pt")["optimizer"]["param_groups"][0]
    theirs = torch.optim.Adam([nn.Parameter(torch.zeros(1))]).param_groups[0]
    for name in ("betas", "eps", "weight_decay", "amsgrad", "maximize"):
        assert ours[name] == theirs[name], name
    assert ours["weight_decay"] == 0


def test_defaults_are_the_papers():
    """Sec. 4.1 and the row PEMM of Tables 5 and 8."""
    flags = train.parse_flags(["--data", "release_v0"])
    paper = {
        "backbone": "swin_v2_t",
        "weights": "imagenet",
        "image_size": 224,
        "batch_size": 24,
        "lr": 3e-5,
        "loss": "biased",
        "w": 0.1,
        "model": "pemm",
        "modality": "both",
        "encoder": "shared",
        "fusion": "sca",
        "classifiers": "separate",
    }
    for name, value in paper.items():
        assert flags[name] == value, name


@pytest.mark.parametrize("kind, epochs, swa_start", [("spc", 250, 201), ("isic", 150, 121)])
def test_the_paper_chose_the_epochs_and_we_when_averaging_begins(
    kind, epochs, swa_start, release, tmp_path, monkeypatch
):
    release = replace(release, kind=kind)
    monkeypatch.setattr(data, "read", lambda *arguments, **options: release)
    _, checkpoint, _, _ = train.new_run(["--data", kind, "--out", str(tmp_path / "run")])
    assert checkpoint.flags["epochs"] == epochs
    assert checkpoint.flags["swa_start"] == swa_start


# ------------------------------------------------------------------------ stopped, it goes on


def test_a_stopped_run_goes_on_to_the_same_bits(finished_run, stopped_copy):
    """Epochs 2 and 3 follow from last.pt alone: weights, optimizer, average, random numbers."""
    assert load(stopped_copy / "last.pt")["epoch"] == 1
    train.main(["--resume", str(stopped_copy)])
    assert_bit_identical(finished_run, stopped_copy)


# ---------------------------------------------------------- does it learn what it is shown?
#
# In the next test the training lesions, and only they, have their two classes exchanged: what
# is called a there is called b in the test split. A network that has learned from the training
# lesions then gives every test lesion the wrong class, so its test AUC is near 0. If the loop mixed
# up lesions and labels, the AUC would be near 0.5; if it trained on test lesions, near 1.


def lesions_of_two_classes():
    """Rows (number, true class, split, class in the table), the classes being 0 and 1."""
    classes = np.random.default_rng(0).integers(0, 2, 48)
    rows = []
    for n, split in enumerate(np.repeat(data.SPLITS, (32, 8, 8))):
        in_table = 1 - classes[n] if split == "train" else classes[n]
        rows.append((n, classes[n], split, in_table))
    return rows


def save_noise(path, seed, brightness, amount):
    noise = np.random.default_rng(seed).integers(0, amount, (32, 32, 3), np.uint8)
    Image.fromarray(noise + np.uint8(brightness)).save(path)


def test_labels_belong_to_their_photos(train_tiny, tmp_path):
    """A lesion's class shows in how bright its photos are."""
    rows = []
    for n, is_bright, split, in_table in lesions_of_two_classes():
        for v, view in enumerate(("clinical", "dermoscopy")):
            save_noise(tmp_path / f"{view}{n}.png", [n, v], 120 * is_bright, 60)
        rows.append((f"clinical{n}.png", f"dermoscopy{n}.png", "ab"[in_table], split))
    columns = ["clinical", "dermoscopy", "lesion", "split"]
    table = write_csv(tmp_path / "bright.csv", columns, rows)
    results = train_tiny("run", "--data", str(table), "--lr", "3e-3")
    last_loss = float(log_of(tmp_path / "run")[-1]["loss"])
    assert last_loss < 0.5, "the photos did not tell the class"  # a guess costs log 2 = 0.69
    assert results["test"]["weighted"]["mean_auc"] < 0.05


# The tutorial ends here. The regression nets that follow guard what a user relies on.

# ---------------------------------------------------- what makes all runs of this file faster


@pytest.fixture(scope="module", autouse=True)
def narrow_mat():
    """MAT with 64 channels instead of 512."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "MAT", functools.partial(model.MAT, width=64))
        yield


@pytest.fixture(scope="module", autouse=True)
def faster_evaluation():
    """As finished_run was evaluated."""
    with mock.patch.multiple(evaluate, **FASTER_EVALUATION):
        yield


@pytest.fixture(scope="module", autouse=True)
def no_git():
    """Runs do not ask git for the commit."""
    about = train.describe_machine({})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "describe_machine", lambda flags: {**about, "flags": flags})
        yield


# ------------------------------------------------------------------------------------ MAT's words


def test_words_belong_to_their_photos(train_tiny, tmp_path):
    """A lesion's class is the patient's sex, as one of MAT's words; photos tell nothing."""
    rows = []
    for n, is_male, split, in_table in lesions_of_two_classes():
        save_noise(tmp_path / f"{n}.png", [n], 100, 10)
        rows.append((f"{n}.png", "ab"[in_table], split, ("female", "male")[is_male]))
    table = write_csv(tmp_path / "sex.csv", ["dermoscopy", "lesion", "split", "sex"], rows)
    results = train_tiny("run", "--data", str(table), "--model", "mat", "--lr", "3e-3")
    last = log_of(tmp_path / "run")[-1]
    assert float(last["loss"]) < 0.5, "the words did not tell the class"
    assert results["test"]["fusion"]["mean_auc"] < 0.05
    assert float(last["valid_auc"]) < 0.05
    vocabulary = load(tmp_path / "run" / "model.pt")["vocabulary"]
    assert vocabulary == ["", "begin", "sex female", "sex male"]


# --------------------------------------------------------------------------------- a run's folder


@pytest.fixture
def run_copy(finished_run, tmp_path):
    """A copy of finished_run that a test may change."""
    return shutil.copytree(finished_run, tmp_path / "copy")


@pytest.fixture
def save_every_epoch(monkeypatch):
    """Else only the last epoch of such a short run would be saved."""
    monkeypatch.setattr(train, "SAVE_EVERY", 0)


def contents_of(folder):
    """All files below a folder, path -> bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def as_command(flags):
    """The flags of a run as a command line."""
    words = []
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif name == "amp":
            words.append("--no-amp")
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return words


def test_a_run_is_complete_and_its_flags_make_it_again(finished_run, tmp_path):
    names = {path.name for path in finished_run.iterdir()}
    files = "args.json last.pt model.pt log.csv predictions.npz predictions.csv results.json"
    assert names == set(files.split())
    about = json.loads((finished_run / "args.json").read_text())
    assert about["torch"] == torch.__version__
    assert about["flags"]["swa_start"] == 2
    results = train.main([*as_command(about["flags"]), "--out", str(tmp_path / "again")])
    assert results == json.loads((finished_run / "results.json").read_text())
    assert_bit_identical(finished_run, tmp_path / "again")


def test_the_log_has_a_row_an_epoch_and_the_loss_is_biased(finished_run):
    rows = log_of(finished_run)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    close([float(row["lr"]) for row in rows], [1e-3, 0.75e-3, 0.25e-3])
    for row in rows:
        clinical, dermoscopy = float(row["loss_clinical"]), float(row["loss_dermoscopy"])
        expected = 0.1 * clinical + 0.4 * dermoscopy + 0.5 * float(row["loss_fusion"])  # Eq. 3
        close(float(row["loss"]), expected, 1e-5)
        assert 0 <= float(row["valid_auc"]) <= 1
        assert 0 <= float(row["valid_accuracy"]) <= 1


def test_another_seed_is_another_run(finished_run, train_tiny, no_evaluation, tmp_path):
    train_tiny("other", "--seed", "1", *ONE_EPOCH)
    first, other = log_of(finished_run)[0], log_of(tmp_path / "other")[0]
    assert first["lr"] == other["lr"]
    assert first["loss"] != other["loss"]


def test_model_pt_says_what_the_run_has_learned_from(finished_run, release):
    saved = load(finished_run / "model.pt")
    assert saved["format"] == model.FORMAT
    assert saved["main_encoder"] == "encoder_dermoscopy"
    assert saved["tasks"] == release.tasks
    assert saved["fingerprint"] == release.fingerprint
    for t, (task, classes) in enumerate(release.tasks.items()):
        labels = release.labels[:16, t].tolist()
        assert saved["class_counts"][task] == [labels.count(k) for k in range(len(classes))]
    learned = torch.arange(26)  # 16 training and 10 validation lesions
    assert saved["seen"] == data.identities(release, learned)
    assert saved["seen"]["ids"] == [], "the cases are mere numbers"
    texts = saved["seen"]["photos"]
    assert {type(text) for text in texts} == {str}, "NumPy's strings cannot be loaded safely"


def test_an_unknown_label_is_no_lesion_of_any_class(train_tiny, no_evaluation, pairs_csv, tmp_path):
    lines = pairs_csv.read_text().splitlines()
    start, _, veil = lines[1].rsplit(",", 2)
    lines[1] = f"{start},,{veil}"
    table = pairs_csv.with_name("unknown.csv")
    table.write_text("\n".join(lines))
    train_tiny("run", "--data", str(table), *ONE_EPOCH)
    counts = load(tmp_path / "run" / "model.pt")["class_counts"]
    assert sum(counts["diagnosis"]) == 15
    assert sum(counts["veil"]) == 16


@pytest.mark.parametrize(
    "flags, kind, folder",
    [
        (["--data", "release_v0"], "spc", "runs/spc-pemm-0"),
        (["--data", "a/my lesions.csv", "--seed", "7"], "pairs", "runs/my lesions-pemm-7"),
        (["--data", "x", "--model", "mat"], "ham", "runs/ham-mat-0"),
        (["--data", "x", "--modality", "clinical"], "milk10k", "runs/milk10k-clinical-0"),
        ([], "synthetic", "runs/synthetic-pemm-0"),
    ],
)
def test_default_folders(flags, kind, folder):
    assert train.default_folder(train.parse_flags(flags), kind) == folder


# ------------------------------------------------------------------------------ stopped, resumed


def test_stopped_at_other_moments_it_goes_on_too(
    finished_run, stopped_copy, save_every_epoch, no_evaluation, monkeypatch
):
    """Ctrl-C three times. After each the run goes on from the last epoch that was saved."""
    moments = ["the mean losses of epoch 3", "saving epoch 3", "saving model.pt"]
    mean_losses = train.mean_losses
    save_checkpoint = train.save_checkpoint
    save_model = train.save_model

    def stop_before(what):
        if moments and moments[0] == what:
            moments.pop(0)
            raise KeyboardInterrupt

    def stopping_mean_losses(losses, title):
        stop_before(f"the mean losses of {title.removesuffix(' of 3')}")
        return mean_losses(losses, title)

    def stopping_save_checkpoint(run, checkpoint, *state):
        stop_before(f"saving epoch {checkpoint.epoch}")
        save_checkpoint(run, checkpoint, *state)

    def stopping_save_model(*arguments):
        stop_before("saving model.pt")
        save_model(*arguments)

    monkeypatch.setattr(train, "mean_losses", stopping_mean_losses)
    monkeypatch.setattr(train, "save_checkpoint", stopping_save_checkpoint)
    monkeypatch.setattr(train, "save_model", stopping_save_model)
    while moments:
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            train.main(["--resume", str(stopped_copy)])
    train.main(["--resume", str(stopped_copy)])
    assert_same_weights(finished_run, stopped_copy)


TRAIN_ONE_RUN = """
import json
import conftest  # has the small backbone
import train
train.SAVE_EVERY = 0
train.main(json.loads(input()))
"""


@pytest.fixture(scope="module", autouse=True)
def waiting_process():
    """TRAIN_ONE_RUN, which imports torch while other tests run, and then waits for its line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, "-c", TRAIN_ONE_RUN]
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        yield process
        process.kill()


def test_killed_it_goes_on_bit_identically(finished_run, common_flags, waiting_process, tmp_path):
    """kill -9 at a moment that nobody chose."""
    run = tmp_path / "run"
    waiting_process.stdin.write(json.dumps([*common_flags, "--out", str(run)]) + "\n")
    waiting_process.stdin.flush()
    while not run.exists():
        assert waiting_process.poll() is None, "it ended before it began"
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.3))
    waiting_process.kill()  # on Unix kill -9; nothing happens if it has ended
    waiting_process.wait()
    train.main(["--resume", str(run)])
    assert_bit_identical(finished_run, run)


def test_a_short_run_is_saved_at_its_start_and_at_its_end(train_tiny, no_evaluation, monkeypatch):
    epochs = []
    save_checkpoint = train.save_checkpoint

    def counting_save_checkpoint(run, checkpoint, *state):
        epochs.append(checkpoint.epoch)
        save_checkpoint(run, checkpoint, *state)

    monkeypatch.setattr(train, "SAVE_EVERY", 3600)
    monkeypatch.setattr(train, "save_checkpoint", counting_save_checkpoint)
    train_tiny("run", "--epochs", "2")
    assert epochs == [0, 2]


def test_resuming_a_finished_run_predicts_anew(finished_run, run_copy):
    for name in ("model.pt", "predictions.npz", "predictions.csv", "results.json", "args.json"):
        (run_copy / name).unlink()
    train.main([f"--resume={run_copy}"])
    assert_bit_identical(finished_run, run_copy)


def test_resuming_a_run_that_still_runs_harms_neither(
    finished_run, stopped_copy, save_every_epoch, no_evaluation, monkeypatch
):
    """Another process goes on with the run while this one writes its last checkpoint."""
    torch_save = torch.save
    has_resumed = []

    def save(state, path):
        torch_save(state, path)
        if state.get("epoch") == 3 and not has_resumed:
            has_resumed.append(True)
            random_state = torch.get_rng_state()
            train.main(["--resume", str(stopped_copy)])
            assert_same_weights(finished_run, stopped_copy)
            torch.set_rng_state(random_state)

    monkeypatch.setattr(torch, "save", save)
    train.main(["--resume", str(stopped_copy)])
    assert has_resumed
    assert_same_weights(finished_run, stopped_copy)


def test_a_run_goes_on_with_its_own_flags(finished_run, pairs_csv, tmp_path, monkeypatch):
    """Only where data, cache and device are may change."""
    asked = []

    def find_device(name):
        asked.append(name)
        return torch.device(name)

    monkeypatch.setattr(model, "find_device", find_device)
    run, checkpoint, _, _ = train.resumed_run(["--resume", str(finished_run)])
    assert run == finished_run
    assert checkpoint.flags == load(finished_run / "last.pt")["flags"]
    assert checkpoint.epoch == 3
    assert asked == ["cpu"], "not the device it began on"

    moved = pairs_csv.with_name("moved.csv")
    shutil.copy(pairs_csv, moved)
    changes = ["--data", str(moved), "--cache", str(tmp_path), "--device", "cpu:0"]
    _, checkpoint, _, _ = train.resumed_run(["--resume", str(finished_run), *changes])
    assert checkpoint.flags["data"] == str(moved)
    assert checkpoint.flags["cache"] == str(tmp_path)
    assert checkpoint.flags["device"] == asked[1] == "cpu:0"


@pytest.mark.parametrize("flag", ["--epochs=3", "--out=other", "--seed=0", "--amp", "--dat=x"])
def test_other_flags_beside_resume_are_refused(flag, finished_run, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--resume", str(finished_run), flag])
    assert end.value.code == 2
    assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "old, new",
    [
        (",present", ",absent"),
        (",valid,", ",train,"),
        ("\n39,", "\n390,"),
        ("derm0001", "derm0041"),
    ],
    ids=["label", "split", "case", "photo"],
)
def test_a_run_does_not_go_on_with_other_data(old, new, finished_run, pairs_csv, tmp_path):
    changed = pairs_csv.with_name("changed.csv")
    text = pairs_csv.read_text()
    assert old in text
    changed.write_text(text.replace(old, new, 1))
    arguments = ["--resume", str(finished_run), "--data", str(changed), "--cache", str(tmp_path)]
    with pytest.raises(RunError, match="began with other photos, labels or splits"):
        train.resumed_run(arguments)


@pytest.mark.parametrize("can_bfloat16", [True, False])
def test_bfloat16_stays_behind_where_the_new_device_has_none(
    can_bfloat16, run_copy, monkeypatch, capsys
):
    saved = load(run_copy / "last.pt")
    saved["flags"].update(device="cuda:0", amp=True)
    torch.save(saved, run_copy / "last.pt")
    monkeypatch.setattr(model, "has_bfloat16", lambda device: can_bfloat16)
    _, checkpoint, _, _ = train.resumed_run(["--resume", str(run_copy), "--device", "cpu"])
    assert checkpoint.flags["amp"] is can_bfloat16
    assert ("goes on in float32" in capsys.readouterr().out) is not can_bfloat16


def test_generator_states_are_the_cpus_and_the_own_devices(monkeypatch, capsys):
    """With a stand-in for the generators of two GPUs."""
    cuda_1, cuda_2 = torch.device("cuda:1"), torch.device("cuda:2")
    states = {cuda_1: "state of cuda:1", cuda_2: "another"}

    def set_rng_state(state, device):
        states[device] = state

    monkeypatch.setattr(torch.cuda, "get_rng_state", states.get)
    monkeypatch.setattr(torch.cuda, "set_rng_state", set_rng_state)
    torch.manual_seed(3)
    on_cpu = train.random_states(CPU)
    on_cuda = train.random_states(cuda_1)
    expected = torch.rand(3)
    warning = "it will not be bit-identical"

    train.set_random_states(on_cpu, CPU)
    assert torch.equal(torch.rand(3), expected)
    train.set_random_states(on_cuda, cuda_2)
    assert torch.equal(torch.rand(3), expected)
    assert states[cuda_2] == "state of cuda:1"
    assert warning not in capsys.readouterr().out

    train.set_random_states(on_cpu, torch.device("mps"))
    assert torch.equal(torch.rand(3), expected)
    assert warning in capsys.readouterr().out
    train.set_random_states(on_cuda, CPU)
    assert warning in capsys.readouterr().out


# --------------------------------------------------------------------------- beginning a new run


def test_a_folder_that_is_not_empty_is_refused(finished_run, train_tiny, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "run").mkdir()
    shutil.copy(finished_run / "model.pt", tmp_path / "run")
    before = contents_of(tmp_path)
    for name in ("notes", "file", "run"):
        with pytest.raises(RunError, match=f"{name} is not empty. To go on with a run: --resume"):
            train_tiny(name)
    assert contents_of(tmp_path) == before


def begin_small_run(run):
    network = OneLayer()
    optimizer = torch.optim.Adam(network.parameters())
    checkpoint = train.Checkpoint(flags={}, fingerprint="", split=[], seen_before={})
    train.begin_run(run, checkpoint, network, optimizer, CPU)


def test_an_empty_folder_is_fine(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    train.check_is_free(run)
    begin_small_run(run)
    assert (run / "last.pt").exists()


def test_of_two_processes_that_begin_a_run_the_second_is_refused(train_tiny, monkeypatch, tmp_path):
    """Its folder appears after this process has looked for it."""
    run = tmp_path / "run"
    save_checkpoint = train.save_checkpoint

    def save_while_another_begins(*arguments):
        save_checkpoint(*arguments)
        run.mkdir()
        (run / "last.pt").write_text("of the other process")

    monkeypatch.setattr(train, "save_checkpoint", save_while_another_begins)
    with pytest.raises(RunError, match="run cannot be begun .*: choose another --out") as refused:
        train_tiny("run")
    assert "\n" not in str(refused.value)
    assert (run / "last.pt").read_text() == "of the other process"
    assert os.listdir(tmp_path) == ["run"], "a temporary folder is left"


def raise_ctrl_c(*_):
    raise KeyboardInterrupt


def raise_disk_full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "flags, broken, error",
    [
        (["--weights", "nowhere.pth"], None, backbones.WeightsError),
        ([], ("save_checkpoint", raise_ctrl_c), KeyboardInterrupt),
        ([], ("describe_machine", raise_disk_full), RunError),
    ],
    ids=["weights", "Ctrl-C", "full disk"],
)
def test_a_failed_start_leaves_nothing(flags, broken, error, train_tiny, monkeypatch, tmp_path):
    if broken:
        monkeypatch.setattr(train, broken[0], broken[1])
    with pytest.raises(error):
        train_tiny("runs/run", *flags)
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "runs"])


def test_temporary_files_of_killed_processes_are_removed(run_copy, no_evaluation, tmp_path):
    """Those of a process that still writes are not: it wrote to them lately."""
    yesterday = time.time() - 24 * 3600
    begun = tmp_path / "run"
    old_folder = tmp_path / "run.0123abcd.tmp"
    fresh_folder = tmp_path / "run.4567abcd.tmp"
    others_folder = tmp_path / "run.2.0123abcd.tmp"
    for folder in (old_folder, fresh_folder, others_folder):
        folder.mkdir()
        (folder / "last.pt").write_text("half")
    old_file = run_copy / "last.pt.0123abcd.tmp"
    fresh_file = run_copy / "model.pt.4567abcd.tmp"
    for path in (old_file, fresh_file):
        path.write_text("half")
    for path in (old_folder, others_folder, old_file):
        os.utime(path, (yesterday, yesterday))

    begin_small_run(begun)
    train.main(["--resume", str(run_copy)])
    assert begun.exists()
    assert not old_folder.exists() and not old_file.exists()
    assert fresh_folder.exists() and fresh_file.exists() and others_folder.exists()


# ------------------------------------------------------------------- files that cannot be used


@pytest.mark.parametrize(
    "content",
    [{"flags": {}, "seen": {}}, {"format": 2, "flags": {}}, ["flags"]],
    ids=["no format", "format 2", "no dict"],
)
def test_other_formats_are_refused(content, tmp_path):
    for name in ("last.pt", "model.pt"):
        torch.save(content, tmp_path / name)
    with pytest.raises(RunError, match="last.pt"):
        train.main(["--resume", str(tmp_path)])
    with pytest.raises(RunError, match="model.pt"):
        train.seen_by_weights({"weights": str(tmp_path), "model": "pemm"})


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint"], ids=["missing", "empty", "text"])
def test_a_damaged_checkpoint_is_named(content, run_copy):
    (run_copy / "last.pt").unlink()
    if content is not None:
        (run_copy / "last.pt").write_bytes(content)
    with pytest.raises(RunError, match="last.pt") as refused:
        train.main(["--resume", str(run_copy)])
    assert "\n" not in str(refused.value)
    assert "--resume" not in str(refused.value), "useless advice"


# -------------------------------------------------------------------- the encoder of an earlier run


@pytest.fixture
def new_lesions(pairs_csv):
    """A table for a later run: 14 lesions to train, 12 to validate, 15 to test.

    Numbers 0 to 25 are those that finished_run has trained or validated on. Of these 4 are here in
    the validation split and 3 in the test split.
    """
    lines = pairs_csv.read_text().splitlines()
    lines += pairs_csv.with_name("new.csv").read_text().splitlines()[1:]
    header = lines.pop(0)
    splits = {"train": range(26, 40), "valid": [0, 1, 2, 3, *range(40, 48)]}
    splits["test"] = [16, 17, 18, *range(48, 60)]
    rows = [header]
    for split, numbers in splits.items():
        for n in numbers:
            before, _, after = lines[n].partition(f",{split_of(n)},")
            rows.append(f"{before},{split},{after}")
    table = pairs_csv.with_name("later.csv")
    table.write_text("\n".join(rows))
    return table


def split_of(n):
    """The split of conftest's lesion number n."""
    return "train" if n < 16 else "valid" if n < 26 else "test"


def encoder_of(saved, name="encoder_dermoscopy"):
    """The part of a run's state dict that belongs to an encoder."""
    weights = {}
    for key, value in saved["network"].items():
        if key.startswith(name + "."):
            weights[key.removeprefix(name + ".")] = value
    return weights


def test_a_run_begins_with_the_encoder_of_another(
    run_copy, new_lesions, train_tiny, monkeypatch, tmp_path, capsys
):
    flags = ["--data", str(new_lesions), "--weights", str(run_copy), *ONE_EPOCH]
    earlier = load(run_copy / "model.pt")
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_one_epoch", raise_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            train_tiny("run", *flags)
    output = capsys.readouterr().out
    assert re.search("WARNING: .* 7 of 41 lesions .* 0 by id, 7 by photo", output)
    run = tmp_path / "run"
    begun = load(run / "last.pt")
    weights, expected = encoder_of(begun), encoder_of(earlier)
    assert weights.keys() == expected.keys() and len(weights) > 10
    for name in weights:
        assert torch.equal(weights[name], expected[name]), name
    counts = {split: begun["split"].count(split) for split in ("train", "valid", "test", "")}
    assert counts == {"train": 14, "valid": 8, "test": 12, "": 7}

    shutil.rmtree(run_copy)
    train.main(["--resume", str(run)])
    later = load(run / "model.pt")
    earlier_photos, later_photos = set(earlier["seen"]["photos"]), set(later["seen"]["photos"])
    assert earlier_photos < later_photos, "the earlier run's as well"
    predictions = evaluate.read_predictions(run)
    assert predictions.split.tolist() == 8 * ["valid"] + 12 * ["test"]
    assert predictions.cases.tolist() == [str(n) for n in range(40, 60)]
    assert_predictions_belong_to_their_lesions(run, predictions, new_lesions, tmp_path)


def assert_predictions_belong_to_their_lesions(run, predictions, table, cache):
    """Lesions in no split, which stand between the others, must not shift them."""
    release = data.read(table, 32, cache)
    numbers = [release.cases.index(case) for case in predictions.cases]
    assert predictions.labels.tolist() == release.labels[numbers].tolist()
    saved = load(run / "model.pt")
    network = model.load_run(saved, CPU)
    batch = data.make_batch(release, torch.tensor(numbers), CPU)
    with torch.autocast("cpu", torch.bfloat16, enabled=saved["flags"]["amp"]):
        logits = network(batch)["fusion"]
    probabilities = [task_logits.float().softmax(1) for task_logits in logits]
    close(predictions.branches["fusion"], torch.cat(probabilities, dim=1), 1e-5)


def test_ammfm_may_take_either_encoder(finished_run, pairs_csv):
    flags = train.parse_flags(
        ["--data", "x", "--model", "ammfm", "--backbone", "convnext_atto", "--weights", "none"]
        + ["--clinical-backbone", "convnext_mini", "--clinical-weights", str(finished_run)]
    )
    network = model.build_model(flags, (3, 2), 2, pretrained=True)
    expected = encoder_of(load(finished_run / "model.pt"))
    for name, value in network.encoder_clinical.state_dict().items():
        assert torch.equal(value, expected[name]), name
    seen = load(finished_run / "model.pt")["seen"]
    assert train.seen_by_weights(flags) == seen
    assert train.seen_by_weights({**flags, "model": "pemm"}) == {"ids": [], "photos": []}


def test_another_backbone_is_refused_by_name(finished_run, new_lesions, train_tiny, tmp_path):
    flags = ["--data", str(new_lesions), "--weights", str(finished_run)]
    with pytest.raises(RunError, match="convnext_mini and not a convnext_atto"):
        train_tiny("run", *flags, "--backbone", "convnext_atto")
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_has_seen_the_whole_split_is_refused(finished_run, train_tiny, tmp_path):
    with pytest.raises(RunError, match="has seen every lesion of the valid split"):
        train_tiny("run", "--weights", str(finished_run))
    assert not list(tmp_path.iterdir())


def test_a_folder_called_imagenet_is_no_earlier_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("imagenet").mkdir()
    Path("none").mkdir()
    nothing = {"ids": [], "photos": []}
    flags = {"model": "ammfm", "weights": "imagenet", "clinical_weights": "none"}
    assert train.seen_by_weights(flags) == nothing
    assert model.first_weights("imagenet", "swin_t") == "imagenet"


# --------------------------------------------------------------------------- special ways to train


def test_without_data_a_demo_on_drawn_lesions(spc_folder, tmp_path, monkeypatch):
    def synthesize(folder, cases, height):
        assert cases == 900
        shutil.copytree(spc_folder, folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "synthesize", synthesize)
    _, checkpoint, release, _ = train.new_run(["--epochs", "4"])
    assert release.kind == "synthetic"
    assert checkpoint.flags["backbone"] == "convnext_atto", "too large for a laptop"
    assert checkpoint.flags["epochs"] == 4, "the demo's default instead of the flag"


def test_with_amp_the_network_calculates_in_bfloat16_and_its_loss_in_float32(
    train_tiny, no_evaluation, monkeypatch
):
    dtypes = []

    def make_criterion(flags):
        def criterion(outputs, batch):
            total, branch_losses = loss.biased_loss(outputs, batch["labels"])
            dtypes.append((outputs["fusion"][0].dtype, total.dtype))
            return total, branch_losses

        return criterion

    monkeypatch.setattr(train, "make_criterion", make_criterion)
    flags = ["--batch-size", "16", *ONE_EPOCH]  # a single batch
    train_tiny("with", "--amp", *flags)
    train_tiny("without", "--no-amp", *flags)
    assert dtypes == [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)]


def test_a_validation_split_of_one_class_has_no_auc(train_tiny, pairs_csv, tmp_path):
    lines = pairs_csv.read_text().splitlines()
    for n, line in enumerate(lines):
        if ",valid," in line:
            start, _, _ = line.rsplit(",", 2)
            lines[n] = f"{start},nevus,absent"
    table = pairs_csv.with_name("one_class.csv")
    table.write_text("\n".join(lines))
    assert train_tiny("run", "--data", str(table), *ONE_EPOCH)["test"]
    assert "valid_auc" not in log_of(tmp_path / "run")[0]


# ------------------------------------------------------------------------------------- the flags


@pytest.mark.parametrize(
    "flags",
    [
        "--lr 0",
        "--lr inf",
        "--lr nan",
        "--lr -1",
        "--w 0.6",
        "--w nan",
        "--batch-size 1",
        "--epochs 0",
        "--epochs 1.5",
        "--swa-start 0",
        "--seed -1",
        "--image-size 8",
        "--fusion none",
        "--backbone resnet",
        "--epoch 3",
        "--model mat --modality clinical",
        "--model ammfm --modality dermoscopy",
    ],
)
def test_flags_out_of_range_are_usage_errors(flags, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--data", "x", *flags.split()])
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, useless",
    [
        ("--model mat --fusion ca", "--fusion"),
        ("--model clnet --loss equal", "--loss"),
        ("--loss equal --w 0.3", "--w"),
        ("--modality clinical --encoder separate", "--encoder"),
        ("--unit sa-sa", "--unit"),
        ("--clinical-backbone resnet50", "--clinical-backbone"),
        ("--model ammfm --clinical-backbone resnet50 --w 0.3", None),
        ("--model mat --unit sa-sa", None),
        ("--model clnet --tasks mask", None),
    ],
)
def test_a_flag_that_changes_nothing_is_only_said(flags, useless, capsys):
    train.parse_flags(["--data", "x", *flags.split()])
    output = capsys.readouterr().out
    if useless is None:
        assert output == ""
    else:
        assert output.startswith(f"{useless} has no effect") and output.count("\n") == 1


@pytest.mark.parametrize("argv", [["--help"], ["--resume", "RUN", "--help"]])
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(argv)
    assert end.value.code == 0
    assert "--resume" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--device", "nonsense"], "device nonsense: "),
        (["--swa-start", "5"], "--swa-start 5 is after the last of 3 epochs"),
    ],
)
def test_wrong_flags_are_one_sentence(flags, sentence, train_tiny):
    with pytest.raises(RunError, match=sentence) as refused:
        train_tiny("run", *flags)
    assert "\n" not in str(refused.value)


def test_the_program_ends_with_one_sentence(train_tiny, capsys):
    def program():
        train_tiny("run", "--out", "/dev/null/run")

    with pytest.raises(SystemExit) as end:
        data.run_main(program, RunError, data.DataError, backbones.WeightsError)
    assert end.value.code == 2
    output = capsys.readouterr().err
    assert "/dev/null" in output and output.count("\n") == 1


def test_ctrl_c_ends_with_one_sentence(train_tiny, monkeypatch, tmp_path, capsys):
    def program():
        train_tiny("run")

    monkeypatch.setattr(train, "train_one_epoch", raise_ctrl_c)
    with pytest.raises(SystemExit) as end:
        data.run_main(program, RunError)
    assert end.value.code == 130
    output = capsys.readouterr().err
    assert f"python train.py --resume {tmp_path / 'run'}" in output and output.count("\n") == 1


# ------------------------------------------------------------------------------- what goes wrong


def test_a_loss_that_is_not_finite_ends_the_run(train_tiny, tmp_path):
    expected = r"loss\w* in epoch \d of 3 is not finite.*saved before is intact.*lower --lr"
    with pytest.raises(RunError, match=expected):
        train_tiny("run", "--lr", "1e9", "--no-amp")
    assert not (tmp_path / "run" / "model.pt").exists()


def test_weights_that_are_not_finite_are_neither_averaged_nor_saved(
    finished_run, stopped_copy, save_every_epoch, no_evaluation, monkeypatch
):
    """An epoch's last step can spoil them, when the losses of the epoch were all finite."""
    train_one_epoch = train.train_one_epoch

    def spoil_epoch_3(network, *arguments):
        losses = train_one_epoch(network, *arguments)
        if load(stopped_copy / "last.pt")["epoch"] == 2:
            nn.init.constant_(network.classifier_fusion.heads[0].bias, float("nan"))
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_one_epoch", spoil_epoch_3)
        expected = "classifier_fusion.heads.0.bias after epoch 3 of 3 is not finite"
        with pytest.raises(RunError, match=expected):
            train.main(["--resume", str(stopped_copy)])
    saved = load(stopped_copy / "last.pt")
    assert saved["epoch"] == 2
    assert all(value.isfinite().all() for value in saved["network"].values())
    assert all(mean.isfinite().all() for mean in saved["average"])
    assert not (stopped_copy / "model.pt").exists()
    train.main(["--resume", str(stopped_copy)])
    assert_same_weights(finished_run, stopped_copy)


def disk_is_full(path):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))


def disk_is_full_inside_torch(path):
    raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed")


def fill_disk(patch, file, fail):
    """From now on the file cannot be written: last.pt after epoch 2, log.csv after epoch 3."""
    torch_save = torch.save

    def save(state, path):
        is_due = state.get("epoch") == 2 if file == "last.pt" else "epoch" not in state
        if is_due:
            Path(path).write_bytes(b"half")
            fail(path)
        torch_save(state, path)

    def writerows(writer, rows):
        if len(rows) == 3:
            fail("log.csv")
        for row in rows:
            writer.writerow(row)

    if file == "log.csv":
        patch.setattr(csv.DictWriter, "writerows", writerows)
    else:
        patch.setattr(torch, "save", save)


def test_a_full_disk_keeps_what_was_saved(
    finished_run, stopped_copy, save_every_epoch, no_evaluation, monkeypatch
):
    """Three times; each time the run goes on from what was saved before."""
    failures = [
        ("last.pt", disk_is_full_inside_torch),
        ("log.csv", disk_is_full),
        ("model.pt", disk_is_full),
    ]
    for file, fail in failures:
        with monkeypatch.context() as patch:
            fill_disk(patch, file, fail)
            expected = f"{file} cannot be written .*is intact"
            with pytest.raises(RunError, match=expected) as refused:
                train.main(["--resume", str(stopped_copy)])
        assert "\n" not in str(refused.value)
        assert not list(stopped_copy.rglob("*.tmp"))
    train.main(["--resume", str(stopped_copy)])
    assert_same_weights(finished_run, stopped_copy)


# ----------------------------------------------------------------- rows of the tables, relatives


@pytest.mark.parametrize(
    "flags, branches",
    [
        ("--modality clinical", "clinical"),
        (
            "--encoder separate --fusion ca --classifiers shared --loss equal",
            "clinical dermoscopy fusion equal weighted",
        ),
    ],
)
def test_switches_of_the_tables(flags, branches, train_tiny):
    test = train_tiny("run", *ONE_EPOCH, *flags.split())["test"]
    assert list(test) == branches.split()
    for metrics in test.values():
        assert 0 <= metrics["mean_auc"] <= 1


def test_clnet_needs_masks_only_to_learn_them(train_tiny, pairs_csv):
    unmasked = pairs_csv.with_name("unmasked.csv")
    unmasked.write_text(pairs_csv.read_text().replace("mask", "fitzpatrick_skin_type", 1))
    flags = ["--data", str(unmasked), "--model", "clnet", *ONE_EPOCH]
    results = train_tiny("class", *flags, "--tasks", "class")
    assert list(results["test"]) == ["dermoscopy"]
    for tasks in ("both", "mask"):
        with pytest.raises(RunError, match="needs mask, which the release does not have"):
            train_tiny(tasks, *flags, "--tasks", tasks)


def test_a_network_of_two_photos_needs_both(train_tiny, pairs_csv):
    table = pairs_csv.with_name("dermoscopy_only.csv")
    table.write_text(pairs_csv.read_text().replace("clinical", "fitzpatrick_skin_type", 1))
    with pytest.raises(RunError, match="needs clinical, which the release does not have"):
        train_tiny("run", "--data", str(table))


RELATIVES = {
    "AMMFM": "--model ammfm --clinical-backbone convnext_mini --clinical-weights none",
    "MAT": "--model mat",
    "CLNet": "--model clnet",
    "CLNet, mask alone": "--model clnet --tasks mask",
}


@pytest.fixture(scope="module", params=RELATIVES)
def relative(request, common_flags, tmp_path_factory):
    """A relative trained for two epochs: its `run`, `after_epoch_1`, a copy of that folder as it
    was then, and its `results`.
    """
    folder = tmp_path_factory.mktemp("relative")
    run = folder / "run"
    after_epoch_1 = folder / "after epoch 1"
    save_checkpoint = train.save_checkpoint

    def copying_save_checkpoint(run, checkpoint, *state):
        save_checkpoint(run, checkpoint, *state)
        if checkpoint.epoch == 1:
            shutil.copytree(run, after_epoch_1)

    flags = [*common_flags, "--epochs", "2", "--batch-size", "16"]  # two steps in all
    flags += RELATIVES[request.param].split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SAVE_EVERY", 0)
        patch.setattr(train, "save_checkpoint", copying_save_checkpoint)
        results = train.main([*flags, "--out", str(run)])
    return SimpleNamespace(run=run, after_epoch_1=after_epoch_1, results=results)


def test_relatives_are_resumed_and_evaluated_again(relative, no_evaluation):
    """test_evaluate.py asks them about new lesions and about a single one."""
    train.main(["--resume", str(relative.after_epoch_1)])
    assert_same_weights(relative.run, relative.after_epoch_1)
    assert evaluate.main([str(relative.run)]) == relative.results
