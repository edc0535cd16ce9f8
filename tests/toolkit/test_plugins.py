"""Methods and regularizers of other packages: an entry point makes them known, and a broken one harms nobody."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import pytest

from ssiuu.methods.base import LikelihoodMethod
from ssiuu.methods.likelihood import GradientDifference
from ssiuu.methods.registry import methods, register_method
from ssiuu.pairs import resolve
from ssiuu.plugins import NameTakenError, Registry
from ssiuu.regularizers.base import Regularizer
from ssiuu.regularizers.registry import register_regularizer

METHOD = '''
    """A method of another package."""

    from dataclasses import dataclass

    from ssiuu import LikelihoodMethod, register_method


    @register_method
    class Theirs(LikelihoodMethod):
        """Their loss."""

        name, label, color = "{name}", "Theirs", "#123456"
        summary = "their summary"
        source = "their paper"

        @dataclass(frozen=True)
        class Options:
            """
            Attributes:
                their_option: their help.
            """

            their_option: int = 1

        def objective(self, batch):
            return lambda log_probs, lengths, forget: self.options.their_option * log_probs[forget].mean()
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a distribution with a module of its own name, which an entry point names."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    installed = []

    def add(distribution, source, name="theirs"):
        info = site / f"{distribution}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[ssiuu.methods]\n{name} = {distribution}\n")
        (site / f"{distribution}.py").write_text(textwrap.dedent(source).format(name=name))
        installed.append(distribution)

    yield add
    for distribution in installed:
        sys.modules.pop(distribution, None)


def test_a_method_of_another_package(install, model_dir, facts_file, tmp_path):
    install("their_package", METHOD)
    words = ["unlearn", "--method", "theirs", "--their-option", 3, "--model", model_dir, "--facts", facts_file,
             "--forget-people", 2, "--retain-people", 3, "--shots", 0, "--max-steps", 2, "--threshold", -1,
             "--out", tmp_path / "run"]  # fmt: skip
    script = "import sys; from ssiuu.cli import main; sys.exit(main(['methods']) or main(sys.argv[1:]))"
    command = [sys.executable, "-c", script, *map(str, words)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "theirs  Theirs  their summary\n    --their-option (default 1)\n        their help.\n" in result.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["method"], config["their_option"], config["status"]) == ("theirs", 3, "complete")


def test_methods_and_regularizers_are_listed_without_transformers(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    # It takes as long to import as all else that --help needs.
    script = "import sys; from ssiuu.pairs import option_owners; option_owners(); print('transformers' in sys.modules)"
    listed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert listed.stdout == "False\n"


BROKEN = {
    "ImportError": ("import no_such_module", "No module named 'no_such_module'"),
    "SyntaxError": ("def", "invalid syntax (their_package.py, line 1)"),
    "ValueError": ("raise ValueError('too old')", "too old"),
}


@pytest.mark.parametrize(("source", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_package_that_cannot_be_imported_is_left_out(install, caplog, source, reason):
    install("their_package", source)
    Registry("method", "ssiuu.methods").all()
    (warning,) = caplog.messages
    assert warning == f"theirs of the package their_package cannot be loaded ({reason}) and is left out"


def test_two_packages_with_one_name(install, monkeypatch):
    monkeypatch.setattr(register_method.__self__, "_known", methods())  # before they are installed
    install("their_package", METHOD)
    install("their_other_package", METHOD)
    with pytest.raises(NameTakenError, match="two methods are named 'theirs': ") as refused:
        Registry("method", "ssiuu.methods").all()
    assert {"their_package.Theirs", "their_other_package.Theirs"} <= set(str(refused.value).replace(";", "").split())


def kind_of(base, name, *options):
    """A class of this name, with options."""
    made = dataclasses.make_dataclass("Options", [(option, int, 0) for option in options], frozen=True)
    return type("Made", (base,), {"name": name, "label": name, "color": "", "Options": made})


TAKEN = {
    "a name": (
        "gd",
        (),
        "two methods are named 'gd': .*likelihood.GradientDifference and .*Made; rename one",
    ),
    "the name of a pair": ("ssiuu", (), "'ssiuu' is short for a pair of method and regularizer; rename .*Made"),
    "an option of every run": ("mine", ("seed",), "method 'mine' has an option 'seed', which every run has"),
}


@pytest.mark.parametrize(("name", "options", "said"), TAKEN.values(), ids=TAKEN)
def test_a_name_that_is_taken(name, options, said):
    before = methods()
    with pytest.raises(NameTakenError, match=said):
        register_method(kind_of(LikelihoodMethod, name, *options))
    assert methods() == before
    assert before["gd"] is GradientDifference


@pytest.fixture
def mine(monkeypatch):
    """A method and a regularizer named "mine", which share an option."""
    for register, base in ((register_method, LikelihoodMethod), (register_regularizer, Regularizer)):
        registry = register.__self__
        monkeypatch.setattr(registry, "_known", registry.all())
        register(kind_of(base, "mine", "their_option"))


def test_an_option_that_a_pair_would_share(mine):
    with pytest.raises(ValueError, match="method 'mine' and regularizer 'mine' both have an option 'their_option'"):
        resolve("mine", "mine")


def test_a_regularizer_beside_a_pair(mine):
    with pytest.raises(ValueError, match="method='ssiuu' is gd with the regularizer ssiuu, and regularizer='mine' was"):
        resolve("ssiuu", "mine")
