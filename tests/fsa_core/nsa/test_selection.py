import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.reference import block_importance_reference, select_blocks_reference
from fsa_core.nsa.selection import select_blocks_torch
from fsa_core.nsa.validation import validate_over_windows
from tests.fsa_core.nsa.conftest import SMALL

LN2 = math.log(2)
LENS = {
    "packed, empty, shorter than a window": ((150, 0, 7, 61), None),
    "chunked prefill and decode": ((40, 1, 1), (160, 150, 9)),
    "more queries than keys": ((30, 20), (12, 0)),
}
SIZES = {
    "as the paper, smaller": SMALL,
    "windows that are blocks": replace(SMALL, kernel_size=16, stride=16),
    "windows longer than blocks": replace(SMALL, kernel_size=48, stride=16),
    "a stride of one": replace(SMALL, kernel_size=3, stride=1, num_first_blocks=0),
    "every slot is forced": replace(SMALL, top_k=3, num_first_blocks=1, num_local_blocks=2),
    "nothing is forced": replace(SMALL, num_first_blocks=0, num_local_blocks=0, top_k=5),
    "one slot, larger blocks": replace(SMALL, num_first_blocks=0, num_local_blocks=1, top_k=1, block_size=64),
    # No ratio of small numbers comes near these: whether a share reaches a budget is not left to rounding.
    "top-p": replace(SMALL, top_k=8, top_p=0.618034),
    "a threshold": replace(SMALL, top_k=6, min_share=0.118034),
}


def select(call, *, workspace_limit_bytes=2**20):
    checked = validate_over_windows(
        call.q,
        call.k_cmp,
        call.v_cmp,
        config=call.config,
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_k=call.cu_seqlens_k,
        softmax_scale=call.softmax_scale,
        workspace_limit_bytes=workspace_limit_bytes,
    )
    return select_blocks_torch(checked, call.q, call.k_cmp)


def oracle(call, select=select_blocks_reference):
    rest = (call.cu_seqlens_q, call.cu_seqlens_k, call.config, call.softmax_scale)
    return select(call.q, call.k_cmp, *rest)


@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("lens", LENS.values(), ids=LENS.keys())
def test_selects_the_oracles_blocks(make_call, lens, config):
    call = make_call(q_lens=lens[0], k_lens=lens[1], config=config, group_size=3)
    got = select(call)
    assert got.dtype == torch.int32
    assert torch.equal(got, oracle(call))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_exact_once_read(make_call, dtype):
    call = make_call(dtype=dtype, group_size=3)
    assert torch.equal(select(call), oracle(call))


def whole_numbers(call, spread, seed=0):
    """q one-hot in the first channel, so that every score is a whole number times ln 2: weights are exact."""
    generator = torch.Generator().manual_seed(seed)
    q, k_cmp = torch.zeros_like(call.q), torch.zeros_like(call.k_cmp)
    q[..., 0] = 1
    values = torch.randint(-spread, 1, k_cmp.shape[:2], generator=generator)
    k_cmp[..., 0] = values.to(k_cmp)
    return replace(call, q=q, k_cmp=k_cmp, softmax_scale=LN2)


@pytest.mark.parametrize("spread", [0, 1, 3, 30, 200], ids=lambda spread: f"scores 0 to -{spread}")
@pytest.mark.parametrize("config", SIZES.values(), ids=SIZES.keys())
def test_ties_go_to_the_lower_id_as_the_oracles(make_call, config, spread):
    """Scores of few values, so that many blocks tie; down to -200 some weights vanish and tie at zero."""
    call = make_call(q_lens=(150, 0, 33), k_lens=(150, 20, 160), config=config, group_size=1)
    call = whole_numbers(call, spread)
    assert torch.equal(select(call), oracle(call))


@st.composite
def configs(draw):
    stride = draw(st.sampled_from([1, 2, 4, 8, 16]))
    forced = draw(st.tuples(st.integers(0, 2), st.integers(0, 3)))
    return NSAConfig(
        kernel_size=stride * draw(st.integers(1, 5)),
        stride=stride,
        block_size=draw(st.sampled_from([16, 32, 64])),
        top_k=max(sum(forced), draw(st.integers(1, 8))),
        num_first_blocks=forced[0],
        num_local_blocks=forced[1],
        top_p=draw(st.sampled_from([None, 0.618034, 1.0])),
        min_share=draw(st.sampled_from([None, 0.118034])),
    )


