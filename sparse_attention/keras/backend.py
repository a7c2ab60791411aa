"""Keras on TensorFlow, or an error that says what is in its way."""

import os
from typing import Any


def _remedy():
    """What to do where Keras does not import, by what was asked for."""
    if os.environ.get("TF_USE_LEGACY_KERAS") in ("1", "true", "True"):  # as TensorFlow
        return "`pip install tf_keras`, or unset the environment variable TF_USE_LEGACY_KERAS"
    if os.environ.get("KERAS_BACKEND", "tensorflow") != "tensorflow":
        return "unset the environment variable KERAS_BACKEND, or set it to 'tensorflow'"
    return "`pip install keras`"


try:
    from tensorflow import keras

    backend = keras.backend.backend()
except (ImportError, RecursionError) as error:  # TensorFlow raises the second again
    raise ImportError(
        "sparse_attention's layers and models need Keras, which does not import "
        f"({error.__context__ or error}); {_remedy()}"
    ) from error
if backend != "tensorflow":
    raise ImportError(
        "sparse_attention's layers and models need Keras on TensorFlow, got "
        f"{backend!r}; set the environment variable KERAS_BACKEND=tensorflow"
    )

# TensorFlow 2.13 to 2.15, and tf_keras, have no `keras.__version__`: they are Keras 2.
VERSION = getattr(keras, "__version__", "2")
IS_KERAS_3 = VERSION.startswith("3.")


class NotQuantized:
    """A base of layers whose weights Keras leaves as they are.

    Models read weights of their layers around the layers' calls, and an attention layer
    makes the same projections again when it is loaded. Keras's `Model.quantize` asks each
    layer that has no other inside, and turns the error into a warning.
    """

    dtype_policy: Any

    def quantize(self, mode=None, *args, **kwargs):
        dtype = self.dtype_policy.name
        raise NotImplementedError(
            f"sparse_attention's layers cannot be quantized to {mode!r} and keep their "
            f"dtype policy {dtype!r}; for 16 bits, give them dtype='mixed_bfloat16'"
        )

    def require_float_policy(self):
        policy = getattr(self, "dtype_policy", None)
        if getattr(policy, "quantization_mode", None) is not None:
            raise ValueError(
                "dtype must be a policy without quantization for sparse_attention's "
                f"layers, as 'float32' or 'mixed_bfloat16', got {self.dtype_policy.name!r}"
            )


def require_keras_3(name):
    if not IS_KERAS_3:
        raise ImportError(
            f"{name} needs Keras 3, as TensorFlow 2.16 and newer have, "
            f"got Keras {VERSION}"
        )
