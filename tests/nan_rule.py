"""The rule of NaN and Inf, for every path that computes attention.

What a row of q, k, v or do holds reaches the results that depend on it and no others. A
query depends on itself and on the keys that it may attend to; the gradients of a key
depend on the queries that may attend to it, and on the keys that those may attend to.
Nothing else changes by a bit. Where dense attention gives NaN, so does ours.
"""

import numpy as np

VALUES = (np.nan, np.inf, 1e4)
INPUTS = ("q", "k", "v", "do")
# The results that are NaN in all of a row where the input's row is NaN.
REACHED = {
    "q": {"o", "lse", "dq", "dk", "dv"},
    "k": {"o", "lse", "dq", "dk", "dv"},
    "v": {"o", "dq", "dk"},
    "do": {"dq", "dk", "dv"},
}


def row_that_some_see(allowed, name, exists):
    """An index of q or do, or of k or v, that about half of the other side is paired with."""
    share = allowed.mean(axis=(0, 2) if name in ("q", "do") else (0, 1))
    return int(np.argmin(np.abs(share[:exists] - 0.5)))


def assert_keeps_to_the_rule(run, inputs, allowed, name, value, kv_lengths=None):
    """Changes a row of an input and holds the results against the rule.

    Args:
      run: `Inputs` -> {name of a result: array}, as `assert_attention_close` has them.
      inputs: `Inputs`.
      allowed: bool [heads or 1, q_len, kv_len].
      name: Of the input, one of INPUTS.
      value: What the row comes to hold.
      kv_lengths: int for each sequence, or None.
    """
    batch, _, heads, _ = inputs.q.shape
    kv_len, kv_heads = inputs.k.shape[1:3]
    lengths = np.minimum(
        np.full(batch, kv_len) if kv_lengths is None else kv_lengths, kv_len
    )
    exists = np.arange(kv_len) < lengths[:, None, None, None]
    sees = np.broadcast_to(allowed, [heads, *allowed.shape[1:]]) & exists

    is_query = name in ("q", "do")
    row = row_that_some_see(
        allowed, name, allowed.shape[1] if is_query else min(lengths)
    )
    # [batch, heads, q_len], those that depend on the row.
    if is_query:
        queries = np.broadcast_to(np.arange(allowed.shape[1]) == row, sees.shape[:3])
    else:
        queries = sees[..., row]
    keys = (sees & queries[..., None]).any(axis=2)  # [batch, heads, kv_len]
    keys = keys.reshape(batch, kv_heads, -1, kv_len).any(axis=2)
    assert keys.any() and queries.any() and not queries.all()

    changed = getattr(inputs, name).copy()
    changed[:, row] = value
    clean, dirty = run(inputs), run(inputs._replace(**{name: changed}))
    has_keys = sees.any(axis=3)
    for result, after in dirty.items():
        depends = keys if result in ("dk", "dv") else queries
        if (name, result) in {("v", "lse"), ("do", "lse"), ("do", "o")}:
            depends = np.zeros_like(depends)
        if result != "lse":
            depends = depends.transpose(
                0, 2, 1
            )  # as [batch, time, heads, dim] has them
        before = clean[result]
        assert before[~depends].tobytes() == after[~depends].tobytes(), result
        if not np.isnan(value) or result not in REACHED[name]:
            continue
        if result not in ("dk", "dv"):
            depends = depends & (
                has_keys if result == "lse" else has_keys.transpose(0, 2, 1)
            )
        assert np.isnan(after[depends].astype(np.float32)).all(), result
