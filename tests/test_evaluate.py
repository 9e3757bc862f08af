"""Metrics against scikit-learn, searches against loops, statistics, files, new lesions, the answer for one lesion."""
import csv
import itertools
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn import metrics

import data
import evaluate
import model
from conftest import close
from evaluate import RunError

TASKS = {"DIAG": ("a", "b", "c"), "PN": ("absent", "present")}
BRANCHES = ("clinical", "dermoscopy", "fusion")
CPU = torch.device("cpu")

def made(n=80, tasks=TASKS, seed=0, ties=False):
    """Random labels (n, T), and three branches that know something of them."""
    rng = np.random.default_rng(seed)
    labels = np.stack([rng.integers(0, len(classes), n) for classes in tasks.values()], 1)
    truth = np.concatenate([np.eye(len(classes))[labels[:, t]] for t, classes in enumerate(tasks.values())], 1)
    branches = {}
    for branch in BRANCHES:
        logits = 1.2 * truth + rng.normal(size=truth.shape)
        if ties:
            logits = logits.round()
        branches[branch] = evaluate.fuse({branch: np.exp(logits)}, {branch: 1.0}, tasks)
    return labels, branches

def predictions(labels, branches, tasks=TASKS):
    """Predictions whose first half is the validation split."""
    numbers = np.arange(len(labels))
    split = np.where(numbers < len(labels) // 2, "valid", "test")
    return evaluate.Predictions(tasks, numbers.astype(str), split, labels, {}, dict(branches), {})

def with_branches(run, branches):
    """The run as if its network had given these probabilities."""
    saved = evaluate.load_checkpoint(run / "model.pt")
    evaluate.write_predictions(run / "predictions.csv", evaluate.lesions_of(saved), branches)
    return evaluate.evaluate_run(run)

# -------------------------------------------------------------------------------------------------------------- metrics

@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tasks", [TASKS, data.SPC_TASKS], ids=["two tasks", "SPC"])
def test_every_metric_is_scikit_learns(tasks, ties):
    labels, branches = made(150, tasks, ties=ties)
    labels[::7, 0] = -1
    found = evaluate.measure(branches["fusion"], labels, tasks)
    first = 0
    for t, (task, classes) in enumerate(tasks.items()):
        known = labels[:, t] >= 0
        truth, scores = labels[known, t], branches["fusion"][known, first:first + len(classes)]
        guess, first = scores.argmax(1), first + len(classes)
        close(found["accuracy"][task], np.mean([a == b for a, b in zip(truth, guess)]))
        close(found["macro_f1"][task], metrics.f1_score(truth, guess, average="macro"))
        for k, name in enumerate(classes):
            column = f"{task}/{name}"
            if column in found["auc"]:
                pairs = list(itertools.product(scores[truth == k, k], scores[truth != k, k]))
                close(found["auc"][column], np.mean([(a > b) + (a == b) / 2 for a, b in pairs]))
                close(found["auc"][column], metrics.roc_auc_score(truth == k, scores[:, k]))
                close(found["precision"][column], metrics.precision_score(truth == k, guess == k))
                close(found["sensitivity"][column], (guess[truth == k] == k).mean())
                close(found["specificity"][column], (guess[truth != k] != k).mean())
    close(found["mean_auc"], np.mean(list(found["auc"].values())))

@pytest.mark.parametrize("tasks, expected", [
    (data.SPC_TASKS, "DIAG/BCC DIAG/NEV DIAG/MEL DIAG/MISC DIAG/SK PN/TYP PN/ATP STR/REG STR/IR PIG/REG PIG/IR RS/PRS "
                     "DaG/REG DaG/IR BWV/PRS VS/REG VS/IR"),
    ({"DIAG": ("benign", "malignant")}, "DIAG/malignant"),
    ({"DIAG": data.MILK10K}, " ".join(f"DIAG/{name}" for name in data.MILK10K))], ids=["SPC", "two", "MILK10k"])
def test_columns_of_table_1(tasks, expected):
    labels, branches = made(150, tasks)
    assert list(evaluate.measure(branches["fusion"], labels, tasks)["auc"]) == expected.split()

def test_what_nobody_has_has_no_column():
    labels, branches = made()
    labels[labels[:, 0] == 2, 0] = 1
    labels[:, 1] = -1
    found = evaluate.measure(branches["fusion"], labels, TASKS)
    assert list(found["auc"]) == ["DIAG/a", "DIAG/b"] and list(found["accuracy"]) == ["DIAG"]

def test_table_4_corrected():
    """The integers give the printed columns if PRE and SEN change places and SPE is the negative predictive value."""
    printed = {"SEN": (73.3, 62.4, 57.6, 68.4, 76.7, 71.1, 69.6, 33.3),
               "PRE": (65.3, 57.0, 52.1, 64.5, 52.8, 78.0, 73.3, 16.7),
               "SPE": (88.5, 87.1, 85.5, 84.2, 84.5, 80.6, 93.7, 93.4)}
    for n, (positives, true, false) in enumerate(evaluate.PAPER_TABLE_4.values()):
        assert abs(100 * true / (true + false) - printed["SEN"][n]) < 0.06
        assert abs(100 * true / positives - printed["PRE"][n]) < 0.06
        assert abs(100 * (395 - positives - false) / (395 - true - false) - printed["SPE"][n]) < 0.11

def test_one_task_has_average_precision_and_lrap():
    """The label ranking average precision of one true class is the mean reciprocal of its rank."""
    labels, branches = made(60, {"DIAG": ("a", "b", "c", "d")})
    scores = branches["fusion"]
    found = evaluate.measure(scores, labels, {"DIAG": ("a", "b", "c", "d")})
    ranks = [1 + sum(score > row[label] for score in row) for row, label in zip(scores, labels[:, 0])]
    close(found["lrap"], np.mean([1 / rank for rank in ranks]))
    expected = [metrics.average_precision_score(labels[:, 0] == k, scores[:, k]) for k in range(4)]
    close(found["mean_ap"], np.mean(expected))
    labels, branches = made(60)
    assert not {"lrap", "mean_ap"} & evaluate.measure(branches["fusion"], labels, TASKS).keys()

class Painter(torch.nn.Module):
    """Finds everything that is bright."""
    reads = ("dermoscopy",)

    def forward(self, image):
        return {"mask": image.mean(1, keepdim=True)}

def test_overlaps_are_scikit_learns():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 2, 8, 8, 3), np.uint8)
    pixels[0] = 0  # nothing there, nothing found
    pixels[1, 1] = 0  # nothing there, but something found
    branches, overlaps = evaluate.predict(Painter(), pixels, ("dermoscopy", "mask"), np.zeros((60, 1), np.int64), CPU,
                                          False)
    inputs = data.as_inputs(torch.from_numpy(pixels), ("dermoscopy", "mask"))
    assert not branches and overlaps["jaccard"][0] == overlaps["dice"][0] == 1 and overlaps["jaccard"][1] == 0
    for n in range(1, 60):
        given, found = inputs["mask"][n].flatten(), (inputs["dermoscopy"][n].mean(0) > 0).flatten()
        close(overlaps["jaccard"][n], metrics.jaccard_score(given, found, zero_division=0), 1e-6)
        close(overlaps["dice"][n], metrics.f1_score(given, found, zero_division=0), 1e-6)

