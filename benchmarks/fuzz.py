"""Every reader of this package fed with hostile bytes: an answer or a sentence, nothing else.

    python -m benchmarks.fuzz [--reader edits ...] [--seconds 60]

Needs ``atheris`` (libFuzzer for Python), which guides itself by the branches that an input reaches;
``--plain`` mutates the examples at random instead, without it. A reader may raise ``UnwriteError``,
and its message must be one printable line. Anything else, more than ten seconds, or more than 3 GB
is a finding: the input is kept and shown. The numbers of runs add up over calls in the result.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, committed, write

Reader = Callable[[bytes], object]
LONGEST = 8192  # bytes of an input
FINDING = 77  # exit code of a child that found something


def readers(folder: Path) -> dict[str, tuple[Reader, list[bytes]]]:
    """Every reader by name, with examples of what it reads; files go to ``folder``."""
    import numpy as np
    import torch

    import unwrite
    from unwrite import cli, ledger, record
    from unwrite.base import Base
    from unwrite.change import Dense, LowRank, mask
    from unwrite.delta import Delta
    from unwrite.errors import UnwriteError
    from unwrite.forgetting import ForgettingMatrix, read_examples
    from unwrite.grid import Plan
    from unwrite.ledger import Ledger
    from unwrite.pretrained import check_folder
    from unwrite.prompts import read_prompts
    from unwrite.requirements import parse
    from unwrite.scores import from_json
    from unwrite.tasks import read_tasks
    from unwrite.tensorfile import TensorFile
    from unwrite.weights import fingerprint_of

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "input"

    def from_file(read: Callable[[Path], object]) -> Reader:
        def reader(data: bytes) -> object:
            file.write_bytes(data)
            return read(file)

        return reader

    # -- edits and tasks -----------------------------------------------------------------------

    def edits(path: Path) -> None:
        found = unwrite.read_edits(path)
        unwrite.write_edits(folder / "again.jsonl", found)
        assert unwrite.read_edits(folder / "again.jsonl") == found

    def pairs(data: bytes) -> None:
        old, _, new = data.partition(b"\n--\n")
        for name, part in (("old.json", old), ("new.json", new)):
            (folder / name).write_bytes(part)
        unwrite.read_pairs(folder / "old.json", folder / "new.json")

    # -- matrix --------------------------------------------------------------------------------

    matrix = folder / "matrix"
    made = ForgettingMatrix(np.eye(2, 3), ("a", "b"), ("x", "y", "z"), {"quantity": "q"})
    made.save(matrix)
    archive = (matrix / "matrix.npz").read_bytes()
    with zipfile.ZipFile(io.BytesIO(archive)) as packed:
        members = {name: packed.read(name) for name in packed.namelist()}

    def read_matrix(data: bytes) -> None:
        """The first byte says which part of the archive the others are; or all of it."""
        which, content = (data[0] % 7, data[1:]) if data else (0, b"")
        if which in (5, 6):
            (matrix / ("tasks.jsonl", "examples.jsonl")[which - 5]).write_bytes(content)
        elif which == 4:
            (matrix / "matrix.npz").write_bytes(content)
        else:
            name = f"{('values', 'tasks', 'examples', 'provenance')[which]}.npy"
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as written:
                for member, known in members.items():
                    written.writestr(member, content if member == name else known)
            (matrix / "matrix.npz").write_bytes(buffer.getvalue())
        try:
            ForgettingMatrix.load(matrix).rank_profile()
        finally:
            made.save(matrix)

    # -- ledger --------------------------------------------------------------------------------

    def use_ledger(path: Path) -> None:
        opened = Ledger.open(path)
        for entry in opened.entries:
            record.check_entry(entry, path)
        opened.live()
        for entry in opened.entries:
            cli._history_row({**entry, "live": True})
            if entry["do"] == "apply":
                for scores in entry["scores"].values():
                    from_json(scores)

    def read_ledger(data: bytes) -> None:
        """As it is, and with a hash chain made anew by somebody who knows how."""
        try:
            from_file(use_ledger)(data)
        except UnwriteError:
            previous, lines = ledger.START, []
            for number, line in enumerate(data.split(b"\n")):
                try:
                    entry = json.loads(line)
                    assert isinstance(entry, dict)
                    entry |= {"n": number, "previous": previous}
                    previous = entry["sha256"] = ledger._hash(entry)
                    lines.append(ledger._line(entry).encode() + b"\n")
                except (ValueError, AssertionError, RecursionError):
                    continue
            from_file(use_ledger)(b"".join(lines))

    score = {"token": 1.0, "exact": None, "n": 3}
    at = {"at": "2026-01-01T00:00:00Z", "by": "me", "unwrite": "0.1.0"}
    base = {"name": "toy", "fingerprint": "f" * 64, "sha256": "a" * 64}
    entries = [
        {"do": "init", **at, "base": base},
        {
            "do": "apply",
            "id": "u-00000001",
            **at,
            "why": "",
            "method": {"name": "full-ft"},
            "edits": 1,
            "scores": {when: {"reliability": score} for when in ("before", "after")},
            "perplexity": {"before": 1.0, "after": 2.0},
            "delta": {"encoding": "dense", "tensors": 1, "changed_fraction": 0.5, "bytes": 4},
            "fingerprint": "f" * 64,
            "files": dict.fromkeys(sorted(record.REQUIRED), "0" * 64),
        },
        {"do": "revert", "of": "u-00000001", **at, "why": "", "fingerprint": "f" * 64},
    ]
    chained = Ledger.create(_fresh(folder / "ledger.jsonl"), entries[0])
    for entry in entries[1:]:
        chained = chained.append(entry)

    # -- tensors -------------------------------------------------------------------------------

    delta = folder / "delta"
    Delta.from_changes(
        {
            "a": Dense(torch.ones(2, 2)),
            "b": LowRank(torch.ones(2, 1), torch.ones(1, 2)),
            "c": mask(torch.ones(3), torch.tensor([True, False, True])),
        }
    ).save(delta)
    description = (delta / "delta.json").read_bytes()
    shard = (delta / "00001.safetensors").read_bytes()

    def read_delta(data: bytes) -> None:
        """The first byte says which of the two files the others are."""
        which = data[:1] >= b"\x80"
        name, known = ("00001.safetensors", shard) if which else ("delta.json", description)
        (delta / name).write_bytes(data[1:])
        try:
            opened = Delta.open(delta)
            for tensor in opened:
                opened[tensor].dense()
            opened.verify()
            opened.summary().as_json()
        finally:
            (delta / name).write_bytes(known)

    def read_tensors(path: Path) -> None:
        opened = TensorFile(path)
        try:
            for name in opened.specs:
                opened.read(name)
        finally:
            opened.close()

    # -- settings ------------------------------------------------------------------------------

    model = folder / "model"
    model.mkdir(exist_ok=True)
    shards = dict.fromkeys(TensorFile(delta / "00001.safetensors").specs, "b.safetensors")
    index = json.dumps({"weight_map": shards}).encode()

    def read_config(data: bytes) -> None:
        """The first byte says which file: config.json, the index of shards, or base.json."""
        which, content = (data[0] % 3, data[1:]) if data else (0, b"")
        names = ("config.json", "model.safetensors.index.json", "base.json")
        (model / "config.json").write_bytes(b"{}")
        (model / "model.safetensors.index.json").write_bytes(index)
        (model / "b.safetensors").write_bytes(shard)
        (model / names[which]).write_bytes(content)
        if which == 2:
            Base.read(model)
        else:
            check_folder(model)
            unwrite.Weights.from_folder(model)

    home = {
        "name": "toy",
        "kind": "folder",
        "revision": None,
        "folder": "/nowhere",
        "dtype": "float32",
        "parameters": 1,
        "format": 1,
        "aliases": {"x": "y"},
        "fingerprint": fingerprint_of({"y": "h"}),
        "places": {"y": {"block": 0, "kind": "q"}},
        "files": {"config.json": {"size": 1, "modified": 1, "sha256": "h"}},
        "tensors": {"y": "h"},
    }

    def read_plan(data: bytes) -> None:
        (folder / "plan.json").write_bytes(data)
        Plan.read(folder)

    plan = {
        "format": 1,
        "base": {"name": "toy", "fingerprint": "f"},
        "protocol": {"start": "as is", "mode": "batch", "exact": True, "offset": 0},
        "methods": {"full-ft": {"name": "full-ft"}},
        "edits": {"e": {"source": "e", "records": 1, "sha256": "h"}},
        "cells": [
            {"name": "c", "method": "full-ft", "settings": {}, "edits": "e", "size": 1, "seed": 0}
        ],
    }

    def text_of(read: Callable[[str], object]) -> Reader:
        return lambda data: read(data.decode("utf-8", "surrogateescape"))

    return {
        "edits": (from_file(edits), [one.encode() for one in EDITS]),
        "edit pairs": (pairs, [PAIR.encode()]),
        "tasks": (from_file(read_tasks), [one.encode() for one in TASKS]),
        "examples": (
            from_file(read_examples),
            [b'{"prompt":"a","answer":"b","id":1}\n{"text":"c"}'],
        ),
        "prompts": (from_file(read_prompts), [b'a\n{"prompt":"b"}\n']),
        "matrix": (read_matrix, [b"\4" + archive, *_tagged(members.values())]),
        "ledger": (read_ledger, [chained.path.read_bytes()]),
        "delta": (read_delta, [b"\0" + description, b"\xff" + shard]),
        "safetensors": (from_file(read_tensors), [shard]),
        "config": (
            read_config,
            [b'\0{"model_type": "llama"}', b"\1" + index, b"\2" + json.dumps(home).encode()],
        ),
        "plan of a comparison": (read_plan, [json.dumps(plan).encode()]),
        "requirements": (text_of(lambda text: parse([text])), [b"locality>=0.9"]),
    }


EDITS = (
    '{"prompt":"a b","new":"c","old":"d","subject":"a","paraphrases":["e"],"bystanders":[{"prompt":'
    '"f","answer":"g"}],"portability":[{"prompt":"h","answer":"i"}],"id":"1"}\n',
    '[{"src":"q","alt":"n","answers":["o"],"rephrase":"r","loc":"nq question: l","loc_ans":"a",'
    '"subject":"q"}]',
    '[{"case_id":1,"requested_rewrite":{"prompt":"{} is","subject":"s","target_new":{"str":"n"},'
    '"target_true":{"str":"o"}},"paraphrase_prompts":["p"],"neighborhood_prompts":["x"]}]',
    '[{"prompt":"p","target_new":"n","ground_truth":"o","rephrase_prompt":"r","locality_prompt":"l"'
    ',"locality_ground_truth":"g","subject":"p"}]',
    '[{"subject":"s","prompt":"p","target_new":"n","ground_truth":["o"],"portability":{"Reasoning":'
    '[{"prompt":"x","ground_truth":[["y"]]}]},"locality":{"Relation_Specificity":[{"prompt":"x",'
    '"ground_truth":[["y"]]}]}}]',
)
PAIR = (
    '{"instruction":"a","input":"","output":"b"}\n--\n{"instruction":"a","input":"","output":"c"}'
)
TASKS = (
    '{"task":"t","instruction":"i","input":"x","output":"o","split":"train"}\n',
    '{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}\n',
    '{"prompt":"p","completion":"c"}\n',
)


def _tagged(contents: Any) -> Iterator[bytes]:
    for number, content in enumerate(contents):
        yield bytes([number]) + content


def _fresh(path: Path) -> Path:
    path.unlink(missing_ok=True)
    return path


# ---- one run -------------------------------------------------------------------------------------


def run_one(reader: Reader, data: bytes) -> bool:
    """Feed a reader; whether it accepted. Raises whatever a reader must not raise."""
    from unwrite.errors import UnwriteError
    from unwrite.formats import hidden

    try:
        reader(data)
    except UnwriteError as error:
        said = str(error)
        assert said, "an error without a sentence"
        assert not any(hidden(one) for one in said), f"what is shown acts on terminals: {said!r}"
        return False
    return True


TOKENS = (
    *(b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 400, b'"', b"\\ud800", b"\x00", b"\xff"),
    *(b"[", b"{", b"]" * 9, b"[" * 5000, b'{"a":' * 2000, b"\xef\xbb\xbf", b"\xe2\x80\xae"),
    *(b"\x1b[2J", b"../../x", b"\n", b"\r\n", b"\xf0\x9f\x92\xa9", b'"a":1,"a":2', b"a" * 3000),
)


def mutated(seed: bytes, draw: random.Random) -> bytes:
    """``seed`` after one to four random changes: bytes, tokens, cuts and repetitions."""
    data = bytearray(seed)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data) + 1)
        kind = draw.randrange(5)
        if kind == 0 and data:
            data[place % len(data)] = draw.randrange(256)
        elif kind == 1:
            data[place:place] = draw.choice(TOKENS)
        elif kind == 2:
            del data[place : place + draw.randint(1, 20)]
        elif kind == 3:
            data[place : place + draw.randint(1, 12)] = draw.choice(TOKENS)
        else:
            data[place:place] = data[place : place + draw.randint(1, 200)]
    return bytes(data)


def plainly(reader: Reader, seeds: list[bytes], seconds: float, seed: int) -> int:
    """Random mutations of the seeds for so long; the number of runs."""
    draw, runs, until = random.Random(seed), 0, time.monotonic() + seconds
    while time.monotonic() < until:
        data = mutated(draw.choice(seeds), draw)
        try:
            run_one(reader, data)
        except BaseException:
            print(f"input: {base64.b64encode(data).decode()}", file=sys.stderr)
            raise
        runs += 1
    return runs


def guided(reader: Reader, seeds: list[bytes], seconds: float, seed: int, folder: Path) -> None:
    """libFuzzer for so long; it ends the process, having said the number of runs."""
    import atheris

    corpus = folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, one in enumerate(seeds):
        (corpus / str(number)).write_bytes(one)
    arguments = [
        *(f"-max_total_time={max(1, round(seconds))}", "-timeout=10", "-rss_limit_mb=3000"),
        *(f"-max_len={LONGEST}", "-print_final_stats=1", f"-seed={seed + 1}"),
        f"-artifact_prefix={folder}/",
    ]
    atheris.Setup(
        [sys.argv[0], *arguments, str(corpus)], lambda data: run_one(reader, data) and None
    )
    atheris.Fuzz()


def child(name: str, seconds: float, seed: int, plain: bool) -> None:
    """Fuzz one reader in this process."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as place:
        folder = Path(place)
        if plain:
            reader, seeds = readers(folder / "files")[name]
            runs = plainly(reader, seeds, seconds, seed)
            print(f"stat::number_of_executed_units: {runs}", file=sys.stderr)
            return
        import atheris

        with atheris.instrument_imports(include=["unwrite"]):
            reader, seeds = readers(folder / "files")[name]
        guided(reader, seeds, seconds, seed, folder)


