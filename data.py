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
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageOps, __version__ as PILLOW
from sklearn.model_selection import StratifiedGroupKFold

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
SPC_TASKS = {task: tuple(classes) for task, (_, classes) in SPC.items()}
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
EMPTY = ("", "nan", "na", "n/a")  # no label
METADATA = ("age", "age_approx", "sex", "skin_tone_class", "fitzpatrick_skin_type", "site", "anatom_site_general",
            "location", "elevation", "level_of_diagnostic_difficulty")  # kept for results by subgroup


class DataError(ValueError):
    """A release that cannot be read as it is; the message says what, where and what to do."""


def require(condition, otherwise):
    """Raises DataError with the sentence `otherwise` if the condition does not hold."""
    if not condition:
        raise DataError(otherwise)


def listed(texts, most=4):
    """The first few of the texts, and how many more there are."""
    return ", ".join(texts[:most]) + f" and {len(texts) - most} more" * (len(texts) > most)


@dataclass
class Release:
    """N lesions, each with two photos and a label per task."""
    kind: str  # spc, synthetic, milk10k, isic or pairs
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
    photos: list  # clinical path, dermoscopy path
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
    require(path.exists(), f"{path}: no such file or folder")
    readers = {"meta/meta.csv": read_spc, "release_v0/meta/meta.csv": read_spc, "*GroundTruth.csv": read_milk10k,
               "metadata.csv": read_isic, "*.csv": read_pairs}
    found = [(read_pairs, path)] if path.is_file() else [
        (reader, table) for pattern, reader in readers.items() for table in sorted(path.glob(pattern))]
    require(found and (len(found) == 1 or found[0][0] != read_pairs),
            f"{path}: no release found. It should hold meta/meta.csv (derm7pt), *GroundTruth.csv (MILK10k), "
            "metadata.csv (ISIC Archive) or one CSV file of your own pairs")
    reader, table = found[0]
    kind, tasks, lesions, notes = reader(table)
    require(kind == "milk10k" or not binary, f"{path}: --binary is for MILK10k, to choose its classes; this is {kind}")
    if binary:
        tasks = TWO_CLASSES
        for lesion in lesions:
            lesion.labels = [int(MILK10K[k] in MALIGNANT) for k in lesion.labels]
    return check(kind, tasks, lesions, notes, path)


# --------------------------------------------------------------------------------------------------------- the readers


