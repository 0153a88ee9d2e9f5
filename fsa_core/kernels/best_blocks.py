"""The best of the blocks of a row of scores, in registers: what selection does with what windows weigh.

A step has products of queries with windows, float32 [tokens, blocks]. The four threads of a quad have a row's
columns between them, and columns are dealt so that each of the four has a run of neighbouring blocks. What
follows works on tuples of [tokens, 4]: every thread's first block, its second, and so on; numbers do not move
between threads but for the one at the end of a thread's run.

A candidate is an int64: the bits of a block's importance, a float32 that is never negative, above its id,
counted down from the highest, so that of equals the lower id is better. What is not forced lies below zero.
"""

import triton
import triton.language as tl

NOT_FORCED = tl.constexpr(-0x7F800001)
MAX_ID = tl.constexpr((1 << 31) - 1)
# Under all candidates.
NONE = tl.constexpr(-(1 << 63))
# Up to so many a row, each thread keeps the best of its own: as many as may all be the row's.
MOST_BY_THREAD = 16


@triton.jit
def block_of_column(column, BLOCKS: tl.constexpr):
    """Which of a step's blocks has this column of its products.

    Of every eight columns of a row a thread has two that are neighbours, and its quad the others.
    """
    return column % 8 // 2 * (BLOCKS // 4) + column // 8 * 2 + column % 2


