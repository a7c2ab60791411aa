"""Layouts: which blocks of the score matrix are computed at all.

A layout is bool [heads or 1, q_blocks, kv_blocks], True = computed. Each builder asks the
mask of the same name about whole blocks, and about elements where the mask cannot tell.
Lengths that are no multiple of the block size round up.
"""

from __future__ import annotations

from typing import Any, Iterator

import numpy as np

from .checks import check_positive
from .masks import (
    CHUNK,
    NUM_VERTS,
    VERTSIZE,
    Span,
    as_mask,
    causal_mask,
    check_heads,
    chunk_mask,
    dense_mask,
    fixed_mask,
    local_mask,
    sink_mask,
)


def mask_layout(
    mask: Any, q_len: int, block_size: int, kv_len: int | None = None, heads: int = 1
) -> np.ndarray:
    """The blocks in which a mask allows an element.

    >>> from sparse_attention.plan.masks import causal_mask, chunk_mask
    >>> mask_layout(chunk_mask(32) & causal_mask(), 64, 16)[0].astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [0, 0, 1, 0],
           [0, 0, 1, 1]])
    >>> mask_layout(lambda head, q_idx, kv_idx: q_idx >= kv_idx + 16, 64, 16)[0].astype(int)
    array([[0, 0, 0, 0],
           [1, 0, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0]])

    Args:
      mask: A `Mask`, a function `mask(head, q_idx, kv_idx)` -> bool that broadcasts, or
        a NumPy array, bool [q_len, kv_len] or [heads or 1, q_len, kv_len]. It is
        evaluated in the blocks that its bounds cannot decide; a plain function and an
        array have no bounds, so in all.
      q_len: Queries in positions.
      block_size: Side of a block in positions.
      kv_len: Keys in positions; None: as many as queries.
      heads: 1 to share the layout between heads.

    Returns:
      bool [heads, ceil(q_len / block_size), ceil(kv_len / block_size)]; True =
        computed.

    Raises:
      TypeError: If what the mask returns is neither boolean nor integer, nor floats that
        are 0 or 1.
      ValueError: If a size is not a positive integer, the mask differs between heads and
        `heads` is 1, or an array does not have all heads, queries and keys.

    Cost: q_len * kv_len elements of a plain function, for each head that it tells apart;
      memory for a million of them at a time.
    """
    kv_len = q_len if kv_len is None else kv_len
    check_positive(q_len=q_len, kv_len=kv_len, block_size=block_size, heads=heads)
    mask = as_mask(mask)
    heads_differ = check_heads(mask, heads)
    q_lo = np.arange(0, q_len, block_size)
    kv_lo = np.arange(0, kv_len, block_size)
    q = Span(q_lo[:, None], np.minimum(q_lo[:, None] + block_size, q_len) - 1)
    kv = Span(kv_lo, np.minimum(kv_lo + block_size, kv_len) - 1)
    layout = np.empty((heads, len(q_lo), len(kv_lo)), bool)
    for head in range(heads if heads_differ else 1):
        all_true, none_true = mask.bounds(head, q, kv)
        layout[head] = np.logical_not(none_true)
        undecided = layout[head] & np.logical_not(all_true)
        for q_blocks, kv_blocks in _groups(undecided, max(1, CHUNK // block_size**2)):
            # [rows of blocks, positions of a block], and those of all blocks in a row
            q_idx = q_lo[q_blocks, None] + np.arange(block_size)
            kv_idx = kv_lo[kv_blocks, None] + np.arange(block_size)
            q_idx = np.minimum(q_idx, q_len - 1)[:, :, None]
            kv_idx = np.minimum(kv_idx, kv_len - 1).reshape(len(q_blocks), 1, -1)
            allowed = mask(head, q_idx, kv_idx)
            allowed = np.broadcast_to(allowed, np.broadcast(q_idx, kv_idx).shape)
            is_read = allowed.any(axis=1).reshape(*kv_blocks.shape, block_size)
            layout[head, q_blocks[:, None], kv_blocks] = is_read.any(axis=2)
    if not heads_differ:
        layout[1:] = layout[0]
    return layout


def layout_in_turns(
    mask: Any,
    q_len: int,
    block_size: int,
    heads: int | None,
    turns: int,
    name: str,
    remedy: str = "",
) -> np.ndarray:
    """`mask_layout` of a mask that is the same for head h as for head h mod `turns`.

    Args:
      mask, q_len, block_size: As of `mask_layout`.
      heads: A multiple of `turns`; None: `turns`.
      turns: Different rules among the heads.
      name: What gives that number, for the error.
      remedy: What the error ends with.
    """
    heads = turns if heads is None else heads
    check_positive(heads=heads)
    if heads % turns:
        raise ValueError(
            f"heads must be a multiple of {name}={turns}, got {heads}{remedy}"
        )
    layout = mask_layout(mask, q_len, block_size, heads=turns)
    return layout[np.arange(heads) % turns]


def _groups(chosen: np.ndarray, size: int) -> Iterator[tuple]:
    """Collects blocks by rows, so that a mask answers for many of them at once.

    Args:
      chosen: bool [q_blocks, kv_blocks].
      size: Blocks in a group, at most.

    Yields:
      q_blocks [rows], and kv_blocks [rows, n], those of each row.
    """
    counts = np.count_nonzero(chosen, axis=1)
    for count in np.unique(counts[counts > 0]):
        q_blocks = np.flatnonzero(counts == count)
        kv_blocks = np.nonzero(chosen[q_blocks])[1].reshape(-1, count)
        rows = max(1, size // count)
        for row in range(0, len(q_blocks), rows):
            for column in range(0, count, size):
                some = slice(row, row + rows)
                yield q_blocks[some], kv_blocks[some, column : column + size]


def dense_layout(
    q_len: int, block_size: int, kv_len: int | None = None, heads: int = 1
) -> np.ndarray:
    """Every query looks at every key, in both directions.

    >>> dense_layout(48, 16, kv_len=32)[0].astype(int)
    array([[1, 1],
           [1, 1],
           [1, 1]])

    Args:
      q_len: Queries in positions.
      block_size: Side of a block in positions.
      kv_len: Keys in positions; None: as many as queries.
      heads: 1 to share the layout between heads.

    Returns:
      bool [heads, ceil(q_len / block_size), ceil(kv_len / block_size)]; True =
        computed.

    Raises:
      ValueError: If a size is not a positive integer.
    """
    return mask_layout(dense_mask(), q_len, block_size, kv_len, heads)


def all_layout(q_len: int, block_size: int, heads: int = 1) -> np.ndarray:
    """Each query attends to itself and everything before it: causal attention.

    This is the pattern "all" of OpenAI's code.

    >>> all_layout(64, 16)[0].astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0],
           [1, 1, 1, 1]])

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions.
      heads: 1 to share the layout between heads.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed. Pair with `causal_mask()`.

    Raises:
      ValueError: If a size is not a positive integer.
    """
    return mask_layout(causal_mask(), q_len, block_size, heads=heads)


def local_layout(
    q_len: int, block_size: int, window: int, heads: int = 1
) -> np.ndarray:
    """Each query attends to itself and the `window - 1` positions before it: causal.

    >>> local_layout(64, 16, window=32)[0].astype(int)
    array([[1, 0, 0, 0],
           [1, 1, 0, 0],
           [1, 1, 1, 0],
           [0, 1, 1, 1]])

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions.
      window: Positions a query sees, itself included.
      heads: 1 to share the layout between heads.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed. Blocks on the rim are only partly allowed: pair with
        `local_mask(window)` for the exact pattern.

    Raises:
      ValueError: If a size is not a positive integer.

    Reference: Child et al. 2019, "Generating Long Sequences with Sparse Transformers",
      arXiv:1904.10509, section 4.3.
    """
    return mask_layout(local_mask(window), q_len, block_size, heads=heads)


def strided_layout(
    q_len: int, block_size: int, stride: int, heads: int = 1
) -> np.ndarray:
    """Each query attends to itself and every `stride`-th position before it: causal.

    Blocks fit these diagonals only in transposed time: positions visit the rows 0,
    stride, 2 * stride, ..., then the rows 1, 1 + stride, ... In this order the pattern
    is causal attention inside of chunks.

    >>> strided_layout(64, 8, stride=4)[0].astype(int)
    array([[1, 0, 0, 0, 0, 0, 0, 0],
           [1, 1, 0, 0, 0, 0, 0, 0],
           [0, 0, 1, 0, 0, 0, 0, 0],
           [0, 0, 1, 1, 0, 0, 0, 0],
           [0, 0, 0, 0, 1, 0, 0, 0],
           [0, 0, 0, 0, 1, 1, 0, 0],
           [0, 0, 0, 0, 0, 0, 1, 0],
           [0, 0, 0, 0, 0, 0, 1, 1]])

    Args:
      q_len: Sequence length in rows. With n = ceil(q_len / stride), position p is row
        (p mod n) * stride + floor(p / n) and does not exist where that is no row.
      block_size: Side of a block in positions.
      stride: Rows between two keys of a query.
      heads: 1 to share the layout between heads.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(n * stride / block_size); True =
        computed. Pair with `strided_mask(stride)` and `BlockMask`'s `row_stride`.

    Raises:
      ValueError: If a size is not a positive integer.

    Reference: Child et al. 2019, arXiv:1904.10509, section 4.3.
    """
    check_positive(q_len=q_len, stride=stride)
    chunk = -(-q_len // stride)
    return mask_layout(
        chunk_mask(chunk) & causal_mask(), chunk * stride, block_size, heads=heads
    )


def fixed_layout(
    q_len: int,
    block_size: int,
    stride: int,
    num_verts: int = NUM_VERTS,
    vertsize: int = VERTSIZE,
    heads: int | None = None,
) -> np.ndarray:
    """Each query attends to its window so far, and a summary of each one before: causal.

    >>> for head in fixed_layout(96, 16, stride=32, num_verts=2).astype(int):
    ...     print(head)
    [[1 0 0 0 0 0]
     [1 1 0 0 0 0]
     [0 1 1 0 0 0]
     [0 1 1 1 0 0]
     [0 1 0 1 1 0]
     [0 1 0 1 1 1]]
    [[1 0 0 0 0 0]
     [1 1 0 0 0 0]
     [1 0 1 0 0 0]
     [1 0 1 1 0 0]
     [1 0 1 0 1 0]
     [1 0 1 0 1 1]]

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions.
      stride: Positions in a window; a multiple of `block_size`. The paper's l.
      num_verts: Different summary columns among the heads.
      vertsize: Blocks in a summary column. The paper's c is `vertsize * block_size`.
      heads: A multiple of `num_verts`; None: `num_verts`.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed. Pair with `fixed_mask(stride, block_size, num_verts, vertsize)`.

    Raises:
      ValueError: If `stride` is no multiple of `block_size`, `vertsize` does not divide
        the blocks of a window, these are fewer than `num_verts * vertsize`, or `heads`
        is no multiple of `num_verts`.

    Reference: Child et al. 2019, arXiv:1904.10509, section 4.3.
    """
    mask = fixed_mask(stride, block_size, num_verts, vertsize)
    remedy = "; num_verts=1 gives all of them the same column"
    return layout_in_turns(
        mask, q_len, block_size, heads, num_verts, "num_verts", remedy
    )


def chunk_layout(q_len: int, block_size: int, chunk: int, heads: int = 1) -> np.ndarray:
    """Positions of the same chunk attend to each other, in both directions.

    >>> chunk_layout(64, 16, chunk=32)[0].astype(int)
    array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [0, 0, 1, 1],
           [0, 0, 1, 1]])

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions.
      chunk: Positions in a chunk.
      heads: 1 to share the layout between heads.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed. Pair with `chunk_mask(chunk)` where a chunk is no multiple of the
        block size.

    Raises:
      ValueError: If a size is not a positive integer.
    """
    return mask_layout(chunk_mask(chunk), q_len, block_size, heads=heads)


def sink_layout(
    q_len: int, block_size: int, window: int, sinks: int, heads: int = 1
) -> np.ndarray:
    """Each query attends to the last `window` positions and the first `sinks`: causal.

    >>> sink_layout(80, 16, window=16, sinks=4)[0].astype(int)
    array([[1, 0, 0, 0, 0],
           [1, 1, 0, 0, 0],
           [1, 1, 1, 0, 0],
           [1, 0, 1, 1, 0],
           [1, 0, 0, 1, 1]])

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions.
      window: Positions a query sees, itself included.
      sinks: Positions at the start that every later query sees.
      heads: 1 to share the layout between heads.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed. Pair with `local_mask(window) | (sink_mask(sinks) & causal_mask())`.

    Raises:
      ValueError: If a size is not a positive integer.

    Reference: Xiao et al. 2023, "Efficient Streaming Language Models with Attention
      Sinks", arXiv:2309.17453.
    """
    mask = local_mask(window) | (sink_mask(sinks) & causal_mask())
    return mask_layout(mask, q_len, block_size, heads=heads)
