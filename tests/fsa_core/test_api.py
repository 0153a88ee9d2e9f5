import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from fsa_core.api import attend, dense_attention, selected_attention
from fsa_core.plan import PATHS, plan_forward
from fsa_core.validation import InputError

LAST = 2**31 - 1


def run(case, **options):
    return selected_attention(case.q, case.k, case.v, case.block_indices, **(case.options | options))


@pytest.mark.parametrize("backend", ["auto", "triton", "cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_backend_gives_the_answer_in_the_dtype_of_q(
    make_case, device, assert_close_to_oracle, backend, dtype
):
    if backend == "cpu" and device.type != "cpu":
        pytest.skip("the CPU backend takes CPU tensors")
    case = make_case(q_lens=(20, 13), group_size=3, head_dim=16, dtype=dtype)
    assert_close_to_oracle(*run(case, backend=backend), case)


def test_defaults_are_one_causal_sequence(make_case, assert_close_to_oracle):
    case = make_case(q_lens=(50,))
    assert_close_to_oracle(*selected_attention(*case.tensors[:4], block_size=16), case)
    dense = make_case(q_lens=(50,), dense=True)
    assert_close_to_oracle(*dense_attention(dense.q, dense.k, dense.v), dense)


def test_a_row_for_several_queries(make_case, assert_close_to_oracle):
    """The rows of a normal form in which 8 neighbours agree, given once."""
    case = make_case(q_lens=(40, 20), num_slots=2, head_dim=16)
    rows = torch.zeros(2, 5 + 3, 2, dtype=torch.int32, device=case.q.device)
    rows[..., 1] = -1
    case.block_indices.copy_(torch.tensor([0, -1]))
    out, lse = selected_attention(case.q, case.k, case.v, rows, query_block_size=8, **case.options)
    assert_close_to_oracle(out, lse, case)


def test_any_strides(make_case):
    case = make_case(head_dim=16)
    out, lse = run(case)

    def strided(x):
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    got = selected_attention(*(strided(x) for x in case.tensors[:4]), **case.options)
    assert torch.equal(got[0], out)
    assert torch.equal(got[1], lse)


@pytest.mark.parametrize("k_lens", [(0,), (30,)])
def test_no_queries_give_an_empty_answer(make_case, k_lens):
    case = make_case(q_lens=(0,), k_lens=k_lens, value_dim=24)
    dense = make_case(q_lens=(0,), k_lens=k_lens, value_dim=24, dense=True)
    for out, lse in (run(case), dense_attention(dense.q, dense.k, dense.v, **dense.options)):
        assert out.shape == (0, 4, 24)
        assert lse.shape == (0, 4)


def test_no_keys_give_zeros(make_case):
    case = make_case(q_lens=(3,), k_lens=(0,))
    out, lse = run(case)
    assert not out.any()
    assert (lse == -torch.inf).all()


def test_bad_input_is_refused_and_its_values_are_trusted_on_request(make_case):
    case = make_case(q_lens=(40,))
    expected = run(case)
    case.block_indices[case.block_indices == -1] = 999
    assert (case.block_indices == 999).any()
    with pytest.raises(InputError):
        run(case)
    out, lse = run(case, validate=False)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
    with pytest.raises(InputError, match="block_size is 17"):
        run(case, validate=False, block_size=17)


def test_sizes_may_be_integers_of_any_kind(make_case):
    case = make_case(q_lens=(40,))
    sizes = {"block_size": np.int64(case.options["block_size"]), "query_block_size": np.int32(1)}
    for plain, given in zip(run(case), run(case, **sizes), strict=True):
        assert torch.equal(plain, given)


def test_an_unknown_backend_is_refused(make_case):
    with pytest.raises(ValueError, match="backend is 'cuda': expected one of auto, triton, cpu, reference"):
        run(make_case(), backend="cuda")


def test_a_named_backend_never_becomes_another(make_case, device, monkeypatch):
    case, dense = make_case(), make_case(dense=True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    wrong = "triton" if device.type == "cpu" else "cpu"
    with pytest.raises(ValueError, match=f"backend '{wrong}' takes"):
        run(case, backend=wrong)
    with pytest.raises(ValueError, match=f"backend '{wrong}' takes"):
        attend(dense.problem, dense.q, dense.k, dense.v, None, *dense.dense_tensors[3:], backend=wrong)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_gives_the_answer_and_its_gradients(make_case, device, assert_close_to_oracle, path):
    case = make_case(q_lens=(20, 13), group_size=3, head_dim=16, dtype=torch.float32)
    q, k, v = (x.clone().requires_grad_() for x in (case.q, case.k, case.v))
    out, lse = selected_attention(q, k, v, case.block_indices, **case.options, backend="triton", path=path)
    assert_close_to_oracle(out.detach(), lse.detach(), case)
    got = torch.autograd.grad(out.sum(), (q, k, v))
    expected = torch.autograd.grad(
        selected_attention(q, k, v, case.block_indices, **case.options, backend="reference")[0].sum(),
        (q, k, v),
    )
    for grad, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-3)


def test_a_named_path_is_the_one_that_runs(make_case, monkeypatch):
    from fsa_core.kernels import forward

    planned = []

    def plan(problem, limit_bytes, path, tuning, buffers):
        planned.append(path)
        return plan_forward(problem, limit_bytes, path, tuning, buffers)

    monkeypatch.setattr(forward, "plan_forward", plan)
    # Of another length each: a call of known sizes is replayed, and "auto" is kv_major here.
    for length, path in enumerate((*PATHS, "auto"), start=5):
        case = make_case(q_lens=(length,), head_dim=16, dtype=torch.float32)
        run(case, backend="triton", path=path)
    # So many queries that share a row as a tile has.
    x = make_case(q_lens=(40,), head_dim=16, group_size=4, dtype=torch.float32)
    options = x.options | {"query_block_size": 16, "backend": "triton"}
    selected_attention(x.q, x.k, x.v, x.block_indices[:, [15, 31, 39]], **options)
    assert planned == [*PATHS, "kv_major", "query_tile"]


def test_a_path_that_is_not_there_is_refused(make_case, device):
    case, dense = make_case(q_lens=(5,)), make_case(dense=True)
    with pytest.raises(
        ValueError, match="path is 'union': expected one of auto, kv_major, query_tile, mixed"
    ):
        run(case, path="union")
    with pytest.raises(
        ValueError, match="path 'mixed' is one of backend 'triton', and this call runs 'reference'"
    ):
        run(case, path="mixed", backend="reference")
    if device.type == "cpu":
        with pytest.raises(ValueError, match="this call runs 'cpu'"):
            run(case, path="kv_major")
    with pytest.raises(ValueError, match="dense attention has none"):
        attend(dense.problem, dense.q, dense.k, dense.v, None, *dense.dense_tensors[3:], path="mixed")


def test_the_public_module_loads_without_triton():
    program = "import sys, fsa_core.api; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.skipif("config.getoption('--device') != 'cuda'", reason="counts CUDA synchronisations")
@pytest.mark.parametrize(
    ("validate", "ascending", "query_block_size", "synchronisations"),
    [
        (True, True, 1, 1),
        (True, True, 200, 1),
        (True, False, 1, 3),
        (True, False, 200, 2),
        (False, False, 1, 0),
    ],
)
def test_how_often_a_call_waits_for_the_device(
    make_case, validate, ascending, query_block_size, synchronisations
):
    case = make_case()
    rows = case.block_indices if query_block_size == 1 else case.block_indices[:, [69, 102]]
    rows = rows.where(rows >= 0, LAST).sort(descending=not ascending).values
    rows = rows.where(rows < LAST, -1)
    options = {"block_indices": rows, "query_block_size": query_block_size, "validate": validate}
    call = {"q": case.q, "k": case.k, "v": case.v, **case.options, **options}
    selected_attention(**call)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            selected_attention(**call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchroniz" in str(w.message)]) == synchronisations
