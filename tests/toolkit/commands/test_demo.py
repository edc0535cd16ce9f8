"""The demonstration's choice of facts, and its chain on a tiny model."""

from dataclasses import replace

import pytest

from ssiuu.commands import demo
from ssiuu.commands.demo import OPTIONS, choose_known, run_demo
from ssiuu.data.facts import Fact


def people(count, facts_each=3):
    """Surest first: every person has one fact with an answer shared by all, and others of their own."""
    return [
        Fact(f"q{n} of p{p}", "germany" if n == 0 else f"a{p}{n}", ("b", "c"), f"p{p}")
        for n in range(facts_each)
        for p in range(count)
    ]


def test_no_person_and_no_answer_of_the_forget_set_is_kept():
    split = choose_known(people(40), [])
    assert len(split.forget) == demo.FORGET_PEOPLE * demo.FACTS_PER_PERSON
    assert not {f.subject for f in split.forget} & {f.subject for f in (*split.retain, *split.test)}
    assert not {f.answer for f in split.forget} & {f.answer for f in (*split.retain, *split.test)}


def test_certain_facts_are_not_forgotten():
    known = people(40)
    certain = [fact for fact in known if fact.question.startswith("q1")]
    assert all(fact.question.startswith("q2") for fact in choose_known(known, certain).forget)


def test_too_few_people():
    with pytest.raises(ValueError, match="knows too few facts"):
        choose_known(people(20), [])


def test_another_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a demo folder"):
        run_demo(tmp_path)


@pytest.mark.parametrize("made", [(), ("gd",), ("gd", "report")])
def test_a_folder_that_is_empty_or_was_begun_is_taken(tmp_path, monkeypatch, made):
    for name in made:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(demo, "_split", lambda *_: (_ for _ in ()).throw(RuntimeError("begun")))
    with pytest.raises(RuntimeError, match="begun"):
        run_demo(tmp_path)


@pytest.fixture
def tiny_demo(model_dir, tmp_path, monkeypatch):
    """Runs the demonstration on a tiny model, which is taken to know whatever it is asked."""
    monkeypatch.setattr(demo, "CANDIDATE_PEOPLE", 40)
    monkeypatch.setattr(demo, "known_facts", lambda scores, facts, least: facts if least < 0.5 else [])
    options = replace(OPTIONS, max_steps=2, save_every=0)
    return lambda: run_demo(tmp_path / "demo", model=str(model_dir), options=options)


def test_leaves_a_report_on_both_methods(tiny_demo, capsys):
    page = tiny_demo()
    assert "GD" in page.read_text()
    assert "SSIUU" in capsys.readouterr().out
    assert {path.name for path in page.parent.glob("*.png")} >= {"overview.png", "attacks.png", "training.png"}


def test_does_nothing_twice(tiny_demo, monkeypatch):
    tiny_demo()
    monkeypatch.setattr(demo, "unlearn", lambda *_, **__: pytest.fail("unlearned again"))
    monkeypatch.setattr(demo.Protocol, "score", lambda *_, **__: pytest.fail("looked for facts again"))
    assert tiny_demo().is_file()
