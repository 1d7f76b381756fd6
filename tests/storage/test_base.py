import pytest

from persona_pruner.storage import base
from persona_pruner.storage.base import TransientError, until_deadline


def test_calls_that_are_made_again_are_counted():
    before = base.retries.total
    answers = iter([TransientError("busy"), TransientError("busy"), None])

    def call():
        if error := next(answers):
            raise error
        return "done"

    assert until_deadline(5, call) == "done"
    assert base.retries.total == before + 2
    with pytest.raises(TransientError):
        until_deadline(0, lambda: (_ for _ in ()).throw(TransientError("gone")))
    assert base.retries.total == before + 2
