"""Keras's own attention layers, with a plan that says what they compute."""

from __future__ import annotations

import contextvars
import warnings
from functools import lru_cache, partial
from typing import Any

import tensorflow as tf

from ..plan.block_mask import BlockMask
from ..plan.checks import as_ints
from ..plan.masks import VERTSIZE
from ..plan.patterns import check_known, pattern_block_mask
from .backend import keras, require_keras_3
from .flash_attention import (
    draw_seed,
    fused_arguments,
    run_fused,
    say_keras,
    with_heads,
)
from .layers import CompiledWhereXlaCan, serializable

# Whether the call that runs asked for `use_causal_mask`. Keras would make a mask of it.
_is_causal = contextvars.ContextVar("sparse_attention.use_causal_mask", default=False)

PATTERN = {
    "attn_mode": None,
    "local_attn_ctx": None,
    "block_size": 32,
    "num_verts": None,
    "vertsize": VERTSIZE,
    "block_mask": None,
}


class Sparse(CompiledWhereXlaCan):
    """What the layers below add to Keras's; it comes before Keras's class.

    Of Keras it relies on `_compute_attention`, which Keras documents for overriding.
    """

    exported_as: str  # by the package; Keras's class of grouped heads has another name
    dropout: float
    local_attn_ctx: int | None
    block_size: int
    num_verts: int | None
    vertsize: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        require_keras_3(self.exported_as)
        pattern = {name: kwargs.pop(name, PATTERN[name]) for name in PATTERN}
        super().__init__(*args, **kwargs)
        self.set_pattern(**pattern)

    def set_pattern(self, attn_mode, block_mask, **sizes):
        """Checks what of PATTERN a layer is given, and keeps it."""
        if not isinstance(block_mask, (BlockMask, type(None))):
            raise TypeError(
                f"block_mask must be a BlockMask, got {type(block_mask).__name__}"
            )
        if block_mask is not None and attn_mode is not None:
            raise ValueError(
                f"attn_mode must be left out beside a block_mask, got {attn_mode!r}"
            )
        if attn_mode is not None:
            check_known(attn_mode)
        self.attn_mode, self.block_mask = attn_mode, block_mask
        for name, value in as_ints(**sizes).items():
            setattr(self, name, value)

    def call(
        self,
        query,
        value,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
    ):
        if return_attention_scores:
            raise ValueError(
                "return_attention_scores must be False, as the scores are never a "
                f"tensor, got {return_attention_scores!r}; Keras's layer "
                "with the same weights returns them"
            )
        keras_layer: Any = super()
        token = _is_causal.set(bool(use_causal_mask))
        try:
            return keras_layer.call(
                query,
                value,
                key=key,
                query_mask=query_mask,
                value_mask=value_mask,
                key_mask=key_mask,
                attention_mask=attention_mask,
                training=training,
            )
        finally:
            _is_causal.reset(token)

    def _compute_attention(
        self, query, key, value, attention_mask=None, training=None, *args, **kwargs
    ):
        is_causal = _is_causal.get()
        plan = self._plan(query, key, is_causal)
        dropout = 0.0 if training in (None, False) else self.dropout
        fused, why_not = fused_arguments(
            *(query, key, value),
            mask=with_heads(attention_mask),
            is_causal=is_causal,
            dropout=dropout,
            draw_seed=lambda: draw_seed(self),
            block_mask=plan,
        )
        if fused is not None:
            return run_fused(query, key, value, fused), None
        say_keras(query, key, why_not)
        if plan is not None:
            _warn_once(why_not)
            allowed = tf.constant(plan.to_dense())[None]
        elif is_causal:
            q_len, kv_len = tf.shape(query)[1], tf.shape(key)[1]
            allowed = tf.range(q_len)[:, None] >= tf.range(kv_len)
            allowed = allowed[None, None]
        else:
            allowed = None
        if attention_mask is not None:
            mask = tf.cast(with_heads(attention_mask), tf.bool)
            allowed = mask if allowed is None else mask & allowed
        keras_layer: Any = super()
        return keras_layer._compute_attention(
            query, key, value, allowed, training, *args, **kwargs
        )

    def _plan(self, query, key, is_causal):
        """`BlockMask` for these lengths; None: all that `is_causal` allows."""
        if self.block_mask is not None:
            plan, heads = self.block_mask, query.shape[2]
            lengths = query.shape[1], key.shape[1]
            if lengths != (plan.q_len, plan.kv_len) or plan.heads not in (1, heads):
                raise ValueError(
                    "block_mask must have the lengths of query and value, "
                    f"{lengths[0]} and {lengths[1]}, and 1 head or {heads}, got "
                    f"q_len = {plan.q_len}, kv_len = {plan.kv_len}, {plan.heads} heads"
                )
            if is_causal and not plan.is_causal:
                raise ValueError(
                    "use_causal_mask=True must be left out, or block_mask be causal; "
                    "`mask & sa.causal_mask()` makes a mask causal"
                )
            return plan
        if self.attn_mode is None:
            return None
        q_len, kv_len = query.shape[1], key.shape[1]
        if q_len is None or q_len != kv_len:
            raise ValueError(
                f"attn_mode={self.attn_mode!r} is for query and value of one length that "
                f"is known when the graph is made, got {q_len} and {kv_len}; give a "
                "block_mask for two lengths, and keras.Input([time, width]) a time"
            )
        return pattern_block_mask(
            *(self.attn_mode, q_len, query.shape[2], self.block_size),
            *(self.local_attn_ctx, self.num_verts, self.vertsize),
        )

    def get_config(self) -> dict:
        pattern = {name: getattr(self, name) for name in PATTERN}
        plan = self.block_mask
        pattern["block_mask"] = plan and plan.get_config()
        keras_layer: Any = super()
        return {**keras_layer.get_config(), **pattern}

    @classmethod
    def from_config(cls, config: dict) -> Any:
        plan = config.get("block_mask")
        plan = plan and BlockMask.from_config(plan)
        keras_class: Any = super()
        return keras_class.from_config({**config, "block_mask": plan})


