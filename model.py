"""PEMM: two photos of one lesion in, three predictions out (Fig. 2 of the paper).

One shared encoder sees the clinical and the dermoscopy photo. After each of its four stages a
shared cross-attention lets each photo read the other. Three classifiers predict every task: from
the clinical features, from the dermoscopy features, and from both (fusion). The switches of PEMM
are the rows of Tables 5 and 6:

    encoder="separate", fusion="concat"    baseline: two encoders, nothing crosses
    encoder="shared", fusion="concat"      PS, parameters shared: one encoder, nothing crosses
    encoder="shared", fusion="ca"          PS + CA, cross-attention: each photo has its own layers
    encoder="shared", fusion="sca"         PS + SCA, shared cross-attention: this is PEMM
    classifiers="shared"                   one classifier for the clinical and dermoscopy features

("concat" is the paper's word for: nothing crosses before the fusion branch concatenates.)

Shapes: B lesions, T tasks, n_t classes of task t, S the side of a photo. The encoder's four maps
are (B, C_1, H_1, W_1) to (B, C_4, H_4, W_4), its stem's is (B, C_0, H_0, W_0): see the top of
backbones.py.

Every network takes a batch, the dict that data.make_batch returns: "clinical" and "dermoscopy" (B,
3, S, S), "labels" (B, T) int64, "words" (B, m) for MAT and "mask" (B, 1, S, S) for CLNet. Labels
are read by the loss alone (loss.py), where -1 means unknown. It returns a dict from branch to the
list of its T logit tensors, (B, n_t) for task t:

    outputs = network(batch)
    outputs["fusion"][0]       the fusion branch's logits of the first task

    PEMM, AMMFM                branches "clinical", "dermoscopy" and "fusion"
    OneModality                one branch, called like its photo
    MAT                        one branch, "fusion" (of photo and words)
    CLNet                      "dermoscopy", if it learns the class; if it learns the mask "mask",
                               which is no branch: one tensor

`network.inputs` names the entries of the batch that forward reads, `network.targets` those that its
loss (loss.py) reads. train.py refuses a release that lacks one of them.

The method ends with `OneModality`. The relatives AMMFM, MAT and CLNet follow, then what builds and
loads a network. `python model.py` prints the parameters of PEMM's rows beside the paper's.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

import backbones
from shared_attention import CrossAttention, NoAttention, OneWayAttention

# The numbers of classes in the Seven-Point Checklist: the diagnosis, then seven criteria. Only a
# default: a run takes the tasks of its release.
SPC_CLASSES = (5, 3, 3, 3, 2, 3, 2, 3)


class Classifier(nn.Module):
    """Pooled features (B, C) -> T logit tensors (B, n_t).

    The layers and the dropout are not in the paper. They are those of FusionM4Net, an earlier
    public code by the same authors, and give the paper's numbers of parameters. For the batch norm
    B must be 2 or more in training.
    """

    def __init__(self, channels, num_classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(channels, 512),
            nn.BatchNorm1d(512),
            nn.SiLU(),
            nn.Dropout(0.3),
            nn.Linear(512, 128),
            nn.BatchNorm1d(128),
            nn.SiLU(),
            nn.Dropout(0.3),
        )
        self.heads = nn.ModuleList(nn.Linear(128, n) for n in num_classes)  # one for each task

    def forward(self, x):
        x = self.body(x)  # (B, 128)
        return [head(x) for head in self.heads]


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(choices)}")


class TwoPhotoNetwork(nn.Module):
    """Fig. 2 with parts to fill in. A subclass sets in its __init__:

    encoder_clinical, encoder_dermoscopy    one object under two names if it is shared
    attentions                              four, one after each stage
    classifier_clinical, classifier_dermoscopy, classifier_fusion
    """

    inputs = ("clinical", "dermoscopy")
    targets = ("labels",)
    main_encoder = "encoder_dermoscopy"  # name of the part that a later run takes by --weights RUN
    one_batch = False  # whether a shared encoder gets both photos as one batch

    def forward(self, batch):
        is_shared = self.encoder_clinical is self.encoder_dermoscopy
        if is_shared and self.one_batch:
            c, d = self.features_in_one_batch(batch["clinical"], batch["dermoscopy"])
        else:
            c, d = self.features(batch["clinical"], batch["dermoscopy"])  # (B, C_4) each
        return {
            "clinical": self.classifier_clinical(c),
            "dermoscopy": self.classifier_dermoscopy(d),
            "fusion": self.classifier_fusion(torch.cat((c, d), dim=1)),
        }

    def features(self, clinical, dermoscopy):
        """Two photos (B, 3, S, S) -> their pooled features, (B, C_4) each.

        `features_in_one_batch` has the same steps again: change both.
        """
        c = self.encoder_clinical.stem(clinical)  # (B, C_0, H_0, W_0)
        d = self.encoder_dermoscopy.stem(dermoscopy)
        for i in range(4):
            c = self.encoder_clinical.stage(i, c)  # (B, C_{i+1}, H_{i+1}, W_{i+1})
            d = self.encoder_dermoscopy.stage(i, d)
            c, d = self.attentions[i](c, d)  # adds to each what it reads of the other
        c = self.encoder_clinical.pool(c)  # (B, C_4)
        d = self.encoder_dermoscopy.pool(d)
        return c, d

    def features_in_one_batch(self, clinical, dermoscopy):
        """What `features` gives, if one encoder is shared. It gets both photos as a batch of 2B.

        This is 1.1 to 1.4 times faster on a CPU. It must not be used for an encoder with batch
        norm, which would normalise the two kinds of photo together.
        """
        encoder = self.encoder_dermoscopy
        x = encoder.stem(torch.cat((clinical, dermoscopy)))  # (2B, C_0, H_0, W_0), clinical first
        for i in range(4):
            x = encoder.stage(i, x)  # (2B, C_{i+1}, H_{i+1}, W_{i+1})
            c, d = x.chunk(2)  # the first half is clinical
            c, d = self.attentions[i](c, d)
            x = torch.cat((c, d))
        x = encoder.pool(x)  # (2B, C_4)
        c, d = x.chunk(2)
        return c, d


class PEMM(TwoPhotoNetwork):
    """The paper's network; its switches are the rows of Tables 5 and 6 (see the top of the file).

    backbone       a name that backbones.build_encoder takes
    num_classes    classes of each task, (n_1, ..., n_T)
    weights        "none" (random), or what else build_encoder takes
    encoder        "shared" or "separate"
    fusion         "sca", "ca" or "concat": shared, separate or no cross-attention
    classifiers    "separate", or "shared" by the clinical and the dermoscopy branch

    A shared part is in the state dict twice, under both of its names, and in parameters() once.
    A shared classifier has batch norm, and so have some encoders (ResNet, DenseNet, MobileNet). In
    training it normalises each photo by its own batch, but in evaluation by running statistics that
    average over both kinds of photo.
    """

    def __init__(
        self,
        backbone,
        num_classes=SPC_CLASSES,
        weights="none",
        encoder="shared",
        fusion="sca",
        classifiers="separate",
    ):
        super().__init__()
        check_choice("encoder", encoder, ("shared", "separate"))
        check_choice("fusion", fusion, ("sca", "ca", "concat"))
        check_choice("classifiers", classifiers, ("separate", "shared"))

        self.encoder_dermoscopy = backbones.build_encoder(backbone, weights)
        if encoder == "shared":
            self.encoder_clinical = self.encoder_dermoscopy
        else:
            self.encoder_clinical = backbones.build_encoder(backbone, weights)

        self.attentions = nn.ModuleList()
        for channels in self.encoder_dermoscopy.channels:
            if fusion == "concat":
                self.attentions.append(NoAttention())
            else:
                self.attentions.append(CrossAttention(channels, shared=(fusion == "sca")))

        last = self.encoder_dermoscopy.channels[-1]  # C_4
        self.classifier_dermoscopy = Classifier(last, num_classes)
        if classifiers == "shared":
            self.classifier_clinical = self.classifier_dermoscopy
        else:
            self.classifier_clinical = Classifier(last, num_classes)
        self.classifier_fusion = Classifier(2 * last, num_classes)

        self.one_batch = encoder == "shared" and not has_batch_norm(self.encoder_dermoscopy)


def has_batch_norm(module):
    batch_norm = nn.modules.batchnorm._BatchNorm  # of any dimension
    return any(isinstance(part, batch_norm) for part in module.modules())


class OneModality(nn.Module):
    """One photo, one encoder, one classifier: "Derm" and "Clic" (clinical) in Tables 8 and 9."""

    targets = ("labels",)
    main_encoder = "encoder"

    def __init__(self, backbone, num_classes=SPC_CLASSES, weights="none", modality="dermoscopy"):
        super().__init__()
        check_choice("modality", modality, ("clinical", "dermoscopy"))
        self.modality = modality
        self.inputs = (modality,)
        self.encoder = backbones.build_encoder(backbone, weights)
        self.classifier = Classifier(self.encoder.channels[-1], num_classes)

    def forward(self, batch):
        maps = self.encoder(batch[self.modality])  # of the four stages
        features = self.encoder.pool(maps[3])  # (B, C_4)
        return {self.modality: self.classifier(features)}


# The method ends here.

# ------------------------------------------------------ AMMFM: pay less on the clinical photo


class AMMFM(TwoPhotoNetwork):
    """Tang & Lasser 2024, "Pay less on clinical images" (arXiv 2407.09999).

    A light encoder for the clinical photo, a heavy one for dermoscopy. Dermoscopy reads clinical,
    and nothing flows back. We know the abstract only. Our guess: all else is as in PEMM, with an
    attention after each of the four stages and three classifiers.
    """

    def __init__(
        self,
        backbone,
        clinical_backbone="mobilenet_v2",
        num_classes=SPC_CLASSES,
        weights="none",
        clinical_weights="none",
    ):
        super().__init__()
        self.encoder_clinical = backbones.build_encoder(clinical_backbone, clinical_weights)
        self.encoder_dermoscopy = backbones.build_encoder(backbone, weights)
        channels_c = self.encoder_clinical.channels
        channels_d = self.encoder_dermoscopy.channels
        self.attentions = nn.ModuleList()
        for i in range(4):
            self.attentions.append(OneWayAttention(channels_c[i], channels_d[i]))
        self.classifier_clinical = Classifier(channels_c[-1], num_classes)
        self.classifier_dermoscopy = Classifier(channels_d[-1], num_classes)
        self.classifier_fusion = Classifier(channels_c[-1] + channels_d[-1], num_classes)


# ------------------------------------------------ MAT: one photo and the words about the patient


class AttentionBlock(nn.Module):
    """A block of MAT's Fig. 2: attention, then a feed-forward network. Each is followed by dropout,
    residual connection and layer norm.

    A sequence reads a guide. If it is its own guide, this is the paper's SA (self-attention), if
    the guide comes from the other modality, its GA (guided attention).
    """

    def __init__(self, width, num_heads, dropout):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, num_heads, dropout, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, guide, padding=None):
        """N tokens x (B, N, width) read m tokens of a guide (B, m, width). `padding` (B, m) is True
        where the guide has no word.

        Returns (B, N, width) twice: the block's output, and what stands after its attention. In MAT
        the latter is what guides the other modality.
        """
        out, _ = self.attention(x, guide, guide, key_padding_mask=padding, need_weights=False)
        attended = self.norm1(x + self.dropout(out))
        out = self.feed_forward(attended)
        return self.norm2(attended + self.dropout(out)), attended


class MAT(nn.Module):
    """Mutual attention transformer (Zhou & Luo, Fig. 1 and 3): a dermoscopy photo and words.

    unit        a row of Table 1, "none" or <what the words read>-<what the photo reads>: "sa" is
                self-attention; "sga" is self-attention, then attention to the other one
                "sa-sa"      each reads itself alone
                "sa-sga"     the photo also reads the words
                "sga-sa"     the words also read the photo
                "sga-sga"    each also reads the other: this is MAT
    num_words   size of the vocabulary. In a batch words are numbers (B, m): first 1, then words,
                then zeros, which are no words. The 1 must not be missing: the attention to a row
                of zeros alone is NaN

    Not in the paper: the photo's tokens are the places of the encoder's last map, before its final
    norm (there 100 regions from a detector), and the words' embeddings are learned (there GloVe's).
    The defaults of width, num_heads and dropout are the paper's (Sec. 3.2).
    """

    inputs = ("dermoscopy", "words")
    targets = ("labels",)
    main_encoder = "encoder"

    def __init__(
        self,
        backbone,
        num_classes,
        num_words,
        weights="none",
        unit="sga-sga",
        width=512,
        num_heads=8,
        dropout=0.1,
    ):
        super().__init__()
        check_choice("unit", unit, ("none", "sa-sa", "sa-sga", "sga-sa", "sga-sga"))
        self.has_self_attention = unit != "none"
        self.photo_reads_words = unit in ("sa-sga", "sga-sga")
        self.words_read_photo = unit in ("sga-sa", "sga-sga")
        self.encoder = backbones.build_encoder(backbone, weights)
        self.photo_tokens = nn.Linear(self.encoder.channels[-1], width)
        self.embedding = nn.Embedding(num_words, width, padding_idx=0)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        if self.has_self_attention:
            self.photo_self = AttentionBlock(width, num_heads, dropout)
            self.words_self = AttentionBlock(width, num_heads, dropout)
        if self.photo_reads_words:
            self.photo_guided = AttentionBlock(width, num_heads, dropout)
        if self.words_read_photo:
            self.words_guided = AttentionBlock(width, num_heads, dropout)
        self.photo_out = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout))
        self.words_out = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in num_classes)

    def forward(self, batch):
        padding = batch["words"] == 0  # (B, m)
        last_map = self.encoder(batch["dermoscopy"])[3]  # (B, C_4, H_4, W_4)
        photo = self.photo_tokens(last_map.flatten(2).transpose(1, 2))  # (B, N, width), N = H_4 W_4
        words = self.embedding(batch["words"])  # (B, m, width)
        words, _ = self.lstm(words)  # reads from left to right: zeros at the end change no word
        if self.has_self_attention:  # so with every unit but "none"
            photo, photo_guide = self.photo_self(photo, photo)
            words, words_guide = self.words_self(words, words, padding)
        if self.photo_reads_words:
            photo, _ = self.photo_guided(photo, words_guide, padding)
        if self.words_read_photo:
            words, _ = self.words_guided(words, photo_guide)
        photo = self.photo_out(photo).sum(dim=1)  # (B, width)
        words = self.words_out(words).masked_fill(padding[:, :, None], 0)  # no word adds nothing
        words = words.sum(dim=1)  # (B, width)
        fused = self.dropout(self.norm(photo * words))
        return {"fusion": [head(fused) for head in self.heads]}


# ----------------------------------------------- CLNet: a class and a mask, each helping the other


# Channels of the fused maps and of the decoder, at most. Not in the paper: with the 2048 of
# ResNet's last map they would be most of the network.
MAX_WIDTH = 256


class FusionModule(nn.Module):
    """FM_i of CLNet's Fig. 2: two maps (B, C, H, W) -> one (B, width, H, W).

    Conv2dNormActivation is torchvision's convolution, batch norm and ReLU.
    """

    def __init__(self, channels, width):
        super().__init__()
        self.layers = nn.Sequential(
            Conv2dNormActivation(2 * channels, width, 1),
            SqueezeExcitation(width, max(8, width // 16)),  # 16: Hu et al. 2018
            Conv2dNormActivation(width, width, 3),
        )

    def forward(self, class_map, mask_map):
        return self.layers(torch.cat((class_map, mask_map), dim=1))


class Decoder(nn.Module):
    """A U-Net's decoder: four maps, fine to coarse, -> logits (B, 1, H_1, W_1) of the mask."""

    order = (2, 1, 0)  # from maps[3] over maps[2] and maps[1] to maps[0]

    def __init__(self, channels):
        super().__init__()
        self.blocks = nn.ModuleList()
        width = channels[3]
        for i in self.order:
            next_width = min(channels[i], MAX_WIDTH)
            block = nn.Sequential(
                Conv2dNormActivation(width + channels[i], next_width, 3),
                Conv2dNormActivation(next_width, next_width, 3),
            )
            self.blocks.append(block)
            width = next_width
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, maps):
        x = maps[3]
        for block, i in zip(self.blocks, self.order):
            x = F.interpolate(x, maps[i].shape[2:], mode="bilinear")
            x = block(torch.cat((x, maps[i]), dim=1))  # Eq. 4
        return self.last(x)


