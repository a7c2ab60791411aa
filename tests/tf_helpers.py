"""Runs functions in every mode of TensorFlow 1 and 2, and checks attention."""

import os
import subprocess
import sys
import warnings

import tensorflow as tf
from helpers import RESULTS, assert_attention_close, random_inputs
from tensorflow.python.eager import context

import sparse_attention as sa
from sparse_attention.native import loader

MODES = ("graph", "eager", "function")


def run(function, *arrays, mode="graph"):
    """What `function(*tensors)` gives, a nest of tensors, as arrays.

    Args:
      function: Takes one tensor for each of `arrays`.
      mode: "graph" (a session runs it), "eager", or "function" (`tf.function`).
    """
    if mode == "graph":
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            tensors = [
                tf.compat.v1.placeholder(tf.as_dtype(x.dtype), x.shape) for x in arrays
            ]
            result = function(*tensors)
            session.run(tf.compat.v1.global_variables_initializer())
            return session.run(result, dict(zip(tensors, arrays)))
    with context.eager_mode():  # TensorFlow 1 has no other way into it in a test
        if mode == "function":
            function = tf.function(function)
        result = function(*[tf.constant(x) for x in arrays])
        return tf.nest.map_structure(lambda x: x.numpy(), result)


def run_with_gradients(function, arrays, d_arrays, mode="graph"):
    """Outputs of `function(*tensors)`, a list, and the inputs' gradients, as arrays.

    Args:
      function: Returns a list of tensors.
      arrays: The inputs.
      d_arrays: Gradients of the outputs.
    """

    def both(*tensors):
        inputs, d_outputs = list(tensors[: len(arrays)]), list(tensors[len(arrays) :])
        if mode == "graph":
            outputs = list(function(*inputs))
            return outputs, tf.gradients(outputs, inputs, d_outputs)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = list(function(*inputs))
        return outputs, tape.gradient(outputs, inputs, d_outputs)

    return run(both, *arrays, *d_arrays, mode=mode)


def check_attention(
    attention,
    block_mask,
    mode="graph",
    with_dlse=False,
    batch=2,
    heads=2,
    kv_heads=None,
    head_dim=16,
    head_dim_v=None,
    dtype="float32",
    kv_lengths=None,
    softmax_scale=None,
    seed=0,
    tf32=False,
):
    """Compares o, lse and all gradients with the float64 oracle.

    Args:
      attention: `attention(q, k, v)` -> o, lse, on tensors [batch, time, heads * dim].
      block_mask: What it is to attend to.
      with_dlse: Whether lse has a gradient, too.
      tf32: Whether the factors of products may be TF32.
    """
    inputs = random_inputs(
        seed,
        batch,
        block_mask.q_len,
        block_mask.kv_len,
        heads,
        kv_heads,
        head_dim,
        head_dim_v,
        dtype,
    )
    if not with_dlse:
        inputs.dlse[:] = 0
    options = {"softmax_scale": softmax_scale, "kv_lengths": kv_lengths}
    outputs, grads = run_with_gradients(
        attention,
        [merged(x) for x in inputs[:3]],
        [merged(inputs.do), inputs.dlse],
        mode,
    )
    like = (inputs.do, inputs.dlse, *inputs[:3])
    results = {
        name: x.reshape(y.shape)
        for name, x, y in zip(RESULTS, [*outputs, *grads], like)
    }
    assert_attention_close(results, inputs, block_mask.to_dense(), tf32, **options)


def attention_on(block_mask, heads, device=None, **options):
    """(q, k, v) -> o, lse."""

    def attention(q, k, v):
        with tf.device(device):
            return sa.block_sparse_attention(
                q, k, v, block_mask, heads, return_lse=True, **options
            )

    return attention


def pattern(attn_mode, q_len=72, heads=4, block_size=8, **options):
    """The BlockMask of a pattern; by default q_len = 9 blocks of 8."""
    ctx = 3 if attn_mode == "strided" else 4 * block_size
    return sa.pattern_block_mask(attn_mode, q_len, heads, block_size, ctx, **options)


def random_qkv(block_mask, heads=2, head_dim=8, batch=2):
    """float32 [batch, time, heads * head_dim], as many rows as the plan has."""
    lengths = block_mask.q_len, block_mask.kv_len
    inputs = random_inputs(0, batch, *lengths, heads, head_dim=head_dim)
    return [merged(x) for x in inputs[:3]]


def take_kernels_away(monkeypatch):
    """From here on attention runs by what stands in where nothing can be compiled."""
    absent = {"attention_ops": loader.Loaded(None, "a test")}
    monkeypatch.setattr(loader, "_loaded", absent)
    warnings.simplefilter("ignore", RuntimeWarning)  # pytest takes it back


def merged(x):
    """[batch, time, heads, dim] -> [batch, time, heads * dim]"""
    batch, time, heads, dim = x.shape
    return x.reshape(batch, time, heads * dim)


def assert_same_bits(a, b):
    for x, y in zip(tf.nest.flatten(a), tf.nest.flatten(b)):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert x.tobytes() == y.tobytes()


def run_script(source, *arguments, **environment):
    """Runs Python code in a new process, for ten minutes at most; returns what it prints."""
    ran = subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout


TWO_CPUS = """
import sys
import tensorflow as tf
halves = 2 * [tf.config.LogicalDeviceConfiguration()]
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, halves)
sys.path.append(sys.argv[1])
"""


def run_on_two_cpus(source):
    """Runs Python code, which may import tests, where CPU:0 and CPU:1 are halves."""
    here = os.path.dirname(os.path.abspath(__file__))
    run_script(TWO_CPUS + source, here, CUDA_VISIBLE_DEVICES="")
