"""Jobs that wait for a group: by priority, then in the order in which they came. Each step is O(log n)."""

import heapq
import itertools


class WaitingJobs:
    """Ids of jobs. Those whose next try is later wait apart until they are due."""

    def __init__(self) -> None:
        self._due: list[tuple[int, int, str]] = []
        self._later: list[tuple[float, int, int, str]] = []
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._due) + len(self._later)

    def push(self, job_id: str, priority: int, not_before: float, now: float) -> None:
        """Higher priorities come first; `not_before` and `now` are times of one clock."""
        order = next(self._order)
        if not_before > now:
            heapq.heappush(self._later, (not_before, -priority, order, job_id))
        else:
            heapq.heappush(self._due, (-priority, order, job_id))

    def pop(self, count: int, now: float) -> list[str]:
        """Up to `count` jobs that are due."""
        while self._later and self._later[0][0] <= now:
            heapq.heappush(self._due, heapq.heappop(self._later)[1:])
        return [heapq.heappop(self._due)[2] for _ in range(min(count, len(self._due)))]
