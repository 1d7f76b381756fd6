"""The Helm chart: the same objects as kustomize gives, and values that reach them."""

import subprocess
from pathlib import Path

import yaml
from cluster_objects import NAME, pods

CLUSTER = Path(__file__).parents[2] / "cluster"


def test_chart_passes_helm_lint(kubernetes_tools):
    done = subprocess.run(
        [kubernetes_tools / "helm" / "helm", "lint", "--strict", CLUSTER / "helm"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_chart_gives_what_kustomize_gives(kustomize, helm_template):
    base, chart = kustomize("kuberay/base"), helm_template()
    assert set(base) == set(chart)
    for name in base:
        assert base[name].get("spec") == chart[name].get("spec"), name
    kueue, queued = kustomize("kuberay/overlays/kueue"), helm_template("job.enabled=true", "queue=personas")
    job, charted = kueue["RayJob", NAME], queued["RayJob", NAME]
    assert job["spec"] == charted["spec"]
    assert job["metadata"]["annotations"] == charted["metadata"]["annotations"]
    served, chart = kustomize("kuberay/overlays/serving"), helm_template("serving.enabled=true")
    assert set(served) == set(chart)
    for name in served:
        specs = [objects[name].get("spec") for objects in (served, chart)]
        for spec in specs:
            if name[0] == "RayService":
                spec["serveConfigV2"] = yaml.safe_load(spec["serveConfigV2"])
        assert specs[0] == specs[1], name
    monitored, production = helm_template("monitoring=true"), kustomize("kuberay/overlays/production")
    for kind in ("PodMonitor", "PrometheusRule"):
        assert monitored[kind, NAME]["spec"] == production[kind, NAME]["spec"]
    name = ("ConfigMap", "persona-pruner-dashboard")
    assert monitored[name]["data"]["dashboard.json"].strip() == production[name]["data"]["dashboard.json"].strip()


def test_values_of_the_chart_reach_every_pod(helm_template):
    objects = helm_template(
        "image=here/ours:1", "secret=keys", "env.AWS_REGION=eu-west-1", "workers.gpus=4", "workers.cpus=32",
        "workers.max=3", "roleArn=arn:aws:iam::1:role/x", "config.learning.steps=40", release="team-a",
    )  # fmt: skip
    spec = objects["RayCluster", "team-a"]["spec"]
    for pod in pods(spec):
        assert pod["serviceAccountName"] == "team-a"
        for container in pod["containers"] + pod.get("initContainers", []):
            assert container["image"] == "here/ours:1"
            assert container["envFrom"][0]["secretRef"]["name"] == "keys"
            assert {"name": "AWS_REGION", "value": "eu-west-1"} in container["env"]
    (worker,) = spec["workerGroupSpecs"]
    assert worker["maxReplicas"] == 3
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (limits["nvidia.com/gpu"], limits["cpu"]) == ("4", "32")
    assert yaml.safe_load(objects["ConfigMap", "team-a"]["data"]["run.yaml"]) == {"learning": {"steps": 40}}
    role = objects["ServiceAccount", "team-a"]["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
    assert role == "arn:aws:iam::1:role/x"


def test_arguments_of_the_server_come_from_the_values_of_the_chart(helm_template):
    spec = helm_template("serving.enabled=true", "serving.args.output=s3://other/run")["RayService", NAME]["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert application["args"]["output"] == "s3://other/run"
    assert application["args"]["engine"] == "vllm"
