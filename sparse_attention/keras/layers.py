"""Keras layer: multi-head self-attention over the blocks that a pattern needs.

Runs on Keras 3 with the TensorFlow backend and on TensorFlow's own Keras 2.
"""

from __future__ import annotations

import random
from typing import Any

import tensorflow as tf

from ..native import loader
from ..ops.attention import MAX_HEAD_DIM, block_sparse_attention
from ..ops.positions import rotary_embedding
from ..ops.signature import TensorLike
from ..plan.block_mask import BlockMask
from ..plan.checks import as_ints, check_integer, check_positive
from ..plan.masks import VERTSIZE
from ..plan.patterns import pattern_block_mask
from .backend import IS_KERAS_3, NotQuantized, keras
from .registration import PACKAGE
from .score_options import SCORE_OPTIONS, base_of, rate, score_options, slopes_of


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


class Dense(NotQuantized, keras.layers.Dense):
    """Keras's, as it is."""


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
    """Self-attention, causal unless a `block_mask` is given that looks both ways.

    A position attends to itself and to the earlier ones that a pattern allows. With a
    `block_mask`, that alone says who attends to whom: for everyone to everyone,
    `BlockMask(dense_layout(time, 32), None, 32, time, time)`.

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
      dropout: The fraction of the attention weights that is dropped in training.
      seed: int, of the dropout; None: one that `keras.utils.set_random_seed` determines.
      alibi: True: `alibi_slopes(heads)` times the distance is taken from the scores. Or
        the slopes themselves, a float for each head.
      logit_softcap: Scores s become logit_softcap * tanh(s / logit_softcap).
      sinks: Whether each head has a score more, a trained weight [heads] that begins with
        zeros: what of a softmax goes to it, no position gets.
      relative_positions: R: a trained weight [heads, 2 R - 1], which begins with zeros,
        is added to the scores: the element at clip(i - j, 1 - R, R - 1) + R - 1.
      rotary: True: `rotary_embedding` turns queries and keys, with the base 10000. Or the
        base itself.
      **kwargs: What every layer takes: `name`, `dtype` (or a policy), `trainable`.

    Call arguments:
      x: float [batch, time, width]. The time is known when the layer is built, unless a
        `block_mask` tells it; later x may be shorter, or of a time that is known only
        when the graph runs. Keys past its end do not exist.
      mask: bool [batch, time], as Keras passes it on: True = a token. What is none is
        padding, anywhere in a row, and nobody attends to it. None: there is no padding.
      segment_ids: int [batch, time]: a position attends to those of its own id alone,
        and to none if that is negative. None: all ids are equal.
      attention_mask: bool [batch, time, time], [batch, heads, time, time], or with ones
        for any of these: True = the query, of the first time, may attend to the key.
      training: Whether weights are dropped; None: what Keras says.
      dropout_seed: int [2], for this call alone; None: the layer draws one.

    Returns:
      Like x.

    Raises:
      TypeError: If an argument is of another kind than said here.
      ValueError: If an argument is not in its range or does not fit the others, or x.
      NotImplementedError: From `quantize`; a model around it leaves it as it is.
      InvalidArgumentError: If x, a mask or ids are of a wrong time that is known only
        when the graph runs.

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
        *,
        dropout: float = 0.0,
        seed: int | None = None,
        alibi: Any = False,
        logit_softcap: float | None = None,
        sinks: bool = False,
        relative_positions: int | None = None,
        rotary: bool | float = False,
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
        options = score_options(
            self.heads, alibi, logit_softcap, sinks, relative_positions, rotary
        )
        for name, value in options.items():  # Keras 2 would wrap a list.
            setattr(self, name, tuple(value) if isinstance(value, list) else value)
        self.dropout = rate("dropout", dropout)
        if seed is not None:
            check_integer(seed=seed)
        self.seed = seed if seed is None else int(seed)
        if self.dropout:
            if IS_KERAS_3:
                self.seed_generator = keras.random.SeedGenerator(seed)
            else:
                self._op_seed = random.randrange(2**31) if seed is None else seed

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
        check_plan(self.block_mask, time, self.heads)
        inner, kv_inner = self.heads * self.head_dim, self.kv_heads * self.head_dim
        initializer = self.kernel_initializer
        self.query = self._projection("query", width, inner, initializer)
        self.key = self._projection("key", width, kv_inner, initializer)
        self.value = self._projection("value", width, kv_inner, initializer)
        self.output_dense = self._projection(
            "output_dense", inner, width, self.output_initializer
        )
        if self.sinks:
            self.sink_scores = self._score_weight("sinks", [self.heads])
        if self.relative_positions is not None:
            shape = [self.heads, 2 * self.relative_positions - 1]
            self.relative_bias = self._score_weight("relative_bias", shape)
        self.built = True

    def _score_weight(self, name, shape):
        """A weight that is added to scores: in its own dtype, as they are float32."""
        autocast = "autocast" if IS_KERAS_3 else "experimental_autocast"
        return self.add_weight(
            name=name, shape=shape, initializer="zeros", **{autocast: False}
        )

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

    def call(
        self,
        x: TensorLike,
        mask: TensorLike | None = None,
        segment_ids: TensorLike | None = None,
        attention_mask: TensorLike | None = None,
        training: Any = None,
        dropout_seed: TensorLike | None = None,
    ) -> Any:
        time = self.block_mask.q_len
        length = length_up_to(time, x, "x")
        rule = self.score_rule()
        if mask is not None or segment_ids is not None:
            ids = _segment_ids(mask, segment_ids, tf.shape(x)[0], length)
            rule["segment_ids"] = tuple(_padded(x, length, time, -1) for x in ids)
        if attention_mask is not None:
            rule["mask"] = _pairs(attention_mask, length, time)
        is_whole = isinstance(length, int) and length == time
        if not is_whole:
            rule["kv_lengths"] = tf.fill(tf.shape(x)[:1], length)
            x = _padded(x, length, time)
        q, k, v = self.project(x)

        def attend(**dropout):
            return block_sparse_attention(
                *(q, k, v, self.block_mask, self.heads, self.kv_heads),
                **rule,
                **dropout,
            )

        o = self._attend(attend, training, dropout_seed)
        return self.output_dense(o if is_whole else o[:, :length])

    def project(self, x: TensorLike, positions: TensorLike | None = None) -> tuple:
        """q, k, v of x [batch, time, width], turned if `rotary` says so.

        Args:
          positions: int [time] or [batch, time]; None: 0 ... time - 1.
        """
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.rotary is not False:
            base = base_of(self.rotary)
            q = rotary_embedding(q, self.heads, positions, base)
            k = rotary_embedding(k, self.kv_heads, positions, base)
        return q, k, v

    def score_rule(self) -> dict:
        """dict: arguments of `block_sparse_attention` that are the layer's own."""
        rule: dict = {"logit_softcap": self.logit_softcap}
        if self.alibi is not False:
            rule["alibi_slopes"] = slopes_of(self.alibi, self.heads)
        if self.sinks:
            rule["sinks"] = self.sink_scores
        if self.relative_positions is not None:
            rule["relative_bias"] = self.relative_bias
        return rule

    def _attend(self, attend, training, seed):
        """What `attend(dropout_rate, dropout_seed)` gives; in training with dropout."""
        if training is None and tf.__version__.startswith("1."):
            training = keras.backend.learning_phase()  # newer ones pass it on
        if not self.dropout or training is None:
            return attend()

        def attend_to_some():
            own = self._draw_seed() if seed is None else seed
            return attend(dropout_rate=self.dropout, dropout_seed=own)

        if tf.is_tensor(training):  # only the run of TensorFlow 1's graph can tell
            return tf.cond(tf.cast(training, tf.bool), attend_to_some, attend)
        return attend_to_some() if training else attend()

    def _draw_seed(self):
        """A seed that no other call and no other replica has: int64 [2]."""
        if IS_KERAS_3:
            seed = self.seed_generator.next()
        else:
            limit = tf.int32.max
            seed = tf.random.uniform([2], 0, limit, tf.int32, seed=self._op_seed)
        context = tf.distribute.get_replica_context()
        replica = context.replica_id_in_sync_group if context else 0
        return tf.cast(seed, tf.int64) + tf.cast(replica, tf.int64) * 2**32

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
            "dropout",
            "seed",
            *SCORE_OPTIONS,
        )
        is_pattern = self.attn_mode is not None
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in names},
            "alibi": self.alibi if isinstance(self.alibi, bool) else list(self.alibi),
            "block_mask": None if is_pattern else self.block_mask.get_config(),
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "output_initializer": keras.initializers.serialize(self.output_initializer),
        }

    @classmethod
    def from_config(cls, config: dict) -> Any:
        plan = config.get("block_mask")
        plan = plan and BlockMask.from_config(plan)
        return super().from_config({**config, "block_mask": plan})


