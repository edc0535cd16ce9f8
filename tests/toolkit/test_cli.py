"""The command line, as a user meets it."""

import json
import logging
import os
import re
import subprocess
import sys

import pytest

from ssiuu.arguments import Parser, fields_of, parameters_of
from ssiuu.attacks.attack import Attack
from ssiuu.cli import COMMANDS
from ssiuu.methods.registry import methods
from ssiuu.regularizers.registry import regularizers
from tests.support.command_line import run
from tests.support.run_folders import write_run


def raising(error):
    """A function that fails with this, whatever it is given."""

    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = run(command, "--help")
    assert result.status == 0
    assert "Example" in result.output


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_the_commands_are_listed(words):
    result = run(*words)
    assert result.status == 0
    assert [line.split()[0] for line in result.output.splitlines() if line.startswith("  ") and line[2] != " "] == list(
        COMMANDS
    )


def test_help_is_readable_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for command in COMMANDS:
        assert max(map(len, run(command, "--help").output.splitlines())) <= 80


@pytest.mark.parametrize("words", [["--help"], ["attack", "--help"], ["finetune", "--help"], ["report", "--help"]])
def test_help_waits_for_no_torch(words):
    script = f"import sys; from ssiuu.cli import main; main({words}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


# A name that a script has in it must not go away.
FLAGS = """
    --out --model --method --facts --forget --retain --forget-people --retain-people --known-probability --shots
    --learning-rate --weight-decay --penalty-weight --penalty-share --target --engine --update-in-backward --max-steps
    --forget-batch --retain-batch --accumulate --threshold --evaluate-every --save-every --evaluation-facts --dtype
    --bf16 --gradient-checkpointing --trust-remote-code --seed --resume --regularizer --config
"""


def test_the_help_of_unlearn_names_its_options():
    shown = run("unlearn", "--help").output
    assert {flag for flag in FLAGS.split() if f"{flag} " not in shown and f"{flag}," not in shown} == set()
    assert "`ssiuu methods`" in " ".join(shown.split())


def test_the_help_of_unlearn_follows_the_method():
    shown = run("unlearn", "--method", "gd", "--help").output
    assert "--penalty-share float" not in shown
    assert "--penalty-share float" in run("unlearn", "--method", "gd", "--regularizer", "ssiuu", "--help").output


def test_a_percent_sign_in_a_help():
    def function(*, share: float = 0.5):
        """Do.

        Args:
            share: 10 % of it.
        """

    parser = Parser("ssiuu do", "Do.", parameters_of(function), {})
    assert "10 % of it." in parser.help()


def test_env():
    assert "backend native: " in run("env").output


