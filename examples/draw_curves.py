"""Draws training curves: bits per byte over steps and over seconds.

    python examples/draw_curves.py benchmarks/results/train_lm_h100.json docs/train_gpu.png

draws those of a report again; `train_lm.py` draws those of its runs.
"""

import json
import sys


def draw(curves, config, data, path, device=None):
    """Draws the curves of some patterns, which had the same data and model.

    Args:
      curves: {pattern: [{"step", "seconds", "train", "valid"} of each epoch]}.
      config: What `train_lm.py` keeps as config.json, of any of the patterns.
      data: What was learned, in words.
      path: Of the picture; its ending says the format.
      device: What it ran on, in words.

    Where there is no matplotlib it says so on stderr: a run is not lost by that.
    """
    try:
        import matplotlib
    except ImportError:
        sys.stderr.write(
            f"{path} is not drawn, as there is no matplotlib; `pip install matplotlib`, "
            "and the same command draws it\n"
        )
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 2, figsize=(10, 4.6), sharey=True, layout="constrained"
    )
    for name, curve in curves.items():
        start = curve[0]["seconds"]
        for axis, x in zip(
            axes,
            ([row["step"] for row in curve], [row["seconds"] - start for row in curve]),
        ):
            (line,) = axis.plot(x, [row["valid"] for row in curve], label=name)
            axis.plot(x, [row["train"] for row in curve], ":", color=line.get_color())
    first = next(iter(curves.values()))[0]["step"]
    axes[0].set_xlabel("step")
    axes[1].set_xlabel(f"seconds since step {first}, so without TensorFlow's tracing")
    axes[0].set_ylabel("bits per byte (dotted: in training)")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title(config, data, device), fontsize=11)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def title(config, data, device=None):
    """Two lines: the data and where it ran; the model."""
    model, training = config["model"], config["training"]
    first = f"Bits per byte of {data}, {training['data_bytes'] / 1e6:.3g} MB"
    return (
        first
        + (f", on {device}" if device else "")
        + (
            "\n{layers} layers of width {width}, {heads} heads, {time:,} positions, "
            "local_attn_ctx {local_attn_ctx}, blocks of {block_size}, {dtype}; "
            "batch {batch}, learning rate {learning_rate:g}"
        ).format(**model, **training)
    )


def main(report, path):
    with open(report) as file:
        report = json.load(file)
    about = report["data"], path, report["device"]
    draw(report["curves"], report["config"], *about)


if __name__ == "__main__":
    main(*sys.argv[1:])
