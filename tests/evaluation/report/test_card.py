import pytest
from huggingface_hub import ModelCard

pytest.importorskip("scipy", reason="the extra `report` is not installed")
from persona_pruner.evaluation.report.card import model_card
from persona_pruner.evaluation.report.data import PersonaFigures, ReportData

COLUMNS = ["task", "metric", "arm", "questions", "value", "standard error"]


def data_of(personas, tables=None, errors=()):
    run = {"run_id": "r1", "backbone": {"name": "tiny-llama", "fingerprint": "ab" * 32}}
    return ReportData("url", run, [], personas, {}, [], None, list(errors), tables or {})


def test_metadata_and_text_say_the_figures_of_the_report():
    losses = {"answers": {"unpruned": 1.0, "own": 1.1, "global": 1.4}}
    measures = {"own": {"first": 0.75}, "flap": {"first": 0.5}}
    personas = [PersonaFigures(f"p{n}", "", 0.5, 3000, losses, measures) for n in range(3)]
    rows = [["mmlu", "acc", arm, 200, value, None] for arm, value in (("unpruned", 0.4), ("p1", 0.3))]
    data = data_of(personas, {"benchmarks": {"columns": COLUMNS, "rows": rows}}, errors=[{"persona_id": "p9"}])
    card = ModelCard(model_card(data, to="hf://crew/masks", base_model="org/tiny-llama"))
    assert card.data.base_model == "org/tiny-llama"
    assert card.data.library_name == "persona-pruner"
    values = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert values == {
        ("held-out questions answered in their voice", "cross_entropy"): 1.1,
        ("held-out questions", "first"): 0.75,
        ("mmlu", "acc"): 0.3,
    }
    assert "| held-out questions answered in their voice | 1.000 [1.000, 1.000] | 1.100 [1.100, 1.100] |" in card.text
    assert "| in character: own description ranks first | 0.250 [0.250, 0.250] |" in card.text
    assert "| mmlu | acc | 200 | 0.400 | 0.300 | 1 |" in card.text
    assert 'snapshot_download("crew/masks")' in card.text
    assert "removes 75 %" in card.text
    assert "1 personas of the run have no mask" in card.text


def test_masks_alone_make_a_card_too():
    card = ModelCard(model_card(data_of([PersonaFigures("p0", "", 0.5, 3000)]), to="s3://bucket/masks"))
    assert card.data.eval_results is None
    assert 'MaskStore("s3://bucket/masks")' in card.text
    assert "## Losses" not in card.text
