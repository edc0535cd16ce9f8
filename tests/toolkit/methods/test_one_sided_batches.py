"""Batches without a forget or without a retain sample, of every method: the term of what is missing is left out."""

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu.data.prompts import PromptFormat
from ssiuu.methods.registry import methods
from ssiuu.options import UnlearnOptions
from ssiuu.pairs import make
from tests.support.models import tiny_model
from tests.support.unlearn_data import batch_of, data_of

from ..conftest import tiny_facts

SETTINGS = {
    "rmu": {"rmu_layer": 0, "rmu_c": 2.0},
    "rmu live": {"rmu_layer": 0, "rmu_c": 2.0, "reference_model": "live"},
    "erase-at-core": {"eac_layers": 2},
    "klue": {"klue_questions": 2},
    "dpo": {"refusal": "say no"},
}
CASES = [*methods(), "rmu live"]
FORGET, RETAIN = [2, 0], [1, 3, 0]


@pytest.fixture
def data(loaded):
    return data_of(PromptFormat(loaded[1], 0), tiny_facts()[:4], tiny_facts()[4:8])


@pytest.fixture
def gradients(data):
    """Loss, gradients and target gradients of a moved model on a batch of these samples; same weights each time."""
    model = tiny_model(dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moved = {name: value + 0.02 * torch.randn_like(value) for name, value in before.items()}

    def of(case, regularizer, forget, retain):
        settings = SETTINGS.get(case, {})
        method, penalty = make(UnlearnOptions(method=case.split()[0], regularizer=regularizer, settings=settings))
        model.load_state_dict(before)
        model.requires_grad_()
        model.zero_grad()
        params = method.parameters(model)
        model.requires_grad_(False)
        for param in params:
            param.requires_grad_()
            param.target_grad = None
        with sk.patch(model, scope="all", **penalty.patch_options(len(data.forget))) as handle:
            method.setup(model, handle, data)
            penalty.setup(model, handle, method, data)
            model.load_state_dict(moved)
            loss = penalty.loss(batch_of(data, forget, retain, method.companions(data)))
            loss.backward()
            method.teardown()
        zeros = [torch.zeros_like(param) for param in params]
        found = (
            [zero if grad is None else grad.detach().clone() for grad, zero in zip(grads, zeros, strict=True)]
            for grads in ([param.grad for param in params], [getattr(param, "target_grad", None) for param in params])
        )
        return loss.detach(), *found

    return of


def assert_equal(actual, expected):
    scale = torch.stack([one.norm() for one in expected]).norm()
    difference = torch.stack([(one - other).norm() for one, other in zip(actual, expected, strict=True)]).norm()
    assert difference <= 1e-5 * scale  # transformers' norms compute in float32


PAIRS = [(case, regularizer) for case in CASES for regularizer in ("none", "ssiuu")] + [("gd", "ssiuu-neuron")]


@pytest.mark.parametrize(("case", "regularizer"), PAIRS, ids=["+".join(pair) for pair in PAIRS])
def test_the_terms_of_either_kind_alone_add_up_to_the_loss_of_both(gradients, case, regularizer):
    whole = gradients(case, regularizer, FORGET, RETAIN)
    forget = gradients(case, regularizer, FORGET, [])
    retain = gradients(case, regularizer, [], RETAIN)
    assert torch.allclose(forget[0] + retain[0], whole[0], rtol=1e-5)
    assert_equal([one + other for one, other in zip(forget[1], retain[1], strict=True)], whole[1])


@pytest.mark.parametrize("case", CASES)
def test_target_gradients_are_of_the_forget_samples_alone(gradients, case):
    whole = gradients(case, "ssiuu", FORGET, RETAIN)
    assert_equal(gradients(case, "ssiuu", FORGET, [])[2], whole[2])
    assert not any(grad.any() for grad in gradients(case, "ssiuu", [], RETAIN)[2])
