import json
from pathlib import Path

import jsonschema
import pytest
from mask_examples import mask
from pydantic import ValidationError

from persona_pruner.errors import MaskError
from persona_pruner.masks.header import MaskMetadata, header_schema, is_sealed, parse_header, read_header, to_header

PUBLISHED = Path(__file__).parents[2] / "docs" / "mask-format.schema.json"


def test_the_published_schema_is_that_of_the_code_and_fits_a_mask():
    schema = json.loads(PUBLISHED.read_text())
    assert schema == header_schema()
    raw = read_header(mask().to_bytes(), "x")
    plain = {"format_version", "sha256"}
    jsonschema.validate({n: v if n in plain else json.loads(v) for n, v in raw.items()}, schema)
    assert set(raw) == set(schema["properties"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"format_version": "1"}, schema)


def test_the_seal_covers_the_whole_object_and_stands_once_in_its_header():
    data = mask().to_bytes()
    header = read_header(data, "x")
    assert is_sealed(data, header)
    assert not is_sealed(data + b" ", header)
    assert not is_sealed(data, {**header, "sha256": "0" * 64})
    assert not is_sealed(data, {})


def test_a_description_that_looks_like_a_seal_does_no_harm():
    text = f'"sha256":"{"0" * 64}" \\"sha256\\":\\"'
    made = mask()
    metadata = MaskMetadata(**{**vars(made.metadata), "persona_description": text})
    data = type(made)(made.keep_LI, metadata).to_bytes()
    assert type(made).from_bytes(data, "x").metadata.persona_description == text


@pytest.mark.parametrize(("version", "said"), [("3", "reads 1 to 2: update it"), ("old", "'old'"), ("0", "'0'")])
def test_other_versions_are_named(version, said):
    data = mask().to_bytes().replace(b'"format_version":"2"', f'"format_version":"{version}"'.encode())
    data = (len(data[8:].split(b"}}")[0])).to_bytes(8, "little") + data[8:] if len(version) > 1 else data
    with pytest.raises(MaskError, match=said if len(version) == 1 else "x: "):
        read_header(data, "x")


@pytest.mark.parametrize("data", [b"", b"\xff" * 8, b"\2" + bytes(7) + b"{}", b"\2" + bytes(7) + b"[]"])
def test_what_is_no_mask_is_told(data):
    with pytest.raises(MaskError, match="x: not a mask: no readable header"):
        read_header(data, "x")


def test_metadata_are_checked_when_they_are_made():
    fields = vars(mask().metadata)
    for wrong in ({"kept": (40, 40)}, {"ratio": 1.0}, {"persona_id": "a/b"}, {"channels": 0}, {"masked_loss": "much"}):
        with pytest.raises(ValidationError):
            MaskMetadata(**{**fields, **wrong})


def test_what_was_written_is_read():
    metadata = mask().metadata
    assert parse_header({**to_header(metadata), "format_version": "2"}, 3, "x") == metadata
