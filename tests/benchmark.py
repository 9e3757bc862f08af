"""Benchmarks, not tests: what our code costs beside something that it can be compared with, in one process, in turns.

    python tests/benchmark.py encoders     each hand-written encoder beside torchvision's, forward and backward
    python tests/benchmark.py attention    one cross-attention beside the plain formula and torch's own kernel
    python tests/benchmark.py step         a training step of PEMM beside the bare encoder's and the plain formula's
    python tests/benchmark.py data         decoding, reading the cache, augmenting, beside a loop over photos
    python tests/benchmark.py train        the training loop beside bare forward and backward on one fixed batch

Ratios are medians over rounds in which each candidate runs once, so that a slow moment of the machine hits all alike.
"""
import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import backbones
import data
import model
import shared_attention
import train
from loss import biased_loss
from test_backbones import torchvision_twin

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

def seconds(function):
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start

def compare(title, candidates, rounds):
    """Prints the median seconds of each candidate, and its median ratio to the first."""
    for function in candidates.values():
        function()
    times = {name: [] for name in candidates}
    for number in range(rounds):
        for name in list(candidates)[::1 if number % 2 else -1]:
            times[name].append(seconds(candidates[name]))
    first = next(iter(times.values()))
    print(f"{title:34}", end="")
    for name, each in times.items():
        ratio = statistics.median(a / b for a, b in zip(each, first))
        print(f"{name} {statistics.median(each):.3f} s ({ratio:.2f}x)", end="   ", flush=True)
    print()
    return {name: statistics.median(each) for name, each in times.items()}

def step(parameters, bf16, function):
    """Forward and backward of a function that returns a tensor; the gradients are then dropped."""
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
        out = function()
    out.float().square().mean().backward()
    for parameter in parameters:
        parameter.grad = None

def encoders(rounds, batch):
    print(f"forward and backward, {batch} images of 224 x 224, {DEVICE}; ratio to torchvision")
    for name in ("swin_t", "swin_v2_t", "convnext_t"):
        twin, encoder = torchvision_twin(name).to(DEVICE).train(), backbones.build(name).to(DEVICE).train()
        head = [module for module in twin.modules() if isinstance(module, nn.Linear)][-1]
        x = torch.randn(batch, 3, 224, 224, device=DEVICE)
        for compiled in (False, True) if DEVICE.type == "cuda" else (False,):
            theirs, ours = (torch.compile(twin), torch.compile(encoder)) if compiled else (twin, encoder)
            for bf16 in (False, True):
                compare(f"{name} {'bfloat16' if bf16 else 'float32'}{' compiled' * compiled}", {
                    "torchvision": partial(step, list(twin.parameters()), bf16, lambda: theirs(x)),
                    "ours": partial(step, [*encoder.parameters(), *head.parameters()], bf16,
                                    lambda: head(encoder.pool(ours(x)[-1])))}, rounds)

plain = shared_attention.plain_attention

def padded(q, k, v):
    """torch's kernel with q and k padded to v's width, without which it falls back to one that builds the whole map."""
    wide = [F.pad(x, (0, v.shape[-1] - x.shape[-1]))[:, None] for x in (q, k)]
    return F.scaled_dot_product_attention(*wide, v[:, None], scale=1.0)[:, 0]

def attention(rounds, batch):
    print(f"one attention, forward and backward, {2 * batch} images, {DEVICE}; ratio to the plain formula")
    for side, channels in ((56, 96), (28, 192), (14, 384)):
        for dtype in (torch.float32, torch.bfloat16):
            q, k, v = (torch.randn(2 * batch, side ** 2, width, device=DEVICE, dtype=dtype, requires_grad=True)
                       for width in (channels // 8, channels // 8, channels))
            compare(f"{side} x {side}, {channels} channels, {str(dtype)[6:]}", {
                name: partial(step, [q, k, v], False, lambda function=function: function(q, k, v))
                for name, function in (("plain", plain), ("padded", padded), ("ours", shared_attention.attend))},
                rounds)

def pemm_step(kind, bf16, batch):
    """A function that takes a training step of the bare encoder ("bare"), of PEMM ("ours") or with plain attention."""
    torch.manual_seed(0)
    clinical, dermoscopy = torch.randn(2, batch, 3, 224, 224, device=DEVICE)
    labels = torch.stack([torch.randint(0, n, (batch,), device=DEVICE) for n in model.SPC_CLASSES], 1)
    network = (backbones.build("swin_t") if kind == "bare" else model.PEMM("swin_t")).to(DEVICE).train()
    ours = shared_attention.attend
    def bare():
        return network.pool(network(torch.cat((clinical, dermoscopy)))[-1])
    def whole():
        return biased_loss(network(clinical, dermoscopy), labels)[0]
    def run():
        shared_attention.attend = plain if kind == "plain" else ours
        step(list(network.parameters()), bf16, bare if kind == "bare" else whole)
        shared_attention.attend = ours
    return run

def peak(queue, kind, bf16, batch):
    """Peak memory of a step above what the process holds before it, in bytes; in a process of its own."""
    def host(name):  # Linux: the memory now, VmRSS, or at its highest, VmHWM
        return 1024 * int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])
    run = pemm_step(kind, bf16, batch)
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else host("VmRSS")
    run(), run()
    queue.put((torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else host("VmHWM")) - before)

