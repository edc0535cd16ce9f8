"""An audit: were the facts that a model no longer answers erased from it, or are they hidden in it?"""

from __future__ import annotations

import copy
import gc
import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..analysis.ablation import hidden_most, random_neurons, zeroed
from ..analysis.influence import Influence, summarise, variation_by_kind
from ..analysis.matching import Matches, comparable, match_outputs, match_states, other_questions
from ..analysis.measure import measure_influence
from ..analysis.verdict import LEVEL, Signal, answers_more_than_chance, decide
from ..attacks.attack import Attack
from ..attacks.attacked import Attacked
from ..attacks.execute import execute, length
from ..attacks.grid import grid_of
from ..attacks.kinds import AttackGroup
from ..data.facts import Fact, Split, check_split, judged_by_choice, load_facts
from ..data.prompts import Encoded
from ..evaluation.likelihood import score_facts
from ..evaluation.protocol import Protocol
from ..evaluation.sets import evaluate_split
from ..models.layers import LogitLens
from ..models.load import load_model
from ..options import AuditOptions
from ..progress import job
from ..report.audit import write_audit_page
from ..runs.parts import Parts
from ..training.trainer import refuse_launchers

TARGET = "logit"  # of the attribution: it neither vanishes with P(answer) nor grows with it
COUNTS = (10, 100)  # neurons to take away
SEED = 0  # of the questions that facts are compared with, and of the random neurons
HARMFUL = "after the harmful attack"  # the signal without which nothing is called erased
INFLUENCE = "before.safetensors"


class _Facts(NamedTuple):
    """The facts of an audit, with the false options that it needs."""

    split: Split
    digest: str

    @classmethod
    def of(cls, options: AuditOptions) -> _Facts:
        sets = {name: getattr(options, name) for name in Split._fields}
        split = Split(*(load_facts(source) if source is not None else [] for source in sets.values()))
        for fact in split.forget:
            if not fact.false_options:
                raise ValueError(
                    f"the forget fact {fact.question!r} has no false_options; an audit compares each answer with wrong "
                    "ones of the same kind: add them (TOFU's perturbed sets have some)"
                )
        check_split(split, shared=("question",), needed=("forget",))
        return cls(split, hashlib.sha256(repr(split).encode()).hexdigest())


def audit(options: AuditOptions, out_dir: str | Path) -> tuple[dict[str, Any], Path]:
    """Compare two checkpoints of one architecture, and say whether the forget facts were erased or hidden.

    Only facts that the first model answers are looked for. Finished parts in the folder are not done again.

    Args:
        options: see `AuditOptions`.
        out_dir: a new or empty folder, or the one of an audit with the same options.

    Returns:
        The audit's record, as in audit.json (verdict, sentence, signals, scores, neurons, attacks), and its page.

    Raises:
        ValueError: options out of range, facts without false options, models of different architecture or tokenizer, or
            a first model that does not know the facts, before anything is written; other options in the folder.
        FileNotFoundError: a file of facts that is not there.
        OSError: a folder that cannot be written to.
    """
    refuse_launchers()
    facts = _Facts.of(options)
    attacks = _attacks(options, facts.split.forget)
    with Parts.claim(out_dir, {**asdict(options), "facts": facts.digest}) as parts:
        before = _Before.of(options, facts.split, parts)
        after = parts.part("after", lambda: _after(options, facts.split, before, parts))
        answered = answers_more_than_chance(after["right"], before.facts)
        results = [] if answered else _attack(options, attacks, before.facts, parts)
        signals = _signals(before, after, results)
        verdict, sentence = decide(signals, HARMFUL, answered, len(before.facts))
        record = {
            "verdict": verdict,
            "sentence": sentence,
            "signals": [signal.as_json() for signal in signals],
            "facts": {name: len(part) for name, part in facts.split._asdict().items()},
            "looked_for": len(before.facts),
            "before": before.found,
            "after": after,
            "attacks": results,
            "config": asdict(options),
        }  # fmt: skip
        parts.write("audit", record)
        return record, write_audit_page(record, parts.path)


def _signals(before: _Before, after: dict[str, Any], results: Sequence[dict]) -> list[Signal]:
    layers = zip(before.found["layers"], after["layers"], strict=True)
    known_there = {
        f"layer {number}": _read(found)
        for number, (original, found) in enumerate(layers, 1)
        if _read(original).p_values()[0] < LEVEL
    }
    ablated = {f"{row['count']} neurons": _read(row) for row in after["ablated"] if row["which"] == "hidden"}
    signals = [
        Signal("in the outputs", {"outputs": _read(after["outputs"])}, held_down=True),
        Signal("in the layers", known_there, held_down=True),
        Signal("without the neurons that grew to hide them", ablated),
    ]
    for kind in dict.fromkeys(result["kind"] for result in results):
        looks = {
            AttackGroup.of(result).title + f", lr {result['learning_rate']}, seed {result['seed']}": _read(
                result["found"]
            )
            for result in results
            if result["kind"] == kind and result["found"]["shares"]
        }
        signals.append(Signal(f"after the {kind} attack", looks))
    return signals


