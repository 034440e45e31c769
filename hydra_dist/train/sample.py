"""Continue a text with a run's newest checkpoint."""

from pathlib import Path

import torch

from hydra_dist.config import ModelConfig
from hydra_dist.data import load_tokenizer
from hydra_dist.errors import ConfigError, RunError
from hydra_dist.model import Transformer, generate
from hydra_dist.train import checkpoint
from hydra_dist.train.mesh import choose_device


def load_model(run: Path, device: torch.device) -> Transformer:
    """The model of the newest checkpoint in a run's folder, in fp32, for evaluation.

    Raises ConfigError where the folder is no run or has no checkpoint yet, RunError where the checkpoint is corrupt.
    """
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{run} is a file; the folder of a run, such as runs/quickstart, works")
    newest = checkpoint.latest(run / "checkpoints")
    if newest is None:
        runs = sorted(str(p.parent) for p in run.parent.glob("*/checkpoints")) if run.parent.is_dir() else []
        hint = f"; {', '.join(runs)} has one" if runs else "; train one with hydra-dist train CONFIG"
        raise ConfigError(f"{run}: no checkpoint under {run / 'checkpoints'}{hint}")
    manifest = checkpoint.read_manifest(newest)
    model = Transformer(ModelConfig.model_validate(manifest.model))
    difference = model.load_state_dict(checkpoint.load_weights(newest), strict=False)
    tied = {"head.weight"} if model.config.tie_embeddings else set()
    if difference.unexpected_keys or set(difference.missing_keys) - tied:
        raise RunError(f"{newest}: the weights are not those of the model in its manifest: {difference}")
    return model.to(device).eval()


def sample(
    run: Path,
    prompt: str,
    tokens: int,
    *,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """``prompt`` and what the model makes of it: at most ``tokens`` more tokens, fewer where the document ends."""
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: auto, cpu or cuda works")
    where = choose_device(device, key="--device")
    model = load_model(run, where)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    start = torch.tensor([[tokenizer.begin_id, *tokenizer.encode(prompt)]], device=where)
    continued = generate(
        model,
        start,
        max_new_tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_token=tokenizer.end_id,
    )
    return tokenizer.decode(continued[0].tolist())
