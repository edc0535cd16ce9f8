"""The report of made-up run folders: one page that loads nothing, with every figure in it, and clear refusals."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from ssiuu.report import figures as plots
from ssiuu.report import page as report
from ssiuu.report.groups import attack_summary, mean_curve
from ssiuu.report.style import line_of
from ssiuu.runs import read as records
from tests.support.run_folders import write_run

FIGURES = {"overview", "influence", "modules", "attacks", "training"}
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Images, addresses, tables and unbalanced tags of an HTML page."""

    def __init__(self, text):
        super().__init__()
        self.open, self.unbalanced, self.addresses, self.cells, self.text = [], [], [], [], text
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data.strip())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / "first", "gd"), write_run(folder / "second", "ssiuu", strength=0.4)]


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    path = report.write_report(runs, tmp_path_factory.mktemp("report") / "new")
    return path, Page(path.read_text(encoding="utf-8"))


def test_page_is_well_formed(written):
    _, page = written
    assert page.unbalanced == []
    assert page.open == []


def test_page_loads_nothing(written):
    _, page = written
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import|<script|<link", page.text)


def test_page_holds_every_figure_as_written_beside_it(written):
    path, page = written
    embedded = {base64.b64decode(address.split(",", 1)[1]) for address in page.addresses}
    assert {file.stem for file in path.parent.glob("*.png")} == FIGURES
    assert embedded == {file.read_bytes() for file in path.parent.glob("*.png")}
    assert all(data.startswith(b"\x89PNG") for data in embedded)


def test_page_markdown_and_terminal_show_the_same_cells(runs, written):
    path, page = written
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.summary_table(runs))
    terminal, markdown = console.export_text(), (path.parent / "table.md").read_text(encoding="utf-8")
    rows = report.table_rows(records.read_runs(runs))
    assert "1.00 → 0.33" in page.cells
    assert "share 0.25" in page.cells
    assert "28.6, 0.245" in page.cells
    for row in rows:
        for cell in (row.name, *row.cells):
            assert cell in page.cells
            assert cell in terminal
            assert cell in markdown


def test_numbers_in_json(runs, written):
    path, _ = written
    content = json.loads((path.parent / "report.json").read_text())
    first, second = content["runs"]
    assert (first["label"], second["label"]) == ("GD", "SSIUU")
    assert first["facts"] == {"forget": 12, "retain": 12, "test": 6}
    assert first["steps"] == 4
    assert first["seconds"] == pytest.approx(6.0)
    assert first["diagnosis"] == json.loads((runs[0] / "diagnosis.json").read_text())


def test_attacks_are_means_over_learning_rates_of_the_maximum(runs):
    record = records.read_runs(runs[:1])[0]
    maxima = [json.loads(file.read_text())["max_fs"] for file in (runs[0] / "attacks").glob("harmful-0.3-*.json")]
    summary = attack_summary(record, ("harmful", 0.3))
    assert len(maxima) == summary["attacks"] == 2
    assert summary["max_fs"] == pytest.approx(sum(maxima) / 2)


def test_parts_not_run_are_marked(tmp_path):
    run = write_run(tmp_path / "run", "ssiuu", attacks=False, diagnosis=False)
    (run / "evaluation.json").unlink()
    page = Page(report.write_report([run], tmp_path / "report").read_text())
    assert {file.stem for file in (tmp_path / "report").glob("*.png")} == {"training"}
    for name in ("FS", "any: FS", "of", "D+, erased"):
        assert page.cells[page.cells.index(name) + 1] == "not run"


def test_a_run_without_what_another_has(runs, tmp_path):
    bare = write_run(tmp_path / "bare", "ssiuu", attacks=False, diagnosis=False)
    rows = {row.name: row.cells for row in report.table_rows(records.read_runs([runs[0], bare]))}
    assert rows["D-, hidden"][1] == rows["benign: FS"][1] == "not run"
    assert "not run" not in (rows["D-, hidden"][0], rows["benign: FS"][0])
    assert set(plots.draw_all(records.read_runs([runs[0], bare]))) == FIGURES


def test_small_probabilities_are_not_shown_as_none(tmp_path):
    run = write_run(tmp_path / "run", "gd")
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["after"]["forget_probability"] = 2e-6
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    rows = {row.name: row.cells for row in report.table_rows(records.read_runs([run]))}
    assert rows["P(answer), forget"] == ["0.400 → <0.001"]


def test_runs_of_one_method_are_told_apart(tmp_path):
    found = records.read_runs([write_run(tmp_path / name, "ssiuu") for name in ("weak", "strong")])
    assert [record.label for record in found] == ["SSIUU (weak)", "SSIUU (strong)"]
    assert line_of(found[0])["color"] == line_of(found[1])["color"]
    assert line_of(found[0])["linestyle"] != line_of(found[1])["linestyle"]


def test_mean_curve_keeps_to_the_steps_that_all_have():
    measured = ({0: 0.2, 1: 0.2, 2: 0.2}, {0: 0.4, 2: 0.4})
    attacks = [{"steps": [{"step": step, "fs": fs} for step, fs in points.items()]} for points in measured]
    steps, values = mean_curve(attacks, "fs")
    assert steps == [0, 2]
    assert values == pytest.approx([0.3, 0.3])


def test_text_from_files_is_escaped(tmp_path):
    run = write_run(tmp_path / "run", "gd")
    _change(run, model="<b>org/model</b>")
    text = report.write_report([run], tmp_path / "report").read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;org/model" in text


def _change(run, **values):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | values))


def _no_run(run):
    (run / "config.json").unlink()


def _cut_metrics(run):
    (run / "metrics.jsonl").write_text('{"step": 1,')


def _cut_attack(run):
    (run / "attacks" / "benign-None-1e-05.json").write_text("")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_run, r"second has no config.json"),
        (lambda run: _change(run, status="running"), r"second is not finished"),
        (lambda run: _change(run, model="other"), r"different models \(.*first from smollm2, .*second from other\)"),
        (_cut_metrics, r"metrics.jsonl is not JSON lines"),
        (_cut_attack, r"benign-None-1e-05.json is not JSON"),
        (lambda run: (run / "diagnosis.safetensors").unlink(), r"diagnosis.safetensors is missing"),
    ],
)
def test_refusals_are_one_line(tmp_path, spoil, message):
    pair = [write_run(tmp_path / name, "gd") for name in ("first", "second")]
    spoil(pair[1])
    with pytest.raises(ValueError, match=message) as error:
        report.write_report(pair, tmp_path / "report")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report").exists()


def test_no_runs():
    with pytest.raises(ValueError, match="run_dirs is empty"):
        report.summary_table([])