def _read(stored: dict[str, Any]) -> Matches:
    return Matches(stored["shares"], stored["others"])


def _attacks(options: AuditOptions, forget: Sequence[Fact]) -> list[Attack]:
    right_or_wrong = judged_by_choice(forget)
    attacks = [attack.on(right_or_wrong) for attack in grid_of(options.attacks())]
    for attack in attacks:
        attack.check()
        attack.check_data(forget, right_or_wrong)
    return attacks


class _Before(NamedTuple):
    """What is known of the first model.

    Attributes:
        found: the part's content.
        facts: the forget facts that it answers and that can be compared.
        questions: of each, other questions.
        influence: of its neurons over these facts.
    """

    found: dict[str, Any]
    facts: list[Fact]
    questions: list[list[str]]
    influence: dict[str, Influence]

    @classmethod
    def of(cls, options: AuditOptions, split: Split, parts: Parts) -> _Before:
        if not parts.has("before.json"):
            _measure_before(options, split, parts)
        found, tensors = parts.read("before"), load_file(parts.path / INFLUENCE)
        facts = [split.forget[i] for i in found["looked_for"]]
        kinds = dict.fromkeys(name.partition(".")[0] for name in tensors)
        influence = {kind: Influence(*(tensors[f"{kind}.{name}"] for name in Influence._fields)) for kind in kinds}
        return cls(found, facts, found["questions"], influence)


def _load(options: AuditOptions, name: str, **changes: Any) -> tuple[PreTrainedModel, Protocol]:
    gc.collect()  # the model before, if it is in a cycle
    model, tokenizer = load_model(name, **options.loading(**changes))
    return model, Protocol.of(options, model, tokenizer)


class _Shape(NamedTuple):
    """What two models must have in common."""

    architecture: str
    weights: dict[str, tuple[int, ...]]
    vocabulary: dict[str, int]
    samples: list[Encoded]

    @classmethod
    def of(cls, model: PreTrainedModel, protocol: Protocol, facts: Sequence[Fact]) -> _Shape:
        weights = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
        prompts = protocol.prompts
        return cls(type(model).__name__, weights, prompts.tokenizer.get_vocab(), prompts.encode_options(facts))

    def check(self, other: _Shape, options: AuditOptions) -> None:
        """Raise a ValueError unless the other model is of the same architecture and has the same tokenizer."""
        names = f"{options.before} and {options.after}"
        if self.architecture != other.architecture:
            raise ValueError(
                f"{names} are a {self.architecture} and a {other.architecture}; expected two models of one architecture"
            )
        for name in (*self.weights, *other.weights):
            shapes = [shape.weights.get(name, "missing") for shape in (self, other)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"{names} differ in {name}, {shapes[0]} and {shapes[1]}; expected two models of one architecture"
                )
        if (self.vocabulary, self.samples) != (other.vocabulary, other.samples):
            raise ValueError(f"{names} have different tokenizers; expected the same one")


def _measure_before(options: AuditOptions, split: Split, parts: Parts) -> None:
    other = _Shape.of(*_load(options, options.after), split.forget)
    model, protocol = _load(options, options.before)
    _Shape.of(model, protocol, split.forget).check(other, options)
    right = _right(model, protocol, split.forget)
    known = [i for i, answered in enumerate(right) if answered]
    asked = other_questions([split.forget[i] for i in known], SEED)
    looked_for = [i for i, others in zip(known, asked, strict=True) if others]
    facts, questions = [split.forget[i] for i in looked_for], [others for others in asked if others]
    outputs = match_outputs(model, protocol.prompts, facts, questions) if facts else None
    if outputs is None or not outputs.p_values()[0] < LEVEL:
        raise ValueError(
            f"{options.before} answers {len(known)} of the {len(right)} forget facts, of which {len(facts)} can be "
            "compared with other questions of their kind; expected a model that knows enough of them that something "
            "could be erased (is --shots the number that it was taught with? do the facts have subjects?)"
        )
    fits = comparable(protocol.prompts, facts)
    influence = _influence(model, protocol, facts, options)
    tensors = {f"{kind}.{name}": getattr(part, name) for kind, part in influence.items() for name in part._fields}
    found = {
        "scores": evaluate_split(model, protocol, split, name="score before"),
        "looked_for": looked_for,
        "questions": questions,
        "comparable": fits,
        "outputs": outputs.as_json(),
        "layers": _layers(model, LogitLens(model), protocol, facts, questions, fits),
    }
    parts.path.mkdir(exist_ok=True)
    save_file(tensors, parts.path / INFLUENCE)
    parts.write("before", found)


