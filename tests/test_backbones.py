"""The encoders against torchvision's networks: the second half of what backbones.py teaches.

What there is to believe: each encoder, with the published weights' names, computes what
torchvision's network computes, forwards and backwards, and its four maps have the shapes of the
table in backbones.py. From "weights" on, the tests are regression nets for files that fit or do not
fit; a reader of the method can skip them.

Every parameter and every statistic of batch norm is moved away from its first value before two
networks are compared. With first values most mistakes would not show: ConvNeXt's layer scale starts
at 1e-6, biases at 0.

close(ours, expected, tolerance) of conftest.py fails if the largest difference, as a share of the
largest expected value, is above the tolerance. Without one it is 1e-9, which suits float64; float32
needs 1e-6.
"""

import re
from functools import lru_cache
from unittest import mock
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision import models

import backbones
from conftest import close, randomise, without_init

WRITTEN_OUT = ["swin_v2_t", "swin_t", "convnext_t", "convnext_atto"]
NAMES = [*WRITTEN_OUT, "resnet50", "densenet201", "mobilenet_v2"]


def torchvision_twin(name):
    """torchvision's own network of that name; for Atto, torchvision's ConvNeXt of its size."""
    if name == "convnext_t":
        return models.convnext_tiny()
    if name == "convnext_atto":
        stage = models.convnext.CNBlockConfig
        stages = [stage(40, 80, 2), stage(80, 160, 2), stage(160, 320, 6), stage(320, None, 2)]
        return models.ConvNeXt(stages, stochastic_depth_prob=0.1)
    return getattr(models, name)()


def last_linear(twin):
    """The ImageNet classifier."""
    return [module for module in twin.modules() if isinstance(module, nn.Linear)][-1]


def logits(twin, encoder, photos):
    """The encoder's logits, with the classifier of its twin."""
    return last_linear(twin)(encoder.pool(encoder(photos)[-1]))


def random_photos(*shape):
    return torch.randn(shape, dtype=torch.float64)


def make_every_layer_matter(twin):
    randomise(twin)
    for name, value in twin.named_parameters():
        if name.endswith("logit_scale"):
            value.data[0] = 5.0  # above log 100, where Swin V2 cuts it off
    norms = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.data.mul_(3)  # or nothing would reach 6, where ReLU6 differs from ReLU
        norm.momentum = 1.0  # keeps the statistics of the last batch alone
    if norms:  # statistics of a real batch, or the signal would die on its way
        with torch.no_grad():
            twin.train()(torch.randn(8, 3, 32, 32))


@lru_cache  # to build a network takes longer than most of the tests
def build_pair(name):
    torch.manual_seed(0)
    with without_init():
        twin = torchvision_twin(name)
        make_every_layer_matter(twin)
        encoder = backbones.build_encoder(name, twin.state_dict())
    return twin.double(), encoder.double()


def pair(name):
    """torchvision's network and the encoder with its weights. Leave their values as they are."""
    twin, encoder = build_pair(name)
    return twin.eval(), encoder.eval()


def test_all_backbones_are_tested():
    assert {*NAMES, "convnext_mini"} == set(backbones.BACKBONES)  # the last is conftest.py's


# ------------------------------------------------------------------------ equal to torchvision


# convnext_t has the code of convnext_atto with other numbers: its logits are compared further down.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "convnext_t"])
def test_logits_and_gradients_equal_torchvisions(name):
    """The gradients are those of a random weighted sum of the logits, by photo and by parameters.

    The photo's sides are such that Swin pads its windows and its merging, and shifts in one
    direction only. Large matrices are left out of the gradients, for speed; the first stage has one
    of each kind.
    """
    twin, encoder = pair(name)
    photo = random_photos(1, 3, 37, 69).requires_grad_()
    expected = twin(photo)
    found = logits(twin, encoder, photo)
    close(found, expected)

    theirs = dict(twin.named_parameters())
    ours = dict(encoder.named_parameters())
    names = [key for key, value in ours.items() if value.numel() < 100_000]
    direction = torch.randn_like(expected)
    their_sum = (expected * direction).sum()
    our_sum = (found * direction).sum()
    their_gradients = torch.autograd.grad(their_sum, [photo] + [theirs[key] for key in names])
    our_gradients = torch.autograd.grad(our_sum, [photo] + [ours[key] for key in names])
    for one, other in zip(our_gradients, their_gradients, strict=True):
        close(one, other)
    assert their_gradients[0].any(), "the logits do not depend on the photo"


