"""`mora generate`: a run merged and unmerged, its export, stop strings, files of prompts, a chat."""

import dataclasses
import io
import json
import shutil

import pytest

from mora_jax import hf
from mora_jax.errors import InputError
from mora_jax.hf.chat import ChatTemplate
from mora_jax.models.generate import Sampling
from train.cli.main import main
from train.data.codec import Codec
from train.jobs import generate as job
from train.jobs.export import export
from train.jobs.generate import Stops, complete, load_generator

PROMPTS = ["abc def ghi", "d", "bcd ij hga bc"]
# Blocks on lines of their own leave nothing, as in transformers.
TEMPLATE = """{% for m in messages %}
  {% if m.role not in ['user', 'assistant'] %}
    {{ raise_exception('odd role') }}
  {% endif %}
{{ m.role[0] }}: {{ m.content }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
a:{% endif %}"""
SAMPLING = Sampling(max_new_tokens=8, temperature=0.7, seed=5)


@pytest.fixture(scope="module")
def generator(tiny_run):
    return load_generator(str(tiny_run.folder), dtype="float32", rows=4)


def answers(generator, stop=()):
    asked = [generator.codec.encode(text) for text in PROMPTS]
    return complete(generator, asked, SAMPLING, stop, batch_size=4)


@pytest.fixture(scope="module")
def answered(generator):
    return answers(generator)


def run(capfd, *words) -> tuple[str, str]:
    main(["generate", *map(str, words)])
    out, err = capfd.readouterr()
    return out, err


def refused(capfd, *words) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["generate", *map(str, words)])
    assert stop.value.code == 2
    err = capfd.readouterr().err.strip()
    assert err.startswith("mora: ")
    assert "\n" not in err
    return err


def test_a_stop_string_ends_a_completion_and_is_no_part_of_it(generator, answered):
    assert [each.tokens for each in answered] == [8, 8, 8]
    assert {each.finish for each in answered} == {"length"}
    stop = answered[1].text[3:5]
    for each, cut in zip(answered, answers(generator, [stop]), strict=True):
        assert cut.text == each.text.partition(stop)[0]
        assert cut.finish == ("stop" if stop in each.text else "length")
    assert answers(generator, [stop])[1].tokens < 8


@pytest.mark.slow
def test_a_run_its_unmerged_adapters_and_its_export_answer_alike(tiny_run, answered, tmp_path):
    folder = str(tiny_run.folder)
    export(folder, str(tmp_path / "hf"))
    for path, merged in ((folder, False), (str(tmp_path / "hf"), True)):
        assert answers(load_generator(path, merged, "float32", 4)) == answered
    with pytest.raises(InputError, match="has no adapters: leave out --no-merged"):
        load_generator(str(tmp_path / "hf"), merged=False)
    assert all(each.text for each in answers(load_generator(folder, False, "bfloat16", 4)))


def test_the_command_writes_what_is_answered(tiny_run, generator, answered, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("train.jobs.generate.load_generator", lambda *_: generator)
    sampled = ["--max-new-tokens", 8, "--temperature", 0.7, "--seed", 5]
    asked = [word for text in PROMPTS for word in ("--prompt", text)]
    out, _ = run(capfd, tiny_run.folder, *asked, *sampled)
    assert out == "".join(f"[{n}]\n{each.text}\n" for n, each in enumerate(answered, 1))
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(json.dumps({"prompt": text}) for text in PROMPTS))
    run(capfd, tiny_run.folder, "--prompts", file, "--out", tmp_path / "out.jsonl", *sampled)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = zip(PROMPTS, answered, strict=True)
    assert rows == [
        {"prompt": text, "completion": each.text, "tokens": 8, "finish": "length"} for text, each in expected
    ]
    assert "--overwrite" in refused(capfd, tiny_run.folder, "--prompt", "a", "--out", file)


