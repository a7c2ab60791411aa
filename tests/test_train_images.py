"""The example that learns images: its data, a run to the end and over an interruption."""

import importlib
import json
import os
import runpy
import sys

import numpy as np
import pytest
from example_helpers import FOLDER, example, read_weights

SIZE = 8
SMALL = (
    f"--size {SIZE} --layers 1 --width 16 --heads 2 --block-size 8 --batch 2 --steps 4 "
    "--steps-per-epoch 2 --eval-batches 1"
).split()


@pytest.fixture(scope="module")
def train_images():
    with example("train_images") as module:
        yield module


@pytest.fixture(scope="module")
def pictures(train_images):
    return train_images.pictures


def save(path, pixels):
    from PIL import Image

    Image.fromarray(np.uint8(pixels)).save(path)


def load(path):
    from PIL import Image

    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of photographs, 24 tiles in all: slopes of some colour, with noise."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
    for number in range(6):
        slope = np.add.outer(np.arange(70), np.arange(64))[:, :, None]
        pixels = slope * random.random_sample(3) + random.randint(99, size=(70, 64, 3))
        save(folder / f"{number}.{'png' if number else 'JPG'}", pixels)
    return folder


@pytest.fixture(scope="module")
def whole(train_images, data, tmp_path_factory):
    """The folder of a run from beginning to end."""
    output = tmp_path_factory.mktemp("whole")
    assert (
        train_images.main([*SMALL, "--data", str(data), "--output", str(output)]) == 0
    )
    return output / "strided"


# ---- a run ----


def test_it_learns_and_leaves_pictures(whole, train_images, pictures, data):
    curve = json.loads((whole / "curve.json").read_text())
    assert [row["step"] for row in curve] == [2, 4]
    assert 4 < curve[1]["valid"] < curve[0]["valid"] < 9
    assert (whole.parent / "curves.png").exists()
    config = json.loads((whole / "config.json").read_text())["model"]
    assert config["attention"] == "local,strided" and config["local_attn_ctx"] == 24
    assert config["time"] == 192 and config["position_axes"] == [8, 8, 3]
    side = 96 + 12  # each pixel is enlarged by 12, as is the gap
    assert load(whole / "samples.png").shape == (4 * side + 12, 8 * side + 12, 3)
    table = load(whole / "completions.png")[12::12, 12::12]
    rows, columns = train_images.COMPLETIONS
    table = table[: rows * 9, : (columns + 2) * 9].reshape(rows, 9, -1, 9, 3)
    table = table[:, :SIZE, :, :SIZE].swapaxes(1, 2)  # [rows, columns, y, x, 3]
    given, *completed, original = table.swapaxes(0, 1)
    test = pictures.read(data, SIZE)[0].test
    np.testing.assert_array_equal(original[[0, -1]], test[[0, -1]])
    for image in (given, *completed):
        np.testing.assert_array_equal(image[:, :4], original[:, :4])
    assert (given[:, 4:] == 128).all()
    assert (completed[0] != completed[1]).any() and (completed[0] != original).any()


def test_an_interruption_changes_nothing(
    whole, train_images, data, tmp_path, capsys, monkeypatch
):
    def stop(keeper, epoch, logs=None):
        save_epoch(keeper, epoch, logs)
        raise KeyboardInterrupt

    training = importlib.import_module("training")
    save_epoch = training.Keeper.on_epoch_end
    arguments = [*SMALL, "--data", str(data), "--output", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(training.Keeper, "on_epoch_end", stop)
        assert train_images.main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert train_images.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "weights, step 2 of 4" in printed and "bits per dim on the test" in printed
    got, want = read_weights(tmp_path / "strided"), read_weights(whole)
    assert len(want) > 30 and set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], name)
    for name in ("samples.png", "completions.png"):
        np.testing.assert_array_equal(
            load(tmp_path / "strided" / name), load(whole / name)
        )


# ---- tokens ----


def test_tokens_are_shifted_by_one_and_batches_depend_on_seed_and_step(train_images):
    images = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    training = {"seed": 3, "batch": 2, "steps": 6, "eval_batches": 2}
    inputs, targets = train_images.next_tokens(images)
    np.testing.assert_array_equal(targets, images.reshape(5, 48))
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    assert (inputs[:, 0] == train_images.START).all()
    whole = list(train_images.batches(images, training, 0).as_numpy_iterator())
    rest = list(train_images.batches(images, training, 4).as_numpy_iterator())
    assert len(whole) == 6
    np.testing.assert_array_equal(whole[4:], rest)
    known = {image.tobytes() for side in (images, images[:, :, ::-1]) for image in side}
    drawn = {np.uint8(row).tobytes() for _, targets in whole for row in targets}
    assert drawn <= known and len(drawn) > 5
    (first, second) = train_images.eval_batches(images, training).as_numpy_iterator()
    np.testing.assert_array_equal(first[1], targets[:2])
    np.testing.assert_array_equal(second[1], targets[[2, 4]])


# ---- data ----


