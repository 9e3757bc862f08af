"""Backbones: one image becomes four feature maps (the encoders of Table 8 of the PEMM paper).

`build("swin_v2_t", "imagenet")` gives an encoder. Every encoder keeps one contract:

    encoder.channels    4 ints, the width of each stage
    encoder.stem(x)     image (B, 3, H, W)  ->  the first feature map, (B, C_0, H_0, W_0)
    encoder.stages      4 modules; each maps (B, C_{i-1}, H_{i-1}, W_{i-1}) -> (B, C_i, H_i, W_i)
    encoder(x)          the list of the 4 stage outputs
    encoder.pool(last)  final norm and global average pool: (B, C_4, H_4, W_4) -> (B, C_4)

encoder.pool, then the last linear layer of torchvision, gives its logits. ConvNeXt (the shortest), Swin and Swin V2
are written out by hand; the others are torchvision's modules cut into stages. "SwinTransformer (Tiny)" of the paper is
Swin **V2**: only its parameter count fits the paper's tables.

Shapes: B images, C channels, H W the map, M the side of a window, N = M^2 its tokens, h heads, d = C / h.

Run `python backbones.py` to see the shapes, and the parameters beside the numbers that torchvision publishes.
"""
import math
import re
from collections import OrderedDict, namedtuple
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from torchvision.ops import Permute, StochasticDepth

class WeightsError(ValueError):
    """Weights that are missing or do not fit; the message says which and what to do."""

class Encoder(nn.Module):
    """The contract above. A subclass sets `channels`, `stem` and `stages`, and `pool` if it has a final norm."""

    def forward(self, x):
        maps = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps

    def pool(self, last):
        return last.mean((2, 3))

# ------------------------------------------------------------------------------------------------------------ ConvNeXt

class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

class ConvNeXtBlock(nn.Module):
    """x + gamma * pwconv2(GELU(pwconv1(LN(dwconv(x))))) (ConvNeXt, Fig. 4). The pointwise (1x1) convolutions are linear
    layers on (B, H, W, C): of the two equal forms that the paper's code names, the faster one."""

    def __init__(self, channels, drop_path):
        super().__init__()
        self.dwconv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)  # depthwise
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pwconv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), 1e-6))  # layer scale
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x):
        y = self.dwconv(x).permute(0, 2, 3, 1)  # (B, H, W, C)
        y = self.act(self.pwconv1(self.norm(y)))  # (B, H, W, 4C)
        y = self.pwconv2(y).permute(0, 3, 1, 2)  # (B, C, H, W)
        return x + self.drop_path(self.gamma * y)

class ConvNeXt(Encoder):
    """ConvNeXt (Liu et al. 2022): patches of 4x4, then 4 stages; each but the first begins by halving the map."""

    def __init__(self, depths, channels):
        super().__init__()
        self.channels = channels
        self.stem = nn.Sequential(nn.Conv2d(3, channels[0], 4, stride=4), LayerNorm2d(channels[0], eps=1e-6))
        self.stages = nn.ModuleList()
        rates = [0.1 * i / (sum(depths) - 1) for i in range(sum(depths))]  # of stochastic depth, rising
        for i, depth in enumerate(depths):
            stage = nn.Sequential()
            if i > 0:
                stage.merge = nn.Sequential(LayerNorm2d(channels[i - 1], eps=1e-6),
                                            nn.Conv2d(channels[i - 1], channels[i], 2, stride=2))
            stage.blocks = nn.Sequential(*(ConvNeXtBlock(channels[i], rates.pop(0)) for _ in range(depth)))
            self.stages.append(stage)
        self.norm = nn.LayerNorm(channels[-1], eps=1e-6)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def pool(self, last):
        return self.norm(last.mean((2, 3)))

# ---------------------------------------------------------------------------------------------------------------- Swin

