"""Importing the package is quick: it brings in no package that PEFT and timm have not brought in."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import peft, timm
before = {name.partition(".")[0] for name in sys.modules}
import peft_edge
print(*{name.partition(".")[0] for name in sys.modules} - before)
"""


@pytest.mark.slow
def test_no_other_package_is_imported() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["peft_edge"]
