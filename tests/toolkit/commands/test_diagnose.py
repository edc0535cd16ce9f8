"""Diagnosing finished runs of tiny models, against the measurements of the models themselves."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssiuu.analysis.ablation import ablation
from ssiuu.analysis.distractors import best_false_options, labels_of_others
from ssiuu.analysis.drift import drift, mean_attributions
from ssiuu.analysis.influence import summarise, variation_by_kind
from ssiuu.analysis.logit_lens import logit_lens
from ssiuu.analysis.measure import measure_influence
from ssiuu.analysis.similarity import cka_by_layer, prompt_states
from ssiuu.attacks.attack import Attack
from ssiuu.commands import attack, diagnose
from ssiuu.commands.attack import attack_run
from ssiuu.commands.diagnose import diagnose_runs
from ssiuu.data.facts import Fact
from ssiuu.data.prompts import PromptFormat
from ssiuu.evaluation.protocol import Protocol
from ssiuu.models.load import load_model
from ssiuu.options import DiagnoseOptions
from ssiuu.runs.folder import Run
from tests.support.models import other_weights, tiny_model

ANSWERS = ("PARIS", "HAMLET BY SHAKESPEARE", "ROME", "A B C", "X")
FACTS = [Fact(f"question {i}", answer, (ANSWERS[i - 1], f"{answer[:1]} OR SO")) for i, answer in enumerate(ANSWERS)]


def tokenizer():
    """A tokenizer whose tokens are characters."""
    characters = {chr(i): i - 31 for i in range(32, 91)} | {"\n": 0}
    raw = Tokenizer(models.WordLevel(characters, unk_token=" "))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split("", "isolated")]
    )
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
    found = diagnose_runs(runs, DiagnoseOptions(batch_size=2, neurons=[5, 20], seed=3))
    prompts = PromptFormat(tokenizer(), 0)
    batch = prompts.collate(prompts.encode_facts(FACTS))
    before = measure_influence(original, [batch])
    for run, model, parts in zip(runs, unlearned, found, strict=True):
        expected = variation_by_kind(before, measure_influence(model, [batch]))
        written = load_file(run / "diagnosis.safetensors")
        assert set(written) == {f"{name}.{kind}" for kind in before for name in ("d_plus", "d_minus")}
        for kind, variation in expected.items():
            assert torch.allclose(written[f"d_minus.{kind}"], variation.d_minus, rtol=1e-3, atol=1e-12), kind
        assert parts == json.loads((run / "diagnosis.json").read_text())
        assert list(parts) == ["influence", "lens", "ablation", "cka"]
        assert parts["influence"]["sum"]["d_plus"] == pytest.approx(summarise(expected)["sum"]["d_plus"], rel=1e-3)
        assert (parts["influence"]["samples"], parts["influence"]["left_out"]) == (len(FACTS), 0)
        for when, net in (("before", original), ("after", model)):
            assert parts["lens"][when] == logit_lens(net, prompts, FACTS, seed=3)._asdict()
        states = (prompt_states(net, prompts, FACTS) for net in (original, model))
        assert parts["cka"]["forget"] == pytest.approx(cka_by_layer(*states), rel=1e-5)
        assert parts["cka"]["facts"] == {"forget": len(FACTS)}
        # Of the run's own D-, which are close to those that are expected, not equal.
        expected = ablation(model, Protocol(prompts), FACTS, Run(run).variations(), counts=[5, 20], seed=3)
        assert parts["ablation"].pop("options") == {"target": "prob", "neurons": [5, 20], "seed": 3}
        assert parts["ablation"] == expected


def test_a_part_that_is_there_is_not_made_again(family, tmp_path, monkeypatch):
    path, _, (model, _) = family
    run, loaded = write_run(tmp_path / "run", path, model, FACTS), []
    (parts,) = diagnose_runs([run], DiagnoseOptions(part=["influence", "lens"]))
    assert list(parts) == ["influence", "lens"]
    tensors = (run / "diagnosis.safetensors").read_bytes()
    load_model = diagnose.load_model
    monkeypatch.setattr(diagnose, "load_model", lambda *given, **how: loaded.append(1) or load_model(*given, **how))

    def of(**options):
        loaded.clear()
        (found,) = diagnose_runs([run], DiagnoseOptions(**options))
        return found, len(loaded)

    assert of(part=["lens", "influence"]) == (parts, 0)
    found, models = of(part=["ablation"], neurons=[5])  # needs the unlearned model alone
    assert ({name: found[name] for name in parts}, list(found)[2:], models) == (parts, ["ablation"], 1)
    found, models = of(part=["lens"], seed=1)
    assert (found["lens"]["options"], found["influence"], models) == ({"seed": 1}, parts["influence"], 2)
    assert (run / "diagnosis.safetensors").read_bytes() == tensors
    found, _ = of(part=["influence"], target="logit")
    assert (found["influence"]["target"], found["ablation"]["options"]["target"]) == ("logit", "prob")
    assert (run / "diagnosis.safetensors").read_bytes() != tensors


def test_what_an_earlier_version_wrote_is_the_part_influence(family, tmp_path):
    path, _, (model, _) = family
    run = write_run(tmp_path / "run", path, model, FACTS)
    (parts,) = diagnose_runs([run], DiagnoseOptions(part=["influence"]))
    flat = {name: value for name, value in parts["influence"].items() if name not in ("options", "left_out")}
    (run / "diagnosis.json").write_text(json.dumps(flat))
    (found,) = diagnose_runs([run], DiagnoseOptions(part=["influence", "lens"]))
    assert found["influence"] == {**flat, "options": {"target": "prob"}}
    assert list(found) == ["influence", "lens"]


@pytest.mark.parametrize("target", ["logit", "margin"])
def test_other_targets(family, tmp_path, monkeypatch, target):
    path, original, (model, _) = family
    facts = [*FACTS, Fact("question 9", "BONN", ("BONN ON THE RHINE",))]  # nothing to take its margin against
    run = write_run(tmp_path / "run", path, model, facts)
    asked = []

    def best(net, *given):
        asked.append(torch.equal(net.lm_head.weight, original.lm_head.weight))
        return best_false_options(net, *given)

    monkeypatch.setattr("ssiuu.analysis.diagnosis.best_false_options", best)
    (parts,) = diagnose_runs([run], DiagnoseOptions(part=["influence"], target=target, batch_size=2))
    assert asked == [True] * (target == "margin")  # the original model alone says what to compare with
    prompts = PromptFormat(tokenizer(), 0)
    batch = prompts.collate(prompts.encode_facts(facts))
    if target == "margin":
        batch = prompts.collate(prompts.encode_facts(FACTS))
        batch["other_labels"] = labels_of_others(batch["labels"], best_false_options(original, prompts, FACTS))
    expected = variation_by_kind(*(measure_influence(net, [batch], target=target) for net in (original, model)))
    summary = parts["influence"]
    assert summary["sum"] == pytest.approx(summarise(expected)["sum"], rel=1e-3)
    assert (summary["samples"], summary["left_out"]) == ((5, 1) if target == "margin" else (6, 0))


def test_a_part_that_a_model_cannot_take_is_named(family, tmp_path):
    _, _, (model, _) = family
    original = save(tiny_model("opt", do_layer_norm_before=False), tmp_path / "opt")
    run = write_run(tmp_path / "run", original, model, FACTS)
    with pytest.raises(ValueError, match=r"part 'lens' of the diagnosis: .* has 0 norms .*; choose others with --part"):
        diagnose_runs([run])


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
    diagnose_runs(runs)
    assert loaded == [str(name) for name in (path, runs[0] / "model", runs[1] / "model", path, runs[2] / "model")]


def test_unfinished_run_is_refused_before_any_work(family, tmp_path):
    path, _, (first, second) = family
    runs = [write_run(tmp_path / "a", path, first, FACTS), write_run(tmp_path / "b", path, second, FACTS)]
    config = json.loads((runs[1] / "config.json").read_text())
    (runs[1] / "config.json").write_text(json.dumps(config | {"status": "running"}))
    with pytest.raises(ValueError, match="b is not finished"):
        diagnose_runs(runs)
    assert not (runs[0] / "diagnosis.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0; expected at least 1"),
        ({"part": ["lens", "lense"]}, "part='lense' is unknown; expected one of influence, lens, ablation, cka"),
        ({"neurons": [10, 0]}, "neurons=0; expected at least 1"),
        ({"target": "odds"}, "target='odds' is unknown; expected one of prob, .*, margin"),
    ],
)
def test_options_out_of_range(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        diagnose_runs([tmp_path], DiagnoseOptions(**options))


ATTACK = Attack("harmful", 0.5, 1e-2, pool="all", steps=3, evaluate_every=3)


def attacked_by(run, monkeypatch, *attacks):
    """Attack the run, and keep the models that the attacks leave, in their order."""
    kept = []
    monkeypatch.setattr(attack, "load_model", lambda *given, **how: kept.append(load_model(*given, **how)) or kept[-1])
    attack_run(run.path, attacks)
    return [model for model, _ in kept[1:]]  # the first one was scored alone


def test_drift_is_that_of_the_attack_s_own_model(run, monkeypatch):
    benign = Attack("benign", None, 1e-2, pool="all", steps=2, evaluate_every=2)
    models = attacked_by(run, monkeypatch, replace(ATTACK, fraction=0.6, learning_rate=0.1), ATTACK, benign)
    original = load_model(run.read("config.json")["model"])[0]
    unlearned, tokenizer = load_model(run.model)
    prompts = PromptFormat(tokenizer, 0)
    batch = prompts.collate(prompts.encode_facts(run.split().forget))

    def expected(attacked):
        found = (measure_influence(net, [batch], target="logit") for net in (original, unlearned, attacked))
        return drift(*map(mean_attributions, found))["pearson"]

    for name, attacked in ((None, models[1]), (benign.name, models[2])):
        (parts,) = diagnose_runs([run.path], DiagnoseOptions(part=["drift"], target="logit", attack=name))
        assert list(parts) == ["drift"]
        assert parts["drift"]["pearson"] == pytest.approx(expected(attacked), abs=1e-4)
        chosen = benign if name else ATTACK
        assert parts["drift"]["options"] == {
            "target": "logit", "attack": chosen.name, "attack_options": chosen.options
        }  # fmt: skip
    assert expected(models[1]) != pytest.approx(expected(models[2]), abs=1e-3)


def test_drift_shares_what_influence_measures(run, monkeypatch):
    attacked_by(run, monkeypatch, ATTACK)
    passes = []
    monkeypatch.setattr(
        "ssiuu.analysis.diagnosis.measure_influence",
        lambda *given, **how: passes.append(1) or measure_influence(*given, **how),
    )
    (parts,) = diagnose_runs([run.path], DiagnoseOptions(part=["drift", "influence"]))
    assert list(parts) == ["influence", "drift"]
    assert len(passes) == 3
    diagnose_runs([run.path], DiagnoseOptions(part=["drift", "influence"]))
    assert len(passes) == 3


def test_an_attack_that_drift_cannot_repeat(run, monkeypatch):
    def message_of(**options):
        with pytest.raises(ValueError, match="part 'drift'") as error:
            diagnose_runs([run.path], DiagnoseOptions(part=["drift"], **options))
        assert not (run.path / "diagnosis.json").exists()
        return str(error.value)

    assert "has no harmful one; run `ssiuu attack` first" in message_of()
    assert "has no attacks/harmful.json" in message_of(attack="harmful")
    attacked_by(run, monkeypatch, ATTACK)
    result = run.read(f"attacks/{ATTACK.name}.json")
    run.write("attacks/old.json", {name: value for name, value in result.items() if name != "pool"})
    run.write("attacks/adapted.json", {**result, "tuning": "lora"})
    run.write("attacks/rounded.json", {**result, "kind": "quantised", "tuning": None, "fraction": None, "options": {}})
    assert "is of an earlier version" in message_of(attack="old")
    for name in ("adapted", "rounded"):
        assert "expected an attack that trains all parameters" in message_of(attack=name)
