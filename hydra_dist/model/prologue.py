"""Everything in a CCGQA layer between the packed down-projection and attention.

Two causal convolutions over the latent queries and keys, q-k-mean, q-k-norm with a temperature, rotation, and the value
shift. The module holds the weights; ``prologue_operator`` computes. (ZeRO-3 gathers parameters for the module whose
forward runs, so what one operator reads belongs to one module.)

Source: Figliolia et al. 2025 (arXiv 2510.04476), section III and listing A.1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hydra_dist.attention import LARGEST_LOGIT_BOUND
from hydra_dist.errors import ConfigError, nearest
from hydra_dist.model.convolution import Taps
from hydra_dist.model.prologue_operator import prologue
from hydra_dist.model.prologue_over_ranks import prologue_over_ranks
from hydra_dist.model.prologue_plain import Switches
from hydra_dist.model.rope import Rope

TEMPERATURES = ("exp", "raw", "exp_clamp")
LOWEST_CLAMPED, HIGHEST_CLAMPED = 1e-7, 2.0
"""Of tau in ``exp_clamp``, as in Zyphra's serving code for ZAYA1: the temperature is between 1 and 7.39."""
START_OF_TAU = {"exp": 0.0, "raw": 1.0, "exp_clamp": 1e-2}
"""A temperature of 1, with a gradient: tau = 0 lies below the clamp's lower edge, where it has none."""
NORM_EPS = 1e-12
"""Added to a head's squared length: only keeps the length of a zero vector from being divided by."""
_ROUNDING = (1.0 + 2.0**-8) ** 3
"""How much longer bf16 makes a query and a key together; keys with a raw temperature are rounded twice."""
_BOUND_STEP = 10.0
"""Bounds are given in such steps: compiled code holds the number as a constant, and should not see it move often."""


