"""The start of a run, the same for the job and for `plan`: what cannot end well is refused, then what is left to do.

Nothing is started and nothing stays in the output.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from persona_pruner.config.schema import RunConfig
from persona_pruner.errors import SourceError
from persona_pruner.manifest import Manifest, Persona, check_opposites
from persona_pruner.run.part import WHOLE, Part
from persona_pruner.run.preflight import NodeGpus, preflight
from persona_pruner.storage.base import Storage
from persona_pruner.storage.open import open_storage

if TYPE_CHECKING:
    from persona_pruner.run.identity import Identity
    from persona_pruner.run.plan import Plan


@dataclass(frozen=True, kw_only=True)
class JobRequest:
    """What to do with which personas. With one half off, the data of the other one must be there."""

    config: RunConfig
    manifest: Manifest
    output: str
    part: Part = WHOLE
    synthesis: bool = True
    training: bool = True

    @property
    def personas(self) -> tuple[Persona, ...]:
        """Those that this job is about; the whole manifest still decides tiles and references."""
        return tuple(persona for persona in self.manifest.personas if persona in self.part)

    @property
    def evaluation(self) -> bool:
        """The comparison is over all personas, so that no part does it."""
        return self.training and self.config.evaluation.enabled and self.part.is_whole


@dataclass(frozen=True)
class Start:
    """An output that a request fits, and what is left to do there."""

    storage: Storage
    identity: "Identity"
    plan: "Plan"


def check_and_plan(request: JobRequest, nodes: NodeGpus | None = None) -> Start:
    """Raises UserError where the request could not be done, within seconds where nothing can be reached.

    `nodes` is what is known about GPUs; None checks none.
    """
    config, storage = request.config, open_storage(request.output, request.config.storage)
    storage.check_writable()
    preflight(config, synthesis=request.synthesis, nodes=nodes)
    # Later, since they load torch: whoever has been refused by now has not waited for it.
    from persona_pruner.evaluation import table
    from persona_pruner.run.identity import check_run, identify
    from persona_pruner.run.plan import make_plan

    identity = identify(config, request.manifest.personas, storage)
    check_run(storage, identity)
    if config.evaluation.enabled:
        table.read_conversations(config)
    if request.training and config.learning.is_contrastive:
        check_opposites(request.personas, config.learning.method)
    plan = make_plan(Manifest(request.manifest.source, request.personas), storage, identity)
    if request.synthesis and plan.to_synthesize:
        check_synthesis(config, identity)
    return Start(storage, identity, plan)


def check_synthesis(config: RunConfig, identity: "Identity") -> None:
    """Raise SourceError where nothing could be asked or compared."""
    from persona_pruner.synthesis.sources import load_question_set

    load_question_set(config.synthesis)
    if len(identity.references) < 2 and not config.synthesis.references.path:
        raise SourceError("one persona has no references; set synthesis.references.path to a file of personas")
