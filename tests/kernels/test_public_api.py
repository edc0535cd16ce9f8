"""The names that programs outside the project rely on."""

import inspect
import subprocess
import sys

import ssiuu_kernels as sk

TOP_LEVEL = {
    "ATTRIBUTION_TARGETS", "ENGINES", "IGNORE_INDEX", "TARGETS", "environment",
    "ActGrads", "Availability", "GluGrads", "NeuronPenalty", "NeuronScores", "PackedGluGrads", "PatchHandle",
    "GradientPath", "PenaltyStats", "SsiuuAdamW", "SsiuuPenalty", "available_backends", "collect_env", "ops", "patch",
    "sequence_log_probs",
}  # fmt: skip
SIGNATURES = {
    sk.ops.glu_forward: "gate up activation backend",
    sk.ops.glu_backward: "gate up grad_h activation segments scores recompute_h penalty backend",
    sk.ops.packed_glu_forward: "gate_up activation backend",
    sk.ops.packed_glu_backward: "gate_up grad_h activation segments scores recompute_h penalty backend",
    sk.ops.act_forward: "x activation backend",
    sk.ops.act_backward: "x grad_h activation segments scores recompute_h penalty backend",
    sk.ops.token_scores: "z grad_z segments backend",
    sk.ops.penalty_: "grad param target_grad prev_attribution weight step keep_anchor backend",
    sk.ops.penalty_adamw_: "param grad target_grad prev_attribution exp_avg exp_avg_sq "
    "step lr betas eps weight_decay weight keep_anchor seed backend",
    sk.ops.penalty_many_: "grads params target_grads prev_attributions weight step keep_anchor backend",
    sk.ops.penalty_adamw_many_: "params grads target_grads prev_attributions exp_avgs exp_avg_sqs "
    "step lr betas eps weight_decay weight keep_anchor seeds backend",
    sk.ops.wgrad_pair: "x grad_y loss_weights target_weights target_rows ratio",
    sk.patch: "model scope backend strict level penalty_weight forget_samples engine grad_dtype",
    sk.PatchHandle.attribute: "self batch target",
    sk.PatchHandle.unlearning_loss: "self logits labels forget objective target sample_ids "
    "segments reference_log_probs",
    sk.sequence_log_probs: "logits labels segments",
}
FIELDS = {
    sk.NeuronScores: "max min sum",
    sk.GluGrads: "grad_gate grad_up h h_scores gate_scores",
    sk.PackedGluGrads: "grad_gate_up h h_scores gate_scores",
    sk.ActGrads: "grad_x h h_scores x_scores",
    sk.NeuronPenalty: "weight ratio bank rows",
    sk.PenaltyStats: "value penalty_grad_norm loss_grad_norm share negative",
    sk.Availability: "ok reason",
    sk.GradientPath: "engine reason",
}


def test_top_level_names():
    assert set(sk.__all__) == TOP_LEVEL


def test_constants():
    assert sk.ENGINES == ("one-backward", "two-backward", "checked")
    assert sk.TARGETS == ("prob", "geometric_mean_prob", "log_prob")
    assert sk.ATTRIBUTION_TARGETS[3:] == ("logit", "margin")
    assert sk.IGNORE_INDEX == -100


def test_the_environment_is_flat_text_that_collect_env_prints():
    facts = sk.environment()
    assert all(isinstance(value, str) for value in facts.values())
    assert sk.collect_env().splitlines() == [f"{name}: {value}" for name, value in facts.items()]


def test_signatures():
    assert {f: " ".join(inspect.signature(f).parameters) for f in SIGNATURES} == SIGNATURES


def test_fields():
    assert {kind: " ".join(kind._fields) for kind in FIELDS} == FIELDS


def test_importing_the_kernels_imports_no_transformers():
    code = "import sys, ssiuu_kernels; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
