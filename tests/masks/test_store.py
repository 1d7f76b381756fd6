import json
import os

import pytest
import torch
from mask_examples import mask

from persona_pruner import MaskStore
from persona_pruner.errors import ConfigError, Faults, MaskError, StorageError
from persona_pruner.manifest import Persona
from persona_pruner.masks.catalog import build_catalog
from persona_pruner.masks.store import garbage, orphans
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError
from persona_pruner.storage.open import open_storage


@pytest.fixture
def output(tmp_path):
    storage = open_storage(tmp_path / "out")
    for number, name in enumerate(["ada", "bo", "cy"]):
        storage.put(keys.mask(name), mask(name, seed=number).to_bytes())
    return storage


def test_load_and_list(output):
    store = MaskStore(output.url)
    assert store.ids() == ["ada", "bo", "cy"]
    assert store.load("bo").metadata.persona_id == "bo"
    with pytest.raises(NotFoundError, match="no mask of persona 'dee'"):
        store.load("dee")


def test_pull_verifies_and_does_not_fetch_again(output, tmp_path):
    store, to = MaskStore(output.url), tmp_path / "to"
    assert [p.fresh for p in store.pull(["ada", "bo"], to)] == [True, True]
    (to / keys.mask("bo")).write_bytes(b"half")
    assert [(p.persona_id, p.fresh) for p in store.pull(store.ids(), to)] == [
        ("ada", False),
        ("bo", True),
        ("cy", True),
    ]
    assert MaskStore(to).verify() == 3


def test_swapped_mask_is_noticed_everywhere(output, tmp_path):
    output.put(keys.mask("bo"), output.get(keys.mask("ada")))
    store = MaskStore(output.url)
    for call in (
        lambda: store.load("bo"),
        lambda: list(store.pull(["bo"], tmp_path / "to")),
        lambda: build_catalog(output),
    ):
        with pytest.raises(MaskError, match=r"masks/\w\w/bo/mask.safetensors: is the mask of persona 'ada'"):
            call()
    with pytest.raises(Faults, match=r"masks/../bo"):
        store.verify()
    assert not (tmp_path / "to" / keys.mask("bo")).exists()


def test_pull_refuses_ids_that_leave_the_directory(output, tmp_path):
    with pytest.raises(StorageError):
        list(MaskStore(output.url).pull(["../ada"], tmp_path / "to"))
    assert not (tmp_path / "to").exists() or not list((tmp_path / "to").rglob("*"))


def test_indices_for_the_published_exporter(output, tmp_path):
    (pulled,) = MaskStore(output.url).pull(["ada"], tmp_path / "to", indices=True)
    assert torch.load(pulled.path, weights_only=True).shape == (3, 40)


def test_where_filters_by_metadata(output):
    store = MaskStore(output.url)
    assert store.where(["ratio==0.6"]) == ["ada", "bo", "cy"]
    assert store.where(["ratio==0.6", "seed>0", "persona_id!=cy"]) == ["bo"]
    for bad in ("mood==1", "ratio", "ratio==high", "__import__('os')==1"):
        with pytest.raises(ConfigError, match="--where"):
            store.where([bad])


def test_garbage_spares_whoever_has_no_mask(output):
    output.put(keys.checkpoint("ada"), b"x")
    output.put(keys.checkpoint("dee"), b"x")
    output.put(keys.persona_data("bo"), b"x")
    output.put(keys.error("dee"), json.dumps({}).encode())
    output.put(keys.mask("cy"), b"broken")
    output.put(keys.checkpoint("cy"), b"x")
    assert garbage(output) == [keys.checkpoint("ada")], "inspect and the evaluation read the data"
    assert garbage(output, data=True) == [keys.checkpoint("ada"), keys.persona_data("bo")]


def test_share_needs_an_object_storage(output):
    with pytest.raises(StorageError, match="object storage only"):
        MaskStore(output.url).share("ada", 60)


def test_one_bad_mask_does_not_stop_the_pull_of_the_others(output, tmp_path):
    output.put(keys.mask("ada"), b"broken")
    pulled = []
    with pytest.raises(MaskError, match=r"masks/../ada/mask\.safetensors"):
        pulled.extend(p.persona_id for p in MaskStore(output.url).pull(["ada", "bo", "cy"], tmp_path / "to"))
    assert MaskStore(tmp_path / "to").ids() == ["bo", "cy"]
    output.put(keys.mask("bo"), b"broken")
    with pytest.raises(Faults) as caught:
        list(MaskStore(output.url).pull(["ada", "bo"], tmp_path / "again"))
    assert len(caught.value.lines) == 2


def test_index_file_of_the_published_code_becomes_a_mask(output, tmp_path):
    store = MaskStore(output.url)
    made = mask("dee", seed=5)
    made.save_keep_indices(tmp_path / "dee.pt")
    backbone = {"layers": 3, "channels": 100, "backbone": "tiny", "backbone_fingerprint": "f" * 64}
    store.import_indices(tmp_path / "dee.pt", Persona("dee", "d"), **backbone)
    read = store.load("dee")
    assert torch.equal(read.keep_LI, made.keep_LI)
    assert (read.metadata.method, read.metadata.kept, read.metadata.ratio) == ("imported", (40, 40, 40), 0.6)
    with pytest.raises(MaskError, match="another mask is there"):
        store.import_indices(tmp_path / "dee.pt", Persona("ada", "d"), **backbone)
    with pytest.raises(MaskError, match="has 3 layers, the backbone 4"):
        store.import_indices(tmp_path / "dee.pt", Persona("eve", "d"), **(backbone | {"layers": 4}))
    with pytest.raises(StorageError):
        store.import_indices(tmp_path / "dee.pt", Persona("../eve", "d"), **backbone)


def test_unfinished_files_of_dead_writers_are_found_and_removed(output):
    dead, alive = (output.root / "masks" / f".part-{name}" for name in ("dead", "alive"))
    for path in (dead, alive):
        path.write_bytes(b"half")
    os.utime(dead, (0, 0))
    assert orphans(output) == ["masks/.part-dead"]
    assert dead.exists()
    orphans(output, remove=True)
    assert not dead.exists()
    assert alive.exists()


def test_masks_of_format_1_are_read_beside_newer_ones(output, tmp_path):
    output.put(keys.mask_of_format_1("dee"), mask("dee", seed=7).to_bytes())
    output.put(keys.mask_of_format_1("ada"), b"an older one")
    store = MaskStore(output.url)
    assert store.ids() == ["ada", "bo", "cy", "dee"]
    assert store.load("dee").metadata.seed == 7
    assert store.load("ada").metadata.seed == 0
    assert store.verify() == 4
    assert len(list(store.pull(store.ids(), tmp_path / "to"))) == 4
    assert MaskStore(tmp_path / "to").ids() == ["ada", "bo", "cy", "dee"]
