"""One layer of a Hugging Face decoder, its tensors in the order in which they come and go: forward, and backward.

Forward is played twice: without autograd, and again in backward with everything kept that an operation saves. Names are
of tensors: ``x`` the layer's input, ``n1`` what the first norm leaves, ``h2`` the residual stream between the two
halves, ``out`` the layer's result, ``g`` the gradient that comes in, ``G`` that of ``h2``; Python's own references
(arguments, locals) keep a tensor as long as they do in the code.

Source: transformers 4.51 modeling_llama.py and modeling_qwen3.py, Liger-Kernel's rms_norm.py, rope.py and swiglu.py
(gradients overwrite their inputs), flash-attn's backward, DeepSpeed's ulysses_sp.py at edaa7221.
"""

from hydra_dist.memory.deepspeed_hf_allocator import Allocator
from hydra_dist.memory.deepspeed_hf_settings import DeepSpeedSettings
from hydra_dist.memory.shapes import DenseDecoder

HALF, WIDE = 2, 4
LAYER, GRADIENT, MLP, WEIGHT_GRADIENT = "recomputed layer", "gradients", "mlp", "weight gradients"
ATTENTION_BACKWARD, ULYSSES = "attention's backward", "ulysses copies"


class Layer:
    """Plays one layer on an allocator. Sizes are bytes of one rank's tokens."""

    def __init__(self, model: DenseDecoder, settings: DeepSpeedSettings, memory: Allocator) -> None:
        self.model, self.settings, self.memory = model, settings, memory
        tokens = settings.tokens
        self.ulysses = settings.sequence_parallel_size > 1
        self.copies = settings.key_copies(model)
        self.hidden = HALF * tokens * model.hidden_size
        self.query, self.key = HALF * tokens * model.query_size, HALF * tokens * model.key_size
        self.ffn = HALF * tokens * model.ffn_size
        self.lse = WIDE * tokens * model.num_query_heads
        self.pieces = -(-tokens // model.hidden_size) if settings.tiled_mlp else 1
        self.swiglu = settings.fused_kernels and not settings.tiled_mlp
        matrix = HALF * model.hidden_size
        self.weights = {
            **dict.fromkeys(("q", "o"), matrix * model.query_size),
            **dict.fromkeys(("k", "v"), matrix * model.key_size),
            **dict.fromkeys(("gate", "up", "down"), matrix * model.ffn_size),
        }

    def forward(self, keep: bool) -> None:
        """From ``x`` to ``out``; what backward needs stays where ``keep``."""
        new, free = self.memory.allocate, self.memory.free
        self.norm("n1", self.hidden, keep)
        for name, size in (("q", self.query), ("k", self.key), ("v", self.key)):
            new(name, size, LAYER)
            if self.model.qk_norm and name != "v":
                self.norm(f"{name}n", size, keep)
                if not keep:
                    free(name)
                    self.memory.rename(f"{name}n", name)
        self._rotate(keep)
        if not keep:
            free("n1")
        self._attend(keep)
        new("a", self.hidden, LAYER)
        new("h2", self.hidden, LAYER)
        free("a")
        if not keep:
            free("o")
        self.norm("n2", self.hidden, keep)
        self._mlp(keep)
        new("out", self.hidden, LAYER)
        free("down")
        if not keep:
            free("n2", "h2")

    def norm(self, name: str, size: int, keep: bool) -> None:
        """RMSNorm. Without Liger the input is kept in fp32 and the result a second time before its weight."""
        new, free = self.memory.allocate, self.memory.free
        if not self.settings.fused_kernels:
            for part in ("wide", "square"):
                new(f"{name} {part}", 2 * size, LAYER)
            free(f"{name} square")
            new(f"{name} product", 2 * size, LAYER)
            new(f"{name} narrow", size, LAYER)
            free(f"{name} product")
        new(name, size, LAYER)
        if not keep and not self.settings.fused_kernels:
            free(f"{name} wide", f"{name} narrow")

    def _rotate(self, keep: bool) -> None:
        """Liger rotates in place; plain operations leave new tensors and drop what they read."""
        new, free = self.memory.allocate, self.memory.free
        if self.settings.fused_kernels:
            return
        for name, size in (("q", self.query), ("k", self.key)):
            read = f"{name}n" if self.memory.holds(f"{name}n") else name
            for part in ("cos", "half", "sin"):
                new(f"{name} {part}", size, LAYER)
            free(f"{name} half")
            new(f"{name} rotated", size, LAYER)
            free(f"{name} cos", f"{name} sin")
            if read == name:
                free(name)
                self.memory.rename(f"{name} rotated", name)
            else:
                free(read)
                self.memory.rename(f"{name} rotated", read)

    def _attend(self, keep: bool) -> None:
        """q, k and v to ``att``, attention's result, and ``o``, as the output projection reads it."""
        new, free = self.memory.allocate, self.memory.free
        given = {name: f"{name}n" if self.memory.holds(f"{name}n") else name for name in ("q", "k", "v")}
        if self.ulysses:
            for name, size in (("q", self.query), ("k", self.key * self.copies), ("v", self.key * self.copies)):
                if name != "q" and self.copies > 1:
                    new("repeated", size, ULYSSES)
                new("send", size, ULYSSES)
                if name != "q" and self.copies > 1:
                    free("repeated")
                new(f"{name} received", size, ULYSSES)
                free("send", late=True)
            for name, size in (("q", self.query), ("k", self.key * self.copies), ("v", self.key * self.copies)):
                new(f"{name}g", size, LAYER)
                free(f"{name} received", late=True)
            self.memory.synchronize()  # Hugging Face looks at the positions
        else:
            for name, read in given.items():
                self.memory.rename(read, f"{name}g")
        new("lse", self.lse, LAYER)
        new("att", self.query, LAYER)
        if self.ulysses:
            new("send", self.query, ULYSSES)  # the result has q's strides, heads first
            new("received", self.query, ULYSSES)
            free("send", late=True)
            new("o", self.query, LAYER)
            free("received", late=True)
            free(*given.values())
        if not keep:
            free("qg", "kg", "vg", "lse")
            if self.ulysses:
                free("att")
            else:
                self.memory.rename("att", "o")

    def _mlp(self, keep: bool) -> None:
        new, free = self.memory.allocate, self.memory.free
        if self.settings.tiled_mlp:
            self.memory.synchronize()  # ranks agree on the number of pieces
            new("pieces", self.hidden, LAYER)  # all results, the last one's temporaries beside them
            for part in ("gate", "act", "up", "product"):
                new(part, self.ffn // self.pieces, MLP)
                if part == "act":
                    free("gate")
            free("act", "up", "product")
            new("down", self.hidden, LAYER)
            free("pieces")
            return
        new("gate", self.ffn, MLP)
        if not self.swiglu:
            new("act", self.ffn, MLP)
            if not keep:
                free("gate")
        new("up", self.ffn, MLP)
        new("product", self.ffn, MLP)
        if not keep:
            free("gate" if self.swiglu else "act", "up")
        new("down", self.hidden, LAYER)
        if not keep:
            free("product")

    def backward(self) -> None:
        """From ``x``, ``out`` and ``g`` with all that forward kept, to ``dx`` alone."""
        new, free = self.memory.allocate, self.memory.free
        self._mlp_backward()
        self.norm_backward("n2", self.hidden)
        new("G", self.hidden, GRADIENT)
        free("dn2", "h2")
        self._product_backward("o", "do", self.query)
        if self.ulysses:
            free("o")
            self._exchange("do", self.query, copied=False)
        self._attention_backward()
        if self.ulysses:
            for name in ("v", "k", "q"):
                self._exchange(f"d{name}", self.query if name == "q" else self.key * self.copies, copied=True)
                if name != "q" and self.copies > 1:
                    new("summed", self.key, GRADIENT)
                    free(f"d{name}")
                    self.memory.rename("summed", f"d{name}")
        for name, size in (("k", self.key), ("q", self.query)):
            if not self.settings.fused_kernels:
                for part in ("cos", "sin"):
                    new(f"rotation {part}", size, GRADIENT)
                free("rotation cos", "rotation sin")
            if self.model.qk_norm:
                self.norm_backward(f"{name}n", size, gone=True)
                free(name)
        for index, name in enumerate(("v", "k", "q")):
            self._product_backward(name, f"dn1 {name}", self.hidden)
            free(f"d{name}")
            if index:
                free(f"dn1 {name}")
        free("n1")
        self.memory.rename("dn1 v", "dn1")
        self.norm_backward("n1", self.hidden, gone=True)
        new("dx", self.hidden, GRADIENT)
        free("dn1", "G", "g", "out", "x")

    def _product_backward(self, weight: str, gradient: str, size: int) -> None:
        """Of a matrix: of its input, which stays, and its own, which goes into the reduction's bucket."""
        self.memory.allocate(gradient, size, GRADIENT)
        self.memory.allocate("own", self.weights[weight], WEIGHT_GRADIENT)
        self.memory.free("own", late=True)

    def norm_backward(self, name: str, size: int, gone: bool = False) -> None:
        """The gradient of what came out becomes that of what went in, in place with Liger. ``gone``: ``name`` is."""
        new, free = self.memory.allocate, self.memory.free
        if not gone:
            free(name)
        if self.settings.fused_kernels:
            return
        new("narrow", size, GRADIENT)
        for part in ("a", "b", "c"):
            new(part, 2 * size, GRADIENT)
        free("narrow", "a", "b", "c", f"{name} wide", f"{name} narrow")

    def _mlp_backward(self) -> None:
        new, free = self.memory.allocate, self.memory.free
        if self.settings.tiled_mlp:
            new("dn2", self.hidden, GRADIENT)
            for name in ("gate", "up", "down"):
                new(f"own {name}", self.weights[name], WEIGHT_GRADIENT)
            for part in ("gate", "act", "up", "product", "dproduct", "dact", "dup"):
                new(part, self.ffn // self.pieces, MLP)
            new("piece", self.hidden // self.pieces, MLP)
            new("own again", self.weights["down"], WEIGHT_GRADIENT)
            free("own again", "piece", "gate", "act", "up", "product", "dproduct", "dact", "dup")
            free("own gate", "own up", "own down", late=True)
            return
        self._product_backward("down", "dproduct", self.ffn)
        free("product")
        if self.swiglu:  # the gradients of gate and up are written over them
            free("dproduct")
            self._product_backward("up", "dn2", self.hidden)
            free("up")
        else:
            for part in ("dact", "dup"):
                new(part, self.ffn, GRADIENT)
            free("dproduct", "act")
            self._product_backward("up", "dn2", self.hidden)
            free("dup", "up")
            new("dgate", self.ffn, GRADIENT)
            free("dact", "gate")
            self.memory.rename("dgate", "gate")
        self._product_backward("gate", "dn2 gate", self.hidden)
        free("gate", "dn2 gate")

    def _exchange(self, name: str, size: int, copied: bool) -> None:
        """All-to-all of a gradient: a contiguous copy to send, what is received, and that ``copied`` to heads first."""
        new, free = self.memory.allocate, self.memory.free
        new("send", size, ULYSSES)
        free(name)
        new("received", size, ULYSSES)
        free("send", late=True)
        if copied:
            new(name, size, GRADIENT)
            free("received", late=True)
        else:
            self.memory.rename("received", name, GRADIENT)

    def _attention_backward(self) -> None:
        """flash-attn: dq in fp32 first. Where query heads share a key head, version 3 has dk and dv in fp32 first, and
        version 2 those of each query head."""
        new, free = self.memory.allocate, self.memory.free
        key = self.key * self.copies
        for name, size in (("dq", self.query), ("dk", key), ("dv", key)):
            new(name, size, GRADIENT)
        new("dq wide", 2 * self.query, ATTENTION_BACKWARD)
        new("rows", self.lse, ATTENTION_BACKWARD)
        if key < self.query:
            first = 2 * key if self.settings.flash_attention == 3 else self.query
            new("dk first", first, ATTENTION_BACKWARD)
            new("dv first", first, ATTENTION_BACKWARD)
            free("dk first", "dv first")
        free("dq wide", "rows", "do", "qg", "kg", "vg", "lse", "att")
