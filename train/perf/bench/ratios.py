"""What the figures of a record come to: each against what it is to be compared with, and the aim."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from train.perf.bench.record import Record, Row, label

# By case, for MoRA of rank 128: the largest or least value that is aimed at.
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
# MoRA's time over LoRA's, where they are of one rank.
LORA_AIMS = {("share", 128): 1.0, ("share", 256): 1.0, ("rotate", 8): 1.05}
TABLE_5 = "7b"
TABLE_5_SPEED, TABLE_5_MEMORY = 4.0, 1.05


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One comparison.

    Attributes:
      name: what is compared with what.
      value: the ratio, or the difference in `unit`.
      aim: the bound that is aimed at, if there is one.
      at_least: whether the aim is a lower bound.
      unit: empty for a ratio.
    """

    name: str
    value: float
    aim: float | None = None
    at_least: bool = False
    unit: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the aim is met, or None without one."""
        if self.aim is None:
            return None
        return self.value >= self.aim if self.at_least else self.value <= self.aim

    def figure(self) -> str:
        """The value as it is read."""
        return f"{self.value:.3f}" if not self.unit else f"{self.value:.2f} {self.unit}"

    def goal(self) -> str:
        """The aim as it is read."""
        return (
            "" if self.aim is None else f"{'>=' if self.at_least else '<='} {self.aim:g} {self.unit}".strip()
        )


def ratios(record: Record) -> list[Ratio]:
    """All comparisons that the rows allow; those whose rows are missing or failed are left out."""
    found: list[Ratio] = []
    for row in (r for r in record.rows if "error" not in r and r["what"]["framework"] == "jax"):
        if row["what"]["name"] == "mora":
            found += _mora(record, row)
        if record.case == TABLE_5:
            found += _table_5(record, row)
    return found


def _mora(record: Record, row: Row) -> Iterator[Ratio]:
    """MoRA of one operator and rank against everything else."""
    what = row["what"]
    rank, name = what["rank"], _name(what)
    chosen = what["path"] == "auto"  # aims are for what the rule chooses, not for a forced path
    aimed = chosen and (what["operator"], rank) == ("share", AIMED_RANK)
    aims = AIMS.get(record.case, {}) if aimed else {}
    named = record.case in (*AIMS, TABLE_5)
    if frozen := best(record, framework="jax", name="frozen"):
        extra = row["milliseconds"] - frozen["milliseconds"]
        yield Ratio(f"{name} minus the frozen base", extra, aims.get("minus frozen"), unit="ms")
    if lora := best(record, framework="jax", name="lora", rank=rank):
        aim = LORA_AIMS.get((what["operator"], rank)) if chosen and named else None
        yield Ratio(f"{name} / LoRA's best path, time", _times(row, lora), aim)
        if row["peak_gib"] and lora["peak_gib"]:
            aim = 1.0 if chosen and named else None
            yield Ratio(f"{name} / LoRA, peak memory", row["peak_gib"] / lora["peak_gib"], aim)
    if full := best(record, framework="jax", name="full"):
        yield Ratio(f"{name} / full fine-tuning, time", _times(row, full), aims.get("full"))
    if record.case != TABLE_5:  # there `_table_5` does, for LoRA as well
        yield from _peers(record, row, aims)
    share = matmul_share(record, row)
    yield Ratio(f"{name}, share of the matmul rate", share, aims.get("share"), at_least=True)
    base = matmul_share(record, row, "needed_tflop_base")
    yield Ratio(f"{name}, share counting the base alone", base, aims.get("share"), at_least=True)


def _peers(record: Record, row: Row, aims: dict[str, float]) -> Iterator[Ratio]:
    """Tokens a second over those of each sort of PyTorch program, the faster precision of it."""
    what = row["what"]
    sorts = {
        "peer full": ("full fine-tuning, compiled", {"name": "full", "compiled": True}),
        "peer lora eager": ("LoRA", {"name": "lora", "compiled": False}),
        "peer lora": ("LoRA, compiled", {"name": "lora", "compiled": True}),
        "peer mora": ("MoRA", {"name": "mora", "compiled": False, "operator": what["operator"]}),
        "peer mora compiled": (
            "MoRA, compiled",
            {"name": "mora", "compiled": True, "operator": what["operator"]},
        ),
    }
    for sort, (words, key) in sorts.items():
        same_rank = {} if key["name"] == "full" else {"rank": what["rank"]}
        if peer := best(record, framework="torch", **key, **same_rank):
            faster = 1 / _times(row, peer)
            yield Ratio(f"{_name(what)} / PyTorch {words}, tokens/s", faster, aims.get(sort), at_least=True)


def _table_5(record: Record, row: Row) -> Iterator[Ratio]:
    rank, name = row["what"].get("rank"), _name(row["what"])
    if peer := best(record, framework="torch", name="lora", rank=rank):
        yield Ratio(f"{name} / PEFT LoRA, steps/s", 1 / _times(row, peer), TABLE_5_SPEED, at_least=True)
        if row["peak_gib"] and peer["peak_gib"]:
            yield Ratio(
                f"{name} / PEFT LoRA, peak memory", row["peak_gib"] / peer["peak_gib"], TABLE_5_MEMORY
            )


def best(record: Record, **what: Any) -> Row | None:
    """The fastest row of those whose description agrees."""
    rows = [
        row
        for row in record.rows
        if "error" not in row and all(row["what"].get(key) == value for key, value in what.items())
    ]
    return min(rows, key=lambda row: row["milliseconds"], default=None)


def matmul_share(record: Record, row: Row, count: str = "needed_tflop") -> float:
    """The needed operations a second, as a share of the matmul rate measured in the same run."""
    return row[count] / row["milliseconds"] * 1e3 / record.runs[row["run"]]["matmul_tflops"]


def _times(row: Row, other: Row) -> float:
    return row["milliseconds"] / other["milliseconds"]


def _name(what: dict[str, Any]) -> str:
    return label(what)
