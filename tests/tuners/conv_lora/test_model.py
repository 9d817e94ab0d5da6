"""ConvLoraModel: which layers it adapts, saving and loading, norms alone, and what PEFT users expect besides."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_model_status, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from peft_edge import ConvLoraConfig, ConvLoraLayer, ConvLoraModel, recalibrate
from tests.tuners.support import lora_config, shifted


@pytest.fixture
def adapted(tiny_backbone: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of `tiny_backbone` with an adapter whose BatchNorm statistics differ from those of the backbone."""
    return shifted(get_peft_model(copy.deepcopy(tiny_backbone), lora_config()), images)


@pytest.mark.slow
def test_reload_in_a_new_process_gives_identical_logits(
    tiny_backbone: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    model = shifted(get_peft_model(copy.deepcopy(tiny_backbone), lora_config()), images)
    model.add_adapter("dark", lora_config(norm="affine", use_dora=True, r=1))
    model.set_adapter("dark")
    shifted(model, images, 0.1)
    expected = {}
    for name in ("default", "dark"):
        model.set_adapter(name)
        expected[name] = model(images)
    assert not torch.allclose(expected["default"], expected["dark"], atol=1e-2)
    model.save_pretrained(tmp_path)
    save_file({"images": images, **expected}, tmp_path / "expected.safetensors")
    save_file(tiny_backbone.state_dict(), tmp_path / "base.safetensors")
    code = """
import sys, timm, torch, peft_edge
from peft import PeftModel
from safetensors.torch import load_file
torch.set_num_threads(1)
base = timm.create_model("mobilenetv2_035", num_classes=10)
base.load_state_dict(load_file("base.safetensors"))
expected = load_file("expected.safetensors")
model = PeftModel.from_pretrained(base, ".").eval()
model.load_adapter("dark", "dark")
for name in ("default", "dark"):
    model.set_adapter(name)
    assert torch.equal(model(expected["images"]), expected[name]), name
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_adapter_loads_in_plain_peft_as_lora(tiny_backbone: nn.Module, images: Tensor, tmp_path: Path) -> None:
    # In double precision: 52 untrained layers amplify rounding errors.
    tiny_backbone, images = tiny_backbone.double(), images.double()
    model = get_peft_model(
        copy.deepcopy(tiny_backbone), lora_config(target_modules="dense", norm="frozen", use_dora=True)
    ).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "LORA"}))

    with pytest.warns(UserWarning, match="Unexpected keyword"):
        plain = PeftModel.from_pretrained(tiny_backbone, tmp_path).eval()

    torch.testing.assert_close(plain(images), model(images))


def test_lora_adapter_of_plain_peft_loads_as_conv_lora(
    tiny_backbone: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    tiny_backbone, images = tiny_backbone.double(), images.double()
    targets = {"target_modules": ["conv_pw", "conv_pwl"], "init_lora_weights": False}
    plain = get_peft_model(copy.deepcopy(tiny_backbone), LoraConfig(**targets)).eval()
    plain.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "CONV_LORA", "norm": "frozen"}))

    ours = PeftModel.from_pretrained(tiny_backbone, tmp_path).eval()

    assert isinstance(ours.base_model, ConvLoraModel)
    torch.testing.assert_close(ours(images), plain(images))


def test_linear_layers_get_pefts_lora(tiny_backbone: nn.Module, images: Tensor) -> None:
    model = get_peft_model(tiny_backbone, lora_config(target_modules=["depthwise", "classifier"])).eval()
    expected = model(images)

    assert type(model.base_model.model.classifier) is Linear
    torch.testing.assert_close(model.merge_and_unload()(images), expected, atol=1e-4, rtol=1e-4)


def test_roles_respect_exclude_modules_and_layers_to_transform(tiny_backbone: nn.Module) -> None:
    targets = lora_config(
        target_modules="depthwise",
        layers_to_transform=[5, 6],
        layers_pattern="blocks",
        exclude_modules=["blocks.5.1.conv_dw"],
        norm="frozen",
    )
    model = get_peft_model(tiny_backbone, targets)

    layers = [name for name, module in model.base_model.model.named_modules() if isinstance(module, ConvLoraLayer)]
    assert layers == ["blocks.5.0.conv_dw", "blocks.5.2.conv_dw", "blocks.6.0.conv_dw"]


def test_rank_and_alpha_patterns_are_applied(tiny_backbone: nn.Module) -> None:
    targets = lora_config(rank_pattern={"conv_dw": 1}, alpha_pattern={r"blocks\.0\.0\.conv_dw": 3})
    model = get_peft_model(tiny_backbone, targets).base_model.model

    assert model.conv_stem.r["default"] == 2
    assert (model.blocks[0][0].conv_dw.r["default"], model.blocks[0][0].conv_dw.scaling["default"]) == (1, 3.0)
    assert model.blocks[1][0].conv_dw.lora_A["default"].weight.shape == (1, 1, 3, 3)


@pytest.mark.parametrize("rank", [0, True])
def test_invalid_rank_of_one_layer_leaves_the_model_unchanged(tiny_backbone: nn.Module, rank: int) -> None:
    before = list(tiny_backbone.state_dict())

    with pytest.raises(ValueError, match=rf"value passed is {rank} \(layer 'conv_head'\)"):
        get_peft_model(tiny_backbone, lora_config(rank_pattern={"conv_head": rank}))

    assert list(tiny_backbone.state_dict()) == before


def test_layers_that_mamba_bypasses_are_rejected() -> None:
    model = nn.Sequential()
    model.config = SimpleNamespace(model_type="mamba")
    model.conv1d = nn.Conv1d(4, 4, 3)

    with pytest.raises(ValueError, match="'conv1d' is incompatible with Mamba"):
        get_peft_model(model, lora_config())


def test_truncated_adapter_file_raises(adapted: nn.Module, tiny_backbone: nn.Module, tmp_path: Path) -> None:
    adapted.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    entries = load_file(weights)
    assert any(key.endswith("lora_norm.running_mean") for key in entries)
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(Exception, match=r"(?i)header|deserializ|incomplete"):
        PeftModel.from_pretrained(tiny_backbone, tmp_path)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_give_the_same_output(adapted: nn.Module, images: Tensor, copied: object) -> None:
    assert torch.equal(copied(adapted)(images), adapted(images))


def test_model_status_is_correct(adapted: nn.Module) -> None:
    status = get_model_status(adapted)

    assert status.peft_types == {"default": "CONV_LORA"}
    assert (status.enabled, status.active_adapters, status.requires_grad) == (True, ["default"], {"default": True})


COMBINATIONS = {
    "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd",
    "magnitude_prune", "magnitude_prune_svd",
}  # fmt: skip


@pytest.mark.parametrize("combination", sorted(COMBINATIONS))
def test_weighted_adapters_combine_kernels_and_statistics(adapted: nn.Module, images: Tensor, combination: str) -> None:
    adapted.add_adapter("dark", lora_config())
    adapted.set_adapter("dark")
    shifted(adapted, images, 0.1)

    adapted.add_weighted_adapter(["default", "dark"], [0.7, 0.3], "both", combination_type=combination, density=0.9)
    adapted.set_adapter("both")

    norm = adapted.base_model.model.bn1
    means = {name: state.running_mean for name, state in norm.lora_norm.items()}
    torch.testing.assert_close(means["both"], 0.7 * means["default"] + 0.3 * means["dark"])
    assert adapted(images).isfinite().all()
    if combination == "cat":
        for layer in (module for module in adapted.modules() if isinstance(module, ConvLoraLayer)):
            got, first, second = (layer.get_delta_weight(name) for name in ("both", "default", "dark"))
            torch.testing.assert_close(got, 0.7 * first + 0.3 * second, atol=1e-5, rtol=1e-4)


def test_svd_of_small_kernels_is_padded_to_the_rank(tiny_backbone: nn.Module) -> None:
    model = get_peft_model(tiny_backbone, lora_config(target_modules="depthwise", r=6))
    model.add_adapter("other", lora_config(target_modules="depthwise", r=6))

    model.add_weighted_adapter(["default", "other"], [1.0, -0.5], "both", combination_type="svd", svd_rank=16)

    for layer in (module for module in model.modules() if isinstance(module, ConvLoraLayer)):
        assert layer.lora_A["both"].weight.shape[0] == 16
        expected = layer.get_delta_weight("default") - 0.5 * layer.get_delta_weight("other")
        torch.testing.assert_close(layer.get_delta_weight("both"), expected, atol=1e-5, rtol=1e-4)


def test_mixed_model_combines_conv_lora_and_loha(tiny_backbone: nn.Module, images: Tensor) -> None:
    expected = tiny_backbone(images)
    model = get_peft_model(tiny_backbone, lora_config(target_modules="depthwise"), mixed=True)
    model.add_adapter("loha", LoHaConfig(target_modules=["conv_pw"], init_weights=False))
    model.set_adapter(["default", "loha"])
    shifted(model, images)
    both = model(images)
    model.set_adapter("default")

    assert not torch.allclose(model(images), both, atol=1e-3)
    assert not torch.allclose(model(images), expected, atol=1e-3)
    model.set_adapter(["default", "loha"])
    torch.testing.assert_close(model.merge_and_unload()(images), both, atol=1e-3, rtol=1e-3)


def _saved(tiny_backbone: nn.Module, images: Tensor, folder: Path, scale: float, **kwargs: object) -> Tensor:
    model = shifted(get_peft_model(copy.deepcopy(tiny_backbone), lora_config(**kwargs)), images, scale)
    model.save_pretrained(folder)
    return model(images)


def test_hotswap_to_another_rank_works(tiny_backbone: nn.Module, images: Tensor, tmp_path: Path) -> None:
    first = _saved(tiny_backbone, images, tmp_path / "first", 2.0, r=4)
    second = _saved(tiny_backbone, images, tmp_path / "second", 0.1, r=2, lora_alpha=3)
    model = PeftModel.from_pretrained(tiny_backbone, tmp_path / "first").eval()
    torch.testing.assert_close(model(images), first)

    hotswap_adapter(model, tmp_path / "second", "default", torch_device="cpu")
    torch.testing.assert_close(model(images), second, atol=1e-5, rtol=1e-5)
    hotswap_adapter(model, tmp_path / "first", "default", torch_device="cpu")
    torch.testing.assert_close(model(images), first, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_hotswap_of_a_compiled_model_does_not_recompile(small: nn.Module, images: Tensor, tmp_path: Path) -> None:
    first = _saved(small, images, tmp_path / "first", 2.0, r=2)
    second = _saved(small, images, tmp_path / "second", 0.1, r=5, lora_alpha=3)
    model = PeftModel.from_pretrained(small, tmp_path / "first").eval()
    prepare_model_for_compiled_hotswap(model, target_rank=5)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), first, atol=1e-4, rtol=1e-4)
        hotswap_adapter(compiled, tmp_path / "second", "default", torch_device="cpu")
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(images), second, atol=1e-4, rtol=1e-4)


def test_hotswap_to_another_norm_is_rejected(tiny_backbone: nn.Module, images: Tensor, tmp_path: Path) -> None:
    _saved(tiny_backbone, images, tmp_path / "affine", 2.0, norm="affine")
    model = get_peft_model(tiny_backbone, lora_config())

    with pytest.raises(ValueError, match="incompatible: for norm"):
        hotswap_adapter(model, tmp_path / "affine", "default", torch_device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("use_dora", [False, True])
def test_compiles_as_one_graph_for_training(small: nn.Module, images: Tensor, use_dora: bool) -> None:
    model = get_peft_model(small, lora_config(norm="affine", use_dora=use_dora)).train()
    plain = copy.deepcopy(model)

    torch.compile(model, backend="aot_eager", fullgraph=True)(images).square().sum().backward()
    plain(images).square().sum().backward()

    for (name, got), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad, atol=1e-3, rtol=1e-3, msg=name)
    for name, value in plain.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], value)


def test_autocast_trains_with_finite_gradients(adapted: nn.Module, images: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = adapted.train()(images)
        y.float().square().sum().backward()

    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapted.parameters() if p.requires_grad)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_backbone: nn.Module, images: Tensor) -> None:
    model = get_peft_model(tiny_backbone, lora_config(norm="affine")).train()
    plain = copy.deepcopy(model)
    model.base_model.model.set_grad_checkpointing()

    model(images).square().sum().backward()
    plain(images).square().sum().backward()

    for got, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        if wanted.grad is not None:
            torch.testing.assert_close(got.grad, wanted.grad)
    for got, wanted in zip(model.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(got, wanted)


def _adapt_norms_and_head(model: nn.Module, norm: str, bias: str = "none") -> PeftModel:
    config = ConvLoraConfig(target_modules=DUMMY_TARGET_MODULES, norm=norm, bias=bias, modules_to_save=["classifier"])
    return get_peft_model(model, config)


def _moved(model: nn.Module, images: Tensor) -> nn.Module:
    """Change all trainable parameters and all BatchNorm statistics of the adapter. Return the model in eval mode."""
    model.train()(images).square().mean().backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            parameter.data.add_(torch.randn_like(parameter) / 10)
    return shifted(model, images)


def test_norms_are_saved_under_stable_names(small: nn.Module) -> None:
    """Adapters on the Hub must remain loadable."""
    saved = get_peft_model_state_dict(_adapt_norms_and_head(small, "affine"))

    assert {key.partition("bn1.")[2] for key in saved if key.startswith("base_model.model.bn1.")} == {
        f"lora_norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    }


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("norm", ["frozen", "recalibrate", "stats", "affine"])
def test_norms_and_head_alone_are_saved_loaded_and_merged(
    small: nn.Module, images: Tensor, tmp_path: Path, norm: str, bias: str
) -> None:
    model = _moved(_adapt_norms_and_head(copy.deepcopy(small), norm, bias), images)
    expected = model(images)
    assert not torch.allclose(expected, small(images), atol=1e-2)

    model.save_pretrained(tmp_path)

    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(small), tmp_path)(images), expected)
    merged = model.merge_and_unload()
    assert merged.state_dict().keys() == small.state_dict().keys()
    torch.testing.assert_close(merged(images), expected)


@pytest.mark.parametrize(
    ("norm", "bias", "ends"),
    [
        ("stats", "none", {"classifier.modules_to_save.default"}),
        ("affine", "none", {"classifier.modules_to_save.default", "lora_norm.default"}),
        ("stats", "all", {"classifier.modules_to_save.default", "base_layer"}),
        ("affine", "all", {"classifier.modules_to_save.default", "lora_norm.default"}),
    ],
)
def test_norms_and_head_alone_are_trained(tiny_backbone: nn.Module, norm: str, bias: str, ends: set[str]) -> None:
    model = _adapt_norms_and_head(tiny_backbone, norm, bias)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    assert {end for end in ends if any(end in name for name in trained)} == ends
    assert all(any(end in name for end in ends) for name in trained)
    # MobileNetV2 has 53 biases: in 52 norms and in the head.
    assert sum(name.endswith(".bias") for name in trained) == (1 if (norm, bias) == ("stats", "none") else 53)


def test_statistics_alone_are_recalibrated(tiny_backbone: nn.Module, images: Tensor) -> None:
    reference = copy.deepcopy(tiny_backbone)
    model = _adapt_norms_and_head(tiny_backbone, "recalibrate")

    recalibrate(model, [images, images * 2])
    update_bn([images, images * 2], reference)

    torch.testing.assert_close(model(images), reference.eval()(images))


def test_adapters_of_norms_and_head_mix_switch_and_delete(small: nn.Module, images: Tensor) -> None:
    model = _moved(_adapt_norms_and_head(small, "affine"), images)
    first = model(images)
    model.add_adapter(
        "dark",
        ConvLoraConfig(target_modules=DUMMY_TARGET_MODULES, norm="stats", modules_to_save=["classifier"]),
    )
    model.set_adapter("dark")
    second = shifted(model, images, 0.1)(images)

    mixed = model(images, adapter_names=["default", "dark", "dark", "default"])
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1], second[2], first[3]]), atol=1e-4, rtol=1e-4)
    model.set_adapter("default")
    model.delete_adapter("dark")
    assert torch.equal(model(images), first)


_TWO_PROCESSES = """
import copy
import sys
import timm
import torch
import torch.distributed as dist
from peft import get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch.nn.parallel import DistributedDataParallel
from peft_edge import ConvLoraConfig

torch.set_num_threads(1)
torch.manual_seed(0)
config = ConvLoraConfig(
    target_modules=DUMMY_TARGET_MODULES, norm="affine", bias="all", modules_to_save=["classifier"]
)
model = get_peft_model(timm.create_model("test_efficientnet", num_classes=10), config).double().train()
images = torch.randn(8, 3, 32, 32, dtype=torch.float64) + 1


def train(model, batch):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


whole = copy.deepcopy(model)
train(whole, images)
dist.init_process_group("gloo")
train(DistributedDataParallel(model, broadcast_buffers=False), images.chunk(2)[dist.get_rank()])
for (name, got), wanted in zip(model.state_dict().items(), whole.state_dict().values()):
    torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9, msg=name)
dist.destroy_process_group()
"""


@pytest.mark.distributed
def test_two_processes_train_as_one_process_does(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(_TWO_PROCESSES)
    launcher = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=localhost:0",
    ]

    subprocess.run([sys.executable, *launcher, str(script)], check=True, timeout=200)
