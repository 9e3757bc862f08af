"""Releases of every kind, good and bad; the cache; pairs that stay pairs; augmentation."""
import csv
import errno
import io
import os
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

import data
from conftest import close
from data import DataError

# --------------------------------------------------------------------------------------------- small releases to break


def photo(path, colour=None, size=(12, 8), **options):
    """A one-colour photo; without a colour, one of a colour that no other path has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = colour or tuple(np.random.default_rng(list(str(path).encode())).integers(0, 256, 3).tolist())
    Image.new("RGB", size, colour).save(path, **options)
    return path


def write(path, columns, rows, delimiter=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(columns)
        writer.writerows(rows)


def make_pairs(folder, n=40):
    for i in range(n):
        photo(folder / f"c{i}.png"), photo(folder / f"d{i}.png")
    write(folder / "pairs.csv", ["clinical", "dermoscopy", "lesion"], [(f"c{i}.png", f"d{i}.png", "ab"[i % 2]) for i in range(n)])
    return folder


def make_milk(folder, n=40, flat=False):
    rows = []
    for i in range(n):
        for side, kind in enumerate(("clinical: close-up", "dermoscopic")):
            name = f"ISIC_{2 * i + side:07}"
            photo(folder / "images" / f"{name}.jpg" if flat else folder / "MILK10k_Training_Input" / f"IL_{i:07}" / f"{name}.jpg")
            rows.append((f"IL_{i:07}", kind, name, 50, "male", 3, "trunk"))
    write(folder / "MILK10k_Training_Metadata.csv",
          ["lesion_id", "image_type", "isic_id", "age_approx", "sex", "skin_tone_class", "site"], rows)
    write(folder / "MILK10k_Training_GroundTruth.csv", ["lesion_id", *data.MILK10K],
          [(f"IL_{i:07}", *(float(k == (1, 8)[i % 2]) for k in range(11))) for i in range(n)])
    return folder


def make_isic(folder, n=40, columns=("isic_id", "lesion_id", "patient_id", "image_type", "diagnosis_1", "sex")):
    rows = []
    for i in range(n):
        for kind in ("clinical: close-up", "dermoscopic"):
            name = f"ISIC_{len(rows):07}"
            photo(folder / f"{name}.jpg")
            rows.append((name, f"IL_{i}", f"IP_{i // 2}", kind, ("Benign", "Malignant")[i % 2], "female"))
    write(folder / "metadata.csv", columns, rows)
    return folder


def rewrite(path, change):
    """The CSV file with `change` applied to its list of rows (the first is the header)."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    change(rows)
    write(path, rows[0], rows[1:])


@pytest.fixture
def spc(release, tmp_path):
    """A copy of the synthetic SPC that passes for a real one: 60 cases, 25 / 12 / 23."""
    folder = shutil.copytree(release, tmp_path / "release_v0")
    rewrite(folder / "meta" / "meta.csv", lambda rows: [row.__setitem__(-1, "") for row in rows[1:]])
    return folder


# ------------------------------------------------------------------------------------------------------- what is read


def test_every_published_label_count_is_recognised(tmp_path, monkeypatch):
    """A release of the published composition: every string of the tables, in the published numbers."""
    photo(tmp_path / "images" / "Nel" / "NEL025.JPG", format="JPEG")
    columns = {}
    for column, classes in data.SPC.values():
        columns[column] = [strings[i % len(strings)].upper() for count, strings in classes.values() for i in range(count)]
        assert len(columns[column]) == 1011
    # The files are one photo here, so what a lesion shares with others is its row number.
    monkeypatch.setattr(data, "digest", lambda path, count=iter(range(10 ** 6)): str(next(count)).encode())
    write(tmp_path / "meta" / "meta.csv", ["clinic", "derm", *columns],
          [("nel/Nel025.jpg", "NEL/nel025.JPG", *labels) for labels in zip(*columns.values())])
    order = np.random.default_rng(0).permutation(1011)
    for split, rows in zip(data.SPLITS, (order[:413], order[413:616], order[616:])):
        write(tmp_path / "meta" / f"{split}_indexes.csv", ["indexes"], rows[:, None].tolist())
    found = data.read(tmp_path)
    assert found.kind == "spc" and any("the published derm7pt" in note for note in found.notes)
    assert any("in 1011 cases the clinical photo is the dermoscopy file" in note for note in found.notes)
    published = {"DIAG": [42, 575, 252, 97, 45], "PN": [400, 381, 230], "STR": [653, 107, 251], "PIG": [588, 118, 305],
                 "RS": [758, 253], "DaG": [229, 334, 448], "BWV": [816, 195], "VS": [823, 117, 71]}
    assert {task: np.bincount(column).tolist() for task, column in zip(found.tasks, found.labels.T)} == published
    rewrite(tmp_path / "meta" / "meta.csv", lambda rows: rows[1].__setitem__(2, "melanoma"))
    assert any("not the published derm7pt" in note and "BCC 41 instead of 42" in note for note in data.read(tmp_path).notes)


