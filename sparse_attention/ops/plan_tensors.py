"""Where a plan's tensors live: on the device of the op that reads them."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from ..native import abi
from ..native.cuda.devices import visible_archs
from ..plan import patterns
from ..plan.tile_plans import KvTiles


class PlanTensors(NamedTuple):
    """A plan as the op reads it, on one device."""

    tile_q: int
    tile_kv: int
    no_lengths: tf.Tensor  # int32 [0], the kv_lengths of an op that has none; or None
    inputs: list  # the tensors of `SHARED_INPUTS` that follow kv_lengths


# {owner: {key: what was made of it}}, for eager calls. An owner is not kept alive.
_kept = weakref.WeakKeyDictionary()


def kept(owner):
    """dict: what was made of an object, until it is gone or `clear_plans` is called."""
    found = _kept.get(owner)
    return _kept.setdefault(owner, {}) if found is None else found


def clear_plans() -> None:
    """Frees the plans that calls have left behind, on the host and on all devices.

    These are the tensors that eager calls made of a plan, the tables that eager calls
    made of a `BlocksparseTransformer`, the plans that `pattern_block_mask` remembers,
    and what TensorFlow's own ops read where there are no kernels. Whatever is called
    afterwards makes its own anew.

    A graph keeps the constants in it, so a `tf.function` that was traced before runs on
    as it is. A `BlockMask` that you hold keeps its arrays on the host.

    >>> import sparse_attention as sa
    >>> plan = sa.pattern_block_mask("all", 64, 4, 16)
    >>> sa.clear_plans()
    >>> sa.pattern_block_mask("all", 64, 4, 16) is plan
    False
    """
    _kept.clear()
    patterns.clear()


def plan_tensors(ops, block_mask, q, kv_lengths, head_dims, group):
    """kv_lengths as the op reads it, and the `PlanTensors` beside it.

    They are made once for each device, of eager calls as of a graph. In a graph they
    are constants, so that a saved one holds them.

    Args:
      ops: The module with the op.
      block_mask: `BlockMask`.
      q: A tensor. Eager tensors are read where q lies.
      kv_lengths: int32 [batch] tensor; None: an empty tensor takes its place.
      head_dims: head_dim and head_dim_v.
      group: Query heads that share a kv head.
    """
    if tf.executing_eagerly():
        plans, device = kept(block_mask), q.device
        key = device, q.dtype, head_dims, group
        if key not in plans:
            with tf.device(device):
                plans[key] = _make(ops, block_mask, q.dtype, head_dims, group)
        plan = plans[key]
        return plan.no_lengths if kv_lengths is None else kv_lengths, plan
    # The plan goes where the op will be, which an op made here and now can tell: the
    # device that strategies, scopes and device functions give it, or "" where
    # TensorFlow is free to choose.
    if kv_lengths is None:
        kv_lengths = tf.constant([], tf.int32, name="no_kv_lengths")
    else:
        kv_lengths = tf.identity(kv_lengths, name="kv_lengths")
    graph = tf.compat.v1.get_default_graph()
    if not hasattr(graph, "_sparse_attention_plans"):
        graph._sparse_attention_plans = weakref.WeakKeyDictionary()
    plans = graph._sparse_attention_plans.setdefault(block_mask, {})
    key = kv_lengths.device, q.dtype, head_dims, group
    if key not in plans:
        # Outside of loops and branches, as another call may be somewhere else.
        with tf.control_dependencies(None), tf.name_scope("block_mask"):
            plans[key] = _make(ops, block_mask, q.dtype, head_dims, group)
    return kv_lengths, plans[key]


def _make(ops, block_mask, dtype, head_dims, group):
    """`PlanTensors` in the device scope of the caller.

    Tiles are as suits the GPUs that TensorFlow sees; without one, nothing reads the
    plan by keys, and it is empty.
    """
    archs = visible_archs()
    if archs:
        tiles, kv_tiles = abi.plans(
            ops.core, archs, dtype.name, head_dims, block_mask, group
        )
    else:
        tiles, kv_tiles = block_mask.tiles(), _NO_KV_TILES
    arrays = (*tiles[2:], *kv_tiles[2:])
    no_lengths = tf.constant([], tf.int32) if tf.executing_eagerly() else None
    inputs = [tf.constant(_as_bytes(array)) for array in arrays]
    return PlanTensors(tiles.tile_q, kv_tiles.tile_kv, no_lengths, inputs)


_NONE = np.zeros(0, np.int32)
_NO_KV_TILES = KvTiles(0, 0, _NONE, _NONE, _NONE, _NONE, np.zeros(0, np.uint8))


def _as_bytes(array):
    """uint8 [..., 4] of int32, which TensorFlow would keep in host memory."""
    if array.dtype == np.uint8:
        return array
    return array.view(np.uint8).reshape(*array.shape, 4)
