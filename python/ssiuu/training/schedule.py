"""Which samples every micro-batch of a run sees, fixed beforehand."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from typing import NamedTuple

from torch.utils.data import Dataset

from ..data.prompts import Encoded


class Part(NamedTuple):
    """One set of samples of a schedule.

    Attributes:
        samples: the set.
        number: how many are drawn into each micro-batch.
        forget: whether they are to be forgotten.
        companions: a sample for each of the set, which goes wherever that one goes (DPO's preferred answers); None
            where there are none.
    """

    samples: Sequence[Encoded]
    number: int
    forget: bool
    companions: Sequence[Encoded] | None = None


class MicroBatch(NamedTuple):
    """What one forward sees; every list has one entry per sample.

    Attributes:
        samples: of each part of the schedule in turn, a part's companions behind it.
        forget: whether it is to be forgotten.
        companion: whether it is a companion.
        ids: its place in its set; of a companion, the place of the sample it belongs to.
    """

    samples: list[Encoded]
    forget: list[bool]
    companion: list[bool]
    ids: list[int]


class Schedule(Dataset):
    """All micro-batches of a run, fixed beforehand by a seed, so that a resumed run sees what it would have seen.

    Each part is gone through in a new random order every time round; a part as large as its number is taken whole.

    Args:
        parts: the sets, in the order of a micro-batch.
        count: number of micro-batches.
        seed: of the orders.
    """

    def __init__(self, parts: Sequence[Part], count: int, seed: int):
        self.parts, self.count = parts, count
        self.orders = [_order(len(part.samples), part.number * count, seed + i) for i, part in enumerate(parts)]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> MicroBatch:
        batch = MicroBatch([], [], [], [])
        for part, order in zip(self.parts, self.orders, strict=True):
            ids = order[index * part.number : (index + 1) * part.number]
            for samples, companion in ((part.samples, False), (part.companions, True)):
                if samples is not None:
                    batch.samples.extend(samples[i] for i in ids)
                    batch.forget.extend([part.forget and not companion] * len(ids))
                    batch.companion.extend([companion] * len(ids))
                    batch.ids.extend(ids)
        return batch

    def samples(self, batches: range, forget: bool | None = None, stopped: Collection[int] = ()) -> list[Encoded]:
        """The samples of these micro-batches, companions left out.

        Args:
            forget: the forget samples, the others, or (None) all.
            stopped: ids of forget samples that do not count.
        """
        return [
            sample
            for batch in map(self.__getitem__, batches)
            for sample, forgotten, companion, place in zip(*batch, strict=True)
            if (forget is None or forgotten == forget) and not companion and not (forgotten and place in stopped)
        ]

    def tokens(self, batches: range, forget: bool | None = None, stopped: Collection[int] = ()) -> int:
        """Answer tokens of `samples`."""
        return sum(len(sample.answer) for sample in self.samples(batches, forget, stopped))


def _order(size: int, length: int, seed: int) -> list[int]:
    generator, order = random.Random(seed), []
    while len(order) < length:
        order += generator.sample(range(size), size)
    return order[:length]
