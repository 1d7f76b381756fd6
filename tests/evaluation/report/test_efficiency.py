import pytest
import torch
from tiny_models import save_tiny
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from persona_pruner.errors import BackboneError
from persona_pruner.evaluation.report.efficiency import backbone_costs, efficiency_rows


def counted(directory, **changes):
    config = AutoConfig.from_pretrained(directory, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long), use_cache=False)
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops()


def test_what_is_left_is_what_the_smaller_architecture_has(tmp_path):
    save_tiny(tmp_path / "tiny")
    costs = backbone_costs(str(tmp_path / "tiny"))
    assert (costs.parameters, costs.flops) == counted(tmp_path / "tiny")
    width = AutoConfig.from_pretrained(tmp_path / "tiny").intermediate_size
    assert costs.pruned(0.5) == counted(tmp_path / "tiny", intermediate_size=width // 2)
    assert costs.flops == pytest.approx(2 * costs.parameters, rel=0.5)


def test_rows_are_means_over_personas(tmp_path):
    save_tiny(tmp_path / "tiny")
    costs = backbone_costs(str(tmp_path / "tiny"))
    rows = {row.name.split(",")[0]: row for row in efficiency_rows(costs, [0.25, 0.75], [100, 300])}
    assert rows["parameters"].pruned == costs.pruned(0.5)[0]
    assert rows["FFN channels"].pruned == 0.5 * costs.ffn_channels
    many = rows["bytes of 2 personas: a checkpoint each"]
    assert (many.unpruned, many.pruned) == (4 * costs.pruned(0.5)[0], 2 * costs.parameters + 400)


def test_a_backbone_that_is_none_is_told(tmp_path):
    with pytest.raises(BackboneError, match="nowhere"):
        backbone_costs(str(tmp_path / "nowhere"))
