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


PROJECTIONS = ("query", "key", "value", "output_dense")


def weights_of(layer):
    """list of arrays: of each projection the kernel and, as one more row, the bias; then
    what is added to scores, as `attention_bwd` orders it."""
    pairs = (getattr(layer, name).get_weights() for name in PROJECTIONS)
    arrays = [np.concatenate([kernel, bias[None]]) for kernel, bias in pairs]
    names = [w.name.split("/")[-1].split(":")[0] for w in layer.weights]
    found = dict(zip(names, layer.get_weights()))
    return arrays + [found[n] for n in ("relative_bias", "sinks") if n in found]


def gradients_by_fit(model, layer, x, target):
    """The gradients of the mean squared error, by a step of `fit`, as `weights_of`."""
    before = weights_of(layer)
    rate = 2.0**16  # so high that the weights before a step hide nothing of it
    model.compile(keras.optimizers.SGD(rate), "mse")
    model.fit(x, target, batch_size=len(target), shuffle=False, verbose=0)
    return [(a - b) / np.float32(rate) for a, b in zip(before, weights_of(layer))]


def layer_by_hand(layer, x, target, dtype, kv_lengths=None, rotary=None, **rule):
    """What the layer gives, and its weights' gradients of the mean squared error.

    Args:
      layer: A built `SparseSelfAttention`, with biases.
      dtype: "float64": the oracle. Another: plain code, every result rounded to it.
      rotary: The base; None: nothing is turned.
      rule: `mask`, which the plan is combined with, and arguments of `reference.Rule`.

    Returns:
      list of arrays: the output, then the gradients in the order of `weights_of`, the
      plain ones of the latter as pairs with the sums of sizes. (The key's bias has none
      but rounding.)
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

    def turned(array, sign=1):
        return array if rotary is None else narrow(turn(rounded(array), rotary, sign))

    batch, time, _ = x.shape
    x, target = rounded(x), rounded(target)
    *qkv_weights, last = (rounded(w) for w in weights_of(layer)[:4])
    mask = layer.block_mask.to_dense() & rule.pop("mask", True)
    options = {"mask": mask, "kv_lengths": kv_lengths, **rule}
    q, k, v = (
        narrow(rounded(x @ w[:-1]) + w[-1]).reshape(batch, time, -1, layer.head_dim)
        for w in qkv_weights
    )
    qkv = turned(q), turned(k), v
    o = rounded(fwd(*qkv, **options)[0]).reshape(batch, time, -1)
    y = rounded(rounded(o @ last[:-1]) + last[-1])
    dy = rounded(2 * (y - target) / y.size)
    do = narrow(dy @ last[:-1].T).reshape(qkv[0].shape)
    dq, dk, dv, *others = bwd(*qkv, do=do, **options)
    gradients = []
    for read, d in [(x, turned(dq, -1)), (x, turned(dk, -1)), (x, dv), (o, dy)]:
        read = read.reshape(batch * time, -1)
        read = np.concatenate([read, np.ones_like(read[:, :1])], axis=1)
        gradients.append(read.T @ rounded(d).reshape(batch * time, -1))
    return [narrow(y), *map(narrow, gradients), *others]


def turn(x, base, sign=1):
    """x [batch, time, heads, head_dim] by its positions: halves as complex numbers."""
    half = x.shape[3] // 2
    angles = np.outer(np.arange(x.shape[1]), base ** (-np.arange(half) / half))
    z = x[..., :half] + 1j * x[..., half:]
    z = z * np.exp(sign * 1j * angles)[:, None].astype(z.dtype)
    return np.concatenate([z.real, z.imag], axis=3)


def model_by_hand(model, x, dtype, attention, rotary=None, **rule):
    """Logits of a `SparseTransformer`: the paper's section 5, written out.

    Args:
      x: int [batch, time], the tokens.
      dtype: np.float64: the oracle. np.float32: plain code.
      attention: `attention_fwd` or `plain_attention_fwd`.
      rotary: The base; None: nothing is turned.
      rule: Arguments of `reference.Rule`, besides what the layers train.
    """

    def dense(layer, x):
        w, b = (w.astype(dtype) for w in layer.get_weights())
        return x @ w + b

    def norm(layer, x):
        gamma, beta = (w.astype(dtype) for w in layer.get_weights())
        x = x - x.mean(axis=-1, keepdims=True)
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * gamma + beta

    embedding = model.token_embedding.get_weights()[0].astype(dtype)
    tables = [w.astype(dtype) for w in model.position_embedding.get_weights()]
    places = np.unravel_index(np.arange(x.shape[1]), [len(w) for w in tables])
    x = embedding[x] + sum(w[places_of] for w, places_of in zip(tables, places))
    for block in model.blocks:
        h, layer = norm(block.norm_attention, x), block.attention
        qkv = [
            dense(projection, h).reshape(*x.shape[:2], -1, layer.head_dim)
            for projection in (layer.query, layer.key, layer.value)
        ]
        if rotary is not None:
            qkv = [turn(qkv[0], rotary), turn(qkv[1], rotary), qkv[2]]
        trained = {
            name: weight.numpy()
            for weight in layer.weights
            for name in ("sinks", "relative_bias")
            if weight.name == name
        }
        options = {**rule, **trained}
        o = attention(*qkv, layer.block_mask.to_dense(), **options)[0]
        o = o.reshape(x.shape)
        x = x + dense(layer.output_dense, o)
        h = dense(block.expand, norm(block.norm_feed_forward, x))
        x = x + dense(block.contract, h / (1 + np.exp(dtype(-1.702) * h)))
    return norm(model.final_norm, x) @ embedding.T
