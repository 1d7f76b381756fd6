import pytest

from persona_pruner.evaluation.report.data import PersonaFigures, ReportData
from persona_pruner.evaluation.report.figures import figures_of


def data_of(personas, **tables):
    return ReportData("url", {"run_id": "r"}, [], personas, {}, [], None, [], tables)


def persona(number):
    losses = {"answers": {"unpruned": 1.0, "own": 1.1, "global": 1.4, "random": 2.0 + number}}
    arms = {"unpruned": 0.9, "own": 0.8, "other": 0.1, "flap": 0.5, "taylor": 0.3}
    return PersonaFigures(
        f"p{number}", "", 0.5, 3000 + number, losses, {arm: {"first": value} for arm, value in arms.items()}
    )


def test_means_and_headlines_over_personas():
    figures = figures_of(data_of([persona(number) for number in range(3)]))
    assert figures.losses["answers"]["random"].value == 3
    assert figures.measures["first"]["own"].value == pytest.approx(0.8)
    assert (figures.kept, figures.mask_bytes, figures.total_bytes) == (0.5, 3001, 9003)
    assert figures.settings == {"run": "r"}
    shares = {name: (one.baseline, one.share.value) for name, one in figures.headlines}
    # Of 0.4 nats the own mask loses 0.1; of the drop of 0.4 of the strongest baseline by answers, 0.1.
    assert shares["loss on held-out questions answered in their voice"] == ("global", pytest.approx(0.75))
    assert shares["in character: own description ranks first"] == ("flap", pytest.approx(0.75))


def test_differences_are_paired_over_the_personas_that_have_both():
    people = [
        PersonaFigures(f"p{number}", "", 0.5, 3000, {}, {
            "unpruned": {"rank": 1.0 + number}, "own": {"rank": 1.5 + number},
            "global": {"rank": None if number == 2 else 2.0 + number, "preferred": 0.5},
        })
        for number in range(3)
    ]  # fmt: skip
    found = figures_of(data_of(people)).differences
    assert list(found) == ["rank"]
    # All personas differ alike, though they lie far apart.
    assert {arm: (one.value, one.low, one.high, one.personas) for arm, one in found["rank"].items()} == {
        "unpruned": (0.5, 0.5, 0.5, 3),
        "global": (-0.5, -0.5, -0.5, 2),
    }


def test_benchmarks_are_paired_with_the_unpruned_backbone():
    columns = ["task", "metric", "arm", "questions", "value", "standard error"]
    rows = [["mmlu", "acc", arm, 200, value, None] for arm, value in (("unpruned", 0.4), ("a", 0.3), ("b", 0.2))]
    rows += [["arc", "acc", "unpruned", 10, 0.5, None]]
    (one,) = figures_of(data_of([persona(0)], benchmarks={"columns": columns, "rows": rows})).benchmarks
    assert (one.task, one.unpruned, one.worst, one.masked.personas) == ("mmlu", 0.4, "b", 2)
    assert one.masked.value == pytest.approx(0.25)


def test_the_worst_mask_is_the_one_with_the_most_bits_per_byte():
    columns = ["task", "metric", "arm", "questions", "value", "standard error"]
    rows = [["humaneval", "bits_per_byte", arm, 40, value, None] for arm, value in (("a", 1.3), ("b", 1.2))]
    (one,) = figures_of(data_of([persona(0)], benchmarks={"columns": columns, "rows": rows})).benchmarks
    assert one.worst == "a"
