"""The kernels for Hopper alone, interpreted, against the oracle: on any machine."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fsa_core import backward_plan
from fsa_core.kernels import (
    backward,
    forward,
    hopper_partials,
    pair_query_gradients,
    partials,
    query_gradients,
    query_tiles,
    tile_order,
)
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.functional import select_blocks
from fsa_core.nsa.reference import select_blocks_reference
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES, KV_MAJOR, MIXED, QUERY_TILE
from fsa_core.reference import selected_attention_reference
from fsa_core.tiles import SharedTuning, default_tuning
from tests import gluon_interpreter
from tests.fsa_core.conftest import Case, sharing_rows
from tests.fsa_core.kernels.conftest import gradients
from tests.fsa_core.nsa.conftest import Branch
from tests.fsa_core.nsa.conftest import _make_call as make_call
from tests.gluon_interpreter import Deadlock, MissingFence, interpreted, run_kernel

TILES = SharedTuning(128, num_warps=8, max_registers=128, num_stages=2, shared_by=3)
SIZES = {
    "q_lens": (70, 1, 0, 33), "k_lens": (200, 90, 0, 64), "block_size": 64, "head_dim": 64,
    "dtype": torch.float16, "num_kv_heads": 1, "num_slots": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def launched(device: torch.device) -> Iterator[set[str]]:
    """The names of the kernels that ran."""
    if device.type == "cuda":
        pytest.skip("where they run, test_hopper_* run them")
    with interpreted() as names:
        yield names


@pytest.mark.parametrize(
    ("path", "options"),
    [
        (QUERY_TILE, {"group_size": 4}),
        (QUERY_TILE, {"group_size": 12, "causal": False, "head_dim": 128}),
        (MIXED, {"group_size": 16, "value_dim": 128, "distribution": "same"}),
        (MIXED, {"group_size": 4, "block_size": 128}),
    ],
    ids=str,
)
def test_query_tiles(
    make_case: Callable, assert_close_to_oracle: Callable, launched: set[str], path: str, options: dict
) -> None:
    case = make_case(**SIZES | options)
    tuning = replace(default_tuning(case.problem), shared=TILES)
    answer = forward.selected_attention_forward(case.problem, *case.tensors, path=path, tuning=tuning)
    assert launched == {"agree", "attend"} | ({"attend_pairs"} if path == MIXED else set())
    assert_close_to_oracle(*answer, case)


def test_in_which_order_programs_take_tiles_changes_no_bits(
    make_case: Callable, assert_close_to_oracle: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_tiles, "multiprocessors", lambda _device: 3)
    case = make_case(**SIZES | {"group_size": 8, "num_kv_heads": 2})
    tuning = replace(default_tuning(case.problem), shared=TILES)
    answers = []
    for most_ordered in (tile_order.MOST_ORDERED, 0):
        monkeypatch.setattr(tile_order, "MOST_ORDERED", most_ordered)
        answers.append(
            forward.selected_attention_forward(case.problem, *case.tensors, path=QUERY_TILE, tuning=tuning)
        )
    assert_close_to_oracle(*answers[0], case)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


@pytest.mark.parametrize("workspace_limit_bytes", [DEFAULT_WORKSPACE_BYTES, 1 << 15])
@pytest.mark.parametrize(
    ("path", "options"),
    [
        (QUERY_TILE, {"k_lens": (400, 70, 0, 100)}),
        (QUERY_TILE, {"distribution": "local", "causal": False, "group_size": 2}),
        (MIXED, {"distribution": "same", "index_heads": 1, "num_kv_heads": 2}),
        (MIXED, {"block_size": 128, "distribution": "local"}),
    ],
    ids=str,
)
def test_two_tiles_at_a_time(
    make_case: Callable,
    assert_close_to_oracle: Callable,
    assert_gradients_close_to_oracle: Callable,
    launched: set[str],
    path: str,
    options: dict,
    workspace_limit_bytes: int,
) -> None:
    lens = {"q_lens": (200, 1, 0, 70), "k_lens": (200, 1, 0, 70)}
    case = make_case(**SIZES | lens | {"group_size": 1} | options)
    limit = {"path": path, "workspace_limit_bytes": workspace_limit_bytes}
    answer = forward.selected_attention_forward(case.problem, *case.tensors, **limit)
    assert_close_to_oracle(*answer, case)
    assert launched >= {"agree", "attend"}
    grads, given = gradients(case, **limit)
    assert_gradients_close_to_oracle(grads, case, *given)
    assert "of_tiles" in launched


@pytest.mark.parametrize(
    ("path", "options"),
    [
        (KV_MAJOR, {"group_size": 4, "num_kv_heads": 2}),
        (KV_MAJOR, {"group_size": 5, "value_dim": 128, "block_size": 128, "distribution": "same"}),
        (MIXED, {"group_size": 2, "num_kv_heads": 2, "index_heads": 1, "block_size": 32}),
        (MIXED, {"group_size": 16, "num_slots": 9, "causal": False, "distribution": "ragged"}),
        # More rows than a program looks through at once, and more slots than are weighed at once.
        (MIXED, {"group_size": 7, "q_lens": (150,), "k_lens": (600,), "num_slots": 35, "block_size": 16}),
    ],
    ids=str,
)
@pytest.mark.parametrize("workspace_limit_bytes", [DEFAULT_WORKSPACE_BYTES, 1 << 17])
def test_pairs(
    make_case: Callable,
    assert_close_to_oracle: Callable,
    assert_gradients_close_to_oracle: Callable,
    launched: set[str],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    options: dict,
    workspace_limit_bytes: int,
) -> None:
    """Several programs, which wait for one another between chunks."""
    for module in (partials, pair_query_gradients):
        monkeypatch.setattr(module, "multiprocessors", lambda _device: 3)
    case = make_case(**SIZES | options)
    limit = {"workspace_limit_bytes": workspace_limit_bytes}
    answer = forward.selected_attention_forward(case.problem, *case.tensors, path=path, **limit)
    assert_close_to_oracle(*answer, case)
    assert "attend_pairs" in launched
    grads, given = gradients(case, path=MIXED, **limit)
    assert_gradients_close_to_oracle(grads, case, *given)
    assert ("of_pairs" in launched) == (case.problem.block_size <= 64)


def test_rows_that_queries_share(
    make_case: Callable, assert_close_to_oracle: Callable, launched: set[str]
) -> None:
    case: Case = sharing_rows(make_case(**SIZES | {"num_slots": 2}, group_size=4), 64)
    tuning = replace(default_tuning(case.problem), shared=TILES)
    answer = forward.selected_attention_forward(case.problem, *case.tensors, path=QUERY_TILE, tuning=tuning)
    assert launched == {"attend"}
    assert_close_to_oracle(*answer, case)


@pytest.mark.parametrize(
    ("path", "options", "kernels"),
    [
        (MIXED, {"group_size": 2}, ("gradients",)),
        (MIXED, {"group_size": 4, "head_dim": 128}, ("gradients", "of_tiles")),
        (QUERY_TILE, {"group_size": 12, "causal": False}, ("gradients", "of_tiles")),
        (MIXED, {"group_size": 4, "block_size": 128, "value_dim": 128}, ("gradients", "of_tiles")),
    ],
    ids=str,
)
def test_gradients(
    make_case: Callable,
    assert_gradients_close_to_oracle: Callable,
    launched: set[str],
    path: str,
    options: dict,
    kernels: tuple[str, ...],
) -> None:
    case = make_case(**SIZES | options)
    grads, given = gradients(case, path=path)
    assert_gradients_close_to_oracle(grads, case, *given)
    assert launched.issuperset(kernels)


@pytest.fixture
def parts_apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The gradient of q comes before those of keys, and makes delta for them, however small a call is."""
    plan = backward_plan.plan_backward
    monkeypatch.setattr(backward, "plan_backward", lambda *sizes: replace(plan(*sizes), at_once=False))
    backward.planned.cache_clear()
    yield
    backward.planned.cache_clear()


