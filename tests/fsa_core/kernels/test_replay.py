"""Calls launched again, against the calls they stand for. What compiles is run by test_launch.py."""

from collections.abc import Callable
from functools import partial
from threading import Thread
from typing import Any

import pytest
import torch
from triton import knobs

from fsa_core.api import selected_attention
from fsa_core.decode import paged_selected_attention
from fsa_core.kernels import backward, decode, forward, interval_gradients, replay
from fsa_core.kernels.backward import selected_attention_backward
from fsa_core.kernels.forward import selected_attention_forward
from fsa_core.kernels.interval_gradients import interval_attention_backward
from fsa_core.kernels.launch import Kernel, aside, noted_launches, rejoin
from fsa_core.kernels.replay import Memory, Replayed
from fsa_core.nsa import operator
from fsa_core.nsa.compression import MeanCompression
from fsa_core.nsa.config import NSAConfig
from fsa_core.nsa.functional import nsa_attention
from fsa_core.nsa.stages import kernel_sizes, window_sizes
from fsa_core.nsa.validation import Call
from fsa_core.plan import DEFAULT_WORKSPACE_BYTES, PATHS
from tests.fsa_core.conftest import _make_case as make_case_on
from tests.fsa_core.kernels.test_launch import Driver, compiles, launches, nothing, ours, written
from tests.fsa_core.nsa.conftest import _make_call as make_call

__all__ = ["nothing", "ours", "written"]  # fixtures, and what they launch
GRID = (3, 2)
# In these launches; what is larger is an address.
LARGEST_NUMBER = 1 << 20


