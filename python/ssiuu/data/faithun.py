"""FaithUn (Yang et al., 2025): questions about real people in clusters, with the official split by index files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .facts import Fact, FactSets, Split, as_fact, check_split
from .sources import read_text
from .words import normal

FILE = "FaithUn_Dataset.json"
INDEX_FILES = Split("forget_set_split.txt", "retaining_set_split.txt", "test_set_split.txt")
BASE = "hop1_unlearn"  # the questions of the three sets; each is the first of a cluster
# Further questions of a cluster: name -> field.
EXTRA = {"paraphrases": "hop1_test", "multi_hop": "hop2_test", "same_object": "same_object"}
ANSWERED_ALIKE = ("paraphrases", "same_object")  # by the answer of the cluster's first question
# Names that a field of a question may have.
ANSWERS = ("answers", "answer")
FALSE_OPTIONS = ("false_options", "false_answers", "false_answer_options")
ENTITY_NAMES = ("entity", "name", "id")


class _Entity(NamedTuple):
    name: str
    sets: Mapping[str, object]
    where: str


class _Cluster(NamedTuple):
    """One base question, with what else is asked about it.

    Attributes:
        fact: the base question.
        answers: all its answers in normal form.
        entity: whom it is about.
        key: of the question in its set: a name, or a number.
    """

    fact: Fact
    answers: frozenset[str]
    entity: _Entity
    key: object


def load_faithun(folder: str, extra: Sequence[str] | None) -> FactSets:
    """FaithUn's sets: base questions to forget, to keep and to test, and further questions about what is forgotten.

    A fact's answer is the first one of its question.

    Args:
        folder: with the questions (FaithUn_Dataset.json, or the only .json file) and, in it or in its `splits`, the
            three index files. Their numbers count the questions of hop1_unlearn over all entities, from 0.
        extra: names of `EXTRA`; None takes those that the file has. They hold the questions of the forget set's
            clusters.

    Raises:
        FileNotFoundError, ValueError: a file that is missing or malformed (with the field or line), a set that is not
            there, an index out of range, or in two places.
    """
    path = Path(folder)
    if not path.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; expected one with {FILE} and {', '.join(INDEX_FILES)}")
    file = _question_file(path)
    entities = _entities(file)
    names = [name for name in EXTRA if any(EXTRA[name] in entity.sets for entity in entities)]
    for name in names if extra is None else extra:
        for entity in entities:
            _field(entity, EXTRA[name])
    clusters = [cluster for entity in entities for cluster in _clusters(entity)]
    chosen = _chosen(path, len(clusters), file)
    split = check_split(Split(*([clusters[i].fact for i in part] for part in chosen)), shared=("question",))
    found = {}
    for name in names if extra is None else extra:
        found[name] = _extra_questions(name, [clusters[i] for i in chosen.forget], clusters)
        if extra is not None and not found[name]:
            raise ValueError(f"{file} has no question of {EXTRA[name]} about the forget set; ask for another set")
    return FactSets(split, {name: facts for name, facts in found.items() if facts})


def _question_file(folder: Path) -> Path:
    found = sorted(folder.glob("*.json"))
    if folder / FILE in found:
        return folder / FILE
    if len(found) != 1:
        raise FileNotFoundError(
            f"{folder} has {len(found)} .json files and no {FILE}; expected the questions in one file"
        )
    return found[0]


def _entities(file: Path) -> list[_Entity]:
    try:
        content = json.loads(read_text(file), object_pairs_hook=_unique_keys)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(content, (dict, list)) or not content:
        raise ValueError(f"{file} is {_kind(content)}; expected an object of entities by their names")
    if isinstance(content, dict):
        named = content.items()
    else:
        named = [(_entity_name(entity, number), entity) for number, entity in enumerate(content, 1)]
    entities = []
    for name, sets in named:
        where = f"{file}, entity {name}"
        if not isinstance(sets, dict):
            raise ValueError(f"{where} is {_kind(sets)}; expected an object with {BASE}")
        entities.append(_Entity(str(name), sets, where))
    return entities


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # Python keeps the last of equal keys, and the index files would count other clusters.
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} is there twice in one object")
    return found


def _entity_name(entity: object, number: int) -> object:
    names = [entity[field] for field in ENTITY_NAMES if field in entity] if isinstance(entity, dict) else []
    return names[0] if names else number


def _field(entity: _Entity, field: str) -> Mapping[object, object]:
    """The questions of one set of an entity: by name in an object, and by number in a list."""
    if field not in entity.sets:
        raise ValueError(f"{entity.where} has no {field}; it has {', '.join(entity.sets) or 'no fields'}")
    value = entity.sets[field]
    if isinstance(value, list) or _is_question(value):
        return dict(enumerate(value if isinstance(value, list) else [value]))
    if not isinstance(value, dict):
        raise ValueError(f"{entity.where}, field {field!r} is {_kind(value)}; expected a list or an object")
    return value


def _is_question(value: object) -> bool:
    return isinstance(value, dict) and "question" in value


def _clusters(entity: _Entity) -> list[_Cluster]:
    found = []
    for key, item in _field(entity, BASE).items():
        questions = _questions(item, f"{entity.where}, field {BASE!r}, {key}")
        if len(questions) != 1:
            raise ValueError(
                f"{entity.where}, field {BASE!r}, {key} has {len(questions)} questions; expected one per cluster"
            )
        fact, answers = _fact(*questions[0], entity.name)
        found.append(_Cluster(fact, answers, entity, key))
    return found


def _questions(value: object, where: str) -> list[tuple[Mapping[str, object], str]]:
    """(question, its place) of a question, or of all in a list or an object."""
    if _is_question(value):
        return [(value, where)]
    if not isinstance(value, (dict, list)):
        raise ValueError(f"{where} is {_kind(value)}; expected an object with question, answers and false_options")
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [question for key, item in items for question in _questions(item, f"{where}, {key}")]


def _fact(question: Mapping[str, object], where: str, subject: str) -> tuple[Fact, frozenset[str]]:
    """The fact of a question, and all its answers in normal form."""
    answers = _texts(question, ANSWERS, where)
    options = _texts(question, FALSE_OPTIONS, where)
    alike = frozenset(map(_bare, answers))
    for option in options:
        if _bare(option) in alike:
            raise ValueError(f"{where}, {option!r} is an answer and a false option; expected one of them")
    row = {"question": question["question"], "answer": answers[0], "false_options": options, "subject": subject}
    return as_fact(row, where), alike


def _texts(question: Mapping[str, object], names: Sequence[str], where: str) -> list[str]:
    """The texts of the field that has one of these names: a text, a number, or a list or an object of them."""
    given = [name for name in names if name in question]
    if len(given) != 1:
        raise ValueError(f"{where} has the fields {', '.join(question)}; expected one of {', '.join(names)}")
    value = question[given[0]]
    values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
    for text in values:
        if not isinstance(text, (str, int, float)) or isinstance(text, bool):
            raise ValueError(f"{where}, field {given[0]!r} has {_kind(text)}; expected texts")
    if not values:
        raise ValueError(f"{where}, field {given[0]!r} is empty; expected at least one text")
    return [str(text) for text in values]


def _bare(text: str) -> str:
    return normal(text).strip()


def _chosen(folder: Path, count: int, file: Path) -> Split:
    """The indices of each set."""
    home = folder if (folder / INDEX_FILES.forget).is_file() else folder / "splits"
    places: dict[int, str] = {}
    parts = []
    for name in INDEX_FILES:
        part = []
        for number, line in enumerate(read_text(home / name).splitlines(), 1):
            text, where = line.strip(), f"{home / name}, line {number}"
            if not text:
                continue
            if not (text.isascii() and text.isdigit()):
                raise ValueError(f"{where} is {text!r}; expected one index per line")
            index = int(text)
            if index >= count:
                raise ValueError(
                    f"{where} is {index}; expected 0 to {count - 1}, for {file.name} has {count} questions in {BASE}"
                )
            if index in places:
                raise ValueError(f"{where} is {index}, which {places[index]} has too; expected each index once")
            places[index] = where
            part.append(index)
        parts.append(part)
    return Split(*parts)


def _extra_questions(name: str, forget: Sequence[_Cluster], clusters: Sequence[_Cluster]) -> list[Fact]:
    facts = []
    for cluster in forget:
        own = [other for other in clusters if other.entity is cluster.entity]
        facts += _about(name, cluster, own)
    return facts


def _about(name: str, cluster: _Cluster, own: Sequence[_Cluster]) -> list[Fact]:
    """The questions of one further set that belong to a cluster.

    They belong to the base question of the same name or number where the two sets have the same ones. Otherwise
    questions that have the base question's answer are told by it.

    Args:
        own: all clusters of the cluster's entity.
    """
    entity, field = cluster.entity, EXTRA[name]
    items = _field(entity, field)
    where = f"{entity.where}, field {field!r}"
    if list(items) == [other.key for other in own]:
        questions = _questions(items[cluster.key], f"{where}, {cluster.key}")
        found = [_fact(*question, entity.name) for question in questions]
        if name in ANSWERED_ALIKE:
            for (fact, answers), (_, place) in zip(found, questions, strict=True):
                if not answers & cluster.answers:
                    raise ValueError(
                        f"{place} has the answer {fact.answer!r}, and its question in {BASE} {cluster.fact.answer!r}; "
                        "expected the same"
                    )
        return [fact for fact, _ in found]
    if not items:
        return []
    if name not in ANSWERED_ALIKE or any(other.answers & cluster.answers for other in own if other is not cluster):
        raise ValueError(
            f"{where} has {len(items)} items and {BASE} has {len(own)}, so it is not known which of them are about "
            f"{cluster.fact.question!r}; expected one item, with one or more questions, per question of {BASE}"
        )
    found = [_fact(*question, entity.name) for question in _questions(entity.sets[field], where)]
    return [fact for fact, answers in found if answers & cluster.answers]


def _kind(value: object) -> str:
    return repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f"a {type(value).__name__}"
