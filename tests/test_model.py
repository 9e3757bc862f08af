"""The model: every parameter of the paper's tables, and who can read whom."""
import pytest
import torch

import backbones
from conftest import close, randomise, undrawn
from loss import biased_loss
from model import AMMFM, CLNet, GuidedAttention, MAT, PEMM, OneModality, SelfAttention, count_parameters

BRANCHES = ("clinical", "dermoscopy", "fusion")

BASELINE = {"encoder": "separate", "fusion": "concat"}
VARIANTS = [  # the columns of COUNTS after the encoder itself
    lambda name, n: OneModality(name, n), lambda name, n: PEMM(name, n, **BASELINE), lambda name,
    n: PEMM(name, n, fusion="concat"),
    lambda name, n: PEMM(name, n, fusion="ca"), lambda name, n: PEMM(name, n), lambda name,
    n: PEMM(name, n, classifiers="shared")]
COUNTS = {  # 24 outputs; encoder, one modality, baseline, PS, PS + CA, PEMM, PEMM with shared classifiers
    "swin_v2_t": (28_351_570, 28_815_338, 58_487_660, 30_136_090, 32_098_090, 31_117_090, 30_653_322),
    "swin_t": (28_288_354, 28_752_122, 58_361_228, 30_072_874, 32_034_874, 31_053_874, 30_590_106),
    "convnext_t": (28_589_128, 29_052_896, 58_962_776, 30_373_648, 32_335_648, 31_354_648, 30_890_880),
    "resnet50": (25_557_032, 26_676_160, 55_520_024, 29_962_992, 43_898_992, 36_930_992, 35_811_864),
    "densenet201": (20_013_928, 21_067_520, 44_171_672, 24_157_744, 35_593_584, 29_875_664, 28_822_072)}
SPC_CLASSES = (5, 3, 3, 3, 2, 3, 2, 3)

@pytest.mark.parametrize("name", COUNTS)
def test_every_parameter_of_the_paper_is_accounted_for(name):
    with undrawn(), torch.device("meta"):  # shapes without numbers
        found = [count_parameters(variant(name, SPC_CLASSES)) for variant in VARIANTS]
        encoder = backbones.build(name)
    assert (count_parameters(encoder), *found) == COUNTS[name]
    assert count_parameters(encoder, as_in_paper=False) == COUNTS[name][0] - 1000 * (encoder.channels[-1] + 1)

@pytest.mark.parametrize("name, millions", [("swin_v2_t", "28.81 58.48 31.11"), ("convnext_t", "29.05 58.95 31.35")])
def test_two_outputs_of_table_9(name, millions):
    with undrawn(), torch.device("meta"):
        found = [count_parameters(VARIANTS[row](name, (2,))) for row in (0, 1, 4)]
    assert " ".join(f"{count / 1e6:.2f}" for count in found) == millions

def small(**switches):
    """PEMM on the smallest encoder, every parameter random, so every attention open."""
    torch.manual_seed(0)
    return randomise(PEMM("convnext_mini", (3, 2), **switches)).double().eval()

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
    model = PEMM("convnext_mini", (3, 2)).double().eval()
    plain = PEMM("convnext_mini", (3, 2), fusion="concat").double().eval()
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

@pytest.mark.parametrize("name, encoder, one_batch", [
    ("convnext_mini", "shared", True), ("convnext_mini", "separate", False), ("resnet50", "shared", False),
    ("densenet201", "shared", False)])
def test_with_batch_norm_each_photo_goes_alone(name, encoder, one_batch):
    with undrawn(), torch.device("meta"):
        assert PEMM(name, encoder=encoder).one_batch == one_batch

@pytest.mark.parametrize("w, learns", [(0.0, False), (0.1, True)])
def test_w_is_the_clinical_classifiers_share(w, learns):
    model, labels = small(), torch.tensor([[0, 1], [2, 0]])
    biased_loss(model.train()(*photos()), labels, w)[0].backward()
    assert any(p.grad.any() for p in model.classifiers[0].parameters()) == learns
    assert all(any(p.grad.any() for p in module.parameters()) for module in (model.classifiers[1],
                                                                             model.fusion_classifier))

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
        for encoder, learned in zip(model.encoders, learns):
            assert any(p.grad is not None and p.grad.any() for p in encoder.parameters()) == learned

