"""One training step of a Hugging Face model under DeepSpeed ZeRO, played on an allocator.

Weights are gathered and dropped layer by layer (ZeRO-3), layer inputs wait on the GPU or in the host's memory, the loss
is plain, fused or over chunks, and gradients leave through the reduction's bucket.

Source: DeepSpeed's stage3.py, partitioned_param_coordinator.py and coalesced_collectives.py at edaa7221; transformers
4.51 loss_utils.py; Liger-Kernel's fused_linear_cross_entropy.py; ArcticTraining's monkey_patches.py at b28638e6.
"""

from hydra_dist.memory.deepspeed_hf_allocator import Allocator
from hydra_dist.memory.deepspeed_hf_layer import GRADIENT, HALF, WEIGHT_GRADIENT, WIDE, Layer
from hydra_dist.memory.deepspeed_hf_settings import DeepSpeedSettings
from hydra_dist.memory.shapes import DenseDecoder

TOKEN = 8
CUBLAS = 2 * 32 * 2**20
"""Workspaces of torch's two cuBLAS handles on Hopper."""
WEIGHTS, CHECKPOINTS, LOSS = "gathered parameters", "checkpoints", "loss"
GATHER, REDUCE = "gather", "reduce"
"""Streams of ZeRO-3 beside the one of the computation."""
FP64, NORM_CHUNK = 8, 250_000_000
SUB_GROUP = 1_000_000_000
"""Elements that ZeRO-3's optimizer updates at a time."""


def parameters(model: DenseDecoder) -> int:
    """Of the whole model."""
    vocab = model.vocab_size * model.hidden_size
    embeddings = vocab if model.tie_embeddings else 2 * vocab
    return embeddings + model.num_layers * layer_parameters(model) + model.norm_parameters


def layer_parameters(model: DenseDecoder) -> int:
    width = model.hidden_size
    biases = model.query_size + 2 * model.key_size if model.has_qkv_bias else 0
    return (
        width * (2 * model.query_size + 2 * model.key_size + model.mlp_inputs + model.ffn_size)
        + biases
        + 2 * model.norm_parameters
        + model.qk_norm_parameters
    )


def bucket_elements(model: DenseDecoder, settings: DeepSpeedSettings) -> int:
    """Elements of a full bucket: no more than the layers have."""
    return min(settings.reduce_bucket_size, model.num_layers * layer_parameters(model))


