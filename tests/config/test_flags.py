"""Command lines and YAML into dataclasses: what is understood, and the one line for what is not."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest

from mora_jax.errors import InputError, located
from mora_jax.methods import LoRA
from train.config import flags
from train.config.run import RunConfig, to_plain

# Nine times nine times nine ... values, as a few aliases or merged mappings.
LAUGHS = "a0: &a0 [x]\n" + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))
MERGED_LAUGHS = LAUGHS.replace("[x]", "{x: 1}").replace("[", "{<<: [").replace("]", "]}")
LONG = "and not  anything else, " * 4


@dataclasses.dataclass(frozen=True)
class Inner:
    """Inner.

    Attributes:
      width: of something, in metres.
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        if self.width <= 0:
            raise InputError(f"inner.width must be above 0, {LONG}not {self.width}")


@dataclasses.dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
      name: who.
      kind: of what kind.
      inner_part: what is inside.
    """

    name: str
    kind: Literal["one", "two"] = "one"
    inner_part: Inner = dataclasses.field(default_factory=Inner)


def parse(*args: str) -> Command:
    return flags.parse(Command, args, "mora command")


def test_flags_are_understood_with_dashes_underscores_and_equal_signs():
    expected = Command("x", "two", Inner(0.002))
    assert parse("--name", "x", "--kind", "two", "--inner-part.width", "2e-3") == expected
    assert parse("--name=x", "--kind=two", "--inner_part.width=2e-3") == expected


def complaint(*args: str) -> str:
    with pytest.raises(InputError) as error:
        parse(*args)
    message = str(error.value)
    assert "\n" not in message
    assert not set(message) & set("│╭╮╰╯─")
    return message


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--nane", "x"], "unknown option --nane; did you mean --name?"),
        (["--inner-part.widht=2"], "unknown option --inner-part.widht; did you mean --inner-part.width?"),
        (["--zzz"], "unknown option --zzz"),
        (["--name", "x", "stray"], "Unrecognized options: stray"),
        (["--name", "x", "-z"], "Unrecognized options: -z"),
    ],
)
def test_what_is_unknown(args, expected):
    assert complaint(*args) == expected


def test_a_missing_flag_is_named():
    assert "--name" in complaint()
    assert "--name" in complaint("--name")


def test_a_value_that_does_not_parse():
    assert "could not convert string to float: 'wide'" in complaint(
        "--name", "x", "--inner-part.width", "wide"
    )
    message = complaint("--name", "x", "--kind", "three")
    assert "'three'" in message
    assert "--kind" in message
    assert "'one', 'two'" in message


def test_a_complaint_of_the_dataclass_comes_word_for_word():
    """Also where it is longer than a line of tyro's box, which is folded at blanks and at minus signs."""
    expected = f"inner.width must be above 0, {LONG}not -2.5"
    assert complaint("--name", "x", "--inner-part.width", "-2.5") == expected


