"""recomputable: the numbers of a plain call, and the memory of one block, not all."""

import inspect
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.eager import context
from tf_helpers import MODES, assert_same_bits, run, run_script, run_with_gradients

import sparse_attention as sa
from sparse_attention.ops import recompute as module

IS_TF1 = tf.__version__.startswith("1.")


def normal(*shape, seed=0):
    print("seed", seed)
    return np.random.RandomState(seed).normal(size=shape).astype(np.float32)


def integers(*shape, seed=0):
    """Small whole numbers: sums of them are the same in any order."""
    print("seed", seed)
    return np.random.RandomState(seed).randint(-2, 3, shape).astype(np.float32)


def both_ways(function, arrays, d_arrays, mode):
    """Results of `function(recompute, *tensors)` for False and True."""
    return [
        run_with_gradients(
            lambda *tensors: function(recompute, *tensors),
            arrays,
            d_arrays,
            mode,
        )
        for recompute in (False, True)
    ]


# ---- equal to a plain call ----


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["attention_impl", "blocksparse_attention_impl"])
def test_recompute_equals_plain_bitwise_for_attention(name, mode):
    arrays = [normal(2, 64, 32, seed=seed) for seed in range(4)]

    def attention(recompute, q, k, v):
        o = getattr(sa, name)(
            q, k, v, 4, "fixed", local_attn_ctx=32, blocksize=8, recompute=recompute
        )
        return [o]

    plain, again = both_ways(attention, arrays[:3], arrays[3:], mode)
    assert_same_bits(plain, again)


@pytest.mark.parametrize("mode", MODES)
def test_stacked_and_nested_blocks_equal_plain_ones_bitwise(mode):
    x, w, dy = normal(2, 64, 32), normal(3, 32, 32, seed=1), normal(2, 64, 32, seed=2)

    @sa.recomputable
    def inner(x, w):
        return tf.tanh(tf.tensordot(x, w, 1))

    @sa.recomputable("block")
    def block(x, w, recompute_inner):
        h = inner(x, w, recompute=recompute_inner)
        return sa.blocksparse_attention_impl(
            h,
            tf.stop_gradient(h),
            h,
            4,
            "local",
            local_attn_ctx=16,
            blocksize=8,
            recompute=recompute_inner,
        )

    def stack(recompute, x, w):
        for i in range(3):
            x = block(x, w[i], recompute_inner=recompute, recompute=recompute)
        return [x]

    plain, again = both_ways(stack, [x, w], [dy], mode)
    assert_same_bits(plain, again)


@pytest.mark.parametrize("mode", MODES)
def test_nested_results_and_arguments_of_any_kind(mode):
    x, y, ids = normal(4, 3), normal(4, 3, seed=1), np.array([2, 0], np.int32)

    @sa.recomputable("kinds")
    def kinds(pair, factor, ids, activation=None, more=()):
        h = activation(pair["x"] * factor) + pair["y"]
        chosen = tf.gather(h, ids) * more[0]
        return {"h": h, "rest": (chosen, 3, None, [tf.shape(h)])}

    def call(recompute, x, y, ids, scale):
        result = kinds(
            {"x": x, "y": y}, 2, ids=ids, activation=tf.nn.relu, more=[scale, "text"],
            recompute=recompute,
        )  # fmt: skip
        assert sorted(result) == ["h", "rest"] and result["rest"][1:3] == (3, None)
        return [result["h"], result["rest"][0]], result["rest"][3][0]

    for recompute in (False, True):

        def with_gradients(x, y, ids, scale):
            with_tape = mode != "graph"
            with tf.GradientTape() as tape:
                tape.watch([x, y, scale])
                ys, shape = call(recompute, x, y, ids, scale)
            if with_tape:
                return ys, shape, tape.gradient(ys, [x, y, scale])
            return ys, shape, tf.gradients(ys, [x, y, scale])

        result = run(with_gradients, x, y, ids, np.float32(3), mode=mode)
        if recompute:
            assert_same_bits(result, plain)  # noqa: F821
        plain = result
    assert plain[1].tolist() == [4, 3]


@pytest.mark.parametrize("mode", MODES)
def test_an_unused_result_has_no_gradient(mode):
    x = normal(3, 4)

    @sa.recomputable
    def two(x):
        return tf.sin(x), tf.cos(x)

    for used in (0, 1):
        plain, again = both_ways(
            lambda recompute, x: [two(x, recompute=recompute)[used]],
            [x],
            [np.ones_like(x)],
            mode,
        )
        assert_same_bits(plain, again)