# ------------------------------------------------------------------------------------------------------------ bootstrap

def test_resampled_auc_is_scikit_learns_with_weights():
    labels, branches = made(60, ties=True)
    positive, scores = labels[:, 0] == 1, branches["fusion"][:, 1]
    counts = evaluate.resamples(labels)[:20]
    expected = [metrics.roc_auc_score(positive, scores, sample_weight=weights) for weights in counts]
    close(evaluate.resampled_auc(scores, positive, counts).filled(), expected)

def test_bootstrap_accuracy_counts_lesions_as_drawn():
    labels, branches = made(60)
    labels[::5, 1] = -1
    found = evaluate.bootstrap(branches["fusion"], labels, TASKS)["mean_accuracy"]
    known = labels[:, 1] >= 0
    hit = branches["fusion"][known, 3:].argmax(1) == labels[known, 1]
    for r, count in enumerate(evaluate.resamples(labels)[:5]):
        close(found[1, r], metrics.accuracy_score(hit, np.ones_like(hit), sample_weight=count[known]))

def test_resamples_are_the_same_and_within_the_classes_of_one_task():
    labels, _ = made(50)
    counts = evaluate.resamples(labels)
    assert (counts[0] == 1).all() and (counts.sum(1) == 50).all() and (counts == evaluate.resamples(labels)).all()
    assert (counts[1:, labels[:, 0] == 0].sum(1) != (labels[:, 0] == 0).sum()).any()
    counts = evaluate.resamples(labels[:, :1])
    for k in range(3):
        assert (counts[:, labels[:, 0] == k].sum(1) == (labels[:, 0] == k).sum()).all()

