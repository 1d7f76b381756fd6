import pytest
from pydantic import ValidationError

from persona_pruner.config.learning import LearningConfig


@pytest.mark.parametrize(
    ("settings", "needs"),
    [({}, False), ({"init": "pooled"}, True), ({"core": 0.9}, True), ({"budget": "profile"}, True),
     ({"budget": "free", "init": "fisher"}, False)],
)  # fmt: skip
def test_a_pooled_mask_is_needed_for_start_core_and_profile(settings, needs):
    assert LearningConfig(**settings).needs_pooled_mask is needs


def test_steps_are_a_number_or_passes_over_the_rows():
    assert LearningConfig(steps=70).steps_for(1000) == 70
    passes = LearningConfig(passes=2, rows_per_step=16)
    assert [passes.steps_for(rows) for rows in (4, 16, 100)] == [2, 2, 13]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"budget": "free", "ratio": "auto"}, "budget = free needs one fixed ratio"),
        ({"core": 0.9, "ratio": "auto"}, "a pooled mask .* needs one fixed ratio"),
        ({"core": 0.9, "method": "soft_topk"}, "core = 0.9 needs the method ste or gumbel"),
        ({"optimizer": "value"}, "optimizer = value needs"),
        ({"optimizer": "value", "init": "fisher", "method": "gumbel"}, "not gumbel and fisher"),
        ({"method": "wanda", "ratio": "auto"}, "method = wanda makes a mask in one pass"),
        ({"method": "wnada"}, "'wanda'"),
        ({"objective": {"foreign": 0.5, "cross_entropy": 1}}, "foreign = 0.5 goes with distillation alone"),
        ({"pooled_init": "pooled"}, "choose from zeros, magnitude, activation, fisher"),
    ],
)
def test_settings_that_do_not_go_together_are_named(settings, told):
    with pytest.raises(ValidationError, match=told):
        LearningConfig(**settings)


def test_one_pass_takes_a_configuration_that_was_written_for_learning():
    """So that `--set learning.method=...` alone tries another method."""
    config = LearningConfig(method="sparsegpt", optimizer="value", init="pooled", budget="profile", core=0.5)
    assert config.is_weight_level
    assert not config.needs_pooled_mask