@pytest.mark.usefixtures("parts_apart")
@pytest.mark.parametrize("with_grad_lse", [True, False])
@pytest.mark.parametrize(
    ("path", "options", "limit"),
    [
        (MIXED, {"group_size": 4, "value_dim": 128}, {}),
        # Rows of a tile that nobody has, and rows and tiles that see no key.
        (
            QUERY_TILE,
            {"group_size": 12, "head_dim": 128, "value_dim": 64, "q_lens": (90, 9), "k_lens": (70, 0)},
            {},
        ),
        (QUERY_TILE, {"group_size": 8, "num_kv_heads": 2, "index_heads": 1}, {}),
        # Tiles at the border of two groups of tokens; one head of delta after the other.
        (MIXED, {"group_size": 4, "num_kv_heads": 2}, {"workspace_limit_bytes": 1 << 14}),
    ],
    ids=str,
)
def test_tiles_make_delta(
    make_case: Callable,
    assert_gradients_close_to_oracle: Callable,
    launched: set[str],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    options: dict,
    limit: dict[str, int],
    with_grad_lse: bool,
) -> None:
    case = make_case(**SIZES | options)
    monkeypatch.setattr(query_gradients, "write_delta", None)
    answer = forward.selected_attention_forward(case.problem, *case.tensors)
    grad_out, grad_lse = case.output_gradients()
    given = (*answer, grad_out, grad_lse if with_grad_lse else None)
    grads = backward.selected_attention_backward(case.problem, *case.tensors, *given, path=path, **limit)
    assert "of_tiles" in launched
    assert_gradients_close_to_oracle(grads, case, grad_out, grad_lse * with_grad_lse)


