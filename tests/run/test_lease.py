import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from persona_pruner.errors import OutputBusyError
from persona_pruner.run.lease import Lease, holders
from persona_pruner.run.part import Part
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path / "out")


def change(storage, epoch, **values):
    claim = json.loads(storage.get(keys.lease(epoch))) | values
    storage.put(keys.lease(epoch), json.dumps(claim).encode())


def test_the_second_job_is_told_who_works_there_and_since_when(storage):
    with Lease(storage, 30):
        claim = holders(storage)[""]
        with pytest.raises(OutputBusyError) as raised:
            Lease(storage, 30)
    assert claim["since"] in str(raised.value)
    assert f"host {socket.gethostname()}, pid {os.getpid()}" in str(raised.value)


def test_a_lease_given_back_leaves_nothing(storage):
    with Lease(storage, 30):
        assert holders(storage)
    assert holders(storage) == {}
    assert list(storage.list(keys.LEASES)) == []


def test_one_that_is_no_longer_renewed_is_taken_over_and_its_holder_notices(storage):
    first = Lease(storage, 0.6)
    change(storage, 1, renewed=time.time() - 60)
    second = Lease(storage, 30)
    assert first.lost.wait(10)
    first.release()
    assert holders(storage)[""]["owner"] == second._claim["owner"]
    second.release()


def test_renewal_keeps_the_lease(storage):
    with Lease(storage, 0.6) as lease:
        time.sleep(1.5)
        with pytest.raises(OutputBusyError):
            Lease(storage, 0.6)
        assert not lease.lost.is_set()


def test_a_job_that_was_killed_on_this_machine_is_taken_over_at_once(storage):
    code = (
        "import os, signal, sys\n"
        "from persona_pruner.run.lease import Lease\n"
        "from persona_pruner.storage.open import open_storage\n"
        "Lease(open_storage(sys.argv[1]), 3600)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, storage.url], check=False)
    assert len(list(storage.list(keys.LEASES))) == 1
    with Lease(storage, 30):
        assert holders(storage)[""]["pid"] == os.getpid()


def test_of_many_contenders_for_a_dead_lease_one_wins(storage):
    storage.put(
        keys.lease(7),
        json.dumps({"owner": "x", "host": "gone", "boot": "", "pid": 1, "job": "", "since": "", "seconds": 1,
                    "renewed": 0}).encode(),
    )  # fmt: skip

    def contend(_):
        try:
            return Lease(storage, 30)
        except OutputBusyError:
            return None

    with ThreadPoolExecutor(8) as pool:
        won = [lease for lease in pool.map(contend, range(8)) if lease]
    assert len(won) == 1
    won[0].release()


def test_parts_of_one_manifest_are_worked_on_side_by_side(storage):
    with Lease(storage, 30, Part(1, 10)), Lease(storage, 30, Part(2, 10)):
        assert sorted(holders(storage)) == ["part-1-of-10", "part-2-of-10"]
        with pytest.raises(OutputBusyError, match="on part 2/10 since"):
            Lease(storage, 30, Part(2, 10))
        with pytest.raises(OutputBusyError, match="on part"):
            Lease(storage, 30)
        with pytest.raises(OutputBusyError, match="on part 1/10"):
            Lease(storage, 30, Part(1, 5))
    with Lease(storage, 30), pytest.raises(OutputBusyError, match="another job works there since"):
        Lease(storage, 30, Part(2, 10))
    assert list(storage.list(keys.LEASES)) == []
