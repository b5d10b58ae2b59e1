"""The model card of an export: it tells what was done, and shows foreign text as text."""

import json
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import unwrite
from unwrite import card
from unwrite.pretrained import BUILT_IN

QUICK = unwrite.FullFT(lr=1e-3, epochs=2, until="epochs")
HOSTILE = [
    "<script>alert(1)</script>",
    "| a | b |\n| --- | --- |",
    "[click](javascript:alert(1)) ![x](http://evil.example/x.png)",
    "`code` **bold** _it_ ~~s~~ &lt; &#60; \\",
    "see https://evil.example and www.evil.example or a@evil.example",
    "# heading\n\n---\n\n- list\n1. one",
    "\x1b[31mred\u202edet\u200b\u0000",
]


@pytest.fixture(scope="module")
def home(worlds, tmp_path_factory):
    """A home with one update in effect and one undone, and reasons that want to be more."""
    home = unwrite.open(tmp_path_factory.mktemp("card") / "home", base=worlds().folder)
    done = [
        home.update(worlds().edits[number : number + 1], QUICK, why=why)
        for number, why in enumerate((HOSTILE[0] + HOSTILE[1] + HOSTILE[2], "a plain reason"))
    ]
    home.undo(done[1].id)
    return home


def parts(text):
    """The facts of the head, and the tokens of the Markdown."""
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), MarkdownIt("commonmark").enable("table").parse(body)


def written(home, folder, kind="model"):
    return (home.export(folder, kind) / "README.md").read_text("utf-8")


def test_the_card_tells_what_is_in_effect_and_how_to_undo_it(home, worlds, tmp_path):
    text = written(home, tmp_path / "out")
    facts, _ = parts(text)
    (live,) = home.ledger.live()
    (undone,) = home.ledger.applied.keys() - {live}
    assert facts["library_name"] == "transformers"
    assert "license" not in facts and "base_model" not in facts  # a folder that declares nothing
    assert f"unwrite undo HOME {live}" in text and undone not in text
    assert "1 update that is in effect; 1 more was undone" in text
    assert home.base.fingerprint in text
    assert home.history()[-1]["fingerprint"] in text
    scores = home.show(live)["scores"]
    before, after = (100 * scores[when]["reliability"]["token"] for when in ("before", "after"))
    assert f"{before:.1f} → {after:.1f} (" in text
    assert worlds().edits[0].prompt not in text  # whose facts were changed is not told


def test_what_people_wrote_stays_inside_its_cell(home, tmp_path):
    """The reason holds markup of every kind; none of it becomes any."""
    _, tokens = parts(written(home, tmp_path / "out"))
    inline = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in inline} <= {
        "text",
        "text_special",
        "softbreak",
        "code_inline",
        "strong_open",
        "strong_close",
    }
    assert not any(token.type == "html_block" for token in tokens)
    assert sum(token.type == "table_open" for token in tokens) == 1
    rows = sum(token.type == "tr_open" for token in tokens)
    assert rows == 2  # the head and the one update


@pytest.mark.parametrize("text", HOSTILE)
def test_plain_is_shown_as_it_was_written(text):
    """One paragraph whose text is the given one, and nothing else."""
    tokens = MarkdownIt("commonmark").enable("table").parse(card.plain(text))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    shown = "".join(child.content for child in tokens[1].children)
    assert {child.type for child in tokens[1].children} <= {"text", "text_special"}
    kept = text.replace("\x1b", "").replace("\u202e", "").replace("\u200b", "").replace("\0", "")
    assert shown == " ".join(kept.split())
    for address in ("://", "www.", "@"):
        assert address not in card.plain(text)


@given(st.text(max_size=400))
def test_no_text_becomes_more_than_a_paragraph(text):
    shown = card.plain(text)
    assert "\n" not in shown and "|" not in shown and "<" not in shown
    types = [token.type for token in MarkdownIt("commonmark").enable("table").parse(shown)]
    assert types in ([], ["paragraph_open", "inline", "paragraph_close"])


@pytest.mark.parametrize(
    ("readme", "licence"),
    [
        (None, None),
        ("about", None),
        ("---\nlicense: MIT\n---\n# x", "mit"),
        ('---\ntags:\n- a\nlicense: "llama3.2"\n---\n', "llama3.2"),
        ("---\nlicense: [mit]\n---\n", None),
        ("# x\nlicense: mit\n", None),
        ("---\nlicense: mit) [x](y\n---\n", None),
    ],
)
def test_the_licence_is_told_where_the_base_tells_it(world, tmp_path, readme, licence):
    if readme is not None:
        (world.folder / "README.md").write_text(readme, "utf-8")
    (world.folder / "LICENSE").write_text("do as you like", "utf-8")
    home = unwrite.open(tmp_path / "home", base=world.folder)
    text = written(home, tmp_path / "out")
    facts, _ = parts(text)
    assert facts.get("license") == licence
    assert ("declares the licence" in text) == (licence is not None)
    assert (tmp_path / "out" / "LICENSE").read_text("utf-8") == "do as you like"
    assert "Nothing: this is the base." in text
    again = unwrite.open(tmp_path / "again", base=tmp_path / "out")  # an export is a base
    assert again.base.fingerprint == home.base.fingerprint


def test_a_base_from_elsewhere_is_named_and_a_path_of_this_machine_is_not(home):
    def head(**changes):
        text = card.card("adapter", replace(home.base, **changes), home.source, [], [], "f" * 64)
        assert str(home.source.folder.parent) not in text
        return parts(text)[0]

    (name,) = BUILT_IN
    assert head(kind="built-in", name=name)["base_model"] == BUILT_IN[name].hub
    assert head(kind="built-in", name=name)["license"] == BUILT_IN[name].licence
    odd = 'ann/"toy": {}\n'
    assert head(kind="hub", name=odd)["base_model"] == odd
    assert head()["library_name"] == "peft"
    assert json.dumps(head())


def test_an_adapter_has_a_card_and_a_delta_has_none(worlds, tmp_path):
    home = unwrite.open(tmp_path / "home", base=worlds().folder)
    home.update(worlds().edits[:1], unwrite.LoRA(lr=1e-3, epochs=2, until="epochs"))
    assert "AutoPeftModelForCausalLM" in written(home, tmp_path / "adapter", "adapter")
    assert not (home.export(tmp_path / "delta", "delta") / "README.md").exists()