class CLNet(nn.Module):
    """Combined learning (Zhang et al., ISBI 2021, Fig. 1): an encoder for the class and one for the
    lesion's mask, fused after each stage. The class comes from the pooled fused maps, the mask from
    a decoder on them.

    learns      "both", or only "class" or "mask" (rows of Tables 1 and 2): then there is one
                encoder, and its own maps take the place of the fused ones

    Not in the paper: both encoders are of one kind, so that their maps have the same sizes. Their
    `pool` is not called, so a final norm in it is idle.
    """

    inputs = ("dermoscopy",)

    def __init__(self, backbone, num_classes, weights="none", learns="both"):
        super().__init__()
        check_choice("learns", learns, ("both", "class", "mask"))
        self.learns_class = learns != "mask"
        self.learns_mask = learns != "class"
        if learns == "both":
            self.targets = ("labels", "mask")
            self.main_encoder = "encoder_class"  # see TwoPhotoNetwork
        elif learns == "class":
            self.targets = ("labels",)
            self.main_encoder = "encoder_class"
        else:
            self.targets = ("mask",)
            self.main_encoder = "encoder_mask"

        if self.learns_class:
            self.encoder_class = backbones.build_encoder(backbone, weights)
            channels = self.encoder_class.channels
        if self.learns_mask:
            self.encoder_mask = backbones.build_encoder(backbone, weights)
            channels = self.encoder_mask.channels  # the same, if there are both

        # widths: channels of the four maps that the class and the mask are computed from
        if learns == "both":
            widths = [min(width, MAX_WIDTH) for width in channels]
            self.fusions = nn.ModuleList()
            for i in range(4):
                self.fusions.append(FusionModule(channels[i], widths[i]))
        else:
            widths = channels
        if self.learns_class:
            self.heads = nn.ModuleList(nn.Linear(sum(widths), n) for n in num_classes)
        if self.learns_mask:
            self.decoder = Decoder(widths)

    def maps(self, batch):
        """The four maps from which all else is computed: FM_1 to FM_4, or the only encoder's.

        `maps` and `classify` are apart because evaluate.py draws what counts in the last map.
        """
        photo = batch["dermoscopy"]
        if not self.learns_mask:
            return self.encoder_class(photo)
        if not self.learns_class:
            return self.encoder_mask(photo)
        class_maps = self.encoder_class(photo)
        mask_maps = self.encoder_mask(photo)
        fused = []
        for i in range(4):
            fused.append(self.fusions[i](class_maps[i], mask_maps[i]))
        return fused

    def classify(self, maps):
        """Eq. 1: the pooled maps side by side, then a linear layer a task -> T logits (B, n_t)."""
        pooled = []
        for each in maps:
            pooled.append(each.mean((2, 3)))  # (B, width)
        features = torch.cat(pooled, dim=1)
        return [head(features) for head in self.heads]

    def forward(self, batch):
        maps = self.maps(batch)
        outputs = {}
        if self.learns_class:
            outputs["dermoscopy"] = self.classify(maps)
        if self.learns_mask:
            mask = self.decoder(maps)  # (B, 1, H_1, W_1) logits
            size = batch["dermoscopy"].shape[2:]
            outputs["mask"] = F.interpolate(mask, size, mode="bilinear")  # (B, 1, S, S)
        return outputs


