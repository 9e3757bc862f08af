"""Benchmarks, not tests: what our code costs beside something that it can be compared with.

    python tests/benchmark.py encoders     each hand-written encoder beside torchvision's
    python tests/benchmark.py attention    one attention: plain, torch's kernel, and the fast twin
    python tests/benchmark.py step         PEMM's training step beside the bare encoder's
    python tests/benchmark.py data         decoding and augmenting beside a loop over photos
    python tests/benchmark.py train        the training loop beside bare forward and backward

All candidates run in one process, in turns. Ratios are medians over rounds in which each candidate
runs once, so that a slow moment of the machine hits all alike.
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

sys.path.insert(0, str(Path(__file__).parent.parent))
import backbones
import data
import model
import shared_attention
import train
from loss import biased_loss, make_criterion
from test_backbones import last_linear, torchvision_twin
from test_shared_attention import bytes_kept

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MIB = 2**20


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
        function()  # the first call takes longer
    times = {name: [] for name in candidates}
    for number in range(rounds):
        names = list(candidates)
        if number % 2 == 1:
            names.reverse()
        for name in names:
            times[name].append(seconds(candidates[name]))
    first = next(iter(times.values()))
    print(f"{title:34}", end="")
    for name, measured in times.items():
        ratio = statistics.median(a / b for a, b in zip(measured, first))
        text = f"{name} {statistics.median(measured):.3f} s ({ratio:.2f}x)"
        print(text, end="   ", flush=True)
    print()


def step(parameters, bf16, function):
    """Forward and backward of a function that returns a tensor; the gradients are then dropped."""
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
        out = function()
    out.float().square().mean().backward()
    for parameter in parameters:
        parameter.grad = None


# ------------------------------------------------------------------------------------ encoders


def encoders(rounds, batch):
    print(f"forward and backward, {batch} photos of 224 x 224, {DEVICE}; ratio to torchvision")
    for name in ("swin_v2_t", "swin_t", "convnext_t"):
        for compiled in (False, True) if DEVICE.type == "cuda" else (False,):
            for bf16 in (False, True):
                compare_encoder(name, compiled, bf16, rounds, batch)


def compare_encoder(name, compiled, bf16, rounds, batch):
    twin = torchvision_twin(name).to(DEVICE).train()
    encoder = backbones.build_encoder(name).to(DEVICE).train()
    head = last_linear(twin)
    theirs = list(twin.parameters())
    ours = list(encoder.parameters()) + list(head.parameters())
    photos = torch.randn(batch, 3, 224, 224, device=DEVICE)
    run_twin = torch.compile(twin) if compiled else twin
    run_encoder = torch.compile(encoder) if compiled else encoder

    def logits_of_encoder():
        maps = run_encoder(photos)
        return head(encoder.pool(maps[3]))

    title = f"{name} {'bfloat16' if bf16 else 'float32'}{' compiled' if compiled else ''}"
    candidates = {
        "torchvision": partial(step, theirs, bf16, partial(run_twin, photos)),
        "ours": partial(step, ours, bf16, logits_of_encoder),
    }
    compare(title, candidates, rounds)


# ----------------------------------------------------------------------------------- attention


def padded_kernel(q, k, v):
    """torch's kernel as it must be called to be its fast form: q and k as wide as v."""
    scale = q.shape[-1] ** -0.5
    missing = v.shape[-1] - q.shape[-1]
    q = F.pad(q, (0, missing))
    k = F.pad(k, (0, missing))
    return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=scale)[:, 0]


ATTENTIONS = {
    "plain": shared_attention.attention,
    "padded": padded_kernel,
    "ours": shared_attention.fast_attention,
}


