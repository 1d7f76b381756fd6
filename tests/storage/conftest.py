import pytest

from persona_pruner.storage import s3 as storage_s3


@pytest.fixture(params=["real_s3", "ceph_s3"])
def server(request, monkeypatch):
    settings = request.getfixturevalue(request.param)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return settings


@pytest.fixture
def large(monkeypatch) -> bytes:
    """An object in three parts: of 17 MiB they are as good a multipart upload as more of a larger one."""
    monkeypatch.setattr(storage_s3, "MULTIPART_BYTES", 8 * 2**20)
    return bytes(17 * 2**20)
