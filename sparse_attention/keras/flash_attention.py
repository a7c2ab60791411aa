"""One line that gives every Keras model on TensorFlow the fused op.

All attention of Keras 3 goes through one function of its backend, and that of KerasHub
would, if KerasHub did not ask first whether there is a fused op. While flash attention is
on, these functions are ours; each call is the fused op's if that can take it, and else
Keras's own. `fused_arguments` decides.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import importlib
import inspect
import sys
import threading
from typing import Any, Iterator, NamedTuple

import tensorflow as tf

from ..native import cache, loader
from ..ops import portable, xla
from ..ops.attention import (
    DTYPES,
    MAX_HEAD_DIM,
    block_sparse_attention,
    not_converted,
)
from ..ops.plan_tensors import kept
from ..plan.block_mask import BlockMask
from ..plan.layouts import dense_layout
from ..plan.masks import causal_mask
from .backend import IS_KERAS_3, VERSION
from .registration import HUB_MODULE

# How many calls each path has taken: "fused" or "keras". A call of a graph counts once,
# when the graph is made.
_calls: collections.Counter = collections.Counter()

BLOCK_SIZE = 64  # of plans that compute everything, or all that is causal
KEPT_PLANS = 32


# ---- one call ----


class Fused(NamedTuple):
    """How `block_sparse_attention` takes a call of [batch, time, heads, dim] tensors."""

    dtype: Any  # to which q, k and v are cast
    arguments: dict  # what it is given beside q, k and v


def fused_arguments(
    q,
    k,
    v,
    *,
    scale=None,
    is_causal=False,
    bias=None,
    mask=None,
    soft_cap=None,
    dropout=0.0,
    draw_seed=None,
    block_mask=None,
):
    """Whether the fused op can take a call, and with which arguments.

    This is the one place that knows.

    Args:
      q: Tensor [batch, q_len, heads, head_dim].
      k: Tensor [batch, kv_len, kv_heads, head_dim].
      v: Tensor [batch, kv_len, kv_heads, head_dim_v].
      scale: Multiplies the scores, a number or a tensor; None: 1 / sqrt(head_dim).
      is_causal: Whether query i attends to keys up to i alone.
      bias: Is added to the scores; None: nothing is.
      mask: bool, broadcastable to [batch, heads, q_len, kv_len]; None: all True.
      soft_cap: c of c * tanh(scores / c); None: there is none.
      dropout: The rate at which weights are dropped in this call.
      draw_seed: Function that gives a seed for that, int [2]; it is called once if the
        fused op takes the call.
      block_mask: `BlockMask` that says what is computed; None: everything, or what
        `is_causal` allows.

    Returns:
      `Fused` and None, or None and what is in the way, a str.
    """
    if bias is not None:
        return None, "the fused op takes no bias"
    rule = {}
    if mask is not None:
        rule["mask"] = tf.cast(mask, tf.bool)
    if soft_cap is not None:
        rule["logit_softcap"] = soft_cap
    if dropout:
        if draw_seed is None or dropout >= 1:
            return None, f"a dropout rate of {dropout}"
        rule["dropout_rate"] = dropout
    if any(len(x.shape) != 4 for x in (q, k, v)):
        return None, "a tensor does not have rank 4"
    _, q_len, heads, dim = q.shape
    _, kv_len, kv_heads, k_dim = k.shape
    _, v_len, v_heads, v_dim = v.shape
    sizes = q_len, heads, dim, kv_len, kv_heads, k_dim, v_len, v_heads, v_dim
    if None in sizes:
        return None, "a time, a number of heads or a head dim is not known in advance"
    if 0 in sizes or (kv_len, kv_heads, dim) != (v_len, v_heads, k_dim):
        return None, "the tensors do not fit each other"
    if heads % kv_heads:
        return None, f"{kv_heads} key heads do not divide {heads} heads"
    if max(dim, v_dim) > MAX_HEAD_DIM:
        return None, f"a head dim is above {MAX_HEAD_DIM}"
    dtype = _common_dtype(q, k, v)
    if dtype not in DTYPES:
        return None, f"the dtype is {dtype.name}"
    if block_mask is None:
        why_not = _why_no_kernels()
        if why_not is not None:
            return None, why_not
        block_mask = _plan(q_len, kv_len, bool(is_causal))
    if dropout:
        rule["dropout_seed"] = draw_seed()
    arguments = {
        "block_mask": block_mask,
        "heads": heads,
        "kv_heads": kv_heads,
        "softmax_scale": dim**-0.5 if scale is None else _number(scale),
        **rule,
    }
    return Fused(dtype, arguments), None


def _why_no_kernels():
    """str: why Keras's path is the better one for dense attention; None: it is not."""
    if portable.is_on():
        return "the graph is to be portable"
    if loader.attention_ops() is None:
        return loader.why_not("attention_ops")
    return xla.why_not()


