"""Continuing token sequences by sampling."""

import torch
from torch import Tensor

from hydra_dist.errors import ConfigError
from hydra_dist.model.decode import DecodeState, decode_hidden
from hydra_dist.model.transformer import Transformer


@torch.no_grad()
def generate(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_token: int | None = None,
) -> Tensor:
    """Continue ``tokens`` [B, S].

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among this many likeliest tokens.
        top_p: sample among the fewest likeliest tokens whose probabilities sum to this or more (Holtzman et al. 2019,
            arXiv 1904.09751, section 3.1); after ``top_k``.
        seed: the same seed and the same batch give the same tokens; one stream of numbers serves all rows.
        stop_token: a row that has produced it is filled up with it; generation ends when all rows have.

    Returns:
        [B, S + n], n <= max_new_tokens.

    Raises:
        ConfigError: an empty prompt, or a setting out of its range.
    """
    _check(tokens, max_new_tokens, temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(seed)
    state = DecodeState(model)
    finished = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    new = tokens
    for _ in range(max_new_tokens):
        logits = model.head(decode_hidden(model, new, state)[:, -1:])[:, 0]
        chosen = _choose(logits, temperature, top_k, top_p, generator).to(tokens.dtype)
        if stop_token is not None:
            chosen = chosen.masked_fill(finished, stop_token)
            finished = finished | (chosen == stop_token)
        new = chosen.unsqueeze(1)
        tokens = torch.cat([tokens, new], dim=1)
        if stop_token is not None and bool(finished.all()):
            break
    return tokens


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """One token of each row of ``logits`` [B, V]; drawn on CPU, so that the device does not change the draw."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, index = (logits.cpu().double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        probabilities[:, top_k:] = 0
    if top_p is not None:
        probabilities /= probabilities.sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= top_p] = 0
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return index.gather(-1, drawn).squeeze(-1).to(logits.device)


def _check(tokens: Tensor, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if tokens.dim() != 2 or tokens.shape[1] == 0:
        raise ConfigError(f"a prompt of shape {list(tokens.shape)}: [batch, at least one token] works")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens {max_new_tokens}: 0 or more works")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature {temperature}: 0 or more works, 1.0 samples as the model says")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k {top_k}: 1 or more works, None takes all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p {top_p}: above 0 and up to 1 works")