@pytest.mark.parametrize("modality", ["clinical", "dermoscopy"])
def test_one_modality_looks_at_one_photo(modality):
    model = OneModality("convnext_mini", (3, 2), modality=modality).double().eval()
    assert model.reads == (modality,) and list(model(photos()[0])) == [modality]

def test_a_single_pair_is_evaluated_and_refused_in_training():
    model = small()
    assert model(*photos(1))["fusion"][0].shape == (1, 3)
    with pytest.raises(ValueError,
                       match="more than 1 value"):  # batch norm's own words; train.py never makes such a batch
        model.train()(*photos(1))

@pytest.mark.parametrize("switch", ["encoder", "fusion", "classifiers"])
def test_unknown_switches_are_refused(switch):
    with pytest.raises(ValueError, match="'none': choose"):
        PEMM("convnext_mini", **{switch: "none"})

# ----------------------------------------------------------------------------------------------- AMMFM, MAT and CLNet

def asymmetric(backbone="convnext_mini", clinical_backbone="convnext_mini", opened=True):
    torch.manual_seed(0)
    network = AMMFM(backbone, clinical_backbone, (3, 2))
    if opened:
        randomise(network)
    return network.double().eval()

def test_ammfm_reads_clinical_into_dermoscopy_and_nothing_back():
    model = asymmetric()
    assert reads(model, "clinical") == {"clinical"}
    assert reads(model, "dermoscopy") == reads(model, "fusion") == {"clinical", "dermoscopy"}

def test_a_new_ammfm_is_two_encoders_side_by_side():
    model, (clinical, dermoscopy) = asymmetric(opened=False), photos()
    c = model.encoders[0].pool(model.encoders[0](clinical)[-1])
    d = model.encoders[1].pool(model.encoders[1](dermoscopy)[-1])
    assert_same(model(clinical, dermoscopy), {"clinical": model.classifiers[0](c),
                                              "dermoscopy": model.classifiers[1](d),
                                              "fusion": model.fusion_classifier(torch.cat((c, d), 1))})

@pytest.mark.parametrize("backbone", ["swin_v2_t", "convnext_t", "resnet50"])
def test_ammfm_takes_encoders_of_other_widths_and_is_smaller_than_two(backbone):
    with undrawn(), torch.device("meta"):
        model, baseline = AMMFM(backbone, "mobilenet_v2"), PEMM(backbone, **BASELINE)
    assert count_parameters(model) < count_parameters(baseline)
    assert model(*torch.randn(2, 2, 3, 75, 117, device="meta"))["fusion"][0].shape == (2, 5)

def test_self_attention_is_torchs_encoder_layer():
    torch.manual_seed(0)
    block = randomise(SelfAttention(32, 4)).double().eval()
    twin = torch.nn.TransformerEncoderLayer(32, 4, 128, 0.1, batch_first=True).double().eval()  # post-norm, ReLU
    names = {"attention": "self_attn", "feed_forward.0": "linear1", "feed_forward.3": "linear2"}
    state = {}
    for key, value in block.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[key] = value
    twin.load_state_dict(state)
    x = torch.randn(3, 5, 32, dtype=torch.float64, requires_grad=True)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] + [True] * 4])
    ours, theirs = block(x, padding)[0][~padding], twin(x.requires_grad_(), src_key_padding_mask=padding)[~padding]
    close(ours, theirs)
    close(torch.autograd.grad(ours.square().sum(), x)[0], torch.autograd.grad(theirs.square().sum(), x)[0])

def test_guided_attention_by_hand():
    """One head of width 4: softmax(q k^T / 2) v, then both layers of Fig. 2."""
    torch.manual_seed(0)
    block = randomise(GuidedAttention(4, 1), spread=0.3).double().eval()
    x, guide = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 6, 4, dtype=torch.float64)
    w_q, w_k, w_v = block.attention.in_proj_weight.split(4)
    b_q, b_k, b_v = block.attention.in_proj_bias.split(4)
    q, k, v = x @ w_q.T + b_q, guide @ w_k.T + b_k, guide @ w_v.T + b_v
    read = block.attention.out_proj((q @ k.transpose(1, 2) / 2).softmax(-1) @ v)
    first = block.norm1(x + read)
    close(block.first(x, guide), first)
    close(block(x, guide), block.norm2(first + block.feed_forward(first)))

