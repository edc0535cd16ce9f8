"""The forward of a patched MLP: its own projections, called as modules, and one kernel between them."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from ..patched_forward import install_forward, is_replaced, remove_forward
from .mlp import FORMS, Observer, observed_hidden
from .recognise import Mlp, has_own_hooks


class PatchedMlp:
    """One MLP on the kernels, from its construction until `remove`.

    The projections are called as modules: their hooks and autocast rules stay in force. Where the kernel would not do
    what the class's own forward does (`_why_not`), that one runs.

    Attributes:
        mlp: the MLP.
        observer: carries out the backward of the hidden activation; None: autograd does.
    """

    def __init__(self, name: str, mlp: Mlp, backend: str, observer: Observer | None):
        self.name, self.mlp, self.observer = name, mlp, observer
        self._form, self._fused = FORMS[mlp.form], mlp.fused
        self._options = {"activation": mlp.activation, "backend": backend}
        compute = {"gated": self._gated, "packed": self._packed, "ungated": self._ungated}[mlp.form]

        def forward(module: nn.Module, *args, **kwargs) -> Tensor:
            given = (*args, *kwargs.values())  # the class has a name of its own for its one argument
            why_not = self._why_not(module, given)
            if why_not is None:
                return compute(module, *given)
            if self.observer is not None:
                self.observer.bypassed(name, why_not)
            return type(module).forward(module, *args, **kwargs)

        install_forward(mlp.patched, forward)

    def remove(self) -> None:
        """Give the module its own forward back."""
        remove_forward(self.mlp.patched)

    def _why_not(self, module: nn.Module, given: tuple) -> str | None:
        if len(given) != 1:
            return f"it was called with {len(given)} arguments; expected its input alone"
        if given[0].numel() == 0:
            return "its input is empty"
        if self.mlp.form == "ungated":
            return None
        if getattr(module, self.mlp.function_name) is not self.mlp.function:
            return f"its {self.mlp.function_name} was replaced since; patch the model again"
        if any(has_own_hooks(part) or is_replaced(part) for part in self._fused) or all_modules._has_any_global_hook():
            return f"its {self.mlp.function_name} carries hooks or another forward, which a fused one does not call"
        return None

    def _gated(self, module: nn.Module, x: Tensor) -> Tensor:
        return module.down_proj(self._hidden(module.gate_proj(x), module.up_proj(x)))

    def _packed(self, module: nn.Module, x: Tensor) -> Tensor:
        return module.down_proj(self._hidden(module.gate_up_proj(x)))

    def _ungated(self, _module: nn.Module, x: Tensor) -> Tensor:
        return self._hidden(x)

    def _hidden(self, *inputs: Tensor) -> Tensor:
        """`h`. The ops take `[T, D]` and `[B, S, D]`; a module may see any shape."""
        lead = inputs[0].shape[:-1]
        if len(lead) not in (1, 2):
            inputs = tuple(x.reshape(-1, x.shape[-1]) for x in inputs)
        if self.observer is None:
            h = self._form.forward(*inputs, **self._options)
        else:
            h = observed_hidden(self.observer, self.name, self._form, self._options, inputs)
        return h if len(lead) in (1, 2) else h.reshape(*lead, h.shape[-1])
