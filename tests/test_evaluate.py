"""Metrics against scikit-learn, the search against a loop, statistics, files, tables and the answer for one lesion."""
import csv
import itertools
import json
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics

import data
import evaluate
from conftest import close
from evaluate import RunError

SPC = {task: tuple(classes) for task, (_, classes) in data.SPC.items()}
TASKS = {"DIAG": ("a", "b", "c"), "PN": ("absent", "present")}


def predictions(n=80, tasks=TASKS, seed=0, ties=False, labels=None):
    """Random labels and probabilities that know something of them: labels (n, T), probabilities (n, K)."""
    rng = np.random.default_rng(seed)
    labels = labels if labels is not None else np.stack([rng.integers(0, len(classes), n) for classes in tasks.values()], 1)
    logits = np.concatenate([rng.normal(size=(n, len(classes))) + 1.2 * np.eye(len(classes))[labels[:, t]]
                             for t, classes in enumerate(tasks.values())], 1)
    return labels, evaluate.softmax(logits.round() if ties else logits, tasks)


def once(labels):
    return np.ones((1, len(labels)))


# --------------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tasks", [TASKS, SPC], ids=["two tasks", "SPC"])
def test_every_metric_is_scikit_learns(tasks, ties):
    labels, probabilities = predictions(120, tasks, ties=ties)
    labels[::7, 0] = -1
    found = evaluate.measure(probabilities, labels, tasks, once(labels))
    expected = {name: {} for name in found if not name.startswith("mean_")}
    for t, (task, part) in enumerate(zip(tasks, evaluate.by_task(probabilities, tasks))):
        known = labels[:, t] >= 0
        truth, scores, guess = labels[known, t], part[known], part[known].argmax(1)
        expected["accuracy"][task] = metrics.accuracy_score(truth, guess)
        expected["balanced_accuracy"][task] = metrics.balanced_accuracy_score(truth, guess)
        expected["macro_f1"][task] = metrics.f1_score(truth, guess, average="macro")
        for k, name in evaluate.columns(task, tasks[task]):
            expected["auc"][name] = metrics.roc_auc_score(truth == k, scores[:, k])
            expected["ap"][name] = metrics.average_precision_score(truth == k, scores[:, k])
            expected["precision"][name] = metrics.precision_score(truth == k, guess == k, zero_division=0)
            expected["sensitivity"][name] = metrics.recall_score(truth == k, guess == k)
            expected["specificity"][name] = metrics.recall_score(truth != k, guess != k)
    for metric, columns in expected.items():
        assert list(found[metric]) == list(columns)
        close(np.array([value[0] for value in found[metric].values()]), list(columns.values()), 1e-12)
        close(found[f"mean_{metric}"][0], np.mean(list(columns.values())), 1e-12)


def test_the_17_columns_of_table_1():
    names = {kind: [name for task, classes in tasks.items() for _, name in evaluate.columns(task, classes)]
             for kind, tasks in (("spc", SPC), ("two", data.TWO_CLASSES), ("milk10k", {"DIAG": data.MILK10K}))}
    assert names["spc"] == (
        "DIAG/BCC DIAG/NEV DIAG/MEL DIAG/MISC DIAG/SK PN/TYP PN/ATP STR/REG STR/IR PIG/REG PIG/IR RS/PRS DaG/REG DaG/IR "
        "BWV/PRS VS/REG VS/IR").split()
    assert names["two"] == ["DIAG/malignant"] and len(names["milk10k"]) == 11


def test_nasty_arrays():
    labels, probabilities = predictions()
    labels[labels[:, 0] == 2, 0] = 1  # class c has no case
    found = evaluate.measure(probabilities, labels, TASKS, once(labels))
    assert np.isnan(found["auc"]["DIAG/c"][0]) and np.isnan(found["sensitivity"]["DIAG/c"][0])
    close(found["mean_auc"][0], np.mean([found["auc"][name][0] for name in ("DIAG/a", "DIAG/b", "PN/present")]))
    equal = np.concatenate([np.full((80, 3), 1 / 3), np.full((80, 2), 1 / 2)], 1)
    found = evaluate.measure(equal, labels, TASKS, once(labels))
    assert found["auc"]["DIAG/a"][0] == found["auc"]["PN/present"][0] == 0.5
    close(found["ap"]["DIAG/a"][0], (labels[:, 0] == 0).mean())
    probabilities[3, 1] = np.nan
    with pytest.raises(RunError, match="not finite"):
        evaluate.measure(probabilities, labels, TASKS, once(labels))


