"""Metrics against scikit-learn, searches and statistics against plain loops, files, other releases,
MILK10k's submission, the answer for one lesion."""

import csv
import itertools
import json
import math
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn import metrics

import data
import evaluate
import model
from conftest import FASTER_EVALUATION, close
from evaluate import LateFusion, Predictions
from model import RunError

CPU = torch.device("cpu")
TASKS = {"DIAG": ("a", "b", "c"), "PN": ("absent", "present")}
BRANCHES = ("clinical", "dermoscopy", "fusion")


def make_lesions(n=80, tasks=TASKS, seed=0, ties=False):
    """Random labels (n, T), and three branches (n, K) that know something of them."""
    rng = np.random.default_rng(seed)
    columns = [rng.integers(0, len(classes), n) for classes in tasks.values()]
    labels = np.stack(columns, axis=1)
    one_hot = [np.eye(len(classes))[labels[:, t]] for t, classes in enumerate(tasks.values())]
    truth = np.concatenate(one_hot, axis=1)
    branches = {}
    for branch in BRANCHES:
        logits = 1.2 * truth + rng.normal(size=truth.shape)
        if ties:
            logits = logits.round()
        branches[branch] = softmax(logits, tasks)
    return labels, branches


def softmax(logits, tasks):
    """Task by task, in plain numpy."""
    parts = []
    first = 0
    for classes in tasks.values():
        powers = np.exp(logits[:, first : first + len(classes)])
        parts.append(powers / powers.sum(1, keepdims=True))
        first += len(classes)
    return np.concatenate(parts, axis=1)


def make_predictions(labels, branches, tasks=TASKS):
    """Predictions whose first half is the validation split."""
    numbers = np.arange(len(labels))
    split = np.where(numbers < len(labels) // 2, "valid", "test")
    return Predictions(tasks, numbers.astype(str), split, labels, {}, dict(branches), {}, "data 1")


def drawn_rows(counts):
    """The lesions of one resample, copied as often as they are drawn."""
    return np.repeat(np.arange(len(counts)), counts.astype(int))


# ---------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tasks", [TASKS, data.SPC_TASKS], ids=["two tasks", "SPC"])
def test_every_metric_is_scikit_learns(tasks, ties):
    labels, branches = make_lesions(150, tasks, ties=ties)
    labels[::7, 0] = -1
    measured = evaluate.measure(branches["fusion"], labels, tasks)
    first = 0
    for t, (task, classes) in enumerate(tasks.items()):
        known = labels[:, t] >= 0
        truth = labels[known, t]
        scores = branches["fusion"][known, first : first + len(classes)]
        guess = scores.argmax(1)
        first += len(classes)
        close(measured["accuracy"][task], np.mean([a == b for a, b in zip(truth, guess)]))
        close(measured["macro_f1"][task], metrics.f1_score(truth, guess, average="macro"))
        for k, name in enumerate(classes):
            column = f"{task}/{name}"
            if column not in measured["auc"]:
                continue
            pairs = itertools.product(scores[truth == k, k], scores[truth != k, k])
            wins = [(a > b) + (a == b) / 2 for a, b in pairs]
            close(measured["auc"][column], np.mean(wins))
            close(measured["auc"][column], metrics.roc_auc_score(truth == k, scores[:, k]))
            precision = metrics.precision_score(truth == k, guess == k, zero_division=0)
            close(measured["precision"][column], precision)
            close(measured["sensitivity"][column], metrics.recall_score(truth == k, guess == k))
            close(measured["specificity"][column], metrics.recall_score(truth != k, guess != k))
    for metric in ("auc", "accuracy", "macro_f1", "precision", "sensitivity", "specificity"):
        close(measured[f"mean_{metric}"], np.mean(list(measured[metric].values())))


SPC_COLUMNS = """DIAG/BCC DIAG/NEV DIAG/MEL DIAG/MISC DIAG/SK PN/TYP PN/ATP STR/REG STR/IR PIG/REG PIG/IR
    RS/PRS DaG/REG DaG/IR BWV/PRS VS/REG VS/IR"""
MILK10K_COLUMNS = " ".join(f"DIAG/{name}" for name in evaluate.MILK10K)


@pytest.mark.parametrize(
    "tasks, columns",
    [
        (data.SPC_TASKS, SPC_COLUMNS),
        ({"DIAG": ("benign", "malignant")}, "DIAG/malignant"),
        ({"DIAG": evaluate.MILK10K}, MILK10K_COLUMNS),
    ],
    ids=["SPC", "two classes", "MILK10k"],
)
def test_columns_of_table_1(tasks, columns):
    labels, branches = make_lesions(150, tasks)
    measured = evaluate.measure(branches["fusion"], labels, tasks)
    assert list(measured["auc"]) == columns.split()


def test_what_no_lesion_has_gets_no_column():
    labels, branches = make_lesions()
    labels[labels[:, 0] == 2, 0] = 1
    labels[:, 1] = -1
    measured = evaluate.measure(branches["fusion"], labels, TASKS)
    assert list(measured["auc"]) == ["DIAG/a", "DIAG/b"]
    assert list(measured["accuracy"]) == ["DIAG"]


def test_a_single_task_has_average_precision_and_lrap():
    """With one true class LRAP is the mean reciprocal of its rank."""
    tasks = {"DIAG": ("a", "b", "c", "d")}
    labels, branches = make_lesions(60, tasks)
    scores = branches["fusion"]
    measured = evaluate.measure(scores, labels, tasks)
    reciprocals = []
    for row, label in zip(scores, labels[:, 0]):
        rank = 1 + sum(score > row[label] for score in row)
        reciprocals.append(1 / rank)
    close(measured["lrap"], np.mean(reciprocals))
    ap = [metrics.average_precision_score(labels[:, 0] == k, scores[:, k]) for k in range(4)]
    close(measured["mean_ap"], np.mean(ap))
    labels, branches = make_lesions(60)
    assert not {"lrap", "mean_ap"} & evaluate.measure(branches["fusion"], labels, TASKS).keys()


def make_release(pixels, views):
    """A Release without labels, of these pixels (N, V, S, S, 3)."""
    N = len(pixels)
    return data.Release(
        kind="pairs",
        tasks={},
        views=views,
        cases=[str(n) for n in range(N)],
        lesion_ids=[""] * N,
        patients=[""] * N,
        labels=torch.empty((N, 0), dtype=torch.int64),
        split=np.full(N, "test"),
        pixels=torch.from_numpy(pixels),
        words=torch.ones((N, 1), dtype=torch.int64),
        vocabulary=["", "begin"],
        metadata={},
        photo_hashes=np.full((N, 1), ""),
        fingerprint="",
        published=False,
        notes=[],
    )


class FindsBright(torch.nn.Module):
    """A network whose mask is all that is bright."""

    inputs = ("dermoscopy",)

    def forward(self, batch):
        return {"mask": batch["dermoscopy"].mean(1, keepdim=True)}


def test_overlaps_are_scikit_learns():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 2, 8, 8, 3), np.uint8)
    pixels[0] = 0  # nothing there, nothing found
    pixels[1, 1] = 0  # nothing there, but something found
    release = make_release(pixels, ("dermoscopy", "mask"))
    rows = torch.arange(60)
    branches, overlaps = evaluate.predict(FindsBright(), release, rows, CPU, amp=False)
    assert not branches
    assert overlaps["jaccard"][0] == overlaps["dice"][0] == 1
    assert overlaps["jaccard"][1] == overlaps["dice"][1] == 0
    batch = data.make_batch(release, rows, CPU)
    for n in range(1, 60):
        true = batch["mask"][n].flatten()
        found = (batch["dermoscopy"][n].mean(0) > 0).flatten()
        close(overlaps["jaccard"][n], metrics.jaccard_score(true, found, zero_division=0))
        close(overlaps["dice"][n], metrics.f1_score(true, found, zero_division=0))


class KnowsBrightness(torch.nn.Module):
    """Two tasks from the photo's mean colour; remembers in which mode it has worked."""

    inputs = ("clinical",)

    def forward(self, batch):
        self.was_training = self.training
        colour = batch["clinical"].mean((2, 3))  # (B, 3)
        return {"clinical": [colour, colour[:, :2]]}


