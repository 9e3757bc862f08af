"""Evaluate: a run's predictions become the paper's tables, honest statistics, and an answer for one lesion.

    python evaluate.py RUN                    the tables of a run, from the files in its folder, which it writes anew
    python evaluate.py RUN --data NEW         another release, without what the run has trained or validated on
    python evaluate.py RUN RUN ...            mean and standard deviation; other flags than the seed side by side
    python evaluate.py RUN ... --against OTHER ...    is the difference of their means more than chance?
    python evaluate.py RUN --compare-paper    the figures of the PEMM paper beside ours
    python evaluate.py RUN --clinical A.jpg --dermoscopy B.jpg        one lesion; one photo will do

predictions.csv has every probability: a row a lesion, a column a branch and class. "equal" is the mean of the branches'
logits, "weighted" their mean with weights found on validation: the answer; "calibrated" is it over a temperature.
Shapes: N lesions, T tasks, n_t classes of task t, K classes of all tasks together, R resamples.
"""
import argparse
import csv
import io
import json
from collections import defaultdict, namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from sklearn import metrics
from torchvision.transforms.functional import gaussian_blur

import data
import model
from loss import branch_loss
from model import RunError

STEPS = 20  # branch weights are multiples of 1/20 (ours: 203 validation cases cannot tell finer)
RESAMPLES = 1000  # of the bootstrap (ours)
MEANS = {"mean_auc": "AUC", "mean_accuracy": "accuracy", "mean_macro_f1": "macro F1", "mean_ap": "AP", "lrap": "LRAP",
         "jaccard": "Jaccard", "dice": "Dice"}  # names in results.json -> in our tables
# The paper's PEMM, %: Tables 1 and 2, means last. These are its best runs; the mean of five is 87.1 and 76.8 (Table 5).
PAPER = {
    "auc": [94.7, 93.0, 90.8, 94.9, 91.7, 86.7, 83.8, 90.1, 84.4, 79.4, 86.1, 84.9, 80.7, 84.0, 93.9, 88.5, 85.4, 87.6],
    "accuracy": [77.7, 73.7, 76.0, 71.9, 83.0, 65.6, 88.9, 82.5, 77.4]}
# Table 4, corrected: class -> test positives, true and false positives. As printed no confusion matrix fits; all eight
# do if PRE and SEN change places and SPE is the negative predictive value. So its mean "SEN", 64.1, is a precision.
PAPER_TABLE_4 = {"DIAG/MEL": (101, 66, 24), "PN/ATP": (93, 53, 32), "STR/IR": (94, 49, 36), "PIG/IR": (124, 80, 37),
                 "RS/PRS": (106, 56, 17), "DaG/IR": (177, 138, 56), "BWV/PRS": (75, 55, 24), "VS/IR": (30, 5, 10)}

# N lesions. tasks: task -> classes; split: "valid" or "test"; labels (N, T), -1 unknown; metadata: column -> N texts;
# branches: branch -> probabilities (N, K), tasks side by side; overlaps of the masks: "jaccard", "dice" -> (N,).
Predictions = namedtuple("Predictions", "tasks cases split labels metadata branches overlaps")

def answer_of(branches):
    """The last branch answers: "weighted", or the only one."""
    return list(branches.values())[-1]

