"""Synthesis in a thread of its own, which hands each persona over to the scheduler as soon as its data are there."""

import queue
import threading
from collections.abc import Callable, Iterable, Sequence

from persona_pruner.manifest import Persona
from persona_pruner.scheduling.persona_job import PersonaJob
from persona_pruner.synthesis.pipeline import SynthesisResult


class SynthesisFeed:
    """`arrivals` gives a job for each persona of `ready` at once, then for those that `synthesize` yields, then None.

    `synthesize` takes ids. With `paired` a persona waits for the data of its opposite too. After `close` the thread
    takes no further result, and what it raises is not told: Ray may be down by then.
    """

    def __init__(
        self,
        ready: Sequence[Persona],
        todo: Sequence[Persona],
        synthesize: Callable[[Sequence[str]], Iterable[SynthesisResult]],
        paired: bool = False,
    ) -> None:
        self.arrivals: queue.Queue[PersonaJob | None] = queue.Queue()
        self.fault: Exception | None = None
        """What ended the synthesis before its end."""
        self._todo, self._synthesize, self._paired = todo, synthesize, paired
        self._lacking = {persona.id for persona in todo}
        self._held: dict[str, list[PersonaJob]] = {}
        """Jobs by the persona whose data they wait for."""
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
                self._lacking.discard(result.persona_id)
                self._arrive(job_of(personas[result.persona_id], result))
                for job in self._held.pop(result.persona_id, ()):
                    self.arrivals.put(job)
        except Exception as error:
            if not self._closed.is_set():
                self.fault = error
        finally:
            self.arrivals.put(None)

    def _arrive(self, job: PersonaJob) -> None:
        opposite = job.persona.opposite if self._paired else None
        if opposite is not None and opposite.id in self._lacking:
            self._held.setdefault(opposite.id, []).append(job)
        else:
            self.arrivals.put(job)

    def close(self, timeout: float = 2.0) -> None:
        """Take no further result; wait a moment for the one under way."""
        self._closed.set()
        self._thread.join(timeout)


def job_of(persona: Persona, result: SynthesisResult) -> PersonaJob:
    if result.error is None:
        return PersonaJob(persona)
    cause, message = result.error
    return PersonaJob(persona, state="ERROR", attempts=1, cause=cause, message=message)
