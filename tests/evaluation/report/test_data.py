import json

import pyarrow as pa
import pytest
from mask_examples import mask, weight_mask

from persona_pruner.errors import UserError
from persona_pruner.evaluation.answers import store_rows
from persona_pruner.evaluation.report import data
from persona_pruner.evaluation.report.data import read_both, read_report_data
from persona_pruner.evaluation.summary import COLUMNS, store_summary
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


def answered(storage, persona_id, text="Aye."):
    rows = [
        {"persona_id": persona_id, "arm": arm, "question": question, "text": f"{text} {arm}", "ended": True, "rank": 1,
         "candidates": 3, "words": 2, "repetition": 0.0, "own_loss": 1.0, "similarity": 1.0}
        for arm in ("unpruned", "own") for question in ("Why?", "Who?")
    ]  # fmt: skip
    store_rows(storage, "answers", persona_id, "d", rows)


def compared(storage, persona_id, own):
    losses = {"answers": {"unpruned": 1.0, "own": own, "global": 1.9}}
    storage.put(keys.evaluation(persona_id), json.dumps({"persona_id": persona_id, "losses": losses}).encode())


@pytest.fixture
def output(tmp_path):
    storage = open_storage(tmp_path)
    for seed, persona_id in enumerate(("ada", "bo", "cy")):
        storage.put(keys.mask(persona_id), mask(persona_id, seed=seed).to_bytes())
    compared(storage, "ada", 1.2)
    compared(storage, "bo", 1.7)
    answered(storage, "bo")
    store_summary(storage, pa.Table.from_pylist([{"persona_id": "bo", "rank": 1.0}], COLUMNS))
    error = {"persona_id": "dee", "cause": "few_answers", "message": "only 2", "attempts": 1}
    storage.put(keys.error("dee"), json.dumps(error).encode())
    return storage


def test_everything_is_found_and_who_lost_most_comes_first(output):
    found = read_report_data(output)
    assert [one.id for one in found.personas] == ["bo", "ada", "cy"]
    bo = found.personas[0]
    assert bo.loss == pytest.approx(0.7)
    assert bo.kept == 0.4
    assert bo.measures["own"]["first"] == 1
    assert bo.columns["rank"] == 1.0
    assert found.answers == {
        "bo": [
            {"question": question, "arms": {
                arm: {"text": f"Aye. {arm}", "ended": True, "rank": 1, "of": 3} for arm in ("unpruned", "own")
            }}
            for question in ("Why?", "Who?")
        ]
    }  # fmt: skip
    assert found.sample == ["ada", "bo", "cy"]
    assert found.shared.both_GPP.shape == (3, 3, 3)
    assert [error["persona_id"] for error in found.errors] == ["dee"]
    assert found.run == {}
    assert found.statuses == []
    assert found.software == {"torch": "2"}
    assert bo.training == {"method": "ste", "ratio": 0.6, "steps": 5, "masked": 1.25}


def test_tables_statuses_of_parts_and_tunings_are_found(output):
    output.put(f"{keys.EVALUATION_TABLES}turns.json", b'{"columns": ["turn"], "rows": [[1]]}')
    for part in ("", "part-1-of-2"):
        output.put(keys.status(part), json.dumps({"part": part}).encode())
    output.put(keys.recovered("ada"), b'{"loss_before": 2.0, "loss_after": 1.5}')
    found = read_report_data(output)
    assert found.tables == {"turns": {"columns": ["turn"], "rows": [[1]]}}
    assert sorted(status["part"] for status in found.statuses) == ["", "part-1-of-2"]
    ada = {one.id: one for one in found.personas}["ada"]
    assert (ada.training["tuned_before"], ada.training["tuned_after"]) == (2.0, 1.5)


def test_what_rewriters_were_paid_is_among_the_costs(output):
    output.put(keys.EVALUATION_COSTS, b'{"columns": ["endpoint"], "rows": [["judge", 1, 2, 3]]}')
    for process, costs in (("a", [3, 30, 6]), ("b", [2, 20, 4])):
        paid = {"model": "big", "costs": costs}
        output.put(f"{keys.REWRITER_COSTS}{process}.json", json.dumps(paid).encode())
    assert read_report_data(output).tables["costs"]["rows"] == [["judge", 1, 2, 3], ["big (rewriter)", 5, 50, 10]]


def test_a_long_curve_is_thinned_and_ends_with_its_last_step(output):
    losses = [1 / step for step in range(1, 101)]
    output.put(keys.curve("ada"), json.dumps({"training": losses, "heldout": [[50, 1.5], [100, 1.25]]}).encode())
    curves = {one.id: one.curve for one in read_report_data(output).personas}
    steps = [step for step, _ in curves["ada"]["training"]]
    assert steps == list(range(4, 101, 4))
    assert curves["ada"]["training"][-1] == (100, 0.01)
    assert curves["ada"]["heldout"] == [[50, 1.5], [100, 1.25]]
    assert curves["bo"] == {}


def test_a_mask_that_does_not_verify_is_left_out(output):
    output.put(keys.mask("ada"), output.get(keys.mask("ada"))[:-1] + b"?")
    assert [one.id for one in read_report_data(output).personas] == ["bo", "cy"]


def test_masks_of_single_weights_are_read_and_compared_among_themselves(output):
    output.delete(keys.mask("cy"))
    for seed, persona_id in enumerate(("dot", "eve", "flo")):
        output.put(keys.mask(persona_id), weight_mask(persona_id, seed=seed).to_bytes())
    found = read_report_data(output)
    assert {one.id: one.kept for one in found.personas}["dot"] == pytest.approx((6 * 8 + 30 * 3 + 8 * 12) / 600)
    assert found.sample == ["dot", "eve", "flo"]
    assert {kind for _, kind in found.shared.groups} == {"attention", "FFN"}


def test_two_runs_are_compared_over_the_personas_that_both_have(output, tmp_path):
    other = open_storage(tmp_path / "other")
    for seed, persona_id in enumerate(("bo", "cy", "gus"), 10):
        other.put(keys.mask(persona_id), mask(persona_id, seed=seed).to_bytes())
    assert read_both(output, other, ["ada", "bo", "cy"]).both_GPP.shape == (3, 4, 4)
    other.put(keys.mask("cy"), mask("cy", layers=2).to_bytes())
    with pytest.raises(UserError, match=r"has no masks of two personas of .* in the same shape"):
        read_both(output, other, ["ada", "bo", "cy"])


def test_an_output_whose_masks_do_not_verify_is_told(tmp_path):
    storage = open_storage(tmp_path)
    storage.put(keys.mask("ada"), b"no mask")
    with pytest.raises(UserError, match="none of its 1 masks verifies"):
        read_report_data(storage)


def test_sample_answers_stop_at_their_size(output, monkeypatch):
    answered(output, "ada", text="So " * 100)
    monkeypatch.setattr(data, "ANSWER_BYTES", 900)
    assert list(read_report_data(output).answers) == ["bo"]


def test_an_output_without_masks_is_told(tmp_path):
    with pytest.raises(UserError, match="no mask to report on"):
        read_report_data(open_storage(tmp_path))
