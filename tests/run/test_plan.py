import dataclasses
import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mask_examples import put_mask
from tiny_models import save_tiny, tiny_config

from persona_pruner.dataset import SCHEMA
from persona_pruner.manifest import Manifest, Persona
from persona_pruner.masks.catalog import update_catalog
from persona_pruner.run import plan
from persona_pruner.run.identity import identify
from persona_pruner.run.plan import make_plan
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage

MANY = 10_000


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("backbone") / "tiny")


@pytest.fixture
def identity(backbone, tmp_path):
    return identify(tiny_config(backbone), (), open_storage(tmp_path / "out"))


def manifest(*descriptions):
    return Manifest("m", tuple(Persona(f"p{n}", text) for n, text in enumerate(descriptions)), ())


def put_data(storage, persona):
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([], SCHEMA.with_metadata({"persona_sha256": persona.sha256})), stream)
    storage.put(keys.persona_data(persona.id), stream.getvalue())


def ids(personas):
    return [persona.id for persona in personas]


def test_what_is_done_has_data_or_lacks_them(tmp_path, identity):
    storage = open_storage(tmp_path / "out")
    people = manifest("a", "b", "c").personas
    put_mask(storage, identity, people[0])
    put_data(storage, people[1])
    storage.put(keys.error("p1"), b"{}")
    storage.put(keys.error("p0"), b"{}")
    left = make_plan(Manifest("m", people, ()), storage, identity)
    assert (ids(left.done), ids(left.to_train), ids(left.to_synthesize)) == (["p0"], ["p1"], ["p2"])
    assert left.failed_before == ("p1",)


def test_a_changed_description_is_made_again_from_its_questions_on(tmp_path, identity):
    storage = open_storage(tmp_path / "out")
    old = Persona("p0", "before")
    put_mask(storage, identity, old)
    put_data(storage, old)
    left = make_plan(manifest("after"), storage, identity)
    assert ids(left.to_synthesize) == ["p0"]


def test_a_mask_of_other_settings_or_with_a_broken_byte_is_made_again(tmp_path, identity):
    storage = open_storage(tmp_path / "out")
    people = manifest("a", "b", "c").personas
    put_mask(storage, identity, people[0], run_id="another")
    for persona in people[1:]:
        put_mask(storage, identity, persona)
    broken = bytearray(storage.get(keys.mask("p2")))
    broken[-1] ^= 1
    storage.put(keys.mask("p2"), bytes(broken))
    assert ids(make_plan(Manifest("m", people, ()), storage, identity).done) == ["p1"]


def test_a_mask_contrasted_with_another_persona_is_made_again(tmp_path, backbone):
    storage = open_storage(tmp_path / "out")
    identity = identify(tiny_config(backbone, method="contrastive_wanda"), (), storage)
    ada, ben = (Persona(name, name) for name in ("ada", "ben"))
    person = dataclasses.replace(ada, opposite=ben)
    for opposite_sha256, done in ((None, []), ("0" * 64, []), (ben.sha256, ["ada"])):
        put_mask(storage, identity, person, opposite_sha256=opposite_sha256)
        assert ids(make_plan(Manifest("m", (person,), ()), storage, identity).done) == done


@pytest.mark.slow
def test_ten_thousand_masks_are_found_again_in_little_memory(tmp_path, identity):
    """Figures of the machine are in the benchmark; here: all are found, and in under 500 MB."""
    storage = open_storage(tmp_path / "out")
    people = [Persona(f"p{n}", f"person {n}") for n in range(MANY)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda persona: put_mask(storage, identity, persona), people))
    update_catalog(storage)
    file = tmp_path / "people.jsonl"
    file.write_text("".join(json.dumps({"id": p.id, "description": p.description}) + "\n" for p in people))
    code = (
        "import sys\n"
        "from persona_pruner.config.schema import RunConfig\n"
        "from persona_pruner.manifest import read_manifest\n"
        "from persona_pruner.run.identity import identify\n"
        "from persona_pruner.run.plan import make_plan\n"
        "from persona_pruner.storage.open import open_storage\n"
        "storage = open_storage(sys.argv[2])\n"
        "identity = identify(RunConfig.model_validate_json(sys.argv[3]), (), storage)\n"
        "plan = make_plan(read_manifest(sys.argv[1]), storage, identity)\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(len(plan.done), int(peak.split()[1]) // 1024)\n"
    )
    words = [sys.executable, "-c", code, file, storage.url, identity.config.model_dump_json()]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    done, megabytes = map(int, told)
    assert done == MANY
    assert megabytes < 500


def test_many_personas_without_masks_are_looked_for_in_one_listing(tmp_path, identity, monkeypatch):
    storage = open_storage(tmp_path / "out")
    people = manifest(*map(str, range(plan.FEW + 1))).personas
    put_data(storage, people[3])
    put_data(storage, people[7])
    asked = []
    current = plan.is_current
    monkeypatch.setattr(
        plan, "is_current", lambda storage, persona: asked.append(persona.id) or current(storage, persona)
    )
    assert ids(make_plan(Manifest("m", people, ()), storage, identity).to_train) == ["p3", "p7"]
    assert sorted(asked) == ["p3", "p7"]
    assert ids(make_plan(Manifest("m", people[:5], ()), storage, identity).to_train) == ["p3"]


def test_few_beside_many_that_are_done_are_asked_for_without_a_listing(tmp_path, identity, monkeypatch):
    monkeypatch.setattr(plan, "FEW", 0)
    monkeypatch.setattr(plan, "DONE_PER_ASKED", 2)
    storage = open_storage(tmp_path / "out")
    people = manifest(*"abcdef").personas
    for persona in people[:4]:
        put_mask(storage, identity, persona)
    put_data(storage, people[4])
    looked_for = []
    match = storage.match
    monkeypatch.setattr(storage, "match", lambda *patterns: looked_for.extend(patterns) or match(*patterns))
    left = make_plan(Manifest("m", people, ()), storage, identity)
    assert (len(left.done), ids(left.to_train), ids(left.to_synthesize)) == (4, ["p4"], ["p5"])
    assert keys.EVERY_DATA not in looked_for
    make_plan(Manifest("m", people[3:], ()), storage, identity)
    assert keys.EVERY_DATA in looked_for
