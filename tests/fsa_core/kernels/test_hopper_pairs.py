"""Pairs by the kernels that are for Hopper alone, chunk after chunk in one launch: their twins' bits.

Without such a GPU tests/hopper_grid.py compiles the kernels, and test_hopper_interpreted.py runs some
cases.
"""

from collections.abc import Callable

import pytest
import torch

from fsa_core.kernels import hopper
from fsa_core.kernels.backward import selected_attention_backward
from fsa_core.kernels.forward import selected_attention_forward
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES, KV_MAJOR, MIXED, plan_forward
from tests.fsa_core.conftest import DISTRIBUTIONS, Case

SIZES = {"q_lens": (150, 1, 0, 70), "block_size": 64, "head_dim": 128, "dtype": torch.bfloat16}
FEW_BYTES = 1 << 20


@pytest.fixture(autouse=True)
def _on_hopper(device: torch.device, small_calls_on_hopper: None) -> None:
    if not hopper.runs_on(device):
        pytest.skip("Gluon's kernels for Hopper run on nothing else")


@pytest.fixture
def check(by_twins: Callable[[], None], assert_close_to_oracle: Callable) -> Callable[..., None]:
    """The answer on a path, and the gradient of q where it is made apart."""

    def run_and_check(case: Case, path: str, limit_bytes: int = DEFAULT_WORKSPACE_BYTES) -> None:
        assert plan_forward(case.problem, limit_bytes, path, buffers=2).is_buffered
        limit = {"workspace_limit_bytes": limit_bytes}
        given = case.output_gradients()

        def run() -> tuple[torch.Tensor, ...]:
            answer = selected_attention_forward(case.problem, *case.tensors, path=path, **limit)
            grads = selected_attention_backward(
                case.problem, *case.tensors, *answer, *given, path=MIXED, **limit
            )
            return *answer, grads[0]

        got = run()
        assert_close_to_oracle(*got[:2], case)
        by_twins()
        for x, y in zip(got, run(), strict=True):
            assert torch.equal(x.nan_to_num(), y.nan_to_num())

    return run_and_check


@pytest.mark.parametrize("path", [KV_MAJOR, MIXED])
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 7, 8, 16, 33, 64])
def test_every_group_size(make_case: Callable, check: Callable, group_size: int, path: str) -> None:
    check(make_case(**SIZES, group_size=group_size, num_kv_heads=1), path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (128, 64), (64, 128)])
def test_every_width(
    make_case: Callable, check: Callable, head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    widths = {"head_dim": head_dim, "value_dim": value_dim, "dtype": dtype}
    check(make_case(**SIZES | widths, group_size=4), KV_MAJOR)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_every_block_size_with_a_short_last_block(
    make_case: Callable, check: Callable, block_size: int
) -> None:
    lens = {"q_lens": (50, 9), "k_lens": (2 * block_size + 7, block_size + 70), "block_size": block_size}
    check(make_case(**SIZES | lens, group_size=4), KV_MAJOR)


@pytest.mark.parametrize("path", [KV_MAJOR, MIXED])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_way_to_choose_blocks_in_many_chunks(
    make_case: Callable, check: Callable, distribution: str, causal: bool, path: str
) -> None:
    lens = {"q_lens": (1500, 70), "k_lens": (1900, 64)}
    case = make_case(**SIZES | lens, group_size=4, distribution=distribution, causal=causal, num_slots=9)
    check(case, path, FEW_BYTES)


def test_blocks_chosen_for_all_heads_in_groups_of_chunks(make_case: Callable, check: Callable) -> None:
    check(make_case(**SIZES, group_size=3, index_heads=1), KV_MAJOR, 1)


def test_more_slots_than_a_word_has_bits(make_case: Callable, check: Callable) -> None:
    lens = {"q_lens": (90,), "k_lens": (64 * 60,)}
    check(make_case(**SIZES | lens, group_size=4, num_slots=45), KV_MAJOR)


def test_large_logits_stay_finite_and_right(make_case: Callable, check: Callable) -> None:
    check(make_case(**SIZES | {"dtype": torch.float16}, group_size=4, q_scale=16.0), KV_MAJOR)


def test_programs_meet_in_a_graph_and_on_streams_side_by_side(make_case: Callable) -> None:
    case = make_case(**SIZES | {"q_lens": (3000, 700)}, group_size=4)

    def run() -> torch.Tensor:
        return selected_attention_forward(
            case.problem, *case.tensors, path=KV_MAJOR, workspace_limit_bytes=FEW_BYTES
        )[0]

    expected = run()
    streams = [torch.cuda.Stream() for _ in range(2)]
    answers = []
    torch.cuda.synchronize()
    for _ in range(10):
        for stream in streams:
            with torch.cuda.stream(stream):
                answers.append(run())
    torch.cuda.synchronize()
    assert all(torch.equal(x, expected) for x in answers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)
