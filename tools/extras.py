"""Prints the requirements of the named extras of pyproject.toml, one word each, for `pip install`."""

import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

extras = tomllib.loads(Path(__file__).parent.with_name("pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
if __name__ == "__main__":
    print(*sorted({requirement for name in sys.argv[1:] for requirement in extras[name]}))
