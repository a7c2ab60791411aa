"""Small pictures to train on, and pictures of many of them.

Photographs are shrunk by a few factors and cut into squares. A tenth of each photograph's
area, in tiles, is kept for validation, and a tenth for tests: no square of one part lies on
a tile of another.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

try:
    from PIL import Image
except ImportError as error:
    raise ImportError(
        "pictures are read and written by Pillow, which does not import; `pip install "
        "pillow`, or `pip install matplotlib`, which brings it and a photograph"
    ) from error

FACTORS = (2, 4)  # that photographs are shrunk by; each divides the last
PARTS = ("train", "valid", "test")
CIFAR_SIZE = 32
CIFAR_RECORD = 1 + 3 * CIFAR_SIZE**2  # a label, then all red, all green, all blue
# Photographs that packages bring: package, folder in it, files.
SAMPLES = (
    (
        "skimage",
        "data",
        ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png")
        + ("rocket.jpg",),
    ),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
    ("matplotlib", "mpl-data/sample_data", ("grace_hopper.jpg",)),
)


class Pictures(NamedTuple):
    """Each part is uint8 [pictures, size, size, 3]."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def read(path, size):
    """Pictures of size x size from a folder, and what they are, in words.

    Args:
      path: A folder of PNG or JPEG files, or of CIFAR-10's binary version; None: the
        photographs that an installed package brings.

    Raises:
      ValueError: If there are too few, or CIFAR-10 is there in Python's pickles.
      OSError: If a file cannot be read.
    """
    if path is None:
        files, words = sample_photographs()
        return cut(files, size), words
    if any(path.glob("data_batch_*.bin")):
        return read_cifar(path, size), f"CIFAR-10 in {path}"
    if any(path.glob("data_batch_*")):
        raise ValueError(
            f"data must hold CIFAR-10's binary version (data_batch_1.bin, ...), got its "
            f"pickles in {path}, which may run any code when they are read"
        )
    files = sorted(
        file
        for file in path.iterdir()
        if file.suffix.lower() in (".png", ".jpg", ".jpeg")
    )
    if not files:
        raise ValueError(
            f"data must be a folder of PNG or JPEG files, got none in {path}"
        )
    return cut(files, size), f"{len(files)} files in {path}"


def sample_photographs():
    """The files of the first package that is installed, and what they are, in words."""
    for package, folder, names in SAMPLES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        files = [Path(spec.origin).parent / folder / name for name in names]
        files = [file for file in files if file.exists()]
        if files:
            listed = ", ".join(file.name for file in files)
            return files, f"the photographs of {package}: {listed}"
    raise ValueError("data must be a folder: no installed package brings photographs")


# ---- photographs ----


def cut(files, size):
    """`Pictures` of size x size from photographs, as the top of this file says."""
    found = {part: [] for part in PARTS}
    tiles = 0
    for file in files:
        with Image.open(file) as image:
            photograph = image.convert("RGB")
        factors = [f for f in FACTORS if size * f <= min(photograph.size)]
        if not factors and size <= min(photograph.size):
            factors = [1]
        if not factors:
            continue
        side = size * factors[-1]
        rows, columns = photograph.height // side, photograph.width // side
        parts = part_of_tile(tiles + np.arange(rows * columns)).reshape(rows, columns)
        tiles += rows * columns
        photograph = photograph.crop((0, 0, columns * side, rows * side))
        for factor in factors:
            array = np.asarray(photograph.reduce(factor) if factor > 1 else photograph)
            for part, squares in found.items():
                stride = max(1, size // 4) if part == "train" else size
                corners = corners_in(parts == part, side // factor, size, stride)
                squares += [array[y : y + size, x : x + size] for y, x in corners]
    missing = [part for part, squares in found.items() if not squares]
    if missing:
        raise ValueError(
            f"data must have at least 10 tiles of {size} x {size} pixels or more, one of "
            f"them to validate and one to test, got {tiles} in {len(files)} files; "
            "choose a smaller --size"
        )
    return Pictures(*(np.stack(found[part]) for part in PARTS))


def part_of_tile(number):
    """Every ninth of ten is to validate, every tenth to test."""
    return np.array(PARTS)[np.maximum(number % 10 - 7, 0)]


def corners_in(tiles, side, size, stride):
    """(y, x) of the squares that lie on True tiles alone.

    Args:
      tiles: bool [rows, columns].
      side: Of a tile, in pixels.
      size: Of a square.
      stride: Between squares.
    """
    is_inside = tiles.repeat(side, 0).repeat(side, 1)
    rows, columns = is_inside.shape
    for y in range(0, rows - size + 1, stride):
        for x in range(0, columns - size + 1, stride):
            if is_inside[y : y + size, x : x + size].all():
                yield y, x


# ---- CIFAR-10 ----


def read_cifar(path, size):
    """`Pictures`: of those to train on, the last tenth is to validate."""
    if CIFAR_SIZE % size:
        raise ValueError(f"size must divide CIFAR-10's {CIFAR_SIZE}, got {size}")
    train = np.concatenate([records(f) for f in sorted(path.glob("data_batch_*.bin"))])
    if len(train) < 10:
        raise ValueError(f"data must hold at least 10 pictures, got {len(train)}")
    tests = records(path / "test_batch.bin")
    start = len(train) * 9 // 10
    parts = train[:start], train[start:], tests
    return Pictures(*(shrunk(part, CIFAR_SIZE // size) for part in parts))


def records(file):
    data = np.frombuffer(file.read_bytes(), np.uint8)
    if not len(data) or len(data) % CIFAR_RECORD:
        raise ValueError(
            f"{file} must hold records of {CIFAR_RECORD} bytes, got {len(data)} bytes"
        )
    channels = data.reshape(-1, CIFAR_RECORD)[:, 1:]
    channels = channels.reshape(-1, 3, CIFAR_SIZE, CIFAR_SIZE)
    return np.ascontiguousarray(channels.transpose(0, 2, 3, 1))


def shrunk(pictures, factor):
    count, size, _, channels = pictures.shape
    small = size // factor
    squares = pictures.reshape(count, small, factor, small, factor, channels)
    return np.uint8(np.rint(squares.mean((2, 4))))


# ---- pictures of pictures ----


def save_grid(path, pictures, scale):
    """Writes a table of pictures as one.

    Args:
      pictures: uint8 [rows, columns, size, size, 3].
      scale: By which a pixel's side is enlarged.
    """
    pictures = pictures.repeat(scale, axis=2).repeat(scale, axis=3)
    gap = [(0, 0), (0, 0), (scale, 0), (scale, 0), (0, 0)]
    framed = np.pad(pictures, gap, constant_values=255)
    rows, columns, height, width, _ = framed.shape
    table = framed.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    Image.fromarray(
        np.pad(table, [(0, scale), (0, scale), (0, 0)], constant_values=255)
    ).save(path)