def to_windows(x, M):
    """Cuts a map into windows of M x M, row by row: (B, H, W, C) -> (B, windows, N, C)."""
    B, H, W, C = x.shape
    x = x.view(B, H // M, M, W // M, M, C)
    return x.transpose(2, 3).reshape(B, -1, M * M, C)

def to_map(x, rows, columns, M):
    """Lays windows out as a map again: (B, windows, N, C) -> (B, H, W, C)."""
    B, _, _, C = x.shape
    x = x.view(B, rows, columns, M, M, C)
    return x.transpose(2, 3).reshape(B, rows * M, columns * M, C)

def shift_mask(rows, columns, M, shift_y, shift_x, device):
    """-100 for tokens that share a window only because the map was rolled, else 0: (windows, 1, N, N) (Swin, Fig. 4).

    Rolling brings the top rows to the bottom and the left columns to the right, beside tokens that are far away. Each
    token gets the number of the region it came from, and reads only that region. Below: 2 x 2 windows, M = 2, shifted
    by 1. (The papers' code has 3 x 3 regions; its two other lines are borders of windows, so nothing changes.)

        0 0 | 0 1      0  did not come round
        0 0 | 0 1      1  came round from the left
        ----+----      2  came round from the top
        0 0 | 0 1      3  came round from both
        2 2 | 2 3
    """
    from_top = torch.arange(rows * M, device=device) >= rows * M - shift_y  # (H)
    from_left = torch.arange(columns * M, device=device) >= columns * M - shift_x  # (W)
    region = 2 * from_top.long()[:, None] + from_left.long()  # (H, W)
    region = to_windows(region[None, :, :, None], M)  # (1, windows, N, 1)
    apart = region != region.transpose(2, 3)  # (1, windows, N, N)
    return torch.where(apart, -100.0, 0.0).transpose(0, 1)  # (windows, 1, N, N)

class WindowAttention(nn.Module):
    """Multi-head self-attention in windows of M x M tokens; every second block shifts them (Swin, Sec. 3.2)."""

    def __init__(self, channels, heads, window, shift):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.add_parameters()
        # The bias of a pair depends only on its offset (dy, dx); bias_index says which row of the table that is.
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))  # (N, 2)
        dy, dx = (place[:, None] - place[None] + window - 1).unbind(-1)  # (N, N) each, from 0 to 2M - 2
        self.register_buffer("bias_index", dy * (2 * window - 1) + dx, persistent=False)

    def add_parameters(self):
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * self.window - 1) ** 2, self.heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias_table(self):
        return self.relative_position_bias_table  # ((2M - 1)^2, h)

    def project(self, x):
        return self.qkv(x)

    def similarity(self, q, k):
        return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # q k^T / sqrt(d) of Eq. 4

    def forward(self, x):  # (B, H, W, C)
        B, H, W, C = x.shape
        M, h = self.window, self.heads
        rows, columns = math.ceil(H / M), math.ceil(W / M)  # of windows
        if rows * M > H or columns * M > W:
            x = F.pad(x, (0, 0, 0, columns * M - W, 0, rows * M - H))
        bias = self.bias_table()[self.bias_index].permute(2, 0, 1)  # (h, N, N)
        shift_y = self.shift if rows > 1 else 0  # a single window already sees the whole side
        shift_x = self.shift if columns > 1 else 0
        shifted = shift_y > 0 or shift_x > 0
        if shifted:
            x = x.roll((-shift_y, -shift_x), (1, 2))
            bias = bias + shift_mask(rows, columns, M, shift_y, shift_x, x.device)  # (windows, h, N, N)

        x = to_windows(x, M)  # (B, windows, N, C)
        qkv = self.project(x).view(B, rows * columns, M * M, 3, h, C // h)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)  # each (B, windows, h, N, d)
        scores = self.similarity(q, k)  # (B, windows, h, N, N)
        x = (scores + bias.to(scores.dtype)).softmax(-1) @ v  # Eq. 4; the bias is the same for all images
        x = self.proj(x.transpose(2, 3).flatten(3))  # (B, windows, N, C)
        x = to_map(x, rows, columns, M)
        if shifted:
            x = x.roll((shift_y, shift_x), (1, 2))
        return x[:, :H, :W]  # without the padding

class WindowAttentionV2(WindowAttention):
    """Swin V2's attention: scaled cosine similarity (Eq. 2) and a log-spaced continuous position bias (Sec. 3.3)."""

    def add_parameters(self):
        self.logit_scale = nn.Parameter(torch.full((self.heads, 1, 1), math.log(10.0)))  # log(1 / tau), one a head
        # A small network computes the bias table from the offsets.
        offset = torch.arange(1 - self.window, self.window) / (self.window - 1) * 8  # from -8 to 8
        offset = offset.sign() * (1 + offset.abs()).log2() / math.log2(8)  # Eq. 4
        self.register_buffer("offsets", torch.cartesian_prod(offset, offset), persistent=False)  # ((2M - 1)^2, 2)
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(inplace=True), nn.Linear(512, self.heads, bias=False))

    def bias_table(self):
        return 16 * self.cpb_mlp(self.offsets).sigmoid()  # ((2M - 1)^2, h)

    def project(self, x):
        q_bias, k_bias, v_bias = self.qkv.bias.chunk(3)  # V2 has no key bias: that third is unused
        bias = torch.cat((q_bias, torch.zeros_like(k_bias), v_bias))
        return F.linear(x, self.qkv.weight, bias)

    def similarity(self, q, k):
        scale = self.logit_scale.clamp(max=math.log(100)).exp()  # 1 / tau, with tau >= 0.01
        q = F.normalize(q, dim=-1) * scale
        k = F.normalize(k, dim=-1)
        return q @ k.transpose(-2, -1)  # cos(q, k) / tau of Eq. 2

