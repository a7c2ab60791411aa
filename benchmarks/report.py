"""Turns reports of `cpu.py` and `gpu.py` into text and a picture.

    python benchmarks/report.py benchmarks/results/cpu_*.json docs/cpu.png

draws again what was measured before, in one run or in several that each took some of the
lengths.
"""

import itertools
import json
import os
import re
import subprocess
import sys

OURS = "ours"
PHASES = {"fwd": "forward", "fwd+bwd": "forward + backward"}

# ---- text ----


def as_text(row):
    """One line of the tables that `cpu.py` prints."""
    head = "{mode:7} {dtype:8} {q_len:>6,} {phase:7}  {contender:21} ".format(**row)
    if "error" in row:
        return head + row["error"]
    if "speedup" in row:
        return head + "{ms:9.2f} ms, {speedup:.2f} times as fast".format(**row)
    memory = (
        "{MB:10,.1f} MB beside inputs and results".format(**row) if "MB" in row else ""
    )
    if "ms" not in row:
        return head + memory
    text = "{ms:9.2f} ms ({ms_low:.2f} to {ms_high:.2f})".format(**row)
    rate = "{gflops:4.0f} GFLOP/s, {share_of_matmul:4.0%} of matmul".format(**row)
    return f"{head}{text:34} {row['times_first']:6.2f} times ours, {rate}{memory}"


def summary(report, q_len):
    """Markdown: everybody's ms and ours relative to it, at one length; our growth."""
    rows = [r for r in report["speed"] if "ms" in r]
    at_length = [r for r in rows if r["q_len"] == q_len]
    tables = [_table(at_length, f"ms at {q_len:,}", "contender", "{ms:.3g}".format)]
    ratios = [r for r in at_length if r["contender"] != OURS]
    tables += [_table(ratios, "times ours", "contender", "{times_first:.2f}".format)]
    ours = [r for r in rows if r["contender"] == OURS and r["q_len"] >= q_len]
    start = {_curve(r): r["ms"] / q_len for r in ours if r["q_len"] == q_len}

    def growth(ms, q_len, **row):
        return f"{ms / q_len / start[_curve(row)]:.2f}"

    longer = [r for r in ours if r["q_len"] > q_len]
    tables += [_table(longer, "growth of ms per position", "q_len", growth)]
    return "\n\n".join(filter(None, tables))


def shapes_summary(report):
    """Markdown: everybody's ms, a table for each shape."""
    groups = {}
    for r in report["speed"]:
        if "ms" in r:
            shape = "{batch} x {q_len:,}, {heads} heads of {head_dim}".format(**r)
            groups.setdefault(shape, []).append(r)
    return "\n\n".join(
        _table(rows, shape, "contender", "{ms:.3g}".format)
        for shape, rows in groups.items()
    )


def _curve(row):
    return row["mode"], row["dtype"], row["phase"]


