"""Sorting in registers, in Gluon: a bitonic network whose steps mostly stay inside a thread.

``tl.sort`` takes the layout of what it sorts, neighbours in neighbouring threads, and pays a shuffle for two
of three steps. Here a thread has neighbours, and of 45 steps for 512 numbers 30 are its own.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def to_neighbours(x, LOG_SIZE: gl.constexpr, WARPS: gl.constexpr):
    """What the threads have of x, which neighbours have of neighbours, as if each had neighbours.

    No number moves: they are in another order.
    """
    BY_THREAD: gl.constexpr = (1 << LOG_SIZE) // (32 * WARPS)
    layout: gl.constexpr = gl.BlockedLayout([BY_THREAD], [32], [WARPS], [0])
    moved = x.reshape([BY_THREAD, WARPS, 32]).permute([1, 2, 0]).reshape([1 << LOG_SIZE])
    return gl.convert_layout(moved, layout, assert_trivial=True)


@gluon.jit
def _xor(a, b):
    return a ^ b


@gluon.jit
def sort(keys, LOG_SIZE: gl.constexpr):
    """2 ** LOG_SIZE keys in ascending order, in the layout that they have."""
    layout: gl.constexpr = keys.type.layout
    CUBE: gl.constexpr = [2] * LOG_SIZE
    line = gl.arange(0, 1 << LOG_SIZE, layout)
    # Runs of 2, 4, 8 ... become sorted, every second one in descending order, its keys upside down.
    turned = line * 0
    for stage in gl.static_range(1, LOG_SIZE + 1):
        turn = 0 - ((line >> stage) & 1)
        cube = (keys ^ (turn ^ turned).to(keys.dtype)).reshape(CUBE)
        turned = turn
        for step in gl.static_range(1, stage + 1):
            other = gl.reduce(cube, LOG_SIZE - 1 - (stage - step), _xor, keep_dims=True) ^ cube
            is_right = ((line >> (stage - step)) & 1) != 0
            cube = gl.where(is_right.reshape(CUBE), gl.maximum(cube, other), gl.minimum(cube, other))
        keys = gl.convert_layout(cube.reshape([1 << LOG_SIZE]), layout, assert_trivial=True)
    return keys
