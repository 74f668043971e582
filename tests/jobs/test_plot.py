import json
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from mora_jax.errors import InputError
from train.cli.main import main
from train.jobs import plot
from train.jobs.plot import COLORS, draw_runs, plot_loss, plot_runs


def write_run(path: Path, restarts: int = 2, validation: bool = True, broken: bool = False) -> str:
    """A run of 300 steps whose loss falls from 9."""
    lines = []
    for step in range(300):
        if restarts and step and step % (300 // (restarts + 1)) == 0:
            lines.append({"step": step, "restart": len(lines), "group_type": "1", "optimizer_cleared": 1.0})
        loss = 3 + 6 * math.exp(-step / 50) + 0.1 * math.sin(7 * step)
        lines.append({"step": step, "loss": "NaN" if broken and step == 150 else loss, "learning_rate": 1e-3})
        if validation and step % 50 == 49:
            lines.append({"step": step, "validation_loss": loss + 0.2})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def pixels_of(png: Path, color: str) -> np.ndarray:
    """Rows and columns of the pixels that have a colour, as an array (n, 2)."""
    image = imread(png)[..., :3]
    return np.argwhere(np.abs(image - to_rgb(color)).max(-1) < 0.02)


def test_a_run_is_drawn(tmp_path: Path):
    png = tmp_path / "sub" / "loss.png"
    plot_loss(write_run(tmp_path / "m.jsonl"), str(png))
    height, width, _ = imread(png).shape
    assert (height, width) == (975, 1500)
    loss = pixels_of(png, COLORS[0])
    assert len(loss) > 1000
    upper = loss[loss[:, 0] < 0.6 * height]
    left, right = upper[upper[:, 1] < 0.25 * width], upper[upper[:, 1] > 0.75 * width]
    assert left[:, 0].min() < right[:, 0].min() - 200  # the loss falls, and a picture's rows count downwards
    assert len(pixels_of(png, COLORS[1])) > 200
    assert not len(pixels_of(png, COLORS[2]))


def test_restarts_are_marked_in_both_panels(tmp_path: Path):
    columns = []
    for restarts in (0, 3):
        png = tmp_path / f"{restarts}.png"
        plot_loss(write_run(tmp_path / "m.jsonl", restarts), str(png))
        rows, at = pixels_of(png, plot.GREY).T
        values, counts = np.unique(at, return_counts=True)
        columns.append(values[counts > 200])
        if restarts:
            assert rows.max() > 0.8 * 975
    assert len(columns[0]) == 0
    # A line may be two pixels wide.
    assert np.sum(np.diff(columns[1], prepend=-9) > 2) == 3


@pytest.mark.slow  # the next test reads such values
def test_values_that_are_not_finite_leave_a_gap(tmp_path: Path):
    plot_loss(write_run(tmp_path / "m.jsonl", broken=True), str(tmp_path / "gap.png"))
    plot_loss(write_run(tmp_path / "m.jsonl"), str(tmp_path / "whole.png"))
    gap, whole = (len(pixels_of(tmp_path / name, COLORS[0])) for name in ("gap.png", "whole.png"))
    assert 0.9 * whole < gap < whole


def test_infinite_losses_are_gaps_too(tmp_path: Path):
    lines = [{"step": n, "loss": loss} for n, loss in enumerate([2.0, "Infinity", "-Infinity", "NaN", 1.0])]
    log = tmp_path / "m.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    np.testing.assert_array_equal(plot.read_curves(str(log)).loss[1], [2, np.nan, np.nan, np.nan, 1])


def test_smoothing_is_the_mean_of_the_neighbours():
    values = np.random.default_rng(0).normal(size=450)
    values[100] = np.nan
    smooth = plot.smooth(values)
    for i in (0, 1, 99, 200, 449):
        np.testing.assert_allclose(smooth[i], np.nanmean(values[max(i - 2, 0) : i + 3]))
    assert np.isnan(smooth[100])


@pytest.mark.slow  # test_mora_plot_draws_runs_that_train draws two
@pytest.mark.parametrize("validation", [True, False])
def test_several_runs_in_one_plot(tmp_path: Path, validation: bool):
    runs = {f"run {i}": write_run(tmp_path / f"{i}.jsonl", i, validation) for i in range(3)}
    # Only runs that differ can be seen side by side.
    for i, path in enumerate(runs.values()):
        lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
        moved = [{k: v + i if k.endswith("loss") else v for k, v in line.items()} for line in lines]
        Path(path).write_text("".join(json.dumps(line) + "\n" for line in moved))
    plot_runs(runs, str(tmp_path / "runs.png"))
    assert all(len(pixels_of(tmp_path / "runs.png", color)) > 300 for color in COLORS[:3])


def test_validations_of_several_runs_fill_the_upper_panel(tmp_path: Path):
    """The training losses of the first steps, three times as high, are cut off."""
    logs = {name: write_run(tmp_path / f"{name}.jsonl", i) for i, name in enumerate("ab")}
    plot_runs(logs, str(tmp_path / "p.png"))
    # The second run covers the first. The faint training losses have other colours.
    rows, columns = pixels_of(tmp_path / "p.png", COLORS[1]).T
    assert rows[columns > 300].min() < 0.15 * 975  # the legend is on the left


def test_a_run_that_has_no_loss_is_refused(tmp_path: Path):
    (tmp_path / "m.jsonl").write_text('{"step": 0, "restart": 1}\n')
    with pytest.raises(InputError, match="holds no loss"):
        plot_loss(str(tmp_path / "m.jsonl"), str(tmp_path / "loss.png"))


def test_a_diverged_run_is_drawn(tmp_path: Path):
    (tmp_path / "m.jsonl").write_text('{"step": 0, "loss": "NaN", "learning_rate": 0.1}\n')
    plot_loss(str(tmp_path / "m.jsonl"), str(tmp_path / "loss.png"))
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_mora_plot_draws_runs_that_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name / "metrics.jsonl")
    with (tmp_path / "a/metrics.jsonl").open("a") as log:
        log.write('{"step": 300, "lo')  # being written
    main(["plot", str(tmp_path / "a")])
    assert len(pixels_of(tmp_path / "a/loss.png", COLORS[0])) > 1000
    both = str(tmp_path / "both.png")
    main(["plot", str(tmp_path / "a"), str(tmp_path / "b"), "--out", both])
    assert capsys.readouterr().out.splitlines()[-1] == f"written: {both}"
    assert len(pixels_of(tmp_path / "both.png", COLORS[1])) > 1000


def test_mora_plot_replaces_no_file_unasked(tmp_path: Path):
    write_run(tmp_path / "metrics.jsonl")
    (tmp_path / "mine.png").write_text("mine")
    with pytest.raises(InputError, match=r"mine\.png exists already; .*, or add --overwrite"):
        draw_runs([str(tmp_path)], str(tmp_path / "mine.png"))
    assert (tmp_path / "mine.png").read_text() == "mine"
    draw_runs([str(tmp_path)], str(tmp_path / "mine.png"), overwrite=True)
    assert len(pixels_of(tmp_path / "mine.png", COLORS[0])) > 1000
