"""Train: the recipe of the PEMM paper (Sec. 4.1) as one loop.

    python train.py                        a demo: draws synthetic lesions, trains a small network, prints the tables
    python train.py --data release_v0      the paper's recipe on the Seven-Point Checklist
    python train.py --resume RUN           goes on with a run that was stopped, and ends in the same bits

Adam, cosine annealing every epoch, augmentation, the biased loss and stochastic weight averaging (SWA): from
--swa-start on, the weights after each epoch are averaged. Batch-norm statistics are then estimated anew for the
average, and that is the model which is saved and evaluated. (The authors' earlier public code averages too, but tests
the last weights.)

A run's folder holds last.pt (all that --resume needs, flags included), model.pt (the average, and which lesions it has
learned), log.csv, predictions.csv, results.json, and args.json for people. Each file appears whole or not at all. One
seed gives the same bits again on one machine; other processors, threads and versions of torch round otherwise.
"""
import argparse
import json
import math
import platform
import subprocess
import time
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import torch

import backbones
import data
import evaluate
import model
from loss import PAPER_W, biased_loss, clnet_loss, equal_loss
from model import RunError

# Without --data: a demo for a laptop, about a minute on two cores. All other defaults are the paper's recipe.
DEMO = {"backbone": "convnext_atto", "weights": "none", "clinical_weights": "none", "image_size": 96, "epochs": 10,
        "lr": 5e-4}
UNNAMED = ("data", "cache", "out", "resume", "device", "seed", "amp", "compile")  # not in the name of a run's folder

