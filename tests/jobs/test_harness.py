"""`mora lm-eval`: requests of the harness, scores of made-up tasks, what is refused."""

import dataclasses
import json
import random
from importlib.metadata import version

import jax
import numpy as np
import pytest
from harness_tasks import write_tasks

from mora_jax import hf
from mora_jax.errors import InputError
from mora_jax.hf.chat import ChatTemplate
from mora_jax.hf.tokenizer_files import TokenizerFiles
from mora_jax.models.generate import Sampling, generate
from mora_jax.models.llama import Llama
from train.cli.main import main
from train.data.codec import Codec
from train.jobs.export import export
from train.jobs.generate import load_generator

lm_eval = pytest.importorskip("lm_eval.tasks", reason="needs the extra eval: pip install 'mora_jax[eval]'")
datasets = pytest.importorskip("datasets")
instance = pytest.importorskip("lm_eval.api.instance")
harness = pytest.importorskip("train.jobs.harness")
HarnessModel = pytest.importorskip("train.jobs.harness_model").HarnessModel

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def generator(tiny_run):
    return load_generator(str(tiny_run.folder), dtype="float32", rows=4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    datasets.disable_progress_bars()
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path_factory.getbasetemp() / "datasets")


def asked(kind, *arguments):
    return [instance.Instance(kind, {}, each, 0) for each in arguments]


def log_p(generator, tokens, count):
    """The log-probability of the last tokens, and whether all are the likeliest, from full logits."""
    with jax.set_mesh(generator.mesh):
        logits = generator.model.apply({"params": generator.params}, np.array(tokens)[None, :-1])[0]
    log_p = jax.nn.log_softmax(logits)[-count:]
    last = np.array(tokens[-count:])
    return float(log_p[np.arange(count), last].sum()), bool((log_p.argmax(-1) == last).all())


def run(capfd, *words):
    capfd.readouterr()
    main(["lm-eval", *map(str, words)])
    return capfd.readouterr()


def refused(capfd, *words):
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["lm-eval", *map(str, words)])
    assert stop.value.code == 2
    err = capfd.readouterr().err.strip()
    assert err.startswith("mora: ")
    assert "\n" not in err
    return err


@pytest.mark.slow
def test_a_continuation_is_scored_behind_the_tokens_of_its_context(generator):
    model, codec = HarnessModel(generator, 4), generator.codec
    pairs = [("abc de", " fgh"), ("abc de ", "fgh"), ("", "ij"), ("abc", " ga"), ("abc", " dd")]
    found = model.loglikelihood(asked("loglikelihood", *pairs))
    assert found[0] == found[1]  # a space at the end belongs to what follows
    before = codec.encode("abc de")
    expected = log_p(generator, codec.encode("abc de fgh"), len(codec.encode("abc de fgh")) - len(before))
    assert found[0] == (pytest.approx(expected[0], abs=1e-5), expected[1])
    alone = codec.encode("ij")
    eos = codec.files.special_ids()["eos_token_id"]  # the tiny data has no begin-of-text tokens
    assert found[2][0] == pytest.approx(log_p(generator, [eos, *alone], len(alone))[0], abs=1e-5)
    assert found[3] != found[4]
    assert (model.asked, model.cut) == (5, 0)


@pytest.mark.slow
def test_a_continuation_is_greedy_if_each_of_its_tokens_is(generator):
    answer = generate(generator.model, generator.params, [[5, 6, 7]], Sampling(max_new_tokens=2))[0]
    other = [answer[0], (answer[1] + 1) % 384]
    pairs = [([5, 6, 7], tokens) for tokens in (answer, other, [other[1], answer[0]], answer[:1])]
    assert [greedy for _, greedy in HarnessModel(generator, 4)._scores(pairs)] == [True, False, False, True]


@pytest.mark.slow
def test_what_is_too_long_is_cut_from_the_left_and_counted(generator):
    model, codec = HarnessModel(generator, 4), generator.codec
    context, answer = "abc de fgh " * 12, " ij"
    tokens = codec.encode(context.rstrip() + " " + answer)
    count = len(tokens) - len(codec.encode(context.rstrip()))
    found = model.loglikelihood(asked("loglikelihood", (context, answer)))[0]
    assert found[0] == pytest.approx(log_p(generator, tokens[-33:], count)[0], abs=1e-5)
    assert model.cut == 1
    small = dataclasses.replace(generator.model.config, vocab_size=300)
    other = dataclasses.replace(generator, model=Llama(small, generator.model.compute))
    with pytest.raises(InputError, match="a vocabulary of 300: the tokenizer is another model's"):
        HarnessModel(other, 4).loglikelihood(asked("loglikelihood", (context, answer)))
    with pytest.raises(InputError, match=r"a continuation has .* tokens, and the model a context of 32"):
        model.loglikelihood(asked("loglikelihood", ("ij", context)))
    with pytest.raises(InputError, match="a continuation has no token of its own: ''"):
        model.loglikelihood(asked("loglikelihood", ("ij", "")))


