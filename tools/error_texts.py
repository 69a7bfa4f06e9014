"""The texts of all errors that the package raises, as they stand in its sources; what varies in one is "…".

    python -m tools.error_texts    prints them, each with where it is

Python: what `raise` says, and the reasons that other texts pass on (what functions such as `unavailable_reason` return,
what `load_state_dict` collects). C++: `throw`, and `check` of csrc/operators. Raises SystemExit for a text that is
neither a literal nor made of some, which could not be found by who looks for it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = (*sorted((ROOT / "python/fused_rin").glob("*.py")), *sorted((ROOT / "triton_kernels").glob("*.py")))
NATIVE = tuple(
    path
    for path in sorted((ROOT / "csrc").rglob("*"))
    if path.suffix in (".h", ".cpp", ".cu", ".cuh") and "cuda_on_cpu" not in path.parts  # which only tests build
)
VARIES = "…"
# Functions that say why something cannot be, by their name; and the variables that hold such a reason.
REASON = re.compile(r"(^|_)(reason|why|failure|missing)(_|$)")
NO_ERRORS = {"explanation.py"}  # whose reasons are of calls that go well


def texts() -> dict[str, str]:
    """{text: "file:line" of the first place that it is raised at}."""
    found: dict[str, str] = {}
    for path in PYTHON:
        for line, text in of_python(path.read_text(), path):
            found.setdefault(text, f"{path.relative_to(ROOT)}:{line}")
    for path in NATIVE:
        for line, text in of_cpp(path.read_text(), checks="operators" in path.parts):
            found.setdefault(text, f"{path.relative_to(ROOT)}:{line}")
    return found


def tidy(text: str) -> str:
    """One line, and what varies as one sign however many parts it is made of."""
    return re.sub(rf"{VARIES}+", VARIES, " ".join(text.split()))


# ---- Python


def of_python(source: str, path: Path = Path("source")) -> Iterator[tuple[int, str]]:
    """(line, text) of a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if not node.exc.args:
                continue
            text = literal(node.exc.args[0])
            if text is None:
                raise SystemExit(
                    f"{path}:{node.lineno}: the text of an error is made elsewhere; write it where it is raised"
                )
            yield node.lineno, tidy(text)
        for value in () if path.name in NO_ERRORS else reasons(node):
            for choice in (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,):
                text = literal(choice)
                if text is not None and text.strip(VARIES):
                    yield choice.lineno, tidy(text)


def reasons(node: ast.AST) -> Iterator[ast.expr]:
    """Expressions that are reasons."""
    if isinstance(node, ast.FunctionDef) and REASON.search(node.name):
        yield from (n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value is not None)
    elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and REASON.search(node.targets[0].id):
        yield node.value
    elif isinstance(node, ast.Call) and ast.unparse(node.func) == "error_msgs.append":
        yield node.args[0]


def literal(node: ast.expr) -> str | None:
    """The text of a string, of an f-string, or of a sum of them; None for another expression."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else VARIES for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = literal(node.left), literal(node.right)
        return None if sides == (None, None) else "".join(VARIES if side is None else side for side in sides)
    return None


# ---- C++

STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')


def of_cpp(source: str, checks: bool) -> Iterator[tuple[int, str]]:
    """(line, text) of a file; with `checks`, of what its `check(right, parts...)` say too."""
    source = re.sub(r"//[^\n]*", lambda match: " " * len(match[0]), source)
    for match in re.finditer(r"\bthrow std::\w+\(|(?<![\w.:])check\(" if checks else r"\bthrow std::\w+\(", source):
        is_check = match[0] == "check("
        parts = split(argument_list(source, match.end()), "," if is_check else "+")
        if is_check:
            if parts[0].startswith("bool "):  # its definition
                continue
            parts = ['"fused_rin: "', *parts[1:]]
        text = tidy("".join(spoken(part) for part in parts))
        if text.strip(VARIES):
            yield source.count("\n", 0, match.start()) + 1, text


def argument_list(source: str, start: int) -> str:
    """What stands between the parenthesis before `start` and the one that closes it."""
    depth, at = 1, start
    while depth:
        if source[at] == '"':
            at = STRING.match(source, at).end()  # type: ignore[union-attr]
            continue
        depth += (source[at] in "([{") - (source[at] in ")]}")
        at += 1
    return source[start : at - 1]


def split(text: str, separator: str) -> list[str]:
    """By a separator that stands in no string and no parentheses."""
    parts, depth, at = [""], 0, 0
    while at < len(text):
        string = STRING.match(text, at)
        if string:
            parts[-1] += string[0]
            at = string.end()
            continue
        depth += (text[at] in "([{") - (text[at] in ")]}")
        if text[at] == separator and not depth:
            parts.append("")
        else:
            parts[-1] += text[at]
        at += 1
    return [part.strip() for part in parts]


def spoken(part: str) -> str:
    """Of a part of a sum: the text of literals, or of one in std::string(...); anything else varies."""
    inside = re.fullmatch(r"std::string\((.*)\)", part, re.DOTALL)
    part = inside[1] if inside else part
    if re.fullmatch(rf"(?:{STRING.pattern}\s*)+", part):
        return "".join(re.sub(r"\\(.)", r"\1", text) for text in STRING.findall(part))
    return VARIES


if __name__ == "__main__":
    for text, place in texts().items():
        print(f"{place}: {text}")
