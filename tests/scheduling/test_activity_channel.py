from persona_pruner import activity
from persona_pruner.activity import Activity, Count
from persona_pruner.scheduling.activity_channel import ActivityBoard, forward_activity


def test_the_board_keeps_the_last_word_of_every_process():
    board = ActivityBoard()
    board.put("one", Activity("loading the backbone"))
    board.put("one", Activity("", {"scoring": Count(4)}))
    board.put("two", Activity("loading the backbone"))
    assert board.read() == [Activity("", {"scoring": Count(4)}), Activity("loading the backbone")]


def test_without_ray_nothing_is_forwarded_and_nothing_fails():
    forward_activity()
    activity.count("scoring", 1)
