"""Examples of prompts and conversations: which tokens they become, which count, what is refused."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from made_text import contents, prepared, random_texts
from made_tokenizers import byte_level, write_folder

from mora_jax.errors import InputError
from mora_jax.hf.tokenizer_files import read_tokenizer
from train.data.rows.build import prepare
from train.data.rows.info import DataInfo
from train.data.rows.options import RowOptions
from train.data.rows.read import eval_batches, rows_from, train_batches
from train.data.text.forms import Form
from train.data.tokenizer import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|end|>{% endgeneration %}{% else %}{{ m['content'] }}<|end|>{% endif %}"
    "{{ '\n' }}{% endfor %}"
)
T = 96
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "  hi\n\nyou"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "yes"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of byte-level BPE with a chat template."""
    tokenizer = byte_level(random_texts(200, seed=0))
    return write_folder(tmp_path_factory.mktemp("t") / "tokenizer", tokenizer, chat_template=TEMPLATE)


def made(tokenizer: Path, folder: Path, lines: list[Any], form: str = "messages", **changes: Any) -> DataInfo:
    """Prepares lines of JSON as rows of T tokens."""
    (folder / "lines.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    (folder / "held-out.jsonl").write_text(json.dumps(lines[-1]) + "\n")
    options = {n: changes.pop(n) for n in ("loss", "pack", "overlong") if n in changes}
    arguments = {
        "source": str(folder / "lines.jsonl"),
        "validation": str(folder / "held-out.jsonl"),
        "tokenizer": str(tokenizer),
        "sequence_length": T,
        "out": str(folder / "data"),
        "workers": 1,
        "options": RowOptions(Form.of(form, changes.pop("fields", "")), **options),
    }
    return prepare(**(arguments | changes))


def stored(info: DataInfo) -> list[list[tuple[str, list[bool]]]]:
    """Returns the text of each example of each training row, and which of its tokens count."""
    encoder, rows = read_tokenizer(info.directory).load(), []
    for row in tfds.builder_from_directory(info.directory).as_data_source("train"):
        tokens, weights, segments = (row[name] for name in ("tokens", "weights", "segments"))
        assert not tokens[segments == 0].any()
        assert not weights[segments == 0].any()
        assert sorted(set(segments[segments > 0])) == list(range(1, segments.max() + 1))
        assert ((segments[1:] >= segments[:-1]) | (segments[1:] == 0)).all()
        rows.append(
            [
                (decoded(encoder, tokens[segments == s]), (weights[segments == s] > 0).tolist())
                for s in range(1, segments.max() + 1)
            ]
        )
    return rows


def decoded(encoder: Any, tokens: Any) -> str:
    if hasattr(encoder, "decode_batch"):
        return encoder.decode(list(map(int, tokens)), skip_special_tokens=False)
    return encoder.decode(list(map(int, tokens)))


def counted(info: DataInfo) -> list[str]:
    """Returns the text that counts of each training example."""
    encoder = read_tokenizer(info.directory).load()
    found = []
    for row in tfds.builder_from_directory(info.directory).as_data_source("train"):
        for s in range(1, row["segments"].max() + 1):
            found.append(decoded(encoder, row["tokens"][(row["segments"] == s) & (row["weights"] > 0)]))
    return found


def test_prompts_and_completions(folder: Path, tmp_path: Path):
    """The completion counts with its end-of-text token; short examples share a row."""
    lines = [{"prompt": f"key {i}:", "completion": f" value {i}"} for i in range(9)]
    info = made(folder, tmp_path, lines, "prompt")
    assert sorted(text for row in stored(info) for text, _ in row) == [
        f"key {i}: value {i}<|end|>" for i in range(9)
    ]
    assert sorted(counted(info)) == [f" value {i}<|end|>" for i in range(9)]
    assert info.rows["train"] < 5
    assert (info.form, info.loss, info.eos_id) == ("prompt", "completions", 0)


@pytest.mark.parametrize("template", [TEMPLATE, MARKED])
def test_conversations(folder: Path, tmp_path: Path, template: str):
    """What the assistant says counts up to its end, whether the template marks it or not."""
    (tmp_path / "own.jinja").write_text(template)
    info = made(folder, tmp_path, [{"messages": CHAT}], template=str(tmp_path / "own.jinja"))
    ((text, _),) = stored(info)[0]
    assert text == "".join(f"<|start|>{m['role']}\n{m['content']}<|end|>\n" for m in CHAT)
    assert counted(info) == ["  hi\n\nyou<|end|>yes<|end|>"]
    assert read_tokenizer(info.directory).files["chat_template.jinja"] == template.encode()


def test_a_template_may_write_prompts(folder: Path, tmp_path: Path):
    """The tokenizer has one, which is not used unless it is asked for."""
    (tmp_path / "own.jinja").write_text(MARKED)
    line = {"query": "a", "response": "b"}
    info = made(folder, tmp_path, [line], "query", template=str(tmp_path / "own.jinja"))
    ((text, _),) = stored(info)[0]
    assert text == "<|start|>user\na<|end|>\n<|start|>assistant\nb<|end|>\n"
    assert counted(info) == ["b<|end|>"]


def test_everything_counts_if_wanted(folder: Path, tmp_path: Path):
    info = made(folder, tmp_path, [{"query": "a", "response": "b"}], "query", loss="all")
    assert counted(info) == ["ab<|end|>"]


def test_other_names_of_fields(folder: Path, tmp_path: Path):
    lines = [{"instruction": "a", "output": "b"}]
    info = made(folder, tmp_path, lines, "prompt", fields="prompt=instruction,completion=output")
    assert (counted(info), info.fields) == (["b<|end|>"], "prompt=instruction,completion=output")


def test_a_completion_follows_its_prompt_without_the_space_of_sentencepiece(tmp_path: Path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in random_texts(60, 1)))
    train_tokenizer(str(tmp_path / "text.jsonl"), str(tmp_path / "t.model"), 300)
    lines = [{"prompt": "a:", "completion": "bc"}, {"prompt": "a:", "completion": "\n bc"}]
    info = made(tmp_path / "t.model", tmp_path, lines, "prompt")
    assert [text for text, _ in stored(info)[0]] == ["a:bc", "a:\n bc"]


