"""The cases of test_cuda_attention.py and test_cuda_blocks.py.

To compile their kernels ahead, without a GPU:

python tests/gpu/cases.py sm_90a compute_70 [-k PART_OF_A_NAME]
"""

import argparse
import concurrent.futures
import ctypes
import functools
from collections import namedtuple

import numpy as np

from sparse_attention.native import abi, libraries
from sparse_attention.native.cuda import kernels
from sparse_attention.plan.block_mask import BlockMask
from sparse_attention.plan.masks import causal_mask
from sparse_attention.plan.patterns import pattern_block_mask

Case = namedtuple(
    "Case",
    "name block_mask dtype heads kv_heads head_dim head_dim_v kv_lengths tile_q "
    "tile_kv softmax_scale allow_tf32 rule",
)
BATCH = 2
DTYPES = (*abi.DTYPES, "tf32")  # float32 whose products may round to TF32


def case(
    name,
    block_mask,
    dtype,
    heads=2,
    kv_heads=None,
    head_dim=32,
    head_dim_v=None,
    kv_lengths=None,
    tile_q=None,
    tile_kv=None,
    softmax_scale=None,
    rule=None,
):
    """Fills in what is left open; `block_mask` is a function without arguments."""
    return Case(
        "-".join([name, dtype]),
        block_mask,
        "float32" if dtype == "tf32" else dtype,
        heads,
        kv_heads or heads,
        head_dim,
        head_dim_v or head_dim,
        kv_lengths,
        tile_q,
        tile_kv,
        softmax_scale,
        dtype == "tf32",
        rule or {},
    )


# Of tiles of 128 queries and keys, which the kernels of long lists have.
whole_tiles = functools.partial(case, tile_q=128, tile_kv=128)