@pytest.mark.parametrize("mode", MODES)
def test_methods(mode):
    x, w = normal(2, 3), normal(3, 3, seed=1)

    class Layer:
        def __init__(self, w):
            self.w = w

        @sa.recomputable
        def bare(self, x):
            return tf.matmul(x, self.w)

        @sa.recomputable("named")
        def named(self, x):
            return tf.matmul(x, self.w)

    def call(recompute, x):
        layer = Layer(tf.constant(w))
        return [layer.named(layer.bare(x, recompute=recompute), recompute=recompute)]

    assert_same_bits(*both_ways(call, [x], [np.ones_like(x)], mode))


def test_random_numbers_with_a_seed_of_their_own_come_out_the_same():
    x = np.ones([100], np.float32)

    @sa.recomputable
    def dropped(x):
        return tf.nn.dropout(x, rate=0.5, seed=7) ** 2

    for recompute in (False, True):
        (y,), (dx,) = run_with_gradients(
            lambda x: [dropped(x, recompute=recompute)],
            [x],
            [x],
        )
        np.testing.assert_array_equal(dx, 2 * y)
        assert 0 < np.count_nonzero(y) < 100


# ---- what the function reads besides its arguments ----


@pytest.mark.parametrize("use_resource", [False, True])
def test_graph_variables_captured_and_made_inside(use_resource):
    x = normal(4, 3)

    def call(recompute, x):
        def variable(name, seed):
            return tf.compat.v1.get_variable(
                name, initializer=normal(3, 3, seed=seed), use_resource=use_resource
            )

        captured = variable("captured", 1)

        @sa.recomputable
        def layer(x, ids):
            with tf.compat.v1.variable_scope("inside"):
                made = variable("made", 2)
            y = tf.tanh(tf.matmul(x, made))
            _, y = tf.while_loop(
                lambda i, y: i < 2,
                lambda i, y: (i + 1, tf.tanh(tf.matmul(y, captured))),
                (tf.constant(0), y),
            )
            return y, tf.nn.embedding_lookup(made, ids)

        with tf.compat.v1.variable_scope("outside"):
            y, rows = layer(x, tf.constant([1, 2, 1]), recompute=recompute)
        variables = tf.compat.v1.trainable_variables()
        assert [v.op.name for v in variables] == ["captured", "outside/inside/made"]
        grads = tf.gradients([y, rows], [x, *variables])
        return [y, rows, *map(tf.convert_to_tensor, grads)]

    plain, again = (run(lambda x: call(r, x), x) for r in (False, True))
    assert_same_bits(plain, again)


@pytest.mark.parametrize("mode", ["eager", "function"])
def test_variables_with_a_tape_inside_and_outside(mode):
    x, init = integers(4, 3), integers(3, 3, seed=1)

    def call(recompute, tape_is_outside):
        with context.eager_mode():
            options = {"use_resource": True} if IS_TF1 else {}
            w, table = tf.Variable(init, **options), tf.Variable(init, **options)

            @sa.recomputable
            def layer(x):
                h = tf.nn.relu(tf.matmul(x, w))
                return tf.matmul(h, w) + tf.nn.embedding_lookup(table, [0, 2, 0, 1])

            def forward(x):
                return layer(layer(x, recompute=recompute), recompute=recompute)

            def both(x, forward=forward):
                with tf.GradientTape() as tape:
                    tape.watch(x)
                    y = forward(x)
                grads = tape.gradient(y, [x, w, table])
                return [y, *map(tf.convert_to_tensor, grads)]

            if tape_is_outside:
                return [t.numpy() for t in both(tf.constant(x), tf.function(forward))]
            function = tf.function(both) if mode == "function" else both
            return [t.numpy() for t in function(tf.constant(x))]

    for tape_is_outside in {False, mode == "function"}:
        assert_same_bits(call(False, tape_is_outside), call(True, tape_is_outside))


@pytest.mark.parametrize("mode", ["graph", "function"])
def test_captured_tensors_in_graphs(mode):
    x, dy = integers(4, 3), integers(4, 3, seed=1)

    def call(recompute, x):
        h = x * x
        h2 = tf.nn.relu(h - 2)

        @sa.recomputable
        def layer(y):
            return y * h + h2

        return [layer(layer(x, recompute=recompute), recompute=recompute)]

    assert_same_bits(*both_ways(call, [x], [dy], mode))


