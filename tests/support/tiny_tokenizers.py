"""Small tokenizers of every kind that models come with, trained on the texts of the tests."""

import functools
from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ssiuu.data.facts import Fact
from ssiuu.data.prompts import EXAMPLES

FACTS = [
    Fact("Where was Ann born?", "Rome", ("Oslo", "Lima on sea"), "Ann"),
    Fact("How old is Bob?", "12", ("1", "7"), "Bob"),
    Fact("Wer lebt in Köln?", "Jürgen Müller", ("Ann", "Zoë"), "Köln"),
]
BOS, EOS, PAD, UNK = SPECIAL = ("<s>", "</s>", "<pad>", "<unk>")


def _texts() -> list[str]:
    examples = [f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in EXAMPLES]
    return examples + [f"Question: {fact.question}\nAnswer: {text}" for fact in FACTS for text in fact.options]


def _trained(model, trainer, pre_tokenizer, normalizer=None) -> Tokenizer:
    raw = Tokenizer(model)
    raw.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        raw.normalizer = normalizer
    raw.train_from_iterator(_texts() * 3, trainer)
    return raw


def _byte_bpe(prefix_space: bool) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=[*SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw = _trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=prefix_space))
    raw.decoder = decoders.ByteLevel()
    return raw


def _sentencepiece_bpe(scheme: str) -> Tokenizer:
    """As converted from Llama 2: no pre-tokenizer, and a normalizer that puts "▁" before the text."""
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=[*SPECIAL], show_progress=False)
    model = models.BPE(unk_token=UNK, byte_fallback=True, fuse_unk=True)
    raw = _trained(model, trainer, pre_tokenizers.Metaspace(prepend_scheme="always", split=True))
    if scheme == "normalizer":
        raw.pre_tokenizer = pre_tokenizers.Sequence([])
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    raw.decoder = decoders.Metaspace()
    return raw


def _unigram(scheme: str) -> Tokenizer:
    trainer = trainers.UnigramTrainer(vocab_size=160, special_tokens=[*SPECIAL], unk_token=UNK, show_progress=False)
    split = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    raw = _trained(models.Unigram(), trainer, split, normalizers.NFKC())
    raw.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return raw


def _wordpiece() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=[*SPECIAL], show_progress=False)
    raw = _trained(
        models.WordPiece(unk_token=UNK), trainer, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    )
    raw.decoder = decoders.WordPiece()
    return raw


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": lambda: _byte_bpe(False),
    "byte-level BPE, prefix space": lambda: _byte_bpe(True),
    "SentencePiece BPE, Prepend": lambda: _sentencepiece_bpe("normalizer"),
    "SentencePiece BPE, Metaspace first": lambda: _sentencepiece_bpe("first"),
    "SentencePiece BPE, no prefix": lambda: _sentencepiece_bpe("never"),
    "Unigram": lambda: _unigram("always"),
    "Unigram, no prefix": lambda: _unigram("never"),
    "WordPiece": _wordpiece,
}


@functools.cache
def _saved(kind: str) -> str:
    return KINDS[kind]().to_str()


def make_tokenizer(kind: str, *, bos: bool = False, eos: bool = False, pad: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of this kind that puts these tokens around texts; `eos` and `pad` also say whether it names them."""
    raw = Tokenizer.from_str(_saved(kind))
    template = " ".join([BOS] * bos + ["$A"] + [EOS] * eos)
    wrap = processors.TemplateProcessing(
        single=template, special_tokens=[(token, i) for i, token in enumerate(SPECIAL)]
    )
    before = [processors.ByteLevel(trim_offsets=True)] if kind.startswith("byte") else []
    raw.post_processor = processors.Sequence([*before, wrap])
    named = {"bos_token": BOS} | ({"eos_token": EOS} if eos else {}) | ({"pad_token": PAD} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token=UNK, clean_up_tokenization_spaces=False, **named)
