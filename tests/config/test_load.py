import pytest

from persona_pruner.config.load import load_config
from persona_pruner.config.schema import RunConfig, Section
from persona_pruner.errors import ConfigError


def load(tmp_path, text, *overrides):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return load_config(file, overrides)


def fault(tmp_path, text, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("learning: {ratio: 0}", "learning.ratio = 0"),
        ("learning: {ratio: 1}", "learning.ratio = 1"),
        ("learning: {ratio: half}", "learning.ratio = 'half'"),
        ("learning: {ratio: .nan}", "learning.ratio = nan"),
        ("learning: {stepz: 3}", "unknown key learning.stepz; did you mean learning.steps?"),
        ("learnin: {}", "unknown key learnin; did you mean learning?"),
        ("learning: {steps: many}", "learning.steps = 'many'"),
        ("learning:", "learning = None: must be a mapping of settings"),
        ("synthesis: {sources: 3}", "synthesis.sources = 3: must be a list"),
        ("synthesis: {sources: [{weight: 2}]}", "synthesis.sources.0.path: is missing"),
        ('backbone: {path: "a\\0b"}', "null byte"),
        ("groups: {min: 3, max: 1}", "groups: max = 1 is below min = 3"),
        ("learning: {objective: {cross_entropy: 0, distillation: 0}}", "one must be above 0"),
        ("prompt: {system: hello}", "must contain {persona}"),
        ("a: 1\n\tb: 2", "indent with spaces"),
        ("- 1", "must be a mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_setting_is_told_with_file_value_and_remedy(tmp_path, text, said):
    message = fault(tmp_path, text)
    assert said in message
    assert str(tmp_path / "run.yaml") in message
    assert "Traceback" not in message


@pytest.mark.parametrize("ratio", ["0", "1", "half", ".nan", "[1]"])
def test_one_bad_value_is_one_line(tmp_path, ratio):
    (line,) = fault(tmp_path, f"learning: {{ratio: {ratio}}}").splitlines()
    assert line.endswith("or must be 'auto'")


def test_all_faults_come_in_one_go(tmp_path):
    lines = fault(tmp_path, "learning: {ratio: 0, steps: x, stepz: 1}\ngroups: {min: 0}").splitlines()
    assert len(lines) == 4


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "no.yaml")


def test_override_wins_and_is_checked(tmp_path):
    assert load(tmp_path, "learning: {ratio: 0.5}", "learning.ratio=0.25").learning.ratio == 0.25
    assert load(tmp_path, "", "learning.ratio=auto").learning.ratio == "auto"
    assert "learning.steps = 0" in fault(tmp_path, "", "learning.steps=0")
    assert "must look like" in fault(tmp_path, "", "learning.steps")


def test_paths_in_a_file_count_from_its_directory(tmp_path, monkeypatch):
    (tmp_path / "there" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there" / "run.yaml").write_text("backbone: {path: model}")
    assert load_config("there/run.yaml").backbone.path == "there/model"


def test_every_setting_is_documented():
    def undocumented(section, prefix=""):
        for name, field in section.model_fields.items():
            if isinstance(field.default, Section):
                yield from undocumented(type(field.default), f"{prefix}{name}.")
            elif not field.description and name not in ("ratios", "inits"):
                yield prefix + name

    assert list(undocumented(RunConfig)) == []
