"""Evaluate: a run's predictions become the paper's tables, with intervals.

    python evaluate.py RUN            the tables of a run, from the files in its folder alone
    python evaluate.py RUN RUN ...    mean and standard deviation over runs
    python evaluate.py RUN --data PATH   predict again from model.pt and the photos

`train.py` ends with this, so a finished run has `predictions.csv`, a row per case and class with the probability of each
branch, and `results.json`. Everything below is computed from those probabilities.

Shapes: N lesions, T tasks, K classes of all tasks together, R resamples.
"""
import argparse
import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
import model
from data import DataError

STEP = 20  # the grid of fusion weights: multiples of 1/20 (ours: 203 validation cases cannot tell finer)


class RunError(RuntimeError):
    """A run's folder that cannot be used; the message says why and what to do."""


# ----------------------------------------------------------------------------------------------------------- predictions


@torch.inference_mode()
def predict(network, pixels, rows, device, amp, batch_size=48):
    """Probabilities of lesions `rows` of `pixels`: a dict branch -> (N, K) float64, the tasks side by side."""
    network.eval()
    found = {}
    for part in torch.as_tensor(rows).split(batch_size):
        clinical, dermoscopy = data.normalise(pixels[part.to(pixels.device)].to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            outputs = network(clinical, dermoscopy)
        for branch, logits in outputs._asdict().items():
            if logits is not None:
                found.setdefault(branch, []).append(torch.cat([z.double().softmax(1) for z in logits], 1).cpu())
    return {branch: torch.cat(parts).numpy() for branch, parts in found.items()}


def logs(probabilities):
    return np.log(np.maximum(probabilities, 1e-300))


def by_task(values, tasks):
    """(..., K) -> one (..., n_t) array a task."""
    return np.split(values, np.cumsum([len(classes) for classes in tasks.values()])[:-1], -1)


def fuse(branches, weights, tasks):
    """Probabilities of the weighted average of the three branches' logits, as in FusionM4Net: (N, K).

    Log-probabilities are logits up to a constant per task, which the softmax takes out again.
    """
    mixed = sum(weight * logs(branches[branch]) for branch, weight in weights.items())
    parts = [part - np.logaddexp.reduce(part, -1, keepdims=True) for part in by_task(mixed, tasks)]
    return np.exp(np.concatenate(parts, -1))


def search_weights(branches, labels, tasks):
    """The weights (clinical, dermoscopy, fusion) >= 0, sum 1, of the highest mean accuracy, on the whole grid of the simplex.

    One triple for all tasks (paper, Sec. 4.1, following FusionM4Net). Of equally accurate triples the one nearest to equal
    weights is taken, then the first in the order of the grid. Give it the validation split only.
    """
    if len(branches) == 1:
        return {branch: 1.0 for branch in branches}
    grid = np.array([(c, d, STEP - c - d) for c in range(STEP + 1) for d in range(STEP + 1 - c)]) / STEP
    accuracy = np.zeros(len(grid))
    for t, parts in enumerate(zip(*(by_task(logs(branches[branch]), tasks) for branch in model.BRANCHES))):
        known = labels[:, t] >= 0
        mixed = np.tensordot(grid, np.stack(parts)[:, known], 1)  # (grid, N, n_t)
        accuracy += (mixed.argmax(-1) == labels[known, t]).mean(-1) if known.any() else 0
    distance = ((grid - 1 / 3) ** 2).sum(1)
    best = min(range(len(grid)), key=lambda i: (-accuracy[i].round(12), distance[i].round(12), i))
    return dict(zip(model.BRANCHES, grid[best].tolist()))


# --------------------------------------------------------------------------------------------------------------- metrics
# Each metric takes weights (R, N), how often a lesion counts in each resample, and gives R values; ones give the plain one.


def ratio(a, b):
    return np.divide(a, b, out=np.full(np.broadcast(a, b).shape, np.nan), where=b != 0)


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


def positives(tasks):
    """(task number, class number, name) of each column of Table 1: all classes but "absent", or but the first of two."""
    return [(t, k, f"{task} {name}") for t, (task, classes) in enumerate(tasks.items()) for k, name in enumerate(classes)
            if name != "absent" and (k > 0 or len(classes) > 2)]


def measure(probabilities, labels, tasks, weights):
    """All metrics of (N, K) probabilities against (N, T) labels: a dict of name -> R values or of name -> {column: R values}.

    A class that is absent from a resample has no AUC there and is left out of that mean.
    """
    if not np.isfinite(probabilities).all():
        raise RunError("predictions are not finite")
    parts = by_task(probabilities, tasks)
    found = {name: {} for name in ("auc", "ap", "precision", "sensitivity", "specificity", "accuracy", "macro_f1",
                                   "balanced_accuracy")}
    matrices = []
    for t, (task, classes) in enumerate(tasks.items()):
        known = labels[:, t] >= 0
        c = confusion(parts[t][known].argmax(1), labels[known, t], len(classes), weights[:, known])
        hit, truth, predicted = np.diagonal(c, axis1=1, axis2=2), c.sum(2), c.sum(1)
        found["accuracy"][task] = ratio(hit.sum(1), c.sum((1, 2)))
        found["balanced_accuracy"][task] = nanmean(ratio(hit, truth))
        found["macro_f1"][task] = nanmean(ratio(2 * hit, truth + predicted))
        matrices.append((c, hit, truth, predicted))
    for t, k, name in positives(tasks):
        known = labels[:, t] >= 0
        case = parts[t][known, k], labels[known, t] == k, weights[:, known]
        found["auc"][name], found["ap"][name] = auc(*case), average_precision(*case)
        c, hit, truth, predicted = matrices[t]
        found["precision"][name] = np.nan_to_num(ratio(hit[:, k], predicted[:, k]))
        found["sensitivity"][name] = ratio(hit[:, k], truth[:, k])
        found["specificity"][name] = 1 - ratio(predicted[:, k] - hit[:, k], c.sum((1, 2)) - truth[:, k])
    if tasks == {"DIAG": data.MILK10K}:
        malignant = [name in data.MALIGNANT for name in data.MILK10K]
        found["malignant_auc"] = {"malignant": auc(probabilities[:, malignant].sum(1), np.array(malignant)[labels[:, 0]], weights)}
    for name, columns in list(found.items()):
        found[f"mean_{name}"] = nanmean(np.stack(list(columns.values()), 1))
    return found


def nanmean(values):
    """Mean over the last axis of what is not NaN."""
    there = ~np.isnan(values)
    return ratio(np.where(there, values, 0).sum(-1), there.sum(-1))


def intervals(probabilities, labels, tasks, resamples=1000, seed=0):
    """Bootstrap 95% intervals over lesions (percentiles) of every mean: name -> [low, high]."""
    n = len(labels)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples).astype(float)
    found = measure(probabilities, labels, tasks, weights)
    return {name: np.nanpercentile(values, (2.5, 97.5)).tolist() for name, values in found.items() if name.startswith("mean_")}


