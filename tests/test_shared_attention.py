"""Cross-attention against the plain formula and nn.MultiheadAttention, in float64."""
import pytest
import torch
from torch import nn

import shared_attention
from conftest import close, randomise
from shared_attention import CrossAttention, attend, map_of, tokens


def opened(channels, shared=True, reading="cross", seed=0):
    """A module whose value projections are no longer zero."""
    return randomise(CrossAttention(channels, shared, reading).double(), seed, spread=0.2)


def maps(B=3, C=16, H=5, W=4):
    return [torch.randn(B, C, H, W, dtype=torch.float64, requires_grad=True) for _ in range(2)]


def plain(q, k, v, scale):
    return (q @ k.transpose(1, 2) * scale).softmax(-1) @ v


# 9 scores a block: less than a row. 700: some rows. 10 ** 9: all images at once. Each goes another way through `blocks`.
@pytest.mark.parametrize("block", [9, 700, 1600, 10 ** 9])
def test_blocks_equal_the_plain_formula(block, monkeypatch):
    monkeypatch.setattr(shared_attention, "BLOCK", block)
    ours = [torch.randn(5, 23, width, dtype=torch.float64, requires_grad=True) for width in (3, 3, 8)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    out, expected = attend(*ours, 0.7), plain(*theirs, 0.7)
    close(out, expected)
    direction = torch.randn_like(out)
    for found, gradient in zip(torch.autograd.grad((out * direction).sum(), ours),
                               torch.autograd.grad((expected * direction).sum(), theirs)):
        close(found, gradient)


def test_more_keys_than_queries():
    q, k, v = (torch.randn(2, n, width, dtype=torch.float64) for n, width in ((5, 3), (11, 3), (11, 8)))
    close(attend(q, k, v, 0.7), plain(q, k, v, 0.7))


def test_bfloat16_is_as_near_as_the_plain_formula():
    exact = [torch.randn(2, 300, width, dtype=torch.float64, requires_grad=True) for width in (8, 8, 64)]
    direction = torch.randn(2, 300, 64).bfloat16()
    def error(function):
        inputs = [x.detach().bfloat16().requires_grad_() for x in exact]
        out, expected = function(*inputs, 0.3), plain(*exact, 0.3)
        gradients = zip(torch.autograd.grad((out * direction).sum(), inputs), torch.autograd.grad((expected * direction).sum(), exact))
        return max(((a.double() - b).norm() / b.norm()).item() for a, b in [(out.detach(), expected.detach()), *gradients])
    assert error(attend) < 1.1 * error(plain)


def test_equals_multihead_attention_with_copied_weights():
    """torch's module wants q, k and v of one width: with W_q and W_k in the first d rows and zeros below, and q scaled from
    1/sqrt(d) to its 1/sqrt(C), it computes the same."""
    C, module = 16, opened(16)
    p, twin = module.projections[0], nn.MultiheadAttention(16, 1, batch_first=True).double()
    d, widen = C // 8, (C / (C // 8)) ** 0.5
    with torch.no_grad():
        for value in twin.parameters():
            value.zero_()
        twin.in_proj_weight[:d], twin.in_proj_bias[:d] = widen * p.query.weight, widen * p.query.bias
        twin.in_proj_weight[C:C + d], twin.in_proj_bias[C:C + d] = p.key.weight, p.key.bias
        twin.in_proj_weight[2 * C:], twin.in_proj_bias[2 * C:] = p.value.weight, p.value.bias
        twin.out_proj.weight.copy_(torch.eye(C))
    clinical, dermoscopy = maps()
    refined = module(clinical, dermoscopy)
    expected = [x + map_of(twin(tokens(x), tokens(y), tokens(y), need_weights=False)[0], x)
                for x, y in ((clinical, dermoscopy), (dermoscopy, clinical))]
    for ours, theirs in zip(refined, expected):
        close(ours, theirs)
        for a, b in zip(torch.autograd.grad(ours.square().sum(), (clinical, dermoscopy), retain_graph=True),
                        torch.autograd.grad(theirs.square().sum(), (clinical, dermoscopy), retain_graph=True)):
            close(a, b)


def test_swapped_reading_swaps_the_maps():
    module, (clinical, dermoscopy) = opened(16, shared=False, reading="swapped"), maps()
    (qc, kc, vc), (qd, kd, vd) = (p(tokens(x)) for p, x in zip(module.projections, (clinical, dermoscopy)))
    refined = module(clinical, dermoscopy)
    close(refined[0], clinical + map_of(plain(qd, kd, vc, 1.0), clinical))
    close(refined[1], dermoscopy + map_of(plain(qc, kc, vd, 1.0), dermoscopy))


@pytest.mark.parametrize("reading", ["cross", "swapped"])
@pytest.mark.parametrize("shared", [True, False])
def test_swapping_inputs_swaps_outputs_only_if_shared(shared, reading):
    module, (clinical, dermoscopy) = opened(16, shared, reading), maps()
    one, other = module(clinical, dermoscopy), module(dermoscopy, clinical)
    swaps = torch.allclose(one[0], other[1], rtol=0, atol=1e-12) and torch.allclose(one[1], other[0], rtol=0, atol=1e-12)
    assert swaps == shared


@pytest.mark.parametrize("reading", ["cross", "swapped"])
def test_weights_at_are_the_rows_that_forward_uses(reading):
    module, (clinical, dermoscopy) = opened(16, reading=reading), maps()
    row, column = 3, 1
    weights = module.weights_at(clinical, dermoscopy, row, column)
    values = [v for _, _, v in module.project(clinical, dermoscopy)]
    for w, v, x, refined in zip(weights, values, (clinical, dermoscopy), module(clinical, dermoscopy)):
        close(w.sum((1, 2)), torch.ones(3))
        close(torch.einsum("bn,bnc->bc", w.flatten(1), v), (refined - x)[:, :, row, column])


@pytest.mark.parametrize("shared", [True, False])
def test_it_starts_as_the_identity_and_opens_at_the_recipes_rate(shared):
    torch.manual_seed(0)
    module = CrossAttention(32, shared)
    clinical, dermoscopy = torch.randn(2, 8, 32, 6, 6).unbind(0)
    assert all(torch.equal(a, b) for a, b in zip(module(clinical, dermoscopy), (clinical, dermoscopy)))
    optimizer = torch.optim.Adam(module.parameters(), 3e-5)  # paper, Sec. 4.1
    moved = []
    for step in range(200):  # a task that needs the other modality: its mean
        refined = module(clinical, dermoscopy)
        loss = (refined[0] - clinical - dermoscopy.mean((2, 3), keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        moved.append(((refined[0] - clinical).detach().std() / clinical.std()).item())
    assert moved[-1] > 0.005, f"after 200 steps the attention adds {moved[-1]:.4f} of the features' spread"
    assert moved[-1] > 1.5 * moved[100], "it stopped opening"
    assert (refined[1] - dermoscopy).abs().max() > 0 if shared else torch.equal(refined[1], dermoscopy)


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_square_of_the_map():
    def kept(side):
        sizes = []
        q, k, v = (torch.randn(1, side ** 2, width, requires_grad=True) for width in (4, 4, 32))
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            attend(q, k, v, 0.5)
        return sum(sizes)
    assert kept(32) == 4 * kept(16)


def test_unknown_reading_is_refused():
    with pytest.raises(ValueError, match="choose cross or swapped"):
        CrossAttention(16, reading="both")
