"""Every command under faults: it says so in one line and with status 2, and the work goes on where it can."""

import itertools
import json
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from ssiuu.report import page as report
from ssiuu.runs.folder import Run
from ssiuu.runs.locks import LOCK, locked
from tests.support.command_line import run as command
from tests.support.faults import Killed, fault
from tests.support.small_runs import reproducible, weights
from tests.toolkit.conftest import tiny_facts


@pytest.fixture
def small(model_dir, facts_file):
    """The arguments of a short run."""
    return ("unlearn", "--model", model_dir, "--facts", facts_file, "--forget-people", 2, "--retain-people", 3,
            "--shots", 0, "--max-steps", 2, "--save-every", 1, "--learning-rate", 1e-3)  # fmt: skip


@pytest.fixture(scope="module")
def finished(model_dir, tmp_path_factory):
    """A finished run, whose files tests copy."""
    folder = tmp_path_factory.mktemp("finished")
    facts = folder / "facts.jsonl"
    rows = ({**vars(fact), "false_options": list(fact.false_options)} for fact in tiny_facts())
    facts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command("unlearn", "--model", model_dir, "--facts", facts, "--forget-people", 2, "--retain-people", 3,
                   "--shots", 0, "--max-steps", 1, "--out", folder / "run")  # fmt: skip
    assert done.status == 0, done.output
    return folder / "run"


def assert_refused(result, *said):
    assert result.status == 2, result.output
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("ssiuu: "))
    assert "Traceback" not in result.output
    assert any(words in line for words in said), line


FULL = ("the disk is full",)
READ_ONLY = ("Permission denied",)


@pytest.mark.parametrize("kind", ["killed", "full"])
def test_unlearning_goes_on_after_every_write_that_failed(small, tmp_path, monkeypatch, kind):
    whole = command(*small, "--out", tmp_path / "whole")
    assert whole.status == 0, whole.output
    run = Run(tmp_path / "run")
    for at in itertools.count(1 if kind == "killed" else 2, 2):  # each process gets further than the one before
        if is_complete(run):
            break
        resume = ("--resume",) * (run.path / "config.json").is_file()
        with fault(run.path, kind, at, monkeypatch) as injected, survived(kind):
            result = command(*small, "--out", run.path, *resume)
            if injected.count < at:
                assert result.status == 0, result.output
                break
            assert_refused(result, *FULL)
    assert at > 5
    expected, actual = weights(Run(tmp_path / "whole")), weights(run)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert reproducible(run) == reproducible(Run(tmp_path / "whole"))
    assert not list(run.path.glob("**/*.partial"))


def is_complete(run):
    """Whether the fault came when all was done, at the lock's removal."""
    return (run.path / "config.json").is_file() and run.read("config.json")["status"] == "complete"


@contextmanager
def survived(kind):
    """The test goes on after a death that was asked for."""
    try:
        yield
    except Killed:
        assert kind == "killed"


OTHERS = {
    "attack": (
        ("--kind", "harmful", "--pool", "all", "--learning-rate", 1e-3, "--steps", 1),
        "attacks/*.json",
        1,
    ),
    "diagnose": ((), "diagnosis.*", 2),
    "evaluate": ((), "evaluation.json", 1),
}


