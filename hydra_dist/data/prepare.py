"""Preparing a corpus: documents in, shuffled and tokenized shards out.

Documents are shuffled, so that the neighbours in a packed row are unrelated. A corpus is streamed through a buffer of
``shuffle_bytes`` of text (a *block*); each block is written in the order of a hash of its documents' names. A corpus
that fits into one block is thus shuffled as a whole. In a larger one, neighbours come from the same part of the input;
the sampler's order of rows mixes the parts.

Everything that is written is a function of the inputs and settings alone. That is what an interrupted run relies on: it
reads the inputs again, passes over the documents that lie in finished shards, and ends with the same bytes.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Literal

from hydra_dist.data.documents import Document, eval_share, is_held_out, shuffle_key
from hydra_dist.data.encoding import blocks, encode_documents
from hydra_dist.data.files import output_errors, write_atomic
from hydra_dist.data.fingerprint import take_fingerprint
from hydra_dist.data.journal import PROGRESS, Journal, exclusive
from hydra_dist.data.manifest import (
    MANIFEST,
    SPLITS,
    TOKENIZER,
    FileRecord,
    Fingerprint,
    Manifest,
    TokenizerRecord,
)
from hydra_dist.data.readers import Skips, read_documents
from hydra_dist.data.shards import Dataset, read_manifest
from hydra_dist.data.sources import Inputs, find_inputs
from hydra_dist.data.tokenizer import (
    Tokenizer,
    byte_tokenizer,
    json_sha256,
    load_tokenizer,
    parse_spec,
    tokenizer_from_json,
    train_tokenizer,
)
from hydra_dist.data.writer import ShardWriter, token_dtype
from hydra_dist.errors import ConfigError

SHARD_TOKENS = 1 << 26
SHUFFLE_BYTES = 1 << 28
TOKENIZER_BYTES = 1 << 29
"""A tokenizer is trained on at most this much text; of a larger corpus, on the documents that a hash picks."""

ProgressFunction = Callable[[str, int, int], None]
"""Called with the phase, and the bytes done and in total, as often as is useful for a display."""


@dataclass(frozen=True)
class Prepared:
    """What a call to ``prepare`` did.

    ``outcome``: the data was written from the start, an interrupted run was finished, or there was nothing to do.
    """

    directory: Path
    manifest: Manifest
    outcome: Literal["written", "resumed", "unchanged"]
    notes: list[str] = field(default_factory=list)


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    tokenizer_spec: str,
    *,
    field: str = "text",
    shard_tokens: int = SHARD_TOKENS,
    shuffle_bytes: int = SHUFFLE_BYTES,
    eval_fraction: float = 1 / 32,
    seed: int = 0,
    skip_undecodable: bool = False,
    progress: ProgressFunction | None = None,
) -> Prepared:
    """Write the shards of a corpus, or finish writing them.

    Args:
        inputs: text files, directories, JSONL and Parquet files, or ``stdlib``.
        output: the directory; created, or empty, or holding this very corpus, finished or not.
        tokenizer_spec: ``byte``, ``train:N`` or the path of a tokenizers JSON file.
        field: the JSONL key or Parquet column with the text.
        shard_tokens: a shard is closed at the first document's end at or beyond this many tokens.
        shuffle_bytes: text held in memory and shuffled at a time.
        eval_fraction: share of the documents held out for evaluation.
        seed: of the order of documents.
        skip_undecodable: leave out, count and list what is not UTF-8 or not JSON, instead of stopping there.

    Raises:
        ConfigError: an input, tokenizer or setting that cannot work, an output that holds something else.
        RunError: undecodable input, an output that cannot be written or is full. Running again goes on from there.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for name, value in (("shard_tokens", shard_tokens), ("shuffle_bytes", shuffle_bytes)):
        if value < 1:
            raise ConfigError(f"{name} {value} is not a size; 1 or more works")
    parse_spec(tokenizer_spec)
    output = Path(output)
    share = eval_share(eval_fraction)
    report = progress or (lambda phase, done, total: None)
    found = find_inputs(inputs, output)
    fingerprint = take_fingerprint(
        found,
        tokenizer_spec,
        lambda done, total: report("reading", done, total),
        field=field,
        eval_fraction=str(share),
        seed=seed,
        shard_tokens=shard_tokens,
        shuffle_bytes=shuffle_bytes,
    )
    with exclusive(output):
        if (output / MANIFEST).exists():
            return _unchanged(output, fingerprint)
        journal = Journal.open(output, fingerprint)
        resumed = any(journal.shards.values())
        notes = [f"{name} was damaged and has been written again" for name in journal.lost]
        run = _Run(found, journal, share, Skips(skip_undecodable), report)
        manifest = run.write(tokenizer_spec)
    return Prepared(output, manifest, "resumed" if resumed else "written", notes)


def _unchanged(output: Path, fingerprint: Fingerprint) -> Prepared:
    manifest = read_manifest(output)
    differences = manifest.fingerprint.differences(fingerprint)
    if differences:
        raise ConfigError(
            f"--output {output}: holds another corpus ({'; '.join(differences)}); choose another --output, or delete "
            f"the directory"
        )
    for split in SPLITS:
        if manifest.shards(split):
            Dataset(output, split, verify=True)
    with output_errors(output):
        (output / PROGRESS).unlink(missing_ok=True)  # left where a run was killed between manifest and clean-up
    return Prepared(output, manifest, "unchanged")


