"""The same damping of every step."""

import torch

from ssiuu.commands.unlearn import unlearn
from ssiuu.optimizers import OptimizerOptions
from tests.support.small_runs import by, weights

SHARE = 0.3


def test_a_step_is_the_share_smaller(setting, made):
    regularizer, _ = made("uniform", uniform_share=SHARE)
    options = OptimizerOptions(1e-2, weight_decay=0.1)
    original, params = setting.clones(), list(setting.model.parameters())
    expected = [torch.nn.Parameter(value.clone()) for value in original]
    plain = torch.optim.AdamW(expected, lr=options.learning_rate, weight_decay=options.weight_decay)
    optimizer = regularizer.optimizer(params, options)
    for param, twin in zip(params, expected, strict=True):
        param.grad = torch.randn_like(param)
        twin.grad = param.grad.clone()
    plain.step()
    optimizer.step()
    for param, twin, start in zip(params, expected, original, strict=True):
        assert torch.allclose(param - start, (1 - SHARE) * (twin - start), rtol=1e-9, atol=1e-15)


def test_a_run_is_one_of_a_lower_rate(options, tmp_path):
    options = options.replace(max_steps=3)
    damped = unlearn(by(options, "gd", "uniform", uniform_share=SHARE), tmp_path / "damped")
    slower = unlearn(by(options, "gd", learning_rate=(1 - SHARE) * options.learning_rate), tmp_path / "slower")
    assert all(torch.equal(tensor, weights(slower)[name]) for name, tensor in weights(damped).items())
