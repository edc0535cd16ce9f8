"""What a module is, judged by its parts and by what it computes, never by its class name. Imports no transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ops.activations import ACTIVATIONS, recognise

GATED = ("gate_proj", "up_proj", "down_proj")  # Llama, Mistral, Qwen, SmolLM3, OLMo2, Gemma
PACKED = ("gate_up_proj", "down_proj")  # Phi-3, GLM: gate and up in one projection
# GPT-2, GPT-NeoX and Falcon, OPT and Phi: down(act(up(x))), in a module of their own or straight in the layer.
UNGATED = (("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("fc1", "fc2"))
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")
# The projections of an attention by the kind under which their outputs are attributed, tried in this order.
QUERIES = (
    {"q": "q_proj", "k": "k_proj", "v": "v_proj"},
    {"qkv": "qkv_proj"},
    {"qkv": "query_key_value"},
    {"qkv": "c_attn"},
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
        patched: the module whose forward is replaced: the MLP, or the activation of an ungated one.
        projections: those of the MLP, the down projection last.
    """

    form: str
    activation: str
    patched: nn.Module
    projections: tuple[nn.Module, ...]

    @property
    def down(self) -> nn.Module:
        return self.projections[-1]

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for projection in self.projections for parameter in projection.parameters()]


def find_mlps(model: nn.Module) -> tuple[dict[str, Mlp], dict[str, str]]:
    """The MLPs of `model` by name, and the reason for each that has to be left as it is.

    A name is that of the module that holds the projections.
    """
    found: dict[str, Mlp] = {}
    skipped: dict[str, str] = {}
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
        if mlp is not None and any(mlp.patched is other.patched for other in found.values()):
            skipped[name] = "its activation module also serves another MLP"
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


def _has(module: nn.Module, parts) -> bool:
    return all(isinstance(getattr(module, part, None), nn.Module) for part in parts)


def _recognise_mlp(module: nn.Module) -> Mlp | None:
    """The MLP that `module` holds, or None.

    Raises:
        UnsupportedModuleError: it looks like one, but computes something else or cannot be replaced unnoticed.
    """
    for form, parts in (("gated", GATED), ("packed", PACKED), *(("ungated", parts) for parts in UNGATED)):
        if not _has(module, parts):
            continue
        projections = tuple(getattr(module, part) for part in parts)
        function = next((getattr(module, name) for name in ACTIVATION_NAMES if hasattr(module, name)), None)
        if form == "ungated" and function is None:
            return None  # two projections by these names, and nothing between them that we know of
        for part, projection in zip(parts, projections, strict=True):
            _check_linear(part, projection)
        activation = _check_activation(function)
        if form == "ungated":
            _check_ungated(parts, projections, function)
            return Mlp(form, activation, function, projections)
        if "forward" in vars(module):
            raise UnsupportedModuleError("its forward was already replaced by another library")
        if not _computes_gated_mlp(module, parts, activation):
            raise UnsupportedModuleError(f"{type(module).__name__}.forward does not compute down(act(gate(x)) * up(x))")
        return Mlp(form, activation, module, projections)
    return None


def _check_linear(part: str, projection: nn.Module) -> None:
    # A quantised or an adapted layer keeps a weight that means something else, so it is asked for its value.
    if not _computes_linear(projection):
        raise UnsupportedModuleError(
            f"{part} is a {type(projection).__name__}; expected a plain linear layer, not a quantised or adapted one"
        )


def _check_activation(function: object) -> str:
    if not callable(function):
        raise UnsupportedModuleError(f"it has no activation ({', '.join(ACTIVATION_NAMES)})")
    if any(getattr(function, hooks, None) for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")):
        raise UnsupportedModuleError("its activation carries hooks, which the fused one would not call")
    activation = recognise(function)
    if activation is None:
        raise UnsupportedModuleError(f"activation {type(function).__name__} is none of {', '.join(ACTIVATIONS)}")
    return activation


def _check_ungated(parts: tuple[str, str], projections: tuple[nn.Module, ...], function: object) -> None:
    if not isinstance(function, nn.Module):
        raise UnsupportedModuleError("its activation is a function; expected a module, whose forward can be replaced")
    if "forward" in vars(function):
        raise UnsupportedModuleError("its activation's forward was already replaced by another library")
    (_, up_out), (down_in, _) = (_sizes(projection) for projection in projections)
    if up_out != down_in:
        raise UnsupportedModuleError(f"{parts[0]} gives {up_out} features and {parts[1]} takes {down_in}")


def _is_transposed(linear: nn.Module) -> bool:
    """Whether its weight is [in, out], as in GPT-2's Conv1D, and not [out, in]."""
    return hasattr(linear, "nf")


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """Features in and out."""
    size = tuple(linear.weight.shape)
    return size if _is_transposed(linear) else size[::-1]


def _tiny_twin(linear: nn.Module, features_in: int, features_out: int) -> nn.Module:
    """A layer of the same class with small random float64 weights. Shares everything else, so that it costs nothing."""
    generator = torch.Generator().manual_seed(0)
    shape = (features_in, features_out) if _is_transposed(linear) else (features_out, features_in)

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
    if not weight.is_floating_point() or "forward" in vars(layer):
        return False
    try:
        twin = _tiny_twin(layer, 4, 8)
        x = _probe()
        with torch.no_grad():
            weight = twin.weight.t() if _is_transposed(layer) else twin.weight
            return torch.allclose(type(layer).forward(twin, x), F.linear(x, weight, twin._parameters.get("bias")))
    except Exception:  # a forward that needs more than a weight is no plain linear layer
        return False


def _probe() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1), device="cpu")


def _computes_gated_mlp(module: nn.Module, parts: tuple[str, ...], activation: str) -> bool:
    """Whether the class's own forward, run on a tiny twin of the module, gives the gated MLP's value.

    The twin shares everything with the module but its projections, so it costs nothing, fires no hook of the user's
    and draws nothing from the global random generator.
    """
    *inputs, down = parts
    tiny = {part: _tiny_twin(getattr(module, part), 4, 16 if parts == PACKED else 8) for part in inputs}
    tiny[down] = _tiny_twin(getattr(module, down), 8, 4)
    for linear in tiny.values():
        linear._forward_hooks, linear._forward_pre_hooks = {}, {}
    twin = copy.copy(module)
    twin._modules = {**module._modules, **tiny}
    x = _probe()
    with torch.no_grad():
        projected = torch.cat([tiny[part](x) for part in inputs], dim=-1)
        gate, up = projected.chunk(2, dim=-1)
        expected = tiny[down](ACTIVATIONS[activation].value(gate) * up)
        try:
            return torch.allclose(type(module).forward(twin, x), expected, rtol=1e-4, atol=1e-5)
        except Exception:  # a forward with other arguments, or one that reads sizes, is not the plain gated MLP
            return False
