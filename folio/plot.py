"""Figures from ``metrics.jsonl``."""

from __future__ import annotations

from pathlib import Path

from folio.log import METRICS, read_metrics


def loss_curve(out_dir: Path, picture: Path) -> None:
    """Draws the losses of a run over its steps; the suffix of ``picture`` says the format.

    Raises:
        FileNotFoundError: no run in ``out_dir``.
        ValueError: nothing to draw yet.
    """
    path = out_dir / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: train with --out_dir={out_dir} first")
    records = read_metrics(path)
    train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train" and r["loss"] is not None]
    val = [(r["step"], r["val_loss"]) for r in records if r["kind"] == "eval"]
    if not train and not val:
        raise ValueError(f"{path} holds no losses yet")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    if train:
        ax.plot(*zip(*train, strict=True), color="0.65", linewidth=0.8, label="train, each batch")
    if val:
        ax.plot(*zip(*val, strict=True), color="black", marker="o", markersize=3.5, label="validation")
        step, best = min(val, key=lambda point: point[1])
        ax.annotate(f"{best:.3f}", (step, best), xytext=(0, 7), textcoords="offset points", ha="center")
    ax.set(xlabel="step", ylabel="loss (nats per token)", title=out_dir.resolve().name)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(picture, dpi=150)
    plt.close(fig)