def test_spc_labels_follow_the_strings(spc):
    found = data.read(spc)
    with open(spc / "meta" / "meta.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    by_case = {row["case_num"]: row for row in rows}
    for case, labels, (clinical, dermoscopy) in zip(found.cases, found.labels, found.photos):
        row = by_case[case]
        assert (clinical.name, dermoscopy.name) == (row["clinic"], row["derm"])
        for (task, (column, classes)), label in zip(data.SPC.items(), labels):
            assert row[column] in classes[found.tasks[task][label]][1]
        assert int(row["seven_point_score"]) == data.seven_point_score(found.tasks, labels)
    assert Counter(found.split) == {"train": 25, "valid": 12, "test": 23}


@pytest.mark.parametrize("flat", [False, True])
def test_milk10k_in_both_layouts(tmp_path, flat):
    found = data.read(make_milk(tmp_path, flat=flat))
    assert found.kind == "milk10k" and found.tasks == {"DIAG": data.MILK10K}
    assert set(found.labels[:, 0]) == {1, 8} and found.metadata["skin_tone_class"] == ["3"] * 40
    for n, (clinical, dermoscopy) in enumerate(found.photos):
        assert (clinical.stem, dermoscopy.stem) == (f"ISIC_{2 * n:07}", f"ISIC_{2 * n + 1:07}")
    two = data.read(tmp_path, binary=True)  # BCC is malignant, NV benign
    assert two.tasks == data.TWO_CLASSES and ((two.labels == 1) == (found.labels == 1)).all()


def test_isic_pairs_are_made_by_the_stated_rules(tmp_path):
    def change(rows):
        rows[1][3] = "clinical: overview"  # lesion 0: a close-up with a higher isic_id goes first
        photo(tmp_path / "ISIC_9000000.jpg"), photo(tmp_path / "ISIC_9000001.jpg")
        rows.append(["ISIC_9000000", "IL_0", "IP_0", "clinical: close-up", "Benign", "female"])
        rows.append(["ISIC_9000001", "IL_0", "IP_0", "dermoscopic", "Benign", "female"])  # the lower isic_id goes first
        rows[3][3] = "TBP tile: close-up"  # lesion 1 has no clinical photo any more
        rows[5][1] = ""  # lesion 2 has no clinical photo any more: that one lacks its lesion_id
        rows[7][4] = rows[8][4] = "Indeterminate"  # lesion 3
    make_isic(tmp_path)
    rewrite(tmp_path / "metadata.csv", change)
    found = data.read(tmp_path)
    assert found.kind == "isic" and len(found.cases) == 37 and not {"IL_1", "IL_2", "IL_3"} & set(found.cases)
    assert [path.stem for path in found.photos[found.cases.index("IL_0")]] == ["ISIC_9000000", "ISIC_0000001"]
    text = " ".join(found.notes)
    assert "2 of 82 images have no lesion_id" in text and "1 lesions are neither benign nor malignant" in text
    split = dict(zip(found.cases, found.split))
    assert all(split[f"IL_{2 * p}"] == split[f"IL_{2 * p + 1}"] for p in range(2, 20)), "a patient in two splits"


@pytest.mark.parametrize("linked", ["photos", "circle"])
def test_linked_folders_are_entered_once(tmp_path, linked):
    folder = make_milk(tmp_path / "release")
    if linked == "photos":
        (folder / "MILK10k_Training_Input").rename(tmp_path / "elsewhere")
        (folder / "MILK10k_Training_Input").symlink_to(tmp_path / "elsewhere")
    else:
        (folder / "MILK10k_Training_Input" / "circle").symlink_to(folder)
    assert len(data.read(folder).cases) == 40


def test_photos_of_one_name(tmp_path):
    folder = make_milk(tmp_path)
    shutil.copytree(folder / "MILK10k_Training_Input", folder / "copy")
    assert len(data.read(folder).cases) == 40  # the same pictures twice do no harm
    photo(folder / "masks" / "ISIC_0000006.png")
    with pytest.raises(DataError, match="different photos have one name, keep one: .*ISIC_0000006"):
        data.read(folder)


def test_exact_names_go_before_similar_ones(tmp_path):
    make_pairs(tmp_path)
    photo(tmp_path / "C3.PNG")
    rewrite(tmp_path / "pairs.csv", lambda rows: rows[5].__setitem__(0, "C3.PNG"))
    found = data.read(tmp_path)
    assert [found.photos[n][0].name for n in (3, 4)] == ["c3.png", "C3.PNG"]


def test_old_isic_columns(tmp_path):
    make_isic(tmp_path, columns=("isic_id", "meta.clinical.lesion_id", "patient_id", "meta.acquisition.image_type",
                                 "meta.clinical.benign_malignant", "sex"))
    assert len(data.read(tmp_path).cases) == 40


def test_your_own_pairs(tmp_path):
    def change(rows):
        for row, split in zip(rows, ["split", *["train"] * 20, *["val"] * 10, *["TEST"] * 10]):
            row += [split, "absent" if row[2] == "b" else "", "2"]
        rows[0][4:] = ["network", "sex"]
        rows[1][4] = "typical"
    make_pairs(tmp_path)
    rewrite(tmp_path / "pairs.csv", change)
    for path in (tmp_path, tmp_path / "pairs.csv"):
        found = data.read(path)
        assert found.kind == "pairs" and found.tasks == {"lesion": ("a", "b"), "network": ("absent", "typical")}
        assert Counter(found.split) == {"train": 20, "valid": 10, "test": 10} and found.metadata == {"sex": ["2"] * 40}
        assert found.labels[:4].tolist() == [[0, 1], [1, 0], [0, -1], [1, 0]]


def test_patient_id_is_a_patient_and_none_is_a_class(tmp_path):
    def change(rows):
        rows[0] += ["patient_id", "streaks"]
        for n, row in enumerate(rows[1:]):
            row += [f"P{n // 3}" if n < 20 else "unknown", ("none", "regular", "NA" if n % 2 else "")[n % 3]]
    make_pairs(tmp_path)
    rewrite(tmp_path / "pairs.csv", change)
    found = data.read(tmp_path)
    assert found.tasks == {"lesion": ("a", "b"), "streaks": ("none", "regular")} and (found.labels[2::3, 1] == -1).all()
    assert all(len(set(found.split[3 * p:3 * p + 3])) == 1 for p in range(6))


# ----------------------------------------------------------------------------------------------------------- the splits


def test_the_published_release_is_read_even_if_it_leaks(spc, monkeypatch):
    leak_file(spc)
    monkeypatch.setattr(data, "SPC_SPLIT", {"train": 25, "valid": 12, "test": 23})
    labels = read_labels(spc)
    monkeypatch.setattr(data, "SPC", {task: (column, {name: (int((labels[:, t] == k).sum()), strings) for k, (name, (_, strings)) in
                                                      enumerate(classes.items())}) for t, (task, (column, classes)) in enumerate(data.SPC.items())})
    found = data.read(spc)
    assert any(note.startswith("WARNING") and "in two splits" in note and "kept as published" in note for note in found.notes)


def read_labels(folder):
    with open(folder / "meta" / "meta.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return np.array([[next(k for k, (_, strings) in enumerate(classes.values()) if row[column] in strings)
                      for column, classes in data.SPC.values()] for row in rows])


