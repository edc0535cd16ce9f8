"""Whole models: attributing every MLP neuron to the answers' log-likelihood, against what else gives those scores."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

import ssiuu_kernels as sk

from .. import peers
from ..harness.cases import Candidate, Case, Tensors
from ..harness.device import DEVICE, ON_GPU
from ..training.models import LLAMA_SHAPES, Shape, build

SMALL_SHAPES = {"small Llama": Shape(512, 4, 1536, 8, 4, 8192, tied=False)}
SHAPES = LLAMA_SHAPES if ON_GPU else SMALL_SHAPES
BATCH = (8, 512) if ON_GPU else (4, 128)
DTYPE, TOLERANCE = (torch.bfloat16, 5e-2) if ON_GPU else (torch.float32, 1e-4)


def cases() -> Iterator[Case]:
    for name, shape in SHAPES.items():
        model = build(shape, DTYPE).eval().requires_grad_(False)
        yield Case(
            suite="attribution",
            name=f"{name} {'x'.join(map(str, BATCH))} {str(DTYPE).removeprefix('torch.')}",
            moved_bytes=None,
            inputs=partial(_batch, shape.vocabulary),
            candidates={
                "ssiuu": partial(_ours, sk.patch(_sharing_weights(model))),
                "plain backward": partial(_plain_backward, model),
                "eager hooks": partial(_hooks, model, peers.reduced),
                "compiled hooks": partial(_hooks, model, peers.compiled(peers.reduced)),
                **_captum(model),
            },
            exact=partial(_hooks, model, peers.reduced),
            tolerance=TOLERANCE,
            tokens=BATCH[0] * BATCH[1],
            missing={} if _captum(model) else {"captum": "captum is not installed"},
        )


def _batch(vocabulary: int) -> Tensors:
    input_ids = torch.randint(3, vocabulary, BATCH, device=DEVICE)
    labels = input_ids.clone()
    labels[:, : BATCH[1] // 2] = -100
    return {"input_ids": input_ids, "labels": labels}


def _sharing_weights(model: nn.Module) -> nn.Module:
    """A copy to be patched, once and not in every pass; the other candidates run the model itself."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def _ours(handle: sk.PatchHandle, inputs: Tensors) -> Tensors:
    found = handle.attribute(inputs, target="log_prob")
    return {"h": torch.stack([torch.stack(kinds["h"]) for kinds in found.values()])}


def _log_likelihood(model: nn.Module, inputs: Tensors, embeddings: Tensor) -> Tensor:
    logits = model(inputs_embeds=embeddings, use_cache=False).logits
    return sk.sequence_log_probs(logits, inputs["labels"])


def _embeddings(model: nn.Module, inputs: Tensors) -> Tensor:
    return model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()


def _plain_backward(model: nn.Module, inputs: Tensors) -> Tensors:
    """The same forward and backward of data gradients, attributing nothing; its gate is the log-likelihood's."""
    log_likelihood = _log_likelihood(model, inputs, _embeddings(model, inputs))
    log_likelihood.sum().backward()
    return {"log_likelihood": log_likelihood.detach()}


def _hooks(model: nn.Module, reduce, inputs: Tensors) -> Tensors:
    """Hooks that keep every h and gate, and reduce h * dh (and gate * dgate) after the backward."""
    hidden: list[Tensor] = []
    gates: list[Tensor] = []

    def keep(tensors: list[Tensor], z: Tensor) -> None:
        z.retain_grad()
        tensors.append(z)

    handles = []
    for layer in model.model.layers:
        handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _module, args: keep(hidden, args[0])))
        handles.append(layer.mlp.gate_proj.register_forward_hook(lambda _module, _args, z: keep(gates, z)))
    try:
        log_likelihood = _log_likelihood(model, inputs, _embeddings(model, inputs))
        log_likelihood.sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        scores = [torch.stack([reduce((z * z.grad).float()) for z in tensors]) for tensors in (hidden, gates)]
    return {"h": scores[0], "log_likelihood": log_likelihood.detach()}


def _captum(model: nn.Module) -> dict[str, Candidate]:
    if importlib.util.find_spec("captum") is None:
        return {}
    from captum.attr import LayerGradientXActivation

    downs = [layer.mlp.down_proj for layer in model.model.layers]

    def run(inputs: Tensors) -> Tensors:
        def log_likelihood(embeddings: Tensor) -> Tensor:
            return _log_likelihood(model, inputs, embeddings)

        products = LayerGradientXActivation(log_likelihood, downs).attribute(
            _embeddings(model, inputs), attribute_to_layer_input=True
        )
        tensors = [product[0] if isinstance(product, tuple) else product for product in products]
        return {"h": torch.stack([peers.reduced(product.detach().float()) for product in tensors])}

    return {"captum": run}
