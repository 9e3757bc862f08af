"""The encoders against torchvision's networks, in float64, every parameter and statistic away from its first value."""
import copy
import re
from functools import lru_cache
from unittest import mock
from urllib.error import URLError

import pytest
import torch
from torch import nn
from torchvision import models

import backbones
from conftest import close, randomise, undrawn

BY_HAND = ["swin_t", "swin_v2_t", "convnext_t", "convnext_atto"]
NAMES = [*BY_HAND, "resnet50", "densenet201", "mobilenet_v2"]

def torchvision_twin(name):
    """torchvision's own network of that name, or its ConvNeXt of Atto's widths and depths."""
    if name == "convnext_t":
        return models.convnext_tiny()
    if name == "convnext_atto":
        block = models.convnext.CNBlockConfig
        return models.ConvNeXt([block(40, 80, 2), block(80, 160, 2), block(160, 320, 6), block(320, None, 2)], 0.1)
    return getattr(models, name)()

def head(twin):
    """The ImageNet classifier: the last linear layer."""
    return [module for module in twin.modules() if isinstance(module, nn.Linear)][-1]

def logits(twin, encoder, image):
    """The encoder's logits with the classifier of its twin."""
    return head(twin)(encoder.pool(encoder(image)[-1]))

def images(*shape):
    return torch.randn(shape, dtype=torch.float64)

def wake(twin):
    """Parameters with which every layer matters. A network with batch norm gets the statistics of a batch, or its
    signal would die on the way; and scales of 3, because ReLU6 does nothing below 6."""
    randomise(twin)
    for name, value in twin.named_parameters():
        if name.endswith("logit_scale"):
            value.data[0] = 5.0  # above log 100, the limit of Swin V2
    norms = [module for module in twin.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.data.mul_(3)
        norm.momentum = 1.0  # keep the last batch's statistics alone
    if norms:
        with torch.no_grad():
            twin.train()(torch.randn(8, 3, 64, 64))
    return twin.eval()

@lru_cache  # building a network takes longer than most of the tests
def built(name):
    """torchvision's network, and ours with its state dict."""
    torch.manual_seed(0)
    with undrawn():
        twin, encoder = wake(torchvision_twin(name)), backbones.build(name)
    encoder.load_state_dict(backbones.rename(twin.state_dict(), backbones.BACKBONES[name].names))
    return twin.double(), encoder.double()

def pair(name):
    """The two of that name. Use them, but leave their values as they are."""
    twin, encoder = built(name)
    return twin.eval(), encoder.eval()

def test_names():
    assert {*NAMES, "convnext_mini"} == set(backbones.BACKBONES)  # the last one is of conftest.py

@pytest.mark.parametrize("name", NAMES)
def test_logits_and_all_gradients_equal_torchvisions(name):
    """At an odd size, where Swin pads its windows and its merging, and shifts in one direction only."""
    twin, encoder = pair(name)
    image = images(2, 3, 37, 69).requires_grad_()
    expected, found = twin(image), logits(twin, encoder, image)
    close(found, expected)
    apart = (expected[0] - expected[1]).abs().max() / expected.abs().max()
    assert apart > 1e-3, "the logits do not depend on the image"

    direction = torch.randn_like(expected)
    expected, *theirs = torch.autograd.grad((expected * direction).sum(), (image, *twin.parameters()))
    found, *ours = torch.autograd.grad((found * direction).sum(), (image, *encoder.parameters()))
    close(found, expected)
    names = [name for name, _ in twin.named_parameters()]
    theirs = backbones.rename(dict(zip(names, theirs)), backbones.BACKBONES[name].names)
    names = [name for name, _ in encoder.named_parameters()]
    assert sorted(names) == sorted(theirs)
    for name, gradient in zip(names, ours):
        close(gradient, theirs[name])

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(56, 56), (64, 64), (33, 32)])
def test_any_size_equals_torchvision(name, size):
    """Windows that fit Swin (56 x 56) and Swin V2 (64 x 64), and single ones (33 x 32)."""
    twin, encoder = pair(name)
    with torch.no_grad():
        image = images(1, 3, *size)
        close(logits(twin, encoder, image), twin(image))

@pytest.mark.parametrize("name, wrong, right", [
    ("swin_t", nn.ReLU, nn.GELU), ("swin_t", 1e-6, nn.LayerNorm),
    ("convnext_atto", nn.ReLU, nn.GELU), ("convnext_atto", 1e-5, nn.LayerNorm),
    ("mobilenet_v2", nn.ReLU, nn.ReLU6), ("mobilenet_v2", 1e-3, nn.BatchNorm2d)])
def test_a_wrong_layer_would_be_seen(name, wrong, right):
    """With torchvision's initial values, an activation or an epsilon that is wrong in all layers hardly shows."""
    twin, encoder = pair(name)[0], copy.deepcopy(pair(name)[1])
    for module in list(encoder.modules()):
        for key, child in module.named_children():
            if isinstance(child, right) and isinstance(wrong, float):
                child.eps = wrong
            elif isinstance(child, right):
                setattr(module, key, wrong())
    image = images(1, 3, 32, 32)
    with torch.no_grad(), pytest.raises(AssertionError, match="largest difference"):
        close(logits(twin, encoder, image), twin(image), 1e-7)

