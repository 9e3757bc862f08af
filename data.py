"""Data: a release of paired photos on disk becomes labelled, augmented pairs.

    release = read("release_v0")                   # any of the kinds below, found from its contents
    pixels = load(release, 224, "runs/cache")      # (N, 2, 224, 224, 3) uint8, decoded once, memory-mapped
    clinical, dermoscopy = augment(torch.from_numpy(pixels[rows]), generator)     # (B, 3, 224, 224) float, normalised

| kind    | what is read                                                                | tasks                           |
|---------|-----------------------------------------------------------------------------|---------------------------------|
| spc     | derm7pt: `meta/meta.csv`, `meta/{train,valid,test}_indexes.csv`, `images/`   | DIAG and the seven criteria     |
| milk10k | `*GroundTruth.csv`, `*Metadata.csv`, photos in any folder below              | DIAG, 11 classes or two         |
| isic    | an ISIC Archive download: `metadata.csv` and photos in any folder below      | DIAG, benign or malignant       |
| pairs   | one CSV: clinical, dermoscopy, one column a task; split, patient if known    | as the columns say              |

Without a published split, lesions are split 0.7 / 0.1 / 0.2 (paper, Sec. 4.2), stratified by the first task, always the
same way; lesions that share a patient or an identical file stay together. A label of -1 is unknown.

Run `python data.py PATH` to see what is in a release; `python data.py PATH --synthesize 1011` to draw a synthetic one.
"""
import argparse
import csv
import hashlib
import io
import math
import os
import re
import secrets
import shutil
import struct
import sys
import warnings
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from sklearn.model_selection import StratifiedGroupKFold
from torchvision.utils import make_grid

SPLITS = ("train", "valid", "test")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, in RGB: what the pretrained weights expect

# The Seven-Point Checklist: task -> column of meta.csv and class -> (cases in the published release, strings in the column).
# The order of tasks and classes is that of the paper's tables.
SPC = {
    "DIAG": ("diagnosis", {
        "BCC": (42, ["basal cell carcinoma"]),
        "NEV": (575, [f"{kind} nevus" for kind in
                      ("blue", "clark", "combined", "congenital", "dermal", "recurrent", "reed or spitz")]),
        "MEL": (252, ["melanoma", "melanoma (in situ)", "melanoma (less than 0.76 mm)", "melanoma (0.76 to 1.5 mm)",
                      "melanoma (more than 1.5 mm)", "melanoma metastasis"]),
        "MISC": (97, ["dermatofibroma", "lentigo", "melanosis", "miscellaneous", "vascular lesion"]),
        "SK": (45, ["seborrheic keratosis"])}),
    "PN": ("pigment_network", {"absent": (400, ["absent"]), "TYP": (381, ["typical"]), "ATP": (230, ["atypical"])}),
    "STR": ("streaks", {"absent": (653, ["absent"]), "REG": (107, ["regular"]), "IR": (251, ["irregular"])}),
    "PIG": ("pigmentation", {"absent": (588, ["absent"]), "REG": (118, ["diffuse regular", "localized regular"]),
                             "IR": (305, ["diffuse irregular", "localized irregular"])}),
    "RS": ("regression_structures", {"absent": (758, ["absent"]),
                                     "PRS": (253, ["blue areas", "white areas", "combinations"])}),
    "DaG": ("dots_and_globules", {"absent": (229, ["absent"]), "REG": (334, ["regular"]), "IR": (448, ["irregular"])}),
    "BWV": ("blue_whitish_veil", {"absent": (816, ["absent"]), "PRS": (195, ["present"])}),
    "VS": ("vascular_structures", {"absent": (823, ["absent"]),
                                   "REG": (117, ["arborizing", "comma", "hairpin", "within regression", "wreath"]),
                                   "IR": (71, ["dotted", "linear irregular"])}),
}
SYNTHETIC = "synthetic"  # what the column notes of a drawn release says
SPC_SPLIT = {"train": 413, "valid": 203, "test": 395}
PUBLISHED = "the published derm7pt: 413 / 203 / 395 cases, every label count as published"
# The seven-point rule: a point scores 2 (major) or 1 (minor); 3 or more in all suggest melanoma.
SEVEN_POINTS = {("PN", "ATP"): 2, ("BWV", "PRS"): 2, ("VS", "IR"): 2,
                ("STR", "IR"): 1, ("PIG", "IR"): 1, ("DaG", "IR"): 1, ("RS", "PRS"): 1}
MILK10K = ("AKIEC", "BCC", "BEN_OTH", "BKL", "DF", "INF", "MAL_OTH", "MEL", "NV", "SCCKA", "VASC")
MALIGNANT = ("AKIEC", "BCC", "MAL_OTH", "MEL", "SCCKA")  # of MILK10K; AKIEC holds precancers and in-situ carcinomas
TWO_CLASSES = {"DIAG": ("benign", "malignant")}
PHOTOS = (".jpg", ".jpeg", ".png")
METADATA = ("age", "age_approx", "sex", "skin_tone_class", "fitzpatrick_skin_type", "site", "anatom_site_general",
            "location", "elevation", "level_of_diagnostic_difficulty")  # kept for results by subgroup


class DataError(ValueError):
    """A release that cannot be read as it is; the message says what, where and what to do."""


@dataclass
class Release:
    """N lesions, each with two photos and a label per task."""
    kind: str  # spc, milk10k, isic or pairs
    tasks: dict  # task -> its class names; a class "absent", or the first of two, is the negative one
    cases: list  # N names
    photos: list  # N x (clinical path, dermoscopy path)
    labels: np.ndarray  # (N, T) int64, -1 unknown
    split: np.ndarray  # (N,) strings of SPLITS
    metadata: dict  # column of METADATA -> N strings
    notes: list  # what a user should know, warnings in capitals
    digests: list  # N x (clinical, dermoscopy): hashes of the files' contents

    def rows(self, split):
        return np.flatnonzero(self.split == split)

    def files(self, row):
        """The names of a lesion's two files by their contents, the same in any release."""
        return [each.hex() for each in self.digests[row]]

    def fingerprint(self):
        """A hash of all that a result depends on: photos, labels, tasks, split."""
        everything = repr((list(self.tasks.items()), self.digests, self.labels.tolist(), self.split.tolist()))
        return hashlib.blake2b(everything.encode(), digest_size=8).hexdigest()


