"""The attack that rounds the weights to 4 bits, by bitsandbytes: facts that were only hidden may come back.

Zhang et al., Catastrophic Failure of LLM Unlearning via Quantization, arXiv 2410.16454.
"""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig

from ..evaluation.likelihood import FactScores
from ..progress import Job
from .attack import Attack
from .attacked import Attacked, Course
from .pool import Pool


def nf4() -> BitsAndBytesConfig:
    """Linear layers but the output head in 4-bit NormalFloat, computed with in float32, so that rounding the weights
    is all that changes."""
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def quantise(attacked: Attacked, attack: Attack, pool: Pool, before: FactScores, bar: Job) -> Course:
    """Score the forget facts of the quantised model; step 0 is before, step 1 after.

    Args:
        before: scores of the forget facts before the attack.
        bar: moved on by one.
    """
    course = Course(pool, [])
    course.add(0, before)
    model, protocol = attacked.load(quantization_config=nf4())
    course.add(1, protocol.score(model, attacked.forget))
    bar.advance()
    bar.say(unseen_fs=course.steps[-1]["unseen_fs"])
    return course
