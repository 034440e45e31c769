"""The CCGQA prologue in plain PyTorch: forward, and backward written out by hand.

It goes over blocks of rows that stay in the cache, and keeps for backward only what attention keeps anyway: a rotation
changes no dot product, so the normalised queries and keys say everything about their own norm.

In the formulas: y what comes out of the convolutions with the q-k-mean added, inv one over a head's root mean square,
R the rotation, W1_d and db1 the second convolution's taps (d their delay) and the gradient of its bias.

    n = inv y                                  q = R n_q            k = beta R n_k
    dy_q = inv R^T (dq - q (q . dq) / D)       dy_k = inv beta R^T (dk - k (k . dk) / (D beta^2))
    dbeta = sum_t k . dk / beta                db0 = sum_d W1_d db1

Source: Figliolia et al. 2025 (arXiv 2510.04476), section III and listing A.1; the backward is derived from it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hydra_dist.model.convolution import Taps, convolve, convolve_backward
from hydra_dist.model.value_shift import shift, shift_backward

BLOCK_ROWS = 1024
"""Rows of a block: with 192 channels in fp32 one tensor of a block is 0.8 MB."""
FOREVER = 2**30
"""Age of a row that stands before a chunk: what lies outside of the document comes as zeros."""


@dataclass(frozen=True)
class Switches:
    """What a layer computes; Hq query and Hk key heads of D channels, C = (Hq + Hk) D, V = Hk D."""

    num_query_heads: int
    num_key_heads: int
    head_dim: int
    kernel_sizes: tuple[int, int]
    """(1, 1) without convolutions."""
    use_qk_mean: bool
    eps: float | None
    """Added to a head's mean square; None: no norm."""
    value_shift: bool

    @property
    def latent_size(self) -> int:
        return (self.num_query_heads + self.num_key_heads) * self.head_dim

    @property
    def value_size(self) -> int:
        return self.num_key_heads * self.head_dim

    @property
    def num_rows_before(self) -> int:
        return sum(self.kernel_sizes) - 2


@dataclass(frozen=True)
class _Block:
    """Consecutive rows of one chunk of one batch row."""

    batch: int
    chunk: int
    start: int
    stop: int
    offset: int
    """Of the first row, in its chunk."""


