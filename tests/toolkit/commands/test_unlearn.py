"""Unlearning runs on a tiny model: what they leave behind, how they resume, what they refuse."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ssiuu.commands import unlearn as unlearn_module
from ssiuu.commands.unlearn import unlearn
from ssiuu.data.facts import Fact, Split
from ssiuu.data.prompts import PromptFormat
from ssiuu.evaluation.likelihood import chance
from ssiuu.runs.folder import Run
from ssiuu.training.schedule import Part, Schedule
from ssiuu.training.step_log import DivergedError, StepRecord
from ssiuu.training.trainer import RecordedTrainer, training_arguments
from ssiuu.training.unlearn_trainer import UnlearnTrainer
from tests.support.small_runs import KilledError, assert_resumes_bit_for_bit, by, kill_after, lines, weights


@pytest.mark.parametrize("method", ["gd", "ssiuu"])
def test_a_run_leaves_its_records(options, tmp_path, method):
    run = unlearn(by(options, method), tmp_path / "run")
    assert run.read("config.json")["status"] == "complete"
    assert set(run.read("evaluation.json")) == {"before", "after"}
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 5, 6]
    assert ("share" in lines(run)[-1]) == (method == "ssiuu")
    assert ["fs" in line for line in lines(run)] == [False, False, True] * 2
    assert run.split().forget


def test_unlearning_lowers_the_forget_probability(options, tmp_path):
    evaluation = unlearn(options.replace(max_steps=20), tmp_path / "run").read("evaluation.json")
    assert evaluation["after"]["forget_probability"] < 0.5 * evaluation["before"]["forget_probability"]


def test_the_penalty_changes_the_run(options, tmp_path):
    gd = weights(unlearn(by(options, "gd"), tmp_path / "gd"))
    ssiuu = weights(unlearn(options, tmp_path / "ssiuu"))
    assert any(not torch.equal(gd[name], ssiuu[name]) for name in gd)


def test_without_weight_the_penalty_changes_nothing(options, tmp_path):
    gd = weights(unlearn(by(options, "gd"), tmp_path / "gd"))
    zero = weights(unlearn(options.replace(penalty_weight=0.0, penalty_share=None), tmp_path / "zero"))
    assert all(torch.allclose(gd[name], zero[name], rtol=1e-4, atol=1e-6) for name in gd)


@pytest.mark.parametrize("method", ["gd", "ssiuu"])
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])
def test_a_killed_run_resumes_bit_for_bit(options, tmp_path, monkeypatch, step, method):
    options = by(options, method, accumulate=2, forget_batch=2)
    assert_resumes_bit_for_bit(options, tmp_path, monkeypatch, step)


def test_a_run_killed_after_its_last_step_resumes_bit_for_bit(options, tmp_path, monkeypatch):
    options = options.replace(threshold=1.0, evaluate_every=2)  # stops at step 2, which is also saved
    whole = unlearn(options, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(Run, "finish", lambda run: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            unlearn(options, tmp_path / "killed")
    resumed = unlearn(options, tmp_path / "killed", resume=True)
    assert [line["step"] for line in lines(resumed)] == [1, 2]
    assert all(torch.equal(weights(resumed)[name], tensor) for name, tensor in weights(whole).items())


def test_stops_at_the_threshold(options, tmp_path):
    run = unlearn(options.replace(threshold=1.0, evaluate_every=1), tmp_path / "run")
    assert len(lines(run)) == 1


def test_a_loss_that_is_no_number_stops_the_run(options, tmp_path, monkeypatch):
    compute = UnlearnTrainer.compute_loss

    def diverge(trainer, *args, **kwargs):
        loss = compute(trainer, *args, **kwargs)
        return loss * math.nan if trainer.state.global_step == 4 else loss

    monkeypatch.setattr(UnlearnTrainer, "compute_loss", diverge)
    with pytest.raises(DivergedError, match="the loss is nan at step 5"):
        unlearn(options, tmp_path / "run")
    run = Run(tmp_path / "run")
    assert run.last_checkpoint().name == "checkpoint-4"
    assert all(tensor.isfinite().all() for tensor in load_file(run.last_checkpoint() / "model.safetensors").values())


@pytest.mark.parametrize(
    ("method", "changes"),
    [("gd", {}), ("ssiuu", {}), ("ssiuu", {"update_in_backward": True})],
    ids=["gd", "ssiuu", "in backward"],
)
def test_a_gradient_that_is_not_finite_reaches_no_checkpoint(options, tmp_path, monkeypatch, method, changes):
    monkeypatch.setattr("ssiuu_kernels.optim.update_in_backward.WAITING", 100)
    compute = UnlearnTrainer.compute_loss

    def diverge(trainer, *args, **kwargs):
        loss = compute(trainer, *args, **kwargs)
        return loss + (0 * loss).sqrt() if trainer.state.global_step == 4 else loss  # finite, with a slope of 0 * inf

    monkeypatch.setattr(UnlearnTrainer, "compute_loss", diverge)
    with pytest.raises(DivergedError, match="the gradient's norm is nan at step 5"):
        unlearn(by(options, method, save_every=1, **changes), tmp_path / "run")
    assert Run(tmp_path / "run").last_checkpoint().name == "checkpoint-4"


def test_a_penalty_that_cannot_be_applied_is_refused_before_any_work(options, tmp_path):
    with pytest.raises(ValueError, match=r"penalty_weight=1e\+300; expected at most 1e\+30"):
        unlearn(options.replace(penalty_weight=1e300), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_penalty_that_overflows_reaches_no_checkpoint(options, tmp_path, monkeypatch):
    metrics = UnlearnTrainer.optimizer_metrics

    def overflowing(trainer):
        return metrics(trainer) | ({"penalty_grad_norm": math.inf} if trainer.state.global_step == 4 else {})

    monkeypatch.setattr(UnlearnTrainer, "optimizer_metrics", overflowing)
    with pytest.raises(DivergedError, match="the penalty's gradient norm is inf at step 4"):
        unlearn(options.replace(save_every=1), tmp_path / "run")
    assert Run(tmp_path / "run").last_checkpoint().name == "checkpoint-3"
    for file in (tmp_path / "run").glob("checkpoints/*/model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_several_gpus_are_not_wrapped_in_data_parallel(loaded, tmp_path):
    model, tokenizer = loaded
    prompts = PromptFormat(tokenizer, 0)
    arguments = training_arguments(tmp_path, learning_rate=1e-3, max_steps=1, seed=0)
    arguments._n_gpu = 2 * (arguments.n_gpu + 1)
    schedule = Schedule([Part([prompts.encode("where ann born", "rome")], 1, True)], 1, 0)
    trainer = RecordedTrainer(model, arguments, schedule, prompts, StepRecord(print, lambda _: {}, 1))
    assert not isinstance(trainer._wrap_model(model), torch.nn.DataParallel)
    assert arguments.train_batch_size == 1


@pytest.mark.parametrize("value", ["retain_batch", "forget_batch"])
def test_a_batch_larger_than_its_set(options, tmp_path, value):
    with pytest.raises(ValueError, match=f"{value}=99"):
        unlearn(options.replace(**{value: 99}), tmp_path / "run")


def test_a_model_that_knows_none_of_the_facts(options, tmp_path):
    with pytest.raises(ValueError, match="the forget set is empty"):
        unlearn(options.replace(known_probability=1.0), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_refused_model_leaves_no_folder(options, tmp_path):
    with pytest.raises(ValueError, match=r"could not be loaded|is not a model folder"):
        unlearn(options.replace(model=str(tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_existing_folder_is_refused(options, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"exists; choose another$"):
        unlearn(options, tmp_path / "run")


def test_a_folder_made_beforehand_is_taken(options, tmp_path):
    (tmp_path / "run").mkdir()
    assert unlearn(options.replace(max_steps=1), tmp_path / "run").read("config.json")["status"] == "complete"


def test_an_unfinished_run_is_not_begun_again_unasked(options, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        kill_after(patched, 1)
        with pytest.raises(KilledError):
            unlearn(options, tmp_path / "run")
    with pytest.raises(ValueError, match="exists; choose another, or continue it with --resume"):
        unlearn(options, tmp_path / "run")


@pytest.mark.parametrize("false_options", [1, 2, 5])
def test_the_default_threshold_is_chance(options, facts, tmp_path, monkeypatch, false_options):
    facts = [replace(fact, false_options=tuple(f"no {i}" for i in range(false_options))) for fact in facts]
    assert chance(facts) == 1 / (1 + false_options)
    split, scores = (
        Split(facts[:2], facts[2:4], []),
        iter([1.0, 1 / (1 + false_options) + 1e-9, 1 / (1 + false_options)]),
    )
    monkeypatch.setattr(
        unlearn_module, "named_means", lambda _, which: {"fs": next(scores)} if which == "forget" else {}
    )
    run = unlearn(options.replace(threshold=None, evaluate_every=1), tmp_path / "run", split=split)
    assert len(lines(run)) == 3


def test_chance_among_facts_with_different_numbers_of_options():
    assert chance([Fact("q", "a", ("b",)), Fact("r", "a", ("b", "c", "d"))]) == 3 / 8


def test_the_bar_moves_while_everything_is_scored_before_step_1(options, tmp_path, capsys):
    unlearn(options.replace(max_steps=1), tmp_path / "run")
    assert re.search(r"score before .*12/12.*\n(.*\n)*unlearn", capsys.readouterr().out)


def test_a_fact_that_does_not_fit_the_model(options, tmp_path):
    config = transformers.GPT2Config(vocab_size=60, n_embd=8, n_layer=1, n_head=2, n_positions=12)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(options.model).save_pretrained(tmp_path / "model")
    facts = [Fact("where ann born", "rome"), Fact("where bob born " * 3, "oslo")]
    with pytest.raises(ValueError, match="tokens with its examples, more than the model's 12 positions"):
        unlearn(options.replace(model=str(tmp_path / "model")), tmp_path / "run", split=Split(facts[:1], facts[1:], []))
    assert not (tmp_path / "run").exists()


def test_resuming_with_other_options_is_refused(options, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        kill_after(patched, 3)
        with pytest.raises(KilledError):
            unlearn(options, tmp_path / "run")
    with pytest.raises(ValueError, match=r"was started with learning_rate=0\.001, now 0\.1"):
        unlearn(options.replace(learning_rate=0.1), tmp_path / "run", resume=True)


def test_a_run_of_a_version_without_an_option_is_resumed_with_it(options, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        kill_after(patched, 3)
        with pytest.raises(KilledError):
            unlearn(options, tmp_path / "run")
    run = Run(tmp_path / "run")
    before = run.read("config.json")
    run.write("config.json", {name: value for name, value in before.items() if name != "engine"})
    assert unlearn(options, tmp_path / "run", resume=True).read("config.json")["status"] == "complete"


def test_resuming_a_finished_run_is_refused(options, tmp_path):
    unlearn(options.replace(max_steps=1), tmp_path / "run")
    with pytest.raises(ValueError, match="nothing to resume"):
        unlearn(options.replace(max_steps=1), tmp_path / "run", resume=True)


BAD = {
    "unknown method": ("method='nppo' is unknown; expected one of .*gd", {"method": "nppo"}),
    "unknown target": ("target='loss'", {"target": "loss"}),
    "unknown engine": ("engine='no-backward' is unknown; expected one of one-backward", {"engine": "no-backward"}),
    "update in backward of a sum": (
        r"update_in_backward=True with accumulate=2 .* a larger --forget-batch with --gradient-checkpointing",
        {"update_in_backward": True, "accumulate": 2},
    ),
    "unknown regularizer": (
        "regularizer='ssiu' is unknown; expected one of .*none",
        {"method": "gd", "regularizer": "ssiu"},
    ),
    "two regularizers": ("method='ssiuu' is gd with the regularizer ssiuu.*use method='gd'", {"regularizer": "l2"}),
    "unknown setting": ("penalty_wait is not an option of method 'gd' with regularizer 'ssiuu'", {"penalty_wait": 1}),
    "a setting of another regularizer": ("penalty_share is not an option of method 'gd'", {"method": "gd"}),
    "a share out of range": ("penalty_share=1.5", {"penalty_share": 1.5}),
    "no steps": ("max_steps=0", {"max_steps": 0}),
    "a learning rate that is not finite": ("learning_rate=nan", {"learning_rate": math.nan}),
    "a weight that is not finite": ("penalty_weight=inf", {"penalty_weight": math.inf}),
    "a threshold that nothing reaches": ("threshold=nan", {"threshold": math.nan}),
    "negative learning rate": ("learning_rate=-1", {"learning_rate": -1.0}),
    "facts and forget": ("either facts, or forget and retain, or data", {"forget": "a.jsonl", "retain": "b.jsonl"}),
    "forget alone": ("either facts, or forget and retain, or data", {"facts": None, "forget": "a.jsonl"}),
}


@pytest.mark.parametrize(("message", "changes"), BAD.values(), ids=BAD)
def test_bad_options_are_refused_before_any_work(options, tmp_path, monkeypatch, message, changes):
    monkeypatch.setattr(unlearn_module, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        unlearn(options.replace(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_update_in_backward_needs_the_penaltys_optimizer(options, tmp_path):
    with pytest.raises(ValueError, match=r"update_in_backward=True with regularizer='none'.* expected one of ssiuu"):
        unlearn(by(options, "gd", update_in_backward=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_free_text_facts_are_judged_by_rouge(options, tmp_path):
    for name, person in (("forget", "ann"), ("retain", "bob")):
        (tmp_path / f"{name}.jsonl").write_text(
            json.dumps({"question": f"where {person} born", "answer": "rome"}) + "\n"
        )
    run = unlearn(
        options.replace(
            facts=None,
            forget=str(tmp_path / "forget.jsonl"),
            retain=str(tmp_path / "retain.jsonl"),
            max_steps=1,
        ),
        tmp_path / "run",
    )
    assert "forget_margin" not in run.read("evaluation.json")["after"]


def test_a_schedule_goes_through_each_part_in_turn():
    schedule = Schedule([Part(["a", "b", "c"], 2, True), Part(["x"], 1, False)], count=3, seed=5)
    batches = [schedule[i] for i in range(3)]
    forgotten = [sample for batch in batches for sample in batch.samples[:2]]
    assert sorted(forgotten[:3]) == sorted(forgotten[3:]) == ["a", "b", "c"]
    assert all(batch.samples[2] == "x" and batch.forget == [True, True, False] for batch in batches)
