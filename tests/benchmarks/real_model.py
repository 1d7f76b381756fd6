"""Own masks on a real model, beside the pooled mask with as many further steps and another persona's mask.

    python manifests/smollm2/get_backbone.py
    python tests/benchmarks/real_model.py [--personas 8] [--ratios 0.25 0.5] [--answers 400] [--set learning.core=0.5]

Half of the personas come from ../shared/data (conversations of RoleBench and Character-LLM), half from
manifests/smollm2. Every stage is kept in --cache: answers, then masks, then the loss of every token; a rerun goes on
where it stopped. `own, mended backbone` are the own masks on the checkpoint of jobs/recover_backbone.py.
Losses are reported over all answer tokens, and over the tenth whose log-probability the description
changes most.

Shapes: L layers, I FFN channels, N answer tokens of a row.
"""

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from persona_text import generic, read_jsonl
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.backbone.load import Backbone, load_backbone
from persona_pruner.backbone.prompts import persona_prefix
from persona_pruner.config.load import load_config
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData, Row
from persona_pruner.evaluation.table import read_conversations
from persona_pruner.learning.batches import MicroBatchConfig, TrainingExample
from persona_pruner.learning.budgets import free_widths, kept_channels
from persona_pruner.learning.callbacks import TrainingCallbacks
from persona_pruner.learning.encoding import encode, encode_rows
from persona_pruner.learning.estimators import topk_mask
from persona_pruner.learning.fisher import fisher_scores
from persona_pruner.learning.objective import mask_gradient
from persona_pruner.learning.outcome import LearnedScores, TrainingResult
from persona_pruner.learning.persona_tokens import NOBODY, decided_tokens, token_losses
from persona_pruner.learning.pooled import global_config, pooled_config, train_pooled
from persona_pruner.learning.shared_recovery import Masked, recover, save_recovered
from persona_pruner.learning.teacher import TeacherCache
from persona_pruner.learning.trainer import MaskTrainer
from persona_pruner.learning.training_free import activation
from persona_pruner.manifest import Persona, read_manifest
from persona_pruner.synthesis.rewrite.backbone import SelfRewriter
from persona_pruner.synthesis.rewrite.base import Request
from persona_pruner.synthesis.sources import load_question_set

EXAMPLE = Path(__file__).parents[2] / "manifests" / "smollm2"
ROLEPLAY = ("rolebench-af277108fc", "rolebench-62726ebf77", "rolebench-3938a5ad79", "character-llm-40d00d6c80")
PUBLISHED = "activation, generic"
FREE_OF_TRAINING = (PUBLISHED, "activation, own", "fisher, own, uniform", "fisher, own, free")
FISHER_ROWS = 48
MENDED = "own, mended backbone"
MENDING_STEPS = 30
MENDING_RATES = {0.25: 0.01, 0.5: 0.02}


@dataclass(frozen=True)
class Speaker:
    """`texts`: held-out rows by kind of text, `answers` of the backbone and `conversations` that it did not write."""

    data: PersonaData
    texts: dict[str, tuple[Row, ...]]

    @property
    def id(self) -> str:
        return self.data.persona_id


class PooledStart(TrainingCallbacks):
    """Learning that starts from a pooled mask."""

    def __init__(self, pooled: LearnedScores) -> None:
        self.pooled = pooled

    def pooled_scores(self) -> LearnedScores:
        return self.pooled


def roleplay(count: int, rows: int) -> list[tuple[Persona, tuple[Row, ...]]]:
    """Personas of the shared data, with short held-out conversations."""
    spoken: dict[str, list[dict[str, str]]] = {persona_id: [] for persona_id in ROLEPLAY[:count]}
    for row in read_jsonl("roleplay.jsonl.gz"):
        words = len(row["answer"].split())
        if row["split"] == "heldout" and len(row["question"].split()) <= 60 and 8 <= words <= 80:
            spoken.get(row["persona_id"], []).append(row)
    return [
        (Persona(own[0]["persona_id"], own[0]["persona"]), tuple(Row(r["question"], r["answer"]) for r in own[:rows]))
        for own in spoken.values()
    ]


