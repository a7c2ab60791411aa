"""Generation: one token at a time, reading only the keys that the pattern allows."""

from __future__ import annotations

import collections
import time
from operator import is_
from typing import Any, Callable

import numpy as np
import tensorflow as tf

from ..compat.attention import split_heads
from ..ops.attention import block_sparse_attention
from ..ops.one_query import attention_of_one_query
from ..ops.signature import TensorLike
from ..plan.checks import check_integer, check_positive, is_number

# What `generate` measures, for each sequence of the batch, and where each ends.
GenerationStatistics = collections.namedtuple(
    "GenerationStatistics",
    [
        "seconds_per_token",  # the median; sampling included
        "bytes_per_token",  # of k and v, gathered from the caches of all layers; the mean
        "dense_bytes_per_token",  # what attention to every earlier position would read
        "lengths",  # int32 [batch], tokens until `eos_token`, itself included
    ],
)

# Traced networks that a model keeps, one for each number of sequences.
KEPT_NETWORKS = 4

# By how much `top_p` may be missed, because the logits are float32.
TOLERATED_MASS = 1e-6


class Decoder:
    """Runs a model one position at a time, over a cache of keys and values.

    A step gathers the keys that its query attends to, by `BlockMask.keys_of`, and
    attends to them by `attention_of_one_query`.

    A decoder may be kept for many calls of `generate`, which then makes no caches. It
    reads the model's weights in every step, so it sees when they are trained or loaded.

    Args:
      model: `SparseTransformer`; all its layers attend to earlier positions alone.
      batch: Number of sequences.

    Attributes:
      bytes_read: Bytes of k and v that the latest step gathered for each sequence.

    Numerics: Scores, softmax and weighted sum in float32; all else in the model's
      dtypes.
    Cost: Memory for 2 * layers * time * kv_heads * head_dim elements a sequence. What
      TensorFlow traces is kept with the model for later decoders of as many sequences.
    """

    def __init__(self, model: Any, batch: int) -> None:
        check_positive(batch=batch)
        self.model, self.batch = model, batch
        if not model.built:
            model.build([batch, model.time])
        self._network: Any = None
        self._segment_ids: Any = None
        self._follow_the_model()

    def _follow_the_model(self):
        """Makes the caches, and traces a step, once for the model's variables and plans."""
        if self._network is None or not self._network.is_of(self.model):
            self._network = _network_of(self.model, self.batch)
            self._caches = [self._cache(block.attention) for block in self.model.blocks]
            self._step = self._network.traced(self._caches)

    def _cache(self, attention):
        """Variables for k and v, [batch * kv_heads * time, head_dim]."""
        rows = self.batch * attention.kv_heads * self.model.time
        zeros = tf.zeros([rows, attention.head_dim], attention.compute_dtype)
        return [tf.Variable(zeros, trainable=False) for _ in "kv"]

    def prefill(
        self, tokens: TensorLike, segment_ids: TensorLike | None = None
    ) -> None:
        """Fills the cache with the first positions, all at once by the training kernel.

        Sequences that are shorter than others are filled up on the right by any tokens:
        a step writes over what the cache has at its position, before it reads it.

        Args:
          tokens: int [batch, n], n <= time.
          segment_ids: int [batch, time], of these positions and of those to come: a
            position attends to those of its own id alone, and to none if that is
            negative. None: one document, also if there were others before.

        Raises:
          TypeError: If `segment_ids` are no integers.
          ValueError: If a shape does not fit.
        """
        tokens = tf.convert_to_tensor(tokens)
        batch, n = _shape_of(tokens, "tokens", 2)
        if batch != self.batch or n > self.model.time:
            raise ValueError(
                f"tokens must be [batch={self.batch}, at most time={self.model.time}], "
                f"got shape {(batch, n)}"
            )
        if segment_ids is not None:
            segment_ids = _check_segment_ids(segment_ids, self.batch, self.model.time)
        self._segment_ids = segment_ids
        self._follow_the_model()
        if n:
            self._network.prefill(tokens, self._caches, segment_ids)

    def step(self, tokens: TensorLike, position: int | TensorLike) -> tf.Tensor:
        """Logits of what follows `position`; earlier positions must be in the cache.

        Args:
          tokens: int [batch], the tokens at `position`.
          position: From 0 to time - 1, for all sequences, or int [batch], one for each.

        Returns:
          float32 [batch, vocab_size].

        Raises:
          ValueError: If a shape or a position does not fit, or a layer attends to later
            positions.
        """
        network = self._network
        if _shape_of(tokens, "tokens", 1) != (self.batch,):
            raise ValueError(
                f"tokens must be [batch={self.batch}], got shape {np.shape(tokens)}"
            )
        positions = _check_positions(position, self.batch, self.model.time)
        keys = [_keys_of(plan, positions) for plan in network.plans]
        if self._segment_ids is not None:
            keys = [_of_one_segment(x, positions, self._segment_ids) for x in keys]
        self.bytes_read = sum(
            keys[plan].shape[2] * _lists(block.attention) * _key_bytes(block.attention)
            for block, plan in zip(self.model.blocks, network.layer_plans)
        )
        return self._step(
            tf.cast(tokens, tf.int32),
            tf.constant(positions, tf.int32),
            [tf.constant(lists) for lists in keys],
            self._caches,
        )


