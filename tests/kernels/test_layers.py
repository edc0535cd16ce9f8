"""The modules of the kernel library import in one direction."""

import pytest

from tests.support.imports import ROOT, Package, cycle


@pytest.fixture(scope="module")
def kernels():
    return Package(ROOT / "ssiuu_kernels")


def test_no_modules_import_each_other(kernels):
    assert cycle(kernels.imports) is None


def test_no_folders_import_each_other(kernels):
    assert cycle(kernels.folders()) is None


def test_no_import_is_hidden_from_python(kernels):
    assert kernels.that_use("TYPE_CHECKING") == set()
