"""Audits of models of which the truth is known."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest

from ssiuu.commands.audit import audit
from ssiuu.options import AuditOptions
from tests.support import audited
from tests.support.command_line import run
from tests.support.jsonl import write_rows

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module", params=SEEDS)
def models(request, tmp_path_factory):
    """A model that was taught all facts, one that was taught without the forget facts, one that hides them; facts."""
    folder, seed = tmp_path_factory.mktemp(f"audited{request.param}"), request.param
    forget, retain = audited.facts_of(seed)
    original = audited.taught(audited.new_model(seed), forget + retain)
    found = {
        "original": original,
        "retrained": audited.taught(audited.new_model(seed), retain),
        "hidden": audited.with_bias(original, forget),
    }
    paths = {name: str(audited.save(model, folder / name)) for name, model in found.items()}
    files = {"forget": forget, "retain": retain}
    paths |= {name: str(audited.write_facts(folder / f"{name}.jsonl", facts)) for name, facts in files.items()}
    instructions = [{"instruction": f"say {word}", "output": word} for word in ("yes", "no")]
    return SimpleNamespace(**paths, instructions=str(write_rows(folder / "instructions.jsonl", *instructions)))


def options(models, after, **changes):
    return AuditOptions(**{
        "before": models.original, "after": getattr(models, after), "forget": models.forget, "retain": models.retain,
        "shots": 0, "learning_rate": [1e-3], "steps": 20, "evaluate_every": 10, "instructions": models.instructions,
        **changes,
    })  # fmt: skip


@pytest.mark.parametrize(("after", "verdict"), [("retrained", "erased"), ("hidden", "hidden")])
def test_the_truth_is_found(models, tmp_path, after, verdict):
    record, page = audit(options(models, after), tmp_path / "audit")
    assert record["verdict"] == verdict, record["sentence"]
    assert record["before"]["scores"]["fs"] == 1
    assert record["after"]["scores"]["fs"] < 0.3  # both look unlearned
    text = page.read_text()
    body = text[text.index("<body>") :]
    assert body.index(record["sentence"].split(" ")[0]) < body.index("<h1>")
    assert all(signal["name"] in body for signal in record["signals"])
