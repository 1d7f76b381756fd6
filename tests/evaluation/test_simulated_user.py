"""A user at an endpoint: what it said is stored, and a conversation that goes on does not pay for it again."""

import pytest
from evaluated_run import DIALOGUES, make_run
from judge_server import judge_server
from test_answers import rows_of, task

from persona_pruner.endpoint import Costs
from persona_pruner.errors import PersonaError
from persona_pruner.evaluation.asking import answer_task
from persona_pruner.evaluation.baselines import Baselines
from persona_pruner.evaluation.simulated_user import SimulatedUser, user_costs
from persona_pruner.evaluation.subject import read_subject
from persona_pruner.storage import keys


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with judge_server() as server:
        backbone, config, storage = make_run(tmp_path)
        settings = type(config.evaluation.dialogues)(**DIALOGUES, user={"model": "m", "base_url": f"{server.url}/v1"})
        evaluation = config.evaluation.model_copy(update={"dialogues": settings})
        yield Baselines(backbone, config.model_copy(update={"evaluation": evaluation})), storage, server


def talk():
    one = task()
    one.digests["dialogues"] = one.digests.pop("answers")
    return one


def test_what_was_said_is_not_paid_for_again(run):
    baselines, storage, server = run
    answer_task(baselines, storage, talk())
    rows = rows_of(storage, "dialogues")
    assert {row["question"] for row in rows if row["turn"] > 1} == {"85"}
    asked = len(server.asked)
    assert asked == len(set(server.asked)) > 2
    assert all(text.startswith("You: Why?\nThe other:") and text.endswith("And now?") for text in server.asked)
    assert user_costs(storage) == Costs(asked, 10 * asked, asked)
    storage.delete(keys.evaluation_rows("dialogues", "ann", "d1"))
    answer_task(baselines, storage, talk())
    assert rows_of(storage, "dialogues") == rows
    assert len(server.asked) == asked


def test_a_user_who_cannot_speak_fails_the_persona_and_what_was_paid_is_kept(run):
    baselines, storage, server = run
    user = SimulatedUser(read_subject(baselines, storage, talk()))
    assert user.say([(0, (("Why?", "So."),))]) == ["85"]
    server.nonsense = 99
    with pytest.raises(PersonaError, match=r"evaluation\.dialogues\.user: .* no chat completion") as caught:
        user.say([(0, (("Why?", "So."),)), (1, (("Who?", "I."),))])
    assert caught.value.cause == "simulated_user"
    server.nonsense = 0
    assert user.say([(0, (("Why?", "So."),))]) == ["85"]
    assert user_costs(storage).requests == 4


def test_without_a_key_it_says_so(run, monkeypatch):
    baselines, storage, _ = run
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(PersonaError, match="OPENAI_API_KEY is not set"):
        SimulatedUser(read_subject(baselines, storage, talk())).say([(0, (("Why?", "So."),))])
