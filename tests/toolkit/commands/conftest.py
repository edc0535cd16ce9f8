"""A finished run of the tiny model."""

import pytest

from ssiuu.commands.unlearn import unlearn
from ssiuu.options import UnlearnOptions


@pytest.fixture
def run(model_dir, facts_file, tmp_path):
    options = UnlearnOptions(
        model=str(model_dir), facts=str(facts_file), forget_people=3, retain_people=2, shots=0, max_steps=2,
        learning_rate=1e-3, save_every=0,
    )  # fmt: skip
    return unlearn(options, tmp_path / "run")