class SwinBlock(nn.Module):
    """Swin, Eq. 3: x + Attention(LN(x)), then x + MLP(LN(x)). V2, Sec. 3.2, norms behind: x + LN(Attention(x))."""

    def __init__(self, channels, heads, window, shift, drop_path, v2):
        super().__init__()
        self.v2 = v2
        Attention = WindowAttentionV2 if v2 else WindowAttention
        self.norm1 = nn.LayerNorm(channels)
        self.attn = Attention(channels, heads, window, shift)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.drop_path = StochasticDepth(drop_path, "row")

    def forward(self, x):  # (B, H, W, C)
        if self.v2:
            x = x + self.drop_path(self.norm1(self.attn(x)))
            return x + self.drop_path(self.norm2(self.mlp(x)))
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

class PatchMerging(nn.Module):
    """2x2 tokens become one: side by side 4C channels, normalised, reduced to 2C (V2: reduced, then normalised)."""

    def __init__(self, channels, v2):
        super().__init__()
        self.v2 = v2
        self.reduction = nn.Linear(4 * channels, 2 * channels, bias=False)
        self.norm = nn.LayerNorm(2 * channels if v2 else 4 * channels)

    def forward(self, x):  # (B, H, W, C)
        B, H, W, C = x.shape
        if H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))  # to even sides
        x = torch.cat((x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]), -1)  # (B, H/2, W/2, 4C)
        if self.v2:
            return self.norm(self.reduction(x))  # (B, H/2, W/2, 2C)
        return self.reduction(self.norm(x))

class Swin(Encoder):
    """Swin Transformer (Liu et al. 2021) and Swin V2 (Liu et al. 2022), tiny: patches of 4x4, 4 stages."""

    def __init__(self, v2, window):
        super().__init__()
        self.channels, depths, heads = (96, 192, 384, 768), (2, 2, 6, 2), (3, 6, 12, 24)
        self.stem = nn.Sequential(nn.Conv2d(3, self.channels[0], 4, stride=4), LayerNorm2d(self.channels[0]))
        self.stages = nn.ModuleList()
        rates = [0.2 * i / (sum(depths) - 1) for i in range(sum(depths))]  # of stochastic depth, rising
        for i in range(4):
            merge = PatchMerging(self.channels[i - 1], v2) if i > 0 else nn.Identity()
            blocks = nn.Sequential()
            for j in range(depths[i]):
                shift = window // 2 if j % 2 else 0
                blocks.append(SwinBlock(self.channels[i], heads[i], window, shift, rates.pop(0), v2))
            self.stages.append(nn.Sequential(OrderedDict(  # inside, the channels come last
                to_last=Permute([0, 2, 3, 1]), merge=merge, blocks=blocks, to_first=Permute([0, 3, 1, 2]))))
        self.norm = nn.LayerNorm(self.channels[-1])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def pool(self, last):
        return self.norm(last.permute(0, 2, 3, 1)).mean((1, 2))

# ------------------------------------------------------------------------------ torchvision's modules, cut into stages

