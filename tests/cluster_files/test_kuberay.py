"""What every way to build the Kubernetes files must give, by KubeRay's definitions and Ray's autoscaler."""

import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from cluster_objects import NAME, cluster_spec, pods

from persona_pruner.config.load import load_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
CRDS = ROOT.parent / "shared" / "kuberay"
OVERLAYS = sorted(folder.name for folder in (CLUSTER / "kuberay" / "overlays").iterdir())


def built(kustomize, helm_template, how):
    if how.startswith("helm"):
        return helm_template(*how.split()[1:])
    return kustomize(f"kuberay/{how}")


EVERY_WAY = [
    "base", *(f"overlays/{name}" for name in OVERLAYS), "helm", "helm job.enabled=true queue=personas monitoring=true",
    "helm serving.enabled=true",
]  # fmt: skip


@pytest.fixture(params=EVERY_WAY)
def objects(request, kustomize, helm_template):
    return built(kustomize, helm_template, request.param)


def strict(schema):
    """JSON schema of a CRD's OpenAPI schema: unknown fields are refused; what has a default is not required."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    if schema.pop("x-kubernetes-int-or-string", False):
        return {"type": ["integer", "string"]}
    properties = schema.get("properties")
    if isinstance(properties, dict) and schema.get("type") == "object":
        schema.setdefault("additionalProperties", False)
        schema["required"] = [name for name in schema.get("required", []) if "default" not in properties.get(name, {})]
    return schema


@pytest.fixture(scope="module")
def definitions():
    if not CRDS.is_dir():
        pytest.skip("../shared/kuberay (KubeRay's custom resource definitions) is absent")
    found = {}
    for path in CRDS.glob("*.yaml"):
        for crd in yaml.safe_load_all(path.read_text()):
            for version in (crd or {}).get("spec", {}).get("versions", ()):
                kind = (f"ray.io/{version['name']}", crd["spec"]["names"]["kind"])
                found[kind] = strict(version["schema"]["openAPIV3Schema"]["properties"]["spec"])
    return found


def test_ray_objects_follow_the_custom_resource_definitions(objects, definitions):
    """Of a RayService, whose definition is not at hand, the cluster."""
    for document in objects.values():
        if document["apiVersion"].startswith("ray.io/"):
            service = document["kind"] == "RayService"
            schema = definitions[document["apiVersion"], "RayCluster" if service else document["kind"]]
            spec = cluster_spec(objects) if service else document["spec"]
            jsonschema.Draft202012Validator(schema).validate(spec)


def test_a_misspelt_field_does_not_follow_them(kustomize, definitions):
    spec = kustomize("kuberay/base")["RayCluster", NAME]["spec"]
    spec["workerGroupSpecs"][0]["maxReplica"] = spec["workerGroupSpecs"][0].pop("maxReplicas")
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.Draft202012Validator(definitions["ray.io/v1", "RayCluster"]).validate(spec)


def test_clusters_authenticate_scale_and_keep_work_off_the_head(objects):
    spec = cluster_spec(objects)
    assert spec["rayVersion"] == re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_no_container_is_root_or_writes_outside_of_its_volumes(objects):
    templates = pods(cluster_spec(objects))
    templates += [d["spec"]["template"]["spec"] for (kind, _), d in objects.items() if kind == "StatefulSet"]
    for pod in templates:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"] + pod.get("initContainers", []):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"] == container["resources"]["limits"]
            assert ":" in container["image"]
            mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            volumes = {volume["name"] for volume in pod.get("volumes", ())} | {"data"}
            assert set(mounted) <= volumes
            for variable in container["env"]:
                if variable["name"] in ("HOME", "XDG_CACHE_HOME"):
                    assert variable["value"] in mounted.values(), "must be on a volume"


def test_shared_memory_fits_into_the_memory_of_its_container(objects):
    for pod in pods(cluster_spec(objects)):
        (volume,) = (volume for volume in pod["volumes"] if volume["name"] == "shared-mem")
        gibibytes = [int(text.removesuffix("Gi")) for text in (
            volume["emptyDir"]["sizeLimit"], pod["containers"][0]["resources"]["limits"]["memory"]
        )]  # fmt: skip
        assert gibibytes[0] <= gibibytes[1] / 2


def test_drain_is_over_before_the_pod_is_killed(objects):
    (worker,) = cluster_spec(objects)["workerGroupSpecs"]
    pod = worker["template"]["spec"]
    script = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    seconds = int(re.search(r"--deadline-remaining-seconds (\d+) && sleep \1$", script)[1])
    checkpoint = load_config(ROOT / "manifests" / "s3.yaml").scheduler.checkpoint_seconds
    assert checkpoint < seconds < pod["terminationGracePeriodSeconds"]


def test_network_policy_covers_every_ray_pod_and_names_ports_that_they_have(objects):
    policy = objects["NetworkPolicy", NAME]["spec"]
    spec = cluster_spec(objects)
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for group in groups:
        labels = group["template"]["metadata"]["labels"]
        assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    open_ports = {port["port"] for rule in policy["ingress"] for port in rule.get("ports", ())}
    ports = {p["containerPort"] for group in groups for p in group["template"]["spec"]["containers"][0]["ports"]}
    assert open_ports <= ports


def test_ray_derives_the_node_types_that_we_mean(objects):
    """What the autoscaler in the head pod reads out of the RayCluster."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    spec = cluster_spec(objects)
    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": NAME, "namespace": "default"}, "spec": spec, "status": {}}
    )
    types = config["available_node_types"]
    head, gpu = types["headgroup"], types["gpu"]
    assert head["resources"]["CPU"] == 0
    assert "GPU" not in head["resources"]
    assert (head["min_workers"], head["max_workers"]) == (0, 0)
    assert {name: gpu["resources"][name] for name in ("CPU", "GPU", "memory")} == {
        "CPU": 8, "GPU": 1, "memory": 64 * 2**30,
    }  # fmt: skip
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, 8)
    assert config["max_workers"] == 8
    assert config["idle_timeout_minutes"] == 2


def test_the_shipped_configuration_fits_the_workers(objects):
    settings = load_config(ROOT / "manifests" / "s3.yaml")
    (worker,) = cluster_spec(objects)["workerGroupSpecs"]
    size = worker["template"]["spec"]["containers"][0]["resources"]["requests"]
    groups = settings.group_pool
    assert 0 < groups.num_gpus <= int(size["nvidia.com/gpu"])
    assert groups.num_cpus <= int(size["cpu"])
    assert groups.max <= worker["maxReplicas"] * int(size["nvidia.com/gpu"]) / groups.num_gpus


def test_init_container_pulls_the_backbone_into_the_cache(kustomize, bucket, example, tmp_path):
    for file in (example / "backbone").iterdir():
        bucket.put(f"backbone/{file.name}", file.read_bytes())
    run = tmp_path / "run.yaml"
    run.write_text(f"backbone: {{path: {bucket.url}/backbone}}\nsynthesis: {{sources: [{{path: s3://b/q.jsonl}}]}}\n")
    (init,) = pods(kustomize("kuberay/base")["RayCluster", NAME]["spec"])[1]["initContainers"]
    script = init["command"][-1].replace("/etc/persona-pruner/run.yaml", str(run))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pulled = Path(done.stdout.strip())
    assert pulled.is_relative_to(tmp_path / "cache")
    assert {file.name for file in pulled.iterdir()} == {file.name for file in (example / "backbone").iterdir()}
