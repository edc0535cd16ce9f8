"""Progress where there is no terminal."""

import io

from rich.console import Console

from ssiuu import progress


def test_a_line_of_a_log_is_not_wrapped(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=log, width=40))
    with progress.job("unlearn (ssiuu)", 1) as bar:
        bar.say(loss=1.0, fs=0.5, rs=0.5, forget_probability=0.25, share=0.125)
    assert (
        "unlearn (ssiuu): loss 1  fs 0.5  rs 0.5  forget_probability 0.25  share 0.125" in log.getvalue().splitlines()
    )
