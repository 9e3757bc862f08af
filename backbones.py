"""Backbones: one image becomes four feature maps (the encoders of Table 8 of the PEMM paper).

`build("swin_v2_t", "imagenet")` gives an encoder; every encoder keeps one contract:

    encoder.channels    4 ints, the width of each stage
    encoder.stem(x)     image (B, 3, H, W)  ->  the first feature map
    encoder.stages      4 modules; each maps (B, C_{i-1}, H_{i-1}, W_{i-1}) -> (B, C_i, H_i, W_i)
    encoder(x)          the list of the 4 stage outputs
    encoder.pool(last)  final norm and global average pool: (B, C_4, H_4, W_4) -> (B, C_4)

so that `torchvision_head(encoder.pool(encoder(x)[-1]))` equals torchvision's logits. Swin-T, Swin-V2-T and ConvNeXt are
written out by hand; ResNet-50 and DenseNet-201 are torchvision's modules cut into stages. "SwinTransformer (Tiny)" of the
paper is Swin-**V2**-T: only its parameter count fits the paper's tables.

Shapes: B images, C channels, H W the map, N tokens of a window, h heads, d channels a head. Feature maps go around as
(B, C, H, W) with the channels last in memory, so that a transformer's (B, H, W, C) is a view of them and not a copy.

Run `python backbones.py` to see the shapes, the parameters and the largest difference from torchvision.
"""
import math
import os
import re
from collections import OrderedDict
from typing import Callable, NamedTuple
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.models import WeightsEnum


class WeightsError(ValueError):
    """Weights that are missing or do not fit; the message says which and what to do."""


class Encoder(nn.Module):
    """The contract above. A subclass sets `channels`, `stem` and `stages` and defines `pool`."""

    def forward(self, x):
        maps, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class DropPath(nn.Module):
    """The residual sum x + y with stochastic depth: in training a sample's y is dropped with probability p and else divided
    by 1 - p. Sum and division are a single pass over the map."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x, y):
        if not self.training or self.p == 0:
            return x + y
        keep = torch.empty((len(y), 1, 1, 1), dtype=y.dtype, device=y.device).bernoulli_(1 - self.p) / (1 - self.p)
        return torch.addcmul(x, y, keep)


def drop_path_rates(largest, depths):
    """Rates rise linearly from 0 at the first block to `largest` at the last; one list a stage."""
    rates = [largest * i / (sum(depths) - 1) for i in range(sum(depths))]
    return [[rates.pop(0) for _ in range(depth)] for depth in depths]


# ------------------------------------------------------------------------------------------------------------ ConvNeXt


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W). It leaves the channels last in memory."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """x + gamma * pwconv2(GELU(pwconv1(LN(dwconv(x))))) (ConvNeXt, Fig. 4); the 1x1 convolutions are linear layers on
    (B, H, W, C), the faster of the two equal forms that the paper's code names."""

    def __init__(self, channels, drop_path):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 1e-6))
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        y = self.dwconv(x).permute(0, 2, 3, 1)  # (B, H, W, C)
        y = self.act(self.pwconv1(self.norm(y)))  # (B, H, W, 4C)
        gamma = self.gamma.flatten()  # times the weights is times the map, and saves passes over the map
        y = F.linear(y, gamma[:, None] * self.pwconv2.weight, gamma * self.pwconv2.bias)  # (B, H, W, C)
        return self.drop_path(x, y.permute(0, 3, 1, 2))


class ConvNeXt(Encoder):
    """ConvNeXt (Liu et al. 2022): patchify stem, then per stage a 2x2 downsampling (not in the first) and blocks."""

    def __init__(self, depths, channels, drop_path):
        super().__init__()
        self.channels = channels
        self.stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, channels[0], 4, stride=4),
                                              norm=LayerNorm2d(channels[0], eps=1e-6)))
        self.stages = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(drop_path, depths)):
            stage = nn.Sequential()
            if i > 0:
                stage.downsample = nn.Sequential(OrderedDict(
                    norm=LayerNorm2d(channels[i - 1], eps=1e-6),
                    conv=nn.Conv2d(channels[i - 1], channels[i], 2, stride=2)))
            stage.blocks = nn.Sequential(*(ConvNeXtBlock(channels[i], rate) for rate in rates))
            self.stages.append(stage)
        self.norm = nn.LayerNorm(channels[-1], eps=1e-6)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def pool(self, last):
        return self.norm(last.mean((2, 3)))


