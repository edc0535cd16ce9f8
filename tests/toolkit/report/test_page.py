"""The report of made-up run folders: one page that loads nothing, with every figure in it, and clear refusals."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from ssiuu.report.page import write_report
from ssiuu.report.table import summary_table, table_rows
from ssiuu.runs.read import read_runs
from tests.support.run_folders import write_run

FIGURES = {"overview", "influence", "modules", "lens", "ablation", "cka", "drift", "attacks", "training"}
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
def written(runs, tmp_path_factory):
    path = write_report(runs, tmp_path_factory.mktemp("report") / "new")
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
    console.print(summary_table(runs))
    terminal, markdown = console.export_text(), (path.parent / "table.md").read_text(encoding="utf-8")
    rows = table_rows(read_runs(runs))
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
    written = json.loads((runs[0] / "diagnosis.json").read_text())
    assert first["diagnosis"] == written["influence"]
    assert all(first[name] == written[name] for name in ("lens", "ablation", "cka", "drift"))


def test_parts_not_run_are_marked(tmp_path):
    run = write_run(tmp_path / "run", "ssiuu", attacks=False, diagnosis=False)
    (run / "evaluation.json").unlink()
    page = Page(write_report([run], tmp_path / "report").read_text())
    assert {file.stem for file in (tmp_path / "report").glob("*.png")} == {"training"}
    for name in ("FS", "any: FS", "of", "D+, erased"):
        assert page.cells[page.cells.index(name) + 1] == "not run"


def test_text_from_files_is_escaped(tmp_path):
    run = write_run(tmp_path / "run", "gd")
    _change(run, model="<b>org/model</b>")
    text = write_report([run], tmp_path / "report").read_text()
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
        (lambda run: _change(run, revision="v2"), r"first from smollm2, .*second from smollm2 at v2\)"),
        (_cut_metrics, r"metrics.jsonl is not JSON lines"),
        (_cut_attack, r"benign-None-1e-05.json is not JSON"),
        (lambda run: (run / "diagnosis.safetensors").unlink(), r"diagnosis.safetensors is missing"),
    ],
)
def test_refusals_are_one_line(tmp_path, spoil, message):
    pair = [write_run(tmp_path / name, "gd") for name in ("first", "second")]
    spoil(pair[1])
    with pytest.raises(ValueError, match=message) as error:
        write_report(pair, tmp_path / "report")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report").exists()
