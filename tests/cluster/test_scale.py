"""One pool that does all work, and many jobs under one output: the same masks, also where something is killed."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256

import cluster_runs as runs
import pytest
from s3_server import new_bucket
from tiny_models import save_tiny

from persona_pruner import MaskStore
from persona_pruner.masks.catalog import update_catalog
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage, read_parquet

pytestmark = [pytest.mark.cluster, pytest.mark.fault]
ONE_POOL = ("gpus=0", "groups.max=1")
PARTS = 10


@pytest.mark.timeout(300)
def test_one_pool_for_all_work_gives_the_same_masks_also_when_a_group_is_killed(undisturbed, tmp_path, cost):
    output = tmp_path / "out"
    with cost("SIGKILL of a group of the one pool for all work", whole=True):
        job = runs.start(output, "gpus=0", "groups.max=2")
        runs.wait_for(lambda: runs.data(output))
        victims = runs.pids_of(job, "ray::SharedWorker")
        assert victims
        os.kill(victims[0], signal.SIGKILL)
        text, _ = job.communicate(timeout=240)
    assert job.returncode == 0, text
    assert runs.masks(output) == runs.masks(undisturbed)
    assert runs.data(output) == runs.data(undisturbed)


@pytest.mark.timeout(1500)
def test_ten_parts_side_by_side_on_s3_make_every_mask_once_also_where_one_is_killed(real_s3, monkeypatch, tmp_path):
    """Three at a time, for the sake of a small machine."""
    for name, value in real_s3.items():
        monkeypatch.setenv(name, value)
    backbone = save_tiny(tmp_path / "tiny")
    settings = (*ONE_POOL, f"backbone.path={backbone}", "learning.steps=1", "synthesis.max_questions=20",
                "synthesis.select.k=8", "synthesis.rewrite.max_new_tokens=4", "synthesis.filter.min_answers=1",
                "synthesis.filter.min_words=1", "learning.channel_multiple=8")  # fmt: skip
    url = f"s3://{new_bucket(real_s3)}/run"
    storage = open_storage(url)

    def start(number):
        return runs.start(url, *settings, personas=20, arguments=("--part", f"{number}/{PARTS}"))

    def part(number):
        job = start(number)
        if number == 3:
            claim = keys.lease(1, f"part-{number}-of-{PARTS}")
            runs.wait_for(lambda: storage.exists(claim), 200)
            runs.kill_tree(job)
            job = start(number)
        text, _ = job.communicate(timeout=400)
        return job.returncode, text

    with ThreadPoolExecutor(3) as pool:
        for code, text in pool.map(part, range(1, PARTS + 1)):
            assert code == 0, text
    ids = MaskStore(url).ids()
    assert len(ids) == 20
    told = [storage.get(item.key) for item in storage.list(keys.STATUS.removesuffix(".json"))]
    assert len(told) == PARTS
    rows = [
        persona_id
        for item in storage.list(keys.CATALOG)
        for persona_id in read_parquet(storage.get(item.key)).column("persona_id").to_pylist()
    ]
    assert set(rows) == set(ids)
    assert update_catalog(storage) == 20
    # The same masks as those of one job.
    code, text = runs.run(tmp_path / "whole", *settings, personas=20)
    assert code == 0, text
    masks = {persona_id: sha256(MaskStore(url).read(persona_id)[0]).hexdigest() for persona_id in ids}
    assert masks == runs.masks(tmp_path / "whole")