@pytest.mark.usefixtures("parts_apart")
def test_tiles_of_rows_that_queries_share_make_delta(
    make_case: Callable, assert_gradients_close_to_oracle: Callable, launched: set[str]
) -> None:
    case = sharing_rows(make_case(**SIZES | {"num_slots": 2}, group_size=4), 64)
    grads, given = gradients(case, path=QUERY_TILE)
    assert_gradients_close_to_oracle(grads, case, *given)
    assert "of_tiles" in launched


def test_a_popular_block_is_many_items(
    make_case: Callable, assert_gradients_close_to_oracle: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backward_plan, "ITEM_PAIRS", 40)
    backward.planned.cache_clear()
    case = make_case(**SIZES, group_size=4, distribution="same")
    grads, given = gradients(case, path=QUERY_TILE)
    assert_gradients_close_to_oracle(grads, case, *given)
    backward.planned.cache_clear()


@pytest.mark.parametrize(
    ("branch", "group_size", "window"),
    [("compressed", 4, 70), ("window", 3, 70), ("window", 2, 1), ("window", 4, 129), ("window", 3, 1000)],
)
def test_windows(device: torch.device, launched: set[str], branch: str, group_size: int, window: int) -> None:
    sizes = {"q_lens": (200, 0, 70), "head_dim": 64, "value_dim": 64, "dtype": torch.float16}
    config = NSAConfig(window=window)
    call = make_call(device, **sizes, num_kv_heads=1, group_size=group_size, config=config)
    Branch(branch, call, backend="triton").check()
    assert launched == {"attend_windows", "of_windows", "of_queries"}


@pytest.mark.parametrize(
    ("group_size", "sizes", "options"),
    [
        (4, {"q_lens": (140,), "k_lens": (1200,)}, {"top_k": 16}),
        (2, {"q_lens": (270, 3), "k_lens": (270, 1100)}, {"top_k": 5, "num_first_blocks": 0}),
        (
            3,
            {"q_lens": (150, 0, 300), "k_lens": (40, 70, 300), "head_dim": 128},
            {"top_k": 12, "kernel_size": 4},
        ),
    ],
    ids=str,
)
def test_selection(launched: set[str], group_size: int, sizes: dict, options: dict) -> None:
    config = NSAConfig(**{"kernel_size": 8, "stride": 4, "block_size": 16} | options)
    sizes = {"head_dim": 64, "num_kv_heads": 2, "dtype": torch.float16} | sizes
    call = make_call(torch.device("cpu"), group_size=group_size, config=config, **sizes)
    starts = {"cu_seqlens_q": call.cu_seqlens_q, "cu_seqlens_k": call.cu_seqlens_k}
    scale = {"config": config, "softmax_scale": call.softmax_scale}
    found = select_blocks(call.q, call.k_cmp, **starts, **scale, backend="triton")
    assert "select" in launched
    wanted = select_blocks_reference(call.q, call.k_cmp, *starts.values(), *scale.values())
    assert torch.equal(found, wanted)


