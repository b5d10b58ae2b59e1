"""A long history, in short: forty updates, some undone, and every verb still tells the truth."""

import random

import unwrite
from benchmarks.load import Nudge, grow, growth, measured


def test_a_long_history_stays_sound_and_ends_at_the_base(worlds, tmp_path):
    home = unwrite.open(tmp_path / "home", base=worlds().folder)
    grow(home, random.Random(0), 40)
    again = unwrite.open(home.folder)
    assert again.verify() == []
    assert len(again.history()) == len(again.ledger.entries) > 45
    point = measured(home.folder)
    assert point["live"] == len(again.ledger.live()) < 40
    assert point["lines"] == len(again.ledger.entries)
    for update in again.ledger.live():
        again.undo(update, recheck=False)
    assert again.fingerprint([]) == again.base.fingerprint
    assert Nudge(1) != Nudge(2)


def test_an_append_reads_the_ledger_a_bounded_number_of_times(worlds, tmp_path, monkeypatch):
    """However long the history is: else a thousand updates would take quadratic time."""
    from unwrite.ledger import Ledger

    home = unwrite.open(tmp_path / "home", base=worlds().folder)
    counts, real = [], Ledger.open

    def counted(path):
        counts[-1] += 1
        return real(path)

    monkeypatch.setattr(Ledger, "open", counted)
    for number in range(6):
        counts.append(0)
        home.update(worlds().edits[number : number + 1], Nudge(number))
    assert counts[1] == counts[-1] < 10


def test_growth_tells_linear_from_quadratic():
    def points(power):
        return [{"lines": n, "seconds": {"open": 0.1 + n**power}} for n in range(100, 1100, 100)]

    assert abs(growth(points(1))["open"] - 1) < 1e-2
    assert abs(growth(points(2))["open"] - 2) < 1e-2
