"""BlockMask: a layout and a mask, compiled into the lists that kernels read.

A block is EMPTY (it is not computed), PARTIAL (it is computed, then masked by bits) or FULL
(it needs no mask). All of this is decided here, once, on the host.
"""

from __future__ import annotations

import base64
import hashlib
import io
import sys
import zipfile
from typing import Any

import numpy as np

from .checks import as_truth, check_positive
from .masks import CHUNK, Mask, Span, as_mask, check_heads
from .tile_plans import (
    EMPTY,
    FULL,
    PARTIAL,
    Blocks,
    KvTiles,
    Tiles,
    cheapest,
    csr,
    freeze,
    kv_tiles_of,
    number,
    tiles_of,
)
from .tiling import EFFICIENCY

# What a configuration holds: sizes, and arrays with their dtypes and ranks, which may have
# so many bytes in all. A small file can hold far more zeros than there is memory.
_SAVED_SIZES = ("block_size", "q_len", "kv_len", "row_stride")
_SAVED_ARRAYS = {
    "block_kinds": (np.int8, 3),
    "mask_ids": (np.int32, 1),
    "mask_bits": (np.uint8, 3),
}
MAX_SAVED = 1 << 30


class BlockMask:
    """A layout and a mask, compiled into the plan that kernels read.

    >>> from sparse_attention.plan.layouts import local_layout
    >>> from sparse_attention.plan.masks import local_mask
    >>> BlockMask(local_layout(64, 8, window=24), local_mask(24), block_size=8)
    BlockMask(q_len=64, kv_len=64, block_size=8, heads=1, density 41 %)
    ▒·······
    █▒······
    ██▒·····
    ▒██▒····
    ·▒██▒···
    ··▒██▒··
    ···▒██▒·
    ····▒██▒

    Args:
      layout: bool [heads or 1, q_blocks, kv_blocks] or [q_blocks, kv_blocks], True =
        computed. A layout of one head is shared between all heads.
      mask: A `Mask`, or a function `mask(head, q_idx, kv_idx)` -> bool that broadcasts;
        both indices are rows. Or a NumPy array, bool [q_len, kv_len] or [heads or 1,
        q_len, kv_len]. None: every element of a computed block.
      block_size: Side of a block in positions: 8, 16, 32, 64 or 128.
      q_len: Queries in rows; None: as many as the blocks hold.
      kv_len: Keys in rows; None: as many as the blocks hold.
      row_stride: Positions visit the rows residue by residue: with n =
        ceil(len / row_stride), position p is row (p mod n) * row_stride + floor(p / n)
        and does not exist where that is no row. 1: position = row.

    Attributes:
      layout, mask, block_size, q_len, kv_len, row_stride: As given.
      heads, q_blocks, kv_blocks: The layout's shape.
      block_kinds: int8 [heads, q_blocks, kv_blocks]: EMPTY, PARTIAL or FULL. Arrays are
        read-only.

    Raises:
      TypeError: If `mask` is none of these, or the layout or what the mask returns is
        neither boolean nor integer, nor floats that are 0 or 1.
      ValueError: If the block size is not supported, the layout does not fit the
        lengths, the mask differs between heads and the layout has only one, or an
        array does not have all heads, queries and keys.
    """

    def __init__(
        self,
        layout: Any,
        mask: Any = None,
        block_size: int = 64,
        q_len: int | None = None,
        kv_len: int | None = None,
        row_stride: int = 1,
    ) -> None:
        check_positive(block_size=block_size, row_stride=row_stride)
        if block_size not in EFFICIENCY:
            raise ValueError(
                f"block_size must be one of {list(EFFICIENCY)}, got {block_size!r}"
            )
        layout = as_truth("layout", layout).copy()  # nobody else can change it
        self.layout = layout[None] if layout.ndim == 2 else layout
        if self.layout.ndim != 3 or not layout.size:
            raise ValueError(
                "layout must be [heads, q_blocks, kv_blocks], none of them zero, "
                f"got shape {layout.shape}"
            )
        self.heads, self.q_blocks, self.kv_blocks = self.layout.shape
        self.mask = as_mask(mask)
        self._heads_differ = check_heads(self.mask, self.heads)
        self.block_size = block_size
        self.q_len = self.q_blocks * block_size if q_len is None else q_len
        self.kv_len = self.kv_blocks * block_size if kv_len is None else kv_len
        self.row_stride = row_stride
        check_positive(q_len=self.q_len, kv_len=self.kv_len)
        longest = max(self.q_len, self.kv_len)
        if row_stride > longest:
            raise ValueError(
                f"row_stride must be at most {longest}, the longer of q_len and kv_len, "
                f"got {row_stride}; beyond it positions are rows, as with 1"
            )
        self._q = _Axis("q", self.q_len, block_size, row_stride, self.q_blocks)
        self._kv = _Axis("kv", self.kv_len, block_size, row_stride, self.kv_blocks)
        self.block_kinds = self._judge_blocks()
        self._blocks = Blocks(self.block_kinds, *self._evaluate_elements())
        self._cache = {}
        freeze(self.layout, self.block_kinds)

    # ---- building ----

    def _judge_blocks(self):
        """The kinds of the blocks by the mask's bounds, PARTIAL where they cannot tell."""
        kinds = np.empty(self.layout.shape, np.int8)
        exists = self._q.exists.any(axis=1)[:, None] & self._kv.exists.any(axis=1)
        head = np.arange(self.heads)[:, None, None] if self._heads_differ else 0
        step = max(1, CHUNK // (self.heads * self.kv_blocks))
        for start in range(0, self.q_blocks, step):
            part = slice(start, start + step)
            q = Span(*(field[part, None] for field in self._q.span))
            all_true, none_true = self.mask.bounds(head, q, self._kv.span)
            some_true = self.layout[:, part] & exists[part] & np.logical_not(none_true)
            kinds[:, part] = some_true * np.add(all_true, PARTIAL, dtype=np.int8)
        return kinds

    def _evaluate_elements(self):
        """Settles the PARTIAL blocks, in `block_kinds`, by looking at their elements.

        Returns:
          For the blocks that stay PARTIAL: their flat indices, increasing; the number of
          the mask block that each has; and the different mask blocks, uint8 [:,
          block_size, block_size / 8].
        """
        undecided = np.flatnonzero(self.block_kinds == PARTIAL)
        once, again = undecided, np.arange(len(undecided))
        if not self._heads_differ:  # what holds for one head holds for all
            in_head = undecided % (self.q_blocks * self.kv_blocks)
            once, again = np.unique(in_head, return_inverse=True)
        kinds = np.full(len(once), PARTIAL, np.int8)
        mask_ids = np.zeros(len(once), np.int32)
        seen: dict = {}
        step = CHUNK // self.block_size**2
        for start in range(0, len(once), step):
            part = slice(start, start + step)
            head, q_block, kv_block = np.unravel_index(once[part], self.layout.shape)
            # [blocks, kv, q], as the bits are stored
            q_idx = self._q.rows[q_block][:, None, :]
            kv_idx = self._kv.rows[kv_block][:, :, None]
            exists = self._q.exists[q_block][:, None, :]
            exists = exists & self._kv.exists[kv_block][:, :, None]
            allowed = self.mask(head[:, None, None], q_idx, kv_idx)
            allowed = allowed & exists
            kinds[part][(allowed == exists).all(axis=(1, 2))] = FULL
            kinds[part][~allowed.any(axis=(1, 2))] = EMPTY
            is_partial = kinds[part] == PARTIAL
            bits = np.packbits(allowed[is_partial], axis=2, bitorder="little")
            mask_ids[part][is_partial] = number(bits, seen)
        kinds, mask_ids = kinds[again], mask_ids[again]
        self.block_kinds.reshape(-1)[undecided] = kinds
        mask_bits = np.frombuffer(b"".join(seen), np.uint8)
        mask_bits = mask_bits.reshape(-1, self.block_size, self.block_size // 8)
        return undecided[kinds == PARTIAL], mask_ids[kinds == PARTIAL], mask_bits

    # ---- reading ----

    @property
    def density(self) -> float:
        """Computed fraction of the score matrix, counted in blocks.

        >>> from sparse_attention.plan.layouts import all_layout
        >>> from sparse_attention.plan.masks import causal_mask
        >>> BlockMask(all_layout(64, 32), causal_mask(), block_size=32).density
        0.75
        """
        return float(np.mean(self.block_kinds != EMPTY))

    @property
    def is_causal(self) -> bool:
        """Whether no query attends to a key of a later row; found once.

        >>> from sparse_attention.plan.masks import causal_mask
        >>> layout = np.ones([2, 2])
        >>> [BlockMask(layout, mask, 8).is_causal for mask in (causal_mask(), None)]
        [True, False]
        """
        if "is_causal" not in self._cache:
            self._cache["is_causal"] = not self._looks_ahead()
        return self._cache["is_causal"]

    def _looks_ahead(self):
        # A FULL block that may look ahead does, so it does not matter that rows which do
        # not exist seem to attend in it.
        may = self._kv.span.hi > self._q.span.lo[:, None]
        blocks = np.nonzero((self.block_kinds != EMPTY) & may)
        code_bits, step = self._blocks.code_bits(), CHUNK // self.block_size**2
        for start in range(0, len(blocks[0]), step):
            head, q_block, kv_block = (x[start : start + step] for x in blocks)
            bits = code_bits[self._blocks.codes(head, q_block, kv_block)]
            attends = np.unpackbits(bits, axis=2, bitorder="little").astype(bool)
            q, kv = self._q.rows[q_block], self._kv.rows[kv_block]
            if np.any(attends & (kv[:, :, None] > q[:, None, :])):
                return True
        return False

    @property
    def kv_indptr(self) -> np.ndarray:
        """int32 [heads * q_blocks + 1], each q block's offset into `kv_indices`."""
        return self.tiles(self.block_size).kv_indptr

    @property
    def kv_indices(self) -> np.ndarray:
        """int32 [computed blocks], the kv blocks each q block reads, increasing."""
        return self.tiles(self.block_size).kv_indices

    @property
    def q_indptr(self) -> np.ndarray:
        """int32 [heads * kv_blocks + 1], each kv block's offset into `q_indices`."""
        return self._q_lists()[0]

    @property
    def q_indices(self) -> np.ndarray:
        """int32 [computed blocks], the q blocks reading each kv block, increasing."""
        return self._q_lists()[1]

    def _q_lists(self):
        if "q" not in self._cache:
            self._cache["q"] = csr(self.block_kinds.transpose(0, 2, 1) != EMPTY)
        return self._cache["q"]

    def tiles(self, tile_q: int | None = None) -> Tiles:
        """The plan for q tiles of `tile_q` positions: what the kernels read.

        A tile merges consecutive q blocks. It reads every kv block that one of them
        reads; mask bits hide it from the others.

        Args:
          tile_q: `block_size` times a power of two, at most 128; None: the size with
            the fewest computed elements over `EFFICIENCY`.

        Returns:
          `Tiles`, the same object each time.

        Raises:
          ValueError: If `tile_q` is none of these.
        """
        sizes = [size for size in EFFICIENCY if size >= self.block_size]
        if tile_q is None:
            if None not in self._cache:
                self._cache[None] = cheapest(self._blocks, sizes)
            tile_q = self._cache[None]
        if tile_q not in sizes:
            raise ValueError(f"tile_q must be one of {sizes}, got {tile_q!r}")
        if tile_q not in self._cache:
            self._cache[tile_q] = tiles_of(self._blocks, tile_q)
        return self._cache[tile_q]

    def kv_tiles(self, tile_kv: int, group: int = 1) -> KvTiles:
        """The plan for kv tiles of `tile_kv` positions: what the GPU's backward reads.

        A tile collects kv blocks that nearly the same queries read, be they neighbours or
        not. All later queries read a summary column of `fixed`, few read the blocks beside
        it, and a tile that mixed them would compute all of its rows for all those queries.
        Room that is left takes blocks with other queries where that saves work: in
        `strided`, only one q block, its own, may read a kv block.

        Args:
          tile_kv: `block_size` times a power of two, from 32 to 128.
          group: Query heads that share a kv head: they get the same tiles.

        Returns:
          `KvTiles`, the same object each time, with the longest lists first. All heads
          share tiles if the layout has one head, and otherwise those of a group do; they
          have one share of `tile_blocks`, in which every kv block is in one tile.

        Raises:
          ValueError: If `tile_kv` is none of these, or `group` does not divide the heads.
        """
        sizes = [size for size in EFFICIENCY if size >= max(self.block_size, 32)]
        if tile_kv not in sizes:
            raise ValueError(f"tile_kv must be one of {sizes}, got {tile_kv!r}")
        check_positive(group=group)
        if self.heads > 1 and self.heads % group:
            raise ValueError(f"group must divide heads={self.heads}, got {group}")
        key = "kv", tile_kv, self.heads > 1 and group
        if key not in self._cache:
            self._cache[key] = kv_tiles_of(self._blocks, tile_kv, group)
        return self._cache[key]

    def to_dense(self) -> np.ndarray:
        """The exact pattern, element by element, in rows.

        >>> from sparse_attention.plan.masks import causal_mask
        >>> block_mask = BlockMask(np.eye(2), causal_mask(), block_size=8)
        >>> block_mask.to_dense()[0, 9].astype(int)
        array([0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0])

        Returns:
          bool [heads, q_len, kv_len], True = attend.
        """
        codes = self._blocks.codes(*np.indices(self.layout.shape, sparse=True))
        code_bits = np.unpackbits(self._blocks.code_bits(), axis=2, bitorder="little")
        dense = code_bits.astype(bool)[codes]  # [heads, q_blocks, kv_blocks, kv, q]
        dense = dense.transpose(0, 1, 4, 2, 3).reshape(
            self.heads, self._q.exists.size, self._kv.exists.size
        )
        return dense[:, self._q.positions[:, None], self._kv.positions]

    def keys_of(self, row: int) -> np.ndarray:
        """The keys that one query attends to, found without looking at other queries.

        >>> from sparse_attention.plan.masks import local_mask
        >>> BlockMask(np.ones([2, 2]), local_mask(3), block_size=8).keys_of(9)
        array([[7, 8, 9]], dtype=int32)

        Args:
          row: The query's row.

        Returns:
          int32 [heads, keys], rows of keys as kernels visit them: in increasing order
          where `row_stride` is 1. Heads that attend to fewer keys are filled up by -1.

        Raises:
          ValueError: If there is no such row.
        """
        if not 0 <= row < self.q_len:
            raise ValueError(f"row must be from 0 to {self.q_len - 1}, got {row!r}")
        tiles = self.tiles(self.block_size)
        q_block, q = divmod(int(self._q.positions[row]), self.block_size)
        lists = np.arange(self.heads) * self.q_blocks + q_block
        starts, ends = tiles.kv_indptr[lists], tiles.kv_indptr[lists + 1]
        entries = np.concatenate([np.arange(*span) for span in zip(starts, ends)])
        kv_block, mask_ids = tiles.kv_indices[entries], tiles.mask_ids[entries]
        allowed = self._kv.exists[kv_block]
        bits = tiles.mask_bits[mask_ids[mask_ids >= 0], :, q // 8] >> q % 8 & 1
        allowed[mask_ids >= 0] = bits
        head = np.repeat(np.arange(self.heads), ends - starts)
        counts = np.bincount(head, allowed.sum(axis=1), self.heads)
        is_key = np.arange(counts.max()) < counts[:, None]
        keys = np.full(is_key.shape, -1, np.int32)
        keys[is_key] = self._kv.rows[kv_block][allowed]
        return keys

    # ---- saving ----

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that plans share if their sizes and elements are equal.

        >>> from sparse_attention.plan.masks import causal_mask
        >>> plan = BlockMask(np.ones([2, 2]), causal_mask(), block_size=8)
        >>> BlockMask.from_config(plan.get_config()).fingerprint == plan.fingerprint
        True
        """
        if "fingerprint" not in self._cache:
            sizes = [getattr(self, name) for name in _SAVED_SIZES]
            content = hashlib.sha256(repr([self.heads, *map(int, sizes)]).encode())
            content.update(self.block_kinds.tobytes())
            content.update(self._blocks.mask_bits[self._blocks.mask_ids].tobytes())
            self._cache["fingerprint"] = content.hexdigest()[:16]
        return self._cache["fingerprint"]

    def get_config(self) -> dict:
        """What `from_config` needs to make this plan again; JSON can hold it.

        A mask is a function, which no file can hold, so its answers are saved.

        Returns:
          dict of ints and one string, "arrays", a compressed .npz file in base 64.

        Raises:
          ValueError: If the arrays have more than `MAX_SAVED` bytes (2 ** 30).
        """
        arrays = dict(
            block_kinds=self.block_kinds,
            mask_ids=self._blocks.mask_ids,
            mask_bits=self._blocks.mask_bits,
        )
        size = sum(array.nbytes for array in arrays.values())
        if size > MAX_SAVED:
            raise ValueError(
                f"a plan that is saved must have at most {MAX_SAVED} bytes, got {size}: "
                "larger blocks make it smaller, or save its layout and mask instead"
            )
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        config = {name: int(getattr(self, name)) for name in _SAVED_SIZES}
        return {**config, "arrays": base64.b64encode(file.getvalue()).decode()}

    @classmethod
    def from_config(cls, config: dict) -> BlockMask:
        """The plan whose `get_config` this was.

        >>> from sparse_attention.plan.layouts import all_layout
        >>> from sparse_attention.plan.masks import causal_mask
        >>> plan = BlockMask(all_layout(64, 16), causal_mask(), block_size=16)
        >>> np.array_equal(BlockMask.from_config(plan.get_config()).to_dense(),
        ...                plan.to_dense())
        True

        Returns:
          `BlockMask`. Its `mask` is None, and its `layout` is True where a block is not
          EMPTY.

        Raises:
          ValueError: If this is no such dict, or damaged. A file comes from outside, so
            no more than `MAX_SAVED` bytes are unpacked.
        """
        expected = [*_SAVED_SIZES, "arrays"]
        if not isinstance(config, dict) or set(config) != set(expected):
            got = list(config) if isinstance(config, dict) else repr(config)
            raise ValueError(f"config must be a dict with {expected}, got {got}")
        sizes = {name: config[name] for name in _SAVED_SIZES}
        check_positive(**sizes)
        block_kinds, mask_ids, mask_bits = _unpack(config["arrays"])
        plan = cls(np.zeros(block_kinds.shape, bool), **sizes)
        partial = np.flatnonzero(block_kinds == PARTIAL)
        side = plan.block_size
        fit = {
            "block_kinds": np.isin(block_kinds, (EMPTY, PARTIAL, FULL)).all(),
            "mask_bits": mask_bits.shape[1:] == (side, side // 8),
            "mask_ids": len(mask_ids) == len(partial)
            and np.all((mask_ids >= 0) & (mask_ids < len(mask_bits))),
        }
        if not all(fit.values()):
            names = [name for name, fits in fit.items() if not fits]
            raise ValueError(
                f"config['arrays'] must hold a plan, got {' and '.join(names)} that do "
                f"not fit {len(partial)} partial blocks of block_size={side}"
            )
        plan._blocks = Blocks(block_kinds, partial, mask_ids, mask_bits)
        plan.mask = None  # type: ignore[assignment]
        plan.layout, plan.block_kinds = block_kinds != EMPTY, block_kinds
        freeze(plan.layout, plan.block_kinds)
        return plan

    def __reduce__(self) -> tuple:
        """A pickle holds what `get_config` gives: the answers of the mask, no function."""
        return BlockMask.from_config, (self.get_config(),)

    # ---- showing ----

    def __repr__(self) -> str:
        names = ["q_len", "kv_len", "block_size", "heads"]
        names += ["row_stride"] if self.row_stride > 1 else []
        values = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        density = f"density {100 * self.density:.0f} %"
        return f"BlockMask({values}, {density})\n{self._drawing()}"

    def _drawing(self):
        """Draws up to four heads side by side, one character for a square of blocks."""
        width = 32 if self.heads == 1 else 16
        side = -(-max(self.q_blocks, self.kv_blocks) // width)
        padding = [(0, 0), (0, -self.q_blocks % side), (0, -self.kv_blocks % side)]
        kinds = np.pad(self.block_kinds[:4], padding, mode="edge")
        heads, rows, columns = kinds.shape
        squares = kinds.reshape(heads, rows // side, side, columns // side, side)
        low, high = squares.min(axis=(2, 4)), squares.max(axis=(2, 4))
        characters = _characters()[np.where(low == high, low, PARTIAL)]
        lines = ("  ".join(map("".join, line)) for line in characters.swapaxes(0, 1))
        return "\n".join(lines)


def _characters():
    """What draws EMPTY, PARTIAL and FULL where the standard output can write it."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        "·▒█".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return np.array(list(".+#"))
    return np.array(list("·▒█"))


def _unpack(text):
    """The arrays of `_SAVED_ARRAYS` that a configuration's string holds."""
    try:
        file = zipfile.ZipFile(io.BytesIO(base64.b64decode(text)))
        size = sum(file.getinfo(f"{name}.npy").file_size for name in _SAVED_ARRAYS)
        if size > MAX_SAVED:
            raise ValueError(f"{size} bytes, where {MAX_SAVED} are allowed")
        return [
            _read_array(file.read(f"{name}.npy"), name, *form)
            for name, form in _SAVED_ARRAYS.items()
        ]
    except Exception as error:  # Damage shows in many ways: in zipfile, zlib, NumPy.
        raise ValueError(
            "config['arrays'] must be what get_config gives, a string with the arrays "
            f"{list(_SAVED_ARRAYS)}; it is damaged: {type(error).__name__}: {error}"
        ) from error


def _read_array(data, name, dtype, rank):
    """An array from the bytes of an .npy file, which cannot claim more than there are."""
    file = io.BytesIO(data)
    np.lib.format.read_magic(file)
    shape, is_transposed, got = np.lib.format.read_array_header_1_0(file)
    if got != dtype or len(shape) != rank:
        raise ValueError(f"{name} is {got} {shape}")
    array = np.frombuffer(data, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if is_transposed else "C")


def in_positions(mask, length, row_stride):
    """The mask over positions that is `mask` over the rows which they visit.

    >>> from sparse_attention.plan.masks import strided_mask
    >>> mask = in_positions(strided_mask(2), length=8, row_stride=2)
    >>> mask(0, 6, np.arange(8)).astype(int)  # 4 to 7: the rows 1, 3, 5 and 7
    array([0, 0, 0, 0, 1, 1, 1, 0])

    Args:
      mask: A `Mask`; what its bounds know of rows, the result's know of positions.
      length: Queries and keys in rows; a multiple of `row_stride`.
      row_stride: As of `BlockMask`.

    Returns:
      `Mask`.
    """
    if row_stride == 1:
        return mask
    visits = length // row_stride

    def rows_of(span):
        first, lo = _visit(span.lo, visits, row_stride)
        last, hi = _visit(span.hi, visits, row_stride)
        is_one = first == last
        # A span that goes on holds the first row of its second residue, and the last row
        # of its last residue but one.
        lo = np.where(is_one, lo, np.minimum(lo, first + 1))
        hi = np.where(is_one, hi, np.maximum(hi, length - row_stride + last - 1))
        return Span(lo, hi, np.where(is_one, row_stride, 1))

    def fn(head, q_idx, kv_idx):
        _, q_row = _visit(q_idx, visits, row_stride)
        _, kv_row = _visit(kv_idx, visits, row_stride)
        return mask(head, q_row, kv_row)

    def bounds(head, q, kv):
        return mask.bounds(head, rows_of(q), rows_of(kv))

    return Mask(
        fn, bounds, mask.per_head, f"in_positions({mask}, {length}, {row_stride})"
    )


def _visit(position, visits, row_stride):
    """The residue and the row that a position visits; a residue has `visits` rows."""
    residue, visit = np.divmod(position, visits)
    return residue, visit * row_stride + residue


class _Axis:
    """One side of the score matrix: the rows that its blocks of positions visit."""

    def __init__(self, name, length, block_size, row_stride, blocks):
        visits = -(-length // row_stride)
        expected = -(-visits * row_stride // block_size)
        if blocks != expected:
            raise ValueError(
                f"layout must have {expected} {name}_blocks for {name}_len={length}, "
                f"block_size={block_size}, row_stride={row_stride}, got {blocks}"
            )
        position = np.arange(blocks * block_size).reshape(blocks, block_size)
        residue, row = _visit(position, visits, row_stride)
        self.exists = (residue < row_stride) & (row < length)
        self.rows = np.minimum(row, length - 1)
        self.span = Span(
            lo=np.where(self.exists, row, length).min(axis=1),
            hi=np.where(self.exists, row, -1).max(axis=1),
            step=np.where(residue[:, 0] == residue[:, -1], row_stride, 1),
        )
        visit, residue = np.divmod(np.arange(length), row_stride)
        self.positions = residue * visits + visit  # of each row
