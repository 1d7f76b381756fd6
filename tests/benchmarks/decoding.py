"""Answer tokens per second of self-rewriting: continuous batching beside the loop over fixed batches.

python tests/benchmarks/decoding.py [--backbone DIR] [--personas 4] [--questions 64] [--device cpu] [--quick]

The prompts of a run (the shipped example's backbone, personas and questions), sampled at temperature 1 with the same
random numbers by both: `same` is the share of answers that are equal token by token. Rounding in other company can turn
a sample. Seconds are of this process's processor on a CPU, of the clock on a GPU.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from persona_pruner.backbone.continuous import SlotDecoder
from persona_pruner.backbone.decoding import Decoder, PaddedDecoder, Prompt, Sampled
from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import load_backbone
from persona_pruner.config.load import load_config
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.manifest import read_manifest
from persona_pruner.synthesis.rewrite.backbone import SelfRewriter
from persona_pruner.synthesis.rewrite.base import Request
from persona_pruner.synthesis.sources import load_question_set

EXAMPLE = Path(__file__).parents[2] / "manifests" / "quickstart"


def measure(decoder: Decoder, prompts: list[Prompt], device: str) -> tuple[float, list[Sampled]]:
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    sampled = decoder.decode(prompts)
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - began, sampled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=str(EXAMPLE / "backbone"))
    parser.add_argument("--personas", type=int, default=4)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="2 personas, 12 questions")
    options = parser.parse_args()
    personas, questions = (2, 12) if options.quick else (options.personas, options.questions)
    torch.set_num_threads(1)
    config = load_config(EXAMPLE / "run.yaml", ["synthesis.rewrite.max_new_tokens=160", "synthesis.rewrite.top_p=1"])
    backbone = load_backbone(BackboneConfig(path=options.backbone), deepspeed=False, device=options.device)
    rewriter = SelfRewriter(backbone, config)
    asked = load_question_set(config.synthesis)[:questions]
    people = read_manifest(str(EXAMPLE / "personas.jsonl")).personas[:personas]
    # In the order in which a run asks: one persona after the other, similar lengths side by side.
    prompts = [
        prompt
        for person in people
        for prompt in sorted((rewriter._prompt(Request(person, q, 0)) for q in asked), key=lambda p: len(p.suffix))
    ]
    runner = BackboneRunner(backbone)
    result: dict[str, float] = {"answers": len(prompts), "batch_size": config.synthesis.rewrite.batch_size}
    samples = {}
    for name, decoder in (("fixed", PaddedDecoder), ("continuous", SlotDecoder)):
        took, samples[name] = measure(decoder(runner, rewriter._sampling), prompts, options.device)
        tokens = sum(len(each.tokens) for each in samples[name])
        result |= {f"{name}_tokens_per_second": round(tokens / took, 1), f"{name}_tokens": tokens}
        print(f"{name}: {tokens} tokens in {took:.1f} s", flush=True)
    equal = sum(one == other for one, other in zip(samples["fixed"], samples["continuous"], strict=True))
    result["same"] = round(equal / len(prompts), 4)
    result["speedup"] = round(result["continuous_tokens_per_second"] / result["fixed_tokens_per_second"], 2)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
