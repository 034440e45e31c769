"""The README's numbers, made from the result files and from nothing else."""

from pathlib import Path

from benchmarks.catalogue import RESULTS, find_benchmarks, read_pending, results_of
from benchmarks.machine import ROOT
from benchmarks.result import read_record, write_atomically

README = ROOT / "README.md"
START, END = "<!-- results -->\n", "<!-- end of results -->"


def render(results: Path = RESULTS) -> str:
    """Markdown: for each benchmark its claim, its table and its finding, and what waits for a GPU."""
    parts = []
    for benchmark in find_benchmarks().values():
        for path in results_of(benchmark.name, results):
            record = read_record(path)
            usual = getattr(benchmark.load(), "SETTINGS", {})
            changed = [f" --set {key}={value}" for key, value in record.settings.items() if usual.get(key) != value]
            verdict = "" if record.result.holds else " **The claim does not hold.**"
            parts.append(
                f"### {record.claim.splitlines()[0]}\n\n{record.result.table.markdown()}\n\n"
                f"{record.result.finding[:1].upper()}{record.result.finding[1:]}.{verdict} "
                f"`python -m benchmarks {benchmark.name}{''.join(changed)}`, {record.device}, {record.date[:10]}.\n"
            )
    waiting = [f"- `{row.benchmark}`: {row.row} (needs {row.needs})" for row in read_pending(results)]
    if waiting:
        parts.append("### Unmeasured\n\n" + "\n".join(waiting) + "\n")
    return "\n".join(parts)


def current(readme: Path = README) -> str:
    """What stands between the two marks. ValueError where one is missing."""
    text = readme.read_text(encoding="utf-8")
    return text[text.index(START) + len(START) : text.index(END)]


def update(readme: Path = README, results: Path = RESULTS) -> None:
    """Put the newest results between the marks."""
    text = readme.read_text(encoding="utf-8")
    head, tail = text[: text.index(START) + len(START)], text[text.index(END) :]
    write_atomically(readme, head + render(results) + tail)
