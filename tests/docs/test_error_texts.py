"""The page on errors has every text that the package raises, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import fused_rin
import pytest
import torch
from fused_rin import diagnostics

from tools import error_texts

PAGE = Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md"
ENTRY = re.compile(r"^- (`+)(.*?)\1(?!`)", re.MULTILINE)


def entries() -> list[str]:
    return [text.strip() for _, text in ENTRY.findall(PAGE.read_text())]


def test_the_page_has_every_text_and_no_other():
    raised, listed = error_texts.texts(), entries()
    assert len(listed) == len(set(listed))
    assert {text: place for text, place in raised.items() if text not in listed} == {}, "not on the page"
    assert [text for text in listed if text not in raised] == [], "on the page, and raised no more"


def test_every_group_says_what_to_do():
    """A section says it of all its texts, or each text says it, as a long one does."""
    for section in PAGE.read_text().split("\n## ")[1:]:
        lines = [line for line in section.splitlines() if line.startswith("- `")]
        unsaid = [line for line in lines if line.endswith("`") and len(line) < 100]
        assert not unsaid or re.search(r"Cause: .*\bDo(:| what)", section, re.DOTALL), unsaid


@pytest.mark.parametrize(
    "call",
    [
        lambda: fused_rin.RIN(3, 4, skip="1"),
        lambda: fused_rin.RIN(3, 4)(torch.zeros(2, 1, 5)),
        lambda: fused_rin.RIN(3, 4).load_state_dict(torch.nn.RNN(3, 4).state_dict()),
        lambda: fused_rin.RIN.from_rnn(torch.nn.LSTM(3, 4)),
        lambda: fused_rin.RIN(3, 4, backend="cuda")(torch.zeros(2, 1, 3)),
        lambda: fused_rin.recurrence(torch.zeros(2, 1, 1, 4), torch.zeros(1, 4, 4), lengths=[3]),
        lambda: diagnostics.eigenvalues(torch.nn.LSTM(3, 4)),
    ],
)
def test_what_is_raised_is_found_on_the_page(call):
    """By who searches for it: the text fits an entry, the reason in it another one."""
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        call()
    patterns = [".*?".join(map(re.escape, text.split(error_texts.VARIES))) for text in entries()]
    text = " ".join(str(caught.value).split())
    assert any(len(pattern) > 20 and re.search(pattern, text) for pattern in patterns), text


def test_texts_of_python_are_read():
    source = """
def f(x):
    raise ValueError(f"{x} must be one of {x!r}{x}, "
                     "got " + str(x))
    raise
def _reason(x):
    return "no" if x else f"not {x}"
    return None
"""
    assert sorted(text for _, text in error_texts.of_python(source)) == ["no", "not …", "… must be one of …, got …"]


def test_a_text_that_is_made_elsewhere_is_refused():
    with pytest.raises(SystemExit, match="source:1"):
        list(error_texts.of_python("raise ValueError(text)"))


def test_texts_of_cpp_are_read():
    source = """
void check(bool right, const char* what) {  // throw std::runtime_error("in a comment");
  if (!right) throw std::runtime_error(message.str());
}
void f(int x, const std::string& s) {
  check(x > g("a", 1), "x must be \\"large\\", got ", x, "; "
        "see ", x ? "a" : "b");
  throw std::invalid_argument("size " + std::to_string(x) + ": " + std::string("odd (") + s + ")");
}
"""
    assert [text for _, text in error_texts.of_cpp(source, checks=True)] == [
        'fused_rin: x must be "large", got …; see …',
        "size …: odd (…)",
    ]
