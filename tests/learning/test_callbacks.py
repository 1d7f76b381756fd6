from persona_pruner.learning.callbacks import TrainingCallbacks
from persona_pruner.learning.outcome import Progress


def test_the_defaults_keep_nothing_and_never_stop():
    callbacks = TrainingCallbacks()
    callbacks.write_checkpoint("ada", b"state")
    callbacks.report(Progress("ada", 1, 2.0, None, 10, 0.1))
    assert callbacks.read_checkpoint("ada") is None
    assert callbacks.warm_scores("ada") is None
    assert not callbacks.should_stop()
