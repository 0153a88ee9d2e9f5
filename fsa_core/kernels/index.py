"""Inversion of block_indices on the device: for each KV block, the (token, slot) pairs that chose it.

A counting sort into compressed rows ("CSR"), one row a segment. A segment is one KV block of one
sequence, chosen by the tokens of one chunk under one index head. Three launches, no host synchronisation:

1. count: rank every pair inside its segment, and size the segments;
2. scan: where each segment's pairs, and the work items cut from them, begin;
3. scatter: write the pairs, and of each work item its segment, or a record of what it is.

A work item is a fixed number of pairs of one segment, so a popular block is many items and no item is longer
than another. The order of pairs inside a segment varies from run to run
and must not matter to whoever reads them: every pair's result has a place of its own.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from fsa_core import plan
from fsa_core.kernels.launch import BoundKernel, kernel
from fsa_core.kernels.primitives import find_sequence, first_segment, load_segments
from fsa_core.kernels.replay import Memory
from fsa_core.sizes import search_steps

MAX_SLOTS_IN_TILE = 128
PAIRS_IN_TILE = 512
SEGMENTS_IN_TILE = 1024
# A pair is one int32, token << SLOT_BITS | slot: the partial kernel would otherwise divide for every row.
SLOT_BITS = tl.constexpr(plan.SLOT_BITS)
SLOT_MASK = tl.constexpr((1 << plan.SLOT_BITS) - 1)
RECORD_INTS = tl.constexpr(plan.RECORD_INTS)
RECORD_PAIRS_BIT = tl.constexpr(16)
# Of what the first counter has to itself, the number that says whether query tiles left anything. Where they
# did not, nothing is counted, and whoever takes work items finds none.
LEFT = tl.constexpr(2)


@dataclass(frozen=True, slots=True)
class Inversion:
    """Buffers of a group of tokens, cut into chunks that are attended one after another; all int32.

    A row of the lists below is one chunk under one index head: row = head * chunks + chunk.

    counts [heads * chunks, segments, plan.counter_ints]: of each segment the first counts; zero between uses.
    left: its number LEFT is not zero if query tiles of this group, or one before, left anything; else nothing
    below is written but that there are no items. In ``counts``, unless it is kept: in ``kept_left``.
    ranks [heads, tokens, slots]: the pair's place in its segment, -1 for a slot that selects nothing.
    used [heads, tokens, words]: a bit for each slot, set if it selects something; or no words.
    pairs [heads, tokens * slots]: token << SLOT_BITS | slot, the token counted from the chunk's first.
    offsets, item_offsets [heads * chunks, segments + 1]: where segments begin in the chunk's pairs and items.
    items [heads * chunks, max_items, 1]: the segment that a work item belongs to. Or [..., RECORD_INTS], a
    record: its first pair in the chunk; how many keys its block has and, from bit RECORD_PAIRS_BIT on, how
    many pairs it has; the block's first packed key; how far the chunk's first token sees into the block, as a
    key of it.
    """

    counts: torch.Tensor
    ranks: torch.Tensor
    used: torch.Tensor
    pairs: torch.Tensor
    offsets: torch.Tensor
    item_offsets: torch.Tensor
    items: torch.Tensor
    kept_left: torch.Tensor | None = None

    @property
    def left(self) -> torch.Tensor:
        return self.counts if self.kept_left is None else self.kept_left


def new_inversion(
    sizes: plan.ForwardPlan,
    num_slots: int,
    memory: torch.Tensor | Memory,
    kept_left: torch.Tensor | None = None,
) -> Inversion:
    """Buffers of one group of tokens, as ``memory`` makes them; every group reuses them."""

    def int32(*shape: int) -> torch.Tensor:
        return memory.new_empty(*shape, dtype=torch.int32)

    index_heads = sizes.group_heads if sizes.index_per_head else 1
    rows = index_heads * sizes.group_chunks
    return Inversion(
        counts=memory.new_zeros(rows, sizes.segments, plan.counter_ints(sizes.segments), dtype=torch.int32),
        ranks=int32(index_heads, sizes.group_tokens, num_slots),
        used=int32(index_heads, sizes.group_tokens, sizes.used_words),
        pairs=int32(index_heads, sizes.group_tokens * num_slots),
        offsets=int32(rows, sizes.segments + 1),
        item_offsets=int32(rows, sizes.segments + 1),
        items=int32(rows, sizes.max_items, plan.RECORD_INTS if sizes.is_buffered else 1),
        kept_left=kept_left,
    )


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def store_offsets(offsets_ptr, segments, inside, first, sizes):
    """Writes where each segment begins, the first of them at ``first``; returns where the last one ends."""
    tl.store(offsets_ptr + segments, first + tl.cumsum(sizes, 0) - sizes, mask=inside)
    return first + tl.sum(sizes, 0)


@triton.jit
def load_item(pairs_ptr, offsets_ptr, item_offsets_ptr, segment, item, PAIRS_PER_ITEM: tl.constexpr):
    """Where an item's pairs begin, and how many are left there of its segment's."""
    first_pair = (item - tl.load(item_offsets_ptr + segment)) * PAIRS_PER_ITEM
    segment_start = tl.load(offsets_ptr + segment)
    num_pairs = tl.load(offsets_ptr + segment + 1) - segment_start - first_pair
    return pairs_ptr + (segment_start + first_pair), num_pairs


@kernel
def _count(
    indices_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    counts_ptr,
    left_ptr,
    ranks_ptr,
    first_token,
    first_row_token,
    num_tokens,
    chunk_tokens,
    head_stride,
    num_slots,
    num_sequences,
    search_steps,
    num_segments,
    num_chunks,
    first_head,
    group_pairs,
    counter_ints,
    BLOCK_SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    MARK_UNUSED: tl.constexpr,
    OF_LEFTOVER: tl.constexpr,
):
    if OF_LEFTOVER:  # noqa: SIM102 - the first condition is known when the kernel is compiled
        if tl.load(left_ptr + LEFT) == 0:
            return
    rows, segments, inside, places = load_segments(
        indices_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, first_token, first_row_token, num_tokens,
        chunk_tokens, head_stride, num_slots, num_sequences, search_steps, num_segments, num_chunks,
        first_head, BLOCK_SIZE, TOKENS, SLOTS,
    )  # fmt: skip
    # No condition of both: the first is known when the kernel is compiled.
    if not MARK_UNUSED:  # noqa: SIM102
        if tl.max(tl.max(segments, 1), 0) < 0:
            return
    counters = tl.where(segments >= 0, rows[:, None] * num_segments + segments, -1)
    # Neighbouring tokens often choose the same block in the same slot (block 0 always), and atomics on one
    # address wait for each other. So each run of equal counters down a column adds its length once.
    line = tl.arange(0, TOKENS)[:, None] + tl.zeros_like(counters)
    is_head = (line == 0) | (counters != tl.gather(counters, tl.maximum(line - 1, 0), 0))
    is_tail = (line == TOKENS - 1) | (counters != tl.gather(counters, tl.minimum(line + 1, TOKENS - 1), 0))
    head_line = tl.associative_scan(tl.where(is_head, line, 0), 0, larger)
    tail_line = tl.associative_scan(tl.where(is_tail, line, TOKENS), 0, _smaller, reverse=True)
    counts = counts_ptr + counters * counter_ints
    base = tl.atomic_add(counts, tail_line - line + 1, mask=is_head & (counters >= 0), sem="relaxed")
    rank = tl.gather(base, head_line, 0) + line - head_line
    ranks = ranks_ptr + tl.program_id(2).to(tl.int64) * group_pairs + places
    if MARK_UNUSED:
        tl.store(ranks, tl.where(counters >= 0, rank, -1), mask=inside)
    else:
        tl.store(ranks, rank, mask=counters >= 0)


@kernel
def _scan(
    counts_ptr,
    left_ptr,
    offsets_ptr,
    item_offsets_ptr,
    num_segments,
    counter_ints,
    PAIRS_PER_ITEM: tl.constexpr,
    SEGMENTS: tl.constexpr,
    OF_LEFTOVER: tl.constexpr,
):
    row = tl.program_id(0)
    offsets_ptr += row * (num_segments + 1)
    item_offsets_ptr += row * (num_segments + 1)
    if OF_LEFTOVER:  # noqa: SIM102 - as above
        if tl.load(left_ptr + LEFT) == 0:
            tl.store(item_offsets_ptr + num_segments, 0)
            return
    counts_ptr += row * num_segments * counter_ints
    offset = 0
    item_offset = 0
    segments = tl.arange(0, SEGMENTS)
    counts = tl.load(counts_ptr + segments * counter_ints, mask=segments < num_segments, other=0)
    for start in range(0, num_segments, SEGMENTS):
        segments = start + tl.arange(0, SEGMENTS)
        inside = segments < num_segments
        # On its way while these are added up; zeros are written behind it.
        following = segments + SEGMENTS
        next_counts = tl.load(counts_ptr + following * counter_ints, mask=following < num_segments, other=0)
        tl.store(counts_ptr + segments * counter_ints, tl.zeros_like(counts), mask=inside)
        items = (counts + PAIRS_PER_ITEM - 1) // PAIRS_PER_ITEM
        offset = store_offsets(offsets_ptr, segments, inside, offset, counts)
        item_offset = store_offsets(item_offsets_ptr, segments, inside, item_offset, items)
        counts = next_counts
    tl.store(offsets_ptr + num_segments, offset)
    tl.store(item_offsets_ptr + num_segments, item_offset)


@triton.jit
def _store_words(used_ptr, valid, num_tokens, words, group_words, TOKENS: tl.constexpr, SLOTS: tl.constexpr):
    """Which slots of a program's tokens select something, a bit each."""
    in_word: tl.constexpr = min(SLOTS, 32)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    by_words = tl.reshape(valid.to(tl.int32), (TOKENS, SLOTS // in_word, in_word))
    bits = tl.sum(by_words << tl.arange(0, in_word)[None, None, :], 2)
    word = tl.program_id(1) * (SLOTS // in_word) + tl.arange(0, SLOTS // in_word)
    used_ptr += tl.program_id(2).to(tl.int64) * group_words
    mask = (tokens < num_tokens)[:, None] & (word < words)[None, :]
    tl.store(used_ptr + ((tokens * words)[:, None] + word[None, :]), bits, mask=mask)


@triton.jit
def _store_records(
    records,
    starts_item,
    offset,
    rank,
    end,
    segments,
    packed_tokens,
    first_token_of_chunk,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    num_sequences,
    search_steps,
    BLOCK_SIZE: tl.constexpr,
    PAIRS_PER_ITEM: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Writes the record of each item that a pair starts. A segment's pairs lie from ``offset`` to ``end``."""
    sequences = find_sequence(cu_seqlens_q_ptr, packed_tokens, num_sequences, search_steps)
    k_start = tl.load(cu_seqlens_k_ptr + sequences)
    k_length = tl.load(cu_seqlens_k_ptr + sequences + 1) - k_start
    q_end = tl.load(cu_seqlens_q_ptr + sequences + 1)
    first = first_segment(cu_seqlens_k_ptr, sequences, BLOCK_SIZE)
    block_start = (segments - first[:, None]) * BLOCK_SIZE
    last_key = first_token_of_chunk + k_length - q_end if CAUSAL else k_length - 1
    num_keys = tl.minimum(k_length[:, None] - block_start, BLOCK_SIZE)
    num_pairs = tl.minimum(end - offset - rank, PAIRS_PER_ITEM)
    tl.store(records, offset + rank, mask=starts_item)
    tl.store(records + 1, num_keys | (num_pairs << RECORD_PAIRS_BIT), mask=starts_item)
    tl.store(records + 2, k_start[:, None] + block_start, mask=starts_item)
    tl.store(records + 3, last_key[:, None] - block_start, mask=starts_item)


@kernel
def _scatter(
    indices_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    counts_ptr,
    left_ptr,
    ranks_ptr,
    offsets_ptr,
    item_offsets_ptr,
    pairs_ptr,
    items_ptr,
    used_ptr,
    first_token,
    first_row_token,
    num_tokens,
    chunk_tokens,
    head_stride,
    num_slots,
    num_sequences,
    search_steps,
    num_segments,
    num_chunks,
    first_head,
    group_pairs,
    max_items,
    used_words,
    BLOCK_SIZE: tl.constexpr,
    PAIRS_PER_ITEM: tl.constexpr,
    TOKENS: tl.constexpr,
    SLOTS: tl.constexpr,
    MARK_UNUSED: tl.constexpr,
    WITH_WORDS: tl.constexpr,
    WITH_RECORDS: tl.constexpr,
    CAUSAL: tl.constexpr,
    OF_LEFTOVER: tl.constexpr,
):
    if OF_LEFTOVER:  # noqa: SIM102 - as above
        if tl.load(left_ptr + LEFT) == 0:
            return
    rows, segments, _, places = load_segments(
        indices_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, first_token, first_row_token, num_tokens,
        chunk_tokens, head_stride, num_slots, num_sequences, search_steps, num_segments, num_chunks,
        first_head, BLOCK_SIZE, TOKENS, SLOTS,
    )  # fmt: skip
    valid = segments >= 0
    if WITH_WORDS:
        # As many tokens as there is room for pairs of.
        group_words = (group_pairs // num_slots) * used_words
        _store_words(used_ptr, valid, num_tokens, used_words, group_words, TOKENS, SLOTS)
    if not MARK_UNUSED:  # noqa: SIM102
        if tl.max(tl.max(segments, 1), 0) < 0:
            return
    entries = rows[:, None] * (num_segments + 1) + segments
    first_pair = tl.program_id(2).to(tl.int64) * group_pairs
    rank = tl.load(ranks_ptr + first_pair + places, mask=valid, other=0)
    # Places count from the group's first token, a chunk's pairs from the chunk's.
    chunk_token = (rows - tl.program_id(2) * num_chunks) * chunk_tokens
    offset = tl.load(offsets_ptr + entries, mask=valid, other=0)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS) - chunk_token
    slots = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    pairs = (tokens << SLOT_BITS)[:, None] | slots[None, :]
    chunk_start = (chunk_token * num_slots)[:, None]
    tl.store(pairs_ptr + first_pair + chunk_start + offset + rank, pairs, mask=valid)
    # The first pair of a work item says what the item is.
    starts_item = valid & (rank % PAIRS_PER_ITEM == 0)
    item = tl.load(item_offsets_ptr + entries, mask=starts_item, other=0) + rank // PAIRS_PER_ITEM
    item += rows.to(tl.int64)[:, None] * max_items
    if WITH_RECORDS:
        end = tl.load(offsets_ptr + entries + 1, mask=starts_item, other=0)
        _store_records(
            items_ptr + item * RECORD_INTS, starts_item, offset, rank, end, segments,
            first_token + tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), first_token + chunk_token,
            cu_seqlens_q_ptr, cu_seqlens_k_ptr, num_sequences, search_steps, BLOCK_SIZE, PAIRS_PER_ITEM,
            CAUSAL,
        )  # fmt: skip
    else:
        tl.store(items_ptr + item, segments, mask=starts_item)


def invert(
    inversion: Inversion,
    block_indices: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    first_token: int,
    num_tokens: int,
    first_head: int,
    num_heads: int,
    chunk_tokens: int,
    block_size: int,
    pairs_per_item: int,
    causal: bool,
    first_row_token: int = 0,
    mark_unused: bool = True,
    of_leftover: bool = False,
) -> None:
    """Fills ``inversion`` for ``num_tokens`` tokens from ``first_token``, in chunks of ``chunk_tokens``.

    ``block_indices`` is int32 [index_heads, rows, slots], contiguous, a row for each packed token from
    ``first_row_token`` on; ``num_heads`` index heads from ``first_head`` on are inverted. ``mark_unused``:
    slots that select nothing have rank -1; without it, they have none, and where nothing is selected nothing
    is done but to say so in ``used``. ``of_leftover``: if query tiles left anything (LEFT), else only that
    there are no items is written.
    """
    num_slots = block_indices.shape[2]
    num_chunks = inversion.counts.shape[0] // inversion.ranks.shape[0]
    num_segments, counter_ints = inversion.counts.shape[1:]
    num_sequences = cu_seqlens_q.numel() - 1
    # Plain arithmetic here and in the other launchers: triton.cdiv costs the host 4 microseconds a call.
    slots = min(1 << (num_slots - 1).bit_length(), MAX_SLOTS_IN_TILE)
    tokens = PAIRS_IN_TILE // slots
    grid = (-(-num_tokens // tokens), -(-num_slots // slots), num_heads)
    sizes = (
        first_token, first_row_token, num_tokens, chunk_tokens, block_indices.stride(0), num_slots,
        num_sequences, search_steps(num_sequences), num_segments, num_chunks, first_head,
        inversion.pairs.shape[1],
    )  # fmt: skip
    words, numbers = inversion.used.shape[2], inversion.items.shape[2]
    count, scan, scatter = _kernels(
        block_size, pairs_per_item, tokens, slots, mark_unused, words > 0, numbers > 1, causal, of_leftover
    )
    count[grid](
        block_indices, cu_seqlens_q, cu_seqlens_k, inversion.counts, inversion.left, inversion.ranks, *sizes,
        counter_ints,
    )  # fmt: skip
    scan[(num_heads * num_chunks,)](
        inversion.counts, inversion.left, inversion.offsets, inversion.item_offsets, num_segments,
        counter_ints,
    )  # fmt: skip
    scatter[grid](
        block_indices, cu_seqlens_q, cu_seqlens_k, inversion.counts, inversion.left, inversion.ranks,
        inversion.offsets, inversion.item_offsets, inversion.pairs, inversion.items, inversion.used, *sizes,
        inversion.items.shape[1], words,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _kernels(
    block_size: int,
    pairs_per_item: int,
    tokens: int,
    slots: int,
    mark_unused: bool,
    with_words: bool,
    with_records: bool,
    causal: bool,
    of_leftover: bool,
) -> tuple[BoundKernel, ...]:
    """The three kernels with their constants."""
    tile = {
        "BLOCK_SIZE": block_size, "TOKENS": tokens, "SLOTS": slots, "MARK_UNUSED": mark_unused,
        "OF_LEFTOVER": of_leftover,
    }  # fmt: skip
    item = {"PAIRS_PER_ITEM": pairs_per_item, "WITH_RECORDS": with_records}
    return (
        _count.bind(**tile),
        _scan.bind(PAIRS_PER_ITEM=pairs_per_item, SEGMENTS=SEGMENTS_IN_TILE, OF_LEFTOVER=of_leftover),
        _scatter.bind(**tile, **item, WITH_WORDS=with_words, CAUSAL=causal and with_records),
    )
