"""Print the record of the register table: nvcc's version, and the registers of every kernel."""

import json
import sys
import tempfile
from pathlib import Path

from tests.kernels.rungs.cuda_compiled import kernels, nvcc_version

with tempfile.TemporaryDirectory() as folder:
    found = kernels(Path(folder))
rows = {name: {arch: row["registers"] for arch, row in archs.items()} for name, archs in found.items()}
json.dump({"nvcc": nvcc_version(), "registers": rows}, sys.stdout, indent=1)
