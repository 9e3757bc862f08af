"""Evaluate: a run's predictions become the paper's tables, honest statistics, and an answer for one lesion.

    python evaluate.py RUN                        tables and pictures of a run, from the files in its folder alone
    python evaluate.py RUN --data PATH            predict again first, from model.pt and the photos; --tta: in six views
    python evaluate.py RUN RUN ...                mean and standard deviation; other flags than the seed side by side
    python evaluate.py RUN --against OTHER        is the difference more than chance?
    python evaluate.py RUN --compare-paper        the figures of the PEMM paper beside ours
    python evaluate.py RUN --clinical A.jpg --dermoscopy B.jpg       one lesion; with one photo, or two folders, too

`train.py` ends with the first, so a finished run has predictions.csv, a row per case and class with the probability of each
branch, and results.json. Every number is computed from those probabilities; the test split decides nothing.

Shapes: N lesions, T tasks, K classes of all tasks together, R resamples. Where a dict has the branches of a run, the last one
is its answer: "fused", or the only branch.
"""
import argparse
import csv
import io
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from sklearn.metrics import ConfusionMatrixDisplay, RocCurveDisplay

import data
import model

STEP = 20  # the grid of fusion weights: multiples of 1/20 (ours: 203 validation cases cannot tell finer)
RESAMPLES = 1000  # ours: of the bootstrap
BINS = 15  # ours: of the calibration error
MEANS = {"mean_auc": "AUC", "mean_accuracy": "accuracy", "mean_ap": "AP", "mean_macro_f1": "macro F1",
         "mean_balanced_accuracy": "bal. acc.", "mean_malignant_auc": "malignant AUC"}

# The paper's PEMM, % (Table 1, in the order of its columns; Table 2, in the order of our tasks; their means last). Both are
# the best of its runs; the mean of five is 87.1 and 76.8 (Table 5).
PAPER = {"auc": (94.7, 93.0, 90.8, 94.9, 91.7, 86.7, 83.8, 90.1, 84.4, 79.4, 86.1, 84.9, 80.7, 84.0, 93.9, 88.5, 85.4, 87.6),
         "accuracy": (77.7, 73.7, 76.0, 71.9, 83.0, 65.6, 88.9, 82.5, 77.4)}
# Table 4's PEMM rows, corrected. With the true test positives no confusion matrix gives the printed columns as labelled; all
# eight fit if PRE and SEN change places and SPE is the negative predictive value. class -> (positives, TP, FP, AUC).
PAPER_TABLE_4 = {"DIAG/MEL": (101, 66, 24, 90.9), "PN/ATP": (93, 53, 32, 83.8), "STR/IR": (94, 49, 36, 84.4),
                 "PIG/IR": (124, 80, 37, 86.1), "RS/PRS": (106, 56, 17, 84.9), "DaG/IR": (177, 138, 56, 84.0),
                 "BWV/PRS": (75, 55, 24, 93.9), "VS/IR": (30, 5, 10, 85.4)}
TABLE_4_REMARK = """In the paper PRE and SEN of these rows are exchanged and SPE is the negative predictive value: only so do integer
confusion matrices fit. Its 'sensitivity 64.1' is a precision; the sensitivity is 57.5."""


class RunError(RuntimeError):
    """A run's folder that cannot be used; the message says why and what to do."""


def find_device(name=None):
    """cuda, else mps, else cpu, or the one that is named. Raises RunError if it does not work."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # the random state that train.py saves is that of the current device
    return torch.device(name)


# ----------------------------------------------------------------------------------------------------------- predictions

# Test-time augmentation of the authors' earlier code: as it is, three flips, two quarter turns of (B, 2, S, S, 3).
VIEWS = (lambda x: x, lambda x: x.flip(3), lambda x: x.flip(2), lambda x: x.flip(2, 3),
         lambda x: x.rot90(1, (2, 3)), lambda x: x.rot90(-1, (2, 3)))


@torch.inference_mode()
def predict(network, pixels, rows, device, amp, tta=False, batch_size=48):
    """Probabilities of lesions `rows` of `pixels`: a dict branch -> (N, K) float64, the tasks side by side.

    tta   the mean of the log-probabilities over VIEWS
    """
    network.eval()
    views, found = VIEWS if tta else VIEWS[:1], {}
    for part in torch.as_tensor(rows).split(batch_size):
        photos = pixels[part.to(pixels.device)].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            seen = [network(*data.normalise(view(photos))) for view in views]
        for branch, *logits in zip(model.BRANCHES, *seen):
            if logits[0] is not None:
                # T x (views, B, n_t), on the CPU because mps has no float64
                tasks = [torch.stack(task).float().cpu().double() for task in zip(*logits)]
                found.setdefault(branch, []).append(torch.cat([z.log_softmax(-1).mean(0).softmax(-1) for z in tasks], 1))
    return {branch: torch.cat(parts).numpy() for branch, parts in found.items()}


def last(branches):
    return list(branches.values())[-1]


def logs(probabilities):
    return np.log(np.maximum(probabilities, 1e-300))


def by_task(values, tasks):
    """(..., K) -> one (..., n_t) array a task."""
    return np.split(values, np.cumsum([len(classes) for classes in tasks.values()])[:-1], -1)


def known(values, labels, tasks):
    """Of the n lesions whose label is known, per task: their part of (..., N, K) values, (..., n, n_t); their labels; their rows."""
    for part, truth in zip(by_task(values, tasks), labels.T):
        yield part[..., truth >= 0, :], truth[truth >= 0], truth >= 0


def softmax(logits, tasks):
    parts = [np.exp(part - part.max(-1, keepdims=True)) for part in by_task(logits, tasks)]
    return np.concatenate([part / part.sum(-1, keepdims=True) for part in parts], -1)


def fuse(branches, weights, tasks):
    """Probabilities of the weighted average of the three branches' logits, as in FusionM4Net: (N, K).

    Log-probabilities are logits up to a constant per task, which the softmax takes out again.
    """
    return softmax(sum(weight * logs(branches[branch]) for branch, weight in weights.items()), tasks)


def search_weights(branches, labels, tasks):
    """The weights (clinical, dermoscopy, fusion) >= 0, sum 1, of the highest mean accuracy, on the whole grid of the simplex.

    One triple for all tasks (paper, Sec. 4.1, following FusionM4Net). Of equally accurate triples the one nearest to equal
    weights is taken, then the first in the order of the grid. Give it the validation split only.
    """
    if len(branches) == 1:
        return {branch: 1.0 for branch in branches}
    grid = np.array([(c, d, STEP - c - d) for c in range(STEP + 1) for d in range(STEP + 1 - c)]) / STEP
    accuracy = np.zeros(len(grid))
    for part, truth, _ in known(np.stack([logs(branches[branch]) for branch in model.BRANCHES]), labels, tasks):
        mixed = np.tensordot(grid, part, 1)  # (grid, n, n_t)
        accuracy += (mixed.argmax(-1) == truth).mean(-1) if len(truth) else 0
    distance = ((grid - 1 / 3) ** 2).sum(1)
    best = np.lexsort((distance.round(12), -accuracy.round(12)))[0]  # a stable sort
    return dict(zip(model.BRANCHES, grid[best].tolist()))


# --------------------------------------------------------------------------------------------------------------- metrics
# Each metric takes weights (R, N), how often a lesion counts in each resample, and gives R values; ones give the plain one.


def ratio(a, b):
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b != 0)


def nanmean(values):
    """Mean over the last axis of what is not NaN."""
    there = ~np.isnan(values)
    return ratio(np.where(there, values, 0).sum(-1), there.sum(-1))


def tied(scores, positive, weights):
    """Weight of the positives and of the negatives at each distinct score, from the lowest: (R, G) twice."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)
    positive, weights = positive[order], weights[:, order]
    return np.add.reduceat(weights * positive, starts, 1), np.add.reduceat(weights * ~positive, starts, 1)


