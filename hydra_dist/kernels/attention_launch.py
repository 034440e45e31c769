"""What launches of the attention kernels share: which tiles, which inputs, and the mask as arguments of a kernel."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from hydra_dist.kernels.attention_blocks import bounds_kernel, ranges_kernel
from hydra_dist.kernels.specialization import CHIPS, Specialization, of_launch

SCAN = 256
"""Blocks whose bounds a program looks at together."""
LARGEST = 2**31 - 1
"""Positions, document starts and windows are 32-bit integers in the kernels."""
LARGEST_HEAD_DIM = 256
LARGEST_FP32_HEAD_DIM = 128
"""Products in full fp32 do not run on tensor cores and keep whole rows in registers, which do not suffice for more."""
SUMMARY_MULTIPLE = 128
"""What the backward pads the number of queries to: no block is larger."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Tile:
    """How much one program computes at a time, and with what."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


TileTable = Mapping[tuple[int, bool], Mapping[str, Tile]]
"""(largest head_dim, whether inputs are fp32) to chip to tile."""


@dataclass(frozen=True)
class MaskArguments:
    """The mask of one call: the fields of ``hydra_dist.attention.Mask``."""

    causal: bool
    window: int | None
    q_positions: Tensor | None
    k_positions: Tensor | None
    document_starts: Tensor | None
    k_document_starts: Tensor | None


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why these kernels cannot run there, or None where they can."""
    if dtype not in DTYPES:
        return f"the Triton kernels take fp32, fp16 and bf16, and not {dtype}"
    largest = LARGEST_FP32_HEAD_DIM if dtype == torch.float32 else LARGEST_HEAD_DIM
    if head_dim > largest:
        return f"the Triton kernels take head_dim up to {largest} in {dtype}, and this is {head_dim}"
    interpreted = not isinstance(bounds_kernel, triton.JITFunction)
    if interpreted and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bf16 wrongly; fp32 and fp16 work"
    if device.type not in ("cuda", "meta") and not interpreted:
        return f"Triton compiles for GPUs, and this is {device.type}; its interpreter (TRITON_INTERPRET=1) is for tests"
    return None


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError where the kernels cannot take such inputs."""
    reason = refuses(q.device, q.dtype, q.shape[-1])
    if reason is not None:
        raise ValueError(reason)
    batch_size, _, heads, head_dim = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device} and q is {q.dtype} on {q.device}")
        if x.shape != k.shape or (x.shape[0], x.shape[3]) != (batch_size, head_dim) or heads % x.shape[2]:
            raise ValueError(
                f"{name} has shape {list(x.shape)} and q {list(q.shape)}: [B, Sk, Hk, D] with the same B and D, and Hk "
                "a divisor of Hq, is needed"
            )


def tile_for(table: TileTable, q: Tensor) -> Tile:
    """The table's tile for inputs like ``q`` on its device."""
    return tile_of(table, q.shape[-1], q.dtype, _chip(q.device))


def tile_of(table: TileTable, head_dim: int, dtype: torch.dtype, chip: str) -> Tile:
    """The table's tile for a head size and dtype on a key of ``CHIPS``."""
    size = min(largest for largest, _ in table if largest >= head_dim)
    return table[size, dtype == torch.float32][chip]


@lru_cache
def _chip(device: torch.device) -> str:
    """The chip whose tiles a device gets: its own, or the least one, which needs the least shared memory."""
    least = next(iter(CHIPS))
    if device.type != "cuda":
        return least
    major, minor = torch.cuda.get_device_capability(device)
    own = f"sm_{major}{minor}"
    return own if own in CHIPS else least


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a factor above 0, as kernels need that take a row's maximum before they scale it."""
    return (-q if scale < 0 else q), max(abs(scale), 1e-37)


