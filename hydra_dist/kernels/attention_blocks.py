"""Which blocks of the score matrix a mask leaves, found by the kernels themselves while they run.

The rows of a block of queries or keys are summed up by four bounds: the least and the greatest position, and the least
and the greatest document start. From the bounds of two blocks follows whether no pair is allowed, every pair is, or
some may be. A row of blocks is walked in runs of one kind: blocks in which every pair is allowed need no mask, and
those in which none is are not visited.

Positions may lie in any order (a rank of a zigzag layout holds two runs of them, gathered keys many). A block is
visited without need only where its bounds overlap and its rows do not, as where it spans the seam between two runs.
"""
# mypy: allow-untyped-defs

import triton
import triton.language as tl


@triton.jit
def bounds_kernel(positions, starts, bounds, length, num_blocks, BLOCK: tl.constexpr):
    """The bounds of one block of rows: of its positions and, where there are documents, of its document starts."""
    block, batch = tl.program_id(0), tl.program_id(1)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    inside = rows < length
    position = row_positions(positions, rows, length)
    to = bounds + batch * 4 * num_blocks + block
    tl.store(to, tl.min(tl.where(inside, position, 2147483647), 0))
    tl.store(to + num_blocks, tl.max(tl.where(inside, position, -2147483647), 0))
    if starts is not None:
        start = tl.load(starts + batch.to(tl.int64) * length + rows, mask=inside, other=0)
        tl.store(to + 2 * num_blocks, tl.min(tl.where(inside, start, 2147483647), 0))
        tl.store(to + 3 * num_blocks, tl.max(tl.where(inside, start, -2147483647), 0))


@triton.jit
def ranges_kernel(
    ranges,
    own_bounds,
    other_bounds,
    own_bounds_batch,
    other_bounds_batch,
    num_own,
    num_other,
    window,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    OWN_IS_QUERIES: tl.constexpr,
    SCAN: tl.constexpr,
):
    """The first of the other side's blocks that one block visits, and the one after the last."""
    block, batch = tl.program_id(0), tl.program_id(1)
    own_bounds += batch * own_bounds_batch + block
    other_bounds += batch * other_bounds_batch
    first, stop = num_other, 0
    for start in range(0, num_other, SCAN):
        index = start + tl.arange(0, SCAN)
        some, _ = block_kinds(
            own_bounds,
            num_own,
            other_bounds,
            num_other,
            index,
            num_other,
            0,
            window,
            CAUSAL,
            DOCUMENTS,
            OWN_IS_QUERIES,
        )
        first = tl.minimum(first, tl.min(tl.where(some, index, num_other), 0))
        stop = tl.maximum(stop, tl.max(tl.where(some, index + 1, 0), 0))
    to = ranges + (batch * num_own + block) * 2
    tl.store(to, first)
    tl.store(to + 1, stop)


@triton.jit
def row_positions(positions, rows, length):
    """The global positions of rows; those past the end are never used."""
    if positions is None:
        return rows
    else:
        return tl.load(positions + rows, mask=rows < length, other=0)


@triton.jit
def row_starts(starts, rows, length):
    """The document starts of rows of one batch row; without documents all are the same."""
    if starts is None:
        return rows * 0
    else:
        return tl.load(starts + rows, mask=rows < length, other=-1)


@triton.jit
def allowed(q_position, k_position, q_start, k_start, window, CAUSAL: tl.constexpr):
    """Which pairs attention computes, for columns of queries against rows of keys, or the other way round.

    Positions are compared and not subtracted: a difference would be a number in a register for each pair.
    """
    pairs = q_start == k_start
    if CAUSAL:
        pairs = pairs & (q_position >= k_position)
    if window is not None:
        pairs = pairs & (q_position - window < k_position)
    return pairs


@triton.jit
def block_kinds(
    own,
    num_own,
    other,
    num_other,
    index,
    limit,
    num_complete,
    window,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    OWN_IS_QUERIES: tl.constexpr,
):
    """For blocks ``index`` of the other side, whether some pair may be allowed, and whether every pair is.

    ``own`` points at the bounds of one block, ``other`` at those of all blocks of one batch row. Blocks from ``limit``
    on have no pair, and those from ``num_complete`` on are not called whole.
    """
    inside = index < limit
    own_least, own_greatest = tl.load(own), tl.load(own + num_own)
    least = tl.load(other + index, mask=inside, other=0)
    greatest = tl.load(other + num_other + index, mask=inside, other=0)
    if OWN_IS_QUERIES:
        nearest, farthest = own_least - greatest, own_greatest - least
    else:
        nearest, farthest = least - own_greatest, greatest - own_least
    some = inside
    every = inside & (index < num_complete)
    if CAUSAL:
        some = some & (farthest >= 0)
        every = every & (nearest >= 0)
    if window is not None:
        some = some & (nearest < window)
        every = every & (farthest < window)
    if DOCUMENTS:
        own_first, own_last = tl.load(own + 2 * num_own), tl.load(own + 3 * num_own)
        first = tl.load(other + 2 * num_other + index, mask=inside, other=0)
        last = tl.load(other + 3 * num_other + index, mask=inside, other=0)
        some = some & (first <= own_last) & (own_first <= last)
        every = every & (own_first == own_last) & (first == last) & (own_first == first)
    return some, every


@triton.jit
def next_runs(
    cursor,
    stop,
    own,
    num_own,
    other,
    num_other,
    num_complete,
    window,
    CAUSAL: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    OWN_IS_QUERIES: tl.constexpr,
    SCAN: tl.constexpr,
):
    """From block ``cursor`` on: where the blocks end of which every pair is allowed, where those after them end of
    which some may be, and where the next block to visit lies. At most SCAN blocks are looked at, none from ``stop`` on.
    """
    index = cursor + tl.arange(0, SCAN)
    limit = tl.minimum(cursor + SCAN, stop)
    some, every = block_kinds(
        own, num_own, other, num_other, index, limit, num_complete, window, CAUSAL, DOCUMENTS, OWN_IS_QUERIES
    )
    whole_stop = tl.min(tl.where(every, limit, tl.minimum(index, limit)), 0)
    part = (some & (every == 0)) | (index < whole_stop)
    part_stop = tl.min(tl.where(part, limit, tl.minimum(index, limit)), 0)
    following = tl.min(tl.where(some & (index >= part_stop), index, limit), 0)
    return whole_stop, part_stop, following


@triton.jit
def load_rows(
    x,
    x_row,
    first,
    length,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """[BLOCK, BLOCK_D]: rows of one head from ``first`` on; zeros past its columns and, where RAGGED, its rows."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    place = x + first * tl.cast(x_row, tl.int64) + row * x_row + column
    if RAGGED:
        return tl.load(place, mask=(first + row < length) & (column < HEAD_DIM), other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(place, mask=(column < HEAD_DIM) & (row >= 0), other=0.0)
    else:
        return tl.load(place)
