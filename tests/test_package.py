"""What `import sparse_attention` gives, with and without TensorFlow."""

import doctest
import importlib
import inspect
import os
import re
import runpy
import subprocess
import sys

import pytest
from tf_helpers import run_script

import sparse_attention as sa

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

WITHOUT_TENSORFLOW = """
import sys
if sys.argv[1:] == ["hidden"]:
    sys.modules["tensorflow"] = None  # what a failed import leaves
import sparse_attention as sa
assert sys.modules.get("tensorflow") is None and "keras" not in sys.modules
block_mask = sa.BlockMask(sa.local_layout(32, 8, 16), sa.local_mask(16), 8)
print(sa.reference.attention_fwd.__module__, block_mask.heads)
for name in sa.__all__:
    try:
        getattr(sa, name)
    except ImportError as error:
        print(name, "|", error)
"""

# What works with NumPy alone.
PLAN_NAMES = [
    "BlockMask",
    "EMPTY",
    "FULL",
    "Mask",
    "PARTIAL",
    "all_layout",
    "bigbird_layout",
    "block_mask",
    "callback_mask",
    "causal_mask",
    "chunk_layout",
    "chunk_mask",
    "deepspeed_bigbird_layout",
    "deepspeed_bslongformer_layout",
    "deepspeed_fixed_layout",
    "deepspeed_variable_layout",
    "dense_layout",
    "dense_mask",
    "documents_layout",
    "documents_mask",
    "fixed_layout",
    "fixed_mask",
    "global_layout",
    "global_mask",
    "layouts",
    "local_layout",
    "local_mask",
    "longformer_layout",
    "longformer_mask",
    "mask_layout",
    "masks",
    "merged_layout",
    "merged_mask",
    "neighborhood_layout",
    "neighborhood_mask",
    "pattern_block_mask",
    "prefix_layout",
    "prefix_mask",
    "reference",
    "row_column_layout",
    "row_column_mask",
    "sink_layout",
    "sink_mask",
    "strided_layout",
    "strided_mask",
    "window_layout",
    "window_mask",
]

TENSORFLOW_NAMES = [
    "BlocksparseTransformer",
    "Decoder",
    "GroupQueryAttention",
    "MultiHeadAttention",
    "SparseSelfAttention",
    "SparseTransformer",
    "alibi_slopes",
    "attention_impl",
    "block_sparse_attention",
    "blocksparse_attention_impl",
    "clear_plans",
    "disable_flash_attention",
    "enable_flash_attention",
    "flash_attention",
    "generate",
    "get_attn_mask",
    "get_blocksparse_obj",
    "get_callback",
    "load_ops",
    "merge_heads",
    "merge_states",
    "portable_graph",
    "recomputable",
    "rotary_embedding",
    "shape_list",
    "sparsify",
    "split_heads",
    "split_states",
    "strided_transpose",
]


def test_every_name_is_there():
    assert sorted(sa.__all__) == sorted(PLAN_NAMES + TENSORFLOW_NAMES)
    assert set(sa.__all__) <= set(dir(sa))
    assert all(hasattr(sa, name) for name in sa.__all__)
    assert re.match(r"\d+\.\d+\.\d+$", sa.__version__)


def test_there_is_one_version(monkeypatch):
    """The package's, that of what is built, of the pages, and of the newest release."""
    built = subprocess.check_output(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, text=True
    )
    monkeypatch.setattr(sys, "path", list(sys.path))  # which conf.py adds to
    pages = runpy.run_path(os.path.join(ROOT, "docs", "conf.py"))
    with open(os.path.join(ROOT, "CHANGELOG.md"), encoding="utf-8") as file:
        released = re.findall(
            r"^## (\d\S*) - \d{4}-\d\d-\d\d$", file.read(), re.MULTILINE
        )
    assert built.split()[-1] == pages["release"] == sa.__version__ == released[0]
    assert pages["html_title"].endswith(sa.__version__)


@pytest.mark.parametrize(
    "name",
    [
        "compat.attention",
        "keras.layers",
        "ops.attention",
        "ops.plan_tensors",
        "ops.portable",
        "ops.positions",
        "ops.recompute",
    ],
)
def test_documentation_examples(name):
    module = importlib.import_module("sparse_attention." + name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", sorted(PLAN_NAMES + TENSORFLOW_NAMES))
def test_exported_functions_have_types(name):
    exported = getattr(sa, name)
    if isinstance(exported, type):
        exported = exported.__init__
    if not callable(exported):
        return
    signature = inspect.signature(inspect.unwrap(exported))
    for parameter in signature.parameters.values():
        if parameter.name != "self":
            assert parameter.annotation is not parameter.empty, parameter
    assert signature.return_annotation is not signature.empty


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        sa.no_such_name  # noqa: B018


def test_import_brings_no_tensorflow():
    first, *missing = run_script(WITHOUT_TENSORFLOW).splitlines()
    assert first == "sparse_attention.plan.reference 1" and not missing


def test_imports_say_nothing():
    """What TensorFlow says is its own."""
    code = "import sparse_attention as sa; [getattr(sa, name) for name in sa.__all__]"
    ran = subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not ran.stdout and "sparse_attention" not in ran.stderr


def test_plans_work_without_tensorflow_and_the_rest_says_what_to_install():
    first, *missing = run_script(WITHOUT_TENSORFLOW, "hidden").splitlines()
    assert first == "sparse_attention.plan.reference 1"
    names, errors = zip(*(line.split(" | ") for line in missing))
    assert set(TENSORFLOW_NAMES) <= set(names)
    assert all("pip install tensorflow" in error for error in errors)
