from __future__ import annotations

import resource
from dataclasses import fields

import pytest
import timm
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM

from peft_edge.profiling.analysis import OPTIMIZERS, analyse, classification_loss, compare_methods, prepare_step
from peft_edge.profiling.flops import Flops, count_flops
from peft_edge.profiling.memory import track_memory
from peft_edge.roles import modules_with_role

SMALL = {"batch_size": 4, "image_size": 64}


def test_analyse_accepts_a_method_by_name(tiny_backbone: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_backbone.state_dict().items()}
    full, head, none = (
        analyse(tiny_backbone, method, adapter={"norm": "stats"}, **SMALL) for method in ("full", "head", "none")
    )
    size = sum(parameter.numel() for parameter in tiny_backbone.parameters())
    classifier = 1280 * 10 + 10
    assert [analysis.num_trainable_params for analysis in (full, head, none)] == [size, classifier, 0]
    # Running mean and variance in single precision, and a counter in double.
    norms = sum(8 * module.num_features + 8 for module in tiny_backbone.modules() if isinstance(module, nn.BatchNorm2d))
    saved = [analysis.profile[0].adapter_bytes for analysis in (full, head, none)]
    assert saved == [4 * size + norms, 4 * classifier + norms, 0]
    assert [len(analysis.profile) for analysis in (full, head, none)] == [1, 1, 1]
    # The gradient of a linear layer costs as much as its forward pass, and nothing before it is trained.
    assert [head.flops.backward, none.flops.backward] == [2 * 4 * 1280 * 10, 0]
    # AdamW has two moments and a counter for each trained parameter.
    moments = [analysis.memory.forward_end["optimizer"] for analysis in (full, head, none)]
    assert moments == [8 * size + 4 * len(list(tiny_backbone.parameters())), 8 * classifier + 8, 0]
    assert (
        full.flops.forward
        == head.flops.forward
        == none.flops.forward
        == count_flops(tiny_backbone, torch.empty(4, 3, 64, 64)).forward
    )
    torch.testing.assert_close(dict(tiny_backbone.state_dict()), before, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in tiny_backbone.parameters())


@pytest.mark.parametrize("lora_rank", [1, 8])
def test_adapters_have_the_parameters_of_their_rank(tiny_backbone: nn.Module, lora_rank: int) -> None:
    analysis = analyse(
        tiny_backbone, "lora", lora_rank=lora_rank, adapter={"target_modules": "depthwise", "norm": "frozen"}, **SMALL
    )
    channels = [
        tiny_backbone.get_submodule(name).out_channels for name in modules_with_role(tiny_backbone, "depthwise")
    ]
    adapters = sum(lora_rank * (count + 9) for count in channels)
    assert analysis.num_trainable_params == adapters + 1280 * 10 + 10
    assert [(row.scope, row.lora_rank) for row in analysis.profile] == [("step", lora_rank), ("layers", lora_rank)]
    assert [row.adapter_bytes for row in analysis.profile] == [4 * analysis.num_trainable_params, 4 * adapters]


def test_dora_costs_no_second_convolution() -> None:
    full, lora, dora = (analyse("resnet10t", method, **SMALL).flops for method in ("full", "lora", "dora"))
    assert dora.forward == lora.forward
    # DoRA's magnitudes need the gradient of the full kernel, as full fine-tuning does; LoRA's factors may not.
    assert dora.forward + dora.backward == pytest.approx(full.forward + full.backward, rel=0.1)
    assert lora.backward < 0.6 * dora.backward


