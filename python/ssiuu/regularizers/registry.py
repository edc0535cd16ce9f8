"""The regularizers by name."""

from __future__ import annotations

from ..plugins import Registry
from .base import Regularizer

_REGISTRY: Registry[type[Regularizer]] = Registry("regularizer", __package__)
register_regularizer = _REGISTRY.register
regularizers = _REGISTRY.all
