"""Kernels in Gluon, run in Python on the CPU: what Triton's interpreter is to ``tl``, for the part in use.

A program's partitions are threads, so that they wait for one another as on the GPU, and what may be late
there is as late as it can be here: an asynchronous copy fills its place when the barrier that announces it is
reached, or its group is waited for, and a product reads shared memory when it is waited for. Until then a
place holds NaN or numbers that point nowhere. So a wait that is missing, a place that is given away too early
and a mask that hides too little give wrong answers; a wait that nobody ends is an error after a minute, and
an address outside a tensor at once.

A product of what no fence has made visible to the matrix units since it was written is an error as well.

Layouts say which thread has what, and nothing of that is looked at. Products add in float32.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import count, product
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fsa_core.kernels import hopper
from fsa_core.kernels.launch import BoundKernel, _this_thread

# Of a wait that others should have ended long ago.
TIMEOUT_S = 60.0
# Between two looks at what another program is to change.
POLL_S = 1e-3
WARP_THREADS, PARTITION_WARPS = 32, 4
# Points nowhere, and counts nothing that there is.
POISON = 1 << 29


class Deadlock(Exception):
    """A partition waits for what no other does."""


class MissingFence(Exception):
    """A product would read shared memory that it need not see yet."""


@dataclass(frozen=True)
class _Layout:
    """Of numbers that nothing says more of."""

    parent: Any = None


# 32 bits without a sign, which torch has no shifts of: 64 bits have room for them.
_UINT32 = object()


class _Tensor(torch.Tensor):
    """Numbers in registers; ``type.layout`` is that of the first operand of as many dimensions."""

    given_layout: Any = None

    @property
    def type(self) -> SimpleNamespace:  # type: ignore[override]
        return SimpleNamespace(layout=self.given_layout or _Layout())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(made, _Tensor) and made.given_layout is None:
            alike = (x for x in args if isinstance(x, _Tensor) and x.ndim == made.ndim)
            made.given_layout = next((x.given_layout for x in alike if x.given_layout is not None), None)
        return made

    def to(self, dtype: Any, bitcast: bool = False) -> "_Tensor":  # type: ignore[override]
        if dtype is _UINT32:
            return super().to(torch.int64) & 0xFFFFFFFF
        return self.view(dtype) if bitcast else super().to(dtype)


# A kernel's numbers are values: who else has one keeps it, the next program among them.
for _name in ("add", "sub", "mul", "and", "or", "xor"):
    setattr(_Tensor, f"__i{_name}__", getattr(torch.Tensor, f"__{_name}__"))


def _tensor(x: Any, layout: Any = None) -> _Tensor:
    if isinstance(x, _Tensor) and layout is None:
        return x
    dtype = torch.float32 if type(x) is float else None
    if type(x) is int:
        dtype = torch.int32 if -(1 << 31) <= x < 1 << 31 else torch.int64
    made = torch.as_tensor(x, dtype=dtype).as_subclass(_Tensor)
    made.given_layout = layout
    return made


@dataclass(frozen=True)
class _Pointer:
    """To a number of a tensor, or to many."""

    memory: torch.Tensor
    offset: Any = 0

    @property
    def dtype(self) -> SimpleNamespace:
        return SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, numbers: Any) -> "_Pointer":
        return _Pointer(self.memory, self.offset + numbers)

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Which numbers, as many as the mask has, and which of them exist."""
        offset, exists = torch.broadcast_tensors(
            torch.as_tensor(self.offset).as_subclass(torch.Tensor),
            torch.as_tensor(True if mask is None else mask).as_subclass(torch.Tensor),
        )
        outside = exists & ((offset < 0) | (offset >= self.memory.numel()))
        if outside.any():
            raise IndexError(f"offsets {offset[outside].unique()[:9]} of {self.memory.numel()} numbers")
        return offset, exists


