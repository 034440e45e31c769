"""What the tests of attention share: inputs, a comparison, and the masks that every path is tried with."""

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hydra_dist.attention import (
    Mask,
    flash_attention_2,
    flash_attention_3,
    flash_attention_4,
    flash_family,
    probe,
    reference,
)


@pytest.fixture
def difference() -> Callable[[Tensor, Tensor], float]:
    """max|a - b| / max|b|. Where b is zero but for rounding, the inputs' own size of 1 takes its place."""

    def of(a: Tensor, b: Tensor) -> float:
        assert a.shape == b.shape
        assert bool(torch.isfinite(a).all())
        largest = b.abs().max().item()
        return (a.double() - b.double()).abs().max().item() / (largest if largest > 1e-6 else 1.0)

    return of


@pytest.fixture
def inputs() -> Callable[..., list[Tensor]]:
    """q, k, v and the gradient of out."""

    def make(
        batch_size: int = 2,
        q_length: int = 33,
        k_length: int | None = None,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 16,
        dtype: torch.dtype = torch.float64,
    ) -> list[Tensor]:
        k_length = q_length if k_length is None else k_length
        shapes = [(q_length, heads[0]), (k_length, heads[1]), (k_length, heads[1]), (q_length, heads[0])]
        return [torch.randn(batch_size, length, count, head_dim, dtype=dtype) for length, count in shapes]

    return make


def packed(lengths: list[int]) -> Tensor:
    """[1, S]: the document start of each row, for documents of such lengths."""
    starts = torch.tensor([0, *lengths[:-1]]).cumsum(0)
    return starts.repeat_interleave(torch.tensor(lengths)).unsqueeze(0)


LENGTH = 97
MASKS = {
    "causal": Mask(),
    "full": Mask(causal=False),
    "window 1": Mask(window=1),
    "window 3": Mask(window=3),
    "window 64": Mask(window=64),
    "window beyond the sequence": Mask(window=LENGTH + 3),
    "documents": Mask(document_starts=packed([1, 40, 1, 1, 30, 24])),
    "documents, full": Mask(causal=False, document_starts=packed([1, 40, 1, 1, 30, 24])),
    "documents, window": Mask(window=3, document_starts=packed([1, 40, 1, 1, 30, 24])),
    "documents per batch row": Mask(document_starts=torch.cat([packed([1, 40, 1, 1, 30, 24]), packed([96, 1])])),
}


@pytest.fixture(params=list(MASKS))
def mask(request: pytest.FixtureRequest) -> Mask:
    """A mask for sequences of 97 rows, with at most 2 batch rows."""
    return MASKS[request.param]


