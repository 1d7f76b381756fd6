"""Tuning after the mask: LoRA (arXiv 2106.09685) on the pruned model, on the persona's own rows, for few steps.

On answer tokens under the persona's prompt. Few rows are soon overfitted: what is stored is the state with the lowest
held-out loss, the pruned model as it was included. A checkpoint holds the LoRA matrices, the best so far and AdamW's
moments: an interrupted tuning goes on at its step, bit by bit. Needs peft (`persona-pruner[recover]`).

Shapes: B rows, T tokens, V vocabulary, N answer tokens.
"""

import hashlib
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from persona_pruner.backbone.export import pruned_copy
from persona_pruner.backbone.forward import pad_rows
from persona_pruner.backbone.load import Backbone
from persona_pruner.config.recovery import RecoveryConfig
from persona_pruner.config.schema import RunConfig
from persona_pruner.dataset import PersonaData
from persona_pruner.learning.callbacks import TrainingCallbacks
from persona_pruner.learning.encoding import EncodedData, EncodedRow, batch, encode
from persona_pruner.masks.format import Mask
from persona_pruner.masks.header import metadata_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recovered:
    """Held-out losses in nats per token, None where nothing is held out. `files` of an adapter or a checkpoint.

    `steps`: after which the stored state was reached; 0 where none was better than the pruned model.
    """

    persona_id: str
    loss_before: float | None
    loss_after: float | None
    steps: int
    files: dict[str, bytes]


def recovery_digest(settings: RecoveryConfig, *parts: str) -> str:
    """What a result or checkpoint was made of: the settings that decide it, and digests of mask, data and backbone."""
    decisive = settings.model_dump(mode="json", exclude={"checkpoint_steps"})
    return hashlib.sha256(json.dumps([decisive, *parts]).encode()).hexdigest()


def recover(
    backbone: Backbone,
    config: RunConfig,
    mask: Mask,
    data: PersonaData,
    digest: str,
    callbacks: TrainingCallbacks | None = None,
) -> Recovered | None:
    """Tune one persona's pruned model; None where it was stopped before the end, after a checkpoint.

    Raises PersonaError (empty, row_too_long), MaskError where the mask is of another backbone.
    """
    callbacks = callbacks or TrainingCallbacks()
    torch.set_num_threads(config.groups.cpu_threads)
    mask.check(f"mask of {data.persona_id}", data.persona_id, backbone.fingerprint)
    encoded = encode(backbone.tokenizer, config.prompt, data, config.learning.max_row_tokens)
    tuning = _Tuning(backbone, config.recovery, mask, encoded, digest)
    before = tuning.consider()
    tuning.restore(callbacks.read_checkpoint(data.persona_id))
    while tuning.step < config.recovery.steps:
        if callbacks.should_stop():
            callbacks.write_checkpoint(data.persona_id, tuning.checkpoint())
            return None
        tuning.train_step()
        if tuning.step % config.recovery.evaluate_every == 0 or tuning.step == config.recovery.steps:
            tuning.consider()
        if tuning.step % config.recovery.checkpoint_steps == 0:
            callbacks.write_checkpoint(data.persona_id, tuning.checkpoint())
    tuning.take_best()
    return Recovered(data.persona_id, before, tuning.best_loss, tuning.step, tuning.files())


