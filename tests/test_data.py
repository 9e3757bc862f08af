"""Releases of every kind, good and bad; splits; photos; the cache; pairs and augmentation; drawn lesions."""
import csv
import errno
import hashlib
import os
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold
from torchvision.transforms.v2.functional import normalize

import data
from conftest import close
from data import DataError

@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """The cache, runs/cache, is a new one for every test."""
    monkeypatch.chdir(tmp_path)

# --------------------------------------------------------------------------------------------- small releases to break

def photo(path, colour=None, **options):
    """A one-colour photo; without a colour, one of a colour that no other name has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = colour or tuple(np.random.default_rng(list(path.name.encode())).integers(0, 256, 3).tolist())
    Image.new("RGB", (12, 8), colour).save(path, **options)

def write(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)

def rewrite(path, change):
    """The CSV file with `change` applied to its list of rows; the first is the header."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    change(rows)
    write(path, rows[0], rows[1:])

def add(path, column, values):
    """A further column; the last value stands for all that follow."""
    def change(rows):
        for n, row in enumerate(rows):
            row.append([column, *values][min(n, len(values))])
    rewrite(path, change)

def put(path, row, column, value):
    """One cell of a table anew; row 0 is the header."""
    rewrite(path, lambda rows: rows[row].__setitem__(rows[0].index(column), value))

def make_pairs(folder, n=40):
    for i in range(n):
        photo(folder / f"c{i}.png")
        photo(folder / f"d{i}.png")
    rows = [(f"c{i}.png", f"d{i}.png", "ab"[i % 2]) for i in range(n)]
    write(folder / "pairs.csv", ["clinical", "dermoscopy", "lesion"], rows)
    return folder

def make_milk(folder, n=40, flat=False):
    rows = []
    for i in range(n):
        for side, kind in enumerate(("clinical: close-up", "dermoscopic")):
            name = f"ISIC_{2 * i + side:07}"
            inner = "images" if flat else f"MILK10k_Training_Input/IL_{i:07}"
            photo(folder / inner / f"{name}.jpg")
            rows.append((f"IL_{i:07}", kind, name, 50, "male", 3, "trunk"))
    write(folder / "MILK10k_Training_Metadata.csv",
          ["lesion_id", "image_type", "isic_id", "age_approx", "sex", "skin_tone_class", "site"], rows)
    write(folder / "MILK10k_Training_GroundTruth.csv", ["lesion_id", *data.MILK10K],
          [(f"IL_{i:07}", *(float(k == (1, 8)[i % 2]) for k in range(11))) for i in range(n)])
    return folder

def make_isic(folder, n=40):
    rows = []
    for i in range(n):
        for kind in ("clinical: close-up", "dermoscopic"):
            name = f"ISIC_{len(rows):07}"
            photo(folder / f"{name}.jpg")
            rows.append((name, f"IL_{i}", f"IP_{i // 2}", kind, ("Benign", "Malignant")[i % 2], "female"))
    write(folder / "metadata.csv", ["isic_id", "lesion_id", "patient_id", "image_type", "diagnosis_1", "sex"], rows)
    return folder

@pytest.fixture
def spc(release, tmp_path):
    """The synthetic SPC with tables that pass for real ones, and a link to the photos: 60 cases, 25 / 12 / 23."""
    folder = tmp_path / "release_v0"
    shutil.copytree(release / "meta", folder / "meta")
    (folder / "images").symlink_to(release / "images")
    rewrite(folder / "meta/meta.csv", lambda rows: [row.__setitem__(-1, "") for row in rows[1:]])
    return folder

@pytest.fixture
def spc_photos(spc, release):
    """The same with photos of its own, to be changed."""
    (spc / "images").unlink()
    shutil.copytree(release / "images", spc / "images")
    return spc

def names(found):
    """The photos of a release as the colours that `photo` gave them, to tell which is which."""
    return found.pixels[:, :, 8, 8].tolist()

# ------------------------------------------------------------------------------------------------------- what is read