@lru_cache(maxsize=None)
def _warn_once(why_not):
    warnings.warn(
        "a sparse attention layer runs by Keras's own ops, which make a tensor of all "
        f"scores: {why_not}",
        RuntimeWarning,
        stacklevel=2,
    )


def _keras_class(name) -> Any:
    """A class of Keras's; where Keras is too old for it, one from which to say so."""
    return getattr(keras.layers, name, keras.layers.Layer)


KerasMultiHeadAttention = _keras_class("MultiHeadAttention")
KerasGroupQueryAttention = _keras_class("GroupQueryAttention")


@serializable
class MultiHeadAttention(Sparse, KerasMultiHeadAttention):  # type: ignore[misc,valid-type]
    """Keras's layer, fused: it looks both ways, but with a pattern or a causal mask or plan.

        x = sa.MultiHeadAttention(8, 64, attn_mode="local", local_attn_ctx=256)(x, x)

    Weights, their names, config, LoRA and quantization are Keras's, so files of weights
    of either load into the other. What is computed may be chosen beside them; for both
    directions, leave `attn_mode` and `use_causal_mask` out:

    Args:
      *args, **kwargs: As for `keras.layers.MultiHeadAttention`, and by name:
      attn_mode: A causal pattern of `pattern_block_mask`, for query and value of one
        length: "all", "local", "strided", "fixed" or "merged". None: as Keras, everything,
        or with `use_causal_mask=True` what is causal.
      local_attn_ctx, block_size, num_verts, vertsize: As for `pattern_block_mask`.
      block_mask: `BlockMask` to use instead, for the lengths of query and value, which
        may differ, with one head or `num_heads`.

    Call arguments are Keras's. A pattern is causal with and without
    `use_causal_mask=True`; beside a `block_mask`, which must then be causal, this is a
    check. Where the fused op cannot take a call, Keras's own ops do, with the plan as a
    mask, and a RuntimeWarning says so once.

    Raises:
      ImportError: If Keras is older than 3.
      TypeError: If `block_mask` is no `BlockMask`.
      ValueError: If the pattern or plan does not fit, or `return_attention_scores` is
        True: the scores are never a tensor.

    Numerics: As `block_sparse_attention`, in the policy's compute dtype.
    """

    exported_as = "MultiHeadAttention"


@partial(serializable, name="GroupQueryAttention")
class GroupedQueryAttention(Sparse, KerasGroupQueryAttention):  # type: ignore[misc,valid-type]
    """Keras's layer of that name, fused, and causal where `sa.MultiHeadAttention` is.

        layer = sa.GroupQueryAttention(64, 8, 2, attn_mode="local", local_attn_ctx=256)

    Args:
      *args, **kwargs: As for `keras.layers.GroupQueryAttention`, and by name what
        `sa.MultiHeadAttention` takes; a plan has one head or `num_query_heads`.

    Raises:
      As `sa.MultiHeadAttention`.
    """

    exported_as = "GroupQueryAttention"


# Keras has the same two names. It calls what is in its files after the first.
GroupQueryAttention = GroupedQueryAttention
