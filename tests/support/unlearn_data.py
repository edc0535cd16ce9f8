"""The data and the batches of an unlearning run, without the run."""

import torch

from ssiuu.methods.base import Batch, UnlearnData


def data_of(prompts, forget, retain, seed=0):
    """`UnlearnData` of these facts."""
    samples = (prompts.encode_facts(facts) for facts in (forget, retain))
    return UnlearnData(forget, retain, *samples, prompts=prompts, seed=seed)


def batch_of(data, forget, retain, companions=None):
    """The micro-batch of forget and retain samples of these places, alone in its step.

    Args:
        companions: of all forget samples; those of these places are in the batch then.
    """
    parts = [(data.forget_samples, forget), (companions, forget if companions else []), (data.retain_samples, retain)]
    samples = [samples[i] for samples, ids in parts for i in ids]
    kind = torch.tensor([kind for kind, (_, ids) in enumerate(parts) for _ in ids])
    ids = torch.tensor([i for _, ids in parts for i in ids])
    tokens = [float(sum(len(samples[i].answer) for i in ids)) for samples, ids in (parts[0], parts[2])]
    return Batch(**data.prompts.collate(samples), forget=kind == 0, companion=kind == 1, ids=ids,
                 forget_tokens=tokens[0], retain_tokens=tokens[1])  # fmt: skip
