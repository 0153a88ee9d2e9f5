from functools import partial

import numpy as np
import pytest
import torch

from fsa_core.errors import InputError
from fsa_core.nsa.compression import (
    LinearCompression,
    MeanCompression,
    MLPCompression,
    WeightedCompression,
    compressed_cu_seqlens,
)
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.reference import compress_reference, pool_linear, pool_mean, pool_mlp, pool_weighted
from tests.fsa_core.nsa.conftest import cumulative

HEADS, HEAD_DIM = 2, 16
KINDS = ("mean", "weighted", "linear", "mlp")
MLP_PARAMETERS = ("position", "weight_in", "bias_in", "weight_out", "bias_out")
# Windows that overlap by half, that touch, that overlap by three quarters, of every key.
SIZES = [(8, 4), (4, 4), (16, 4), (1, 1)]


def make(kind, kernel_size, stride):
    torch.manual_seed(0)
    compression = {
        "mean": lambda: MeanCompression(kernel_size, stride),
        "weighted": lambda: WeightedCompression(kernel_size, stride, HEADS),
        "linear": lambda: LinearCompression(kernel_size, stride, HEADS, HEAD_DIM),
        "mlp": lambda: MLPCompression(kernel_size, stride, HEADS, HEAD_DIM, hidden_dim=24),
    }[kind]()
    with torch.no_grad():
        for parameter in compression.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return compression


def oracle_pool(kind, parameters):
    return {
        "mean": lambda: pool_mean,
        "weighted": lambda: partial(pool_weighted, **parameters),
        "linear": lambda: partial(pool_linear, **parameters),
        "mlp": lambda: partial(pool_mlp, **parameters),
    }[kind]()


def assert_within_roundings(got, true, count):
    """Off by at most some roundings of the largest number, which a sum of ``count`` terms may meet."""
    bound = 2 * count**0.5 * torch.finfo(got.dtype).eps * true.abs().amax()
    assert got.shape == true.shape
    assert (got.double() - true).abs().amax() <= bound


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_compression_and_its_gradients_are_the_oracles(device, kind, sizes):
    """Sequences shorter than a window, of exactly one, empty ones, and leftovers that fill none."""
    cu_seqlens = cumulative((30, 3, 0, sizes[0], 41)).to(device)
    compression = make(kind, *sizes).to(device)
    x = torch.randn(int(cu_seqlens[-1]), HEADS, HEAD_DIM).to(device).requires_grad_()
    out = compression(x, cu_seqlens)
    weights = torch.randn_like(out)

    true_x = x.detach().double().requires_grad_()
    parameters = {name: p.detach().double().requires_grad_() for name, p in compression.named_parameters()}
    config = NSAConfig(kernel_size=sizes[0], stride=sizes[1])
    true = compress_reference(true_x, cu_seqlens, config, oracle_pool(kind, parameters))

    (out * weights).sum().backward()
    (true * weights).sum().backward()
    terms = sizes[0] * HEAD_DIM
    assert len(out) == compressed_cu_seqlens(cu_seqlens, *sizes)[-1]
    assert_within_roundings(out, true, terms)
    assert_within_roundings(x.grad, true_x.grad, terms)
    for name, parameter in compression.named_parameters():
        assert_within_roundings(parameter.grad, parameters[name].grad, len(true) * terms)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_windows_of_tokens_that_lie_anywhere_are_those_of_a_sequence(device, kind, sizes):
    compression = make(kind, *sizes).to(device)
    x = torch.randn(37, HEADS, HEAD_DIM).to(device)
    whole = compression(x)
    order = torch.randperm(len(x), device=device)
    first_rows = torch.arange(0, len(x) - sizes[0] + 1, sizes[1], device=device)
    rows = order.argsort()[first_rows[:, None] + torch.arange(sizes[0], device=device)]
    assert_within_roundings(compression.at(x[order], rows), whole.double(), sizes[0] * HEAD_DIM)


def test_windows_of_no_sequence_cross_into_the_next(device):
    """NaN in every sequence but one reaches nothing of that one."""
    cu_seqlens = cumulative((20, 20, 20)).to(device)
    x = torch.full((60, HEADS, HEAD_DIM), torch.nan, device=device)
    x[20:40] = 1.0
    starts = compressed_cu_seqlens(cu_seqlens, 8, 4).tolist()
    assert starts == [0, 4, 8, 12]
    out = MeanCompression(8, 4)(x, cu_seqlens)
    assert out[4:8].eq(1).all()
    assert out[:4].isnan().all()
    assert out[8:].isnan().all()


@pytest.mark.parametrize("kind", ["weighted", "linear"])
def test_learned_pools_start_as_a_mean(device, kind):
    learned = {
        "weighted": WeightedCompression(8, 4, HEADS),
        "linear": LinearCompression(8, 4, HEADS, HEAD_DIM),
    }[kind].to(device)
    x = torch.randn(64, HEADS, HEAD_DIM, device=device)
    assert_within_roundings(learned(x), x.double().unfold(0, 8, 4).mean(-1), 8)


def test_a_stride_that_skips_keys_is_refused():
    with pytest.raises(InputError, match="stride is 9: expected from 1 to the kernel size, 8"):
        MeanCompression(8, 9)


