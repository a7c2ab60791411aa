"""Lets Keras load files that hold our classes, in a process that has not named them.

Keras finds a class of a file among those that are registered, and a class is registered
where it is defined, for which TensorFlow must be imported: `import sparse_attention` does
not do that. So once Keras is imported, before `sparse_attention` or after, it is given
stand-ins, which import our classes when a file needs them.
"""

import contextlib
import importlib.abc
import sys
from typing import Any

PACKAGE = "sparse_attention"
CLASSES = (
    "GroupQueryAttention",
    "MultiHeadAttention",
    "SparseSelfAttention",
    "SparseTransformer",
)
# Keras 3, or the Keras 2 of TensorFlow 2; that of TF_USE_LEGACY_KERAS; that of TensorFlow 1.
KERAS_MODULES = ("keras", "tf_keras", "tensorflow_core.python.keras")
# Where KerasHub says whether there is a fused op, which `enable_flash_attention` answers.
HUB_MODULE = "keras_hub.src.utils.keras_utils"


class StandIn:
    """All that Keras asks of a class to make a layer, model or optimizer of a config."""

    def __init__(self, name):
        self.name = name

    def from_config(self, config):
        return getattr(sys.modules[PACKAGE], self.name).from_config(config)


def register(keras):
    """Registers the stand-ins with a module of KERAS_MODULES."""
    with contextlib.suppress(AttributeError):  # it is no Keras that we know
        classes = keras.utils.get_custom_objects()
        if hasattr(keras.utils, "register_keras_serializable"):
            for name in CLASSES:
                classes.setdefault(f"{PACKAGE}>{name}", StandIn(name))
            # Models compiled with the Adam of version 0.1, which had Keras's configuration.
            classes.setdefault(f"{PACKAGE}>Adam", keras.optimizers.Adam)
        else:  # TensorFlow 1 saves names alone; the other classes need Keras 3
            classes.setdefault("SparseSelfAttention", StandIn("SparseSelfAttention"))


def tell_flash_attention():
    """KerasHub has come after flash attention was switched on, if it was."""
    flash_attention = sys.modules.get(PACKAGE + ".keras.flash_attention")
    if flash_attention is not None:
        flash_attention.exchange_in_hub()


class Finder(importlib.abc.MetaPathFinder):
    """Finds Keras as Python does, and has it registered with after its import."""

    def find_spec(self, name, path=None, target=None):
        if name not in (*KERAS_MODULES, HUB_MODULE):
            return None
        later = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(name, path, target) for finder in later)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_register(module):
            execute(module)
            if module.__name__ == HUB_MODULE:
                tell_flash_attention()
            elif module.__name__ == name:
                register(module)

        loader.exec_module = execute_and_register
        return spec


def watch() -> None:
    """Registers with what is imported already, and with what will be."""
    for name in KERAS_MODULES:
        if name in sys.modules:
            register(sys.modules[name])
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
