import pytest

from persona_pruner.run.phases import Phase


def test_an_estimate_leaves_out_the_start_up():
    phase = Phase("scoring", began=0.0, total=100)
    assert phase.left(50.0) is None
    phase.count(60.0, 10, 1000)
    assert phase.left(60.0) is None
    phase.count(70.0, 20, 3000)
    assert phase.left(70.0) == pytest.approx(80.0)
    assert phase.tokens_per_second(70.0) == pytest.approx(200.0)
    assert phase.seconds(70.0) == 70.0


def test_a_phase_that_has_ended_stands_still():
    phase = Phase("scoring", began=0.0, total=4)
    phase.count(1.0, 1, 10)
    phase.count(2.0, 4, 40)
    phase.ended = 2.0
    assert (phase.seconds(100.0), phase.left(100.0)) == (2.0, None)
    assert phase.tokens_per_second(100.0) == pytest.approx(30.0)


def test_the_document_has_what_a_reader_needs():
    phase = Phase("training", began=0.0, total=8)
    phase.count(1.0, 1.0, 0)
    phase.count(3.0, 2.5, 0)
    told = phase.to_dict(3.0)
    assert (told["done"], told["total"], told["unit"], told["left_seconds"]) == (2, 8, "personas", 7)
