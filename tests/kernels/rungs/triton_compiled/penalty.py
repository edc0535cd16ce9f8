"""Launches of `penalty_` and `penalty_adamw_`."""

import triton.language as tl

from ssiuu_kernels.ops.penalty import triton as penalty
from ssiuu_kernels.ops.penalty.scalars import FIELDS

from .case import Case


def launch(element, adamw, stochastic=False, device_scalars=False, keep_anchor=False):
    tensors = ("param", "grad", "target_grad", "prev_attribution", "exp_avg", "exp_avg_sq")
    types = {
        **dict.fromkeys(tensors, f"*{element}"), "sums": "*fp64", "device_scalars": "*fp64", "n": "i32", "seed": "i32",
        **dict.fromkeys(FIELDS, "fp32"),
    }  # fmt: skip
    constants = {
        "ADAMW": adamw, "STOCHASTIC": stochastic, "DEVICE_SCALARS": device_scalars, "KEEP_ANCHOR": keep_anchor,
        "CHUNK": penalty.CHUNK, "BLOCK": penalty.BLOCK,
    }  # fmt: skip
    extras = " stochastic" * stochastic + " device scalars" * device_scalars + " kept anchor" * keep_anchor
    name = f"{'penalty_adamw_' if adamw else 'penalty_'}{extras} {element}"
    return Case(name, penalty.penalty_kernel, types, constants, penalty.NUM_WARPS, unaligned=("seed",))


def launch_many(element):
    types = {
        "table": "*i64",
        "parameters": "i32",
        "sums": "*fp64",
        "device_scalars": "*fp64",
        **dict.fromkeys(FIELDS, "fp32"),
    }
    dtype = {"bf16": tl.bfloat16, "fp32": tl.float32}[element]
    constants = {
        "PARAM": dtype, "GRAD": dtype, "STATE": dtype, "ALIGNED": True, "ADAMW": True, "STOCHASTIC": False,
        "DEVICE_SCALARS": False, "KEEP_ANCHOR": False, "CHUNK": penalty.CHUNK, "BLOCK": penalty.BLOCK,
    }  # fmt: skip
    name = f"penalty_adamw_many_ {element}"
    # Sizes come from memory, so that no access is known to be within bounds as a whole: it is for small parameters.
    unaligned = ("parameters",)
    return Case(name, penalty.penalty_many_kernel, types, constants, penalty.NUM_WARPS, wide=False, unaligned=unaligned)


CASES = [
    launch_many("fp32"),
    launch_many("bf16"),
    launch("fp32", adamw=False),
    launch("bf16", adamw=False),
    launch("fp32", adamw=True),
    launch("bf16", adamw=True),
    launch("bf16", adamw=True, stochastic=True),
    launch("bf16", adamw=True, device_scalars=True),
    launch("fp32", adamw=True, keep_anchor=True),
    launch("bf16", adamw=True, keep_anchor=True),
]
