"""Draws speedup over devices: a column for each method, a line for each kind of mesh, and the ideal."""

import re
from collections.abc import Mapping

from matplotlib.figure import Figure

from mora_jax.errors import InputError
from train.jobs.plot import COLORS, GREY, style, write_png
from train.perf.bench.record import Record, label
from train.perf.bench.scaling_table import mesh_of


def plot(record: Record, png_path: str) -> None:
    """Draws the record of `mora bench scaling`.

    Raises:
      InputError: if no mesh was measured beside one device.
    """
    drawn = lines(record)
    if not drawn:
        raise InputError("nothing to draw yet: no mesh was measured beside one device")
    most = max(devices for found in drawn.values() for points in found.values() for devices in points)
    sizes = [2**i for i in range(most.bit_length())]
    figure = Figure(figsize=(4.4 * len(drawn) + 0.6, 4.4), dpi=150, layout="constrained")
    kinds = list(dict.fromkeys(kind for found in drawn.values() for kind in found))
    grid = figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(grid, drawn.items(), strict=True):
        axes.plot(sizes, sizes, "--", color=GREY, linewidth=1.2, label="ideal")
        for kind, points in found.items():
            color = COLORS[kinds.index(kind) % len(COLORS)]
            xs, ys = [1, *points], [1.0, *points.values()]
            axes.plot(xs, ys, "o-", color=color, markersize=4, linewidth=1.8, label=kind)
        style(axes)
        axes.set_title(name, fontsize=12)
        axes.set_xticks(sizes, [f"{size}" for size in sizes])
        axes.set_xlabel("devices", fontsize=12)
    grid[0].set_ylabel("tokens/s, times one device", fontsize=12)
    handles = {h.get_label(): h for axes in grid for h in axes.get_lines()}
    columns = 3 if len(drawn) == 1 else 5  # as many words as fit above the figure
    figure.legend(
        handles=list(handles.values()), loc="outside upper left", ncols=columns, fontsize=11, frameon=False
    )
    write_png(figure, png_path)


def lines(record: Record) -> Mapping[str, Mapping[str, Mapping[int, float]]]:
    """Returns speedups by method, kind of mesh ("data", "data x fsdp") and devices, without rows of flags."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in record.rows:
        if "speedup" in row and not row["what"].get("flags"):
            kind = re.sub(r" \d+", "", mesh_of(row))
            found.setdefault(label(row["what"]), {}).setdefault(kind, {})[row["devices"]] = row["speedup"]
    return {
        name: {kind: dict(sorted(points.items())) for kind, points in kinds.items()}
        for name, kinds in found.items()
    }