def _shape_of(x, name, rank):
    shape = tuple(np.shape(x))
    if len(shape) != rank:
        expected = "[batch, n]" if rank == 2 else "[batch]"
        raise ValueError(f"{name} must be {expected}, got shape {shape}")
    return shape


def _check_positions(position, batch, time):
    """int [batch]"""
    positions = np.asarray(position)
    if positions.dtype.kind not in "iu" or positions.shape not in ((), (batch,)):
        raise ValueError(
            f"position must be an integer or int [batch={batch}], got {position!r}"
        )
    if positions.min() < 0 or positions.max() >= time:
        raise ValueError(
            f"position must be from 0 to time - 1 = {time - 1}, got {position!r}"
        )
    return np.broadcast_to(positions, [batch])


def _keys_of(plan, positions):
    """What the sequences read: int32 [batch, heads of the plan, keys].

    It is [1, ...] where all are at one position. What is no key is -1.
    """
    lists = {row: plan.keys_of(row) for row in set(positions.tolist())}
    for row, own in lists.items():
        if own.size and own.max() > row:
            raise ValueError(
                "a model must attend to earlier positions alone to be decoded, got a "
                f"block_mask whose row {row} attends to row {own.max()}"
            )
    rows = positions.tolist() if len(lists) > 1 else list(lists)
    most = max(own.shape[1] for own in lists.values())
    keys = np.full([len(rows), plan.heads, most], -1, np.int32)
    for filled, row in zip(keys, rows):
        filled[:, : lists[row].shape[1]] = lists[row]
    return keys


def _of_one_segment(keys, positions, segment_ids):
    """Of `keys`, as `_keys_of` gives them, those of the segments of their queries."""
    sequences = np.arange(len(positions))[:, None, None]
    own = segment_ids[sequences, positions[:, None, None]]
    is_key = (keys >= 0) & (segment_ids[sequences, keys] == own) & (own >= 0)
    order = np.argsort(~is_key, axis=2, kind="stable")
    order = order[:, :, : is_key.sum(axis=2).max()]
    return np.take_along_axis(np.where(is_key, keys, -1), order, axis=2)


def _check_segment_ids(segment_ids, batch, time):
    """int32 [batch, time]"""
    ids = np.asarray(segment_ids)
    if ids.dtype.kind not in "iu":
        raise TypeError(f"segment_ids must be integers, got {ids.dtype.name}")
    if ids.shape != (batch, time):
        raise ValueError(
            f"segment_ids must be [batch={batch}, time={time}], got shape {ids.shape}"
        )
    return ids.astype(np.int32)


def _network_of(model, batch):
    """The `_Network` of a model, the same as before while its variables and plans are.

    A model keeps the latest few: TensorFlow takes longer to trace one than to run many of
    its steps.
    """
    kept = vars(model).setdefault("_decoding_networks", [])
    fitting = [network for network in kept if network.batch == batch]
    fitting = [network for network in fitting if network.is_of(model)]
    network = fitting[0] if fitting else _Network(model, batch)
    others = [other for other in kept if other is not network]
    kept[:] = [*others, network][-KEPT_NETWORKS:]
    return network