@pytest.mark.parametrize(
    "name, H, W",
    [
        ("swin_t", 56, 56),  # first map 14 x 14: two windows of 7 x 7 a side, no padding
        ("swin_v2_t", 64, 64),  # first map 16 x 16: two windows of 8 x 8 a side
        ("swin_t", 33, 32),  # each map fits into one window
        ("swin_v2_t", 33, 32),
        ("convnext_t", 33, 64),
    ],
)
def test_logits_equal_torchvisions_at_other_sizes(name, H, W):
    twin, encoder = pair(name)
    photos = random_photos(1, 3, H, W)
    with torch.no_grad():
        close(logits(twin, encoder, photos), twin(photos))


# Would the comparison see a small mistake? In the next two tests one is made on purpose.


def assert_difference_is_seen(twin, encoder):
    photos = random_photos(1, 3, 32, 32)
    with torch.no_grad(), pytest.raises(AssertionError, match="largest difference"):
        close(logits(twin, encoder, photos), twin(photos), tolerance=1e-7)


WRONG_LAYERS = [
    ("swin_t", nn.GELU, nn.ReLU()),
    ("convnext_atto", nn.GELU, nn.ReLU()),
    ("mobilenet_v2", nn.ReLU6, nn.ReLU()),
]


@pytest.mark.parametrize("name, kind, wrong", WRONG_LAYERS)
def test_a_wrong_activation_would_be_seen(name, kind, wrong, monkeypatch):
    twin, encoder = pair(name)
    for module in list(encoder.modules()):
        for key, child in list(module.named_children()):
            if isinstance(child, kind):
                monkeypatch.setitem(module._modules, key, wrong)  # until the test ends
    assert_difference_is_seen(twin, encoder)


WRONG_EPSILONS = [
    ("swin_t", nn.LayerNorm, 1e-6),
    ("convnext_atto", nn.LayerNorm, 1e-5),
    ("mobilenet_v2", nn.BatchNorm2d, 1e-3),
]


@pytest.mark.parametrize("name, kind, wrong", WRONG_EPSILONS)
def test_a_wrong_epsilon_would_be_seen(name, kind, wrong, monkeypatch):
    twin, encoder = pair(name)
    for module in encoder.modules():
        if isinstance(module, kind):
            monkeypatch.setattr(module, "eps", wrong)
    assert_difference_is_seen(twin, encoder)


@pytest.mark.parametrize("name", ["swin_v2_t", "swin_t", "convnext_atto"])
def test_stochastic_depth_draws_as_torchvision_does(name):
    """In training each block is left out of some photos, by chance: here by the same chance."""
    twin, encoder = pair(name)
    photos = random_photos(3, 3, 32, 32)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = twin.train()(photos)
        state = torch.get_rng_state()
        torch.manual_seed(1)
        close(logits(twin, encoder.train(), photos), expected)
    assert torch.equal(torch.get_rng_state(), state), "another number of draws"


def constants_instead_of_draws():
    """In this context each initialisation of torch fills in one number that says which it was."""

    def trunc_normal_(tensor, std):
        return tensor.data.fill_(std)

    def kaiming_uniform_(tensor, a):
        return tensor.data.fill_(a)

    def uniform_(tensor, low, high):
        return tensor.data.fill_(high)

    def overwritten(tensor, **_):  # torchvision draws Swin's MLPs twice; the second draw counts
        return tensor.data.fill_(float("nan"))

    return mock.patch.multiple(
        nn.init,
        trunc_normal_=trunc_normal_,
        kaiming_uniform_=kaiming_uniform_,
        uniform_=uniform_,
        xavier_uniform_=overwritten,
        normal_=overwritten,
    )


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_random_weights_and_buffers_are_as_torchvisions(name):
    """Also the order of torchvision's offsets, and V2's logarithm of them, to the last bit."""
    with constants_instead_of_draws():
        theirs = torchvision_twin(name).state_dict()
        ours = backbones.build_encoder(name).state_dict()
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


# ------------------------------------------------------------------------------- the interface

