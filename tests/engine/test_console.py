"""Messages on the terminal."""

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only

from codegrid.engine.console import log_line, refresh_interval


@pytest.mark.parametrize(("rank", "printed"), [(0, "look\n"), (1, "")])
def test_only_the_main_rank_prints_and_only_to_standard_error(
    rank: int, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    log_line("look")
    assert capsys.readouterr() == ("", printed)


def test_a_progress_bar_writes_few_lines_into_a_log_file() -> None:
    assert refresh_interval() >= 10
