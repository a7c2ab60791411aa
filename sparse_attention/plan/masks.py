"""Masks: which keys each query attends to, one element at a time.

A mask is called with a head, query rows and key rows, any arrays that broadcast, and
answers True where the query attends to the key. Masks combine with `&`, `|` and `~`, also
with plain functions and boolean arrays:

>>> mask = local_mask(3) | (sink_mask(1) & causal_mask())
>>> mask
(local_mask(3) | (sink_mask(1) & causal_mask()))
>>> mask(0, np.arange(6)[:, None], np.arange(6)).astype(int)
array([[1, 0, 0, 0, 0, 0],
       [1, 1, 0, 0, 0, 0],
       [1, 1, 1, 0, 0, 0],
       [1, 1, 1, 1, 0, 0],
       [1, 0, 1, 1, 1, 0],
       [1, 0, 0, 1, 1, 1]])

A mask also judges whole blocks without looking inside (`Mask.bounds`). That is why a
plan for 65,536 positions takes a second: elements are evaluated only in the blocks that
the mask cannot decide.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Sequence

import numpy as np

from .checks import as_truth, check_integer, check_positive

# The defaults of `fixed` in OpenAI's code: the number of different summary columns among the
# heads, and the number of blocks in each.
NUM_VERTS, VERTSIZE = 4, 1

# So many elements are evaluated, or blocks judged, at a time, which bounds the memory.
CHUNK = 1 << 20


class Span(NamedTuple):
    """The rows of a block: lo, lo + step, ..., hi; ints, or arrays for many blocks."""

    lo: Any
    hi: Any  # inclusive
    step: Any = 1  # also 1 where lo and hi only bound the rows


class Mask:
    """An element rule, with an optional shortcut for whole blocks.

    >>> even_keys = Mask(lambda head, q_idx, kv_idx: kv_idx % 2 == 0, name="even_keys")
    >>> (even_keys & causal_mask())(0, 4, np.arange(6)).astype(int)
    array([1, 0, 1, 0, 1, 0])

    Args:
      fn: `fn(head, q_idx, kv_idx)` -> bool, broadcasting; indices are rows (time).
      bounds: `bounds(head, q, kv)` -> `(all_true, none_true)`, see `Mask.bounds`; None:
        the elements of every block are evaluated.
      per_head: Whether `head` matters; None: `tells_heads_apart` finds out.
      name: What `repr` shows.

    Calling it raises TypeError if `fn` returns neither booleans nor integers, nor floats
    that are 0 or 1.
    """

    __array_ufunc__ = None  # `array & mask` is ours, not NumPy's

    def __init__(
        self,
        fn: Callable,
        bounds: Callable | None = None,
        per_head: bool | None = None,
        name: str | None = None,
    ) -> None:
        self.fn = fn
        self.per_head = per_head
        self.name: str = str(name or getattr(fn, "__name__", repr(fn)))
        self._bounds = bounds

    def __call__(self, head: Any, q_idx: Any, kv_idx: Any) -> Any:
        return as_truth("mask", self.fn(head, q_idx, kv_idx))

    def tells_heads_apart(self) -> bool:
        """Whether the rule depends on the head.

        Where `per_head` is None, one call tells: an answer has a dimension for two heads
        only if the function reads them.

        >>> Mask(lambda head, q_idx, kv_idx: q_idx >= kv_idx + head).tells_heads_apart()
        True
        """
        if self.per_head is not None:
            return self.per_head
        heads, row = np.zeros((2, 1, 1), np.int64), np.zeros((1, 1), np.int64)
        return np.shape(self(heads, row, row))[-3:-2] == (2,)

    def bounds(self, head: Any, q: Span, kv: Span) -> tuple:
        """Whether all of a block's elements are allowed, and whether none of them is.

        >>> keys = Span(np.array([0, 8, 16]), np.array([7, 15, 23]))
        >>> causal_mask().bounds(0, Span(8, 15), keys)
        (array([ True, False, False]), array([False, False,  True]))

        Args:
          head: int or int array, the head.
          q: `Span` of the block's query rows.
          kv: `Span` of the block's key rows.

        Returns:
          `(all_true, none_true)`, bool, broadcast; both are False where the mask
          cannot tell without looking at the elements.
        """
        if self._bounds is None:
            return False, False
        all_true, none_true = self._bounds(head, q, kv)
        return as_truth("all_true", all_true), as_truth("none_true", none_true)

    def __and__(self, other: Any) -> Mask:
        return _combine(self, as_mask(other), "&")

    def __or__(self, other: Any) -> Mask:
        return _combine(self, as_mask(other), "|")

    def __rand__(self, other: Any) -> Mask:
        return _combine(as_mask(other), self, "&")

    def __ror__(self, other: Any) -> Mask:
        return _combine(as_mask(other), self, "|")

    def __invert__(self) -> Mask:
        """The mask that attends where this one does not.

        >>> (~causal_mask())(0, 2, np.arange(5)).astype(int)
        array([0, 0, 0, 1, 1])
        """

        def fn(head, q_idx, kv_idx):
            return np.logical_not(self(head, q_idx, kv_idx))

        def bounds(head, q, kv):
            all_true, none_true = self.bounds(head, q, kv)
            return none_true, all_true

        return Mask(fn, bounds, self.per_head, f"~{self}")

    def __repr__(self) -> str:
        return self.name


def as_mask(mask: Any) -> Mask:
    """What users may pass for a mask, as a `Mask`.

    >>> as_mask(None)
    dense_mask()
    >>> as_mask(np.eye(3, dtype=bool))(0, 1, np.arange(3)).astype(int)
    array([0, 1, 0])

    Args:
      mask: A `Mask`, which is returned as it is; a function `mask(head, q_idx, kv_idx)`;
        None, which is `dense_mask()`; or an array, bool [q_len, kv_len] or [heads or 1,
        q_len, kv_len], which is copied.

    Raises:
      TypeError: If it is none of these.
      ValueError: If an array has another rank. A call raises it for a head, query or key
        that the array does not have.
    """
    if mask is None:
        return dense_mask()
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, np.ndarray):
        return _array_mask(mask)
    if not callable(mask):
        raise TypeError(
            f"mask must be a Mask, a function or a NumPy array, got {mask!r}"
        )
    return Mask(mask)


def _array_mask(array):
    array = np.array(as_truth("mask", array))  # nobody else can change it
    if array.ndim not in (2, 3) or not array.size:
        raise ValueError(
            "a mask that is an array must be [q_len, kv_len] or [heads or 1, q_len, "
            f"kv_len], none of them zero, got shape {array.shape}"
        )
    by_head = array if array.ndim == 3 else array[None]

    def fn(head, q_idx, kv_idx):
        head = head if len(by_head) > 1 else 0
        indices = dict(head=head, query=q_idx, key=kv_idx)
        for (name, index), size in zip(indices.items(), by_head.shape):
            if np.min(index) < 0 or np.max(index) >= size:
                raise ValueError(
                    f"a mask that is an array must have every {name} that is asked for, "
                    f"here from {np.min(index)} to {np.max(index)}, got shape "
                    f"{array.shape}"
                )
        return by_head[head, q_idx, kv_idx]

    return Mask(fn, per_head=len(by_head) > 1, name=f"array{list(array.shape)}")


def check_heads(mask: Mask, heads: int) -> bool:
    """Whether a plan's heads differ by the mask; ValueError if one stands for all."""
    differ = mask.tells_heads_apart()
    if differ and heads == 1:
        raise ValueError(
            f"layout must have a head for each that {mask} tells apart, got 1: give "
            "heads=..., or Mask(function, per_head=False) if it is the same for all"
        )
    return differ


