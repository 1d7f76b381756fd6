"""The packaged example in a directory, or a commented configuration for a model and its questions."""

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from persona_pruner.config.load import load_config
from persona_pruner.config.schema import SourceConfig
from persona_pruner.errors import ConfigError, SourceError
from persona_pruner.manifest import read_manifest
from persona_pruner.run.preflight import check_backbone

EXAMPLE = Path(__file__).parents[1] / "example"
CONFIG = "run.yaml"
QUESTION_COLUMNS = ("instruction", "question", "prompt", "query", "text")
ANSWER_COLUMNS = ("output", "answer", "response", "completion", "chosen")
INPUT_COLUMNS = ("input", "context")


@dataclass(frozen=True)
class Columns:
    """Which columns of a file of questions are what; `others` are not used."""

    question: str
    answer: str | None
    input: str | None
    others: tuple[str, ...]


def copy_example(to: Path) -> list[Path]:
    """Write the packaged example (personas, questions, a small model, run.yaml) into a directory.

    Raises ConfigError, with nothing written, where a file of it exists already.
    """
    names = sorted(path.name for path in EXAMPLE.iterdir() if path.name != "__pycache__")
    _refuse_existing(to / name for name in names)
    to.mkdir(parents=True, exist_ok=True)
    for name in names:
        source = EXAMPLE / name
        if source.is_dir():
            shutil.copytree(source, to / name)
        else:
            shutil.copyfile(source, to / name)
    return [to / name for name in names]


def write_config(to: Path, backbone: str, questions: Sequence[str], personas: str | None = None) -> Path:
    """Write a commented run.yaml for a model and files of questions, columns found. Returns its path.

    A model on this machine is checked as a run would. Raises ConfigError, SourceError, BackboneError, ManifestError,
    and leaves no file then.
    """
    file = to / CONFIG
    _refuse_existing([file])
    if personas is not None:
        read_manifest(personas)
    sources = [(path, find_columns(path)) for path in questions]
    to.mkdir(parents=True, exist_ok=True)
    model = Path(backbone)
    values = _read_json(model / "config.json") if model.is_dir() else {}
    file.write_text(_render(to, backbone, sources, values), encoding="utf-8")
    try:
        config = load_config(file)
        if model.is_dir():
            check_backbone(config, model)
    except Exception:
        file.unlink()
        raise
    return file


def find_columns(path: str) -> Columns:
    """Columns by their usual names, else the first with text. Raises SourceError."""
    from persona_pruner.synthesis.sources import first_row

    row = first_row(SourceConfig(path=path))
    text = [name for name, value in row.items() if isinstance(value, str)]

    def first(names: Iterable[str]) -> str | None:
        return next((name for name in names if name in text), None)

    question = first(QUESTION_COLUMNS) or first(text)
    if question is None:
        raise SourceError(f"source {path}: no column holds text; found {', '.join(row)}")
    answer, extra = first(ANSWER_COLUMNS), first(INPUT_COLUMNS)
    used = {question, answer, extra}
    return Columns(question, answer, extra, tuple(name for name in row if name not in used))


def _refuse_existing(files: Iterable[Path]) -> None:
    existing = [str(file) for file in files if file.exists()]
    if existing:
        raise ConfigError(f"{existing[0]}: exists already; move it away or name another directory")


def _read_json(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _render(to: Path, backbone: str, sources: Sequence[tuple[str, Columns]], model: dict[str, Any]) -> str:
    own_type = str(model.get("dtype") or model.get("torch_dtype") or "bfloat16")
    dtype = "float32" if own_type == "float32" else "bfloat16"
    gpus = _gpus()
    multiple = 64 if model.get("intermediate_size", 64) % 64 == 0 else 8
    return f"""\
# A run of persona-pruner. `persona-pruner config` explains every setting; those not named here keep their defaults.
backbone:
  path: {_quoted(_from(to, backbone))}
  dtype: {dtype}  # the type of its weights here: {own_type}

synthesis:
  sources:  # questions; each persona is asked those that reveal it most
{"".join(_render_source(to, path, columns) for path, columns in sources)}\
  select:
    k: 128  # questions per persona
  rewrite:
    backend: self  # the model answers in the persona's voice; or openai, vllm: see `persona-pruner config`
    samples_per_question: 1
    max_new_tokens: 160  # raise it where answers are cut off

learning:
  ratio: 0.25  # share of FFN channels that is pruned
  channel_multiple: {multiple}  # kept channels per layer are a multiple of this
  steps: 100

gpus: {gpus}  # as many as this machine has, each with a copy of the model that scores, answers or trains, what waits

evaluation:
  enabled: true  # compare each mask with baselines at the end
"""


def _render_source(to: Path, path: str, columns: Columns) -> str:
    unused = f"  # also there: {', '.join(columns.others)}" if columns.others else ""
    return (
        f"    - path: {_quoted(_from(to, path))}\n"
        f"      question: {_quoted(columns.question)}{unused}\n"
        f"      input: {_quoted(columns.input)}  # text that follows the question; null where there is none\n"
        f"      answer: {_quoted(columns.answer)}  # the original answer; null where there is none\n"
    )


def _quoted(value: str | None) -> str:
    return json.dumps(value, ensure_ascii=False)


def _from(directory: Path, path: str) -> str:
    """A path as the configuration file in `directory` names it. Addresses and hub names stay as they are."""
    if "://" in path or not Path(path).exists():
        return path
    absolute = Path(path).resolve()
    inside = absolute.is_relative_to(directory.resolve())
    return f"./{absolute.relative_to(directory.resolve())}" if inside else str(absolute)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