def test_weights_are_repetitions():
    """A resample's metrics are scikit-learn's on the lesions written out as often as they were drawn."""
    labels, probabilities = predictions(60, ties=True)
    drawn = evaluate.resamples(60)[:5]
    found = evaluate.measure(probabilities, labels, TASKS, drawn)
    for r, weights in enumerate(drawn.astype(int)):
        rows = np.repeat(np.arange(60), weights)
        close(found["auc"]["DIAG/b"][r], metrics.roc_auc_score(labels[rows, 0] == 1, probabilities[rows, 1]), 1e-12)
        close(found["ap"]["DIAG/b"][r], metrics.average_precision_score(labels[rows, 0] == 1, probabilities[rows, 1]), 1e-12)
        close(found["accuracy"]["PN"][r], (probabilities[rows, 3:].argmax(1) == labels[rows, 1]).mean(), 1e-12)


def test_bootstrap_of_the_whole_table_takes_seconds():
    labels, probabilities = predictions(395, SPC)
    start = time.perf_counter()
    found = evaluate.intervals(probabilities, labels, SPC)
    assert time.perf_counter() - start < 10
    plain = evaluate.measure(probabilities, labels, SPC, once(labels))
    assert all(low < plain[name][0] < high for name, (low, high) in found.items() if name in ("mean_auc", "mean_accuracy"))


def test_table_4_corrected_from_its_integers():
    table = evaluate.paper_table_4()
    assert [round(v, 1) for v in table["precision"]] == [73.3, 62.4, 57.6, 68.4, 76.7, 71.1, 69.6, 33.3, 64.1]
    assert [round(v, 1) for v in table["sensitivity"]] == [65.3, 57.0, 52.1, 64.5, 52.8, 78.0, 73.3, 16.7, 57.5]
    assert round(table["specificity"][-1], 1) == 89.2 and round(table["auc"][-1], 1) == 86.7
    npv = [100 * (395 - n - fp) / (395 - tp - fp) for n, tp, fp, _ in evaluate.PAPER_TABLE_4.values()]
    for value, printed in zip(npv, (88.5, 87.1, 85.5, 84.2, 84.5, 80.6, 93.7, 93.4)):  # the paper's row "SPE"
        assert abs(value - printed) < 0.11
    close(np.mean(evaluate.PAPER["auc"][:-1]), 87.82, 1e-4)


# ---------------------------------------------------------------------------------------------------- fusion and weights


