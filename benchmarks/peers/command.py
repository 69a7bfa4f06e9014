"""What `fused-rin bench` does."""

from __future__ import annotations

from pathlib import Path

from fused_rin.experiments.errors import UserError

from benchmarks.harness import Results
from benchmarks.peers import cases, compare, report
from benchmarks.peers.registry import OURS, PEERS
from benchmarks.peers.run import Choice, failures, missing, run

CPU_TABLE = "cpu"  # what the RIN is called in the results of `make bench-cpu`


def choose(peers: str, threads: str, only: str, quick: bool, passes: int = 1) -> Choice:
    """Of what was typed. Raises UserError for what there is not."""
    names = tuple(name.strip() for name in peers.split(",")) if peers else tuple(PEERS)
    if unknown := [name for name in names if name not in PEERS]:
        raise UserError(f"--peers: unknown {', '.join(map(repr, unknown))}; known: {', '.join(PEERS)}")
    try:
        numbers = tuple(int(number) for number in threads.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise UserError(f"--threads must be numbers above 0 with commas between, got {threads!r}")
    if passes < 1:
        raise UserError(f"--passes must be above 0, got {passes}")
    choice = Choice(names, numbers, only, quick, passes)
    if not any(choice.cases(group) for group in cases.GROUPS):
        raise UserError(f"--only: no case is like {only!r}; --list shows them")
    return choice


def listing(choice: Choice) -> str:
    lines = ["peers:"]
    for peer in choice.peers:
        reason = missing(peer)
        lines.append(f"  {peer:<14} {f'missing: {reason}' if reason else 'here'}")
    for group in cases.GROUPS:
        lines += [f"{group}:", *(f"  {cases.label(case)}" for case in choice.cases(group))]
    return "\n".join(lines)


def measure(choice: Choice, out: Path) -> int:
    """Runs, writes results, table and pictures; 1 if a row failed that was to be timed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    results = run(choice, out)
    for peer, reason in results.machine["missing"].items():
        print(f"missing: {peer}: {reason}")
    print("\n".join(map(str, [out, *report.write(results, out)])))
    return 1 if failures(results.rows) else 0


def check_results(path: Path) -> Results:
    try:
        return Results.load(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of results ({type(error).__name__}: {error})") from None


def compare_files(old: Path, new: Path) -> int:
    loaded = [check_results(path) for path in (old, new)]
    names = [{row.implementation for row in results.rows} for results in loaded]
    ours = next((name for name in (OURS, CPU_TABLE) if all(name in known for known in names)), OURS)
    return compare.compare(old, new, ours)


def redraw(path: Path) -> int:
    print("\n".join(map(str, report.write(check_results(path), path))))
    return 0