def test_the_files_of_the_tokenizer_are_read_once_for_many_texts(generator, monkeypatch):
    """A tokenizer.json of 2 MB takes a tenth of a second: more than its text does on a GPU."""
    model, reads, read = HarnessModel(generator, 4), [], TokenizerFiles.special_ids
    monkeypatch.setattr(TokenizerFiles, "special_ids", lambda self: reads.append(1) or read(self))
    generator.codec.__dict__.pop("prefix_id", None)
    model.loglikelihood_rolling(asked("loglikelihood_rolling", *[(text,) for text in ("ab", "cd", "ef")]))
    assert len(reads) == 1


@pytest.mark.slow
def test_a_text_is_scored_in_windows_that_do_not_overlap(generator):
    model, codec = HarnessModel(generator, 4), generator.codec
    text = "abc de fgh " * 12
    tokens = codec.encode(text)
    assert 64 < len(tokens) < 96
    found = model.loglikelihood_rolling(asked("loglikelihood_rolling", (text,), ("ij",), ("",)))
    eos, rest = codec.files.special_ids()["eos_token_id"], len(tokens) - 64
    windows = [([eos, *tokens[:32]], 32), (tokens[31:64], 32), (tokens[-33:], rest)]
    assert found[0] == pytest.approx(sum(log_p(generator, *w)[0] for w in windows), abs=1e-4)
    assert found[1] < 0 == found[2]


@pytest.mark.slow
def test_generation_takes_the_arguments_of_each_request(generator):
    model = HarnessModel(generator, 4)
    plain = {"until": ["\n\n"], "max_gen_toks": 8}
    requests = [("abc de", plain), ("ij", plain), ("abc de", plain | {"max_gen_toks": 3})]
    whole, _, short = model.generate_until(asked("generate_until", *requests))
    assert whole.startswith(short)
    assert len(short) < len(whole)
    contexts = [("abc de", plain), ("fgh", plain), ("hij ga bc ef dd", plain), ("a", plain)]
    rng = np.random.default_rng(0)
    drawn = jax.tree.map(lambda a: rng.normal(0, 0.5, a.shape).astype(a.dtype), generator.params)
    random_model = HarnessModel(dataclasses.replace(generator, params=drawn), 4)
    alone = [random_model.generate_until(asked("generate_until", each))[0] for each in contexts]
    assert random_model.generate_until(asked("generate_until", *contexts)) == alone
    assert len(set(alone)) == 4
    stop = whole[2]
    stopped = model.generate_until(asked("generate_until", ("abc de", {"until": stop, "max_gen_toks": 8})))
    assert stopped == [whole[:2] if stop not in whole[:2] else whole.partition(stop)[0]]
    drawn = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 8}
    assert len(set(model.generate_until(asked("generate_until", *[("abc", drawn)] * 3)))) == 3
    for odd, words in (({"num_beams": 4}, "num_beams: 4"), ({"max_gen_toks": 32}, "32 new tokens")):
        with pytest.raises(InputError, match=words):
            model.generate_until(asked("generate_until", ("abc", odd)))


def test_conversations_are_written_by_the_chat_template(generator, monkeypatch):
    files = hf.TokenizerFiles(
        "here", {**generator.codec.files.files, "chat_template.jinja": TEMPLATE.encode()}
    )
    chatting = dataclasses.replace(generator, codec=dataclasses.replace(generator.codec, files=files))
    model, reads, read = HarnessModel(chatting, 4), [], ChatTemplate.read
    monkeypatch.setattr(ChatTemplate, "read", lambda files: reads.append(1) or read(files))
    said = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "The answer: "}]
    assert model.apply_chat_template(said[:1]) == "<user> abc <a>"
    assert model.apply_chat_template(said, False) == "<user> abc <assistant> The answer: "
    assert len(reads) == 1
    strict = TEMPLATE.replace("<{{", "{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}<{{")
    files.files["chat_template.jinja"] = strict.replace(
        "{{ m.content }} ", "{{ m.content.strip() }}!"
    ).encode()
    del chatting.codec.__dict__["chat_template"]
    assert model.apply_chat_template([{"role": "system", "content": "be"}, *said], False).endswith("answer:")


def test_the_seeds_of_the_harness_are_left_behind():
    random.seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist()
    with harness.harness_seeds():
        assert random.random() == random.Random(0).random()
        assert np.random.rand() == np.random.RandomState(1234).rand()
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states


