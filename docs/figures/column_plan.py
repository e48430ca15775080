"""Draw column_plan.svg: what three filters keep of the same softmax.

Run ``python docs/figures/column_plan.py [output]``. The data is synthetic and seeded; nothing here
uses the library, so that the picture shows the definition and not an implementation of it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Patch, Rectangle

TOKENS, VOCAB, DIM = 512, 1536, 24
ROW_TILE, COLUMN_TILE, CHUNK = 128, 128, 32
EPS = 2.0**-7

INK, BLUE, PALE_BLUE, ORANGE, PALE = "#1b2733", "#2f6db3", "#a9c8ea", "#e8a33d", "#e4e8ec"


def peaked_softmax(rng: np.random.Generator) -> np.ndarray:
    """Softmax of a Zipf head plus a low-rank, token-dependent part, shape (TOKENS, VOCAB)."""
    frequency = -2.0 * np.log(np.arange(VOCAB) + 2.0)
    classifier = rng.standard_normal((VOCAB, DIM))
    topics = rng.standard_normal((16, DIM))
    topic = np.repeat(rng.integers(0, len(topics), TOKENS // 16), 16)
    embeddings = topics[topic] + 0.25 * rng.standard_normal((TOKENS, DIM))
    logits = 0.5 * embeddings @ classifier.T + frequency
    logits -= logits.max(axis=1, keepdims=True)
    p = np.exp(logits)
    return p / p.sum(axis=1, keepdims=True)


def per_tile_maximum(p: np.ndarray) -> np.ndarray:
    """Largest p of every column within each row tile, shape (row tiles, VOCAB)."""
    return p.reshape(-1, ROW_TILE, VOCAB).max(axis=1)


def kept_tiles(p: np.ndarray) -> np.ndarray:
    """128 x 128 tiles that hold at least one p >= EPS, spread back over the elements."""
    tiles = per_tile_maximum(p).reshape(-1, VOCAB // COLUMN_TILE, COLUMN_TILE).max(axis=2) >= EPS
    return np.repeat(np.repeat(tiles, ROW_TILE, axis=0), COLUMN_TILE, axis=1)


def kept_columns(p: np.ndarray) -> np.ndarray:
    """Columns of a row tile that hold at least one p >= EPS, spread back over the elements."""
    return np.repeat(per_tile_maximum(p) >= EPS, ROW_TILE, axis=0)


def unbiased_weights(p: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Weight 1/q of the columns the unbiased filter keeps, 0 of the rest, per element."""
    m = per_tile_maximum(p)
    u = 1.0 - rng.random((m.shape[0], VOCAB // CHUNK))
    kept = m >= EPS * np.repeat(u, CHUNK, axis=1)
    weights = np.where(kept, 1.0 / np.minimum(1.0, m / EPS), 0.0)
    return np.repeat(weights, ROW_TILE, axis=0)


def draw(output: Path) -> None:
    """Draw the figure into `output`, an SVG or PNG."""
    p = peaked_softmax(np.random.default_rng(7))
    significant = p >= EPS
    tiles, columns = kept_tiles(p), kept_columns(p)
    weights = unbiased_weights(p, np.random.default_rng(11))

    figure, axes = plt.subplots(3, 1, figsize=(8.4, 8.6), sharex=True, layout="constrained")
    panels = [
        (axes[0], tiles.astype(float), "128 x 128 tiles: one element keeps 16 384"),
        (axes[1], columns.astype(float), "columns of a row tile: one element keeps 128"),
        (axes[2], weights, "columns, unbiased: small ones at random, with weight 1/q"),
    ]
    for axis, weight, title in panels:
        # Lines, because a single column is narrower than a pixel and an image would lose it.
        for top in range(0, TOKENS, ROW_TILE):
            for kept, color in ((weight[top] == 1, PALE_BLUE), (weight[top] > 1, ORANGE)):
                where = np.nonzero(kept)[0] + 0.5
                axis.vlines(where, top, top + ROW_TILE, color=color, linewidth=0.9, rasterized=True)
        rows, cols = np.nonzero(significant)
        axis.scatter(
            cols + 0.5,
            rows + 0.5,
            s=1.5,
            color=INK,
            marker="s",
            linewidths=0,
            rasterized=True,
            zorder=2,
        )
        for edge in range(ROW_TILE, TOKENS, ROW_TILE):
            axis.axhline(edge, color=INK, linewidth=0.8)
        for edge in range(COLUMN_TILE, VOCAB, COLUMN_TILE) if axis is axes[0] else ():
            axis.axvline(edge, color=PALE, linewidth=0.8, zorder=3)
        axis.set_title(
            f"{title}\nkept: {(weight > 0).mean():.1%} of the elements",
            loc="left",
            fontsize=10,
            color=INK,
        )
        axis.set_yticks(
            np.arange(ROW_TILE // 2, TOKENS, ROW_TILE),
            [f"row tile {t}" for t in range(TOKENS // ROW_TILE)],
        )
        axis.tick_params(axis="y", length=0)
        axis.add_patch(Rectangle((0, 0), VOCAB, TOKENS, fill=False, edgecolor=INK, linewidth=1.0))
        axis.set_xlim(0, VOCAB)
        axis.set_ylim(TOKENS, 0)
    axes[2].set_xticks(np.arange(0, VOCAB + 1, COLUMN_TILE))
    axes[2].set_xlabel("vocabulary column v")
    figure.legend(
        handles=[
            Patch(color=INK, label=f"p ≥ eps ({significant.mean():.1%} of the elements)"),
            Patch(color=PALE_BLUE, label="kept, weight 1"),
            Patch(color=ORANGE, label="kept by chance, weight 1/q > 1"),
            Patch(facecolor="white", edgecolor=INK, linewidth=0.6, label="skipped"),
        ],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize=9,
    )
    metadata = {"Date": None} if output.suffix == ".svg" else {}
    figure.savefig(output, dpi=160, metadata=metadata)
    plt.close(figure)


if __name__ == "__main__":
    mpl.use("agg")
    mpl.rcParams["svg.hashsalt"] = "column_plan"
    mpl.rcParams["font.size"] = 9
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
