"""Train: the recipe of the PEMM paper (Sec. 4.1) as one loop.

    python train.py                        a demo: draws synthetic lesions, trains a small network, prints the tables
    python train.py --data release_v0      the paper's recipe on the Seven-Point Checklist
    python train.py --resume RUN           goes on with a run that was stopped, and ends in the same bits

Adam, cosine annealing every epoch, augmentation, the biased loss and stochastic weight averaging (SWA): from --swa-start on,
the weights at the end of each epoch are averaged; batch-norm statistics are then re-estimated for the average, and that is
the model which is saved and evaluated. (The authors' earlier public code averages too, but tests the last weights.)

A run's folder holds args.json, log.csv, last.pt (what --resume needs), model.pt, predictions.csv and results.json. Each file
appears whole or not at all. One seed gives the same bits again on the same machine; another processor, number of threads
or version of torch rounds differently, and on a GPU some kernels add in no fixed order.
"""
import argparse
import contextlib
import csv
import io
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision

import backbones
import data
import evaluate
import model
from evaluate import RunError
from loss import PAPER_W, biased_loss, equal_loss

# What a flag is when it is not given: (without --data, a demo for a laptop | with --data, the paper's recipe).
DEFAULTS = {
    "backbone": ("convnext_atto", "swin_v2_t"),  # paper: "SwinTransformer (Tiny)"; its parameter counts say V2
    "weights": ("none", "imagenet"),  # ours: the paper does not say; 413 pairs and lr 3e-5 leave little else
    "image_size": (96, 224),  # paper, Sec. 4.1
    "modality": ("both", "both"),
    "encoder": ("shared", "shared"),  # paper, Sec. 3.1
    "fusion": ("sca", "sca"),  # paper, Sec. 3.2
    "classifiers": ("separate", "separate"),  # paper, Table 6
    "reading": ("cross", "cross"),  # ours: the field's meaning of cross-attention, see shared_attention.py
    "loss": ("biased", "biased"),  # paper, Sec. 3.3
    "w": (PAPER_W, PAPER_W),  # paper, Sec. 4.1
    "epochs": (10, None),  # paper, Sec. 4.1: 250 on SPC, 150 on the ISIC pairs (and, ours, on all that is not SPC)
    "batch_size": (24, 24),  # paper, Sec. 4.1
    "lr": (1e-3, 3e-5),  # paper, Sec. 4.1
    "swa_start": (None, None),  # ours: after 4/5 of the epochs, as in FusionM4Net's code (201 of 250); the paper does not say
    "seed": (0, 0),
    "binary": (False, False),
    "cache": ("runs/cache", "runs/cache"),
    "device": (None, None),  # ours: cuda, else mps, else cpu
    "amp": (None, None),  # ours: bfloat16 where the hardware computes in it
    "compile": (False, False),  # ours: it takes a minute to begin, so it pays on a GPU and in long runs
}
DEMO = {"cases": 900, "height": 128}  # ours: drawn in 5 s, trained in about 40 s
MODEL_AND_LOSS = ("modality", "encoder", "fusion", "classifiers", "reading", "loss", "w")  # in a default folder's name if given


