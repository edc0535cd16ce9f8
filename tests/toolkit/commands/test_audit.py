"""Audits of models of which the truth is known."""

from types import SimpleNamespace

import pytest

from ssiuu.commands.audit import audit
from ssiuu.options import AuditOptions
from tests.support import audited
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


@pytest.fixture(scope="module")
def untaught(tmp_path_factory):
    """Folders of models without any training, and of facts."""
    folder = tmp_path_factory.mktemp("untaught")
    forget, _ = audited.facts_of(0)
    model = audited.new_model(0)
    return SimpleNamespace(
        original=str(audited.save(model, folder / "original")),
        wider=str(audited.save(audited.new_model(0, intermediate_size=100), folder / "wider")),
        reworded=str(audited.save(model, folder / "reworded", words=audited.WORDS[::-1])),
        forget=str(audited.write_facts(folder / "forget.jsonl", forget)),
        free=str(write_rows(folder / "free.jsonl", {"question": "where", "answer": "f0lives"})),
        retain=None,
        instructions="builtin",
    )


@pytest.mark.parametrize(
    ("after", "changes", "message"),
    [
        ("wider", {}, "differ in .*, .*96.* and .*100.*; expected two models of one architecture"),
        ("reworded", {}, "have different tokenizers; expected the same one"),
        ("original", {}, "answers .* of the 20 forget facts, .* expected a model that knows enough of them"),
        ("original", {"steps": 0}, "steps=0; expected at least 1"),
    ],
)
def test_what_cannot_be_audited(untaught, tmp_path, after, changes, message):
    with pytest.raises(ValueError, match=message):
        audit(options(untaught, after, **changes), tmp_path / "audit")
    assert not (tmp_path / "audit").exists()


def test_facts_need_false_options(untaught, tmp_path):
    with pytest.raises(ValueError, match="'where' has no false_options"):
        audit(options(untaught, "original", forget=untaught.free), tmp_path / "audit")


@pytest.mark.parametrize("models", [SEEDS[0]], indirect=True)
def test_an_audit_goes_on_where_it_stopped(models, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ssiuu.commands.audit._attack", stop)
        with pytest.raises(KeyboardInterrupt):
            audit(options(models, "hidden"), tmp_path / "audit")
    kept = {name: (tmp_path / "audit" / name).stat().st_mtime_ns for name in ("before.json", "after.json")}
    monkeypatch.setattr("ssiuu.commands.audit._measure_before", stop)
    monkeypatch.setattr("ssiuu.commands.audit._after", stop)
    record, _ = audit(options(models, "hidden"), tmp_path / "audit")
    assert record["verdict"] == "hidden"
    assert kept == {name: (tmp_path / "audit" / name).stat().st_mtime_ns for name in kept}
    with pytest.raises(ValueError, match=r"was begun with steps=20, now 21; choose another folder"):
        audit(options(models, "hidden", steps=21), tmp_path / "audit")
