from __future__ import annotations

import logging
from math import prod
from typing import Any

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode

from peft_edge.profiling.flops import FlopCount, FlopCounter, Flops, count_flops
from peft_edge.profiling.step import take_step
from peft_edge.roles import modules_with_role

SIZE = 3 * 4 * 5 * 6

# Before torch 2.15, a dispatch mode sees the derivative as several operators.
SILU_DERIVATIVE = SIZE if torch.__version__ >= (2, 15) else 6 * SIZE


def count(function: Any, *shapes: tuple[int, ...]) -> FlopCount:
    tensors = [torch.rand(shape, requires_grad=True) for shape in shapes]
    with FlopCounter(nn.Identity()) as counter:
        output = function(*tensors)
        if output.requires_grad:
            output.backward(torch.ones_like(output))
    return counter.result()


@pytest.mark.parametrize(
    ("function", "forward", "backward"),
    [
        (torch.relu, SIZE, SIZE),
        (F.hardswish, SIZE, SIZE),
        (F.hardsigmoid, SIZE, SIZE),
        (F.silu, SIZE, SILU_DERIVATIVE),
        (lambda x: x.clone().transpose(1, 2).contiguous()[:1], 0, 0),
        (lambda x: torch.add(x, x.detach(), alpha=2), 2 * SIZE, 0),
        (lambda x: torch.addcmul(x.detach(), x.detach(), x.detach(), value=0.5), 3 * SIZE, 0),
        (lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), training=True), 5 * SIZE, 10 * SIZE),
        (lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4)), 2 * SIZE, SIZE),
        (lambda x: F.layer_norm(x, (6,)), 5 * SIZE, 10 * SIZE),
        (lambda x: F.group_norm(x, 2), 5 * SIZE, 10 * SIZE),
        (lambda x: F.softmax(x, -1), 5 * SIZE, 4 * SIZE),
    ],
)
def test_elementwise_operators_cost_a_number_for_each_element(function: Any, forward: int, backward: int) -> None:
    counted = count(function, (3, 4, 5, 6))
    assert (counted.forward, counted.backward) == (0, 0)
    assert (counted.elementwise_forward, counted.elementwise_backward) == (forward, backward)


@pytest.mark.parametrize(
    ("function", "shapes", "products"),
    [
        (torch.mv, [(7, 5), (5,)], 7 * 5),
        (torch.dot, [(7,), (7,)], 7),
        (torch.addmv, [(7,), (7, 5), (5,)], 7 * 5),
        (torch.addbmm, [(7, 6), (3, 7, 5), (3, 5, 6)], 3 * 7 * 5 * 6),
    ],
)
def test_products_cost_their_multiply_adds(function: Any, shapes: list[tuple[int, ...]], products: int) -> None:
    assert count(lambda *tensors: function(*tensors).detach(), *shapes).forward == 2 * products


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.adaptive_max_pool2d(x, 2),
        lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear"),
        lambda x: F.interpolate(x, scale_factor=0.5, mode="bicubic"),
        lambda x: F.mse_loss(x, torch.zeros_like(x)),
        lambda x: F.smooth_l1_loss(x, torch.zeros_like(x)),
        F.mish,
        F.logsigmoid,
        lambda x: F.prelu(x, torch.ones(1)),
        lambda x: F.dropout(x, 0.5),
    ],
)
def test_both_passes_cost_at_least_one_operation_an_element(function: Any) -> None:
    counted = count(function, (3, 4, 5, 6))
    assert counted.elementwise_forward >= SIZE
    assert counted.elementwise_backward >= SIZE


def test_elementwise_cost_follows_the_largest_tensor() -> None:
    assert count(lambda x: x.detach().sum(), (7, 5)).elementwise_forward == 35
    assert count(lambda x, y: x.detach() * y.detach(), (7, 1), (1, 5)).elementwise_forward == 35


def test_backward_of_batch_norm_in_eval_mode_costs_the_requested_gradients() -> None:
    norm = nn.BatchNorm2d(4).eval()
    x = torch.rand(3, 4, 5, 6)
    for trained, cost in (((), 1), (("weight",), 5), (("bias",), 2), (("weight", "bias"), 6)):
        norm.zero_grad()
        for name, parameter in norm.named_parameters():
            parameter.requires_grad_(name in trained)
        with FlopCounter(norm) as counter:
            norm(x.clone().requires_grad_()).backward(x)
        assert counter.result().elementwise_backward == cost * SIZE


