"""`python -m benchmarks.gpu`: its parts, its last lines, and a rehearsal where packages are missing."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parents[2]
# What a machine with a GPU may lack: of the toolkit's dependencies and of the peers, all that the kernels do not need.
MISSING = ("rouge_score", "datasets", "gguf", "captum", "liger_kernel", "pydantic_settings", "lm_eval", "peft")


def parts(monkeypatch, tmp_path, *words, **found):
    commands = {name: [[sys.executable, "-c", code]] for name, code in found.items()}
    monkeypatch.setattr(gpu, "PARTS", commands)
    monkeypatch.setattr(gpu, "FIRST", tuple(found))
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu", *words])
    return gpu.main()


def test_a_part_that_fails_does_not_stop_the_next(monkeypatch, tmp_path, capfd):
    assert parts(monkeypatch, tmp_path, broken="raise SystemExit(3)", sound="print('ran', 'on')") == 1
    printed = capfd.readouterr().out
    assert "ran on" in printed
    assert printed.splitlines()[-1] == "== failed: broken"


def test_parts_can_be_chosen(monkeypatch, tmp_path, capfd):
    assert parts(monkeypatch, tmp_path, "sound", broken="raise SystemExit(3)", sound="print('ran', 'on')") == 0
    assert "ran on" in capfd.readouterr().out


def test_an_unknown_part_is_refused_before_any_runs(monkeypatch, tmp_path, capfd):
    with pytest.raises(SystemExit):
        parts(monkeypatch, tmp_path, "sound", "another", sound="print('ran', 'on')")
    streams = capfd.readouterr()
    assert "'another' is unknown" in streams.err
    assert "ran on" not in streams.out


def test_a_missing_tool_fails_its_part(capfd):
    assert not gpu.run(["env", "A=1", "no-such-tool", "--flag"])
    assert "no-such-tool was not found" in capfd.readouterr().out


def row(case):
    return {"case": case, "candidate": "native", "passed": None, "missing": "not here"}


def test_the_last_lines_are_the_bfloat16_rows(tmp_path):
    record = tmp_path / "gpu.json"
    record.write_text(json.dumps({"rows": [row("glu bfloat16"), row("glu float32")]}))
    text = gpu.headlines([record])
    assert "glu bfloat16 | native | not here" in text
    assert "float32" not in text


def test_the_last_lines_are_cut_at_a_row(tmp_path):
    record = tmp_path / "gpu.json"
    record.write_text(json.dumps({"rows": [row(f"bfloat16 {number}") for number in range(1000)]}))
    text = gpu.headlines([record])
    assert gpu.LONGEST_TABLE - 100 < len(text) < gpu.LONGEST_TABLE + 100
    assert text.splitlines()[-2].startswith("bfloat16 ")


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python with the packages of this one but for `MISSING`."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    (site / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find_spec = PathFinder.find_spec\n"
        "def without_missing(cls, name, path=None, target=None):\n"
        f"    return None if name.partition('.')[0] in {MISSING} else find_spec(name, path, target)\n"
        "PathFinder.find_spec = classmethod(without_missing)\n"
    )
    return folder / "bin" / "python"


def rehearse(python, *command):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([python, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_bare_python_is_bare(bare_python):
    found = rehearse(bare_python, "-c", "import torch, transformers, rouge_score")
    assert "No module named 'rouge_score'" in found.stderr


def test_the_gpu_tests_are_collected_without_the_toolkits_packages(bare_python):
    (command,) = gpu.PARTS["tests"]
    found = rehearse(bare_python, *command[1:], "--collect-only")
    assert found.returncode == 0, found.stdout[-3000:]
    assert "tests/kernels/test_gpu.py" in found.stdout


def test_the_benchmarks_start_without_the_peers(bare_python, tmp_path):
    arguments = ("--suite", *gpu.OPS, "--case", "none of that name", "--out", str(tmp_path / "record.json"))
    found = rehearse(bare_python, "-m", "benchmarks", *arguments)
    assert found.returncode == 0, found.stderr[-3000:]
