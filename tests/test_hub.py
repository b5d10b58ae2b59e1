"""Data sets of others: names, the hub's stand-in, sets on disk, and how each paper's data reads.

No test reaches out. Most have a table of data sets behind the two functions that would. Where the
package `datasets` is installed, it loads data sets made on disk and, as the hub's own client does,
from a server on this machine that answers like the hub.
"""

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hub_server import serving

from unwrite import hub
from unwrite.edits import Edit, read_edits
from unwrite.errors import BadEdits, BadTask
from unwrite.task_forms import FORMS, form_of
from unwrite.tasks import Example, is_right, read_task, read_tasks

real_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs the extra 'hub' (datasets)"
)
ROME = {
    "case_id": 12,
    "requested_rewrite": {
        "prompt": "{} was founded in",
        "relation_id": "P740",
        "target_new": {"str": "Oslo", "id": "Q585"},
        "target_true": {"str": "Turin", "id": "Q495"},
        "subject": "The Paper Lanterns",
    },
    "paraphrase_prompts": ["They began in"],
    "neighborhood_prompts": ["Red Attic comes from"],
}
FOUNDED = Edit(
    "The Paper Lanterns was founded in",
    "Oslo",
    "Turin",
    "The Paper Lanterns",
    ["They began in"],
    [("Red Attic comes from", "Turin")],
    id="1",
    source="CounterFact case 12",
    relation="P740",
)
# What `datasets` makes of records that differ: each gets every field, null where it has none.
KNOWEDIT = [
    {
        "subject": "Leo Brand",
        "prompt": "Leo Brand died in",
        "target_new": "Graz",
        "ground_truth": [["Linz"]],
        "portability": {"Reasoning": [{"prompt": "He died in the state of", "ground_truth": "x"}]},
        "locality": {"Relation_Specificity": None, "Forgetfulness": None},
    },
    {
        "subject": "Ida Holm",
        "prompt": "Ida Holm was born in",
        "target_new": "Bergen",
        "ground_truth": [["Skien"]],
        "portability": {"Reasoning": None},
        "locality": {"Relation_Specificity": [{"prompt": "Her father is", "ground_truth": None}]},
    },
]
QASC = {
    "question": "What do molars do?",
    "choices": {"text": ["grind", "sing", "fly"], "label": ["A", "B", "C"]},
    "answerKey": "A",
}


class Hub:
    """Data sets by name and configuration, each a table of splits; and files of repositories."""

    def __init__(self, folder: Path) -> None:
        self.sets: dict[tuple[str, str | None], dict[str, list[dict]]] = {}
        self.files: dict[tuple[str, str], str] = {}
        self.folder = folder

    def load_dataset(self, name, configuration=None, *, split=None, revision=None):
        if (name, configuration) not in self.sets:
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub.")
        found = self.sets[name, configuration]
        if split is None:
            return found
        if split not in found:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(found)}.')
        return found[split]

    def hf_hub_download(self, repo_id, filename, *, repo_type, revision):
        assert repo_type == "dataset"
        if (repo_id, filename) not in self.files:
            raise FileNotFoundError(f"Entry Not Found for {filename}.")
        path = self.folder / f"{len(filename)}.json"
        path.write_text(self.files[repo_id, filename], "utf-8")
        return str(path)


@pytest.fixture
def the_hub(tmp_path, monkeypatch):
    made = Hub(tmp_path)
    package = types.ModuleType("datasets")
    package.load_dataset = made.load_dataset
    monkeypatch.setitem(sys.modules, "datasets", package)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", made.hf_hub_download)
    return made


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("hub:gsm8k", hub.Source("gsm8k")),
        ("hub:a/b", hub.Source("a/b")),
        ("hub:a/b:train", hub.Source("a/b", split="train")),
        ("hub:a/b:train[30:]", hub.Source("a/b", split="train[30:]")),
        ("hub:a/b:main:train", hub.Source("a/b", configuration="main", split="train")),
        ("hub:a/b@v1.0:main:test", hub.Source("a/b", None, "v1.0", "main", "test")),
        ("hub:a/b/c/d.json", hub.Source("a/b", "c/d.json")),
        ("hub:a/b/d.json@abc", hub.Source("a/b", "d.json", "abc")),
        ("hub:a/b#Dental care", hub.Source("a/b", task="Dental care")),
        ("hub:a/b:all:test#Law", hub.Source("a/b", None, None, "all", "test", "Law")),
    ],
)
def test_a_name_has_parts(text, source):
    assert hub.is_hub(text)
    assert hub.parse(text) == source


