"""Tasks: the bundled ones, the three forms of files, splits, and the judging of free answers."""

import json
import os
from pathlib import Path

import pytest

from unwrite import task_bank
from unwrite.errors import BadSetting, BadTask, UnwriteError
from unwrite.tasks import Example, extract, is_right, read_task, read_tasks, task_names

SHARED = Path(os.environ.get("UNWRITE_SHARED", Path(__file__).parents[2] / "shared" / "data"))
real = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared folder of real data is not here")


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def question(number, **more):
    return {"instruction": "Say", "input": str(number), "output": f"w{number}", **more}


# ---- the bundled tasks ---------------------------------------------------------------------------


def test_there_are_enough_bundled_tasks_of_different_kinds():
    kinds = {one.kind for one in task_bank.BANK.values()}
    assert len(task_names()) >= 24
    assert kinds >= {
        "lexical",
        "arithmetic",
        "factual",
        "classification",
        "copying",
        "formatting",
    }


@pytest.mark.parametrize("name", list(task_bank.BANK))
def test_a_bundled_task_is_large_distinct_divided_and_answers_itself(name):
    task = read_task(f"bank:{name}")
    prompts = [example.prompt for example in (*task.train, *task.test)]
    assert len(prompts) >= task_bank.SMALLEST
    assert len(set(prompts)) == len(prompts)
    assert len(task.test) >= 25
    for example in (*task.train, *task.test):
        assert is_right(f" {example.answer}\nQuestion: more", example.answer), example
        assert example.task == name


@pytest.mark.parametrize("name", list(task_bank.BANK))
def test_the_answers_of_a_task_are_not_all_the_same(name):
    answers = [answer for _, answer in task_bank.examples(name)]
    most = max(answers.count(answer) for answer in set(answers))
    assert most <= 0.6 * len(answers)


def test_the_same_seed_gives_the_same_examples_and_another_gives_others():
    assert read_tasks("bank:addition") == read_tasks("bank:addition")
    assert read_tasks("bank:addition") != read_tasks("bank:addition", seed=1)
    alone, together = read_task("bank:roman"), read_tasks("bank")
    assert alone in together


def test_examples_are_right_where_arithmetic_can_tell():
    for prompt, answer in task_bank.examples("addition"):
        one, other = prompt.split(" + ")
        assert int(one) + int(other) == int(answer)
    assert task_bank.in_roman(1994) == "MCMXCIV"
    assert task_bank.in_words(342) == "three hundred forty-two"


def test_an_unknown_bundled_task_is_refused_with_the_nearest_name():
    with pytest.raises(BadSetting, match="did you mean plurals"):
        read_tasks("bank:plural")


def test_one_task_is_asked_for_where_there_are_many():
    with pytest.raises(BadTask, match="where one is needed"):
        read_task("bank")


# ---- files ---------------------------------------------------------------------------------------


def test_the_three_forms_of_records(tmp_path):
    path = write(
        tmp_path / "mine.jsonl",
        {"task": "a", "instruction": "Double it.", "input": "4", "output": "8", "split": "train"},
        {"task": "a", "prompt": "Twice 5 is", "completion": "10", "split": "train"},
        {
            "task": "a",
            "split": "test",
            "messages": [
                {"role": "user", "content": "Twice 6?"},
                {"role": "assistant", "content": "12"},
            ],
        },
    )
    task = read_task(path)
    assert task.train == (
        Example("Double it.\n4\nAnswer:", "8", "a", "train"),
        Example("Twice 5 is", "10", "a", "train"),
    )
    assert task.test == (Example("Twice 6?\n", "12", "a", "test"),)


def test_a_longer_conversation_is_told_turn_by_turn(tmp_path):
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Name?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    path = write(
        tmp_path / "t.jsonl", {"messages": [*messages, {"role": "assistant", "content": "Ada"}]}
    )
    (example,) = read_task(path).train
    assert (
        example.prompt == "System: Be brief.\nUser: Hi\nAssistant: Hello\nUser: Name?\nAssistant:"
    )
    assert example.answer == "Ada"


def test_without_splits_a_quarter_is_for_testing_and_equal_prompts_stay_together(tmp_path):
    rows = [question(number) for number in range(40)]
    path = write(tmp_path / "t.jsonl", *rows, *({**row, "output": "other"} for row in rows))
    task = read_task(path)
    assert len(task.test) == 20 and len(task.train) == 60
    assert not {one.prompt for one in task.train} & {one.prompt for one in task.test}
    assert read_task(path) == task
    assert read_task(path, seed=1) != task
    assert len(read_task(path, limit=5).train) == 5


