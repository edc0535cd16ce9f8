"""Fused kernels for robust unlearning: attribution, the SSIUU penalty and its optimizer, under Hugging Face models."""

from . import ops
from .attribution.targets import ATTRIBUTION_TARGETS
from .env import collect_env, environment
from .gradients.path import ENGINES, GradientPath
from .log_probs import IGNORE_INDEX, TARGETS, sequence_log_probs
from .ops import ActGrads, GluGrads, NeuronPenalty, NeuronScores, PackedGluGrads, PenaltyStats
from .ops.backends import Availability, available_backends
from .optim.adamw import SsiuuAdamW
from .optim.penalty import SsiuuPenalty
from .patching.handle import PatchHandle
from .patching.patch import patch

__version__ = "0.1.0"

__all__ = [
    "ATTRIBUTION_TARGETS",
    "ENGINES",
    "IGNORE_INDEX",
    "TARGETS",
    "ActGrads",
    "Availability",
    "GluGrads",
    "GradientPath",
    "NeuronPenalty",
    "NeuronScores",
    "PackedGluGrads",
    "PatchHandle",
    "PenaltyStats",
    "SsiuuAdamW",
    "SsiuuPenalty",
    "available_backends",
    "collect_env",
    "environment",
    "ops",
    "patch",
    "sequence_log_probs",
]