def check_plan(plan, time, heads):
    """Raises ValueError unless the plan is for `time` positions and as many heads."""
    lengths_fit = plan.q_len == plan.kv_len == time
    if not lengths_fit or plan.heads not in (1, heads):
        raise ValueError(
            f"block_mask must have q_len = kv_len = time = {time} and 1 head or "
            f"heads = {heads}, got q_len = {plan.q_len}, kv_len = {plan.kv_len}, "
            f"{plan.heads} heads"
        )


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


def _segment_ids(mask, segment_ids, batch, length):
    """The ids of queries and of keys, int32 [batch, length], which say what both do.

    Padding is of no document: -1 among the keys. Its queries stay, and attend to tokens.
    """
    if segment_ids is None:
        ids = tf.zeros([batch, length], tf.int32)
    else:
        ids = tf.convert_to_tensor(segment_ids, name="segment_ids")
        if not ids.dtype.is_integer:
            raise TypeError(f"segment_ids must be integers, got {ids.dtype.name}")
        ids = tf.cast(_by_position("segment_ids", ids, length), tf.int32)
    if mask is None:
        return ids, ids
    mask = tf.convert_to_tensor(mask, name="mask")
    if mask.dtype != tf.bool:
        raise TypeError(f"mask must be bool, True = a token, got {mask.dtype.name}")
    mask = _by_position("mask", mask, length)
    return ids, tf.compat.v1.where_v2(mask, ids, -1)