def between(kind, low, high):
    """A type for argparse: a number from low to high."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text}: it goes from {low} to {high}")
        return value
    return number

def parse(argv):
    """All flags, and those that were given, as dicts."""
    parser = argparse.ArgumentParser(description="The recipe of the PEMM paper. Each row of its tables is one command.",
                                     epilog=f"Without --data, a demo with {DEMO}.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--data", metavar="PATH", help="folder of a release, or CSV file of your own pairs; its kind is found")
    add("--cache", default="runs/cache", metavar="DIR", help="folder of the decoded photos")
    add("--out", metavar="DIR", help="the run's folder (runs/<kind of data>-<the flags that were given>-<seed>)")
    add("--resume", metavar="RUN", help="go on with the run in this folder, with the flags it began with")
    add("--device", help="cpu, cuda, cuda:1 or mps (ours: an accelerator, else cpu)")
    # The model.
    add("--model", default="pemm", choices=["pemm", "ammfm", "mat", "clnet"], help="see model.py")
    add("--backbone", default="swin_v2_t", choices=list(backbones.BACKBONES), help='paper: "Tiny"; its counts say V2')
    add("--weights", default="imagenet", metavar="W",
        help="imagenet, none, or a state dict in torchvision's format (ours: 413 training pairs are too few for none)")
    add("--image-size", default=224, type=between(int, 32, 4096), metavar="S", help="paper, Sec. 4.1")
    add("--modality", default="both", choices=["both", "clinical", "dermoscopy"], help="both photos or one (Table 8)")
    add("--encoder", default="shared", choices=["shared", "separate"], help="for both photos or one each (Table 5)")
    add("--fusion", default="sca", choices=["sca", "ca", "concat"], help="attention: shared, one each, none (Table 5)")
    add("--classifiers", default="separate", choices=["separate", "shared"], help="clinical and dermoscopy (Table 6)")
    add("--reading", default="cross", choices=["cross", "swapped"], help="what crosses: see shared_attention.py (ours)")
    add("--clinical-backbone", default="mobilenet_v2", choices=list(backbones.BACKBONES), help="AMMFM's light one")
    add("--clinical-weights", default="imagenet", metavar="W", help="AMMFM: its first weights, as --weights")
    add("--unit", default="sga-sga", choices=["none", "sa-sa", "sa-sga", "sga-sa", "sga-sga"], help="MAT (its Table 1)")
    add("--tasks", default="both", choices=["both", "class", "mask"], help="CLNet or a half of it (its Tables 1 and 2)")
    # The training.
    add("--loss", default="biased", choices=["biased", "equal"], help="Eq. 3 or Eq. 1 (paper, Sec. 3.3)")
    add("--w", default=PAPER_W, type=between(float, 0, 0.5), help="W of Eq. 3 (Table 7; paper, Sec. 4.1)")
    add("--epochs", type=between(int, 1, 10 ** 6), help="paper, Sec. 4.1: 250 on SPC, 150 on ISIC (ours: and all else)")
    add("--batch-size", default=24, type=between(int, 2, 10 ** 6), metavar="B", help="lesions (paper, Sec. 4.1)")
    add("--lr", default=3e-5, type=between(float, 0, math.inf), help="first learning rate (paper, Sec. 4.1)")
    add("--swa-start", type=between(int, 1, 10 ** 6), metavar="EPOCH",
        help="first epoch, from 1, whose weights are averaged (ours: after 4/5 of them, as in FusionM4Net's code)")
    add("--seed", default=0, type=between(int, 0, 2 ** 63 - 1), help="of weights, order, augmentation and dropout")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 autocast (ours: where the hardware has it)")
    add("--compile", default=False, action=argparse.BooleanOptionalAction, help="torch.compile: a minute to begin with")
    blank = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([]))))  # defaults fill only what is not there
    given = {flag: value for flag, value in vars(parser.parse_args(argv, blank)).items() if value is not None}
    if "data" not in given:
        parser.set_defaults(**DEMO)
    flags = vars(parser.parse_args(argv))
    # What each model reads of the flags that not all models read.
    used = {"pemm": ["modality", "encoder", "fusion", "classifiers", "reading", "loss", "w"], "mat": ["unit"],
            "ammfm": ["clinical_backbone", "clinical_weights", "loss", "w"], "clnet": ["tasks"]}
    idle = {flag for each in used.values() for flag in each} - set(used[flags["model"]])
    if flags["modality"] != "both":
        idle |= set(used["pemm"]) - {"modality"}
    if flags["loss"] == "equal":
        idle.add("w")
    useless = sorted(flag for flag in idle & given.keys() if given[flag] != parser.get_default(flag))
    if useless and "resume" not in given:  # else main compares them with the run's own flags
        parser.error(f"{', '.join(useless)}: this would change nothing beside the other flags".replace("_", "-"))
    return flags, given

def has_bfloat16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return device.type == "cpu" and bool(able.get("avx512_bf16") or able.get("amx_bf16"))

# ---------------------------------------------------------------------------------------------- the parts of the recipe

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
    """SWA by hand: one more epoch joins the running mean of the parameters. The cosine keeps falling meanwhile."""
    for mean, weight in zip(average, network.parameters()):
        mean += (weight.detach() - mean) / (count + 1)

@torch.no_grad()
def re_estimate(network, fed, autocast=nullcontext):
    """Batch-norm statistics of the average: the mean over the batches of one augmented pass, in training mode. The
    network is then ready to be saved, not to be trained further."""
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # torch's way to say: plain mean over all batches
    network.train()
    for inputs, _ in fed:
        with autocast():
            network(*(inputs[name] for name in network.reads))

def validation(network, release, words, device, amp):
    """With the current weights, on the validation split: mean AUC and accuracy of the equally weighted branches, and
    the mean overlap with the masks."""
    rows = release.rows("valid")
    branches, overlaps = evaluate.predict(network, release.pixels[rows], release.views, words[rows], device, amp)
    found = {f"valid_{name}": float(values.mean()) for name, values in overlaps.items()}
    if branches:
        equal = evaluate.fuse(branches, dict.fromkeys(branches, 1 / len(branches)), release.tasks)
        means = evaluate.measure(equal, release.labels[rows], release.tasks)
        found |= {f"valid_{name}": means[f"mean_{name}"] for name in ("auc", "accuracy") if f"mean_{name}" in means}
    return found

# --------------------------------------------------------------------------------------------------------- saving a run

def save(path, state):
    """torch.save that appears whole or not at all."""
    try:
        with data.whole(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError inside torch's writer
        raise RunError(f"{path} cannot be written ({error}). What was saved before is intact") from error

def random_state(device):
    """The states of torch's generators: the CPU's and, if that is another, the device's."""
    if device.type == "cpu":
        return [torch.get_rng_state()]
    return [torch.get_rng_state(), torch.get_device_module(device).get_rng_state()]

def set_random_state(states, device):
    torch.set_rng_state(states[0].cpu())
    if device.type != "cpu" and len(states) > 1:  # a run may move from one device to another
        torch.get_device_module(device).set_rng_state(states[1].cpu())

