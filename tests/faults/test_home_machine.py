"""The home is what plain tensors in memory are, whatever is done in whatever order."""

import pytest
from home_machine import HomeMachine
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test


@pytest.fixture
def machine(worlds):
    return type("Here", (HomeMachine,), {"world": worlds().folder})


def test_a_home_never_leaves_its_reference(machine):
    machine.done.clear()
    short = settings(max_examples=6, stateful_step_count=12, deadline=None)
    run_state_machine_as_test(machine, settings=short)
    assert machine.done["update"] > 6
    assert len(machine.done) > 4


def test_the_reference_would_notice(machine, monkeypatch):
    """A home that does not take out what was undone is found."""
    from unwrite.ledger import Ledger

    def forgetful(self, at=None):
        return list(self.applied)

    run = machine()
    first = run.make()
    run.the_state_is_that_of_the_reference()
    monkeypatch.setattr(Ledger, "live", forgetful)
    run.the_state_is_that_of_the_reference()
    run.undo(first)
    with pytest.raises(AssertionError):
        run.the_state_is_that_of_the_reference()
    run.teardown()
