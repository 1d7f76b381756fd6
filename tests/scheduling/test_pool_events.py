from persona_pruner.scheduling.pool_events import CallDone, GroupCall


def test_two_calls_with_the_same_argument_are_two_calls():
    one, other = (GroupCall("train", ["ada"], ["ada"]) for _ in range(2))
    assert one != other
    assert CallDone(one, 1) != CallDone(other, 1)
