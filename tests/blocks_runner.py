"""Runs the three-op family in TensorFlow, in each of its modes."""

import tensorflow as tf

MODES = ["graph"]
if tf.__version__ >= "2":
    MODES += ["eager", "function"]


def evaluate(mode, fn, inputs, output_gradient=None):
    """The tensors of `fn(*tensors)` as arrays, then the gradients of the inputs if the
    one of the last output is given."""

    def work(*tensors):
        if output_gradient is None:
            return list(fn(*tensors))
        if mode == "graph":
            outputs = list(fn(*tensors))
            return outputs + tf.gradients(outputs[-1], tensors, output_gradient)
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            outputs = list(fn(*tensors))
        seed = tf.constant(output_gradient)
        return outputs + tape.gradient(outputs[-1], list(tensors), seed)

    if mode == "graph":
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            return session.run(work(*map(tf.constant, inputs)))
    work = tf.function(work) if mode == "function" else work
    return [tensor.numpy() for tensor in work(*map(tf.constant, inputs))]
