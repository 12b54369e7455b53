import pytest

from codegrid.engine.errors import summarize_error


class Odd(Exception):
    """An exception of no class that a program could list."""


@pytest.mark.parametrize(
    ("error", "summary"),
    [
        (ValueError("one line"), "one line"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
        (RuntimeError("\n  first\nsecond"), "first"),
        (RuntimeError("downloading x:\nhost:\nnot known"), "downloading x: host: not known"),
        (Odd("why"), "Odd: why"),
        (KeyError("rows"), "KeyError: 'rows'"),
        (Odd(), "Odd"),
        (Odd("\n \n"), "Odd"),
        (ValueError("x" * 500), "x" * 197 + "..."),
    ],
)
def test_an_exception_is_summarized_on_one_line(error: Exception, summary: str) -> None:
    assert summarize_error(error) == summary
