"""Made-up run folders: everything that a finished run writes, without a model."""

import json
import math

import torch
from safetensors.torch import save_file

from ssiuu.analysis.drift import drift
from ssiuu.analysis.influence import KINDS, Variation, summarise

FACT = {"question": "Who wrote Hamlet?", "answer": "William Shakespeare", "subject": "William Shakespeare"}


def write_run(path, method="gd", *, strength=1.0, layers=2, width=16, steps=4, attacks=True, diagnosis=True):
    """A run folder whose numbers look like those of `method`; `strength` scales what the attacks bring back."""
    path.mkdir(parents=True)
    penalised = method == "ssiuu"
    config = {
        "status": "complete",
        "method": method,
        "model": "smollm2",
        "learning_rate": 1e-5,
        "penalty_weight": 1e-3 if penalised else None,
        "penalty_share": 0.25 if penalised else None,
        "target": "prob",
        "seed": 0,
        "shots": 1,
        "dtype": "float32",
    }
    _write(path / "config.json", config)
    _write(path / "split.json", {"forget": [FACT] * 12, "retain": [FACT] * 12, "test": [FACT] * 6})
    lines = [
        {
            "step": step,
            "seconds": 1.5,
            "loss": 2 - step / steps,
            "loss_grad_norm": 3 + math.sin(step),
            "penalty_grad_norm": 1.0 * penalised * (step > 1),
            "penalty": 0.1 * penalised,
            "lambda": 10 * 1.3**step * penalised,
            "share": 0.25 * penalised * (1 - math.exp(-step)),
            "fs": 1 - 0.7 * step / steps,
            "rs": 0.95,
            "forget_probability": 0.5 * (1 - step / steps),
            "retain_probability": 0.6,
        }
        for step in range(1, steps + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = {"fs": 1.0, "rs": 0.97, "forget_probability": 0.4, "retain_probability": 0.55, "forget_margin": 3.1,
              "retain_margin": 3.3, "test_rs": 0.95, "test_retain_probability": 0.5}  # fmt: skip
    after = {"fs": 0.33, "rs": 0.9, "forget_probability": 0.02, "retain_probability": 0.6, "forget_margin": -1.2,
             "retain_margin": 3.0, "test_rs": 0.85, "test_retain_probability": 0.4}  # fmt: skip
    _write(path / "evaluation.json", {"before": before, "after": after})
    if attacks:
        _write_attacks(path / "attacks", strength)
    if diagnosis:
        _write_diagnosis(path, strength, layers, width)
    return path


def _write_attacks(path, strength):
    path.mkdir()
    for kind, fraction in (("harmful", 0.1), ("harmful", 0.3), ("benign", None)):
        for rate in (5e-6, 1e-5):
            steps = []
            for step in range(0, 31, 5):
                grown = strength * (1 - math.exp(-step * rate * 1e4)) * (0.3 if kind == "benign" else 1)
                values = {
                    "step": step,
                    "fs": 0.33 + 0.5 * grown,
                    "forget_probability": 0.02 + 0.3 * grown,
                    "forget_margin": 4 * grown - 3,
                }
                values |= {"unseen_fs": 0.5 * grown, "unseen_probability": 0.02 + 0.2 * grown}
                values["unseen_margin"] = 4 * grown - 3
                steps.append(values)
            _write(path / f"{kind}-{fraction}-{rate}.json", attack_result(kind, fraction, rate, steps=steps))


def attack_result(kind="harmful", fraction=0.3, learning_rate=1e-5, seed=0, *, steps, **changes):
    """What the file of an attack holds; its pool are eight of twelve facts, of which it trains on floor(8 p)."""
    pool = [0, 1, 2, 4, 5, 7, 9, 11]
    seen = pool[: int(8 * (fraction or 0))]
    return {
        "kind": kind,
        "fraction": fraction,
        "learning_rate": learning_rate,
        "seed": seed,
        "tuning": "full",
        "options": {"steps": 30},
        "pool": {"name": "wrong", "definition": "", "size": 8, "indices": pool, "of": 12},
        "seen": seen,
        "unseen": [i for i in pool if i not in seen],
        "steps": steps,
        "flat": None,
        "max_fs": max(step["fs"] for step in steps),
        "max_unseen_fs": max(step["unseen_fs"] for step in steps),
        "seconds": 12.0,
        **changes,
    }


def _write_diagnosis(path, strength, layers, width):
    variations = {}
    for kind in KINDS:
        hidden = torch.rand(layers, width) ** 8 * strength * torch.rand(layers, 1)
        erased = torch.rand(layers, width) ** 8 * torch.rand(layers, 1)
        variations[kind] = Variation(erased, hidden)
    influence = summarise(variations) | {"samples": 12, "target": "log_prob", "seconds": {"before": 3.0, "after": 3.0}}
    shares = {"before": [0.5 + 0.4 * i / layers for i in range(layers)], "after": [0.5 - 0.2 * strength] * layers}
    scores = [{"neurons": n, "score": 0.3 + s, "probability": 0.02 + s, "margin": s - 1.5}
              for n, s in ((0, 0.0), (10, 0.2 * strength), (10, 0.01), (100, 0.4 * strength), (100, 0.03))]  # fmt: skip
    none, *pairs = scores
    diagnosis = {
        "influence": {"options": {"target": "log_prob"}, **influence},
        "lens": {"options": {"seed": 0}}
        | {when: {"share": share, "compared": 12, "left_out": 0} for when, share in shares.items()},
        "ablation": {
            "options": {"target": "log_prob", "neurons": [10, 100], "seed": 0},
            "none": none,
            "ablated": [
                {"count": hidden["neurons"], "hidden": hidden, "random": random}
                for hidden, random in zip(pairs[::2], pairs[1::2], strict=True)
            ],
        },
        "cka": {
            "options": {},
            "forget": [1 - 0.1 * strength * i / layers for i in range(layers)],
            "retain": [1 - 0.02 * i / layers for i in range(layers)],
            "facts": {"forget": 12, "retain": 12},
        },
        "drift": {
            "options": {"target": "log_prob", "attack": "harmful-p0.1-wrong-lr1e-05-seed0", "attack_options": {}},
            **drift(*(torch.randn(3, 500, dtype=torch.float64) ** 3)),
        },
    }
    _write(path / "diagnosis.json", diagnosis)
    tensors = {f"{name}.{kind}": getattr(v, name) for kind, v in variations.items() for name in v._fields}
    save_file(tensors, path / "diagnosis.safetensors")


def _write(path, content):
    path.write_text(json.dumps(content))