def forward(
    p: Tensor,
    z_before: Tensor | None,
    v_before: Tensor | None,
    ages: Tensor | None,
    chunk_lengths: Sequence[int],
    taps: Taps | None,
    beta: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    switches: Switches,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Projection -> what attention takes.

    Args:
        p: [B, S, C + V], latent queries, latent keys and value channels side by side.
        z_before, v_before: [B, chunks, k0 + k1 - 2, C] and [B, chunks, 1, V / 2], the rows before each chunk; None:
            zeros.
        ages: [B, S] int, rows of its document before each row; None: no document begins within the rows.
        chunk_lengths: local rows are these many runs of consecutive positions, one after another.
        taps: None without convolutions.
        beta: [Hk], factor on the normalised keys; None: 1.
        rope: cosines and sines [S, 1, half]; None: no rotation.

    Returns:
        q [B, S, Hq, D], k and v [B, S, Hk, D] in p's dtype; inv [B, S, Hq + Hk] in fp32 or wider (empty without norm).
    """
    wide = torch.promote_types(p.dtype, torch.float32)
    rows, heads, D = p.shape[:2], (switches.num_query_heads, switches.num_key_heads), switches.head_dim
    q, k = p.new_empty(*rows, heads[0], D), p.new_empty(*rows, heads[1], D)
    inv = p.new_empty((*rows, sum(heads)) if switches.eps is not None else 0, dtype=wide)
    for block in _blocks(p.shape[0], chunk_lengths):
        at = (block.batch, slice(block.start, block.stop))
        z = _latent(p, z_before, block, switches).to(wide)
        latent = z[switches.num_rows_before :].unflatten(-1, (-1, D))
        y = latent.clone() if taps is None else convolve(z, _ages(ages, block, switches), taps, p.dtype).to(wide)
        q_y, k_y = y.split(heads, dim=1)
        if switches.use_qk_mean:
            _add_mean(q_y, k_y, latent, switches)
        if switches.eps is not None:
            factor = torch.linalg.vector_norm(y, dim=-1).square_().div_(D).add_(switches.eps).rsqrt_()
            inv[at] = factor
            if beta is not None:
                factor[:, heads[0] :] *= beta.to(wide)
            y.mul_(factor.unsqueeze(-1))
        if rope is not None:
            _rotate(y, rope[0][at[1]], rope[1][at[1]])
        q[at], k[at] = q_y, k_y
    values = p[..., switches.latent_size :]
    if switches.value_shift:
        v = shift(values, v_before, ages, chunk_lengths)
    else:
        v = values.clone(memory_format=torch.contiguous_format)
    return q, k, v.unflatten(-1, (heads[1], D)), inv


def backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    q: Tensor,
    k: Tensor,
    inv: Tensor,
    p: Tensor,
    z_before: Tensor | None,
    v_before: Tensor | None,
    ages: Tensor | None,
    chunk_lengths: Sequence[int],
    taps: Taps | None,
    beta: Tensor | None,
    rope: tuple[Tensor, Tensor] | None,
    switches: Switches,
) -> tuple[Tensor, Tensor | None, Tensor | None, Taps | None, Tensor | None]:
    """Gradients of p, z_before, v_before (in p's dtype), the taps and beta (fp32 or wider); None for what was None."""
    wide = torch.promote_types(p.dtype, torch.float32)
    num_before = switches.num_rows_before
    grad_p = torch.empty_like(p, memory_format=torch.contiguous_format)
    grad_before = None if z_before is None else torch.zeros_like(z_before)
    grad_taps = None
    if taps is not None:
        grad_taps = Taps(*(torch.zeros_like(x, dtype=wide) for x in (taps.w0, taps.b0, taps.w1, taps.b1)))
    grad_beta = None if beta is None else torch.zeros_like(beta, dtype=wide)
    carried = p.new_zeros(num_before, switches.latent_size, dtype=wide)
    # From the last block of a chunk to its first: each hands on what it owes to the rows before it.
    for block in reversed(list(_blocks(p.shape[0], chunk_lengths))):
        at = (block.batch, slice(block.start, block.stop))
        dy = torch.cat([grad_q[at], grad_k[at]], dim=1).to(wide)
        if switches.eps is not None:
            qk = torch.cat([q[at], k[at]], dim=1).to(wide)
            _through_norm(dy, qk, inv[at], beta, grad_beta, switches)
        if rope is not None:
            _rotate(dy, rope[0][at[1]], -rope[1][at[1]])
        dz = dy.new_zeros(num_before + dy.shape[0], switches.latent_size)
        here = dz[num_before:].unflatten(-1, (-1, switches.head_dim))
        if taps is None or grad_taps is None:
            here.copy_(dy)
        else:
            z = _latent(p, z_before, block, switches).to(wide)
            convolve_backward(dy, z, _ages(ages, block, switches), taps, p.dtype, dz, grad_taps)
        if switches.use_qk_mean:
            _add_mean_backward(here, dy, switches)
        if num_before:
            last_of_chunk = block.offset + dy.shape[0] == chunk_lengths[block.chunk]
            if not last_of_chunk:
                dz[-num_before:] += carried
            carried = dz[:num_before]
            if block.offset == 0 and grad_before is not None:
                grad_before[block.batch, block.chunk] = carried
        grad_p[at][:, : switches.latent_size] = dz[num_before:]
    if taps is not None and grad_taps is not None:
        by_tap = taps.w1.to(wide).unflatten(1, (switches.kernel_sizes[1], switches.head_dim)).sum(1)
        grad_taps.b0.copy_(torch.einsum("hio,ho->hi", by_tap, grad_taps.b1).flatten())
    grad_values, grad_v_before = grad_p[..., switches.latent_size :], None
    if switches.value_shift:
        grad_v_before = shift_backward(grad_v.flatten(2), grad_values, v_before, ages, chunk_lengths)
    else:
        grad_values.copy_(grad_v.flatten(2))
    return grad_p, grad_before, grad_v_before, grad_taps, grad_beta


def _blocks(batch_size: int, chunk_lengths: Sequence[int]) -> Iterator[_Block]:
    for batch in range(batch_size):
        first = 0
        for chunk, length in enumerate(chunk_lengths):
            for offset in range(0, length, BLOCK_ROWS):
                stop = min(offset + BLOCK_ROWS, length)
                yield _Block(batch, chunk, first + offset, first + stop, offset)
            first += length


def _latent(p: Tensor, z_before: Tensor | None, block: _Block, switches: Switches) -> Tensor:
    """The block's rows of z behind the rows that its convolutions read, [h + n, C]."""
    num_before = switches.num_rows_before
    missing = max(0, num_before - block.offset)
    first = block.start - (num_before - missing)
    rows = p[block.batch, first : block.stop, : switches.latent_size]
    if not missing:
        return rows
    if z_before is None:
        before = rows.new_zeros(missing, switches.latent_size)
    else:
        before = z_before[block.batch, block.chunk, num_before - missing :][:missing]
    return torch.cat([before, rows])


def _ages(ages: Tensor | None, block: _Block, switches: Switches) -> Tensor | None:
    """Ages [h + n, 1] of the rows of ``_latent``; None where all taps of the block stay inside their documents."""
    num_before = switches.num_rows_before
    if ages is None or not num_before:
        return None
    missing = max(0, num_before - block.offset)
    rows = ages[block.batch, block.start - (num_before - missing) : block.stop]
    if not bool((rows < num_before).any()):
        return None
    return torch.cat([rows.new_full((missing,), FOREVER), rows]).unsqueeze(-1)


def _grouped(y: Tensor, switches: Switches) -> tuple[Tensor, Tensor]:
    """[n, heads, D] -> queries [n, Hk, g, D] and keys [n, Hk, D], views."""
    q, k = y.split((switches.num_query_heads, switches.num_key_heads), dim=1)
    return q.unflatten(1, (switches.num_key_heads, -1)), k


def _add_mean(q_y: Tensor, k_y: Tensor, latent: Tensor, switches: Switches) -> None:
    """Add half of (own + the group's other side) of the latents from before the convolutions."""
    latent_q, latent_k = _grouped(latent, switches)
    group = latent_q.shape[2]
    grouped = q_y.unflatten(1, latent_q.shape[1:3])
    grouped.add_(latent_q, alpha=0.5).add_(latent_k.unsqueeze(2), alpha=0.5)
    k_y.add_(latent_k, alpha=0.5).add_(latent_q.sum(2), alpha=0.5 / group)


def _add_mean_backward(dz: Tensor, dy: Tensor, switches: Switches) -> None:
    dz_q, dz_k = _grouped(dz, switches)
    dy_q, dy_k = _grouped(dy, switches)
    dz_q.add_(dy_q, alpha=0.5).add_(dy_k.unsqueeze(2), alpha=0.5 / dy_q.shape[2])
    dz_k.add_(dy_k, alpha=0.5).add_(dy_q.sum(2), alpha=0.5)


def _through_norm(
    dy: Tensor, qk: Tensor, inv: Tensor, beta: Tensor | None, grad_beta: Tensor | None, switches: Switches
) -> None:
    """Gradients of normalised rows [n, heads, D] become those of the rows before the norm, in place."""
    along = torch.linalg.vecdot(dy, qk)
    share, factor = along / switches.head_dim, inv
    if beta is not None and grad_beta is not None:
        beta = beta.to(dy.dtype)
        keys = slice(switches.num_query_heads, None)
        grad_beta.add_((along[:, keys] / beta).sum(0))
        share[:, keys] /= beta.square()
        factor = inv.clone()
        factor[:, keys] *= beta
    dy.addcmul_(qk, share.unsqueeze(-1), value=-1).mul_(factor.unsqueeze(-1))


def _rotate(y: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Turn pairs (i, i + half) of [n, heads, D] in place."""
    half = cosines.shape[-1]
    first, second = y[..., :half], y[..., half : 2 * half]
    turned = torch.addcmul(first * cosines, second, sines, value=-1)
    second.mul_(cosines).addcmul_(first, sines)
    first.copy_(turned)