def read_table(path, *required):
    """Rows of a CSV file as dicts from column name to text, and their place in the file under "where".

    UTF-8, with or without BOM, or Latin-1; commas, semicolons or tabs; blank rows skipped; column names in lower case,
    without the "meta.clinical." of old ISIC exports.
    """
    try:
        contents = path.read_bytes()
        text = contents.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = contents.decode("latin-1")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    delimiter = max(",;\t", key=text.lstrip("\r\n").split("\n", 1)[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        lines = [([value.strip() for value in values], f"{path} line {reader.line_num}") for values in reader]
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}; is a quotation mark left open?") from error
    (names, _), *lines = [line for line in lines if any(line[0])] or [([], "")]

    columns = [re.sub(r"^meta\..*\.", "", name.lower()) for name in names]
    twice = [name or "nothing" for name, count in Counter(columns).items() if count > 1]
    require(not twice, f"{path}: two columns are called {', '.join(twice)}; rename one")
    missing = ", ".join(name for name in required if name not in columns)
    require(not missing, f"{path}: no column {missing}; it has {', '.join(columns) or 'none'}")
    for values, where in lines:
        require(len(values) == len(columns), f"{where}: {len(values)} values for {len(columns)} columns")
    rows = [dict(zip(columns, values), where=where) for values, where in lines]
    require(rows, f"{path}: no rows")
    return rows


def photo_index(folder):
    """Every file below `folder`: its relative path in lower case -> its path. Linked folders are entered, each once."""
    found, seen = {}, set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (place := os.path.realpath(parent)) in seen:
            folders[:], names = [], []  # a link in a circle
        seen.add(place)
        folders.sort()
        found |= {Path(parent, name).relative_to(folder).as_posix().lower(): Path(parent, name) for name in sorted(names)}
    return found


def locate(folder, index, row, column, absolute=False):
    """The file a row names, below `folder` or absolute if that is allowed; of several that differ in the case of letters the
    exact one. If there is none, the path where it should be."""
    name = Path(row[column])
    require(row[column] and (absolute if name.is_absolute() else ".." not in name.parts),
            f"{row['where']}: {row[column]!r} is not a path below {folder}")
    path = folder / name
    return path if path.is_file() else index.get(name.as_posix().lower(), path)


def known(text):
    """The text; "" if all it says is that something is not known."""
    return "" if text.lower() in (*EMPTY, "none", "unknown") else text


def read_spc(table):
    """derm7pt: its own layout, its published splits."""
    rows = read_table(table, "clinic", "derm", *(column for column, _ in SPC.values()))
    numbers = {column: {"": -1} | {string: k for k, (_, strings) in enumerate(classes.values()) for string in strings}
               for column, classes in SPC.values()}  # column -> string -> label
    images = table.parent.parent / "images"
    lesions, strange, index = [], [], photo_index(images)
    for n, row in enumerate(rows):
        labels = [number.get(known(row[column]).lower()) for column, number in numbers.items()]
        strange += [f"{row['where']}, {column}: {row[column]!r}" for column, label in zip(numbers, labels) if label is None]
        photos = [locate(images, index, row, column) for column in ("clinic", "derm")]
        lesions.append(Lesion(row.get("case_num") or str(n), photos, labels, row))
    require(not strange, "\n  ".join(["labels derm7pt does not have; correct them, or leave unknown ones empty:", *strange]))

    for split in SPLITS:
        for row in read_table(table.with_name(f"{split}_indexes.csv"), "indexes"):
            where, number = row["where"], row["indexes"]
            require(number.isdecimal() and int(number) < len(rows),
                    f"{where}: {number!r} is no row number of meta.csv, 0 to {len(rows) - 1}")
            lesion = lesions[int(number)]
            require(not lesion.split, f"{where}: row {number} is in {lesion.split} already; splits may not overlap")
            lesion.split = split

    if all(row.get("notes") == SYNTHETIC for row in rows):
        note = f"{len(lesions)} drawn lesions: numbers on them show the machinery, not the method"
        return "synthetic", SPC_TASKS, lesions, [note]
    published = {f"{task} {name}": count for task, (_, classes) in SPC.items() for name, (count, _) in classes.items()}
    here = Counter(f"{lesion.split} cases" for lesion in lesions)
    for lesion in lesions:
        here.update(f"{task} {classes[k]}" for (task, classes), k in zip(SPC_TASKS.items(), lesion.labels) if k >= 0)
    published |= {f"{split} cases": count for split, count in SPC_SPLIT.items()}
    wrong = [f"{what} {here[what]} instead of {count}" for what, count in published.items() if here[what] != count]
    same = sum(lesion.photos[0] == lesion.photos[1] for lesion in lesions)
    scores = [lesion.row["where"] for lesion in lesions if lesion.row.get("seven_point_score", "").isdecimal()
              and int(lesion.row["seven_point_score"]) != seven_point_score(SPC_TASKS, lesion.labels)]
    left = sum(not lesion.split for lesion in lesions)
    notes = {
        PUBLISHED: not wrong,
        f"WARNING: not the published derm7pt, so not to be compared with the paper: {listed(wrong)}": wrong,
        f"in {same} cases the clinical photo is the dermoscopy file (published: 9); kept as published": same,
        f"WARNING: seven_point_score is not what the criteria give in {len(scores)} rows: {listed(scores)}": scores,
        f"WARNING: {left} rows of meta.csv are in no split and left out": left}
    return "spc", SPC_TASKS, [lesion for lesion in lesions if lesion.split], [note for note, holds in notes.items() if holds]


def seven_point_score(tasks, labels):
    return sum(SEVEN_POINTS.get((task, classes[k]), 0) for (task, classes), k in zip(tasks.items(), labels) if k >= 0)


def read_milk10k(table):
    hot = {}  # lesion -> the classes marked 1
    for row in read_table(table, "lesion_id", *map(str.lower, MILK10K)):
        require(row["lesion_id"] not in hot, f"{row['where']}: lesion {row['lesion_id']} stands there twice; remove a row")
        hot[row["lesion_id"]] = [k for k, name in enumerate(MILK10K) if row[name.lower()] in ("1", "1.0")]
    lesions, notes = pair_up(table.with_name(table.name.replace("GroundTruth", "Metadata")))
    for lesion in lesions:
        lesion.labels = hot.get(lesion.case, [])
        marked = len(lesion.labels)
        require(marked == 1, f"{table}: lesion {lesion.case} has {marked} classes marked 1 instead of one")
    return "milk10k", {"DIAG": MILK10K}, lesions, notes


def read_isic(table):
    """A download from the ISIC Archive, such as the paper's collected pairs (Sec. 4.2): benign or malignant."""
    lesions, notes = pair_up(table)
    for lesion in lesions:
        require({"diagnosis_1", "benign_malignant"} & lesion.row.keys(),
                f"{table}: no column diagnosis_1 or benign_malignant; export it with the diagnosis")
        diagnosis = lesion.row.get("diagnosis_1") or lesion.row.get("benign_malignant", "")
        lesion.labels = [k for k, name in enumerate(TWO_CLASSES["DIAG"]) if name == diagnosis.lower()]
    decided = [lesion for lesion in lesions if lesion.labels]
    if left := len(lesions) - len(decided):
        notes.append(f"{left} lesions are neither benign nor malignant (indeterminate or not given) and left out")
    return "isic", TWO_CLASSES, decided, notes


def pair_up(table):
    """A Lesion, still without labels, for each lesion_id of the table that has both photos, in order; and notes.

    Of several photos of a type a close-up goes first, then the lowest isic_id. Images without lesion_id or of another type
    (TBP tiles) cannot be paired and are left out; a note says how many.
    """
    rows = read_table(table, "isic_id", "lesion_id", "image_type")
    usable = [row for row in rows if row["lesion_id"] and row["image_type"].lower().startswith(("clinical", "dermoscop"))]
    first = defaultdict(dict)  # lesion -> "c" -> its clinical row, "d" -> its dermoscopy row
    for row in sorted(usable, key=lambda row: (row["image_type"].lower() != "clinical: close-up", row["isic_id"])):
        first[row["lesion_id"]].setdefault(row["image_type"][0].lower(), row)
    pairs = {case: (both["c"], both["d"]) for case, both in sorted(first.items()) if len(both) == 2}
    notes, further = [], len(usable) - 2 * len(pairs)
    if left := len(rows) - len(usable):
        notes.append(f"{left} of {len(rows)} images have no lesion_id or another image_type; left out")
    notes.append(f"{len(pairs)} of {len(first)} lesions have both photos; {further} further photos are not used")

    paths = defaultdict(list)
    for name, path in photo_index(table.parent).items():
        if name.endswith(PHOTOS):
            paths[Path(name).stem].append(path)

    def photo(row):
        several = paths.get(row["isic_id"].lower()) or [table.parent / f"{row['isic_id']}.jpg"]
        require(len(several) == 1 or len(set(map(digest, several))) == 1,
                f"different photos have one name, keep one: {', '.join(map(str, several))}")
        return several[0]

    lesions = []
    for case, (clinical, dermoscopy) in pairs.items():
        differ = [f"{column} is {clinical[column]!r} and {dermoscopy[column]!r}" for column in
                  ("diagnosis_1", "benign_malignant", "patient_id") if clinical.get(column) != dermoscopy.get(column)]
        require(not differ, f"{clinical['where']} and {dermoscopy['where']}: one lesion, but {listed(differ)}")
        row = clinical | {column: value for column, value in dermoscopy.items() if value}
        lesions.append(Lesion(case, (photo(clinical), photo(dermoscopy)), [], row, patient=row.get("patient_id", "")))
    return lesions, notes


def read_pairs(table):
    """Your own pairs: columns clinical and dermoscopy (paths beside the CSV, or absolute), split and patient if known, any
    of METADATA, and every other column is a task whose values are its classes; empty is unknown."""
    rows, tasks = read_table(table, "clinical", "dermoscopy"), {}
    others = ("clinical", "dermoscopy", "split", "patient", "patient_id", "where", *METADATA)
    for column in (column for column in rows[0] if column not in others):
        classes = {row[column] for row in rows if row[column].lower() not in EMPTY}
        place, n = f"{table}, column {column}", len(classes)
        require(n > 1, f"{place}: a task needs two classes; {n} in {len(rows)} rows. Add lesions, or remove it")
        most = max(20, len(rows) // 10)
        require(n <= most, f"{place}: {n} different values in {len(rows)} rows look like names, not classes; remove it")
        tasks[column] = tuple(sorted(classes, key=lambda name: (name != "absent", name)))
    require(tasks, f"{table}: no column of labels besides {', '.join(list(rows[0])[:-1])}")

    lesions, index = [], photo_index(table.parent)
    given = any(row.get("split") for row in rows)
    for n, row in enumerate(rows, 1):
        split = row.get("split", "").lower()
        split = {"val": "valid", "validation": "valid"}.get(split, split)
        require(split in SPLITS or not given,
                f"{row['where']}: split is {row.get('split')!r}; write train, valid or test in every row, or in none")
        photos = [locate(table.parent, index, row, column, absolute=True) for column in ("clinical", "dermoscopy")]
        labels = [classes.index(row[task]) if row[task] in classes else -1 for task, classes in tasks.items()]
        lesions.append(Lesion(str(n), photos, labels, row, split, row.get("patient_id", row.get("patient", ""))))
    return "pairs", tasks, lesions, []


# ------------------------------------------------------------------------------------------------ one check for all kinds


def check(kind, tasks, lesions, notes, path):
    """Lesions become a Release: photos are all there, splits are made or checked, counts looked at."""
    require(lesions, f"{path}: no lesion with two photos and a label. {' '.join(notes)}")
    photos = [tuple(lesion.photos) for lesion in lesions]
    digests = list(in_threads(lambda pair: tuple(map(digest, pair)), photos))
    if not all(map(all, digests)):
        refuse_broken(photos)
    labels, split = np.array([lesion.labels for lesion in lesions], np.int64), np.array([lesion.split for lesion in lesions])

    # What lesions of different splits may not share, a file's digest (bytes) or a patient -> the lesions that share it.
    shared = defaultdict(list)
    for n, lesion in enumerate(lesions):
        for key in {*digests[n], known(lesion.patient)}:
            shared[key].append(n)
    shared = {key: members for key, members in shared.items() if key and len(members) > 1}
    twins = [" and ".join(lesions[n].case for n in members) for key, members in shared.items() if isinstance(key, bytes)]
    if twins:
        notes.append(f"WARNING: {len(twins)} files are in several lesions: {listed(twins)}")

    if not lesions[0].split:
        split = make_split(labels[:, 0], list(shared.values()), path)
    for key, members in shared.items():
        if len(set(split[members])) > 1:
            what = "one and the same image file" if isinstance(key, bytes) else f"patient {key}"
            places = ", ".join(f"{lesions[n].row['where']} ({split[n]})" for n in members)
            problem = f"{path}: {what} is in two splits: {places}"
            require(PUBLISHED in notes, f"{problem}; move or remove a row")
            notes.append(f"WARNING: {problem}; kept as published")
    missing = " and ".join(name for name in SPLITS if name not in split)
    require(not missing, f"{path}: no lesion in {missing}")

    for (task, classes), column in zip(tasks.items(), labels[split == "train"].T):
        absent = [name for k, name in enumerate(classes) if k not in column]
        require(len(classes) - len(absent) > 1, f"{path}: task {task} has fewer than two classes in the training split")
        if absent:
            notes.append(f"WARNING: {task} has no training case of {', '.join(absent)}")
    if unlabelled := (labels < 0).sum():
        notes.append(f"{unlabelled} labels are unknown and left out of loss and metrics")
    metadata = {column: [lesion.row.get(column, "") for lesion in lesions] for column in METADATA}
    metadata = {column: values for column, values in metadata.items() if any(values)}
    return Release(kind, tasks, [lesion.case for lesion in lesions], photos, labels, split, metadata, notes, digests)


def make_split(classes, shared, path):
    """0.7 / 0.1 / 0.2 of the lesions (paper, Sec. 4.2) as ten stratified folds; the lesions of each list in `shared` stay
    together."""
    group = np.arange(len(classes))
    for members in shared:
        group[np.isin(group, group[members])] = group[members].min()
    groups = len(set(group))
    require(groups >= 10 and np.bincount(classes + 1).max() >= 10,
            f"{path}: {groups} independent lesions are too few to split, or no class has 10; give a column split")
    split = np.full(len(classes), "train")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class")  # then a split has none of it, which check() says
        folds = StratifiedGroupKFold(10, shuffle=True, random_state=0).split(classes, classes, group)
        for name, (_, rows) in zip(("test", "test", "valid"), folds):
            split[rows] = name
    return split


# ------------------------------------------------------------------------------------- photos: read once, kept as uint8


def in_threads(work, items, what=""):
    """work(item) of each item, in order; 128 at a time, which bounds the memory. With `what`, a terminal shows a bar."""
    total = len(items)
    with ThreadPoolExecutor() as threads:
        for start in range(0, total, 128):
            yield from threads.map(work, items[start:start + 128])
            done = min(start + 128, total)
            if what and sys.stderr.isatty():
                bar = f"{'#' * (30 * done // total):30}"
                print(f"\r{what} {bar} {done}/{total}", end="\n" * (done == total), file=sys.stderr)


def digest(path):
    """Hash of the file's contents; b"" if it cannot be read or is empty."""
    try:
        contents = path.read_bytes()
    except OSError:
        contents = b""
    return contents and hashlib.blake2b(contents, digest_size=16).digest()


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
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:  # what Pillow raises
        reason = "missing" if isinstance(error, FileNotFoundError) else getattr(error, "strerror", None) or error
        raise DataError(f"{path}: {reason}") from error


def refuse_broken(photos):
    """Raises DataError with a line for every photo that is missing or cannot be decoded, if there are any."""
    def problem(path):
        try:
            decode(path, 8)
        except DataError as error:
            return str(error)

    problems = [line for line in in_threads(problem, sorted({path for pair in photos for path in pair})) if line]
    title = f"{len(problems)} photos are missing or broken; restore them or remove their rows:"
    require(not problems, "\n  ".join([title, *problems]))


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
    """All photos as (N, 2, size, size, 3) uint8, clinical first: a memory map, read-only, of a file in `cache`.

    The file's name is a hash of the photos' contents, so a changed or added photo is decoded anew; it ends in a checksum;
    and it is renamed when complete, so that neither two runs at once nor a killed one leave half of it. Raises DataError.
    """
    contents = b"".join(each for pair in release.digests for each in pair)
    key = hashlib.blake2b(f"{size} {PILLOW}".encode() + contents, digest_size=8).hexdigest()
    path, shape = Path(cache) / f"{release.kind}-{size}-{key}.uint8", (len(release.photos), 2, size, size, 3)
    volume = 6 * size ** 2 * len(release.photos)  # bytes
    if path.is_file():
        if path.stat().st_size == volume + 4:
            stored = np.memmap(path, np.uint8, "c")
            if zlib.crc32(stored[:-4]) == int.from_bytes(stored[-4:], "big"):
                return stored[:-4].reshape(shape)
        print(f"{path} is damaged; the photos are decoded again", file=sys.stderr)

    checksum = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary, open(temporary, "wb") as file:
            photos = [path for pair in release.photos for path in pair]
            for photo in in_threads(lambda path: decode(path, size), photos, "decoding photos"):
                file.write(photo.data)
                checksum = zlib.crc32(photo.data, checksum)
            file.write(checksum.to_bytes(4, "big"))
            os.fsync(file.fileno())
    except DataError:
        refuse_broken(release.photos)
        raise  # it was broken then and is not now
    except OSError as error:
        raise DataError(f"{path}: cannot write the {volume / 2 ** 20:,.0f} MiB of decoded photos ({error.strerror}); "
                        "make room there or choose another folder with --cache") from error
    return np.memmap(path, np.uint8, "c", shape=shape)  # "c": torch wants it writable; nothing goes to the file


def normalise(pixels):
    """(B, 2, S, S, 3) pixels from 0 to 255 -> clinical, dermoscopy: (B, 3, S, S) float32, ImageNet's mean and deviation."""
    x = pixels.permute(1, 0, 4, 2, 3).float()  # (2, B, 3, S, S)
    mean, std = (torch.tensor(values, device=x.device).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return (x - mean).div_(std).unbind(0)


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
    turn = on[2] * (4 * u[6]).floor() * np.pi / 2 + on[3] * amount[1] * np.pi / 4  # quarter turns, and up to 45 degrees
    zoom = 1 + on[3] * amount[2] * 0.5
    shift = on[3] * amount[3:5] * 2 / 16  # of a side that goes from -1 to 1
    cos, sin = turn.cos() / zoom, turn.sin() / zoom
    theta = torch.stack((flip_x * cos, -flip_y * sin, shift[0], flip_x * sin, flip_y * cos, shift[1])).T.view(B, 2, 3)
    x = pixels.permute(0, 1, 4, 2, 3).reshape(B, 6, S, S).float()  # both photos as one image of six channels
    x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), padding_mode="reflection", align_corners=False)
    gain, offset = 1 + 0.2 * on[4:] * amount[5:7], 51 * on[4:] * amount[7:]  # (2, B) each; 51 = 0.2 of white
    x = x.view(B, 2, 3, S, S).mul_(gain.T.view(B, 2, 1, 1, 1)).add_(offset.T.view(B, 2, 1, 1, 1)).clamp_(0, 255)
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

    def make(n):
        rng = np.random.default_rng([seed, n])
        signs = invent_signs(rng)
        row = {"case_num": n + 1, "clinic": f"clinic{n:04}.jpg", "derm": f"derm{n:04}.jpg", "notes": SYNTHETIC}
        for kind, photo in zip(("clinic", "derm"), draw_lesion(signs, rng, height)):
            Image.fromarray(photo).save(temporary / "images" / row[kind], quality=92)
        row |= {column: rng.choice(classes[signs[task]][1]) for task, (column, classes) in SPC.items()}
        score = sum(SEVEN_POINTS.get(sign, 0) for sign in signs.items())
        return row | {"seven_point_score": score, "sex": rng.choice(["female", "male"])}

    columns = ["case_num", "diagnosis", "seven_point_score", *(column for column, _ in list(SPC.values())[1:]),
               "level_of_diagnostic_difficulty", "elevation", "location", "sex", "management", "clinic", "derm", "case_id",
               "notes"]
    with open(temporary / "meta" / "meta.csv", "w", newline="") as file:
        table = csv.DictWriter(file, columns, restval="")
        table.writeheader()
        table.writerows(in_threads(make, range(cases), "drawing lesions"))
    ends = [round(cases * end / 1011) for end in (413, 616)]  # the published shares
    for split, rows in zip(SPLITS, np.split(np.arange(cases), ends)):
        np.savetxt(temporary / "meta" / f"{split}_indexes.csv", rows, "%d", header="indexes", comments="")
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
    melanocytic = kind == "melanocytic"
    m = rng.beta(0.6, 1.1) if melanocytic else 0.12  # how malignant it looks
    signs = {"DIAG": kind}
    odds = {"PN": (0.75, 0.7), "STR": (0.2, 0.75), "PIG": (0.2, 0.85), "RS": (0, 0.75), "DaG": (0.5, 1.0), "BWV": (0, 0.5),
            "VS": (0.8 if kind == "BCC" else 0.1, 0.2)}  # of the regular class, if there is one, and of the irregular class
    for task, (regular, irregular) in odds.items():
        classes = SPC_TASKS[task]
        p = [min(1, regular * (1 - m)), min(1, irregular * m)][1 - len(classes):]
        signs[task] = rng.choice(classes, p=[1 - sum(p), *p]) if melanocytic or task not in ("PN", "STR") else "absent"
    suspicious = sum(SEVEN_POINTS.get(sign, 0) for sign in signs.items()) >= 3
    melanoma = suspicious != (rng.random() < 0.06)
    return signs | {"DIAG": "MEL" if melanoma else "NEV"} if melanocytic else signs


def draw_lesion(signs, rng, height):
    """(clinical, dermoscopy) photos, (height, 1.5 height, 3) uint8. Lengths are in units of the height."""
    H, W = height, height * 3 // 2
    y, x = np.mgrid[:H, :W].astype(np.float32) / H

    def noise(scale):  # smooth, from -1 to 1, in blobs of that size
        coarse = rng.uniform(-1, 1, (round(1 / scale) + 2, round(1.5 / scale) + 2)).astype(np.float32)
        return np.asarray(Image.fromarray(coarse).resize((W, H), Image.BICUBIC))

    def blob(place, size):  # 1 at the place, soft all around
        return np.exp(-((y - place[0]) ** 2 + (x - place[1]) ** 2) / size ** 2)

    def ink(dots=(), lines=()):  # anti-aliased mask of dots (y, x, radius) and lines (points, width)
        mask = Image.new("L", (2 * W, 2 * H))
        for cy, cx, r in dots:
            ImageDraw.Draw(mask).ellipse([2 * H * each for each in (cx - r, cy - r, cx + r, cy + r)], fill=255)
        for points, width in lines:
            ImageDraw.Draw(mask).line([(2 * H * px, 2 * H * py) for py, px in points], 255, round(2 * H * width), "curve")
        return np.asarray(mask.resize((W, H), Image.BOX), np.float32) / 255

    def dots(places, low, high):  # ink of dots with radii from low to high
        return ink((*place, rng.uniform(low, high)) for place in places)

    def walk(place, steps, step, bend, width, angle=None):  # a wandering line that starts there
        turns = (rng.uniform(0, 6) if angle is None else angle) + np.cumsum(rng.normal(0, bend, steps))
        return np.add(place, step * np.cumsum([np.sin(turns), np.cos(turns)], axis=1).T).tolist(), width

    def around(angle, r):  # points at these angles and distances from the lesion's centre
        return np.stack((cy + r * np.sin(angle), cx + r * np.cos(angle)), 1)

    def inside(n, low=0.0, high=0.9):  # n random points of the lesion, from its centre 0 to its edge 1
        return around(rng.uniform(0, 2 * np.pi, n), 0.37 * np.sqrt(rng.uniform(low ** 2, high ** 2, n)))

    def patch(size):  # a soft-edged, irregular area in the lesion
        return lesion * np.clip(1.5 * blob(*inside(1, high=0.55), size) + 0.45 * noise(0.1) - 0.4, 0, 1)

    def paint(mask, colour):
        image[...] += mask[..., None] * (np.asarray(colour, np.float32) - image)

    # Skin and lesion: the outline is a circle with a few waves, stronger in an irregular lesion.
    cy, cx = 0.5 + rng.uniform(-0.04, 0.04), 0.75 + rng.uniform(-0.06, 0.06)
    angle, radius = np.arctan2(y - cy, x - cx), np.hypot(y - cy, x - cx)
    waves = rng.normal(0, 0.12 if "IR" in (signs["PIG"], signs["STR"]) else 0.05, 4)
    edge = rng.uniform(0.34, 0.42) * (1 + sum(w / k * np.cos(k * angle + rng.uniform(0, 6)) for k, w in enumerate(waves, 2)))
    depth = edge - radius  # > 0 inside
    lesion = np.clip(depth / (0.012 if signs["DIAG"] == "SK" else 0.03) + 0.5, 0, 1)
    skin = np.array([232, 190, 170]) * rng.uniform(0.9, 1.04) + rng.normal(0, 4, 3)
    image = (skin + (7 * noise(0.3) + 3 * noise(0.03))[..., None]).astype(np.float32)
    browns = {"BCC": (214, 150, 140), "SK": (150, 118, 92), "MISC": (186, 128, 112)}
    brown = np.array(browns.get(signs["DIAG"], (168, 112, 78))) * rng.uniform(0.88, 1.1) + rng.normal(0, 5, 3)
    paint(lesion * (0.8 + 0.12 * noise(0.15)), brown)

    if signs["PIG"] == "REG":  # one even, central shade; irregular: dark blotches off the centre
        paint(0.85 * np.clip((depth - 0.04) / 0.1, 0, 1), (122, 78, 22))
    if signs["PIG"] == "IR":
        for _ in range(3):
            paint(0.85 * patch(rng.uniform(0.05, 0.1)), (62, 36, 28))
    if signs["PN"] != "absent":  # a honeycomb of brown lines; atypical: wide, uneven, warped, broken
        typical = signs["PN"] == "TYP"
        pitch, warp = (0.065, 0.006) if typical else (0.085, 0.035)
        turns = rng.uniform(0, 1) + np.array([0, 2 * np.pi / 3, 4 * np.pi / 3])
        u, v = x + warp * noise(0.12), y + warp * noise(0.12)
        mesh = sum(np.cos(2 * np.pi / pitch * (u * np.cos(turn) + v * np.sin(turn))) for turn in turns.tolist())
        lines = np.clip((-0.35 - mesh + (0 if typical else 0.55 * noise(0.1))) / 0.5, 0, 1)
        fade = 0.6 * np.clip(depth / 0.1, 0, 1) if typical else 0.85 * np.clip(0.55 + 0.9 * noise(0.18), 0, 1)
        paint(lesion * lines * fade, brown * (0.5 if typical else 0.33))

    if signs["STR"] != "absent":  # radial lines at the edge, all round; irregular: in one or two places
        regular = signs["STR"] == "REG"
        angles = np.arange(0, 2 * np.pi, 0.21) if regular else rng.uniform(0, 0.9, 18) + np.repeat(rng.uniform(0, 6, 2), 9)
        start = edge[tuple((H * around(angles, 0.35)).round().astype(int).T)] - 0.05
        end = start + (0.1 if regular else rng.uniform(0.08, 0.17, 18))
        width, colour = (0.016, brown * 0.4) if regular else (0.026, (52, 32, 26))
        paint(0.9 * ink(lines=[(ray, width) for ray in zip(around(angles, start), around(angles, end))]), colour)

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
        stems = [walk(place, 9, 0.04, 0.45, 0.016) for place in inside(5)]
        twigs = [walk(stem[at], 3, 0.03, 0.3, 0.01) for stem, _ in stems for at in (2, 4)]
        paint(0.85 * ink(lines=stems + twigs), (190, 34, 48))
    if signs["VS"] == "IR":
        short = [walk(place, 3, 0.03, 0.5, 0.018) for place in inside(9)]
        paint(0.9 * ink([(*place, rng.uniform(0.011, 0.017)) for place in inside(45)], short), (196, 30, 52))

    if signs["BWV"] == "PRS":
        paint(0.8 * patch(0.16), (96, 118, 160))
    if signs["DIAG"] == "BCC":  # blue-grey ovoid nests
        paint(0.75 * dots(inside(6, 0.4), 0.018, 0.04), (92, 98, 122))
    if signs["DIAG"] == "SK":  # milia-like cysts and comedo-like openings
        paint(0.9 * dots(inside(30), 0.009, 0.016), (248, 236, 200))
        paint(0.85 * dots(inside(8), 0.014, 0.024), (72, 48, 30))
    if signs["DIAG"] == "MISC":  # a dermatofibroma's white centre
        paint(0.85 * np.clip(1.3 - radius / 0.13, 0, 1), (240, 226, 218))

    image += rng.normal(0, 3, image.shape)
    lens = np.clip((0.76 - np.hypot(y - 0.5, x - 0.75)) / 0.05, 0, 1)[..., None]
    dermoscopy = (image * (0.25 + 0.75 * lens)).clip(0, 255).astype(np.uint8)

    def small(photo, blur):
        photo = Image.fromarray(photo.astype(np.uint8)).resize((round(W * share), round(H * share)), Image.BOX)
        return photo.filter(ImageFilter.GaussianBlur(blur * H))

    def near(n, spread=0.2):  # n random places around the small lesion
        return rng.normal((top / H + share / 2, left / H + 0.75 * share), spread, (n, 2)).tolist()

    # The clinical photo: the lesion small, blurred and off-centre on skin, among what is on skin besides: redness, freckles,
    # pen marks, glare; then uneven light, hairs and grain.
    share = rng.uniform(0.42, 0.6)
    left, top = round(W * rng.uniform(0.1, 0.9 - share)), round(H * rng.uniform(0.1, 0.9 - share))
    plain = skin * (1, 0.96, 0.93) + (9 * noise(0.25) + 6 * noise(0.02))[..., None]
    photo = Image.fromarray(plain.clip(0, 255).astype(np.uint8))
    photo.paste(small(dermoscopy, 0.022), (left, top), small(215 * lesion, 0.006))
    image, turn = np.array(photo, np.float32), rng.uniform(0, 6)
    for place in near(rng.integers(0, 6)):
        paint(rng.uniform(0.3, 0.6) * blob(place, rng.uniform(0.05, 0.15)), (200, 70, 70))
    paint(0.7 * dots(near(rng.integers(0, 40)), 0.006, 0.02), (96, 58, 40))
    paint(0.6 * ink(lines=[walk(place, 5, 0.04, 0.4, 0.012) for place in near(rng.integers(0, 6))]), (72, 80, 150))
    paint(0.7 * dots(near(rng.integers(0, 12), 0.12), 0.01, 0.03), (250, 240, 236))
    image *= rng.uniform(0.85, 1.08) * (1 + 0.22 * ((y - 0.5) * np.sin(turn) + (x - 0.75) * np.cos(turn)))[..., None]
    hairs = [walk(rng.uniform(0, (1, 1.5)), 7, 0.06, 0.25, 0.005, turn + rng.normal(0, 0.5))
             for _ in range(rng.integers(3, 15))]
    paint(0.7 * ink(lines=hairs), (70, 52, 44))
    return (image + rng.normal(0, 5, image.shape)).clip(0, 255).astype(np.uint8), dermoscopy


# ----------------------------------------------------------------------------------------------------------- the report


def contact_sheet(release, height=150):
    """A picture with, for each class of each task, one lesion: clinical beside dermoscopy, named, a task a row."""
    across, down = 3 * height + 4, height + 22  # from one cell to the next: two photos, a caption, a margin of 4
    size = max(map(len, release.tasks.values())) * across + 4, len(release.tasks) * down + 4
    sheet = Image.new("RGB", size, "white")
    for t, (task, classes) in enumerate(release.tasks.items()):
        for k, name in enumerate(classes):
            x, y, rows = k * across + 4, t * down + 4, np.flatnonzero(release.labels[:, t] == k)
            ImageDraw.Draw(sheet).text((x + 4, y + 3), f"{task} {name}: {len(rows)}", "black")
            if len(rows):
                plainest = min(rows, key=lambda row: (release.labels[row] > 0).sum())
                for side, path in enumerate(release.photos[plainest]):
                    photo = Image.fromarray(decode(path, height)).resize((3 * height // 2 - 2, height))
                    sheet.paste(photo, (x + side * 3 * height // 2, y + 18))
    return sheet


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
    if positive := [f"{task} {classes[1]}" for task, classes in release.tasks.items() if len(classes) == 2]:
        print(f"  of two classes the second is the positive one: {', '.join(positive)}")

    table = {f"{task:6} {name:12}": release.labels[:, t] == k
             for t, (task, classes) in enumerate(release.tasks.items()) for k, name in enumerate(classes)}
    table[f"{'lesions':19}"] = np.full(len(release.cases), True)
    print(f"  {'task':6} {'class':12}" + "".join(f"{split:>8}" for split in (*SPLITS, "all")))
    for name, rows in table.items():
        counts = [rows[release.rows(split)].sum() for split in SPLITS]
        print(f"  {name}" + "".join(f"{count:8,}" for count in (*counts, sum(counts))))

    for kind, paths in zip(("clinical", "dermoscopy"), zip(*release.photos)):
        sizes = Counter()
        for path in paths:
            with Image.open(path) as image:
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
