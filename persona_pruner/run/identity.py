"""What a run is: the settings and the contents that can change a mask. Two runs with one id make the same masks."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from persona_pruner.backbone.files import fingerprint, resolve
from persona_pruner.config.schema import RunConfig, SourceConfig, SynthesisConfig
from persona_pruner.config.section import hashed_contents, hashed_settings
from persona_pruner.dataset import read_generic_rows
from persona_pruner.errors import ConfigError
from persona_pruner.manifest import Persona, read_manifest
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, Storage
from persona_pruner.storage.open import local_copy, open_storage
from persona_pruner.synthesis.sensitivity import choose_references
from persona_pruner.synthesis.sources import load_question_set

FORMAT = 2
WRITTEN_BY_LIBRARIES = ("_name_or_path", "transformers_version")
"""Values in a model's JSON files that say who wrote them and nothing about the model."""


@dataclass(frozen=True)
class Identity:
    """What makes two runs the same: marked settings, contents that they name, the backbone, the references."""

    config: RunConfig
    backbone: str
    fingerprint: str
    path: Path
    contents: dict[str, str]
    """Setting to the sha256 of what it names."""
    references: tuple[Persona, ...]
    """Candidates for reference personas. Those drawn from the manifest stay those of the first submission, so that a
    manifest can grow without changing what its earlier personas were compared with."""

    @cached_property
    def run_id(self) -> str:
        parts = [hashed_settings(self.config), self.contents, self.fingerprint]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def document(self) -> dict[str, Any]:
        """run.json."""
        return {
            "format": FORMAT,
            "run_id": self.run_id,
            "backbone": {"name": self.backbone, "fingerprint": self.fingerprint},
            "settings": hashed_settings(self.config),
            "contents": self.contents,
            "references": [{"id": p.id, "description": p.description} for p in self.references],
        }


def identify(config: RunConfig, personas: Sequence[Persona], storage: Storage) -> Identity:
    """The identity of a run of `personas` (the whole manifest) into `storage`.

    Raises BackboneError where there is no usable backbone, ConfigError, SourceError or ManifestError where something
    that the configuration names cannot be read.
    """
    path = resolve(config.backbone)
    references = _references(config, personas, storage)
    contents = {
        "backbone.path": _digest_backbone_files(path),
        "synthesis.references": _sha256(f"{p.id} {p.sha256}".encode() for p in references),
    }
    for name, at in hashed_contents(config).items():
        match name.split("."):
            case ["synthesis", "sources", number, "path"]:
                contents[name] = _digest_source(config.synthesis.sources[int(number)])
            case ["evaluation", "questions"]:
                contents[name] = _digest_directory(config, at)
            case ["learning", "objective", "generic_rows"]:
                contents[name] = _sha256(f"{row}".encode() for row in read_generic_rows(at))
            case ["synthesis", "references", "path"]:
                pass  # its personas are the references
            case _:
                raise NotImplementedError(f"{name} is marked HashedContent, and nobody reads it here")
    return Identity(config, path.name, fingerprint(path), path, contents, references)


def check_run(storage: Storage, identity: Identity) -> None:
    """Raise ConfigError where the output was made with other settings or another backbone; name what differs."""
    stored = _stored_document(storage)
    if stored is None or stored["run_id"] == identity.run_id:
        return
    if stored.get("format") != FORMAT:
        raise ConfigError(
            f"{storage.url}: run.json has format {stored.get('format')}, this release goes on with {FORMAT} only; use "
            "another output (the masks that are there can still be pulled)"
        )
    here = identity.document()
    differences = [
        f"{name} is {_show(old)} there and {_show(new)} here"
        for name, old, new in _differences(stored["settings"], here["settings"])
    ]
    differences += [
        f"the content of {name} has sha256 {old[:12]} there and {new[:12]} here"
        for name, old, new in _differences(stored["contents"], here["contents"])
    ]
    if stored["backbone"]["fingerprint"] != identity.fingerprint:
        differences.append(
            f"the backbone is {stored['backbone']['name']} {stored['backbone']['fingerprint'][:12]} there and "
            f"{identity.backbone} {identity.fingerprint[:12]} here"
        )
    raise ConfigError(
        f"{storage.url}: was made with another configuration: {'; '.join(differences[:5])}; "
        "use the same settings or another output"
    )


def _stored_document(storage: Storage) -> dict[str, Any] | None:
    try:
        return dict(json.loads(storage.get(keys.RUN)))
    except NotFoundError:
        return None


def _references(config: RunConfig, personas: Sequence[Persona], storage: Storage) -> tuple[Persona, ...]:
    settings = config.synthesis.references
    if settings.path is not None:
        personas = read_manifest(settings.path).personas
    else:
        stored = _stored_document(storage) or {}
        if stored.get("references"):
            return tuple(Persona(row["id"], row["description"]) for row in stored["references"])
    return tuple(choose_references(personas, settings.count, config.synthesis.seed))


def _digest_source(source: SourceConfig) -> str:
    """Of the files' bytes in the order of their names; of the questions where it is a data set of a hub."""
    try:
        path = local_copy(source.path)
    except NotFoundError as error:
        raise ConfigError(f"synthesis.sources: {error}") from None
    if not path.exists():
        questions = load_question_set(SynthesisConfig(sources=(source,)))
        return _sha256(json.dumps([q.text, q.answer]).encode() for q in questions)
    files = sorted(p for p in path.rglob("[!.]*") if p.is_file()) if path.is_dir() else [path]
    return _sha256(_file_digest(file) for file in files)


def _digest_directory(config: RunConfig, path: str) -> str:
    """Of names and contents of all files: a file's name says which persona it is for."""
    storage = open_storage(path, config.storage)
    names = [item.key for item in storage.list()]
    if not names:
        raise ConfigError(f"evaluation.questions = {path}: there are no files")
    with ThreadPoolExecutor(config.storage.connections) as pool:
        contents = pool.map(lambda name: hashlib.sha256(storage.get(name)).digest(), names)
        return _sha256(part for name, content in zip(names, contents, strict=True) for part in (name.encode(), content))


def _digest_backbone_files(path: Path) -> str:
    """Of the files beside the weights that decide what the model reads and computes: its configuration, its tokenizer
    and its chat template."""
    parts = []
    for file in sorted(path.iterdir()):
        if file.name in ("config.json", "tokenizer_config.json"):
            values = json.loads(file.read_text(encoding="utf-8"))
            kept = {name: value for name, value in values.items() if name not in WRITTEN_BY_LIBRARIES}
            parts += [file.name.encode(), json.dumps(kept, sort_keys=True).encode()]
        elif file.name.startswith(("tokenizer", "chat_template", "vocab", "merges", "special_tokens", "added_tokens")):
            parts += [file.name.encode(), _file_digest(file)]
    return _sha256(parts)


def _file_digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted({*old, *new})
        return [d for key in names for d in _differences(old.get(key), new.get(key), f"{name}.{key}".strip("."))]
    return [] if old == new else [(name, old, new)]


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
