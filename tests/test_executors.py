"""Grids on Ray: the same results as here, whoever dies on the way.

With a real cluster of two workers on this machine; skipped where Ray is not installed.
"""

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from comparing import LEARN, SHORT, Thinned, steady

import unwrite
from unwrite import verb
from unwrite.errors import BadSetting, UnwriteError
from unwrite.executors import RayExecutor
from unwrite.forgetting.collection import collect
from unwrite.forgetting.examples import UpstreamExample
from unwrite.model import Model
from unwrite.training import new_pairs


@dataclass(frozen=True)
class KilledOnce:
    """Plain fine-tuning whose process is killed in the midst of it, the first time."""

    marker: str
    seed: int = 0

    name: ClassVar[str] = "killed-once"

    def delta(self, model, edits):
        delta = SHORT.delta(model, edits)
        if not Path(self.marker).exists():
            Path(self.marker).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return delta


@dataclass(frozen=True)
class Wild:
    """A method that breaks, as people expect or not."""

    how: str

    name: ClassVar[str] = "wild"

    def delta(self, model, edits):
        if self.how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise UnwriteError("It is too wild.") if self.how == "told" else ZeroDivisionError("a bug")


@pytest.fixture(scope="module")
def cluster():
    """Two workers of one core each."""
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    yield RayExecutor(retries=2)
    ray.shutdown()


@pytest.mark.filterwarnings("ignore")
class TestOnRay:
    def test_a_comparison_is_the_same_with_a_worker_killed_in_mid_run(
        self, worlds, cluster, tmp_path
    ):
        marker = tmp_path / "killed"
        marker.touch()
        words = {
            "base": worlds().folder,
            "edits": worlds().edits[:4],
            "methods": {"learn": LEARN, "thin": Thinned(), "killed": KilledOnce(str(marker))},
            "seeds": (0, 1),
            "plant": True,
            "exact": False,
        }
        alone = unwrite.compare(**words, out=tmp_path / "here")
        marker.unlink()
        there = unwrite.compare(**words, out=tmp_path / "there", executor=cluster)
        assert int(marker.read_text()) != os.getpid()
        assert not there.failed and len(there.rows) == len(alone.rows) > 6
        assert steady(tmp_path / "there") == steady(tmp_path / "here")

    def test_what_is_finished_is_not_computed_again(self, worlds, cluster, tmp_path):
        words = {"base": worlds().folder, "edits": worlds().edits[:3], "references": ()}
        words |= {"out": tmp_path, "exact": False}
        unwrite.compare(**words, methods={"learn": SHORT})
        (result,) = tmp_path.glob("cells/*/result.json")
        before = result.read_bytes()
        grown = unwrite.compare(**words, methods={"learn": SHORT, "more": LEARN}, executor=cluster)
        assert [row["method"] for row in grown.rows] == ["learn", "more"]
        assert result.read_bytes() == before
        # Nothing is left to do: no worker is asked.
        unwrite.compare(**words, methods={"learn": SHORT}, executor=Unwilling())

    def test_failures_are_noted_and_the_others_go_on(self, worlds, cluster, tmp_path):
        words = {"base": worlds().folder, "edits": worlds().edits[:2], "references": ()}
        words |= {"out": tmp_path, "exact": False, "executor": cluster}
        found = unwrite.compare(**words, methods={"wild": Wild("told"), "learn": SHORT})
        assert [row["error"] for row in found.failed] == ["It is too wild."]
        assert [row["method"] for row in found.rows] == ["learn"]
        with pytest.raises(ZeroDivisionError):
            unwrite.compare(**words, methods={"bug": Wild("bug")})
        with pytest.raises(UnwriteError, match="died 3 times"):
            unwrite.compare(**words, methods={"killed": Wild("killed")})

    def test_a_forgetting_matrix_is_the_same(self, worlds, cluster, tmp_path):
        world = worlds()
        model = Model.load(world.folder)
        tasks = {f"task {i}": new_pairs(world.edits[3 * i : 3 * i + 3]) for i in range(4)}
        examples = [UpstreamExample(edit.id, edit.prompt, edit.old) for edit in world.edits[15:25]]
        here = collect(model, tasks, examples, SHORT, tmp_path / "here")
        there = collect(model, tasks, examples, SHORT, tmp_path / "there", executor=cluster)
        assert there.matrix.tasks == here.matrix.tasks == tuple(tasks)
        assert (there.matrix.values == here.matrix.values).all()
        assert there.learned == tuple(tasks)

    def test_a_worker_that_fits_nowhere_is_refused(self, cluster):
        with pytest.raises(BadSetting, match="needs CPU 64"):
            list(RayExecutor(cpus=64).work(Doubling, [1]))

    def test_every_job_has_its_result(self, cluster):
        found = dict(cluster.work(Doubling, list(range(20))))
        assert found == {job: 2 * job for job in range(20)}


class Doubling:
    def __call__(self, job):
        return 2 * job


class Unwilling:
    def work(self, make, jobs):
        assert not jobs
        yield from ()


def test_executors_by_name():
    assert verb.executor("local", None) is None
    assert verb.executor("ray:cpus=2:workers=3", "auto") == RayExecutor("auto", cpus=2, workers=3)
    for text, address, reason in [
        ("slurm", None, "no executor 'slurm'"),
        ("local", "auto", "belong to --executor ray"),
        ("ray:cpu=2", None, "no field 'cpu'"),
        ("ray:cpus=0", None, "cpus >= 1"),
        ("ray:workers=0", None, "at least 1"),
    ]:
        with pytest.raises(BadSetting, match=reason):
            verb.executor(text, address)


def test_without_ray_the_reason_is_said(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadSetting, match=r"pip install 'unwrite\[ray\]'"):
        list(RayExecutor().work(Doubling, [1]))
    assert list(RayExecutor().work(Doubling, [])) == []


def test_the_command_line_knows_them(worlds, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from unwrite.cli import app

    seen = []

    def work(self, make, jobs):
        seen.append((self, len(jobs)))
        worker = make()
        for job in jobs:
            yield job, worker(job)

    monkeypatch.setattr(RayExecutor, "work", work)
    edits = tmp_path / "edits.jsonl"
    unwrite.write_edits(edits, worlds().edits[:2])
    words = ["compare", worlds().folder, "--edits", edits, "--methods", "full-ft:lr=1e-3"]
    words += ["--references", "full-ft", "--token-only", "--executor", "ray:cpus=2"]
    words += ["--address", "auto", "--out", tmp_path / "run", "--json"]
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["rows"]) == 2
    assert {executor for executor, _ in seen} == {RayExecutor("auto", cpus=2)}
    assert [count for _, count in seen] == [1, 2, 0], "the start, the cells, those that wait"