def test_predict_gives_probabilities_of_the_rows_asked_for():
    """More rows than a batch, in their order, the tasks side by side, in evaluation mode."""
    pixels = np.random.default_rng(0).integers(0, 256, (130, 1, 4, 4, 3), np.uint8)
    release = make_release(pixels, ("clinical",))
    rows = torch.arange(129, -1, -1)
    network = KnowsBrightness().train()
    branches, overlaps = evaluate.predict(network, release, rows, CPU, amp=False)
    assert not overlaps and not network.was_training
    colour = data.normalise(torch.from_numpy(pixels[::-1, 0].copy()).permute(0, 3, 1, 2))
    expected = softmax(colour.mean((2, 3)).double().numpy()[:, [0, 1, 2, 0, 1]], TASKS)
    close(branches["clinical"], expected, 1e-6)


# ----------------------------------------------------------------------- what validation decides


def test_fuse_averages_logits():
    _, branches = make_lesions(30)
    weights = dict(zip(BRANCHES, (0.2, 0.3, 0.5)))
    logits = sum(weights[branch] * (np.log(values) + 3) for branch, values in branches.items())
    expected = softmax(logits / 2, TASKS)
    close(evaluate.fuse(branches, weights, TASKS, temperature=2.0), expected)


def mix(branches, steps):
    """Late fusion in another way: products of powers of probabilities, not normalised."""
    mixed = 1.0
    for probabilities, step in zip(branches.values(), steps):
        mixed = mixed * probabilities ** (step / 20)
    return mixed


def search_plainly(branches, labels):
    """(unevenness of the answer's weights, of the paper's), by counting right answers."""
    M = len(branches)
    found = []
    for steps in itertools.product(range(21), repeat=M):
        if sum(steps) != 20:
            continue
        mixed = mix(branches, steps)
        right_diag = mixed[:, :3].argmax(1) == labels[:, 0]
        right_pn = mixed[:, 3:].argmax(1) == labels[:, 1]
        share = (right_diag + 1.0 * right_pn) / 2
        unevenness = sum((M * step - 20) ** 2 for step in steps)
        found.append((share.mean(), share.std() / len(labels) ** 0.5, unevenness))
    highest = max(accuracy for accuracy, _, _ in found) - 1e-9
    best = min((each for each in found if each[0] >= highest), key=lambda each: each[2])
    near = [each for each in found if each[0] >= best[0] - best[1] - 1e-9]
    return min(unevenness for _, _, unevenness in near), best[2]


@pytest.mark.parametrize("M, n, seed", [(3, 5, 0), (3, 5, 1), (3, 60, 2), (2, 60, 3), (4, 20, 4)])
def test_search_is_a_loop_over_the_grid(M, n, seed):
    """For any number of branches M."""
    labels, branches = make_lesions(n, seed=seed)
    _, more = make_lesions(n, seed=seed, ties=True)
    branches["fourth"] = more["clinical"]
    branches = dict(list(branches.items())[:M])
    choices = evaluate.search_weights(branches, labels, TASKS)
    for weights, expected in zip(choices, search_plainly(branches, labels)):
        assert list(weights) == list(branches)
        close(sum(weights.values()), 1)
        unevenness = sum((20 * M * weight - 20) ** 2 for weight in weights.values())
        assert abs(unevenness - expected) < 1e-6  # several weights may be as even


RIGHT, WRONG, SURELY_WRONG = [0.9, 0.1], [0.1, 0.9], [0.001, 0.999]


def sixteen_lesions():
    """Of 16 lesions all branches know 13 and miss 2. A heavy dermoscopy branch knows one more."""
    others = np.array([RIGHT] * 13 + [SURELY_WRONG, WRONG, WRONG])
    dermoscopy = np.array([RIGHT] * 14 + [WRONG] * 2)
    branches = {"clinical": others, "dermoscopy": dermoscopy, "fusion": others}
    return np.zeros((16, 1), int), branches


def test_both_choices_on_an_example():
    """One lesion more of 16 is chance, says the answer's choice; the paper's takes it."""
    labels, branches = sixteen_lesions()
    weights, paper_weights = evaluate.search_weights(branches, labels, {"DIAG": ("a", "b")})
    assert list(paper_weights.values()) == [0.1, 0.8, 0.1]
    assert sorted(weights.values()) == [0.3, 0.35, 0.35]


def test_each_branch_gets_its_own_weight():
    """Only clinical knows the class, and the others are surely wrong: it needs 0.8 to be heard."""
    labels = np.zeros((20, 1), int)
    branches = {"clinical": np.array([RIGHT] * 20)}
    branches["dermoscopy"] = branches["fusion"] = np.array([SURELY_WRONG] * 20)
    for weights in evaluate.search_weights(branches, labels, {"DIAG": ("a", "b")}):
        assert weights == {"clinical": 0.8, "dermoscopy": 0.1, "fusion": 0.1}


def test_lesions_without_a_label_do_not_change_the_choice():
    """Neither the accuracy nor its standard error counts them."""
    labels, branches = sixteen_lesions()
    tasks = {"DIAG": ("a", "b")}
    expected = evaluate.search_weights(branches, labels, tasks)
    labels = np.concatenate([labels, np.full((600, 1), -1)])
    for branch, probabilities in branches.items():
        branches[branch] = np.concatenate([probabilities, [RIGHT] * 300, [WRONG] * 300])
    assert evaluate.search_weights(branches, labels, tasks) == expected


def test_where_nothing_can_be_searched_weights_are_equal():
    labels, branches = sixteen_lesions()
    tasks = {"DIAG": ("a", "b")}
    third = {branch: 1 / 3 for branch in BRANCHES}
    assert evaluate.search_weights(branches, labels - 1, tasks) == (third, third)  # no label known
    assert evaluate.fit_temperature(branches["fusion"], labels - 1, tasks) == 1.0
    alone = {"fusion": branches["fusion"]}
    assert evaluate.search_weights(alone, labels, tasks) == ({"fusion": 1.0}, {"fusion": 1.0})


def test_a_probability_of_0_has_a_temperature():
    """One lesion of 9 has probability 0 of its true class: not nan, but the hottest."""
    probabilities = np.array([[1.0, 0.0]] * 9)
    labels = np.array([[0]] * 8 + [[1]])
    close(evaluate.fit_temperature(probabilities, labels, {"DIAG": ("a", "b")}), 10.0)


def test_temperature_is_the_best_of_a_fine_grid():
    labels, branches = make_lesions(100)
    too_sure = evaluate.fuse({"fusion": branches["fusion"]}, {"fusion": 1.0}, TASKS, 1 / 3)
    labels[::9, 1] = -1
    grid = np.geomspace(0.5, 8, 2000)
    losses = []
    for temperature in grid:
        loss = 0.0
        for t, part in enumerate((too_sure[:, :3], too_sure[:, 3:])):
            known = labels[:, t] >= 0
            powers = part[known] ** (1 / temperature)
            p = powers / powers.sum(1, keepdims=True)
            loss -= np.mean([np.log(row[label]) for row, label in zip(p, labels[known, t])])
        losses.append(loss)
    expected = grid[np.argmin(losses)]
    close(evaluate.fit_temperature(too_sure, labels, TASKS), expected, 0.024)  # steps of 4.7%


@pytest.mark.parametrize("label, temperature", [(0, 0.1), (1, 10.0)])
def test_always_right_and_always_wrong_end_at_the_ends(label, temperature):
    labels = np.full((8, 1), label)
    probabilities = np.tile([0.6, 0.4], (8, 1))
    close(evaluate.fit_temperature(probabilities, labels, {"DIAG": ("a", "b")}), temperature)


def test_only_the_validation_split_decides():
    labels, branches = make_lesions(100)
    p = make_predictions(labels, branches)
    expected = evaluate.fit_late_fusion(p)
    changed = labels.copy()
    changed[50:] = (labels[50:] + 1) % 2
    assert evaluate.fit_late_fusion(replace(p, labels=changed)) == expected
    changed[:50] = (labels[:50] + 1) % 2
    assert evaluate.fit_late_fusion(replace(p, labels=changed)) != expected


# -------------------------------------------------------------------------------------- statistics