def begin(run, flags):
    """Makes the run's folder, with args.json for people. A folder that holds a run is never begun anew."""
    if (run / "last.pt").exists() or (run / "model.pt").exists():
        raise RunError(f"{run} holds a run. Go on with it: --resume {run}; or begin another: --out DIR")
    run.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    about = {"flags": flags, "torch": torch.__version__, "machine": platform.platform(), "threads": threads}
    with suppress(OSError):  # no git here
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True)
        about["commit"] = git.stdout.decode().strip()
    evaluate.write(run / "args.json", json.dumps(about, indent=1))

# ------------------------------------------------------------------------------------------------------------- the loop

def main(argv=None):
    """Trains and evaluates; returns what results.json holds. Raises RunError, DataError or WeightsError."""
    flags, given = parse(argv)
    state = None
    if flags["resume"]:
        run = Path(flags["resume"])
        if not (run / "last.pt").exists():
            raise RunError(f"{run}: no last.pt, so no run to go on with")
        state = evaluate.load_checkpoint(run / "last.pt")
        flags = state["flags"]
        for flag in given.keys() - {"resume"}:
            if flag not in ("data", "cache", "device") and given[flag] != flags[flag]:
                raise RunError(f"{run} began with {flag} {flags[flag]}, not {given[flag]}: begin another with --out")
            flags[flag] = given[flag]
    device = model.find_device(flags["device"])
    path = flags["data"]
    if path is None:
        path = Path("runs/synthetic-spc-900")
        if not path.exists():
            data.synthesize(path, cases=900, height=128)
        print(f"no --data: a demo on the synthetic SPC in {path}")
    release = data.read(path, flags["image_size"], flags["cache"], masks=flags["model"] == "clnet")
    for note in release.notes:
        print(note)

    if state and (state["fingerprint"] != release.fingerprint or state["split"] != release.split.tolist()):
        raise RunError(f"{path} is not what {run} began with: photos, labels or split are others. Begin a new run")
    if flags["epochs"] is None:
        flags["epochs"] = 250 if release.kind in ("spc", "synthetic") else 150  # paper, Sec. 4.1
    if flags["swa_start"] is None:
        flags["swa_start"] = int(0.8 * flags["epochs"]) + 1
    if flags["swa_start"] > flags["epochs"]:
        raise RunError(f"--swa-start {flags['swa_start']} is after the last of {flags['epochs']} epochs")
    if flags["amp"] is None:
        flags["amp"] = has_bfloat16(device)
    if not state:  # a new run: its folder is named after the flags that were given
        named = [f"{flag}-{Path(str(given[flag])).name}" for flag in given if flag not in UNNAMED]
        run = Path(flags["out"] or "runs/" + "-".join([release.kind, *named, str(flags["seed"])]))
    try:
        fit(run, flags, release, device, state)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(f"stopped. If it had begun, go on with: python train.py --resume {run}") from stop
    results, _ = evaluate.evaluate_run(run, release, device)
    evaluate.print_tables(results)
    print(f"\nThe tables again: python evaluate.py {run}")
    return results