def test_split_is_scikit_learns_and_always_the_same(tmp_path):
    found, again = data.read(make_milk(tmp_path, 100)), data.read(tmp_path)
    assert (found.split == again.split).all()
    assert {split: (found.split == split).sum() for split in data.SPLITS} == {"train": 70, "valid": 10, "test": 20}
    folds = [rows for _, rows in StratifiedGroupKFold(10, shuffle=True, random_state=0).split(
        found.labels, found.labels[:, 0], np.arange(100))]
    assert set(found.rows("test")) == {*folds[0], *folds[1]} and set(found.rows("valid")) == set(folds[2])
    for split in data.SPLITS:  # stratified
        assert abs((found.labels[found.rows(split), 0] == 1).mean() - 0.5) < 0.1


def test_chains_of_shared_patients_and_files_stay_together(tmp_path):
    def change(rows):
        rows[0].append("patient")
        for n, row in enumerate(rows[1:]):
            row.append(f"P{n // 3}" if n < 30 else "")
    make_pairs(tmp_path, 60)
    rewrite(tmp_path / "pairs.csv", change)
    shutil.copy(tmp_path / "c2.png", tmp_path / "c3.png")  # joins patients P0 and P1
    found = data.read(tmp_path)
    assert len(set(found.split[:6])) == 1, "one file in two splits"
    assert all(len(set(found.split[3 * p:3 * p + 3])) == 1 for p in range(10)), "one patient in two splits"
    assert any("1 files are in several lesions: 3 and 4" in note for note in found.notes)


def leak_file(folder):
    shutil.copy(folder / "images" / "derm0000.jpg", folder / "images" / "clinic0059.jpg")


@pytest.mark.parametrize("leak, says", [
    (leak_file, "one and the same image file is in two splits.*line 2 .train.*line 61 .test."),
    (lambda folder: rewrite(folder / "meta" / "meta.csv", lambda rows: rows[60].__setitem__(15, rows[1][15])), "two splits"),
], ids=["copied file", "same path"])
def test_published_splits_that_leak_are_refused(spc, leak, says):
    leak(spc)
    with pytest.raises(DataError, match=says):
        data.read(spc)


def test_own_splits_that_leak_a_patient_are_refused(tmp_path):
    make_pairs(tmp_path)
    rewrite(tmp_path / "pairs.csv", lambda rows: [row.extend(("split", "patient") if n == 0 else (
        data.SPLITS[n % 3], "P" if n in (1, 2) else "")) for n, row in enumerate(rows)])
    with pytest.raises(DataError, match="patient P is in two splits: .*line 2 .valid., .*line 3 .test."):
        data.read(tmp_path)


# --------------------------------------------------------------------------------------------------- bad input, refused


def text_of(path, change):
    path.write_bytes(change(path.read_bytes()))


def meta(row, column, value):
    return lambda folder: rewrite(folder / "meta" / "meta.csv", lambda rows: rows[row].__setitem__(rows[0].index(column), value))


