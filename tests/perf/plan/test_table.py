"""The table of plans: the config for a slice, and no compilation of what the file has."""

import json
from pathlib import Path

import pytest

from mora_jax.errors import InputError
from mora_jax.models.llama import Compute
from train.cli import main as cli
from train.config import flags
from train.perf.plan import table
from train.perf.plan.formula import Expected
from train.perf.plan.hlo import Collective
from train.perf.plan.plan import Held, Plan
from train.perf.plan.programs import TRAINING, Program
from train.perf.plan.targets import chips

CONFIG = str(Path(__file__).parents[3] / "configs/250m_remora.yaml")
GIB = 2**30


@pytest.fixture
def compiled(monkeypatch) -> list[tuple]:
    """Replaces `plan`, and returns the list of its calls."""
    asked = []

    def plan(config, topology, devices, memory, programs):
        assert (devices, memory) == (0, 0.0)
        asked.append((topology, config.mesh.fsdp, config.microbatches, *programs))
        sent = [Collective("all-gather", "fsdp", 3, 2 * GIB, GIB), Collective("all-gather", "data", 1, 8, 4)]
        train = Program("train_step", 0, 0, 3 * GIB, "", 5e12, sent, 1.0)
        made = [train, Program("orient_step", 0, 0, 7 * GIB // 2, "", 4e12, sent[:1], 1.0)]
        held = Held(3 * 2**20, 2**20, 2 * 2**20, 2 * 2**20)
        lines = [Expected("all-gather", "fsdp", GIB // 2, GIB // 2)]
        return Plan(
            topology, "none", chips(topology), {}, 4.0, 1, 16 * GIB, held, made[: len(programs)], lines
        )

    monkeypatch.setattr(table, "plan", plan)
    return asked


@pytest.mark.parametrize(
    ("devices", "sequences", "microbatches"), [(8, 4, 32), (256, 4, 1), (8, 100, 2), (1024, 4, 1)]
)
def test_a_microbatch_has_at_most_the_given_number_of_sequences(devices, sequences, microbatches):
    config = table.spread(flags.read_config(CONFIG), devices, sequences)
    assert (config.microbatches, config.mesh.fsdp) == (microbatches, devices)
    assert 1024 % (devices * microbatches) == 0
    assert config.compute == Compute(layers="scan", remat="full", attention="splash")


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(InputError, match="batch_size 1024 is not a multiple of the 48 devices"):
        table.spread(flags.read_config(CONFIG), 48, 4)


def test_a_plan_is_compiled_once(compiled, tmp_path, capsys):
    out = tmp_path / "plans.json"
    words = ["plan-table", "--configs", CONFIG, "--out", str(out), "--topologies"]
    cli.main([*words, "v5e:2x4"])
    cli.main([*words, "v5e:2x4", "v5p:2x2x4"])
    assert compiled == [("v5e:2x4", 8, 32, *TRAINING), ("v5p:2x2x4", 16, 16, *TRAINING)]
    assert len(json.loads(out.read_text())) == 2
    header, _, *rows = capsys.readouterr().out.splitlines()[-4:]
    assert [cells(row)[1] for row in rows] == ["v5e:2x4", "v5p:2x2x4"]
    assert cells(header) == list(table.COLUMNS)
    expected = ["4.0", "4.0", "0.06", "38%", "3.50 of 16", "yes", "5.0", "1.00", "50%", "1.00"]
    assert cells(rows[0]) == ["250m_remora", "v5e:2x4", "8", *expected]


def test_the_state_alone(compiled, tmp_path, capsys):
    """Nothing is compiled or kept; rows that were compiled before are complete."""
    out = tmp_path / "plans.json"
    words = ["plan-table", "--configs", CONFIG, "--out", str(out), "--topologies", "v5e:2x4"]
    cli.main([*words, "v5e:4x4", "--state-only"])
    assert compiled == [("v5e:2x4", 8, 32), ("v5e:4x4", 16, 16)]
    assert not out.exists()
    bare = capsys.readouterr().out.splitlines()[-2]
    assert cells(bare)[-6:] == ["", "", "", "1.00", "50%", ""]
    cli.main(words)
    cli.main([*words, "--state-only"])
    assert compiled[2:] == [("v5e:2x4", 8, 32, *TRAINING)]
    assert cells(capsys.readouterr().out.splitlines()[-1])[-6:] == [
        "3.50 of 16",
        "yes",
        "5.0",
        "1.00",
        "50%",
        "1.00",
    ]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_an_unknown_slice_is_refused(compiled, tmp_path):
    with pytest.raises(InputError, match="unknown --topology v5e:2x2x2"):
        table.make_table([CONFIG], ["v5e:2x2x2"], 4, str(tmp_path / "plans.json"))
    assert not compiled


@pytest.mark.parametrize("text", ["years of work", "[1]", '{"a": 1}', '{"a": {"compiler": "x"}}'])
def test_a_file_of_something_else_is_refused_and_unchanged(compiled, tmp_path, text):
    out = tmp_path / "plans.json"
    out.write_text(text)
    with pytest.raises(InputError, match=r"plans\.json"):
        table.make_table([CONFIG], ["v5e:2x4"], 4, str(out))
    assert out.read_text() == text
