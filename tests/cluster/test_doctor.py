"""`persona-pruner doctor` on clusters whose nodes are wrong; tests/run/test_doctor.py has what needs no cluster."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cluster_runs as runs
import pytest
from ray_nodes import Nodes, kill_raylet

pytestmark = [pytest.mark.cluster, pytest.mark.fault, pytest.mark.timeout(900)]


@pytest.fixture
def nodes():
    with Nodes(head_cpus=1) as started:
        yield started


def diagnose(nodes, *words):
    """Findings by name, each one's verdict, text and remedy."""
    done = subprocess.run(
        [Path(sys.executable).parent / "persona-pruner", "doctor", "--address", nodes.address, "--json", *words],
        # Ray's workers take the packages that lie in its driver's directory before their own.
        cwd=nodes.directory, env=nodes.env, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    return {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}


@pytest.fixture
def mounting():
    tried = subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True
    )
    if tried.returncode:
        pytest.skip(f"no file system can be mounted for one process: {tried.stderr.strip()}")


def wrong_python(directory):
    """A PYTHONPATH under which another version of the package is installed and the clock is 100 s ahead."""
    version = directory / "persona_pruner-9.9.9.dist-info"
    version.mkdir(parents=True)
    (version / "METADATA").write_text("Metadata-Version: 2.1\nName: persona-pruner\nVersion: 9.9.9\n")
    ahead = "import time\nnow = time.time\ntime.time = lambda: now() + 100\n"
    (directory / "sitecustomize.py").write_text(ahead)
    return str(directory)


def test_each_fault_of_a_node_is_a_red_line_that_names_the_node_and_no_other(nodes, mounting, example, tmp_path):
    backbone, other, output, cache = (tmp_path / name for name in ("backbone", "other", "output", "cache"))
    for directory in (output, cache):
        directory.mkdir()
    for directory in (backbone, other):
        shutil.copytree(example / "backbone", directory)
    weights = next(other.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    run = tmp_path / "run.yaml"
    settings = (example / "run.yaml").read_text().replace("path: instructions", f"path: {example}/instructions")
    run.write_text(settings.replace("path: backbone", f"path: {backbone}"))
    mounts = [
        f"mount --bind {other} {backbone}",
        "mount -t tmpfs -o size=64m tmpfs /dev/shm",
        f"mount -t tmpfs -o ro tmpfs {output}",
        f"mount -t tmpfs -o size=2m tmpfs {cache}",
        f"head -c 2050000 /dev/zero > {cache}/filler",
    ]
    env = {
        "PYTHONPATH": wrong_python(tmp_path / "python"),
        "XDG_CACHE_HOME": str(cache),
        "CXX": "no-such-compiler",
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "no-operators"),
    }
    before = nodes.ids()
    wrong = nodes.add(1, "--num-gpus=1", "--object-store-memory=100000000", env=env, mounts=" && ".join(mounts))
    (node_id,) = runs.wait_for(lambda: nodes.ids() - before)
    (agent,) = runs.wait_for(lambda: runs.pids_of(wrong, "ray::DashboardAgent"))
    os.kill(agent, signal.SIGSTOP)
    findings = diagnose(nodes, "--config", str(run), "--output", str(output / "run"))
    said = {
        "versions": "persona-pruner 9.9.9 and not",
        "clocks of the nodes": "is +100 s off",
        "gpus": "Ray has 1, torch sees 0",
        "shared memory": "/dev/shm has 64 MiB, Ray's object store 256",
        "compiler": "neither a C++ compiler nor compiled operators",
        "disk": f"{cache} has 0.0 GiB free",
        "metrics": "/metrics does not answer",
        "output from the nodes": str(output),
    }
    assert {name for name, finding in findings.items() if finding["ok"] is False} == {*said, "backbone"}
    for name, text in said.items():
        (line,) = findings[name]["detail"].split("; ")
        assert f"#{node_id[:6]}" in line
        assert text in line
        assert findings[name]["remedy"]
    assert findings["backbone"]["detail"].count("fingerprint ") == 2
    assert "the same weights" in findings["backbone"]["remedy"]


def test_node_without_the_package_is_told_with_what_it_said(nodes, tmp_path):
    package = tmp_path / "persona_pruner"
    package.mkdir()
    (package / "__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'persona_pruner'\")")
    before = nodes.ids()
    nodes.add(env={"PYTHONPATH": str(tmp_path)})
    (node_id,) = runs.wait_for(lambda: nodes.ids() - before)
    findings = diagnose(nodes)
    assert {name for name, finding in findings.items() if finding["ok"] is False} == {"nodes"}
    assert f"#{node_id[:6]}: " in findings["nodes"]["detail"]
    assert "No module named 'persona_pruner'" in findings["nodes"]["detail"]
    assert "is persona-pruner installed there?" in findings["nodes"]["remedy"]


def test_cluster_that_answers_but_takes_no_driver(nodes):
    """The head's raylet is gone, its control service is not."""
    (head,) = nodes.nodes
    runs.wait_for(nodes.ids)
    os.kill(head.pid, signal.SIGSTOP)  # else it would end the other processes of the node
    kill_raylet(head)
    findings = diagnose(nodes)
    assert findings["ray"]["ok"] is False
    assert findings["ray"]["detail"].startswith(f"{nodes.address}: ")
    assert "no Ray cluster answers" not in findings["ray"]["detail"]
    assert "start a node" in findings["ray"]["remedy"]
