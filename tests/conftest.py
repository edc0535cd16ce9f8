"""Random inputs that change with every commit, and outputs that start as NaN."""

import os
import subprocess
import tempfile
import zlib
from pathlib import Path

import pytest
import torch

from tests.kernels.rungs import cuda_emulation

# Read by triton when it is first imported: without a GPU its kernels are interpreted, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.kernels.rungs.interpreter import round_to_nearest

    round_to_nearest()

# What is worth keeping between runs lies in the checkout, where git ignores it and `make clean` removes it.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "torchinductor"))

# Tiny tensors gain nothing from a second thread, and lose much where the cores are busy.
torch.set_num_threads(1)


def _revision() -> str:
    """What the random inputs of a run are drawn by: new ones with every commit that changes code, the same for all who
    test that code.

    SSIUU_TEST_SEED, any text, draws others.
    """
    command = ["git", "rev-parse", *(f"HEAD:{folder}" for folder in ("csrc", "python", "ssiuu_kernels", "tests"))]
    found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    return os.environ.get("SSIUU_TEST_SEED", found.strip())


REVISION = _revision()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(zlib.crc32(REVISION.encode()))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))


@pytest.fixture(autouse=True, scope="session")
def _temporary_folder(tmp_path_factory):
    """Whatever libraries and subprocesses leave behind goes where pytest removes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("temporary")))
        patch.setattr(tempfile, "tempdir", None)  # to be found again, from TMPDIR
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill what `torch.empty` returns with NaN, so that an element that a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _device(request):
    """Tests marked `gpu` make their tensors on the GPU."""
    torch.set_default_device("cuda" if request.node.get_closest_marker("gpu") else "cpu")
    yield
    torch.set_default_device("cpu")


@pytest.fixture(autouse=True)
def _emulation(request, monkeypatch):
    """Tests marked `emulated` run the CUDA kernels on CPU tensors."""
    if request.node.get_closest_marker("emulated"):
        from ssiuu_kernels.ops.common import native_host

        if cuda_emulation.COMPILER is None:
            pytest.skip("needs g++ to compile the CUDA kernels for the CPU")
        monkeypatch.setattr(native_host, "uses_cuda", lambda _tensor: True)
        monkeypatch.setattr(native_host, "native_module", cuda_emulation.emulated_module)


@pytest.fixture(autouse=True)
def seed(request):
    """One per test and commit (`_revision`), printed with a failure."""
    value = zlib.crc32(f"{REVISION} {request.node.nodeid}".encode())
    torch.manual_seed(value)
    request.node.add_report_section("setup", "seed", f"torch.manual_seed({value})")
    return value
