import numpy as np
import pytest

alt = pytest.importorskip("altair", reason="the extra `report` is not installed")
from persona_pruner.evaluation.overlap import overlap  # noqa: E402
from persona_pruner.evaluation.report import charts  # noqa: E402
from persona_pruner.evaluation.report.data import PersonaFigures  # noqa: E402
from persona_pruner.evaluation.statistics import Estimate  # noqa: E402


def values(spec):
    return spec["data"]["values"] if "data" in spec else spec["layer"][0]["data"]["values"]


def test_a_comparison_shows_each_method_with_its_interval_in_one_order():
    one = Estimate(1.0, 0.9, 1.1, 5)
    spec = charts.comparison({"answers": {"random": one, "own": one, "unpruned": one}}, "nats")
    assert {(row["method"], row["low"], row["value"]) for row in values(spec)} == {
        (name, 0.9, 1.0) for name in ("random", "own", "unpruned")
    }
    assert spec["layer"][0]["encoding"]["y"]["sort"] == ["unpruned", "own", "random"]


def test_a_distribution_counts_every_persona_once_per_method_and_does_not_grow_with_them():
    personas = [
        PersonaFigures(f"p{n}", "", 0.5, 1, {"answers": {"unpruned": 1.0, "own": 1 + n / 3000, "global": 2.0}})
        for n in range(3000)
    ]
    rows = values(charts.distribution(personas, "answers"))
    assert len(rows) < 60
    for method in ("own", "global"):
        assert sum(row["personas"] for row in rows if row["method"] == method) == 3000


def test_a_heat_map_of_many_personas_shows_some_of_them():
    keep = np.random.default_rng(0).random((90, 2, 32)) > 0.5
    names = [f"p{n}" for n in range(90)]
    shared = overlap(keep, names)
    shown = {row["first"] for row in values(charts.heat_map(shared, names))}
    assert 20 <= len(shown) <= charts.HEAT_PERSONAS
    assert len(values(charts.persona_map(shared, names, {"p1": 0.5}))) == 90
    assert [row["value"] for row in values(charts.layers(shared, [0.5, 0.25])) if "kept" in row["what"]] == [0.5, 0.25]