class _Network:
    """A model around attention to caches of keys and values, which it is given."""

    def __init__(self, model, batch):
        self.model, self.batch = model, batch
        self.parts = _parts(model)
        plans = [block.attention.block_mask for block in model.blocks]
        self.plans = list(dict.fromkeys(plans))
        self.layer_plans = [self.plans.index(plan) for plan in plans]
        self.graph = tf.function(self._step)

    def is_of(self, model):
        """Whether the model still has the variables and plans that were traced."""
        parts = _parts(model)
        return len(parts) == len(self.parts) and all(map(is_, parts, self.parts))

    def traced(self, caches):
        """The function (tokens, positions, keys, caches) -> logits, traced once."""
        return self.graph.get_concrete_function(
            tf.TensorSpec([self.batch], tf.int32),
            tf.TensorSpec([self.batch], tf.int32),
            [tf.TensorSpec([None, plan.heads, None], tf.int32) for plan in self.plans],
            caches,
        )

    def prefill(self, tokens, caches, segment_ids):
        rule = {} if segment_ids is None else {"segment_ids": segment_ids}

        def attend(attention, h, caches, plan):
            return self._attend_all(attention, h, caches, plan, rule)

        self._layers(tokens, np.arange(tokens.shape[1]), caches, attend)

    def _step(self, tokens, positions, keys, caches):
        def attend(attention, h, caches, plan):
            return self._attend(attention, h, caches, keys[plan], positions)

        x = self._layers(tokens, positions, caches, attend)
        return self.model.logits(x)

    def _layers(self, tokens, positions, caches, attend):
        model = self.model
        x = model.token_embedding(tokens) + model.position_embedding(positions)
        for block, cache, plan in zip(model.blocks, caches, self.layer_plans):
            x += attend(block.attention, block.norm_attention(x), cache, plan)
            x += block.feed_forward(block.norm_feed_forward(x))
        return x

    def _attend_all(self, attention, h, caches, plan, rule):
        """[batch, n, width]: attention between the first n positions; stores them."""
        n = h.shape[1]
        q, k, v = (
            tf.pad(x, [(0, 0), (0, self.model.time - n), (0, 0)])
            for x in attention.project(h)
        )
        for cache, x in zip(caches, (k, v)):
            cache.assign(tf.reshape(split_heads(x, attention.kv_heads), cache.shape))
        o = block_sparse_attention(
            *(q, k, v, self.plans[plan], attention.heads, attention.kv_heads),
            **attention.score_rule(),
            **rule,
        )
        return attention.output_dense(o[:, :n])

    def _attend(self, attention, h, caches, keys, positions):
        """[batch, width]: attention of one position to its keys; stores its own."""
        # The layer takes the batch for a time, so that it multiplies one matrix.
        q, *own = (x[0] for x in attention.project(h[None], positions[None]))
        own_rows = self._first_rows(attention, attention.kv_heads) + positions[:, None]
        # Where a head has fewer keys than others it reads its own.
        rows = self._first_rows(attention, _lists(attention))[:, :, None]
        rows += tf.where(keys >= 0, keys, positions[:, None, None])
        gathered = []
        for cache, x in zip(caches, own):
            x = tf.reshape(x, [self.batch, attention.kv_heads, attention.head_dim])
            cache.scatter_update(tf.IndexedSlices(x, own_rows))
            gathered.append(tf.gather(cache, rows))
        o = attention_of_one_query(
            *(q, *gathered, positions, keys, attention.heads),
            **attention.score_rule(),
        )
        return attention.output_dense(o)

    def _first_rows(self, attention, lists):
        """int32 [batch, lists]: where the cache of each list's kv head starts."""
        kv_head = np.arange(lists) * attention.kv_heads // lists
        sequence = np.arange(self.batch)[:, None] * attention.kv_heads
        return ((sequence + kv_head) * self.model.time).astype(np.int32)


