"""The cost model against FLOP that are counted, and what it says of a plan."""

import pytest
import torch
from tiny_models import save_tiny, tiny, tiny_config
from torch.utils.flop_counter import FlopCounterMode

from persona_pruner.config.load import check_config
from persona_pruner.dataset import PersonaData, Row
from persona_pruner.learning.trainer import MaskTrainer
from persona_pruner.manifest import Persona
from persona_pruner.run.cost import GPUS, SHAPES, Todo, forecast, read_shape, scoring, training
from persona_pruner.synthesis.sensitivity import Sensitivity

WIDE = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32}
QUESTION = "What would you say about it?"  # 28 bytes and the template's two tokens behind it


def config_for(path, **values):
    base = tiny_config(path).model_dump()
    base["synthesis"] |= {"references": {"count": 2}, "tile_personas": 3, "select": {"k": 8}}
    base["synthesis"]["rewrite"]["max_new_tokens"] = 50
    base["learning"] |= {"steps": 4, "rows_per_step": 6}
    return check_config(base | values)


def test_flop_of_scoring_and_training_are_those_that_are_counted(tmp_path):
    backbone = tiny(tmp_path / "wide", **WIDE)
    config, shape = config_for(tmp_path / "wide"), read_shape(tmp_path / "wide")
    personas = [
        Persona(f"p{n}", f"Somebody who likes {thing} a lot, whatever it is") for n, thing in enumerate("abcdef")
    ]
    sensitivity = Sensitivity(backbone, config, [QUESTION] * 40, personas[:3])
    with FlopCounterMode(display=False) as counted:
        list(sensitivity.tile(personas[3:]))
    expected = 3 * scoring(config, shape, 70, 40).flop
    assert expected == pytest.approx(counted.get_total_flops(), rel=0.3)

    answer = "x" * 29  # with its end, the 30 tokens that the model takes for typical
    rows = tuple(Row(f"{QUESTION[:-2]}{n:02}", answer) for n in range(8))
    data = PersonaData("p3", personas[3].description, rows[:6], rows[6:], "sha")
    with FlopCounterMode(display=False) as counted:
        list(MaskTrainer(backbone, config).train([data], run_id="run"))
    assert training(config, shape, 70).flop == pytest.approx(counted.get_total_flops(), rel=0.35)


def test_parameters_are_counted_from_the_weights(tmp_path):
    path = save_tiny(tmp_path / "tiny")
    shape = read_shape(path)
    model = tiny(tmp_path / "tiny").model
    matrices = [p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2]
    assert (shape.blocks, shape.layers, shape.channels) == (sum(matrices), 3, 64)
    assert shape.head == model.lm_head.weight.numel()


def test_known_models_have_their_published_size():
    for name, billions in (("Llama-3.2-3B", 3.21), ("8B", 8.03), ("70B", 70.6)):
        shape = SHAPES[name]
        heads = 1 if name == "Llama-3.2-3B" else 2  # input and output embeddings are tied there
        assert (shape.blocks + heads * shape.head) / 1e9 == pytest.approx(billions, rel=0.01)


def test_twice_the_gpus_take_half_as_long_and_cost_the_same():
    todo = Todo(synthesize=1000, train=0, characters=800, questions=1000)

    def expect(gpus):
        config = check_config({"gpus": gpus, "backbone": {"dtype": "bfloat16"}})
        return forecast(config, SHAPES["8B"], todo, GPUS["h100"])

    few, many = expect(4), expect(8)
    assert many.hours == pytest.approx(few.hours / 2)
    assert many.gpu_hours == few.gpu_hours == pytest.approx(4 * few.hours)
    assert set(few.to_dict()) == {"tokens", "flop", "bytes", "gpu_hours", "hours", "dollars"}
    assert few.describe("h100")["GPU-hours"].endswith("dollars")


def test_shards_pay_for_gathering_each_others_weights():
    todo = Todo(synthesize=0, train=100, characters=800, questions=0)
    hours = [
        forecast(
            check_config({"backbone": {"dtype": "bfloat16"}, "groups": {"shards": shards}}),
            SHAPES["70B"],
            todo,
            GPUS["h100"],
        ).gpu_hours
        for shards in (1, 4)
    ]
    assert hours[1] > hours[0]


def test_nothing_left_costs_nothing():
    expected = forecast(check_config({}), SHAPES["8B"], Todo(0, 0, 800, 0), GPUS["a100"])
    assert (expected.tokens, expected.flop, expected.gpu_hours, expected.hours) == (0, 0, 0, 0)
    assert torch.isfinite(torch.tensor(expected.dollars))