def test_dora_costs_as_much_as_lora_with_the_full_kernel_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_edge.functional.lowrank.choose_gradient_route", lambda *arguments: "full_kernel")
    lora, dora = (analyse("resnet10t", method, lora_rank=4, **SMALL).flops for method in ("lora", "dora"))
    assert dora.forward == lora.forward
    everything = [sum(getattr(flops, entry.name) for entry in fields(Flops)) for flops in (lora, dora)]
    assert everything[1] == pytest.approx(everything[0], rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd-momentum", "adafactor"])
def test_galore_keeps_less_state_than_adamw(optimizer: str) -> None:
    backbone = timm.create_model("resnet10t", num_classes=10)
    rank = {"rank": 4, "target_modules": "dense"}
    galore = analyse(backbone, "galore", optimizer=optimizer, adapter=rank, **SMALL)
    assert galore.num_trainable_params == galore.num_total_params
    parameters = list(backbone.parameters())
    if optimizer == "adamw":
        projected = [backbone.get_submodule(name).weight for name in modules_with_role(backbone, "dense")]
        shapes = [sorted(weight.flatten(1).shape) for weight in projected]
        kept = sum(4 * small + 2 * 4 * large if small > 4 else 2 * small * large for small, large in shapes)
        rest = sum(parameter.numel() for parameter in parameters) - sum(weight.numel() for weight in projected)
        moments = 4 * (kept + 2 * rest)
        assert moments <= galore.memory.forward_end["optimizer"] <= moments + 8 * len(parameters)
    full = analyse(backbone, "full", optimizer="adamw", **SMALL)
    assert galore.memory.forward_end["optimizer"] < full.memory.forward_end["optimizer"]


def test_layerwise_updates_keep_one_gradient_at_a_time() -> None:
    at_once, layerwise = (
        analyse("resnet10t", "galore", adapter={"layerwise": layerwise}, **SMALL) for layerwise in (False, True)
    )
    largest = max(parameter.numel() for parameter in timm.create_model("resnet10t").parameters())
    assert at_once.memory.peak["gradients"] > 2 * 4 * largest
    assert layerwise.memory.peak["gradients"] <= 4 * largest


def test_analyse_accepts_any_model_and_inputs() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(6, 5), nn.Linear(7, 5).requires_grad_(False)

        def forward(self, left: torch.Tensor, *, right: torch.Tensor) -> torch.Tensor:
            return self.left(left) * self.right(right)

    inputs = {"left": torch.empty(3, 6), "right": torch.empty(3, 7, device="meta")}
    analysis = analyse(Product(), None, inputs=inputs)
    assert (analysis.flops.forward, analysis.flops.backward) == (2 * 3 * 5 * (6 + 7), 2 * 3 * 5 * 6)
    assert analysis.num_trainable_params == 6 * 5 + 5


def test_inputs_of_a_wrong_shape_are_named(tiny_backbone: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"cannot take a step on inputs of the shape \[\(2, 1, 8, 8\)\]"):
        analyse(tiny_backbone, "full", inputs=torch.empty(2, 1, 8, 8))


def test_analyse_accepts_a_peft_configuration(tiny_backbone: nn.Module) -> None:
    config = LoraConfig(r=2, target_modules=["conv_head"])
    by_config = analyse(tiny_backbone, config, **SMALL)
    by_rank = analyse(tiny_backbone, config, lora_rank=6, **SMALL)
    layer = tiny_backbone.conv_head
    assert by_config.num_trainable_params == 2 * (layer.in_channels + layer.out_channels)
    assert by_rank.num_trainable_params == 3 * by_config.num_trainable_params
    assert config.r == 2


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_module_dropout_drops_nothing_in_an_analysis(tiny_backbone: nn.Module, kind: type[PeftConfig]) -> None:
    analysis = analyse(tiny_backbone, kind(r=2, target_modules=["conv_head"], module_dropout=0.9), **SMALL)
    assert analysis.flops.optimizer >= 13 * analysis.num_trainable_params > 0


@pytest.mark.slow
def test_analysis_of_a_7b_language_model_needs_no_memory() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    analysis = analyse(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), batch_size=1, sequence_length=128)
    assert analysis.num_total_params - analysis.num_trainable_params == 6_738_415_616
    assert analysis.num_trainable_params == 32 * 2 * 8 * (4096 + 4096)
    assert analysis.memory.peak["parameters"] == 4 * analysis.num_total_params
    # Each weight except those of the embedding and of the norms multiplies each token once.
    weights = 6_738_415_616 - 32000 * 4096 - 65 * 4096
    attention = 32 * 2 * 2 * 128 * 128 * 4096
    adapters = 2 * 128 * analysis.num_trainable_params
    assert analysis.flops.forward == 2 * 128 * weights + attention + adapters
    # In KiB; the weights alone would take 26 million.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


