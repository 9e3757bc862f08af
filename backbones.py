"""Backbones: a photo becomes four feature maps (the encoders of Table 8 of the PEMM paper).

A backbone is a kind of network, such as Swin V2; an encoder is one such network with its weights.

    encoder = build_encoder("swin_v2_t", weights="imagenet")
    maps = encoder(photos)  # a list of four
    features = encoder.pool(maps[3])

**The interface of every encoder.** Photos go through a stem and then through four stages; each
stage makes one map. There are B photos of H x W pixels, normalised as data.py does it. C_0, H_0 and
W_0 are channels and sides of what the stem makes, C_1, H_1 and W_1 of the first map, and so on:

    encoder(x)           (B, 3, H, W) -> [(B, C_1, H_1, W_1), ..., (B, C_4, H_4, W_4)]
    encoder.stem(x)      (B, 3, H, W) -> (B, C_0, H_0, W_0)
    encoder.stage(i, x)  (B, C_i, H_i, W_i) -> (B, C_{i+1}, H_{i+1}, W_{i+1}), for i = 0, 1, 2, 3
    encoder.channels     the tuple (C_1, C_2, C_3, C_4)
    encoder.pool(last)   (B, C_4, H_4, W_4) -> (B, C_4): the mean over all places of the last map.
                         In Swin a norm comes before it, in DenseNet norm and ReLU, in ConvNeXt a
                         norm comes after it

Python counts from 0: `stage(0, x)` makes the first map, which is `maps[0]` and has `channels[0]`
channels. So `stage(i, x)` receives channels[i - 1] channels (C_0 if i is 0). In Swin V2 and at 224
x 224 pixels, for example,

    stem: 3 x 224 x 224 -> 96 x 56 x 56        stage(0, x): 96 x 56 x 56 -> 96 x 56 x 56
                                               stage(1, x): 96 x 56 x 56 -> 192 x 28 x 28

PEMM calls stem, stage and pool itself, because its attention stands between the stages. What
torchvision's network makes of a photo, its logits, is its last linear layer applied to
`encoder.pool(maps[3])`.

    backbone           C_1 to C_4             H_1 to H_4 as shares of H    rounded        C_0  H_0
    swin_v2_t, swin_t  96, 192, 384, 768      1/4, 1/8, 1/16, 1/32         see below       96  1/4
    convnext_t         96, 192, 384, 768      1/4, 1/8, 1/16, 1/32         down            96  1/4
    convnext_atto      40, 80, 160, 320       1/4, 1/8, 1/16, 1/32         down            40  1/4
    resnet50           256, 512, 1024, 2048   1/4, 1/8, 1/16, 1/32         up              64  1/4
    densenet201        128, 256, 896, 1920    1/8, 1/16, 1/32, 1/32        see below       64  1/4
    mobilenet_v2       24, 32, 96, 1280       1/4, 1/8, 1/16, 1/32         up              16  1/2

Photos may have any sides from 32 pixels on. The steps from side to side are rounded one after the
other: in Swin the first, to 1/4, down and each half after it up, in DenseNet those of the stem up
and each half after it down. So 102 pixels become 25, 13, 7, 4 in Swin and 13, 6, 3, 3 in DenseNet.

"SwinTransformer (Tiny)" of the paper is Swin **V2**: only its parameter count fits the paper's
tables. Swin, Swin V2 and ConvNeXt are written out here; the other networks are torchvision's. All
modules have torchvision's names and places, so that its published weights load as they are.

The first part ends with `build_encoder`, whose helpers come last. To understand PEMM, skip
the rest: Swin V2 and Swin, ConvNeXt (the simpler one), torchvision's networks, the table
BACKBONES, and reading weights.

Run `python backbones.py` to see the shapes, and the parameters beside torchvision's own count.
"""

import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.ops import Permute, StochasticDepth