# ---------------------------------------------------------------------------------------------------------------- Swin


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows of M x M tokens, shifted by `shift` (Swin, Sec. 3.2 and Fig. 4)."""

    def __init__(self, channels, heads, window, shift):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.make_bias_table()
        # Every pair of tokens of a window points to the row of the bias table that belongs to its offset (dy, dx).
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))  # (N, 2)
        dy, dx = (place[:, None] - place[None] + window - 1).unbind(-1)  # (N, N) each, from 0 to 2M - 2
        self.register_buffer("bias_index", (dy * (2 * window - 1) + dx).flatten(), persistent=False)

    def make_bias_table(self):
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * self.window - 1) ** 2, self.heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias_table(self):
        return self.relative_position_bias_table  # ((2M - 1)^2, h)

    def project(self, x):
        return self.qkv(x)

    def similarity(self, q, k):
        return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # Eq. 4: q k^T / sqrt(d)

    def forward(self, x):  # (B, H, W, C)
        (B, H, W, C), M, h = x.shape, self.window, self.heads
        pad_h, pad_w = -H % M, -W % M
        if pad_h or pad_w:
            x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
        rows, columns = (H + pad_h) // M, (W + pad_w) // M  # of windows
        shift = (self.shift * (rows > 1), self.shift * (columns > 1))  # one window is the whole side: nothing to shift
        if any(shift):
            x = x.roll((-shift[0], -shift[1]), (1, 2))
        x = x.view(B, rows, M, columns, M, C).transpose(2, 3).reshape(B, rows * columns, M * M, C)

        qkv = self.project(x).view(B, rows * columns, M * M, 3, h, C // h)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # each (B, windows, h, N, d)
        bias = self.bias_table()[self.bias_index].view(M * M, M * M, h).permute(2, 0, 1)  # (h, N, N)
        if any(shift):
            bias = bias + shift_mask(rows, columns, M, shift, x.device)  # (windows, h, N, N)
        scores = self.similarity(q, k)
        x = (scores + bias.to(scores.dtype)).softmax(-1) @ v  # (B, windows, h, N, d)
        x = self.proj(x.transpose(2, 3).reshape(B, rows * columns, M * M, C))

        x = x.view(B, rows, columns, M, M, C).transpose(2, 3).reshape(B, rows * M, columns * M, C)
        if any(shift):
            x = x.roll(shift, (1, 2))
        return x[:, :H, :W] if pad_h or pad_w else x


def shift_mask(rows, columns, M, shift, device):
    """-100 between tokens that met only because the map was rolled round: (windows, 1, N, N)."""
    regions = []
    for count, step in zip((rows, columns), shift):
        place = torch.arange(count * M, device=device)
        regions.append((place >= (count - 1) * M).long() + (place >= count * M - step))  # 0, 1 or 2 along this side
    region = 3 * regions[0][:, None] + regions[1]  # (rows M, columns M)
    region = region.view(rows, M, columns, M).transpose(1, 2).reshape(rows * columns, 1, M * M)
    return -100.0 * (region[:, :, None, :] != region[:, :, :, None])


class WindowAttentionV2(WindowAttention):
    """Swin V2's attention: scaled cosine similarity (Eq. 2) and a log-spaced continuous position bias (Sec. 3.3)."""

    def __init__(self, channels, heads, window, shift):
        super().__init__(channels, heads, window, shift)
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, heads, bias=False))

    def make_bias_table(self):  # a small network on the offsets takes the place of the table
        offset = torch.arange(1 - self.window, self.window) / (self.window - 1) * 8
        offset = offset.sign() * (offset.abs() + 1).log2() / 3  # Eq. 4, log-spaced, from -log2(9)/3 to log2(9)/3
        self.register_buffer("offsets", torch.cartesian_prod(offset, offset), persistent=False)

    def bias_table(self):
        return 16 * self.cpb_mlp(self.offsets).sigmoid()

    def project(self, x):  # cosine similarity needs no bias on the keys; torchvision keeps the parameter and zeroes it
        q_bias, _, v_bias = self.qkv.bias.chunk(3)
        return F.linear(x, self.qkv.weight, torch.cat((q_bias, torch.zeros_like(q_bias), v_bias)))

    def similarity(self, q, k):
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()  # 1 / tau, tau >= 0.01
        return of_length(scale, q) @ of_length(1, k).transpose(-2, -1)


def of_length(length, x):
    """Vectors x with this length. One product a number; F.normalize divides, which is the same function, slower backward."""
    return x * (length / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)).to(x.dtype)


