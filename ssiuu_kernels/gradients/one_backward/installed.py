"""The modules of a model whose forwards run on stand-ins, and what else a patched model needs for its one backward."""

from __future__ import annotations

import torch
from torch import nn

from ...patched_forward import is_replaced
from ..compiled import keep_buffers, release_buffers
from .parameter import install, remove


class RowForwards:
    """Puts every module that owns parameters on stand-ins (`parameter.py`), and takes them away again.

    A module whose forward another library has replaced, or that is scripted, is left as it is.

    Args:
        grad_dtype: of the gradients of all trainable parameters; None: the parameter's.

    Attributes:
        modules: those on stand-ins.
    """

    def __init__(self, model: nn.Module, grad_dtype: torch.dtype | None):
        self.modules = [
            module
            for module in model.modules()
            if any(True for _ in module.parameters(recurse=False))
            and not is_replaced(module)
            and not isinstance(module, torch.jit.ScriptModule)
        ]
        for module in self.modules:
            install(module)
        keep_buffers()
        self._dtypes: list[tuple[nn.Parameter, torch.dtype]] = []
        for param in model.parameters() if grad_dtype is not None else ():
            if param.requires_grad and param.dtype in (torch.bfloat16, torch.float16):
                self._dtypes.append((param, param.grad_dtype))
                param.grad_dtype = grad_dtype

    def remove(self) -> None:
        """Leave the model as it was."""
        release_buffers()
        for module in self.modules:
            remove(module)
        for param, dtype in self._dtypes:
            param.grad = param.target_grad = None  # of another type than the one that is allowed again
            param.grad_dtype = dtype
