"""The oracle against examples worked by hand, and against what torch and fsa_core have."""

import math
from dataclasses import replace

import pytest
import torch

from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.reference import (
    block_importance_reference,
    compressed_attention_reference,
    nsa_attention_reference,
    select_blocks_reference,
    selected_attention_reference,
    sliding_window_attention_reference,
)
from fsa_core.problem import Problem
from fsa_core.reference import selected_attention_reference as selected_attention_of_the_library
from tests.fsa_core.nsa.conftest import cumulative

LN2 = math.log(2)


def scored(scores, num_keys):
    """q and k_cmp of one head, such that every query scores window i as scores[i] * ln 2."""
    q = torch.zeros(num_keys, 1, 16)
    q[..., 0] = 1
    k_cmp = torch.zeros(len(scores), 1, 16)
    k_cmp[:, 0, 0] = torch.tensor(scores, dtype=torch.float32)
    return q, k_cmp, cumulative([num_keys])


def importance_of_last(scores, num_keys, config):
    q, k_cmp, cu = scored(scores, num_keys)
    return block_importance_reference(q, k_cmp, cu, cu, config, LN2)[0][0, -1].tolist()


def test_importance_counts_the_strides_that_a_window_shares_with_a_block():
    """Blocks of 4 strides, windows of 2: window 3 lies half in block 0 and half in block 1."""
    config = NSAConfig(kernel_size=8, stride=4, block_size=16)
    only_window_3 = [-200.0] * 3 + [0.0] + [-200.0] * 3
    assert importance_of_last(only_window_3, 32, config) == pytest.approx([1.0, 1.0])
    only_window_1 = [-200.0, 0.0] + [-200.0] * 5
    assert importance_of_last(only_window_1, 32, config) == pytest.approx([2.0, 0.0])
    # 7 windows of equal weight: 0, 1, 2 count twice in block 0, 3 once in each, 4, 5, 6 twice in block 1.
    assert importance_of_last([0.0] * 7, 32, config) == pytest.approx([1.0, 1.0])
    # Probabilities 1/2, 1/4, ..., and the last two alike.
    halves = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -6.0]
    expected = [2 * (1 / 2 + 1 / 4 + 1 / 8) + 1 / 16, 1 / 16 + 2 * (1 / 32 + 1 / 64 + 1 / 64)]
    assert importance_of_last(halves, 32, config) == expected


def test_importance_is_the_probability_where_windows_are_blocks():
    config = NSAConfig(kernel_size=16, stride=16, block_size=16)
    assert importance_of_last([-1.0, -3.0, -2.0, -3.0], 64, config) == [1 / 2, 1 / 8, 1 / 4, 1 / 8]


def test_windows_may_be_longer_than_blocks():
    """Windows of 4 strides, blocks of 2: window 0 spans two blocks, window 1 a half, a whole and a half."""
    config = NSAConfig(kernel_size=32, stride=8, block_size=16)
    assert importance_of_last([0.0, -200.0], 40, config) == pytest.approx([2.0, 2.0, 0.0])
    assert importance_of_last([-200.0, 0.0], 40, config) == pytest.approx([1.0, 2.0, 1.0])


def test_a_window_is_seen_once_its_last_key_is():
    config = NSAConfig(kernel_size=8, stride=4, block_size=16)
    q, k_cmp, cu = scored([0.0, 0.0], 12)
    v_cmp = torch.tensor([1.0, 3.0])[:, None, None].expand(-1, 1, 16)
    out, lse = compressed_attention_reference(q, k_cmp, v_cmp, cu, cu, config, LN2)
    assert out[:, 0, 0].tolist() == [0.0] * 7 + [1.0] * 4 + [2.0]
    assert lse[:, 0].tolist() == [-math.inf] * 7 + [0.0] * 4 + [LN2]


