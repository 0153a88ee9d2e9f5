"""The gradient kernels against the oracle."""

from collections.abc import Callable, Iterator

import pytest
import torch

from fsa_core import backward_plan
from fsa_core.backward_plan import plan_backward
from fsa_core.kernels import backward, key_gradients
from fsa_core.kernels.backward import selected_attention_backward
from fsa_core.kernels.forward import selected_attention_forward
from fsa_core.plan import KV_MAJOR, MIXED
from tests.fsa_core.kernels.conftest import gradients


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """Plans are remembered; those made with other constants must not be."""
    backward.planned.cache_clear()
    yield
    backward.planned.cache_clear()


@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("sum_keys", [8, 256])
def test_a_popular_block_is_many_items(
    check_gradients: Callable, monkeypatch: pytest.MonkeyPatch, sum_keys: int
) -> None:
    monkeypatch.setattr(backward_plan, "ITEM_PAIRS", 1)
    # Parts of a block that are added by programs of their own, or all of it by one.
    monkeypatch.setattr(key_gradients, "SUM_KEYS", sum_keys)
    sizes = {"q_lens": (60, 40), "num_kv_heads": 2, "group_size": 4, "head_dim": 32}
    check_gradients(**sizes, distribution="same", dtype=torch.float16)


@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize("path", [KV_MAJOR, MIXED])
def test_long_chunks_pack_a_pair_into_fewer_bits(
    make_case: Callable,
    assert_gradients_close_to_oracle: Callable,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    monkeypatch.setattr(backward_plan, "MAX_CHUNK_TOKENS", 16)
    case = make_case(q_lens=(60, 20), num_slots=3, dtype=torch.float16, head_dim=32)
    assert plan_backward(case.problem, path=path).keys.slot_bits == 2
    grads, given = gradients(case, path=path)
    assert_gradients_close_to_oracle(grads, case, *given)


@pytest.mark.parametrize(("path", "index_heads"), [(KV_MAJOR, 4), (MIXED, 1)])
def test_a_tiny_workspace_takes_keys_in_ranges_and_tokens_in_chunks(
    make_case: Callable, assert_gradients_close_to_oracle: Callable, path: str, index_heads: int
) -> None:
    case = make_case(q_lens=(18, 9), index_heads=index_heads, dtype=torch.float16, head_dim=32)
    limit = plan_backward(case.problem).workspace_bytes // 20
    plan = plan_backward(case.problem, limit, path)
    assert plan.keys.range_segments < plan.segments
    assert plan.keys.group_tokens < case.problem.num_q_tokens
    assert plan.queries.group_tokens < case.problem.num_q_tokens
    grads, given = gradients(case, path=path, workspace_limit_bytes=limit)
    assert_gradients_close_to_oracle(grads, case, *given)


def test_shares_of_grad_q_in_several_chunks(
    make_case: Callable, assert_gradients_close_to_oracle: Callable
) -> None:
    case = make_case(q_lens=(70, 33), num_slots=6, dtype=torch.float16, head_dim=32)
    limit = plan_backward(case.problem).workspace_bytes // 3
    plan = plan_backward(case.problem, limit)
    assert plan.queries.chunk_tokens < case.problem.num_q_tokens
    grads, given = gradients(case, workspace_limit_bytes=limit)
    assert_gradients_close_to_oracle(grads, case, *given)


def test_the_same_bits_on_every_run_and_a_plan_that_says_what_is_allocated(
    make_case: Callable, device: torch.device
) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter runs programs one after the other, and only CUDA counts bytes")
    case = make_case(q_lens=(3000, 500), num_slots=16, dtype=torch.bfloat16, distribution="same")
    answer = selected_attention_forward(case.problem, *case.tensors)
    given = case.output_gradients()
    first = selected_attention_backward(case.problem, *case.tensors, *answer, *given)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    again = selected_attention_backward(case.problem, *case.tensors, *answer, *given)
    used = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in again)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    # The allocator rounds each buffer up to 2 MiB at most.
    assert used <= plan_backward(case.problem).workspace_bytes + 20 * 2 * 2**20


def test_five_products_and_seven_give_the_same_bits(make_case: Callable, device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the interpreter multiplies with numpy, whose rows depend on their place in the matrix")
    # Of wider heads, which have another kernel for seven products on Hopper: test_hopper_key_gradients.py.
    case = make_case(q_lens=(900, 300), num_slots=8, block_size=64, dtype=torch.bfloat16, head_dim=32)
    limit = plan_backward(case.problem).workspace_bytes // 3
    once, twice = plan_backward(case.problem), plan_backward(case.problem, limit)
    assert once.queries is None
    assert twice.queries is not None
    assert not twice.keys.has_sums
    answer, given = selected_attention_forward(case.problem, *case.tensors), case.output_gradients()
    tensors = (*case.tensors, *answer, *given)
    grads = selected_attention_backward(case.problem, *tensors)
    again = selected_attention_backward(case.problem, *tensors, workspace_limit_bytes=limit)
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
