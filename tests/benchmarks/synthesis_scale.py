"""Memory of the driver and seconds to score, select and store 200 and 2,000 personas by 2,000 questions, two actors.

python tests/benchmarks/synthesis_scale.py [--personas 200 2000] [--questions 2000] [--quick]

A 2-layer model with random weights and the shipped tokenizer, so that the pipeline and not the model is measured;
each size runs in a process of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from persona_text import SHARED, read_jsonl

EXAMPLE = Path(__file__).parents[2] / "manifests" / "quickstart"


def save_model(path: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE / "backbone")
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(shape).save_pretrained(path)
    tokenizer.save_pretrained(path)


def measure(count: int, directory: Path) -> None:
    """Print one JSON line: seconds from the first to the last persona, and peak memory of this process."""
    import ray

    from persona_pruner.config.load import check_config
    from persona_pruner.manifest import read_manifest
    from persona_pruner.synthesis.pipeline import synthesize
    from persona_pruner.synthesis.sensitivity import choose_references

    config = check_config(
        {
            "backbone": {"path": str(directory / "model")},
            "synthesis": {
                "sources": [{"path": str(directory / "questions.jsonl")}],
                "select": {"k": 8},
                "rewrite": {"max_new_tokens": 2, "samples_per_question": 1},
                "filter": {"min_words": 1, "min_answers": 1},
                "actors": {"min": 2, "max": 2},
            },
        }
    )
    personas = read_manifest(str(directory / "personas.jsonl")).personas[:count]
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    arrivals = []
    references = choose_references(personas, config.synthesis.references.count, config.synthesis.seed)
    results = synthesize(config, personas, {p.id for p in personas}, str(directory / f"out{count}"), references)
    failed = []
    for result in results:
        arrivals.append(time.monotonic())
        failed += [result] if result.error and result.error[0] not in ("few_answers",) else []
    assert not failed, failed[0]
    assert len(arrivals) == count
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    # What comes after the first tile of each actor: those were under way before the first persona arrived.
    later = max(count - config.synthesis.actors.max * config.synthesis.tile_personas, 1)
    seconds = arrivals[-1] - arrivals[0]
    print(json.dumps({"seconds": seconds, "each": seconds / later, "driver_mb": peak, "before_mb": idle}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--personas", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.personas[0], options.measure)
        return
    sizes, count = ([100, 200], 100) if options.quick else (options.personas, options.questions)
    result = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        save_model(directory / "model")
        lines = (SHARED / "personas_many.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (directory / "personas.jsonl").write_text("".join(lines[: max(sizes)]), encoding="utf-8")
        pool = [a for a in read_jsonl("alpaca.jsonl.gz") if not a["input"]][:count]
        (directory / "questions.jsonl").write_text("".join(json.dumps(a) + "\n" for a in pool), encoding="utf-8")
        for size in sizes:
            words = [sys.executable, __file__, "--measure", str(directory), "--personas", str(size)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            print(f"{size:5} personas x {count} questions: {found['seconds']:.0f} s from the first to the last, "
                  f"{found['each']:.3f} s a persona behind the first tiles; driver at most {found['driver_mb']:.0f} MB "
                  f"({found['before_mb']:.0f} MB before)", flush=True)  # fmt: skip
            result |= {
                f"seconds_{size}": round(found["seconds"], 1),
                f"seconds_a_persona_{size}": round(found["each"], 3),
                f"driver_mb_{size}": round(found["driver_mb"]),
            }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
