"""The example that trains: to the end, over interruptions, and on several devices."""

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from example_helpers import FOLDER, example, read_weights

SMALL = (
    "--time 64 --layers 1 --width 32 --heads 4 --local-attn-ctx 32 --block-size 8 "
    "--batch 4 --steps 36 --steps-per-epoch 6 --eval-batches 1"
).split()


@pytest.fixture(scope="module")
def train_lm():
    with example("train_lm") as module:
        yield module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "text"
    with open(__file__, "rb") as file:
        path.write_bytes(20 * file.read())
    return path


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    """The folder of a run from beginning to end."""
    output = tmp_path_factory.mktemp("uninterrupted")
    printed = finish(start(output, data, "--attention", "dense,fixed"))
    assert printed.count("others: ") == 2 and " bigram table, " in printed
    return output


def start(output, data, *arguments, **environment):
    """The same run in a process of its own; Ctrl-C reaches it."""
    command = [sys.executable, os.path.join(FOLDER, "train_lm.py"), *SMALL]
    command += ["--data", str(data), "--output", str(output), *arguments]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def read_curve(output, name="fixed"):
    path = output / name / "curve.json"
    return json.loads(path.read_text()) if path.exists() else []


def wait_for_epochs(process, output, count):
    """Returns once the run has `count` epochs behind it, and goes on."""
    deadline = time.monotonic() + 120
    while len(read_curve(output)) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def finish(process):
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed[-3000:]
    return printed


def assert_same_weights(*outputs):
    """Both runs' checkpoints are equal to the bit."""
    got, want = (read_weights(o / "fixed") for o in outputs)
    assert len(want) > 40 and set(got) == set(want)
    for key in want:
        np.testing.assert_array_equal(got[key], want[key], key)


def assert_same_curve(got, want, rounding=2.0**-23):
    """Equal but for rounding, by default in float32, which a few steps let grow."""
    assert [row["step"] for row in got] == [row["step"] for row in want]
    for key in ("train", "valid"):
        got_bits, want_bits = (np.array([r[key] for r in rows]) for rows in (got, want))
        assert np.abs(got_bits - want_bits).max() < 100 * rounding * want_bits.max()


# ---- one device ----


