"""The whole operator against the oracle, from K and V to the gated sum, and its gradients."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from fsa_core.errors import InputError
from fsa_core.nsa import functional, operator, stages
from fsa_core.nsa.compression import MeanCompression, MLPCompression, WeightedCompression
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.functional import (
    compressed_attention,
    gated_sum,
    nsa_attention,
    nsa_attention_from_compressed,
    select_blocks,
)
from fsa_core.nsa.reference import compress_reference, nsa_attention_reference, pool_mlp, pool_weighted
from tests.fsa_core.nsa.conftest import SMALL

LENS = {
    "packed": ((90, 0, 5, 33), None),
    "chunked prefill and decode": ((40, 1), (90, 65)),
}


def compressions(device):
    torch.manual_seed(0)
    compress_k = MLPCompression(8, 4, num_heads=2, head_dim=16, hidden_dim=24)
    compress_v = WeightedCompression(8, 4, num_heads=2)
    return compress_k.to(device), compress_v.to(device)


def run(call, compress_k, compress_v, **options):
    return nsa_attention(
        *(call.q, call.k, call.v, call.gates, compress_k, compress_v),
        config=call.config,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k,
        softmax_scale=call.softmax_scale,
        **options,
    )


def oracle(call, parameters_k, parameters_v):
    starts = (call.cu_seqlens_q, call.cu_seqlens_k)
    k_cmp = compress_reference(call.k, starts[1], call.config, partial(pool_mlp, **parameters_k))
    v_cmp = compress_reference(call.v, starts[1], call.config, partial(pool_weighted, **parameters_v))
    tensors = (call.q, call.k, call.v, k_cmp, v_cmp, call.gates)
    return nsa_attention_reference(*tensors, *starts, call.config, call.softmax_scale)


def leaves_of(call, dtype):
    names = ("q", "k", "v", "gates")
    leaves = {name: getattr(call, name).detach().to(dtype).requires_grad_() for name in names}
    return replace(call, **leaves), leaves


@pytest.mark.parametrize("lens", LENS.values(), ids=LENS.keys())
def test_the_operator_and_all_its_gradients_are_the_oracles(make_call, device, lens):
    call = make_call(q_lens=lens[0], k_lens=lens[1], group_size=3)
    modules = compressions(device)
    call, leaves = leaves_of(call, torch.float32)
    out = run(call, *modules)
    true_call, true_leaves = leaves_of(call, torch.float64)
    parameters = [
        {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
        for module in modules
    ]
    true = oracle(true_call, *parameters)
    torch.testing.assert_close(out.double(), true, rtol=0, atol=16 * roundings(true))

    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (true * weights).sum().backward()
    got = [x.grad for x in leaves.values()] + [p.grad for m in modules for p in m.parameters()]
    expected = [x.grad for x in true_leaves.values()] + [p.grad for ps in parameters for p in ps.values()]
    for grad, true_grad in zip(got, expected, strict=True):
        torch.testing.assert_close(grad.double(), true_grad, rtol=0, atol=32 * roundings(true_grad))


def roundings(x):
    """A float32 rounding of the largest number, or of the terms of order 1 that cancel to smaller ones.

    A bias of all compressed keys, for one, moves no softmax: its gradient is 0, summed from such terms.
    """
    return torch.finfo(torch.float32).eps * max(x.abs().amax().item(), 1.0)


@pytest.mark.parametrize("lens", [(0,), (1,), (7, 3), (8, 0)], ids=str)
def test_sequences_of_hardly_a_window(make_call, device, lens):
    """No window, or one: gradients still reach everything there is."""
    call, leaves = leaves_of(make_call(q_lens=lens), torch.float32)
    compress_k, compress_v = compressions(device)
    out = run(call, compress_k, compress_v)
    none = torch.zeros(0, 2, 24, device=device)
    k_cmp, v_cmp = compress_k(call.k, call.cu_seqlens_k), compress_v(call.v, call.cu_seqlens_k)
    assert len(v_cmp) or v_cmp.shape == none.shape
    starts = (call.cu_seqlens_q, call.cu_seqlens_k)
    true = nsa_attention_reference(
        *(call.q, call.k, call.v, k_cmp, v_cmp, call.gates), *starts, call.config, call.softmax_scale
    )
    assert out.shape == true.shape
    torch.testing.assert_close(out.double(), true, rtol=0, atol=1e-5)
    out.sum().backward()
    for name, leaf in leaves.items():
        assert leaf.grad.isfinite().all(), name


@pytest.mark.parametrize("num_keys", [8192, 32768, 131072])
def test_a_needle_is_found(device, num_keys):
    """Sixteen keys that the last queries look for, among random ones, a quarter from the start."""
    generator = torch.Generator().manual_seed(0)
    needle = slice(num_keys // 4 + 5, num_keys // 4 + 21)
    k, v = torch.randn(2, num_keys, 2, 64, generator=generator).to(device)
    q = torch.randn(3, 4, 64, generator=generator).to(device)
    k[needle], v[needle] = 2 * q[0].unflatten(0, (2, 2)).sum(1), 7.0
    q[:] = q[0]
    gates = torch.tensor([0.0, 1.0, 0.0], device=device).expand(3, 4, 3)
    compress = MeanCompression(32, 16)
    options = {
        "config": NSAConfig(),
        "cu_seqlens_k": torch.tensor([0, num_keys], dtype=torch.int32).to(device),
    }
    ids = select_blocks(q, compress(k), **options)
    assert (ids == num_keys // 4 // 64).any(-1).all()
    out = nsa_attention(q, k, v, gates, compress, compress, **options)
    assert out.mean(-1).amin() > 6


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_selected_attention_runs_where_it_is_asked_to(make_call, device, backend):
    if backend == "cpu" and device.type != "cpu":
        pytest.skip("the CPU backend takes CPU tensors")
    call = make_call(q_lens=(40, 20))
    modules = compressions(device)
    torch.testing.assert_close(run(call, *modules, backend=backend), run(call, *modules))


@pytest.fixture
def noted(monkeypatch):
    """For each call that goes as one whether it keeps what its branches answered."""
    from fsa_core.kernels.replay import Replayed

    keeps, note = [], operator._note
    replayed = Replayed(lambda *args: keeps.append(args[6]) or note(*args))
    monkeypatch.setattr(operator, "_replayed", lambda: replayed)
    return keeps


def test_a_short_call_goes_as_one_and_so_does_what_it_keeps_for_gradients(make_call, monkeypatch, noted):
    call = make_call(q_lens=(90, 33), group_size=3)
    modules = [MeanCompression(8, 4)] * 2
    out = run(call, *modules, backend="triton")
    trained = run(replace(call, q=call.q.clone().requires_grad_()), *modules, backend="triton")
    assert noted == [False, True]
    monkeypatch.setattr(operator, "MOST_BYTES_AT_ONCE", call.q.nbytes - 1)
    long = run(call, *modules, backend="triton")
    assert torch.equal(out, trained)
    assert torch.equal(out, long)
    assert noted == [False, True]


@pytest.mark.parametrize("change", [{"top_k": 300}, {"top_p": 0.9}], ids=str)
def test_choices_in_torch_operations_are_no_part_of_a_call(make_call, monkeypatch, noted, change):
    monkeypatch.setattr(stages, "resolve_backend", lambda backend, device: "triton")
    call = make_call(q_lens=(90, 33), group_size=3, config=replace(SMALL, **change))
    modules = [MeanCompression(8, 4)] * 2
    trained = run(replace(call, q=call.q.clone().requires_grad_()), *modules)
    assert torch.equal(run(call, *modules), trained)
    assert not noted


@pytest.mark.parametrize("lens", LENS.values(), ids=LENS.keys())
@pytest.mark.parametrize("create_graph", [False, True])
def test_one_nodes_gradients_are_those_of_its_branches(make_call, monkeypatch, lens, create_graph):
    call = make_call(q_lens=lens[0], k_lens=lens[1], group_size=3)
    modules = [MeanCompression(8, 4)] * 2
    grads = []
    for is_one in (True, False):
        monkeypatch.setattr(functional, "launches_alone", lambda *_, is_one=is_one: is_one)
        leaved, leaves = leaves_of(call, torch.float32)
        out = run(leaved, *modules, backend="triton")
        asked = torch.autograd.grad(out.square().sum(), leaves.values(), create_graph=create_graph)
        grads.append(asked)
    for one, several in zip(*grads, strict=True):
        assert one.requires_grad == several.requires_grad == create_graph
        torch.testing.assert_close(one, several, rtol=1e-5, atol=1e-5)
    if create_graph:
        with pytest.raises(RuntimeError, match="no second derivatives"):
            grads[0][0].sum().backward()


def test_one_node_has_no_gradients_of_what_needs_none(make_call):
    call = make_call(q_lens=(90, 33), group_size=3)
    modules = [MeanCompression(8, 4)] * 2
    gates = call.gates.clone().requires_grad_()
    out = run(replace(call, gates=gates), *modules, backend="triton")
    out.sum().backward()
    only_selected = torch.tensor([0.0, 1.0, 0.0], device=gates.device).expand_as(gates).contiguous()
    selected = run(replace(call, gates=only_selected), *modules, backend="triton")
    torch.testing.assert_close(gates.grad[..., 1], selected.sum(-1), rtol=1e-4, atol=1e-4)
    assert call.q.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_branches_and_sum(make_call, dtype):
    """Each branch is rounded once, and their sum once more."""
    call = make_call(dtype=dtype, q_lens=(90, 33))
    starts = {"cu_seqlens_q": call.cu_seqlens_q, "cu_seqlens_k": call.cu_seqlens_k}
    tensors = (call.q, call.k, call.v, call.k_cmp, call.v_cmp, call.gates)
    out = nsa_attention_from_compressed(
        *tensors, config=call.config, softmax_scale=call.softmax_scale, **starts
    )
    true = nsa_attention_reference(*tensors, *starts.values(), call.config, call.softmax_scale)
    assert out.dtype == dtype
    bound = 3 * torch.finfo(dtype).eps * true.abs().amax()
    assert (out.double() - true).abs().amax() <= bound


def test_a_gate_opens_its_own_branch(make_call):
    call = make_call(q_lens=(40,))
    starts = (call.cu_seqlens_q, call.cu_seqlens_k, call.config, call.softmax_scale)
    for branch in range(3):
        gates = torch.zeros_like(call.gates)
        gates[..., branch] = 1
        tensors = (call.q, call.k, call.v, call.k_cmp, call.v_cmp, gates)
        out = nsa_attention_from_compressed(*tensors, config=call.config, softmax_scale=call.softmax_scale)
        true = nsa_attention_reference(*tensors, *starts)
        torch.testing.assert_close(out.double(), true, rtol=0, atol=16 * roundings(true))


def test_gates_are_added_up_in_float32(device):
    """Three bfloat16 branches whose sum, rounded between, would be lost."""
    branches = tuple(torch.full((1, 1, 1), x, dtype=torch.bfloat16, device=device) for x in (256.0, 1.0, 1.0))
    gates = torch.ones(1, 1, 3, dtype=torch.bfloat16, device=device)
    assert gated_sum(branches, gates).item() == 258.0


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("branches", "gates", "message"),
    [
        ((), (5, 2, 3), r"branches has length 0: expected at least 1"),
        (((5, 2, 16), (1, 2, 16), (5, 2, 16)), (5, 2, 3), r"branches\[1\] has shape .*\[1, 2, 16\]"),
        (((5, 2),), (5, 2, 1), r"branches\[0\] has rank 2"),
        (((5, 2, 16),) * 3, (5, 2, 4), r"gates has shape \[5, 2, 4\]: expected \[5, 2, 3\]"),
        (((5, 2, 16),) * 3, (1, 1, 3), r"gates has shape \[1, 1, 3\]: expected \[5, 2, 3\]"),
    ],
    ids=str,
)
def test_a_gated_sum_takes_branches_and_gates_that_fit(device, backend, branches, gates, message):
    branches = tuple(torch.randn(shape, device=device) for shape in branches)
    with pytest.raises(InputError, match=message):
        gated_sum(branches, torch.rand(gates, device=device), backend=backend)


def test_a_gated_sum_by_kernels_has_second_derivatives(device):
    """It is linear in its branches and in its gates, but not in both."""
    torch.manual_seed(0)
    branches = tuple(torch.randn(5, 2, 16, device=device, requires_grad=True) for _ in range(3))
    gates = torch.rand(5, 2, 3, device=device, requires_grad=True)

    def second(backend):
        out = gated_sum(branches, gates, backend=backend)
        grad = torch.autograd.grad(out.square().sum(), gates, create_graph=True)[0]
        return torch.autograd.grad(grad.square().sum(), (gates, *branches))

    for got, expected in zip(second("triton"), second("torch"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_starts_that_were_overwritten_are_noticed_by_the_operator(make_call, device):
    call = make_call(q_lens=(20, 20))
    leaf = call.q.detach().requires_grad_()
    out = run(replace(call, q=leaf), *compressions(device), backend="triton")
    call.cu_seqlens_q[1] = 4
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_bad_calls_are_refused_by_field(make_call, device):
    call = make_call(q_lens=(40,))
    compress_k, compress_v = compressions(device)
    with pytest.raises(InputError, match=r"gates has shape \[40, 4, 2\]: expected \[40, 4, 3\]") as error:
        run(replace(call, gates=call.gates[..., :2]), compress_k, compress_v)
    assert error.value.field == "gates"
    with pytest.raises(InputError, match=r"gates has dtype torch\.int32: expected floating point"):
        run(replace(call, gates=call.gates.int()), compress_k, compress_v)
    wrong = WeightedCompression(8, 2, num_heads=2).to(device)
    with pytest.raises(
        InputError, match=r"compress_v has kernel size and stride \(8, 2\): expected \(8, 4\)"
    ):
        run(call, compress_k, wrong)
    with pytest.raises(InputError, match="v has token count 39: expected 40, that of k"):
        run(replace(call, v=call.v[1:]), compress_k, compress_v)
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        run(call, compress_k, compress_v, backend="cuda")
    with pytest.raises(ValueError, match="backend is 'torch'"):
        run(call, compress_k, compress_v, backend="torch")
    with pytest.raises(InputError, match=r"gates has type NoneType: expected torch\.Tensor"):
        run(replace(call, gates=None), compress_k, compress_v)
    with pytest.raises(InputError, match="compress_k has type Linear: expected Compression"):
        run(call, torch.nn.Linear(1, 1), compress_v)
    with pytest.raises(InputError, match="config has type dict: expected NSAConfig"):
        run(replace(call, config={}), compress_k, compress_v)
    for stage in (select_blocks, compressed_attention):
        operands = (call.q, call.k_cmp) if stage is select_blocks else (call.q, call.k_cmp, call.v_cmp)
        with pytest.raises(ValueError, match="backend is 'reference': expected one of auto, triton, torch"):
            stage(*operands, config=call.config, backend="reference")
