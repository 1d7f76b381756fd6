"""Answer tokens per second of self-rewriting: continuous batching beside the loop over fixed batches.

python tests/benchmarks/decoding.py [--backbone DIR] [--personas 4] [--questions 64] [--device cpu] [--quick]
python tests/benchmarks/decoding.py --exported exported/harbour-cora [--batches 1 4 16] [--dtype bfloat16]

--exported: what a checkpoint of `persona-pruner export` costs beside its backbone, both in the same type: parameters,
FLOP of a prompt of 128 tokens, seconds for that prompt and for a token after it, at several batch sizes.

The prompts of a run (the shipped example's backbone, personas and questions), sampled at temperature 1 with the same
random numbers by both: `same` is the share of answers that are equal token by token. Rounding in other company can turn
a sample. Seconds are of this process's processor on a CPU, of the clock on a GPU.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from persona_pruner.backbone.compact import load_checkpoint
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

PROMPT, TOKENS, TRIES = 128, 16, 5
EXAMPLE = Path(__file__).parents[2] / "manifests" / "quickstart"


def measure(decoder: Decoder, prompts: list[Prompt], device: str) -> tuple[float, list[Sampled]]:
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    sampled = decoder.decode(prompts)
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - began, sampled


@torch.no_grad()
def seconds(model: Any, batch: int, device: str) -> tuple[float, float]:
    """Of a prompt of PROMPT tokens, and of each token after it."""
    ids_BT = (torch.arange(batch * PROMPT, device=device) * 7 % model.config.vocab_size).view(batch, PROMPT)
    times = [time.perf_counter()]

    def stamp() -> None:
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter())

    out = model(ids_BT, use_cache=True, logits_to_keep=1)
    stamp()
    for _ in range(TOKENS):
        out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    stamp()
    return times[1] - times[0], (times[2] - times[1]) / TOKENS


def efficiency(options: argparse.Namespace) -> dict[str, object]:
    """The table of --exported. The two models take turns, so that a busy machine slows both."""
    paths = {"backbone": options.backbone, "exported": options.exported}
    dtype = getattr(torch, options.dtype)
    models = {name: load_checkpoint(Path(path), dtype=dtype).eval().to(options.device) for name, path in paths.items()}
    found: dict[str, object] = {"dtype": options.dtype}
    print(f"{'':<28}{'backbone':>12}{'exported':>12}{'ratio':>8}")

    def show(what: str, values: list[float], form: str) -> None:
        before, after = values
        found[what] = [float(f"{value:.4g}") for value in values]
        print(f"{what:<28}{before:>12{form}}{after:>12{form}}{after / before:>8.2f}", flush=True)

    show("parameters", [sum(p.numel() for p in model.parameters()) for model in models.values()], ",")
    flops = []
    for model in models.values():
        ids_BT = torch.arange(PROMPT, device=options.device)[None] % model.config.vocab_size
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(ids_BT, use_cache=False)
        flops.append(counter.get_total_flops() / 1e9)
    show("prompt, GFLOP", flops, ".3f")
    for batch in options.batches:
        tries = [[seconds(model, batch, options.device) for model in models.values()] for _ in range(TRIES + 1)][1:]
        for part, what in enumerate(("prompt", "a token")):
            values = [statistics.median(each[n][part] for each in tries) for n in range(len(models))]
            show(f"{what}, batch {batch}, ms", [1000 * value for value in values], ".2f")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=str(EXAMPLE / "backbone"))
    parser.add_argument("--personas", type=int, default=4)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="2 personas, 12 questions")
    parser.add_argument("--exported", help="a checkpoint of persona-pruner export")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    if options.exported:
        torch.set_num_threads(1)
        print(json.dumps(efficiency(options)))
        return
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
