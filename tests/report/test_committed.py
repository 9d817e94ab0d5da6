"""What lies in `reports/` is what its records say."""

from __future__ import annotations

import shutil
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from peft_edge.report import write_report

pytestmark = pytest.mark.slow  # half a minute, most of it for figures

REPORTS = Path(__file__).parents[2] / "reports"


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report, made again from the records alone."""
    out = tmp_path_factory.mktemp("made") / "reports"
    for folder in ("results", "bench"):
        shutil.copytree(REPORTS / folder, out / folder)
    write_report(out / "results", out, bench=out / "bench")
    return out


@pytest.mark.parametrize("name", ["README.md", "data.csv"])
def test_page_and_data_are_those_of_the_records(again: Path, name: str) -> None:
    assert (again / name).read_bytes() == (REPORTS / name).read_bytes()


def test_figures_are_those_of_the_records(again: Path) -> None:
    committed = sorted((REPORTS / "figures").glob("*.png"))
    assert [file.name for file in committed] == sorted(file.name for file in (again / "figures").glob("*.png"))
    for file in committed:
        with Image.open(file) as picture, Image.open(again / "figures" / file.name) as made:
            if matplotlib.__version__ not in picture.info["Software"]:
                pytest.skip(f"{file} was drawn by {picture.info['Software']}: pixels differ between versions")
            assert picture.tobytes() == made.tobytes()
