import json
import pickle

import pytest
import torch
from mask_examples import mask

from persona_pruner.errors import MaskError
from persona_pruner.masks.indices import load_keep_indices

INDICES = torch.stack(mask().keep_indices())


@pytest.mark.parametrize(
    "content",
    [
        INDICES,
        INDICES[None],
        INDICES.int(),
        INDICES.tolist(),
        [INDICES.tolist()],
        list(INDICES),
        {"topk_indices": INDICES},
        {"topk_indices": INDICES[None].int(), "ratio": 0.6},
    ],
    ids=["tensor", "batched", "int32", "list", "nested list", "list of tensors", "dictionary", "batched dictionary"],
)
@pytest.mark.parametrize("form", ["pt", "json"])
def test_every_published_form_is_read(tmp_path, content, form):
    file = tmp_path / f"a.{form}"
    if form == "json":
        file.write_text(json.dumps(content, default=lambda tensor: tensor.tolist()))
    else:
        torch.save(content, file)
    assert torch.equal(load_keep_indices(file, 100), mask().keep_LI)


def test_layers_may_differ_and_one_layer_is_a_model_too(tmp_path):
    (tmp_path / "a.json").write_text("[[0, 2], [1]]")
    assert load_keep_indices(tmp_path / "a.json", 3).tolist() == [[True, False, True], [False, True, False]]
    torch.save(torch.tensor([[0, 2]]), tmp_path / "a.pt")
    assert load_keep_indices(tmp_path / "a.pt", 3).tolist() == [[True, False, True]]


@pytest.mark.parametrize(
    "content",
    [
        torch.ones(2, 3),
        torch.tensor(3),
        torch.tensor([1, 2]),
        torch.zeros(2, 1, 1, 1, dtype=torch.int64),
        torch.zeros(2, 2, 2, dtype=torch.int64),
        {"a": 1},
        {"topk_indices": None},
        [],
        [[True]],
        ["ab"],
        3,
        torch.tensor([[1, 1]]),
        torch.tensor([[100]]),
        torch.tensor([[-1]]),
    ],
    ids=str,
)
def test_bad_index_files_are_refused_in_one_line(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(MaskError, match=r"a\.pt: ") as caught:
        load_keep_indices(tmp_path / "a.pt", 100)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"[1, ", b"{", b"[" * 100_000, b"", b"PK\3\4", b"\x80\x04."])
def test_broken_files_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(MaskError, match=r"a\.pt: not an index file: ") as caught:
        load_keep_indices(tmp_path / "a.pt", 100)
    assert "\n" not in str(caught.value)
    with pytest.raises(MaskError, match="No such file"):
        load_keep_indices(tmp_path / "no.pt", 100)


def test_a_file_that_would_run_code_is_refused_and_nobody_is_told_to_trust_it(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    for number, write in enumerate((lambda f: f.write_bytes(pickle.dumps(Evil())), lambda f: torch.save(Evil(), f))):
        file = tmp_path / f"{number}.pt"
        write(file)
        with pytest.raises(MaskError, match="not an index file") as caught:
            load_keep_indices(file, 100)
        assert "weights_only" not in str(caught.value)
        assert "ran" not in capsys.readouterr().out
