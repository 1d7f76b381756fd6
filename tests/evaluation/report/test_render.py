"""The report as a reader opens it: in a headless Chromium, without a network."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("vl_convert", reason="the extra `report` is not installed")
from persona_pruner.evaluation.report.data import PersonaFigures, ReportData
from persona_pruner.evaluation.report.render import render, write_report
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


def figures(number, description="sails the northern sea"):
    losses = {"answers": {"unpruned": 1.0, "own": 1.1 + number / 100, "global": 1.4, "other": 1.6, "random": 2.0}}
    arms = {"first": 0.5, "rank": 2.0, "words": 12.0, "ended": 1.0, "repetition": 0.0, "own_loss": 1.5}
    measures = {"unpruned": arms | {"first": 0.9}, "own": arms | {"first": 0.8}, "baseline": arms}
    return PersonaFigures(f"persona-{number:04d}", description, 0.5, 3000, losses, measures)


def report_data(personas=6, **changes):
    people = [figures(number) for number in range(personas)]
    people[0] = dataclasses.replace(people[0], id="captain-nemo", description=f"Nemo. {NASTY}")
    text = {"text": f"Aye, {NASTY}", "ended": False, "rank": 1, "of": 6}
    sample = {one.id: [{"question": "Why?", "arms": {"unpruned": text, "own": text}}] for one in people}
    keep = np.random.default_rng(0).random((min(personas, 40), 3, 64)) > 0.5
    error = {"persona_id": "dee", "cause": "few_answers", "attempts": 2, "message": NASTY}
    values = {
        "url": "s3://bucket/run", "run": {"run_id": "r1", "backbone": {"name": "tiny", "fingerprint": "f" * 64}},
        "status": {"state": "done", "since": "2026-01-01", "phases": [
            {"name": "training", "done": 6, "total": 6, "unit": "personas", "seconds": 9.0, "tokens": 5,
             "tokens_per_second": 0.5},
        ]},
        "personas": people, "answers": sample, "sample": [one.id for one in people[: len(keep)]],
        "keep_PLI": keep, "errors": [error],
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
    assert NASTY in page.locator("article").inner_text()
    page.get_by_label("Find a persona").fill("nobody of this name")
    assert page.locator("#found").inner_text() == "0 of 6 personas"
    page.locator("[data-persona=persona-0003]").click()
    assert page.locator("article h3").first.inner_text() == "persona-0003"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("[data-chart] svg").count() == 5
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


def test_nothing_but_masks_makes_a_report_too():
    people = [PersonaFigures(f"p{n}", "", 0.5, 3000) for n in range(2)]
    nothing = {"answers": {}, "sample": [], "errors": [], "run": {}, "status": {}}
    data = report_data(**nothing, keep_PLI=np.zeros((0, 0, 0), bool))
    text = render(dataclasses.replace(data, personas=people))
    assert "No comparison is stored" in text
    assert json.loads(text.split('id="specs">')[1].split("</script>")[0]) == {}


def test_a_report_lies_below_its_output(tmp_path):
    from mask_examples import mask

    storage = open_storage(tmp_path)
    for seed, persona_id in enumerate(("ada", "bo")):
        storage.put(keys.mask(persona_id), mask(persona_id, seed=seed).to_bytes())
    assert write_report(storage) == "report.html"
    assert "2 masks compared" in (tmp_path / "report.html").read_text()
