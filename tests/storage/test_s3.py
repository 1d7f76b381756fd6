"""Faults between client and server, wrong settings, policies: against real S3 servers unless the name says mock."""

import contextlib
import http.server
import json
import os
import re
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from pathlib import Path

import boto3
import http_faults as faults
import pytest
from mask_examples import mask
from s3_server import new_bucket, second_user

from persona_pruner import MaskStore
from persona_pruner.config.schema import StorageConfig
from persona_pruner.errors import MaskError, StorageError
from persona_pruner.masks.store import orphans
from persona_pruner.storage import keys
from persona_pruner.storage import s3 as storage_s3
from persona_pruner.storage.open import open_storage
from persona_pruner.storage.s3 import S3Storage

POLICIES = Path(__file__).parents[2] / "cluster" / "policies"
FAST = StorageConfig(deadline_seconds=2.0)
LARGE = 17 * 2**20
pytestmark = pytest.mark.cluster


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Three parts of 17 MiB are as good a multipart upload as more of a larger one."""
    monkeypatch.setattr(storage_s3, "MULTIPART_BYTES", 8 * 2**20)


@pytest.fixture(params=["real_s3", "ceph_s3"])
def server(request, monkeypatch):
    settings = request.getfixturevalue(request.param)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return settings


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


def test_large_object_that_fails_leaves_no_upload_behind(broken):
    storage, proxy, direct = broken
    proxy.plan(faults.BUSY, method="PUT", path="partNumber=3")
    with pytest.raises(StorageError, match="run/large: SlowDown"):
        storage.put("large", bytes(LARGE))
    assert not direct.exists("large")
    assert direct.incomplete_writes(before=4e9) == []
    proxy.plan(faults.BUSY, times=1, method="PUT", path="partNumber=3")
    storage.put("large", bytes(LARGE))
    assert len(direct.get("large")) == LARGE


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


@pytest.fixture
def tls_server(tmp_path):
    """URL of a server with a certificate that nobody has signed."""
    pem = tmp_path / "self-signed.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost", "-keyout",
         pem, "-out", tmp_path / "certificate"], check=True, capture_output=True,
    )  # fmt: skip
    pem.write_bytes(pem.read_bytes() + (tmp_path / "certificate").read_bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    listener.socket = context.wrap_socket(listener.socket, server_side=True)
    threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
    yield f"https://localhost:{listener.server_address[1]}"
    listener.shutdown()
    listener.server_close()


STATUS = "from persona_pruner.cli import main; main()"
LATE = """
import datetime, botocore.auth
late = datetime.datetime.now(datetime.UTC).replace(tzinfo=None) - datetime.timedelta(hours=2)
botocore.auth.get_current_datetime = lambda *_, **__: late
"""
"""The clock of the signature alone is wrong here: the machine's own cannot be set."""


