"""The host side of blocksparse's class: look-up tables, masks, and the ops in NumPy."""

from __future__ import annotations

from typing import Any, Callable

import numpy as np

from ..plan.checks import as_truth, check_positive
from ..plan.masks import Mask, Span

_MASK_WORDS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_BLOCKS_AT_ONCE = 1024  # The elements of so many are in memory: 4 MB at block size 64.


class BlocksparseTables:
    """What blocksparse's kernels read: which blocks there are, and who attends in them.

    Tables are int32 [lut_heads, entries, 2]. `nt_lut` holds the (q block, kv block) of
    every block in row-major order. `nn_lut` starts with an (offset, size) for every q
    block; from that entry on come so many (block, kv block). `tn_lut` is the same for
    every kv block and its (block, q block).

    Heads may have different numbers of blocks, which blocksparse refuses. `blocks` is
    then the largest of them. A block that a head does not use is (-1, -1) in `nt_lut`; it
    is in no list, has no mask bits, and is 0 in every tensor of blocks.

    >>> tables = BlocksparseTables([[1, 0], [1, 1]], block_size=8, heads=4)
    >>> tables.nt_lut.tolist()
    [[[0, 0], [1, 0], [1, 1]]]
    >>> tables.nn_lut.tolist()
    [[[2, 1], [3, 2], [0, 0], [1, 0], [2, 1]]]
    >>> tables.nn_list
    [[[(0, 0)], [(1, 0), (2, 1)]]]

    Args:
      layout: [heads or 1, q_blocks, kv_blocks], or [q_blocks, kv_blocks] to share it
        between heads. Booleans, integers, or floats that are 0 or 1; nonzero = computed.
      block_size: Side of a block in positions: 8, 16, 32 or 64.
      heads: Number of heads; None: as many as the layout has.
      mask_callback: `(blk_shape, head_idx, query_blk_idx, key_blk_idx, blk_idx)` ->
        bool or integer [block_size, block_size], nonzero = attend; called once per
        block of the layout; where that has one head, with head 0 for all. It may also
        be a `Mask` over positions, which answers for many blocks at once. None: every
        element of every block attends.
      name: Kept as the attribute `name`.

    Raises:
      TypeError: If the layout has another dtype, or floats that are neither 0 nor 1.
      ValueError: If another argument, or what the callback returns, is not as above.
    """

    def __init__(
        self,
        layout: Any,
        block_size: int = 64,
        heads: int | None = None,
        mask_callback: Callable | None = None,
        name: str | None = None,
    ) -> None:
        layout = as_truth("layout", layout)
        if block_size not in _MASK_WORDS:
            raise ValueError(f"block_size must be 8, 16, 32 or 64, got {block_size!r}")
        if layout.ndim not in (2, 3) or layout.size == 0:
            raise ValueError(
                "layout must be [q_blocks, kv_blocks] or [heads, q_blocks, kv_blocks] "
                f"and not empty, got shape {layout.shape}"
            )
        if layout.ndim == 2:
            if heads is None:
                raise ValueError(
                    "heads must be a positive integer with a layout [q_blocks, "
                    "kv_blocks], got None"
                )
            layout = layout[None]
        heads = len(layout) if heads is None else heads
        check_positive(heads=heads)
        if len(layout) not in (1, heads):
            raise ValueError(
                f"layout must have 1 head or heads={heads}, got {len(layout)}"
            )
        self.name = name
        self.blk_size = block_size
        self.blk_shape = (block_size, block_size)
        self.heads = heads
        self.lut_heads, self.ctx_blks_q, self.ctx_blks_k = layout.shape
        self._cache = {}  # what has been derived from the tables
        self._init_luts(layout)
        # What the kernels read, [lut_heads, block_size, blocks]: bit k of a query's word is
        # set where the query attends to key k of the block.
        self.softmax_mask = None
        if mask_callback is not None:
            self.softmax_mask = self._mask_words(mask_callback)

    def _cached(self, key, build, *args):
        if key not in self._cache:
            self._cache[key] = build(*args)
        return self._cache[key]

    # ---- look-up tables ----

    def _init_luts(self, layout):
        q_sizes, k_sizes = layout.sum(axis=2), layout.sum(axis=1)
        self._counts = q_sizes.sum(axis=1)  # blocks of each head
        self.blocks = int(self._counts.max())
        self.nn_max, self.tn_max = int(q_sizes.max()), int(k_sizes.max())
        self.nt_lut = np.full((len(layout), self.blocks, 2), -1, np.int32)
        self.nn_lut, self.tn_lut = self._lists_lut(q_sizes), self._lists_lut(k_sizes)
        for head, blocks in enumerate(layout):
            q, k = np.nonzero(blocks)
            # Blocks are numbered by row, so the lists of rows are in order already.
            by_column = np.argsort(k, kind="stable")
            for lut, first, columns in (
                (self.nt_lut, 0, (q, k)),
                (self.nn_lut, self.ctx_blks_q, (np.arange(len(k)), k)),
                (self.tn_lut, self.ctx_blks_k, (by_column, q[by_column])),
            ):
                entries = lut[head, first : first + len(k)]
                entries[:, 0], entries[:, 1] = columns

    def _lists_lut(self, sizes):
        """A table of lists that have these sizes, without their entries."""
        lists = sizes.shape[1]
        lut = np.full((len(sizes), lists + self.blocks, 2), -1, np.int32)
        lut[:, :lists, 0] = lists + np.cumsum(sizes, axis=1) - sizes
        lut[:, :lists, 1] = sizes
        return lut

    @property
    def nt_list(self) -> list:
        """The (q block, kv block) of every block, for each head."""
        return self._cached("nt_list", self._block_list)

    @property
    def nn_list(self) -> list:
        """The [(block, kv block), ...] of each q block, for each head."""
        return self._cached("nn_list", _entry_lists, self.nn_lut, self.ctx_blks_q)

    @property
    def tn_list(self) -> list:
        """The [(block, q block), ...] of each kv block, for each head."""
        return self._cached("tn_list", _entry_lists, self.tn_lut, self.ctx_blks_k)

    def _block_list(self):
        heads = zip(self.nt_lut, self._counts)
        return [list(map(tuple, lut[:count].tolist())) for lut, count in heads]

    def block_coord(self, block: int, head: int = 0) -> tuple:
        """The (q block, kv block) of a block."""
        return self.nt_list[head][block]

    # ---- masks ----

    @property
    def softmax_mask_np(self):
        """`softmax_mask` as [lut_heads, blocks, block_size]."""
        if self.softmax_mask is None:
            return None
        return self._cached(
            "softmax_mask_np", self.softmax_mask.transpose(0, 2, 1).copy
        )

    def _mask_words(self, mask):
        words = np.zeros(
            (self.lut_heads, self.blk_size, self.blocks), _MASK_WORDS[self.blk_size]
        )
        for head, count in enumerate(self._counts):
            blocks = np.arange(count)
            if isinstance(mask, Mask):
                is_full, blocks = self._judge_blocks(mask, head, blocks)
                words[head, :, :count] = -is_full.astype(words.dtype)  # 0 - 1: all bits
            for i in range(0, len(blocks), _BLOCKS_AT_ONCE):
                some = blocks[i : i + _BLOCKS_AT_ONCE]
                elements = self._elements(mask, head, some)
                bits = np.packbits(elements, axis=-1, bitorder="little")
                words[head, :, some] = bits.view(words.dtype)[..., 0]
        return words

    def _judge_blocks(self, mask, head, blocks):
        """Which blocks a `Mask` knows to be full, and those that it cannot tell."""
        first = self.nt_lut[head, blocks].T * np.int64(self.blk_size)
        q, k = (Span(position, position + self.blk_size - 1) for position in first)
        is_full, is_empty = (
            np.broadcast_to(answer, blocks.shape) for answer in mask.bounds(head, q, k)
        )
        return is_full, blocks[~(is_full | is_empty)]

    def _elements(self, mask, head, blocks):
        """bool [blocks, block_size, block_size], True = attend."""
        coords = self.nt_lut[head, blocks]
        if isinstance(mask, Mask):
            steps = np.arange(self.blk_size)
            q, k = coords.T[:, :, None] * np.int64(self.blk_size) + steps
            elements = mask(head, q[:, :, None], k[:, None, :])
            return np.broadcast_to(elements, (len(blocks),) + self.blk_shape)
        found = []
        for block, (q, k) in zip(blocks.tolist(), coords.tolist()):
            elements = np.asarray(mask(self.blk_shape, head, q, k, block))
            if elements.shape != self.blk_shape or elements.dtype.kind not in "biu":
                raise ValueError(
                    f"mask_callback must return bool {self.blk_shape}, got "
                    f"{elements.dtype} {elements.shape} for head {head}, q block {q}, "
                    f"kv block {k}"
                )
            found.append(elements.astype(bool))
        return np.stack(found)

    # ---- the ops in NumPy, to test against ----

    def nt_test(self, a, b):
        """`nt_op` in NumPy, float32."""
        a, b = self._split(a, self.ctx_blks_q), self._split(b, self.ctx_blks_k)
        c = np.zeros((len(a), self.heads, self.blocks) + self.blk_shape, np.float32)
        for n, h in np.ndindex(len(a), self.heads):
            for block, (q, k) in enumerate(self.nt_list[h % self.lut_heads]):
                c[n, h, block] = np.dot(a[n, q, :, h], b[n, k, :, h].T)
        return c

    def nn_test(self, a, b):
        """`nn_op` in NumPy, float32."""
        return self._xn_test(self.nn_list, a, self._split(b, self.ctx_blks_k))

    def tn_test(self, a, b):
        """`tn_op` in NumPy, float32."""
        a, b = np.swapaxes(a, 3, 4), self._split(b, self.ctx_blks_q)
        return self._xn_test(self.tn_list, a, b)

    def _split(self, x, blocks):
        head_dim = x.shape[2] // self.heads
        return x.reshape(len(x), blocks, self.blk_size, self.heads, head_dim)

    def _xn_test(self, lists, a, b):
        c = np.zeros((len(b), len(lists[0])) + b.shape[2:], np.float32)
        for n, h in np.ndindex(len(b), self.heads):
            for row, entries in enumerate(lists[h % self.lut_heads]):
                for block, other in entries:
                    c[n, row, :, h] += np.dot(a[n, h, block], b[n, other, :, h])
        return c.reshape(len(b), c.shape[1] * c.shape[2], c.shape[3] * c.shape[4])

    def masked_softmax_test(self, x, scale=1.0, autoregress_at_key=None):
        """`masked_softmax` in NumPy, dtype of x."""
        y = np.zeros_like(x)
        for n, h in np.ndindex(x.shape[:2]):
            lut_head = h % self.lut_heads
            for q_block, entries in enumerate(self.nn_list[lut_head]):
                if not entries:
                    continue
                blocks, k_blocks = np.transpose(entries)
                s = (x[n, h, blocks] * scale).astype(np.float32)
                if self.softmax_mask_np is not None:
                    allowed = _unpack_words(self.softmax_mask_np[lut_head, blocks])
                    if autoregress_at_key is not None:
                        steps = np.arange(self.blk_size)
                        query = q_block * self.blk_size + steps[:, None]
                        key = k_blocks[:, None, None] * self.blk_size + steps
                        allowed &= (key < autoregress_at_key) | (key <= query)
                    s = np.where(allowed, s, -np.finfo(np.float32).max)
                p = np.exp(s - np.max(s, axis=(0, 2), keepdims=True))
                y[n, h, blocks] = p / np.sum(p, axis=(0, 2), keepdims=True)
        return y

    def masked_softmax_grad_test(self, dy, y, scale=1.0):
        """The gradient of x in NumPy; dy is that of `y = masked_softmax_test(x, scale)`."""
        dx = np.zeros_like(dy)
        for n, h in np.ndindex(dy.shape[:2]):
            for entries in self.nn_list[h % self.lut_heads]:
                blocks = [block for block, _ in entries]
                dp, p = dy[n, h, blocks], y[n, h, blocks]
                delta = np.sum(dp * p, axis=(0, 2), keepdims=True)
                dx[n, h, blocks] = (dp - delta) * p * scale
        return dx


def _unpack_words(words):
    """The bits of a mask's words: bool [..., block_size]."""
    words = words[..., None].view(np.uint8)
    return np.unpackbits(words, axis=-1, bitorder="little").astype(bool)


def _entry_lists(luts, lists):
    heads = []
    for lut in luts:
        entries = list(map(tuple, lut.tolist()))
        heads.append([entries[first : first + size] for first, size in entries[:lists]])
    return heads
