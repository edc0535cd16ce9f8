"""The handle of a patched model: its attribution, its unlearning losses, and the way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from ..attribution.attribute import Attribution
from ..gradients.one_backward.installed import RowForwards
from ..gradients.path import GradientPath
from ..loss.batches import Tensors
from ..loss.neuron_level import NeuronLevel
from ..loss.objectives import Objective
from ..loss.target_term import target_term
from ..loss.unlearning import neuron_level_loss, unlearning_loss
from ..modules.patched_mlp import PatchedMlp
from ..modules.recognise import Mlp
from ..ops import NeuronScores
from ..patched_forward import suspend_forwards


class PatchHandle:
    """A patched model.

    Attributes:
        patched: names of the patched modules.
        skipped: module name -> why it was left as it is.
        scope: "mlp" or "all".
        engine: the one that was asked for; `gradient_path` says which one a loss took.
        neurons: banks and last value of the penalty on neurons; None at level "parameter".
        gradient_path: `GradientPath(engine, reason)` of the last `unlearning_loss`; None before the first.
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
        self._model, self._mlps, self._rows, self._is_patched, self._is_suspended = model, mlps, rows, True, False
        self._attribution = Attribution(model, mlps, scope == "all", backend)
        self.gradient_path: GradientPath | None = None
        self.patched, self.skipped, self.scope, self.engine, self.neurons = list(mlps), skipped, scope, engine, neurons

    @property
    def path(self) -> GradientPath | None:
        """The old name of `gradient_path`."""
        return self.gradient_path

    @property
    def mlps(self) -> dict[str, Mlp]:
        """What the patched MLPs are made of, by name."""
        return {name: patched.mlp for name, patched in self._mlps.items()}

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

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Run the model's own forwards inside, on plain autograd, as if it were not patched.

        For graphs that the kernels do not make: theirs have no second derivatives. Graphs that were made before, and
        those made inside, stay valid afterwards; but a checkpointed forward has to go backward where it was run.

        Raises:
            ValueError: an unpatched or a suspended handle; also from every other method of a suspended one but
                `unpatch`.
        """
        self._check_patched()
        modules = [patched.mlp.patched for patched in self._mlps.values()]
        modules += [] if self._rows is None else self._rows.modules
        self._is_suspended = True
        try:
            with suspend_forwards(modules):
                yield
        finally:
            self._is_suspended = False

    def attribute(self, batch: Mapping[str, Tensor], target: str = "prob") -> dict[str, dict[str, NeuronScores]]:
        """Attribution `A = z * d target / dz` (Eq. 1) of every neuron, reduced over each sample's tokens.

        One forward and one backward of data gradients; `param.grad` is left alone. Prompt and answer tokens count,
        padding does not. The model runs in the mode (train or eval) that it is in, uncompiled. Where a model does what
        cannot be followed (its own autograd functions, say), every batch of more than one sample takes a second
        backward: it proves that each row of each module belongs to one sample.

        Args:
            batch: input_ids int64 `[B, S]` (or inputs_embeds `[B, S, D]`), labels int64 `[B, S]` (-100 on the prompt),
                and optionally attention_mask `[B, S]`, 1 for a token, with padding on either side. Target "margin"
                needs other_labels int64 `[B, S]`: the tokens of a wrong answer in place of the answer's. Every key
                but the two labels goes to the model.
            target: "prob" (the paper), "geometric_mean_prob" (`P^(1/T)`), "log_prob", "logit" (the sum of the answer
                tokens' logits) or "margin" (the answer's logit less the wrong answer's, at the first token where the
                two differ). `prob` vanishes with P, and `log_prob` grows as the model becomes sure of something else;
                `logit` and `margin` do neither.

        Returns:
            module name -> kind -> `NeuronScores` float32 `[B, width]`. A gated MLP has "h" and "gate" (`up` needs
            none: `up * dup = h * dh`), an ungated one "h" and "up", and in scope "all" either has "down"; an attention
            has "q", "k", "v" and "o", or "qkv" and "o" where the three are one projection. A module that saw no token
            of the batch, as those of a vision tower, is left out.

        Raises:
            ValueError: unknown target; labels without an answer token; other_labels that are missing, or part from
                labels nowhere; a mask of another shape or other values, or with holes; a key that the model does not
                take; a model that mixes samples, or whose modules run on other rows than `[B, S]`; a module that got
                no gradient back; an unpatched handle.
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
        `gradient_path` says which it was, and why. At level "neuron" there is no `target_grad`: the backward adds the
        penalty's gradient (Eq. 3) to `param.grad`.

        Args:
            logits: `[B, S, V]` of the model; or a sequence of such, one a forward (a forget batch and a retain batch of
                other lengths, say), whose samples then follow one another in `forget`.
            labels: int64 `[B, S]`, -100 is ignored; or a sequence.
            forget: bool `[B]`, true for forget samples.
            objective: "ga", "gd", "npo", "simnpo", "dpo" (see `objectives.py`), or a callable (log_probs `[B]`, answer
                lengths `[B]`, forget `[B]`) -> scalar.
            target: "prob", "geometric_mean_prob" or "log_prob"; None computes no `target_grad`, for a backbone without
                a penalty.
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
            return neuron_level_loss(
                logits, labels, forget, self.neurons, sample_ids, objective, target, reference_log_probs
            )
        value, self.gradient_path = unlearning_loss(
            logits, labels, forget,
            params=self._target_params(), objective=objective, target=target, segments=segments,
            reference_log_probs=reference_log_probs, engine=self.engine,
            model_params=dict(self._model.named_parameters()),
        )  # fmt: skip
        return value

    def target_term(
        self, logits: Tensors, labels: Tensors, forget: Tensor, target: str = "prob", segments: Tensors | None = None
    ) -> Tensor:
        """A term of value 0 that puts the penalty's gradient on any loss: `loss = mine + handle.target_term(...)`.

        Its backward adds `sum_b d target_b` over the forget samples to `param.target_grad`, and nothing to
        `param.grad`. Multiplying the loss scales `dL` alone. The loss may be anything, made before or after the term;
        it costs a second backward, over what is under the logits. A loss of this handle needs no term:
        `unlearning_loss` makes both gradients in one backward.

        Args:
            logits, labels, forget, target, segments: as in `unlearning_loss`.

        Returns:
            0-dim tensor on the logits' device; add it to the loss once.

        Raises:
            TypeError, ValueError: as `unlearning_loss`; level "neuron"; a forward that ran in another thread; weights
                that are updated in backward on several devices.
            RuntimeError: from `backward`: a second one, or parts that were compiled before the model was patched.
        """
        self._check_patched()
        if self.neurons is not None:
            raise ValueError(
                "level='neuron' has no target gradient, so no term can fill it; patch with level='parameter', or use "
                "unlearning_loss"
            )
        params, model_params = self._target_params(), dict(self._model.named_parameters())
        term, self.gradient_path = target_term(
            logits, labels, forget, params=params, target=target, segments=segments, model_params=model_params
        )
        return term

    def _check_patched(self) -> None:
        if not self._is_patched:
            raise ValueError("the handle was unpatched; call ssiuu_kernels.patch(model) again")
        if self._is_suspended:
            raise ValueError("the handle is suspended; leave `with handle.suspended()` first")

    def _target_params(self) -> list[nn.Parameter]:
        mlps = (parameter for patched in self._mlps.values() for parameter in patched.mlp.parameters)
        params = self._model.parameters() if self.scope == "all" else mlps
        return [param for param in params if param.requires_grad]
