"""What a module is, judged by its parts and by what it computes, never by its class name. Imports no transformers."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.common.activations import ACTIVATIONS, recognise
from ..patched_forward import is_replaced

GATED = ("gate_proj", "up_proj", "down_proj")  # Llama, Mistral, Qwen, SmolLM3, OLMo2, Gemma
PACKED = ("gate_up_proj", "down_proj")  # Phi-3, GLM: gate and up in one projection
# GPT-2; GPT-NeoX, Falcon and Bloom; OPT and Phi; GPT-J and CodeGen; Nemotron, Arcee and MPT: down(act(up(x))), in a
# module of their own or straight in the layer.
UNGATED = (
    ("c_fc", "c_proj"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("fc1", "fc2"),
    ("fc_in", "fc_out"),
    ("up_proj", "down_proj"),
)
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation", "gelu_impl")
# The projections of an attention by the kind under which their outputs are attributed, tried in this order.
QUERIES = (
    {"q": "q_proj", "k": "k_proj", "v": "v_proj"},
    {"qkv": "qkv_proj"},
    {"qkv": "query_key_value"},
    {"qkv": "c_attn"},
    {"qkv": "Wqkv"},
)
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
EXPERTS = "mixture of experts: a token's rows are routed apart, and a sample's no longer stand together"


class UnsupportedModuleError(Exception):
    """Why a module that looks like one of ours cannot be patched."""


@dataclass(frozen=True)
class Mlp:
    """An MLP that the kernels can serve.

    Attributes:
        form: "gated", "packed" or "ungated".
        activation: name in `ops.ACTIVATIONS`.
        owner: the module that holds the projections.
        parts: their names, the down projection last.
        function_name, function: the activation, an attribute of the owner too.
    """

    form: str
    activation: str
    owner: nn.Module
    parts: tuple[str, ...]
    function_name: str
    function: Callable[[Tensor], Tensor]

    @property
    def patched(self) -> nn.Module:
        """The module whose forward is replaced: the MLP, or the activation of an ungated one."""
        return self.function if self.form == "ungated" else self.owner

    @property
    def projections(self) -> tuple[nn.Module, ...]:
        return tuple(getattr(self.owner, part) for part in self.parts)

    @property
    def down(self) -> nn.Module:
        return self.projections[-1]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for projection in self.projections for parameter in projection.parameters()]

    @property
    def fused(self) -> list[nn.Module]:
        """The modules that a fused forward does not call: all inside a gated MLP but its projections."""
        inside = {id(part) for projection in self.projections for part in projection.modules()}
        return [part for part in self.patched.modules() if part is not self.patched and id(part) not in inside]


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model, or one inside it, is called so by its configuration.

    One inside it has to have both parts: the configuration of an encoder that is used alone may still say so.
    """
    return _says_encoder_decoder(model) or any(
        _says_encoder_decoder(module) and _has(module, ("encoder", "decoder")) for module in model.modules()
    )


def _says_encoder_decoder(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "is_encoder_decoder", False) is True


def find_mlps(model: nn.Module) -> tuple[dict[str, Mlp], dict[str, str]]:
    """The MLPs of `model` by name, and the reason for each that has to be left as it is.

    A name is that of the module that holds the projections.
    """
    found: dict[str, Mlp] = {}
    skipped: dict[str, str] = {}
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        if any(name.startswith(f"{outer}.") for outer in skipped):
            continue
        if isinstance(getattr(module, "experts", None), nn.Module):
            skipped[name] = EXPERTS
            continue
        try:
            mlp = _recognise_mlp(module)
        except UnsupportedModuleError as reason:
            skipped[name] = str(reason)
            continue
        if mlp is not None and mlp.form == "ungated" and places[id(mlp.function)] > 1:
            skipped[name] = "its activation module also serves another MLP, whose tokens would be taken for its own"
        elif mlp is not None:
            found[name] = mlp
    return found, skipped


