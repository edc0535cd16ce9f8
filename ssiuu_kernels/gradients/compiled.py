"""What torch.compile has to leave alone so that two backwards can go through a compiled part of a model."""

from __future__ import annotations

from collections.abc import Iterable

from torch._functorch import config

_COMPILED = "CompiledFunctionBackward"
_users, _before = 0, True


def keep_buffers() -> None:
    """From now on, compiled backwards do not write into what the forward saved: a second one needs it."""
    global _users, _before
    if not _users:
        _before = config.donated_buffer
        config.donated_buffer = False
    _users += 1


def release_buffers() -> None:
    """Take one `keep_buffers` back."""
    global _users
    _users -= 1
    if not _users:
        config.donated_buffer = _before


def refuse_donated_buffers(nodes: Iterable) -> None:
    """Raise a RuntimeError where a compiled part of the graph was compiled without `keep_buffers`.

    Args:
        nodes: backward nodes of the graph.
    """
    for node in nodes:
        # Another version of torch may keep this elsewhere; a model that cannot be checked is refused.
        if type(node).__name__ == _COMPILED and getattr(_notes(node), "bw_donated_idxs", "unknown"):
            raise RuntimeError(
                "a part of the model was compiled and run backward before the model was patched, and its compiled "
                "backward can run once only; call torch._dynamo.reset() after patching, or patch before the first "
                "backward. Nothing was changed"
            )


def _notes(node) -> object:
    return getattr(node._forward_cls, "metadata", None)
