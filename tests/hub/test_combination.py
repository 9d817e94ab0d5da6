"""Combined adapters compared with the formula: exact averages of kernels, heads, magnitudes, and pooled statistics."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_edge import ConvAdapterConfig, ConvLoraConfig
from peft_edge.backbones import load_backbone, set_class_names
from peft_edge.hub import load_pretrained, save_adapter
from peft_edge.hub.combination import COMBINED, combine_adapters
from peft_edge.tuners.norm import BatchNormLayer

NAMES = ["cat", "dog", "owl"]


@pytest.fixture
def base() -> nn.Module:
    torch.manual_seed(0)
    base = load_backbone("test_efficientnet", len(NAMES))
    set_class_names(base, NAMES)
    return base.eval()


def device(folder: Path, base: nn.Module, seed: int, count: int = 10, **options: Any) -> Path:
    """Save an adapter with random tensors, as if a device had trained it on `count` batches. Return its folder."""
    settings = {"r": 2, "target_modules": "all-conv", "modules_to_save": ["classifier"], "norm": "affine", **options}
    model = get_peft_model(copy.deepcopy(base), ConvLoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if "lora_" in name or "modules_to_save" in name:
            if name.endswith("num_batches_tracked"):
                tensor.fill_(count)
            else:
                tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.1)
    save_adapter(model, folder / str(seed))
    return folder / str(seed)


def merged(model: PeftModel) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model).merge_and_unload().state_dict()


@pytest.mark.parametrize(
    ("weights", "first", "second"),
    [
        (None, {}, {"r": 3, "target_modules": "dense"}),
        (
            [1.5, -0.5],
            {"use_rslora": True, "lora_bias": True, "target_modules": ["conv_reduce", "conv_expand"]},
            {"use_rslora": True, "lora_bias": True, "target_modules": r".*conv_expand", "r": 3},
        ),
    ],
)
def test_update_is_the_weighted_sum_of_the_updates(
    base: nn.Module, tmp_path: Path, weights: list[float] | None, first: dict[str, Any], second: dict[str, Any]
) -> None:
    adapters = [device(tmp_path, base, 1, **first), device(tmp_path, base, 2, **second)]
    save_adapter(combine_adapters(adapters, weights, base=base), tmp_path / "out")
    found, plain = merged(load_pretrained(tmp_path / "out", base=base)), base.state_dict()
    one, two = (merged(load_pretrained(adapter, base=base)) for adapter in adapters)
    assert sum(not torch.equal(one[name], plain[name]) for name in plain) > 4
    w1, w2 = weights or [0.5, 0.5]
    for name in found:
        if "running" not in name and "num_batches" not in name:
            expected = plain[name] + w1 * (one[name] - plain[name]) + w2 * (two[name] - plain[name])
            torch.testing.assert_close(found[name], expected, atol=2e-5, rtol=1e-4)


def test_one_adapter_combined_with_itself_is_that_adapter_also_for_dora(base: nn.Module, tmp_path: Path) -> None:
    adapter = device(tmp_path, base, 1, use_dora=True)
    found, expected = (
        merged(combine_adapters([adapter, adapter], base=base)),
        merged(load_pretrained(adapter, base=base)),
    )
    for name in expected.keys() - {key for key in expected if key.endswith("num_batches_tracked")}:
        torch.testing.assert_close(found[name], expected[name], atol=2e-5, rtol=1e-4)


def test_statistics_are_those_of_all_images_together(base: nn.Module, tmp_path: Path) -> None:
    adapters = [device(tmp_path, base, seed, count) for seed, count in ((1, 10), (2, 30))]
    model = combine_adapters([*adapters, adapters[0]], [0.9, 0.1, -1.0], base=base)
    layer = next(module for module in model.modules() if isinstance(module, BatchNormLayer))
    with torch.no_grad():
        # Images whose statistics are known, with three times as many for the second device.
        images = {"adapter_0": torch.randn(1000, 1, dtype=torch.float64), "adapter_1": 3 * torch.rand(3000, 1) + 1.0}
        for name, values in images.items():
            layer.states[name].running_mean.fill_(values.mean())
            layer.states[name].running_var.fill_(values.var(unbiased=False))
        layer.pool(["adapter_0", "adapter_1"], into=COMBINED)
    together = torch.cat(list(images.values()))
    state = layer.states[COMBINED]
    torch.testing.assert_close(state.running_mean, torch.full_like(state.running_mean, together.mean()))
    torch.testing.assert_close(state.running_var, torch.full_like(state.running_var, together.var(unbiased=False)))
    assert state.num_batches_tracked == 40


def test_an_adapter_that_is_subtracted_has_no_share_in_the_statistics(base: nn.Module, tmp_path: Path) -> None:
    adapters = [device(tmp_path, base, 1), device(tmp_path, base, 2)]
    found = merged(combine_adapters(adapters, [1.0, -1.0], base=base))
    expected = merged(load_pretrained(adapters[0], base=base))
    torch.testing.assert_close(found["bn1.running_mean"], expected["bn1.running_mean"])
    torch.testing.assert_close(found["bn1.running_var"], expected["bn1.running_var"])


@pytest.mark.parametrize("combination", ["linear", "svd", "ties", "dare_linear", "magnitude_prune_svd"])
def test_other_combinations_of_peft_keep_the_rank(base: nn.Module, tmp_path: Path, combination: str) -> None:
    adapters = [device(tmp_path, base, seed) for seed in (1, 2)]
    model = combine_adapters(adapters, base=base, combination=combination, density=0.5)
    assert model.active_peft_config.r == 2
    assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_what_cannot_be_combined_is_named(base: nn.Module, tmp_path: Path) -> None:
    first = device(tmp_path, base, 1)
    with pytest.raises(ValueError, match="adapters: expected at least one adapter, found none"):
        combine_adapters([], base=base)
    with pytest.raises(ValueError, match="weights: expected one weight for each of the 2 adapters, found 1"):
        combine_adapters([first, first], [1.0], base=base)
    with pytest.raises(ValueError, match="combination 'ties' needs a density"):
        combine_adapters([first, first], base=base, combination="ties")
    with pytest.raises(ValueError, match=r"norm: expected 'affine' as in .*1, found 'frozen'"):
        combine_adapters([first, device(tmp_path, base, 2, norm="frozen")], base=base)
    set_class_names(base, ["cat", "dog", "fox"])
    with pytest.raises(ValueError, match=r"classes: expected \['cat', 'dog', 'owl'\] as in .*1, found .*'fox'"):
        combine_adapters([first, device(tmp_path, base, 3)], base=base)
    other = get_peft_model(copy.deepcopy(base), ConvAdapterConfig(target_modules="all-conv"))
    save_adapter(other, tmp_path / "other")
    with pytest.raises(ValueError, match=r"expected an adapter of type CONV_LORA .* found CONV_ADAPTER"):
        combine_adapters([tmp_path / "other", first], base=base)
    other_base = copy.deepcopy(base)
    nn.init.normal_(other_base.conv_stem.weight)
    with pytest.raises(ValueError, match="trained on other weights of this network"):
        combine_adapters([first, device(tmp_path, other_base, 4)], base=base)
