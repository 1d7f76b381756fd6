from mask_examples import mask

from persona_pruner.run.listing import list_personas
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


def test_each_persona_is_as_far_as_its_objects_show(tmp_path):
    storage = open_storage(tmp_path)
    for persona_id in ("ada", "ben", "cleo", "dan"):
        storage.put(keys.persona_data(persona_id), b"rows")
    storage.put(keys.checkpoint("ben"), b"state")
    data = mask("cleo").to_bytes()
    storage.put(keys.mask("cleo"), data)
    storage.put(keys.error("dan"), b"{}")
    listings = {listing.persona_id: listing for listing in list_personas(storage)}
    assert {name: listing.state for name, listing in listings.items()} == {
        "ada": "answered", "ben": "training", "cleo": "masked", "dan": "failed"
    }  # fmt: skip
    assert listings["cleo"].bytes == len(data)
    assert listings["cleo"].masked_loss == 1.25


def test_an_empty_output_lists_nobody_and_makes_nothing(tmp_path):
    assert list_personas(open_storage(tmp_path / "out")) == []
    assert not (tmp_path / "out").exists()