@dataclass
class Lesion:
    """What a reader finds of one lesion."""
    case: str
    clinical: Path
    dermoscopy: Path
    labels: list  # one class number a task, -1 unknown
    row: dict  # of the table it comes from
    split: str = ""  # "": to be made
    patient: str = ""


def read(path, binary=False):
    """The Release at `path`, checked: every photo there, no patient or file in two splits.

    binary   MILK10k only: benign or malignant in place of the 11 classes
    Raises DataError with one clear sentence, or with a line a photo if photos are missing or broken.
    """
    path = Path(path).expanduser()
    if path.is_file():
        found = read_pairs(path)
    elif not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    elif (path / "meta" / "meta.csv").is_file():
        found = read_spc(path)
    elif (path / "release_v0" / "meta" / "meta.csv").is_file():
        found = read_spc(path / "release_v0")
    elif tables := sorted(path.glob("*GroundTruth.csv")):
        found = read_milk10k(path, tables[0], binary)
    elif (path / "metadata.csv").is_file():
        found = read_isic(path)
    elif len(tables := sorted(path.glob("*.csv"))) == 1:
        found = read_pairs(tables[0])
    else:
        raise DataError(f"{path}: no release found. It should hold meta/meta.csv (derm7pt), *GroundTruth.csv (MILK10k), "
                        "metadata.csv (ISIC Archive) or one CSV file of your own pairs")
    if binary and found[0] != "milk10k":
        raise DataError(f"{path}: --binary chooses between MILK10k's two sets of classes; this is {found[0]}")
    return check(*found, path)


# --------------------------------------------------------------------------------------------------------- the readers


def read_table(path, *required):
    """Rows of a CSV file as dicts from column name to text, and their place in the file under "where".

    UTF-8, with or without BOM, or Latin-1; commas, semicolons or tabs; blank rows skipped; column names in lower case, without
    the "meta.clinical." of old ISIC exports.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        text = text.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = text.decode("latin-1")
    delimiter = max(",;\t", key=text.split("\n", 1)[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    columns = [re.sub(r"^meta\..*\.", "", name.strip().lower()) for name in next(reader, [])]
    if twice := [name for name, count in Counter(columns).items() if count > 1]:
        raise DataError(f"{path}: two columns are called {', '.join(twice)}; rename one")
    if missing := [name for name in required if name not in columns]:
        raise DataError(f"{path}: no column {', '.join(missing)}; it has {', '.join(columns) or 'none'}")
    rows = []
    try:
        for values in reader:
            if any(value.strip() for value in values):
                if len(values) != len(columns):
                    raise DataError(f"{path} line {reader.line_num}: {len(values)} values for {len(columns)} columns")
                rows.append(dict(zip(columns, (value.strip() for value in values)), where=f"{path} line {reader.line_num}"))
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}; is a quotation mark left open?") from error
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def photo_index(folder):
    """Every file below `folder`: its relative path in lower case -> its path. Linked folders are entered, each once."""
    found, seen = {}, set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(parent) in seen:
            folders.clear()  # a link in a circle
            continue
        seen.add(os.path.realpath(parent))
        folders.sort()
        found |= {Path(parent, name).relative_to(folder).as_posix().lower(): Path(parent, name) for name in sorted(names)}
    return found


def locate(folder, index, name, where):
    """The file `name` below `folder`, whatever the case of its letters; if there is none, the path where it should be."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise DataError(f"{where}: {name!r} is not a path below {folder}")
    path = folder / name
    return path if path.is_file() else index.get(Path(name).as_posix().lower(), path)


EMPTY = ("", "nan", "na", "n/a")


def unknown(text):
    return text.lower() in (*EMPTY, "none", "unknown")


def read_spc(folder):
    """derm7pt: its own layout, its published splits."""
    table = folder / "meta" / "meta.csv"
    rows = read_table(table, "clinic", "derm", *(column for column, _ in SPC.values()))
    numbers = {column: {string: k for k, (_, strings) in enumerate(classes.values()) for string in strings} | {"": -1}
               for column, classes in SPC.values()}
    clean = [{column: "" if unknown(row[column]) else row[column].lower() for column in numbers} for row in rows]
    if strange := [f"{row['where']}, {column}: {row[column]!r}" for row, texts in zip(rows, clean) for column in numbers
                   if texts[column] not in numbers[column]]:
        raise DataError("labels that derm7pt does not have; correct them, or leave them empty for unknown:\n  " +
                        "\n  ".join(strange))
    tasks = {task: tuple(classes) for task, (_, classes) in SPC.items()}
    images, index = folder / "images", photo_index(folder / "images")
    lesions = [Lesion(row.get("case_num") or str(n), locate(images, index, row["clinic"], row["where"]),
                      locate(images, index, row["derm"], row["where"]),
                      [numbers[column][texts[column]] for column in numbers], row)
               for n, (row, texts) in enumerate(zip(rows, clean))]
    for split in SPLITS:
        for row in read_table(folder / "meta" / f"{split}_indexes.csv", "indexes"):
            number = int(row["indexes"]) if row["indexes"].isdigit() else len(rows)
            if number >= len(rows):
                raise DataError(f"{row['where']}: {row['indexes']!r} is no row number of meta.csv, 0 to {len(rows) - 1}")
            if lesions[number].split:
                raise DataError(f"{row['where']}: row {number} is in {lesions[number].split} already; splits may not overlap")
            lesions[number].split = split

    notes, labels = [], np.array([lesion.labels for lesion in lesions])
    if all(row.get("notes") == SYNTHETIC for row in rows):
        return "synthetic", tasks, lesions, [f"{len(lesions)} drawn lesions: numbers on them show the machinery, not the method"]
    published = {f"{task} {name}": count for task, (_, classes) in SPC.items() for name, (count, _) in classes.items()}
    here = {f"{task} {name}": int((labels[:, t] == k).sum()) for t, task in enumerate(SPC)
            for k, name in enumerate(SPC[task][1])}
    published |= {f"{split} cases": count for split, count in SPC_SPLIT.items()}
    here |= {f"{split} cases": sum(lesion.split == split for lesion in lesions) for split in SPLITS}
    if wrong := [f"{what} {here[what]} instead of {count}" for what, count in published.items() if here[what] != count]:
        notes.append(f"WARNING: not the published derm7pt, so not to be compared with the paper: {', '.join(wrong[:4])}" +
                     f" and {len(wrong) - 4} more counts differ" * (len(wrong) > 4))
    else:
        notes.append(PUBLISHED)
    if same := sum(lesion.clinical == lesion.dermoscopy for lesion in lesions):
        notes.append(f"in {same} cases the clinical photo is the dermoscopy file (published: 9); kept as published")
    wrong = [lesion.row["where"] for lesion in lesions if lesion.row.get("seven_point_score", "").isdigit()
             and int(lesion.row["seven_point_score"]) != seven_point_score(tasks, lesion.labels)]
    if wrong:
        notes.append(f"WARNING: seven_point_score is not what the criteria give in {len(wrong)} rows, first {wrong[0]}")
    if left := sum(not lesion.split for lesion in lesions):
        notes.append(f"WARNING: {left} rows of meta.csv are in no split and left out")
    return "spc", tasks, [lesion for lesion in lesions if lesion.split], notes


