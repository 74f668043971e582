"""The format number of data sets: written at the start, absent in old ones, refused if newer."""

import json
import shutil
from pathlib import Path

import pytest
from made_text import contents

from mora_jax.errors import InputError
from train.data.rows import build, layout, workers
from train.data.rows.build import prepare
from train.data.rows.info import DataInfo, load_info
from train.storage.format import FORMAT, check_format


def prepared(text: Path, out: Path) -> DataInfo:
    source, validation = (str(text / f"c4-{split}.*") for split in ("train", "validation"))
    return prepare(source, validation, str(text / "t.model"), 32, str(out), workers=1)


def stated(out: Path) -> dict:
    return json.loads((out / layout.SETTINGS).read_text())


def state(out: Path, number: object) -> None:
    """Replaces the number in a data set; None removes it."""
    facts = {name: value for name, value in stated(out).items() if name != "format"}
    facts |= {} if number is None else {"format": number}
    (out / layout.SETTINGS).write_text(json.dumps(facts))


@pytest.fixture
def copied(tiny_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def test_a_new_data_set_states_the_present_format(tiny_data: Path):
    assert stated(tiny_data)["format"] == FORMAT


def test_a_data_set_without_a_number_is_read(copied: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch):
    info = load_info(str(copied))
    state(copied, None)
    before = contents(copied)
    assert load_info(str(copied)) == info
    monkeypatch.setattr(workers, "write_shard", None)
    assert prepared(tiny_text, copied) == info  # has nothing to do
    assert contents(copied) == before


def test_a_data_set_of_format_5_is_read(copied: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch):
    """It states nothing of forms, and counts less."""
    info = load_info(str(copied))
    for name in ("settings.json", "metadata.json"):
        facts = json.loads((copied / name).read_text())
        for new in ("form", "fields", "loss", "pack", "overlong", "template_sha256", "validation_share"):
            del facts[new]
        for counts in facts.get("splits", {}).values():
            del counts["loss_tokens"], counts["dropped"], counts["cut"]
        (copied / name).write_text(json.dumps(facts))
    state(copied, 5)
    assert load_info(str(copied)) == info
    monkeypatch.setattr(workers, "write_shard", None)
    assert prepared(tiny_text, copied) == info  # has nothing to do


def test_a_data_set_of_format_3_is_read(copied: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch):
    """It states neither what begins a document nor its key, and holds its tokenizer among its files."""
    info = load_info(str(copied))
    (copied / "tokenizer" / "tokenizer.model").rename(copied / "tokenizer.model")
    (copied / "tokenizer").rmdir()
    for name in ("settings.json", "metadata.json"):
        facts = json.loads((copied / name).read_text())
        del facts["bos_id"], facts["text_key"]
        (copied / name).write_text(json.dumps(facts))
    state(copied, 3)
    assert load_info(str(copied)) == info
    monkeypatch.setattr(workers, "write_shard", None)
    assert prepared(tiny_text, copied) == info  # has nothing to do


def test_an_unfinished_data_set_without_a_number_is_resumed(
    tiny_text: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "data"

    def stopped(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_metadata", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepared(tiny_text, out)
    state(out, None)
    monkeypatch.setattr(workers, "write_shard", None)  # no shard is written again
    prepared(tiny_text, out)
    assert stated(out)["format"] == FORMAT
    assert contents(out) == contents(tiny_data)


@pytest.mark.parametrize("finished", [True, False])
def test_a_newer_format_is_refused(copied: Path, tiny_text: Path, finished: bool):
    state(copied, FORMAT + 1)
    if not finished:
        (copied / layout.DESCRIBED).unlink()
    stated = rf"has format {FORMAT + 1}, and this version reads formats up to {FORMAT}"
    message = rf"^{copied} {stated}; .*`mora --version`"
    with pytest.raises(InputError, match=message):
        load_info(str(copied))
    with pytest.raises(InputError, match=message):
        prepared(tiny_text, copied)


@pytest.mark.parametrize("number", [0, -1, 2.0, "2", True, [2]])
def test_a_format_that_is_not_a_number(copied: Path, number: object):
    state(copied, number)
    with pytest.raises(InputError, match=r"states .* as its format, which is not a number from 1"):
        load_info(str(copied))


def test_damaged_settings(copied: Path):
    (copied / layout.SETTINGS).write_text("[]")
    with pytest.raises(InputError, match=r"settings\.json is damaged"):
        load_info(str(copied))


def test_the_format_of_a_mapping():
    assert check_format({}, "here") == 1
    assert [check_format({"format": number}, "here") for number in (1, FORMAT)] == [1, FORMAT]
