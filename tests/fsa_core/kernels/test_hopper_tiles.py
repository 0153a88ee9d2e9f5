"""Query tiles by the kernels that are for Hopper alone: their twins' bits, and the oracle's answers.

Without such a GPU tests/hopper_grid.py compiles the kernels, and test_hopper_interpreted.py runs some
cases.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fsa_core.kernels import compressed, forward, hopper
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.functional import compressed_attention, sliding_window_attention
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES, MIXED, QUERY_TILE, plan_forward
from fsa_core.tiles import SharedTuning, default_tuning
from tests.fsa_core.conftest import DISTRIBUTIONS, Case, sharing_rows
from tests.fsa_core.nsa.conftest import Call
from tests.fsa_core.nsa.conftest import _make_call as make_call

Answer = tuple[torch.Tensor, torch.Tensor]
TILES = SharedTuning(128, num_warps=8, max_registers=128, num_stages=2, shared_by=3)
SIZES = {"q_lens": (150, 1, 0, 70), "block_size": 64, "head_dim": 128, "dtype": torch.bfloat16}


@pytest.fixture(autouse=True)
def _on_hopper(device: torch.device) -> None:
    if not hopper.runs_on(device):
        pytest.skip("Gluon's kernels for Hopper run on nothing else")


def assert_same_bits(got: Answer, expected: Answer) -> None:
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.fixture
def check(by_twins: Callable[[], None], assert_close_to_oracle: Callable) -> Callable[..., None]:
    def run_and_check(case: Case, path: str = QUERY_TILE, tiles: SharedTuning = TILES, **limit: int) -> None:
        from fsa_core.kernels import hopper_query_tiles

        options = {"path": path, "tuning": replace(default_tuning(case.problem), shared=tiles)} | limit
        plan = plan_forward(case.problem, *limit.values(), path=path, tuning=options["tuning"])
        assert hopper_query_tiles.takes(case.problem, plan.query_tile)
        answer = forward.selected_attention_forward(case.problem, *case.tensors, **options)
        assert_close_to_oracle(*answer, case)
        by_twins()
        assert_same_bits(answer, forward.selected_attention_forward(case.problem, *case.tensors, **options))

    return run_and_check


@pytest.mark.parametrize("group_size", [2, 3, 4, 7, 8, 16, 33, 64, 128])
def test_every_group_size(make_case: Callable, check: Callable, group_size: int) -> None:
    check(make_case(**SIZES, group_size=group_size, num_kv_heads=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (128, 64), (64, 128)])
def test_every_width(
    make_case: Callable, check: Callable, head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    check(make_case(**SIZES | {"head_dim": head_dim, "value_dim": value_dim, "dtype": dtype}, group_size=4))


@pytest.mark.parametrize("block_size", [64, 128, 256])
def test_every_block_size_with_a_short_last_block(
    make_case: Callable, check: Callable, block_size: int
) -> None:
    lens = {"q_lens": (50, 9), "k_lens": (2 * block_size + 7, block_size + 70), "block_size": block_size}
    check(make_case(**SIZES | lens, group_size=4))


@pytest.mark.parametrize("path", [QUERY_TILE, MIXED])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_way_to_choose_blocks(
    make_case: Callable, check: Callable, distribution: str, causal: bool, path: str
) -> None:
    lens = {"q_lens": (150, 70), "k_lens": (900, 64)}
    check(make_case(**SIZES | lens, group_size=4, distribution=distribution, causal=causal), path)


def test_blocks_chosen_for_all_heads(make_case: Callable, check: Callable) -> None:
    check(make_case(**SIZES, group_size=3, index_heads=1))


def test_groups_that_cut_tiles(make_case: Callable, check: Callable) -> None:
    check(make_case(**SIZES, group_size=4), workspace_limit_bytes=1)


def test_queries_before_the_first_key_see_nothing(make_case: Callable, check: Callable) -> None:
    check(make_case(**SIZES | {"q_lens": (90,), "k_lens": (17,)}, group_size=4))


def test_large_logits_stay_finite_and_right(make_case: Callable, check: Callable) -> None:
    check(make_case(**SIZES | {"dtype": torch.float16}, group_size=4, q_scale=16.0))


@pytest.mark.parametrize("limit_bytes", [DEFAULT_WORKSPACE_BYTES, 1 << 17])
@pytest.mark.parametrize("path", [QUERY_TILE, MIXED])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("group_size", [1, 2])
def test_two_tiles_at_a_time(
    make_case: Callable, check: Callable, group_size: int, distribution: str, path: str, limit_bytes: int
) -> None:
    lens = {"q_lens": (1500, 0, 70, 130), "k_lens": (2000, 9, 70, 150)}
    case = make_case(**SIZES | lens, group_size=group_size, distribution=distribution, num_slots=9)
    check(case, path, replace(TILES, rows=64, num_warps=4), workspace_limit_bytes=limit_bytes)


def test_rows_that_queries_share(make_case: Callable, check: Callable) -> None:
    check(sharing_rows(make_case(**SIZES, group_size=4, num_slots=9), 64))


def test_more_tiles_than_programs(make_case: Callable, check: Callable) -> None:
    check(make_case(**SIZES | {"q_lens": (3000, 700)}, group_size=16, num_kv_heads=2))


@pytest.fixture(params=["compressed", "window"])
def check_windows(
    request: pytest.FixtureRequest, by_twins: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Call], None]:
    def run_and_check(call: Call) -> None:
        starts = {"cu_seqlens_q": call.cu_seqlens_q, "cu_seqlens_k": call.cu_seqlens_k}
        options = {"config": call.config, "softmax_scale": call.softmax_scale} | starts
        is_window = request.param == "window"
        attend = sliding_window_attention if is_window else compressed_attention
        operands, launched = (call.q, *((call.k, call.v) if is_window else (call.k_cmp, call.v_cmp))), []
        launch = compressed._launch_on_hopper
        with monkeypatch.context() as patches:
            patches.setattr(
                compressed, "_launch_on_hopper", lambda *args: launched.append(launch(*args)) or launched[-1]
            )
            answer = attend(*operands, **options)
        assert launched == [True]
        by_twins()
        assert_same_bits(answer, attend(*operands, **options))

    return run_and_check


WINDOWS = {"q_lens": (700, 0, 300), "head_dim": 128, "value_dim": 128, "dtype": torch.bfloat16}


@pytest.mark.parametrize("group_size", [1, 3, 4, 16, 100, 128])
def test_windows_by_every_group_size(device: torch.device, check_windows: Callable, group_size: int) -> None:
    check_windows(make_call(device, **WINDOWS, group_size=group_size, num_kv_heads=1, config=NSAConfig()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 64), (128, 64), (64, 128)])
def test_windows_by_every_width(
    device: torch.device, check_windows: Callable, head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    widths = {"head_dim": head_dim, "value_dim": value_dim, "dtype": dtype}
    check_windows(make_call(device, **WINDOWS | widths, group_size=4))


@pytest.mark.parametrize(
    ("q_lens", "k_lens"), [((400, 90), (2000, 95)), ((300, 200), (120, 0))], ids=["chunks", "early queries"]
)
def test_windows_of_other_sequences_than_queries(
    device: torch.device, check_windows: Callable, q_lens: tuple[int, ...], k_lens: tuple[int, ...]
) -> None:
    check_windows(make_call(device, **WINDOWS | {"q_lens": q_lens, "k_lens": k_lens}, group_size=4))


@pytest.mark.parametrize("window", [1, 63, 64, 65, 200, 5000])
@pytest.mark.parametrize("group_size", [1, 4])
def test_windows_of_every_size(
    device: torch.device, check_windows: Callable, group_size: int, window: int
) -> None:
    check_windows(make_call(device, **WINDOWS, group_size=group_size, config=NSAConfig(window=window)))


def test_more_tiles_of_windows_than_programs(device: torch.device, check_windows: Callable) -> None:
    check_windows(make_call(device, **WINDOWS | {"q_lens": (6000, 900)}, group_size=16))