def three_branches(n, tasks, seed=0):
    labels, one = predictions(n, tasks, seed)
    others = (predictions(n, tasks, seed + k, labels=labels)[1] for k in (1, 2))
    return labels, dict(zip(("clinical", "dermoscopy", "fusion"), (one, *others)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [5, 60])
def test_weight_search_is_a_loop_over_the_grid(seed, n):
    labels, branches = three_branches(n, TASKS, seed)
    best = None
    for c, d in itertools.product(range(21), repeat=2):
        if c + d <= 20:
            w = np.array([c, d, 20 - c - d]) / 20
            mixed = sum(weight * np.log(p) for weight, p in zip(w, branches.values()))
            accuracy = np.mean([(part.argmax(1) == y).mean() for part, y in zip((mixed[:, :3], mixed[:, 3:]), labels.T)])
            key = (-round(accuracy, 12), round(((w - 1 / 3) ** 2).sum(), 12), c, d)
            best = min(best or (key, w), (key, w), key=lambda each: each[0])
    assert list(evaluate.search_weights(branches, labels, TASKS).values()) == best[1].tolist()


def test_fuse_averages_logits():
    labels, branches = three_branches(30, TASKS)
    weights = {"clinical": 0.2, "dermoscopy": 0.3, "fusion": 0.5}
    shifted = {branch: np.log(p) + 3.0 for branch, p in branches.items()}  # logits: known up to a constant
    mixed = torch.tensor(sum(weights[branch] * z for branch, z in shifted.items()))
    expected = torch.cat([mixed[:, :3].softmax(1), mixed[:, 3:].softmax(1)], 1)
    close(evaluate.fuse(branches, weights, TASKS), expected, 1e-12)


def test_unknown_and_single_classes_do_not_end_in_numbers():
    labels, probabilities = predictions()
    assert evaluate.find_temperature(probabilities, np.full((80, 2), -1), TASKS) == 1
    one = {"DIAG": ("a", "b")}
    found = evaluate.intervals(probabilities[:, :2], np.zeros((80, 1), int), one)
    assert found["mean_auc"] == [None, None]
    p = evaluate.Predictions(one, ["1", "2"], np.array(["test", "valid"]), np.zeros((2, 1), int), {"fused": np.full((2, 2), 0.5)}, {})
    assert "mean_auc" not in evaluate.difference(p, p)


def test_temperature_and_calibration_error():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 5)) * 2
    truth = evaluate.softmax(logits, TASKS)
    labels = np.stack([(part.cumsum(1) > rng.random((4000, 1))).argmax(1) for part in evaluate.by_task(truth, TASKS)], 1)
    overconfident = evaluate.softmax(3 * logits, TASKS)
    temperature = evaluate.find_temperature(overconfident, labels, TASKS)
    assert 2.8 < temperature < 3.2, temperature
    before, after = (evaluate.calibration_error(evaluate.reliability(p, labels, TASKS)) for p in (overconfident, truth))
    assert before > 0.1 and after < 0.02
    bins = evaluate.reliability(np.array([[0.9, 0.1], [0.91, 0.09], [0.6, 0.4]]), np.array([[0], [1], [0]]), {"DIAG": ("a", "b")})
    close(evaluate.calibration_error(bins), (2 * abs(0.905 - 0.5) + abs(0.6 - 1)) / 3, 1e-12)


# ------------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("last.pt"))  # large, and not needed


def test_tables_are_repeated_from_the_runs_files_alone(run, capsys):
    expected, files = (run / "results.json").read_text(), {"predictions.csv", "results.json", "log.csv", "args.json"}
    capsys.readouterr()
    evaluate.main([str(run)])
    first = capsys.readouterr().out
    (run / "model.pt").unlink(), (run / "results.json").unlink()
    evaluate.main([str(run)])
    assert capsys.readouterr().out == first and (run / "results.json").read_text() == expected
    assert files <= {path.name for path in run.iterdir()}
    for title in ("Table 1", "Table 2", "Table 4", "95% bootstrap", "calibration error", "subgroups"):
        assert title in first


def test_predicting_again_gives_the_same_file(run, release, tmp_path):
    before = (run / "predictions.csv").read_bytes()
    evaluate.main([str(run), "--data", str(release), "--cache", str(tmp_path / "cache"), "--device", "cpu"])
    assert (run / "predictions.csv").read_bytes() == before
    evaluate.main([str(run), "--data", str(release), "--cache", str(tmp_path / "cache"), "--device", "cpu", "--tta"])
    assert (run / "predictions.csv").read_bytes() == before != (run / "predictions-tta.csv").read_bytes()


def test_six_views_are_averaged(run, release, tmp_path):
    network, saved = evaluate.load_run(run, "cpu")
    found = data.read(release)
    pixels = torch.from_numpy(data.load(found, 32, tmp_path))[:3]
    device, rows = torch.device("cpu"), [0, 1, 2]
    ours = evaluate.predict(network, pixels, rows, device, False, tta=True)
    views = [pixels, pixels.flip(3), pixels.flip(2), pixels.flip(2, 3), pixels.rot90(1, (2, 3)), pixels.rot90(3, (2, 3))]
    each = [evaluate.predict(network, view, rows, device, False) for view in views]
    for branch in ours:
        mean = sum(np.log(one[branch]) for one in each) / 6
        close(ours[branch], evaluate.softmax(mean, saved["tasks"]), 1e-6)


