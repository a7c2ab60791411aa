"""The folder of a run: it goes on from there, and others read the model from there.

config.json              what was asked for: {"model": ..., "training": ...}
checkpoint.weights.h5    model and optimizer as of the last epoch
curve.json               steps, seconds and bits per byte of each epoch
"""

import json
import time

import keras

import sparse_attention as sa

CHECKPOINT = "checkpoint.weights.h5"
# A run goes on to more steps, and recomputation changes no number.
MAY_CHANGE = ("steps", "recompute")


def check_folder(folder, config):
    """Raises if the folder holds a run that this one cannot go on from."""
    if not (folder / "config.json").exists():
        return
    found = differences(read_config(folder), config, but=MAY_CHANGE)
    if found:
        raise ValueError(
            f"{folder} holds a run of another configuration: {'; '.join(found)}; "
            "choose another --output"
        )
    curve, steps = read_curve(folder), config["training"]["steps"]
    if curve and steps < curve[-1]["step"]:
        raise ValueError(
            f"steps must be at least {curve[-1]['step']}, which the run in {folder} has "
            f"behind it, got {steps}; choose another --output"
        )


def differences(saved, config, but):
    """[str]: the settings in which two configurations differ, apart from some."""
    return [
        f"{name} = {saved[part].get(name)} there, {value} here"
        for part in config
        for name, value in config[part].items()
        if name not in but and saved[part].get(name) != value
    ]


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def read_curve(folder):
    path = folder / "curve.json"
    return json.loads(path.read_text()) if path.exists() else []


def load_model(folder):
    """The model of the run's last epoch."""
    config_file, weights = folder / "config.json", folder / CHECKPOINT
    for file in config_file, weights:
        if not file.exists():
            raise ValueError(
                f"{folder} must hold a run of train_lm.py, has no {file.name}"
            )
    model = sa.SparseTransformer(**read_config(folder)["model"])
    model.build([None, model.time])
    try:
        model.load_weights(weights)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{weights} holds a model of another configuration than {config_file}: {reason}"
        ) from error
    return model


class Keeper(keras.callbacks.Callback):
    """Keeps what a run needs to go on: a file is whole, or it is the one before."""

    def __init__(self, folder, config, is_chief):
        super().__init__()
        self.folder = folder
        self.config = config
        self.is_chief = is_chief
        self.checkpoint = folder / CHECKPOINT
        self.curve = []

    def restore(self, model):
        """Loads the checkpoint, if there is one; returns the steps behind it."""
        if not self.checkpoint.exists():
            return 0
        model.load_weights(self.checkpoint)
        step = int(model.optimizer.iterations.numpy())
        self.curve = [row for row in read_curve(self.folder) if row["step"] <= step]
        return step

    def on_train_begin(self, logs=None):
        self.write("config.json", json.dumps(self.config, indent=1))
        self.save()

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_test_begin(self, logs=None):  # validation is not counted
        self.seconds = time.perf_counter() - self.start

    def on_epoch_end(self, epoch, logs=None):
        before = self.curve[-1]["seconds"] if self.curve else 0
        self.curve.append(
            {
                "step": int(self.model.optimizer.iterations.numpy()),
                "seconds": before + self.seconds,
                "train": logs["bits_per_byte"],
                "valid": logs["val_bits_per_byte"],
            }
        )
        self.save()

    def save(self):
        """The curve first: rows that the checkpoint does not know are left out later."""
        self.write("curve.json", json.dumps(self.curve, indent=1))
        if self.is_chief:
            new = self.folder / "new.weights.h5"
            self.model.save_weights(new)
            new.replace(self.checkpoint)

    def write(self, name, text):
        if self.is_chief:
            self.folder.mkdir(parents=True, exist_ok=True)
            new = self.folder / "new.json"
            new.write_text(text)
            new.replace(self.folder / name)
