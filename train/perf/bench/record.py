"""The figures of a case: a JSON file to which several runs of the benchmark may add."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from mora_jax.errors import InputError, reason
from mora_jax.io import json_text
from mora_jax.methods import METHODS
from train.config import method as method_section
from train.config import run as run_config
from train.perf.bench.cases import ONE_DEVICE, Case, with_method
from train.perf.bench.jobs import PEERS, PeerJob
from train.storage.files import write_result

Row = dict[str, Any]


@dataclasses.dataclass
class Record:
    """All figures of one case on one kind of device.

    Attributes:
      case: name of the case.
      setting: what else the figures depend on.
      device: the accelerator or processor.
      runs: one entry for each run of the benchmark: start, versions, matmul rate, errors of the check.
      rows: one entry for each method or peer: its key `what`, figures or "error", and the index of its `run`.
    """

    case: str
    setting: dict[str, Any]
    device: str = ""
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)

    def find(self, what: dict[str, Any]) -> Row | None:
        """Returns the row of a method or peer, or None."""
        return next((row for row in self.rows if row["what"] == what), None)

    def put(self, what: dict[str, Any], figures: dict[str, Any]) -> Row:
        """Adds a row of the newest run, or replaces an old one."""
        row = {"what": what, "run": len(self.runs) - 1, **figures}
        old = self.find(what)
        if old is None:
            self.rows.append(row)
        else:
            self.rows[self.rows.index(old)] = row
        return row

    def save(self, path: str) -> None:
        """Writes the file atomically. An empty path writes none."""
        if path:
            write_result(path, json_text(dataclasses.asdict(self), indent=1) + "\n")


def load(path: str) -> Record:
    """Reads a record from its file. Raises InputError if the file holds none."""
    try:
        return Record(**json.loads(Path(path).read_text()))
    except OSError as error:
        raise InputError(f"{path}: cannot read these figures: {reason(error)}") from error
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} holds no figures of mora bench step or sweep") from error


def start(case: Case, path: str) -> Record:
    """Returns the record to add to: that of the file if it exists, or an empty one.

    Raises:
      InputError: if the file holds figures of another case or setting.
    """
    fresh = Record(case.name, setting(case))
    if not path or not Path(path).exists():
        return fresh
    old = load(path)
    if (old.case, old.setting) != (fresh.case, fresh.setting):
        other = next((k for k, v in fresh.setting.items() if old.setting.get(k) != v), "case")
        raise InputError(f"{path} holds figures of another setting ({other}); choose another --out")
    return old


def setting(case: Case) -> dict[str, Any]:
    """What the figures depend on beside the methods, as plain data."""
    plain = run_config.to_plain(case.config)
    names = ("batch_size", "microbatches", "model", "compute", "optimizer", "deterministic")
    kept = {name: plain[name] for name in names}
    kept |= {"sequence_length": case.config.data.sequence_length, "base_dtype": case.config.base_dtype}
    kept |= {"method": plain["method"], "rank": plain["method"].get("rank")}
    kept |= {"trained": case.config.params.train}
    if case.config.mesh != ONE_DEVICE:
        kept["mesh"] = plain["mesh"]
    return json.loads(json.dumps(kept))


def method_row(case: Case, text: str) -> dict[str, Any]:
    """Returns the key of a method's row."""
    config = with_method(case.config, text)
    if text.startswith("config") and config.rules:
        return {"framework": "jax", "name": "config"}
    flat = method_section.to_plain(config.method)
    what = {"framework": "jax"} | {key: flat[key] for key in ("name", "rank", "operator") if key in flat}
    return what | ({} if isinstance(config.method, str) else {"path": config.compute.adapter_path})


def peer_row(job: PeerJob) -> dict[str, Any]:
    """Returns the key of a peer's row."""
    what = {"framework": "torch", **PEERS[job.method], "compiled": job.compiled, "pure": job.pure}
    return what if job.method == "full" else what | {"rank": job.rank}


def label(what: dict[str, Any]) -> str:
    """Returns the readable name of a row."""
    names = {"full": "full fine-tuning", "frozen": "frozen base"}
    names |= {name: method.__name__ for name, method in METHODS.items()}
    name = str(names.get(what["name"], what["name"]))
    words = [f"PyTorch {name}" if what["framework"] == "torch" else name]
    default = getattr(METHODS.get(what["name"]), "operator", None)
    if "operator" in what and what["operator"] != getattr(default, "name", None):
        words.append(what["operator"])
    if "rank" in what:
        words.append(f"r {what['rank']}")
    if what.get("path", "auto") != "auto":
        words.append(f"({what['path']} path)")
    options = [word for key, word in (("compiled", "compiled"), ("pure", "all bf16")) if what.get(key)]
    return ", ".join([" ".join(words), *options])
