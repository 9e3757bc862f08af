"""Evaluate: a run's predictions become one answer, the paper's tables, and statistics.

    python evaluate.py RUN                      the tables of a finished run
    python evaluate.py RUN RUN ...              mean and standard deviation of several runs
    python evaluate.py RUN ... --against OTHER ...    is the difference more than chance?
    python evaluate.py RUN --data NEW           another release, but for what the run has seen
    python evaluate.py RUN --clinical A.jpg --dermoscopy B.jpg    one lesion; one photo will do

A network has branches, each with logits of its own (PEMM: clinical, dermoscopy, fusion). Late
fusion makes further predictors of them:

    predictor       its probabilities                                    used for
    each branch     softmax(its logits)                                  tables
    "equal"         softmax(mean of the branches' logits)                tables
    "weighted"      softmax(weighted mean of the branches' logits)       tables: it is the answer
    "calibrated"    softmax(that weighted mean / temperature)            one lesion, submissions

The validation split chooses the weights and the temperature. The likeliest classes of calibrated
are those of weighted, and its probabilities are more honest. The paper has no temperature, so no
AUC or accuracy of calibrated is shown. A network with a single branch has nothing to fuse: in its
tables this branch is the answer.

The method comes first, up to "The method ends here": predicting, late fusion, the metrics of the
paper's tables. Each section after it can be skipped: statistics, a run's files, results, tables,
MILK10k's benchmark, another release, one lesion, CLNet's maps, the picture, the report, flags.

Shapes: N lesions, T tasks, n_t classes of task t, K = n_1 + ... + n_T classes of all tasks, S the
side of a photo in pixels. `branches` is a dict from branch to probabilities (N, K), in which the
tasks stand side by side. `p` is always a Predictions.
"""

import argparse
import csv
import itertools
import json
import math
import os
import textwrap
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn import metrics
from torchvision.transforms.functional import gaussian_blur

import data
import model
from loss import branch_loss
from model import RunError

BATCH_SIZE = 48  # lesions predicted at once: changes speed, memory and the rounding, no more
STEPS = 20  # weights are multiples of 1/20; not in the paper: SPC's 203 lesions tell no finer
TEMPERATURES = np.geomspace(0.1, 10, 101)  # to choose from, in steps of 4.7%; not in the paper


@dataclass
class Predictions:
    """What a network says of N lesions, and what is known of them.

    Whoever adds a field that is a dict names it in read_predictions too.
    """

    tasks: dict  # task -> its class names
    cases: np.ndarray  # (N,) names of the lesions
    split: np.ndarray  # (N,) "valid" or "test"
    labels: np.ndarray  # (N, T) int64, the number of the true class; -1 unknown
    metadata: dict  # column of the release's table, such as "sex" -> (N,) texts
    branches: dict  # branch -> (N, K) probabilities
    overlaps: dict  # for CLNet; skip. "jaccard", "dice" of its masks -> (N,); else empty
    fingerprint: str  # of the release, to tell it from others


# ------------------------------------------------------------------------------------ predicting


