"""Made-up run folders."""

import pytest

from tests.support.run_folders import write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [write_run(folder / "first", "gd"), write_run(folder / "second", "ssiuu", strength=0.4)]