def test_spc_labels_follow_the_strings(spc):
    found = data.read(spc, 16)
    with open(spc / "meta/meta.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert found.kind == "spc" and found.cases == [row["case_num"] for row in rows] and found.metadata["sex"]
    for n, row in enumerate(rows):
        for t, (column, classes) in enumerate(data.SPC.values()):
            assert row[column] in list(classes.values())[found.labels[n, t]]
        for v, column in enumerate(("clinic", "derm")):
            assert (found.pixels[n, v] == data.decode(spc / "images" / row[column], 16)).all()
    assert Counter(found.split.tolist()) == {"train": 25, "valid": 12, "test": 23}
    assert not found.published and any("not derm7pt's published" in note for note in found.notes)

@pytest.mark.parametrize("layout", ["nested", "flat", "linked", "its table"])
def test_milk10k_in_every_layout(tmp_path, layout):
    folder = path = make_milk(tmp_path / "milk", 24, flat=layout == "flat")
    if layout == "linked":
        (folder / "MILK10k_Training_Input").rename(tmp_path / "elsewhere")
        (folder / "MILK10k_Training_Input").symlink_to(tmp_path / "elsewhere")
    if layout == "its table":
        path = folder / "MILK10k_Training_GroundTruth.csv"
    found = data.read(path, 16)
    assert found.kind == "milk10k" and found.tasks == {"DIAG": data.MILK10K} and found.views == data.VIEWS
    assert found.labels[:, 0].tolist() == [1, 8] * 12 and found.metadata["skin_tone_class"] == ["3"] * 24
    for n in range(24):
        for v in range(2):
            file, = tmp_path.rglob(f"ISIC_{2 * n + v:07}.jpg")
            assert (found.pixels[n, v] == data.decode(file, 16)).all()

def test_isic_pairs_are_made_by_the_stated_rules(tmp_path):
    def change(rows):
        rows[1][3] = "clinical: overview"  # lesion 0: a close-up with a higher isic_id goes first
        rows.append(["ISIC_9000000", "IL_0", "IP_0", "clinical: close-up", "Benign", "female"])
        rows[3][3] = "TBP tile: close-up"  # lesion 1 has no clinical photo any more
        rows[5][1] = ""  # nor has lesion 2: that photo lacks its lesion_id
        rows[7][4] = rows[8][4] = "Indeterminate"  # lesion 3
        rows.insert(1, ["ISIC_9000001", "IL_0", "IP_0", "dermoscopic", "Benign", "female"])  # the lower id goes first
    make_isic(tmp_path)
    photo(tmp_path / "ISIC_9000000.jpg", (9, 99, 199))
    photo(tmp_path / "ISIC_9000001.jpg")
    rewrite(tmp_path / "metadata.csv", change)
    found = data.read(tmp_path, 16)
    assert found.kind == "isic" and len(found.cases) == 37 and not {"IL_1", "IL_2", "IL_3"} & set(found.cases)
    assert found.cases[0] == "IL_0" and np.abs(names(found)[0][0] - np.array([9, 99, 199])).max() < 4
    assert (found.pixels[0, 1] == data.decode(tmp_path / "ISIC_0000001.jpg", 16)).all()
    assert "1 lesions have no label" in " ".join(found.notes)
    split = dict(zip(found.cases, found.split))
    assert all(split[f"IL_{2 * p}"] == split[f"IL_{2 * p + 1}"] for p in range(2, 20)), "a patient in two splits"

def test_your_own_pairs(tmp_path):
    table = make_pairs(tmp_path) / "pairs.csv"
    add(table, "split", ["train"] * 20 + ["Valid"] * 19 + ["TEST"])
    add(table, "network", ["typical", *["absent", ""] * 19, "absent"])
    add(table, "sex", ["2"])
    for path in (tmp_path, table):
        found = data.read(path, 16)
        assert found.kind == "pairs" and found.tasks == {"lesion": ("a", "b"), "network": ("absent", "typical")}
        assert Counter(found.split.tolist()) == {"train": 20, "valid": 19, "test": 1}
        assert found.metadata == {"sex": ["2"] * 40}
        assert found.labels[:4].tolist() == [[0, 1], [1, 0], [0, -1], [1, 0]]

def test_to_predict_neither_labels_nor_a_split_are_needed(tmp_path):
    rewrite(make_pairs(tmp_path, 3) / "pairs.csv", lambda rows: [row.pop() for row in rows])
    found = data.read(tmp_path, 16, to_train=False)
    assert found.labels.shape == (3, 0) and len(found.pixels) == 3
    with pytest.raises(DataError, match="no lesion with all its photos and a label"):
        data.read(tmp_path, 16)

@pytest.mark.filterwarnings("ignore:The least populated class")
@pytest.mark.parametrize("text", ["", "?", "NaN", "N/A", "#N/A", "<NA>", "null", "Unknown"])
def test_unknown_texts_are_no_class(text, tmp_path):
    table = make_pairs(tmp_path, 24) / "pairs.csv"
    put(table, 1, "lesion", text)
    add(table, "other", ["a", text, "b", "a", "b"])
    found = data.read(tmp_path, 16)
    assert found.tasks == {"lesion": ("a", "b"), "other": ("a", "b")}
    assert found.labels[:2].tolist() == [[-1, 0], [1, -1]]

def test_the_case_of_letters_in_a_path(tmp_path):
    table = make_pairs(tmp_path) / "pairs.csv"
    photo(tmp_path / "C3.PNG", (1, 2, 3))  # beside c3.png: exact names go before similar ones
    put(table, 5, "clinical", "C3.PNG")
    (tmp_path / "NEL").mkdir()
    (tmp_path / "c7.png").rename(tmp_path / "NEL/c7.PNG")
    put(table, 8, "clinical", "nel/C7.png")
    found = data.read(tmp_path, 16)
    assert names(found)[4][0] == [1, 2, 3] != names(found)[3][0]
    assert (found.pixels[7, 0] == data.decode(tmp_path / "NEL/c7.PNG", 16)).all()

def test_lesions_that_milk10k_does_not_pair_are_named(tmp_path):
    rewrite(make_milk(tmp_path) / "MILK10k_Training_Metadata.csv", lambda rows: [rows.pop(3), rows.pop(3)])
    assert any("ground truth without two photos: IL_0000001 (1" in note for note in data.read(tmp_path, 16).notes)

# ------------------------------------------------------------------------------------------------------ masks and words

def make_ham(folder, n=40):
    """HAM10000's layout: photos in two folders; the mask of photo i is white in its first i columns of 40."""
    rows = []
    (folder / "masks").mkdir(parents=True)
    for i in range(n):
        name = f"ISIC_{i:07}"
        photo(folder / f"HAM10000_images_part_{i % 2 + 1}" / f"{name}.jpg")
        mask = np.zeros((40, 40), np.uint8)
        mask[:, :i] = 255
        Image.fromarray(mask).save(folder / "masks" / f"{name}_segmentation.png")
        rows.append((f"HAM_{i // 2:07}", name, ("nv", "mel")[i // 2 % 2], "follow_up", 45.0, "male", "lower extremity"))
    write(folder / "HAM10000_metadata.csv", ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"],
          rows)
    write(folder / "ISIC2018_Task3_Test_GroundTruth.csv", ["image_id", "dx"], [("ISIC_1", "nv")])  # comes with it
    return folder

def test_ham10000_with_its_masks(tmp_path):
    found = data.read(make_ham(tmp_path / "ham", 80), 40, masks=True)
    assert found.kind == "ham" and found.views == ("dermoscopy", "mask") and found.tasks == {"DIAG": data.HAM10000}
    assert Counter(found.split) == {"train": 64, "valid": 8, "test": 8}  # MAT, Sec. 3.1
    assert all(len(set(found.split[n:n + 2])) == 1 for n in range(0, 80, 2)), "two photos of a lesion in two splits"
    assert (found.labels[:4, 0] == [5, 5, 4, 4]).all() and "dx_type" not in found.metadata
    white = [int(mask[0, :, 0].sum()) // 255 for mask in found.pixels[:20, 1]]
    assert white == list(range(20)), "masks of other photos"
    assert data.read(tmp_path / "ham", 40).views == ("dermoscopy",)
    for path in (tmp_path / "ham/masks").iterdir():  # 0 and 1 instead of 0 and 255
        Image.fromarray(np.asarray(Image.open(path)) // 255).save(path)
    with pytest.raises(DataError, match="empty masks; they must be 255 inside"):
        data.read(tmp_path / "ham", 40, masks=True)
    (tmp_path / "ham/masks/ISIC_0000007_segmentation.png").unlink()
    with pytest.raises(DataError, match="ISIC_0000007_segmentation"):
        data.read(tmp_path / "ham", 40, masks=True)

def test_isic_2017_has_three_splits_two_tasks_and_masks(tmp_path):
    for part, first, last in (("Training", 0, 6), ("Validation", 6, 10), ("Test_v2", 10, 14)):
        rows = [(f"ISIC_{n:07}", float(n % 2), float(n % 3 == 0)) for n in range(first, last)]
        write(tmp_path / f"ISIC-2017_{part}_Part3_GroundTruth.csv", ["image_id", "melanoma", "seborrheic_keratosis"],
              rows)
        for name, *_ in rows:
            photo(tmp_path / f"ISIC-2017_{part}_Data" / f"{name}.jpg")
            photo(tmp_path / f"ISIC-2017_{part}_Part1_GroundTruth" / f"{name}_segmentation.png")
    found = data.read(tmp_path, 16, masks=True)
    assert found.kind == "isic17" and found.split.tolist() == ["train"] * 6 + ["valid"] * 4 + ["test"] * 4
    assert found.labels.tolist() == [[n % 2, int(n % 3 == 0)] for n in range(14)] and found.views == ("dermoscopy",
                                                                                                      "mask")

def test_a_mask_moves_with_its_photo_and_has_no_colour():
    """The photo is its own mask, black and white: they stay the same wherever augmentation takes them."""
    pixels = torch.zeros(40, 2, 32, 32, 3, dtype=torch.uint8)
    pixels[:, :, 4:14, 6:22] = 255
    inputs = data.augment(pixels, ("dermoscopy", "mask"), torch.Generator().manual_seed(0))
    assert inputs["mask"].shape == (40, 1, 32, 32) and set(inputs["mask"].unique().tolist()) == {0.0, 1.0}
    for shown, mask in zip(inputs["dermoscopy"][:, 0], inputs["mask"][:, 0]):
        middle = (shown.min() + shown.max()) / 2
        assert ((shown > middle).float() == mask).float().mean() > 0.97
    plain = data.as_inputs(pixels, ("dermoscopy", "mask"))["mask"]
    assert (plain[:, 0] == (pixels[:, 1, :, :, 0] > 127)).all()

def test_words_are_the_same_in_every_release():
    assert data.word("age", "45.0") == data.word("age_approx", "40") == "age from 40"
    assert data.word("age", "0.0") == "age from 0"
    for column in ("site", "localization", "location", "anatom_site_general"):
        assert data.word(column, "Lower_Extremity") == "site lower extremity"
        words = data.as_words({column: ["face", "trunk"]}, ["", "begin", "site face", "site trunk"], 2)
        assert words.tolist() == [[1, 2], [1, 3]]

def test_the_vocabulary_is_learned_from_the_training_split_alone(tmp_path):
    folder = make_pairs(tmp_path, 60)
    add(folder / "pairs.csv", "split", ["train"] * 20 + ["valid"] * 20 + ["test"])
    add(folder / "pairs.csv", "sex", ["male"] * 10 + [""] * 10 + ["female"])
    add(folder / "pairs.csv", "age", ["30", "unknown", "71"] * 19 + ["12"])
    found = data.read(folder, 16)
    vocabulary = data.make_vocabulary(found)
    assert vocabulary == ["", "begin", "age from 20", "age from 60", "sex male"]
    words = data.as_words(found.metadata, vocabulary, 60)
    assert words[:3].tolist() == [[1, 2, 4], [1, 4, 0], [1, 3, 4]] and words[30].tolist() == [1, 2, 0]
    assert words[59].tolist() == [1, 0, 0], "words of the test split were learned"

def test_a_release_has_one_fingerprint_to_train_and_to_predict(tmp_path):
    """Also if some of its lesions, indeterminate ones, are only there to be predicted."""
    folder = make_isic(tmp_path)
    put(folder / "metadata.csv", 7, "diagnosis_1", "Indeterminate")
    put(folder / "metadata.csv", 8, "diagnosis_1", "Indeterminate")
    whole, known = data.read(folder, 16, to_train=False), data.read(folder, 16)
    assert (len(whole.cases), len(known.cases)) == (40, 39) and whole.fingerprint == known.fingerprint

# ----------------------------------------------------------------------------------------------------------- the splits

def publish(folder, monkeypatch):
    """The hash of this release becomes that of the published one; it is made from the strings of the tables."""
    code = np.zeros((60, 9), np.int8)
    with open(folder / "meta/meta.csv", newline="") as file:
        for n, row in enumerate(csv.DictReader(file)):
            for t, (column, classes) in enumerate(data.SPC.values()):
                code[n, t] = [row[column] in strings for strings in classes.values()].index(True)
    for s, split in enumerate(data.SPLITS):
        code[np.loadtxt(folder / f"meta/{split}_indexes.csv", int, skiprows=1), 8] = s
    monkeypatch.setattr(data, "PUBLISHED_SPC", hashlib.sha256(code.tobytes()).hexdigest())

def test_published_is_row_by_row_and_only_warned_about_leaks(spc_photos, monkeypatch):
    publish(spc_photos, monkeypatch)
    shutil.copy(spc_photos / "images/derm0000.jpg", spc_photos / "images/clinic0059.jpg")
    found = data.read(spc_photos, 16)
    assert found.published and any("WARNING: one photo stands for two" in note for note in found.notes)
    def swap(rows):
        rows[1], rows[3] = rows[3], rows[1]
    rewrite(spc_photos / "meta/meta.csv", swap)  # the same totals; the labels of the two rows differ
    (spc_photos / "images/clinic0059.jpg").unlink()
    photo(spc_photos / "images/clinic0059.jpg")
    assert not data.read(spc_photos, 16).published

def test_split_is_scikit_learns_and_always_the_same(tmp_path):
    found = data.read(make_milk(tmp_path, 100), 16)
    assert [len(found.rows(split)) for split in data.SPLITS] == [70, 10, 20]
    folds = [rows for _, rows in StratifiedGroupKFold(10, shuffle=True, random_state=0).split(
        found.labels, found.labels[:, 0], np.arange(100))]
    assert set(found.rows("test")) == {*folds[0], *folds[1]} and set(found.rows("valid")) == set(folds[2])
    for split in data.SPLITS:  # stratified
        assert abs((found.labels[found.rows(split), 0] == 1).mean() - 0.5) < 0.1

@pytest.mark.parametrize("column", ["patient", "patient_id", "patient beside an empty patient_id"])
def test_chains_of_shared_patients_and_photos_stay_together(column, tmp_path):
    table = make_pairs(tmp_path, 60) / "pairs.csv"
    if "beside" in column:
        add(table, "patient_id", [""])
    add(table, column.split()[0], [f"P{n // 3}" for n in range(30)] + ["nan"])
    shutil.copy(tmp_path / "c2.png", tmp_path / "c3.png")  # joins patients P0 and P1
    found = data.read(tmp_path, 16)
    assert len(set(found.split[:6])) == 1, "one photo in two splits"
    assert all(len(set(found.split[3 * p:3 * p + 3])) == 1 for p in range(10)), "one patient in two splits"
    assert len(set(found.split[30:])) == 3, "lesions of unknown patients are not one patient's"
    assert any("in c2.png d2.png and c3.png d3.png (1" in note for note in found.notes)

def comment(folder, source, target):
    """The same pixels in other bytes: a JPEG with a comment."""
    old = (folder / "images" / source).read_bytes()
    text = b"ISIC_1234567"
    new = old[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + old[2:]
    (folder / "images" / target).write_bytes(new)

@pytest.mark.parametrize("target, says", [
    ("clinic0059.jpg", ""), ("clinic0001.jpg", "in 1 and 2 (1"), ("clinic0000.jpg", "in 1 and 1 (1")])
def test_identical_photos_are_found_by_their_pixels(target, says, spc_photos):
    comment(spc_photos, "derm0000.jpg", target)  # lesions 1 and 2 are trained on, lesion 60 is tested
    if says:
        assert any(f"one photo stands for two, {says}" in note for note in data.read(spc_photos, 16).notes)
    else:
        with pytest.raises(DataError, match=r"photo in two splits.*60 \(test\) and 1 \(train\)"):
            data.read(spc_photos, 16)

# --------------------------------------------------------------------------------------------------- bad input, refused

META, TRUTH, OWN = "meta/meta.csv", "MILK10k_Training_GroundTruth.csv", "pairs.csv"

def edit(path, change):
    path.write_bytes(change(path.read_bytes()))

def mark(*columns):
    return lambda f: rewrite(f / TRUTH, lambda rows: rows[2].__setitem__(slice(1, None), [
        str(float(name in columns)) for name in data.MILK10K]))

def index(split, value):
    return lambda f: put(f / f"meta/{split}_indexes.csv", 2, "indexes", value)

def two_splits(f):
    add(f / OWN, "patient_id", [""])
    add(f / OWN, "patient", ["", "P", "P", ""])
    add(f / OWN, "split", ["train", "valid", "test", "train"])

REFUSED = {  # what is wrong -> (the release, what is done to it, what the message says)
    "no such folder": ("spc", shutil.rmtree, "no meta/meta.csv"),
    "empty table": ("spc", lambda f: edit(f / META, lambda b: b""), "meta.csv: no column case_num"),
    "only a header": ("spc", lambda f: edit(f / META, lambda b: b.split(b"\n")[0]), "meta.csv: no rows"),
    "Latin-1": ("spc", lambda f: edit(f / META, lambda b: b + b"\xe4"), "cannot be read as a CSV file in UTF-8"),
    "unknown labels": ("spc", lambda f: [put(f / META, n, "streaks", "wavy") for n in (3, 9)],
                       "STR is none of absent, REG, IR.*line 4 'wavy', .*line 10 'wavy'"),
    "index out of range": ("spc", index("valid", "60"), "valid_indexes.csv line 3: '60' is no row of meta.csv"),
    "negative index": ("spc", index("valid", "-1"), "valid_indexes.csv line 3: '-1' is no row"),
    "overlapping splits": ("spc", index("test", "3"), "test_indexes.csv line 3: '3' .*in a split already"),
    "no split file": ("spc", lambda f: (f / "meta/test_indexes.csv").unlink(), "test_indexes.csv: cannot be read"),
    "nothing to learn": ("spc", lambda f: [put(f / META, n, "blue_whitish_veil", "absent") for n in range(1, 26)],
                         "BWV has fewer than two classes"),
    "missing photos": ("spc_photos", lambda f: [(f / f"images/{name}.jpg").unlink() for name in ("clinic0001",
                                                                                                 "derm0050")],
                       "(?s)clinic0001.jpg: .*No such file.*\n.*derm0050.jpg: .*No such file"),
    "no photo": ("spc_photos", lambda f: edit(f / "images/derm0007.jpg", lambda b: b"<html>"), "derm0007.jpg: cannot"),
    "truncated": ("spc_photos", lambda f: edit(f / "images/derm0007.jpg", lambda b: b[:999]),
                  "derm0007.jpg: .*truncated"),
    "two classes": ("milk", mark("BCC", "NV"), "GroundTruth.csv line 3: each lesion needs one row with one"),
    "no class": ("milk", mark(), "GroundTruth.csv line 3: each lesion needs one row with one"),
    "a further class": ("milk", lambda f: add(f / TRUTH, "OTHER", ["0.0"]), "one of MILK10k's 11 classes"),
    "lesion twice": ("milk", lambda f: rewrite(f / TRUTH, lambda r: r.append(r[2])), "line 26: each lesion"),
    "two ground truths": ("milk", lambda f: shutil.copy(f / TRUTH, f / "New_GroundTruth.csv"), "several tables"),
    "a photo twice": ("milk", lambda f: photo(f / "masks/ISIC_0000006.png"), "photos have one name.*ISIC_0000006"),
    "no pairs": ("isic", lambda f: edit(f / "metadata.csv", lambda b: b.replace(b"clinical: close-up", b"dermoscopic")),
                 "no lesion with all its photos"),
    "strange split": ("own", lambda f: add(f / OWN, "split", ["train", "holdout"]), "line 3: split is 'holdout'"),
    "no test": ("own", lambda f: add(f / OWN, "split", ["train", "train", "valid"]), "no lesion in one of"),
    "patient in two splits": ("own", two_splits, r"in two splits.*d2.png \(test\) and c1.png.*\(valid\)"),
    "lesion twice in own": ("own", lambda f: rewrite(f / OWN, lambda r: r.append(r[1])),
                            "several lesions are called c0.png"),
    "no photo named": ("own", lambda f: put(f / OWN, 2, "dermoscopy", ""), "line 3: no dermoscopy photo"),
    "a column twice": ("own", lambda f: add(f / OWN, "Lesion ", ["a"]), "two columns of one name"),
    "open quotation mark": ("own", lambda f: edit(f / OWN, lambda b: b + b'"c3.png,d3.png,a\r\n'), "cannot be read"),
    "names for classes": ("own", lambda f: add(f / OWN, "who", [f"name{n}" for n in range(24)]), "who: 24 classes"),
    "a / in a task": ("own", lambda f: add(f / OWN, "a/b", ["x", "y"]), "a / in the name"),
    "too few to split": ("own", lambda f: rewrite(f / OWN, lambda r: r.__delitem__(slice(9, None))), "fewer than 10"),
}
REFUSED |= {f"classes {one!r} and {other!r}": (
    "own", lambda f, one=one, other=other: add(f / OWN, "kind", [one, other]), "differ only in case, spaces or .0")
    for one, other in [("a", "A"), ("in situ", "in  situ"), ("1", "1.0"), ("caf\u00e9", "cafe\u0301")]}

@pytest.mark.parametrize("what", REFUSED)
def test_bad_releases_are_refused_in_a_clear_sentence(what, request, tmp_path):
    kind, damage, says = REFUSED[what]
    if kind in ("spc", "spc_photos"):
        folder = request.getfixturevalue(kind)
    else:
        folder = {"milk": make_milk, "isic": make_isic, "own": make_pairs}[kind](tmp_path / "release", 24)
    damage(folder)
    with pytest.raises(DataError, match=says):
        data.read(folder, 16)
    assert not list(tmp_path.glob("runs/cache/*.tmp")), "a piece of a cache was left"

@pytest.mark.parametrize("change", [
    lambda b: b"\xef\xbb\xbf" + b, lambda b: b.replace(b"\r\n", b"\n"), lambda b: b.replace(b"\r\n", b"\r\n\r\n", 3),
    lambda b: b.replace(b"absent", b"Absent ").replace(b"nevus", b"NEVUS"),
    lambda b: b.replace(b"clinic00", b"CLINIC00")],
    ids=["byte order mark", "other line ends", "blank rows", "case of labels", "case of paths"])
def test_strange_tables_are_read_right(change, spc):
    expected = data.read(spc, 16)
    edit(spc / META, change)
    found = data.read(spc, 16)
    assert (found.labels == expected.labels).all() and (found.digests == expected.digests).all()

# ------------------------------------------------------------------------------------------------------ decoding photos

COLOUR = (200, 100, 60)

def save_as(mode, size=(40, 30), **options):
    return lambda path: Image.new("RGB", size, COLOUR).convert(mode).save(path, **options)

PHOTOS = {  # what it is -> (file name, how it is written, the colour to be read)
    "JPEG": ("a.jpg", save_as("RGB", quality=95), COLOUR),
    "PNG named .jpg": ("a.jpg", save_as("RGB", format="PNG"), COLOUR),
    "CMYK": ("a.jpg", save_as("CMYK", quality=95), COLOUR),
    "grey": ("a.jpg", save_as("L", quality=95), (125, 125, 125)),
    "palette": ("a.png", lambda path: Image.new("RGB", (9, 9), COLOUR).quantize(4).save(path), COLOUR),
    "with an alpha channel": ("a.png", lambda path: Image.new("RGBA", (9, 9), (*COLOUR, 255)).save(path), COLOUR),
    "20,000 wide": ("a.jpg", save_as("RGB", (20000, 30)), COLOUR),
}

@pytest.mark.parametrize("kind", PHOTOS)
def test_photos_of_every_kind_are_read_right(kind, tmp_path):
    name, make, colour = PHOTOS[kind]
    make(tmp_path / name)
    found = data.decode(tmp_path / name, 16)
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - colour).max() <= 3, f"{found[8, 8]} instead of {colour}"

@pytest.mark.parametrize("dtype, name", [(np.uint16, "a.png"), (np.int32, "a.tif"), (np.float32, "a.tif")])
def test_what_is_not_8_bits_is_refused(dtype, name, tmp_path):
    Image.fromarray(np.full((9, 9), 200, dtype)).save(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: not 8 bits a channel"):
        data.decode(tmp_path / name, 16)

# EXIF in bytes: two entries, the rotation (turn by 90 degrees to the right) and one whose type is not the standard's.
ROTATED = b"Exif\0\0II*\0\x08\0\0\0\2\0" b"\x12\1\3\0\1\0\0\0\6\0\0\0"
ODD_EXIF = {"resolution is text": b"\x1a\1\2\0\5\0\0\0\x26\0\0\0" + bytes(4) + b"text\0",
            "software is a fraction": b"\x31\1\5\0\1\0\0\0\x26\0\0\0" + bytes(4) + b"\3\0\0\0\2\0\0\0"}

@pytest.mark.parametrize("odd", ODD_EXIF)
def test_exif_rotation_is_undone_even_beside_odd_exif(odd, tmp_path):
    upright = Image.new("RGB", (30, 40), (20, 20, 20))  # dark above, bright below
    upright.paste((220, 220, 220), (0, 20, 30, 40))
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=ROTATED + ODD_EXIF[odd])
    found = data.decode(tmp_path / "a.jpg", 16)
    assert found[:6].mean() < 40 and found[-6:].mean() > 200

def test_any_error_of_a_decoder_names_the_file(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError("odd")
    photo(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "resize", fail)
    with pytest.raises(DataError, match="a.png: odd"):
        data.decode(tmp_path / "a.png", 16)

@pytest.mark.parametrize("width", [300, 768, 3000])
def test_the_decoders_own_scaling_stays_within_a_grey_level(width, release, tmp_path):
    with Image.open(release / "images/derm0003.jpg") as image:
        large = image.resize((width, width * 2 // 3), Image.BICUBIC)
    large.save(tmp_path / "large.jpg", quality=90)
    with Image.open(tmp_path / "large.jpg") as image:
        exact = np.asarray(image.resize((96, 96), Image.BILINEAR), float)
    assert np.abs(data.decode(tmp_path / "large.jpg", 96) - exact).mean() < 1

# ------------------------------------------------------------------------------------------------------------ the cache

def test_cache_is_decoded_once_and_found_by_content(tmp_path, monkeypatch):
    decoded, decode = [], data.decode
    monkeypatch.setattr(data, "decode", lambda path, size: decoded.append(path) or decode(path, size))
    first = data.read(make_pairs(tmp_path), 16)
    again = data.read(tmp_path, 16)
    assert isinstance(first.pixels, np.memmap) and first.pixels.shape == (40, 2, 16, 16, 3) and len(decoded) == 80
    assert (again.pixels == first.pixels).all() and again.fingerprint == first.fingerprint
    photo(tmp_path / "d5.png", (1, 2, 3))  # the same name, another picture
    changed = data.read(tmp_path, 16)
    assert len(decoded) == 160 and changed.pixels[5, 1].max() < 9 and changed.fingerprint != first.fingerprint
    assert data.read(tmp_path, 20).pixels.shape[2] == 20

def test_a_stopped_run_leaves_nothing(tmp_path, monkeypatch):
    def stop(source, target):
        raise KeyboardInterrupt
    make_pairs(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            data.read(tmp_path, 16)
    assert not list(tmp_path.glob("runs/cache/*"))
    assert len(data.read(tmp_path, 16).pixels) == 40

def test_full_disk_and_unwritable_cache_are_one_sentence(tmp_path, monkeypatch, capsys):
    def full(file, pixels):
        raise OSError(errno.ENOSPC, "No space left on device")
    make_pairs(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        data.speak(lambda: data.read(tmp_path, 16, tmp_path / "file/cache"), DataError)
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(SystemExit):
        data.speak(lambda: data.read(tmp_path, 16), DataError)
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "file/cache" in text and "No space left" in text
    assert not list(tmp_path.glob("runs/cache/*"))

def test_ctrl_c(capsys):
    def stop():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stopped:
        data.speak(stop)
    assert stopped.value.code == 130 and capsys.readouterr().err.endswith("stopped\n")

# ----------------------------------------------------------------------------------------------- pairs and augmentation

def test_a_pair_stays_a_pair_with_its_label(tmp_path):
    """Photos with a printed code, through the reader, the cache, shuffling and augmentation."""
    for i in range(64):
        code = [255 * (i >> bit & 1) for bit in range(6)]  # six bars, black or white; the dermoscopy photo is blue
        for name, blue in ((f"c{i}", 0), (f"d{63 - i}", 255)):
            bars = np.zeros((48, 48, 3), np.uint8)
            bars[..., 0], bars[..., 2] = np.repeat(code, 8), blue
            Image.fromarray(bars).save(tmp_path / f"{name}.png")
    rows = [(f"c{i}.png", f"d{63 - i}.png", i % 2, i) for i in range(64)]
    write(tmp_path / "pairs.csv", ["clinical", "dermoscopy", "number", "case"], rows)
    found = data.read(tmp_path, 48)
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    batch = torch.from_numpy(found.pixels)[rows]
    plain = data.as_inputs(batch, found.views)
    moved = data.augment(batch, found.views, torch.Generator().manual_seed(0))
    for n, row in enumerate(rows):
        c = plain["clinical"][n, 0]
        number = sum(int(c[24, 8 * bit + 4] > 0) << bit for bit in range(6))
        assert number == row == int(found.cases[row]) and number % 2 == found.labels[row, 0]
        for inputs in (plain, moved):
            c, d = inputs["clinical"][n], inputs["dermoscopy"][n]
            assert c[2].mean() < d[2].mean() - 1, "clinical and dermoscopy changed places"
            if 0 < row < 63:  # the same bars at the same places: one geometry for both
                assert ((c[0] > c[0].mean()) == (d[0] > d[0].mean())).float().mean() > 0.97

def test_as_inputs_is_torchvisions_normalisation():
    pixels = torch.randint(0, 256, (5, 2, 16, 16, 3), dtype=torch.uint8)
    inputs = data.as_inputs(pixels, data.VIEWS)
    assert list(inputs) == ["clinical", "dermoscopy"]
    for v, ours in enumerate(inputs.values()):
        photos = pixels[:, v].permute(0, 3, 1, 2) / 255
        close(ours, normalize(photos, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), 1e-6)

def test_augmentation_is_drawn_from_the_generator_alone():
    pixels = torch.randint(0, 256, (20, 2, 16, 16, 3), dtype=torch.uint8)
    one, again, other = (data.augment(pixels, data.VIEWS, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one[view], again[view]) and not torch.equal(one[view], other[view]) for view in data.VIEWS)

def map_and_light(pictures):
    """From augmented copies of the map below: where each place comes from, as (2, 3) matrices; contrast; brightness.
    Red and green are a place's x and y in the photo, blue has two levels, which tell contrast and brightness."""
    x = 255 * (pictures * torch.tensor(data.STD).view(3, 1, 1) + torch.tensor(data.MEAN).view(3, 1, 1))
    low, high = x[:, 2].flatten(1).min(1).values, x[:, 2].flatten(1).max(1).values
    contrast = (high - low) / 80
    brightness = low - 80 * contrast
    place = (x[:, :2] - brightness.view(-1, 1, 1, 1)) / contrast.view(-1, 1, 1, 1)
    place = (place - 120) / 40  # from -1 to 1
    side = (torch.arange(40) * 2 + 1) / 40 - 1
    v, u = torch.meshgrid(side, side, indexing="ij")
    near = (u.abs() < 0.3) & (v.abs() < 0.3)  # what comes from there is never reflected
    known = torch.stack((u[near], v[near], torch.ones(int(near.sum()))), 1)
    return place[:, :, near] @ torch.linalg.pinv(known).mT, contrast, brightness / 255

def test_each_step_of_the_papers_augmentation_occurs_with_its_probability_and_range():
    side = (torch.arange(40) * 2 + 1) / 40 - 1
    pixels = torch.empty(1, 2, 40, 40, 3)
    pixels[..., 0], pixels[..., 1] = 120 + 40 * side, 120 + 40 * side[:, None]
    pixels[..., 2] = 80 + 80 * (side > 0)
    n = 1000
    copies = data.augment(pixels.expand(n, -1, -1, -1, -1), data.VIEWS, torch.Generator().manual_seed(0))
    geometry, contrast, brightness = map_and_light(copies["clinical"])
    other, other_contrast, other_brightness = map_and_light(copies["dermoscopy"])
    assert (geometry - other).abs().max() < 1e-3, "both photos share the geometry"

    def often(condition, share):
        assert abs(condition.float().mean() - share) < 0.05, f"{condition.float().mean():.3f} instead of {share}"

    def uniform(values, low, high):
        assert values.min() > low - 0.003 and values.max() < high + 0.003
        for quarter in range(4):
            often((values - low) / (high - low) < quarter / 4, quarter / 4)

    matrix, shift = geometry[:, :, :2], geometry[:, :, 2]
    zoom = torch.linalg.det(matrix).abs() ** -0.5
    rigid = matrix @ matrix.mT * zoom.view(n, 1, 1) ** 2
    assert (rigid - torch.eye(2)).abs().max() < 0.01, "nothing but flips, turns and zoom"
    often(torch.linalg.det(matrix) < 0, 1 / 2)  # one flip, not two
    moved = (zoom - 1).abs() + shift.abs().sum(1) > 0.003
    often(moved, 1 / 2)
    uniform(zoom[moved], 0.5, 1.5)
    uniform(shift[moved].flatten(), -1 / 8, 1 / 8)
    angle = torch.rad2deg(torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]))
    uniform((angle[moved] + 45) % 90, 0, 90)
    still = angle[~moved].round()
    assert set(still.abs().tolist()) <= {0, 90, 180}
    often(still.abs() == 90, 1 / 4)  # a quarter turn in half of the copies, by 0 to 3 quarters
    often(still == 0, 3 / 8)

    lit, other_lit = (contrast - 1).abs() > 1e-5, (other_contrast - 1).abs() > 1e-5
    often(lit, 1 / 2)
    often(lit & other_lit, 1 / 4)  # each photo has its own light
    for values, change in ((contrast[lit], 1), (other_contrast[other_lit], 1), (brightness[lit], 0),
                           (other_brightness[other_lit], 0)):
        uniform(values, change - 0.2, change + 0.2)
    assert brightness[~lit].abs().max() < 0.001

# ------------------------------------------------------------------------------------------------------- synthetic SPC

def test_synthetic_lesions_are_seeded_whole_and_in_derm7pts_layout(release, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    data.synthesize(again, cases=60, height=48)
    for path in sorted(release.rglob("*.*")):
        assert path.read_bytes() == (again / path.relative_to(release)).read_bytes(), path.name
    data.synthesize(other, cases=60, height=48, seed=1)
    assert (release / META).read_bytes() != (other / META).read_bytes()
    assert data.read(release, 16).kind == "synthetic"
    data.synthesize(again, cases=5)
    assert len(list((again / "images").iterdir())) == 180, "drawn over what was there"

def test_two_runs_that_draw_at_once_do_no_harm(tmp_path, monkeypatch):
    rename = os.rename
    def late(source, target):  # the other one is faster
        shutil.copytree(source, target)
        rename(source, target)
    monkeypatch.setattr(os, "rename", late)
    data.synthesize(tmp_path / "spc", cases=12, height=32)
    assert [path.name for path in tmp_path.iterdir()] == ["spc"]

def test_masks_lie_on_the_lesions(release):
    overlaps = []
    for path in sorted(release.glob("images/*_segmentation.png"))[:20]:
        mask = np.asarray(Image.open(path)) > 0
        photo = np.asarray(Image.open(path.with_name(path.name.replace("_segmentation.png", ".jpg"))), float)
        unlike_skin = np.abs(photo - photo[:4].mean((0, 1))).sum(2) > 60
        overlaps.append([(unlike_skin == np.roll(mask, shift, 1)).mean() for shift in (0, 6, -6)])
    here, right, left = np.mean(overlaps, 0)
    assert here > 0.9 and here > max(left, right) + 0.03

def test_main_reports_and_draws_a_contact_sheet(pairs, tmp_path, capsys):
    data.main([str(pairs)])
    assert "veil         present" in capsys.readouterr().out
    with Image.open(tmp_path / "runs/pairs-contact-sheet.png") as sheet:
        assert sheet.size == (8 * 128, 5 * 128)
