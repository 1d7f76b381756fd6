import pytest

from persona_pruner.config.load import check_config
from persona_pruner.errors import ConfigError


def test_answers_are_greedy_unless_told_otherwise():
    assert check_config({}).evaluation.answers.temperature == 0


@pytest.mark.parametrize("wrong", [{"questions": 0}, {"top_p": 0}, {"baselines": ["wanda2"]}, {"temperature": -1}])
def test_values_outside_their_range_are_told_with_the_name(wrong):
    with pytest.raises(ConfigError, match=rf"evaluation\.answers\.{next(iter(wrong))}"):
        check_config({"evaluation": {"answers": wrong}})
