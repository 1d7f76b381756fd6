"""Against a stand-in for the hub, over real HTTP with huggingface_hub's own client (see hub_server.py)."""

import pytest
from hub_server import TOKEN, hub_server
from huggingface_hub import ModelCard, constants
from mask_examples import mask

pytest.importorskip("scipy", reason="the extra `report` is not installed")
from persona_pruner.errors import StorageError, UserError
from persona_pruner.evaluation.report.push import PUSHED, PushRequest, push
from persona_pruner.storage import keys
from persona_pruner.storage.open import open_storage


@pytest.fixture
def hub(monkeypatch):
    """As if HF_ENDPOINT had been set before huggingface_hub was imported."""
    with hub_server() as server:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def output(tmp_path):
    storage = open_storage(tmp_path / "out")
    for seed, persona_id in enumerate(("ada", "bo")):
        storage.put(keys.mask(persona_id), mask(persona_id, seed=seed).to_bytes())
    storage.put(keys.REPORT, b"<!doctype html>")
    return str(tmp_path / "out")


def test_a_repository_is_made_and_a_second_push_moves_what_has_changed(hub, output):
    made = push(PushRequest(output=output, to="hf://crew/masks", base_model="org/llama"))
    files = hub.files["crew/masks"]
    assert {*made.moved, PUSHED, ".gitattributes"} == set(files)
    assert files[keys.mask("ada")] == mask("ada", seed=0).to_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "org/llama"
    assert 'snapshot_download("crew/masks")' in card.content
    commits = len(hub.commits)
    assert push(PushRequest(output=output, to="hf://crew/masks", base_model="org/llama")).moved == []
    assert len(hub.commits) == commits
    open_storage(output).put(keys.mask("bo"), mask("bo", seed=9).to_bytes())
    push(PushRequest(output=output, to="hf://crew/masks", base_model="org/llama"))
    moved = {path for commit in hub.commits[commits:] for path in commit}
    assert {keys.mask("bo"), PUSHED} <= moved
    assert keys.mask("ada") not in moved


def test_a_card_that_others_have_written_there_is_left(hub, output):
    hub.files["crew/masks"] = {"README.md": b"of the web page"}
    with pytest.raises(UserError, match=r"^hf://crew/masks: README\.md would be overwritten"):
        push(PushRequest(output=output, to="hf://crew/masks"))
    assert hub.files["crew/masks"] == {"README.md": b"of the web page"}
    assert hub.commits == []


@pytest.mark.parametrize(
    ("to", "token", "message"),
    [
        ("hf://crew/masks", "hf_wrong", "^hf://crew/masks: the hub knows no token of yours.*HF_TOKEN$"),
        ("hf://others/masks", TOKEN, "^hf://others/masks: your token has no right to write there"),
        ("hf://masks", TOKEN, "write hf://owner/name"),
        ("hf://crew/ma sks", TOKEN, "write hf://owner/name"),
    ],
)
def test_without_a_token_or_rights_one_line_says_so(hub, output, monkeypatch, to, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=message) as caught:
        push(PushRequest(output=output, to=to))
    assert "\n" not in str(caught.value)
    assert hub.commits == []


def test_a_hub_that_cannot_be_reached_is_told(output, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(StorageError, match=r"^hf://crew/masks: the hub cannot be reached"):
        push(PushRequest(output=output, to="hf://crew/masks"))
