"""What the attention op and its gradient share: their inputs and their attributes.

`csrc/tf/attention_op.cc` lists the same for C++; a test compares the two.
"""

from typing import Any

TensorLike = Any  # a tf.Tensor, a tf.Variable or an array

# The inputs that follow q, k and v, and that the gradient takes over as they are.
SHARED_INPUTS = (
    "kv_lengths",
    # The plan by queries, which is `Tiles`.
    "kv_indptr",
    "kv_indices",
    "mask_ids",
    "mask_bits",
    # The plan by keys, which is `KvTiles`.
    "tile_blocks",
    "q_indptr",
    "q_indices",
    "kv_mask_ids",
    "kv_mask_bits",
)

# The inputs after those, of which an op has those that its attribute `rule` names.
RULE_INPUTS = (
    "alibi_slopes",
    "relative_bias",
    "q_segments",
    "kv_segments",
    "mask",
    "dropout_seed",
)

# Saved graphs hold these names, so they stay.
ATTRIBUTES = (
    "heads",
    "kv_heads",
    "softmax_scale",
    "row_stride",
    "block_q",
    "block_kv",
    "tile_kv",
)
RULE_ATTRIBUTES = ("logit_softcap", "dropout_rate", "q_offset", "rule")
# What the plan is made for, where it is longer than its tensors; otherwise 0.
LENGTH_ATTRIBUTES = ("plan_q_len", "plan_kv_len")