class Work:
    """Three launches on two tensors, an answer and two buffers, one cleared; counts how often it is asked."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.calls = 0

    def __call__(self, memory: Memory, tensors: tuple[torch.Tensor, ...], size: int) -> None:
        self.calls += 1
        first, second = tensors
        out = memory.answer(size, 4)
        counts = memory.new_zeros(size, dtype=torch.int32)
        parts = memory.new_empty(3, size, dtype=torch.float32)
        self.kernel[GRID](first, out, 0.5, size, 1, WIDTH=2)
        self.kernel[GRID](second, counts, 0.5, size, 2, WIDTH=2)
        self.kernel[GRID](counts, parts, 0.25, size, 3, WIDTH=2)


def operands() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(64, dtype=torch.float16), torch.zeros(64, dtype=torch.int32)


def pattern(launches: list[tuple[Any, ...]], given: list[int]) -> list[tuple[Any, ...]]:
    """Launches with what they point to in place of addresses: a given tensor or one that was made."""
    made: list[int] = []
    named = []
    for *what, values in launches:
        names: list[Any] = []
        for x in values:
            if x in given:
                names.append(f"given {given.index(x)}")
            elif x > LARGEST_NUMBER:
                made += [] if x in made else [x]
                names.append(f"made {made.index(x)}")
            else:
                names.append(x)
        named.append((*what, *names))
    return named


@compiles
def test_a_call_of_known_sizes_launches_the_same_on_its_own_tensors(ours: Kernel, written: Driver) -> None:
    work = Work(ours)
    replayed = Replayed(work)
    patterns, answers = [], []
    for _ in range(5):
        written.launches.clear()
        tensors = operands()
        answers.append(replayed(tensors, 40))
        patterns.append(pattern(written.launches, [x.data_ptr() for x in tensors]))
    # The first call compiles, the second is noted.
    assert work.calls == 2
    assert all(p == patterns[0] for p in patterns)
    # Three, and one that clears.
    assert len(patterns[0]) == 4
    for (out,) in answers:
        assert (out.shape, out.dtype) == ((40, 4), torch.float16)
    assert len({out.data_ptr() for (out,) in answers}) == len(answers)


class Stream:
    """Tells what is launched on it, and which stream it waits for."""

    numbers = iter(range(100))

    def __init__(self, events: list[tuple[Any, ...]]) -> None:
        self.cuda_stream = next(self.numbers)
        self.events = events

    def wait_stream(self, other: "Stream") -> None:
        self.events.append((self.cuda_stream, "waits", other.cuda_stream))


@compiles
def test_what_is_aside_is_a_branch_of_a_graph_until_it_is_needed(
    ours: Kernel, written: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(memory: Memory, tensors: tuple[torch.Tensor, ...], size: int) -> None:
        out = memory.answer(size, 4)

        def launch(number: int) -> None:
            ours[GRID](tensors[0], out, 0.5, size, number, WIDTH=2)

        launch(0)
        with aside():
            launch(1)
            with aside():
                launch(2)
            rejoin()
            launch(3)
        launch(4)
        with aside():
            launch(5)
        rejoin()
        with aside():
            launch(6)
        launch(7)

    replayed = Replayed(work)
    first, second = operands()
    for _ in range(2):
        replayed((first, second), 40)
    ((program,),) = replayed._programs.values()
    written.launches.clear()
    streams = [Stream(written.launches)]

    def new_stream(_device: torch.device) -> Stream:
        streams.append(Stream(written.launches))
        return streams[-1]

    monkeypatch.setattr(torch.cuda, "Stream", new_stream)
    program.record([0, *[x.data_ptr() for x in (first, second, torch.zeros(40, 4))]], streams[0])
    number = {x.cuda_stream: n for n, x in enumerate(streams)}
    happened = [
        (number[x[0]], x[1], number[x[2]]) if len(x) == 3 else (number[x[4]], "launches", x[-1][4])
        for x in written.launches
    ]
    assert happened == [
        (0, "launches", 0), (1, "waits", 0), (1, "launches", 1), (1, "launches", 2), (1, "launches", 3),
        (0, "launches", 4), (1, "waits", 0), (1, "launches", 5), (0, "waits", 1), (1, "waits", 0),
        (1, "launches", 6), (0, "launches", 7), (0, "waits", 1),
    ]  # fmt: skip


@compiles
def test_a_call_within_another_is_a_part_of_it(ours: Kernel, written: Driver) -> None:
    work = Work(ours)
    part = Replayed(work)

    def twice(memory: Memory, tensors: tuple[torch.Tensor, ...], size: int) -> None:
        (first,) = part(tensors, size)
        (second,) = part((first, tensors[1]), size)
        memory.give(second)

    whole, patterns, answers = Replayed(twice), [], []
    for _ in range(5):
        written.launches.clear()
        tensors = operands()
        answers.append(whole(tensors, 40))
        patterns.append(pattern(written.launches, [x.data_ptr() for x in tensors]))
    # Twice when it compiles and twice when it is noted.
    assert work.calls == 4
    assert all(p == patterns[0] for p in patterns)
    assert len(patterns[0]) == 8
    assert len({out.data_ptr() for (out,) in answers}) == len(answers)
    # The second part reads what the first wrote; what it writes is the answer.
    (_, first_out), second = (written.launches[place][-1][:2] for place in (1, 5))
    assert second == [first_out, answers[-1][0].data_ptr()]
    # By itself it is a call as before.
    for _ in range(3):
        part(operands(), 40)
    assert work.calls == 5


def test_what_a_call_gives_is_one_of_its_buffers() -> None:
    memory = Memory(torch.zeros(4))
    kept, given = memory.new_empty(3), memory.new_empty(3)
    memory.give(given)
    assert [x.data_ptr() for x in memory.answers] == [given.data_ptr()]
    assert [x.data_ptr() for x in memory.buffers] == [kept.data_ptr()]
    with pytest.raises(ValueError, match="not in list"):
        memory.give(torch.zeros(3))


@compiles
def test_sizes_that_are_new_are_calls_of_their_own(ours: Kernel, written: Driver) -> None:
    work = Work(ours)
    replayed = Replayed(work)
    known = [(operands(), 40), (operands(), 41)]
    for tensors, size in known * 3:
        (out,) = replayed(tensors, size)
        assert out.shape == (size, 4)
    calls = work.calls
    for tensors, size in known:
        replayed(tensors, size)
    assert work.calls == calls


@compiles
@pytest.mark.parametrize("is_one_first", [False, True])
def test_what_is_known_of_one_tensor_in_two_places_is_not_launched_on_two(
    ours: Kernel, written: Driver, is_one_first: bool
) -> None:
    """Where two come first, one that is both has all that was noted of them."""
    work = Work(ours)
    replayed = Replayed(work)
    one, other = torch.zeros(64, dtype=torch.float16), torch.zeros(64, dtype=torch.float16)
    calls = [(one, one), (one, other)] if is_one_first else [(one, other), (one, one)]
    # The first compiles.
    replayed(calls[0], 40)
    for first, second in calls * 3:
        written.launches.clear()
        replayed((first, second), 40)
        launched = [launched[-1][0] for launched in written.launches[1:3]]
        assert launched == [first.data_ptr(), second.data_ptr()]
    assert work.calls == 2 + is_one_first


@compiles
def test_buffers_lie_apart_and_those_that_are_to_be_are_cleared(
    ours: Kernel, written: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    replayed, tensors = Replayed(Work(ours)), operands()
    made: list[torch.Tensor] = []

    def kept(make: Callable[..., torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
        made.append(make(*args, **options))
        return made[-1]

    for name in ("empty", "empty_strided"):
        monkeypatch.setattr(replay.torch, name, partial(kept, getattr(torch, name)))
    for _ in range(3):
        made.clear()
        replayed(tensors, 40)
    out, buffers = made
    assert out.shape == (40, 4)
    assert buffers.numel() == 1024
    cleared, of_out, of_cleared, of_uncleared = (launched[-1] for launched in written.launches[-4:])
    assert cleared[:2] == [buffers.data_ptr(), 40]
    assert [x[1] for x in (of_out, of_cleared)] == [out.data_ptr(), buffers.data_ptr()]
    assert of_uncleared[:2] == [buffers.data_ptr(), buffers.data_ptr() + 512]


@compiles
def test_misaligned_and_watched_calls_are_not_replayed(ours: Kernel, written: Driver) -> None:
    work = Work(ours)
    replayed = Replayed(work)
    tensors = operands()
    for _ in range(3):
        replayed(tensors, 40)
    calls = work.calls
    replayed((tensors[0][1:], tensors[1]), 40)
    assert work.calls == calls + 1
    seen: list[Any] = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        replayed(tensors, 40)
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)
    assert len(seen) == 4
    assert work.calls == calls + 2
    replayed(tensors, 40)
    assert work.calls == calls + 2


def test_a_call_that_launches_nothing_asks_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of no tokens: without a GPU there is none to ask."""
    monkeypatch.setattr(replay, "driver", None)

    def work(memory: Memory, tensors: tuple[torch.Tensor, ...]) -> None:
        memory.answer(0, 4)

    replayed = Replayed(work)
    for _ in range(2):
        (out,) = replayed(operands())
        assert out.shape == (0, 4)