@settings(max_examples=30)
@given(
    config=configs(),
    lens=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 150)), min_size=1, max_size=3),
    spread=st.integers(0, 40),
    seed=st.integers(0, 2**31),
    limit=st.sampled_from([1, 10_000, 2**22]),
)
def test_any_sizes_select_the_oracles_blocks(make_call, config, lens, spread, seed, limit):
    q_lens, k_lens = zip(*lens, strict=True)
    call = make_call(q_lens=q_lens, k_lens=k_lens, config=config, group_size=1, num_kv_heads=1)
    call = whole_numbers(call, spread, seed)
    assert torch.equal(select(call, workspace_limit_bytes=limit), oracle(call))


def test_the_tie_test_has_ties(make_call):
    """Most rows of the case above have a tie between a block that is chosen and one that is not."""
    config = SIZES["nothing is forced"]
    call = whole_numbers(make_call(q_lens=(150,), config=config, group_size=1), spread=1)
    importance = oracle(call, block_importance_reference)[0]
    tied = 0
    for head, row in torch.cartesian_prod(torch.arange(2), torch.arange(96, 150)).tolist():
        scores = importance[head, row, : row // 16 + 1].sort(descending=True).values
        tied += bool(scores[4] == scores[5])
    assert tied > 54, f"{tied} of 108 rows"


def test_equal_heads_of_a_group_tie_as_one(make_call):
    call = whole_numbers(make_call(q_lens=(200,), group_size=4), spread=2)
    assert torch.equal(select(call), oracle(call))


def test_a_block_that_every_query_wants_is_found(make_call):
    """A planted key, far in front: each query after it selects its block, under any chunking."""
    call = make_call(q_lens=(300,), config=replace(SMALL, top_k=4), group_size=1)
    q, k_cmp = torch.zeros_like(call.q), torch.zeros_like(call.k_cmp)
    q[..., 0], k_cmp[30, :, 0] = 40.0, 40.0  # window 30 covers keys 120 to 127, in block 7
    rows = select(replace(call, q=q, k_cmp=k_cmp))
    assert (rows[:, 127:] == 7).any(-1).all()


def test_large_scores_are_right(make_call):
    call = make_call(q_scale=16.0, dtype=torch.float16, q_lens=(150,))
    assert torch.equal(select(call), oracle(call))


def test_extreme_scores_miss_no_importance(make_call):
    """Scores in the thousands: most blocks vanish in float32, and those of them chosen hold nothing."""
    call = make_call(q_scale=3000.0, dtype=torch.float16, q_lens=(150,))
    importance = oracle(call, block_importance_reference)[0]

    def held(rows):
        return importance.gather(-1, rows.long().clamp(min=0)).where(rows >= 0, 0.0).sum(-1)

    # A share near 1 swallows what float32 does not tell from it.
    lost = held(oracle(call)) - held(select(call))
    assert lost.amax() < 4 * torch.finfo(torch.float32).eps


def test_rows_of_nan_select_as_if_all_were_equal(make_call):
    call = make_call(q_lens=(100,), config=replace(SMALL, top_k=4), group_size=2)
    q = call.q.clone()
    q[90, 0, 0] = torch.nan
    rows = select(replace(call, q=q))
    assert rows[0, 90].tolist() == [0, 1, 2, 5]
    others = torch.arange(100) != 90
    assert torch.equal(rows[:, others], select(call)[:, others])
    assert torch.equal(rows[1], select(call)[1])


@pytest.mark.parametrize("limit", [1, 5000, 100_000])
def test_chunks_of_any_size_select_the_same(make_call, limit):
    call = whole_numbers(make_call(q_lens=(120, 40), k_lens=(120, 90), group_size=2), spread=4)
    assert torch.equal(select(call, workspace_limit_bytes=limit), select(call))


def test_a_future_key_changes_no_earlier_choice(make_call):
    call = make_call(q_lens=(160,), group_size=2)
    k_cmp = call.k_cmp.clone()
    k_cmp[20:] = torch.nan  # windows from key 80 on: their last keys are 87 and later
    before = torch.arange(160) < 87
    assert torch.equal(select(replace(call, k_cmp=k_cmp))[:, before], select(call)[:, before])
