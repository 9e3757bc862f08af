"""The recipe: SWA, cosine and optimiser against torch's own; runs that are stopped and go on; failures that speak."""
import copy
import csv
import dataclasses
import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import backbones
import data
import evaluate
import model
import train
from conftest import TINY, close, randomise
from test_data import write
from train import RunError

@pytest.fixture
def tiny(pairs, tmp_path):
    """Trains in a folder of that name; more flags override TINY."""
    def run(name, *flags):
        return train.main(["--data", str(pairs), "--cache", str(tmp_path / "cache"), *TINY, *flags, "--out",
                           str(tmp_path / name)])
    return run

def log_of(run):
    with open(run / "log.csv", newline="") as file:
        return list(csv.DictReader(file))

def assert_same_run(one, other):
    """Weights, average, log, predictions and results, to the bit."""
    for name in ("log.csv", "predictions.csv", "results.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    a, b = (torch.load(run / "model.pt", weights_only=True)["network"] for run in (one, other))
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), f"{key}: largest difference {(a[key] - b[key]).abs().max():.1e}"

# ---------------------------------------------------------------------------------------------- the parts of the recipe

def test_average_in_is_torchs_averaged_model():
    network = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
    theirs, ours = torch.optim.swa_utils.AveragedModel(network), [torch.zeros_like(p) for p in network.parameters()]
    for step in range(50):
        randomise(network, seed=step, spread=1.0)
        theirs.update_parameters(network)
        train.average_in(ours, step, network)
    for mean, expected in zip(ours, theirs.module.parameters()):
        close(mean, expected, 1e-14)

class OneInput(nn.Module):
    """A network of two photos for torch's update_bn, which feeds a single tensor."""
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, pair):
        return self.network(*pair)

def test_re_estimate_is_torchs_update_bn():
    network = randomise(model.PEMM("convnext_mini", (3, 2))).double()
    twin = copy.deepcopy(network)
    pairs = [torch.randn(2, 4, 3, 32, 32, dtype=torch.float64) for _ in range(5)]
    feed = [({"clinical": clinical, "dermoscopy": dermoscopy}, None) for clinical, dermoscopy in pairs]
    torch.manual_seed(0)  # dropout and drop-path
    torch.optim.swa_utils.update_bn(pairs, OneInput(twin))
    torch.manual_seed(0)
    train.re_estimate(network, feed)
    found, expected = network.state_dict(), twin.state_dict()
    norms = [key for key in found if "running" in key]
    assert len(norms) == 3 * 2 * 2  # three classifiers, two norms each, mean and variance
    for key in norms:
        close(found[key], expected[key], 1e-12)

def test_swa_of_a_run_is_torchs(tiny, monkeypatch, tmp_path):
    """On a whole run: model.pt is AveragedModel's average of the epochs from --swa-start on, after update_bn."""
    twins, average_in, re_estimate = [], train.average_in, train.re_estimate
    def average_both(average, count, network):
        if not twins:
            twins.append(torch.optim.swa_utils.AveragedModel(network))
        twins[0].update_parameters(network)
        average_in(average, count, network)
    def estimate_both(network, feed, autocast):
        feed = list(feed)
        state = torch.get_rng_state()
        torch.optim.swa_utils.update_bn([torch.stack([inputs["clinical"], inputs["dermoscopy"]]) for inputs, _ in feed],
                                        OneInput(twins[0].module))
        torch.set_rng_state(state)
        re_estimate(network, feed, autocast)
    monkeypatch.setattr(train, "average_in", average_both)
    monkeypatch.setattr(train, "re_estimate", estimate_both)
    tiny("run", "--no-amp")
    found = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["network"]
    assert int(twins[0].n_averaged) == 2  # epochs 2 and 3
    assert found["fusion_classifier.body.1.num_batches_tracked"] == 2  # of the last pass through the training lesions
    for key, expected in twins[0].module.state_dict().items():
        if "num_batches" not in key:
            close(found[key], expected, 1e-5)
    last = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["network"]
    assert not torch.equal(last["encoders.0.norm.weight"],
                           found["encoders.0.norm.weight"]), "the average was not swapped in"

