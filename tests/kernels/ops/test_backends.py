"""The registry: reasons, choice, and the environment variable."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu_kernels.ops import backends
from ssiuu_kernels.ops.common import native_host


def test_every_backend_has_a_reason():
    found = sk.available_backends()
    assert list(found) == ["reference", "native", "triton"]
    assert all(state.reason for state in found.values())


def test_native_is_built():
    assert sk.available_backends()["native"].ok, sk.available_backends()["native"].reason


def test_a_backend_that_cannot_run_raises_with_its_reason(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    x = torch.randn(2, 3)
    reason = sk.available_backends()["triton"].reason
    with pytest.raises(ValueError, match=reason):
        sk.ops.glu_forward(x, x, backend="triton")


@pytest.mark.parametrize(
    ("built", "capability", "reason"),
    [
        (False, (9, 0), "built without CUDA kernels (no nvcc)"),
        (True, (7, 5), "compute capability 7.5; 8.0 or higher is needed"),
    ],
)
def test_native_on_a_gpu_that_cannot_run_it(monkeypatch, built, capability, reason):
    monkeypatch.setattr(
        native_host,
        "native_module",
        lambda: SimpleNamespace(build_info=lambda: {"cuda": built, "why_no_cuda": "no nvcc"}),
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    tensor = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.float32)
    assert reason in native_host.why_not(tensor)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_type_that_a_backend_lacks(backend):
    x = torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"backend='{backend}' cannot run token_scores: dtype torch\.float64"):
        sk.ops.token_scores(x, x, backend=backend)


def test_auto_prefers_native():
    x = torch.randn(2, 3)
    assert backends.select("token_scores", "auto", x, x).__module__ == "ssiuu_kernels.ops.token_scores.native"


def test_auto_falls_back_for_a_type_that_native_lacks():
    x = torch.randn(2, 3, dtype=torch.float64)
    assert backends.select("token_scores", "auto", x, x).__module__ == "ssiuu_kernels.ops.token_scores.reference"


def test_environment_replaces_auto(monkeypatch):
    monkeypatch.setenv("SSIUU_BACKEND", "reference")
    x = torch.randn(2, 3)
    assert backends.select("token_scores", "auto", x, x).__module__ == "ssiuu_kernels.ops.token_scores.reference"


def test_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setenv("SSIUU_BACKEND", "fastest")
    x = torch.randn(2, 3)
    with pytest.raises(ValueError, match="fastest"):
        sk.ops.token_scores(x, x)


def test_native_kernels_are_called_in_one_place():
    """A call past `native_host.call` would run the CPU kernels where the CUDA ones are meant."""
    registry = Path(backends.__file__)  # defines `native_module`
    others = [path for path in registry.parent.rglob("*.py") if path != registry]
    assert [path.name for path in others if "native_module" in path.read_text()] == ["native_host.py"]


def test_collect_env_names_every_backend():
    text = sk.collect_env()
    assert all(f"backend {name}: " in text for name in sk.available_backends())