def _parts(model):
    """What a trace of a model reads: its variables and plans."""
    return [*model.variables, *(block.attention.block_mask for block in model.blocks)]


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
    *,
    top_p: float | None = None,
    eos_token: int | None = None,
    pad_token: int | None = None,
    prompt_lengths: Any = None,
    segment_ids: Any = None,
) -> tuple:
    """Continues prompts, token by token.

    The prompts go through the training kernel at once; then every new token costs one
    `Decoder.step`. Each continuation begins right after its own prompt, so a prompt in a
    batch is continued as it is alone, whatever the lengths of the others.

    >>> import sparse_attention as sa
    >>> model = sa.SparseTransformer(256, time=128, layers=2, width=64, heads=4)
    >>> tokens, statistics = generate(model, [[1, 2, 3], [4]], length=5)
    >>> tokens.shape
    (2, 5)

    Args:
      model: `SparseTransformer`, or a `Decoder` of one, whose caches serve again.
      prompt: int [batch, prompt_len], from 0 to vocab_size - 1; or a list of prompts, or
        a `tf.RaggedTensor`, whose lengths differ. None of them is empty.
      length: The most tokens to generate for each prompt.
      temperature: Divides the logits; 0: always the likeliest token.
      top_k: Draws from the likeliest `top_k` tokens only; None: from all.
      seed: int; equal seeds give equal tokens. None: never the same.
      on_token: Called with each step's tokens, int32 [batch].
      top_p: Draws from the fewest of the likeliest tokens whose probabilities, after
        `temperature` and `top_k`, sum up to at least `top_p`; above 0, at most 1. None:
        from all. (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration",
        arXiv:1904.09751.)
      eos_token: The token after which a sequence ends. When all have ended, so does the
        call. None: all get `length` tokens.
      pad_token: int32, what follows `eos_token`, of the vocabulary or not; None:
        `eos_token`.
      prompt_lengths: int [batch], how many tokens of each row of `prompt` are its prompt;
        what comes after them is ignored. None: all.
      segment_ids: As `prompt`, the id of the document of each token, which attends to no
        other; what is generated belongs to the document of the prompt's last token. None:
        a prompt is one document.

    Returns:
      tokens: int32 [batch, length], without the prompts.
      statistics: `GenerationStatistics`; tokens[i, : statistics.lengths[i]] are those of
        sequence i, its `eos_token` included.

    Raises:
      TypeError: If the prompts, their lengths or their ids are no integers.
      ValueError: If an argument is not in its range or does not fit the others, or prompt
        and continuation are together longer than the model's time and one more.
    """
    decoder = model if isinstance(model, Decoder) else None
    model = model if decoder is None else decoder.model
    prompt, prompt_lengths, segment_ids = _check_prompt(
        model, prompt, prompt_lengths, segment_ids
    )
    check_positive(length=length)
    _check_sampling(temperature, top_k, top_p)
    pad_token = _check_ends(model, eos_token, pad_token)
    batch, longest = prompt.shape
    if longest + length > model.time + 1:  # what is drawn last is not read
        raise ValueError(
            f"prompt and length must be at most time + 1 = {model.time + 1} together, "
            f"got {longest} + {length}"
        )
    if decoder is None:
        decoder = Decoder(model, batch)
    elif decoder.batch != batch:
        raise ValueError(
            f"prompt must have as many rows as the decoder, batch={decoder.batch}, "
            f"got {batch}"
        )
    random = np.random.RandomState(seed)
    decoder.prefill(prompt[:, :-1], segment_ids)
    positions = prompt_lengths - 1
    latest = prompt[np.arange(batch), positions]
    tokens = np.full([batch, length], pad_token, np.int32)
    lengths, goes_on = np.zeros(batch, np.int32), np.ones(batch, bool)
    seconds, bytes_read, positions_read = [], [], []
    while goes_on.any() and len(seconds) < length:
        start = time.perf_counter()
        logits = decoder.step(latest, positions).numpy()
        _check_logits(logits[goes_on])
        # All draw, so that what one draws does not depend on when another ends.
        drawn = _sample(logits, temperature, top_k, top_p, random)
        now = tokens[:, len(seconds)]
        now[goes_on] = drawn[goes_on]
        seconds.append(time.perf_counter() - start)
        bytes_read.append(decoder.bytes_read)
        positions_read.append(positions + 1)
        if on_token is not None:
            on_token(now.copy())
        latest, positions = drawn, positions + 1
        lengths += goes_on
        if eos_token is not None:
            goes_on &= drawn != eos_token
    position_bytes = sum(
        block.attention.kv_heads * _key_bytes(block.attention) for block in model.blocks
    )
    statistics = GenerationStatistics(
        float(np.median(seconds)),
        float(np.mean(bytes_read)),
        float(np.mean(positions_read)) * position_bytes,
        lengths,
    )
    return tokens, statistics


def _check_prompt(model, prompt, prompt_lengths, segment_ids):
    """What `generate` is given, in arrays.

    Returns:
      tokens: int32 [batch, longest], zeros after each prompt.
      prompt_lengths: int [batch].
      segment_ids: int [batch, time], or None.
    """
    rows = _rows_of("prompt", prompt)
    lengths = given = np.array([len(row) for row in rows])
    if prompt_lengths is not None:
        lengths = _check_prompt_lengths(prompt_lengths, given)
    rows = [row[:length] for row, length in zip(rows, lengths)]
    least, most = min(row.min() for row in rows), max(row.max() for row in rows)
    if least < 0 or most >= model.vocab_size:
        raise ValueError(
            f"prompt must be in [0, vocab_size={model.vocab_size}), "
            f"got {least} to {most}"
        )
    if segment_ids is not None:
        ids = _rows_of("segment_ids", segment_ids)
        id_lengths = [len(row) for row in ids]
        if id_lengths != given.tolist():
            raise ValueError(
                "segment_ids must have the lengths of the rows of prompt, "
                f"{given.tolist()}, got {id_lengths}"
            )
        last = [row[length - 1] for row, length in zip(ids, lengths)]
        segment_ids = _filled(ids, lengths, np.tile(last, [model.time, 1]).T)
    return (
        _filled(rows, lengths, np.zeros([len(rows), max(lengths)])),
        lengths,
        segment_ids,
    )


