"""Which weights dropout keeps: known answers of Philox, and statistics of the bits."""

import doctest

import numpy as np

from sparse_attention.plan import dropout

RATE = 0.1


def centred(seed=(3, 5), batch=4, heads=8, length=512):
    """1 - RATE where a weight is dropped, -RATE where it is kept: 0 on average."""
    kept = dropout.kept_weights(RATE, seed, batch, heads, length, length)
    return np.where(kept, -RATE, 1 - RATE)


def assert_zero_on_average(x, variance):
    """Within four standard deviations of a mean of independent numbers."""
    assert abs(x.mean()) < 4 * np.sqrt(variance / x.size)


def test_philox_gives_the_known_answers():
    """Those of the paper's authors, for counters and keys of zeros and of ones."""
    for word, expected in (
        (0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ):
        word = np.full(1, word, np.uint64)
        got = dropout.philox((word,) * 4, (word, word))
        assert tuple(int(x[0]) for x in got) == expected


def test_the_rate_is_that_of_every_batch_element_head_query_and_key():
    x, variance = centred(), RATE * (1 - RATE)
    assert_zero_on_average(x, variance)
    for axes in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):
        count = np.prod([x.shape[axis] for axis in axes])
        means = x.mean(axis=axes) / np.sqrt(variance / count)
        assert np.abs(means).max() < 5
        assert 0.5 < np.mean(means**2) < 2 or means.size < 100


def test_neighbours_are_independent():
    x, variance = centred(), RATE * (1 - RATE)
    assert_zero_on_average(x[1:] * x[:-1], variance**2)
    assert_zero_on_average(x[:, 1:] * x[:, :-1], variance**2)
    assert_zero_on_average(x[:, :, 1:] * x[:, :, :-1], variance**2)
    assert_zero_on_average(x[..., 1:] * x[..., :-1], variance**2)
    corners = x[..., 1:, 1:] * x[..., 1:, :-1] * x[..., :-1, 1:] * x[..., :-1, :-1]
    assert_zero_on_average(corners, variance**4)
    assert_zero_on_average(x * centred(seed=(3, 6)), variance**2)
    assert_zero_on_average(x * centred(seed=(4, 5)), variance**2)


def test_pairs_of_rows_correlate_as_independent_ones_do():
    """All pairs of queries, and all pairs of keys, of one head."""
    x = centred(batch=1, heads=1)[0, 0]
    for rows in (x, x.T):
        correlations = rows @ rows.T / (RATE * (1 - RATE) * np.sqrt(rows.shape[1]))
        pairs = correlations[np.triu_indices(len(rows), 1)]
        assert 0.98 < pairs.std() < 1.04
        assert np.abs(pairs).max() < 7  # one in 130,000 is 4.5 if it were normal


def test_rates_from_none_to_nearly_all():
    for rate in (0.0, 2.0**-20, 0.5, 0.999):
        kept = dropout.kept_weights(rate, (1, 2), 1, 4, 256, 256)
        assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate / kept.size) + 1e-12


def test_an_offset_moves_the_queries():
    whole = dropout.kept_weights(0.5, (1, 2), 2, 2, 64, 64)
    part = dropout.kept_weights(0.5, (1, 2), 2, 2, 24, 64, q_offset=40)
    np.testing.assert_array_equal(part, whole[:, :, 40:])


def test_docstrings():
    assert doctest.testmod(dropout).failed == 0