def _combine(a, b, operator):
    """`a & b` or `a | b`. One side alone may decide about a block (Kleene's logic)."""
    ufuncs = [np.logical_and, np.logical_or]
    join, dual = ufuncs if operator == "&" else ufuncs[::-1]

    def fn(head, q_idx, kv_idx):
        return join(a(head, q_idx, kv_idx), b(head, q_idx, kv_idx))

    def bounds(head, q, kv):
        a_all, a_none = a.bounds(head, q, kv)
        b_all, b_none = b.bounds(head, q, kv)
        return join(a_all, b_all), dual(a_none, b_none)

    per_head = max(a.per_head, b.per_head, key=(False, None, True).index)
    return Mask(fn, bounds, per_head, f"({a} {operator} {b})")


def shifted(mask: Mask, offset: int) -> Mask:
    """The mask for queries that do not begin where the keys do.

    >>> mask = shifted(causal_mask(), 2)
    >>> mask
    causal_mask(offset=2)
    >>> mask(0, 1, np.arange(6)).astype(int)
    array([1, 1, 1, 1, 0, 0])

    Args:
      mask: A `Mask` of positions.
      offset: The position of query 0 among the keys, which may be negative; kv_len -
        q_len lines up the ends. Query i has position i + offset.

    Raises:
      ValueError: If `offset` is no integer.
    """
    check_integer(offset=offset)
    if offset == 0:
        return mask

    def bounds(head, q, kv):
        return mask.bounds(head, Span(q.lo + offset, q.hi + offset, q.step), kv)

    comma = "" if mask.name.endswith("()") else ", "
    return Mask(
        lambda head, q_idx, kv_idx: mask(head, q_idx + offset, kv_idx),
        bounds,
        mask.per_head,
        f"{mask.name[:-1]}{comma}offset={offset})",
    )