# Of photos of 102 x 32 pixels, as the top of backbones.py says:
# C_0, H_0, (C_1 to C_4), (H_1 to H_4)
MAPS = {
    "swin_v2_t": (96, 25, (96, 192, 384, 768), (25, 13, 7, 4)),
    "swin_t": (96, 25, (96, 192, 384, 768), (25, 13, 7, 4)),
    "convnext_t": (96, 25, (96, 192, 384, 768), (25, 12, 6, 3)),
    "convnext_atto": (40, 25, (40, 80, 160, 320), (25, 12, 6, 3)),
    "resnet50": (64, 26, (256, 512, 1024, 2048), (26, 13, 7, 4)),
    "densenet201": (64, 26, (128, 256, 896, 1920), (13, 6, 3, 3)),
    "mobilenet_v2": (16, 51, (24, 32, 96, 1280), (26, 13, 7, 4)),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_maps_have_the_shapes_of_the_table(name):
    _, encoder = pair(name)
    stem_channels, stem_height, channels, heights = MAPS[name]
    assert encoder.channels == channels
    photos = random_photos(1, 3, 102, 32)
    with torch.no_grad():
        maps = encoder(photos)
        pooled = encoder.pool(maps[3])
        x = encoder.stem(photos)
        assert x.shape[1:3] == (stem_channels, stem_height)
        for i in range(4):
            x = encoder.stage(i, x)
            assert torch.equal(x, maps[i])
            assert x.shape[:3] == (1, channels[i], heights[i])
    widths = [one_map.shape[3] for one_map in maps]
    assert widths == ([4, 2, 1, 1] if name == "densenet201" else [8, 4, 2, 1])
    assert pooled.shape == (1, channels[3])


# The paper and torchvision count the 1000-class ImageNet classifier. Of the paper's encoders only
# Swin V2 fits its tables (test_model.py compares their printed numbers).
PARAMETERS = {
    "swin_v2_t": 28_351_570,
    "swin_t": 28_288_354,
    "convnext_t": 28_589_128,
    "convnext_atto": 3_695_520,
    "resnet50": 25_557_032,
    "densenet201": 20_013_928,
    "mobilenet_v2": 3_504_872,
}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_as_many_as_the_paper_counts(name):
    twin, encoder = pair(name)
    own = sum(parameter.numel() for parameter in encoder.parameters())
    classifier = sum(parameter.numel() for parameter in last_linear(twin).parameters())
    assert own + classifier == PARAMETERS[name]
    published = backbones.BACKBONES[name].published
    if published:
        assert published.meta["num_params"] == PARAMETERS[name]


def test_shift_mask_of_the_docstring():
    """Four windows of 2 x 2 tokens after a shift by 1, numbered as in the docstring's picture."""
    windows = [[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 2, 2], [0, 1, 2, 3]]
    mask = backbones.shift_mask(4, 4, 2, 1, 1, "cpu")
    assert mask.shape == (4, 1, 4, 4)
    for n, numbers in enumerate(windows):
        for i in range(4):
            for j in range(4):
                expected = 0 if numbers[i] == numbers[j] else -100
                assert mask[n, 0, i, j] == expected


# The tutorial ends here. The regression nets that follow guard how weights are read.

# ------------------------------------------------------------------------------------- weights


def small_network():
    """A state dict as a file holds it: a small encoder and a classifier."""
    state = backbones.build_encoder("convnext_mini").state_dict()
    state["classifier.2.weight"] = torch.zeros(1000, 32)
    state["classifier.2.bias"] = torch.zeros(1000)
    return state


def test_a_state_dict_itself_is_loaded():
    """For instance that of an encoder trained before."""
    _, trained = pair("mobilenet_v2")
    state = trained.state_dict()
    with without_init():
        encoder = backbones.build_encoder("mobilenet_v2", state)
    for key, value in encoder.state_dict().items():
        close(value, state[key], tolerance=1e-6)  # float32 beside float64


def test_the_classifier_that_is_left_out_is_said(tmp_path, capsys):
    path = tmp_path / "weights.pth"
    state = small_network()
    torch.save(state, path)
    backbones.build_encoder("convnext_mini", path)
    said = f"{path}: loaded without its classifier, classifier.2\n"
    assert capsys.readouterr().out == said

    del state["classifier.2.weight"], state["classifier.2.bias"]
    torch.save(state, path)
    backbones.build_encoder("convnext_mini", path)
    assert capsys.readouterr().out == ""


def test_old_files_in_half_precision(tmp_path):
    """torch before 0.4.1 had no num_batches_tracked."""
    twin, encoder = pair("mobilenet_v2")
    state = {}
    for key, value in twin.state_dict().items():
        if "num_batches_tracked" not in key:
            state[key] = value.half()
    torch.save(state, tmp_path / "half.pth")
    loaded = backbones.build_encoder("mobilenet_v2", tmp_path / "half.pth")
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    close(loaded.features[0][0].weight, encoder.features[0][0].weight, tolerance=1e-3)


def test_old_names_in_densenets_file():
    """It says denselayer1.norm.1 where the module is denselayer1.norm1."""
    twin, encoder = pair("densenet201")
    old = {}
    for key, value in twin.state_dict().items():
        old_key = re.sub(r"(denselayer\d+\.)(norm|conv)([12])", r"\1\2.\3", key)
        old[old_key] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    with without_init():
        loaded = backbones.build_encoder("densenet201", old).features.denseblock1.denselayer1
    close(loaded.norm1.weight, encoder.features.denseblock1.denselayer1.norm1.weight, 1e-6)


def without_a_layer(state):
    del state["features.1.0.block.0.weight"]


def with_a_layer_more(state):
    state["extra"] = torch.zeros(1)


def of_another_shape(state):
    state["classifier.0.weight"] = torch.zeros(7)


def without_anything(state):
    for key in list(state):
        del state[key]


MISFITS = [
    (without_a_layer, 'Missing key(s) in state_dict: "features.1.0.block.0.weight".'),
    (with_a_layer_more, 'Unexpected key(s) in state_dict: "extra".'),
    (of_another_shape, "size mismatch for classifier.0.weight"),
    (without_anything, "Missing key(s)"),
]


@pytest.mark.parametrize("change, says", MISFITS)
def test_weights_that_do_not_fit_are_named(change, says, tmp_path):
    path = tmp_path / "changed.pth"
    state = small_network()
    change(state)
    torch.save(state, path)
    with pytest.raises(backbones.WeightsError) as error:
        backbones.build_encoder("convnext_mini", path)
    message = str(error.value)
    assert message.startswith(f"{path} does not fit convnext_mini: ")
    assert says in message
    assert len(message) < 2000

    with pytest.raises(backbones.WeightsError, match="the state dict does not fit convnext_mini"):
        backbones.build_encoder("convnext_mini", state)


class Code:
    """Would run code if torch.load trusted the file."""

    def __reduce__(self):
        return print, ("code ran",)


def test_files_that_hold_no_weights_are_refused(tmp_path, capsys):
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    (tmp_path / "empty.pth").touch()
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "whole.pth")
    half = (tmp_path / "whole.pth").read_bytes()[:2000]
    (tmp_path / "half.pth").write_bytes(half)
    torch.save({"code": Code()}, tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"state_dict": {}}, tmp_path / "nested.pth")
    torch.save({"network": {}, "flags": {}}, tmp_path / "model.pt")
    refused = {
        "none.pth": "cannot be read: No such file or directory",
        ".": "cannot be read: Is a directory",
        "page.pth": "is no file of weights",
        "empty.pth": "is no file of weights",
        "half.pth": "damaged",
        "code.pth": "could run code",
        "list.pth": "holds no dict but a list",
        "nested.pth": "'state_dict' in it is no tensor",
        "model.pt": f"give the run's folder, {tmp_path}",
    }
    for name, says in refused.items():
        with pytest.raises(backbones.WeightsError) as error:
            backbones.build_encoder("convnext_mini", tmp_path / name)
        message = str(error.value)
        assert message.startswith(str(tmp_path / name))
        assert says in message
        assert "\n" not in message
    assert "code ran" not in capsys.readouterr().out


