"""The penalty on neurons (Eq. 3): the bank of last attributions, and the backward that applies the penalty.

Per forget sample b, layer l and neuron i: `A_{b,i} = sum_k h_{b,k,i} c_{b,k,i}` with `c = dP_b/dh` held constant, and
the penalty is `weight * sum (A_{t,b,i} - A_{t-1,b,i})^2` over `A_t < 0`: a sample is compared with its own last value.

One backward serves: `w_b ds_b/dh` arrives at the topmost MLP, and `P_b / w_b` turns it into `c`. The penalty rescales
it there and flows on down with the loss, so what arrives at a lower MLP is the derivative of the penalised objective:
its `c` includes the penalties above it, and the gradient is that of the definition to first order in the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, Node

from ..attribution.row_proof import RowProof
from ..gradients.one_backward.graph import nodes_under, refuse_reentrant_checkpointing, rows_in_order
from ..gradients.one_backward.row_weights import Lead
from ..modules.mlp import Form, ObservedHidden
from ..ops import NeuronPenalty
from ..ops.common.precision import LARGEST


class NeuronLevel:
    """What the MLPs of one patched model share for the penalty on neurons.

    Args:
        weight: lambda, >= 0; a float, or a 0-dim tensor that a schedule changes in place.
        samples: size of the forget set, `|C_f|`.

    Attributes:
        banks: MLP name -> float32 `[samples, F]` of `A_{t-1}`; NaN where a sample has not been seen.
        value: `R_t` of the last backward, a 0-dim tensor; None before the first.
    """

    def __init__(self, weight: float | Tensor, samples: int):
        if not isinstance(weight, Tensor) and not 0 <= weight <= LARGEST:
            raise ValueError(f"penalty_weight={weight}; expected a finite number from 0 to {LARGEST:g}")
        if samples < 1:
            raise ValueError(f"forget_samples={samples}; expected the size of the forget set, at least 1")
        self.weight, self.samples = weight, samples
        self.banks: dict[str, Tensor] = {}
        self.value: Tensor | None = None
        self._bypassed: dict[str, str] = {}  # MLP name -> why its last forward was its class's own

    def enter(self, name: str, _lead: Lead, _connected: bool) -> None:
        """See `modules.mlp.Observer`."""
        self._bypassed.pop(name, None)

    def bypassed(self, name: str, why: str) -> None:
        """See `modules.mlp.Observer`."""
        self._bypassed[name] = why

    def backward(self, name: str, form: Form, inputs: tuple[Tensor, ...], grad_h: Tensor, options: dict) -> tuple:
        """The gradients of an MLP activation's inputs, in the backward of another loss. See `modules.mlp.Observer`."""
        return form.backward(*inputs, grad_h, **options).inputs

    def observe(self, logits: Tensor, log_probs: Tensor, factor: Tensor, sample_ids: Tensor, length: int) -> Tensor:
        """`log_probs`, whose backward adds the penalty's gradient.

        Args:
            logits: `[B, S, V]`, of which the log-likelihoods are made.
            log_probs: `[B]`.
            factor: `[B]`, `P_b` (or another target's derivative by `s_b`); 0 for samples that are not penalised.
            sample_ids: int64 `[B]`, place of each sample in the forget set; what stands at others is not read.
            length: rows of a sample, padding included.

        Raises:
            ValueError: logits of another model; an MLP that ran twice in the forward, ran on other rows than those of
                the batch, mixes samples, or ran its class's own forward; reentrant checkpointing.
        """
        refuse_reentrant_checkpointing(log_probs)
        nodes = self._hidden_nodes(log_probs, (len(log_probs), length))
        self._prove(logits, log_probs, nodes)
        rows = torch.where(factor > 0, sample_ids, -1)
        return PenalisedBackward(self, log_probs, nodes, factor, rows, length).attach()

    def _hidden_nodes(self, log_probs: Tensor, batch: tuple[int, int]) -> dict[str, Node]:
        """The node of each MLP's hidden activation in this graph."""
        found: dict[str, Node] = {}
        for node in nodes_under(log_probs):
            if not issubclass(getattr(node, "_forward_cls", object), ObservedHidden):
                continue
            if node.mlp_name in found:
                raise ValueError(
                    f"{node.mlp_name} ran twice in this forward; level 'neuron' keeps one attribution per neuron "
                    "and sample: use level='parameter', or run the model once per loss"
                )
            if node.lead not in (batch, (batch[0] * batch[1],)):
                raise ValueError(
                    f"{node.mlp_name} ran on rows {list(node.lead)}; expected those of the batch, {list(batch)}: it "
                    "is not known to which sample each row belongs (freeze modules that see no tokens)"
                )
            found[node.mlp_name] = node
        if not found and not self._bypassed:
            raise ValueError(
                "no patched MLP is in the graph of these logits; expected those of the patched model (a copy of it is "
                "not patched), with a trainable parameter below an MLP"
            )
        for name, why in self._bypassed.items():
            if name not in found:
                raise ValueError(f"{name} cannot be penalised: {why}")
        return found

    def _prove(self, logits: Tensor, log_probs: Tensor, nodes: Mapping[str, Node]) -> None:
        """Two backwards of data gradients, where it is not known otherwise whose row is whose; see `row_proof`."""
        if len(log_probs) < 2 or rows_in_order(logits, ObservedHidden):
            return
        proof = RowProof(len(log_probs), log_probs)
        for weighted, signal in ((True, proof.weights), (False, torch.ones_like(proof.weights))):
            self._send(log_probs, signal, nodes, lambda name, grad, w=weighted: proof.add(name, grad, weighted=w))
        proof.check()

    @staticmethod
    def _send(log_probs: Tensor, signal: Tensor, nodes: Mapping[str, Node], see: Callable[[str, Tensor], None]) -> None:
        """Run data gradients down to the lowest MLP, and show what arrives at each."""
        waiting = dict(nodes)

        def arrived(name: str, grads: tuple[Tensor | None, ...]) -> None:
            if waiting.pop(name, None) is not None and grads[0] is not None:
                see(name, grads[0])

        hooks = [node.register_prehook(partial(arrived, name)) for name, node in nodes.items()]
        try:
            while waiting:  # more than once where MLPs stand in branches of their own
                name, lowest = min(waiting.items(), key=lambda item: item[1]._sequence_nr())
                (grad,) = torch.autograd.grad(
                    log_probs, GradientEdge(lowest, 0), signal, retain_graph=True, allow_unused=True
                )
                arrived(name, (grad,))
        finally:
            for hook in hooks:
                hook.remove()

    def bank(self, name: str, grad_h: Tensor) -> Tensor:
        """The bank of one MLP, made where there is none yet."""
        if name not in self.banks:
            dtype = torch.float64 if grad_h.dtype == torch.float64 else torch.float32
            size = (self.samples, grad_h.shape[-1])
            self.banks[name] = torch.full(size, math.nan, dtype=dtype, device=grad_h.device)
        return self.banks[name]

    def state_dict(self) -> dict[str, Tensor]:
        """The banks, for a checkpoint."""
        return dict(self.banks)

    def load_state_dict(self, banks: dict[str, Tensor]) -> None:
        """Take over the banks of a checkpoint.

        Raises:
            ValueError: a bank of another forget set's size.
        """
        for name, bank in banks.items():
            if len(bank) != self.samples:
                raise ValueError(f"bank {name} has {len(bank)} samples; expected forget_samples={self.samples}")
        self.banks = {name: bank.clone() for name, bank in banks.items()}