class _Run:
    """One preparation from the tokenizer to the manifest."""

    def __init__(self, inputs: Inputs, journal: Journal, share: Fraction, skips: Skips, report: ProgressFunction):
        self.inputs = inputs
        self.journal = journal
        self.output = journal.directory
        self.settings = journal.fingerprint
        self.share = share
        self.skips = skips
        self.report = report

    def write(self, tokenizer_spec: str) -> Manifest:
        tokenizer, record = self._tokenizer(tokenizer_spec)
        stream = blocks(self._documents("tokenizing", self.skips), self.settings.shuffle_bytes)
        for number, block in enumerate(stream):
            for split in SPLITS:
                documents = [d for d in block if is_held_out(d.name, self.share) == (split == "eval")]
                documents.sort(key=lambda d: shuffle_key(d.name, self.settings.seed))
                self._write_split(split, number, documents[self.journal.finished(split, number) :], tokenizer)
        self._refuse_empty()
        manifest = Manifest.model_validate(
            {
                "fingerprint": self.settings,
                "tokenizer": record,
                "dtype": token_dtype(tokenizer.vocab_size).name,
                "splits": self.journal.shards,
                "skipped": self.skips.undecodable,
                "empty_documents": self.skips.empty,
                "files_left_out": self.inputs.left_out,
            }
        )
        with output_errors(self.output):
            self.journal.complete(manifest)
        return manifest

    def _documents(self, phase: str, skips: Skips) -> Iterator[Document]:
        done, total = 0, self.settings.input_bytes
        for document in read_documents(self.inputs.files, self.settings.field, skips):
            yield document
            done += document.text_bytes
            self.report(phase, min(done, total), total)
        self.report(phase, total, total)

    def _tokenizer(self, spec: str) -> tuple[Tokenizer, TokenizerRecord]:
        path = self.output / TOKENIZER
        if self.journal.tokenizer is not None:
            record = self.journal.tokenizer
            return tokenizer_from_json(path.read_text(encoding="utf-8"), str(path)), record
        wanted = parse_spec(spec)
        notes: list[str] = []
        if wanted.kind == "byte":
            tokenizer = byte_tokenizer()
        elif wanted.kind == "file":
            tokenizer = load_tokenizer(wanted.path)
        else:
            texts, notes = self._training_texts()
            tokenizer = train_tokenizer(texts, wanted.size)
        text = tokenizer.to_json()
        record = TokenizerRecord(
            file=FileRecord(name=TOKENIZER, size=len(text.encode()), sha256=json_sha256(text)),
            vocab_size=tokenizer.vocab_size,
            begin_id=tokenizer.begin_id,
            end_id=tokenizer.end_id,
            byte_level=tokenizer.is_byte_level,
            notes=notes + tokenizer.notes,
        )
        with output_errors(self.output):
            write_atomic(path, text.encode())
            self.journal.set_tokenizer(record)
        return tokenizer, record

    def _training_texts(self) -> tuple[Iterator[str], list[str]]:
        """The text that a tokenizer is trained on: the training documents, or a hash's pick of them."""
        skips = Skips(self.skips.allowed)
        documents = self._documents("training the tokenizer", skips)
        kept = (d for d in documents if not is_held_out(d.name, self.share))
        if self.settings.input_bytes <= TOKENIZER_BYTES:
            return (d.text for d in kept), []
        limit = (TOKENIZER_BYTES << 64) // self.settings.input_bytes
        picked = (d for d in kept if int.from_bytes(shuffle_key(d.name, self.settings.seed)[:8], "big") < limit)
        note = f"trained on documents picked by a hash, about {TOKENIZER_BYTES >> 20} MiB of the corpus"
        return (d.text for d in picked), [note]

    def _write_split(self, split: str, block: int, documents: list[Document], tokenizer: Tokenizer) -> None:
        writer: ShardWriter | None = None
        try:
            for document, ids, token_bytes in encode_documents(documents, tokenizer):
                with output_errors(self.output):
                    if writer is None:
                        writer = ShardWriter(
                            self.output,
                            split,
                            len(self.journal.shards[split]),
                            block,
                            tokenizer.vocab_size,
                            with_bytes=not tokenizer.is_byte_level,
                        )
                    writer.add(ids, document.text_bytes, token_bytes)
                    if writer.tokens >= self.settings.shard_tokens:
                        self.journal.add(split, writer.finish())
                        writer = None
            if writer is not None:
                with output_errors(self.output):
                    self.journal.add(split, writer.finish())
                    writer = None
        finally:
            if writer is not None:
                writer.discard()

    def _refuse_empty(self) -> None:
        if self.journal.shards["train"]:
            return
        held_out = sum(shard.documents for shard in self.journal.shards["eval"])
        with output_errors(self.output):
            self.journal.abandon()
        names = ", ".join(self.settings.inputs)
        if held_out:
            raise ConfigError(
                f"--input {names}: nothing is left to train on, all documents ({held_out}) are held out for evaluation "
                f"by the hash of their names; --eval-fraction 0 works"
            )
        skipped = f", {len(self.skips.undecodable)} undecodable" if self.skips.undecodable else ""
        raise ConfigError(
            f"--input {names}: empty, no document with text in it ({self.skips.empty} empty{skipped}); "
            f"name other files, or stdlib for the built-in corpus"
        )
