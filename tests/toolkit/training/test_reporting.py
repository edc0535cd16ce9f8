"""Where the numbers of every step go besides the run folder."""

import pytest
from transformers import Trainer

from ssiuu.commands.unlearn import unlearn
from ssiuu.training.trainer import training_arguments
from tests.support.small_runs import lines


def test_the_line_of_every_step_goes_through_the_trainer(options, tmp_path, monkeypatch):
    logged, log = [], Trainer.log
    monkeypatch.setattr(
        Trainer, "log", lambda trainer, values, *more: logged.append(dict(values)) or log(trainer, values)
    )
    run = unlearn(options.replace(max_steps=3), tmp_path / "run")
    numbers = [
        {name: value for name, value in line.items() if name not in ("step", "engine", "stopped_by")}
        for line in lines(run)
    ]
    assert [values for values in logged if "lambda" in values] == numbers
    assert len(numbers) == 3


@pytest.mark.parametrize(("name", "expected"), [("none", []), ("tensorboard", ["tensorboard"]), ("wandb", ["wandb"])])
def test_reporters_are_the_trainers(tmp_path, name, expected):
    arguments = training_arguments(tmp_path, learning_rate=1e-5, max_steps=1, seed=0, report_to=name)
    assert arguments.report_to == expected


def test_a_missing_package_is_said_before_any_work(options, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match="report_to='wandb' needs the package wandb; install it, or leave --report-to"):
        unlearn(options.replace(report_to="wandb"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
