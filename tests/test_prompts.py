"""Files of prompts to protect."""

import pytest

from unwrite.errors import BadEdits
from unwrite.prompts import read_prompts


def test_lines_and_objects_are_read_once_each_in_order(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text('\ufeffone\r\n\n{"prompt": "two", "x": 1}\none\n', "utf-8")
    assert read_prompts(file) == ("one", "two")


@pytest.mark.parametrize(
    ("content", "message"),
    [
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