class Encoder(nn.Module):
    """The interface above, for a network whose modules run one after the other.

    A subclass sets
        channels   (C_1, C_2, C_3, C_4)
        features   all modules in their order, an nn.Sequential (the name is torchvision's)
        cuts       five positions in it: features[:cuts[0]] is the stem, and
                   features[cuts[i]:cuts[i + 1]] is stage i
    and overrides `pool` if the network has a final norm. ResNet50 has no such row of modules and
    overrides `stem` and `stage` instead.
    """

    def forward(self, x):
        maps = []
        x = self.stem(x)
        for i in range(4):
            x = self.stage(i, x)
            maps.append(x)
        return maps

    def stem(self, x):
        return self.features[: self.cuts[0]](x)

    def stage(self, i, x):
        return self.features[self.cuts[i] : self.cuts[i + 1]](x)

    def pool(self, last):
        return last.mean((2, 3))


class WeightsError(ValueError):
    """Weights that cannot be read or do not fit. The message says which, and what to do."""


def build_encoder(name, weights="none"):
    """Builds an encoder.

    name      a backbone's name in the table BACKBONES, towards the end of this file
    weights   "none"      random weights
              "imagenet"  the weights that torchvision publishes, downloaded once
              a path      of a file that holds a state dict in torchvision's names
              a dict      a state dict itself, for instance that of an encoder trained before

    If the weights hold a classifier, such as ImageNet's, it is left out and a message says so. All
    else must fit in name and shape (but num_batches_tracked, which old files lack). Otherwise
    WeightsError names the first of those that are missing, unknown or of another shape. An unknown
    backbone raises ValueError.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}: choose from {', '.join(BACKBONES)}")
    encoder = BACKBONES[name].make()
    encoder = encoder.to(memory_format=torch.channels_last)  # makes convolutions faster
    if isinstance(weights, dict):
        load_weights(encoder, name, weights, source="the state dict")
    elif weights == "imagenet":
        load_weights(encoder, name, download(name), source="torchvision's file")
    elif weights not in ("none", None):
        load_weights(encoder, name, read_state_dict(weights), source=weights)
    return encoder


# ---------------------------------------------------------------------------- Swin and Swin V2
#
# A token is one place of a map. Attention works in windows of M x M tokens, which is the papers'
# idea: its cost then grows with the number of tokens and not with its square. This section goes
# from small to large: windows, offsets in them, the two attentions, block, merging, encoder.
#
# Shapes: N = M * M tokens in a window, n windows in a map (row by row), h heads of d = C / h
# channels each. Here channels come last, (B, H, W, C), and H x W are the sides of a map.


def cut_into_windows(x, M):
    """(B, H, W, C) -> (B, n, N, C). The sides must be multiples of M."""
    B, H, W, C = x.shape
    x = x.view(B, H // M, M, W // M, M, C)
    x = x.transpose(2, 3)  # (B, H / M, W / M, M, M, C)
    return x.reshape(B, -1, M * M, C)


def join_windows(windows, M, H, W):
    """(B, n, N, C) -> (B, H, W, C): undoes `cut_into_windows`."""
    B, _, _, C = windows.shape
    x = windows.view(B, H // M, W // M, M, M, C)
    x = x.transpose(2, 3)  # (B, H / M, M, W / M, M, C)
    return x.reshape(B, H, W, C)


def shift_mask(H, W, M, shift_y, shift_x, device):
    """What is added to attention scores after a shift: -100 for pairs that must not meet, else 0.

    H, W          sides of the map, multiples of M
    shift_y, _x   by how many tokens it was shifted: 0 to M - 1
    returns       (n, 1, N, N)

    The shift rolls the map's top rows to its bottom and its left columns to its right (Swin,
    Fig. 4). There they share windows with tokens that are far away in the photo. So each token
    gets the number of the region it comes from, and reads only tokens with the same number. Here
    with M = 2, four windows and a shift of 1:

        0 0 | 0 1      0  stayed
        0 0 | 0 1      1  came from the left edge
        ----+----      2  came from the top edge
        0 0 | 0 1      3  came from both
        2 2 | 2 3

    -100 is the published code's number. Beside scores of the usual size, the softmax makes of it
    about e^-100: nothing.
    """
    # After the shift, what came from the top edge are the last rows; without a shift, no rows.
    from_top = torch.arange(H, device=device) >= H - shift_y  # (H)
    from_left = torch.arange(W, device=device) >= W - shift_x  # (W)
    region = 2 * from_top[:, None].int() + from_left[None, :].int()  # (H, W)
    region = cut_into_windows(region[None, :, :, None], M)  # (1, n, N, 1)
    region = region[0, :, :, 0]  # (n, N)
    apart = region[:, :, None] != region[:, None, :]  # (n, N, N)
    mask = torch.where(apart, -100.0, 0.0)
    return mask[:, None]  # (n, 1, N, N), the same for all heads


def split_heads(qkv, heads):
    """(B, n, N, 3C) -> queries, keys and values, each (B, n, h, N, d)."""
    B, n, N, _ = qkv.shape
    qkv = qkv.view(B, n, N, 3, heads, -1)  # (B, n, N, 3, h, d)
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)
    return q, k, v


def join_heads(x):
    """(B, n, h, N, d) -> (B, n, N, C)."""
    return x.transpose(2, 3).flatten(3)


def relative_position_index(M):
    """For each pair of tokens in a window the number of their offset: (N * N), from 0 on.

    The offset of two tokens is (dy, dx), each from 1 - M to M - 1. The (2M - 1)^2 offsets are
    numbered by rising dy, and those of one dy by rising dx.
    """
    y = torch.arange(M).repeat_interleave(M)  # (N), row of each token; for M = 2: 0 0 1 1
    x = torch.arange(M).repeat(M)  # (N), column of each token; for M = 2: 0 1 0 1
    dy = y[:, None] - y[None, :]  # (N, N)
    dx = x[:, None] - x[None, :]
    number = (dy + M - 1) * (2 * M - 1) + (dx + M - 1)
    return number.flatten()


def log_spaced_offsets(M):
    """All offsets (dy, dx), on the scale on which Swin V2's small network G reads them.

    Their order must be that of the rows in `relative_position_index`: all dx for one dy.

    V2, Eq. 4 takes the logarithm, which tells near tokens apart better than far ones. The published
    code scales before and after it: the offsets to -8 ... 8, whatever M is, and the logarithms by
    1 / log2(8), which is 1 / 3. So G reads numbers of about -1 to 1: (1, 2M - 1, 2M - 1, 2).
    """
    offsets = torch.arange(1 - M, M) / (M - 1) * 8  # (2M - 1)
    offsets = offsets.sign() * torch.log2(1 + offsets.abs()) / 3
    dy, dx = torch.meshgrid(offsets, offsets, indexing="ij")
    table = torch.stack((dy, dx), dim=-1)  # (2M - 1, 2M - 1, 2)
    return table[None]


class WindowAttentionV2(nn.Module):
    """The attention of Swin V2 (Liu et al. 2022): scaled cosine attention with a continuous bias.

    Sim(q_i, k_j) = cos(q_i, k_j) / tau + B_ij (V2, Eq. 2); its softmax over j weighs the values.
    A small network G computes B from the offset of tokens i and j: B_ij = G(dy, dx) (V2, Eq. 3).
    """

    def __init__(self, channels, heads, M):
        super().__init__()
        self.heads = heads
        self.M = M
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))  # log(1 / tau)
        self.cpb_mlp = nn.Sequential(  # G, the "continuous position bias"
            nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, heads, bias=False)
        )
        # Both are computed and not learned, but torchvision's files hold them, and what a file
        # holds takes the place of what is computed here.
        self.register_buffer("relative_coords_table", log_spaced_offsets(M))
        self.register_buffer("relative_position_index", relative_position_index(M))

    def position_bias(self):
        """B of Eq. 2: (h, N, N). As in the published code, a sigmoid keeps it between 0 and 16."""
        table = self.cpb_mlp(self.relative_coords_table)  # (1, 2M - 1, 2M - 1, h)
        table = 16 * table.sigmoid()
        table = table.flatten(0, 2)  # ((2M - 1)^2, h), a row for each number of an offset
        bias = table[self.relative_position_index]  # (N * N, h)
        N = self.M**2
        return bias.view(N, N, self.heads).permute(2, 0, 1)

    def forward(self, windows, mask):
        """(B, n, N, C) -> (B, n, N, C). mask: what `shift_mask` returns, or 0 without a shift."""
        q_bias, k_bias, v_bias = self.qkv.bias.chunk(3)
        zeros = torch.zeros_like(k_bias)  # V2's keys have no bias, though files hold one
        qkv_bias = torch.cat((q_bias, zeros, v_bias))  # q, k, v: the order of split_heads
        qkv = F.linear(windows, self.qkv.weight, qkv_bias)  # (B, n, N, 3C)
        q, k, v = split_heads(qkv, self.heads)  # (B, n, h, N, d) each

        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()  # 1 / tau, and tau >= 0.01
        q = F.normalize(q, dim=-1) * scale  # to scale q is cheaper than to scale the scores
        k = F.normalize(k, dim=-1)
        scores = q @ k.transpose(-2, -1)  # cos(q, k) / tau: (B, n, h, N, N)
        bias = self.position_bias() + mask  # (h, N, N), after a shift (n, h, N, N)
        scores = scores + bias.to(scores.dtype)  # under autocast the scores are bfloat16
        x = scores.softmax(-1) @ v  # (B, n, h, N, d)
        return self.proj(join_heads(x))


class WindowAttention(nn.Module):
    """The attention of Swin (Liu et al. 2021): softmax(Q K^T / sqrt(d) + B) V (Swin, Eq. 4).

    B is learned directly: a table holds one number for each offset of two tokens and each head.
    """

    def __init__(self, channels, heads, M):
        super().__init__()
        self.heads = heads
        self.M = M
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * M - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(M))

    def position_bias(self):
        """B of Eq. 4: (h, N, N)."""
        bias = self.relative_position_bias_table[self.relative_position_index]  # (N * N, h)
        N = self.M**2
        return bias.view(N, N, self.heads).permute(2, 0, 1)

    def forward(self, windows, mask):
        """(B, n, N, C) -> (B, n, N, C). mask: what `shift_mask` returns, or 0 without a shift."""
        q, k, v = split_heads(self.qkv(windows), self.heads)  # (B, n, h, N, d) each
        q = q * q.shape[-1] ** -0.5  # 1 / sqrt(d): to scale q is cheaper than to scale the scores
        scores = q @ k.transpose(-2, -1)  # Q K^T / sqrt(d): (B, n, h, N, N)
        bias = self.position_bias() + mask  # (h, N, N), after a shift (n, h, N, N)
        scores = scores + bias.to(scores.dtype)  # under autocast the scores are bfloat16
        x = scores.softmax(-1) @ v  # (B, n, h, N, d)
        return self.proj(join_heads(x))


class SwinBlock(nn.Module):
    """Attention in windows, then an MLP, each with a norm and a shortcut: (B, H, W, C) stays.

    Swin puts the norm before them, V2 behind. `shift` is 0 or M // 2: every second block shifts its
    windows, so that tokens of neighbouring windows meet. Stochastic depth (Huang et al. 2016): in
    training a photo skips the attention, or the MLP, with probability `drop_rate`.
    """

    def __init__(self, channels, heads, M, shift, drop_rate, v2):
        super().__init__()
        self.M = M
        self.shift = shift
        self.v2 = v2
        self.norm1 = nn.LayerNorm(channels)
        if v2:
            self.attn = WindowAttentionV2(channels, heads, M)
        else:
            self.attn = WindowAttention(channels, heads, M)
        self.stochastic_depth = StochasticDepth(drop_rate, "row")  # "row": for each photo anew
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Dropout(0.0),  # does nothing; torchvision has one here, so the next layer is mlp.3
            nn.Linear(4 * channels, channels),
        )

    def forward(self, x):
        if self.v2:  # V2, Fig. 1
            x = x + self.stochastic_depth(self.norm1(self.window_attention(x)))
            return x + self.stochastic_depth(self.norm2(self.mlp(x)))
        # Swin, Eq. 3
        x = x + self.stochastic_depth(self.window_attention(self.norm1(x)))
        return x + self.stochastic_depth(self.mlp(self.norm2(x)))

    def window_attention(self, x):
        """Attention in the windows of a map: pad, shift, cut, attend, and all the way back."""
        _, H, W, _ = x.shape
        M = self.M
        # Zeros below and on the right fill the last windows. They are not masked: the other tokens
        # read them, as in torchvision. At 224 pixels V2 pads so in its stages i = 1, 2 and 3.
        padded_H = math.ceil(H / M) * M
        padded_W = math.ceil(W / M) * M
        if padded_H > H or padded_W > W:
            x = F.pad(x, (0, 0, 0, padded_W - W, 0, padded_H - H))  # before and after C, W and H
        # A side of a single window is not shifted: all its tokens meet anyway.
        shift_y = self.shift if padded_H > M else 0
        shift_x = self.shift if padded_W > M else 0
        shifted = shift_y > 0 or shift_x > 0

        mask = 0  # it is added to the scores: 0 changes nothing
        if shifted:
            x = x.roll((-shift_y, -shift_x), dims=(1, 2))
            mask = shift_mask(padded_H, padded_W, M, shift_y, shift_x, x.device)
        windows = cut_into_windows(x, M)  # (B, n, N, C)
        windows = self.attn(windows, mask)  # (B, n, N, C)
        x = join_windows(windows, M, padded_H, padded_W)
        if shifted:
            x = x.roll((shift_y, shift_x), dims=(1, 2))
        return x[:, :H, :W]  # without the padding


class PatchMerging(nn.Module):
    """2 x 2 tokens become one: (B, H, W, C) -> (B, H / 2, W / 2, 2C), odd sides rounded up.

    The four are put side by side, 4C channels, and reduced to 2C (Swin, Sec. 3.1). Swin puts the
    norm before the reduction, V2 behind.
    """

    def __init__(self, channels, v2):
        super().__init__()
        self.v2 = v2
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(2 * channels if v2 else 4 * channels)

    def forward(self, x):
        _, H, W, _ = x.shape
        if H % 2 == 1 or W % 2 == 1:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))  # to even sides
        top_left = x[:, 0::2, 0::2]
        bottom_left = x[:, 1::2, 0::2]
        top_right = x[:, 0::2, 1::2]
        bottom_right = x[:, 1::2, 1::2]
        # Bottom left before top right: published weights expect this order.
        x = torch.cat((top_left, bottom_left, top_right, bottom_right), dim=-1)
        if self.v2:
            return self.norm(self.reduction(x))
        return self.reduction(self.norm(x))


def draw_weights(network, kinds):
    """Draws weights for all layers of these kinds, as torchvision does. Biases start at zero."""
    for module in network.modules():
        if isinstance(module, kinds):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Swin(Encoder):
    """Swin (Liu et al. 2021) and Swin V2 (Liu et al. 2022), both of the size Tiny.

    v2         whether it is Swin V2
    M          side of a window: the published weights have 8 in V2, 7 in Swin

    The stem makes a token of 4 x 4 pixels. Every stage but the first begins by merging tokens; the
    rest are blocks. Their drop rates rise from 0 to 0.2, as published for Tiny.
    """

    channels = (96, 192, 384, 768)

    def __init__(self, v2, M):
        super().__init__()
        depths = (2, 2, 6, 2)
        heads = (3, 6, 12, 24)
        stem = nn.Sequential(
            nn.Conv2d(3, self.channels[0], kernel_size=4, stride=4),
            Permute([0, 2, 3, 1]),  # (B, H_0, W_0, C_0)
            nn.LayerNorm(self.channels[0]),
        )
        self.features = nn.Sequential(stem)
        self.cuts = []
        blocks_before = 0
        for i in range(4):
            self.cuts.append(len(self.features))  # where stage i begins
            if i > 0:
                self.features.append(PatchMerging(self.channels[i - 1], v2))
            blocks = nn.Sequential()
            for j in range(depths[i]):
                shift = M // 2 if j % 2 == 1 else 0
                drop_rate = 0.2 * blocks_before / (sum(depths) - 1)
                blocks.append(SwinBlock(self.channels[i], heads[i], M, shift, drop_rate, v2))
                blocks_before += 1
            self.features.append(blocks)
        self.cuts.append(len(self.features))  # now [1, 2, 4, 6, 8]
        self.norm = nn.LayerNorm(self.channels[-1])
        draw_weights(
            self, nn.Linear
        )  # the stem's convolution keeps torch's start, as in torchvision

    # Swin's modules have the channels last: (B, H, W, C). The interface has them second.

    def stem(self, x):
        x = self.features[0](x)
        return x.permute(0, 3, 1, 2)

    def stage(self, i, x):
        modules = self.features[self.cuts[i] : self.cuts[i + 1]]
        x = x.permute(0, 2, 3, 1)
        x = modules(x)
        return x.permute(0, 3, 1, 2)

    def pool(self, last):
        last = last.permute(0, 2, 3, 1)
        return self.norm(last).mean((1, 2))


# ------------------------------------------------------------------------------------ ConvNeXt


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W)."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        x = super().forward(x)
        return x.permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution and an MLP at each place (ConvNeXt, Fig. 4). Shapes do not change."""

    def __init__(self, channels, drop_rate):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels),  # depthwise
            Permute([0, 2, 3, 1]),  # (B, H, W, C)
            nn.LayerNorm(channels, eps=1e-6),  # published so; Swin has torch's 1e-5
            nn.Linear(channels, 4 * channels),  # a 1x1 convolution, as the faster linear layer
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            Permute([0, 3, 1, 2]),  # (B, C, H, W)
        )
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), 1e-6))  # starts near nothing
        self.stochastic_depth = StochasticDepth(drop_rate, "row")  # as in SwinBlock

    def forward(self, x):
        return x + self.stochastic_depth(self.layer_scale * self.block(x))