def speakers(backbone: Backbone, config: RunConfig, options: argparse.Namespace) -> list[Speaker]:
    """Half of the personas from each source, with answers sampled once and the same held-out questions for all."""
    conversations = read_conversations(config)
    example = read_manifest(str(EXAMPLE / "personas.jsonl")).personas[: options.personas - options.personas // 2]
    people = roleplay(options.personas // 2, options.heldout)
    people += [(persona, conversations[persona.id][: options.heldout]) for persona in example]
    questions = sorted(load_question_set(config.synthesis), key=lambda question: question.id)
    rewriter = SelfRewriter(backbone, config)
    found = []
    for persona, spoken in people:
        file = options.cache / f"answers-{persona.id}.json"
        if not file.exists():
            train = random.Random(persona.id).sample(questions[options.heldout :], options.answers)
            asked = [*questions[: options.heldout], *train]
            answers = rewriter.answers([Request(persona, question, 0) for question in asked])
            rows = [
                Row(question.text, answer.text, answer.finished)
                for question, answer in zip(asked, answers, strict=True)
            ]
            file.write_text(json.dumps([asdict(row) for row in rows]), encoding="utf-8")
        rows = [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
        heldout, train = (
            tuple(row for row in some if row.answer) for some in (rows[: options.heldout], rows[options.heldout :])
        )
        data = PersonaData(persona.id, persona.description, train, heldout, f"{persona.id}-{len(train)}")
        found.append(Speaker(data, {"answers": heldout, "conversations": spoken}))
    return found


def kept(file: Path, make: Callable[[], Tensor]) -> Tensor:
    """The bits [L, I] of a mask in the cache, made where it is not there yet."""
    if not file.exists():
        save_file({"keep": make().contiguous()}, file)
        print(f"{file.stem}: made", flush=True)
    return load_file(file)["keep"]


def done(result: TrainingResult) -> Tensor:
    """The bits of a mask that was learned."""
    assert result.mask is not None, result.message
    return result.mask.keep_LI


def free_of_training(
    backbone: Backbone, config: RunConfig, people: Sequence[Speaker], cache: Path, plain: PersonaData
) -> dict[str, dict[str, Tensor]]:
    """Bits [L, I] by method and persona. `plain`: generic text."""
    k = kept_channels(backbone.model.config.intermediate_size, config.learning.ratio, config.learning.channel_multiple)
    ratio = config.learning.ratio

    def fisher(who: Speaker) -> Tensor:
        file = cache / f"fisher-{who.id}.safetensors"
        if not file.exists():
            encoded = encode(backbone.tokenizer, config.prompt, who.data, config.learning.max_row_tokens)
            rows = [TrainingExample(0, (who.id, n), row, 1.0) for n, row in enumerate(encoded.train[:FISHER_ROWS])]
            with BackboneRunner(backbone) as runner:
                settings = MicroBatchConfig.of(config, backbone.device)
                save_file({"scores": fisher_scores(runner, encoded.prefixes[0], rows, settings)}, file)
        return load_file(file)["scores"]

    def free(scores_LI: Tensor) -> Tensor:
        return topk_mask(scores_LI, free_widths(scores_LI, k * len(scores_LI), config.learning.channel_multiple))

    made: dict[str, dict[str, Tensor]] = {method: {} for method in FREE_OF_TRAINING}
    for who in people:
        ways: dict[str, Callable[[], Tensor]] = {
            PUBLISHED: lambda: topk_mask(activation(backbone, config, plain), k),
            "activation, own": lambda who=who: topk_mask(activation(backbone, config, who.data), k),  # type: ignore[misc]
            "fisher, own, uniform": lambda who=who: topk_mask(fisher(who), k),  # type: ignore[misc]
            "fisher, own, free": lambda who=who: free(fisher(who)),  # type: ignore[misc]
        }
        for method, make in ways.items():
            name = f"{method}-{ratio}" + ("" if method == PUBLISHED else f"-{who.id}")
            made[method][who.id] = kept(cache / f"{name}.safetensors", make)
    return made


def learned(
    backbone: Backbone, config: RunConfig, people: Sequence[Speaker], cache: Path
) -> dict[str, dict[str, Tensor]]:
    """Bits [L, I] by method and persona. `other` is the mask of the persona half the list away."""
    data, ratio = [who.data for who in people], config.learning.ratio
    scores = cache / f"pooled-{ratio}.safetensors"
    if not scores.exists():
        result = train_pooled(backbone, pooled_config(config), data, "benchmark")
        assert result.learned is not None, result.message
        scores.write_bytes(result.learned.to_bytes())
        print(f"{scores.stem}: made", flush=True)
    pooled = LearnedScores.from_bytes(scores.read_bytes(), scores.name)
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


def mended(config: RunConfig, people: Sequence[Speaker], own: dict[str, Tensor], to: Path) -> Backbone:
    """The backbone whose gains are learned under all own masks, kept in `to`."""
    if not to.exists():
        backbone = load_backbone(config.backbone, deepspeed=False)
        masked = [Masked(who.data, own[who.id]) for who in people]
        steps = min(MENDING_STEPS, config.learning.pooled_steps)
        losses = list(recover(backbone, config, masked, steps, MENDING_RATES.get(config.learning.ratio, 0.01)))
        save_recovered(backbone, to)
        print(f"{to.name}: made, {losses[0]:.3f} to {losses[-1]:.3f}", flush=True)
    return load_backbone(config.backbone.model_copy(update={"path": str(to)}), deepspeed=False)


class TokenLosses:
    """Loss of every answer token, by row; kept on disk."""

    def __init__(self, backbone: Backbone, config: RunConfig, cache: Path) -> None:
        self.backbone, self.config, self.cache = backbone, config, cache

    def of(self, who: Speaker, text: str, name: str, keep_LI: Tensor | None, description: str = "") -> list[Tensor]:
        file = self.cache / f"losses-{name}-{text}-{who.id}.safetensors"
        if not file.exists():
            rows_N = self._measure(who.texts[text], description or who.data.description, keep_LI)
            save_file({f"{number:04d}": row_N for number, row_N in enumerate(rows_N)}, file)
        return [row_N for _, row_N in sorted(load_file(file).items())]

    def _measure(self, rows: Sequence[Row], description: str, keep_LI: Tensor | None) -> list[Tensor]:
        config, backbone = self.config, self.backbone
        prefix = persona_prefix(backbone.tokenizer, config.prompt, description)
        encoded = encode_rows(backbone.tokenizer, config.prompt, description, rows, config.learning.max_row_tokens)
        with BackboneRunner(backbone) as runner:
            losses = token_losses(runner, prefix, encoded, keep_LI, MicroBatchConfig.of(config, backbone.device))
        return [row_N.clone() for row_N in losses]


def difference(better: Sequence[Tensor], worse: Sequence[Tensor], chosen: Sequence[Tensor]) -> tuple[float, float]:
    """Mean of worse - better over the chosen tokens, and its standard error over rows."""
    sums = torch.tensor([float((w - b)[c].sum()) for b, w, c in zip(better, worse, chosen, strict=True)])
    tokens = torch.tensor([float(c.sum()) for c in chosen])
    mean = sums.sum() / tokens.sum()
    rows = len(sums)
    error = ((sums - mean * tokens).square().sum() * rows / (rows - 1)).sqrt() / tokens.sum()
    return float(mean), float(error)


def compare(
    people: Sequence[Speaker],
    masks: dict[str, dict[str, Tensor]],
    losses: TokenLosses,
    mended_losses: TokenLosses,
    ratio: float,
) -> dict[str, float]:
    """Print the tables of one ratio; the figures for the last line."""
    found: dict[str, float] = {}
    for text in ("answers", "conversations"):
        by_method = {"unpruned": [losses.of(who, text, "unpruned", None) for who in people]}
        for method, keeps in masks.items():
            by_method[method] = [losses.of(who, text, f"{method}-{ratio}", keeps[who.id]) for who in people]
        own = masks["own"]
        by_method[MENDED] = [mended_losses.of(who, text, f"{MENDED}-{ratio}", own[who.id]) for who in people]
        nobody = [losses.of(who, text, "nobody", None, NOBODY) for who in people]
        every = [[torch.ones_like(row_N, dtype=torch.bool) for row_N in rows] for rows in nobody]
        tenth = [_tenth(told, untold) for told, untold in zip(by_method["unpruned"], nobody, strict=True)]
        means = {}
        print(f"\nratio {ratio}, {text}: mean over personas, nats per token")
        print(f"{'':<24}{'all':>8}{'persona':>9}{'removed':>9}")
        for method, rows in by_method.items():
            means[method] = [_mean(rows, chosen) for chosen in (every, tenth)]
            published, unpruned = means.get(PUBLISHED, means[method])[0], means["unpruned"][0]
            removed = 1 - (means[method][0] - unpruned) / (published - unpruned) if published > unpruned else math.nan
            print(f"{method:<24}{means[method][0]:>8.3f}{means[method][1]:>9.3f}{removed:>9.1%}")
            if method in ("own", MENDED):
                found[f"removed_{text}" if method == "own" else f"removed_mended_{text}"] = removed
        for rival in ("pooled, further steps", "other"):
            for scope, chosen in (("all", every), ("persona", tenth)):
                pairs = [difference(*each) for each in zip(by_method["own"], by_method[rival], chosen, strict=True)]
                mean, error = _mean_error([gain for gain, _ in pairs])
                wins, clear = sum(gain > 0 for gain, _ in pairs), sum(gain > 2 * error for gain, error in pairs)
                each = " ".join(f"{gain:+.3f}±{error:.3f}" for gain, error in pairs)
                print(f"own better than {rival} ({scope} tokens): {mean:+.4f} ± {error:.4f}, {wins} of {len(pairs)}, "
                      f"{clear} by two standard errors of their rows: {each}")  # fmt: skip
                name = f"{'global' if 'further' in rival else 'other'}_{text}_{scope}"
                found |= {f"wins_{name}": wins, f"gain_{name}": mean, f"gain_error_{name}": error}
    return found


def _tenth(told: Sequence[Tensor], untold: Sequence[Tensor]) -> list[Tensor]:
    return decided_tokens([(a - b).abs() for a, b in zip(told, untold, strict=True)])


def _mean(people: Sequence[Sequence[Tensor]], chosen: Sequence[Sequence[Tensor]]) -> float:
    """Mean over personas of the mean over their chosen tokens."""
    return statistics.mean(
        float(torch.cat([row_N[c] for row_N, c in zip(rows, some, strict=True)]).mean())
        for rows, some in zip(people, chosen, strict=True)
    )


def _mean_error(values: Sequence[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


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
        teacher.collect(runner, encoded.prefixes[0], examples, settings)
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
    parser.add_argument("--cache", type=Path, default=Path("runs/real_model"))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        options.personas, options.answers, options.heldout, options.ratios = 2, 8, 4, [0.25]
        options.set += ["learning.steps=1", "learning.pooled_steps=1", "synthesis.rewrite.max_new_tokens=8"]
        options.cache = options.cache.with_name("real_model_quick")
    options.cache.mkdir(parents=True, exist_ok=True)
    config = load_config(options.config, options.set)
    backbone = load_backbone(config.backbone, deepspeed=False)
    people = speakers(backbone, config, options)
    result = {"matmul_share": round(matmul_share(backbone, config, people[0]), 3)}
    for ratio in options.ratios:
        at = config.model_copy(update={"learning": config.learning.model_copy(update={"ratio": ratio})})
        masks = free_of_training(backbone, at, people, options.cache, generic(min(options.answers, 128)))
        masks |= learned(backbone, at, people, options.cache)
        better = mended(at, people, masks["own"], options.cache / f"mended-{ratio}")
        kept_losses = [TokenLosses(each, at, options.cache) for each in (backbone, better)]
        found = compare(people, masks, kept_losses[0], kept_losses[1], ratio)
        percent = round(100 * ratio)
        result[f"removed_real_{percent}"] = found["removed_conversations"]
        result[f"removed_real_mended_{percent}"] = found["removed_mended_conversations"]
        for rival in ("global", "other"):
            result[f"own_beats_{rival}_{percent}"] = found[f"wins_{rival}_conversations_all"]
        result |= {f"{name}_{percent}": value for name, value in found.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
