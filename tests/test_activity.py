from persona_pruner import activity
from persona_pruner.activity import Count


def test_phases_come_and_go_and_counts_add_up():
    before = activity.current().counts.get("scoring", Count())
    activity.begin(activity.LOADING)
    activity.count("scoring", 3, 10)
    activity.count("scoring", 2)
    assert activity.current().phase == "loading the backbone"
    activity.begin("")
    assert activity.current().phase == ""
    assert activity.current().counts["scoring"] == before + Count(5, 10)


def test_what_was_read_does_not_change_afterwards():
    read = activity.current()
    activity.count("answering", 1)
    assert activity.current() is not read
    assert activity.current().counts != read.counts
