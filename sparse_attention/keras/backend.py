"""Keras on TensorFlow, or an error that says what is in its way."""

try:
    from tensorflow import keras

    backend = keras.backend.backend()
except (ImportError, RecursionError) as error:  # TensorFlow raises the second again
    raise ImportError(
        "sparse_attention's layers and models need Keras, which does not import "
        f"({error.__context__ or error}); `pip install keras`, and leave the "
        "environment variable KERAS_BACKEND unset or 'tensorflow'"
    ) from error
if backend != "tensorflow":
    raise ImportError(
        "sparse_attention's layers and models need Keras on TensorFlow, got "
        f"{backend!r}; set the environment variable KERAS_BACKEND=tensorflow"
    )

# TensorFlow 2.13 to 2.15, and tf_keras, have no `keras.__version__`: they are Keras 2.
VERSION = getattr(keras, "__version__", "2")
IS_KERAS_3 = VERSION.startswith("3.")


def require_keras_3(name):
    if not IS_KERAS_3:
        raise ImportError(
            f"{name} needs Keras 3, as TensorFlow 2.16 and newer have, "
            f"got Keras {VERSION}"
        )