class ResNet50(Encoder):
    """ResNet-50 (He et al. 2016); a stage is one of torchvision's four layers."""

    def __init__(self):
        super().__init__()
        net = models.resnet50()
        self.channels = (256, 512, 1024, 2048)
        self.stem = nn.Sequential(OrderedDict(conv1=net.conv1, bn1=net.bn1, relu=net.relu, maxpool=net.maxpool))
        self.stages = nn.ModuleList([net.layer1, net.layer2, net.layer3, net.layer4])

class DenseNet201(Encoder):
    """DenseNet-201 (Huang et al. 2017), cut behind its transitions; the last stage has none."""

    def __init__(self):
        super().__init__()
        net = models.densenet201().features
        self.channels = (128, 256, 896, 1920)
        self.stem = net[:4]  # conv0, norm0, relu0, pool0
        self.stages = nn.ModuleList([net[4:6], net[6:8], net[8:10], net[10:11]])  # denseblock1 and transition1, ...
        self.norm = net.norm5

    def pool(self, last):
        return self.norm(last).relu().mean((2, 3))

class MobileNetV2(Encoder):
    """MobileNetV2 (Sandler et al. 2018), for laptops; cut where the map is 1/4, 1/8, 1/16 and 1/32 of the image."""

    def __init__(self):
        super().__init__()
        layers = models.mobilenet_v2().features  # 19, in one row
        self.channels = (24, 32, 96, 1280)
        self.stem = layers[:2]  # 16 channels, 1/2 of the image
        self.stages = nn.ModuleList([layers[2:4], layers[4:7], layers[7:14], layers[14:]])

# ------------------------------------------------------------------------------------------------- names and weights

# torchvision's parameter names -> ours: patterns, replaced in this order.
FEATURES = {  # 0 is the stem; the odd numbers are stages, the even ones merge
    r"^features\.0\.": "stem.", r"^features\.1\.": "stages.0.blocks.", r"^features\.2\.": "stages.1.merge.",
    r"^features\.3\.": "stages.1.blocks.", r"^features\.4\.": "stages.2.merge.", r"^features\.5\.": "stages.2.blocks.",
    r"^features\.6\.": "stages.3.merge.", r"^features\.7\.": "stages.3.blocks.",
}
SWIN_NAMES = FEATURES | {r"^stem\.2\.": "stem.1.", r"\bmlp\.3\.": "mlp.2."}  # \b: not cpb_mlp
CONVNEXT_NAMES = FEATURES | {
    r"block\.0\.": "dwconv.", r"block\.2\.": "norm.", r"block\.3\.": "pwconv1.", r"block\.5\.": "pwconv2.",
    r"layer_scale$": "gamma", r"^classifier\.0\.": "norm.",
}
RESNET_NAMES = {
    r"^(conv1|bn1)\.": r"stem.\1.",
    r"^layer1\.": "stages.0.", r"^layer2\.": "stages.1.", r"^layer3\.": "stages.2.", r"^layer4\.": "stages.3.",
}
DENSENET_NAMES = {
    r"^features\.(conv0|norm0)\.": r"stem.\1.", r"^features\.norm5\.": "norm.",
    r"^features\.(\w+1)\.": r"stages.0.\1.", r"^features\.(\w+2)\.": r"stages.1.\1.",
    r"^features\.(\w+3)\.": r"stages.2.\1.", r"^features\.(\w+4)\.": r"stages.3.\1.",
    r"(norm|conv)\.([12])\.": r"\1\2.",  # the published file is of an older torch and says norm.1 for norm1
}
MOBILENET_NAMES = {  # a slice of a Sequential keeps its numbers
    r"^features\.([01])\.": r"stem.\1.",
    r"^features\.([23])\.": r"stages.0.\1.", r"^features\.([456])\.": r"stages.1.\1.",
    r"^features\.([789]|1[0-3])\.": r"stages.2.\1.", r"^features\.(1[4-8])\.": r"stages.3.\1.",
}
CLASSIFIER = re.compile(r"^(head|fc|classifier|classifier\.[12])\.(weight|bias)$")  # the one of ImageNet's 1000 classes
DERIVED = re.compile(r"relative_position_index|relative_coords_table")  # in Swin's files, but computed here

