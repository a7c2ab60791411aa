"""The Sparse Transformer as a Keras model: a language model over long sequences."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any, Sequence

import numpy as np
import tensorflow as tf

from ..ops.signature import TensorLike
from ..plan.block_mask import BlockMask
from ..plan.checks import as_ints, as_list, check_positive
from ..plan.masks import VERTSIZE
from ..plan.patterns import layer_patterns, pattern_block_mask, resolve
from .backend import NotQuantized, keras, require_keras_3
from .layers import (
    SparseSelfAttention,
    check_plan,
    length_up_to,
    serializable,
)
from .score_options import SCORE_OPTIONS, rate, score_options
from .transformer_block import (
    SparseTransformerBlock,
    embedding,
    layer_norm,
    normal_initializer,
    position_embedding,
)

# What weights of one configuration may differ in from those of another.
ANY_WHEN_LOADED = ("dropout", "attention_dropout", "recompute")
# The same where a model takes the weights of another.
ANY_WHEN_TAKEN = (
    *ANY_WHEN_LOADED,
    *("time", "attention", "block_mask"),
    *("local_attn_ctx", "block_size", "num_verts", "vertsize"),
)


@serializable
class SparseTransformer(NotQuantized, keras.Model):
    """A causal language model: which token comes next, at every position.

    For attention in both directions, build a model of `SparseSelfAttention` with a
    `block_mask`, or of `MultiHeadAttention`.

    >>> model = SparseTransformer(256, time=128, layers=2, width=64, heads=4,
    ...                           attention="local,strided", local_attn_ctx=32)
    >>> model(tf.zeros([1, 128], tf.int32)).shape.as_list()
    [1, 128, 256]

    Pre-activation residual blocks over the sum of learned token and position
    embeddings; the token embedding also gives the logits. Weights start normal with a
    deviation of 1 / sqrt(fan in), and 1 / sqrt(2 * layers) of it where a block adds its
    output. (The paper's 0.125 / sqrt(fan in) learns more slowly in the first steps.)

    Args:
      vocab_size: Number of different tokens.
      time: Sequence length in positions.
      layers: Number of blocks.
      width: Width of what flows between them; a multiple of 8 * heads.
      heads: Attention heads.
      attention: The patterns that the layers have in turn, with commas between: "all"
        (or "dense"), "local", "strided", "fixed", "merged"; all are causal. The paper's
        strided attention is "local,strided". Left out beside a `block_mask`.
      local_attn_ctx, block_size, num_verts, vertsize: As for `pattern_block_mask`.
      dropout: The fraction dropped of what a block adds.
      recompute: Whether the backward pass computes each block again from what it reads,
        so that nothing else of it is kept.
      attention_dropout: The fraction dropped of the attention weights.
      alibi, logit_softcap, sinks, relative_positions, rotary: As for
        `SparseSelfAttention`, in each layer; beside the position embeddings.
      kv_heads: Key heads, which divide `heads`; None: as many.
      block_mask: A `BlockMask` for the layers, or a sequence of those that they have in
        turn, in place of `attention` and what it takes. Each has `time` queries and
        keys, one head or `heads`, and is causal.
      position_axes: Sizes whose product is `time`, for sequences that are arrays, as
        (32, 32, 3) for the rows, columns and channels of images: a position's embedding
        is the sum of one for its index along each axis, the last of which changes
        fastest. None: each position has its own.
      **kwargs: What every model takes: `name`, `dtype` (or a policy), `trainable`.

    Call arguments:
      tokens: int [batch, time] or shorter, which costs as much. The caller shifts them:
        targets are one position ahead.
      training: Whether anything is dropped.
      segment_ids: int [batch, time], or as short as the tokens: a position attends to
        those of its own id alone, and to none if that is negative. None: one document.

    Returns:
      logits: float32 [batch, time, vocab_size], or as short as the tokens.

    Raises:
      ImportError: If Keras is older than 3.
      TypeError: If `block_mask` holds anything else.
      ValueError: If an argument is out of range or does not fit the others, or a plan
        lets a position attend to a later one.
      NotImplementedError: From `quantize`.

    Numerics: As its layers, in the policy's compute dtype, to which Keras also rounds
      the embeddings; the last norm and the products for the logits in float32. XLA
      rounds less often between norms and activations. With `recompute` bitwise the
      same, dropout included.

    Reference: Child et al. 2019, "Generating Long Sequences with Sparse Transformers",
      arXiv:1904.10509, section 5.
    """

    def __init__(
        self,
        vocab_size: int,
        time: int,
        layers: int,
        width: int,
        heads: int,
        attention: str | None = "fixed",
        local_attn_ctx: int = 128,
        block_size: int = 32,
        num_verts: int | None = None,
        vertsize: int = VERTSIZE,
        dropout: float = 0.0,
        recompute: bool = False,
        *,
        attention_dropout: float = 0.0,
        alibi: Any = False,
        logit_softcap: float | None = None,
        sinks: bool = False,
        relative_positions: int | None = None,
        rotary: bool | float = False,
        kv_heads: int | None = None,
        block_mask: BlockMask | Sequence[BlockMask] | None = None,
        position_axes: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        require_keras_3("SparseTransformer")
        super().__init__(**kwargs)
        self.require_float_policy()
        sizes = as_ints(
            vocab_size=vocab_size, time=time, layers=layers, width=width, heads=heads
        )
        pattern = as_ints(
            local_attn_ctx=local_attn_ctx,
            block_size=block_size,
            num_verts=num_verts,
            vertsize=vertsize,
        )
        check_positive(**sizes)
        vocab_size, time, layers, width, heads = sizes.values()
        if width % (8 * heads):
            raise ValueError(
                f"width must be a multiple of 8 * heads = {8 * heads}, got {width}"
            )
        rates = {
            "dropout": rate("dropout", dropout),
            "attention_dropout": rate("attention_dropout", attention_dropout),
        }
        options = score_options(
            heads, alibi, logit_softcap, sinks, relative_positions, rotary
        )
        kv_heads = as_ints(kv_heads=kv_heads)["kv_heads"]
        axes = _axes_of(position_axes, time)
        self.plans = _plans_of(block_mask, time, heads)
        layers_have: list[dict]  # in turn
        if self.plans:
            if attention not in ("fixed", None):
                raise ValueError(
                    f"attention must be left out beside a block_mask, got {attention!r}"
                )
            attention, pattern = None, {}
            layers_have = [{"block_mask": plan} for plan in self.plans]
        else:
            attn_modes = layer_patterns(attention)
            for attn_mode in attn_modes:  # Errors come now, and the plans are cached.
                _, settings = resolve(attn_mode, time, heads, **pattern)
                pattern["num_verts"] = settings.num_verts or pattern["num_verts"]
                pattern_block_mask(attn_mode, time, heads, **pattern)
            layers_have = [{"attn_mode": mode, **pattern} for mode in attn_modes]
        self._config = {
            **sizes,
            "attention": attention,
            **pattern,
            **rates,
            "recompute": bool(recompute),
            **options,
            "kv_heads": heads if kv_heads is None else kv_heads,
            "block_mask": [plan.fingerprint for plan in self.plans] or None,
            "position_axes": axes,
        }
        self.vocab_size = vocab_size
        self.time = time
        self.dropout = rates["dropout"]
        self.has_dropout = any(rates.values())
        policy = self.dtype_policy
        residual_scale = (2 * layers) ** -0.5
        self.token_embedding = embedding("token_embedding", vocab_size, width, policy)
        self.position_embedding = position_embedding(time, axes, width, policy)
        self.blocks = [
            SparseTransformerBlock(
                SparseSelfAttention(
                    heads,
                    kv_heads=kv_heads,
                    **attends,
                    **options,
                    dropout=rates["attention_dropout"],
                    kernel_initializer=normal_initializer(1.0),
                    output_initializer=normal_initializer(residual_scale),
                    dtype=policy,
                    name="attention",
                ),
                width,
                residual_scale,
                rates["dropout"],
                recompute,
                dtype=policy,
                name=f"block_{i}",
            )
            for i, attends in zip(range(layers), itertools.cycle(layers_have))
        ]
        self.final_norm = layer_norm("final_norm", "float32")

    def build(self, input_shape: Any) -> None:
        self.token_embedding.build(input_shape)
        self.position_embedding.build([self.time])
        between = [input_shape[0], self.time, self.token_embedding.output_dim]
        for block in self.blocks:
            block.build(between)
        self.final_norm.build(between)
        # Counts the calls that have dropped something. It is a weight, so that
        # checkpoints hold it.
        self.dropout_calls = self.add_weight(
            name="dropout_calls",
            shape=(),
            dtype="int32",
            initializer="zeros",
            trainable=False,
            aggregation="only_first_replica",
        )

    def call(
        self,
        tokens: TensorLike,
        training: bool = False,
        segment_ids: TensorLike | None = None,
    ) -> Any:
        if len(tokens.shape) != 2:
            raise ValueError(f"tokens must be [batch, time], got shape {tokens.shape}")
        length = length_up_to(self.time, tokens, "tokens")
        seeds = self._draw_seeds() if training and self.has_dropout else None
        # The position embedding is added without a look-up. With several replicas, the
        # gradient of a look-up lists each row once for each of them, and Adam of Keras
        # 3.15 does not add these up.
        positions = self.position_embedding.embeddings[:length]
        x = self.token_embedding(tokens) + positions
        for i, block in enumerate(self.blocks):
            x = block(x, seeds if seeds is None else seeds[i], segment_ids)
        return self.logits(x)

    def logits(self, x: TensorLike) -> Any:
        """The logits of what the last block gives: float32 [..., vocab_size]."""
        embeddings = tf.cast(self.token_embedding.embeddings, tf.float32)
        # Not einsum("...w,vw->...v"), whose gradient makes a tensor [v, w, ...].
        return tf.tensordot(self.final_norm(x), embeddings, [[-1], [1]])

    def _draw_seeds(self):
        """Seeds that no two calls and no two devices share: int32 [layers, 3, 2]."""
        self.dropout_calls.assign_add(1)
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        seed = tf.stack([self.dropout_calls.value, replica])
        seeds = tf.random.split(seed, 3 * len(self.blocks))
        return tf.reshape(seeds, [-1, 3, 2])

    # The next two methods do what Keras 3.15 lacks to fit a model under
    # MultiWorkerMirroredStrategy.

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        if _spans_workers(self.distribute_strategy):  # Keras would average a batch.
            tokens = keras.KerasTensor((1, self.time), "int32")
            iterator, data_batch = None, (tokens, tokens)
        super()._maybe_symbolic_build(iterator, data_batch)

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        metrics = super().compute_metrics(x, y, y_pred, sample_weight)
        if _spans_workers(self.distribute_strategy):  # Keras averages the first axis.
            return {name: tf.reshape(value, [1]) for name, value in metrics.items()}
        return metrics

    def compute_output_spec(self, tokens, training=False, segment_ids=None):
        return keras.KerasTensor((*tokens.shape, self.vocab_size), "float32")

    def count_params(self) -> int:
        """How many weights the network has; `dropout_calls` is none of them."""
        return super().count_params() - 1

    def get_config(self) -> dict:
        plans = [plan.get_config() for plan in self.plans] or None
        return {**super().get_config(), **self._config, "block_mask": plans}

    @classmethod
    def from_config(cls, config: dict) -> Any:
        plans = config.get("block_mask")
        plans = plans and [BlockMask.from_config(plan) for plan in plans]
        return super().from_config({**config, "block_mask": plans})

    def take_weights(self, source: SparseTransformer) -> None:
        """Begins with the weights of another model, whose time or pattern may be another.

        >>> short = SparseTransformer(256, time=64, layers=1, width=32, heads=4)
        >>> _ = short(tf.zeros([1, 64], tf.int32))
        >>> long = SparseTransformer(256, time=512, layers=1, width=32, heads=4)
        >>> long.take_weights(short)

        Positions past the end of the source take the embeddings of its own, from the
        first on again.

        Args:
          source: A model that is built, and equal but for `time`, the pattern, dropout
            and `recompute`.

        Raises:
          TypeError: If the source is no `SparseTransformer`.
          ValueError: If it differs in more, or is not built.
        """
        if not isinstance(source, SparseTransformer):
            raise TypeError(
                f"source must be a SparseTransformer, got {type(source).__name__}"
            )
        differences = self._differences(source._config, ANY_WHEN_TAKEN)
        if differences:
            raise ValueError(f"source must have the same sizes: {differences}")
        if not source.built:
            raise ValueError("source must be built; call it, or its build, first")
        if not self.built:
            self.build([None, self.time])
        weights = source.get_weights()
        own_positions = self.position_embedding.embeddings
        for i, weight in enumerate(self.weights):
            if weight is own_positions:
                weights[i] = weights[i][np.arange(self.time) % source.time]
        self.set_weights(weights)

    def _differences(self, config, but):
        """In words, of another configuration from this one."""
        return "; ".join(
            f"{name} = {config.get(name)} there, {value} here"
            for name, value in self._config.items()
            if name not in but and config.get(name) != value
        )

    # Keras by itself loads what it finds: the first layers of a checkpoint that has more.
    # So the weights are saved with the configuration, which is compared when they are loaded.

    def save_own_variables(self, store):
        super().save_own_variables(store)
        config = json.dumps(self._config).encode()
        store["config"] = np.frombuffer(config, np.uint8)

    def load_own_variables(self, store):
        try:
            config = store["config"]
        except KeyError:
            raise ValueError(
                "the weights must be those that a SparseTransformer has saved, beside "
                "its configuration, which is not there; to give it others, call "
                "set_weights"
            ) from None
        saved = json.loads(np.asarray(config).tobytes())
        # Earlier versions had no options.
        saved = {**SCORE_OPTIONS, "kv_heads": saved["heads"], **saved}
        differences = self._differences(saved, ANY_WHEN_LOADED)
        if differences:
            raise ValueError(
                f"the weights must be of this configuration: {differences}"
            )
        super().load_own_variables({"0": store["0"]})


def _axes_of(position_axes, time):
    """The sizes as a list of ints; None: there are none."""
    if position_axes is None:
        return None
    sizes = as_list("position_axes", position_axes)
    axes = as_ints(**{f"position_axes[{i}]": size for i, size in enumerate(sizes)})
    check_positive(**axes)
    if math.prod(axes.values()) != time:
        raise ValueError(
            f"position_axes must be sizes whose product is time={time}, "
            f"got {position_axes!r}"
        )
    return list(axes.values())


def _plans_of(block_mask, time, heads):
    """tuple of the plans, which fit and are causal; none where there are none."""
    if block_mask is None:
        return ()
    plans = block_mask if isinstance(block_mask, (list, tuple)) else [block_mask]
    if not plans:
        raise ValueError("block_mask must hold at least one BlockMask, got none")
    for plan in plans:
        if not isinstance(plan, BlockMask):
            raise TypeError(
                "block_mask must be a BlockMask or a list of them, "
                f"got {type(plan).__name__}"
            )
        check_plan(plan, time, heads)
        if not plan.is_causal:
            rows = ((row, plan.keys_of(row).max(initial=row)) for row in range(time))
            row, key = next((row, key) for row, key in rows if key > row)
            raise ValueError(
                "block_mask must be causal, or the model would read what it is to tell, "
                f"got a plan whose row {row} attends to row {key}; "
                "`mask & sa.causal_mask()` makes a mask causal"
            )
    return tuple(plans)


def _spans_workers(strategy):
    is_multi_worker = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    return is_multi_worker and strategy.extended._in_multi_worker_mode()