def test_eager_tensors_captured_by_a_function():
    for size in (4, 400):  # small ones become constants, large ones inputs
        x = normal(size)
        with context.eager_mode():
            small = tf.constant(x)

            def gradient(recompute):
                @sa.recomputable
                def layer(y):
                    return tf.sin(y * small)

                @tf.function
                def forward(y):
                    return layer(y, recompute=recompute)

                with tf.GradientTape() as tape:
                    tape.watch(small)
                    z = forward(tf.ones_like(small))
                return tape.gradient(z, small).numpy()

            assert_same_bits(gradient(True), gradient(False))


@pytest.mark.parametrize("mode", ["graph", "function"])
def test_loops_and_branches_inside(mode):
    x, w = normal(4, 3), normal(3, 3, seed=1)

    @sa.recomputable
    def layer(x, w):
        _, x = tf.while_loop(
            lambda i, x: i < 3,
            lambda i, x: (i + 1, tf.tanh(tf.matmul(x, w))),
            (tf.constant(0), x),
        )
        return tf.cond(tf.reduce_sum(x) > 0, lambda: tf.sin(x), lambda: tf.cos(x))

    plain, again = both_ways(
        lambda recompute, x, w: [layer(x, w, recompute=recompute)],
        [x, w],
        [np.ones_like(x)],
        mode,
    )
    assert_same_bits(plain, again)


# TensorFlow 1 cannot differentiate a function's loop with any custom gradient in it.
@pytest.mark.parametrize("mode", ["graph"] if IS_TF1 else ["graph", "function"])
def test_inside_of_a_loop(mode):
    x, w = normal(4, 3), normal(3, 3, seed=1)

    @sa.recomputable
    def layer(x, w):
        return tf.tanh(tf.matmul(x, w))

    def loop(recompute, x, w):
        _, x = tf.while_loop(
            lambda i, x: i < 3,
            lambda i, x: (i + 1, layer(x, w, recompute=recompute)),
            (tf.constant(0), x),
        )
        return [x]

    assert_same_bits(*both_ways(loop, [x, w], [np.ones_like(x)], mode))


class Box:
    """A container that tf.nest does not open."""

    def __init__(self, content):
        self.content = content


class Slots:
    __slots__ = ("content",)

    def __init__(self, content):
        self.content = content


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["ragged", "sparse", "slices"])
def test_composite_tensors_have_gradients(kind, mode):
    def make(x):
        if kind == "ragged":
            return tf.RaggedTensor.from_row_splits(x, [0, 2, 3])
        if kind == "sparse":
            return tf.SparseTensor([[0, 1], [1, 0], [1, 2]], x, [2, 3])
        return tf.IndexedSlices(x, tf.constant([2, 0, 1]), tf.constant([3]))

    def values(composite):
        return composite.flat_values if kind == "ragged" else composite.values

    @sa.recomputable
    def squared(composite):
        return {"result": make(values(composite) ** 2)}

    def call(recompute, x):
        return [values(squared(make(x), recompute=recompute)["result"])]

    x, dy = normal(3), normal(3, seed=1)
    plain, again = both_ways(call, [x], [dy], mode)
    assert_same_bits(plain, again)
    np.testing.assert_allclose(again[1][0], 2 * x * dy, rtol=1e-6)


CONTAINERS = {
    "object": (Box, lambda box: box.content),
    "slots": (Slots, lambda box: box.content),
    "list in an object": (lambda x: Box([{"x": x}]), lambda box: box.content[0]["x"]),
    "object in objects": (lambda x: Box(Box(x)), lambda box: box.content.content),
    "deque": (lambda x: deque([x]), lambda box: box[0]),
    "ragged": (lambda x: tf.RaggedTensor.from_row_splits(x, [0, 3]),
               lambda box: box.flat_values),
    "partial": (lambda x: partial(tf.identity, x), lambda box: box()),
    "lambda": (lambda x: lambda: x, lambda box: box()),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["argument", "keyword", "closure", "method"])
@pytest.mark.parametrize("name", CONTAINERS)
def test_tensors_in_any_container_have_gradients(name, way, mode):
    make, take = CONTAINERS[name]

    def call(recompute, x):
        held = make(x)

        @sa.recomputable
        def function(box):
            return take(box) ** 2

        @sa.recomputable
        def closed():
            return take(held) ** 2

        class Layer:
            box = None

            @sa.recomputable
            def method(self):
                return take(self.box) ** 2

        layer = Layer()
        layer.box = held
        if way == "argument":
            return [function(held, recompute=recompute)]
        if way == "keyword":
            return [function(box=held, recompute=recompute)]
        return [(closed if way == "closure" else layer.method)(recompute=recompute)]

    x, dy = normal(3), normal(3, seed=1)
    plain, again = both_ways(call, [x], [dy], mode)
    assert_same_bits(plain, again)