# name -> what builds it with random weights, torchvision's names, its published weights (V1 recipe, as in the papers)
Backbone = namedtuple("Backbone", ["make", "names", "published"])
BACKBONES = {
    "swin_t": Backbone(partial(Swin, v2=False, window=7), SWIN_NAMES, models.Swin_T_Weights.IMAGENET1K_V1),
    "swin_v2_t": Backbone(partial(Swin, v2=True, window=8), SWIN_NAMES, models.Swin_V2_T_Weights.IMAGENET1K_V1),
    "convnext_t": Backbone(partial(ConvNeXt, (3, 3, 9, 3), (96, 192, 384, 768)), CONVNEXT_NAMES,
                           models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1),
    "convnext_atto": Backbone(partial(ConvNeXt, (2, 2, 6, 2), (40, 80, 160, 320)), CONVNEXT_NAMES, None),  # V2's Atto
    "resnet50": Backbone(ResNet50, RESNET_NAMES, models.ResNet50_Weights.IMAGENET1K_V1),
    "densenet201": Backbone(DenseNet201, DENSENET_NAMES, models.DenseNet201_Weights.IMAGENET1K_V1),
    "mobilenet_v2": Backbone(MobileNetV2, MOBILENET_NAMES, models.MobileNet_V2_Weights.IMAGENET1K_V1),
}

def build(name, weights="none"):
    """The encoder of that name. `weights`: "none" (random), "imagenet" (torchvision's, downloaded once, hash checked)
    or the path of a state dict in torchvision's format. The ImageNet classifier in it is left out, and that is said.
    Raises WeightsError if the weights cannot be had, or if a name or shape in them does not fit."""
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone {name!r}: choose from {', '.join(BACKBONES)}")
    make, names, published = BACKBONES[name]
    encoder = make().to(memory_format=torch.channels_last)  # convolutions are faster so
    if weights == "none":
        return encoder
    state = download(name, published) if weights == "imagenet" else read_weights(weights)
    try:
        encoder.load_state_dict(rename(state, names), strict=True)
    except RuntimeError as error:  # torch's message says what is missing, unexpected or of another shape
        raise WeightsError(f"{weights} does not fit {name}: {error}") from error
    if any(CLASSIFIER.search(key) for key in state):
        print(f"{weights}: loaded, without its ImageNet classifier")
    return encoder

def download(name, published):
    """torchvision's ImageNet weights, from its cache or the network."""
    if published is None:
        raise WeightsError(f"torchvision has no ImageNet weights for {name}: use --weights none or a path.")
    try:
        return published.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network; a wrong hash
        raise WeightsError(
            f"{name}: cannot download its ImageNet weights ({error}). Fetch {published.url} elsewhere and put it into "
            f"{torch.hub.get_dir()}/checkpoints, or use --weights none with a higher --lr such as 3e-4.") from error

def read_weights(path):
    """The state dict in a file."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # a file cannot run code here
    except Exception as error:  # torch raises half a dozen types here, and most do not say which file
        raise WeightsError(f"{path}: not a state dict that can be loaded safely ({error}).") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise WeightsError(f"{path}: not a plain state dict (names to tensors); save model.state_dict() and use that.")
    return state

def rename(state, names):
    """torchvision's state dict under our names, without what an encoder does not have."""
    ours = {}  # in a plain dict torch accepts old files, which have no num_batches_tracked
    for key, value in state.items():
        if CLASSIFIER.search(key) or DERIVED.search(key):
            continue
        for pattern, replacement in names.items():
            key = re.sub(pattern, replacement, key)
        ours[key] = value
    return ours

def main():
    print(f"{'backbone':14} {'stages of 224 x 224 (C x H x W)':62}   parameters  with classifier  torchvision says")
    for name, backbone in BACKBONES.items():
        encoder = build(name).eval()
        with torch.no_grad():
            maps = encoder(torch.zeros(1, 3, 224, 224))
        shapes = " ".join(f"{C}x{H}x{W}" for _, C, H, W in (each.shape for each in maps))
        own = sum(parameter.numel() for parameter in encoder.parameters())
        idle = 1000 * encoder.channels[-1] + 1000  # ImageNet's classifier, which the paper and torchvision count
        published = f"{backbone.published.meta['num_params']:,}" if backbone.published else "nothing"
        print(f"{name:14} {shapes:62} {own:>12,} {own + idle:>16,} {published:>17}")

if __name__ == "__main__":
    main()
