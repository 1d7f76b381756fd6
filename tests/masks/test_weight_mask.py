import hashlib

import pytest
import torch
from mask_examples import mask
from mask_examples import weight_mask as example
from safetensors.torch import load

from persona_pruner.errors import MaskError
from persona_pruner.masks.catalog import build_catalog
from persona_pruner.masks.format import Mask
from persona_pruner.masks.header import seal, to_header
from persona_pruner.masks.store import MaskStore
from persona_pruner.masks.weight_mask import WeightMask, pack, read_mask, unpack
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage

SHAPES = {"layers.0.q_proj": (6, 20, 8), "layers.0.up_proj": (3, 8, 3)}


def weight_mask(persona_id="ada", seed=0, **metadata):
    return example(persona_id, seed, SHAPES, **metadata)


def test_round_trip_and_the_same_mask_has_the_same_bytes():
    made = weight_mask(gate=0.25)
    read = read_mask(made.to_bytes(), "here")
    assert isinstance(read, WeightMask)
    assert read.metadata == made.metadata
    assert all(torch.equal(read.keep(name), made.keep(name)) for name in SHAPES)
    assert weight_mask(gate=0.25).to_bytes() == made.to_bytes()
    assert isinstance(read_mask(mask().to_bytes(), "here"), Mask)


def test_packing_is_the_documented_one():
    keep = torch.rand(5, 20, generator=torch.Generator().manual_seed(0)) > 0.5
    packed = pack(keep)
    assert packed.shape == (5, 3)
    assert torch.equal(unpack(packed, 20), keep)
    assert all(packed[r, c // 8].item() >> c % 8 & 1 == keep[r, c].item() for r in range(5) for c in range(20))


def test_a_flipped_bit_and_a_wrong_count_are_noticed():
    data = bytearray(weight_mask().to_bytes())
    for position in range(0, len(data), 37):
        data[position] ^= 4
        with pytest.raises(MaskError, match=r"^masks/ada: [^\n]*$"):
            read_mask(bytes(data), "masks/ada")
        data[position] ^= 4
    good = weight_mask()
    tensors = load(good.to_bytes())
    header = to_header(good.metadata)
    missing = {name: bits for name, bits in tensors.items() if "up_proj" not in name}
    with pytest.raises(MaskError, match=r"layers.0.up_proj: bits are not uint8 \[3, 1\]"):
        WeightMask.from_bytes(seal(missing, header), "x")
    more = {**tensors, "keep.layers.0.up_proj": torch.full((3, 1), 0b1111, dtype=torch.uint8)}
    with pytest.raises(MaskError, match="a row keeps 4 weights, the header says 3"):
        WeightMask.from_bytes(seal(more, header), "x")


def test_what_needs_channels_refuses_it_with_the_reason():
    with pytest.raises(MaskError, match=r'mask of single weights \("wanda"\).* neither exported nor served'):
        Mask.from_bytes(weight_mask().to_bytes(), "x")
    with pytest.raises(MaskError, match="is a mask of FFN channels"):
        WeightMask.from_bytes(mask().to_bytes(), "x")


def test_a_store_holds_both_kinds(tmp_path):
    storage = open_storage(tmp_path / "out")
    for one in (weight_mask("ada"), mask("ben")):
        storage.put(keys.mask(one.metadata.persona_id), one.to_bytes())
    store = MaskStore(tmp_path / "out")
    assert isinstance(store.load("ada"), WeightMask)
    assert isinstance(store.load_channels("ben"), Mask)
    with pytest.raises(MaskError, match="neither exported nor served"):
        store.load_channels("ada")
    assert store.verify() == 2
    rows = build_catalog(storage).to_pylist()
    assert [(row["persona_id"], row["method"], row["kept"]) for row in rows] == [
        ("ada", "wanda", 6 * 8 + 3 * 3), ("ben", "ste", 120)
    ]  # fmt: skip
    pulled = {one.persona_id: one.path for one in store.pull(["ada", "ben"], tmp_path / "to")}
    assert hashlib.sha256(pulled["ada"].read_bytes()).digest() == hashlib.sha256(weight_mask().to_bytes()).digest()
    with pytest.raises(MaskError, match="neither exported nor served"):
        list(store.pull(["ada"], tmp_path / "indices", indices=True))


def test_similarity_is_over_all_matrices_or_over_some():
    one, other = weight_mask(seed=0), weight_mask(seed=1)
    assert one.similarity(one) == 1
    both = sum((one.keep(name) & other.keep(name)).sum().item() for name in SHAPES)
    either = sum((one.keep(name) | other.keep(name)).sum().item() for name in SHAPES)
    assert one.similarity(other) == both / either
    assert one.similarity(other, "q_proj") != one.similarity(other, "up_proj")
