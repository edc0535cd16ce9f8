"""The ops. Each is one folder: public function and checks, reference (the definition), and one file per backend."""

from .activations import ACTIVATIONS
from .glu import glu_backward, glu_forward
from .penalty import penalty_, penalty_adamw_
from .results import GluGrads, NeuronScores, PenaltyStats
from .token_scores import token_scores

__all__ = [
    "ACTIVATIONS",
    "GluGrads",
    "NeuronScores",
    "PenaltyStats",
    "glu_backward",
    "glu_forward",
    "penalty_",
    "penalty_adamw_",
    "token_scores",
]