def seven_point_score(tasks, labels):
    return sum(points for (task, name), points in SEVEN_POINTS.items()
               if labels[list(tasks).index(task)] == tasks[task].index(name))


def read_milk10k(folder, table, binary):
    truth = {}
    for row in read_table(table, "lesion_id", *map(str.lower, MILK10K)):
        if truth.setdefault(row["lesion_id"], row) is not row:
            raise DataError(f"{row['where']}: lesion {row['lesion_id']} stands there twice; remove a row")
    lesions, notes = [], []
    for lesion_id, clinical, dermoscopy, row in pair_up(folder, table.with_name(table.name.replace("GroundTruth", "Metadata")), notes):
        hot = [k for k, name in enumerate(MILK10K) if truth.get(lesion_id, {}).get(name.lower(), "0") in ("1", "1.0")]
        if len(hot) != 1:
            raise DataError(f"{table}: lesion {lesion_id} has {len(hot)} classes marked 1 instead of one")
        label = int(MILK10K[hot[0]] in MALIGNANT) if binary else hot[0]
        lesions.append(Lesion(lesion_id, clinical, dermoscopy, [label], row, patient=row.get("patient_id", "")))
    return "milk10k", TWO_CLASSES if binary else {"DIAG": MILK10K}, lesions, notes


def read_isic(folder):
    """A download from the ISIC Archive, such as the paper's collected pairs (Sec. 4.2): benign or malignant."""
    lesions, notes, undecided = [], [], 0
    for lesion_id, clinical, dermoscopy, row in pair_up(folder, folder / "metadata.csv", notes):
        if not {"diagnosis_1", "benign_malignant"} & row.keys():
            raise DataError(f"{folder / 'metadata.csv'}: no column diagnosis_1 or benign_malignant; export it with the diagnosis")
        diagnosis = (row.get("diagnosis_1") or row.get("benign_malignant", "")).lower()
        if diagnosis not in TWO_CLASSES["DIAG"]:
            undecided += 1
            continue
        lesions.append(Lesion(lesion_id, clinical, dermoscopy, [TWO_CLASSES["DIAG"].index(diagnosis)], row,
                              patient=row.get("patient_id", "")))
    if undecided:
        notes.append(f"{undecided} lesions are neither benign nor malignant (indeterminate or not given) and left out")
    return "isic", TWO_CLASSES, lesions, notes


def pair_up(folder, table, notes):
    """(lesion_id, clinical path, dermoscopy path, row) of each lesion that has both photos, in the order of lesion_id.

    Of several photos of a type a close-up goes first, then the lowest isic_id. Images without lesion_id or of another type
    (TBP tiles) cannot be paired and are left out; `notes` says how many.
    """
    paths = defaultdict(list)
    for name, path in photo_index(folder).items():
        if name.endswith(PHOTOS):
            paths[Path(name).stem].append(path)
    rows = read_table(table, "isic_id", "lesion_id", "image_type")
    found = defaultdict(lambda: {"clinical": {}, "dermoscop": {}})
    for row in rows:
        kind = next((kind for kind in ("clinical", "dermoscop") if row["image_type"].lower().startswith(kind)), None)
        if kind and row["lesion_id"]:
            found[row["lesion_id"]][kind][row["image_type"].lower() != "clinical: close-up", row["isic_id"]] = row
    used = sum(len(images) for photos in found.values() for images in photos.values())
    if used < len(rows):
        notes.append(f"{len(rows) - used} of {len(rows)} images have no lesion_id, another image_type or a row already read; left out")
    pairs = {lesion: [images[min(images)] for images in photos.values()] for lesion, photos in sorted(found.items())
             if all(photos.values())}
    notes.append(f"{len(pairs)} of {len(found)} lesions have both photos; {used - 2 * len(pairs)} further photos are not used")
    for lesion, (clinical, dermoscopy) in pairs.items():
        files = [paths.get(row["isic_id"].lower(), [folder / f"{row['isic_id']}.jpg"]) for row in (clinical, dermoscopy)]
        for several in files:
            if len(several) > 1 and len(set(map(digest, several))) > 1:
                raise DataError(f"different photos have one name, keep one: {', '.join(map(str, several))}")
        for column in ("diagnosis_1", "benign_malignant", "patient_id"):
            if clinical.get(column) != dermoscopy.get(column):
                raise DataError(f"{clinical['where']} and {dermoscopy['where']}: one lesion, but {column} is "
                                f"{clinical[column]!r} and {dermoscopy[column]!r}")
        yield lesion, files[0][0], files[1][0], clinical | {key: value for key, value in dermoscopy.items() if value}


