"""The model: every parameter of the paper's tables, and who can read whom."""
import pytest
import torch

import backbones
from conftest import close, randomise
from loss import biased_loss
from model import PEMM, OneModality, count_parameters

BRANCHES = ("clinical", "dermoscopy", "fusion")

BASELINE = {"encoder": "separate", "fusion": "concat"}
VARIANTS = [  # the columns of COUNTS after the encoder itself
    lambda name, n: OneModality(name, n), lambda name, n: PEMM(name, n, **BASELINE), lambda name, n: PEMM(name, n, fusion="concat"),
    lambda name, n: PEMM(name, n, fusion="ca"), lambda name, n: PEMM(name, n), lambda name, n: PEMM(name, n, classifiers="shared")]
COUNTS = {  # 24 outputs; encoder, one modality, baseline, PS, PS + CA, PEMM, PEMM with shared clinical/dermoscopy classifier
    "swin_v2_t": (28_351_570, 28_815_338, 58_487_660, 30_136_090, 32_098_090, 31_117_090, 30_653_322),
    "swin_t": (28_288_354, 28_752_122, 58_361_228, 30_072_874, 32_034_874, 31_053_874, 30_590_106),
    "convnext_t": (28_589_128, 29_052_896, 58_962_776, 30_373_648, 32_335_648, 31_354_648, 30_890_880),
    "resnet50": (25_557_032, 26_676_160, 55_520_024, 29_962_992, 43_898_992, 36_930_992, 35_811_864),
    "densenet201": (20_013_928, 21_067_520, 44_171_672, 24_157_744, 35_593_584, 29_875_664, 28_822_072)}
SPC_CLASSES = (5, 3, 3, 3, 2, 3, 2, 3)


@pytest.fixture(autouse=True)
def quick_start(monkeypatch):
    """Initial values truncated at 100 deviations are those that are not, and take several times as long to draw."""
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", torch.nn.init.normal_)


@pytest.mark.parametrize("name", COUNTS)
def test_every_parameter_of_the_paper_is_accounted_for(name):
    with torch.device("meta"):  # shapes without numbers
        found = [count_parameters(variant(name, SPC_CLASSES)) for variant in VARIANTS]
        encoder = backbones.build(name)
    assert (count_parameters(encoder), *found) == COUNTS[name]
    assert count_parameters(encoder, as_in_paper=False) == COUNTS[name][0] - 1000 * (encoder.channels[-1] + 1)


@pytest.mark.parametrize("name, millions", [("swin_v2_t", "28.81 58.48 31.11"), ("convnext_t", "29.05 58.95 31.35")])
def test_two_outputs_of_table_9(name, millions):
    with torch.device("meta"):
        found = [count_parameters(VARIANTS[row](name, (2,))) for row in (0, 1, 4)]
    assert " ".join(f"{count / 1e6:.2f}" for count in found) == millions


def small(**switches):
    """PEMM on the smallest encoder, every parameter random, so every attention open."""
    torch.manual_seed(0)
    return randomise(PEMM("convnext_atto", (3, 2), **switches)).double().eval()


def photos(B=2):
    return torch.randn(2, B, 3, 64, 64, dtype=torch.float64, requires_grad=True)


def assert_same(outputs, expected):
    """The same branches in the same order, and the same logits."""
    assert list(outputs) == list(expected)
    for branch in outputs:
        for ours, theirs in zip(outputs[branch], expected[branch], strict=True):
            close(ours, theirs)


def reads(model, branch):
    """Which photos the logits of a branch depend on."""
    pair = photos()
    gradient, = torch.autograd.grad(sum(z.square().sum() for z in model(*pair)[branch]), pair)
    return {name for name, g in zip(("clinical", "dermoscopy"), gradient) if g.any()}


@pytest.mark.parametrize("encoder", ["shared", "separate"])
def test_with_concat_only_the_fusion_branch_reads_both(encoder):
    model = small(encoder=encoder, fusion="concat")
    assert reads(model, "clinical") == {"clinical"}
    assert reads(model, "dermoscopy") == {"dermoscopy"}
    assert reads(model, "fusion") == {"clinical", "dermoscopy"}


