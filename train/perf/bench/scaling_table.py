"""The tables of rows that were measured on meshes of several devices, and their comparisons with the aims."""

from collections.abc import Iterator, Mapping

from train.perf.bench.ratios import Ratio, matmul_share
from train.perf.bench.record import Record, Row, label

ALONE = "one device"
COLUMNS = (
    "method",
    "mesh",
    "batch",
    "step ms",
    "tokens/s a device",
    "x one device",
    "of all devices",
    "matmul share",
    "sent MiB a device",
    "exposed ms",
    "planned GiB",
    "compile s",
)
# Lower bounds for MoRA of rank 128: of all devices' rate, and for `tensor` of one device's.
AIMED_RANK = 128
SHARES = {"data 4": 0.98, "fsdp 4": 0.95, "data 2 x fsdp 2": 0.96}
SPEEDUPS = {("1.3b", "tensor 4"): 2.2}
AIMED_CASES = ("250m", "1.3b")


def mesh_name(sizes: Mapping[str, int]) -> str:
    """Returns the readable name of a mesh, such as "data 2 x fsdp 2"."""
    return " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or ALONE


def has_meshes(record: Record) -> bool:
    """Returns whether rows of a record were measured on several devices."""
    return any("mesh" in row["what"] or row.get("devices", 1) > 1 for row in record.rows)


def mesh_of(row: Row) -> str:
    """Returns the name of a row's mesh; empty if it is unknown, as of a row that failed."""
    return row["what"].get("mesh") or mesh_name(row.get("mesh", {}))


def cells(record: Record, row: Row) -> tuple[str, ...]:
    """Returns a row of the table."""
    what = row["what"]
    name = label(what) + (f", {short(what['flags'])}" if what.get("flags") else "")
    if "error" in row:
        return (name, mesh_of(row), f"failed: {row['error']}", *("",) * (len(COLUMNS) - 3))
    share = f"{matmul_share(record, row):.3f}" if record.runs else ""
    return (
        name,
        mesh_of(row),
        f"{row['batch']}",
        f"{row['milliseconds']:.2f}",
        f"{row['tokens_per_second_device']:,.0f}",
        f"{row['speedup']:.2f}" if "speedup" in row else "",
        f"{row['speedup'] / row['devices']:.3f}" if "speedup" in row else "",
        share,
        ", ".join(f"{kind} {size / 2**20:,.0f}" for kind, size in row.get("sent", {}).items()),
        _exposed(row),
        f"{row['planned_gib']:.2f}",
        f"{row['compile_seconds']:.1f}",
    )


def _exposed(row: Row) -> str:
    """Returns the exposed time and all time of communication; "-" where there was no profile of a device."""
    timeline = row.get("timeline")
    if row["devices"] == 1:
        return ""
    return f"{timeline['exposed']:.2f} of {timeline['communicating']:.2f}" if timeline else "-"


def ratios(record: Record) -> Iterator[Ratio]:
    """Yields the share of all devices' rate, each set of flags beside none, and MoRA beside others."""
    good = [row for row in record.rows if "error" not in row and row["devices"] > 1]
    for row in good:
        what, mesh = row["what"], mesh_of(row)
        name = f"{label(what)}, {mesh}"
        if flags := what.get("flags"):
            yield from _flags(good, row, f"{name}, {short(flags)}")
            continue
        if "speedup" in row:
            yield _scaling(record, row, name)
        if what["name"] != "mora":
            continue
        for other in good:
            if (
                other["what"]["name"] in ("lora", "full")
                and mesh_of(other) == mesh
                and not other["what"].get("flags")
            ):
                value = row["milliseconds"] / other["milliseconds"]
                yield Ratio(f"{name} / {label(other['what'])}, time", value)


def _scaling(record: Record, row: Row, name: str) -> Ratio:
    what, mesh = row["what"], mesh_of(row)
    aimed = (what["name"], what.get("rank"), what.get("operator")) == ("mora", AIMED_RANK, "share")
    if "tensor" in mesh:
        aim = SPEEDUPS.get((record.case, mesh)) if aimed else None
        return Ratio(f"{name} / one device, tokens/s", row["speedup"], aim, at_least=True)
    aim = SHARES.get(mesh) if aimed and record.case in AIMED_CASES else None
    return Ratio(f"{name}, share of all devices' rate", row["speedup"] / row["devices"], aim, at_least=True)


def _flags(rows: list[Row], row: Row, name: str) -> Iterator[Ratio]:
    """Yields a row's time beside that without flags; both beside one device, if it was measured."""
    what = {key: value for key, value in row["what"].items() if key != "flags"}
    for plain in rows:
        if plain["what"] == what:
            if "speedup" in row and "speedup" in plain:
                value = plain["speedup"] / row["speedup"]
            else:
                value = row["milliseconds"] / plain["milliseconds"]
            yield Ratio(f"{name} / no flag, time", value)


def short(flags: str) -> str:
    """Returns flags without what all of their names begin with."""
    return flags.replace("xla_gpu_", "")
