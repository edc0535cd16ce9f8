"""Whether a loss's autograd graph can take the one-backward path: what uses each parameter, and whose rows it sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...log_probs import answer_log_probs
from ...ops.wgrad_pair.product import scaled
from .axes import RULES, Axis, Edge, Rule, Shape, elementwise, flattened
from .functions import RowEmbedding, RowFunction, RowLinear
from .masks import Separation
from .row_weights import Layout, RowWeights
from .targets import Targets

Axes = tuple[Axis, ...]


class Part:
    """One forward of a loss, its graph cut at the logits.

    Args:
        logits: `[B, S, V]`, with their graph.
        weights: of the rows.

    Attributes:
        log_probs: `[N]`, in a graph of their own that ends at the logits of the rows that predict an answer.
    """

    def __init__(self, logits: Tensor, weights: RowWeights):
        self.logits, self.weights = logits, weights
        self._answer_logits = logits.detach().flatten(0, 1).index_select(0, weights.answers.rows).requires_grad_()
        self.log_probs = answer_log_probs(self._answer_logits, weights.answers)

    def signal(self, weights: Tensor) -> Tensor:
        """The gradient of `sum_b weights_b s_b` with respect to the logits, to go backward from there.

        The layer that made them gets it in the answers' rows alone: no gradient of all logits is ever made, unless
        something looks at it.
        """
        node, logits = self.logits.grad_fn, self.logits
        watched = bool(logits._backward_hooks) or logits.retains_grad
        if not watched and is_ours(node) and node._forward_cls is RowLinear and node.lead == logits.shape[:-1]:
            grad = self._answers_grad(weights)
            node.rows_grad, node.answers_only = grad, True
            return grad.new_zeros(()).expand(logits.shape)
        return self.whole_signal(weights)

    def whole_signal(self, weights: Tensor) -> Tensor:
        """The same as a tensor like the logits."""
        grad = self._answers_grad(weights)
        rows = grad.new_zeros(self.logits.shape).flatten(0, 1).index_copy_(0, self.weights.answers.rows, grad)
        return rows.view(self.logits.shape)

    def _answers_grad(self, weights: Tensor) -> Tensor:
        return torch.autograd.grad(self.log_probs, self._answer_logits, weights, retain_graph=True)[0]


class Versions(NamedTuple):
    """Parameters of a graph and their versions when it was made, by name."""

    params: dict[str, Tensor]
    versions: dict[str, int]

    def check(self) -> None:
        """Raise a RuntimeError if a parameter was edited since."""
        edited = [name for name, param in self.params.items() if param._version != self.versions[name]]
        if edited:
            raise RuntimeError(
                f"{len(edited)} parameters were edited in place between the forward and its backward, first "
                f"{edited[0]}: their gradients would be of neither model. Nothing was changed; run the forward again"
            )


class Origin(NamedTuple):
    """Where the samples are in the logits.

    Attributes:
        axes: the dimensions to follow; none where there is one sample.
        counts: the length of each.
        separations: see `axes.Edge.separates`, of each.
    """

    axes: Axes
    counts: tuple[int, ...]
    separations: tuple[Separation | None, ...]


class Followed:
    """What is under some logits, and how its rows are the samples'.

    Args:
        logits: `[B, S, V]`.
        origin: where the samples are in them.
        names: id of a parameter -> its name, for messages.
        watched: autograd functions, if their rows alone matter, and it does not what parameters are used by.

    Attributes:
        nodes: all backward nodes.
        layouts: those of ours, or the watched ones -> the order of their rows.
        broadcasts: an embedding that was added to every sample -> the node that added it.
        leaves: tensors that need a gradient and are not parameters -> the order of their rows. Their gradients are
            weighted on the way.
        reason: why the graph cannot take the one-backward path; None if it can.
    """

    def __init__(self, logits: Tensor, origin: Origin, names: Mapping[int, str], watched: type | tuple = ()):
        self._origin, self._names, self._watched = origin, names, watched
        self.nodes: dict[object, None] = {}
        self.layouts: dict[object, Layout] = {}
        self.broadcasts: dict[object, object] = {}
        self.leaves: dict[Tensor, Layout] = {}
        self.reason: str | None = None
        self._axes: dict[tuple[object, int], Axes] = {}
        self._uses: dict[object, int] = {}
        self._shapes: dict[tuple[object, int], Shape] = {}
        root = logits.grad_fn, logits.output_nr
        self._axes[root], self._shapes[root] = origin.axes, list(logits.shape)
        waiting = [root]
        while waiting and self.reason is None:
            waiting += self._visit(*waiting.pop())
        if self.reason is None:
            shared = next((node for node in self.broadcasts if self._uses[node] > 1), None)
            if shared is not None:
                self.reason = f"{self._params(shared)} is added to every sample, and used elsewhere too"

    def _visit(self, node, number: int) -> list[tuple[object, int]]:
        """Follow the samples from one output of a node into its inputs; those that were not seen before."""
        self.nodes[node] = None
        axes, shape = self._axes[node, number], self._shapes[node, number]
        ours, rule = _kind(type(node))
        if (ours or self._is_watched(node)) and not self._laid_out(node, axes, shape):
            return []
        if not ours and rule is None and hasattr(node, "_forward_cls") and not self._watched:
            # It may run a backward of its own, with parameters that are not in this graph.
            self.reason = f"{type(node).__name__} is a function that is not known"
            return []
        found = []
        for index, (below, below_number) in enumerate(node.next_functions):
            if below is None or (ours and index > 0):  # the others are the parameters, or made of them
                continue
            leaf = getattr(below, "variable", None)
            if leaf is not None and isinstance(leaf, nn.Parameter):
                if self._watched:
                    continue
                self.reason = self._used_by(leaf, node)
                return []
            below_shape = below._input_metadata[below_number].shape if leaf is None else list(leaf.shape)
            self._uses[below] = self._uses.get(below, 0) + 1
            below_axes = axes if ours else self._into(node, rule, index, axes, shape, below_shape)
            if below_axes is None:
                if self._watched and not any(map(self._is_watched, [below, *nodes_below(below)])):
                    continue
                if _is_broadcast_embedding(node, below) and below_shape[-1] == shape[-1]:
                    self.nodes[below] = None
                    self.broadcasts[below] = node
                    self.layouts[below] = _layout(axes, shape[:-1])
                    continue
                self.reason = next(
                    (self._used_by(param, user) for param, user in _made_of(below)),
                    f"{type(node).__name__} mixes samples, or is not known to keep them apart",
                )
                return []
            known = self._axes.setdefault((below, below_number), below_axes)
            if known != below_axes:
                self.reason = f"two uses of what {type(below).__name__} made disagree on where in it the samples are"
                return []
            if leaf is not None:
                self._add_leaf(leaf, below_axes)
            elif (below, below_number) not in self._shapes:
                self._shapes[below, below_number] = below_shape
                found.append((below, below_number))
        return found

    def _into(self, node, rule: Rule | None, index: int, axes: Axes, shape: Shape, below_shape: Shape) -> Axes | None:
        """The axes in an input of a node, from those in its output; None where one is lost or not known."""
        if not axes or (rule is elementwise and shape == below_shape):
            return axes
        if rule is None:
            return None
        found = []
        for axis, count, separates in zip(axes, *self._origin[1:], strict=True):
            try:
                into = rule(Edge(node, index, shape, below_shape, count, separates), axis)
            except AttributeError:  # another version of torch saves other things in this node
                into = None
            if into is None:
                return None
            found.append(into)
        return tuple(found)

    def _is_watched(self, node) -> bool:
        return bool(self._watched) and issubclass(getattr(node, "_forward_cls", object), self._watched)

    def _laid_out(self, node, axes: Axes, shape: Shape) -> bool:
        """Note the rows of a node of ours; false where its features, and not its rows, are the samples'."""
        if any(axis.dim >= len(shape) - 1 for axis in axes):
            self.reason = f"{type(node).__name__} ran with samples among the features"
            return False
        self.layouts[node] = _layout(axes, shape[:-1])
        return True

    def _add_leaf(self, leaf: Tensor, axes: Axes) -> None:
        if leaf._backward_hooks:
            self.reason = f"a tensor {list(leaf.shape)} that the model was given has gradient hooks"
        among_last = bool(axes) and max(axis.dim for axis in axes) == leaf.dim() - 1
        self.leaves[leaf] = _layout(axes, leaf.shape if among_last else leaf.shape[:-1])

    def hooks(self, weights: RowWeights) -> list:
        """Handles of hooks for the one backward: what it has to bring to broadcast embeddings and to leaves."""
        handles = [adding.register_prehook(_lend(embedding)) for embedding, adding in self.broadcasts.items()]
        for leaf, layout in self.leaves.items():
            handles.append(leaf.register_hook(_weigh(weights, layout)))
        return handles

    def release(self) -> None:
        """Forget gradients that were brought and not used, as by a backward that raised: the next one is another's."""
        for node in self.layouts:
            node.rows_grad, node.answers_only = None, False

    def _used_by(self, param: Tensor, node) -> str:
        return f"{self._name(param)} is used by {type(node).__name__}, which is not known to keep samples apart"

    def _name(self, param: Tensor) -> str:
        return self._names.get(id(param), f"a parameter {list(param.shape)} of another model")

    def _params(self, node) -> str:
        return " and ".join(self._name(param) for param in node.params if param is not None)


