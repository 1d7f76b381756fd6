"""What the job decides by itself; whole runs are in tests/cluster."""

import io
import json

import pytest
from mask_examples import put_mask
from rich.console import Console
from tiny_models import save_tiny, tiny_config

from persona_pruner.manifest import Manifest, Persona
from persona_pruner.run.identity import identify
from persona_pruner.run.job import Job
from persona_pruner.run.progress import ProgressReporter
from persona_pruner.run.start import JobRequest
from persona_pruner.run.stop import StoppedError
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("backbone") / "tiny")


def job_of(backbone, output, personas, failures):
    config, storage = tiny_config(backbone), open_storage(output)
    request = JobRequest(config=config, manifest=Manifest("m", tuple(personas)), output=str(output))
    progress = ProgressReporter(Console(file=io.StringIO(), width=200))
    return Job(request, storage, identify(config, personas, storage), progress, None, failures)


def test_a_stale_mask_whose_new_training_failed_is_no_mask_and_its_error_stays(backbone, tmp_path):
    new = Persona("ada", "Ada, who now sails.")
    job = job_of(backbone, tmp_path / "out", [new], {"ada": "training broke"})
    put_mask(job.storage, job.identity, Persona("ada", "Ada, who used to bake."))
    error = {"persona_id": "ada", "cause": "not_finite", "message": "training broke"}
    job.storage.put(keys.error("ada"), json.dumps(error).encode())
    assert job.report() == 3
    told = job.progress.console.file.getvalue()
    assert "0 of 1 personas masked" in told
    assert "failed ada: training broke" in told
    assert "try: 1 persona: set backbone.dtype to float32" in told
    assert "inspect" not in told
    assert job.storage.exists(keys.error("ada"))


def test_a_mask_of_this_description_and_run_counts_and_its_old_error_goes(backbone, tmp_path):
    ada, ben = Persona("ada", "Ada"), Persona("ben", "Ben")
    job = job_of(backbone, tmp_path / "out", [ben, ada], {})
    put_mask(job.storage, job.identity, ada)
    put_mask(job.storage, job.identity, ben, run_id="another")
    job.storage.put(keys.error("ada"), b"{}")
    assert job.report() == 0
    told = job.progress.console.file.getvalue()
    assert "1 of 2 personas masked" in told
    assert "inspect" in told
    assert "--persona ada" in told
    assert not job.storage.exists(keys.error("ada"))


class Pool:
    """Groups that learn the pooled mask, or are stopped before."""

    def __init__(self, learned=True):
        self.learned, self.calls = learned, []

    def map(self, method, payloads, should_stop):
        for payload in payloads:
            self.calls.append((method, [persona.id for persona in payload]))
            yield payload, self.learned


class Stopped:
    reason = "SIGTERM"

    def __call__(self):
        return True


def test_the_pooled_mask_has_one_sample_for_good_and_a_stop_ends_the_job(backbone, tmp_path):
    personas = [Persona(f"p{n}", f"number {n}") for n in range(30)]
    job = job_of(backbone, tmp_path / "out", personas, {})
    first, grown, stopped = Pool(), Pool(), Pool(learned=False)
    job.learn_pooled_mask(first, ())
    assert first.calls == [("train_pooled", json.loads(job.storage.get(keys.POOLED_SAMPLE)))]
    assert len(first.calls[0][1]) == job.request.config.learning.pooled_personas
    more = [*personas, *(Persona(f"q{n}", f"number {n}") for n in range(30))]
    again = job_of(backbone, tmp_path / "out", more, {})
    again.learn_pooled_mask(grown, ())
    assert grown.calls == first.calls
    again.stop = Stopped()
    with pytest.raises(StoppedError):
        again.learn_pooled_mask(stopped, ())
