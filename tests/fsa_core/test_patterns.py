import itertools
from dataclasses import replace

import pytest
import torch

from fsa_core.patterns import expand_query_blocks
from fsa_core.validation import validate_selected
from tests.fsa_core.conftest import visible_keys

LENS = {"square": ((50, 1, 0, 33), None), "chunked prefill": ((20, 5), (90, 64))}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("query_block_size", [1, 7, 16, 64])
@pytest.mark.parametrize("lens", LENS.values(), ids=LENS.keys())
def test_a_row_of_a_query_block_stands_for_each_of_its_queries(make_case, lens, query_block_size, causal):
    """Against a dense mask: what the last query of a block selects, each query sees up to itself."""
    q_lens, k_lens = lens
    case = make_case(q_lens=q_lens, k_lens=k_lens, causal=causal, distribution="ragged")
    starts = case.cu_seqlens_q.tolist()
    last_of_block, row_of_token = [], []
    for start, end in itertools.pairwise(starts):
        for first in range(start, end, query_block_size):
            last = min(first + query_block_size, end) - 1
            row_of_token += [last] * (last - first + 1)
            last_of_block.append(last)
    rows = case.block_indices[:, last_of_block]
    offsets = {"cu_seqlens_q": case.cu_seqlens_q, "cu_seqlens_k": case.cu_seqlens_k}
    options = {"query_block_size": query_block_size, "block_size": 16, "causal": causal}
    validate_selected(case.q, case.k, case.v, rows, softmax_scale=None, **offsets, **options)
    expanded = expand_query_blocks(rows, **offsets, **options)

    own_mask = visible_keys(make_case(q_lens=q_lens, k_lens=k_lens, causal=causal, dense=True))
    expected = visible_keys(case)[:, row_of_token] & own_mask
    assert expanded.dtype == torch.int32
    assert expanded.shape == (2, sum(q_lens), 4)
    assert torch.equal(visible_keys(replace(case, block_indices=expanded)), expected)
    # A normal form passes as what it is: one row a token.
    validate_selected(
        case.q, case.k, case.v, expanded, softmax_scale=None, **offsets, **(options | {"query_block_size": 1})
    )
