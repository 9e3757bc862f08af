"""Shared cross-attention: after each stage, each modality reads the other (Sec. 3.2, Fig. 3 of the PEMM paper).

Three 1x1 convolutions project a feature map to queries and keys (C/8 channels) and values (C channels). In the **shared**
module (SCA) one set of projections serves both modalities; in the plain one (CA) each has its own, at twice the parameters:

    refined = x + softmax(q k^T / sqrt(C/8)) v

What crosses? The text of Sec. 3.2 names only a modality's own q, k and v, and Fig. 3 leaves the question open. Two readings:

    "cross"    queries from one modality, keys and values from the other: the field's standard meaning, and our default
    "swapped"  each modality's own softmax(q k^T), unscaled, but the two maps change places: how a public re-implementation
               of CAFNet, from which the paper's CA descends, does it

Both have the same parameters. The value projection starts at zero, so that at first the module is the identity and
pretrained features pass unchanged. A scalar gate that starts at zero would do that too, but it can hardly open: Adam moves
one scalar by about lr a step, in this recipe by less than 0.07 in all. The sum of C weights, each moving that far, opens.

Shapes: B pairs, C channels, H W the map, N = H W tokens, d = C/8.

Run `python shared_attention.py` to compare shared with separate, and the blocks below with the plain formula.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

BLOCK = 2 ** 20  # scores computed at a time: 4 MB of float32, about what a core's cache holds


class BlockedAttention(torch.autograd.Function):
    """softmax(scale q k^T) v, a block of queries at a time, computed again in the backward pass.

    The N x N map is never stored whole: at 56 x 56 it would take 39 MB an image. PyTorch's own memory-saving kernel wants
    q, k and v of one width on a CPU; padding q and k to v's, 8 times theirs, nearly doubles the arithmetic.
    """

    @staticmethod
    def forward(ctx, q, k, v, scale):  # (B, N, d), (B, N, d), (B, N, C) -> (B, N, C)
        k, out = k * scale, v.new_empty(*q.shape[:2], v.shape[2])
        for images, rows in blocks(q):
            weights = (q[images, rows] @ k[images].mT).softmax(-1)  # (images, rows, N)
            out[images, rows] = weights @ v[images]
        ctx.save_for_backward(q, k, v, out)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, out = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)  # sums over blocks of bfloat16 are kept in float32
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        row_sums = (grad * out).sum(-1, keepdim=True)  # of weights * dweights, which softmax's gradient subtracts
        for images, rows in blocks(q):
            weights = (q[images, rows] @ k[images].mT).softmax(-1)
            dv[images] += weights.mT @ grad[images, rows]
            dscores = (grad[images, rows] @ v[images].mT).sub_(row_sums[images, rows]).mul_(weights)
            dq[images, rows] = dscores @ k[images]
            dk[images] += dscores.mT @ q[images, rows]
        return dq, (dk * ctx.scale).to(k.dtype), dv.to(v.dtype), None


def blocks(q):
    """Slices of images and of their queries: a few queries of one image where maps are large, many images where small."""
    B, N, _ = q.shape
    images, rows = max(1, BLOCK // N ** 2), max(1, min(N, BLOCK // N))
    for image in range(0, B, images):
        for row in range(0, N, rows):
            yield slice(image, image + images), slice(row, row + rows)


def attend(q, k, v, scale):
    """softmax(scale q k^T) v for (B, N, d), (B, N, d), (B, N, C), without the N x N map in memory."""
    if q.device.type == "cpu":
        return BlockedAttention.apply(q, k, v, scale)
    pad = (0, -q.shape[-1] % 8)  # the GPU kernel that takes v wider than q and k wants widths of whole 16 bytes
    q, k, v = F.pad(q, pad)[:, None], F.pad(k, pad)[:, None], v[:, None]  # one head
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[:, 0]


class Projections(nn.Module):
    """The three convolutions of Fig. 3. A 1x1 convolution is a linear layer on the tokens (B, N, C)."""

    def __init__(self, channels):
        super().__init__()
        self.query = nn.Linear(channels, channels // 8)
        self.key = nn.Linear(channels, channels // 8)
        self.value = nn.Linear(channels, channels)
        nn.init.zeros_(self.value.weight)  # ours: the module starts as the identity, see the top of the file
        nn.init.zeros_(self.value.bias)

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once: each layer would keep a copy of its own
        return self.query(x), self.key(x), self.value(x)


class CrossAttention(nn.Module):
    """(clinical, dermoscopy) -> (clinical, dermoscopy), each (B, C, H, W), each refined by what it read of the other.

    shared   True: one set of projections for both modalities (SCA); False: one each (CA)
    reading  "cross" or "swapped", see the top of the file
    """

    def __init__(self, channels, shared=True, reading="cross"):
        super().__init__()
        if reading not in ("cross", "swapped"):
            raise ValueError(f"reading is {reading!r}: choose cross or swapped")
        self.reading = reading
        self.scale = (channels // 8) ** -0.5 if reading == "cross" else 1.0
        self.projections = nn.ModuleList(Projections(channels) for _ in range(1 if shared else 2))

    def project(self, clinical, dermoscopy):
        """The (q, k, v) whose attention refines the clinical map, and the one that refines the dermoscopy map."""
        qc, kc, vc = self.projections[0](tokens(clinical))
        qd, kd, vd = self.projections[-1](tokens(dermoscopy))
        return ((qc, kd, vd), (qd, kc, vc)) if self.reading == "cross" else ((qd, kd, vc), (qc, kc, vd))

    def forward(self, clinical, dermoscopy):
        for_clinical, for_dermoscopy = self.project(clinical, dermoscopy)
        return (clinical + map_of(attend(*for_clinical, self.scale), clinical),
                dermoscopy + map_of(attend(*for_dermoscopy, self.scale), dermoscopy))

    def weights_at(self, clinical, dermoscopy, row, column):
        """Where the refined maps' point (row, column) reads from: two (B, H, W) maps, each summing to one per image."""
        place = row * clinical.shape[3] + column
        return tuple((q[:, place, None] @ k.transpose(1, 2) * self.scale).softmax(-1).view(len(q), *clinical.shape[2:])
                     for q, k, _ in self.project(clinical, dermoscopy))