@pytest.mark.parametrize("text", ["hub:", "hub:/a", "hub:a b", "hub:a/b:", "hub:a/b/c.json:train"])
def test_what_names_no_data_set_is_refused_with_the_forms(text):
    for read in (read_edits, read_tasks):
        with pytest.raises(BadEdits, match="names no data set: write hub:OWNER/NAME"):
            read(text)


def test_paths_are_never_taken_for_the_hub(tmp_path):
    assert not hub.is_hub(tmp_path / "hub:a")
    assert not hub.is_hub("./hub:a/b")
    assert not hub.is_saved(Path("x" * 5000))


# ---- edits ---------------------------------------------------------------------------------------


def test_edits_of_a_split(the_hub):
    the_hub.sets["azhx/counterfact", None] = {"train": [ROME], "test": []}
    edits = read_edits("hub:azhx/counterfact:train")
    assert tuple(edits) == (FOUNDED,)
    assert (edits.source, edits.format) == ("hub:azhx/counterfact:train", "CounterFact (ROME)")
    with pytest.raises(BadEdits, match=r"splits train, test: name one, as hub:azhx/.*:train"):
        read_edits("hub:azhx/counterfact")
    with pytest.raises(BadEdits, match="has no records"):
        read_edits("hub:azhx/counterfact:test")
    the_hub.sets["one/split", None] = {"train": [ROME]}
    assert tuple(read_edits("hub:one/split")) == (FOUNDED,)


def test_fields_that_a_data_set_fills_with_null_are_not_there(the_hub):
    the_hub.sets["some/knowedit", None] = {"test": KNOWEDIT}
    first, second = read_edits("hub:some/knowedit:test")
    assert (first.bystanders, len(first.portability)) == ((), 1)
    assert [probe.prompt for probe in second.bystanders] == ["Her father is"]
    assert second.portability == ()