def auc(scores, positive, weights):
    """Area under the ROC curve: the share of pairs in which the positive has the higher score, ties counting half."""
    at, negative = tied(scores, positive, weights)
    below = negative.cumsum(1) - negative
    return ratio((at * (below + negative / 2)).sum(1), at.sum(1) * negative.sum(1))


def average_precision(scores, positive, weights):
    """Sum over thresholds of precision times the step in recall (Table 9's AP)."""
    at, negative = (each[:, ::-1] for each in tied(scores, positive, weights))
    precision = ratio(at.cumsum(1), (at + negative).cumsum(1))
    return ratio(np.nansum(at * precision, 1), at.sum(1))


def confusion(predicted, truth, classes, weights):
    """Confusion matrices (R, truth, predicted)."""
    cell = np.eye(classes ** 2)[truth * classes + predicted]  # (N, classes^2)
    return (weights @ cell).reshape(-1, classes, classes)


def columns(task, classes):
    """(class number, "task/class") of a task's columns in Table 1: all classes but "absent", or but the first of two."""
    return [(k, f"{task}/{name}") for k, name in enumerate(classes) if name != "absent" and (k > 0 or len(classes) > 2)]


def measure(probabilities, labels, tasks, weights):
    """All metrics of (N, K) probabilities against (N, T) labels: a dict of name -> {column: R values}, and of their mean ->
    R values. A class that is absent from a resample has no AUC there and is left out of that mean.
    """
    if not np.isfinite(probabilities).all():
        raise RunError("predictions are not finite")
    found = defaultdict(dict)
    for (task, classes), (part, truth, rows) in zip(tasks.items(), known(probabilities, labels, tasks)):
        weight = weights[:, rows]
        matrix = confusion(part.argmax(1), truth, len(classes), weight)
        hit, cases, predicted = np.diagonal(matrix, axis1=1, axis2=2), matrix.sum(2), matrix.sum(1)  # (R, n_t)
        everyone = cases.sum(1, keepdims=True)
        found["accuracy"][task] = ratio(hit.sum(1), everyone[:, 0])
        found["balanced_accuracy"][task] = nanmean(ratio(hit, cases))
        found["macro_f1"][task] = nanmean(ratio(2 * hit, cases + predicted))
        rates = {"precision": np.nan_to_num(ratio(hit, predicted)), "sensitivity": ratio(hit, cases),
                 "specificity": 1 - ratio(predicted - hit, everyone - cases)}
        for k, column in columns(task, classes):
            found["auc"][column] = auc(part[:, k], truth == k, weight)
            found["ap"][column] = average_precision(part[:, k], truth == k, weight)
            for name, rate in rates.items():
                found[name][column] = rate[:, k]
    if tasks == {"DIAG": data.MILK10K}:
        malignant = np.isin(data.MILK10K, data.MALIGNANT)
        found["malignant_auc"]["malignant"] = auc(probabilities[:, malignant].sum(1), malignant[labels[:, 0]], weights)
    return found | {f"mean_{name}": nanmean(np.stack(list(values.values()), 1)) for name, values in found.items()}


# ------------------------------------------------------------------------------------------------------------ statistics


def plain(probabilities, labels, tasks):
    """measure() of the lesions as they are, for a JSON file: numbers in place of R = 1 values, None in place of NaN."""
    number = lambda value: None if np.isnan(value[0]) else float(value[0])
    return {name: {column: number(each) for column, each in value.items()} if isinstance(value, dict) else number(value)
            for name, value in measure(probabilities, labels, tasks, np.ones((1, len(labels)))).items()}