def parse(argv):
    """The flags that were given, as a dict."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="Each row of Tables 3 to 9 is one command; the "
                                     "README lists them. Defaults: without --data | with --data.")

    def add(group, flag, text, **options):
        if (name := flag[2:].replace("-", "_")) in DEFAULTS:
            demo, paper = ("auto" if value is None else value for value in DEFAULTS[name])
            text += f" [{demo}]" if demo == paper else f" [{demo} | {paper}]"
        group.add_argument(flag, help=text, default=None, **options)

    switch = {"action": argparse.BooleanOptionalAction}
    group = parser.add_argument_group("data")
    add(group, "--data", "folder of a release, or CSV file of your own pairs; what it is is found from its contents", metavar="PATH")
    add(group, "--binary", "MILK10k: benign or malignant in place of the 11 classes", **switch)
    add(group, "--cache", "folder of the decoded photos", metavar="DIR")
    group = parser.add_argument_group("model")
    add(group, "--backbone", "the encoder", choices=list(backbones.BACKBONES))
    add(group, "--weights", "its first weights: imagenet, none or a state dict in torchvision's format", metavar="W")
    add(group, "--image-size", "side of the photos, in pixels", type=int, metavar="S")
    add(group, "--modality", "one photo or the pair (Table 8)", choices=["both", "clinical", "dermoscopy"])
    add(group, "--encoder", "one for both modalities or one each (Table 5)", choices=["shared", "separate"])
    add(group, "--fusion", "attention between them: shared, one each or none (Table 5)", choices=["sca", "ca", "concat"])
    add(group, "--classifiers", "clinical and dermoscopy: one each or shared (Table 6)", choices=["separate", "shared"])
    add(group, "--reading", "what crosses in cross-attention", choices=["cross", "swapped"])
    group = parser.add_argument_group("training")
    add(group, "--loss", "Eq. 3 or Eq. 1", choices=["biased", "equal"])
    add(group, "--w", "W of Eq. 3, the weight of the clinical branch, 0 to 0.5 (Table 7)", type=float)
    add(group, "--epochs", "auto is 250 on the Seven-Point Checklist, 150 on other releases", type=int)
    add(group, "--batch-size", "pairs in a batch", type=int, metavar="B")
    add(group, "--lr", "first learning rate", type=float)
    add(group, "--swa-start", "first epoch, from 1, whose weights are averaged", type=int, metavar="EPOCH")
    add(group, "--seed", "of everything that is drawn: weights, order, augmentation, dropout", type=int)
    group = parser.add_argument_group("run")
    add(group, "--out", "the run's folder [runs/<kind of data>-<backbone>-<flags of model and loss>-<seed>]", metavar="DIR")
    add(group, "--resume", "go on with the run in this folder, with the flags it began with", metavar="RUN")
    add(group, "--device", "cpu, cuda, cuda:1 or mps")
    add(group, "--amp", "bfloat16 autocast", **switch)
    add(group, "--compile", "torch.compile", **switch)
    given = {flag: value for flag, value in vars(parser.parse_args(argv)).items() if value is not None}
    for flag, low, high in (("image_size", 32, 4096), ("epochs", 1, math.inf), ("batch_size", 2, math.inf), ("lr", 0, math.inf),
                            ("w", 0, 0.5), ("swa_start", 1, given.get("epochs", math.inf)), ("seed", 0, 2 ** 63 - 1)):
        if not low <= given.get(flag, low) <= high:
            parser.error(f"--{flag.replace('_', '-')} {given[flag]}: it goes from {low} to {high}"
                         + ("; batch norm needs two pairs" if flag == "batch_size" else ""))
    idle = ([flag for flag in MODEL_AND_LOSS if flag != "modality"] if given.get("modality", "both") != "both" else
            ["w"] * (given.get("loss") == "equal") + ["reading"] * (given.get("fusion") == "concat"))
    for flag in idle:
        if given.get(flag, DEFAULTS[flag][0]) != DEFAULTS[flag][0]:
            parser.error(f"--{flag} {given[flag]} would change nothing beside the other flags")
    return given


def settle(given):
    """All flags, the run's folder and the fingerprint of its data: those of args.json for --resume; else the given flags and
    the defaults, the folder if given, and None."""
    if "resume" in given:
        run = Path(given["resume"])
        try:
            saved = json.loads((run / "args.json").read_text())
            flags, fingerprint = saved["flags"], saved["release"]
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"{run}: no run to go on with ({error})") from error
        moved = {flag: given[flag] for flag in ("data", "cache", "device") if flag in given}
        if changed := [f"--{flag} {value} (it began with {flags.get(flag)})" for flag, value in given.items()
                       if flag not in ("resume", *moved) and flags.get(flag) != value]:
            raise RunError(f"{run} cannot go on with other flags: {', '.join(changed)}. The result would be that of neither "
                           "run (the cosine depends on --epochs); begin a new run with --out")
        return flags | moved, run, fingerprint
    flags = {"data": None} | {flag: values["data" in given] for flag, values in DEFAULTS.items()} | given
    return flags, Path(flags.pop("out")) if "out" in flags else None, None


def complete(flags, release, device):
    """Decides the flags that depend on the data or the machine, and checks them."""
    if flags["amp"] is None:
        flags["amp"] = has_bfloat16(device)
    flags["epochs"] = flags["epochs"] or (250 if release.kind in ("spc", "synthetic") else 150)
    flags["swa_start"] = flags["swa_start"] or int(0.8 * flags["epochs"]) + 1
    if flags["swa_start"] > flags["epochs"]:
        raise RunError(f"--swa-start {flags['swa_start']} is after the last of {flags['epochs']} epochs; there would be no weights")
    return flags


def has_bfloat16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}  # {} in a torch that cannot tell
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def learning_rate(flags, epoch):
    """Cosine annealing to zero, one step an epoch (paper, Sec. 4.1); epochs count from 0."""
    return flags["lr"] * (1 + math.cos(math.pi * epoch / flags["epochs"])) / 2


def batches(order, size):
    """Parts of `size` rows; a last part of a single row joins the one before it, because batch norm needs two."""
    parts = list(order.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def average_in(average, count, network):
    """SWA by hand: the running mean of the weights after one more epoch, mean += (weights - mean) / (count + 1)."""
    for mean, weight in zip(average, network.parameters()):
        mean.lerp_(weight.detach(), 1 / (count + 1))


@torch.no_grad()
def re_estimate(network, feed, autocast):
    """Batch-norm statistics of the average: the plain mean over one pass through the training pairs, in training mode."""
    norms = [module for module in network.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's way to say: cumulative average
    network.train()
    for clinical, dermoscopy, _ in feed:
        with autocast():
            network(clinical, dermoscopy)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def save(path, state):
    """torch.save that appears whole or not at all."""
    try:
        with data.whole(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError inside torch's writer
        raise RunError(f"{path} cannot be written ({error}); the one before it is intact. Make room and go on with "
                       f"--resume {path.parent}") from error


def random_state(device):
    """The states of torch's generators: the CPU's and, if that is another, the device's."""
    on_device = [] if device.type == "cpu" else [torch.get_device_module(device).get_rng_state()]
    return [torch.get_rng_state(), *on_device]