def _made_of(node) -> list[tuple[Tensor, object]]:
    """The parameters of which a node's output is made, each with its user; none where it is made of rows."""
    nodes = [node, *nodes_below(node)]
    below = ((getattr(below, "variable", None), user) for user in nodes for below, _ in user.next_functions)
    params = [(leaf, user) for leaf, user in below if isinstance(leaf, nn.Parameter)]
    return [] if any(map(is_ours, nodes)) else params


def _lend(embedding) -> Callable:
    def lend(grads: tuple[Tensor, ...]) -> None:
        embedding.rows_grad = grads[0]

    return lend


def _weigh(weights: RowWeights, layout: Layout) -> Callable:
    def weigh(grad: Tensor) -> Tensor:
        rows = weights.rows(layout).loss
        return scaled(grad.reshape(layout.count, -1), rows[:, None]).view(grad.shape)

    return weigh


def _layout(axes: Axes, lead: Sequence[int]) -> Layout:
    return Layout(math.prod(lead), tuple(flattened(axis, lead) for axis in axes))


def _is_broadcast_embedding(node, below) -> bool:
    """Whether `node` adds an embedding that all samples share (position ids `[1, S]` or `[S]`).

    Autograd adds the samples' gradients up on the way to the embedding; before that, `node` itself has them apart.
    """
    return (
        type(node).__name__ == "AddBackward0"
        and node._saved_alpha == 1
        and is_ours(below)
        and below._forward_cls is RowEmbedding
    )