def test_a_fence_that_is_left_out_is_seen(make_case: Callable, replace_by: Callable) -> None:
    replace_by("fence_async_shared", lambda: None)
    with pytest.raises(MissingFence, match=r"an operand \[64, 64\] is read"):
        gradients(make_case(**SIZES, group_size=4), path=QUERY_TILE)


def test_a_wait_that_is_left_out_is_seen(
    device: torch.device, replace_by: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies and products are as late as they may be, so that no luck hides it."""
    sizes = {"q_lens": (200, 70), "head_dim": 64, "value_dim": 64, "dtype": torch.float16, "num_kv_heads": 1}
    call = make_call(device, **sizes, group_size=4, config=NSAConfig(window=70))
    branch = Branch("window", call, backend="triton")
    leaves = [x.detach().requires_grad_() for x in branch.operands]

    def answer() -> tuple[torch.Tensor, ...]:
        out = branch.run(*leaves)[0]
        return out.detach(), *torch.autograd.grad(out.sum(), leaves)

    right = answer()
    monkeypatch.setattr(gluon_interpreter._Barrier, "wait", lambda _barrier, _parity: None)
    # What is written behind the fence would be seen by that alone.
    replace_by("fence_async_shared", lambda: setattr(gluon_interpreter._partition, "fenced", 1 << 60))
    assert not any(torch.allclose(x, y, rtol=0.1) for x, y in zip(right, answer(), strict=True))


@pytest.fixture
def one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Programs that should run at once do not."""
    constants = hopper_partials.constants
    monkeypatch.setattr(partials, "multiprocessors", lambda _device: 3)
    monkeypatch.setattr(
        hopper_partials, "constants", lambda *sizes: constants(*sizes) | {"launch_cooperative_grid": False}
    )
    partials._attending_on_hopper.cache_clear()
    yield
    partials._attending_on_hopper.cache_clear()


@pytest.mark.usefixtures("one_after_the_other")
def test_programs_that_do_not_meet_are_seen(make_case: Callable, replace_by: Callable) -> None:
    case = make_case(**SIZES, group_size=4)
    replace_by("meet", lambda *_: None)
    wrong, _ = forward.selected_attention_forward(case.problem, *case.tensors)
    right, _ = selected_attention_reference(case.problem, *case.tensors)
    assert not torch.allclose(right.half(), wrong, rtol=0.1)


@pytest.mark.usefixtures("one_after_the_other")
def test_programs_that_meet_run_at_once(make_case: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gluon_interpreter, "TIMEOUT_S", 0.1)
    case = make_case(**SIZES, group_size=4)
    with pytest.raises(Deadlock, match=r"for other programs|phase 0 lacks"):
        forward.selected_attention_forward(case.problem, *case.tensors)


@gluon.jit
def _reads_past_the_end(x_ptr):
    gl.load(x_ptr + 8)


@gluon.jit
def _waits_for_nobody(x_ptr):
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    mbarrier.wait(barrier, 0)


@gluon.jit
def _reads_what_has_not_arrived(x_ptr):
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    numbers = gl.arange(0, 8, flat)
    shared = gl.allocate_shared_memory(gl.float32, [8], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    async_copy.async_copy_global_to_shared(shared, x_ptr + numbers, numbers < 8)
    gl.store(x_ptr + numbers, shared.load(flat) + 1)


@gluon.jit
def _changes_what_it_was_given(x_ptr, number):
    given = number
    number += gl.program_id(0)
    gl.store(x_ptr + gl.program_id(0), number * 10 + given)


def test_a_number_that_a_program_changes_is_its_own() -> None:
    x = torch.zeros(3, dtype=torch.int32)
    run_kernel(_changes_what_it_was_given, (3,), (x, 4), {})
    assert x.tolist() == [44, 54, 64]


def test_the_interpreter_tells_what_a_gpu_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(8)
    with pytest.raises(IndexError, match=r"offsets .*8.* of 8 numbers"):
        run_kernel(_reads_past_the_end, (1,), (x,), {})
    monkeypatch.setattr(gluon_interpreter, "TIMEOUT_S", 0.1)
    with pytest.raises(Deadlock, match="phase 0 lacks 1 of 1"):
        run_kernel(_waits_for_nobody, (1,), (x,), {})
    run_kernel(_reads_what_has_not_arrived, (1,), (x,), {})
    assert x.isnan().all()
