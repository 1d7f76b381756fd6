import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm", reason="vllm has an environment of its own: make test-serving")

from served_run import EXAMPLE

PROGRAM = """
import json, sys
import numpy as np
from vllm import LLM, SamplingParams
from persona_pruner.serving.mask_table import RequestMask
from persona_pruner.serving.vllm_server import engine_options

engine = LLM(
    model=sys.argv[1], dtype="float32", max_model_len=256, kv_cache_memory_bytes=100_000_000, max_num_seqs=2,
    enforce_eager=True, **engine_options(slots=2),
)
config = engine.llm_engine.model_config.hf_text_config
packed = np.random.default_rng(0).integers(0, 256, config.num_hidden_layers * config.intermediate_size // 8, np.uint8)
found = []
for extra in (None, RequestMask.of(packed.tobytes()).extra_args()):
    greedy = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, extra_args=extra)
    (row,) = engine.generate([{"prompt_token_ids": list(range(2, 200))}], greedy, use_tqdm=False)
    found.append([row.num_cached_tokens, list(row.outputs[0].token_ids)])
with open(sys.argv[2], "w") as file:
    json.dump({"answers": found, "stats": engine.collective_rpc("persona_stats")}, file)
"""


def test_several_processes_without_the_entry_point_have_masks_and_keep_their_caches_apart(tmp_path):
    environment = {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(EXAMPLE), str(tmp_path / "found")],
        env=os.environ | environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found").read_text())
    (_, unpruned), (cached, masked) = found["answers"]
    assert cached == 0
    assert masked != unpruned
    assert [stats["slots_used"] for stats in found["stats"]] == [1]
