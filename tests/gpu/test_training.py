"""The language model's script on one GPU.

SPARSE_ATTENTION_REQUIRE=gpu python -m pytest tests/gpu/test_training.py
"""

import pytest
import test_train_lm as train_lm

pytestmark = pytest.mark.gpu

data = train_lm.data


def test_training_twice_gives_the_same_bits(data, tmp_path):
    """Sums by atomics, which TensorFlow has on GPUs alone, would not."""
    outputs = tmp_path / "first", tmp_path / "second"
    for output in outputs:
        train_lm.finish(train_lm.start(output, data))
    train_lm.assert_same_weights(*outputs)