def test_help_is_printed_and_is_no_error(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert not stop.value.code
    assert "of something, in metres" in capsys.readouterr().out


@pytest.fixture
def write(tmp_path):
    def written(text: str) -> str:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return str(path)

    return written


def test_yaml_numbers_words_and_nesting(write):
    path = write("optimizer:\n  learning_rate: 1e-3\nlog: {wandb: ''}\nmodel.tie_word_embeddings: true\n")
    config = flags.read_config(path)
    assert config.optimizer.learning_rate == 1e-3  # a string, for PyYAML
    assert config.model.tie_word_embeddings is True
    assert config.log.wandb == ""


def test_flags_go_over_the_file(write):
    path = write("steps: 2000\nbatch_size: 8\n")
    config = flags.read_config(path, ["--steps", "3000"])
    assert (config.steps, config.batch_size) == (3000, 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: {directry: x}", "unknown key data.directry; did you mean data.directory?"),
        ("stepps: 1", "unknown key stepps; did you mean steps?"),
        ("method: mora", "method is a mapping such as {name: mora, rank: 128}, not 'mora'"),
        ("method: {name: mroa}", "method.name 'mroa': there is no such method; did you mean mora?"),
        ("method: {name: lora, align: 8}", "method lora has no field align"),
        ("method: {alpha: 8}", "method mora has no field alpha with operator share (it has rank, operator"),
        ("method: {name: full, rank: 8}", "method full has no field rank (it has none)"),
        ("method: {operator: {name: share}}", "has no field operator.name"),
        ("method: {rank: eight}", "mora's rank is of type int, not 'eight'"),
        ("method: {rank: }", "mora's rank is of type int, not None"),
        ("method: {adapt: x}", "method.adapt is now params.adapt"),
        ("compute: {layers: remat}", "compute.layers remat is now compute.layers scan with"),
        ("resume: true", "unknown key resume"),
        ("1: 2", "unknown key 1"),
        ("log: {wandb: }", "log.wandb has no value; give one or remove the key"),
        ("steps: [1, 2]", "steps is one value, not [1, 2]"),
        ("run_dir: {}", "run_dir is one value, not {}"),
        ("stepz: {}", "unknown key stepz"),
        ("a: &a {b: *a}", "it holds more than 10,000 values"),
        ("rules: &a [*a]", "it holds more than 10,000 values"),
        (LAUGHS, "it holds more than 10,000 values"),
        (MERGED_LAUGHS, "it holds more than 10,000 values"),
        ("[" * 3000, "it is nested too deeply"),
        ("#" * 2**18 + "#", "it has 262,145 bytes; at most 262,144 are read"),
        ("seed: 2001-13-45", "not YAML: month must be in 1..12"),
        ("seed: !!int x", "not YAML: invalid literal"),
        ("seed: !!timestamp x", "not YAML: "),
        ("seed: !!int ''", "not YAML: string index out of range"),
        ("seed: !!float '+'", "not YAML: could not convert"),
        ("seed: !!bool x", "not YAML: 'x'"),
        (f"seed: {'1' * 5000}", "not YAML: Exceeds the limit"),
        ("seed: !!python/object/apply:os.getcwd []", "not YAML: could not determine a constructor"),
        ('run_dir: "a\\0b"', "run_dir 'a\\x00b' has characters that cannot be printed"),
        ('run_dir: "\\ud800"', "has characters that cannot be printed"),
        ("steps: 9999999999", "steps must be at most 2,147,483,647, not 9999999999"),
        ("batch_size: 99999999", "batch_size must be at most 16,777,216, not 99999999"),
        ("model: {hidden_size: 99999999}", "model.hidden_size must be at most 1,048,576, not 99999999"),
        ("model: {rope_theta: .nan}", "model.rope_theta must be positive, not nan"),
        ("rules: [[a, {name: lora, rank: 99999}]]", "LoRA's rank is at most 65,536, not 99999"),
        ("rules: [[a, {name: mora, 1: 2}]]", "method mora has no field 1"),
        (f"rules: [[a, {{name: lora, alpha: {10**400}}}]]", "lora's alpha is a number"),
        ("rules: [[[a], train]]", "rules is a list of pairs"),
        ("steps: 0", "steps must be at least 1, not 0"),
        ("- a list", "a config is a mapping of keys to values"),
        ("", "a config is a mapping of keys to values"),
        ("a: [", "not YAML: "),
        ("rules: 3", "rules is a list of pairs"),
        ("rules: [[a, other]]", "'other'"),
        ("rules: [[a, {name: mroa}]]", "mroa"),
    ],
)  # fmt: skip
def test_yaml_complaints_name_the_file_and_the_key(write, text, expected):
    path = write(text)
    with pytest.raises(InputError) as error:
        flags.read_config(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: 2000\nseed: 1\nsteps: 3000\n", "line 3: steps is given again, after line 1; remove one"),
        ("eval: {every: 5}\neval: {batch_size: 8}\n", "line 2: eval is given again, after line 1"),
        ("eval:\n  every: 5\neval.every: 6\n", "line 3: eval.every is given again, after line 2"),
        ("method: {name: lora, rank: 8, rank: 9}\n", "line 1: method.rank is given again, after line 1"),
        ("rules:\n- [a, {name: lora, rank: 8, rank: 9}]\n", "line 2: rules.rank is given again"),
        ("seed: 1\nsteps: 010\n", "line 2: 010 has a leading zero, which YAML reads as octal or as text"),
        ("seed: 007\n", "line 1: 007 has a leading zero"),
        ("seed: -08\n", "line 1: -08 has a leading zero"),
        ("method: {rank: !!int '010'}\n", "line 1: 010 has a leading zero"),
        ("rules: [[.*, {name: lora, rank: 010}]]\n", "line 1: 010 has a leading zero"),
        ("eval:\n  every: 1:30\n", "line 2: YAML reads 1:30 in base 60; write one number"),
        ("optimizer: {eps: 1:30.5}\n", "line 1: YAML reads 1:30.5 in base 60"),
    ],
)
def test_what_yaml_would_read_otherwise_than_it_is_written_is_refused(write, text, expected):
    path = write(text)
    with pytest.raises(InputError) as error:
        flags.read_config(path)
    assert str(error.value).startswith(f"{path}: {expected}")


