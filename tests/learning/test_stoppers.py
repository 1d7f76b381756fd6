import torch

from persona_pruner.config.schema import StoppersConfig
from persona_pruner.learning.stoppers import Stopper, StopReason

MASK = torch.tensor([[True, False, True, False]])


def test_a_plateau_is_a_number_of_evaluations_without_improvement():
    stopper = Stopper(StoppersConfig(plateau_evaluations=2, plateau_delta=0.1))
    assert [stopper.see(loss, MASK) for loss in (2.0, 1.95, 1.5, 1.45, 1.45)] == [None, None, None, None, "plateau"]


def test_stable_is_a_mask_that_hardly_changes():
    stopper = Stopper(StoppersConfig(stability=0.25))
    assert stopper.see(1.0, MASK) is None
    assert stopper.see(1.0, ~MASK) is None
    changed = ~MASK
    changed[0, 0] = True
    assert stopper.see(1.0, changed) is StopReason.STABLE


def test_no_stopper_never_stops():
    stopper = Stopper(StoppersConfig())
    assert {stopper.see(1.0, MASK) for _ in range(5)} == {None}
