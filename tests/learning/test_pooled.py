"""One mask for many personas comes out of the trainer's own loop."""

import hashlib

import torch
from tiny_models import persona_data, tiny, tiny_config

from persona_pruner.learning.encoding import PooledData, encode
from persona_pruner.learning.pooled import GLOBAL, pooled_config, train_pooled
from persona_pruner.learning.trainer import MaskTrainer

NAMES = ("Ann", "Barbara", "Cyril")
CONFIG = tiny_config(keep_scores=True, steps=6)


def test_pooled_rows_keep_their_personas_prefix(tmp_path):
    backbone, personas = tiny(tmp_path), tuple(persona_data(name) for name in NAMES)
    alone = [encode(backbone.tokenizer, CONFIG.prompt, data, 2048) for data in personas]
    pooled = encode(backbone.tokenizer, CONFIG.prompt, PooledData("pool", personas), 2048)
    assert pooled.prefixes == tuple(each.prefixes[0] for each in alone)
    assert [(pooled.prefixes[row.prefix], row.tokens) for row in pooled.train] == [
        (each.prefixes[0], row.tokens) for each in alone for row in each.train
    ]
    assert pooled.sha256 == hashlib.sha256(b"sha-Annsha-Barbarasha-Cyril").hexdigest()


def test_a_pool_of_one_persona_learns_that_personas_mask(tmp_path):
    backbone, data = tiny(tmp_path), persona_data("Ann")
    # The order of the rows comes from the digest of the data: at one step of all rows it does not matter.
    everything = CONFIG.model_copy(update={"learning": CONFIG.learning.model_copy(update={"rows_per_step": 99})})
    (own,) = MaskTrainer(backbone, everything).train([data], run_id="r")
    pooled = train_pooled(backbone, pooled_config(everything, 0.5), [data], "r")
    assert (own.mask.scores_LI.float() - pooled.mask.scores_LI.float()).abs().max() < 2e-3


def test_a_pooled_mask_is_the_same_each_time(tmp_path):
    backbone, personas = tiny(tmp_path), [persona_data(name) for name in NAMES]
    masks = [train_pooled(backbone, pooled_config(CONFIG, 0.25), personas, "r").mask for _ in range(2)]
    assert masks[0].to_bytes() == masks[1].to_bytes()
    assert masks[0].metadata.persona_id == GLOBAL
    assert masks[0].metadata.kept == (48, 48, 48)
    assert torch.equal(masks[0].keep_LI.sum(1), torch.tensor([48] * 3))
