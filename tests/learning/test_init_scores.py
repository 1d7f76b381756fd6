import pytest
import torch
from tiny_models import persona_data, tiny, tiny_config

from persona_pruner.backbone.forward import BackboneRunner
from persona_pruner.errors import PersonaError
from persona_pruner.learning.batches import MicroBatchConfig
from persona_pruner.learning.encoding import PooledData, encode
from persona_pruner.learning.init_scores import StartingPoints
from persona_pruner.learning.training_free import activation, magnitude, rank_normalize

CONFIG = tiny_config()


def start(backbone, data, init, warm=None, **learning):
    encoded = encode(backbone.tokenizer, CONFIG.prompt, data, 2048)
    config = tiny_config(**learning)
    with BackboneRunner(backbone) as runner:
        settings = MicroBatchConfig.of(config, backbone.device)
        return StartingPoints(runner, encoded, config.learning, settings, warm).start(init, 0.5)


def scores(backbone, data, init, warm=None):
    return start(backbone, data, init, warm).scores_LI


def test_statistics_enter_as_ranks_within_their_layer(tmp_path):
    backbone, data = tiny(tmp_path), persona_data("Ann")
    assert not scores(backbone, data, "zeros").any()
    assert torch.equal(scores(backbone, data, "magnitude"), rank_normalize(magnitude(backbone)))
    assert torch.equal(scores(backbone, data, "activation"), rank_normalize(activation(backbone, CONFIG, data)))


def test_pooled_rows_start_from_the_mean_of_their_personas(tmp_path):
    backbone, one, other = tiny(tmp_path), persona_data("Ann"), persona_data("Barbara", rows=5)
    pooled = scores(backbone, PooledData("pool", (one, other)), "activation")
    alone = [rank_normalize(activation(backbone, CONFIG, data)) for data in (one, other)]
    assert torch.allclose(pooled, (alone[0] + alone[1]) / 2)


def test_warm_scores_must_be_there_and_fit(tmp_path):
    backbone, data, warm = tiny(tmp_path), persona_data("Ann"), torch.rand(3, 64).half()
    assert torch.equal(scores(backbone, data, "persona:bo", warm), warm.float())
    with pytest.raises(PersonaError, match="no scores were found"):
        scores(backbone, data, "persona:bo")
    with pytest.raises(PersonaError, match=r"shape \[1, 2\], this backbone needs \[3, 64\]"):
        scores(backbone, data, "persona:bo", torch.zeros(1, 2))


def test_fisher_scores_order_the_channels_and_share_the_budget(tmp_path):
    backbone, data = tiny(tmp_path), persona_data("Ann")
    free = start(backbone, data, "fisher", budget="free", channel_multiple=8)
    assert sorted(free.scores_LI[0].tolist()) == pytest.approx([(n + 0.5) / 64 for n in range(64)])
    assert int(free.widths_L.sum()) == 96
    assert int(free.widths_L.min()) >= 8
    assert len(set(free.widths_L.tolist())) > 1
    profile = start(backbone, data, "fisher", budget="profile", channel_multiple=8)
    assert {width % 8 for width in profile.widths_L.tolist()} == {0}
    assert int(profile.widths_L.sum()) == 96
    assert start(backbone, data, "fisher").widths_L is None


def test_pooled_fisher_scores_are_the_mean_of_the_personas(tmp_path):
    backbone, people = tiny(tmp_path), (persona_data("Ann"), persona_data("Barbara", rows=5))
    config = tiny_config()

    def fisher(data):
        encoded = encode(backbone.tokenizer, CONFIG.prompt, data, 2048)
        with BackboneRunner(backbone) as runner:
            settings = MicroBatchConfig.of(config, backbone.device)
            return StartingPoints(runner, encoded, config.learning, settings).fisher()

    alone = torch.stack([fisher(data) for data in people]).mean(0)
    assert torch.allclose(fisher(PooledData("pool", people)), alone, rtol=1e-4, atol=1e-9)