def read_pairs(table):
    """Your own pairs: columns clinical and dermoscopy (paths beside the CSV, or absolute), split and patient if known, any
    of METADATA, and every other column is a task whose values are its classes; empty is unknown."""
    rows = read_table(table, "clinical", "dermoscopy")
    for row in rows:
        if "patient_id" in row:
            row["patient"] = row.pop("patient_id")
    columns = [column for column in rows[0] if column not in ("clinical", "dermoscopy", "split", "patient", "where", *METADATA)]
    tasks = {}
    for column in columns:
        classes = sorted({row[column] for row in rows if row[column].lower() not in EMPTY}, key=lambda name: (name != "absent", name))
        if len(classes) < 2:
            raise DataError(f"{table}, column {column}: a task needs two classes; {len(classes)} in {len(rows)} rows. Add lesions, or remove it")
        if len(classes) > max(20, len(rows) // 10):
            raise DataError(f"{table}, column {column}: {len(classes)} different values in {len(rows)} rows look like names, not classes; "
                            "remove the column")
        tasks[column] = tuple(classes)
    if not tasks:
        raise DataError(f"{table}: no column of labels besides {', '.join(list(rows[0])[:-1])}")
    lesions, index = [], photo_index(table.parent)
    for n, row in enumerate(rows):
        split = {"val": "valid", "validation": "valid"}.get(row.get("split", "").lower(), row.get("split", "").lower())
        if split not in SPLITS and (split or lesions and lesions[0].split):
            raise DataError(f"{row['where']}: split is {row['split']!r}; write train, valid or test in every row, or in none")
        files = [Path(row[kind]) if Path(row[kind]).is_absolute() else locate(table.parent, index, row[kind], row["where"])
                 for kind in ("clinical", "dermoscopy")]
        lesions.append(Lesion(str(n + 1), *files, [classes.index(row[task]) if row[task] in classes else -1
                                                   for task, classes in tasks.items()], row, split, row.get("patient", "")))
    return "pairs", tasks, lesions, []


# ------------------------------------------------------------------------------------------------ one check for all kinds


def check(kind, tasks, lesions, notes, path):
    """Lesions become a Release: photos are all there, splits are made or checked, counts looked at."""
    if not lesions:
        raise DataError(f"{path}: no lesion with two photos and a label. {' '.join(notes)}")
    photos = [(lesion.clinical, lesion.dermoscopy) for lesion in lesions]
    with ThreadPoolExecutor() as threads:
        digests = list(threads.map(lambda pair: tuple(map(digest, pair)), photos))
    if any(None in pair for pair in digests):
        refuse_broken(photos)
    shared = defaultdict(list)  # what two lesions of different splits may not share -> the lesions that have it
    for n, lesion in enumerate(lesions):
        for key in {*digests[n], *([] if unknown(lesion.patient) else [("patient", lesion.patient)])}:
            shared[key].append(n)
    shared = {key: members for key, members in shared.items() if len(members) > 1}
    twins = [" and ".join(lesions[n].case for n in members) for key, members in shared.items() if isinstance(key, bytes)]
    if twins:
        notes.append(f"WARNING: {len(twins)} files are in several lesions: {'; '.join(twins[:5])}")
    labels = np.array([lesion.labels for lesion in lesions], np.int64)
    if lesions[0].split:
        split = np.array([lesion.split for lesion in lesions])
        for key, members in shared.items():
            if len({lesions[n].split for n in members}) > 1:
                what = f"patient {key[1]} is" if isinstance(key, tuple) else "one and the same image file is"
                problem = f"{path}: {what} in two splits: " + ", ".join(f"{lesions[n].row['where']} ({lesions[n].split})" for n in members)
                if PUBLISHED not in notes:
                    raise DataError(f"{problem}; move or remove a row")
                notes.append(f"WARNING: {problem}; kept as published")
    else:
        split = make_split(labels[:, 0], shared, path)
    if missing := [name for name in SPLITS if not (split == name).any()]:
        raise DataError(f"{path}: no lesion in {' and '.join(missing)}")
    for t, (task, classes) in enumerate(tasks.items()):
        counts = np.bincount(labels[split == "train", t] + 1, minlength=len(classes) + 1)[1:]
        if (counts > 0).sum() < 2:
            raise DataError(f"{path}: task {task} has fewer than two classes in the training split; nothing to learn")
        if not counts.all():
            notes.append(f"WARNING: {task} has no training case of {', '.join(c for c, n in zip(classes, counts) if not n)}")
    if (labels < 0).any():
        notes.append(f"{(labels < 0).sum()} labels are unknown and left out of loss and metrics")
    metadata = {column: [lesion.row.get(column, "") for lesion in lesions] for column in METADATA
                if any(lesion.row.get(column) for lesion in lesions)}
    return Release(kind, tasks, [lesion.case for lesion in lesions], photos, labels, split, metadata, notes, digests)


def make_split(classes, shared, path):
    """0.7 / 0.1 / 0.2 of the lesions (paper, Sec. 4.2) as ten stratified folds; what shares a patient or a file stays together."""
    group = np.arange(len(classes))
    for members in shared.values():
        group[np.isin(group, group[members])] = group[members].min()
    if len(set(group)) < 10 or np.bincount(classes + 1).max() < 10:
        raise DataError(f"{path}: {len(set(group))} independent lesions are too few to split, or no class has 10; give a column split")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # then a split has none of it, which check() says
        folds = StratifiedGroupKFold(10, shuffle=True, random_state=0).split(classes, classes, group)
        split = np.full(len(classes), "train")
        for fold, (_, rows) in enumerate(folds):
            split[rows] = ("test", "test", "valid", *["train"] * 7)[fold]
    return split


# ------------------------------------------------------------------------------------- photos: read once, kept as uint8


def digest(path):
    """Hash of the file's contents; None if it cannot be read or is empty."""
    try:
        contents = path.read_bytes()
    except OSError:
        return None
    return hashlib.blake2b(contents, digest_size=16).digest() if contents else None


def decode(path, size):
    """A photo as (size, size, 3) uint8 RGB: upright, resized to a square without cropping (paper, Sec. 4.1).

    A JPEG more than 4 times as large is first shrunk by its decoder, by 2, 4 or 8, never below twice the size. Transparent
    pixels become white, 16 bits are scaled to 8. Raises DataError.
    """
    try:
        with Image.open(path) as image:
            image.draft(None, (2 * size, 2 * size))
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image, np.float32) / 257).round().clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return np.asarray(image.convert("RGB").resize((size, size), Image.BILINEAR))
    except FileNotFoundError as error:
        raise DataError(f"{path}: missing") from error
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:  # what Pillow raises for bad files
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def refuse_broken(photos):
    """Raises DataError with a line for every photo that is missing or cannot be decoded, if there are any."""
    def look(path):
        try:
            decode(path, 8)
        except DataError as error:
            return str(error)
    with ThreadPoolExecutor() as threads:
        problems = [line for line in threads.map(look, sorted({path for pair in photos for path in pair})) if line]
    if problems:
        raise DataError(f"{len(problems)} photos are missing or broken; restore them or remove their rows:\n  " + "\n  ".join(problems))


