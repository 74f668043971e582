"""Compares the figures of a record with each other and with the aims."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from train.perf.bench.record import Record, Row, label

# The method that is compared, and the one that it is compared with first.
COMPARED, BASELINE = "mora", "lora"
# The aims of docs/performance.md by case, for MoRA of rank 128: upper or lower bounds.
AIMS = {
    "250m": {
        "minus frozen": 13.0,
        "full": 0.90,
        "peer lora": 1.7,
        "peer mora": 5.0,
        "peer mora compiled": 2.0,
        "share": 0.45,
    },
    "1.3b": {"minus frozen": 17.0, "full": 0.80, "peer lora": 1.5, "peer mora": 5.0, "share": 0.58},
}
AIMED_RANK = 128
# Upper bounds of MoRA's time over LoRA's of the same rank, by operator and rank.
LORA_AIMS = {("share", 128): 1.0, ("share", 256): 1.0, ("rotate", 8): 1.05}
TABLE_5 = "7b"
TABLE_5_SPEED, TABLE_5_MEMORY = 4.0, 1.05


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One comparison.

    Attributes:
      name: what is compared with what.
      value: the ratio, or the difference in `unit`.
      aim: the bound to reach, or None.
      at_least: whether the aim is a lower bound.
      unit: unit of a difference; empty for a ratio.
    """

    name: str
    value: float
    aim: float | None = None
    at_least: bool = False
    unit: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None without an aim."""
        if self.aim is None:
            return None
        return self.value >= self.aim if self.at_least else self.value <= self.aim

    def figure(self) -> str:
        """Returns the value as text."""
        return f"{self.value:.3f}" if not self.unit else f"{self.value:.2f} {self.unit}"

    def goal(self) -> str:
        """Returns the aim as text."""
        if self.aim is None:
            return ""
        return f"{'>=' if self.at_least else '<='} {self.aim:g} {self.unit}".strip()


def ratios(record: Record) -> list[Ratio]:
    """Returns all comparisons between rows that are there and did not fail."""
    found: list[Ratio] = []
    for row in (r for r in record.rows if "error" not in r and r["what"]["framework"] == "jax"):
        if row["what"]["name"] == COMPARED:
            found += _compared(record, row)
        if record.case == TABLE_5:
            found += _table_5(record, row)
    return found


def _compared(record: Record, row: Row) -> Iterator[Ratio]:
    """Yields the comparisons of one row of the compared method with everything else."""
    what = row["what"]
    rank, name = what["rank"], label(what)
    chosen = what["path"] == "auto"  # aims are for the path that is chosen by default
    aimed = chosen and (what["operator"], rank) == ("share", AIMED_RANK)
    aims = AIMS.get(record.case, {}) if aimed else {}
    named = record.case in (*AIMS, TABLE_5)
    if frozen := best(record, framework="jax", name="frozen"):
        extra = row["milliseconds"] - frozen["milliseconds"]
        yield Ratio(f"{name} minus the frozen base", extra, aims.get("minus frozen"), unit="ms")
    if lora := best(record, framework="jax", name=BASELINE, rank=rank):
        aim = LORA_AIMS.get((what["operator"], rank)) if chosen and named else None
        yield Ratio(f"{name} / LoRA's best path, time", _times(row, lora), aim)
        if row["peak_gib"] and lora["peak_gib"]:
            aim = 1.0 if chosen and named else None
            yield Ratio(f"{name} / LoRA, peak memory", row["peak_gib"] / lora["peak_gib"], aim)
    if full := best(record, framework="jax", name="full"):
        yield Ratio(f"{name} / full fine-tuning, time", _times(row, full), aims.get("full"))
    if record.case != TABLE_5:  # `_table_5` compares with peers there, for LoRA as well
        yield from _peers(record, row, aims)
    share = matmul_share(record, row)
    yield Ratio(f"{name}, share of the matmul rate", share, aims.get("share"), at_least=True)
    base = matmul_share(record, row, "needed_tflop_base")
    yield Ratio(f"{name}, share counting the base alone", base, aims.get("share"), at_least=True)


def _peers(record: Record, row: Row, aims: dict[str, float]) -> Iterator[Ratio]:
    """Yields tokens a second over those of each PyTorch program, in its faster precision."""
    what = row["what"]
    rank, operator = {"rank": what["rank"]}, {"operator": what["operator"]}
    peers = {
        "peer full": ("full fine-tuning, compiled", {"name": "full", "compiled": True}),
        "peer lora eager": ("LoRA", {"name": "lora", "compiled": False} | rank),
        "peer lora": ("LoRA, compiled", {"name": "lora", "compiled": True} | rank),
        "peer mora": ("MoRA", {"name": "mora", "compiled": False} | rank | operator),
        "peer mora compiled": ("MoRA, compiled", {"name": "mora", "compiled": True} | rank | operator),
    }
    for aim, (words, key) in peers.items():
        if peer := best(record, framework="torch", **key):
            faster = 1 / _times(row, peer)
            yield Ratio(f"{label(what)} / PyTorch {words}, tokens/s", faster, aims.get(aim), at_least=True)


def _table_5(record: Record, row: Row) -> Iterator[Ratio]:
    """Yields the comparisons with PEFT's LoRA of the same rank."""
    rank, name = row["what"].get("rank"), label(row["what"])
    if peer := best(record, framework="torch", name=BASELINE, rank=rank):
        yield Ratio(f"{name} / PEFT LoRA, steps/s", 1 / _times(row, peer), TABLE_5_SPEED, at_least=True)
        if row["peak_gib"] and peer["peak_gib"]:
            yield Ratio(
                f"{name} / PEFT LoRA, peak memory", row["peak_gib"] / peer["peak_gib"], TABLE_5_MEMORY
            )


def best(record: Record, **what: Any) -> Row | None:
    """Returns the fastest row whose key has these values, or None."""
    rows = [row for row in record.rows if "error" not in row and what.items() <= row["what"].items()]
    return min(rows, key=lambda row: row["milliseconds"], default=None)


def matmul_share(record: Record, row: Row, count: str = "needed_tflop") -> float:
    """Returns the needed operations a second as a share of the same run's matmul rate, of all devices."""
    rate = record.runs[row["run"]]["matmul_tflops"] * row.get("devices", 1)
    return row[count] / row["milliseconds"] * 1e3 / rate


def _times(row: Row, other: Row) -> float:
    return row["milliseconds"] / other["milliseconds"]
