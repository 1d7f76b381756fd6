"""What `plan` and the job check alike before anything is started."""

import json

import pytest
from tiny_models import save_tiny, tiny_config

from persona_pruner.config.load import check_config
from persona_pruner.config.schema import EvaluationConfig
from persona_pruner.errors import ConfigError, SourceError
from persona_pruner.manifest import Manifest, Persona
from persona_pruner.run.part import Part
from persona_pruner.run.start import JobRequest, check_and_plan
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("backbone") / "tiny")


def manifest(count):
    return Manifest("m", tuple(Persona(f"p{n}", f"number {n}") for n in range(count)))


def with_questions(backbone, tmp_path):
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"instruction": f"{n}?", "output": "Yes."}) + "\n" for n in range(3)))
    return check_config({"backbone": {"path": str(backbone)}, "synthesis": {"sources": [{"path": str(file)}]}})


def test_a_part_is_about_its_own_personas_and_leaves_the_comparison_to_a_whole_job(backbone):
    config = tiny_config(backbone).model_copy(update={"evaluation": EvaluationConfig(enabled=True)})
    manifest = Manifest("m", tuple(Persona(f"p{n}", "x") for n in range(40)))
    parts = [JobRequest(config=config, manifest=manifest, output="out", part=Part(number, 4)) for number in range(1, 5)]
    assert sorted(p.id for part in parts for p in part.personas) == sorted(p.id for p in manifest.personas)
    assert not any(part.evaluation for part in parts)


def test_a_request_that_can_be_done_leaves_no_trace_and_says_what_is_left(backbone, tmp_path):
    output = tmp_path / "out"
    request = JobRequest(config=with_questions(backbone, tmp_path), manifest=manifest(4), output=str(output))
    assert len(check_and_plan(request).plan.to_synthesize) == 4
    assert not output.exists()


def test_one_persona_without_references_and_an_output_of_other_settings_are_refused(backbone, tmp_path):
    config, output = with_questions(backbone, tmp_path), tmp_path / "out"
    alone = JobRequest(config=config, manifest=manifest(1), output=str(output))
    with pytest.raises(SourceError, match="one persona has no references"):
        check_and_plan(alone)
    document = check_and_plan(JobRequest(config=config, manifest=manifest(2), output=str(output))).identity.document()
    document["run_id"], document["settings"]["learning"]["seed"] = "another", 7
    open_storage(output).put(keys.RUN, json.dumps(document).encode())
    with pytest.raises(ConfigError, match=r"learning\.seed is 7 there and 0 here"):
        check_and_plan(JobRequest(config=config, manifest=manifest(2), output=str(output)))
