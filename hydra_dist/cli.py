"""``hydra-dist``: the commands a person types. Each is a few lines over the package that does the work.

Heavy imports stand inside the commands, so that ``hydra-dist --help`` and questions that need no torch start at once.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from hydra_dist.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help="Prepare and look at training data.")
app.add_typer(data_app, name="data")

ConfigPath = Annotated[str, typer.Argument(help="YAML file, such as configs/quickstart.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ...")]


@app.command()
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    processes: Annotated[int, typer.Option(min=1, help="How many processes torchrun will start.")] = 1,
) -> None:
    """Find every mistake that can be known before a process is started."""
    from hydra_dist.config.file import load_config
    from hydra_dist.costs.strategy import resolve
    from hydra_dist.train.mesh import choose_device
    from hydra_dist.train.preflight import check_device, preflight

    loaded = load_config(config, overrides or [])
    check_device(loaded, choose_device(loaded.train.device, share_gpu=loaded.train.share_gpu))
    prepared = preflight(loaded, config, processes, verify_data=True)
    done = f"goes on after step {prepared.resume_step}" if prepared.resume_from else "starts new"
    choice = resolve(loaded)
    if loaded.context.size > 1:
        print(f"context strategy {choice.chosen.grid}: {choice.why}")
    print(
        f"{config}: good. {prepared.data_size} data x {loaded.context.size} context ranks; "
        f"{prepared.train.num_rows:,} rows of {loaded.data.sequence_length:,} tokens; {done} in {loaded.run.directory}"
    )


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Default: one a GPU, or context.size on a CPU.")] = None,
) -> None:
    """Check the configuration, then train on this machine through torchrun."""
    import torch

    from hydra_dist.config.file import load_config

    loaded = load_config(config, overrides or [])
    gpus = torch.cuda.device_count() if loaded.train.device != "cpu" else 0
    count = processes or gpus or loaded.context.size
    check(config, overrides, count)
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command += ["-m", "hydra_dist.train", config, *(overrides or [])]
    raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)


@app.command()
def emulate(
    config: ConfigPath,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 3,
    compare: Annotated[bool, typer.Option(help="Also train on one rank, which holds whole sequences.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Train some steps with all context ranks in this process, on one GPU or a CPU, and compare with one rank."""
    from hydra_dist.config.file import load_config
    from hydra_dist.train.emulate import emulate as run
    from hydra_dist.train.emulate import report
    from hydra_dist.train.mesh import choose_device
    from hydra_dist.train.preflight import preflight

    loaded = load_config(config, overrides or [])
    place = choose_device(device, "--device")
    prepared = preflight(loaded, config, loaded.context.size)
    rows = loaded.train.micro_batch_size * loaded.train.gradient_accumulation_steps
    found = run(
        loaded,
        prepared.model,
        lambda step: [
            prepared.train.batch(step, range(first, first + loaded.train.micro_batch_size), rows)
            for first in range(0, rows, loaded.train.micro_batch_size)
        ],
        steps=steps,
        device=place,
        compare=compare,
        timeout=loaded.context.timeout_seconds,
    )
    print(report(found))
    if not found.agrees:
        raise SystemExit(1)


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to add at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token each time.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Keep the likeliest tokens up to this mass.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Continue a text with the newest checkpoint of a run."""
    from hydra_dist.train.sample import sample

    print(sample(run, prompt, tokens, temperature=temperature, top_p=top_p, seed=seed, device=device))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder.")],
    output: Annotated[Path, typer.Option(help="Folder to write; new or empty.")],
    checkpoint: Annotated[int | None, typer.Option(min=0, help="Step of the checkpoint; default: the newest.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file, such as 5GB or 500MB.")] = "5GB",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    skip_unmatched: Annotated[bool, typer.Option(help="Leave out weights that have no counterpart there.")] = False,
) -> None:
    """Write a run's weights in the names of Hugging Face's transformers: llama (gqa) or zaya (ccgqa)."""
    from hydra_dist.export import export_run

    print(
        export_run(
            run,
            output,
            step=checkpoint,
            max_shard_size=max_shard_size,
            dtype=dtype,
            skip_unmatched=skip_unmatched,
        )
    )


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors.")],
    output: Annotated[Path, typer.Option(help="The new run's folder.")],
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Make the vocabulary this large.")] = None,
    skip_unmatched: Annotated[bool, typer.Option(help="Leave out weights that have no counterpart here.")] = False,
) -> None:
    """Make a run of a llama or zaya model of Hugging Face's transformers."""
    from hydra_dist.export import import_run

    print(import_run(folder, output, vocab_size=vocab_size, skip_unmatched=skip_unmatched))


@data_app.command()
def prepare(
    inputs: Annotated[
        list[str],
        typer.Option("--input", help='Text file, folder, .jsonl or .parquet; "stdlib" is the built-in corpus.'),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    tokenizer: Annotated[str, typer.Option(help="byte, train:N (N entries), or a tokenizers FILE.json")] = "train:8192",
    field: Annotated[str, typer.Option(help="Field of JSONL and Parquet rows that holds the text.")] = "text",
    eval_fraction: Annotated[float, typer.Option(min=0, max=0.5, help="Share of documents held out.")] = 1 / 32,
    skip_undecodable: Annotated[bool, typer.Option(help="Count and leave out files that are not UTF-8.")] = False,
) -> None:
    """Tokenize text into memory-mapped shards; started again after an interruption, it goes on."""
    from hydra_dist.data import prepare_command

    prepare_command(
        inputs,
        output,
        tokenizer,
        field=field,
        eval_fraction=eval_fraction,
        skip_undecodable=skip_undecodable,
    )


def repeat_option(arguments: list[str], option: str) -> list[str]:
    """``--input a b`` as ``--input a --input b``: the parser takes one value after an option, people type several."""
    expanded: list[str] = []
    inside = False
    for argument in arguments:
        if argument.startswith("-"):
            inside = argument == option
            if inside:
                continue
        expanded += [option, argument] if inside else [argument]
    return expanded if arguments[-1:] != [option] else [*expanded, option]


def main() -> None:
    """The console script: a user's mistake is one message and exit code 2 (1 where the run failed)."""
    try:
        app(args=repeat_option(sys.argv[1:], "--input"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