def test_long_examples_are_dropped_or_cut(folder: Path, tmp_path: Path):
    lines = [{"prompt": "p" * 10, "completion": "c" * 100}, {"prompt": "p" * 100, "completion": "c"}]
    lines += [{"prompt": "x", "completion": "y"}]
    for how, texts in (("drop", ["xy<|end|>"]), ("cut", ["p" * 10 + "c" * 86, "xy<|end|>"])):
        out = tmp_path / how
        out.mkdir()
        info = made(folder, out, lines, "prompt", overlong=how)
        assert sorted(text for row in stored(info) for text, _ in row) == texts
        assert (info.counts["train"].dropped, info.counts["train"].cut) == (3 - len(texts), len(texts) - 1)
        assert info.counts["train"].documents == 3


def test_one_document_a_row(folder: Path, tmp_path: Path):
    """Truncated, padded, and the padding ignored."""
    lines = [{"text": "short"}, {"text": "z" * 200}]
    info = made(folder, tmp_path, lines, "text", pack=False, overlong="cut")
    assert [text for row in stored(info) for text, _ in row] == ["short<|end|>", "z" * T]
    assert counted(info) == ["short<|end|>", "z" * T]


def test_rows_are_filled(folder: Path, tmp_path: Path):
    lines = [{"prompt": t[:9], "completion": t[9:20] + "."} for t in random_texts(300, seed=3)]
    info = made(folder, tmp_path, lines, "prompt")
    counts = info.counts["train"]
    assert counts.tokens > 0.95 * T * (counts.rows - 1)
    assert sum(len(row) for row in stored(info)) == counts.documents == len(lines)


