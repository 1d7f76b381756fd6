import pytest
from tiny_models import tiny_config

from persona_pruner.config.load import check_config
from persona_pruner.run.advice import advice, command, next_steps

CROSS_ENTROPY = {"learning": {"objective": {"cross_entropy": 1, "distillation": 0}}}


def config(**rewrite):
    return check_config({"synthesis": {"rewrite": {"max_new_tokens": 64, **rewrite}}} | CROSS_ENTROPY)


@pytest.mark.parametrize(
    ("counts", "said"),
    [("cut_off 14, ok 2", "14 of 16 answers were cut off at 64 tokens: raise synthesis.rewrite.max_new_tokens"),
     ("echo 9, ok 1, refusal 2", "9 of 12 answers were dropped (echo): raise synthesis.filter.echo_overlap"),
     ("not_selected 8, ok 3", "only 3 answers: raise synthesis.select.k"),
     ("none selected", "only 0 answers: raise synthesis.select.k")],
)  # fmt: skip
def test_few_answers_are_explained_by_what_most_were_dropped_for(counts, said):
    message = f"2 usable answers, synthesis.filter.min_answers is 8 ({counts})"
    (line,) = advice(config(), [{"cause": "few_answers", "message": message}])
    assert line.startswith(f"1 persona: {said}")


def test_personas_with_one_cause_share_a_line():
    errors = [{"cause": "row_too_long", "message": "a"}] * 2 + [{"cause": "killed", "message": "b"}]
    assert advice(config(), errors) == [
        "2 personas: raise learning.max_row_tokens, or ask for shorter answers (synthesis.rewrite.max_new_tokens)"
    ]


def test_next_steps_are_about_a_persona_that_has_a_mask(monkeypatch, tmp_path):
    steps = next_steps(tiny_config("my model"), "s3://bucket/run", ["bo", "cy"])
    assert [step.split()[1] for step in steps] == ["status", "inspect", "export"]
    assert all("bo" in step for step in steps[1:])
    assert "--backbone 'my model'" in steps[2]
    assert [step.split()[1] for step in next_steps(tiny_config(), "out", [])] == ["status"]


def test_the_command_runs_as_it_stands(monkeypatch, tmp_path):
    environment = tmp_path / ".venv"
    (environment / "bin").mkdir(parents=True)
    (environment / "bin" / "persona-pruner").touch()
    monkeypatch.setattr("sys.prefix", str(environment))
    monkeypatch.setattr("sys.executable", str(environment / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    assert command() == ".venv/bin/persona-pruner"
    monkeypatch.chdir(tmp_path / ".venv" / "bin")
    assert command() == "persona-pruner"
