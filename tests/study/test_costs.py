from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_edge.profiling import analyse
from peft_edge.study.costs import CostCell, CostGrid, CostSetting, analyse_cost, cost_cells
from peft_edge.study.networks import load_network

SMALL = {"batch_size": 2, "image_size": 32}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.json"
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    names = {"model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 50}
    file.write_text(json.dumps({**names, **shape}), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ({"method": "full", "norm": "stats"}, {"adapter": {"norm": "stats"}}),
        (
            {"method": "lora", "lora_rank": 2, "target_modules": "dense", "norm": "frozen", "lean": "bit"},
            {
                "lora_rank": 2,
                "adapter": {"target_modules": "dense", "norm": "frozen"},
                "lean": {"masks": "bit", "fold_norm": False},
            },
        ),
        ({"method": "galore", "lora_rank": 2}, {"adapter": {"rank": 2}}),
        ({"method": "full", "accounting": "source-study"}, {"accounting": "source-study"}),
    ],
)
def test_a_cost_is_that_of_the_analysis(setting: dict, options: dict) -> None:
    record = analyse_cost("resnet10t", CostSetting(**setting, **SMALL))
    expected = analyse(load_network("resnet10t"), setting["method"], **SMALL, **options)
    assert record.profile == expected.profile[0]
    assert record.setting["lora_rank"] == setting.get("lora_rank")
    assert (record.network, record.kind, record.method) == ("resnet10t", "standard", setting["method"])


def test_what_means_nothing_is_null(bert: Path) -> None:
    cnn, language = (CostSetting(method="full").applicable_to(network) for network in ("resnet18", str(bert)))
    assert (cnn.lora_rank, cnn.target_modules, cnn.sequence_length, cnn.image_size) == (None, None, None, 224)
    assert (language.lora_rank, language.norm, language.sequence_length, language.image_size) == (None, None, 512, None)
    assert CostSetting(method="galore").applicable_to("resnet18").lora_rank == 4


def test_every_network_has_every_setting(bert: Path, tmp_path: Path) -> None:
    block = CostGrid(networks=["resnet18", "*.json"], grid={"method": ["full", "lora"], "batch_size": [1, 2]})
    cells = cost_cells(block, tmp_path / "grid.yaml", tmp_path / "out")
    assert [cell.name for cell in cells] == [
        f"{network}--{method}--batch_size={batch_size}"
        for network in ("resnet18", "tiny")
        for method in ("full", "lora")
        for batch_size in (1, 2)
    ]


def test_a_cell_is_finished_until_something_else_is_asked(bert: Path, tmp_path: Path) -> None:
    def cell(length: int) -> CostCell:
        grid = {"method": ["full"], "batch_size": [1], "sequence_length": [length]}
        (found,) = cost_cells(CostGrid(networks=["tiny.json"], grid=grid), tmp_path / "grid.yaml", tmp_path / "out")
        return CostCell(found.setting, tmp_path / "out" / "a", found.network, found.asked)

    assert not cell(8).is_finished
    cell(8).run()
    assert cell(8).is_finished
    assert not cell(16).is_finished
    (tmp_path / "out" / "a" / "record.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"record\.json is damaged: delete it"):
        _ = cell(8).record


@pytest.mark.parametrize(
    ("networks", "grid", "message"),
    [
        (["resnet81"], {"method": ["full"]}, "resnet81 is no timm model"),
        (["none*.json"], {"method": ["full"]}, r"no file is found for none\*\.json"),
        (["resnet18"], {"method": ["full"], "lora_rank": [0, 4]}, "1 analyses cannot be configured(?s:.*)lora_rank"),
        (["resnet18"], {"batch_size": [1]}, "method"),
        (["resnet18"], {"method": ["full"], "batch": [1]}, "batch"),
        (["resnet18"], {"method": ["fulll"]}, "unknown method 'fulll'; the nearest is 'full'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, networks: list[str], grid: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cost_cells(CostGrid(networks=networks, grid=grid), tmp_path / "grid.yaml", tmp_path)
