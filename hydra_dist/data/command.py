"""``hydra-dist data prepare``: the display of a preparation in a terminal."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from hydra_dist.data.manifest import SPLITS
from hydra_dist.data.prepare import SHARD_TOKENS, Prepared, prepare

_LISTED_SKIPS = 10


def prepare_command(
    inputs: Sequence[str | Path],
    output: str | Path,
    tokenizer: str,
    *,
    field: str = "text",
    skip_undecodable: bool = False,
    eval_fraction: float = 1 / 32,
    seed: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    console: Console | None = None,
) -> Prepared:
    """Run ``prepare`` with a progress bar, then say what lies in the output; arguments and errors are its own."""
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, TaskID] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done)

        prepared = prepare(
            inputs,
            output,
            tokenizer,
            field=field,
            skip_undecodable=skip_undecodable,
            eval_fraction=eval_fraction,
            seed=seed,
            shard_tokens=shard_tokens,
            progress=show,
        )
    for line in summary(prepared):
        console.print(escape(line), highlight=False, soft_wrap=True)
    return prepared


def summary(prepared: Prepared) -> list[str]:
    """What was done and what lies in the directory, as lines of text."""
    manifest = prepared.manifest
    outcome = {
        "written": "prepared",
        "resumed": "went on with finished shards and completed",
        "unchanged": "nothing to do, already prepared from the same input:",
    }[prepared.outcome]
    lines = [f"{outcome} {prepared.directory}"]
    for split in SPLITS:
        documents, tokens, text = (manifest.total(split, what) for what in ("documents", "tokens", "text_bytes"))
        lines.append(
            f"  {split}: {documents:,} documents, {tokens:,} tokens, {text:,} bytes of text, "
            f"{len(manifest.shards(split))} shards"
        )
    lines.append(f"  vocabulary: {manifest.tokenizer.vocab_size:,} entries ({manifest.dtype} on disk)")
    lines += [f"  note: {note}" for note in [*prepared.notes, *manifest.tokenizer.notes]]
    if manifest.files_left_out:
        lines.append(f"  left out: {manifest.files_left_out:,} files that are not text")
    if manifest.empty_documents:
        lines.append(f"  left out: {manifest.empty_documents:,} empty documents")
    if manifest.skipped:
        lines.append(f"  skipped as undecodable: {len(manifest.skipped):,} (all of them are in manifest.json)")
        lines += [f"    {place}" for place in manifest.skipped[:_LISTED_SKIPS]]
    return lines
