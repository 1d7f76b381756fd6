"""Is the backbone still able: general benchmarks by lm-eval (EleutherAI's harness) on the masked model itself.

No checkpoint is exported: the mask is hooked into the loaded backbone.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from persona_pruner.backbone.channels import ChannelMasks
from persona_pruner.backbone.load import Backbone
from persona_pruner.config.evaluation import BenchmarksConfig
from persona_pruner.errors import ConfigError, UserError
from persona_pruner.masks.format import Mask
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, Storage

COLUMNS = ("task", "metric", "arm", "questions", "value", "standard error")


def run_tasks(model: Any, tokenizer: Any, settings: BenchmarksConfig) -> list[dict[str, Any]]:
    """One row for each task and metric of a transformers model: task, metric, questions, value, standard error.

    Raises UserError where lm-eval is not installed or a task cannot be run.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"benchmarks need {error.name}: pip install 'persona-pruner[lm-eval]'") from None
    manager = TaskManager(include_path=settings.include_path)
    if unknown := [name for name in settings.tasks if name not in manager.all_tasks]:
        raise ConfigError(f"evaluation.benchmarks.tasks: {unknown[0]!r} is no task of lm-eval or of include_path")
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=settings.batch_size),
        tasks=list(settings.tasks), num_fewshot=settings.few_shot, limit=settings.limit, task_manager=manager,
        bootstrap_iters=0, log_samples=False,
    )  # fmt: skip
    return list(_rows(found or {}))


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
    backbone: Backbone, storage: Storage, settings: BenchmarksConfig, persona_ids: Sequence[str]
) -> list[list[Any]]:
    """The tasks unpruned and under each persona's mask: rows of COLUMNS, stored for the report as they come.

    What is stored already under the same settings and mask is not run again. Raises UserError, NotFoundError.
    """
    document = _read(storage)
    masks: list[tuple[str, Mask | None]] = [("unpruned", None)]
    for persona_id in persona_ids:
        own = Mask.from_bytes(storage.get(keys.mask(persona_id)), keys.mask(persona_id))
        own.check(keys.mask(persona_id), persona_id=persona_id, backbone_fingerprint=backbone.fingerprint)
        masks.append((persona_id, own))
    for arm, mask in masks:
        made_by = [settings.model_dump(mode="json"), backbone.fingerprint, mask and mask.packed().hex()]
        key = hashlib.sha256(json.dumps(made_by).encode()).hexdigest()
        if document["made"].get(arm) == key:
            continue
        with ChannelMasks(backbone.model) as channels:
            channels.set(None if mask is None else mask.keep_LI.to(backbone.device))
            rows = run_tasks(backbone.model, backbone.tokenizer, settings)
        document["rows"] = [row for row in document["rows"] if row[2] != arm]
        document["rows"] += [[row.get(name, arm) for name in COLUMNS] for row in rows]
        document["made"][arm] = key
        storage.put(keys.EVALUATION_BENCHMARKS, json.dumps(document).encode())
    return list(document["rows"])


def _read(storage: Storage) -> dict[str, Any]:
    try:
        return dict(json.loads(storage.get(keys.EVALUATION_BENCHMARKS)))
    except NotFoundError:
        return {"columns": COLUMNS, "rows": [], "made": {}}