def attention_outputs(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(name, kind, projection) of every attention: "q", "k", "v", or "qkv" where they are one projection; and "o"."""
    for name, module in model.named_modules():
        queries = next((parts for parts in QUERIES if _has(module, parts.values())), None)
        output = next((part for part in OUTPUTS if _has(module, [part])), None)
        if queries and output:
            for kind, part in {**queries, "o": output}.items():
                yield name, kind, getattr(module, part)


def mlp_parts(module: nn.Module) -> tuple[str, tuple[str, ...]] | None:
    """Form and names of the projections of what looks like an MLP by its parts, the down projection last; or None."""
    forms = (("gated", GATED), ("packed", PACKED), *(("ungated", parts) for parts in UNGATED))
    found = next(((form, parts) for form, parts in forms if _has(module, parts)), None)
    if found and found[0] == "ungated" and _activation_name(module) is None:
        return None  # two projections by these names, and nothing between them that we know of
    return found


def _activation_name(module: nn.Module) -> str | None:
    return next((name for name in ACTIVATION_NAMES if hasattr(module, name)), None)


def _has(module: nn.Module, parts) -> bool:
    return all(isinstance(getattr(module, part, None), nn.Module) for part in parts)


def _recognise_mlp(module: nn.Module) -> Mlp | None:
    """The MLP that `module` holds, or None.

    Raises:
        UnsupportedModuleError: it looks like one, but computes something else or cannot be replaced unnoticed.
    """
    found = mlp_parts(module)
    if found is None:
        return None
    form, parts = found
    name = _activation_name(module)
    function = None if name is None else getattr(module, name)
    for part in parts:
        _check_linear(part, getattr(module, part))
    mlp = Mlp(form, _check_activation(function), module, parts, name, function)
    if form == "ungated":
        _check_ungated(mlp)
    else:
        _check_gated(mlp)
    return mlp


def _check_linear(part: str, projection: nn.Module) -> None:
    # A quantised or an adapted layer keeps a weight that means something else, so it is asked for its value.
    if _computes_linear(projection):
        return
    if is_replaced(projection):
        raise UnsupportedModuleError(f"{part}'s forward was already replaced by another library")
    weight = getattr(projection, "_parameters", {}).get("weight")
    came = f"is a {_path(projection)}"
    if type(projection) is nn.Linear and weight is not None:
        came = f"has a weight {weight.dtype} {list(weight.shape)} of class {_path(weight)}"
    raise UnsupportedModuleError(f"{part} {came}; expected a plain linear layer, not a quantised or adapted one")


def _path(value: object) -> str:
    """The class of `value` with its module, which says whose it is."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _check_activation(function: object) -> str:
    if not callable(function):
        raise UnsupportedModuleError(f"it has no activation ({', '.join(ACTIVATION_NAMES)})")
    if isinstance(function, nn.Module):
        if any(has_own_hooks(part) for part in function.modules()):
            raise UnsupportedModuleError("its activation carries hooks, which the fused one would not call")
        if any(True for _ in function.parameters()):
            raise UnsupportedModuleError(
                f"activation {type(function).__name__} has parameters of its own, which the fused one would not train"
            )
    activation = recognise(function)
    if activation is None:
        raise UnsupportedModuleError(f"activation {type(function).__name__} is none of {', '.join(ACTIVATIONS)}")
    return activation


def has_own_hooks(module: nn.Module) -> bool:
    """Whether a call of this very module calls hooks that were registered on it."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _check_ungated(mlp: Mlp) -> None:
    if not isinstance(mlp.function, nn.Module):
        raise UnsupportedModuleError("its activation is a function; expected a module, whose forward can be replaced")
    if is_replaced(mlp.function):
        raise UnsupportedModuleError("its activation's forward was already replaced by another library")
    (_, up_out), (down_in, _) = (_sizes(projection) for projection in mlp.projections)
    if up_out != down_in:
        up, down = mlp.parts
        raise UnsupportedModuleError(f"{up} gives {up_out} features and {down} takes {down_in}")
    # A whole layer cannot be tried; there, the names have to do.
    inside = [parameter for child in mlp.owner.children() for parameter in child.parameters()]
    if len(inside) == len(mlp.parameters) and not _computes_mlp(mlp, training=False):
        raise UnsupportedModuleError(f"{type(mlp.owner).__name__}.forward does not compute down(act(up(x)))")


def _check_gated(mlp: Mlp) -> None:
    if is_replaced(mlp.owner) or any(is_replaced(part) for part in mlp.fused):
        raise UnsupportedModuleError("its forward, or its activation's, was already replaced by another library")
    if any(has_own_hooks(part) for part in mlp.fused):
        raise UnsupportedModuleError("a module inside it carries hooks, which the fused forward would not call")
    # Both modes, for the sake of a dropout.
    if not all(_computes_mlp(mlp, training=training) for training in (False, True)):
        raise UnsupportedModuleError(f"{type(mlp.owner).__name__}.forward does not compute down(act(gate(x)) * up(x))")


def is_transposed(linear: nn.Module) -> bool:
    """Whether its weight is [in, out], as in GPT-2's Conv1D, and not [out, in]."""
    return hasattr(linear, "nf")


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """Features in and out."""
    size = tuple(linear.weight.shape)
    return size if is_transposed(linear) else size[::-1]


def _tiny_twin(linear: nn.Module, features_in: int, features_out: int) -> nn.Module:
    """A layer of the same class with small random float64 weights. Shares everything else, so that it costs nothing."""
    generator = torch.Generator().manual_seed(0)
    shape = (features_in, features_out) if is_transposed(linear) else (features_out, features_in)

    def drawn(*size: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(size, dtype=torch.float64, generator=generator, device="cpu"), False)

    twin = copy.copy(linear)
    parameters = {"weight": drawn(*shape)}
    if linear._parameters.get("bias") is not None:
        parameters["bias"] = drawn(features_out)
    twin._parameters = {**linear._parameters, **parameters}
    for name, size in (
        ("in_features", features_in),
        ("out_features", features_out),
        ("nx", features_in),
        ("nf", features_out),
    ):
        if hasattr(linear, name):
            setattr(twin, name, size)
    return twin


def _computes_linear(layer: nn.Module) -> bool:
    """Whether its class's forward is `x W^T + b` (or `x W + b`, transposed), run on a tiny twin; no hook fires."""
    weight = getattr(layer, "_parameters", {}).get("weight")
    # A quantised weight may be a tensor of another class, with the layer's forward left as it was.
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or weight.dim() != 2:
        return False
    if not weight.is_floating_point() or is_replaced(layer):
        return False
    try:
        twin = _tiny_twin(layer, 4, 8)
        x = _probe()
        with torch.no_grad():
            weight = twin.weight.t() if is_transposed(layer) else twin.weight
            return torch.allclose(type(layer).forward(twin, x), F.linear(x, weight, twin._parameters.get("bias")))
    except Exception:  # a forward that needs more than a weight is no plain linear layer
        return False


def _probe() -> Tensor:
    """Inputs `[4, 4]`, some of them large: a forward that clips its values is found by them."""
    x = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), device="cpu")
    return x * torch.tensor([1.0, 1.0, 30.0, 1000.0], dtype=torch.float64, device="cpu")[:, None]