@pytest.mark.skipif(not knobs.runtime.interpret, reason="of CPU tensors")
def test_a_decode_step_of_no_tokens_launches_nothing(make_paged: Callable) -> None:
    paged = make_paged(q_lens=(0, 0), k_lens=(20, 0))
    out, lse = paged_selected_attention(**paged.tensors, block_size=16, backend="triton")
    assert (out.shape, lse.shape) == ((0, 4, 64), (0, 4))


@compiles
def test_foreign_memory_is_never_replayed(ours: Kernel, written: Driver) -> None:
    foreign = torch.zeros(64, dtype=torch.int32)
    calls = []

    def work(memory: Memory, tensors: tuple[torch.Tensor, ...]) -> None:
        calls.append(None)
        ours[GRID](tensors[0], foreign, 0.5, 1, 1, WIDTH=2)

    replayed = Replayed(work)
    for _ in range(4):
        replayed(operands())
    assert len(calls) == 4


@compiles
def test_programs_are_forgotten_before_they_are_too_many(
    ours: Kernel, written: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "MOST_LAUNCHES", 4)
    work = Work(ours)
    replayed = Replayed(work)
    for size in (1, 1, 2, 3):
        replayed(operands(), size)
    calls = work.calls
    replayed(operands(), 3)
    assert work.calls == calls
    replayed(operands(), 1)
    assert work.calls == calls + 1


