"""Put the kernels under one instance of a Hugging Face model, and take them away again."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..attribution.attribute import Attribution
from ..gradients.one_backward.installed import RowForwards
from ..loss import unlearning as loss
from ..loss.neuron_level import NeuronLevel
from ..loss.objectives import Objective
from ..loss.unlearning import ENGINES, ONE_BACKWARD, GradientPath, Tensors
from ..modules.patched_mlp import PatchedMlp
from ..modules.recognise import find_mlps, is_encoder_decoder
from ..ops import NeuronScores, backends
from ..patched_forward import is_patched

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
            where the model cannot take it (`PatchHandle.path` says why), "two-backward", or "checked": one backward,
            held against two more on every batch.
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


class PatchHandle:
    """A patched model.

    Attributes:
        patched: names of the patched modules.
        skipped: module name -> why it was left as it is.
        scope: "mlp" or "all".
        engine: the one that was asked for; `path` says which one a loss took.
        neurons: banks and last value of the penalty on neurons; None at level "parameter".
        path: `GradientPath(engine, reason)` of the last `unlearning_loss`; None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        mlps: dict[str, PatchedMlp],
        skipped: dict[str, str],
        scope: str,
        backend: str,
        neurons: NeuronLevel | None,
        engine: str,
        rows: RowForwards | None,
    ):
        self._model, self._mlps, self._rows, self._is_patched = model, mlps, rows, True
        self._attribution = Attribution(model, mlps, scope == "all", backend)
        self.path: GradientPath | None = None
        self.patched, self.skipped, self.scope, self.engine, self.neurons = list(mlps), skipped, scope, engine, neurons

    def unpatch(self) -> None:
        """Give the modules their own forward back, and drop the target gradients. A second call does nothing."""
        if not self._is_patched:
            return
        for mlp in self._mlps.values():
            mlp.remove()
        if self._rows is not None:
            self._rows.remove()
        for param in self._model.parameters():
            for name in ("target_grad", "target_grad_info"):
                vars(param).pop(name, None)
        self._mlps, self._rows, self._is_patched, self.patched = {}, None, False, []

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *_) -> None:
        self.unpatch()

    def attribute(self, batch: Mapping[str, Tensor], target: str = "prob") -> dict[str, dict[str, NeuronScores]]:
        """Attribution `A = z * d target / dz` (Eq. 1) of every neuron, reduced over each sample's tokens.

        One forward and one backward of data gradients; `param.grad` is left alone. Prompt and answer tokens count,
        padding does not. The model runs in the mode (train or eval) that it is in, uncompiled. Where a model does what
        cannot be followed (its own autograd functions, say), every batch of more than one sample takes a second
        backward: it proves that each row of each module belongs to one sample.

        Args:
            batch: input_ids int64 `[B, S]` (or inputs_embeds `[B, S, D]`), labels int64 `[B, S]` (-100 on the prompt),
                and optionally attention_mask `[B, S]`, 1 for a token, with padding on either side. Every key but
                labels goes to the model.
            target: "prob" (the paper), "geometric_mean_prob" (`P^(1/T)`) or "log_prob".

        Returns:
            module name -> kind -> `NeuronScores` float32 `[B, width]`. A gated MLP has "h" and "gate" (`up` needs
            none: `up * dup = h * dh`), an ungated one "h" and "up", and in scope "all" either has "down"; an attention
            has "q", "k", "v" and "o", or "qkv" and "o" where the three are one projection. A module that saw no token
            of the batch, as those of a vision tower, is left out.

        Raises:
            ValueError: unknown target; labels without an answer token; a mask of another shape or other values, or with
                holes; a key that the model does not take; a model that mixes samples, or whose modules run on other
                rows than `[B, S]`; a module that got no gradient back; an unpatched handle.
        """
        self._check_patched()
        return self._attribution(batch, target)

    def unlearning_loss(
        self,
        logits: Tensors,
        labels: Tensors,
        forget: Tensor,
        objective: str | Objective = "gd",
        target: str | None = "prob",
        sample_ids: Tensor | None = None,
        segments: Tensors | None = None,
        reference_log_probs: Tensor | None = None,
    ) -> Tensor:
        """The loss of a backbone objective. Its backward fills `param.grad` with `dL`, and `param.target_grad` with
        `sum_b d target_b` over the forget samples; both accumulate. Multiplying the loss scales `dL` alone.

        Both gradients come from one backward through the model, which carries the unit gradients `ds_b`: hooks on
        gradients inside the model see those. A graph that cannot be taken so gets two backwards, with the same result;
        `path` says which it was, and why. At level "neuron" there is no `target_grad`: the backward adds the
        penalty's gradient (Eq. 3) to `param.grad`.

        Args:
            logits: `[B, S, V]` of the model; or a sequence of such, one a forward (a forget batch and a retain batch of
                other lengths, say), whose samples then follow one another in `forget`.
            labels: int64 `[B, S]`, -100 is ignored; or a sequence.
            forget: bool `[B]`, true for forget samples.
            objective: "ga", "gd", "npo", "dpo" (see `objectives.py`), or a callable (log_probs `[B]`, answer lengths
                `[B]`, forget `[B]`) -> scalar.
            target: as in `attribute`; None computes no `target_grad`, for a backbone without a penalty.
            sample_ids: int64 `[B]`, for level "neuron": place of each sample in the forget set, each at most once in
                a batch; what stands at retain samples is not read.
            segments: int32 `[N, 2]`, for samples packed into rows: start and end of each in the flattened `[B * S]`;
                `forget` is then `[N]`. Or a sequence.
            reference_log_probs: `[B]`, for "npo" and "dpo": the same samples' log-likelihoods before unlearning.

        Returns:
            Scalar loss. Run with gradient checkpointing in its non-reentrant form.

        Raises:
            TypeError: logits, labels or forget that are not tensors of their types.
            ValueError: unknown objective or target, an objective that depends on more than the log-likelihoods, a mask
                of another length, labels without an answer token or with one that the logits do not have, logits of
                another model, an unpatched handle, sample_ids missing or out of place, reentrant checkpointing, more
                than one process. At level "neuron" also: an MLP that ran twice in the forward, on other rows than
                `[B, S]`, or on rows that are not of one sample each (proved by two backwards where the rows cannot be
                followed). From `backward`: a loss that was multiplied while weights are updated in backward.
            RuntimeError: a part that was compiled and run before the model was patched. From `backward`: a second
                backward, parameters edited since the forward, or (engine "checked") gradients that differ. Nothing is
                changed then.
        """
        self._check_patched()
        if self.neurons is not None:
            if segments is not None or not isinstance(logits, Tensor):
                raise ValueError("level 'neuron' takes one batch of one sample a row; leave out segments and sequences")
            return loss.neuron_level_loss(
                logits, labels, forget, self.neurons, sample_ids, objective, target, reference_log_probs
            )
        value, self.path = loss.unlearning_loss(
            logits, labels, forget,
            params=self._target_params(), objective=objective, target=target, segments=segments,
            reference_log_probs=reference_log_probs, engine=self.engine,
            model_params=dict(self._model.named_parameters()),
        )  # fmt: skip
        return value

    def _check_patched(self) -> None:
        if not self._is_patched:
            raise ValueError("the handle was unpatched; call ssiuu_kernels.patch(model) again")

    def _target_params(self) -> list[nn.Parameter]:
        mlps = (parameter for patched in self._mlps.values() for parameter in patched.mlp.parameters)
        params = self._model.parameters() if self.scope == "all" else mlps
        return [param for param in params if param.requires_grad]
