import json

import pytest

from persona_pruner.run.lease import Lease
from persona_pruner.run.part import Part
from persona_pruner.run.status import describe, read_statuses, status_of
from persona_pruner.storage import keys
from persona_pruner.storage.base import NotFoundError
from persona_pruner.storage.open import open_storage


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path / "out")


@pytest.fixture
def document():
    import io

    from rich.console import Console

    from persona_pruner.run.progress import ProgressReporter

    progress = ProgressReporter(Console(file=io.StringIO()))
    progress.train(8, 3, 10)
    return status_of(progress)


def test_where_nothing_ran(storage):
    with pytest.raises(NotFoundError, match="no run has worked here"):
        read_statuses(storage)


def test_a_job_that_nobody_holds_any_more_is_dead(storage, document):
    storage.put(keys.STATUS, json.dumps(document).encode())
    (status,) = read_statuses(storage)
    assert (status["state"], status["holder"]) == ("dead", None)
    with Lease(storage, 30):
        (status,) = read_statuses(storage)
    assert status["state"] == "running"
    assert "3 of 8 masked" in "\n".join(describe(status, "out"))


def test_every_part_is_told(storage, document):
    for number in (1, 2):
        part = Part(number, 2).name
        storage.put(keys.status(part), json.dumps(document | {"part": part}).encode())
    with Lease(storage, 30, Part(2, 2)):
        states = {status["part"]: status["state"] for status in read_statuses(storage)}
    assert states == {"part-1-of-2": "dead", "part-2-of-2": "running"}
