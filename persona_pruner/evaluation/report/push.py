"""Masks, model card, catalog, report and exported checkpoints published: on the Hugging Face hub, or in a storage.

Everything is first gathered in a directory, so that nothing is published where a part of it is wrong; then what has
changed since the last push is moved. `pushed.json` there says what was pushed: a file that is there, is not in it (or
was changed since) and would be overwritten is somebody else's, and ends the push before anything is moved.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from huggingface_hub.utils.sha import git_hash

from persona_pruner.config.schema import BackboneConfig
from persona_pruner.errors import UserError
from persona_pruner.evaluation.report.card import HUB, model_card
from persona_pruner.evaluation.report.data import read_report_data
from persona_pruner.evaluation.report.hub import HubTarget
from persona_pruner.evaluation.report.render import render
from persona_pruner.masks.store import MaskStore
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError, Storage
from persona_pruner.storage.open import open_storage

PUSHED = "pushed.json"
CARD = "README.md"
EXPORTED = "exported/"
CONNECTIONS = 16


@dataclass(frozen=True, kw_only=True)
class PushRequest:
    output: str
    to: str
    """hf://owner/name, s3://bucket/prefix or a directory."""
    checkpoints: tuple[str, ...] = ()
    """Personas whose masks are exported into checkpoints of `backbone`."""
    backbone: str | None = None
    base_model: str | None = None
    """The backbone's name on the hub, for the card."""
    private: bool = False
    """Of a repository on the hub that is made by this push."""
    overwrite: bool = False
    """Also what others have put there."""


@dataclass(frozen=True)
class Digests:
    sha256: str
    git: str
    """What git calls the content (sha1): the hub's name for a file that is not large."""

    @classmethod
    def of(cls, data: bytes) -> "Digests":
        return cls(hashlib.sha256(data).hexdigest(), git_hash(data))

    def names(self, digest: str) -> bool:
        return digest in (self.sha256, self.git)


@dataclass(frozen=True)
class Pushed:
    url: str
    moved: list[str]
    unchanged: int
    removed: list[str] = field(default_factory=list)
    """Parts of the catalog that this one replaces."""


class Target(Protocol):
    url: str

    def begin(self) -> None:
        """Raise UserError where nothing can be written there."""

    def files(self) -> dict[str, str | None]:
        """What is there, with its digest where it is known without reading it."""

    def read(self, path: str) -> bytes:
        """Raises NotFoundError."""

    def write(self, directory: Path, removed: Sequence[str]) -> None:
        """Store all files of the directory, PUSHED last, and remove those."""


class StorageTarget:
    """A bucket or a directory."""

    def __init__(self, to: str) -> None:
        self._storage = open_storage(to)
        self.url = self._storage.url

    def begin(self) -> None:
        self._storage.check_writable()

    def files(self) -> dict[str, str | None]:
        return {item.key: None for item in self._storage.list()}

    def read(self, path: str) -> bytes:
        return self._storage.get(path)

    def write(self, directory: Path, removed: Sequence[str]) -> None:
        paths = [path for path in _paths(directory) if path != PUSHED]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            list(pool.map(lambda path: self._storage.put(path, (directory / path).read_bytes()), paths))
        self._storage.put(PUSHED, (directory / PUSHED).read_bytes())
        for path in removed:
            self._storage.delete(path)


def push(request: PushRequest) -> Pushed:
    """Raises UserError where the request or an answer of the hub is one's fault, MaskError, StorageError."""
    store = MaskStore(request.output)
    target: Target = HubTarget(request.to, request.private) if request.to.startswith(HUB) else StorageTarget(request.to)
    if target.url == store.storage.url:
        raise UserError(f"--to {request.to}: is the output itself")
    if request.checkpoints and request.backbone is None:
        raise UserError("--checkpoint needs the backbone that the masks were made for: --backbone PATH")
    target.begin()
    with tempfile.TemporaryDirectory(prefix="persona-pruner-push-") as name:
        directory = Path(name)
        _gather(store, request, directory)
        return _move(target, directory, request.overwrite)


def _gather(store: MaskStore, request: PushRequest, to: Path) -> None:
    """Everything that is published, in one directory. Masks are verified."""
    storage = store.storage
    for persona_id in request.checkpoints:
        store.load_channels(persona_id)
    for _ in store.pull(store.ids(), to):
        pass
    for key in (
        keys.RUN,
        keys.EVALUATION_SUMMARY,
        keys.REPORT,
        CARD,
        *(item.key for item in storage.list(keys.CATALOG)),
    ):
        _copy(storage, key, to)
    if not ((to / keys.REPORT).exists() and (to / CARD).exists()):
        data = read_report_data(storage)
        if not (to / keys.REPORT).exists():
            (to / keys.REPORT).write_text(render(data), encoding="utf-8")
        if not (to / CARD).exists():
            card = model_card(data, to=request.to, base_model=request.base_model, checkpoints=request.checkpoints)
            (to / CARD).write_text(card, encoding="utf-8")
    for persona_id in request.checkpoints:
        from persona_pruner.backbone.export import export_pruned

        backbone = BackboneConfig(path=request.backbone or "", dtype="bfloat16")
        export_pruned(store.load_channels(persona_id), backbone, to / EXPORTED / persona_id)


def _copy(storage: Storage, key: str, to: Path) -> None:
    """If it is there."""
    try:
        data = storage.get(key)
    except NotFoundError:
        return
    (to / key).parent.mkdir(parents=True, exist_ok=True)
    (to / key).write_bytes(data)


def _move(target: Target, directory: Path, overwrite: bool) -> Pushed:
    digests = {path: Digests.of((directory / path).read_bytes()) for path in _paths(directory)}
    present = target.files()
    before = _pushed_before(target) if PUSHED in present else {}
    unchanged, foreign = set(), []
    for path, digest in digests.items():
        if path not in present:
            continue
        if before.get(path) == digest and present[path] is None:
            unchanged.add(path)
            continue
        there = present[path] or Digests.of(target.read(path)).sha256
        if digest.names(there):
            unchanged.add(path)
        elif not (path in before and before[path].names(there)):
            foreign.append(path)
    if foreign and not overwrite:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise UserError(
            f"{target.url}: {foreign[0]}{more} would be overwritten, and is not what was pushed there last; nothing "
            "was pushed: choose another place, or say --overwrite"
        )
    removed = [path for path in before if path.startswith(keys.CATALOG) and path in present and path not in digests]
    moved = [path for path in digests if path not in unchanged]
    if moved or removed or not before:
        kept = {path: digest for path, digest in before.items() if path not in removed}
        _write_pushed(directory, kept | digests)
        for path in unchanged:
            (directory / path).unlink()
        target.write(directory, removed)
    return Pushed(target.url, moved, len(unchanged), removed)


def _paths(directory: Path) -> Iterator[str]:
    return (path.relative_to(directory).as_posix() for path in sorted(directory.rglob("*")) if path.is_file())


def _pushed_before(target: Target) -> dict[str, Digests]:
    try:
        files = json.loads(target.read(PUSHED))["files"]
        return {path: Digests(*digests) for path, digests in files.items()}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{target.url}/{PUSHED}: is not one that a push has written; remove it first") from None


def _write_pushed(directory: Path, digests: Mapping[str, Digests]) -> None:
    files = {path: [one.sha256, one.git] for path, one in sorted(digests.items())}
    (directory / PUSHED).write_text(json.dumps({"files": files}, indent=0), encoding="utf-8")
