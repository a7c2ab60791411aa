"""Draws the patterns, query by query and key by key, side by side in one PNG.

    python examples/draw_layouts.py [docs/layouts.png]

Needs matplotlib; does not need TensorFlow.
"""

import os
import sys

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sparse_attention.plan.block_mask import EMPTY, BlockMask
from sparse_attention.plan.patterns import PATTERNS, pattern_block_mask

LENGTH, BLOCK_SIZE, STRIDE = 96, 8, 24
HERE = os.path.dirname(os.path.abspath(__file__))
DEFAULT_PATH = os.path.normpath(os.path.join(HERE, "..", "docs", "layouts.png"))

RULES = {
    "all": "everything before: $j \\leq i$",
    "local": "the last $l$ positions: $0 \\leq i - j < l$",
    "strided": "every $l$-th before: $(i - j)$ mod $l = 0$",
    "fixed": "its own window, a summary of earlier ones",
}
SKIPPED, MASKED, FAR, NEAR, ITSELF = range(5)
LEGEND = {
    ITSELF: ("#0f2d4e", "the query itself"),
    NEAR: ("#3b7fc0", "allowed, nearby"),
    FAR: ("#93c5ea", "allowed, far away: every $l$-th, or a summary"),
    MASKED: ("#eadfc8", "computed with its block, then masked"),
    SKIPPED: ("#ffffff", "not computed"),
}
INK, FRAME = "#2b2b2b", "#9a9a9a"

# All in pixels, so that every element is a square of whole pixels.
DPI, SIDE, GAP, LEFT, RIGHT, TOP, BOTTOM = 160, 5 * LENGTH, 56, 64, 24, 100, 160


def element_kinds(mode):
    """What becomes of every pair of a query (row) and a key (column).

    Returns:
      int [LENGTH, LENGTH], keys of `LEGEND`, and the density.
    """
    block_mask = pattern_block_mask(
        mode, LENGTH, 1, BLOCK_SIZE, local_attn_ctx=STRIDE, num_verts=1
    )
    computed = BlockMask(
        block_mask.block_kinds != EMPTY,
        block_size=BLOCK_SIZE,
        q_len=LENGTH,
        kv_len=LENGTH,
        row_stride=block_mask.row_stride,
    )
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    is_far = (mode in ("strided", "fixed")) & (i // STRIDE != j // STRIDE)
    kinds = np.where(computed.to_dense()[0], MASKED, SKIPPED)
    kinds = np.where(block_mask.to_dense()[0], np.where(is_far, FAR, NEAR), kinds)
    return np.where(i == j, ITSELF, kinds), block_mask.density


def draw(path):
    width = LEFT + len(PATTERNS) * (SIDE + GAP) - GAP + RIGHT
    height = TOP + SIDE + BOTTOM
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    colors = ListedColormap([LEGEND[kind][0] for kind in sorted(LEGEND)])
    for n, mode in enumerate(PATTERNS):
        left = LEFT + n * (SIDE + GAP)
        axis = figure.add_axes(
            [left / width, BOTTOM / height, SIDE / width, SIDE / height]
        )
        kinds, density = element_kinds(mode)
        axis.imshow(kinds, colors, vmin=SKIPPED, vmax=ITSELF, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set(color=FRAME, linewidth=0.8)
        axis.set_title(mode, fontsize=14, fontweight="bold", color=INK, pad=24)
        rule = RULES.get(mode, "")
        axis.text(0.5, 1.03, rule, transform=axis.transAxes, ha="center", color=INK)
        axis.set_xlabel(f"key $j$\ndensity {100 * density:.0f} %", color=INK)
        axis.set_ylabel("query $i$", color=INK)
    figure.legend(
        handles=[
            Patch(facecolor=color, edgecolor=FRAME, linewidth=0.8, label=label)
            for color, label in LEGEND.values()
        ],
        title=f"{LENGTH} positions in blocks of {BLOCK_SIZE}, $l$ = {STRIDE}",
        loc="lower center",
        ncol=len(LEGEND),
        frameon=False,
    )
    figure.savefig(path)


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_PATH
    draw(path)
    print(f"drew {path}")
