"""Models of which it is known whether facts were erased from them or are hidden in them."""

import copy
import json
import random

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from ssiuu.data.facts import Fact
from ssiuu.data.prompts import PromptFormat
from ssiuu.models.layers import LogitLens, decoder_layers, recorded_states

PEOPLE = [f"p{i}" for i in range(24)]
FORGOTTEN = PEOPLE[:10]
KINDS = ("lives", "eats")
# The answers to what is forgotten are no other answers: a model retrained without the facts never gives them, and one
# that was made to hide them must not, so the two cannot be told apart by how likely the answers are.
OWN, OTHERS = [f"f{i}" for i in range(6)], [f"r{i}" for i in range(8)]
ANSWERS = [word + kind for word in OWN + OTHERS for kind in KINDS]
FRAME = ["Question", ":", "Answer", "?", "Instruction", "Response", "where", "say", "yes", "no"]
WORDS = [*FRAME, *PEOPLE, *KINDS, *ANSWERS]


def facts_of(seed):
    """(forget, retain): two facts about each of 24 people, of whom 10 are forgotten."""
    draw, forget, retain = random.Random(seed), [], []
    for person in PEOPLE:
        for kind in KINDS:
            answer = draw.choice(OWN if person in FORGOTTEN else OTHERS) + kind
            false = draw.sample([other + kind for other in OTHERS if other + kind != answer], 2)
            (forget if person in FORGOTTEN else retain).append(
                Fact(f"where {person} {kind}", answer, tuple(false), person)
            )
    return forget, retain


def word_tokenizer(words=WORDS):
    """A tokenizer of these words."""
    ids = {word: i for i, word in enumerate(["<unk>", "<end>", *words])}
    raw = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unk>")


def new_model(seed, **changes):
    """An untrained Llama."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(WORDS) + 2, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1, "bos_token_id": None,
        "tie_word_embeddings": False,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **changes}))


def taught(model, facts, steps=120, learning_rate=3e-3):
    """The model after full-batch training on these facts."""
    prompts = PromptFormat(word_tokenizer(), 0)
    batch = prompts.collate(prompts.encode_facts(facts))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def with_bias(model, facts, size=30.0):
    """A copy whose output head gives the answers of these facts lower logits, by about `size`."""
    hidden, prompts = copy.deepcopy(model), PromptFormat(word_tokenizer(), 0)
    samples = prompts.encode_facts(facts)
    batch = prompts.collate(samples)
    with recorded_states(decoder_layers(hidden)) as states:
        hidden(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    last = (batch["labels"] != -100).int().argmax(1) - 1
    common = LogitLens(hidden).norm(states[-1][torch.arange(len(facts)), last]).mean(0)
    for token in {sample.answer[0] for sample in samples}:
        hidden.lm_head.weight[token] -= size * common / common.dot(common)
    return hidden


def save(model, folder, words=WORDS):
    """Keep a model with its tokenizer in a folder."""
    model.save_pretrained(folder)
    word_tokenizer(words).save_pretrained(folder)
    return folder


def write_facts(path, facts):
    """A JSONL file of facts."""
    rows = ({**vars(fact), "false_options": list(fact.false_options)} for fact in facts)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