REFUSED = {
    "an unknown command": (["lern"], "lern is not a command; expected one of demo, finetune, unlearn, attack, "),
    "an unknown method": (["unlearn", "--method", "magic"], "method='magic' is unknown; expected one of "),
    "an unknown regularizer": (["unlearn", "--regularizer", "l3"], "regularizer='l3' is unknown; expected one of "),
    "an unknown option": (
        ["unlearn", "--penalty-shar", "0.2"],
        "--penalty-shar is not an option of method gd with regularizer ssiuu; did you mean --penalty-share?",
    ),
    "an option with its value": (["evaluate", "runs/a", "--zzz=1"], "--zzz is not an option of `ssiuu evaluate`; see"),
    "an option of another regularizer": (
        ["unlearn", "--method", "gd", "--penalty-share", "0.2"],
        "--penalty-share is not an option of method gd with regularizer none; it is one of regularizer ssiuu",
    ),
    "a word too many": (["env", "now"], "now is not an option of `ssiuu env`"),
    "no value": (["unlearn", "--out"], "argument --out: expected one argument; see `ssiuu unlearn --help`"),
    "no method": (["unlearn", "--method"], "argument --method: expected one argument; see `ssiuu unlearn --help`"),
    "no folder": (["unlearn"], "--out is missing; see `ssiuu unlearn --help`"),
    "no run": (["attack"], "the following arguments are required: RUN; see `ssiuu attack --help`"),
    "text for a number": (["unlearn", "--penalty-share", "much"], "--penalty-share='much'; expected a valid number"),
    "a fraction of a step": (["unlearn", "--max-steps", "2.5"], "--max-steps='2.5'; expected a valid integer"),
    "text in a list of numbers": (
        ["attack", "runs/a", "--fraction", "0.1", "--fraction", "half"],
        "--fraction=['0.1', 'half']; expected a valid number",
    ),
    "an unknown method to list": (["methods", "magic"], "'magic' is not a method or regularizer; expected one of "),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_a_refusal_is_one_line_with_status_2(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert (result.status, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"ssiuu: {said}")
    assert not list(tmp_path.iterdir())


def test_the_list_of_methods(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = run("methods").output
    assert max(map(len, text.splitlines())) < 80
    lines = text.splitlines()
    for name, kind in {**methods(), **regularizers()}.items():
        assert [line for line in lines if line.split("  ")[:2] == [name, kind.label or kind.summary]]
        for argument in fields_of(kind.Options):
            assert f"    {argument.flag} (default {argument.default})" in lines
            assert argument.help in " ".join(text.split())
        assert kind.source in " ".join(text.split())


def test_one_method_is_shown_alone():
    text = run("methods", "gd").output
    assert "gd  GD  gradient difference" in text
    assert "gradient ascent" not in text
    assert "penalty" not in text


def test_lists_are_given_word_by_word(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("ssiuu.commands.attack.attack_run", lambda *given: calls.append(given))
    monkeypatch.setattr("ssiuu.cli._print_summary", lambda _: None)
    folder = tmp_path / "[a],b"
    result = run("attack", folder, "--kind", "harmful", "--fraction", 0.1, "--fraction", 0.2, "--learning-rate", 1e-3,
                 "--seed", 3, "--seed", 4, "--steps", 2, "--evaluate-every", 1)  # fmt: skip
    assert result.status == 0, result.output
    common = {"steps": 2, "evaluate_every": 1}
    expected = [Attack("harmful", p, 1e-3, seed, **common) for p in (0.1, 0.2) for seed in (3, 4)]
    assert calls == [(folder, expected)]


FAILURES = {
    "a defect": (KeyError("fs"), "ssiuu: KeyError: 'fs' (SSIUU_TRACEBACK=1 shows where)"),
    "a missing package": (
        ModuleNotFoundError("No module named 'rouge_score'", name="rouge_score"),
        "ssiuu: No module named 'rouge_score'; install the package rouge_score",
    ),
    "a full disk": (
        OSError(28, "No space left on device"),
        "ssiuu: the disk is full ([Errno 28] No space left on device); free some space, and give the command again "
        "(ssiuu unlearn: with --resume)",
    ),
    "many lines": (ValueError("one\n  two\nthree"), "ssiuu: one two three"),
    "memory": (MemoryError("cannot allocate"), "ssiuu: MemoryError: cannot allocate (SSIUU_TRACEBACK=1 shows where)"),
}


@pytest.mark.parametrize(("error", "line"), FAILURES.values(), ids=FAILURES)
def test_whatever_fails_is_one_line_with_status_2(monkeypatch, tmp_path, error, line):
    monkeypatch.setattr("ssiuu.report.page.write_report", raising(error))
    result = run("report", tmp_path)
    assert result.status == 2
    assert result.output.splitlines() == [line]


def test_a_defect_shows_where_on_request(monkeypatch, tmp_path):
    monkeypatch.setattr("ssiuu.report.page.write_report", raising(KeyError("fs")))
    monkeypatch.setenv("SSIUU_TRACEBACK", "1")
    with pytest.raises(KeyError):
        run("report", tmp_path)


def test_a_warning_is_one_line(monkeypatch, tmp_path):
    def warn(*_):
        logging.getLogger("ssiuu.report").warning("one\n  two %s", "[three] " * 40)

    monkeypatch.setattr("ssiuu.report.page.write_report", warn)
    monkeypatch.setattr("ssiuu.cli._print_summary", lambda _: None)
    monkeypatch.setattr(logging.root, "handlers", [])
    assert run("report", tmp_path).stderr.splitlines() == ["warning: one two " + " ".join(["[three]"] * 40)]


def test_an_interrupt_is_one_line_too(monkeypatch, tmp_path):
    monkeypatch.setattr("ssiuu.report.page.write_report", raising(KeyboardInterrupt()))
    result = run("report", tmp_path)
    assert result.status == 130
    assert result.output.startswith("ssiuu: interrupted; ")


@pytest.mark.parametrize("charset", ["latin-1", "ascii"])
def test_a_terminal_without_an_arrow(tmp_path, charset):
    folder = write_run(tmp_path / "läufe" / "ein Läuf → zwei", "gd")
    result = run("report", folder, folder, "--out", tmp_path / "report → ü", charset=charset)
    assert result.status == 0, result.output
    assert "1.00 -> 0.33" in result.output
    assert "zwei" in result.output


def test_a_name_that_is_not_utf_8(tmp_path):
    folder = write_run(tmp_path / os.fsdecode(b"caf\xe9"), "gd")
    for arguments in (("report", folder), ("finetune", "--out", tmp_path / os.fsdecode(b"caf\xe9-2"))):
        result = run(*arguments)
        assert result.status == 2
        assert re.search(r"^ssiuu: run folder .*caf\?.* has a name that is not UTF-8", result.output)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
@pytest.mark.parametrize("command", ["unlearn", "finetune", "attack"])
def test_an_environment_of_more_processes_is_refused(monkeypatch, tmp_path, name, command):
    monkeypatch.setenv(name, "2")
    result = run(command, *([tmp_path] if command == "attack" else ["--out", tmp_path / "run"]))
    assert result.status == 2
    assert result.output.startswith(f"ssiuu: {name}=2 in the environment; expected one process")
    assert not (tmp_path / "run").exists()


def test_names_in_square_brackets(model_dir, facts_file, tmp_path):
    folder = tmp_path / "[red]runs[/]" / "[bold]x$y_1$[/bold]"
    common = ("--model", model_dir, "--facts", facts_file)
    steps = [
        (
            "unlearn",
            *common,
            "--forget-people",
            2,
            "--retain-people",
            3,
            "--shots",
            0,
            "--max-steps",
            1,
            "--out",
            folder,
        ),
        ("attack", folder, "--kind", "harmful", "--pool", "all", "--learning-rate", 1e-3, "--steps", 1),
        ("report", folder, folder, "--out", tmp_path / "[/red]report"),
    ]
    for step in steps:
        result = run(*step)
        assert result.status == 0, result.output
    assert f"({folder.name})" in result.output.replace("\n", "")
    assert f"attack {folder.name}" in run(*steps[1]).output
    assert (tmp_path / "[/red]report" / "report.html").is_file()


def test_one_run_through_all_commands(model_dir, facts_file, tmp_path):
    folder = tmp_path / "run"
    steps = [
        ("unlearn", "--model", model_dir, "--facts", facts_file, "--forget-people", 2, "--retain-people", 3,
         "--shots", 0, "--max-steps", 3, "--learning-rate", 1e-3, "--penalty-share", 0.3,
         "--engine", "two-backward", "--update-in-backward", "--out", folder),
        ("attack", folder, "--kind", "harmful", "--pool", "all", "--learning-rate", 1e-3, "--steps", 2),
        ("diagnose", folder),
        ("evaluate", folder),
        ("report", folder, "--out", tmp_path / "report"),
    ]  # fmt: skip
    for step in steps:
        result = run(*step)
        assert result.status == 0, result.output
    assert "<html" in (tmp_path / "report" / "report.html").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert (config["engine"], config["update_in_backward"]) == ("two-backward", True)
    assert json.loads((folder / "diagnosis.json").read_text())["influence"]["sum"].keys() == {"d_plus", "d_minus"}
