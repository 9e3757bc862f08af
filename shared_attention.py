"""Shared cross-attention: two feature maps read each other (PEMM, Sec. 3.2 and Fig. 3).

Shapes: B lesions, C channels, a map of H rows and W columns, N = H * W its places ("tokens").

After each stage of the encoder, the clinical map reads the dermoscopy map and the other way round.
Three layers turn a map of C channels into queries q and keys k, of d = C // 8 channels each, and
values v, of C channels:

    clinical   + softmax(q_c k_d^T / sqrt(d)) v_d      clinical reads dermoscopy
    dermoscopy + softmax(q_d k_c^T / sqrt(d)) v_c      dermoscopy reads clinical

In the *shared* module (SCA) both photos use the same three layers; in the separate one (CA) each
photo has its own three.

The paper's text does not settle what crosses. This is the usual meaning of cross-attention:
queries from one photo, keys and values from the other. In another reading the photos exchange their
weights: clinical reads attention(q_d, k_d, v_c) and dermoscopy attention(q_c, k_c, v_d).

The layer of the values starts at zero (not in the paper). So at first nothing is added, and the
pretrained encoder is not disturbed. In the first step the gradients of q and k are zero too, and of
the three layers only that of the values moves; after it the others learn, too.

The method ends with `NoAttention`. AMMFM's attention follows, then `fast_attention`, which the
modules call: it chooses the fastest way to compute `attention`. `python shared_attention.py` counts
parameters.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v: for each query a weighted mean of the values.

    N places read M places: q (B, N, d), k (B, M, d), v (B, M, C) -> (B, N, C). In PEMM M = N.

    Who changes this formula changes `fused_attention` as well, which has it again for CUDA. Who
    adds a dropout sets preserve_rng_state=True in `attention_in_blocks`.
    """
    d = q.shape[-1]
    q = q / math.sqrt(d)  # it is cheaper to scale the queries than the scores
    scores = q @ k.transpose(1, 2)  # (B, N, M)
    weights = scores.softmax(dim=-1)  # (B, N, M); the M weights of a query sum to 1
    return weights @ v


