"""Launches of `token_scores` and of the reduction that it shares with `glu_backward`."""

from ssiuu_kernels.ops.common.triton_kernels import finish_scores_kernel
from ssiuu_kernels.ops.token_scores import triton as token_scores

from .case import Case

CASES = [
    Case(
        f"token_scores {element}",
        token_scores.token_scores_kernel,
        {
            "z": f"*{element}", "grad_z": f"*{element}", "segments": "*i32", "partials": "*fp32",
            "z_stride": "i32", "grad_z_stride": "i32", "samples": "i32", "cols": "i32",
        },
        {"SPLITS": 4, "BLOCK_T": token_scores.BLOCK_T, "BLOCK_D": token_scores.BLOCK_D},
        token_scores.NUM_WARPS,
        unaligned=("samples",),
    )
    for element in ("bf16", "fp32")
] + [
    Case(
        "finish_scores",
        finish_scores_kernel,
        {"partials": "*fp32", "segments": "*i32", "scores": "*fp32", "samples": "i32", "cols": "i32"},
        {"SPLITS": 4, "BLOCK_D": 256},
        num_warps=2,
        wide=False,
        unaligned=("samples",),
    ),
]  # fmt: skip
