"""Longformer: a window on both sides and global tokens, with a dilation for each head."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from .checks import as_positions, check_positive
from .layouts import layout_in_turns
from .masks import Mask
from .tokens import check_inside, few, global_mask
from .windows import as_dilations, window_mask


def longformer_mask(
    window: int,
    global_positions: Sequence[int] = (),
    dilation: int | Sequence[int] = 1,
) -> Mask:
    """Each query sees half a window on both sides; global tokens see and are seen by all.

    >>> longformer_mask(2, [0])(0, np.arange(6)[:, None], np.arange(6)).astype(int)
    array([[1, 1, 1, 1, 1, 1],
           [1, 1, 1, 0, 0, 0],
           [1, 1, 1, 1, 0, 0],
           [1, 0, 1, 1, 1, 0],
           [1, 0, 0, 1, 1, 1],
           [1, 0, 0, 0, 1, 1]])

    Args:
      window: Keys that a query sees beside itself, half of them on each side; even. This
        is `attention_window` of Hugging Face's `LongformerConfig`.
      global_positions: Those of the global tokens; of Hugging Face's
        `global_attention_mask`, `np.flatnonzero(global_attention_mask)`.
      dilation: Positions from one key of the window to the next; or one number for each
        head, where head h has number h mod `len(dilation)`.

    Returns:
      `Mask`, one rule per head where the dilations differ. With `& causal_mask()` it is
      the paper's autoregressive attention.

    Raises:
      ValueError: If `window` is odd or not positive, a dilation is not positive, or
        `global_positions` are no different integers from 0 on.

    Reference: Beltagy et al. 2020, "Longformer: The Long-Document Transformer",
      arXiv:2004.05150, section 3.1.
    """
    check_positive(window=window)
    if window % 2:
        raise ValueError(f"window must be even, half of it on each side, got {window}")
    chosen = as_positions("global_positions", global_positions)
    window_on_both_sides = window_mask(window // 2, window // 2, dilation)
    mask = window_on_both_sides | global_mask(chosen)
    shown = f", {few(chosen)}" if len(chosen) else ""
    shown += "" if set(as_dilations(dilation)) == {1} else f", dilation={dilation}"
    mask.name = f"longformer_mask({window}{shown})"
    return mask


def longformer_layout(
    q_len: int,
    block_size: int,
    window: int,
    global_positions: Sequence[int] = (),
    dilation: int | Sequence[int] = 1,
    heads: int | None = None,
) -> np.ndarray:
    """Each query sees half a window on both sides; global tokens see and are seen by all.

    >>> longformer_layout(96, 16, window=32, global_positions=[0])[0].astype(int)
    array([[1, 1, 1, 1, 1, 1],
           [1, 1, 1, 0, 0, 0],
           [1, 1, 1, 1, 0, 0],
           [1, 0, 1, 1, 1, 0],
           [1, 0, 0, 1, 1, 1],
           [1, 0, 0, 0, 1, 1]])

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions.
      window: Keys that a query sees beside itself, half of them on each side; even.
      global_positions: Those of the global tokens.
      dilation: Positions from one key of the window to the next; or one number for each
        head, where head h has number h mod `len(dilation)`.
      heads: 1 to share the layout between heads; a multiple of the number of dilations;
        None: that number.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed. Pair with `longformer_mask(window, global_positions, dilation)`.

    Raises:
      ValueError: If a size or dilation is not a positive integer, `window` is odd,
        `global_positions` are no different integers from 0 to q_len - 1, or `heads` is no
        multiple of the number of dilations.

    Reference: Beltagy et al. 2020, arXiv:2004.05150, section 3.1.
    """
    mask = longformer_mask(window, global_positions, dilation)
    check_inside(q_len, global_positions=global_positions)
    turns = len(as_dilations(dilation))
    return layout_in_turns(mask, q_len, block_size, heads, turns, "len(dilation)")
