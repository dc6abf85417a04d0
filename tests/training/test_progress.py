"""The progress of a training, as a terminal and as a log shows it."""

from __future__ import annotations

import re

import pytest

from mole_diffusion import progress
from mole_diffusion.training.engine.progress import training_progress


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def run(clock: Clock, seconds: float, steps: int, start: int = 0) -> None:
    with training_progress("train-gates", steps, start) as advance:
        for _ in range(steps - start):
            clock.now += seconds
            advance({"global": 0.5})


def test_a_log_gets_lines_with_the_time_left(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    run(clock, 40.0, 400, start=397)
    assert capfd.readouterr().err.splitlines() == [
        "train-gates 398/400  global 0.5000  0:00:40 elapsed, 0:01:20 left",
        "train-gates 399/400  global 0.5000  0:01:20 elapsed, 0:00:40 left",
        "train-gates 400/400  global 0.5000  0:02:00 elapsed, 0:00:00 left",
    ]


def test_quick_steps_do_not_flood_a_log(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    run(clock, 1.0, 100)
    done = [int(found) for found in re.findall(r"(\d+)/100", capfd.readouterr().err)]
    assert done == [1, 31, 61, 91, 100]


def test_losses_are_running_means(clock: Clock, capfd: pytest.CaptureFixture[str]) -> None:
    with training_progress("train-gates", 2) as advance:
        advance({"global": 1.0})
        advance({"global": 0.0})
    assert "global 0.9500" in capfd.readouterr().err.splitlines()[-1]


def test_a_terminal_gets_a_bar_that_knows_slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over rich's own 30 seconds, a step of half a minute would never have a speed, and no time left."""
    now = [0.0]
    console = progress.Console(force_terminal=True, quiet=True, width=200)
    with progress._bar(console) as bar:
        bar.get_time = lambda: now[0]
        task = bar.add_task("train-gates", total=10, text="")
        for _ in range(3):
            now[0] += 40.0
            bar.update(task, advance=1)
        assert bar.tasks[0].time_remaining == pytest.approx(280, abs=1)


def test_silence_on_demand(capfd: pytest.CaptureFixture[str]) -> None:
    with training_progress("train-gates", 1, enabled=False) as advance:
        advance({"global": 1.0})
    assert capfd.readouterr() == ("", "")
