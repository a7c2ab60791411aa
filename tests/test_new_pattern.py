"""A pattern that is added to the table works everywhere, without another line."""

import importlib
import json
import os

import keras
import numpy as np
import pytest
from helpers import (
    assert_close,
    plain_attention_bwd,
    plain_attention_fwd,
    random_inputs,
    to_dtype,
)
from keras_helpers import functional, layer_by_hand, model_by_hand, normal
from new_patterns import NEW_PATTERNS, build_new, new_rule
from tf_helpers import (
    assert_same_bits,
    attention_on,
    check_attention,
    merged,
    run_with_gradients,
)

import sparse_attention as sa
from sparse_attention.ops.positions import ROTARY_BASE
from sparse_attention.plan.patterns import PATTERNS
from sparse_attention.plan.reference import attention_bwd, attention_fwd

EXAMPLES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "examples")
TIME, HEADS, WINDOW = 64, 4, 24
OPTIONS = {"local_attn_ctx": WINDOW, "block_size": 8}

# The last is the library's own, which no kernel and no other module names.
pytestmark = pytest.mark.parametrize("name", [*NEW_PATTERNS, "merged"])


@pytest.fixture(autouse=True)
def more_patterns(monkeypatch):
    for name, pattern in NEW_PATTERNS.items():
        monkeypatch.setitem(PATTERNS, name, pattern)


def has_pattern(block_mask, name):
    want = new_rule(name, TIME, HEADS, WINDOW)
    return np.array_equal(np.broadcast_to(block_mask.to_dense(), want.shape), want)


# ---- functions ----


@pytest.mark.parametrize(
    "backend, dtype", [("fused", "float32"), ("blocksparse_ops", "bfloat16")]
)
def test_openais_function_computes_it(name, backend, dtype):
    """The three ops store scores in bfloat16, so that is the dtype they are held to."""
    inputs = random_inputs(0, 2, TIME, heads=HEADS, head_dim=16)
    mask, qkv, do = new_rule(name, TIME, HEADS, WINDOW), inputs[:3], inputs.do
    oracle = [attention_fwd(*qkv, mask)[0], *attention_bwd(*qkv, mask, do)]
    *qkv16, do16 = (to_dtype(x, dtype) for x in inputs[:4])
    plain = [plain_attention_fwd(*qkv16, mask)[0]]
    plain += plain_attention_bwd(*qkv16, mask, do16)

    def attention(q, k, v):
        options = {"blocksize": 8, "backend": backend, "recompute": True}
        return [sa.blocksparse_attention_impl(q, k, v, HEADS, name, WINDOW, **options)]

    arrays = [merged(x) for x in qkv], [merged(do)]
    o, gradients = run_with_gradients(attention, *arrays, mode="eager")
    for i, got in enumerate([*o, *gradients]):
        got = to_dtype(got, dtype).reshape(oracle[i].shape)
        assert_close(got, oracle[i], plain[i], 2 if i == 0 else 3)


def test_heads_that_it_does_not_tell_apart_share_tables(name):
    bst = sa.get_blocksparse_obj(TIME, HEADS, name, 8, WINDOW)
    assert bst.lut_heads == (HEADS if name == "dilated" else 1)


def test_the_fused_op_computes_it(name):
    block_mask = sa.pattern_block_mask(name, TIME, HEADS, **OPTIONS)
    assert has_pattern(block_mask, name)
    check_attention(attention_on(block_mask, HEADS), block_mask, heads=HEADS)


def test_openais_oracle_does_not_know_it(name):
    message = f"attn_mode must be 'all', 'local', 'strided' or 'fixed', got '{name}'"
    with pytest.raises(ValueError, match=message):
        sa.get_attn_mask(TIME, name, WINDOW)
    with pytest.raises(ValueError, match=message):
        sa.get_callback(name, WINDOW)


# ---- Keras ----


def test_the_layer_trains_and_is_saved(name, tmp_path):
    layer = sa.SparseSelfAttention(HEADS, attn_mode=name, **OPTIONS)
    model = functional(layer, TIME, 32)
    assert has_pattern(layer.block_mask, name)
    x, target = normal(2, TIME, 32, seed=8), normal(2, TIME, 32, seed=9)
    oracle, plain = (
        layer_by_hand(layer, x, target, dtype) for dtype in ("float64", "float32")
    )
    assert_close(model.predict(x, verbose=0), oracle[0], plain[0], 2)
    before, rate = layer.get_weights(), 2.0**16
    model.compile(keras.optimizers.SGD(rate), "mse")
    model.fit(x, target, batch_size=2, verbose=0)
    steps = [(a - b) / np.float32(rate) for a, b in zip(before, layer.get_weights())]
    for i, (want, by_hand) in enumerate(zip(oracle[1:], plain[1:])):
        got = np.concatenate([steps[2 * i], steps[2 * i + 1][None]])
        assert_close(got, want, by_hand, 3)
    config = json.loads(json.dumps(layer.get_config()))
    assert sa.SparseSelfAttention.from_config(config).get_config() == layer.get_config()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same_bits(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def check_model(model, names):
    plans = [block.attention.block_mask for block in model.blocks]
    for plan, name in zip(plans, names):
        assert name in PATTERNS and (
            name not in NEW_PATTERNS or has_pattern(plan, name)
        )
    tokens = np.random.RandomState(0).randint(0, model.vocab_size, [2, TIME])
    rotary = ROTARY_BASE if model.get_config()["rotary"] else None
    oracle = model_by_hand(model, tokens, np.float64, attention_fwd, rotary)
    plain = model_by_hand(model, tokens, np.float32, plain_attention_fwd, rotary)
    assert_close(model(tokens).numpy(), oracle, plain, 2)


def test_the_model_has_it_in_turn_with_others(name):
    attention = f"local, {name},dense"
    model = sa.SparseTransformer(50, TIME, 3, 32, HEADS, attention, **OPTIONS)
    model.build([None, TIME])
    check_model(model, ["local", name, "all"])
    config = json.loads(json.dumps(model.get_config()))
    assert sa.SparseTransformer.from_config(config).get_config() == model.get_config()


# ---- programs ----


def test_the_example_trains_it(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    train_lm, generate = map(importlib.import_module, ("train_lm", "generate"))
    small = (
        f"--time {TIME} --layers 1 --width 32 --heads {HEADS} --local-attn-ctx {WINDOW} "
        "--block-size 8 --batch 4 --steps 8 --steps-per-epoch 4 --eval-batches 1"
    ).split()
    data = tmp_path / "text"
    data.write_bytes(20 * open(__file__, "rb").read())
    files = ["--data", str(data), "--output", str(tmp_path)]
    assert train_lm.main([*small, *files, "--attention", name]) == 0
    curve = json.loads((tmp_path / name / "curve.json").read_text())
    assert [row["step"] for row in curve] == [4, 8]
    assert curve[1]["valid"] < curve[0]["valid"]
    check_model(generate.load_model(tmp_path / name), [name])


def test_the_build_command_compiles_its_kernels(name, machine):
    """They are those of a pattern of ours whose rows are visited in the same order."""
    ours = "strided" if name == "other_rows" else "local"
    for pattern, runs in (name, 5 + 11), (ours, 0):
        before = machine.runs()
        assert machine.run(build_new, pattern, libraries=["nvrtc"]) == 0
        assert machine.runs() - before == runs
    assert machine.run(build_new, "all,fixed", libraries=["nvrtc"]) == 0
    # The other order of rows needs four of its own; delta reads no keys.
    assert machine.runs() == 5 + 11 + (4 if name == "other_rows" else 0)