OPTIMIZERS = [
    # For each element: weight decay 1, the moments 3 and 4, root, correction and epsilon 3, the step 3.
    (torch.optim.AdamW, {}, 14),
    (torch.optim.AdamW, {"weight_decay": 0.0}, 13),
    (torch.optim.Adam, {"weight_decay": 0.1}, 15),
    (torch.optim.SGD, {}, 2),
    (torch.optim.SGD, {"momentum": 0.9}, 4),
    (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}, 8),
]


@pytest.mark.parametrize("implementation", ["loop", "foreach", "fused"])
@pytest.mark.parametrize(("kind", "options", "cost"), OPTIMIZERS)
def test_loop_foreach_and_fused_optimizers_cost_the_same(
    kind: Any, options: dict[str, Any], cost: int, implementation: str
) -> None:
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 50))
    chosen = {"foreach": implementation == "foreach", "fused": implementation == "fused"}
    optimizer = kind(model.parameters(), lr=0.1, **options, **chosen)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    with FlopCounter(model) as counter:
        optimizer.step()
    size = sum(parameter.numel() for parameter in model.parameters())
    counted = counter.result()
    # Each parameter has a few scalar step counters.
    assert cost * size <= counted.optimizer <= cost * size + 4 * len(list(model.parameters()))
    assert counted.forward == counted.elementwise_forward == 0


# FLOPs that LoRA (r = 4, all dense convolutions, batch 2, 224 px) saves against full fine-tuning, in percent: in the
# accounting of the source study, and exactly.
REDUCTIONS = {
    "resnet18": (30, 30),
    "mobilenetv2_100": (88, 24),
    "mobilenetv3_large_100": (91, 24),
    "mobilenetv3_small_100": (93, 21),
}
FVCORE_BACKBONES = [
    "mobilenetv1_100",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "mobilenetv4_conv_small",
    "efficientnet_lite0",
    "mnasnet_100",
    "fbnetc_100",
    "ghostnet_050",
    "tinynet_e",
    "repvgg_a0",
]


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 4, 16, 32])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_backward_of_a_convolution_costs_two_forward_passes(dims: int, groups: int, dilation: int, stride: int) -> None:
    first = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, 32, 1)
    kind = type(first)
    model = nn.Sequential(first, kind(32, 64, 3, stride=stride, padding=1, dilation=dilation, groups=groups))
    x = torch.empty(2, 3, *[9, 10, 11][:dims])
    counted = count_flops(model, x)
    with torch.no_grad():
        positions = prod(model(x).shape[2:])
    multiply_adds = 2 * positions * 64 * (32 // groups) * 3**dims  # of a batch of two
    assert counted.by_module["1"].forward == 2 * multiply_adds
    assert counted.by_module["1"].backward == 4 * multiply_adds
    # The first layer has no gradient of its input.
    assert counted.by_module["0"].backward == counted.by_module["0"].forward


@pytest.mark.parametrize("groups", [1, 4, 16, 32])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (2, 2), (3, 1)])
def test_transposed_convolution_costs_one_kernel_for_each_input_position(
    stride: int, dilation: int, groups: int
) -> None:
    layer = nn.ConvTranspose2d(32, 64, 3, stride=stride, dilation=dilation, output_padding=stride - 1, groups=groups)
    counted = count_flops(nn.Sequential(nn.Conv2d(3, 32, 1), layer), torch.empty(2, 3, 9, 10))
    multiply_adds = 2 * 9 * 10 * 32 * (64 // groups) * 9
    assert counted.by_module["1"].forward == 2 * multiply_adds
    assert counted.by_module["1"].backward == 4 * multiply_adds


def test_frozen_layers_cost_one_gradient_and_layers_before_the_first_trained_one_none() -> None:
    model = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1, groups=groups) for groups in (1, 8, 8, 2)])
    for trained in range(4):
        model.requires_grad_(False)
        model[trained].requires_grad_(True)
        counted = count_flops(model, torch.empty(2, 8, 6, 6))
        ratios = [counted.by_module[str(layer)].backward / counted.by_module[str(layer)].forward for layer in range(4)]
        assert ratios == [0.0] * trained + [1.0] * (4 - trained)