class ConvNeXt(Encoder):
    """ConvNeXt (Liu et al. 2022, "A ConvNet for the 2020s").

    depths     number of blocks in each of the four stages
    channels   (C_1, C_2, C_3, C_4)

    The stem makes a place of 4 x 4 pixels. Every stage but the first begins by halving the sides;
    the rest are blocks. Their drop rates rise from 0 to 0.1, as published for Tiny.
    """

    def __init__(self, depths, channels):
        super().__init__()
        self.channels = channels
        stem = nn.Sequential(
            nn.Conv2d(3, channels[0], kernel_size=4, stride=4),
            LayerNorm2d(channels[0], eps=1e-6),
        )
        self.features = nn.Sequential(stem)
        self.cuts = []
        blocks_before = 0
        for i in range(4):
            self.cuts.append(len(self.features))  # where stage i begins
            if i > 0:
                norm = LayerNorm2d(channels[i - 1], eps=1e-6)
                halve = nn.Conv2d(channels[i - 1], channels[i], kernel_size=2, stride=2)
                self.features.append(nn.Sequential(norm, halve))
            blocks = nn.Sequential()
            for _ in range(depths[i]):
                drop_rate = 0.1 * blocks_before / (sum(depths) - 1)
                blocks.append(ConvNeXtBlock(channels[i], drop_rate))
                blocks_before += 1
            self.features.append(blocks)
        self.cuts.append(len(self.features))  # now [1, 2, 4, 6, 8]
        # Only the final norm. It is called so because in torchvision it begins the classifier.
        self.classifier = nn.Sequential(nn.LayerNorm(channels[-1], eps=1e-6))
        draw_weights(self, (nn.Conv2d, nn.Linear))

    def pool(self, last):
        return self.classifier(last.mean((2, 3)))


