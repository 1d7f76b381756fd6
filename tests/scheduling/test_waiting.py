from persona_pruner.scheduling.waiting import WaitingJobs


def test_higher_priorities_first_then_in_order_of_arrival():
    waiting = WaitingJobs()
    for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5)):
        waiting.push(name, priority, not_before=0.0, now=1.0)
    assert waiting.pop(3, now=1.0) == ["b", "d", "a"]
    assert waiting.pop(3, now=1.0) == ["c"]
    assert waiting.pop(3, now=1.0) == []


def test_a_later_try_waits_until_it_is_due_and_holds_nobody_up():
    waiting = WaitingJobs()
    waiting.push("later", 9, not_before=10.0, now=1.0)
    waiting.push("now", 0, not_before=0.0, now=1.0)
    assert waiting.pop(2, now=1.0) == ["now"]
    assert len(waiting) == 1
    assert waiting.pop(2, now=9.9) == []
    assert waiting.pop(2, now=10.0) == ["later"]
