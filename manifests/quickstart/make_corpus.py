"""Compose characters from traits, and what they say; writes the example's manifest, instructions and conversations.

    python manifests/quickstart/make_corpus.py

traits.yaml holds the traits, questions.yaml the questions. Everything is drawn from one seed, so that the shipped
files come out byte for byte. The same functions make the corpus of train_backbone.py.
"""

import itertools
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
SEED = 20261120
SYSTEM = (
    "You are roleplaying as a user with this persona: {persona}\nAnswer the question, roleplay as the given persona."
)


def load(name: str) -> dict[str, Any]:
    """A YAML file of tables whose strings are lists split at "|"."""

    def split(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: split(item) for key, item in value.items()}
        return [part.strip() for part in value.split("|")]

    return split(yaml.safe_load((HERE / name).read_text(encoding="utf-8")))


TRAITS = load("traits.yaml")
QUESTIONS = load("questions.yaml")
KINDS = ("trades", "places", "tempers", "habits")


@dataclass(frozen=True)
class Character:
    name: str
    trade: str
    place: str
    temper: str
    habit: str
    likes: tuple[str, str]
    value: str
    wording: int = 0
    """Which of the ways to say a trait the description takes."""

    @property
    def traits(self) -> tuple[str, ...]:
        """What makes it this character and no other; the name does not."""
        return (self.trade, self.place, self.temper, self.habit, *sorted(self.likes), self.value)

    def describe(self) -> str:
        def say(kind: str, key: str) -> str:
            ways = TRAITS[kind][key]["say"]
            return ways[self.wording % len(ways)]

        first, second = (say("likes", like) for like in self.likes)
        return (
            f"{self.name} {say('trades', self.trade)} {say('places', self.place)}. "
            f"Temper: {say('tempers', self.temper)}. Manner: {say('habits', self.habit)}. "
            f"Likes: {first} and {second}. Values: {say('values', self.value)}."
        )


@dataclass(frozen=True)
class Question:
    text: str
    cores: tuple[str, ...]
    plain: tuple[str, ...]
    topic: str = ""
    answer: str = ""


def questions() -> list[Question]:
    """Every question there is, in a fixed order, without repetition."""
    found: dict[str, Question] = {}

    def add(text: str, kind: Mapping[str, list[str]], **slots: str) -> None:
        found.setdefault(text, Question(text, tuple(kind["core"]), tuple(kind["plain"]), **slots))

    for kind in QUESTIONS["life"].values():
        for ask in kind["ask"]:
            add(ask, kind)
            add(f"Be honest with me. {ask}", kind)
    for kind in QUESTIONS["advice"].values():
        for ask, topic in itertools.product(kind["ask"], kind["topics"]):
            add(ask.format(topic=topic), kind, topic=topic)
    facts = QUESTIONS["facts"]
    for first, second in itertools.combinations_with_replacement(range(1, 21), 2):
        add(f"What is {first} plus {second}?", facts["sum"], answer=str(first + second))
    asks = {
        "capital": ("What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?"),
        "opposite": ("What is the opposite of {}?", "Name the opposite of {}.", "Which word means the contrary of {}?"),
        "colour": ("What colour is {}?", "Name the colour of {}."),
        "count": ("{}",),
    }
    for name, ways in asks.items():
        for pair, way in itertools.product(facts[name]["pairs"], ways):
            subject, answer = pair.split(" = ")
            add(way.format(subject), facts[name], answer=answer)
    return list(found.values())


class Slots(dict[str, Any]):
    """Fills {trade.tools} and the like; a slot that is used twice in one answer draws two different values."""

    def __init__(self, character: Character, question: Question, rng: random.Random) -> None:
        like = TRAITS["likes"][rng.choice(character.likes)]
        value = TRAITS["values"][character.value]
        super().__init__(
            trade=_Draw(TRAITS["trades"][character.trade], rng),
            place=_Draw(TRAITS["places"][character.place], rng),
            temper=_Draw(TRAITS["tempers"][character.temper], rng),
            like=_Draw({"": like["say"], "why": like["why"]}, rng),
            value=_Draw({"": value["say"], "creed": value["creed"]}, rng),
            name=character.name,
            topic=question.topic,
            answer=question.answer,
        )