def test_records_of_one_file_are_grouped_by_task(tmp_path):
    path = write(tmp_path / "t.jsonl", question(1, task="b"), question(2), question(3, task="b"))
    assert [(task.name, len(task.train)) for task in read_tasks(path)] == [("b", 2), ("t", 1)]


def test_a_task_to_be_forgotten_needs_no_answers(tmp_path):
    path = write(tmp_path / "t.jsonl", {"prompt": "What is a molar?"})
    assert read_task(path, labelled=False).train[0].answer == ""
    with pytest.raises(BadTask, match="line 1: `completion` is missing"):
        read_task(path)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "", "input": " ", "output": "x"}, "both empty"),
        ({"instruction": "a", "output": 3}, "`output` is a number"),
        ({"instruction": "a", "output": " "}, "`output` is empty"),
        ({"instruction": ["a"], "output": "x"}, "`instruction` is a list"),
        ({"prompt": "a"}, "`completion` is missing"),
        ({"prompt": "a", "completion": "b", "split": "dev"}, "`split` is 'dev'"),
        ({"question": "a"}, "no known form"),
        ({"messages": "hello"}, "`messages` is text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "does not end with a turn"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "nothing but the answer"),
        ({"messages": [{"role": "user"}]}, r"`messages\[0\].content` is null"),
        ({"messages": ["a"]}, r"`messages\[0\]` is text"),
    ],
)
def test_bad_records_are_refused_with_file_line_and_field(tmp_path, record, reason):
    path = write(tmp_path / "bad.jsonl", question(1), record)
    with pytest.raises(BadTask, match=rf"bad\.jsonl, line 2: .*{reason}"):
        read_tasks(path)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text("{")
    for name in ("empty.jsonl", "broken.jsonl", "missing.jsonl"):
        with pytest.raises(UnwriteError, match=name):
            read_tasks(tmp_path / name)


# ---- judging -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected", "right"),
    [
        (" 12", "12", True),
        ("12.0", "12", True),
        ("3 + 9 = 12", "12", True),
        ("First 7, then 5. The answer is 12.", "12", True),
        ("She pays 7.\n#### 1,200", "1200", True),
        ("13", "12", False),
        ("no idea", "12", False),
        ("1,200", "1,200", True),
        ("1200", "1,200", False),
        ("(B) because", "(B)", True),
        ("b", "(B)", False),
        ("The answer is (C).", "(B)", False),
        ("B", "B", True),
        ("K", "K", True),
        (' "mice". ', "mice", True),
        ("MICE", "mice", False),
        ("mice\nrats", "mice", True),
        ("mice and rats", "mice", False),
        ("mice\n\nQuestion: goose", "mice", True),
        ("", "mice", False),
    ],
)
def test_judging(text, expected, right):
    assert is_right(text, expected) is right


def test_what_is_extracted_has_the_form_of_what_is_expected():
    assert extract("so 4 * 5 = 20 apples", "7") == "20"
    assert extract("I think (c)", "(A)") == "C"
    assert extract("two words\nmore", "one") == "two words"


# ---- the real files ------------------------------------------------------------------------------


@real
@pytest.mark.parametrize(
    ("name", "tasks"),
    [("multitask_50.jsonl", 29), ("p3_t0_tasks_x50.jsonl", 44), ("bbh_27x50.jsonl", 27)],
)
def test_real_files_are_read_whole(name, tasks):
    raw = [json.loads(line) for line in (SHARED / name).read_text("utf-8").splitlines()]
    found = {task.name: task for task in read_tasks(SHARED / name)}
    assert len(found) == tasks
    assert sum(len(task.train) + len(task.test) for task in found.values()) == len(raw)
    for row in raw:
        task = found[row["task"]]
        examples = [one for one in (*task.train, *task.test) if one.answer == row["output"]]
        assert any(row["input"].strip() in example.prompt for example in examples)
    for task in found.values():
        assert not {one.prompt for one in task.train} & {one.prompt for one in task.test}


@real
def test_real_files_of_edits_are_no_tasks():
    with pytest.raises(BadTask, match=r"record 1 \(line 2\): `completion` is missing"):
        read_tasks(SHARED / "counterfact_easyedit_2000.json")