def fit(run, flags, release, device, state=None):
    """The recipe, from a Release to model.pt. `state` is the last.pt of a run that goes on."""
    torch.manual_seed(flags["seed"])
    num_classes = [len(classes) for classes in release.tasks.values()]
    vocabulary = data.make_vocabulary(release)  # for MAT; the other models ignore the words
    network = model.make(flags, num_classes, len(vocabulary), pretrained=not state).to(device)
    needed = set(network.reads) - {"words"}
    if flags["model"] == "clnet" and flags["tasks"] != "class":
        needed.add("mask")
    if not needed <= set(release.views):
        raise RunError(f"the model needs {' and '.join(sorted(needed))}; the release has {' and '.join(release.views)}")
    forward = torch.compile(network, dynamic=False) if flags["compile"] else network
    optimizer = torch.optim.Adam(network.parameters(), flags["lr"], fused=True)  # paper, Sec. 4.1; no weight decay
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=flags["amp"])
    pixels = torch.from_numpy(release.pixels)
    if device.type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        pixels = pixels.to(device)
    labels = torch.from_numpy(release.labels).to(device)
    words = torch.from_numpy(data.as_words(release.metadata, vocabulary, len(labels))).to(device)
    train_rows = torch.from_numpy(release.rows("train"))

    def save_checkpoint(epoch):
        """All that is needed to go on after this epoch; `average` and `log` are set below."""
        save(run / "last.pt", {
            "flags": flags, "fingerprint": release.fingerprint, "split": release.split.tolist(), "epoch": epoch,
            "log": log, "network": network.state_dict(), "optimizer": optimizer.state_dict(), "average": average,
            "random": random_state(device)})

    def feed():
        """One pass through the training lesions in a new order, augmented: (inputs, rows)."""
        for rows in batches(train_rows[torch.randperm(len(train_rows))], flags["batch_size"]):
            batch = pixels[rows.to(pixels.device)].to(device)
            inputs = data.augment(batch, release.views, torch.default_generator)
            yield inputs | {"words": words[rows]}, rows

    if state:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average, log, first = [mean.to(device) for mean in state["average"]], state["log"], state["epoch"]
        set_random_state(state["random"], device)
        print(f"going on with {run} after epoch {first}")
    else:
        average, log, first = [], [], 0
        begin(run, flags)
        save_checkpoint(0)
    print(f"{run}: {model.count_parameters(network, as_in_paper=False):,} parameters, {len(train_rows)} / "
          f"{len(release.rows('valid'))} / {len(release.rows('test'))} lesions, {flags['epochs']} epochs on {device}")

    next_save = 0.0  # when the next save is due, on perf_counter's clock
    for epoch in range(first, flags["epochs"]):
        clock = time.perf_counter()
        network.train()
        optimizer.param_groups[0]["lr"] = learning_rate(flags, epoch)
        losses = []  # of each batch: the total and each branch's
        for inputs, rows in feed():
            with autocast():
                outputs = forward(*(inputs[name] for name in network.reads))
                if flags["model"] == "clnet":
                    total, parts = clnet_loss(outputs, labels[rows], inputs.get("mask"))
                elif flags["loss"] == "equal":
                    total, parts = equal_loss(outputs, labels[rows])
                else:
                    total, parts = biased_loss(outputs, labels[rows], flags["w"])
            total.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(torch.stack([total.detach(), *parts.values()]))
        losses = torch.stack(losses).cpu()  # one copy an epoch, not one a batch
        speed = len(train_rows) * len(needed) / (time.perf_counter() - clock)
        if not losses.isfinite().all():
            number = int((~losses.isfinite()).any(1).nonzero()[0]) + 1
            raise RunError(f"the loss of epoch {epoch + 1}, batch {number} is not finite. What was saved before is "
                           "intact. Try a lower --lr or --no-amp, in another --out")

        if epoch + 1 >= flags["swa_start"]:
            average = average or [torch.zeros_like(weight) for weight in network.parameters()]
            average_in(average, epoch + 1 - flags["swa_start"], network)
        names = ["loss", *(f"loss_{branch}" for branch in parts)]
        row = {"epoch": epoch + 1, "lr": learning_rate(flags, epoch)} | dict(zip(names, losses.mean(0).tolist()))
        row |= validation(network, release, words, device, flags["amp"])
        log.append(row)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name.startswith("valid"))
        print(f"epoch {epoch + 1}/{flags['epochs']}  loss {row['loss']:.3f}  {shown}  {speed:.0f} images/s", flush=True)
        # Saving takes at most 1/20 of the time. After the last epoch there is always a save.
        if epoch + 1 == flags["epochs"] or time.perf_counter() > next_save:
            began = time.perf_counter()
            lines = [log[0].keys(), *(row.values() for row in log)]
            evaluate.write(run / "log.csv", "\n".join(",".join(map(str, line)) for line in lines) + "\n")
            save_checkpoint(epoch + 1)
            next_save = time.perf_counter() + 20 * (time.perf_counter() - began)

    with torch.no_grad():
        for weight, mean in zip(network.parameters(), average):
            weight.copy_(mean)
    re_estimate(network, feed(), autocast)
    save(run / "model.pt", {
        "network": network.state_dict(), "flags": flags, "vocabulary": vocabulary, "tasks": release.tasks,
        "fingerprint": release.fingerprint, "published": release.published, "cases": release.cases,
        "split": release.split.tolist(), "labels": release.labels.tolist(), "digests": release.digests.tolist(),
        "metadata": release.metadata})

if __name__ == "__main__":
    data.speak(main, RunError, data.DataError, backbones.WeightsError)
