"""Kernels that are launched in a few microseconds of host time.

Each launch of a ``triton.jit`` function binds the arguments, works out what to specialise on and writes that
out as the key of the compiled kernel: 40 to 50 microseconds for 20 to 45 arguments (Triton 3.6), more than a
short kernel runs. Here the compiled kernel is remembered, under all that Triton's own key is made of:

- constants, compile options and their types: one table for each set of them;
- types of the arguments, dtypes of the tensors, the current device: looked up in that table;
- whether an address is divisible by 16: only launches where every one is are remembered;
- whether an integer fits 32 bits: only launches where every one does are remembered;
- whether an integer is 1 or divisible by 16: not specialised on in these kernels.

Whatever else is launched takes Triton's way, and so does every launch while somebody debugs, instruments or
watches them (Proton, hooks), on other GPUs than NVIDIA's (where Triton's key has more in it), and under a
Triton of which it is not known how it launches a compiled kernel. All that is lost is Triton's refusal to
launch a kernel after a global that it was compiled with has changed.
"""

import inspect
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial, reduce
from operator import or_
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

# In these, CompiledKernel.run takes the grid, the stream, the function, its metadata, three things for hooks
# and every argument, constants too, which it skips; a pointer may be given as an address.
KNOWN_VERSIONS = ("3.4", "3.5", "3.6", "3.7")
POINTER_TYPES = (torch.Tensor, torch.nn.Parameter)
# And what packs them, or raises where an integer does not fit.
SCALAR_TYPES = {int: "i", float: "d"}
# Of the addresses whose launches are remembered.
ALIGNMENT = 16

Launch = Callable[..., None]


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; Triton's interpreter runs one program at a time."""
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


# Programs of one warp that a multiprocessor needs at once to be busy.
_BUSY = 8


def sorting_warps(device: torch.device, tiles: int) -> int:
    """Warps of a program that sorts a tile: one, which waits for no other, where there are tiles enough.

    Measured on an H200, microseconds with 1 and 4 warps: 8 tiles a multiprocessor 33 and 27, 62 of them
    109 and 155.
    """
    return 1 if tiles > _BUSY * multiprocessors(device) else 4


def kernel(function: Callable[..., None], jit: Callable[..., Any] = triton.jit) -> "Kernel":
    """``triton.jit`` for what is launched, or Gluon's; functions that kernels call stay ``triton.jit``.

    The parameters of ``function`` are pointers, named ``..._ptr``, then scalars, then constants
    (``tl.constexpr``). It is launched as any kernel, ``function[grid](*pointers, *scalars, CONSTANT=...,
    num_warps=...)``: constants and options by name, and hashable. No scalar is specialised on: sizes change
    from call to call, and each divisibility would be compiled anew.
    """
    parameters = inspect.signature(function).parameters.values()
    arguments = [x.name for x in parameters if x.annotation is not tl.constexpr]
    scalars = [name for name in arguments if not name.endswith("_ptr")]
    jitted = jit(function, do_not_specialize=scalars)
    return Kernel(jitted, num_pointers=len(arguments) - len(scalars))