def test_resamples_are_the_same_and_within_the_classes_of_a_single_task():
    labels, _ = make_lesions(50)
    counts = evaluate.resample_lesions(labels)
    assert counts.shape == (1000, 50) and (counts.sum(1) == 50).all()
    assert (counts == evaluate.resample_lesions(labels)).all()
    first_class = labels[:, 0] == 0
    assert (counts[:, first_class].sum(1) != first_class.sum()).any()
    counts = evaluate.resample_lesions(labels[:, :1])
    for k in range(3):
        of_class = labels[:, 0] == k
        assert (counts[:, of_class].sum(1) == of_class.sum()).all()


def test_resampled_metrics_are_scikit_learns_on_copied_lesions():
    labels, branches = make_lesions(60, ties=True)
    truth, scores = labels[:, 0], branches["fusion"][:, :3]
    guess = scores.argmax(1)
    counts = evaluate.resample_lesions(labels)[:20]
    macro_f1 = evaluate.resampled_macro_f1(truth, guess, counts)
    auc = evaluate.resampled_auc(scores[:, 1], truth == 1, counts)
    for r in range(20):
        rows = drawn_rows(counts[r])
        close(macro_f1[r], metrics.f1_score(truth[rows], guess[rows], average="macro"))
        close(auc[r], metrics.roc_auc_score(truth[rows] == 1, scores[rows, 1]))


def test_the_examples_in_the_docstrings():
    counts = np.array([[1, 1, 1], [2, 0, 1]])
    assert (evaluate.resample_lesions(np.zeros((3, 1)))[:500] == [2, 0, 1]).all(1).any()
    macro_f1 = evaluate.resampled_macro_f1(np.array([0, 0, 1]), np.array([0, 1, 1]), counts)
    close(macro_f1.filled(), [2 / 3, 1])
    is_class = np.array([True, True, False])
    auc = evaluate.resampled_auc(
        np.array([0.9, 0.4, 0.6]), is_class, np.array([[1, 1, 1], [2, 1, 1]])
    )
    close(auc.filled(), [1 / 2, 2 / 3])
    close(evaluate.noise_of_a_run([[1, 3], [5, 5, 8]]), math.sqrt(8 / 3))
    assert math.isnan(evaluate.noise_of_a_run([[1], [2]]))


def mean_metrics(probabilities, labels):
    """AUC, accuracy and macro F1 of TASKS by scikit-learn; classes that are not there left out."""
    auc, accuracy, macro_f1 = [], [], []
    for t, (first, last) in enumerate(((0, 3), (3, 5))):
        known = labels[:, t] >= 0
        truth, scores = labels[known, t], probabilities[known, first:last]
        accuracy.append(metrics.accuracy_score(truth, scores.argmax(1)))
        macro_f1.append(metrics.f1_score(truth, scores.argmax(1), average="macro"))
        for k in (0, 1, 2) if t == 0 else (1,):
            if 0 < np.sum(truth == k) < len(truth):
                auc.append(metrics.roc_auc_score(truth == k, scores[:, k]))
    return {
        "mean_auc": np.mean(auc),
        "mean_accuracy": np.mean(accuracy),
        "mean_macro_f1": np.mean(macro_f1),
    }


def test_intervals_are_percentiles_over_copied_lesions(monkeypatch):
    monkeypatch.setattr(evaluate, "RESAMPLES", 60)
    labels, branches = make_lesions(40)
    labels[::5, 1] = -1
    labels[:, 0] = np.where(labels[:, 0] == 2, 0, labels[:, 0])
    labels[7, 0] = 2  # a class with one lesion, which some resamples lack
    measured = evaluate.measure_with_intervals(branches["fusion"], labels, TASKS)
    counts = evaluate.resample_lesions(labels)
    plain = []
    for r in range(60):
        rows = drawn_rows(counts[r])
        plain.append(mean_metrics(branches["fusion"][rows], labels[rows]))
    for name, expected in mean_metrics(branches["fusion"], labels).items():
        close(measured[name], expected)
        samples = [sample[name] for sample in plain]
        close(measured["intervals"][name], np.percentile(samples, (2.5, 97.5)))
    assert np.sum(counts[:, 7] == 0) > 10


def test_calibration_is_worked_out_in_loops():
    labels, branches = make_lesions(100)
    labels[::7, 1] = -1
    probabilities = branches["fusion"]
    nll, ece = [], []
    for t, part in enumerate((probabilities[:, :3], probabilities[:, 3:])):
        losses = []
        bins = [[] for _ in range(15)]  # (confidence, is it right)
        for row, label in zip(part, labels[:, t]):
            if label >= 0:
                losses.append(-math.log(row[label]))
                b = next(b for b in range(15) if row.max() <= (b + 1) / 15)
                bins[b].append((row.max(), row.argmax() == label))
        gaps = [abs(sum(confidence - right for confidence, right in each)) for each in bins]
        nll.append(np.mean(losses))
        ece.append(sum(gaps) / len(losses))
    errors = evaluate.calibration(probabilities, labels, TASKS)
    close(errors["nll"], np.mean(nll))
    close(errors["ece"], np.mean(ece))


def test_a_bin_contains_its_upper_end():
    """0.58, wrong, and 0.6 = 9/15, right, share the ninth bin: half are right, 0.59 were expected."""
    probabilities = np.array([[0.58, 0.42], [0.6, 0.4]])
    errors = evaluate.calibration(probabilities, np.array([[1], [0]]), {"DIAG": ("a", "b")})
    close(errors["ece"], 0.09)


def five_runs():
    """Three runs and two others: (labels, runs, others), answers of 60 lesions."""
    labels, branches = make_lesions(60)
    labels[::6, 1] = -1
    _, more = make_lesions(60, seed=0, ties=True)
    runs = [branches["clinical"], branches["dermoscopy"], branches["fusion"]]
    return labels, runs, [more["clinical"], more["fusion"]]


def test_difference_of_groups_is_a_plain_bootstrap(monkeypatch):
    """Lesions copied as often as drawn, runs taken as often as drawn, scikit-learn's metrics."""
    monkeypatch.setattr(evaluate, "RESAMPLES", 12)
    labels, runs, others = five_runs()
    differences = evaluate.compare_groups(runs, others, labels, TASKS)
    rng = np.random.default_rng(1)
    runs_drawn = rng.multinomial(3, [1 / 3] * 3, 12)
    others_drawn = rng.multinomial(2, [1 / 2] * 2, 12)
    counts = evaluate.resample_lesions(labels)
    lesions_alone, with_seeds = [], []
    for r in range(12):
        rows = drawn_rows(counts[r])
        of_runs = [mean_metrics(answer[rows], labels[rows]) for answer in runs]
        of_others = [mean_metrics(answer[rows], labels[rows]) for answer in others]
        drawn = [of_runs[n] for n in drawn_rows(runs_drawn[r])]
        drawn_others = [of_others[n] for n in drawn_rows(others_drawn[r])]
        lesions_alone.append(gap_of_means(of_runs, of_others))
        with_seeds.append(gap_of_means(drawn, drawn_others))
    whole = [mean_metrics(answer, labels) for answer in runs]
    whole_others = [mean_metrics(answer, labels) for answer in others]
    for name, difference in differences.items():
        close(difference.value, gap_of_means(whole, whole_others)[name])
        samples = [gap[name] for gap in lesions_alone]
        close(difference.over_lesions, np.percentile(samples, (2.5, 97.5)))
        samples = [gap[name] for gap in with_seeds]
        close(difference.over_lesions_and_seeds, np.percentile(samples, (2.5, 97.5)))
        variance = np.var([run[name] for run in whole], ddof=1)
        other_variance = np.var([run[name] for run in whole_others], ddof=1)
        close(difference.noise, math.sqrt((2 * variance + other_variance) / 3))
    assert set(differences) == {"mean_auc", "mean_accuracy", "mean_macro_f1"}


def gap_of_means(group, others):
    gaps = {}
    for name in group[0]:
        ours = np.mean([run[name] for run in group])
        theirs = np.mean([run[name] for run in others])
        gaps[name] = ours - theirs
    return gaps


def test_a_group_does_not_differ_from_itself():
    labels, runs, others = five_runs()
    for difference in evaluate.compare_groups(runs[:1], runs[:1], labels, TASKS).values():
        assert difference.value == 0
        assert difference.over_lesions == difference.over_lesions_and_seeds == [0, 0]
        assert math.isnan(difference.noise) and math.isnan(difference.lesions_needed)