CLIENT_FAULTS = [
    ("refused", "no server answers at http://127.0.0.1:9; check AWS_ENDPOINT_URL"),
    ("unroutable", "no server answers at http://127.0.0.1"),
    ("silent", "no server answers at http://127.0.0.1"),
    ("trickling", "no server answers at http://127.0.0.1"),
    ("other protocol", "; check AWS_ENDPOINT_URL"),
    ("no S3", "is no S3 server (HTTP 404); check AWS_ENDPOINT_URL"),
    ("certificate", "TLS failed: check the certificate"),
    ("no credentials", "no AWS credentials; set AWS_ACCESS_KEY_ID"),
]
REFUSALS = [
    ("clock", "the clock of this machine is wrong"),
    ("key", "check AWS_ACCESS_KEY_ID"),
    ("secret", "check AWS_SECRET_ACCESS_KEY"),
    ("bucket", "bucket no-such-bucket-here does not exist; create it or check its name"),
    ("permission", "permission denied; check the policy"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("server", "wrong", "said"),
    [("real_s3", *fault) for fault in CLIENT_FAULTS + REFUSALS] + [("ceph_s3", *fault) for fault in REFUSALS],
    indirect=["server"],
)
def test_status_says_within_15_seconds_what_to_check(request, server, tmp_path, wrong, said):
    with contextlib.ExitStack() as servers:
        secret = f"secret-{uuid.uuid4().hex}"
        bucket = "no-such-bucket-here" if wrong == "bucket" else new_bucket(server)
        env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "HOME": str(tmp_path)} | server
        if wrong == "refused":
            env["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9"
        elif wrong == "unroutable":
            env["AWS_ENDPOINT_URL"] = servers.enter_context(faults.black_hole())
        elif wrong == "silent":
            env["AWS_ENDPOINT_URL"] = servers.enter_context(faults.dull_server())
        elif wrong == "trickling":
            env["AWS_ENDPOINT_URL"] = servers.enter_context(faults.dull_server(b"HTTP/1.1 200 OK\r\nX-A: ", b"a"))
        elif wrong == "other protocol":
            env["AWS_ENDPOINT_URL"] = servers.enter_context(faults.dull_server(b"SSH-2.0-OpenSSH_9.2\r\n"))
        elif wrong == "no S3":
            answer = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
            env["AWS_ENDPOINT_URL"] = servers.enter_context(faults.dull_server(answer))
        elif wrong == "certificate":
            env["AWS_ENDPOINT_URL"] = request.getfixturevalue("tls_server")
        elif wrong == "key":
            env |= {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": secret}
        elif wrong == "secret":
            env["AWS_SECRET_ACCESS_KEY"] = secret
        elif wrong == "no credentials":
            env = {name: value for name, value in env.items() if "KEY" not in name}
        elif wrong == "permission":
            credentials, _ = second_user(server)
            env |= {name.upper(): value for name, value in credentials.items()}
        code = (LATE if wrong == "clock" else "") + STATUS
        command = [sys.executable, "-c", code, "status", f"s3://{bucket}/run"]
        ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 4, ran.stderr
    (line,) = ran.stderr.splitlines()
    assert said in line
    assert env.get("AWS_SECRET_ACCESS_KEY", secret) not in ran.stdout + ran.stderr


def test_command_line_says_one_line_and_no_secret(server, tmp_path):
    """Everything that a command prints with the libraries' own debug log on is searched for the secret."""
    secret = f"secret-{uuid.uuid4().hex}"
    code = "import logging; logging.basicConfig(level='DEBUG'); from persona_pruner.cli import main; main()"
    ran = subprocess.run(
        [sys.executable, "-c", code, "pull", f"s3://{new_bucket(server)}/run", "--all", "--to", str(tmp_path / "to")],
        env={"PATH": "/usr/bin:/bin", **server, "AWS_SECRET_ACCESS_KEY": secret}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 4
    assert "the secret key does not fit; check AWS_SECRET_ACCESS_KEY" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr.splitlines()[-1]
    assert secret not in ran.stdout + ran.stderr


def test_shared_link_reads_the_mask_without_credentials(server):
    storage = open_storage(f"s3://{new_bucket(server)}/run")
    made = mask("ada").to_bytes()
    storage.put(keys.mask("ada"), made)
    link = MaskStore(storage.url).share("ada", 60)
    assert urllib.request.urlopen(link).read() == made
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(link.replace("ada", "bob"))
    assert server["AWS_SECRET_ACCESS_KEY"] not in link


def test_encryption_settings_reach_the_server_mock(moto_s3, monkeypatch):
    """Mock: the real server here has no key management."""
    for name, value in moto_s3.items():
        monkeypatch.setenv(name, value)
    config = StorageConfig(server_side_encryption="aws:kms", kms_key_id="key-1")
    storage = open_storage(f"s3://{new_bucket(moto_s3)}/run", config)
    storage.put("small", b"x")
    storage.put("large", bytes(LARGE))
    for key in ("small", "large"):
        head = storage.client.head_object(Bucket=storage.bucket, Key=f"run/{key}")
        assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "key-1")


@pytest.fixture
def roles(server):
    """owner's storage, and a function that gives the storage of a user under one of the shipped policies."""
    credentials, arn = second_user(server)
    bucket = new_bucket(server)
    owner = open_storage(f"s3://{bucket}/team/run")
    owner.put(keys.mask("ada"), mask("ada").to_bytes())
    owner.put(keys.checkpoint("bo"), b"x")
    open_storage(f"s3://{bucket}/elsewhere").put("private", b"x")

    def under(name: str) -> S3Storage:
        text = (POLICIES / f"{name}.json").read_text().replace("BUCKET", bucket).replace("PREFIX", "team/run")
        policy = json.loads(text)
        for statement in policy["Statement"]:
            statement["Principal"] = {"AWS": [arn]}
        owner.client.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
        storage = S3Storage(bucket, "team/run", FAST)
        storage._made = boto3.client(
            "s3", endpoint_url=server["AWS_ENDPOINT_URL"], region_name="us-east-1", **credentials
        )
        return storage

    return under


def denied(call, *arguments):
    with pytest.raises(StorageError, match="permission denied"):
        call(*arguments)


def test_reader_policy_reads_masks_and_nothing_else(roles):
    storage = roles("reader")
    storage.check_readable(keys.MASKS)
    assert [item.key for item in storage.list(keys.MASKS)] == [keys.mask("ada")]
    assert storage.get(keys.mask("ada"))
    denied(storage.get, keys.checkpoint("bo"))
    denied(storage.put, keys.mask("ada"), b"x")
    denied(storage.delete, keys.mask("ada"))
    denied(list, storage.list(keys.CHECKPOINTS))


def test_job_policy_works_below_its_prefix_only(roles):
    storage = roles("job")
    storage.check_writable()
    storage.put("a", b"x")
    assert storage.put_if_absent("b", b"x")
    storage.put("large", bytes(LARGE))
    storage.delete("a")
    outside = S3Storage(storage.bucket, "elsewhere", FAST)
    outside._made = storage.client
    denied(outside.get, "private")
    denied(outside.put, "private", b"x")
    denied(list, outside.list())


def test_admin_policy_cleans_up(roles):
    storage = roles("admin")
    storage.client.create_multipart_upload(Bucket=storage.bucket, Key="team/run/dead")
    assert storage.incomplete_writes(before=4e9, remove=True) == ["dead"]
    storage.delete(keys.checkpoint("bo"))
    with pytest.raises(storage.client.exceptions.ClientError, match="AccessDenied"):
        storage.client.put_bucket_policy(Bucket=storage.bucket, Policy="{}")


def test_swapped_truncated_and_flipped_objects_are_named(server):
    storage = open_storage(f"s3://{new_bucket(server)}/run")
    good = mask("ada").to_bytes()
    store = MaskStore(storage.url)
    for bad in (mask("bo").to_bytes(), good[:-5], good[:-1] + bytes([good[-1] ^ 1])):
        storage.put(keys.mask("ada"), bad)
        with pytest.raises(MaskError, match=r"run/masks/\w\w/ada/mask\.safetensors"):
            store.load("ada")
