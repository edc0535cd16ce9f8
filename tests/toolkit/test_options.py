"""Options by dataclass, YAML file, config.json and command line: one declaration, one check."""

import dataclasses
import json
import math
import random
import re

import pytest

from ssiuu.arguments import fields_of, read_yaml
from ssiuu.commands.unlearn import unlearn
from ssiuu.options import (
    AttackOptions,
    DiagnoseOptions,
    FinetuneOptions,
    ModelOptions,
    UnlearnOptions,
    recorded_model,
)
from ssiuu.pairs import all_options, methods, regularizers
from ssiuu.runs.folder import Run
from tests.support.command_line import run
from tests.support.small_runs import by

PLUGGED = [kind.Options for kind in (*methods().values(), *regularizers().values())]


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What `ssiuu unlearn` would have run with these arguments: its options."""

    def ask(*arguments):
        calls = []
        with monkeypatch.context() as patched:
            patched.setattr("ssiuu.commands.unlearn.unlearn", lambda *given, **_: calls.append(given) or Run(tmp_path))
            patched.setattr("ssiuu.cli._print_summary", lambda _: None)
            result = run("unlearn", *arguments, "--out", tmp_path / "run")
        assert result.status == 0, result.output
        return calls[0][0]

    return ask


@pytest.fixture
def yaml_file(tmp_path):
    """Writes a YAML file."""

    def write(text):
        file = tmp_path / "run.yaml"
        file.write_text(text)
        return file

    return write


@pytest.mark.parametrize(
    "kind",
    [UnlearnOptions, FinetuneOptions, AttackOptions, DiagnoseOptions, *PLUGGED],
    ids=lambda kind: kind.__qualname__,
)
def test_every_option_has_a_help(kind):
    assert [argument.name for argument in fields_of(kind) if not argument.help] == []


def test_a_help_of_several_lines_and_names_is_read():
    class Options:
        """Some.

        Attributes:
            first, second: one line
                and another.

            third: last.
        """

    @dataclasses.dataclass
    class Both(Options):
        """
        Attributes:
            own: mine.
        """

        first: int
        second: int
        third: int
        own: int

    assert [argument.help for argument in fields_of(Both)] == [
        "one line and another.",
        "one line and another.",
        "last.",
        "mine.",
    ]


def test_a_command_line_is_typed(asked):
    options = asked(
        "--method", "gd", "--regularizer", "ssiuu", "--penalty-share", "0.25", "--max-steps", "3", "--threshold", "-1",
        "--bf16", "--known-probability", "0.5", "--facts", "[red]a,b[/]",
    )  # fmt: skip
    assert options == UnlearnOptions(
        method="gd", regularizer="ssiuu", max_steps=3, threshold=-1.0, bf16=True, known_probability=0.5,
        facts="[red]a,b[/]", settings={"penalty_share": 0.25},
    )  # fmt: skip


def test_without_arguments_the_defaults_are_those_of_python(asked):
    assert asked() == UnlearnOptions()


def test_a_file_gives_options_and_the_command_line_overrides_them(asked, yaml_file):
    rate = random.uniform(1e-6, 1e-3)
    file = yaml_file(
        f"method: gd\nregularizer: ssiuu\nlearning_rate: {rate:e}\npenalty_share: 0.5\nbf16: true\nseed: 7\n"
    )
    options = asked("--config", file, "--penalty-share", "None", "--no-bf16", "--seed", 8)
    assert options == UnlearnOptions(
        method="gd", regularizer="ssiuu", learning_rate=float(f"{rate:e}"), seed=8, settings={"penalty_share": None}
    )


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.e-5", ".5e3", "-2e+4", "3e8"])
def test_a_number_with_an_exponent_is_a_number(yaml_file, text):
    assert read_yaml(yaml_file(f"x: {text}")) == {"x": float(text)}


def test_an_integer_may_stand_for_a_float(asked, yaml_file):
    options = asked("--config", yaml_file("weight_decay: 1"))
    assert (options.weight_decay, type(options.weight_decay)) == (1.0, float)


REFUSED = {
    "an unknown key": ("learning_rat: 1", "learning_rat is not an option of .*; did you mean learning_rate\\?"),
    "a key like no other": ("zzz: 1", "zzz is not an option of .*; see `ssiuu unlearn --help`"),
    "a key that is no name": ("1: 2", "1 is not an option of "),
    "a key of another regularizer": (
        "method: gd\npenalty_share: 0.2",
        "penalty_share is not an option of method gd with regularizer none; it is one of regularizer ssiuu",
    ),
    "an argument of the command": ("out: runs", "out is not an option of "),
    "a string for a number": ('learning_rate: "1e-5"', "learning_rate='1e-5'; expected a valid number"),
    "a string for a number of a regularizer": ("penalty_share: much", "penalty_share='much'; expected a valid number"),
    "a fraction for an integer": ("max_steps: 2.5", "max_steps=2.5; expected a valid integer"),
    "a truth for a number": ("max_steps: true", "max_steps=True; expected a valid integer"),
    "a string for a truth": ('bf16: "true"', "bf16='true'; expected a valid boolean"),
    "nothing for a number": ("max_steps:", "max_steps=None; expected a valid integer"),
    "a number for a name": ("method: 3", "method='?3'? "),
    "a list for a name": ("model: [a]", r"model=\['a'\]; expected a valid string"),
    "a key given twice": ("seed: 1\nseed: 2", "cannot be read as YAML: seed is given 2 times; expected once"),
    "a list": ("- seed", "holds list; expected option names and values"),
    "nothing": ("", "holds NoneType; expected option names and values"),
    "no YAML": ("seed: [", "cannot be read as YAML: "),
}


@pytest.mark.parametrize(("text", "said"), REFUSED.values(), ids=REFUSED)
def test_a_file_is_refused_in_one_line(yaml_file, tmp_path, monkeypatch, text, said):
    monkeypatch.delattr("ssiuu.commands.unlearn.unlearn")
    result = run("unlearn", "--config", yaml_file(text), "--out", tmp_path / "run")
    assert result.status == 2
    (line,) = result.output.splitlines()
    assert line.startswith("ssiuu: ")
    assert re.search(said, line), line


def test_a_file_that_is_not_there(tmp_path):
    result = run("unlearn", "--config", tmp_path / "none.yaml", "--out", tmp_path / "run")
    assert (result.status, len(result.output.splitlines())) == (2, 1)
    assert "none.yaml" in result.output


def test_the_sets_on_the_command_line_replace_those_of_a_file(asked, yaml_file):
    facts, sets = yaml_file("facts: people.jsonl"), ("--forget", "f.jsonl", "--retain", "r.jsonl")
    options = asked("--config", facts, *sets)
    assert (options.facts, options.forget, options.retain) == (None, "f.jsonl", "r.jsonl")
    options = asked("--config", yaml_file("forget: f.jsonl\nretain: r.jsonl"), "--facts", "people.jsonl")
    assert (options.facts, options.forget, options.retain) == ("people.jsonl", None, None)


def test_other_commands_read_files_too(monkeypatch, yaml_file, tmp_path):
    calls = []
    monkeypatch.setattr("ssiuu.commands.diagnose.diagnose_runs", lambda *given: calls.append(given))
    monkeypatch.setattr("ssiuu.cli._print_summary", lambda _: None)
    result = run("diagnose", tmp_path, "--config", yaml_file("target: log_prob\nbatch_size: 3"), "--batch-size", 4)
    assert result.status == 0, result.output
    assert calls == [([tmp_path], DiagnoseOptions(batch_size=4, target="log_prob"))]


@pytest.mark.parametrize("method", ["gd", "ssiuu"])
def test_a_run_is_repeated_from_its_config(asked, options, tmp_path, method):
    given = by(options, method, max_steps=1, save_every=0)
    config = unlearn(given, tmp_path / "first").path / "config.json"
    again = asked("--config", config)
    assert again.flat() == all_options(given)


def test_a_config_of_a_later_version_is_refused(yaml_file, tmp_path):
    file = yaml_file(json.dumps({"schema": 2, "method": "gd", "status": "complete", "versions": {}}))
    result = run("unlearn", "--config", file, "--out", tmp_path / "run")
    assert result.status == 2
    assert f"{file} has schema 2, and this version reads up to 1; upgrade ssiuu-kernels" in result.output


def test_what_is_loaded_is_what_a_run_recorded():
    options = UnlearnOptions(
        model="a/b", revision="main", dtype="bfloat16", attn_implementation="eager", device_map="auto"
    )
    config = {**options.flat(), "schema": 1}
    assert recorded_model(config) == ModelOptions("a/b", "main", "bfloat16", "eager", "auto")
    assert recorded_model({"model": "a/b", "dtype": "float32"}) == ModelOptions("a/b")  # of 0.1.0


BAD = {
    "an unknown reporter": (
        "report_to='mlflow' is unknown; expected one of none, tensorboard, wandb",
        {"report_to": "mlflow"},
    ),
    "an engine": ("engine='one' is unknown", {"engine": "one"}),
    "no steps": ("max_steps=0; expected at least 1", {"max_steps": 0}),
    "two sources": ("give either facts, or forget and retain, or data", {"forget": "f", "retain": "r"}),
    "a rate": ("learning_rate=inf; expected a positive number", {"learning_rate": math.inf}),
}


@pytest.mark.parametrize(("said", "values"), BAD.values(), ids=BAD)
def test_options_out_of_range(said, values):
    with pytest.raises(ValueError, match=said):
        UnlearnOptions(**values).check()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_reporter_without_its_package(monkeypatch, name):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=f"report_to='{name}' needs the package {name}; install it"):
        UnlearnOptions(report_to=name).check()
    monkeypatch.setattr("importlib.util.find_spec", lambda package: package)
    UnlearnOptions(report_to=name).check()
