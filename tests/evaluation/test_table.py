import json

import pytest
from rich.console import Console

from persona_pruner.config.load import check_config
from persona_pruner.dataset import Row
from persona_pruner.errors import ConfigError
from persona_pruner.evaluation import table
from persona_pruner.storage.open import open_storage


def task(persona_id="ada", mask=b"m", answer="Aye."):
    return table.EvaluationTask(
        persona_id=persona_id, description="Ada", texts={"answers": (Row("Why?", answer),)}, masks={"own": mask}
    )


def test_figures_are_kept_until_mask_or_text_changes(tmp_path):
    storage = open_storage(tmp_path)
    losses = {"answers": {"unpruned": 1.0, "own": 1.1}}
    assert table.stored(storage, task()) is None
    table.store(storage, task(), losses)
    assert table.stored(storage, task()) == losses
    assert table.stored(storage, task(mask=b"other")) is None
    assert table.stored(storage, task(answer="No.")) is None


def test_mean_is_over_the_personas_that_have_the_text():
    results = {
        "ada": {"answers": {"unpruned": 1.0, "own": 2.0}, "conversations": {"unpruned": 4.0, "own": 5.0}},
        "bo": {"answers": {"unpruned": 3.0, "own": 4.0}},
    }
    assert table.mean(results, "answers") == {"unpruned": 2.0, "own": 3.0}
    assert table.mean(results, "conversations") == {"unpruned": 4.0, "own": 5.0}


def test_rendered_rows_hold_every_figure_and_the_mean():
    results = {name: {"answers": {"unpruned": value, "own": value + 1}} for name, value in (("ada", 1), ("bo", 2))}
    console = Console(width=100, record=True, file=None)
    with console.capture() as captured:
        for one in table.render(results, 0.5):
            console.print(one)
    text = captured.get()
    for expected in ("ada", "1.000", "2.000", "bo", "3.000", "mean", "1.500", "2.500", "ratio 0.5"):
        assert expected in text


def test_conversations_are_read_by_persona_and_faults_name_the_row(tmp_path):
    file = tmp_path / "talk.jsonl"
    file.write_text(
        "".join(json.dumps({"persona_id": "ada", "question": f"{n}?", "answer": "Aye."}) + "\n" for n in "abc")
    )
    config = check_config({"evaluation": {"conversations": str(file), "max_rows": 2}})
    assert table.read_conversations(config) == {"ada": (Row("a?", "Aye."), Row("b?", "Aye."))}
    file.write_text('{"persona_id": "ada", "question": "a?", "answer": "b"}\n{"persona_id": "ada"}\n')
    with pytest.raises(ConfigError, match=r"talk\.jsonl:2: .*question"):
        table.read_conversations(config)


def test_own_masks_are_paired_with_each_rival_over_the_personas():
    gains = (0.1, 0.3, -0.1)
    results = {f"p{n}": {"answers": {"own": 1.0, "global": 1.0 + gain}} for n, gain in enumerate(gains)}
    results["silent"] = {"conversations": {"own": 1.0, "global": 9.0}}
    mean, error, better, count = table.differences(results, "answers", "global")
    assert (mean, error) == (pytest.approx(0.1), pytest.approx(0.2 / 3**0.5))
    assert (better, count) == (2, 3)
    results["p0"]["answers, persona tokens"] = {"own": 2.0, "global": 2.5}
    text = "\n".join(str(one.caption) for one in table.render(results, 0.5))
    assert "global mask: +0.100 ± 0.115 (better for 2 of 3)" in text
    assert "+0.500 ± nan (better for 1 of 1), persona tokens" in text
