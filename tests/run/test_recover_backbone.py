import dataclasses
import json

import pytest
from mask_examples import mask
from tiny_models import save_tiny, tiny_config

from persona_pruner.backbone.files import fingerprint
from persona_pruner.backbone.load import load_backbone
from persona_pruner.config.load import check_config
from persona_pruner.config.schema import BackboneConfig
from persona_pruner.dataset import read_persona_data
from persona_pruner.errors import BackboneError, MaskError
from persona_pruner.evaluation.likelihood import heldout_loss
from persona_pruner.learning.shared_recovery import Recovery
from persona_pruner.manifest import Persona
from persona_pruner.masks.format import Mask
from persona_pruner.run.recover_backbone import recover_backbone
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage
from persona_pruner.synthesis.commit import DataRow, commit
from persona_pruner.synthesis.sources import Question, question_id

PERSONAS = [Persona("ada", "Ada, a pilot"), Persona("bo", "Bo, a baker"), Persona("cy", "Cy, who has no mask")]


@pytest.fixture
def output(tmp_path):
    """(configuration, storage) with rows and masks of the first two personas."""
    path = save_tiny(tmp_path / "first")
    config = check_config(
        {**tiny_config(path).model_dump(mode="json"), "synthesis": {"filter": {"min_answers": 2, "min_words": 1}}}
    )
    storage = open_storage(tmp_path / "out")
    questions = [Question(question_id(text), text, None) for text in (f"Question {n}?" for n in range(12))]
    for persona in PERSONAS[:2]:
        rows = [DataRow(q, 0.5, "ok", f"{persona.id} says {n}.") for n, q in enumerate(questions)]
        commit(config, storage, persona, rows, "tiny")
        made = mask(persona.id, channels=64, kept=32)
        metadata = dataclasses.replace(made.metadata, backbone_fingerprint=fingerprint(path))
        storage.put(keys.mask(persona.id), Mask(made.keep_LI, metadata).to_bytes())
    return config, storage


def test_the_mended_backbone_is_written_where_it_does_better(output, tmp_path):
    config, storage = output
    said = []
    recover_backbone(config, PERSONAS, storage, tmp_path / "mended", Recovery(steps=20), said.append)
    assert "under 2 masks" in said[0]
    assert "held-out answers under the masks" in said[-2]
    assert (tmp_path / "mended" / "config.json").is_file()
    with pytest.raises(BackboneError, match="not empty"):
        recover_backbone(config, PERSONAS, storage, tmp_path / "mended", Recovery(), said.append)


@pytest.mark.parametrize(
    ("personas", "reason"), [(PERSONAS[:2], "not better.*--rate than 900"), (PERSONAS[2:], "no mask")]
)
def test_nothing_is_written_where_it_does_not(output, tmp_path, personas, reason):
    config, storage = output
    recovery = Recovery(steps=3, rate=900, refit_rows=0)
    with pytest.raises(MaskError, match=reason):
        recover_backbone(config, personas, storage, tmp_path / "mended", recovery, lambda _: None)
    assert not (tmp_path / "mended").exists()


def test_the_part_of_the_change_is_kept_that_does_best_on_held_out_answers(output, tmp_path):
    config, storage = output
    said = []
    recover_backbone(config, PERSONAS, storage, tmp_path / "mended", Recovery(steps=20, foreign=0), said.append)
    tried = [float(line.split(" at ")[1].split()[0]) for line in said if "of the change" in line]
    before, after = (float(said[-2].split(word)[0].split()[-1]) for word in (" before", " after"))
    refitted, learned = tried[:3], tried[3:]
    assert len(learned) == 3
    assert after == min(tried) < min(refitted) < before
    data = [read_persona_data(storage, persona) for persona in PERSONAS[:2]]
    keeps = [Mask.from_bytes(storage.get(keys.mask(persona.id)), "").keep_LI for persona in PERSONAS[:2]]
    mended = load_backbone(BackboneConfig(path=str(tmp_path / "mended")), deepspeed=False)
    losses = [
        heldout_loss(mended, config, each.description, each.heldout, keep)
        for each, keep in zip(data, keeps, strict=True)
    ]
    assert sum(losses) / 2 == pytest.approx(after, abs=1e-3)


def test_foreign_rows_that_decide_what_is_kept_are_not_learned_from(output, tmp_path, monkeypatch):
    config, storage = output
    file = tmp_path / "others.jsonl"
    file.write_text("".join(json.dumps({"question": f"Q{n}?", "answer": f"Yes {n}."}) + "\n" for n in range(40)))
    settings = config.model_dump(mode="json")
    settings["learning"]["objective"]["generic_rows"] = str(file)
    config, learned, measured = check_config(settings), [], []

    def noted(backbone, config, masked, foreign, recovery, heldout, say):
        learned.extend(foreign)
        return heldout(), 0.0

    def loss(backbone, config, description, rows, keep):
        measured.append(rows)
        return 1.0

    monkeypatch.setattr("persona_pruner.run.recover_backbone.recover", noted)
    monkeypatch.setattr("persona_pruner.run.recover_backbone.heldout_loss", loss)
    recover_backbone(config, PERSONAS, storage, tmp_path / "mended", Recovery(), lambda _: None)
    for persona, rows in zip(PERSONAS, measured, strict=False):
        own = read_persona_data(storage, persona).heldout
        foreign = [row for row in rows if row not in own]
        assert set(own) < set(rows)
        assert len(foreign) == len(own)
        assert not set(foreign) & set(learned)