def random_block_mask(
    seed, block_size, q_len, kv_len, heads, row_stride=1, density=0.5
):
    """A random layout and an irregular mask; some rows are empty, some blocks FULL."""
    random = np.random.RandomState(seed)
    lengths = (-(-n // row_stride) * row_stride for n in (q_len, kv_len))
    q_blocks, kv_blocks = (-(-n // block_size) for n in lengths)
    layout = random.random_sample([heads, q_blocks, kv_blocks]) < density
    layout[:, random.randint(q_blocks)] = False

    def mask(head, q_idx, kv_idx):
        own = head if heads > 1 else 0
        return ((q_idx * 3 + kv_idx + own) % 7 > 1) | (kv_idx % 64 < 20)

    return BlockMask(layout, mask, block_size, q_len, kv_len, row_stride)


def _patterns():
    for dtype in DTYPES:
        for size in (8, 16, 32, 64, 128):
            window = 2 * size
            length = 5 * size + size // 2 + 3
            for mode in ("all", "local", "strided", "fixed"):

                def block_mask(mode=mode, length=length, size=size, window=window):
                    stride = 7 if mode == "strided" else window
                    context = None if mode == "all" else stride
                    verts = 2 if mode == "fixed" else None
                    return pattern_block_mask(mode, length, 2, size, context, verts)

                head_dim = 32 if size < 32 else 64
                yield case(f"{mode}-{size}", block_mask, dtype, head_dim=head_dim)


def _dims():
    dims = [(8, 8), (24, 24), (40, 40), (64, 64), (96, 96), (128, 128), (256, 256)]
    for dtype in DTYPES:
        for head_dim, head_dim_v in dims + [(64, 128), (128, 64), (72, 200)]:
            is_wide = dtype in ("float32", "tf32") and max(head_dim, head_dim_v) > 96
            size = 32 if is_wide else 64

            def block_mask(size=size):
                return random_block_mask(1, size, 300, 260, 2)

            yield case(
                f"dim-{head_dim}-{head_dim_v}",
                block_mask,
                dtype,
                head_dim=head_dim,
                head_dim_v=head_dim_v,
            )


def _features():
    for dtype in DTYPES:
        for tile_q in (8, 16, 32, 64, 128):
            yield case(
                f"tile_q-{tile_q}",
                lambda: random_block_mask(2, 8, 203, 301, 2),
                dtype,
                head_dim=64,
                tile_q=tile_q,
                tile_kv=max(tile_q, 32),
            )
        yield case(
            "shared-heads",
            lambda: random_block_mask(3, 16, 200, 200, 6, density=0.3),
            dtype,
            heads=6,
            kv_heads=2,
            kv_lengths=(150, 0),
        )
        yield case(
            "shared-layout",
            lambda: random_block_mask(4, 32, 100, 333, 1),
            dtype,
            heads=4,
            kv_heads=1,
            kv_lengths=(300, 1000),
            head_dim=64,
        )
        yield case(
            "row-stride",
            lambda: random_block_mask(5, 16, 205, 301, 2, row_stride=12),
            dtype,
            kv_lengths=(250, 77),
        )
        # Every list has one block, all of one mask.
        yield case(
            "diagonal",
            lambda: BlockMask(np.eye(9), causal_mask(), 32, 280, 280),
            dtype,
        )
        for scale in (-0.3, 0.0):
            yield case(
                f"scale{scale}",
                lambda: BlockMask(np.ones([3, 3]), causal_mask(), 64, 180, 180),
                dtype,
                softmax_scale=scale,
            )


def _long():
    """Lists for which `configs.cc` has attention_fwd_sm90, with two and three groups."""
    for dtype in ("float16", "bfloat16"):
        for kv_len, sizes in ((2900, (8, 16, 32, 64, 128)), (1500, (8, 64))):
            for size in sizes:

                def block_mask(size=size, kv_len=kv_len):
                    return random_block_mask(6, size, 333, kv_len, 2, density=0.9)

                yield case(
                    f"long-{kv_len}-{size}",
                    block_mask,
                    dtype,
                    head_dim=64,
                    tile_q=128,
                    tile_kv=128,
                )
        yield case(
            "long-shared-heads",
            lambda: random_block_mask(7, 32, 700, 2500, 1, density=0.95),
            dtype,
            heads=4,
            kv_heads=2,
            kv_lengths=(2500, 2301),
            head_dim=64,
        )
        yield case(
            "long-causal",
            lambda: BlockMask(
                np.tril(np.ones([33, 65]), 32),
                lambda head, q_idx, kv_idx: kv_idx <= q_idx + 2030,
                *(64, 2100, 4130),
            ),
            dtype,
            heads=1,
            head_dim=64,
        )
        yield whole_tiles(
            "long-128",
            lambda: random_block_mask(8, 16, 500, 700, 4, density=0.7),
            dtype,
            heads=4,
            kv_heads=2,
            kv_lengths=(700, 433),
            head_dim=128,
        )


# Dims that fill no whole panels of 64 columns: of queries and keys, and of values.
PADDED_DIMS = [(40, 40), (48, 48), (56, 40), (72, 72), (80, 80), (96, 96), (112, 112)]
PADDED_DIMS += [(96, 64), (64, 96), (120, 40)]


def _long_padded():
    """The same two kernels with such dims, for lists of keys and of queries."""
    sizes = 8, 64, 16, 128, 32
    for dtype in ("float16", "bfloat16"):
        for i, (head_dim, head_dim_v) in enumerate(PADDED_DIMS):
            dims = dict(head_dim=head_dim, head_dim_v=head_dim_v)
            size = sizes[(i + (dtype == "float16")) % len(sizes)]
            # Up to 64 columns, two groups multiply or three.
            lengths = (1800, 2900) if max(head_dim, head_dim_v) <= 64 else (700,)
            for kv_len in lengths:

                def by_queries(size=size, kv_len=kv_len):
                    return random_block_mask(6, size, 333, kv_len, 2, density=0.9)

                yield whole_tiles(
                    f"long-dims-{head_dim}-{head_dim_v}-{kv_len}",
                    by_queries,
                    dtype,
                    **dims,
                )

            def by_keys(size=size):
                return random_block_mask(9, size, 1533, 333, 2, density=0.9)

            yield whole_tiles(
                f"long-queries-dims-{head_dim}-{head_dim_v}", by_keys, dtype, **dims
            )
        yield case(
            "long-queries-dims-shared-heads",
            lambda: random_block_mask(7, 32, 1500, 700, 1, density=0.95),
            dtype,
            heads=4,
            kv_heads=2,
            kv_lengths=(0, 601),
            head_dim=72,
            head_dim_v=88,
        )


def _long_by_keys():
    """Lists of queries for which `configs.cc` has attention_bwd_sm90."""

    def long(name, dtype, block_mask, head_dim, **options):
        name = f"long-queries-{name}"
        return whole_tiles(name, block_mask, dtype, head_dim=head_dim, **options)

    for dtype in ("float16", "bfloat16"):
        for size in (8, 16, 32, 64, 128):
            for head_dim in (64, 128):

                def block_mask(size=size):
                    return random_block_mask(9, size, 1733, 333, 2, density=0.9)

                yield long(f"{size}-{head_dim}", dtype, block_mask, head_dim)
        for head_dim in (64, 128):
            # One plan for all heads; a sequence without keys; keys that end within a tile.
            yield long(
                f"shared-heads-{head_dim}",
                dtype,
                lambda: random_block_mask(7, 32, 1500, 700, 1, density=0.95),
                head_dim,
                heads=4,
                kv_heads=2,
                kv_lengths=(0, 601),
            )
            # A plan for each head; three heads of queries to a head of keys.
            yield long(
                f"own-heads-{head_dim}",
                dtype,
                lambda: random_block_mask(8, 64, 1400, 520, 6, density=0.9),
                head_dim,
                heads=6,
                kv_heads=2,
                kv_lengths=(520, 130),
            )
            # FULL blocks but on the diagonal.
            yield long(
                f"causal-{head_dim}",
                dtype,
                lambda: BlockMask(np.tri(41), causal_mask(), 64, 2600, 2600),
                head_dim,
                heads=1,
            )


def documents(length, count):
    """int32 [BATCH, length]: runs of equal ids; of the second sequence some are -1."""
    ids = np.sort(np.random.RandomState(1).randint(0, count, [BATCH, length]), axis=1)
    ids[1, -length // 7 :] = -1
    ids[1, : length // 9] = -1
    return ids.astype(np.int32)


def mask_of_blocks(q_len, kv_len, size=64):
    """bool [BATCH, 1, q_len, kv_len]: of a block of pairs, none, some or all are allowed."""
    random = np.random.RandomState(2)
    blocks = random.choice(
        [0, 0.6, 1], [BATCH, 1, -(-q_len // size), -(-kv_len // size)]
    )
    rates = blocks.repeat(size, 2).repeat(size, 3)[:, :, :q_len, :kv_len]
    return random.rand(*rates.shape) < rates


def rules_of(heads, q_len, kv_len):
    """{name: arguments of `core_abi.rule_of`}."""
    random = np.random.RandomState(0)
    return {
        "softcap": {"logit_softcap": 1.5},
        "alibi": {"alibi_slopes": 0.5 ** np.arange(1.0, heads + 1)},
        "bias": {"relative_bias": 0.25 * random.randn(heads, 2 * 90 - 1)},
        "segments": {"segment_ids": (documents(q_len, 5), documents(kv_len, 5))},
        "padding": {"mask": random.rand(BATCH, 1, 1, kv_len) < 0.7},
        "mask-of-blocks": {"mask": mask_of_blocks(q_len, kv_len)},
        "mask": {"mask": random.rand(BATCH, heads, q_len, kv_len) < 0.7},
        "dropout": {"dropout_rate": 0.3, "dropout_seed": [11, -5]},
    }


def _rules():
    """Each rule alone on each kernel; all of them together on all that differ."""
    shapes = {
        # Of 304 keys a mask of pairs is read 16 bytes at a time.
        "own": (lambda: random_block_mask(2, 16, 203, 304, 2), {"head_dim": 64}),
        "shared-heads": (
            lambda: random_block_mask(3, 8, 200, 210, 6, density=0.4),
            {"heads": 6, "kv_heads": 2, "kv_lengths": (150, 210)},
        ),
        "row-stride": (
            lambda: random_block_mask(5, 16, 205, 301, 2, row_stride=12),
            {"kv_lengths": (250, 77)},
        ),
        "causal": (
            lambda: BlockMask(np.tri(5), causal_mask(), 64, 300, 300),
            {"head_dim": 128, "softmax_scale": -0.1},
        ),
    }
    long = {"head_dim": 64, "tile_q": 128, "tile_kv": 128}
    long_shapes = {
        "long": (lambda: random_block_mask(6, 32, 333, 2900, 2, density=0.9), long),
        "long-128": (
            lambda: random_block_mask(8, 16, 300, 700, 2, density=0.7),
            dict(long, head_dim=128),
        ),
        "long-dims-72-88": (
            lambda: random_block_mask(8, 32, 300, 700, 2, density=0.7),
            dict(long, head_dim=72, head_dim_v=88),
        ),
        # FULL blocks but on the diagonal; the last rows of the first tile have the most.
        "long-causal": (
            lambda: BlockMask(
                np.tri(10, 45, 35),
                lambda head, q_idx, kv_idx: kv_idx <= q_idx + 2240,
                *(64, 610, 2850),
            ),
            long,
        ),
    }
    for dtype in DTYPES:
        is_short = dtype in ("float32", "tf32")
        for shape, (block_mask, options) in {
            **shapes,
            **({} if is_short else long_shapes),
        }.items():
            if is_short and shape == "causal":
                options = dict(options, head_dim=64)
            one, heads = block_mask(), options.get("heads", 2)
            rules = rules_of(heads, one.q_len, one.kv_len)
            rules["all"] = {k: v for rule in rules.values() for k, v in rule.items()}
            rules["all"]["q_offset"] = 9
            alone = rules if shape in ("own", "long", "long-causal") else ["all"]
            for name in alone:
                rule = rules[name]
                if shape == "long-causal":  # whole tiles are behind the queries, too
                    rule = dict(rule, q_offset=1000)
                if shape == "long-causal" and "alibi_slopes" in rule:
                    rule["alibi_slopes"] = rule["alibi_slopes"] / 64
                if shape == "long-causal" and name == "softcap":
                    rule["logit_softcap"] = 9.0  # most logits are small
                if shape == "long-causal" and name == "mask-of-blocks":
                    rule["mask"] = rule["mask"][:1]  # one for all sequences
                yield case(f"{name}-{shape}", block_mask, dtype, rule=rule, **options)


def _rules_by_keys():
    """Those of which attention_bwd_sm90 takes the rule."""
    long = {"tile_q": 128, "tile_kv": 128}
    shapes = {
        # Of 336 keys a mask of pairs is read 16 bytes at a time.
        "64": (
            lambda: random_block_mask(9, 32, 1733, 336, 2, density=0.9),
            dict(long, head_dim=64),
        ),
        "128": (
            lambda: random_block_mask(10, 64, 1733, 333, 2, density=0.9),
            dict(long, head_dim=128),
        ),
        # One plan for all heads; tiles of 16 blocks; keys that end within a tile.
        "shared-heads-64": (
            lambda: random_block_mask(7, 8, 1500, 700, 1, density=0.95),
            dict(long, head_dim=64, heads=4, kv_heads=2, kv_lengths=(611, 700)),
        ),
        "own-heads-128": (
            lambda: random_block_mask(8, 128, 1400, 520, 6, density=0.9),
            dict(long, head_dim=128, heads=6, kv_heads=2, kv_lengths=(0, 130)),
        ),
        # Dims that fill no whole panels of 64 columns.
        "dims-72-88": (
            lambda: random_block_mask(9, 32, 1733, 336, 2, density=0.9),
            dict(long, head_dim=72, head_dim_v=88),
        ),
        "causal-64": (
            lambda: BlockMask(np.tri(41), causal_mask(), 64, 2600, 2600),
            dict(long, head_dim=64, heads=1),
        ),
        "causal-128": (
            lambda: BlockMask(np.tri(17), causal_mask(), 128, 2100, 2100),
            dict(long, head_dim=128, heads=1),
        ),
    }
    for dtype in ("float16", "bfloat16"):
        for shape, (block_mask, options) in shapes.items():
            one, heads = block_mask(), options.get("heads", 2)
            rules = rules_of(heads, one.q_len, one.kv_len)
            if shape == "64":
                rules["softcap"] = {"logit_softcap": 9.0}
            every = {k: v for rule in rules.values() for k, v in rule.items()}
            every["q_offset"] = 9
            # A relative_bias and a soft cap each have this kernel, but not together.
            rules["all"] = {k: v for k, v in every.items() if k != "relative_bias"}
            scores = {k: v for k, v in every.items() if k != "mask"}
            scores.pop("logit_softcap")
            rules["documents"] = scores  # all that changes weights, within documents
            # All distances are beyond it, on both sides.
            rules["bias-of-one"] = {"relative_bias": np.full((heads, 1), 0.25)}
            alone = rules if shape in ("64", "128") else ["all", "documents"]
            for name in alone:
                title = f"{name}-long-queries-{shape}"
                yield case(title, block_mask, dtype, rule=rules[name], **options)


CASES = [
    *(*_patterns(), *_dims(), *_features()),
    *(*_long(), *_long_padded(), *_long_by_keys()),
]
RULE_CASES = [*_rules(), *_rules_by_keys()]


# What a V100 runs: two heads of 256 do not fit into its shared memory.
def runs_on_volta(c):
    is_small = c.head_dim + c.head_dim_v < 512
    return c.dtype != "bfloat16" and is_small and not c.allow_tf32


VOLTA_CASES = [c for c in CASES if runs_on_volta(c)]
VOLTA_RULE_CASES = [c for c in RULE_CASES if runs_on_volta(c)]


def rule_parts(rule, bias_gradient=False):
    """SpattnRuleParts of a case's rule."""
    masks_keys = "mask" in rule and rule["mask"].shape[1:3] == (1, 1)
    used = dict(
        softcap="logit_softcap" in rule,
        alibi="alibi_slopes" in rule,
        bias="relative_bias" in rule,
        segments="segment_ids" in rule or masks_keys,
        mask="mask" in rule and not masks_keys,
        dropout="dropout_rate" in rule,
        bias_sums=bias_gradient and "relative_bias" in rule,
    )
    return sum(used[part] << i for i, part in enumerate(abi.RULE_PARTS))


def plans_of(library, case, arch):
    """The `Tiles` and `KvTiles` that a case runs."""
    block_mask, group = case.block_mask(), case.heads // case.kv_heads
    if case.tile_q:
        return block_mask.tiles(case.tile_q), block_mask.kv_tiles(case.tile_kv, group)
    head_dims = case.head_dim, case.head_dim_v
    return abi.plans(library, [arch], case.dtype, head_dims, block_mask, group)


def kernels_of(library, case, arch):
    """The `Kernel`s that a case runs."""
    tiles, kv_tiles = plans_of(library, case, arch)
    head_dims = case.head_dim, case.head_dim_v
    shape = abi.shape_of(library, arch, case.dtype, head_dims, case.block_mask())
    shape.is_scale_positive = case.softmax_scale is None or case.softmax_scale > 0
    shape.uses_tf32 = case.allow_tf32
    shape.tile_q, shape.tile_kv = tiles.tile_q, kv_tiles.tile_kv
    keys = len(tiles.kv_indices) * tiles.block_size
    shape.list_keys = keys // (len(tiles.kv_indptr) - 1)
    found = []
    for phase in (*abi.PHASES, *(abi.RULE_PHASES if case.rule else ())):
        shape.rule = rule_parts(case.rule, phase == "bwd_dq")
        found.append(abi.kernel_of(library, shape, phase))
    queries = len(kv_tiles.q_indices) * kv_tiles.block_size
    shape.rule = rule_parts(case.rule)
    shape.list_keys = queries // (len(kv_tiles.q_indptr) - 1)
    found += [abi.kernel_of(library, shape, phase) for phase in abi.LONG_PHASES]
    return [kernel for kernel in found if kernel.name]


# ---- the three-op family ----

# scores: read and written by the products, read by the softmax, which writes weights.
BlocksCase = namedtuple(
    "BlocksCase", "name block_size dtype scores weights head_dim is_shared has_mask"
)


def _blocks_cases():
    def case(dtype, scores, weights, block_size, head_dim, is_shared, has_mask):
        name = f"{dtype}-{scores}-{weights}-{block_size}-{head_dim}"
        name += "-shared" * is_shared + "-masked" * has_mask
        return BlocksCase(
            *(name, block_size, dtype, scores, weights, head_dim, is_shared, has_mask)
        )

    sizes = 8, 16, 32, 64
    for dtype in abi.DTYPES:
        for scores in abi.DTYPES:
            for i, size in enumerate(sizes):  # weights take all types in turn
                weights = abi.DTYPES[(abi.DTYPES.index(scores) + i) % 3]
                yield case(dtype, scores, weights, size, 64, i % 2 == 1, i < 3)
        for size in sizes[1:3]:
            yield case(dtype, dtype, dtype, size, 64, size == 32, size == 16)
        for size, head_dim in zip((16, 32, 8, 64, 32, 16), (8, 24, 40, 72, 128, 256)):
            yield case(dtype, "bfloat16", dtype, size, head_dim, size == 16, size > 16)


BLOCKS_CASES = [*_blocks_cases()]


def blocks_kernels_of(library, case, arch):
    """The `Kernel`s that a case runs."""
    sizes = arch, case.block_size
    return [
        abi.blocks_kernel_of(
            *(library, op, *sizes, case.dtype, case.scores, case.weights, case.head_dim)
        )
        for op in abi.BLOCKS_OPS
    ]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("arch", nargs="+", choices=["sm_90a", "compute_70"])
    parser.add_argument("-k", default="", help="parts of the names of the cases")
    options = parser.parse_args()
    library = ctypes.CDLL(libraries.build_core())
    with concurrent.futures.ProcessPoolExecutor() as pool:
        for arch in options.arch:
            number, cases = 90, CASES + RULE_CASES
            if arch != "sm_90a":
                number, cases = 70, VOLTA_CASES + VOLTA_RULE_CASES
            wanted = set()
            for find, some in ((kernels_of, cases), (blocks_kernels_of, BLOCKS_CASES)):
                for c in some:
                    if any(k in c.name for k in options.k.split(",")):
                        found = find(library, c, number)
                        wanted |= {(k.name.decode(), k.macros.decode()) for k in found}
            compiled = functools.partial(kernels.compiled, arch=arch)
            print(len(list(pool.map(compiled, *zip(*wanted)))), "kernels for", arch)


if __name__ == "__main__":
    main()
