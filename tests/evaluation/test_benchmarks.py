"""lm-eval on a masked backbone, offline on a task of this project's own: the same as on the exported checkpoint."""

import json

import pytest

pytest.importorskip("lm_eval", reason="the extra `lm-eval` is not installed")
from evaluated_run import make_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from persona_pruner.backbone.export import export_pruned
from persona_pruner.config.evaluation import BenchmarksConfig
from persona_pruner.errors import ConfigError
from persona_pruner.evaluation import benchmarks
from persona_pruner.evaluation.benchmarks import benchmark, rivals_of, run_tasks
from persona_pruner.masks.format import Mask
from persona_pruner.storage import keys

pytestmark = pytest.mark.slow
TASK = """task: letters
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}} Answer:"
doc_to_choice: [A, B, C, D]
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.fixture
def settings(tmp_path):
    questions = [{"question": f"Which letter has number {n}?", "answer": n % 4} for n in range(40)]
    (tmp_path / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "letters.yaml").write_text(TASK % (tmp_path / "letters.jsonl"))
    return BenchmarksConfig(tasks=("letters",), include_path=str(tmp_path / "tasks"), batch_size=4)


def test_a_masked_backbone_and_its_exported_checkpoint_have_the_same_accuracy(tmp_path, settings, monkeypatch):
    backbone, config, storage = make_run(tmp_path)
    rows = benchmark(backbone, storage, settings, ["ann", "bo"])
    assert [row[:4] for row in rows] == [["letters", "acc", arm, 40] for arm in ("unpruned", "ann", "bo")]
    for *_, value, error in rows:
        assert error == pytest.approx((value * (1 - value) / 39) ** 0.5, abs=1e-3)
    mask = Mask.from_bytes(storage.get(keys.mask("ann")), "ann")
    export_pruned(mask, config.backbone, tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="float32").eval()
    (row,) = run_tasks(exported, AutoTokenizer.from_pretrained(tmp_path / "exported"), settings)
    assert row["value"] == rows[1][4]
    monkeypatch.setattr(benchmarks, "run_tasks", None)
    assert benchmark(backbone, storage, settings, ["ann", "bo"]) == rows


def test_rivals_are_run_as_wide_as_the_own_mask(tmp_path, settings):
    backbone, config, storage = make_run(tmp_path)
    storage.put(keys.POOLED_MASK, storage.get(keys.mask("cy")))
    rivals = rivals_of(backbone, config, storage, "ann")
    assert [(arm.name, int(arm.keep_LI.sum())) for arm in rivals] == [
        ("global", 120),
        ("flap", 120),
        ("magnitude", 120),
    ]
    rows = benchmark(backbone, storage, settings, ["ann", "cy"], rivals)
    values = {row[2]: row[4] for row in rows}
    assert list(values) == ["unpruned", "ann", "cy", "global", "flap", "magnitude"]
    assert values["global"] == values["cy"]


def test_a_further_task_is_run_alone_and_those_of_before_stay(tmp_path, settings, monkeypatch):
    backbone, _, storage = make_run(tmp_path)
    before = benchmark(backbone, storage, settings, ["ann"])
    text = (tmp_path / "tasks" / "letters.yaml").read_text().replace("task: letters", "task: signs")
    (tmp_path / "tasks" / "signs.yaml").write_text(text)
    benchmarks._task_manager.cache_clear()
    run, ran = benchmarks.run_tasks, []

    def noted(model, tokenizer, alone):
        ran.append(alone.tasks)
        return run(model, tokenizer, alone)

    monkeypatch.setattr(benchmarks, "run_tasks", noted)
    both = benchmark(backbone, storage, settings.model_copy(update={"tasks": ("letters", "signs")}), ["ann"])
    assert ran == [("signs",), ("signs",)]
    assert both == [*before, *(["signs", *row[1:]] for row in before)]
    shorter = settings.model_copy(update={"tasks": ("signs",), "limit": 20})
    assert [row[3] for row in benchmark(backbone, storage, shorter, ["ann"])] == [40, 40, 20, 20]


def test_a_task_that_is_none_is_told(tmp_path, settings):
    backbone, _, storage = make_run(tmp_path)
    with pytest.raises(ConfigError, match="'leters' is no task of lm-eval"):
        benchmark(backbone, storage, settings.model_copy(update={"tasks": ("leters",)}), [])