def random_tokens(images, side, channels, dtype):
    """q, k and v as in the stage of an encoder whose map has side x side places."""
    tokens = []
    for width in (channels // 8, channels // 8, channels):
        x = torch.randn(images, side**2, width, device=DEVICE, dtype=dtype)
        tokens.append(x.requires_grad_())
    return tokens


def attention(args):
    images = 2 * args.batch
    print(f"one attention of {images} maps, forward and backward, {DEVICE}; ratio to plain")
    for side, channels in ((56, 96), (28, 192), (14, 384)):
        for dtype in (torch.float32, torch.bfloat16):
            tokens = random_tokens(images, side, channels, dtype)
            candidates = {}
            for name, function in ATTENTIONS.items():
                candidates[name] = partial(step, tokens, False, partial(function, *tokens))
            title = f"{side} x {side}, {channels} channels, {str(dtype).removeprefix('torch.')}"
            compare(title, candidates, args.rounds)
        tokens = random_tokens(images, side, channels, torch.float32)
        texts = []
        for name, function in ATTENTIONS.items():
            texts.append(f"{name} {bytes_kept(function, tokens) / MIB:,.0f} MiB")
        print(f"{'  kept for the backward, float32':34}" + "   ".join(texts), flush=True)


# ----------------------------------------------------------------------- a training step of PEMM


def make_step(kind, bf16, compiled, args):
    """A function that takes a step of the bare encoder ("bare"), of PEMM as it is ("ours") or of
    PEMM with the plain attention ("plain")."""
    torch.manual_seed(0)
    clinical, dermoscopy = torch.randn(2, args.batch, 3, args.size, args.size, device=DEVICE)
    batch = {"clinical": clinical, "dermoscopy": dermoscopy}
    labels = [torch.randint(0, n, (args.batch,), device=DEVICE) for n in model.SPC_CLASSES]
    labels = torch.stack(labels, dim=1)
    if kind == "bare":
        network = backbones.build_encoder(args.backbone)
    else:
        network = model.PEMM(args.backbone)
    network = network.to(DEVICE).train()
    called = torch.compile(network) if compiled else network

    def features():
        maps = called(torch.cat((clinical, dermoscopy)))
        return network.pool(maps[3])

    def loss():
        total, _ = biased_loss(called(batch), labels)
        return total

    def take_step():
        if kind == "plain":
            shared_attention.fast_attention = ATTENTIONS["plain"]
        step(list(network.parameters()), bf16, features if kind == "bare" else loss)
        shared_attention.fast_attention = ATTENTIONS["ours"]

    return take_step


def memory_of_process(name):
    """Linux: the memory of this process now ("VmRSS") or at its highest ("VmHWM"), in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


def measure_peak(queue, kind, bf16, args):
    """Puts into `queue` what two steps need above what the process holds before them."""
    take_step = make_step(kind, bf16, False, args)
    on_gpu = DEVICE.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else memory_of_process("VmRSS")
    take_step()
    take_step()
    peak = torch.cuda.max_memory_allocated() if on_gpu else memory_of_process("VmHWM")
    queue.put(peak - before)


def peaks(kinds, bf16, args):
    """Peak memory of each kind of step, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    found = {}
    for kind in kinds:
        queue = context.Queue()
        process = context.Process(target=measure_peak, args=(queue, kind, bf16, args))
        process.start()
        found[kind] = queue.get()
        process.join()
    return found


def pemm(args):
    size = f"{args.batch} pairs of {args.size} x {args.size}"
    print(f"a training step of PEMM with {args.backbone}, {size}, {DEVICE}; ratio to the encoder")
    kinds = ("bare", "plain", "ours")
    for bf16 in (False, True):
        title = "bfloat16" if bf16 else "float32"
        for compiled in (False, True) if DEVICE.type == "cuda" else (False,):
            candidates = {kind: make_step(kind, bf16, compiled, args) for kind in kinds}
            compare(title + (", compiled" if compiled else ""), candidates, args.rounds)
        found = peaks(kinds, bf16, args)
        texts = []
        for kind, value in found.items():
            texts.append(f"{kind} {value / MIB:,.0f} MiB ({value / found['bare']:.2f}x)")
        print(f"{title + ', peak memory':34}" + "   ".join(texts), flush=True)


# ---------------------------------------------------------------------------------------- data


def photos(args):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spc"
        data.synthesize(path, cases=100, height=512)
        decode = partial(data.read, path, args.size, folder)
        first = 200 / seconds(decode)
        again = 200 / seconds(decode)
        texts = f"read and decoded {first:,.0f} photos/s, from the cache {again:,.0f} photos/s"
        print(f"100 pairs of 768 x 512: {texts}")
        release = data.read(path, args.size, folder)
        generator = torch.Generator()
        rows = torch.randint(0, 100, (24,))
        files = sorted((path / "images").glob("*.jpg"))

        def photo_by_photo():
            for file in files[:48]:
                photo = torch.from_numpy(data.decode(file, args.size))
                pixels = photo[None, None].to(DEVICE)  # one lesion of one picture
                data.normalise(data.augment(pixels, ("dermoscopy",), generator)[:, 0])

        candidates = {
            "photo by photo": photo_by_photo,
            "ours": partial(data.make_batch, release, rows, DEVICE, generator),
        }
        compare("a batch of 24 pairs", candidates, args.rounds)


# ------------------------------------------------------------------------------- the training loop


def training(args):
    """Lesions per second of train.fit, as it prints them, as a share of forward and backward alone.

    After each epoch as many steps on one fixed batch are timed as the epoch had.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spc"
        data.synthesize(path, cases=1011, height=128)
        epochs = str(2 * args.rounds)
        flags = train.parse_flags(["--epochs", epochs, "--swa-start", epochs])  # a demo's
        flags["amp"] = model.has_bfloat16(DEVICE)
        flags["device"] = str(DEVICE)
        release = data.read(path, flags["image_size"], folder)
        rows = release.rows("train")
        network = model.build_model(flags, model.SPC_CLASSES, num_words=2).to(DEVICE).train()
        criterion = make_criterion(flags)
        batch = data.make_batch(release, rows[: flags["batch_size"]], DEVICE, torch.Generator())
        num_steps = len(train.shuffled_batches(rows, flags["batch_size"]))

        def loss():
            total, _ = criterion(network(batch), batch)
            return total

        def bare_epoch():
            for _ in range(num_steps):
                step(list(network.parameters()), flags["amp"], loss)

        loop_speeds = []
        bare_speeds = []

        def after_an_epoch(title, figures, speed):
            loop_speeds.append(speed)
            bare_speeds.append(num_steps * flags["batch_size"] / seconds(bare_epoch))

        bare_epoch()
        train.print_epoch = after_an_epoch
        checkpoint = train.Checkpoint(flags, release.fingerprint, release.split.tolist(), {})
        checkpoint.seen_before = {"ids": [], "photos": []}
        train.fit(Path(folder) / "run", checkpoint, release, DEVICE)
    # Each epoch beside the bare steps before and after it; the first has none before it.
    shares = []
    for n in range(1, len(loop_speeds)):
        shares.append(2 * loop_speeds[n] / (bare_speeds[n - 1] + bare_speeds[n]))
    loop = statistics.median(loop_speeds[1:])
    bare = statistics.median(bare_speeds)
    share = 100 * statistics.median(shares)
    print(f"training loop {loop:,.0f} lesions/s, bare forward and backward {bare:,.0f} lesions/s")
    print(f"median share of {len(shares)} epochs: {share:.1f}%")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    sections = {
        "encoders": lambda args: encoders(args.rounds, args.batch),
        "attention": attention,
        "step": pemm,
        "data": photos,
        "train": training,
    }
    parser.add_argument("what", nargs="+", choices=sections)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="photos, or pairs [%(default)s]")
    parser.add_argument("--backbone", default="swin_v2_t", help="of `step` [%(default)s]")
    parser.add_argument("--size", type=int, default=224, help="of `step` and `data` [%(default)s]")
    args = parser.parse_args()
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")
    for what in args.what:
        sections[what](args)


if __name__ == "__main__":
    main()
