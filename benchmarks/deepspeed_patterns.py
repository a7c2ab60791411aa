"""Compares the `deepspeed_*_layout` builders with DeepSpeed's own configurations.

    PYTHONPATH=. python benchmarks/deepspeed_patterns.py PATH/TO/sparsity_config.py

where the file is deepspeed/ops/sparse_attention/sparsity_config.py of DeepSpeed. It needs
PyTorch, and nothing else of DeepSpeed. Every layout must be DeepSpeed's, block for block;
where attention is "unidirectional", below and on the diagonal. Prints a line for each
builder, and exits with 1 where a layout differs.
"""

import argparse
import hashlib
import importlib.util
import itertools
import platform
import random
import sys

import numpy as np
import torch

import sparse_attention as sa

BLOCK, HEADS = 16, 3
ONE_WAY = "unidirectional"


def grid(**choices):
    """All combinations of the choices, as dicts."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values))


def cases():
    """Which builder, which configuration, and the options that both take."""
    both = ["bidirectional", ONE_WAY]
    fixed = grid(
        num_local_blocks=[1, 2, 4, 6],
        num_global_blocks=[1, 2, 3],
        attention=both,
        horizontal_global_attention=[False, True],
        num_different_global_patterns=[1, 2, 4],
        different_layout_per_head=[False, True],
    )
    yield sa.deepspeed_fixed_layout, "FixedSparsityConfig", fixed
    ranges = [([0], None), ([], None), ([2, 9], None), ([0, 4], [1, 7]), ([30], [40])]
    variable = (
        dict(options, global_block_indices=starts, global_block_end_indices=ends)
        for starts, ends in ranges
        for options in grid(
            num_random_blocks=[0, 2],
            local_window_blocks=[[4], [1, 2], [3, 1, 5]],
            attention=both,
            horizontal_global_attention=[False, True],
            different_layout_per_head=[False, True],
        )
    )
    yield sa.deepspeed_variable_layout, "VariableSparsityConfig", variable
    longformer = (
        dict(options, global_block_indices=starts, global_block_end_indices=ends)
        for starts, ends in ranges
        for options in grid(num_sliding_window_blocks=[1, 2, 3, 5], attention=both)
    )
    yield sa.deepspeed_bslongformer_layout, "BSLongformerSparsityConfig", longformer
    bigbird = grid(
        num_random_blocks=[0, 1, 2],
        num_sliding_window_blocks=[1, 2, 3],
        num_global_blocks=[1, 2],
        attention=both,
        different_layout_per_head=[False, True],
    )
    yield sa.deepspeed_bigbird_layout, "BigBirdSparsityConfig", bigbird


def theirs(config, options, blocks, seed):
    """DeepSpeed's layout after `random.seed(seed)`; None where it refuses."""
    random.seed(seed)
    try:
        layout = config(HEADS, BLOCK, **options).make_layout(blocks * BLOCK).numpy()
    except ValueError:
        return None
    return np.tril(layout) if options.get("attention") == ONE_WAY else layout


def ours(build, options, blocks, seed):
    if build in (sa.deepspeed_variable_layout, sa.deepspeed_bigbird_layout):
        options = dict(options, seed=seed)
    try:
        return build(blocks * BLOCK, BLOCK, HEADS, **options)
    except ValueError:
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sparsity_config", help="DeepSpeed's file of that name")
    path = parser.parse_args().sparsity_config
    spec = importlib.util.spec_from_file_location("sparsity_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, NumPy "
        f"{np.__version__}, sparse_attention {sa.__version__}; sparsity_config.py with "
        f"SHA-256 {digest[:16]}...\n"
    )
    wrong = 0
    for build, name, all_options in cases():
        counts = {"the same": 0, "refused by both": 0, "refused by DeepSpeed": 0}
        for seed, options in enumerate(all_options):
            for blocks in 1, 2, 5, 7, 12, 23:
                want = theirs(getattr(module, name), options, blocks, seed)
                got = ours(build, options, blocks, seed)
                if want is None:
                    refused = "both" if got is None else "DeepSpeed"
                    counts[f"refused by {refused}"] += 1
                elif got is not None and np.array_equal(got, want):
                    counts["the same"] += 1
                else:
                    wrong += 1
                    print("differs:", build.__name__, blocks, "blocks", options)
        found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        print(f"{build.__name__} and {name}: {found}")
    print(f"{wrong} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
