"""Rows that blocks of queries share, expanded by the kernel, against the torch operations."""

from collections.abc import Callable

import pytest
import torch

from fsa_core.kernels.row_expansion import expand_rows
from fsa_core.packing import row_starts
from fsa_core.patterns import expand_query_blocks

LENS = {
    "one sequence": ((130,), None),
    "packed": ((50, 1, 0, 33), None),
    "chunked prefill": ((20, 5, 7), (90, 64, 0)),
}


@pytest.fixture
def check(make_case: Callable) -> Callable[..., None]:
    def run(query_block_size: int, **options: object) -> None:
        case = make_case(**options)
        num_rows = int(row_starts(case.cu_seqlens_q, query_block_size)[-1])
        generator = torch.Generator().manual_seed(0)
        shape = (case.problem.index_heads, num_rows, case.problem.num_slots)
        rows = torch.randint(-1, 9, shape, dtype=torch.int32, generator=generator)
        sizes = {
            "query_block_size": query_block_size,
            "block_size": case.problem.block_size,
            "causal": case.problem.causal,
            "num_q_tokens": case.problem.num_q_tokens,
        }
        starts = {"cu_seqlens_q": case.cu_seqlens_q, "cu_seqlens_k": case.cu_seqlens_k}
        expected = expand_query_blocks(rows, **sizes, **{name: x.cpu() for name, x in starts.items()})
        device = case.q.device
        assert torch.equal(expand_rows(rows.to(device), **sizes, **starts).cpu(), expected)
        # Rows of which every second slot is used.
        wide = rows.to(device).repeat_interleave(2, dim=2)[..., ::2]
        assert torch.equal(expand_rows(wide, **sizes, **starts).cpu(), expected)

    return run


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("query_block_size", [7, 16, 64, 1000])
@pytest.mark.parametrize("lens", LENS.values(), ids=LENS.keys())
def test_every_token_has_the_row_of_its_queries(
    check: Callable, lens: tuple, query_block_size: int, causal: bool
) -> None:
    check(query_block_size, q_lens=lens[0], k_lens=lens[1], causal=causal)


@pytest.mark.parametrize("num_slots", [1, 5, 300])
def test_any_number_of_slots(check: Callable, num_slots: int) -> None:
    check(16, q_lens=(40, 30), num_slots=num_slots)


def test_starts_that_nobody_validated_lead_to_no_memory_of_others(device: torch.device) -> None:
    rows = torch.zeros(1, 3, 2, dtype=torch.int32, device=device)
    starts = torch.tensor([0, 2**31 - 1], dtype=torch.int32, device=device)
    options = {"query_block_size": 2, "block_size": 16, "causal": False, "num_q_tokens": 20}
    ids = expand_rows(rows, cu_seqlens_q=starts, cu_seqlens_k=starts, **options)
    assert not ids[0, :6].any()
    assert (ids[0, 6:] == -1).all()
