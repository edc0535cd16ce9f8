"""A float64 model, facts as samples, and micro-batches of them, for losses and gradients by formula."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ssiuu.data.facts import Fact
from ssiuu.data.prompts import PromptFormat
from ssiuu.methods.base import Batch, UnlearnData

FORGET = [Fact("where ann born", "rome"), Fact("where bob lives", "oslo lima rome"), Fact("where cid born", "lima")]
RETAIN = [Fact("where dee lives", "oslo"), Fact("where eve born", "rome lima"), Fact("where fay lives", "lima")]


class Setting(NamedTuple):
    """A model, and what it is to forget and to keep."""

    model: PreTrainedModel
    data: UnlearnData

    def batch(self, forget: list[int], retain: list[int], micro_batches: int = 1, step=None) -> Batch:
        """A micro-batch of these samples; `step` are the ids of all of the step's, by default the same ones."""
        samples = [self.data.forget_samples[i] for i in forget] + [self.data.retain_samples[i] for i in retain]
        tokens = [
            sum(len(part[i].answer) for i in ids) / micro_batches
            for part, ids in zip((self.data.forget_samples, self.data.retain_samples), step or (forget, retain),
                                 strict=True)
        ]  # fmt: skip
        chosen = torch.arange(len(samples)) < len(forget)
        return Batch(
            **self.data.prompts.collate(samples), forget=chosen, companion=torch.zeros_like(chosen),
            stopped=torch.zeros_like(chosen), ids=torch.tensor([*forget, *retain]), forget_tokens=tokens[0],
            retain_tokens=tokens[1], forget_samples=len((step or (forget,))[0]) / micro_batches,
        )  # fmt: skip

    def log_probs(self, batch: Batch) -> Tensor:
        """`log P(y_b | x_b)`, float64 `[B]`, with its graph."""
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        token_log_probs = logits.log_softmax(-1)[:, :-1].gather(2, batch.labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        return (token_log_probs * (batch.labels[:, 1:] != -100)).sum(1)

    def gd(self, batch: Batch) -> Tensor:
        """GD's loss, over the tokens of the step."""
        log_probs = self.log_probs(batch)
        return log_probs[batch.forget].sum() / batch.forget_tokens - log_probs[batch.retain].sum() / batch.retain_tokens

    def clones(self) -> list[Tensor]:
        """The parameters' values, apart."""
        return [param.detach().clone() for param in self.model.parameters()]


@pytest.fixture
def setting(loaded):
    model, tokenizer = loaded
    prompts = PromptFormat(tokenizer, 0)
    samples = (prompts.encode_facts(facts) for facts in (FORGET, RETAIN))
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.02)  # another model in each test
    return Setting(model.double(), UnlearnData(FORGET, RETAIN, *samples, prompts=prompts, seed=0))


@pytest.fixture
def made():
    """Makes a regularizer with these settings, and its method."""
    from ssiuu.options import UnlearnOptions
    from ssiuu.pairs import make

    def of(regularizer, method="gd", run=None, **settings):
        return make(UnlearnOptions(method=method, regularizer=regularizer, settings=settings, **(run or {})))[::-1]

    return of
