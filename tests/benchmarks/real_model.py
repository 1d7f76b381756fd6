"""Own masks on a real model, beside the pooled mask with as many further steps and another persona's mask.

    python manifests/smollm2/get_backbone.py
    python tests/benchmarks/real_model.py [--personas 8] [--ratios 0.25 0.5] [--answers 400] [--set learning.core=0.5]

Half of the personas come from ../shared/data (conversations of RoleBench and Character-LLM), half from
manifests/smollm2. Every stage is kept in --cache: answers, then masks, then the loss of every token; a rerun goes on
where it stopped. `own, mended backbone` are the own masks on the checkpoint of jobs/recover_backbone.py. The published
baseline looks at generic text, the instructions of ../shared/data. The rows of `objective.foreign` are half of these
instructions and half of what other characters say there, unless `objective.generic_rows` names others. Losses are
reported over all answer tokens, and over the tenth whose log-probability the description changes most.

    python tests/benchmarks/real_model.py --personas 4 --answers 1000 --rows 100 1000

learns from the first 100 and from 1,000 answers of each instead, each answer once in the steps of an own mask, and
mends nothing. The pooled mask to start from is the same for all: of all answers.

Shapes: L layers, I FFN channels, N answer tokens of a row.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from persona_text import Speaker, foreign, generic, speakers
from safetensors.torch import load_file, save_file
from token_tables import FREE_OF_TRAINING, TokenLosses, compare
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone, load_backbone
from persona_pruner.config.load import load_config
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData
from persona_pruner.learning.batches import MicroBatchConfig, TrainingExample
from persona_pruner.learning.budgets import free_widths, kept_channels
from persona_pruner.learning.callbacks import TrainingCallbacks
from persona_pruner.learning.encoding import encode
from persona_pruner.learning.estimators import topk_mask
from persona_pruner.learning.fisher import fisher_scores
from persona_pruner.learning.objective import mask_gradient
from persona_pruner.learning.outcome import LearnedScores, TrainingResult
from persona_pruner.learning.pooled import global_config, pooled_config, train_pooled
from persona_pruner.learning.shared_recovery import Masked, Recovery, save_recovered
from persona_pruner.learning.teacher import TeacherCache
from persona_pruner.learning.trainer import MaskTrainer
from persona_pruner.learning.training_free import activation
from persona_pruner.masks.format import Mask
from persona_pruner.run.recover_backbone import mend

EXAMPLE = Path(__file__).parents[2] / "manifests" / "smollm2"
ACTIVATION_ROWS, FISHER_ROWS = 96, 48
FOREIGN_ROWS = 4096


class PooledStart(TrainingCallbacks):
    """Learning that starts from a pooled mask."""

    def __init__(self, pooled: LearnedScores) -> None:
        self.pooled = pooled

    def pooled_scores(self) -> LearnedScores:
        return self.pooled


def kept(file: Path, make: Callable[[], Tensor]) -> Tensor:
    """The bits [L, I] of a mask in the cache, made where it is not there yet."""
    if not file.exists():
        save_file({"keep": make().contiguous()}, file)
        print(f"{file.stem}: made", flush=True)
    return load_file(file)["keep"]


def done(result: TrainingResult) -> Tensor:
    """The bits of a mask that was learned."""
    assert isinstance(result.mask, Mask), result.message
    return result.mask.keep_LI


def free_of_training(
    backbone: Backbone, config: RunConfig, people: Sequence[Speaker], cache: Path
) -> dict[str, dict[str, Tensor]]:
    """Bits [L, I] by method and persona, from scores that are the same for all ratios."""
    k = kept_channels(backbone.model.config.intermediate_size, config.learning.ratio, config.learning.channel_multiple)

    def scores(name: str, make: Callable[[], Tensor]) -> Tensor:
        return kept(cache / f"scores-{name}.safetensors", make)

    def of_activations(data: PersonaData) -> Tensor:
        some = replace(data, train=data.train[:ACTIVATION_ROWS])
        return scores(f"activation-{data.persona_id}", lambda: activation(backbone, config, some))

    def fisher(who: Speaker) -> Tensor:
        encoded = encode(backbone.tokenizer, config.prompt, who.data, config.learning.max_row_tokens)
        rows = [TrainingExample(0, (who.id, n), row, 1.0) for n, row in enumerate(encoded.train[:FISHER_ROWS])]
        with BackboneRunner(backbone) as runner:
            settings = MicroBatchConfig.of(config, backbone.device)
            return fisher_scores(runner, encoded.prefixes[0], rows, settings)

    def free(scores_LI: Tensor) -> Tensor:
        return topk_mask(scores_LI, free_widths(scores_LI, k * len(scores_LI), config.learning.channel_multiple))

    published = topk_mask(of_activations(generic(ACTIVATION_ROWS)), k)
    made: dict[str, dict[str, Tensor]] = {method: {} for method in FREE_OF_TRAINING}
    for who in people:
        fisher_LI = scores(f"fisher-{who.id}", lambda who=who: fisher(who))  # type: ignore[misc]
        masks = (published, topk_mask(of_activations(who.data), k), topk_mask(fisher_LI, k), free(fisher_LI))
        for method, keep_LI in zip(FREE_OF_TRAINING, masks, strict=True):
            made[method][who.id] = keep_LI
    return made


def pooled_scores(backbone: Backbone, config: RunConfig, people: Sequence[Speaker], cache: Path) -> LearnedScores:
    """What all own masks start from."""
    scores = cache / f"pooled-{config.learning.ratio}.safetensors"
    if not scores.exists():
        result = train_pooled(backbone, pooled_config(config), [who.data for who in people], "benchmark")
        assert result.learned is not None, result.message
        scores.write_bytes(result.learned.to_bytes())
        print(f"{scores.stem}: made", flush=True)
    return LearnedScores.from_bytes(scores.read_bytes(), scores.name)


def learned(
    backbone: Backbone, config: RunConfig, people: Sequence[Speaker], pooled: LearnedScores, cache: Path
) -> dict[str, dict[str, Tensor]]:
    """Bits [L, I] by method and persona. `other` is the mask of the persona half the list away."""
    data, ratio = [who.data for who in people], config.learning.ratio
    start = PooledStart(pooled)
    further = kept(
        cache / f"further-{ratio}.safetensors",
        lambda: done(train_pooled(backbone, global_config(config, ratio), data, "benchmark", start)),
    )
    own = {
        who.id: kept(
            cache / f"own-{ratio}-{who.id}.safetensors",
            lambda who=who: done(  # type: ignore[misc]
                MaskTrainer(backbone, config).train([who.data], run_id="benchmark", callbacks=start)[0]
            ),
        )
        for who in people
    }
    half = len(people) // 2
    return {
        "pooled": {who.id: pooled.keep_LI for who in people},
        "pooled, further steps": {who.id: further for who in people},
        "own": own,
        "other": {who.id: own[people[(n + half) % len(people)].id] for n, who in enumerate(people)},
    }


def of_first(config: RunConfig, people: Sequence[Speaker], rows: int) -> tuple[RunConfig, list[Speaker]]:
    """The personas with their first `rows` answers to learn from, each of which the steps of an own mask see once."""
    learning = config.learning.model_copy(update={"rows_per_step": math.ceil(rows / config.learning.steps)})
    some = [replace(who, data=replace(who.data, train=who.data.train[:rows])) for who in people]
    return config.model_copy(update={"learning": learning}), some


def mended(
    config: RunConfig, people: Sequence[Speaker], own: dict[str, Tensor], to: Path, options: argparse.Namespace
) -> Backbone:
    """The backbone that is mended under all own masks, kept in `to`."""
    if not to.exists():
        backbone = load_backbone(config.backbone, deepspeed=False)
        masked = [Masked(who.data, own[who.id]) for who in people]
        recovery = Recovery(
            steps=options.mending_steps,
            rate=options.mending_rate,
            rank=options.mending_rank,
            refit_rows=options.refit_rows,
        )
        before, after = mend(backbone, config, masked, recovery)
        save_recovered(backbone, to)
        print(f"{to.name}: made, {before:.3f} to {after:.3f}", flush=True)
    return load_backbone(config.backbone.model_copy(update={"path": str(to)}), deepspeed=False)


def foreign_file(cache: Path) -> Path:
    """The foreign rows as a file of the setting `objective.generic_rows`."""
    file = cache / "foreign.jsonl"
    if not file.exists():
        rows = (json.dumps({"question": row.question, "answer": row.answer}) for row in foreign(FOREIGN_ROWS))
        file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return file


def matmul_share(backbone: Backbone, config: RunConfig, who: Speaker) -> float:
    """Rate of a step of 16 rows, half of the channels masked, over that of one FFN product of its size; CPU time."""
    encoded = encode(backbone.tokenizer, config.prompt, who.data, config.learning.max_row_tokens)
    examples = [TrainingExample(0, (who.id, n), row, 1e-3) for n, row in enumerate(encoded.train[:16])]
    settings = MicroBatchConfig.of(config, backbone.device)
    with BackboneRunner(backbone) as runner:
        ffn = runner.masks.ffns[0].inputs[0].weight
        states_TD = torch.randn(sum(len(e.row.tokens) for e in examples), ffn.shape[1]).to(ffn.dtype)
        objective = config.learning.objective
        teacher = TeacherCache(objective.top_logits, objective.head_tokens)
        teacher.collect_rows(runner, encoded, settings, range(len(examples)))
        masks_PLI = (torch.rand(1, runner.masks.layers, runner.masks.channels) > 0.5).float()

        def step() -> None:
            mask_gradient(runner, masks_PLI, encoded.prefixes, examples, settings, teacher)

        with FlopCounterMode(display=False) as flops:
            step()
        rate = 2 * states_TD.numel() * len(ffn) / min(_cpu_seconds(lambda: states_TD @ ffn.T) for _ in range(20))
        return flops.get_total_flops() / min(_cpu_seconds(step) for _ in range(3)) / rate


def _cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(EXAMPLE / "run.yaml"))
    parser.add_argument("--set", action="append", default=[], help="override a setting: learning.core=0.5")
    parser.add_argument("--personas", type=int, default=8)
    parser.add_argument("--answers", type=int, default=400)
    parser.add_argument("--heldout", type=int, default=32)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--rows", type=int, nargs="+", help="learn from the first so many answers, and mend nothing")
    parser.add_argument("--cache", type=Path, default=Path("runs/real_model"))
    parser.add_argument("--refit-rows", type=int, default=Recovery.refit_rows)
    parser.add_argument("--mending-steps", type=int, default=Recovery.steps)
    parser.add_argument("--mending-rate", type=float, default=Recovery.rate)
    parser.add_argument("--mending-rank", type=int, default=Recovery.rank)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        options.personas, options.answers, options.heldout, options.ratios = 2, 8, 4, [0.25]
        options.mending_steps, options.refit_rows = 1, 16
        options.set += ["learning.steps=1", "learning.pooled_steps=1", "synthesis.rewrite.max_new_tokens=8"]
        options.cache = options.cache.with_name("real_model_quick")
    options.cache.mkdir(parents=True, exist_ok=True)
    nobody = f"learning.objective.generic_rows={foreign_file(options.cache).resolve()}"
    config = load_config(options.config, [nobody, *options.set])
    backbone = load_backbone(config.backbone, deepspeed=False)
    people = speakers(backbone, config, options, EXAMPLE / "personas.jsonl")
    result: dict[str, Any] = {"matmul_share": round(matmul_share(backbone, config, people[0]), 3)}
    for ratio in options.ratios:
        at = config.model_copy(update={"learning": config.learning.model_copy(update={"ratio": ratio})})
        free = free_of_training(backbone, at, people, options.cache)
        pooled = pooled_scores(backbone, at, people, options.cache)
        losses = TokenLosses(backbone, at, options.cache)
        for rows in options.rows or ():
            cache = options.cache / f"rows-{rows}"
            cache.mkdir(exist_ok=True)
            masks = free | learned(backbone, *of_first(at, people, rows), pooled, cache)
            print(f"\n{rows} rows")
            figures = compare(people, masks, losses, ratio)
            result |= {f"{name}_rows_{rows}": figure for name, figure in figures.items()}
        if not options.rows:
            masks = free | learned(backbone, at, people, pooled, options.cache)
            better = mended(at, people, masks["own"], options.cache / f"mended-{ratio}", options)
            of_better = TokenLosses(better, at, options.cache / f"losses-mended-{ratio}")
            result |= compare(people, masks, losses, ratio, of_better)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