@contextmanager
def whole(path):
    """A temporary path that becomes `path` if the block ends well and is removed if not: a file is whole or not there."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(release, size, cache):
    """All photos as (N, 2, size, size, 3) uint8, clinical first: a read-only memory map of a file in the folder `cache`.

    The file's name is a hash of the photos' contents, so a changed or added photo is decoded anew; it ends in a checksum; and
    it is renamed when complete, so that neither two runs at once nor a killed one leave half of it. Raises DataError.
    """
    key = hashlib.blake2b(f"{size} {PIL.__version__}".encode(), digest_size=8)
    key.update(b"".join(each for pair in release.digests for each in pair))
    path = Path(cache) / f"{release.kind}-{size}-{key.hexdigest()}.uint8"
    shape = (len(release.photos), 2, size, size, 3)
    if path.is_file():
        if path.stat().st_size == math.prod(shape) + 4:
            pixels = np.memmap(path, np.uint8, "c", shape=shape)
            if zlib.crc32(pixels).to_bytes(4, "big") == np.memmap(path, np.uint8, "r", math.prod(shape)).tobytes():
                return pixels
        print(f"{path} is damaged; the photos are decoded again", file=sys.stderr)
    checksum = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary, open(temporary, "wb") as file, ThreadPoolExecutor() as threads:
            for start in range(0, len(release.photos), 64):  # 64 pairs at a time bound the memory, whatever the release
                for photo in threads.map(lambda path: decode(path, size), sum(release.photos[start:start + 64], ())):
                    file.write(photo.data)
                    checksum = zlib.crc32(photo.data, checksum)
                progress("decoding photos", min(start + 64, len(release.photos)), len(release.photos))
            file.write(checksum.to_bytes(4, "big"))
            os.fsync(file.fileno())
    except DataError:
        refuse_broken(release.photos)
        raise  # it was broken then and is not now
    except OSError as error:
        raise DataError(f"{path}: cannot write the {math.prod(shape) / 2 ** 20:,.0f} MiB of decoded photos ({error.strerror}); "
                        "make room there or choose another folder with --cache") from error
    return np.memmap(path, np.uint8, "c", shape=shape)  # "c": torch wants it writable; nothing goes to the file


def progress(what, done, total):
    if sys.stderr.isatty():
        print(f"\r{what} {'#' * (30 * done // total):30} {done}/{total}", end="\n" if done == total else "", file=sys.stderr)


def normalise(pixels):
    """(B, 2, S, S, 3) pixels from 0 to 255 -> clinical, dermoscopy: (B, 3, S, S) float32, ImageNet's mean and deviation."""
    x = pixels.permute(1, 0, 4, 2, 3).float()  # (2, B, 3, S, S)
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return ((x - mean) / std).unbind(0)


def augment(pixels, generator, strength=1.0):
    """normalise(pixels) with the paper's augmentation (Sec. 4.1), the whole batch at once on the pixels' device.

    Both photos of a lesion share the flips, quarter turns, rotation, shift and scale; each has its own brightness and
    contrast. Each step happens with probability strength / 2 (0: none does); ranges are those of the authors' earlier public
    code, which gave brightness and contrast to the clinical photo alone. `generator` is on the CPU, the same for any device.
    """
    B, _, S = pixels.shape[:3]
    u = torch.rand((15, B), generator=generator).to(pixels.device)
    on, amount = (u[:6] < strength / 2).float(), 2 * u[6:] - 1  # (6, B) 0 or 1; (9, B) from -1 to 1
    flip_x, flip_y = 1 - 2 * on[0], 1 - 2 * on[1]
    turn = on[2] * (4 * u[6]).floor() * math.pi / 2 + on[3] * amount[1] * math.pi / 4  # quarter turns, and up to 45 degrees
    zoom = 1 + on[3] * amount[2] * 0.5
    shift = on[3] * amount[3:5] * 2 / 16  # of a side that goes from -1 to 1
    cos, sin = turn.cos() / zoom, turn.sin() / zoom
    theta = torch.stack((flip_x * cos, -flip_y * sin, shift[0], flip_x * sin, flip_y * cos, shift[1])).T.view(B, 2, 3)
    x = pixels.permute(0, 1, 4, 2, 3).reshape(B, 6, S, S).float()  # both photos as one image of six channels
    x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), padding_mode="reflection", align_corners=False)
    gain, offset = 1 + 0.2 * on[4:] * amount[5:7], 51 * on[4:] * amount[7:]  # (2, B) each; 51 = 0.2 of white
    x = (x.view(B, 2, 3, S, S) * gain.T.view(B, 2, 1, 1, 1) + offset.T.view(B, 2, 1, 1, 1)).clamp(0, 255)
    return normalise(x.permute(0, 1, 3, 4, 2))


# --------------------------------------------------------------------------------------------------- the synthetic SPC


