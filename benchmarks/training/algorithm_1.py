"""Algorithm 1 as a competent person would write it in PyTorch: two ways to its gradients, two ways to its update."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..harness.device import DEVICE
from ..peers import penalised_adamw_
from .batch import Batch, Options, Step, Trainer

Params = Sequence[nn.Parameter]
Gradients = Callable[[nn.Module, Params, Batch], Sequence[Tensor]]  # fills param.grad with dL, returns gP
Update = Callable[[Sequence[Tensor]], None]  # from gP and param.grad, changes the weights


def algorithm_1(gradients: Gradients, make_update: Callable[[Params, Options], Update]) -> Trainer:
    """The whole step."""

    def make(model: nn.Module, options: Options) -> Step:
        params = list(model.parameters())
        update = make_update(params, options)

        def step(batch: Batch) -> None:
            update(gradients(model, params, batch))
            for param in params:
                param.grad = None

        return step

    return make


def one_forward(model: nn.Module, params: Params, batch: Batch) -> Sequence[Tensor]:
    """Forget and retain samples together: the target's backward goes through the rows of both."""
    log_probs = batch.log_probs(model)
    target_grads = torch.autograd.grad(batch.targets(log_probs)[batch.forget].sum(), params, retain_graph=True)
    batch.gradient_difference(log_probs).backward()
    return target_grads


def two_forwards(model: nn.Module, params: Params, batch: Batch) -> Sequence[Tensor]:
    """One forward each: the target's backward goes through the forget samples alone, whose graph is then freed."""
    forget, retain = batch.of(batch.forget), batch.of(~batch.forget)
    log_probs = forget.log_probs(model)
    target_grads = torch.autograd.grad(forget.targets(log_probs).sum(), params, retain_graph=True)
    (log_probs.sum() / forget.lengths.sum()).backward()
    (-retain.log_probs(model).sum() / retain.lengths.sum()).backward()
    return target_grads


def eager_update(params: Params, options: Options) -> Update:
    """The penalty in few passes and little memory, then fused AdamW."""
    optimizer = torch.optim.AdamW(params, fused=True, **options.adamw)
    attributions: list[Tensor] = []

    @torch.no_grad()
    def update(target_grads: Sequence[Tensor]) -> None:
        for index, (param, target_grad) in enumerate(zip(params, target_grads, strict=True)):
            attribution = param * target_grad
            if index == len(attributions):  # the first step has no penalty
                attributions.append(attribution)
                continue
            growth = (attribution - attributions[index]).masked_fill_(attribution >= 0, 0)
            param.grad.addcmul_(growth, target_grad, value=2 * options.penalty_weight)
            attributions[index] = attribution
        optimizer.step()

    return update


def compiled_update(params: Params, options: Options) -> Update:
    """Penalty and AdamW elementwise in one compiled function, one call a parameter."""
    # Flat and of any size, so that parameters of all shapes share one compiled kernel.
    kernel = torch.compile(penalised_adamw_, dynamic=True)
    flat = [param.detach().view(-1) for param in params]
    states = [[torch.zeros_like(param) for param in flat] for _ in range(3)]
    beta1, beta2 = options.adamw["betas"]
    steps = 0

    @torch.no_grad()
    def update(target_grads: Sequence[Tensor]) -> None:
        nonlocal steps
        steps += 1
        weight = options.penalty_weight if steps > 1 else 0.0  # the first step has no penalty
        changing = {"weight": weight, "bias1": 1 - beta1**steps, "bias2": 1 - beta2**steps}
        # As tensors: a number would be compiled in, and again at every step.
        changing = {name: torch.tensor(value, device=DEVICE) for name, value in changing.items()}
        for param, values, target_grad, *state in zip(params, flat, target_grads, *states, strict=True):
            kernel(values, param.grad.view(-1), target_grad.reshape(-1), *state, **changing, **options.adamw)

    return update
