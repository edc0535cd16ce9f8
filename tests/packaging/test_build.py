"""The distribution: what a wheel holds, and what the build says when something it needs is missing."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what the build reads, so that the checkout's own build is left alone."""
    copy = tmp_path_factory.mktemp("source")
    for name in ["pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "LICENSE", "README.md"]:
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for folder in ["csrc", "ssiuu_kernels", "python"]:
        shutil.copytree(ROOT / folder, copy / folder, ignore=unwanted)
    return copy


def build(source, *arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=source,
        env={**os.environ, "SSIUU_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    done = build(
        source, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), ".",
        SSIUU_CPU_ARCH="x86-64-v3" if os.uname().machine == "x86_64" else "native",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def names(root, pattern):
    return {path.relative_to(root).as_posix() for path in root.glob(pattern)}


def test_wheel_holds_every_python_file_of_both_packages(wheel, source):
    expected = names(source, "ssiuu_kernels/**/*.py") | names(source / "python", "ssiuu/**/*.py")
    assert {name for name in wheel.namelist() if name.endswith(".py")} == expected


def test_wheel_holds_the_native_module(wheel):
    assert [name for name in wheel.namelist() if name.startswith("ssiuu_kernels/_native.")]


def test_wheel_holds_the_data_and_templates(wheel, source):
    expected = names(source / "python", "ssiuu/data/*.jsonl") | names(source / "python", "ssiuu/templates/*")
    assert expected <= set(wheel.namelist())


def test_wheel_installs_the_command(wheel):
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "ssiuu = ssiuu.cli:app" in wheel.read(entry_points).decode()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": ""}, "no C++ compiler was found"),
        ({"CXX": "no-such-compiler"}, "looked for no-such-compiler"),
    ],
    ids=["none", "CXX"],
)
def test_missing_compiler_is_named(source, environment, message):
    done = build(source, "setup.py", "build_ext", **environment)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_cmake_is_named(source, tmp_path):
    """An environment without a scripts folder, and a PATH that holds a compiler only."""
    (tmp_path / "c++").symlink_to(shutil.which("c++") or shutil.which("g++"))
    script = (
        "import runpy, sys, sysconfig; sysconfig.get_path = lambda name: ''; sys.argv = ['setup.py', 'build_ext']; "
        "runpy.run_path('setup.py')"
    )
    done = build(source, "-c", script, PATH=str(tmp_path))
    assert done.returncode != 0
    assert "cmake was not found" in done.stderr


def test_failed_build_says_so(source, tmp_path):
    broken = shutil.copytree(source, tmp_path / "broken")
    (broken / "csrc" / "cpu" / "isa.cpp").write_text("#error broken on purpose\n")
    done = build(broken, "setup.py", "build_ext")
    assert done.returncode != 0
    assert "the native module was not built" in done.stderr
    assert "Traceback" not in done.stderr
