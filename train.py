"""Train: the recipe of the PEMM paper (Sec. 4.1) as one loop.

    python train.py                        a demo on drawn lesions, one to two minutes on a laptop
    python train.py --data release_v0      the paper's recipe on the Seven-Point Checklist
    python train.py --resume RUN           goes on with a run that was stopped

Adam, cosine annealing every epoch, augmentation, the biased loss, and stochastic weight averaging
(SWA): from epoch --swa-start on, the weights after each epoch are averaged. The average is what is
saved and evaluated, after its batch-norm statistics have been estimated anew. (The authors' earlier
public code averages too, but tests the last weights.)

A run is a folder: last.pt (to resume), model.pt (the averaged weights, and which lesions they were
trained or chosen by), log.csv, args.json for people, and what evaluate.py writes. A run that is
killed and resumed ends bit-identical on a CPU; a GPU adds numbers in no fixed order.

Shapes: B lesions of a batch, S x S pixels, T tasks, n_t classes of task t.
A network predicts all tasks in each of its branches: PEMM has three, clinical, dermoscopy, fusion.

The method ends with `fit`. What follows saves and resumes a run and reads the flags.
"""

import argparse
import csv
import glob
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import backbones
import data
import evaluate
import model
from loss import PAPER_W, make_criterion
from model import RunError

SAVE_EVERY = 60  # seconds between two saves of last.pt; the last epoch is always saved
STALE_AFTER = 600  # seconds after which a temporary file is that of a killed process

# ------------------------------------------------------------------------ the parts of the recipe


def learning_rate(first, epoch, epochs):
    """Cosine annealing from `first` towards zero, a step an epoch (paper, Sec. 4.1).

    epoch: 0, 1, ..., epochs - 1. The last epoch still has a rate just above zero.
    """
    return first * (1 + math.cos(math.pi * epoch / epochs)) / 2


def shuffled_batches(rows, batch_size):
    """The rows (n,) of lesions, int64 on the CPU, in a new random order and cut into batches.

    Returns a list of tensors (B,). A last batch of a single row joins the one before it, because
    batch norm needs two.
    """
    order = rows[torch.randperm(len(rows))]
    batches = list(order.split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        last = batches.pop()
        batches[-1] = torch.cat((batches[-1], last))
    return batches


def augmented_batches(release, batch_size, device, title):
    """A generator: one pass through the training lesions, in a new order and newly augmented.

    Yields for each batch a dict: photos "clinical" and "dermoscopy" (B, 3, S, S), "labels" (B, T),
    -1 where unknown (a lesion without any label is not in a release that is trained on); for MAT
    "words" (B, m), for CLNet "mask" (B, 1, S, S). The terminal shows `title` meanwhile.
    """
    rows_of_batches = shuffled_batches(release.rows("train"), batch_size)
    for rows in data.progress(rows_of_batches, title):
        # With a random generator make_batch augments; without one it does not.
        yield data.make_batch(release, rows, device, generator=torch.default_generator)


def train_one_epoch(network, batches, criterion, optimizer, autocast):
    """One step of the optimizer for each batch.

    criterion(outputs, batch) -> the loss and, for the log, a dict of each branch's detached loss
    autocast()                a context in which torch calculates in bfloat16, or in float32

    Returns a dict of losses for each batch. They stay on the device: to read one of them here
    (.item()) would make a GPU wait after each batch.
    """
    network.train()
    losses = []
    for batch in batches:
        with autocast():
            outputs = network(batch)  # branch -> T logits (B, n_t); CLNet also has a mask
            loss, branch_losses = criterion(outputs, batch)  # a scalar; branch -> a scalar
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()  # frees the gradients' memory before the next forward pass
        batch_losses = {"loss": loss.detach()}
        for branch, branch_loss in branch_losses.items():
            batch_losses[f"loss_{branch}"] = branch_loss
        losses.append(batch_losses)
    return losses


@torch.no_grad()
def update_average(average, num_before, network):
    """SWA: one more epoch's weights join `average`, the mean over num_before epochs, in place.

    With n weights in the mean, the next one moves it by 1 / (n + 1) of the distance.
    """
    for mean, parameter in zip(average, network.parameters()):
        mean += (parameter - mean) / (num_before + 1)


@torch.no_grad()
def use_average(average, network):
    """The averaged weights replace the last ones. Batch norm's statistics do not fit them yet."""
    for mean, parameter in zip(average, network.parameters()):
        parameter.copy_(mean)


@torch.no_grad()
def update_batch_norm(network, batches, autocast):
    """Estimates the batch-norm statistics of weights that have just been averaged.

    They become the plain mean over the batches of one pass in training mode (only there torch
    updates them). momentum=None is torch's way to ask for the plain mean, and stays: do not train
    this network further.
    """
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):  # of any dimension
            module.reset_running_stats()
            module.momentum = None
    network.train()
    for batch in batches:
        with autocast():
            network(batch)


