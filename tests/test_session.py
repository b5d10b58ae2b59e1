"""A home kept open: updates that wait for a decision, redo, and one worker that is never lost."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest

import unwrite
from unwrite.errors import (
    BadEdits,
    BadSetting,
    HomeBusy,
    HomeError,
    RequirementNotMet,
    UnwriteError,
    UpdateDiscarded,
)
from unwrite.files import only_writer
from unwrite.progress import AtMost
from unwrite.session import PATIENCE, Order, Progress, Session, Stopped

QUICK = unwrite.FullFT(lr=2e-3, epochs=60)


@dataclass(frozen=True)
class Endless:
    """A method that goes on until it is stopped."""

    name: ClassVar[str] = "endless"

    def delta(self, model, edits):
        with model.progress.stage("going on", 1000) as advance:
            while True:
                advance(0, "and on")
                time.sleep(0.001)


@dataclass(frozen=True)
class Broken:
    """A method with a bug."""

    name: ClassVar[str] = "broken"

    def delta(self, model, edits):
        return {}["nothing"]


@pytest.fixture(scope="module")
def made(worlds, tmp_path_factory):
    """A home with one update; tests copy it."""
    home = unwrite.open(tmp_path_factory.mktemp("made") / "home", base=worlds().folder)
    home.update(worlds().edits[:2], QUICK)
    return home


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made.folder, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def session(folder):
    session = Session(folder)
    yield session
    assert session.close(timeout=60)


@pytest.fixture
def order(worlds):
    return Order(worlds().edits[10:12], QUICK, why="a reason")


def until(session, *states):
    """Wait for the job to be in one of these states; returns it."""
    give_up = time.monotonic() + 120
    while session.job.state not in states:
        assert time.monotonic() < give_up, session.job
        time.sleep(0.005)
    return session.job


def reached(session, title):
    give_up = time.monotonic() + 120
    while not any(stage["title"] == title for stage in session.progress.as_json()):
        assert time.monotonic() < give_up and session.job.active, session.job
        time.sleep(0.002)


# ---- the home ------------------------------------------------------------------------------------


def test_who_declines_leaves_no_trace(folder, worlds, snapshot):
    home = unwrite.open(folder)
    before, asked = snapshot(folder), worlds().edits[10].prompt
    said = home.ask(asked)
    seen = []
    with pytest.raises(UpdateDiscarded, match="as it was before"):
        home.update(worlds().edits[10:12], QUICK, confirm=lambda update: seen.append(update))
    assert snapshot(folder) == before
    assert home.ask(asked) == said
    assert home.verify() == []
    assert seen[0].committed is False
    assert seen[0].after["reliability"].exact == 1.0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_error_while_confirming_leaves_no_trace(folder, worlds, snapshot, error):
    def fail(update):
        raise error

    before = snapshot(folder)
    with pytest.raises(error):
        unwrite.open(folder).update(worlds().edits[10:12], QUICK, confirm=fail)
    assert snapshot(folder) == before


def test_a_missed_requirement_is_not_asked_about(folder, worlds):
    asked = []
    with pytest.raises(RequirementNotMet):
        unwrite.open(folder).update(
            worlds().edits[10:12], QUICK, require=["locality>1"], confirm=asked.append
        )
    assert asked == []


def test_the_candidate_answers_and_is_what_is_committed(folder, worlds):
    """Asked in between, in any order, the states stay apart; what is committed is what answered."""
    home, edit = unwrite.open(folder), worlds().edits[10]
    heard = {}

    def look(update):
        heard["pair"] = home.before_and_after(edit.prompt, update.id)
        heard["base"] = home.ask(edit.prompt, at="base")
        heard["candidate"] = home.ask(edit.prompt, at=update.id)
        heard["now"] = home.ask(edit.prompt)
        return True

    done = home.update([edit], QUICK, confirm=look)
    assert heard["pair"] == (heard["now"], heard["candidate"])
    assert heard["now"].strip() == edit.old
    assert heard["candidate"].strip() == edit.new
    assert home.ask(edit.prompt) == unwrite.open(folder).ask(edit.prompt) == heard["candidate"]
    assert home.fingerprint(home.ledger.live()) == done.fingerprint
    assert home.verify() == []


def test_a_candidate_is_known_only_while_it_waits(folder, worlds):
    home, names = unwrite.open(folder), []
    with pytest.raises(UpdateDiscarded):
        home.update(worlds().edits[10:12], QUICK, confirm=lambda one: names.append(one.id))
    for call in (home.ask, home.before_and_after):
        with pytest.raises(HomeError, match="no update"):
            call("ada works as a", **{"at" if call == home.ask else "update": names[0]})


def test_before_and_after_are_the_states_around_an_update(folder, worlds):
    """Also when something was undone just before it, and when it is undone itself."""
    home, (first, edit) = unwrite.open(folder), (worlds().edits[0], worlds().edits[10])
    (earlier,) = home.ledger.live()
    home.undo(earlier)
    later = home.update([edit], QUICK).id
    assert home.before_and_after(edit.prompt, later) == (edit.old, edit.new)
    assert home.before_and_after(first.prompt, later)[0] == first.old
    assert home.before_and_after(first.prompt, earlier) == (first.old, first.new)
    home.undo(later)
    assert home.before_and_after(edit.prompt, later) == (edit.old, edit.new)
    with pytest.raises(HomeError, match="not the id"):
        home.before_and_after(edit.prompt, "base")
    with pytest.raises(BadEdits, match="empty"):
        home.before_and_after(" ", later)


def test_redo_gives_the_bits_back(folder):
    home = unwrite.open(folder)
    (update,) = home.ledger.live()
    fingerprint = home.fingerprint([update])
    assert home.undo(update).fingerprint == home.base.fingerprint != fingerprint
    again = home.redo(update, why="after all")
    assert again.fingerprint == fingerprint
    assert again.id != update
    assert again.method == {"name": "redo", "of": update}
    assert again.after == home_scores(home, update)
    assert home.ledger.live() == [again.id]
    assert home.verify() == []
    with pytest.raises(HomeError, match="is live"):
        home.redo(again.id)
    with pytest.raises(HomeError, match="no update"):
        home.redo("u-00000000")
    home.undo(again.id)
    assert home.redo(again.id).fingerprint == fingerprint, "a redo can be redone"


def home_scores(home, update):
    from unwrite.scores import from_json

    return from_json(home.show(update)["scores"]["after"])


def test_a_damaged_change_is_not_redone(folder, snapshot):
    home = unwrite.open(folder)
    (update,) = home.ledger.live()
    home.undo(update)
    shard = next((folder / "updates" / update / "delta").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    before = snapshot(folder)
    with pytest.raises(UnwriteError, match="damaged"):
        unwrite.open(folder).redo(update)
    assert snapshot(folder) == before


# ---- the session ---------------------------------------------------------------------------------


def test_an_update_waits_answers_and_is_committed(session, order):
    edit = order.edits[0]
    job = session.update(order)
    until(session, "waiting")
    result = job.result
    assert result["committed"] is False
    assert {one["verdict"] for one in result["answers"][-2:]} <= {"right", "same"}
    asked = session.ask(edit.prompt, result["id"]).result(60)
    assert asked == [
        {"label": "Now", "text": edit.old},
        {"label": "With this change", "text": edit.new},
    ]
    assert session.ask(edit.prompt).result(60) == [{"label": "Now", "text": edit.old}]
    assert len(session.state()["updates"]) == 1, "not in the ledger yet"
    session.decide(job.number, commit=True)
    assert until(session, "done", "failed").error is None
    state = session.state()
    assert state["updates"][0]["id"] == result["id"] == job.result["id"]
    assert state["updates"][0]["why"] == "a reason"
    assert job.result["committed"] is True
    assert job.result["answers"] == result["answers"]
    assert session.ask(edit.prompt).result(60)[0]["text"] == edit.new


@pytest.mark.parametrize("how", ["decide", "stop"])
def test_a_candidate_is_discarded(session, order, folder, snapshot, how):
    before = snapshot(folder)
    job = session.update(order)
    until(session, "waiting")
    if how == "stop":
        session.stop(job.number)
    else:
        session.decide(job.number, commit=False)
    assert "discarded" in until(session, "dropped", "done").error
    assert snapshot(folder) == before
    assert session.ask(order.edits[0].prompt).result(60)[0]["text"] == order.edits[0].old


def test_an_update_that_runs_is_stopped(session, order, folder, snapshot):
    before = snapshot(folder)
    job = session.update(Order(order.edits, Endless()))
    reached(session, "going on")
    assert session.state()["job"]["stages"][0]["remark"] == "and on"
    for refused in (
        lambda: session.ask("x"),
        lambda: session.plan(order),
        lambda: session.update(order),
        lambda: session.undo("u-00000000"),
        session.verify,
    ):
        with pytest.raises(HomeBusy, match="update"):
            refused()
    session.stop(job.number)
    assert "Stopped" in until(session, "dropped", "done").error
    assert snapshot(folder) == before
    session.update(order)
    assert until(session, "waiting", "failed").state == "waiting", "the next one is not stopped"
    with pytest.raises(HomeError, match="over"):
        session.stop(job.number)


@pytest.mark.parametrize("state", ["running", "waiting"])
def test_closing_leaves_the_home_as_it_was(folder, order, snapshot, state):
    before = snapshot(folder)
    session = Session(folder)
    session.update(Order(order.edits, Endless() if state == "running" else QUICK))
    if state == "running":
        reached(session, "going on")
    until(session, state)
    assert session.close(timeout=60)
    assert snapshot(folder) == before
    with only_writer(folder):
        pass  # nobody holds it any more


def test_another_writer_is_told_of(session, order, folder, snapshot):
    """In both directions: a home that is busy, and a candidate that keeps others out."""
    before = snapshot(folder)
    with only_writer(folder):
        session.update(order)
        assert "Another process is changing" in until(session, "failed", "waiting").error
    assert snapshot(folder) == before
    job = session.update(order)
    until(session, "waiting")
    with pytest.raises(HomeBusy):
        unwrite.open(folder).update(order.edits, QUICK)
    session.decide(job.number, commit=True)
    until(session, "done")


def test_a_missed_requirement_shows_what_was_measured(session, order, folder, snapshot):
    before = snapshot(folder)
    session.update(Order(order.edits, QUICK, require=["locality>1"]))
    job = until(session, "failed", "waiting")
    assert "Nothing was committed: locality" in job.error
    assert job.result["rows"][0][0] == "reliability"
    assert snapshot(folder) == before
    with pytest.raises(BadSetting, match="cannot be read"):
        Order(order.edits, QUICK, require=["nonsense"])


def test_a_bug_ends_the_job_and_not_the_worker(session, order, folder, snapshot, caplog):
    before = snapshot(folder)
    session.update(Order(order.edits, Broken()))
    assert "by a bug" in until(session, "failed", "waiting").error
    assert "KeyError" in caplog.text
    assert snapshot(folder) == before
    assert session.ask("ada works as a").result(60)


def test_undo_redo_and_verify(session, folder):
    (update,) = session.state()["updates"]
    fingerprint = session.state()["fingerprint"]
    session.undo(update["id"])
    assert until(session, "done", "failed").result["at_base"] is True
    assert session.state()["updates"][0]["live"] is False
    session.redo(update["id"])
    assert until(session, "done", "failed").error is None
    assert session.state()["fingerprint"] == fingerprint
    session.verify()
    assert until(session, "done", "failed").result == {"problems": []}
    session.undo("u-00000000")
    assert "no update" in until(session, "done", "failed").error
    (folder / "updates" / update["id"] / "scores.json").unlink()
    session.verify()
    assert "missing" in until(session, "done", "failed").result["problems"][0]


def test_answers_say_which_state_they_are_of(session, worlds):
    edit = worlds().edits[0]
    (update,) = session.home.ledger.live()

    def labels():
        return [one["label"] for one in session.ask(edit.prompt, update).result(60)]

    assert labels() == [f"Before {update}", f"After {update} (as now)"]
    session.undo(update)
    until(session, "done")
    assert labels() == [f"Before {update} (as now)", f"After {update}"]
    session.update(Order([worlds().edits[10]], QUICK))
    session.decide(until(session, "waiting").number, commit=True)
    until(session, "done")
    assert labels() == [f"Before {update}", f"After {update}", "Now"]


def test_a_plan_changes_nothing(session, order, folder, snapshot):
    before = snapshot(folder)
    plan = session.plan(order).result(60)
    assert dict(plan["rows"])["edits"].startswith("2 (")
    assert snapshot(folder) == before
    assert session.job is None


def test_decisions_that_nobody_asked_for(session, order):
    with pytest.raises(HomeError, match="over"):
        session.decide(1, commit=True)
    job = session.update(order)
    until(session, "waiting")
    with pytest.raises(HomeError, match="over"):
        session.decide(job.number + 1, commit=True)
    session.decide(job.number, commit=False)
    session.decide(job.number, commit=True) if job.state == "waiting" else None
    assert until(session, "dropped", "done").state == "dropped", "the first decision counts"


def test_too_many_questions_are_refused(session):
    hold = threading.Event()
    session._enqueue(lambda: hold.wait(60))
    try:
        with pytest.raises(HomeBusy, match="Too many"):
            for _ in range(PATIENCE + 2):
                session.ask("ada works as a")
    finally:
        hold.set()


def test_errors_of_questions_come_to_who_asked(session):
    with pytest.raises(BadEdits, match="empty"):
        session.ask(" ").result(60)
    with pytest.raises(HomeError, match="no update"):
        session.ask("ada works as a", "u-00000000").result(60)


def test_what_is_no_home_has_no_session(tmp_path):
    with pytest.raises(HomeError, match="not a model home"):
        Session(tmp_path / "nothing")


def test_progress_is_seen_and_stopped():
    progress, heard = Progress(), []
    progress.hears = heard.append
    with progress.stage("outer", AtMost(4)) as outer, progress.stage("inner", 2) as inner:
        outer(1, "")
        inner(1, "\x1b[31mred")
        seen = progress.as_json()
        assert [(one["title"], one["done"], one["total"]) for one in seen] == [
            ("outer", 1, 4),
            ("inner", 1, 2),
        ]
        assert seen[1]["remark"] == "[U+001B][31mred"
        assert seen[0]["seconds_left"] >= 0
        assert [one["at_most"] for one in seen] == [True, False]
        progress.say("one thing")
        progress.stop()
        for report in (lambda: outer(1, ""), lambda: progress.say("more")):
            with pytest.raises(Stopped):
                report()
    assert progress.as_json() == []
    assert heard == ["one thing"]
    with pytest.raises(Stopped), progress.stage("another", 1):
        pass
    progress.go_on()
    progress.say("on")
    assert heard == ["one thing", "on"]