def follow(parts: Sequence[Part], names: Mapping[int, str]) -> tuple[list[Followed], str | None]:
    """The graphs of these parts, and why they cannot take the one-backward path; None if they can.

    Args:
        parts: the forwards that make up a loss.
        names: id of a parameter -> its name, for messages.
    """
    graphs = [Followed(part.logits, _origin(part.weights), names) for part in parts]
    reason = next((graph.reason for graph in graphs if graph.reason is not None), None)
    seen: set[object] = set()
    for graph in graphs:
        if not seen.isdisjoint(graph.nodes) or not seen.isdisjoint(graph.leaves):
            reason = reason or "a part of the model ran once for several of the loss's batches of logits"
        seen.update(graph.nodes, graph.leaves)
    return graphs, reason


def _origin(weights: RowWeights) -> Origin:
    separation = Separation(weights)
    return Origin(weights.axes, weights.counts, tuple(separation if axis.dim == 1 else None for axis in weights.axes))


def rows_in_order(logits: Tensor, *functions: type) -> bool:
    """Whether it is known that all nodes of these functions under the logits see the rows sample after sample.

    Args:
        logits: `[B, S, V]`.
        functions: autograd functions.
    """
    samples = len(logits)
    followed = Followed(logits, Origin((Axis(0, 1),), (samples,), (None,)), {}, functions)
    return followed.reason is None and all(
        layout.inner[0] * samples == layout.count for layout in followed.layouts.values()
    )