def test_cosine_is_torchs_stepped_every_epoch():
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], 3e-5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 250)
    for epoch in range(250):
        close(train.learning_rate({"lr": 3e-5, "epochs": 250}, epoch), optimizer.param_groups[0]["lr"], 1e-9)
        optimizer.step()
        scheduler.step()

@pytest.mark.parametrize("n, size, parts", [(48, 24, [24, 24]), (49, 24, [24, 25]), (50, 24, [24, 24, 2]), (5, 24,
                                                                                                            [5]),
                                                                                                            (3, 2,
                                                                                                             [3])])
def test_no_batch_is_a_single_pair(n, size, parts):
    order = torch.randperm(n)
    found = train.batches(order, size)
    assert [len(part) for part in found] == parts and torch.equal(torch.cat(found), order)

def test_defaults_are_the_papers():
    flags, given = train.parse(["--data", "release_v0"])
    assert given == {"data": "release_v0"}
    expected = {"backbone": "swin_v2_t", "weights": "imagenet", "image_size": 224, "batch_size": 24, "lr": 3e-5,
                "w": 0.1,
                "loss": "biased", "encoder": "shared", "fusion": "sca", "classifiers": "separate", "modality": "both"}
    assert {name: flags[name] for name in expected} == expected
    demo, given = train.parse(["--epochs", "4"])
    assert demo["epochs"] == 4 and demo["backbone"] == "convnext_atto" and demo["batch_size"] == 24
    assert given == {"epochs": 4}

@pytest.mark.parametrize("kind, epochs, swa_start", [("spc", 250, 201), ("isic", 150, 121)])
def test_epochs_are_the_papers(kind, epochs, swa_start, pairs, tmp_path, monkeypatch):
    def fit(run, flags, release, device, state):
        assert (flags["epochs"], flags["swa_start"]) == (epochs, swa_start)
        raise RunError("far enough")
    read = data.read
    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(data, "read", lambda *arguments, **options: dataclasses.replace(read(*arguments, **options),
                                                                                        kind=kind))
    with pytest.raises(RunError, match="far enough"):
        train.main(["--data", str(pairs), "--cache", str(tmp_path), "--image-size", "32"])

# ----------------------------------------------------------------------------------------------------------- whole runs

def test_a_run_is_complete_repeatable_and_seeded(finished, tiny, tmp_path):
    names = {path.name for path in finished.iterdir() if path.suffix != ".png"}
    assert names == {"args.json", "log.csv", "last.pt", "model.pt", "predictions.csv", "results.json"}
    saved = json.loads((finished / "args.json").read_text())
    assert saved["flags"]["swa_start"] == 2 and saved["torch"] == torch.__version__
    rows = log_of(finished)
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:  # Eq. 3
        parts = [float(row[f"loss_{branch}"]) for branch in ("clinical", "dermoscopy", "fusion")]
        close(float(row["loss"]), 0.1 * parts[0] + 0.4 * parts[1] + 0.5 * parts[2], 1e-5)
    state = torch.load(finished / "last.pt", weights_only=True)
    group = state["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0 and group["betas"] == (0.9,
                                                             0.999) and group["eps"] == 1e-8 and not group["amsgrad"]
    # The saved flags as a command: the same run.
    flags = []
    for name, value in saved["flags"].items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        elif value is not None and name != "out":
            flags += [flag, str(value)]
    assert train.main([*flags, "--out", str(tmp_path / "again")]) == json.loads((finished / "results.json").read_text())
    assert_same_run(finished, tmp_path / "again")
    tiny("other", "--seed", "1", "--epochs", "1", "--swa-start", "1")
    first = [(run / "log.csv").read_text().splitlines()[1] for run in (finished, tmp_path / "again",
                                                                       tmp_path / "other")]
    assert first[0] == first[1] != first[2] and first[0].split(",")[:2] == first[2].split(",")[:2]  # one epoch, one lr

