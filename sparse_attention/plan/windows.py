"""Windows: the keys on both sides of a query, each of them or every n-th."""

from __future__ import annotations

import numbers
from typing import Sequence

import numpy as np

from .checks import as_list, check_not_negative, check_positive
from .layouts import layout_in_turns
from .masks import Mask, near, same_residue, shifted


def window_mask(
    left: int | None,
    right: int | None,
    dilation: int | Sequence[int] = 1,
    offset: int = 0,
) -> Mask:
    """Each query attends to `left` keys before it, itself, and `right` keys after it.

    >>> window_mask(1, 2)(0, 3, np.arange(8)).astype(int)
    array([0, 0, 1, 1, 1, 1, 0, 0])
    >>> window_mask(1, 2, dilation=2)(0, 3, np.arange(8)).astype(int)
    array([0, 1, 0, 1, 0, 1, 0, 1])

    Args:
      left: Keys before the query; None: all.
      right: Keys after the query; None: all. 0 is causal: `local_mask(left + 1)`.
      dilation: Positions from one of these keys to the next; or one number for each
        head, where head h has number h mod `len(dilation)`.
      offset: The position of query 0 among the keys: query i has position i + offset.
        kv_len - q_len lines up the ends, as decoding needs it.

    Returns:
      `Mask`, one rule per head where the dilations differ.

    Raises:
      ValueError: If `left` or `right` is negative, a dilation is not positive, or
        `offset` is no integer.

    Reference: Beltagy et al. 2020, "Longformer: The Long-Document Transformer",
      arXiv:2004.05150, section 3.1.
    """
    sides = dict(left=left, right=right)
    check_not_negative(**{n: size for n, size in sides.items() if size is not None})
    dilations = as_dilations(dilation)
    mask = near(left, right, dilations)
    if set(dilations) != {1}:
        mask = mask & same_residue(*dilations)
    shown = "" if set(dilations) == {1} else f", dilation={dilation}"
    mask.name = f"window_mask({left}, {right}{shown})"
    return shifted(mask, offset)


def as_dilations(dilation):
    """The dilations that the heads have in turn; ValueError unless they are positive."""
    is_one = isinstance(dilation, (numbers.Number, str)) or dilation is None
    dilations = [dilation] if is_one else as_list("dilation", dilation)
    if not dilations:
        raise ValueError(f"dilation must have a number for each head, got {dilation!r}")
    for one in dilations:
        check_positive(dilation=one)
    return dilations


def window_layout(
    q_len: int,
    block_size: int,
    left: int | None,
    right: int | None,
    dilation: int | Sequence[int] = 1,
    heads: int | None = None,
) -> np.ndarray:
    """Each query attends to `left` keys before it, itself, and `right` keys after it.

    >>> window_layout(80, 16, left=32, right=16)[0].astype(int)
    array([[1, 1, 0, 0, 0],
           [1, 1, 1, 0, 0],
           [1, 1, 1, 1, 0],
           [0, 1, 1, 1, 1],
           [0, 0, 1, 1, 1]])

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions.
      left: Keys before the query; None: all.
      right: Keys after the query; None: all.
      dilation: Positions from one of these keys to the next; or one number for each
        head, where head h has number h mod `len(dilation)`.
      heads: 1 to share the layout between heads; a multiple of the number of dilations;
        None: that number.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed. Pair with `window_mask(left, right, dilation)`.

    Raises:
      ValueError: If a size is negative, a length, dilation or `heads` is not positive,
        or `heads` is no multiple of the number of dilations.

    Reference: Beltagy et al. 2020, arXiv:2004.05150, section 3.1.
    """
    mask = window_mask(left, right, dilation)
    turns = len(as_dilations(dilation))
    return layout_in_turns(mask, q_len, block_size, heads, turns, "len(dilation)")
