"""What others would run instead of our kernels, written as a user would write it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness.cases import Candidate, Tensors
from .harness.device import DEVICE, ON_GPU


def compiled(function: Callable) -> Callable:
    """`torch.compile` for fixed shapes, compiled when it is first called."""
    return torch.compile(function, dynamic=False)


def swiglu_gradients(gate: Tensor, up: Tensor, grad_h: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `silu(gate) * up`, in the inputs' type."""
    s = torch.sigmoid(gate)
    return grad_h * up * s * (1 + gate * (1 - s)), grad_h * gate * s


def swiglu_backward(inputs: Tensors) -> Tensors:
    grad_gate, grad_up = swiglu_gradients(**inputs)
    return {"grad_gate": grad_gate, "grad_up": grad_up}


def reduced(product: Tensor) -> Tensor:
    """Max, min and sum over the tokens of `[B, S, F]`, as `[3, B, F]`."""
    return torch.stack([product.amax(1), product.amin(1), product.sum(1)])


def swiglu_backward_with_hooks(inputs: Tensors) -> Tensors:
    """The gradients, and what hooks on h and gate then compute."""
    gate, up, grad_h = inputs["gate"], inputs["up"], inputs["grad_h"]
    grads = swiglu_backward(inputs)
    h = F.silu(gate) * up
    return {**grads, "h_scores": reduced(h * grad_h), "gate_scores": reduced(gate * grads["grad_gate"])}


def token_scores(inputs: Tensors) -> Tensors:
    return {"scores": reduced(inputs["z"] * inputs["grad_z"])}


def liger_swiglu_backward() -> Candidate:
    """Liger's, which overwrites gate and up with their gradients; so each set of inputs gets its own copy, once."""
    from liger_kernel.ops.swiglu import swiglu_backward as backward

    copies: dict[int, tuple[Tensor, Tensor]] = {}

    def run(inputs: Tensors) -> Tensors:
        key = inputs["gate"].data_ptr()
        if key not in copies:
            copies[key] = inputs["gate"].clone(), inputs["up"].clone()
        grad_gate, grad_up = backward(*copies[key], inputs["grad_h"])
        return {"grad_gate": grad_gate, "grad_up": grad_up}

    return run


def why_no_liger() -> str | None:
    """Why Liger cannot take part, or None."""
    if not ON_GPU:
        return "runs on a GPU only"
    return None if importlib.util.find_spec("liger_kernel") else "liger-kernel is not installed"


def penalised(param, grad, target_grad, prev_attribution, weight: float) -> tuple[Tensor, Tensor]:
    """Algorithm 1's gradient and A_t, as a competent person would write them."""
    attribution = param * target_grad
    growth = torch.where(attribution < 0, attribution - prev_attribution, 0)
    return grad + 2 * weight * growth * target_grad, attribution


def penalty_then_fused_adamw(weight: float, step: int, options: dict) -> Candidate:
    """The eager penalty, then `torch.optim.AdamW(fused=True)`."""
    optimizers: dict[int, torch.optim.Optimizer] = {}

    def run(inputs: Tensors) -> Tensors:
        param = inputs["param"]
        optimizer = optimizers.get(id(param))
        if optimizer is None:
            optimizer = optimizers[id(param)] = torch.optim.AdamW([param], fused=True, **options)
            optimizer.state[param] = {
                "step": torch.tensor(step - 1.0, device=DEVICE),
                "exp_avg": inputs["exp_avg"],
                "exp_avg_sq": inputs["exp_avg_sq"],
            }
        param.grad, attribution = penalised(
            param, inputs["grad"], inputs["target_grad"], inputs["prev_attribution"], weight
        )
        inputs["prev_attribution"].copy_(attribution)
        optimizer.step()
        return {name: inputs[name] for name in ("param", "prev_attribution", "exp_avg", "exp_avg_sq")}

    return run


def penalised_adamw_(
    param,
    grad,
    target_grad,
    prev_attribution,
    exp_avg,
    exp_avg_sq,
    *,
    weight,
    bias1,
    bias2,
    lr,
    betas,
    eps,
    weight_decay,
) -> None:
    """Penalty and AdamW elementwise and in place, in float32; `bias1` and `bias2` are `1 - beta**step`."""
    beta1, beta2 = betas
    total, attribution = penalised(param.float(), grad.float(), target_grad.float(), prev_attribution, weight)
    mean = exp_avg.float().lerp(total, 1 - beta1)
    square = beta2 * exp_avg_sq.float() + (1 - beta2) * total * total
    new = param.float() * (1 - lr * weight_decay) - lr / bias1 * mean / ((square / bias2).sqrt() + eps)
    for target, value in ((param, new), (prev_attribution, attribution), (exp_avg, mean), (exp_avg_sq, square)):
        target.copy_(value)


def compiled_penalty_adamw(weight: float, step: int, options: dict) -> Candidate:
    """Penalty and AdamW elementwise, in one compiled function."""
    kernel = compiled(penalised_adamw_)
    bias1, bias2 = (1 - beta**step for beta in options["betas"])

    def run(inputs: Tensors) -> Tensors:
        kernel(**inputs, weight=weight, bias1=bias1, bias2=bias2, **options)
        return {name: inputs[name] for name in ("param", "prev_attribution", "exp_avg", "exp_avg_sq")}

    return run
