"""The parts of a causal language model, found by structure: its decoder layers, their MLPs, final norm and head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssiuu_kernels.modules.recognise import Mlp, attention_outputs, find_mlps, mlp_parts


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in order: the entries of the one ModuleList in which each holds an attention and an MLP.

    An MLP that the kernels cannot serve (quantised, adapted, patched already, a mixture of experts) counts too.

    Raises:
        ValueError: a model without such a list, or with several (an encoder and a decoder, a vision tower).
    """
    return list(model.get_submodule(_layers_name(model)))


def layer_mlp(layer: nn.Module) -> Mlp:
    """The MLP of a decoder layer, whose `projections` end with the down projection.

    Its form says what comes before: "gated" (gate, up), "packed" (one projection, whose first half of outputs is the
    gate) or "ungated" (up). Weights are `[out, in]`; those of GPT-2's Conv1D are `[in, out]`.

    Raises:
        ValueError: a layer without an MLP of a known form, with several, or a patched one.
    """
    found, skipped = find_mlps(layer)
    if len(found) == 1:
        return next(iter(found.values()))
    reason = next(iter(skipped.values()), f"it has {len(found)} MLPs of a known form")
    raise ValueError(f"{type(layer).__name__} needs one MLP of plain linear projections: {reason}")


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last decoder layer and the output head: beside the layers, with weights of one dimension.

    Where there are two (Bloom has one behind its embeddings), it is the one after the layers.

    Raises:
        ValueError: none, or several; see also `decoder_layers`.
    """
    parent, _, name = _layers_name(model).rpartition(".")
    children = dict(model.get_submodule(parent).named_children())
    norms = [child for child, module in children.items() if _is_norm(module)]
    if len(norms) > 1:
        places = list(children)
        norms = [norm for norm in norms if places.index(norm) > places.index(name)]
    if len(norms) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(norms)} norms after its decoder layers; expected one, before the output "
            "head"
        )
    return children[norms[0]]


class LogitLens:
    """The model's final norm and output head, applied to the residual stream after any decoder layer.

    Args:
        model: a causal language model.

    Raises:
        ValueError: see `final_norm`; a model without an output head.
    """

    def __init__(self, model: nn.Module):
        self.norm, self.head = final_norm(model), model.get_output_embeddings()
        if self.head is None:
            raise ValueError(f"{type(model).__name__} has no output head; expected a causal language model")

    def __call__(self, states: Tensor) -> Tensor:
        """Logits `[..., V]` of states `[..., D]`, which may be of another dtype than the head (autocast)."""
        return self.head(self.norm(states.to(self.head.weight.dtype)))

    def check_order(self, last_states: Tensor, logits: Tensor) -> None:
        """Raise a ValueError unless the model's logits `[..., V]` rank the tokens as this does.

        So they may be capped or scaled, of which a comparison of tokens sees nothing.

        Args:
            last_states: of the last decoder layer, `[..., D]`.
        """
        wrong = self.head.weight.shape[-1] != last_states.shape[-1]
        if not wrong:
            ranked = logits.gather(-1, self(last_states).argsort(-1))
            wrong = not (ranked.cummax(-1).values - ranked).max() <= _room(logits)
        if wrong:
            raise ValueError(
                "the model's logits rank tokens otherwise than its output head on its final norm (it projects states "
                "between, say); expected a model whose last layer the logit lens can read"
            )

    def check(self, last_states: Tensor, logits: Tensor) -> None:
        """Raise a ValueError unless this gives the model's logits `[..., V]` from the last layer's states `[..., D]`.

        A model may scale or cap its logits, or project states between norm and head; its lens would have to as well.
        """
        wrong = self.head.weight.shape[-1] != last_states.shape[-1]
        if not wrong:
            wrong = not (self(last_states) - logits).abs().max() <= _room(logits)
        if wrong:
            raise ValueError(
                "the model's logits are not its output head on its final norm (it caps or scales them, or projects "
                "between); expected a model without that"
            )


class NeuronPlace(NamedTuple):
    """Where the neurons of one kind and layer are: columns of a module's output, from `start` to the next `width`."""

    module: nn.Module
    start: int
    width: int


def neuron_places(model: nn.Module) -> dict[str, list[NeuronPlace]]:
    """kind -> places in the order of the model's modules, for Q, K, V (or QKV), O, gate, up and down.

    The kinds and the order are those of attribution. A patched model has the same places as an unpatched one.
    """
    found: dict[str, list[NeuronPlace]] = {}
    for _, kind, module in attention_outputs(model):
        found.setdefault(kind, []).append(NeuronPlace(module, 0, _output_width(module)))
    for owner in model.modules():
        form, parts = mlp_parts(owner) or ("", ())
        if form == "packed":  # gate and up are one projection's halves
            half = _output_width(getattr(owner, parts[0])) // 2
            for kind, start in (("gate", 0), ("up", half)):
                found.setdefault(kind, []).append(NeuronPlace(getattr(owner, parts[0]), start, half))
            parts = parts[1:]
        for kind, part in zip(("gate", "up", "down")[-len(parts) :], parts, strict=False):
            module = getattr(owner, part)
            found.setdefault(kind, []).append(NeuronPlace(module, 0, _output_width(module)))
    return found


def _output_width(projection: nn.Module) -> int:
    # GPT-2's Conv1D has its weight [in, out].
    return projection.nf if hasattr(projection, "nf") else projection.weight.shape[0]


@contextmanager
def recorded_states(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The residual stream `[B, S, D]` after each of these decoder layers, filled in by a forward of the model inside.

    States have the graph of that forward, also where it is checkpointed.
    """
    states: list[Tensor] = [None] * len(layers)

    def recorder(index: int):
        def record(module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
            states[index] = output[0] if isinstance(output, tuple) else output

        return record

    hooks = [layer.register_forward_hook(recorder(index)) for index, layer in enumerate(layers)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _layers_name(model: nn.Module) -> str:
    found, skipped = find_mlps(model)
    mlps, attentions = [*found, *skipped], [name for name, _, _ in attention_outputs(model)]
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(_holds(f"{name}.{i}", mlps) and _holds(f"{name}.{i}", attentions) for i in range(len(module)))
    ]
    if len(names) != 1:
        listed = f" ({', '.join(names)})" if names else ""
        raise ValueError(
            f"{type(model).__name__} has {len(names)} lists of layers with an attention and an MLP each{listed}; "
            "expected one, as a decoder has"
        )
    return names[0]


def _holds(name: str, parts: Sequence[str]) -> bool:
    """Whether one of these parts is the module of this name, or inside it."""
    return any(part == name or part.startswith(f"{name}.") for part in parts)


def _room(logits: Tensor) -> Tensor:
    """By how much two ways to compute the same logits may differ."""
    return max(1e-3, 4 * torch.finfo(logits.dtype).eps) * logits.abs().max()


def _is_norm(module: nn.Module) -> bool:
    params = list(module.parameters())
    return bool(params) and all(param.dim() == 1 for param in params)
