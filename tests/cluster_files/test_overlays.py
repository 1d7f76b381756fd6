"""What each overlay of the Kubernetes files is for: a job, a service, a queue, a bucket, spot nodes."""

from pathlib import Path

import pytest
import yaml
from cluster_objects import NAME, cluster_spec, pods

ROOT = Path(__file__).parents[2]


def test_job_calls_the_entry_point_with_the_mounted_configuration(kustomize):
    objects = kustomize("kuberay/overlays/kueue")
    spec = objects["RayJob", NAME]["spec"]
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "20"
    words = spec["entrypoint"].split()
    assert (ROOT / words[1].removeprefix("/opt/persona-pruner/")).is_file()
    head = pods(spec["rayClusterSpec"])[0]["containers"][0]
    assert str(Path(words[words.index("--config") + 1]).parent) in {m["mountPath"] for m in head["volumeMounts"]}


def test_job_has_the_cluster_of_the_base_and_takes_its_place(kustomize):
    base, job = kustomize("kuberay/base"), kustomize("kuberay/overlays/kueue")
    assert cluster_spec(job) == cluster_spec(base)
    assert ("RayCluster", NAME) not in job


def test_service_has_the_cluster_of_the_base_with_an_image_that_serves(kustomize):
    base, service = kustomize("kuberay/base"), kustomize("kuberay/overlays/serving")
    assert ("RayCluster", NAME) not in service
    expected = yaml.safe_load(yaml.safe_dump(cluster_spec(base)).replace("persona-pruner:", "persona-pruner-serving:"))
    for pod in pods(expected):
        pod["containers"][0]["ports"].append({"name": "serve", "containerPort": 8000})
    assert cluster_spec(service) == expected
    serve = yaml.safe_load(service["RayService", NAME]["spec"]["serveConfigV2"])
    replica = serve["applications"][0]["deployments"][1]
    (worker,) = expected["workerGroupSpecs"]
    size = worker["template"]["spec"]["containers"][0]["resources"]["requests"]
    for option, resource in (("num_cpus", "cpu"), ("num_gpus", "nvidia.com/gpu")):
        assert replica["ray_actor_options"][option] <= int(size[resource])
    assert replica["autoscaling_config"]["max_replicas"] <= worker["maxReplicas"]


def test_kueue_admits_the_job_within_a_quota_that_holds_the_whole_cluster(kustomize):
    objects = kustomize("kuberay/overlays/kueue")
    job = objects["RayJob", NAME]
    assert job["spec"]["suspend"] is True
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["metadata"]["annotations"]["kueue.x-k8s.io/elastic-job"] == "true"
    queue = objects["LocalQueue", job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]]
    (group,) = objects["ClusterQueue", queue["spec"]["clusterQueue"]]["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert ("ResourceFlavor", flavor["name"]) in objects
    quota = {entry["name"]: int(entry["nominalQuota"].removesuffix("Gi")) for entry in flavor["resources"]}
    spec = job["spec"]["rayClusterSpec"]
    for name, amount in quota.items():
        needed = 0
        for count, group in ((1, spec["headGroupSpec"]), (8, spec["workerGroupSpecs"][0])):
            request = group["template"]["spec"]["containers"][0]["resources"]["requests"].get(name, "0")
            needed += count * int(request.removesuffix("Gi"))
        assert amount >= needed


@pytest.mark.parametrize("overlay", ["minio", "aws-irsa", "production"])
def test_every_pod_of_an_overlay_finds_its_bucket(kustomize, overlay):
    objects = kustomize(f"kuberay/overlays/{overlay}")
    wanted = {"minio": {"AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"}}.get(overlay, {"AWS_REGION"})
    for pod in pods(cluster_spec(objects)):
        for container in pod["containers"] + pod.get("initContainers", []):
            assert wanted <= {variable["name"] for variable in container["env"]}
    if overlay == "minio":
        (url,) = {v["value"] for v in pod["containers"][0]["env"] if v["name"] == "AWS_ENDPOINT_URL"}
        service = objects["Service", url.removeprefix("http://").partition(":")[0]]
        assert str(service["spec"]["ports"][0]["port"]) == url.rpartition(":")[2]
    else:
        assert "eks.amazonaws.com/role-arn" in objects["ServiceAccount", NAME]["metadata"]["annotations"]


def test_spot_takes_the_workers_and_not_the_head(kustomize):
    head, worker = pods(cluster_spec(kustomize("kuberay/overlays/spot")))
    assert head["nodeSelector"] != worker["nodeSelector"]
    assert "nvidia.com/gpu" in {toleration["key"] for toleration in worker["tolerations"]}
