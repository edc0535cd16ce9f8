"""Reading runs on the tiny model, and breaking them off."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ssiuu.commands.unlearn import unlearn
from ssiuu.options import OPTION_NAMES, UnlearnOptions
from ssiuu.runs.folder import Run

OF_THE_MACHINE = ("seconds", "tokens_per_second", "peak_memory_bytes")


def by(options, method, regularizer="none", **changes):
    """The options with another method, without settings unless `changes` has some; "ssiuu" keeps those of `options`."""
    settings = options.settings if method == "ssiuu" else {}
    kept = {name: value for name, value in options.flat().items() if name in OPTION_NAMES}
    return UnlearnOptions.of({**kept, **settings, "method": method, "regularizer": regularizer, **changes})


def weights(run):
    return load_file(run.model / "model.safetensors")


def lines(run):
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def reproducible(run):
    """The lines without what no two runs have in common."""
    return [{name: value for name, value in line.items() if name not in OF_THE_MACHINE} for line in lines(run)]


class KilledError(Exception):
    """What a killed process looks like from inside."""


def kill_after(monkeypatch, step):
    """Break the run off once `step` was recorded, before any checkpoint of that step."""
    append = Run.append_metrics

    def append_and_die(run, line):
        append(run, line)
        if line["step"] == step:
            raise KilledError

    monkeypatch.setattr(Run, "append_metrics", append_and_die)


def assert_resumes_bit_for_bit(options, folder, monkeypatch, step):
    """A run killed after this step and resumed ends as the one that nothing interrupted."""
    whole = unlearn(options, folder / "whole")
    with monkeypatch.context() as patched:
        kill_after(patched, step)
        with pytest.raises(KilledError):
            unlearn(options, folder / "killed")
    resumed = unlearn(options, folder / "killed", resume=True)
    expected, actual = weights(whole), weights(resumed)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert reproducible(resumed) == reproducible(whole)
