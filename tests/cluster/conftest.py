import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cluster_runs as runs


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """Output of a run that nothing disturbed, on a local Ray and a local directory."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    code, text = runs.run(output)
    assert code == 0, text
    assert len(runs.masks(output)) == 3
    return output
