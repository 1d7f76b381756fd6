import pytest
from api_contract import *  # noqa: F403
from server_process import running_server


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    arguments = ["--slots", "6", "--where", "ratio==0.25"]  # Fewer slots than personas.
    with running_server(run.output, run.backbone, "transformers", log, *arguments) as server:
        yield server


@pytest.fixture
def storm_size():
    """(personas, requests, clients); one request at a time is answered here."""
    return 100, 100, 64
