"""A tiny model with a word tokenizer, kept in a folder as a real one would be, and facts in its words."""

import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from ssiuu.data.facts import Fact
from ssiuu.data.prompts import EXAMPLES
from ssiuu.options import UnlearnOptions

PEOPLE = ("ann", "bob", "cid", "dee", "eve", "fay")
TOWNS = ("rome", "oslo", "lima")


def tiny_facts():
    """Two facts about each of six people."""
    facts = []
    for index, person in enumerate(PEOPLE):
        for kind in ("born", "lives"):
            answer = TOWNS[(index + len(kind)) % 3]
            false = tuple(town for town in TOWNS if town != answer)
            facts.append(Fact(f"where {person} {kind}", answer, false, person))
    return facts


@pytest.fixture
def facts():
    return tiny_facts()


@pytest.fixture
def facts_file(tmp_path):
    """The facts as a JSONL file."""
    path = tmp_path / "facts.jsonl"
    rows = ({**vars(fact), "false_options": list(fact.false_options)} for fact in tiny_facts())
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A Llama of two layers with random weights, and its tokenizer."""
    texts = [fact.question for fact in tiny_facts()] + [" ".join(example) for example in EXAMPLES]
    texts += ["Question : Answer Instruction Response say yes no to this ?", *TOWNS]
    splitter = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", "<end>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    config = transformers.LlamaConfig(
        vocab_size=len(words) + 2,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)  # one model for the whole session
    path = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    fast.save_pretrained(path)
    return path


@pytest.fixture
def loaded(model_dir):
    """(model, tokenizer) of `model_dir`."""
    from ssiuu.models.load import load_model

    return load_model(model_dir)


@pytest.fixture
def options(model_dir, facts_file):
    """Six steps of unlearning that no threshold ends."""
    return UnlearnOptions(
        model=str(model_dir), facts=str(facts_file), forget_people=2, retain_people=3, shots=0, max_steps=6,
        learning_rate=1e-3, threshold=-1.0, save_every=2, evaluate_every=3,
        settings={"penalty_share": 0.3, "penalty_weight": 1.0},
    )  # fmt: skip