def test_forced_blocks_come_first_and_ties_go_to_the_lower_id():
    config = NSAConfig(kernel_size=16, stride=16, block_size=16, top_k=4, num_local_blocks=1)
    scores = [-9.0, -5.0, -3.0, -5.0, -5.0, -3.0, -5.0, -9.0]
    q, k_cmp, cu = scored(scores, 128)
    rows = select_blocks_reference(q, k_cmp, cu, cu, config, LN2)[0]
    assert rows[-1].tolist() == [0, 2, 5, 7]
    assert rows[-2].tolist() == [0, 2, 5, 7], "the own block, of which no window is visible yet"
    assert rows[112 - 1].tolist() == [0, 2, 5, 6]
    assert rows[80 - 1].tolist() == [0, 1, 2, 4], "of 1 and 3, which tie, the lower"
    assert rows[20].tolist() == [0, 1, -1, -1], "no more blocks than there are"
    assert rows[0].tolist() == [0, -1, -1, -1]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"top_p": 0.5}, [0, 3, 4]),  # 1/16 and 1/16 are forced, and 1/2 more is enough
        ({"top_p": 0.75}, [0, 2, 3, 4]),
        ({"top_p": 0.05}, [0, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"min_share": 0.25}, [0, 2, 3, 4]),
        ({"min_share": 0.26}, [0, 3, 4]),
        ({"min_share": 0.1, "top_k": 4}, [0, 2, 3, 4]),
        ({"min_share": 0.1, "top_p": 0.5}, [0, 3, 4]),
    ],
    ids=str,
)
def test_budgets_stop_before_top_k(budget, expected):
    config = NSAConfig(kernel_size=16, stride=16, block_size=16, num_local_blocks=1, **budget)
    q, k_cmp, cu = scored([-4.0, -3.0, -2.0, -1.0, -4.0], 80)
    row = select_blocks_reference(q, k_cmp, cu, cu, config, LN2)[0, -1]
    assert row[row >= 0].tolist() == expected


def test_a_share_of_one_ends_no_row():
    config = NSAConfig(kernel_size=16, stride=16, block_size=16, num_local_blocks=1, top_p=1.0)
    # Added to what the second block holds, the others change nothing.
    q, k_cmp, cu = scored([-200.0, 0.0, -200.0, -200.0, -200.0], 80)
    assert select_blocks_reference(q, k_cmp, cu, cu, config, LN2)[0, -1, :5].tolist() == [0, 1, 2, 3, 4]


def test_selected_branch_is_the_librarys_oracle(make_call):
    call = make_call(q_lens=(40, 5), k_lens=(70, 90))
    block_indices = select_blocks_reference(
        call.q, call.k_cmp, call.cu_seqlens_q, call.cu_seqlens_k, call.config, 0.25
    )
    tensors = (call.q, call.k, call.v, block_indices, call.cu_seqlens_q, call.cu_seqlens_k)
    problem = Problem(45, 160, 2, 4, 2, 16, 24, torch.float32, 2, 3, 16, True, 0.25)
    torch.testing.assert_close(
        selected_attention_reference(*tensors, call.config, 0.25),
        selected_attention_of_the_library(problem, *tensors),
        rtol=1e-12,
        atol=1e-12,
    )


def test_a_window_over_all_keys_is_dense_attention(make_call):
    call = make_call(q_lens=(60,), value_dim=16)
    rest = (call.cu_seqlens_q, call.cu_seqlens_k, replace(call.config, window=60), 0.25)
    out, _ = sliding_window_attention_reference(call.q, call.k, call.v, *rest)
    q, k, v = (x.double().transpose(0, 1)[None] for x in (call.q, call.k, call.v))
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.25, enable_gqa=True
    )
    torch.testing.assert_close(out, dense[0].transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_a_window_of_one_is_the_own_value(make_call):
    call = make_call(q_lens=(5, 3), k_lens=(9, 3), group_size=1)
    rest = (call.cu_seqlens_q, call.cu_seqlens_k, replace(call.config, window=1), 0.25)
    out, _ = sliding_window_attention_reference(call.q, call.k, call.v, *rest)
    assert torch.equal(out, call.v[[4, 5, 6, 7, 8, 9, 10, 11]].double())


def test_gradients_are_finite_where_a_branch_sees_nothing(make_call):
    """The first queries see no window, and have to be told by nobody."""
    call = make_call(q_lens=(20, 3), k_lens=(20, 2))
    leaves = [
        x.double().requires_grad_() for x in (call.q, call.k, call.v, call.k_cmp, call.v_cmp, call.gates)
    ]
    out = nsa_attention_reference(*leaves, call.cu_seqlens_q, call.cu_seqlens_k, call.config, 0.25)
    out.sum().backward()
    assert not out[20].any(), "a query before the first key"
    for leaf in leaves:
        assert leaf.grad.isfinite().all()


def test_torchs_default_device_changes_no_bit(make_call):
    call = make_call()
    rest = (call.cu_seqlens_q, call.cu_seqlens_k, call.config, call.softmax_scale)
    gates = torch.rand(*call.q.shape[:2], 3, device=call.q.device)
    operands = (call.q, call.k, call.v, call.k_cmp, call.v_cmp, gates)
    expected = nsa_attention_reference(*operands, *rest)
    with torch.device("meta"):
        assert torch.equal(nsa_attention_reference(*operands, *rest), expected)
