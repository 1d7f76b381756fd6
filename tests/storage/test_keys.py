import pytest

from persona_pruner.storage import keys

IDS = ["ada", "a", "p.q_r-1", "masks", "0" * 64, "mask.safetensors", "persona 1"]


@pytest.mark.parametrize("persona_id", IDS)
def test_the_key_of_a_mask_tells_its_persona_with_and_without_a_hash_shard(persona_id):
    sharded, old = keys.mask(persona_id), keys.mask_of_format_1(persona_id)
    assert sharded != old
    assert keys.persona_of_mask(sharded) == persona_id
    assert keys.persona_of_mask(old) == persona_id


def test_what_lies_where_no_mask_of_that_persona_is_written_is_no_mask():
    _, shard, name, file = keys.mask("ada").split("/")
    other_shard = "00" if shard != "00" else "01"
    for key in (
        f"masks/{other_shard}/{name}/{file}",
        f"masks/{shard}/{name}/other.safetensors",
        f"masks/{shard}/{file}/{name}",
        keys.checkpoint("ada"),
        keys.POOLED_MASK,
        keys.RUN,
    ):
        assert keys.persona_of_mask(key) is None, key


def test_masks_spread_over_the_shards():
    shards = {keys.mask(f"persona-{number}").split("/")[1] for number in range(4000)}
    assert len(shards) == 256


@pytest.mark.parametrize("persona_id", IDS)
def test_every_key_of_a_persona_tells_it(persona_id):
    for key, prefix in (
        (keys.persona_data(persona_id), keys.SYNTHESIS),
        (keys.stored_answers(persona_id) + "0.json", keys.ANSWERS),
        (keys.checkpoint(persona_id), keys.CHECKPOINTS),
        (keys.error(persona_id), keys.ERRORS),
        (keys.evaluation(persona_id), keys.EVALUATION),
    ):
        assert keys.persona_of(key, prefix) == persona_id


def test_leases_come_in_the_order_of_their_epochs_and_parts_have_their_own():
    assert sorted([keys.lease(10), keys.lease(9), keys.lease(100)]) == [keys.lease(n) for n in (9, 10, 100)]
    assert keys.lease(1, "2-of-4") != keys.lease(1)
    assert keys.lease(1, "2-of-4").startswith(keys.LEASES)


def test_a_part_has_a_status_of_its_own():
    assert keys.status() == keys.STATUS
    assert keys.status("2-of-4") == "progress/status-2-of-4.json"
