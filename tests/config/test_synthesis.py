import pytest
from pydantic import ValidationError

from persona_pruner.config.synthesis import (
    ActorsConfig,
    EnginesConfig,
    FilterConfig,
    RewriteConfig,
    SelectConfig,
    SourceConfig,
    SynthesisConfig,
)


@pytest.mark.parametrize(
    ("section", "settings", "told"),
    [
        (ActorsConfig, {"min": 2, "max": 1}, "max = 1 is below min = 2"),
        (EnginesConfig, {"min": 3, "max": 1}, "max = 1 is below min = 3"),
        (SelectConfig, {"method": "best"}, "'top_k', 'threshold', 'quantile' or 'random'"),
        (SelectConfig, {"quantile": 1.0}, "less than 1"),
        (SelectConfig, {"diversity": 1.5}, "less than or equal to 1"),
        (RewriteConfig, {"backend": "gpt"}, "'self', 'openai', 'vllm' or 'none'"),
        (RewriteConfig, {"top_p": 0}, "greater than 0"),
        (RewriteConfig, {"temperature": float("nan")}, "finite|greater than or equal"),
        (FilterConfig, {"min_answers": 0}, "greater than or equal to 1"),
        (SourceConfig, {"path": "q.jsonl", "weight": 0}, "greater than 0"),
        (SourceConfig, {}, "path"),
        (SynthesisConfig, {"heldout_fraction": 1}, "less than 1"),
    ],
)
def test_values_that_no_synthesis_could_use_are_refused(section, settings, told):
    with pytest.raises(ValidationError, match=told):
        section(**settings)


def test_a_source_of_instruction_data_needs_its_path_only():
    source = SourceConfig(path="q.jsonl")
    assert (source.question, source.input, source.answer) == ("instruction", "input", "output")
    config = SynthesisConfig.model_validate({"sources": [{"path": "a.jsonl", "weight": 2}, {"path": "s3://b/c"}]})
    assert [(source.path, source.weight) for source in config.sources] == [("a.jsonl", 2), ("s3://b/c", 1)]


def test_what_the_engines_take_is_passed_on_as_it_is():
    options = {"max_model_len": 2048, "tensor_parallel_size": 2}
    assert RewriteConfig.model_validate({"engines": {"options": options}}).engines.options == options
