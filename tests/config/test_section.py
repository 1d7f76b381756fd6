import datetime
import json
from types import NoneType
from typing import get_args

import pytest

from persona_pruner.config.load import check_config
from persona_pruner.config.section import Section, hashed_contents, hashed_settings

BASE = check_config(
    {
        "synthesis": {"sources": [{"path": "a.jsonl"}], "references": {"path": "r.jsonl"}},
        "learning": {"init": "pooled", "optimizer": "value", "stoppers": {"plateau_evaluations": 3}},
        "evaluation": {"questions": "q"},
    }
)
PATHS = {
    "synthesis.sources.0.path", "synthesis.references.path", "evaluation.questions", "learning.objective.generic_rows",
}  # fmt: skip
# Resources, limits, places, and what is told or kept beside the mask.
UNMARKED = {
    "backbone.path", "backbone.revision", "backbone.exportable", "synthesis.sources.0.split",
    "synthesis.rewrite.base_url", "synthesis.rewrite.concurrency", "synthesis.rewrite.requests_per_minute",
    "synthesis.rewrite.timeout_seconds", "synthesis.rewrite.deadline_seconds", "synthesis.rewrite.token_budget",
    "synthesis.filter.min_answers", "synthesis.tile_personas", "synthesis.actors.min", "synthesis.actors.max",
    "synthesis.actors.num_cpus", "synthesis.actors.num_gpus", "learning.max_row_tokens", "learning.keep_scores",
    "learning.gradient_checkpointing", "groups.min", "groups.max", "groups.num_cpus", "groups.num_gpus",
    "groups.idle_seconds", "groups.timeout_seconds", "synthesis.rewrite.engines.min", "synthesis.rewrite.engines.max",
    "synthesis.rewrite.engines.num_cpus", "synthesis.rewrite.engines.num_gpus", "gpus",
}  # fmt: skip
UNMARKED_SECTIONS = ("scheduler.", "storage.", "evaluation.", "recovery.")


def leaves(section, prefix=""):
    """(name, path of keys) of every setting."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from leaves(value, f"{prefix}{name}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            yield from leaves(value[0], f"{prefix}{name}.0.")
        else:
            yield f"{prefix}{name}", value, field.annotation


def another(value, annotation):
    """Some value of the setting's kind that is not `value`."""
    options = [option for kind in (annotation, *get_args(annotation)) for option in get_args(kind)]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return next((o for o in options if isinstance(o, str) and o != value), f"{value} other")
    if isinstance(value, datetime.date):
        return value + datetime.timedelta(days=1)
    if isinstance(value, tuple):
        return (*value, "mean:a" if "str" in str(annotation) else 0.3)
    return "other" if str in get_args(annotation) else (0, 1) if tuple[int, int] in get_args(annotation) else 1


def changed(section, name, value):
    first, _, rest = name.partition(".")
    if isinstance(section, tuple):
        return (changed(section[0], rest, value), *section[1:])
    return section.model_copy(update={first: changed(getattr(section, first), rest, value) if rest else value})


@pytest.mark.parametrize(("name", "value", "annotation"), list(leaves(BASE)), ids=lambda value: str(value)[:40])
def test_exactly_the_marked_settings_decide_what_a_run_is(name, value, annotation):
    assert value is not None or NoneType in get_args(annotation)
    other = changed(BASE, name, another(value, annotation))
    assert other != BASE
    same = hashed_settings(other) == hashed_settings(BASE)
    assert same is (name in UNMARKED or name in PATHS or name.startswith(UNMARKED_SECTIONS))
    json.dumps(hashed_settings(other))


def test_files_enter_by_what_they_hold():
    assert hashed_contents(BASE) == {
        "synthesis.sources.0.path": "a.jsonl",
        "synthesis.references.path": "r.jsonl",
        "evaluation.questions": "q",
    }
    assert hashed_contents(check_config({})) == {}


def test_when_masks_are_evaluated_matters_only_where_a_stopper_looks():
    def settings(stoppers, every):
        return hashed_settings(check_config({"learning": {"evaluate_every": every, "stoppers": stoppers}}))

    assert settings({}, 10) == settings({}, 20)
    for stopper in ({"plateau_evaluations": 2}, {"stability": 0.1}):
        assert settings(stopper, 10) != settings(stopper, 20)
