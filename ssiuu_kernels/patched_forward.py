"""Methods that are put on one module instance, and that no copy of it takes along.

`module.forward = function` lands in the module's `__dict__`, which a copy, a pickle and a replica of `DataParallel`
take over: they would call the original with its parameters. So a module that carries something of this package also
carries a `__getstate__` and a `_replicate_for_data_parallel` that leave it out: a copy is the plain module, which can
be patched afresh, and a pickle needs nothing of this package to be loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn


class InstanceMethod:
    """`function(module, ...)` as a method of one module, in place of its class's method `name`.

    A class that copies or pickles its attributes one by one gets the class's own method, bound to the copy.
    """

    def __init__(self, module: nn.Module, name: str, function: Callable):
        self.module, self.name, self.function = module, name, function

    def __call__(self, *args, **kwargs):
        return self.function(self.module, *args, **kwargs)

    def __deepcopy__(self, memo: dict) -> MethodType:
        module = copy.deepcopy(self.module, memo)
        return MethodType(getattr(type(module), self.name), module)

    def __reduce__(self):
        return getattr, (self.module, self.name)


class PatchedForward(InstanceMethod):
    """The forward of a patched module; inside a `torch.func` transform, whose tensors our functions do not know, while
    it is suspended, and after `remove_forward`, its class's own.
    """

    def __init__(self, module: nn.Module, function: Callable):
        super().__init__(module, "forward", function)
        self.active, self.suspended = True, False

    @property
    def __wrapped__(self) -> MethodType:
        """The class's own forward, whose signature `inspect.signature` gives."""
        return MethodType(type(self.module).forward, self.module)

    def __call__(self, *args, **kwargs):
        if not self.active or self.suspended or _inside_a_transform():
            return type(self.module).forward(self.module, *args, **kwargs)
        return self.function(self.module, *args, **kwargs)


def _inside_a_transform() -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def install_forward(module: nn.Module, function: Callable) -> None:
    """Run `function(module, ...)` as the forward of this module, until `remove_forward`."""
    vars(module)["forward"] = forward = PatchedForward(module, function)
    for name, guard in _GUARDS.items():
        vars(module)[name] = InstanceMethod(module, name, guard)
    vars(module)["__getstate__"].forward = forward


def remove_forward(module: nn.Module) -> None:
    """Give the module its class's forward back.

    Where another library has put its own on top since, that one stays, and ours below it becomes the class's.
    """
    forward = vars(module)["__getstate__"].forward
    forward.active = False
    if vars(module).get("forward") is forward:
        del vars(module)["forward"]
    for name in _GUARDS:
        del vars(module)[name]


@contextmanager
def suspend_forwards(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run these patched modules' own classes' forwards inside; they stay patched."""
    forwards = [vars(module)["__getstate__"].forward for module in modules]
    for forward in forwards:
        forward.suspended = True
    try:
        yield
    finally:
        for forward in forwards:
            forward.suspended = False


def is_patched(module: nn.Module) -> bool:
    """Whether the module's forward is ours."""
    forward = vars(module).get("forward")
    return isinstance(forward, PatchedForward) and forward.active


def is_replaced(module: nn.Module) -> bool:
    """Whether the module's forward is another one than its class's, ours included."""
    forward = vars(module).get("forward")
    if isinstance(forward, PatchedForward):
        return forward.active
    own = getattr(forward, "__self__", None) is module and forward.__func__ is type(module).forward
    return forward is not None and not own


def _plain_state(module: nn.Module) -> Any:
    of_class = getattr(type(module), "__getstate__", None)  # `object` has one from Python 3.11 on
    state = vars(module) if of_class is None else of_class(module)
    if isinstance(state, dict):
        return _plain(state)
    return (_plain(state[0]), *state[1:]) if isinstance(state, tuple) and isinstance(state[0], dict) else state


def _plain_replica(module: nn.Module) -> nn.Module:
    replica = type(module)._replicate_for_data_parallel(module)
    replica.__dict__ = _plain(replica.__dict__)
    return replica


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes of a module without those of this package."""
    return {name: value for name, value in attributes.items() if not isinstance(value, InstanceMethod)}


_GUARDS = {"__getstate__": _plain_state, "_replicate_for_data_parallel": _plain_replica}