def _common_dtype(*tensors):
    """The dtype in which Keras would multiply them."""
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) == 1:
        return dtypes.pop()
    result_type = importlib.import_module("keras").backend.result_type
    return tf.as_dtype(result_type(*(dtype.name for dtype in dtypes)))


def _number(scale):
    """float, or the tensor where only a run of the graph can tell, or a tape watches."""
    is_tensor = tf.is_tensor(scale)
    return tf.cast(scale, tf.float32) if is_tensor else float(scale)


def _plan(q_len, kv_len, is_causal):
    """`BlockMask` of dense attention, kept for the last lengths."""
    plans, key = kept(_plan), (q_len, kv_len, is_causal)
    if key not in plans:
        layout = dense_layout(q_len, BLOCK_SIZE, kv_len)
        mask = causal_mask() if is_causal else None
        plans[key] = BlockMask(layout, mask, BLOCK_SIZE, q_len, kv_len)
        for oldest in list(plans)[:-KEPT_PLANS]:
            plans.pop(oldest, None)
    return plans[key]


def run_fused(q, k, v, fused):
    """The output of `block_sparse_attention`, [batch, q_len, heads, head_dim_v]."""
    _calls["fused"] += 1
    dim = v.shape[3]
    q, k, v = (_merge_heads(tf.cast(x, fused.dtype)) for x in (q, k, v))
    o = block_sparse_attention(q, k, v, **fused.arguments)
    heads = fused.arguments["heads"]
    o = tf.reshape(o, [-1, o.shape[1], heads, o.shape[2] // heads])
    return o if o.shape[3] == dim else o[..., :dim]


def _merge_heads(x):
    """[batch, time, heads, dim] -> [batch, time, heads * the next multiple of 8]"""
    _, time, heads, dim = x.shape
    if dim % 8:  # zeros change no product, and give columns of the output that are cut
        x = tf.pad(x, [[0, 0], [0, 0], [0, 0], [0, -dim % 8]])
    return tf.reshape(x, [-1, time, heads * x.shape[3]])


def draw_seed(layer):
    """The next seed of a layer of Keras's, which its own dropout would have drawn."""
    return layer._dropout_layer.seed_generator.next()


def with_heads(mask):
    """Keras's mask [batch, q_len, kv_len] as [batch, 1, q_len, kv_len]; or None."""
    while mask is not None and len(mask.shape) < 4:
        mask = tf.expand_dims(mask, -3)
    return mask


def say_keras(q, k, why_not):
    """Counts a call that Keras's own path takes, and says why if the user asked."""
    _calls["keras"] += 1
    cache.say(
        f"attention of {q.dtype.name} {q.shape} to {k.shape} runs by Keras: {why_not}"
    )


# ---- what is exchanged in Keras ----


def _dot_product_attention(
    original,
    query,
    key,
    value,
    bias=None,
    mask=None,
    scale=None,
    is_causal=False,
    flash_attention=None,
    attn_logits_soft_cap=None,
    **others,
):
    """Keras's function on TensorFlow: the fused op where it can, or `original`."""
    if not is_on():
        why_not = "flash attention is off"
    elif flash_attention is False:
        why_not = "the call says flash_attention=False"
    elif others:
        why_not = f"the fused op does not know {', '.join(others)}"
    else:
        why_not = None
    if why_not is None:
        q, k, v = (tf.convert_to_tensor(x) for x in (query, key, value))
        fused, why_not = fused_arguments(
            *(q, k, v),
            scale=scale,
            is_causal=is_causal,
            bias=bias,
            mask=mask,
            soft_cap=attn_logits_soft_cap,
        )
        if fused is not None:
            return run_fused(q, k, v, fused)
        if flash_attention:
            raise ValueError(
                "flash_attention=True cannot be had for this call, as "
                f"{why_not}; None lets Keras's own path take it"
            )
        say_keras(q, k, why_not)
    return original(
        *(query, key, value),
        bias=bias,
        mask=mask,
        scale=scale,
        is_causal=is_causal,
        flash_attention=flash_attention,
        attn_logits_soft_cap=attn_logits_soft_cap,
        **others,
    )


def _compute_attention(original, layer, *args, **kwargs):
    """That of Keras's layers, which write attention out where they have a dropout rate."""
    call = inspect.signature(original).bind(layer, *args, **kwargs).arguments
    q, k, v = (call[name] for name in ("query", "key", "value"))
    wants_scores = call.get("return_attention_scores") or getattr(
        layer, "_return_attention_scores", False
    )
    is_written_out = layer.dropout > 0 or wants_scores or len(q.shape) != 4
    if is_on() and is_written_out and layer._flash_attention is not False:
        # None is what Keras hands on where nobody says that the model is in training.
        is_inference = "training" in call and call["training"] in (None, False)
        fused, why_not = None, "attention scores are asked for"
        if not wants_scores:
            fused, why_not = fused_arguments(
                *(q, k, v),
                is_causal=call.get("use_causal_mask", False),
                mask=with_heads(call.get("attention_mask")),
                dropout=0.0 if is_inference else layer.dropout,
                draw_seed=lambda: draw_seed(layer),
            )
        if fused is not None:
            return run_fused(q, k, v, fused), None
        say_keras(q, k, why_not)
    return original(layer, *args, **kwargs)


def _fused_attention_op_available(original):
    """KerasHub's question, which it answers by the name of the backend."""
    return is_on() or original()


class Hook(NamedTuple):
    """A function of Keras's or KerasHub's, and what takes its place."""

    module: str
    owner: str  # the class in it, or ""
    name: str
    replacement: Any  # is given the original before its own arguments
    parameters: tuple  # which the original must have


_LAYER_PARAMETERS = ("self", "query", "key", "value", "attention_mask", "training")
_LAYERS = "keras.src.layers.attention."
HOOKS = [
    Hook(
        *("keras.src.backend.tensorflow.nn", "", "dot_product_attention"),
        _dot_product_attention,
        (
            *("query", "key", "value", "bias", "mask", "scale", "is_causal"),
            *("flash_attention", "attn_logits_soft_cap"),
        ),
    ),
    Hook(
        *(_LAYERS + "multi_head_attention", "MultiHeadAttention", "_compute_attention"),
        _compute_attention,
        (*_LAYER_PARAMETERS, "return_attention_scores"),
    ),
    Hook(
        _LAYERS + "grouped_query_attention",
        *("GroupedQueryAttention", "_compute_attention"),
        _compute_attention,
        _LAYER_PARAMETERS,
    ),
]

# KerasHub's layers call Keras's function where this one says True. All its modules import
# it by name.
HUB_NAME = "fused_attention_op_available"

_lock = threading.RLock()
_is_enabled = False
_open_blocks = 0  # `with flash_attention():` that have not ended, in all threads
_exchanged: list = []  # [(owner, name, original, ours)]


def is_on() -> bool:
    """Whether Keras's attention runs by the fused op where it can."""
    return _is_enabled or _open_blocks > 0


def _owner(hook):
    """The module or class that has a hook's function; an error where there is none."""
    where = ".".join(filter(None, (hook.module, hook.owner, hook.name)))
    try:
        owner: Any = importlib.import_module(hook.module)
        owner = getattr(owner, hook.owner) if hook.owner else owner
        parameters = inspect.signature(getattr(owner, hook.name)).parameters
    except (ImportError, AttributeError) as error:
        raise _no_hook(f"it has no {where}") from error
    missing = [name for name in hook.parameters if name not in parameters]
    if missing:
        raise _no_hook(f"{where} has no argument {', '.join(missing)}")
    return owner


def _no_hook(what):
    return RuntimeError(
        f"flash attention cannot be switched on in Keras {VERSION}: {what}. "
        "sparse_attention supports Keras 3.10 to 3.15; sa.MultiHeadAttention and "
        "sa.SparseSelfAttention do without this switch"
    )


def _exchange(owner, name, replacement):
    original = getattr(owner, name)

    @not_converted
    @functools.wraps(original)
    def ours(*args, **kwargs):
        return replacement(original, *args, **kwargs)

    setattr(owner, name, ours)
    _exchanged.append((owner, name, original, ours))


def _update():
    """Puts our functions in place, or the originals, as `is_on` says."""
    if is_on() and not _exchanged:
        owners = [_owner(hook) for hook in HOOKS]  # all, before anything is changed
        for owner, hook in zip(owners, HOOKS):
            _exchange(owner, hook.name, hook.replacement)
        exchange_in_hub()
    elif not is_on():
        while _exchanged:
            owner, name, original, ours = _exchanged.pop()
            # Somebody may have put a function around ours, which then calls `original`.
            if getattr(owner, name) is ours:
                setattr(owner, name, original)
        _restore_in_hub()


def exchange_in_hub() -> None:
    """Has KerasHub, as far as it is imported, ask us whether there is a fused op."""
    with _lock:
        utils = sys.modules.get(HUB_MODULE)
        if not is_on() or not hasattr(utils, HUB_NAME):
            return
        original = getattr(utils, HUB_NAME)
        if not hasattr(original, "is_sparse_attentions"):
            ours: Any = functools.wraps(original)(
                lambda: _fused_attention_op_available(original)
            )
            ours.is_sparse_attentions = True
            _set_in_hub(original, ours)


def _restore_in_hub():
    ours: Any = getattr(sys.modules.get(HUB_MODULE), HUB_NAME, None)
    if hasattr(ours, "is_sparse_attentions"):
        _set_in_hub(ours, ours.__wrapped__)


def _set_in_hub(old, new):
    for name, module in list(sys.modules.items()):
        is_hub = name.startswith("keras_hub.src.") and module is not None
        if is_hub and vars(module).get(HUB_NAME) is old:
            setattr(module, HUB_NAME, new)


def _check_keras():
    version = tuple(int(part) for part in VERSION.split(".")[:2] if part.isdigit())
    if not IS_KERAS_3 or version < (3, 10):
        raise ImportError(
            "flash attention needs Keras 3.10 or newer on TensorFlow 2.16 or newer, "
            f"got Keras {VERSION}; `pip install -U keras`, and leave the environment "
            "variable TF_USE_LEGACY_KERAS unset"
        )


# ---- for users ----


def enable_flash_attention() -> None:
    """Runs the attention of every Keras model by the fused op, from now on.

        import sparse_attention as sa

        sa.enable_flash_attention()
        model = keras_hub.models.GPT2Backbone(...)  # or your own, of Keras's layers

    `keras.ops.dot_product_attention`, `keras.layers.MultiHeadAttention` and
    `GroupQueryAttention`, and models made of them, then run it in training and inference,
    compiled by XLA or not, wherever it gives the same numbers: for float32, float16 and
    bfloat16, head dims up to 256, grouped heads, causal or not, lengths that are known
    when the graph is made, masks and dropout. Other calls take Keras's own path: with a
    bias, and with attention scores as a result. `SPARSE_ATTENTION_VERBOSE=1` says which
    and why. An argument or attribute `flash_attention=False` is respected.

    Two things differ. Weights are dropped at Keras's rate, but not the same ones. A query
    that a mask allows no key gets zeros, and from Keras the mean of all values.

    It holds for the process and all of its threads. A graph that Keras or `tf.function`
    has made before stays as it is, so call this before the first `fit` or `predict`, or
    compile the model again.

    Raises:
      ImportError: If Keras is older than 3.10, or runs on another backend.
      RuntimeError: If this Keras has not the private functions that are exchanged:
        `dot_product_attention` of `keras.src.backend.tensorflow.nn`, and
        `_compute_attention` of the two layers, whose attributes `_flash_attention` and
        `_dropout_layer` are read, too, and `_return_attention_scores` of the second.
        Of KerasHub it is `fused_attention_op_available` in
        `keras_hub.src.utils.keras_utils`; without it, KerasHub's layers that ask for it
        keep their own path.

    Numerics: As `block_sparse_attention`, with an error like that of Keras's path.
    """
    global _is_enabled
    _check_keras()
    with _lock:
        _is_enabled = True
        try:
            _update()
        except BaseException:
            _is_enabled = False
            raise


def disable_flash_attention() -> None:
    """Undoes `enable_flash_attention`: Keras's functions are again its own.

    Blocks of `with flash_attention():` that are still open go on until they end.
    """
    global _is_enabled
    with _lock:
        _is_enabled = False
        _update()


@contextlib.contextmanager
def flash_attention() -> Iterator[None]:
    """Runs Keras's attention by the fused op inside of a `with` block.

        with sa.flash_attention():
            model.fit(x, y)

    It does what `enable_flash_attention` does, as long as one such block is open in any
    thread: threads that Keras and TensorFlow start in it see it, too. Graphs that are
    made inside keep the fused op when they run later.

    Raises:
      ImportError, RuntimeError: As `enable_flash_attention`.
    """
    _count_block(1)
    try:
        yield
    finally:
        _count_block(-1)


def _count_block(step):
    global _open_blocks
    _check_keras()
    with _lock:
        _open_blocks += step
        try:
            _update()
        except BaseException:
            _open_blocks -= step
            raise
