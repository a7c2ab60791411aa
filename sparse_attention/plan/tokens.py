"""Tokens that are unlike others: a prefix, documents in one sequence, global tokens."""

from __future__ import annotations

from typing import Sequence

import numpy as np

from .checks import as_list, as_positions, check_positive
from .layouts import mask_layout
from .masks import Mask, causal_mask, same_part, sink_mask


def prefix_mask(prefix: int, offset: int = 0) -> Mask:
    """Everybody sees the first `prefix` keys, in both directions; after them: causal.

    >>> prefix_mask(2)(0, np.arange(4)[:, None], np.arange(4)).astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0],
           [1, 1, 1, 1]])

    Args:
      prefix: Positions at the start that see each other.
      offset: The position of query 0 among the keys: query i has position i + offset.
        kv_len - q_len lines up the ends, as decoding needs it.

    Returns:
      `Mask`.

    Raises:
      ValueError: If `prefix` is not positive, or `offset` is no integer.

    Reference: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a
      Unified Text-to-Text Transformer", arXiv:1910.10683, section 3.2.1.
    """
    check_positive(prefix=prefix)
    mask = causal_mask(offset) | sink_mask(prefix)
    shown = f", offset={offset}" if offset else ""
    mask.name = f"prefix_mask({prefix}{shown})"
    return mask


def prefix_layout(
    q_len: int, block_size: int, prefix: int, heads: int = 1
) -> np.ndarray:
    """Everybody sees the first `prefix` keys, in both directions; after them: causal.

    >>> prefix_layout(64, 16, prefix=32)[0].astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0],
           [1, 1, 1, 1]])

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions.
      prefix: Positions at the start that see each other.
      heads: 1 to share the layout between heads.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed. Pair with `prefix_mask(prefix)`.

    Raises:
      ValueError: If a size is not a positive integer.
    """
    return mask_layout(prefix_mask(prefix), q_len, block_size, heads=heads)


def documents_mask(lengths: Sequence[int], causal: bool = False) -> Mask:
    """Documents in one sequence: a query attends to keys of its own document alone.

    >>> documents_mask([2, 3])(0, np.arange(6)[:, None], np.arange(6)).astype(int)
    array([[1, 1, 0, 0, 0, 0],
           [1, 1, 0, 0, 0, 0],
           [0, 0, 1, 1, 1, 0],
           [0, 0, 1, 1, 1, 0],
           [0, 0, 1, 1, 1, 0],
           [0, 0, 0, 0, 0, 0]])

    Args:
      lengths: Positions of each document, in order. What comes after the last document
        is padding: it attends to nothing and nothing attends to it.
      causal: Whether a query attends to no key after it.

    Returns:
      `Mask`.

    Raises:
      ValueError: If `lengths` is empty or has a number that is not positive.
    """
    lengths = as_list("lengths", lengths)
    if not lengths:
        raise ValueError("lengths must have a number for each document, got none")
    for length in lengths:
        check_positive(lengths=length)
    ends = np.cumsum(lengths)
    document = same_part(lambda idx: np.searchsorted(ends, idx, side="right"))
    mask = document & sink_mask(int(ends[-1]))  # which ends before the padding
    if causal:
        mask = mask & causal_mask()
    shown = ", causal=True" if causal else ""
    mask.name = f"documents_mask({few(lengths)}{shown})"
    return mask


def documents_layout(
    q_len: int,
    block_size: int,
    lengths: Sequence[int],
    causal: bool = False,
    heads: int = 1,
) -> np.ndarray:
    """Documents in one sequence: a query attends to keys of its own document alone.

    >>> documents_layout(80, 16, lengths=[32, 24, 24])[0].astype(int)
    array([[1, 1, 0, 0, 0],
           [1, 1, 0, 0, 0],
           [0, 0, 1, 1, 0],
           [0, 0, 1, 1, 1],
           [0, 0, 0, 1, 1]])

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions.
      lengths: Positions of each document, in order; what comes after the last one is
        padding.
      causal: Whether a query attends to no key after it.
      heads: 1 to share the layout between heads.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed. Pair with `documents_mask(lengths, causal)`.

    Raises:
      ValueError: If a size or length is not a positive integer, or the documents are
        longer than `q_len`.
    """
    lengths = as_list("lengths", lengths)
    mask = documents_mask(lengths, causal)
    layout = mask_layout(mask, q_len, block_size, heads=heads)
    if sum(lengths) > q_len:
        raise ValueError(
            f"lengths must add up to at most q_len={q_len}, got {sum(lengths)}"
        )
    return layout


def global_mask(positions: Sequence[int]) -> Mask:
    """The tokens at `positions` attend to all, and all attend to them.

    >>> global_mask([1])(0, np.arange(4)[:, None], np.arange(4)).astype(int)
    array([[0, 1, 0, 0],
           [1, 1, 1, 1],
           [0, 1, 0, 0],
           [0, 1, 0, 0]])

    Args:
      positions: Those of the global tokens, in any order.

    Returns:
      `Mask`; usually `window_mask(left, right) | global_mask(positions)`.

    Raises:
      ValueError: If `positions` are no different integers from 0 on.

    Reference: Beltagy et al. 2020, "Longformer: The Long-Document Transformer",
      arXiv:2004.05150, section 3.1.
    """
    chosen = as_positions("positions", positions)

    def is_global(idx):
        return count(idx, idx) > 0

    def count(lo, hi):
        return np.searchsorted(chosen, hi, "right") - np.searchsorted(chosen, lo)

    def bounds(head, q, kv):
        q_count, kv_count = count(q.lo, q.hi), count(kv.lo, kv.hi)
        all_true = (q_count == q.hi - q.lo + 1) | (kv_count == kv.hi - kv.lo + 1)
        return all_true, (q_count == 0) & (kv_count == 0)

    return Mask(
        lambda head, q_idx, kv_idx: is_global(q_idx) | is_global(kv_idx),
        bounds,
        per_head=False,
        name=f"global_mask({few(chosen)})",
    )


def global_layout(
    q_len: int, block_size: int, positions: Sequence[int], heads: int = 1
) -> np.ndarray:
    """The tokens at `positions` attend to all, and all attend to them.

    >>> global_layout(80, 16, positions=[0, 50])[0].astype(int)
    array([[1, 1, 1, 1, 1],
           [1, 0, 0, 1, 0],
           [1, 0, 0, 1, 0],
           [1, 1, 1, 1, 1],
           [1, 0, 0, 1, 0]])

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions.
      positions: Those of the global tokens, in any order.
      heads: 1 to share the layout between heads.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed. Pair with `global_mask(positions)`.

    Raises:
      ValueError: If a size is not a positive integer, or `positions` are no different
        integers from 0 to q_len - 1.
    """
    check_inside(q_len, positions=positions)
    return mask_layout(global_mask(positions), q_len, block_size, heads=heads)


def check_inside(q_len, **positions):
    """Raises ValueError unless all of the named positions are below `q_len`."""
    check_positive(q_len=q_len)
    for name, values in positions.items():
        last = max(as_positions(name, values), default=0)
        if last >= q_len:
            raise ValueError(f"{name} must be below q_len={q_len}, got {last}")


def few(numbers):
    """The first of the numbers, as a mask's name shows them.

    >>> few(range(10))
    '[0, 1, 2, 3, ...]'
    """
    return f"[{', '.join(map(str, numbers[:4]))}{', ...' if len(numbers) > 4 else ''}]"
