"""Parts of the Kubernetes objects that kustomize and helm build, each a dictionary by (kind, name)."""

NAME = "persona-pruner"


def cluster_spec(objects):
    if job := objects.get(("RayJob", NAME)):
        return job["spec"]["rayClusterSpec"]
    if service := objects.get(("RayService", NAME)):
        return service["spec"]["rayClusterConfig"]
    return objects["RayCluster", NAME]["spec"]


def pods(spec):
    return [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