@torch.inference_mode()
def predict(network, pixels, views, words, device, amp):
    """The branches and overlaps of Predictions, for pixels (N, V, S, S, 3) and words (N, m)."""
    network.eval()
    branches, overlaps = defaultdict(list), defaultdict(list)
    for n in range(0, len(pixels), 48):
        inputs = data.as_inputs(torch.as_tensor(pixels[n:n + 48]).to(device), views)
        inputs["words"] = torch.as_tensor(words[n:n + 48]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            outputs = network(*(inputs[name] for name in network.reads))
        if "mask" in outputs and "mask" in inputs:
            found, given = (outputs["mask"] > 0).flatten(1), (inputs["mask"] > 0).flatten(1)
            both, either = (found & given).sum(1), (found | given).sum(1)
            overlaps["jaccard"].append(torch.where(either > 0, both / either, 1.0))  # nothing, and nothing found: 1
            overlaps["dice"].append(torch.where(either > 0, 2 * both / (both + either), 1.0))
        outputs.pop("mask", None)
        for branch, logits in outputs.items():
            probabilities = [z.float().cpu().double().softmax(1) for z in logits]  # on the CPU: mps has no float64
            branches[branch].append(torch.cat(probabilities, 1))
    branches = {branch: torch.cat(parts).numpy() for branch, parts in branches.items()}
    return branches, {name: torch.cat(parts).cpu().double().numpy() for name, parts in overlaps.items()}

def by_task(values, tasks):
    """(N, K) -> an array (N, n_t) for each task."""
    ends = np.cumsum([len(classes) for classes in tasks.values()])
    return np.split(values, ends[:-1], axis=1)

def fuse(branches, weights, tasks, temperature=1.0):
    """Probabilities (N, K) of the weighted mean logits over the temperature. log p serves: softmax drops constants."""
    logits = sum(weights[branch] * np.log(np.maximum(values, 1e-300)) for branch, values in branches.items())
    scaled = by_task(logits / temperature, tasks)
    return torch.cat([torch.from_numpy(z).softmax(1) for z in scaled], 1).numpy()

def hits(probabilities, labels, tasks):
    """(N, T): is the likeliest class the true one? Masked where the label is unknown, so that means leave it out."""
    likeliest = np.stack([part.argmax(1) for part in by_task(probabilities, tasks)], 1)
    return np.ma.masked_array(likeliest == labels, labels < 0)

def search_weights(branches, labels, tasks, rule="near"):
    """Weights of three branches, the same for all tasks (paper, Sec. 4.1); of any other number, equal ones. "maximum":
    the most accurate triple. "near", ours: of all within a standard error of that, the most equal, as in a tie."""
    if len(branches) != 3:
        return dict.fromkeys(branches, 1 / len(branches))
    triples = np.array([(c, d, STEPS - c - d) for c in range(STEPS + 1) for d in range(STEPS + 1 - c)]) / STEPS
    found = [hits(fuse(branches, dict(zip(branches, triple)), tasks), labels, tasks) for triple in triples]
    accuracy = np.array([hit.mean(0).mean() for hit in found]).round(9)  # rounded: ties are ties
    distance = ((triples - 1 / 3) ** 2).sum(1).round(9)
    best = np.where(accuracy == accuracy.max(), distance, np.inf).argmin()
    if rule == "near":
        error = found[best].mean(1).std() / len(labels) ** 0.5
        best = np.where(accuracy >= accuracy.max() - error, distance, np.inf).argmin()
    return dict(zip(branches, triples[best].tolist()))

def decide(p, rule="near"):
    """From the validation split alone: the weights, and the temperature of lowest cross-entropy (Guo et al. 2017)."""
    if not p.branches:
        return {"rule": rule, "weights": {}, "temperature": 1.0}
    valid = p.split == "valid"
    branches, labels = {branch: values[valid] for branch, values in p.branches.items()}, p.labels[valid]
    weights = search_weights(branches, labels, p.tasks, rule)
    logits = [torch.from_numpy(part).log() for part in by_task(fuse(branches, weights, p.tasks), p.tasks)]
    def cross_entropy(temperature):
        return branch_loss([z / temperature for z in logits], torch.from_numpy(labels)).item()
    temperature = float(min(np.geomspace(0.1, 10, 101), key=cross_entropy))  # in steps of 5% (ours)
    return {"rule": rule, "weights": weights, "temperature": temperature}

# ----------------------------------------------------------------------------------------------- metrics and statistics

def each_task(probabilities, labels, tasks):
    """For each task with labels: its name; `known`, (N,) bool; the known lesions' probabilities (n, n_t) and classes
    (n,); class number -> "task/class" for Table 1, without "absent", the first of two, and what none or all have."""
    for t, (task, classes) in enumerate(tasks.items()):
        known = labels[:, t] >= 0
        truth = labels[known, t]
        positives = [k for k, name in enumerate(classes) if name != "absent" and (k > 0 or len(classes) > 2)]
        columns = {k: f"{task}/{classes[k]}" for k in positives if 0 < (truth == k).sum() < len(truth)}
        if known.any():
            yield task, known, by_task(probabilities, tasks)[t][known], truth, columns

def measure(probabilities, labels, tasks):
    """Metrics: name -> {column: value}, and "mean_name" -> the mean over its columns."""
    found = defaultdict(dict)
    for task, _, scores, truth, columns in each_task(probabilities, labels, tasks):
        predicted = scores.argmax(1)
        found["accuracy"][task] = metrics.accuracy_score(truth, predicted)
        found["macro_f1"][task] = metrics.f1_score(truth, predicted, average="macro")
        for k, column in columns.items():
            positive, called = truth == k, predicted == k
            found["auc"][column] = metrics.roc_auc_score(positive, scores[:, k])
            if len(tasks) == 1:  # as in Table 9
                found["ap"][column] = metrics.average_precision_score(positive, scores[:, k])
            found["precision"][column] = positive[called].sum() / max(called.sum(), 1)
            found["sensitivity"][column] = called[positive].mean()
            found["specificity"][column] = (~called)[~positive].mean()
    means = {f"mean_{name}": float(np.mean(list(each.values()))) for name, each in found.items()}
    if len(tasks) == 1 and means:  # MAT's Table 1; scores and truth are still the only task's
        means["lrap"] = float(metrics.label_ranking_average_precision_score(np.eye(scores.shape[1])[truth], scores))
    return dict(found) | means

def resamples(labels):
    """How often each lesion counts, (1 + R, N). Row 0: once. Others: drawn with replacement, the same for every run, so
    that runs pair up. A single task is drawn class by class: a resample without a class would bias the mean."""
    rng, counts = np.random.default_rng(0), np.ones((1 + RESAMPLES, len(labels)))
    strata = labels[:, 0] if labels.shape[1] == 1 else np.zeros(len(labels))
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        counts[1:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), RESAMPLES)
    return counts