def tokens(x):
    return x.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, C), a view where the channels are last in memory


def map_of(tokens, like):
    return tokens.transpose(1, 2).view(like.shape)  # (B, N, C) -> (B, C, H, W)


def main():
    import time

    def plain(q, k, v, scale):
        return (q @ k.transpose(1, 2) * scale).softmax(-1) @ v

    print("parameters of the attention of the four stages of Swin-T and ConvNeXt-T (channels 96, 192, 384, 768)")
    for shared in (True, False):
        count = sum(p.numel() for c in (96, 192, 384, 768) for p in CrossAttention(c, shared).parameters())
        print(f"  {'shared (SCA)' if shared else 'separate (CA)':14} {count:>10,}")

    print("one attention at 56 x 56 with 96 channels, 8 images, forward and backward, float32")
    q, k, v = (torch.randn(8, 56 * 56, width, requires_grad=True) for width in (12, 12, 96))
    results = []
    for name, function in (("blocks", attend), ("plain formula", plain)):
        saved = []
        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):
            out = function(q, k, v, 12 ** -0.5)
        results.append((out.detach(), *torch.autograd.grad(out.sum(), (q, k, v))))
        print(f"  {name:14} {time.perf_counter() - start:5.2f} s, keeps {sum(saved) / 2 ** 20:,.0f} MiB for the backward pass")
    difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*results))
    print(f"  largest relative difference, values and gradients: {difference:.1e}")


if __name__ == "__main__":
    main()
