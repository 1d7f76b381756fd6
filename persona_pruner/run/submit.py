"""Hand the main job to a Ray cluster's job server and follow it."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import ConfigError, StorageError

STOP_WAIT = "20"
"""Seconds between SIGTERM and SIGKILL of `ray job stop`: enough to checkpoint what runs."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is submitted, and where to."""

    manifest: str
    config: str
    output: str
    options: Sequence[str] = ()
    """More words of `persona-pruner run`."""
    address: str
    working_dir: str | None = None
    """Shipped as it is; None ships only the files that the job reads."""
    env: Sequence[str] = ()
    """Variables of this environment that the job gets."""

    @property
    def command(self) -> list[str]:
        words = ["python", "-m", "persona_pruner", "run", self.manifest]
        return [*words, "--config", self.config, "--output", self.output, *self.options]


def files_of(submission: Submission, config: RunConfig) -> Iterator[Path]:
    """Local files and directories that the job reads, as far as they lie below the working directory.

    Paths that are absolute are those of the cluster.
    """
    synthesis, evaluation = config.synthesis, config.evaluation
    paths = [submission.manifest, submission.config, config.backbone.path, synthesis.references.path]
    paths += [config.learning.objective.generic_rows, evaluation.conversations, evaluation.questions]
    paths += [source.path for source in synthesis.sources]
    for path in paths:
        if path and "://" not in path and not Path(path).is_absolute() and Path(path).exists():
            yield Path(path)


def stage(files: Iterable[Path], directory: Path) -> None:
    """Copy files into a directory under the names that they have below the working directory."""
    for file in files:
        to = directory / file
        to.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            shutil.copytree(file, to, dirs_exist_ok=True)
        else:
            shutil.copyfile(file, to)


def submit_run(submission: Submission, config: RunConfig | None, wait: bool, *, print_json: bool) -> int:
    """As `submit_job`. `config`: None where it lies on the cluster only."""
    with tempfile.TemporaryDirectory(prefix="persona-pruner-") as name:
        if submission.working_dir is None and config is not None:
            stage(files_of(submission, config), Path(name))
        working_dir = submission.working_dir or name
        command, address, env = submission.command, submission.address, submission.env
        return submit_job(command, address, working_dir, env, wait, print_json=print_json)


def submit_job(
    command: Sequence[str], address: str, working_dir: str, env: Sequence[str], wait: bool, *, print_json: bool
) -> int:
    """Returns the job's exit status (0 at once without `wait`). Raises ConfigError, StorageError in one line."""
    import asyncio
    import shlex

    from ray.job_submission import JobStatus, JobSubmissionClient

    missing = [name for name in env if name not in os.environ]
    if missing:
        raise ConfigError(f"--env {missing[0]}: is not set in this environment")
    variables = {name: os.environ[name] for name in env} | {"RAY_JOB_STOP_WAIT_TIME_S": STOP_WAIT}
    try:
        client = JobSubmissionClient(address)
        job = client.submit_job(
            entrypoint=shlex.join(command), runtime_env={"working_dir": working_dir, "env_vars": variables}
        )
    except Exception as error:
        raise StorageError(_explain(address, error)) from None
    print(json.dumps({"job": job}) if print_json else f"submitted as {job}", flush=True)
    if not wait:
        return 0

    async def follow() -> None:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)

    asyncio.run(follow())
    info = client.get_job_info(job)
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    return 0 if info.status == JobStatus.SUCCEEDED else 1


def _explain(address: str, error: Exception) -> str:
    text = str(error)
    if "401" in text or "403" in text or "nauthorized" in text:
        return f"{address}: the cluster wants a token: export RAY_AUTH_MODE=token and put it into ~/.ray/auth_token"
    if "413" in text:
        return f"{address}: the working directory is over 100 MiB; name a smaller one or list files in .rayignore"
    return f"{address}: no Ray job server answers: {text.splitlines()[0][:160] if text else type(error).__name__}"
