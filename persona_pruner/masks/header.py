"""The header of a mask object: its fields and their check, and the digest that covers every byte of the object.

Format: docs/mask-format.md. Masks of FFN channels and masks of single weights (`kind`) have most fields in common.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass
from safetensors.torch import save
from torch import Tensor

from persona_pruner.errors import MaskError
from persona_pruner.manifest import ID

Metadata = TypeVar("Metadata", bound="CommonMetadata")
FORMAT_VERSION = 2
_UNSEALED = "0" * 64
_RENAMED = {"loss_dense": "unpruned_loss", "loss_masked": "masked_loss"}
"""Field of version 1 to field of version 2."""


WEIGHTS = "weights"
"""`kind` of a mask of single weights."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(use_attribute_docstrings=True))
class CommonMetadata:
    """What masks of both kinds say about themselves."""

    persona_id: Annotated[str, Field(pattern=f"^{ID.pattern}$")]
    persona_sha256: str
    """Of the description, UTF-8."""
    persona_description: str = ""
    """The description itself, so that whoever serves the mask can put the persona in front of a conversation."""
    backbone: str
    """Name of the backbone."""
    backbone_fingerprint: str
    """sha256 over names, types, shapes and bytes of all weights of the backbone."""
    method: str
    """`learning.method`, or `imported` from an index file."""
    ratio: Annotated[float, Field(ge=0, lt=1)]
    """Share that was to be pruned; what is kept is rounded to learning.channel_multiple."""
    seed: int
    steps: Annotated[int, Field(ge=0)]
    unpruned_loss: FiniteFloat | None = None
    """Held-out loss of the unpruned backbone, nats per token."""
    masked_loss: FiniteFloat | None = None
    """Held-out loss under the mask, nats per token."""
    data_sha256: str = ""
    """Digest of the training and held-out rows."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Software that made it."""
    run_id: str = ""
    """Digest of the settings and contents that decide masks, and of the backbone."""
    opposite_sha256: str | None = None
    """Of the description of the opposed persona, where the method contrasts two."""

    def check(self, where: str, persona_id: str | None = None, backbone_fingerprint: str | None = None) -> None:
        """Raise MaskError where the mask belongs to another persona or backbone."""
        if persona_id is not None and self.persona_id != persona_id:
            raise MaskError(f"{where}: is the mask of persona {self.persona_id!r}, not of {persona_id!r}")
        if backbone_fingerprint is not None and self.backbone_fingerprint != backbone_fingerprint:
            raise MaskError(
                f"{where}: was made for backbone {self.backbone} with fingerprint {self.backbone_fingerprint[:16]}, "
                f"this one has {backbone_fingerprint[:16]}; use the backbone it was made for"
            )


@dataclass(frozen=True, kw_only=True, config=ConfigDict(use_attribute_docstrings=True))
class MaskMetadata(CommonMetadata):
    layers: Annotated[int, Field(ge=1)]
    channels: Annotated[int, Field(ge=1)]
    """FFN channels of one layer of the backbone."""
    kept: tuple[Annotated[int, Field(ge=0)], ...]
    """Channels that each layer keeps."""

    @model_validator(mode="after")
    def _consistent(self) -> "MaskMetadata":
        if len(self.kept) != self.layers:
            raise ValueError(f"kept names {len(self.kept)} layers, there are {self.layers}")
        if max(self.kept) > self.channels:
            raise ValueError(f"kept = {max(self.kept)} is more than the {self.channels} channels of a layer")
        return self


_ADAPTER = TypeAdapter(MaskMetadata)
_FIELDS = {field.name for field in dataclasses.fields(MaskMetadata)}


def header_schema() -> dict[str, Any]:
    """JSON schema of the header's metadata, values decoded."""
    schema = _ADAPTER.json_schema()
    schema["properties"] |= {"format_version": {"const": str(FORMAT_VERSION)}, "sha256": {"pattern": "^[0-9a-f]{64}$"}}
    schema["required"] += ["format_version", "sha256"]
    return schema


