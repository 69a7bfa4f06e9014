"""A process for one peer on one number of threads; `run.py` starts them one after the other.

    python -m benchmarks.peers.block JOB.json      written by run.py: peer, threads, cases, seconds, file of the rows

Engines keep threads that wait for work by spinning, for milliseconds or for ever, and take a processor from whoever is
timed next. In processes of their own they are gone before the next engine starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import Case, Measurement


@dataclass
class Block:
    """What a process is to do; `file` gets a line of JSON for every row as it is finished."""

    peer: str
    threads: int
    cases: list[Case]
    file: Path
    seconds: float = 0.2  # of timing, for each case; at least five calls
    implementation: Any = field(default=None, repr=False)

    @classmethod
    def load(cls, path: Path) -> Block:
        content = json.loads(path.read_text())
        return cls(**{**content, "cases": [Case(**case) for case in content["cases"]], "file": Path(content["file"])})

    def save(self, path: Path) -> None:
        content = {"peer": self.peer, "threads": self.threads, "file": str(self.file), "seconds": self.seconds}
        path.write_text(json.dumps({**content, "cases": [asdict(case) for case in self.cases]}))

    @contextlib.contextmanager
    def row(self, case: Case) -> Iterator[Measurement]:
        """Written at the end in any case; what went wrong becomes its note, and the test fails."""
        row = Measurement(self.peer, case)
        try:
            yield row
        except Exception as error:
            lines = str(error).splitlines() or [""]
            row.note = f"{type(error).__name__}: {lines[0]}"
            traceback.print_exc()
            raise
        finally:
            with self.file.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")

    def checked(self, case: Case, row: Measurement) -> Any:
        """What is to be timed. Raises NotEqual if it is not the same function as nn.RNN in float64."""
        from benchmarks.peers.protocol import SHORT, check, make_job
        from benchmarks.peers.torch_rnn import reference

        sizes = {SHORT, case.steps} if case.mode == "training" and case.steps > SHORT else {case.steps}
        for steps in sorted(sizes):  # the last is what is timed
            sized = dataclasses.replace(case, steps=steps)
            job = make_job(sized)
            want = reference(job)
            run = self.implementation.start(job)
            run.call()  # the second call is what is checked: gradients must not add up
            row.distance = check(sized, run.tensors(run.call()), want)
        row.zero_states = round(float((want["output"] == 0).double().mean()), 4)
        return run


class Chosen:
    """Hands the block to test_block.py."""

    def __init__(self, block: Block) -> None:
        self.given = block

    @pytest.fixture(scope="session")
    def block(self) -> Block:
        return self.given

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        from benchmarks.peers.cases import label

        metafunc.parametrize("case", self.given.cases, ids=label)


def main() -> int:
    block = Block.load(Path(sys.argv[1]))
    from benchmarks.peers.registry import PEERS  # imports torch, but no other engine

    peer = PEERS[block.peer]
    os.environ.update(peer.environment(block.threads))
    block.implementation = peer(block.threads)
    arguments = [
        str(Path(__file__).with_name("test_block.py")), "--benchmark-enable", "--benchmark-disable-gc",
        f"--benchmark-max-time={block.seconds}", "--benchmark-min-rounds=5", "--benchmark-warmup=on",
        "--benchmark-warmup-iterations=2", "--benchmark-quiet", "-q", "-p", "no:cacheprovider",
    ]  # fmt: skip
    return pytest.main(arguments, plugins=[Chosen(block)])


if __name__ == "__main__":
    sys.exit(main())
