"""``python -m benchmarks NAME [NAME ...] | --all | --gpu | --list``: measure, judge the claim, write the result.

Ends with 0 where every claim holds, 1 where one does not or a benchmark cannot go on, 2 for a mistake in the command.
"""

import argparse
import datetime
import inspect
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import readme
from benchmarks.catalogue import (
    RESULTS,
    Benchmark,
    choose,
    expected_pending,
    find_benchmarks,
    results_of,
    write_pending,
)
from benchmarks.harness import Options, quiet
from benchmarks.machine import describe_commit, describe_machine, describe_versions, device_tag, gpu_names
from benchmarks.result import Record, Setting, read_record, write_record
from hydra_dist.errors import ConfigError, UserError, nearest


def main(arguments: Sequence[str]) -> int:
    """Run what the command line asks for; the exit code."""
    asked = _parse(arguments)
    benchmarks = find_benchmarks()
    if asked.list:
        _list(benchmarks, asked.results)
        return 0
    if asked.table:
        _print_tables(choose(asked.names, benchmarks) if asked.names else list(benchmarks.values()), asked.results)
        return 0
    if asked.readme:
        readme.update(results=asked.results)
        return 0
    gpus = gpu_names() if asked.gpu else ()
    if asked.gpu and not gpus:
        raise ConfigError("--gpu: this machine has no GPU that torch can use; without --gpu what runs on a CPU works")
    chosen = _choose(asked, benchmarks)
    if not chosen:
        print("no benchmark needs a GPU; name one to measure it there")
        return 0
    changes = _settings_by_benchmark(asked.set, chosen)
    failed = [
        benchmark.name
        for benchmark in chosen
        if not run_benchmark(benchmark, changes[benchmark.name], gpus, asked.results).result.holds
    ]
    if failed:
        print(f"the claim does not hold: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_benchmark(
    benchmark: Benchmark, changes: Mapping[str, Setting], gpus: tuple[str, ...], results: Path = RESULTS
) -> Record:
    """Measure one benchmark, write its file, take its rows off the list of those that wait for a GPU.

    Args:
        changes: settings other than the module's own.
        gpus: names of the GPUs to measure on; empty measures on the CPU.
    """
    module = benchmark.load()
    settings = {**getattr(module, "SETTINGS", {}), **changes}
    print(f"{benchmark.name}: {benchmark.claim.splitlines()[0]}", flush=True)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    before, started = quiet(), time.perf_counter()
    if not before.quiet:
        load = "" if before.load_average is None else f", load average {before.load_average[0]:.1f}"
        print(f"  the machine is not quiet (a fixed loop varies by {before.variation:.0%}{load}); the result says so")
    result = module.run(Options(device="cuda" if gpus else "cpu", settings=settings, say=_say))
    record = Record(
        name=benchmark.name,
        claim=inspect.cleandoc(benchmark.claim),
        device=device_tag(gpus) if gpus else "cpu",
        settings=settings,
        machine=describe_machine(),
        versions=describe_versions(),
        commit=describe_commit(),
        date=date,
        seconds=time.perf_counter() - started,
        conditions=(before, quiet()),
        result=result,
    )
    path = write_record(record, results)
    if gpus:
        write_pending(expected_pending(find_benchmarks(), results), results)
    print(result.table.markdown())
    print(f"  {'holds' if result.holds else 'DOES NOT HOLD'}: {result.finding}\n  {path}", flush=True)
    return record


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a benchmark")
    parser.add_argument("--all", action="store_true", help="every benchmark that this machine can measure")
    parser.add_argument(
        "--gpu", action="store_true", help="measure on the GPUs; alone: all that need one, unmeasured first"
    )
    parser.add_argument("--list", action="store_true", help="name the benchmarks and their result files")
    parser.add_argument("--table", action="store_true", help="print the tables of result files as Markdown")
    parser.add_argument("--readme", action="store_true", help="write the result files' tables into README.md")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a benchmark's setting")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="where result files are written")
    asked = parser.parse_args(arguments)
    if not (asked.names or asked.all or asked.gpu or asked.list or asked.table or asked.readme):
        parser.error("name a benchmark, or use --all, --gpu, --list, --table or --readme")
    if asked.names and asked.all:
        parser.error("--all means every benchmark; name some, or use --all")
    return asked


