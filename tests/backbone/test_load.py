import pytest
import torch
from tiny_models import save_tiny

from persona_pruner.backbone.files import resolve
from persona_pruner.backbone.load import load_backbone
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.errors import BackboneError


def test_a_loaded_backbone_is_frozen_with_or_without_deepspeed(tmp_path):
    save_tiny(tmp_path)
    config = BackboneConfig(path=str(tmp_path))
    plain, wrapped = load_backbone(config, deepspeed=False), load_backbone(config)
    tokens = torch.arange(6)[None]
    assert torch.equal(plain.model(tokens).logits, wrapped.model(tokens).logits)
    for backbone in (plain, wrapped):
        assert not backbone.model.training
        assert not any(p.requires_grad for p in backbone.model.parameters())
        assert not backbone.sharded
    assert plain.fingerprint == wrapped.fingerprint


def test_bfloat16_is_kept(tmp_path):
    save_tiny(tmp_path)
    backbone = load_backbone(BackboneConfig(path=str(tmp_path), dtype="bfloat16"), deepspeed=False)
    assert {p.dtype for p in backbone.model.parameters()} == {torch.bfloat16}


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    for path, said in (
        ("", "backbone.path is not set"),
        (str(tmp_path / "absent"), "config.json missing"),
        (str(tmp_path), "config.json missing"),
    ):
        with pytest.raises(BackboneError, match=said) as caught:
            resolve(BackboneConfig(path=path))
        assert "\n" not in str(caught.value)
    save_tiny(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(BackboneError, match="not a readable safetensors file"):
        load_backbone(BackboneConfig(path=str(tmp_path / "broken")), deepspeed=False)
    save_tiny(tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="convert the model to safetensors"):
        load_backbone(BackboneConfig(path=str(tmp_path / "bare")), deepspeed=False)


def test_backbone_in_object_storage(bucket, tmp_path):
    path = save_tiny(tmp_path / "tiny")
    for file in path.iterdir():
        bucket.put(f"tiny/{file.name}", file.read_bytes())
    local = load_backbone(BackboneConfig(path=str(path)), deepspeed=False)
    remote = load_backbone(BackboneConfig(path=f"{bucket.url}/tiny"), deepspeed=False)
    assert (remote.name, remote.fingerprint) == (local.name, local.fingerprint)
    with pytest.raises(BackboneError, match=r"backbone\.path = s3://.*/absent: nothing is there"):
        resolve(BackboneConfig(path=f"{bucket.url}/absent"))
