"""The captured step against eager training by `torch.optim`, in double precision."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from peft_edge import ConvAdapterConfig, ConvLoraConfig, prepare_model_for_lean_training
from peft_edge.export.train_step import (
    CORRECT,
    FEATURES,
    IMAGES,
    LABELS,
    LEARNING_RATE,
    LOGITS,
    LOSS,
    MASK,
    NEW,
    StepOptimizer,
    TrainStep,
    capture_train_step,
    trained_names,
)
from tests.export.support import randomize

SGD, ADAMW = StepOptimizer(weight_decay=0.01), StepOptimizer(name="adamw", weight_decay=0.05)
RATES = {"sgd": 0.05, "adamw": 2e-3}
BATCH_SIZE = 4


def adapted(network: nn.Module, head: str, **options: object) -> PeftModel:
    """Return a network with random BatchNorm statistics, and with an adapter that changes the output."""
    config = {"r": 2, "target_modules": "dense", "norm": "frozen", "modules_to_save": [head], **options}
    model = get_peft_model(network, ConvLoraConfig(**config))
    return randomize(model)


def sequential() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()),
        *(nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8), nn.Hardswish()),
        *(nn.Conv2d(8, 12, 3, 1, 2, dilation=2), nn.SiLU(), nn.MaxPool2d(3, 2, 1)),
        *(
            nn.Conv2d(12, 8, 1),
            nn.BatchNorm2d(8),
            nn.Sigmoid(),
            nn.AvgPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(1),
        ),
        nn.Linear(8, 5),
    )


def batches(images: Tensor, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Return `count` random batches of images and labels. The second batch has only half of the images."""
    generator = torch.Generator().manual_seed(5)
    sizes = [len(images), len(images) // 2, *[len(images)] * (count - 2)]
    return [
        (
            torch.randn(size, *images.shape[1:], generator=generator, dtype=torch.float64),
            torch.randint(5, (size,), generator=generator),
        )
        for size in sizes
    ]


def train_by_torch(
    model: PeftModel, optimizer: StepOptimizer, data: list[tuple[Tensor, Tensor]]
) -> tuple[list[float], dict[str, Tensor]]:
    model = copy.deepcopy(model).double()
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    options = {"lr": RATES[optimizer.name], "weight_decay": optimizer.weight_decay}
    if optimizer.name == "sgd":
        rule = torch.optim.SGD(parameters.values(), momentum=optimizer.momentum, **options)
    else:
        rule = torch.optim.AdamW(parameters.values(), betas=optimizer.betas, eps=optimizer.eps, **options)
    losses = []
    for images, labels in data:
        rule.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        if optimizer.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters.values(), optimizer.max_grad_norm)
        rule.step()
        losses.append(loss.item())
    return losses, {name: parameter.detach() for name, parameter in parameters.items()}


def padded(step: TrainStep, images: Tensor, labels: Tensor, filling: float = 7.0) -> dict[str, Tensor]:
    """Return the inputs of the exported graph. Images of the value `filling` pad the batch to `BATCH_SIZE` images."""
    missing = BATCH_SIZE - len(images)
    return {
        IMAGES: torch.cat([images, images.new_full((missing, *images.shape[1:]), filling)]),
        LABELS: torch.cat([labels, labels.new_zeros(missing)]),
        MASK: torch.tensor([1.0] * len(images) + [0.0] * missing, dtype=torch.float64),
    }


def train_by_graph(
    step: TrainStep, optimizer: StepOptimizer, data: list[tuple[Tensor, Tensor]]
) -> tuple[list[float], dict[str, Tensor]]:
    values, losses = {**step.adapter, **step.state}, []
    rate = torch.tensor(RATES[optimizer.name], dtype=torch.float64)
    for images, labels in data:
        batch = padded(step, images, labels)
        found = step.step.run({**values, **batch, step.data: step.features(batch[IMAGES]), LEARNING_RATE: rate})
        values = {name: found[f"{NEW}{name}"] for name in values}
        losses.append(found[LOSS].item())
    return losses, values


