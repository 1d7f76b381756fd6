"""The main job as a command: from file names to an exit status. The display shows before anything heavy is imported."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console

from persona_pruner.config.load import load_config
from persona_pruner.errors import UserError
from persona_pruner.run.part import WHOLE, Part
from persona_pruner.run.progress import ProgressReporter
from persona_pruner.run.status import status_of


@dataclass(frozen=True, kw_only=True)
class Command:
    """The arguments of `persona-pruner run` and of the jobs."""

    manifest: str
    config: str
    output: str
    overrides: Sequence[str] = ()
    limit: int | None = None
    """Only the first so many personas."""
    part: str | None = None
    """Only these personas, e.g. 3/10."""
    synthesis: bool = True
    training: bool = True
    as_json: bool = False
    """The last status as JSON on stdout, and everything that is told on the way on stderr."""


def run(command: Command) -> int:
    """Run the job to its end or to a stop. Raises UserError."""
    part = WHOLE if command.part is None else Part.parse(command.part)
    settings = load_config(command.config, command.overrides)
    with ProgressReporter(Console(stderr=command.as_json)) as progress:
        progress.begin("checking the input")
        from persona_pruner.manifest import Manifest, read_manifest
        from persona_pruner.run.preflight import gpus_of_nodes
        from persona_pruner.run.start import JobRequest, check_and_plan

        manifest = read_manifest(command.manifest)
        if command.limit is not None:
            manifest = Manifest(manifest.source, manifest.personas[: command.limit], manifest.warnings)
        request = JobRequest(
            config=settings,
            manifest=manifest,
            output=command.output,
            part=part,
            synthesis=command.synthesis,
            training=command.training,
        )
        start = check_and_plan(request, gpus_of_nodes(settings))
        progress.begin("loading libraries")  # Ray and DeepSpeed: whoever is refused has not waited for them
        from persona_pruner.run.job import run_job

        code = run_job(request, start, progress)
    if command.as_json:
        print(json.dumps(status_of(progress), indent=1))
    return code


def evaluate_masks(
    output: str, config: str, overrides: Sequence[str] = (), personas: Sequence[str] = (), sample: int | None = None
) -> int:
    """Evaluate an output's masks to the end or to a stop. Raises UserError."""
    settings = load_config(config, overrides)
    with ProgressReporter(Console()) as progress:
        progress.begin("loading libraries")
        from persona_pruner.run.evaluate import EvaluationRequest, run_evaluation

        request = EvaluationRequest(config=settings, output=output, personas=tuple(personas), sample=sample)
        return run_evaluation(request, progress)


def exit_status(body: Callable[[], int]) -> int:
    """The status of a job's body; a user's fault becomes its lines on stderr and its status."""
    try:
        return body()
    except UserError as error:
        print(str(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
