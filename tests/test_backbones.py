"""The encoders against torchvision's networks: float64, every parameter random."""
import copy
import tempfile
from functools import lru_cache
from unittest import mock
from urllib.error import URLError

import pytest
import torch
from torch import nn

import backbones
from conftest import close, randomise

NAMES = list(backbones.BACKBONES)
BY_HAND = [name for name, each in backbones.BACKBONES.items() if each.keys in (backbones.SWIN_KEYS, backbones.CONVNEXT_KEYS)]


@lru_cache  # building a network takes longer than most of the tests
def pair(name):
    """torchvision's network, and ours built from a file of its state dict. Use them, but leave them as they are."""
    zero = lambda tensor, *_, **__: tensor.data.zero_()  # drawing initial values is slow, and all is random here
    with mock.patch.multiple(nn.init, trunc_normal_=zero, kaiming_uniform_=zero, kaiming_normal_=zero):
        twin = randomise(backbones.torchvision_twin(name)).eval()
    for key, value in twin.named_parameters():
        if key.endswith("logit_scale"):
            value.data[0] = 5.0  # above the limit log 100 of Swin V2
    with tempfile.NamedTemporaryFile() as file:
        torch.save(twin.state_dict(), file.name)
        with mock.patch.multiple(nn.init, trunc_normal_=zero, kaiming_uniform_=zero, kaiming_normal_=zero):
            encoder = backbones.build(name, file.name).eval()
    return twin.double(), encoder.double()


def head(twin):
    return [module for module in twin.modules() if isinstance(module, nn.Linear)][-1]


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_all_gradients_equal_torchvisions(name):
    """At an odd size, where Swin pads its windows and its merging."""
    twin, encoder = pair(name)
    theirs = torch.randn(1, 3, 45, 77, dtype=torch.float64, requires_grad=True)
    ours = theirs.detach().clone().requires_grad_()
    expected, logits = twin(theirs), head(twin)(encoder.pool(encoder(ours)[-1]))
    close(logits, expected)

    direction = torch.randn_like(expected)
    expected, *gradients = torch.autograd.grad((expected * direction).sum(), (theirs, *twin.parameters()))
    found, *ours = torch.autograd.grad((logits * direction).sum(), (ours, *encoder.parameters()))
    close(found, expected)
    gradients = {key: gradient for (key, _), gradient in zip(twin.named_parameters(), gradients)}
    renamed = mock.Mock(state_dict=encoder.state_dict)  # is given torchvision's gradients under our names
    backbones.load(renamed, twin.state_dict() | gradients, backbones.BACKBONES[name].keys, "torchvision")
    gradients, = renamed.load_state_dict.call_args.args
    for (key, _), gradient in zip(encoder.named_parameters(), ours, strict=True):
        close(gradient, gradients[key])


@pytest.mark.parametrize("name, size", [(name, (224, 224)) for name in NAMES] + [
    (name, size) for name in BY_HAND for size in ((96, 96), (100, 156), (32, 64))])
def test_any_size_equals_torchvision(name, size):
    twin, encoder = pair(name)
    with torch.no_grad():
        image = torch.randn(1, 3, *size, dtype=torch.float64)
        close(head(twin)(encoder.pool(encoder(image)[-1])), twin(image))


@pytest.mark.parametrize("name", BY_HAND)
def test_drop_path_draws_as_torchvision_does(name):
    twin, encoder = copy.deepcopy(pair(name))
    image = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = twin.train()(image)
        state = torch.get_rng_state()
        torch.manual_seed(1)
        close(head(twin)(encoder.train().pool(encoder(image)[-1])), expected)
    assert torch.equal(torch.get_rng_state(), state), "another number of draws"
    theirs = [module.p for module in twin.modules() if type(module).__name__ == "StochasticDepth"]
    ours = [module.p for module in encoder.modules() if isinstance(module, backbones.DropPath)]
    assert len(set(theirs)) == len(ours), "one rate per block, all different"
    close(sorted(set(theirs)), ours)


@pytest.mark.parametrize("name", NAMES)
def test_contract(name):
    encoder, image = pair(name)[1], torch.zeros(1, 3, 64, 96, dtype=torch.float64)
    maps = encoder(image)
    assert [each.shape[:2] for each in maps] == [(1, channels) for channels in encoder.channels]
    if name in BY_HAND:
        assert [each.shape[2:] for each in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert encoder.pool(maps[-1]).shape == (1, encoder.channels[-1])
    x = encoder.stem(image)
    for stage, expected in zip(encoder.stages, maps):
        x = stage(x)
        assert torch.equal(x, expected)


def no_network(*arguments, **options):
    raise URLError("no network")


def test_download_cache_is_used_and_its_absence_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    official = tmp_path / "hub" / "checkpoints" / "convnext_tiny-983f1562.pth"
    with pytest.raises(backbones.WeightsError) as error:
        backbones.build("convnext_t", "imagenet")
    assert str(official) in str(error.value) and "--weights none" in str(error.value)
    official.parent.mkdir(parents=True, exist_ok=True)
    twin = copy.deepcopy(pair("convnext_t")[0])
    torch.save(twin.float().state_dict(), official)
    encoder = backbones.build("convnext_t", "imagenet")
    close(encoder.stages[0].blocks[0].dwconv.weight, twin.features[1][0].block[0].weight, 1e-6)


@pytest.mark.parametrize("damage, says", [
    (lambda state: state.pop("features.1.0.block.0.weight"), "missing stages.0.blocks.0.dwconv.weight"),
    (lambda state: state.update(extra=torch.zeros(1)), "not of this network: extra"),
    (lambda state: state.update({"classifier.0.weight": torch.zeros(7)}), "norm.weight is (7,), not (320,)"),
    (lambda state: state.clear(), "more"),
], ids=["missing", "extra", "shape", "empty"])
def test_weights_that_do_not_fit_are_named(damage, says, tmp_path):
    state = pair("convnext_atto")[0].state_dict()
    damage(state)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(backbones.WeightsError) as error:
        backbones.build("convnext_atto", tmp_path / "damaged.pth")
    assert says in str(error.value) and "damaged.pth" in str(error.value)


def test_the_classifier_that_is_left_out_is_said(tmp_path, capsys):
    torch.save(pair("convnext_atto")[0].state_dict(), tmp_path / "weights.pth")
    backbones.build("convnext_atto", tmp_path / "weights.pth")
    assert "weights.pth: loaded, without its ImageNet classifier" in capsys.readouterr().out


def test_files_that_are_no_weights_are_refused(tmp_path):
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, says in (("text.pth", "text.pth"), ("list.pth", "state dict"), ("none.pth", "no such file")):
        with pytest.raises(backbones.WeightsError, match=says):
            backbones.build("convnext_atto", tmp_path / name)
    with pytest.raises(backbones.WeightsError, match="no ImageNet weights for convnext_atto"):
        backbones.build("convnext_atto", "imagenet")
    with pytest.raises(ValueError, match="swin_v2_t"):
        backbones.build("swin")
