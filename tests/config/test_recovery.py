import pytest
from pydantic import ValidationError

from persona_pruner.config.load import check_config
from persona_pruner.config.recovery import RecoveryConfig
from persona_pruner.config.section import hashed_settings


def test_no_setting_of_the_recovery_makes_another_run():
    other = check_config({"recovery": {"rank": 2, "form": "merged", "seed": 4}})
    assert hashed_settings(other) == hashed_settings(check_config({}))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"form": "both"}, {"learning_rate": 0}])
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(ValidationError):
        RecoveryConfig(**settings)
