"""Every CUDA kernel compiles for Ampere and Hopper, without a GPU, into the code that is expected of it.

`registers/cuda.json` holds the table that the test prints (`pytest -k compile`). A change that moves it rewrites it
on purpose: `python -m tests.kernels.rungs.cuda_compiled > tests/kernels/rungs/registers/cuda.json`.
"""

import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from . import cuda_compiled

RECORD = Path(__file__).parent / "registers" / "cuda.json"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if cuda_compiled.NVCC is None:
        pytest.skip("needs nvcc, which was not found")
    if cuda_compiled.disassembler() is None:
        pytest.skip("needs cuobjdump, which was not found")
    return cuda_compiled.kernels(tmp_path_factory.mktemp("cuda"))


def is_packed(kernel):
    """Whether it is the instance for aligned data, which moves 16 bytes at once."""
    return re.search(r"(, [48](, (true|false))?>$)|^penalty\w*_kernel<true", kernel) is not None


def test_compile_table(compiled, capsys):
    table = Table("kernel", "sm_80", "sm_90a", title=f"registers, nvcc {cuda_compiled.nvcc_version()}")
    for name, architectures in compiled.items():
        table.add_row(name, *(str(architectures[arch]["registers"]) for arch in ("sm_80", "sm_90a")))
    with capsys.disabled():
        Console(width=120).print(table)


def test_compiled_for_both_architectures(compiled):
    assert {tuple(architectures) for architectures in compiled.values()} == {("sm_80", "sm_90a")}


def test_compiled_kernels_do_not_spill(compiled):
    assert {name: rows for name, rows in compiled.items() if any(row["spilled"] for row in rows.values())} == {}


def test_compiled_packed_kernels_move_16_bytes_at_once(compiled):
    packed = {name: rows for name, rows in compiled.items() if is_packed(name)}
    assert packed
    for name, rows in packed.items():
        # What is left of token_scores after its sum are the scores, one number a thread.
        stores = 32 if name.startswith("token_scores") else 128
        for arch, row in rows.items():
            assert row["load_bits"] == 128, (name, arch)
            assert row["store_bits"] >= stores, (name, arch)


def test_compiled_registers_are_those_on_record(compiled):
    record = json.loads(RECORD.read_text())
    if record["nvcc"] != cuda_compiled.nvcc_version():
        pytest.skip(f"the record is of nvcc {record['nvcc']}, this is {cuda_compiled.nvcc_version()}")
    found = {name: {arch: row["registers"] for arch, row in rows.items()} for name, rows in compiled.items()}
    assert found == record["registers"]
