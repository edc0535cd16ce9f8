"""grad x activation of every neuron from one forward and one backward (Eq. 1)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from ..gradients.one_backward.graph import rows_in_order
from ..modules.mlp import ObservedHidden
from ..modules.patched_mlp import PatchedMlp
from ..modules.recognise import attention_outputs
from ..ops import NeuronScores
from .collector import RecordedOutput, Recorder, recorded_output
from .row_proof import RowProof
from .targets import check_answers, check_attribution_target, target_values


class Attribution:
    """Attribution of one patched model; see `PatchHandle.attribute`.

    Args:
        mlps: the patched MLPs by name; they record "h", and "gate" or "up".
        outputs: whether the projections' outputs are recorded too.
        backend: of the ops.
    """

    def __init__(self, model: nn.Module, mlps: Mapping[str, PatchedMlp], outputs: bool, backend: str):
        self._model, self._mlps, self._with_outputs, self._backend = model, mlps, outputs, backend

    def __call__(self, batch: Mapping[str, Tensor], target: str) -> dict[str, dict[str, NeuronScores]]:
        check_attribution_target(target)
        outputs = list(self._outputs())
        if not self._mlps and not outputs:
            raise ValueError("nothing to attribute: the handle has no patched MLP, and scope='all' found no attention")
        labels, other_labels, mask, inputs = self._split(batch)
        check_answers(labels, other_labels, target)
        recorder = Recorder(mask_segments(mask), tuple(labels.shape), self._backend)
        with ExitStack() as stack, torch.enable_grad():
            stack.enter_context(_uncompiled())
            stack.enter_context(_data_gradients_only(self._model, inputs))
            for mlp in self._mlps.values():
                stack.enter_context(_recording(mlp, recorder))
            for name, kind, module in outputs:
                handle = module.register_forward_hook(
                    lambda _module, _args, z, name=name, kind=kind: recorded_output(z, recorder, name, kind)
                )
                stack.callback(handle.remove)
            logits = _logits(self._model(**inputs))
            values, factor = target_values(logits, labels, other_labels, target)
            if not values.requires_grad:
                recorder.check_complete()
            self._backward(logits, values, recorder)
        # The factor is positive: it passes through max and min, and coming last it lets nothing underflow before.
        factor = factor[:, None]
        # In the model's order: the backward found the last module first.
        return {
            name: {
                kind: NeuronScores(*(part * factor for part in scores)) for kind, scores in recorder.found[name].items()
            }
            for name, _ in self._model.named_modules()
            if name in recorder.found
        }

    def _outputs(self) -> Iterator[tuple[str, str, nn.Module]]:
        """(module name, kind, projection) of the outputs to record; asked for anew, for a model may be changed."""
        if self._with_outputs:
            yield from ((name, "down", patched.mlp.down) for name, patched in self._mlps.items())
            yield from attention_outputs(self._model)

    @staticmethod
    def _backward(logits: Tensor, values: Tensor, recorder: Recorder) -> None:
        """One backward of the sum gives the gradient of every sample's own value, if the samples do not mix."""
        if len(values) > 1 and not rows_in_order(logits, ObservedHidden, RecordedOutput):
            recorder.proof = RowProof(len(values), values)
            recorder.proving = True
            values.backward(recorder.proof.weights, retain_graph=True)
            recorder.proving = False
        values.sum().backward()
        recorder.check_complete()
        if recorder.proof is not None:
            recorder.proof.check()

    def _split(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor, dict[str, Tensor]]:
        """Labels, other labels, mask, and what the model is called with: all of the batch but both labels."""
        if "labels" not in batch or not ("input_ids" in batch or "inputs_embeds" in batch):
            raise ValueError(
                f"batch has {', '.join(map(str, batch)) or 'nothing'}; expected input_ids (or inputs_embeds) and labels"
            )
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "other_labels")}
        labels, mask = batch["labels"], inputs.get("attention_mask")
        named, takes_any = _arguments(self._model)
        mask = torch.ones_like(labels) if mask is None else _checked_mask(mask, labels)
        for key in [key for key in inputs if key not in named and not takes_any]:
            if key != "attention_mask" or not bool(mask.all()):  # a mask of ones says nothing
                raise ValueError(f"batch has {key}, which {type(self._model).__name__}.forward does not take")
            del inputs[key]
        if "use_cache" in named or (takes_any and hasattr(getattr(self._model, "config", None), "use_cache")):
            inputs.setdefault("use_cache", False)
        return labels, batch.get("other_labels"), mask, inputs


def _arguments(model: nn.Module) -> tuple[set[str], bool]:
    """Names of the forward's arguments, and whether it takes any other."""
    parameters = inspect.signature(model.forward).parameters
    return set(parameters), any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _logits(output: object) -> Tensor:
    """Of a model's output, a tuple or the logits themselves."""
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(logits, Tensor):
        raise TypeError(f"the model gave a {type(output).__name__}; expected logits, or an output that has them")
    return logits


def _checked_mask(mask: Tensor, labels: Tensor) -> Tensor:
    if mask.shape != labels.shape:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}; expected that of labels, {list(labels.shape)}: 1 for a "
            "token, 0 for padding"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask has other values than 0 and 1; expected 1 for a token and 0 for padding")
    return mask


def mask_segments(attention_mask: Tensor) -> Tensor:
    """The rows of each sample, int32 `[B, 2]`, in the flattened `[B * S]` of an attention mask `[B, S]`.

    Raises:
        ValueError: a mask with holes: padding stands on one side of the tokens, or on both.
    """
    present = attention_mask != 0
    samples, width = present.shape
    count = present.sum(1)
    first = present.int().argmax(1)
    position = torch.arange(width, device=present.device)
    expected = (position >= first[:, None]) & (position < (first + count)[:, None])
    if not torch.equal(expected, present):
        index = int((expected != present).any(1).nonzero()[0])
        raise ValueError(f"attention_mask of sample {index} has holes; expected its tokens to stand together")
    start = torch.arange(samples, device=present.device) * width + first
    return torch.stack([start, start + count], dim=1).int()


@contextmanager
def _recording(mlp: PatchedMlp, recorder: Recorder) -> Iterator[None]:
    before, mlp.observer = mlp.observer, recorder
    try:
        yield
    finally:
        mlp.observer = before


@contextmanager
def _data_gradients_only(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[None]:
    """No parameter asks for a gradient inside: the graph starts at the embeddings, and the backward is half as long."""
    if inputs.get("inputs_embeds") is not None:
        inputs["inputs_embeds"] = _start(inputs["inputs_embeds"])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        for embeddings in _embeddings(model):
            handle = embeddings.register_forward_hook(lambda _module, _args, x: _start(x))
            stack.callback(handle.remove)
        for parameter in trainable:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        yield


def _start(x: Tensor) -> Tensor:
    """A copy of `x` at which a graph starts; no leaf, for a model may write to its embeddings in place."""
    return x.detach().requires_grad_().clone()


def _embeddings(model: nn.Module) -> list[nn.Module]:
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embeddings = None
    if embeddings is not None:
        return [embeddings]
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


def _uncompiled() -> AbstractContextManager:
    """Compiled modules run eagerly inside: what they compiled knows nothing of the hooks that are put on here."""
    dynamo_in_use = "torch._dynamo" in sys.modules  # importing it takes seconds
    if dynamo_in_use and hasattr(torch.compiler, "set_stance"):  # torch 2.6
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
