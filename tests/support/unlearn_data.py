"""The data and the batches of an unlearning run, without the run."""

import torch

from ssiuu.methods.base import Batch, UnlearnData


def data_of(prompts, forget, retain, seed=0):
    """`UnlearnData` of these facts."""
    samples = (prompts.encode_facts(facts) for facts in (forget, retain))
    return UnlearnData(forget, retain, *samples, prompts=prompts, seed=seed)


def batch_of(data, forget, retain, companions=None, stopped=()):
    """The micro-batch of forget and retain samples of these places, alone in its step.

    Args:
        companions: of all forget samples; those of these places are in the batch then, but for those that stopped.
        stopped: places of forget samples that left the loss.
    """
    kept = [i for i in forget if i not in stopped]
    parts = [(data.forget_samples, forget), (companions, kept if companions else []), (data.retain_samples, retain)]
    samples = [samples[i] for samples, ids in parts for i in ids]
    kind = torch.tensor([kind for kind, (_, ids) in enumerate(parts) for _ in ids])
    ids = torch.tensor([i for _, ids in parts for i in ids])
    tokens = [float(sum(len(samples[i].answer) for i in ids))
              for samples, ids in ((data.forget_samples, kept), parts[2])]  # fmt: skip
    return Batch(
        **data.prompts.collate(samples), forget=kind == 0, companion=kind == 1, ids=ids,
        stopped=(kind == 0) & torch.isin(ids, torch.tensor(stopped, dtype=torch.int64)),
        forget_tokens=tokens[0], retain_tokens=tokens[1], forget_samples=float(len(kept)),
    )  # fmt: skip