@pytest.mark.parametrize(
    "text", ["yes", "off", "no", "True", "007", "08", "0x10", "1_000", "1.10", "1:30", "2024-01-01 10:00:00"]
)
def test_text_stays_as_it_is_written(write, text):
    config = flags.read_config(write(f"run_dir: {text}\ncompilation: {{cache: {text}}}\nlog.wandb: {text}\n"))
    assert (config.run_dir, config.compilation.cache, config.log.wandb) == (text, text, text)


def test_yaml_may_merge_a_section_and_give_its_keys_again(write):
    text = "eval: &e {every: 5, batch_size: 8}\ncheckpoint: {<<: {every: 10, keep: 3}, every: 20}\n"
    config = flags.read_config(write(text))
    assert (config.eval.every, config.checkpoint.every, config.checkpoint.keep) == (5, 20, 3)


def test_a_value_is_never_taken_for_a_flag(write):
    config = flags.read_config(write("run_dir: --seed=5\nlog: {wandb: --steps}"))
    assert (config.run_dir, config.log.wandb, config.seed) == ("--seed=5", "--steps", 0)


def test_aliases_are_understood(write):
    config = flags.read_config(write("checkpoint: &all {keep: 0}\neval: {every: &n 7, max_batches: *n}"))
    assert (config.checkpoint.keep, config.eval.every, config.eval.max_batches) == (0, 7, 7)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml is missing"):
        flags.read_config(str(tmp_path / "nowhere.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(InputError, match="is not UTF-8 text"):
        flags.read_config(str(tmp_path / "binary.yaml"))


def test_every_scalar_of_a_config_has_a_flag():
    def names(config, prefix=""):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if field.name == "method":
                yield from (f"method.{name}" for name in to_plain(config)["method"])
            elif dataclasses.is_dataclass(value):
                yield from names(value, f"{prefix}{field.name}.")
            elif field.name not in ("rules", "groups"):
                yield prefix + field.name

    assert list(flags.scalar_fields(RunConfig)) == list(names(RunConfig()))
    assert len(list(names(RunConfig()))) > 40
    assert "method.train_factors" in flags.scalar_fields(RunConfig, LoRA())
    assert "method.operator" not in flags.scalar_fields(RunConfig, LoRA())
    assert [name for name in flags.scalar_fields(RunConfig, "full") if "method" in name] == ["method.name"]


def test_located_leaves_other_errors_alone(tmp_path: Path):
    with pytest.raises(KeyError), located("x"):
        raise KeyError("y")
