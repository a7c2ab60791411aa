"""Keras layer: multi-head self-attention over the blocks that a pattern needs.

Runs on Keras 3 with the TensorFlow backend and on TensorFlow's own Keras 2.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from ..native import loader
from ..ops.attention import MAX_HEAD_DIM, block_sparse_attention
from ..ops.signature import TensorLike
from ..plan.block_mask import BlockMask
from ..plan.checks import as_ints, check_positive
from ..plan.masks import VERTSIZE
from ..plan.patterns import pattern_block_mask
from .backend import NotQuantized, keras
from .registration import PACKAGE
from .xla import Dense


def serializable(cls, name=None):
    """Registers a class, so that Keras finds it when it loads a saved layer.

    Args:
      name: That under which `sparse_attention` exports it; None: its own.
    """
    name = name or cls.__name__
    register = getattr(keras.utils, "register_keras_serializable", None)
    if register is None:
        return cls
    # TensorFlow 2.12 refuses to register where the stand-in is.
    keras.utils.get_custom_objects().pop(f"{PACKAGE}>{name}", None)
    return register(package=PACKAGE, name=name)(cls)


class CompiledWhereXlaCan:
    """A base of layers with our op, which Keras compiles by XLA only where XLA has it."""

    @property
    def supports_jit(self) -> bool:
        """Whether XLA compiles the layer here: what it needs is made now if need be.

        Keras asks where a model is compiled with `jit_compile=True`, and by itself where
        TensorFlow sees a GPU.
        """
        return loader.attention_xla() is not None

    @supports_jit.setter
    def supports_jit(self, value: bool) -> None:
        """Keras sets it for every layer; whether it is so is not for a layer to say."""


@serializable
class SparseSelfAttention(CompiledWhereXlaCan, NotQuantized, keras.layers.Layer):
    """Causal self-attention: each position attends to earlier ones that a pattern allows.

    It attends to itself, too. With a `block_mask`, that alone says who attends to whom,
    in both directions if it is made so.

        q, k, v = query(x), key(x), value(x)
        output_dense(block_sparse_attention(q, k, v, block_mask, heads, kv_heads))

    >>> layer = SparseSelfAttention(heads=4, attn_mode="local", local_attn_ctx=32)
    >>> layer(tf.ones([2, 128, 64])).shape.as_list()
    [2, 128, 64]

    The plan is made once, for the time dimension that the layer is built with. A shorter
    x is padded to it, which costs as much as one of the whole time.

    Args:
      heads: Number of query heads.
      head_dim: Width of a head, a multiple of 8, at most 256; None: width / heads.
      attn_mode, local_attn_ctx, block_size, num_verts, vertsize: The pattern, which is
        causal, as for `pattern_block_mask`.
      block_mask: `BlockMask` to use instead, with one head or `heads`.
      kv_heads: Number of key heads, which divides `heads`; None: `heads`.
      use_bias: Whether the projections add a bias.
      kernel_initializer: Initializer of the query, key and value projections.
      output_initializer: Initializer of the output projection.
      **kwargs: What every layer takes: `name`, `dtype` (or a policy), `trainable`.

    Call arguments:
      x: float [batch, time, width]. The time is known when the layer is built, unless a
        `block_mask` tells it; later x may be shorter, or of a time that is known only
        when the graph runs. Keys past its end do not exist.
      mask: bool [batch, time], as Keras passes it on: True = a token. All tokens come
        before the padding, whose keys then do not exist. None: there is no padding.

    Returns:
      Like x.

    Raises:
      TypeError: If `block_mask` is no `BlockMask`.
      ValueError: If an argument is not positive or does not fit the others, or x.
      NotImplementedError: From `quantize`; a model around it leaves it as it is.
      InvalidArgumentError: If a mask has a token after padding, or x or a mask is of a
        wrong time that is known only when the graph runs.

    Numerics: As `block_sparse_attention`, in the policy's compute dtype. XLA compiles a
      model with this layer from TensorFlow 2.20 on (`supports_jit`).
    """

    def __init__(
        self,
        heads: int,
        head_dim: int | None = None,
        attn_mode: str = "all",
        local_attn_ctx: int | None = None,
        block_size: int = 32,
        num_verts: int | None = None,
        vertsize: int = VERTSIZE,
        block_mask: BlockMask | None = None,
        kv_heads: int | None = None,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        output_initializer: Any = "glorot_uniform",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.require_float_policy()
        sizes = as_ints(
            heads=heads,
            head_dim=head_dim,
            local_attn_ctx=local_attn_ctx,
            block_size=block_size,
            num_verts=num_verts,
            vertsize=vertsize,
            kv_heads=heads if kv_heads is None else kv_heads,
        )
        self.heads = sizes["heads"]
        self.head_dim = sizes["head_dim"]
        self.kv_heads = sizes["kv_heads"]
        self.attn_mode: Any = attn_mode if block_mask is None else None
        self.local_attn_ctx = sizes["local_attn_ctx"]
        self.block_size = sizes["block_size"]
        self.num_verts = sizes["num_verts"]
        self.vertsize = sizes["vertsize"]
        self.block_mask: Any = block_mask
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.output_initializer = keras.initializers.get(output_initializer)
        self.supports_masking = True
        check_positive(heads=self.heads, kv_heads=self.kv_heads)
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads={heads}, got {kv_heads}")
        if not isinstance(block_mask, (BlockMask, type(None))):
            raise TypeError(
                f"block_mask must be a BlockMask, got {type(block_mask).__name__}"
            )
        if block_mask is not None and attn_mode not in ("all", None):
            raise ValueError(
                f"attn_mode must be left out beside a block_mask, got {attn_mode!r}"
            )

    def build(self, input_shape: Any) -> None:
        _, time, width = tf.TensorShape(input_shape).with_rank(3).as_list()
        if time is None and self.block_mask is not None:
            time = self.block_mask.q_len
        if time is None or width is None:
            raise ValueError(
                "x must have a time and a width that are known when the layer is "
                f"built, got shape {input_shape}; give keras.Input([time, width]) or "
                "call build([None, time, width]) first, and x may then be shorter"
            )
        if self.head_dim is None:
            self.head_dim, rest = divmod(width, self.heads)
            if rest:
                raise ValueError(
                    f"heads must divide the width {width} where no head_dim is given, "
                    f"got {self.heads}"
                )
        check_positive(head_dim=self.head_dim)
        if self.head_dim % 8 or self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"head_dim must be a multiple of 8 and at most {MAX_HEAD_DIM}, "
                f"got {self.head_dim}"
            )
        if self.attn_mode is not None or self.block_mask is None:
            self.block_mask = pattern_block_mask(
                self.attn_mode,
                time,
                self.heads,
                self.block_size,
                self.local_attn_ctx,
                self.num_verts,
                self.vertsize,
            )
        plan = self.block_mask
        lengths_fit = plan.q_len == plan.kv_len == time
        if not lengths_fit or plan.heads not in (1, self.heads):
            raise ValueError(
                f"block_mask must have q_len = kv_len = time = {time} and 1 head or "
                f"heads = {self.heads}, got q_len = {plan.q_len}, "
                f"kv_len = {plan.kv_len}, {plan.heads} heads"
            )
        inner, kv_inner = self.heads * self.head_dim, self.kv_heads * self.head_dim
        initializer = self.kernel_initializer
        self.query = self._projection("query", width, inner, initializer)
        self.key = self._projection("key", width, kv_inner, initializer)
        self.value = self._projection("value", width, kv_inner, initializer)
        self.output_dense = self._projection(
            "output_dense", inner, width, self.output_initializer
        )
        self.built = True

    def _projection(self, name, input_width, width, initializer):
        dense = Dense(
            width,
            use_bias=self.use_bias,
            # Each gets a copy: Keras 3 draws the same values for all that share one.
            kernel_initializer=keras.initializers.serialize(initializer),
            # This is the policy, which Keras 2 has under the second name.
            dtype=getattr(self, "dtype_policy", None) or self._dtype_policy,
            name=name,
        )
        with tf.name_scope(name):
            dense.build([None, None, input_width])
        return dense

    def call(self, x: TensorLike, mask: TensorLike | None = None) -> Any:
        time = self.block_mask.q_len
        length = length_up_to(time, x, "x")
        lengths = None if mask is None else _lengths(mask, length)
        is_whole = isinstance(length, int) and length == time
        if not is_whole:
            if lengths is None:
                lengths = tf.fill(tf.shape(x)[:1], length)
            width = x.shape[2]
            x = tf.pad(x, [[0, 0], [0, time - length], [0, 0]])
            x.set_shape([None, time, width])
        o = block_sparse_attention(
            self.query(x),
            self.key(x),
            self.value(x),
            self.block_mask,
            self.heads,
            self.kv_heads,
            kv_lengths=lengths,
        )
        return self.output_dense(o if is_whole else o[:, :length])

    def compute_output_shape(self, input_shape: Any) -> Any:
        return input_shape

    def get_config(self) -> dict:
        names = (
            "heads",
            "head_dim",
            "attn_mode",
            "local_attn_ctx",
            "block_size",
            "num_verts",
            "vertsize",
            "kv_heads",
            "use_bias",
        )
        is_pattern = self.attn_mode is not None
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in names},
            "block_mask": None if is_pattern else self.block_mask.get_config(),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "output_initializer": keras.initializers.serialize(self.output_initializer),
        }

    @classmethod
    def from_config(cls, config: dict) -> Any:
        plan = config.get("block_mask")
        plan = plan and BlockMask.from_config(plan)
        return super().from_config({**config, "block_mask": plan})


def length_up_to(time, x, name):
    """How many positions x [batch, positions, ...] has: at most `time`, or an error.

    Returns:
      int, or an int32 tensor where only a run of the graph can tell.
    """
    length = tf.TensorShape(x.shape).as_list()[1]
    message = f"{name} must have at most time = {time} positions"
    if length is None:
        length = tf.shape(x)[1]
        check = tf.debugging.assert_less_equal(length, time, message=message)
        with tf.control_dependencies([check]):
            return tf.identity(length)
    if length > time:
        raise ValueError(f"{message}, got shape {x.shape}")
    return length


def _lengths(mask, time):
    """Counts the tokens before the padding: int32 [batch].

    It is an error if a token comes after the padding.

    Args:
      time: Of x, an int or an int32 tensor.
    """
    mask = tf.convert_to_tensor(mask)
    fits = mask.shape.is_compatible_with(
        [None, time if isinstance(time, int) else None]
    )
    if mask.dtype != tf.bool or not fits:
        raise ValueError(
            f"mask must be bool [batch, time], got {mask.dtype.name} {mask.shape} where "
            f"the time is {time}"
        )
    lengths = tf.reduce_sum(tf.cast(mask, tf.int32), axis=1)
    mask_time = tf.shape(mask)[1]
    is_padded_right = tf.reduce_all(
        tf.equal(mask, tf.sequence_mask(lengths, mask_time))
    )
    order = "mask must have every True before every False (padding on the right), got"
    checks = [
        tf.debugging.assert_equal(
            mask_time, time, message="mask must be [batch, time] with the time of x"
        ),
        tf.debugging.Assert(is_padded_right, [order, mask]),
    ]
    with tf.control_dependencies([check for check in checks if check is not None]):
        return tf.identity(lengths)
