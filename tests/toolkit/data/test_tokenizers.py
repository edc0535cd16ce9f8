"""Whole texts of every kind of tokenizer: scores and prompts against a computation written here."""

import copy
import itertools
import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizer

from ssiuu.data.facts import Fact
from ssiuu.data.prompts import EXAMPLES, PromptFormat
from ssiuu.evaluation.likelihood import score_facts
from tests.support.tiny_tokenizers import EOS, FACTS, KINDS, make_tokenizer

AROUND = [dict(zip(("bos", "eos", "pad"), on, strict=True)) for on in itertools.product((False, True), repeat=3)]


def name_of(around):
    return "-".join(name for name, on in around.items() if on) or "bare"


def tiny_llama(vocabulary):
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def text_of(question, shots):
    examples = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in EXAMPLES[:shots])
    return f"{examples}Question: {question}\nAnswer:"


def whole_ids(tokenizer, text):
    """By the `tokenizers` library alone, without an end token."""
    encoding = tokenizer.backend_tokenizer.encode(text)
    return encoding.ids[:-1] if encoding.tokens[-1] == EOS else encoding.ids


def log_prob_per_token(model, tokenizer, prompt, answer):
    """Of the answer's tokens in the whole string, float64, and their number."""
    ids, before = whole_ids(tokenizer, f"{prompt} {answer}"), whole_ids(tokenizer, prompt)
    assert ids[: len(before)] == before  # these tokenizers join nothing across a space
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    found = [rows[place - 1, ids[place]] for place in range(len(before), len(ids))]
    return sum(found).item() / len(found), len(found)


def assert_probability(found, per_token, length):
    """Within 1e-5 of the log-likelihood per token, as far as a normal float32 holds the probability."""
    tiny = torch.finfo(torch.float32).tiny
    assert found.item() == pytest.approx(math.exp(per_token * length), rel=1e-5 * length, abs=tiny)


