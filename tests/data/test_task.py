"""`load_task`, and the division of classes into increments."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict, are_progress_bars_disabled
from datasets import Image as ImageFeature
from PIL import Image

from peft_edge.data import Domain, Task, embedded, load_configured_task, load_task, sources, task
from peft_edge.data.task import class_increments
from tests.data.conftest import ImageFolder
from tests.data.conftest import pixels_of as pixels
from tests.processes import run_program

NAMES = ["a", "b", "c", "d", "e", "f"]
SPLITS = ("train", "validation", "test")

Increments = Callable[..., tuple[Domain, tuple[Domain, ...]]]


def named(split: Dataset) -> dict[bytes, str]:
    """Return a dict from the pixels of each image to the name of its class.

    In these tests, no two images have the same pixels.
    """
    names = split.features["label"].names
    labels = [names[label] for label in split["label"]]
    return {np.asarray(image).tobytes(): label for image, label in zip(split["image"], labels, strict=True)}


@pytest.fixture
def whole(random_images: Callable[..., Dataset]) -> Domain:
    return Domain(**{key: random_images(60, NAMES, seed=seed) for seed, key in enumerate(SPLITS)})


@pytest.fixture
def spare(random_images: Callable[..., Dataset]) -> Dataset:
    return random_images(60, NAMES, seed=9)


@pytest.fixture
def increments(whole: Domain, spare: Dataset) -> Increments:
    def make(*new_classes: str, **options: int) -> tuple[Domain, tuple[Domain, ...]]:
        options = {"increments": 1, "rehearsal_size": 0, "adaptation_size": 512, "seed": 0} | options
        return class_increments(whole, spare, new_classes, **options)

    return make


def test_labels_list_base_classes_first_then_new_ones_in_the_given_order(increments: Increments) -> None:
    source, targets = increments("e", "b", "d", increments=2)
    assert source.class_names == ["a", "c", "f"]
    assert [target.class_names for target in targets] == [["a", "c", "f", "e", "b"], ["a", "c", "f", "e", "b", "d"]]
    for domain in (source, *targets):
        assert all(split.features["label"].names == domain.class_names for split in vars(domain).values())


def test_renumbered_images_keep_their_class(increments: Increments, whole: Domain, spare: Dataset) -> None:
    source, targets = increments("e", "b", "d", increments=2, rehearsal_size=20)
    truth = {key: named(split) for key, split in {**vars(whole), "spare": spare}.items()}
    for domain in (source, *targets):
        for key, split in vars(domain).items():
            assert named(split).items() <= (truth[key] | truth["spare"]).items()


def test_source_and_targets_contain_the_documented_classes(increments: Increments) -> None:
    source, targets = increments("e", "b", "d", increments=2)
    classes = [[set(named(getattr(domain, key)).values()) for key in SPLITS] for domain in (source, *targets)]
    assert classes == [
        [set("acf"), set("acf"), set("acf")],
        [set("eb"), set("acfeb"), set("eb")],
        [set("d"), set("acfebd"), set("d")],
    ]


def test_new_images_come_from_adaptation_and_rehearsal_images_from_earlier_training(
    increments: Increments, whole: Domain, spare: Dataset
) -> None:
    _, (first, second) = increments("e", "b", "d", increments=2, rehearsal_size=20)
    old, new = named(whole.train), named(spare)
    trained = named(first.train)
    assert Counter(label for image, label in trained.items() if image in new) == {"e": 10, "b": 10}
    assert Counter(label for image, label in trained.items() if image in old) == {"a": 6, "c": 6, "f": 6}
    kept = {image: label for image, label in named(second.train).items() if label != "d"}
    assert kept.items() <= trained.items()  # a device stores no other images
    assert Counter(kept.values()) == dict.fromkeys("acfeb", 4)


@pytest.mark.parametrize("rehearsal_size", [0, 5, 6, 23, 1000])
def test_rehearsal_size_is_divided_equally_and_not_exceeded(rehearsal_size: int, increments: Increments) -> None:
    _, targets = increments("e", "b", "d", increments=2, rehearsal_size=rehearsal_size)
    for target, group in zip(targets, ("eb", "d"), strict=True):
        kept = Counter(label for label in named(target.train).values() if label not in group)
        assert sum(kept.values()) <= rehearsal_size
        before = len(target.class_names) - len(group)
        assert set(kept.values()) <= {min(rehearsal_size // before, 10)}


def test_rehearsal_images_depend_on_the_seed(increments: Increments) -> None:
    first, again, other = (set(named(increments("e", rehearsal_size=10, seed=seed)[1][0].train)) for seed in (1, 1, 2))
    assert first == again != other


def test_increment_has_at_most_adaptation_size_new_images(increments: Increments) -> None:
    _, targets = increments("e", "b", "d", increments=2, adaptation_size=8)
    assert [Counter(named(target.train).values()) for target in targets] == [{"e": 4, "b": 4}, {"d": 8}]


def test_left_out_adaptation_images_are_counted(increments: Increments, caplog: pytest.LogCaptureFixture) -> None:
    _, (whole,) = increments("e", adaptation_size=None)
    assert not caplog.messages
    increments("e", adaptation_size=8)
    assert caplog.messages == [f"adapting with 8 of {len(whole.train)} images, because of data.adaptation_size"]


@pytest.mark.parametrize("rehearsal_size", [-1, 1, 3])
def test_rehearsal_that_cannot_be_shared_is_refused(rehearsal_size: int, increments: Increments) -> None:
    with pytest.raises(
        ValueError, match=f"rehearsal_size: {rehearsal_size} images cannot be shared among the 5 classes"
    ):
        increments("e", "b", increments=2, rehearsal_size=rehearsal_size)


def test_renumbering_shows_no_progress_bar(increments: Increments, capfd: pytest.CaptureFixture[str]) -> None:
    increments("e", rehearsal_size=10)
    assert not capfd.readouterr().err
    assert not are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("new_classes", "options", "message"),
    [
        (["g"], {}, r"no images of a class 'g', only of a, b, c, d, e, f$"),
        (["e", "e"], {}, "expected each class once, found e, e"),
        (["a", "b", "c", "d", "e"], {}, "of 6 classes 1 would be left for the source"),
        (["e", "b"], {"increments": 3}, "increments: expected 1 to 2, .* found 3"),
        (["e", "b"], {"increments": 2, "rehearsal_size": 4}, "4 images cannot be shared among the 5 classes"),
    ],
)
def test_impossible_increments_are_refused(
    new_classes: list[str], options: dict[str, int], message: str, increments: Increments
) -> None:
    with pytest.raises(ValueError, match=message):
        increments(*new_classes, **options)


def test_class_without_images_is_named(whole: Domain, spare: Dataset) -> None:
    without = spare.filter(lambda label: label != 4, input_columns="label")
    with pytest.raises(ValueError, match="no images of the class 'e'"):
        class_increments(whole, without, ["e"], increments=1, rehearsal_size=0, adaptation_size=9, seed=0)


def digits(**options: int) -> Task:
    return load_task("digits", new_classes=["6", "7", "8", "9"], image_size=8, **options)


def test_new_digits_have_the_documented_sizes() -> None:
    task = digits(rehearsal_size=60)
    assert task.change == "new classes 6, 7, 8, 9"
    assert task.class_names == [str(digit) for digit in range(10)]
    assert [len(split) for split in vars(task.source).values()] == [422, 90, 330]
    assert [len(split) for split in vars(task.targets[0]).values()] == [159 + 60, 150, 217]


def test_source_does_not_depend_on_the_increments() -> None:
    one, many = digits(), digits(increments=4, rehearsal_size=40, adaptation_size=30)
    assert one.source.fingerprint == many.source.fingerprint
    assert one.fingerprint != many.fingerprint
    assert many.change == "new classes 6, 7, 8, 9 in 4 increments"


CORRUPTED = "owner/corrupted"


def sizes(domain: object) -> list[int]:
    return [len(split) for split in vars(domain).values()]


def test_shapes_have_the_documented_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Rendering takes its time per image; a hundredth of the source is enough here.
    monkeypatch.setitem(embedded.SHAPES_SPLIT_SIZES, "source", 200)
    task = load_task("shapes", shift="rotation", image_size=16)
    assert sizes(task.source) == [200, 500, 2000]
    assert sizes(task.targets[0]) == [512, 500, 2000]
    assert task.num_classes == 20
    assert np.array_equal(pixels(task.targets[0].validation), np.rot90(pixels(task.source.validation), axes=(1, 2)))


def test_corrupted_folder_has_disjoint_source_and_adaptation_images(image_folder: ImageFolder) -> None:
    folder = str(image_folder("pets", ["cat", "dog"], count=50))
    task = load_task(folder, shift="invert", adaptation_size=10)
    assert sizes(task.source) == [60, 10, 20]
    assert sizes(task.targets[0]) == [10, 10, 20]
    assert np.array_equal(pixels(task.targets[0].test), 255 - pixels(task.source.test))
    source = {image.tobytes() for image in pixels(task.source.train)}
    assert not source & {image.tobytes() for image in 255 - pixels(task.targets[0].train)}


def test_second_folder_as_target(image_folder: ImageFolder) -> None:
    day, night = image_folder("day", ["cat", "dog"], count=30), image_folder("at night", ["cat", "dog"], count=20)
    task = load_task(str(day), shift=str(night), adaptation_size=12)
    assert sizes(task.source) == [42, 6, 12]
    assert sizes(task.targets[0]) == [12, 4, 8]
    assert task.change == str(night)


@pytest.fixture
def corrupted_parquet(tmp_path: Path) -> Path:
    """Return a folder like that of CIFAR-10-C on the Hub: a Parquet file with all corruptions, and numbers as labels.

    An image of level n is n pixels wide. Images of `fog` are 1 pixel high, and images of `snow` are 2 pixels high.
    """
    rows = []
    for index, corruption in enumerate(["fog", "snow"]):
        for level in (1, 2, 3):
            for row in range(20):
                file = io.BytesIO()
                Image.new("RGB", (level, 1 + index), (row, 0, 0)).save(file, "PNG")
                image = {"bytes": file.getvalue(), "path": None}
                labels = {"label": row % 2, "corruption_name": corruption, "corruption_level": level}
                rows.append({"image": image, **labels})
    (tmp_path / "corrupted").mkdir()
    Dataset.from_list(rows).cast_column("image", ImageFeature()).to_parquet(tmp_path / "corrupted" / "train.parquet")
    return tmp_path / "corrupted"


@pytest.fixture
def hub(
    monkeypatch: pytest.MonkeyPatch, random_images: Callable[..., Dataset], corrupted_parquet: Path
) -> dict[str, list[str]]:
    """Replace the Hub. Return an empty dict, to which a test adds the name and the class names of each dataset.

    Each dataset has the split `train` with 40 images and the split `dusk` with 30 images. The dataset `CORRUPTED` is
    the folder of `corrupted_parquet`.
    """
    classes: dict[str, list[str]] = {}

    def serve(name: str, subset: str | None, **options: object) -> DatasetDict:
        if name == CORRUPTED:
            return datasets.load_dataset(str(corrupted_parquet), **options)
        seed = 2 * len(name)
        day, dusk = (random_images(count, classes[name], seed=seed + i) for i, count in enumerate((40, 30)))
        return DatasetDict(train=day, dusk=dusk)

    monkeypatch.setattr(sources, "load_dataset", serve)
    return classes


def test_second_split_as_target(hub: dict[str, list[str]]) -> None:
    hub["owner/pets"] = ["cat", "dog"]
    task = load_task("owner/pets", shift="dusk")
    assert sizes(task.source) == [28, 4, 8]
    assert sizes(task.targets[0]) == [21, 3, 6]


def test_a_split_that_a_dataset_lacks_is_not_requested_from_the_hub(hub: dict[str, list[str]]) -> None:
    hub["owner/pets"] = ["cat", "dog"]
    with pytest.raises(ValueError, match=r"nor a split of the data \(train, dusk\), .*: unknown data 'dawn': expected"):
        load_task("owner/pets", shift="dawn")


def test_an_error_in_a_second_folder_is_reported_as_it_is(image_folder: ImageFolder) -> None:
    day, night = image_folder("day", ["cat", "dog"]), image_folder("night", ["cat", "dog"])
    (night / "cat" / "0.png").write_text("damaged")
    with pytest.raises(ValueError, match=f"^cannot read the image file '{night / 'cat' / '0.png'}'"):
        load_task(str(day), shift=str(night))


def test_classes_in_another_order_are_renumbered(hub: dict[str, list[str]]) -> None:
    hub |= {"owner/pets": ["cat", "dog"], "owner/animals": ["dog", "cat"]}
    images = sources.load_dataset("owner/animals", None)["train"]
    names = {
        image.tobytes(): ("dog", "cat")[label] for image, label in zip(pixels(images), images["label"], strict=True)
    }
    task = load_task("owner/pets", shift="owner/animals")
    assert task.class_names == task.targets[0].test.features["label"].names == ["cat", "dog"]
    for split in vars(task.targets[0]).values():
        found = [names[image.tobytes()] for image in pixels(split)]
        assert found == [task.class_names[label] for label in split["label"]]


def test_filtered_rows_as_target(hub: dict[str, list[str]]) -> None:
    hub["owner/pets"] = ["cat", "dog"]
    filters = [["corruption_name", "==", "snow"], ["corruption_level", "==", 3]]
    task = load_task("owner/pets", shift=CORRUPTED, shift_filters=filters)
    target = task.targets[0]
    assert sizes(target) == [14, 2, 4]
    assert {image.size for split in vars(target).values() for image in split["image"]} == {(3, 2)}
    # Its labels are numbers: the indices of the source's classes.
    assert target.class_names == ["cat", "dog"]
    assert sorted(target.test["label"]) == [0, 0, 1, 1]
    milder = load_task("owner/pets", shift=CORRUPTED, shift_filters=[filters[0], ["corruption_level", "==", 1]])
    assert milder.targets[0].fingerprint != target.fingerprint


def test_two_domains_of_one_dataset(hub: dict[str, list[str]]) -> None:
    rows = {level: [["corruption_name", "==", "snow"], ["corruption_level", "==", level]] for level in (1, 3)}
    both = load_task(CORRUPTED, source_filters=rows[1], shift_filters=rows[3])
    assert [sizes(domain) for domain in (both.source, *both.targets)] == 2 * [[14, 2, 4]]
    found = [
        {image.tobytes() for split in vars(domain).values() for image in pixels(split)}
        for domain in (both.source, *both.targets)
    ]
    assert not found[0] & found[1]


def test_two_domains_of_a_folder_are_the_folders_of_these_domains(image_folder: ImageFolder) -> None:
    for domain in ("photo", "sketch", "art painting"):
        image_folder(f"pacs/{domain}", ["cat", "dog"], count=20)
    folder = image_folder("pacs/cartoon", ["cat", "dog"], count=20).parent
    plain = load_task(str(folder / "photo"), shift=str(folder / "sketch"))
    photo = [["domain", "==", "photo"]]
    for sketch in ([["domain", "==", "sketch"]], [["domain", "!=", "photo"], ["domain", "in", ["sketch", "photo"]]]):
        assert load_task(str(folder), source_filters=photo, shift_filters=sketch).fingerprint == plain.fingerprint
    several = load_task(str(folder), source_filters=photo, shift_filters=[["domain", "!=", "photo"]])
    assert sum(sizes(several.targets[0])) == 3 * 40


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        (["domain", "==", "skech"], "none of the subfolders photo, sketch meets"),
        (["domain", "<", "sketch"], r"expected conditions \[domain, OPERATOR, NAME\] with an operator of ==, !=, in"),
        (["style", "==", "sketch"], "the only column of a folder is domain"),
    ],
)
def test_wrong_conditions_on_a_folder_are_refused_before_images_are_read(
    condition: list, message: str, image_folder: ImageFolder
) -> None:
    image_folder("pacs/photo", ["cat", "dog"])
    folder = image_folder("pacs/sketch", ["cat", "dog"]).parent
    (folder / "photo/cat/0.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=message):
        load_task(str(folder), source_filters=[["domain", "==", "photo"]], shift_filters=[condition])


ALL = ("train", "val", "test")


@pytest.mark.parametrize(
    ("photo", "sketch", "expected"),
    [
        (ALL, ("",), ["no validation split in sketch; no test split in sketch", "test images of {sketch} are drawn"]),
        (("train", "val"), ALL, ["no test split in photo", "test images of {photo} are drawn"]),
        (("train", "val"), ("",), ["no validation split in sketch", ""]),
        (ALL, ALL, ["", ""]),
        (("",), ("",), ["", ""]),
    ],
)
def test_domains_with_unequal_splits_give_one_warning(
    photo: tuple, sketch: tuple, expected: list[str], image_folder: ImageFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folders = {
        name: image_folder(f"pacs/{name}", ["cat", "dog"], splits=splits)
        for name, splits in (("photo", photo), ("sketch", sketch), ("cartoon", ("",)))
    }
    pacs = str(folders["photo"].parent)
    several = [["domain", "in", ["photo", "sketch"]]]
    for options, message in zip(
        (
            {"name": pacs, "source_filters": several, "shift": "invert"},
            {"name": str(folders["photo"]), "shift": str(folders["sketch"])},
        ),
        expected,
        strict=True,
    ):
        caplog.clear()
        load_task(**options)
        lines = [line for line in caplog.messages if "split" in line and "copies" not in line]
        assert len(lines) == bool(message)
        assert message.format(**folders) in "".join(lines)


def test_domains_with_different_classes_are_refused(image_folder: ImageFolder) -> None:
    image_folder("pacs/photo", ["cat", "dog"])
    folder = image_folder("pacs/sketch", ["cat", "owl"]).parent
    with pytest.raises(ValueError, match="found dog, owl in only one of photo/ and sketch/"):
        load_task(str(folder), source_filters=[["domain", "!=", "cartoon"]], shift="invert")


@pytest.mark.parametrize("rows", [["corruption_name", "==", "frog"], ["severity", "==", 3]])
def test_filters_without_a_matching_row_are_named(rows: list, hub: dict[str, list[str]]) -> None:
    hub["owner/pets"] = ["cat", "dog"]
    with pytest.raises(ValueError, match=f"a Hugging Face dataset with rows that pass the filters .*{rows[0]}"):
        load_task("owner/pets", shift=CORRUPTED, shift_filters=[rows])


def test_new_classes_of_a_folder(image_folder: ImageFolder) -> None:
    folder = str(image_folder("pets", ["cat", "dog", "owl", "rat"], count=20))
    task = load_task(folder, new_classes=["dog", "cat"], increments=2, rehearsal_size=9, adaptation_size=5)
    assert task.source.class_names == ["owl", "rat"]
    assert task.class_names == ["owl", "rat", "dog", "cat"]
    # 80 images: 16 for tests and 8 for validation, in equal shares, and 14 of each class to train on.
    assert [sizes(domain) for domain in (task.source, *task.targets)] == [[28, 4, 8], [5 + 8, 6, 4], [5 + 9, 8, 4]]


def test_target_with_other_classes_is_refused(image_folder: ImageFolder) -> None:
    day, night = image_folder("day", ["cat", "dog"]), image_folder("night", ["cat", "owl"])
    with pytest.raises(ValueError, match=f"only '{day}' has dog, and only '{night}' has owl. Add"):
        load_task(str(day), shift=str(night))


@pytest.mark.parametrize("is_source", [True, False])
def test_an_empty_class_folder_is_named_if_classes_differ(image_folder: ImageFolder, is_source: bool) -> None:
    day, night = image_folder("day", ["cat", "dog", "owl"]), image_folder("night", ["cat", "dog", "owl"])
    empty = (day if is_source else night) / "dog"
    for file in empty.rglob("*.*"):
        file.unlink()
    only = night if is_source else day
    message = f"classes: only '{only}' has dog. There are folders without images: {empty}. Add images"
    with pytest.raises(ValueError, match=message):
        load_task(str(day), shift=str(night))


@pytest.mark.parametrize(
    ("name", "shift", "message"),
    [
        ("digit", "invert", "unknown data 'digit': did you mean 'digits'"),
        ("./nowhere", "invert", "unknown data './nowhere': there is no such folder"),
        ("digits", "bland", "unknown shift 'bland': did you mean 'blend'"),
        ("digits", "/nowhere/at/all", "there is no such folder"),
        ("photos", "invert", "unknown data 'photos': expected digits, shapes, a folder that exists, or a Hugging Face"),
        ("digits", "validation", "unknown shift 'validation': expected blend, .*snow, a folder"),
    ],
)
def test_wrong_name_is_refused_before_data_is_read(
    name: str, shift: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "EMBEDDED", dict.fromkeys(task.EMBEDDED))
    with pytest.raises(ValueError, match=message):
        load_task(name, shift=shift)


def test_misspelt_folder_names_the_nearest_one(image_folder: ImageFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = image_folder("photo", ["cat", "dog"])
    image_folder("sketch", ["cat", "dog"])
    monkeypatch.chdir(photo.parents[1])
    near = str(Path(photo.parent.name) / "sketches")
    with pytest.raises(ValueError, match=rf"unknown shift '{near}': there is no such folder; did you .*sketch'\?$"):
        load_task(str(photo), shift=near)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"either a shift or new classes, found None and \[\]"),
        ({"shift": "invert", "new_classes": ["6"]}, "found 'invert' and"),
        ({"new_classes": ["6"], "severity": 3}, "severity applies to a corruption only: leave it out with new classes"),
        ({"shift": "owner/pets", "severity": 3}, "severity applies to a corruption only"),
        (
            {"shift": "fog", "shift_filters": [["level", "==", 1]]},
            "shift_filters applies to a Hugging Face dataset",
        ),
        ({"shift": ".", "shift_filters": [["level", "==", 1]]}, "the only column of a folder is domain"),
        (
            {"shift": "fog", "source_filters": [["level", "==", 1]]},
            "source_filters .* leave it out with 'digits'",
        ),
        (
            {"shift": "fog", "rehearsal_size": 60},
            "rehearsal_size applies to new classes only: .* the shift 'fog'; found 60",
        ),
        ({"shift": "fog", "increments": 2}, "increments applies to new classes only"),
        ({"shift": "fog", "severity": 7}, "must be 1 to 5, found 7"),
    ],
)
def test_contradicting_options_are_refused_before_data_is_read(
    options: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "EMBEDDED", dict.fromkeys(task.EMBEDDED))
    with pytest.raises(ValueError, match=message):
        load_task("digits", **options)


def test_task_fingerprint_depends_on_severity_and_seed() -> None:
    task = load_task("digits", shift="contrast", image_size=8)
    milder = load_task("digits", shift="contrast", image_size=8, severity=3)
    other_seed = load_task("digits", shift="contrast", image_size=8, seed=1)
    assert milder.source.fingerprint == task.source.fingerprint != other_seed.source.fingerprint
    assert len({task.fingerprint, milder.fingerprint, other_seed.fingerprint}) == 3


@pytest.mark.slow
def test_fingerprints_are_equal_in_another_process(tmp_path: Path) -> None:
    options = [{"shift": "blend"}, {"new_classes": ["6", "9"], "increments": 2, "rehearsal_size": 30}]
    tasks = f"[load_task('digits', image_size=8, **options).fingerprint for options in {options}]"
    there = run_program(f"from peft_edge.data import load_task; print(*{tasks})", tmp_path).split()
    assert there == [load_task("digits", image_size=8, **some).fingerprint for some in options]


def test_configured_task_does_not_depend_on_the_augmentation() -> None:
    options = {"shift": "invert", "image_size": 16}
    expected = load_task("digits", **options, seed=3).fingerprint
    for extra in ({}, {"augment": "none"}, {"augment": "photo"}):
        assert load_configured_task({"name": "digits", **options, **extra}, seed=3).fingerprint == expected
