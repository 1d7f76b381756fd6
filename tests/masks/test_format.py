import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mask_examples import mask
from safetensors.torch import load, save

from persona_pruner.errors import MaskError
from persona_pruner.masks.format import Mask, load_keep_indices, metadata_of, read_header


@pytest.mark.parametrize("channels", [1, 8, 100, 8192])
@pytest.mark.parametrize("scores", [False, True])
def test_round_trip(channels, scores):
    made = mask(channels=channels, kept=max(1, channels // 2), scores=scores)
    read = Mask.from_bytes(made.to_bytes(), "here")
    assert torch.equal(read.keep_LI, made.keep_LI)
    assert read.metadata == made.metadata
    assert (read.scores_LI is None) is (not scores)


def test_packing_is_the_documented_one():
    packed = load(mask(channels=20, kept=7).to_bytes())["keep"]
    keep_LI = mask(channels=20, kept=7).keep_LI
    for layer in range(3):
        for channel in range(20):
            bit = packed[layer, channel // 8].item() >> channel % 8 & 1
            assert bit == keep_LI[layer, channel].item()


def test_same_mask_same_bytes_in_another_process():
    code = "import sys, hashlib; sys.path.insert(0, sys.argv[1]); from mask_examples import mask; "
    code += "print(hashlib.sha256(mask().to_bytes()).hexdigest())"
    import hashlib

    out = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parents[1])], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == hashlib.sha256(mask().to_bytes()).hexdigest()


def test_a_mask_of_28_layers_is_small():
    assert len(mask(layers=28, channels=8192, kept=4096).to_bytes()) <= 30_000


def test_every_flipped_bit_of_the_channels_is_noticed():
    data = bytearray(mask().to_bytes())
    start = len(data) - 3 * 13
    for position in range(start, len(data)):
        data[position] ^= 4
        with pytest.raises(MaskError, match="masks/ada"):
            Mask.from_bytes(bytes(data), "masks/ada")
        data[position] ^= 4


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 50, 500, -1])
def test_truncation_is_noticed(cut):
    with pytest.raises(MaskError, match="masks/ada"):
        Mask.from_bytes(mask().to_bytes()[:cut], "masks/ada")


def header(changes, drop=()):
    data = mask().to_bytes()
    old = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    new = {name: value for name, value in (old | changes).items() if name not in drop}
    return save(load(data), new)


@pytest.mark.parametrize(
    ("changes", "drop", "said"),
    [
        ({"format_version": "2"}, (), "reads up to 1: update it"),
        ({"format_version": "old"}, (), "mask format old"),
        ({"kept": "41"}, (), "not so"),
        ({"layers": "4"}, (), "not so"),
        ({"channels": "200"}, (), "not a whole mask"),
        ({"keep_sha256": "0"}, (), "do not match"),
        ({}, ("persona_id",), "wrong header"),
        ({}, ("keep_sha256",), "do not match"),
    ],
)
def test_wrong_header_is_one_clear_line(changes, drop, said):
    with pytest.raises(MaskError, match=said) as caught:
        Mask.from_bytes(header(changes, drop), "masks/ada")
    assert str(caught.value).startswith("masks/ada")
    assert "\n" not in str(caught.value)


def test_unknown_fields_of_a_later_minor_release_are_ignored():
    assert Mask.from_bytes(header({"mood": '"good"'}), "x").metadata == mask().metadata


def test_another_personas_or_backbones_mask_is_refused_with_both_values():
    with pytest.raises(MaskError, match=r"'ada', not of 'bo'"):
        mask().check("masks/bo", persona_id="bo")
    with pytest.raises(MaskError, match=r"ffffffffffffffff.*0000000000000000"):
        mask().check("masks/ada", backbone_fingerprint="0" * 64)


def test_metadata_needs_only_the_beginning():
    made = mask(layers=28, channels=8192, kept=4096)
    assert metadata_of(made.to_bytes()[:4096], "x") == made.metadata


def test_index_files_go_out_and_in(tmp_path):
    made = mask()
    made.save_keep_indices(tmp_path / "a.pt")
    indices = torch.load(tmp_path / "a.pt", weights_only=True)
    assert indices.dtype == torch.int64
    assert indices.shape == (3, 40)
    assert torch.equal(indices, indices.sort(1).values)
    assert torch.equal(load_keep_indices(tmp_path / "a.pt", 100), made.keep_LI)


@pytest.mark.parametrize(
    "content", [torch.ones(2, 3), {"a": 1}, torch.tensor([[1, 1]]), torch.tensor([[100]]), torch.tensor([[-1]])]
)
def test_bad_index_files_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(MaskError, match=r"a\.pt"):
        load_keep_indices(tmp_path / "a.pt", 100)


def test_index_file_that_would_run_code_is_refused(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    (tmp_path / "a.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(MaskError, match="not an index file"):
        load_keep_indices(tmp_path / "a.pt", 100)


def test_similarity_is_the_jaccard_index():
    one = mask()
    other = dataclasses.replace(one, keep_LI=one.keep_LI.roll(1, 1))
    assert one.similarity(one) == 1
    both = (one.keep_LI & other.keep_LI).sum() / (one.keep_LI | other.keep_LI).sum()
    assert one.similarity(other) == pytest.approx(both.item())


def test_header_fits_the_published_schema():
    import jsonschema

    schema = json.loads((Path(__file__).parents[2] / "docs" / "mask-format.schema.json").read_text())
    raw = read_header(mask().to_bytes(), "x")
    plain = {"format_version", "keep_sha256"}
    decoded = {name: value if name in plain else json.loads(value) for name, value in raw.items()}
    jsonschema.validate(decoded, schema)
    assert set(decoded) == set(schema["properties"])