# ------------------------------------------------------- building and loading, for all networks

# The format of model.pt and last.pt. It goes up whenever train.py writes other keys there; a file
# of another format is refused.
FORMAT = 3


class RunError(ValueError):
    """A run that cannot be used, or a device that is not there. Says why and what to do."""


def build_model(flags, num_classes, num_words, pretrained=False):
    """The network that train.py's flags (a dict) ask for, with random weights unless `pretrained`.

    num_classes: classes of each task; num_words: size of the vocabulary, for MAT. With `pretrained`
    the encoders begin with the weights that the flags name. A run that goes on needs none of them.
    flags["tasks"] is what CLNet learns; the tasks of a release are others.
    """
    backbone = flags["backbone"]
    weights = clinical_weights = "none"
    if pretrained:
        weights = first_weights(flags["weights"], backbone)
    if pretrained and flags["model"] == "ammfm":
        clinical_weights = first_weights(flags["clinical_weights"], flags["clinical_backbone"])

    if flags["modality"] != "both":
        check_choice("model with one modality", flags["model"], ("pemm",))
        return OneModality(backbone, num_classes, weights, modality=flags["modality"])
    if flags["model"] == "pemm":
        switches = {name: flags[name] for name in ("encoder", "fusion", "classifiers")}
        return PEMM(backbone, num_classes, weights, **switches)
    if flags["model"] == "ammfm":
        return AMMFM(
            backbone,
            clinical_backbone=flags["clinical_backbone"],
            num_classes=num_classes,
            weights=weights,
            clinical_weights=clinical_weights,
        )
    if flags["model"] == "mat":
        return MAT(backbone, num_classes, num_words, weights, unit=flags["unit"])
    if flags["model"] == "clnet":
        return CLNet(backbone, num_classes, weights, learns=flags["tasks"])
    raise ValueError(f"unknown model {flags['model']!r}")