def _table(rows, title, column, cell):
    """A line for each mode and dtype; cells hold forward / forward+backward."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(r[column] for r in rows))
    lines = [[title, *map(str, columns)], ["---"] * (1 + len(columns))]
    for mode, dtype in dict.fromkeys((r["mode"], r["dtype"]) for r in rows):
        cells = {}
        for r in rows:
            if (r["mode"], r["dtype"]) == (mode, dtype):
                cells.setdefault(r[column], []).append(cell(**r))
        cells = [" / ".join(cells.get(c, ["–"])) for c in columns]
        lines.append([f"{mode}, {dtype}", *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- picture ----

# Ours stands out; of each framework the peers share a hue.
STYLES = {
    "ours": dict(color="#c1272d", marker="o", linewidth=2.6, markersize=6, zorder=5),
    "ours, three ops": dict(color="#e58a8d", marker="o"),
    "TF dense": dict(color="#e07b00", marker="s"),
    "TF dense, XLA": dict(color="#f3b562", marker="s"),
    "TF gather": dict(color="#3a7d44", marker="^"),
    "TF gather, XLA": dict(color="#8fc093", marker="^"),
    "PyTorch SDPA": dict(color="#1f5fa8", marker="D"),
    "FlexAttention": dict(color="#6f4fa8", marker="v"),
    "FlexAttention, chunks": dict(color="#b9a3dc", marker="v"),
    "PyTorch cuDNN": dict(color="#1f5fa8", marker="D"),
    "PyTorch FlashAttention-2": dict(color="#86a9d4", marker="D"),
}


def draw(report, path):
    """Draws time over length, for each mode and phase, and the limit by matmul rate.

    Args:
      report: What was measured, a dict; rows of another shape are left out. The dtype
        of the first row is everybody's; another one is drawn for ours alone.
      path: Of the picture; its ending says the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    same = {n: report["shape"][n] for n in ("heads", "head_dim", "local_attn_ctx")}
    rows = [
        r
        for r in report["speed"]
        if "ms" in r and r["contender"] in STYLES and same.items() <= r.items()
    ]
    modes, dtypes = (list(dict.fromkeys(r[x] for r in rows)) for x in ("mode", "dtype"))
    panels = list(itertools.product(PHASES, modes))
    figure, axes = plt.subplots(
        len(PHASES),
        len(modes),
        figsize=(1 + 3.4 * len(modes), 7.6),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    lines = {}
    for axis, (phase, mode) in zip(axes.flat, panels):
        here = [r for r in rows if (r["phase"], r["mode"]) == (phase, mode)]
        lines.update(_draw_panel(axis, here, dtypes))
    for axis, mode in zip(axes[0], modes):
        axis.set_title(mode, fontweight="bold")
    for axis, phase in zip(axes[:, 0], PHASES):
        axis.set_ylabel(PHASES[phase] + ", ms")
        axis.set_ylim(bottom=0.6 * min(r["ms"] for r in rows if r["phase"] == phase))
    for axis in axes[-1]:
        axis.set_xlabel(x_label(report["shape"]["batch"]))
    figure.legend(
        lines.values(), lines, loc="outside lower center", ncols=6, frameon=False
    )
    figure.suptitle(_caption(report), fontsize=11)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def x_label(batch):
    """str: of the axis; where the batch is not a number it depends on the length."""
    return "sequence length" + (f"; batch {batch}" if isinstance(batch, str) else "")


def _draw_panel(axis, rows, dtypes):
    """Everybody in the first dtype, ours in the others too; returns `{label: line}`."""
    lines = {}
    for label, dtype in itertools.product(STYLES, dtypes):
        curve = [r for r in rows if (r["contender"], r["dtype"]) == (label, dtype)]
        if not curve or (dtype != dtypes[0] and label != OURS):
            continue
        x, y = [r["q_len"] for r in curve], [r["ms"] for r in curve]
        style = dict(dict(linewidth=1.4, markersize=4), **STYLES[label])
        if dtype != dtypes[0]:
            style.update(linestyle=(0, (3, 1.5)), linewidth=1.6, markerfacecolor="w")
            label += f", {dtype}"
        elif label == OURS:
            limit = [r["ms"] * r["share_of_matmul"] for r in curve]
            lines[f"beyond the {dtype} matmul rate"] = axis.fill_between(
                x, limit, 1e-9, color="#e4e4e4", linewidth=0
            )
        (lines[label],) = axis.plot(x, y, **style)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(
        lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}"
    )
    axis.yaxis.set_major_formatter(lambda ms, _: f"{ms:,g}")
    axis.grid(alpha=0.3, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return lines


def _caption(report):
    about = dict(report["machine"], **report["shape"])
    about["frameworks"] = ", ".join(about["frameworks"])
    place = "{threads} threads of {cpu}" if "cpu" in about else "one {gpu}"
    dtype = report["speed"][0]["dtype"]
    return (
        f"Attention on {place}, {{frameworks}}\n"
        f"{dtype} unless said; batch {{batch}}, {{heads}} heads of {{head_dim}}, "
        "local_attn_ctx {local_attn_ctx}, block size {block_size}; {date}, {commit}"
    ).format(**about)


def file_name(kind, *words):
    """Of a report: "gpu_nvidia_h100_2026_11_24.json"."""
    words = re.findall(r"[a-z0-9]+", " ".join(words).lower())
    return "_".join([kind, *words]) + ".json"


def commit():
    """Of the sources here; "unknown" where git does not know them."""
    folder = os.path.dirname(os.path.abspath(__file__))
    describe = ["git", "-C", folder, "describe", "--always", "--dirty"]
    printed = subprocess.run(describe, stdout=subprocess.PIPE).stdout
    return printed.decode().strip() or "unknown"


def main(paths, picture):
    reports = []
    for path in paths:
        with open(path) as file:
            reports.append(json.load(file))
    rows = [row for report in reports for row in report["speed"]]
    rows.sort(key=lambda row: row["q_len"])
    draw(dict(reports[0], speed=rows), picture)


if __name__ == "__main__":
    main(sys.argv[1:-1], sys.argv[-1])