@pytest.mark.parametrize(
    ("make_one", "field", "value"),
    [
        (lambda: MeanCompression(8, 4.0), "stride", "4.0"),
        (lambda: MeanCompression("8", 4), "kernel_size", "'8'"),
        (lambda: WeightedCompression(8, True, HEADS), "stride", "True"),
        (lambda: WeightedCompression(8, 4, 0), "num_heads", "0"),
        (lambda: LinearCompression(8, 4, -1, HEAD_DIM), "num_heads", "-1"),
        (lambda: LinearCompression(8, 4, HEADS, 0), "head_dim", "0"),
        (lambda: MLPCompression(8, 4, HEADS, 1.5), "head_dim", "1.5"),
        (lambda: MLPCompression(8, 4, HEADS, HEAD_DIM, hidden_dim=0), "hidden_dim", "0"),
    ],
)
def test_sizes_are_refused_by_name(make_one, field, value):
    with pytest.raises(InputError, match=f"{field} is {value}: expected an integer of at least 1") as error:
        make_one()
    assert (error.value.reason, error.value.field) == (f"INVALID_{field.upper()}", field)


def test_sizes_of_other_kinds_of_integers_become_plain_ones():
    compression = MLPCompression(np.int64(8), np.int32(4), np.int64(HEADS), np.int64(HEAD_DIM), np.int64(24))
    assert type(compression.kernel_size) is type(compression.stride) is int
    assert compression(torch.zeros(20, HEADS, HEAD_DIM)).shape == (4, HEADS, HEAD_DIM)


@pytest.mark.parametrize("as_numbers", [False, True])
@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([0, 20], r"cu_seqlens\[1\] is 20: expected 40, the token count"),
        ([0, 50], r"cu_seqlens\[1\] is 50: expected 40, the token count"),
        ([0, 20, 30], r"cu_seqlens\[2\] is 30: expected 40, the token count"),
        ([10, 40], r"cu_seqlens\[0\] is 10: expected 0"),
        ([0, 30, 20, 40], r"cu_seqlens\[2\] is 20: expected at least 30, the one before it"),
        ([0], "cu_seqlens has length 1: expected at least 2"),
    ],
    ids=str,
)
def test_starts_that_are_not_those_of_x_are_refused(device, starts, message, as_numbers):
    x = torch.randn(40, HEADS, HEAD_DIM, device=device)
    with pytest.raises(InputError, match=message) as error:
        MeanCompression(8, 4)(x, starts if as_numbers else torch.tensor(starts, dtype=torch.int32))
    assert error.value.reason == "INVALID_CU_SEQLENS"


def test_tensors_of_other_ranks_and_starts_of_other_types_are_refused(device):
    compression, x = MeanCompression(8, 4), torch.randn(40, HEADS, HEAD_DIM, device=device)
    with pytest.raises(InputError, match=r"x has rank 2 .*: expected 3, \[num_tokens, heads, head_dim\]"):
        compression(x[:, 0])
    with pytest.raises(InputError, match="cu_seqlens has dtype int64: expected int32"):
        compression(x, torch.tensor([0, 40]))
    with pytest.raises(InputError, match="cu_seqlens has rank 2 "):
        compression(x, torch.tensor([[0, 40]], dtype=torch.int32))


def test_gradients_of_float64_are_computed_in_float64(device):
    x = torch.randn(40, HEADS, HEAD_DIM, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.randn(9, HEADS, HEAD_DIM, dtype=torch.float64, device=device)
    (grad,) = torch.autograd.grad((MeanCompression(8, 4)(x) * weights).sum(), x)
    (true,) = torch.autograd.grad((x.unfold(0, 8, 4).mean(-1) * weights).sum(), x)
    torch.testing.assert_close(grad, true, rtol=1e-14, atol=1e-14)


def test_a_sequence_has_the_same_windows_in_any_company(device):
    """Bit by bit, with windows long enough for the order of a sum to show."""
    compression = make("mean", 32, 16)
    lengths = (70, 70, 20, 130)
    sequences = [torch.randn(length, HEADS, 30, device=device) for length in lengths]
    together = compression(torch.cat(sequences), cumulative(lengths).to(device))
    assert torch.equal(together, torch.cat([compression(x) for x in sequences]))


@pytest.mark.parametrize("kind", KINDS)
def test_sequences_of_one_length_are_trained_at_once(device, kind, monkeypatch):
    lengths = (40, 40, 3, 3, 41, 40, 40, 0)
    compression = make(kind, 8, 4).to(device)
    x = torch.randn(sum(lengths), HEADS, HEAD_DIM, device=device, requires_grad=True)
    pooled, pool = [], compression.pool_sequences
    monkeypatch.setattr(
        compression, "pool_sequences", lambda part: pooled.append(part.shape[:2]) or pool(part)
    )
    got = compression(x, cumulative(lengths).to(device))
    assert pooled == [(2, 40), (1, 41), (2, 40)]
    with torch.no_grad():
        alone = compression(x, cumulative(lengths).to(device))
    assert pooled[3:] == [(1, 40), (1, 40), (1, 41), (1, 40), (1, 40)]
    assert_within_roundings(got, alone.double(), 8 * HEAD_DIM)


@pytest.mark.parametrize(
    "module",
    [WeightedCompression(8, 4, 2), LinearCompression(8, 4, 2, 16), MLPCompression(8, 4, 2, 16)],
    ids=type,
)
@pytest.mark.parametrize("heads", [1, 3])
def test_other_heads_than_the_parameters_are_refused(module, heads):
    """One head would be taken for each of theirs."""
    with pytest.raises(InputError, match=rf"x has heads and dim \[{heads}.*\]: expected \[2"):
        module(torch.randn(20, heads, 16))
