"""The examples run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

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
