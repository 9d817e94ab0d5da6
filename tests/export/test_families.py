"""The guide's table of families: what it says of some of them is still so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from peft_edge.export.device import StepReport
from tests.export.families import FAMILIES, export_family

GUIDE = Path(__file__).parents[2] / "peft_edge/export/README.md"
ROW = re.compile(r"^\| `(\w+)` \| `(\w+)` \| (yes|no)[^|]* \|$", re.MULTILINE)


def rows() -> dict[str, tuple[str, str]]:
    return {family: (name, exported) for family, name, exported in ROW.findall(GUIDE.read_text())}


def test_guide_lists_every_family() -> None:
    assert {family: name for family, (name, _) in rows().items()} == FAMILIES


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mobilenetv3", "ghostnet", "convnext"])
def test_guide_says_whether_a_family_can_be_exported(family: str) -> None:
    name, exported = rows()[family]
    found = export_family(name)
    if exported == "yes":
        assert isinstance(found, StepReport), found
        assert found.double_difference <= 1e-10
    else:
        assert isinstance(found, str)
        assert "cannot be exported: no ONNX operator is known for aten." in found
