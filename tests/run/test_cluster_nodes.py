"""What is found without a cluster; tests/run/test_doctor.py has the answers of wrong ones."""

import pytest

from persona_pruner.run.cluster_nodes import Finding, ask_cluster, check_token, clock_skew


@pytest.mark.parametrize(
    ("began", "read", "ended", "skew"),
    [(10.0, 10.5, 11.0, 0.0), (10.0, 10.0, 10.0, 0.0), (10.0, 7.0, 11.0, -3.0), (10.0, 16.0, 11.0, 5.0)],
)
def test_a_clock_is_off_by_what_lies_outside_of_our_two_readings(began, read, ended, skew):
    assert clock_skew(began, read, ended) == skew


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return monkeypatch


def test_authentication_that_was_turned_off_on_purpose_is_no_fault(environment):
    assert not check_token().ok
    environment.setenv("RAY_AUTH_MODE", "disabled")
    assert check_token() == Finding("token", True, "RAY_AUTH_MODE is disabled")


def test_a_token_is_never_shown(environment, tmp_path):
    environment.setenv("RAY_AUTH_MODE", "token")
    environment.setenv("RAY_AUTH_TOKEN", "secret")
    assert check_token() == Finding("token", True, "in RAY_AUTH_TOKEN")
    environment.delenv("RAY_AUTH_TOKEN")
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("secret")
    file.chmod(0o600)
    assert check_token() == Finding("token", True, str(file))


def test_an_address_where_nothing_listens_is_told_at_once(environment):
    environment.setenv("RAY_AUTH_MODE", "token")
    environment.setenv("RAY_AUTH_TOKEN", "secret")
    finding, nodes = ask_cluster("127.0.0.1:9", None, None)
    assert (finding.ok, nodes) == (False, [])
    assert "127.0.0.1:9: no Ray cluster answers" in finding.detail
    assert "check --address" in finding.remedy
    assert "secret" not in str(finding.to_dict())


def test_auto_on_a_machine_where_ray_finds_no_node_mock(environment):
    """Mock: other tests may have a Ray up on this machine."""
    from ray._private import services

    def none_found(address):
        raise ConnectionError

    environment.setattr(services, "canonicalize_bootstrap_address", none_found)
    finding, nodes = ask_cluster("auto", None, None)
    assert (finding.ok, nodes) == (False, [])
    assert "auto: no Ray runs on this machine" in finding.detail
    assert "start a node" in finding.remedy