@pytest.mark.parametrize("around", AROUND, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_whole_string(kind, around):
    tokenizer = make_tokenizer(kind, **around)
    model = tiny_llama(len(tokenizer))
    exact = copy.deepcopy(model).double()
    for shots in (0, 2):
        scores = score_facts(model, PromptFormat(tokenizer, shots), FACTS, batch_size=4)
        for index, fact in enumerate(FACTS):
            options = [
                log_prob_per_token(exact, tokenizer, text_of(fact.question, shots), text) for text in fact.options
            ]
            (true, length), *false = options
            assert scores.margin[index].item() == pytest.approx(true - max(s for s, _ in false), abs=1e-5)
            assert_probability(scores.probability[index], true, length)
            assert scores.score[index] == float(scores.margin[index] > 0)


@pytest.mark.parametrize("around", AROUND, ids=name_of)
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_tokenize_as_their_text_does(kind, around):
    tokenizer = make_tokenizer(kind, **around)
    for shots, fact in itertools.product((0, 1, 3), FACTS):
        prompts, text = PromptFormat(tokenizer, shots), text_of(fact.question, shots)
        (sample,) = prompts.encode_prompts([prompts.question(fact.question)])
        assert sample.prompt == whole_ids(tokenizer, text)
        encoded = prompts.encode(fact.question, fact.answer)
        assert encoded.prompt == sample.prompt
        assert encoded.prompt + encoded.answer == whole_ids(tokenizer, f"{text} {fact.answer}")
    pair = prompts.encode_text("Instruction: go\nResponse:", " gone")
    assert pair.prompt + pair.answer == whole_ids(tokenizer, "Instruction: go\nResponse: gone")


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_is_taught_once(kind):
    tokenizer = make_tokenizer(kind, bos=True, eos=True)
    prompts = PromptFormat(tokenizer, 0)
    for with_end, without in zip(prompts.encode_facts(FACTS, end=True), prompts.encode_facts(FACTS), strict=True):
        assert with_end.answer == [*without.answer, tokenizer.eos_token_id]
        assert tokenizer.eos_token_id not in without.prompt + without.answer


def test_a_token_across_the_seam_belongs_to_the_answer():
    tokenizer = make_tokenizer("byte-level BPE")
    prompt, answer = PromptFormat(tokenizer, 0).encode_text("Where was An", "n born?")
    assert tokenizer.decode(prompt) == "Where was"
    assert tokenizer.decode(answer) == " Ann born?"


def test_an_end_token_that_stands_in_the_text_stays():
    tokenizer = make_tokenizer("byte-level BPE", eos=True)
    encoded = PromptFormat(tokenizer, 0).encode("Where was Ann born?", f"Rome{EOS}")
    assert encoded.answer[-1] == tokenizer.eos_token_id


class Slow(PreTrainedTokenizer):
    """Characters, in pairs where it can, ended by an end token; it does not say where its tokens are in the text."""

    def __init__(self, **options):
        super().__init__(eos_token=EOS, **options)

    @property
    def vocab_size(self):
        return 1 << 20

    def get_vocab(self):
        return {EOS: 0}

    def _tokenize(self, text):
        return [text[i : i + 2] for i in range(0, len(text), 2)]

    def _convert_token_to_id(self, token):
        return 0 if token == EOS else sum(ord(char) * 1000**i for i, char in enumerate(token))

    def build_inputs_with_special_tokens(self, first, second=None):
        return [*first, 0]

    def get_special_tokens_mask(self, first, second=None, already_has_special_tokens=False):
        return [int(token == 0) for token in first]


def test_a_tokenizer_without_offsets():
    prompts = PromptFormat(Slow(), 0)
    assert not prompts.tokenizer.is_fast
    encoded = prompts.encode_text("abcd", "ef")
    assert (len(encoded.prompt), len(encoded.answer)) == (2, 1)


def test_a_tokenizer_without_offsets_that_joins_prompt_and_answer():
    with pytest.raises(ValueError, match=r"joins the prompt's end with the answer .*; use a fast tokenizer"):
        PromptFormat(Slow(), 0).encode_text("abc", "def")


def test_a_prompt_that_is_joined_whole():
    with pytest.raises(ValueError, match=r"the prompt 'Quest' of 'Question' has no token"):
        PromptFormat(make_tokenizer("byte-level BPE"), 0).encode_text("Quest", "ion")


def test_a_fact_that_fits_no_position():
    prompts = PromptFormat(make_tokenizer("Unigram"), 0, longest=10)
    with pytest.raises(ValueError, match="more than the model's 10 positions; use fewer --shots"):
        prompts.encode_facts([Fact("Where was Ann born?" * 9, "Rome")])


SHAPES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
            "word_embed_proj_dim": 32},
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mistral": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "intermediate_size": 48, "sliding_window": 16},
    "gemma3_text": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                    "intermediate_size": 48, "head_dim": 8, "sliding_window": 16, "sliding_window_pattern": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", SHAPES)
def test_families_score_as_whole_strings_do(family):
    tokenizer = make_tokenizer("byte-level BPE", bos=True, eos=True, pad=True)
    config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **SHAPES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    exact = copy.deepcopy(model).double()
    scores = score_facts(model, PromptFormat(tokenizer, 2), FACTS, batch_size=4)
    for index, fact in enumerate(FACTS):
        true, length = log_prob_per_token(exact, tokenizer, text_of(fact.question, 2), fact.answer)
        assert_probability(scores.probability[index], true, length)


class Renamed(LlamaForCausalLM):
    """Its cache goes by the name that transformers has announced."""

    def forward(self, input_ids=None, attention_mask=None, cache=None, use_cache=None):
        self.given = cache is not None
        return super().forward(input_ids, attention_mask, past_key_values=cache, use_cache=use_cache)


class Swallowing(LlamaForCausalLM):
    """Takes a cache, and does nothing with it."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **_):
        self.given = past_key_values is not None
        return super().forward(input_ids, attention_mask, use_cache=False)


@pytest.mark.parametrize(("kind", "used"), [(Renamed, True), (Swallowing, False)])
def test_a_cache_by_another_name_or_swallowed(kind, used):
    tokenizer = make_tokenizer("byte-level BPE")
    plain = tiny_llama(len(tokenizer))
    other = kind(plain.config).eval()
    other.load_state_dict(plain.state_dict())
    prompts = PromptFormat(tokenizer, 2)
    expected, actual = (score_facts(model, prompts, FACTS) for model in (plain, other))
    assert other.given == used  # of the last forward
    assert torch.allclose(actual.margin, expected.margin, rtol=0, atol=1e-5)
    assert torch.allclose(actual.probability.log(), expected.probability.log(), rtol=0, atol=1e-4)
