"""Generation: one token at a time, reading only the keys that the pattern allows."""

from __future__ import annotations

import collections
import time
from typing import Any, Callable

import numpy as np
import tensorflow as tf

from ..compat.attention import split_heads
from ..ops.attention import block_sparse_attention
from ..ops.signature import TensorLike
from ..plan.checks import check_positive
from .model import options_in_use

# What `generate` measures, for each sequence of the batch.
GenerationStatistics = collections.namedtuple(
    "GenerationStatistics",
    [
        "seconds_per_token",  # the median; sampling included
        "bytes_per_token",  # of k and v, gathered from the caches of all layers; the mean
        "dense_bytes_per_token",  # what attention to every earlier position would read
    ],
)

# Traced networks that a model keeps, one for each number of sequences.
KEPT_NETWORKS = 4


class Decoder:
    """Runs a model one position at a time, over a cache of keys and values.

    A step gathers the keys that its query attends to, by `BlockMask.keys_of`, and
    attends to them in TensorFlow's own ops: one query is bound by the bytes that it
    reads, and the fused op, which works on tiles of queries, took twice as long.

    Args:
      model: `SparseTransformer`; its variables are read in every step.
      batch: Number of sequences.

    Attributes:
      bytes_read: Bytes of k and v that the latest step gathered for each sequence.

    Raises:
      ValueError: If the batch is not positive, or the model has an option that a step
        cannot follow yet: alibi, logit_softcap, sinks, relative_positions or rotary.

    Numerics: Scores, softmax and weighted sum in float32; all else in the model's
      dtypes.
    Cost: Memory for 2 * layers * time * kv_heads * head_dim elements a sequence. What
      TensorFlow traces is kept with the model for later decoders of as many sequences.
    """

    def __init__(self, model: Any, batch: int) -> None:
        check_positive(batch=batch)
        options = ", ".join(f"{k}={v!r}" for k, v in options_in_use(model).items())
        if options:
            raise ValueError(
                f"model must have none of its options {options} to be decoded, as a step "
                "cannot follow them yet; run the whole model on each prefix instead"
            )
        self.model, self.batch = model, batch
        if not model.built:
            model.build([batch, model.time])
        self._network = _network_of(model, batch)
        self._caches = [self._cache(block.attention) for block in model.blocks]
        self._step = self._network.traced(self._caches)

    def _cache(self, attention):
        """Variables for k and v, [batch * kv_heads * time, head_dim]."""
        rows = self.batch * attention.kv_heads * self.model.time
        zeros = tf.zeros([rows, attention.head_dim], attention.compute_dtype)
        return [tf.Variable(zeros, trainable=False) for _ in "kv"]

    def prefill(self, tokens: TensorLike) -> None:
        """Fills the cache with the first positions, all at once by the training kernel.

        Args:
          tokens: int [batch, n], n <= time.
        """
        self._network.prefill(tokens, self._caches)

    def step(self, tokens: TensorLike, position: int) -> tf.Tensor:
        """Logits of what follows `position`; earlier positions must be in the cache.

        Args:
          tokens: int [batch], the tokens at `position`.
          position: From 0 to time - 1.

        Returns:
          float32 [batch, vocab_size].
        """
        network = self._network
        keys = [tf.constant(plan.keys_of(position)) for plan in network.plans]
        self.bytes_read = sum(
            keys[plan].shape[1] * _lists(block.attention) * _key_bytes(block.attention)
            for block, plan in zip(self.model.blocks, network.layer_plans)
        )
        tokens = tf.cast(tokens, tf.int32)
        return self._step(tokens, tf.constant(position, tf.int32), keys, self._caches)


def _network_of(model, batch):
    """The `_Network` of a model, the same as before while its variables and plans are.

    A model keeps the latest few: TensorFlow takes longer to trace one than to run many of
    its steps.
    """
    kept = vars(model).setdefault("_decoding_networks", collections.OrderedDict())
    plans = [block.attention.block_mask for block in model.blocks]
    parts = [*model.variables, *plans]
    key = (batch, *map(id, parts))
    network, _ = kept.pop(key, (None, None))
    network = network or _Network(model, batch, plans)
    kept[key] = network, parts  # which keeps their ids from being given to others
    while len(kept) > KEPT_NETWORKS:
        kept.popitem(last=False)
    return network


