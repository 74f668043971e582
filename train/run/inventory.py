"""The checkpoints of a run and their state, for `mora checkpoints`."""

import dataclasses
import datetime
import functools
from typing import Literal

from etils import epath
from rich.table import Table

from mora_jax.errors import InputError, spelled_out
from mora_jax.transform import Methods
from train.config.run import RunConfig
from train.console.progress import progress
from train.console.terminal import console
from train.run import base as bases
from train.run import manifest
from train.run.base import Kept, Named
from train.run.checkpoint import Checkpoints
from train.run.folder import open_checkpoints, read_config
from train.run.meta import group_type, read_meta
from train.run.state import check_saved
from train.storage import buckets

State = Literal["good", "not verified", "unfinished", "damaged"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One checkpoint. `restarts` and `group_type` are empty if its manifest cannot be used.

    Attributes:
      step: updates done.
      restarts: restarts done.
      group_type: of MoRA's share.
      bytes: of all files, without the base.
      base: the base that it refers to, such as "base-2, 6.8 MB" or "init_from"; empty if it holds all.
      saved: when the save was finished, in local time; None for an unfinished one.
      state: what was found.
      problems: a line for each damaged file.
    """

    step: int
    restarts: str
    group_type: str
    bytes: int
    base: str
    saved: datetime.datetime | None
    state: State
    problems: tuple[str, ...] = ()


def inventory(run_dir: str, verify: bool = True) -> list[Entry]:
    """Returns the checkpoints of a run, oldest first. The run may be training.

    Args:
      run_dir: the run's folder.
      verify: whether to read every file and compare it with the manifest, or only the manifests.

    Raises:
      InputError: if the folder holds no run.
    """
    config = read_config(run_dir)
    with open_checkpoints(config) as saved:
        return entries_of(saved, verify, config)


def entries_of(saved: Checkpoints, verify: bool = True, config: RunConfig | None = None) -> list[Entry]:
    """Returns what `inventory` does, for opened checkpoints; without a config, of any run."""
    unfinished = saved.unfinished()  # first: one that is moved into place now is then found below
    steps = saved.folders()
    total = sum(_total(saved, step) for step in steps) / 1e6 if verify else 0
    with progress("verifying", total, "MB") as advance:
        entries = [_entry(saved, config, step, verify, lambda n: advance(n / 1e6)) for step in steps]
    entries += [_unfinished(step, folder) for step, folder in unfinished]
    found = sorted((entry for entry in entries if entry), key=lambda entry: entry.step)
    return _with_models(saved, config, found) if verify and config else found


def _with_models(saved: Checkpoints, config: RunConfig, entries: list[Entry]) -> list[Entry]:
    """Returns the entries; those that refer to the model of `init_from` are damaged if it has changed."""
    difference = functools.cache(lambda named: bases.difference(named, config.init_from))
    named = {e.step: saved.readable_base(e.step) for e in entries if e.state == "good"}
    problems = {step: difference(base) for step, base in named.items() if isinstance(base, Named)}
    return [
        dataclasses.replace(e, state="damaged", problems=(f"{saved.folder(e.step)}: {problems[e.step]}",))
        if problems.get(e.step)
        else e
        for e in entries
    ]


def print_inventory(run_dir: str, verify: bool = True) -> bool:
    """Prints `inventory`. Returns whether no checkpoint is damaged."""
    entries = inventory(run_dir, verify)
    screen, title = console(), spelled_out(run_dir)
    shown = table(entries, title) if entries else f"{title} has no checkpoints yet"
    screen.print(shown, soft_wrap=not entries)
    for problem in problems(entries):
        screen.print(problem, soft_wrap=True, highlight=False)
    return not any(e.state == "damaged" for e in entries)


def table(entries: list[Entry], title: str) -> Table:
    """Returns a table with a row for each checkpoint."""
    columns = ("step", "restarts", "group type", "MB", "base", "saved", "state")
    made = Table(*columns, title=title, title_justify="left")
    for e in entries:
        date = e.saved.strftime("%Y-%m-%d %H:%M:%S") if e.saved else ""
        made.add_row(
            f"{e.step:,}",
            spelled_out(e.restarts),
            spelled_out(e.group_type),
            f"{e.bytes / 1e6:,.1f}",
            e.base,
            date,
            e.state,
        )
    return made


def problems(entries: list[Entry]) -> list[str]:
    """Returns a printable line for each damaged file, whatever its name. Checkpoints may share one."""
    return [*dict.fromkeys(spelled_out(problem) for entry in entries for problem in entry.problems)]


def _unfinished(step: int, folder: epath.Path) -> Entry | None:
    """Returns None for a save that the run has removed or moved into place meanwhile."""
    return Entry(step, "", "", _bytes(folder), "", None, "unfinished") if folder.exists() else None


def _entry(
    saved: Checkpoints, config: RunConfig | None, step: int, verify: bool, advance: manifest.Advance
) -> Entry | None:
    """Returns None for a checkpoint that the run has removed meanwhile."""
    folder = saved.folder(step)
    if not manifest.is_sealed(folder):
        return _unfinished(step, folder)
    size, date = _bytes(folder), _date(folder)
    damage = saved.damage(step, advance) if verify else []
    restarts = groups = base = ""
    try:
        base = _base(saved, step)
        meta = read_meta(saved, step)
        restarts, groups = str(meta["restarts"]), group_type(Methods.from_json(meta["methods"]))
        if config:
            check_saved(config, saved, step)
    except InputError as error:  # a damaged manifest was found above if all is verified
        damage = damage or [str(error)]
    if not manifest.is_sealed(folder):  # asked again: a run that removes a checkpoint removes this first
        return _unfinished(step, folder)
    state: State = "damaged" if damage else "good" if verify else "not verified"
    return Entry(step, restarts, groups, size, base, date, state, tuple(damage))


def _base(saved: Checkpoints, step: int) -> str:
    base = saved.base_of(step)
    if not isinstance(base, Kept):
        return str(base or "")
    return f"{base}, {_bytes(saved.base_folder(base)) / 1e6:,.1f} MB"


def _bytes(folder: epath.Path) -> int:
    return sum(size or 0 for size in manifest.sizes(folder).values())


def _total(saved: Checkpoints, step: int) -> int:
    """Returns the bytes that verifying a checkpoint reads."""
    base = saved.readable_base(step)
    return _bytes(saved.folder(step)) + (_bytes(saved.base_folder(base)) if isinstance(base, Kept) else 0)


def _date(folder: epath.Path) -> datetime.datetime | None:
    try:
        return buckets.modified(folder / manifest.MANIFEST).astimezone()
    except OSError:
        return None
