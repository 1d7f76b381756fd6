"""Seconds of one training step, the naive loop beside ours, and the share of the machine's matmul rate that ours takes.

    python tests/benchmarks/mask_step.py [--quick] [--profile] [--threads 1] [--device cpu]

Naive: whole prompts side by side, the model's own loss over all logits, autograd through frozen weights. Both compute
the gradient of the same masks on the same rows (checked). Two shapes: a persona of 40 tokens and one of 220.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from persona_pruner.backbone.channels import ChannelMasks
from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone, World
from persona_pruner.config.schema import ObjectiveConfig
from persona_pruner.learning.batches import MicroBatchConfig, TrainingExample
from persona_pruner.learning.encoding import EncodedRow
from persona_pruner.learning.objective import mask_gradient

PAPER = ObjectiveConfig(cross_entropy=1, distillation=0)
SHAPES = {
    "cpu": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 32000},
    "quick": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1000},
    "cuda": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "vocab_size": 128256},
}


def backbone(shape: str, device: str) -> Backbone:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 24, "num_key_value_heads": 8} if shape == "cuda" else {"num_attention_heads": 8}
    config = LlamaConfig(**SHAPES[shape], **heads, max_position_embeddings=2048, pad_token_id=0)
    with torch.device(device):
        model = LlamaForCausalLM(config).requires_grad_(False).eval()
    if device == "cuda":
        model = model.bfloat16()
    return Backbone(model, None, shape, "", torch.device(device), World(), Path())


def rows(vocabulary: int, persona: int, count: int, answer: int) -> tuple[list[int], list[EncodedRow]]:
    """A prefix and ragged rows: questions of about 28 tokens, answers of `answer` on average."""
    draw = torch.Generator().manual_seed(1)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, vocabulary, (length,), generator=draw).tolist())

    made = []
    for number in range(count):
        spread = (number - (count - 1) / 2) / count
        own = round(answer * (1 + spread))
        made.append(EncodedRow((*tokens(round(28 * (1 - spread))), *tokens(own)), own))
    return list(tokens(persona)), made


def naive_step(whole: Backbone, mask_LI: Tensor, prefix: list[int], data: list[EncodedRow]) -> tuple[Tensor, float]:
    model: Any = whole.model
    mask = mask_LI.clone().requires_grad_()
    width = max(len(prefix) + len(row.tokens) for row in data)
    ids, labels = [], []
    for row in data:
        tokens = [*prefix, *row.tokens]
        ids.append(tokens + [0] * (width - len(tokens)))
        kept = [-100] * (len(tokens) - row.answer) + list(row.tokens[-row.answer :])
        labels.append(kept + [-100] * (width - len(tokens)))
    with ChannelMasks(model) as masks:
        masks.set(mask)
        options = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        loss = model(**{k: v.to(whole.device) for k, v in options.items()}, use_cache=False).loss
        loss.backward()
    assert mask.grad is not None
    return mask.grad, loss.item()


def our_step(
    runner: BackboneRunner, mask_LI: Tensor, prefix: list[int], data: list[EncodedRow]
) -> tuple[Tensor, float]:
    tokens = sum(row.answer for row in data)
    examples = [TrainingExample(0, ("", number), row, 1 / tokens) for number, row in enumerate(data)]
    overhead = 1024 if runner.backbone.device.type == "cuda" else 16
    settings = MicroBatchConfig(PAPER, overhead=overhead)
    grad, losses = mask_gradient(runner, mask_LI[None], [prefix], examples, settings)
    return grad[0], losses.total.item()


def seconds(run: Callable[[], Any], tries: int, device: str) -> list[float]:
    run()
    taken = []
    for _ in range(tries):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return taken


def matmul_rate(shape: str, device: str) -> float:
    """FLOP a second of one FFN matmul at the size it has in our step."""
    sizes = SHAPES[shape]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    left = torch.randn(1404, sizes["hidden_size"], device=device, dtype=dtype)
    right = torch.randn(sizes["hidden_size"], sizes["intermediate_size"], device=device, dtype=dtype)
    best = min(seconds(lambda: [left @ right for _ in range(20)], 5, device)) / 20
    return 2 * left.numel() * right.shape[1] / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--profile", action="store_true", help="print where our step's time goes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = "quick" if options.quick else options.device
    whole = backbone(shape, options.device)
    rate = matmul_rate(shape, options.device)
    count, answer = (16, 200) if options.device == "cuda" else (8, 120)
    result: dict[str, Any] = {"matmul_gflops": round(rate / 1e9, 1)}
    for name, persona in (("short", 40), ("long", 220)):
        prefix, data = rows(SHAPES[shape]["vocab_size"], persona, count, answer)
        sizes = SHAPES[shape]
        mask = (torch.rand(sizes["num_hidden_layers"], sizes["intermediate_size"]) > 0.5).float().to(options.device)
        with BackboneRunner(whole) as runner:
            with FlopCounterMode(display=False) as flops:
                ours, loss = our_step(runner, mask, prefix, data)
            runner.masks.detach()
            plain, plain_loss = naive_step(whole, mask, prefix, data)
            difference = ((ours - plain).norm() / plain.norm()).item()
            print(f"{name}: loss {loss:.6f} / {plain_loss:.6f}, gradients differ by {difference:.1e} (relative norm)")
            slow, fast = [], []
            for _ in range(2 if options.quick else options.tries):
                runner.masks.detach()
                slow += seconds(lambda: naive_step(whole, mask, prefix, data), 1, options.device)  # noqa: B023
                runner.masks.attach()
                fast += seconds(lambda: our_step(runner, mask, prefix, data), 1, options.device)  # noqa: B023
            if options.profile:
                with torch.profiler.profile() as profile:
                    our_step(runner, mask, prefix, data)
                print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=18))
        ratios = sorted(s / f for s, f in zip(slow, fast, strict=True))
        tokens = persona + sum(len(row.tokens) for row in data)
        best = statistics.median(fast)
        share = flops.get_total_flops() / best / rate
        print(
            f"{name}: naive {statistics.median(slow):.3f} s, ours {best:.3f} s, ratio {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}), {tokens / best:.0f} tokens/s, {share:.0%} of the matmul rate"
        )
        result |= {f"ratio_{name}": round(statistics.median(ratios), 2), f"share_{name}": round(share, 3)}
        result[f"gradient_difference_{name}"] = difference
    if options.device == "cuda":
        result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    result["share_of_matmul"] = result["share_long"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
