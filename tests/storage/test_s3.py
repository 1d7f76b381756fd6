"""Faults between client and server, and what a server does: against real S3 servers unless the name says mock."""

import re
import time
import urllib.request

import http_faults as faults
import pytest
from mask_examples import mask
from s3_server import new_bucket

from persona_pruner import MaskStore
from persona_pruner.config.schema import StorageConfig
from persona_pruner.errors import MaskError, StorageError
from persona_pruner.masks.store import orphans
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage

FAST = StorageConfig(deadline_seconds=2.0)
pytestmark = pytest.mark.cluster


@pytest.fixture
def broken(server, monkeypatch):
    """(storage through the proxy, its faults, the same storage without the proxy)"""
    url = f"s3://{new_bucket(server)}/run"
    direct = open_storage(url)
    direct.exists("x")  # makes its client while the environment names the server itself
    with faults.proxy(server["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield open_storage(url, FAST), proxy, direct


@pytest.mark.parametrize("fault", [faults.CUT, faults.CLOSE, faults.BUSY, faults.LOST, faults.FLIP])
def test_reads_survive_a_fault_and_give_up_clearly(broken, fault):
    storage, proxy, direct = broken
    content = bytes(range(256)) * 500
    direct.put("object", content)
    proxy.plan(fault, times=2, method="GET")
    assert open_storage(storage.url).get("object") == content
    assert proxy.seen == 2
    proxy.plan(fault, method="GET")
    with pytest.raises(StorageError, match=r"run/object: ") as caught:
        storage.get("object")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", [faults.CLOSE, faults.BUSY, faults.LOST])
def test_writes_survive_a_fault_without_loss_or_duplicate(broken, fault):
    storage, proxy, direct = broken
    patient = open_storage(storage.url)
    proxy.plan(fault, times=2, method="PUT")
    patient.put("plain", b"one")
    proxy.plan("", times=0)
    assert patient.put_if_absent("warm-up", b"")
    proxy.plan(fault, times=2, method="PUT", path="/once")
    assert patient.put_if_absent("once", b"mine"), "a create whose answer was lost is still ours"
    assert not direct.put_if_absent("once", b"theirs")
    assert (direct.get("plain"), direct.get("once")) == (b"one", b"mine")
    assert sorted(item.key for item in direct.list()) == ["once", "plain", "warm-up"]
    proxy.plan(fault, method="PUT")
    with pytest.raises(StorageError, match="run/never"):
        storage.put("never", b"x")


def test_a_server_that_trickles_does_not_outlive_the_deadline(broken):
    storage, proxy, direct = broken
    direct.put("object", b"x" * 100_000)
    proxy.plan(faults.TRICKLE, method="GET")
    # On a busy machine not one byte comes within FAST's deadline.
    storage = open_storage(storage.url, StorageConfig(deadline_seconds=6.0))
    with pytest.raises(StorageError, match=r"run/object: \d+ of 100000 bytes came"):
        storage.get("object")


def test_a_server_that_trickles_headers_does_not_outlive_the_deadline_either(server, monkeypatch):
    with faults.dull_server(b"HTTP/1.1 200 OK\r\nX-A: ", b"a") as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        began = time.monotonic()
        with pytest.raises(StorageError, match=f"no server answers at {url}"):
            open_storage("s3://bucket/run", FAST).get("object")
        assert time.monotonic() - began < 60, "its headers alone would take years"


def test_pull_commits_nothing_that_does_not_verify(broken, tmp_path):
    storage, proxy, direct = broken
    for number in range(4):
        direct.put(keys.mask(f"p{number}"), mask(f"p{number}", seed=number).to_bytes())
    store = MaskStore(storage.url, FAST)
    proxy.plan(faults.FLIP, method="GET", path="p2/mask")
    with pytest.raises(StorageError, match=re.escape(keys.mask("p2"))):
        list(store.pull(store.ids(), tmp_path))
    assert MaskStore(tmp_path).ids() == ["p0", "p1", "p3"], "the others are there, the bad one is not"
    proxy.plan(faults.CUT, times=1, method="GET", path="p2/mask")
    assert [(p.persona_id, p.fresh) for p in store.pull(store.ids(), tmp_path) if p.fresh] == [("p2", True)]
    assert MaskStore(tmp_path).verify() == 4


def test_large_object_that_fails_leaves_no_upload_behind(broken, large):
    storage, proxy, direct = broken
    proxy.plan(faults.BUSY, method="PUT", path="partNumber=3")
    with pytest.raises(StorageError, match="run/large: SlowDown"):
        storage.put("large", large)
    assert not direct.exists("large")
    assert direct.incomplete_writes(before=4e9) == []
    proxy.plan(faults.BUSY, times=1, method="PUT", path="partNumber=3")
    storage.put("large", large)
    assert len(direct.get("large")) == len(large)


def test_gc_removes_old_unfinished_uploads_only_below_its_prefix(server):
    storage = open_storage(f"s3://{new_bucket(server)}/run")
    for key in ("run/dead", "other/dead"):
        storage.client.create_multipart_upload(Bucket=storage.bucket, Key=key)
    assert orphans(storage) == [], "one that began just now may be alive"
    assert storage.incomplete_writes(before=4e9) == ["dead"]
    assert storage.incomplete_writes(before=4e9, remove=True) == ["dead"]
    assert storage.incomplete_writes(before=4e9) == []
    left = storage.client.list_multipart_uploads(Bucket=storage.bucket)["Uploads"]
    assert [upload["Key"] for upload in left] == ["other/dead"]


def test_server_that_ignores_conditions_is_told_once_mock(moto_s3, monkeypatch, caplog):
    """Mock: real servers check the signature of the header that the proxy drops."""
    for name, value in moto_s3.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{new_bucket(moto_s3)}/run"
    with faults.proxy(moto_s3["AWS_ENDPOINT_URL"]) as proxy:
        proxy.plan(faults.UNCONDITIONAL)
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        storage = open_storage(url, FAST)
        assert storage.put_if_absent("lease", b"a")
        assert not storage.put_if_absent("lease", b"b")
        assert storage.get("lease") == b"a"
        assert [item.key for item in storage.list()] == ["lease"]
    assert sum("ignores If-None-Match" in record.message for record in caplog.records) == 1


def test_shared_link_reads_the_mask_without_credentials(server):
    storage = open_storage(f"s3://{new_bucket(server)}/run")
    made = mask("ada").to_bytes()
    storage.put(keys.mask("ada"), made)
    link = MaskStore(storage.url).share("ada", 60)
    assert urllib.request.urlopen(link).read() == made
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(link.replace("ada", "bob"))
    assert server["AWS_SECRET_ACCESS_KEY"] not in link


def test_encryption_settings_reach_the_server_mock(moto_s3, monkeypatch, large):
    """Mock: the real server here has no key management."""
    for name, value in moto_s3.items():
        monkeypatch.setenv(name, value)
    config = StorageConfig(server_side_encryption="aws:kms", kms_key_id="key-1")
    storage = open_storage(f"s3://{new_bucket(moto_s3)}/run", config)
    storage.put("small", b"x")
    storage.put("large", large)
    for key in ("small", "large"):
        head = storage.client.head_object(Bucket=storage.bucket, Key=f"run/{key}")
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "key-1")


def test_swapped_truncated_and_flipped_objects_are_named(server):
    storage = open_storage(f"s3://{new_bucket(server)}/run")
    good = mask("ada").to_bytes()
    store = MaskStore(storage.url)
    for bad in (mask("bo").to_bytes(), good[:-5], good[:-1] + bytes([good[-1] ^ 1])):
        storage.put(keys.mask("ada"), bad)
        with pytest.raises(MaskError, match=r"run/masks/\w\w/ada/mask\.safetensors"):
            store.load("ada")
