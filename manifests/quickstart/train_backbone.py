"""Train the example's backbone from scratch: a small Llama-architecture chat model that really plays personas.

    python manifests/quickstart/train_backbone.py [--out DIR] [--steps N]

A training sequence is one system prompt and several independent turns behind it; a turn sees the system prompt and
itself (block mask, positions go on from the prompt), so each is the single-turn chat that the product sends, and the
prompt is paid once. Writes weights (bfloat16 safetensors), tokenizer, chat template and figures.json.

Shape suffixes: B sequences, T tokens.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from make_corpus import (
    SEED,
    SYSTEM,
    Character,
    Question,
    answer,
    plain_answer,
    questions,
    random_character,
    training_characters,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SPECIALS = ["<|pad|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TURNS = 5
SEQUENCES = 20


def train_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    asked = questions()
    characters = training_characters(rng)

    def texts() -> Iterator[str]:
        for character in (next(characters) for _ in range(1500)):
            yield SYSTEM.format(persona=character.describe())
            for question in rng.sample(asked, 4):
                yield f"{question.text} {answer(character, question, rng)} {plain_answer(question, rng)}"

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIALS[0],
        bos_token=SPECIALS[1],
        eos_token=SPECIALS[4],
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=32,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


class Sequences:
    """Renders characters and their turns; the rest of the chat is the template's, as the product renders it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, character: Character | None) -> list[int]:
        if character is None:
            return self.tokens("<|begin_of_text|>")
        system = SYSTEM.format(persona=character.describe())
        return self.tokens(f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>")

    def turn(self, question: str, reply: str) -> tuple[list[int], list[int]]:
        head = (
            f"<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        )
        return self.tokens(head), self.tokens(f"{reply}<|eot_id|>")

    def batch(self, rows: list[tuple[Character | None, list[tuple[str, str]]]]) -> dict[str, Tensor]:
        """input_ids, position_ids, labels int64 [B, T]; attention_mask bool [B, 1, T, T]."""
        ids, positions, labels, blocks = [], [], [], []
        for character, turns in rows:
            prompt = self.prompt(character)
            row, position, label, block = (
                list(prompt),
                list(range(len(prompt))),
                [-100] * len(prompt),
                [0] * len(prompt),
            )
            for number, (question, reply) in enumerate(turns, 1):
                head, tail = self.turn(question, reply)
                row += head + tail
                position += range(len(prompt), len(prompt) + len(head) + len(tail))
                label += [-100] * len(head) + tail
                block += [number] * (len(head) + len(tail))
            ids.append(row)
            positions.append(position)
            labels.append(label)
            blocks.append(block)
        width = max(map(len, ids))
        pad = self.tokenizer.pad_token_id

        def stack(rows: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (width - len(row)) for row in rows])

        block_BT = stack(blocks, -1)
        same_BTT = block_BT[:, :, None] == block_BT[:, None, :]
        seen_BTT = same_BTT | (block_BT[:, None, :] == 0)
        causal_TT = torch.ones(width, width).tril().bool()
        return {
            "input_ids": stack(ids, pad),
            "position_ids": stack(positions, 0),
            "labels": stack(labels, -100),
            "attention_mask": (seen_BTT & causal_TT)[:, None],
        }


def loss_of(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy (nats a token) of the answers; logits at answer positions only."""
    labels_BT = batch["labels"]
    hidden_BTD = model.model(
        batch["input_ids"], position_ids=batch["position_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).last_hidden_state
    chosen_BT = labels_BT[:, 1:] != -100
    logits = model.lm_head(hidden_BTD[:, :-1][chosen_BT])
    return functional.cross_entropy(logits.float(), labels_BT[:, 1:][chosen_BT])


def training_rows(rng: random.Random) -> Iterator[tuple[Character | None, list[tuple[str, str]]]]:
    """One sequence in ten has no persona and plain answers."""
    asked = questions()
    facts = [q for q in asked if q.answer]
    talk = [q for q in asked if not q.answer]
    characters = training_characters(rng)

    def draw() -> list[Question]:
        return [rng.choice(facts if rng.random() < 0.2 else talk) for _ in range(TURNS)]

    while True:
        if rng.random() < 0.1:
            yield None, [(q.text, plain_answer(q, rng)) for q in draw()]
        else:
            character = next(characters)
            yield character, [(q.text, answer(character, q, rng)) for q in draw()]


@torch.no_grad()
def heldout_figures(model: LlamaForCausalLM, sequences: Sequences, count: int = 48) -> dict[str, float]:
    """Loss of held-out characters' answers under their own description and under that of another one."""
    rng = random.Random(SEED + 7)
    talk = [q for q in questions() if not q.answer]
    characters = [random_character(rng) for _ in range(count)]
    right, wrong = [], []
    for own, other in zip(characters, characters[1:] + characters[:1], strict=True):
        turns = [(q.text, answer(own, q, rng)) for q in rng.sample(talk, TURNS)]
        right.append(loss_of(model, sequences.batch([(own, turns)])).item())
        wrong.append(loss_of(model, sequences.batch([(other, turns)])).item())
    own_loss, other_loss = sum(right) / count, sum(wrong) / count
    return {"heldout_right": own_loss, "heldout_other": other_loss, "difference": other_loss - own_loss}


def train(steps: int, out: Path) -> dict[str, float]:
    torch.set_num_threads(2)
    began = time.monotonic()
    rng = random.Random(SEED + 3)
    tokenizer = train_tokenizer(rng)
    model, sequences, rows = new_model(tokenizer), Sequences(tokenizer), training_rows(rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    tokens, recent = 0, 0.0
    for step in range(steps):
        rate = 3e-3 * min(1.0, (step + 1) / 30) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        optimizer.param_groups[0]["lr"] = rate
        batch = sequences.batch([next(rows) for _ in range(SEQUENCES)])
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += int((batch["labels"] != -100).sum())
        recent = 0.95 * recent + 0.05 * loss.item() if step else loss.item()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step} loss {recent:.3f} seconds {time.monotonic() - began:.0f}", flush=True)
    model.bfloat16().float().eval()
    figures = {
        "steps": steps,
        "answer_tokens": tokens,
        "seconds": round(time.monotonic() - began),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_loss": round(recent, 4),
        **{name: round(value, 4) for name, value in heldout_figures(model, sequences).items()},
    }
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "figures.json").write_text(json.dumps({"seed": SEED, **figures}, indent=1) + "\n")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "backbone")
    parser.add_argument("--steps", type=int, default=800)
    arguments = parser.parse_args()
    print(json.dumps(train(arguments.steps, arguments.out)))
