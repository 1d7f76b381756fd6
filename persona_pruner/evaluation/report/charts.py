"""The charts of a report as Vega-Lite specifications, made with Altair. Colours of text and grid come from the page."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np

from persona_pruner.evaluation.overlap import Overlap
from persona_pruner.evaluation.report.data import PersonaFigures
from persona_pruner.evaluation.statistics import Estimate

HEAT_PERSONAS = 40
COLORS = {
    "unpruned": "#8c8c8c", "own": "#2f7ed8", "global": "#f08c2e", "other": "#c9485b", "activation": "#7a5cc0",
    "magnitude": "#3c9d71", "random": "#a07a3c",
}  # fmt: skip
FURTHER = ("#b25fb5", "#4aa3a2", "#d18ca4", "#7f8f3a", "#5d6fb0", "#b0713f")
"""Of methods without a colour of their own."""

Spec = dict[str, Any]


def comparison(estimates: Mapping[str, Mapping[str, Estimate]], title: str) -> Spec:
    """Means of each text's (or measure's) methods with their intervals. `estimates` by panel and method."""
    rows = [
        {"panel": panel, "method": method, "value": one.value, "low": one.low, "high": one.high}
        for panel, by_method in estimates.items()
        for method, one in by_method.items()
    ]
    order = _order({str(row["method"]) for row in rows})
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=alt.Y("method:N", sort=order, title=None), color=alt.Color("method:N", scale=_colors(order), legend=None)
    )
    bars = base.mark_rule(strokeWidth=3).encode(x=alt.X("low:Q", title=title, scale=alt.Scale(zero=False)), x2="high:Q")
    points = base.mark_point(filled=True, size=90).encode(
        x="value:Q", tooltip=["method:N", alt.Tooltip("value:Q", format=".3f"), alt.Tooltip("low:Q", format=".3f"),
                              alt.Tooltip("high:Q", format=".3f")],
    )  # fmt: skip
    layered = alt.layer(bars, points).properties(width="container", height=26 * len(order))
    return _spec(layered)


def turns(table: Mapping[str, Any], measure: str) -> Spec:
    """A measure of conversations turn by turn. `table` has the columns turn, arm and the measure; gaps are left out."""
    rows = [
        {"turn": row["turn"], "method": row["arm"], "value": round(row[measure], 4)}
        for cells in table["rows"]
        if (row := dict(zip(table["columns"], cells, strict=False))).get(measure) is not None
    ]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("turn:Q", title="turn", axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
            color=alt.Color(
                "method:N",
                scale=_colors({row["method"] for row in rows}),
                legend=alt.Legend(title=None, orient="top", columns=alt.ExprRef("width < 480 ? 3 : 0")),
            ),
            tooltip=["method:N", "turn:Q", alt.Tooltip("value:Q", format=".3f")],
        )
        .properties(width="container", height=220)
    )
    return _spec(chart)


def curve() -> Spec:
    """How the learning of one mask went; the page puts the persona's rows (step, loss, what) in."""
    chart = (
        alt.Chart(alt.NamedData(name="curve"))
        .mark_line(point=alt.OverlayMarkDef(size=18))
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False)),
            color=alt.Color(
                "what:N",
                scale=alt.Scale(domain=["training", "held out"], range=[COLORS["own"], COLORS["global"]]),
                legend=alt.Legend(title=None, orient="top"),
            ),
            tooltip=["what:N", "step:Q", alt.Tooltip("loss:Q", format=".3f")],
        )
        .properties(width="container", height=140)
    )
    return _spec(chart)


def distribution(personas: Sequence[PersonaFigures], text: str) -> Spec:
    """Histogram of what masks lose on a text against the unpruned backbone."""
    rows = [
        {"method": method, "lost": losses[method] - losses["unpruned"]}
        for persona in personas
        if "unpruned" in (losses := persona.losses.get(text, {}))
        for method in ("own", "global", "other")
        if method in losses
    ]
    methods = {str(row["method"]) for row in rows}
    chart = (
        alt.Chart(alt.Data(values=_binned(rows)))
        .mark_line(point=True)
        .encode(
            x=alt.X("lost:Q", title="loss above the unpruned backbone (nats per token)", axis=alt.Axis(tickCount=8)),
            y=alt.Y("personas:Q", title="personas"),
            color=alt.Color(
                "method:N",
                scale=_colors(methods),
                legend=alt.Legend(title=None, orient="top"),
            ),
            tooltip=["method:N", alt.Tooltip("lost:Q", format=".3f"), "personas:Q"],
        )
        .properties(width="container", height=220)
    )
    return _spec(chart)