def test_an_eager_result_that_hides_tensors_is_refused():
    @sa.recomputable("block")
    def block(x):
        return Box([x * x])

    @sa.recomputable
    def with_box_of_its_own(x, box):
        return x * x, box

    with context.eager_mode():
        x = tf.constant([1.0, 2.0])
        with pytest.raises(
            TypeError, match="block must return tensors in .* got some in a Box"
        ):
            block(x, recompute=True)
        y, box = with_box_of_its_own(x, Box(x), recompute=True)
        assert box.content is x


# ---- random numbers and updates ----


@pytest.mark.parametrize("mode", MODES)
def test_other_random_numbers_in_the_second_run_are_an_error(mode):
    @sa.recomputable
    def dropped(x):
        return tf.nn.dropout(x, rate=0.5)

    x = np.ones([100], np.float32)
    with pytest.raises(ValueError, match="random numbers.*stateless.*Keras 3"):
        run_with_gradients(lambda x: [dropped(x, recompute=True)], [x], [x], mode)


def test_a_graph_that_updates_a_variable_twice_gives_a_warning():
    def call(x):
        v = tf.compat.v1.get_variable("v", initializer=0.0, use_resource=True)

        @sa.recomputable
        def counted(x):
            with tf.control_dependencies([v.assign_add(1.0)]):
                return x * x

        return [counted(x, recompute=True)]

    x = np.ones([3], np.float32)
    with pytest.warns(RuntimeWarning, match=r"runs .*Assign.* twice"):
        run_with_gradients(call, [x], [x])


# ---- when it runs ----


def test_the_function_runs_again_only_for_a_gradient():
    calls = []

    @sa.recomputable
    def square(x):
        calls.append(1)
        return x * x

    with context.eager_mode():
        x = tf.constant(3.0)
        square(x, recompute=True)
        assert len(calls) == 1
        for recompute, total in ((False, 2), (True, 4)):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = square(x, recompute=recompute)
            assert float(tape.gradient(y, x)) == 6
            assert len(calls) == total


def test_recomputed_ops_wait_where_the_first_ones_ran():
    with tf.Graph().as_default() as graph:
        table = tf.compat.v1.get_variable("table", [5, 3])

        @sa.recomputable("lookup")
        def layer(ids):  # integers: no data of the gradient's can hold it up
            return tf.gather(table, ids)

        with tf.device("/device:CPU:1"):
            y = layer(tf.constant([1, 2]), recompute=True)
        (grad,) = tf.gradients(y, table)
        assert isinstance(grad, tf.IndexedSlices)
        again = {
            op.name.split("lookup_recompute/")[1]: op
            for op in graph.get_operations()
            if "lookup_recompute/" in op.name
        }
        assert again["Identity"].device == "/device:CPU:1"
        assert again["Identity"].control_inputs  # of ids


def test_an_update_cannot_overtake_the_second_reading():
    def train(x):
        w = tf.compat.v1.get_variable("w", initializer=2.0, use_resource=True)

        def wait(x):  # as long as the update would need to go first
            if wait.again:
                import time

                time.sleep(0.3)
            wait.again = True
            return x

        wait.again = False

        @sa.recomputable
        def product(x):
            (ready,) = tf.compat.v1.py_func(wait, [x], [tf.float32])
            with tf.control_dependencies([ready]):
                return x * w.read_value()

        y = product(x, recompute=True)
        dx, dw = tf.gradients(
            y, [x, w]
        )  # dw = x does not need the reading, dx = w does
        return [dx, dw, w.assign_sub(dw)]

    dx, dw, w = run(train, np.float32(5))
    assert (dx, dw, w) == (2, 5, -3)


# ---- as a decorator ----


def test_decorated_functions_keep_their_face():
    @sa.recomputable("block")
    def named(x, y=2, **options):
        """Doc."""
        return x, y, options

    @sa.recomputable
    def bare(x):
        return x

    assert (named.__name__, named.__doc__) == ("named", "Doc.")
    assert str(inspect.signature(named)) == "(x, y=2, *, recompute=False, **options)"
    assert str(inspect.signature(bare)) == "(x, *, recompute=False)"
    assert named(1, z=3) == named(1, z=3, recompute=False) == (1, 2, {"z": 3})