def _choose(asked: argparse.Namespace, benchmarks: Mapping[str, Benchmark]) -> list[Benchmark]:
    if asked.names:
        chosen = choose(asked.names, benchmarks)
        stuck = [benchmark.name for benchmark in chosen if benchmark.needs_gpu and not asked.gpu]
        if stuck:
            raise ConfigError(f"benchmark {', '.join(stuck)} needs a GPU; with --gpu it works")
        return chosen
    waiting = {row.benchmark for row in expected_pending(benchmarks, asked.results)} if asked.gpu else set()
    chosen = [b for b in benchmarks.values() if b.needs_gpu == asked.gpu or (asked.all and asked.gpu)]
    left_out = [b.name for b in benchmarks.values() if b not in chosen]
    if asked.all and left_out:
        print(f"left out, because they need a GPU (--gpu): {', '.join(left_out)}")
    for benchmark in list(chosen):
        # Some ask more of a machine than a device; named alone, they end with this reason.
        reason = getattr(benchmark.load(), "left_out", lambda device: None)("cuda" if asked.gpu else "cpu")
        if reason is not None:
            print(f"left out: {benchmark.name}: {reason}")
            chosen.remove(benchmark)
    return sorted(chosen, key=lambda benchmark: benchmark.name not in waiting)


def _settings_by_benchmark(changes: Sequence[str], chosen: Sequence[Benchmark]) -> dict[str, dict[str, Setting]]:
    """``KEY=VALUE`` for each chosen benchmark that has the key, in the type of its default."""
    defaults: dict[str, dict[str, Setting]] = {b.name: getattr(b.load(), "SETTINGS", {}) for b in chosen}
    known = sorted({key for settings in defaults.values() for key in settings})
    changed: dict[str, dict[str, Setting]] = {b.name: {} for b in chosen}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change}: not of the form KEY=VALUE; settings: {', '.join(known) or 'none'}")
        if key not in known:
            raise ConfigError(
                f"--set {change}: unknown setting{nearest(key, known) or '; settings: ' + (', '.join(known) or 'none')}"
            )
        for name, settings in defaults.items():
            if key in settings:
                changed[name][key] = _as_type_of(settings[key], text, change)
    return changed


def _as_type_of(default: Setting, text: str, change: str) -> Setting:
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ConfigError(f"--set {change}: true or false works")
        return text == "true"
    try:
        return type(default)(text)
    except ValueError:
        raise ConfigError(f"--set {change}: not of the type {type(default).__name__}; {default} works") from None


def _list(benchmarks: Mapping[str, Benchmark], results: Path) -> None:
    for benchmark in benchmarks.values():
        files = [path.name for path in results_of(benchmark.name, results)]
        where = "GPU" if benchmark.needs_gpu else "CPU"
        print(f"{benchmark.name} ({where}; {', '.join(files) or 'no result yet'})\n  {benchmark.claim.splitlines()[0]}")
    for row in expected_pending(benchmarks, results):
        print(f"waiting for {row.needs}: {row.benchmark} {row.row}")


def _print_tables(chosen: Sequence[Benchmark], results: Path) -> None:
    for benchmark in chosen:
        for path in results_of(benchmark.name, results):
            record = read_record(path)
            commit = f", commit {record.commit.hash[:12]}{' + changes' * record.commit.dirty}" if record.commit else ""
            print(f"{record.result.table.markdown()}\n\n{path.name}: {record.result.finding} ({record.date}{commit})\n")


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
