"""Is the backbone still able: general benchmarks by lm-eval (EleutherAI's harness) on the masked model itself.

No checkpoint is exported: the mask is hooked into the loaded backbone.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from persona_pruner.backbone.channels import ChannelMasks
from persona_pruner.backbone.load import Backbone
from persona_pruner.config.evaluation import BenchmarksConfig
from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import ConfigError, UserError
from persona_pruner.evaluation.baselines import Baselines, added_biases
from persona_pruner.evaluation.subject import AnswerTask, Arm, read_subject
from persona_pruner.masks.format import Mask
from persona_pruner.masks.store import stored_global_mask
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, Storage

COLUMNS = ("task", "metric", "arm", "questions", "value", "standard error")

BOOTSTRAP = 100
"""Resamples for the standard errors that have no closed form; with none, lm-eval leaves out those of accuracies too."""


def run_tasks(model: Any, tokenizer: Any, settings: BenchmarksConfig) -> list[dict[str, Any]]:
    """One row for each task and metric of a transformers model: task, metric, questions, value, standard error.

    Raises UserError where lm-eval is not installed or a task cannot be run.
    """
    manager = _checked_manager(settings)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size),
        tasks=list(settings.tasks), num_fewshot=settings.few_shot, limit=settings.limit, task_manager=manager,
        bootstrap_iters=BOOTSTRAP, log_samples=False,
    )  # fmt: skip
    return list(_rows(found or {}))


def _checked_manager(settings: BenchmarksConfig) -> Any:
    manager = _task_manager(settings.include_path)
    if unknown := [name for name in settings.tasks if name not in manager.all_tasks]:
        raise ConfigError(f"evaluation.benchmarks.tasks: {unknown[0]!r} is no task of lm-eval or of include_path")
    return manager


@cache
def _task_manager(include_path: str | None) -> Any:
    """Reads all of lm-eval's task files, which takes seconds."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"benchmarks need {error.name}: pip install 'persona-pruner[lm-eval]'") from None
    return TaskManager(include_path=include_path)


def _rows(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for task, metrics in found.get("results", {}).items():
        questions = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = metrics.get(f"{metric}_stderr,{kind}")
                yield {
                    "task": task, "metric": metric, "questions": questions, "value": round(float(value), 4),
                    "standard error": round(float(error), 4) if isinstance(error, int | float) else None,
                }  # fmt: skip


def benchmark(
    backbone: Backbone,
    storage: Storage,
    settings: BenchmarksConfig,
    persona_ids: Sequence[str],
    rivals: Sequence[Arm] = (),
) -> list[list[Any]]:
    """The tasks unpruned, under each persona's mask and those of rivals: rows of COLUMNS, stored for the report as they
    come.

    A task that is stored already under the same settings and mask is not run again, and what is stored of other tasks
    and masks stays. Raises UserError, NotFoundError.
    """
    results = _read(storage)
    for arm in (None, *(_own(backbone, storage, persona_id) for persona_id in persona_ids), *rivals):
        name, biases = (arm.name, arm.bias_LD) if arm else ("unpruned", None)
        for task in settings.tasks:
            alone = settings.model_copy(update={"tasks": (task,)})
            made_by = [alone.model_dump(mode="json"), backbone.fingerprint, arm and arm.digest]
            key = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()
            if results.get(f"{name} {task}", {}).get("made_by") == key:
                continue
            _checked_manager(settings)
            with ChannelMasks(backbone.model) as channels, added_biases(backbone, biases):
                channels.set(None if arm is None else arm.keep_LI.to(backbone.device))
                found = run_tasks(backbone.model, backbone.tokenizer, alone)
            rows = [[row.get(column, name) for column in COLUMNS] for row in found]
            results[f"{name} {task}"] = {"made_by": key, "rows": rows}
            document = {"columns": COLUMNS, "rows": _all_rows(results), "results": results}
            storage.put(keys.EVALUATION_BENCHMARKS, json.dumps(document).encode())
    return _all_rows(results)


def rivals_of(backbone: Backbone, config: RunConfig, storage: Storage, persona_id: str) -> list[Arm]:
    """One mask for all, and the baselines of `evaluation.answers`, as wide as this persona's own mask.

    Raises PersonaError, MaskError, StorageError.
    """
    global_key = stored_global_mask(storage)
    task = AnswerTask(persona_id=persona_id, other_id=None, candidates=(), global_key=global_key, digests={})
    arms = read_subject(Baselines(backbone, config), storage, task).arms
    return [arm for arm in arms if arm.name not in ("unpruned", "own")]


def _own(backbone: Backbone, storage: Storage, persona_id: str) -> Arm:
    mask = Mask.from_bytes(storage.get(keys.mask(persona_id)), keys.mask(persona_id))
    mask.check(keys.mask(persona_id), persona_id=persona_id, backbone_fingerprint=backbone.fingerprint)
    return Arm(persona_id, persona_id, mask.keep_LI)


def _read(storage: Storage) -> dict[str, dict[str, Any]]:
    """By arm and task: what decided the rows, and the rows."""
    try:
        return dict(json.loads(storage.get(keys.EVALUATION_BENCHMARKS)).get("results", {}))
    except NotFoundError:
        return {}


def _all_rows(results: dict[str, dict[str, Any]]) -> list[list[Any]]:
    return [row for one in results.values() for row in one["rows"]]