def test_stopped_it_ends_in_the_same_bits(finished, tiny, monkeypatch, tmp_path):
    """Ctrl-C in the second and in the third epoch, before a checkpoint and instead of it; the run goes on each time."""
    stops = iter([0, 0, 0, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0,
                  0])  # at each save and validation, of which a save is the first
    def stop(function):
        def stopping(*arguments):
            if next(stops):
                raise KeyboardInterrupt
            return function(*arguments)
        return stopping
    monkeypatch.setattr(train, "validation", stop(train.validation))
    monkeypatch.setattr(train, "save", stop(train.save))
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        tiny("parts")
    for again in range(3):
        with pytest.raises(KeyboardInterrupt):
            train.main(["--resume", str(tmp_path / "parts")])
    train.main(["--resume", str(tmp_path / "parts")])
    assert_same_run(finished, tmp_path / "parts")

def test_killed_it_ends_in_the_same_bits(finished, pairs, tmp_path):
    """kill -9 at a moment that nobody chose."""
    program = "import conftest, runpy; runpy.run_module('train', run_name='__main__')"  # which has the small backbone
    flags = ["--data", str(pairs), "--cache", str(tmp_path), *TINY, "--out", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", program, *flags], stdout=subprocess.DEVNULL,
                          env=environment) as process:
        while not (tmp_path / "run" / "last.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(torch.rand(()).item() / 4)
        process.kill()
    train.main(["--resume", str(tmp_path / "run")])
    assert_same_run(finished, tmp_path / "run")

def test_a_finished_run_resumed_stays_as_it_is_and_refuses_other_flags(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "args.json").unlink()  # is for people
    asked = []
    monkeypatch.setattr(train.model, "find_device", lambda name: asked.append(name) or torch.device("cpu"))
    train.main(["--resume", str(tmp_path / "run"), "--epochs", "3"])
    assert_same_run(finished, tmp_path / "run")
    assert asked == ["cpu"], "not the device it began with"
    with pytest.raises(RunError, match="began with epochs 3, not 9"):
        train.main(["--resume", str(tmp_path / "run"), "--epochs", "9"])

def test_a_run_does_not_go_on_with_other_data(finished, pairs, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    changed = pairs.with_name("changed.csv")
    changed.write_text(pairs.read_text().replace("present", "absent", 1))
    with pytest.raises(RunError, match="is not what .* began with"):
        train.main(["--resume", str(tmp_path / "run"), "--data", str(changed)])

def test_a_start_that_failed_leaves_the_folder_free(tiny, tmp_path):
    with pytest.raises(backbones.WeightsError):
        tiny("run", "--weights", str(tmp_path / "nowhere.pth"))
    tiny("run", "--epochs", "1", "--swa-start", "1")

def test_a_run_is_never_begun_anew(finished, pairs, tmp_path):
    """Also without args.json, and with model.pt alone: another seed would go on from the old weights."""
    for kept in ("last.pt", "model.pt"):
        (tmp_path / kept).mkdir()
        shutil.copy(finished / kept, tmp_path / kept)
        before = (tmp_path / kept / kept).read_bytes()
        with pytest.raises(RunError, match="holds a run. Go on with it: --resume"):
            train.main(["--data", str(pairs), *TINY, "--seed", "5", "--cache", str(tmp_path), "--out",
                        str(tmp_path / kept)])
        assert (tmp_path / kept / kept).read_bytes() == before

def test_resuming_a_run_that_still_runs_harms_neither(finished, tiny, monkeypatch, tmp_path):
    """Another one goes on with the run while this one is writing its last checkpoint."""
    save, others = torch.save, iter([True])
    def saving(state, path):
        save(state, path)
        if state.get("epoch") == 3 and next(others, False):
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: 1)
                random = torch.get_rng_state()
                train.main(["--resume", str(tmp_path / "run")])
                torch.set_rng_state(random)
    monkeypatch.setattr(torch, "save", saving)
    tiny("run")
    assert_same_run(finished, tmp_path / "run")

def test_damaged_checkpoint_is_named(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "last.pt").write_bytes(b"")
    with pytest.raises(RunError, match="last.pt: missing or damaged"):
        train.main(["--resume", str(tmp_path / "run")])

def test_default_folders_tell_the_rows_of_the_tables_apart(pairs, tmp_path, monkeypatch):
    names = []
    def fit(run, *arguments):
        names.append(run.name)
        raise RunError("far enough")
    monkeypatch.setattr(train, "fit", fit)
    common = ["--data", str(pairs), "--cache", str(tmp_path), "--image-size", "32"]
    for flags in ([], ["--fusion", "ca"], ["--w", "0.3"], ["--lr", "0.001", "--seed", "7"]):
        with pytest.raises(RunError):
            train.main(common + flags)
    assert names == [f"pairs-image_size-32{middle}" for middle in ("-0", "-fusion-ca-0", "-w-0.3-0", "-lr-0.001-7")]

@pytest.mark.parametrize("flags", [
    ["--modality", "clinical"], ["--encoder", "separate", "--fusion", "ca", "--classifiers", "shared", "--loss",
                                 "equal",
                                 "--reading", "swapped"]], ids=" ".join)
def test_every_switch_of_the_tables_runs(flags, tiny):
    found = tiny("run", "--epochs", "1", "--swa-start", "1", *flags)
    branches = ["clinical", "dermoscopy", "fusion", "equal", "weighted"]
    if "clinical" in flags:
        branches = ["clinical"]
    assert list(found["test"]) == branches and 0 <= found["test"][branches[0]]["mean_auc"] <= 1

def test_clnet_needs_masks_only_to_learn_them(tiny, pairs):
    unmasked = pairs.with_name("unmasked.csv")
    unmasked.write_text(pairs.read_text().replace("mask", "fitzpatrick_skin_type", 1))
    flags = ["--data", str(unmasked), "--model", "clnet", "--epochs", "1", "--swa-start", "1"]
    assert list(tiny("class", *flags, "--tasks", "class")["test"]) == ["dermoscopy"]
    with pytest.raises(RunError, match="needs dermoscopy and mask"):
        tiny("both", *flags)

def test_a_validation_split_of_one_class_has_no_auc(tiny, pairs):
    rows = pairs.read_text().splitlines()
    one = [",".join([*row.split(",")[:-2], "nevus", "absent"]) if ",valid," in row else row for row in rows]
    pairs.with_name("one.csv").write_text("\n".join(one))
    assert tiny("run", "--data", str(pairs.with_name("one.csv")), "--epochs", "1", "--swa-start", "1")["test"]

def two_classes():
    """Lesions of two classes, at random, 40 / 12 / 12: number, class, split, and the class exchanged in training."""
    classes = np.random.default_rng(0).integers(0, 2, 64)
    split = np.repeat(data.SPLITS, (40, 12, 12))
    return zip(range(64), classes, split, np.where(split == "train", 1 - classes, classes))

def test_exchanged_labels_of_training_show_in_the_test_split(tiny, tmp_path):
    """A lesion's brightness is its class. With the two classes of the training split exchanged, every answer is wrong;
    a loop that mixed labels and photos, or splits, would end near 0.5."""
    rows = []
    for n, bright, split, label in two_classes():
        for kind in "cd":
            noise = np.random.default_rng([n, ord(kind)]).integers(0, 60, (32, 32, 3), np.uint8)
            photo = noise + np.uint8(120 * bright)
            Image.fromarray(photo).save(tmp_path / f"{kind}{n}.png")
        rows.append((f"c{n}.png", f"d{n}.png", "ab"[label], split))
    write(tmp_path / "pairs.csv", ["clinical", "dermoscopy", "lesion", "split"], rows)
    found = tiny("run", "--data", str(tmp_path / "pairs.csv"), "--lr", "3e-3")
    assert found["test"]["weighted"]["mean_auc"] < 0.05
    assert float(log_of(tmp_path / "run")[-1]["loss"]) < 0.4, "the photos did not tell the class"

# -------------------------------------------------------------------------------------------------- failures that speak

def test_a_loss_that_is_not_finite_ends_the_run(tiny):
    with pytest.raises(RunError,
                       match=r"the loss of epoch \d, batch \d is not finite.*saved before is intact.*lower --lr"):
        tiny("run", "--lr", "1e9", "--no-amp")

@pytest.mark.parametrize("full_from", [0, 1])
def test_a_full_disk_keeps_the_last_checkpoint(full_from, finished, tiny, monkeypatch, tmp_path):
    saved = []
    def full(state, path):
        if len(saved) == full_from:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(torch_save(state, path))
    torch_save = torch.save
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RunError, match=r"\.pt cannot be written.*No space left.*is intact"):
        tiny("run")
    monkeypatch.setattr(torch, "save", torch_save)
    assert not list((tmp_path / "run").glob("*.tmp"))
    if full_from == 0:
        tiny("run")  # nothing was saved: the folder is free
    else:
        train.main(["--resume", str(tmp_path / "run")])
    assert_same_run(finished, tmp_path / "run")

