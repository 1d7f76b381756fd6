import os
import signal
import threading
import types

import pytest

from persona_pruner.config.schema import SchedulerConfig
from persona_pruner.run.stop import Stop, StoppedError


@pytest.fixture
def lease():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield types.SimpleNamespace(lost=threading.Event())
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_asks_for_the_end_and_is_the_reason(lease):
    stop = Stop(SchedulerConfig(), lease)
    stop.check()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(StoppedError, match="SIGTERM"):
        stop.check()


def test_an_output_that_another_job_has_taken_over(lease):
    stop = Stop(SchedulerConfig(), lease)
    lease.lost.set()
    assert stop()
    assert stop.reason == "another job has taken over the output"


def test_the_time_budget(lease):
    stop = Stop(SchedulerConfig(time_budget_seconds=1e-9), lease)
    assert stop()
    assert "time_budget_seconds" in stop.reason
