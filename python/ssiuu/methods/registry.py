"""The methods by name."""

from __future__ import annotations

from ..options import PAIRS
from ..plugins import Registry
from .base import Method

_REGISTRY: Registry[type[Method]] = Registry("method", __package__, reserved=tuple(PAIRS))
register_method = _REGISTRY.register
methods = _REGISTRY.all