def heat_map(overlap: Overlap, names: Sequence[str]) -> Spec:
    """Overlap of the masks of up to HEAT_PERSONAS personas, those who are alike side by side."""
    step = max(1, -(-len(overlap.order) // HEAT_PERSONAS))
    shown = overlap.order[::step]
    ids = [names[number] for number in shown]
    rows = [
        {"first": names[a], "second": names[b], "overlap": round(float(overlap.jaccard_PP[a, b]), 4)}
        for a in shown
        for b in shown
        if a != b
    ]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_rect()
        .encode(
            x=alt.X("first:N", sort=ids, title=None, axis=alt.Axis(labels=len(ids) <= 24, labelAngle=-60)),
            y=alt.Y("second:N", sort=ids, title=None, axis=alt.Axis(labels=len(ids) <= 24)),
            color=alt.Color(
                "overlap:Q",
                scale=alt.Scale(scheme="viridis"),
                legend=alt.Legend(title="Jaccard", orient="top", gradientLength=160),
            ),
            tooltip=["first:N", "second:N", alt.Tooltip("overlap:Q", format=".3f")],
        )
        .properties(width="container", height=max(160, min(420, 22 * len(ids))))
    )
    return _spec(chart)


def persona_map(overlap: Overlap, names: Sequence[str], losses: Mapping[str, float]) -> Spec:
    """Personas in the plane: near ones keep the same channels."""
    rows = [
        {"persona": name, "x": round(float(x), 5), "y": round(float(y), 5), "cluster": int(cluster),
         "lost": losses.get(name) if np.isfinite(losses.get(name, np.inf)) else None}
        for name, (x, y), cluster in zip(names, overlap.map_P2, overlap.cluster_P, strict=True)
    ]  # fmt: skip
    hidden = alt.Axis(labels=False, ticks=False, title=None, domain=False, grid=False)
    points = (
        alt.Chart(alt.Data(values=rows))
        .mark_circle(size=90, opacity=0.85)
        .encode(
            x=alt.X("x:Q", axis=hidden, scale=alt.Scale(zero=False, padding=24)),
            y=alt.Y("y:Q", axis=hidden, scale=alt.Scale(zero=False, padding=18)),
            color=alt.Color("cluster:N", legend=None, scale=alt.Scale(scheme="tableau10")),
            tooltip=["persona:N", "cluster:N", alt.Tooltip("lost:Q", format=".3f", title="loss above unpruned")],
        )
    )
    labels = points.mark_text(dy=-10, fontSize=10).encode(text="persona:N", color=alt.value("gray"))
    chart = alt.layer(points, labels) if len(names) <= 30 else points
    return _spec(chart.properties(width="container", height=340))


def layers(overlap: Overlap) -> Spec:
    """Layer by layer: how far the masks of two personas are apart, and the share that masks keep."""
    figures = {
        **{f"distance of two masks, {kind}": values for kind, values in overlap.distances.items()},
        **{f"kept, {kind}": values for kind, values in overlap.kept.items()},
    }
    rows = [
        {"layer": layer, "value": round(float(value), 4), "what": what}
        for what, values in figures.items()
        for layer, value in enumerate(values)
    ]
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=True)
        .encode(
            x=alt.X("layer:Q", title="layer", axis=alt.Axis(tickMinStep=1, format="d")),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("what:N", legend=alt.Legend(title=None, orient="top", columns=1)),
            tooltip=["what:N", "layer:Q", alt.Tooltip("value:Q", format=".3f")],
        )
        .properties(width="container", height=200)
    )
    return _spec(chart)


def _binned(rows: Sequence[Mapping[str, Any]], bins: int = 24) -> list[dict[str, Any]]:
    """Counts by bin, so that a report does not grow with the personas."""
    values = np.array([row["lost"] for row in rows])
    if not len(values):
        return []
    edges = np.histogram_bin_edges(values, bins=min(bins, max(4, len(values) // 4)))
    counted = []
    for method in dict.fromkeys(row["method"] for row in rows):
        counts, _ = np.histogram([row["lost"] for row in rows if row["method"] == method], edges)
        middles = (edges[:-1] + edges[1:]) / 2
        counted += [
            {"method": method, "lost": round(float(at), 4), "personas": int(count)}
            for at, count in zip(middles, counts, strict=True)
        ]
    return counted


def _order(methods: Collection[str]) -> list[str]:
    """The same order in every chart."""
    return [*(name for name in COLORS if name in methods), *sorted(set(methods) - set(COLORS))]


def _colors(methods: Collection[str]) -> alt.Scale:
    """The same colour for a method in every chart."""
    order = _order(methods)
    others = [name for name in order if name not in COLORS]
    colors = COLORS | {name: FURTHER[number % len(FURTHER)] for number, name in enumerate(others)}
    return alt.Scale(domain=order, range=[colors[name] for name in order])


def _spec(chart: Any) -> Spec:
    return dict(chart.configure_view(strokeWidth=0).to_dict())