class PenalisedBackward:
    """What stands between the objective's graph and the model's, which it walks by itself, once.

    Another loss of the same forward so never meets the signal that the attributions are read from, and nothing stays
    behind in a backward that raises.
    """

    def __init__(
        self,
        level: NeuronLevel,
        log_probs: Tensor,
        nodes: Mapping[str, Node],
        factor: Tensor,
        rows: Tensor,
        length: int,
    ):
        self._level, self._log_probs, self._nodes = level, log_probs, list(nodes.values())
        self._factor, self._rows, self._length = factor, rows, length
        self._before: list[tuple[Tensor, Tensor]] = []  # banks, and their rows before this backward
        for node in self._nodes:
            node.observer = self

    def attach(self) -> Tensor:
        """The log-likelihoods `[B]`, for the objective."""
        return _Start.apply(self._log_probs.detach().requires_grad_(), self)

    def run(self, weights: Tensor) -> None:
        """Run the model's backward with `weights` `[B]`, the derivatives of the loss by the log-likelihoods.

        Raises:
            RuntimeError: a second call, or a later loss on the same forward. Nothing is changed then.
        """
        if self._log_probs is None:
            raise RuntimeError(
                "backward was called a second time on one unlearning loss, whose gradients are in grad already; call "
                "unlearning_loss again for another"
            )
        if any(node.observer is not self for node in self._nodes):
            raise RuntimeError(
                "a newer unlearning loss on this forward replaced this one; run the model again for a second loss. "
                "Nothing was changed"
            )
        log_probs, self._log_probs = self._log_probs, None
        carried = weights != 0
        self._ratio = torch.where(carried, self._factor / torch.where(carried, weights, 1), 0)
        self._rows = torch.where(carried, self._rows, -1)
        start = torch.arange(len(weights), dtype=torch.int32, device=weights.device) * self._length
        self._segments = torch.stack([start, start + self._length], dim=1)
        self._level.value = self._ratio.new_zeros(())
        # Where another loss of this forward is under way too, the graph is still needed.
        shared = any(torch._C._will_engine_execute_node(node) for node in nodes_under(log_probs))
        try:
            torch.autograd.backward(log_probs, weights, retain_graph=shared)
        except BaseException:
            for bank, previous in self._before:
                known = self._rows >= 0
                bank[self._rows[known]] = previous[known]
            raise
        finally:
            for node in self._nodes:
                node.observer = self._level
            self._nodes, self._before = [], []

    def backward(self, name: str, form: Form, inputs: tuple[Tensor, ...], grad_h: Tensor, options: dict) -> tuple:
        """The gradients of an MLP activation's inputs, the penalty's included. See `modules.mlp.Observer`."""
        if self._log_probs is not None:  # the backward of another loss came first
            return form.backward(*inputs, grad_h, **options).inputs
        level, rows = self._level, self._rows
        bank = level.bank(name, grad_h)
        previous = bank[rows]
        self._before.append((bank, previous))
        # A shape [B, S, F] tells the samples apart by itself, and tells the kernels how long they are.
        segments = None if grad_h.dim() == 3 else self._segments
        penalty = NeuronPenalty(level.weight, self._ratio, bank, rows)
        grads = form.backward(*inputs, grad_h, segments=segments, penalty=penalty, **options)
        growth = bank[rows] - previous
        counted = (bank[rows] < 0) & ~growth.isnan() & (rows >= 0)[:, None]
        level.value += growth.masked_fill(~counted, 0).square().sum()
        return grads.inputs


class _Start(torch.autograd.Function):
    """The identity; its backward is `PenalisedBackward.run`."""

    @staticmethod
    def forward(ctx, leaf: Tensor, run: PenalisedBackward) -> Tensor:
        ctx.run = run
        return leaf.view_as(leaf)

    @staticmethod
    @once_differentiable
    def backward(ctx, weights: Tensor):
        ctx.run.run(weights)
        return None, None
