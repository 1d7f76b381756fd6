"""The tiled scores equal the pairwise formula as published."""

import pytest
import tiny_models
import torch

from persona_pruner.backbone.prompts import persona_prefix, question_suffix
from persona_pruner.config.load import check_config
from persona_pruner.manifest import Persona
from persona_pruner.synthesis.select import select_questions
from persona_pruner.synthesis.sensitivity import Sensitivity, choose_references
from persona_pruner.synthesis.sources import Question, question_id

PERSONAS = [Persona(f"p{n}", f"A {'very ' * n}old person who likes {thing}") for n, thing in enumerate("abcdef")]
QUESTIONS = ["Why?", "What do you do in the morning, when nobody looks?", "3 + 4?", "Who are you", "Tell " * 9 + "me."]


def config(**synthesis):
    return check_config(
        {"backbone": {"path": "x"}, "synthesis": {"references": {"count": 3}, "tile_questions": 2, **synthesis}}
    )


def pairwise(backbone, settings, question, target, references):
    """s(q; P*), every prompt run whole and alone."""

    def states(persona):
        prompt = settings.prompt
        ids = persona_prefix(backbone.tokenizer, prompt, persona.description)
        ids = ids + question_suffix(backbone.tokenizer, prompt, persona.description, question)
        kept = []
        layers = next(m for m in backbone.model.modules() if isinstance(m, torch.nn.ModuleList))
        first, last = settings.synthesis.layers or (0, len(layers) - 1)
        hooks = [
            layer.register_forward_hook(
                lambda m, i, out: kept.append((out if isinstance(out, torch.Tensor) else out[0])[0, -1])
            )
            for layer in layers[first : last + 1]
        ]
        with torch.no_grad():
            backbone.model(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        return kept

    own = states(target)
    distances = [
        1 - torch.cosine_similarity(h, other, dim=0)
        for reference in references
        for h, other in zip(own, states(reference), strict=True)
    ]
    return torch.stack(distances).mean().item()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("layers", [None, (1, 2)])
def test_tiles_equal_the_pairwise_formula(tmp_path, family, layers):
    backbone = tiny_models.tiny(tmp_path, family)
    settings = config(layers=layers)
    candidates = choose_references(PERSONAS, 3, 0)
    scored = dict(
        (persona.id, scores)
        for persona, scores in Sensitivity(backbone, settings, QUESTIONS, candidates).tile(PERSONAS)
    )
    for target in PERSONAS:
        references = [p for p in candidates if p.id != target.id][:3]
        assert len(references) == 3
        for number, question in enumerate(QUESTIONS):
            expected = pairwise(backbone, settings, question, target, references)
            assert scored[target.id][number].item() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_blocks_4_to_23_are_the_published_hidden_states_5_to_24(tmp_path):
    """The published code: the mean over `hidden_states[5:25]` and over the references of 1 - cos at the last token."""
    backbone = tiny_models.tiny(tmp_path, num_hidden_layers=26)
    settings = config(layers=(4, 23))
    references = choose_references(PERSONAS, 3, 0)

    def published(persona, question):
        ids = persona_prefix(backbone.tokenizer, settings.prompt, persona.description)
        ids = ids + question_suffix(backbone.tokenizer, settings.prompt, persona.description, question)
        out = backbone.model(torch.tensor([ids]), output_hidden_states=True)
        return torch.stack(out.hidden_states[5:25])[:, 0, -1].double()

    scores = _scored(backbone, settings, QUESTIONS, references, PERSONAS[:1])["p0"]
    others = [p for p in references if p.id != "p0"][:3]
    for number, question in enumerate(QUESTIONS[:3]):
        own = published(PERSONAS[0], question)
        distances = [1 - torch.cosine_similarity(own, published(other, question), dim=-1) for other in others]
        assert scores[number].item() == pytest.approx(torch.stack(distances).mean().item(), abs=1e-6)


def test_scores_do_not_depend_on_who_is_in_the_tile(tmp_path):
    backbone = tiny_models.tiny(tmp_path)
    sensitivity = Sensitivity(backbone, config(), QUESTIONS, choose_references(PERSONAS, 3, 0))
    together = {persona.id: scores for persona, scores in sensitivity.tile(PERSONAS)}
    for persona in PERSONAS:
        ((_, alone),) = sensitivity.tile([persona])
        assert torch.equal(alone, together[persona.id])


def test_references_are_seeded_and_do_not_depend_on_order():
    drawn = choose_references(PERSONAS, 3, 1)
    assert drawn == choose_references(PERSONAS[::-1], 3, 1)
    assert any(drawn != choose_references(PERSONAS, 3, seed) for seed in range(2, 9))


def test_prompts_beyond_the_limit_are_left_out_and_the_rest_is_scored_as_without_them(tmp_path):
    backbone = tiny_models.tiny(tmp_path)
    references = choose_references(PERSONAS, 3, 0)
    plain = _scored(backbone, config(), QUESTIONS, references, PERSONAS)
    endless = Persona("endless", "A talker. " * 400)
    questions = [*QUESTIONS, "word " * 20_000]
    found = _scored(backbone, config(max_prompt_tokens=800), questions, [endless, *references], [endless, *PERSONAS])
    assert found["endless"].cause == "prompt_too_long"
    assert "synthesis.max_prompt_tokens is 800" in str(found["endless"])
    for persona in PERSONAS:
        assert found[persona.id][-1].isnan()
        assert torch.allclose(found[persona.id][:-1], plain[persona.id], atol=1e-6)
    chosen = select_questions(config().synthesis.select, _pool(questions), found["p0"])
    assert sorted(chosen) == list(range(len(QUESTIONS)))


def test_a_template_that_puts_the_persona_behind_the_question_is_scored_by_the_formula_too(tmp_path):
    backbone = tiny_models.tiny(tmp_path)
    backbone.tokenizer.chat_template = (
        "{{ messages[-1]['content'] }} is asked to {{ messages[0]['content'] }}: answer {{ messages[-1]['content'] }}"
    )
    references = choose_references(PERSONAS, 3, 0)
    found = _scored(backbone, config(), QUESTIONS, references, PERSONAS)
    others = [p for p in references if p.id != "p1"][:3]
    for number, question in enumerate(QUESTIONS):
        expected = pairwise(backbone, config(), question, PERSONAS[1], others)
        assert found["p1"][number].item() == pytest.approx(expected, abs=1e-5)


def _scored(backbone, settings, questions, references, personas):
    return {p.id: scores for p, scores in Sensitivity(backbone, settings, questions, references).tile(personas)}


def _pool(questions):
    return [Question(question_id(text), text, "") for text in questions]
