import numpy as np
import pytest

alt = pytest.importorskip("altair", reason="the extra `report` is not installed")
from persona_pruner.evaluation.overlap import SharedCounts, overlap  # noqa: E402
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


def test_methods_without_a_colour_of_their_own_get_one_each():
    one = Estimate(1.0, 0.9, 1.1, 5)
    names = ("own", "flap", "taylor")
    scale = charts.comparison({"answers": dict.fromkeys(names, one)}, "nats")["layer"][0]["encoding"]["color"]["scale"]
    assert scale["domain"] == ["own", "flap", "taylor"]
    assert len(set(scale["range"])) == 3


def test_turns_are_plotted_and_what_was_not_measured_is_left_out():
    table = {"columns": ["turn", "arm", "first"], "rows": [[1, "own", 0.5], [2, "own", None], [1, "unpruned", 1]]}
    assert values(charts.turns(table, "first")) == [
        {"turn": 1, "method": "own", "value": 0.5}, {"turn": 1, "method": "unpruned", "value": 1},
    ]  # fmt: skip
    # The names of seven arms in one line are cut off on a telephone.
    assert charts.turns(table, "first")["encoding"]["color"]["legend"]["columns"] == {"expr": "width < 480 ? 3 : 0"}


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
    names = [f"p{n}" for n in range(90)]
    keep = np.random.default_rng(0).random((2, 90, 32)) > 0.5
    both = np.einsum("gpi,gqi->gpq", keep.astype(float), keep.astype(float))
    shared = overlap(SharedCounts([(0, "FFN"), (1, "FFN")], np.full(2, 32), both, 0), np.eye(90))
    shown = {row["first"] for row in values(charts.heat_map(shared, names))}
    assert 20 <= len(shown) <= charts.HEAT_PERSONAS
    assert len(values(charts.persona_map(shared, names, {"p1": 0.5}))) == 90
    by_line = {}
    for row in values(charts.layers(shared)):
        by_line.setdefault(row["what"], []).append(row["value"])
    assert by_line["kept, FFN"] == pytest.approx(keep.mean((1, 2)), abs=1e-4)
    assert len(by_line["distance of two masks, FFN"]) == 2