BERT = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


def test_transformers_encoder_with_a_head_is_analysed() -> None:
    analysis = analyse(BertForSequenceClassification(BERT), "full", batch_size=2, sequence_length=16)
    assert analysis.flops.backward > analysis.flops.forward > 0


def test_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"BaseModelOutput.*, expected a tensor or logits: take a model with a head"):
        analyse(BertModel(BERT), "full", batch_size=2, sequence_length=16)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lorra", {}, "unknown method 'lorra': .*; did you mean lora"),
        ("lora", {"adapter": {"target_modules": "depth-wise"}}, "depth-wise"),
        ("lora", {"adapter": {"rr": 3}}, "unexpected keyword argument 'rr'.*; lora has the options norm, r, "),
        (LoraConfig(target_modules=["conv_head"]), {"adapter": {"r": 3}}, "set it in the PEFT configuration"),
        ("full", {"optimizer": "adam"}, "unknown optimizer 'adam'. There are: adamw, sgd, sgd-momentum"),
        ("full", {"accounting": "paper"}, "expected one of exact, source-study"),
    ],
)
def test_wrong_argument_is_named(tiny_backbone: nn.Module, method: object, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        analyse(tiny_backbone, method, **SMALL, **options)


def test_analysis_of_a_lean_step_matches_a_real_one() -> None:
    settings = {"lora_rank": 2, "adapter": {"norm": "frozen", "target_modules": "project"}}
    lean = {"inplace_norm": True, "masks": "byte"}
    backbone = timm.create_model("test_efficientnet", num_classes=10)
    plain, analysis = (analyse(backbone, "lora", lean=options, **settings, **SMALL) for options in (None, lean))
    assert analysis.memory.forward_end["activations"] < 0.7 * plain.memory.forward_end["activations"]
    assert (analysis.flops.forward, analysis.flops.backward) == (plain.flops.forward, plain.flops.backward)

    model, optimizer = prepare_step(backbone, "lora", lean=lean, **settings)
    assert model.training
    assert optimizer is not None
    real = track_memory(model, torch.randn(4, 3, 64, 64), optimizer=optimizer, loss_fn=classification_loss)
    assert (real.peak_bytes, real.peak) == (analysis.memory.peak_bytes, analysis.memory.peak)


SMALL_STEP = {"batch_size": 2, "image_size": 32}


def test_compare_methods_analyses_each_rank() -> None:
    costs = compare_methods("resnet10t", ["peft-loha", "conv-adapter"], lora_ranks=[2, 4], **SMALL_STEP)
    assert list(costs) == ["peft-loha, rank 2", "peft-loha, rank 4", "conv-adapter"]
    two, four, _ = (cost.num_trainable_params for cost in costs.values())
    head = 512 * 1000 + 1000
    assert four - head == 2 * (two - head)


def test_methods_without_a_rank_are_analysed_once() -> None:
    costs = compare_methods("resnet10t", ["head", "lora", "full"], lora_ranks=[1, 3], **SMALL_STEP)
    assert list(costs) == ["head", "lora, rank 1", "lora, rank 3", "full"]
    assert [cost.lora_rank for cost in costs.values()] == [None, 1, 3, None]
    alone = analyse("resnet10t", "lora", lora_rank=3, **SMALL_STEP).profile[0]
    assert costs["lora, rank 3"] == alone


@pytest.mark.parametrize(("optimizer", "moments"), [("adamw", 2), ("sgd", 0), ("sgd-momentum", 1)])
def test_optimizer_state_has_the_size_of_its_moments(optimizer: str, moments: int) -> None:
    assert optimizer in OPTIMIZERS
    (cost,) = compare_methods("mobilenetv2_035", ["head"], lora_ranks=[1], optimizer=optimizer, **SMALL_STEP).values()
    weights = (1280 * 1000 + 1000) * 4
    counters = 8 if optimizer == "adamw" else 0  # of the steps of weight and bias
    assert cost.memory_optimizer_bytes == moments * weights + counters