@pytest.mark.slow
def test_rows_do_not_depend_on_workers(folder: Path, tmp_path: Path):
    lines = [{"prompt": t[:9], "completion": t[9:20] + "."} for t in random_texts(100, seed=3)]
    for part in range(2):
        text = "".join(json.dumps(each) + "\n" for each in lines[part::2])
        (tmp_path / f"s{part}.jsonl").write_text(text)
    source = str(tmp_path / "s*.jsonl")
    for count in (1, 2):
        made(folder, tmp_path, lines, "prompt", source=source, workers=count, out=str(tmp_path / str(count)))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_a_tool_call_needs_no_text(folder: Path, tmp_path: Path):
    """Its content is null, as OpenAI writes it."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    chat = [CHAT[1], call, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "four"}]
    info = made(folder, tmp_path, [{"messages": chat}])
    assert counted(info) == ["<|end|>four<|end|>"]


def test_equal_examples_are_in_one_split(folder: Path, tmp_path: Path):
    lines = [{"prompt": f"{i % 50}", "completion": f"c{i % 50}"} for i in range(100)]
    info = made(folder, tmp_path, lines, "prompt", validation="", validation_share=0.3)
    train = counted(info)
    rows = tfds.builder_from_directory(info.directory).as_data_source("validation")
    held_out = sum(int(row["segments"].max()) for row in rows)
    assert len(train) + held_out == 100
    assert 10 < held_out < 60
    assert all(train.count(text) == 2 for text in train)


@pytest.mark.parametrize(
    ("messages", "wrong"),
    [
        ([{"content": "x"}], r"a message without `role` \(message 1"),
        ([*CHAT, {"role": "bot", "content": "x"}], "a message of the unknown role 'bot'; known are system"),
        (CHAT[:2], "a conversation that ends with the user"),
        (CHAT[:1], "a conversation without a message of the assistant"),
        ([{"role": "assistant", "content": ""}], "a message of the assistant without text"),
        ([{"role": "assistant"}], "a message without a string `content`"),
        ([], "no list of messages `messages`"),
        ([{"role": "assistant", "content": "\ud800"}], "a message with a lone surrogate"),
    ],
)
def test_a_bad_conversation_is_named_or_skipped(folder: Path, tmp_path: Path, messages: list, wrong: str):
    lines = [{"messages": CHAT}, {"messages": messages}, {"messages": CHAT}]
    with pytest.raises(InputError, match=rf"lines.jsonl: line 2 has {wrong}"):
        made(folder, tmp_path, lines)
    assert made(folder, tmp_path, lines, skip_lines=1).counts["train"].skipped_lines == 1


def test_bad_prompts(folder: Path, tmp_path: Path):
    good = {"prompt": "a", "completion": "b"}
    for bad, wrong in (
        ({"prompt": "a"}, r"has no string `completion` \(it has prompt; --fields names those to read\)"),
        ({"prompt": "a", "completion": ""}, "has a completion of no token"),
    ):
        with pytest.raises(InputError, match=rf"lines.jsonl: line 2 {wrong}"):
            made(folder, tmp_path, [good, bad, good], "prompt")
    info = made(folder, tmp_path, [good, {"prompt": "a", "completion": ""}, good], "prompt", skip_lines=1)
    assert (info.counts["train"].skipped_lines, info.counts["train"].documents) == (1, 2)
    with pytest.raises(InputError, match="2 examples, and none is left: they are longer than a row of 2"):
        made(folder, tmp_path, [good, good], "prompt", out=str(tmp_path / "none"), sequence_length=2)


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        (
            "{{ raise_exception('roles must alternate') }}",
            r"line 1 .*own\.jinja fails: roles must alternate",
        ),
        ("{% for m in %}", r"^the chat template of \S+/own\.jinja fails: Expected an expression"),
        ("{{ messages | length }}", "line 1 .* in another way once others follow"),
    ],
)
def test_a_template_that_fails(folder: Path, tmp_path: Path, template: str, wrong: str):
    (tmp_path / "own.jinja").write_text(template)
    with pytest.raises(InputError, match=wrong):
        made(folder, tmp_path, [{"messages": CHAT}], template=str(tmp_path / "own.jinja"))


def test_what_does_not_go_together(folder: Path, tmp_path: Path):
    lines = [{"messages": CHAT, "text": "x", "prompt": "a", "completion": "b"}]
    bare = write_folder(tmp_path / "bare", (folder / "tokenizer.json").read_text())
    for wrong, tokenizer, form, changes in (
        ("has no chat template", bare, "messages", {}),
        ("--template is for prompts and conversations", folder, "text", {"template": "x"}),
        ("--bos does not go with a chat template", folder, "messages", {"bos": True}),
        ("--overlong is for rows of whole examples", folder, "text", {"overlong": "cut"}),
        ("--validation-share needs --source or --mixture, and no", folder, "text", {"validation_share": 0.1}),
        ("must be above 0 and below 1, not 2", folder, "text", {"validation_share": 2, "validation": ""}),
        ("'input=x' is not one of prompt=KEY, completion=KEY", folder, "prompt", {"fields": "input=x"}),
    ):
        with pytest.raises(InputError, match=wrong):
            made(tokenizer, tmp_path, lines, form, **changes)
    with pytest.raises(InputError, match="'chat' must be one of text, prompt, messages, query"):
        Form.of("chat")
    with pytest.raises(InputError, match="--text-key names its key"):
        Form.of("text", "text=x")
    with pytest.raises(InputError, match="--text-key x is not for the form prompt"):
        Form.of("prompt", "", "x")


def test_other_options_are_refused(folder: Path, tmp_path: Path):
    lines = [{"prompt": "a", "completion": "b"}]
    made(folder, tmp_path, lines, "prompt")
    for name, value in (("loss", "all"), ("pack", False), ("overlong", "cut")):
        with pytest.raises(InputError, match=f"was prepared with another {name}"):
            made(folder, tmp_path, lines, "prompt", **{name: value})


def test_batches_say_what_counts(folder: Path, tmp_path: Path):
    lines = [{"prompt": f"key {i}:", "completion": f" value {i}"} for i in range(40)]
    info = made(folder, tmp_path, lines, "prompt")
    source = tfds.builder_from_directory(info.directory).as_data_source("train")
    assert info.rows["train"] > 2
    numbers = rows_from(len(source), 3, 2, 2)
    batch = next(train_batches(info, 2, seed=3, start_step=1))
    for name, array, dtype in (
        ("tokens", batch.tokens_BT, np.int32),
        ("weights", batch.weights_BT, np.float32),
        ("segments", batch.segments_BT, np.int32),
    ):
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, [source[row][name] for row in numbers])
    (whole,) = eval_batches(info, "train", len(source) + 1, None)
    np.testing.assert_array_equal(whole.weights_BT[:-1], [row["weights"] for row in source])
    assert not whole.weights_BT[-1].any()  # a row that pads the batch
    kinds = [len(np.unique(row["segments"])) for row in source]  # with 0, the padding
    assert batch.most_segments == whole.most_segments == max(kinds) > 2


@pytest.mark.parametrize(("bos", "eos"), [(False, True), (True, False), (True, True)])
def test_documents_as_segments(text: Path, tmp_path: Path, bos: bool, eos: bool):
    """Each document of joined ones has its own number in the row, its end-of-text token with it."""
    info = prepared(text, tmp_path / "data", bos=bos, eos=eos)
    plain = next(train_batches(info, 8, seed=0, start_step=0))
    assert plain.segments_BT is None
    batch = next(train_batches(info, 8, seed=0, start_step=0, document_mask=True))
    np.testing.assert_array_equal(batch.tokens_BT, plain.tokens_BT)
    assert batch.weights_BT is None
    for tokens, segments in zip(batch.tokens_BT.tolist(), batch.segments_BT.tolist(), strict=True):
        number = 1
        for at, token in enumerate(tokens):
            number += at > 0 and (tokens[at - 1] == info.eos_id if eos else token == info.bos_id)
            assert segments[at] == number
    (whole,) = eval_batches(info, "train", info.rows["train"], None, document_mask=True)
    assert 1 < whole.segments_BT.max() <= batch.most_segments <= whole.segments_BT.max() + 1
    assert plain.most_segments == 0
    assert next(eval_batches(info, "validation", 64, 1, document_mask=True)).segments_BT.max() > 1


def test_documents_without_a_token_between_them_are_no_segments(text: Path, tmp_path: Path):
    info = prepared(text, tmp_path / "data", eos=False)
    with pytest.raises(InputError, match=r"data.document_mask: .*data has no token between its documents"):
        train_batches(info, 1, seed=0, start_step=0, document_mask=True)


@pytest.mark.slow
def test_conversations_are_those_of_transformers(tmp_path: Path):
    """Rows hold the conversations whole, and exactly the tokens count that transformers marks."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    texts = random_texts(400, seed=5)
    tokenizer = write_folder(tmp_path / "t", byte_level(texts), chat_template=MARKED)
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer / "tokenizer.json"), chat_template=MARKED
    )
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    chats = [turns[i : i + 2 + 2 * (i % 3)] for i in range(0, 360, 6)]
    info = made(tokenizer, tmp_path, [{"messages": chat} for chat in chats], sequence_length=512)
    assert info.counts["train"].dropped == 0
    expected = []
    for chat in chats:
        found = reference.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        expected.append((found["input_ids"], found["assistant_masks"]))
    read = []
    for row in tfds.builder_from_directory(info.directory).as_data_source("train"):
        for segment in range(1, row["segments"].max() + 1):
            here = row["segments"] == segment
            read.append((row["tokens"][here].tolist(), row["weights"][here].tolist()))
    assert sorted(read) == sorted(expected)