def resampled_auc(scores, positive, counts):
    """AUC in each resample: the share of pairs in which the positive has the higher score, ties counting half."""
    wins = np.heaviside(scores[positive][:, None] - scores[~positive], 0.5)
    of_positives, of_negatives = counts[:, positive], counts[:, ~positive]
    won = ((of_positives @ wins) * of_negatives).sum(1)
    return np.ma.divide(won, of_positives.sum(1) * of_negatives.sum(1))  # masked where there is no pair

def bootstrap(probabilities, labels, tasks):
    """The terms of mean_auc and mean_accuracy, (columns, 1 + R): a row a column, masked where it lacks the class."""
    found, counts = defaultdict(list), resamples(labels)
    for _, known, scores, truth, columns in each_task(probabilities, labels, tasks):
        count = counts[:, known]
        found["mean_accuracy"].append(np.ma.divide(count @ (scores.argmax(1) == truth), count.sum(1)))
        for k in columns:
            found["mean_auc"].append(resampled_auc(scores[:, k], truth == k, count))
    return {name: np.ma.stack(values) for name, values in found.items()}

def interval(samples):
    return np.percentile(samples[:, 1:].mean(0).compressed(), (2.5, 97.5)).tolist()  # the middle 95% of the mean

def difference(ours, theirs):
    """Paired bootstrap of the answers of some runs and some others on the same test lesions, each metric averaged over
    the runs: mean -> [difference, low, high]. The lesions are drawn anew, the seeds are not."""
    gaps = defaultdict(int)
    for group, sign in ((ours, 1), (theirs, -1)):
        for p in group:
            test = p.split == "test"
            for name, samples in bootstrap(answer_of(p.branches)[test], p.labels[test], p.tasks).items():
                gaps[name] += sign * samples / len(group)
    return {name: [float(gap[:, 0].mean()), *interval(gap)] for name, gap in gaps.items()}

