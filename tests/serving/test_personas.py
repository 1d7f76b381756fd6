import asyncio

import pytest
from served_run import make_run

from persona_pruner.config.schema import PromptConfig
from persona_pruner.errors import ConfigError, MaskError, StorageError
from persona_pruner.masks.store import MaskStore
from persona_pruner.serving.metrics import Metrics
from persona_pruner.serving.personas import PersonaOptions, Personas, UnknownPersonaError, read_prompt


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"))
    run.commit(run.mask("cora"), run.mask("felix", ratio=0.5))
    return run


def personas_of(run, **options):
    store = MaskStore(run.output)
    return Personas(store, run.fingerprint, PersonaOptions(read_prompt(store), **options), Metrics()), store


def test_a_persona_comes_with_the_system_prompt_of_its_run(run):
    personas, _ = personas_of(run)
    assert asyncio.run(personas.get("cora")).system == "You speak as cora, a keeper of lighthouses. Answer kindly."


def test_requests_that_come_together_read_a_mask_once(run):
    personas, store = personas_of(run)
    reads = []
    load = store.load_channels
    store.load_channels = lambda name: reads.append(name) or load(name)

    async def together():
        return await asyncio.gather(*[personas.get("cora") for _ in range(50)])

    assert len({persona.mask.digest for persona in asyncio.run(together())}) == 1
    assert reads == ["cora"]


def test_what_was_verified_is_served_while_the_storage_is_away_and_nothing_else(run):
    personas, store = personas_of(run, refresh_seconds=0.0)
    first = asyncio.run(personas.get("cora"))

    def away(name):
        raise StorageError("the bucket does not answer")

    store.load_channels = away
    assert asyncio.run(personas.get("cora")) == first
    with pytest.raises(StorageError, match="does not answer"):
        asyncio.run(personas.get("felix"))


def test_where_hides_the_others_and_its_faults_are_told_at_the_start(run):
    personas, _ = personas_of(run, where=("ratio==0.5",))
    assert asyncio.run(personas.ids()) == ["felix"]
    with pytest.raises(UnknownPersonaError):
        asyncio.run(personas.get("cora"))
    with pytest.raises(ConfigError, match="colour"):
        personas_of(run, where=("colour==red",))


def test_masks_of_another_backbone_are_refused(run):
    personas = Personas(MaskStore(run.output), "0" * 64, PersonaOptions(PromptConfig()), Metrics())
    with pytest.raises(MaskError, match="fingerprint"):
        asyncio.run(personas.get("cora"))


def test_memory_is_bounded(run):
    personas, _ = personas_of(run, capacity=10)

    async def many():
        for number in range(50):
            with pytest.raises(UnknownPersonaError):
                await personas.get(f"nobody-{number}")

    asyncio.run(many())
    assert len(personas._entries) == 10
