import json

import pyarrow as pa
from mask_examples import mask
from typer.testing import CliRunner

from persona_pruner.cli import app
from persona_pruner.errors import ConfigError
from persona_pruner.evaluation.summary import COLUMNS, store_summary
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


def invoke(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def evaluated(output):
    storage = open_storage(output)
    for persona_id in ("ada", "bo"):
        storage.put(keys.mask(persona_id), mask(persona_id).to_bytes())
    rows = [{"persona_id": "ada", "rank": 1.0, "ended": 1.0}, {"persona_id": "bo", "rank": 4.5, "ended": 1.0}]
    store_summary(storage, pa.Table.from_pylist(rows, COLUMNS))


def test_gate_lists_who_fails_and_exits_with_3(tmp_path):
    evaluated(tmp_path)
    done = invoke("gate", tmp_path, "--max", "rank=2", "--min", "ended=0.9")
    assert done.exit_code == 3
    assert done.output.splitlines() == ["bo: rank 4.5 (rank=2)", "1 of 2 masks pass"]
    done = invoke("gate", tmp_path, "--max", "rank=2", "--json")
    assert done.exit_code == 3
    assert json.loads(done.output) == {"masks": 2, "failing": {"bo": ["rank 4.5 (rank=2)"]}}
    assert invoke("gate", tmp_path, "--min", "ended=0.9").exit_code == 0


def test_a_gate_before_any_evaluation_says_what_to_do(tmp_path):
    open_storage(tmp_path).put(keys.mask("ada"), mask("ada").to_bytes())
    done = invoke("gate", tmp_path, "--min", "first=0.9")
    assert isinstance(done.exception, ConfigError)
    assert "persona-pruner evaluate" in str(done.exception)