def test_scores_of_made_up_tasks(tiny_run, generator, tasks, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("train.jobs.generate.load_generator", lambda *_: generator)
    words = ["--include-path", tasks, "--tasks", "choice,text,answer", "--limit", 4, "--num-fewshot", 1]
    out, err = run(capfd, tiny_run.folder, *words, "--out", tmp_path / "scores.json")
    assert [line.split()[:4] for line in out.splitlines()[1:]] == [
        ["choice", "1", "4", "acc"],
        ["choice", "1", "4", "acc_norm"],
        ["text", "1", "4", "bits_per_byte"],
        ["answer", "1", "4", "exact_match"],
    ]
    assert "requests are longer than the model's context of 32 tokens" in err
    written = json.loads((tmp_path / "scores.json").read_text())
    kept = sorted((tiny_run.folder / "lm_eval").glob("000022-*.json"))
    assert json.loads(kept[-1].read_text()) == written
    assert (written["step"], written["limit"], written["lm_eval"]) == (22, 4, version("lm_eval"))
    first = written["scores"][0]
    assert (first["task"], first["version"], first["higher_is_better"]) == ("choice", 1.5, True)
    assert 0 < first["stderr"] < 1 or first["value"] in (0, 1)
    events = list((tiny_run.folder / "tensorboard" / "lm_eval").iterdir())
    assert b"lm_eval/choice/acc_norm" in events[0].read_bytes()
    assert "--overwrite" in refused(capfd, tiny_run.folder, *words, "--out", tmp_path / "scores.json")


@pytest.mark.slow
def test_a_run_its_unmerged_adapters_and_its_export_score_alike(tiny_run, tasks, tmp_path):
    folder = str(tiny_run.folder)
    export(folder, str(tmp_path / "hf"))
    asked = harness.Asked(("choice", "text", "answer"), str(tasks))
    found = []
    for path, merged in ((folder, True), (folder, False), (str(tmp_path / "hf"), True)):
        generator = load_generator(path, merged, "float32", 4)
        # What precedes a text differs: an exported model has a begin-of-text token.
        codec = Codec.of_run(generator.codec.files, bos=False)
        generator = dataclasses.replace(generator, codec=codec)
        scores = harness.run_tasks(generator, harness.load_tasks(asked), asked, 4)
        found.append({(score.task, score.metric): score.value for score in scores})
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)


@pytest.mark.slow
def test_examples_are_turns_of_a_conversation(generator, tasks, monkeypatch):
    files = hf.TokenizerFiles(
        "here", {**generator.codec.files.files, "chat_template.jinja": TEMPLATE.encode()}
    )
    chatting = dataclasses.replace(generator, codec=dataclasses.replace(generator.codec, files=files))
    seen = []
    real = HarnessModel.loglikelihood
    monkeypatch.setattr(
        HarnessModel,
        "loglikelihood",
        lambda self, requests: seen.extend(each.args for each in requests) or real(self, requests),
    )
    asked = harness.Asked(("choice",), str(tasks), num_fewshot=2, limit=1, chat=True)
    harness.run_tasks(chatting, harness.load_tasks(asked), asked, 4)
    said = [part.partition(">")[0] for part in seen[0][0].split("<")[1:]]
    assert said == ["user", "assistant", "user", "assistant", "user", "a"]


def test_bad_input_is_one_line(tiny_run, generator, tasks, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("train.jobs.generate.load_generator", lambda *_: generator)
    monkeypatch.setattr("train.jobs.harness.TaskManager", _own_tasks_alone)
    given = (tiny_run.folder, "--include-path", tasks, "--tasks")
    assert "there is no task 'choise'; did you mean choice?" in refused(capfd, *given, "choise")
    few = "task choice has 4 examples, too few for prompts with 5 (--num-fewshot)"
    assert few in refused(capfd, *given, "choice", "--num-fewshot", "5")
    assert "--tasks must be names" in refused(capfd, *given, "choice,")
    assert "--limit must be at least 0" in refused(capfd, *given, "choice", "--limit", -1)
    assert "has no chat template" in refused(capfd, *given, "choice", "--chat")
    assert "is no folder" in refused(
        capfd, tiny_run.folder, "--tasks", "a", "--include-path", tmp_path / "no"
    )
    away = tasks / "away.yaml"
    away.write_text((tasks / "choice.yaml").read_text().replace("choice.json", "away.json"))
    away.write_text(away.read_text().replace("task: choice", "task: away"))
    assert "task away cannot be loaded, or its data set: " in refused(capfd, *given, "away")
    away.write_text("task: [")
    assert "away.yaml (" in refused(capfd, *given, "away")
    away.unlink()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'mora_jax[eval]'" in refused(capfd, *given, "choice")


def _own_tasks_alone(include_path, include_defaults=True):
    """The harness's own tasks take seconds to list."""
    return lm_eval.TaskManager(include_path=include_path, include_defaults=False)