def test_lesions_needed():
    """400 lesions, a difference of 1 point, -2 to +4: nine times as many. Unless the seeds forbid."""
    close(evaluate.lesions_needed(0.01, [-0.02, 0.04], 0.004, 400), 3600)
    close(evaluate.lesions_needed(-0.01, [-0.04, 0.02], 0.0, 400), 3600)
    assert math.isnan(evaluate.lesions_needed(0.01, [-0.02, 0.04], math.nan, 400))  # who knows
    assert evaluate.lesions_needed(0.01, [-0.02, 0.04], 0.006, 400) == math.inf
    assert evaluate.lesions_needed(0.0, [-0.02, 0.04], 0.0, 400) == math.inf


# -------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def run(finished_run, tmp_path, monkeypatch):
    """A finished run of one's own, without the large last.pt; with fewer resamples and weights."""
    for name, value in FASTER_EVALUATION.items():
        monkeypatch.setattr(evaluate, name, value)
    ignored = shutil.ignore_patterns("last.pt")
    return shutil.copytree(finished_run, tmp_path / "run", ignore=ignored)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def release(pairs_csv, cache):
    """The Release that finished_run has learned from, with masks."""
    return data.read(pairs_csv, 32, cache, masks=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def read_table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def change_model(run, run_tasks=None, **flags):
    """Gives the run another, untrained network, for the same or other tasks."""
    saved = torch.load(run / "model.pt", weights_only=True)
    saved["flags"].update(flags)
    saved["tasks"] = run_tasks or saved["tasks"]
    num_classes = [len(classes) for classes in saved["tasks"].values()]
    torch.manual_seed(0)
    network = model.build_model(saved["flags"], num_classes, len(saved["vocabulary"]))
    saved["network"] = network.state_dict()
    torch.save(saved, run / "model.pt")


def change_predictions(run, **fields):
    """Changes what the run has predicted, as if its network had."""
    p = replace(evaluate.read_predictions(run), **fields)
    evaluate.write_predictions(run / "predictions.npz", p)
    return p


def constant(p, branches, value=0.3):
    """Branches that say the same of every lesion."""
    K = sum(len(classes) for classes in p.tasks.values())
    return {branch: np.full((len(p.cases), K), value) for branch in branches}


def test_predictions_come_back_from_their_file(tmp_path):
    labels, branches = make_lesions(9, {"Größe": ("ä", "b/c"), "x": ("1", "2", "3")})
    p = make_predictions(labels, branches, {"Größe": ("ä", "b/c"), "x": ("1", "2", "3")})
    p.metadata["sex"] = np.array(["female", "", "male"] * 3)
    p.overlaps["dice"] = np.linspace(0, 1, 9)
    evaluate.write_predictions(tmp_path / "predictions.npz", p)
    back = evaluate.read_predictions(tmp_path)
    assert back.tasks == p.tasks and back.fingerprint == "data 1"
    for name in ("cases", "split", "labels"):
        assert (getattr(back, name) == getattr(p, name)).all()
    for part in ("metadata", "branches", "overlaps"):
        before, after = getattr(p, part), getattr(back, part)
        assert list(before) == list(after)
        for name, values in before.items():
            assert (after[name] == values).all()


def test_the_tables_again_change_nothing(run, capsys):
    first_results = evaluate.main([str(run)])
    before = contents(run)
    first = capsys.readouterr().out
    (run / "results.json").unlink()
    (run / "predictions.csv").unlink()
    assert evaluate.main([str(run)]) == first_results == evaluate.evaluate_run(run)
    assert capsys.readouterr().out == first and contents(run) == before
    assert json.loads((run / "results.json").read_text()) == first_results
    for title in ("Table 1", "Table 2", "macro F1", "95% from", "temperature", "weighted (answer)"):
        assert title in first
    assert max(len(line) for line in first.splitlines()) <= 100


def test_predicting_anew_gives_the_same(run, release):
    expected = evaluate.main([str(run)])
    (run / "predictions.npz").unlink()
    with pytest.raises(RunError, match="predictions.npz does not exist.*--resume"):
        evaluate.main([str(run)])
    results = evaluate.evaluate_run(run, release, CPU)
    for branch in (*BRANCHES, "equal", "weighted"):
        close(results["test"][branch]["mean_auc"], expected["test"][branch]["mean_auc"])
    splits = [row["split"] for row in read_table(run / "predictions.csv")]
    assert splits == ["valid"] * 10 + ["test"] * 14


def test_another_release_does_not_overwrite_a_runs_own_predictions(run, release):
    before = contents(run)
    with pytest.raises(RunError, match="belongs to another release"):
        evaluate.evaluate_run(run, replace(release, fingerprint="another"), CPU)
    assert contents(run) == before


def test_a_run_named_twice_is_refused(run):
    for second in (str(run), f"{run}/"):  # it would count as two seeds without any noise
        with pytest.raises(RunError, match="named twice"):
            evaluate.main([str(run), second])


def test_results_are_measured_on_each_branch(run):
    """From predictions.csv, which people read: equal weights, the answer, its calibration."""
    results = evaluate.main([str(run)])
    rows = [row for row in read_table(run / "predictions.csv") if row["split"] == "test"]
    late_fusion = results["late_fusion"]
    for branch in (*BRANCHES, "equal", "weighted"):
        right = []
        for row in rows:
            present = float(row[f"{branch}/veil/present"])
            right.append((present > 0.5) == (row["veil"] == "present"))
        close(results["test"][branch]["accuracy"]["veil"], np.mean(right))
    for row in rows:
        odds = {}
        for branch in (*BRANCHES, "equal", "weighted", "calibrated"):
            absent, present = f"{branch}/veil/absent", f"{branch}/veil/present"
            odds[branch] = float(row[present]) / float(row[absent])
        product = math.prod(odds[branch] for branch in BRANCHES)
        close(odds["equal"], product ** (1 / 3), 1e-4)
        weighted = math.prod(odds[b] ** weight for b, weight in late_fusion["weights"].items())
        close(odds["weighted"], weighted, 1e-4)
        close(odds["calibrated"], weighted ** (1 / late_fusion["temperature"]), 1e-4)
    for name in ("mean_auc", "mean_accuracy"):
        assert results["means"][name] == results["test"]["weighted"][name]
    by_paper = evaluate.read_predictions(run)
    fused = evaluate.fuse(by_paper.branches, late_fusion["paper_weights"], by_paper.tasks)[10:]
    expected = evaluate.measure(fused, by_paper.labels[10:], by_paper.tasks)
    assert results["paper_fusion"]["mean_accuracy"] == expected["mean_accuracy"]
    sexes = [results["subgroups"][f"sex {sex}"]["lesions"] for sex in ("female", "male")]
    assert sum(sexes) == 14


def test_test_labels_decide_nothing(run):
    before = evaluate.main([str(run)])
    p = evaluate.read_predictions(run)
    labels = p.labels.copy()
    labels[p.split == "test"] = (labels[p.split == "test"] + 1) % 2
    change_predictions(run, labels=labels)
    after = evaluate.main([str(run)])
    assert after["test"] != before["test"]
    assert after["late_fusion"] == before["late_fusion"] and after["valid"] == before["valid"]


def test_mean_deviation_and_difference_of_runs(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    p = evaluate.read_predictions(other)
    change_predictions(other, branches=constant(p, BRANCHES))
    capsys.readouterr()
    evaluate.main([str(run), str(other), "--against", str(other)])
    text = capsys.readouterr().out
    results = [json.loads((folder / "results.json").read_text()) for folder in (run, other)]
    values = [100 * result["test"]["weighted"]["mean_auc"] for result in results]
    assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" in text
    lines = [line.split() for line in text.splitlines()]
    difference = f"{(values[0] - values[1]) / 2:+.1f}"  # of the mean of both
    assert ["AUC", difference] in [line[:2] for line in lines]
    assert f"{values[1]:.1f}" in text and "more seeds" in text
    assert max(len(line) for line in text.splitlines()) <= 100


def test_runs_that_measure_different_things_stand_side_by_side(capsys):
    """CLNet's halves: one has classes, the other masks, the whole both."""
    all_results = [
        {"means": {"mean_auc": 0.8}, "test": {"class": {"mean_auc": 0.8}}},
        {"means": {"jaccard": 0.7}, "test": {}},
        {"means": {"mean_auc": 0.9, "jaccard": 0.6}, "test": {"class": {"mean_auc": 0.9}}},
    ]
    evaluate.print_runs(["class alone", "mask alone", "both"], all_results)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["class", "alone", "80.0"] in lines and ["mask", "alone", "70.0"] in lines
    assert ["both", "90.0", "60.0"] in lines
    assert "answer 85.0 ± 7.1 65.0 ± 7.1".split() in lines
    assert ["class", "85.0", "±", "7.1"] not in lines  # not all runs have it


def test_every_branch_is_averaged_over_the_runs(capsys):
    all_results = []
    for auc in (0.6, 0.7, 0.8):
        test = {"clinical": {"mean_auc": auc - 0.1}, "weighted": {"mean_auc": auc}}
        all_results.append({"means": test["weighted"], "test": test})
    evaluate.print_runs(["1", "2", "3"], all_results)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["clinical", "60.0", "±", "10.0"] in lines
    assert ["weighted", "70.0", "±", "10.0"] in lines


@pytest.mark.parametrize("between", [[], ["--against"]])
@pytest.mark.parametrize("changed", ["split", "labels"])
def test_runs_with_other_test_lesions_are_not_compared(changed, between, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    p = evaluate.read_predictions(other)
    p.split[0] = "test"
    p.labels[-1, 0] = -1
    change_predictions(other, **{changed: getattr(p, changed)})
    with pytest.raises(RunError, match="different test lesions"):
        evaluate.main([str(run), *between, str(other)])


def test_without_labels_there_is_nothing_to_compare(run, capsys):
    p = evaluate.read_predictions(run)
    labels = p.labels.copy()
    labels[p.split == "test"] = -1
    change_predictions(run, labels=labels)
    results = evaluate.main([str(run)])
    assert results["test"] == {} and "no test lesion has a label" in capsys.readouterr().out
    with pytest.raises(RunError, match="--against compares classes"):
        evaluate.main([str(run), "--against", str(run)])


def test_one_run_does_not_tell_the_noise(run, capsys):
    evaluate.main([str(run), "--against", str(run)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    differences = [line for line in lines if "+0.0" in line]
    assert len(differences) == 3
    for line in differences:
        assert line[-2:] == ["unknown", "unknown"]


def test_the_answer_is_named(run):
    results = evaluate.main([str(run)])
    assert results["answer"] == "weighted"
    assert results["means"]["mean_auc"] == results["test"]["weighted"]["mean_auc"]


def test_only_lesions_with_a_label_are_counted(run):
    p = evaluate.read_predictions(run)
    labels = p.labels.copy()
    first_test = np.flatnonzero(p.split == "test")[0]
    labels[first_test] = -1
    labels[first_test + 1, 0] = -1  # its other label is known
    change_predictions(run, labels=labels)
    results = evaluate.main([str(run)])
    assert results["lesions"] == 13
    sexes = [results["subgroups"][f"sex {sex}"]["lesions"] for sex in ("female", "male")]
    assert sum(sexes) == 13


def test_a_lesion_is_in_one_subgroup_of_each_fact(run):
    """ "age" and "age_approx" are one fact: the first that is filled counts."""
    p = evaluate.read_predictions(run)
    columns = {  # the last 14 of 24 lesions are the test split
        "age": np.array(12 * ["70"] + 12 * [""]),
        "age_approx": np.array(23 * ["45"] + [""]),
        "elevation": np.array(24 * ["flat"]),
    }
    assert (p.split[-14:] == "test").all() and len(p.cases) == 24
    change_predictions(run, metadata=columns)
    subgroups = evaluate.main([str(run)])["subgroups"]
    counts = {name: measured["lesions"] for name, measured in subgroups.items()}
    assert counts == {"age from 60": 2, "age from 40": 11, "age not given": 1, "elevation flat": 14}


@pytest.fixture
def read_only(monkeypatch):
    """Nothing can be written."""

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data, "atomic_write", refuse)


def test_a_folder_that_may_only_be_read_still_has_tables(run, read_only, capsys):
    assert evaluate.main([str(run)])["test"]
    text = capsys.readouterr().out
    assert "Table 1" in text
    for name in ("predictions.csv", "results.json"):
        assert f"WARNING: {run / name} cannot be written" in text


def test_predictions_that_cannot_be_written_do_not_cost_the_results(run):
    (run / "results.json").unlink()
    (run / "predictions.csv").unlink()
    (run / "predictions.csv").mkdir()  # a folder cannot be replaced by a file
    evaluate.main([str(run)])
    assert (run / "results.json").is_file()


def test_the_answer_is_there_without_its_picture(run, photos, read_only, capsys):
    answer = evaluate.report_one_lesion(run, photos, {}, CPU)
    text = capsys.readouterr().out
    assert list(answer) == ["diagnosis", "veil"] and "veil: " in text
    assert "lesion-clinic0030-derm0030.png cannot be written" in text and "drawn in" not in text


@pytest.mark.parametrize(
    "file, content, arguments, message",
    [
        ("model.pt", b"no model", ["--dermoscopy", "x.jpg"], "model.pt"),
        ("model.pt", b"no model", ["--data", "x.csv"], "model.pt"),
        ("predictions.npz", b"no predictions", [], "predictions.npz is damaged"),
        ("predictions.npz", b"", [], "predictions.npz is damaged"),
        ("predictions.npz", b"PK\x03\x04" + bytes(60), [], "predictions.npz is damaged"),
        ("predictions.npz", b"\x93NUMPY\x01\x00v\x00", [], "predictions.npz is damaged"),
        ("predictions.csv", b"not read", ["--device", "nonsense"], "nonsense"),
    ],
)
def test_damage_ends_in_a_sentence(file, content, arguments, message, run):
    (run / file).write_bytes(content)
    with pytest.raises(RunError, match=message):
        evaluate.main([str(run), *arguments])


def test_a_flipped_byte_is_damage(run):
    path = run / "predictions.npz"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(RunError, match="predictions.npz is damaged"):
        evaluate.main([str(run)])


def test_a_task_may_be_called_mean(capsys):
    """The last lines of a table have this name too."""
    labels, branches = make_lesions()
    tasks = {"mean": TASKS["DIAG"], "95% from": TASKS["PN"]}
    p = make_predictions(labels, branches, tasks)
    late_fusion = evaluate.fit_late_fusion(p)
    results = evaluate.make_results(p, late_fusion, evaluate.fuse_all(p, late_fusion))
    evaluate.print_metric("Table 2", "accuracy", results)
    names = [line[:9].strip() for line in capsys.readouterr().out.splitlines()]
    assert names == ["", "Table 2", "mean", "95% from", "mean", "95% from", "95% to"]


def test_tables_fit_100_columns_and_say_every_name(capsys):
    rows = [
        ("short", ["1.0", "2.0"]),
        ("long " * 25, ["3.0", "4.0"]),
        ("middle " * 13, ["5.0", ""]),
    ]
    evaluate.print_table("a title", ["first", "second (answer)"], rows)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert lines[1].split() == ["a", "title", "first", "second", "(answer)"]
    assert ["3.0", "4.0"] in [line.split() for line in lines]
    assert any(line.startswith("long long") for line in lines)


# --------------------------------------------------------------------------------- another release


@pytest.fixture
def evaluate_csv(run, spc_folder, cache):
    """A function: rows of an own CSV file, photos by number or path -> (results, its folder)."""

    def evaluate_rows(rows):
        for row in rows:
            for view, name in (("clinical", "clinic"), ("dermoscopy", "derm")):
                if isinstance(row.get(view), int):
                    row[view] = str(spc_folder / "images" / f"{name}{row[view]:04}.jpg")
        path = run.parent / "new.csv"
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        before = contents(run)
        arguments = ["--data", str(path), "--cache", str(cache), "--device", "cpu"]
        results = evaluate.main([str(run), *arguments])
        assert contents(run) == before
        return results

    return evaluate_rows


def test_lesions_that_the_run_has_seen_are_left_out(
    evaluate_csv, run, spc_folder, tmp_path, capsys
):
    """By either photo, though its file differs; not by a number. Test lesions stay."""
    photo = (spc_folder / "images" / "derm0003.jpg").read_bytes()
    (tmp_path / "derm.jpg").write_bytes(photo[:2] + b"\xff\xfe\x00\x07hello" + photo[2:])
    rows = [
        {"case": "1", "clinical": 40, "dermoscopy": 40},
        {"case": "same pixels", "clinical": 41, "dermoscopy": str(tmp_path / "derm.jpg")},
        {"case": "same clinical photo", "clinical": 4, "dermoscopy": 42},
        {"case": "validation", "clinical": 20, "dermoscopy": 20},
        {"case": "30", "clinical": 43, "dermoscopy": 43},
        {"case": "new", "clinical": 44, "dermoscopy": 45},
    ]
    results = evaluate_csv(rows)
    text = capsys.readouterr().out
    assert results["test"] == {} and "no test lesion has a label" in text
    assert [row["case"] for row in read_table(run / "new" / "predictions.csv")] == [
        "1",
        "30",
        "new",
    ]
    assert "3 of 6 lesions tested, 0 labelled" in text
    assert "WARNING: 3 of 6 lesions have been seen before: 0 by id, 3 by photo" in text
    with pytest.raises(RunError, match="learned from every lesion"):
        evaluate_csv(rows[1:4])


def test_results_of_releases_with_one_name_lie_apart(run, pairs_csv, tmp_path, cache):
    """The same release again overwrites its own."""
    lines = pairs_csv.with_name("new.csv").read_text().splitlines()
    releases = []
    for folder, number in (("a", 10), ("b", 7)):
        (tmp_path / folder).mkdir()
        shutil.copytree(
            pairs_csv.with_name("spc"), tmp_path / folder / "spc", copy_function=os.link
        )
        releases.append(tmp_path / folder / "new.csv")
        releases[-1].write_text("\n".join(lines[: 1 + number]))
    for path in (releases[0], releases[1], releases[0], releases[1]):
        evaluate.main([str(run), "--data", str(path), "--cache", str(cache), "--device", "cpu"])
    assert len(read_table(run / "new" / "predictions.csv")) == 10
    assert len(read_table(run / "new-2" / "predictions.csv")) == 7
    assert not (run / "new-3").exists()


def test_a_folder_named_like_a_file_keeps_its_name(tmp_path):
    (tmp_path / "release.v2").mkdir()
    folder = evaluate.folder_for_results(tmp_path / "run", tmp_path / "release.v2", "data 1")
    assert folder == tmp_path / "run" / "release.v2"
    folder = evaluate.folder_for_results(tmp_path / "run", tmp_path / "pairs.csv", "data 1")
    assert folder == tmp_path / "run" / "pairs"


def test_results_that_cannot_be_read_are_kept_as_another_releases(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "results.json").write_text("{damaged")
    folder = evaluate.folder_for_results(tmp_path, "new.csv", "data 1")
    assert folder == tmp_path / "new-2"


@pytest.mark.parametrize("has_it", [True, False])
def test_bfloat16_is_used_where_the_device_has_it(has_it, run, release, monkeypatch):
    """The run may have been trained on another device."""
    saved, _ = load(run)
    saved["flags"]["amp"] = True
    asked_for = []
    predict = evaluate.predict

    def note(network, release, rows, device, amp):
        asked_for.append(amp)
        return predict(network, release, rows, device, False)

    monkeypatch.setattr(model, "has_bfloat16", lambda device: has_it)
    monkeypatch.setattr(evaluate, "predict", note)
    evaluate.predict_release(saved, release, CPU)
    assert asked_for == [has_it]


def test_of_its_own_release_the_test_split_remains(run, pairs_csv, cache):
    expected = evaluate.main([str(run)])
    arguments = ["--data", str(pairs_csv), "--cache", str(cache), "--device", "cpu"]
    results = evaluate.main([str(run), *arguments])
    cases = [row["case"] for row in read_table(run / "pairs" / "predictions.csv")]
    assert cases == [str(n) for n in range(26, 40)]
    assert results["late_fusion"] == expected["late_fusion"]
    close(results["means"]["mean_auc"], expected["means"]["mean_auc"])


def test_predictions_without_labels_are_the_runs(evaluate_csv, run):
    evaluate_csv([{"case": str(n), "clinical": n, "dermoscopy": n} for n in range(26, 40)])
    evaluate.main([str(run)])
    expected = {row["case"]: row for row in read_table(run / "predictions.csv")}
    rows = read_table(run / "new" / "predictions.csv")
    assert len(rows) == 14
    for row in rows:
        for column in row:
            if "/" in column:
                assert abs(float(row[column]) - float(expected[row["case"]][column])) < 1e-5


def test_new_labels_are_matched_by_name_and_measured(evaluate_csv, run, capsys):
    """A release with other letters, and without some classes and tasks."""
    expected = evaluate.main([str(run)])
    names = {"melanoma": "MELANOMA", "nevus": "Nevus"}
    rows = []
    for row in read_table(run / "predictions.csv"):
        photo = int(row["case"])
        new = {"case": f"new {photo}", "clinical": photo, "dermoscopy": photo, "split": "test"}
        new |= {"other": "x", "sex": row["sex"], "Veil": row["veil"].upper()}
        new["Diagnosis"] = names.get(row["diagnosis"], "")
        if row["split"] == "test":  # the others are known by their photos
            rows.append(new)
    results = evaluate_csv(rows)
    assert "the run has no class other/x" in capsys.readouterr().out
    assert results["late_fusion"] == expected["late_fusion"]
    assert {"sex female", "sex male"} <= set(results["subgroups"])
    written = read_table(run / "new" / "predictions.csv")
    assert [row["veil"] for row in written] == [row["Veil"].lower() for row in rows]
    for branch, measured in results["test"].items():
        assert list(measured["accuracy"]) == ["diagnosis", "veil"]
        for column, value in measured["auc"].items():
            task, name = column.split("/")
            known = [row for row in written if row[task]]
            scores = [float(row[f"{branch}/{column}"]) for row in known]
            close(value, metrics.roc_auc_score([row[task] == name for row in known], scores))


def test_a_photo_that_the_network_needs_must_be_there(evaluate_csv):
    with pytest.raises(RunError, match="reads clinical and dermoscopy; this release has dermo"):
        evaluate_csv([{"case": "a", "dermoscopy": 50}])


FOUR_METHODS = {
    "pemm": {"model": "pemm"},
    "one photo": {"model": "pemm", "modality": "dermoscopy"},
    "ammfm": {"model": "ammfm", "clinical_backbone": "convnext_mini"},
    "mat": {"model": "mat"},
    "clnet": {"model": "clnet", "tasks": "both", "image_size": 64},
    "clnet, class": {"model": "clnet", "tasks": "class", "image_size": 64},
    "clnet, mask": {"model": "clnet", "tasks": "mask", "image_size": 64},
}


@pytest.mark.parametrize("flags", FOUR_METHODS.values(), ids=list(FOUR_METHODS))
def test_each_method_is_evaluated_tried_on_new_lesions_and_asked_about_one(
    flags, run, pairs_csv, spc_folder, cache, capsys
):
    change_model(run, **flags)
    size = flags.get("image_size", 32)
    release = data.read(pairs_csv, size, cache, masks=True)
    results = evaluate.evaluate_run(run, release, CPU)
    evaluate.print_tables(results)
    new = ["--data", str(pairs_csv.with_name("new.csv")), "--cache", str(cache), "--device", "cpu"]
    new_results = evaluate.main([str(run), *new])
    assert new_results["lesions"] == 20
    photo = spc_folder / "images" / "derm0030.jpg"
    answer = evaluate.main([str(run), "--dermoscopy", str(photo), "--device", "cpu"])
    with Image.open(run / "lesion-derm0030.png") as picture:
        assert picture.width == 1200
    text = capsys.readouterr().out
    if flags.get("tasks") == "mask":
        assert answer == {} and results["test"] == {}
        assert "Table 1" not in text
    else:
        assert list(answer) == ["diagnosis", "veil"]
        assert results["means"]["mean_auc"] > 0 and new_results["means"]["mean_auc"] > 0
    if flags.get("tasks") in ("mask", "both"):
        low, high = results["overlaps"]["jaccard"][1:]
        assert low <= results["means"]["jaccard"] <= high
        assert new_results["overlaps"] and "overlap of the masks" in text


# -------------------------------------------------------------------------- MILK10k's benchmark


def test_logit_adjustment_is_menons():
    """softmax(log p - tau * log prior); a class without training lesions counts as one lesion."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([1, 1, 1], 20)
    adjusted = evaluate.adjust_logits(probabilities, [70, 29, 0], 0.5)
    prior = torch.tensor([0.7, 0.29, 0.01], dtype=torch.float64)
    logits = torch.from_numpy(probabilities).log() - 0.5 * prior.log()
    close(adjusted, logits.softmax(1))
    close(evaluate.adjust_logits(probabilities, [70, 29, 0], 0.0), probabilities)


def test_tau_is_the_best_on_validation_and_the_smallest_of_a_tie():
    tasks = {"DIAG": ("a", "b", "c")}
    labels, branches = make_lesions(90, tasks)
    counts = [80, 8, 2]
    biased = branches["fusion"] * np.array(counts)
    biased /= biased.sum(1, keepdims=True)
    scores = []
    for tau in (0.0, 0.25, 0.5, 0.75, 1.0):
        guess = (np.log(biased) - tau * np.log(np.array(counts) / 90)).argmax(1)
        scores.append(metrics.f1_score(labels[:, 0], guess, average="macro"))
    tau, score, score_before = evaluate.choose_tau(biased, labels, tasks, counts)
    assert tau == 0.25 * np.argmax(scores) > 0
    close([score, score_before], [max(scores), scores[0]])
    tau, _, _ = evaluate.choose_tau(np.eye(3)[labels[:, 0]], labels, tasks, counts)
    assert tau == 0.0  # all are perfect


@pytest.mark.parametrize(
    "row, winner",
    [
        ([0.4, 0.35, 0.25], 0),
        ([0.2, 0.3, 0.5], 2),
        ([0.25, 0.5, 0.25], 1),
        ([0.5, 0.5, 0.0], 0),
        ([0.3, 0.3500000001, 0.3499999999], 1),
        ([0.4999996, 0.5000004, 0.0], 1),
        ([0.0, 0.0, 1.0], 2),
        ([0.7, 0.2, 0.1], 0),
    ],
)
def test_the_likeliest_class_is_above_a_half_in_six_decimals(row, winner):
    submitted = evaluate.let_likeliest_win(np.array([row]))[0]
    written = [float(f"{value:.6f}") for value in submitted]
    assert [n for n in range(3) if written[n] > 0.5] == [winner]
    assert abs(sum(written) - 1) < 1e-5 and min(written) >= 0
    others = [n for n in range(3) if n != winner]
    close(submitted[others[0]] * row[others[1]], submitted[others[1]] * row[others[0]])
    if row[winner] > 0.51:
        close(submitted, row)


@pytest.fixture
def blind_test(spc_folder, tmp_path):
    """The folder of a blind test of MILK10k: 5 lesions, two photos each, and no ground truth."""
    folder = tmp_path / "milk10k_test"
    rows = []
    for n in range(5):
        lesion = f"IL_{n:07}"
        (folder / "MILK10k_Test_Input" / lesion).mkdir(parents=True)
        for name, image_type in (("clinic", "clinical: close-up"), ("derm", "dermoscopic")):
            image = f"ISIC_{n}{len(name):06}"
            source = spc_folder / "images" / f"{name}{40 + n:04}.jpg"
            shutil.copy(source, folder / "MILK10k_Test_Input" / lesion / f"{image}.jpg")
            rows.append({"lesion_id": lesion, "image_type": image_type, "isic_id": image})
    with open(folder / "MILK10k_Test_Metadata.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def become_milk10k(run, release):
    """Makes the run one of MILK10k's classes, with random labels on which it is biased."""
    tasks = {"DIAG": evaluate.MILK10K}
    change_model(run, tasks)
    saved = torch.load(run / "model.pt", weights_only=True)
    counts = [40, 200, 5, 60, 10, 20, 2, 50, 90, 30, 0]
    saved["class_counts"] = {"DIAG": counts}
    torch.save(saved, run / "model.pt")
    labels, branches = make_lesions(24, tasks)
    for branch, probabilities in branches.items():
        biased = probabilities * (np.array(counts) + 1)
        branches[branch] = biased / biased.sum(1, keepdims=True)
    change_predictions(run, tasks=tasks, labels=labels, branches=branches)


def test_submission_for_the_blind_test(run, release, blind_test, cache, capsys):
    become_milk10k(run, release)
    before = contents(run)
    arguments = ["--data", str(blind_test), "--cache", str(cache), "--device", "cpu"]
    results = evaluate.main([str(run), *arguments])
    text = capsys.readouterr().out
    rows = read_table(run / "milk10k_test" / "submission.csv")
    assert contents(run) == before and results["test"] == {}
    assert list(rows[0]) == ["lesion_id", *evaluate.MILK10K]
    assert [row["lesion_id"] for row in rows] == [f"IL_{n:07}" for n in range(5)]
    predicted = read_table(run / "milk10k_test" / "predictions.csv")
    tau = float(text.split("adjusted with tau ")[1].split(":")[0])
    assert tau > 0 and "macro F1 on validation" in text
    saved = torch.load(run / "model.pt", weights_only=True)
    prior = np.maximum(saved["class_counts"]["DIAG"], 1)
    for row, prediction in zip(rows, predicted):
        values = np.array([float(row[name]) for name in evaluate.MILK10K])
        calibrated = [float(prediction[f"calibrated/DIAG/{name}"]) for name in evaluate.MILK10K]
        winner = np.argmax(np.array(calibrated) / prior**tau)
        assert all(len(row[name]) == 8 for name in evaluate.MILK10K)
        assert np.flatnonzero(values > 0.5) == [winner]
        assert abs(values.sum() - 1) < 1e-5 and values.min() >= 0


def test_a_run_with_other_classes_gets_no_submission(run, blind_test, cache, capsys):
    arguments = ["--data", str(blind_test), "--cache", str(cache), "--device", "cpu"]
    evaluate.main([str(run), *arguments])
    assert "no submission.csv" in capsys.readouterr().out
    assert [path.name for path in (run / "milk10k_test").glob("*.csv")] == ["predictions.csv"]


def test_without_validation_labels_there_is_no_submission(run, release, blind_test, cache, capsys):
    become_milk10k(run, release)
    p = evaluate.read_predictions(run)
    change_predictions(run, labels=np.full_like(p.labels, -1))
    arguments = ["--data", str(blind_test), "--cache", str(cache), "--device", "cpu"]
    evaluate.main([str(run), *arguments])
    assert "no submission.csv" in capsys.readouterr().out


def test_a_submission_that_cannot_be_written_is_said(
    run, release, blind_test, cache, monkeypatch, capsys
):
    become_milk10k(run, release)

    def refuse(path, header, lines):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(evaluate, "write_csv", refuse)
    arguments = ["--data", str(blind_test), "--cache", str(cache), "--device", "cpu"]
    evaluate.main([str(run), *arguments])
    text = capsys.readouterr().out
    assert "submission.csv cannot be written" in text and "macro F1 on validation" not in text


# ------------------------------------------------------------------------------------- one lesion


@pytest.fixture
def photos(spc_folder):
    images = spc_folder / "images"
    return {"clinical": images / "clinic0030.jpg", "dermoscopy": images / "derm0030.jpg"}


def load(run):
    saved = model.read_run_file(run / "model.pt")
    return saved, model.load_run(saved, CPU)


def test_one_lesion_is_answered_as_in_predictions_csv(run, release, photos, capsys):
    saved, _ = load(run)
    saved["flags"]["amp"] = False  # one lesion is predicted in float32
    torch.save(saved, run / "model.pt")
    evaluate.evaluate_run(run, release, CPU)
    arguments = [f"--{view}={path}" for view, path in photos.items()]
    answer = evaluate.main([str(run), "--device", "cpu", *arguments])
    row = next(row for row in read_table(run / "predictions.csv") if row["case"] == "30")
    for task, classes in answer.items():
        close(sum(classes.values()), 1, 1e-6)
        for name, value in classes.items():
            assert abs(value - float(row[f"calibrated/{task}/{name}"])) < 1e-4
    text = capsys.readouterr().out
    assert f"diagnosis: {max(answer['diagnosis'], key=answer['diagnosis'].get)}" in text
    with Image.open(run / "lesion-clinic0030-derm0030.png") as picture:  # named for both photos
        assert picture.width == 1200


@pytest.mark.parametrize("view", data.VIEWS)
def test_one_of_two_photos_is_answered_by_its_branch(view, run, photos, capsys):
    """At the temperature of this branch alone; the photo stands in for the other one as well."""
    answer = evaluate.report_one_lesion(run, {view: photos[view]}, {}, CPU)
    text = capsys.readouterr().out
    assert f"only the {view} photo is given" in text and "less reliable" in text
    saved, network = load(run)
    pixels = torch.from_numpy(data.decode(photos[view], 32)).permute(2, 0, 1)[None]
    photo = data.normalise(pixels)
    with torch.no_grad():
        logits = network({"clinical": photo, "dermoscopy": photo})[view]
    p = evaluate.read_predictions(run)
    valid = p.split == "valid"
    alone = p.branches[view][valid]
    temperature = evaluate.fit_temperature(alone, p.labels[valid], p.tasks)
    assert temperature != evaluate.fit_late_fusion(p).temperature
    for task, task_logits in zip(answer, logits):
        close(list(answer[task].values()), (task_logits / temperature).softmax(1)[0], 1e-5)


def test_gradients_of_a_photo_that_stands_in_for_the_other_add_up(run, photos):
    saved, network = load(run)
    batch = evaluate.make_lesion_batch(network, saved, {"clinical": photos["clinical"]}, {}, CPU)
    assert batch["clinical"] is batch["dermoscopy"]
    late_fusion = LateFusion("weighted", {"fusion": 1.0}, 1.5, {})

    def gradients(batch, views):
        probabilities, _ = evaluate.predict_one(network, batch, late_fusion)
        inputs = [batch[view] for view in views]
        return torch.autograd.grad(evaluate.certainty(probabilities), inputs)

    twins = dict(batch)
    twins["dermoscopy"] = batch["clinical"].detach().clone().requires_grad_()
    apart = gradients(twins, ["clinical", "dermoscopy"])
    together = gradients(batch, ["clinical"])
    close(together[0], apart[0] + apart[1], 1e-4)
    assert apart[0].abs().max() > 0 and apart[1].abs().max() > 0


def test_a_photo_of_no_use_is_refused(run, photos, capsys):
    change_model(run, modality="dermoscopy")
    p = evaluate.read_predictions(run)
    change_predictions(run, branches=constant(p, ["dermoscopy"]))
    for given in (photos, {"clinical": photos["clinical"]}):
        with pytest.raises(RunError, match="dermoscopy photos alone: omit --clinical"):
            evaluate.report_one_lesion(run, given, {}, CPU)
    dermoscopy = {"dermoscopy": photos["dermoscopy"]}
    evaluate.report_one_lesion(run, dermoscopy, {"sex": "female"}, CPU)
    assert "no words about the patient" in capsys.readouterr().out


def test_a_single_branch_is_its_own_answer(run):
    change_model(run, modality="dermoscopy")
    p = evaluate.read_predictions(run)
    change_predictions(run, branches={"dermoscopy": p.branches["dermoscopy"]})
    results = evaluate.main([str(run)])
    assert list(results["test"]) == ["dermoscopy"] and results["answer"] == "dermoscopy"
    assert results["late_fusion"]["weights"] == {"dermoscopy": 1.0}
    assert results["means"]["mean_auc"] == results["test"]["dermoscopy"]["mean_auc"]


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_saliency_belongs_to_the_branches_of_the_answer(weights, run, photos):
    """Without attention a branch sees its own photo alone."""
    change_model(run, fusion="concat")
    saved, network = load(run)
    batch = evaluate.make_lesion_batch(network, saved, photos, {}, CPU)
    late_fusion = LateFusion("weighted", dict(zip(BRANCHES, weights)), 1.0, {})
    probabilities, mask = evaluate.predict_one(network, batch, late_fusion)
    heats = evaluate.saliency(probabilities, batch, list(photos))
    assert mask is None and heats["clinical"].shape == (32, 32)
    assert heats["clinical"].any() == (weights[0] + weights[2] > 0)
    assert heats["dermoscopy"].any() == (weights[1] + weights[2] > 0)


def test_words_change_mats_answer(run, spc_folder, release, capsys):
    change_model(run, model="mat")
    evaluate.evaluate_run(run, release, CPU)
    photo = {"dermoscopy": spc_folder / "images" / "derm0030.jpg"}
    about = {"sex": "female", "age": "45", "colour": "red"}
    answers = [evaluate.report_one_lesion(run, photo, words, CPU) for words in ({}, about)]
    assert answers[0] != answers[1]
    assert "colour red" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["sex=female"], ["--dermoscopy", "x.jpg", "--about", "sex"]])
def test_flags_that_do_not_go_together(arguments, run):
    if arguments[0] == "sex=female":
        arguments = ["--about", *arguments]
    with pytest.raises(SystemExit):
        evaluate.main([str(run), *arguments])


def test_long_names_do_not_break_the_picture(run, photos):
    tasks = {"diagnosis": ("a", "b", "c"), "v" * 200: ("ä" * 75, "b" * 300)}
    p = evaluate.read_predictions(run)
    change_model(run, tasks)
    change_predictions(run, tasks=tasks, branches=constant(p, BRANCHES))
    answer = evaluate.report_one_lesion(run, photos, {}, CPU)
    assert len(answer["v" * 200]) == 2


@pytest.mark.parametrize("learns", ["class", "both"])
def test_clnets_activation_map_is_worked_out_by_hand(learns, run, photos):
    """Eq. 2 and 3. The classifier is linear in the pooled maps, so the gradients of log p by the
    logits can be written down."""
    change_model(run, model="clnet", tasks=learns, image_size=64)
    saved, network = load(run)
    given = {"dermoscopy": photos["dermoscopy"]}
    batch = evaluate.make_lesion_batch(network, saved, given, {}, CPU)
    heat = evaluate.activation_map(network, batch, temperature=1.0)
    with torch.no_grad():
        last_map = network.maps(batch)[-1]  # (1, C, 2, 2)
        C = last_map.shape[1]
        weight = torch.zeros(C)
        for head, logits in zip(network.heads, network(batch)["dermoscopy"]):
            one_hot = F.one_hot(logits[0].argmax(), logits.shape[1])
            gradient = one_hot - logits[0].softmax(0)  # of log p by the logits
            weight += gradient @ head.weight[:, -C:] / 4  # a mean over 4 places
        expected = (weight[:, None, None] * last_map[0]).relu().sum(0)
    assert expected.shape == (2, 2) and expected.max() > 0
    close(heat, expected, 1e-4)


def test_pictures_show_where_the_map_and_the_mask_are_high():
    photo = np.full((280, 280, 3), 200, np.uint8)
    heat = np.zeros((2, 2))
    heat[0, 1] = 5.0
    shown = evaluate.overlay(photo, heat)
    assert (shown[-1, 0] == 200).all() and shown[0, -1, 0] < 60  # turquoise has no red


def test_panels(photos):
    """A photo, what counts in it, and the mask; turquoise has no red."""
    mask_logits = torch.full((1, 1, 28, 28), -1.0)
    mask_logits[:, :, 10:18, 10:18] = 0.1
    heats = {"dermoscopy": np.ones((2, 2))}
    panels = evaluate.make_panels({"dermoscopy": photos["dermoscopy"]}, heats, mask_logits)
    (_, photo), (_, heat), (_, mask) = panels
    assert photo.shape == heat.shape == mask.shape == (280, 280, 3)
    assert heat[:, :, 0].max() < 60 and mask[120:160, 120:160, 0].max() < 60
    assert (mask[:80] == photo[:80]).all() and (mask[200:] == photo[200:]).all()


def test_a_fifth_panel_fits_into_the_picture(tmp_path):
    """All panels are there, each narrower."""
    panels = []
    for n in range(6):
        panels.append((f"panel {n}", np.full((280, 280, 3), (0, 40 * n, 0), np.uint8)))
    evaluate.draw(tmp_path / "six.png", panels, "An answer.", {"DIAG": {"a": 0.25, "b": 0.75}})
    with Image.open(tmp_path / "six.png") as picture:
        assert picture.width == 1200
        colours = {colour for _, colour in picture.getcolors(1 << 20)}
    assert all((0, 40 * n, 0) in colours for n in range(6))
