"""PEMM: two photos of one lesion in, three predictions out (Fig. 2 of the PEMM paper).

One shared encoder sees the clinical and the dermoscopy photo. After each of its four stages a shared cross-attention
lets each modality read the other. Three classifiers predict every task: from the clinical features, from the dermoscopy
features and from both. The switches of `PEMM` are the rows of Tables 5 and 6:

    encoder="separate", fusion="concat"    the baseline: two encoders
    encoder="shared",   fusion="concat"    PS: parameters shared
    encoder="shared",   fusion="ca"        PS + CA: one set of attention projections per modality
    encoder="shared",   fusion="sca"       PS + SCA = PEMM
    classifiers="shared"                   one classifier for the clinical and the dermoscopy branch

Every model names its inputs in `reads` and returns a dict from branch to a list of T logit tensors (B, n_t). (CLNet's
"mask" is one tensor.)

    outputs = network(*(inputs[name] for name in network.reads))
    outputs["fusion"][0]                   the fusion branch's logits of the first task

Shapes: B lesions, T tasks, n_t classes of task t, C_4 channels of the last stage.

Run `python model.py` to see the parameter columns of Tables 3, 5, 6, 8 and 9, the paper's beside ours.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation as ConvNormReLU, SqueezeExcitation

import backbones
from shared_attention import AsymmetricAttention, CrossAttention

SPC_CLASSES = (5, 3, 3, 3, 2, 3, 2, 3)  # DIAG PN STR PIG RS DaG BWV VS: 24 outputs

class RunError(ValueError):
    """A run, or a device for it, that cannot be used. The message says why."""

class Classifier(nn.Module):
    """(B, features) -> T logit tensors (B, n_t). Layers and rate are those of the authors' earlier public code,
    FusionM4Net; with them every parameter count of the paper comes out but one misprint (see main)."""

    def __init__(self, features, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, 512), nn.BatchNorm1d(512), nn.SiLU(), nn.Dropout(0.3),
                                  nn.Linear(512, 128), nn.BatchNorm1d(128), nn.SiLU(), nn.Dropout(0.3))
        self.tasks = nn.ModuleList(nn.Linear(128, n) for n in num_classes)

    def forward(self, x):
        x = self.body(x)  # (B, 128)
        return [task(x) for task in self.tasks]

class PEMM(nn.Module):
    """The network of Fig. 2.

    backbone, weights       what backbones.build takes: a name of BACKBONES; "none" (random), "imagenet" or a path
    num_classes             classes of each task
    encoder, fusion         see the top of the file
    classifiers             "separate" or "shared" (clinical with dermoscopy; fusion always has its own)
    reading                 what crosses in the attention, "cross" or "swapped": see shared_attention.py

    In training B must be 2 or more, for the batch norm.
    """

    reads = ("clinical", "dermoscopy")

    def __init__(self, backbone, num_classes=SPC_CLASSES, weights="none", encoder="shared", fusion="sca",
                 classifiers="separate", reading="cross"):
        super().__init__()
        for value, choices in ((encoder, ("shared", "separate")), (fusion, ("sca", "ca", "concat")),
                               (classifiers, ("separate", "shared"))):
            if value not in choices:
                raise ValueError(f"{value!r}: choose {' or '.join(choices)}")
        self.encoders = nn.ModuleList([backbones.build(backbone, weights)])
        if encoder == "separate":
            self.encoders.append(backbones.build(backbone, weights))
        channels = self.encoders[0].channels
        self.attentions = nn.ModuleList()
        if fusion != "concat":
            for width in channels:
                self.attentions.append(CrossAttention(width, shared=fusion == "sca", reading=reading))
        self.classifiers = nn.ModuleList([Classifier(channels[-1], num_classes)])
        if classifiers == "separate":
            self.classifiers.append(Classifier(channels[-1], num_classes))
        self.fusion_classifier = Classifier(2 * channels[-1], num_classes)
        # A shared encoder takes both photos as one batch, for speed. Not with batch norm (ResNet, DenseNet, MobileNet):
        # there each photo goes alone; training normalises it by its own statistics, evaluation by the mean of both.
        batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in self.encoders.modules())
        self.one_batch = encoder == "shared" and not batch_norm

    def forward(self, clinical, dermoscopy):
        c, d = self.features(clinical, dermoscopy)
        classifier_c, classifier_d = self.classifiers[0], self.classifiers[-1]  # the same one if it is shared
        return {"clinical": classifier_c(c), "dermoscopy": classifier_d(d),
                "fusion": self.fusion_classifier(torch.cat((c, d), 1))}

    def features(self, clinical, dermoscopy):
        """The pooled features of both photos, (B, C_4) each."""
        encoder_c, encoder_d = self.encoders[0], self.encoders[-1]  # the same one if it is shared
        c, d = self.per_modality(encoder_c.stem, encoder_d.stem, clinical, dermoscopy)
        for stage in range(4):
            c, d = self.per_modality(encoder_c.stages[stage], encoder_d.stages[stage], c, d)
            if self.attentions:
                c, d = self.attentions[stage](c, d)
        return self.per_modality(encoder_c.pool, encoder_d.pool, c, d)

    def per_modality(self, module_c, module_d, c, d):
        """Each module on its modality; as one batch where it is one module."""
        if self.one_batch:
            return module_c(torch.cat((c, d))).chunk(2)
        return module_c(c), module_d(d)

class OneModality(nn.Module):
    """The Derm and Clic rows of Tables 8 and 9: one photo, one encoder, one classifier."""

    def __init__(self, backbone, num_classes=SPC_CLASSES, weights="none", modality="dermoscopy"):
        super().__init__()
        self.reads = (modality,)
        self.encoder = backbones.build(backbone, weights)
        self.classifier = Classifier(self.encoder.channels[-1], num_classes)

    def forward(self, image):
        return {self.reads[0]: self.classifier(self.encoder.pool(self.encoder(image)[-1]))}

# ----------------------------------------------------------------------------------------- AMMFM: pay less on clinical

class AMMFM(PEMM):
    """Tang & Lasser 2024, "Pay less on clinical images" (arXiv 2407.09999): a light encoder for the clinical photo, a
    heavy one for dermoscopy, and an attention through which dermoscopy reads clinical and nothing flows back.

    Only its abstract was at hand. Ours: all else is PEMM's forward, with the attention after each of the four stages
    and three classifiers.
    """

    def __init__(self, backbone, clinical_backbone="mobilenet_v2", num_classes=SPC_CLASSES, weights="none",
                 clinical_weights="none"):
        nn.Module.__init__(self)  # not PEMM's: other parts, the same forward
        light, heavy = backbones.build(clinical_backbone, clinical_weights), backbones.build(backbone, weights)
        self.encoders, self.one_batch = nn.ModuleList([light, heavy]), False
        self.attentions = nn.ModuleList()
        for width_c, width_d in zip(light.channels, heavy.channels):
            self.attentions.append(AsymmetricAttention(width_c, width_d))
        last_c, last_d = light.channels[-1], heavy.channels[-1]
        self.classifiers = nn.ModuleList([Classifier(last_c, num_classes), Classifier(last_d, num_classes)])
        self.fusion_classifier = Classifier(last_c + last_d, num_classes)

# ----------------------------------------------------------------------- MAT: one image and the words about the patient

class GuidedAttention(nn.Module):
    """Fig. 2 of MAT (Zhou & Luo). First layer: x reads a guide. Second layer: a feed-forward network. After each come
    dropout, shortcut and layer norm. h = 8 heads, d = 512, dropout 0.1 (its Sec. 3.2).

    `padding` (B, m) marks words of the guide that are not there.
    """

    def __init__(self, width=512, heads=8, dropout=0.1):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Dropout(dropout),
                                          nn.Linear(4 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def first(self, x, guide, padding=None):
        """(B, n, d) and (B, m, d) -> (B, n, d): the first layer's output, X'' in Fig. 2."""
        read, _ = self.attention(x, guide, guide, key_padding_mask=padding, need_weights=False)
        return self.norm1(x + self.dropout(read))

    def second(self, x):
        return self.norm2(x + self.dropout(self.feed_forward(x)))

    def forward(self, x, guide, padding=None):
        return self.second(self.first(x, guide, padding))

