"""What the package claims is what continuous integration tries, and what its tests need is what it installs."""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
WORKFLOW = (ROOT / ".github" / "workflows" / "test.yml").read_text()
CONSTRAINTS = (ROOT / "constraints.txt").read_text()
OURS = {"ssiuu", "ssiuu_kernels", "benchmarks", "examples", "tests"}


def requirements(name):
    """The requirements of one list of pyproject.toml (read as text: Python 3.10 has no parser)."""
    text = re.search(rf"^{name} = \[(.*?)\]$", PYPROJECT, re.DOTALL | re.MULTILINE).group(1)
    return [Requirement(entry) for entry in re.findall(r'"(.*?)"', text)]


DEPENDENCIES = {requirement.name: requirement for requirement in requirements("dependencies")}


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_both_ends_of_the_claimed_versions_are_tried(package):
    claimed = DEPENDENCIES[package].specifier
    oldest = re.search(rf"\b{package}==([\d.]+)", WORKFLOW).group(1)
    newest = re.search(rf"^{package}==([\d.]+)", CONSTRAINTS, re.MULTILINE).group(1)
    (lower,) = [bound.version for bound in claimed if bound.operator == ">="]
    assert oldest == f"{lower}.0"
    assert claimed.contains(newest)


def test_the_oldest_python_claimed_is_tried():
    oldest = re.search(r'requires-python = ">=([\d.]+)"', PYPROJECT).group(1)
    assert re.search(r"python: \[(.*?),", WORKFLOW).group(1) == f'"{oldest}"'


def test_tests_import_only_what_the_test_extra_installs():
    installed, waiting = set(), [*DEPENDENCIES.values(), *requirements("test")]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in installed or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        installed.add(name)
        waiting += map(Requirement, metadata.requires(name) or [])

    imported = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    distributions = metadata.packages_distributions()
    missing = {
        name: distributions.get(name)
        for name in imported - OURS - set(sys.stdlib_module_names)
        if installed.isdisjoint(map(canonicalize_name, distributions.get(name, [])))
    }
    assert missing == {}
