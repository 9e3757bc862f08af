"""The attentions against the plain formula and nn.MultiheadAttention, in float64."""
import pytest
import torch
from torch import nn

import shared_attention
from conftest import close, randomise
from shared_attention import AsymmetricAttention, CrossAttention, attend, plain_attention, tokens

@pytest.fixture(autouse=True)
def repeatable_and_on_one_thread():
    """Tensors this small are slower on several threads, much slower where other programs run too."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

def opened(module):
    """The module, with value projections that are no longer zero."""
    return randomise(module.double(), spread=0.2)

def map_of(x, like):
    return x.transpose(1, 2).view(like.shape)  # (B, N, C) -> (B, C, H, W)

def maps(B=3, C=16, H=5, W=4):
    return [torch.randn(B, C, H, W, dtype=torch.float64, requires_grad=True) for _ in range(2)]

def unequal_maps():
    """Of a light clinical network and a dermoscopy network: other channels, other size."""
    clinical = torch.randn(3, 6, 4, 3, dtype=torch.float64, requires_grad=True)
    dermoscopy = torch.randn(3, 16, 5, 4, dtype=torch.float64, requires_grad=True)
    return clinical, dermoscopy

def same_gradients(ours, theirs, inputs):
    direction = torch.randn_like(ours)
    found = torch.autograd.grad(ours, inputs, direction, retain_graph=True)
    expected = torch.autograd.grad(theirs, inputs, direction, retain_graph=True)
    for a, b in zip(found, expected):
        close(a, b)

def kept_bytes(function, *inputs):
    sizes = {}  # storage -> bytes: views of one tensor count once
    def keep(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = function(*inputs)
    del out
    return sum(sizes.values())

# ------------------------------------------------------------------------------------------------------ the fast twin

@pytest.mark.parametrize("block", [1, 3, 10, 17])  # of the 17 queries of an image
def test_blocks_equal_the_plain_formula(block, monkeypatch):
    monkeypatch.setattr(shared_attention, "BLOCK", block)
    monkeypatch.setattr(shared_attention, "LARGE", 0)
    shapes = (5, 17, 3), (5, 23, 3), (5, 23, 8)  # q, k, v
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    out, expected = attend(*inputs), plain_attention(*inputs)
    close(out, expected)
    same_gradients(out, expected, inputs)

def test_the_plain_formula_itself():
    """Row by row and query by query, without matrices."""
    q, k, v = (torch.randn(2, n, width, dtype=torch.float64) for n, width in ((5, 3), (7, 3), (7, 8)))
    expected = torch.zeros(2, 5, 8, dtype=torch.float64)
    for b in range(2):
        for i in range(5):
            fits = torch.stack([torch.exp(torch.dot(q[b, i], k[b, j])) for j in range(7)])
            expected[b, i] = sum(fits[j] / fits.sum() * v[b, j] for j in range(7))
    close(plain_attention(q, k, v), expected)

def test_bfloat16_is_as_near_as_the_plain_formula(monkeypatch):
    """In seven blocks, as at 56 x 56."""
    monkeypatch.setattr(shared_attention, "BLOCK", 43)
    monkeypatch.setattr(shared_attention, "LARGE", 0)
    exact = [torch.randn(2, 300, width, dtype=torch.float64, requires_grad=True) for width in (8, 8, 64)]
    direction = torch.randn(2, 300, 64).bfloat16()
    def error(function):
        """Relative errors of the values and the three gradients, summed: the largest depends on chance."""
        inputs = [x.detach().bfloat16().requires_grad_() for x in exact]
        out, expected = function(*inputs), plain_attention(*exact)
        found = [out, *torch.autograd.grad(out, inputs, direction)]
        expected = [expected, *torch.autograd.grad(expected, exact, direction.double())]
        return sum(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected))
    assert error(attend) < 1.1 * error(plain_attention)

def test_large_maps_are_not_kept_for_the_backward_pass():
    """What a map above 32 x 32 keeps grows with its places, not with their square."""
    def kept(side):
        return kept_bytes(attend, *(torch.randn(1, side ** 2, width, requires_grad=True) for width in (4, 4, 32)))
    assert kept(68) == 4 * kept(34)
    assert kept(34) < 4 * (34 ** 2) ** 2 / 4  # a quarter of the weights
    assert 1 < kept(32) / (4 * (32 ** 2) ** 2) < 3  # the plain formula, and what it keeps: weights of 4 MB an image

# ---------------------------------------------------------------------------------------------------- CrossAttention

def multihead(p, source_channels, C):
    """nn.MultiheadAttention with the weights of the projections p. It wants q, k and v of one width C: so W_q and W_k
    fill the first d rows, with zeros below, and q makes up for its scale 1/sqrt(C) in place of 1/sqrt(d)."""
    twin = nn.MultiheadAttention(C, 1, batch_first=True, kdim=source_channels, vdim=source_channels).double()
    if source_channels == C:
        weights = twin.in_proj_weight.chunk(3)
    else:
        weights = twin.q_proj_weight, twin.k_proj_weight, twin.v_proj_weight
    d, widen = C // 8, (C / (C // 8)) ** 0.5
    with torch.no_grad():
        for value in twin.parameters():
            value.zero_()
        biases = twin.in_proj_bias.chunk(3)
        weights[0][:d], biases[0][:d] = widen * p.query.weight, widen * p.query.bias
        weights[1][:d], biases[1][:d] = p.key.weight, p.key.bias
        weights[2][:], biases[2][:] = p.value.weight, p.value.bias
        twin.out_proj.weight.copy_(torch.eye(C))
    return twin

def test_equals_multihead_attention_with_copied_weights():
    module, (clinical, dermoscopy) = opened(CrossAttention(16)), maps()
    twin = multihead(module.projections[0], 16, 16)
    refined = module(clinical, dermoscopy)
    for ours, x, y in ((refined[0], clinical, dermoscopy), (refined[1], dermoscopy, clinical)):
        theirs = x + map_of(twin(tokens(x), tokens(y), tokens(y), need_weights=False)[0], x)
        close(ours, theirs)
        same_gradients(ours, theirs, (clinical, dermoscopy))

def test_swapped_reading_swaps_the_maps():
    module, (clinical, dermoscopy) = opened(CrossAttention(16, shared=False, reading="swapped")), maps()
    p_c, p_d = module.projections
    c, d = tokens(clinical), tokens(dermoscopy)
    refined = module(clinical, dermoscopy)
    close(refined[0], clinical + map_of(plain_attention(p_d.query(d), p_d.key(d), p_c.value(c)), clinical))
    close(refined[1], dermoscopy + map_of(plain_attention(p_c.query(c), p_c.key(c), p_d.value(d)), dermoscopy))

@pytest.mark.parametrize("reading", ["cross", "swapped"])
@pytest.mark.parametrize("shared", [True, False])
def test_swapping_inputs_swaps_outputs_only_if_shared(shared, reading):
    module, (clinical, dermoscopy) = opened(CrossAttention(16, shared, reading)), maps()
    one, other = module(clinical, dermoscopy), module(dermoscopy, clinical)
    largest = max((one[0] - other[1]).abs().max(), (one[1] - other[0]).abs().max())
    assert (largest < 1e-12) == shared

@pytest.mark.parametrize("reading", ["cross", "swapped"])
def test_read_of_is_the_mean_of_what_forward_uses(reading):
    """Forward's values are linear in the attention: averaged over the queries they are the mean weights times v."""
    module, (clinical, dermoscopy) = opened(CrossAttention(16, reading=reading)), maps()
    weights = module.read_of(clinical, dermoscopy)
    refined_c, refined_d = module(clinical, dermoscopy)
    added = {"clinical": refined_c - clinical, "dermoscopy": refined_d - dermoscopy}
    for name, source in (("clinical", clinical), ("dermoscopy", dermoscopy)):
        close(weights[name].sum((1, 2)), torch.ones(3))
        reader = name
        if reading == "cross":
            reader = {"clinical": "dermoscopy", "dermoscopy": "clinical"}[name]
        values = module.projections[0].value(tokens(source))
        close(torch.einsum("bn,bnc->bc", weights[name].flatten(1), values), added[reader].mean((2, 3)))