@torch.inference_mode()
def predict(network, release, rows, device, amp):
    """The network's probabilities for N lesions of a release, in batches of B.

    release  a data.Release
    rows     numbers of the N lesions in it, a tensor (N,)
    amp      whether the network calculates in bfloat16

    Returns two dicts: branch -> (N, K) float64 probabilities, and overlap -> (N,). The latter is
    empty unless the network finds masks and the release has true ones. The network is left in
    evaluation mode.
    """
    network.eval()
    probabilities = defaultdict(list)  # branch -> an array (B, K) for each batch
    fits = defaultdict(list)  # overlap -> an array (B,) for each batch; for CLNet; skip
    rows_of_batches = torch.split(rows, BATCH_SIZE)  # the first 48, the next 48, ...
    for batch_rows in data.progress(rows_of_batches, "predicting"):
        batch = data.make_batch(release, batch_rows, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            outputs = network(batch)  # branch -> T logits (B, n_t)
        mask_logits = outputs.pop("mask", None)  # of CLNet; only branches are left in `outputs`
        if mask_logits is not None and "mask" in batch:  # for CLNet; skip
            for overlap, values in mask_overlaps(mask_logits, batch["mask"]).items():
                fits[overlap].append(values)
        for branch, logits in outputs.items():
            parts = []
            for task_logits in logits:
                precise = task_logits.float().cpu().double()  # Apple's mps has no float64
                parts.append(precise.softmax(dim=1))  # (B, n_t)
            probabilities[branch].append(torch.cat(parts, dim=1).numpy())
    branches = {branch: np.concatenate(arrays) for branch, arrays in probabilities.items()}
    overlaps = {overlap: np.concatenate(arrays) for overlap, arrays in fits.items()}
    return branches, overlaps


# ------------------------------------------------------------------------------ late fusion


def softmax_of_mean(logits, weights, temperature):
    """For each task softmax(weighted mean of the branches' logits / temperature).

    logits   branch -> T tensors (N, n_t)
    weights  branch -> its weight, the sum being 1. Branches without a weight are left out

    Returns T tensors (N, n_t) of probabilities, through which gradients flow.
    """
    num_tasks = len(next(iter(logits.values())))
    probabilities = []
    for t in range(num_tasks):
        mean = 0
        for branch, weight in weights.items():
            mean = mean + weight * logits[branch][t]
        probabilities.append(torch.softmax(mean / temperature, dim=1))
    return probabilities


def split_by_task(values, tasks):
    """An array (N, K) becomes T arrays (N, n_t)."""
    num_classes = [len(classes) for classes in tasks.values()]
    ends = np.cumsum(num_classes)
    return np.split(values, ends[:-1], axis=1)


def to_logits(probabilities, tasks):
    """Logits that give these probabilities: (N, K) -> T tensors (N, n_t).

    A network's own logits z are forgotten, but log(softmax(z)) = z - log(sum(exp(z))) serves as
    well. It is z minus the same number for all classes of a task, which every softmax ignores.
    """
    logarithms = np.log(np.maximum(probabilities, 1e-300))  # there is no logarithm of 0
    return [torch.from_numpy(part) for part in split_by_task(logarithms, tasks)]


def fuse(branches, weights, tasks, temperature=1.0):
    """Late fusion of probabilities: branch -> (N, K) becomes (N, K).

    weights: branch -> weight; their sum must be 1, as another sum would act like a temperature.
    """
    logits = {branch: to_logits(branches[branch], tasks) for branch in weights}
    fused = softmax_of_mean(logits, weights, temperature)
    return torch.cat(fused, dim=1).numpy()


def is_correct(probabilities, labels, tasks):
    """Is the likeliest class the true one? Probabilities (N, K) and labels (N, T) -> (N, T) bool.

    The result is one of numpy's masked arrays: entries without a known label are masked, and its
    mean() and count() leave them out. (This has nothing to do with CLNet's masks of lesions.)
    """
    predicted = [part.argmax(axis=1) for part in split_by_task(probabilities, tasks)]  # T of (N,)
    correct = np.stack(predicted, axis=1) == labels
    return np.ma.masked_array(correct, mask=labels < 0)


def to_weights(names, steps):
    """Steps of 1/20, such as (7, 7, 6), as a dict from the branches' names to weights."""
    return {name: step / STEPS for name, step in zip(names, steps)}


def unevenness(steps):
    """How far weights are from equal ones: (7, 7, 6) has 134, (20, 0, 0) has 400."""
    return sum(step**2 for step in steps)


def standard_error(probabilities, labels, tasks):
    """The standard error of the mean accuracy, if other lesions had been drawn.

    Each lesion has a share of tasks in which it is right. The mean accuracy is the mean of these
    shares (only nearly where labels are unknown), and the spread of the shares tells its error.
    """
    share = is_correct(probabilities, labels, tasks).mean(axis=1)  # (N,)
    return share.std() / math.sqrt(share.count())  # count: of lesions with any known label


def search_weights(branches, labels, tasks):
    """The weights of the branches, the same for all tasks, from the N validation lesions.

    The paper (Sec. 4.1, after Tang et al. 2022) takes the most accurate ones. Many others are less
    accurate by no more than chance. So the answer takes, of all that are within one standard error
    of the best, the most even ones (not in the paper: averages of several branches vary less). On
    test lesions the AUC rose by 0.2 points in the demo and by 0.3 on MILK10k. The accuracy may
    fall, because this rule is generous: the difference of two accuracies on the same lesions is
    known more precisely than each of them.

    Returns two choices, branch -> weight: the answer's and the paper's. Without any known label
    both are equal weights.
    """
    if not (labels >= 0).any():
        equal = dict.fromkeys(branches, 1 / len(branches))
        return equal, equal
    logits = {branch: to_logits(branches[branch], tasks) for branch in branches}  # see `fuse`
    accuracies = {}  # steps -> mean accuracy; three branches have 231 choices
    for steps in itertools.product(range(STEPS + 1), repeat=len(branches)):
        if sum(steps) == STEPS:
            fused = softmax_of_mean(logits, to_weights(branches, steps), temperature=1.0)
            correct = is_correct(torch.cat(fused, dim=1).numpy(), labels, tasks)
            accuracy = correct.mean(axis=0).mean()  # over lesions, then over tasks
            accuracies[steps] = round(float(accuracy), 9)  # so that ties are ties
    highest = max(accuracies.values())
    tied = [steps for steps in accuracies if accuracies[steps] == highest]
    best = min(tied, key=unevenness)  # the paper has no rule for ties

    fused = fuse(branches, to_weights(branches, best), tasks)
    lowest = highest - standard_error(fused, labels, tasks)
    near = [steps for steps in accuracies if accuracies[steps] >= lowest]
    # Of equally even choices the first counts, as for `best`: of three branches equal within the
    # error the first gets 6/20 and the others 7/20.
    chosen = min(near, key=unevenness)
    return to_weights(branches, chosen), to_weights(branches, best)


def fit_temperature(probabilities, labels, tasks):
    """The temperature with the lowest cross-entropy on the validation lesions (Guo et al. 2017).

    A network that is too sure of itself gets one above 1. Without any known label it is 1.
    """
    if not (labels >= 0).any():
        return 1.0
    labels = torch.from_numpy(labels)
    logits = to_logits(probabilities, tasks)
    costs = []
    for temperature in TEMPERATURES:
        scaled = [task_logits / temperature for task_logits in logits]
        costs.append(branch_loss(scaled, labels).item())  # unknown labels cost nothing
    return float(TEMPERATURES[np.argmin(costs)])


@dataclass
class LateFusion:
    """How the branches become one answer: chosen on the validation split alone."""

    answer_name: str  # what the tables call the answer, "weighted" or the only branch: a name only
    weights: dict  # branch -> its weight in the answer
    temperature: float  # of calibrated
    paper_weights: dict  # branch -> its weight by the paper's choice, for a line of the tables


def fit_late_fusion(p):
    """The LateFusion for a run's Predictions p. A run that predicts masks alone fuses nothing."""
    if not p.branches:
        return LateFusion(answer_name="", weights={}, temperature=1.0, paper_weights={})
    answer_name = "weighted" if len(p.branches) > 1 else list(p.branches)[0]
    is_valid = p.split == "valid"
    labels = p.labels[is_valid]
    branches = {branch: probabilities[is_valid] for branch, probabilities in p.branches.items()}
    weights, paper_weights = search_weights(branches, labels, p.tasks)
    fused = fuse(branches, weights, p.tasks)
    temperature = fit_temperature(fused, labels, p.tasks)
    return LateFusion(answer_name, weights, temperature, paper_weights)


# --------------------------------------------------------------- the metrics of the paper's tables


def is_finding(k, classes):
    """Does class number k have a column in Table 1, where it is told from all other classes?

    "absent" has none, and of two classes only the second has one. That loses no AUC, as the first
    would have the same; but precision, sensitivity and average precision are then the second's
    alone. The order of the classes is data.py's: as published, in an own CSV file by the alphabet
    with "absent" first. There, of melanoma and nevus the finding is nevus.

    The 24 classes of SPC's eight tasks give 17 findings: all 5 of DIAG, 2 of 3 of PN, STR, PIG, DaG
    and VS, 1 of 2 of RS and BWV. Their plain mean is the paper's AVG AUC.
    """
    if len(classes) == 2:
        return k == 1
    return classes[k] != "absent"


@dataclass
class LabelledTask:
    """One task, and those L of the N lesions whose label of it is known."""

    name: str
    is_labelled: np.ndarray  # (N,) bool: which lesions these are
    labels: np.ndarray  # (L,) their true classes
    probabilities: np.ndarray  # (L, n_t)
    predicted: np.ndarray  # (L,) their likeliest classes
    findings: dict  # number of a class -> its finding, such as "DIAG/MEL"


def labelled_tasks(probabilities, labels, tasks):
    """(N, K) and (N, T) -> a list of LabelledTasks. A task without any known label is left out."""
    labelled = []
    parts = split_by_task(probabilities, tasks)
    for t, (name, classes) in enumerate(tasks.items()):
        is_labelled = labels[:, t] >= 0
        if not is_labelled.any():
            continue
        truth = labels[is_labelled, t]
        part = parts[t][is_labelled]
        findings = {}
        for k, class_name in enumerate(classes):
            number = np.sum(truth == k)
            if is_finding(k, classes) and 0 < number < len(truth):  # AUC compares some with others
                findings[k] = f"{name}/{class_name}"
        predicted = part.argmax(axis=1)
        labelled.append(LabelledTask(name, is_labelled, truth, part, predicted, findings))
    return labelled


def measure(probabilities, labels, tasks):
    """All metrics of one predictor: probabilities (N, K), labels (N, T).

    Returns, for example,
        {"accuracy": {"DIAG": 0.7, "PN": 0.6}, "mean_accuracy": 0.65,
         "auc": {"DIAG/MEL": 0.9, "DIAG/NEV": 0.8, "PN/ATP": 0.7}, "mean_auc": 0.8, ...}

    accuracy, macro_f1                           of each task (Table 2)
    auc, precision, sensitivity, specificity     of each finding (Tables 1 and 4)
    ap, for a single task                        average precision of each finding (Table 9)
    lrap, for a single task                      one number, label ranking average precision: the
                                                 mean of 1 / rank of the true class (MAT's Table 1)
    What cannot be measured for lack of labels is left out.
    """
    is_single = len(tasks) == 1
    values = defaultdict(dict)  # metric -> {task or finding: value}
    measured = {}
    for task in labelled_tasks(probabilities, labels, tasks):
        macro_f1 = metrics.f1_score(task.labels, task.predicted, average="macro")
        values["macro_f1"][task.name] = macro_f1
        values["accuracy"][task.name] = metrics.accuracy_score(task.labels, task.predicted)
        if is_single:
            one_hot = np.eye(task.probabilities.shape[1])[task.labels]
            lrap = metrics.label_ranking_average_precision_score(one_hot, task.probabilities)
            measured["lrap"] = float(lrap)
        for k, finding in task.findings.items():
            is_class = task.labels == k
            is_predicted = task.predicted == k
            scores = task.probabilities[:, k]
            true_positives = np.sum(is_predicted & is_class)
            true_negatives = np.sum(~is_predicted & ~is_class)
            values["auc"][finding] = metrics.roc_auc_score(is_class, scores)
            values["precision"][finding] = true_positives / max(np.sum(is_predicted), 1)
            values["sensitivity"][finding] = true_positives / np.sum(is_class)
            values["specificity"][finding] = true_negatives / np.sum(~is_class)
            if is_single:
                values["ap"][finding] = metrics.average_precision_score(is_class, scores)
    for metric, value_of in values.items():
        measured[metric] = {name: float(value) for name, value in value_of.items()}
        measured[f"mean_{metric}"] = float(np.mean(list(value_of.values())))
    return measured


# The method ends here.

# ------------------------------------------------------------------------------------- statistics
#
# How far does chance move a metric? The bootstrap draws N of the N test lesions with replacement, R
# times over, and measures each of these R resamples. No lesion is copied: one that is drawn twice
# counts twice. Lesions are drawn one by one, as if none shared its patient with another; where many
# do, the true intervals are wider.
#
# Where a resample gives 0 / 0, because it lacks all lesions that a metric needs, np.ma.divide masks
# the entry, and means over findings leave it out. M is the number of runs in a group.

RESAMPLES = 1000  # R (not in the paper, which has no intervals)
BINS = 15  # of the calibration error (Guo et al. 2017)


def resample_lesions(labels):
    """How often each lesion is drawn in each of R resamples: counts (R, N).

    By hand: of three lesions the first twice, the second never: 2, 0, 1.

    With a single task, labels (N, 1), each class is drawn by itself, so that no resample lacks one;
    lesions of unknown class, -1, are then drawn by themselves as well. (A class with one or two
    lesions hardly varies in this way: its part of the interval is too narrow.) With several tasks a
    lesion has several classes, and all lesions are drawn together.

    The draws depend on the labels alone, so all runs with the same test lesions get the same.
    """
    rng = np.random.default_rng(0)
    strata = np.zeros(len(labels))
    if labels.shape[1] == 1:
        strata = labels[:, 0]
    counts = np.zeros((RESAMPLES, len(labels)))
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        chances = np.full(len(rows), 1 / len(rows))
        # multinomial says how often each of the rows comes up in as many draws as there are rows
        counts[:, rows] = rng.multinomial(len(rows), chances, RESAMPLES)
    return counts


def resampled_macro_f1(labels, predicted, counts):
    """The macro F1 in each resample, (R,): the mean of F1 over the classes.

    The F1 of a class is 2 TP / (lesions of it + lesions predicted as it); TP counts those that are
    both. By hand: labels a a b, predicted a b b, drawn 2, 0 and 1 times: 2*2 / (2 + 2) for a and
    2*1 / (1 + 1) for b. A class that a resample has on neither side is left out of its mean.
    """
    f1_of_classes = []
    for k in np.union1d(labels, predicted):
        is_class = labels == k
        is_predicted = predicted == k
        true_positives = counts @ (is_class & is_predicted)
        total = counts @ is_class + counts @ is_predicted
        f1_of_classes.append(np.ma.divide(2 * true_positives, total))
    return np.ma.stack(f1_of_classes).mean(axis=0)


def resampled_auc(scores, is_class, counts):
    """The AUC in each resample, (R,); masked where it lacks lesions of the class, or all others.

    The AUC is the share of pairs, a lesion of the class and another one, in which the former has
    the higher score; a tie counts half. A pair counts as often as one is drawn times the other.
    By hand: of the class 0.9 and 0.4, another 0.6: one of two pairs is won, so 1/2. Drawn 2, 1 and
    1 times: (2*1 + 0) / (2*1 + 1*1) = 2/3.

    Sorted by score, a lesion wins against all others before it, so no pair is looked at.
    """
    order = np.argsort(scores)
    _, starts = np.unique(
        scores[order], return_index=True
    )  # where each of U different scores starts
    of_class = np.add.reduceat((counts * is_class)[:, order], starts, axis=1)  # (R, U) drawn
    others = np.add.reduceat((counts * ~is_class)[:, order], starts, axis=1)  # (R, U) drawn
    others_below = np.cumsum(others, axis=1) - others
    pairs_won = np.sum(of_class * (others_below + others / 2), axis=1)
    pairs = of_class.sum(axis=1) * others.sum(axis=1)
    return np.ma.divide(pairs_won, pairs)


def bootstrap(probabilities, labels, tasks):
    """accuracy and macro_f1 of each task and auc of each finding, in each resample.

    Returns metric -> masked array (tasks or findings, R). Its `.mean(0)` is the mean over tasks or
    findings in each resample, without what is masked.
    """
    all_counts = resample_lesions(labels)  # (R, N)
    samples = defaultdict(list)
    for task in labelled_tasks(probabilities, labels, tasks):
        counts = all_counts[:, task.is_labelled]  # (R, L)
        # By hand: three lesions, right, wrong, right, drawn 2, 0 and 1 times: 3 are right, of 3.
        right = counts @ (task.predicted == task.labels)  # (R,)
        samples["accuracy"].append(np.ma.divide(right, counts.sum(axis=1)))
        samples["macro_f1"].append(resampled_macro_f1(task.labels, task.predicted, counts))
        for k in task.findings:
            scores = task.probabilities[:, k]
            samples["auc"].append(resampled_auc(scores, task.labels == k, counts))
    return {metric: np.ma.stack(arrays) for metric, arrays in samples.items()}


def interval(samples):
    """The 95% interval of a metric: the middle 95% of its values (R,) in the resamples."""
    return np.percentile(np.ma.compressed(samples), (2.5, 97.5)).tolist()


def calibration(probabilities, labels, tasks):
    """How honest the probabilities are: two errors, each the mean over the tasks.

    nll  negative log-likelihood: -log of the true class's probability
    ece  expected calibration error (Guo et al. 2017, Eq. 3). The lesions go into 15 equal bins by
         the probability of their likeliest class. In each bin this class should be right as often
         as that probability says; ece is the mean gap, weighted by the number of lesions.
    """
    nll = []
    ece = []
    for task in labelled_tasks(probabilities, labels, tasks):
        of_truth = task.probabilities[np.arange(len(task.labels)), task.labels]  # (L,)
        nll.append(-np.log(np.maximum(of_truth, 1e-300)).mean())
        confidence = task.probabilities.max(axis=1)
        correct = task.predicted == task.labels
        bins = np.ceil(confidence * BINS)  # 1 to 15
        error = 0.0
        for number in np.unique(bins):
            is_inside = bins == number
            gap = abs(correct[is_inside].mean() - confidence[is_inside].mean())
            error += is_inside.mean() * gap
        ece.append(error)
    return {"nll": float(np.mean(nll)), "ece": float(np.mean(ece))}


def noise_of_a_run(groups):
    """The standard deviation within groups of runs, pooled: what another seed does to a metric.

    groups: for each group the M values of the metric. nan, unknown, if no group has two runs.
    By hand: groups 1, 3 and 5, 5, 8. Squares about the means: 2 and 6. Over 1 + 2: sqrt(8 / 3).
    """
    deviations = np.concatenate([np.array(values) - np.mean(values) for values in groups])
    degrees_of_freedom = len(deviations) - len(groups)
    if degrees_of_freedom == 0:
        return math.nan
    return math.sqrt(np.sum(deviations**2) / degrees_of_freedom)


def lesions_needed(difference, over_lesions, seeds_error, num_lesions):
    """How many test lesions would tell this difference from none, if it is what it seems to be.

    over_lesions  its 95% interval, which shrinks with the root of the number of lesions
    seeds_error   its standard error from the seeds alone, which does not; nan if it is unknown

    With that many lesions half of over_lesions is as wide as the difference, so that chance over
    lesions hides it every other time; chance over seeds makes it more often. Where twice
    seeds_error exceeds the difference, no number is enough: inf. nan if seeds_error is unknown.
    """
    if math.isnan(seeds_error):
        return math.nan
    if difference == 0 or 2 * seeds_error > abs(difference):  # 2 is about 1.96: 95%
        return math.inf
    low, high = over_lesions
    half_width = (high - low) / 2
    return num_lesions * (half_width / difference) ** 2


@dataclass
class Difference:
    """How much higher a metric is in one group of runs than in another (0.01 is a point)."""

    value: float  # between the means of the groups
    over_lesions: list  # its 95% interval, had other lesions been tested
    over_lesions_and_seeds: list  # and had other seeds been trained as well
    noise: float  # of a run: noise_of_a_run
    lesions_needed: float


def measure_group(answers, labels, tasks):
    """The answers (N, K) of M runs -> two dicts: mean_... -> (M,), and in each resample (M, R)."""
    values = defaultdict(list)
    samples = defaultdict(list)
    for answer in answers:
        measured = measure(answer, labels, tasks)
        for metric, resampled in bootstrap(answer, labels, tasks).items():
            name = f"mean_{metric}"
            values[name].append(measured[name])
            samples[name].append(resampled.mean(axis=0))
    return values, {name: np.ma.stack(arrays) for name, arrays in samples.items()}


def compare_groups(answers, other_answers, labels, tasks):
    """Paired bootstrap of two groups of runs with the same N test lesions: mean_... -> Difference.

    For each run of a group its answer (N, K). Each resample draws the lesions once for all runs;
    over_lesions is about the difference of the groups' means. For over_lesions_and_seeds it also
    draws from each group as many runs as it has, with replacement. Few runs vary too little: M runs
    show sqrt((M - 1) / M) of the seeds' deviation, three runs 18% too little.
    """
    values, samples = measure_group(answers, labels, tasks)
    other_values, other_samples = measure_group(other_answers, labels, tasks)
    M = len(answers)
    other_M = len(other_answers)
    rng = np.random.default_rng(1)
    drawn = rng.multinomial(M, np.full(M, 1 / M), RESAMPLES).T  # (M, R): how often each run
    other_drawn = rng.multinomial(other_M, np.full(other_M, 1 / other_M), RESAMPLES).T
    num_lesions = int((labels >= 0).any(axis=1).sum())
    differences = {}
    for name in values:
        value = float(np.mean(values[name]) - np.mean(other_values[name]))
        over_lesions = interval(samples[name].mean(axis=0) - other_samples[name].mean(axis=0))
        # The counts of M runs add up to M, so that this mean is the mean of the drawn runs.
        means = (drawn * samples[name]).mean(axis=0)  # (R,)
        other_means = (other_drawn * other_samples[name]).mean(axis=0)
        over_both = interval(means - other_means)
        noise = noise_of_a_run([values[name], other_values[name]])
        seeds_error = noise * math.sqrt(1 / M + 1 / other_M)
        needed = lesions_needed(value, over_lesions, seeds_error, num_lesions)
        differences[name] = Difference(value, over_lesions, over_both, noise, needed)
    return differences


# ------------------------------------------------------------------------------ a run's files


def write_predictions(path, p):
    """predictions.npz: the Predictions, for read_predictions.

    An array for each field or, of a dict, for each entry: "cases", "branches/fusion", "tasks/DIAG".
    """
    arrays = {}
    for field_name, value in vars(p).items():
        if isinstance(value, dict):
            for name, entry in value.items():
                arrays[f"{field_name}/{name}"] = entry
        else:
            arrays[field_name] = value
    with data.atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_predictions(run):
    """The Predictions in a run's predictions.npz. Raises RunError if they cannot be read."""
    path = Path(run) / "predictions.npz"
    advice = f"python train.py --resume {run} finishes a run, or predicts anew if it is finished"
    if not path.exists():
        raise RunError(f"{path} does not exist. {advice}")
    values = {"tasks": {}, "metadata": {}, "branches": {}, "overlaps": {}}  # the fields with "/"
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        for key, array in arrays.items():
            field_name, slash, name = key.partition("/")
            if slash:
                values[field_name][name] = array
            else:
                values[field_name] = array
        p = Predictions(**values)
        tasks = {task: tuple(classes.tolist()) for task, classes in p.tasks.items()}
        return replace(p, tasks=tasks, fingerprint=str(p.fingerprint))  # texts again
    except Exception as error:  # numpy and zipfile raise half a dozen types for a damaged file
        raise RunError(f"{path} is damaged or of another version ({error}). {advice}") from error


def write_csv(path, header, lines):
    with data.atomic_write(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(lines)


def write_predictions_csv(path, p, predictors):
    """predictions.csv, for people: a line a lesion, with a column for each predictor/task/class.

    predictors: predictor -> (N, K), as fuse_all returns them.
    """
    header = ["case", "split"]
    columns = [p.cases, p.split]  # each (N,) texts
    for name, texts in p.metadata.items():
        header.append(name)
        columns.append(texts)
    for name, values in p.overlaps.items():
        header.append(name)
        columns.append(np.char.mod("%.6g", values))
    for t, (task, classes) in enumerate(p.tasks.items()):
        names = np.array([*classes, ""])  # -1, unknown, is the last: an empty cell
        header.append(task)
        columns.append(names[p.labels[:, t]])
    for predictor, probabilities in predictors.items():
        for task, classes in p.tasks.items():
            header += [f"{predictor}/{task}/{name}" for name in classes]
        columns += list(np.char.mod("%.6g", probabilities.T))
    write_csv(path, header, np.column_stack(columns).tolist())


@contextmanager
def warn_if_unwritable(path):
    """Within it a file that cannot be written, as in a colleague's run, costs only a WARNING."""
    try:
        yield
    except OSError as error:
        print(f"WARNING: {path} cannot be written ({error})")


# --------------------------------------------------------------------------------------- results

# The single numbers that sum up a predictor: name in results.json -> name in the tables. The tables
# print those of them that could be measured, in this order and as percentages.
MEANS = {
    "mean_auc": "AUC",
    "mean_accuracy": "accuracy",
    "mean_macro_f1": "macro F1",
    "mean_ap": "AP",
    "lrap": "LRAP",
    "jaccard": "Jaccard",
    "dice": "Dice",
}


@dataclass
class Evaluation:
    """What is found out about some Predictions."""

    predictions: Predictions
    predictors: dict  # predictor -> (N, K)
    results: dict  # see make_results


def fuse_all(p, late_fusion):
    """All predictors, name -> (N, K): the branches and what late fusion makes of them."""
    predictors = dict(p.branches)
    if len(p.branches) > 1:
        equal = dict.fromkeys(p.branches, 1 / len(p.branches))
        predictors["equal"] = fuse(p.branches, equal, p.tasks)
        predictors["weighted"] = fuse(p.branches, late_fusion.weights, p.tasks)
    if p.branches:
        weights, temperature = late_fusion.weights, late_fusion.temperature
        predictors["calibrated"] = fuse(p.branches, weights, p.tasks, temperature)
    return predictors


def means_of(measured):
    """Those of the metrics in MEANS that could be measured."""
    return {name: measured[name] for name in MEANS if name in measured}


def subgroups_of(metadata, n):
    """The subgroups of lesion n, fact -> name: {"age": "age from 40", "sex": "sex not given"}.

    Several columns may give one fact (data.PATIENT_FACTS): the first that is filled counts.
    """
    names = {}
    for column, texts in metadata.items():
        fact = data.PATIENT_FACTS.get(column, column)
        not_given = f"{fact} not given"
        if names.get(fact, not_given) == not_given:  # no earlier column says more
            is_filled = texts[n] != ""
            names[fact] = data.patient_word(column, texts[n]) if is_filled else not_given
    return names


def measure_subgroups(p, answer):
    """The answer's metrics on the labelled test lesions of one subgroup. answer: (N, K).

    Returns, for example, "age from 40" -> {"lesions": 31, "mean_auc": 0.8, ...}.
    """
    is_labelled = (p.labels >= 0).any(axis=1)
    rows_of = defaultdict(list)  # subgroup -> numbers of its lesions
    for n in np.flatnonzero((p.split == "test") & is_labelled):
        for name in subgroups_of(p.metadata, n).values():
            rows_of[name].append(n)
    subgroups = {}
    for name, rows in sorted(rows_of.items()):
        measured = measure(answer[rows], p.labels[rows], p.tasks)
        subgroups[name] = {"lesions": len(rows), **measured}
    return subgroups


def measure_with_intervals(probabilities, labels, tasks):
    """What `measure` returns, and "intervals": mean_... -> [low, high], the 95% interval."""
    measured = measure(probabilities, labels, tasks)
    measured["intervals"] = {}
    for metric, samples in bootstrap(probabilities, labels, tasks).items():
        measured["intervals"][f"mean_{metric}"] = interval(samples.mean(axis=0))
    return measured


def make_results(p, late_fusion, predictors):
    """What results.json holds: a dict. All metrics are fractions, not percents.

    What cannot be measured, for lack of labels or of masks, is left empty. There are always test
    lesions: data.read and read_new refuse a release without any.
    """
    is_valid = p.split == "valid"
    is_test = p.split == "test"
    labels = p.labels[is_test]
    results = {
        "fingerprint": p.fingerprint,
        "late_fusion": vars(late_fusion),
        "answer": late_fusion.answer_name,  # its name among the predictors
        "lesions": int((labels >= 0).any(axis=1).sum()),  # test lesions with a known label
        "means": {},  # the answer's on the test split, by the names in MEANS
        "valid": {},  # what `measure` returns for the answer on the validation split
        "test": {},  # predictor -> what `measure_with_intervals` returns
        "subgroups": {},  # what `measure_subgroups` returns
        "paper_fusion": {},  # like "means", with the weights of the paper's choice
        "calibration": {},  # "before" and "after" the temperature: what `calibration` returns
        "overlaps": {},  # "jaccard" and "dice" of the masks: [mean, low, high]
    }
    if predictors:  # a run that predicts masks alone has none
        answer = predictors[late_fusion.answer_name]
        results["valid"] = measure(answer[is_valid], p.labels[is_valid], p.tasks)
        if results["lesions"] > 0:
            for predictor, probabilities in predictors.items():
                if predictor != "calibrated":  # the paper's tables have no temperature
                    measured = measure_with_intervals(probabilities[is_test], labels, p.tasks)
                    results["test"][predictor] = measured
            results["means"] = means_of(results["test"][late_fusion.answer_name])
            results["subgroups"] = measure_subgroups(p, answer)
            by_paper = fuse(p.branches, late_fusion.paper_weights, p.tasks)
            results["paper_fusion"] = means_of(measure(by_paper[is_test], labels, p.tasks))
            calibrated = predictors["calibrated"]
            results["calibration"]["before"] = calibration(answer[is_test], labels, p.tasks)
            results["calibration"]["after"] = calibration(calibrated[is_test], labels, p.tasks)
    for overlap, values in p.overlaps.items():
        counts = resample_lesions(labels)  # with a single task class by class, here too
        samples = counts @ values[is_test] / len(labels)  # (R,)
        results["means"][overlap] = float(values[is_test].mean())
        results["overlaps"][overlap] = [results["means"][overlap], *interval(samples)]
    return results


def evaluate_and_write(folder, p, late_fusion):
    """The Evaluation of p. Replaces predictions.csv and results.json in the folder."""
    predictors = fuse_all(p, late_fusion)
    results = make_results(p, late_fusion, predictors)
    path = folder / "predictions.csv"
    with warn_if_unwritable(path):
        write_predictions_csv(path, p, predictors)
    path = folder / "results.json"
    with warn_if_unwritable(path), data.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return Evaluation(p, predictors, results)


def views_read(network):
    """The kinds of photo that a network reads, such as ["clinical", "dermoscopy"]."""
    return [view for view in data.VIEWS if view in network.inputs]


def predict_release(saved, release, device):
    """The Predictions of a run for the validation and test lesions of a release.

    saved: what is in the run's model.pt. The release has the run's tasks.
    """
    network = model.load_run(saved, device)
    views = views_read(network)
    if not set(views) <= set(release.views):
        there = " and ".join(release.views)
        raise RunError(f"the run reads {' and '.join(views)}; this release has {there}")
    # The run may have been trained on a device with bfloat16, and this one may have none.
    amp = saved["flags"]["amp"] and model.has_bfloat16(device)
    rows = torch.cat((release.rows("valid"), release.rows("test")))
    branches, overlaps = predict(network, release, rows, device, amp)
    rows = rows.numpy()
    metadata = {}
    for column, texts in release.metadata.items():
        metadata[column] = np.array(texts)[rows]
    return Predictions(
        tasks=release.tasks,
        cases=np.array(release.cases)[rows],
        split=release.split[rows],
        labels=release.labels.cpu().numpy()[rows],
        metadata=metadata,
        branches=branches,
        overlaps=overlaps,
        fingerprint=release.fingerprint,
    )


def evaluate_run(run, release=None, device=None):
    """The results of a run: from its predictions.npz or, given its own release, predicted anew.

    train.py calls this at the end of a run.
    """
    run = Path(run)
    if release is None:
        p = read_predictions(run)
    else:
        saved = model.read_run_file(run / "model.pt")
        if release.fingerprint != saved["fingerprint"]:
            raise RunError(f"{run} belongs to another release; see --data of evaluate.py")
        p = predict_release(saved, release, device or model.find_device())
        write_predictions(run / "predictions.npz", p)
    return evaluate_and_write(run, p, fit_late_fusion(p)).results


# ---------------------------------------------------------------------------------------- tables

TABLE_WIDTH = 100  # characters
TABLE_4 = ("DIAG/MEL", "PN/ATP", "STR/IR", "PIG/IR", "RS/PRS", "DaG/IR", "BWV/PRS", "VS/IR")


def percent(value):
    return f"{100 * value:.1f}"


def cells_of(measured, names):
    """The cells of these metrics, one that could not be measured being empty."""
    return [percent(measured[name]) if name in measured else "" for name in names]


def print_table(title, header, lines):
    """lines: for each what stands at its left, and its cells, as many texts as `header` has."""
    lines = [(title, header)] + lines
    widths = []
    for n in range(len(header)):
        widths.append(2 + max(len(cells[n]) for _, cells in lines))
    left = max(len(name) for name, _ in lines)
    left = min(left, TABLE_WIDTH - sum(widths))
    print()
    for name, cells in lines:
        if len(name) > left:  # it gets a line of its own
            print(name[-TABLE_WIDTH:])  # of a path the end tells more
            name = ""
        texts = [cell.rjust(width) for cell, width in zip(cells, widths)]
        print(name.ljust(left) + "".join(texts))


def heading(predictor, results):
    """The predictor's name; the answer is marked."""
    return f"{predictor} (answer)" if predictor == results["answer"] else predictor


def print_metric(title, metric, results):
    """A table of the paper, turned: a line a task or finding, a column a predictor.

    metric: "auc", "accuracy" or "macro_f1", which have intervals.
    """
    test = results["test"]
    if metric not in test[results["answer"]]:  # there is no class to tell from others
        return
    lines = []
    for name in test[results["answer"]][metric]:  # all predictors have the same names
        lines.append((name, [percent(measured[metric][name]) for measured in test.values()]))
    header = []
    means = []
    lows = []
    highs = []
    for predictor, measured in test.items():
        header.append(heading(predictor, results))
        low, high = measured["intervals"][f"mean_{metric}"]
        means.append(percent(measured[f"mean_{metric}"]))
        lows.append(percent(low))
        highs.append(percent(high))
    lines += [("mean", means), ("95% from", lows), ("95% to", highs)]
    print_table(title, header, lines)


def print_table_4(results):
    """Rates of the eight classes that speak for melanoma, if the run has SPC's tasks."""
    measured = results["test"][results["answer"]]
    if not set(TABLE_4) <= set(measured.get("auc", {})):
        return
    rates = ["precision", "sensitivity", "specificity"]
    lines = []
    for finding in TABLE_4:
        cells = []
        for rate in rates:
            cells.append(percent(measured[rate][finding]))
        lines.append((finding, cells))
    print_table("Table 4: the answer (%)", rates, lines)


def print_means(results):
    """The means of every predictor, then the answer's in subgroups."""
    test = results["test"]
    names = list(means_of(test[results["answer"]]))
    lines = []
    for predictor, measured in test.items():
        cells = [str(results["lesions"])] + cells_of(measured, names)
        lines.append((heading(predictor, results), cells))
    for subgroup, measured in results["subgroups"].items():
        lines.append((subgroup, [str(measured["lesions"])] + cells_of(measured, names)))
    header = ["lesions"] + [MEANS[name] for name in names]
    print_table("means, and the answer's in subgroups (%)", header, lines)


def print_late_fusion(results):
    """What was chosen on the validation split, and what it gives on the test split."""
    late_fusion = results["late_fusion"]
    weights, paper_weights = late_fusion["weights"], late_fusion["paper_weights"]
    choices = {
        "the answer's: the most even of the near best": (weights, results["means"]),
        "the paper's: the most accurate": (paper_weights, results["paper_fusion"]),
    }
    if len(weights) > 1:
        lines = []
        for choice, (weight_of, means) in choices.items():
            cells = [f"{weight:.2f}" for weight in weight_of.values()]
            lines.append((choice, cells + cells_of(means, ["mean_auc", "mean_accuracy"])))
        print_table("weights from validation; test (%)", [*weights, "AUC", "accuracy"], lines)
    lines = []
    for when, errors in results["calibration"].items():
        lines.append((f"{when} the temperature", [f"{errors['nll']:.3f}", percent(errors["ece"])]))
    title = f"temperature {late_fusion['temperature']:.2f}"
    print_table(title, ["negative log-likelihood", "calibration error (%)"], lines)


def print_tables(results):
    """Tables 1, 2 and 4 of the paper for the test split, and more. results: of make_results."""
    if results["overlaps"]:
        lines = []
        for name, (mean, low, high) in results["overlaps"].items():
            lines.append((MEANS[name], [percent(mean), percent(low), percent(high)]))
        print_table("overlap of the masks (%)", ["mean", "95% from", "95% to"], lines)
    if not results["test"]:
        return
    print_metric("Table 1: AUC (%)", "auc", results)
    print_metric("Table 2: accuracy (%)", "accuracy", results)
    print_metric("macro F1 (%)", "macro_f1", results)
    print_table_4(results)
    print_means(results)
    print_late_fusion(results)


def values_of(name, all_measured):
    """The values of a metric in those runs that have it."""
    return [measured[name] for measured in all_measured if name in measured]


def mean_and_deviation(values):
    """ "84.7 ± 1.2" of several values, "84.7" of one, "" of none."""
    if not values:
        return ""
    cell = percent(np.mean(values))
    if len(values) > 1:
        cell += f" ± {percent(np.std(values, ddof=1))}"
    return cell


def print_runs(runs, all_results):
    """The answer's means, a line a run; then mean ± standard deviation over the runs.

    The second table has a line for the answer and one for each predictor that all runs have.
    """
    measured_of = defaultdict(list)  # predictor -> for each run what was measured
    for results in all_results:
        measured_of["answer"].append(results["means"])
        for predictor, measured in results["test"].items():
            measured_of[predictor].append(measured)
    names = [name for name in MEANS if values_of(name, measured_of["answer"])]
    header = [MEANS[name] for name in names]
    lines = []
    for run, results in zip(runs, all_results):
        lines.append((run, cells_of(results["means"], names)))
    print_table("the answer (%)", header, lines)
    lines = []
    for predictor, all_measured in measured_of.items():
        if len(all_measured) == len(runs):
            cells = []
            for name in names:
                cells.append(mean_and_deviation(values_of(name, all_measured)))
            lines.append((predictor, cells))
    print_table("mean ± standard deviation (%)", header, lines)


def test_answers(evaluations):
    """The answers' probabilities for the test lesions, (N, K) for each run."""
    answers = []
    for evaluation in evaluations:
        results = evaluation.results
        if not results["test"]:
            raise RunError("--against compares classes: a run predicts none, or none is labelled")
        is_test = evaluation.predictions.split == "test"
        answers.append(evaluation.predictors[results["answer"]][is_test])
    return answers


def print_against(evaluations, others):
    """The differences between two groups of runs, of each run its Evaluation."""
    answers = test_answers(evaluations)
    other_answers = test_answers(others)
    M = len(answers)
    other_M = len(other_answers)
    p = evaluations[0].predictions  # the test lesions of all are the same
    labels = p.labels[p.split == "test"]
    differences = compare_groups(answers, other_answers, labels, p.tasks)
    lines = []
    for name, difference in means_of(differences).items():
        cells = [f"{100 * difference.value:+.1f}"]
        for low, high in (difference.over_lesions, difference.over_lesions_and_seeds):
            cells.append(f"{100 * low:+.1f} to {100 * high:+.1f}")
        if math.isnan(difference.noise):
            cells += ["unknown", "unknown"]
        elif math.isinf(difference.lesions_needed):
            cells += [percent(difference.noise), "more seeds"]
        else:
            cells += [percent(difference.noise), f"{math.ceil(difference.lesions_needed):,}"]
        lines.append((MEANS[name], cells))
    header = ["points", "95%, lesions", "95%, lesions and seeds"]
    header += ["noise of a run", "lesions needed"]
    print_table(f"{M} RUN - {other_M} OTHER", header, lines)
    fewest = min(M, other_M)  # see compare_groups
    missing = 100 * (1 - math.sqrt((fewest - 1) / fewest))
    too_narrow = f"the seeds' part is {missing:.0f}% too narrow"
    print(f"lesions and seeds: with {fewest} in a group {too_narrow}")
    print("noise of a run: standard deviation over seeds; unknown if no group has two runs")
    print("lesions needed: until chance over lesions hides the difference only every other time;")
    print("more seeds: the noise of these few runs is so large that no number of lesions helps")


# --------------------------------------------------------------------- MILK10k's live benchmark

MILK10K = ("AKIEC", "BCC", "BEN_OTH", "BKL", "DF", "INF", "MAL_OTH", "MEL", "NV", "SCCKA", "VASC")
TAUS = (0.0, 0.25, 0.5, 0.75, 1.0)
LEAST_TO_WIN = 0.500001  # the scorer counts a class as predicted from above 0.5 on
DECIMALS = "%.6f"  # as many as LEAST_TO_WIN needs


def adjust_logits(probabilities, class_counts, tau):
    """Logit adjustment (Menon et al. 2021), so that rare classes rise:

        softmax(log probability - tau * log prior)  =  probability / prior^tau, over its sum

    The prior is a class's share of the training lesions. The benchmark's macro F1 counts all
    classes alike, rare ones too. With tau = 0 nothing changes. probabilities (N, n_t), class_counts
    (n_t,) -> (N, n_t).
    """
    class_counts = np.maximum(class_counts, 1)  # none counts as one: there is no division by 0
    prior = class_counts / class_counts.sum()
    adjusted = probabilities / prior**tau
    return adjusted / adjusted.sum(axis=1, keepdims=True)


def choose_tau(probabilities, labels, tasks, class_counts):
    """The tau of the highest macro F1 on the validation lesions; of a tie the smallest.

    Returns it, its macro F1, and the macro F1 without adjustment.
    """
    unadjusted = measure(probabilities, labels, tasks)
    macro_f1 = []
    for tau in TAUS:
        adjusted = adjust_logits(probabilities, class_counts, tau)
        macro_f1.append(measure(adjusted, labels, tasks)["mean_macro_f1"])
    best = int(np.argmax(macro_f1))
    return TAUS[best], macro_f1[best], unadjusted["mean_macro_f1"]


def let_likeliest_win(probabilities):
    """Each lesion's likeliest class gets at least 0.500001; the others are scaled to the rest.

    A class counts as predicted from above 0.5 on: a lesion whose likeliest class has 0.4 would be
    predicted as nothing. With six decimals 0.500001 is the least above 0.5. Of a tie the first
    class wins. probabilities (N, n_t) -> (N, n_t); each lesion's sum is 1.
    """
    submitted = np.zeros_like(probabilities)
    for n, of_lesion in enumerate(probabilities):
        winner = of_lesion.argmax()
        highest = max(of_lesion[winner], LEAST_TO_WIN)
        others = of_lesion.sum() - of_lesion[winner]
        if others > 0:
            submitted[n] = of_lesion * (1 - highest) / others
        submitted[n, winner] = highest
    return submitted


def write_submission(folder, blind_test, own, late_fusion, class_counts):
    """Writes submission.csv for MILK10k's blind test, and says in a line what is in it.

    blind_test    the Evaluation of its lesions
    own           the run's own Predictions, on whose validation split tau is chosen
    class_counts  task -> number of training lesions of each class
    """
    is_valid = own.split == "valid"
    labels = own.labels[is_valid]
    has_classes = len(own.tasks) == 1 and MILK10K in own.tasks.values() and len(own.branches) > 0
    if not has_classes or not (labels >= 0).any():
        print(f"no submission.csv: that takes a run with one task, classes {', '.join(MILK10K)},")
        print("and labelled validation lesions")
        return
    (task_counts,) = class_counts.values()  # there is one task
    own_calibrated = fuse_all(own, late_fusion)["calibrated"][is_valid]
    tau, macro_f1, macro_f1_before = choose_tau(own_calibrated, labels, own.tasks, task_counts)
    adjusted = adjust_logits(blind_test.predictors["calibrated"], task_counts, tau)
    submitted = let_likeliest_win(adjusted)
    cases = blind_test.predictions.cases
    lines = np.column_stack([cases, np.char.mod(DECIMALS, submitted)])
    path = folder / "submission.csv"
    with warn_if_unwritable(path):
        write_csv(path, ["lesion_id", *MILK10K], lines.tolist())
        print(
            f"{path}: {len(lines)} lesions, the likeliest class of each above 0.5; logits adjusted"
            f" with tau {tau}: macro F1 on validation {percent(macro_f1)}%,"
            f" {percent(macro_f1_before)}% without"
        )


# ------------------------------------------------------------------------------ another release


def read_new(saved, path, cache):
    """The release at `path`: its test split is what the run has not seen, the rest is in no split.

    saved: what is in the run's model.pt. What a run has seen are the lesions that it was trained or
    chosen by, by their ids and photos (data.find_known). The release gets the run's tasks.
    """
    size = saved["flags"]["image_size"]
    vocabulary = saved["vocabulary"]
    masks = model.needs_masks(saved["flags"])
    release = data.read(path, size, cache, to_train=False, masks=masks, vocabulary=vocabulary)
    release = data.match_labels(release, saved["tasks"])
    for note in release.notes:
        print(note)
    is_seen, message = data.find_known(release, saved["seen"])
    if message:
        print(f"WARNING: {message}")
    if is_seen.all():
        raise RunError(f"{path}: the run has learned from every lesion, so none can test it")
    return replace(release, split=np.where(is_seen, "", "test"))


def fingerprint_of_results(folder):
    """Which release the results in a folder belong to; "" if they cannot be read."""
    try:
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def folder_for_results(run, path, fingerprint):
    """RUN/NEW, or RUN/NEW-2, RUN/NEW-3, ... if another release of that name has results there."""
    path = Path(path).resolve()
    name = path.name if path.is_dir() else path.stem
    folder = run / name
    number = 1
    while (folder / "results.json").exists():
        if fingerprint_of_results(folder) == fingerprint:
            break  # the same release again
        number += 1
        folder = run / f"{name}-{number}"
    return folder


def evaluate_new(run, path, cache, device):
    """The Evaluation of a run on another release, or its own, but for the lesions it has seen.

    The results go to the folder RUN/NEW, with MILK10k's blind test its submission.csv too.
    """
    run = Path(run)
    saved = model.read_run_file(run / "model.pt")
    own = read_predictions(run)  # of its validation and test lesions
    late_fusion = fit_late_fusion(own)
    release = read_new(saved, path, cache)
    p = predict_release(saved, release, device)
    folder = folder_for_results(run, path, release.fingerprint)
    evaluation = evaluate_and_write(folder, p, late_fusion)
    num_labelled = evaluation.results["lesions"]
    tested = f"{len(p.cases)} of {len(release.cases)} lesions tested, {num_labelled} labelled"
    print(f"{path}: {tested}; see {folder}")
    if release.kind == "milk10k" and num_labelled == 0:  # the blind test
        write_submission(folder, evaluation, own, late_fusion, saved["class_counts"])
    return evaluation


# --------------------------------------------------------- one lesion: prediction and saliency


def make_lesion_batch(network, saved, photos, about, device):
    """The batch of one lesion; its photos take gradients. Raises RunError for a photo of no use.

    photos: view -> path; about the patient: column -> text. Of two photos a missing one is replaced
    by the other: one tensor under two names, in which the gradients of both add up.
    """
    views = views_read(network)
    for view in photos:
        if view not in views:
            raise RunError(f"this run has learned from {views[0]} photos alone: omit --{view}")
    if about and "words" not in network.inputs:
        print("WARNING: this run reads no words about the patient: --about changes nothing")
        about = {}
    size = saved["flags"]["image_size"]
    lesion = data.release_of_one(photos, about, size, saved["vocabulary"])
    for note in lesion.notes:
        print(note)
    batch = data.make_batch(lesion, torch.tensor([0]), device)
    for view in photos:
        batch[view].requires_grad_()
    if len(photos) < len(views):
        (given,) = photos  # a third photo needs another rule, here and in report_one_lesion
        for view in views:
            batch[view] = batch[given]
    return batch


def predict_one(network, batch, late_fusion):
    """Calibrated probabilities, T tensors (1, n_t) with gradients; and CLNet's mask or None.

    In float32, also of a run that predicts in bfloat16: one lesion is quick, and gradients in
    bfloat16 are rough.
    """
    outputs = network(batch)
    mask_logits = outputs.pop("mask", None)  # (1, 1, S, S)
    if not outputs:  # a network that finds the mask alone
        return [], mask_logits
    probabilities = softmax_of_mean(outputs, late_fusion.weights, late_fusion.temperature)
    return probabilities, mask_logits


def certainty(probabilities):
    """log(probability) of the likeliest class, summed over the tasks: what the maps explain."""
    return sum(of_task.max(dim=1).values.log().sum() for of_task in probabilities)


def saliency(probabilities, batch, views):
    """Where a small change of the photo changes the certainty most: view -> an array (S, S).

    The size of the gradient (Simonyan et al. 2014), summed over the colours and smoothed.
    """
    photos = [batch[view] for view in views]
    gradients = torch.autograd.grad(certainty(probabilities), photos)
    heats = {}
    for view, gradient in zip(views, gradients):
        heat = gradient.abs().sum(dim=1)  # (1, S, S)
        kernel = 2 * (heat.shape[-1] // 32) + 1  # an odd number, a sixteenth of the side
        heats[view] = gaussian_blur(heat, kernel)[0].cpu().numpy()
    return heats


# ---------------------------------------------------------------------------------- CLNet's maps


def mask_overlaps(mask_logits, mask):
    """How well the found mask fits the true one, (B, 1, S, S) each: overlap -> (B,).

    jaccard: intersection / union. dice: 2 * intersection / (pixels of one + pixels of the other).
    Where nothing is and nothing is found, both are 1.
    """
    found = (mask_logits > 0).flatten(1).cpu()  # (B, S * S)
    true = (mask > 0.5).flatten(1).cpu()
    intersection = (found & true).sum(dim=1).double()
    union = (found | true).sum(dim=1)
    total = found.sum(dim=1) + true.sum(dim=1)
    jaccard = torch.where(union > 0, intersection / union, 1.0)
    dice = torch.where(union > 0, 2 * intersection / total, 1.0)
    return {"jaccard": jaccard.numpy(), "dice": dice.numpy()}


def activation_map(network, batch, temperature):
    """Which places of CLNet's last map count for the answer: an array (H_4, W_4).

    CLNet's paper says Grad-CAM++, but Eq. 2 is Grad-CAM's weight; Eq. 3 has the ReLU in the sum.
    """
    maps = network.maps(batch)
    logits = network.classify(maps)  # of CLNet's only branch, so there is nothing to fuse
    probabilities = [torch.softmax(task_logits / temperature, dim=1) for task_logits in logits]
    last_map = maps[-1]  # (1, C, H_4, W_4)
    gradients = torch.autograd.grad(certainty(probabilities), [last_map])
    importance = gradients[0].mean((2, 3), keepdim=True)  # Eq. 2: (1, C, 1, 1)
    heat = (importance * last_map).relu().sum(dim=1)  # Eq. 3: (1, H_4, W_4)
    return heat[0].detach().cpu().numpy()


# ---------------------------------------------------------------------- one lesion: the picture

WIDTH = 1200  # of the picture, in pixels, as all that follow
GAP = 16
PANEL = 280  # the side of a panel, at most: four of them and five gaps fill the width
LINE = 28  # the height of a line of text
TURQUOISE = (0, 190, 200)  # no colour of skin


def overlay(photo, heat):
    """The photo (S, S, 3) uint8 with a map (h, w) over it, turquoise where it is high."""
    heat = heat / max(heat.max(), 1e-30)
    height, width, _ = photo.shape
    heat = Image.fromarray(heat.astype(np.float32)).resize((width, height), Image.BILINEAR)
    strength = 0.8 * np.asarray(heat)[:, :, None]  # (S, S, 1)
    return (photo * (1 - strength) + np.array(TURQUOISE) * strength).astype(np.uint8)


def make_panels(photos, heats, mask_logits):
    """Each photo and what there is to show on it: (title, picture (PANEL, PANEL, 3) uint8) pairs.

    photos: view -> path; heats: view -> a map of what counts in it.
    """
    panels = []
    for view, path in photos.items():
        photo = data.decode(path, PANEL)
        panels.append((f"{view} photo", photo))
        if view in heats:
            panels.append(("what counts in it (turquoise)", overlay(photo, heats[view])))
        if mask_logits is not None:
            mask = (mask_logits[0, 0] > 0).float().cpu().numpy()  # (S, S)
            panels.append(("the mask it found (turquoise)", overlay(photo, mask)))
    return panels


def likeliest(classes):
    """classes: {class: probability}."""
    return max(classes, key=classes.get)


def draw_text(canvas, x, y, text, size, width):
    """Writes as much of the text as fits into `width` pixels."""
    font = ImageFont.load_default(size)
    while font.getlength(text) > width and len(text) > 3:
        text = text[:-4] + "..."  # a letter less each time
    canvas.text((x, y), text, "black", font)


def draw_task(canvas, x, y, width, task, classes):
    """One task: for each class its name, a bar and the percents. Returns the y below."""
    draw_text(canvas, x, y, task, 18, width)
    name_width = 0.4 * width
    bar_width = 0.6 * width - 60  # of a probability of 1; the percents take 60
    for name, probability in classes.items():
        y += LINE
        left = x + name_width
        right = left + 1 + bar_width * probability
        colour = TURQUOISE if name == likeliest(classes) else "darkgray"
        draw_text(canvas, x, y, name, 16, name_width - 8)
        canvas.rectangle((left, y + 2, right, y + 18), colour)
        draw_text(canvas, x + width - 54, y, f"{percent(probability)}%", 16, 54)
    return y + LINE + GAP


def draw(path, panels, sentence, prediction):
    """Writes the picture: the panels under their titles, the prediction in words and as bars.

    panels: of make_panels. prediction: task -> {class: probability}; of its tasks up to four stand
    side by side.
    """
    lines = textwrap.wrap(sentence, width=110)
    height = 2 * PANEL + LINE * len(lines)
    for classes in prediction.values():
        height += LINE * (len(classes) + 2) + GAP  # enough: the picture is cut at its end
    picture = Image.new("RGB", (WIDTH, height), "white")
    canvas = ImageDraw.Draw(picture)

    side = min(PANEL, (WIDTH - GAP) // len(panels) - GAP)
    for n, (title, panel) in enumerate(panels):
        x = GAP + n * (side + GAP)
        draw_text(canvas, x, GAP, title, 18, side)
        picture.paste(Image.fromarray(panel).resize((side, side)), (x, GAP + LINE))
    y = GAP + LINE + side + GAP
    for line in lines:
        draw_text(canvas, GAP, y, line, 20, WIDTH - 2 * GAP)
        y += LINE

    top = y + GAP  # of the tasks that stand side by side
    bottom = top
    in_a_row = min(4, max(2, len(prediction)))
    width = (WIDTH - GAP) // in_a_row - GAP
    for n, (task, classes) in enumerate(prediction.items()):
        if n % in_a_row == 0:
            top = bottom
        x = GAP + n % in_a_row * (width + GAP)
        bottom = max(bottom, draw_task(canvas, x, top, width, task, classes))
    draw_text(canvas, GAP, bottom, "For research: this is no medical device.", 16, WIDTH - 2 * GAP)
    with data.atomic_write(path) as temporary:
        picture.crop((0, 0, WIDTH, bottom + LINE)).save(temporary, format="PNG")


# ----------------------------------------------------------------------- one lesion: the report


def explain(network, batch, probabilities, photos, temperature):
    """What counts in each photo: view -> a map (h, w). Without classes there is none."""
    if not probabilities:
        return {}
    if isinstance(network, model.CLNet):
        (view,) = photos  # it reads one photo
        return {view: activation_map(network, batch, temperature)}
    return saliency(probabilities, batch, list(photos))


def in_words(prediction):
    """The likeliest class of each task: "DIAG NEV (81.0%), PN TYP (55.2%)"."""
    parts = []
    for task, classes in prediction.items():
        best = likeliest(classes)
        parts.append(f"{task} {best} ({percent(classes[best])}%)")
    return ", ".join(parts)


def report_one_lesion(run, photos, about, device):
    """Prints what a run predicts for one lesion, and draws it in a picture.

    photos: view -> path; about the patient: column -> text, for MAT. Of a run that reads two photos
    one will do: then only its branch predicts. Its temperature is fitted on validation lesions
    whose branches read both photos, so that its probabilities are less well calibrated (in the demo
    the calibration error rises from 8.1 to 11.1%).

    Returns the prediction, task -> {class: probability}.
    """
    run = Path(run)
    saved = model.read_run_file(run / "model.pt")
    network = model.load_run(saved, device)  # in evaluation mode
    batch = make_lesion_batch(network, saved, photos, about, device)
    p = read_predictions(run)
    opening = "Most likely, with calibrated probabilities: "
    if len(photos) < len(views_read(network)):
        (given,) = photos  # the network has a branch of this name
        p = replace(p, branches={given: p.branches[given]})
        opening = f"Most likely by the {given} branch, with less reliable probabilities: "
        print(f"only the {given} photo is given: the {given} branch predicts alone, and because it")
        print("was calibrated on lesions with both photos its probabilities are less reliable")
    late_fusion = fit_late_fusion(p)  # of the branches in p: one alone has its own temperature

    probabilities, mask_logits = predict_one(network, batch, late_fusion)
    prediction = {}
    for (task, classes), values in zip(saved["tasks"].items(), probabilities):
        prediction[task] = dict(zip(classes, values[0].tolist()))
    sentence = "This run finds the mask and no classes."
    if prediction:
        sentence = opening + in_words(prediction)
    for task, classes in prediction.items():
        texts = [f"{name} {percent(probability)}%" for name, probability in classes.items()]
        print(f"{task}: {likeliest(classes)}   ({', '.join(texts)})")

    heats = explain(network, batch, probabilities, photos, late_fusion.temperature)
    panels = make_panels(photos, heats, mask_logits)
    names = "-".join(Path(photo).stem for photo in photos.values())
    path = run / f"lesion-{names}.png"
    with warn_if_unwritable(path):
        draw(path, panels, sentence, prediction)
        print(f"drawn in {path}")
    print("For research: this is no medical device.")
    return prediction


# ------------------------------------------------------------------------------------------ flags


def parse(argv):
    """The flags; `photos` is view -> path, and `about` column -> text."""
    parser = argparse.ArgumentParser(description="The tables of runs; the report on one lesion.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    add("--against", nargs="+", default=[], metavar="OTHER", help="runs to compare the RUNs with")
    add("--data", metavar="NEW", help="a release to predict, but for the lesions a run has seen")
    add("--cache", default="runs/cache", metavar="DIR", help="decoded photos [%(default)s]")
    add("--device", help="where to predict [an accelerator if there is one, else cpu]")
    for view in data.VIEWS:
        add(f"--{view}", metavar="PHOTO", help=f"the {view} photo of one lesion")
    about_help = "what is known of its patient, for MAT: age=45 sex=female"
    add("--about", nargs="+", default=[], metavar="FACT", help=about_help)
    args = parser.parse_args(argv)
    facts = args.about
    args.about = {}
    for fact in facts:
        column, equals, text = fact.partition("=")
        if not equals:
            parser.error(f"--about {fact}: write column=value, such as sex=female")
        args.about[column] = text
    args.photos = {}
    for view in data.VIEWS:
        if vars(args)[view]:
            args.photos[view] = vars(args)[view]
    if args.about and not args.photos:
        parser.error("--about is for one lesion: give its photo too")
    if args.photos and (args.data or args.against or len(args.runs) > 1):
        parser.error("one lesion is asked about with one run, without --data and --against")
    return args


def check_same_lesions(runs, evaluations):
    """Runs are compared only on the same test lesions, whatever they have learned from."""
    first = evaluations[0].predictions
    first_is_test = first.split == "test"
    for run, evaluation in zip(runs, evaluations):
        p = evaluation.predictions
        is_test = p.split == "test"
        same_cases = np.array_equal(p.cases[is_test], first.cases[first_is_test])
        same_labels = np.array_equal(p.labels[is_test], first.labels[first_is_test])
        same_tasks = list(p.tasks.items()) == list(first.tasks.items())  # in the same order too
        if not (same_tasks and same_cases and same_labels):
            raise RunError(f"{runs[0]} and {run} have different test lesions: look at each alone")


def main(argv=None):
    """Does what the flags ask for. Returns the first run's results, or one lesion's prediction."""
    args = parse(argv)
    device = model.find_device(args.device)
    if args.photos:
        return report_one_lesion(args.runs[0], args.photos, args.about, device)

    runs = args.runs + args.against
    for group in (args.runs, args.against):
        folders = set(map(os.path.realpath, group))
        if len(folders) < len(group):
            raise RunError(f"a run is named twice: {', '.join(group)}")
    evaluations = []
    for run in runs:
        if args.data:
            evaluations.append(evaluate_new(run, args.data, args.cache, device))
        else:
            p = read_predictions(run)
            evaluations.append(evaluate_and_write(Path(run), p, fit_late_fusion(p)))
    check_same_lesions(runs, evaluations)

    num_runs = len(args.runs)
    all_results = [evaluation.results for evaluation in evaluations[:num_runs]]
    if not any(results["means"] for results in all_results):
        print("no tables: no test lesion has a label")
    elif num_runs == 1:
        print_tables(all_results[0])
    else:
        print_runs(args.runs, all_results)
    if args.against:
        print_against(evaluations[:num_runs], evaluations[num_runs:])
    return evaluations[0].results


if __name__ == "__main__":
    data.run_main(main, data.DataError, RunError)
