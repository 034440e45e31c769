"""Settings of the model, those that a layer may have of its own, and what both come to layer by layer."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from hydra_dist.config.heads import (
    COMPRESSIONS,
    HEAD_KEYS,
    check_head_dim,
    checked_heads,
    count_heads,
    over_model,
)
from hydra_dist.config.layers import with_layers
from hydra_dist.config.types import Count, CountOrZero, Fraction, Section

MOST_LAYERS = 2**16


class AttentionSettings(Section):
    """What may differ from layer to layer."""

    attention: Literal["ccgqa", "gqa"] = "ccgqa"
    """``gqa`` with as many key heads as query heads is MHA, with one key head MQA."""
    num_query_heads: Count | None = None
    num_key_heads: Count | None = None
    compression_factor: Count | None = None
    """C: sets C1 = C2 = C."""
    query_compression: Count | None = None
    """C1; overrides compression_factor for query heads."""
    key_compression: Count | None = None
    """C2; overrides compression_factor for key heads."""
    conv_kernel_sizes: tuple[Count, Count] = Field(default=(2, 2), strict=False)
    """Taps of the depthwise and of the head-grouped causal convolution (CCGQA)."""
    use_convs: bool = True
    """The two convolutions over the latent queries and keys (CCGQA)."""
    use_qk_mean: bool = True
    """Add the average of a query head and its key head from before the convolutions (CCGQA)."""
    use_qk_norm: bool = True
    """Queries and keys of length sqrt(head_dim), keys times a learned temperature (CCGQA)."""
    temperature: Literal["exp", "raw", "exp_clamp"] = "exp"
    """What multiplies the keys of a key head, of its parameter tau: ``exp`` exp(tau), as in the paper; ``raw`` tau
    itself; ``exp_clamp`` exp(tau cut off to [1e-7, 2]), at most 7.39. The last two are those of ZAYA's published
    weights. For use_qk_norm."""
    use_value_shift: bool = True
    """The second half of the value channels is that of the row before (CCGQA)."""
    use_output_norm: bool = False
    """An RMSNorm with a learned weight between attention and the projection that leads back (CCGQA). Not part of the
    paper."""
    window: Count | None = None
    """Sliding window in tokens: a row sees itself and window - 1 rows before it. None: all rows before it."""

    @property
    def has_previous_row(self) -> bool:
        """Do the convolutions bring the row before into a row's key?"""
        return self.attention == "ccgqa" and self.use_convs and self.conv_kernel_sizes[0] > 1


