"""How a Triton kernel is compiled without a GPU, and what is read off the result."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = (80, 90)


@dataclass(frozen=True)
class Case:
    """A kernel with the types and constants of one real launch.

    Attributes:
        name: row of the register table.
        kernel: the `@triton.jit` function.
        types: argument -> type ("*bf16", "i64", ...) for everything that is no constant.
        constants: constexpr argument -> value.
        num_warps: of the launch.
        wide: whether loads have to be 16 bytes wide; not where a thread has too little to load.
        unaligned: arguments that are not taken to be divisible by 16 (pointers: bytes; integers: their value).
    """

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    num_warps: int = 4
    wide: bool = True
    unaligned: tuple[str, ...] = ()


def compile_case(case: Case, architecture: int) -> dict:
    """Registers, spilled bytes, shared memory, and the widest global load and store in bits, of the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in order}
    constants = {(order.index(name),): value for name, value in case.constants.items()}
    aligned = [name for name, kind in case.types.items() if kind[0] in "*i" and name not in case.unaligned]
    compiled = triton.compile(
        ASTSource(
            case.kernel,
            signature,
            constexprs=constants,
            attrs={(order.index(name),): [["tt.divisibility", 16]] for name in aligned},
        ),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": case.num_warps},
    )
    usage = _resource_usage(compiled.asm["cubin"])
    return {
        "kernel": case.name,
        "wide": case.wide,
        "arch": f"sm_{architecture}",
        "registers": usage["REG"],
        "spilled": usage["LOCAL"] + usage["STACK"],
        "shared": compiled.metadata.shared,
        "load_bits": _widest(compiled.asm["ptx"], "ld"),
        "store_bits": _widest(compiled.asm["ptx"], "st"),
    }


def _resource_usage(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def _widest(ptx: str, access: str) -> int:
    """Bits of the widest vector access to global memory."""
    found = re.findall(rf"\b{access}\.global(?:\.[a-zA-Z_:0-9]+)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    return max((int(count or 1) * int(bits) for count, bits in found), default=0)
