"""data.py: batches and augmentation; releases of every form, good and bad; splits; photos; words.

The first part, batches and augmentation, goes with the first part of data.py. For the second part
releases are made here, of photos of a few pixels, each small enough to be checked by hand.
"""

import csv
import errno
import functools
import hashlib
import io
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold
from torchvision.transforms.v2.functional import normalize

import data
from conftest import close
from data import DataError

CPU = torch.device("cpu")
SIZE = data.THUMBNAIL_SIZE  # pictures of this size are decoded only once
MILK10K_CLASSES = ("AKIEC", "BCC", "BEN_OTH", "BKL", "DF", "INF")
MILK10K_CLASSES += ("MAL_OTH", "MEL", "NV", "SCCKA", "VASC")
ISIC2018_CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """The cache, runs/cache, is a new one for every test."""
    monkeypatch.chdir(tmp_path)


# --------------------------------------------------------------- photos and tables of tests


@functools.cache
def photo_file(name, colour):
    """The bytes of a photo of one colour; without a colour, of one that no other name gives."""
    if colour is None:
        rng = np.random.default_rng(list(name.encode()))
        colour = tuple(rng.integers(0, 256, 3).tolist())
    file = io.BytesIO()
    form = "PNG" if name.lower().endswith(".png") else "JPEG"
    Image.new("RGB", (12, 8), colour).save(file, form)
    return file.getvalue()