def resamples(n):
    """Bootstrap over lesions: how often each of n counts in each resample, (R, n). Always the same, so runs can be paired."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)


def interval(values):
    return [None, None] if np.isnan(values).all() else np.nanpercentile(values, (2.5, 97.5)).tolist()


def intervals(probabilities, labels, tasks):
    """95% bootstrap interval of every mean: name -> [low, high]."""
    found = measure(probabilities, labels, tasks, resamples(len(labels)))
    return {name: interval(values) for name, values in found.items() if name.startswith("mean_")}


def find_temperature(probabilities, labels, tasks):
    """T of softmax(logits / T) with the lowest cross-entropy over all known labels, 1 if none is known. Give it the validation
    split only."""
    if not (labels >= 0).any():
        return 1.0
    grid = np.geomspace(0.2, 5, 161)
    sharpened = logs(softmax(logs(probabilities) / grid[:, None, None], tasks))  # (grid, N, K)
    likelihood = sum(part[:, np.arange(len(truth)), truth].sum(1) for part, truth, _ in known(sharpened, labels, tasks))
    return float(grid[likelihood.argmax()])


def reliability(probabilities, labels, tasks):
    """Confidence and correctness of every prediction, all tasks pooled: per bin (count, mean confidence, share correct)."""
    pairs = [(part.max(1), part.argmax(1) == truth) for part, truth, _ in known(probabilities, labels, tasks)]
    confidence, correct = map(np.concatenate, zip(*pairs))
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = [place == b for b in np.unique(place)]
    return [[int(b.sum()), float(confidence[b].mean()), float(correct[b].mean())] for b in bins]


def calibration_error(bins):
    """Expected calibration error: mean distance between confidence and accuracy, weighted by the bins' counts."""
    return sum(n * abs(c - a) for n, c, a in bins) / max(1, sum(n for n, _, _ in bins))


def subgroups(p):
    """Means of a run's answer for each value of each column of metadata; ages in bands of 20 years."""
    found = {}
    for column, values in p.metadata.items():
        groups = defaultdict(list)
        for n, value in enumerate(values):
            if column.startswith("age") and value.replace(".", "", 1).isdigit():
                low = int(float(value)) // 20 * 20
                value = f"{low} to {low + 19}"
            groups[value or "not given"].append(n)
        for value, rows in sorted(groups.items()) if 1 < len(groups) <= 20 else ():
            part = plain(last(p.branches)[rows], p.labels[rows], p.tasks)
            there = sum(each is not None for each in part["auc"].values())  # classes with cases and others
            found[f"{column} {value}"] = {"lesions": len(rows), "columns": there} | {
                name: part[name] for name in ("mean_auc", "mean_accuracy", "mean_malignant_auc") if name in part}
    return found


def same_lesions(p, other):
    """Whether two runs have the same tasks and test lesions, in the same order and with the same labels."""
    a, b = p.part("test"), other.part("test")
    return list(a.tasks.items()) == list(b.tasks.items()) and a.cases == b.cases and np.array_equal(a.labels, b.labels)


def difference(p, other):
    """Paired bootstrap of two runs on the same test lesions: name -> (difference, [low, high], share of resamples above 0)."""
    if not same_lesions(p, other):
        raise RunError("the two runs have different tasks or test lesions; their difference would mean nothing")
    found, p, other = {}, p.part("test"), other.part("test")
    weights = np.vstack((np.ones(len(p.labels)), resamples(len(p.labels))))  # the lesions as they are, then resampled
    ours, theirs = (measure(last(each.branches), p.labels, p.tasks, weights) for each in (p, other))
    for name in MEANS:
        if name in ours and not np.isnan(ours[name][0]):
            gap, *gaps = ours[name] - theirs[name]
            found[name] = float(gap), interval(gaps), float(np.mean(np.array(gaps) > 0))
    return found


# ----------------------------------------------------------------------------------------------------------- a run's files


class Predictions(NamedTuple):
    """The contents of predictions.csv: the validation and test lesions of a run."""
    tasks: dict  # task -> its class names
    cases: list  # N names
    split: np.ndarray  # (N,) "valid" or "test"
    labels: np.ndarray  # (N, T), -1 unknown
    branches: dict  # branch -> (N, K) probabilities; the last one is the answer
    metadata: dict  # column -> N strings

    def part(self, split):
        rows = np.flatnonzero(self.split == split)
        pick = lambda values: [values[row] for row in rows]
        return Predictions(self.tasks, pick(self.cases), self.split[rows], self.labels[rows],
                           {branch: values[rows] for branch, values in self.branches.items()},
                           {column: pick(values) for column, values in self.metadata.items()})


def write_whole(path, text):
    with data.whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load_checkpoint(path, device):
    """What train.py saved there, or None if there is no such file. Raises RunError if it is damaged."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:  # torch raises half a dozen types for a damaged file, none of them says which
        raise RunError(f"{path} is damaged ({error}); remove it, and python train.py --resume {path.parent} "
                       "does its work anew") from error


def load_run(run, device):
    """The network of a finished run with its averaged weights, and what model.pt says of it."""
    saved = load_checkpoint(Path(run) / "model.pt", device)
    if saved is None:
        raise RunError(f"{run}: no model.pt; is it a finished run? python train.py --resume {run} goes on with one")
    saved["tasks"] = {task: tuple(classes) for task, classes in saved["tasks"].items()}
    network = model.make(saved["flags"], [len(classes) for classes in saved["tasks"].values()]).to(device)
    network.load_state_dict(saved["state"])
    return network.eval(), saved


def make_predictions(network, release, pixels, device, amp, tta=False):
    """Predictions of the release's validation and test lesions, whose photos are `pixels`."""
    rows = np.concatenate([release.rows("valid"), release.rows("test")])
    return Predictions(release.tasks, [release.cases[row] for row in rows], release.split[rows], release.labels[rows],
                       predict(network, pixels, rows, device, amp, tta),
                       {column: [values[row] for row in rows] for column, values in release.metadata.items()})


