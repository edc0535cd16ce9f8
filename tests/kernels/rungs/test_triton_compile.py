"""Every Triton kernel compiles for Ampere and Hopper, without a GPU, into the code that is expected of it.

`registers/triton.json` holds the table that the test prints (`pytest -k compile`). A change that moves it rewrites
it on purpose: `python -m tests.kernels.rungs.triton_compiled > tests/kernels/rungs/registers/triton.json`.
"""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[3]
RECORD = Path(__file__).parent / "registers" / "triton.json"
ELEMENTWISE_FROM = 128  # bits: what one thread moves at once


@pytest.fixture(scope="module")
def compiled():
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.rungs.triton_compiled"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_compile_table(compiled, capsys):
    table = Table(title=f"triton {version('triton')}")
    for name in compiled["rows"][0]:
        table.add_column(name)
    for row in compiled["rows"]:
        table.add_row(*map(str, row.values()))
    with capsys.disabled():
        Console(width=140).print(table)


def test_compiled_kernels_do_not_spill(compiled):
    assert [row for row in compiled["rows"] if row["spilled"]] == []


def test_compiled_kernels_load_16_bytes_at_once(compiled):
    assert [row for row in compiled["rows"] if row["load_bits"] < ELEMENTWISE_FROM and row["wide"]] == []


def test_compiled_registers_are_those_on_record(compiled):
    record = json.loads(RECORD.read_text())
    if record["triton"] != compiled["triton"]:
        pytest.skip(f"the record is of triton {record['triton']}, this is {compiled['triton']}")
    assert compiled["rows"] == record["rows"]
