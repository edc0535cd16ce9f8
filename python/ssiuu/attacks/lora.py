"""Low-rank adapters (LoRA) on a model, by peft."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, set_seed
from transformers.pytorch_utils import Conv1D


def add_lora(model: PreTrainedModel, rank: int, alpha: float, modules: Sequence[str] | None, seed: int) -> None:
    """Add trainable adapters to linear layers; all other parameters are frozen. The outputs stay as they are.

    Args:
        rank: r of the adapters.
        alpha: their products are scaled by alpha / rank.
        modules: names of the layers, such as "q_proj"; None takes all linear layers except the output head.
        seed: of the adapters' first weights.

    Raises:
        ValueError: a name that no module has, or a module that cannot have an adapter.
    """
    from peft import LoraConfig, inject_adapter_in_model  # an extra

    for name in modules or ():
        if not any(f".{found}".endswith(f".{name}") for found, _ in model.named_modules()):
            raise ValueError(
                f"lora_modules={list(modules)}: the model has no module {name!r}; expected names of its linear layers, "
                "or leave --lora-modules out to take all of them"
            )
    set_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(modules) if modules else "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's transposed layers
    )
    inject_adapter_in_model(config, model)
