"""Shared cross-attention by hand: the second half of what shared_attention.py teaches.

The method comes first: one attention on paper, the formula in plain loops, both photos place by
place, torch's own nn.MultiheadAttention with the same weights, and what "shared" and "starts at
zero" mean. Values and gradients are compared, in float64. From "regression" on, AMMFM's attention
and the fast twins of `attention` follow; a reader of the method can skip them.

Shapes: B lesions, C channels, H x W the size of a map, N = H * W its places, d = C/8.

close(ours, expected, tolerance) of conftest.py fails if the largest difference, as a share of the
largest expected value, is above the tolerance. Without one it is 1e-9, which suits float64; float32
needs 1e-6.
as_if_trained(module) of conftest.py moves each parameter from its first value: else the attention
would add nothing, because its values start at zero.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shared_attention
from conftest import as_if_trained, close
from shared_attention import (
    CrossAttention,
    NoAttention,
    OneWayAttention,
    attention,
    attention_in_blocks,
    fast_attention,
    fused_attention,
    to_map,
    to_tokens,
)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def random_tensor(shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def random_maps():
    """A clinical and a dermoscopy map of two lesions: C = 16, so d = 2, and 2 x 3 places."""
    return random_tensor((2, 16, 2, 3)), random_tensor((2, 16, 2, 3))


def assert_same_gradients(ours, theirs, inputs):
    """Compares the gradients of one random weighted sum of all entries, as one long vector."""
    direction = torch.randn_like(ours)
    our_gradients = torch.autograd.grad(ours, inputs, direction, retain_graph=True)
    their_gradients = torch.autograd.grad(theirs, inputs, direction, retain_graph=True)
    our_vector = torch.cat([gradient.flatten() for gradient in our_gradients])
    their_vector = torch.cat([gradient.flatten() for gradient in their_gradients])
    close(our_vector, their_vector)


# -------------------------------------------------------------------------------------- the formula


def test_one_query_on_paper():
    """One query reads two places. d = 4, so the products q k are divided by sqrt(4) = 2.

    The scores are 2 log 3 / 2 = log 3 and 0. The softmax makes 3 / (3 + 1) and 1 / (3 + 1) of
    them, and the result is 3/4 * 4 + 1/4 * 8 = 5.
    """
    log_3 = math.log(3)
    q = torch.tensor([[[2.0, 0, 0, 0]]], dtype=torch.float64, requires_grad=True)
    k = torch.tensor([[[log_3, 0, 0, 0], [0, 0, 0, 0]]], dtype=torch.float64, requires_grad=True)
    v = torch.tensor([[[4.0], [8.0]]], dtype=torch.float64, requires_grad=True)
    result = attention(q, k, v)
    close(result, [[[5.0]]])

    q_gradient, k_gradient, v_gradient = torch.autograd.grad(result, (q, k, v))
    # The result is a mean of the values, so its derivative by a value is that value's weight.
    close(v_gradient, [[[3 / 4], [1 / 4]]])
    # By a score it is weight * (value - result): 3/4 (4 - 5) = -3/4 and 1/4 (8 - 5) = 3/4.
    # A score is q k / 2, so its derivative by q is k / 2, and by k it is q / 2 = 1.
    close(q_gradient, [[[-3 / 4 * log_3 / 2, 0, 0, 0]]])
    close(k_gradient, [[[-3 / 4, 0, 0, 0], [3 / 4, 0, 0, 0]]])


def attention_in_loops(q, k, v):
    """softmax(q k^T / sqrt(d)) v for one lesion, one query and one place at a time."""
    B, N, d = q.shape
    _, M, C = v.shape
    result = torch.zeros(B, N, C, dtype=q.dtype)
    for b in range(B):
        for n in range(N):
            exponentials = []
            for m in range(M):
                score = (q[b, n] * k[b, m]).sum() / math.sqrt(d)
                exponentials.append(score.exp())
            for m in range(M):
                weight = exponentials[m] / sum(exponentials)
                result[b, n] += weight * v[b, m]
    return result


def test_the_formula_in_plain_loops():
    q = random_tensor((2, 4, 3))
    k = random_tensor((2, 5, 3))  # another number of places than there are queries
    v = random_tensor((2, 5, 8))
    ours = attention(q, k, v)
    expected = attention_in_loops(q, k, v)
    close(ours, expected)
    assert_same_gradients(ours, expected, (q, k, v))


def test_a_map_becomes_tokens_row_by_row():
    x = random_tensor((2, 3, 4, 5))
    tokens = to_tokens(x)
    assert tokens.shape == (2, 20, 3)
    for row in range(4):
        for column in range(5):
            close(tokens[:, 5 * row + column], x[:, :, row, column])
    assert torch.equal(to_map(tokens, 4, 5), x)


# ----------------------------------------------------------------------- two photos read each other


def convolve(layer, x):
    """The 1x1 convolution of Fig. 3 with the weights of a linear layer, map to map."""
    kernel = layer.weight[:, :, None, None]
    return F.conv2d(x, kernel, layer.bias)


def add_what_it_reads(reader, source, project_reader, project_source):
    """Fig. 3 place by place: queries from one map, keys and values from the other."""
    q = convolve(project_reader.query, reader)  # (B, d, H, W)
    k = convolve(project_source.key, source)
    v = convolve(project_source.value, source)  # (B, C, H, W)
    d = q.shape[1]
    H, W = reader.shape[2:]
    result = reader.clone()
    for y in range(H):
        for x in range(W):
            exponentials = torch.zeros(len(q), H, W, dtype=q.dtype)
            for source_y in range(H):
                for source_x in range(W):
                    product = (q[:, :, y, x] * k[:, :, source_y, source_x]).sum(1)  # (B,)
                    exponentials[:, source_y, source_x] = (product / math.sqrt(d)).exp()
            total = exponentials.sum((1, 2))  # (B,)
            for source_y in range(H):
                for source_x in range(W):
                    weight = exponentials[:, source_y, source_x] / total
                    result[:, :, y, x] += weight[:, None] * v[:, :, source_y, source_x]
    return result


@pytest.mark.parametrize("shared", [True, False])
def test_each_photo_reads_the_other_place_by_place(shared):
    module = as_if_trained(CrossAttention(16, shared), spread=0.2)
    clinical, dermoscopy = random_maps()
    layers_c = module.project_clinical
    layers_d = module.project_dermoscopy

    ours = torch.stack(module(clinical, dermoscopy))
    expected_clinical = add_what_it_reads(clinical, dermoscopy, layers_c, layers_d)
    expected_dermoscopy = add_what_it_reads(dermoscopy, clinical, layers_d, layers_c)
    expected = torch.stack((expected_clinical, expected_dermoscopy))

    close(ours, expected)
    assert_same_gradients(ours, expected, [clinical, dermoscopy] + list(module.parameters()))


def multihead_attention(projections, source_channels, C):
    """nn.MultiheadAttention with one head and the weights of `projections`.

    It wants queries and keys of C channels and not d. So their layers fill its first d rows, and
    the other rows are zero. It divides by sqrt(C), not by sqrt(d): larger queries make up for it.
    """
    d = C // 8
    enlarge = math.sqrt(C / d)
    twin = nn.MultiheadAttention(
        C, num_heads=1, kdim=source_channels, vdim=source_channels, batch_first=True
    )
    twin.double()
    if source_channels == C:
        query_weight, key_weight, value_weight = twin.in_proj_weight.chunk(3)
    else:
        query_weight, key_weight = twin.q_proj_weight, twin.k_proj_weight
        value_weight = twin.v_proj_weight
    query_bias, key_bias, value_bias = twin.in_proj_bias.chunk(3)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        query_weight[:d] = enlarge * projections.query.weight
        query_bias[:d] = enlarge * projections.query.bias
        key_weight[:d] = projections.key.weight
        key_bias[:d] = projections.key.bias
        value_weight[:] = projections.value.weight
        value_bias[:] = projections.value.bias
        twin.out_proj.weight.copy_(torch.eye(C))
    return twin


def test_it_is_torchs_multihead_attention_with_one_head():
    module = as_if_trained(CrossAttention(16), spread=0.2)
    clinical, dermoscopy = random_maps()
    twin = multihead_attention(module.project_clinical, 16, 16)
    clinical_out, dermoscopy_out = module(clinical, dermoscopy)
    for ours, reader, source in (
        (clinical_out, clinical, dermoscopy),
        (dermoscopy_out, dermoscopy, clinical),
    ):
        q = reader.flatten(2).transpose(1, 2)  # (B, N, C)
        kv = source.flatten(2).transpose(1, 2)
        read, _ = twin(q, kv, kv, need_weights=False)
        expected = reader + read.transpose(1, 2).reshape(reader.shape)
        close(ours, expected)
        assert_same_gradients(ours, expected, (clinical, dermoscopy))


# ------------------------------------------------------------------------------- shared or separate


@pytest.mark.parametrize("shared", [True, False])
def test_exchanged_photos_exchange_the_results_only_if_the_layers_are_shared(shared):
    """Shared layers do not know which photo is the clinical one."""
    module = as_if_trained(CrossAttention(16, shared), spread=0.2)
    one, other = random_maps()
    one_as_clinical, other_as_dermoscopy = module(one, other)
    other_as_clinical, one_as_dermoscopy = module(other, one)
    same_one = torch.allclose(one_as_clinical, one_as_dermoscopy, atol=1e-12)
    same_other = torch.allclose(other_as_clinical, other_as_dermoscopy, atol=1e-12)
    assert same_one == shared
    assert same_other == shared


@pytest.mark.parametrize("shared, copies", [(True, 1), (False, 2)])
def test_number_of_parameters(shared, copies):
    """C = 32: a query and a key layer from 32 to 4 channels, a value layer from 32 to 32."""
    module = CrossAttention(32, shared)
    query_or_key = 32 * 4 + 4
    value = 32 * 32 + 32
    found = sum(parameter.numel() for parameter in module.parameters())
    assert found == copies * (query_or_key + query_or_key + value)


def test_shared_layers_have_two_names_and_are_one_object():
    module = CrossAttention(16)
    assert module.project_clinical is module.project_dermoscopy
    names = set(module.state_dict())
    assert {"project_clinical.query.weight", "project_dermoscopy.query.weight"} <= names
    assert len(names) == 12  # three layers, weight and bias, under two names
    assert len(list(module.parameters())) == 6  # an optimizer sees each of them once


def test_without_attention_nothing_crosses():
    clinical, dermoscopy = random_maps()
    clinical_out, dermoscopy_out = NoAttention()(clinical, dermoscopy)
    assert clinical_out is clinical
    assert dermoscopy_out is dermoscopy


# ---------------------------------------------------------------------------------- the first steps


@pytest.mark.parametrize("shared", [True, False])
def test_a_new_module_adds_nothing_and_opens_at_the_recipes_rate(shared):
    """The task needs the other photo: the clinical map shall grow by dermoscopy's mean."""
    module = CrossAttention(32, shared)
    clinical = torch.randn(8, 32, 6, 6)
    dermoscopy = torch.randn(8, 32, 6, 6)
    clinical_out, dermoscopy_out = module(clinical, dermoscopy)
    assert torch.equal(clinical_out, clinical)
    assert torch.equal(dermoscopy_out, dermoscopy)

    optimizer = torch.optim.Adam(module.parameters(), 3e-5)  # paper, Sec. 4.1
    target = dermoscopy.mean((2, 3), keepdim=True)
    spreads = []  # of what is read, from lesion to lesion, which no bias can cause
    for _ in range(200):
        clinical_out, dermoscopy_out = module(clinical, dermoscopy)
        added = clinical_out - clinical
        (added - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        means = added.detach().mean((2, 3))  # (B, C)
        spreads.append(float(means.std(0).mean() / clinical.std()))
    assert spreads[-1] > 0.005, f"after 200 steps what is read varies by only {spreads[-1]:.4f}"
    assert spreads[-1] > 1.5 * spreads[100], "it has stopped opening"
    # Separate layers: dermoscopy's queries, clinical's keys and values have learned nothing.
    assert torch.equal(dermoscopy_out, dermoscopy) == (not shared)


# The tutorial ends here. The regression nets that follow guard refusals, AMMFM and speed.

# --------------------------------------------------------------------------------------- regression


@pytest.mark.parametrize("channels", [1, 7])
def test_fewer_than_8_channels_are_refused(channels):
    message = f"a map of {channels} channels: attention needs at least 8"
    with pytest.raises(ValueError, match=message):
        CrossAttention(channels)
    with pytest.raises(ValueError, match=message):
        OneWayAttention(16, channels)
    OneWayAttention(channels, 16)  # d is an eighth of dermoscopy's channels


@pytest.mark.parametrize("channels, d", [(8, 1), (15, 1), (16, 2), (100, 12)])
def test_d_is_an_eighth_of_the_channels_rounded_down(channels, d):
    module = as_if_trained(CrossAttention(channels), spread=0.2)
    assert module.project_clinical.query.out_features == d
    assert module.project_clinical.key.out_features == d
    x = torch.randn(1, channels, 2, 2, dtype=torch.float64)
    clinical_out, _ = module(x, x)
    assert clinical_out.shape == x.shape


# AMMFM's attention: the maps of a light clinical and a heavy dermoscopy encoder differ in channels
# and in size.


def unequal_maps():
    return random_tensor((3, 6, 4, 3)), random_tensor((3, 16, 5, 4))


def test_a_new_one_way_attention_adds_nothing():
    clinical, dermoscopy = unequal_maps()
    clinical_out, dermoscopy_out = OneWayAttention(6, 16).double()(clinical, dermoscopy)
    assert clinical_out is clinical
    assert torch.equal(dermoscopy_out, dermoscopy)


def test_one_way_attention_is_torchs_multihead_attention():
    module = as_if_trained(OneWayAttention(6, 16), spread=0.2)
    clinical, dermoscopy = unequal_maps()
    twin = multihead_attention(module, 6, 16)
    _, ours = module(clinical, dermoscopy)
    q = dermoscopy.flatten(2).transpose(1, 2)  # (3, 20, 16)
    kv = clinical.flatten(2).transpose(1, 2)  # (3, 12, 6)
    read, _ = twin(q, kv, kv, need_weights=False)
    expected = dermoscopy + read.transpose(1, 2).reshape(dermoscopy.shape)
    close(ours, expected)
    assert_same_gradients(ours, expected, (clinical, dermoscopy))


def test_one_way_attention_flows_one_way():
    module = as_if_trained(OneWayAttention(6, 16), spread=0.2)
    clinical, dermoscopy = unequal_maps()
    clinical_out, dermoscopy_out = module(clinical, dermoscopy)
    assert clinical_out is clinical
    _, changed = module(torch.randn_like(clinical), dermoscopy)
    difference = (changed - dermoscopy_out).abs()  # (3, 16, 5, 4)
    largest_of_each_lesion = difference.amax((1, 2, 3))
    assert largest_of_each_lesion.min() > 0.01


# The fast twins of `attention`.


@pytest.mark.parametrize("queries_per_block", [1, 3, 10, 17, 99])  # a lesion has 17 queries
def test_blocks_equal_the_plain_formula(queries_per_block, monkeypatch):
    monkeypatch.setattr(shared_attention, "QUERIES_PER_BLOCK", queries_per_block)
    q = random_tensor((2, 17, 3))
    k = random_tensor((2, 23, 3))
    v = random_tensor((2, 23, 8))
    expected = attention(q, k, v)
    ours = attention_in_blocks(q, k, v)
    close(ours, expected)
    assert_same_gradients(ours, expected, (q, k, v))
    with torch.no_grad():  # as in prediction
        close(attention_in_blocks(q, k, v), expected)


@pytest.mark.parametrize("d", [1, 8, 12, 24])  # 1 and 12 are padded to 8 and 16
def test_the_fused_kernel_equals_the_plain_formula(d):
    """It serves a GPU, but torch has it for a CPU too."""
    q = random_tensor((2, 17, d))
    k = random_tensor((2, 23, d))
    v = random_tensor((2, 23, 8 * d))
    ours = fused_attention(q, k, v)
    expected = attention(q, k, v)
    close(ours, expected)
    assert_same_gradients(ours, expected, (q, k, v))


@pytest.mark.parametrize("d, padded", [(1, 8), (8, 8), (12, 16)])
def test_the_fused_kernel_gets_multiples_of_8_channels(d, padded, monkeypatch):
    widths = []
    kernel = F.scaled_dot_product_attention

    def recording_kernel(q, k, v, scale):
        widths.extend([q.shape[-1], k.shape[-1]])
        return kernel(q, k, v, scale=scale)

    monkeypatch.setattr(F, "scaled_dot_product_attention", recording_kernel)
    fused_attention(torch.ones(1, 4, d), torch.ones(1, 4, d), torch.ones(1, 4, 8))
    assert widths == [padded, padded]


def relative_errors(function, inputs, direction):
    """Of the result and the three gradients in bfloat16, against the plain formula in float64.

    Each is the norm of the difference over the norm; the largest entry would depend on chance.
    """
    rounded = [x.detach().bfloat16().requires_grad_() for x in inputs]
    result = function(rounded[0], rounded[1], rounded[2])
    expected = attention(inputs[0], inputs[1], inputs[2])
    results = [result] + list(torch.autograd.grad(result, rounded, direction))
    exact = [expected] + list(torch.autograd.grad(expected, inputs, direction.double()))
    errors = []
    for ours, truth in zip(results, exact):
        error = (ours.detach().double() - truth.detach()).norm() / truth.detach().norm()
        errors.append(float(error))
    return errors


def test_blocks_in_bfloat16_are_as_exact_as_the_plain_formula(monkeypatch):
    monkeypatch.setattr(shared_attention, "QUERIES_PER_BLOCK", 43)  # seven blocks, as at 56 x 56
    inputs = [random_tensor((2, 300, 8)), random_tensor((2, 300, 8)), random_tensor((2, 300, 64))]
    direction = torch.randn(2, 300, 64).bfloat16()
    of_blocks = sum(relative_errors(attention_in_blocks, inputs, direction))
    of_formula = sum(relative_errors(attention, inputs, direction))
    assert of_blocks < 1.1 * of_formula


def bytes_kept(function, tensors):
    """How much autograd keeps of a function for the backward pass. benchmark.py prints it too."""
    sizes = {}  # storage -> bytes: views of one tensor count once

    def keep(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def unchanged(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, unchanged):
        result = function(*tensors)
    del result
    return sum(sizes.values())


def kept_by_fast_attention(side):
    """On side x side places."""
    q = torch.randn(1, side**2, 4, requires_grad=True)
    k = torch.randn(1, side**2, 4, requires_grad=True)
    v = torch.randn(1, side**2, 32, requires_grad=True)
    return bytes_kept(fast_attention, (q, k, v))


def weights_bytes(side):
    """The N x N weights of one lesion in float32."""
    return 4 * (side**2) ** 2


def test_large_maps_keep_no_weights_for_the_backward_pass():
    """Above 32 x 32 places what is kept grows with N and not with N^2."""
    assert kept_by_fast_attention(68) == 4 * kept_by_fast_attention(34)
    assert kept_by_fast_attention(34) < weights_bytes(34) / 4
    assert (
        weights_bytes(32) < kept_by_fast_attention(32) < 3 * weights_bytes(32)
    )  # the plain formula