def test_read_checkpoint_returns_any_dict(tmp_path):
    """The files of a run hold more than tensors."""
    saved = {"flags": {"lr": 0.1, "backbone": "swin_t"}, "epoch": 3, "weight": torch.ones(2)}
    torch.save(saved, tmp_path / "last.pt")
    found = backbones.read_checkpoint(tmp_path / "last.pt")
    close(found.pop("weight"), saved.pop("weight"), 0)
    assert found == saved


def test_names_that_do_not_exist():
    with pytest.raises(ValueError, match="unknown backbone 'swin': choose from swin_v2_t, swin_t"):
        backbones.build_encoder("swin")
    with pytest.raises(backbones.WeightsError, match="no ImageNet weights for convnext_mini"):
        backbones.build_encoder("convnext_mini", "imagenet")


def test_download_uses_its_cache_and_explains_its_failure(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "urlopen", mock.Mock(side_effect=URLError("no network")))
    folder = tmp_path / "hub" / "checkpoints"
    file = "mobilenet_v2-b0353104.pth"
    with without_init(), pytest.raises(backbones.WeightsError) as error:
        backbones.build_encoder("mobilenet_v2", "imagenet")
    for says in ("no network", file, str(folder), "--weights none"):
        assert says in str(error.value)

    twin, encoder = pair("mobilenet_v2")
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(twin.state_dict(), folder / file)
    with without_init():
        loaded = backbones.build_encoder("mobilenet_v2", "imagenet")
    close(loaded.features[18][0].weight, encoder.features[18][0].weight, tolerance=1e-6)

    (folder / file).write_bytes(b"half")
    expected = "no ImageNet weights for mobilenet_v2"
    with without_init(), pytest.raises(backbones.WeightsError, match=expected):
        backbones.build_encoder("mobilenet_v2", "imagenet")
