"""The reporter in virtual time: what it counts, and what it writes into the output."""

import io
import json

import pytest
from rich.console import Console

from persona_pruner.activity import LOADING, SCORING, Activity, Count
from persona_pruner.manifest import Persona
from persona_pruner.run.progress import STATUS_SECONDS, ProgressReporter
from persona_pruner.run.status import status_of
from persona_pruner.scheduling.persona_job import PersonaJob
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def progress():
    reporter = ProgressReporter(Console(file=io.StringIO(), width=200), clock=Clock())
    yield reporter
    reporter.close("done")


def text_of(progress):
    return progress.console.file.getvalue()


def job(name, state, **values):
    return PersonaJob(Persona(name, f"{name} sails"), state, **values)


def test_a_phase_without_counts_ends_when_the_next_begins(progress):
    progress.begin("loading libraries")
    progress.clock.now = 3.0
    progress.begin("starting Ray")
    ended, open_ = status_of(progress)["phases"]
    assert (ended["name"], ended["seconds"], ended["ended"]) == ("loading libraries", 3.0, True)
    assert (open_["name"], open_["ended"]) == ("starting Ray", False)


def test_counts_of_all_workers_add_up_and_what_else_they_do_is_told(progress):
    progress.begin(SCORING, 100)
    workers = [Activity("", {SCORING: Count(10, 500)}), Activity(LOADING, {SCORING: Count(5, 250)}), Activity(LOADING)]
    progress.attach_cluster(lambda: workers, lambda count: "")
    progress.tick()
    assert (progress.phases[SCORING].done, progress.phases[SCORING].tokens) == (15, 750)
    assert progress.doing == {LOADING: 2}
    assert "2 actors: loading the backbone" in text_of(progress)


def test_training_begins_with_the_first_persona_that_trains(progress):
    progress.train(4, done_before=1, steps=10)
    assert "training" not in progress.phases
    progress.changed(job("ada", "RUNNING", group="g1"))
    assert progress.phases["training"].total == 3
    progress.changed(job("ada", "TERMINATED", step=10, seconds=2.0, heldout_loss=1.25))
    assert list(progress.running) == []
    progress.tick()
    assert "masked ada: 10 steps, 2.0 s, held-out loss 1.250" in text_of(progress)


def test_the_output_has_status_and_events_every_few_seconds(progress, tmp_path):
    storage = open_storage(tmp_path / "out")
    progress.tick()
    assert not storage.exists(keys.STATUS)
    progress.attach(storage, "run1", "part-3-of-10")
    progress.tick()
    status = json.loads(storage.get(keys.status("part-3-of-10")))
    assert (status["run_id"], status["part"], status["state"]) == ("run1", "part-3-of-10", "running")
    assert list(storage.list(keys.TENSORBOARD))
    progress.train(7, 0, 1)
    progress.clock.now += STATUS_SECONDS / 2
    progress.tick()
    assert json.loads(storage.get(keys.status("part-3-of-10")))["personas"] == 0
    progress.close("stopped")
    last = json.loads(storage.get(keys.status("part-3-of-10")))
    assert (last["state"], last["personas"]) == ("stopped", 7)


def test_after_the_cluster_is_gone_nothing_asks_it(progress):
    asked = []
    progress.attach_cluster(lambda: asked.append(1) or [], lambda count: "")
    progress.tick()
    progress.detach_cluster()
    progress.tick()
    assert asked == [1]
