from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from persona_pruner.backbone.files import fingerprint, fingerprint_of, resolve
from persona_pruner.config.schema import BackboneConfig


def test_the_fingerprint_is_of_the_weights_however_they_are_split(tmp_path):
    path = save_tiny(tmp_path / "one")
    mark = fingerprint(path)
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "split", max_shard_size="20KB")
    assert len(list((tmp_path / "split").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "split") == mark
    weights = load_file(path / "model.safetensors")
    weights[min(weights)].view(-1)[0] += 1e-3
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    assert fingerprint(path) != mark


def test_weights_without_dimensions_enter_the_fingerprint(tmp_path):
    config = AutoConfig.for_model(
        "apertus", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert any(tensor.ndim == 0 for tensor in load_file(tmp_path / "model.safetensors").values())
    assert len(fingerprint(tmp_path)) == 64


def test_a_loaded_model_has_the_fingerprint_of_its_files(tmp_path):
    path = save_tiny(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert fingerprint_of(model) == fingerprint(path)
    model.config._name_or_path = "no/such/model"
    assert fingerprint_of(AutoModelForCausalLM.from_config(model.config)) is None


def test_a_local_directory_is_used_as_it_is(tmp_path):
    assert resolve(BackboneConfig(path=str(save_tiny(tmp_path)))) == tmp_path
