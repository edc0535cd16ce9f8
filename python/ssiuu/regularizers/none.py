"""No regularizer."""

from __future__ import annotations

from .base import Regularizer
from .registry import register_regularizer


@register_regularizer
class NoRegularizer(Regularizer):
    """The method alone."""

    name, label, color = "none", "", ""
    summary = "the method alone"
    source = ""
