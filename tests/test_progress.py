"""Progress on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest

from pyvdl import progress
from pyvdl.progress import Progress, reporting


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("visual", 50, done=7) as bar:
        bar.advance()
        bar.advance(2)
        bar.note("loss 1.25")
    assert capsys.readouterr().err == "visual 10/50  loss 1.25\n"


def test_a_line_now_and_then_without_notes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("caption", 50) as bar:
        for _ in range(40):
            now[0] += 1.0
            bar.advance()
    assert capsys.readouterr().err == "caption 16/50\ncaption 32/50\n"
    with reporting("instruct") as report:
        for done in range(1, 40):
            now[0] += 1.0
            report(done, 50, f"{done} requests")
    assert capsys.readouterr().err == "instruct 17/50  17 requests\ninstruct 33/50  33 requests\n"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("visual", 5) as bar:
        bar.advance(2, "2 clips")
        bar.note("loss 1.25")
    text = terminal.getvalue()
    assert "visual" in text
    assert "2/5" in text
    assert "loss 1.25" in text


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_nothing_when_not_wanted(stream: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    written = stream()
    monkeypatch.setattr("sys.stderr", written)
    with Progress("visual", 5, enabled=False) as bar:
        bar.advance()
        bar.note("x")
    assert written.getvalue() == ""


def test_reports_of_done_and_total(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another total is another piece of work, counted from its own start."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with reporting("evaluate") as report:
        for done, total in ((2, 10), (9, 10), (3, 20), (20, 20)):
            now[0] += 20.0
            report(done, total)
    assert capsys.readouterr().err == "evaluate 9/10\nevaluate 20/20\n"
