import json

import pytest
from served_run import make_run
from typer.testing import CliRunner

from persona_pruner.cli import app
from persona_pruner.errors import UserError
from persona_pruner.serving.chat import PersonaChat, Sampling
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage

QUESTION = "Who are you and what do you do all day?"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"))
    run.commit(run.mask("cora"), run.mask("felix", version=1))
    return run


def test_the_three_answers_differ_in_the_mask_alone(run):
    partner = PersonaChat(run.output, str(run.backbone), "cora")
    answers = partner.compare(QUESTION, Sampling(max_tokens=12))
    prompt = run.prompt("cora", QUESTION)
    expected = {"unpruned": None, "cora": run.mask("cora"), "felix": run.mask("felix", version=1)}
    assert answers == {name: run.greedy_text(mask, prompt, 12).strip() for name, mask in expected.items()}


def test_compare_prints_for_people_and_for_scripts(run):
    arguments = ["compare", str(run.output), "--backbone", str(run.backbone), "--persona", "cora",
                 "--question", QUESTION,
                 "--max-tokens", "4"]  # fmt: skip
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert list(found[QUESTION]) == ["unpruned", "cora", "felix"]
    assert "felix" in CliRunner().invoke(app, arguments).stdout


def test_compare_answers_under_the_one_mask_for_all_where_asked(run):
    with pytest.raises(UserError, match="no mask for all personas"):
        PersonaChat(run.output, str(run.backbone), "cora", with_global=True)
    pooled = run.mask("pooled", version=2)
    open_storage(run.output).put(keys.POOLED_MASK, pooled.to_bytes())
    arguments = ["compare", str(run.output), "--backbone", str(run.backbone), "--persona", "cora", "--with-global",
                 "--question", QUESTION, "--max-tokens", "12", "--json"]  # fmt: skip
    answers = json.loads(CliRunner().invoke(app, arguments).stdout)[QUESTION]
    assert list(answers) == ["unpruned", "cora", "felix", "global"]
    assert answers["global"] == run.greedy_text(pooled, run.prompt("cora", QUESTION), 12).strip()


def test_chat_remembers_what_was_said(run):
    arguments = ["chat", str(run.output), "--backbone", str(run.backbone), "--persona", "cora", "--max-tokens", "6",
                 "--temperature", "0"]  # fmt: skip
    found = CliRunner().invoke(app, arguments, input=f"{QUESTION}\nWhy?\n\n")
    partner = PersonaChat(run.output, str(run.backbone), "cora")
    conversation = [{"role": "user", "content": QUESTION}]
    first = partner.answer(conversation, "cora", Sampling(6))
    conversation += [{"role": "assistant", "content": first}, {"role": "user", "content": "Why?"}]
    assert [line.partition("cora: ")[2] for line in found.stdout.splitlines() if "cora: " in line] == [
        first, partner.answer(conversation, "cora", Sampling(6)),
    ]  # fmt: skip
