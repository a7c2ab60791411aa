"""Draws the patterns, query by query and key by key: two PNGs, docs/layouts.png and
docs/more_layouts.png.

    python examples/draw_layouts.py [docs]

Needs matplotlib; does not need TensorFlow.
"""

import os
import sys

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import sparse_attention as sa
from sparse_attention.plan.block_mask import EMPTY, BlockMask
from sparse_attention.plan.patterns import PATTERNS, pattern_block_mask

LENGTH, BLOCK_SIZE, STRIDE = 96, 8, 24
HERE = os.path.dirname(os.path.abspath(__file__))
DEFAULT_FOLDER = os.path.normpath(os.path.join(HERE, "..", "docs"))

RULES = {
    "all": "everything before: $j \\leq i$",
    "local": "the last $l$ positions: $0 \\leq i - j < l$",
    "strided": "every $l$-th before: $(i - j)$ mod $l = 0$",
    "fixed": "its own window, a summary of earlier ones",
}
SKIPPED, MASKED, FAR, NEAR, ITSELF = range(5)
LEGEND = {
    ITSELF: ("#0f2d4e", "the query itself"),
    NEAR: ("#3b7fc0", "allowed"),
    FAR: ("#93c5ea", "allowed, far away: every $l$-th, or a summary"),
    MASKED: ("#eadfc8", "computed with its block, then masked"),
    SKIPPED: ("#ffffff", "not computed"),
}
INK, FRAME = "#2b2b2b", "#9a9a9a"

# All in pixels, so that every element is a square of whole pixels.
DPI, SIDE, GAP, LEFT, RIGHT, TOP, BOTTOM = 160, 5 * LENGTH, 56, 64, 24, 100, 160


def named_patterns():
    """The patterns of the table, each with its rule and its plan of one head."""
    for mode in PATTERNS:
        yield (
            mode,
            RULES.get(mode, ""),
            pattern_block_mask(
                mode, LENGTH, 1, BLOCK_SIZE, local_attn_ctx=STRIDE, num_verts=1
            ),
        )


def more_patterns():
    """Patterns of other models, likewise."""
    sizes, image, documents = (LENGTH, BLOCK_SIZE), [12, 8], [28, 40, 20]

    def plan(layout, mask=None):
        return BlockMask(layout, mask, BLOCK_SIZE, LENGTH, LENGTH)

    yield (
        "window",
        "12 keys before, 6 after",
        plan(sa.window_layout(*sizes, 12, 6), sa.window_mask(12, 6)),
    )
    yield (
        "window, dilation 3",
        "4 keys on both sides, every third",
        plan(sa.window_layout(*sizes, 4, 4, 3), sa.window_mask(4, 4, 3)),
    )
    yield (
        "prefix",
        "the first 32 keys, and what comes before",
        plan(sa.prefix_layout(*sizes, 32), sa.prefix_mask(32)),
    )
    yield (
        "documents",
        "of 28, 40 and 20 positions, then padding",
        plan(sa.documents_layout(*sizes, documents), sa.documents_mask(documents)),
    )
    yield (
        "longformer",
        "8 keys on both sides, two global tokens",
        plan(
            sa.longformer_layout(*sizes, 16, [0, 60]), sa.longformer_mask(16, [0, 60])
        ),
    )
    yield (
        "bigbird",
        "neighbours, both ends, one block at random",
        plan(sa.bigbird_layout(*sizes, random_blocks=1)),
    )
    yield (
        "neighborhood",
        "within 2 in an image of 12 rows of 8",
        plan(
            sa.neighborhood_layout(image, BLOCK_SIZE, 2),
            sa.neighborhood_mask(image, 2),
        ),
    )
    yield (
        "merged",
        "the last 24 positions, and every 24th before",
        plan(sa.merged_layout(*sizes, STRIDE), sa.merged_mask(STRIDE)),
    )


def element_kinds(block_mask, is_far):
    """What becomes of every pair of a query (row) and a key (column).

    Args:
      block_mask: A plan of `LENGTH` positions and one head.
      is_far: bool [LENGTH, LENGTH], which of the allowed pairs are far away.

    Returns:
      int [LENGTH, LENGTH], keys of `LEGEND`.
    """
    computed = BlockMask(
        block_mask.block_kinds != EMPTY,
        block_size=BLOCK_SIZE,
        q_len=LENGTH,
        kv_len=LENGTH,
        row_stride=block_mask.row_stride,
    )
    i, j = np.arange(LENGTH)[:, None], np.arange(LENGTH)
    allowed = block_mask.to_dense()[0]
    kinds = np.where(computed.to_dense()[0], MASKED, SKIPPED)
    kinds = np.where(allowed, np.where(is_far, FAR, NEAR), kinds)
    return np.where(allowed & (i == j), ITSELF, kinds)


def draw(path, patterns, columns, legend_title, far_modes=()):
    patterns = list(patterns)
    rows = -(-len(patterns) // columns)
    width = LEFT + columns * (SIDE + GAP) - GAP + RIGHT
    height = rows * (TOP + SIDE) + (rows - 1) * GAP + BOTTOM
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    colors = ListedColormap([LEGEND[kind][0] for kind in sorted(LEGEND)])
    window = np.arange(LENGTH) // STRIDE
    for n, (name, rule, block_mask) in enumerate(patterns):
        row, column = divmod(n, columns)
        left = LEFT + column * (SIDE + GAP)
        bottom = BOTTOM + (rows - 1 - row) * (SIDE + TOP + GAP)
        axis = figure.add_axes(
            [left / width, bottom / height, SIDE / width, SIDE / height]
        )
        is_far = (name in far_modes) & (window[:, None] != window)
        kinds = element_kinds(block_mask, is_far)
        axis.imshow(kinds, colors, vmin=SKIPPED, vmax=ITSELF, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set(color=FRAME, linewidth=0.8)
        axis.set_title(name, fontsize=14, fontweight="bold", color=INK, pad=24)
        axis.text(0.5, 1.03, rule, transform=axis.transAxes, ha="center", color=INK)
        density = 100 * block_mask.density
        axis.set_xlabel(f"key $j$\ndensity {density:.0f} %", color=INK)
        axis.set_ylabel("query $i$", color=INK)
    kinds = [kind for kind in LEGEND if far_modes or kind != FAR]
    figure.legend(
        handles=[
            Patch(facecolor=color, edgecolor=FRAME, linewidth=0.8, label=label)
            for color, label in (LEGEND[kind] for kind in kinds)
        ],
        title=legend_title,
        loc="lower center",
        ncol=len(kinds),
        frameon=False,
    )
    figure.savefig(path)
    print(f"drew {path}")


def main():
    folder = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_FOLDER
    blocks = f"{LENGTH} positions in blocks of {BLOCK_SIZE}"
    draw(
        os.path.join(folder, "layouts.png"),
        *(named_patterns(), len(PATTERNS), f"{blocks}, $l$ = {STRIDE}"),
        far_modes=("strided", "fixed"),
    )
    draw(os.path.join(folder, "more_layouts.png"), more_patterns(), 4, blocks)


if __name__ == "__main__":
    main()
