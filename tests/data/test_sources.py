"""Image folders and Hugging Face datasets as splits."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from peft_edge.data import sources
from peft_edge.data.sources import domain_from_splits, read_splits
from tests.data.conftest import ImageFolder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[DatasetDict], None]:
    """Return a function that makes every name of a dataset on the Hub stand for the given dataset."""

    def serve(splits: DatasetDict) -> None:
        monkeypatch.setattr(sources, "load_dataset", lambda name, subset: splits)

    return serve


def png(value: int) -> dict[str, bytes | None]:
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def test_folder_has_the_names_of_its_subfolders_as_classes(image_folder: ImageFolder) -> None:
    folder = image_folder("pets", ["dog", "cat"])
    train = read_splits(str(folder))["train"]
    features = {"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog"]), "content": Value("string")}
    assert train.features == Features(features)
    assert len(train) == 24
    images = {np.asarray(Image.open(path)).tobytes() for path in (folder / "dog").iterdir()}
    assert {np.asarray(row["image"]).tobytes() for row in train if row["label"] == 1} == images


@pytest.mark.parametrize("names", [["train", "train station", "dog"], ["test", "val"]])
def test_class_folders_named_like_splits_are_classes(image_folder: ImageFolder, names: list[str]) -> None:
    splits = read_splits(str(image_folder("pets", names)))

    assert splits["train"].features["label"].names == sorted(names)
    assert len(splits["train"]) == 12 * len(names)


def test_files_named_like_splits_stay_in_their_class(image_folder: ImageFolder) -> None:
    folder = image_folder("pets", ["cat", "dog"])
    for path in list((folder / "cat").iterdir())[:4]:
        path.rename(path.with_name(f"test_{path.name}"))

    assert len(read_splits(str(folder))["train"]) == 24


def test_missing_splits_are_split_off_the_training_images(image_folder: ImageFolder) -> None:
    splits = read_splits(str(image_folder("pets", ["cat", "dog"], count=50)))
    domain = domain_from_splits("pets", splits, train_split="train", seed=0)
    assert [len(split) for split in vars(domain).values()] == [70, 10, 20]


def test_class_with_too_few_images_for_validation_is_named(
    image_folder: ImageFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folder = image_folder("pets", ["cat", "dog"], count=50)
    for path in sorted((folder / "dog").iterdir())[2:]:
        path.unlink()
    domain = domain_from_splits("pets", read_splits(str(folder)), train_split="train", seed=0)
    assert [split["label"][:].count(1) for split in vars(domain).values()] == [1, 0, 1]
    assert [split["label"][:].count(0) for split in vars(domain).values()] == [37, 4, 9]
    assert caplog.messages == [
        "pets: the validation split has no image of dog: its accuracy does not include these classes"
    ]


def test_existing_splits_are_used(image_folder: ImageFolder) -> None:
    splits = read_splits(str(image_folder("pets", ["cat", "dog"], splits=("train", "validation", "test"))))
    domain = domain_from_splits("pets", splits, train_split="train", seed=0)
    assert vars(domain) == dict(splits)


def test_columns_are_found_by_their_features(hub: Callable, random_images: Callable[..., Dataset]) -> None:
    dataset = random_images(6, ["a", "b"]).rename_columns({"image": "img", "label": "fine"})
    hub(DatasetDict(train=dataset.add_column("width", [16] * 6)))
    assert read_splits("owner/data")["train"].column_names == ["image", "label", "content"]


def test_ambiguous_columns_must_be_chosen(hub: Callable, random_images: Callable[..., Dataset]) -> None:
    dataset = random_images(6, ["a", "b"])
    coarse = Dataset.from_dict({"coarse": [1, 0] * 3}, Features({"coarse": ClassLabel(names=["x", "y"])}))
    hub(DatasetDict(train=dataset.add_column("coarse", coarse["coarse"][:], feature=coarse.features["coarse"])))
    with pytest.raises(ValueError, match="2 columns that could be the label: set label_column to one of label, coarse"):
        read_splits("owner/data")
    assert read_splits("owner/data", label_column="coarse")["train"]["label"][:] == [1, 0] * 3


@pytest.mark.parametrize(("values", "names"), [([10, 2, 10], ["2", "10"]), (["x", "b", "x"], ["b", "x"])])
def test_plain_labels_become_the_same_classes_in_every_split(hub: Callable, values: list, names: list[str]) -> None:
    features = Features({"image": ImageFeature(), "label": Value("string" if isinstance(values[0], str) else "int64")})
    train, test = (
        Dataset.from_dict({"image": [png(0)] * len(part), "label": part}, features) for part in (values, values[:1])
    )
    hub(DatasetDict(train=train, test=test))
    splits = read_splits("owner/data")
    assert splits["train"].features["label"].names == splits["test"].features["label"].names == names
    assert splits["train"]["label"][:] == [1, 0, 1]
    assert splits["test"]["label"][:] == [1]


def test_split_with_hidden_labels_is_left_out(hub: Callable, random_images: Callable[..., Dataset]) -> None:
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    hidden = Dataset.from_dict({"image": [png(0)], "label": [-1]}, features)
    hub(DatasetDict(train=random_images(6, ["a", "b"]), test=hidden))
    assert list(read_splits("owner/data")) == ["train"]


def test_missing_split_error_lists_the_splits(image_folder: ImageFolder) -> None:
    splits = read_splits(str(image_folder("pets", ["cat", "dog"], splits=("train", "test"))))
    with pytest.raises(ValueError, match="no labelled split 'day': name one of train, test"):
        domain_from_splits("pets", splits, train_split="day", seed=0)


def test_missing_column_error_lists_the_columns(image_folder: ImageFolder) -> None:
    with pytest.raises(ValueError, match="no column 'picture': set image_column to one of image"):
        read_splits(str(image_folder("pets", ["cat", "dog"])), image_column="picture")


def test_folder_with_one_class_is_refused(image_folder: ImageFolder) -> None:
    with pytest.raises(ValueError, match="one class, 'cat'; expected at least two"):
        read_splits(str(image_folder("pets", ["cat"])))


def test_folder_without_images_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no images"):
        read_splits(str(tmp_path))


@pytest.mark.parametrize("damage", [b"", b"not an image", "truncated"])
def test_damaged_file_is_named(damage: bytes | str, image_folder: ImageFolder) -> None:
    path = image_folder("pets", ["cat", "dog"]) / "dog" / "3.png"
    path.write_bytes(path.read_bytes()[:500] if damage == "truncated" else damage)
    with pytest.raises(ValueError, match=r"cannot read the image file .*dog/3\.png"):
        read_splits(str(path.parents[1]))


def test_unknown_hub_name_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot load the data 'owner/nothing'"):
        read_splits("owner/nothing")