class _Network:
    """A model around attention to caches of keys and values, which it is given.

    Args:
      plans: The `BlockMask` of each layer.
    """

    def __init__(self, model, batch, plans):
        self.model, self.batch = model, batch
        self.plans = list(dict.fromkeys(plans))
        self.layer_plans = [self.plans.index(plan) for plan in plans]
        self.graph = tf.function(self._step)

    def traced(self, caches):
        """The function (tokens, position, keys, caches) -> logits, traced once."""
        return self.graph.get_concrete_function(
            tf.TensorSpec([self.batch], tf.int32),
            tf.TensorSpec([], tf.int32),
            [tf.TensorSpec([plan.heads, None], tf.int32) for plan in self.plans],
            caches,
        )

    def prefill(self, tokens, caches):
        self._layers(tokens, np.arange(tokens.shape[1]), caches, self._attend_all)

    def _step(self, tokens, position, keys, caches):
        def attend(attention, h, caches, plan):
            return self._attend(attention, h, caches, keys[plan], position)

        x = self._layers(tokens, position, caches, attend)
        return self.model.logits(x)

    def _layers(self, tokens, positions, caches, attend):
        model = self.model
        x = model.token_embedding(tokens) + model.position_embedding(positions)
        for block, cache, plan in zip(model.blocks, caches, self.layer_plans):
            x += attend(block.attention, block.norm_attention(x), cache, plan)
            x += block.feed_forward(block.norm_feed_forward(x))
        return x

    def _attend_all(self, attention, h, caches, plan):
        """[batch, n, width]: attention between the first n positions; stores them."""
        n = h.shape[1]
        q, k, v = (
            tf.pad(project(h), [(0, 0), (0, self.model.time - n), (0, 0)])
            for project in (attention.query, attention.key, attention.value)
        )
        for cache, x in zip(caches, (k, v)):
            cache.assign(tf.reshape(split_heads(x, attention.kv_heads), cache.shape))
        o = block_sparse_attention(
            q, k, v, self.plans[plan], attention.heads, attention.kv_heads
        )
        return attention.output_dense(o[:, :n])

    def _attend(self, attention, h, caches, keys, position):
        """[batch, width]: attention of one position to its keys; stores its own."""
        lists, head_dim = _lists(attention), attention.head_dim
        own_rows = self._first_rows(attention, attention.kv_heads) + position
        # Where a head has fewer keys than others it reads its own, which is masked.
        is_key = keys >= 0
        rows = self._first_rows(attention, lists)[:, :, None]
        rows += tf.where(is_key, keys, position)
        gathered = []
        for cache, project in zip(caches, (attention.key, attention.value)):
            own = tf.reshape(project(h), [self.batch, -1, head_dim])
            cache.scatter_update(tf.IndexedSlices(own, own_rows))
            gathered.append(tf.cast(tf.gather(cache, rows), tf.float32))
        k, v = gathered  # [batch, lists, keys, head_dim]
        q = tf.reshape(attention.query(h), [self.batch, lists, -1, head_dim])
        s = tf.matmul(tf.cast(q, tf.float32), k, transpose_b=True) * head_dim**-0.5
        is_key = is_key[:, None]
        p = tf.nn.softmax(tf.where(is_key, s, s.dtype.min))
        p = tf.where(is_key, p, 0.0)  # no key at all: o = 0
        o = tf.reshape(tf.matmul(p, v), [self.batch, attention.heads * head_dim])
        return attention.output_dense(tf.cast(o, h.dtype))

    def _first_rows(self, attention, lists):
        """int32 [batch, lists]: where the cache of each list's kv head starts."""
        kv_head = np.arange(lists) * attention.kv_heads // lists
        sequence = np.arange(self.batch)[:, None] * attention.kv_heads
        return ((sequence + kv_head) * self.model.time).astype(np.int32)


def _lists(attention):
    """Lists of keys that a sequence reads: one a head if the plan has that many."""
    is_shared = attention.block_mask.heads == 1
    return attention.kv_heads if is_shared else attention.heads


