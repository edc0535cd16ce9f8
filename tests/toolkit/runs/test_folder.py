"""Run folders: which version wrote them, and what stays when a run is done."""

import json

import pytest

from ssiuu.commands.unlearn import unlearn
from ssiuu.runs.folder import SCHEMA, Run
from tests.support.run_folders import write_run


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", "gd", attacks=False, diagnosis=False)


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_run_says_its_schema(options, tmp_path):
    assert unlearn(options.replace(max_steps=1), tmp_path / "run").read("config.json")["schema"] == SCHEMA == 1


def test_a_folder_of_the_first_version_opens(folder):
    assert "schema" not in json.loads((folder / "config.json").read_text())
    assert Run.open(folder).path == folder


def test_a_folder_of_a_later_version_is_refused(folder):
    rewrite(folder, schema=SCHEMA + 1)
    with pytest.raises(ValueError, match=r"run has schema 2, and this version reads up to 1; upgrade ssiuu-kernels$"):
        Run.open(folder)


def test_a_finished_run_drops_its_checkpoints_alone(folder):
    run = Run(folder)
    events = run.checkpoints / "runs" / "events"
    for file in (run.checkpoints / "checkpoint-3" / "optimizer.pt", events):
        file.parent.mkdir(parents=True)
        file.touch()
    run.finish()
    assert [path for path in run.checkpoints.rglob("*") if path.is_file()] == [events]
    events.unlink()
    events.parent.rmdir()
    run.finish()
    assert not run.checkpoints.exists()