@compiles
def test_notes_are_of_one_thread(ours: Kernel, written: Driver) -> None:
    ours[GRID](*operands(), 0.5, 1, 1, WIDTH=2)
    with noted_launches() as notes:
        other = Thread(target=lambda: ours[GRID](*operands(), 0.5, 2, 2, WIDTH=2))
        other.start()
        other.join()
        ours[GRID](*operands(), 0.5, 3, 3, WIDTH=2)
    assert [launched.scalars for launched in notes.noted] == [(0.5, 3, 3)]
    assert notes.are_complete


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An entry for each part of a call of attention that is not replayed."""
    calls: list[None] = []
    parts = (
        (forward, "_replayed", forward._forward),
        (decode, "_replayed", decode._forward),
        (backward, "_replayed", backward._gradients),
        (backward, "_replayed_keys", backward._key_gradients),
        (backward, "_replayed_queries", backward._query_gradients),
        (interval_gradients, "_replayed", interval_gradients._backward),
    )
    for module, name, part in parts:

        def counted(*args: Any, work: Callable = part) -> None:
            calls.append(None)
            work(*args)

        monkeypatch.setattr(module, name, Replayed(counted))
    return calls


@compiles
@pytest.mark.parametrize(
    ("path", "limit_bytes"),
    [("kv_major", DEFAULT_WORKSPACE_BYTES), ("mixed", DEFAULT_WORKSPACE_BYTES), ("mixed", 1)],
)
def test_gradients_are_replayed_launch_by_launch(
    written: Driver, asked: list[None], path: str, limit_bytes: int
) -> None:
    """All at once and, in the least memory, chunk by chunk: nothing but launches may lie between them."""
    # Of no device: the driver that stands in is on none that there is.
    case = make_case_on(torch.device("cpu"), q_lens=(40, 5), head_dim=16, dtype=torch.float16)
    given = (case.q, torch.zeros(45, 4), case.q, torch.zeros(45, 4))
    options = {"path": path, "workspace_limit_bytes": limit_bytes}
    runs, counts = [], []
    for _ in range(4):
        written.launches.clear()
        selected_attention_backward(case.problem, *case.tensors, *given, **options)
        runs.append([launched[:-1] for launched in written.launches])
        counts.append(len(asked))
    assert runs[0]
    assert runs[0] == runs[1] == runs[2] == runs[3]
    assert counts[1] == counts[3]


@compiles
@pytest.mark.parametrize("limit_bytes", [DEFAULT_WORKSPACE_BYTES, 1])
@pytest.mark.parametrize("is_window", [False, True])
def test_gradients_over_windows_are_replayed_launch_by_launch(
    written: Driver, asked: list[None], is_window: bool, limit_bytes: int
) -> None:
    """Of all KV heads at once and, in the least memory, one after the other in the same place."""
    call = make_call(torch.device("cpu"), q_lens=(90, 33), group_size=3, dtype=torch.float16)
    starts = (call.cu_seqlens_q, call.cu_seqlens_k, tuple(call.cu_seqlens_k.tolist()))
    checked = Call(call.config, *starts, call.softmax_scale, limit_bytes)
    operands = (call.q, call.k, call.v) if is_window else (call.q, call.k_cmp, call.v_cmp)
    sizes = (window_sizes if is_window else kernel_sizes)(checked, *operands)
    out, lse = torch.zeros(*call.q.shape[:2], 24, dtype=torch.float16), torch.zeros(call.q.shape[:2])
    runs, counts = [], []
    for grad_lse in (None, None, None, None, lse, lse, lse):
        written.launches.clear()
        given = (out, lse, out, grad_lse)
        interval_attention_backward(*sizes, *operands, *given, workspace_limit_bytes=limit_bytes)
        runs.append([launched[:-1] for launched in written.launches])
        counts.append(len(asked))
    assert runs[0] == runs[1] == runs[2] == runs[3]
    assert runs[4] == runs[5] == runs[6]
    # What compiles is noted when it comes again.
    assert counts == [1, 2, 2, 2, 3, 4, 4]
    # delta, q, keys; and, of compressed ones, the sums of both gradients' splits.
    num_walks = 1 if is_window or limit_bytes > 1 else 2
    assert len(runs[0]) == 2 + num_walks * (1 if is_window else 3)


@launches
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("index_heads", [1, 2, 4])
def test_selected_attention_replayed_on_other_tensors(
    make_case: Callable, assert_close_to_oracle: Callable, asked: list[None], path: str, index_heads: int
) -> None:
    sizes = {"q_lens": (300, 77), "index_heads": index_heads, "dtype": torch.bfloat16}
    for seed in range(4):
        case = make_case(seed=seed, **sizes)
        options = {"path": path, "validate": False, **case.options}
        answer = selected_attention(*case.tensors[:4], **options)
        assert_close_to_oracle(*answer, case)
        again = selected_attention(*case.tensors[:4], **options)
        assert all(torch.equal(a, b) for a, b in zip(answer, again, strict=True))
    assert len(asked) <= 2


@launches
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("index_heads", [1, 2, 4])
@pytest.mark.parametrize("limit_bytes", [DEFAULT_WORKSPACE_BYTES, 2**20, 1])
def test_gradients_replayed_on_other_tensors(
    make_case: Callable,
    assert_gradients_close_to_oracle: Callable,
    asked: list[None],
    path: str,
    index_heads: int,
    limit_bytes: int,
) -> None:
    """In one part or two, all at once or, in little memory, a few heads, keys and tokens at a time."""
    sizes = {"q_lens": (300, 77), "index_heads": index_heads, "dtype": torch.bfloat16}
    options = {"path": path, "workspace_limit_bytes": limit_bytes}
    counts = []
    for seed in range(4):
        case = make_case(seed=seed, **sizes)
        given = (*selected_attention_forward(case.problem, *case.tensors), *case.output_gradients())
        grads = selected_attention_backward(case.problem, *case.tensors, *given, **options)
        assert_gradients_close_to_oracle(grads, case, *given[2:])
        again = selected_attention_backward(case.problem, *case.tensors, *given, **options)
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
        counts.append(len(asked))
    # What compiles is noted when it comes again.
    assert counts[1] == counts[-1]


@launches
def test_one_tensor_for_keys_and_values_and_then_two(make_case: Callable, asked: list[None]) -> None:
    case = make_case(q_lens=(300,), dtype=torch.bfloat16)
    q, k, v, ids = case.tensors[:4]

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return selected_attention(q, k, v, ids, validate=False, **case.options)[0]

    for _ in range(3):
        one, two = attend(k, k), attend(k, v)
    calls = len(asked)
    assert torch.equal(attend(k, k.clone()), one)
    assert torch.equal(attend(k, v.clone()), two)
    assert not torch.equal(one, two)
    assert len(asked) == calls <= 4


@launches
def test_a_decode_step_replayed_as_the_cache_fills(
    make_paged: Callable, assert_close_to_oracle: Callable, asked: list[None]
) -> None:
    for step in range(4):
        paged = make_paged(k_lens=(300 + step, 70), num_slots=8, seed=step, dtype=torch.bfloat16)
        scale = paged.case.problem.softmax_scale
        options = {"block_size": paged.case.problem.block_size, "softmax_scale": scale, "validate": False}
        assert_close_to_oracle(*paged_selected_attention(**paged.tensors, **options), paged.case)
    assert len(asked) <= 2


@launches
def test_the_operator_replayed_on_other_tensors(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other sequences, too, if there are as many tokens and windows of all; bits are those of training."""
    noted: list[None] = []

    def counted(*args: Any) -> None:
        noted.append(None)
        note(*args)

    note, replayed = operator._note, Replayed(counted)
    monkeypatch.setattr(operator, "_replayed", lambda: replayed)
    config, means = NSAConfig(window=100), MeanCompression(32, 16)
    sizes = {"dtype": torch.bfloat16, "group_size": 4, "config": config}
    for seed, q_lens in enumerate(((300, 77), (77, 300), (300, 77), (333, 44))):
        call = make_call(device, q_lens=q_lens, seed=seed, **sizes)
        starts = {"cu_seqlens_q": call.cu_seqlens_q, "cu_seqlens_k": call.cu_seqlens_k}
        gates = torch.rand(*call.q.shape[:2], 3, device=device, dtype=torch.bfloat16)
        operands = (call.k, call.v, gates, means, means)
        answers = [nsa_attention(q, *operands, config=config, **starts) for q in (call.q, call.q)]
        trained = nsa_attention(call.q.requires_grad_(), *operands, config=config, **starts)
        assert all(torch.equal(x, trained) for x in answers)
    # Once as it compiles, once again, and once with what is kept for gradients.
    assert len(noted) <= 3
