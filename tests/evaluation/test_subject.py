import pytest
from evaluated_run import make_run
from test_answers import task

from persona_pruner.errors import MaskError
from persona_pruner.evaluation.baselines import Baselines
from persona_pruner.evaluation.subject import ARMS, read_subject
from persona_pruner.storage import keys


def test_a_subject_has_the_arms_that_there_are_in_their_order(tmp_path):
    backbone, config, storage = make_run(tmp_path, baselines=["random", "activation", "magnitude"])
    subject = read_subject(Baselines(backbone, config), storage, task())
    # There are no rows of ann, so nothing is known of its activations.
    assert [arm.name for arm in subject.arms] == ["unpruned", "own", "global", "other", "magnitude", "random"]
    assert [arm.name for arm in subject.arms] == sorted((arm.name for arm in subject.arms), key=ARMS.index)
    kept = subject.arms[1].keep_LI.sum(1)
    assert all((arm.keep_LI.sum(1) == kept).all() for arm in subject.arms[1:])
    assert len(subject.others) == 2


def test_a_mask_of_another_backbone_is_told(tmp_path):
    backbone, config, storage = make_run(tmp_path)
    backbone.fingerprint = "0" * 64
    with pytest.raises(MaskError, match=keys.mask("ann")):
        read_subject(Baselines(backbone, config), storage, task())