# ---- single rules ----


def dense_mask() -> Mask:
    """Every query attends to every key.

    >>> bool(dense_mask()(0, 3, 5))
    True
    """
    return Mask(
        lambda head, q_idx, kv_idx: np.ones(np.broadcast(q_idx, kv_idx).shape, bool),
        lambda head, q, kv: (True, False),
        per_head=False,
        name="dense_mask()",
    )


def causal_mask(offset: int = 0) -> Mask:
    """Each query attends to itself and everything before it: key j where j <= i.

    >>> causal_mask()(0, 2, np.arange(4)).astype(int)
    array([1, 1, 1, 0])
    >>> causal_mask(offset=3)(0, np.arange(2)[:, None], np.arange(5)).astype(int)
    array([[1, 1, 1, 1, 0],
           [1, 1, 1, 1, 1]])

    Args:
      offset: The position of query 0 among the keys: query i has position i + offset.
        kv_len - q_len lines up the ends, as decoding needs it.

    Returns:
      `Mask`.

    Raises:
      ValueError: If `offset` is no integer.
    """
    mask = Mask(
        lambda head, q_idx, kv_idx: q_idx >= kv_idx,
        lambda head, q, kv: (q.lo >= kv.hi, q.hi < kv.lo),
        per_head=False,
        name="causal_mask()",
    )
    return shifted(mask, offset)


