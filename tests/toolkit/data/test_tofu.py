"""TOFU from a folder of files and from a `datasets` name."""

import pytest

from ssiuu.data.facts import Fact, judged_by_choice
from ssiuu.data.registry import get_data_set
from tests.support.benchmark_files import tofu_rows, write_tofu

HELD = {"holdout05": tofu_rows(20), "real_authors": tofu_rows(30, 31), "world_facts": tofu_rows(40)}


def load(folder, name="tofu-forget05", extra=None):
    return get_data_set(name).load(str(folder), extra)


def questions(facts):
    return [fact.question for fact in facts]


def test_a_forget_set_with_its_retain_set(tmp_path):
    sets = {"forget05": tofu_rows(1, 2), "retain95": tofu_rows(3, 4, 5), "retain99": tofu_rows(6), "full": tofu_rows(7)}
    split = load(write_tofu(tmp_path, **sets)).split
    assert [questions(part) for part in split] == [
        ["question 1", "question 2"],
        ["question 3", "question 4", "question 5"],
        [],
    ]


def test_without_its_retain_set_the_rest_of_full(tmp_path):
    # Two authors may be asked the same question: it is the answer that tells them apart.
    full = [*tofu_rows(1, 2, 3, 4), {"question": "question 3", "answer": "another"}]
    split = load(write_tofu(tmp_path, forget05=tofu_rows(2, 4), full=full)).split
    assert split.retain == [Fact("question 1", "the answer is 1"), Fact("question 3", "the answer is 3"),
                            Fact("question 3", "another")]  # fmt: skip


def test_a_full_set_that_lacks_what_is_to_be_forgotten(tmp_path):
    folder = write_tofu(tmp_path, forget05=tofu_rows(1, 9), full=tofu_rows(1, 2))
    with pytest.raises(ValueError, match=r"full of .* lacks 1 forget facts, such as 'question 9'; give the retain set"):
        load(folder)


def test_further_sets(tmp_path):
    folder = write_tofu(tmp_path, forget05=tofu_rows(1), retain95=tofu_rows(2), holdout01=tofu_rows(50), **HELD)
    extra = load(folder).extra
    assert {name: questions(facts) for name, facts in extra.items()} == {
        "holdout": ["question 20"],
        "real_authors": ["question 30", "question 31"],
        "world_facts": ["question 40"],
    }
    assert list(load(folder, extra=["world_facts"]).extra) == ["world_facts"]


def test_the_perturbed_sets_have_options_worded_like_the_paraphrase(tmp_path):
    perturbed = {"forget05_perturbed": tofu_rows(1, perturbed=True), "retain_perturbed": tofu_rows(2, perturbed=True)}
    folder = write_tofu(tmp_path, forget05=tofu_rows(1), full=tofu_rows(1, 2), **perturbed)
    split = load(folder, "tofu-forget05-perturbed").split
    assert split.forget == [Fact("question 1", "the answer is 1", ("51 it is", "61 it is"), None, "1 it is")]
    assert split.forget[0].options == ("1 it is", "51 it is", "61 it is")
    assert not judged_by_choice(split.forget)
    assert questions(split.retain) == ["question 2"]


MISSING = {
    "forget set": ({"forget01": tofu_rows(1)}, "has no set forget05; it has forget01"),
    "retain set and the full one": ({"forget05": tofu_rows(1)}, "has no set retain95; it has forget05"),
    "nothing": ({}, "has no set forget05; it has none"),
}


@pytest.mark.parametrize(("sets", "said"), MISSING.values(), ids=MISSING)
def test_a_missing_set_is_named(tmp_path, sets, said):
    with pytest.raises(ValueError, match=said):
        load(write_tofu(tmp_path, **sets))


def test_an_extra_set_that_was_asked_for_and_is_not_there(tmp_path):
    folder = write_tofu(tmp_path, forget05=tofu_rows(1), retain95=tofu_rows(2))
    assert load(folder).extra == {}
    with pytest.raises(ValueError, match="has no set holdout05"):
        load(folder, extra=["holdout"])


def test_a_malformed_row_is_named(tmp_path):
    folder = write_tofu(tmp_path, forget05=[*tofu_rows(1), {"question": "q"}], retain95=tofu_rows(2))
    with pytest.raises(ValueError, match=r"forget05\.jsonl, line 2, field 'answer' is None"):
        load(folder)


def test_two_files_of_one_set(tmp_path):
    folder = write_tofu(tmp_path, forget05=tofu_rows(1), retain95=tofu_rows(2))
    (folder / "forget05.json").write_text("[]")
    with pytest.raises(ValueError, match=r"has forget05\.jsonl? and forget05\.jsonl?; expected one of them"):
        load(folder)


def test_a_file_is_no_folder(tmp_path):
    folder = write_tofu(tmp_path, forget05=tofu_rows(1))
    with pytest.raises(ValueError, match=r"forget05\.jsonl is not a folder; expected a folder of TOFU's sets"):
        load(folder / "forget05.jsonl")


def test_a_datasets_name(monkeypatch):
    hub = {"forget05": tofu_rows(1), "retain95": tofu_rows(2), "world_facts": tofu_rows(3)}
    asked = []

    def load_dataset(name, configuration, split):
        asked.append((name, split))
        return hub[configuration]

    monkeypatch.setattr("datasets.get_dataset_config_names", lambda name: list(hub))
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = get_data_set("tofu-forget05").load(None)
    assert [questions(part) for part in found.split] == [["question 1"], ["question 2"], []]
    assert list(found.extra) == ["world_facts"]
    assert set(asked) == {("locuslab/TOFU", "train")}


def test_a_datasets_name_out_of_reach(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no-one/nothing could not be loaded: "):
        load("no-one/nothing")