def is_run(weights):
    """Is a value of --weights the folder of an earlier run?"""
    return weights not in ("none", "imagenet", "") and Path(weights).is_dir()


def first_weights(weights, backbone):
    """Turns a value of --weights or --clinical-weights into what build_encoder takes.

    The folder of an earlier run becomes the state dict of that run's encoder. If the run has two
    encoders, it is always the main one: of PEMM and AMMFM that of dermoscopy, of CLNet the one that
    learns the class. All else stays as it is.
    """
    if not is_run(weights):
        return weights
    saved = read_run_file(Path(weights) / "model.pt")
    trained = saved["flags"]["backbone"]
    if trained != backbone:
        raise RunError(f"{weights}: its main encoder is a {trained} and not a {backbone}")
    prefix = saved["main_encoder"] + "."
    state = {}
    for name, value in saved["network"].items():
        if name.startswith(prefix):
            state[name.removeprefix(prefix)] = value
    print(f"the {backbone} begins with the weights of {weights} ({saved['main_encoder']})")
    return state


def read_run_file(path):
    """The dict in a run's model.pt or last.pt. Raises RunError if it cannot be used."""
    try:
        saved = backbones.read_checkpoint(path)
    except backbones.WeightsError as error:
        advice = ""
        if Path(path).name == "model.pt":
            advice = " If the run is not finished: python train.py --resume RUN."
        raise RunError(f"{error}{advice}") from error
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        raise RunError(f"{path} is no file of this version's runs (format {FORMAT}): train again")
    return saved