def claim(graphs: Sequence[Followed], parts: Sequence[Part], names: Mapping[int, str], targets: Targets) -> Versions:
    """Take the graphs for one loss: a backward of another one that was made from them before is refused from now on.

    Returns:
        The parameters that the graphs use, with their versions.
    """
    found = Versions({}, {})
    for graph, part in zip(graphs, parts, strict=True):
        for node, layout in graph.layouts.items():
            if node.weights is not None:
                node.weights.superseded = True
            node.weights, node.layout, node.targets = part.weights, layout, targets
            for param, version in zip(node.params, node.versions, strict=True):
                if param is not None and param.requires_grad:
                    name = names.get(id(param), str(id(param)))
                    found.params[name] = param
                    found.versions[name] = min(version, found.versions.get(name, version))
    return found


def refuse_reentrant_checkpointing(logits: Tensor) -> None:
    """Raise a ValueError where a reentrant checkpoint hides the graph: it runs a backward of its own inside."""
    # Those of torch, DeepSpeed and Unsloth all have the word in their names.
    functions = (type(node).__name__ for node in nodes_under(logits) if hasattr(node, "_forward_cls"))
    if any("checkpoint" in name.lower() for name in functions):
        raise ValueError(
            "the model ran with reentrant gradient checkpointing, which hides its parameters from this loss; call "
            "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
        )


def refuse_another_model(logits: Sequence[Tensor], targets: Targets) -> None:
    """Raise a ValueError where no parameter that is to get a target gradient is under the logits."""
    for part in logits:
        for node in nodes_under(part):
            if any(getattr(below, "variable", None) in targets for below, _ in node.next_functions):
                return
    raise ValueError(
        "the logits depend on no trainable parameter of the handle's scope; pass the logits of the patched model "
        "itself (not of a copy), or patch with scope='all'"
    )


def is_ours(node) -> bool:
    """Whether this node is of one of the functions in `functions.py`."""
    return _kind(type(node))[0]


@lru_cache(512)  # torch.compile makes new types without end
def _kind(node_type: type) -> tuple[bool, Rule | None]:
    """Whether nodes of this type are ours, and the rule for others. Every kind of node has a type of its own."""
    ours = issubclass(getattr(node_type, "_forward_cls", object), RowFunction)
    return ours, None if ours else RULES.get(node_type.__name__)


def nodes_under(root: Tensor, stop=None) -> list:
    """All nodes under `root`; leaves left out, and `stop` with what is under it."""
    return [root.grad_fn, *nodes_below(root.grad_fn, stop)]


def nodes_below(start, stop=None) -> list:
    """All nodes below a node, as in `nodes_under`."""
    seen, waiting = {start: None}, [start]
    while waiting:
        for node, _ in waiting.pop().next_functions:
            if node is not None and node is not stop and not hasattr(node, "variable") and node not in seen:
                seen[node] = None
                waiting.append(node)
    return list(seen)[1:]


def depends_on_more_than(value: Tensor, start: Tensor) -> bool:
    """Whether the graph of `value` reaches a leaf by a way that does not lead through `start`."""
    nodes = nodes_under(value, stop=start.grad_fn) if value.grad_fn is not None else []
    leaves = (below for node in nodes for below, _ in node.next_functions if hasattr(below, "variable"))
    return value.grad_fn is None or any(True for _ in leaves)