def test_a_mixture_reads_each_source_so_often(folder: Path, tmp_path: Path):
    """Copies of an example lie in other rows."""
    for name in ("one", "two", "three"):
        lines = [{"prompt": f"{name} {i}", "completion": "!"} for i in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mixture = [
        f"{tmp_path}/{name}.jsonl={times}" for name, times in (("one", 2.25), ("two", 0.5), ("three", 1))
    ]
    info = made(folder, tmp_path, [lines[0] | {"prompt": "p"}], "prompt", source="", mixture=mixture)
    rows = [[text for text, _ in row] for row in stored(info)]
    counts = Counter(text for row in rows for text in row)
    one, two, three = (
        Counter(count for text, count in counts.items() if text.startswith(name))
        for name in ("one", "two", "three")
    )
    assert three == {1: 100}
    assert set(one) == {2, 3}
    assert 10 < one[3] < 40
    assert one[2] + one[3] == 100
    assert set(two) == {1}
    assert 35 < two[1] < 65
    assert all(len(set(row)) == len(row) for row in rows)
    with pytest.raises(InputError, match="was prepared with another train"):
        made(folder, tmp_path, lines[:1], "prompt", source="", mixture=[*mixture[:2], mixture[2] + "1"])
    for wrong in ("x", "x=0", "=1", "x=nan"):
        with pytest.raises(InputError, match="must be SOURCE=TIMES, with times above 0"):
            made(folder, tmp_path, lines, "prompt", source="", mixture=[wrong])
    with pytest.raises(InputError, match="--source and --mixture exclude each other"):
        made(folder, tmp_path, lines, "prompt", mixture=mixture)
    for again in (mixture[2], f"{tmp_path}/t*.jsonl=2"):
        with pytest.raises(InputError, match=r"t\w+\.jsonl is in the training text twice"):
            made(folder, tmp_path, lines, "prompt", source="", mixture=[*mixture, again])


def test_a_mixture_with_a_validation_share(folder: Path, tmp_path: Path):
    """A held-out example is in no row of training, however often its source is read; bad lines count once."""
    lines = [{"prompt": f"{i}", "completion": "!"} for i in range(100)]
    changes = {"source": "", "validation": "", "validation_share": 0.2, "skip_lines": 3}
    mixture = [f"{tmp_path}/lines.jsonl=3"]
    bad = [{"bad": 1}, *({"prompt": prompt, "completion": ""} for prompt in "ab")]
    info = made(folder, tmp_path, [*lines, *bad], "prompt", mixture=mixture, **changes)
    train, held_out = (info.counts[split] for split in ("train", "validation"))
    assert train.documents == 3 * (100 - held_out.documents)
    assert 8 < held_out.documents < 35
    assert train.skipped_lines + held_out.skipped_lines == 3
