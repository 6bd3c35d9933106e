"""Other libraries' output is silenced while our own calls last, and not longer."""

from __future__ import annotations

import pytest
from transformers.utils import logging

from s2moe.training.quiet import no_prints, no_progress_bars


def test_prints_are_silenced_within(capsys: pytest.CaptureFixture[str]) -> None:
    with no_prints():
        print("memory used")
    print("step 1")
    assert capsys.readouterr().out == "step 1\n"


@pytest.mark.parametrize("shown", [True, False])
def test_progress_bars_are_as_before_afterwards(shown: bool) -> None:
    (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
    with no_progress_bars():
        assert not logging.is_progress_bar_enabled()
    assert logging.is_progress_bar_enabled() is shown
    logging.enable_progress_bar()
