"""Shared cross-attention: after each stage, each modality reads the other (Sec. 3.2, Fig. 3 of the PEMM paper).

Three 1x1 convolutions make queries q and keys k (C/8 channels) and values v (C channels) of a feature map:

    refined = x + softmax(q k^T / sqrt(C/8)) v

In the **shared** module (SCA) one set of them serves both modalities; in the separate one (CA) each has its own.
What crosses? Sec. 3.2 names only a modality's own q, k and v, and Fig. 3 leaves it open. Two readings:

    "cross"    queries from one modality, keys and values from the other: the word's usual meaning, and our default
    "swapped"  each computes its own softmax(q k^T), unscaled, and applies the other's to its own values (CAFNet)

The pretrained encoder must not be disturbed at first: the value layer starts at zero, so refined = x. A gate that
starts at zero, x + gate * read, would stay nearly shut: Adam moves a number by about the learning rate a step, and
250 epochs x 18 steps x 1.5e-5, the mean rate, are 0.07. A value sums over C weights, and each can move that far.

Shapes: B pairs, C channels, H x W the map, N = H W its places ("tokens"), d = C/8.
Run `python shared_attention.py` to see the parameters, and the plain formula beside the fast one.
"""
import time
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

def attention_weights(q, k):
    scores = q @ k.transpose(-2, -1)  # (B, N, d), (B, N, d) -> (B, N, N): how well each query (scaled) fits each key
    return scores.softmax(-1)

def plain_attention(q, k, v):
    return attention_weights(q, k) @ v  # (B, N, C): for each query a weighted mean of the values

def tokens(x):
    return x.flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, N, C)

def refined(x, q, k, v):
    return x + attend(q, k, v).transpose(1, 2).view(x.shape)  # attend: a faster plain_attention, defined below