def assert_trains_alike(model: PeftModel, optimizer: StepOptimizer, *, split: bool = False) -> TrainStep:
    images = torch.zeros(BATCH_SIZE, 3, 32, 32)
    step = capture_train_step(model, images, optimizer, split=split)
    data = batches(images)
    expected_losses, expected = train_by_torch(model, optimizer, data)
    losses, found = train_by_graph(step, optimizer, data)
    torch.testing.assert_close(losses, expected_losses, rtol=0, atol=1e-10)
    names = trained_names(model)
    assert {f"base_model.model.{inner}" for inner in names.values()} == expected.keys()
    for name, inner in names.items():
        torch.testing.assert_close(found[name], expected[f"base_model.model.{inner}"], rtol=0, atol=1e-10)
        assert not torch.equal(found[name], step.adapter[name])
    return step


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("targets", ["dense", "depthwise", "all-conv"])
def test_step_equals_torch(targets: str, optimizer: StepOptimizer) -> None:
    assert_trains_alike(adapted(sequential(), "15", target_modules=targets), optimizer)


@pytest.mark.parametrize(
    "options",
    [
        {"freeze_a": True},
        {"use_dora": True},
        {"use_dora": True, "target_modules": "depthwise"},
        {"lora_bias": True},
        {"bias": "lora_only", "target_modules": "depthwise"},
        {"use_rslora": True, "lora_alpha": 7},
        {"lora_dropout": 0.5},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*has no bias")
def test_variants_of_lora_equal_torch(options: dict[str, object]) -> None:
    assert_trains_alike(adapted(sequential(), "15", **options), StepOptimizer(momentum=0.0))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_clipping_equals_torch(optimizer: str) -> None:
    model = adapted(sequential(), "15")
    free, clipped = StepOptimizer(name=optimizer), StepOptimizer(name=optimizer, max_grad_norm=0.05)
    assert_trains_alike(model, clipped)
    assert_trains_alike(model, StepOptimizer(name=optimizer, max_grad_norm=1e6))
    data = batches(torch.zeros(BATCH_SIZE, 3, 32, 32))
    _, one = train_by_torch(model, free, data)
    _, other = train_by_torch(model, clipped, data)
    assert not all(torch.allclose(one[name], other[name]) for name in one)  # the limit was reached


@pytest.mark.parametrize(
    ("name", "head", "optimizer"),
    [
        ("mobilenetv2_035", "classifier", SGD),
        ("mobilenetv3_small_050", "classifier", ADAMW),
        ("resnet10t", "fc", SGD),
        pytest.param("tf_efficientnet_lite0", "classifier", SGD, marks=pytest.mark.slow),  # same-padding
    ],
)
def test_networks_of_timm_equal_torch(name: str, head: str, optimizer: StepOptimizer) -> None:
    assert_trains_alike(adapted(timm.create_model(name, num_classes=5), head), optimizer)


def test_other_adapters_equal_torch() -> None:
    config = ConvAdapterConfig(target_modules="pointwise", norm="frozen", modules_to_save=["15"])
    assert_trains_alike(randomize(get_peft_model(sequential(), config)), SGD)
    config = LoraConfig(r=2, target_modules=["0", "9"], modules_to_save=["15"])
    assert_trains_alike(randomize(get_peft_model(sequential(), config)), SGD)


@pytest.mark.parametrize("norm", ["recalibrate", "stats", "affine"])
def test_stored_statistics_are_used(norm: str) -> None:
    model = adapted(sequential(), "15", norm=norm)
    for name, buffer in model.named_buffers():
        if "lora_norm" in name and "running_mean" in name:
            buffer.add_(0.3)
    step = assert_trains_alike(model, SGD)
    assert any("lora_norm" in name for name in step.adapter) == (norm == "affine")


@pytest.mark.parametrize(("targets", "start"), [("3|9", "3"), ("6|9", "6"), ("9", "9")])
def test_step_on_features_equals_torch(targets: str, start: str) -> None:
    step = assert_trains_alike(adapted(sequential(), "15", target_modules=targets), ADAMW, split=True)
    assert step.start == start
    assert step.step.inputs[0] == step.predict.inputs[0] == FEATURES
    assert step.prefix.input_shapes == {IMAGES: [BATCH_SIZE, 3, 32, 32]}
    assert step.prefix.output_shapes[FEATURES] == step.step.input_shapes[FEATURES]
    # Frozen layers are either in the prefix or in the step.
    buffers = [sum(value.numel() for value in graph.module.buffers()) for graph in (step.prefix, step.predict)]
    whole = assert_trains_alike(adapted(sequential(), "15", target_modules=targets), ADAMW)
    assert sum(buffers) == sum(value.numel() for value in whole.predict.module.buffers())


def test_step_without_frozen_prefix_is_not_split() -> None:
    with pytest.raises(ValueError, match=r"cannot be split: nothing can be replayed: 0.* is trainable"):
        capture_train_step(adapted(sequential(), "15"), torch.zeros(BATCH_SIZE, 3, 32, 32), SGD, split=True)


def test_lean_model_gives_the_same_graph_and_stays_lean() -> None:
    model = adapted(sequential(), "15")
    images = torch.zeros(BATCH_SIZE, 3, 32, 32)
    plain = capture_train_step(model, images, SGD)
    prepare_model_for_lean_training(model, inplace_norm=True)
    classes = [type(module) for module in model.modules()]
    lean = capture_train_step(model, images, SGD)
    assert [type(module) for module in model.modules()] == classes
    data = batches(images)
    assert train_by_graph(plain, SGD, data)[0] == train_by_graph(lean, SGD, data)[0]


def test_padding_and_its_labels_change_nothing() -> None:
    model = adapted(sequential(), "15")
    step = capture_train_step(model, torch.zeros(BATCH_SIZE, 3, 32, 32), SGD)
    ((images, labels),) = batches(torch.zeros(2, 3, 32, 32), 1)[:1]
    values = {**step.adapter, **step.state, LEARNING_RATE: torch.tensor(0.1, dtype=torch.float64)}
    one = step.step.run({**values, **padded(step, images, labels, filling=0.0)})
    other = step.step.run({**values, **padded(step, images, labels, filling=100.0)})
    assert all(torch.equal(one[name], other[name]) for name in one)
    alone = padded(step, images[:0], labels[:0])
    nothing = step.step.run({**values, **alone})
    assert nothing[LOSS] == nothing[CORRECT] == 0
    decayed = StepOptimizer(weight_decay=0.0)
    step = capture_train_step(model, torch.zeros(BATCH_SIZE, 3, 32, 32), decayed)
    nothing = step.step.run({**values, **step.state, **alone})
    assert all(torch.equal(nothing[f"{NEW}{name}"], value) for name, value in step.adapter.items())


def test_correct_predictions_are_counted() -> None:
    model = adapted(sequential(), "15")
    step = capture_train_step(model, torch.zeros(BATCH_SIZE, 3, 32, 32), SGD)
    images = torch.randn(BATCH_SIZE, 3, 32, 32, dtype=torch.float64)
    predicted = copy.deepcopy(model).double()(images).argmax(1)
    labels = torch.where(torch.tensor([True, False, True, True]), predicted, (predicted + 1) % 5)
    batch = {IMAGES: images, LABELS: labels, MASK: torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)}
    rate = {LEARNING_RATE: torch.tensor(0.1, dtype=torch.float64)}
    assert step.step.run({**step.adapter, **step.state, **batch, **rate})[CORRECT] == 2


def test_prediction_uses_the_adapter_that_is_passed() -> None:
    model = adapted(sequential(), "15")
    step = capture_train_step(model, torch.zeros(BATCH_SIZE, 3, 32, 32), SGD)
    images = torch.randn(BATCH_SIZE, 3, 32, 32, dtype=torch.float64)
    other = {name: value + 0.01 for name, value in step.adapter.items()}
    double = copy.deepcopy(model).double()
    torch.testing.assert_close(step.predict.run({IMAGES: images, **step.adapter})[LOGITS], double(images).detach())
    with torch.no_grad():
        for parameter in double.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    torch.testing.assert_close(step.predict.run({IMAGES: images, **other})[LOGITS], double(images).detach())


def test_graph_keeps_bytes_instead_of_maps() -> None:
    """The map behind the ReLU6, which only a frozen convolution takes, is compared before the loss."""
    step = capture_train_step(adapted(sequential(), "15"), torch.zeros(BATCH_SIZE, 3, 32, 32), SGD)
    nodes = [str(node.target) for node in step.step.module.graph.nodes]
    assert (
        nodes.index("aten.hardtanh.default") < nodes.index("aten.lt.Scalar") < nodes.index("aten._log_softmax.default")
    )
    assert not any("native_batch_norm" in name or "convolution_backward" in name for name in nodes)


def test_model_is_unchanged() -> None:
    model = adapted(sequential(), "15").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    capture_train_step(model, torch.zeros(BATCH_SIZE, 3, 32, 32), SGD)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("norm", ["stats", "affine"])
def test_batch_statistics_are_refused_by_name(norm: str) -> None:
    model = adapted(sequential(), "15", norm=norm).train()
    with pytest.raises(ValueError, match=rf'cannot be exported: 1: norm="{norm}" in training mode uses batch stat'):
        capture_train_step(model, torch.zeros(BATCH_SIZE, 3, 32, 32), SGD)


def test_norm_and_dropout_in_training_mode_are_refused_by_name() -> None:
    network = nn.Sequential(*sequential()[:-1], nn.Dropout(0.1), nn.Linear(8, 5))
    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["16"])
    model = get_peft_model(network, config).train()
    with pytest.raises(ValueError, match=r"1: BatchNorm in training mode.*4: BatchNorm.*10: .*and 1 more"):
        capture_train_step(model, torch.zeros(BATCH_SIZE, 3, 32, 32), SGD)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with pytest.raises(ValueError, match=r"15: dropout is random: call model\.eval\(\) first"):
        capture_train_step(model, torch.zeros(BATCH_SIZE, 3, 32, 32), SGD)


