"""Benchmarks by name, in the options and on the command line."""

import pytest

from ssiuu.commands.unlearn import unlearn
from ssiuu.data.registry import DATA_SETS, get_data_set
from ssiuu.options import UnlearnOptions
from tests.support.benchmark_files import write_faithun
from tests.support.command_line import run


def test_the_help_names_every_benchmark_and_set():
    text = " ".join(run("unlearn", "--help").stdout.split())
    for data in DATA_SETS.values():
        names = [data.name.removesuffix("-perturbed"), *data.extra, *([data.source] if data.source else [])]
        assert [name for name in names if name not in text] == []


REFUSED = {
    "an unknown benchmark": ({"data": "muse"}, "data='muse' is unknown; expected one of faithun, tofu-forget01"),
    "no folder": ({"data": "faithun"}, "data='faithun' needs a source; give data_from: a folder with FaithUn_Dataset"),
    "an unknown set": (
        {"data": "faithun", "data_from": "x", "extra": ["hops"]},
        "extra='hops' is not a set of faithun; expected of paraphrases, multi_hop, same_object",
    ),
    "data and facts": ({"facts": "builtin", "data": "faithun"}, "give either facts, or forget and retain, or data"),
    "data and a forget set": ({"data": "faithun", "forget": "f"}, "give either facts, or forget and retain, or data"),
    "a folder without a benchmark": ({"facts": "builtin", "data_from": "x"}, "data_from is given without data"),
    "a set without a benchmark": ({"facts": "builtin", "extra": ["x"]}, "extra is given without data"),
}


@pytest.mark.parametrize(("values", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_before_a_model_is_loaded(tmp_path, values, said):
    with pytest.raises(ValueError, match=said):
        unlearn(UnlearnOptions(model="none", **{"facts": None, **values}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_repeated_extra_set_is_read_once(tmp_path):
    found = get_data_set("faithun").load(str(write_faithun(tmp_path)), ["multi_hop", "multi_hop"])
    assert len(found.extra["multi_hop"]) == 2
