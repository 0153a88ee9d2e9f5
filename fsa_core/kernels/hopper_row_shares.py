"""What kernels of the gradients of keys have in common on Hopper, in Gluon: rows, and their weights.

Rows of q and grad_out come in tiles of 64 by asynchronous copies, with the lse and delta of each; what a tile
gives is added to the gradients of 64 keys, which a group of four warps has in registers. Keys lie down and
rows across: weights and gradients of scores are then left operands as they are.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2_E = gl.constexpr(1.4426950408889634)
# Of keys and of rows: the least that a product of matrices has, and all that registers hold.
SIDE = gl.constexpr(64)
COPYING_WARPS = gl.constexpr(4)
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIDE.value, 16]))


@gluon.jit
def new_row_tiles(
    dtype: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    VALUE_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    READERS: gl.constexpr,
):
    """Rows of q and grad_out, of each row lse and delta; what says that they are there, and that each of
    READERS groups has read them.
    """
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, HEAD_DIM], dtype)
    out_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([SIDE, VALUE_DIM], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES, SIDE, HEAD_DIM], q_layout)
    out_tiles = gl.allocate_shared_memory(dtype, [STAGES, SIDE, VALUE_DIM], out_layout)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, SIDE], flat)
    delta_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, SIDE], flat)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=32 * COPYING_WARPS)
        mbarrier.init(free.index(stage), count=READERS)
    return q_tiles, out_tiles, lse_tiles, delta_tiles, ready, free


@gluon.jit
def zero_gradients(HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr):
    """grad_k [SIDE, HEAD_DIM] and grad_v [SIDE, VALUE_DIM] as products leave them."""
    k_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    v_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE_DIM, 16])
    grad_k = gl.zeros([SIDE, HEAD_DIM], gl.float32, k_layout)
    return grad_k, gl.zeros([SIDE, VALUE_DIM], gl.float32, v_layout)


@gluon.jit
def begin_scores(k, v, q, grad_out):
    """Begins to multiply the scores of a tile's rows, then the gradients of their weights."""
    zeros = gl.zeros([SIDE, SIDE], gl.float32, SCORES)
    scores = warpgroup_mma(k, q.permute([1, 0]), zeros, use_acc=False, is_async=True)
    return scores, warpgroup_mma(v, grad_out.permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def weigh(scores, lse_tile, scale):
    """The weights of scores that are the last but one product begun."""
    # Rows past the last have nothing but zeros in q and grad_out, and so no share in any sum. A row that sees
    # no key has lse = -inf and infinite weights, all of them hidden.
    shift = lse_tile.load(gl.SliceLayout(0, SCORES)) * LOG2_E
    scores = warpgroup_mma_wait(1, deps=[scores])
    return gl.exp2(scores * (scale * LOG2_E) - shift[None, :])


@gluon.jit
def store_keys(x_ptr, num_keys, x, row, ADD: gl.constexpr):
    """Writes x [SIDE, dim] of keys that lie ``row`` numbers apart, or ADDs it to what is there."""
    keys = gl.arange(0, SIDE, gl.SliceLayout(1, x.type.layout))
    dims = gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    ptrs = x_ptr + ((keys * row)[:, None] + dims[None, :])
    mask = (keys < num_keys)[:, None]
    if ADD:
        x += gl.load(ptrs, mask=mask, other=0.0)
    gl.store(ptrs, x.to(x_ptr.dtype.element_ty), mask=mask)
