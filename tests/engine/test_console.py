""""""

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only

from engine.console import log_line, refresh_interval


@pytest.mark.parametrize(("rank", "printed"), [(0, "look\n"), (1, "")])
def test_of_many_processes_one_tells_and_not_on_standard_output(
    rank: int, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    log_line("look")
    assert capsys.readouterr() == ("", printed)


def test_a_bar_in_a_log_file_writes_few_lines() -> None:
    assert refresh_interval() >= 10
