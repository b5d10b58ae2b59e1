"""Files of prompts to protect."""

import pytest

from unwrite.errors import BadEdits
from unwrite.prompts import Protected, once_each, read_prompts, read_protected


def test_lines_and_objects_are_read_once_each_in_order(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text('\ufeffone\r\n\n{"prompt": "two", "x": 1}\none\n', "utf-8")
    assert read_prompts(file) == ("one", "two")


def test_held_out_is_kept_and_wins_over_a_repeat(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('one\n{"prompt": "two", "held_out": true}\ntwo\n', "utf-8")
    assert read_protected(file) == (Protected("one"), Protected("two", held_out=True))
    assert once_each(["a", Protected("b", True), "a", "b"]) == (
        Protected("a"),
        Protected("b", held_out=True),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a", "held_out": 1}', 'line 1: "held_out" must be true or false'),
        (b"", "empty|no prompts"),
        (b"\n\n", "no prompts"),
        (b"\xff\xfe", "UTF-8"),
        (b'{"prompt": 1}', "line 1: prompt"),
        (b'fine\n{"x": 1}', r'line 2 has no "prompt"'),
        (b'{"prompt"', "line 1 begins like a JSON object"),
    ],
)
def test_bad_files_are_refused_with_the_line(tmp_path, content, message):
    file = tmp_path / "p.txt"
    file.write_bytes(content)
    with pytest.raises(BadEdits, match=message):
        read_prompts(file)


def test_a_missing_file_is_a_sentence(tmp_path):
    with pytest.raises(BadEdits, match=r"p\.txt"):
        read_prompts(tmp_path / "p.txt")