def main() -> None:
    """Fuzz readers one after another, each in a process of its own, and add up the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reader", action="append")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.seconds, options.seed, options.plain)
        return
    with tempfile.TemporaryDirectory() as place:
        known = list(readers(Path(place)))
    found: dict[str, dict[str, Any]] = {}
    if (RESULTS / "fuzz.json").exists():
        found = committed("fuzz")["readers"]
    for name in options.reader or known:
        words = ["--child", name, "--seconds", str(options.seconds), "--seed", str(options.seed)]
        if options.plain:
            words.append("--plain")
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.fuzz", *words],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        runs = re.findall(r"number_of_executed_units: (\d+)|Done (\d+) runs", done.stderr)
        count = max((int(number) for pair in runs for number in pair if number), default=0)
        known_so_far = found.get(name, {"executions": 0, "seconds": 0.0, "open_findings": 0})
        engine = "plain" if options.plain else "atheris"
        found[name] = {
            "executions": known_so_far["executions"] + count,
            "seconds": known_so_far["seconds"] + time.monotonic() - started,
            "open_findings": int(done.returncode != 0),
            "engine": engine,
        }
        if done.returncode != 0:
            shown = done.stdout[-4000:] + done.stderr[-2000:]
            print(f"{name}: a finding\n{shown}", file=sys.stderr)
        write(
            "fuzz", {"readers": found, "executions": sum(x["executions"] for x in found.values())}
        )


if __name__ == "__main__":
    main()
