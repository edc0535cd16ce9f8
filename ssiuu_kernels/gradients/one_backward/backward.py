"""The one backward: the derivatives with respect to the log-likelihoods arrive, and the unit gradients go down."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .graph import Followed, Part, Versions
from .targets import Targets


class OneBackward:
    """What connects the objective's graph with the model's, which it walks by itself, once.

    Args:
        parts: the forwards that make up the loss; their nodes are claimed (`graph.claim`).
        graphs: of the parts.
        factor: `d target_b / d s_b`, 0 for samples that are not penalised; `[N]` over all parts.
        samples: forget samples.
        versions: of the parameters.
        targets: the parameters that get a target gradient.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        graphs: Sequence[Followed],
        factor: Tensor,
        samples: int,
        versions: Versions,
        targets: Targets,
    ):
        self._parts: Sequence[Part] | None = parts
        self._graphs, self._factor, self._samples = graphs, factor, samples
        self._versions, self._targets = versions, targets
        self.scale: Tensor | None = None  # by which the loss was multiplied; known once its backward begins

    def attach(self) -> Tensor:
        """The log-likelihoods `[N]` as a leaf, for the objective; the backward of its value runs `run`.

        The model's graph is not below it, so that another loss on the same logits cannot add to the unit gradients.
        """
        leaf = torch.cat([part.log_probs.detach() for part in self._parts]).requires_grad_()
        return _Start.apply(leaf, self)

    def run(self, weights: Tensor) -> None:
        """Fill `grad` and `target_grad`.

        Args:
            weights: derivatives of the loss with respect to the log-likelihoods, `[N]`.

        Raises:
            RuntimeError: a second call, a later loss on the same forward, or a parameter edited since the forward;
                nothing is changed then.
            ValueError: the loss was multiplied, and parameters are updated in backward.
        """
        if self._parts is None:
            raise RuntimeError(
                "backward was called a second time on one unlearning loss, whose gradients are in grad and target_grad "
                "already; call unlearning_loss again for another"
            )
        if any(part.weights.superseded for part in self._parts):
            raise RuntimeError(
                "a newer unlearning loss on this forward replaced this one; run the model again for a second loss. "
                "Nothing was changed"
            )
        self._versions.check()
        parts, self._parts = self._parts, None
        # Where the loss is a term of a sum whose other terms go through the same forward, they need the graph too.
        shared = any(torch._C._will_engine_execute_node(node) for graph in self._graphs for node in graph.nodes)
        self._targets.begin(self._samples, self.scale)
        self._fill(parts, weights.to(self._factor.dtype), shared)

    def _fill(self, parts: Sequence[Part], weights: Tensor, retain_graph: bool) -> None:
        """One backward with the unit gradients, while the nodes know the weights of their rows."""
        sizes = [len(part.log_probs) for part in parts]
        unit = ((weights != 0) | (self._factor != 0)).to(weights.dtype)
        tensors = zip(*(tensor.split(sizes) for tensor in (weights, self._factor, unit)), strict=True)
        host = torch.stack([weights, self._factor], 1).tolist()  # the one read on the host: which products are needed
        with ExitStack() as stack:
            stack.enter_context(self._targets.through_hooks())
            signals = []
            for part, graph, (loss, target, ones) in zip(parts, self._graphs, tensors, strict=True):
                stack.callback(part.weights.disarm)
                stack.callback(graph.release)
                own, host = host[: len(loss)], host[len(loss) :]
                part.weights.arm(loss, target, *zip(*own, strict=True))
                for handle in graph.hooks(part.weights):
                    stack.callback(handle.remove)
                signals.append(part.signal(ones))
            torch.autograd.backward([part.logits for part in parts], signals, retain_graph=retain_graph)


class _Start(torch.autograd.Function):
    """The identity; its backward is `OneBackward.run`."""

    @staticmethod
    def forward(ctx, leaf: Tensor, run: OneBackward) -> Tensor:
        ctx.run = run
        return leaf.view_as(leaf)

    @staticmethod
    @once_differentiable
    def backward(ctx, weights: Tensor):
        ctx.run.run(weights)
        return None, None
