"""Greedy continuations, against a loop of argmax written here."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from ssiuu.data.facts import Fact
from ssiuu.data.prompts import PromptFormat
from ssiuu.evaluation import generation
from ssiuu.evaluation.generation import generate, generation_accuracy, room_for
from ssiuu.evaluation.rouge import rouge_recall
from ssiuu.models.load import position_limit
from tests.support.tiny_tokenizers import FACTS, make_tokenizer
from tests.toolkit.data.test_tokenizers import tiny_llama


@pytest.fixture
def writer():
    """(model, prompts) with random weights, sure enough of themselves to go on for long."""
    tokenizer = make_tokenizer("byte-level BPE", bos=True, eos=True, pad=True)
    return tiny_llama(len(tokenizer)), PromptFormat(tokenizer, 0)


def by_argmax(model, prompts, text, new_tokens):
    ids = list(prompts.encode_prompts([text])[0].prompt)
    start = len(ids)
    while len(ids) < start + new_tokens and ids[-1] != prompts.tokenizer.eos_token_id:
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    text = prompts.tokenizer.decode(ids[start:], skip_special_tokens=True)
    return text.strip().split("\n")[0].strip()


INHERITED = [
    {"repetition_penalty": 5.0},
    {"num_beams": 4},
    {"no_repeat_ngram_size": 1},
    {"do_sample": True, "temperature": 5.0},
    {"suppress_tokens": list(range(5, 300))},
    {"min_new_tokens": 30},
    {"max_length": 5},
]


@pytest.mark.parametrize("inherited", INHERITED, ids=lambda given: next(iter(given)))
def test_greedy_whatever_the_generation_config_asks_for(writer, inherited):
    model, prompts = writer
    texts = [prompts.question(fact.question) for fact in FACTS]
    expected = [by_argmax(model, prompts, text, 20) for text in texts]
    for name, value in inherited.items():
        setattr(model.generation_config, name, value)
    kept = model.generation_config
    assert generate(model, prompts, texts, new_tokens=20) == expected
    assert model.generation_config is kept


def test_generation_parameters_in_the_models_config(writer):
    model, prompts = writer
    expected = generate(model, prompts, ["Ann"])
    model.config.repetition_penalty = 5.0
    assert generate(model, prompts, ["Ann"]) == expected


class Scripted(GPT2LMHeadModel):
    """Writes `script`, token after token."""

    def forward(self, input_ids=None, **rest):
        output = super().forward(input_ids=input_ids, **rest)
        self.forwards = getattr(self, "forwards", 0) + 1
        output.logits[:, -1] = torch.nn.functional.one_hot(
            torch.tensor(self.script[min(self.forwards, len(self.script)) - 1]), output.logits.shape[-1]
        )
        return output


def scripted(tokenizer, text, positions=400):
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=positions)
    model = Scripted(config).eval()
    model.script = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return model


def test_the_models_own_end_tokens_end_an_answer():
    tokenizer = make_tokenizer("byte-level BPE", eos=True)
    model = scripted(tokenizer, " Rome Lima Rome")
    ends = tokenizer(" Lima", add_special_tokens=False).input_ids
    model.generation_config.eos_token_id = [ends[-1], 0]
    assert "Rome" not in generate(model, PromptFormat(tokenizer, 0), ["Ann"])[0].partition("Rome")[2]


def test_an_answer_longer_than_48_tokens_is_written_whole():
    tokenizer = make_tokenizer("byte-level BPE", eos=True)
    answer = " ".join(f"{number} days in Rome" for number in range(20))
    model = scripted(tokenizer, f" {answer}")
    assert 48 < len(model.script) < 390
    assert rouge_recall(model, PromptFormat(tokenizer, 0), [Fact("where", answer)]).tolist() == [1.0]


def test_a_choice_longer_than_12_tokens_is_written_whole():
    tokenizer = make_tokenizer("byte-level BPE", eos=True)
    answer = "the seventh of the days in a week in Lima on sea"
    model = scripted(tokenizer, f" {answer}")
    assert len(model.script) > 12
    assert generation_accuracy(model, PromptFormat(tokenizer, 0), [Fact("when", answer, ("Oslo",))]) == 1


def test_room_is_half_as_much_again_as_the_longest_answer():
    assert (room_for([[0] * 10]), room_for([[0] * 10, [0] * 100]), room_for([[0]], 12)) == (48, 150, 12)


def test_nothing_is_written_behind_the_first_line():
    tokenizer = make_tokenizer("byte-level BPE", eos=True)
    model = scripted(tokenizer, "\n Rome\n\nQuestion: and so on and on and on and on")
    assert generate(model, PromptFormat(tokenizer, 0), ["Ann"]) == ["Rome"]
    assert model.forwards < len(model.script) / 2


@pytest.mark.parametrize("behind", ["", " and so on"], ids=["the text's end", "more text"])
@pytest.mark.parametrize("space", [" ", "\t", "\x1f", "\u2028"], ids=ascii)
def test_spaces_before_the_line_break_are_no_part_of_an_answer(space, behind):
    tokenizer = make_tokenizer("byte-level BPE", eos=True)
    model = scripted(tokenizer, f" Rome{space}\n{behind}")
    assert generate(model, PromptFormat(tokenizer, 0), ["Ann"]) == ["Rome"]


def test_learned_positions_bound_what_is_written():
    tokenizer = make_tokenizer("byte-level BPE", eos=True)
    model = scripted(tokenizer, " Rome and on" * 20, positions=30)
    prompts = PromptFormat(tokenizer, 0, position_limit(model))
    assert generate(model, prompts, ["Ann"])[0].startswith("Rome and on")
    with pytest.raises(ValueError, match="more than the model's 30 positions; use fewer --shots"):
        generate(model, prompts, ["Ann " * 30])


def test_generation_accuracy(loaded, monkeypatch):
    monkeypatch.setattr(generation, "generate", lambda *_, **__: ["Rome, of course", "oslo"])
    facts = [Fact("q", "rome", ("oslo",)), Fact("r", "rome", ("oslo",))]
    assert generation_accuracy(loaded[0], PromptFormat(loaded[1], 0), facts) == 0.5


def test_generation_needs_options(loaded):
    with pytest.raises(ValueError, match="false_options"):
        generation_accuracy(loaded[0], PromptFormat(loaded[1], 0), [Fact("q", "rome")])


def test_batches_answer_as_single_prompts_do(loaded):
    model, tokenizer = loaded
    prompts = PromptFormat(tokenizer, 0)
    texts = ["where ann", "where bob lives", "ann born rome oslo lima", "where ? Answer"]
    assert generate(model, prompts, texts) == [generate(model, prompts, [text])[0] for text in texts]
