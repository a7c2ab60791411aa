"""The language model's script on one GPU.

SPARSE_ATTENTION_REQUIRE=gpu python -m pytest tests/gpu/test_training.py
"""

import numpy as np
import pytest
import test_train_lm as train_lm

pytestmark = pytest.mark.gpu

data = train_lm.data


def test_training_twice_gives_the_same_bits(data, tmp_path):
    """Sums by atomics, which TensorFlow has on GPUs alone, would not."""
    runs = []
    for name in ("first", "second"):
        train_lm.finish(train_lm.start(tmp_path / name, data))
        checkpoint = tmp_path / name / "fixed" / "checkpoint.weights.h5"
        runs.append(train_lm.read_weights(checkpoint))
    assert set(runs[0]) == set(runs[1])
    for key, array in runs[0].items():
        np.testing.assert_array_equal(array, runs[1][key], key)
