"""The report as a reader opens it: in a headless Chromium, without a network."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from mask_examples import mask

pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
from persona_pruner.evaluation.overlap import SharedCounts
from persona_pruner.evaluation.report.data import PersonaFigures, ReportData
from persona_pruner.evaluation.report.efficiency import BackboneCosts
from persona_pruner.evaluation.report.render import Aside, ReportOptions, render, write_report
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TABLES = {
    "benchmarks": {
        "columns": ["task", "metric", "arm", "questions", "value", "standard error"],
        "rows": [["mmlu", "acc", arm, 200, value, 0.03] for arm, value in
                 (("unpruned", 0.4), ("persona-0001", 0.3), ("persona-0002", 0.35), ("flap", 0.25))],
    },
    "turns": {
        "columns": ["turn", "arm", "personas", "first", "rank", "judge_consistency"],
        "rows": [[turn, arm, 6, 0.9 - turn / 50, 1.5, None] for turn in range(1, 11) for arm in ("unpruned", "own")],
    },
    "abilities": {
        "columns": ["ability", "arm", "personas", "passed"],
        "rows": [["json", "unpruned", 6, 1.0], ["json", "own", 6, 0.75], ["injection", "own", 6, 0.5]],
    },
    "costs": {
        "columns": ["endpoint", "requests", "prompt tokens", "completion tokens"],
        "rows": [["big", 96, 12345, 96]],
    },
    "of_ones_own": {"columns": ["thing", "value"], "rows": [["spoons", 3]]},
}  # fmt: skip
NASTY = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def figures(number, description="sails the northern sea"):
    losses = {"answers": {"unpruned": 1.0, "own": 1.1 + number / 100, "global": 1.4, "other": 1.6, "random": 2.0}}
    arms = {"first": 0.5, "rank": 2.0, "words": 12.0, "ended": 1.0, "repetition": 0.0, "own_loss": 1.5}
    measures = {"unpruned": arms | {"first": 0.9}, "own": arms | {"first": 0.8}, "baseline": arms}
    training = {"method": "ste", "ratio": 0.5, "steps": 60, "unpruned": 1.0, "masked": 1.1 + number / 100}
    return PersonaFigures(
        f"persona-{number:04d}",
        description,
        0.5,
        3000,
        losses,
        measures,
        training=training | {"tuned_before": 1.2, "tuned_after": 1.05},
        curve={"training": [(step, 1 / step) for step in range(2, 61, 2)], "heldout": [[50, 1.2], [60, 1.1]]},
    )


def report_data(personas=6, **changes):
    people = [figures(number) for number in range(personas)]
    people[0] = dataclasses.replace(people[0], id="captain-nemo", description=f"Nemo. {NASTY}")
    text = {"text": f"Aye, {NASTY}", "ended": False, "rank": 1, "of": 6}
    sample = {one.id: [{"question": "Why?", "arms": {"unpruned": text, "own": text}}] for one in people}
    bits = np.random.default_rng(0).random((3, min(personas, 40), 64)) > 0.5
    both = np.einsum("gpi,gqi->gpq", bits.astype(float), bits.astype(float))
    shared = SharedCounts([(layer, "FFN") for layer in range(3)], np.full(3, 64), both, 20)
    error = {"persona_id": "dee", "cause": "few_answers", "attempts": 2, "message": NASTY}
    values = {
        "url": "s3://bucket/run", "run": {"run_id": "r1", "backbone": {"name": "tiny", "fingerprint": "f" * 64}},
        "statuses": [{"state": "done", "host": "node-7", "since": "2026-01-01", "part": "", "phases": [
            {"name": "training", "done": 6, "total": 6, "unit": "personas", "seconds": 9.0, "tokens": 5000,
             "tokens_per_second": 555.5},
        ]}],
        "personas": people, "answers": sample, "sample": [one.id for one in people[:40]],
        "shared": shared, "errors": [error], "tables": TABLES, "software": {"torch": "2.13.0"},
    }  # fmt: skip
    return ReportData(**(values | changes))


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        try:
            opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"{CHROMIUM} does not start: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


def visit(browser, file, width=1400, **options):
    """The page once its charts are drawn, with what it said and asked for."""
    page = browser.new_context(viewport={"width": width, "height": 900}, **options).new_page()
    page.set_default_timeout(180_000)
    seen = SimpleNamespace(page=page, messages=[], requests=[])
    page.on("console", lambda message: seen.messages.append(message.text))
    page.on("pageerror", lambda error: seen.messages.append(str(error)))
    page.on("request", lambda request: seen.requests.append(request.url))
    page.goto(file.as_uri())
    for chart in page.query_selector_all("[data-chart]"):
        chart.wait_for_selector("svg", state="attached")
    return seen


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), pytest.param(400, "dark", marks=pytest.mark.slow)])
def test_a_persona_is_found_by_typing_and_nothing_is_asked_of_any_host(browser, tmp_path, width, scheme):
    file = tmp_path / "report.html"
    file.write_text(render(report_data()))
    seen = visit(browser, file, width, color_scheme=scheme)
    page = seen.page
    page.get_by_label("Find a persona").press_sequentially("nemo")
    assert page.locator("article").count() == 1
    assert "captain-nemo" in page.locator("article").inner_text()
    assert "60 steps · keeps 50.0 %" in page.locator("article").inner_text()
    assert NASTY in page.locator("article").inner_text()
    page.get_by_label("Find a persona").fill("nobody of this name")
    assert page.locator("#found").inner_text() == "0 of 6 personas"
    page.locator("#personas [data-persona=persona-0003]").click()
    assert page.locator("article h3").first.inner_text() == "persona-0003"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("[data-chart] svg").count() == 6
    page.locator("article .chart svg").wait_for()
    assert page.locator("article .chart svg").bounding_box()["width"] > 250
    assert page.title() == "Persona masks: s3://bucket/run"
    assert seen.messages == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [file.as_uri()]


@pytest.mark.slow
def test_tables_are_sorted_by_a_click(browser, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(render(report_data()))
    page = visit(browser, file).page
    worst = page.locator("table", has_text="above unpruned")
    figures = worst.locator("td.number")
    worst.locator("th", has_text="above unpruned").click()
    assert figures.all_inner_texts() == sorted(figures.all_inner_texts(), key=float)
    worst.locator("th", has_text="above unpruned").click()
    assert figures.all_inner_texts() == sorted(figures.all_inner_texts(), key=float, reverse=True)


@pytest.mark.slow
def test_5000_personas_stay_below_20_mb_and_can_be_searched(browser, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(render(report_data(personas=5000)))
    assert file.stat().st_size < 20e6
    page = visit(browser, file).page
    page.get_by_label("Find a persona").fill("persona-4321")
    assert page.locator("article").count() == 1
    assert page.locator("#found").inner_text() == "1 of 5000 personas"


def test_the_headline_says_what_the_strongest_baseline_lost_and_the_own_mask_did_not():
    text = render(report_data())
    # Own loses 0.125 on average, the global mask 0.4.
    assert "<b>69 %</b>" in text
    assert "“global”, the strongest baseline" in text


def test_a_page_without_a_headline_says_why():
    arms = {arm: {"first": 0.5} for arm in ("unpruned", "own", "flap")}
    people = [PersonaFigures(f"p{n}", "", 0.5, 3000, {}, arms) for n in range(2)]
    text = render(dataclasses.replace(report_data(), personas=people, sample=[], shared=None))
    assert "No headline: no baseline was measured, or it is not certain" in text
    assert "No comparison is stored" not in text


def words(html):
    """Of what a reader sees."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html.split("<main>")[1].split("</main>")[0]))


