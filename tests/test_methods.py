"""Methods by name: words from the command line become typed fields, or a sentence."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from unwrite import methods
from unwrite.errors import BadSetting
from unwrite.methods.full_ft import FullFT


@dataclass(frozen=True)
class Outer:
    """A method that holds another."""

    strength: float | None = None
    flag: bool = False
    tuner: FullFT = field(default_factory=lambda: FullFT(lr=1e-3))
    name: ClassVar[str] = "outer"

    def delta(self, model, edits):
        return self.tuner.delta(model, edits)


@pytest.fixture
def outer(monkeypatch):
    monkeypatch.setitem(methods.METHODS, "outer", f"{__name__}:Outer")


def test_settings_become_fields_of_their_types():
    built = methods.build("full-ft", {"epochs": "3", "lr": "1e-3", "until": "epochs"})
    assert built == FullFT(epochs=3, lr=1e-3, until="epochs")


def test_an_alias_names_the_same_method():
    assert methods.build("ft", {}) == FullFT()


def test_nested_fields_are_dotted_and_keep_the_other_defaults(outer):
    built = methods.build("outer", {"strength": "0.5", "flag": "true", "tuner.epochs": "2"})
    assert built == Outer(0.5, True, FullFT(lr=1e-3, epochs=2))
    assert methods.build("outer", {"strength": "none"}) == Outer()
    assert methods.build("outer", {"tuner": "full-ft"}) == Outer(tuner=FullFT())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("full-fd", {}, r"did you mean 'full-ft'.*Methods: full-ft"),
        ("full-ft", {"epoch": "3"}, r"did you mean 'epochs'.*Fields: epochs, lr"),
        ("full-ft", {"epochs": "three"}, "must be int, not 'three'"),
        ("full-ft", {"epochs": "2.5"}, "must be int"),
        ("full-ft", {"until": "bored"}, "'learned' or 'epochs'"),
        ("full-ft", {"lr": "-1"}, "greater than 0"),
        ("full-ft", {"lr.x": "1"}, "no fields of its own"),
        ("outer", {"flag": "maybe"}, "must be bool"),
        ("outer", {"tuner.nope": "1"}, r"outer\.tuner has no field 'nope'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_choices(outer, name, settings, message):
    with pytest.raises(BadSetting, match=message):
        methods.build(name, settings)


def test_a_wish_reaches_every_place_that_takes_it(outer):
    changed, places = methods.replaced(Outer(), "seed", 7)
    assert (changed.tuner.seed, places) == (7, 1)
    same, none = methods.replaced(Outer(), "no_such_field", 7)
    assert (same, none) == (Outer(), 0)


def test_a_method_is_recorded_with_every_field(outer):
    recorded = methods.settings_of(Outer(strength=0.5))
    assert recorded["name"] == "outer"
    assert recorded["tuner"]["name"] == "full-ft"
    assert recorded["tuner"]["lr"] == 1e-3


def test_descriptions_are_complete():
    for name in methods.method_names():
        described = methods.describe(name)
        assert described["paper"]
        assert described["advice"]
        assert described["fields"]
        for one in described["fields"].values():
            assert set(one) == {"type", "default"}
    assert methods.describe("full-ft")["fields"]["epochs"] == {"type": "int", "default": 20}
    assert methods.describe("delicate")["aliases"] == ["dft"]
    assert methods.describe("delicate")["fields"]["tuner"]["default"]["name"] == "full-ft"
