"""The command as a user runs it: in a process of its own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "manifests" / "quickstart"


def run(*words, cwd=ROOT):
    command = [sys.executable, "-c", "from persona_pruner.cli import main; main()", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)
