"""PEMM: two photos of one lesion in, three predictions out (Fig. 2 of the PEMM paper).

One shared encoder sees the clinical and the dermoscopy photo; after each of its four stages a shared cross-attention lets
the modalities read each other; three classifiers predict every task from the clinical features, the dermoscopy features
and both. The switches of `PEMM` are the rows of Tables 5 and 6:

    encoder="separate", fusion="concat"    the baseline: two encoders
    encoder="shared",   fusion="concat"    PS: parameters shared
    encoder="shared",   fusion="ca"        PS + CA: one set of attention projections per modality
    encoder="shared",   fusion="sca"       PS + SCA = PEMM
    classifiers="shared"                   one classifier for the clinical and the dermoscopy branch

Shapes: B pairs, T tasks, n_t classes of task t, C_4 channels of the last stage.

Run `python model.py` to see the parameter columns of Tables 3, 5, 6, 8 and 9, the paper's beside ours.
"""
from typing import NamedTuple

import torch
from torch import nn

import backbones
from shared_attention import CrossAttention

SPC_CLASSES = (5, 3, 3, 3, 2, 3, 2, 3)  # DIAG PN STR PIG RS DaG BWV VS: 24 outputs
BRANCHES = ("clinical", "dermoscopy", "fusion")


class Outputs(NamedTuple):
    """Per branch a list of T logit tensors (B, n_t); None for a branch that the model does not have."""
    clinical: list | None
    dermoscopy: list | None
    fusion: list | None


class Classifier(nn.Module):
    """(B, in) -> T logit tensors. Layers and rate are those of the authors' earlier public code, FusionM4Net; with them
    every parameter count of the paper comes out."""

    def __init__(self, features, num_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(features, 512), nn.BatchNorm1d(512), nn.SiLU(), nn.Dropout(0.3),
                                  nn.Linear(512, 128), nn.BatchNorm1d(128), nn.SiLU(), nn.Dropout(0.3))
        self.tasks = nn.ModuleList(nn.Linear(128, n) for n in num_classes)

    def forward(self, x):
        x = self.body(x)
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

    model(clinical, dermoscopy), each (B, 3, H, W), gives Outputs. In training B must be 2 or more, for the batch norm.
    """

    def __init__(self, backbone, num_classes=SPC_CLASSES, weights=None, encoder="shared", fusion="sca",
                 classifiers="separate", reading="cross"):
        super().__init__()
        check(encoder=(encoder, ("shared", "separate")), fusion=(fusion, ("sca", "ca", "concat")),
              classifiers=(classifiers, ("separate", "shared")))
        self.encoders = nn.ModuleList(backbones.build(backbone, weights) for _ in range(1 if encoder == "shared" else 2))
        channels = self.encoders[0].channels
        self.attentions = nn.ModuleList(
            [] if fusion == "concat" else [CrossAttention(c, shared=fusion == "sca", reading=reading) for c in channels])
        self.classifiers = nn.ModuleList(
            Classifier(channels[-1], num_classes) for _ in range(1 if classifiers == "shared" else 2))
        self.fusion_classifier = Classifier(2 * channels[-1], num_classes)
        # A shared encoder takes both photos as one batch, unless that would mix the modalities in its batch norm (ResNet,
        # DenseNet): there the paper's two passes through one network normalise each modality by its own statistics.
        self.one_batch = encoder == "shared" and not any(isinstance(m, nn.BatchNorm2d) for m in self.encoders.modules())

    def forward(self, clinical, dermoscopy):
        c, d = self.features(clinical, dermoscopy)
        return Outputs(self.classifiers[0](c), self.classifiers[-1](d), self.fusion_classifier(torch.cat((c, d), 1)))

    def features(self, clinical, dermoscopy):
        """The pooled features of both photos, (B, C_4) each."""
        c, d = self.both([encoder.stem for encoder in self.encoders], clinical, dermoscopy)
        for stage in range(4):
            c, d = self.both([encoder.stages[stage] for encoder in self.encoders], c, d)
            if self.attentions:
                c, d = self.attentions[stage](c, d)
        return self.both([encoder.pool for encoder in self.encoders], c, d)

    def both(self, modules, c, d):
        """One module for both photos, or one each; of a single one, [0] and [-1] are the same."""
        if self.one_batch:
            return modules[0](torch.cat((c, d))).chunk(2)
        return modules[0](c), modules[-1](d)


class OneModality(nn.Module):
    """The Derm and Clic rows of Tables 8 and 9: one encoder, one classifier. It takes the pair and looks at one photo."""

    def __init__(self, backbone, num_classes=SPC_CLASSES, weights=None, modality="dermoscopy"):
        super().__init__()
        check(modality=(modality, ("clinical", "dermoscopy")))
        self.modality = modality
        self.encoder = backbones.build(backbone, weights)
        self.classifier = Classifier(self.encoder.channels[-1], num_classes)

    def forward(self, clinical, dermoscopy):
        image = clinical if self.modality == "clinical" else dermoscopy
        logits = self.classifier(self.encoder.pool(self.encoder(image)[-1]))
        return Outputs(**{branch: logits if branch == self.modality else None for branch in BRANCHES})


def make(flags, num_classes, weights=None):
    """The model that train.py's flags ask for."""
    if flags["modality"] != "both":
        return OneModality(flags["backbone"], num_classes, weights, flags["modality"])
    return PEMM(flags["backbone"], num_classes, weights, flags["encoder"], flags["fusion"], flags["classifiers"], flags["reading"])


