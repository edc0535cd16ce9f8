"""Launches of the kernels of an MLP's activation: `glu_forward`, `glu_backward`, `act_forward`, `act_backward`."""

from ssiuu_kernels.ops.common.activations import CODES
from ssiuu_kernels.ops.mlp import triton as mlp

from .case import Case

INT = "i32"
DTYPES = {"bf16": 256, "fp32": 128}  # columns of a stripe, as mlp.BLOCK_D has it
STRIDES = ["x_stride", "up_stride", "grad_h_stride", "grad_x_stride", "grad_up_stride", "h_stride"]


def types(element, **others):
    tensors = dict.fromkeys(("x", "up", "grad_h", "grad_x", "grad_up", "h"), f"*{element}")
    return {**tensors, **others, **dict.fromkeys([*STRIDES, "samples", "rows", "cols"], INT)}


def forward(element, gated):
    names = {"x": f"*{element}", "up": f"*{element}", "h": f"*{element}"}
    sizes = dict.fromkeys(("x_stride", "up_stride", "h_stride", "rows", "cols"), INT)
    constants = {"ACT": CODES["silu"], "GATED": gated, "BLOCK_T": mlp.BLOCK_T, "BLOCK_D": DTYPES[element]}
    kind = "glu" if gated else "act"
    return Case(f"{kind}_forward {element}", mlp.mlp_fwd_kernel, {**names, **sizes}, constants, mlp.NUM_WARPS)


def backward(element, gated, scores, activation="silu", write_h=False):
    constants = {
        "ACT": CODES[activation], "GATED": gated, "WRITE_H": write_h, "SCORES": scores, "SPLITS": 4 if scores else 1,
        "BLOCK_B": mlp.BLOCK_B, "BLOCK_T": mlp.BLOCK_T, "BLOCK_D": DTYPES[element],
    }  # fmt: skip
    name = f"{'glu' if gated else 'act'}_backward{' + scores' * scores}{' + h' * write_h} {activation} {element}"
    partials = {"segments": "*i32", "h_partials": "*fp32", "x_partials": "*fp32"}
    return Case(name, mlp.mlp_bwd_kernel, types(element, **partials), constants, mlp.NUM_WARPS,
                unaligned=("samples", "rows"))  # fmt: skip


def penalised(element, gated, resident, scores=False):
    most = mlp.RESIDENT_ROWS_WITH_SCORES if scores else mlp.RESIDENT_ROWS
    blocks = mlp.resident_blocks(most) if resident else (mlp.BLOCK_T, DTYPES[element], mlp.NUM_WARPS)
    constants = {
        "ACT": CODES["silu"], "GATED": gated, "WRITE_H": scores, "SCORES": scores, "RESIDENT": resident,
        "BLOCK_B": mlp.BLOCK_B, "BLOCK_T": blocks[0], "BLOCK_D": blocks[1],
    }  # fmt: skip
    state = {
        "segments": "*i32", "h_scores": "*fp32", "x_scores": "*fp32", "weight": "*fp32", "ratio": "*fp32",
        "bank": "*fp32", "bank_rows": "*i64",
    }  # fmt: skip
    how = f"{'resident' if resident else 'two passes'}{' + scores + h' * scores}"
    name = f"{'glu' if gated else 'act'}_backward + penalty, {how} {element}"
    return Case(name, mlp.mlp_bwd_penalty_kernel, types(element, **state), constants, blocks[2],
                unaligned=("samples", "rows"))  # fmt: skip


CASES = [
    case
    for element in DTYPES
    for case in (
        forward(element, gated=True),
        forward(element, gated=False),
        backward(element, gated=True, scores=False),
        backward(element, gated=True, scores=True),
        backward(element, gated=True, scores=True, write_h=True),
        backward(element, gated=True, scores=True, activation="gelu"),
        backward(element, gated=True, scores=True, activation="gelu_tanh"),
        backward(element, gated=False, scores=True, activation="gelu"),
        penalised(element, gated=True, resident=True),
        penalised(element, gated=True, resident=True, scores=True),
        penalised(element, gated=True, resident=False, scores=True),
        penalised(element, gated=True, resident=False),
        penalised(element, gated=False, resident=False),
    )
]
