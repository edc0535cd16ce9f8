"""Compile every case for every architecture and print the rows as JSON. A process of its own: an interpreting one
(TRITON_INTERPRET=1, read at import) has nothing to compile."""

import importlib
import json
import os
import pkgutil
import sys
from importlib.metadata import version

os.environ["TRITON_INTERPRET"] = "0"

import tests.kernels.rungs.triton_compiled as package
from tests.kernels.rungs.triton_compiled.case import ARCHITECTURES, compile_case

modules = [name for _, name, _ in pkgutil.iter_modules(package.__path__) if name not in ("__main__", "case")]
cases = [case for name in modules for case in importlib.import_module(f"{package.__name__}.{name}").CASES]
rows = [compile_case(case, architecture) for case in cases for architecture in ARCHITECTURES]
json.dump({"triton": version("triton"), "rows": rows}, sys.stdout, indent=1)