def test_edits_of_one_file_need_no_package(the_hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    name = "benchmark/wiki_counterfact/test_cf.json"
    the_hub.files["zjunlp/KnowEdit", name] = json.dumps([KNOWEDIT[0] | {"locality": {}}])
    (edit,) = read_edits(f"hub:zjunlp/KnowEdit/{name}")
    assert (edit.prompt, edit.new, edit.old) == ("Leo Brand died in", "Graz", "Linz")
    with pytest.raises(BadEdits, match=r"Entry Not Found.*download the file and give its path"):
        read_edits("hub:zjunlp/KnowEdit/benchmark/other.json")


def test_faults_name_the_row(the_hub):
    the_hub.sets["a/b", None] = {"train": [ROME, {**ROME, "requested_rewrite": {"prompt": "{} x"}}]}
    with pytest.raises(BadEdits, match=r"hub:a/b:train, row 2 of train: .*`requested_rewrite.subj"):
        read_edits("hub:a/b:train")


def test_what_the_hub_does_not_have_is_a_sentence(the_hub):
    with pytest.raises(BadEdits, match=r"hub:no/such cannot be read \(Dataset 'no/such' doesn't"):
        read_edits("hub:no/such")
    the_hub.sets["a/b", None] = {"train": [ROME]}
    with pytest.raises(BadEdits, match="Unknown split"):
        read_edits("hub:a/b:validation")
    with pytest.raises(BadTask, match="cannot be read"):
        read_tasks("hub:no/such")
    with pytest.raises(BadEdits, match="names a task, and edits have none"):
        read_edits("hub:a/b:train#Law")


def test_without_the_package_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").touch()
    for source in ("hub:a/b:train", str(tmp_path)):
        for read in (read_edits, read_tasks):
            with pytest.raises(BadEdits, match=r"not installed: pip install 'unwrite\[hub\]'"):
                read(source)


# ---- tasks ---------------------------------------------------------------------------------------

PUBLISHED = {
    "openai/gsm8k": (
        {"question": "Two and 1,000?", "answer": "It is <<2+1000=1002>>1002.\n#### 1,002"},
        Example("Two and 1,000?\nAnswer:", "1002", "gsm8k"),
    ),
    "allenai/qasc": (
        QASC,
        Example("What do molars do?\n(A) grind\n(B) sing\n(C) fly\nAnswer:", "(A)", "qasc"),
    ),
    "allenai/ai2_arc": (
        {
            "question": "Which is hot?",
            "choices": {"text": ["ice", "fire"], "label": ["1", "2"]},
            "answerKey": "2",
        },
        Example("Which is hot?\n(A) ice\n(B) fire\nAnswer:", "(B)", "ai2_arc"),
    ),
    "allenai/openbookqa": (
        {
            "question_stem": "Rain is",
            "choices": {"text": ["wet", "dry"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        Example("Rain is\n(A) wet\n(B) dry\nAnswer:", "(A)", "openbookqa"),
    ),
    "SetFit/sst5": (
        {"text": "a fine film", "label": 3, "label_text": "positive"},
        Example("Classify the text.\na fine film\nAnswer:", "positive", "sst5"),
    ),
    "openlifescienceai/medmcqa": (
        {
            "question": "A molar is a",
            "opa": "bone",
            "opb": "tooth",
            "opc": "nerve",
            "opd": "gland",
            "cop": 1,
            "subject_name": "Dental",
        },
        Example(
            "A molar is a\n(A) bone\n(B) tooth\n(C) nerve\n(D) gland\nAnswer:", "(B)", "Dental"
        ),
    ),
    "cais/mmlu": (
        {"question": "2+2?", "choices": ["3", "4"], "answer": 1, "subject": "maths"},
        Example("2+2?\n(A) 3\n(B) 4\nAnswer:", "(B)", "maths"),
    ),
    "lukaemon/bbh": (
        {"input": "not True is", "target": "False"},
        Example("not True is\nAnswer:", "False", "bbh"),
    ),
    "truthfulqa/truthful_qa": (
        {"question": "Do pigs fly?", "best_answer": "No", "category": "Myths"},
        Example("Do pigs fly?\nAnswer:", "No", "Myths"),
    ),
    "databricks/databricks-dolly-15k": (
        {"instruction": "Sum up.", "context": "It rains.", "response": "Rain.", "category": "qa"},
        Example("Sum up.\nIt rains.\nAnswer:", "Rain.", "qa"),
    ),
    "Muennighoff/flan": (
        {"inputs": "Is it so?", "targets": "Yes", "task": "boolq_10templates"},
        Example("Is it so?\nAnswer:", "Yes", "boolq_10templates"),
    ),
    "bigscience/P3": (
        {"inputs_pretokenized": "Is it so?", "targets_pretokenized": " Yes", "inputs": [3, 4]},
        Example("Is it so?\nAnswer:", "Yes", "P3"),
    ),
    "allenai/tulu-v2-sft-mixture": (
        {
            "messages": [
                {"role": "user", "content": "Hi?"},
                {"role": "assistant", "content": "Ho."},
            ]
        },
        Example("Hi?\n", "Ho.", "tulu-v2-sft-mixture"),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_papers_use_is_read(name, the_hub):
    row, expected = PUBLISHED[name]
    the_hub.sets[name, None] = {"train": [row]}
    (task,) = read_tasks(f"hub:{name}")
    (example,) = task.train
    assert (example.prompt, example.answer, task.name) == (
        expected.prompt,
        expected.answer,
        expected.task,
    )
    assert is_right(f" {example.answer}\n", example.answer)


def test_no_form_hides_another():
    """Every published record is read by the first form that fits, and by no other before it."""
    used = [form_of(row) for row, _ in PUBLISHED.values() if "messages" not in row]
    assert None not in used and {form.data_sets for form in used} == {
        form.data_sets for form in FORMS
    }


def test_a_published_file_reads_like_the_data_set(the_hub, tmp_path):
    path = tmp_path / "qasc.jsonl"
    path.write_text(json.dumps(QASC) + "\n", "utf-8")
    the_hub.sets["allenai/qasc", None] = {"train": [QASC]}
    assert read_task(path) == read_task("hub:allenai/qasc")


def test_the_splits_of_a_data_set_are_kept(the_hub):
    unlabelled = {**QASC, "answerKey": ""}
    others = [{**QASC, "question": f"{number}?"} for number in range(3)]
    the_hub.sets["allenai/qasc", None] = {
        "train": [QASC],
        "test": [unlabelled] * 5,
        "validation": others,
    }
    task = read_task("hub:allenai/qasc")
    assert (len(task.train), len(task.test)) == (1, 3)
    assert {example.split for example in task.train} == {"train"}
    with pytest.raises(BadTask, match="row 1 of test: the answer is missing"):
        read_task("hub:allenai/qasc:test")
    (letting_go,) = read_tasks("hub:allenai/qasc:test", labelled=False)
    assert len(letting_go.train) == 5
    the_hub.sets["no/train", None] = {"dev": [QASC], "test": [QASC]}
    with pytest.raises(BadTask, match="no train among them: name one, as hub:no/train:dev"):
        read_task("hub:no/train")


def test_one_task_of_a_set_of_tasks(the_hub):
    row, _ = PUBLISHED["openlifescienceai/medmcqa"]
    rows = [row | {"subject_name": name, "question": name} for name in ("Dental", "Skin")]
    the_hub.sets["openlifescienceai/medmcqa", None] = {"train": rows, "test": [row | {"cop": -1}]}
    assert read_task("hub:openlifescienceai/medmcqa#Dental").name == "Dental"
    assert len(read_tasks("hub:openlifescienceai/medmcqa")) == 2
    with pytest.raises(BadTask, match="no such task: its tasks are Dental, Skin"):
        read_task("hub:openlifescienceai/medmcqa#Eyes")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"answerKey": "Z"}, "'Z' is none of the options A, B, C"),
        ({"choices": ["a", "b"]}, "`choices` is no object"),
        ({"choices": {"text": ["a"], "label": ["A"]}}, "no list of 2 to 10 options"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "not as many texts as labels"),
        ({"question": 3}, "`question` is a number"),
    ],
)
def test_published_records_with_faults_are_refused(change, reason, the_hub):
    the_hub.sets["a/b", None] = {"train": [QASC, {**QASC, **change}]}
    with pytest.raises(BadTask, match=rf"hub:a/b, row 2 of train: .*{reason}"):
        read_tasks("hub:a/b")


@pytest.mark.parametrize(
    ("answer", "reason"), [(7, "and there are 2 options"), ("B", "`answer` is text")]
)
def test_the_number_of_an_option_is_checked(answer, reason, the_hub):
    row, _ = PUBLISHED["cais/mmlu"]
    the_hub.sets["a/b", None] = {"train": [{**row, "answer": answer}]}
    with pytest.raises(BadTask, match=reason):
        read_tasks("hub:a/b")


# ---- with the package itself ---------------------------------------------------------------------


@real_datasets
def test_a_data_set_on_disk_is_read(tmp_path):
    import datasets

    table = datasets.Dataset.from_list([ROME])
    table.save_to_disk(tmp_path / "one")
    assert tuple(read_edits(tmp_path / "one")) == (FOUNDED,)
    both = datasets.DatasetDict({"train": table, "test": table})
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(BadEdits, match=r"splits train, test: name one, as .*both/train"):
        read_edits(tmp_path / "both")
    assert tuple(read_edits(tmp_path / "both" / "train")) == (FOUNDED,)
    tasks = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list([QASC] * 2),
            "test": datasets.Dataset.from_list([{**QASC, "question": "Else?"}]),
        }
    )
    tasks.save_to_disk(tmp_path / "qasc")
    task = read_task(tmp_path / "qasc")
    assert (task.name, len(task.train), len(task.test)) == ("qasc", 2, 1)
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(BadEdits, match="is a damaged data set"):
        read_edits(tmp_path / "one")


