"""Random small networks, hooks, shared modules and orders of calls, against PEFT's LoRA and a reference copy."""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, nn

from peft_edge import ConvAdapterConfig, ConvLoraConfig

NUM_CASES = 60
STEPS = ("merge", "unmerge", "disable", "reload", "copy", "second", "switch", "train", "eval")


class _Random(nn.Module):
    """A chain of random convolutions and norms. Some blocks or convolutions are used in two places."""

    def __init__(self, rng: random.Random, kind: str) -> None:
        super().__init__()
        self.names: list[str] = []
        for index in range(rng.randint(1, 4)):
            name = rng.choice(["conv", "lora_conv", "base_layer", "block"]) + str(index)
            # PEFT's LoRA ignores padding modes, same-padding and (in DoRA) hooks of the base layer.
            conv_cls = nn.Conv2d if kind == "peft" else rng.choice([nn.Conv2d, nn.Conv2d, Conv2dSame])
            options: dict[str, Any] = {"groups": rng.choice([1, 2, 4])} if kind == "lora" else {}
            if conv_cls is nn.Conv2d and kind != "peft":
                options["padding_mode"] = rng.choice(["zeros", "reflect", "circular", "replicate"])
            conv = conv_cls(4, 4, rng.choice([1, 3]), padding=1, bias=rng.random() < 0.5, **options)
            norm = rng.choice([nn.BatchNorm2d(4), BatchNormAct2d(4), nn.Identity()])
            setattr(self, name, nn.Sequential(conv, norm))
            self.names.append(name)
        if rng.random() < 0.3:
            self.names.append(rng.choice(self.names))  # one block twice
        if rng.random() < 0.3:
            self.again = getattr(self, self.names[0])[0]  # one convolution in two places
            self.names.append("again")

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x.mean((2, 3))


def _hook(layer: nn.Module, rng: random.Random, *, as_peft: bool) -> None:
    if rng.random() < 0.5:
        layer.register_forward_hook(lambda module, args, output: output + 1)
    elif not as_peft:
        # PEFT runs its adapter on the input before this hook, and a merged one after it.
        layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def _randomise(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if ("lora_" in name.rpartition("layer")[2] and ".lora_" in name) or ".conv_adapter_" in name:
            scale = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data = parameter.data * (1 + 0.1 * scale) if "magnitude" in name else 0.3 * scale


def _options(rng: random.Random) -> dict[str, Any]:
    return {"r": rng.choice([1, 2, 4]), "use_dora": rng.random() < 0.3, "use_rslora": rng.random() < 0.3}


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    adapters = (".lora_A.", ".lora_B.", ".lora_norm.", ".lora_magnitude", ".conv_adapter_")
    return {n: v.clone() for n, v in model.state_dict().items() if not any(part in n for part in adapters)}


@pytest.mark.parametrize("kind", ["peft", "lora", "adapter"])
@pytest.mark.parametrize("seed", range(NUM_CASES))
def test_random_network_in_a_random_order_of_calls(seed: int, kind: str) -> None:
    rng = random.Random(f"{kind} {seed}")
    torch.manual_seed(seed)
    network = _Random(rng, kind).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    hooked = [module for module in network.modules() if isinstance(module, nn.Conv2d) and rng.random() < 0.3]
    before = rng.random() < 0.5
    for layer in hooked if before else ():
        _hook(layer, rng, as_peft=kind == "peft")
    x = torch.randn(3, 4, 7, 7, dtype=torch.float64)
    fresh, plain = copy.deepcopy(network), network(x)
    norm = "frozen" if kind == "peft" else rng.choice(["frozen", "recalibrate", "stats", "affine"])
    options = {"target_modules": r".*\.0|again", "norm": norm}
    make = (lambda: ConvAdapterConfig(**options)) if kind == "adapter" else None
    lora = _options(rng)
    make = make or (lambda: ConvLoraConfig(**options, **lora))
    model = get_peft_model(network, make()).eval()
    torch.testing.assert_close(model(x), plain)
    _randomise(model, seed)
    if not before:
        for layer in hooked:
            _hook(layer, rng, as_peft=kind == "peft")
        fresh = None
        with model.disable_adapter():
            plain = model(x)

    expected = {"default": model(x)}
    has_peft = kind == "peft" and fresh is not None and "again" not in network.names
    if has_peft and not (lora["use_dora"] and hooked):
        theirs = get_peft_model(copy.deepcopy(fresh), LoraConfig(target_modules=options["target_modules"], **lora))
        missing = theirs.load_state_dict(model.state_dict(), strict=False).missing_keys
        assert not [name for name in missing if ".lora_A." in name or ".lora_B." in name]
        torch.testing.assert_close(theirs.eval()(x), expected["default"])
    base = _base_tensors(model)
    active, is_merged = "default", False
    for _ in range(8):
        step = rng.choice(STEPS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PEFT's, on unmerging
            if step == "merge" and not (kind == "adapter" and is_merged):
                model.merge_adapter(safe_merge=rng.random() < 0.5)
                is_merged = True
            elif step == "unmerge":
                model.unmerge_adapter()
                is_merged = False
            elif step == "reload" and fresh is not None and active == "default":
                with tempfile.TemporaryDirectory() as folder:
                    model.save_pretrained(folder)
                    loaded = PeftModel.from_pretrained(copy.deepcopy(fresh), folder).eval()
                torch.testing.assert_close(loaded(x), expected["default"])
                torch.testing.assert_close(loaded.merge_and_unload()(x), expected["default"])
            elif step == "second" and "other" not in expected:
                model.add_adapter("other", make())
                is_merged = False
                expected["other"] = plain
            elif step == "switch" and "other" in expected:
                active = "other" if active == "default" else "default"
                model.set_adapter(active)
                is_merged = False
            elif step == "disable":
                with model.disable_adapter():
                    torch.testing.assert_close(model(x), plain)
                is_merged = (
                    False if any(m.merged for m in model.modules() if hasattr(m, "merged")) is False else is_merged
                )
            elif step == "train" and norm == "frozen":
                model.train()
            elif step == "eval":
                model.eval()
            elif step == "copy":
                torch.testing.assert_close(copy.deepcopy(model)(x), expected[active])
        torch.testing.assert_close(model(x), expected[active])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model.unmerge_adapter()
    after = _base_tensors(model)
    assert after.keys() == base.keys()
    assert all(torch.equal(value, base[name]) for name, value in after.items())
    model.eval()
    torch.testing.assert_close(model.unload()(x), plain)
