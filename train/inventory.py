"""The checkpoints that a run has, and whether they are as they were saved: `mora checkpoints`."""

import dataclasses
import datetime
from typing import Literal

from rich.table import Table

from mora_jax.errors import InputError
from mora_jax.transform import Methods
from train import buckets, manifest, runs
from train.checkpoint import Checkpoints
from train.progress import progress
from train.terminal import console

State = Literal["good", "not verified", "unfinished", "damaged"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checkpoint. `restarts` and `group_type` are empty where its manifest does not tell.

    Attributes:
      step: updates done.
      restarts: restarts done.
      group_type: of MoRA's share.
      bytes: of all files.
      saved: when the save was finished, local time; None for an unfinished one.
      state: what was found.
      problems: what is damaged, a line for each file.
    """

    step: int
    restarts: str
    group_type: str
    bytes: int
    saved: datetime.datetime | None
    state: State
    problems: tuple[str, ...] = ()


def inventory(run_dir: str, verify: bool = True) -> list[Entry]:
    """The checkpoints of a run, oldest first, which may be training meanwhile.

    Args:
      run_dir: the run's folder.
      verify: whether every file is read and compared with the manifest; else only the manifests are read.

    Raises:
      InputError: if the folder holds no run.
    """
    with runs.checkpoints(runs.read_config(run_dir)) as saved:
        steps = saved.folders()
        total = sum(_bytes(saved, step) for step in steps) / 1e6 if verify else 0
        with progress("verifying", total, "MB") as advance:
            entries = [_entry(saved, step, verify, lambda n: advance(n / 1e6)) for step in steps]
    return [entry for entry in entries if entry]


def print_inventory(run_dir: str, verify: bool = True) -> bool:
    """Prints `inventory`; whether no checkpoint is damaged."""
    entries = inventory(run_dir, verify)
    screen = console()
    table = Table(
        "step", "restarts", "group type", "MB", "saved", "state", title=run_dir, title_justify="left"
    )
    for e in entries:
        date = e.saved.strftime("%Y-%m-%d %H:%M:%S") if e.saved else ""
        table.add_row(f"{e.step:,}", e.restarts, e.group_type, f"{e.bytes / 1e6:,.1f}", date, e.state)
    screen.print(table if entries else f"{run_dir} has no checkpoints yet", soft_wrap=not entries)
    for problem in (p for e in entries for p in e.problems):
        screen.print(problem, soft_wrap=True, highlight=False)
    return not any(e.state == "damaged" for e in entries)


def _entry(saved: Checkpoints, step: int, verify: bool, advance: manifest.Advance) -> Entry | None:
    """None for one that the run has removed in the meantime."""
    folder, size, date = saved.folder(step), _bytes(saved, step), _date(saved, step)
    restarts, groups = _told(saved, step)
    problems = _problems(saved, step, verify, advance)
    if not manifest.is_sealed(folder):  # looked at last: a run removes the manifest first
        return Entry(step, restarts, groups, size, None, "unfinished") if folder.exists() else None
    state: State = "damaged" if problems else "good" if verify else "not verified"
    return Entry(step, restarts, groups, size, date, state, tuple(problems))


def _problems(saved: Checkpoints, step: int, verify: bool, advance: manifest.Advance) -> list[str]:
    if verify:
        return saved.damage(step, advance)
    try:
        saved.read_meta(step)
    except InputError as error:
        return [str(error)]
    return []


def _told(saved: Checkpoints, step: int) -> tuple[str, str]:
    """Restarts and group type."""
    try:
        meta = runs.saved_meta(saved, step)
    except InputError:
        return "", ""
    return str(meta.get("restarts", "")), runs.group_type(Methods.from_json(meta["methods"]))


def _bytes(saved: Checkpoints, step: int) -> int:
    return sum(size or 0 for size in manifest.sizes(saved.folder(step)).values())


def _date(saved: Checkpoints, step: int) -> datetime.datetime | None:
    try:
        return buckets.modified(saved.folder(step) / manifest.MANIFEST).astimezone()
    except OSError:
        return None