@pytest.mark.parametrize("kind", ["killed", "full"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_commands_are_given_again(finished, tmp_path, monkeypatch, one_figure, name, kind):
    run = copied(finished, tmp_path)
    options, files, number = OTHERS[name]
    for at in itertools.count(1):
        with fault(run, kind, at, monkeypatch) as injected, survived(kind):
            result = command(name, run, *options)
            if injected.count < at:
                assert result.status == 0, result.output
                break
            assert_refused(result, *FULL)
        assert command("report", run, "--out", tmp_path / "report").status == 0  # nothing half written is read
    assert at > 3
    assert len(list(run.glob(files))) == number


def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def one_figure(monkeypatch):
    """A report whose pictures take no time."""
    monkeypatch.setattr(report.plots, "draw_all", lambda records: {"training": Figure()})


@pytest.mark.parametrize("kind", ["killed", "full"])
def test_a_report_is_written_again(finished, tmp_path, monkeypatch, kind, one_figure):
    for at in itertools.count(1):
        with fault(tmp_path / "report", kind, at, monkeypatch) as injected, survived(kind):
            result = command("report", finished, "--out", tmp_path / "report")
            if injected.count < at:
                assert result.status == 0, result.output
                break
            assert_refused(result, *FULL)
    assert at > 5
    assert (tmp_path / "report" / "report.html").read_text().endswith("</html>")


@pytest.mark.parametrize("kind", ["killed", "full"])
def test_finetuning_is_begun_again(model_dir, facts_file, tmp_path, monkeypatch, kind):
    arguments = ("finetune", "--facts", facts_file, "--model", model_dir, "--steps", 1, "--out", tmp_path / "run")
    run = Run(tmp_path / "run")
    for at in itertools.count(1, 3):
        if is_complete(run):
            break
        with fault(run.path, kind, at, monkeypatch) as injected, survived(kind):
            result = command(*arguments)
            if injected.count < at:
                assert result.status == 0, result.output
                break
            assert_refused(result, *FULL)
    assert is_complete(run)
    assert [line["step"] for line in reproducible(run)] == [1]
    assert_refused(command(*arguments), "exists; choose another")


WRITING = {name: (name, *options) for name, (options, _, _) in OTHERS.items()}


@pytest.mark.parametrize("name", [*WRITING, "report", "unlearn", "finetune"])
def test_a_folder_that_cannot_be_written_to_is_found_before_any_work(finished, small, tmp_path, monkeypatch, name):
    run = copied(finished, tmp_path)
    folder = run if name in WRITING else tmp_path / "out"
    for module in ("attack", "diagnose", "evaluate", "unlearn", "finetune"):
        monkeypatch.setattr(f"ssiuu.commands.{module}.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(report.plots, "draw_all", lambda *_: pytest.fail("figures were drawn"))
    arguments = {
        "unlearn": (*small, "--out", folder),
        "finetune": ("finetune", "--out", folder),
        "report": ("report", run, "--out", folder),
    }.get(name) or (name, run, *OTHERS[name][0])
    with fault(folder, "read-only", 1, monkeypatch):
        assert_refused(command(*arguments), *READ_ONLY)


@pytest.mark.parametrize("name", [*WRITING, "report", "unlearn", "finetune", "unlearn --resume"])
def test_a_second_process_is_refused(finished, small, tmp_path, name):
    run = copied(finished, tmp_path)
    out = run if name in WRITING or name == "unlearn --resume" else tmp_path / "out"
    lock = f".{name}{LOCK}" if name in WRITING else LOCK
    arguments = {
        "unlearn": (*small, "--out", out),
        "unlearn --resume": (*small, "--out", out, "--resume"),
        "finetune": ("finetune", "--out", out),
        "report": ("report", run, "--out", out),
    }.get(name) or (name, run, *OTHERS[name][0])
    with locked(out, lock):
        assert_refused(command(*arguments), "another process is at work in")
    assert (out / "model").is_dir() or not out.exists()


def test_a_lock_ends_with_its_process(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; from pathlib import Path; from ssiuu.runs.locks import locked\n"
         "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)", tmp_path / "run"],
        stdout=subprocess.PIPE, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process is at work"), locked(tmp_path / "run"):
            pass
    finally:
        holder.kill()
        holder.wait()
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).exists()
    assert list((tmp_path / "run").iterdir()) == []


def test_of_many_that_start_at_once_one_gets_the_folder(tmp_path):
    start, got, refused = threading.Barrier(8), [], []

    def begin():
        start.wait()
        try:
            with locked(tmp_path / "run"):
                got.append(1)
                done.wait(10)
        except ValueError:
            refused.append(1)
            if len(refused) == 7:
                done.set()

    done = threading.Event()
    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    assert not list(tmp_path.glob("run/*"))


@pytest.mark.parametrize("name", [*WRITING, "report", "unlearn", "unlearn --resume", "finetune"])
def test_a_models_folder_is_not_a_runs(small, facts_file, tmp_path, model_dir, name):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    arguments = {
        "unlearn": (*small, "--out", folder),
        "unlearn --resume": (*small, "--out", folder, "--resume"),
        "finetune": ("finetune", "--facts", facts_file, "--out", folder),
    }.get(name) or (name, folder)
    assert_refused(command(*arguments), "is not a run folder", "exists; choose another")
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in model_dir.iterdir())


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link"])
def test_a_folder_that_cannot_be_made(tmp_path, facts_file, kind):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    out = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "run", "dangling link": tmp_path / "link"}[
        kind
    ]
    assert_refused(command("finetune", "--facts", facts_file, "--out", out), "File exists", "Not a directory")


def test_a_full_file_system(small, tmp_path):
    """The real thing, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk)
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        assert_refused(command(*small, "--out", disk / "run"), *FULL)
        subprocess.run(("mount", "-o", "remount,size=50m", disk), check=True)
        done = command(*small, "--out", disk / "run", "--resume")
        assert done.status == 0, done.output
        assert command(*small, "--out", tmp_path / "whole").status == 0
        expected = weights(Run(tmp_path / "whole"))
        actual = {
            name: tensor.clone() for name, tensor in load_file(disk / "run" / "model" / "model.safetensors").items()
        }
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    finally:
        subprocess.run(("umount", disk), check=True)