class _Barrier:
    """Phases end when as many as it counts have arrived; a wait names the parity of the one it waits for."""

    def __init__(self, abort: threading.Event) -> None:
        self._changed = threading.Condition()
        self._abort = abort
        self._count = self._missing = self._phase = 0

    def init(self, count: int) -> None:
        self._count = self._missing = count

    def arrive(self, count: int) -> None:
        with self._changed:
            self._missing -= count
            assert self._missing >= 0, "more arrive than a phase counts"
            if self._missing == 0:
                self._missing = self._count
                self._phase += 1
                self._changed.notify_all()

    def wait(self, parity: int) -> None:
        def is_over() -> bool:
            return self._abort.is_set() or self._phase % 2 != parity

        with self._changed:
            if not self._changed.wait_for(is_over, TIMEOUT_S) or self._abort.is_set():
                raise Deadlock(f"phase {self._phase} lacks {self._missing} of {self._count}")

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()


@dataclass(frozen=True)
class _Shared:
    """Numbers in shared memory, or a view of them; or barriers."""

    data: Any

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    @property
    def shape(self) -> Sequence[int]:
        return self.data.shape

    def index(self, place: Any) -> Any:
        found = self.data[int(place)]
        return found if isinstance(found, _Barrier) else _Shared(found)

    def slice(self, start: Any, length: int, dim: int = 0) -> "_Shared":
        return _Shared(self.data.narrow(dim, int(start), length))

    def permute(self, order: Sequence[int]) -> "_Shared":
        return _Shared(self.data.permute(order))

    def load(self, layout: Any) -> _Tensor:
        return _tensor(self.data.clone(), layout)

    def store(self, x: torch.Tensor) -> None:
        assert x.dtype == self.data.dtype
        self.data.copy_(x)
        _partition.program.written[self.data.data_ptr()] = next(_moments)

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], _layout: Any) -> "_Shared":
        numbers = self.data.view(-1).view(torch.uint8).view(dtype)
        return _Shared(numbers[: math.prod(shape)].view(tuple(shape)))

    def poison(self) -> None:
        self.data.fill_(float("nan") if self.data.dtype.is_floating_point else POISON)


@dataclass
class _Product:
    """One that has begun: it reads its operands when it is waited for."""

    left: Any
    right: _Shared
    total: Any
    result: _Tensor | None = None

    def end(self) -> _Tensor:
        if self.result is None:
            left = self.left.data if isinstance(self.left, _Shared) else self.left
            total = self.total.end() if isinstance(self.total, _Product) else self.total
            numbers = left.as_subclass(torch.Tensor).float() @ self.right.data.float() + total
            self.result = _tensor(numbers.as_subclass(torch.Tensor), total.given_layout)
        return self.result


@dataclass
class _Partition(threading.local):
    """What a partition has begun and not waited for, and how many threads it has."""

    program: Any = None
    threads: int = WARP_THREADS * PARTITION_WARPS
    fenced: int = 0
    polls: int = 0
    copies: list[Callable[[], None]] = field(default_factory=list)
    groups: list[list[Callable[[], None]]] = field(default_factory=list)
    products: list[_Product] = field(default_factory=list)


@dataclass
class _Program:
    """The program that runs: its place in the grid, its barriers, and when places were written last."""

    place: tuple[int, int, int]
    grid: tuple[int, int, int]
    written: dict[int, int] = field(default_factory=dict)
    abort: threading.Event = field(default_factory=threading.Event)
    barriers: list[_Barrier] = field(default_factory=list)


_partition = _Partition()
_one_at_a_time = threading.Lock()
_moments = count(1)


