"""Files for `ray up`, compose, images and policies, offline; and one real start of two nodes."""

import json
import re
import sys
from pathlib import Path

import yaml

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


def test_image_copies_what_exists_and_installs_the_constraints():
    text = (CLUSTER / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", text, re.M):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
    assert "-c constraints.txt" in text


def test_policies_grant_nothing_outside_their_bucket():
    for file in (CLUSTER / "policies").glob("*.json"):
        for statement in json.loads(file.read_text())["Statement"]:
            resources = statement["Resource"]
            for resource in [resources] if isinstance(resources, str) else resources:
                assert resource.startswith("arn:aws:s3:::BUCKET"), file.name
            assert "s3:*" not in statement["Action"]
