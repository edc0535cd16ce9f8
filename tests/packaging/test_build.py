"""The distribution: sdist and wheel, an installation elsewhere, and what the build says when it lacks something."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
X86 = os.uname().machine == "x86_64"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the checkout without what git ignores, so that the checkout's own build is left alone."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    copy = tmp_path_factory.mktemp("source") / "checkout"
    return shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".ci", ".gitignore", *ignored))


def build(source, *arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=source,
        env={**os.environ, "SSIUU_CUDA": "0", **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    script = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    done = build(source, "-c", script, str(folder))
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        archive.extractall(folder, filter="data")
    return folder / path.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel_path(sdist, tmp_path_factory):
    """A wheel made from the source distribution, in a folder where a module that is no longer there was built."""
    library = sdist / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for stale in [library / "ssiuu_kernels" / "removed.py", library / "ssiuu" / "removed" / "__init__.py"]:
        stale.parent.mkdir(parents=True)
        stale.touch()
    folder = tmp_path_factory.mktemp("wheel")
    # The contents matter here, not the speed: unoptimised, the build takes a quarter of the time.
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {shutil.which("c++") or shutil.which("g++")} "$@" -O0\n')
    compiler.chmod(0o755)
    done = build(
        sdist, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), ".",
        SSIUU_CPU_ARCH="x86-64-v3" if X86 else "native", CXX=str(compiler),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(wheel_path):
    with zipfile.ZipFile(wheel_path) as archive:
        yield archive


@pytest.fixture(scope="module")
def site(wheel_path, tmp_path_factory):
    """The folder into which the wheel was installed."""
    folder = tmp_path_factory.mktemp("site")
    done = build(
        folder, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel_path)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


def names(root, pattern):
    return {path.relative_to(root).as_posix() for path in root.glob(pattern)}


def test_sdist_holds_the_whole_checkout(source, sdist):
    expected = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    assert {path for path in expected if not (sdist / path).is_file() and "egg-info" not in str(path)} == set()


def test_wheel_holds_every_python_file_of_both_packages(wheel, source):
    expected = names(source, "ssiuu_kernels/**/*.py") | names(source / "python", "ssiuu/**/*.py")
    assert {name for name in wheel.namelist() if name.endswith(".py")} == expected


def test_wheel_holds_the_native_module(wheel):
    assert [name for name in wheel.namelist() if name.startswith("ssiuu_kernels/_native.")]


def test_wheel_holds_the_data_and_templates(wheel, source):
    expected = names(source / "python", "ssiuu/data/builtin/*.jsonl") | names(
        source / "python", "ssiuu/report/templates/*"
    )
    assert expected <= set(wheel.namelist())


@pytest.mark.parametrize("package", ["ssiuu", "ssiuu_kernels"])
def test_wheel_says_that_its_packages_are_typed(wheel, package):
    assert f"{package}/py.typed" in wheel.namelist()


def test_wheel_installs_the_command(wheel):
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "ssiuu = ssiuu.cli:main" in wheel.read(entry_points).decode()


def test_installed_command_describes_the_machine(site, tmp_path):
    """`ssiuu env` imports both packages and loads the native module, far from the checkout."""
    done = subprocess.run(
        [site / "bin" / "ssiuu", "env"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "COLUMNS": "1000"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "native build" in done.stdout
    assert "SSIUU_CUDA=0" in done.stdout
    script = "import ssiuu, ssiuu_kernels as kernels; print(ssiuu.__file__, kernels.__file__)"
    assert done.stderr == ""
    found = build(tmp_path, "-c", script, PYTHONPATH=str(site)).stdout.split()
    assert found == [str(site / "ssiuu" / "__init__.py"), str(site / "ssiuu_kernels" / "__init__.py")]


def test_windows_is_refused_in_one_line(source):
    script = "import runpy, sys, setuptools.command.build_ext; sys.platform = 'win32'; runpy.run_path('setup.py')"
    done = build(source, "-c", script)
    assert done.returncode != 0
    assert done.stderr == "ssiuu-kernels: Windows is not supported; use Linux (WSL too) or macOS.\n"


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
    (broken / "csrc" / "include" / "ssiuu" / "types.h").write_text("#error broken on purpose\n")
    done = build(broken, "setup.py", "build_ext")
    assert done.returncode != 0
    assert "the native module was not built" in done.stderr
    assert "Traceback" not in done.stderr
