"""Makes the attention layers of a model sparse."""

from __future__ import annotations

from typing import Any, Callable

from ..plan.block_mask import BlockMask
from ..plan.masks import VERTSIZE
from .attention_layers import GroupQueryAttention, MultiHeadAttention
from .backend import keras, require_keras_3


def sparsify(
    model: Any,
    attn_mode: str | None = None,
    where: Callable | None = None,
    *,
    local_attn_ctx: int | None = None,
    block_size: int = 32,
    num_verts: int | None = None,
    vertsize: int = VERTSIZE,
    block_mask: BlockMask | None = None,
) -> Any:
    """A copy of a model, with its attention layers made sparse and its weights kept.

        short_sighted = sa.sparsify(model, attn_mode="local", local_attn_ctx=256)

    Every `keras.layers.MultiHeadAttention` and `GroupQueryAttention`, at any depth,
    becomes the layer of that name of `sparse_attention`; subclasses of them stay.

    The copy is not compiled. A file of it holds what is sparse where the layer itself is
    in the model's config; a layer that makes its attention in its constructor makes
    Keras's when it is loaded, so call `sparsify` on the loaded model again.

    Args:
      model: A Keras 3 model that `from_config` can make again: Functional, Sequential,
        or with a `get_config` of its own.
      attn_mode, local_attn_ctx, block_size, num_verts, vertsize, block_mask: As for
        `sa.MultiHeadAttention`. With neither `attn_mode` nor `block_mask`, attention
        stays dense and becomes fused.
      where: Function of a layer, True = make it sparse. None: all are.

    Returns:
      A model of the same class.

    Raises:
      ImportError: If Keras is older than 3.
      ValueError: If no layer is chosen, or an argument does not fit.

    Of Keras it relies on `Model._flatten_layers`, which is not public.
    """
    require_keras_3("sparsify")
    classes = {
        keras.layers.MultiHeadAttention: MultiHeadAttention,
        keras.layers.GroupQueryAttention: GroupQueryAttention,
    }
    clone = type(model).from_config(model.get_config())
    if model.built and not clone.built:
        clone.build_from_config(model.get_build_config())
    clone.set_weights(model.get_weights())
    chosen = [
        layer
        for layer in clone._flatten_layers()
        if type(layer) in classes and (where is None or where(layer))
    ]
    if not chosen:
        raise ValueError(
            "model must have a keras.layers.MultiHeadAttention or GroupQueryAttention "
            f"that `where` chooses, got {model.name!r} without one"
        )
    for layer in chosen:
        layer.__class__ = classes[type(layer)]
        layer.set_pattern(
            attn_mode=attn_mode,
            local_attn_ctx=local_attn_ctx,
            block_size=block_size,
            num_verts=num_verts,
            vertsize=vertsize,
            block_mask=block_mask,
        )
    return clone
