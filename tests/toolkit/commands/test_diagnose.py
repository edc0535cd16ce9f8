"""Diagnosing finished runs of tiny models, against the measurements of the models themselves."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssiuu.analysis.influence import summarise, variation_by_kind
from ssiuu.analysis.measure import measure_influence
from ssiuu.commands import diagnose
from ssiuu.commands.diagnose import diagnose_runs
from ssiuu.data.facts import Fact
from ssiuu.data.prompts import PromptFormat
from ssiuu.options import DiagnoseOptions
from tests.support.models import other_weights, tiny_model

FACTS = [
    Fact(f"question {i}", answer) for i, answer in enumerate(["Paris", "Hamlet by Shakespeare", "Rome", "a b c", "x"])
]


def tokenizer():
    """A tokenizer whose tokens are characters."""
    characters = {chr(i): i - 31 for i in range(32, 91)} | {"\n": 0}
    raw = Tokenizer(models.WordLevel(characters, unk_token=" "))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token=" ", pad_token="\n")


def write_run(path, original, unlearned, facts):
    config = {"status": "complete", "model": str(original), "dtype": "float32", "shots": 0, "method": "gd"}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    sets = {"forget": [asdict(fact) for fact in facts], "retain": [], "test": []}
    (path / "split.json").write_text(json.dumps(sets))
    save(unlearned, path / "model")
    return path


def save(model, path):
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def family(tmp_path):
    """The folder of an original model, and two models unlearned from it."""
    torch.manual_seed(0)
    original = tiny_model().eval()
    return save(original, tmp_path / "original"), original, [other_weights(original), other_weights(original)]


def test_run_folders_get_what_the_models_give(family, tmp_path):
    path, original, unlearned = family
    runs = [write_run(tmp_path / f"run{i}", path, model, FACTS) for i, model in enumerate(unlearned)]
    summaries = diagnose_runs(runs, DiagnoseOptions(batch_size=2))
    prompts = PromptFormat(tokenizer(), 0)
    batch = prompts.collate(prompts.encode_facts(FACTS))
    before = measure_influence(original, [batch])
    for run, model, summary in zip(runs, unlearned, summaries, strict=True):
        expected = variation_by_kind(before, measure_influence(model, [batch]))
        written = load_file(run / "diagnosis.safetensors")
        assert set(written) == {f"{name}.{kind}" for kind in before for name in ("d_plus", "d_minus")}
        for kind, variation in expected.items():
            assert torch.allclose(written[f"d_minus.{kind}"], variation.d_minus, rtol=1e-3, atol=1e-12), kind
        assert summary == json.loads((run / "diagnosis.json").read_text())
        assert summary["sum"]["d_plus"] == pytest.approx(summarise(expected)["sum"]["d_plus"], rel=1e-3)
        assert summary["samples"] == len(FACTS)


def test_runs_share_the_original_only_with_the_same_facts(family, tmp_path, monkeypatch):
    path, _, (first, second) = family
    loaded, load_model = [], diagnose.load_model
    monkeypatch.setattr(
        diagnose, "load_model", lambda name, **options: loaded.append(name) or load_model(name, **options)
    )
    runs = [
        write_run(tmp_path / "a", path, first, FACTS),
        write_run(tmp_path / "b", path, second, FACTS),
        write_run(tmp_path / "c", path, second, FACTS[:2]),
    ]
    diagnose_runs(runs)
    assert loaded == [str(name) for name in (path, runs[0] / "model", runs[1] / "model", path, runs[2] / "model")]


def test_unfinished_run_is_refused_before_any_work(family, tmp_path):
    path, _, (first, second) = family
    runs = [write_run(tmp_path / "a", path, first, FACTS), write_run(tmp_path / "b", path, second, FACTS)]
    config = json.loads((runs[1] / "config.json").read_text())
    (runs[1] / "config.json").write_text(json.dumps(config | {"status": "running"}))
    with pytest.raises(ValueError, match="b is not finished"):
        diagnose_runs(runs)
    assert not (runs[0] / "diagnosis.json").exists()


def test_batch_size(tmp_path):
    with pytest.raises(ValueError, match="batch_size=0"):
        diagnose_runs([tmp_path], DiagnoseOptions(batch_size=0))