class Kernel:
    """A kernel before its constants are known; ``jitted`` is what Triton made of it, or its interpreter."""

    def __init__(self, jitted: Any, num_pointers: int) -> None:
        self.jitted = jitted
        self._num_pointers = num_pointers
        self._bound: dict[tuple[Any, ...], BoundKernel] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Launch:
        return partial(self._launch, grid)

    def bind(self, **constants: Any) -> "BoundKernel":
        """The kernel with its constants and options, to keep: finding it is half of what a launch costs."""
        return self._with(constants)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        self._with(constants).launch(grid, *args)

    def _with(self, constants: dict[str, Any]) -> "BoundKernel":
        values = constants.values()
        # The types tell True from 1.
        key = (*constants, *values, *map(type, values))
        bound = self._bound.get(key)
        if bound is None:
            bound = BoundKernel(self.jitted, self._num_pointers, constants)
            bound = self._bound.setdefault(key, bound)
        return bound


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel on a device, as Triton launches it; it wants the values of the constants as well."""

    run: Launch
    function: int
    metadata: Any
    constants: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _OfTypes:
    """What was compiled for arguments of some types, by device and dtypes.

    ``pack`` takes the scalars and raises struct.error where one does not fit.
    """

    pack: Callable[..., bytes]
    compiled: dict[tuple[Any, ...], Compiled] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Launched:
    """A launch of a remembered kernel; ``hooks`` is the kernel's own list of those, empty then.

    ``is_aside`` and ``rejoins``: as functions of these names say.
    """

    compiled: Compiled
    grid: tuple[int, int, int]
    addresses: list[int]
    scalars: tuple[float, ...]
    hooks: list[Any]
    is_aside: bool
    rejoins: bool


@dataclass(slots=True)
class Notes:
    """Launches in their order; complete if none went through Triton. What comes next is aside, or rejoins."""

    noted: list[Launched] = field(default_factory=list)
    are_complete: bool = True
    is_aside: bool = False
    rejoins: bool = False


class _ThisThread(threading.local):
    notes: Notes | None = None


_this_thread = _ThisThread()


@contextmanager
def noted_launches() -> Iterator[Notes]:
    """Notes what this thread launches until the context ends."""
    before, _this_thread.notes = _this_thread.notes, Notes()
    try:
        yield _this_thread.notes
    finally:
        _this_thread.notes = before


@contextmanager
def aside() -> Iterator[None]:
    """What is launched inside may run beside all that is launched after it, until ``rejoin`` is called.

    It may need what was launched before. Whoever launches one after the other takes no notice; a graph of
    what was noted has two branches.
    """
    notes = _this_thread.notes
    if notes is None:
        yield
        return
    before, notes.is_aside = notes.is_aside, True
    try:
        yield
    finally:
        notes.is_aside = before


def rejoin() -> None:
    """What is launched from now on may need what was launched aside."""
    notes = _this_thread.notes
    # Within what is aside one launch follows the other anyway.
    if notes is not None and not notes.is_aside:
        notes.rejoins = True


class BoundKernel:
    """A kernel with its constants and options, launched as ``bound[grid](*pointers, *scalars)``."""

    def __init__(self, jitted: Any, num_pointers: int, constants: dict[str, Any]) -> None:
        self._jitted = jitted
        # The interpreter's functions have none before Triton 3.6.
        self._hooks: list[Any] = getattr(jitted, "pre_run_hooks", [])
        self._num_pointers = num_pointers
        self._constants = constants
        # By the types of the arguments.
        self._remembered: dict[tuple[type, ...], _OfTypes] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Launch:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any) -> None:
        of_types = self._remembered.get(tuple(map(type, args)))
        hooks = self._hooks
        if of_types is None or is_watched((hooks,)):
            return self._launch_through_triton(grid, args)
        tensors, scalars = args[: self._num_pointers], args[self._num_pointers :]
        addresses = [x.data_ptr() for x in tensors]
        active = driver.active
        device = active.get_current_device()
        compiled = of_types.compiled.get((device, *[x.dtype for x in tensors]))
        if compiled is None or not _are_common(addresses, scalars, of_types.pack):
            return self._launch_through_triton(grid, args)
        x, y, z = (*grid, 1, 1)[:3]
        compiled.run(
            x, y, z, active.get_current_stream(device), compiled.function, compiled.metadata, None, None,
            None, *addresses, *scalars, *compiled.constants,
        )  # fmt: skip
        notes = _this_thread.notes
        if notes is not None:
            launched = Launched(compiled, (x, y, z), addresses, scalars, hooks, notes.is_aside, notes.rejoins)
            notes.noted.append(launched)
            notes.rejoins = False

    def _launch_through_triton(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """Launches as ``triton.jit`` does, and remembers what was compiled if it may be launched again."""
        compiled = self._jitted[grid](*args, **self._constants)
        if _this_thread.notes is not None:
            _this_thread.notes.are_complete = False
        if not _can_be_launched_again(compiled) or is_watched((self._hooks,)):
            return
        tensors, scalars = args[: self._num_pointers], args[self._num_pointers :]
        arguments, rest = self._jitted.params[: len(args)], self._jitted.params[len(args) :]
        is_complete = all(x.is_constexpr for x in rest) and not any(x.is_constexpr for x in arguments)
        are_tensors = all(type(x) in POINTER_TYPES for x in tensors)
        if not (is_complete and are_tensors and all(type(x) in SCALAR_TYPES for x in scalars)):
            return
        pack = struct.Struct("".join(SCALAR_TYPES[type(x)] for x in scalars)).pack
        if _are_common([x.data_ptr() for x in tensors], scalars, pack):
            of_types = self._remembered.setdefault(tuple(map(type, args)), _OfTypes(pack))
            constants = tuple(self._constants.get(x.name, x.default) for x in rest)
            of_types.compiled[(driver.active.get_current_device(), *[x.dtype for x in tensors])] = Compiled(
                compiled.run, compiled.function, compiled.packed_metadata, constants
            )


def _are_common(addresses: list[int], scalars: tuple[float, ...], pack: Callable[..., bytes]) -> bool:
    """Whether addresses and integers are of the one kind that is remembered."""
    try:
        pack(*scalars)
    except struct.error:
        return False
    return are_aligned(addresses)


def are_aligned(addresses: Sequence[int]) -> bool:
    """Whether launches at these addresses are of the kind that is remembered."""
    return reduce(or_, addresses, 0) % ALIGNMENT == 0


def is_watched(hooks_of_kernels: Sequence[list[Any]]) -> bool:
    """Whether launches have to go through Triton for what it calls, or compiles in, besides."""
    runtime = knobs.runtime
    # Chains of hooks, or in 3.4 a hook or None.
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    hooks = getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or any(hooks_of_kernels)
    return bool(hooks or runtime.debug)


def _can_be_launched_again(compiled: Any) -> bool:
    version = ".".join(triton.__version__.split(".")[:2])
    known = version in KNOWN_VERSIONS and isinstance(compiled, CompiledKernel)
    return known and compiled.metadata.target.backend == "cuda"
