"""`import ssiuu`: what people who write Python call."""

import inspect
import pydoc
import subprocess
import sys

import pytest

import ssiuu
from ssiuu.methods.base import Method
from ssiuu.methods.registry import methods
from ssiuu.regularizers.registry import regularizers


@pytest.mark.parametrize("name", ssiuu.__all__)
def test_every_public_name_is_there_and_has_a_docstring(name):
    assert name.isupper() or inspect.getdoc(getattr(ssiuu, name))


def test_functions_keep_their_names_beside_the_folders():
    import ssiuu.methods
    import ssiuu.report

    assert inspect.ismodule(ssiuu.methods)
    assert inspect.isfunction(ssiuu.attack)
    assert inspect.isfunction(ssiuu.evaluate)


def test_the_tables_of_methods():
    assert methods() == ssiuu.METHODS
    assert regularizers() == ssiuu.REGULARIZERS


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'ssiuu' has no attribute 'lern'"):
        ssiuu.lern  # noqa: B018


def test_the_import_waits_for_no_torch():
    script = "import sys, ssiuu; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_help_shows_the_public_names():
    text = pydoc.plain(pydoc.render_doc(ssiuu))
    for name in ssiuu.__all__:
        assert any(
            line.startswith((f"    {name}(", f"    {name} = ", f"    class {name}(")) for line in text.splitlines()
        ), name
    assert issubclass(ssiuu.Method, Method)
