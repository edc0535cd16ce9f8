"""Models by hub name or local folder, or the packaged one."""

from __future__ import annotations

import logging
import re
import tempfile
import textwrap
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar
from transformers.utils.quantization_config import QuantizationConfigMixin

from .smollm2 import PACKAGED, packaged_model

logger = logging.getLogger(__name__)

# The toolkit shows its own progress; a second set of bars would break its lines.
disable_progress_bar()

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    device_map: str | None = None,
    trust_remote_code: bool = False,
    quantization_config: QuantizationConfigMixin | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, on a GPU where there is one.

    Args:
        name: a hub name, a local folder with safetensors, or "smollm2".
        revision: branch, tag or commit of a model on the hub.
        dtype: "float32", "bfloat16" or "float16".
        attn_implementation: transformers' attention, such as "eager" or "sdpa".
        device_map: as transformers has it; all weights must come to be on the device that is used without one.
        trust_remote_code: run code that comes with the model; off unless asked for.
        quantization_config: rounds the weights as they are read, such as transformers' BitsAndBytesConfig.

    Raises:
        ValueError: unknown dtype, a folder without a model, a revision of a local model, a checkpoint that does not fit
            its configuration, or a device_map that spreads or offloads the model.
        FileNotFoundError: "smollm2" without its package.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; expected one of {', '.join(DTYPES)}")
    source = packaged_model() if str(name) == PACKAGED else name
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ValueError(f"{source} is not a model folder; expected config.json and safetensors in it")
    if revision is not None and Path(source).is_dir():
        raise ValueError(f"revision={revision!r} of {name}, which is local; expected a hub name, or no revision")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
        model, loading = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=DTYPES[dtype],
            attn_implementation=attn_implementation,
            device_map=device_map,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            quantization_config=quantization_config,
            output_loading_info=True,
        )
    except ImportError as error:  # a package that this model or its tokenizer needs
        raise ValueError(f"model {name} needs a package: {textwrap.shorten(str(error), 400)}") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"model {name} could not be loaded: {textwrap.shorten(str(error), 400)}; "
            "expected a hub name that can be reached, or a folder with config.json and complete safetensors"
        ) from error
    except RuntimeError as error:  # weights of other sizes than the configuration says
        raise ValueError(f"the checkpoint of {name} does not fit its configuration: {error}") from error
    unfit = [*loading["missing_keys"], *loading["unexpected_keys"], *loading["mismatched_keys"]]
    if unfit:
        raise ValueError(
            f"the checkpoint of {name} does not fit its configuration: {len(unfit)} weights, first {unfit[0]}"
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings:
        # Added to the tokenizer alone: the model has no row for it. Padding is masked, so any other token will do.
        tokenizer.pad_token = None
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if device_map is not None:
        _check_devices(model, device, device_map)
    _make_saveable(model, name)
    return model.to(device), tokenizer


def _check_devices(model: PreTrainedModel, device: torch.device, device_map: str) -> None:
    found = {str(param.device) for param in model.parameters()}  # "meta" where a weight is offloaded
    if found != {str(device)}:
        raise ValueError(
            f"device_map={device_map!r} puts weights on {', '.join(sorted(found))}; expected all on {device}, since "
            "unlearning needs the whole model on one device: use a narrower dtype or a smaller model, or leave "
            "--device-map out"
        )


def position_limit(model: PreTrainedModel) -> int | None:
    """Tokens that the model has learned positions for; None where positions are computed (rotary, ALiBi)."""
    tables = [
        table
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding)
        and re.search(r"position|wpe$", name)
        and not re.search(r"vis|image|audio", name)
    ]
    # OPT keeps `offset` rows to itself, and RoBERTa those up to its padding's.
    kept = [getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1) for table in tables]
    return min((table.num_embeddings - rows for table, rows in zip(tables, kept, strict=True)), default=None)


def _make_saveable(model: PreTrainedModel, name: str | Path) -> None:
    """Replace a generation config that transformers will not save by one with the special tokens alone.

    Transformers before 5 refuses, for example, a temperature without sampling, and only when the first checkpoint is
    written. It moves such settings of the model's own config to the generation config first.
    """
    refused = _refusal_to_save(model)
    if refused is None:
        return
    logger.warning(
        "the generation config of %s cannot be saved (%s); saved models keep only its special tokens",
        name, textwrap.shorten(refused, 200),
    )  # fmt: skip
    kept = {token: getattr(model.generation_config, token) for token in SPECIAL_TOKENS}
    model.generation_config = GenerationConfig(**kept)
    refused = _refusal_to_save(model)
    if refused is not None:
        raise ValueError(f"model {name} could not be saved: {textwrap.shorten(refused, 400)}; correct its config.json")


def _refusal_to_save(model: PreTrainedModel) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder, state_dict={})
        except ValueError as error:
            return str(error)
    return None