def _computes_mlp(mlp: Mlp, *, training: bool) -> bool:
    """Whether the class's own forward, run on a tiny twin of the MLP in this mode, gives the value of its form.

    The twin shares all tensors with the MLP but those of its projections, so it costs nothing, fires no hook of the
    user's and draws nothing from the global random generator.
    """
    *inputs, down = mlp.parts
    sizes = dict.fromkeys(inputs, (4, 16 if mlp.form == "packed" else 8)) | {down: (8, 4)}
    tiny = {part: _unhooked(_tiny_twin(getattr(mlp.owner, part), *size), training) for part, size in sizes.items()}
    twin = _unhooked(mlp.owner, training)
    twin._modules.update(tiny)
    x = _probe()
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        projected = torch.cat([tiny[part](x) for part in inputs], dim=-1)
        value = ACTIVATIONS[mlp.activation].value
        if mlp.form == "ungated":
            h = value(projected)
        else:
            gate, up = projected.chunk(2, dim=-1)
            h = value(gate) * up
        expected = tiny[down](h)
        try:
            # What it takes beside its input (Bloom's and MPT's residual) is added to the output.
            forward = type(mlp.owner).forward
            others = [torch.zeros_like(x)] * (_required_arguments(forward) - 1)
            return torch.allclose(forward(twin, x, *others), expected, rtol=1e-4, atol=1e-5)
        except Exception:  # a forward of other arguments, or one that reads sizes, is not the plain MLP
            return False


def _required_arguments(forward: Callable) -> int:
    """How many arguments a forward has to be given, `self` aside."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(forward).parameters.values()
    return sum(p.default is p.empty and p.kind in kinds for p in parameters) - 1


def _unhooked(module: nn.Module, training: bool) -> nn.Module:
    """The module and all inside it in this mode and without hooks, sharing their tensors."""
    twin = copy.copy(module)
    twin.training = training
    vars(twin).pop("forward", None)  # one that another library left behind is the class's own, bound to the module
    twin._forward_hooks, twin._forward_pre_hooks, twin._backward_hooks, twin._backward_pre_hooks = {}, {}, {}, {}
    twin._modules = {name: child and _unhooked(child, training) for name, child in module._modules.items()}
    return twin