def validate(network, release, device, amp):
    """On validation: AUC and accuracy of the equally weighted branches, and overlaps with masks.

    These figures are of the network as it is after this epoch. Only evaluate.py, after the
    training, measures the averaged network, and it also looks for better weights of the branches.
    The keys are the same in every epoch.
    """
    rows = release.rows("valid")
    # branch -> probabilities (n, K), K classes of all tasks; name of an overlap -> (n,)
    branches, overlaps = evaluate.predict(network, release, rows, device, amp)
    figures = {}
    for name, values in overlaps.items():  # only CLNet has any
        figures[f"valid_{name}"] = float(values.mean())
    if branches:  # CLNet may have learned the mask alone
        branch_weights = dict.fromkeys(branches, 1 / len(branches))
        probabilities = evaluate.fuse(branches, branch_weights, release.tasks)
        labels = release.labels.cpu()[rows].numpy()
        metrics = evaluate.measure(probabilities, labels, release.tasks)
        for name in ("auc", "accuracy"):
            if f"mean_{name}" in metrics:  # there is no AUC without positives
                figures[f"valid_{name}"] = metrics[f"mean_{name}"]
    return figures


@dataclass
class Checkpoint:
    """How far a run is. save_checkpoint writes it into last.pt, load_checkpoint reads it again."""

    flags: dict
    fingerprint: str  # of the release
    split: list  # of the lesions: "train", "valid", "test" or "" (left out)
    seen_before: dict  # what the run in --weights has learned from: {"ids": [...], "photos": [...]}
    epoch: int = 0  # how many are done
    log: list = field(default_factory=list)  # a dict of figures for each epoch
    average: list = field(default_factory=list)  # of the parameters; empty before --swa-start
    loaded: dict = None  # of a run that goes on: the states of network, optimizer and "random"


