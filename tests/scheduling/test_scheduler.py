"""The scheduler on a real pool of simulated groups, in virtual time."""

import json
import queue
from collections import Counter

import pytest
from simulated_groups import World, failed, flaky, trained

from persona_pruner.config.schema import RunConfig
from persona_pruner.manifest import Persona
from persona_pruner.scheduling.actor_group import GroupLostError, WorkerError
from persona_pruner.scheduling.group_pool import GroupPool
from persona_pruner.scheduling.persona_job import MAX_LOSSES, PersonaJob
from persona_pruner.scheduling.scheduler import STOP_SECONDS, Scheduler
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


def people(count, **values):
    return [Persona(f"p{n}", f"person {n}", **values) for n in range(count)]


def arrivals_of(jobs, end=True):
    arrivals = queue.Queue()
    for job in jobs:
        arrivals.put(job)
    if end:
        arrivals.put(None)
    return arrivals


class Seen:
    """An observer that keeps what it is told."""

    def __init__(self):
        self.changes, self.turns = [], 0

    def changed(self, job):
        self.changes.append((job.persona.id, job.state))

    def turn(self, scheduler):
        self.turns += 1


@pytest.fixture
def make(tmp_path):
    def build(world, groups=1, **scheduler):
        config = RunConfig.model_validate(
            {"groups": {"min": groups, "max": groups}, "scheduler": {"backoff_seconds": 1.0} | scheduler}
        )
        pool = GroupPool(config.groups, world.launch, world.wait, world.answer, world.clock)
        return Scheduler(config, pool, open_storage(tmp_path / "out"), Seen(), world.clock)

    return build


def run(scheduler, personas, should_stop=lambda: False):
    scheduler.expected = len(personas)
    return scheduler.run(arrivals_of(map(PersonaJob, personas)), should_stop)


def test_every_persona_is_trained_once_and_the_counts_hold(make):
    world = World()
    scheduler = make(world, groups=3)
    assert run(scheduler, people(10))
    assert +scheduler.states == {"TERMINATED": 10}
    assert (scheduler.tokens, scheduler.busy_seconds, scheduler.expected) == (10_000, 100.0, 0)
    done = [persona_id for persona_id, state in scheduler._observer.changes if state == "TERMINATED"]
    assert sorted(done) == sorted(p.id for p in people(10))
    trained_ids = [
        p.id for group in world.groups for method, cohort in group.calls if method == "train" for p in cohort
    ]
    assert sorted(trained_ids) == sorted(done)


def test_higher_priorities_are_trained_first(make):
    world = World()
    personas = [*people(3), Persona("urgent", "x", priority=5)]
    assert run(make(world), personas)
    order = [cohort[0].id for method, cohort in world.groups[0].calls if method == "train"]
    assert order[0] == "urgent"


def test_a_persona_that_fails_is_tried_again_and_then_ends_in_errors(make):
    scheduler = make(World(train=failed), max_failures=2)
    assert run(scheduler, people(1))
    assert (+scheduler.states, scheduler.retries) == ({"ERROR": 1}, 2)
    error = json.loads(scheduler.storage.get(keys.error("p0")))
    assert (error["cause"], error["attempts"], scheduler.failures()) == ("exception", 3, {"p0": "broken"})


def test_one_that_fails_does_not_stop_the_others(make):
    world = World(train=lambda cohort: failed(cohort, "no_data") if cohort[0].id == "p1" else trained(cohort))
    scheduler = make(world)
    assert run(scheduler, people(3))
    assert +scheduler.states == {"TERMINATED": 2, "ERROR": 1}


def test_a_lost_group_is_replaced_and_its_personas_go_elsewhere(make):
    losses = iter([GroupLostError("gone")])
    scheduler = make(World(train=lambda cohort: next(losses, None) or trained(cohort)))
    assert run(scheduler, people(4))
    assert (+scheduler.states, scheduler.groups_lost) == ({"TERMINATED": 4}, 1)
    assert sum(job.losses for job in scheduler.jobs.values()) == 1


def test_a_persona_under_which_every_group_dies_ends_in_errors(make):
    def train(cohort):
        return GroupLostError("killed") if cohort[0].id == "p0" else trained(cohort)

    scheduler = make(World(train=train))
    assert run(scheduler, people(2))
    assert +scheduler.states == {"TERMINATED": 1, "ERROR": 1}
    assert scheduler.groups_lost == MAX_LOSSES + 1


def test_an_error_of_the_workers_counts_against_its_persona_only(make):
    errors = iter([WorkerError(RuntimeError("out of memory"))])
    scheduler = make(World(train=lambda cohort: next(errors, None) or trained(cohort)))
    assert run(scheduler, people(3))
    assert +scheduler.states == {"TERMINATED": 3}
    assert sorted(job.attempts for job in scheduler.jobs.values()) == [0, 0, 1]


def test_a_persona_whose_data_failed_arrives_as_an_error(make):
    scheduler = make(World())
    broken = PersonaJob(Persona("p9", "x"), state="ERROR", attempts=1, cause="few_answers", message="2 usable answers")
    assert scheduler.run(arrivals_of([broken]), lambda: False)
    assert scheduler.failures() == {"p9": "2 usable answers"}
    assert scheduler.storage.exists(keys.error("p9"))


def test_progress_of_running_personas_is_told(make):
    scheduler = make(World())
    assert run(scheduler, people(1))
    assert Counter(state for _, state in scheduler._observer.changes)["RUNNING"] > 1
    assert scheduler.jobs["p0"].step == 24


def test_max_concurrent_bounds_the_personas_in_training(make):
    world = World()
    scheduler = make(world, groups=4, max_concurrent=2)
    seen = []
    scheduler._observer.turn = lambda scheduler: seen.append(scheduler.states["RUNNING"])
    assert run(scheduler, people(6))
    assert max(seen) == 2


def test_stopped_in_the_middle_it_lets_the_groups_checkpoint(make):
    world = World()
    scheduler = make(world)
    assert not run(scheduler, people(5), should_stop=lambda: world.now > 15)
    assert "stop" in [method for method, _ in world.groups[0].calls]
    assert world.now <= 15 + 10 + STOP_SECONDS + 1
    assert scheduler.states["PENDING"] > 0


def test_thousands_with_faults_of_every_kind_all_end(make):
    world = World(train=flaky(seed=1, share=0.02))
    scheduler = make(world, groups=50)
    assert run(scheduler, people(2000))
    assert scheduler.states["TERMINATED"] + scheduler.states["ERROR"] == 2000
    assert scheduler.groups_lost > 10
    assert scheduler.retries > 50
