"""Groups that synthesize where nothing waits to be trained, in virtual time."""

import queue

import pytest
from simulated_groups import SimulatedGroup, World

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import BackboneError
from persona_pruner.manifest import Persona
from persona_pruner.scheduling.actor_group import GroupLostError, WorkerError
from persona_pruner.scheduling.group_pool import GroupPool
from persona_pruner.scheduling.persona_job import PersonaJob
from persona_pruner.scheduling.scheduler import Scheduler
from persona_pruner.scheduling.tiles import Tiles
from persona_pruner.storage.open import open_storage


def people(first, count):
    return [Persona(f"p{n}", f"number {n}") for n in range(first, first + count)]


def run(tmp_path, world, tiles, ready=(), groups=4):
    """The scheduler after a run of one pool for everything."""
    config = RunConfig.model_validate({"gpus": 0, "groups": {"max": groups}, "scheduler": {"backoff_seconds": 0}})
    pool = GroupPool(config.group_pool, world.launch, world.wait, world.answer, world.clock)
    scheduler = Scheduler(config, pool, open_storage(tmp_path / "out"), clock=world.clock, tiles=Tiles(tiles))
    arrivals = queue.Queue()
    for persona in ready:
        arrivals.put(PersonaJob(persona))
    arrivals.put(None)
    assert scheduler.run(arrivals, lambda: False)
    return scheduler


def calls(world):
    return [call for group in world.groups for call in group.calls if call[0] in ("train", "synthesize")]


def test_every_group_does_what_waits_and_none_is_idle(tmp_path):
    world = World()
    scheduler = run(tmp_path, world, [people(4 * n, 4) for n in range(12)])
    assert scheduler.states["TERMINATED"] == 48
    assert scheduler.busy_seconds == (12 + 48) * world.seconds
    assert scheduler.busy_seconds > 0.9 * scheduler.pool.up_seconds
    assert all({name for name, _ in group.calls} >= {"train", "synthesize"} for group in world.groups)


def test_data_that_are_there_are_trained_before_more_are_made(tmp_path):
    world = World()
    run(tmp_path, world, [people(100, 4)], ready=people(0, 16))
    first = [group.calls[0][0] for group in world.groups]
    assert first == ["train"] * 4
    assert len(calls(world)) == 16 + 4 + 1


def test_nothing_waits_behind_a_tile(tmp_path, monkeypatch):
    waited = []
    call = SimulatedGroup.call

    def observed(group, method, argument):
        before = [name for name, _ in group.calls if name in ("train", "synthesize")][-1:]
        if before == ["synthesize"] and method in ("train", "synthesize"):
            waited.append(group.free_at - group.world.now)
        return call(group, method, argument)

    monkeypatch.setattr(SimulatedGroup, "call", observed)
    run(tmp_path, World(), [people(0, 3), people(3, 9), people(12, 5)], ready=people(20, 3), groups=2)
    assert len(waited) == 3
    assert max(waited) <= 0


def test_a_tile_whose_group_is_lost_is_made_again_and_then_persona_by_persona(tmp_path):
    class Deadly(World):
        def data(self, personas):
            fatal = any(persona.id == "p1" for persona in personas)
            return GroupLostError("RayActorError: killed") if fatal else super().data(personas)

    scheduler = run(tmp_path, Deadly(), [people(0, 4), people(4, 4)])
    assert scheduler.failures() == {"p1": scheduler.jobs["p1"].message}
    assert "RayActorError: killed" in scheduler.jobs["p1"].message
    assert scheduler.jobs["p1"].cause == "group_lost"
    assert scheduler.states["TERMINATED"] == 7


def test_what_no_persona_can_mend_ends_the_run(tmp_path):
    class Refusing(World):
        def data(self, personas):
            return WorkerError(BackboneError("no reference persona fits"))

    with pytest.raises(BackboneError, match="no reference persona fits"):
        run(tmp_path, Refusing(), [people(0, 4)])
