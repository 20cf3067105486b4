"""The examples of the guides run as they stand."""

import re
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[1] / "docs" / "plug-in.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def test_there_are_three_examples():
    assert len(EXAMPLES) == 3


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example(number, capsys):
    scope: dict = {}
    exec(compile(EXAMPLES[number], f"{GUIDE.name}, example {number + 1}", "exec"), scope)
    if number == 0:
        assert "kl_fake" in capsys.readouterr().out