def _key_bytes(attention):
    """Of k and v at one position and head."""
    return 2 * attention.head_dim * tf.as_dtype(attention.compute_dtype).size


def generate(
    model: Any,
    prompt: Any,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    on_token: Callable | None = None,
) -> tuple:
    """Continues prompts, token by token.

    The prompt goes through the training kernel at once; then every new token costs one
    `Decoder.step`.

    >>> import sparse_attention as sa
    >>> model = sa.SparseTransformer(256, time=128, layers=2, width=64, heads=4)
    >>> tokens, statistics = generate(model, [[1, 2, 3]], length=5)
    >>> tokens.shape
    (1, 5)

    Args:
      model: `SparseTransformer`.
      prompt: int [batch, prompt_len], from 0 to vocab_size - 1.
      length: Tokens to generate.
      temperature: Divides the logits; 0: always the likeliest token.
      top_k: Draws from the likeliest `top_k` tokens only; None: from all.
      seed: int; equal seeds give equal tokens. None: never the same.
      on_token: Called with each step's tokens, int32 [batch].

    Returns:
      tokens: int32 [batch, length].
      statistics: `GenerationStatistics`.

    Raises:
      TypeError: If the prompt holds no integers.
      ValueError: If an argument is not in its range, prompt and continuation are longer
        than the model's time, or the model has an option that `Decoder` cannot follow.
    """
    prompt = _check_prompt(model, prompt)
    check_positive(length=length)
    if top_k is not None:
        check_positive(top_k=top_k)
    if not 0 <= temperature < np.inf:
        raise ValueError(f"temperature must be finite and >= 0, got {temperature!r}")
    batch, prompt_len = prompt.shape
    if prompt_len + length > model.time:
        raise ValueError(
            f"prompt and length must be at most time={model.time} together, "
            f"got {prompt_len} + {length}"
        )
    decoder, random = Decoder(model, batch), np.random.RandomState(seed)
    if prompt_len > 1:
        decoder.prefill(prompt[:, :-1])
    tokens, seconds, bytes_read = [prompt[:, -1]], [], []
    for position in range(prompt_len - 1, prompt_len - 1 + length):
        start = time.perf_counter()
        logits = decoder.step(tokens[-1], position).numpy()
        tokens.append(_sample(logits, temperature, top_k, random))
        seconds.append(time.perf_counter() - start)
        bytes_read.append(decoder.bytes_read)
        if on_token is not None:
            on_token(tokens[-1])
    dense_bytes = (prompt_len + (length - 1) / 2) * sum(
        block.attention.kv_heads * _key_bytes(block.attention) for block in model.blocks
    )
    statistics = GenerationStatistics(
        float(np.median(seconds)), float(np.mean(bytes_read)), dense_bytes
    )
    return np.stack(tokens[1:], axis=1), statistics


def _check_prompt(model, prompt):
    prompt = np.asarray(prompt)
    if prompt.ndim != 2 or not prompt.size:
        raise ValueError(
            "prompt must be [batch, prompt_len], neither of them zero, "
            f"got shape {prompt.shape}"
        )
    if prompt.dtype.kind not in "iu":
        raise TypeError(f"prompt must hold integers, got {prompt.dtype.name}")
    if prompt.min() < 0 or prompt.max() >= model.vocab_size:
        raise ValueError(
            f"prompt must be in [0, vocab_size={model.vocab_size}), "
            f"got {prompt.min()} to {prompt.max()}"
        )
    return prompt.astype(np.int32)


def _sample(logits, temperature, top_k, random):
    """int32 [batch], drawn from the softmax of [batch, vocab_size] logits.

    Raises:
      ValueError: If a logit is NaN: there is no likeliest token then.
    """
    if np.isnan(logits).any():
        raise ValueError(
            "the model's logits must be numbers to draw a token from, got NaN; were its "
            "weights trained to NaN?"
        )
    if temperature > 0:
        logits = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        if top_k is not None:
            others = np.argsort(-logits, axis=1, kind="stable")[:, top_k:]
            np.put_along_axis(logits, others, -np.inf, axis=1)
        logits = logits / temperature + random.gumbel(size=logits.shape)
    return np.argmax(logits, axis=1).astype(np.int32)
