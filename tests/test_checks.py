"""Checks raise at once, or late but surely: the first that does not hold, at the first look."""

import threading

import pytest
import torch

from amsdn.checks import Checks, insist

YES, NO = torch.tensor(True), torch.tensor(False)


def wrong(what: str) -> ValueError:
    return ValueError(what)


def test_a_check_raises_at_once_where_none_are_collected() -> None:
    insist(YES, lambda: wrong("fine"))
    with pytest.raises(ValueError, match="now"):
        insist(NO, lambda: wrong("now"))


def test_collected_checks_are_made_at_the_look_and_the_first_to_fail_speaks() -> None:
    checks = Checks()
    checks.look()
    with checks.collecting():
        for holds, what in ((YES, "fine"), (NO, "first"), (NO, "second")):
            insist(holds, lambda what=what: wrong(what))  # type: ignore[misc]
    assert len(checks) == 3
    with pytest.raises(ValueError, match="first"):
        checks.look()
    assert len(checks) == 0
    checks.look()


def test_collecting_ends_with_its_block_and_after_an_error_what_was_collected_stays() -> None:
    checks = Checks()

    def interrupted() -> None:
        with checks.collecting():
            insist(NO, lambda: wrong("kept"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(ValueError, match="now"):
        insist(NO, lambda: wrong("now"))
    with pytest.raises(ValueError, match="kept"):
        checks.look()


def test_collecting_is_a_matter_of_one_thread_and_of_the_innermost_block() -> None:
    outer, inner, raised = Checks(), Checks(), []

    def elsewhere() -> None:
        try:
            insist(NO, lambda: wrong("elsewhere"))
        except ValueError as e:
            raised.append(str(e))

    with outer.collecting():
        with inner.collecting():
            insist(YES, lambda: wrong("inner"))
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert raised == ["elsewhere"]
    assert (len(outer), len(inner)) == (0, 1)