@triton.jit
def _of_quad(x):
    """[tokens, columns] as a tuple of [tokens, 4]: the first of each thread's blocks, the second, ..."""
    by_thread = tl.trans(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 4, 2)), (0, 2, 1, 3))
    return unjoined(tl.reshape(by_thread, (x.shape[0], 4, x.shape[1] // 4)))


@triton.jit
def unjoined(x):
    """[tokens, threads, n] as a tuple of n [tokens, threads]."""
    if x.shape[2] == 1:
        return (tl.reshape(x, (x.shape[0], x.shape[1])),)
    else:
        halves = tl.reshape(x, (x.shape[0], x.shape[1], 2, x.shape[2] // 2))
        left, right = tl.split(tl.trans(halves, (0, 1, 3, 2)))
        return unjoined(left) + unjoined(right)


@triton.jit
def joined(parts):
    """A tuple of n [tokens, m] as [tokens, m * n], part after part in the order of n; n is a power of two."""
    if len(parts) == 1:
        return parts[0]
    else:
        pair = tl.join(joined(parts[::2]), joined(parts[1::2]))
        return tl.reshape(pair, (pair.shape[0], pair.shape[1] * 2))


@triton.jit
def add_weights(given, weights, OFFSET: tl.constexpr, PER_BLOCK: tl.constexpr, BEFORE: tl.constexpr):
    """Adds the weights of windows to what they give to the block they begin in, the next, and so on.

    The windows begin ``OFFSET`` strides after the blocks, and end BEFORE strides after those; a block has
    PER_BLOCK. A window counts in a block as often as the two share a stride.
    """
    added = ()
    for i in tl.static_range(len(given)):
        first = i * PER_BLOCK if i * PER_BLOCK > OFFSET else OFFSET
        end = OFFSET + BEFORE + 1 if (i + 1) * PER_BLOCK > OFFSET + BEFORE else (i + 1) * PER_BLOCK
        # As one operation: doubled alone, a number is added to itself.
        add = tl.fma(weights, (end - first) * 1.0, given[i]) if end > first else given[i]
        added = added + (add,)  # type: ignore[assignment]
    return added


@triton.jit
def _shifted(parts, carried, thread):
    """Of ``parts`` what the block before has, and what the next step is to carry.

    ``carried`` [tokens] is what the last block of the step before has; ``thread`` [1, 4] counts from 0.
    """
    last = parts[len(parts) - 1]
    first = tl.broadcast_to(carried[:, None], last.shape)
    for i in tl.static_range(4):
        # Through a sum, whatever the compiler makes of where numbers lie.
        of_thread = tl.sum(tl.where(thread == i, last, 0.0), 1)
        first = tl.where(thread == i + 1, of_thread[:, None], first)
    shifted = (first,)
    for i in tl.static_range(len(parts) - 1):
        shifted = shifted + (parts[i],)
    return shifted, of_thread


@triton.jit
def importance_of(given, carried, row_share, thread, GROUP_SIZE: tl.constexpr):
    """The importance of a step's blocks, a tuple of [tokens, 4], and what the next step is to carry.

    given: of the windows of a step's blocks, what they give to their block, to the next, and so on: a tuple
    of [tokens, blocks]. Of one head alone it is divided by the row's sum here, when all is added: sums of
    powers of two are exact.
    """
    reach: tl.constexpr = len(given) - 1
    total = _of_quad(given[reach])
    to_carry = ()
    for i in tl.static_range(reach):
        shifted, last = _shifted(total, carried[i], thread)
        to_carry = to_carry + (last,)  # type: ignore[assignment]
        own = _of_quad(given[reach - 1 - i])
        total = ()
        for j in tl.static_range(len(own)):
            total = total + (own[j] + shifted[j],)
    importance = ()
    for j in tl.static_range(len(total)):
        block = total[j]
        if GROUP_SIZE == 1:
            block *= row_share[:, None]
        # A row of NaN selects as if all were equal.
        importance = importance + (tl.where(block == block, block, 0.0),)  # type: ignore[assignment]
    return importance, to_carry


@triton.jit
def candidates_of(importance, first_block, own, thread, NUM_FIRST: tl.constexpr, NUM_LOCAL: tl.constexpr):
    """Importance and id of a step's blocks up to each token's own, ``own`` [tokens]."""
    width: tl.constexpr = len(importance)
    candidates = ()
    for i in tl.static_range(width):
        block = thread * width + (first_block + i)
        is_forced = (block < NUM_FIRST) | (block > own[:, None] - NUM_LOCAL)
        bits = importance[i].to(tl.int32, bitcast=True)
        high = tl.where(is_forced, bits, bits + NOT_FORCED)
        candidate = (high.to(tl.int64) << 32) | (-block + MAX_ID).to(tl.int64)
        candidate = tl.where(block <= own[:, None], candidate, NONE)
        candidates = candidates + (candidate,)  # type: ignore[assignment]
    return candidates


@triton.jit
def _in_order(a, b):
    better = tl.maximum(a, b)
    # What is left of both: a minimum would compare again.
    return better, a ^ b ^ better


@triton.jit
def _merged(a, b):
    """Two tuples of as many, the best first, as one: Batcher's odd-even merge, number by number."""
    if len(a) == 1:
        return _in_order(a[0], b[0])
    else:
        even = _merged(a[::2], b[::2])
        odd = _merged(a[1::2], b[1::2])
        merged = (even[0],)
        for i in tl.static_range(len(odd) - 1):
            merged = merged + _in_order(odd[i], even[i + 1])
        return merged + (odd[len(odd) - 1],)


@triton.jit
def in_order(items):
    """The best first."""
    if len(items) == 1:
        return items
    else:
        half: tl.constexpr = len(items) // 2
        return _merged(in_order(items[:half]), in_order(items[half:]))


@triton.jit
def _bitonic_in_order(items):
    """The best first, of items that fall and then rise or the reverse, a power of two of them (Batcher)."""
    if len(items) == 1:
        return items
    else:
        half: tl.constexpr = len(items) // 2
        better = ()
        worse = ()
        for i in tl.static_range(half):
            pair = _in_order(items[i], items[half + i])
            better = better + (pair[0],)
            worse = worse + (pair[1],)
        return _bitonic_in_order(better) + _bitonic_in_order(worse)


@triton.jit
def keep_best(best, candidates):
    """Of each thread's blocks alone, those that could be among the best of a row.

    ``best``: a tuple of candidates, the best first. What is done does not depend on the numbers.
    """
    slots: tl.constexpr = len(best)
    new = in_order(candidates)[:slots]
    # Of the two, one's last against the other's first, the best: they fall and then rise, or the reverse.
    kept = best[: slots - len(new)]
    for i in tl.static_range(len(new)):
        kept = kept + (tl.maximum(best[slots - len(new) + i], new[len(new) - 1 - i]),)
    return _bitonic_in_order(kept)


@triton.jit
def best_of_row(best, TOP_K: tl.constexpr):
    """The best ``TOP_K`` of what a row's threads keep, then NONE: a tuple of as many int64 [tokens]."""
    slots: tl.constexpr = len(best)
    chosen = ()
    for _ in tl.static_range(TOP_K):
        head = tl.max(best[0], 1)
        chosen = chosen + (head,)  # type: ignore[assignment]
        is_taken = best[0] == head[:, None]
        rest = ()
        for i in tl.static_range(len(best) - 1):
            rest = rest + (tl.where(is_taken, best[i + 1], best[i]),)  # type: ignore[assignment]
        # A thread's last one is not asked for again: it has been taken, or TOP_K others were.
        best = rest + (best[len(best) - 1],)
    for _ in tl.static_range(slots - TOP_K):
        chosen = chosen + (chosen[0] * 0 + NONE,)  # type: ignore[assignment, misc]
    return chosen
