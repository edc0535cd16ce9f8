"""Logit lens: at which layer does a model prefer an answer to a wrong one? (The paper's Fig. 4.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..data.facts import Fact
from ..data.prompts import PromptFormat
from ..evaluation.states import at_last_prompt_token, states_of
from ..models.layers import LogitLens, decoder_layers
from .distractors import draw_distractors


class LensShares(NamedTuple):
    """What the logit lens shows.

    Attributes:
        share: for each decoder layer, the share of the compared facts whose answer is ahead there; empty where no fact
            can be compared. Chance is 0.5; far below it, something in the model holds the answer down.
        compared: number of facts.
        left_out: number of facts without a wrong answer that starts with another token.
    """

    share: list[float]
    compared: int
    left_out: int


def logit_lens(
    model: PreTrainedModel,
    prompts: PromptFormat,
    facts: Sequence[Fact],
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> LensShares:
    """The share of facts whose answer the residual stream prefers to one random wrong answer, layer by layer.

    At layer l, with h_l the state after the layer at the prompt's last token, a the answer's first token and d the
    distractor's, a fact counts where `(W norm(h_l))_a > (W norm(h_l))_d`. W is the output head. The final norm comes
    first, as usual; the paper says only "through the word embedding matrix". A model that caps or scales its logits
    ranks tokens the same without.

    Args:
        model: a Hugging Face causal language model with decoder layers, patched or not; run in eval mode, and its mode
            is restored.
        facts: all are asked as `prompts` has it; see `draw_distractors` for what they are compared with.
        seed: of the distractors; the same for two models that are compared.
        progress: called after every batch with its number of facts.

    Raises:
        ValueError: a model without one list of decoder layers, a final norm and an output
            head, or whose logits are not those of its head on its norm.
    """
    layers, lens = decoder_layers(model), LogitLens(model)
    drawn = [pair for pair in draw_distractors(prompts, facts, seed) if pair is not None]
    if not drawn:
        return LensShares([], 0, len(facts))
    ahead, done = [], 0
    for batch, states, logits in states_of(model, layers, prompts, [answer for answer, _ in drawn], progress):
        last = [at_last_prompt_token(state, batch["labels"]) for state in states]
        lens.check_order(last[-1], at_last_prompt_token(logits, batch["labels"]))
        pairs = torch.tensor([(answer.answer[0], token) for answer, token in drawn[done : done + len(logits)]])
        answer, distractor = torch.stack([lens(state).gather(-1, pairs.to(state.device)) for state in last]).unbind(-1)
        ahead.append((answer > distractor).cpu())
        done += len(logits)
    share = torch.cat(ahead, dim=1).double().mean(1).tolist()
    return LensShares(share, len(drawn), len(facts) - len(drawn))
