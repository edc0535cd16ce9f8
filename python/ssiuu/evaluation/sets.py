"""Scores of the forget, retain and test sets, under the names that metrics and reports use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedModel

from ..data.facts import Fact, Split, all_have_options
from ..progress import job
from .generation import generation_accuracy
from .likelihood import FactScores
from .protocol import Protocol

# Names of the mean score, elsewhere "same_object_score"; other means are all named so, as in "forget_probability".
SCORE_NAMES = {"forget": "fs", "retain": "rs", "unseen": "unseen_fs"}


def named_means(scores: FactScores, which: str) -> dict[str, float]:
    """Means of the scores of a set (forget, retain, unseen, or an extra one) under the names of metrics and reports."""
    score = SCORE_NAMES.get(which, f"{which}_score")
    return {score if name == "score" else f"{which}_{name}": value for name, value in scores.means().items()}


def evaluate_sets(
    model: PreTrainedModel,
    protocol: Protocol,
    forget: Sequence[Fact],
    retain: Sequence[Fact],
    progress: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """FS, RS, mean answer probability and margin of both sets; see `named_means`. An empty set is left out.

    Args:
        progress: called with the number of facts done since the last call.
    """
    found = {}
    for which, facts in (("forget", forget), ("retain", retain)):
        if facts:
            found |= named_means(protocol.score(model, facts, progress=progress), which)
    return found


def evaluate_extra(
    model: PreTrainedModel, protocol: Protocol, extra: Mapping[str, Sequence[Fact]], *, name: str
) -> dict[str, float]:
    """The scores of further sets by their names, such as "same_object_score"; see `named_means`.

    Args:
        name: of the bar.
    """
    if not extra:
        return {}
    found = {}
    with job(name, sum(map(len, extra.values()))) as bar:
        for which, facts in extra.items():
            found |= named_means(protocol.score(model, facts, progress=bar.advance), which)
    return found


def evaluate_split(
    model: PreTrainedModel, protocol: Protocol, split: Split, *, name: str, generation: bool = False
) -> dict[str, float]:
    """All sets of a split; the test set's scores are named as the retain set's, after "test_".

    Args:
        name: of the bar.
        generation: also the accuracy when the prompt lists the options and the model writes its choice.
    """
    with job(name, sum(map(len, split))) as bar:
        found = evaluate_sets(model, protocol, split.forget, split.retain, bar.advance)
        tested = evaluate_sets(model, protocol, [], split.test, bar.advance)
        found |= {f"test_{name}": value for name, value in tested.items()}
        if generation:
            for score, facts in (("fs_generation", split.forget), ("rs_generation", split.retain)):
                if facts and all_have_options(facts):
                    found[score] = generation_accuracy(model, protocol.prompts, facts)
    return found
