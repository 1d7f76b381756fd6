import dataclasses

import pytest

from persona_pruner.errors import ConfigError
from persona_pruner.manifest import Persona
from persona_pruner.run.part import WHOLE, Part

PEOPLE = [Persona(f"p{n}", "x") for n in range(1000)]


def test_the_parts_are_the_whole_each_persona_in_one():
    parts = [Part(number, 10) for number in range(1, 11)]
    assert all(sum(persona in part for part in parts) == 1 for persona in PEOPLE)
    assert all(70 < sum(persona in part for persona in PEOPLE) < 130 for part in parts)
    assert all(persona in WHOLE for persona in PEOPLE)


def test_a_part_does_not_change_when_the_manifest_grows():
    part = Part(3, 10)
    assert [p.id for p in PEOPLE[:500] if p in part] == [p.id for p in PEOPLE if p in part and int(p.id[1:]) < 500]


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [((3, 10), (3, 10), True), ((3, 10), (4, 10), False), ((1, 1), (4, 10), True), ((3, 10), (3, 5), True),
     ((3, 10), (4, 5), False), ((1, 2), (2, 3), True)],
)  # fmt: skip
def test_parts_overlap_where_a_persona_could_be_in_both(one, other, overlap):
    assert Part(*one).overlaps(Part(*other)) is overlap
    assert any(p in Part(*one) and p in Part(*other) for p in PEOPLE) is overlap


@pytest.mark.parametrize("text", ["3", "0/10", "11/10", "a/b", "1/", "-1/3", ""])
def test_what_is_no_part_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="must be like 3/10"):
        Part.parse(text)
    assert Part.parse("3/10") == Part(3, 10)


def test_opposed_personas_are_of_one_part():
    for one, other in zip(PEOPLE[::2], PEOPLE[1::2], strict=True):
        pair = dataclasses.replace(one, opposite=other), dataclasses.replace(other, opposite=one)
        assert (pair[0] in Part(2, 7)) is (pair[1] in Part(2, 7))