def test_resamples_that_lack_a_class_are_counted(tmp_path, capsys):
    labels, branches = made(80)
    labels[40:, 1] = 0
    labels[60, 1] = 1  # a single case
    p = predictions(labels, branches)
    results = evaluate.finish(tmp_path, p, evaluate.decide(p))
    lacking = (evaluate.resamples(labels[40:])[1:, 20] == 0).sum()
    assert lacking > 300 and results["incomplete"] == lacking
    evaluate.print_tables(results)
    assert f"{lacking} of 1000 resamples lack a class" in capsys.readouterr().out

def test_paired_difference():
    labels, branches = made(120)
    p, other = (predictions(labels, {"fusion": branches[branch]}) for branch in ("fusion", "clinical"))
    values = evaluate.difference([p], [other])["mean_accuracy"]
    test = labels[60:]
    counts = evaluate.resamples(test)
    right = {}
    for branch in ("fusion", "clinical"):
        answer = branches[branch][60:]
        right[branch] = (answer[:, :3].argmax(1) == test[:, 0]) * 0.5 + (answer[:, 3:].argmax(1) == test[:, 1]) * 0.5
    gaps = counts @ (right["fusion"] - right["clinical"]) / 60
    close(values, [gaps[0], *np.percentile(gaps[1:], (2.5, 97.5))])
    assert evaluate.difference([p], [p])["mean_auc"] == [0, 0, 0]
    close(evaluate.difference([p, p, other], [other])["mean_accuracy"], np.multiply(values, 2 / 3))  # two seeds differ

# ---------------------------------------------------------------------------------------------- what validation decides

def test_fuse_averages_logits():
    _, branches = made(30)
    weights = dict(zip(BRANCHES, (0.2, 0.3, 0.5)))
    logits = sum(weights[branch] * (torch.tensor(values).log() + 3) for branch, values in branches.items()) / 2
    expected = torch.cat([logits[:, :3].softmax(1), logits[:, 3:].softmax(1)], 1)
    close(evaluate.fuse(branches, weights, TASKS, temperature=2.0), expected)

@pytest.mark.parametrize("rule", ["near", "maximum"])
@pytest.mark.parametrize("n, seed", [(5, 0), (5, 1), (60, 2), (60, 3)])
def test_search_is_a_loop_over_the_grid(n, seed, rule):
    """The other formulation: products of powers of probabilities, no softmax, integers for the hits."""
    labels, branches = made(n, seed=seed)
    found = []
    for c, d in itertools.product(range(21), repeat=2):
        if c + d <= 20:
            triple = (c, d, 20 - c - d)
            mixed = np.prod([branches[branch] ** (w / 20) for branch, w in zip(BRANCHES, triple)], 0)
            hit = np.stack([mixed[:, :3].argmax(1) == labels[:, 0], mixed[:, 3:].argmax(1) == labels[:, 1]], 1)
            found.append((hit.sum(), sum((3 * w - 20) ** 2 for w in triple), triple, np.std(hit.mean(1)) / n ** 0.5))
    best = max(found, key=lambda each: (each[0], -each[1]))
    if rule == "near":
        best = min((each for each in found if each[0] >= best[0] - best[3] * 2 * n - 1e-6), key=lambda each: each[1])
    distance = sum((60 * w - 20) ** 2 for w in evaluate.search_weights(branches, labels, TASKS, rule).values())
    close(distance, best[1])  # several triples may be as near

