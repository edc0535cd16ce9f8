"""Words of any script: ROUGE of an answer against itself, and choices that are written."""

import random
import string

import pytest
from rouge_score.rouge_scorer import RougeScorer

from ssiuu.data.facts import load_facts
from ssiuu.data.words import WordTokenizer, chosen_option, words

ITS_OWN = RougeScorer(["rougeL"], use_stemmer=True)
OURS = RougeScorer(["rougeL"], tokenizer=WordTokenizer())


def recall(scorer, target, prediction):
    return scorer.score(target, prediction)["rougeL"].recall


ANSWERS = [
    "北京是中国的首都",
    "Москва",
    "Jürgen Müller",
    "हिन्दी में",
    "ภาษาไทย",
    "서울특별시",
    "القاهرة",
    "Ὅμηρος",
    "東京タワー",
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_answer_is_itself(answer):
    assert recall(OURS, answer, f"{answer}.") == 1
    assert recall(OURS, answer, "something else") == 0


def test_a_part_of_an_answer_is_a_part_of_it():
    assert recall(OURS, "北京是中国的首都", "首都") == 2 / 8
    assert recall(OURS, "Jürgen Müller", "Jurgen Müller") == 1 / 2


def test_accents_composed_or_not_and_letter_case():
    assert words("Mu\u0308ller STRASSE") == words("müller Straße") == ["müller", "strasse"]


def test_plain_ascii_keeps_its_scores():
    draw = random.Random(0)
    texts = ["".join(draw.choices(string.printable, k=draw.randrange(60))) for _ in range(300)]
    texts += [fact.question for fact in load_facts("builtin")[:150] if fact.question.isascii()]
    for target, prediction in zip(texts, draw.sample(texts, len(texts)), strict=True):
        for text in (target, prediction):
            assert recall(OURS, target, text) == recall(ITS_OWN, target, text)


CHOICES = {
    "a longer number": ("12 apples", ("1", "2"), None),
    "the longer of two": ("12 apples", ("1", "12"), "12"),
    "a decimal": ("1.5 million", ("1", "2"), None),
    "a longer word": ("Nigeria is", ("Niger", "Mali"), None),
    "a compound": ("Guinea-Bissau", ("Guinea", "Mali"), None),
    "punctuation behind": ("Rome, of course", ("rome", "oslo"), "rome"),
    "symbols in the option": ("C++ it is", ("C", "C++"), "C++"),
    "accents composed": ("Mu\u0308nchen", ("München", "Köln"), "München"),
    "a script without spaces": ("北京市", ("上海", "北京"), "北京"),
    "nothing": ("", ("rome", "oslo"), None),
}


@pytest.mark.parametrize(("answer", "options", "expected"), CHOICES.values(), ids=CHOICES)
def test_a_choice_is_the_longest_option_in_whole_words(answer, options, expected):
    assert chosen_option(answer, options) == expected
