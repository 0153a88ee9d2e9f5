"""Calls that are launched again as they were, at other addresses.

Once kernels are remembered (launch.py), what a call costs the host is all that leads to its launches: plans,
grids, arguments, a buffer at a time (3 microseconds each). None of it depends on anything but sizes and
options. So a function that is ``Replayed`` notes its launches, and a call of sizes that it knows takes its
memory at once, fills in the addresses and launches. On an H200's host that is a third of the time. Addresses
that come back are launched as one graph (call_graphs.py). A function that is called by another while that is
noted is a part of it: its launches are noted there, in the memory of the other.

Noted are only launches that launch.py remembers, of addresses that are those of the call's own tensors. So
nothing is replayed in Triton's interpreter, while somebody debugs or watches launches, and from misaligned
addresses.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

import torch
import triton.language as tl
from triton.runtime import driver

from fsa_core.kernels.call_graphs import FEWEST_LAUNCHES, call_graphs
from fsa_core.kernels.launch import Launched, are_aligned, is_watched, kernel, noted_launches, rejoin

Tensors = tuple[torch.Tensor, ...]
CLEARED_IN_TILE = 4096
# Of all programs together; beyond that all are forgotten. One is a kilobyte, a program 10 of them or, of a
# million tokens, a thousand.
MOST_LAUNCHES = 1 << 16
# Of buffers, as torch's allocator has it.
BUFFER_ALIGNMENT = 512


@kernel
def _clear(x_ptr, size, TILE: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    tl.store(x_ptr + places, tl.zeros((TILE,), x_ptr.dtype.element_ty), mask=places < size)


def clear(x: torch.Tensor) -> None:
    """Zeros in all of ``x``, which is contiguous; a launch as any, so that it can be launched again."""
    _clear[(-(-x.numel() // CLEARED_IN_TILE),)](x, x.numel(), TILE=CLEARED_IN_TILE)


@dataclass(slots=True)
class Memory:
    """Where a call takes its tensors, on the device of ``like`` and by default of its dtype.

    What it returns is an ``answer``; the others, made as a tensor makes them, are its own.
    """

    like: torch.Tensor
    answers: list[torch.Tensor] = field(default_factory=list)
    buffers: list[torch.Tensor] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.like.device

    def answer(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        self.answers.append(self.like.new_empty(shape, dtype=dtype))
        return self.answers[-1]

    def new_zeros(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        buffer = self.new_empty(*shape, dtype=dtype)
        clear(buffer)
        return buffer

    def new_empty(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        self.buffers.append(self.like.new_empty(shape, dtype=dtype))
        return self.buffers[-1]

    def give(self, buffer: torch.Tensor) -> None:
        """Makes one of the buffers the next answer. Raises ValueError if it is none: nobody launched it."""
        addresses = [x.data_ptr() for x in self.buffers]
        self.answers.append(self.buffers.pop(addresses.index(buffer.data_ptr())))


class _ThisThread(threading.local):
    # Of the function that is being noted.
    memory: Memory | None = None


_this_thread = _ThisThread()


@contextmanager
def _whole(memory: Memory) -> Iterator[None]:
    """What is called inside is a part of the call whose ``memory`` that is."""
    _this_thread.memory = memory
    try:
        yield
    finally:
        _this_thread.memory = None


class Replayed:
    """``function(memory, tensors, *options)``, called as ``replayed(tensors, *options)``.

    Its answers are those of ``memory.answer``, in their order. It launches kernels on ``tensors`` and what it
    takes from ``memory``, and does nothing else on the device. ``options`` say all that this depends on: the
    sizes, dtypes and strides of the tensors too, unless they follow from the rest.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function
        # Of most options there is one: see ``_Program.twins``.
        self._programs: dict[tuple[Hashable, ...], tuple[_Program, ...]] = {}
        self._num_launches = 0

    def __call__(self, tensors: Tensors, *options: Hashable) -> Tensors:
        if _this_thread.memory is not None:
            return self._as_part(_this_thread.memory, tensors, options)
        if not self._programs:
            return self._noted(tensors, options)
        addresses = [0, *[x.data_ptr() for x in tensors]]
        for program in self._programs.get((tensors[0].device, *options), ()):
            if program.fits(addresses):
                return program.run(addresses)
        return self._noted(tensors, options)

    def _as_part(self, whole: Memory, tensors: Tensors, options: tuple[Hashable, ...]) -> Tensors:
        """Calls the function, whose answers are buffers of the whole call."""
        part = Memory(tensors[0])
        self._function(part, tensors, *options)
        # Of what is launched next nothing was said here.
        rejoin()
        whole.buffers += part.buffers + part.answers
        return tuple(part.answers)

    def _noted(self, tensors: Tensors, options: tuple[Hashable, ...]) -> Tensors:
        """Calls the function, and keeps the program if there is one."""
        memory = Memory(tensors[0])
        with noted_launches() as launches, _whole(memory):
            self._function(memory, tensors, *options)
        # Where nothing is launched there may be no driver to ask for its device.
        if launches.noted and launches.are_complete:
            program = _program(launches.noted, tensors, memory)
            if program is not None:
                if self._num_launches > MOST_LAUNCHES:
                    self._programs.clear()
                    self._num_launches = 0
                self._num_launches += len(program.steps)
                key = (tensors[0].device, *options)
                self._programs[key] = (*self._programs.get(key, ()), program)
        return tuple(memory.answers)


