"""Words of a text in any script: for ROUGE, and for answers that are compared with options by their text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

# Scripts that put no spaces between words: each character is a word. Thai, Lao, Myanmar, Khmer, kana and Han.
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff]"
)
# A number or a compound goes on after these: "1.5" is not "1", and "Guinea-Bissau" is not "Guinea".
_NUMBER_GOES_ON, _COMPOUND_GOES_ON = re.compile(r"[.,:/]\d"), re.compile(r"[-\u2010\u2011]\w")


def normal(text: str) -> str:
    """The text in one letter case, with its accents composed (NFC)."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits, in normal form. Of plain ASCII text: the runs of [a-z0-9]."""
    spaced = "".join(map(_spaced, normal(text)))
    return spaced.split()


def _spaced(char: str) -> str:
    if _WITHOUT_SPACES.match(char):
        return f" {char} "
    category = unicodedata.category(char)
    if category == "Cf":  # soft hyphens, joiners and marks of direction are within words
        return ""
    return char if category[0] in "LMN" else " "


def begins_with(text: str, start: str) -> bool:
    """Whether `text` begins with `start`, in any letter case, and what follows, if anything, is another word."""
    text, start = normal(text), normal(start)
    rest = text[len(start) :]
    return (
        text.startswith(start)
        and words(start) + words(rest) == words(text)
        and not (start[-1:].isdigit() and _NUMBER_GOES_ON.match(rest))
        and not _COMPOUND_GOES_ON.match(rest)
    )


def chosen_option(answer: str, options: Iterable[str]) -> str | None:
    """The longest option that `answer` begins with; None where there is none."""
    return max((option for option in options if begins_with(answer, option)), key=len, default=None)


class WordTokenizer:
    """`words` for `rouge_score`, with its stems of ASCII words: plain ASCII text scores as with its own tokenizer."""

    def __init__(self):
        from nltk.stem.porter import PorterStemmer  # comes with rouge_score

        self._stem = PorterStemmer().stem

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, stemmed where they are ASCII and longer than three letters."""
        return [self._stem(word) if len(word) > 3 and word.isascii() else word for word in words(text)]