def _after(options: AuditOptions, split: Split, before: _Before, parts: Parts) -> dict[str, Any]:
    lens = _lens(options)
    model, protocol = _load(options, options.after)
    prompts, facts, questions = protocol.prompts, before.facts, before.questions
    variations = variation_by_kind(before.influence, _influence(model, protocol, facts, options))
    ablated = []
    with job("take neurons away", 2 * len(COUNTS)) as bar:
        for count in COUNTS:
            hidden = hidden_most(variations, count)
            for which, neurons in (("hidden", hidden), ("random", random_neurons(variations, hidden, SEED))):
                with zeroed(model, neurons):
                    found = match_outputs(model, prompts, facts, questions)
                    right = sum(_right(model, protocol, facts)) / len(facts)
                number = sum(map(len, neurons.values()))
                ablated.append({"count": count, "which": which, "neurons": number, "score": right, **found.as_json()})
                bar.advance()
    return {
        "scores": evaluate_split(model, protocol, split, name="score after"),
        "right": _right(model, protocol, facts),
        "outputs": match_outputs(model, prompts, facts, questions).as_json(),
        "layers": _layers(model, lens, protocol, facts, questions, before.found["comparable"]),
        "influence": {**summarise(variations), "target": TARGET},
        "ablated": ablated,
    }


def _lens(options: AuditOptions) -> LogitLens:
    """The first model's final norm and output head: the unlearned model's own may be what hides the facts."""
    model, _ = _load(options, options.before)
    lens = LogitLens(model)
    lens.norm, lens.head = copy.deepcopy(lens.norm), copy.deepcopy(lens.head)
    return lens


def _layers(
    model: PreTrainedModel, lens: LogitLens, protocol: Protocol, facts: list[Fact], questions: list, fits: list[bool]
) -> list[dict]:
    chosen = [i for i, fit in enumerate(fits) if fit]
    if not chosen:
        return []
    asked = [facts[i] for i in chosen], [questions[i] for i in chosen]
    return [matches.as_json() for matches in match_states(model, lens, protocol.prompts, *asked)]


def _influence(
    model: PreTrainedModel, protocol: Protocol, facts: Sequence[Fact], options: AuditOptions
) -> dict[str, Influence]:
    encoded, size = protocol.prompts.encode_facts(facts), options.batch_size
    with job("attribute", len(encoded)) as bar:
        batches = (protocol.prompts.collate(encoded[i : i + size]) for i in range(0, len(encoded), size))
        return measure_influence(model, batches, target=TARGET, progress=bar.advance)


def _right(model: PreTrainedModel, protocol: Protocol, facts: Sequence[Fact]) -> list[bool]:
    """Of each fact, whether its true option is likelier than the false ones."""
    return (score_facts(model, protocol.prompts, facts, choice=True).score == 1).tolist()


def _attack(options: AuditOptions, attacks: list[Attack], facts: list[Fact], parts: Parts) -> list[dict]:
    names = {attack: f"attacks/{attack.name}" for attack in attacks}
    pending = [attack for attack in attacks if not parts.has(f"{names[attack]}.json")]
    loaded: list[tuple[PreTrainedModel, Protocol]] = []

    def load(**changes: Any) -> tuple[PreTrainedModel, Protocol]:
        loaded[:] = []
        loaded.append(_load(options, options.after, dtype="float32", **changes))
        return loaded[0]

    if pending:
        with job("attack", length(pending)) as bar:
            for attack, result in execute(pending, Attacked(load, facts), bar):
                model, protocol = loaded[0]  # as the attack left it
                parts.write(names[attack], result | {"found": _found_unseen(model, protocol, facts, result)})
    return [parts.read(name) for name in names.values()]


def _found_unseen(model: PreTrainedModel, protocol: Protocol, facts: list[Fact], result: dict) -> dict:
    """Matches of the facts that an attack has not seen: their questions are compared with others it has not seen."""
    unseen, seen = [facts[i] for i in result["unseen"]], {facts[i].question for i in result["seen"]}
    asked = other_questions(unseen, result["seed"], without=seen)
    compared = [(fact, others) for fact, others in zip(unseen, asked, strict=True) if others]
    if not compared:
        return Matches([], []).as_json()
    return match_outputs(model, protocol.prompts, *zip(*compared, strict=True)).as_json()