def fit(run, checkpoint, release, device):
    """The recipe: trains on a Release and writes into the folder `run`, in the end model.pt."""
    flags = checkpoint.flags
    is_new = checkpoint.loaded is None
    torch.manual_seed(flags["seed"])  # a new run draws its first weights; `restore` sets all anew
    release = release.to(device)
    network, optimizer = build(flags, release, device, is_new)
    if is_new:
        begin_run(run, checkpoint, network, optimizer, device)
    else:
        restore(checkpoint, network, optimizer, device)
    print_start(run, checkpoint, network, release)
    # It shares all weights with `network` and is used only for the steps of training.
    compiled = torch.compile(network, dynamic=False) if flags["compile"] else network
    criterion = make_criterion(flags)  # biased_loss by default
    autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=flags["amp"])
    next_save = time.monotonic() + SAVE_EVERY

    for epoch in range(checkpoint.epoch, flags["epochs"]):
        title = f"epoch {epoch + 1} of {flags['epochs']}"
        start = time.monotonic()
        lr = learning_rate(flags["lr"], epoch, flags["epochs"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        batches = augmented_batches(release, flags["batch_size"], device, title)
        losses = train_one_epoch(compiled, batches, criterion, optimizer, autocast)
        figures = mean_losses(losses, title)
        check_weights(network, title)
        speed = len(release.rows("train")) / (time.monotonic() - start)  # lesions a second

        num_before = (
            epoch + 1 - flags["swa_start"]
        )  # epochs that are in the average already, or < 0
        if num_before == 0:
            checkpoint.average = [torch.zeros_like(parameter) for parameter in network.parameters()]
        if num_before >= 0:
            update_average(checkpoint.average, num_before, network)

        figures.update(validate(network, release, device, flags["amp"]))
        print_epoch(title, figures, speed)
        checkpoint.log.append({"epoch": epoch + 1, "lr": lr, **figures})
        checkpoint.epoch = epoch + 1
        if checkpoint.epoch == flags["epochs"] or time.monotonic() >= next_save:
            save_checkpoint(run, checkpoint, network, optimizer, device)
            next_save = time.monotonic() + SAVE_EVERY

    # From here on `network` is the average: last.pt, which is there to go on, is not saved any
    # more.
    use_average(checkpoint.average, network)
    batches = augmented_batches(release, flags["batch_size"], device, "batch norm of the average")
    update_batch_norm(network, batches, autocast)
    save_model(run, checkpoint, network, release)


# The method ends here.

# ------------------------------------------------------------------ before and inside an epoch


def build(flags, release, device, is_new):
    """The network and the optimizer as a new run begins. A run that goes on has its own weights,
    and so only a new one reads --weights.

    Raises RunError if the release lacks what the network reads or learns.
    """
    num_classes = [len(classes) for classes in release.tasks.values()]
    num_words = len(release.vocabulary)
    network = model.build_model(flags, num_classes, num_words, pretrained=is_new)
    check_entries(network, release)
    network = network.to(device)
    optimizer = torch.optim.Adam(network.parameters(), flags["lr"], fused=True)  # paper, Sec. 4.1
    return network, optimizer


def check_entries(network, release):
    """Raises RunError if the network reads or learns something that the release does not have."""
    present = {"words", *release.views}  # views: the photos and perhaps "mask"
    if release.tasks:
        present.add("labels")
    missing = [name for name in network.inputs + network.targets if name not in present]
    if missing:
        names = " and ".join(missing)
        raise RunError(f"this network needs {names}, which the release does not have")


def mean_losses(losses, title):
    """The mean of each loss over the batches, which count alike. losses: of train_one_epoch."""
    means = {}
    for name in losses[0]:
        values = torch.stack([batch_losses[name] for batch_losses in losses]).cpu()
        if not values.isfinite().all():
            raise not_finite(f"{name} in {title}")
        means[name] = float(values.mean())
    return means


def check_weights(network, title):
    """Raises RunError if a weight is not finite. The epoch's last step may have spoilt it, after
    the last loss was computed.
    """
    for name, value in network.state_dict().items():
        if not value.isfinite().all():
            raise not_finite(f"{name} after {title}")


def not_finite(what):
    """The error, to be raised."""
    advice = "Try a lower --lr or --no-amp, in another --out"
    return RunError(f"{what} is not finite. What was saved before is intact. {advice}")


def print_start(run, checkpoint, network, release):
    counts = " / ".join(str(len(release.rows(split))) for split in data.SPLITS)
    size = f"{model.count_parameters(network):,} parameters, {counts} lesions"
    print(f"{run}: {size}, {checkpoint.flags['epochs']} epochs on {checkpoint.flags['device']}")


def print_epoch(title, figures, speed):
    texts = [f"{name} {value:.3f}" for name, value in figures.items() if name.startswith("valid")]
    line = "  ".join([f"loss {figures['loss']:.3f}"] + texts)
    print(f"{title}  {line}  {speed:.0f} lesions/s", flush=True)


# ------------------------------------------------------------------------------ saving a run


def random_states(device):
    """The states of torch's generators: the CPU's and, if that is another device, its own."""
    states = {"device": device.type, "cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["accelerator"] = torch.cuda.get_rng_state(device)
    elif device.type != "cpu":
        states["accelerator"] = torch.get_device_module(device).get_rng_state()
    return states


def set_random_states(states, device):
    """Puts torch's generators into these states, as far as the kind of device is the same."""
    torch.set_rng_state(states["cpu"])
    if states["device"] != device.type:
        print("the run began on another kind of device: it will not be bit-identical")
        return
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["accelerator"], device)
    elif device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["accelerator"])


def restore(checkpoint, network, optimizer, device):
    """Puts network, optimizer and torch's generators into the states that were loaded."""
    network.load_state_dict(checkpoint.loaded["network"])
    optimizer.load_state_dict(checkpoint.loaded["optimizer"])
    checkpoint.average = [mean.to(device) for mean in checkpoint.average]
    set_random_states(checkpoint.loaded["random"], device)


def atomic_save(path, state):
    try:
        with data.atomic_write(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # inside torch a full disk is a RuntimeError
        raise cannot_write(path, error) from error


def cannot_write(path, error):
    return RunError(f"{path} cannot be written ({error}). What was saved before is intact")


def save_checkpoint(run, checkpoint, network, optimizer, device):
    """Writes log.csv, for people, and last.pt. Who changes a key here adds 1 to model.FORMAT."""
    if checkpoint.log:
        save_log(run / "log.csv", checkpoint.log)
    state = {
        "format": model.FORMAT,
        "flags": checkpoint.flags,
        "fingerprint": checkpoint.fingerprint,
        "split": checkpoint.split,
        "seen_before": checkpoint.seen_before,
        "epoch": checkpoint.epoch,
        "log": checkpoint.log,
        "average": checkpoint.average,
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": random_states(device),
    }
    atomic_save(run / "last.pt", state)


def load_checkpoint(run):
    saved = model.read_run_file(run / "last.pt")
    return Checkpoint(
        flags=saved["flags"],
        fingerprint=saved["fingerprint"],
        split=saved["split"],
        seen_before=saved["seen_before"],
        epoch=saved["epoch"],
        log=saved["log"],
        average=saved["average"],
        loaded={name: saved[name] for name in ("network", "optimizer", "random")},
    )


def save_log(path, log):
    columns = list(log[0])  # all epochs have the same
    try:
        with data.atomic_write(path) as temporary:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(log)
    except OSError as error:
        raise cannot_write(path, error) from error


def save_model(run, checkpoint, network, release):
    """model.pt: the averaged weights, and all that evaluate.py must know of the run.

    A validation lesion counts as seen, because people choose --lr and --epochs by it. Who changes a
    key here adds 1 to model.FORMAT.
    """
    rows = torch.cat((release.rows("train"), release.rows("valid")))
    seen = merge_seen(data.identities(release, rows), checkpoint.seen_before)
    class_counts = {}
    labels = release.labels.cpu()[release.rows("train")]
    for t, (task, classes) in enumerate(release.tasks.items()):
        column = labels[:, t]
        known = column[column >= 0]
        class_counts[task] = known.bincount(minlength=len(classes)).tolist()
    state = {
        "format": model.FORMAT,
        "flags": checkpoint.flags,
        "network": network.state_dict(),
        "main_encoder": network.main_encoder,  # name of the part that --weights RUN takes
        "tasks": release.tasks,
        "vocabulary": release.vocabulary,
        "class_counts": class_counts,
        "seen": seen,
        "fingerprint": release.fingerprint,
    }
    atomic_save(run / "model.pt", state)


def begin_run(run, checkpoint, network, optimizer, device):
    """Makes the run's folder, with args.json and the first last.pt in it: all of it or nothing.

    It is built under a temporary name and then renamed. So a folder with a name that is not
    temporary can always be resumed.
    """
    run = run.resolve()
    temporary = run.with_name(f"{run.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        about = json.dumps(describe_machine(checkpoint.flags), indent=1)
        (temporary / "args.json").write_text(about, encoding="utf-8")
        save_checkpoint(temporary, checkpoint, network, optimizer, device)
        # Fails if another process has begun this run meanwhile: its folder is not empty.
        os.rename(temporary, run)
    except OSError as error:
        raise RunError(f"{run} cannot be begun ({error}): choose another --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # it is gone if all went well
    remove_stale_files(run.parent, run.name)


def describe_machine(flags):
    """For args.json, which people read and no program."""
    about = {"flags": flags, "torch": torch.__version__, "machine": platform.platform()}
    about["threads"] = torch.get_num_threads()
    git = ["git", "describe", "--always", "--dirty"]
    with suppress(OSError):  # without git there is no commit to name
        answer = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True)
        about["commit"] = answer.stdout.strip()
    return about


def remove_stale_files(folder, name):
    """Removes NAME.<8 digits of a uuid>.tmp of a killed process, which nobody writes any more.

    data.atomic_write and begin_run give their temporary files such names.
    """
    digits = "[0-9a-f]" * 8
    for path in folder.glob(f"{glob.escape(name)}.{digits}.tmp"):
        with suppress(OSError):  # another process may remove the same file
            if time.time() - path.stat().st_mtime < STALE_AFTER:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


# ----------------------------------------------------------------------- a new run, an old run


def main(argv=None):
    """Trains and evaluates. Returns what results.json holds.

    Raises RunError, DataError or WeightsError, each with a sentence that says what to do.
    """
    if argv is None:
        argv = sys.argv[1:]
    if any(argument.split("=")[0] == "--resume" for argument in argv):
        run, checkpoint, release, device = resumed_run(argv)
    else:
        run, checkpoint, release, device = new_run(argv)
    try:
        fit(run, checkpoint, release, device)
    except KeyboardInterrupt as stop:
        advice = f"stopped. If {run} is there, go on with: python train.py --resume {run}"
        raise KeyboardInterrupt(advice) from stop
    for name in ("last.pt", "log.csv", "model.pt"):
        remove_stale_files(run, name)
    results = evaluate.evaluate_run(run, release, device)
    evaluate.print_tables(results)
    print(f"\nThe tables again: python evaluate.py {run}")
    return results


def new_run(argv):
    """From the flags: the run's folder, a checkpoint without any epoch, the release, the device."""
    flags = parse_flags(argv)
    device = model.find_device(flags["device"])
    if flags["out"]:
        check_is_free(Path(flags["out"]))  # before anything takes time
    if flags["data"] is None:
        flags["data"] = "runs/synthetic-spc-900"
        if not Path(flags["data"]).exists():
            data.synthesize(Path(flags["data"]), cases=900, height=128)
        print(f"no --data: a demo on drawn lesions in {flags['data']}")
    release = read_release(flags)
    flags["data"] = str(Path(flags["data"]).resolve())  # --resume may be called from elsewhere
    complete_flags(flags, release.kind, device)
    run = Path(flags["out"])
    check_is_free(run)  # again: without --out its name was not known before
    seen_before = seen_by_weights(flags)
    release = leave_out_known(release, seen_before)
    checkpoint = Checkpoint(flags, release.fingerprint, release.split.tolist(), seen_before)
    return run, checkpoint, release, device


def complete_flags(flags, kind, device):
    """Sets in `flags` those that were not given and depend on the data or on the device."""
    flags["device"] = str(device)
    if flags["out"] is None:
        flags["out"] = default_folder(flags, kind)
    if flags["epochs"] is None:
        flags["epochs"] = 250 if kind in ("spc", "synthetic") else 150  # paper, Sec. 4.1
    if flags["swa_start"] is None:
        # Not in the paper. FusionM4Net, its authors' earlier code, starts at 201 of 250.
        flags["swa_start"] = int(0.8 * flags["epochs"]) + 1
    if flags["swa_start"] > flags["epochs"]:
        last = f"the last of {flags['epochs']} epochs"
        raise RunError(f"--swa-start {flags['swa_start']} is after {last}")
    if flags["amp"] is None:
        flags["amp"] = model.has_bfloat16(device)


def check_is_free(run):
    """A run's folder is never written over."""
    if not run.name:  # as that of .
        raise RunError(f"{run} cannot become a run: name a new folder with --out")
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise RunError(
            f"{run} is not empty. To go on with a run: --resume {run}; else choose --out"
        )


def default_folder(flags, kind):
    """runs/<kind of the data>-<model or photo>-<seed>. Variants of a model need an --out each."""
    if kind == "pairs":
        kind = Path(flags["data"]).stem  # of an own CSV file
    method = flags["model"] if flags["modality"] == "both" else flags["modality"]
    return f"runs/{kind}-{method}-{flags['seed']}"


def resumed_run(argv):
    """What new_run returns, of a run that was stopped. All flags but three are the run's own."""
    parser = argparse.ArgumentParser(description="Goes on with a run.", allow_abbrev=False)
    parser.add_argument("--resume", required=True, metavar="RUN", help="its folder")
    parser.add_argument("--data", metavar="PATH", help="where its release is now")
    parser.add_argument("--cache", metavar="DIR", help="folder of the decoded photos")
    parser.add_argument("--device", help="where to go on")
    args = parser.parse_args(argv)
    run = Path(args.resume)
    checkpoint = load_checkpoint(run)
    flags = checkpoint.flags
    began_on = flags["device"]
    for name in ("data", "cache", "device"):
        if getattr(args, name):
            flags[name] = getattr(args, name)
    device = model.find_device(flags["device"])
    flags["device"] = str(device)
    # On another device than before: on the same one an explicit --amp stays as it was asked for.
    if flags["device"] != began_on and flags["amp"] and not model.has_bfloat16(device):
        print(f"{device} has no bfloat16: the run goes on in float32")
        flags["amp"] = False
    release = read_release(flags)
    check_same_release(release, checkpoint, run)
    release = replace(release, split=np.array(checkpoint.split))
    print(f"going on with {run} after epoch {checkpoint.epoch}")
    return run, checkpoint, release, device


def read_release(flags):
    masks = model.needs_masks(flags)
    release = data.read(flags["data"], flags["image_size"], flags["cache"], masks=masks)
    for note in release.notes:
        print(note)
    return release


def check_same_release(release, checkpoint, run):
    """A run goes on with the lesions that it began with; --weights RUN may have left some out."""
    split = np.array(checkpoint.split)
    same = release.fingerprint == checkpoint.fingerprint and len(split) == len(release.split)
    # An empty text in the run's split is a lesion that was left out.
    if not same or not np.all((split == "") | (split == release.split)):
        raise RunError(f"{run} began with other photos, labels or splits: begin a new run")


def seen_by_weights(flags):
    """What the earlier runs in --weights and --clinical-weights have learned from."""
    seen = {"ids": [], "photos": []}
    folders = [flags["weights"]]
    if flags["model"] in READ_BY["clinical_weights"]:
        folders.append(flags["clinical_weights"])
    for folder in folders:
        if model.is_run(folder):
            saved = model.read_run_file(Path(folder) / "model.pt")
            seen = merge_seen(seen, saved["seen"])
    return seen


def merge_seen(one, other):
    merged = {}
    for kind in ("ids", "photos"):
        merged[kind] = sorted(set(one[kind] + other[kind]))
    return merged


def leave_out_known(release, seen):
    """Takes what the encoder has seen before out of the validation and test splits.

    In the training split it may stay: there it only is seen once more.
    """
    known, message = data.find_known(release, seen)
    if message:
        print(f"WARNING: of the lesions that the run in --weights has learned from: {message}")
    split = release.split.copy()
    split[known & (split != "train")] = ""
    for name in ("valid", "test"):
        if not (split == name).any():
            raise RunError(
                f"the encoder has seen every lesion of the {name} split: nothing is left"
            )
    return replace(release, split=split)


# --------------------------------------------------------------------------------- the flags

# Without --data: a demo for a laptop. All other defaults are the paper's recipe.
DEMO = {
    "backbone": "convnext_atto",
    "weights": "none",
    "clinical_weights": "none",
    "image_size": 96,
    "epochs": 10,
    "lr": 5e-4,
}

# A new method is added to MODELS, to the lists in READ_BY and to model.build_model; if it has a
# loss of its own, to loss.make_criterion.
MODELS = ["pemm", "ammfm", "mat", "clnet"]

# Flags that not all networks read, and which do. The network of --modality clinical or dermoscopy
# is in none of the lists, because it reads none of these flags.
READ_BY = {
    "encoder": ["pemm"],
    "fusion": ["pemm"],
    "classifiers": ["pemm"],
    "loss": ["pemm", "ammfm"],
    "w": ["pemm", "ammfm"],
    "clinical_backbone": ["ammfm"],
    "clinical_weights": ["ammfm"],
    "unit": ["mat"],
    "tasks": ["clnet"],
}


def number_in_range(kind, low, high):
    """A type for argparse: an int or float from low to high."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: it goes from {low} to {high}")
        return value

    return number


def add_run_flags(parser):
    add = parser.add_argument
    add("--data", metavar="PATH", help="folder of a release, or a CSV file of your own lesions")
    add("--cache", default="runs/cache", metavar="DIR", help="folder of the decoded photos")
    add("--out", metavar="DIR", help="the run's folder [runs/<data>-<model or photo>-<seed>]")
    add("--resume", metavar="RUN", help="go on with a run; its flags are the run's own")
    add("--device", help="cpu, cuda, cuda:1 or mps [an accelerator if one is here, else cpu]")


def add_network_flags(group):
    add = group.add_argument
    names = list(backbones.BACKBONES)
    image_size = number_in_range(int, 32, 4096)
    photos = ["both", "clinical", "dermoscopy"]
    units = ["none", "sa-sa", "sa-sga", "sga-sa", "sga-sga"]
    weights = "imagenet, none, a state dict's path, or RUN: an earlier run (not in the paper)"
    add("--model", default="pemm", choices=MODELS, help="see model.py")
    add(
        "--backbone", default="swin_v2_t", choices=names, help="paper: Swin Tiny, of V2 by its size"
    )
    add("--weights", default="imagenet", metavar="W", help=weights)
    add("--image-size", default=224, type=image_size, metavar="S", help="paper, Sec. 4.1")
    add("--modality", default="both", choices=photos, help="both photos or one (paper, Table 8)")
    add("--encoder", default="shared", choices=["shared", "separate"], help="paper, Table 5")
    add("--fusion", default="sca", choices=["sca", "ca", "concat"], help="paper, Table 5")
    add("--classifiers", default="separate", choices=["separate", "shared"], help="paper, Table 6")
    add("--clinical-backbone", default="mobilenet_v2", choices=names, help="AMMFM: the light one")
    add("--clinical-weights", default="imagenet", metavar="W", help="AMMFM: as --weights")
    add("--unit", default="sga-sga", choices=units, help="MAT: a row of its Table 1")
    add("--tasks", default="both", choices=["both", "class", "mask"], help="CLNet: what it learns")


def add_training_flags(group):
    add = group.add_argument
    batch_size = number_in_range(int, 2, 10**6)
    count = number_in_range(int, 1, 10**6)
    rate = number_in_range(float, 1e-12, 1e12)
    seed = number_in_range(int, 0, 2**63 - 1)
    w = number_in_range(float, 0, 0.5)
    switch = argparse.BooleanOptionalAction  # makes --no-amp too
    swa_start = "first epoch whose weights are averaged [after 4/5 of them; not in the paper]"
    amp = "calculate in bfloat16, faster [where the hardware has it; not in the paper]"
    add("--loss", default="biased", choices=["biased", "equal"], help="Eq. 3 or Eq. 1")
    add("--w", default=PAPER_W, type=w, help="W of Eq. 3 (paper, Table 7)")
    add("--epochs", type=count, help="[250 on derm7pt and drawn lesions, 150 on others]")
    add("--batch-size", default=24, type=batch_size, metavar="B", help="lesions")
    add("--lr", default=3e-5, type=rate, help="learning rate of the first epoch")
    add("--swa-start", type=count, metavar="EPOCH", help=swa_start)
    add("--seed", default=0, type=seed, help="of first weights, order, augmentation and dropout")
    add("--amp", action=switch, help=amp)
    add("--compile", action="store_true", help="torch.compile: faster on a GPU after minutes")


def parse_flags(argv):
    """The flags of a new run, as a dict."""
    parser = argparse.ArgumentParser(
        description="The recipe of the PEMM paper. Each row of its tables is one command.",
        epilog=f"Defaults are the paper's. Without --data: a demo with {DEMO}.",
        allow_abbrev=False,
    )
    add_run_flags(parser)
    add_network_flags(parser.add_argument_group("the network"))
    add_training_flags(parser.add_argument_group("the training (paper, Sec. 4.1)"))
    flags = vars(parser.parse_args(argv))
    if flags["data"] is None:
        parser.set_defaults(**DEMO)
        # Again, and given flags win. From here on the defaults are the demo's, also for
        # useless_flags.
        flags = vars(parser.parse_args(argv))
    del flags["resume"]  # is there for --help; main has looked for it before
    if flags["modality"] != "both" and flags["model"] != "pemm":
        parser.error(f"--modality {flags['modality']} would not train --model {flags['model']}")
    for name in useless_flags(flags):
        if flags[name] != parser.get_default(name):
            print(f"--{name.replace('_', '-')} has no effect with these flags")
    return flags


def useless_flags(flags):
    """The names of the flags that the network or the loss that is asked for does not read."""
    method = flags["model"]
    if flags["modality"] != "both":
        method = None  # in no list
    names = [name for name, methods in READ_BY.items() if method not in methods]
    if flags["loss"] == "equal" and "w" not in names:
        names.append("w")
    return names


if __name__ == "__main__":
    data.run_main(main, RunError, data.DataError, backbones.WeightsError)