def to_header(metadata: CommonMetadata) -> dict[str, str]:
    """The metadata as a safetensors object carries them."""
    return {name: json.dumps(value) for name, value in dataclasses.asdict(metadata).items()}


def parse_header(header: Mapping[str, str], rows: int, where: str) -> MaskMetadata:
    """Checked metadata. `rows` is the number of layers that the tensors have. Raises MaskError."""
    try:
        values = {_RENAMED.get(name, name): json.loads(text) for name, text in header.items() if name in _KNOWN}
        if header["format_version"] == "1" and type(values.get("kept")) is int:
            values["kept"] = [values["kept"]] * rows
    except (ValueError, TypeError, RecursionError):
        raise MaskError(f"{where}: wrong header: a value is no JSON") from None
    return checked(_ADAPTER, values, where)


def checked(adapter: TypeAdapter[Metadata], values: Mapping[str, Any], where: str) -> Metadata:
    """Metadata of JSON values. Raises MaskError naming the first wrong field."""
    try:
        return adapter.validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        name = ".".join(map(str, fault["loc"]))
        message = fault["msg"].removeprefix("Value error, ")
        raise MaskError(f"{where}: wrong header: {f'{name}: ' if name else ''}{message}") from None


_KNOWN = _FIELDS | set(_RENAMED)


def metadata_of(data: bytes) -> dict[str, Any]:
    """The metadata of a safetensors object of which `data` is the beginning: the library reads it from files alone.

    Raises ValueError, KeyError or TypeError where there is none.
    """
    return json.loads(data[8 : 8 + _length(data)])["__metadata__"]


def read_header(data: bytes, where: str) -> dict[str, str]:
    """The metadata strings of a safetensors object of which `data` is the beginning. Raises MaskError where they are
    not those of a mask that this release reads."""
    try:
        header = metadata_of(data)
        if not all(isinstance(value, str) for value in header.values()):
            raise TypeError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise MaskError(f"{where}: not a mask: no readable header") from None
    version = header.get("format_version", "none")
    if not (version.isascii() and version.isdigit()) or not 1 <= int(version[:9]) <= FORMAT_VERSION:
        raise MaskError(f"{where}: mask format {version[:40]!r}; this release reads 1 to {FORMAT_VERSION}: update it")
    return dict(header)


def is_weight_level(header: Mapping[str, str]) -> bool:
    """Whether a header is that of a mask of single weights."""
    return header.get("kind") == json.dumps(WEIGHTS)


def seal(tensors: dict[str, Tensor], header: Mapping[str, str]) -> bytes:
    """A safetensors object whose metadata field `sha256` is the digest of the object with zeros in its place."""
    data = _sort_header(save(tensors, {**header, "format_version": str(FORMAT_VERSION), "sha256": _UNSEALED}))
    return data.replace(_seal_text(_UNSEALED), _seal_text(hashlib.sha256(data).hexdigest()), 1)


def is_sealed(data: bytes, header: Mapping[str, str]) -> bool:
    """Whether every byte of the object is as it was sealed."""
    stored = header.get("sha256", "")
    end = 8 + _length(data)
    beginning = data[:end]
    if len(stored) != len(_UNSEALED) or beginning.count(_seal_text(stored)) != 1:
        return False
    digest = hashlib.sha256(beginning.replace(_seal_text(stored), _seal_text(_UNSEALED)))
    digest.update(memoryview(data)[end:])
    return digest.hexdigest() == stored


def _seal_text(digest: str) -> bytes:
    return f'"sha256":"{digest}"'.encode()


def _length(data: bytes) -> int:
    """Of the JSON at the beginning of a safetensors object."""
    return int.from_bytes(data[:8], "little")


def _sort_header(data: bytes) -> bytes:
    """The same safetensors object with its header's keys in order: the library writes metadata in a random one."""
    size = _length(data)
    header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]
