"""Facts to forget and to keep: one JSONL schema, its loaders, and splits in which no person is in two sets."""

from __future__ import annotations

import itertools
import json
import random
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from .sources import check_text, read_rows
from .words import words


@dataclass(frozen=True)
class Fact:
    """A question with its answer.

    Attributes:
        question, answer: text, not empty.
        false_options: wrong answers of the same kind; empty where the answer is free text (TOFU), which is then judged
            by ROUGE-L recall instead of by choice.
        subject: the person; None where the data does not say.
        paraphrase: the answer in other words, where the false options are worded like it rather than like the answer
            (TOFU's perturbed sets): then it is the true option. None where the answer is.
    """

    question: str
    answer: str
    false_options: tuple[str, ...] = ()
    subject: str | None = None
    paraphrase: str | None = None

    @property
    def true_option(self) -> str:
        """The option that is right."""
        return self.answer if self.paraphrase is None else self.paraphrase

    @property
    def options(self) -> tuple[str, ...]:
        """The true option, then the false ones."""
        return (self.true_option, *self.false_options)


class Split(NamedTuple):
    """Three sets of facts; no person is in two of them. `test` holds the people that training never sees."""

    forget: list[Fact]
    retain: list[Fact]
    test: list[Fact]


class FactSets(NamedTuple):
    """What a data set gives to a run.

    Attributes:
        split: the sets that the run forgets, keeps, and tests on.
        extra: name -> facts of further sets, which `ssiuu evaluate` scores.
    """

    split: Split
    extra: dict[str, list[Fact]]


def load_facts(source: str | Path) -> list[Fact]:
    """Read facts.

    Args:
        source: "builtin" (the embedded people), the path of a .jsonl file, or a `datasets` name as "name" or
            "name:configuration" (its "train" split). A row has question and answer, and optionally false_options,
            subject and paraphrase; TOFU's names for false_options and paraphrase, perturbed_answer and
            paraphrased_answer, are read too.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: a malformed row (file, line number, field), options in some rows only, an answer without options and
            without a word, or no rows.
    """
    facts = []
    for where, row in read_rows(source, "facts.jsonl"):
        facts.append(as_fact(row, where))
        if bool(facts[-1].false_options) != bool(facts[0].false_options):
            raise ValueError(
                f"{where}, field 'false_options' is {list(facts[-1].false_options)}, unlike that of the first row; "
                "expected options in every row (scored by choice) or in none (scored by ROUGE-L recall)"
            )
        if (facts[-1].paraphrase is None) != (facts[0].paraphrase is None):
            raise ValueError(
                f"{where}, field 'paraphrase' is {facts[-1].paraphrase!r}, unlike that of the first row; "
                "expected a paraphrase in every row or in none"
            )
    if not facts:
        raise ValueError(f"facts {source} has no rows; expected at least one")
    return facts


def save_facts(facts: Iterable[Fact], file: Path) -> None:
    """Write facts as JSON Lines, as `load_facts` reads them."""
    file.write_text("".join(json.dumps(asdict(fact)) + "\n" for fact in facts), encoding="utf-8")


def as_fact(row: object, where: str) -> Fact:
    """The fact of one row, as `load_facts` reads it; `where` is its place, which errors name."""
    if not isinstance(row, dict):
        raise ValueError(f"{where} is a {type(row).__name__}; expected an object with question and answer")
    for field in ("question", "answer"):
        check_text(row.get(field), field, where)
    options = row.get("false_options", row.get("perturbed_answer"))
    options = [] if options is None else options
    if not isinstance(options, list):
        raise ValueError(f"{where}, field 'false_options' is {options!r}; expected a list of texts")
    for option in options:
        check_text(option, "false_options", where)
    paraphrase, subject = row.get("paraphrase", row.get("paraphrased_answer")), row.get("subject")
    for field, text in (("paraphrase", paraphrase), ("subject", subject)):
        if text is not None:
            check_text(text, field, where)
    for true in (row["answer"], paraphrase):
        if true is not None and _bare(true) in map(_bare, options):
            raise ValueError(f"{where}, field 'false_options' contains the answer {true!r}; remove it")
    fact = Fact(row["question"], row["answer"], tuple(options), subject, paraphrase)
    if not judged_by_choice([fact]) and not words(row["answer"]):
        raise ValueError(
            f"{where}, field 'answer' is {row['answer']!r}, without a letter or digit; ROUGE-L, which scores answers "
            "without false_options, finds no word in it: give options, or leave the row out"
        )
    return fact