# ----------------------------------------------------------------------------------------------------------- a run's files


def write_whole(path, text):
    with data.whole(path) as temporary:
        temporary.write_text(text)


def load_run(run, device):
    """The network of a finished run with its averaged weights, and what model.pt says of it."""
    try:
        saved = torch.load(Path(run) / "model.pt", map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise RunError(f"{run}: no model.pt; is it a finished run? python train.py --resume {run} goes on with one") from error
    network = model.make(saved["flags"], [len(classes) for classes in saved["tasks"].values()]).to(device)
    network.load_state_dict(saved["state"])
    return network, saved


class Predictions(NamedTuple):
    """The contents of predictions.csv: the validation and test lesions of a run."""
    tasks: dict  # task -> its class names
    cases: list  # N names
    split: np.ndarray  # (N,) "valid" or "test"
    labels: np.ndarray  # (N, T), -1 unknown
    branches: dict  # branch -> (N, K) probabilities
    metadata: dict  # column -> N strings

    def part(self, split):
        rows = self.split == split
        return self.labels[rows], {branch: values[rows] for branch, values in self.branches.items()}


def make_predictions(run, path, cache, device):
    """Predict the validation and test lesions of the release at `path` with the network of the run."""
    network, saved = load_run(run, device)
    flags, tasks = saved["flags"], {task: tuple(classes) for task, classes in saved["tasks"].items()}
    release = data.read(path, flags["binary"])
    if release.tasks != tasks:
        raise RunError(f"{path} has the tasks {release.tasks}, but {run} learned {tasks}")
    pixels = torch.from_numpy(data.load(release, flags["image_size"], cache))
    rows = np.concatenate([release.rows("valid"), release.rows("test")])
    return Predictions(tasks, [release.cases[row] for row in rows], release.split[rows], release.labels[rows],
                       predict(network, pixels, rows, device, flags["amp"]),
                       {column: [values[row] for row in rows] for column, values in release.metadata.items()})


def write_predictions(path, p):
    """A row per case and class: truth (1, 0 or empty), the probability of each branch, the case's metadata. Probabilities
    are written with all their digits, so that reading gives the same bits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["case", "split", "task", "class", "truth", *p.branches, *p.metadata])
    columns = [(t, k, task, name) for t, (task, classes) in enumerate(p.tasks.items()) for k, name in enumerate(classes)]
    for n, case in enumerate(p.cases):
        about = [values[n] for values in p.metadata.values()]
        for column, (t, k, task, name) in enumerate(columns):
            truth = "" if p.labels[n, t] < 0 else int(p.labels[n, t] == k)
            writer.writerow([case, p.split[n], task, name, truth,
                             *(repr(float(values[n, column])) for values in p.branches.values()), *about])
    write_whole(path, text.getvalue())


def read_predictions(path):
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing: evaluate.py RUN --data PATH predicts again from model.pt") from error
    tasks = {}
    for row in rows:
        if row["class"] in tasks.setdefault(row["task"], ()) :
            break
        tasks[row["task"]] += (row["class"],)
    K = sum(map(len, tasks.values()))
    first = rows[::K]  # one row a case
    truth = np.array([row["truth"] for row in rows]).reshape(-1, K)
    labels = np.stack([np.where((part == "1").any(1), (part == "1").argmax(1), -1) for part in by_task(truth, tasks)], 1)
    names = list(rows[0])[5:]
    branches = {name: np.array([float(row[name]) for row in rows]).reshape(-1, K) for name in names if name in (*model.BRANCHES, "fused")}
    metadata = {name: [row[name] for row in first] for name in names if name not in branches}
    return Predictions(tasks, [row["case"] for row in first], np.array([row["split"] for row in first]), labels, branches, metadata)


def evaluate_run(run, path=None, cache="runs/cache", device=torch.device("cpu")):
    """Results of a run as a dict, also written to results.json; predictions.csv is made first if `path` is given."""
    run = Path(run)
    p = make_predictions(run, path, cache, device) if path else read_predictions(run / "predictions.csv")
    p.branches.pop("fused", None)
    weights = search_weights(*p.part("valid")[::-1], p.tasks)
    if len(p.branches) > 1:
        p.branches["fused"] = fuse(p.branches, weights, p.tasks)
    if path:
        write_predictions(run / "predictions.csv", p)
    results = {"weights": weights}
    for split in ("valid", "test"):
        labels, branches = p.part(split)
        once = np.ones((1, len(labels)))
        results[split] = {}
        for branch, values in branches.items():
            found = measure(values, labels, p.tasks, once)
            results[split][branch] = {name: scalars(value) for name, value in found.items()}
            if split == "test":
                results[split][branch]["intervals"] = intervals(values, labels, p.tasks)
    write_whole(run / "results.json", json.dumps(results, indent=1))
    return results


def scalars(value):
    if isinstance(value, dict):
        return {name: scalars(each) for name, each in value.items()}
    return None if np.isnan(value[0]) else float(value[0])


# ---------------------------------------------------------------------------------------------------------------- tables


def percent(value):
    return "    -" if value is None else f"{100 * value:5.1f}"


def print_tables(results):
    test = results["test"]
    branches = list(test)
    any_branch = test[branches[0]]
    if len(branches) > 1:
        print("weights searched on validation: " + ", ".join(f"{k} {v:.2f}" for k, v in results["weights"].items()))
    print("\nTable 1: AUC, one class against the rest, test split (%)")
    columns = list(any_branch["auc"])
    width = [max(5, len(name.split()[-1])) for name in columns]
    tasks = [name.rsplit(" ", 1)[0] for name in columns]
    print(f"{'':11}" + " ".join(f"{task if n == 0 or tasks[n - 1] != task else '':>{w}}" for n, (task, w) in enumerate(zip(tasks, width))))
    print(f"{'':11}" + " ".join(f"{name.split()[-1]:>{w}}" for name, w in zip(columns, width)) + "  mean  95% interval")
    for branch in branches:
        low, high = test[branch]["intervals"]["mean_auc"]
        print(f"{branch:11}" + " ".join(f"{percent(value):>{w}}" for value, w in zip(test[branch]["auc"].values(), width)) +
              f" {percent(test[branch]['mean_auc'])}  {100 * low:.1f} to {100 * high:.1f}")
    print("\nTable 2: accuracy, test split (%)")
    print(f"{'':11}" + " ".join(f"{task:>6}" for task in any_branch["accuracy"]) + "   mean  95% interval")
    for branch in branches:
        low, high = test[branch]["intervals"]["mean_accuracy"]
        print(f"{branch:11}" + " ".join(f"{percent(value):>6}" for value in test[branch]["accuracy"].values()) +
              f"  {percent(test[branch]['mean_accuracy'])}  {100 * low:.1f} to {100 * high:.1f}")
    extra = [name for name in ("mean_macro_f1", "mean_balanced_accuracy", "mean_malignant_auc", "mean_ap")
             if name in any_branch and len(any_branch["accuracy"]) == 1]
    for name in extra:
        print(f"\n{name}")
        for branch in branches:
            low, high = test[branch]["intervals"][name]
            print(f"{branch:11} {percent(test[branch][name])}  {100 * low:.1f} to {100 * high:.1f}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="A run's predictions become the paper's tables.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--data", help="predict again, from model.pt and the release at this path")
    parser.add_argument("--cache", default="runs/cache", help="folder of the decoded photos (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="where to predict (default %(default)s)")
    args = parser.parse_args(argv)
    results = {}
    for run in args.runs:
        results[run] = evaluate_run(run, args.data, args.cache, torch.device(args.device))
        print_tables(results[run])
    return results[args.runs[0]]


if __name__ == "__main__":
    try:
        main()
    except (DataError, RunError) as error:
        sys.exit(f"evaluate.py: {error}")