def synthesize(folder, cases=1011, height=256, seed=0):
    """Draw a synthetic SPC in derm7pt's layout and label strings: photos of `height` x 1.5 `height` pixels.

    The seven criteria are drawn as a dermatologist would sketch them, and the diagnosis follows the seven-point rule with
    noise. The dermoscopy photo shows them sharply; the clinical photo shows the same lesion small, blurred, off-centre, in
    uneven light and behind hairs: it knows less. The folder appears whole or not at all; an existing one is kept.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    temporary = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.tmp")
    (temporary / "images").mkdir(parents=True)
    (temporary / "meta").mkdir()
    tasks = {task: tuple(classes) for task, (_, classes) in SPC.items()}

    def make(n):
        rng = np.random.default_rng([seed, n])
        signs = invent_signs(rng)
        for kind, photo in zip(("clinic", "derm"), draw_lesion(signs, rng, height)):
            Image.fromarray(photo).save(temporary / "images" / f"{kind}{n:04}.jpg", quality=92)
        row = {column: rng.choice(SPC[task][1][signs[task]][1]) for task, (column, _) in SPC.items()}
        score = seven_point_score(tasks, [tasks[task].index(signs[task]) for task in tasks])
        return {"case_num": n + 1, "seven_point_score": score, "sex": rng.choice(["female", "male"]),
                "clinic": f"clinic{n:04}.jpg", "derm": f"derm{n:04}.jpg", "notes": SYNTHETIC, **row}

    with ThreadPoolExecutor() as threads:
        rows = []
        for row in threads.map(make, range(cases)):
            rows.append(row)
            progress("drawing lesions", len(rows), cases)
    columns = ["case_num", "diagnosis", "seven_point_score", *(column for column, _ in list(SPC.values())[1:]),
               "level_of_diagnostic_difficulty", "elevation", "location", "sex", "management", "clinic", "derm", "case_id", "notes"]
    with open(temporary / "meta" / "meta.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    ends = [0, *(round(cases * end / 1011) for end in (413, 616, 1011))]  # the published shares
    for split, start, end in zip(SPLITS, ends, ends[1:]):
        (temporary / "meta" / f"{split}_indexes.csv").write_text("\n".join(["indexes", *map(str, range(start, end))]) + "\n")
    try:
        os.rename(temporary, folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(temporary)  # another run drew the same lesions at the same time and was faster
    return folder


def invent_signs(rng):
    """A class for each task of SPC, about as frequent as in the published release."""
    kind = rng.choice(["BCC", "SK", "MISC", "melanocytic"], p=np.array([42, 45, 97, 827]) / 1011)
    m = rng.beta(0.6, 1.1) if kind == "melanocytic" else 0.12  # how malignant it looks

    def sign(classes, irregular, regular):  # absent, the regular one if there are two, the irregular one
        p = min(1, irregular * m), min(1, regular * (1 - m))
        return rng.choice(classes, p=[1 - sum(p), p[0]] if len(classes) == 2 else [1 - sum(p), p[1], p[0]])

    signs = {"PN": sign(["absent", "TYP", "ATP"], 0.7, 0.75) if kind == "melanocytic" else "absent",
             "STR": sign(["absent", "REG", "IR"], 0.75, 0.2) if kind == "melanocytic" else "absent",
             "PIG": sign(["absent", "REG", "IR"], 0.85, 0.2), "RS": sign(["absent", "PRS"], 0.75, 0),
             "DaG": sign(["absent", "REG", "IR"], 1.0, 0.5), "BWV": sign(["absent", "PRS"], 0.5, 0),
             "VS": sign(["absent", "REG", "IR"], 0.2, 0.8 if kind == "BCC" else 0.1)}
    suspicious = sum(points for sign, points in SEVEN_POINTS.items() if signs[sign[0]] == sign[1]) >= 3
    melanoma = suspicious != (rng.random() < 0.06)
    return {"DIAG": kind if kind != "melanocytic" else "MEL" if melanoma else "NEV", **signs}


def draw_lesion(signs, rng, height):
    """(clinical, dermoscopy) photos, (height, 1.5 height, 3) uint8. Lengths are in units of the height."""
    H, W = shape = height, height * 3 // 2
    y, x = np.mgrid[:H, :W].astype(np.float32) / H

    def noise(scale):  # smooth, from -1 to 1, in blobs of that size
        coarse = rng.uniform(-1, 1, (round(1 / scale) + 2, round(1.5 / scale) + 2)).astype(np.float32)
        return np.asarray(Image.fromarray(coarse).resize((W, H), Image.BICUBIC))

    def ink(dots=(), lines=()):  # anti-aliased mask of dots (y, x, radius) and lines (points, width)
        mask = Image.new("L", (2 * W, 2 * H))
        for cy, cx, r in dots:
            ImageDraw.Draw(mask).ellipse([2 * H * each for each in (cx - r, cy - r, cx + r, cy + r)], fill=255)
        for points, width in lines:
            ImageDraw.Draw(mask).line([(2 * H * px, 2 * H * py) for py, px in points], 255, round(2 * H * width), "curve")
        return np.asarray(mask.resize((W, H), Image.BOX), np.float32) / 255

    def paint(mask, colour):
        image[...] += mask[..., None] * (np.asarray(colour, np.float32) - image)

    def walk(start, angle, steps, step, bend):  # the points of a wandering line
        turns = angle + np.cumsum(rng.normal(0, bend, steps))
        return np.add(start, step * np.cumsum([np.sin(turns), np.cos(turns)], axis=1).T).tolist()

    def inside(n, low=0.0, high=0.9):  # n random points of the lesion, from its centre 0 to its edge 1
        angle, r = rng.uniform(0, 2 * np.pi, n), 0.37 * np.sqrt(rng.uniform(low ** 2, high ** 2, n))
        return np.stack((cy + r * np.sin(angle), cx + r * np.cos(angle)), 1)

    def patch(size):  # a soft-edged, irregular area in the lesion
        (py, px), = inside(1, high=0.55)
        return lesion * np.clip(1.5 * np.exp(-((y - py) ** 2 + (x - px) ** 2) / size ** 2) + 0.45 * noise(0.1) - 0.4, 0, 1)

    # Skin and lesion: the outline is a circle with a few waves, stronger in an irregular lesion.
    kind = signs["DIAG"]
    cy, cx = 0.5 + rng.uniform(-0.04, 0.04), 0.75 + rng.uniform(-0.06, 0.06)
    angle, radius = np.arctan2(y - cy, x - cx), np.hypot(y - cy, x - cx)
    waves = rng.normal(0, 0.12 if "IR" in (signs["PIG"], signs["STR"]) else 0.05, 4)
    edge = rng.uniform(0.34, 0.42) * (1 + sum(w / k * np.cos(k * angle + rng.uniform(0, 6)) for k, w in enumerate(waves, 2)))
    depth = edge - radius  # > 0 inside
    lesion = np.clip(depth / (0.012 if kind == "SK" else 0.03) + 0.5, 0, 1)
    skin = np.array([232, 190, 170]) * rng.uniform(0.9, 1.04) + rng.normal(0, 4, 3)
    image = (skin + (7 * noise(0.3) + 3 * noise(0.03))[..., None]).astype(np.float32)
    brown = np.array({"BCC": (214, 150, 140), "SK": (150, 118, 92), "MISC": (186, 128, 112)}.get(kind, (168, 112, 78)))
    brown = brown * rng.uniform(0.88, 1.1) + rng.normal(0, 5, 3)
    paint(lesion * (0.8 + 0.12 * noise(0.15)), brown)

    if signs["PIG"] == "REG":  # one even, central shade; irregular: dark blotches off the centre
        paint(0.85 * np.clip((depth - 0.04) / 0.1, 0, 1), (122, 78, 22))
    if signs["PIG"] == "IR":
        for _ in range(3):
            paint(0.85 * patch(rng.uniform(0.05, 0.1)), (62, 36, 28))
    if signs["PN"] != "absent":  # a honeycomb of brown lines; atypical: wide, uneven, warped, broken
        typical = signs["PN"] == "TYP"
        warp, turn = 0.006 if typical else 0.035, rng.uniform(0, 1)
        u, v = x + warp * noise(0.12), y + warp * noise(0.12)
        mesh = sum(np.cos(2 * np.pi / (0.065 if typical else 0.085) * (u * np.cos(turn + t) + v * np.sin(turn + t)))
                   for t in (0, 2 * np.pi / 3, 4 * np.pi / 3))
        lines = np.clip((-0.35 - mesh + (0 if typical else 0.55 * noise(0.1))) / 0.5, 0, 1)
        fade = 0.6 * np.clip(depth / 0.1, 0, 1) if typical else 0.85 * np.clip(0.55 + 0.9 * noise(0.18), 0, 1)
        paint(lesion * lines * fade, brown * (0.5 if typical else 0.33))
    if signs["STR"] != "absent":  # radial lines at the edge, all round; irregular: in one or two places
        regular = signs["STR"] == "REG"
        angles = np.arange(0, 2 * np.pi, 0.21) if regular else rng.uniform(0, 0.9, 18) + np.repeat(rng.uniform(0, 6, 2), 9)
        rays = []
        for a in angles:
            r = edge[round(H * (cy + 0.35 * np.sin(a))), round(H * (cx + 0.35 * np.cos(a)))] - 0.05
            ends = r, r + (0.1 if regular else rng.uniform(0.08, 0.17))
            rays.append(([(cy + r * np.sin(a), cx + r * np.cos(a)) for r in ends], 0.016 if regular else 0.026))
        paint(0.9 * ink(lines=rays), brown * 0.4 if regular else (52, 32, 26))
    if signs["RS"] == "PRS":  # a scar-like white area, peppered with blue-grey
        area = patch(0.12)
        paint(0.85 * area, (236, 222, 216))
        paint(0.8 * np.clip(4 * area, 0, 1) * ink((*place, 0.005) for place in inside(400)), (112, 118, 136))
    if signs["DaG"] == "REG":  # even dots in rows; irregular: of all sizes, off the centre
        rows = [(0.08 * i, 0.08 * (j + i % 2 / 2)) for i in range(-4, 5) for j in range(-4, 5)]
        paint(0.9 * ink((cy + dy, cx + dx, 0.017) for dy, dx in rows if np.hypot(dy, dx) < 0.29), brown * 0.42)
    if signs["DaG"] == "IR":
        paint(0.95 * ink((*place, rng.choice([0.01, 0.018, 0.03, 0.038])) for place in inside(24, 0.4, 1.1)), (40, 26, 26))
    if signs["VS"] == "REG":  # branching red lines; irregular: red dots and short lines
        stems = [walk(place, rng.uniform(0, 6), 9, 0.04, 0.45) for place in inside(5)]
        twigs = [walk(stem[at], rng.uniform(0, 6), 3, 0.03, 0.3) for stem in stems for at in (2, 4)]
        paint(0.85 * ink(lines=[(stem, 0.016) for stem in stems] + [(twig, 0.01) for twig in twigs]), (190, 34, 48))
    if signs["VS"] == "IR":
        short = [(walk(place, rng.uniform(0, 6), 3, 0.03, 0.5), 0.018) for place in inside(9)]
        paint(0.9 * ink([(*place, rng.uniform(0.011, 0.017)) for place in inside(45)], short), (196, 30, 52))
    if signs["BWV"] == "PRS":
        paint(0.8 * patch(0.16), (96, 118, 160))
    if kind == "BCC":  # blue-grey ovoid nests
        paint(0.75 * ink((*place, rng.uniform(0.018, 0.04)) for place in inside(6, 0.4)), (92, 98, 122))
    if kind == "SK":  # milia-like cysts and comedo-like openings
        paint(0.9 * ink((*place, rng.uniform(0.009, 0.016)) for place in inside(30)), (248, 236, 200))
        paint(0.85 * ink((*place, rng.uniform(0.014, 0.024)) for place in inside(8)), (72, 48, 30))
    if kind == "MISC":  # a dermatofibroma's white centre
        paint(0.85 * np.clip(1.3 - radius / 0.13, 0, 1), (240, 226, 218))
    image += rng.normal(0, 3, image.shape)
    lens = np.clip((0.76 - np.hypot(y - 0.5, x - 0.75)) / 0.05, 0, 1)[..., None]
    dermoscopy = (image * (0.25 + 0.75 * lens)).clip(0, 255).astype(np.uint8)

    # The clinical photo: the lesion small, blurred and off-centre on skin, among what is on skin besides: freckles, redness, pen
    # marks, glare; then uneven light, hairs and grain.
    share = rng.uniform(0.42, 0.6)
    small = lambda photo, blur: Image.fromarray(photo).resize((round(W * share), round(H * share)), Image.BOX).filter(
        ImageFilter.GaussianBlur(blur * H))
    corner = round(W * rng.uniform(0.1, 0.9 - share)), round(H * rng.uniform(0.1, 0.9 - share))
    photo = Image.fromarray((skin * (1, 0.96, 0.93) + (9 * noise(0.25) + 6 * noise(0.02))[..., None]).clip(0, 255).astype(np.uint8))
    photo.paste(small(dermoscopy, 0.022), corner, small((215 * lesion).astype(np.uint8), 0.006))
    image, turn = np.array(photo, np.float32), rng.uniform(0, 6)
    middle = (corner[1] / H + share / 2, corner[0] / H + 0.75 * share)
    near = lambda n, spread: rng.normal(middle, spread, (n, 2)).tolist()
    for (py, px) in near(rng.integers(0, 6), 0.2):
        paint(rng.uniform(0.3, 0.6) * np.exp(-((y - py) ** 2 + (x - px) ** 2) / rng.uniform(0.05, 0.15) ** 2), (200, 70, 70))
    paint(0.7 * ink((*place, rng.uniform(0.006, 0.02)) for place in near(rng.integers(0, 40), 0.2)), (96, 58, 40))
    paint(0.6 * ink(lines=[(walk(place, rng.uniform(0, 6), 5, 0.04, 0.4), 0.012) for place in near(rng.integers(0, 6), 0.2)]), (72, 80, 150))
    paint(0.7 * ink((*place, rng.uniform(0.01, 0.03)) for place in near(rng.integers(0, 12), 0.12)), (250, 240, 236))
    image *= rng.uniform(0.85, 1.08) * (1 + 0.22 * ((y - 0.5) * np.sin(turn) + (x - 0.75) * np.cos(turn)))[..., None]
    hairs = [(walk(rng.uniform(0, (1, 1.5)), turn + rng.normal(0, 0.5), 7, 0.06, 0.25), 0.005) for _ in range(rng.integers(3, 15))]
    paint(0.7 * ink(lines=hairs), (70, 52, 44))
    return (image + rng.normal(0, 5, image.shape)).clip(0, 255).astype(np.uint8), dermoscopy


# ----------------------------------------------------------------------------------------------------------- the report


def contact_sheet(release, height=150):
    """A picture with, for each class of each task, one lesion: clinical beside dermoscopy, named, a task a row."""
    width, caption = 3 * height, 18
    cells = []
    columns = max(map(len, release.tasks.values()))
    for t, (task, classes) in enumerate(release.tasks.items()):
        for k in range(columns):
            cell = Image.new("RGB", (width, height + caption), "white")
            cells.append(cell)
            if k < len(classes):
                rows = np.flatnonzero(release.labels[:, t] == k)
                ImageDraw.Draw(cell).text((4, 3), f"{task} {classes[k]}: {len(rows)}", "black")
                for side, path in enumerate(release.photos[min(rows, key=lambda n: (release.labels[n] > 0).sum())] if len(rows) else ()):
                    cell.paste(Image.fromarray(decode(path, height)).resize((width // 2 - 2, height)), (side * width // 2, caption))
    grid = make_grid([torch.from_numpy(np.array(cell)).permute(2, 0, 1) for cell in cells], nrow=columns, padding=4, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def main(argv=None):
    parser = argparse.ArgumentParser(description="What is in a release of paired photos.")
    parser.add_argument("path", help="folder of a release, or the CSV file of your own pairs")
    parser.add_argument("--synthesize", type=int, metavar="N", help="first draw a synthetic SPC of N cases there")
    parser.add_argument("--binary", action="store_true", help="MILK10k: benign or malignant in place of the 11 classes")
    args = parser.parse_args(argv)
    if args.synthesize is not None:
        if args.synthesize < 10 or Path(args.path).exists():
            parser.error("--synthesize draws 10 lesions or more into a folder that does not exist yet")
        synthesize(args.path, args.synthesize)
    release = read(args.path, args.binary)
    refuse_broken(release.photos)
    print(f"{args.path}: {release.kind}, {len(release.cases)} lesions, two photos each")
    for note in release.notes:
        print(f"  {note}")
    if release.metadata:
        print(f"  columns for subgroups: {', '.join(release.metadata)}")
    if any(len(classes) == 2 for classes in release.tasks.values()):
        print("  of two classes the second is the positive one: " +
              ", ".join(f"{task} {classes[1]}" for task, classes in release.tasks.items() if len(classes) == 2))
    print(f"  {'task':6} {'class':12}" + "".join(f"{split:>8}" for split in SPLITS) + "     all")
    for t, (task, classes) in enumerate(release.tasks.items()):
        for k, name in enumerate(classes):
            counts = [int((release.labels[release.rows(split), t] == k).sum()) for split in SPLITS]
            print(f"  {task:6} {name:12}" + "".join(f"{count:8,}" for count in (*counts, sum(counts))))
    print(f"  {'lesions':19}" + "".join(f"{len(release.rows(split)):8,}" for split in SPLITS) + f"{len(release.cases):8,}")
    for side, kind in enumerate(("clinical", "dermoscopy")):
        sizes = Counter()
        for pair in release.photos:
            with Image.open(pair[side]) as image:
                sizes[image.size] += 1
        common = ", ".join(f"{w}x{h} ({n})" for (w, h), n in sizes.most_common(4))
        print(f"  {kind} photos: {len(sizes)} sizes, most often {common}")
    sheet = Path("runs") / f"{Path(args.path).resolve().stem}-contact-sheet.png"
    sheet.parent.mkdir(exist_ok=True)
    contact_sheet(release).save(sheet)
    print(f"  a lesion of every class, clinical and dermoscopy: {sheet}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"data.py: {error}")
