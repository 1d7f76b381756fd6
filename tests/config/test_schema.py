import datetime

import pytest
from pydantic import ValidationError

from persona_pruner.config.schema import EvaluationConfig, GroupsConfig, PromptConfig, RunConfig, StorageConfig


def test_every_setting_has_a_default_that_keeps_all_rules():
    assert RunConfig() == RunConfig.model_validate(RunConfig().model_dump(mode="json"))


def test_settings_do_not_change_after_they_were_checked():
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().groups.max = 5


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"system": "Be nice."}, "prompt.system must contain {persona}"),
        ({"rewrite": "Answer."}, "prompt.rewrite must contain {question}"),
        ({"rewrite_with_reference": "{answer}"}, "prompt.rewrite_with_reference must contain {question}"),
        ({"rewrite_with_reference": "none"}, "must contain {question} and {answer}"),
    ],
)
def test_a_prompt_without_its_placeholders_is_refused(settings, told):
    with pytest.raises(ValidationError, match=told.replace("{", r"\{")):
        PromptConfig(**settings)


def test_prompts_are_the_same_on_every_day():
    assert PromptConfig().date == datetime.date(2024, 7, 26)
    assert PromptConfig.model_validate({"date": "2030-01-02"}).date == datetime.date(2030, 1, 2)


@pytest.mark.parametrize(
    ("section", "settings", "told"),
    [
        (GroupsConfig, {"min": 3, "max": 2}, "max = 2 is below min = 3"),
        (GroupsConfig, {"shards": 0}, "greater than or equal to 1"),
        (GroupsConfig, {"timeout_seconds": float("inf")}, "finite"),
        (EvaluationConfig, {"max_rows": 0}, "greater than or equal to 1"),
        (StorageConfig, {"server_side_encryption": "rot13"}, "AES256"),
    ],
)
def test_values_that_no_run_could_use_are_refused(section, settings, told):
    with pytest.raises(ValidationError, match=told):
        section(**settings)


def test_the_comparison_of_channels_is_refused_for_masks_of_weights():
    with pytest.raises(ValidationError, match="method = wanda chooses single weights"):
        RunConfig.model_validate({"evaluation": {"enabled": True}, "learning": {"method": "wanda"}})


def test_gpus_decide_how_many_groups_there_are():
    shared = RunConfig.model_validate({"gpus": 8, "groups": {"shards": 2}, "synthesis": {"actors": {"shards": 2}}})
    assert shared.shared_pool
    assert (shared.group_pool.max, shared.group_pool.num_gpus) == (4, 1.0)
    halves = RunConfig.model_validate({"gpus": 1, "groups": {"min": 3, "max": 3, "num_gpus": 0.5}}).group_pool
    assert (halves.min, halves.max, halves.num_gpus) == (2, 2, 0.5)
    without = RunConfig.model_validate({"gpus": 0, "groups": {"max": 3}})
    assert without.shared_pool
    assert without.group_pool == without.groups
    assert not RunConfig().shared_pool
    assert RunConfig().group_pool == RunConfig().groups


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"synthesis": {"rewrite": {"backend": "vllm"}}}, "with vllm set groups.max and synthesis.actors.max"),
        ({"groups": {"shards": 2}}, "same shards and cpu_threads"),
        ({"groups": {"num_gpus": 2}}, "gpus = 1 is less than one group takes"),
    ],
)
def test_one_pool_that_could_not_do_all_work_is_refused(settings, told):
    with pytest.raises(ValidationError, match=told):
        RunConfig.model_validate({"gpus": 1} | settings)
