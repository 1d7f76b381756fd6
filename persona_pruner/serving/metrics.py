"""What a server of personas counts, for Prometheus. Personas are counted in buckets: thousands of labels would hurt."""

import hashlib
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = 32
UNPRUNED = "unpruned"


def bucket_of(persona_id: str | None) -> str:
    """The label under which a persona is counted, the same everywhere."""
    if persona_id is None:
        return UNPRUNED
    return f"{hashlib.sha256(persona_id.encode()).digest()[0] % BUCKETS:02d}"


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        names: Any = {"registry": self.registry, "namespace": "persona_pruner"}
        self.requests = Counter("requests", "Requests by bucket of personas and status.", ["bucket", "status"], **names)
        self.tokens = Counter("tokens", "Tokens by bucket of personas.", ["bucket", "kind"], **names)
        self.mask_loads = Counter("mask_loads", "Reads of masks by what came of them.", ["outcome"], **names)
        self.mask_load_seconds = Histogram("mask_load_seconds", "Seconds to read and verify one mask.", **names)
        self.personas_in_memory = Gauge("personas_in_memory", "Personas that the front end keeps.", **names)
        self.engine_up = Gauge("engine_up", "1 where the engine answered when this was read, else 0.", **names)
        self.slots = Gauge("mask_slots", "Masks that fit beside the backbone.", **names)
        self.slots_used = Gauge("mask_slots_used", "Masks that lie beside the backbone.", **names)

    def render(self) -> bytes:
        return generate_latest(self.registry)