def test_adapters_that_cannot_be_trained_are_refused() -> None:
    model = adapted(sequential(), "15")
    model.merge_adapter()
    with pytest.raises(ValueError, match="0: the adapter is merged"):
        capture_train_step(model, torch.zeros(BATCH_SIZE, 3, 32, 32), SGD)
    model = adapted(sequential(), "15", modules_to_save=None)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="one active adapter"):
        capture_train_step(model, torch.zeros(BATCH_SIZE, 3, 32, 32), SGD)
    model = adapted(sequential(), "15").requires_grad_(False)
    with pytest.raises(ValueError, match="has nothing to train"):
        capture_train_step(model, torch.zeros(BATCH_SIZE, 3, 32, 32), SGD)
    model = adapted(sequential(), "15", bias="all")
    with pytest.raises(ValueError, match='bias="all" saves a bias under two names'):
        capture_train_step(model, torch.zeros(BATCH_SIZE, 3, 32, 32), SGD)
    model = adapted(sequential(), "15")
    model.get_base_model()[1].get_base_layer().weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1\.base_layer\.weight is trained, but is no part of the adapter"):
        capture_train_step(model, torch.zeros(BATCH_SIZE, 3, 32, 32), SGD)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "lion"}, "expected sgd or adamw, found 'lion'"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"weight_decay": -1.0, "max_grad_norm": 0.0}, "weight_decay=-1.0, max_grad_norm=0.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": float("nan")}, "eps=nan"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepOptimizer(**options)