class Prologue(nn.Module):
    """Projection [B, S, C + V] -> q [B, S, Hq, D], k and v [B, S, Hk, D]; C = (Hq + Hk) D, V = Hk D.

    Args:
        num_query_heads, num_key_heads, head_dim: Hq, Hk, D.
        conv_kernel_sizes: k0 taps of the depthwise and k1 of the head-grouped convolution; None without convolutions.
        use_qk_mean: add the un-convolved average of each query head and its key head.
        use_qk_norm: every head is scaled to length sqrt(D), keys also by a temperature, so that no logit passes
            temperature x sqrt(D). Without, logits are plain q k / sqrt(D), and there is no temperature.
        use_value_shift: the second half of the value channels is that of the row before (zero at a document's first
            row). With an odd number of key heads the cut goes through the middle of a head.
        temperature: what the parameter tau, one a key head, means: ``exp``: exp(tau); ``raw``: tau itself, as released
            checkpoints have it; ``exp_clamp``: exp(tau) with tau held between 1e-7 and 2, without gradient outside.

    Parameters (None for what is switched off): depthwise_weight [C, k0] and grouped_weight [heads, k1 x D in, D out],
    the last tap that of the current row; depthwise_bias [C] and grouped_bias [heads, D]; tau [Hk]. (torch's Conv1d
    keeps the second as [C, D in, k1].)
    """

    def __init__(
        self,
        num_query_heads: int,
        num_key_heads: int,
        head_dim: int,
        conv_kernel_sizes: tuple[int, int] | None,
        use_qk_mean: bool,
        use_qk_norm: bool,
        use_value_shift: bool,
        temperature: str = "exp",
    ) -> None:
        super().__init__()
        if conv_kernel_sizes is not None and (len(conv_kernel_sizes) != 2 or min(conv_kernel_sizes) < 1):
            raise ConfigError(f"conv_kernel_sizes {tuple(conv_kernel_sizes)} is not two positive numbers; (2, 2) works")
        if temperature not in TEMPERATURES:
            raise ConfigError(
                f'temperature "{temperature}": known are {", ".join(TEMPERATURES)}{nearest(temperature, TEMPERATURES)}'
            )
        self.switches = Switches(
            num_query_heads,
            num_key_heads,
            head_dim,
            (1, 1) if conv_kernel_sizes is None else (conv_kernel_sizes[0], conv_kernel_sizes[1]),
            use_qk_mean,
            NORM_EPS / head_dim if use_qk_norm else None,
            use_value_shift,
        )
        self.temperature = temperature
        self.backend = "auto"
        heads, channels = num_query_heads + num_key_heads, self.switches.latent_size
        self.depthwise_weight = self.depthwise_bias = self.grouped_weight = self.grouped_bias = self.tau = None
        if conv_kernel_sizes is not None:
            self.depthwise_weight = nn.Parameter(torch.zeros(channels, conv_kernel_sizes[0]))
            self.depthwise_bias = nn.Parameter(torch.zeros(channels))
            self.grouped_weight = nn.Parameter(torch.zeros(heads, conv_kernel_sizes[1] * head_dim, head_dim))
            self.grouped_bias = nn.Parameter(torch.zeros(heads, head_dim))
        if use_qk_norm:
            self.tau = nn.Parameter(torch.full((num_key_heads,), START_OF_TAU[temperature]))
        self._logit_bound: float | None = None
        self.forget_logit_bound()
        self.register_load_state_dict_post_hook(_forget_logit_bound)

    @property
    def num_rows_before(self) -> int:
        """Rows before a chunk that the convolutions read."""
        return self.switches.num_rows_before

    @property
    def reads_before(self) -> bool:
        """Whether anything before a chunk is read."""
        return self.num_rows_before > 0 or self.switches.value_shift

    @property
    def taps(self) -> Taps | None:
        """Weights of the convolutions; None without."""
        taps = (self.depthwise_weight, self.depthwise_bias, self.grouped_weight, self.grouped_bias)
        return None if self.depthwise_weight is None else Taps(*taps)  # type: ignore[arg-type]

    def beta(self) -> Tensor | None:
        """[Hk], the factor on the normalised keys, in fp32 or wider; None without norm."""
        if self.tau is None:
            return None
        tau = self.tau.to(torch.promote_types(self.tau.dtype, torch.float32))
        if self.temperature == "raw":
            return tau
        return (tau.clamp(LOWEST_CLAMPED, HIGHEST_CLAMPED) if self.temperature == "exp_clamp" else tau).exp()

    def logit_bound(self) -> float | None:
        """What no |q k| / sqrt(D) passes, for queries and keys in bf16 or wider: temperature x sqrt(D) and a little for
        rounding. None: not known, or beyond ``LARGEST_LOGIT_BOUND``, where it is of no use.

        A plain number: reading it does not touch the device. ``exp_clamp`` has one from the start; for other
        temperatures ``refresh_logit_bound`` finds it, and it is forgotten when a state is loaded.
        """
        return self._logit_bound

    @torch.no_grad()
    def refresh_logit_bound(self, largest_change: float) -> None:
        """Read tau, once, for a ``logit_bound`` that holds until an element of tau has moved by ``largest_change``.

        It waits for the device, so it is for between the steps: after loading, and then every n steps with n x the
        largest step of an element (Adam's is the learning rate but for rare gradients). Equal parameters give equal
        bounds on all ranks; under ZeRO-3 tau has to be gathered first.

        Raises:
            ValueError: a negative change, or tau is elsewhere.
        """
        if not largest_change >= 0.0:
            raise ValueError(f"largest_change {largest_change}: tau moves by 0 or more before the next refresh")
        if self.tau is None:
            return
        if self.tau.numel() != self.switches.num_key_heads:
            raise ValueError(
                f"tau has {self.tau.numel()} elements here and {self.switches.num_key_heads} in all; gather it first "
                f"(deepspeed.zero.GatheredParameters)"
            )
        tau = self.tau.double().cpu()
        if self.temperature == "raw":
            largest = tau.abs().amax() + largest_change
        else:
            largest = tau.amax() + largest_change
            if self.temperature == "exp_clamp":
                largest = largest.clamp(LOWEST_CLAMPED, HIGHEST_CLAMPED)
            largest = largest.exp()
        self._logit_bound = self._bound_of(float(largest))

    def forget_logit_bound(self) -> None:
        """Parameters have been replaced: nothing is known of them until the next refresh, but for a clamp."""
        clamped = self.tau is not None and self.temperature == "exp_clamp"
        self._logit_bound = self._bound_of(math.exp(HIGHEST_CLAMPED)) if clamped else None

    def _bound_of(self, largest_beta: float) -> float | None:
        bound = largest_beta * math.sqrt(self.switches.head_dim) * _ROUNDING
        # Asked so that NaN and infinity are no bounds either.
        return math.ceil(bound / _BOUND_STEP) * _BOUND_STEP if bound <= LARGEST_LOGIT_BOUND else None

    def forward(
        self,
        p: Tensor,
        z_before: Tensor | None,
        v_before: Tensor | None,
        ages: Tensor | None,
        chunk_lengths: Sequence[int],
        rope: Rope | None,
        halo_handle: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``prologue_plain.forward`` for the arguments.

        With ``halo_handle`` (``SequencePlan.halo_handle``) the rows before each chunk are fetched meanwhile, and
        z_before and v_before are not looked at.
        """
        beta = self.beta()
        # A raw temperature may be zero, and the operator's backward divides by what it is given.
        inside = None if self.temperature == "raw" else beta
        weights = (self.taps, inside, rope, self.switches, self.backend)
        if halo_handle is not None and self.reads_before:
            q, k, v = prologue_over_ranks(p, halo_handle, ages, chunk_lengths, *weights)
        else:
            q, k, v = prologue(p, z_before, v_before, ages, chunk_lengths, *weights)
        if beta is not None and inside is None:
            k = (k * beta.unsqueeze(-1)).to(k.dtype)
        return q, k, v


def _forget_logit_bound(module: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(module, Prologue)
    module.forget_logit_bound()
