"""A build for instructions that this CPU lacks is found out before a kernel dies of one."""

import functools
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")
ARM_COMPILER = shutil.which("aarch64-linux-gnu-g++")
MAIN = """
#include <cstdio>
#include "ssiuu/cpu_features.h"
int main() {
  std::printf("%s\\n", ssiuu::cpu::compiled_features().c_str());
  std::printf("%s\\n", ssiuu::cpu::missing_features().c_str());
}
"""
# Where the kernel calls a feature by another name.
LINUX_NAMES = {
    "sse3": "pni", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "lzcnt": "abm", "bmi": "bmi1",
    "avx512vbmi2": "avx512_vbmi2", "avx512vnni": "avx512_vnni", "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
}  # fmt: skip
# Extensions that compilers use only where the source asks for them (by intrinsics, atomics, half floats, relaxed
# mathematics), that do not concern user code, or that come with one that is checked (AVX10 with AVX-512 and APX).
ONLY_ON_REQUEST = """
3DNOW 3DNOW_A ABM ADX AES AMX_AVX512 AMX_BF16 AMX_COMPLEX AMX_FP16 AMX_FP8 AMX_INT8 AMX_MOVRS AMX_TF32 AMX_TILE
AMX_TRANSPOSE AVX10_1 AVX10_1_256 AVX10_1_512 AVX10_2 AVX10_2_256 AVX10_2_512 AVX5124FMAPS AVX5124VNNIW AVX512BF16
AVX512ER AVX512FP16 AVX512IFMA AVX512PF AVX512VP2INTERSECT AVXIFMA AVXNECONVERT AVXVNNI AVXVNNIINT16 AVXVNNIINT8
CLDEMOTE CLFLUSHOPT CLWB CLZERO CMPCCXADD CRC32 ENQCMD EVEX256 EVEX512 FSGSBASE HRESET KL LAHF_SAHF LWP MOVDIR64B
MOVDIRI MOVRS MWAITX PCLMUL PCONFIG PKU PREFETCHI PREFETCHWT1 PRFCHW PTWRITE RAOINT RDPID RDRND RDSEED SERIALIZE SGX SHA
SHA512 SHSTK SM3 SM4 SSE4A TSXLDTRK UINTR USER_MSR VAES VPCLMULQDQ WAITPKG WBNOINVD WIDEKL XSAVE XSAVEC XSAVEOPT XSAVES
"""

x86 = pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="needs g++ for x86-64")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """(architecture, compiler, flags) -> a program that prints what isa.cpp was compiled for and what the CPU lacks."""
    folder = tmp_path_factory.mktemp("cpu_features")
    (folder / "main.cpp").write_text(MAIN)

    @functools.cache
    def baseline(compiler):
        objects = []
        for source in [ROOT / "csrc" / "cpu_features.cpp", folder / "main.cpp"]:
            objects.append(folder / f"{source.stem}-{Path(compiler).name}.o")
            run(compiler, "-c", source, "-o", objects[-1])
        return objects

    def run(compiler, *arguments):
        subprocess.run([compiler, "-std=c++17", "-I", ROOT / "csrc" / "include", *arguments], check=True)

    @functools.cache
    def build(arch, compiler=COMPILER, *flags):
        kernels, program = folder / f"{arch}.o", folder / arch
        run(compiler, f"-march={arch}", "-c", ROOT / "csrc" / "cpu" / "isa.cpp", "-o", kernels)
        run(compiler, *flags, *baseline(compiler), kernels, "-o", program)
        return program

    return build


def features(*command):
    compiled, missing = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return compiled.split(), missing.split()


def this_cpu():
    (flags,) = set(re.findall(r"^flags\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    return set(flags.split())


@x86
@pytest.mark.parametrize(
    ("arch", "some"),
    [
        ("x86-64", []),
        ("x86-64-v2", ["sse3", "sse4.2", "popcnt"]),
        ("sandybridge", ["sse4.2", "avx"]),
        ("silvermont", ["movbe"]),
        ("x86-64-v3", ["avx2", "fma", "bmi2", "lzcnt", "movbe", "f16c"]),
        ("bdver2", ["fma4", "xop", "tbm"]),
        ("x86-64-v4", ["avx512f", "avx512vl"]),
        ("icelake-server", ["avx512vbmi2", "gfni"]),
    ],
)
def test_features_are_those_of_the_architecture_and_of_this_cpu(build, arch, some):
    compiled, missing = features(build(arch))
    assert set(some) <= set(compiled)
    assert (compiled == []) == (arch == "x86-64")
    present = this_cpu()
    assert missing == [name for name in compiled if LINUX_NAMES.get(name, name) not in present]


@x86
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 to run as an older CPU")
@pytest.mark.parametrize(
    ("arch", "cpu", "expected"),
    [
        ("x86-64-v2", "Conroe", ["sse4.1", "sse4.2", "popcnt"]),
        ("sandybridge", "Nehalem", ["avx"]),
        ("silvermont", "Nehalem", ["movbe"]),
        ("x86-64-v3", "SandyBridge", ["movbe", "lzcnt", "bmi", "bmi2", "f16c", "fma", "avx2"]),
        ("x86-64-v3", "Haswell", []),
    ],
)
def test_an_older_cpu_is_told_what_it_lacks(build, arch, cpu, expected):
    _, missing = features("qemu-x86_64", "-cpu", cpu, build(arch))
    assert missing == expected


@pytest.mark.skipif(
    ARM_COMPILER is None or shutil.which("qemu-aarch64") is None, reason="needs g++ and qemu for aarch64"
)
@pytest.mark.parametrize(
    ("arch", "cpu", "compiled", "missing"),
    [
        ("armv8-a", "cortex-a53", [], []),
        ("armv8.2-a+sve", "cortex-a53", ["lse", "fp16", "sve"], ["lse", "fp16", "sve"]),
        ("armv8.2-a+sve", "a64fx", ["lse", "fp16", "sve"], []),
        ("armv9-a+sve2", "a64fx", ["lse", "fp16", "dotprod", "sve", "sve2"], ["dotprod", "sve2"]),
    ],
)
def test_arm(build, arch, cpu, compiled, missing):
    program = build(arch, ARM_COMPILER, "-static")
    assert features("qemu-aarch64", "-cpu", cpu, program) == (compiled, missing)


@x86
def test_no_architecture_has_a_feature_that_is_not_checked():
    """What any -march of this compiler defines, against the table and those used on request alone."""

    def defined(arch):
        command = [COMPILER, f"-march={arch}", "-dM", "-E", "-x", "c++", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True)
        return set(re.findall(r"#define __([A-Z0-9_]+)__ 1$", done.stdout, re.MULTILINE))

    refused = subprocess.run([COMPILER, "-march=?", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True)
    architectures = re.search(r"valid arguments to .*?are: ([^;]*)", refused.stderr).group(1).split()
    baseline = defined("x86-64")
    # Whole families have the same; 64-bit code is what the rest lacks.
    found = {name for arch in architectures if "SSE2" in (macros := defined(arch)) for name in macros - baseline}
    header = (ROOT / "csrc/include/ssiuu/cpu_features.h").read_text()
    checked = set(re.findall(r"X\(__([A-Z0-9_]+)__,", header))
    assert {"AVX", "AVX2", "AVX512F"} <= found
    assert found - checked - set(ONLY_ON_REQUEST.split()) == set()
