"""Synthesis in a thread of its own: the scheduler gets each persona as soon as its data are there, and a stop need not
wait for the next one's."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from persona_pruner.manifest import Persona
from persona_pruner.run.stop import Stop
from persona_pruner.scheduling.persona_job import PersonaJob
from persona_pruner.synthesis.pipeline import SynthesisResult

SECONDS_TO_STOP = 0.2


def interruptible(results: Iterable[SynthesisResult], stop: Stop) -> Iterator[SynthesisResult]:
    """The results as they come; minutes may pass between two. Raises StoppedError, and what `results` raises.

    After that no further result is taken: Ray may be down by then.
    """
    arrived: queue.Queue[SynthesisResult | Exception | None] = queue.Queue()
    closed = threading.Event()

    def take() -> None:
        try:
            for result in results:
                if closed.is_set():
                    return
                arrived.put(result)
            arrived.put(None)
        except Exception as error:
            arrived.put(error)

    threading.Thread(target=take, name="results", daemon=True).start()
    try:
        while True:
            try:
                result = arrived.get(timeout=SECONDS_TO_STOP)
            except queue.Empty:
                stop.check()
                continue
            if result is None:
                return
            if isinstance(result, Exception):
                raise result
            yield result
    finally:
        closed.set()


class Opposites:
    """Holds the job of each persona back until the data of its opposite are there too, or have failed."""

    def __init__(self, lacking: Iterable[Persona]) -> None:
        self._lacking = {persona.id for persona in lacking}
        self._held: dict[str, list[PersonaJob]] = {}
        """Jobs by the persona whose data they wait for."""

    def arrive(self, job: PersonaJob) -> list[PersonaJob]:
        """The jobs that need not wait any more, now that this one's persona has data or has failed."""
        self._lacking.discard(job.persona.id)
        freed = self._held.pop(job.persona.id, [])
        opposite = job.persona.opposite
        if opposite is None or opposite.id not in self._lacking:
            return [job, *freed]
        self._held.setdefault(opposite.id, []).append(job)
        return freed


class SynthesisFeed:
    """`arrivals` gives a job for each persona of `ready` at once, then for those that `synthesize` yields, then None.

    `synthesize` takes ids. With `opposites` a persona waits for the data of its opposite too. After `close` the thread
    takes no further result, and what it raises is not told: Ray may be down by then.
    """

    def __init__(
        self,
        ready: Sequence[Persona],
        todo: Sequence[Persona],
        synthesize: Callable[[Sequence[str]], Iterable[SynthesisResult]],
        opposites: Opposites | None = None,
    ) -> None:
        self.arrivals: queue.Queue[PersonaJob | None] = queue.Queue()
        self.fault: Exception | None = None
        """What ended the synthesis before its end."""
        self._todo, self._synthesize, self._opposites = todo, synthesize, opposites
        self._closed = threading.Event()
        for persona in ready:
            self._arrive(PersonaJob(persona))
        self._thread = threading.Thread(target=self._feed, name="synthesis", daemon=True)
        self._thread.start()

    def _feed(self) -> None:
        personas = {persona.id: persona for persona in self._todo}
        try:
            for result in self._synthesize(list(personas)):
                if self._closed.is_set():
                    return
                self._arrive(job_of(personas[result.persona_id], result))
        except Exception as error:
            if not self._closed.is_set():
                self.fault = error
        finally:
            self.arrivals.put(None)

    def _arrive(self, job: PersonaJob) -> None:
        for each in [job] if self._opposites is None else self._opposites.arrive(job):
            self.arrivals.put(each)

    def close(self, timeout: float = 2.0) -> None:
        """Take no further result; wait a moment for the one under way."""
        self._closed.set()
        self._thread.join(timeout)


def job_of(persona: Persona, result: SynthesisResult) -> PersonaJob:
    if result.error is None:
        return PersonaJob(persona)
    cause, message = result.error
    return PersonaJob(persona, state="ERROR", attempts=1, cause=cause, message=message)