def predict_again(run, path, cache, device, tta):
    """Predictions of the release at `path` with the network of the run, which must not have learned from its test lesions."""
    network, saved = load_run(run, device)
    flags, tasks = saved["flags"], saved["tasks"]
    release = data.read(path, flags["binary"])
    if list(release.tasks.items()) != list(tasks.items()):
        raise RunError(f"{path} has the tasks {release.tasks}, but {run} learned {tasks}")
    tested = np.flatnonzero(release.split != "train")
    if seen := sum(not set(saved["trained"]).isdisjoint(release.files(row)) for row in tested):
        raise RunError(f"{run} was trained on {seen} of the validation and test lesions of {path}; give it a column split, or "
                       "evaluate on the release that it was trained with")
    pixels = torch.from_numpy(data.load(release, flags["image_size"], cache))
    return make_predictions(network, release, pixels, device, flags["amp"], tta)


def write_predictions(path, p):
    """A row per case and class: truth (1, 0 or empty), the probability of each branch, the case's metadata. Probabilities
    are written with all their digits, so that reading gives the same bits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "split", "task", "class", "truth", *p.branches, *p.metadata])
    classes = [(t, k, task, name) for t, (task, names) in enumerate(p.tasks.items()) for k, name in enumerate(names)]
    for n, case in enumerate(p.cases):
        for column, (t, k, task, name) in enumerate(classes):
            truth = "" if p.labels[n, t] < 0 else int(p.labels[n, t] == k)
            writer.writerow([case, p.split[n], task, name, truth,
                             *(repr(float(values[n, column])) for values in p.branches.values()),
                             *(values[n] for values in p.metadata.values())])
    write_whole(path, text.getvalue())


def read_predictions(path):
    """What write_predictions wrote. Raises RunError if the file is missing or is not as it was written."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        classes = [(row["task"], row["class"]) for row in rows]
        K = next((n for n in range(1, len(rows)) if classes[n] == classes[0]), len(rows))
        tasks = defaultdict(tuple)
        for task, name in classes[:K]:
            tasks[task] += (name,)
        truth = np.array([row["truth"] for row in rows]).reshape(-1, K)
        labels = np.stack([np.where((part == "1").any(1), (part == "1").argmax(1), -1) for part in by_task(truth, tasks)], 1)
        branches = {name: np.array([float(row[name]) for row in rows]).reshape(-1, K)
                    for name in (*model.BRANCHES, "fused") if name in rows[0]}
        cases = rows[::K]
    except FileNotFoundError as error:
        if not (path.parent / "model.pt").exists():
            raise RunError(f"{path.parent} is no finished run; if one was stopped there, python train.py --resume {path.parent}") from error
        raise RunError(f"{path} is missing: evaluate.py RUN --data PATH predicts again from model.pt") from error
    except (LookupError, TypeError, ValueError) as error:
        raise RunError(f"{path} is not as it was written ({error}): evaluate.py RUN --data PATH writes it anew") from error
    return Predictions(dict(tasks), [row["case"] for row in cases], np.array([row["split"] for row in cases]), labels, branches,
                       {name: [row[name] for row in cases] for name in list(rows[0])[5:] if name not in branches})


def evaluate_run(run, new=None, suffix=""):
    """(results, Predictions) of a run, from its predictions.csv or from new predictions, which are then written there; writes
    results.json. The suffix, "-tta" with test-time augmentation, is part of both names."""
    table = Path(run) / f"predictions{suffix}.csv"
    p = read_predictions(table) if new is None else new
    if missing := {"valid", "test"} - set(p.split):
        raise RunError(f"{table} is not as it was written (it has no lesion of {' and '.join(missing)}): "
                       "evaluate.py RUN --data PATH writes it anew")
    p.branches.pop("fused", None)
    valid = p.part("valid")  # what is searched or fitted sees the validation split only
    results = {"weights": search_weights(valid.branches, valid.labels, p.tasks)}
    if len(p.branches) > 1:
        p.branches["fused"] = fuse(p.branches, results["weights"], p.tasks)
    results["temperature"] = {branch: find_temperature(values, valid.labels, p.tasks)
                              for branch, values in p.part("valid").branches.items()}
    if new is not None:
        write_predictions(table, p)
    for split in ("valid", "test"):
        part = p.part(split)
        results[split] = {branch: plain(values, part.labels, p.tasks) for branch, values in part.branches.items()}
    for branch, values in part.branches.items():
        results["test"][branch]["intervals"] = intervals(values, part.labels, p.tasks)
    answer = last(part.branches)
    fitted = softmax(logs(answer) / last(results["temperature"]), p.tasks)
    results["calibration"] = {name: reliability(values, part.labels, p.tasks)
                              for name, values in (("as it is", answer), ("fitted", fitted))}
    results["subgroups"] = subgroups(part)
    write_whole(Path(run) / f"results{suffix}.json", json.dumps(results, indent=1))
    return results, p


# ---------------------------------------------------------------------------------------------------------------- tables


def percent(value):
    return value if isinstance(value, str) else "-" if value is None else f"{100 * value:.1f}"