def _rows_of(name, prompt):
    """list of the rows of a prompt, each int [length], none of them empty."""
    if isinstance(prompt, tf.RaggedTensor):
        prompt = prompt.to_list()
    rows = [np.asarray(row) for row in (prompt if np.iterable(prompt) else [prompt])]
    wrong = [row.shape for row in rows if row.ndim != 1 or not row.size]
    if wrong or not rows:
        raise ValueError(
            f"{name} must be [batch, prompt_len] or a list of prompts, none of them empty, "
            + (f"got a row of shape {wrong[0]}" if wrong else "got no row")
        )
    for row in rows:
        if row.dtype.kind not in "iu":
            raise TypeError(f"{name} must hold integers, got {row.dtype.name}")
    return rows


def _filled(rows, lengths, rest):
    """int32, the first `lengths` of each of the rows, and behind it the `rest`."""
    array = np.array(rest, np.int32)
    for own, row, length in zip(array, rows, lengths):
        own[:length] = row[:length]
    return array


def _check_prompt_lengths(prompt_lengths, most):
    lengths = np.asarray(prompt_lengths)
    if lengths.dtype.kind not in "iu":
        raise TypeError(f"prompt_lengths must hold integers, got {lengths.dtype.name}")
    if lengths.shape != most.shape:
        raise ValueError(
            f"prompt_lengths must be [batch={len(most)}], got shape {lengths.shape}"
        )
    if (lengths < 1).any() or (lengths > most).any():
        raise ValueError(
            "prompt_lengths must be from 1 to the lengths of the rows of prompt, "
            f"{most.tolist()}, got {lengths.tolist()}"
        )
    return lengths.astype(most.dtype)


def _check_sampling(temperature, top_k, top_p):
    if not (is_number(temperature) and 0 <= temperature < np.inf):
        raise ValueError(f"temperature must be finite and >= 0, got {temperature!r}")
    if top_k is not None:
        check_positive(top_k=top_k)
    if top_p is not None and not (is_number(top_p) and 0 < top_p <= 1):
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p!r}")


def _check_ends(model, eos_token, pad_token):
    """What to fill up with."""
    if eos_token is not None:
        check_integer(eos_token=eos_token)
        if not 0 <= eos_token < model.vocab_size:
            raise ValueError(
                f"eos_token must be in [0, vocab_size={model.vocab_size}), "
                f"got {eos_token}"
            )
    if pad_token is None:
        return 0 if eos_token is None else eos_token
    check_integer(pad_token=pad_token)
    if not -(2**31) <= pad_token < 2**31:
        raise ValueError(f"pad_token must fit int32, got {pad_token}")
    return pad_token


def _check_logits(logits):
    """Raises ValueError if a logit is NaN: there is no likeliest token then."""
    if np.isnan(logits).any():
        raise ValueError(
            "the model's logits must be numbers to draw a token from, got NaN; were its "
            "weights trained to NaN?"
        )


def _sample(logits, temperature, top_k, top_p, random):
    """int32 [batch], drawn from the softmax of [batch, vocab_size] logits."""
    if temperature > 0:
        logits = _likely(logits, temperature, top_k, top_p)
        logits += random.gumbel(size=logits.shape)
    return np.argmax(logits, axis=1).astype(np.int32)


def _likely(logits, temperature, top_k, top_p):
    """float64 [batch, vocab_size]: logits that sampling reads, -inf for no token of it.

    Of tokens that are equally likely the first come first.
    """
    logits = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    logits /= temperature
    if top_k is None and top_p is None:
        return logits
    order = np.argsort(-logits, axis=1, kind="stable")
    falling = np.take_along_axis(logits, order, axis=1)
    if top_k is not None:
        falling[:, top_k:] = -np.inf
    if top_p is not None:
        p = np.exp(falling)
        p /= p.sum(axis=1, keepdims=True)
        likelier = np.cumsum(p, axis=1) - p
        # A token is out where those before it suffice, as far as float32 logits tell.
        is_out = likelier >= top_p - TOLERATED_MASS
        falling[:, 1:][is_out[:, 1:]] = -np.inf
    np.put_along_axis(logits, order, falling, axis=1)
    return logits
