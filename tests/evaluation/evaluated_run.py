"""An output with masks of a tiny random backbone and question files: what an evaluation starts from."""

import dataclasses
import hashlib
import json

from mask_examples import mask
from tiny_models import tiny, tiny_config

from persona_pruner.masks.format import Mask
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage

PERSONAS = ("ann", "bo", "cy")
QUESTIONS = ("Why?", "Who are you?")

TASKS = (
    {"ability": "json", "question": "How many? {schema}", "schema": {"type": "integer"}},
    {"ability": "injection", "question": "Say nay.", "marker": "nay"},
)

DIALOGUES = {"turns": 3, "user_prompt": "{conversation} And now?"}


def description_of(persona_id):
    return f"{persona_id}, who {'often ' * len(persona_id)}sails"


def make_run(directory, **answers):
    """(backbone, configuration, storage)."""
    backbone = tiny(directory / "tiny")
    storage = open_storage(directory / "out")
    for seed, persona_id in enumerate(PERSONAS):
        put(storage, backbone, persona_id, seed)
    (directory / "questions").mkdir()
    for persona_id in PERSONAS:
        (directory / "questions" / f"{persona_id}.json").write_text(json.dumps(QUESTIONS))
    (directory / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    settings = {"max_new_tokens": 6, "batch_size": 4, "baselines": ["magnitude", "flap"], "candidates": 3} | answers
    (directory / "generic.jsonl").write_text(
        '{"question": "Why?", "answer": "So."}\n{"question": "Ho", "answer": "Hum."}\n'
    )
    config = tiny_config(directory / "tiny", objective={"generic_rows": str(directory / "generic.jsonl")})
    evaluation = type(config.evaluation)(
        questions=str(directory / "questions"),
        answers=settings,
        abilities={"tasks": str(directory / "tasks.jsonl")},
        dialogues=DIALOGUES,
    )
    return backbone, config.model_copy(update={"evaluation": evaluation}), storage


def put(storage, backbone, persona_id, seed):
    made = mask(persona_id, layers=3, channels=64, kept=40, seed=seed)
    description = description_of(persona_id)
    metadata = dataclasses.replace(
        made.metadata, backbone_fingerprint=backbone.fingerprint, persona_description=description,
        persona_sha256=hashlib.sha256(description.encode()).hexdigest(), data_sha256=f"d{seed}",
    )  # fmt: skip
    storage.put(keys.mask(persona_id), Mask(made.keep_LI, metadata).to_bytes())
