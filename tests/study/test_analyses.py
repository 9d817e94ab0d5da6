"""Cost analyses of timm networks and language models, as jobs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from peft_edge.config.schema import COST_KEYS
from peft_edge.profiling import analyse
from peft_edge.study.analyses import (
    TRANSFORMER_METHODS,
    CostJob,
    CostSetting,
    analyse_cost,
    analyse_replay,
    analyse_transformer,
    kind_of,
    load_network,
)
from peft_edge.study.grid import CostGrid, cost_jobs

ROOT = Path(__file__).parents[2]
HIDDEN, LAYERS, INTERMEDIATE, VOCABULARY = 32, 2, 48, 100
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": INTERMEDIATE,
    "vocab_size": VOCABULARY,
}
STEP = {"batch_size": 2, "sequence_length": 8}


@pytest.fixture
def llama(tmp_path: Path) -> nn.Module:
    (tmp_path / "tiny.json").write_text(json.dumps(TINY), encoding="utf-8")
    return load_network(str(tmp_path / "tiny.json"))


@pytest.mark.parametrize(
    ("network", "kind"),
    [("mobilenetv2_035", "depthwise"), ("resnet10t", "standard"), ("configs/networks/bert-base.json", "transformer")],
)
def test_kind_of_each_network(network: str, kind: str) -> None:
    assert kind_of(load_network(str(ROOT / network) if network.endswith("json") else network)) == kind


@pytest.mark.parametrize(
    ("name", "parameters"), [("bert-base", 109_483_778), ("llama-1b", 1_235_814_400), ("llama-7b", 6_738_415_616)]
)
def test_shipped_language_models_have_the_published_sizes(name: str, parameters: int) -> None:
    """The sizes of bert-base-uncased with two classes, Llama-3.2-1B and Llama-2-7b on the Hub."""
    model = load_network(str(ROOT / "configs" / "networks" / f"{name}.json"))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert all(parameter.is_meta for parameter in model.parameters())


def test_adapters_cover_every_linear_layer_but_the_last(llama: nn.Module) -> None:
    lora = analyse_transformer(llama, "lora", 4, **STEP)
    attention, mlp = 4 * (HIDDEN + HIDDEN), 3 * (HIDDEN + INTERMEDIATE)
    assert lora.num_trainable_params == 4 * LAYERS * (attention + mlp)
    dora = analyse_transformer(llama, "dora", 4, **STEP)
    assert dora.num_trainable_params - lora.num_trainable_params == LAYERS * (5 * HIDDEN + 2 * INTERMEDIATE)


def test_galore_projects_the_layers_that_lora_adapts(llama: nn.Module) -> None:
    """AdamW stores two numbers per weight; GaLore two per entry of the projected gradient, and the basis."""
    full, galore = (analyse_transformer(llama, method, 4, **STEP) for method in ("full", "galore"))
    plain = 2 * (2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN)
    # Square and tall matrices are projected on the right, wide ones on the left.
    projected = LAYERS * 4 * (2 * 4 * HIDDEN + 4 * HIDDEN) + LAYERS * 3 * (2 * 4 * INTERMEDIATE + 4 * HIDDEN)
    assert galore.memory.peak["optimizer"] == pytest.approx(4 * (plain + projected), rel=0.01)
    assert galore.flops.forward == full.flops.forward


def test_unknown_method_is_named(llama: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"method is 'bias', expected one of {', '.join(TRANSFORMER_METHODS)}"):
        analyse_transformer(llama, "bias", 4, **STEP)


@pytest.mark.parametrize(
    "text",
    ["{", '{"model_type": "llama"}', '{"model_type": "llama", "architectures": ["X"]}', '{"architectures": ["X"]}'],
)
def test_invalid_transformers_configuration_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json is not the configuration of a Transformers model"):
        load_network(str(tmp_path / "a.json"))


def test_replayed_step_costs_the_last_stage() -> None:
    """Its backward pass costs less than two forward passes, because the first layer needs no input gradient."""
    adapter = {"target_modules": "last-stage", "norm": "frozen"}
    replay = analyse_replay(
        load_network("mobilenetv2_035"), "lora", adapter=adapter, lora_rank=4, batch_size=16, image_size=64,
        accounting="exact",
    )  # fmt: skip
    whole = analyse(load_network("mobilenetv2_035"), "full", batch_size=16, image_size=64)
    names = (f"base_model.model.{name}" for name in ("blocks.6", "conv_head", "classifier"))
    last_stage = sum(whole.flops.by_module[name].forward for name in names)
    assert last_stage < replay.flops.forward < 1.2 * last_stage
    assert replay.flops.backward < 2.5 * last_stage


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
                "lean": {"masks": "bit", "inplace_norm": False},
            },
        ),
        ({"method": "galore", "lora_rank": 2}, {"adapter": {"rank": 2, "norm": "stats"}}),
        (
            {"method": "full", "accounting": "source-study"},
            {"adapter": {"norm": "stats"}, "accounting": "source-study"},
        ),
    ],
)
def test_record_equals_the_analysis(setting: dict, options: dict) -> None:
    record = analyse_cost("resnet10t", CostSetting(**setting, **SMALL))
    expected = analyse(load_network("resnet10t"), setting["method"], **SMALL, **options)
    assert record.profile == expected.profile[0]
    assert record.setting["lora_rank"] == setting.get("lora_rank")
    assert (record.network, record.kind, record.method) == ("resnet10t", "standard", setting["method"])


def test_options_that_do_not_apply_are_null(bert: Path) -> None:
    cnn, language = (CostSetting(method="full").applicable_to(network) for network in ("resnet18", str(bert)))
    assert (cnn.lora_rank, cnn.target_modules, cnn.sequence_length, cnn.image_size) == (None, None, None, 224)
    assert (language.lora_rank, language.norm, language.sequence_length, language.image_size) == (None, None, 512, None)
    assert CostSetting(method="galore").applicable_to("resnet18").lora_rank == 4


def test_cost_grid_combines_every_network_with_every_setting(bert: Path, tmp_path: Path) -> None:
    block = CostGrid(networks=["resnet18", "*.json"], grid={"method": ["full", "lora"], "batch_size": [1, 2]})
    jobs = cost_jobs(block, tmp_path / "grid.yaml", tmp_path / "out")
    assert [job.name for job in jobs] == [
        f"{network}--{method}--batch_size={batch_size}"
        for network in ("resnet18", "tiny")
        for method in ("full", "lora")
        for batch_size in (1, 2)
    ]


def test_adapters_of_a_timm_model_have_a_default_rank() -> None:
    assert CostSetting(method="lora", lora_rank=None).applicable_to("resnet18").lora_rank is None


def test_keys_of_a_cost_grid_are_known_without_torch() -> None:
    assert (*CostSetting.model_fields,) == COST_KEYS


def test_cost_job_is_not_finished_if_its_options_change(bert: Path, tmp_path: Path) -> None:
    def job(length: int) -> CostJob:
        grid = {"method": ["full"], "batch_size": [1], "sequence_length": [length]}
        (found,) = cost_jobs(CostGrid(networks=["tiny.json"], grid=grid), tmp_path / "grid.yaml", tmp_path / "out")
        return CostJob(found.setting, tmp_path / "out" / "a", found.network, found.options)

    assert not job(8).is_finished
    job(8).run()
    assert job(8).is_finished
    assert not job(16).is_finished
    (tmp_path / "out" / "a" / "record.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"record\.json is damaged: move it away"):
        _ = job(8).record


@pytest.mark.parametrize(
    ("networks", "grid", "message"),
    [
        (["resnet81"], {"method": ["full"]}, "resnet81 is neither a timm model nor a .json file"),
        (["none*.json"], {"method": ["full"]}, r"no file matches none\*\.json"),
        (["resnet18"], {"method": ["full"], "lora_rank": [0, 4]}, "1 analyses cannot be configured(?s:.*)lora_rank"),
        (["resnet18"], {"batch_size": [1]}, "method"),
        (["resnet18"], {"method": ["full"], "batch": [1]}, "batch"),
        (["resnet18"], {"method": ["galore"], "lora_rank": [None]}, "resnet18, method galore: lora_rank is null"),
        (["configs/networks/bert-base.json"], {"method": ["lora"], "lora_rank": [None]}, "lora_rank is null"),
        (["resnet18"], {"method": ["fulll"]}, "unknown method 'fulll': .*; did you mean full"),
    ],
)
def test_invalid_cost_grids_are_refused(tmp_path: Path, networks: list[str], grid: dict, message: str) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    with pytest.raises(ValueError, match=message):
        cost_jobs(CostGrid(networks=networks, grid=grid), tmp_path / "grid.yaml", tmp_path)
