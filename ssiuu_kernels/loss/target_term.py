"""A term of value 0 whose backward fills `param.target_grad`, to be added to any loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.autograd.function import once_differentiable

from ..distributed import refuse_more_processes
from ..gradients.one_backward.graph import nodes_under, refuse_another_model, refuse_reentrant_checkpointing
from ..gradients.one_backward.targets import Targets
from ..gradients.path import TWO_BACKWARD, GradientPath
from ..gradients.two_backward import TwoBackward
from ..log_probs import check_target
from .batches import Tensors, check_gradient, checked_batches, log_probs_of, refuse_update_in_backward, target_weights


def target_term(
    logits: Tensors,
    labels: Tensors,
    forget: Tensor,
    *,
    params: Sequence[nn.Parameter],
    target: str,
    segments: Tensors | None,
    model_params: Mapping[str, nn.Parameter],
) -> tuple[Tensor, GradientPath]:
    """See `PatchHandle.target_term`; `params` are those that get a `target_grad`, `model_params` all by name."""
    refuse_more_processes()
    batches = checked_batches(logits, labels, segments, forget)
    check_target(target)
    targets = Targets(params)
    refuse_update_in_backward(model_params, targets.params.keys(), "the handle's scope leaves it out")
    for batch in batches:
        check_gradient(batch.logits)
        refuse_reentrant_checkpointing(batch.logits)
    refuse_another_model([batch.logits for batch in batches], targets)
    _refuse_several_devices(targets)
    log_probs = log_probs_of(batches)
    lengths = torch.cat([batch.answers.lengths for batch in batches])
    factor = target_weights(log_probs, lengths, forget, target)
    backward = TwoBackward(log_probs, factor, int(forget.sum()), targets)
    start = torch.zeros((), device=log_probs.device, requires_grad=True)  # a node needs something below it
    term = _Term.apply(start, backward, targets)
    _refuse_another_thread(term, log_probs)
    return term, GradientPath(TWO_BACKWARD, "target_term adds the target gradient to a loss of another kind")


class _Term(torch.autograd.Function):
    """0; its backward fills the target gradients.

    Autograd runs, of the nodes that are ready, the one that was made last. The model's nodes were made before this
    one, so the whole target gradient is there before the loss's gradient reaches a parameter, and before the loss's
    backward frees what this one needs.
    """

    @staticmethod
    def forward(ctx, start: Tensor, backward: TwoBackward, targets: Targets) -> Tensor:
        ctx.backward, ctx.targets = backward, targets
        return torch.zeros_like(start)

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):
        if ctx.backward is None:
            raise RuntimeError(
                "backward was called a second time on one target_term, whose gradients are in target_grad already; "
                "call target_term again for another"
            )
        backward, ctx.backward = ctx.backward, None
        backward.scale = scale.detach()
        Variable._execution_engine.queue_callback(ctx.targets.add_zero_grads)  # when all of this backward is done
        backward.fill()
        return None, None, None


def _refuse_several_devices(targets: Targets) -> None:
    """Each device has a thread of autograd's, which waits for no other before it updates a weight."""
    devices = {param.device for param in targets.params.values()}
    if targets.updated_in_backward and len(devices) > 1:
        raise ValueError(
            f"parameters on {len(devices)} devices are updated in backward, and target_term cannot promise them their "
            "target gradient before; use update_in_backward=False"
        )


def _refuse_another_thread(term: Tensor, log_probs: Tensor) -> None:
    """Each thread counts the nodes that it makes by itself."""
    made = term.grad_fn._sequence_nr()
    # Nodes that accumulate gradients come last whatever their number.
    if any(node._sequence_nr() >= made for node in nodes_under(log_probs) if not hasattr(node, "variable")):
        raise ValueError(
            "the model's forward ran in another thread than target_term, so autograd would not run the term first; "
            "call both in one thread"
        )
