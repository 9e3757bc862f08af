"""The networks by hand: the second half of what model.py teaches.

PEMM comes first: a classifier layer by layer, Fig. 2 step by step for each row of Tables 5 and 6,
who can read whom, what is shared, and every number of parameters in the paper. Values and
gradients are compared, in float64. From "regression" on follow refusals, AMMFM, MAT, CLNet, and
what builds and loads networks; a reader of the method can skip them.

Shapes: B lesions, T tasks, n_t classes of task t, C_i channels after stage i. The encoder is almost
always "convnext_mini" of conftest.py, which has one small block a stage.

close(ours, expected, tolerance) of conftest.py fails if the largest difference, as a share of the
largest expected value, is above the tolerance. Without one it is 1e-9, which suits float64; float32
needs 1e-6.
as_if_trained(network) of conftest.py moves each parameter from its first value, which would hide
mistakes, and puts the network into float64 and evaluation mode.
"""

from argparse import Namespace
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import backbones
import model
from conftest import as_if_trained, close, randomise, without_init
from loss import biased_loss, equal_loss
from model import (
    AMMFM,
    FORMAT,
    MAT,
    PEMM,
    AttentionBlock,
    Classifier,
    CLNet,
    Decoder,
    OneModality,
    RunError,
    build_model,
    count_parameters,
    first_weights,
    is_run,
    load_run,
    needs_masks,
    read_run_file,
)

NUM_CLASSES = (3, 2)  # of the two tasks of most tests


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def convnext_light(monkeypatch):
    """A backbone for AMMFM's clinical photo, with other channels than convnext_mini."""
    make = partial(backbones.ConvNeXt, depths=(1, 1, 1, 1), channels=(8, 12, 20, 28))
    light = backbones.Backbone(make, head="classifier.2", published=None)
    monkeypatch.setitem(backbones.BACKBONES, "convnext_light", light)


def small_pemm(encoder="shared", fusion="sca", classifiers="separate"):
    network = PEMM(
        "convnext_mini", NUM_CLASSES, encoder=encoder, fusion=fusion, classifiers=classifiers
    )
    return as_if_trained(network)


def random_photos(B=2):
    return torch.randn(B, 3, 64, 64, dtype=torch.float64, requires_grad=True)


def random_batch(B=2):
    return {"clinical": random_photos(B), "dermoscopy": random_photos(B)}


def sum_of_squares(logits):
    """One number that depends on all T logits of a branch."""
    return sum(task_logits.square().sum() for task_logits in logits)


def assert_same(outputs, expected):
    """The same branches in the same order, and the same logits."""
    assert list(outputs) == list(expected)
    for branch in outputs:
        for ours, theirs in zip(outputs[branch], expected[branch], strict=True):
            close(ours, theirs)


def has_gradient(module):
    """Did the last backward pass reach any parameter of this module?"""
    for parameter in module.parameters():
        if parameter.grad is not None and parameter.grad.any():
            return True
    return False


