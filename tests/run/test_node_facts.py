import json

import torch

from persona_pruner.backbone.load import fingerprint
from persona_pruner.run.node_facts import PACKAGES, clock, node_facts, versions


def test_facts_are_plain_values_that_any_version_of_anything_can_read(tmp_path, example):
    facts = node_facts({"path": str(example / "backbone")}, str(tmp_path / "out"))
    assert json.loads(json.dumps(facts)) == facts
    assert facts["backbone"] == {"fingerprint": fingerprint(example / "backbone")}
    assert facts["output"] == {}
    assert not (tmp_path / "out").exists()
    assert all(0 < disk["free"] <= disk["total"] for disk in facts["disks"].values())


def test_what_was_not_asked_for_is_left_out():
    facts = node_facts(None, None)
    assert facts["backbone"] is None
    assert facts["output"] is None


def test_faults_are_facts_too(tmp_path):
    (tmp_path / "file").write_text("")
    facts = node_facts({"path": str(tmp_path / "absent")}, str(tmp_path / "file" / "run"))
    assert str(tmp_path / "absent") in facts["backbone"]["fault"]
    assert "is no directory" in facts["output"]["fault"]


def test_versions_name_what_must_be_the_same_everywhere():
    found = versions()
    assert found.keys() == {"python", *PACKAGES}
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_the_compiler_is_the_one_that_the_environment_names(monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert node_facts(None, None)["compiler"] == str(compiler)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert node_facts(None, None)["compiler"] is None


def test_operators_that_were_compiled_earlier_are_found(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert node_facts(None, None)["operators"] is False
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "compiled").touch()
    assert node_facts(None, None)["operators"] is True


def test_the_clock_goes_forward():
    first = clock()
    assert clock() >= first
