import pytest
import torch

from mops_fl.attention import _causal_bias, _fused_attention, _matmul_attention, packed_attention

SCALING = 0.3
TOLERANCE = {"rtol": 0, "atol": 1e-5}


def random_qkv(length, num_heads=4, num_groups=2, size=8):
    generator = torch.Generator().manual_seed(length)
    shapes = [(1, heads, length, size) for heads in (num_heads, num_groups, num_groups)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def written_out(query, key, value, lengths, window=None, gate=None):
    """Softmax attention position by position; `gate` multiplies the weights after the softmax, as in the paper."""
    num_heads, num_groups = query.shape[1], key.shape[1]
    out = torch.zeros(1, query.shape[2], num_heads, query.shape[3])
    start = 0
    for length in lengths:
        for h in range(num_heads):
            group = h // (num_heads // num_groups)
            for i in range(start, start + length):
                first = start if window is None else max(start, i - window + 1)
                weights = torch.softmax(key[0, group, first : i + 1] @ query[0, h, i] * SCALING, 0)
                if gate is not None:
                    weights = weights * gate[first : i + 1]
                out[0, i, h] = weights @ value[0, group, first : i + 1]
        start += length
    return out


def attend(query, key, value, lengths, **options):
    module = torch.nn.Identity()
    return packed_attention(module, query, key, value, None, lengths=lengths, scaling=SCALING, **options)[0]


def test_each_row_attends_causally_to_itself_within_the_layers_window():
    lengths = [5, 1, 9]
    qkv = random_qkv(15)
    out = attend(*qkv, lengths, sliding_window=3)
    torch.testing.assert_close(out, written_out(*qkv, lengths, window=3), **TOLERANCE)


def test_value_scale_is_gating_after_the_softmax_without_renormalising():
    lengths = [8, 6]
    qkv = random_qkv(14)
    gate = torch.ones(14)
    gate[:3], gate[8:11] = torch.tensor([0.1, 0.9, 0.4]), torch.tensor([0.0, 0.5, 2.0])
    out = attend(*qkv, lengths, value_scale=gate, sliding_window=4)
    torch.testing.assert_close(out, written_out(*qkv, lengths, 4, gate), **TOLERANCE)


def test_gate_of_zero_takes_weight_away_and_gives_it_to_nobody():
    query, key = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)  # all scores equal: weights 1/4 at the last query
    value = torch.tensor([[8.0, 0.0], [0.0, 4.0], [4.0, 0.0], [0.0, 8.0]])[None, None]
    out = attend(query, key, value, [4], value_scale=torch.tensor([0.0, 0.5, 1.0, 1.0]))
    assert out[0, -1, 0].tolist() == [1.0, 2.5]  # (0*8 + 4) / 4 and (0.5*4 + 8) / 4


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_rows_do_not_see_each_other(changed):
    lengths = [5, 3, 6]
    before, after = (random_qkv(14) for _ in range(2))
    for tensor in after:
        tensor.split(lengths, 2)[changed].add_(1)
    outs = [attend(*qkv, lengths).split(lengths, 1) for qkv in (before, after)]
    equal = [torch.equal(a, b) for a, b in zip(*outs, strict=True)]
    assert equal == [row != changed for row in range(3)]


def test_row_in_a_pack_equals_the_row_alone():
    lengths = [5, 3, 6]
    qkv = random_qkv(14)
    packed = attend(*qkv, lengths).split(lengths, 1)
    rows = zip(*(tensor.split(lengths, 2) for tensor in qkv), strict=True)
    for row, length, out in zip(rows, lengths, packed, strict=True):
        assert torch.equal(attend(*row, [length]), out)


KERNELS = pytest.mark.parametrize("kernel", [_matmul_attention, _fused_attention])


@KERNELS
@pytest.mark.parametrize("window", [None, 8, 9])  # the longest row is 9: only from there on nothing is masked
@pytest.mark.parametrize("num_groups", [4, 2])
@pytest.mark.parametrize("lengths", [[1], [9], [5, 1, 9]])
def test_both_kernels_are_the_written_out_attention(kernel, lengths, num_groups, window):
    qkv = random_qkv(sum(lengths), num_groups=num_groups)
    out = kernel(*qkv, lengths, SCALING, window).transpose(1, 2)
    torch.testing.assert_close(out, written_out(*qkv, lengths, window), **TOLERANCE)


@KERNELS
@pytest.mark.parametrize("window", [None, 3])
def test_both_kernels_let_a_single_row_look_at_its_prefix(kernel, window):
    query, key, value = random_qkv(9)
    out = kernel(query[:, :, 5:], key, value, [4], SCALING, window).transpose(1, 2)
    torch.testing.assert_close(out, written_out(query, key, value, [9], window)[:, 5:], **TOLERANCE)


@pytest.mark.parametrize("lengths", [[5, 1, 9], [4, 4]])
def test_both_kernels_have_the_same_gradient(lengths):
    gradients = []
    for kernel in (_matmul_attention, _fused_attention):
        qkv = [tensor.requires_grad_() for tensor in random_qkv(sum(lengths))]
        kernel(*qkv, lengths, SCALING, None).square().sum().backward()
        gradients.append([tensor.grad for tensor in qkv])
    for matmul, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(matmul, fused, rtol=1e-5, atol=1e-5)


def test_gradient_reaches_the_gate_through_the_values():
    gate = torch.ones(6, requires_grad=True)
    qkv = random_qkv(6)
    attend(*qkv, [6], value_scale=gate).square().sum().backward()
    reference = torch.ones(6, requires_grad=True)
    written_out(*qkv, [6], gate=reference).square().sum().backward()
    torch.testing.assert_close(gate.grad, reference.grad, rtol=1e-5, atol=1e-5)


def test_masks_of_ever_new_lengths_stay_within_150_mebibytes_for_rows_of_1024_tokens():
    for length in range(1, 200):
        _causal_bias(length, length, None, torch.bfloat16, torch.device("cpu"))
    # Behind 70 prompts.
    assert _causal_bias.cache_info().currsize * (1024 + 70) ** 2 * torch.bfloat16.itemsize < 150 << 20