@pytest.mark.parametrize("flags, says", [
    (["--device", "nonsense"], "--device nonsense: "),
    (["--resume", "nowhere"], "nowhere: no last.pt"),
    (["--swa-start", "5"], "--swa-start 5 is after the last of 3 epochs"),
], ids=["device", "resume", "SWA"])
def test_wrong_flags_are_one_sentence(flags, says, pairs, tmp_path):
    arguments = [*TINY, "--data", str(pairs), "--cache", str(tmp_path), *flags]
    if "--resume" in flags:
        arguments = flags
    with pytest.raises(RunError, match=says):
        train.main(arguments)

@pytest.mark.parametrize("flags", [["--w", "0.6"], ["--batch-size", "1"], ["--epochs", "0"], ["--image-size", "8"],
                                   ["--fusion", "none"], ["--epoch", "x"], ["--loss", "equal", "--w", "0.3"],
                                   ["--modality", "clinical", "--fusion", "ca"]], ids=" ".join)
def test_flags_out_of_range_are_usage_errors(flags, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(flags)
    assert end.value.code == 2 and "error:" in capsys.readouterr().err

def test_a_flag_of_the_run_that_goes_on_may_be_repeated():
    """Whether it changes something depends on the run's --model, which is not given again."""
    assert train.parse(["--resume", "RUN", "--unit", "sa-sa"])[1] == {"resume": "RUN", "unit": "sa-sa"}

def test_the_program_ends_with_one_sentence(pairs, tmp_path, capsys):
    arguments = ["--data", str(pairs), "--cache", str(tmp_path), *TINY, "--out", "/dev/null/run"]
    with pytest.raises(SystemExit) as end:
        data.speak(lambda: train.main(arguments), RunError, data.DataError, backbones.WeightsError)
    assert end.value.code == 2 and "/dev/null/run" in capsys.readouterr().err

def test_ctrl_c_ends_with_one_sentence(monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt("stopped. Go on with: python train.py --resume RUN")
    with pytest.raises(SystemExit) as end:
        data.speak(stop)
    assert end.value.code == 130 and "Go on with" in capsys.readouterr().err

def test_lesions_that_were_left_out_do_not_shift_the_others(release, tiny, tmp_path):
    """A lesion in no split lies between those of the run; predicted again, each still has its own photos."""
    folder = shutil.copytree(release, tmp_path / "partial")
    table = folder / "meta" / "valid_indexes.csv"
    table.write_text(table.read_text().replace("25\n", "", 1))
    tiny("run", "--data", str(folder), "--epochs", "1", "--swa-start", "1", "--modality", "dermoscopy")
    before = (tmp_path / "run" / "predictions.csv").read_bytes()
    evaluate.main([str(tmp_path / "run"), "--data", str(folder), "--cache", str(tmp_path / "cache"), "--device", "cpu"])
    assert (tmp_path / "run" / "predictions.csv").read_bytes() == before and not (tmp_path / "run" / "partial").exists()

# ---------------------------------------------------------------------------------------------- the relatives of PEMM

RELATIVES = {
    "AMMFM": ["--model", "ammfm", "--clinical-backbone", "convnext_mini", "--clinical-weights", "none"],
    "MAT": ["--model", "mat"],
    "CLNet": ["--model", "clnet"],
    "CLNet, mask alone": ["--model", "clnet", "--tasks", "mask"]}

@pytest.fixture(autouse=True)
def small_transformer(monkeypatch):
    monkeypatch.setattr(model, "MAT", functools.partial(model.MAT, width=64))

@pytest.mark.parametrize("name", RELATIVES)
def test_the_relatives_are_stopped_resumed_evaluated_asked_and_meet_new_lesions(name, pairs, tiny, monkeypatch,
                                                                                tmp_path, capsys):
    short = ["--epochs", "2", *RELATIVES[name]]
    expected = tiny("whole", *short)
    stops = iter([False, True])  # after the second epoch, before it is saved
    validation = train.validation
    def stopping(*arguments):
        if next(stops, False):
            raise KeyboardInterrupt
        return validation(*arguments)
    monkeypatch.setattr(train, "validation", stopping)
    with pytest.raises(KeyboardInterrupt):
        tiny("parts", *short)
    train.main(["--resume", str(tmp_path / "parts")])
    assert_same_run(tmp_path / "whole", tmp_path / "parts")

    run, images = tmp_path / "whole", pairs.parent / "spc" / "images"
    assert evaluate.main([str(run)]) == expected
    photos = ["--clinical", str(images / "clinic0050.jpg"), "--dermoscopy", str(images / "derm0050.jpg")]
    answer = evaluate.main([str(run), *photos, "--about", "sex=female", "--device", "cpu"])
    assert (run / "lesion-clinic0050.png").exists() or (run / "lesion-derm0050.png").exists()
    assert all(abs(sum(classes.values()) - 1) < 1e-5 for classes in answer.values())
    assert len(answer) == (0 if "mask" in RELATIVES[name] else 2)

    files = sorted(run.glob("*.*"))
    before = [file.read_bytes() for file in files]
    capsys.readouterr()
    evaluate.main([str(run), "--data", str(pairs.with_name("new.csv")), "--cache", str(tmp_path / "cache"), "--device",
                   "cpu"])
    assert "0 by photo" in capsys.readouterr().out and (run / "new" / "results.json").exists()
    assert [file.read_bytes() for file in files] == before

def test_words_belong_to_their_lesion(tiny, tmp_path):
    """A lesion's class is its word, photos are alike. With the words of training exchanged all answers are wrong."""
    rows = []
    for n, label, split, word in two_classes():
        noise = np.random.default_rng(n).integers(100, 110, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{n}.png")
        rows.append((f"{n}.png", "ab"[label], split, ("female", "male")[word]))
    write(tmp_path / "words.csv", ["dermoscopy", "lesion", "split", "sex"], rows)
    found = tiny("run", "--data", str(tmp_path / "words.csv"), "--model", "mat", "--lr", "3e-3")
    assert found["test"]["fusion"]["mean_auc"] < 0.05
    last = log_of(tmp_path / "run")[-1]
    assert float(last["loss"]) < 0.4, "the words did not tell the class"
    assert float(last["valid_auc"]) < 0.05
    vocabulary = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["vocabulary"]
    assert vocabulary == ["", "begin", "sex female", "sex male"]
    words = data.as_words({"sex": ["male", "unheard of", ""]}, vocabulary, 3)
    assert words.tolist() == [[1, 3], [1, 0], [1, 0]]