class Step:
    """Plays a step; ``kept`` is what stands all through training, bytes by component."""

    def __init__(self, model: DenseDecoder, settings: DeepSpeedSettings) -> None:
        self.model, self.settings, self.memory = model, settings, Allocator()
        self.layer = Layer(model, settings, self.memory)
        self.vocab = HALF * model.vocab_size * model.hidden_size
        self.kept = self._kept()

    def _kept(self) -> dict[str, int]:
        settings, count = self.settings, parameters(self.model)
        shard = -(-count // settings.num_gpus)
        held = {2: count, 3: 0 if settings.offload_parameters else shard}[settings.zero_stage]
        return {
            "parameter shards": HALF * held,
            "gradient shards": 0 if settings.offload_optimizer else HALF * shard,
            "optimizer shards": 0 if settings.offload_optimizer else settings.optimizer_bytes * shard,
            "reduction bucket": HALF * settings.reduce_bucket_size,
            "workspaces": CUBLAS,
        }

    def play(self) -> Allocator:
        """Forward, loss, backward and the optimizer's step."""
        memory, model, settings = self.memory, self.model, self.settings
        memory.phase("forward")
        for name, size in self.kept.items():
            memory.allocate(name, size, name)
        memory.allocate("batch", settings.tokens * (3 * TOKEN + 2 * HALF * model.head_dim), "batch")
        self._gather("embedding", self.vocab)
        memory.allocate("x 0", self.layer.hidden, CHECKPOINTS)
        if not model.tie_embeddings:
            self._drop("embedding")
        for index in range(model.num_layers):
            self._forward(index)
        self._loss()
        memory.phase("backward")
        for index in reversed(range(model.num_layers)):
            self._backward(index)
        self._gradient("embedding", self.vocab)
        memory.free("g")
        self._reduce()
        self._optimizer()
        return memory

    def _forward(self, index: int) -> None:
        memory, settings = self.memory, self.settings
        self._gather(f"weights {index}", HALF * layer_parameters(self.model))
        memory.rename(f"x {index}", "x")
        self.layer.forward(keep=False)
        memory.rename("x", f"x {index}")
        if settings.offload_checkpoints:
            memory.free(f"x {index}")
        memory.rename("out", f"x {index + 1}", CHECKPOINTS)
        if index + 1 == self.model.num_layers and not self.model.tie_embeddings:
            self._gather("head", self.vocab)  # before the last layer's are dropped
        if not self._used_soon(index):
            self._drop(f"weights {index}")
        memory.synchronize()

    def _used_soon(self, index: int) -> bool:
        """Whether a layer's parameters outlast the turn from forward to backward."""
        between = 2 * (self.model.num_layers - 1 - index) * layer_parameters(self.model)
        between += 2 * self.model.vocab_size * self.model.hidden_size  # the head, forward and backward
        return between <= self.settings.max_reuse_distance

    def _backward(self, index: int) -> None:
        memory = self.memory
        self._gather(f"weights {index}", HALF * layer_parameters(self.model))
        if self.settings.offload_checkpoints:
            memory.allocate("x", self.layer.hidden, CHECKPOINTS)
        else:
            memory.rename(f"x {index}", "x")
        self.layer.forward(keep=True)
        self.layer.backward()
        memory.rename("dx", "g")
        self._drop(f"weights {index}")
        self._reduce()
        memory.synchronize()

    def _gather(self, name: str, size: int) -> None:
        """A layer's parameters count as one: module by module they come and go, but their memory waits for the GPU."""
        if self.settings.zero_stage == 3 and not self.memory.holds(name):
            self.memory.allocate(name, size, WEIGHTS, GATHER)

    def _drop(self, name: str) -> None:
        if self.memory.holds(name):
            self.memory.free(name, late=True)

    def _gradient(self, name: str, size: int) -> None:
        """Of the embedding or the head: larger than the bucket, it is reduced by itself."""
        self.memory.allocate(f"own {name}", size, WEIGHT_GRADIENT)
        if size > HALF * self.settings.reduce_bucket_size:
            self._reduce(size // HALF)
        self.memory.free(f"own {name}")

    def _reduce(self, elements: int = 0) -> None:
        """Bucket or one large gradient: in the order of the ranks' shards, in fp32 after a widened copy of it.

        A single gradient needs no reordering. With the optimizer in the host's memory, this rank's shards are back on
        the GPU for their norm, which is taken in fp64 of so many elements at a time.
        """
        settings, size = self.settings, elements or bucket_elements(self.model, self.settings)
        parts = {} if elements else {"ordered": settings.reduction_bytes * size}
        if settings.reduction_bytes > HALF:
            parts["widened"] = settings.reduction_bytes * size
        if settings.offload_optimizer:
            shard = -(-size // settings.num_gpus)
            largest = elements or self.model.hidden_size * self.model.ffn_size
            parts["shards"] = HALF * shard
            parts["norm"] = FP64 * min(-(-largest // settings.num_gpus), NORM_CHUNK)
        for name, part in parts.items():
            self.memory.allocate(name, part, "reduction", REDUCE)
        self.memory.free(*parts)

    def _loss(self) -> None:
        memory, layer = self.memory, self.layer
        memory.phase(LOSS)
        head = "embedding" if self.model.tie_embeddings else "head"
        self._gather(head, self.vocab)
        layer.norm("last", layer.hidden, keep=True)
        {"plain": self._plain, "fused": self._fused, "chunked": self._chunked}[self.settings.cross_entropy]()
        self._drop(head)
        layer.norm_backward("last", layer.hidden)
        memory.free(f"x {self.model.num_layers}")

    def _plain(self) -> None:
        """Logits whole: bf16, widened, and their log-softmax; backward has two gradients beside the log-softmax."""
        new, free = self.memory.allocate, self.memory.free
        logits = HALF * self.settings.tokens * self.model.vocab_size
        new("logits", logits, LOSS)
        new("wide", 2 * logits, LOSS)
        new("log softmax", 2 * logits, LOSS)
        free("wide", "logits")
        new("dlog softmax", 2 * logits, LOSS)
        new("dwide", 2 * logits, LOSS)
        free("dlog softmax", "log softmax")
        new("dlogits", logits, LOSS)
        free("dwide")
        new("g", self.layer.hidden, GRADIENT)
        self._gradient("head", self.vocab)
        free("dlogits")

    def _fused(self) -> None:
        """Liger: a chunk's logits become their gradients in place; the head's gradient is there from the start.

        A chunk is ceil(tokens / ceil(vocabulary / width)) tokens, rounded up to a power of two.
        """
        new, free = self.memory.allocate, self.memory.free
        tokens = self.settings.tokens
        share = -(-tokens // -(-self.model.vocab_size // self.model.hidden_size))
        chunk = min(tokens, 1 << (share - 1).bit_length())
        new("g", self.layer.hidden, GRADIENT)
        new("own head", self.vocab, WEIGHT_GRADIENT)
        new("logits", HALF * chunk * self.model.vocab_size, LOSS)
        new("own chunk", self.vocab, WEIGHT_GRADIENT)
        free("own chunk", "logits")
        if self.vocab > HALF * self.settings.reduce_bucket_size:
            self._reduce(self.vocab // HALF)
        free("own head")

    def _chunked(self) -> None:
        """A chunk at a time, forward and backward: its share of the head's gradient is added to the whole's."""
        new, free = self.memory.allocate, self.memory.free
        logits = HALF * min(self.settings.tokens, self.settings.loss_chunk) * self.model.vocab_size
        new("g", self.layer.hidden, GRADIENT)
        new("own head", self.vocab, WEIGHT_GRADIENT)
        for name in ("log softmax", "dlog softmax", "dwide"):
            new(name, 2 * logits, LOSS)
        free("log softmax", "dlog softmax")
        new("dlogits", logits, LOSS)
        free("dwide")
        new("own chunk", self.vocab, WEIGHT_GRADIENT)
        free("own chunk", "dlogits")
        if self.vocab > HALF * self.settings.reduce_bucket_size:
            self._reduce(self.vocab // HALF)
        free("own head")

    def _optimizer(self) -> None:
        """On the GPU: gradients of a group of parameters, widened. ZeRO-2 gathers the new parameters by buckets."""
        memory, settings = self.memory, self.settings
        memory.phase("optimizer")
        self._drop("embedding")
        shard = -(-parameters(self.model) // settings.num_gpus)
        widened = shard if settings.zero_stage == 2 else min(shard, SUB_GROUP)
        memory.allocate("widened", 0 if settings.offload_optimizer else WIDE * widened, "optimizer's gradients")
        memory.free("widened")
        if settings.zero_stage == 2 and settings.num_gpus > 1:
            memory.allocate("gathered", HALF * settings.allgather_bucket_size, WEIGHTS)
            memory.free("gathered")
