"""A compiled module or a Triton that cannot be used is a reason, and costs no other backend."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ssiuu_kernels.ops import backends
from ssiuu_kernels.ops.common import native_host

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json
import torch
import ssiuu_kernels as sk
x = torch.randn(2, 3)
found = {"reason": sk.available_backends()["native"].reason, "env": sk.collect_env()}
for backend in ("native", "reference", "auto"):
    try:
        found[backend] = list(sk.ops.glu_forward(x, x, backend=backend).shape)
    except ValueError as error:
        found[backend] = str(error)
print(json.dumps(found))
"""


def test_native_module_that_cannot_be_loaded_is_a_reason(tmp_path):
    package = tmp_path / "ssiuu_kernels"
    shutil.copytree(ROOT / "ssiuu_kernels", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"\x7fELF of another machine" * 1000)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "cannot be loaded (ImportError: " in found["reason"]
    assert "pip install" in found["reason"]
    assert found["reason"] in found["native"]
    assert found["reference"] == found["auto"] == [2, 3]
    assert f"backend native: no ({found['reason']})" in found["env"]


@pytest.fixture
def _fresh_reasons():
    """Reasons are found once a process."""

    cached = [
        backends.native_module, backends._native_availability, backends._why_no_native_module,
        backends._why_not_importable,
    ]  # fmt: skip
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.usefixtures("_fresh_reasons")
def test_a_module_that_was_not_built_is_a_reason(monkeypatch):
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda _name: None)
    assert backends.available_backends()["native"].reason.startswith("the native module is not built")
    assert backends.native_module() is None


@pytest.mark.usefixtures("_fresh_reasons")
@pytest.mark.parametrize(
    "error", [ImportError("libstdc++.so.6: version `GLIBCXX_3.4.32' not found"), OSError("libgomp.so.1"), SystemError()]
)
def test_whatever_loading_raises_is_a_reason(monkeypatch, error):
    def fail(_name):
        raise error

    monkeypatch.setattr(backends.importlib, "import_module", fail)
    state = backends.available_backends()["native"]
    assert not state.ok
    assert f"cannot be loaded ({type(error).__name__}: {error}".rstrip() in state.reason
    assert "\n" not in state.reason


@pytest.mark.usefixtures("_fresh_reasons")
def test_a_build_for_another_cpu_is_a_reason(monkeypatch):
    built = {"cpu_isa": "avx2 avx512f", "cuda": False, "why_no_cuda": "no nvcc"}
    native = SimpleNamespace(build_info=lambda: built, cpu_lacks=lambda: "avx512f")
    monkeypatch.setattr(backends, "native_module", lambda: native)
    state = backends.available_backends()["native"]
    assert not state.ok
    assert "built for a CPU with avx512f, which this one lacks" in state.reason
    x = torch.randn(2, 3)
    assert backends.select("token_scores", "auto", x, x).__module__.endswith("token_scores.reference")


@pytest.mark.usefixtures("_fresh_reasons")
def test_a_module_of_another_version_is_a_reason(monkeypatch):
    monkeypatch.setattr(backends, "native_module", lambda: SimpleNamespace(build_info=dict))
    assert "another version" in backends.available_backends()["native"].reason


@pytest.mark.usefixtures("_fresh_reasons")
def test_a_triton_that_cannot_be_loaded_is_a_reason(monkeypatch):
    def fail(_name):
        raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(backends.importlib, "import_module", fail)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    state = backends.available_backends()["triton"]
    assert not state.ok
    assert "triton cannot be loaded (ImportError: libtriton.so: undefined symbol)" in state.reason


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("80 90a", (8, 0), True),
        ("80 90a", (8, 9), True),
        ("80 90a", (9, 0), True),
        ("80 90a", (12, 0), True),  # the PTX of 80
        ("90a", (8, 0), False),
        ("90a", (10, 0), False),
        ("90", (10, 0), True),
        ("90-real", (10, 0), False),
        ("80-real", (8, 6), True),
        ("100f", (10, 3), True),
        ("100f", (12, 0), False),
        ("native", (9, 0), True),
    ],
)
def test_cuda_kernels_run_where_they_were_built_for(monkeypatch, built, capability, runs):
    info = {"cuda": True, "cuda_archs": built}
    monkeypatch.setattr(native_host, "native_module", lambda: SimpleNamespace(build_info=lambda: info))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.float32)
    reason = native_host.why_not(tensor)
    assert (reason is None) == runs
    if not runs:
        assert f"the CUDA kernels were built for {built}" in reason
        assert "SSIUU_CUDA_ARCHS={}{}".format(*capability) in reason
