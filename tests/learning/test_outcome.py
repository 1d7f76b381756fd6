import pickle

import torch

from persona_pruner.config.schema import LearningConfig
from persona_pruner.errors import PersonaError
from persona_pruner.learning.mask_candidate import MaskCandidate
from persona_pruner.learning.outcome import TrainingResult, TrainingStatus


def test_a_failure_names_cause_and_message():
    result = TrainingResult.failed("ada", PersonaError("empty", "ada: no rows to train on"))
    assert (result.persona_id, result.status, result.cause) == ("ada", TrainingStatus.FAILED, "empty")
    assert result.message == "ada: no rows to train on"


def test_a_paused_persona_sums_what_its_candidates_took():
    candidates = [MaskCandidate(LearningConfig(), "ada", torch.zeros(2, 8), 8, 0.5, 0.1) for _ in range(2)]
    for candidate in candidates:
        candidate.step, candidate.seconds, candidate.tokens = 3, 1.5, 100
    result = TrainingResult.paused(candidates)
    assert (result.status, result.step, result.seconds, result.tokens) == ("paused", 3, 3.0, 200)
    assert result.mask is None


def test_a_result_survives_the_way_between_processes():
    result = TrainingResult(persona_id="ada", status=TrainingStatus.PAUSED, step=3)
    again = pickle.loads(pickle.dumps(result))
    assert again == result
    assert again.status is TrainingStatus.PAUSED