def test_weights_and_temperature_never_see_the_test_split(run):
    before = json.loads((run / "results.json").read_text())
    with open(run / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for n in range(0, len(rows), 24):  # a case: every task's truth moves to another class
        if rows[n]["split"] == "test":
            for start, stop in itertools.pairwise(np.cumsum([0, *map(len, SPC.values())])):
                truth = [row["truth"] for row in rows[n + start:n + stop]]
                for row, value in zip(rows[n + start:n + stop], truth[1:] + truth[:1]):
                    row["truth"] = value
    with open(run / "predictions.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    after = evaluate.main([str(run)])
    assert after["weights"] == before["weights"] and after["temperature"] == before["temperature"]
    assert after["valid"] == before["valid"] and after["test"] != before["test"]


def test_exchanged_photos_change_the_answers(run, release, tmp_path):
    """Clinical and dermoscopy files exchanged at prediction time: the branches notice."""
    swapped = shutil.copytree(release, tmp_path / "swapped")
    table = (swapped / "meta" / "meta.csv").read_text()
    (swapped / "meta" / "meta.csv").write_text(table.replace("clinic,derm,", "derm,clinic,"))
    before = evaluate.read_predictions(run / "predictions.csv").branches
    evaluate.main([str(run), "--data", str(swapped), "--cache", str(tmp_path / "cache"), "--device", "cpu"])
    after = evaluate.read_predictions(run / "predictions.csv").branches
    assert np.abs(before["clinical"] - after["clinical"]).max() > 1e-3


def test_read_predictions_is_the_inverse_of_write(tmp_path):
    labels, branches = three_branches(20, TASKS)
    labels[3, 1] = -1
    p = evaluate.Predictions(TASKS, [f"case {n % 7}" for n in range(20)], np.array(["valid"] * 7 + ["test"] * 13), labels, branches,
                             {"sex": ["female", ""] * 10})
    evaluate.write_predictions(tmp_path / "p.csv", p)
    found = evaluate.read_predictions(tmp_path / "p.csv")
    assert (found.tasks, found.cases, found.metadata) == (p.tasks, p.cases, p.metadata)
    assert (found.labels == labels).all() and (found.split == p.split).all()
    assert all((found.branches[branch] == values).all() for branch, values in branches.items())


def test_several_runs_mean_and_deviation(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / "other")
    with open(other / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["fusion"] = row["clinical"]
    with open(other / "predictions.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    capsys.readouterr()
    evaluate.main([str(run), str(other)])
    text = capsys.readouterr().out
    values = [100 * json.loads((each / "results.json").read_text())["test"]["fused"]["mean_auc"] for each in (run, other)]
    assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" in text
    saved = json.loads((other / "args.json").read_text())
    saved["flags"]["w"] = 0.3
    (other / "args.json").write_text(json.dumps(saved))
    evaluate.main([str(run), str(other)])
    text = capsys.readouterr().out
    assert "w 0.1" in text and "w 0.3" in text


def test_paired_difference(run, tmp_path, capsys):
    labels, branches = three_branches(200, TASKS)
    p = evaluate.Predictions(TASKS, list(map(str, range(200))), np.array(["test"] * 200), labels, branches, {})
    noise = evaluate.softmax(np.random.default_rng(9).normal(size=(200, 5)), TASKS)
    better = evaluate.difference(p, p._replace(branches={"fusion": noise}))
    assert all(low > 0 and above == 1 for _, (low, _), above in (better[name] for name in ("mean_auc", "mean_accuracy")))
    gap, (low, high), above = evaluate.difference(p, p)["mean_auc"]
    assert gap == low == high == above == 0
    with pytest.raises(RunError, match="different tasks or test lesions"):
        evaluate.difference(p, p._replace(cases=p.cases[::-1]))
    capsys.readouterr()
    evaluate.main([str(run), "--against", str(run)])
    assert "+0.0 points" in capsys.readouterr().out


def test_lesions_of_the_training_split_are_never_tested(run, release, tmp_path):
    """The same photos under another split: what was trained on would be tested."""
    other = shutil.copytree(release, tmp_path / "other")
    indexes = [other / "meta" / f"{split}_indexes.csv" for split in ("train", "test")]
    texts = [path.read_text() for path in indexes]
    for path, text in zip(indexes, reversed(texts)):
        path.write_text(text)
    with pytest.raises(RunError, match="was trained on 25 of the validation and test lesions"):
        evaluate.main([str(run), "--data", str(other), "--cache", str(tmp_path / "cache"), "--device", "cpu"])


def test_runs_on_other_lesions_are_not_averaged(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    text = (other / "predictions.csv").read_text()
    (other / "predictions.csv").write_text(text.replace("38,test", "x38,test"))
    with pytest.raises(RunError, match="different tasks or test lesions"):
        evaluate.main([str(run), str(other)])
    (other / "predictions.csv").write_text(text[:5000])
    with pytest.raises(RunError, match="is not as it was written"):
        evaluate.main([str(other)])


def test_subgroups_count_and_leave_out_empty_classes():
    labels, probabilities = predictions(60)
    labels[:10, 0] = 0  # the young have class a alone: no AUC from DIAG
    p = evaluate.Predictions(TASKS, [str(n) for n in range(60)], np.array(["test"] * 60), labels, {"fused": probabilities},
                             {"age": ["15"] * 10 + ["45.0"] * 50, "site": ["trunk"] * 60, "sex": ["male"] * 59 + [""]})
    found = evaluate.subgroups(p)
    assert {name: each["lesions"] for name, each in found.items()} == {"age 0 to 19": 10, "age 40 to 59": 50, "sex male": 59,
                                                                       "sex not given": 1}
    assert found["age 0 to 19"]["columns"] == 1 and found["age 40 to 59"]["columns"] == 4
    assert found["sex not given"]["mean_auc"] is None


def test_pictures_are_drawn_or_their_absence_said(run, capsys):
    pytest.importorskip("matplotlib")
    evaluate.main([str(run)])
    assert {"curves.png", "roc.png", "confusion.png", "reliability.png"} <= {path.name for path in run.iterdir()}


def test_without_matplotlib_it_is_said(run, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    evaluate.main([str(run)])
    assert "matplotlib is not installed" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ one lesion


def test_one_lesion(run, release, capsys):
    photos = [str(release / "images" / f"{kind}0050.jpg") for kind in ("clinic", "derm")]
    found = evaluate.main([str(run), "--clinical", photos[0], "--dermoscopy", photos[1], "--device", "cpu"])
    text = capsys.readouterr().out
    assert list(found) == ["clinical", "dermoscopy", "fusion", "fused"] and "seven-point score" in text
    p = evaluate.read_predictions(run / "predictions.csv")
    row = [case for case, split in zip(p.cases, p.split)].index("51")
    for branch in ("clinical", "dermoscopy", "fusion"):  # the same photo, decoded alone
        close(found[branch][0], p.branches[branch][row], 1e-6)
    close(sum(part.sum() for part in evaluate.by_task(found["fused"], SPC)), 8.0)
    with Image.open(run / "lesion-clinic0050.png") as picture:
        assert picture.width == 1200


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.2, 0.3, 0.5)])
def test_the_gradient_map_is_that_of_the_answer(weights):
    """Of photos that only their own branch reads: a branch without weight in the answer has no map."""
    torch.manual_seed(0)
    network = evaluate.model.PEMM("convnext_atto", (3, 2), fusion="concat").eval()
    photos = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    maps, reads = evaluate.look(network, photos, dict(zip(evaluate.model.BRANCHES, weights)), [0, 1], torch.device("cpu"), None)
    assert not reads
    assert [bool(each.any()) for each in maps] == [weights[0] + weights[2] > 0, weights[1] + weights[2] > 0]


def test_attention_of_a_point_is_that_of_the_second_stage():
    torch.manual_seed(0)
    network = evaluate.model.PEMM("convnext_atto", (3, 2)).eval()
    photos = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    _, reads = evaluate.look(network, photos, {"fusion": 1.0}, [0, 1], torch.device("cpu"), (0.99, 0.0))
    with torch.no_grad():
        c, d = (photo for photo in data.normalise(torch.from_numpy(photos)[None]))
        encoder = network.encoders[0]
        c, d = network.attentions[0](encoder.stages[0](encoder.stem(c)), encoder.stages[0](encoder.stem(d)))
        expected = network.attentions[1].weights_at(encoder.stages[1](c), encoder.stages[1](d), 0, 7)
    for (found, mark), weights in zip(reads, expected):
        close(found, 64 * weights[0], 1e-5)


@pytest.mark.parametrize("kind", ["clinical", "dermoscopy"])
def test_one_photo_is_answered_by_its_branch(kind, run, release, capsys):
    found = evaluate.main([str(run), f"--{kind}", str(release / "images" / "derm0050.jpg"), "--device", "cpu"])
    assert list(found) == [kind] and f"only the {kind} photo" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["L", "CMYK", "rotated"])
def test_strange_photos_of_one_lesion(mode, run, release, tmp_path):
    with Image.open(release / "images" / "derm0050.jpg") as image:
        if mode == "rotated":
            exif = Image.Exif()
            exif[0x0112] = 6
            image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=exif, quality=95)
        else:
            image.convert(mode).save(tmp_path / "a.jpg", quality=95)
    found = evaluate.main([str(run), "--dermoscopy", str(tmp_path / "a.jpg"), "--device", "cpu"])
    upright = evaluate.main([str(run), "--dermoscopy", str(release / "images" / "derm0050.jpg"), "--device", "cpu"])
    if mode != "L":
        close(found["dermoscopy"], upright["dermoscopy"], 0.05)


def test_a_folder_of_pairs_becomes_a_csv(run, release, tmp_path):
    for kind, folder in (("clinic", "clinical"), ("derm", "dermoscopy")):
        (tmp_path / folder).mkdir()
        for n in range(3):
            shutil.copy(release / "images" / f"{kind}{n:04}.jpg", tmp_path / folder / f"lesion{n}.jpg")
    arguments = [str(run), "--clinical", str(tmp_path / "clinical"), "--dermoscopy", str(tmp_path / "dermoscopy"), "--device", "cpu"]
    evaluate.main(arguments)
    found = evaluate.read_predictions(run / "lesions.csv")
    assert found.cases == ["lesion0", "lesion1", "lesion2"] and found.tasks == SPC and "fused" in found.branches
    (tmp_path / "clinical" / "lesion1.jpg").unlink()
    with pytest.raises(RunError, match="1 photos have no partner of the same name: lesion1"):
        evaluate.main(arguments)


@pytest.mark.parametrize("damage, arguments, says", [
    ("predictions.csv", [], "predictions.csv is missing"),
    ("*", [], "is no finished run; if one was stopped there"),
    ("model.pt", ["--clinical", "x.jpg"], "no model.pt; is it a finished run"),
    ("results.json", ["--clinical", "x.jpg"], "results.json cannot be read"),
    (None, ["--clinical", "x.jpg"], "x.jpg: missing"),
    (None, ["--data", "nowhere"], "no such file or folder"),
    (None, ["--device", "nonsense", "--clinical", "x.jpg"], "--device nonsense"),
], ids=str)
def test_what_is_missing_is_named(damage, arguments, says, run):
    if damage:
        [path.unlink() for path in run.glob(damage)]
    with pytest.raises((RunError, data.DataError), match=says):
        evaluate.main([str(run), *arguments])


def test_damaged_model_is_named(run):
    (run / "model.pt").write_bytes((run / "model.pt").read_bytes()[:1000])
    with pytest.raises(RunError, match="model.pt is damaged"):
        evaluate.main([str(run), "--clinical", "x.jpg"])


def test_flags_that_would_show_nothing_are_refused(run, release):
    photo = str(release / "images" / "derm0050.jpg")
    with pytest.raises(RunError, match="--point shows the attention between two photos"):
        evaluate.main([str(run), "--dermoscopy", photo, "--point", "0.5", "0.5", "--device", "cpu"])
    results = json.loads((run / "results.json").read_text())
    for branch in results["test"].values():
        branch["accuracy"] = {"DIAG": 0.5}
    with pytest.raises(RunError, match="--compare-paper: the figures are of the Seven-Point Checklist"):
        evaluate.print_tables(results, compare=True)


def test_other_tasks_are_refused(run, tmp_path):
    from test_data import make_milk
    with pytest.raises(RunError, match="but .* learned"):
        evaluate.main([str(run), "--data", str(make_milk(tmp_path / "milk")), "--cache", str(tmp_path)])


@pytest.mark.parametrize("arguments", [["--tta"], ["--point", "2", "0", "--clinical", "x.jpg"], []], ids=" ".join)
def test_usage_errors(arguments):
    with pytest.raises(SystemExit):
        evaluate.main(["run", *arguments] if arguments else [])