def test_everything_that_is_stored_has_its_place():
    text = words(render(report_data(), Aside(costs=BackboneCosts(3_000_000_000, 6_200_000_000, 1000, 9e5, 1.8e6))))
    # Before and after: two masks on one task, who is worst, and a baseline.
    assert re.search(r"mmlu acc 200 0.400 ± 0.030 0.325 \[.*?\] -0.075 2 persona-0001 0.250", text)
    assert "tasks unpruned own JSON that its schema takes 1 0.750 injections resisted 0.500 " in text
    assert "In character: own description ranks first" in text
    # 0.8 against 0.9 unpruned and 0.5.
    assert "Own mask minus each arm" in text
    assert "in character: own description ranks first -0.10 [-0.10, -0.10] 0.30 [0.30, 0.30]" in text
    assert "parameters 3.00 G 2.55 G 85.0 %" in text
    assert "FLOPs per token 6.20 G 5.30 G 85.5 %" in text
    assert "big 96 12,345 96" in text
    assert "Of ones own thing value spoons 3" in text
    assert "by cause: 1 few_answers" in text
    assert "Done on node-7, began 2026-01-01" in text
    assert "training 6 personas 9 5,000 556" in text
    assert "torch 2.13.0" in text


def test_nothing_but_masks_makes_a_report_too():
    people = [PersonaFigures(f"p{n}", "", 0.5, 3000) for n in range(2)]
    nothing = {"answers": {}, "sample": [], "errors": [], "run": {}, "statuses": []}
    data = report_data(**nothing, shared=None, tables={}, software={})
    text = render(dataclasses.replace(data, personas=people))
    assert "No comparison is stored" in text
    assert json.loads(text.split('id="specs">')[1].split("</script>")[0]) == {}


def masked(directory, first_seed=0):
    storage = open_storage(directory)
    for seed, persona_id in enumerate(("ada", "bo", "cy", "dee"), first_seed):
        storage.put(keys.mask(persona_id), mask(persona_id, seed=seed).to_bytes())
    return storage


def test_a_report_lies_below_its_output(tmp_path):
    assert write_report(masked(tmp_path)) == "report.html"
    text = (tmp_path / "report.html").read_text()
    assert "4 masks compared" in text
    assert "Jaccard distance of two masks in a layer, mean over pairs and layers: FFN 0.7" in text
    assert "Across seeds" not in text


def test_a_second_seed_says_how_far_overlaps_are_the_personas_doing(tmp_path):
    storage = masked(tmp_path / "one")
    write_report(storage, ReportOptions(seeds=masked(tmp_path / "two", first_seed=4)))
    text = (tmp_path / "one/report.html").read_text()
    assert "Across seeds (4 personas): the overlaps of pairs in one run and in the other correlate with r = " in text
    write_report(storage, ReportOptions(seeds=storage))
    assert "r = 1.00; two masks of one persona share 1.000" in (tmp_path / "one/report.html").read_text()
