import pytest
from simulated_groups import World

from persona_pruner.config.schema import GroupsConfig
from persona_pruner.errors import BackboneError, ClusterError
from persona_pruner.scheduling.actor_group import GroupLostError, WorkerError
from persona_pruner.scheduling.group_pool import MAX_FAILED_STARTS, MAX_LOST_CALLS, MAX_LOST_STARTS, GroupPool
from persona_pruner.scheduling.pool_events import (
    CallDone,
    CallFailed,
    CallLost,
    CallReturned,
    GroupLost,
    GroupStarted,
)


def pool_of(world, **settings):
    return GroupPool(GroupsConfig(**settings), world.launch, world.wait, world.answer, world.clock)


def poll_until(pool, kind):
    for _ in range(200):
        events = pool.poll(0.5)
        if any(isinstance(event, kind) for event in events):
            return events
    raise AssertionError(f"no {kind.__name__} came")


def up(pool, count=1):
    pool.scale(count)
    while pool.up < count:
        pool.poll(0.5)
    return pool


def test_it_grows_to_what_is_wanted_within_its_bounds_and_gives_idle_groups_back():
    world = World()
    pool = up(pool_of(world, min=1, max=3, idle_seconds=30), 3)
    pool.scale(9)
    assert len(pool.groups) == 3
    world.now += 31
    pool.scale(1)
    assert (pool.up, sum(group.stopped for group in world.groups)) == (1, 2)
    pool.scale(0)
    assert pool.up == 1


def test_groups_that_wait_for_resources_are_counted_and_given_back_first():
    world = World()
    world.room = 1
    pool = up(pool_of(world, min=1, max=3))
    pool.scale(3)
    pool.poll(0.5)
    assert (pool.up, pool.placing) == (1, 2)
    pool.scale(1)
    assert (pool.up, pool.placing) == (1, 0)


def test_a_call_comes_back_with_its_answer_and_its_context():
    world = World()
    pool = up(pool_of(world))
    pool.submit(pool.free(), "evaluate", "task", "mine")
    (event,) = poll_until(pool, CallDone)
    assert (event.value, event.call.context, pool.busy) == ("task", "mine", 0)


def test_calls_go_to_the_group_with_the_fewest_and_a_full_pool_takes_none():
    world = World()
    pool = up(pool_of(world, min=2, max=2), 2)
    groups = []
    while group := pool.free():
        pool.submit(group, "train", [], len(groups))
        groups.append(group.name)
    assert groups[0] != groups[1]
    assert sorted(groups) == ["g1", "g1", "g2", "g2"]


def test_the_next_personas_are_fetched_while_a_call_waits():
    world = World()
    pool = up(pool_of(world))
    for _ in range(2):
        pool.submit(pool.free(), "train", [], None)
    assert [method for method, _ in world.groups[0].calls] == ["train", "prefetch", "train"]


def test_a_lost_group_loses_its_running_call_and_returns_the_waiting_one():
    world = World(train=lambda personas: GroupLostError("the node is gone"))
    pool = up(pool_of(world))
    for context in ("runs", "waits"):
        pool.submit(pool.free(), "train", [], context)
    lost, running, waiting = poll_until(pool, GroupLost)
    assert "group g1 was lost: the node is gone" in lost.message
    assert isinstance(running, CallLost)
    assert isinstance(waiting, CallReturned)
    assert (running.call.context, waiting.call.context) == ("runs", "waits")
    assert (len(pool.groups), world.groups[0].stopped) == (0, True)


def test_an_error_of_the_workers_is_the_calls_own_and_the_group_is_replaced():
    world = World(train=lambda personas: WorkerError(RuntimeError("out of memory")))
    pool = up(pool_of(world))
    pool.submit(pool.free(), "train", [], "mine")
    (event,) = poll_until(pool, CallFailed)
    assert (str(event.error), event.call.context, pool.up) == ("out of memory", "mine", 0)


class BrokenStart:
    """Makes every group of a world fail to start."""

    def __init__(self, world, error):
        self._launch, self._error = world.launch, error

    def __call__(self):
        group = self._launch()
        advance = group.advance

        def broken(done):
            if group.placed:
                raise self._error
            advance(done)

        group.advance = broken
        return group


@pytest.mark.parametrize(
    ("error", "starts"),
    [(WorkerError(RuntimeError("no driver")), MAX_FAILED_STARTS + 1), (GroupLostError("died"), MAX_LOST_STARTS + 1)],
)
def test_groups_that_never_come_up_are_an_error_of_the_cluster(error, starts):
    world = World()
    pool = GroupPool(GroupsConfig(), BrokenStart(world, error), world.wait, world.answer, world.clock)
    with pytest.raises(ClusterError, match="no shard group comes up"):  # noqa: PT012
        while True:
            pool.scale(1)
            pool.poll(0.5)
    assert len(world.groups) == starts
    assert ClusterError.exit_code not in (2, 4)


def test_a_backbone_that_cannot_be_loaded_is_the_users_and_told_at_once():
    world = World()
    fault = WorkerError(BackboneError("no such model"))
    pool = GroupPool(GroupsConfig(), BrokenStart(world, fault), world.wait, world.answer, world.clock)
    with pytest.raises(BackboneError, match="no such model"):  # noqa: PT012
        while True:
            pool.scale(1)
            pool.poll(0.5)
    assert len(world.groups) == 1


def test_actors_that_do_not_start_in_time_are_lost():
    world = World()
    world.start_seconds = 1e6
    pool = pool_of(world, timeout_seconds=60)
    pool.scale(1)
    (event,) = poll_until(pool, GroupLost)
    assert "groups.timeout_seconds = 60" in event.message
    assert world.now > 60


def test_map_answers_every_payload_and_sends_the_calls_of_lost_groups_to_others():
    losses = iter([GroupLostError("gone")] * 2)
    world = World(train=lambda payload: next(losses, None) or sum(payload))
    answers = list(pool_of(world, min=2, max=2).map("train", [[n] for n in range(7)], lambda: False))
    assert sorted(answers) == [([n], n) for n in range(7)]
    assert any(group.stopped for group in world.groups)


def test_map_gives_up_on_a_call_that_loses_its_groups():
    world = World(train=lambda personas: GroupLostError("killed"))
    with pytest.raises(ClusterError, match=f"so were {MAX_LOST_CALLS} groups before it"):
        list(pool_of(world).map("train", [[]], lambda: False))


def test_map_ends_when_stopped():
    assert list(pool_of(World()).map("evaluate", [1], lambda: True)) == []


def test_time_up_is_counted_over_all_groups():
    world = World()
    pool = up(pool_of(world, min=2, max=2), 2)
    began, before = world.now, pool.up_seconds
    pool.submit(pool.free(), "train", [], None)
    poll_until(pool, CallDone)
    pool.poll(0)
    assert pool.up_seconds - before == pytest.approx(2 * (world.now - began))


def test_progress_is_asked_of_some_groups_in_turn():
    world = World()
    pool = up(pool_of(world, min=3, max=3), 3)
    while group := pool.free():
        pool.submit(group, "train", [], None)
    for _ in range(3):
        assert len(pool.ask("progress", 1)) == 1
    asked = [[method for method, _ in group.calls].count("progress") for group in world.groups]
    assert asked == [1, 1, 1]


def test_started_groups_are_told():
    pool = pool_of(World())
    pool.scale(1)
    assert poll_until(pool, GroupStarted) == [GroupStarted("g1")]
