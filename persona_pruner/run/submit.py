"""Hand the main job to a Ray cluster's job server and follow it."""

import json
import os
from collections.abc import Sequence

from persona_pruner.errors import ConfigError, StorageError

STOP_WAIT = "20"
"""Seconds between SIGTERM and SIGKILL of `ray job stop`: enough to checkpoint what runs."""


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
