"""Both gradients of a loss, and how far they are from those of another engine."""

import copy

import torch

import ssiuu_kernels as sk

from .models import logits_of

FORGET = torch.tensor([True, False, True, False])
TARGET = "geometric_mean_prob"  # a tiny random model's P(answer) is 1e-8 or so


def gradients(model, batch, engine, forget=FORGET, objective="gd", target=TARGET, scope="all", **options):
    """(dL, sum of dP) by parameter name, and the path, of one loss on a copy of the model."""
    model = copy.deepcopy(model)
    if objective in ("npo", "dpo"):
        reference = torch.linspace(-20, -9, len(forget), dtype=torch.float32)
        options["reference_log_probs"] = reference
    handle = sk.patch(model, scope=scope, engine=engine)
    handle.unlearning_loss(logits_of(model, batch), batch["labels"], forget, objective, target, **options).backward()
    return *both_gradients(model), handle.gradient_path


def both_gradients(model):
    """(dL, sum of dP) by parameter name, of those that have one."""
    return [
        {
            name: getattr(param, kind)
            for name, param in model.named_parameters()
            if getattr(param, kind, None) is not None
        }
        for kind in ("grad", "target_grad")
    ]


def distances(actual, expected):
    """Relative distance of each gradient. One that is 0 but for rounding (a key's bias) is held against the others."""
    assert actual.keys() == expected.keys()
    norms = {name: gradient.double().norm() for name, gradient in expected.items()}
    floor = 1e-3 * torch.stack(list(norms.values())).norm()
    return {name: ((actual[name].double() - expected[name].double()).norm() / norms[name].maximum(floor)).item()
            for name in expected}  # fmt: skip


def assert_equal_gradients(model, batch, tolerance=1e-10, **options):
    *one, path = gradients(model, batch, "one-backward", **options)
    *two, _ = gradients(model, batch, "two-backward", **options)
    assert path.engine == "one-backward", path.reason
    for actual, expected in zip(one, two, strict=True):
        worst = max(distances(actual, expected).items(), key=lambda item: item[1])
        assert worst[1] <= tolerance, worst