class SwinBlock(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x)) (Swin, Eq. 3)."""

    Attention = WindowAttention

    def __init__(self, channels, heads, window, shift, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn = self.Attention(channels, heads, window, shift)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(channels, 4 * channels), act=nn.GELU(),
                                             fc2=nn.Linear(4 * channels, channels)))
        self.drop_path = DropPath(drop_path)

    def forward(self, x):  # (B, H, W, C)
        x = self.drop_path(x, self.attn(self.norm1(x)))
        return self.drop_path(x, self.mlp(self.norm2(x)))


class SwinBlockV2(SwinBlock):
    """x + LN(Attention(x)), then x + LN(MLP(x)): residual post-norm (Swin V2, Sec. 3.2)."""

    Attention = WindowAttentionV2

    def forward(self, x):
        x = self.drop_path(x, self.norm1(self.attn(x)))
        return self.drop_path(x, self.norm2(self.mlp(x)))


class PatchMerging(nn.Module):
    """Each 2x2 neighbourhood becomes one token: concatenate, normalise, reduce 4C to 2C (V2: reduce, then normalise)."""

    def __init__(self, channels, v2):
        super().__init__()
        self.v2 = v2
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(2 * channels if v2 else 4 * channels)

    def forward(self, x):  # (B, H, W, C) -> (B, H/2, W/2, 2C); odd sides are padded with zeros
        if x.shape[1] % 2 or x.shape[2] % 2:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        return self.norm(self.reduction(x)) if self.v2 else self.reduction(self.norm(x))


class SwinStage(nn.Module):
    def __init__(self, merge, blocks):
        super().__init__()
        self.merge = merge
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)  # (B, H, W, C), a view
        return self.blocks(self.merge(x)).permute(0, 3, 1, 2)


class Swin(Encoder):
    """Swin Transformer (Liu et al. 2021) and Swin V2 (Liu et al. 2022), tiny: patches of 4x4, 4 stages."""

    def __init__(self, v2, window):
        super().__init__()
        depths, heads, self.channels = (2, 2, 6, 2), (3, 6, 12, 24), (96, 192, 384, 768)
        self.stem = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, self.channels[0], 4, stride=4),
                                              norm=LayerNorm2d(self.channels[0])))
        self.stages = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(0.2, depths)):
            merge = PatchMerging(self.channels[i - 1], v2) if i > 0 else nn.Identity()
            Block = SwinBlockV2 if v2 else SwinBlock
            blocks = [Block(self.channels[i], heads[i], window, window // 2 * (j % 2), rate) for j, rate in enumerate(rates)]
            self.stages.append(SwinStage(merge, blocks))
        self.norm = nn.LayerNorm(self.channels[-1])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def pool(self, last):
        return self.norm(last.permute(0, 2, 3, 1)).mean((1, 2))


# -------------------------------------------------------------------------------- ResNet and DenseNet, cut into stages


class ResNet50(Encoder):
    """torchvision's ResNet-50 (He et al. 2016); a stage is one of its four layers."""

    def __init__(self):
        super().__init__()
        net = models.resnet50()
        self.channels = (256, 512, 1024, 2048)
        self.stem = nn.Sequential(OrderedDict(conv1=net.conv1, bn1=net.bn1, relu=net.relu, maxpool=net.maxpool))
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])

    def pool(self, last):
        return last.mean((2, 3))


class DenseNet201(Encoder):
    """torchvision's DenseNet-201 (Huang et al. 2017), cut at its transitions; the last stage has none."""

    def __init__(self):
        super().__init__()
        net = models.densenet201().features
        self.channels = (128, 256, 896, 1920)
        self.stem = nn.Sequential(OrderedDict(conv0=net.conv0, norm0=net.norm0, relu0=net.relu0, pool0=net.pool0))
        self.stages = nn.ModuleList([nn.Sequential(OrderedDict(block=net.denseblock1, transition=net.transition1)),
                                     nn.Sequential(OrderedDict(block=net.denseblock2, transition=net.transition2)),
                                     nn.Sequential(OrderedDict(block=net.denseblock3, transition=net.transition3)),
                                     nn.Sequential(OrderedDict(block=net.denseblock4))])
        self.norm = net.norm5

    def pool(self, last):
        return self.norm(last).relu().mean((2, 3))


# ------------------------------------------------------------------------------------------------- names and weights