class Projections(nn.Module):
    """The three convolutions of Fig. 3. On tokens, a 1x1 convolution is a linear layer. Queries come scaled."""

    def __init__(self, channels, source_channels, scale):  # channels of the map that reads, and of the map that is read
        super().__init__()
        self.scale = scale
        self.query = nn.Linear(channels, channels // 8)
        self.key = nn.Linear(source_channels, channels // 8)
        self.value = nn.Linear(source_channels, channels)
        nn.init.zeros_(self.value.weight)  # ours, see the top of the file
        nn.init.zeros_(self.value.bias)

    def forward(self, x, source):
        return self.query(x) * self.scale, self.key(source), self.value(source)  # (B, N, d), (B, N, d), (B, N, C)

class CrossAttention(nn.Module):
    """(clinical, dermoscopy) -> (clinical, dermoscopy), each (B, C, H, W), each refined by what it read.
    shared: one set of projections for both modalities (SCA), or one each (CA). reading: see the top of the file."""

    def __init__(self, channels, shared=True, reading="cross"):
        super().__init__()
        if reading not in ("cross", "swapped"):
            raise ValueError(f"reading is {reading!r}: choose cross or swapped")
        self.reading = reading
        scale = (channels // 8) ** -0.5 if reading == "cross" else 1.0
        self.projections = nn.ModuleList(Projections(channels, channels, scale) for _ in range(1 if shared else 2))

    def project(self, clinical, dermoscopy):
        """The (q, k, v) that refine the clinical map, and the (q, k, v) that refine the dermoscopy map."""
        x_c, x_d = tokens(clinical), tokens(dermoscopy)
        q_c, k_c, v_c = self.projections[0](x_c, x_c)
        q_d, k_d, v_d = self.projections[-1](x_d, x_d)  # if shared, the same projections
        if self.reading == "cross":
            return (q_c, k_d, v_d), (q_d, k_c, v_c)
        return (q_d, k_d, v_c), (q_c, k_c, v_d)

    def forward(self, clinical, dermoscopy):
        for_clinical, for_dermoscopy = self.project(clinical, dermoscopy)
        return refined(clinical, *for_clinical), refined(dermoscopy, *for_dermoscopy)

    def read_of(self, clinical, dermoscopy):
        """How much is read at each place of the two photos: (B, H, W) each."""
        of_dermoscopy, of_clinical = self.project(clinical, dermoscopy)  # clinical is refined by values of dermoscopy
        if self.reading == "swapped":  # clinical is refined by its own values
            of_dermoscopy, of_clinical = of_clinical, of_dermoscopy
        return {"clinical": weights_on(clinical, *of_clinical), "dermoscopy": weights_on(dermoscopy, *of_dermoscopy)}

def weights_on(source, q, k, _):
    return attention_weights(q, k).mean(1).view(len(k), *source.shape[2:])  # mean over the queries: (B, H, W)

class AsymmetricAttention(nn.Module):
    """AMMFM's: dermoscopy reads clinical, nothing flows back. The two maps may differ in channels and in size."""

    def __init__(self, clinical_channels, dermoscopy_channels):
        super().__init__()
        self.projections = Projections(dermoscopy_channels, clinical_channels, (dermoscopy_channels // 8) ** -0.5)

    def forward(self, clinical, dermoscopy):
        for_dermoscopy = self.projections(tokens(dermoscopy), tokens(clinical))
        return clinical, refined(dermoscopy, *for_dermoscopy)

    def read_of(self, clinical, dermoscopy):
        of_clinical = self.projections(tokens(dermoscopy), tokens(clinical))
        return {"clinical": weights_on(clinical, *of_clinical)}

# --------------------------------------------------------- the method is complete above; from here on it is about speed

LARGE = 32 ** 2  # places of the map that is read; up to here the plain formula is fastest
BLOCK = 512  # queries at a time: with 56 x 56 keys their weights are 6 MB of float32, which a processor's cache holds

def attend(q, k, v):
    """The fast twin of plain_attention: the same, in the best way for this device and size."""
    if q.device.type == "cuda":
        pad = (0, -q.shape[-1] % 8)  # its fast kernel wants q and k in multiples of 8 channels (bfloat16: 16 bytes)
        q, k, v = F.pad(q, pad)[:, None], F.pad(k, pad)[:, None], v[:, None]  # one head
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)[:, 0]
    if k.shape[1] <= LARGE:
        return plain_attention(q, k, v)
    parts = []  # image by image, block by block
    for q_image, k_image, v_image in zip(q, k, v):
        for queries in q_image.split(BLOCK):
            # The weights are forgotten, and computed again for the backward: kept, they take 39 MB an image at 56 x 56.
            parts.append(checkpoint(plain_attention, queries, k_image, v_image, use_reentrant=False,
                                    preserve_rng_state=False))
    return torch.cat(parts).view(*q.shape[:2], -1)

def main():
    stages, light = (96, 192, 384, 768), (24, 32, 96, 1280)  # channels of Swin-T and of MobileNetV2
    kinds = {"shared (SCA)": [CrossAttention(c) for c in stages],
             "separate (CA)": [CrossAttention(c, shared=False) for c in stages],
             "asymmetric": [AsymmetricAttention(c, d) for c, d in zip(light, stages)]}
    print("parameters of the attention of Swin-T's four stages (asymmetric: reading a MobileNetV2)")
    for name, modules in kinds.items():
        print(f"  {name:14} {sum(p.numel() for module in modules for p in module.parameters()):>10,}")
    print("one attention at 56 x 56 with 96 channels, 8 images, forward and backward, float32")
    inputs = [torch.randn(8, 56 * 56, width, requires_grad=True) for width in (12, 12, 96)]
    attend(*inputs).sum().backward()  # the first call takes longer
    results = []
    for name, function in (("plain formula", plain_attention), ("fast twin", attend)):
        kept, start = {}, time.perf_counter()
        def keep(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = function(*inputs)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
        seconds, size = time.perf_counter() - start, sum(kept.values()) / 2 ** 20
        print(f"  {name:14} {seconds:5.2f} s, {size:,.0f} MiB kept for the backward")
    difference = max((a - b).abs().max() / a.abs().max() for a, b in zip(*results))
    print(f"  largest relative difference, values and gradients: {difference:.1e}")

if __name__ == "__main__":
    main()
