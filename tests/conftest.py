import os
import sys
from pathlib import Path

import pytest

# Torch's threads fight for the two cores of a test machine; Ray's authentication is tested where a cluster is started.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ray's workers are nice to everybody else by default: another test that computes would stop them.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "manifests" / "quickstart"
SHARED = (
    "", "backbone", "evaluation", "learning", "scheduling", "synthesis", "serving", "cluster", "cluster_files", "docs",
)  # fmt: skip
sys.path[:0] = [str(Path(__file__).parent / part) for part in SHARED]


@pytest.fixture
def example() -> Path:
    return EXAMPLE


from s3_server import bucket, ceph_s3, moto_s3, real_s3  # noqa: E402, F401
