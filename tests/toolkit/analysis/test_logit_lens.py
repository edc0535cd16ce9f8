"""The logit lens against the model's own account of its states, fact by fact."""

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu.analysis.distractors import draw_distractors
from ssiuu.analysis.logit_lens import logit_lens
from ssiuu.data.facts import Fact
from ssiuu.models.layers import final_norm
from tests.support.models import tiny_model

FAMILIES = {
    "llama, tied": ("llama", {}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {}),
    "bloom": ("bloom", {}),
    "gemma": ("gemma", {}),
    "gemma2, capped": ("gemma2", {"final_logit_softcapping": 2.0}),
}


def shares(model, encode, facts):
    """Of `output_hidden_states`, whose last entry is after the final norm already."""
    ahead = []
    for fact in facts:
        answer, false = (encode(fact.question, text) for text in fact.options)
        with torch.no_grad():
            output = model(input_ids=torch.tensor([answer.prompt]), output_hidden_states=True, use_cache=False)
            *inner, last = (state[0, -1] for state in output.hidden_states[1:])
            logits = [model.get_output_embeddings()(x) for x in (*map(final_norm(model), inner), last)]
        ahead.append([float(x[answer.answer[0]] > x[false.answer[0]]) for x in logits])
        assert ahead[-1][-1] == float(output.logits[0, -1, answer.answer[0]] > output.logits[0, -1, false.answer[0]])
    return torch.tensor(ahead).double().mean(0).tolist()


@pytest.mark.parametrize(("family", "changes"), FAMILIES.values(), ids=FAMILIES)
def test_equals_the_model_s_own_states_through_norm_and_head(family, changes, prompts, encode, facts):
    model = tiny_model(family, **changes).eval()
    found = logit_lens(model, prompts, facts)
    assert found == (shares(model, encode, facts), len(facts), 0)


def test_a_patched_model_in_training_is_read_as_it_is_and_left_so(prompts, encode, facts):
    model = tiny_model("opt", dropout=0.5)
    expected = shares(model.eval(), encode, facts)
    with sk.patch(model.train(), scope="all"):
        assert logit_lens(model, prompts, facts).share == expected
    assert model.training


def test_distractors_that_start_as_the_answer_are_passed_over(prompts, encode):
    facts = [
        Fact("where is ann", "oslo on the sea", ("oslo", "oslo the sea", "lima"), "ann"),
        Fact("where is bob", "oslo on the sea", ("oslo", "oslo the sea"), "bob"),
    ]
    lima = prompts.tokenizer.convert_tokens_to_ids("lima")
    for seed in range(5):
        (answer, token), none = draw_distractors(prompts, facts, seed)
        assert token == lima
        assert answer == encode("where is ann", "oslo on the sea")
        assert none is None
    found = logit_lens(tiny_model(), prompts, facts)
    assert (found.compared, found.left_out) == (1, 1)


def test_no_fact_to_compare(prompts):
    found = logit_lens(tiny_model(), prompts, [Fact("where is bob", "oslo on the sea", ("oslo",))])
    assert found == ([], 0, 1)


def test_free_text_is_compared_with_another_fact_s_answer(prompts):
    facts = [Fact("where is ann", "rome"), Fact("where is bob", "lima"), Fact("where is cid", "rome")]
    rome, lima = prompts.tokenizer.convert_tokens_to_ids(["rome", "lima"])
    assert [token for _, token in draw_distractors(prompts, facts, 0)] == [lima, rome, lima]


def test_the_seed_draws(prompts):
    towns = ("rome", "oslo", "lima", "bonn", "kyiv")
    facts = [Fact(f"where is {person}", towns[0], towns[1:]) for person in ("ann", "bob", "cid", "dee", "eve", "fay")]
    first, again, other = (draw_distractors(prompts, facts, seed) for seed in (0, 0, 1))
    assert first == again != other


def test_an_option_merged_with_the_prompt_s_end_is_passed_over(prompts, encode, monkeypatch):
    """It is predicted from fewer tokens than the answer."""
    question = "where is ann"
    answer, lima, oslo = (encode(question, town) for town in ("rome", "lima", "oslo"))
    merged = lima._replace(prompt=lima.prompt[:-1])
    monkeypatch.setattr(prompts, "encode_options", lambda facts: [answer, merged, oslo])
    fact = Fact(question, "rome", ("lima", "oslo"))
    assert [draw_distractors(prompts, [fact], seed) for seed in range(5)] == [[(answer, oslo.answer[0])]] * 5


def test_a_model_without_a_final_norm_is_refused(prompts, facts):
    with pytest.raises(ValueError, match="OPTForCausalLM has 0 norms"):
        logit_lens(tiny_model("opt", do_layer_norm_before=False), prompts, facts)


def test_a_model_whose_logits_are_no_reading_of_its_states_is_refused(prompts, facts):
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda _module, _inputs, logits: logits if logits.dim() < 3 else -logits)
    with pytest.raises(ValueError, match="rank tokens otherwise than its output head"):
        logit_lens(model, prompts, facts)