def named(signature: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    """``compute`` as a function that takes exactly the parameters of ``signature``, as Python would bind them."""
    parameters = inspect.signature(eval(f"lambda {signature}: None"))

    def function(*args: Any, **kwargs: Any) -> Any:
        bound = parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        return compute(**bound.arguments)

    return function


# The parameters of the packages' functions, as their sources give them.
FORWARD_2 = (
    "q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, "
    "return_softmax"
)
VARLEN_FORWARD_2 = (
    "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, "
    "window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False, "
    "block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False"
)
BACKWARD_2 = (
    "dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, "
    "window_size_right, softcap, alibi_slopes, deterministic, rng_state=None"
)
VARLEN_BACKWARD_2 = (
    "dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, "
    "softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic, "
    "rng_state=None, zero_tensors=False"
)
FORWARD_3 = (
    "q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None, "
    "cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None, page_table=None, "
    "kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, q_descale=None, "
    "k_descale=None, v_descale=None, softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1, "
    "attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, "
    "sm_margin=0"
)
BACKWARD_3 = (
    "dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None, "
    "max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, "
    "window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0"
)
FORWARD_4 = (
    "q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, "
    "max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None, "
    "window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None, "
    "intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None, "
    "block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None, "
    "q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None, "
    "seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False"
)
BACKWARD_4 = (
    "q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None, "
    "window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2, "
    "num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, "
    "AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, "
    "max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None, "
    "score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None, "
    "learnable_sink=None"
)


class Kernel:
    """FlashAttention's conventions, computed by the reference: windows aligned at the end, packed rows, its shapes."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.scale_error = 1.0
        self.deterministic: bool | None = None

    def _pieces(self, q: Tensor, k: Tensor, offsets: Tensor | None, longest: int | None) -> list[tuple[Any, Any]]:
        for x in (q, k):
            assert x.shape[-1] % 8 == 0
            assert x.stride(-1) == 1
        if offsets is None:
            assert q.dim() == k.dim() == 4
            return [(slice(None), slice(None))]
        assert q.dim() == k.dim() == 3
        assert offsets.dtype == torch.int32
        assert offsets[0] == 0
        assert offsets[-1] == len(q) == len(k)
        assert longest == offsets.diff().max()
        edges = offsets.tolist()
        return [(slice(a, b), slice(a, b)) for a, b in itertools.pairwise(edges)]

    def _allowed(self, q: Tensor, k: Tensor, left: int | None, right: int | None) -> Tensor:
        diagonal = torch.arange(q.shape[-3]).unsqueeze(1) + k.shape[-3] - q.shape[-3]
        keys = torch.arange(k.shape[-3])
        allowed = torch.ones(q.shape[-3], k.shape[-3], dtype=torch.bool)
        if left is not None and left >= 0:
            allowed &= keys >= diagonal - left
        if right is not None and right >= 0:
            allowed &= keys <= diagonal + right
        return allowed

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, left: Any, right: Any, offsets: Any, longest: Any
    ) -> tuple[Tensor, Tensor]:
        self.calls.append("forward")
        outs, lses = [], []
        for rows, keys in self._pieces(q, k, offsets, longest):
            parts = [x[at] if offsets is None else x[at].unsqueeze(0) for x, at in ((q, rows), (k, keys), (v, keys))]
            allowed = self._allowed(parts[0], parts[1], left, right)
            out, lse = reference.forward(*parts, allowed, scale * self.scale_error)
            outs.append(out if offsets is None else out[0])
            lses.append(lse if offsets is None else lse[0])
        return torch.cat(outs).to(q.dtype), torch.cat(lses, dim=0 if offsets is None else 1)

    def backward(
        self,
        grads: tuple[Tensor, Tensor, Tensor],
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        left: Any,
        right: Any,
        offsets: Any,
        longest: Any,
    ) -> None:
        self.calls.append("backward")
        assert lse.is_contiguous()
        assert grad_out.shape == out.shape == q.shape
        assert out.dtype == q.dtype
        for rows, keys in self._pieces(q, k, offsets, longest):
            parts = [
                x[at] if offsets is None else x[at].unsqueeze(0)
                for x, at in ((grad_out, rows), (q, rows), (k, keys), (v, keys), (out, rows))
            ]
            own_lse = lse if offsets is None else lse[:, rows].unsqueeze(0)
            allowed = self._allowed(parts[1], parts[2], left, right)
            results = reference.backward(*parts, own_lse, allowed, scale * self.scale_error)
            for total, at, result in zip(grads, (rows, keys, keys), results, strict=True):
                assert total.is_contiguous()
                total[at] = result if offsets is None else result[0]


def _package_2(kernel: Kernel) -> ModuleType:
    def forward(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, **other):
        assert (dropout_p, other["softcap"], other["alibi_slopes"], other["return_softmax"]) == (0.0, 0.0, None, False)
        assert causal == (window_size_right == 0)
        offsets, longest = other.get("cu_seqlens_q"), other.get("max_seqlen_q")
        assert other.get("cu_seqlens_k") is offsets
        assert other.get("max_seqlen_k") == longest
        out, lse = kernel.forward(q, k, v, softmax_scale, window_size_left, window_size_right, offsets, longest)
        return out, lse, None, None

    def backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, **other):
        kernel.deterministic = other["deterministic"]
        assert other["causal"] == (other["window_size_right"] == 0)
        window = other["window_size_left"], other["window_size_right"]
        rows = other.get("cu_seqlens_q"), other.get("max_seqlen_q")
        kernel.backward((dq, dk, dv), dout, q, k, v, out, softmax_lse, softmax_scale, *window, *rows)
        return torch.empty(0)

    module = ModuleType("flash_attn.flash_attn_interface")
    module._flash_attn_forward = named(FORWARD_2, forward)
    module._flash_attn_varlen_forward = named(VARLEN_FORWARD_2, forward)
    module._flash_attn_backward = named(BACKWARD_2, backward)
    module._flash_attn_varlen_backward = named(VARLEN_BACKWARD_2, backward)
    return module


def _package_3(kernel: Kernel) -> ModuleType:
    def forward(q, k, v, softmax_scale, causal, window_size_left, window_size_right, **other):
        assert causal == (window_size_right == 0)
        rows = other["cu_seqlens_q"], other["max_seqlen_q"]
        assert (other["cu_seqlens_k"], other["max_seqlen_k"]) == rows
        out, lse = kernel.forward(q, k, v, softmax_scale, window_size_left, window_size_right, *rows)
        return out, lse, torch.empty(0), torch.empty(0)

    def backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, is_causal, **other):
        kernel.deterministic = other["deterministic"]
        assert is_causal == (other["window_size_right"] == 0)
        window = other["window_size_left"], other["window_size_right"]
        rows = other["cu_seqlens_q"], other["max_seqlen_q"]
        kernel.backward((dq, dk, dv), dout, q, k, v, out, softmax_lse, softmax_scale, *window, *rows)
        return torch.empty(0)

    module = ModuleType("flash_attn_interface")
    module._flash_attn_forward = named(FORWARD_3, forward)
    module._flash_attn_backward = named(BACKWARD_3, backward)
    return module


def _package_4(kernel: Kernel) -> ModuleType:
    def forward(q, k, v, softmax_scale, causal, window_size_left, window_size_right, return_lse, **other):
        assert return_lse
        assert causal == (window_size_right == 0)
        assert all(side is None or side >= 0 for side in (window_size_left, window_size_right))
        rows = other["cu_seqlens_q"], other["max_seqlen_q"]
        out, lse = kernel.forward(q, k, v, softmax_scale, window_size_left, window_size_right, *rows)
        return out, lse, None, None, None

    def backward(q, k, v, out, dout, lse, softmax_scale, causal, window_size_left, window_size_right, **other):
        kernel.deterministic = other["deterministic"]
        assert causal == (window_size_right == 0)
        grads = tuple(x.new_empty(x.shape) for x in (q, k, v))
        rows = other["cu_seqlens_q"], other["max_seqlen_q"]
        window = window_size_left, window_size_right
        kernel.backward(grads, dout, q, k, v, out, lse, softmax_scale, *window, *rows)
        return grads

    module = ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd = named(FORWARD_4, forward)
    module._flash_attn_bwd = named(BACKWARD_4, backward)
    return module


PACKAGES = {
    "flash_attention_2": (flash_attention_2, _package_2),
    "flash_attention_3": (flash_attention_3, _package_3),
    "flash_attention_4": (flash_attention_4, _package_4),
}


@pytest.fixture
def kernel() -> Kernel:
    """FlashAttention's kernels, computed by the reference."""
    return Kernel()


@pytest.fixture
def packages() -> dict[str, ModuleType]:
    """The module of each backend that calls a package."""
    return {name: module for name, (module, _) in PACKAGES.items()}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Kernel]:
    """``install(name)``: a stand-in for the package of a backend; what is returned records its calls."""

    def put(name: str) -> Kernel:
        kernel = Kernel()
        module = PACKAGES[name][1](kernel)
        parts = module.__name__.split(".")
        for count in range(1, len(parts)):
            parent = ".".join(parts[:count])
            if parent not in sys.modules:
                package = ModuleType(parent)
                package.__path__ = []
                monkeypatch.setitem(sys.modules, parent, package)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return kernel

    return put


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """``like_a_gpu(major)``: the CPU is treated like a GPU of that compute capability when a backend is chosen."""

    def refuses(name, device, dtype, head_dim, lowest, highest):
        return None if lowest <= chip[0] <= highest else f"{name} is for other chips"

    def be(major: int) -> None:
        chip[0] = major

    chip = [9]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # no GPU has an interpreter
    monkeypatch.setattr(flash_family, "refuses", refuses)
    monkeypatch.setattr(import_module("hydra_dist.attention.backends"), "_is_gpu", lambda device: device.type != "meta")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (chip[0], 0))
    probe.forget()
    yield be
    probe.forget()
