"""blocksparse's class on our kernels: scores, softmax and weights as tensors of blocks.

`BlocksparseTransformer` keeps the interface, the look-up tables and the data path of
openai/blocksparse, so code written for it runs on any TensorFlow, and on a CPU:

    bst = BlocksparseTransformer(layout, block_size=32, heads=8, mask_callback=callback)
    scores = bst.query_key_op(q, k)  # [batch, heads, blocks, block_size, block_size]
    weights = bst.masked_softmax(scores, scale=0.125)
    y = bst.weight_value_op(weights, v)  # [batch, q_len, heads * head_dim]

Its users can read scores and weights, so they go through memory, 16 bits each. The fused
`block_sparse_attention` stores neither.
"""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

import numpy as np
import tensorflow as tf

from ..ops import portable
from ..ops.plan_tensors import kept
from ..ops.signature import TensorLike
from ..plan.block_mask import in_positions
from ..plan.checks import check_positive
from ..plan.masks import NUM_VERTS, VERTSIZE, as_mask
from ..plan.patterns import resolve
from .ops import load_blocksparse_ops
from .tables import BlocksparseTables

# The name of a collection of a graph. As it is no str, it is not saved with the graph.
_CONSTANTS = ("sparse_attention", "tables")


def _ops():
    """The module with the ops, where a call may use them."""
    if portable.is_on():
        raise NotImplementedError(
            "BlocksparseTransformer's ops have no portable form, which sa.portable_graph() "
            "asks for; block_sparse_attention and blocksparse_attention_impl with "
            "backend='fused' have one"
        )
    return load_blocksparse_ops()


