import pytest
import torch
from tiny_models import persona_data, save_tiny, tiny_config

from persona_pruner.backbone.files import fingerprint
from persona_pruner.backbone.load import load_backbone
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.errors import BackboneError
from persona_pruner.evaluation.likelihood import heldout_loss
from persona_pruner.learning.shared_recovery import Masked, Recovery, recover, save_recovered


def loaded(path):
    return load_backbone(BackboneConfig(path=str(path)), deepspeed=False)


@pytest.mark.parametrize("rank", [0, 4])
def test_a_mended_backbone_does_better_under_every_mask_and_takes_the_first_ones_place(tmp_path, rank):
    path = save_tiny(tmp_path / "first")
    backbone, config = loaded(path), tiny_config()
    drawn = torch.rand(2, 3, 64, generator=torch.Generator().manual_seed(0)) > 0.5
    masked = [Masked(persona_data(name), keep) for name, keep in zip(("Ann", "Bo"), drawn, strict=True)]
    recovery = Recovery(steps=30, rate=0.02, rank=rank, refit_rows=0, foreign=0)

    def heldout():
        losses = [
            heldout_loss(backbone, config, each.data.description, each.data.heldout, each.keep_LI) for each in masked
        ]
        return sum(losses) / len(losses)

    before, after = recover(backbone, config, masked, (), recovery, heldout)
    assert after == heldout() < 0.99 * before
    save_recovered(backbone, tmp_path / "mended")
    assert fingerprint(tmp_path / "mended") == fingerprint(path) == loaded(tmp_path / "mended").fingerprint
    with pytest.raises(BackboneError, match="not empty"):
        save_recovered(backbone, tmp_path / "mended")
    assert [file.name for file in tmp_path.glob(".*")] == []