class SelfAttention(GuidedAttention):
    """x -> (X', X''): the block's output, and its first layer's, which guides the other modality."""

    def forward(self, x, padding=None):
        first = self.first(x, x, padding)
        return self.second(first), first

class MAT(nn.Module):
    """Mutual attention transformer (Zhou & Luo, Fig. 1 and 3): a dermoscopy photo and the words about the patient.

    unit   a row of Table 1: "none", "sa-sa", "sa-sga" (words guide the image), "sga-sa" (its mirror) or "sga-sga"
    words  (B, m) int64: numbers from the vocabulary, 0 where there is none; those come last
    Ours: the image tokens are the places of the encoder's last map, before its pool (in the paper 100 regions of a
    detector), and the words have learned embeddings (in the paper GloVe's).
    """

    reads = ("dermoscopy", "words")

    def __init__(self, backbone, num_classes, num_words, weights="none", unit="sga-sga", width=512, dropout=0.1):
        super().__init__()
        self.unit = unit
        self.encoder = backbones.build(backbone, weights)
        self.image_tokens = nn.Linear(self.encoder.channels[-1], width)
        self.embedding = nn.Embedding(num_words, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        if unit != "none":
            self.image_self, self.words_self = SelfAttention(width), SelfAttention(width)
        if unit in ("sa-sga", "sga-sga"):
            self.image_guided = GuidedAttention(width)
        if unit in ("sga-sa", "sga-sga"):
            self.words_guided = GuidedAttention(width)
        self.image_out = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout))
        self.words_out = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout))
        self.norm = nn.Sequential(nn.LayerNorm(width), nn.Dropout(dropout))
        self.tasks = nn.ModuleList(nn.Linear(width, n) for n in num_classes)

    def forward(self, dermoscopy, words):
        padding = words == 0  # (B, m)
        x = self.encoder(dermoscopy)[-1].flatten(2).transpose(1, 2)  # (B, n, C_4)
        x = self.image_tokens(x)  # (B, n, d)
        y, _ = self.lstm(self.embedding(words))  # (B, m, d); padding comes last and changes no word before it
        if self.unit != "none":
            x, guide_x = self.image_self(x)
            y, guide_y = self.words_self(y, padding)
        if self.unit in ("sa-sga", "sga-sga"):
            x = self.image_guided(x, guide_y, padding)
        if self.unit in ("sga-sa", "sga-sga"):
            y = self.words_guided(y, guide_x)
        x = self.image_out(x).sum(1)  # (B, d)
        y = self.words_out(y).masked_fill(padding[..., None], 0).sum(1)  # (B, d)
        z = self.norm(x * y)
        return {"fusion": [task(z) for task in self.tasks]}

