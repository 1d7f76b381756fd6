import io
import json

import pyarrow as pa
import pytest
from mask_examples import mask
from rich.console import Console

from persona_pruner.errors import ConfigError
from persona_pruner.evaluation.answers import SCHEMA
from persona_pruner.evaluation.summary import by_arm, failing, render, store_summary, stored_losses, summarize
from persona_pruner.masks.store import MaskStore
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


def answers(persona_id="ada", ranks=(1, 3), arm="own"):
    rows = [
        {"persona_id": persona_id, "arm": arm, "text": f"Aye {n}.", "ended": n == 0, "words": 2, "rank": rank,
         "repetition": 0.0, "own_loss": 1.0 + n, "similarity": 0.5}
        for n, rank in enumerate(ranks)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, SCHEMA)


LOSSES = {"ada": {"answers": {"own": 2.5, "unpruned": 2.0}}, "bo": {"conversations": {"own": 3.0}}}


def test_measures_are_means_over_the_answers_of_an_arm():
    ((arm, values),) = by_arm(answers()).items()
    assert arm == "own"
    assert values["ended"] == values["first"] == 0.5
    assert values["rank"] == 2
    assert values["own_loss"] == 1.5
    assert values["distinct_1"] == 3 / 4


def test_arms_keep_their_names_on_a_narrow_terminal():
    rows = pa.concat_tables([answers(arm="activation"), answers(arm="activation_generic")])
    console = Console(file=io.StringIO(), width=80)
    console.print(render([rows]))
    arms = [line.split()[0] for line in console.file.getvalue().splitlines()[2:]]
    assert arms == ["activation", "activation_generic"]


def test_a_persona_without_a_classifier_has_no_rank():
    values = by_arm(answers(ranks=(None, None)))["own"]
    assert values["rank"] is None
    assert values["first"] is None


def test_the_summary_has_a_row_for_whoever_was_asked_or_compared_and_says_who_passes():
    rows = {row["persona_id"]: row for row in summarize([answers()], LOSSES, ["rank<=2"]).to_pylist()}
    assert rows["ada"] | {"passes": 1, "answers": 2, "answers_loss": 2.5, "rank": 2.0} == rows["ada"]
    assert rows["bo"] | {"passes": 0, "answers": None, "conversations_loss": 3.0, "rank": None} == rows["bo"]
    with pytest.raises(ConfigError, match="judgement"):
        summarize([answers()], LOSSES, ["judgement>=75"])


def test_the_evaluations_columns_select_masks_and_those_not_evaluated_meet_no_condition(tmp_path):
    storage = open_storage(tmp_path)
    for persona_id in ("ada", "bo", "cy"):
        storage.put(keys.mask(persona_id), mask(persona_id).to_bytes())
    with pytest.raises(ConfigError, match="rank<=2"):
        MaskStore(tmp_path).where(["rank<=2"])
    store_summary(storage, summarize([answers("ada"), answers("cy", ranks=(5, 6))], {}, ["rank<=2"]))
    store = MaskStore(tmp_path)
    assert store.where(["rank<=2"]) == store.where(["passes==1"]) == ["ada"]
    assert store.where(["rank>2", "method==ste"]) == ["cy"]
    assert store.where(["ratio==0.6"]) == ["ada", "bo", "cy"]
    assert failing(store.table(), ["ended=0.5"], ["rank=2"]) == {
        "bo": ["ended not evaluated (ended=0.5)", "rank not evaluated (rank=2)"],
        "cy": ["rank 5.5 (rank=2)"],
    }


@pytest.mark.parametrize("bound", ["rank", "rank=x", "persona_id=3", "nobody=3"])
def test_a_bound_that_is_none_is_told_with_the_names_there_are(bound):
    with pytest.raises(ConfigError, match=r"NAME=NUMBER .*first"):
        failing(summarize([answers()], {}, []), [bound], [])


def test_losses_of_the_jobs_comparison_are_found_beside_everything_else(tmp_path):
    storage = open_storage(tmp_path)
    for persona_id, losses in LOSSES.items():
        storage.put(keys.evaluation(persona_id), json.dumps({"persona_id": persona_id, "losses": losses}).encode())
    storage.put(keys.global_mask("d"), b"")
    storage.put(keys.evaluation_rows("answers", "ada", "d"), b"")
    assert stored_losses(storage) == LOSSES
