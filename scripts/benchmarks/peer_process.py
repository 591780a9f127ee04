"""Our end of a peer: another library that works in a process of its own (`peers.py`), asked line by line of JSON."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


class Peer:
    """Another library in a process of its own; it sleeps while it is not asked."""

    def __init__(self, python: str, setup: Figures):
        self.name = setup["peer"]
        peers = Path(__file__).with_name("peers.py")
        self.log = Path(f"{self.name}.log")
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [python, str(peers)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self.versions = self.ask(setup)["versions"]

    def ask(self, message: Figures) -> Figures:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "it ended without an answer"}')
        if "error" in answer:
            raise ValueError(f"peer {self.name}: {answer['error']} (see {self.log})")
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Peers(dict[str, Peer]):
    """The peers of one measurement, by name; ended with it."""

    def __init__(self, pythons: dict[str, str], setup: Figures):
        """pythons: the interpreter of each peer's environment."""
        super().__init__()
        for name, python in pythons.items():
            self[name] = Peer(python, {"peer": name} | setup)

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self.values():
            peer.close()