def _bare(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def by_subject(facts: Iterable[Fact]) -> dict[str, list[Fact]]:
    """Facts of each person, in order of first appearance.

    Raises:
        ValueError: a fact without subject.
    """
    people: dict[str, list[Fact]] = {}
    for fact in facts:
        if fact.subject is None:
            raise ValueError(
                f"the fact {fact.question!r} has no subject, so it cannot be split by person; "
                "add the field, or give the forget and the retain set as two files"
            )
        people.setdefault(fact.subject, []).append(fact)
    return people


def draw_people(facts: Sequence[Fact], number: int, seed: int) -> list[Fact]:
    """The facts of this many people, drawn by the seed.

    Raises:
        ValueError: fewer people, or a fact without subject.
    """
    people = by_subject(facts)
    if number > len(people):
        raise ValueError(f"people={number} is more than the {len(people)} people that the facts have; ask for fewer")
    return [fact for name in random.Random(seed).sample(list(people), number) for fact in people[name]]


def at_most(facts: Sequence[Fact], number: int | None, seed: int) -> list[Fact]:
    """This many of the facts, drawn by the seed and evenly among the people; all where `number` is None."""
    if number is None:
        return list(facts)
    people: dict[str | None, list[Fact]] = {}
    for fact in random.Random(seed).sample(list(facts), len(facts)):
        people.setdefault(fact.subject, []).append(fact)
    rounds = itertools.zip_longest(*people.values())
    return [fact for facts in rounds for fact in facts if fact is not None][:number]


def split_by_subject(facts: Sequence[Fact], forget_people: int, retain_people: int, seed: int) -> Split:
    """Draw people for the forget and the retain set; the rest is the test set.

    Args:
        facts: facts with subjects.
        forget_people, retain_people: how many, each at least 1.
        seed: of the draw; the same seed and facts give the same split.

    Raises:
        ValueError: fewer people than asked for, or numbers below 1.
    """
    people = by_subject(facts)
    if forget_people < 1 or retain_people < 1:
        raise ValueError(f"forget_people={forget_people}, retain_people={retain_people}; expected at least 1 each")
    if forget_people + retain_people > len(people):
        raise ValueError(
            f"forget_people={forget_people} and retain_people={retain_people} need more people than the "
            f"{len(people)} that the facts have; ask for fewer"
        )
    names = list(people)
    random.Random(seed).shuffle(names)
    cut = forget_people + retain_people
    return check_split(
        Split(*([fact for name in part for fact in people[name]] for part in
                (names[:forget_people], names[forget_people:cut], names[cut:])))
    )  # fmt: skip


def check_split(
    split: Split, shared: Sequence[str] = ("subject", "question"), needed: Sequence[str] = ("forget", "retain")
) -> Split:
    """`split` if forget and retain have facts and no person is in two sets.

    Args:
        shared: what no two sets may share. Benchmarks with a split of their own may have a person in two sets.
        needed: the sets that may not be empty.

    Raises:
        ValueError: an empty set that is needed, or a shared person or question.
    """
    check_not_empty(split, needed)
    for i, first in enumerate(Split._fields):
        for second in Split._fields[i + 1 :]:
            for field in shared:
                found = {getattr(f, field) for f in split[i]} & {getattr(f, field) for f in getattr(split, second)}
                found.discard(None)
                if found:
                    raise ValueError(
                        f"the {first} and the {second} set share the {field} {min(found)!r}"
                        f"{f' and {len(found) - 1} more' if len(found) > 1 else ''}; give each to one set"
                    )
    return split


def check_not_empty(split: Split, needed: Sequence[str] = ("forget", "retain")) -> Split:
    """`split`; a ValueError if one of these sets is empty."""
    for name in needed:
        if not getattr(split, name):
            raise ValueError(f"the {name} set is empty; expected at least one fact")
    return split


def judged_by_choice(facts: Iterable[Fact]) -> bool:
    """Whether facts are judged by choice among options where nothing else is asked for, instead of by ROUGE-L recall.

    Facts with a paraphrase have options, but their answers are free text, which their benchmark judges by ROUGE-L.
    """
    return all(fact.false_options and fact.paraphrase is None for fact in facts)


def all_have_options(facts: Iterable[Fact]) -> bool:
    """Whether every fact can be judged by choice among options."""
    return all(fact.false_options for fact in facts)