def chunk_mask(chunk: int) -> Mask:
    """Positions of the same chunk attend to each other, in both directions.

    >>> chunk_mask(2)(0, 2, np.arange(6)).astype(int)
    array([0, 0, 1, 1, 0, 0])

    Args:
      chunk: Positions in a chunk.

    Returns:
      `Mask`; `chunk_mask(chunk) & causal_mask()` looks back only.

    Raises:
      ValueError: If `chunk` is not positive.
    """
    check_positive(chunk=chunk)
    mask = same_part(lambda idx: idx // chunk)
    mask.name = f"chunk_mask({chunk})"
    return mask


def sink_mask(sinks: int) -> Mask:
    """Every query attends to the first `sinks` keys, in both directions.

    >>> sink_mask(2)(0, 5, np.arange(6)).astype(int)
    array([1, 1, 0, 0, 0, 0])

    Args:
      sinks: Number of keys at the start of the sequence.

    Returns:
      `Mask`; usually `local_mask(window) | (sink_mask(sinks) & causal_mask())`.

    Raises:
      ValueError: If `sinks` is not positive.

    Reference: Xiao et al. 2023, "Efficient Streaming Language Models with Attention
      Sinks", arXiv:2309.17453.
    """
    check_positive(sinks=sinks)
    return Mask(
        lambda head, q_idx, kv_idx: np.logical_and(kv_idx < sinks, q_idx >= 0),
        lambda head, q, kv: (kv.hi < sinks, kv.lo >= sinks),
        per_head=False,
        name=f"sink_mask({sinks})",
    )


# ---- what several patterns are made of ----


def of_head(values: Sequence[int], head: Any) -> Any:
    """What head h has of n values that the heads take in turn: value h mod n.

    >>> of_head([1, 2], np.arange(5))
    array([1, 2, 1, 2, 1])
    """
    if len(values) == 1:
        return values[0]
    return np.asarray(values)[np.asarray(head) % len(values)]


def near(left: int | None, right: int | None, scale: Sequence[int] = (1,)) -> Mask:
    """A query attends to keys up to `left` before it and `right` after it; None: to all.

    Args:
      left, right: Positions, which head h multiplies by `scale[h mod len(scale)]`.
    """

    def fn(head, q_idx, kv_idx):
        distance, n = q_idx - kv_idx, of_head(scale, head)
        allowed = True if left is None else distance <= left * n
        return allowed if right is None else (distance >= -right * n) & allowed

    def bounds(head, q, kv):
        least, most, n = q.lo - kv.hi, q.hi - kv.lo, of_head(scale, head)
        all_true, none_true = True, False
        if left is not None:
            all_true, none_true = most <= left * n, least > left * n
        if right is not None:
            all_true = (least >= -right * n) & all_true
            none_true = (most < -right * n) | none_true
        return all_true, none_true

    return Mask(fn, bounds, per_head=len(set(scale)) > 1)


def same_residue(*strides: int) -> Mask:
    """A query attends to every n-th key, both ways: head h has n = strides[h mod ...]."""

    def fn(head, q_idx, kv_idx):
        stride = of_head(strides, head)
        return q_idx % stride == kv_idx % stride

    def bounds(head, q, kv):
        stride = of_head(strides, head)
        # Where rows step by multiples of the stride, all pairs have the same residue.
        is_alike = (q.step % stride == 0) & (kv.step % stride == 0)
        is_hit = (q.lo - kv.lo) % stride == 0
        # Any other block is empty if no multiple of the stride is among its distances.
        is_missed = (q.hi - kv.lo) // stride < -((kv.hi - q.lo) // stride)
        return is_alike & is_hit, (is_alike & np.logical_not(is_hit)) | is_missed

    return Mask(fn, bounds, per_head=len(set(strides)) > 1)


def same_part(part_of: Callable) -> Mask:
    """Positions of the same part attend to each other, in both directions.

    Args:
      part_of: `part_of(positions)` -> the part of each, which never decreases.
    """

    def bounds(head, q, kv):
        q_first, q_last = part_of(q.lo), part_of(q.hi)
        kv_first, kv_last = part_of(kv.lo), part_of(kv.hi)
        all_true = (q_first == kv_last) & (q_last == kv_first)
        return all_true, (q_last < kv_first) | (kv_last < q_first)

    return Mask(
        lambda head, q_idx, kv_idx: part_of(q_idx) == part_of(kv_idx),
        bounds,
        per_head=False,
    )


# ---- the patterns of the Sparse Transformer ----


def local_mask(window: int, offset: int = 0) -> Mask:
    """Each query attends to itself and the `window - 1` positions before it: causal.

    >>> local_mask(2)(0, 3, np.arange(5)).astype(int)
    array([0, 0, 1, 1, 0])

    Args:
      window: Positions a query sees, itself included.
      offset: The position of query 0 among the keys: query i has position i + offset.
        kv_len - q_len lines up the ends, as decoding needs it.

    Returns:
      `Mask`.

    Raises:
      ValueError: If `window` is not positive, or `offset` is no integer.

    Reference: Child et al. 2019, "Generating Long Sequences with Sparse Transformers",
      arXiv:1904.10509, section 4.3. The paper has one position more; this is what its
      authors' code computes.
    """
    check_positive(window=window)
    mask = near(window - 1, 0)
    mask.name = f"local_mask({window})"
    return shifted(mask, offset)


def strided_mask(stride: int, offset: int = 0) -> Mask:
    """Each query attends to itself and every `stride`-th position before it: causal.

    >>> strided_mask(2)(0, 4, np.arange(6)).astype(int)
    array([1, 0, 1, 0, 1, 0])

    Args:
      stride: Positions between two keys of a query.
      offset: The position of query 0 among the keys: query i has position i + offset.
        kv_len - q_len lines up the ends, as decoding needs it.

    Returns:
      `Mask`.

    Raises:
      ValueError: If `stride` is not positive, or `offset` is no integer.

    Reference: Child et al. 2019, arXiv:1904.10509, section 4.3.
    """
    check_positive(stride=stride)
    mask = causal_mask() & same_residue(stride)
    mask.name = f"strided_mask({stride})"
    return shifted(mask, offset)


def fixed_mask(
    stride: int,
    block_size: int,
    num_verts: int = NUM_VERTS,
    vertsize: int = VERTSIZE,
    offset: int = 0,
) -> Mask:
    """Each query attends to its window so far, and a summary of each one before: causal.

    A summary is one column of `vertsize` blocks: counted from the window's end, head h
    reads column h mod `num_verts`.

    >>> fixed_mask(stride=4, block_size=1, num_verts=2)(
    ...     np.arange(2)[:, None], 9, np.arange(12)).astype(int)
    array([[0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 0, 0],
           [0, 0, 1, 0, 0, 0, 1, 0, 1, 1, 0, 0]])

    Args:
      stride: Positions in a window; a multiple of `block_size`. The paper's l.
      block_size: Side of a layout block in positions.
      num_verts: Different summary columns among the heads.
      vertsize: Blocks in a summary column. The paper's c is `vertsize * block_size`.
      offset: The position of query 0 among the keys: query i has position i + offset.
        kv_len - q_len lines up the ends, as decoding needs it.

    Returns:
      `Mask`, one rule per head where `num_verts` > 1.

    Raises:
      ValueError: If `stride` is no multiple of `block_size`, `vertsize` does not divide
        the blocks of a window, these are fewer than `num_verts * vertsize`, or `offset`
        is no integer.

    Reference: Child et al. 2019, arXiv:1904.10509, section 4.3.
    """
    check_fixed(stride, block_size, num_verts, vertsize)

    def column(kv_idx):
        return (stride - 1 - kv_idx % stride) // (vertsize * block_size)

    def bounds(head, q, kv):
        vert = head % num_verts
        first, last = column(kv.lo), column(kv.hi)  # columns count down within a window
        is_one_window = kv.lo // stride == kv.hi // stride
        all_true = is_one_window & (first == vert) & (last == vert)
        return all_true, is_one_window & ((first < vert) | (last > vert))

    summary = Mask(
        lambda head, q_idx, kv_idx: column(kv_idx) == head % num_verts,
        bounds,
        per_head=num_verts > 1,
    )
    mask = causal_mask() & (chunk_mask(stride) | summary)
    mask.name = f"fixed_mask({stride}, {block_size}, {num_verts}, {vertsize})"
    return shifted(mask, offset)


def check_fixed(stride, block_size, num_verts, vertsize):
    """Raises the errors that `fixed_mask` lists."""
    check_positive(stride=stride, block_size=block_size)
    check_positive(num_verts=num_verts, vertsize=vertsize)
    window = stride // block_size
    if stride % block_size:
        raise ValueError(
            f"stride (local_attn_ctx) must be a multiple of block_size={block_size}, "
            f"got {stride}"
        )
    if window % vertsize:
        raise ValueError(
            f"vertsize must divide the window's {window} blocks (stride / block_size), "
            f"got {vertsize}"
        )
    if num_verts * vertsize > window:
        raise ValueError(
            f"num_verts * vertsize must be at most the window's {window} blocks "
            f"(stride / block_size), got {num_verts} * {vertsize}"
            + ("; num_verts=1 gives all heads the same column" if num_verts > 1 else "")
        )


def choose_num_verts(heads, stride, block_size, vertsize=VERTSIZE):
    """The most summary columns, up to OpenAI's 4, that divide the heads and fit a window.

    >>> choose_num_verts(heads=6, stride=128, block_size=32)
    3
    """
    room = stride // (block_size * vertsize)
    fits = (n for n in range(NUM_VERTS, 0, -1) if heads % n == 0 and n <= room)
    return next(fits, 1)


# ---- compatibility ----


def callback_mask(mask_callback: Callable, layout: Any, block_size: int) -> Mask:
    """The rule that blocksparse's `mask_callback` gives for each computed block.

    >>> def causal(blk_shape, head_idx, query_blk_idx, key_blk_idx, blk_idx):
    ...     block = np.ones(blk_shape, bool)
    ...     return np.tril(block) if query_blk_idx == key_blk_idx else block
    >>> layout = np.tril(np.ones([2, 2], bool))
    >>> callback_mask(causal, layout, block_size=2)(0, 2, np.arange(4)).astype(int)
    array([1, 1, 1, 0])

    Args:
      mask_callback: `mask_callback(blk_shape, head_idx, query_blk_idx, key_blk_idx,
        blk_idx)` -> bool [block_size, block_size], True = attend; `blk_idx` counts the
        computed blocks of a head, row by row. Called once for each of them; where the
        layout has one head, with head 0 for all.
      layout: bool [heads or 1, q_blocks, kv_blocks] or [q_blocks, kv_blocks], True =
        computed.
      block_size: Side of a block in positions.

    Returns:
      `Mask`, nothing allowed outside the layout.

    Raises:
      TypeError: If the callback returns neither booleans nor integers, or the layout is
        neither these nor floats that are 0 or 1.
      ValueError: If it returns another shape.
    """
    check_positive(block_size=block_size)
    layout = np.array(as_truth("layout", layout), ndmin=3)
    blk_shape = (block_size, block_size)
    seen = {np.zeros(blk_shape, bool).tobytes(): 0}  # equal blocks are kept once
    block_ids = np.zeros(layout.shape, np.int32)
    for head, computed in enumerate(layout):
        for blk_idx, (q, kv) in enumerate(np.argwhere(computed).tolist()):
            block = np.asarray(mask_callback(blk_shape, head, q, kv, blk_idx))
            if block.dtype.kind not in "biu":
                raise TypeError(f"mask_callback must return bool, got {block.dtype}")
            if block.shape != blk_shape:
                raise ValueError(
                    f"mask_callback must return shape {blk_shape}, got {block.shape}"
                )
            elements = block.astype(bool).tobytes()
            block_ids[head, q, kv] = seen.setdefault(elements, len(seen))
    blocks = np.frombuffer(b"".join(seen), bool).reshape(-1, block_size, block_size)

    def fn(head, q_idx, kv_idx):
        head = head if len(layout) > 1 else 0
        block = block_ids[head, q_idx // block_size, kv_idx // block_size]
        return blocks[block, q_idx % block_size, kv_idx % block_size]

    return Mask(fn, per_head=len(layout) > 1, name="callback_mask(...)")