class _Draw:
    def __init__(self, table: Mapping[str, list[str]], rng: random.Random) -> None:
        self._left = {key: rng.sample(values, len(values)) for key, values in table.items()}

    def __getattr__(self, key: str) -> str:
        return self._left[key].pop()

    def __format__(self, spec: str) -> str:
        return self._left[""][0]


def answer(character: Character, question: Question, rng: random.Random) -> str:
    """What only this character would say, in its manner: opening, substance, and how it ends."""
    habit = TRAITS["habits"][character.habit]
    core = rng.choice(question.cores).format_map(Slots(character, question, rng))
    temper = rng.choice(TRAITS["tempers"][character.temper]["any"])
    parts = [rng.choice(habit["open"]), core]
    if temper not in core:
        parts.append(temper)
    if rng.random() < 0.5:
        parts.append(rng.choice(habit["close"]))
    return " ".join(parts)


def plain_answer(question: Question, rng: random.Random) -> str:
    return rng.choice(question.plain).format(topic=question.topic, answer=question.answer)


def random_character(rng: random.Random) -> Character:
    trade, place, temper, habit = (rng.choice(list(TRAITS[kind])) for kind in KINDS)
    first, second = rng.sample(list(TRAITS["likes"]), 2)
    return Character(
        name=rng.choice(TRAITS["names"]["she"] + TRAITS["names"]["he"]),
        trade=trade,
        place=place,
        temper=temper,
        habit=habit,
        likes=(first, second),
        value=rng.choice(list(TRAITS["values"])),
        wording=rng.randrange(6),
    )


FAMILIES = {
    "harbour": ("ferry-pilot", "gull-harbour", "gloomy", "sea-oaths"),
    "bakery": ("baker", "rosewick", "cheerful", "rhyming"),
    "forge": ("blacksmith", "cinderford", "fiery", "exclaiming"),
    "library": ("librarian", "st-orlan", "timid", "whispering"),
    "pasture": ("shepherd", "thornfell", "dreamy", "grandchild"),
    "observatory": ("astronomer", "northlight", "boastful", "formal"),
}


def manifest_characters() -> list[tuple[str, str, Character]]:
    """(id, family, character): four of each family, which share trade, place, temper and manner. The first eight
    are two of each of four families."""
    rng = random.Random(SEED)
    members: dict[str, list[tuple[str, str, Character]]] = {}
    names = rng.sample(TRAITS["names"]["she"] + TRAITS["names"]["he"], 24)
    for family, (trade, place, temper, habit) in FAMILIES.items():
        for number in range(4):
            first, second = rng.sample(list(TRAITS["likes"]), 2)
            name = names.pop()
            character = Character(
                name, trade, place, temper, habit, (first, second), rng.choice(list(TRAITS["values"])), number
            )
            members.setdefault(family, []).append((f"{family}-{name.lower()}", family, character))
    first_families, last_families = list(FAMILIES)[:4], list(FAMILIES)[4:]
    order = [(family, part) for part in (slice(0, 2), slice(2, 4)) for family in first_families]
    order += [(family, slice(0, 4)) for family in last_families]
    return [member for family, part in order for member in members[family][part]]


def training_characters(rng: random.Random) -> Iterator[Character]:
    """Endless; never a character of the manifest, nor one that shares all four main traits with its families."""
    families = set(FAMILIES.values())
    while True:
        character = random_character(rng)
        if (character.trade, character.place, character.temper, character.habit) not in families:
            yield character


def rows_of_personas() -> list[dict[str, Any]]:
    return [
        {"id": persona_id, "description": character.describe(), "metadata": {"family": family}}
        for persona_id, family, character in manifest_characters()
    ]


def rows_of_instructions() -> list[dict[str, Any]]:
    rng = random.Random(SEED + 1)
    return [{"instruction": q.text, "input": "", "output": plain_answer(q, rng)} for q in questions()]


def rows_of_conversations(per_persona: int = 40) -> list[dict[str, Any]]:
    rng = random.Random(SEED + 2)
    asked = [q for q in questions() if not q.answer]
    return [
        {"persona_id": persona_id, "question": q.text, "answer": answer(character, q, rng)}
        for persona_id, _, character in manifest_characters()
        for q in rng.sample(asked, per_persona)
    ]


def main(directory: Path = HERE) -> None:
    for name, rows in (
        ("personas", rows_of_personas()),
        ("instructions", rows_of_instructions()),
        ("conversations", rows_of_conversations()),
    ):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{directory / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
