"""The crash campaign in short: a few kills of every command, drawn at random."""

import pytest

from benchmarks.crash_campaign import COMMANDS, Campaign, Kill, drawn_moments, scratch, summary


@pytest.fixture(scope="module")
def campaign(worlds, tmp_path_factory):
    return Campaign(tmp_path_factory.mktemp("campaign") / "c", worlds().folder)


def test_nothing_is_lost_by_kills_at_random_moments(campaign):
    kills = [
        campaign.kill(name, **moment)
        for name, moment in drawn_moments(campaign, 3 * len(COMMANDS), seed=1)
    ]
    found = [kill for kill in kills if kill.state or kill.lost]
    assert len(found) > len(COMMANDS)
    assert [kill for kill in found if kill.lost] == []
    assert {kill.command for kill in found} == {one.name for one in COMMANDS}


@pytest.mark.parametrize("name", ["update by f-learning", "export"])
def test_a_kill_at_the_last_step_is_after_and_at_the_first_before(campaign, name):
    first, last = (campaign.kill(name, step=step) for step in (1, campaign.steps[name]))
    assert (first.state, last.state) == ("before", "after")
    assert (first.lost, last.lost) == (None, None)


def test_the_campaign_sees_a_loss(campaign, monkeypatch):
    """A campaign that cannot fail would be worth nothing."""
    undo = campaign.commands["undo"]
    monkeypatch.setattr(undo, "before", ((), "another fingerprint"))
    kill = campaign.kill("undo", step=1)
    assert "neither before nor after" in kill.lost
    assert summary([kill, Kill("undo", True, 1, None, "before", 1, None)])["lost"] == 1


def test_the_campaign_sees_scratch(tmp_path):
    for name in (".lock", "ledger.jsonl", ".ledger.jsonl.1-abcdefgh", "partial"):
        (tmp_path / name).touch()
    assert len(scratch(tmp_path, 1)) == 2
