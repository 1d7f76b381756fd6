"""cluster/local/up.sh to down.sh: what an admin tries first, all in one run."""

import json
import os
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import cluster_runs as runs
import pytest
import yaml
from s3_server import free_port

LOCAL = runs.ROOT / "cluster" / "local"
BIN = Path(sys.executable).parent


def started_from(state):
    """Processes of the cluster: those in up.sh's list and all below them."""
    roots = [int(line.split()[1]) for line in (state / "pids").read_text().splitlines()]
    return {pid for root in roots for pid in (root, *runs.children(root))}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def processes_with(*words):
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:
                continue
            if any(word in command for word in words):
                found.append(command[:100])
    return found


@pytest.mark.cluster
@pytest.mark.fault
@pytest.mark.timeout(1800)
def test_up_doctor_submit_prometheus_down(tmp_path):
    # Ray gives ports from 10002 to 19999 to its workers.
    port = 20000 + free_port() % 10000
    state = tmp_path / "state"
    env = os.environ | {"STATE": str(state), "PORT": str(port), "DASHBOARD_PORT": str(port + 10), "CPUS": "2"}
    env |= {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        env.pop(name, None)
    try:
        up = subprocess.run([LOCAL / "up.sh"], env=env, capture_output=True, text=True, timeout=900)
        assert up.returncode == 0, up.stdout + up.stderr
        again = subprocess.run([LOCAL / "up.sh"], env=env, capture_output=True, text=True, timeout=60)
        assert again.returncode == 2
        assert "is up already" in again.stderr
        env |= exports(state / "env")
        assert (state / "env").stat().st_mode & 0o077 == 0

        words = ["doctor", "--output", "s3://personas/run", "--config", "manifests/quickstart/run.yaml"]
        done = tool("persona-pruner", *words, "--json", env=env)
        report = json.loads(done.stdout)
        assert done.returncode == 0, report
        assert {finding["ok"] for finding in report["findings"]} == {True}
        assert "2 nodes" in next(finding["detail"] for finding in report["findings"] if finding["name"] == "ray")

        # Steps enough for some scrapes: Ray tells a job's figures every 10 s, and Prometheus asks every 15 s.
        words = runs.command("s3://personas/run", "learning.steps=400", personas=2)
        done = tool("ray", "job", "submit", "--working-dir", ".", "--", "python", *words, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 of 2 personas masked" in done.stdout
        verified = tool("persona-pruner", "verify", "s3://personas/run", env=env)
        assert "2 masks, all verify" in verified.stdout
        if "prometheus: " in up.stdout:
            assert_prometheus_sees_the_job(f"http://127.0.0.1:{port + 30}")
        started = started_from(state)
    finally:
        down = subprocess.run([LOCAL / "down.sh"], env=env, capture_output=True, text=True, timeout=300)
    assert down.returncode == 0, down.stderr
    runs.wait_for(lambda: not any(alive(pid) for pid in started))
    assert processes_with(f"127.0.0.1:{port}", str(state)) == []


def exports(file):
    words = [word for line in file.read_text().splitlines() for word in line.removeprefix("export ").split()]
    return dict(word.split("=", 1) for word in words)


def tool(name, *words, env):
    return subprocess.run([BIN / name, *words], cwd=runs.ROOT, env=env, capture_output=True, text=True, timeout=900)


def assert_prometheus_sees_the_job(url):
    def ask(path):
        with urllib.request.urlopen(f"{url}/api/v1/{path}", timeout=60) as answer:
            return json.load(answer)["data"]

    def value(query):
        result = ask(f"query?query={urllib.parse.quote(query)}")["result"]
        return float(result[0]["value"][1]) if result else None

    def targets():
        active = ask("targets")["activeTargets"]
        return len(active) >= 2 and all(target["health"] == "up" for target in active)

    def rules():
        return [rule for group in ask("rules")["groups"] for rule in group["rules"]]

    runs.wait_for(targets)
    # All states together: the last figures of a job that ends may never be told.
    runs.wait_for(lambda: value("sum(last_over_time(ray_persona_pruner_personas[1h]))") == 2)
    runs.wait_for(lambda: rules() and all(rule["health"] == "ok" for rule in rules()))
    expected = yaml.safe_load((runs.ROOT / "cluster" / "monitoring" / "alerts.yaml").read_text())["groups"][0]["rules"]
    assert {rule["name"] for rule in rules()} == {rule["alert"] for rule in expected}
