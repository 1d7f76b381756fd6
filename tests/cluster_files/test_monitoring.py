"""Alert rules and dashboard: valid for Prometheus, and about nothing that the code does not export."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "cluster" / "monitoring"
NAME = re.compile(r"\b(?:ray_)?persona_pruner_\w+")


def rules():
    (group,) = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return group["rules"]


def expressions():
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    return [rule["expr"] for rule in rules()] + [target["expr"] for panel in panels for target in panel["targets"]]


@pytest.fixture
def exported(monkeypatch):
    """Names at the metrics endpoints, of the jobs as Ray shows them."""
    import ray.util.metrics

    from persona_pruner.run.telemetry import Metrics

    names = set()

    class Recorder(ray.util.metrics.Gauge):
        def __init__(self, name, *arguments, **options):
            names.add(f"ray_{name}")
            super().__init__(name, *arguments, **options)

    monkeypatch.setattr(ray.util.metrics, "Gauge", Recorder)
    Metrics()
    return names


def test_alerts_and_dashboard_name_metrics_that_the_code_exports(exported):
    named = {name for expression in expressions() for name in NAME.findall(expression)}
    assert {name for name in named if name.startswith("ray_")} == exported


def test_alerts_for_the_operator_are_the_same():
    plain = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    assert yaml.safe_load((MONITORING / "prometheusrule.yaml").read_text())["spec"] == plain


def test_every_alert_leads_to_a_section_of_the_runbook():
    headings = re.findall(r"^#+ (.+)$", (ROOT / "cluster" / "README.md").read_text(), re.M)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for rule in rules():
        file, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert (ROOT / file).is_file()
        assert anchor in anchors, rule["alert"]


def test_every_alert_has_a_test_in_which_it_fires():
    tests = yaml.safe_load((MONITORING / "alerts_test.yaml").read_text())["tests"]
    fired = {t["alertname"] for test in tests for t in test["alert_rule_test"] if t.get("exp_alerts")}
    assert fired == {rule["alert"] for rule in rules()}


def test_promtool_takes_the_configuration_and_the_rules_do_what_their_tests_say(promtool):
    for words in (["check", "config", "prometheus.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run([promtool, *words], cwd=MONITORING, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_dashboard_has_no_two_panels_in_one_place():
    panels = json.loads((MONITORING / "dashboard.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
