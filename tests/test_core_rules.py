"""What stands between q kT and the softmax, on the CPU's kernels through the C ABI."""

import itertools

import nan_rule
import numpy as np
import pytest
from core_abi import InvalidArgument
from core_case import Case, same_bits
from helpers import DTYPES, RESULTS, check_twice_at_most
from rules import BATCH, HEADS, KV_LEN, Q_LEN, RULES, random_mask

from sparse_attention.plan.patterns import pattern_block_mask


def check(core, attn_mode="fixed", dtype="float32", rule=(), **options):
    """The `Case`, once it has been held to the tolerance."""
    block_mask = pattern_block_mask(attn_mode, Q_LEN, HEADS, 16, 32, num_verts=2)
    sizes = {"heads": HEADS, "head_dim": 16, "batch": BATCH, **options}

    def checked(seed):
        case = Case(core, block_mask, dtype, rule=dict(rule), seed=seed, **sizes)
        case.check(workers=2)
        return case

    return check_twice_at_most(checked)


# ---- against the oracle ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RULES)
def test_each_rule_matches_oracle(core, name, dtype):
    for attn_mode in ("all", "local", "strided", "fixed"):
        check(core, attn_mode, dtype, RULES[name])


@pytest.mark.parametrize("pair", list(itertools.combinations(RULES, 2)), ids=str)
def test_each_pair_of_rules_matches_oracle(core, pair):
    rule = {**RULES[pair[0]], **RULES[pair[1]]}
    check(core, rule=rule)
    check(core, rule=rule, dtype="bfloat16", kv_heads=2)


def test_all_rules_together_match_oracle(core):
    rule = {name: value for rule in RULES.values() for name, value in rule.items()}
    for attn_mode in ("all", "strided"):
        check(core, attn_mode, rule=rule, kv_heads=1, kv_lengths=[77, 40, 60, 0])


@pytest.mark.parametrize(
    "broadcast", list(itertools.product([0, 1], repeat=4)), ids=str
)
def test_masks_broadcast(core, broadcast):
    sizes = (BATCH, HEADS, Q_LEN, KV_LEN)
    shape = [size if kept else 1 for size, kept in zip(sizes, broadcast)]
    check(
        core,
        rule={"mask": random_mask(*shape) if any(broadcast) else np.full(shape, True)},
    )


@pytest.mark.parametrize("reach", [1, 2, 20, 77, 300])
@pytest.mark.parametrize("heads", [1, HEADS])
def test_relative_biases_of_any_reach_match_oracle(core, reach, heads):
    bias = 0.25 * np.random.RandomState(3).randn(heads, 2 * reach - 1)
    for q_offset in (0, 9):
        check(core, "all", rule={"relative_bias": bias, "q_offset": q_offset})
    check(core, "strided", rule={"relative_bias": bias}, kv_heads=2)


def test_alibi_counts_from_the_offset(core):
    for q_offset in (-3, 4):
        check(core, rule={**RULES["alibi_slopes"], "q_offset": q_offset})


def test_segments_that_differ_leave_rows_without_keys(core):
    ids = np.zeros([BATCH, Q_LEN], np.int32), np.ones([BATCH, KV_LEN], np.int32)
    case = check(core, rule={"segment_ids": ids})
    o, lse, *gradients = case.run()
    assert not o.any() and np.isneginf(lse).all()
    assert not any(x.any() for x in gradients)


# ---- determinism, NaN ----


def test_results_are_bitwise_equal_for_any_number_of_workers(core):
    rule = {**RULES["relative_bias"], **RULES["dropout"], **RULES["logit_softcap"]}
    for attn_mode in ("all", "strided"):
        case = check(core, attn_mode, rule=rule)
        first = case.run(workers=1)
        assert all(same_bits(case.run(workers), first) for workers in (2, 3, 16))


def test_dropout_is_the_same_whatever_the_tile(core):
    ones = {"v": np.ones([BATCH, KV_LEN, HEADS, 16], np.float32)}
    results = []
    for tile_q, block_size in ((8, 8), (128, 16), (32, 32)):
        block_mask = pattern_block_mask("all", Q_LEN, HEADS, block_size, 32)
        sizes = {"heads": HEADS, "batch": BATCH, "tile_q": tile_q, "head_dim": 16}
        case = Case(core, block_mask, rule=RULES["dropout"], **sizes)
        results.append(case.run(**ones)[0])
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=2.0**-18)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", nan_rule.INPUTS)
def test_nan_and_inf_keep_to_the_rule(core, name, dtype):
    allowed = random_mask(1, Q_LEN, KV_LEN)
    rule = {"mask": allowed[None], "logit_softcap": 3.0}
    block_mask = pattern_block_mask("all", Q_LEN, HEADS, 16)
    sizes = {"heads": HEADS, "head_dim": 16, "batch": 2}
    case = Case(core, block_mask, dtype, rule=rule, **sizes)

    def run(inputs):
        return dict(zip(RESULTS, case.run(**inputs._asdict())))

    sees = block_mask.to_dense() & allowed
    for value in nan_rule.VALUES[:1]:
        nan_rule.assert_keeps_to_the_rule(run, case.arrays, sees, name, value)


def test_padding_does_not_leak(core):
    for rule in ({"mask": random_mask(BATCH, 1, 1, KV_LEN)}, RULES["segment_ids"]):
        case = check(core, "all", rule=rule)
        q, k, v, *_ = case.arrays
        if "mask" in rule:
            absent = ~rule["mask"][:, 0, 0]
        else:
            absent = rule["segment_ids"][1] < 0
        before = case.run()
        changed = {}
        for name, x in (("k", k), ("v", v)):
            changed[name] = np.where(absent[:, :, None, None], np.float32(np.nan), x)
        assert same_bits(case.run(**changed), before)


# ---- errors ----


def test_sums_of_a_bias_that_memory_cannot_hold_are_refused(core):
    """2^70 bytes, of which 64 bits hold none."""
    block_mask = pattern_block_mask("all", Q_LEN, HEADS, 16)
    case = Case(core, block_mask, rule=RULES["relative_bias"], heads=HEADS, batch=1)
    q, k, v, do, _ = case.arrays
    o, lse, *_ = case.run()
    problem_of = core.problem

    def large(*arguments):
        problem = problem_of(*arguments)
        problem.batch = 2**59
        return problem

    core.problem = large
    try:
        with pytest.raises(InvalidArgument, match="relative_bias must have at most 2"):
            core.bwd(q, k, v, o, lse, do, block_mask, rule=case.rule)
    finally:
        core.problem = problem_of


@pytest.mark.parametrize(
    "rule,message",
    [
        (
            {"logit_softcap": -1.0},
            "logit_softcap must be finite and not negative, got -1",
        ),
        ({"logit_softcap": np.nan}, "logit_softcap must be finite"),
        ({"dropout_rate": 1.0}, r"dropout_rate must be in \[0, 1\), got 1"),
        ({"dropout_rate": 0.5}, "dropout_seed must be given with dropout_rate=0.5"),
        (
            {"relative_bias": np.zeros([3, 5])},
            "relative_bias must have 1 head or heads=4",
        ),
        ({"q_offset": 2**31}, "q_offset must be in"),
    ],
)
def test_bad_rules_are_refused(core, rule, message):
    with pytest.raises(InvalidArgument, match=message):
        check(core, rule=rule)
