from evaluated_run import make_run
from test_answers import task

from persona_pruner.evaluation import asking
from persona_pruner.evaluation.asking import answer_task, missing
from persona_pruner.evaluation.baselines import Baselines
from persona_pruner.storage import keys


def test_only_what_is_missing_is_asked(tmp_path, monkeypatch):
    backbone, config, storage = make_run(tmp_path)
    asked = []
    monkeypatch.setattr(asking, "KINDS", {"answers": lambda subject: asked.append(subject.persona.id) or []})
    assert missing(storage, task()) == ["answers"]
    for _ in range(2):
        answer_task(Baselines(backbone, config), storage, task())
    assert asked == ["ann"]
    assert storage.exists(keys.evaluation_rows("answers", "ann", "d1"))
