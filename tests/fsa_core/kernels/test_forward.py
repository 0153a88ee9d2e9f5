"""The forward kernels against the oracle."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fsa_core.kernels.forward import selected_attention_forward
from fsa_core.plan import plan_forward


def test_more_slots_than_one_tile_of_the_index_holds(check_forward: Callable) -> None:
    check_forward(
        q_lens=(3,), k_lens=(2100,), num_kv_heads=1, num_slots=130, head_dim=32, dtype=torch.float16
    )


def test_more_blocks_than_the_index_adds_up_at_once(check_forward: Callable) -> None:
    sizes = {"q_lens": (9, 2), "k_lens": (40_000, 50), "num_kv_heads": 1, "block_size": 16, "head_dim": 16}
    check_forward(**sizes, num_slots=20, dtype=torch.float16)


def test_a_tenth_of_the_workspace_gives_the_same_bits(make_case: Callable, device: torch.device) -> None:
    case = make_case(q_lens=(70, 33), num_kv_heads=2, num_slots=6, dtype=torch.float16, head_dim=32)
    whole = plan_forward(case.problem)
    limit = whole.workspace_bytes // 10
    cut = plan_forward(case.problem, limit)
    assert cut.chunk_tokens < whole.chunk_tokens
    assert cut.group_tokens < case.problem.num_q_tokens
    _same(
        selected_attention_forward(case.problem, *case.tensors),
        selected_attention_forward(case.problem, *case.tensors, workspace_limit_bytes=limit),
        device,
    )


def test_ids_that_no_validation_has_seen_read_no_foreign_memory(
    make_case: Callable, assert_close_to_oracle: Callable
) -> None:
    case = make_case(q_lens=(40, 24), distribution="ragged", dtype=torch.float16, head_dim=32)
    ids = case.block_indices
    wild = torch.tensor([2**31 - 1, -(2**31), -7, 4], dtype=torch.int32, device=ids.device)
    wild = wild[torch.arange(ids.numel(), device=ids.device) % 4].view_as(ids)
    spoiled = torch.where(ids == -1, wild, ids)
    tensors = (*case.tensors[:3], spoiled, *case.tensors[4:])
    assert_close_to_oracle(*selected_attention_forward(case.problem, *tensors), case)


def test_a_request_alone_gives_the_bits_it_has_in_company(make_case: Callable, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter multiplies with numpy, whose rows depend on their place in the matrix")
    lens = [(int(n), int(n) + int(extra)) for n, extra in torch.randint(1, 300, (200, 2)).tolist()]
    company = make_case(q_lens=[q for q, _ in lens], k_lens=[k for _, k in lens], dtype=torch.bfloat16)
    out, lse = selected_attention_forward(company.problem, *company.tensors)
    cu_q, cu_k = company.cu_seqlens_q.tolist(), company.cu_seqlens_k.tolist()
    for i, (q_len, k_len) in enumerate(lens):
        q_rows, k_rows = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        problem = replace(company.problem, num_q_tokens=q_len, num_k_tokens=k_len, num_sequences=1)
        alone = selected_attention_forward(
            problem, company.q[q_rows], company.k[k_rows], company.v[k_rows],
            company.block_indices[:, q_rows].contiguous(),
            torch.tensor([0, q_len], dtype=torch.int32, device=device),
            torch.tensor([0, k_len], dtype=torch.int32, device=device),
        )  # fmt: skip
        assert torch.equal(alone[0], out[q_rows]), f"request {i}: {q_len} queries, {k_len} keys"
        assert torch.equal(alone[1], lse[q_rows])


def test_the_plan_says_what_is_allocated(make_case: Callable, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("only the CUDA allocator counts bytes")
    case = make_case(q_lens=(3000,), num_slots=16, dtype=torch.bfloat16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = selected_attention_forward(case.problem, *case.tensors)
    answer = out.numel() * out.element_size() + lse.numel() * lse.element_size()
    used = torch.cuda.max_memory_allocated() - before - answer
    # The allocator rounds each of the eight buffers and two answers up to 2 MiB at most.
    assert abs(used - plan_forward(case.problem).workspace_bytes) <= 10 * 2 * 2**20


def test_it_runs_inside_a_cuda_graph(make_case: Callable, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("graphs are CUDA's")
    case = make_case(q_lens=(500, 100), dtype=torch.bfloat16)
    expected = selected_attention_forward(case.problem, *case.tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = selected_attention_forward(case.problem, *case.tensors)
    out.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def _same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...], device: torch.device) -> None:
    """Bitwise on the GPU; in the interpreter within a rounding, since numpy's sums depend on the tile."""
    for x, y in zip(a, b, strict=True):
        if device.type == "cuda":
            assert torch.equal(x, y)
        else:
            torch.testing.assert_close(x, y, atol=2e-3, rtol=0)