@pytest.mark.parametrize("reading", ["cross", "swapped"])
@pytest.mark.parametrize("fusion", ["sca", "ca"])
def test_with_open_attention_every_branch_reads_both(fusion, reading):
    model = small(fusion=fusion, reading=reading)
    assert all(reads(model, branch) == {"clinical", "dermoscopy"} for branch in BRANCHES)


def test_a_new_attention_changes_nothing():
    torch.manual_seed(0)
    model = PEMM("convnext_atto", (3, 2)).double().eval()
    plain = PEMM("convnext_atto", (3, 2), fusion="concat").double().eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if "attentions" not in key})
    pair = photos()
    assert_same(model(*pair), plain(*pair))


@pytest.mark.parametrize("switches", [{}, {"fusion": "ca"}, BASELINE, {"classifiers": "shared"}], ids=str)
def test_one_batch_is_the_same_as_two_passes(switches):
    model = small(**switches)
    pair = photos()
    together = model(*pair)
    model.one_batch = False
    assert_same(together, model(*pair))


@pytest.mark.parametrize("name", [name for name in backbones.BACKBONES if name not in COUNTS])
def test_every_other_backbone_makes_a_pemm(name):
    outputs = PEMM(name, (3, 2)).eval()(*torch.randn(2, 1, 3, 64, 64))
    assert [z.shape for z in outputs["fusion"]] == [(1, 3), (1, 2)]


@pytest.mark.parametrize("name, one_batch", [("convnext_atto", True), ("resnet50", False), ("densenet201", False)])
def test_batch_norm_never_mixes_the_modalities(name, one_batch):
    with torch.device("meta"):
        assert PEMM(name).one_batch == one_batch
        assert not PEMM(name, encoder="separate").one_batch


@pytest.mark.parametrize("w, learns", [(0.0, False), (0.1, True)])
def test_w_is_the_clinical_classifiers_share(w, learns):
    model, labels = small(), torch.tensor([[0, 1], [2, 0]])
    biased_loss(model.train()(*photos()), labels, w)[0].backward()
    assert any(p.grad.any() for p in model.classifiers[0].parameters()) == learns
    assert all(any(p.grad.any() for p in module.parameters()) for module in (model.classifiers[1], model.fusion_classifier))


def test_the_branches_are_named_right():
    """The clinical logits come from the clinical photo through the clinical classifier, and so on."""
    model, pair = small(fusion="concat"), photos()
    encoder = model.encoders[0]
    c, d = (encoder.pool(encoder(photo)[-1]) for photo in pair)
    assert_same(model(*pair), {"clinical": model.classifiers[0](c), "dermoscopy": model.classifiers[1](d),
                               "fusion": model.fusion_classifier(torch.cat((c, d), 1))})


def test_separate_encoders_see_a_photo_each():
    model = small(encoder="separate", fusion="concat")
    outputs = model(*photos())
    for branch, learns in (("clinical", [True, False]), ("dermoscopy", [False, True]), ("fusion", [True, True])):
        model.zero_grad()
        sum(z.square().sum() for z in outputs[branch]).backward(retain_graph=True)
        assert [any(p.grad is not None and p.grad.any() for p in encoder.parameters()) for encoder in model.encoders] == learns


@pytest.mark.parametrize("modality", ["clinical", "dermoscopy"])
def test_one_modality_looks_at_one_photo(modality):
    model = OneModality("convnext_atto", (3, 2), modality=modality).double().eval()
    assert model.reads == (modality,) and list(model(photos()[0])) == [modality]


def test_a_single_pair_is_evaluated_and_refused_in_training():
    model = small()
    assert model(*photos(1))["fusion"][0].shape == (1, 3)
    with pytest.raises(ValueError, match="more than 1 value"):  # batch norm's own words; train.py never makes such a batch
        model.train()(*photos(1))


@pytest.mark.parametrize("switch", ["encoder", "fusion", "classifiers"])
def test_unknown_switches_are_refused(switch):
    with pytest.raises(ValueError, match="'none': choose"):
        PEMM("convnext_atto", **{switch: "none"})
