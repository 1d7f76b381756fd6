from mask_examples import mask

from persona_pruner.masks.catalog import build_catalog
from persona_pruner.run import catalog_updates
from persona_pruner.run.catalog_updates import CatalogUpdates
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


def put(storage, *names):
    for name in names:
        storage.put(keys.mask(name), mask(name).to_bytes())


def test_the_catalog_follows_a_job_in_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog_updates, "EVERY", 2)
    storage = open_storage(tmp_path / "out")
    updates = CatalogUpdates(storage, 2)
    put(storage, "ada")
    updates.masked(1)
    assert not list(storage.list(keys.CATALOG))
    put(storage, "ben")
    updates.masked(2)
    updates.close()
    (part,) = storage.list(keys.CATALOG)
    assert part.size
    put(storage, "cleo")
    updates.masked(3)
    updates.close()
    assert list(storage.list(keys.CATALOG)) == [part]
    assert len(build_catalog(storage)) == 3


def test_a_broken_mask_does_not_fail_the_job(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(catalog_updates, "EVERY", 1)
    storage = open_storage(tmp_path / "out")
    storage.put(keys.mask("ada"), b"broken")
    updates = CatalogUpdates(storage, 2)
    updates.masked(1)
    updates.close()
    assert keys.mask("ada") in caplog.text