def print_table(title, columns, rows):
    """Columns "task/class" get two lines of header, the task only where it changes; rows are (name, texts or shares of 1)."""
    rows = [(name, list(map(percent, cells))) for name, cells in rows]
    above, names = zip(*(column.split("/", 1) if "/" in column else ("", column) for column in columns))
    tops = [top if n == 0 or above[n - 1] != top else "" for n, top in enumerate(above)]
    widths = [max(map(len, (top, name, *(cells[n] for _, cells in rows)))) for n, (top, name) in enumerate(zip(tops, names))]
    left = max(len(name) for name, _ in rows)
    print(f"\n{title}")
    for name, cells in ([("", tops)] if any(tops) else []) + [("", names), *rows]:
        print(f"{name:{left}}" + "".join(f"  {text:>{width}}" for text, width in zip(cells, widths)).rstrip())


def with_paper(name, ours, paper):
    """A row, then the paper's (in %) and the difference."""
    gaps = ["-" if value is None else f"{100 * value - each:+.1f}" for value, each in zip(ours, paper)]
    return [(name, ours), ("paper", [each / 100 for each in paper]), ("difference", gaps)]


def paper_table_4():
    """Table 4's PEMM rows, corrected: metric -> eight shares of 100 and their mean. The test split has 395 cases."""
    rows = {"auc": [auc for *_, auc in PAPER_TABLE_4.values()],
            "precision": [100 * tp / (tp + fp) for _, tp, fp, _ in PAPER_TABLE_4.values()],
            "sensitivity": [100 * tp / n for n, tp, _, _ in PAPER_TABLE_4.values()],
            "specificity": [100 * (1 - fp / (395 - n)) for n, _, fp, _ in PAPER_TABLE_4.values()]}
    return {name: [*values, sum(values) / 8] for name, values in rows.items()}


def shown_means(found):
    """The means to print: of several tasks AUC and accuracy, as in the paper."""
    return [name for name in MEANS if name in found and (len(found["accuracy"]) == 1 or name in ("mean_auc", "mean_accuracy"))]


def print_tables(results, compare=False):
    test, answer = results["test"], last(results["test"])
    name, spc = list(test)[-1], list(answer["accuracy"]) == list(data.SPC)
    if compare and not spc:
        raise RunError("--compare-paper: the figures are of the Seven-Point Checklist, and this run has other tasks")
    if len(test) > 1:
        print("weights of the fused prediction, searched on validation: " +
              ", ".join(f"{branch} {weight:.2f}" for branch, weight in results["weights"].items()))
    titles = {"auc": "Table 1: AUC, each class against the rest, test split (%)", "accuracy": "Table 2: accuracy (%)"}
    for metric in titles if spc else ["auc"]:
        rows = [(branch, [*found[metric].values(), found[f"mean_{metric}"]]) for branch, found in test.items()]
        print_table(titles[metric], [*answer[metric], "mean"],
                    rows[:-1] + with_paper(*rows[-1], PAPER[metric]) if compare else rows)
    if spc:
        rows = []
        for metric, paper in paper_table_4().items():
            ours = [answer[metric][column] for column in PAPER_TABLE_4]
            ours.append(None if None in ours else sum(ours) / len(ours))
            rows += with_paper(metric, ours, paper) if compare else [(metric, ours)]
        print_table(f"Table 4: melanoma-related classes, {name} (%)", [*PAPER_TABLE_4, "mean"], rows)
        if compare:
            print(TABLE_4_REMARK)
    means = shown_means(answer)
    print_table("means with 95% bootstrap intervals over the test lesions (%)", [MEANS[mean] for mean in means], [
        (branch, [f"{percent(found[mean])} ({' to '.join(map(percent, found['intervals'][mean]))})" for mean in means])
        for branch, found in test.items()])
    before, after = (100 * calibration_error(bins) for bins in results["calibration"].values())
    print(f"\ncalibration error of {name}: {before:.1f}%; {after:.1f}% at the temperature {last(results['temperature']):.2f} "
          "fitted on validation")
    if groups := results["subgroups"]:
        means = [mean for mean in MEANS if mean in last(groups)]
        print_table(f"subgroups, {name} (%); a column without cases and others is not in the mean",
                    ["lesions", "columns", *(MEANS[mean] for mean in means)],
                    [(group, [str(each["lesions"]), str(each["columns"]), *(each[mean] for mean in means)])
                     for group, each in groups.items()])


def print_groups(runs, results):
    """Mean and standard deviation over seeds of the runs' answers, a row for each setting of the other flags; returns their
    values: setting -> mean -> a list."""
    try:
        flags = [json.loads((Path(run) / "args.json").read_text())["flags"] for run in runs]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"several runs are grouped by the flags in their args.json, which cannot be read ({error})") from error
    differ = [flag for flag in flags[0] if flag not in ("seed", "out", "cache", "device", "data")
              and len({str(each.get(flag)) for each in flags}) > 1]
    groups = defaultdict(list)
    for each, result in zip(flags, results):
        groups[", ".join(f"{flag} {each.get(flag)}" for flag in differ) or "all runs"].append(result["test"])

    def cell(values):
        values = [100 * value for value in values if value is not None]
        spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        return f"{np.mean(values):.1f}{spread}" if values else "-"

    first = results[0]["test"]
    means = shown_means(last(first))
    values = {group: {mean: [last(test)[mean] for test in tests] for mean in means} for group, tests in groups.items()}
    print_table("mean ± standard deviation over runs, test split (%)", ["runs", *(MEANS[mean] for mean in means)],
                [(group, [str(len(groups[group])), *map(cell, each.values())]) for group, each in values.items()])
    for metric in ("auc", "accuracy") if len(groups) == 1 else ():
        print_table(f"{metric}, mean ± standard deviation (%)", [*last(first)[metric], "mean"], [
            (branch, [*(cell([each["test"][branch][metric][column] for each in results]) for column in last(first)[metric]),
                      cell([each["test"][branch][f"mean_{metric}"] for each in results])]) for branch in first])
    return values


