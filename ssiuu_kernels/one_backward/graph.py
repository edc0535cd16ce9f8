"""Whether a loss's autograd graph can take the one-backward path: what every parameter in it is used by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..log_probs import answer_log_probs
from .functions import RowFunction, RowLinear
from .row_weights import RowWeights

REENTRANT = "CheckpointFunctionBackward"


class Part:
    """One forward of a loss, its graph cut at the logits.

    Args:
        logits: `[B, S, V]`, with their graph.
        weights: of the rows.

    Attributes:
        log_probs: `[N]`, in a graph of their own that ends at the logits of the rows that predict an answer.
    """

    def __init__(self, logits: Tensor, weights: RowWeights):
        self.logits, self.weights = logits, weights
        self._answer_logits = logits.detach().flatten(0, 1).index_select(0, weights.answers.rows).requires_grad_()
        self.log_probs = answer_log_probs(self._answer_logits, weights.answers)

    def signal(self, unit: Tensor) -> Tensor:
        """The gradient of `sum_b unit_b s_b` by the logits, to go backward from there.

        The layer that made them gets it in the answers' rows alone: no gradient of all logits is ever made, unless
        something looks at it.
        """
        (grad,) = torch.autograd.grad(self.log_probs, self._answer_logits, unit)
        node, logits = self.logits.grad_fn, self.logits
        watched = bool(logits._backward_hooks) or logits.retains_grad
        if not watched and _is_ours(node) and node._forward_cls is RowLinear and node.lead == self.weights.batch:
            node.answer_grad = grad
            return grad.new_zeros(()).expand(logits.shape)
        rows = grad.new_zeros(logits.shape).flatten(0, 1).index_copy_(0, self.weights.answers.rows, grad)
        return rows.view(logits.shape)


class Versions(NamedTuple):
    """Parameters of a graph and their versions when it was made, by name."""

    params: dict[str, Tensor]
    versions: dict[str, int]

    def check(self) -> None:
        """Raise a RuntimeError if a parameter was edited since."""
        edited = [name for name, param in self.params.items() if param._version != self.versions[name]]
        if edited:
            raise RuntimeError(
                f"{len(edited)} parameters were edited in place between the forward and its backward, first "
                f"{edited[0]}: their gradients would be of neither model. Nothing was changed; run the forward again"
            )


def refuse_reentrant_checkpointing(logits: Tensor) -> None:
    """Raise a ValueError where a reentrant checkpoint hides the graph: it runs a backward of its own inside."""
    for node in _nodes(logits):
        _refuse_reentrant_checkpoint(node)


def _refuse_reentrant_checkpoint(node) -> None:
    if node.name() == REENTRANT:
        raise ValueError(
            "the model ran with reentrant gradient checkpointing, which hides its parameters from this loss; call "
            "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
        )


def inspect_graph(
    parts: Sequence[Part], names: Mapping[int, str], targets: frozenset[int]
) -> tuple[Versions, str | None]:
    """Claim the graph's nodes for these parts; or say why it cannot take the one-backward path.

    Args:
        parts: the forwards that make up a loss.
        names: id of a parameter -> its name, for messages.
        targets: ids of the parameters that get a target gradient.

    Returns:
        The parameters in the graph with their versions, and the reason, or None.

    Raises:
        ValueError: as `refuse_reentrant_checkpointing`.
    """
    found, reason = Versions({}, {}), None
    for part in parts:
        for node in _nodes(part.logits):
            if not _is_ours(node):
                _refuse_reentrant_checkpoint(node)
                leaves = [leaf.variable for leaf, _ in node.next_functions if hasattr(leaf, "variable")]
                for leaf in leaves:
                    name = names.get(id(leaf), f"a tensor of shape {list(leaf.shape)}")
                    reason = reason or f"{name} is used by {node.name()}, which does not tell the samples apart"
                continue
            for param, version in zip(node.params, node.versions, strict=True):
                if param is not None and param.requires_grad:
                    name = names.get(id(param), str(id(param)))
                    found.params[name] = param
                    found.versions[name] = min(version, found.versions.get(name, version))
            if any(node.weights is other.weights for other in parts):
                reason = reason or f"{_names(node, names)} ran once for both of the loss's forwards"
            if not part.weights.fits(node.lead):
                reason = reason or (
                    f"{_names(node, names)} ran on rows {list(node.lead)}, and it is not known to which of the samples "
                    f"of a batch {list(part.weights.batch)} each belongs"
                )
            if node.weights is not None:
                node.weights.superseded = True
            node.weights, node.targets = part.weights, targets
    return found, reason


def _is_ours(node) -> bool:
    return issubclass(getattr(node, "_forward_cls", object), RowFunction)


def _names(node, names: Mapping[int, str]) -> str:
    return " and ".join(names.get(id(param), "a parameter") for param in node.params if param is not None)


def _nodes(root: Tensor, stop=None) -> list:
    """All nodes under `root`; leaves left out, and `stop` with what is under it."""
    seen, waiting = {root.grad_fn}, [root.grad_fn]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node is not stop and not hasattr(node, "variable") and node not in seen:
                seen.add(node)
                waiting.append(node)
    return list(seen)


def depends_on_more_than(value: Tensor, start: Tensor) -> bool:
    """Whether the graph of `value` reaches a leaf by a way that does not lead through `start`."""
    nodes = _nodes(value, stop=start.grad_fn) if value.grad_fn is not None else []
    leaves = (below for node in nodes for below, _ in node.next_functions if hasattr(below, "variable"))
    return value.grad_fn is None or any(True for _ in leaves)