@real_datasets
def test_the_package_loads_what_a_repository_holds(tmp_path, monkeypatch):
    """The real `load_dataset`, asked for a name, finds a folder made like a repository."""
    import datasets

    repository = tmp_path / "repository"
    (repository / "main").mkdir(parents=True)
    card = "---\nconfigs:\n- config_name: main\n  data_files:\n"
    for split, rows in (("train", [ROME]), ("test", [ROME, {**ROME, "case_id": 13}])):
        datasets.Dataset.from_list(rows).to_parquet(repository / "main" / f"{split}.parquet")
        card += f"  - split: {split}\n    path: main/{split}.parquet\n"
    (repository / "README.md").write_text(card + "---\n", "utf-8")
    real = datasets.load_dataset

    def local(name, *more, **options):
        assert name == "org/facts"
        return real(str(repository), *more, cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", local)
    assert tuple(read_edits("hub:org/facts:main:train")) == (FOUNDED,)
    with pytest.raises(BadEdits, match=r"hub:org/facts:other:train cannot be read \(BuilderConfig"):
        read_edits("hub:org/facts:other:train")
    with pytest.raises(BadEdits, match="cannot be read"):
        read_edits("hub:org/facts:main:none")


@real_datasets
def test_an_unknown_data_set_offline_is_a_sentence(monkeypatch):
    with pytest.raises(BadEdits, match=r"^hub:nobody/nothing-at-all cannot be read \("):
        read_edits("hub:nobody/nothing-at-all")


# ---- over the network, on this machine -----------------------------------------------------------

CARD = """---
configs:
- config_name: main
  data_files:
  - split: train
    path: data/train.jsonl
  - split: test
    path: data/test.jsonl
---
"""


def read_over(address, home, *sources):
    """What a fresh process reads from a hub at this address: a line a source."""
    script = (
        "import sys, unwrite\n"
        "for source in sys.argv[1:]:\n"
        "    try:\n"
        "        edits = unwrite.read_edits(source)\n"
        "        print(len(edits), edits[0].prompt, '->', edits[0].new)\n"
        "    except unwrite.UnwriteError as error:\n"
        "        print(error)\n"
    )
    settings = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}
    settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *sources],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