# ------------------------------------------------------------------------------------------------------------ one lesion


def answer(network, saved, results, clinical, dermoscopy, device):
    """The photos of N lesions, (N, 2, S, S, 3), and a dict branch -> (N, K) probabilities, the last one calibrated: "fused", or
    the only photo's branch. `clinical` and `dermoscopy` are lists of N paths; one of them may be empty."""
    size, paths = saved["flags"]["image_size"], [*(clinical or dermoscopy), *(dermoscopy or clinical)]
    photos = np.stack(list(data.in_threads(lambda path: data.decode(path, size), paths, "decoding photos")))
    photos = photos.reshape(2, -1, *photos.shape[1:]).swapaxes(0, 1)
    branches = predict(network, torch.from_numpy(photos), range(len(photos)), device, saved["flags"]["amp"])
    if not (clinical and dermoscopy):
        kind = "clinical" if clinical else "dermoscopy"
        if kind not in branches:
            raise RunError(f"this run learned from the {list(branches)[0]} photo only; give --{list(branches)[0]}")
        branches = {kind: branches[kind]}
    elif len(branches) > 1:
        branches["fused"] = fuse(branches, results["weights"], saved["tasks"])
    name = list(branches)[-1]
    return photos, branches | {name: softmax(logs(branches[name]) / results["temperature"][name], saved["tasks"])}


def print_answer(branches, tasks):
    """Prints each task's classes and the branches that disagree; returns the number of each task's likeliest class."""
    guesses = {branch: [int(part.argmax()) for part in by_task(values[0], tasks)] for branch, values in branches.items()}
    labels = last(guesses)
    for t, ((task, classes), part) in enumerate(zip(tasks.items(), by_task(last(branches)[0], tasks))):
        shown = " ".join(f"{name} {100 * p:.0f}%" for name, p in zip(classes, part))
        differ = ", ".join(f"{branch} {classes[guess[t]]}" for branch, guess in guesses.items() if guess[t] != labels[t])
        print(f"{task:6} {classes[labels[t]]:10} {shown}" + f"   (but {differ})" * bool(differ))
    if tasks.keys() >= data.SPC.keys():
        score = data.seven_point_score(tasks, labels)
        print(f"seven-point score of these criteria: {score} ({'3 or more: suspicious' if score >= 3 else 'less than 3'})")
    return labels


def look(network, photos, weights, labels, device, point):
    """Where an answer comes from: a gradient map (S, S) of each of the photos (2, S, S, 3), and what a point of each reads.

    The map is the gradient of the summed log-probabilities of the predicted classes with respect to the pixels, its size
    blurred. `weights` says how much of each branch is in the answer. The attention is that after the second stage (H/8), of
    `point` (x, y from 0 to 1) or of each map's highest place.
    """
    inputs, seen = [photo.requires_grad_() for photo in data.normalise(torch.from_numpy(photos)[None].to(device))], []
    attentions = list(getattr(network, "attentions", ()))[1:2]
    hooks = [attention.register_forward_pre_hook(lambda module, maps: seen.extend(maps)) for attention in attentions]
    outputs = network(*inputs)
    for t, label in enumerate(labels):
        z = sum(weight * getattr(outputs, branch)[t].log_softmax(1) for branch, weight in weights.items())
        z.log_softmax(1)[0, label].backward(retain_graph=True)
    for hook in hooks:
        hook.remove()
    maps, reads = [], []
    for photo in inputs:
        size = torch.zeros(photo.shape[-2:]) if photo.grad is None else photo.grad[0].abs().sum(0).cpu()
        radius = len(size) // 32
        maps.append(F.avg_pool2d(size[None], 2 * radius + 1, 1, radius, count_include_pad=False)[0].numpy())
    for side, gradient in enumerate(maps if seen else ()):
        x, y = point or (np.array(np.unravel_index(gradient.argmax(), gradient.shape))[::-1] / len(gradient))
        H, W = seen[0].shape[2:]
        with torch.no_grad():
            read = attentions[0].weights_at(*seen, min(int(y * H), H - 1), min(int(x * W), W - 1))[side][0]
        reads.append((read.float().cpu().numpy() * H * W, (x, y)))  # 1: as much as if it read every place alike
    return maps, reads


