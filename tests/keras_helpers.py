"""What the tests of layer and model share: oracles, and a model around the layer."""

import numpy as np
from helpers import plain_attention_bwd, plain_attention_fwd, to_dtype
from tensorflow import keras

from sparse_attention.plan.reference import attention_bwd, attention_fwd


def functional(layer, time, width):
    """A model of nothing but the layer, whose weights all have values that matter."""
    x = keras.Input([time, width])
    model = keras.Model(x, layer(x))
    layer.set_weights(
        [
            normal(*w.shape, seed=seed) / np.float32(w.shape[0] ** 0.5)
            for seed, w in enumerate(layer.get_weights())
        ]
    )
    return model


def normal(*shape, seed=0):
    print("seed", seed)
    return np.random.RandomState(seed).normal(size=shape).astype(np.float32)


def layer_by_hand(layer, x, target, dtype, kv_lengths=None):
    """What the layer gives, and its weights' gradients of the mean squared error.

    Args:
      layer: A built `SparseSelfAttention`, with biases.
      dtype: "float64": the oracle. Another: plain code, every result rounded to it.

    Returns:
      list of arrays: the output, then for each projection the gradients of its kernel
      and, as one more row, of its bias. (The key's bias alone has none but rounding.)
    """
    is_oracle = dtype == "float64"
    fwd, bwd = (
        (attention_fwd, attention_bwd)
        if is_oracle
        else (plain_attention_fwd, plain_attention_bwd)
    )

    def narrow(array):
        return np.float64(array) if is_oracle else to_dtype(array, dtype)

    def rounded(array):
        return narrow(array).astype(np.float64 if is_oracle else np.float32)

    batch, time, _ = x.shape
    x, target = rounded(x), rounded(target)
    *qkv_weights, w_out, b_out = (rounded(w) for w in layer.get_weights())
    options = {"mask": layer.block_mask.to_dense(), "kv_lengths": kv_lengths}
    qkv = [
        narrow(rounded(x @ w) + b).reshape(batch, time, -1, layer.head_dim)
        for w, b in zip(qkv_weights[::2], qkv_weights[1::2])
    ]
    o = rounded(fwd(*qkv, **options)[0]).reshape(batch, time, -1)
    y = rounded(rounded(o @ w_out) + b_out)
    dy = rounded(2 * (y - target) / y.size)
    do = narrow(dy @ w_out.T).reshape(qkv[0].shape)
    gradients = []
    for read, d in [*((x, d) for d in bwd(*qkv, do=do, **options)), (o, dy)]:
        read = read.reshape(batch * time, -1)
        read = np.concatenate([read, np.ones_like(read[:, :1])], axis=1)
        gradients.append(read.T @ rounded(d).reshape(batch * time, -1))
    return [narrow(y), *map(narrow, gradients)]


def model_by_hand(model, x, dtype, attention):
    """Logits of a `SparseTransformer`: the paper's section 5, written out.

    Args:
      x: int [batch, time], the tokens.
      dtype: np.float64: the oracle. np.float32: plain code.
      attention: `attention_fwd` or `plain_attention_fwd`.
    """

    def dense(layer, x):
        w, b = (w.astype(dtype) for w in layer.get_weights())
        return x @ w + b

    def norm(layer, x):
        gamma, beta = (w.astype(dtype) for w in layer.get_weights())
        x = x - x.mean(axis=-1, keepdims=True)
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * gamma + beta

    embedding = model.token_embedding.get_weights()[0].astype(dtype)
    x = embedding[x] + model.position_embedding.get_weights()[0].astype(dtype)
    for block in model.blocks:
        h, layer = norm(block.norm_attention, x), block.attention
        qkv = [
            dense(projection, h).reshape(*x.shape[:2], -1, layer.head_dim)
            for projection in (layer.query, layer.key, layer.value)
        ]
        o = attention(*qkv, layer.block_mask.to_dense())[0].reshape(x.shape)
        x = x + dense(layer.output_dense, o)
        h = dense(block.expand, norm(block.norm_feed_forward, x))
        x = x + dense(block.contract, h / (1 + np.exp(dtype(-1.702) * h)))
    return norm(model.final_norm, x) @ embedding.T
