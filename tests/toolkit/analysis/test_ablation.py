"""Ablation against copies of the models whose weights are zero."""

import copy

import pytest
import torch

import ssiuu_kernels as sk
from ssiuu.analysis.ablation import ablation, hidden_most, random_neurons, zeroed
from ssiuu.analysis.influence import Variation
from ssiuu.analysis.measure import measure_influence
from ssiuu.evaluation.protocol import Protocol
from tests.support.models import FAMILIES, PARTS, logits_of, tiny_batch, tiny_model

EVERY = 5  # one neuron in so many


def without_rows(model, family):
    """A copy in which every EVERY-th neuron of every kind has no weights, and these neurons."""
    other, neurons = copy.deepcopy(model), {}
    for path, kinds in PARTS[family].items():
        for layer, module in enumerate(m for name, m in other.named_modules() if name.endswith(f".{path}")):
            if not list(module.parameters()):
                continue  # an activation
            weight = module.weight.T if hasattr(module, "nf") else module.weight  # [out, in]
            kinds = (kinds,) if isinstance(kinds, str) else kinds
            width = len(weight) // len(kinds)
            for half, kind in enumerate(kinds):
                kind = "up" if kind == "h" else kind
                chosen = torch.arange(layer + 2 * half, width, EVERY)
                rows = chosen + half * width
                weight.data[rows] = 0
                if module.bias is not None:
                    module.bias.data[rows] = 0
                neurons.setdefault(kind, []).append(chosen + layer * width)
    return other, {kind: torch.cat(chosen) for kind, chosen in neurons.items()}


@pytest.mark.parametrize("patched", [False, True], ids=["plain", "patched"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_neuron_at_zero_is_one_without_weights(family, patched):
    model, batch = tiny_model(family), tiny_batch()
    model.apply(lambda m: torch.nn.init.normal_(m.bias) if getattr(m, "bias", None) is not None else None)
    other, neurons = without_rows(model, family)
    handle = sk.patch(model, scope="all") if patched else None
    plain = logits_of(model, batch)
    with zeroed(model, neurons):
        found = logits_of(model, batch)
    kept = batch["attention_mask"].bool()
    assert torch.allclose(found[kept], logits_of(other, batch)[kept], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[kept], plain[kept], rtol=1e-2, atol=1e-2)
    assert torch.equal(logits_of(model, batch), plain)
    if handle is not None:
        handle.unpatch()


def test_gate_and_up_of_one_projection_are_its_halves():
    """Their product is 0 where either is, so that logits do not tell."""
    model, x = tiny_model("phi3"), torch.randn(3, 32)
    projection = model.model.layers[1].mlp.gate_up_proj
    plain = projection(x)
    with zeroed(model, {"gate": torch.tensor([56 + 4]), "up": torch.tensor([56 + 7, 2])}):
        found = projection(x)
    assert (found != plain).any(0).nonzero().flatten().tolist() == [4, 56 + 7]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_the_kinds_are_those_of_attribution(family):
    model = tiny_model(family)
    measured = measure_influence(model, [tiny_batch()])
    _, neurons = without_rows(model, family)
    assert set(measured) == set(neurons)


def hooks(model):
    return [list(module._forward_hooks) for module in model.modules()]


def test_nothing_is_left_on_the_model_when_it_fails_inside():
    model = tiny_model()
    before = hooks(model)
    with pytest.raises(IndexError), zeroed(model, {"up": torch.tensor([1, 60])}):
        model(input_ids=torch.tensor([[1000]]))
    assert hooks(model) == before


def test_nothing_is_left_on_the_model_when_a_neuron_is_not_there():
    model = tiny_model()
    before = hooks(model)
    with pytest.raises(IndexError), zeroed(model, {"up": torch.tensor([1, 56 * 2])}):
        pass
    assert hooks(model) == before


def variations_of(model):
    return {
        kind: Variation(torch.rand_like(part.max).float(), torch.rand_like(part.max).float())
        for kind, part in measure_influence(model, [tiny_batch()]).items()
    }


def test_the_largest_are_over_all_kinds_and_none_is_without():
    q, k = torch.tensor([[0.0, 5.0], [1.0, 0.0]]), torch.tensor([[4.0], [3.0]])
    variations = {"q": Variation(q, q), "k": Variation(k, k)}
    found = hidden_most(variations, 3)
    assert {kind: sorted(chosen.tolist()) for kind, chosen in found.items()} == {"q": [1], "k": [0, 1]}
    found = hidden_most(variations, 9)
    assert {kind: sorted(chosen.tolist()) for kind, chosen in found.items()} == {"q": [1, 2], "k": [0, 1]}


def test_random_neurons_are_of_the_same_kinds_and_others():
    variations = {kind: Variation(*torch.rand(2, 2, 20)) for kind in "qk"}
    hidden = hidden_most(variations, 12)
    first, again, other = (random_neurons(variations, hidden, seed) for seed in (0, 0, 1))
    for kind, chosen in hidden.items():
        assert len(first[kind]) == len(chosen)
        assert not set(first[kind].tolist()) & set(chosen.tolist())
        assert torch.equal(first[kind], again[kind])
    assert any(not torch.equal(first[kind], other[kind]) for kind in hidden)


def test_random_neurons_are_no_more_than_there_are():
    variations = {"q": Variation(*torch.rand(2, 2, 5))}
    hidden = hidden_most(variations, 7)
    assert len(random_neurons(variations, hidden, 0)["q"]) == 3


def test_scores_are_those_with_the_neurons_at_zero(prompts, facts):
    model, protocol = tiny_model(), Protocol(prompts)
    variations, done = variations_of(model), []
    found = ablation(model, protocol, facts, variations, counts=(3, 40), seed=2, progress=done.append)
    assert sum(done) == pytest.approx(5 * len(facts))
    assert found["none"] == {"neurons": 0, **protocol.score(model, facts).means()}
    assert [part["count"] for part in found["ablated"]] == [3, 40]
    for part in found["ablated"]:
        hidden = hidden_most(variations, part["count"])
        for name, neurons in (("hidden", hidden), ("random", random_neurons(variations, hidden, 2))):
            with zeroed(model, neurons):
                expected = protocol.score(model, facts).means()
            assert part[name] == {"neurons": part["count"], **expected}
    assert found["ablated"][1]["hidden"] != found["ablated"][1]["random"]


def test_variations_of_another_model_are_refused(prompts, facts):
    variations = variations_of(tiny_model())
    with pytest.raises(ValueError, match="expected those of the model"):
        ablation(tiny_model(num_hidden_layers=3), Protocol(prompts), facts, variations)


def test_a_count_of_none_is_refused(prompts, facts):
    with pytest.raises(ValueError, match=r"counts=\[10, 0\]"):
        ablation(tiny_model(), Protocol(prompts), facts, {}, counts=(10, 0))