class BlocksparseTransformer(BlocksparseTables):
    """Products and softmax over the computed blocks of a score matrix.

    Arguments, tables and masks are those of `BlocksparseTables`.
    """

    softmax_dtype = None  # The dtype of the weights, which `query_key_op` sets.

    # ---- tables as tensors ----

    def get_lut_constants(self) -> tuple:
        """(nt_lut, nn_lut, tn_lut) as tensors."""
        return tuple(map(self._constant, ("nt_lut", "nn_lut", "tn_lut")))

    def _constant(self, table):
        """A table as a tensor. Equal tables are one constant of a graph."""
        array = getattr(self, table)
        if tf.executing_eagerly():
            made = kept(self)
            if table not in made:
                made[table] = tf.constant(array)
            return made[table]
        graph = tf.compat.v1.get_default_graph()
        constants = graph.get_collection_ref(_CONSTANTS)  # [] or [a dict]
        if not constants:
            constants.append({})
        key = self._cached(table + "_key", _content_key, array)
        if key not in constants[0]:
            with tf.compat.v1.control_dependencies(None):
                constants[0][key] = tf.constant(array, name=table)
        return constants[0][key]

    # ---- products ----

    def nt_op(
        self,
        a: TensorLike,
        b: TensorLike,
        name: str | None = None,
        bench: int = 0,
        dtype: Any = tf.bfloat16,
    ) -> tf.Tensor:
        """Every computed block of a b^T.

        Args:
          a: float32, float16 or bfloat16 [batch, q_len, heads * head_dim] with q_len =
            ctx_blks_q * blk_size and head_dim a multiple of 8.
          b: The same with kv_len = ctx_blks_k * blk_size.
          name: Of the op.
          bench: Ignored; blocksparse timed so many runs.
          dtype: Of the result: bfloat16, float16 or float32.

        Returns:
          `dtype` [batch, heads, blocks, blk_size, blk_size].

        Numerics: float32 accumulation, one rounding to `dtype`. Bitwise deterministic.
        Cost: 2 blk_size^2 head_dim FLOP per block, head and batch.
        """
        return _ops().blocksparse_transformer_nt(
            a,
            b,
            *self.get_lut_constants(),
            CT=dtype,
            ctx_blks_a=self.ctx_blks_q,
            ctx_blks_b=self.ctx_blks_k,
            **self._matmul_attrs(name, bench),
        )

    def nn_op(
        self, a: TensorLike, b: TensorLike, name: str | None = None, bench: int = 0
    ) -> tf.Tensor:
        """a b with `a` as from `nt_op` and `b` [batch, kv_len, heads * head_dim]."""
        return _ops().blocksparse_transformer_nn(
            a,
            b,
            *self.get_lut_constants(),
            ctx_blks_b=self.ctx_blks_k,
            ctx_blks_c=self.ctx_blks_q,
            **self._matmul_attrs(name, bench),
        )

    def tn_op(
        self, a: TensorLike, b: TensorLike, name: str | None = None, bench: int = 0
    ) -> tf.Tensor:
        """a^T b with `a` as from `nt_op` and `b` [batch, q_len, heads * head_dim]."""
        return _ops().blocksparse_transformer_tn(
            a,
            b,
            *self.get_lut_constants(),
            ctx_blks_b=self.ctx_blks_q,
            ctx_blks_c=self.ctx_blks_k,
            **self._matmul_attrs(name, bench),
        )

    def query_key_op(
        self,
        q: TensorLike,
        k: TensorLike,
        name: str | None = None,
        bench: int = 0,
        dtype: Any = tf.bfloat16,
    ) -> tf.Tensor:
        """`nt_op`, which also sets the dtype of the weights that a softmax gives next.

        They are float16 if q is, and otherwise bfloat16.
        """
        is_half = tf.as_dtype(q.dtype).base_dtype == tf.float16
        self.softmax_dtype = tf.float16 if is_half else tf.bfloat16
        return self.nt_op(q, k, name, bench, dtype)

    def weight_value_op(
        self, w: TensorLike, v: TensorLike, name: str | None = None, bench: int = 0
    ) -> tf.Tensor:
        """`nn_op`."""
        return self.nn_op(w, v, name, bench)

    def _matmul_attrs(self, name, bench):
        return dict(
            heads=self.heads,
            blocks=self.blocks,
            blk_size=self.blk_size,
            nn_max=self.nn_max,
            tn_max=self.tn_max,
            bench=bench,
            name=name,
        )

    # ---- softmax ----

    def masked_softmax(
        self,
        x: TensorLike,
        scale: float = 1.0,
        autoregress_at_key: int | None = None,
        dtype: Any = None,
    ) -> tf.Tensor:
        """Softmax of `scale * x` over the keys that the mask allows to each query.

        A query that has blocks but no allowed key spreads its weight evenly over all
        their keys, as in blocksparse's NumPy code.

        Args:
          x: bfloat16 or float32 [batch, heads, blocks, blk_size, blk_size].
          scale: Number or scalar tensor. Gets no gradient.
          autoregress_at_key: int or scalar tensor in [0, kv_len): keys from there on
            are also hidden from the queries before them. None: the mask alone decides.
          dtype: The dtype of the weights: bfloat16, float16 or float32. None: as the
            last `query_key_op` set it.

        Returns:
          `dtype`, shape of x.

        Raises:
          ValueError: If `autoregress_at_key` is given without a mask.

        Numerics: float32 inside, one rounding to `dtype`. Bitwise deterministic. The
          gradient has the dtype of x.
        """
        if self.softmax_mask is None:
            if autoregress_at_key is not None:
                raise ValueError("autoregress_at_key needs a mask_callback, got None")
            return self.softmax(x, scale, dtype)
        mask = self._constant("softmax_mask")
        if autoregress_at_key is not None:
            mask = _ops().bst_partial_autoregressive_mask(
                mask,
                self._constant("nt_lut"),
                autoregress_at_key,
                blocks=self.blocks,
                blk_size=self.blk_size,
                ctx_blks_k=self.ctx_blks_k,
            )
        lut = self._constant("nn_lut")
        return _ops().blocksparse_masked_softmax(
            x, _on_host(scale), lut, mask, **self._softmax_attrs(dtype)
        )

    def softmax(
        self, x: TensorLike, scale: float = 1.0, dtype: Any = None
    ) -> tf.Tensor:
        """`masked_softmax` over every key of a query's blocks."""
        lut = self._constant("nn_lut")
        return _ops().blocksparse_softmax(
            x, _on_host(scale), lut, **self._softmax_attrs(dtype)
        )

    def _softmax_attrs(self, dtype):
        if dtype is None:
            dtype = tf.bfloat16 if self.softmax_dtype is None else self.softmax_dtype
        return dict(
            blocks=self.blocks,
            blk_size=self.blk_size,
            ctx_blks=self.ctx_blks_q,
            lut_max=self.nn_max,
            T=dtype,
        )


