"""The data and the batches of an unlearning run, without the run."""

import torch

from ssiuu.methods.base import Batch, UnlearnData


def data_of(prompts, forget, retain, seed=0):
    """`UnlearnData` of these facts."""
    samples = (prompts.encode_facts(facts) for facts in (forget, retain))
    return UnlearnData(forget, retain, *samples, prompts=prompts, seed=seed)


def batch_of(data, forget, retain):
    """The micro-batch of forget and retain samples of these places, alone in its step."""
    samples = [data.forget_samples[i] for i in forget] + [data.retain_samples[i] for i in retain]
    chosen = torch.arange(len(samples)) < len(forget)
    tokens = [float(sum(len(s.answer) for s in part)) for part in (samples[: len(forget)], samples[len(forget) :])]
    return Batch(**data.prompts.collate(samples), forget=chosen, companion=torch.zeros_like(chosen),
                 ids=torch.tensor([*forget, *retain]), forget_tokens=tokens[0], retain_tokens=tokens[1])  # fmt: skip