def test_both_rules_on_an_example():
    """Of 16 lesions all branches know 13 and miss 2; a heavy dermoscopy branch wins one more: chance, says "near"."""
    right, wrong, sure = [0.9, 0.1], [0.1, 0.9], [0.001, 0.999]
    others = np.array([right] * 13 + [sure, wrong, wrong])
    branches = {"clinical": others, "dermoscopy": np.array([right] * 14 + [wrong] * 2), "fusion": others}
    labels, tasks = np.zeros((16, 1), int), {"DIAG": ("a", "b")}
    assert list(evaluate.search_weights(branches, labels, tasks, "maximum").values()) == [0.1, 0.8, 0.1]
    assert sorted(evaluate.search_weights(branches, labels, tasks, "near").values()) == [0.3, 0.35, 0.35]
    assert evaluate.search_weights({"mask": others, "x": others}, labels, tasks) == {"mask": 0.5, "x": 0.5}

def test_temperature_is_the_best_of_a_fine_grid():
    labels, branches = made(200)
    sharp = evaluate.fuse({"fusion": branches["fusion"]}, {"fusion": 1.0}, TASKS, temperature=1 / 3)
    labels[::9, 1] = -1
    p = predictions(labels, {"fusion": sharp})
    grid = np.geomspace(0.5, 8, 2000)
    losses = []
    for temperature in grid:
        total = 0
        for t, part in enumerate((sharp[:100, :3], sharp[:100, 3:])):
            powers = part ** (1 / temperature)
            known = labels[:100, t] >= 0
            total -= np.log((powers / powers.sum(1, keepdims=True))[known, labels[:100, t][known]]).mean()
        losses.append(total)
    close(evaluate.decide(p)["temperature"], grid[np.argmin(losses)], 0.024)  # its steps are of 4.7%

def test_right_answers_end_at_the_lowest_temperature():
    labels = np.zeros((8, 1), int)
    p = predictions(labels, {"fusion": np.tile([0.6, 0.4], (8, 1))}, {"DIAG": ("a", "b")})
    close(evaluate.decide(p)["temperature"], 0.1)
    p = predictions(1 - labels, {"fusion": np.tile([0.6, 0.4], (8, 1))}, {"DIAG": ("a", "b")})
    close(evaluate.decide(p)["temperature"], 10)

# ----------------------------------------------------------------------------------------------------------- whole runs

@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("last.pt"))  # it is large

def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))

def edit(run, change):
    """Changes what model.pt holds."""
    saved = torch.load(run / "model.pt", weights_only=True)
    change(saved)
    torch.save(saved, run / "model.pt")

def remake(run, **flags):
    """Gives the run another, untrained network."""
    def change(saved):
        saved["flags"].update(flags)
        num_classes = [len(classes) for classes in saved["tasks"].values()]
        saved["network"] = model.make(saved["flags"], num_classes).state_dict()

    edit(run, change)

def test_tables_again_change_nothing(run, pairs, tmp_path, capsys):
    before = contents(run)
    evaluate.main([str(run)])
    first = capsys.readouterr().out
    (run / "results.json").unlink()
    evaluate.main([str(run)])
    assert capsys.readouterr().out == first and contents(run) == before
    for title in ("Table 1", "Table 2", "95% from", "temperature", "subgroups", "equal"):
        assert title in first
    evaluate.main([str(run), "--data", str(pairs), "--cache", str(tmp_path / "cache"), "--device", "cpu"])
    assert "the run's own release" in capsys.readouterr().out and contents(run) == before

def test_test_labels_decide_nothing(run):
    before = json.loads((run / "results.json").read_text())

    def change(saved):
        for labels, split in zip(saved["labels"], saved["split"]):
            if split == "test":
                labels[:] = [(label + 1) % 2 for label in labels]

    edit(run, change)
    for rule in ("near", "maximum"):
        after, _ = evaluate.evaluate_run(run, rule=rule)
        assert after["test"] != before["test"]
        if rule == "near":
            assert after["decided"] == before["decided"] and after["valid"] == before["valid"]

def test_rows_of_predictions_may_be_shuffled_but_not_lost_doubled_or_strange(run):
    results = evaluate.main([str(run)])
    path = run / "predictions.csv"
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *rows[::-1]]) + "\n")
    assert evaluate.main([str(run)]) == results
    strange = ["x" + rows[0], *rows[1:]]
    for damage in (rows[1:], [*rows, rows[0]], [rows[1], *rows[1:]], strange, [row[:40] for row in rows], []):
        path.write_text("\n".join([header, *damage]) + "\n")
        with pytest.raises(RunError, match="predictions.csv is not as it was written"):
            evaluate.main([str(run)])

