"""Put the kernels under one instance of a Hugging Face model, and take them away again."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from ..gradients.one_backward.installed import RowForwards
from ..gradients.path import ENGINES, ONE_BACKWARD
from ..loss.neuron_level import NeuronLevel
from ..modules.patched_mlp import PatchedMlp
from ..modules.recognise import find_mlps, is_encoder_decoder
from ..ops import backends
from ..patched_forward import is_patched
from .handle import PatchHandle

logger = logging.getLogger(__name__)
SCOPES = ("mlp", "all")
LEVELS = ("parameter", "neuron")


def patch(
    model: nn.Module,
    *,
    scope: str = "mlp",
    backend: str = "auto",
    strict: bool = False,
    level: str = "parameter",
    penalty_weight: float | Tensor = 1e-3,
    forget_samples: int | None = None,
    engine: str = ONE_BACKWARD,
    grad_dtype: torch.dtype | None = None,
) -> PatchHandle:
    """Run the MLPs of this model instance on the kernels. Outputs, hooks and state_dict keys stay the same.

    Modules are recognised by their parts and by what they compute, never by their class: gated MLPs
    `down(act(gate(x)) * up(x))` with separate projections (Llama, Mistral, Qwen2, Qwen3, SmolLM3, OLMo2, Gemma) or
    gate and up in one (Phi-3, GLM), and ungated ones `down(act(up(x)))` (GPT-2, GPT-NeoX, OPT, Phi, Falcon, Bloom,
    MPT, GPT-J, CodeGen, Nemotron, Arcee). A copy or a pickle of a patched model is the plain model.

    Args:
        model: a Hugging Face causal language model.
        scope: "mlp" attributes `h` and `gate` (`h` and `up` of an ungated MLP), and gives a `target_grad` to the
            patched MLPs' parameters; "all" adds the outputs of Q, K, V, O and down, and gives it to every trainable
            parameter.
        backend: backend of the ops.
        strict: raise where a module has to be skipped.
        level: "parameter" is Algorithm 1: `unlearning_loss` fills `target_grad`, and `SsiuuAdamW` or `SsiuuPenalty`
            applies the penalty. "neuron" is Eq. 3 as it is written: the backward of `unlearning_loss` adds the
            penalty's gradient to `grad`, and any optimizer follows.
        penalty_weight: lambda of level "neuron".
        forget_samples: size of the forget set, for level "neuron": the last attribution of each sample is kept.
        engine: how `unlearning_loss` makes the two gradients at level "parameter": "one-backward", which falls back
            where the model cannot take it (`PatchHandle.gradient_path` says why), "two-backward", or "checked": one
            backward, held against two more on every batch.
        grad_dtype: torch.float32 adds both gradients of bfloat16 or float16 parameters up in float32; None: in the
            parameter's type. Needs a torch that has `Tensor.grad_dtype` (2.10 or newer).

    Returns:
        A handle, also a context manager that unpatches on exit.

    Raises:
        ValueError: unknown scope, level, engine, grad_dtype or backend; a model already patched, or an
            encoder-decoder; no MLP that the kernels can serve where one is needed (scope "mlp", level "neuron"), or
            (strict) a skipped one; level "neuron" without forget_samples.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; expected one of {', '.join(SCOPES)}")
    if level not in LEVELS:
        raise ValueError(f"level={level!r} is unknown; expected one of {', '.join(LEVELS)}")
    if level == "neuron" and forget_samples is None:
        raise ValueError("level='neuron' keeps the last attribution of each forget sample; pass forget_samples")
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is unknown; expected one of {', '.join(ENGINES)}")
    if grad_dtype not in (None, torch.float32):
        raise ValueError(f"grad_dtype={grad_dtype}; expected torch.float32 or None")
    if grad_dtype is not None and not hasattr(torch.Tensor, "grad_dtype"):
        raise ValueError(f"grad_dtype={grad_dtype} needs torch 2.10 or newer, and this is {torch.__version__}")
    backends.check_backend(backend)
    if any(is_patched(module) for module in model.modules()):
        raise ValueError("model is already patched; call unpatch() on the handle of the first patch")
    if is_encoder_decoder(model):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, which shifts its labels itself; expected a causal language "
            "model"
        )
    neurons = NeuronLevel(penalty_weight, forget_samples) if level == "neuron" else None
    found, skipped = find_mlps(model)
    if strict and skipped:
        raise ValueError(_refusal(model, skipped))
    if not found and (scope == "mlp" or level == "neuron"):
        needs = "level 'neuron' needs one" if level == "neuron" else "scope 'all' needs none for unlearning_loss"
        raise ValueError(f"{_refusal(model, skipped)}; {needs}")
    mlps = {name: PatchedMlp(name, mlp, backend, neurons) for name, mlp in found.items()}
    if skipped:
        logger.warning("patched %d MLPs and skipped %d: see handle.skipped", len(found), len(skipped))
    rows = RowForwards(model, grad_dtype) if level == "parameter" else None
    return PatchHandle(model, mlps, skipped, scope, backend, neurons, engine, rows)


def _refusal(model: nn.Module, skipped: dict[str, str]) -> str:
    kind = type(model).__name__
    if not skipped:
        return f"{kind} has no MLP of a form that is known; see ssiuu_kernels.patch for those that are"
    name, reason = next(iter(skipped.items()))
    return f"{kind}: {len(skipped)} MLPs cannot be patched, first {name}: {reason}"