class _Tuning:
    """One pruned model with its LoRA matrices and their optimizer. Before the first step it is the pruned model."""

    def __init__(
        self, backbone: Backbone, settings: RecoveryConfig, mask: Mask, encoded: EncodedData, digest: str
    ) -> None:
        from peft import LoraConfig, get_peft_model

        self.backbone, self.settings, self.encoded, self.digest = backbone, settings, encoded, digest
        self.step = self.best_step = 0
        self.best_loss: float | None = None
        self._pad = getattr(backbone.model.config, "pad_token_id", None) or 0
        lora = LoraConfig(
            r=settings.rank, lora_alpha=settings.alpha, target_modules="all-linear", task_type="CAUSAL_LM"  # type: ignore[arg-type]
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            self.model: Any = get_peft_model(pruned_copy(backbone.model, mask.keep_LI), lora).eval()
        self.learned: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }
        self._best: dict[str, Tensor] = {}
        self.optimizer = torch.optim.AdamW(self.learned.values(), settings.learning_rate, weight_decay=0)

    def train_step(self) -> None:
        settings, rows = self.settings, self.encoded.train
        numbers = batch(len(rows), settings.rows_per_step, self.step, settings.seed, self.encoded.sha256)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 - self.step / settings.steps)
        self._loss([rows[number] for number in numbers]).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def consider(self) -> float | None:
        """Keep this state if none before had a lower held-out loss, which is returned; None without held-out rows."""
        if not self.encoded.heldout:
            return None
        loss = self._heldout_loss()
        if self.best_loss is None or loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            self._best = {name: parameter.detach().clone() for name, parameter in self.learned.items()}
        return loss

    def take_best(self) -> None:
        """Go back to the best state, where there are held-out rows to tell."""
        if self._best:
            self.step = self.best_step
            for name, value in self._best.items():
                self.learned[name].data.copy_(value)

    def _loss(self, rows: Sequence[EncodedRow]) -> Tensor:
        """Mean over the answer tokens."""
        logits_NV, targets_N = self._answers(self.model, rows)
        if self.settings.objective == "cross_entropy":
            return nn.functional.cross_entropy(logits_NV, targets_N)
        with torch.no_grad():
            unpruned_NV, _ = self._answers(self.backbone.model, rows)
        logs_NV, unpruned_NV = logits_NV.log_softmax(-1), unpruned_NV.log_softmax(-1)
        return nn.functional.kl_div(logs_NV, unpruned_NV, reduction="batchmean", log_target=True)

    @torch.no_grad()
    def _heldout_loss(self) -> float:
        rows, size = self.encoded.heldout, self.settings.rows_per_step
        blocks = [self._answers(self.model, rows[start : start + size]) for start in range(0, len(rows), size)]
        losses = [
            nn.functional.cross_entropy(logits_NV, targets_N, reduction="none") for logits_NV, targets_N in blocks
        ]
        return torch.cat(losses).mean().item()

    def _answers(self, model: Any, rows: Sequence[EncodedRow]) -> tuple[Tensor, Tensor]:
        """Logits [N, V] (float32) and ids [N] of every answer token."""
        prefix, device = self.encoded.prefixes[0], self.backbone.device
        tokens = [[*prefix, *row.tokens] for row in rows]
        ids_BT = pad_rows(tokens, self._pad).to(device)
        lengths_B = torch.tensor([len(ids) for ids in tokens], device=device)
        attention_BT = (torch.arange(ids_BT.shape[1], device=device) < lengths_B[:, None]).long()
        logits_BTV = model(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False).logits
        answers = [
            (number, position)
            for number, (ids, row) in enumerate(zip(tokens, rows, strict=True))
            for position in range(len(ids) - row.answer, len(ids))
        ]
        row_N, position_N = torch.tensor(answers, device=device).T
        return logits_BTV[row_N, position_N - 1].float(), ids_BT[row_N, position_N]

    def checkpoint(self) -> bytes:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.learned.items():
            state = self.optimizer.state[parameter]
            tensors |= {f"value.{name}": parameter.detach(), f"first.{name}": state["exp_avg"]}
            tensors[f"second.{name}"] = state["exp_avg_sq"]
        tensors |= {f"best.{name}": value for name, value in self._best.items()}
        best = {"best_step": str(self.best_step), "best_loss": json.dumps(self.best_loss)}
        return save(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            {"step": str(self.step), "digest": self.digest, **best},
        )

    def restore(self, data: bytes | None) -> None:
        """Go on at a checkpoint. One of other settings, data or mask, or one that cannot be read, is left aside."""
        if data is None:
            return
        try:
            header = metadata_of(data)
            if header["digest"] != self.digest:
                return
            tensors = load(data)
            states = {
                name: [tensors[f"{part}.{name}"].to(self.backbone.device) for part in ("value", "first", "second")]
                for name in self.learned
            }
            device = self.backbone.device
            best = {name: tensors[f"best.{name}"].to(device) for name in (self.learned if self._best else ())}
            step, best_step, best_loss = (json.loads(header[name]) for name in ("step", "best_step", "best_loss"))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s: its checkpoint cannot be read (%s)", self.encoded.persona_id, type(error).__name__)
            return
        for name, (value, first, second) in states.items():
            parameter = self.learned[name]
            parameter.data.copy_(value)
            moments = {"step": torch.tensor(float(step)), "exp_avg": first, "exp_avg_sq": second}
            self.optimizer.state[parameter] = moments
        self.step, self.best_step, self.best_loss, self._best = step, best_step, best_loss, best

    def files(self) -> dict[str, bytes]:
        """Of the adapter as peft writes it, or of the merged checkpoint and its tokenizer."""
        with tempfile.TemporaryDirectory() as directory:
            if self.settings.form == "adapter":
                self.model.peft_config["default"].base_model_name_or_path = self.backbone.name
                self.model.save_pretrained(directory, save_embedding_layers=False)  # "auto" would ask the hub
                _sort_lists(Path(directory) / "adapter_config.json")
                (Path(directory) / "README.md").unlink(missing_ok=True)
            else:
                self.model.merge_and_unload().save_pretrained(directory)
                self.backbone.tokenizer.save_pretrained(directory)
            return {file.name: file.read_bytes() for file in sorted(Path(directory).iterdir()) if file.is_file()}


def _sort_lists(file: Path) -> None:
    """peft writes a set of module names in an order that differs from process to process."""
    values = json.loads(file.read_text(encoding="utf-8"))
    values = {name: sorted(value) if isinstance(value, list) else value for name, value in values.items()}
    file.write_text(json.dumps(values, indent=1, sort_keys=True), encoding="utf-8")