def _on_host(scale):
    """The scale in float32 on the CPU, where the ops read it without waiting for a GPU."""
    with tf.device("/cpu:0"):
        return tf.cast(scale, tf.float32)


def _content_key(array):
    return array.dtype.str, array.shape, hashlib.sha1(array.tobytes()).digest()


def get_blocksparse_obj(
    n_ctx: int,
    n_heads: int,
    attn_mode: str,
    blocksize: int = 32,
    local_attn_ctx: int | None = None,
    num_verts: int | None = NUM_VERTS,
    vertsize: int | None = VERTSIZE,
    real: bool = False,
) -> Any:
    """The `BlocksparseTransformer` of a causal pattern, as OpenAI's code builds it.

    >>> get_blocksparse_obj(96, 4, "local", 32, local_attn_ctx=32).nt_list
    [[(0, 0), (1, 0), (1, 1), (2, 1), (2, 2)]]

    Args:
      n_ctx: Sequence length in positions; a multiple of `blocksize`.
      n_heads: Number of heads.
      attn_mode: "all", "local", "strided" (for inputs that went through
        `strided_transpose`), "fixed", or another pattern of the table.
      blocksize: Side of a block in positions: 8, 16, 32 or 64.
      local_attn_ctx: Window or stride in positions, for all modes but "all". It divides
        `n_ctx` if "strided", unless it is larger, and is a multiple of `blocksize` if
        "fixed".
      num_verts, vertsize: As for `fixed_layout`; None: its defaults.
      real: Whether to build the class of the real blocksparse package.

    Returns:
      `BlocksparseTransformer`, ours or blocksparse's.

    Raises:
      ValueError: If an argument is not as above.
      ImportError: If the real package is asked for and does not import.
    """
    check_positive(n_ctx=n_ctx, n_heads=n_heads, blocksize=blocksize)
    if n_ctx % blocksize:
        raise ValueError(
            f"n_ctx must be a multiple of blocksize={blocksize}, got {n_ctx}"
        )
    num_verts = NUM_VERTS if num_verts is None else num_verts
    pattern, settings = resolve(
        attn_mode, n_ctx, n_heads, blocksize, local_attn_ctx, num_verts, vertsize
    )
    row_stride = pattern.row_stride_of(settings)
    if n_ctx % row_stride:
        raise ValueError(
            f"local_attn_ctx must divide n_ctx={n_ctx}, got {local_attn_ctx} (a stride "
            f"of {row_stride} rows)"
        )
    layout, mask = pattern.layout(settings), as_mask(pattern.mask(settings))
    if mask.per_head is False and (layout == layout[:1]).all():
        layout = layout[:1]  # the tables of one head serve all
    mask = in_positions(mask, n_ctx, row_stride)
    if not real:
        return BlocksparseTransformer(layout, blocksize, n_heads, mask)

    def callback(blk_shape, head_idx, query_blk_idx, key_blk_idx, blk_idx):
        rows, columns = np.ogrid[: blk_shape[0], : blk_shape[1]]
        q_idx = query_blk_idx * blk_shape[0] + rows
        return mask(head_idx, q_idx, key_blk_idx * blk_shape[1] + columns)

    return _real_class()(layout, blocksize, n_heads, callback)


def _real_class():
    try:
        return importlib.import_module("blocksparse.transformer").BlocksparseTransformer
    except Exception as error:  # Its compiled half fails in many ways.
        raise ImportError(
            "backend='blocksparse' needs the package blocksparse 1.13.1 to import, which "
            "needs TensorFlow 1.13 with CUDA 10 and a GPU; backend='blocksparse_ops' "
            f"runs the same ops anywhere. It failed with {type(error).__name__}: {error}"
        ) from error
