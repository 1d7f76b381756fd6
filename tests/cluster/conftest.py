import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import cluster_runs as runs

COSTS: list[tuple[str, float, float]] = []
"""(fault, seconds of a run without it, seconds of the run with it)."""


def pytest_addoption(parser):
    parser.addoption("--seconds-lost", action="store_true", help="print what every fault costs (make faults)")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--seconds-lost", default=False):
        items[:] = [item for item in items if "cost" in item.fixturenames or item.get_closest_marker("fault")]


@pytest.fixture(scope="session")
def whole_seconds():
    """Seconds of `undisturbed`; filled in by it."""
    return []


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, whole_seconds):
    """Output of a run that nothing disturbed, on a local Ray and a local directory."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    began = time.monotonic()
    code, text = runs.run(output)
    whole_seconds.append(time.monotonic() - began)
    assert code == 0, text
    assert len(runs.masks(output)) == 3
    return output


@pytest.fixture(scope="session")
def training_seconds(undisturbed, tmp_path_factory, pytestconfig):
    """Seconds of an undisturbed run that finds its data there; measured where the table is asked for."""
    if not pytestconfig.getoption("--seconds-lost", default=False):
        return 0.0
    output = runs.with_data_of(undisturbed, tmp_path_factory.mktemp("calm") / "out")
    began = time.monotonic()
    code, text = runs.run(output)
    assert code == 0, text
    return time.monotonic() - began


@pytest.fixture
def cost(undisturbed, whole_seconds, training_seconds):
    """`with cost(fault):` around a run with a fault; `calm` is what the run takes without it, in seconds."""

    @contextmanager
    def measure(fault, calm=None, whole=False):
        began = time.monotonic()
        yield
        taken = time.monotonic() - began
        COSTS.append((fault, calm or (whole_seconds[0] if whole else training_seconds), taken))

    return measure


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--seconds-lost", default=False):
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("fault (all end with the same masks)", "s without", "s with", "s lost", title="What faults cost")
    for fault, calm, taken in COSTS:
        table.add_row(fault, f"{calm:.0f}", f"{taken:.0f}", f"{taken - calm:.0f}")
    Console(width=110).print(table)
