"""Put the kernels under one instance of a Hugging Face model, and take them away again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MethodType

from torch import Tensor, nn

from . import attribution, backends, loss
from .objectives import Objective
from .ops import NeuronScores, glu_forward
from .recording import RecordedGlu, Recorder
from .structure import ATTENTION, UnsupportedModuleError, attentions, gated_activation, gated_mlps

logger = logging.getLogger(__name__)
SCOPES = ("mlp", "all")


class _PatchState:
    """What the patched forward of one MLP needs; kept on the module, so that a deep copy of the model works too."""

    def __init__(self, activation: str, backend: str):
        self.activation, self.backend = activation, backend
        self.recorder: Recorder | None = None  # set by `attribute` for the length of one pass
        self.name = ""


def _gated_mlp_forward(self: nn.Module, x: Tensor) -> Tensor:
    # The projections are called as modules: their hooks, adapters and autocast rules stay in force.
    state = self._ssiuu
    gate, up = self.gate_proj(x), self.up_proj(x)
    if state.recorder is None:
        h = glu_forward(gate, up, activation=state.activation, backend=state.backend)
    else:
        h = RecordedGlu.apply(gate, up, state.activation, state.recorder, state.name)
    return self.down_proj(h)


def patch(model: nn.Module, *, scope: str = "mlp", backend: str = "auto", strict: bool = False) -> PatchHandle:
    """Run the gated MLPs of this model instance on the kernels. Outputs, hooks and state_dict keys stay the same.

    Modules are recognised by their parts and by what they compute: `down_proj(act_fn(gate_proj(x)) * up_proj(x))`,
    as in Llama, Mistral, Qwen2 and Qwen3.

    Args:
        model: a Hugging Face causal language model.
        scope: "mlp" attributes `h` and `gate`, and gives a `target_grad` to the patched MLPs' parameters; "all" adds
            the outputs of Q, K, V, O and down, and gives it to every trainable parameter.
        backend: backend of the ops.
        strict: raise where a module has to be skipped.

    Returns:
        A handle, also a context manager that unpatches on exit.

    Raises:
        ValueError: unknown scope or backend, a model already patched or without gated MLPs, or (strict) a skipped one.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is unknown; expected one of {', '.join(SCOPES)}")
    backends.check_backend(backend)
    if any(hasattr(module, "_ssiuu") for module in model.modules()):
        raise ValueError("model is already patched; call unpatch() on the handle of the first patch")
    found: dict[str, tuple[nn.Module, str]] = {}
    skipped: dict[str, str] = {}
    for name, module in gated_mlps(model):
        try:
            found[name] = module, gated_activation(module)
        except UnsupportedModuleError as reason:
            skipped[name] = str(reason)
    if not found or (strict and skipped):
        raise ValueError(_refusal(model, skipped))
    for module, activation in found.values():
        module._ssiuu = _PatchState(activation, backend)
        module.forward = MethodType(_gated_mlp_forward, module)
    if skipped:
        logger.warning("patched %d gated MLPs and skipped %d: see handle.skipped", len(found), len(skipped))
    return PatchHandle(model, {name: module for name, (module, _) in found.items()}, skipped, scope, backend)


def _refusal(model: nn.Module, skipped: dict[str, str]) -> str:
    kind = type(model).__name__
    if not skipped:
        return f"{kind} has no gated MLP (gate_proj, up_proj, down_proj); expected a Llama, Qwen or Mistral kind"
    name, reason = next(iter(skipped.items()))
    return f"{kind}: {len(skipped)} gated MLPs cannot be patched, first {name}: {reason}"


class PatchHandle:
    """A patched model.

    Attributes:
        patched: names of the patched modules.
        skipped: module name -> why it was left as it is.
        scope: "mlp" or "all".
    """

    def __init__(self, model: nn.Module, mlps: dict[str, nn.Module], skipped: dict[str, str], scope: str, backend: str):
        self._model, self._mlps, self._backend = model, mlps, backend
        self.patched, self.skipped, self.scope = list(mlps), skipped, scope

    def unpatch(self) -> None:
        """Give the modules their own forward back. A second call does nothing."""
        for module in self._mlps.values():
            del module.forward, module._ssiuu
        self._mlps, self.patched = {}, []

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *_) -> None:
        self.unpatch()

    def attribute(self, batch: Mapping[str, Tensor], target: str = "prob") -> dict[str, dict[str, NeuronScores]]:
        """Attribution `A = z * d target / dz` (Eq. 1) of every neuron, reduced over each sample's tokens.

        One forward and one backward of data gradients; `param.grad` is left alone. Prompt and answer tokens count,
        padding does not. The model runs in the mode (train or eval) that it is in.

        Args:
            batch: input_ids int64 `[B, S]`, labels int64 `[B, S]` (-100 on the prompt), and optionally attention_mask
                `[B, S]` with padding on either side.
            target: "prob" (the paper), "geometric_mean_prob" (`P^(1/T)`) or "log_prob".

        Returns:
            module name -> kind -> `NeuronScores` float32 `[B, width]`. An MLP has "h" and "gate" (`up` needs none:
            `up * dup = h * dh`), and in scope "all" "down"; an attention has "q", "k", "v" and "o".

        Raises:
            ValueError: unknown target, labels without an answer token, a mask with holes, an unpatched handle.
        """
        self._check_patched()
        return attribution.attribute(self._model, self._mlps, self._outputs(), batch, target, self._backend)

    def unlearning_loss(
        self,
        logits: Tensor,
        labels: Tensor,
        forget: Tensor,
        objective: str | Objective = "gd",
        target: str | None = "prob",
    ) -> Tensor:
        """The loss of a backbone objective. Its backward fills `param.grad` with `dL`, and `param.target_grad` with
        `sum_b d target_b` over the forget samples; both accumulate. Multiplying the loss scales `dL` alone.

        The two gradients come from two backwards through the graph of one forward.

        Args:
            logits: `[B, S, V]` of the model.
            labels: int64 `[B, S]`, -100 is ignored.
            forget: bool `[B]`, true for forget samples.
            objective: "ga", "gd", or a callable (log_probs `[B]`, answer lengths `[B]`, forget `[B]`) -> scalar.
            target: as in `attribute`; None computes no `target_grad`, for a backbone without a penalty.

        Returns:
            Scalar loss. Run with gradient checkpointing in its non-reentrant form.

        Raises:
            ValueError: unknown objective or target, a mask that is empty or of another length, labels without an
                answer token, an unpatched handle.
        """
        self._check_patched()
        return loss.unlearning_loss(logits, labels, forget, self._target_params(), objective, target)

    def _check_patched(self) -> None:
        if not self._mlps:
            raise ValueError("the handle was unpatched; call ssiuu_kernels.patch(model) again")

    def _outputs(self) -> dict[tuple[str, str], nn.Module]:
        if self.scope == "mlp":
            return {}
        outputs = {(name, "down"): mlp.down_proj for name, mlp in self._mlps.items()}
        for name, module in attentions(self._model):
            outputs |= {(name, kind): getattr(module, part) for kind, part in ATTENTION.items()}
        return outputs

    def _target_params(self) -> list[nn.Parameter]:
        modules = [self._model] if self.scope == "all" else self._mlps.values()
        return [param for module in modules for param in module.parameters() if param.requires_grad]
