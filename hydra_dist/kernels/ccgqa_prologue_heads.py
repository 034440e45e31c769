"""What one program of the CCGQA prologue's forward does: a share of the rows of one head, or of the value channels."""

# mypy: allow-untyped-defs, disable-error-code="assignment,misc,var-annotated"

import triton
import triton.language as tl

from hydra_dist.kernels.ccgqa_prologue_rows import begins_a_chunk, channel_of, locate, rotated, row_before, rows_at


@triton.jit
def head_rows(
    p, z_before, ages, w0, b0, w1, b1, beta, cos, sin, out, inv, batch_size, num_rows, first_chunk,
    p_batch_stride, p_row_stride, eps, head, split, num_splits,
    IS_KEY: tl.constexpr, NUM_QUERY_HEADS: tl.constexpr, NUM_KEY_HEADS: tl.constexpr, D: tl.constexpr,
    K0: tl.constexpr, K1: tl.constexpr, HALF: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """One head's rows, every ``num_splits``-th tile from ``split`` on."""
    NUM_HEADS: tl.constexpr = NUM_QUERY_HEADS + NUM_KEY_HEADS
    GROUP: tl.constexpr = NUM_QUERY_HEADS // NUM_KEY_HEADS
    HEADS_OUT: tl.constexpr = NUM_KEY_HEADS if IS_KEY else NUM_QUERY_HEADS
    PARTNERS: tl.constexpr = GROUP if IS_KEY else 1
    latent_head = head + NUM_QUERY_HEADS if IS_KEY else head
    first_partner = head * GROUP if IS_KEY else NUM_QUERY_HEADS + head // GROUP
    PAIRS: tl.constexpr = LANES // 2
    pair = tl.arange(0, PAIRS)
    whole = pair < D // 2
    channels = (channel_of(pair, 0, HALF, D), channel_of(pair, 1, HALF, D))
    weights = ()
    if w1 is not None and RESIDENT:
        for delay in tl.static_range(K1):
            for block in tl.static_range(BLOCKS):
                weights = weights + (_weight(w1, latent_head, delay, block, p, HALF, D, K1, CHANNELS, LANES),)
    tiles_per_batch = tl.cdiv(num_rows, ROWS)
    for tile in range(split, batch_size * tiles_per_batch, num_splits):
        batch, row, near, chunk, offset, _, exists = locate(
            tile, tiles_per_batch, 0, num_rows, num_rows, first_chunk, 0, ROWS
        )
        rows = p + batch * p_batch_stride + (row + near) * p_row_stride
        at = batch * num_rows + row + near
        there = exists[:, None] & whole[None, :]
        y = (tl.zeros((ROWS, PAIRS), tl.float32), tl.zeros((ROWS, PAIRS), tl.float32))
        if w1 is not None:
            y = _convolved(
                weights, rows, p, z_before, ages, w0, b0, w1, tile, batch, chunk, offset, at, exists, num_rows,
                first_chunk, latent_head, p_row_stride,
                NUM_HEADS * D, D, K0, K1, HALF, ROWS, CHANNELS, BLOCKS, LANES, RESIDENT,
            )  # fmt: skip
        summed = ()
        length = tl.zeros((ROWS,), tl.float32)
        for side in tl.static_range(2):
            own = latent_head * D + channels[side]
            part = y[side]
            if w1 is None:
                part += tl.load(rows[:, None] + own[None, :], mask=there, other=0.0).to(tl.float32)
            else:
                part += tl.load(b1 + own, mask=whole, other=0.0).to(tl.float32)[None, :]
            if MEAN:
                mean = tl.load(rows[:, None] + own[None, :], mask=there, other=0.0).to(tl.float32)
                for partner in tl.static_range(PARTNERS):
                    theirs = (first_partner + partner) * D + channels[side]
                    z = tl.load(rows[:, None] + theirs[None, :], mask=there, other=0.0)
                    mean += z.to(tl.float32) * (1.0 / PARTNERS)
                part += 0.5 * mean
            length += tl.sum(part * part, axis=1)
            summed = summed + (part,)
        first, second = summed
        if inv is not None:
            factor = tl.rsqrt(length / D + eps)
            tl.store(inv + at * NUM_HEADS + latent_head, factor, mask=exists)
            if IS_KEY and beta is not None:
                factor *= tl.load(beta + head).to(tl.float32)
            first *= factor[:, None]
            second *= factor[:, None]
        if HALF > 0:
            first, second = rotated(first, second, cos, sin, row, near, exists, HALF, PAIRS, False)
        target = out + ((at * HEADS_OUT + head) * D)[:, None]
        tl.store(target + channels[0][None, :], first.to(out.dtype.element_ty), mask=there)
        tl.store(target + channels[1][None, :], second.to(out.dtype.element_ty), mask=there)


@triton.jit
def _weight(
    w1, head, DELAY: tl.constexpr, BLOCK: tl.constexpr, p, HALF: tl.constexpr, D: tl.constexpr, K1: tl.constexpr,
    CHANNELS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Some input channels of one tap of w1, [CHANNELS, LANES], the two output channels of a pair side by side."""
    inputs = BLOCK * CHANNELS + tl.arange(0, CHANNELS)
    pair = tl.arange(0, LANES // 2)
    tap = w1 + head.to(tl.int64) * (K1 * D * D) + ((K1 - 1 - DELAY) * D + inputs)[:, None] * D
    inside = (inputs < D)[:, None] & (pair < D // 2)[None, :]
    first = tl.load(tap + channel_of(pair, 0, HALF, D)[None, :], mask=inside, other=0.0)
    second = tl.load(tap + channel_of(pair, 1, HALF, D)[None, :], mask=inside, other=0.0)
    return tl.reshape(tl.join(first, second), (CHANNELS, LANES)).to(p.dtype.element_ty)


@triton.jit
def _convolved(
    weights, rows, p, z_before, ages, w0, b0, w1, tile, batch, chunk, offset, at, exists, num_rows, first_chunk,
    latent_head, p_row_stride, C: tl.constexpr, D: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Both convolutions without the second one's bias, as the two sides of a head's pairs."""
    BEFORE: tl.constexpr = K0 + K1 - 2
    leads = begins_a_chunk(tile, tl.cdiv(num_rows, ROWS), 0, num_rows, first_chunk, 0, BEFORE, ROWS)
    age = offset
    if ages is not None:
        age = tl.load(ages + at, mask=exists, other=0).to(tl.int32)
    y = tl.zeros((ROWS, LANES), tl.float32)
    for block in tl.static_range(BLOCKS):
        inputs = block * CHANNELS + tl.arange(0, CHANNELS)
        channels = latent_head * D + inputs
        z = ()
        for delay in tl.static_range(BEFORE + 1):
            mask = exists[:, None] & (inputs < D)[None, :]
            if delay > 0 and ages is not None:
                mask = mask & (age >= delay)[:, None]
            source = (rows - delay * p_row_stride)[:, None] + channels[None, :]
            part = tl.load(source, mask=mask & (offset >= delay)[:, None], other=0.0)
            if delay > 0 and z_before is not None and leads:
                before = row_before(z_before, batch, chunk, offset - delay, num_rows, first_chunk, BEFORE, C)
                early = mask & (offset < delay)[:, None]
                part += tl.load(before[:, None] + channels[None, :], mask=early, other=0.0)
            z = z + (part,)
        for later in tl.static_range(K1):
            u = tl.zeros((ROWS, CHANNELS), tl.float32)
            u += tl.load(b0 + channels, mask=inputs < D, other=0.0).to(tl.float32)[None, :]
            for earlier in tl.static_range(K0):
                factor = tl.load(w0 + channels * K0 + (K0 - 1 - earlier), mask=inputs < D, other=0.0)
                u += z[later + earlier].to(tl.float32) * factor.to(tl.float32)[None, :]
            if RESIDENT:
                weight = weights[later * BLOCKS + block]
            else:
                weight = _weight(w1, latent_head, later, block, p, HALF, D, K1, CHANNELS, LANES)
            y = tl.dot(u.to(weight.dtype), weight, y, input_precision="ieee")
    return tl.split(tl.reshape(y, (ROWS, LANES // 2, 2)))


@triton.jit
def value_rows(
    p, v_before, ages, v, batch_size, num_rows, first_chunk, p_batch_stride, p_row_stride, block, split, num_splits,
    NUM_QUERY_HEADS: tl.constexpr, NUM_KEY_HEADS: tl.constexpr, D: tl.constexpr, SHIFT: tl.constexpr,
    ROWS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """D / 2 channels of the values' first half and as many, a row late, of the second."""
    HALF_SIZE: tl.constexpr = NUM_KEY_HEADS * D // 2
    lanes = tl.arange(0, VALUES)
    channels = block * (D // 2) + lanes
    inside = (lanes < D // 2)[None, :]
    tiles_per_batch = tl.cdiv(num_rows, ROWS)
    for tile in range(split, batch_size * tiles_per_batch, num_splits):
        batch, row, near, chunk, offset, _, exists = locate(
            tile, tiles_per_batch, 0, num_rows, num_rows, first_chunk, 0, ROWS
        )
        rows = rows_at(p + batch * p_batch_stride, row, near, p_row_stride) + (NUM_QUERY_HEADS + NUM_KEY_HEADS) * D
        token = batch * num_rows + row
        target = rows_at(v, token, near, 2 * HALF_SIZE)[:, None] + channels[None, :]
        current = tl.load(rows[:, None] + channels[None, :], mask=exists[:, None] & inside)
        late, read = rows + HALF_SIZE, exists
        if SHIFT:
            late, read = late - p_row_stride, exists & (offset > 0)
            if ages is not None:
                read = read & (tl.load(ages + token + near, mask=exists, other=0) > 0)
        delayed = tl.load(late[:, None] + channels[None, :], mask=read[:, None] & inside, other=0.0)
        if SHIFT and v_before is not None:
            read = exists & (offset == 0)
            if ages is not None:
                read = read & (tl.load(ages + token + near, mask=exists, other=0) > 0)
            before = row_before(v_before, batch, chunk, offset - 1, num_rows, first_chunk, 1, HALF_SIZE)
            delayed += tl.load(before[:, None] + channels[None, :], mask=read[:, None] & inside, other=0.0)
        tl.store(target, current, mask=exists[:, None] & inside)
        tl.store(target + HALF_SIZE, delayed, mask=exists[:, None] & inside)