def test_a_chat_keeps_its_history_and_shows_an_answer_as_it_comes(generator, monkeypatch):
    files = hf.TokenizerFiles(
        "here", {**generator.codec.files.files, "chat_template.jinja": TEMPLATE.encode()}
    )
    asked, shown = [], []

    def encoded(self, messages):
        asked.append(ChatTemplate.read(self.files).render(messages))
        return self.encode("abc")

    monkeypatch.setattr(Codec, "encode_chat", encoded)
    chatting = dataclasses.replace(generator, codec=dataclasses.replace(generator.codec, files=files))
    job.chat(chatting, SAMPLING, (), ["ab", " ", "cd"], shown.append)
    one, two = "".join(shown).splitlines()
    assert len(shown) > 4
    assert asked == ["u: ab\na:", f"u: ab\na: {one}\nu: cd\na:"]
    assert one
    assert two


def test_typed_lines_end_with_the_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo"))
    assert list(job.typed_lines()) == ["one", "", "two"]


class Letters:
    """Decodes each token as one character, and 0 as half of one."""

    def decode(self, prompt, new):
        return "".join("\ufffd" if token == 0 else chr(token) for token in new)


def test_what_is_shown_is_never_taken_back():
    stops = Stops(Letters(), [], ("END", "DONE"))
    tokens = [ord(c) for c in "so DONT EN"]
    assert stops.settled(tokens) == "so DONT "
    assert stops.settled([*tokens[:2], 0]) == "so"
    assert stops.kept(tokens) is None
    assert stops.kept([*tokens, ord("D"), ord("!")]) == 11
    assert stops.settled([*tokens, ord("D"), ord("!")]) == "so DONT "


def test_templates_and_what_they_refuse(generator):
    plain = generator.codec.files

    def template(**files):
        return ChatTemplate.read(hf.TokenizerFiles("here", {**plain.files, **files}))

    said = [{"role": "user", "content": "<a> é"}]
    config = {"eos_token": {"content": "</s>"}, "chat_template": [{"name": "default", "template": TEMPLATE}]}
    named = template(**{"tokenizer_config.json": json.dumps(config).encode()})
    assert named.render(said) == "u: <a> é</s>\na:"
    dumped = template(**{"chat_template.jinja": b"{{ messages[0] | tojson }}"})
    assert dumped.render(said) == '{"role": "user", "content": "<a> é"}'
    with pytest.raises(InputError, match="odd role"):
        named.render([{"role": "tool", "content": ""}])
    escaping = template(**{"chat_template.jinja": b"{{ ''.__class__.__mro__[1].__subclasses__() }}"})
    with pytest.raises(InputError, match="the chat template of here fails"):
        escaping.render(said)
    with pytest.raises(InputError, match="here has no chat template"):
        template()


def test_a_file_is_replaced_only_if_asked(tmp_path, capfd):
    out = tmp_path / "answers"
    out.write_text("years of work")
    words = (tmp_path / "no model", "--prompt", "a", "--out", out)
    assert "answers exists already; " in refused(capfd, *words)  # before anything is loaded
    assert "no model" in refused(capfd, *words, "--overwrite")
    assert out.read_text() == "years of work"


def test_bad_input_is_one_line(tiny_run, generator, tmp_path, capfd, monkeypatch):
    folder = tiny_run.folder
    assert "or --chat alone" in refused(capfd, folder)
    assert "max_new_tokens must lie" in refused(capfd, folder, "--prompt", "a", "--max-new-tokens", 0)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert "line 2 is no JSON object with a string `prompt`" in refused(capfd, folder, "--prompts", bad)
    empty = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("tokenizer"))
    monkeypatch.setattr("train.run.tokenizer._read", lambda *_: None)
    assert "has no tokenizer" in refused(capfd, empty, "--prompt", "a")
    monkeypatch.setattr("train.jobs.generate.load_generator", lambda *_: generator)
    assert "leaves no room in the model's context of 32" in refused(capfd, folder, "--prompt", "ab " * 50)
    assert "a prompt is not Unicode text" in refused(capfd, folder, "--prompt", "a\udcff")
    assert "has no chat template" in refused(capfd, folder, "--chat", "--prompt", "a")
    assert "has no chat template" in refused(capfd, folder, "--chat")
