"""Text to token ids and back, on top of the ``tokenizers`` library.

A document in a corpus is ``<|begin|>``, the tokens of its text, ``<|end|>``. The two special tokens never come out of
text: a document that contains the characters ``<|end|>`` has them encoded as ordinary characters, so it round-trips
and cannot forge a document's end.

Bits per byte need to know how many bytes of text a token stands for. For a byte-level vocabulary that is a property of
the token; for any other (a normaliser that rewrites text, a prefix space, WordPiece) it is a property of the token's
place in its text, and ``encode_batch_with_bytes`` works it out there.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from hydra_dist.errors import ConfigError, nearest

BEGIN = "<|begin|>"
END = "<|end|>"
BYTE_VOCABULARY = 256 + 2
PIECE_CHARACTERS = 1 << 20
"""Longer texts are encoded in pieces of at most this many characters, cut behind a line's end where there is one:
the library keeps some 100 bytes a token while it works, and one text runs on one thread."""


@dataclass(frozen=True)
class TokenizerSpec:
    """What ``--tokenizer`` asks for: ``byte``, ``train:N`` (``size`` entries) or a file (``path``)."""

    kind: Literal["byte", "train", "file"]
    size: int = 0
    path: Path = Path()


def parse_spec(spec: str) -> TokenizerSpec:
    """Read a tokenizer specification: ``byte``, ``train:N`` or the path of a tokenizers JSON file.

    Raises:
        ConfigError: none of the three, a vocabulary that cannot hold the 256 bytes and 2 special tokens, or a file
            that does not exist.
    """
    if spec == "byte":
        return TokenizerSpec("byte")
    if spec.startswith("train:"):
        digits = spec.removeprefix("train:")
        if not (digits.isascii() and digits.isdigit()):
            raise ConfigError(f"--tokenizer {spec}: {digits!r} is not a number of vocabulary entries; train:8192 works")
        if int(digits) < BYTE_VOCABULARY:
            raise ConfigError(
                f"--tokenizer {spec}: a vocabulary holds the 256 bytes and 2 special tokens, so at least "
                f"{BYTE_VOCABULARY} entries; train:8192 works"
            )
        return TokenizerSpec("train", size=int(digits))
    path = Path(spec)
    if path.is_file():
        return TokenizerSpec("file", path=path)
    if path.suffix == ".json" or path.exists() or len(path.parts) > 1:
        problem = "is not a file" if path.exists() else "does not exist"
        raise ConfigError(f"--tokenizer {spec}: {problem}; name a tokenizers JSON file, or use byte or train:8192")
    raise ConfigError(
        f"--tokenizer {spec}: unknown{nearest(spec, ['byte', 'train:8192', 'tokenizer.json'])}; "
        f"byte, train:N (such as train:8192) and FILE.json are allowed"
    )


class Tokenizer:
    """A tokenizers pipeline with the two special tokens, encoding plain text only.

    Padding and truncation that a file may ask for belong to its serving, not to a corpus, and are switched off; so is
    its post-processor (the library's ``add_special_tokens``), since documents carry ``<|begin|>`` and ``<|end|>``.

    Raises:
        ConfigError: the pipeline encodes at random (BPE dropout).
    """

    def __init__(self, pipeline: tokenizers.Tokenizer, name: str = "the tokenizer"):
        pipeline.no_padding()
        pipeline.no_truncation()
        added = [token for token in (BEGIN, END) if pipeline.token_to_id(token) is None]
        pipeline.add_special_tokens([BEGIN, END])
        pipeline.encode_special_tokens = True  # special tokens' text in a document is text
        self.pipeline = pipeline
        ids = pipeline.get_vocab(with_added_tokens=True)
        self.begin_id: int = ids[BEGIN]
        self.end_id: int = ids[END]
        self.notes = [f"{token} is not in {name}: added as id {ids[token]}" for token in added]
        dropout = self._state["model"].get("dropout")
        if dropout:
            raise ConfigError(
                f"{name}: model.dropout {dropout} makes every encoding of the same text another one; "
                f"set it to null in the file"
            )

    @cached_property
    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self.pipeline.to_str())
        return state

    @cached_property
    def vocab_size(self) -> int:
        """Number of rows that an embedding table needs: the largest id plus one, special tokens included."""
        return max(self.pipeline.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether every character of every token stands for exactly one byte of the text (GPT-2's scheme)."""
        return _is_byte_level(self._state)

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each id stands for, int32 [vocab_size]; byte-level only.

        0 for ``<|begin|>`` and ``<|end|>``, and for special tokens that no text can produce.
        """
        if not self.is_byte_level:
            raise ValueError("only a byte-level vocabulary knows its tokens' bytes; use encode_batch_with_bytes")
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, index in self.pipeline.get_vocab(with_added_tokens=False).items():
            lengths[index] = len(token)
        for added in self._state["added_tokens"]:
            if not added["special"]:
                lengths[added["id"]] = len(added["content"].encode())
        lengths[[self.begin_id, self.end_id]] = 0
        return lengths

    def encode(self, text: str) -> np.ndarray:
        """Token ids of a text, int64 [tokens], without ``<|begin|>`` and ``<|end|>``."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int64 [tokens], without ``<|begin|>`` and ``<|end|>``; on all cores."""
        pieces = [list(_pieces(text)) for text in texts]
        encodings = iter(
            self.pipeline.encode_batch_fast([part for parts in pieces for part in parts], add_special_tokens=False)
        )
        return [np.concatenate([_ids(next(encodings)) for _ in parts]) for parts in pieces]

    def encode_batch_with_bytes(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Like ``encode_batch``, each with the bytes of text that each token stands for, int64 [tokens].

        A token is given the bytes from the end of what earlier tokens cover to its own end, and the last token of a
        text what is left, so the bytes of a text's tokens always add up to the text (unless it has no token at all).
        """
        pieces = [list(_pieces(text)) for text in texts]
        encodings = iter(
            self.pipeline.encode_batch([part for parts in pieces for part in parts], add_special_tokens=False)
        )
        result = []
        for parts in pieces:
            done = [(e := next(encodings), _covered_bytes(part, e)) for part in parts]
            result.append((np.concatenate([_ids(e) for e, _ in done]), np.concatenate([counts for _, counts in done])))
        return result

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids; special tokens have none. Bytes that are not UTF-8 come back as U+FFFD."""
        text: str = self.pipeline.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def to_json(self) -> str:
        """The tokenizers JSON file, as text."""
        text: str = self.pipeline.to_str()
        return text


def byte_tokenizer() -> Tokenizer:
    """One token a byte: id = byte, then ``<|begin|>`` 256 and ``<|end|>`` 257. A byte-level BPE without merges."""
    pipeline = _byte_level_pipeline({symbol: byte for byte, symbol in enumerate(_byte_symbols())}, use_regex=False)
    pipeline.add_special_tokens([BEGIN, END])
    return Tokenizer(pipeline, "the byte vocabulary")


def train_tokenizer(texts: Iterable[str], size: int) -> Tokenizer:
    """Byte-level BPE trained on texts: at most ``size`` entries, special tokens included; deterministic.

    A small corpus runs out of pairs to merge; the vocabulary is then smaller, which ``notes`` says.
    """
    if size < BYTE_VOCABULARY:
        raise ValueError(f"size {size} < {BYTE_VOCABULARY}")
    pipeline = _byte_level_pipeline({}, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pipeline.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    tokenizer = Tokenizer(pipeline, f"train:{size}")
    if tokenizer.vocab_size < size:
        tokenizer.notes.append(
            f"the corpus has no more pairs to merge: {tokenizer.vocab_size} vocabulary entries instead of {size}"
        )
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizers JSON file, adding ``<|begin|>`` and ``<|end|>`` where it lacks them (``notes`` says so).

    Raises:
        ConfigError: the file cannot be read, is no tokenizers JSON, or encodes at random.
    """
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"tokenizer {path}: {error.strerror}; name a tokenizers JSON file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"tokenizer {path}: not a tokenizers JSON file (not UTF-8 at byte {error.start})") from error
    return tokenizer_from_json(text, str(path))


def tokenizer_from_json(text: str, name: str) -> Tokenizer:
    """``load_tokenizer`` for the text of a file; ``name`` is what errors call it."""
    try:
        pipeline = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(
            f"tokenizer {name}: not a tokenizers JSON file ({error}); the tokenizer.json of a Hugging Face model works"
        ) from error
    return Tokenizer(pipeline, name)


def json_sha256(text: str) -> str:
    """sha256 of a tokenizer file's text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's ``bytes_to_unicode``)."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in own else chr(next(others)) for byte in range(256)]


def _byte_level_pipeline(vocabulary: dict[str, int], *, use_regex: bool) -> tokenizers.Tokenizer:
    pipeline = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    pipeline.decoder = decoders.ByteLevel()
    return pipeline


def _is_byte_level(state: dict[str, Any]) -> bool:
    model = state["model"]
    symbols_kept = (
        model["type"] == "BPE"
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and all(symbol in model["vocab"] for symbol in _byte_symbols())
    )
    first = state["pre_tokenizer"] or {"type": None}
    steps = first["pretokenizers"] if first["type"] == "Sequence" else [first]
    byte_steps = [step for step in steps if step["type"] == "ByteLevel"]
    others = [step for step in steps if step["type"] != "ByteLevel"]
    return (
        symbols_kept
        and state["normalizer"] is None
        and len(byte_steps) == 1
        and not byte_steps[0]["add_prefix_space"]
        and all(s["type"] == "Digits" or s.get("behavior", "Removed") != "Removed" for s in others)
        and not any(t["lstrip"] or t["rstrip"] for t in state["added_tokens"] if not t["special"])
    )


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        stop = start + PIECE_CHARACTERS
        line_end = text.rfind("\n", start, stop) + 1
        stop = line_end if line_end > start else stop
        yield text[start:stop]
        start = stop
    yield text[start:]


def _ids(encoding: tokenizers.Encoding) -> np.ndarray:
    return np.array(encoding.ids, dtype=np.int64)


def _covered_bytes(text: str, encoding: tokenizers.Encoding) -> np.ndarray:
    """Bytes of text newly covered by each token, from the characters at which tokens end; sums to all of ``text``."""
    ends = np.array([stop for _, stop in encoding.offsets], dtype=np.int64)
    if not len(ends):
        return ends
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    byte_at = np.concatenate([[0], np.cumsum(widths)])
    ends = np.maximum.accumulate(ends)
    ends[-1] = len(text)
    return np.diff(byte_at[ends], prepend=0)
