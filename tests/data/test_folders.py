"""Layouts of image folders: read with the right classes and splits, or refused; nothing is left out silently."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from peft_edge._compat import dataset_fingerprint
from peft_edge.data import load_task
from peft_edge.data.folders import content_hash, read_image_folder
from peft_edge.data.sources import domain_from_splits, file_hashes, read_splits


def make(folder: Path, *files: str) -> Path:
    """Create files and folders in `folder`, and return `folder`.

    A name that ends in `/` becomes an empty folder. Files with the ending .jpg, .png or none are images of different
    colours. Files with any other ending contain text.
    """
    folder.mkdir(exist_ok=True)
    for number, name in enumerate(files):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        elif path.suffix in ("", ".jpg", ".png", ".heic", ".HEIC"):
            Image.new("RGB", (4, 4), (number, len(str(folder)) % 256, 7)).save(path, "PNG")
        if path.suffix not in ("", ".jpg", ".png"):
            path.write_text("not an image")
    return folder


def paths_of(images: Dataset) -> list[str]:
    return [image["path"] for image in images.cast_column("image", ImageFeature(decode=False))["image"]]


def found(folder: Path) -> dict[str, dict[str, int]]:
    """Return the number of images for each split and class. Check that each image is in the folder of its class."""
    splits = read_splits(str(folder))
    counts = {}
    for split, images in splits.items():
        names = [images.features["label"].names[label] for label in images["label"]]
        counts[split] = {name: names.count(name) for name in dict.fromkeys(names)}
        paths = [
            image["path"]
            for image in images.cast_column("image", images.features["image"].__class__(decode=False))["image"]
        ]
        assert all(f"/{name}/" in path for name, path in zip(names, paths, strict=True))
    return counts


PETS = ("cat/1.png", "cat/2.png", "dog/1.png")
SPLITS = tuple(f"{split}/{pet}" for split in ("train", "val", "test") for pet in PETS)
COUNTS = {"cat": 2, "dog": 1}
THREE = {"train": COUNTS, "validation": COUNTS, "test": COUNTS}

READ: dict[str, tuple[tuple[str, ...], dict[str, dict[str, int]], str]] = {
    "classes": (PETS, {"train": COUNTS}, ""),
    "splits": (SPLITS, THREE, ""),
    "splits beside a repository": ((*SPLITS, ".git/config", ".git/a.png"), THREE, "1 hidden folder"),
    "splits beside a Mac's folder": ((*SPLITS, "__MACOSX/train/cat/1.png"), THREE, "1 hidden folder"),
    "splits beside raw images": ((*SPLITS, "raw/cat/9.png"), THREE, "1 folder next to the splits (raw)"),
    "splits beside files": ((*SPLITS, "README.md", "9.png"), THREE, "2 files next to the splits (first 9.png)"),
    "capital splits": (tuple(name.replace("t", "T", 1) if name[0] == "t" else name for name in SPLITS), THREE, ""),
    "long names of splits": (
        tuple(name.replace("train/", "training/").replace("val/", "Validation/") for name in SPLITS),
        THREE,
        "",
    ),
    "sets": (tuple(name.replace("train/", "train_set/").replace("test/", "test_set/") for name in SPLITS), THREE, ""),
    "test images without classes": (
        (*(name for name in SPLITS if name[:4] != "test"), "test/1.png"),
        {"train": COUNTS, "validation": COUNTS},
        "1 folder next to the splits (test)",
    ),
    "folders inside of the classes": (
        ("cat/indoor/1.png", "cat/outdoor/2.png", "dog/indoor/1.png"),
        {"train": COUNTS},
        "",
    ),
    "folders and images in a class": (("cat/1.png", "cat/a/b/c/2.png", "dog/1.png"), {"train": COUNTS}, ""),
    "classes called train and test": (
        ("train/1.png", "test/1.png", "bus/1.png"),
        {"train": {"bus": 1, "test": 1, "train": 1}},
        "",
    ),
    "numbers": (("0/1.png", "1/1.png", "10/1.png", "2/1.png"), {"train": {"0": 1, "1": 1, "10": 1, "2": 1}}, ""),
    "odd names": (
        ("Ärger/1.png", "a b/1.png", "[x]*/1.png"),
        {"train": {"[x]*": 1, "a b": 1, "Ärger": 1}},
        "",
    ),
    "no ending": ((*PETS, "dog/2"), {"train": {"cat": 2, "dog": 2}}, ""),
    "phone": (
        (*PETS, "dog/2.HEIC", "dog/3.HEIC"),
        {"train": COUNTS},
        "2 .HEIC files that Pillow cannot read as an image (first dog/2",
    ),
    "archive": (
        (*PETS, "dog/all.zip"),
        {"train": COUNTS},
        "1 .zip file that Pillow cannot read as",
    ),
    "metadata": ((*PETS, "cat/metadata.csv", "metadata.csv"), {"train": COUNTS}, "2 .csv files that Pillow"),
    "hidden files": ((*PETS, "cat/._1.png", "dog/.DS_Store"), {"train": COUNTS}, "2 hidden files (first cat/._1.png)"),
    "empty folders": ((*PETS, "ant/", "bee/"), {"train": COUNTS}, "2 empty folders (first ant)"),
    "hidden folders": ((*PETS, ".cache/1.png", "dog/.thumbs/1.png"), {"train": COUNTS}, "2 hidden folders"),
    "a class without images": ((*PETS, "owl/notes.txt"), {"train": COUNTS}, "1 .txt file that"),
    "a class in test only": (
        (*SPLITS, "test/owl/1.png", "test/owl/2.png"),
        {**THREE, "test": {**COUNTS, "owl": 2}},
        "the class 'owl' has no image in train, and 2 in test",
    ),
}

REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "loose image": ((*PETS, "9.png"), "the image .*9.png is outside of the class folders"),
    "loose image in a split": ((*SPLITS, "train/9.png"), "the image .*train/9.png is outside of the class folders"),
    "flat": (("1.png", "2.png"), "the image .*1.png is outside"),
    "empty": ((), "holds no images"),
    "only other files": (("cat/a.txt", "dog/b.txt"), "holds no images.*2 .txt files that Pillow"),
    "splits of images": (("train/1.png", "test/1.png"), "train holds images and no class folders"),
    "two training splits": (
        (*SPLITS, "Train2/x.txt", "training/cat/1.png"),
        "folders for train: train, training",
    ),
    "two validation splits": ((*SPLITS, "dev/cat/1.png"), "several folders for validation: dev, val"),
    "no training split": (tuple(name for name in SPLITS if name[:5] != "train"), "test/ and .*no train/"),
    "splits with other words": (
        tuple(f"data_{name}" for name in SPLITS),
        "data_test and data_train and data_val contain folders and could be either",
    ),
    "words of splits": (
        tuple(f"{name}/inner/1.png" for name in ("train station", "test-pattern", "bus")),
        "test-pattern and train station contain folders",
    ),
    "splits inside of the classes": (
        tuple(f"{name.split('/')[0]}/{split}/1.png" for name in PETS for split in ("train", "test")),
        "cat contains the split folders test and train",
    ),
    "a class called train with folders": (
        ("train/freight/1.png", "bus/city/1.png"),
        "contains bus/ and train/, which contains folders",
    ),
    "folder around the classes": (
        tuple(f"pets/{name}" for name in PETS),
        "one class, 'pets'.*inside .*/pets, pass that path instead",
    ),
    "folder around the splits": (
        tuple(f"pets/{name}" for name in SPLITS),
        "pets contains the split folders test and train",
    ),
}


@pytest.mark.parametrize("case", READ)
def test_layout_is_read(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files, expected, message = READ[case]
    assert found(make(tmp_path / "data", *files)) == expected
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert message in said
    assert bool(message) == bool(said)


@pytest.mark.parametrize("case", REFUSED)
def test_ambiguous_layout_is_refused(case: str, tmp_path: Path) -> None:
    files, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        read_splits(str(make(tmp_path / "data", *files)))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such a name")
def test_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", *PETS)
    (folder / "cat" / "1.png").rename(folder / "cat" / os.fsdecode(b"\xff.png"))
    with pytest.raises(ValueError, match=r"cat/\\udcff.png' is not valid UTF-8: rename it"):
        read_splits(str(folder))


@pytest.mark.skipif(os.name != "posix", reason="links need a permission")
def test_links_are_followed_and_broken_ones_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(tmp_path / "data", *PETS)
    outside = make(tmp_path / "outside", "owl/1.png", "3.png")
    (folder / "owl").symlink_to(outside / "owl")
    (folder / "dog" / "3.png").symlink_to(outside / "3.png")
    (folder / "dog" / "4.png").symlink_to(outside / "4.png")
    (folder / "dog" / "loop").symlink_to(folder / "dog")
    assert found(folder) == {"train": {"cat": 2, "dog": 2, "owl": 1}}
    assert "1 broken link (dog/4.png); 1 link to a folder above it (dog/loop)" in caplog.text


def test_numbers_are_names_of_classes(tmp_path: Path) -> None:
    # As indices, 0 1 2 would be taken for the classes 1 2 3.
    folders = [
        make(tmp_path / name, *(f"{label}/{number}.png" for label in labels for number in range(12)))
        for name, labels in (("source", "123"), ("other", "012"), ("same", "321"))
    ]
    source, other, same = map(str, folders)
    with pytest.raises(ValueError, match=f"only '{source}' has 3, and only '{other}' has 0"):
        load_task(source, shift=other)
    target = load_task(source, shift=same).targets[0]
    for split in vars(target).values():
        for path, label in zip(paths_of(split), split["label"], strict=True):
            assert Path(path).parent.name == target.class_names[label]


def test_fingerprint_follows_the_content_and_not_names_or_times(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", *PETS)
    before = read_image_folder(folder)
    first = domain_fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert domain_fingerprint(tmp_path / "copy") == first
    path = folder / "cat" / "1.png"
    stat = path.stat()
    content = bytearray(path.read_bytes())
    changed = make(tmp_path / "changed", "1.png") / "1.png"
    Image.new("RGB", (4, 4), (0, 1, 200)).save(changed)
    assert changed.stat().st_size == stat.st_size, "the test needs another image of the same size"
    path.write_bytes(changed.read_bytes())
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    assert domain_fingerprint(folder) != first
    path.write_bytes(content)
    assert domain_fingerprint(folder) == first
    assert before["train"]["content"][0] == content_hash(bytes(content))


def domain_fingerprint(folder: Path) -> str:
    return dataset_fingerprint(read_splits(str(folder))["train"])


@pytest.fixture
def pool(image_folder: Callable[..., Path]) -> Path:
    return image_folder("pool", ["cat", "dog"], count=30)


def contents(*splits) -> set[str]:
    return {content for split in splits for content in file_hashes(split)}


def disjoint(task) -> bool:
    domains = [task.source, *task.targets]
    trained = contents(*(domain.train for domain in domains))
    chosen = contents(*(domain.validation for domain in domains))
    tested = contents(*(domain.test for domain in domains))
    return not trained & tested and not trained & chosen and not chosen & tested


def copy_into(folder: Path, *pairs: tuple[str, str]) -> None:
    for source, target in pairs:
        shutil.copy(folder / source, folder / target)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [{"shift": "contrast"}, {"new_classes": ["owl"], "rehearsal_size": 6}])
def test_copies_in_one_folder_end_in_one_split(
    seed: int, options: dict, image_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = image_folder("pool", ["cat", "dog", "owl"], count=30)
    copy_into(folder, *((f"cat/{n}.png", f"cat/copy {n}.png") for n in range(20)), ("dog/1.png", "dog/0.png"))
    task = load_task(str(folder), seed=seed, **options)
    assert disjoint(task)
    assert "copies of images" in caplog.text
    assert "21 of 110 from train" in caplog.text


def test_copies_of_test_images_leave_the_other_splits(
    image_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = image_folder("pets", ["cat", "dog"], count=30, splits=("train", "val", "test"))
    copy_into(folder, ("test/cat/1.png", "train/cat/1.png"), ("test/dog/1.png", "val/dog/1.png"))
    copy_into(folder, ("val/cat/2.png", "train/cat/2.png"), ("train/cat/3.png", "train/cat/4.png"))
    task = load_task(str(folder), shift="contrast")
    assert disjoint(task)
    assert len(task.source.test) == 60
    assert "1 of 60 from validation, 2 of 60 from train" in caplog.text


@pytest.mark.parametrize("shift", ["test", "val"])
def test_a_split_that_is_the_target_is_no_split_of_the_source(shift: str, image_folder: Callable[..., Path]) -> None:
    folder = image_folder("pets", ["cat", "dog"], count=30, splits=("train", "val", "test"))
    task = load_task(str(folder), shift={"val": "validation"}.get(shift, shift))
    assert disjoint(task)
    assert contents(*vars(task.targets[0]).values()) == contents(
        read_splits(str(folder))[{"val": "validation"}.get(shift, shift)]
    )


def test_training_split_as_shift_is_refused(pool: Path) -> None:
    with pytest.raises(ValueError, match="'train' is the split that the source is trained on"):
        load_task(str(pool), shift="train")


def test_images_of_the_source_leave_the_target(
    image_folder: Callable[..., Path], pool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    night = image_folder("night!", ["cat", "dog"], count=30)
    for number in range(12):
        shutil.copy(pool / "cat" / f"{number}.png", night / "cat" / f"{number}.png")
    task = load_task(str(pool), shift=str(night))
    assert disjoint(task)
    assert "12 of 60 from train" in caplog.text
    with pytest.raises(ValueError, match="no image for train that is not a copy"):
        load_task(str(pool), shift=str(pool))


@pytest.mark.parametrize("options", [{"shift": "invert"}, {"new_classes": ["8", "9"], "rehearsal_size": 80}])
def test_embedded_digits_are_disjoint(options: dict) -> None:
    task = load_task("digits", image_size=8, **options)
    if "shift" in options:  # pixels are inverted; the images of the source are enough
        task = type(task)(name="", change="", source=task.source, targets=())
    assert disjoint(task)


def test_divided_split_keeps_one_of_each_image(pool: Path) -> None:
    copy_into(pool, ("cat/1.png", "cat/2.png"))
    domain = domain_from_splits("pool", read_splits(str(pool)), train_split="train", seed=0)
    assert sum(map(len, vars(domain).values())) == 59


def test_copies_in_several_classes_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path, *PETS)
    shutil.copy(tmp_path / "cat" / "1.png", tmp_path / "dog" / "copy.png")
    read_image_folder(tmp_path)
    assert "1 image files are in several classes" in caplog.text
    assert f"{tmp_path / 'cat' / '1.png'} and {tmp_path / 'dog' / 'copy.png'}" in caplog.text


def test_link_to_the_folder_of_all_classes_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its images would be read a second time, as images of the class that contains the link."""
    make(tmp_path, *PETS)
    expected = len(read_image_folder(tmp_path)["train"])
    (tmp_path / "cat" / "all").symlink_to(tmp_path)
    assert len(read_image_folder(tmp_path)["train"]) == expected
    assert "1 link to a folder above it (cat/all)" in caplog.text