def draw_answer(panels, probabilities, tasks, labels):
    """The picture of one lesion, 1,200 pixels wide: panels (photo, title, heat from 0 to 1, mark) and the predicted classes."""
    side, gap, caption, line, font = 288, 10, 26, 21, ImageFont.load_default(15)
    first, second = (12 + max(map(font.getlength, names)) for names in (tasks, sum(tasks.values(), ())))
    bars = line * sum(map(len, tasks.values())) + 6 * len(tasks) + gap
    sheet = Image.new("RGB", (1200, 2 * gap + side + caption + max(side + caption + gap, bars)), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (photo, title, heat, mark) in enumerate(panels):
        image = Image.fromarray(photo).resize((side, side), Image.BICUBIC)
        left, top = gap + n % 4 * (side + gap), gap + n // 4 * (side + caption + gap)
        if heat is not None:
            m = np.asarray(Image.fromarray(heat).resize((side, side), Image.BICUBIC)).clip(0, 1)[..., None]
            glow = np.concatenate((np.full_like(m, 255), 230 * m ** 2, np.zeros_like(m)), 2)
            image = Image.fromarray((np.asarray(image) * (1 - 0.75 * m) + glow * 0.75 * m).astype(np.uint8))
        sheet.paste(image, (left, top))
        draw.text((left, top + side + 3), title, "black", font)
        if mark is not None:
            draw.circle((left + mark[0] * side, top + mark[1] * side), 7, outline=(0, 255, 255), width=3)
    y, left = gap + side + caption + gap, 2 * (side + gap) + gap
    for (task, classes), part, label in zip(tasks.items(), by_task(probabilities[0], tasks), labels):
        draw.text((left, y), task, "black", font)
        for k, (name, value) in enumerate(zip(classes, part)):
            colour = (200, 30, 30) if k == label else (110, 110, 110)
            start = left + first + second
            end = start + (1140 - start) * value
            draw.text((left + first, y), name, colour, font)
            draw.rectangle((start, y + 3, end, y + 15), fill=colour)
            draw.text((end + 8, y), f"{100 * value:.0f}%", colour, font)
            y += line
        y += 6
    return sheet


def one_lesion(run, clinical, dermoscopy, device, point):
    """Answer for one lesion, or for two folders of photos of the same names; returns the branches' probabilities."""
    device = find_device(device)
    network, saved = load_run(run, device)
    try:
        results = json.loads((Path(run) / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"{run}/results.json cannot be read ({error}); python evaluate.py {run} writes it") from error
    if any(path and Path(path).is_dir() for path in (clinical, dermoscopy)):
        return folder_of_lesions(run, network, saved, results, clinical, dermoscopy, device)
    paths = [[Path(path)] if path else [] for path in (clinical, dermoscopy)]
    (photos,), branches = answer(network, saved, results, *paths, device)
    tasks, both, name = saved["tasks"], clinical and dermoscopy, list(branches)[-1]
    if not both:
        print(f"only the {name} photo: the answer of its branch, in which that photo takes the place of the missing one too")
    labels = print_answer(branches, tasks)
    maps, reads = look(network, photos, results["weights"] if name == "fused" else {name: 1.0}, labels, device, point)
    if not both:
        maps, reads = [maps[0] + maps[1]], []  # one photo in both places
    if point and not reads:
        raise RunError("--point shows the attention between two photos, and there is none here")
    shown, panels = [data.decode(path, 288) for path in sum(paths, [])], []
    for n, (kind, heat) in enumerate(zip(("clinical", "dermoscopy") if both else (name,), maps)):
        panels += [(shown[n], kind, None, reads[n][1] if reads else None),
                   (shown[n], f"what counts in the {kind} photo", heat / max(heat.max(), 1e-30), None)]
    other = shown if saved["flags"]["reading"] == "swapped" else shown[::-1]  # swapped: the other's map, the own values
    for (read, _), photo, kind in zip(reads, other, ("clinical", "dermoscopy")):
        panels.append((photo, f"read by the {kind} point ({read.max():.1f}x even)", (read - 1) / max(2, read.max() - 1), None))
    path = Path(run) / f"lesion-{Path(clinical or dermoscopy).stem}.png"
    draw_answer(panels, last(branches), tasks, labels).save(path)
    print(f"picture: {path}. Research software, not a medical device.")
    return branches


def folder_of_lesions(run, network, saved, results, clinical, dermoscopy, device):
    """Photos of the same name (without ending) in two folders are a lesion; a CSV with a row per lesion and class."""
    if not (clinical and dermoscopy and Path(clinical).is_dir() and Path(dermoscopy).is_dir()):
        raise RunError("give two folders, --clinical DIR --dermoscopy DIR, with photos of the same names")
    files = [[path for path in sorted(Path(folder).iterdir()) if path.suffix.lower() in data.PHOTOS]
             for folder in (clinical, dermoscopy)]
    photos = [{path.stem: path for path in paths} for paths in files]
    if any(len(by_name) < len(paths) for by_name, paths in zip(photos, files)):
        raise RunError("two photos of a folder have one name and different endings; remove one of them")
    if alone := sorted(photos[0].keys() ^ photos[1].keys()):
        raise RunError(f"{len(alone)} photos have no partner of the same name: {', '.join(alone[:10])}")
    if not photos[0]:
        raise RunError(f"{clinical}: no photos")
    cases = list(photos[0])
    _, branches = answer(network, saved, results, *([by_name[case] for case in cases] for by_name in photos), device)
    path, unknown = Path(run) / "lesions.csv", np.full((len(cases), len(saved["tasks"])), -1)
    write_predictions(path, Predictions(saved["tasks"], cases, np.full(len(cases), ""), unknown, branches, {}))
    print(f"{len(cases)} lesions: {path}. Research software, not a medical device.")
    return branches


# ------------------------------------------------------------------------------------------------- curves, if matplotlib


def sheet(*size, rows=1, columns=1):
    """A matplotlib figure and its axes; not pyplot's, so there is no window. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def draw_curves(run, results, p, suffix=""):
    """curves.png, roc.png, confusion.png and reliability.png in the run's folder, where matplotlib is installed."""
    part, wide = p.part("test"), min(len(p.tasks), 4)
    tall = -(-len(p.tasks) // wide)
    try:
        curves, axes = sheet(9, 3.5, columns=2)
        roc, above = sheet(4 * wide, 3.6 * tall, rows=tall, columns=wide)
        matrices, below = sheet(4 * wide, 4 * tall, rows=tall, columns=wide)
        calibration, (square,) = sheet(4.5, 4)
    except ImportError:
        print("\nmatplotlib is not installed: no curves.png, roc.png, confusion.png, reliability.png")
        return
    with open(run / "log.csv", newline="") as file:
        log = list(csv.DictReader(file))
    for name in (name for name in log[0] if name.startswith(("loss", "valid"))):
        side = axes[int(name.startswith("valid"))]
        side.plot([int(row["epoch"]) for row in log], [float(row[name]) for row in log], label=name.replace("_", " "))
        side.set(xlabel="epoch")
        side.legend()
    cases = known(last(part.branches), part.labels, p.tasks)
    for (task, classes), (scores, truth, _), one, two in zip(p.tasks.items(), cases, above, below):
        for k, _ in columns(task, classes):
            if 0 < (truth == k).sum() < len(truth):
                RocCurveDisplay.from_predictions(truth == k, scores[:, k], ax=one, name=classes[k])
        one.set(title=task, xlabel="1 - specificity", ylabel="sensitivity")
        matrix = confusion(scores.argmax(1), truth, len(classes), np.ones((1, len(truth))))[0].astype(int)
        ConfusionMatrixDisplay(matrix, display_labels=classes).plot(ax=two, cmap="Blues", colorbar=False, xticks_rotation=45)
        two.set(title=task)
    for name, bins in results["calibration"].items():
        _, confidence, correct = np.array(bins).reshape(-1, 3).T
        square.plot(confidence, correct, "o-", label=f"{name}: {percent(calibration_error(bins))}%")
    square.plot([0, 1], [0, 1], ":", color="grey")
    square.set(xlabel="confidence", ylabel="share correct")
    square.legend(title="calibration error")
    curves.savefig(run / "curves.png", dpi=150)
    for name, figure in (("roc", roc), ("confusion", matrices), ("reliability", calibration)):
        figure.savefig(run / f"{name}{suffix}.png", dpi=150)


def draw_sweep(path, groups):
    """Table 7 as a picture, where matplotlib is installed: the means over runs against W."""
    try:
        figure, sides = sheet(8, 3.5, columns=2)
    except ImportError:
        return
    for axes, name in zip(sides, ("mean_auc", "mean_accuracy")):
        ws, values = zip(*sorted((float(group.split()[-1]), 100 * np.array(each[name], float)) for group, each in groups.items()))
        axes.errorbar(ws, list(map(np.mean, values)), [v.std(ddof=min(1, len(v) - 1)) for v in values], fmt="o-")
        axes.set(xlabel="W of Eq. 3", ylabel=f"{MEANS[name]} (%)")
    figure.savefig(path, dpi=150)
    print(f"picture: {path}")


def parse(argv):
    parser = argparse.ArgumentParser(description="A run's predictions become the paper's tables, and an answer for one lesion.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--data", metavar="PATH", help="predict again, from model.pt and the release at this path")
    parser.add_argument("--tta", action="store_true", help="mean over six views of each photo; with --data")
    parser.add_argument("--cache", default="runs/cache", metavar="DIR", help="folder of the decoded photos [%(default)s]")
    parser.add_argument("--device", help="where to predict [cuda, else mps, else cpu]")
    parser.add_argument("--compare-paper", action="store_true", help="the paper's figures beside ours")
    parser.add_argument("--against", metavar="OTHER", help="paired bootstrap of the difference from this run")
    parser.add_argument("--clinical", metavar="PHOTO", help="one lesion: its clinical photo, or a folder of them")
    parser.add_argument("--dermoscopy", metavar="PHOTO", help="one lesion: its dermoscopy photo, or a folder of them")
    parser.add_argument("--point", nargs=2, type=float, metavar=("X", "Y"), help="one lesion: whose attention is drawn, 0 to 1")
    args = parser.parse_args(argv)
    lesion, several = args.clinical or args.dermoscopy, len(args.runs) > 1
    for wrong, what in (
            (args.tta and not args.data, "--tta predicts again, so it needs --data"),
            (args.point and not 0 <= min(args.point) <= max(args.point) <= 1, "--point goes from 0 0, the upper left corner, to 1 1"),
            (args.point and not lesion, "--point needs --clinical or --dermoscopy"),
            (lesion and (several or args.tta or args.against or args.data or args.compare_paper),
             "--clinical and --dermoscopy take one RUN, --device and --point, and nothing else"),
            (several and (args.against or args.compare_paper), "--against and --compare-paper take one RUN"),
            (len({Path(run).resolve() for run in args.runs}) < len(args.runs), "a RUN is given twice")):
        if wrong:
            parser.error(what)
    return args


def main(argv=None):
    """Prints what the flags ask for; returns the results of the (first) run, or the probabilities of one lesion."""
    args = parse(argv)
    if args.clinical or args.dermoscopy:
        return one_lesion(args.runs[0], args.clinical, args.dermoscopy, args.device, args.point)
    suffix, device = "-tta" * args.tta, find_device(args.device)
    results, predictions = zip(*(evaluate_run(
        run, predict_again(run, args.data, args.cache, device, args.tta) if args.data else None, suffix) for run in args.runs))
    for run, p in zip(args.runs, predictions):
        if not same_lesions(predictions[0], p):
            raise RunError(f"{args.runs[0]} and {run} have different tasks or test lesions; look at them one by one")
    if len(results) == 1:
        print_tables(results[0], args.compare_paper)
        draw_curves(Path(args.runs[0]), results[0], predictions[0], suffix)
    else:
        groups = print_groups(args.runs, results)
        if all(group.startswith("w ") and "," not in group for group in groups):
            draw_sweep(Path(args.runs[0]) / "w-sweep.png", groups)
    if args.against:
        print()
        for name, (gap, (low, high), above) in difference(predictions[0], evaluate_run(args.against)[1]).items():
            print(f"{MEANS[name]}: {args.runs[0]} - {args.against} = {100 * gap:+.1f} points, 95% interval {100 * low:+.1f} to "
                  f"{100 * high:+.1f}; above 0 in {100 * above:.0f}% of the resamples")
    return results[0]


if __name__ == "__main__":
    try:
        main()
    except (data.DataError, RunError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