def load_run(saved, device):
    """The trained network, in evaluation mode. `saved` is what read_run_file found in model.pt."""
    num_classes = [len(classes) for classes in saved["tasks"].values()]
    network = build_model(saved["flags"], num_classes, len(saved["vocabulary"]))
    network.load_state_dict(saved["network"])
    return network.to(device).eval()


def needs_masks(flags):
    """Does the network that these flags ask for learn masks? It must agree with CLNet.targets."""
    return flags["model"] == "clnet" and flags["tasks"] != "class"


def find_device(name=None):
    """The device of that name; without a name the accelerator that is here, else the CPU."""
    device = name
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.empty(1, device=device).device  # fails if it is not there; cuda becomes cuda:0
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"device {device}: {reason}") from error


def has_bfloat16(device):
    """Can this device calculate in bfloat16 itself? Otherwise it is imitated, which is slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        abilities = torch.cpu.get_capabilities()
        return bool(abilities.get("avx512_bf16") or abilities.get("amx_bf16"))
    return False  # not known of other devices


def count_parameters(model, as_in_paper=False):
    """The number of parameters.

    The paper also counts each encoder's 1000-class ImageNet classifier, which is never used
    there and which our encoders do not have: 769,000 parameters for a Tiny one. as_in_paper=True
    adds it.
    """
    count = sum(parameter.numel() for parameter in model.parameters())
    if as_in_paper:
        for module in model.modules():  # a shared encoder comes once
            if isinstance(module, backbones.Encoder):
                count += module.channels[-1] * 1000 + 1000
    return count


def main():
    rows = {  # of Tables 3, 5 and 6 with Swin-V2-T: name -> the paper's millions, switches of PEMM
        "baseline: two encoders": ("58.49", {"encoder": "separate", "fusion": "concat"}),
        "PS: shared encoder": ("30.14", {"fusion": "concat"}),
        "PS + CA": ("32.10", {"fusion": "ca"}),
        "PS + SCA = PEMM": ("31.12", {}),
        "PEMM, shared classifiers": ("30.65", {"classifiers": "shared"}),
    }
    print(
        "Swin-V2-T, 24 outputs        paper    ours, with the paper's idle classifier    without it"
    )
    for name, (paper, switches) in rows.items():
        with torch.device("meta"):  # no memory and no numbers: only the shapes are counted
            network = PEMM("swin_v2_t", **switches)
        as_in_paper = count_parameters(network, as_in_paper=True)
        print(f"{name:26} {paper:>5} M {as_in_paper:>20,} {count_parameters(network):>32,}")


if __name__ == "__main__":
    main()
