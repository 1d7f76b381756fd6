"""Tuning of the pruned models of an output's masks, as a job. What is stored already is not done again."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from persona_pruner.config.load import load_config
from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import EXIT_PERSONAS_FAILED, EXIT_STOPPED, ConfigError, UserError
from persona_pruner.masks.catalog import build_catalog, update_catalog
from persona_pruner.run.lease import Lease
from persona_pruner.run.preflight import gpus_of_nodes, preflight
from persona_pruner.run.progress import ProgressReporter
from persona_pruner.run.ray_cluster import ray_cluster
from persona_pruner.run.stop import Stop
from persona_pruner.scheduling.recovery_worker import digest_of_mask, recovery_pool
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, Storage
from persona_pruner.storage.open import open_storage

RECOVERING = "tuning the pruned models"


@dataclass(frozen=True, kw_only=True)
class RecoveryRequest:
    """Which of an output's personas to tune: those named, or all that have a mask."""

    config: RunConfig
    output: str
    personas: tuple[str, ...] = ()


def recover_masks(output: str, config: str, overrides: Sequence[str], personas: Sequence[str]) -> int:
    """From the words of a command to an exit status. Raises UserError."""
    settings = load_config(config, overrides)
    with ProgressReporter(Console()) as progress:
        return run_recovery(RecoveryRequest(config=settings, output=output, personas=tuple(personas)), progress)


def run_recovery(request: RecoveryRequest, progress: ProgressReporter) -> int:
    """Tune to the end or to a stop; returns the exit status (errors.py).

    Raises UserError before anything is started where the input is bad, ClusterError, StorageError.
    """
    progress.begin("checking the input")
    config, storage = request.config, open_storage(request.output, request.config.storage)
    check(config, storage)
    with Lease(storage, config.scheduler.lease_seconds) as lease:
        personas = digests(request, storage)
        todo = [persona_id for persona_id, digest in personas.items() if result(storage, persona_id, digest) is None]
        stop, failures = Stop(config.scheduler, lease), dict[str, str]()
        if todo and not _tune(request, progress, stop, todo, failures):
            progress.close("stopped")
            progress.say(f"stopped ({stop.reason}); say the same again to go on")
            return EXIT_STOPPED
        update_catalog(storage, config.storage.connections, again=todo)
        return _report(storage, progress, personas, failures)


def check(config: RunConfig, storage: Storage) -> None:
    """Raise UserError where this job could not be done."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("the tuning after the mask needs peft: pip install 'persona-pruner[recover]'")
    if config.groups.shards > 1:
        raise ConfigError(
            f"groups.shards = {config.groups.shards}: the tuning after the mask holds a whole pruned model in each "
            "actor; set it to 1"
        )
    storage.check_readable(keys.MASKS)
    preflight(config, synthesis=False, nodes=gpus_of_nodes(config))


def digests(request: RecoveryRequest, storage: Storage) -> dict[str, str]:
    """What the result of each persona is made of, by id. Raises UserError where there is nothing to tune."""
    columns = ("keep", "data_sha256")
    faults: list[str] = []
    catalog = build_catalog(storage, request.config.storage.connections, columns, faults)
    rows = zip(*(catalog.column(name).to_pylist() for name in ("persona_id", *columns)), strict=True)
    digest_by_id = {
        persona_id: digest_of_mask(request.config, keep, data_sha256)
        for persona_id, keep, data_sha256 in rows
        if keep is not None  # masks of single weights make no model smaller
    }
    missing = [persona_id for persona_id in request.personas if persona_id not in digest_by_id]
    if missing:
        raise UserError(f"--persona {missing[0]}: {storage.url} holds no mask of FFN channels of it")
    if not digest_by_id:
        raise UserError(f"{storage.url}: holds no mask of FFN channels to tune after")
    return {persona_id: digest_by_id[persona_id] for persona_id in (request.personas or sorted(digest_by_id))}


def result(storage: Storage, persona_id: str, digest: str) -> Mapping[str, Any] | None:
    """What is stored, where it was made of the same mask, data and settings."""
    try:
        stored = json.loads(storage.get(keys.recovered(persona_id)))
    except NotFoundError:
        return None
    return stored if stored["digest"] == digest else None


def _tune(
    request: RecoveryRequest, progress: ProgressReporter, stop: Stop, todo: Sequence[str], failures: dict[str, str]
) -> bool:
    """False where stopped before the end."""
    with ray_cluster(request.config, progress):
        stop.listen()
        pool = recovery_pool(request.config, request.output)
        try:
            progress.begin(RECOVERING, len(todo))
            done = 0
            for persona_id, fault in pool.map("recover", todo, stop):
                done += 1
                progress.count(RECOVERING, done)
                if fault is not None:
                    failures[persona_id] = fault
            progress.end(RECOVERING)
            return done == len(todo)
        finally:
            pool.close()


def _report(
    storage: Storage, progress: ProgressReporter, personas: Mapping[str, str], failures: Mapping[str, str]
) -> int:
    """Losses before and after, and what failed. Returns the exit status."""
    progress.close("failed" if failures else "done")
    table = Table(title="Held-out loss of the pruned model (nats per token)", title_justify="left")
    for name in ("persona", "before", "after", "steps"):
        table.add_column(name, justify="left" if name == "persona" else "right")
    for persona_id, digest in personas.items():
        if (stored := result(storage, persona_id, digest)) is not None:
            losses = ("" if loss is None else f"{loss:.3f}" for loss in (stored["loss_before"], stored["loss_after"]))
            table.add_row(persona_id, *losses, str(stored["steps"]))
    progress.console.print(table)
    for persona_id, message in failures.items():
        progress.say(f"failed {persona_id}: {message}")
    progress.say(f"{len(personas) - len(failures)} of {len(personas)} tuned; files under {storage.url}/{keys.RECOVERY}")
    return EXIT_PERSONAS_FAILED if failures else 0