def to_tokens(x):
    """(B, C, H, W) -> (B, N, C), row by row."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens, H, W):
    """(B, N, C) -> (B, C, H, W): undoes `to_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, (H, W))


def query_channels(channels):
    """d = C // 8. Not in the paper, but with it the parameters are those of Table 5 (see main)."""
    if channels < 8:
        raise ValueError(f"a map of {channels} channels: attention needs at least 8")
    return channels // 8


class Projections(nn.Module):
    """The three 1x1 convolutions of Fig. 3. On tokens a 1x1 convolution is a linear layer."""

    def __init__(self, channels):
        super().__init__()
        self.query = nn.Linear(channels, query_channels(channels))
        self.key = nn.Linear(channels, query_channels(channels))
        self.value = nn.Linear(channels, channels)
        nn.init.zeros_(self.value.weight)  # not in the paper: see the top of the file
        nn.init.zeros_(self.value.bias)

    def forward(self, tokens):
        """tokens (B, N, C) -> q (B, N, d), k (B, N, d), v (B, N, C)"""
        return self.query(tokens), self.key(tokens), self.value(tokens)


class CrossAttention(nn.Module):
    """Two maps (B, C, H, W) -> the same two, each with what it reads of the other added (Fig. 3).

    shared=True is the paper's SCA, shared=False its CA (Table 5).
    """

    def __init__(self, channels, shared=True):
        super().__init__()
        self.project_clinical = Projections(channels)
        if shared:
            # One object under two names. It is in the state dict twice, in parameters() once.
            self.project_dermoscopy = self.project_clinical
        else:
            self.project_dermoscopy = Projections(channels)

    def forward(self, clinical, dermoscopy):
        H, W = clinical.shape[2:]  # the two maps must have the same shape
        q_c, k_c, v_c = self.project_clinical(to_tokens(clinical))
        q_d, k_d, v_d = self.project_dermoscopy(to_tokens(dermoscopy))
        # fast_attention gives what `attention` gives, in less time and memory.
        read_by_clinical = fast_attention(q_c, k_d, v_d)  # (B, N, C)
        read_by_dermoscopy = fast_attention(q_d, k_c, v_c)  # (B, N, C)
        new_clinical = clinical + to_map(read_by_clinical, H, W)
        new_dermoscopy = dermoscopy + to_map(read_by_dermoscopy, H, W)
        return new_clinical, new_dermoscopy


class NoAttention(nn.Module):
    """Takes the place of CrossAttention where nothing crosses: Table 5 without CA and SCA."""

    def forward(self, clinical, dermoscopy):
        return clinical, dermoscopy


# The method ends here. What follows is one of its relatives, then speed.


class OneWayAttention(nn.Module):
    """AMMFM: the dermoscopy map reads the clinical map, and nothing flows back.

    The two maps come from different encoders and may differ in channels and in size. That paper's
    abstract, all that we know of it, leaves d and the first values open: d is C // 8 of dermoscopy,
    and the values start at zero, as in Projections.
    """

    def __init__(self, clinical_channels, dermoscopy_channels):
        super().__init__()
        d = query_channels(dermoscopy_channels)
        self.query = nn.Linear(dermoscopy_channels, d)
        self.key = nn.Linear(clinical_channels, d)
        self.value = nn.Linear(clinical_channels, dermoscopy_channels)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, clinical, dermoscopy):
        H, W = dermoscopy.shape[2:]
        q = self.query(to_tokens(dermoscopy))
        k = self.key(to_tokens(clinical))
        v = self.value(to_tokens(clinical))
        new_dermoscopy = dermoscopy + to_map(fast_attention(q, k, v), H, W)
        return clinical, new_dermoscopy


# ------------------------------------------------------------ fast ways to compute `attention`

# Up to this many places that are read, the plain formula is the fastest on a CPU. At 224 pixels
# that is every stage but the first, which has 56 * 56 = 3136 places. Measured by
# tests/benchmark.py.
LARGEST_PLAIN = 32 * 32
# The scores of 512 queries for 3136 places take 512 * 3136 * 4 bytes = 6 MB: a processor's cache
# holds them.
QUERIES_PER_BLOCK = 512


def fast_attention(q, k, v):
    """Computes `attention`, with the same shapes, in the way that suits the device and the size."""
    if (
        q.device.type == "cuda"
    ):  # not Apple's mps, where this kernel has been wrong in some versions
        return fused_attention(q, k, v)
    if k.shape[1] <= LARGEST_PLAIN:
        return attention(q, k, v)
    return attention_in_blocks(q, k, v)


def fused_attention(q, k, v):
    """torch's kernel, which never writes the N x M weights to the GPU's memory.

    It is fast only if q and k have a multiple of 8 channels. So zeros are added to them, which
    change no product q k^T. (v has C channels, a multiple of 8 in every encoder so far; with
    another number it is only slower.)
    """
    d = q.shape[-1]  # the scale must be that of the true d
    padded = math.ceil(d / 8) * 8
    q = F.pad(q, (0, padded - d))
    k = F.pad(k, (0, padded - d))
    # The kernel wants (B, heads, N, channels). We have one head.
    scale = 1 / math.sqrt(d)
    out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=scale)
    return out[:, 0]


def attention_in_blocks(q, k, v):
    """`attention` for 512 queries of one lesion at a time, so that the weights stay in the cache.

    The weights of a block are not kept for the backward pass but computed again there (checkpoint):
    kept, they would take 39 MB a lesion and direction at 56 x 56 places. torch's kernel is slower
    on a CPU.
    """
    lesions = []
    for q_one, k_one, v_one in zip(q.split(1), k.split(1), v.split(1)):  # (1, N, d) and so on
        blocks = []
        for queries in q_one.split(QUERIES_PER_BLOCK, dim=1):
            block = checkpoint(
                attention,
                queries,
                k_one,
                v_one,
                use_reentrant=False,
                preserve_rng_state=False,  # `attention` draws no random numbers
            )
            blocks.append(block)  # (1, up to 512, C)
        lesions.append(torch.cat(blocks, dim=1))
    return torch.cat(lesions)


def main():
    print("parameters of the attention after Swin-V2-T's stages; the paper's from its Table 5")
    rows = (
        ("shared (SCA)", True, "31.12 M - 30.14 M = 0.98 M"),
        ("separate (CA)", False, "32.10 M - 30.14 M = 1.96 M"),
    )
    for name, shared, paper in rows:
        count = 0
        for channels in (96, 192, 384, 768):  # of Swin-V2-T's four stages
            module = CrossAttention(channels, shared)
            count += sum(parameter.numel() for parameter in module.parameters())
        print(f"{name:14} {count:>10,}    paper: {paper}")


if __name__ == "__main__":
    main()
