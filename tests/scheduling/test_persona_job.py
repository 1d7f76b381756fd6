import pytest

from persona_pruner.config.schema import SchedulerConfig
from persona_pruner.manifest import Persona
from persona_pruner.scheduling.persona_job import HOPELESS, MAX_LOSSES, Event, PersonaJob, transition

SETTINGS = SchedulerConfig(max_failures=2, backoff_seconds=1.0)


def after(*events, trial=None, now=100.0):
    trial = trial or PersonaJob(Persona("ada", "A sailor."))
    for event in events:
        trial = transition(trial, event, SETTINGS, now)
    return trial


def test_a_trial_runs_through():
    started = after(Event("started", group="g1"))
    assert (started.state, started.group) == ("RUNNING", "g1")
    done = after(Event("progressed", step=5), Event("done", step=9, heldout_loss=1.5, seconds=2.0), trial=started)
    assert (done.state, done.step, done.heldout_loss, done.group) == ("TERMINATED", 9, 1.5, None)


def test_progress_without_an_evaluation_keeps_the_last_loss_and_the_group():
    trial = after(Event("started", group="g1"), Event("progressed", step=5, heldout_loss=2.0))
    trial = after(Event("progressed", step=6), trial=trial)
    assert (trial.step, trial.heldout_loss, trial.group) == (6, 2.0, "g1")


def test_failures_are_tried_again_with_doubled_waits_until_there_are_too_many():
    failure = Event("failed", cause="exception", message="broken")
    first = after(failure)
    assert (first.state, first.attempts, first.not_before) == ("PENDING", 1, 101.0)
    second = after(failure, trial=first)
    assert (second.state, second.not_before) == ("PENDING", 102.0)
    third = after(failure, trial=second)
    assert (third.state, third.cause, third.message) == ("ERROR", "exception", "broken")


@pytest.mark.parametrize("cause", sorted(HOPELESS))
def test_bad_data_are_not_tried_again(cause):
    assert after(Event("failed", cause=cause)).state == "ERROR"


def test_lost_groups_do_not_count_as_failures_but_a_persona_that_kills_its_groups_ends():
    lost = Event("lost", cause="group_lost", message="group g1 was lost")
    trial = after(*[lost] * MAX_LOSSES)
    assert (trial.state, trial.attempts, trial.losses, trial.not_before) == ("PENDING", 0, MAX_LOSSES, 0.0)
    assert after(lost, trial=trial).state == "ERROR"


def test_a_trial_that_never_began_is_as_before():
    trial = after(Event("started", group="g1"), Event("returned"))
    assert trial == PersonaJob(Persona("ada", "A sailor."))


def test_a_stopped_trial_is_paused_at_its_step():
    trial = after(Event("started", group="g1"), Event("paused", step=7))
    assert (trial.state, trial.step, trial.group) == ("PAUSED", 7, None)
