"""grad x activation of every neuron from one forward and one backward (Eq. 1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .log_probs import answer_lengths, check_target, sequence_log_probs, target_factor
from .ops import NeuronScores
from .recording import RecordedOutput, Recorder
from .structure import Mlp


def attribute(
    model: nn.Module,
    mlps: Mapping[str, Mlp],
    outputs: Mapping[tuple[str, str], nn.Module],
    batch: Mapping[str, Tensor],
    target: str,
    backend: str,
) -> dict[str, dict[str, NeuronScores]]:
    """Per-sample attribution statistics; see `PatchHandle.attribute`.

    Args:
        mlps: the patched MLPs by name; they record "h", and "gate" or "up".
        outputs: (module name, kind) -> the projection whose output is recorded.
    """
    check_target(target)
    input_ids, labels = batch["input_ids"], batch["labels"]
    lengths = answer_lengths(labels)
    mask = batch.get("attention_mask")
    recorder = Recorder(mask_segments(torch.ones_like(input_ids) if mask is None else mask), backend)
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(_data_gradients_only(model))
        for mlp in mlps.values():
            stack.enter_context(_recording(mlp, recorder))
        for (name, kind), module in outputs.items():
            handle = module.register_forward_hook(
                lambda _module, _args, z, name=name, kind=kind: RecordedOutput.apply(z, recorder, name, kind)
            )
            stack.callback(handle.remove)
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        log_probs = sequence_log_probs(logits, labels)
        # The samples do not mix, so one backward of the sum gives every sample's own unit gradient.
        log_probs.sum().backward()
    # The factor is positive: it passes through max and min, and coming last it lets nothing underflow before.
    factor = target_factor(log_probs, lengths, target)[:, None]
    # In the model's order: the backward found the last module first.
    return {
        name: {kind: NeuronScores(*(part * factor for part in scores)) for kind, scores in recorder.found[name].items()}
        for name, _ in model.named_modules()
        if name in recorder.found
    }


def mask_segments(attention_mask: Tensor) -> Tensor:
    """The rows of each sample, int32 `[B, 2]`, in the flattened `[B * S]` of an attention mask `[B, S]`.

    Raises:
        ValueError: a mask of another shape, or with holes: padding stands on one side of the tokens, or on both.
    """
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask has shape {list(attention_mask.shape)}; expected [B, S]")
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
def _recording(mlp: Mlp, recorder: Recorder) -> Iterator[None]:
    state = mlp.patched._ssiuu
    before, state.observer = state.observer, recorder
    try:
        yield
    finally:
        state.observer = before


@contextmanager
def _data_gradients_only(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient inside: the graph starts at the embeddings, and the backward is half as long."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handle = model.get_input_embeddings().register_forward_hook(lambda _module, _args, x: x.detach().requires_grad_())
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