def check(**switches):
    for name, (value, choices) in switches.items():
        if value not in choices:
            raise ValueError(f"{name} is {value!r}: choose {' or '.join(choices)}")


def count_parameters(model, as_in_paper=True):
    """Number of parameters. The paper counts each encoder with its unused 1000-class ImageNet classifier, which our
    encoders do not have (Swin and ConvNeXt: 769,000 each); as_in_paper=False counts what works."""
    idle = sum(1000 * module.channels[-1] + 1000 for module in model.modules() if isinstance(module, backbones.Encoder))
    return sum(parameter.numel() for parameter in model.parameters()) + (idle if as_in_paper else 0)


def main():
    swin, two = "swin_v2_t", (2,)
    rows = [  # table, row, the paper's millions, our model
        ("3, 5", "PEMM, Swin", "31.12", lambda: PEMM(swin)),
        ("5", "baseline: two encoders, concatenation", "58.49", lambda: PEMM(swin, encoder="separate", fusion="concat")),
        ("5", "PS: shared encoder, concatenation", "30.14", lambda: PEMM(swin, fusion="concat")),
        ("5", "PS + CA", "32.10", lambda: PEMM(swin, fusion="ca")),
        ("5", "PS + SCA", "31.12", lambda: PEMM(swin)),
        ("6", "PEMM, C and D classifiers shared", "30.65", lambda: PEMM(swin, classifiers="shared")),
    ]
    for name, title, paper in (("resnet50", "ResNet50", ("26.68", "55.52", "36.93")),
                               ("densenet201", "DenseNet201", ("20.17", "44.17", "29.88")),
                               ("convnext_t", "ConvNeXt", ("29.05", "58.96", "31.35")),
                               (swin, "Swin", ("28.82", "58.49", "31.12"))):
        rows += [("8", f"{title}, one modality", paper[0], lambda name=name: OneModality(name)),
                 ("8", f"{title}, baseline", paper[1], lambda name=name: PEMM(name, encoder="separate", fusion="concat")),
                 ("8", f"{title}, PEMM", paper[2], lambda name=name: PEMM(name))]
    for name, title, paper in (("convnext_t", "ConvNeXt", ("29.05", "58.95", "31.35")),
                               (swin, "Swin", ("28.81", "58.48", "31.11"))):
        rows += [("9", f"{title}, one modality, 2 outputs", paper[0], lambda name=name: OneModality(name, two)),
                 ("9", f"{title}, baseline, 2 outputs", paper[1],
                  lambda name=name: PEMM(name, two, encoder="separate", fusion="concat")),
                 ("9", f"{title}, PEMM, 2 outputs", paper[2], lambda name=name: PEMM(name, two))]
    print("table  row                                     paper   counted as in the paper   at work (no idle ImageNet classifier)")
    for table, row, paper, make in rows:
        with torch.device("meta"):  # shapes only: counts need no memory
            model = make()
        counted, works = count_parameters(model), count_parameters(model, as_in_paper=False)
        remark = "" if paper == f"{counted / 1e6:.2f}" else "   <- the paper's digits are swapped" * (paper == "20.17")
        print(f"{table:6} {row:39} {paper:>5} M  {counted / 1e6:5.2f} M = {counted:<10,}     {works:>10,}{remark}")


if __name__ == "__main__":
    main()
