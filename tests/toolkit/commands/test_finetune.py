"""Fine-tuning the tiny model on the facts."""

import json

import pytest
import torch

from ssiuu.commands.finetune import finetune
from ssiuu.data.prompts import PromptFormat
from ssiuu.models.load import load_model
from ssiuu.options import FinetuneOptions
from tests.support.small_runs import KilledError, kill_after, lines


def test_finetuning_teaches_the_facts(model_dir, facts_file, tmp_path):
    options = FinetuneOptions(model=str(model_dir), facts=str(facts_file), steps=60, learning_rate=1e-2)
    run = finetune(options, tmp_path / "taught")
    found = run.read("evaluation.json")
    assert found["after"]["retain_probability"] > 3 * found["before"]["retain_probability"]


def test_finetuning_teaches_where_an_answer_ends(model_dir, facts_file, tmp_path):
    options = FinetuneOptions(model=str(model_dir), facts=str(facts_file), steps=60, learning_rate=1e-2)
    run = finetune(options, tmp_path / "taught")
    model, tokenizer = load_model(run.model)
    prompts = PromptFormat(tokenizer, 0)
    (sample,) = prompts.encode_prompts([prompts.question("where ann born")])
    output = model.generate(torch.tensor([sample.prompt]), do_sample=False, max_new_tokens=10)[0, len(sample.prompt) :]
    assert output[1] == tokenizer.eos_token_id  # after one word of an answer


def test_finetuning_begins_again_what_was_broken_off(model_dir, facts_file, tmp_path, monkeypatch):
    options = FinetuneOptions(model=str(model_dir), facts=str(facts_file), steps=2)
    with monkeypatch.context() as patched:
        kill_after(patched, 1)
        with pytest.raises(KilledError):
            finetune(options, tmp_path / "taught")
    run = finetune(options, tmp_path / "taught")
    assert [line["step"] for line in lines(run)] == [1, 2]


@pytest.mark.parametrize("status", ["running", "complete"])
def test_finetuning_begins_no_other_run_again(tmp_path, facts_file, status):
    method = "finetune" if status == "complete" else "gd"
    (tmp_path / "config.json").write_text(json.dumps({"status": status, "method": method}))
    with pytest.raises(ValueError, match=r"exists; choose another$"):
        finetune(FinetuneOptions(facts=str(facts_file)), tmp_path)


def test_finetuning_does_not_speak_of_resuming(model_dir, facts_file, tmp_path):
    (tmp_path / "taught").mkdir()
    (tmp_path / "taught" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"exists; choose another$"):
        finetune(FinetuneOptions(model=str(model_dir), facts=str(facts_file)), tmp_path / "taught")
