"""Influence variation against a brute-force computation with autograd in float64, sample by sample."""

import copy
import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import ssiuu_kernels as sk
from ssiuu.analysis import influence as diagnose
from ssiuu.data.facts import Fact
from ssiuu.data.prompts import PromptFormat
from ssiuu_kernels import NeuronScores, sequence_log_probs
from tests.support.models import logits_of, tiny_batch, tiny_model

PARTS = {
    "self_attn": {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"},
    "mlp": {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}


def brute_force(model, batch):
    """kind -> `[B, S, width]` attributions of each layer, NaN on padding, from a hook on every module's output."""
    outputs, handles = {}, []
    for layer, block in enumerate(model.model.layers):
        for owner, kinds in PARTS.items():
            for kind, part in kinds.items():

                def keep(_module, _args, z, key=(kind, layer)):
                    z.retain_grad()
                    outputs[key] = z

                handles.append(getattr(getattr(block, owner), part).register_forward_hook(keep))
    found = {}
    for sample in range(len(batch["labels"])):
        one = {name: tensor[sample : sample + 1] for name, tensor in batch.items()}
        sequence_log_probs(logits_of(model, one), one["labels"]).exp().sum().backward()
        padding = one["attention_mask"][0] == 0
        for key, z in outputs.items():
            found.setdefault(key, []).append((z * z.grad)[0].detach().masked_fill(padding[:, None], torch.nan))
    for handle in handles:
        handle.remove()
    return {kind: [torch.stack(found[kind, layer]) for layer in range(2)] for kind, layer in found if layer == 0}


def equations_4_and_5(before, after):
    """D+ and D- of `[B, S, width]` attributions, in plain loops over samples and tokens."""
    d_plus = d_minus = torch.zeros(before.shape[-1], dtype=before.dtype)
    for a, b in zip(before, after, strict=True):
        tokens = ~a[:, 0].isnan()
        a, b = a[tokens], b[tokens]
        d_plus = d_plus + (a.amax(0) - b.clamp(min=0).amax(0)) / len(before)
        d_minus = d_minus + (a.amin(0) - b.amin(0)) / len(before)
    return d_plus.clamp(min=0), d_minus.clamp(min=0)


def other_weights(model):
    """A copy whose weights differ, as after some training."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.mul_(1 + 0.3 * torch.randn_like(parameter))
    return other


def split(batch, size):
    return [{name: tensor[i : i + size] for name, tensor in batch.items()} for i in range(0, 4, size)]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("size", [1, 3, 4])
def test_equals_brute_force(size, padding):
    before = tiny_model("llama", torch.float64).eval()
    after, batch = other_weights(before), tiny_batch(padding)
    expected = [brute_force(model, batch) for model in (before, after)]
    measured = [diagnose.measure_influence(model, split(batch, size)) for model in (before, after)]
    variations = diagnose.variation_by_kind(*measured)
    assert list(variations) == [kind for kind in diagnose.KINDS if kind != "qkv"]
    for kind, variation in variations.items():
        for layer in range(2):
            wanted = equations_4_and_5(expected[0][kind][layer], expected[1][kind][layer])
            scale = max(x.max() for x in wanted)
            for actual, x in zip(variation, wanted, strict=True):
                assert torch.allclose(actual[layer].double(), x, rtol=1e-6, atol=1e-6 * scale), (kind, layer)


def test_ungated_mlps_and_fused_attention():
    model, batch = tiny_model("gpt2").eval(), tiny_batch()
    with sk.patch(model, scope="all") as handle:
        scores = handle.attribute(batch)
    found = diagnose.measure_influence(model, [batch])
    assert list(found) == ["qkv", "o", "up", "down"]
    ups = [scores[f"transformer.h.{layer}.mlp"]["up"].max.double().mean(-2) for layer in range(2)]
    assert torch.allclose(found["up"].max, torch.stack(ups), rtol=1e-6, atol=0)


def test_mean_inside_and_clamp_outside():
    def scores(largest, smallest):
        return NeuronScores(torch.tensor(largest)[:, None], torch.tensor(smallest)[:, None], torch.zeros(2, 1))

    before = scores([1.0, 3.0], [-1.0, 0.0])
    # D+: samples change by 1 - 0 (a negative maximum counts as none) and 3 - 5; D-: by -1 + 4 and 0 + 0.
    variation = diagnose.influence_variation(before, scores([-2.0, 5.0], [-4.0, 0.0]))
    assert variation.d_plus.tolist() == [0.0]
    assert variation.d_minus.tolist() == [1.5]
    assert diagnose.influence_variation(before, scores([-2.0, 1.0], [0.0, 0.0])).d_plus.tolist() == [1.5]


def test_the_same_model_has_no_negative_influence_added():
    model, batch = tiny_model(), tiny_batch()
    found = diagnose.measure_influence(model, [batch])
    assert all(
        variation.d_minus.count_nonzero() == 0 for variation in diagnose.variation_by_kind(found, found).values()
    )


def test_sums_at_the_top():
    layers = torch.arange(6.0).reshape(2, 3)
    variations = {"q": diagnose.Variation(layers, layers * 2), "k": diagnose.Variation(layers + 10, layers)}
    summary = diagnose.summarise(variations, top=2)
    assert summary["sum"] == {"d_plus": 29.0, "d_minus": 18.0}
    assert summary["sum_by_kind"]["q"] == {"d_plus": 9.0, "d_minus": 18.0}
    assert summary["mean_top"]["d_plus"] == {"q": [1.5, 4.5], "k": [11.5, 14.5]}


def test_no_batches():
    with pytest.raises(ValueError, match="batches is empty"):
        diagnose.measure_influence(tiny_model(), [])


def test_stacks_of_other_shapes():
    scores = [NeuronScores(*torch.zeros(3, samples, 5)) for samples in (2, 3)]
    with pytest.raises(ValueError, match=r"\[2, 5\] and \[3, 5\]"):
        diagnose.influence_variation(*scores)


def test_weights_that_are_not_numbers():
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        diagnose.measure_influence(model, [tiny_batch()])


FACTS = [
    Fact(f"question {i}", answer) for i, answer in enumerate(["Paris", "Hamlet by Shakespeare", "Rome", "a b c", "x"])
]


def tokenizer():
    """A tokenizer whose tokens are characters."""
    characters = {chr(i): i - 31 for i in range(32, 91)} | {"\n": 0}
    raw = Tokenizer(models.WordLevel(characters, unk_token=" "))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token=" ", pad_token="\n")


def write_run(path, original, unlearned, facts):
    config = {"status": "complete", "model": str(original), "dtype": "float32", "shots": 0, "method": "gd"}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    sets = {"forget": [asdict(fact) for fact in facts], "retain": [], "test": []}
    (path / "split.json").write_text(json.dumps(sets))
    save(unlearned, path / "model")
    return path


def save(model, path):
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def family(tmp_path):
    """The folder of an original model, and two models unlearned from it."""
    torch.manual_seed(0)
    original = tiny_model().eval()
    return save(original, tmp_path / "original"), original, [other_weights(original), other_weights(original)]


def test_run_folders_get_what_the_models_give(family, tmp_path):
    path, original, unlearned = family
    runs = [write_run(tmp_path / f"run{i}", path, model, FACTS) for i, model in enumerate(unlearned)]
    summaries = diagnose.diagnose_runs(runs, batch_size=2)
    prompts = PromptFormat(tokenizer(), 0)
    batch = prompts.collate(prompts.encode_facts(FACTS))
    before = diagnose.measure_influence(original, [batch])
    for run, model, summary in zip(runs, unlearned, summaries, strict=True):
        expected = diagnose.variation_by_kind(before, diagnose.measure_influence(model, [batch]))
        written = load_file(run / "diagnosis.safetensors")
        assert set(written) == {f"{name}.{kind}" for kind in before for name in ("d_plus", "d_minus")}
        for kind, variation in expected.items():
            assert torch.allclose(written[f"d_minus.{kind}"], variation.d_minus, rtol=1e-3, atol=1e-12), kind
        assert summary == json.loads((run / "diagnosis.json").read_text())
        assert summary["sum"]["d_plus"] == pytest.approx(diagnose.summarise(expected)["sum"]["d_plus"], rel=1e-3)
        assert summary["samples"] == len(FACTS)


def test_runs_share_the_original_only_with_the_same_facts(family, tmp_path, monkeypatch):
    path, _, (first, second) = family
    loaded, load_model = [], diagnose.load_model
    monkeypatch.setattr(
        diagnose, "load_model", lambda name, **options: loaded.append(name) or load_model(name, **options)
    )
    runs = [
        write_run(tmp_path / "a", path, first, FACTS),
        write_run(tmp_path / "b", path, second, FACTS),
        write_run(tmp_path / "c", path, second, FACTS[:2]),
    ]
    diagnose.diagnose_runs(runs)
    assert loaded == [str(path), runs[0] / "model", runs[1] / "model", str(path), runs[2] / "model"]


def test_unfinished_run_is_refused_before_any_work(family, tmp_path):
    path, _, (first, second) = family
    runs = [write_run(tmp_path / "a", path, first, FACTS), write_run(tmp_path / "b", path, second, FACTS)]
    config = json.loads((runs[1] / "config.json").read_text())
    (runs[1] / "config.json").write_text(json.dumps(config | {"status": "running"}))
    with pytest.raises(ValueError, match="b is not finished"):
        diagnose.diagnose_runs(runs)
    assert not (runs[0] / "diagnosis.json").exists()


def test_batch_size(tmp_path):
    with pytest.raises(ValueError, match="batch_size=0"):
        diagnose.diagnose_run(tmp_path, batch_size=0)
