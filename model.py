"""PEMM: two photos of one lesion in, three predictions out (Fig. 2 of the PEMM paper).

One shared encoder sees the clinical and the dermoscopy photo. After each of its four stages a shared cross-attention
lets each modality read the other. Three classifiers predict every task: from the clinical features, from the dermoscopy
features and from both. The switches of `PEMM` are the rows of Tables 5 and 6:

    encoder="separate", fusion="concat"    the baseline: two encoders
    encoder="shared",   fusion="concat"    PS: parameters shared
    encoder="shared",   fusion="ca"        PS + CA: one set of attention projections per modality
    encoder="shared",   fusion="sca"       PS + SCA = PEMM
    classifiers="shared"                   one classifier for the clinical and the dermoscopy branch

Every model names its inputs in `reads` and returns a dict from branch to a list of T logit tensors (B, n_t):

    outputs = network(*(inputs[name] for name in network.reads))
    outputs["fusion"][0]                   the fusion branch's logits of the first task

Shapes: B lesions, T tasks, n_t classes of task t, C_4 channels of the last stage.

Run `python model.py` to see the parameter columns of Tables 3, 5, 6, 8 and 9, the paper's beside ours.
"""
import torch
from torch import nn

import backbones
from shared_attention import CrossAttention

SPC_CLASSES = (5, 3, 3, 3, 2, 3, 2, 3)  # DIAG PN STR PIG RS DaG BWV VS: 24 outputs

class Classifier(nn.Module):
    """(B, features) -> T logit tensors (B, n_t). Layers and rate are those of the authors' earlier public code,
    FusionM4Net; with them every parameter count of the paper comes out."""

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

    backbone      a name of backbones.BACKBONES
    num_classes   classes of each task
    weights       what backbones.build takes: None, "imagenet" or a path
    encoder       "shared" or "separate"
    fusion        "sca", "ca" or "concat"
    classifiers   "separate" or "shared" (clinical with dermoscopy; fusion always has its own)
    reading       what crosses in the attention, "cross" or "swapped": see shared_attention.py

    In training B must be 2 or more, for the batch norm.
    """

    reads = ("clinical", "dermoscopy")

    def __init__(self, backbone, num_classes=SPC_CLASSES, weights=None, encoder="shared", fusion="sca",
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
        # A shared encoder takes both photos as one batch, which is the same and faster, unless it has batch norm
        # (ResNet, DenseNet): there the paper's two passes normalise each modality by its own statistics.
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
        c, d = self.both(encoder_c.stem, encoder_d.stem, clinical, dermoscopy)
        for stage in range(4):
            c, d = self.both(encoder_c.stages[stage], encoder_d.stages[stage], c, d)
            if self.attentions:
                c, d = self.attentions[stage](c, d)
        return self.both(encoder_c.pool, encoder_d.pool, c, d)

    def both(self, module_c, module_d, c, d):
        """Each module on its modality; as one batch where it is one module."""
        if self.one_batch:
            return module_c(torch.cat((c, d))).chunk(2)
        return module_c(c), module_d(d)

class OneModality(nn.Module):
    """The Derm and Clic rows of Tables 8 and 9: one photo, one encoder, one classifier."""

    def __init__(self, backbone, num_classes=SPC_CLASSES, weights=None, modality="dermoscopy"):
        super().__init__()
        self.reads = (modality,)
        self.encoder = backbones.build(backbone, weights)
        self.classifier = Classifier(self.encoder.channels[-1], num_classes)

    def forward(self, image):
        modality = self.reads[0]
        return {modality: self.classifier(self.encoder.pool(self.encoder(image)[-1]))}

def make(flags, num_classes, weights=None):
    """The model that train.py's flags (a dict) ask for."""
    if flags["modality"] != "both":
        return OneModality(flags["backbone"], num_classes, weights, flags["modality"])
    return PEMM(flags["backbone"], num_classes, weights, flags["encoder"], flags["fusion"], flags["classifiers"],
                flags["reading"])

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
                 ("3, 5, 8", "PEMM = PS + SCA", pemm, PEMM, backbone, {})]
    outputs = {"num_classes": (2,)}
    millions = {"swin_v2_t": ("28.81", "58.48", "31.11"), "convnext_t": ("29.05", "58.95", "31.35")}
    for backbone, (one, two, pemm) in millions.items():
        rows += [("9", "one modality, 2 outputs", one, OneModality, backbone, outputs),
                 ("9", "baseline, 2 outputs", two, PEMM, backbone, outputs | baseline),
                 ("9", "PEMM, 2 outputs", pemm, PEMM, backbone, outputs)]
    print("tables   row                                   backbone      paper   ours, as the paper counts    at work")
    for table, row, paper, kind, backbone, keywords in rows:
        with torch.device("meta"):  # shapes only: counts need no memory
            network = kind(backbone, **keywords)
        counted = count_parameters(network)
        works = count_parameters(network, as_in_paper=False)
        print(f"{table:8} {row:37} {backbone:12} {paper:>5} M  {counted / 1e6:5.2f} M = {counted:<10,}  {works:>14,}")
    print("DenseNet-201's 20.17 has two digits swapped. At work: without ImageNet's idle classifier.")

if __name__ == "__main__":
    main()
