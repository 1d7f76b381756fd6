"""What serving personas costs: .venv-serving/bin/python tests/benchmarks/serving.py [--backbone DIR] [--turns 5]

Needs vllm (`make bench-serving`). Engines without the plugin and with it take turns, so that both see the same
machine; figures are CPU seconds of all processes of an engine, and ratios are quartiles of the ratios within a turn.
Prefill and decode are apart. A batch of 16 is unpruned, under one mask, or under 16; a batch of 256 under 256. A
compact engine runs one persona, and four that share a core. Instead of masks: exported checkpoints, loaded one after
the other, and LoRA adapters of rank 16. Last line: JSON.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import save_file

BATCH, LARGE_BATCH = 16, 256
SHORT_RUN = 4
"""Tokens of each row of the large batch."""
REQUESTS = 12
"""One after the other, for the time to a first token."""
RANK = 16
EXAMPLE = Path(__file__).parents[2] / "manifests" / "quickstart" / "backbone"


@dataclass(frozen=True)
class Bench:
    backbone: str
    dtype: str
    turns: int
    tokens: int
    layers: int
    channels: int

    def mask(self, seed, ratio=0.5, core=0.0):
        """Keeps 1 - ratio of each layer; `core` of what is kept is the same for every seed."""
        from persona_pruner.serving.mask_table import RequestMask

        return RequestMask.of(np.packbits(self.keep(seed, ratio, core), axis=1, bitorder="little").tobytes())

    def keep(self, seed, ratio=0.5, core=0.0):
        """bool [layers, channels]"""
        kept = round(self.channels * (1 - ratio))
        shared = round(kept * core)
        keep_LI = np.zeros((self.layers, self.channels), bool)
        keep_LI[:, :shared] = True
        rng = np.random.default_rng(seed)
        for row in keep_LI:
            row[shared + rng.choice(self.channels - shared, kept - shared, replace=False)] = True
        return keep_LI


class Engine:
    """A vLLM engine, and the CPU time of this process and of those that it started."""

    def __init__(self, bench, seats=LARGE_BATCH, **options):
        from vllm import LLM

        before = {child.pid for child in psutil.Process().children(recursive=True)}
        start = time.perf_counter()
        self.llm = LLM(model=str(bench.backbone), dtype=bench.dtype, max_model_len=256,
                       kv_cache_memory_bytes=300_000_000, max_num_seqs=seats, max_num_batched_tokens=1024,
                       enforce_eager=True, enable_prefix_caching=False, **options)  # fmt: skip
        self.start_seconds = time.perf_counter() - start
        self.processes = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]

    def run(self, masks, tokens, prompt_tokens=1, adapters=None):
        """CPU seconds of one batch, a row for each mask (None: unpruned)."""
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": [5 + (row * 31 + n * 7) % 200 for n in range(prompt_tokens)]}
                   for row in range(len(masks))]  # fmt: skip
        params = [SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True,
                                 extra_args=mask.extra_args() if mask else None) for mask in masks]  # fmt: skip
        start = self._cpu_seconds()
        self.llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
        return self._cpu_seconds() - start

    def one_by_one(self, masks):
        """CPU seconds to a first token each."""
        return sum(self.run([mask], 1, prompt_tokens=16) for mask in masks)

    def stats(self):
        return self.llm.collective_rpc("persona_stats")[0]

    def close(self):
        self.llm.llm_engine.engine_core.shutdown()

    def _cpu_seconds(self):
        times = [process.cpu_times() for process in self.processes]
        return time.process_time() + sum(t.user + t.system for t in times)


def interleaved(cases: dict[str, Callable[[], float]], turns: int) -> dict[str, list[float]]:
    """The figures of each case over `turns` rounds, in each of which every case runs once; the first round warms up."""
    figures: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for turn in range(turns + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            value = cases[name]()
            if turn:
                figures[name].append(value)
    return figures


def ratio(figures, above, below):
    """Of each turn: the quartiles."""
    return statistics.quantiles((a / b for a, b in zip(figures[above], figures[below], strict=True)), n=4)


def summary(figures, tokens=None):
    """Median CPU seconds of each case; with the tokens of a run, tokens per CPU second."""
    medians = {name: statistics.median(values) for name, values in figures.items()}
    return {name: round(tokens / value, 1) if tokens else round(value, 4) for name, value in medians.items()}


def compare_phases(bench, batches):
    """Prefill and decode of batches {name: (engine, masks, adapters)}, each beside the first of them."""
    found = {"ratios": {}}
    first, *others = batches
    for phase, tokens, prompt_tokens in (("prefill", 1, 64), ("decode", bench.tokens, 1)):
        cases = {name: lambda e=e, b=b, a=a, n=tokens, p=prompt_tokens: e.run(b, n, p, a)
                 for name, (e, b, a) in batches.items()}  # fmt: skip
        figures = interleaved(cases, bench.turns)
        found[f"{phase} tokens per CPU second"] = summary(figures, BATCH * max(tokens, prompt_tokens))
        for name in others:
            found["ratios"][f"{phase}: {name} / {first}"] = ratio(figures, name, first)
    return found


def mixed(bench, directory):
    from persona_pruner.serving.vllm_server import engine_options

    bare, masked = Engine(bench, seats=BATCH), Engine(bench, seats=BATCH, **engine_options(1024))
    masks, nobody = [bench.mask(seed) for seed in range(BATCH)], [None] * BATCH
    batches = {"without plugin": (bare, nobody, None), "unpruned": (masked, nobody, None),
               "1 mask": (masked, masks[:1] * BATCH, None), "16 masks": (masked, masks, None)}  # fmt: skip
    found = compare_phases(bench, batches)
    found |= first_token(bench, masked, masks, found["ratios"])
    found["megabytes per 1000 personas"] = masked.stats()["bytes"] / 1025 * 1000 / 1e6
    found["start seconds"] = {"without plugin": bare.start_seconds, "with plugin": masked.start_seconds}
    bare.close(), masked.close()
    return found


def large(bench, directory):
    """A batch of 256 under 256 masks."""
    from persona_pruner.serving.vllm_server import engine_options

    bare, masked = Engine(bench), Engine(bench, **engine_options(1024))
    masks = [bench.mask(seed) for seed in range(LARGE_BATCH)]
    cases = {"without plugin": lambda: bare.run([None] * LARGE_BATCH, SHORT_RUN),
             "256 masks": lambda: masked.run(masks, SHORT_RUN)}  # fmt: skip
    figures = interleaved(cases, bench.turns)
    bare.close(), masked.close()
    ratios = {"decode: 256 masks / without plugin": ratio(figures, "256 masks", "without plugin")}
    return {"decode tokens per CPU second": summary(figures, LARGE_BATCH * SHORT_RUN), "ratios": ratios}


def adapters(bench, directory):
    """What the same engine asks for LoRA adapters instead."""
    requests, size = save_adapters(bench, directory)
    bare = Engine(bench, seats=BATCH)
    lora = Engine(bench, seats=BATCH, enable_lora=True, max_loras=BATCH, max_lora_rank=RANK)
    nobody = [None] * BATCH
    found = compare_phases(bench, {"without adapters": (bare, nobody, None), "16 adapters": (lora, nobody, requests)})
    bare.close(), lora.close()
    return found | {"megabytes per 1000 adapters": size * 1000 / 1e6}


def first_token(bench, engine, masks, ratios):
    fresh = iter([bench.mask(1000 + seed) for seed in range(REQUESTS * (bench.turns + 1))])
    cases = {
        "never seen": lambda: engine.one_by_one([next(fresh) for _ in range(REQUESTS)]),
        "resident, another before": lambda: engine.one_by_one(masks[:REQUESTS]),
        "same again": lambda: engine.one_by_one(masks[:1] * REQUESTS),
    }
    figures = interleaved(cases, bench.turns)
    for name in ("never seen", "resident, another before"):
        ratios[f"first token: {name} / same again"] = ratio(figures, name, "same again")
    per_request = {name: [value / REQUESTS for value in values] for name, values in figures.items()}
    return {"first token, CPU seconds": summary(per_request)}


def save_adapters(bench, directory):
    """16 random LoRA adapters of every linear of the FFN and the attention, and the bytes of one."""
    from transformers import AutoModelForCausalLM
    from vllm.lora.request import LoRARequest

    model = AutoModelForCausalLM.from_pretrained(bench.backbone, dtype=torch.bfloat16)
    linears = {name: module.weight.shape for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear) and ".layers." in name}  # fmt: skip
    targets = sorted({name.rpartition(".")[2] for name in linears})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none",
                "base_model_name_or_path": str(bench.backbone), "target_modules": targets}  # fmt: skip
    requests = []
    for number in range(BATCH):
        tensors = {}
        for name, (rows, columns) in linears.items():
            for part, shape in (("lora_A", (RANK, columns)), ("lora_B", (rows, RANK))):
                tensors[f"base_model.model.{name}.{part}.weight"] = torch.randn(shape, dtype=torch.bfloat16) * 0.01
        adapter = Path(directory) / f"adapter-{number}"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        save_file(tensors, adapter / "adapter_model.safetensors")
        requests.append(LoRARequest(adapter.name, number + 1, str(adapter)))
    return requests, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def compact(bench, directory):
    from persona_pruner.serving.vllm_server import engine_options

    engine = Engine(bench, seats=BATCH, **engine_options(64, compact=2))
    alone, cored = bench.mask(7), [bench.mask(seed, core=0.95) for seed in range(4)]
    found = {"ratios": {}}
    for rows in (1, BATCH):
        cases = {"unpruned": [None] * rows, "one persona": [alone] * rows}
        if rows > 1:
            cases["four with a core"] = cored * (rows // 4)
        figures = interleaved({name: lambda m=m: engine.run(m, bench.tokens) for name, m in cases.items()}, bench.turns)
        found[f"batch of {rows}, decode tokens per CPU second"] = summary(figures, rows * bench.tokens)
        for name in list(cases)[1:]:
            found["ratios"][f"speed-up of decode, batch of {rows}: {name}"] = ratio(figures, "unpruned", name)
    stats = engine.stats()
    engine.close()
    found["seconds per gather"] = stats["compact_gather_seconds"] / max(1, stats["compact_gathers"])
    found["megabytes of a gathered set"] = stats["compact_bytes"] / max(1, stats["compact_sets"]) / 1e6
    return found


def checkpoints(bench, directory):
    """What a user would do instead: export a checkpoint for each persona, and load another for every switch."""
    from transformers import AutoModelForCausalLM

    from persona_pruner.backbone.export import export_pruned
    from persona_pruner.backbone.load import fingerprint
    from persona_pruner.config.schema import BackboneConfig
    from persona_pruner.masks.format import Mask, MaskMetadata

    keep_LI = bench.keep(0)
    metadata = MaskMetadata(
        persona_id="a", persona_sha256="", persona_description="", backbone="b",
        backbone_fingerprint=fingerprint(bench.backbone), layers=bench.layers, channels=bench.channels,
        kept=tuple(int(row.sum()) for row in keep_LI), method="random", ratio=0.5, seed=0, steps=0,
    )  # fmt: skip
    config = BackboneConfig(path=str(bench.backbone), dtype=bench.dtype)
    export_pruned(Mask(torch.from_numpy(keep_LI), metadata), config, Path(directory) / "exported")

    def load():
        start = time.perf_counter()
        AutoModelForCausalLM.from_pretrained(Path(directory) / "exported", dtype=getattr(torch, bench.dtype))
        return time.perf_counter() - start

    size = sum(file.stat().st_size for file in (Path(directory) / "exported").glob("*.safetensors"))
    return {"load seconds": statistics.median(load() for _ in range(bench.turns)), "megabytes": size / 1e6}


PARTS = {part.__name__: part for part in (mixed, large, compact, adapters, checkpoints)}


def main():
    from transformers import AutoConfig

    from persona_pruner.serving.mask_table import ffn_shape

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default=str(EXAMPLE))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--only", choices=PARTS)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": ""}
    shape = ffn_shape(AutoConfig.from_pretrained(arguments.backbone))
    bench = Bench(arguments.backbone, arguments.dtype, arguments.turns, arguments.tokens, *shape)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "not measured: there is none"
    found = {"backbone": bench.backbone, "dtype": bench.dtype, "turns": bench.turns, "gpu": gpu}
    with tempfile.TemporaryDirectory() as directory:
        for name, part in PARTS.items():
            if arguments.only in (None, name):
                found[name] = part(bench, directory)
                for what, (low, median, high) in found[name].get("ratios", {}).items():
                    print(f"{what}: {median:.3f} (quartiles {low:.3f} to {high:.3f})", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