def pemm(rounds, batch):
    print(f"a training step of PEMM-Swin-T, {batch} pairs of 224 x 224, {DEVICE}; ratio to the bare encoder")
    for bf16 in (False, True):
        name = "bfloat16" if bf16 else "float32"
        compare(name, {kind: pemm_step(kind, bf16, batch) for kind in ("bare", "plain", "ours")}, rounds)
        context, found = multiprocessing.get_context("spawn"), {}
        for kind in ("bare", "plain", "ours"):
            queue = context.Queue()
            process = context.Process(target=peak, args=(queue, kind, bf16, batch))
            process.start()
            found[kind] = queue.get()
            process.join()
        texts = [f"{kind} {value / 2 ** 20:,.0f} MiB ({value / found['bare']:.2f}x)" for kind, value in found.items()]
        print(f"{name + ', peak memory':34}" + "   ".join(texts), flush=True)

def photos(rounds, batch):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spc"
        data.synthesize(path, cases=200, height=512)
        first, again = (400 / seconds(lambda: data.read(path, 224, folder)) for _ in range(2))
        print(f"200 pairs of 768 x 512: read and decoded {first:,.0f} photos/s, found again {again:,.0f} photos/s")
        release, generator = data.read(path, 224, folder), torch.Generator()
        rows = torch.randint(0, 200, (24,))
        pixels = torch.from_numpy(release.pixels)
        files = sorted((path / "images").glob("*.jpg"))
        def one_by_one():
            for n in range(24):
                pair = torch.tensor([[data.decode(file, 224).tolist() for file in files[2 * n:2 * n + 2]]],
                                    dtype=torch.uint8)
                data.augment(pair, release.views, generator)
        compare("24 pairs, decoded and augmented", {
            "photo by photo": one_by_one, "ours": lambda: data.augment(pixels[rows].to(DEVICE), release.views,
                                                                       generator)}, rounds)

def training(rounds, batch):
    """Images per second of train.fit's loop, as it prints them, as a share of forward and backward alone."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        path = folder / "spc"
        data.synthesize(path, cases=1011, height=128)
        flags, _ = train.parse(["--device", DEVICE.type, "--epochs", str(2 * rounds), "--swa-start", str(2 * rounds)])
        flags["amp"] = train.has_bfloat16(DEVICE)
        release = data.read(path, flags["image_size"], folder)
        network = model.make(flags, model.SPC_CLASSES).to(DEVICE).train()
        inputs = data.augment(torch.from_numpy(release.pixels[:24]).to(DEVICE), release.views, torch.Generator())
        labels = torch.from_numpy(release.labels[:24]).to(DEVICE)
        one = partial(step, list(network.parameters()), flags["amp"],
                      lambda: biased_loss(network(*inputs.values()), labels)[0])
        loops, bares, validation = [], [], train.validation
        clock = time.perf_counter()
        def after_an_epoch(*arguments):  # the loop calls it once an epoch, before it prints its speed
            nonlocal clock
            loops.append(2 * len(release.rows("train")) / (time.perf_counter() - clock))
            bares.append(48 * 17 / seconds(lambda: [one() for _ in range(17)]))  # about as many steps as the epoch had
            found = validation(*arguments)
            clock = time.perf_counter()
            return found
        train.validation = after_an_epoch
        one()
        train.fit(folder / "run", flags, release, DEVICE)
        beside = zip(loops[1:], bares, bares[1:])  # each epoch, and what came before and after it
        share = statistics.median(2 * loop / (before + after) for loop, before, after in beside)
        loop, bare = statistics.median(loops[1:]), statistics.median(bares)
        print(f"training loop {loop:,.0f} images/s, bare forward and backward {bare:,.0f} images/s; "
              f"median of {len(loops) - 1} epochs: {100 * share:.1f}%")

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    kinds = {"encoders": encoders, "attention": attention, "step": pemm, "data": photos, "train": training}
    parser.add_argument("what", nargs="+", choices=kinds)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="images, or pairs [%(default)s]")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")
    for what in args.what:
        kinds[what](args.rounds, args.batch)

if __name__ == "__main__":
    main()