def set_random_state(states, device):
    torch.set_rng_state(states[0].cpu())
    for state in states[1:] if device.type != "cpu" else ():  # a run may move from one device to another
        torch.get_device_module(device).set_rng_state(state.cpu())


def about():
    """What the numbers of a run depend on besides its flags."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    commit = git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "") if shutil.which("git") else ""
    return {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
            "numpy": np.__version__, "machine": platform.platform(), "threads": torch.get_num_threads(), "commit": commit}


def write_log(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    evaluate.write_whole(path, text.getvalue())


def main(argv=None):
    """Train and evaluate; returns the results that results.json holds. Raises RunError, data.DataError, WeightsError."""
    given = parse(argv)
    flags, run, begun_with = settle(given)
    device = evaluate.find_device(flags["device"])
    if flags["data"] is None:
        path = data.synthesize(f"runs/synthetic-spc-{DEMO['cases']}", **DEMO)
        print(f"no --data: a demo on the synthetic SPC in {path}")
    else:
        path = flags["data"]
    release = data.read(path, flags["binary"])
    for note in release.notes:
        print(note)
    if "resume" in given:
        if begun_with != release.fingerprint():
            raise RunError(f"{path} is not what {run} began with: its photos, labels or split are others. Begin a new run with --out")
        for unfinished in run.glob("*.tmp"):  # what a killed run was writing
            unfinished.unlink()
    else:
        complete(flags, release, device)
        changes = "".join(f"-{flag}-{value}" for flag, value in given.items() if flag in MODEL_AND_LOSS)
        run = run or Path(f"runs/{release.kind}-{flags['backbone']}{changes}-{flags['seed']}")
        begin(run, flags, release)
    try:
        pixels = torch.from_numpy(data.load(release, flags["image_size"], flags["cache"]))
        if device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
            pixels = pixels.to(device)
        network = fit(run, flags, release, pixels, device)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"stopped. Go on with: python train.py --resume {run}") from stop
    except Exception:
        if not (run / "last.pt").exists():
            (run / "args.json").unlink(missing_ok=True)  # nothing was learned: the folder is free for another attempt
        raise
    results, p = evaluate.evaluate_run(run, evaluate.make_predictions(network, release, pixels, device, flags["amp"]))
    evaluate.print_tables(results)
    evaluate.draw_curves(run, results, p)
    return results


def fit(run, flags, release, pixels, device):
    """The recipe: from photos (N, 2, S, S, 3) uint8 to model.pt, whose network it returns; from last.pt on if the run has one."""
    torch.manual_seed(flags["seed"])
    state = evaluate.load_checkpoint(run / "last.pt", device)
    network = model.make(flags, [len(classes) for classes in release.tasks.values()],
                         None if state or flags["weights"] == "none" else flags["weights"]).to(device)  # a checkpoint has its own
    forward = torch.compile(network, dynamic=False) if flags["compile"] else network  # one graph a batch size, in any order
    optimizer = torch.optim.Adam(network.parameters(), flags["lr"], fused=True)  # paper, Sec. 4.1; no weight decay
    criterion = equal_loss if flags["loss"] == "equal" else partial(biased_loss, w=flags["w"])
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=flags["amp"])
    labels = torch.from_numpy(release.labels).to(device)
    train_rows, valid_rows = (torch.from_numpy(release.rows(split)) for split in ("train", "valid"))
    average, log, first = [], [], 0
    if state:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average, log, first = state["average"], state["log"], state["epoch"]
        set_random_state(state["random"], device)
        print(f"going on with {run} after epoch {first}")

    def feed():
        """One pass through the training pairs in a new order, augmented: (clinical, dermoscopy, rows)."""
        for rows in batches(train_rows[torch.randperm(len(train_rows))], flags["batch_size"]):
            yield *data.augment(pixels[rows.to(pixels.device)].to(device), torch.default_generator), rows

    size = f"{model.count_parameters(network, as_in_paper=False):,} parameters"
    print(f"{run}: {flags['backbone']}, {size}, {len(train_rows)} / {len(valid_rows)} / {len(release.rows('test'))} lesions, "
          f"{flags['epochs']} epochs on {device}{' in bfloat16' * flags['amp']}")
    started, saved, cost = time.perf_counter(), time.perf_counter(), 0.0
    for epoch in range(first, flags["epochs"]):
        clock = time.perf_counter()
        network.train()
        optimizer.param_groups[0]["lr"] = learning_rate(flags, epoch)
        losses, seen = [], []  # of each batch
        for clinical, dermoscopy, rows in feed():
            with autocast():
                loss = criterion(forward(clinical, dermoscopy), labels[rows])
            loss.total.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(torch.stack([part.detach() for part in loss if part is not None]))
            seen.append(rows)
        losses = torch.stack(losses).cpu()  # the loop's only copy to the host
        seconds = time.perf_counter() - clock
        if not (finite := losses[:, 0].isfinite()).all():
            batch = int((~finite).nonzero()[0])
            raise RunError(f"the loss of epoch {epoch + 1}, batch {batch + 1} is {losses[batch, 0]:g}; its cases: "
                           f"{', '.join(release.cases[row] for row in seen[batch])}. What was saved before is intact. Try a lower --lr "
                           "or --no-amp, in another --out")
        if epoch + 1 >= flags["swa_start"]:
            average = average or [torch.zeros_like(weight) for weight in network.parameters()]
            average_in(average, epoch + 1 - flags["swa_start"], network)
        log.append({"epoch": epoch + 1, "lr": learning_rate(flags, epoch)} |
                   dict(zip(["loss", *(f"loss_{b}" for b, part in zip(model.BRANCHES, loss[1:]) if part is not None)],
                            losses.mean(0).tolist())) | validation(network, pixels, release, valid_rows, device, flags))
        left = (time.perf_counter() - started) / (epoch + 1 - first) * (flags["epochs"] - epoch - 1)
        print_epoch(log[-1], flags["epochs"], 2 * len(train_rows) / seconds, left)
        # A save costs up to a second: at most 1/20 of the time goes to it, and always one after the last epoch.
        if epoch + 1 == flags["epochs"] or time.perf_counter() - saved > 20 * cost:
            clock = time.perf_counter()
            write_log(run / "log.csv", log)
            save(run / "last.pt", {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "average": average,
                                   "log": log, "epoch": epoch + 1, "random": random_state(device)})
            saved = time.perf_counter()
            cost = saved - clock

    with torch.no_grad():
        for weight, mean in zip(network.parameters(), average):
            weight.copy_(mean)
    re_estimate(network, feed(), autocast)
    save(run / "model.pt", {"state": network.state_dict(), "flags": flags,
                            "trained": [name for row in train_rows.tolist() for name in release.files(row)],
                            "tasks": {task: list(classes) for task, classes in release.tasks.items()}})
    return network


def print_epoch(row, epochs, speed, left):
    parts = " ".join(f"{name[5].upper()} {value:.3f}" for name, value in row.items() if name.startswith("loss_"))
    print(f"epoch {row['epoch']:3}/{epochs}  loss {row['loss']:.3f} ({parts})  validation AUC {100 * row['valid_auc']:.1f} "
          f"accuracy {100 * row['valid_accuracy']:.1f}  lr {row['lr']:.1e}  {speed:,.0f} images/s  {left / 60:.1f} min left", flush=True)


def validation(network, pixels, release, rows, device, flags):
    """Mean AUC and accuracy of the equally weighted branches on the validation split, with the current weights."""
    branches = evaluate.predict(network, pixels, rows, device, flags["amp"])
    fused = evaluate.fuse(branches, dict.fromkeys(branches, 1 / len(branches)), release.tasks)
    found = evaluate.measure(fused, release.labels[rows], release.tasks, np.ones((1, len(rows))))
    return {"valid_auc": float(found["mean_auc"][0]), "valid_accuracy": float(found["mean_accuracy"][0])}


def begin(run, flags, release):
    """The run's folder with its args.json; refused if there is a run in it."""
    text = json.dumps({"flags": flags, "release": release.fingerprint()} | about(), indent=1)
    if run.exists() and not run.is_dir():
        raise RunError(f"--out {run} is a file")
    try:
        run.mkdir(parents=True, exist_ok=True)
        with open(run / "args.json", "x") as file:  # "x": of two runs that start at once only one gets the folder
            file.write(text)
    except FileExistsError as error:
        raise RunError(f"{run} holds a run. Go on with it: --resume {run}. See its tables: python evaluate.py {run}. "
                       "Begin another: --out DIR") from error
    except OSError as error:
        raise RunError(f"--out {run} cannot be written ({error.strerror})") from error


@contextlib.contextmanager
def spoken_errors():
    """Ends the program with one sentence where a user can do something about it: exit code 2, 130 for Ctrl-C."""
    try:
        yield
    except (RunError, data.DataError, backbones.WeightsError, OSError) as error:  # OSError: a full disk, and which file
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(f"\ntrain.py: {stop if stop.args else 'stopped'}", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if "allocate memory" not in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise
        print(f"train.py: out of memory. Try a smaller --batch-size or --image-size. ({str(error).splitlines()[0]})", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    with spoken_errors():
        main()