@dataclass(frozen=True, slots=True)
class _Step:
    """A launch: what comes before the stream, between it and the pointers, and after them.

    ``pick`` takes the pointers from the program's addresses. ``is_aside`` and ``rejoins`` as in ``Launched``.
    """

    run: Callable[..., None]
    grid: tuple[int, int, int]
    compiled: tuple[Any, ...]
    pick: Callable[[Sequence[int]], tuple[int, ...]]
    rest: tuple[Any, ...]
    is_aside: bool
    rejoins: bool


# Programs are told apart by what they are, not by what is in them.
@dataclass(frozen=True, slots=True, eq=False)
class _Program:
    """Launches on addresses: none, the tensors, the answers, the buffers, and what is inside of these.

    ``twins``: which tensors were at one address, as pairs of an earlier and a later one; what the launches
    know of the earlier alone has to be at one address again. ``begins``: where in one piece of memory the
    buffers begin, and how large it is. ``inside``: what else is pointed to, as a tensor's number and how far
    behind its address. ``is_graph``: they are launched as one if the addresses come back.
    """

    steps: tuple[_Step, ...]
    device: torch.device
    twins: tuple[tuple[int, int], ...]
    answers: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    begins: tuple[int, ...]
    inside: tuple[tuple[int, int], ...]
    num_bytes: int
    is_graph: bool
    # The hooks of each kernel, empty lists but when somebody watches.
    hooks: tuple[list[Any], ...]

    def fits(self, addresses: list[int]) -> bool:
        for earlier, later in self.twins:
            if addresses[earlier] != addresses[later]:
                return False
        return are_aligned(addresses) and not is_watched(self.hooks)

    def run(self, addresses: list[int]) -> Tensors:
        device = self.device
        # With strides, since that is read in half the time.
        answers = tuple(
            [
                torch.empty_strided(shape, strides, dtype=dtype, device=device)
                for shape, strides, dtype in self.answers
            ]
        )
        addresses += [x.data_ptr() for x in answers]
        buffers, base = None, 0
        if self.num_bytes:
            # Named until all is launched: what is freed may be given to the next who asks.
            buffers = torch.empty(self.num_bytes, dtype=torch.uint8, device=device)
            base = buffers.data_ptr()
        key = (self, *addresses, base) if self.is_graph else None
        if key is None or not call_graphs.launch(key):
            addresses += [base + begin for begin in self.begins]
            addresses += [addresses[number] + distance for number, distance in self.inside]
            self.launch(addresses, driver.active.get_current_stream(device.index))
            if key is not None:
                call_graphs.note(key, partial(self.record, addresses), device)
        del buffers
        return answers

    def launch(self, addresses: list[int], stream: int) -> None:
        for step in self.steps:
            step.run(*step.grid, stream, *step.compiled, *step.pick(addresses), *step.rest)

    def record(self, addresses: list[int], stream: torch.cuda.Stream) -> None:
        """``launch`` on a stream that is being recorded: what is aside becomes a branch of the graph."""
        # One, whatever is aside: they are a pool that others take from as well.
        beside = torch.cuda.Stream(self.device) if any(step.is_aside for step in self.steps) else stream
        on, is_ahead = stream, False
        for step in self.steps:
            if step.rejoins and is_ahead:
                stream.wait_stream(beside)
                on, is_ahead = stream, False
            if not step.is_aside:
                on = stream
            elif on is stream:
                beside.wait_stream(stream)
                on, is_ahead = beside, True
            step.run(*step.grid, on.cuda_stream, *step.compiled, *step.pick(addresses), *step.rest)
        if is_ahead:
            stream.wait_stream(beside)


