"""Where a plan's tensors live."""

import weakref

import numpy as np
import tensorflow as tf

from ..native import abi
from ..native.cuda.devices import devices
from ..plan.tile_plans import KvTiles

_eager_plans = weakref.WeakKeyDictionary()


def plan_tensors(ops, block_mask, q, head_dims, group):
    """tile_q, tile_kv, and the op's nine plan inputs: made once for a device or a graph.

    In a graph they are constants, so that a saved one holds them. Tiles are as suits the
    GPUs that TensorFlow sees; where there are none the plan by keys is empty.
    """
    if tf.executing_eagerly():
        plans, owner, device = _eager_plans.setdefault(block_mask, {}), None, q.device
    else:
        graph = tf.compat.v1.get_default_graph()
        if not hasattr(graph, "_sparse_attention_plans"):
            graph._sparse_attention_plans = {}
        plans, owner, device = graph._sparse_attention_plans, block_mask, ""
    key = owner, device, q.dtype, head_dims, group
    if key not in plans:
        archs = {arch for _, arch in devices()}
        if archs and tf.config.experimental.get_visible_devices("GPU"):
            tiles, kv_tiles = abi.plans(
                ops.core, archs, q.dtype.name, head_dims, block_mask, group
            )
        else:
            tiles, kv_tiles = block_mask.tiles(), _NO_KV_TILES
        # Outside of loops and branches: another call may be somewhere else.
        with tf.control_dependencies(None), tf.name_scope("block_mask"):
            with tf.device(device):
                tensors = [
                    tf.constant(_as_bytes(array))
                    for array in (*tiles[2:], *kv_tiles[2:])
                ]
        plans[key] = tiles.tile_q, kv_tiles.tile_kv, tensors
    return plans[key]


_NONE = np.zeros(0, np.int32)
_NO_KV_TILES = KvTiles(0, 0, _NONE, _NONE, _NONE, _NONE, np.zeros(0, np.uint8))


def _as_bytes(array):
    """uint8 [..., 4] of int32, as TensorFlow would keep that in host memory."""
    if array.dtype == np.uint8:
        return array
    return array.view(np.uint8).reshape(*array.shape, 4)
