"""Wrong settings of a user, against real S3 servers: one line that says what to check, and no secret."""

import contextlib
import os
import ssl
import subprocess
import sys
import uuid
from http.server import BaseHTTPRequestHandler

import http_faults as faults
import pytest
from local_server import local_server
from s3_server import new_bucket, second_user

pytestmark = pytest.mark.cluster


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
    with local_server(BaseHTTPRequestHandler, tls=context) as url:
        yield url


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
