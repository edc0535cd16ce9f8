"""The toolkit: unlearn facts from a language model, attack the result, diagnose it, and report.

The commands of `ssiuu` as functions; each is imported when it is first used.

    import ssiuu

    options = ssiuu.UnlearnOptions(method="gd", regularizer="ssiuu", settings={"penalty_share": 0.25})
    run = ssiuu.unlearn(options, "runs/ssiuu")
    ssiuu.attack(run.path, ssiuu.attack_grid(["harmful"]))
    ssiuu.diagnose([run.path])
    ssiuu.write_report([run.path], "report")

`METHODS` and `REGULARIZERS` are the classes by name. One of your own is a subclass of `Method`, `LikelihoodMethod` or
`Regularizer` under `@register_method` or `@register_regularizer`. A package offers one to the command line by an entry
point of the group `ssiuu.methods` or `ssiuu.regularizers` that names the module.
"""

from importlib import import_module

# Public name -> where it is.
_HOMES = {
    "unlearn": "commands.unlearn.unlearn",
    "UnlearnOptions": "options.UnlearnOptions",
    "attack": "commands.attack.attack_run",
    "Attack": "attacks.attack.Attack",
    "attack_grid": "attacks.grid.attack_grid",
    "paper_grid": "attacks.grid.paper_grid",
    "diagnose": "commands.diagnose.diagnose_runs",
    "DiagnoseOptions": "options.DiagnoseOptions",
    "audit": "commands.audit.audit",
    "AuditOptions": "options.AuditOptions",
    "evaluate": "commands.evaluate.evaluate_run",
    "finetune": "commands.finetune.finetune",
    "FinetuneOptions": "options.FinetuneOptions",
    "write_report": "report.page.write_report",
    "study": "commands.study.run_study",
    "load_facts": "data.facts.load_facts",
    "load_model": "models.load.load_model",
    "Fact": "data.facts.Fact",
    "Split": "data.facts.Split",
    "Run": "runs.folder.Run",
    "Method": "methods.base.Method",
    "LikelihoodMethod": "methods.base.LikelihoodMethod",
    "Batch": "methods.base.Batch",
    "Loss": "methods.base.Loss",
    "UnlearnData": "methods.base.UnlearnData",
    "Regularizer": "regularizers.base.Regularizer",
    "register_method": "methods.registry.register_method",
    "register_regularizer": "regularizers.registry.register_regularizer",
}
# Public name -> the function that makes it, again each time: packages may register more.
_TABLES = {"METHODS": "methods.registry.methods", "REGULARIZERS": "regularizers.registry.regularizers"}

__all__ = [*_HOMES, *_TABLES]


def __getattr__(name: str):
    if name in _TABLES:
        return _found(_TABLES[name])()
    if name in _HOMES:
        return _found(_HOMES[name])
    raise AttributeError(f"module 'ssiuu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def _found(home: str):
    module, _, attribute = home.rpartition(".")
    return getattr(import_module(f"ssiuu.{module}"), attribute)