# ---------------------------------------------------------------- CLNet: a class and an outline, each helping the other

class FusionModule(nn.Sequential):
    """FM_i of CLNet's Fig. 2: concat, 1x1 convolution, squeeze-and-excitation, 3x3 convolution: (B, C, H, W) twice ->
    (B, width, H, W)."""

    def __init__(self, channels, width):
        super().__init__(ConvNormReLU(2 * channels, width, 1), SqueezeExcitation(width, max(8, width // 16)),
                         ConvNormReLU(width, width, 3))

    def forward(self, class_map, outline_map):
        return super().forward(torch.cat((class_map, outline_map), 1))

class CLNet(nn.Module):
    """Combined learning (Zhang et al., ISBI 2021, Fig. 1): an encoder for the class and one for the outline, fused
    stage by stage; the class from the pooled fused maps, the mask from a U-Net's decoder on them.

    learns  "both", or only "class" or "mask" (rows of Tables 1 and 2): one encoder, whose own maps replace FM_i
    Ours: both encoders of one kind, so that their maps have one size; at most 256 channels in FM_i and in the decoder.
    """

    reads = ("dermoscopy",)

    def __init__(self, backbone, num_classes, weights="none", learns="both"):
        super().__init__()
        self.encoders = nn.ModuleList([backbones.build(backbone, weights)])
        widths = self.encoders[0].channels
        self.fusions = nn.ModuleList()
        if learns == "both":
            self.encoders.append(backbones.build(backbone, weights))
            self.fusions = nn.ModuleList(FusionModule(width, min(width, 256)) for width in widths)
            widths = [min(width, 256) for width in widths]
        self.tasks = nn.ModuleList()
        if learns != "mask":
            self.tasks = nn.ModuleList(nn.Linear(sum(widths), n) for n in num_classes)  # Eq. 1
        self.decoder = nn.ModuleList()  # from the last stage to the first
        if learns != "class":
            width = widths[-1]
            for skip in reversed(widths[:-1]):
                after = min(skip, 256)
                self.decoder.append(nn.Sequential(ConvNormReLU(width + skip, after, 3), ConvNormReLU(after, after, 3)))
                width = after
            self.outline = nn.Conv2d(width, 1, 1)

    def forward(self, dermoscopy):
        maps = self.encoders[0](dermoscopy)
        if self.fusions:
            other = self.encoders[1](dermoscopy)
            maps = [fusion(a, b) for fusion, a, b in zip(self.fusions, maps, other)]  # FM_1 to FM_4
        outputs = {}
        if self.tasks:
            pooled = torch.cat([each.mean((2, 3)) for each in maps], 1)  # Eq. 1: GAP of each, side by side
            outputs["dermoscopy"] = [task(pooled) for task in self.tasks]
        if self.decoder:
            x = maps[-1]
            for block, skip in zip(self.decoder, reversed(maps[:-1])):
                up = F.interpolate(x, skip.shape[2:], mode="bilinear")
                x = block(torch.cat((up, skip), 1))  # Eq. 4
            x = self.outline(x)  # (B, 1, H_1, W_1) logits
            outputs["mask"] = F.interpolate(x, dermoscopy.shape[2:], mode="bilinear")  # (B, 1, H, W)
        return outputs

def make(flags, num_classes, num_words=0, pretrained=False):
    """The model that train.py's flags (a dict) ask for: with pretrained weights if `pretrained`, else random ones."""
    backbone, weights, clinical_weights = flags["backbone"], "none", "none"
    if pretrained:
        weights, clinical_weights = flags["weights"], flags["clinical_weights"]
    if flags["modality"] != "both":
        return OneModality(backbone, num_classes, weights, flags["modality"])
    if flags["model"] == "ammfm":
        return AMMFM(backbone, flags["clinical_backbone"], num_classes, weights, clinical_weights)
    if flags["model"] == "mat":
        return MAT(backbone, num_classes, num_words, weights, flags["unit"])
    if flags["model"] == "clnet":
        return CLNet(backbone, num_classes, weights, flags["tasks"])
    return PEMM(backbone, num_classes, weights, flags["encoder"], flags["fusion"], flags["classifiers"],
                flags["reading"])

def load(saved, device):
    """The network whose weights are in `saved`, a run's model.pt."""
    num_classes = [len(classes) for classes in saved["tasks"].values()]
    network = make(saved["flags"], num_classes, len(saved["vocabulary"])).to(device).eval()
    network.load_state_dict(saved["network"])
    return network

def find_device(name=None):
    """The device of that name, else the accelerator that is here, else the CPU."""
    try:
        return torch.empty(1, device=name or torch.accelerator.current_accelerator(True) or "cpu").device
    except (RuntimeError, AssertionError) as error:
        raise RunError(f"--device {name or 'not given'}: {str(error).splitlines()[0]}") from error

def count_parameters(model, as_in_paper=True):
    """Number of parameters. The paper counts each encoder with its unused 1000-class ImageNet classifier, which our
    encoders do not have (Swin and ConvNeXt: 769,000 each); as_in_paper=False counts what works."""
    count = sum(parameter.numel() for parameter in model.parameters())
    if as_in_paper:
        for module in model.modules():
            if isinstance(module, backbones.Encoder):
                count += 1000 * module.channels[-1] + 1000
    return count

def main():
    baseline = {"encoder": "separate", "fusion": "concat"}
    rows = [  # table, row, the paper's millions, class, backbone, keywords
        ("5", "PS: shared encoder, concatenation", "30.14", PEMM, "swin_v2_t", {"fusion": "concat"}),
        ("5", "PS + CA", "32.10", PEMM, "swin_v2_t", {"fusion": "ca"}),
        ("6", "PEMM, C and D classifiers shared", "30.65", PEMM, "swin_v2_t", {"classifiers": "shared"})]
    millions = {"swin_v2_t": ("28.82", "58.49", "31.12"), "convnext_t": ("29.05", "58.96", "31.35"),
                "resnet50": ("26.68", "55.52", "36.93"), "densenet201": ("20.17", "44.17", "29.88")}
    for backbone, (one, two, pemm) in millions.items():
        rows += [("8", "one modality", one, OneModality, backbone, {}),
                 ("5, 8", "baseline: two encoders, concatenation", two, PEMM, backbone, baseline),
                 ("3, 5, 8", "PEMM = PS + SCA", pemm, PEMM, backbone, {}),
                 ("", "AMMFM with a light MobileNetV2", "", AMMFM, backbone, {})]
    two_classes = {"num_classes": (2,)}
    of_two_classes = {"swin_v2_t": ("28.81", "58.48", "31.11"), "convnext_t": ("29.05", "58.95", "31.35")}
    for backbone, (one, two, pemm) in of_two_classes.items():
        rows += [("9", "one modality, 2 outputs", one, OneModality, backbone, two_classes),
                 ("9", "baseline, 2 outputs", two, PEMM, backbone, two_classes | baseline),
                 ("9", "PEMM, 2 outputs", pemm, PEMM, backbone, two_classes)]
    print("tables   row                                   backbone     paper, M  ours, as the paper counts     at work")
    for table, row, paper, kind, backbone, keywords in rows:
        with torch.device("meta"):  # shapes only: counts need no memory
            network = kind(backbone, **keywords)
        counted = count_parameters(network)
        works = count_parameters(network, as_in_paper=False)
        print(f"{table:8} {row:37} {backbone:12} {paper:>5}    {counted / 1e6:5.2f} M = {counted:<10,}  {works:>14,}")
    print("DenseNet-201's 20.17 has two digits swapped. At work: without ImageNet's idle classifier.")

if __name__ == "__main__":
    main()
