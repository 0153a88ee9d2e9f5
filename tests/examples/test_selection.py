"""The blocks that examples/transformers_remote.py selects."""

import pytest
import torch
from transformers_remote import all_blocks, best_blocks

BLOCK_SIZE = 16


@pytest.mark.parametrize("num_queries", [70, 17, 1])
def test_all_blocks_are_those_up_to_the_tokens_own(num_queries: int) -> None:
    q, k = torch.zeros(num_queries, 6, 8), torch.zeros(70, 2, 8)
    rows = all_blocks(q, k, BLOCK_SIZE)[0].tolist()
    for position, row in zip(range(70 - num_queries, 70), rows, strict=True):
        assert [block for block in row if block >= 0] == list(range(position // BLOCK_SIZE + 1))


@pytest.mark.parametrize("num_queries", [150, 1])
def test_best_blocks_force_first_and_local_and_choose_the_rest_by_mean_key(num_queries: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(num_queries, 6, 8), torch.randn(150, 2, 8)
    indices = best_blocks(5)(q, k, BLOCK_SIZE)
    assert indices.shape[:2] == (2, num_queries)
    for head in range(2):
        for row, position in enumerate(range(150 - num_queries, 150)):
            own = position // BLOCK_SIZE
            chosen = {block for block in indices[head, row].tolist() if block >= 0}
            forced = {0, max(own - 1, 0), own}
            query = q[row, 3 * head : 3 * head + 3].sum(0)
            fit = {b: k[b * BLOCK_SIZE : (b + 1) * BLOCK_SIZE, head].mean(0) @ query for b in range(own)}
            others = sorted(fit.keys() - forced, key=fit.__getitem__, reverse=True)
            assert chosen == forced | set(others[: 5 - len(forced)])
