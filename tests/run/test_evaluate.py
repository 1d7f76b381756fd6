"""What an evaluation decides by itself; the cluster's part is a pool that asks in this process."""

import io
import json

import pytest
from evaluated_run import PERSONAS, make_run, put
from rich.console import Console

from persona_pruner.errors import MaskError, UserError
from persona_pruner.evaluation.asking import answer_task
from persona_pruner.evaluation.baselines import Baselines
from persona_pruner.masks.store import MaskStore
from persona_pruner.run import evaluate
from persona_pruner.run.evaluate import Evaluation, EvaluationRequest
from persona_pruner.run.progress import ProgressReporter
from persona_pruner.storage import keys

ANSWERS = keys.evaluation_rows("answers")


class Pool:
    """Asks in this process; stops after `limit` personas."""

    def __init__(self, backbone, config, storage, limit=99):
        self.backbone, self.config, self.storage, self.limit, self.asked = backbone, config, storage, limit, []

    def map(self, method, payloads, should_stop):
        assert method == "answer"
        for task in payloads[: self.limit]:
            self.asked.append(task.persona_id)
            answer_task(Baselines(self.backbone, self.config), self.storage, task)
            yield task, None

    def close(self):
        pass


@pytest.fixture
def run(tmp_path, monkeypatch):
    backbone, config, storage = make_run(tmp_path)
    storage.put(keys.POOLED_MASK, storage.get(keys.mask("cy")))

    def start(limit=99, config=config, **request):
        pool = Pool(backbone, config, storage, limit)
        monkeypatch.setattr(evaluate, "training_pool", lambda *_: pool)
        progress = ProgressReporter(Console(file=io.StringIO(), width=200))
        one = Evaluation(EvaluationRequest(config=config, output=storage.url, **request), storage, progress, None)
        return one, pool

    start.backbone, start.config, start.storage = backbone, config, storage
    return start


def test_a_stopped_evaluation_goes_on_and_ends_with_the_same_bytes_as_one_in_one_piece(run):
    first, pool = run(limit=1)
    assert not first.work()
    second, again = run()
    assert second.work()
    assert (pool.asked, again.asked) == (["ann"], ["bo", "cy"])
    in_two = {item.key: run.storage.get(item.key) for item in run.storage.list(ANSWERS)}
    for key in in_two:
        run.storage.delete(key)
    assert run()[0].work()
    assert {item.key: run.storage.get(item.key) for item in run.storage.list(ANSWERS)} == in_two
    assert second.report() == 0
    assert "3 of 3 personas evaluated" in second.progress.console.file.getvalue()
    assert MaskStore(run.storage.url).where(["rank>=1", "ended>=0"]) == list(PERSONAS)


def test_what_was_asked_is_asked_again_only_where_something_that_decides_it_has_changed(run):
    assert run()[0].work()
    assert run()[0].open_tasks() == []
    put(run.storage, run.backbone, "bo", seed=7)
    changed = {task.persona_id for task in run()[0].open_tasks()}
    others = {task.persona_id for task in run()[0].tasks() if task.other_id == "bo"}
    assert changed == {"bo"} | others
    answers = run.config.evaluation.answers.model_copy(update={"max_new_tokens": 7})
    evaluation = run.config.evaluation.model_copy(update={"answers": answers})
    assert len(run(config=run.config.model_copy(update={"evaluation": evaluation}))[0].open_tasks()) == 3


def test_conversations_and_tasks_get_tables_and_columns(run):
    talks = run.config.evaluation.dialogues.model_copy(update={"enabled": True})
    config = run.config.model_copy(
        update={
            "evaluation": run.config.evaluation.model_copy(update={"dialogues": talks, "passes": ("injection>=0",)})
        }
    )
    one, _ = run(config=config, personas=("ann",))
    assert one.work()
    assert one.report() == 0
    said = one.progress.console.file.getvalue()
    assert "Tasks passed" in said
    assert "own description ranks first, by turn" in said
    turns, tried = (json.loads(run.storage.get(key)) for key in (keys.EVALUATION_TURNS, keys.EVALUATION_ABILITIES))
    assert {row[0] for row in turns["rows"]} == {1, 2, 3}
    assert {row[0] for row in tried["rows"]} == {"json", "injection", "injection_first"}
    store = MaskStore(run.storage.url)
    assert store.where(["dialogue_first>=0", "json>=0", "passes==1"]) == ["ann"]
    assert run(config=config, personas=("ann",))[0].open_tasks() == []


def test_a_sample_is_drawn_by_ids_and_compares_with_everybody(run):
    one, _ = run(sample=2)
    assert len(one.personas) == 2
    assert one.personas == run(sample=2)[0].personas
    named, _ = run(personas=("cy",))
    (task,) = named.tasks()
    assert task.other_id != "cy"
    assert sorted(task.candidates) == ["ann", "bo"]


def test_what_cannot_be_evaluated_is_told_before_anything_starts(run):
    with pytest.raises(UserError, match="--persona dee"):
        run(personas=("dee",))
    run.backbone.fingerprint = "0" * 64
    put(run.storage, run.backbone, "bo", seed=1)
    with pytest.raises(MaskError, match="mask of bo was made for a backbone with fingerprint 0000"):
        run()
