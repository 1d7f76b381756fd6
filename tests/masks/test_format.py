import dataclasses
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_examples import mask
from safetensors.torch import load, save

from persona_pruner.errors import MaskError
from persona_pruner.masks.format import Mask
from persona_pruner.masks.header import seal, to_header


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
    out = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parents[1])], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == hashlib.sha256(mask().to_bytes()).hexdigest()


def test_a_mask_of_28_layers_is_small():
    assert len(mask(layers=28, channels=8192, kept=4096).to_bytes()) <= 30_000


@pytest.mark.parametrize("scores", [False, True])
def test_every_flipped_bit_of_the_whole_object_is_noticed(scores):
    data = bytearray(mask(channels=20, kept=8, scores=scores).to_bytes())
    for position in range(len(data)):
        for bit in range(8):
            data[position] ^= 1 << bit
            with pytest.raises(MaskError, match=r"^masks/ada: [^\n]*$"):
                Mask.from_bytes(bytes(data), "masks/ada")
            data[position] ^= 1 << bit
    assert Mask.from_bytes(bytes(data), "masks/ada")


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 50, 500, -1])
def test_truncation_is_noticed(cut):
    with pytest.raises(MaskError, match="masks/ada"):
        Mask.from_bytes(mask().to_bytes()[:cut], "masks/ada")


def packed(made):
    return torch.from_numpy(np.packbits(made.keep_LI.numpy(), axis=1, bitorder="little"))


def sealed(changes=None, drop=(), **tensors):
    """An object of other content whose digest is right: what a faulty or hostile writer can make."""
    made = mask()
    header = {name: text for name, text in (to_header(made.metadata) | (changes or {})).items() if name not in drop}
    return seal({"keep": packed(made)} | tensors, header)


@pytest.mark.parametrize(
    ("changes", "drop", "said"),
    [
        ({"kept": "[40, 40, 41]"}, (), "layer 2 keeps 40 channels, the header says 41"),
        ({"kept": "40"}, (), "kept: Input should be"),
        ({"kept": "null"}, (), "kept: Input should be"),
        ({"kept": "[40, 40]"}, (), "kept names 2 layers, there are 3"),
        ({"kept": "[40, 40, 101]"}, (), "more than the 100 channels"),
        ({"layers": "4"}, (), "kept names 3 layers, there are 4"),
        ({"channels": "200"}, (), r"keep is uint8 \[3, 13\], not uint8 \[3, 25\]"),
        ({"channels": '"x"'}, (), "channels: Input should be a valid integer"),
        ({"channels": "1e2"}, (), "channels: "),
        ({"ratio": "[1]"}, (), "ratio: Input should be a valid number"),
        ({"ratio": "NaN"}, (), "ratio"),
        ({"unpruned_loss": "[1]"}, (), "unpruned_loss: "),
        ({"persona_id": '"../x"'}, (), "persona_id: "),
        ({"versions": '{"torch": 2}'}, (), "versions.torch: "),
        ({"seed": "{"}, (), "no JSON"),
        ({"seed": "[" * 100_000}, (), "no JSON"),
        ({}, ("persona_id",), "persona_id: "),
    ],
)
def test_wrong_header_is_one_clear_line(changes, drop, said):
    with pytest.raises(MaskError, match=said) as caught:
        Mask.from_bytes(sealed(changes, drop), "masks/ada")
    assert str(caught.value).startswith("masks/ada: ")
    assert "\n" not in str(caught.value)


def with_padding_bit():
    bits = packed(mask())
    bits[1, -1] |= 0x80
    return bits


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"keep": packed(mask())[0]}, r"kept names 3|keep is uint8 \[13\]"),
        ({"keep": packed(mask())[..., None]}, r"keep is uint8 \[3, 13, 1\]"),
        ({"keep": packed(mask()).short()}, r"keep is int16 \[3, 13\]"),
        ({"keep": torch.tensor(1, dtype=torch.uint8)}, r"keep is uint8 \[\]"),
        ({"keep": torch.zeros(0, 13, dtype=torch.uint8)}, r"keep is uint8 \[0, 13\]"),
        ({"keep": with_padding_bit()}, "bits beyond the 100 channels"),
        ({"scores": torch.rand(3, 99).half()}, r"scores are float16 \[3, 99\], not float16 \[3, 100\]"),
        ({"scores": torch.rand(3, 100)}, "scores are float32"),
    ],
)
def test_tensors_that_do_not_fit_the_header_are_refused(tensors, said):
    with pytest.raises(MaskError, match=said) as caught:
        Mask.from_bytes(sealed(**tensors), "masks/ada")
    assert "\n" not in str(caught.value)


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
).map(json.dumps)
SHAPES = st.lists(st.integers(0, 14), max_size=3)


