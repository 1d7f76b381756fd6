"""What a submission would do: done, to train, to synthesize, and about what it costs. Starts and writes nothing."""

import json
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from persona_pruner.dataset import is_current
from persona_pruner.manifest import Manifest, Persona
from persona_pruner.masks.catalog import build_catalog
from persona_pruner.run.identity import Identity
from persona_pruner.storage import keys
from persona_pruner.storage.base import Storage

CHARACTERS_A_TOKEN = 4
ROW_TOKENS = 80
"""Question and answer of a typical row, for estimates before any data are there."""


@dataclass(frozen=True)
class Plan:
    done: tuple[Persona, ...]
    to_train: tuple[Persona, ...]
    """Their data are there."""
    to_synthesize: tuple[Persona, ...]
    failed_before: tuple[str, ...]
    """Have an error from an earlier submission; they are tried again."""
    tokens: int
    flop: float
    bytes: int

    def summary(self) -> dict[str, Any]:
        return {
            "done": len(self.done),
            "to_train": len(self.to_train),
            "to_synthesize": len(self.to_synthesize),
            "failed_before": list(self.failed_before),
            "tokens": self.tokens,
            "flop": self.flop,
            "bytes": self.bytes,
        }


def masked_personas(personas: Sequence[Persona], storage: Storage, identity: Identity) -> tuple[Persona, ...]:
    """Those that are done: their id has a mask that verifies, of this very description and of this run, and contrasted
    with the persona that the manifest names now."""
    unverified: list[str] = []  # those are made again
    columns = ("persona_sha256", "run_id", "opposite_sha256")
    contrastive = identity.config.learning.is_contrastive
    catalog = build_catalog(storage, identity.config.storage.connections, columns, unverified)
    ids, *decided = (catalog.column(name).to_pylist() for name in ("persona_id", *columns))
    masks = dict(zip(ids, zip(*decided, strict=True), strict=True))

    def is_done(persona: Persona) -> bool:
        opposite = persona.opposite.sha256 if contrastive and persona.opposite is not None else None
        return masks.get(persona.id) == (persona.sha256, identity.run_id, opposite)

    return tuple(persona for persona in personas if is_done(persona))


def make_plan(manifest: Manifest, storage: Storage, identity: Identity) -> Plan:
    """Look at the output and say what is left."""
    done = masked_personas(manifest.personas, storage, identity)
    data = {keys.persona_of(item.key, keys.SYNTHESIS) for item in storage.list(keys.SYNTHESIS)}
    errors = {keys.persona_of(item.key, keys.ERRORS) for item in storage.list(keys.ERRORS)}
    finished = {p.id for p in done}
    with_data = [p for p in manifest.personas if p.id in data and p.id not in finished]
    with ThreadPoolExecutor(identity.config.storage.connections) as pool:
        current = list(pool.map(lambda persona: is_current(storage, persona), with_data))
    train = [persona for persona, fits in zip(with_data, current, strict=True) if fits]
    started = finished | {p.id for p in train}
    synthesize = [p for p in manifest.personas if p.id not in started]
    left = {p.id for p in (*train, *synthesize)}
    tokens, flop, size = _estimate(identity, train, synthesize)
    failed = tuple(sorted(errors & left))
    return Plan(done, tuple(train), tuple(synthesize), failed, tokens, flop, size)


def _estimate(identity: Identity, train: list[Persona], synthesize: list[Persona]) -> tuple[int, float, int]:
    """(tokens, FLOP, bytes of masks): 2 FLOP a parameter and token forward, 4 with the gradient of the mask."""
    config = identity.config
    shape = json.loads((identity.path / "config.json").read_text())
    shape = shape.get("text_config", shape)
    layers, width = shape["num_hidden_layers"], shape["hidden_size"]
    channels = shape.get("intermediate_size") or shape.get("ffn_dim") or 4 * width
    parameters = sum(f.stat().st_size for f in identity.path.glob("*.safetensors")) // 2
    rows, selected = config.learning.rows_per_step, config.synthesis.select.k
    prompts = {
        p.id: (len(p.description) + len(config.prompt.system)) // CHARACTERS_A_TOKEN for p in (*train, *synthesize)
    }
    training = sum(config.learning.steps * (prompts[p.id] + rows * ROW_TOKENS) for p in (*train, *synthesize))
    questions = config.synthesis.max_questions or 1000
    scoring = sum(prompts[p.id] + (questions + selected) * ROW_TOKENS // 2 for p in synthesize)
    flop = parameters * (4.0 * training + 2.0 * scoring)
    return training + scoring, flop, (len(train) + len(synthesize)) * (layers * math.ceil(channels / 8) + 1500)
