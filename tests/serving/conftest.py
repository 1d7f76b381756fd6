import pytest
from served_run import PERSONAS, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The shipped backbone, and a directory with the masks of PERSONAS."""
    run = make_run(tmp_path_factory.mktemp("run"))
    run.commit(*[run.mask(persona) for persona in PERSONAS])
    return run
