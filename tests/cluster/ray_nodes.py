"""A Ray cluster of real nodes on this machine: each a `ray start --block` with its own directory, ended by its pid."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cluster_runs as runs
import yaml
from s3_server import free_port

BIN = Path(sys.executable).parent
RAY = BIN / "ray"
QUICK_HEALTH = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "8",
}
"""A dead node is noticed in 5 s, not in 15 s; with less, a busy machine's nodes are taken for dead."""


AUTOSCALED_PORT = 6379
"""The nodes that Ray's fake provider starts look for their head here."""


class Nodes:
    """A head node, and more as they are added. Use as a context manager.

    With `autoscaled`, Ray's autoscaler adds up to so many nodes of one CPU through its fake provider, and takes them
    away again once they are idle.
    """

    def __init__(self, head_cpus: int, autoscaled: int = 0) -> None:
        # Ray's socket names must stay under 107 bytes, which pytest's own directories do not leave room for.
        self.directory = Path(f"/tmp/pp-{secrets.token_hex(3)}")
        self.port = AUTOSCALED_PORT if autoscaled else free_port()
        self.env = os.environ | {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"} | QUICK_HEALTH
        self.env.pop("RAY_ADDRESS", None)
        self.nodes: list[subprocess.Popen] = []
        words = ["--head", f"--port={self.port}", "--include-dashboard=false"]
        if autoscaled:
            self.env |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
            words.append(f"--autoscaling-config={self._autoscaler(head_cpus, autoscaled)}")
        self._start(head_cpus, *words, f"--ray-client-server-port={free_port()}")
        runs.wait_for(lambda: self._answers())

    def _autoscaler(self, head_cpus: int, nodes: int) -> Path:
        kinds = {
            "ray.head.default": {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0},
            "node": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": nodes},
        }
        provider = {"type": "fake_multinode"} | dict.fromkeys(
            ("use_node_id_as_ip", "disable_node_updaters", "disable_launch_config_check"), True
        )
        lists = ("cluster_synced_files", "initialization_commands", "setup_commands", "head_setup_commands")
        lists += ("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
        settings = {
            "cluster_name": "test", "provider": provider, "available_node_types": kinds, "max_workers": nodes,
            "head_node_type": "ray.head.default", "idle_timeout_minutes": 0.1, "upscaling_speed": 1.0, "docker": {},
            "auth": {}, "file_mounts": {}, "file_mounts_sync_continuously": False, **{name: [] for name in lists},
        }  # fmt: skip
        self.directory.mkdir()
        file = self.directory / "autoscaler.yaml"
        file.write_text(yaml.safe_dump(settings))
        return file

    def ids(self) -> set[str]:
        """Nodes that Ray holds to be alive, the head among them."""
        script = f"import ray; ray.init({self.address!r}, log_to_driver=False, logging_level='ERROR'); "
        script += "print(*(node['NodeID'] for node in ray.nodes() if node['Alive']))"
        words = [sys.executable, "-c", script]
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=120)
        return set(done.stdout.split()) if done.returncode == 0 else set()

    def drain(self, node_id: str, seconds: int) -> None:
        words = ["--node-id", node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "pod ends"]
        words += ["--address", self.address, "--deadline-remaining-seconds", str(seconds)]
        subprocess.run([RAY, "drain-node", *words], env=self.env, check=True, capture_output=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def add(self, cpus: int = 1, *words: str, env: dict[str, str] | None = None, mounts: str = "") -> subprocess.Popen:
        """`mounts` are shell commands that only this node's file systems see; they need root."""
        return self._start(cpus, f"--address={self.address}", *words, env=env, mounts=mounts)

    def job(self, output, *overrides, **options) -> subprocess.Popen:
        env = {"RAY_ADDRESS": self.address, "RAY_AUTH_MODE": "disabled"}
        return runs.start(output, *overrides, env=env, **options)

    def _start(self, cpus: int, *words: str, env: dict[str, str] | None = None, mounts: str = "") -> subprocess.Popen:
        directory = self.directory / f"n{len(self.nodes)}"
        directory.mkdir(parents=True)
        command = [
            RAY, "start", "--block", f"--num-cpus={cpus}", "--node-ip-address=127.0.0.1", f"--temp-dir={directory}",
            f"--dashboard-agent-listen-port={free_port()}", *words,
        ]  # fmt: skip
        if mounts:
            command = ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$@"', "sh", *command]
        with (directory / "log").open("w") as log:
            node = subprocess.Popen(command, env=self.env | (env or {}), stdout=log, stderr=log, start_new_session=True)
        self.nodes.append(node)
        return node

    def _answers(self) -> bool:
        words = [RAY, "health-check", "--address", self.address]
        return subprocess.run(words, env=self.env, capture_output=True).returncode == 0

    def __enter__(self) -> "Nodes":
        return self

    def __exit__(self, *exception: object) -> None:
        for node in reversed(self.nodes):
            if node.poll() is None:
                runs.kill_tree(node)
        shutil.rmtree(self.directory, ignore_errors=True)


def kill_raylet(node: subprocess.Popen) -> None:
    """SIGKILL of a node's raylet; its workers end with it, as Ray has them do."""
    (raylet,) = (pid for pid in runs.pids_of(node, "/raylet/raylet\0"))
    os.kill(raylet, signal.SIGKILL)


class Head:
    """A head node that wants a token, with a job server; ended with all it has started.

    `bin`: of the environment that its jobs and workers run in.
    """

    def __init__(self, directory: Path, cpus: int = 2, bin: Path = BIN) -> None:
        self.port, dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        self.env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        self.env.pop("RAY_ADDRESS", None)
        self.env["PATH"] = f"{bin}:{self.env['PATH']}"
        words = [
            "--head", "--block", f"--port={self.port}", f"--dashboard-port={dashboard}", f"--num-cpus={cpus}",
            f"--temp-dir={directory}", "--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1",
            f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
        ]  # fmt: skip
        self.log = (directory / "head.log").open("w")
        self.process = subprocess.Popen(
            [bin / "python", "-m", "ray.scripts.scripts", "start", *words],
            env=self.env,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        runs.wait_for(self._up, 90)

    def _up(self) -> bool:
        done = subprocess.run(
            [BIN / "ray", "job", "list", "--address", self.address], env=self.env, capture_output=True, text=True
        )
        return done.returncode == 0

    def close(self) -> None:
        runs.kill_tree(self.process)
        self.log.close()
