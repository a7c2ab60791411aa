"""BigBird: blocks of a window, of both ends, and chosen at random, as Hugging Face's."""

from __future__ import annotations

import numpy as np

from .checks import check_not_negative, check_positive

# Where `BigBirdModel` draws for `max_len` positions and uses the first rows of that.
_PAPERS_LENGTHS = (1024, 3072, 4096)


def bigbird_layout(
    q_len: int,
    block_size: int,
    random_blocks: int = 3,
    heads: int = 1,
    seed: int = 0,
    max_len: int = 4096,
) -> np.ndarray:
    """Each block sees its neighbours, the first and the last block, and some at random.

    The first and the last block see all. The blocks are those of Hugging Face's
    `BigBirdModel` in training, block for block: its layer n has the seed n.

    >>> for head in bigbird_layout(128, 16, random_blocks=1, heads=2).astype(int):
    ...     print(head)
    [[1 1 1 1 1 1 1 1]
     [1 1 1 1 0 0 0 1]
     [1 1 1 1 0 1 0 1]
     [1 0 1 1 1 1 0 1]
     [1 1 0 1 1 1 0 1]
     [1 0 0 1 1 1 1 1]
     [1 0 1 0 0 1 1 1]
     [1 1 1 1 1 1 1 1]]
    [[1 1 1 1 1 1 1 1]
     [1 1 1 1 0 0 0 1]
     [1 1 1 1 0 1 0 1]
     [1 1 1 1 1 0 0 1]
     [1 0 1 1 1 1 0 1]
     [1 0 0 1 1 1 1 1]
     [1 0 0 0 1 1 1 1]
     [1 1 1 1 1 1 1 1]]

    Args:
      q_len: Sequence length in positions.
      block_size: Side of a block in positions; 64 in Hugging Face's models.
      random_blocks: Blocks at random for each block and head; `num_random_blocks` there.
      heads: Attention heads, each with random blocks of its own.
      seed: Of the random blocks; equal seeds give equal layouts.
      max_len: `max_position_embeddings` there, which matters for 1,024, 3,072 and 4,096
        positions alone.

    Returns:
      bool [heads, q_blocks, q_blocks], q_blocks = ceil(q_len / block_size); True =
        computed, all of it: it needs no mask. Where there are at most 5 + 2 *
        `random_blocks` blocks all are computed.

    Raises:
      ValueError: If a size is not a positive integer, `random_blocks` or `seed` is
        negative, `q_len` is one of the three lengths and above `max_len`, or there are
        not so many blocks to choose from.

    Hugging Face's model counts a block twice where a random one is the last block, or in
    the window, which happens for those three lengths alone. In evaluation it draws no
    blocks and counts the first one 1 + `random_blocks` times; `random_blocks=0` has the
    same blocks, once.

    Reference: Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences",
      arXiv:2007.14062, section 2.
    """
    check_positive(q_len=q_len, block_size=block_size, heads=heads, max_len=max_len)
    check_not_negative(random_blocks=random_blocks, seed=seed)
    n = -(-q_len // block_size)
    if n <= 5 + 2 * random_blocks:
        return np.ones((heads, n, n), bool)
    row = np.arange(n)
    layout = np.empty((heads, n, n), bool)
    layout[:] = abs(row[:, None] - row) <= 1
    layout[:, [0, -1]] = layout[:, :, [0, -1]] = True
    if random_blocks == 0:
        return layout
    random = np.random.RandomState(seed)
    if n * block_size in _PAPERS_LENGTHS:
        if max_len < n * block_size:
            raise ValueError(f"max_len must be at least q_len={q_len}, got {max_len}")
        total = max_len // block_size
        chosen = _choose_of_paper(n, random_blocks, heads, random, block_size, total)
    else:
        chosen = _choose(n, random_blocks, heads, random)
    layout[np.arange(heads)[:, None, None], row[1:-1, None], chosen] = True
    return layout


def _choose(n, count, heads, random):
    """int [heads, n - 2, count]: of each row but the ends, blocks among the first few."""
    pool = 2 * count + 5
    chosen = np.empty((heads, n - 2, count), int)
    for row in range(1, n - 1):
        for head in range(heads):
            order = random.permutation(pool)
            is_free = (order > 0) & (order < pool - 1) & (abs(order - row) > 1)
            if row == 1:
                is_free &= order != pool - 2
            if row == pool - 2:
                is_free &= order != 1
            chosen[head, row - 1] = order[is_free][:count]
    return chosen


def _choose_of_paper(n, count, heads, random, block_size, total):
    """The same for the paper's lengths: blocks among the first 1,024 positions."""
    blocks, rows = np.arange(1, min(1024 // block_size, total - 1)), range(1, total - 1)
    # The last two of the rows may choose of their window.
    choices = [blocks[(abs(blocks - row) > 1) | (row >= total - 3)] for row in rows]
    fewest = min(map(len, choices))
    if count > fewest:
        raise ValueError(
            f"random_blocks must be at most {fewest} for q_len={n * block_size} and "
            f"block_size={block_size}, got {count}"
        )
    chosen = [
        [random.permutation(some)[:count] for some in choices] for _ in range(heads)
    ]
    return np.array(chosen)[:, : n - 2]
