"""A study of the tiny model, and what it leaves behind."""

import json

import yaml

from ssiuu.commands.study import run_study

ATTACKS = [{"kind": ["harmful"], "fraction": [0.3], "learning_rate": [1e-3], "steps": 2, "evaluate_every": 1,
            "pool": "all"}]  # fmt: skip
OF_THE_MACHINE = ("seconds", "tokens_per_second", "peak_memory_bytes", "seconds_per_step", "memory_gib")


def tiny_study(model_dir, facts_file, **changes):
    """Two cells of gd with two seeds on the tiny model."""
    base = {"model": str(model_dir), "facts": str(facts_file), "forget_people": 2, "retain_people": 3, "shots": 0,
            "max_steps": 2, "learning_rate": 1e-3, "threshold": -1.0, "save_every": 1}  # fmt: skip
    cells = {"gd": {"method": "gd"}, "slow": {"method": "gd", "learning_rate": 1e-4}}
    whole = {"base": base, "seeds": [0, 1], "cells": cells, "attacks": ATTACKS, "diagnose": {}, "baseline": "gd"}
    return {**whole, **changes}


def write_study(folder, content):
    """The path of a study file with this content."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run_here(path, out):
    """Run it in this process; how many tasks failed."""
    return run_study(path, out, jobs=0)


def results(out):
    """results.json without what no two runs have in common."""

    def kept(value):
        if isinstance(value, dict):
            return {name: kept(part) for name, part in value.items() if name not in OF_THE_MACHINE}
        return value

    return kept(json.loads((out / "results" / "results.json").read_text()))


def stamps(folder):
    """File -> (mtime, bytes) of everything below a folder."""
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in sorted(folder.rglob("*")) if file.is_file()}
