"""S3 servers for tests: a real one (Ceph RADOS Gateway), moto's mock, or whatever the environment names.

PERSONA_PRUNER_TEST_S3 = http://host:port with AWS_* credentials beside it takes the place of the real one.
"""

import json
import os
import shutil
import socket
import subprocess
import uuid
from pathlib import Path

import pytest

from persona_pruner.storage.open import open_storage

SCRIPTS = Path(__file__).parents[2] / "shared" / "s3"
KEYS = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")


DIRECTORIES: dict[str, Path] = {}
"""Data directory of a server started here, by its endpoint."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def real_s3(tmp_path_factory):
    """AWS_* settings of a real S3 server."""
    if "PERSONA_PRUNER_TEST_S3" in os.environ:
        yield {name: os.environ[name] for name in KEYS if name in os.environ} | {
            "AWS_ENDPOINT_URL": os.environ["PERSONA_PRUNER_TEST_S3"]
        }
        return
    if not (SCRIPTS / "start-s3.sh").is_file():
        pytest.skip("no real S3 server: ../shared/s3 is absent and PERSONA_PRUNER_TEST_S3 is not set")
    directory = Path("/tmp") / f"persona-pruner-s3-{uuid.uuid4().hex[:8]}"
    port = 17480 + os.getpid() % 500 * 4
    started = subprocess.run(
        [SCRIPTS / "start-s3.sh", str(port), str(directory)], capture_output=True, text=True, timeout=300
    )
    if started.returncode:
        pytest.skip(f"the real S3 server did not start: {started.stderr.strip().splitlines()[-1]}")
    DIRECTORIES[f"http://127.0.0.1:{port}"] = directory
    lines = dict(line.split("=", 1) for line in started.stdout.splitlines() if "=" in line)
    yield {name: lines[name] for name in KEYS if name in lines}
    subprocess.run([SCRIPTS / "stop-s3.sh", str(directory)], capture_output=True, timeout=60)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def moto_s3():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield dict(zip(KEYS, (f"http://{host}:{port}", "key", "secret", "us-east-1"), strict=True))
    server.stop()


def new_bucket(settings: dict[str, str]) -> str:
    """A fresh bucket of the server behind the AWS_* settings."""
    import boto3

    name = f"test-{uuid.uuid4().hex[:12]}"
    client = boto3.client(
        "s3",
        endpoint_url=settings["AWS_ENDPOINT_URL"],
        aws_access_key_id=settings["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=settings["AWS_SECRET_ACCESS_KEY"],
        region_name=settings.get("AWS_DEFAULT_REGION", "us-east-1"),
    )
    client.create_bucket(Bucket=name)
    return name


@pytest.fixture
def mock_bucket(moto_s3, monkeypatch, tmp_path):
    """Storage below a fresh bucket of moto's mock server; the environment leads there."""
    for name, value in moto_s3.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return open_storage(f"s3://{new_bucket(moto_s3)}/inputs")


def second_user(settings: dict[str, str]) -> tuple[dict[str, str], str]:
    """Keys (arguments of boto3.client) and name of a new user without any rights of its own."""
    directory = DIRECTORIES.get(settings["AWS_ENDPOINT_URL"])
    if directory is None:
        pytest.skip("users can be made only on a server that the tests have started")
    name = f"user{uuid.uuid4().hex[:8]}"
    command = ["radosgw-admin", "-c", directory / "ceph.conf", "user", "create", "--uid", name, "--display-name", name]
    made = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    keys = json.loads(made.stdout)["keys"][0]
    return {"aws_access_key_id": keys["access_key"], "aws_secret_access_key": keys["secret_key"]}, name
