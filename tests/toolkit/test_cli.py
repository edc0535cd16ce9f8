"""The command line, as a user meets it."""

import json
import os
import re

import pytest

from ssiuu.cli import COMMANDS
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


def test_env():
    assert "backend native: " in run("env").output


def test_a_refusal_is_one_line_with_status_2(tmp_path):
    result = run("unlearn", "--method", "magic", "--out", tmp_path / "run")
    assert result.status == 2
    assert result.output.strip().splitlines() == ["ssiuu: method='magic' is unknown; expected one of ga, gd, ssiuu"]


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
        ("attack", folder, "--kind", "harmful", "--fraction", 0.3, "--learning-rate", 1e-3, "--steps", 1),
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
        ("attack", folder, "--kind", "harmful", "--fraction", 0.3, "--learning-rate", 1e-3, "--steps", 2),
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
    assert json.loads((folder / "diagnosis.json").read_text())["sum"].keys() == {"d_plus", "d_minus"}
