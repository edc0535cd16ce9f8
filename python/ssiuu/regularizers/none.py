"""No regularizer."""

from __future__ import annotations

from ..methods.registry import register_regularizer
from .base import Regularizer


@register_regularizer
class NoRegularizer(Regularizer):
    """The method alone."""

    name, label, color = "none", "", ""
    summary = "the method alone"
    source = ""
