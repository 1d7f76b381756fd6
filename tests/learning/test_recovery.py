import dataclasses
import json

import pytest
import torch
from safetensors.torch import load
from tiny_models import persona_data, tiny, tiny_config
from transformers import AutoModelForCausalLM

from persona_pruner.backbone.export import export_pruned
from persona_pruner.config.recovery import RecoveryConfig
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.errors import MaskError
from persona_pruner.evaluation.likelihood import heldout_loss
from persona_pruner.learning.callbacks import TrainingCallbacks
from persona_pruner.learning.encoding import encode
from persona_pruner.learning.methods.one_pass import OnePass
from persona_pruner.learning.recovery import recover, recovery_digest

pytest.importorskip("peft")
ANN = persona_data("Ann")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def mask(backbone):
    (result,) = OnePass(backbone, tiny_config(method="random", ratio=0.5)).train([ANN], run_id="r")
    return result.mask


def config(**recovery):
    few = {"steps": 6, "rows_per_step": 4, "rank": 2, "checkpoint_steps": 4, "evaluate_every": 2}
    recovery = RecoveryConfig(**{**few, "objective": "cross_entropy", **recovery})
    return tiny_config().model_copy(update={"recovery": recovery})


class Interrupted(TrainingCallbacks):
    """Stops after some questions; keeps the last checkpoint."""

    def __init__(self, after):
        self.after, self.data = after, None

    def read_checkpoint(self, persona_id):
        return self.data

    def write_checkpoint(self, persona_id, data):
        self.data = data

    def should_stop(self):
        self.after -= 1
        return self.after < 0


def test_a_short_tuning_lowers_the_loss_of_the_pruned_model_and_leaves_the_backbone_alone(backbone, mask):
    before = {name: parameter.clone() for name, parameter in backbone.model.named_parameters()}
    done = recover(backbone, config(steps=12, learning_rate=0.01), mask, ANN, "d")
    masked = heldout_loss(backbone, tiny_config(), ANN.description, ANN.heldout, mask.keep_LI)
    assert done.loss_before == pytest.approx(masked, rel=1e-4)
    assert done.loss_after < done.loss_before
    assert all(torch.equal(parameter, before[name]) for name, parameter in backbone.model.named_parameters())


def test_a_tuning_that_breaks_the_model_gives_the_pruned_one_back(backbone, mask):
    done = recover(backbone, config(learning_rate=1e30), mask, ANN, "d")
    assert (done.loss_after, done.steps) == (done.loss_before, 0)
    adapter = load(done.files["adapter_model.safetensors"])
    assert not any(values.any() for name, values in adapter.items() if "lora_B" in name)


def test_distillation_brings_the_pruned_model_nearer_to_the_unpruned_one(backbone, mask, tmp_path):
    ann = dataclasses.replace(ANN, heldout=())
    encoded = encode(backbone.tokenizer, tiny_config().prompt, ann, 2048)
    row = encoded.train[0]
    tokens = torch.tensor([[*encoded.prefixes[0], *row.tokens]])
    settings = {"objective": "distillation", "form": "merged", "learning_rate": 0.01}
    distances = []
    for steps in (1, 20):  # the first step leaves B as small as its rate
        done = recover(backbone, config(steps=steps, **settings), mask, ann, "d")
        (tmp_path / str(steps)).mkdir()
        for name, data in done.files.items():
            (tmp_path / str(steps) / name).write_bytes(data)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / str(steps))
        differences = (merged(tokens).logits - backbone.model(tokens).logits)[0, -row.answer :]
        distances.append(differences.norm().item())
    assert distances[1] < distances[0]


def test_without_held_out_rows_the_last_state_is_stored(backbone, mask):
    done = recover(backbone, config(), mask, dataclasses.replace(ANN, heldout=()), "d")
    assert (done.loss_before, done.loss_after, done.steps) == (None, None, 6)


def test_an_interrupted_tuning_goes_on_where_it_was_and_ends_in_the_same_bits(backbone, mask):
    after = 3
    whole = recover(backbone, config(), mask, ANN, "d")
    callbacks = Interrupted(after)
    assert recover(backbone, config(), mask, ANN, "d", callbacks) is None
    callbacks.after = 100
    resumed = recover(backbone, config(), mask, ANN, "d", callbacks)
    assert callbacks.after == 100 - (6 - after)
    assert resumed == whole


@pytest.mark.slow
def test_a_checkpoint_of_something_else_or_a_broken_one_is_left_aside(backbone, mask):
    whole = recover(backbone, config(), mask, ANN, "d")
    callbacks = Interrupted(3)
    recover(backbone, config(), mask, ANN, "other", callbacks)
    for data in (callbacks.data, b"\x08" + bytes(7) + b"{}", callbacks.data[:200]):
        callbacks.data, callbacks.after = data, 100
        assert recover(backbone, config(), mask, ANN, "d", callbacks) == whole


def test_the_adapter_fits_the_checkpoint_that_export_writes(backbone, mask, tmp_path):
    from peft import PeftModel

    done = recover(backbone, config(learning_rate=0.01), mask, ANN, "d")
    export_pruned(mask, BackboneConfig(path=str(backbone.path)), tmp_path / "exported")
    (tmp_path / "adapter").mkdir()
    for name, data in done.files.items():
        (tmp_path / "adapter" / name).write_bytes(data)
    assert set(done.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert str(backbone.path) not in done.files["adapter_config.json"].decode()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    tokens = torch.arange(5, 20)[None]
    before = plain(tokens).logits
    tuned = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert not torch.allclose(tuned(tokens).logits, before)

    merged = recover(backbone, config(learning_rate=0.01, form="merged"), mask, ANN, "d")
    (tmp_path / "merged").mkdir()
    for name, data in merged.files.items():
        (tmp_path / "merged" / name).write_bytes(data)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert json.loads(merged.files["config.json"])["intermediate_size"] == 32
    assert torch.allclose(whole(tokens).logits, tuned(tokens).logits, atol=1e-4)


def test_the_digest_is_of_what_decides_the_result():
    settings = RecoveryConfig()
    assert recovery_digest(settings, "a") == recovery_digest(RecoveryConfig(checkpoint_steps=3), "a")
    assert (
        len(
            {
                recovery_digest(settings, "a"),
                recovery_digest(settings, "b"),
                recovery_digest(RecoveryConfig(rank=2), "a"),
            }
        )
        == 3
    )


def test_a_mask_of_another_backbone_is_refused(backbone, mask):
    other = dataclasses.replace(mask, metadata=dataclasses.replace(mask.metadata, backbone_fingerprint="0" * 64))
    with pytest.raises(MaskError, match="use the backbone it was made for"):
        recover(backbone, config(), other, ANN, "d")