def unit_stride(x: Tensor) -> Tensor:
    """``x`` with its last dimension's elements side by side; a copy only where they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(**tensors: Tensor) -> dict[str, int]:
    """``NAME_batch``, ``NAME_row`` and ``NAME_head`` for tensors [B, S, H, D]."""
    return {
        f"{name}_{dimension}": tensor.stride(index)
        for name, tensor in tensors.items()
        for index, dimension in enumerate(("batch", "row", "head"))
    }


def mask_arguments(mask: MaskArguments, q: Tensor, k: Tensor, tile: Tile, own_is_queries: bool) -> dict[str, Any]:
    """The mask as kernels take it, for programs that each own a block of queries (or of keys) and visit the other's.

    Launches the two small kernels that find the bounds of each block and the range of blocks to visit. On the meta
    device nothing is launched, and the arguments have only their types.
    """
    causal = mask.causal or mask.window is not None
    window = None if mask.window is None else min(mask.window, LARGEST)
    q_starts = mask.document_starts
    k_starts = q_starts if mask.k_document_starts is None else mask.k_document_starts
    queries = _Rows.of(q.shape[1], tile.queries, mask.q_positions, q_starts, q)
    keys = _Rows.of(k.shape[1], tile.keys, mask.k_positions, k_starts, q)
    own, other = (queries, keys) if own_is_queries else (keys, queries)
    # Keys past the end must not be seen. Queries past the end come in as zeros, which add nothing to any gradient.
    num_complete = keys.length // keys.block_size if own_is_queries else queries.num_blocks
    batches = max(queries.num_bounds, keys.num_bounds)
    ranges = torch.empty(batches, own.num_blocks, 2, dtype=torch.int32, device=q.device)
    walk = {
        "own_bounds": own.bounds,
        "other_bounds": other.bounds,
        "own_bounds_batch": own.per_batch(4 * own.num_blocks),
        "other_bounds_batch": other.per_batch(4 * other.num_blocks),
        "num_other": other.num_blocks,
        "window": window,
        "CAUSAL": causal,
        "DOCUMENTS": q_starts is not None,
        "SCAN": SCAN,
    }
    if q.device.type != "meta":
        grid = (own.num_blocks, batches)
        ranges_kernel[grid](**_ranges_arguments(ranges, own.num_blocks, walk, own_is_queries), num_warps=4)
    return walk | {
        "q_positions": queries.positions,
        "k_positions": keys.positions,
        "q_starts": queries.starts,
        "k_starts": keys.starts,
        "q_starts_batch": queries.per_batch(queries.length),
        "k_starts_batch": keys.per_batch(keys.length),
        "ranges": ranges,
        "ranges_batch": 2 * own.num_blocks if batches > 1 else 0,
        "num_complete": num_complete,
        "q_length": queries.length,
        "k_length": keys.length,
        "HEAD_DIM": q.shape[3],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[3])),
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
    }


def specializations() -> list[Specialization]:
    """The two small kernels that ``mask_arguments`` launches, for a general mask."""
    _, q, k, _, mask = example(torch.bfloat16, 128, general=True)
    rows = _Rows.of(q.shape[1], 128, mask.q_positions, mask.document_starts, q)
    walk = mask_arguments(mask, q, k, Tile(128, 128, 8, 2), own_is_queries=True)
    names = ("own_bounds", "other_bounds", "own_bounds_batch", "other_bounds_batch", "num_other", "window")
    walk = {name: walk[name] for name in (*names, "CAUSAL", "DOCUMENTS", "SCAN")}
    ranges = torch.empty(2, rows.num_blocks, 2, dtype=torch.int32, device="meta")
    arguments = _ranges_arguments(ranges, rows.num_blocks, walk, own_is_queries=True)
    return [
        of_launch("bounds", bounds_kernel, rows.bounds_arguments, num_warps=1, num_stages=3, tensor_cores=False),
        of_launch("ranges", ranges_kernel, arguments, num_warps=4, num_stages=3, tensor_cores=False),
    ]


def variants(table: TileTable) -> list[tuple[torch.dtype, int, str, Tile, bool]]:
    """(dtype, head_dim, chip, tile, whether the mask is general) of what is compiled ahead of time.

    bf16 and fp32 at each head size of the table, with a causal mask and with everything that a mask may have; fp16 has
    bf16's tiles and instructions.
    """
    return [
        (torch.float32 if wide else torch.bfloat16, head_dim, chip, tile, general)
        for (head_dim, wide), tiles in table.items()
        for chip, tile in tiles.items()
        for general in (False, True)
    ]


def is_routine(dtype: torch.dtype, head_dim: int, chip: str, general: bool) -> bool:
    """Whether every test run compiles such a variant: bf16 at the usual head size on each chip, others on one."""
    if dtype == torch.bfloat16 and head_dim == 128:
        return general or chip == "sm_90"
    return general and head_dim == 64 and chip == "sm_90"


def example(dtype: torch.dtype, head_dim: int, general: bool) -> tuple[str, Tensor, Tensor, Tensor, MaskArguments]:
    """A name, q, k, lse and a mask on the meta device, with strides as training has them."""
    q = torch.empty(2, 4096, 8, head_dim, dtype=dtype, device="meta")
    lse = torch.empty(2, 8, 4096, device="meta")
    positions = torch.empty(4096, dtype=torch.int32, device="meta") if general else None
    starts = torch.empty(2, 4096, dtype=torch.int32, device="meta") if general else None
    name = f"{str(dtype).removeprefix('torch.')} d{head_dim} {'general' if general else 'causal'}"
    return (
        name,
        q,
        q[:, :, :2],
        lse,
        MaskArguments(True, 1000 if general else None, positions, positions, starts, starts),
    )


def example_of_backward(
    dtype: torch.dtype, head_dim: int, general: bool
) -> tuple[str, tuple[Tensor, ...], MaskArguments]:
    """A name, what the backward's kernels read (grad_out, q, k, v, summary) and a mask, as ``example`` has them."""
    name, q, k, lse, mask = example(dtype, head_dim, general)
    return name, (torch.empty_like(q), q, k, k, torch.empty(2, *lse.shape, device="meta")), mask


