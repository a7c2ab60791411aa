"""Two GPUs in one process.

SPARSE_ATTENTION_REQUIRE=2gpu python -m pytest tests/gpu/test_multi_gpu.py
"""

import mirrored
import pytest
import test_train_lm as train_lm

pytestmark = pytest.mark.gpu(2)

DEVICES = ["GPU:0", "GPU:1"]
data = train_lm.data


def test_the_op_gives_the_bits_of_one():
    mirrored.check_op(DEVICES)


def test_every_op_reads_its_plan_where_it_runs():
    mirrored.check_plans(DEVICES)


@pytest.mark.parametrize("attention", ["fixed", "local,strided"])
def test_a_model_trains_as_on_one(attention):
    mirrored.check_training(DEVICES, attention)


def test_the_script_trains_as_on_one(data, tmp_path):
    curves = []
    for gpus, strategy in (("0,1", "mirrored"), ("0", "none")):
        options = {"CUDA_VISIBLE_DEVICES": gpus, "NVIDIA_TF32_OVERRIDE": "0"}
        output = tmp_path / strategy
        process = train_lm.start(output, data, "--strategy", strategy, **options)
        train_lm.finish(process)
        curves.append(train_lm.read_curve(output))
    # Attention rounds to TF32 in both, where what float32 rounds may change the last bit.
    train_lm.assert_same_curve(*curves, rounding=2.0**-18)
