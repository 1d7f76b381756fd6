import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from persona_pruner.backbone import operator
from persona_pruner.backbone.operator import cache_directory, compile_operator, is_compiled

LOAD = "from persona_pruner.backbone.operator import load_operator; load_operator()"


def test_the_directory_is_one_for_each_set_of_versions(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = cache_directory()
    assert here.is_relative_to(tmp_path)
    monkeypatch.setattr(sys, "prefix", "/another/environment")
    assert cache_directory() == here
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert cache_directory() != here
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/given")
    assert cache_directory() == Path("/given")


@pytest.mark.skipif(torch.cuda.is_available(), reason="no operator on GPUs")
def test_another_environment_loads_what_was_compiled(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_EXTENSIONS_DIR"}
    subprocess.run([sys.executable, "-c", LOAD], env=environment, check=True)
    assert is_compiled()
    venv.create(tmp_path / "other", with_pip=False)
    site = next((tmp_path / "other").glob("lib/python3*/site-packages"))
    (site / "same.pth").write_text("\n".join(p for p in sys.path if p and Path(p).is_dir()))
    compiled = {file: file.stat().st_mtime_ns for file in cache_directory().glob("*/*")}
    no_compiler = environment | {"PATH": "/nowhere", "CXX": "/nowhere/c++"}
    subprocess.run([str(tmp_path / "other" / "bin" / "python"), "-c", LOAD], env=no_compiler, check=True)
    assert {file: file.stat().st_mtime_ns for file in cache_directory().glob("*/*")} == compiled


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="no operator on GPUs")
def test_nothing_is_written_where_the_operator_is_compiled_already(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TORCH_EXTENSIONS_DIR"}
    subprocess.run([sys.executable, "-c", LOAD], env=environment, check=True)
    image = tmp_path / "image"
    shutil.copytree(cache_directory(), image, ignore=shutil.ignore_patterns("builder"))
    before = {file: file.stat().st_mtime_ns for file in (image, *image.rglob("*"))}
    subprocess.run([sys.executable, "-c", LOAD], env=environment | {"TORCH_EXTENSIONS_DIR": str(image)}, check=True)
    assert {file: file.stat().st_mtime_ns for file in (image, *image.rglob("*"))} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="no operator on GPUs")
def test_compiling_is_told_before_it_begins_and_never_without_it(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    events = []

    def pretend(words, **_):
        events.append(words[-1])
        done = tmp_path / "deepspeed_shm_comm" / "compiled"
        done.parent.mkdir()
        done.touch()

    monkeypatch.setattr(operator.subprocess, "run", pretend)
    compile_operator(events.append)
    assert "once on this machine" in events[0]
    assert events[1:] == ["persona_pruner.backbone.operator"]
    compile_operator(events.append)
    assert len(events) == 2