def _load(
    pointer: _Pointer, mask: Any = None, other: Any = 0, cache_modifier: str = "", volatile: bool = False
) -> _Tensor:
    if volatile:
        # Whoever asks again and again lets others run.
        time.sleep(POLL_S)
        _partition.polls += 1
        if _partition.polls * POLL_S > TIMEOUT_S or _partition.program.abort.is_set():
            raise Deadlock("a program waits for other programs")
    offset, exists = pointer.places(mask)
    found = torch.full(offset.shape, other, dtype=pointer.memory.dtype)
    found[exists] = pointer.memory[offset[exists].long()]
    return _tensor(found, getattr(pointer.offset, "given_layout", None))


def _store(pointer: _Pointer, x: Any, mask: Any = None) -> None:
    offset, exists = pointer.places(mask)
    numbers = torch.as_tensor(x).as_subclass(torch.Tensor).to(pointer.memory.dtype).broadcast_to(offset.shape)
    pointer.memory[offset[exists].long()] = numbers[exists]


def _atomic_add(pointer: _Pointer, x: Any, sem: str = "acq_rel", scope: str = "gpu") -> _Tensor:
    _partition.polls = 0
    with _one_at_a_time:
        before = _load(pointer)
        _store(pointer, before + x)
    return before


def _where(condition: Any, a: Any, b: Any) -> _Tensor:
    return torch.where(_tensor(condition), _tensor(a), _tensor(b))  # type: ignore[return-value]


def _reduce(x: Any, axis: int, combine: Callable[..., Any], keep_dims: bool = False) -> _Tensor:
    total, *others = x.unbind(axis)
    for other in others:
        total = combine(total, other)
    return _tensor(total.unsqueeze(axis) if keep_dims else total)


def _scan(x: Any, axis: int, combine: Callable[..., Any], reverse: bool = False) -> Any:
    """Every number with all before it, with the 2, 4, 8 ... last of them first."""
    sums = [y.clone() for y in (x if isinstance(x, tuple) else (x,))]
    assert {axis, *(y.ndim - 1 for y in sums)} == {0}
    sums = [y.flip(0) for y in sums] if reverse else sums
    step = 1
    while step < len(sums[0]):
        more = combine(*[y[:-step] for y in sums], *[y[step:] for y in sums])
        more = more if isinstance(more, tuple) else (more,)
        sums = [torch.cat([y[:step], z]) for y, z in zip(sums, more, strict=True)]
        step *= 2
    made = tuple(_tensor(y.flip(0) if reverse else y) for y in sums)
    return made if isinstance(x, tuple) else made[0]


def _range(*ends: Any) -> Iterator[_Tensor]:
    return map(_tensor, range(*map(int, ends)))


def _allocate(dtype: Any, shape: Sequence[int], layout: Any, x: Any = None) -> Any:
    if layout is _BARRIERS:
        barriers = [_Barrier(_partition.program.abort) for _ in range(shape[0])]
        _partition.program.barriers += barriers
        return barriers[0] if len(shape) == 1 else _Shared(barriers)
    shared = _Shared(torch.empty(tuple(shape), dtype=dtype))
    shared.poison()
    if x is not None:
        shared.store(x)
    return shared


def _begin_copy(shared: _Shared, pointer: _Pointer, mask: Any = None) -> None:
    shared.poison()
    # Addresses and masks are those of now; what lies there is read when it arrives.
    _partition.copies.append(lambda: shared.store(_load(pointer, mask)))


def _arrive_with_copies(barrier: _Barrier, increment_count: bool) -> None:
    assert not increment_count
    while _partition.copies:
        _partition.copies.pop(0)()
    barrier.arrive(_partition.threads)


def _commit_group() -> None:
    _partition.groups.append(_partition.copies)
    _partition.copies = []


def _wait_group(num_outstanding: int = 0) -> None:
    while len(_partition.groups) > num_outstanding:
        for copy in _partition.groups.pop(0):
            copy()


