"""When a job leaves before its end: a signal, the time budget, or another job that has taken over the output."""

import signal
import threading
import time

from persona_pruner.config.schema import SchedulerConfig
from persona_pruner.run.lease import Lease


class StoppedError(Exception):
    """The job was asked to stop before its end."""


class Stop:
    """Whether to leave, and why. SIGTERM and SIGINT ask for it from now on."""

    def __init__(self, settings: SchedulerConfig, lease: Lease) -> None:
        self._lease = lease
        self._asked = threading.Event()
        budget = settings.time_budget_seconds
        self._deadline = None if budget is None else time.monotonic() + budget
        self.reason = ""
        self.listen()

    def listen(self) -> None:
        """Take the signals over; ray.init installs handlers of its own, so again after it."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        self.reason = signal.Signals(number).name
        self._asked.set()

    def __call__(self) -> bool:
        if self._lease.lost.is_set():
            self.reason = "another job has taken over the output"
            return True
        if self._deadline is not None and time.monotonic() > self._deadline:
            self.reason = "scheduler.time_budget_seconds is over"
            return True
        return self._asked.is_set()

    def check(self) -> None:
        """Raises StoppedError where it is time to leave."""
        if self():
            raise StoppedError(self.reason)
