"""Every `learning.method`, from a manifest to committed masks through the job."""

import json

import cluster_runs as runs
import pytest

from persona_pruner.masks.store import MaskStore
from persona_pruner.masks.weight_mask import WeightMask

METHODS = (
    "gumbel", "soft_topk", "activation", "fisher", "magnitude", "random", "contrastive", "wanda", "sparsegpt",
    "contrastive_wanda", "contrastive_sparse",
)  # fmt: skip


@pytest.fixture
def opposed(tmp_path):
    """Two personas of the example, opposed to each other."""
    lines = (runs.EXAMPLE / "personas.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    one, other = map(json.loads, lines)
    one["opposite"] = other["id"]
    manifest = tmp_path / "personas.jsonl"
    manifest.write_text(f"{json.dumps(one)}\n{json.dumps(other)}\n", encoding="utf-8")
    return manifest


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_method_makes_masks_like_any_other(undisturbed, opposed, tmp_path, method):
    output = runs.with_data_of(undisturbed, tmp_path / "out")
    words = {"manifest": opposed, "personas": None}
    code, text = runs.run(output, f"learning.method={method}", **words)
    assert code == 0, text
    store = MaskStore(output)
    assert store.verify() == 2
    made = store.load(store.ids()[0])
    assert made.metadata.method == method
    assert isinstance(made, WeightMask) is (method in METHODS[7:])
    code, text = runs.run(output, f"learning.method={method}", **words)
    assert code == 0, text
    assert "nothing to do" in text
