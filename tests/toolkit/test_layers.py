"""Whoever stands higher in the toolkit may call whoever stands lower, never the reverse."""

import pytest

from tests.support.imports import ROOT, Package, cycle


@pytest.fixture(scope="module")
def toolkit():
    return Package(ROOT / "python" / "ssiuu")


def test_no_modules_import_each_other(toolkit):
    assert cycle(toolkit.imports) is None


def test_no_folders_import_each_other(toolkit):
    assert cycle(toolkit.folders()) is None


def test_no_import_is_hidden_from_python(toolkit):
    assert toolkit.that_use("TYPE_CHECKING") == set()


def test_only_the_command_line_and_commands_made_of_others_import_commands(toolkit):
    importers = {
        name
        for name, imported in toolkit.imports.items()
        if any(other.startswith("ssiuu.commands") for other in imported)
    }
    assert importers == {
        "ssiuu.cli",
        *(f"ssiuu.commands.{name}" for name in ("demo", "matching", "study", "study_plan")),
    }
