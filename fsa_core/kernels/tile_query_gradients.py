"""The gradient of q over the blocks that neighbours share: a tile walks them, its gradients in registers."""

from functools import lru_cache

import torch
import triton.language as tl

from fsa_core.kernels import hopper
from fsa_core.kernels.agreement import Agreement
from fsa_core.kernels.block_share import Operands, add_share, row_shift
from fsa_core.kernels.constants import attention_constants
from fsa_core.kernels.launch import BoundKernel, kernel, multiprocessors
from fsa_core.kernels.query_tiles import load_block, load_shared
from fsa_core.kernels.tile_order import Tiles, tiles_to_walk
from fsa_core.kernels.tile_tokens import tile_tokens
from fsa_core.plan import ForwardPlan, Group
from fsa_core.problem import Problem
from fsa_core.sizes import search_steps
from fsa_core.tiles import QueryTile


@kernel
def _of_tiles(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    blocks_ptr,
    masks_ptr,
    counts_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    scale,
    first_token,
    num_tokens,
    num_sequences,
    search_steps,
    first_tile,
    num_tiles,
    first_head,
    first_delta_head,
    num_delta_heads,
    NUM_Q_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_PER_PAIR: tl.constexpr,
    TILE_HEADS_PER_KV_HEAD: tl.constexpr,
    INDEX_PER_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HEAD_DIM_PADDED: tl.constexpr,
    VALUE_DIM_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MAX_SHARED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """grad_q [total_q, q heads, dim] of a tile's tokens over what they share; 0 where they share nothing."""
    group_head = tl.program_id(1)
    head = first_head + group_head
    index_head = group_head if INDEX_PER_HEAD else 0
    tile = first_tile + tl.program_id(0)
    sequence, first, q_end = tile_tokens(tile, cu_seqlens_q_ptr, num_sequences, search_steps, TOKENS)
    if (first >= tl.minimum(q_end, first_token + num_tokens)) | (first + TOKENS <= first_token):
        return
    k_start = tl.load(cu_seqlens_k_ptr + sequence)
    k_length = tl.load(cu_seqlens_k_ptr + sequence + 1) - k_start

    rows = tl.arange(0, ROWS)
    tile_token = rows // HEADS_PER_PAIR
    tokens = first + tile_token
    row_mask = (tile_token < TOKENS) & (tokens < q_end)
    row_mask &= (tokens >= first_token) & (tokens < first_token + num_tokens)
    # The last key that a row may see; keys past the end of the sequence come after every token.
    last_key = tokens + (k_length - q_end) if CAUSAL else tokens * 0 + k_length - 1
    dims = tl.arange(0, HEAD_DIM_PADDED)
    value_dims = tl.arange(0, VALUE_DIM_PADDED)
    dim_mask = (dims < HEAD_DIM)[None, :]
    value_mask = (value_dims < VALUE_DIM)[None, :]
    q_heads = head * HEADS_PER_PAIR + rows % HEADS_PER_PAIR
    places = tokens.to(tl.int64) * NUM_Q_HEADS + q_heads
    q_places = places[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptr + q_places, mask=row_mask[:, None] & dim_mask, other=0.0)
    out_places = places[:, None] * VALUE_DIM + value_dims[None, :]
    grad_out = tl.load(grad_out_ptr + out_places, mask=row_mask[:, None] & value_mask, other=0.0)
    lse_shift = row_shift(tl.load(lse_ptr + places, mask=row_mask, other=float("-inf")))
    delta_places = tokens.to(tl.int64) * num_delta_heads + (q_heads - first_delta_head)
    delta = tl.load(delta_ptr + delta_places, mask=row_mask, other=0.0)

    tile_place = tl.cast(index_head, tl.int64) * num_tiles + tl.program_id(0)
    num_whole = tl.load(counts_ptr + tile_place * 2)
    num_shared = tl.load(counts_ptr + tile_place * 2 + 1)
    blocks_ptr += tile_place * MAX_SHARED
    masks_ptr += tile_place * MAX_SHARED
    tile_bit = tile_token.to(tl.int64)
    parts: tl.constexpr = BLOCK_SIZE // KEYS
    mask_dims: tl.constexpr = HEAD_DIM != HEAD_DIM_PADDED
    mask_values: tl.constexpr = VALUE_DIM != VALUE_DIM_PADDED
    # Where each number of a block lies from its first: the same for every block.
    key = tl.arange(0, KEYS)
    k_offsets = (key * NUM_KV_HEADS * HEAD_DIM)[:, None] + dims[None, :]
    v_offsets = (key * NUM_KV_HEADS * VALUE_DIM)[:, None] + value_dims[None, :]
    first_row = k_start.to(tl.int64) * NUM_KV_HEADS + head // TILE_HEADS_PER_KV_HEAD
    k_ptr += first_row * HEAD_DIM
    v_ptr += first_row * VALUE_DIM
    grad_q = tl.zeros((ROWS, HEAD_DIM_PADDED), tl.float32)
    for step in tl.range(0, num_whole * parts, num_stages=STAGES):
        first_key, chose = load_shared(blocks_ptr, masks_ptr, step, tile_bit, BLOCK_SIZE, KEYS)
        shift = tl.where(chose, lse_shift, float("inf"))
        k_ptrs = k_ptr + first_key * NUM_KV_HEADS * HEAD_DIM + k_offsets
        k = load_block(k_ptrs, True, dim_mask, False, mask_dims)
        v_ptrs = v_ptr + first_key * NUM_KV_HEADS * VALUE_DIM + v_offsets
        v = load_block(v_ptrs, True, value_mask, False, mask_values)
        grad_q = add_share(grad_q, q, grad_out, k, v, shift, delta, True, scale, False)
    # The blocks at the end of the list, which some tokens do not see whole, or which are short.
    for step in tl.range(num_whole * parts, num_shared * parts, num_stages=1):
        first_key, chose = load_shared(blocks_ptr, masks_ptr, step, tile_bit, BLOCK_SIZE, KEYS)
        shift = tl.where(chose, lse_shift, float("inf"))
        keys = first_key + key
        exists = (keys < k_length)[:, None]
        k_ptrs = k_ptr + first_key * NUM_KV_HEADS * HEAD_DIM + k_offsets
        k = load_block(k_ptrs, exists, dim_mask, True, mask_dims)
        v_ptrs = v_ptr + first_key * NUM_KV_HEADS * VALUE_DIM + v_offsets
        v = load_block(v_ptrs, exists, value_mask, True, mask_values)
        visible = keys[None, :] <= last_key[:, None]
        grad_q = add_share(grad_q, q, grad_out, k, v, shift, delta, visible, scale, True)
    grad_q *= scale
    tl.store(grad_q_ptr + q_places, grad_q.to(grad_q_ptr.dtype.element_ty), mask=row_mask[:, None] & dim_mask)


def tiles_of_group(
    problem: Problem,
    plan: ForwardPlan,
    tile: QueryTile,
    group: Group,
    agreement: Agreement,
    given: Operands,
    *,
    are_kept: bool,
) -> Tiles:
    """What ``gradients_of_tiles`` walks: the blocks that a group's tokens share, in ``agreement``."""
    is_on_hopper = hopper.runs_on(given.q.device) and _on_hopper(problem, plan, tile) is not None
    return tiles_to_walk(
        agreement, problem, tile, group, *given.starts, are_resident=is_on_hopper, are_kept=are_kept
    )


def tiles_make_delta(problem: Problem, plan: ForwardPlan, device: torch.device) -> bool:
    """Whether ``gradients_of_tiles`` can make delta, which it is given else."""
    tile = plan.query_tile
    return tile is not None and hopper.runs_on(device) and _on_hopper(problem, plan, tile) is not None


def gradients_of_tiles(
    problem: Problem,
    plan: ForwardPlan,
    tile: QueryTile,
    group: Group,
    tiles: Tiles,
    given: Operands,
    grad_q: torch.Tensor,
    *,
    makes_delta: bool,
) -> None:
    """Writes grad_q of a group's tokens over the blocks they share, and delta if it ``makes_delta``."""
    p = problem
    of_tiles = _on_hopper(p, plan, tile, makes_delta) if hopper.runs_on(grad_q.device) else None
    arguments = (
        given.delta, grad_q, *tiles.lists, *given.starts, p.softmax_scale, group.first_token,
        group.num_tokens, p.num_sequences, search_steps(p.num_sequences), tiles.first, tiles.of_head,
        group.first_head, given.first_delta_head, given.delta.shape[1],
    )  # fmt: skip
    if of_tiles is not None:
        programs = min(multiprocessors(grad_q.device), tiles.number * group.num_heads)
        grad_lse = given.lse if given.grad_lse is None else given.grad_lse
        of_tiles[(programs,)](
            given.q, given.k, given.v, given.out, given.grad_out, given.lse, grad_lse, *arguments,
            tiles.number, group.num_heads, int(tiles.is_ordered), int(given.grad_lse is not None),
        )  # fmt: skip
        return
    _of_tiles[tiles.number, group.num_heads](
        *given.tensors[:-1], *arguments, **attention_constants(p, plan), TOKENS=tile.tokens, ROWS=tile.rows,
        KEYS=tile.keys, MAX_SHARED=tile.max_shared, STAGES=tile.num_stages, num_warps=tile.num_warps,
        maxnreg=tile.max_registers,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _on_hopper(
    problem: Problem, plan: ForwardPlan, tile: QueryTile, makes_delta: bool = False
) -> BoundKernel | None:
    """The kernel for Hopper alone with what is the same for all groups, if it takes the tile."""
    from fsa_core.kernels import hopper_query_tiles, hopper_tile_query_gradients
    from fsa_core.kernels.hopper_tiles import exact_dims

    if not hopper_query_tiles.takes(problem, tile):
        return None
    shared = exact_dims(attention_constants(problem, plan))
    return hopper_tile_query_gradients.of_tiles.bind(
        **shared, **hopper_tile_query_gradients.constants(tile), MAKES_DELTA=makes_delta
    )