def _begin_product(
    left: Any, right: _Shared, total: Any, use_acc: bool = True, is_async: bool = False
) -> Any:
    assert use_acc or not isinstance(total, _Product)
    for operand in (x for x in (left, right) if isinstance(x, _Shared)):
        if _partition.program.written.get(operand.data.data_ptr(), 0) > _partition.fenced:
            raise MissingFence(f"an operand [{', '.join(map(str, operand.shape))}] is read")
    begun = _Product(left, right, total if use_acc else _tensor(torch.zeros_like(total), total.given_layout))
    _partition.products.append(begun)
    return begun if is_async else _end_products(0, [begun])


def _end_products(left_over: int, deps: Sequence[Any]) -> Any:
    while len(_partition.products) > left_over:
        _partition.products.pop(0).end()
    ended = tuple(x.end() if isinstance(x, _Product) else x for x in deps)
    return ended if len(ended) > 1 else ended[0]


def _fence() -> None:
    _partition.fenced = next(_moments)


def _warp_specialize(parts: Sequence[Any], warps: Sequence[int], _registers: Sequence[int]) -> Any:
    """The answer of the first part, which this thread runs; the others run in threads of their own."""
    program, errors = _partition.program, list[BaseException]()

    def run(part: Any, num_warps: int) -> Any:
        _partition.program = program
        _partition.threads = WARP_THREADS * num_warps
        try:
            return part[0](*part[1])
        except BaseException as error:
            errors.append(error)
            program.abort.set()
            for barrier in program.barriers:
                barrier.wake()

    others = [threading.Thread(target=run, args=x) for x in zip(parts[1:], warps, strict=True)]
    for thread in others:
        thread.start()
    answer = run(parts[0], PARTITION_WARPS)
    for thread in others:
        thread.join()
    if errors:
        raise errors[0]
    return answer