def subgroups(p):
    """The answer's test metrics for each value of each column of metadata; ages in bands of 20 years."""
    groups, answer = defaultdict(list), answer_of(p.branches)
    for column, texts in p.metadata.items():
        for n in np.flatnonzero(p.split == "test"):
            groups[data.word(column, texts[n] or "not given")].append(n)
    return {group: {"lesions": len(rows)} | measure(answer[rows], p.labels[rows], p.tasks)
            for group, rows in sorted(groups.items())}

def load_checkpoint(path, device="cpu"):
    """What a .pt file holds: of a finished run's model.pt the weights, the flags, and the lesions of its release."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises half a dozen types for a damaged file, none of them says which
        raise RunError(f"{path}: missing or damaged ({error}). If the run is unfinished, --resume it") from error

def write(path, text):
    """Writes the whole file or none. Where nothing may be written that is said, and the tables are still printed."""
    try:
        with data.whole(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"WARNING: {path} is not written ({error})")

def column_names(branch, tasks):
    return [f"{branch}/{task}/{name}" for task, classes in tasks.items() for name in classes]

def write_predictions(path, p, branches):
    """A row a lesion: case, split, metadata, overlaps, its classes, branch/task/class probabilities with all digits."""
    table = {"case": p.cases, "split": p.split} | p.metadata
    table |= {name: values.tolist() for name, values in p.overlaps.items()}
    for t, (task, classes) in enumerate(p.tasks.items()):
        table[task] = np.array([*classes, ""])[p.labels[:, t]]  # -1, unknown, is the last one
    for branch, values in branches.items():
        table |= dict(zip(column_names(branch, p.tasks), values.T.tolist()))
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([list(table), *zip(*table.values())])
    write(path, text.getvalue())

def lesions_of(saved):
    """Predictions without branches: the lesions of a model.pt (or evaluate_new's stand-in) not marked "train"."""
    tested = np.array(saved["split"]) != "train"
    cases, split, labels = (np.array(saved[name])[tested] for name in ("cases", "split", "labels"))
    metadata = {column: np.array(texts)[tested] for column, texts in saved["metadata"].items()}
    return Predictions(saved["tasks"], cases, split, labels, metadata, {}, {})

def read_predictions(run, saved):
    """The answers in predictions.csv for the lesions that model.pt knows, whatever the order of its rows."""
    path, p = Path(run) / "predictions.csv", lesions_of(saved)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        if sorted(row["case"] for row in rows) != sorted(p.cases):
            raise ValueError(f"{len(rows)} rows, not one for each of {len(p.cases)} lesions")
        by_case = {row["case"]: row for row in rows}
        def values(*columns):
            return np.array([[float(by_case[case][column]) for column in columns] for case in p.cases])
        p.overlaps.update({name: values(name)[:, 0] for name in ("jaccard", "dice") if name in rows[0]})
        for branch in dict.fromkeys(name.split("/")[0] for name in rows[0] if "/" in name):
            if branch not in ("equal", "weighted", "calibrated"):
                p.branches[branch] = values(*column_names(branch, p.tasks))
    except (OSError, LookupError, TypeError, ValueError, csv.Error) as error:
        raise RunError(f"{path} is not as it was written ({error}); --data with the run's own data mends it") from error
    return p

def finish(folder, p, decided):
    """Adds equal and weighted to `p`; writes predictions.csv and, with labels, results.json, which it returns."""
    own, weights = dict(p.branches), decided["weights"]  # own: of the network
    if len(own) > 1:
        p.branches["equal"] = fuse(own, dict.fromkeys(own, 1 / len(own)), p.tasks)
        p.branches["weighted"] = fuse(own, weights, p.tasks)
    written = dict(p.branches)
    if own:
        written["calibrated"] = fuse(own, weights, p.tasks, decided["temperature"])
    write_predictions(folder / "predictions.csv", p, written)
    if (p.labels < 0).all() and not p.overlaps:
        return None
    results = {"decided": decided, "means": {}, "overlaps": {}, "valid": {}, "test": {}}
    valid, test = p.split == "valid", p.split == "test"
    labels = p.labels[test]
    if own:
        results["valid"] = measure(answer_of(p.branches)[valid], p.labels[valid], p.tasks)
    if own and (labels >= 0).any():
        for branch, values in p.branches.items():
            results["test"][branch] = found = measure(values[test], labels, p.tasks)
            resampled = bootstrap(values[test], labels, p.tasks)
            found["intervals"] = {name: interval(samples) for name, samples in resampled.items()}
        results["means"] = {name: found[name] for name in MEANS if name in found}  # of the last branch: the answer
        results["incomplete"] = max(int(np.ma.getmaskarray(samples).any(0).sum()) for samples in resampled.values())
        results["subgroups"] = subgroups(p)
    for name, values in p.overlaps.items():
        samples = np.ma.array([resamples(labels) @ values[test] / len(labels)])  # (1, 1 + R)
        results["means"][name] = float(samples[0, 0])
        results["overlaps"][name] = [results["means"][name], *interval(samples)]
    write(folder / "results.json", json.dumps(results, indent=1))
    return results

def with_answers(p, saved, release, device):
    """The lesions of `p`, found by name in the release, with the answers of the saved network."""
    network = model.load(saved, device)
    if not set(network.reads) <= {*release.views, "words"}:
        raise RunError(f"the run reads {' and '.join(network.reads)}; this release has {' and '.join(release.views)}")
    rows = [release.cases.index(case) for case in p.cases]
    words = data.as_words(release.metadata, saved["vocabulary"], len(release.cases))[rows]
    branches, overlaps = predict(network, release.pixels[rows], release.views, words, device, saved["flags"]["amp"])
    return p._replace(branches=branches, overlaps=overlaps)

def evaluate_run(run, release=None, device=torch.device("cpu"), rule="near"):
    """(results, Predictions) of a run: from its predictions.csv or, with its own release, predicted anew."""
    saved = load_checkpoint(Path(run) / "model.pt", device)
    p = with_answers(lesions_of(saved), saved, release, device) if release else read_predictions(run, saved)
    return finish(Path(run), p, decide(p, rule)), p

def evaluate_new(run, path, cache, device, rule="near"):
    """(results, Predictions) of a release without the lesions of the run's training and validation splits."""
    saved = load_checkpoint(Path(run) / "model.pt", device)
    flags, seen = saved["flags"], np.array(saved["split"]) != "test"
    release = data.read(path, flags["image_size"], cache, to_train=False, masks=flags["model"] == "clnet")
    if release.fingerprint == saved["fingerprint"]:
        print(f"{path}: the run's own release. Its validation and test lesions are predicted again")
        return evaluate_run(run, release, device, rule)
    by_name = np.isin(release.cases, np.array(saved["cases"])[seen])
    by_photo = np.isin(release.digests, np.array(saved["digests"])[seen]).any(1)
    new = ~by_name & ~by_photo
    if not new.any():
        raise RunError(f"{path}: the run has seen every lesion")
    labels, folder = labels_for(saved["tasks"], release), Path(run) / Path(path).resolve().stem
    lesions = vars(release) | {"tasks": saved["tasks"], "labels": labels, "split": np.where(new, "test", "train")}
    p = with_answers(lesions_of(lesions), saved, release, device)
    print(f"{path}: {new.sum()} of {len(new)} lesions are tested, {(labels[new] >= 0).any(1).sum()} labelled; the run "
          f"has seen {by_name.sum()} by name, {by_photo.sum()} by photo. See {folder}")
    return finish(folder, p, decide(read_predictions(run, saved), rule)), p

def labels_for(tasks, release):
    """The release's labels (N, T) as classes of these tasks, matched by name; -1 where the run has no such class."""
    labels, lesions_of_class = np.full((len(release.cases), len(tasks)), -1), {}
    for t, (task, classes) in enumerate(release.tasks.items()):
        for k, name in enumerate(classes):
            lesions_of_class[data.same_text(f"{task}/{name}")] = release.labels[:, t] == k
    for t, (task, classes) in enumerate(tasks.items()):
        for k, name in enumerate(classes):
            labels[lesions_of_class.pop(data.same_text(f"{task}/{name}"), []), t] = k
    if lesions_of_class:
        print(f"WARNING: the run has no class {', '.join(lesions_of_class)}; labels of it are left out")
    return labels

# --------------------------------------------------------------------------------------------------------------- tables

def print_table(title, header, rows):
    """rows: name -> cells, of which fractions are printed as percents."""
    left = max(map(len, [title, *rows]))
    print("\n" + title.ljust(left) + "".join(name.rjust(12) for name in header))
    for name, cells in rows.items():
        texts = [f"{100 * cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells]
        print(name.ljust(left) + "".join(text.rjust(12) for text in texts))

def print_tables(results, compare=False):
    """Tables 1, 2 and 4 of the paper for the test split, and more; with `compare` the paper's PEMM beside ours."""
    test, decided = results["test"], results["decided"]
    if results["overlaps"]:
        rows = {MEANS[overlap]: values for overlap, values in results["overlaps"].items()}
        print_table("overlap of the masks (%)", ["mean", "95% from", "95% to"], rows)
    if not test:
        return
    name, found = list(test)[-1], answer_of(test)
    for metric, title in {"auc": "Table 1: AUC (%)", "accuracy": "Table 2: accuracy (%)"}.items():
        if metric in found:
            header, mean = list(test), f"mean_{metric}"
            rows = {column: [each[metric][column] for each in test.values()] for column in found[metric]}
            rows["mean"] = [each[mean] for each in test.values()]
            if compare:
                header.append("paper")
                for n, cells in enumerate(rows.values()):
                    cells.append(PAPER[metric][n] / 100)
            rows["95% from"] = [each["intervals"][mean][0] for each in test.values()]
            rows["95% to"] = [each["intervals"][mean][1] for each in test.values()]
            print_table(title, header, rows)
    if set(PAPER_TABLE_4) <= set(found.get("auc", [])):
        rates, rows = ["precision", "sensitivity", "specificity"], {}
        for column, (positives, true, false) in PAPER_TABLE_4.items():
            rows[column] = [found[rate][column] for rate in rates]
            if compare:
                rows[column + " paper"] = [true / (true + false), true / positives, 1 - false / (395 - positives)]
        print_table(f"Table 4: {name} (%)", rates, rows)
    means = [mean for mean in MEANS if mean in found]
    groups = {branch: {"lesions": "all"} | each for branch, each in test.items()} | results["subgroups"]
    rows = {group: [each.get(mean, "") for mean in ("lesions", *means)] for group, each in groups.items()}
    print_table(f"means (%), and of {name} in subgroups", ["lesions", *(MEANS[mean] for mean in means)], rows)
    weights = [f"{branch} {weight:.2f}" for branch, weight in decided["weights"].items()]
    print(f"{results['incomplete']} of {RESAMPLES} resamples lack a class; their mean AUC is without it\nfound on "
          f"validation: weights ({decided['rule']}) {', '.join(weights)}; temperature {decided['temperature']:.2f}")

def print_groups(saved, results):
    """Mean and standard deviation of the runs' answers, a row for each setting of the flags that make a method."""
    groups, rows, means = defaultdict(list), {}, list(results[0]["means"])
    for each, result in zip(saved, results):
        setting = [f"{flag} {value}" for flag, value in each["flags"].items()
                   if flag not in ("seed", "out", "resume", "data", "cache", "device", "amp", "compile")
                   and any(other["flags"].get(flag) != value for other in saved)]
        groups[", ".join(setting) or "all runs"].append([100 * result["means"].get(name, np.nan) for name in means])
    for setting, values in groups.items():
        deviation = np.std(values, 0, ddof=1) if len(values) > 1 else [np.nan] * len(means)  # of one run none
        rows[setting] = [len(values), *map("{:.1f} ± {:.1f}".format, np.mean(values, 0), deviation)]
    print_table("mean ± standard deviation (%)", ["runs", *(MEANS[name] for name in means)], rows)

# ----------------------------------------------------------------------------------------------------------- one lesion

def one_lesion(run, paths, about, device, rule="near"):
    """Prints the answer for the photos `paths`, view -> path, and the patient `about`, column -> [text], and draws its
    picture. Returns the answer: task -> {class: probability}."""
    saved = load_checkpoint(Path(run) / "model.pt", device)
    network, vocabulary, size = model.load(saved, device), saved["vocabulary"], saved["flags"]["image_size"]
    needed = [view for view in data.VIEWS if view in network.reads]
    photos = {view: data.decode(Path(paths[view]), size) for view in needed if view in paths}
    if not photos:
        raise RunError(f"{run} needs the {' and the '.join(needed)} photo")
    first = list(photos)[0]
    if len(photos) == 2 and np.array_equal(*photos.values()):
        print("WARNING: both photos are one and the same picture")
    if len(photos) < max(len(paths), len(needed)):
        print(f"only the {first} photo is used")  # the run reads no other, or no other was given
    p = read_predictions(run, saved)
    if len(photos) < len(needed):  # the branch of the only photo answers; the photo stands in for the other as well
        p = p._replace(branches={first: p.branches[first]})
    decided = decide(p, rule)
    weights, temperature = decided["weights"], decided["temperature"]
    for column, (value,) in about.items():
        if "words" not in network.reads or data.word(column, value) not in vocabulary:
            print(f"WARNING: this run has not learned the word {data.word(column, value)!r}; it is left out")

    pixels = torch.tensor(np.stack(list(photos.values())), device=device)[None].float().requires_grad_()
    inputs = data.as_inputs(pixels, photos)
    inputs["words"] = torch.from_numpy(data.as_words(about, vocabulary, 1)).to(device)
    attended, last_maps = {}, []  # what the second stage's attention reads of each photo; the last map that CLNet pools
    if len(photos) == 2 and network.attentions:
        network.attentions[1].register_forward_pre_hook(lambda module, maps: attended.update(module.read_of(*maps)))
    if saved["flags"]["model"] == "clnet" and weights:
        last_stage = [*network.encoders[0].stages, *network.fusions][-1]
        last_stage.register_forward_hook(lambda module, read, output: last_maps.append(output))
    outputs = network(*(inputs.get(name, inputs[first]) for name in network.reads))
    certainty, answer, text = 0 * pixels.sum(), {}, ""  # 0 where no class is predicted
    for t, (task, classes) in enumerate(saved["tasks"].items()):
        if weights:  # not if it finds the mask alone. As decide and fuse do it, but with a gradient
            logits = sum(weight * outputs[branch][t].log_softmax(1) for branch, weight in weights.items())
            chances = (logits / temperature).softmax(1)[0]
            certainty = certainty + chances.max().log()
            answer[task] = dict(zip(classes, chances.tolist()))
            shown = "  ".join(f"{name} {100 * chance:.0f}%" for name, chance in answer[task].items())
            text += f"{task}: {classes[chances.argmax()]}   ({shown})\n"
    of_pixels, *of_maps = torch.autograd.grad(certainty, [pixels, *last_maps])  # its gradients
    heats = gaussian_blur(of_pixels[0].abs().sum(-1), 2 * (size // 32) + 1)  # (V, S, S) saliency
    if last_maps:  # CLNet's paper says Grad-CAM++, but Eq. 2 is Grad-CAM's, and Eq. 3 has the ReLU inside the sum
        w = of_maps[0].mean((2, 3), keepdim=True)  # Eq. 2
        heats = (w * last_maps[0]).relu().sum(1)  # Eq. 3: (1, H_4, W_4)
    path = Path(run) / f"lesion-{Path(paths[first]).stem}.png"
    print(text, end="")
    draw(path, text, photos, heats, attended, outputs.get("mask"))
    print(f"the photos, what counts in them and what is read of them: {path}\nFor research: this is no medical device.")
    return answer

def draw(path, text, photos, heats, attended, mask):
    """Each photo, followed by what counts in it (heats (V, S, S)), by what is read of it after the second stage, and
    by the outline that was found; under them the text."""
    panels = []
    for v, (view, photo) in enumerate(photos.items()):
        panels += [photo, overlay(photo, heats[v])]
        if view in attended:
            panels.append(overlay(photo, attended[view][0]))
        if mask is not None:
            inside = (mask[0] > 0).float()  # (1, H, W)
            panels.append(overlay(photo, (F.max_pool2d(inside, 3, 1, 1) - inside)[0]))
    picture = Image.new("RGB", (1320, 240 + 20 * text.count("\n")), "white")
    picture.paste(Image.fromarray(np.concatenate(panels, 1)).resize((220 * len(panels), 220)))
    ImageDraw.Draw(picture).text((10, 230), text, "black", ImageFont.load_default(14), spacing=4)
    picture.save(path)

def overlay(photo, heat):
    """The photo (S, S, 3) with a map over it, red where it is high."""
    heat = heat.detach().cpu().numpy()
    heat = 0.8 * heat / max(heat.max(), 1e-30)
    heat = np.asarray(Image.fromarray(heat).resize(photo.shape[:2], Image.BILINEAR))[..., None]
    return (photo * (1 - heat) + np.array([255, 80, 0]) * heat).astype(np.uint8)

def main(argv=None):
    """Prints what the flags ask for; returns the results of the first run, or the probabilities of one lesion."""
    parser = argparse.ArgumentParser(description="The paper's tables from a run's predictions; an answer for a lesion.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder of a finished run")
    add("--data", metavar="PATH", help="predict the run's own release, or the unseen lesions of another")
    add("--cache", default="runs/cache", metavar="DIR", help="folder of the decoded photos [%(default)s]")
    add("--device", help="where to predict [an accelerator, else cpu]")
    add("--rule", default="near", choices=["near", "maximum"], help="how weights are chosen, see search_weights")
    add("--compare-paper", action="store_true", help="the paper's figures beside ours, on the published derm7pt")
    add("--against", nargs="+", default=[], metavar="OTHER", help="paired bootstrap of the difference from these runs")
    for view in data.VIEWS:
        add(f"--{view}", metavar="PHOTO", help="a photo of one lesion")
    add("--about", nargs="+", default=[], metavar="WORD", help="one lesion: its patient, such as age=45 sex=female")
    args = parser.parse_args(argv)
    device, runs = model.find_device(args.device), args.runs + args.against
    paths = {view: getattr(args, view) for view in data.VIEWS if getattr(args, view)}
    if (paths or args.about) and (args.data or args.compare_paper or len(runs) > 1 or not paths):
        parser.error("--clinical, --dermoscopy and --about ask one run about one lesion, and nothing else")
    if paths:
        told = {column: [text] for column, _, text in (each.partition("=") for each in args.about)}
        about = {column: told[column] for column in data.METADATA if column in told} | told  # in the order of training
        return one_lesion(runs[0], paths, about, device, args.rule)
    saved = [load_checkpoint(Path(run) / "model.pt") for run in runs]
    if len({(each["fingerprint"], *each["split"]) for each in saved}) > 1:
        raise RunError(f"{', '.join(runs)} have different lesions (or only some have masks); look at them one by one")
    if args.compare_paper and (args.data or len(args.runs) > 1 or not saved[0]["published"]):
        raise RunError("--compare-paper: for one run on the published derm7pt, and its own lesions")
    evaluated = [evaluate_new(run, args.data, args.cache, device, args.rule) if args.data
                 else evaluate_run(run, rule=args.rule) for run in runs]
    n, results, predicted = len(args.runs), [each for each, _ in evaluated], [p for _, p in evaluated]
    if results[0] and n > 1:
        print_groups(saved[:n], results)
    elif results[0]:
        print_tables(results[0], args.compare_paper)
    if args.against and all(each and each["test"] for each in results):
        for name, values in difference(predicted[:n], predicted[n:]).items():
            gap, low, high = (f"{100 * value:+.1f}" for value in values)
            print(f"{MEANS[name]}: RUN - OTHER = {gap} points, 95% interval {low} to {high}")
    return results[0]

if __name__ == "__main__":
    data.speak(main, data.DataError, RunError)