@given(
    st.dictionaries(
        st.sampled_from([field.name for field in dataclasses.fields(mask().metadata)]), ANY_JSON | st.text()
    ),
    st.none() | SHAPES,
    st.none() | SHAPES,
    st.sampled_from([torch.uint8, torch.float16, torch.int64, torch.bool]),
    st.sampled_from(["1", "2"]),
)
@settings(max_examples=300, deadline=None)
def test_whatever_is_in_a_mask_it_is_read_or_refused_in_one_line(changes, keep, scores, dtype, version):
    tensors = {} if keep is None else {"keep": torch.zeros(keep, dtype=dtype)}
    tensors |= {} if scores is None else {"scores": torch.zeros(scores, dtype=dtype)}
    data = sealed(changes, **tensors)
    if version == "1":
        header = to_header(mask().metadata) | {"kept": "40"} | changes
        keep_sha256 = hashlib.sha256(load(data)["keep"].numpy().tobytes()).hexdigest()
        data = save(load(data), header | {"format_version": "1", "keep_sha256": keep_sha256})
    try:
        read, refusal = Mask.from_bytes(data, "masks/ada"), None
    except MaskError as error:
        read, refusal = None, str(error)
    if read is None:
        assert re.fullmatch(r"masks/ada: [^\n]+", refusal)
    else:
        assert read.keep_LI.sum(1).tolist() == list(read.metadata.kept)


def version_1(**changes):
    made = mask()
    header = to_header(made.metadata)
    old = {"loss_dense": header.pop("unpruned_loss"), "loss_masked": header.pop("masked_loss"), "kept": "40"}
    digest = hashlib.sha256(packed(made).numpy().tobytes()).hexdigest()
    return save({"keep": packed(made)}, header | old | {"format_version": "1", "keep_sha256": digest} | changes)


def test_version_1_is_read():
    read = Mask.from_bytes(version_1(), "x")
    assert torch.equal(read.keep_LI, mask().keep_LI)
    assert read.metadata == mask().metadata


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep_sha256": "0"}, "do not match"),
        ({"kept": "41"}, "says 41"),
        ({"kept": '"x"'}, "kept"),
        ({"layers": "2"}, "l"),
    ],
)
def test_wrong_version_1_is_refused(changes, said):
    with pytest.raises(MaskError, match=said):
        Mask.from_bytes(version_1(**changes), "x")


def test_layers_may_keep_different_numbers_of_channels(tmp_path):
    made = mask()
    keep_LI = made.keep_LI.clone()
    keep_LI[1] = True
    uneven = dataclasses.replace(made.metadata, kept=(40, 100, 40))
    read = Mask.from_bytes(Mask(keep_LI, uneven).to_bytes(), "x")
    assert torch.equal(read.keep_LI, keep_LI)
    assert [len(indices) for indices in read.keep_indices()] == [40, 100, 40]
    with pytest.raises(MaskError, match="keep 40 to 100 channels"):
        read.save_keep_indices(tmp_path / "a.pt")


def test_unknown_fields_of_a_later_minor_release_are_ignored():
    assert Mask.from_bytes(sealed({"mood": '"good"'}), "x").metadata == mask().metadata


def test_another_personas_or_backbones_mask_is_refused_with_both_values():
    with pytest.raises(MaskError, match=r"'ada', not of 'bo'"):
        mask().check("masks/bo", persona_id="bo")
    with pytest.raises(MaskError, match=r"ffffffffffffffff.*0000000000000000"):
        mask().check("masks/ada", backbone_fingerprint="0" * 64)


def test_similarity_is_the_jaccard_index():
    one = mask()
    other = dataclasses.replace(one, keep_LI=one.keep_LI.roll(1, 1))
    assert one.similarity(one) == 1
    both = (one.keep_LI & other.keep_LI).sum() / (one.keep_LI | other.keep_LI).sum()
    assert one.similarity(other) == pytest.approx(both.item())