class LayerSettings(AttentionSettings):
    """Settings that some layers have of their own. What is not written here is the model's.

    Where query heads are given, as a count or through compression, that replaces everything that the model says of
    query heads; the same for key heads.
    """

    layers: tuple[CountOrZero, ...] = Field(strict=False, min_length=1)
    """Counted from 0. Ranges such as "0-2", or "3-" for all from the fourth on, are read as well."""

    @model_serializer(mode="wrap")
    def _as_written(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Only what is set: a window of None is one, and no window at all is the model's."""
        values = serialize(self)
        return {key: values[key] for key in ("layers", *AttentionSettings.model_fields) if key in self.model_fields_set}

    @property
    def own(self) -> dict[str, Any]:
        """What is set, by key."""
        return {key: getattr(self, key) for key in AttentionSettings.model_fields if key in self.model_fields_set}


class ModelConfig(AttentionSettings):
    """The decoder-only transformer.

    Heads are given as counts (``num_query_heads``, ``num_key_heads``), or through compression at an unchanged
    ``head_dim``: query heads = hidden_size / (C1 x head_dim), key heads = hidden_size / (C2 x head_dim). Counts
    override compression. What differs from layer to layer stands in ``layer_settings``, and ``layers`` says what each
    layer comes to; the attention settings here are those of layers without settings of their own.
    """

    vocab_size: Count | None = None
    """Entries of the embedding; None takes the tokenizer's."""
    num_layers: Annotated[int, Field(gt=0, le=MOST_LAYERS)] = 12
    hidden_size: Count = 768
    """Model width E."""
    head_dim: Count = 64
    num_query_heads: Count = 0
    """Where it is not given, what compression comes to; never 0."""
    num_key_heads: Count = 0
    """Where it is not given, what compression comes to; never 0."""
    layer_settings: tuple[LayerSettings, ...] = Field(default=(), strict=False)
    """Layers with settings of their own, no layer in more than one entry."""
    layer_windows: tuple[Count | None, ...] | None = Field(default=None, strict=False, min_length=1)
    """Windows layer by layer, over again where the list is shorter than the layers; overrides ``window``, and a window
    in ``layer_settings`` overrides both."""
    induction_layers: tuple[CountOrZero, ...] = Field(default=(), strict=False)
    """CCGQA layers (counted from 0) that start as induction heads: a row attends to what followed earlier rows like it.
    Short runs on long rows then use their context from the first steps. Full layers are the ones to choose."""
    rope_fraction: Fraction = 0.5
    """Share of each head's dimensions that is rotated."""
    rope_theta: Annotated[float, Field(gt=1)] = 10_000.0
    mlp_expansion: Annotated[float, Field(gt=0, le=64)] = 8 / 3
    """Width of the SwiGLU over hidden_size, rounded up to a multiple of 16."""
    tie_embeddings: bool = True
    norm_eps: Annotated[float, Field(gt=0, lt=1)] = 1e-6
    init_std: Annotated[float, Field(gt=0, lt=10)] = 0.02

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Head counts from compression, and layers from ranges."""
        if not isinstance(data, dict):
            return data
        data = {**data}
        fields = cls.model_fields
        settings = {key: fields[key].default for key in ("num_layers", "hidden_size", "head_dim")} | data
        entries = [entry.model_dump() if isinstance(entry, LayerSettings) else entry for entry in _listed(data)]
        num_layers = settings["num_layers"]
        if type(num_layers) is not int or not 0 < num_layers <= MOST_LAYERS:
            entries = data["layer_settings"] = []  # which of them there are is not known
        elif entries:
            entries = data["layer_settings"] = with_layers(entries, num_layers, LayerSettings.model_fields, fields)
        if not _has_plain_counts(settings):
            return data  # what is wrong with them is said field by field
        layers = [entry for entry in entries if isinstance(entry, dict) and _has_plain_counts({**settings, **entry})]

        def passes(change: Mapping[str, Any]) -> bool:
            changed = {**settings, **change}
            counts = count_heads(changed)
            if counts is None or changed["head_dim"] % 2:
                return False
            changed |= {"num_query_heads": counts[0], "num_key_heads": counts[1]}
            return "layer_settings" in change or all(count_heads(over_model(changed, layer)) for layer in layers)

        check_head_dim(settings, passes)
        data["num_query_heads"], data["num_key_heads"] = checked_heads(settings, "model", passes)
        return data

    @model_validator(mode="after")
    def _layers_work(self) -> "ModelConfig":
        for index, entry in enumerate(self.layer_settings):
            self._heads_of(entry, f"model.layer_settings.{index}")
        if self.induction_layers:
            self._check_induction_layers()
        return self

    @property
    def layers(self) -> tuple["ModelConfig", ...]:
        """What each layer comes to, as a model of that one layer: its own settings, counts and window filled in."""
        entries = {layer: entry for entry in self.layer_settings for layer in entry.layers}
        windows = self.layer_windows or (self.window,)
        found = []
        for layer in range(self.num_layers):
            changes: dict[str, Any] = {
                **dict.fromkeys(COMPRESSIONS),
                "num_layers": 1,
                "layer_settings": (),
                "layer_windows": None,
                "induction_layers": (0,) if layer in self.induction_layers else (),
                "window": windows[layer % len(windows)],
            }
            if entry := entries.get(layer):
                changes |= {key: value for key, value in entry.own.items() if key not in HEAD_KEYS}
                changes["num_query_heads"], changes["num_key_heads"] = self._heads_of(entry, "model.layer_settings")
            found.append(self.model_copy(update=changes))
        return tuple(found)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of every layer."""
        return tuple(layer.window for layer in self.layers)

    @property
    def queries_per_key(self) -> int:
        """Group size g."""
        return self.num_query_heads // self.num_key_heads

    @property
    def query_size(self) -> int:
        """Width e_q of all query heads."""
        return self.num_query_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Width e_k of all key (and of all value) heads."""
        return self.num_key_heads * self.head_dim

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that are rotated: even."""
        return int(self.head_dim * self.rope_fraction) // 2 * 2

    @property
    def mlp_size(self) -> int:
        """Hidden width of the MLP."""
        return -(-round(self.hidden_size * self.mlp_expansion) // 16) * 16

    @property
    def halo_rows(self) -> int:
        """Rows before a chunk that the convolutions read."""
        return sum(self.conv_kernel_sizes) - 2 if self.attention == "ccgqa" and self.use_convs else 0

    def _check_induction_layers(self) -> None:
        able = [index for index, layer in enumerate(self.layers) if layer.has_previous_row]
        end = f"; model.induction_layers={able[-1:]} works"
        for layer in self.induction_layers:
            if layer >= self.num_layers:
                last = self.num_layers - 1
                raise ValueError(
                    f"model.induction_layers has {layer}, and the last of {self.num_layers} layers is {last}{end}"
                )
            if layer not in able:
                raise ValueError(
                    f"model.induction_layers has {layer}, and such a layer needs attention ccgqa with use_convs and a "
                    f"first kernel of 2 or more taps, which bring the row before into the keys{end}"
                )

    def _heads_of(self, entry: LayerSettings, where: str) -> tuple[int, int]:
        model = {key: getattr(self, key) for key in ("hidden_size", "head_dim", "num_query_heads", "num_key_heads")}

        def passes(change: Mapping[str, Any]) -> bool:
            return count_heads(over_model(model, {**entry.own, **change})) is not None

        return checked_heads(over_model(model, entry.own), where, passes)


def _listed(data: Mapping[str, Any]) -> list[Any]:
    entries = data.get("layer_settings")
    return list(entries) if isinstance(entries, list | tuple) else []


def _has_plain_counts(settings: Mapping[str, Any]) -> bool:
    """Are widths and all that is said of heads positive numbers, so that they can be reckoned with?"""
    needed = all(settings[key] is not None for key in ("hidden_size", "head_dim"))
    numbers = [settings.get(key) for key in ("hidden_size", "head_dim", *HEAD_KEYS)]
    return needed and all(number is None or (type(number) is int and 0 < number < 2**31) for number in numbers)
