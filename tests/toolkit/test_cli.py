"""The command line, as a user meets it."""

import json

import pytest
import typer
from typer.testing import CliRunner

from ssiuu.cli import app

COMMANDS = ("demo", "finetune", "unlearn", "attack", "diagnose", "evaluate", "report", "env")


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Example" in result.output or command == "env"


def test_the_help_of_unlearn_names_its_options():
    command = typer.main.get_command(app).commands["unlearn"]
    assert {"--engine", "--update-in-backward"} <= {name for option in command.params for name in option.opts}


def test_env():
    assert "backend native: " in run("env").output


def test_a_refusal_is_one_line_with_status_2(tmp_path):
    result = run("unlearn", "--method", "magic", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert result.output.strip().splitlines() == ["ssiuu: method='magic' is unknown; expected one of gd, ssiuu"]


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
        assert result.exit_code == 0, result.output
    assert "<html" in (tmp_path / "report" / "report.html").read_text()
    config = json.loads((folder / "config.json").read_text())
    assert (config["engine"], config["update_in_backward"]) == ("two-backward", True)
    assert json.loads((folder / "diagnosis.json").read_text())["sum"].keys() == {"d_plus", "d_minus"}
