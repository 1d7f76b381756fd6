"""One mask for many personas comes out of the trainer's own loop."""

import hashlib

import pytest
import torch
from tiny_models import persona_data, tiny, tiny_config

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.learning.batches import MicroBatchConfig
from persona_pruner.learning.callbacks import TrainingCallbacks
from persona_pruner.learning.encoding import PooledData, encode
from persona_pruner.learning.estimators import topk_mask
from persona_pruner.learning.init_scores import StartingPoints
from persona_pruner.learning.pooled import GLOBAL, global_config, pooled_config, pooled_sample, train_pooled
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
    pooled = train_pooled(backbone, global_config(everything, 0.5), [data], "r")
    assert (own.mask.scores_LI.float() - pooled.mask.scores_LI.float()).abs().max() < 2e-3


def test_a_pooled_mask_is_the_same_each_time(tmp_path):
    backbone, personas = tiny(tmp_path), [persona_data(name) for name in NAMES]
    masks = [train_pooled(backbone, global_config(CONFIG, 0.25), personas, "r").mask for _ in range(2)]
    assert masks[0].to_bytes() == masks[1].to_bytes()
    assert masks[0].metadata.persona_id == GLOBAL
    assert masks[0].metadata.kept == (48, 48, 48)
    assert torch.equal(masks[0].keep_LI.sum(1), torch.tensor([48] * 3))


def test_the_sample_is_drawn_by_the_hash_of_the_ids():
    names = [f"p{n}" for n in range(40)]
    sample = pooled_sample(names, 8)
    assert len(set(sample)) == 8
    assert pooled_sample(names[::-1], 8) == sample
    assert pooled_sample(names, 100)[:8] == sample


class Pooled(TrainingCallbacks):
    """Gives the pooled mask; keeps checkpoints, stops once after `stop_after` steps and restores."""

    def __init__(self, mask=None, stop_after=0, restore=None):
        self.mask, self.left, self.restore = mask, stop_after, restore

    def pooled_scores(self):
        return self.mask

    def read_checkpoint(self, persona_id):
        return self.restore

    def write_checkpoint(self, persona_id, data):
        self.kept = data

    def should_stop(self):
        self.left -= 1
        return self.left == 0


def pooled_start(tmp_path, **learning):
    """Backbone, configuration and the pooled mask of a run that starts there."""
    config = tiny_config(steps=8, pooled_steps=6, init="pooled", **learning)
    backbone, personas = tiny(tmp_path), [persona_data(name) for name in NAMES]
    return backbone, config, train_pooled(backbone, pooled_config(config), personas, "r")


def test_a_pooled_mask_that_was_interrupted_ends_with_the_same_bits(tmp_path):
    backbone, config, whole = pooled_start(tmp_path)
    personas, stopped = [persona_data(name) for name in NAMES], Pooled(stop_after=4)
    assert train_pooled(backbone, pooled_config(config), personas, "r", stopped).status == "paused"
    again = train_pooled(backbone, pooled_config(config), personas, "r", Pooled(restore=stopped.kept))
    assert again.mask.to_bytes() == whole.mask.to_bytes()
    assert again.learned.to_bytes() == whole.learned.to_bytes()


def test_personas_start_at_the_pooled_mask_and_keep_its_core(tmp_path):
    backbone, config, pooled = pooled_start(tmp_path, core=0.75, channel_multiple=4, learning_rate=0.2)
    (own,) = MaskTrainer(backbone, config).train([persona_data("Dora")], run_id="r", callbacks=Pooled(pooled.learned))
    core_LI = topk_mask(pooled.learned.scores_LI, 24)
    assert (own.mask.keep_LI | ~core_LI).all()
    assert own.mask.keep_LI.sum(1).tolist() == [32] * 3
    assert not torch.equal(own.mask.keep_LI, pooled.learned.keep_LI)
    (missing,) = MaskTrainer(backbone, config).train([persona_data("Dora")], run_id="r")
    assert missing.cause == "no_pooled_mask"


def test_only_scores_outside_the_core_are_learned(tmp_path):
    backbone, config, pooled = pooled_start(tmp_path, core=0.5, keep_scores=True, average=0)
    (own,) = MaskTrainer(backbone, config).train([persona_data("Dora")], run_id="r", callbacks=Pooled(pooled.learned))
    core_LI = topk_mask(pooled.learned.scores_LI, 16)
    assert torch.equal(own.mask.scores_LI[core_LI], pooled.learned.scores_LI[core_LI].half())
    assert not torch.equal(own.mask.scores_LI[~core_LI], pooled.learned.scores_LI[~core_LI].half())


def test_the_global_baseline_starts_where_the_personas_do():
    config = tiny_config(init="pooled", core=0.9, passes=2.0)
    assert global_config(config, 0.5).learning.init == "pooled"
    assert global_config(config, 0.5).learning.core == 0
    assert global_config(config, 0.5).learning.passes == 2.0
    assert global_config(tiny_config(init="zeros"), 0.5).learning.init == "activation"


@pytest.mark.parametrize("budget", ["uniform", "free", "profile"])
def test_the_value_optimizer_goes_from_pool_to_persona(tmp_path, budget):
    backbone, config, pooled = pooled_start(tmp_path, optimizer="value", budget=budget, value_gradient=0.5)
    (own,) = MaskTrainer(backbone, config).train([persona_data("Dora")], run_id="r", callbacks=Pooled(pooled.learned))
    assert own.status == "done", own.message
    assert sum(own.mask.metadata.kept) == 96
    if budget == "profile":
        assert own.mask.metadata.kept == pooled.mask.metadata.kept
    if budget != "uniform":
        assert len(set(own.mask.metadata.kept)) > 1
    stopped = Pooled(pooled.learned, stop_after=4)
    MaskTrainer(backbone, config).train([persona_data("Dora")], run_id="r", callbacks=stopped)
    resumed = Pooled(pooled.learned, restore=stopped.kept)
    (again,) = MaskTrainer(backbone, config).train([persona_data("Dora")], run_id="r", callbacks=resumed)
    assert again.mask.to_bytes() == own.mask.to_bytes()


def test_the_start_of_the_value_optimizer_is_the_mean_of_both_fishers(tmp_path):
    backbone, config, pooled = pooled_start(tmp_path, optimizer="value")
    encoded = encode(backbone.tokenizer, config.prompt, persona_data("Dora"), 2048)
    with BackboneRunner(backbone) as runner:
        settings = MicroBatchConfig.of(config, backbone.device)
        starts = StartingPoints(runner, encoded, config.learning, settings, None, pooled.learned)
        start, own_LI = starts.start("pooled", 0.5), starts.fisher()
    mean_LI = (own_LI + pooled.learned.fisher_LI) / 2
    assert torch.allclose(start.fisher_LI, mean_LI)
    assert torch.allclose(start.scores_LI - pooled.learned.scores_LI, (mean_LI - pooled.learned.fisher_LI) / 2)