def write_photo(path, colour=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(photo_file(path.name, colour))


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


# ----------------------------------------------------------------- batches, augmentation


def test_the_example_at_the_top_of_data_py(spc_folder):
    release = data.read(spc_folder, size=SIZE)  # 60 drawn lesions
    rows = release.rows("train")
    assert rows.tolist() == list(range(25))
    batch = data.make_batch(release, rows[:24], CPU, torch.Generator())
    assert batch["clinical"].shape == batch["dermoscopy"].shape == (24, 3, SIZE, SIZE)
    assert batch["labels"].shape == (24, 8)


def release_of(pixels, views=data.VIEWS):
    """A Release of these pixels (N, V, S, S, 3), whose labels and words are their numbers."""
    n = len(pixels)
    numbers = torch.arange(n).view(n, 1)
    cases = [f"case {i}" for i in range(n)]
    return data.Release(
        kind="pairs",
        tasks={"number": tuple(cases)},
        views=views,
        cases=cases,
        lesion_ids=[""] * n,
        patients=[""] * n,
        labels=numbers,
        split=np.array(["train"] * n),
        pixels=pixels,
        words=torch.cat((torch.ones_like(numbers), numbers), 1),
        vocabulary=["", "begin"],
        photo_hashes=np.array([[f"{i}{view}" for view in views] for i in range(n)]),
    )


def test_a_batch_holds_the_rows_asked_for_normalised_as_by_torchvision():
    pixels = torch.randint(0, 256, (5, 2, 16, 16, 3), dtype=torch.uint8)
    rows = torch.tensor([3, 0, 4])
    batch = data.make_batch(release_of(pixels), rows, CPU)
    assert sorted(batch) == ["clinical", "dermoscopy", "labels", "words"]
    assert batch["labels"].tolist() == [[3], [0], [4]]
    assert batch["words"].tolist() == [[1, 3], [1, 0], [1, 4]]
    for v, view in enumerate(data.VIEWS):
        photos = pixels[rows, v].permute(0, 3, 1, 2) / 255
        expected = normalize(photos, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        assert batch[view].dtype == torch.float32
        close(batch[view], expected, 1e-6)


def test_a_pair_stays_a_pair_with_its_label(tmp_path):
    """Photos with a printed code, through the reader, the cache, shuffling and augmentation."""
    table = [["clinical", "dermoscopy", "number", "case"]]
    for i in range(64):
        bits = [i >> bit & 1 for bit in range(6)]
        photo = np.zeros((48, 48, 3), np.uint8)
        photo[..., 0] = 255 * np.repeat(bits, 8)  # a red bar of 8 pixels for each bit that is 1
        Image.fromarray(photo).save(tmp_path / f"c{i}.png")
        photo[..., 2] = 255  # the dermoscopy photo is the same, but blue
        Image.fromarray(photo).save(tmp_path / f"d{63 - i}.png")
        table.append([f"c{i}.png", f"d{63 - i}.png", i % 2, i])
    write_rows(tmp_path / "pairs.csv", table)
    release = data.read(tmp_path, 48)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(64, generator=generator)
    plain = data.make_batch(release, rows, CPU)
    augmented = data.make_batch(release, rows, CPU, generator)
    for n, row in enumerate(rows.tolist()):
        number = 0
        for bit in range(6):
            is_red = plain["clinical"][n, 0, 24, 8 * bit + 4] > 0  # in the middle of the bar
            number += 2**bit * int(is_red)
        assert number == row == int(release.cases[row])
        assert plain["labels"][n] == number % 2
        for batch in (plain, augmented):
            clinical, dermoscopy = batch["clinical"][n], batch["dermoscopy"][n]
            assert clinical[2].mean() < dermoscopy[2].mean() - 1, "the photos changed places"
            if 0 < row < 63:  # the same bars at the same places: one geometry for both
                bars = clinical[0] > clinical[0].mean()
                assert (bars == (dermoscopy[0] > dermoscopy[0].mean())).float().mean() > 0.97


def test_a_mask_moves_with_its_photo_and_has_no_colour():
    """The photo is its own mask, black and white: they stay alike wherever they are moved."""
    pixels = torch.zeros(40, 2, 32, 32, 3, dtype=torch.uint8)
    pixels[:, :, 4:14, 6:22] = 255
    release = release_of(pixels, ("dermoscopy", "mask"))
    rows = torch.arange(40)
    batch = data.make_batch(release, rows, CPU, torch.Generator().manual_seed(0))
    assert batch["mask"].shape == (40, 1, 32, 32)
    assert set(batch["mask"].unique().tolist()) == {0.0, 1.0}
    for photo, mask in zip(batch["dermoscopy"][:, 0], batch["mask"][:, 0]):
        middle = (photo.min() + photo.max()) / 2
        assert ((photo > middle).float() == mask).float().mean() > 0.97
    moved = data.augment(pixels.clamp(max=200), release.views, torch.Generator().manual_seed(0))
    brightest = moved[:, 1].amax((1, 2, 3))
    assert (brightest - 200).abs().max() < 0.01, "brightness or contrast of a mask"
    plain = data.make_batch(release, rows, CPU)["mask"]
    assert torch.equal(plain[:, 0], (pixels[:, 1, :, :, 0] > 127).float())


def test_augmentation_is_drawn_from_the_generator_alone():
    pixels = torch.randint(0, 256, (20, 2, 16, 16, 3), dtype=torch.uint8)
    copies = []
    for seed in (0, 0, 1):
        torch.rand(3)  # another state of torch's own generator
        copies.append(data.augment(pixels, data.VIEWS, torch.Generator().manual_seed(seed)))
    assert torch.equal(copies[0], copies[1])
    assert not torch.equal(copies[0], copies[2])


def augmented_copies(n):
    """Augmented copies of a map, as clinical and as dermoscopy photo: (n, 3, 40, 40) each.

    Red and green say where a place lies in the photo, x and y; blue has two levels, which tell
    contrast and brightness.
    """
    side = (torch.arange(40) * 2 + 1) / 40 - 1  # from -1 to 1
    pixels = torch.empty(1, 2, 40, 40, 3)
    pixels[..., 0] = 120 + 40 * side
    pixels[..., 1] = 120 + 40 * side[:, None]
    pixels[..., 2] = 80 + 80 * (side > 0)
    generator = torch.Generator().manual_seed(0)
    copies = data.augment(pixels.expand(n, -1, -1, -1, -1), data.VIEWS, generator)
    return copies[:, 0], copies[:, 1]


def read_the_map(copies):
    """What was done to copies of the map: matrices (n, 2, 3), contrast (n,), brightness (n,).

    A matrix leads from a place in the copy to the place in the map that is shown there.
    """
    blue = copies[:, 2].flatten(1)
    low, high = blue.min(1).values, blue.max(1).values
    contrast = (high - low) / 80
    brightness = low - 80 * contrast
    colours = (copies[:, :2] - brightness.view(-1, 1, 1, 1)) / contrast.view(-1, 1, 1, 1)
    places = (colours - 120) / 40  # (n, 2, 40, 40), from -1 to 1
    side = (torch.arange(40) * 2 + 1) / 40 - 1
    y, x = torch.meshgrid(side, side, indexing="ij")
    near = (x.abs() < 0.3) & (y.abs() < 0.3)  # what is shown here is never reflected
    shown_at = torch.stack((x[near], y[near], torch.ones(int(near.sum()))), 1)
    matrices = places[:, :, near] @ torch.linalg.pinv(shown_at).mT  # least squares
    return matrices, contrast, brightness / 255


def occurs(condition, share):
    measured = condition.float().mean()
    assert abs(measured - share) < 0.05, f"{measured:.3f}, not {share}"


def is_uniform(values, low, high):
    assert values.min() > low - 0.003
    assert values.max() < high + 0.003
    for quarter in range(4):
        occurs((values - low) / (high - low) < quarter / 4, quarter / 4)


def test_each_step_of_the_papers_augmentation_occurs_with_its_probability_and_range():
    n = 1000
    clinical, dermoscopy = augmented_copies(n)
    geometry, contrast, brightness = read_the_map(clinical)
    other_geometry, other_contrast, other_brightness = read_the_map(dermoscopy)
    assert (geometry - other_geometry).abs().max() < 1e-3, "both photos share the geometry"

    matrix, shift = geometry[:, :, :2], geometry[:, :, 2]
    zoom = torch.linalg.det(matrix).abs() ** -0.5
    rigid = matrix @ matrix.mT * zoom.view(n, 1, 1) ** 2
    assert (rigid - torch.eye(2)).abs().max() < 0.01, "nothing but flips, turns and zoom"
    occurs(torch.linalg.det(matrix) < 0, 1 / 2)  # one flip, not two
    is_moved = (zoom - 1).abs() + shift.abs().sum(1) > 0.003
    occurs(is_moved, 1 / 2)
    is_uniform(zoom[is_moved], 0.5, 1.5)
    is_uniform(shift[is_moved].flatten(), -1 / 8, 1 / 8)
    angle = torch.rad2deg(torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    is_uniform((angle[is_moved] + 45) % 90, 0, 90)
    still = angle[~is_moved].round()
    assert set(still.abs().tolist()) <= {0, 90, 180}
    occurs(still.abs() == 90, 1 / 4)  # a quarter turn in half of the copies, by 0 to 3 quarters
    occurs(still == 0, 3 / 8)

    is_lit = (contrast - 1).abs() > 1e-5
    other_is_lit = (other_contrast - 1).abs() > 1e-5
    occurs(is_lit, 1 / 2)
    occurs(is_lit & other_is_lit, 1 / 4)  # each photo has its own light
    occurs((contrast - other_contrast).abs() < 1e-3, 1 / 4)  # if neither photo has another one
    is_uniform(contrast[is_lit], 0.8, 1.2)
    is_uniform(other_contrast[other_is_lit], 0.8, 1.2)
    is_uniform(brightness[is_lit], -0.2, 0.2)
    is_uniform(other_brightness[other_is_lit], -0.2, 0.2)
    assert brightness[~is_lit].abs().max() < 0.001


def test_a_release_moves_to_a_device_with_labels_and_words():
    release = release_of(torch.zeros(4, 2, 8, 8, 3, dtype=torch.uint8))
    moved = release.to(torch.device("meta"))  # a device without memory
    assert (moved.labels.device.type, moved.words.device.type) == ("meta", "meta")
    assert (moved.pixels.device.type, release.labels.device.type) == ("cpu", "cpu")


# ------------------------------------------------ small releases, and how to change them

META = "meta/meta.csv"
TRUTH = "MILK10k_Training_GroundTruth.csv"
OWN = "pairs.csv"


def change_cell(path, line, column, text):
    """Line 0 is the header."""
    change_cells(path, [line], column, text)


def change_cells(path, lines, column, text):
    rows = read_rows(path)
    for line in lines:
        rows[line][rows[0].index(column)] = text
    write_rows(path, rows)


def add_columns(path, columns):
    """columns: name -> texts, of which the last stands for all lines that follow."""
    rows = read_rows(path)
    for column, texts in columns.items():
        for n, row in enumerate(rows):
            row.append(column if n == 0 else texts[min(n, len(texts)) - 1])
    write_rows(path, rows)


def remove_column(path, column):
    rows = read_rows(path)
    place = rows[0].index(column)
    write_rows(path, [row[:place] + row[place + 1 :] for row in rows])


def keep_lines(path, count):
    write_rows(path, read_rows(path)[: 1 + count])


def repeat_line(path, line):
    rows = read_rows(path)
    write_rows(path, [*rows, rows[line]])


def replace_bytes(path, old, new):
    contents = path.read_bytes()
    assert old in contents
    path.write_bytes(contents.replace(old, new))


def append_bytes(path, new):
    path.write_bytes(path.read_bytes() + new)


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_pairs(folder, n=24):
    """An own CSV file: pairs.csv, a task "lesion" of the classes a and b in turn."""
    rows = [["clinical", "dermoscopy", "lesion"]]
    for i in range(n):
        write_photo(folder / f"c{i}.png")
        write_photo(folder / f"d{i}.png")
        rows.append([f"c{i}.png", f"d{i}.png", "ab"[i % 2]])
    write_rows(folder / "pairs.csv", rows)
    return folder


def one_hot_rows(id_column, names, classes, labels):
    rows = [[id_column, *classes]]
    for name, label in zip(names, labels):
        rows.append([name, *(float(each == label) for each in classes)])
    return rows


def make_milk10k(folder, n=24, part="Training", flat=False):
    """MILK10k: lesions BCC and NV in turn; the photos of lesion i are ISIC_(2i) and ISIC_(2i+1)."""
    columns = ["lesion_id", "image_type", "isic_id", "age_approx", "sex", "skin_tone_class", "site"]
    rows = [columns]
    lesions = [f"IL_{i:07}" for i in range(n)]
    for i, lesion in enumerate(lesions):
        for side, image_type in enumerate(("clinical: close-up", "dermoscopic")):
            image = f"ISIC_{2 * i + side:07}"
            inner = "images" if flat else f"MILK10k_{part}_Input/{lesion}"
            write_photo(folder / inner / f"{image}.jpg")
            rows.append([lesion, image_type, image, 50, "male", 3, "trunk"])
    write_rows(folder / f"MILK10k_{part}_Metadata.csv", rows)
    rows = one_hot_rows("lesion_id", lesions, MILK10K_CLASSES, ["BCC", "NV"] * n)
    write_rows(folder / f"MILK10k_{part}_GroundTruth.csv", rows)
    return folder


def make_isic(folder, n=40, image_types=("clinical: close-up", "dermoscopic")):
    """A download of the ISIC Archive: two images of each lesion, two lesions of each patient."""
    rows = [["isic_id", "lesion_id", "patient_id", "image_type", "diagnosis_1", "sex"]]
    for i in range(n):
        diagnosis = ("Benign", "Malignant")[i % 2]
        for image_type in image_types:
            image = f"ISIC_{len(rows) - 1:07}"
            write_photo(folder / f"{image}.jpg")
            rows.append([image, f"IL_{i}", f"IP_{i // 2}", image_type, diagnosis, "female"])
    write_rows(folder / "metadata.csv", rows)
    return folder


def make_ham(folder, n=24):
    """HAM10000: two photos of each lesion. The mask of photo i is white in its first i columns."""
    columns = ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"]
    rows = [columns]
    (folder / "masks").mkdir(parents=True)
    for i in range(n):
        image = f"ISIC_{i:07}"
        write_photo(folder / f"HAM10000_images_part_{i % 2 + 1}" / f"{image}.jpg")
        mask = np.zeros((40, 40), np.uint8)
        mask[:, :i] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{image}_segmentation.png")
        label = ("nv", "mel")[i // 2 % 2]
        lesion = f"HAM_{i // 2:07}"
        rows.append([lesion, image, label, "follow_up", 45.0, "male", "lower extremity"])
    write_rows(folder / "HAM10000_metadata.csv", rows)
    comes_with_it = folder / "ISIC2018_Task3_Test_GroundTruth.csv"
    write_rows(comes_with_it, [["image_id", "dx"], ["ISIC_1", "nv"]])
    return folder


def make_isic2018(folder, parts=(("Training", 24), ("Validation", 6), ("Test", 6))):
    """ISIC 2018 task 3 as it is downloaded: a folder for each table and for its photos."""
    first = 0
    for part, n in parts:
        images = [f"ISIC_{first + i:07}" for i in range(n)]
        name = f"ISIC2018_Task3_{part}_GroundTruth"
        rows = one_hot_rows("image", images, ISIC2018_CLASSES, ["NV", "MEL"] * n)
        write_rows(folder / name / f"{name}.csv", rows)
        for image in images:
            write_photo(folder / f"ISIC2018_Task3_{part}_Input" / f"{image}.jpg")
        first += n
    return folder


@pytest.fixture
def spc(spc_folder, tmp_path):
    """The synthetic SPC with tables that pass for real ones: 60 cases, 25 / 12 / 23.

    Its photos are a link: do not change them.
    """
    folder = tmp_path / "release_v0"
    shutil.copytree(spc_folder / "meta", folder / "meta")
    (folder / "images").symlink_to(spc_folder / "images")
    change_cells(folder / META, range(1, 61), "notes", "")
    return folder


@pytest.fixture
def spc_with_photos(spc, spc_folder):
    """The same with photos of its own."""
    (spc / "images").unlink()
    shutil.copytree(spc_folder / "images", spc / "images")
    return spc


# ------------------------------------------------------- releases of every form: derm7pt


def test_spc_labels_follow_the_texts(spc):
    release = data.read(spc, SIZE)
    rows = read_rows(spc / META)
    lines = [dict(zip(rows[0], row)) for row in rows[1:]]
    assert release.kind == "spc"
    assert release.tasks == data.SPC_TASKS
    assert release.cases == [line["case_num"] for line in lines]
    assert release.metadata == {"sex": [line["sex"] for line in lines]}
    for n, line in enumerate(lines):
        for t, (task, column) in enumerate(data.SPC_COLUMNS.items()):
            name = release.tasks[task][release.labels[n, t]]
            assert line[column] in data.SPC_TEXTS[task][name]
        for v, column in enumerate(("clinic", "derm")):
            photo = data.decode(spc / "images" / line[column], SIZE)
            assert (release.pixels[n, v].numpy() == photo).all()
    assert Counter(release.split.tolist()) == {"train": 25, "valid": 12, "test": 23}
    assert release.rows("valid").tolist() == list(range(25, 37))
    assert not release.published
    assert "not derm7pt's published" in " ".join(release.notes)


def test_the_labels_of_derm7pt_are_all_known():
    """Counted in the published table: 24 classes of 8 tasks, and the texts that occur in it."""
    texts = sum(len(texts) for classes in data.SPC_TEXTS.values() for texts in classes.values())
    assert sum(len(classes) for classes in data.SPC_TASKS.values()) == 24
    assert texts == 20 + 3 + 3 + 5 + 4 + 3 + 2 + 8


def publish(folder, monkeypatch):
    """This release becomes the published one: its hash is made from the texts of the tables."""
    code = np.zeros((60, 9), np.int8)
    rows = read_rows(folder / META)
    for n, row in enumerate(rows[1:]):
        for t, (task, column) in enumerate(data.SPC_COLUMNS.items()):
            text = row[rows[0].index(column)]
            has_text = [text in texts for texts in data.SPC_TEXTS[task].values()]
            code[n, t] = has_text.index(True)
    for s, split in enumerate(data.SPLITS):
        code[np.loadtxt(folder / f"meta/{split}_indexes.csv", int, skiprows=1), 8] = s
    monkeypatch.setattr(data, "PUBLISHED_SPC", hashlib.sha256(code.tobytes()).hexdigest())


def test_the_published_release_is_known_row_by_row_and_only_warned_of_leaks(
    spc_with_photos, monkeypatch
):
    spc = spc_with_photos
    publish(spc, monkeypatch)
    shutil.copy(spc / "images/derm0000.jpg", spc / "images/clinic0059.jpg")
    release = data.read(spc, SIZE)
    assert release.published
    assert "WARNING: several lesions have one photo: 1 and 60 (1" in " ".join(release.notes)
    rows = read_rows(spc / META)
    rows[1], rows[3] = rows[3], rows[1]  # the same totals, but their labels differ
    write_rows(spc / META, rows)
    (spc / "images/clinic0059.jpg").unlink()
    write_photo(spc / "images/clinic0059.jpg")
    assert not data.read(spc, SIZE).published


# ---------------------------------------------------------------- MILK10k and challenges


@pytest.mark.parametrize("layout", ["nested", "flat", "linked", "its table", "tables in folders"])
def test_milk10k_in_every_layout(tmp_path, layout):
    folder = path = make_milk10k(tmp_path / "milk", flat=layout == "flat")
    if layout == "linked":
        (folder / "MILK10k_Training_Input").rename(tmp_path / "elsewhere")
        (folder / "MILK10k_Training_Input").symlink_to(tmp_path / "elsewhere")
    if layout == "its table":
        path = folder / TRUTH
    if layout == "tables in folders":
        for table in list(folder.glob("*.csv")):
            (folder / table.stem).mkdir()
            table.rename(folder / table.stem / table.name)
    release = data.read(path, SIZE)
    assert release.kind == "milk10k"
    assert release.tasks == {"DIAG": MILK10K_CLASSES}
    assert release.views == data.VIEWS
    assert release.lesion_ids == release.cases
    assert release.labels[:, 0].tolist() == [1, 8] * 12
    assert release.metadata["skin_tone_class"] == ["3"] * 24
    for n in range(24):
        for v in range(2):
            (file,) = tmp_path.rglob(f"ISIC_{2 * n + v:07}.jpg")
            assert (release.pixels[n, v].numpy() == data.decode(file, SIZE)).all()
    notes = " ".join(release.notes)
    assert "no training lesion of AKIEC, BEN_OTH, BKL" in notes


def test_lesions_that_milk10k_does_not_pair_are_named(tmp_path):
    rows = read_rows(make_milk10k(tmp_path) / "MILK10k_Training_Metadata.csv")
    del rows[3:5]
    write_rows(tmp_path / "MILK10k_Training_Metadata.csv", rows)
    notes = " ".join(data.read(tmp_path, SIZE).notes)
    assert "without two photos: IL_0000001 (1 in all)" in notes


@pytest.mark.parametrize("by_table", [False, True])
def test_milk10ks_blind_test_lesions_are_there_to_be_predicted(tmp_path, by_table):
    folder = make_milk10k(tmp_path / "milk", 5, "Test")
    (folder / "MILK10k_Test_GroundTruth.csv").unlink()
    path = folder / "MILK10k_Test_Metadata.csv" if by_table else folder
    release = data.read(path, SIZE, to_train=False)
    assert (release.kind, release.tasks) == ("milk10k", {})
    assert release.cases == [f"IL_{i:07}" for i in range(5)]
    assert release.labels.shape == (5, 0)
    assert release.split.tolist() == [""] * 5
    with pytest.raises(DataError, match="no lesion with a label"):
        data.read(path, SIZE)


def test_isic2018_has_its_official_splits(tmp_path):
    release = data.read(make_isic2018(tmp_path), SIZE)
    assert release.kind == "challenge"
    assert release.views == ("dermoscopy",)
    assert release.tasks == {"DIAG": ISIC2018_CLASSES}
    assert Counter(release.split.tolist()) == {"train": 24, "valid": 6, "test": 6}
    valid = release.rows("valid")
    assert [release.cases[n] for n in valid] == [f"ISIC_{n:07}" for n in range(24, 30)]
    assert release.labels[valid, 0].tolist() == [1, 0] * 3


@pytest.mark.parametrize("form", ["a folder", "its table"])
def test_one_isic2018_table_is_split_by_its_lesion_groups(tmp_path, form):
    folder = path = make_isic2018(tmp_path, [("Training", 60)])
    groups = [["image", "lesion_id", "diagnosis_confirm_type"]]
    groups += [[f"ISIC_{n:07}", f"HAM_{n // 2:07}", "follow up"] for n in range(60)]
    write_rows(folder / "ISIC2018_Task3_Training_LesionGroupings.csv", groups)
    if form == "its table":
        name = "ISIC2018_Task3_Training_GroundTruth"
        path = folder / name / f"{name}.csv"
    release = data.read(path, SIZE)
    assert release.lesion_ids[:4] == ["HAM_0000000"] * 2 + ["HAM_0000001"] * 2
    assert [len(release.rows(split)) for split in data.SPLITS] == [42, 6, 12]
    for n in range(0, 60, 2):
        assert release.split[n] == release.split[n + 1], "two photos of a lesion in two splits"


def test_isic2019_with_metadata_weights_and_an_empty_class(tmp_path):
    images = [f"ISIC_{n:07}_downsampled" for n in range(40)]
    classes = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"]
    truth = tmp_path / "ISIC_2019_Training_GroundTruth.csv"
    write_rows(truth, one_hot_rows("image", images, classes, ["AK", "SCC"] * 20))
    add_columns(truth, {"score_weight": ["1.0"], "validation_weight": ["0.5"]})
    metadata = [["image", "age_approx", "anatom_site_general", "lesion_id", "sex"]]
    for n, image in enumerate(images):
        write_photo(tmp_path / "ISIC_2019_Training_Input" / f"{image}.jpg")
        metadata.append([image, 55.0, "anterior torso", f"BCN_{n // 4:07}" if n else "", "female"])
    write_rows(tmp_path / "ISIC_2019_Training_Metadata.csv", metadata)
    release = data.read(tmp_path, SIZE)
    assert release.tasks == {"DIAG": tuple(classes)}
    assert release.lesion_ids[:5] == ["", *["BCN_0000000"] * 3, "BCN_0000001"]
    assert len(set(release.split[4:8])) == 1
    assert release.vocabulary == ["", "begin", "age from 40", "sex female", "site anterior torso"]
    assert "UNK" in " ".join(release.notes)


def test_isic2017_has_three_splits_two_tasks_and_masks(tmp_path):
    for part, first, last in (("Training", 0, 6), ("Validation", 6, 10), ("Test_v2", 10, 14)):
        rows = [["image_id", "melanoma", "seborrheic_keratosis"]]
        for n in range(first, last):
            image = f"ISIC_{n:07}"
            rows.append([image, float(n % 2), float(n % 3 == 0)])
            write_photo(tmp_path / f"ISIC-2017_{part}_Data" / f"{image}.jpg")
            masks = tmp_path / f"ISIC-2017_{part}_Part1_GroundTruth"
            write_photo(masks / f"{image}_segmentation.png", (255, 255, 255))
        write_rows(tmp_path / f"ISIC-2017_{part}_Part3_GroundTruth.csv", rows)
    release = data.read(tmp_path, SIZE, masks=True)
    assert release.kind == "isic17"
    assert release.views == ("dermoscopy", "mask")
    assert release.split.tolist() == ["train"] * 6 + ["valid"] * 4 + ["test"] * 4
    assert release.labels.tolist() == [[n % 2, int(n % 3 == 0)] for n in range(14)]


# ------------------------------------------------------------------------------ HAM10000


def test_ham10000_with_its_masks(tmp_path):
    release = data.read(make_ham(tmp_path, 40), 40, masks=True)
    assert (release.kind, release.views) == ("ham", ("dermoscopy", "mask"))
    assert release.tasks == {"DIAG": ("AKIEC", "BCC", "BKL", "DF", "MEL", "NV", "VASC")}
    assert release.labels[:4, 0].tolist() == [5, 5, 4, 4]
    assert Counter(release.split.tolist()) == {"train": 32, "valid": 4, "test": 4}  # MAT, Sec. 3.1
    for n in range(0, 40, 2):
        assert release.split[n] == release.split[n + 1], "two photos of a lesion in two splits"
    assert sorted(release.metadata) == ["age", "localization", "sex"]  # not dx_type
    white_columns = release.pixels[:, 1, 0, :, 0].gt(127).sum(1).tolist()
    assert white_columns == list(range(40)), "masks of other photos"
    assert release.photo_hashes.shape == (40, 1)
    assert "empty masks; they must be 255 inside the spot: ISIC_0000000 (1" in release.notes[0]
    assert data.read(tmp_path, 40).views == ("dermoscopy",)


def test_masks_of_zeros_and_ones_and_missing_masks_are_refused(tmp_path):
    make_ham(tmp_path)
    for path in (tmp_path / "masks").iterdir():
        Image.fromarray(np.asarray(Image.open(path)) // 255).save(path)
    with pytest.raises(DataError, match="empty masks; they must be 255 inside"):
        data.read(tmp_path, 40, masks=True)
    (tmp_path / "masks/ISIC_0000007_segmentation.png").unlink()
    with pytest.raises(DataError, match="line 9: mask 'ISIC_0000007_segmentation'"):
        data.read(tmp_path, 40, masks=True)


def test_lesions_without_masks_can_be_predicted_by_a_run_that_learned_masks(tmp_path):
    make_ham(tmp_path)
    assert data.read(tmp_path, 40, to_train=False, masks=True).views == ("dermoscopy", "mask")
    shutil.rmtree(tmp_path / "masks")
    assert data.read(tmp_path, 40, to_train=False, masks=True).views == ("dermoscopy",)
    with pytest.raises(DataError, match="mask 'ISIC_0000007_segmentation'"):
        data.read(tmp_path, 40, masks=True)


def test_ham10000_as_kaggle_has_it_holds_each_photo_twice(tmp_path):
    expected = data.read(make_ham(tmp_path), SIZE)
    for part in (1, 2):
        photos = tmp_path / f"HAM10000_images_part_{part}"
        shutil.copytree(photos, tmp_path / "again" / photos.name.lower())
    write_rows(tmp_path / "hmnist_28_28_L.csv", [["pixel0000", "label"], [1, 2]])
    release = data.read(tmp_path, SIZE)
    assert release.fingerprint == expected.fingerprint
    write_photo(tmp_path / "again/ham10000_images_part_2/ISIC_0000003.jpg", (1, 2, 3))
    with pytest.raises(DataError, match="several pictures have one name, keep one: .*ISIC_0000003"):
        data.read(tmp_path, SIZE)


@pytest.mark.parametrize(
    "name, delimiter", [("HAM10000_metadata", ","), ("HAM10000_metadata.tab", "\t")]
)
def test_ham10000_as_dataverse_has_it(tmp_path, name, delimiter):
    expected = data.read(make_ham(tmp_path), SIZE)
    table = tmp_path / "HAM10000_metadata.csv"
    rows = read_rows(table)
    table.unlink()
    text = "\n".join(delimiter.join(f'"{cell}"' for cell in row) for row in rows)
    (tmp_path / name).write_text(text)
    assert data.read(tmp_path, SIZE).fingerprint == expected.fingerprint


# -------------------------------------------------------------------------- ISIC Archive


def test_isic_pairs_are_made_by_the_stated_rules(tmp_path):
    make_isic(tmp_path)
    rows = read_rows(tmp_path / "metadata.csv")
    rows[1][3] = "clinical: overview"  # lesion 0: a close-up with a higher isic_id goes first
    rows.append(["ISIC_9000000", "IL_0", "IP_0", "clinical: close-up", "Benign", "female"])
    rows.append(["ISIC_9000001", "IL_0", "IP_0", "dermoscopic", "Benign", "female"])  # unused
    rows[3][3] = "TBP tile: close-up"  # lesion 1 has no clinical photo any more
    rows[5][1] = ""  # nor has lesion 2: that photo lacks its lesion_id
    rows[7][4] = rows[8][4] = "Indeterminate"  # lesion 3
    rows[10][5] = ""  # of lesion 4's photos only the clinical one says the sex
    write_rows(tmp_path / "metadata.csv", rows)
    write_photo(tmp_path / "ISIC_9000000.jpg", (9, 99, 199))
    write_photo(tmp_path / "ISIC_9000001.jpg")
    release = data.read(tmp_path, SIZE)
    assert (release.kind, release.views) == ("isic", data.VIEWS)
    assert release.tasks == {"DIAG": ("benign", "malignant")}
    assert len(release.cases) == 37
    assert not {"IL_1", "IL_2", "IL_3"} & set(release.cases)
    clinical, dermoscopy = release.pixels[release.cases.index("IL_0")].numpy()
    assert np.abs(clinical[8, 8] - np.array([9, 99, 199])).max() < 4
    assert (dermoscopy == data.decode(tmp_path / "ISIC_0000001.jpg", SIZE)).all()
    assert "no label at all or no split, left out: IL_3 (1" in " ".join(release.notes)
    assert release.metadata == {"sex": ["female"] * 37}
    split = dict(zip(release.cases, release.split))
    for p in range(2, 20):
        assert split[f"IL_{2 * p}"] == split[f"IL_{2 * p + 1}"], "a patient in two splits"


def test_an_isic_download_of_dermoscopy_photos_alone(tmp_path):
    folder = make_isic(tmp_path, image_types=("dermoscopic", "dermoscopic"))
    change_cell(folder / "metadata.csv", 1, "image_type", "TBP tile: close-up")
    release = data.read(folder, SIZE)
    assert (release.kind, release.views) == ("isic", ("dermoscopy",))
    assert release.cases == [f"ISIC_{n:07}" for n in range(1, 80)]
    assert release.lesion_ids[:3] == ["IL_0", "IL_1", "IL_1"]
    assert release.labels[:5, 0].tolist() == [0, 1, 1, 0, 0]
    for n in range(1, 79, 2):
        assert release.split[n] == release.split[n + 1], "two photos of a lesion in two splits"


def test_dermoscopy_photos_in_no_pair_are_counted(tmp_path):
    table = make_isic(tmp_path) / "metadata.csv"
    change_cells(table, range(1, 40, 2), "image_type", "dermoscopic")  # 20 lesions lose a photo
    release = data.read(tmp_path, SIZE, to_train=False)
    assert len(release.cases) == 20
    assert "WARNING: 40 dermoscopy photos are in no pair; to read all" in " ".join(release.notes)


def test_newer_columns_stand_in_for_older_ones_and_contradictions_are_named(tmp_path):
    table = make_isic(tmp_path) / "metadata.csv"
    remove_column(table, "diagnosis_1")
    truth = ["benign"] * 20 + ["malignant"] * 20 + [""] * 40
    newer = ["Benign"] * 19 + ["Malignant"] + [""] * 20 + ["Malignant"] * 20 + [""]
    newest = [""] * 60 + ["Benign melanocytic proliferations", "Malignant epidermal proliferations"]
    sites = {"anatom_site_general": ["head/neck", ""], "anatom_site_1": ["Trunk"]}
    columns = {"benign_malignant": truth, "diagnosis_1": newer, "diagnosis_2": newest}
    add_columns(table, {**columns, **sites})
    release = data.read(tmp_path, SIZE, to_train=False)
    label = dict(zip(release.cases, release.labels[:, 0].tolist()))
    assert (label["IL_0"], label["IL_15"], label["IL_25"], label["IL_35"]) == (0, 1, 1, 1)
    assert label["IL_9"] == -1  # benign by one column, malignant by another
    assert label["IL_30"] == -1  # its photos differ
    notes = " ".join(release.notes)
    assert "contradictory diagnoses, read as unknown: IL_30, IL_9 (2 in all)" in notes
    assert release.metadata["anatom_site_1"] == ["Trunk"] * 40
    train_again = data.read(tmp_path, SIZE)
    assert {"site trunk"} <= set(train_again.vocabulary)


# ----------------------------------------------------------------------- an own CSV file


def test_own_pairs(tmp_path):
    tmp_path = tmp_path / "pairs"  # a folder with the name of its table
    table = make_pairs(tmp_path, 40) / OWN
    splits = ["train"] * 10 + ["training"] * 10 + ["val"] * 10 + ["Valid"] * 5 + ["validation"] * 4
    network = ["typical", *["Absent", ""] * 19, "ABSENT"]
    columns = {"split": [*splits, "Testing"], "network": network, "sex": ["2"], "where": ["x", "y"]}
    add_columns(table, columns)
    for path in (tmp_path, table):
        release = data.read(path, SIZE)
        assert release.kind == "pairs"
        assert release.tasks == {
            "lesion": ("a", "b"),
            "network": ("absent", "typical"),
            "where": ("x", "y"),
        }
        assert Counter(release.split.tolist()) == {"train": 20, "valid": 19, "test": 1}
        assert release.metadata == {"sex": ["2"] * 40}
        assert release.labels[:4].tolist() == [[0, 1, 0], [1, 0, 1], [0, -1, 1], [1, 0, 1]]
        assert release.cases[3] == "c3.png d3.png"


def test_the_columns_read_as_tasks_and_as_facts_are_named(tmp_path):
    """A misspelt column becomes a task, and a task "elevation" becomes none: so both are said."""
    columns = {"agee": ["40", "50"], "sex": ["male"], "elevation": ["flat", "nodular"]}
    add_columns(make_pairs(tmp_path) / OWN, columns)
    assert data.read(tmp_path, SIZE).notes == [
        "tasks, the columns of no other use: lesion, agee",
        "facts about the patient, no tasks: sex, elevation",
    ]


def test_an_own_csv_file_may_have_a_third_photo(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "VIEWS", (*data.VIEWS, "overview"))
    table = make_pairs(tmp_path) / OWN
    photos = [f"o{i}.png" for i in range(24)]
    add_columns(table, {"overview": photos, "mask": ["m.png"]})
    for name in photos:
        write_photo(tmp_path / name)
    write_photo(tmp_path / "m.png", (255, 255, 255))
    release = data.read(tmp_path, SIZE, masks=True)
    assert release.views == ("clinical", "dermoscopy", "overview", "mask")
    assert release.tasks == {"lesion": ("a", "b")}
    assert release.photo_hashes.shape == (24, 3)
    assert (release.pixels[5, 2].numpy() == data.decode(tmp_path / "o5.png", SIZE)).all()
    batch = data.make_batch(release, torch.arange(2), CPU)
    assert set(batch) == {"clinical", "dermoscopy", "overview", "mask", "labels", "words"}


def test_a_third_view_changes_no_other_release(spc, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "VIEWS", (*data.VIEWS, "overview"))
    folders = [spc, make_milk10k(tmp_path / "milk"), make_isic(tmp_path / "isic", 24)]
    for folder in folders:
        assert data.read(folder, SIZE).views == ("clinical", "dermoscopy")


@pytest.mark.parametrize(
    "name, kind, pattern",
    [
        ("metadata.csv", "isic", "metadata.csv"),
        ("my_Metadata.csv", "milk10k_photos", r"\*Metadata.csv"),
        ("my_GroundTruth.csv", "ground_truth", r"\*\*/\*GroundTruth.csv"),
    ],
)
def test_an_own_file_with_a_known_name_is_refused_with_a_hint(name, kind, pattern, tmp_path):
    (make_pairs(tmp_path) / OWN).rename(tmp_path / name)
    hint = f"{name}: no column .* .read as {kind}, because a name fits {pattern}; give your own CSV"
    with pytest.raises(DataError, match=hint):
        data.read(tmp_path, SIZE)


def semicolons(text):
    return text.replace(",", ";")


def tabs(text):
    return text.replace(",", "\t")


def byte_order_mark(text):
    return "\ufeff" + text


def other_line_ends(text):
    return text.replace("\r\n", "\n")


def empty_rows(text):
    return text.replace("\r\n", "\r\n\r\n , ,\t\r\n", 3)


def trailing_commas(text):
    return text.replace("\r\n", ",\r\n")


def trailing_comma_in_the_header(text):
    return text.replace("\r\n", ",\r\n", 1)


def numbers_of_rows_by_pandas(text):
    lines = text.splitlines()
    return "\n".join([f",{lines[0]}"] + [f"{n},{line}" for n, line in enumerate(lines[1:])])


def named_numbers_of_rows_by_pandas(text):
    return "Unnamed: 0" + numbers_of_rows_by_pandas(text)


def backslashes(text):
    return text.replace("c5.png", "sub\\c5.png")


def capitals(text):
    return text.replace("c6.png", "C6.PNG").replace("clinical", "Clinical")


CHANGES = [semicolons, tabs, byte_order_mark, other_line_ends, empty_rows, trailing_commas]
CHANGES += [
    trailing_comma_in_the_header,
    numbers_of_rows_by_pandas,
    named_numbers_of_rows_by_pandas,
]
CHANGES += [backslashes, capitals]


@pytest.mark.parametrize("change", CHANGES)
def test_tables_as_spreadsheets_write_them(change, tmp_path):
    table = make_pairs(tmp_path) / OWN
    expected = data.read(tmp_path, SIZE)
    text = table.read_bytes().decode()
    table.write_bytes(change(text).encode())
    if change == backslashes:
        (tmp_path / "sub").mkdir()
        (tmp_path / "c5.png").rename(tmp_path / "sub/c5.png")
    (tmp_path / "._pairs.csv").write_bytes(b"\x00\x05\x16")  # of macOS
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf")  # of Windows
    release = data.read(tmp_path, SIZE)
    assert release.tasks == expected.tasks
    assert torch.equal(release.labels, expected.labels)
    assert (release.photo_hashes == expected.photo_hashes).all()


@pytest.mark.parametrize("text", ["", "?", "NaN", "N/A", "#N/A", "<NA>", "null", "Unknown"])
def test_unknown_texts_are_no_class(text, tmp_path):
    table = make_pairs(tmp_path) / OWN
    change_cell(table, 1, "lesion", text)
    add_columns(table, {"other": ["a", text, "b", "a", "b"]})
    release = data.read(tmp_path, SIZE)
    assert release.tasks == {"lesion": ("a", "b"), "other": ("a", "b")}
    assert release.labels[:2].tolist() == [[-1, 0], [1, -1]]


def test_a_table_with_tabs_may_be_called_tsv(tmp_path):
    table = make_pairs(tmp_path) / OWN
    table.with_suffix(".tsv").write_text(tabs(table.read_text()))
    table.unlink()
    assert data.read(tmp_path, SIZE).kind == "pairs"


def test_capitals_in_paths(tmp_path):
    table = make_pairs(tmp_path) / OWN
    write_photo(tmp_path / "C3.PNG", (1, 2, 3))  # beside c3.png: exact names go before similar ones
    change_cell(table, 5, "clinical", "C3.PNG")
    (tmp_path / "NEL").mkdir()
    (tmp_path / "c7.png").rename(tmp_path / "NEL/c7.PNG")
    change_cell(table, 8, "clinical", "nel/C7.png")
    release = data.read(tmp_path, SIZE)
    assert release.pixels[4, 0, 8, 8].tolist() == [1, 2, 3] != release.pixels[3, 0, 8, 8].tolist()
    assert (release.pixels[7, 0].numpy() == data.decode(tmp_path / "NEL/c7.PNG", SIZE)).all()


def test_an_empty_photo_cell_leaves_its_lesion_out(tmp_path):
    table = make_pairs(tmp_path) / OWN
    change_cell(table, 2, "dermoscopy", "")
    change_cell(table, 4, "lesion", "")
    without_photo = f"a photo or mask is not named, left out: {table} line 3 (1 in all)"
    without_label = "no label at all or no split, left out: c3.png d3.png (1 in all)"
    to_train = data.read(tmp_path, SIZE)
    assert len(to_train.cases) == 22
    assert without_photo in " ".join(to_train.notes)
    assert without_label in " ".join(to_train.notes)
    to_predict = data.read(tmp_path, SIZE, to_train=False)
    assert len(to_predict.cases) == 23
    assert without_photo in " ".join(to_predict.notes)
    assert without_label not in " ".join(to_predict.notes)


def test_a_column_of_photos_without_any_is_no_column(tmp_path):
    """A table made for two photos, filled with one: the release has the other photos alone."""
    table = make_pairs(tmp_path) / OWN
    for n in range(1, 25):
        change_cell(table, n, "clinical", "")
    release = data.read(tmp_path, SIZE)
    assert release.views == ("dermoscopy",) and len(release.cases) == 24
    assert list(release.tasks) == ["lesion"]


def test_a_lesion_without_a_mask_is_predicted_all_the_same(tmp_path):
    table = make_pairs(tmp_path) / OWN
    add_columns(table, {"mask": ["m.png", ""]})
    write_photo(tmp_path / "m.png", (255, 255, 255))
    release = data.read(tmp_path, SIZE, to_train=False, masks=True)
    assert len(release.cases) == 24 and release.views == ("clinical", "dermoscopy")


def test_an_empty_mask_cell_leaves_its_lesion_out_where_masks_are_read(tmp_path):
    table = make_pairs(tmp_path) / OWN
    add_columns(table, {"mask": ["", "m.png"]})
    write_photo(tmp_path / "m.png", (255, 255, 255))
    release = data.read(tmp_path, SIZE, masks=True)
    assert len(release.cases) == 23
    assert f"a photo or mask is not named, left out: {table} line 2" in " ".join(release.notes)
    assert len(data.read(tmp_path, SIZE).cases) == 24


def test_a_folder_with_the_name_of_a_photo_is_none(tmp_path):
    make_milk10k(tmp_path)
    (tmp_path / "exports/ISIC_0000003.jpg").mkdir(parents=True)
    assert len(data.read(tmp_path, SIZE).cases) == 24


def test_a_folder_does_not_hide_the_photo_of_its_name(tmp_path):
    make_pairs(tmp_path)
    change_cell(tmp_path / OWN, 1, "clinical", "c0")  # without its ending
    (tmp_path / "c0").mkdir()
    (tmp_path / "c0.png").rename(tmp_path / "c0/c0.png")
    release = data.read(tmp_path, SIZE)
    assert (release.pixels[0, 0].numpy() == data.decode(tmp_path / "c0/c0.png", SIZE)).all()


def test_one_file_for_both_photos_is_said(tmp_path):
    table = make_pairs(tmp_path) / OWN
    change_cell(table, 4, "dermoscopy", "c3.png")
    notes = " ".join(data.read(tmp_path, SIZE).notes)
    assert "two photos of a lesion are one photo: c3.png c3.png (1" in notes
    assert "several lesions" not in notes


def test_to_predict_neither_labels_nor_a_split_are_needed(tmp_path):
    remove_column(make_pairs(tmp_path, 3) / OWN, "lesion")
    release = data.read(tmp_path, SIZE, to_train=False)
    assert release.tasks == {}
    assert release.labels.shape == (3, 0)
    assert release.words.tolist() == [[1]] * 3
    assert len(data.make_batch(release, torch.arange(3), CPU)["clinical"]) == 3
    with pytest.raises(DataError, match="no lesion with a label"):
        data.read(tmp_path, SIZE)


def test_masks_alone_can_be_learned(tmp_path):
    table = make_pairs(tmp_path, 40) / OWN
    add_columns(table, {"mask": [f"m{i}.png" for i in range(40)], "patient": ["P", "P", ""]})
    remove_column(table, "lesion")
    for i in range(40):
        write_photo(tmp_path / f"m{i}.png", (255, 255, 255))
    release = data.read(tmp_path, SIZE, masks=True)
    assert (release.tasks, release.views) == ({}, ("clinical", "dermoscopy", "mask"))
    assert [len(release.rows(split)) for split in data.SPLITS] == [28, 4, 8]
    assert release.split[0] == release.split[1]
    with pytest.raises(DataError, match="no lesion with a label"):
        data.read(tmp_path, SIZE)


def test_with_masks_a_lesion_without_a_label_is_kept(tmp_path):
    table = make_pairs(tmp_path) / OWN
    add_columns(table, {"mask": [f"m{i}.png" for i in range(24)]})
    change_cell(table, 4, "lesion", "")
    for i in range(24):
        write_photo(tmp_path / f"m{i}.png", (255, 255, 255))
    with_masks = data.read(tmp_path, SIZE, masks=True)
    without = data.read(tmp_path, SIZE)
    assert (len(with_masks.cases), len(without.cases)) == (24, 23)
    assert with_masks.labels[3].tolist() == [-1]
    assert with_masks.photo_hashes.shape == (24, 2)
    assert with_masks.fingerprint == without.fingerprint
    write_photo(tmp_path / "m0.png", (255, 255, 0))
    assert data.read(tmp_path, SIZE, masks=True).fingerprint == without.fingerprint


def test_a_split_without_a_label_is_noted(tmp_path):
    table = make_pairs(tmp_path, 40) / OWN
    splits = ["train"] * 20 + ["valid"] * 10 + ["test"]
    add_columns(
        table, {"split": splits, "veil": ["absent", "present"] * 10 + [""] * 15 + ["absent"]}
    )
    notes = data.read(tmp_path, SIZE).notes
    assert [note for note in notes if "no label" in note] == [
        "WARNING: veil: no label in the split valid"
    ]


def test_without_a_usable_lesion_the_reason_is_said(tmp_path):
    table = make_pairs(tmp_path) / OWN
    add_columns(table, {"split": ["train"] + [""]})
    change_cell(table, 1, "lesion", "")
    with pytest.raises(
        DataError, match="no lesion can be used.*no label at all or no split, left out"
    ):
        data.read(tmp_path, SIZE)


def test_a_release_has_one_fingerprint_to_train_and_to_predict(tmp_path):
    """Also if some of its lesions, indeterminate ones, are only there to be predicted."""
    folder = make_isic(tmp_path)
    change_cells(folder / "metadata.csv", (7, 8), "diagnosis_1", "Indeterminate")
    to_predict = data.read(folder, SIZE, to_train=False)
    to_train = data.read(folder, SIZE)
    assert (len(to_predict.cases), len(to_train.cases)) == (40, 39)
    assert to_predict.fingerprint == to_train.fingerprint
    change_cells(folder / "metadata.csv", (1, 2), "sex", "male")
    assert data.read(folder, SIZE).fingerprint != to_train.fingerprint


# ------------------------------------------------------------------ bad input is refused
#
# Each case: what is wrong, what the message says, and what is done (function, file, arguments).

TWO_SPLITS = ["train", "valid", "test", "train"]
VALID_INDEXES, TEST_INDEXES = "meta/valid_indexes.csv", "meta/test_indexes.csv"

# fmt: off
REFUSED_PAIRS = [
    ("no table", "no meta/meta.csv .derm7pt., .* or other CSV file", remove, OWN),
    ("empty table", "pairs.csv: no lines below a header", Path.write_bytes, OWN, b""),
    ("only a header", "pairs.csv: no lines below a header", keep_lines, OWN, 0),
    ("UTF-16", "UTF-8; save it as 'CSV UTF-8'", Path.write_text, OWN, "clinical", "utf-16"),
    ("Latin-1", "UTF-8; save it as 'CSV UTF-8'", append_bytes, OWN, b"\xe4"),
    ("open quotation mark", "line 26: .*quotation mark", append_bytes, OWN, b'"a,b,c\r\n'),
    ("a value too many", "line 26: 4 values, but 3 in the", append_bytes, OWN, b"a,b,c,d\r\n"),
    ("a value too few", "line 26: 2 values, but 3 in the header", append_bytes, OWN, b"a,b\r\n"),
    ("a column twice", "two columns of one name", add_columns, OWN, {"Lesion ": ["a"]}),
    ("no photo column", "no column clinical or dermoscopy with photos; it has one, two, lesion",
        replace_bytes, OWN, b"clinical,dermoscopy", b"one,two"),
    ("unknown split", "line 3: split is 'holdout'; write train, valid or test",
        add_columns, OWN, {"split": ["train", "holdout"]}),
    ("no test split", "no lesion in the split test",
        add_columns, OWN, {"split": ["train", "train", "valid"]}),
    ("patient in two splits", r"in two splits.*d2.png \(test\) and c1.png.*\(valid\)",
        add_columns, OWN, {"patient": ["", "P", "P", ""], "split": TWO_SPLITS}),
    ("lesion in two splits", r"in two splits.*d2.png \(test\) and c1.png.*\(valid\)",
        add_columns, OWN, {"lesion_id": ["", "L", "L", ""], "split": TWO_SPLITS}),
    ("case twice", "line 26: another lesion is called 'c0.png d0.png' too", repeat_line, OWN, 1),
    ("names for classes", "who: 24 classes in 24 lesions; if these are names",
        add_columns, OWN, {"who": [f"name{n}" for n in range(24)]}),
    ("a / in a task", "column a/b has a / in its name", add_columns, OWN, {"a/b": ["x", "y"]}),
    ("classes a and A", "differ only in capitals", add_columns, OWN, {"kind": ["a", "A"]}),
    ("two spaces", "only in .* spaces", add_columns, OWN, {"kind": ["in situ", "in  situ"]}),
    ("classes 1 and 1.0", "differ only in .* .0", add_columns, OWN, {"kind": ["1", "1.0"]}),
    ("two forms of \u00e9", "differ only", add_columns, OWN, {"kind": ["caf\u00e9", "cafe\u0301"]}),
    ("invisible in a label", r"line 3: an invisible character in 'a\\u200bb'",
        change_cell, OWN, 2, "lesion", "a\u200bb"),
    ("invisible in a patient", r"line 3: an invisible character in 'P\\xad1'",
        add_columns, OWN, {"patient": ["P1", "P\u00ad1"]}),
    ("invisible in a path", r"line 3: an invisible character in 'c\\u200b1.png d1.png'",
        change_cell, OWN, 2, "clinical", "c\u200b1.png"),
    ("invisible in a case", r"line 2: an invisible character in 'A\\u200b1'",
        add_columns, OWN, {"case": ["A\u200b1", ""]}),
    ("invisible in a column", r"invisible character in column 'les\\u200bion'",
        replace_bytes, OWN, b"lesion", b"les\xe2\x80\x8bion"),
    ("too few to split", "fewer than 10 independent lesions", keep_lines, OWN, 8),
    ("no picture in a photo", "d7.png: cannot identify", Path.write_bytes, "d7.png", b"<html>"),
]
REFUSED_SPC = [
    ("no such folder", "release_v0 does not exist", remove, "."),
    ("no such column", "no column streaks; it has case_num", remove_column, META, "streaks"),
    ("unknown label", "STR is none of absent, REG, IR.*line 4 'wavy', .*line 10 'wavy'",
        change_cells, META, (3, 9), "streaks", "wavy"),
    ("nothing to learn", "BWV has fewer than two classes to train on",
        change_cells, META, range(1, 26), "blue_whitish_veil", "absent"),
    ("index too high", "valid_indexes.csv line 3: '60' is no line of meta.csv",
        change_cell, VALID_INDEXES, 2, "indexes", "60"),
    ("negative index", "valid_indexes.csv line 3: '-1' is no line",
        change_cell, VALID_INDEXES, 2, "indexes", "-1"),
    ("overlapping splits", "test_indexes.csv line 3: '3' is in the split train already",
        change_cell, TEST_INDEXES, 2, "indexes", "3"),
    ("no split file", "test_indexes.csv does not exist", remove, TEST_INDEXES),
]
REFUSED_MILK10K = [
    ("two classes", "line 3: needs a 1 for one class", change_cell, TRUTH, 2, "BCC", "1.0"),
    ("no class", "line 3: needs a 1 for one class", change_cell, TRUTH, 2, "NV", "0.0"),
    ("half a class", "line 3: needs a 1 for one class", change_cell, TRUTH, 2, "BCC", "0.5"),
    ("only half a class", "line 3: needs a 1 for one class", change_cell, TRUTH, 2, "NV", "0.5"),
    ("an empty class", "line 3: needs a 1 for one class", change_cell, TRUTH, 2, "BCC", ""),
    ("lesion twice", "line 26: IL_0000001 has a line already", repeat_line, TRUTH, 2),
    ("two ground truths", "several tables, name one as the path",
        Path.write_text, "New_GroundTruth.csv", "lesion_id,a\nx,1\n"),
    ("no metadata", "Metadata instead of GroundTruth is missing",
        remove, "MILK10k_Training_Metadata.csv"),
    ("two photos of one name", "several pictures have one name, keep one: .*ISIC_0000006",
        write_photo, "masks/ISIC_0000006.png"),
]
REFUSED_ISIC = [
    ("no lesion_id", "no column lesion_id to pair", remove_column, "metadata.csv", "lesion_id"),
    ("no pairs", "no lesion can be used. 0 lesions with clinical and dermoscopy; 48 photos",
        replace_bytes, "metadata.csv", b"dermoscopic", b"TBP tile: close-up"),
]
# fmt: on

CASES = []
for kind, refused in (
    ("pairs", REFUSED_PAIRS),
    ("spc", REFUSED_SPC),
    ("milk10k", REFUSED_MILK10K),
    ("isic", REFUSED_ISIC),
):
    for what, message, *damage in refused:
        CASES.append(pytest.param(kind, message, damage, id=f"{kind}: {what}"))


@pytest.mark.parametrize("kind, message, damage", CASES)
def test_bad_releases_are_refused_in_a_clear_sentence(kind, message, damage, tmp_path, request):
    if kind == "spc":
        folder = request.getfixturevalue("spc")
    else:
        makers = {"pairs": make_pairs, "milk10k": make_milk10k, "isic": make_isic}
        folder = makers[kind](tmp_path / "release", 24)
    function, file, *arguments = damage
    function(folder / file, *arguments)
    with pytest.raises(DataError, match=f"(?s){message}"):
        data.read(folder, SIZE)
    assert not list(tmp_path.glob("runs/cache/*.tmp")), "a part of a cache was left"


def test_every_missing_photo_and_every_broken_one_is_listed(tmp_path):
    make_pairs(tmp_path, 40)
    for name in ("c1", "d30", "d31"):
        (tmp_path / f"{name}.png").unlink()
    with pytest.raises(DataError) as refusal:
        data.read(tmp_path, SIZE)
    for text in ("line 3: clinical 'c1.png'", "line 32: dermoscopy 'd30.png'", "'d31.png'"):
        assert text in str(refusal.value)
    for name in ("c1", "d30", "d31"):
        whole = (tmp_path / "c2.png").read_bytes()
        (tmp_path / f"{name}.png").write_bytes(whole[:40])
    with pytest.raises(DataError) as refusal:
        data.read(tmp_path, SIZE)
    assert str(refusal.value).count(".png: ") == 3


@pytest.mark.parametrize(
    "parts", [["Training", "Test"], ["Training", "Validation", "Test", "Test_v2"]]
)
def test_other_than_three_tables_of_a_challenge_are_refused(parts, tmp_path):
    make_isic2018(tmp_path, [(part, 12) for part in parts])
    with pytest.raises(DataError, match="give Training, Validation and Test, or name one table"):
        data.read(tmp_path, SIZE)


@pytest.mark.parametrize("make, part", [(make_milk10k, "MILK10k"), (make_isic2018, "ISIC2018")])
def test_a_second_table_in_a_folder_of_its_own_is_not_ignored(make, part, tmp_path):
    make(tmp_path)
    (old,) = tmp_path.rglob(f"{part}*Training_GroundTruth.csv")
    (tmp_path / "second").mkdir()
    shutil.copy(old, tmp_path / "second" / f"Second_{old.name}")
    with pytest.raises(DataError, match="several tables.*name one"):
        data.read(tmp_path, SIZE)
    if make is make_milk10k:
        assert len(data.read(old, SIZE).cases) == 24


# ----------------------------------------------------------------- splits without a leak


def test_a_split_is_scikit_learns_and_always_the_same(tmp_path):
    release = data.read(make_milk10k(tmp_path, 100), SIZE)
    assert [len(release.rows(split)) for split in data.SPLITS] == [70, 10, 20]
    splitter = StratifiedGroupKFold(10, shuffle=True, random_state=0)
    folds = list(splitter.split(release.labels, release.labels[:, 0], np.arange(100)))
    assert set(release.rows("test").tolist()) == {*folds[0][1], *folds[1][1]}
    assert set(release.rows("valid").tolist()) == {*folds[2][1]}
    for split in data.SPLITS:  # stratified
        share = (release.labels[release.rows(split), 0] == 1).float().mean()
        assert abs(share - 0.5) < 0.1


@pytest.mark.parametrize(
    "columns", [["patient"], ["patient_id"], ["lesion_id"], ["patient_id", "patient"]]
)
def test_chains_of_shared_patients_and_photos_stay_together(columns, tmp_path):
    table = make_pairs(tmp_path, 60) / OWN
    names = [f"P{n // 3}" for n in range(30)] + ["nan"]
    if len(columns) == 2:  # one of them is empty
        add_columns(table, {columns[0]: [""]})
    add_columns(table, {columns[-1]: names})
    shutil.copy(tmp_path / "c2.png", tmp_path / "c3.png")  # joins P0 and P1
    release = data.read(tmp_path, SIZE)
    assert len(set(release.split[:6])) == 1, "one photo in two splits"
    for p in range(10):
        assert len(set(release.split[3 * p : 3 * p + 3])) == 1, "one patient in two splits"
    assert len(set(release.split[30:])) == 3, "unknown patients are not one patient"
    notes = " ".join(release.notes)
    assert "several lesions have one photo: c2.png d2.png and c3.png d3.png (1" in notes


def test_groups_worked_out_by_hand():
    lesions = []
    ids = [("P", ""), ("", "L"), ("p", "L"), ("L", "P"), ("", ""), ("", ""), ("7", ""), ("7.0", "")]
    for patient, lesion_id in ids:
        lesions.append(data.Lesion("", "", {}, patient=patient, lesion_id=lesion_id))
    photos = [["a", "b"], ["c", "d"], ["e", "f"], ["g", "h"], ["i", "j"], ["k", "g"], ["l"], ["m"]]
    # The third lesion connects the first two: P and p are one patient, and 7 and 7.0 another. A
    # patient L is not a lesion L. The sixth shares a photo with the fourth, the fifth nothing.
    assert data.group_lesions(lesions, photos).tolist() == [0, 0, 0, 3, 4, 3, 6, 6]


def copy_with_a_comment(folder, source, target):
    """The same pixels in other bytes, as the ISIC Archive has them."""
    jpeg = (folder / "images" / source).read_bytes()
    comment = b"ISIC_1234567"
    segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
    (folder / "images" / target).write_bytes(jpeg[:2] + segment + jpeg[2:])


def test_an_identical_photo_in_two_splits_is_found_by_its_pixels(spc_with_photos):
    copy_with_a_comment(spc_with_photos, "derm0000.jpg", "clinic0059.jpg")
    with pytest.raises(DataError, match=r"photo in two splits.*60 \(test\) and 1 \(train\)"):
        data.read(spc_with_photos, SIZE)


@pytest.mark.parametrize(
    "target, note",
    [
        ("clinic0001.jpg", "several lesions have one photo: 1 and 2 (1"),
        ("clinic0000.jpg", "two photos of a lesion are one photo: 1 (1"),
    ],
)
def test_an_identical_photo_in_one_split_is_noted(target, note, spc_with_photos):
    copy_with_a_comment(spc_with_photos, "derm0000.jpg", target)
    assert note in " ".join(data.read(spc_with_photos, SIZE).notes)


def test_photos_are_compared_by_what_they_show_and_not_by_their_files(spc_with_photos, tmp_path):
    folder = spc_with_photos / "images"
    copy_with_a_comment(spc_with_photos, "derm0000.jpg", "copy.jpg")
    with Image.open(folder / "derm0000.jpg") as image:
        image.save(folder / "one.png")
        image.save(folder / "other.png", compress_level=1)
    lesions = []
    for name in ("derm0000", "copy", "derm0001", "one", "other", "clinic0000"):
        lesions.append(data.Lesion("", name, {"dermoscopy": name}))
    _, photo_hashes, file_hashes = data.read_pictures(
        lesions, ("dermoscopy",), folder, SIZE, tmp_path / "cache"
    )
    assert len(set(file_hashes.flatten())) == 6
    original, copy, another, png, same_png, clinical = photo_hashes[:, 0]
    assert original == copy and png == same_png
    assert len({original, another, png, clinical}) >= 3


def test_the_hashes_of_photos_do_not_depend_on_the_size(spc):
    small, large = data.read(spc, 8), data.read(spc, 24)
    assert (small.photo_hashes == large.photo_hashes).all()
    assert len(set(small.photo_hashes.flatten())) == 120


# ----------------------------------------------------------------------- decoding photos

COLOUR = (200, 100, 60)
PHOTOS = {  # what it is -> file, size, mode, how it is saved, the colour to be read
    "JPEG": ("a.jpg", (40, 30), "RGB", {"quality": 95}, COLOUR),
    "PNG named .jpg": ("a.jpg", (40, 30), "RGB", {"format": "PNG"}, COLOUR),
    "CMYK": ("a.jpg", (40, 30), "CMYK", {"quality": 95}, COLOUR),
    "grey": ("a.jpg", (40, 30), "L", {"quality": 95}, (125, 125, 125)),
    "palette": ("a.png", (9, 9), "P", {}, COLOUR),
    "with an alpha channel": ("a.png", (9, 9), "RGBA", {}, COLOUR),
    "20,000 wide": ("a.jpg", (20000, 30), "RGB", {}, COLOUR),
}


@pytest.mark.parametrize("kind", PHOTOS)
def test_photos_of_every_kind_are_read_right(kind, tmp_path):
    name, size, mode, options, colour = PHOTOS[kind]
    image = Image.new("RGB", size, COLOUR)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    image.save(tmp_path / name, **options)
    photo = data.decode(tmp_path / name, 16)
    assert photo.shape == (16, 16, 3)
    assert photo.dtype == np.uint8
    assert np.abs(photo.astype(int) - colour).max() <= 3, f"{photo[8, 8]} instead of {colour}"


@pytest.mark.parametrize(
    "dtype, name", [(np.uint16, "a.png"), (np.int32, "a.tif"), (np.float32, "a.tif")]
)
def test_what_is_not_8_bits_is_refused(dtype, name, tmp_path):
    Image.fromarray(np.full((9, 9), 200, dtype)).save(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: not 8 bits a channel; save it as"):
        data.decode(tmp_path / name, 16)


def test_heic_is_refused_with_advice(tmp_path):
    make_milk10k(tmp_path)
    (photo,) = tmp_path.rglob("ISIC_0000003.jpg")
    photo.unlink()
    photo.with_suffix(".HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(DataError, match="ISIC_0000003.HEIC: HEIC; save it as JPEG or PNG"):
        data.read(tmp_path, 16)


# EXIF in bytes: two entries, the rotation (turn by 90 degrees to the right) and one whose type is
# not the standard's.
ROTATED = b"Exif\0\0II*\0\x08\0\0\0\2\0" + b"\x12\1\3\0\1\0\0\0\6\0\0\0"
ODD_ENTRIES = {
    "resolution is text": b"\x1a\1\2\0\5\0\0\0\x26\0\0\0" + bytes(4) + b"text\0",
    "software is a fraction": b"\x31\1\5\0\1\0\0\0\x26\0\0\0" + bytes(4) + b"\3\0\0\0\2\0\0\0",
}


@pytest.mark.parametrize("odd", ODD_ENTRIES)
def test_exif_rotation_is_undone_even_beside_odd_exif(odd, tmp_path):
    upright = Image.new("RGB", (30, 40), (20, 20, 20))  # dark above, bright below
    upright.paste((220, 220, 220), (0, 20, 30, 40))
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    lying.save(tmp_path / "a.jpg", exif=ROTATED + ODD_ENTRIES[odd])
    photo = data.decode(tmp_path / "a.jpg", 16)
    assert photo[:6].mean() < 40
    assert photo[-6:].mean() > 200


@pytest.mark.parametrize("error, refusal", [(SyntaxError, DataError), (MemoryError, MemoryError)])
def test_any_error_of_a_decoder_names_the_file_but_not_a_lack_of_memory(
    error, refusal, tmp_path, monkeypatch
):
    def fail(*_):
        raise error("a.png: odd")

    write_photo(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "convert", fail)
    with pytest.raises(refusal, match="a.png: odd"):
        data.decode(tmp_path / "a.png", 16)


def test_a_lack_of_memory_for_turning_a_photo_is_not_hidden(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    write_photo(tmp_path / "a.png")
    monkeypatch.setattr(data.ImageOps, "exif_transpose", fail)
    with pytest.raises(MemoryError):
        data.decode(tmp_path / "a.png", 16)


@pytest.mark.parametrize("width", [300, 768, 3000])
def test_the_decoders_own_scaling_stays_within_a_grey_level(width, spc_folder, tmp_path):
    with Image.open(spc_folder / "images/derm0003.jpg") as image:
        large = image.resize((width, width * 2 // 3), Image.BICUBIC)
    large.save(tmp_path / "large.jpg", quality=90)
    with Image.open(tmp_path / "large.jpg") as image:
        exact = np.asarray(image.resize((96, 96), Image.BILINEAR), float)
    assert np.abs(data.decode(tmp_path / "large.jpg", 96) - exact).mean() < 1


# ----------------------------------------------------------------------------- the cache


def test_photos_are_decoded_once_and_found_by_their_contents(tmp_path, monkeypatch):
    decoded = []
    decode = data.decode

    def count(path, size):
        decoded.append(path)
        return decode(path, size)

    monkeypatch.setattr(data, "decode", count)
    first = data.read(make_pairs(tmp_path), 16)
    again = data.read(tmp_path, 16)
    assert len(decoded) == 2 * 48, "each once for its pixels and once for its small picture"
    assert first.pixels.shape == (24, 2, 16, 16, 3)
    assert torch.equal(again.pixels, first.pixels)
    assert (again.photo_hashes == first.photo_hashes).all()
    assert again.fingerprint == first.fingerprint
    write_photo(tmp_path / "d5.png", (1, 2, 3))  # the same name, another picture
    changed = data.read(tmp_path, 16)
    assert len(decoded) == 4 * 48
    assert changed.pixels[5, 1].max() < 9
    assert changed.fingerprint != first.fingerprint
    assert data.read(tmp_path, 20).pixels.shape[2] == 20


def test_another_decoder_decodes_anew(tmp_path, monkeypatch):
    data.read(make_pairs(tmp_path), 16)
    monkeypatch.setattr(data, "DECODER_VERSION", data.DECODER_VERSION + 1)
    monkeypatch.setattr(data, "decode", lambda path, size: np.zeros((size, size, 3), np.uint8))
    assert data.read(tmp_path, 16, to_train=False).pixels.max() == 0


def test_ctrl_c_stops_decoding(tmp_path, monkeypatch):
    decoded = []

    def decode_slowly(path, size):
        decoded.append(path)
        time.sleep(0.01)
        return np.zeros((size, size, 3), np.uint8)

    def stop(items, title):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "decode", decode_slowly)
    monkeypatch.setattr(data, "progress", stop)
    with pytest.raises(KeyboardInterrupt):
        data.read(make_pairs(tmp_path), 16)
    assert len(decoded) < 48


def test_pixels_are_read_from_the_file_not_copied(tmp_path):
    pixels = data.read(make_pairs(tmp_path), 64).pixels
    address = hex(pixels.data_ptr())[2:]
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists its memory maps")
    for line in maps.read_text().splitlines():
        start, end = line.split(" ")[0].split("-")
        if int(start, 16) <= int(address, 16) < int(end, 16):
            assert "runs/cache" in line


def test_a_stopped_run_leaves_nothing(tmp_path, monkeypatch):
    def stop(source, target):
        raise KeyboardInterrupt

    make_pairs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            data.read(tmp_path, 16)
    assert not list(tmp_path.glob("runs/cache/*"))
    assert len(data.read(tmp_path, 16).pixels) == 24


def test_a_full_disk_and_an_unwritable_cache_are_one_sentence(tmp_path, monkeypatch, capsys):
    def full(file, array):
        raise OSError(errno.ENOSPC, "No space left on device")

    make_pairs(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        data.run_main(lambda: data.read(tmp_path, 16, tmp_path / "file/cache"), DataError)
    assert stopped.value.code == 2
    assert "file/cache" in capsys.readouterr().err
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(SystemExit):
        data.run_main(lambda: data.read(tmp_path, 16), DataError)
    assert "No space left" in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/cache/*"))


# --------------------------------------------------------------------------------- words


def test_words_are_the_same_in_every_release():
    for column, age in (("age", "45.0"), ("age_approx", "40"), ("age", "59+")):
        assert data.patient_word(column, age) == "age from 40"
    assert data.patient_word("age", "85+") == "age from 80"
    assert data.patient_word("age", "0.0") == "age from 0"
    for column in ("site", "localization", "location", "anatom_site_general", "anatom_site_2"):
        assert data.patient_word(column, "Lower_Extremity") == "site lower extremity"
    assert data.patient_word("elevation", "Flat") == "elevation flat"


def test_words_are_learned_from_the_training_split_alone(tmp_path):
    table = make_pairs(tmp_path, 60) / OWN
    columns = {
        "split": ["train"] * 20 + ["valid"] * 20 + ["test"],
        "sex": ["male"] * 10 + [""] * 10 + ["female"],
        "age": ["30", "unknown", "71"] * 19 + ["12"],
        "elevation": ["flat", "nodular"],
        "level_of_diagnostic_difficulty": ["low", "high"],
        "site": ["", "arm", ""],
        "location": ["", "leg", ""],
    }
    add_columns(table, columns)
    release = data.read(tmp_path, SIZE)
    assert release.vocabulary == ["", "begin", "age from 20", "age from 60", "sex male", "site arm"]
    assert release.words[:3].tolist() == [[1, 2, 4], [1, 4, 5], [1, 3, 4]]
    assert release.words[30].tolist() == [1, 2, 0]
    assert release.words[59].tolist() == [1, 0, 0], "words of the test split were learned"
    assert set(release.metadata) == set(columns) - {"split"}, "for the results of subgroups"
    other = data.read(tmp_path, SIZE, vocabulary=["", "begin", "sex female", "sex male"])
    assert other.words[:2].tolist() == [[1, 3], [1, 3]]
    assert other.words[59].tolist() == [1, 2]


# -------------------------------------------------------- other lesions than a run's own


def test_labels_are_matched_by_the_names_of_task_and_class(tmp_path):
    table = make_pairs(tmp_path) / OWN
    add_columns(table, {"veil": ["absent", "Present", "unclear"], "network": ["typical", "absent"]})
    release = data.read(tmp_path, SIZE, to_train=False)
    tasks = {"VEIL": ("absent", "blue", "present"), "lesion": ("b", "a")}
    matched = data.match_labels(release, tasks)
    assert matched.tasks == tasks
    assert matched.labels[:4].tolist() == [[0, 1], [2, 0], [-1, 1], [-1, 0]]
    unknown = "veil/unclear, network/absent, network/typical"
    assert f"the run has no class {unknown}; these labels" in matched.notes[-1]
    assert len(release.tasks) == 3, "the release itself is unchanged"


def test_a_release_of_one_lesion(tmp_path):
    write_photo(tmp_path / "c.png", (10, 20, 30))
    write_photo(tmp_path / "d.png", (40, 50, 60))
    vocabulary = ["", "begin", "age from 40", "sex female"]
    photos = {"dermoscopy": tmp_path / "d.png", "clinical": tmp_path / "c.png"}
    about = {"sex": "Female", "age": "55", "site": "arm"}
    release = data.release_of_one(photos, about, 16, vocabulary)
    assert (release.views, release.tasks) == (data.VIEWS, {})
    assert release.labels.shape == (1, 0)
    assert release.words.tolist() == [[1, 2, 3]]  # in the order of training
    assert release.pixels[0, :, 0, 0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert release.notes == ["WARNING: the run has not learned the word 'site arm'; it is left out"]
    batch = data.make_batch(release, torch.tensor([0]), CPU)
    assert batch["clinical"].shape == (1, 3, 16, 16)

    photos["clinical"] = photos["dermoscopy"]
    assert "are one photo" in data.release_of_one(photos, {}, 16, vocabulary).notes[0]
    alone = data.release_of_one({"clinical": tmp_path / "c.png"}, {}, 16, vocabulary)
    assert (alone.views, alone.words.tolist(), alone.notes) == (("clinical",), [[1]], [])


def test_only_what_a_run_cannot_learn_from_one_lesion_is_warned_of(tmp_path):
    write_photo(tmp_path / "c.png")
    vocabulary = ["", "begin", "age from 40"]
    photos = {"clinical": tmp_path / "c.png"}
    about = {"age": "45", "age_approx": "70", "sex": "", "elevation": "flat"}
    release = data.release_of_one(photos, about, 16, vocabulary)
    assert release.words.tolist() == [[1, 2]]
    assert release.notes == [
        "WARNING: 'elevation flat' is no fact that a run can learn; it is left out"
    ]


def release_with_ids(cases, lesion_ids, patients, photos):
    pixels = torch.zeros(len(cases), 1, 4, 4, 3, dtype=torch.uint8)
    release = release_of(pixels, ("dermoscopy",))
    release.cases = cases
    release.lesion_ids = lesion_ids
    release.patients = patients
    release.photo_hashes = np.array([[photo] for photo in photos])
    return release


def test_known_lesions_are_found_by_case_lesion_patient_and_photo():
    old = release_with_ids(["A", "B", "C"], ["", "IL_2", ""], ["", "", "IP_3"], ["p1", "p2", "p3"])
    seen = data.identities(old, torch.tensor([0, 1, 2]))
    assert seen == {"ids": ["A", "B", "C", "IL_2", "IP_3"], "photos": ["p1", "p2", "p3"]}
    assert data.identities(old, torch.tensor([0])) == {"ids": ["A"], "photos": ["p1"]}

    cases = ["A", "E", "F", "G", "IL_2", "H"]
    lesions = ["", "B", "IL_7", "", "", ""]
    patients = ["", "", "IP_3", "", "", ""]
    new = release_with_ids(cases, lesions, patients, ["q1", "q2", "q3", "p2", "q5", "q6"])
    known, message = data.find_known(new, seen)
    assert known.tolist() == [True, True, True, True, True, False]
    assert message == "5 of 6 lesions have been seen before: 4 by id, 1 by photo."
    known, message = data.find_known(new, {"ids": [], "photos": []})
    assert (known.any(), message) == (False, "")


def test_ids_are_compared_as_people_do():
    old = release_with_ids(["Ab 1"], [""], ["P3"], ["p1"])
    new = release_with_ids(["ab  1", "B", "C"], [""] * 3, ["", "p3", "P33"], ["q1", "q2", "q3"])
    known, _ = data.find_known(new, data.identities(old, torch.tensor([0])))
    assert known.tolist() == [True, True, False]


def test_numbers_and_invented_cases_mean_nothing_in_another_release():
    """Two tables may both count from 1, or name their photos alike."""
    cases = ["1", "2.0", "a b", "photos/7", "D"]
    numbers = ["", "8", "", "", ""]
    old = release_with_ids(cases, numbers, numbers[::-1], ["p1", "p2", "p3", "p4", "p5"])
    old.invented_cases = {"a b", "photos/7"}
    seen = data.identities(old, torch.arange(5))
    assert seen == {"ids": ["D"], "photos": ["p1", "p2", "p3", "p4", "p5"]}
    new = release_with_ids(cases, numbers, numbers[::-1], ["q1", "q2", "p3", "q4", "q5"])
    new.invented_cases = {"a b", "photos/7"}
    known, message = data.find_known(new, seen)
    assert known.tolist() == [False, False, True, False, True]
    assert message.endswith("Lesion ids and patients that are mere numbers were not compared.")


def test_a_lesion_id_counts_even_if_it_is_also_a_photos_name():
    old = release_with_ids(["HAM_1"], ["HAM_1"], [""], ["p1"])
    old.invented_cases = {"HAM_1"}
    assert data.identities(old, torch.tensor([0]))["ids"] == ["HAM_1"]


@pytest.mark.parametrize("form", ["photos", "photos without endings", "numbered cases"])
def test_a_run_finds_its_own_lesions_and_none_of_an_unrelated_table(form, tmp_path):
    """Both tables name and number their photos and cases alike."""
    make_pairs(tmp_path / "own")
    make_pairs(tmp_path / "unrelated")
    for i in range(24):
        for name in (f"c{i}", f"d{i}"):
            write_photo(tmp_path / "unrelated" / f"{name}.png", (i, 7, ord(name[0])))
    for folder in ("own", "unrelated"):
        if form == "photos without endings":
            replace_bytes(tmp_path / folder / OWN, b".png", b"")
        if form == "numbered cases":
            add_columns(tmp_path / folder / OWN, {"case": [str(n) for n in range(1, 25)]})
    own = data.read(tmp_path / "own", SIZE)
    learned = torch.cat((own.rows("train"), own.rows("valid")))
    seen = data.identities(own, learned)
    again = data.read(tmp_path / "own", 24, to_train=False)
    assert again.cases == own.cases
    known, _ = data.find_known(again, seen)
    assert np.flatnonzero(known).tolist() == sorted(learned.tolist())
    unrelated = data.read(tmp_path / "unrelated", SIZE, to_train=False)
    known, message = data.find_known(unrelated, seen)
    assert (known.any(), message) == (False, "")


def test_a_case_of_the_table_is_a_name_even_if_it_looks_like_a_photos(tmp_path):
    add_columns(make_pairs(tmp_path) / OWN, {"case": ["a.jpg", "b", ""]})
    keep_lines(tmp_path / OWN, 3)
    release = data.read(tmp_path, SIZE, to_train=False)
    assert release.cases == ["a.jpg", "b", "c2.png d2.png"]
    assert data.identities(release, torch.arange(3))["ids"] == ["a.jpg", "b"]


def test_lesion_ids_of_different_kinds_cannot_be_compared():
    ham = release_with_ids(["ISIC_1"], ["HAM_0000001"], ["IP_4"], ["p1"])
    milk10k = release_with_ids(["IL_0000001"], ["IL_0000001"], [""], ["q1"])
    seen = data.identities(ham, torch.tensor([0]))
    known, message = data.find_known(milk10k, seen)
    assert not known.any()
    assert "cannot be compared (IL_ with HAM_)" in message
    seen_milk10k = data.identities(milk10k, torch.tensor([0]))
    _, message = data.find_known(ham, seen_milk10k)
    assert message.count("HAM_ with IL_") == 1
    own = release_with_ids(["L_17"], ["L_17"], ["P_4"], ["q2"])  # kinds that nobody knows
    assert data.find_known(own, seen)[1] == ""
    assert data.find_known(own, data.identities(own, torch.tensor([])))[1] == ""


# --------------------------------------------------------------------- the synthetic SPC


def test_drawn_lesions_are_seeded_and_in_derm7pts_layout(spc_folder, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    data.synthesize(again, cases=12, height=48)  # the first of the 60 in spc_folder
    for path in (again / "images").iterdir():
        assert path.read_bytes() == (spc_folder / "images" / path.name).read_bytes(), path.name
    assert read_rows(again / META) == read_rows(spc_folder / META)[:13]
    data.synthesize(other, cases=12, height=48, seed=1)
    assert read_rows(other / META)[1:] != read_rows(again / META)[1:]
    release = data.read(spc_folder, SIZE, masks=True)
    assert (release.kind, release.views) == ("synthetic", (*data.VIEWS, "mask"))
    data.synthesize(again, cases=5)
    assert len(list((again / "images").iterdir())) == 36, "drawn over what was there"


def test_drawings_are_what_they_have_always_been(spc_folder):
    """The README's figures of the demo hold for these drawings: their mean grey, case 0 to 3."""
    greys = {"clinic": [], "derm": []}
    for name, values in greys.items():
        for n in range(4):
            with Image.open(spc_folder / f"images/{name}{n:04}.jpg") as image:
                values.append(np.asarray(image).mean())
    close(greys["clinic"], [156.34, 151.50, 184.70, 189.40], 1e-3)
    close(greys["derm"], [160.52, 155.63, 171.19, 168.59], 1e-3)


def test_two_runs_that_draw_at_once_do_no_harm(tmp_path, monkeypatch):
    rename = os.rename

    def come_too_late(source, target):
        shutil.copytree(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", come_too_late)
    data.synthesize(tmp_path / "spc", cases=12, height=32)
    assert [path.name for path in tmp_path.iterdir()] == ["spc"]


def test_drawing_where_nothing_can_be_made_is_an_error(tmp_path):
    (tmp_path / "spc").touch()
    with pytest.raises(OSError, match="spc"):
        data.synthesize(tmp_path / "spc", cases=2, height=32)
    assert [path.name for path in tmp_path.iterdir()] == ["spc"]


def test_a_stopped_drawing_leaves_nothing(tmp_path, monkeypatch):
    def stop(signs, rng, height):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "draw_dermoscopy", stop)
    with pytest.raises(KeyboardInterrupt):
        data.synthesize(str(tmp_path / "spc"), cases=2, height=32)
    assert list(tmp_path.iterdir()) == []


def test_masks_lie_on_the_lesions(spc_folder):
    agreement = []  # of each drawing: mask and colours; the same with the mask 6 pixels beside it
    for path in sorted(spc_folder.glob("images/*_segmentation.png"))[:20]:
        mask = np.asarray(Image.open(path)) > 0
        name = path.name.replace("_segmentation.png", ".jpg")
        photo = np.asarray(Image.open(path.with_name(name)), float)
        skin = photo[:4].mean((0, 1))
        is_unlike_skin = np.abs(photo - skin).sum(2) > 60
        agreement.append(
            [(is_unlike_skin == np.roll(mask, shift, 1)).mean() for shift in (0, 6, -6)]
        )
    here, right, left = np.mean(agreement, 0)
    assert here > 0.9
    assert here > max(left, right) + 0.03


# ------------------------------------------------------------------- for the other files


def test_ctrl_c_ends_with_130(capsys):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        data.run_main(stop)
    assert stopped.value.code == 130
    assert capsys.readouterr().err.endswith("stopped\n")


def test_only_what_a_user_can_mend_ends_in_a_sentence(capsys):
    def fail(error):
        raise error

    with pytest.raises(SystemExit) as stopped:
        data.run_main(lambda: fail(DataError("a sentence")), DataError)
    assert stopped.value.code == 2
    for error, text in ((MemoryError(), ": not enough memory\n"), (OSError(), ": OSError\n")):
        with pytest.raises(SystemExit):
            data.run_main(lambda error=error: fail(error), DataError)
        assert capsys.readouterr().err.endswith(text)
    with pytest.raises(KeyError):
        data.run_main(lambda: fail(KeyError("a mistake of ours")), DataError)


def test_a_file_is_written_completely_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with data.atomic_write(path) as one, data.atomic_write(path) as other:
        one.write_text("one")
        other.write_text("other")
        assert one != other
        assert not path.exists()
    assert path.read_text() == "one"  # which was renamed last
    with pytest.raises(ZeroDivisionError), data.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "one"
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def test_progress_says_what_is_done_and_the_time_left(capsys, monkeypatch):
    assert list(data.progress("abc", "letters")) == ["a", "b", "c"]
    assert capsys.readouterr().err == "", "nothing in a file or pipe"
    clock = iter(range(0, 9_000, 21))
    monkeypatch.setattr(data.time, "monotonic", lambda: next(clock))  # 21 seconds an item
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(data.progress(range(5), "numbers")) == [0, 1, 2, 3, 4]
    lines = capsys.readouterr().err.split(data.CLEAR_LINE)
    assert lines[-2].startswith("numbers: 4 of 5, 0:")
    assert lines[1] == "numbers: 1 of 5, 2:48 left"
    assert lines[-1] == "", "the line is cleared in the end"


# ------------------------------------------------------------------- python data.py PATH


def test_main_prints_how_a_release_was_understood_and_draws_it(pairs_csv, tmp_path, capsys):
    data.main([str(pairs_csv)])
    text = capsys.readouterr().out
    assert text.startswith("pairs, 40 lesions with clinical and dermoscopy\n")
    assert "split: 3 different (train 16, test 14, valid 10), 0 lesions without" in text
    assert "masks: 40 lesions" in text
    assert "\nsex: 2 different (" in text
    assert "words of the training split: age from " in text
    assert "veil         present" in text
    with Image.open(tmp_path / "runs/pairs-contact-sheet.png") as sheet:
        assert sheet.size == (8 * 128, 5 * 128)


def test_main_reads_the_masks_of_a_release_without_labels(tmp_path, capsys):
    table = make_pairs(tmp_path, 40) / OWN
    remove_column(table, "lesion")
    add_columns(table, {"mask": ["c0.png"]})
    write_photo(tmp_path / "c0.png", (255, 255, 255))
    data.main([str(tmp_path)])
    text = capsys.readouterr().out
    assert "pairs, 40 lesions with clinical and dermoscopy\n" in text
    assert "split: 3 different (train 28, test 8, valid 4), 0 lesions without" in text
    assert "masks: 40 lesions" in text


def test_main_prints_a_release_without_labels(tmp_path, capsys):
    remove_column(make_pairs(tmp_path, 3) / OWN, "lesion")
    data.main([str(tmp_path)])
    text = capsys.readouterr().out
    assert "pairs, 3 lesions" in text
    assert "split: 0 different (none), 3 lesions without" in text
    assert "no labels" in text
    (sheet,) = tmp_path.glob("runs/*-contact-sheet.png")
    with Image.open(sheet) as image:
        assert image.size == (8 * 128, 128)


def test_main_prints_a_release_whose_task_has_no_label(tmp_path, capsys):
    table = make_pairs(tmp_path, 3) / OWN
    for n in (1, 2, 3):
        change_cell(table, n, "lesion", "")
    data.main([str(tmp_path)])
    assert "no labels" in capsys.readouterr().out


def test_a_column_without_any_text_is_no_task(tmp_path):
    add_columns(make_pairs(tmp_path) / OWN, {"remarks": [""]})
    assert list(data.read(tmp_path, SIZE).tasks) == ["lesion"]