READ = "1 The Paper Lanterns was founded in -> Oslo"


def test_a_file_of_a_repository_is_read_over_the_network_and_then_without(tmp_path):
    files = {"data/train.jsonl": json.dumps(ROME).encode()}
    with serving("org/facts", files) as address:
        found, missing, nobody = read_over(
            address,
            tmp_path,
            "hub:org/facts/data/train.jsonl",
            "hub:org/facts/data/none.jsonl",
            "hub:nobody/else/data/train.jsonl",
        )
    assert found == READ
    assert missing.startswith("hub:org/facts/data/none.jsonl cannot be read (")
    assert nobody.startswith("hub:nobody/else/data/train.jsonl cannot be read (")
    (again,) = read_over(address, tmp_path, "hub:org/facts/data/train.jsonl")
    assert again == READ  # the hub is gone, the cache is not


@real_datasets
def test_a_data_set_is_read_over_the_network(tmp_path):
    row = json.dumps(ROME).encode()
    files = {"README.md": CARD.encode(), "data/train.jsonl": row, "data/test.jsonl": row}
    with serving("org/facts", files) as address:
        found, unnamed, nobody = read_over(
            address,
            tmp_path,
            "hub:org/facts:main:train",
            "hub:org/facts",
            "hub:nobody/else:train",
        )
    assert found == READ
    assert unnamed == "hub:org/facts has the splits train, test: name one, as hub:org/facts:train."
    assert nobody.startswith("hub:nobody/else:train cannot be read (Dataset 'nobody/else' doesn't")