def test_it_learns_and_leaves_curves(uninterrupted):
    for name in ("dense", "fixed"):
        curve = read_curve(uninterrupted, name)
        assert [row["step"] for row in curve] == list(range(6, 42, 6))
        assert curve[-1]["valid"] < curve[0]["valid"] - 1
        assert (np.diff([row["seconds"] for row in curve]) > 0).all()
    picture = (uninterrupted / "curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10000


@pytest.fixture
def drawn(monkeypatch):
    """Calls a function that draws, and returns the figure, which it does not close."""
    from matplotlib import pyplot

    def drawn(draw, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(pyplot, "close", lambda figure: None)
            draw(*arguments)
        return pyplot.gcf()

    yield drawn
    pyplot.close("all")


def test_curves_say_what_they_show(train_lm, drawn, tmp_path):
    """The picture of the docs: title, axes, a legend in each panel, no tracing in seconds."""
    draw_curves = importlib.import_module("draw_curves")
    path = os.path.join(FOLDER, "../benchmarks/results/train_lm_h100.json")
    figure = drawn(draw_curves.main, path, str(tmp_path / "curves.png"))
    title = figure.get_suptitle()
    assert "standard library, 10.7 MB, on one NVIDIA H100" in title
    assert "12 layers of width 512, 8 heads, 12,288 positions" in title
    names = ["dense", "fixed", "strided"]
    for axis in figure.axes:
        assert [text.get_text() for text in axis.get_legend().get_texts()] == names
    steps, seconds = figure.axes
    assert "since step 20, so without TensorFlow's tracing" in seconds.get_xlabel()
    assert all(line.get_xdata()[0] == 20 for line in steps.lines)
    assert all(line.get_xdata()[0] == 0 for line in seconds.lines)
    dense = json.loads(open(path).read())["curves"]["dense"]
    took = dense[-1]["seconds"] - dense[0]["seconds"]
    assert seconds.lines[0].get_xdata()[-1] == pytest.approx(took)


def test_without_matplotlib_it_says_how_to_draw(
    train_lm, uninterrupted, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # what a failed import leaves
    config = json.loads((uninterrupted / "fixed/config.json").read_text())
    (uninterrupted / "curves.png").unlink()
    train_lm.draw_all(uninterrupted, config, "a text")
    assert (
        "curves.png is not drawn, as there is no matplotlib" in capsys.readouterr().err
    )
    monkeypatch.undo()
    train_lm.draw_all(uninterrupted, config, "a text")
    assert (uninterrupted / "curves.png").exists()


def test_curves_of_another_model_are_not_drawn_beside(train_lm, uninterrupted, drawn):
    config = json.loads((uninterrupted / "fixed/config.json").read_text())
    figure = drawn(train_lm.draw_all, uninterrupted, config, "a text")
    assert len(figure.axes[0].lines) == 4 and "Bits per byte of a text, " in str(
        figure.get_suptitle()
    )
    other = dict(config, model=dict(config["model"], width=64))
    (uninterrupted / "dense/config.json").write_text(json.dumps(other))
    figure = drawn(train_lm.draw_all, uninterrupted, config, "a text")
    assert len(figure.axes[0].lines) == 2
    (uninterrupted / "dense/config.json").write_text(json.dumps(config))


def test_ctrl_c_and_a_kill_change_nothing(uninterrupted, data, tmp_path):
    process = start(tmp_path, data)
    wait_for_epochs(process, tmp_path, 1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in printed
    behind = len(read_curve(tmp_path))
    process = start(tmp_path, data)
    wait_for_epochs(process, tmp_path, behind + 1)
    process.kill()
    process.communicate()
    assert len(read_curve(tmp_path)) < 6
    assert "step 0 of" not in finish(start(tmp_path, data))
    assert_same_weights(tmp_path, uninterrupted)


def test_more_steps_go_on_with_a_run_that_has_ended(
    uninterrupted, train_lm, data, tmp_path, capsys
):
    shutil.copytree(uninterrupted / "fixed", tmp_path / "fixed")
    arguments = [*SMALL, "--data", str(data), "--output", str(tmp_path)]
    assert train_lm.main([*arguments, "--steps", "48", "--recompute"]) == 0
    assert "weights, step 36 of 48" in capsys.readouterr().out
    curve = read_curve(tmp_path)
    assert curve[:6] == read_curve(uninterrupted)
    assert [row["step"] for row in curve[6:]] == [42, 48]
    with pytest.raises(SystemExit):
        train_lm.main([*arguments, "--steps", "36"])
    error = capsys.readouterr().err
    assert "steps must be at least 48, which the run in" in error and "got 36" in error


def test_another_run_gives_its_weights(uninterrupted, train_lm, data, tmp_path, capsys):
    """To a longer time, another pattern and other data; the sizes are the run's own."""
    other = tmp_path / "data"
    other.write_bytes(data.read_bytes().upper())
    arguments = ["--start-from", str(uninterrupted / "fixed"), "--data", str(other)]
    arguments += f"--output {tmp_path} --time 96 --attention local".split()
    arguments += "--batch 4 --eval-batches 1 --steps 2 --steps-per-epoch 1".split()
    assert train_lm.main([*arguments, "--learning-rate", "1e-9"]) == 0
    source = train_lm.load_model(uninterrupted / "fixed")
    model = train_lm.load_model(tmp_path / "local")
    assert model.get_config()["attention"] == "local" and model.time == 96
    want = {weight.path: weight.numpy() for weight in source.weights}
    positions = source.position_embedding.embeddings.path
    want[positions] = np.concatenate([want[positions], want[positions][:32]])
    for weight, array in zip(model.weights, want.values()):
        np.testing.assert_allclose(
            weight.numpy(), array, atol=1e-6, err_msg=weight.path
        )
    with pytest.raises(SystemExit):
        train_lm.main([*arguments, "--width", "64"])
    error = capsys.readouterr().err
    assert "source must have the same sizes: width = 32 there, 64 here" in error


@pytest.fixture(scope="module")
def loss_by_position():
    with example("loss_by_position") as module:
        yield module


def test_loss_by_position_is_that_of_the_model(
    uninterrupted, train_lm, loss_by_position, data, tmp_path, capsys
):
    folder, output = uninterrupted / "fixed", tmp_path / "positions.json"
    options = ["--data", str(data), "--output", str(output)]
    assert loss_by_position.main([str(folder), *options]) == 0
    (row,) = json.loads(output.read_text())[str(folder)]
    assert f"{row['bits_per_byte']:.3f} to 64" in capsys.readouterr().out

    test = np.frombuffer(train_lm.split(data.read_bytes())[2], np.uint8)
    count = (len(test) - 1) // 64
    tokens = np.stack([test[64 * i : 64 * i + 65] for i in range(count)]).astype(int)
    logits = np.float64(train_lm.load_model(folder).predict(tokens[:, :-1], verbose=0))
    bits = np.log2(np.exp(logits).sum(-1))
    bits -= np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0] / np.log(2)
    assert row == {
        "from": 0,
        "to": 64,
        "bits_per_byte": pytest.approx(bits.mean(), abs=1e-4),
    }


def test_ranges_of_positions_double(loss_by_position):
    rows = loss_by_position.in_ranges(np.arange(200.0))
    assert [tuple(row.values()) for row in rows] == [
        (0, 64, 31.5),
        (64, 128, 95.5),
        (128, 200, 163.5),
    ]


def test_loss_by_position_wants_the_data_of_the_run(
    uninterrupted, loss_by_position, tmp_path, capsys
):
    other = tmp_path / "other"
    other.write_bytes(bytes(2000))
    for arguments, message in (
        (
            [str(uninterrupted / "fixed"), "--data", str(other)],
            "holds a run of other data",
        ),
        ([str(tmp_path)], "has no config.json"),
    ):
        with pytest.raises(SystemExit, match="2"):
            loss_by_position.main(arguments)
        assert message in capsys.readouterr().err


def test_default_data_are_the_sources_of_python(train_lm):
    data = train_lm.read_data(None)
    assert len(data) > 5e6
    assert data.index(b"class Popen") < data.index(b"class ZipFile")  # in order
    assert b"class BaseTestUUID" not in data


def test_what_a_model_should_beat(train_lm):
    """Two bytes in turn are sure after each other; a random byte has 8 bits."""
    noise = np.random.RandomState(0).bytes(20000)
    got = train_lm.bits_per_byte_of_others(b"ab" * 10000, b"ab" * 5000)
    assert list(got) == ["bigram table", "bzip2", "xz"]
    assert got["bigram table"] < 0.001 and got["bzip2"] < 0.05 and got["xz"] < 0.2
    got = train_lm.bits_per_byte_of_others(noise, noise)
    assert 5 < got["bigram table"] < 8 and got["bzip2"] > 8 and got["xz"] > 8


def test_batches_depend_on_seed_and_step_alone(train_lm):
    data = bytes(range(256)) * 4
    training = {"seed": 3, "batch": 2, "steps": 6}
    whole = list(train_lm.batches(data, 16, training, 0).as_numpy_iterator())
    rest = list(train_lm.batches(data, 16, training, 4).as_numpy_iterator())
    assert len(whole) == 6 and len(rest) == 2
    np.testing.assert_array_equal(whole[4:], rest)
    other = train_lm.batches(data, 16, {**training, "seed": 4}, 0)
    assert (next(other.as_numpy_iterator())[0] != whole[0][0]).any()
    for inputs, targets in whole:
        np.testing.assert_array_equal((inputs + 1) % 256, targets)


# ---- several devices ----


def test_mirrored_devices_train_as_one(uninterrupted, data, tmp_path):
    finish(start(tmp_path, data, "--strategy", "mirrored"))
    assert_same_curve(read_curve(tmp_path), read_curve(uninterrupted))


def start_workers(output, data):
    ports = []
    for _ in range(2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    workers = [f"127.0.0.1:{port}" for port in ports]
    return [
        start(
            output,
            data,
            "--strategy",
            "multiworker",
            TF_CONFIG=json.dumps(
                {
                    "cluster": {"worker": workers},
                    "task": {"type": "worker", "index": index},
                }
            ),
        )
        for index in range(2)
    ]


def test_two_workers_train_as_one_after_one_was_killed(uninterrupted, data, tmp_path):
    chief, other = start_workers(tmp_path, data)
    wait_for_epochs(chief, tmp_path, 2)
    other.kill()
    other.communicate()
    assert 2 <= len(read_curve(tmp_path)) < 6
    again = start_workers(tmp_path, data)  # while the chief sees that it is alone
    chief.communicate(timeout=120)
    assert chief.returncode != 0
    for process in again:
        assert "step 0 of" not in finish(process)
    assert_same_curve(read_curve(tmp_path), read_curve(uninterrupted))


# ---- errors ----


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--heads", "5"], "width must be a multiple of 8 * heads = 40, got 32"),
        (["--time", "-8"], "time must be a positive integer, got -8"),
        (["--local-attn-ctx", "20"], "must be a multiple of block_size=8, got 20"),
        (["--num-verts", "3"], "heads must be a multiple of num_verts=3, got 4"),
        (["--attention", "dense,global"], "attention must be of ['dense', "),
        (["--data", "nowhere"], "No such file or directory: 'nowhere'"),
        (["--data", os.devnull], "at least 1300 bytes for time=64, got 0"),
        (["--time", "100000"], "bytes for time=100000, got"),
        (["--batch", "0"], "batch must be a multiple of the 1 devices, got 0"),
        (["--steps", "41"], "steps must be a multiple of steps_per_epoch=6, got 41"),
        (["--strategy", "multiworker"], "needs the environment's TF_CONFIG"),
        (["--dtype", "float17"], "float17"),
        (["--start-from", "nowhere"], "must hold a run of train_lm.py, has no config"),
    ],
)
def test_wrong_arguments_end_it_before_it_trains(
    arguments, message, train_lm, data, tmp_path, capsys
):
    output = tmp_path / "output"
    defaults = [*SMALL, "--data", str(data), "--output", str(output)]
    with pytest.raises(SystemExit) as ended:
        train_lm.main([*defaults, *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_checkpoint_of_another_configuration_is_an_error(
    uninterrupted, train_lm, data, capsys
):
    arguments = [*SMALL, "--data", str(data), "--output", str(uninterrupted)]
    with pytest.raises(SystemExit):
        train_lm.main([*arguments, "--width", "64", "--seed", "1"])
    error = capsys.readouterr().err
    assert "holds a run of another configuration" in error
    assert "width = 32 there, 64 here; seed = 0 there, 1 here" in error
