"""Goals: contestants in processes of their own."""

from __future__ import annotations

import os

import pytest
from goal_lines import lines, tell

from bigops.bench import goals


def test_a_line_for_each_goal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(goals, "ROUNDS", 3)
    figures = goals.compare(lines, "waiting", without=["slower"], tell=tell, others=1)
    head, *told = capsys.readouterr().out.splitlines()
    assert [line[:12].rstrip(" f") for line in told] == ["waiting", "waiting, too"]
    # A hundred milliseconds by ten; other processes may hold up either, but hardly four times.
    assert all(2 < figure < 20 for figure in figures)
    pids = {int(line.rpartition("process ")[2]) for line in told}
    assert len(pids) == 1
    assert os.getpid() not in pids
    assert all(" slow;" in line and "slower" not in line for line in told)
    assert head.split()[:2] == ["call", "dtype"]
