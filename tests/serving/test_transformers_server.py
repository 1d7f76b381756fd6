import pytest
from api_contract import *  # noqa: F403
from api_contract import PERSONAS
from served_run import make_run
from server_process import running_server


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"))
    run.commit(*[run.mask(persona) for persona in PERSONAS])
    return run


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