def transformer(unit):
    torch.manual_seed(0)
    return randomise(MAT("convnext_mini", (3, 2), 9, unit=unit, width=32)).double().eval()

UNITS = ("none", "sa-sa", "sa-sga", "sga-sa", "sga-sga")

@pytest.mark.parametrize("unit", UNITS)
def test_padding_and_the_order_of_a_batch_change_nothing(unit):
    model, image = transformer(unit), torch.randn(3, 3, 64, 64, dtype=torch.float64)
    words = torch.tensor([[1, 4, 2], [1, 8, 0], [1, 0, 0]])
    expected = model(image, words)
    longer = torch.cat((words, torch.zeros(3, 2, dtype=torch.int64)), 1)
    assert_same(model(image, longer), expected)
    turned = model(image.flip(0), words.flip(0))
    assert_same({"fusion": [z.flip(0) for z in turned["fusion"]]}, expected)
    other = model(image, torch.tensor([[1, 5, 2], [1, 8, 0], [1, 3, 0]]))["fusion"][0]
    changed = (other - expected["fusion"][0]).abs().amax(1) > 1e-6
    assert changed.tolist() == [True, False, True], "a word changes its own lesion's answer and no other's"

@pytest.mark.parametrize("unit, guided", [("none", ""), ("sa-sa", ""), ("sa-sga", "image"), ("sga-sa", "words"),
                                          ("sga-sga", "image words")])
def test_who_is_guided_by_whom(unit, guided, monkeypatch):
    """What enters the product from each side, and whether it depends on the other side."""
    model = transformer(unit)
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    embedded = []
    model.embedding.register_forward_hook(lambda module, inputs, out: embedded.append(out))
    sides = {}
    for name in ("image", "words"):
        getattr(model, f"{name}_out").register_forward_hook(lambda module, inputs, out,
                                                            name=name: sides.update({name: out}))
    model(image, torch.tensor([[1, 4, 2], [1, 8, 0]]))
    by_words, = torch.autograd.grad(sides["image"].square().sum(), embedded[0], retain_graph=True, allow_unused=True)
    by_image, = torch.autograd.grad(sides["words"].square().sum(), image, allow_unused=True)
    assert (by_words is not None and bool(by_words.any())) == ("image" in guided)
    assert (by_image is not None and bool(by_image.any())) == ("words" in guided)

@pytest.mark.parametrize("backbone", ["convnext_mini", "mobilenet_v2", "swin_t"])
@pytest.mark.parametrize("learns, branches", [("both", ["dermoscopy", "mask"]), ("class", ["dermoscopy"]), ("mask",
                                                                                                            ["mask"])])
def test_clnet_answers_at_odd_sizes(backbone, learns, branches):
    with undrawn(), torch.device("meta"):
        model = CLNet(backbone, (7, 2), learns=learns)
    outputs = model(torch.randn(2, 3, 75, 117, device="meta"))
    assert list(outputs) == branches
    assert "mask" not in branches or outputs["mask"].shape == (2, 1, 75, 117)
    assert "dermoscopy" not in branches or [z.shape for z in outputs["dermoscopy"]] == [(2, 7), (2, 2)]

def test_clnets_halves_hear_of_each_other():
    """Each answer depends on both encoders; the first layer of the decoder only on the mask's loss."""
    torch.manual_seed(0)
    model = CLNet("convnext_mini", (3,)).double().eval()
    outputs = model(photos()[0])
    for branch in ("dermoscopy", "mask"):
        model.zero_grad()
        answer = outputs[branch][0] if branch == "dermoscopy" else outputs[branch]
        answer.square().sum().backward(retain_graph=True)
        assert all(any(p.grad is not None and p.grad.any() for p in encoder.parameters()) for encoder in model.encoders)

def test_a_mask_lies_where_its_photo_does():
    """A flipped photo gives a flipped mask: the decoder neither turns nor shifts."""
    torch.manual_seed(0)
    model = CLNet("convnext_mini", (3,), learns="mask").double().eval()
    for parameter in model.parameters():
        if parameter.dim() == 4 and parameter.shape[-1] > 1:  # symmetric kernels commute with a flip
            parameter.data = (parameter.data + parameter.data.flip(-1)) / 2
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    close(model(image.flip(-1))["mask"], model(image)["mask"].flip(-1))