# torchvision's parameter names and ours: patterns replaced in this order.
STAGES_OF_FEATURES = {
    r"^features\.1\.": "stages.0.blocks.", r"^features\.3\.": "stages.1.blocks.",
    r"^features\.5\.": "stages.2.blocks.", r"^features\.7\.": "stages.3.blocks.",
}
SWIN_KEYS = STAGES_OF_FEATURES | {
    r"^features\.0\.0\.": "stem.proj.", r"^features\.0\.2\.": "stem.norm.",
    r"^features\.2\.": "stages.1.merge.", r"^features\.4\.": "stages.2.merge.", r"^features\.6\.": "stages.3.merge.",
    r"\bmlp\.0\.": "mlp.fc1.", r"\bmlp\.3\.": "mlp.fc2.",
}
CONVNEXT_KEYS = STAGES_OF_FEATURES | {
    r"^features\.0\.0\.": "stem.conv.", r"^features\.0\.1\.": "stem.norm.",
    r"^features\.2\.0\.": "stages.1.downsample.norm.", r"^features\.2\.1\.": "stages.1.downsample.conv.",
    r"^features\.4\.0\.": "stages.2.downsample.norm.", r"^features\.4\.1\.": "stages.2.downsample.conv.",
    r"^features\.6\.0\.": "stages.3.downsample.norm.", r"^features\.6\.1\.": "stages.3.downsample.conv.",
    r"block\.0\.": "dwconv.", r"block\.2\.": "norm.", r"block\.3\.": "pwconv1.", r"block\.5\.": "pwconv2.",
    r"layer_scale$": "gamma", r"^classifier\.0\.": "norm.",
}
RESNET_KEYS = {
    r"^conv1\.": "stem.conv1.", r"^bn1\.": "stem.bn1.",
    r"^layer1\.": "stages.0.", r"^layer2\.": "stages.1.", r"^layer3\.": "stages.2.", r"^layer4\.": "stages.3.",
}
DENSENET_KEYS = {
    r"^features\.conv0\.": "stem.conv0.", r"^features\.norm0\.": "stem.norm0.", r"^features\.norm5\.": "norm.",
    r"^features\.denseblock1\.": "stages.0.block.", r"^features\.transition1\.": "stages.0.transition.",
    r"^features\.denseblock2\.": "stages.1.block.", r"^features\.transition2\.": "stages.1.transition.",
    r"^features\.denseblock3\.": "stages.2.block.", r"^features\.transition3\.": "stages.2.transition.",
    r"^features\.denseblock4\.": "stages.3.block.",
    r"(norm|conv)\.([12])\.": r"\1\2.",  # the published file still has the names of an older torch: norm.1 for norm1
}


class Backbone(NamedTuple):
    make: Callable  # a random encoder
    keys: dict  # torchvision's parameter names and ours
    published: WeightsEnum | None = None  # torchvision's first recipe, the one of the network's own paper


BACKBONES = {
    "swin_t": Backbone(lambda: Swin(v2=False, window=7), SWIN_KEYS, models.Swin_T_Weights.IMAGENET1K_V1),
    "swin_v2_t": Backbone(lambda: Swin(v2=True, window=8), SWIN_KEYS, models.Swin_V2_T_Weights.IMAGENET1K_V1),
    "convnext_t": Backbone(lambda: ConvNeXt((3, 3, 9, 3), (96, 192, 384, 768), drop_path=0.1), CONVNEXT_KEYS,
                           models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1),
    # of the size that ConvNeXt V2, Sec. 4, calls Atto
    "convnext_atto": Backbone(lambda: ConvNeXt((2, 2, 6, 2), (40, 80, 160, 320), drop_path=0.1), CONVNEXT_KEYS),
    "resnet50": Backbone(ResNet50, RESNET_KEYS, models.ResNet50_Weights.IMAGENET1K_V1),
    "densenet201": Backbone(DenseNet201, DENSENET_KEYS, models.DenseNet201_Weights.IMAGENET1K_V1),
}

HEAD = re.compile(r"^(head|fc|classifier|classifier\.[12])\.(weight|bias)$")  # ImageNet's classifier
DERIVED = re.compile(r"relative_position_index|relative_coords_table")  # tables that Swin computes itself


