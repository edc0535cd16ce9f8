"""The modules of a model whose forwards run on stand-ins, and what else a patched model needs for its one backward."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from .parameter import batch_size, install, remove


class RowForwards:
    """Puts every module that owns parameters on stand-ins (`parameter.py`), and takes them away again.

    A module inside a skipped MLP, or whose forward another library has replaced, is left as it is.

    Args:
        skipped: names of modules to leave alone, with what is inside them.
        grad_dtype: of the gradients of all trainable parameters; None: the parameter's.
    """

    def __init__(self, model: nn.Module, skipped: Collection[str], grad_dtype: torch.dtype | None):
        self._modules = [
            module
            for name, module in model.named_modules()
            if any(True for _ in module.parameters(recurse=False))
            and "forward" not in vars(module)
            and not any(name == outer or name.startswith(f"{outer}.") for outer in skipped)
        ]
        for module in self._modules:
            install(module)
        self._hooks = [
            model.register_forward_pre_hook(_enter, with_kwargs=True),
            model.register_forward_hook(_leave, always_call=True),
        ]
        self._dtypes: list[tuple[nn.Parameter, torch.dtype]] = []
        for param in model.parameters() if grad_dtype is not None else ():
            if param.requires_grad and param.dtype in (torch.bfloat16, torch.float16):
                self._dtypes.append((param, param.grad_dtype))
                param.grad_dtype = grad_dtype

    def remove(self) -> None:
        """Leave the model as it was."""
        for module in self._modules:
            remove(module)
        for hook in self._hooks:
            hook.remove()
        for param, dtype in self._dtypes:
            param.grad = param.target_grad = None  # of another type than the one that is allowed again
            param.grad_dtype = dtype


def _enter(_module: nn.Module, args: tuple, kwargs: Mapping) -> None:
    given = [*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    samples = next((len(value) for value in given if isinstance(value, Tensor)), None)
    batch_size.set(samples)


def _leave(_module: nn.Module, _args: tuple, _output: object) -> None:
    batch_size.set(None)
