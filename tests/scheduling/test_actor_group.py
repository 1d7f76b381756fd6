"""A group of real actors on a local Ray, which a session starts once for its tests."""

import os
import signal

import pytest
import ray

from persona_pruner.config.schema import GroupsConfig
from persona_pruner.scheduling.actor_group import ActorGroup, GroupLostError, bundle_of, wait_any

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
SETTINGS = GroupsConfig(shards=2, num_cpus=0.5)


@pytest.fixture(scope="module")
def local_ray():
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class Worker:
    def address(self):
        return "here:1"

    def start(self, rank, size, address):
        self._rank = rank
        return (rank, size, address)

    def work(self, value):
        if value == "die" and self._rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return (self._rank, value)


def test_a_group_starts_answers_and_tells_a_lost_member(local_ray):
    remote = ray.remote(max_restarts=0)(Worker)
    group = ActorGroup(SETTINGS, remote, ())
    assert not group.placed
    group.wait_until_ready(60)
    assert group.ready
    assert group.pending() == []
    assert group.call_and_wait("work", "hello") == (0, "hello")
    with pytest.raises(GroupLostError):
        group.call_and_wait("work", "die")
    group.stop()


def test_waiting_for_nothing_takes_its_time_and_gives_nothing():
    assert wait_any([], 0.01) == set()


def test_what_one_actor_asks_of_its_node():
    assert bundle_of(SETTINGS) == {"CPU": 0.5}
    assert bundle_of(GroupsConfig(num_cpus=2, num_gpus=1)) == {"CPU": 2, "GPU": 1}
