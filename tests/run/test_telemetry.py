from tensorboardX.proto.event_pb2 import Event

from persona_pruner.manifest import Persona
from persona_pruner.run.telemetry import EventFiles
from persona_pruner.scheduling.persona_job import PersonaJob
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


class Counting:
    """A storage that counts what is written."""

    def __init__(self, storage):
        self._storage, self.bytes = storage, 0

    def put(self, key, data):
        self.bytes += len(data)
        self._storage.put(key, data)


def events_of(data):
    """Events of a file: length (8 bytes), its checksum (4), the record, its checksum (4)."""
    while data:
        size = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]


def test_events_go_on_in_another_file_so_that_copying_does_not_grow(tmp_path):
    storage = open_storage(tmp_path / "out")
    counting = Counting(storage)
    files = EventFiles(counting, part_bytes=4096)
    for number in range(40):
        for _ in range(20):
            files.masked(PersonaJob(Persona(f"p{number}", "x"), "TERMINATED", seconds=1.0, heldout_loss=1.5))
        files.store()
    files.store()
    files.close()
    stored = list(storage.list(keys.TENSORBOARD))
    assert len(stored) > 5
    assert counting.bytes < 4 * sum(item.size for item in stored)
    steps = [
        event.step
        for item in stored
        for event in events_of(storage.get(item.key))
        for value in event.summary.value
        if value.tag == "mask/seconds"
    ]
    assert sorted(steps) == list(range(1, 801))


def test_nothing_new_is_not_copied(tmp_path):
    counting = Counting(open_storage(tmp_path / "out"))
    files = EventFiles(counting)
    files.store()
    before = counting.bytes
    files.store()
    files.close()
    assert counting.bytes == before