_BARRIERS = _Layout()
_LAYOUTS = {
    "BlockedLayout": lambda *_: _Layout(),
    "SwizzledSharedLayout": lambda *_: _Layout(),
    "NVMMADistributedLayout": lambda *_: _Layout(),
    "DotOperandLayout": lambda _operand, parent, _width: _Layout(parent),
    "SliceLayout": lambda _dim, parent: _Layout(parent),
    "NVMMASharedLayout": SimpleNamespace(get_default_for=lambda _shape, _dtype: _Layout()),
}
_LANGUAGE = SimpleNamespace(
    **_LAYOUTS,
    constexpr=lambda x: x,
    int16=torch.int16,
    int32=torch.int32,
    int64=torch.int64,
    uint32=_UINT32,
    uint64=torch.int64,
    float32=torch.float32,
    bfloat16=torch.bfloat16,
    program_id=lambda axis: _tensor(_partition.program.place[axis]),
    num_programs=lambda axis: _tensor(_partition.program.grid[axis]),
    arange=lambda start, end, layout=None: _tensor(torch.arange(start, end, dtype=torch.int32), layout),
    zeros=lambda shape, dtype, layout=None: _tensor(torch.zeros(shape, dtype=dtype), layout),
    full=lambda shape, x, dtype, layout=None: _tensor(torch.full(shape, x), layout).to(dtype),
    load=_load,
    store=_store,
    atomic_add=_atomic_add,
    where=_where,
    minimum=lambda a, b: torch.minimum(_tensor(a), _tensor(b)),
    maximum=lambda a, b: torch.maximum(_tensor(a), _tensor(b)),
    cdiv=lambda a, b: -(-a // b),
    cast=lambda x, dtype: _tensor(x).to(dtype),
    fma=lambda a, b, c: a * b + c,
    max=lambda x, axis: _tensor(x.amax(axis), _Layout(x.given_layout)),
    min=lambda x, axis: _tensor(x.amin(axis), _Layout(x.given_layout)),
    sum=lambda x, axis: _tensor(x.sum(axis, dtype=x.dtype), _Layout(x.given_layout)),
    reshape=lambda x, shape: x.reshape(tuple(shape)),
    trans=lambda x, order: x.permute(*order),
    split=lambda x: x.unbind(-1),
    join=lambda a, b: torch.stack((a, b), -1),
    exp2=torch.exp2,
    log2=torch.log2,
    convert_layout=lambda x, layout, **_: _tensor(x.as_subclass(torch.Tensor), layout),
    reduce=_reduce,
    associative_scan=_scan,
    allocate_shared_memory=_allocate,
    warp_specialize=_warp_specialize,
    static_range=range,
)
_REPLACED: dict[str, Any] = {
    "gl": _LANGUAGE,
    "tl": _LANGUAGE,
    "range": _range,
    "async_copy": SimpleNamespace(
        async_copy_global_to_shared=_begin_copy,
        mbarrier_arrive=_arrive_with_copies,
        commit_group=_commit_group,
        wait_group=_wait_group,
    ),
    "mbarrier": SimpleNamespace(
        MBarrierLayout=lambda: _BARRIERS,
        init=lambda barrier, count: barrier.init(int(count)),
        arrive=lambda barrier, count, pred=True: barrier.arrive(int(count) * int(pred)),
        wait=lambda barrier, parity: barrier.wait(int(parity)),
    ),
    "fence_async_shared": _fence,
    # A thread's turn to wait for those of its partition: all are one here.
    "wait_for_threads": lambda: None,
    "warpgroup_mma": _begin_product,
    "warpgroup_mma_wait": _end_products,
}


@cache
def _in_python(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that a kernel's function was, with what it names in this module's sense."""
    names = dict(function.__globals__) | _REPLACED
    for name in function.__code__.co_names:
        found = names.get(name)
        if isinstance(found, JITFunction | InterpretedFunction):
            names[name] = _later(found.fn)
        elif isinstance(found, tl.constexpr | gl.constexpr):
            names[name] = found.value
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__)


def _later(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **options: _in_python(function)(*args, **options)


def run_kernel(jitted: Any, grid: Sequence[int], args: Sequence[Any], constants: dict[str, Any]) -> None:
    """A launch: every program of the grid, one after the other, on tensors of the CPU."""
    kernel = _in_python(jitted.fn)
    known = {name: x for name, x in constants.items() if name in jitted.arg_names}
    given = [_Pointer(x.detach().view(-1)) if isinstance(x, torch.Tensor) else _tensor(x) for x in args]
    x, y, z = (*grid, 1, 1)[:3]
    abort, errors = threading.Event(), list[BaseException]()
    all_programs = [
        _Program(place, (x, y, z), abort=abort) for place in product(range(x), range(y), range(z))
    ]

    def run(program: _Program) -> None:
        _partition.program = program
        try:
            kernel(*given, **known)
        except BaseException as error:
            errors.append(error)
            abort.set()
            for each in all_programs:
                for barrier in each.barriers:
                    barrier.wake()

    if constants.get("launch_cooperative_grid"):
        threads = [threading.Thread(target=run, args=(x,)) for x in all_programs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    else:
        for program in all_programs:
            run(program)
            if errors:
                break
    if errors:
        raise errors[0]


@contextmanager
def interpreted() -> Iterator[set[str]]:
    """Kernels for Hopper are taken, and run here; yields the names of those that have been launched."""
    launched: set[str] = set()
    launch = BoundKernel.launch

    def interpret(self: BoundKernel, grid: tuple[int, ...], *args: Any) -> None:
        if not isinstance(self._jitted, JITFunction):
            return launch(self, grid, *args)
        launched.add(self._jitted.fn.__name__)
        # Nothing is remembered that could be launched again.
        if _this_thread.notes is not None:
            _this_thread.notes.are_complete = False
        run_kernel(self._jitted, grid, args, self._constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BoundKernel, "launch", interpret)
        patch.setattr(hopper, "runs_on", lambda _device: True)
        patch.setattr(hopper, "MIN_FORWARD_BYTES", 0)
        patch.setattr(hopper, "MIN_GRADIENT_BYTES", 0)
        yield launched