def index(split, row, value):
    return lambda folder: rewrite(folder / "meta" / f"{split}_indexes.csv", lambda rows: rows.__setitem__(row, [value]))


REFUSED = {  # what is wrong -> (what is done to a synthetic SPC, what the message says)
    "no such folder": (lambda f: shutil.rmtree(f), "no such file or folder"),
    "empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), r"no release found. It should hold meta/meta.csv \(derm7pt\)"),
    "empty table": (lambda f: text_of(f / "meta" / "meta.csv", lambda b: b""), "meta.csv: no column clinic.*it has none"),
    "only a header": (lambda f: text_of(f / "meta" / "meta.csv", lambda b: b.split(b"\n")[0]), "meta.csv: no rows"),
    "wrong columns": (meta(0, "streaks", "streak"), "meta.csv: no column streaks; it has case_num"),
    "short row": (lambda f: text_of(f / "meta" / "meta.csv", lambda b: b + b"1,2\r\n"), "line 62: 2 values for 19 columns"),
    "unknown labels, all named": (lambda f: (meta(3, "streaks", "wavy")(f), meta(9, "diagnosis", "wart")(f)),
                                  r"(?s)line 4, streaks: 'wavy'.*line 10, diagnosis: 'wart'"),
    "index out of range": (index("valid", 2, "60"), "valid_indexes.csv line 3: '60' is no row number of meta.csv, 0 to 59"),
    "index not a number": (index("valid", 2, "x"), "valid_indexes.csv line 3: 'x'"),
    "negative index": (index("valid", 2, "-1"), "valid_indexes.csv line 3: '-1'"),
    "overlapping splits": (index("test", 1, "3"), "test_indexes.csv line 2: row 3 is in train already"),
    "index twice": (index("test", 1, "59"), "row 59 is in test already"),
    "no split file": (lambda f: (f / "meta" / "test_indexes.csv").unlink(), "test_indexes.csv: cannot be read"),
    "path climbs out": (meta(5, "clinic", "../../passwd.jpg"), "line 6: '../../passwd.jpg' is not a path below"),
    "absolute path": (meta(5, "clinic", "/etc/passwd"), "line 6: '/etc/passwd' is not a path below"),
    "no path": (meta(5, "derm", ""), "line 6: '' is not a path below"),
    "missing photos, all named": (lambda f: [os.remove(f / "images" / n) for n in ("clinic0001.jpg", "derm0050.jpg")],
                                  r"(?s)2 photos are missing or broken.*clinic0001.jpg: missing.*derm0050.jpg: missing"),
    "zero bytes": (lambda f: text_of(f / "images" / "derm0007.jpg", lambda b: b""), "derm0007.jpg: .*"),
    "folder for a photo": (lambda f: ((f / "images" / "derm0007.jpg").unlink(), (f / "images" / "derm0007.jpg").mkdir()),
                           "derm0007.jpg: Is a directory"),
    "link to itself": (lambda f: ((f / "images" / "derm0007.jpg").unlink(),
                                  (f / "images" / "derm0007.jpg").symlink_to("derm0007.jpg")), "derm0007.jpg: "),
    "truncated": (lambda f: text_of(f / "images" / "derm0007.jpg", lambda b: b[:len(b) // 2]), "1 photos.*\n.*derm0007.jpg: .*truncated"),
    "web page named .jpg": (lambda f: text_of(f / "images" / "clinic0003.jpg", lambda b: b"<html>please log in</html>"),
                            "1 photos.*\n.*clinic0003.jpg: cannot identify image file"),
    "bomb": (lambda f: Image.new("1", (14000, 14000)).save(f / "images" / "derm0007.jpg", "PNG"), "derm0007.jpg: .*exceeds limit"),
    "nothing to learn": (lambda f: rewrite(f / "meta" / "meta.csv", lambda rows: [
        row.__setitem__(rows[0].index("blue_whitish_veil"), "absent") for row in rows[1:]]), "task BWV has fewer than two classes"),
    "nothing known": (lambda f: rewrite(f / "meta" / "meta.csv", lambda rows: [
        row.__setitem__(rows[0].index("streaks"), "") for row in rows[1:]]), "task STR has fewer than two classes"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_spc_is_refused_in_a_clear_sentence(what, spc, tmp_path):
    damage, says = REFUSED[what]
    damage(spc)
    with pytest.raises(DataError, match=says):
        data.load(data.read(spc), 16, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*")), "a piece of a cache was left"


def marks(row, *columns):
    def change(rows):
        rows[row] = [rows[row][0], *("1.0" if name in columns else "0.0" for name in rows[0][1:])]
    return lambda f: rewrite(f / "MILK10k_Training_GroundTruth.csv", change)


REFUSED_ELSEWHERE = {
    "milk: two classes": (make_milk, marks(2, "BCC", "NV"), "IL_0000001 has 2 classes marked 1"),
    "milk: no class": (make_milk, marks(2), "IL_0000001 has 0 classes marked 1"),
    "milk: lesion without truth": (make_milk, lambda f: rewrite(f / "MILK10k_Training_GroundTruth.csv", lambda r: r.pop(2)),
                                   "IL_0000001 has 0 classes"),
    "milk: lesion twice": (make_milk, lambda f: rewrite(f / "MILK10k_Training_GroundTruth.csv", lambda r: r.append(r[2])),
                           "line 42: lesion IL_0000001 stands there twice"),
    "milk: no metadata": (make_milk, lambda f: (f / "MILK10k_Training_Metadata.csv").unlink(), "Metadata.csv: cannot be read"),
    "milk: missing photo": (make_milk, lambda f: next(f.rglob("ISIC_0000004.jpg")).unlink(), "ISIC_0000004.jpg: missing"),
    "isic: nothing decided": (make_isic, lambda f: rewrite(f / "metadata.csv", lambda r: [
        row.__setitem__(4, "Indeterminate") for row in r[1:]]), "no lesion with two photos and a label"),
    "isic: no pairs": (make_isic, lambda f: rewrite(f / "metadata.csv", lambda r: [
        row.__setitem__(3, "dermoscopic") for row in r[1:]]), "no lesion with two photos"),
    "isic: no diagnosis column": (make_isic, lambda f: rewrite(f / "metadata.csv", lambda r: r[0].__setitem__(4, "dx")),
                                  "no column diagnosis_1 or benign_malignant"),
    "isic: two diagnoses": (make_isic, lambda f: rewrite(f / "metadata.csv", lambda r: r[2].__setitem__(4, "Malignant")),
                            "line 2 and .*line 3: one lesion, but diagnosis_1 is 'Benign' and 'Malignant'"),
    "pairs: one class": (make_pairs, lambda f: rewrite(f / "pairs.csv", lambda r: [row.__setitem__(2, "a") for row in r[1:]]),
                         "column lesion: a task needs two classes; 1 in 40 rows"),
    "a column twice": (make_pairs, lambda f: rewrite(f / "pairs.csv", lambda r: [row.append(row[2]) for row in r]),
                       "two columns are called lesion"),
    "an open quotation mark": (make_pairs, lambda f: text_of(f / "pairs.csv", lambda b: b + b'"' + b"x" * 200_000),
                               "is a quotation mark left open"),
    "pairs: two columns without a name": (make_pairs, lambda f: rewrite(f / "pairs.csv", lambda r: [
        row.extend(["", ""] if n == 0 else ["a", "b"]) for n, row in enumerate(r)]), "two columns are called nothing"),
    "pairs: small classes": (lambda f: make_pairs(f, 16), lambda f: None, "or no class has 10"),
    "pairs: too few": (lambda f: make_pairs(f, 8), lambda f: None, "8 independent lesions are too few to split"),
    "pairs: a column of names": (make_pairs, lambda f: rewrite(f / "pairs.csv", lambda r: [
        row.append(f"name{n}") for n, row in enumerate(r)]), "column name0: 40 different values in 40 rows look like names"),
    "pairs: no labels": (make_pairs, lambda f: rewrite(f / "pairs.csv", lambda r: [row.pop() for row in r]), "no column of labels"),
    "pairs: strange split": (make_pairs, lambda f: rewrite(f / "pairs.csv", lambda r: [
        row.append("split" if n == 0 else "train" if n != 5 else "holdout") for n, row in enumerate(r)]), "line 6: split is 'holdout'"),
    "pairs: no split in the first row": (make_pairs, lambda f: rewrite(f / "pairs.csv", lambda r: [
        row.append("split" if n == 0 else "train" if n != 1 else "") for n, row in enumerate(r)]), "line 2: split is ''"),
    "pairs: half a split": (make_pairs, lambda f: rewrite(f / "pairs.csv", lambda r: [
        row.append("split" if n == 0 else "train" if n != 5 else "") for n, row in enumerate(r)]), "line 6: split is ''"),
    "pairs: no test": (make_pairs, lambda f: rewrite(f / "pairs.csv", lambda r: [
        row.append("split" if n == 0 else ("train", "valid")[n % 2]) for n, row in enumerate(r)]), "no lesion in test"),
    "two tables": (make_pairs, lambda f: shutil.copy(f / "pairs.csv", f / "more.csv"), "no release found"),
}


@pytest.mark.parametrize("what", REFUSED_ELSEWHERE)
def test_other_bad_releases_are_refused(what, tmp_path):
    make, damage, says = REFUSED_ELSEWHERE[what]
    damage(make(tmp_path / "release"))
    with pytest.raises(DataError, match=says):
        data.read(tmp_path / "release")


def test_unreadable_file_is_named(spc, monkeypatch):
    read_bytes = data.Path.read_bytes
    def refuse(path):
        if path.name == "meta.csv":
            raise PermissionError(errno.EACCES, "Permission denied")
        return read_bytes(path)
    monkeypatch.setattr(data.Path, "read_bytes", refuse)
    with pytest.raises(DataError, match="meta.csv: cannot be read .Permission denied."):
        data.read(spc)


# --------------------------------------------------------------------------------------------- strange input, read right


def lines(change):
    return lambda f: text_of(f / "meta" / "meta.csv", change)


READ_RIGHT = {
    "byte order mark": lines(lambda b: b"\xef\xbb\xbf" + b),
    "semicolons": lines(lambda b: b.replace(b",", b";")),
    "tabs": lines(lambda b: b.replace(b",", b"\t")),
    "blank rows": lines(lambda b: b"\r\n" + b.replace(b"\r\n", b"\r\n\r\n,,,,,,,,,,,,,,,,,,\r\n", 3) + b"\r\n\r\n"),
    "other line ends": lines(lambda b: b.replace(b"\r\n", b"\n")),
    "Latin-1": lambda f: (meta(1, "notes", "Läsion")(f), text_of(f / "meta" / "meta.csv", lambda b: b.decode().encode("latin-1"))),
    "upper case labels": lines(lambda b: b.replace(b"absent", b"Absent ").replace(b"nevus", b"NEVUS")),
    "wrong case in paths": lines(lambda b: b.replace(b"clinic00", b"CLINIC00").replace(b".jpg", b".JPG")),
    "photos' folder of wrong case": lambda f: ((f / "images").rename(f / "x"), (f / "images" / "Nel").mkdir(parents=True), [
        p.rename(f / "images" / "Nel" / p.name) for p in (f / "x").iterdir()], text_of(
            f / "meta" / "meta.csv", lambda b: b.replace(b",clinic0", b",NEL/clinic0").replace(b",derm0", b",nel/derm0"))),
    "folder above": lambda f: f.rename(f.parent / "inner") and (f.mkdir(), (f.parent / "inner").rename(f / "release_v0")),
}


@pytest.mark.parametrize("what", READ_RIGHT)
def test_strange_tables_are_read_right(what, spc):
    expected = data.read(spc)
    READ_RIGHT[what](spc)
    found = data.read(spc)
    assert (found.labels == expected.labels).all() and (found.split == expected.split).all()
    assert found.digests == expected.digests


def test_unknown_labels_are_left_out(spc):
    for n, text in enumerate(("", "nan", "NaN", "N/A", "unknown")):
        meta(n + 1, "streaks", text)(spc)
    found = data.read(spc)
    assert (found.labels[:5, 2] == -1).all() and any("5 labels are unknown" in note for note in found.notes)


def test_partial_release_is_accepted_with_warnings(spc):
    rewrite(spc / "meta" / "valid_indexes.csv", lambda rows: rows.pop())
    meta(1, "seven_point_score", "9")(spc)
    meta(2, "clinic", "derm0001.jpg")(spc)
    found = data.read(spc)
    text = "\n".join(found.notes)
    assert len(found.cases) == 59 and "WARNING: 1 rows of meta.csv are in no split" in text
    assert "WARNING: not the published derm7pt" in text and "seven_point_score is not what the criteria give in 1 rows" in text
    assert "in 1 cases the clinical photo is the dermoscopy file" in text


def test_duplicate_rows_are_reported(tmp_path):
    make_pairs(tmp_path)
    rewrite(tmp_path / "pairs.csv", lambda rows: rows.append(rows[1]))
    found = data.read(tmp_path)
    assert found.split[0] == found.split[40] and any("several lesions: 1 and 41" in note for note in found.notes)


# ------------------------------------------------------------------------------------------------------ decoding photos

COLOUR = (200, 100, 60)


def save_as(mode, **options):
    return lambda path: Image.new("RGB", (40, 30), COLOUR).convert(mode).save(path, **options)


def rotated(path):
    """Upright it is dark above and bright below; the file lies on its side, and its EXIF tag says so."""
    upright = Image.new("RGB", (30, 40), (20, 20, 20))
    upright.paste((220, 220, 220), (0, 20, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    upright.transpose(Image.Transpose.ROTATE_90).save(path, "JPEG", exif=exif)


PHOTOS = {  # file name, how it is written, the colour to be read; None: looked at in a test of its own
    "JPEG": ("a.jpg", save_as("RGB", quality=95), COLOUR),
    "PNG named .jpg": ("a.jpg", save_as("RGB", format="PNG"), COLOUR),
    "CMYK": ("a.jpg", save_as("CMYK", quality=95), COLOUR),
    "grey": ("a.jpg", save_as("L", quality=95), (125, 125, 125)),
    "palette": ("a.png", lambda path: Image.new("RGB", (9, 9), COLOUR).quantize(4).save(path), COLOUR),
    "transparent": ("a.png", lambda path: Image.new("RGBA", (9, 9), (*COLOUR, 0)).save(path), (255, 255, 255)),
    "half transparent": ("a.png", lambda path: Image.new("RGBA", (9, 9), (*COLOUR, 128)).save(path), (227, 177, 157)),
    "16 bits": ("a.png", lambda path: Image.fromarray(np.full((9, 9), 100 * 257, np.uint16)).save(path), (100, 100, 100)),
    "1 x 1": ("a.png", lambda path: Image.new("RGB", (1, 1), COLOUR).save(path), COLOUR),
    "20,000 wide": ("a.jpg", lambda path: Image.new("RGB", (20000, 30), COLOUR).save(path), COLOUR),
}


@pytest.mark.parametrize("kind", PHOTOS)
def test_photos_of_every_kind_are_read_right(kind, tmp_path):
    name, make, colour = PHOTOS[kind]
    make(tmp_path / name)
    found = data.decode(tmp_path / name, 16)
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - colour).max() <= 3, f"{found[8, 8]} instead of {colour}"


def test_exif_rotation_is_undone(tmp_path):
    rotated(tmp_path / "a.jpg")
    found = data.decode(tmp_path / "a.jpg", 16)
    assert found[:6].mean() < 40 and found[-6:].mean() > 200


@pytest.mark.parametrize("width", [300, 768, 1504, 3000])
def test_the_decoders_own_scaling_stays_within_a_grey_level(width, release, tmp_path):
    with Image.open(release / "images" / "derm0003.jpg") as image:
        image.resize((width, width * 2 // 3), Image.BICUBIC).save(tmp_path / "large.jpg", quality=90)
    with Image.open(tmp_path / "large.jpg") as image:
        exact = np.asarray(image.resize((96, 96), Image.BILINEAR), float)
    difference = np.abs(data.decode(tmp_path / "large.jpg", 96) - exact).mean()
    assert difference < 1, f"mean difference {difference:.2f} grey levels"


# ------------------------------------------------------------------------------------------------------------ the cache


def test_cache_is_decoded_once_and_found_by_content(spc, tmp_path, monkeypatch):
    decoded = []
    decode = data.decode
    monkeypatch.setattr(data, "decode", lambda path, size: decoded.append(path) or decode(path, size))
    found, cache = data.read(spc), tmp_path / "cache"
    pixels = data.load(found, 16, cache)
    assert isinstance(pixels, np.memmap) and pixels.shape == (60, 2, 16, 16, 3) and len(decoded) == 120
    for n in (0, 31):
        for side in (0, 1):
            assert (pixels[n, side] == decode(found.photos[n][side], 16)).all()
    assert (data.load(data.read(spc), 16, cache) == pixels).all() and len(decoded) == 120
    photo(spc / "images" / "derm0005.jpg", (1, 2, 3))  # the same name, another picture
    changed = data.load(data.read(spc), 16, cache)
    assert len(decoded) == 240 and changed[5, 1].max() < 9
    assert data.load(found, 20, cache).shape[2] == 20


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:99] + bytes([b[99] ^ 1]) + b[100:], lambda b: b""],
                         ids=["short", "one bit", "empty"])
def test_damaged_cache_is_decoded_again(damage, spc, tmp_path, capsys):
    found = data.read(spc)
    expected = np.array(data.load(found, 16, tmp_path))
    file, = tmp_path.glob("*.uint8")
    file.write_bytes(damage(file.read_bytes()))
    assert (data.load(found, 16, tmp_path) == expected).all() and "is damaged" in capsys.readouterr().err
    assert (data.load(found, 16, tmp_path) == expected).all() and "is damaged" not in capsys.readouterr().err


def test_killed_while_writing_leaves_no_cache_that_would_be_used(spc, tmp_path, monkeypatch):
    def die(source, target):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            data.load(data.read(spc), 16, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_full_disk_is_one_sentence(spc, tmp_path, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="cannot write the 0 MiB of decoded photos .No space left on device.; make room"):
        data.load(data.read(spc), 16, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_cache_folder_that_cannot_be_made(spc, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose another folder with --cache"):
        data.load(data.read(spc), 16, tmp_path / "file" / "cache")


# ----------------------------------------------------------------------------------------------- pairs and augmentation


def codes(n):
    """Photos that carry their number: clinical n has grey level 2 n in its left half, dermoscopy n in its right half."""
    pixels = torch.zeros(n, 2, 8, 8, 3, dtype=torch.uint8)
    for i in range(n):
        pixels[i, 0, :, :4], pixels[i, 1, :, 4:] = 2 * i + 1, 2 * i + 1
    return pixels


def test_a_pair_stays_a_pair_with_its_label(tmp_path):
    """Photos with a printed code, through the reader, the cache, shuffling and augmentation."""
    columns = ["clinical", "dermoscopy", "number"]
    for i in range(64):
        code = [255 * (i >> bit & 1) for bit in range(6)]  # six bars, black or white; the dermoscopy photo is blue
        for name, blue in (("c", 0), ("d", 255)):
            bars = np.zeros((48, 48, 3), np.uint8)
            bars[..., 0], bars[..., 2] = np.repeat(code, 8), blue
            Image.fromarray(bars).save(tmp_path / f"{name}{63 - i if name == 'd' else i}.png")
    write(tmp_path / "pairs.csv", columns, [(f"c{i}.png", f"d{63 - i}.png", i % 2) for i in range(64)])
    found = data.read(tmp_path)
    pixels = torch.from_numpy(data.load(found, 48, tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.MEAN, data.STD))
    rows = torch.randperm(64, generator=generator)
    for strength in (0.0, 1.0):
        clinical, dermoscopy = data.augment(pixels[rows], generator, strength)
        for n, row in enumerate(rows):
            c, d = clinical[n] * std + mean, dermoscopy[n] * std + mean
            assert c[2].mean() < 0.25 < d[2].mean() + 0.05, "clinical and dermoscopy changed places"
            if strength == 0:
                read = sum(int(c[0, 24, 8 * bit + 4] > 0.5) << bit for bit in range(6))
                assert read == row and read % 2 == found.labels[row, 0]
            if 0 < row < 63:  # the same bars at the same places: one geometry for both
                c, d = (x[0] > x[0].mean() for x in (c, d))
                assert (c == d).float().mean() > 0.97


def test_strength_zero_is_the_identity_and_normalisation_is_imagenets():
    pixels = torch.randint(0, 256, (5, 2, 16, 16, 3), dtype=torch.uint8)
    expected = data.normalise(pixels)
    for ours, theirs in zip(data.augment(pixels, torch.Generator(), 0.0), expected):
        close(ours, theirs, 1e-5)
    import torchvision.transforms.v2.functional as tv
    for side, ours in enumerate(expected):
        close(ours, tv.normalize(pixels[:, side].permute(0, 3, 1, 2) / 255, list(data.MEAN), list(data.STD)), 1e-6)


def test_augmentation_is_drawn_from_the_generator_alone():
    pixels = codes(20)
    one, again, other = (data.augment(pixels, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, again)) and not torch.equal(one[0], other[0])


def test_each_augmentation_of_the_paper_occurs():
    """Of 400 augmented copies of one pair: about half flipped, a quarter ... and brightness differs between the two photos."""
    corner = torch.full((1, 2, 32, 32, 3), 100, dtype=torch.uint8)
    corner[:, :, 4:12, 2:6] = 220  # an upright bar in the upper left
    copies = data.augment(corner.expand(400, -1, -1, -1, -1), torch.Generator().manual_seed(0))
    c, d = (x.mean(1) for x in copies)  # (400, 32, 32)
    base = [x.flatten(1).median(1).values for x in (c, d)]
    assert 0.4 < (base[0] == base[1]).float().mean() < 0.75 or (base[0] - base[1]).abs().max() > 0.1, "photometry is shared"
    for x in (c, d):
        level = x.flatten(1).median(1).values
        assert 0.3 < (level - level.median()).abs().gt(0.01).float().mean() < 0.7, "brightness or contrast"
    bright = (c > c.flatten(1).median(1).values[:, None, None] + 0.1).float()
    mass = bright.sum((1, 2)).clamp(min=1)
    place = torch.arange(32.0)
    y, x = (bright.sum(2) * place).sum(1) / mass, (bright.sum(1) * place).sum(1) / mass
    for share in ((y > 16).float().mean(), (x > 16).float().mean()):
        assert 0.35 < share < 0.65, "flips and quarter turns move the bar to any corner"
    assert mass.std() > 5, "scale"


# ------------------------------------------------------------------------------------------------------- synthetic SPC


def test_synthetic_lesions_are_seeded_whole_and_in_derm7pts_layout(release, tmp_path):
    again = data.synthesize(tmp_path / "again", cases=60, height=48)
    for path in sorted(release.rglob("*.*")):
        assert path.read_bytes() == (again / path.relative_to(release)).read_bytes(), path.name
    other = data.synthesize(tmp_path / "other", cases=60, height=48, seed=1)
    assert (release / "meta" / "meta.csv").read_bytes() != (other / "meta" / "meta.csv").read_bytes()
    assert data.read(release).kind == "synthetic"
    assert data.synthesize(release, cases=5) == release and len(list((release / "images").iterdir())) == 120


def test_two_runs_that_draw_at_once_do_no_harm(tmp_path, monkeypatch):
    rename = os.rename
    def late(source, target):  # the other one is faster
        monkeypatch.setattr(os, "rename", rename)
        data.synthesize(target, cases=12, height=32)
        rename(source, target)
    monkeypatch.setattr(os, "rename", late)
    data.synthesize(tmp_path / "spc", cases=12, height=32)
    assert [path.name for path in tmp_path.iterdir()] == ["spc"]


def test_synthetic_classes_are_about_as_frequent_as_published():
    rng = np.random.default_rng(0)
    signs = [data.invent_signs(rng) for _ in range(3000)]
    for task, (_, classes) in data.SPC.items():
        for name, (count, _) in classes.items():
            here, published = np.mean([s[task] == name for s in signs]), count / 1011
            assert published / 2 - 0.02 < here < 2 * published + 0.02, f"{task} {name}: {here:.3f}, published {published:.3f}"


def test_main_names_broken_photos_and_keeps_what_is_there(spc):
    text_of(spc / "images" / "derm0007.jpg", lambda b: b[:len(b) // 2])
    with pytest.raises(DataError, match="derm0007.jpg"):
        data.main([str(spc)])
    with pytest.raises(SystemExit):
        data.main([str(spc), "--synthesize", "20"])


def test_main_reports_and_draws_a_contact_sheet(release, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.main([str(release)])
    text = capsys.readouterr().out
    assert "synthetic, 60 lesions" in text and "lesions                  25      12      23      60" in text
    assert "72x48 (60)" in text
    with Image.open(tmp_path / "runs" / "spc-contact-sheet.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 1000
