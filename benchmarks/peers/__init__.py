"""Other tools, each in an environment of its own that is made from PyPI, and asked line by line.

The environments lie under ``build/peers`` and are made once. They see the packages of this one (so
that a peer runs on the same torch), unless the peer asks for other versions; nothing of a peer is
ever seen here. Scripts named ``run_...`` run there and import nothing of unwrite.
"""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent.parent / "build" / "peers"


def environment(name: str, *requirements: str, dependencies: bool = True) -> Path:
    """The Python of the environment that has these requirements; made if it is not there."""
    folder = ENVIRONMENTS / name
    python, ready = folder / "bin" / "python", folder / "ready"
    wanted = "\n".join(requirements)
    if not ready.exists() or ready.read_text("utf-8") != wanted:
        venv.create(folder, clear=True, with_pip=True)
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "shared.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", "utf-8")
        words = ["-m", "pip", "install", "--quiet", *([] if dependencies else ["--no-deps"])]
        subprocess.run([python, *words, *requirements], check=True)
        ready.write_text(wanted, "utf-8")
    return python


class Peer:
    """A script that runs in another environment: a line of JSON to it is answered by one.

    What it says on its standard error goes to ``said``, and is shown when it gives no answer.
    """

    def __init__(
        self, python: Path, script: str, said: Path, arguments: Sequence[str] = ()
    ) -> None:
        self.said = said
        self.process = subprocess.Popen(
            [python, HERE / script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said.open("w"),
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()

    def ask(self, **order: Any) -> dict[str, Any]:
        """Its answer. Raises ``SystemExit`` with its last words if it gives none."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(self.said.read_text("utf-8")[-4000:])
        answer: dict[str, Any] = json.loads(line)
        return answer
