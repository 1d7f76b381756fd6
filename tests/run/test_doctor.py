"""What `persona-pruner doctor` finds without a cluster; nodes are in tests/cluster/test_doctor.py."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import http_faults
import pytest
from ray.core.generated.gcs_service_pb2 import CheckAliveReply
from s3_server import new_bucket, second_user

from persona_pruner.config.load import load_config
from persona_pruner.run import doctor


def found(output=None, config=None, address=None):
    return {finding.name: finding for finding in doctor.diagnose(config, output, address)}


def assert_red(finding, said, remedy):
    assert finding.ok is False, finding
    assert said in finding.detail
    assert remedy in finding.remedy


@pytest.fixture
def config(example):
    return load_config(example / "run.yaml")


def test_everything_in_place_is_green(tmp_path, config):
    findings = found(str(tmp_path / "out"), config)
    assert {name for name, finding in findings.items() if finding.ok is None} == {"ray", "metrics"}
    assert not [finding for finding in findings.values() if finding.ok is False]
    assert not list((tmp_path / "out").rglob("*")), "nothing is left behind"


def test_what_is_not_asked_for_is_not_looked_at():
    findings = found()
    assert findings["output"].ok is None
    assert findings["backbone"].ok is None
    assert "create-if-absent" not in findings


@pytest.mark.parametrize(
    ("env", "said", "remedy"),
    [
        ({}, "RAY_AUTH_MODE is not set", "export RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "token"}, "auth_token is missing", "ray get-auth-token --generate"),
    ],
)
def test_token_that_is_not_there(monkeypatch, tmp_path, env, said, remedy):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert_red(found()["token"], said, remedy)


def test_token_that_others_can_read(monkeypatch, tmp_path):
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert_red(found()["token"], "can be read by others", f"chmod 600 {token}")
    token.chmod(0o600)
    assert found()["token"].ok is True


def test_no_cluster_at_the_address():
    findings = found(address="127.0.0.1:9")
    assert_red(findings["ray"], "127.0.0.1:9: ", "start a node, or check --address")
    assert findings["gpus"].ok is None


def test_cluster_of_another_version_or_with_another_token():
    """A server of Ray's protocol in the place of a cluster that is not installed here."""
    reply = CheckAliveReply(ray_version="1.0.0")

    def check_alive(request, context):
        if dict(context.invocation_metadata()).get("authorization") != "Bearer right":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
        return reply.SerializeToString()

    handler = grpc.unary_unary_rpc_method_handler(check_alive)
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("ray.rpc.NodeInfoGcsService", {"CheckAlive": handler})]
    )
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_MODE", "token")
            patch.setenv("RAY_AUTH_TOKEN", "right")
            assert_red(found(address=address)["ray"], "runs Ray 1.0.0, here is", "install the cluster's version")
            patch.setenv("RAY_AUTH_TOKEN", "wrong")
            assert_red(found(address=address)["ray"], "does not take this token", "export RAY_AUTH_MODE=token")
    finally:
        server.stop(None)


def test_output_that_cannot_be_written(real_s3, monkeypatch):
    for name, value in real_s3.items():
        monkeypatch.setenv(name, value)
    assert_red(found("s3://no-such-bucket-here/run")["output"], "does not exist; create it", "mend that")
    bucket = new_bucket(real_s3)
    keys, _ = second_user(real_s3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys["aws_access_key_id"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys["aws_secret_access_key"])
    findings = found(f"s3://{bucket}/run")
    assert_red(findings["output"], "permission denied", "cluster/policies/")
    assert_red(findings["output from the nodes"], "permission denied", "the same credentials")


def test_server_that_ignores_conditions_mock(moto_s3, monkeypatch):
    """Mock: a real server checks the signature of the header that the proxy drops."""
    for name, value in moto_s3.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{new_bucket(moto_s3)}/run"
    with http_faults.proxy(moto_s3["AWS_ENDPOINT_URL"]) as faults:
        faults.plan(http_faults.UNCONDITIONAL)
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.url)
        assert_red(found(url)["create-if-absent"], "ignores If-None-Match", "one job at a time")


def test_clock_that_differs_from_the_servers(real_s3, monkeypatch):
    for name, value in real_s3.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{new_bucket(real_s3)}/run"
    finding = found(url)["clock of the output"]
    assert finding.ok is True, finding
    now = doctor.time.time
    monkeypatch.setattr(doctor.time, "time", lambda: now() - 100)
    assert_red(found(url)["clock of the output"], "it is +", "NTP")


def test_backbone_that_is_not_there(config, tmp_path):
    settings = config.model_copy(update={"backbone": config.backbone.model_copy(update={"path": str(tmp_path)})})
    assert_red(found(config=settings)["backbone"], str(tmp_path), "backbone.path")


def test_full_disk(tmp_path, monkeypatch):
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {made.stderr.strip()}")
    try:
        (tmp_path / "filler").write_bytes(bytes(2_050_000))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert_red(found()["disk"], f"{tmp_path} has 0.0 GiB free", "clear it")
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_no_compiler_and_no_operators(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert_red(found()["compiler"], "neither a C++ compiler", "apt-get install g++")
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "compiled").touch()
    assert found()["compiler"].ok is True


def test_command_prints_lines_json_and_its_status(tmp_path):
    command = [sys.executable, "-c", "from persona_pruner.cli import main; main()", "doctor"]
    env = os.environ | {"RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([*command, "--output", str(tmp_path / "out")], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ok  output: " in done.stdout
    assert done.stdout.splitlines()[-1] == "everything is in place"
    (tmp_path / "file").touch()
    words = ["--output", str(tmp_path / "file" / "out"), "--json"]
    done = subprocess.run([*command, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["ok"] is False
    (red,) = (finding for finding in document["findings"] if finding["name"] == "output")
    assert red["ok"] is False
    assert red["remedy"]


def test_secret_is_in_no_line(real_s3, monkeypatch):
    for name, value in real_s3.items():
        monkeypatch.setenv(name, value)
    findings = found(f"s3://{new_bucket(real_s3)}/run").values()
    assert real_s3["AWS_SECRET_ACCESS_KEY"] not in str([finding.to_dict() for finding in findings])
