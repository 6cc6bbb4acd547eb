"""docs/reliability.md tells what bad input gets; this gives it, and looks."""

from __future__ import annotations

import pytest
from bad_inputs import BEGIN, CASES, END, PAGE, table


@pytest.mark.slow
def test_bad_input_gets_the_line_that_the_page_promises() -> None:
    text = PAGE.read_text()
    promised = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert len(CASES) >= 25
    for found, line in zip(table().splitlines(), promised.splitlines(), strict=True):
        assert found == line, "run python tests/bad_inputs.py"