@pytest.mark.parametrize("mode", MODES)
def test_a_function_may_have_any_name(mode):
    functions = [sa.recomputable(lambda x: x * x)]
    functions += [sa.recomputable(name)(tf.square) for name in ("_a", "2 + b/c", "é")]
    for function in functions:
        x = normal(3)
        _, (dx,) = run_with_gradients(
            lambda x, function=function: [function(x, recompute=True)], [x], [x], mode
        )
        np.testing.assert_array_equal(dx, 2 * x * x)


# ---- memory ----

PEAK = """
import sys
import numpy as np
import tensorflow as tf
import sparse_attention as sa

mode = sys.argv[1]
random = np.random.RandomState(0)
x = random.normal(size=[65536, 32]).astype(np.float32)  # 8 MiB
weights = [(random.normal(size=[32, 32]) / 6).astype(np.float32) for _ in range(8)]

@sa.recomputable
def block(x, w):  # 6 activations of 8 MiB
    for _ in range(6):
        x = tf.tanh(tf.matmul(x, w))
    return x

def loss(x, variables, recompute):
    for w in variables:
        x = block(x, w, recompute=recompute)
    return tf.reduce_sum(x * x)

def run_graph(recompute):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variables = [
            tf.compat.v1.get_variable("w%d" % i, initializer=w)
            for i, w in enumerate(weights)
        ]
        tensor = tf.compat.v1.placeholder(tf.float32, x.shape)
        grads = tf.gradients(loss(tensor, variables, recompute), variables)
        session.run(tf.compat.v1.global_variables_initializer())
        session.run(grads, {tensor: x})

def run_tape(recompute):
    variables = [tf.Variable(w) for w in weights]
    def step(x):
        with tf.GradientTape() as tape:
            y = loss(x, variables, recompute)
        return tape.gradient(y, variables)
    if mode != "eager":
        step = tf.function(step, **({"jit_compile": True} if mode == "xla" else {}))
    [grad.numpy() for grad in step(tf.constant(x))]

def peak():  # of this program: ru_maxrss would begin with the parent's
    with open("/proc/self/status") as status:
        return next(int(s.split()[1]) for s in status if "VmHWM" in s) // 1024

before = peak()
for recompute in (True, False):  # the peak never falls: the smaller one first
    (run_graph if mode == "graph" else run_tape)(recompute)
    print(peak() - before)
"""
PEAK_MODES = ["graph"] if IS_TF1 else ["graph", "eager", "function", "xla"]


@pytest.fixture(scope="module")
def peaks():
    """MiB above what there was before: {mode: (with recompute=True, without)}."""
    environment = {
        "MALLOC_MMAP_THRESHOLD_": "1000000",  # else glibc keeps some of what is freed
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    with ThreadPoolExecutor(2) as pool:
        printed = pool.map(
            lambda mode: run_script(PEAK, mode, **environment), PEAK_MODES
        )
        return {m: tuple(map(int, p.split())) for m, p in zip(PEAK_MODES, printed)}


@pytest.mark.parametrize("mode", PEAK_MODES)
def test_recompute_saves_the_memory_of_the_activations(peaks, mode):
    recomputed, plain = peaks[mode]
    print(f"peak {plain} MiB, with recompute=True {recomputed} MiB")
    # 8 blocks of 6 activations are 384 MiB; 8 results and one block are 112 MiB.
    assert plain > 300
    assert recomputed < 0.6 * plain


def test_a_tensorflow_without_the_private_module_is_named_once(monkeypatch, recwarn):
    for name in ("record", "tape"):  # does not import
        monkeypatch.setitem(sys.modules, f"tensorflow.python.eager.{name}", None)
    monkeypatch.setattr(tf, "__version__", "3.0.0")
    module._recording.cache_clear()

    @sa.recomputable
    def block(x, w):
        return tf.tanh(x @ w)

    def function(is_recomputed, x, w):
        return [block(x, w, recompute=is_recomputed)]

    arrays = [normal(8, 8, seed=seed) for seed in range(3)]
    for _ in range(2):
        plain, again = both_ways(function, arrays[:2], arrays[2:], "eager")
        assert_same_bits(plain, again)
    module._recording.cache_clear()
    said = [str(w.message) for w in recwarn if w.category is RuntimeWarning]
    assert (
        len(said) == 1 and "saves no memory in eager mode: TensorFlow 3.0.0" in said[0]
    )