@pytest.mark.parametrize(("name", "stock"), [("mobilenetv2_100", 19.5), ("mobilenetv3_small_100", 34)])
def test_backward_of_a_mobile_network_costs_two_forward_passes(name: str, stock: float) -> None:
    model = timm.create_model(name).train()
    x = torch.empty(2, 3, 224, 224)
    counted = count_flops(model, x)
    assert 1.9 < counted.backward / counted.forward <= 2.0
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        loss = model.to("meta")(x.to("meta")).mean()
        forward = counter.get_total_flops()
        loss.backward()
    assert (counter.get_total_flops() - forward) / forward == pytest.approx(stock, abs=0.6)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("name", FVCORE_BACKBONES)
def test_forward_flops_match_fvcore(name: str) -> None:
    from fvcore.nn import FlopCountAnalysis

    logging.getLogger("fvcore").setLevel(logging.ERROR)
    model = timm.create_model(name).eval()
    x = torch.zeros(1, 3, 224, 224)
    multiply_adds = FlopCountAnalysis(model, x).by_operator()
    assert count_flops(model, x).forward == pytest.approx(
        2 * (multiply_adds["conv"] + multiply_adds["linear"]), rel=1e-3
    )


@pytest.mark.parametrize("name", REDUCTIONS)
def test_flop_reductions_match_the_source_study_and_the_exact_count(name: str) -> None:
    x = torch.empty(2, 3, 224, 224)
    full = timm.create_model(name).train()
    config = LoraConfig(r=4, target_modules=modules_with_role(full, "dense"))
    lora = get_peft_model(timm.create_model(name), config).train()
    reductions = []
    for accounting in ("source-study", "exact"):
        of_lora, of_full = (count_flops(model, x, accounting=accounting) for model in (lora, full))
        reductions.append(100 * (1 - (of_lora.forward + of_lora.backward) / (of_full.forward + of_full.backward)))
    assert reductions == pytest.approx(REDUCTIONS[name], abs=1)


def test_modules_and_operators_add_up_to_the_total(tiny_backbone: nn.Module, images: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(tiny_backbone.parameters())
    labels = torch.zeros(4, dtype=torch.long)
    counted = count_flops(
        tiny_backbone.train(), images, optimizer=optimizer, loss_fn=lambda logits: F.cross_entropy(logits, labels)
    )
    columns = list(vars(Flops()))
    for column in columns:
        by_operator = sum(getattr(flops, column) for flops in counted.by_operator.values())
        assert by_operator == getattr(counted, column) > 0
    children = [name for name, _ in tiny_backbone.named_children() if name in counted.by_module]
    for column in ("forward", "backward", "elementwise_forward", "elementwise_backward"):
        assert sum(getattr(counted.by_module[name], column) for name in children) == getattr(
            counted.by_module[""], column
        )
    assert counted.by_module[""].forward == counted.forward
    # The loss is outside the model.
    assert counted.by_module[""].elementwise_forward < counted.elementwise_forward


def test_fake_step_counts_the_same_as_a_real_one(tiny_backbone: nn.Module, images: torch.Tensor) -> None:
    tiny_backbone.train()
    optimizer = torch.optim.AdamW(tiny_backbone.parameters())
    before = {name: tensor.clone() for name, tensor in tiny_backbone.state_dict().items()}
    random_state = torch.get_rng_state()

    counted = count_flops(tiny_backbone, images, optimizer=optimizer)

    torch.testing.assert_close(dict(tiny_backbone.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not optimizer.state
    assert all(parameter.grad is None for parameter in tiny_backbone.parameters())

    take_step(tiny_backbone, images, optimizer, None)
    with FlopCounter(tiny_backbone) as counter:
        take_step(tiny_backbone, images, optimizer, None)
    assert counter.result() == counted


def test_checkpointing_counts_the_recomputed_forward_pass() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), *[nn.Sequential(nn.Conv2d(8, 8, 3), nn.Sigmoid()) for _ in range(4)])

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor) -> Any:
            return checkpoint_sequential(layers[1:], 4, layers[0](x), use_reentrant=False)

    x = torch.empty(2, 3, 20, 20)
    plain, checkpointed = count_flops(layers, x), count_flops(Checkpointed(), x)
    assert checkpointed.forward == plain.forward
    # The last of the four segments is not checkpointed.
    again = sum(plain.by_module[str(layer)].forward for layer in (1, 2, 3))
    assert checkpointed.backward == plain.backward + again


def test_unknown_accounting_is_refused(tiny_backbone: nn.Module, images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="accounting is 'study', expected one of exact, source-study"):
        count_flops(tiny_backbone, images, accounting="study")
