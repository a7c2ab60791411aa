"""Images and videos in raster order: neighbours in space and time, rows and columns."""

from __future__ import annotations

import numbers
from typing import Sequence

import numpy as np

from .checks import as_list, check_not_negative, check_positive
from .layouts import layout_in_turns, mask_layout
from .masks import Mask, causal_mask, local_mask, strided_mask


def neighborhood_mask(
    shape: Sequence[int], radius: int | Sequence[int], causal: bool = False
) -> Mask:
    """Each query attends to the keys within `radius` of it on every axis.

    >>> mask = neighborhood_mask([3, 4], radius=1)
    >>> mask(0, 4, np.arange(12)).reshape(3, 4).astype(int)  # row 1, column 0
    array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 0, 0]])
    >>> mask = neighborhood_mask([3, 4], radius=1, causal=True)
    >>> mask(0, 6, np.arange(12)).reshape(3, 4).astype(int)  # row 1, column 2
    array([[0, 1, 1, 1],
           [0, 1, 1, 0],
           [0, 0, 0, 0]])

    Args:
      shape: Positions on each axis: [height, width] of an image, [frames, height, width]
        of a video. The last axis runs fastest (raster order).
      radius: Positions to either side, 0 for the query's own alone; one number, or one
        for each axis.
      causal: Whether a query attends to no key that comes after it in raster order.

    Returns:
      `Mask`. At the border there are fewer keys: the neighbourhood does not move inwards,
      as it does in NATTEN.

    Raises:
      ValueError: If a size is not positive, a radius is negative, or there are more or
        fewer radii than axes.

    Reference: Parmar et al. 2018, "Image Transformer", arXiv:1802.05751; Hassani et al.
      2023, "Neighborhood Attention Transformer", arXiv:2204.07143.
    """
    shape = as_list("shape", shape)
    for size in shape:
        check_positive(shape=size)
    is_one = isinstance(radius, numbers.Number)
    radii = [radius] * len(shape) if is_one else as_list("radius", radius)
    for one in radii:
        check_not_negative(radius=one)
    if not shape or len(radii) != len(shape):
        raise ValueError(
            f"radius must be one number, or one for each axis of shape={shape}, "
            f"got {radius!r}"
        )
    # Axis n of a position is position // steps[n] % shape[n]. The first axis does not end.
    steps = [int(np.prod(shape[n + 1 :])) for n in range(len(shape))]

    def fn(head, q_idx, kv_idx):
        near = abs(q_idx // steps[0] - kv_idx // steps[0]) <= radii[0]
        for step, size, reach in zip(steps[1:], shape[1:], radii[1:]):
            distance = q_idx // step % size - kv_idx // step % size
            near = near & (abs(distance) <= reach)
        return near

    def bounds(head, q, kv):
        all_true, none_true = True, False
        for n, reach in enumerate(radii):
            q_lo, q_hi = interval(q, n)
            kv_lo, kv_hi = interval(kv, n)
            least, most = q_lo - kv_hi, q_hi - kv_lo
            all_true = (most <= reach) & (least >= -reach) & all_true
            none_true = (least > reach) | (most < -reach) | none_true
        return all_true, none_true

    def interval(span, n):
        """The least and the largest coordinate on axis n, or limits of them."""
        lo, hi = span.lo // steps[n], span.hi // steps[n]
        if n == 0:
            return lo, hi
        goes_on = lo // shape[n] < hi // shape[n]  # into the next row: it is everywhere
        lo, hi = lo % shape[n], hi % shape[n]
        return np.where(goes_on, 0, lo), np.where(goes_on, shape[n] - 1, hi)

    mask = Mask(fn, bounds, per_head=False)
    if causal:
        mask = mask & causal_mask()
    shown = ", causal=True" if causal else ""
    mask.name = f"neighborhood_mask({shape}, {radius}{shown})"
    return mask


def neighborhood_layout(
    shape: Sequence[int],
    block_size: int,
    radius: int | Sequence[int],
    causal: bool = False,
    heads: int = 1,
) -> np.ndarray:
    """Each query attends to the keys within `radius` of it on every axis.

    >>> neighborhood_layout([6, 16], 16, radius=1)[0].astype(int)
    array([[1, 1, 0, 0, 0, 0],
           [1, 1, 1, 0, 0, 0],
           [0, 1, 1, 1, 0, 0],
           [0, 0, 1, 1, 1, 0],
           [0, 0, 0, 1, 1, 1],
           [0, 0, 0, 0, 1, 1]])

    Args:
      shape: Positions on each axis, as of `neighborhood_mask`; the sequence has their
        product.
      block_size: Side of a block in positions.
      radius: Positions to either side; one number, or one for each axis.
      causal: Whether a query attends to no key that comes after it in raster order.
      heads: 1 to share the layout between heads.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(product of shape / block_size);
        True = computed. Pair with `neighborhood_mask(shape, radius, causal)`.

    Raises:
      ValueError: If a size is not positive, a radius is negative, or there are more or
        fewer radii than axes.
    """
    shape = as_list("shape", shape)
    mask = neighborhood_mask(shape, radius, causal)
    return mask_layout(mask, int(np.prod(shape)), block_size, heads=heads)


def row_column_mask(width: int) -> Mask:
    """Strided attention of an image: even heads look along the row, odd ones up: causal.

    In raster order the last `width` positions are those of the query's row so far and the
    rest of the row above; every `width`-th position before is above the query.

    >>> mask = row_column_mask(4)
    >>> mask(0, 9, np.arange(12)).reshape(3, 4).astype(int)  # row 2, column 1
    array([[0, 0, 0, 0],
           [0, 0, 1, 1],
           [1, 1, 0, 0]])
    >>> mask(1, 9, np.arange(12)).reshape(3, 4).astype(int)
    array([[0, 1, 0, 0],
           [0, 1, 0, 0],
           [0, 1, 0, 0]])

    Args:
      width: Positions in a row of the image. The paper's l.

    Returns:
      `Mask`, one rule for even heads and one for odd heads.

    Raises:
      ValueError: If `width` is not positive.

    Reference: Child et al. 2019, "Generating Long Sequences with Sparse Transformers",
      arXiv:1904.10509, section 4.3 and figure 3 (b); heads by turns: section 5.1.
    """
    check_positive(width=width)
    is_even = Mask(
        lambda head, q_idx, kv_idx: np.asarray(head) % 2 == 0,
        lambda head, q, kv: (np.asarray(head) % 2 == 0, np.asarray(head) % 2 == 1),
        per_head=True,
    )
    mask = (is_even & local_mask(width)) | (~is_even & strided_mask(width))
    mask.name = f"row_column_mask({width})"
    return mask


def row_column_layout(
    q_len: int, block_size: int, width: int, heads: int = 2
) -> np.ndarray:
    """Strided attention of an image: even heads look along the row, odd ones up: causal.

    >>> for head in row_column_layout(96, 8, width=32).astype(int):
    ...     print(head[-1])
    [0 0 0 0 0 0 0 1 1 1 1 1]
    [0 0 0 1 0 0 0 1 0 0 0 1]

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions.
      width: Positions in a row of the image. The paper's l.
      heads: A multiple of 2.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed. Pair with `row_column_mask(width)`.

    Raises:
      ValueError: If a size is not a positive integer, or `heads` is odd.

    Reference: Child et al. 2019, arXiv:1904.10509, section 4.3.
    """
    mask = row_column_mask(width)
    return layout_in_turns(mask, q_len, block_size, heads, 2, "len([row, column])")


def merged_mask(stride: int) -> Mask:
    """Each head looks along the row and up the column: local and strided in one.

    >>> merged_mask(4)(0, 9, np.arange(12)).reshape(3, 4).astype(int)  # row 2, column 1
    array([[0, 1, 0, 0],
           [0, 1, 1, 1],
           [1, 1, 0, 0]])

    Args:
      stride: Positions that a query sees, itself included, and between two of the keys
        further back; the width of an image. The paper's l.

    Returns:
      `Mask`. The paper's merged head of its other pattern is `fixed_mask`.

    Raises:
      ValueError: If `stride` is not positive.

    Reference: Child et al. 2019, "Generating Long Sequences with Sparse Transformers",
      arXiv:1904.10509, section 5.1.
    """
    check_positive(stride=stride)
    mask = local_mask(stride) | strided_mask(stride)
    mask.name = f"merged_mask({stride})"
    return mask


def merged_layout(
    q_len: int, block_size: int, stride: int, heads: int = 1
) -> np.ndarray:
    """Each head looks along the row and up the column: local and strided in one.

    >>> merged_layout(96, 8, stride=32)[0, -1].astype(int)
    array([0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1])

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions.
      stride: Positions that a query sees, itself included, and between two of the keys
        further back; the width of an image. The paper's l.
      heads: 1 to share the layout between heads.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed. Pair with `merged_mask(stride)`.

    Raises:
      ValueError: If a size is not a positive integer.

    Reference: Child et al. 2019, arXiv:1904.10509, section 5.1.
    """
    return mask_layout(merged_mask(stride), q_len, block_size, heads=heads)