def _by_position(name, x, length):
    """`x`, if it is [batch, length]; an error otherwise."""
    known = length if isinstance(length, int) else None
    if not x.shape.is_compatible_with([None, known]):
        raise ValueError(
            f"{name} must be [batch, time], got shape {x.shape} where the time is {length}"
        )
    message = f"{name} must be [batch, time] with the time of x"
    check = tf.debugging.assert_equal(tf.shape(x)[1], length, message=message)
    with tf.control_dependencies([] if check is None else [check]):
        return tf.identity(x)


def _pairs(mask, length, time):
    """An attention mask as the op takes it, with False for what x is padded with."""
    mask = tf.convert_to_tensor(mask, name="attention_mask")
    if mask.shape.rank == 3:
        mask = mask[:, None]
    times = mask.shape.as_list()[2:] if mask.shape.rank == 4 else [0]
    known = length if isinstance(length, int) else None
    fit = known is None or all(size in (None, 1, known) for size in times)
    if mask.dtype != tf.bool or mask.shape.rank != 4 or not fit:
        raise ValueError(
            "attention_mask must be bool [batch, time, time] or [batch, heads, time, "
            f"time], got {mask.dtype.name} {mask.shape} where the time is {length}"
        )
    for axis, size in zip((2, 3), times):
        if size != 1:
            mask = _padded(mask, length, time, False, axis)
    return mask


def _padded(x, length, time, value=0, axis=1):
    """`x` with `value` behind its positions: `time` along an axis that has `length`."""
    if isinstance(length, int) and length == time:
        return x
    paddings = [[0, 0] for _ in x.shape]
    paddings[axis] = [0, time - length]
    shape = x.shape.as_list()
    shape[axis] = time
    x = tf.pad(x, paddings, constant_values=value)
    x.set_shape(shape)
    return x