def build(name, weights=None):
    """An encoder of the contract at the top of this file.

    name     a key of BACKBONES
    weights  None (random), "imagenet" (torchvision's published file: downloaded once, its hash checked) or the path of a
             state dict in torchvision's format. ImageNet's classifier in the file is left out, and that is said.

    Raises WeightsError if the weights cannot be had or any name or shape in them does not fit.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}: choose from {', '.join(BACKBONES)}")
    encoder = BACKBONES[name].make()
    if weights is not None:
        state, source = published_weights(name) if weights == "imagenet" else read_weights(weights)
        load(encoder, state, BACKBONES[name].keys, source)
    return encoder


def published_weights(name):
    """torchvision's ImageNet weights, from its cache or the network."""
    published = BACKBONES[name].published
    if published is None:
        raise WeightsError(f"torchvision has no ImageNet weights for {name}: use --weights none or a path.")
    url = published.url
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    try:
        return published.get_state_dict(progress=True, check_hash=True, weights_only=True), path
    except (URLError, OSError) as error:
        raise WeightsError(f"{name}: cannot download its ImageNet weights ({error}). Fetch {url} on a machine that can and "
                           f"put it at {path}, or go on without: --weights none, with a higher --lr such as 3e-4.") from error


def read_weights(path):
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file. --weights takes imagenet, none or the path of a state dict.") from error
    except Exception as error:  # torch raises half a dozen types here, none of them says which file
        raise WeightsError(f"{path}: not a state dict that torch can load safely ({error}).") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"{path}: not a plain state dict (names to tensors); save model.state_dict() and use that.")
    return state, path


def load(encoder, state, keys, source):
    """Copy a torchvision state dict into `encoder`; every name and shape must fit, and all that don't are named at once."""
    theirs = {}
    for key, value in state.items():
        if not HEAD.search(key) and not DERIVED.search(key):
            for pattern, ours in keys.items():
                key = re.sub(pattern, ours, key)
            theirs[key] = value
    ours = encoder.state_dict()
    problems = []
    for kind, names in (  # num_batches_tracked: files older than torch 0.4.1 lack it, and nothing reads it
            ("missing", [key for key in ours.keys() - theirs.keys() if not key.endswith("num_batches_tracked")]),
            ("not of this network:", theirs.keys() - ours.keys()),
            ("of another shape:", [f"{key} is {tuple(theirs[key].shape)}, not {tuple(ours[key].shape)}"
                                   for key in ours.keys() & theirs.keys() if ours[key].shape != theirs[key].shape])):
        if names:
            more = f" and {len(names) - 6} more" if len(names) > 6 else ""
            problems.append(f"{kind} {', '.join(sorted(names)[:6])}{more}")
    if problems:
        raise WeightsError(f"{source} does not fit {type(encoder).__name__}: {'; '.join(problems)}.")
    encoder.load_state_dict(theirs, strict=False)
    if any(HEAD.search(key) for key in state):
        print(f"{source}: loaded, without its ImageNet classifier")


def torchvision_twin(name):
    """torchvision's own network of that name, or its ConvNeXt of those depths and widths, to compare with."""
    name = {"convnext_t": "convnext_tiny"}.get(name, name)
    if hasattr(models, name):
        return getattr(models, name)()
    encoder = BACKBONES[name].make()
    widths, depths = [*encoder.channels, None], [len(stage.blocks) for stage in encoder.stages]
    block = models.convnext.CNBlockConfig
    return models.ConvNeXt([block(*each) for each in zip(widths, widths[1:], depths)], 0.1)


def largest_difference(name, size):
    """Largest difference of the logits from torchvision's, relative to their largest, float64, every parameter random."""
    twin = torchvision_twin(name).double().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in twin.parameters():  # torchvision's initial values hide mistakes: ConvNeXt's layer scale is 1e-6
        parameter.data.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.05)
    encoder = BACKBONES[name].make().double().eval()
    state = {key: value for key, value in twin.state_dict().items() if not HEAD.search(key)}
    load(encoder, state, BACKBONES[name].keys, "torchvision's twin")
    head = [module for module in twin.modules() if isinstance(module, nn.Linear)][-1]
    image = torch.randn(2, 3, *size, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        theirs, ours = twin(image), head(encoder.pool(encoder(image)[-1]))
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def main():
    print("backbone       stage outputs for 224 x 224 (C x H x W)                          parameters  with classifier  "
          "largest difference from torchvision")
    for name in BACKBONES:
        encoder = build(name).eval()
        with torch.no_grad():
            shapes = " ".join("x".join(map(str, each.shape[1:])) for each in encoder(torch.zeros(1, 3, 224, 224)))
        own = sum(parameter.numel() for parameter in encoder.parameters())
        print(f"{name:14} {shapes:62} {own:>12,} {own + 1000 * encoder.channels[-1] + 1000:>16,}  "
              f"{largest_difference(name, (224, 224)):.1e} at 224x224, {largest_difference(name, (75, 117)):.1e} at 75x117")


if __name__ == "__main__":
    main()
