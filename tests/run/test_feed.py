import dataclasses
import threading

import pytest

from persona_pruner.manifest import Persona
from persona_pruner.run.feed import Opposites, SynthesisFeed, interruptible
from persona_pruner.run.stop import StoppedError
from persona_pruner.synthesis.pipeline import SynthesisResult

ADA, BEN, CLEO = (Persona(name, f"{name} sails") for name in ("ada", "ben", "cleo"))


def drain(feed):
    jobs = []
    while (job := feed.arrivals.get(timeout=10)) is not None:
        jobs.append((job.persona.id, job.state))
    return jobs


class Asked:
    """A stop that is asked for from the second check on."""

    checks = 0

    def check(self):
        self.checks += 1
        if self.checks > 1:
            raise StoppedError("SIGINT")


def test_a_stop_does_not_wait_for_the_next_result_and_takes_none_after_it():
    go, ended, touched = threading.Event(), threading.Event(), []

    def results():
        try:
            yield SynthesisResult("ada")
            go.wait(20)
            touched.append("ben")
            yield SynthesisResult("ben")
            touched.append("cleo")
        finally:
            ended.set()

    given = interruptible(results(), Asked())
    assert next(given).persona_id == "ada"
    with pytest.raises(StoppedError, match="SIGINT"):
        next(given)
    assert touched == []
    go.set()
    assert ended.wait(10)
    assert touched == ["ben"]


def test_what_ends_the_results_is_raised_after_those_before_it():
    def results():
        yield SynthesisResult("ada")
        raise OSError("broken")

    given = interruptible(results(), Asked())
    assert next(given).persona_id == "ada"
    with pytest.raises(OSError, match="broken"):
        next(given)


def test_ready_personas_come_first_then_each_as_its_data_are_there_then_the_end():
    results = [SynthesisResult("ben"), SynthesisResult("cleo", error=("few_answers", "2 usable"))]
    feed = SynthesisFeed([ADA], [BEN, CLEO], lambda ids: iter(results))
    assert drain(feed) == [("ada", "PENDING"), ("ben", "PENDING"), ("cleo", "ERROR")]
    assert feed.fault is None


def test_what_ends_the_synthesis_is_told_and_ends_the_arrivals():
    def synthesize(ids):
        yield SynthesisResult("ben")
        raise OSError("broken")

    feed = SynthesisFeed([], [BEN, CLEO], synthesize)
    assert drain(feed) == [("ben", "PENDING")]
    assert str(feed.fault) == "broken"


def test_after_close_nothing_is_asked_of_the_synthesis_any_more():
    """Ray may be down by then: another touch would start a second local one."""
    go, touched = threading.Event(), []

    def synthesize(ids):
        for name in ids:
            go.wait(10)
            touched.append(name)
            yield SynthesisResult(name)

    feed = SynthesisFeed([], [BEN, CLEO], synthesize)
    feed.close(timeout=0)
    go.set()
    assert drain(feed) == []
    assert touched == ["ben"]


def test_an_error_after_close_is_nobodys_concern():
    go = threading.Event()

    def synthesize(ids):
        go.wait(10)
        raise RuntimeError("Ray is down")
        yield

    feed = SynthesisFeed([], [BEN], synthesize)
    feed.close(timeout=0)
    go.set()
    assert drain(feed) == []
    assert feed.fault is None


def test_paired_personas_wait_for_the_data_of_their_opposite():
    ada, ben = dataclasses.replace(ADA, opposite=BEN), dataclasses.replace(BEN, opposite=ADA)
    cleo = dataclasses.replace(CLEO, opposite=ADA)
    held = threading.Event()

    def synthesize(ids):
        held.wait(10)
        yield SynthesisResult("ben")
        yield SynthesisResult("cleo")

    feed = SynthesisFeed([ada], [ben, cleo], synthesize, Opposites([ben, cleo]))
    assert feed.arrivals.empty()
    held.set()
    assert drain(feed) == [("ben", "PENDING"), ("ada", "PENDING"), ("cleo", "PENDING")]
    failed = SynthesisResult("ben", error=("few_answers", "2 usable"))
    feed = SynthesisFeed([ada], [ben], lambda ids: iter([failed]), Opposites([ben]))
    assert drain(feed) == [("ben", "ERROR"), ("ada", "PENDING")]