@pytest.mark.parametrize("name", BY_HAND)
def test_drop_path_draws_as_torchvision_does(name):
    twin, encoder = pair(name)
    image = images(4, 3, 32, 32)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = twin.train()(image)
        state = torch.get_rng_state()
        torch.manual_seed(1)
        close(logits(twin, encoder.train(), image), expected)
    assert torch.equal(torch.get_rng_state(), state), "another number of draws"
    theirs = {module.p for module in twin.modules() if type(module).__name__ == "StochasticDepth"}
    ours = [module.p for module in encoder.modules() if type(module).__name__ == "StochasticDepth"]
    assert ours == sorted(theirs), "one rate a block, all different"

@pytest.mark.parametrize("name", NAMES)
def test_contract(name):
    encoder, image = pair(name)[1], images(1, 3, 32, 64)
    maps = encoder(image)
    assert [each.shape[:2] for each in maps] == [(1, channels) for channels in encoder.channels]
    if name in (*BY_HAND, "mobilenet_v2"):
        assert [each.shape[2:] for each in maps] == [(8, 16), (4, 8), (2, 4), (1, 2)]
    assert encoder.pool(maps[-1]).shape == (1, encoder.channels[-1])
    x = encoder.stem(image)
    for stage, expected in zip(encoder.stages, maps):
        x = stage(x)
        assert torch.equal(x, expected)

@pytest.mark.parametrize("name", NAMES)
def test_parameters_with_the_idle_classifier_are_those_that_torchvision_publishes(name):
    published = backbones.BACKBONES[name].published
    own = sum(parameter.numel() for parameter in pair(name)[1].parameters())
    counted = own + 1000 * pair(name)[1].channels[-1] + 1000
    if published:
        assert counted == published.meta["num_params"]
    else:
        assert counted == sum(p.numel() for p in pair(name)[0].parameters())

def test_download_cache_is_used_and_its_absence_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "urlopen", mock.Mock(side_effect=URLError("no network")))
    with pytest.raises(backbones.WeightsError) as error:
        backbones.build("mobilenet_v2", "imagenet")
    folder = tmp_path / "hub" / "checkpoints"
    for says in ("no network", "mobilenet_v2-b0353104.pth", str(folder), "--weights none"):
        assert says in str(error.value)

    folder.mkdir(parents=True, exist_ok=True)
    twin, encoder = pair("mobilenet_v2")
    torch.save(twin.state_dict(), folder / "mobilenet_v2-b0353104.pth")
    found = backbones.build("mobilenet_v2", "imagenet").state_dict()
    for key, value in encoder.state_dict().items():
        close(found[key], value, 1e-6)

@pytest.mark.parametrize("damage, says", [
    (lambda state: state.pop("features.1.0.block.0.weight"),
     'Missing key(s) in state_dict: "stages.0.blocks.0.dwconv.weight"'),
    (lambda state: state.update(extra=torch.zeros(1)), 'Unexpected key(s) in state_dict: "extra"'),
    (lambda state: state.update({"classifier.0.weight": torch.zeros(7)}), "size mismatch for norm.weight"),
    (lambda state: state.clear(), "Missing"),
], ids=["missing", "extra", "shape", "empty"])
def test_weights_that_do_not_fit_are_named(damage, says, tmp_path):
    state = pair("convnext_atto")[0].state_dict()
    damage(state)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(backbones.WeightsError) as error:
        backbones.build("convnext_atto", tmp_path / "damaged.pth")
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'damaged.pth'} does not fit convnext_atto") and says in message

def test_old_and_half_precision_files(tmp_path):
    """torch before 0.4.1 had no num_batches_tracked; torchvision's DenseNet file says norm.1 for the module's norm1."""
    twin, encoder = pair("mobilenet_v2")
    state = {key: value.half() for key, value in twin.state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "half.pth")
    found = backbones.build("mobilenet_v2", tmp_path / "half.pth")
    assert {value.dtype for value in found.parameters()} == {torch.float32}
    close(found.stem[0][0].weight, encoder.stem[0][0].weight, 1e-3)

    state, names = pair("densenet201")[0].state_dict(), backbones.BACKBONES["densenet201"].names
    old = {re.sub(r"(denselayer\d+\.)(norm|conv)([12])", r"\1\2.\3", key): value for key, value in state.items()}
    assert old.keys() != state.keys()
    assert backbones.rename(old, names).keys() == backbones.rename(state, names).keys()

def test_the_classifier_that_is_left_out_is_said(tmp_path, capsys):
    state = pair("convnext_atto")[0].state_dict()
    torch.save(state, tmp_path / "weights.pth")
    backbones.build("convnext_atto", tmp_path / "weights.pth")
    assert "weights.pth: loaded, without its ImageNet classifier" in capsys.readouterr().out
    del state["classifier.2.weight"], state["classifier.2.bias"]
    torch.save(state, tmp_path / "weights.pth")
    backbones.build("convnext_atto", tmp_path / "weights.pth")
    assert not capsys.readouterr().out

class Code:
    """Would run code if torch.load trusted the file."""
    def __reduce__(self):
        return print, ("code ran",)

def test_files_that_are_no_weights_are_refused(tmp_path, capsys):
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"code": Code()}, tmp_path / "code.pth")
    for name, says in (("text.pth", "text.pth"), ("list.pth", "state dict"), ("code.pth", "safely"),
                       ("none.pth", "No such file")):
        with pytest.raises(backbones.WeightsError, match=says):
            backbones.build("convnext_atto", tmp_path / name)
    assert "code ran" not in capsys.readouterr().out
    with pytest.raises(backbones.WeightsError, match="no ImageNet weights for convnext_atto"):
        backbones.build("convnext_atto", "imagenet")
    with pytest.raises(ValueError, match="swin_v2_t"):
        backbones.build("swin")