@pytest.mark.parametrize("shared", [True, False])
def test_it_starts_as_the_identity_and_opens_at_the_recipes_rate(shared):
    torch.manual_seed(0)
    module = CrossAttention(32, shared)
    clinical, dermoscopy = torch.randn(2, 8, 32, 6, 6).unbind(0)
    refined = module(clinical, dermoscopy)
    assert torch.equal(refined[0], clinical) and torch.equal(refined[1], dermoscopy)
    optimizer = torch.optim.Adam(module.parameters(), 3e-5)  # paper, Sec. 4.1
    moved = []
    for step in range(200):  # a task that needs the other modality: its mean
        refined = module(clinical, dermoscopy)
        loss = (refined[0] - clinical - dermoscopy.mean((2, 3), keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        added = (refined[0] - clinical).detach().mean((2, 3))  # (B, C)
        moved.append((added.std(0).mean() / clinical.std()).item())  # from lesion to lesion, which no bias can do
    assert moved[-1] > 0.005, f"after 200 steps what is read varies by {moved[-1]:.4f} of the features' spread"
    assert moved[-1] > 1.5 * moved[100], "it stopped opening"
    assert torch.equal(refined[1], dermoscopy) == (not shared)

def test_unknown_reading_is_refused():
    with pytest.raises(ValueError, match="choose cross or swapped"):
        CrossAttention(16, reading="both")

# ----------------------------------------------------------------------------------------------- AsymmetricAttention

def test_asymmetric_starts_as_the_identity():
    clinical, dermoscopy = unequal_maps()
    refined = AsymmetricAttention(6, 16).double()(clinical, dermoscopy)
    assert refined[0] is clinical and torch.equal(refined[1], dermoscopy)

def test_asymmetric_equals_multihead_attention():
    module, (clinical, dermoscopy) = opened(AsymmetricAttention(6, 16)), unequal_maps()
    twin, source = multihead(module.projections, 6, 16), tokens(clinical)
    ours = module(clinical, dermoscopy)[1]
    theirs = dermoscopy + map_of(twin(tokens(dermoscopy), source, source, need_weights=False)[0], dermoscopy)
    close(ours, theirs)
    same_gradients(ours, theirs, (clinical, dermoscopy))

def test_asymmetric_information_flows_one_way():
    module, (clinical, dermoscopy) = opened(AsymmetricAttention(6, 16)), unequal_maps()
    refined_c, refined_d = module(clinical, dermoscopy)
    changed_c, _ = module(clinical, torch.randn_like(dermoscopy))
    _, changed_d = module(torch.randn_like(clinical), dermoscopy)
    assert torch.equal(changed_c, refined_c) and torch.equal(refined_c, clinical)
    assert (changed_d - refined_d).abs().amin((1, 2, 3)).max() > 0  # every value of an image moves
    assert (changed_d - refined_d).abs().amax((1, 2, 3)).min() > 0.01  # every image moves

def test_asymmetric_read_of_is_the_mean_of_what_forward_uses():
    module, (clinical, dermoscopy) = opened(AsymmetricAttention(6, 16)), unequal_maps()
    weights = module.read_of(clinical, dermoscopy)
    assert list(weights) == ["clinical"] and weights["clinical"].shape == (3, 4, 3)
    close(weights["clinical"].sum((1, 2)), torch.ones(3))
    values = module.projections.value(tokens(clinical))
    added = (module(clinical, dermoscopy)[1] - dermoscopy).mean((2, 3))
    close(torch.einsum("bn,bnc->bc", weights["clinical"].flatten(1), values), added)
