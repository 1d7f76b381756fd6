import io
import time

from rich.console import Console

from persona_pruner.manifest import Persona
from persona_pruner.run.display import LINE_SECONDS, LINES_OF_PERSONAS
from persona_pruner.run.progress import ProgressReporter
from persona_pruner.scheduling.persona_job import PersonaJob


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def plain():
    return ProgressReporter(Console(file=io.StringIO(), width=200), clock=Clock())


def lines_of(progress):
    return progress.console.file.getvalue().splitlines()


def test_plain_lines_come_when_something_has_changed_and_never_twice():
    progress = plain()
    progress.begin("starting Ray")
    progress.begin("scoring", 1000)
    for second in range(120):
        progress.clock.now = float(second)
        progress.count("scoring", 10 * min(second, 50))
        progress.tick()
    progress.close("done")
    lines = lines_of(progress)
    assert lines[:2] == ["starting Ray ...", "scoring ..."]
    assert len(lines) == len(set(lines))
    assert len(lines) <= 2 + 50 / LINE_SECONDS + 2
    assert "500 of 1,000 questions" in lines[-1]


def test_many_masks_at_once_are_summed_up():
    progress = plain()
    progress.train(1000, 0, 10)
    for number in range(300):
        progress.changed(PersonaJob(Persona(f"p{number}", "x"), "TERMINATED", step=10))
    progress.clock.now = 1.0
    progress.tick()
    progress.close("done")
    lines = lines_of(progress)
    assert sum(line.startswith("masked p") for line in lines) <= 2 * LINES_OF_PERSONAS
    assert any(line == f"masked {300 - LINES_OF_PERSONAS} more" for line in lines)


def test_a_terminal_sees_the_phase_and_a_moving_time_at_once():
    stream = io.StringIO()
    with ProgressReporter(Console(file=stream, force_terminal=True, width=100)) as progress:
        progress.begin("loading libraries")
        time.sleep(2.2)
    shown = stream.getvalue()
    assert "loading libraries" in shown
    assert "0:00:01 elapsed" in shown or "0:00:02 elapsed" in shown


def test_a_terminal_sees_counts_and_what_groups_wait_for():
    progress = ProgressReporter(Console(file=io.StringIO(), force_terminal=True, width=100), clock=Clock())
    progress.begin("scoring", 4000)
    progress.count("scoring", 1200)
    progress.waiting_for = "2 groups wait for GPU: 1 each; the cluster has 0 free of 4"
    progress.console.print(progress._display.render())
    shown = progress.console.file.getvalue()
    assert "1,200 of 4,000" in shown
    assert "2 groups wait for GPU: 1 each" in shown