def _ranges_arguments(ranges: Tensor, num_own: int, walk: dict[str, Any], own_is_queries: bool) -> dict[str, Any]:
    return {"ranges": ranges, "num_own": num_own, **walk, "OWN_IS_QUERIES": own_is_queries}


@dataclass(frozen=True)
class _Rows:
    """The queries or the keys, cut into blocks."""

    length: int
    block_size: int
    num_blocks: int
    positions: Tensor | None
    starts: Tensor | None
    bounds: Tensor
    """int32 [B or 1, 4, blocks]: least and greatest position, least and greatest document start."""

    @classmethod
    def of(cls, length: int, block_size: int, positions: Tensor | None, starts: Tensor | None, like: Tensor) -> "_Rows":
        positions = None if positions is None else positions.to(like.device, torch.int32).contiguous()
        starts = None if starts is None else starts.to(like.device, torch.int32).contiguous()
        num_blocks = triton.cdiv(length, block_size)
        batches = 1 if starts is None else starts.shape[0]
        bounds = torch.empty(batches, 4, num_blocks, dtype=torch.int32, device=like.device)
        rows = cls(length, block_size, num_blocks, positions, starts, bounds)
        if like.device.type != "meta":
            bounds_kernel[(num_blocks, batches)](**rows.bounds_arguments, num_warps=1)
        return rows

    @property
    def bounds_arguments(self) -> dict[str, Any]:
        """Those of the kernel that finds ``bounds``."""
        return {
            "positions": self.positions,
            "starts": self.starts,
            "bounds": self.bounds,
            "length": self.length,
            "num_blocks": self.num_blocks,
            "BLOCK": self.block_size,
        }

    @property
    def num_bounds(self) -> int:
        """Batch rows of ``bounds``: B, or 1 where one stands for all."""
        return self.bounds.shape[0]

    def per_batch(self, elements: int) -> int:
        """What to step by from one batch row to the next."""
        return elements if self.num_bounds > 1 else 0