def test_parts_of_a_photograph_share_no_pixel(pictures, tmp_path):
    size, side = 6, 24  # of squares; of tiles, for the largest factor, 4
    numbers = np.arange(5 * 7).reshape(5, 7)
    pixels = numbers.repeat(side, 0).repeat(side, 1)[:, :, None] + [0, 100, 200]
    save(tmp_path / "tiles.png", np.pad(pixels, [(0, 9), (0, 5), (0, 0)]))
    read, words = pictures.read(tmp_path, size)
    assert words == f"1 files in {tmp_path}"
    parts = 3 * [*(8 * ["train"]), "valid", "test"] + 5 * ["train"]
    for name, squares in zip(pictures.PARTS, read):
        assert squares.dtype == np.uint8 and squares.shape[1:] == (size, size, 3)
        seen = squares[..., 0]
        np.testing.assert_array_equal(
            squares - seen[..., None], squares * 0 + [0, 100, 200]
        )
        assert {*seen.flat} == {n for n, part in enumerate(parts) if part == name}
        if name != "train":  # of each tile one square, and four of it half as small
            assert len(squares) == 5 * len({*seen.flat})
        else:
            assert any(len({*square.flat}) > 1 for square in seen)


def test_small_pictures_are_parted_as_they_are(pictures, tmp_path):
    for number in range(10):
        save(tmp_path / f"{number}.png", np.full([9, 8, 3], number))
    save(tmp_path / "a.png", np.zeros([5, 50, 3]))  # too small
    read, _ = pictures.read(tmp_path, SIZE)
    assert [sorted({*part.flat}) for part in read] == [[*range(8)], [8], [9]]


def test_without_a_folder_there_are_photographs(pictures):
    read, words = pictures.read(None, 16)
    assert "the photographs of " in words
    assert all(part.shape[1:] == (16, 16, 3) and part.std() > 20 for part in read)


def cifar(count, seed):
    random = np.random.RandomState(seed)
    pixels = random.randint(256, size=[count, 32, 32, 3]).astype(np.uint8)
    planes = pixels.transpose(0, 3, 1, 2).reshape(count, -1)
    labels = np.full([count, 1], 7, np.uint8)
    return pixels, np.concatenate([labels, planes], axis=1).tobytes()


def test_cifar_is_read_from_its_binary_version(pictures, tmp_path):
    parts = [cifar(10, seed) for seed in range(3)]
    for (_, file), name in zip(parts, ("data_batch_1", "data_batch_2", "test_batch")):
        (tmp_path / f"{name}.bin").write_bytes(file)
    read, words = pictures.read(tmp_path, 32)
    train = np.concatenate([parts[0][0], parts[1][0]])
    for got, want in zip(read, (train[:18], train[18:], parts[2][0])):
        np.testing.assert_array_equal(got, want)
    assert words == f"CIFAR-10 in {tmp_path}"
    small = pictures.read(tmp_path, 16)[0].test
    means = parts[2][0].astype(float).reshape(10, 16, 2, 16, 2, 3).mean((2, 4))
    np.testing.assert_array_equal(small, np.rint(means))


def test_a_cifar_that_cannot_be_read_is_an_error(pictures, tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"")
    with pytest.raises(ValueError, match="binary version .*, got its pickles in"):
        pictures.read(tmp_path, 32)
    (tmp_path / "data_batch_1.bin").write_bytes(cifar(10, 0)[1])
    with pytest.raises(OSError, match="test_batch.bin"):
        pictures.read(tmp_path, 32)
    (tmp_path / "test_batch.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match="records of 3073 bytes, got 5 bytes"):
        pictures.read(tmp_path, 32)
    with pytest.raises(ValueError, match="size must divide CIFAR-10's 32, got 24"):
        pictures.read(tmp_path, 24)


# ---- errors ----


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--heads", "3"], "width must be a multiple of 8 * heads = 24, got 16"),
        (
            ["--block-size", "12"],
            "block_size must be one of [8, 16, 32, 64, 128], got 12",
        ),
        (["--size", "7"], "size must be even, got 7"),
        (["--size", "0"], "size must be at least 1, got 0"),
        (["--size", "32"], "at least 10 tiles of 32 x 32 pixels or more"),
        (["--steps", "5"], "steps must be a multiple of steps_per_epoch=2, got 5"),
        (["--batch", "0"], "batch must be at least 1, got 0"),
        (["--attention", "global"], "invalid choice: 'global'"),
        (["--data", "nowhere"], "No such file or directory: 'nowhere'"),
        (["--data", FOLDER], "data must be a folder of PNG or JPEG files, got none"),
        (["--dtype", "float17"], "float17"),
    ],
)
def test_wrong_arguments_end_it_before_it_trains(
    arguments, message, train_images, data, tmp_path, capsys
):
    output = tmp_path / "output"
    defaults = [*SMALL, "--data", str(data), "--output", str(output)]
    with pytest.raises(SystemExit) as ended:
        train_images.main([*defaults, *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_a_run_of_another_configuration_is_an_error(whole, train_images, data, capsys):
    arguments = [*SMALL, "--data", str(data), "--output", str(whole.parent)]
    with pytest.raises(SystemExit):
        train_images.main([*arguments, "--width", "32"])
    error = capsys.readouterr().err
    assert "holds a run of another configuration: width = 16 there, 32 here" in error


def test_without_pillow_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)  # what a failed import leaves
    with pytest.raises(ImportError, match="pip install pillow"):
        runpy.run_path(os.path.join(FOLDER, "pictures.py"))
