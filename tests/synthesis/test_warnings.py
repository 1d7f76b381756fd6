from persona_pruner.config.load import check_config
from persona_pruner.synthesis.answering import SynthesisResult
from persona_pruner.synthesis.warnings import FewRows, foreign_rewriter


def test_distillation_with_another_models_answers_is_warned_of():
    def warned(backend, cross_entropy, distillation):
        objective = {"cross_entropy": cross_entropy, "distillation": distillation}
        tree = {"synthesis": {"rewrite": {"backend": backend}}, "learning": {"objective": objective}}
        return foreign_rewriter(check_config(tree)) is not None

    assert warned("openai", 0, 1)
    assert warned("none", 1, 0.5)
    assert not warned("self", 0, 1)
    assert not warned("openai", 1, 0)


def test_personas_with_few_rows_are_told_in_one_line():
    few = FewRows()
    for name, usable in (("ada", 149), ("bo", 43), ("cy", 150)):
        few.add(SynthesisResult(name, usable=usable))
    few.add(SynthesisResult("dee", ("few_answers", "0 usable answers")))
    assert few.message().startswith("2 personas have fewer than 150 usable answers (fewest: bo, 43)")
    assert FewRows().message() is None
