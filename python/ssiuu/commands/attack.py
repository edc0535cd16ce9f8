"""Attacks on the model of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..attacks.attack import Attack
from ..attacks.attacked import Attacked
from ..attacks.execute import execute, length
from ..data.facts import judged_by_choice
from ..evaluation.protocol import Protocol
from ..models.load import load_model
from ..options import recorded_model
from ..progress import job
from ..runs.folder import Run
from ..training.trainer import refuse_launchers


def attack_run(run_dir: str | Path, attacks: Sequence[Attack]) -> list[dict]:
    """Attack a finished run's model; each attack starts from it, and leaves it as it is.

    Attacks whose result is in the run's attacks/ already are not run again; one that was broken off starts again.

    Returns:
        For each attack, what its file holds; see `execute`.

    Raises:
        ValueError: no finished run, or one that another process attacks; options out of range, a package that is
            missing, instructions that cannot be read, or a result under the same name that was made with other
            options, before a model is loaded; a pool that is empty or too small, before any attack.
        OSError: a run folder that cannot be written to, before any work.
    """
    refuse_launchers()
    for attack in attacks:
        attack.check()
    run = Run.open(run_dir)
    config, forget = run.read("config.json"), run.split().forget
    right_or_wrong = judged_by_choice(forget)
    attacks = [attack.on(right_or_wrong) for attack in attacks]
    pending = [attack for attack in attacks if not _done(run, attack)]
    for attack in pending:
        attack.check_data(forget, right_or_wrong)
    # float32, whatever the run's type: updates at 1e-7 vanish in narrower ones.
    loading = recorded_model(config).loading(dtype="float32", revision=None)

    def load(**changes):
        model, tokenizer = load_model(run.model, **loading, **changes)
        return model, Protocol.of(config, model, tokenizer)

    with run.work("attack"), job(f"attack {run.path.name}", length(pending)) as bar:
        for attack, result in execute(pending, Attacked(load, forget), bar):
            run.write(f"attacks/{attack.name}.json", result)
    return [run.read(f"attacks/{attack.name}.json") for attack in attacks]


def _done(run: Run, attack: Attack) -> bool:
    if not (run.attacks / f"{attack.name}.json").is_file():
        return False
    options = run.read(f"attacks/{attack.name}.json")["options"]
    if options != attack.options:
        file = run.attacks / f"{attack.name}.json"
        raise ValueError(f"{file} was made with other options, {options}; remove it to attack again")
    return True
