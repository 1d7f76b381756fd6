import pytest
import torch
import torch.nn.functional as F
from tiny_models import persona_data, tiny, tiny_config

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.dataset import PersonaData, Row
from persona_pruner.learning.batches import MicroBatchConfig
from persona_pruner.learning.encoding import PooledData, encode
from persona_pruner.learning.persona_tokens import (
    NOBODY,
    decided_tokens,
    description_effect,
    generic_data,
    nobody_prefix,
    token_losses,
    token_weights,
    with_foreign_rows,
)


def test_each_token_has_the_plain_loss_and_the_effect_is_what_the_description_changes(tmp_path):
    backbone, config, data = tiny(tmp_path), tiny_config(), persona_data("Ann")
    encoded, settings = (
        encode(backbone.tokenizer, config.prompt, data, 2048),
        MicroBatchConfig.of(config, backbone.device),
    )
    nobody = nobody_prefix(backbone, config.prompt)
    assert (
        nobody
        == encode(backbone.tokenizer, config.prompt, PersonaData("", NOBODY, data.train, (), ""), 2048).prefixes[0]
    )
    with BackboneRunner(backbone) as runner:
        told = token_losses(runner, encoded.prefixes[0], encoded.train, None, settings)
        effect = description_effect(runner, encoded.prefixes[0], nobody, encoded.train, settings)
    for row, told_N, effect_N in zip(encoded.train, told, effect, strict=True):
        plain = []
        for prefix in (encoded.prefixes[0], nobody):
            ids = torch.tensor([*prefix, *row.tokens])
            logits = backbone.model(ids[None]).logits[0, -row.answer - 1 : -1]
            plain.append(F.cross_entropy(logits, ids[-row.answer :], reduction="none"))
        assert torch.allclose(told_N, plain[0], rtol=1e-4)
        assert torch.allclose(effect_N, (plain[0] - plain[1]).abs(), rtol=1e-3, atol=1e-5)


def test_the_tenth_that_changes_most_is_decided_by_the_description():
    effect = [torch.arange(12.0), torch.arange(8.0) + 20]
    assert [row_N.tolist().count(True) for row_N in decided_tokens(effect)] == [0, 2]
    assert decided_tokens(effect)[1][-2:].all()
    assert [row_N.tolist() for row_N in decided_tokens([torch.ones(1)])] == [[True]]


def test_weights_have_mean_one_for_every_persona_of_a_pool(tmp_path):
    backbone, config = tiny(tmp_path), tiny_config()
    pool = PooledData("global", (persona_data("Ann"), persona_data("Barbara")))
    encoded = encode(backbone.tokenizer, config.prompt, pool, 2048)
    with BackboneRunner(backbone) as runner:
        nobody, settings = nobody_prefix(backbone, config.prompt), MicroBatchConfig.of(config, backbone.device)
        weights = token_weights(runner, encoded, nobody, 2.0, settings)
    for persona in (0, 1):
        own = [w for row, some in zip(encoded.train, weights, strict=True) if row.prefix == persona for w in some]
        assert sum(own) / len(own) == pytest.approx(1, rel=1e-5)
        assert min(own) >= 1 / 3 - 1e-6
        assert max(own) > 1.1
    assert [len(some) for some in weights] == [row.answer for row in encoded.train]


def test_generic_text_is_the_examples_or_a_file_of_ones_own(tmp_path):
    backbone = tiny(tmp_path / "model")
    shipped = generic_data(backbone, tiny_config())
    assert (len(shipped.train), len(shipped.prefixes)) == (256, 1)
    file = tmp_path / "text.jsonl"
    file.write_text('{"question": "Why?", "answer": "So."}\n{"instruction": "How?", "output": "Thus."}\n')
    own = generic_data(backbone, tiny_config(objective={"generic_rows": str(file)}))
    assert [row.answer for row in own.train] == [4, 6]


def test_foreign_rows_are_a_share_of_all_and_no_longer_than_the_personas_own():
    pool = PooledData("global", (persona_data("Ann"), persona_data("Barbara")))
    learning = tiny_config(objective={"foreign": 0.25}).learning
    rows = [*(Row(f"Why {n}?", "So.") for n in range(30)), Row("Why?", "Since " + "so " * 99)]
    mixed = with_foreign_rows(pool, rows, learning)
    assert mixed.sha256 == pool.sha256
    drawn = []
    for own, each in zip(pool.personas, mixed.personas, strict=True):
        assert each.train[: len(own.train)] == own.train
        drawn.append(each.train[len(own.train) :])
        assert len(drawn[-1]) == 4  # of 12 rows of its own
        assert set(drawn[-1]) <= set(rows[:30])
    assert drawn[0] != drawn[1]
    assert with_foreign_rows(pool, rows[:2], learning).personas[0].train[12:] in (tuple(rows[:2]), tuple(rows[1::-1]))
