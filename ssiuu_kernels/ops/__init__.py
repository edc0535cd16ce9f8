"""The ops: public function and checks, reference (the definition), and one file per backend."""

from .common.activations import ACTIVATIONS
from .common.results import ActGrads, GluGrads, NeuronScores, PackedGluGrads, PenaltyStats
from .mlp.act import act_backward, act_forward
from .mlp.glu import glu_backward, glu_forward, packed_glu_backward, packed_glu_forward
from .mlp.neuron_penalty import NeuronPenalty
from .penalty import penalty_, penalty_adamw_, penalty_adamw_many_, penalty_many_
from .token_scores import token_scores
from .wgrad_pair import wgrad_pair

__all__ = [
    "ACTIVATIONS",
    "ActGrads",
    "GluGrads",
    "NeuronPenalty",
    "NeuronScores",
    "PackedGluGrads",
    "PenaltyStats",
    "act_backward",
    "act_forward",
    "glu_backward",
    "glu_forward",
    "packed_glu_backward",
    "packed_glu_forward",
    "penalty_",
    "penalty_adamw_",
    "penalty_adamw_many_",
    "penalty_many_",
    "token_scores",
    "wgrad_pair",
]