def test_groups_and_difference_of_runs(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    edit(other, lambda saved: saved["flags"].update(seed=1))
    with_branches(other, {branch: np.full((24, 5), 0.3) for branch in BRANCHES})
    capsys.readouterr()
    evaluate.main([str(run), str(other), "--against", str(other)])
    text = capsys.readouterr().out
    found = [json.loads((each / "results.json").read_text()) for each in (run, other)]
    values = [100 * each["test"]["weighted"]["mean_auc"] for each in found]
    assert "all runs" in text and f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" in text
    assert f"AUC: RUN - OTHER = {(values[0] - values[1]) / 2:+.1f} points" in text  # of the mean of both
    flags = [{"flags": {"w": w, "seed": seed}} for w, seed in ((0.1, 0), (0.1, 1), (0.3, 0))]
    evaluate.print_groups(flags, [found[0]] * 3)
    text = capsys.readouterr().out
    assert "w 0.1" in text and "w 0.3" in text and "seed" not in text

@pytest.mark.parametrize("change", [{"fingerprint": "other"}, {"split": ["test"] * 40}], ids=["fingerprint", "split"])
def test_runs_on_other_lesions_are_not_compared(change, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    edit(other, lambda saved: saved.update(change))
    for arguments in ([str(run), str(other)], [str(run), "--against", str(other)]):
        with pytest.raises(RunError, match="different lesions"):
            evaluate.main(arguments)

def test_paper_is_compared_on_the_published_lesions_alone(run, tmp_path, capsys):
    with pytest.raises(RunError, match="--compare-paper"):
        evaluate.main([str(run), "--compare-paper"])
    edit(run, lambda saved: saved.update(published=True))
    with pytest.raises(RunError, match="--compare-paper: for one run"):
        evaluate.main([str(run), str(run), "--compare-paper"])
    p = predictions(*made(300, data.SPC_TASKS), data.SPC_TASKS)
    evaluate.print_tables(evaluate.finish(tmp_path, p, evaluate.decide(p)), compare=True)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["94.7"] == [row[-1] for row in rows if row[:1] == ["DIAG/BCC"]]
    assert [row[-1] for row in rows if row[:1] == ["mean"]][:2] == ["87.6", "77.4"]
    assert ["73.3", "65.3", "91.8"] in [row[-3:] for row in rows]

def test_a_folder_that_may_only_be_read_still_has_tables(run, monkeypatch, capsys):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data, "whole", refuse)
    assert evaluate.main([str(run)])["test"]
    text = capsys.readouterr().out
    assert "results.json is not written ([Errno 13] Permission denied)" in text and "Table 1" in text

@pytest.mark.parametrize("arguments, says", [
    ([], "model.pt: missing or damaged"), (["--clinical", "x.jpg"], "model.pt: missing or damaged"),
    (["--device", "nonsense"], "--device nonsense")], ids=str)
def test_damage_is_named(arguments, says, run):
    (run / "model.pt").write_bytes(b"no model")
    with pytest.raises(RunError, match=says):
        evaluate.main([str(run), *arguments])

def evaluate_csv(run, release, rows, name="new"):
    """The results on a CSV of these rows; photos named by number. The run's own files keep their bytes."""
    folder = release.parent / run.parent.name
    folder.mkdir(exist_ok=True)
    for row in rows:
        for view, kind in (("clinical", "clinic"), ("dermoscopy", "derm")):
            if isinstance(row.get(view), int):
                row[view] = str(release / "images" / f"{kind}{row[view]:04}.jpg")
    with open(folder / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    before = contents(run)
    results, _ = evaluate.evaluate_new(run, folder / f"{name}.csv", folder, CPU)
    assert contents(run) == before
    return results

def test_seen_lesions_are_left_out(run, release, tmp_path, capsys):
    """By name, whatever its photos; by either photo, though its file has other bytes; not the run's test lesions."""
    photo = (release / "images" / "derm0003.jpg").read_bytes()
    (tmp_path / "derm.jpg").write_bytes(photo[:2] + b"\xff\xfe\x00\x07hello" + photo[2:])  # a comment
    rows = [{"case": "1", "clinical": 40, "dermoscopy": 40},
            {"case": "same pixels", "clinical": 41, "dermoscopy": tmp_path / "derm.jpg"},
            {"case": "same clinical photo", "clinical": 4, "dermoscopy": 42},
            {"case": "30", "clinical": 43, "dermoscopy": 43},
            {"case": "new", "clinical": 44, "dermoscopy": 45},
            {"case": "validation", "clinical": 20, "dermoscopy": 20}]
    assert evaluate_csv(run, release, rows) is None  # no labels
    assert [row["case"] for row in table(run / "new" / "predictions.csv")] == ["30", "new"]
    text = capsys.readouterr().out
    assert "2 of 6 lesions are tested, 0 labelled" in text and "1 by name, 3 by photo" in text
    with pytest.raises(RunError, match="seen every lesion"):
        evaluate_csv(run, release, rows[:3])

def test_predictions_without_labels_are_the_runs(run, release):
    decided = evaluate.main([str(run)])["decided"]
    evaluate_csv(run, release, [{"case": str(n), "clinical": n, "dermoscopy": n} for n in range(26, 40)])
    expected = {row["case"]: row for row in table(run / "predictions.csv")}
    for row in table(run / "new" / "predictions.csv"):
        same = expected[row["case"]]
        for column in (name for name in row if "/" in name):
            assert abs(float(row[column]) - float(same[column])) < 1e-6, column
        odds = 1.0
        for branch in BRANCHES:
            present, absent = float(row[f"{branch}/veil/present"]), float(row[f"{branch}/veil/absent"])
            odds *= (present / absent) ** decided["weights"][branch]
        odds **= 1 / decided["temperature"]
        close(float(row["calibrated/veil/present"]), odds / (1 + odds), 1e-6)
    assert not (run / "new" / "results.json").exists()

def test_new_labels_are_matched_by_name_and_measured(run, release, capsys):
    """A release whose rows are all test, without some classes and tasks, its names in other letters."""
    names = {"melanoma": "MELANOMA", "nevus": "Nevus"}
    rows = []
    for row in table(run / "predictions.csv"):
        photo = int(row["case"])
        if row["split"] == "valid":  # the run has chosen its weights on it
            continue
        rows.append({"case": f"new {photo}", "clinical": photo, "dermoscopy": photo, "split": "test", "other": "x",
                     "sex": row["sex"], "Veil": row["veil"].upper(), "Diagnosis": names.get(row["diagnosis"], "")})
    results = evaluate_csv(run, release, rows)
    assert "the run has no class other/x" in capsys.readouterr().out
    assert results["decided"] == json.loads((run / "results.json").read_text())["decided"]
    assert {"sex female", "sex male"} == set(results["subgroups"])
    written = table(run / "new" / "predictions.csv")
    assert [row["veil"] for row in written] == [row["Veil"].lower() for row in rows]
    assert [row["diagnosis"] for row in written] == [row["Diagnosis"].lower() for row in rows]
    for branch, found in results["test"].items():
        assert list(found["accuracy"]) == ["diagnosis", "veil"]
        assert list(found["auc"]) == ["diagnosis/melanoma", "diagnosis/nevus", "veil/present"]
        for column, value in found["auc"].items():
            task, name = column.split("/")
            known = [row for row in written if row[task]]
            scores = [float(row[f"{branch}/{column}"]) for row in known]
            close(value, metrics.roc_auc_score([row[task] == name for row in known], scores))
        right = [(float(row[f"{branch}/veil/present"]) > 0.5) == (row["veil"] == "present") for row in written]
        close(found["accuracy"]["veil"], np.mean(right))

def test_names_match_whatever_the_letters_of_either_side(capsys):
    """The run's classes and the release's: case, spaces and an ending .0 make no difference."""
    new = SimpleNamespace(cases=list("abcd"), labels=np.array([[0, 1], [1, 0], [2, -1], [-1, 1]]),
                          tasks={"diag": ("nv ", "mel", "bcc"), "Size": ("1.0", "2.0")})
    found = evaluate.labels_for({"SIZE": ("2", "1"), "DIAG": ("MEL", "NV")}, new)
    assert found.tolist() == [[0, 1], [1, 0], [-1, -1], [0, -1]]
    assert "the run has no class diag/bcc;" in capsys.readouterr().out

def test_exchanged_photos_are_another_release(run, pairs, tmp_path):
    exchanged = pairs.with_name("exchanged.csv")
    exchanged.write_text(pairs.read_text().replace("clinical,dermoscopy", "dermoscopy,clinical", 1))
    evaluate.main([str(run), "--data", str(exchanged), "--cache", str(tmp_path / "cache"), "--device", "cpu"])
    before, after = (table(path / "predictions.csv") for path in (run, run / "exchanged"))
    before = [row for row in before if row["split"] == "test"]
    assert [row["case"] for row in after] == [row["case"] for row in before]
    assert max(abs(float(a["clinical/veil/present"]) - float(b["clinical/veil/present"])) for a,
               b in zip(after, before)) > 1e-3

def test_a_photo_that_the_network_needs_must_be_there(run, release):
    with pytest.raises(RunError, match="reads clinical and dermoscopy; this release has dermoscopy"):
        evaluate_csv(run, release, [{"case": "a", "dermoscopy": 50}])

# ----------------------------------------------------------------------------------------------------------- one lesion

def photos(release):
    return {"clinical": release / "images" / "clinic0030.jpg", "dermoscopy": release / "images" / "derm0030.jpg"}

def test_one_lesion_is_answered_as_in_predictions_csv(run, release, capsys):
    paths = photos(release)
    answer = evaluate.main([str(run), "--device", "cpu", *(f"--{view}={path}" for view, path in paths.items())])
    row = next(row for row in table(run / "predictions.csv") if row["case"] == "30")
    for task, classes in answer.items():
        for name, value in classes.items():
            assert abs(value - float(row[f"calibrated/{task}/{name}"])) < 5e-3  # which may be of bfloat16
    assert f"diagnosis: {max(answer['diagnosis'], key=answer['diagnosis'].get)}" in capsys.readouterr().out
    with Image.open(run / "lesion-clinic0030.png") as picture:
        assert picture.size == (1320, 280)

@pytest.mark.parametrize("view", data.VIEWS)
def test_one_photo_is_answered_by_its_branch(view, run, release, capsys):
    """At the temperature that is found for this branch alone."""
    path = photos(release)[view]
    answer = evaluate.one_lesion(run, {view: path}, {}, CPU)
    assert f"only the {view} photo is used" in capsys.readouterr().out
    saved = torch.load(run / "model.pt", weights_only=True)
    pixels = torch.from_numpy(data.decode(path, 32))[None, None]
    image = data.as_inputs(pixels, (view,))[view]
    with torch.no_grad():
        logits = model.load(saved, CPU)(image, image)[view][0]
    p = evaluate.read_predictions(run, saved)
    temperature = evaluate.decide(p._replace(branches={view: p.branches[view]}))["temperature"]
    assert temperature != evaluate.decide(p)["temperature"]
    close(list(answer["diagnosis"].values()), (logits / temperature).softmax(1)[0], 1e-5)

def test_photos_that_say_nothing_are_said(run, release, capsys):
    path = photos(release)["clinical"]
    evaluate.one_lesion(run, {"clinical": path, "dermoscopy": path}, {}, CPU)
    assert "one and the same picture" in capsys.readouterr().out
    remake(run, modality="dermoscopy")
    with_branches(run, {"dermoscopy": np.full((24, 5), 0.3)})
    evaluate.one_lesion(run, photos(release), {}, CPU)
    assert "only the dermoscopy photo is used" in capsys.readouterr().out
    with pytest.raises(RunError, match="needs the dermoscopy photo"):
        evaluate.one_lesion(run, {"clinical": path}, {}, CPU)

def test_a_single_branch_is_its_own_answer(run, release, tmp_path):
    remake(run, modality="dermoscopy")
    results, _ = with_branches(run, {"dermoscopy": np.full((24, 5), 0.3)})
    assert list(results["test"]) == ["dermoscopy"] and results["decided"]["weights"] == {"dermoscopy": 1.0}
    evaluate_csv(run, release, [{"case": "a", "dermoscopy": 50}])
    assert len(table(run / "new" / "predictions.csv")) == 1

def looked_at(run, release, monkeypatch, weights, branches=BRANCHES):
    """The maps that the picture shows."""
    maps, overlay = [], evaluate.overlay
    decided = {"weights": dict(zip(branches, weights)), "temperature": 1.0}
    monkeypatch.setattr(evaluate, "decide", lambda p, rule: decided)
    monkeypatch.setattr(evaluate, "overlay", lambda photo, heat: maps.append((photo, heat)) or overlay(photo, heat))
    evaluate.one_lesion(run, photos(release), {}, CPU)
    return maps

@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_gradient_maps_belong_to_the_branches_of_the_answer(weights, run, release, monkeypatch):
    """Without attention a branch sees its own photo alone."""
    remake(run, fusion="concat")
    maps = looked_at(run, release, monkeypatch, weights)
    assert [bool(heat.any()) for _, heat in maps] == [weights[0] + weights[2] > 0, weights[1] + weights[2] > 0]

def test_attention_is_drawn_over_the_photo_that_is_read(run, release, monkeypatch):
    maps = looked_at(run, release, monkeypatch, (0, 0, 1))
    assert len(maps) == 4
    network = model.load(torch.load(run / "model.pt", weights_only=True), CPU)
    decoded = {view: data.decode(path, 32) for view, path in photos(release).items()}
    with torch.no_grad():
        inputs = data.as_inputs(torch.from_numpy(np.stack(list(decoded.values())))[None], data.VIEWS)
        encoder = network.encoders[0]
        c, d = network.attentions[0](*(encoder.stages[0](encoder.stem(image)) for image in inputs.values()))
        expected = network.attentions[1].read_of(encoder.stages[1](c), encoder.stages[1](d))
        for (photo, found), view in zip(maps[1::2], data.VIEWS):
            close(found, expected[view][0], 1e-4)
            assert (photo == decoded[view]).all()

def test_words_about_a_patient_come_in_the_order_of_training(run, release, monkeypatch):
    monkeypatch.setattr(evaluate, "one_lesion", lambda run, paths, about, device, rule: list(about.items()))
    told = ["--about", "sex=female", "colour=red", "age=45"]
    photo = f"--clinical={photos(release)['clinical']}"
    assert evaluate.main([str(run), photo, *told]) == [("age", ["45"]), ("sex", ["female"]), ("colour", ["red"])]
    with pytest.raises(SystemExit):
        evaluate.main([str(run), *told])

def test_long_class_names_do_not_break_the_picture(run, release):
    edit(run, lambda saved: saved["tasks"].update(veil=("ä" * 75, "b" * 750)))
    with_branches(run, {branch: np.full((24, 5), 0.3) for branch in BRANCHES})
    assert len(evaluate.one_lesion(run, photos(release), {}, CPU)["veil"]) == 2

def test_the_answer_is_said_before_a_picture_that_cannot_be_written(run, release, monkeypatch, capsys):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(evaluate, "draw", refuse)
    with pytest.raises(PermissionError):
        evaluate.one_lesion(run, photos(release), {}, CPU)
    assert "veil: " in capsys.readouterr().out

@pytest.mark.parametrize("learns", ["class", "both"])
def test_clnets_activation_map_is_worked_out_by_hand(learns, run, release, monkeypatch):
    """Eq. 2 and 3. The classifier is linear in the pooled maps, so the gradients of log p can be written down."""
    remake(run, model="clnet", tasks=learns, image_size=64)
    (_, found), *_ = looked_at(run, release, monkeypatch, [1.0], ["dermoscopy"])
    network = model.load(torch.load(run / "model.pt", weights_only=True), CPU)
    image = data.as_inputs(torch.from_numpy(data.decode(photos(release)["dermoscopy"], 64))[None, None],
                           ["dermoscopy"])["dermoscopy"]
    with torch.no_grad():
        X = network.encoders[0](image)[-1]
        if learns == "both":
            X = network.fusions[3](X, network.encoders[1](image)[-1])
        w = torch.zeros(X.shape[1])
        for task, logits in zip(network.tasks, network(image)["dermoscopy"]):
            gradient = F.one_hot(logits[0].argmax(), logits.shape[1]) - logits[0].softmax(0)  # of log p by the logits
            w += gradient @ task.weight[:, -len(w):] / X[0, 0].numel()
        expected = (w[:, None, None] * X[0]).relu().sum(0)
    assert expected.shape == (2, 2) and expected.max() > 0
    close(found, expected, 1e-4)
