"""The README's code runs as it stands."""

import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def code(heading: str) -> str:
    """The first indented block under a heading that begins with an import."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    block = re.search(r"(?:^    import .*\n)(?:^(?:    .*)?\n)+", section, re.MULTILINE)
    return re.sub(r"^    ", "", block.group(), flags=re.MULTILINE)


def test_the_loop_for_any_model_prunes_what_it_says():
    """60 steps end at 0.2 remaining; of some 100,000 parameters the last to go may be missing."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code("Any model"), "README.md", "exec"), {})
    assert abs(float(printed.getvalue().splitlines()[-1]) - 0.8) < 1e-4
