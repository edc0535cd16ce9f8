"""RMU: representation misdirection at one decoder layer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import ssiuu_kernels as sk

from ..evaluation.mode import eval_mode
from ..models.layers import decoder_layers, layer_mlp, recorded_states
from ..options import UnlearnOptions
from .base import Batch, Loss, Method, UnlearnData
from .registry import register_method
from .states import states_of

DEPTH = 3  # decoder layers that train, the last of them the steered one
TENSORS = ("down", "all")
REFERENCES = ("cached", "live")


@register_method
class Rmu(Method):
    """RMU: steer the states of forget samples to a random vector, and hold those of retain samples.

    `mean over forget of MSE(h, c u) + alpha * mean over retain of MSE(h, h_before)`

    `h [tokens, D]` is the residual stream after decoder layer l, of all tokens of a sample but its padding; `h_before`
    is that of the model before unlearning. `u [D]` is uniform in [0, 1), normalised, and drawn once by the run's seed.
    Layers l - 2 to l train. Each sample's MSE counts alike, as in the formula of Li et al. 2024 (WMDP), arXiv
    2403.03218; their code takes the mean over the tokens of a batch, padding included.
    """

    name, label, color = "rmu", "RMU", "#56b4e9"
    summary = "representation misdirection: states of forget samples go to a random vector, at one layer"
    source = (
        "the paper (RMU, Li et al. 2024; learning rate 5e-5, batch 4); ours: prompt and answer tokens count, padding "
        "does not"
    )

    @dataclass(frozen=True)
    class Options:
        """
        Attributes:
            rmu_layer: decoder layer whose output is steered, from 0. Paper: 7.
            rmu_c: length of the vector that states of forget samples go to (WMDP: steering coefficient). Paper: 20.
            rmu_alpha: weight of the retain term. Paper: 20, 50, 100, 150, 200 or 300.
            rmu_tensors: what trains in the layers from two before rmu_layer up to it: "down", the down projections of
                their MLPs (the paper), or "all" of their parameters.
            reference_model: states of retain samples before unlearning: "cached" computes them once and keeps them on
                the CPU, "live" again at every step (slower, but for retain sets whose states do not fit into memory).
        """

        rmu_layer: int = 7
        rmu_c: float = 20.0
        rmu_alpha: float = 100.0
        rmu_tensors: str = "down"
        reference_model: str = "cached"

    def check(self, run: UnlearnOptions) -> None:
        options = self.options
        if options.rmu_layer < 0:
            raise ValueError(f"rmu_layer={options.rmu_layer}; expected at least 0")
        for name in ("rmu_c", "rmu_alpha"):
            if not 0 <= getattr(options, name) < math.inf:
                raise ValueError(f"{name}={getattr(options, name)}; expected a finite number, at least 0")
        for name, known in (("rmu_tensors", TENSORS), ("reference_model", REFERENCES)):
            if getattr(options, name) not in known:
                raise ValueError(f"{name}={getattr(options, name)!r} is unknown; expected one of {', '.join(known)}")

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        layers = self._layers(model)
        parts = layers if self.options.rmu_tensors == "all" else [layer_mlp(layer).down for layer in layers]
        return [param for part in parts for param in part.parameters()]

    def _layers(self, model: nn.Module) -> list[nn.Module]:
        """The layers that train; the last of them is the steered one."""
        layers, last = decoder_layers(model), self.options.rmu_layer
        if last >= len(layers):
            raise ValueError(
                f"rmu_layer={last}, but the model has {len(layers)} decoder layers; expected 0 to {len(layers) - 1}"
            )
        return layers[max(0, last + 1 - DEPTH) : last + 1]

    def setup(self, model: nn.Module, handle: sk.PatchHandle, data: UnlearnData) -> None:
        super().setup(model, handle, data)
        self.layer = self._layers(model)[-1]
        generator = torch.Generator().manual_seed(data.seed)
        drawn = torch.rand(model.config.get_text_config().hidden_size, generator=generator)
        self.target = self.options.rmu_c * drawn / drawn.norm()
        if self.options.reference_model == "cached":
            self.cached: list[Tensor] = []
            for batch, (states,), _ in states_of(model, [self.layer], data.prompts, data.retain_samples):
                self.cached += [part.cpu() for part in _of_samples(states, batch["attention_mask"])]
        else:
            self.original = {
                name: param.detach().to("cpu", copy=True)
                for name, param in model.named_parameters()
                if param.requires_grad
            }

    def loss(self, batch: Batch) -> Loss:
        before = self._before(batch.only(batch.retain)) if bool(batch.retain.any()) else []
        with recorded_states([self.layer]) as states:
            logits = self.forward(batch)
        forget, retain = (
            _of_samples(states[0][chosen], batch.attention_mask[chosen]) for chosen in (batch.forget, batch.retain)
        )
        steered = batch.forget_weight * _mean_squared_error(forget, [self.target] * len(forget))
        return Loss(steered + self.options.rmu_alpha * _mean_squared_error(retain, before), logits)

    def _before(self, batch: Batch) -> list[Tensor]:
        """States `[tokens, D]` of each of these retain samples in the model before unlearning."""
        if self.options.reference_model == "cached":
            return [self.cached[index] for index in batch.ids.tolist()]
        # What the model was before is what it is now but for the weights that train, so that they alone are kept.
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
        original = {name: tensor.to(self.model.device) for name, tensor in self.original.items()}
        with torch.no_grad(), eval_mode(self.model), recorded_states([self.layer]) as states:
            functional_call(self.model, original, kwargs=inputs)
        return _of_samples(states[0], batch.attention_mask)


def _of_samples(states: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """`[tokens, D]` of each sample, its padding left out; states are `[B, S, D]`, the mask `[B, S]`."""
    mask = attention_mask.bool()
    return list(states[mask].split(mask.sum(1).tolist()))


def _mean_squared_error(samples: Iterable[Tensor], targets: Iterable[Tensor]) -> Tensor | float:
    """The mean over the samples of their MSE, at least in float32; 0 of none."""
    errors = []
    for states, target in zip(samples, targets, strict=True):
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        errors.append(F.mse_loss(states, target.to(states).expand_as(states)))
    return torch.stack(errors).mean() if errors else 0.0
