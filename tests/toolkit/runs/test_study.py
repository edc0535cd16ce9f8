"""Study files: what they mean, and what is refused before any work."""

import pytest

from ssiuu.runs.study import find_study, read_study, shipped_studies
from ssiuu.runs.tasks import tasks_of
from tests.support.studies import tiny_study, write_study


@pytest.fixture
def read(tmp_path, model_dir, facts_file):
    """A study with changes, read."""
    return lambda **changes: read_study(write_study(tmp_path, tiny_study(model_dir, facts_file, **changes)))


def test_the_options_of_a_cell_are_the_bases_and_its_own(read):
    options = read().cells["slow"].options(7)
    assert (options.learning_rate, options.max_steps, options.seed, options.method) == (1e-4, 2, 7, "gd")
    assert options.log_distance


def test_a_setting_of_the_base_goes_to_the_cells_that_have_it(read):
    base = {"penalty_weight": 2.0}
    cells = read(base=base, cells={"gd": {"method": "gd"}, "both": {"method": "gd", "regularizer": "ssiuu"}}).cells
    assert cells["gd"].options(0).settings == {}
    assert cells["both"].options(0).settings == {"penalty_weight": 2.0}


def test_every_cell_on_every_model(read):
    study = read(models={"one": {"model": "a"}, "two": {"model": "b", "dtype": "bfloat16"}})
    assert [*study.cells] == ["one/gd", "one/slow", "two/gd", "two/slow"]
    assert study.cells["two/gd"].options(0).dtype == "bfloat16"
    assert study.baseline_of(study.cells["two/slow"]) is study.cells["two/gd"]
    assert study.baseline_of(study.cells["two/gd"]) is None


def test_a_matched_cell_needs_the_other_of_its_seed_and_model(read):
    cells = {"gd": {"method": "gd", "match": {"steps": "npo"}}, "npo": {"method": "npo"}}
    study = read(cells=cells, models={"one": {"model": "a"}, "two": {"model": "b"}}, teach={"steps": 3})
    assert tasks_of(study)["two/gd/seed1"].needs == ("taught-two", "two/npo/seed1")


def test_teaching_is_of_the_base(read):
    study = read(teach={"steps": 3, "people": 4})
    assert study.taught[""].facts == study.cells["gd"].options(0).facts
    assert (study.taught[""].steps, study.taught[""].people) == (3, 4)


@pytest.mark.parametrize("name", shipped_studies())
def test_the_shipped_studies_can_be_read(name):
    study = read_study(find_study(f"studies/{name}.yaml"))
    assert study.given.baseline
    assert tasks_of(study)


def test_shipped_studies_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_study("small") == find_study("small.yaml") == find_study("studies/small.yaml")
    with pytest.raises(FileNotFoundError, match=r"nosuch.yaml does not exist; .*paper-table-1, paper-table-2, small"):
        find_study("nosuch.yaml")
    (tmp_path / "small.yaml").write_text("mine")
    assert find_study("small.yaml").read_text() == "mine"


GD = {"method": "gd"}
WRONG = {
    "an unknown key": ({"sedes": [0]}, "sedes is not the key of a study file; did you mean seeds?"),
    "no cells": ({"cells": {}}, "the study has no cells; expected at least one"),
    "no seeds": ({"seeds": []}, "the study has no seeds; expected at least one"),
    "a seed twice": ({"seeds": [1, 1]}, "has a seed twice"),
    "a seed that is text": ({"seeds": ["a"]}, "seeds=.*integer"),
    "an unknown method": ({"cells": {"a": {"method": "gdd"}}}, "cell a: method='gdd' is unknown; expected one of"),
    "an unknown regularizer": ({"cells": {"a": {**GD, "regularizer": "x"}}}, "cell a: regularizer='x' is unknown"),
    "another's setting": ({"cells": {"a": {**GD, "penalty_share": 0.1}}}, "cell a: penalty_share is not an option of"),
    "a setting out of range": (
        {"cells": {"a": {**GD, "regularizer": "ssiuu", "penalty_share": 2.0}}}, "cell a: penalty_share=2.0; expected",
    ),
    "an option of a wrong type": ({"cells": {"a": {**GD, "shots": "two"}}}, "cell a: shots='two'; expected"),
    "an option out of range": ({"cells": {"a": {**GD, "max_steps": 0}}}, "cell a: max_steps=0; expected at least 1"),
    "a seed in a cell": ({"cells": {"a": {**GD, "seed": 1}}}, "cell a: seed is not an option"),
    "a name that nothing has": ({"base": {"lerning_rate": 1.0}}, "did you mean learning_rate?"),
    "a name that is no folder": ({"cells": {"../a": GD}}, "'../a' cannot be the name of a cell"),
    "a name that is taken": ({"cells": {"results": GD}}, "'results' cannot be the name of a cell"),
    "a match that names no cell": (
        {"cells": {"a": {**GD, "match": {"steps": "b"}}}}, "cell a is matched to 'b', which is not a cell",
    ),
    "a match in a circle": (
        {"cells": {"a": {**GD, "match": {"steps": "b"}}, "b": {**GD, "match": {"distance": "a"}}}},
        "cells are matched in a circle: a -> b -> a",
    ),
    "a match to itself": ({"cells": {"a": {**GD, "match": {"steps": "a"}}}}, "in a circle: a -> a"),
    "a match of nothing": ({"cells": {"a": {**GD, "match": {}}}}, "cell a: match needs the name of one cell"),
    "a match of both": (
        {"cells": {"a": {**GD, "match": {"steps": "b", "distance": "b"}}, "b": GD}}, "match needs the name of one cell",
    ),
    "a match of another kind": ({"cells": {"a": {**GD, "match": {"time": "b"}}}}, "time is not an option of match"),
    "a match that is a name": ({"cells": {"a": {**GD, "match": "b"}}}, "match='b'; expected steps or distance"),
    "no trials": ({"cells": {"a": {**GD, "match": {"steps": "b", "trials": 0}}, "b": GD}}, "trials=0; expected at"),
    "a baseline that is not a cell": ({"baseline": "npo"}, "baseline='npo' is not a cell; expected one of gd, slow"),
    "an unknown attack": ({"attacks": [{"kind": ["mean"]}]}, "attack 1: kind='mean' is unknown"),
    "an attack's unknown option": ({"attacks": [{"stepz": 1}]}, "attack 1: stepz is not .*; did you mean steps?"),
    "an attack out of range": ({"attacks": [{"steps": 0}]}, "attack 1: steps=0; expected at least 1"),
    "an attack twice": ({"attacks": [{"kind": ["benign"]}] * 2}, "attack 2: .* is there twice"),
    "a diagnosis out of range": ({"diagnose": {"batch_size": 0}}, "diagnose: batch_size=0"),
    "teaching out of range": ({"teach": {"steps": 0}}, "teach: steps=0; expected at least 1"),
    "a model to teach": ({"teach": {"model": "x"}}, "teach: model is not an option of teaching"),
    "a model's unknown option": ({"models": {"m": {"nam": "x"}}}, "nam is not an option"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said(read, what):
    changes, said = WRONG[what]
    with pytest.raises(ValueError, match=rf"study\.yaml: .*{said}") as raised:
        read(**{"baseline": None, **changes})
    assert "\n" not in str(raised.value)


def test_teaching_needs_facts_where_the_sets_are_given(read):
    with pytest.raises(ValueError, match="teach: facts is missing"):
        read(base={"forget": "a.jsonl", "retain": "b.jsonl"}, teach={"steps": 1})
