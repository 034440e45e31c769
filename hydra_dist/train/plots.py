"""The pictures of a run: its loss against tokens, and its held-out loss by position in the sequence."""

from pathlib import Path
from typing import Any

SMOOTHING = 0.95
"""Share of the running mean that each step keeps."""


def plot_loss(path: Path, records: list[dict[str, Any]], evaluation: dict[str, Any] | None) -> None:
    """Write ``loss.png``: training loss of every step with its running mean, and the held-out loss by position."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 2 if evaluation else 1
    figure, axes = pyplot.subplots(1, columns, figsize=(6.4 * columns, 4), dpi=120, squeeze=False)
    left = axes[0, 0]
    tokens = [record["tokens"] / 1e6 for record in records]
    losses = [record["loss"] for record in records]
    left.plot(tokens, losses, color="0.75", linewidth=0.8, label="every step")
    left.plot(tokens, running_mean(losses), color="tab:blue", label=f"running mean ({SMOOTHING})")
    if evaluation and tokens:
        left.axhline(evaluation["loss"], color="tab:orange", linestyle="--", label="held out, at the end")
    left.set(xlabel="tokens (millions)", ylabel="loss (nats per token)", title="Training")
    left.legend()
    if evaluation:
        right = axes[0, 1]
        for name, label in (
            ("loss_by_position", "position in the packed row"),
            ("loss_by_context", "tokens of its document before it"),
        ):
            bins = [b for b in evaluation[name] if b["targets"]]
            right.plot([max(1, b["start"]) for b in bins], [b["loss"] for b in bins], marker="o", label=label)
        right.set(xscale="log", xlabel="tokens", ylabel="loss (nats per token)", title="Held out, by place")
        right.set_xscale("log", base=2)
        right.legend()
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def running_mean(values: list[float]) -> list[float]:
    """Exponential running mean, corrected for its start at zero (Kingma and Ba 2015, section 3)."""
    means, mean = [], 0.0
    for count, value in enumerate(values, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        means.append(mean / (1 - SMOOTHING**count))
    return means