def _program(launches: Sequence[Launched], tensors: Tensors, memory: Memory) -> _Program | None:
    """None if a launch was on another device, or points to what is not the call's own."""
    if memory.like.device.index not in (None, driver.active.get_current_device()):
        return None
    known = [*tensors, *memory.answers, *memory.buffers]
    begin_of = [0, *[x.data_ptr() for x in known]]
    # Of tensors at one address the first stands for all.
    number = {address: n for n, address in reversed(list(enumerate(begin_of)))}
    inside: list[tuple[int, int]] = []
    for address in {x for launched in launches for x in launched.addresses} - number.keys():
        owners = [n for n, x in enumerate(known, 1) if 0 < address - begin_of[n] < x.nbytes]
        if not owners:
            return None
        number[address] = len(begin_of) + len(inside)
        inside.append((owners[0], address - begin_of[owners[0]]))
    steps = []
    for launched in launches:
        numbers = [number[address] for address in launched.addresses]
        compiled = launched.compiled
        what = (compiled.function, compiled.metadata, None, None, None)
        rest = (*launched.scalars, *compiled.constants)
        steps.append(
            _Step(
                compiled.run, launched.grid, what, _picking(numbers), rest, launched.is_aside,
                launched.rejoins,
            )
        )  # fmt: skip
    *begins, num_bytes = _begins(memory.buffers)
    return _Program(
        steps=tuple(steps),
        device=memory.like.device,
        twins=_twins(begin_of[: len(tensors) + 1]),
        answers=tuple((x.shape, x.stride(), x.dtype) for x in memory.answers),
        begins=tuple(begins),
        inside=tuple(inside),
        num_bytes=num_bytes,
        is_graph=memory.like.device.type == "cuda" and len(steps) >= FEWEST_LAUNCHES,
        hooks=tuple({id(launched.hooks): launched.hooks for launched in launches}.values()),
    )


def _twins(addresses: list[int]) -> tuple[tuple[int, int], ...]:
    return tuple((first, n) for n, first in enumerate(map(addresses.index, addresses)) if first < n)


def _picking(numbers: Sequence[int]) -> Callable[[Sequence[int]], tuple[int, ...]]:
    """Takes those numbers of addresses; of one number, ``itemgetter`` makes no tuple."""
    if len(numbers) == 1:
        return lambda addresses: (addresses[numbers[0]],)
    return itemgetter(*numbers)


def _begins(buffers: list[torch.Tensor]) -> tuple[int, ...]:
    """Where each begins behind the one before, and where the last one ends."""
    begins = [0]
    for x in buffers:
        begins.append(begins[-1] + -(-x.nbytes // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT)
    return tuple(begins)