def gradients_as_vector(outputs, inputs):
    """Of all branches, by all inputs, end to end."""
    total = sum(sum_of_squares(logits) for logits in outputs.values())
    gradients = torch.autograd.grad(total, inputs, retain_graph=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


# ----------------------------------------------------------------------------------- the classifier


def test_a_classifier_layer_by_layer():
    """In evaluation: dropout does nothing, batch norm takes its running statistics."""
    classifier = as_if_trained(Classifier(6, NUM_CLASSES))
    first, first_norm, _, _, second, second_norm, _, _ = classifier.body
    features = torch.randn(4, 6, dtype=torch.float64)
    x = features
    for linear, norm in ((first, first_norm), (second, second_norm)):
        x = x @ linear.weight.T + linear.bias
        x = (x - norm.running_mean) / (norm.running_var + 1e-5).sqrt()
        x = x * norm.weight + norm.bias
        x = x / (1 + (-x).exp())  # SiLU
    assert x.shape == (4, 128)
    logits = classifier(features)
    close(logits[0], x @ classifier.heads[0].weight.T + classifier.heads[0].bias)
    close(logits[1], x @ classifier.heads[1].weight.T + classifier.heads[1].bias)
    assert logits[0].shape == (4, 3)
    assert logits[1].shape == (4, 2)


# ------------------------------------------------------------------------------------- PEMM, Fig. 2


def add_cross_attention(layers_c, layers_d, c, d):
    """Both photos read each other, with torch's own attention of one head."""
    tokens_c = c.flatten(2).transpose(1, 2)  # (B, N, C)
    tokens_d = d.flatten(2).transpose(1, 2)
    read_by_c = F.scaled_dot_product_attention(
        layers_c.query(tokens_c), layers_d.key(tokens_d), layers_d.value(tokens_d)
    )
    read_by_d = F.scaled_dot_product_attention(
        layers_d.query(tokens_d), layers_c.key(tokens_c), layers_c.value(tokens_c)
    )
    c = c + read_by_c.transpose(1, 2).reshape(c.shape)
    d = d + read_by_d.transpose(1, 2).reshape(d.shape)
    return c, d


def pemm_by_hand(network, batch, crosses):
    """Fig. 2: each photo in its own pass. `crosses`: is there an attention after each stage?"""
    encoder_c = network.encoder_clinical
    encoder_d = network.encoder_dermoscopy
    c = encoder_c.stem(batch["clinical"])
    d = encoder_d.stem(batch["dermoscopy"])
    for i in range(4):
        c = encoder_c.stage(i, c)
        d = encoder_d.stage(i, d)
        if crosses:
            layers = network.attentions[i]
            c, d = add_cross_attention(layers.project_clinical, layers.project_dermoscopy, c, d)
    c = encoder_c.pool(c)  # (B, C_4)
    d = encoder_d.pool(d)
    return {
        "clinical": network.classifier_clinical(c),
        "dermoscopy": network.classifier_dermoscopy(d),
        "fusion": network.classifier_fusion(torch.cat((c, d), dim=1)),
    }


ROWS = {  # of Tables 5 and 6: name -> switches of PEMM
    "baseline": {"encoder": "separate", "fusion": "concat"},
    "PS": {"fusion": "concat"},
    "PS + CA": {"fusion": "ca"},
    "PEMM": {},
    "PEMM, shared classifiers": {"classifiers": "shared"},
}


@pytest.mark.parametrize("row", ROWS)
def test_fig_2_step_by_step(row):
    network = small_pemm(**ROWS[row])
    batch = random_batch()
    outputs = network(batch)
    crosses = row not in ("baseline", "PS")
    expected = pemm_by_hand(network, batch, crosses)
    assert_same(outputs, expected)
    inputs = [batch["clinical"], batch["dermoscopy"]] + list(network.parameters())
    close(gradients_as_vector(outputs, inputs), gradients_as_vector(expected, inputs))


def test_every_branch_answers_every_task():
    outputs = small_pemm()(random_batch(B=4))
    assert list(outputs) == ["clinical", "dermoscopy", "fusion"]
    for logits in outputs.values():
        assert [task_logits.shape for task_logits in logits] == [(4, 3), (4, 2)]


def photos_behind(network):
    """The photos on which the logits of each branch depend: branch -> a set of photos."""
    batch = random_batch()
    photos = {}
    for branch, logits in network(batch).items():
        gradients = torch.autograd.grad(
            sum_of_squares(logits), list(batch.values()), retain_graph=True, allow_unused=True
        )
        photos[branch] = set()
        for photo, gradient in zip(batch, gradients):
            if gradient is not None and gradient.any():
                photos[branch].add(photo)
    return photos


BOTH = {"clinical", "dermoscopy"}


@pytest.mark.parametrize("row", ["baseline", "PS"])
def test_without_attention_only_the_fusion_branch_sees_both_photos(row):
    network = small_pemm(**ROWS[row])
    expected = {"clinical": {"clinical"}, "dermoscopy": {"dermoscopy"}, "fusion": BOTH}
    assert photos_behind(network) == expected


@pytest.mark.parametrize("row", ["PS + CA", "PEMM", "PEMM, shared classifiers"])
def test_with_attention_every_branch_sees_both_photos(row):
    network = small_pemm(**ROWS[row])
    assert photos_behind(network) == {"clinical": BOTH, "dermoscopy": BOTH, "fusion": BOTH}


def test_a_new_attention_changes_nothing():
    """The values start at zero, so PEMM begins with the answers of PS."""
    pemm = PEMM("convnext_mini", NUM_CLASSES).double().eval()
    ps = PEMM("convnext_mini", NUM_CLASSES, fusion="concat").double().eval()
    state = {}
    for name, value in pemm.state_dict().items():
        if not name.startswith("attentions."):
            state[name] = value
    ps.load_state_dict(state)
    batch = random_batch()
    assert_same(pemm(batch), ps(batch))


@pytest.mark.parametrize("w, learns", [(0.0, False), (0.1, True)])
def test_w_is_the_clinical_classifiers_share(w, learns):
    network = small_pemm().train()
    labels = torch.tensor([[0, 1], [2, 0]])
    total, _ = biased_loss(network(random_batch()), labels, w)
    total.backward()
    assert network.classifier_clinical.heads[0].weight.grad.any() == learns
    assert network.classifier_dermoscopy.heads[0].weight.grad.any()
    assert network.classifier_fusion.heads[0].weight.grad.any()


# ----------------------------------------------------------------------------------- what is shared


def test_a_shared_encoder_has_two_names_and_is_one_object():
    network = small_pemm()
    assert network.encoder_clinical is network.encoder_dermoscopy
    names = list(network.state_dict())
    clinical = [name for name in names if name.startswith("encoder_clinical.")]
    dermoscopy = [name for name in names if name.startswith("encoder_dermoscopy.")]
    assert len(clinical) == len(dermoscopy) == len(network.encoder_dermoscopy.state_dict())

    storages = [parameter.data_ptr() for parameter in network.parameters()]
    assert len(storages) == len(set(storages)), "an optimizer would move a parameter twice"
    encoder = {parameter.data_ptr() for parameter in network.encoder_dermoscopy.parameters()}
    assert encoder <= set(storages)


def test_a_shared_encoder_learns_from_both_photos():
    """Its gradient is the sum of those of two separate encoders with the same weights."""
    shared = small_pemm(encoder="shared", fusion="concat")
    separate = small_pemm(encoder="separate", fusion="concat")
    separate.load_state_dict(shared.state_dict())  # it has both names
    batch = random_batch()
    for network in (shared, separate):
        sum(sum_of_squares(logits) for logits in network(batch).values()).backward()
    of_clinical = dict(separate.encoder_clinical.named_parameters())
    of_dermoscopy = dict(separate.encoder_dermoscopy.named_parameters())
    for name, parameter in shared.encoder_dermoscopy.named_parameters():
        assert of_clinical[name].grad.any()
        close(parameter.grad, of_clinical[name].grad + of_dermoscopy[name].grad)


@pytest.mark.parametrize(
    "branch, clinical_learns, dermoscopy_learns",
    [
        ("clinical", True, False),
        ("dermoscopy", False, True),
        ("fusion", True, True),
    ],
)
def test_separate_encoders_see_a_photo_each(branch, clinical_learns, dermoscopy_learns):
    network = small_pemm(encoder="separate", fusion="concat")
    sum_of_squares(network(random_batch())[branch]).backward()
    assert has_gradient(network.encoder_clinical) == clinical_learns
    assert has_gradient(network.encoder_dermoscopy) == dermoscopy_learns


@pytest.mark.parametrize("classifiers", ["shared", "separate"])
def test_shared_classifiers_are_those_of_clinical_and_dermoscopy(classifiers):
    network = small_pemm(classifiers=classifiers)
    same = network.classifier_clinical is network.classifier_dermoscopy
    assert same == (classifiers == "shared")
    assert network.classifier_fusion is not network.classifier_dermoscopy


@pytest.mark.parametrize("row", ROWS)
def test_one_batch_of_both_photos_is_the_same_as_two_passes(row):
    network = small_pemm(**ROWS[row])
    assert network.one_batch == (row != "baseline")
    batch = random_batch()
    inputs = list(batch.values()) + list(network.parameters())
    outputs = network(batch)
    network.one_batch = False
    two_passes = network(batch)
    assert_same(outputs, two_passes)
    close(gradients_as_vector(outputs, inputs), gradients_as_vector(two_passes, inputs))


@pytest.mark.parametrize("modality", ["clinical", "dermoscopy"])
def test_one_modality_is_one_encoder_and_one_classifier(modality):
    network = as_if_trained(OneModality("convnext_mini", NUM_CLASSES, modality=modality))
    assert network.inputs == (modality,)
    batch = random_batch()
    x = network.encoder.stem(batch[modality])
    for i in range(4):
        x = network.encoder.stage(i, x)
    expected = network.classifier(network.encoder.pool(x))
    assert_same(network({modality: batch[modality]}), {modality: expected})


# ---------------------------------------------------------------- the paper's numbers of parameters

SPC = (5, 3, 3, 3, 2, 3, 2, 3)  # classes of the eight tasks, 24 outputs
# Tables 3, 5, 6 and 8: our parameters, and the paper's millions where it prints them.
# A network with a further branch has more: give it a row of its own, these are the paper's.
COUNTS = {
    "swin_v2_t": {
        "encoder": (28_351_570, None),
        "one modality": (28_815_338, "28.82"),
        "baseline": (58_487_660, "58.49"),
        "PS": (30_136_090, "30.14"),
        "PS + CA": (32_098_090, "32.10"),
        "PEMM": (31_117_090, "31.12"),
        "PEMM, shared classifiers": (30_653_322, "30.65"),
    },
    "swin_t": {  # not the paper's
        "encoder": (28_288_354, None),
        "one modality": (28_752_122, None),
        "baseline": (58_361_228, None),
        "PS": (30_072_874, None),
        "PS + CA": (32_034_874, None),
        "PEMM": (31_053_874, None),
        "PEMM, shared classifiers": (30_590_106, None),
    },
    "convnext_t": {
        "encoder": (28_589_128, None),
        "one modality": (29_052_896, "29.05"),
        "baseline": (58_962_776, "58.96"),
        "PS": (30_373_648, None),
        "PS + CA": (32_335_648, None),
        "PEMM": (31_354_648, "31.35"),
        "PEMM, shared classifiers": (30_890_880, None),
    },
    "resnet50": {
        "encoder": (25_557_032, None),
        "one modality": (26_676_160, "26.68"),
        "baseline": (55_520_024, "55.52"),
        "PS": (29_962_992, None),
        "PS + CA": (43_898_992, None),
        "PEMM": (36_930_992, "36.93"),
        "PEMM, shared classifiers": (35_811_864, None),
    },
    "densenet201": {
        "encoder": (20_013_928, None),
        "one modality": (21_067_520, "21.07"),  # the paper prints 20.17: two digits exchanged
        "baseline": (44_171_672, "44.17"),
        "PS": (24_157_744, None),
        "PS + CA": (35_593_584, None),
        "PEMM": (29_875_664, "29.88"),
        "PEMM, shared classifiers": (28_822_072, None),
    },
}


@cache
def network_of(row, backbone, num_classes=SPC):
    """On the device "meta" a network has shapes but no numbers, so it is built quickly."""
    with without_init(), torch.device("meta"):
        if row == "encoder":
            return backbones.build_encoder(backbone)
        if row == "one modality":
            return OneModality(backbone, num_classes)
        return PEMM(backbone, num_classes, **ROWS[row])


@pytest.mark.parametrize("backbone", COUNTS)
def test_every_parameter_of_the_paper_is_there(backbone):
    for row, (expected, printed) in COUNTS[backbone].items():
        found = count_parameters(network_of(row, backbone), as_in_paper=True)
        assert found == expected, row
        if printed is not None:
            assert f"{found / 1e6:.2f}" == printed, row


@pytest.mark.parametrize("row", ROWS)
def test_the_papers_swin_is_not_the_first_version(row):
    """ "SwinTransformer (Tiny)" could be Swin or Swin V2; only V2 gives the paper's digits."""
    found = count_parameters(network_of(row, "swin_t"), as_in_paper=True)
    _, printed = COUNTS["swin_v2_t"][row]
    assert f"{found / 1e6:.2f}" != printed


@pytest.mark.parametrize(
    "backbone, row, printed",
    [
        ("swin_v2_t", "one modality", "28.81"),
        ("swin_v2_t", "baseline", "58.48"),
        ("swin_v2_t", "PEMM", "31.11"),
        ("convnext_t", "one modality", "29.05"),
        ("convnext_t", "baseline", "58.95"),
        ("convnext_t", "PEMM", "31.35"),
    ],
)
def test_the_two_outputs_of_table_9(backbone, row, printed):
    network = network_of(row, backbone, (2,))
    millions = count_parameters(network, as_in_paper=True) / 1e6
    assert f"{millions:.2f}" == printed


@pytest.mark.parametrize("backbone", COUNTS)
def test_as_in_paper_counts_the_imagenet_classifiers_that_are_not_there(backbone):
    """torchvision counts its network with that classifier."""
    encoder = network_of("encoder", backbone)
    published = backbones.BACKBONES[backbone].published.meta["num_params"]
    assert count_parameters(encoder, as_in_paper=True) == published
    classifier = 1000 * encoder.channels[-1] + 1000
    assert count_parameters(encoder) == published - classifier
    assert count_parameters(encoder) == sum(value.numel() for value in encoder.parameters())


@pytest.mark.parametrize("row, encoders", [("baseline", 2), ("PS", 1), ("PEMM", 1)])
def test_each_encoder_has_one_idle_classifier(row, encoders):
    network = network_of(row, "convnext_t")
    idle = count_parameters(network, as_in_paper=True) - count_parameters(network)
    assert idle == encoders * 769_000


# The tutorial ends here. The regression nets that follow guard PEMM's details, its relatives, and
# what builds and loads networks.

# --------------------------------------------------------------------------------------- regression


def test_main_prints_the_papers_millions_beside_ours(capsys):
    """python model.py"""
    with without_init():
        model.main()
    lines = capsys.readouterr().out.splitlines()[1:]
    for line, row in zip(lines, ROWS, strict=True):
        paper, _, ours, _ = line[26:].split()
        expected, printed = COUNTS["swin_v2_t"][row]
        assert int(ours.replace(",", "")) == expected
        assert paper == printed


@pytest.mark.parametrize(
    "backbone, one_batch",
    [
        ("swin_v2_t", True),
        ("swin_t", True),
        ("convnext_t", True),
        ("convnext_atto", True),
        ("resnet50", False),
        ("densenet201", False),
        ("mobilenet_v2", False),
    ],
)
def test_with_batch_norm_each_photo_goes_alone(backbone, one_batch):
    assert network_of("PEMM", backbone).one_batch == one_batch


@pytest.mark.parametrize("backbone", ["convnext_atto", "mobilenet_v2"])
def test_photos_may_have_any_size(backbone):
    with without_init():
        network = PEMM(backbone, SPC).eval()
    photos = torch.randn(1, 3, 43, 75)
    outputs = network({"clinical": photos, "dermoscopy": photos})
    assert [task_logits.shape[1] for task_logits in outputs["fusion"]] == list(SPC)


def test_a_single_lesion_is_predicted_but_not_learned_from():
    network = small_pemm()
    assert network(random_batch(B=1))["fusion"][0].shape == (1, 3)
    with pytest.raises(ValueError, match="more than 1 value"):  # batch norm's own words
        network.train()(random_batch(B=1))


@pytest.mark.parametrize(
    "network_class, switch",
    [
        (PEMM, {"encoder": "both"}),
        (PEMM, {"fusion": "swapped"}),
        (PEMM, {"classifiers": "none"}),
        (OneModality, {"modality": "both"}),
        (MAT, {"unit": "sa", "num_words": 9}),
        (CLNet, {"learns": "masks"}),
        (PEMM, {"backbone": "resnet5"}),
    ],
)
def test_what_is_not_known_is_refused(network_class, switch):
    arguments = {"backbone": "convnext_mini", "num_classes": NUM_CLASSES}
    arguments.update(switch)
    name = next(iter(switch))
    with pytest.raises(ValueError, match=f"{name}.*'{switch[name]}': choose"):
        network_class(**arguments)


class FourBranches(PEMM):
    """The exercise "add a branch": a fourth classifier, on the mean of both photos' maps."""

    def __init__(self):
        super().__init__("convnext_mini", NUM_CLASSES, fusion="concat")
        self.classifier_mean = Classifier(32, NUM_CLASSES)

    def forward(self, batch):
        outputs = super().forward(batch)
        c = self.encoder_clinical.pool(self.encoder_clinical(batch["clinical"])[-1])
        d = self.encoder_dermoscopy.pool(self.encoder_dermoscopy(batch["dermoscopy"])[-1])
        outputs["mean"] = self.classifier_mean((c + d) / 2)
        return outputs


def test_a_fourth_classifier_learns_with_the_equal_loss():
    network = FourBranches().double()
    outputs = network(random_batch(B=4))
    total, losses = equal_loss(outputs, torch.tensor([[0, 1], [2, 0], [1, 1], [-1, 0]]))
    assert list(losses) == ["clinical", "dermoscopy", "fusion", "mean"]
    close(total, sum(losses.values()) / 4)
    total.backward()
    assert has_gradient(network.classifier_mean)


# -------------------------------------------------------------------------------------------- AMMFM


def small_ammfm():
    return AMMFM("convnext_mini", "convnext_light", NUM_CLASSES)


def test_in_ammfm_dermoscopy_reads_clinical_and_nothing_flows_back():
    network = as_if_trained(small_ammfm())
    expected = {"clinical": {"clinical"}, "dermoscopy": BOTH, "fusion": BOTH}
    assert photos_behind(network) == expected


def test_a_new_ammfm_is_two_encoders_side_by_side():
    network = small_ammfm().double().eval()
    batch = random_batch()
    assert_same(network(batch), pemm_by_hand(network, batch, crosses=False))


@pytest.mark.parametrize("stage", range(4))
def test_ammfm_has_an_attention_after_each_stage(stage):
    """With the values of all other stages at zero the answers still depend on this one's."""
    network = as_if_trained(small_ammfm())
    batch = random_batch()
    for i in range(4):
        if i != stage:
            nn.init.zeros_(network.attentions[i].value.weight)
            nn.init.zeros_(network.attentions[i].value.bias)
    before = network(batch)
    nn.init.zeros_(network.attentions[stage].value.weight)
    after = network(batch)
    assert not torch.allclose(before["dermoscopy"][0], after["dermoscopy"][0], rtol=1e-6)
    close(before["clinical"][0], after["clinical"][0])


def test_ammfm_takes_encoders_with_other_channels_and_maps():
    """On 75 x 117 pixels the first maps of convnext_mini are 18 x 29, mobilenet_v2's 19 x 30."""
    with without_init():
        network = AMMFM("convnext_mini", "mobilenet_v2").eval()
    photos = torch.randn(1, 3, 75, 117)
    outputs = network({"clinical": photos, "dermoscopy": photos})
    assert outputs["fusion"][0].shape == (1, 5)


@pytest.mark.parametrize("backbone", ["swin_v2_t", "resnet50"])
def test_ammfm_is_smaller_than_two_equal_encoders(backbone):
    with without_init(), torch.device("meta"):
        network = AMMFM(backbone)  # with mobilenet_v2
    baseline, _ = COUNTS[backbone]["baseline"]
    assert count_parameters(network, as_in_paper=True) < baseline


# ---------------------------------------------------------------------------------------------- MAT

UNITS = ("none", "sa-sa", "sa-sga", "sga-sa", "sga-sga")


def small_mat(unit):
    """With a vocabulary of nine words, and tokens of 32 numbers."""
    return as_if_trained(MAT("convnext_mini", NUM_CLASSES, 9, unit=unit, width=32))


def test_an_attention_block_guided_by_itself_is_torchs_encoder_layer():
    block = as_if_trained(AttentionBlock(32, num_heads=4, dropout=0.1))
    twin = nn.TransformerEncoderLayer(32, 4, dim_feedforward=128, batch_first=True)
    twin.double().eval()
    their_names = {"attention": "self_attn", "feed_forward.0": "linear1"}
    their_names["feed_forward.3"] = "linear2"
    state = {}
    for name, value in block.state_dict().items():
        for ours, theirs in their_names.items():
            name = name.replace(ours, theirs)
        state[name] = value
    twin.load_state_dict(state)

    x = torch.randn(3, 5, 32, dtype=torch.float64, requires_grad=True)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    padding[2, 1:] = True
    ours, _ = block(x, x, padding)
    theirs = twin(x, src_key_padding_mask=padding)
    ours = ours[~padding]
    theirs = theirs[~padding]  # torch leaves the others at zero
    close(ours, theirs)
    our_gradient = torch.autograd.grad(ours.square().sum(), x)
    their_gradient = torch.autograd.grad(theirs.square().sum(), x)
    close(our_gradient[0], their_gradient[0])


def test_an_attention_block_by_hand():
    """One head of width 4 reads six tokens of a guide: softmax(q k^T / 2) v, then the MLP."""
    block = as_if_trained(AttentionBlock(4, num_heads=1, dropout=0.1))
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    guide = torch.randn(2, 6, 4, dtype=torch.float64)
    query_weight, key_weight, value_weight = block.attention.in_proj_weight.split(4)
    query_bias, key_bias, value_bias = block.attention.in_proj_bias.split(4)
    q = x @ query_weight.T + query_bias
    k = guide @ key_weight.T + key_bias
    v = guide @ value_weight.T + value_bias
    weights = (q @ k.transpose(1, 2) / 2).softmax(-1)  # (2, 3, 6)
    read = block.attention.out_proj(weights @ v)
    expected_attended = block.norm1(x + read)
    expected = block.norm2(expected_attended + block.feed_forward(expected_attended))
    out, attended = block(x, guide)
    close(attended, expected_attended)
    close(out, expected)


def test_mat_without_a_unit_by_hand():
    """A lesion with two words, then the same lesion with padding behind them."""
    network = small_mat("none")
    photo = random_photos(B=1)
    last_map = network.encoder(photo)[-1]  # (1, 32, 2, 2)
    photo_sum = 0
    for y in range(2):
        for x in range(2):
            token = network.photo_tokens(last_map[:, :, y, x])
            photo_sum = photo_sum + network.photo_out(token)
    embedded = network.embedding.weight[[1, 4]]  # (2, 32)
    words, _ = network.lstm(embedded[None])  # (1, 2, 32)
    words_sum = network.words_out(words[:, 0]) + network.words_out(words[:, 1])
    fused = network.norm(photo_sum * words_sum)
    expected = {"fusion": [head(fused) for head in network.heads]}
    assert_same(network({"dermoscopy": photo, "words": torch.tensor([[1, 4]])}), expected)
    assert_same(network({"dermoscopy": photo, "words": torch.tensor([[1, 4, 0, 0]])}), expected)


@pytest.mark.parametrize("unit", UNITS)
def test_padding_and_the_order_of_the_lesions_change_nothing(unit):
    network = small_mat(unit)
    photos = random_photos(B=3)
    words = torch.tensor([[1, 4, 2], [1, 8, 0], [1, 0, 0]])
    expected = network({"dermoscopy": photos, "words": words})

    padded = F.pad(words, (0, 2))
    assert_same(network({"dermoscopy": photos, "words": padded}), expected)

    backwards = network({"dermoscopy": photos.flip(0), "words": words.flip(0)})
    for t in range(2):
        close(backwards["fusion"][t].flip(0), expected["fusion"][t])

    alone = network({"dermoscopy": photos[2:], "words": words[2:, :1]})
    for t in range(2):
        close(alone["fusion"][t], expected["fusion"][t][2:])


@pytest.mark.parametrize("unit", UNITS)
def test_a_word_changes_the_answer_of_its_own_lesion_only(unit):
    network = small_mat(unit)
    photos = random_photos(B=3)
    words = torch.tensor([[1, 4, 2], [1, 8, 0], [1, 0, 0]])
    changed_words = torch.tensor([[1, 5, 2], [1, 8, 0], [1, 3, 0]])
    before = network({"dermoscopy": photos, "words": words})["fusion"][0]
    after = network({"dermoscopy": photos, "words": changed_words})["fusion"][0]
    changed = (after - before).abs().amax(1) > 1e-6
    assert changed.tolist() == [True, False, True]


@pytest.mark.parametrize("unit", UNITS)
def test_a_lesion_of_which_nothing_is_known_has_a_finite_answer(unit):
    """Its row of words is only the number 1, with which every row begins."""
    network = small_mat(unit)
    batch = {"dermoscopy": random_photos(B=2), "words": torch.tensor([[1, 0, 0], [1, 5, 3]])}
    logits = network(batch)["fusion"]
    sum_of_squares(logits).backward()
    assert logits[0].isfinite().all()
    for parameter in network.parameters():
        if parameter.grad is not None:  # the encoder's last norm is not used
            assert parameter.grad.isfinite().all()


def record_calls(network, names):
    """A dict that fills when the network is called: name -> inputs and output of its module."""
    calls = {}

    def hook_of(name):
        def hook(module, inputs, output):
            calls[name] = (inputs, output)

        return hook

    for name in names:
        getattr(network, name).register_forward_hook(hook_of(name))
    return calls


def depends_on(result, source):
    total = result.square().sum()
    (gradient,) = torch.autograd.grad(total, source, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(gradient.any())


@pytest.mark.parametrize(
    "unit, words_guide_photo, photo_guides_words",
    [
        ("none", False, False),
        ("sa-sa", False, False),
        ("sa-sga", True, False),
        ("sga-sa", False, True),
        ("sga-sga", True, True),
    ],
)
def test_who_is_guided_by_whom(unit, words_guide_photo, photo_guides_words):
    """What is summed over the tokens of one side depends on the other side only if that guides."""
    network = small_mat(unit)
    calls = record_calls(network, ["embedding", "photo_out", "words_out"])
    photo = random_photos()
    network({"dermoscopy": photo, "words": torch.tensor([[1, 4, 2], [1, 8, 0]])})
    _, embedded = calls["embedding"]
    _, photo_side = calls["photo_out"]
    _, words_side = calls["words_out"]
    assert depends_on(photo_side, embedded) == words_guide_photo
    assert depends_on(words_side, photo) == photo_guides_words


def test_a_side_is_guided_by_what_the_other_sides_first_half_has_found():
    """Fig. 1 of MAT: not by the output of the other side's whole block."""
    network = small_mat("sga-sga")
    names = ["photo_self", "words_self", "photo_guided", "words_guided"]
    calls = record_calls(network, names)
    network({"dermoscopy": random_photos(), "words": torch.tensor([[1, 4, 2], [1, 8, 0]])})
    _, (photo, photo_attended) = calls["photo_self"]
    _, (words, words_attended) = calls["words_self"]
    (x, guide, _), _ = calls["photo_guided"]
    assert x is photo
    assert guide is words_attended
    (x, guide), _ = calls["words_guided"]
    assert x is words
    assert guide is photo_attended


# -------------------------------------------------------------------------------------------- CLNet


def small_clnet(learns="both"):
    return CLNet("convnext_mini", NUM_CLASSES, learns=learns).double().eval()


@pytest.mark.parametrize(
    "backbone, learns, branches, targets",
    [
        ("convnext_mini", "both", ["dermoscopy", "mask"], ("labels", "mask")),
        ("convnext_mini", "class", ["dermoscopy"], ("labels",)),
        ("convnext_mini", "mask", ["mask"], ("mask",)),
        ("mobilenet_v2", "both", ["dermoscopy", "mask"], ("labels", "mask")),
    ],
)
def test_clnet_answers_for_photos_of_any_size(backbone, learns, branches, targets):
    with without_init():
        network = CLNet(backbone, NUM_CLASSES, learns=learns).eval()
    outputs = network({"dermoscopy": torch.randn(1, 3, 75, 117)})
    assert network.targets == targets
    assert list(outputs) == branches
    if "dermoscopy" in branches:
        assert [task_logits.shape for task_logits in outputs["dermoscopy"]] == [(1, 3), (1, 2)]
    if "mask" in branches:
        assert outputs["mask"].shape == (1, 1, 75, 117)


def test_clnets_class_comes_from_the_pooled_maps():
    """Eq. 1 of CLNet; evaluate.py asks for the maps and the class apart, for its heat map."""
    network = small_clnet()
    batch = {"dermoscopy": random_photos()}
    maps = network.maps(batch)
    assert [tuple(each.shape) for each in maps] == [
        (2, 8, 16, 16),
        (2, 16, 8, 8),
        (2, 24, 4, 4),
        (2, 32, 2, 2),
    ]
    for t, head in enumerate(network.heads):
        expected = head.bias
        first = 0
        for each in maps:
            channels = each.shape[1]
            weight = head.weight[:, first : first + channels]
            expected = expected + each.mean((2, 3)) @ weight.T
            first += channels
        close(network.classify(maps)[t], expected)
        close(network(batch)["dermoscopy"][t], expected)


@pytest.mark.parametrize("learns", ["class", "mask"])
def test_clnet_that_learns_one_thing_has_one_encoder_and_its_maps(learns):
    network = small_clnet(learns)
    encoders = [part for part in network.modules() if isinstance(part, backbones.Encoder)]
    assert len(encoders) == 1
    assert encoders[0] is getattr(network, f"encoder_{learns}")
    photo = random_photos()
    for ours, expected in zip(network.maps({"dermoscopy": photo}), encoders[0](photo), strict=True):
        close(ours, expected)


@pytest.mark.parametrize("branch", ["dermoscopy", "mask"])
def test_clnets_encoders_help_each_other(branch):
    network = small_clnet()
    outputs = network({"dermoscopy": random_photos()})
    outputs["mask"] = [outputs["mask"]]
    sum_of_squares(outputs[branch]).backward()
    assert has_gradient(network.encoder_class)
    assert has_gradient(network.encoder_mask)


@pytest.mark.parametrize("i", range(4))
def test_a_corner_of_each_map_changes_that_corner_of_the_mask(i):
    decoder = as_if_trained(Decoder((8, 16, 24, 32)))
    maps = []
    for channels, side in ((8, 64), (16, 32), (24, 16), (32, 8)):
        maps.append(torch.randn(1, channels, side, side, dtype=torch.float64))
    with torch.no_grad():
        before = decoder(maps)  # (1, 1, 64, 64)
        maps[i][:, :, 0, -1] += 5  # the corner on the top right
        change = (decoder(maps) - before).abs()[0, 0]
    assert change[:32, 32:].max() > 1e-6
    assert change[32:].max() == 0  # the lower half
    assert change[:, :32].max() == 0  # the left half


def test_a_mask_lies_where_its_photo_does():
    """A mirrored photo has the mirrored mask: the decoder neither turns nor shifts."""
    network = small_clnet("mask")
    for parameter in network.parameters():
        if (
            parameter.dim() == 4 and parameter.shape[-1] > 1
        ):  # a kernel that is its own mirror image
            parameter.data = (parameter.data + parameter.data.flip(-1)) / 2
    photo = random_photos()
    mask = network({"dermoscopy": photo})["mask"]
    mirrored = network({"dermoscopy": photo.flip(-1)})["mask"]
    assert mask.std() > 0
    close(mirrored.flip(-1), mask)


# ------------------------------------------------------------------------------- building a network

FLAGS = {  # those of train.py that a network reads
    "model": "pemm",
    "modality": "both",
    "backbone": "convnext_mini",
    "weights": "imagenet",
    "encoder": "shared",
    "fusion": "sca",
    "classifiers": "separate",
    "clinical_backbone": "convnext_light",
    "clinical_weights": "imagenet",
    "unit": "sga-sga",
    "tasks": "both",
}
MODELS = {  # flags that differ, and what they ask for
    "pemm": ({}, PEMM, {}),
    "two encoders": ({"encoder": "separate"}, PEMM, {"encoder": "separate"}),
    "CA": ({"fusion": "ca"}, PEMM, {"fusion": "ca"}),
    "PS": ({"fusion": "concat"}, PEMM, {"fusion": "concat"}),
    "shared classifiers": ({"classifiers": "shared"}, PEMM, {"classifiers": "shared"}),
    "clinical": ({"modality": "clinical"}, OneModality, {"modality": "clinical"}),
    "dermoscopy": ({"modality": "dermoscopy"}, OneModality, {"modality": "dermoscopy"}),
    "ammfm": ({"model": "ammfm"}, AMMFM, {"clinical_backbone": "convnext_light"}),
    "mat": ({"model": "mat"}, MAT, {"num_words": 9}),
    "sa-sga": ({"model": "mat", "unit": "sa-sga"}, MAT, {"num_words": 9, "unit": "sa-sga"}),
    "clnet": ({"model": "clnet"}, CLNet, {}),
    "class": ({"model": "clnet", "tasks": "class"}, CLNet, {"learns": "class"}),
    "mask": ({"model": "clnet", "tasks": "mask"}, CLNet, {"learns": "mask"}),
}


def flags_of(name):
    flags = dict(FLAGS)
    flags.update(MODELS[name][0])
    return flags


def shapes(network):
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


@cache
def network_of_flags(name):
    """On the device "meta"."""
    with without_init(), torch.device("meta"):
        return build_model(flags_of(name), NUM_CLASSES, num_words=9)


@pytest.mark.parametrize("name", MODELS)
def test_the_flags_choose_the_network(name):
    _, network_class, arguments = MODELS[name]
    network = network_of_flags(name)
    with without_init(), torch.device("meta"):
        expected = network_class("convnext_mini", num_classes=NUM_CLASSES, **arguments)
    assert type(network) is network_class
    assert shapes(network) == shapes(expected)
    assert count_parameters(network) == count_parameters(expected)
    assert network.inputs == expected.inputs
    assert network.targets == expected.targets


@pytest.mark.parametrize("name", MODELS)
def test_a_later_run_takes_an_encoder_of_the_flags_backbone(name):
    network = network_of_flags(name)
    encoder = getattr(network, network.main_encoder)
    assert isinstance(encoder, backbones.Encoder)
    assert encoder.channels == (8, 16, 24, 32)  # of convnext_mini


@pytest.mark.parametrize("name", MODELS)
def test_masks_are_needed_where_they_are_learned(name):
    network = network_of_flags(name)
    assert needs_masks(flags_of(name)) == ("mask" in network.targets)


def test_an_unknown_model_is_refused():
    flags = dict(FLAGS, model="resnet")
    with pytest.raises(ValueError, match="unknown model 'resnet'"):
        build_model(flags, NUM_CLASSES, num_words=9)


def test_only_a_new_run_asks_for_pretrained_weights():
    """There are no ImageNet weights for convnext_mini, so to ask for them is an error."""
    build_model(FLAGS, NUM_CLASSES, num_words=9)
    with pytest.raises(backbones.WeightsError, match="no ImageNet weights for convnext_mini"):
        build_model(FLAGS, NUM_CLASSES, num_words=9, pretrained=True)


# ------------------------------------------------------------------------------------ a run's files


def saved_run(flags, network):
    """What model.pt holds, as far as model.py reads it."""
    return {
        "format": FORMAT,
        "flags": flags,
        "network": network.state_dict(),
        "main_encoder": network.main_encoder,
        "tasks": {"diagnosis": ("nevus", "melanoma", "other"), "veil": ("absent", "present")},
        "vocabulary": ["", "begin", "a", "b", "c", "d", "e", "f", "g"],
    }


@pytest.mark.parametrize(
    "name",
    ["pemm", "two encoders", "shared classifiers", "clinical", "ammfm", "mat", "clnet", "mask"],
)
def test_a_loaded_network_answers_as_the_saved_one(name):
    flags = flags_of(name)
    with without_init():
        network = randomise(build_model(flags, NUM_CLASSES, num_words=9)).eval()
        loaded = load_run(saved_run(flags, network), torch.device("cpu"))
    assert not loaded.training
    batch = {
        "clinical": torch.randn(2, 3, 32, 32),
        "dermoscopy": torch.randn(2, 3, 32, 32),
        "words": torch.tensor([[1, 4], [1, 0]]),
    }
    with torch.no_grad():
        expected = network(batch)
        outputs = loaded(batch)
    assert list(outputs) == list(expected)
    for branch in outputs:
        for ours, theirs in zip(outputs[branch], expected[branch]):
            assert torch.equal(ours, theirs)


def test_a_runs_file_is_read_back(tmp_path):
    network = small_pemm()
    torch.save(saved_run(FLAGS, network), tmp_path / "model.pt")
    saved = read_run_file(tmp_path / "model.pt")
    assert saved["flags"] == FLAGS
    assert torch.equal(
        saved["network"]["encoder_clinical.features.0.0.weight"],
        network.encoder_clinical.features[0][0].weight,
    )


def assert_refused(path, reason):
    """In one line that names the file and the reason."""
    with pytest.raises(RunError) as refusal:
        read_run_file(path)
    message = str(refusal.value)
    assert str(path) in message
    assert reason in message
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(path)) + 200


@pytest.mark.parametrize(
    "content, reason",
    [
        pytest.param({"flags": {}}, "no file of this version's runs", id="without a format"),
        pytest.param({"format": FORMAT - 1}, "(format 3): train again", id="an older format"),
        pytest.param({"format": FORMAT + 1}, "(format 3): train again", id="a newer format"),
        pytest.param({"format": "3"}, "(format 3): train again", id="a text for a number"),
        pytest.param(Namespace(format=FORMAT), "could run code", id="a Namespace"),
        pytest.param({"format": FORMAT, "flags": Namespace()}, "could run code", id="one inside"),
        pytest.param([FORMAT], "no dict but a list", id="a list"),
    ],
)
def test_files_of_other_programs_and_versions_are_refused(content, reason, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(content, path)
    assert_refused(path, reason)


def test_missing_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "model.pt"
    assert_refused(path, "No such file")
    assert_refused(tmp_path / "last.pt", "No such file")
    torch.save(saved_run(FLAGS, small_pemm()), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])  # as a full disk leaves it
    assert_refused(path, "damaged")
    path.write_bytes(b"")
    assert_refused(path, "damaged")


# -------------------------------------------------------------------- the encoder of an earlier run


@pytest.fixture
def earlier_run(tmp_path):
    """The folder of a run with two encoders, so that a wrong choice between them shows."""
    network = small_pemm(encoder="separate")
    torch.save(saved_run(flags_of("two encoders"), network), tmp_path / "model.pt")
    return tmp_path


def assert_is_earlier_encoder(encoder, earlier_run, name="encoder_dermoscopy"):
    saved = read_run_file(earlier_run / "model.pt")["network"]
    for key, value in encoder.state_dict().items():
        close(value, saved[f"{name}.{key}"])


@pytest.mark.parametrize(
    "name, encoders",
    [
        ("pemm", ["encoder_clinical", "encoder_dermoscopy"]),
        ("two encoders", ["encoder_clinical", "encoder_dermoscopy"]),
        ("clinical", ["encoder"]),
        ("clnet", ["encoder_class", "encoder_mask"]),
        ("mask", ["encoder_mask"]),
    ],
)
def test_a_network_begins_with_the_dermoscopy_encoder_of_an_earlier_run(
    name, encoders, earlier_run, capsys
):
    flags = flags_of(name)
    flags["weights"] = str(earlier_run)
    with without_init():
        network = build_model(flags, NUM_CLASSES, num_words=9, pretrained=True)
    for encoder in encoders:
        assert_is_earlier_encoder(getattr(network, encoder), earlier_run)
    assert (
        f"begins with the weights of {earlier_run} (encoder_dermoscopy)" in capsys.readouterr().out
    )


def test_ammfm_takes_two_earlier_runs(earlier_run, tmp_path_factory):
    """The heavy encoder begins with one run's, the light one with another's."""
    light_run = tmp_path_factory.mktemp("light")
    flags = flags_of("clinical")
    flags["backbone"] = "convnext_light"
    light = build_model(flags, NUM_CLASSES, num_words=9)
    torch.save(saved_run(flags, light), light_run / "model.pt")

    flags = flags_of("ammfm")
    flags["weights"] = str(earlier_run)
    flags["clinical_weights"] = str(light_run)
    network = build_model(flags, NUM_CLASSES, num_words=9, pretrained=True)
    assert_is_earlier_encoder(network.encoder_dermoscopy, earlier_run)
    assert_is_earlier_encoder(network.encoder_clinical, light_run, "encoder")


def test_another_backbone_is_refused_by_name(earlier_run):
    flags = flags_of("pemm")
    flags["weights"] = str(earlier_run)
    flags["backbone"] = "convnext_atto"
    with pytest.raises(
        RunError, match="its main encoder is a convnext_mini and not a convnext_atto"
    ):
        build_model(flags, NUM_CLASSES, num_words=9, pretrained=True)


@pytest.mark.parametrize("weights", ["none", "imagenet", "some/file.pth"])
def test_other_weights_are_left_to_build_encoder(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("none", "imagenet"):  # folders of these names are no runs
        (tmp_path / name).mkdir()
    assert not is_run(weights)
    assert first_weights(weights, "convnext_mini") == weights


def test_a_folder_without_a_model_is_refused(tmp_path):
    """It may be a run that is not finished, so the message says how to go on with one."""
    with pytest.raises(RunError, match="model.pt cannot be read.*train.py --resume RUN"):
        first_weights(str(tmp_path), "convnext_mini")


# --------------------------------------------------------------------------------------- the device


def test_a_device_is_found_or_refused():
    assert model.find_device("cpu") == torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert model.find_device().type == (accelerator or torch.device("cpu")).type
    with pytest.raises(RunError, match="^device nonsense: ") as refusal:
        model.find_device("nonsense")
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    "device, abilities, expected",
    [
        ("cpu", {}, False),
        ("cpu", {"avx512_bf16": False, "amx_bf16": False}, False),
        ("cpu", {"avx512_bf16": True, "amx_bf16": False}, True),
        ("cpu", {"avx512_bf16": False, "amx_bf16": True}, True),
        ("mps", {"avx512_bf16": True, "amx_bf16": True}, False),
    ],
)
def test_bfloat16_where_the_processor_has_it(device, abilities, expected, monkeypatch):
    def get_capabilities():
        return abilities

    monkeypatch.setattr(torch.cpu, "get_capabilities", get_capabilities)
    assert model.has_bfloat16(torch.device(device)) is expected