# ----------------------------------------------------------- torchvision's networks, in stages


class ResNet50(Encoder):
    """ResNet-50 (He et al. 2016). torchvision has no `features` here, but a name for each part."""

    channels = (256, 512, 1024, 2048)

    def __init__(self):
        super().__init__()
        network = models.resnet50()
        self.conv1 = network.conv1
        self.bn1 = network.bn1
        self.relu = network.relu
        self.maxpool = network.maxpool
        self.layer1 = network.layer1
        self.layer2 = network.layer2
        self.layer3 = network.layer3
        self.layer4 = network.layer4

    def stem(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        return self.maxpool(x)

    def stage(self, i, x):
        layers = (self.layer1, self.layer2, self.layer3, self.layer4)
        return layers[i](x)


class DenseNet201(Encoder):
    """DenseNet-201 (Huang et al. 2017). A stage is a dense block and the transition behind it.

    The transition halves the channels and the map; the last block has none. `features` is

        conv0 norm0 relu0 pool0 | denseblock1 transition1 | ... | denseblock4 | norm5
    """

    channels = (128, 256, 896, 1920)
    cuts = (4, 6, 8, 10, 11)

    def __init__(self):
        super().__init__()
        self.features = models.densenet201().features

    def pool(self, last):
        last = self.features.norm5(last)  # the last of `features`, which is in no stage
        return last.relu().mean((2, 3))


class MobileNetV2(Encoder):
    """MobileNetV2 (Sandler et al. 2018), for laptops. A stage begins where the map is halved.

    The last stage includes the final 1x1 convolution, from 320 to 1280 channels.
    """

    channels = (24, 32, 96, 1280)
    cuts = (2, 4, 7, 14, 19)

    def __init__(self):
        super().__init__()
        self.features = models.mobilenet_v2().features


# -------------------------------------------------------------------------- backbones by name


@dataclass
class Backbone:
    """A row of BACKBONES."""

    make: Callable  # makes an encoder with random weights; takes no arguments
    head: str  # torchvision's name of the ImageNet classifier, which encoders do not have
    published: models.WeightsEnum | None = None  # torchvision's ImageNet weights


BACKBONES = {
    "swin_v2_t": Backbone(
        make=partial(Swin, v2=True, M=8),
        head="head",
        published=models.Swin_V2_T_Weights.IMAGENET1K_V1,
    ),
    "swin_t": Backbone(
        make=partial(Swin, v2=False, M=7),
        head="head",
        published=models.Swin_T_Weights.IMAGENET1K_V1,
    ),
    "convnext_t": Backbone(
        make=partial(ConvNeXt, depths=(3, 3, 9, 3), channels=(96, 192, 384, 768)),
        head="classifier.2",
        published=models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1,
    ),
    # For laptops. The depths and channels are those of ConvNeXt V2's Atto, the blocks ConvNeXt's.
    "convnext_atto": Backbone(
        make=partial(ConvNeXt, depths=(2, 2, 6, 2), channels=(40, 80, 160, 320)),
        head="classifier.2",
    ),
    "resnet50": Backbone(
        make=ResNet50,
        head="fc",
        published=models.ResNet50_Weights.IMAGENET1K_V1,
    ),
    "densenet201": Backbone(
        make=DenseNet201,
        head="classifier",
        published=models.DenseNet201_Weights.IMAGENET1K_V1,
    ),
    "mobilenet_v2": Backbone(
        make=MobileNetV2,
        head="classifier.1",
        published=models.MobileNet_V2_Weights.IMAGENET1K_V1,
    ),
}


# ------------------------------------------------------------------------------------- weights


def load_weights(encoder, name, state, source):
    """Puts a state dict in torchvision's names into the encoder, which is a backbone `name`.

    `source` is what the messages call the weights. Raises WeightsError if they do not fit.
    """
    head = BACKBONES[name].head
    weights = {}
    has_head = False
    for key, value in state.items():
        key = str(key)  # whatever it is, load_state_dict names what does not fit
        if key.startswith(f"{head}."):
            has_head = True
            continue
        # DenseNet's file is older than today's names: norm.1 of a denselayer is its norm1 today.
        key = re.sub(r"(denselayer\d+\.)(norm|conv)\.([12])", r"\1\2\3", key)
        weights[key] = value
    # `weights` is a plain dict and so without the version number that a state dict has. Then torch
    # takes it for an old one and does not miss num_batches_tracked, which old files of CNNs lack.
    try:
        encoder.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise WeightsError(f"{source} does not fit {name}: {shorten(error)}") from error
    if has_head:
        print(f"{source}: loaded without its classifier, {head}")


def shorten(error):
    """The beginning of torch's message about weights that do not fit; the whole can be very long.

    It has a line for all that is missing, one for all that is unexpected, and one for each weight
    of another shape.
    """
    lines = str(error).splitlines()[1:6]  # line 0 is a title
    lines = [textwrap.shorten(line, 300, placeholder=" ...") for line in lines]
    return " ".join(lines)


def download(name):
    """torchvision's ImageNet weights as a state dict, from torch's cache or from the network."""
    published = BACKBONES[name].published
    if published is None:
        raise WeightsError(
            f"torchvision has no ImageNet weights for {name}: use --weights none or a path."
        )
    try:
        return published.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # no network, a full disk, a wrong hash, a damaged file in the cache
        reason = textwrap.shorten(str(error), 150, placeholder=" ...")
        raise WeightsError(
            f"no ImageNet weights for {name} ({reason}): fetch {published.url} elsewhere and put "
            f"it into {torch.hub.get_dir()}/checkpoints, or use --weights none with a higher --lr "
            "such as 3e-4."
        ) from error


def read_checkpoint(path):
    """Reads a dict that torch.save has written to a file. Its tensors come to the CPU.

    Everything that PEMM reads by torch.load it reads here, because torch.load can run code that is
    hidden in a file; weights_only=True refuses all but tensors and plain Python values. Raises
    WeightsError, one sentence with the path, if the file is missing, damaged or refused.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}.") from error
    except Exception as error:  # torch raises many types, and its messages do not have the path
        raise WeightsError(
            f"{path} is no file of weights, or damaged, or holds objects that could run code."
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds no dict but a {type(content).__name__}.")
    return content


def read_state_dict(path):
    """Reads a state dict, a dict of names to tensors, from a file."""
    state = read_checkpoint(path)
    if "network" in state and "flags" in state:
        folder = Path(path).parent
        raise WeightsError(f"{path} is part of a run: give the run's folder, {folder}, instead.")
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise WeightsError(
                f"{path} is no state dict, because {key!r} in it is no tensor: save what "
                "`network.state_dict()` returns, and nothing around it."
            )
    return state


def main():
    maps_title = "maps of 224 x 224 pixels (C x H x W)"
    print(f"{'backbone':14} {maps_title:54} parameters  with classifier  torchvision says")
    for name, backbone in BACKBONES.items():
        encoder = build_encoder(name).eval()
        with torch.no_grad():
            maps = encoder(torch.zeros(1, 3, 224, 224))
        shapes = ""
        for x in maps:
            _, C, H, W = x.shape
            shapes += f"{C}x{H}x{W} "
        own = sum(parameter.numel() for parameter in encoder.parameters())
        # torchvision's number, and the paper's, include the 1000-class ImageNet classifier.
        with_classifier = own + 1000 * encoder.channels[-1] + 1000
        published = "nothing"
        if backbone.published is not None:
            published = f"{backbone.published.meta['num_params']:,}"
        print(f"{name:14} {shapes:54} {own:>10,} {with_classifier:>16,} {published:>17}")


if __name__ == "__main__":
    main()
