"""A hundred kills and twenty interrupts at random moments: none blocks the way back, none gives another result."""
import os

import pytest
from kills import main


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_kills_and_interrupts():
    assert main(["--kills", "100", "--interrupts", "20", "--jobs", str(max(os.cpu_count() // 2, 1))]) == 0
