"""Data: a release of photos on disk becomes labelled, augmented batches.

    device = torch.device("cuda")
    generator = torch.Generator()                 # draws the augmentation; it is on the CPU
    release = read("release_v0", size=224)        # the kind of release is told by its files
    rows = release.rows("train")                  # (413,) the numbers of the training lesions
    batch = make_batch(release, rows[:24], device, generator)
    batch["clinical"], batch["dermoscopy"]        # (24, 3, 224, 224) each, augmented, normalised
    batch["labels"]                               # (24, 8) one class number for each task

The words of this file:
    release   pictures and tables, as people download them
    spot      a place on somebody's skin that was photographed
    photo     a clinical photo of a spot, or a dermoscopy photo, which was taken through a magnifier
    mask      an image that is white inside a spot and black elsewhere; only CLNet needs it
    picture   a photo or a mask
    view      what a picture is: "clinical", "dermoscopy" or "mask"
    lesion    one picture of each view, all of one spot, and what the tables say about them
    task      a question with a few classes: the diagnosis, the pigment network, ...
    word      a fact about the patient, like "sex male"; only MAT needs words

The first part is what the method needs: Release, normalise, augment, make_batch. It ends at
"Releases on disk". The second part is much longer: it finds out what is on disk. Skip it; come back
when a release of your own is not understood. `python data.py PATH` prints how one is.
"""

import argparse
import csv
import filecmp
import fnmatch
import glob
import hashlib
import io
import os
import shutil
import sys
import time
import unicodedata
import uuid
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from sklearn.model_selection import StratifiedGroupKFold

SPLITS = ("train", "valid", "test")
VIEWS = ("clinical", "dermoscopy")  # the views of photos; "mask" is the only other view
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of red, green, blue: what the pretrained encoders expect
IMAGENET_STD = (0.229, 0.224, 0.225)


class DataError(ValueError):
    """A release that cannot be used as it is: what is wrong, where, and what to do."""


@dataclass
class Release:
    """N lesions, each with V pictures and a label for each of T tasks.

    Pictures are resized to squares of S x S pixels without cropping (paper, Sec. 4.1).
    Where photos come one by one, like in HAM10000, each makes a lesion, and several may be of one
    spot. A lesion's number, 0 to N - 1, is its row in the tensors and its place in the lists.
    """

    pixels: torch.Tensor  # (N, V, S, S, 3) uint8 RGB; on a CPU read from disk when indexed
    views: tuple  # of the V pictures: ("clinical", "dermoscopy")
    labels: torch.Tensor  # (N, T) int64: the number of a class among those of its task; -1 unknown
    tasks: dict  # task -> names of its classes: {"DIAG": ("BCC", "NEV", "MEL", "MISC", "SK"), ...}
    split: np.ndarray  # (N,) "train", "valid" or "test"; "" in none of them

    # The rest is for MAT and for other files; skip it at first.
    words: torch.Tensor  # (N, m) int64: the numbers of the words about the patient
    vocabulary: list  # a word's number -> the word
    kind: str  # spc (derm7pt), synthetic, milk10k, isic, isic17, challenge, ham, pairs or one
    cases: list  # N names of the lesions, all different
    lesion_ids: list  # N names of the spots, as the tables call them; "" unknown
    patients: list  # N names; "" unknown
    invented_cases: set = field(default_factory=set)  # cases made of the pictures' names
    metadata: dict = field(default_factory=dict)  # column, "age" or "age_approx", ... -> N texts
    photo_hashes: np.ndarray = None  # (N, photos) texts, by which photos are recognised
    fingerprint: str = ""  # by which the release is recognised
    published: bool = False  # whether this is derm7pt with its published labels and split
    notes: list = field(default_factory=list)  # sentences for the user

    def rows(self, split):
        """Numbers of the lesions in "train", "valid" or "test": int64 (lesions,) on the CPU."""
        return torch.from_numpy(np.flatnonzero(self.split == split))

    def to(self, device):
        """The release with labels and words on the device, and pixels if they fit on a GPU."""
        pixels = self.pixels
        if device.type == "cuda":
            free_memory, _ = torch.cuda.mem_get_info(device)
            if pixels.nbytes < free_memory / 2:  # the other half is for the network
                pixels = pixels.to(device)
        labels = self.labels.to(device)
        return replace(self, pixels=pixels, labels=labels, words=self.words.to(device))


def normalise(photos):
    """Photos (B, 3, S, S) of 0 to 255 -> float32, scaled as the encoders' ImageNet photos were."""
    mean = torch.tensor(IMAGENET_MEAN, device=photos.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=photos.device).view(3, 1, 1)
    return (photos / 255 - mean) / std


def augment(pixels, views, generator):
    """The paper's augmentation (Sec. 4.1): flips, rotation, shift, brightness and contrast.

    pixels (B, V, S, S, 3) uint8 -> (B, V, 3, S, S) float32 of 0 to 255, on the same device. All
    random numbers come from `generator`, which is on the CPU. Each step has probability 1/2:
        flip along x: left and right change places
        flip along y: top and bottom change places
        rotation by 0, 90, 180 or 270 degrees
        rotation by up to 45 degrees, zoom by 0.5 to 1.5, and before them shift by up to 1/16 of
        the side
        contrast by 0.8 to 1.2, and brightness up or down by up to 0.2 of the range
    The pictures of a lesion move alike, but the last step is drawn for each photo. The paper gives
    no ranges: these are those of the authors' earlier code, FusionM4Net, which also zooms.
    """
    B, V, S = pixels.shape[:3]

    def coin(*shape):  # 0 or 1, each half of the time
        return torch.randint(0, 2, shape, generator=generator)

    def uniform(low, high, *shape):
        return torch.empty(shape).uniform_(low, high, generator=generator)

    # A picture reaches from -1 to 1 along x and y. Its side is 2 long, and 1/16 of that is 1/8.
    flip = 1 - 2.0 * coin(B, 2)  # for x and y: -1 mirrors, 1 does not
    quarter_turns = coin(B) * uniform(0, 4, B).floor()  # 0, 1, 2 or 3 of them
    angle = quarter_turns * torch.pi / 2
    is_moved = coin(B)  # for the rotation, zoom and shift that belong together
    angle = angle + is_moved * uniform(-torch.pi / 4, torch.pi / 4, B)
    zoom = 1 + is_moved * uniform(-0.5, 0.5, B)
    shift = is_moved.view(B, 1) * uniform(-1 / 8, 1 / 8, B, 2)

    # For each point of the new picture grid_sample needs the old point which gives it its colour:
    #     old point = rotation @ diag(flip) / zoom @ new point + shift
    # For example, with zoom 1.5, shift (0.1, 0) and nothing else the new point (0.6, 0) has the
    # colour of the old one (0.6 / 1.5 + 0.1, 0) = (0.5, 0): what was at 0.5 has gone to 0.6.
    # Beyond its edges the old picture is continued by its mirror image.
    cos, sin = angle.cos(), angle.sin()
    rotation = torch.stack((cos, -sin, sin, cos), 1).view(B, 2, 2)  # [[cos, -sin], [sin, cos]]
    matrix = rotation @ torch.diag_embed(flip) / zoom.view(B, 1, 1)  # (B, 2, 2)
    matrix = torch.cat((matrix, shift.view(B, 2, 1)), 2)  # (B, 2, 3), as affine_grid wants it

    x = pixels.permute(0, 1, 4, 2, 3)  # (B, V, 3, S, S)
    x = x.reshape(B, 3 * V, S, S).float()  # the pictures of a lesion move as one of 3V channels
    old_points = F.affine_grid(matrix.to(x.device), x.shape, align_corners=False)  # (B, S, S, 2)
    x = F.grid_sample(x, old_points, padding_mode="reflection", align_corners=False)
    x = x.view(B, V, 3, S, S)

    is_photo = torch.tensor([view != "mask" for view in views]).view(V, 1, 1, 1)
    is_recoloured = coin(B, V, 1, 1, 1) * is_photo  # (B, V, 1, 1, 1)
    contrast = 1 + is_recoloured * uniform(-0.2, 0.2, B, V, 1, 1, 1)
    brightness = 255 * is_recoloured * uniform(-0.2, 0.2, B, V, 1, 1, 1)
    x = x * contrast.to(x.device) + brightness.to(x.device)
    return x.clamp(0, 255)


def make_batch(release, rows, device, generator=None):
    """What a network and its loss read of the lesions with the numbers `rows` (B,), on the device.

    Returns a dict:
        "clinical", "dermoscopy"  (B, 3, S, S) float32, normalised, if the release has them
        "labels"                  (B, T) int64, -1 unknown
        "words"                   (B, m) int64, for MAT
        "mask"                    (B, 1, S, S) float32, 1 inside the spot, if the release has it
    With a generator the pictures are augmented. `rows` and the generator are on the CPU.
    """
    pixels = release.pixels[rows].to(device)  # (B, V, S, S, 3)
    if generator is None:
        pictures = pixels.permute(0, 1, 4, 2, 3)  # (B, V, 3, S, S)
    else:
        pictures = augment(pixels, release.views, generator)

    batch = {"labels": release.labels[rows].to(device), "words": release.words[rows].to(device)}
    for v, view in enumerate(release.views):
        if view == "mask":
            batch["mask"] = (pictures[:, v, :1] > 127.5).float()  # red, green and blue are equal
        else:
            batch[view] = normalise(pictures[:, v])
    return batch


# ==================================================================== Releases on disk
#
# The second part: from a folder to a Release. Nothing of it is needed to understand PEMM.
#
# Each kind of release has a reader. It reads the files with tables and returns a Catalogue of
# Lesions, which hold texts as they were found. For example, this CSV file
#
#     clinical,dermoscopy,split,diagnosis
#     a.jpg,b.jpg,Training,nevus
#
# has one Line, {"clinical": "a.jpg", "dermoscopy": "b.jpg", "split": "Training", ...}. It becomes a
# Lesion with the pictures {"clinical": "a.jpg", "dermoscopy": "b.jpg"}, the split "train" and the
# labels {"diagnosis": "nevus"}.
#
# From there on the kinds hardly differ. `read` finds and decodes the pictures, numbers labels and
# words, and makes or checks the split. A release that cannot be used is refused: a DataError says
# why. What a user should know becomes a note.
#
# Sections: tables; readers; pictures and their cache; labels and words; splits without a leak;
# read; other lesions than a run's own; drawn lesions; for the other files; what is in a release.

# Facts about a patient, column of a table -> fact. To give MAT a further word, add a line with the
# column in lower case. (A measurement needs bands, like those of `patient_word` for ages.) In an
# own CSV file that column is then no task any more, and a release that has it gets another
# fingerprint, so that runs from before do not belong to it.
# Of several columns for one fact the first here that is filled counts; the words have this order.
# Only what is known before the diagnosis belongs here: HAM10000's dx_type ("how was it
# confirmed?") gives the class away.
PATIENT_FACTS = {
    "age": "age",
    "age_approx": "age",
    "sex": "sex",
    "skin_tone_class": "skin_tone_class",
    "fitzpatrick_skin_type": "fitzpatrick_skin_type",
    "site": "site",
    "anatom_site_general": "site",
    "localization": "site",
    "location": "site",
    "anatom_site_1": "site",
    "anatom_site_2": "site",
    "anatom_site_3": "site",
}
# Results are printed for subgroups by all these columns, which are no tasks. The last two are
# experts' judgements of the spot and become no words.
METADATA = tuple(PATIENT_FACTS) + ("elevation", "level_of_diagnostic_difficulty")


def require(condition, message):
    if not condition:
        raise DataError(message)


def first_few(texts):
    """The first few of the texts, and how many there are."""
    shown = ", ".join(map(str, texts[:4]))
    return f"{shown} ({len(texts)} in all)"


def normalise_text(text):
    """The text as people compare it: capitals, spaces, Unicode form, a final .0 do not count."""
    parts = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(parts).removesuffix(".0")


# ------------------------------------------------------------------------------- Tables

# Cells with these texts, in capitals or not, count as empty. So none can be the name of a class.
UNKNOWN = ("?", "nan", "na", "n/a", "#n/a", "<na>", "null", "unknown")


class Line(dict):
    """A line of a CSV file: column in lower case -> text, "" if unknown."""

    where = ""  # file and number of the line, for messages


@dataclass
class Lesion:
    """What the tables say about a lesion. An empty text is unknown; no view or task is left out."""

    where: str  # file and line, for messages
    case: str  # its name, different from all others
    pictures: dict  # each view -> path below Catalogue.folder, or a file's name without its ending
    labels: dict = field(default_factory=dict)  # each task -> name of the class
    split: str = ""
    lesion_id: str = ""  # the name of its spot
    patient: str = ""
    about: dict = field(default_factory=dict)  # column of METADATA -> text, where it is known


@dataclass
class Catalogue:
    """What a reader returns."""

    kind: str
    folder: Path  # the pictures lie below it
    views: tuple
    tasks: dict  # task -> names of its classes
    lesions: list
    notes: list = field(default_factory=list)
    invented_cases: set = field(default_factory=set)  # cases made of the pictures' names

    def has_labels(self):
        return any(any(lesion.labels.values()) for lesion in self.lesions)


def check_columns(columns, required, path):
    """Refuses missing columns, two columns of one name, and characters that nobody sees."""
    names = [name for name in columns if name]
    missing = sorted(set(required) - set(names))
    require(not missing, f"{path}: no column {', '.join(missing)}; it has {', '.join(names)}")
    require(len(names) == len(set(names)), f"{path}: two columns of one name: {', '.join(names)}")
    for name in names:
        require(name.isprintable(), f"{path}: an invisible character in column {name!r}; retype it")


def read_csv(path, *required):
    """The Lines of a CSV file without the empty ones. It must have the required columns.

    Cells are separated by commas, semicolons or tabs, whichever the header has most of.
    """
    require(path.is_file(), f"{path} does not exist")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        advice = "save it as 'CSV UTF-8' in your spreadsheet program"
        raise DataError(f"{path}: cannot be read as a CSV file in UTF-8; {advice}") from error
    header, _, _ = text.lstrip().partition("\n")
    delimiter = max(",;\t", key=header.count)
    csv_lines = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    columns = []
    lines = []
    try:
        for cells in csv_lines:
            cells = [cell.strip() for cell in cells]
            while len(cells) > len(columns) and not cells[-1]:  # after a trailing comma
                cells.pop()
            if not any(cells):
                continue
            if not columns:
                columns = [name.lower() for name in cells]
                check_columns(columns, required, path)
                continue
            line = Line()
            line.where = f"{path} line {csv_lines.line_num}"
            counts = f"{len(cells)} values, but {len(columns)} in the header"
            require(len(cells) == len(columns), f"{line.where}: {counts}")
            for name, cell in zip(columns, cells):
                if name and not name.startswith("unnamed:"):  # pandas' numbers of lines
                    line[name] = "" if cell.lower() in UNKNOWN else cell
            lines.append(line)
    except csv.Error as error:
        advice = "a quotation mark is left open or stands inside a text; remove it"
        raise DataError(f"{path} line {csv_lines.line_num}: cannot be read; {advice}") from error
    require(lines, f"{path}: no lines below a header")
    return lines


def filled_cells(line):
    return {column: text for column, text in line.items() if text}


def about_patient(line):
    """What a Line says in the columns of METADATA, column -> text."""
    return {column: line[column] for column in METADATA if line.get(column)}


def only_one(paths):
    require(len(paths) == 1, f"several tables, name one as the path: {first_few(paths)}")
    return paths[0]


# ------------------------------------------------------------------------------ Readers
#
# A reader takes the paths of the tables that fit its pattern in READERS, and the root: the folder
# below which pictures and further tables lie. It returns a Catalogue.

# The Seven-Point Checklist: tasks in the order of the paper's tables, their columns in meta.csv.
SPC_COLUMNS = {
    "DIAG": "diagnosis",
    "PN": "pigment_network",
    "STR": "streaks",
    "PIG": "pigmentation",
    "RS": "regression_structures",
    "DaG": "dots_and_globules",
    "BWV": "blue_whitish_veil",
    "VS": "vascular_structures",
}
# For each class the texts in that column which mean it, in lower case as normalise_text makes them.
# The orders of tasks and classes matter: they give their numbers, on which PUBLISHED_SPC depends.
SPC_TEXTS = {
    "DIAG": {
        "BCC": ["basal cell carcinoma"],
        "NEV": [
            "blue nevus",
            "clark nevus",
            "combined nevus",
            "congenital nevus",
            "dermal nevus",
            "recurrent nevus",
            "reed or spitz nevus",
        ],
        "MEL": [
            "melanoma",
            "melanoma (in situ)",
            "melanoma (less than 0.76 mm)",
            "melanoma (0.76 to 1.5 mm)",
            "melanoma (more than 1.5 mm)",
            "melanoma metastasis",
        ],
        "MISC": ["dermatofibroma", "lentigo", "melanosis", "miscellaneous", "vascular lesion"],
        "SK": ["seborrheic keratosis"],
    },
    "PN": {"absent": ["absent"], "TYP": ["typical"], "ATP": ["atypical"]},
    "STR": {"absent": ["absent"], "REG": ["regular"], "IR": ["irregular"]},
    "PIG": {
        "absent": ["absent"],
        "REG": ["diffuse regular", "localized regular"],
        "IR": ["diffuse irregular", "localized irregular"],
    },
    "RS": {"absent": ["absent"], "PRS": ["blue areas", "white areas", "combinations"]},
    "DaG": {"absent": ["absent"], "REG": ["regular"], "IR": ["irregular"]},
    "BWV": {"absent": ["absent"], "PRS": ["present"]},
    "VS": {
        "absent": ["absent"],
        "REG": ["arborizing", "comma", "hairpin", "within regression", "wreath"],
        "IR": ["dotted", "linear irregular"],
    },
}
SPC_TASKS = {task: tuple(texts) for task, texts in SPC_TEXTS.items()}
# sha256 of the published labels and split, an int8 array (1011, 9) in the order of meta.csv. It
# tells derm7pt from any other table, a shuffled one included.
PUBLISHED_SPC = "6730bba642bdc2aa22b7e6244294d1a8b3c62dbff424ae3927454110b54887a6"

HAM10000_CLASSES = ("AKIEC", "BCC", "BKL", "DF", "MEL", "NV", "VASC")
ISIC17_TASKS = {"melanoma": ("absent", "present"), "seborrheic_keratosis": ("absent", "present")}
ISIC17_TEXTS = {"absent": ["0"], "present": ["1"]}  # 0.0 and 1.0 in the table


def class_meant(text, texts_of_classes):
    """The class that a text means, or the text itself: `number_labels` refuses it later."""
    for name, texts in texts_of_classes.items():
        if normalise_text(text) in texts:
            return name
    return text


def read_spc(paths, root):
    """derm7pt: meta/meta.csv has the labels, meta/{train,valid,test}_indexes.csv the split."""
    path = only_one(paths)
    lines = read_csv(path, "case_num", "clinic", "derm", *SPC_COLUMNS.values())
    is_drawn = lines[0].get("notes") == "synthetic"
    lesions = []
    for line in lines:
        pictures = {"clinical": line["clinic"], "dermoscopy": line["derm"]}
        if is_drawn:
            pictures["mask"] = Path(line["derm"]).stem + "_segmentation"
        lesion = Lesion(line.where, line["case_num"], pictures, about=about_patient(line))
        for task, column in SPC_COLUMNS.items():
            lesion.labels[task] = class_meant(line[column], SPC_TEXTS[task])
        lesions.append(lesion)

    for split in SPLITS:
        for line in read_csv(path.with_name(f"{split}_indexes.csv"), "indexes"):
            index = line["indexes"]
            is_index = index.isdecimal() and int(index) < len(lesions)
            require(is_index, f"{line.where}: {index!r} is no line of meta.csv, counted from 0")
            lesion = lesions[int(index)]
            is_free = not lesion.split
            require(is_free, f"{line.where}: {index!r} is in the split {lesion.split} already")
            lesion.split = split

    views = tuple(lesions[0].pictures)
    catalogue = Catalogue("spc", root / "images", views, SPC_TASKS, lesions)
    if is_drawn:
        catalogue.kind = "synthetic"
        catalogue.notes.append("drawn lesions: they show the machinery, not the method")
    return catalogue


def read_ham(paths, root):
    """HAM10000: a dermoscopy photo on each line; several may show one spot."""
    lesions = []
    for line in read_csv(only_one(paths), "lesion_id", "image_id", "dx"):
        image_id = line["image_id"]
        pictures = {"dermoscopy": image_id, "mask": f"{image_id}_segmentation"}
        lesion = Lesion(line.where, image_id, pictures, labels={"DIAG": line["dx"].upper()})
        lesion.lesion_id = line["lesion_id"]
        lesion.about = about_patient(line)
        lesions.append(lesion)
    return Catalogue("ham", root, ("dermoscopy", "mask"), {"DIAG": HAM10000_CLASSES}, lesions)


def paths_by_split(paths):
    """A challenge's tables, {"train": path, ...}; a single one gives no split: {"": path}."""
    if len(paths) == 1:
        return {"": paths[0]}
    path_of = {}
    for split, part in (("train", "Training"), ("valid", "Validation"), ("test", "Test")):
        for path in paths:
            if part in path.name:
                path_of[split] = path
    are_three = len(paths) == 3 and len(path_of) == 3
    advice = "give Training, Validation and Test, or name one table as the path"
    require(are_three, f"several tables; {advice}: {first_few(paths)}")
    return path_of


def read_isic17(paths, root):
    """The ISIC 2017 challenge: two tasks of two classes, and a mask for each photo."""
    lesions = []
    for split, path in paths_by_split(paths).items():
        for line in read_csv(path, "image_id", *ISIC17_TASKS):
            image_id = line["image_id"]
            pictures = {"dermoscopy": image_id, "mask": f"{image_id}_segmentation"}
            lesion = Lesion(line.where, image_id, pictures, split=split)
            for task in ISIC17_TASKS:
                lesion.labels[task] = class_meant(line[task], ISIC17_TEXTS)
            lesions.append(lesion)
    return Catalogue("isic17", root, ("dermoscopy", "mask"), ISIC17_TASKS, lesions)


def read_one_hot(path, id_column):
    """A table with a column for each class, 1 in the right one -> class names, {id: class name}."""
    lines = read_csv(path, id_column)
    no_classes = (id_column, "score_weight", "validation_weight")
    classes = [column.upper() for column in lines[0] if column not in no_classes]
    class_of = {}
    for line in lines:
        digits = [normalise_text(line[name.lower()]) for name in classes]
        is_one_hot = digits.count("1") == 1 and digits.count("0") == len(classes) - 1
        require(is_one_hot, f"{line.where}: needs a 1 for one class and 0 for all others")
        name = line[id_column]
        require(name not in class_of, f"{line.where}: {name} has a line already")
        class_of[name] = classes[digits.index("1")]
    return tuple(classes), class_of


def find_beside(path, root, ending):
    """The table with this ending of its name instead of "GroundTruth", or None."""
    name = path.name.replace("GroundTruth", ending)
    for folder in (path.parent, root, *sorted(root.iterdir())):
        if (folder / name).is_file():
            return folder / name
    return None


def view_of(line):
    """The view that a line of the ISIC Archive describes; None for "TBP tile: ..." and others."""
    image_type = line["image_type"].lower()
    if image_type.startswith("derm"):
        return "dermoscopy"
    if image_type.startswith("clinical"):
        return "clinical"
    return None


def describe_lesion(case, line_of):
    """The Lesion of one or two lines of the ISIC Archive, view -> line.

    Where two lines fill one column, the last counts.
    """
    lines = list(line_of.values())
    merged = {}
    for line in lines:
        merged.update(filled_cells(line))
    pictures = {view: line["isic_id"] for view, line in line_of.items()}
    lesion = Lesion(lines[0].where, case, pictures, about=about_patient(merged))
    lesion.lesion_id = merged.get("lesion_id", "")
    lesion.patient = merged.get("patient_id", "")
    return lesion


def pair_photos(lines):
    """The lesions of the spots with both photos, from lines of the ISIC Archive, one a photo.

    Of several photos of a view the one with the lowest isic_id is taken, but clinical close-ups go
    before other clinical photos. Returns also a note that says how many photos are not used.
    """
    in_order = sorted(lines, key=lambda line: line["isic_id"])
    in_order.sort(key=lambda line: line["image_type"].lower() != "clinical: close-up")
    lines_of = {"clinical": {}, "dermoscopy": {}}  # view -> lesion_id -> line
    for line in in_order:
        view = view_of(line)
        if view and line["lesion_id"]:
            lines_of[view].setdefault(line["lesion_id"], line)
    lesions = []
    for lesion_id, dermoscopy in sorted(lines_of["dermoscopy"].items()):
        clinical = lines_of["clinical"].get(lesion_id)
        if clinical:
            line_of = {"clinical": clinical, "dermoscopy": dermoscopy}
            lesions.append(describe_lesion(lesion_id, line_of))
    unused = len(lines) - 2 * len(lesions)
    return lesions, f"{len(lesions)} lesions with clinical and dermoscopy; {unused} photos unused"


def read_milk10k_photos(paths, root):
    """MILK10k's blind test lesions: `*Metadata.csv` without a ground truth."""
    lesions, note = pair_photos(read_csv(only_one(paths), "lesion_id", "image_type", "isic_id"))
    return Catalogue("milk10k", root, ("clinical", "dermoscopy"), {}, lesions, [note])


def read_labelled_milk10k(path, root):
    """MILK10k: `*GroundTruth.csv` has the classes, `*Metadata.csv` names the photos."""
    classes, class_of = read_one_hot(path, "lesion_id")
    metadata = find_beside(path, root, "Metadata")
    require(metadata, f"{path}: the table with Metadata instead of GroundTruth is missing")
    catalogue = read_milk10k_photos([metadata], root)
    catalogue.tasks = {"DIAG": classes}
    for lesion in catalogue.lesions:
        lesion.labels["DIAG"] = class_of.pop(lesion.case, "")
    if class_of:
        cases = first_few(list(class_of))
        catalogue.notes.append(f"WARNING: in the ground truth, but without two photos: {cases}")
    return catalogue


def read_details(path, root):
    """What the tables beside a challenge's ground truth say: image -> column -> text."""
    details_of = defaultdict(dict)
    for ending in ("LesionGroupings", "Metadata"):
        other = find_beside(path, root, ending)
        if other:
            for line in read_csv(other, "image"):
                details_of[line["image"]].update(filled_cells(line))
    return details_of


def read_ground_truth(paths, root):
    """One-hot tables: of MILK10k or, with a dermoscopy photo on each line, ISIC 2018 and 2019."""
    if "lesion_id" in read_csv(paths[0])[0]:
        return read_labelled_milk10k(only_one(paths), root)
    lesions = []
    tasks = {}
    for split, path in paths_by_split(paths).items():
        classes, class_of = read_one_hot(path, "image")
        are_same = not tasks or tasks["DIAG"] == classes
        require(are_same, f"tables of different classes: {first_few(paths)}")
        tasks["DIAG"] = classes
        details_of = read_details(path, root)
        for image, name in class_of.items():
            lesion = Lesion(f"{path} {image}", image, {"dermoscopy": image}, split=split)
            lesion.labels["DIAG"] = name
            lesion.lesion_id = details_of[image].get("lesion_id", "")
            lesion.about = about_patient(details_of[image])
            lesions.append(lesion)
    return Catalogue("challenge", root, ("dermoscopy",), tasks, lesions)


ISIC_CLASSES = ("benign", "malignant")


def diagnoses_of(line):
    """What a line of the ISIC Archive says, of: benign, malignant, indeterminate.

    Old exports have a column benign_malignant, new ones diagnosis_1 to diagnosis_5; the first two
    begin with one of these words, like "Malignant melanocytic proliferations (Melanoma)".
    """
    diagnoses = set()
    for column in ("benign_malignant", "diagnosis_1", "diagnosis_2"):
        first_word, _, _ = line.get(column, "").lower().partition(" ")
        if first_word in ISIC_CLASSES or first_word == "indeterminate":
            diagnoses.add(first_word)
    return diagnoses


def read_isic(paths, root):
    """A download of the ISIC Archive (paper, Sec. 4.2): is a spot benign or malignant?

    Spots with both photos are read; if no photo is clinical, dermoscopy photos one by one.
    """
    path = only_one(paths)
    lines = read_csv(path, "isic_id", "image_type")
    num_photos = Counter(view_of(line) for line in lines)
    if num_photos["clinical"]:
        views = ("clinical", "dermoscopy")
        require("lesion_id" in lines[0], f"{path}: no column lesion_id to pair the photos")
        lesions, note = pair_photos(lines)
        notes = [note]
        unpaired = num_photos["dermoscopy"] - len(lesions)
        if unpaired:
            advice = "to read all dermoscopy photos, remove the lines of clinical ones"
            notes.append(f"WARNING: {unpaired} dermoscopy photos are in no pair; {advice}")
    else:
        views = ("dermoscopy",)
        lesions = []
        for line in lines:
            if view_of(line) == "dermoscopy":
                lesions.append(describe_lesion(line["isic_id"], {"dermoscopy": line}))
        unused = len(lines) - len(lesions)
        notes = [f"{len(lesions)} lesions with dermoscopy; {unused} photos unused"]

    diagnoses_by_name = defaultdict(set)  # lesion_id or, without one, isic_id -> what its lines say
    for line in lines:
        name = line.get("lesion_id") or line["isic_id"]
        diagnoses_by_name[name].update(diagnoses_of(line))
    contradictory = []
    for lesion in lesions:
        diagnoses = diagnoses_by_name[lesion.lesion_id or lesion.case]
        lesion.labels["DIAG"] = ""
        if len(diagnoses) > 1:
            contradictory.append(lesion.case)
        for name in ISIC_CLASSES:
            if diagnoses == {name}:
                lesion.labels["DIAG"] = name
    if contradictory:
        cases = first_few(contradictory)
        notes.append(f"WARNING: contradictory diagnoses, read as unknown: {cases}")
    return Catalogue("isic", root, views, {"DIAG": ISIC_CLASSES}, lesions, notes)


OTHER_SPLIT_NAMES = {"training": "train", "val": "valid", "validation": "valid", "testing": "test"}


def classes_of(column, lesions, path):
    """The class names that a column holds, sorted; "absent" first, for that is the negative one."""
    names = sorted({lesion.labels[column] for lesion in lesions} - {""})
    normalised = set(map(normalise_text, names))
    message = f"classes that differ only in capitals, spaces or .0: {first_few(names)}"
    require(len(names) == len(normalised), f"{path}, column {column}: {message}")
    if "absent" in names:
        names.remove("absent")
        names.insert(0, "absent")
    return tuple(names)


def filled_columns(lines):
    """The columns in which any line has a text, in their order."""
    filled = set()
    for line in lines:
        filled.update(filled_cells(line))
    return [column for column in lines[0] if column in filled]


def read_pairs(paths, root):
    """An own CSV file: columns of pictures, case, split, lesion_id, patient, and METADATA.

    Every other column is a task, and its texts are the classes. A column without any text is left
    out. A lesion without a case gets one, made of its pictures' names.
    """
    path = only_one(paths)
    lines = read_csv(path)
    columns = filled_columns(lines)
    views = tuple(view for view in (*VIEWS, "mask") if view in columns)
    has_photo = set(columns) & set(VIEWS)
    names = f"no column {' or '.join(VIEWS)} with photos; it has {', '.join(columns)}"
    require(has_photo, f"{path}: {names}")
    fact_columns = [column for column in columns if column in METADATA]
    no_tasks = (*views, *fact_columns, "case", "split", "lesion_id", "patient", "patient_id")
    task_columns = [column for column in columns if column not in no_tasks]

    lesions = []
    invented_cases = set()
    for line in lines:
        pictures = {view: line[view].replace("\\", "/") for view in views}
        lesion = Lesion(line.where, line.get("case", ""), pictures, about=about_patient(line))
        if not lesion.case:
            lesion.case = " ".join(pictures.values())
            invented_cases.add(lesion.case)
        for column in task_columns:
            is_absent = line[column].lower() == "absent"
            lesion.labels[column] = "absent" if is_absent else line[column]
        split = line.get("split", "").lower()
        lesion.split = OTHER_SPLIT_NAMES.get(split, split)
        is_split = lesion.split in ("", *SPLITS)
        require(is_split, f"{line.where}: split is {split!r}; write train, valid or test")
        lesion.lesion_id = line.get("lesion_id", "")
        lesion.patient = line.get("patient_id") or line.get("patient", "")
        lesions.append(lesion)
    tasks = {}
    for column in task_columns:
        no_slash = "/" not in column  # results are called task/class
        require(no_slash, f"{path}: column {column} has a / in its name; rename it")
        tasks[column] = classes_of(column, lesions, path)
    notes = []
    if tasks:
        notes.append(f"tasks, the columns of no other use: {', '.join(tasks)}")
    if fact_columns:
        notes.append(f"facts about the patient, no tasks: {', '.join(fact_columns)}")
    return Catalogue("pairs", path.parent, views, tasks, lesions, notes, invented_cases)


# The first pattern that fits a file decides. So the most specific come first: HAM10000's folder
# holds a ground truth of another kind too, and "*.csv" fits nearly all. With "**/" the file may lie
# one folder deeper as well, like many challenges' tables.
READERS = [
    ("meta/meta.csv", read_spc),
    ("**/ISIC-2017_*_Part3_GroundTruth.csv", read_isic17),
    ("HAM10000_metadata*", read_ham),  # .csv from Kaggle, .tab or no ending from Dataverse
    ("**/*GroundTruth.csv", read_ground_truth),
    ("*Metadata.csv", read_milk10k_photos),
    ("metadata.csv", read_isic),
    ("*.csv", read_pairs),
    ("*.tsv", read_pairs),
]


def fits(name, pattern):
    """Whether a file's name, "a.csv" or "folder/a.csv", fits. Capitals count on every system.

    The pattern's folder stands for itself, or is "**": no folder or any.
    """
    folder, _, file = name.rpartition("/")
    folder_pattern, _, file_pattern = pattern.rpartition("/")
    return folder_pattern in (folder, "**") and fnmatch.fnmatchcase(file, file_pattern)


def read_tables(path):
    """The Catalogue of the release in the folder `path`, or of which the file `path` is a table.

    Files whose names begin with a dot are no data: glob leaves them out.
    """
    require(path.exists(), f"{path} does not exist")
    if path.is_dir():
        root = path
        names = sorted(glob.glob("*", root_dir=root) + glob.glob("*/*", root_dir=root))
    else:
        root = path.parent
        if path.match("meta/meta.csv") or path.match("*GroundTruth/*GroundTruth.csv"):
            root = root.parent  # the table lies in a folder of its own
        names = [str(path.relative_to(root))]
    for pattern, reader in READERS:
        paths = []
        for name in names:
            if fits(name.replace(os.sep, "/"), pattern) and (root / name).is_file():
                paths.append(root / name)
        if not paths:
            continue
        try:
            return reader(paths, root)
        except DataError as error:
            if reader is read_pairs:
                raise
            kind = reader.__name__.removeprefix("read_")
            hint = f"read as {kind}, because a name fits {pattern}; give your own CSV file another"
            raise DataError(f"{error} ({hint})") from error
    forms = "meta/meta.csv (derm7pt), *GroundTruth.csv (challenges), metadata.csv (ISIC Archive)"
    raise DataError(f"{path}: no {forms} or other CSV file")


# -------------------------------------------------------------- Pictures and their cache
#
# Three hashes: the photo hash, of a photo's small picture, tells whether two photos show the same;
# the cache's name, of all files' contents, tells whether pictures must be decoded anew; and the
# fingerprint, of photo files, labels and facts, tells whether a release is the one of a run.

PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".heic")  # HEIC is found in order to be refused


def all_files(folder):
    """The files below the folder: by path and by name, in lower case -> a list of paths.

    The path is relative to the folder. The name is without folder and ending, and of pictures only.
    """
    by_path = defaultdict(list)
    by_name = defaultdict(list)
    for path_below in sorted(glob.glob("**", root_dir=folder, recursive=True)):  # links too
        path = folder / path_below
        if path.is_file():
            by_path[path_below.replace(os.sep, "/").lower()].append(path)
            if path.suffix.lower() in PICTURE_ENDINGS:
                by_name[path.stem.lower()].append(path)
    return by_path, by_name


def find_pictures(lesions, views, folder):
    """The files that the lesions name: an array (N, V) of paths, in the order of the views.

    A lesion names a path below the folder, or a file without its folder and ending; capitals do not
    count. Refuses missing files, and different files of one name.
    """
    by_path, by_name = None, None  # what is below the folder; looked up when it is needed
    files = []
    missing = []
    for lesion in lesions:
        for view in views:
            text = lesion.pictures[view]
            if (folder / text).is_file():
                files.append(folder / text)
                continue
            if by_path is None:
                by_path, by_name = all_files(folder)
            paths = by_path.get(text.lower()) or by_name.get(text.lower())
            if not paths:
                missing.append(f"{lesion.where}: {view} {text!r}")
                continue
            for other in paths[1:]:  # Kaggle's HAM10000 holds each photo in two folders
                is_copy = filecmp.cmp(paths[0], other, shallow=False)
                require(is_copy, f"several pictures have one name, keep one: {first_few(paths)}")
            files.append(paths[0])
    require(not missing, "\n".join([f"pictures are missing below {folder}:", *missing]))
    return np.array(files, object).reshape(len(lesions), len(views))


THUMBNAIL_SIZE = 32  # pixels of a side; photos are compared by so small a picture
# To be raised when `decode` gives other pixels: then the cache is made anew. But photo hashes
# change with the pixels, so that earlier runs no longer recognise photos, only ids. (So it is if
# another version of Pillow decodes otherwise.)
DECODER_VERSION = 1


def hash_of(contents):
    return hashlib.blake2b(contents, digest_size=16).hexdigest()


def turn_upright(image):
    """Turns a photo as its EXIF says, then rewrites its EXIF, which may fail if an entry is odd."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # of nearly any kind; what matters, the turn, comes first
        pass


def decode(path, size):
    """A picture, (size, size, 3) uint8 RGB: upright, resized without cropping (paper, Sec. 4.1)."""
    try:
        with Image.open(path) as image:
            has_8_bits = not image.mode.startswith(("I", "F"))  # integers and floats of more bits
            require(has_8_bits, "not 8 bits a channel; save it as an 8-bit JPEG or PNG")
            image.draft(None, (2 * size, 2 * size))  # a JPEG is halved while it stays above that
            image.load()
            turn_upright(image)
            return np.array(image.convert("RGB").resize((size, size), Image.BILINEAR))
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:  # a damaged file can make a decoder raise nearly anything
        is_heic = Path(path).suffix.lower() in (".heic", ".heif")
        reason = "HEIC; save it as JPEG or PNG" if is_heic else error
        raise DataError(f"{path}: {reason}") from error


def decode_all(files, size):
    """A list of files -> pixels (len(files), S, S, 3) uint8. Broken ones are refused, all named."""
    pixels = np.empty((len(files), size, size, 3), np.uint8)
    problems = []

    def decode_one(n):
        try:
            pixels[n] = decode(files[n], size)
        except DataError as error:
            problems.append(str(error))

    threads = ThreadPoolExecutor()
    try:
        decodings = [threads.submit(decode_one, n) for n in range(len(files))]
        for decoding in progress(decodings, "decoding pictures"):
            decoding.result()  # waits for it
    finally:
        threads.shutdown(cancel_futures=True)  # after Ctrl-C no further one is begun
    message = ["pictures are broken, restore or remove them:", *sorted(problems)]
    require(not problems, "\n".join(message))
    return pixels


def decode_once(files, file_hashes, size, cache):
    """Pixels (N, V, S, S, 3) uint8 of the files (N, V), over a memory map.

    They are kept in the folder `cache` under a hash of all files: if one picture changes, all are
    decoded anew. What is old stays there; the folder may be deleted at any time.
    """
    key = f"{PIL.__version__} {DECODER_VERSION} {file_hashes.flatten().tolist()}"
    path = Path(cache) / f"{size}-{hash_of(key.encode())}.npy"
    if not path.exists():
        pixels = decode_all(files.flatten().tolist(), size)
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            np.save(file, pixels)
    pixels = torch.from_numpy(np.load(path, mmap_mode="c"))  # writable, as torch wants it
    return pixels.view(*files.shape, size, size, 3)


def hash_photos(thumbnails):
    """The photo hashes (n,), texts, of thumbnails (n, S, S, 3) uint8.

    Photos that show the same are one photo, though their files may differ: the ISIC Archive writes
    an id into each copy.
    """
    return np.array([hash_of(thumbnail.tobytes()) for thumbnail in thumbnails])


def read_pictures(lesions, views, folder, size, cache):
    """Pixels (N, V, S, S, 3) uint8 of the lesions' pictures; photo hashes and file hashes.

    The hashes are arrays (N, photos) of texts, without the masks.
    """
    files = find_pictures(lesions, views, folder)
    file_hashes = np.array([hash_of(file.read_bytes()) for file in files.flat])
    file_hashes = file_hashes.reshape(files.shape)
    pixels = decode_once(files, file_hashes, size, cache)
    is_photo = np.array(views) != "mask"
    file_hashes = file_hashes[:, is_photo]
    thumbnails = decode_once(files[:, is_photo], file_hashes, THUMBNAIL_SIZE, cache)
    photo_hashes = hash_photos(thumbnails.flatten(0, 1).numpy())
    return pixels, photo_hashes.reshape(file_hashes.shape), file_hashes


# --------------------------------------------------------------------- Labels and words


def number_labels(lesions, tasks):
    """Labels (N, T) int64: the number of each lesion's class in its task, -1 for an empty text."""
    labels = torch.full((len(lesions), len(tasks)), -1)
    for t, (task, classes) in enumerate(tasks.items()):
        wrong = []
        for n, lesion in enumerate(lesions):
            name = lesion.labels[task]
            if name in classes:
                labels[n, t] = classes.index(name)
            elif name:
                wrong.append(f"{lesion.where} {name!r}")
        message = f"{task} is none of {', '.join(classes)}; correct or empty it"
        require(not wrong, f"{message}: {first_few(wrong)}")
    return labels


SPECIAL_WORDS = ["", "begin"]  # the first of every vocabulary: number 0 fills up, 1 begins a lesion


def patient_word(column, text):
    """A fact about the patient as a word, the same in every release: "age from 40", "sex male"."""
    fact = PATIENT_FACTS.get(column, column)
    text = normalise_text(text.replace("_", " "))
    age = text.removesuffix("+")  # some tables have "85+"
    if fact == "age" and age.replace(".", "", 1).isdecimal():
        band = int(float(age)) // 20 * 20  # not in the paper: single years are too rare to learn
        text = f"from {band}"
    return f"{fact} {text}"


def patient_words(about):
    """The words about one patient, column -> text, in the order of PATIENT_FACTS."""
    word_of = {}  # fact -> word
    for column, fact in PATIENT_FACTS.items():
        if about.get(column) and fact not in word_of:
            word_of[fact] = patient_word(column, about[column])
    return list(word_of.values())


def make_vocabulary(words_of_lesions, is_train):
    """The special words, then the words of the training lesions, sorted."""
    learned = set()
    for n in np.flatnonzero(is_train):
        learned.update(words_of_lesions[n])
    return SPECIAL_WORDS + sorted(learned)


def number_words(words_of_lesions, vocabulary):
    """(N, m) int64: "begin", then a lesion's words that the vocabulary has, then zeros."""
    numbers_of_lesions = []
    for words in words_of_lesions:
        numbers = [vocabulary.index("begin")]
        for word in words:
            if word in vocabulary:
                numbers.append(vocabulary.index(word))
        numbers_of_lesions.append(torch.tensor(numbers))
    return torch.nn.utils.rnn.pad_sequence(numbers_of_lesions, batch_first=True)


# ---------------------------------------------------------------- Splits without a leak


def group_lesions(lesions, photo_hashes):
    """(N,) the group of each lesion: the number of the group's first lesion.

    Lesions of one patient, of one spot or with one photo belong together, and so do all that a
    chain of these connects. A group must lie in one split. The algorithm is called union-find.
    """
    parent = list(range(len(lesions)))  # an earlier lesion of the same group, or the lesion itself

    def first_of_group(n):
        while parent[n] != n:
            n = parent[n]
        return n

    first_with = {}  # a patient, spot or photo -> the first lesion that has it
    for n, lesion in enumerate(lesions):
        traits = [("patient", normalise_text(lesion.patient))]
        traits.append(("spot", normalise_text(lesion.lesion_id)))
        for photo_hash in photo_hashes[n]:
            traits.append(("photo", photo_hash))
        for trait in traits:
            if trait[1]:  # it is known
                other = first_with.setdefault(trait, n)
                earlier, later = sorted([first_of_group(n), first_of_group(other)])
                parent[later] = earlier
    return np.array([first_of_group(n) for n in range(len(lesions))])


def make_split(labels, groups, kind, path):
    """A split (N,) for labels (N, T) and groups (N,), which stay together.

    It is the same each time, as long as the same lesions come in the same order.
    It is stratified by the first task; the lesions without a label are spread like a class.
    """
    classes = np.zeros(len(groups), int)
    if labels.shape[1]:  # if only masks are learned, there are no labels
        classes = labels[:, 0].numpy()
    enough = len(set(groups)) >= 10 and np.bincount(classes + 1).max() >= 10
    advice = "fewer than 10 independent lesions, or no class has 10; give a column split"
    require(enough, f"{path}: {advice}")
    splitter = StratifiedGroupKFold(10, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with fewer than 10 lesions
        folds = [fold for _, fold in splitter.split(classes, classes, groups)]
    split = np.full(len(classes), "train")
    if kind == "ham":  # 0.8 / 0.1 / 0.1: MAT, Sec. 3.1
        split[folds[0]] = "test"
        split[folds[1]] = "valid"
    else:  # 0.7 / 0.1 / 0.2: paper, Sec. 4.2
        split[folds[0]] = "test"
        split[folds[1]] = "test"
        split[folds[2]] = "valid"
    return split


def check_split(split, groups, lesions, path):
    """Refuses a group in two splits, and a split without lesions."""
    leaks = []
    for n, m in enumerate(groups):  # m is the first lesion of the group
        if split[n] != split[m]:
            leaks.append(f"{lesions[n].case} ({split[n]}) and {lesions[m].case} ({split[m]})")
    message = "a patient, lesion_id or photo in two splits, move a lesion"
    require(not leaks, f"{path}: {message}: {first_few(leaks)}")
    for name in SPLITS:
        require(name in split, f"{path}: no lesion in the split {name}")


def is_published_spc(labels, split):
    """Whether these are derm7pt's published labels (N, T) and split (N,), line by line."""
    code = np.full((len(labels), labels.shape[1] + 1), -1, np.int8)
    code[:, :-1] = labels.numpy()
    for number, name in enumerate(SPLITS):
        code[split == name, -1] = number
    return hashlib.sha256(code.tobytes()).hexdigest() == PUBLISHED_SPC


# --------------------------------------------------------------------------------- Read


def left_without_split(lesions):
    """Which lesions are in no split although others are: (N,) bool.

    If no lesion is in one, all are False: a split is made later.
    """
    lacks = np.array([lesion.split == "" for lesion in lesions], bool)
    return lacks & ~lacks.all()


def left_without_label(lesions):
    """Which lesions have no label at all although others do: (N,) bool."""
    lacks = np.array([not any(lesion.labels.values()) for lesion in lesions], bool)
    return lacks & ~lacks.all()


def choose_lesions(catalogue, views, to_train):
    """The lesions that can be used, and notes on those that are left out."""
    is_incomplete = left_without_split(catalogue.lesions)
    if "mask" not in views:  # with a mask there is something to learn without a label
        is_incomplete = is_incomplete | left_without_label(catalogue.lesions)
    chosen = []
    without_picture = []
    incomplete = []
    for n, lesion in enumerate(catalogue.lesions):
        if not all(lesion.pictures[view] for view in views):
            without_picture.append(lesion.where)
        elif to_train and is_incomplete[n]:
            incomplete.append(lesion.case)
        else:
            chosen.append(lesion)
    notes = list(catalogue.notes)
    if without_picture:
        lines = first_few(without_picture)
        notes.append(f"WARNING: a photo or mask is not named, left out: {lines}")
    if incomplete:
        notes.append(f"WARNING: no label at all or no split, left out: {first_few(incomplete)}")
    return chosen, notes


def check_texts(lesions):
    """Refuses two lesions of one name, and characters that nobody sees."""
    cases = set()
    for lesion in lesions:
        is_new = lesion.case not in cases
        advice = "remove a line or give a column case"
        require(is_new, f"{lesion.where}: another lesion is called {lesion.case!r} too; {advice}")
        cases.add(lesion.case)
        for text in (lesion.case, lesion.lesion_id, lesion.patient, *lesion.labels.values()):
            is_visible = text.isprintable()
            require(is_visible, f"{lesion.where}: an invisible character in {text!r}; retype it")


def check_masks(masks, lesions, path):
    """Notes on empty masks (N, S, S, 3). Refuses a release in which all are empty."""
    empty = [lesion.case for lesion, mask in zip(lesions, masks) if mask.max() <= 127]
    message = "empty masks; they must be 255 inside the spot"
    require(len(empty) < len(lesions), f"{path}: {message}")
    return [f"WARNING: {message}: {first_few(empty)}"] if empty else []


def check_class_counts(tasks, num_lesions, path):
    """Refuses a column that is no task but has a text of its own for nearly every lesion."""
    for task, classes in tasks.items():
        are_few = len(classes) <= max(20, num_lesions // 10)
        advice = "if these are names or measurements, remove the column"
        counts = f"{len(classes)} classes in {num_lesions} lesions"
        require(are_few, f"{path}: {task}: {counts}; {advice}")


def check_tasks(tasks, labels, split, path):
    """Refuses tasks that cannot be learned. labels (N, T), split (N,).

    Returns notes on classes without a training lesion, and on splits without a label of a task.
    """
    notes = []
    for t, (task, classes) in enumerate(tasks.items()):
        learned = labels[split == "train", t].unique().tolist()
        unlearned = [name for number, name in enumerate(classes) if number not in learned]
        can_learn = len(classes) - len(unlearned) >= 2
        require(can_learn, f"{path}: {task} has fewer than two classes to train on")
        if unlearned:
            notes.append(f"WARNING: {task}: no training lesion of {', '.join(unlearned)}")
        for name in ("valid", "test"):
            if (labels[split == name, t] == -1).all():
                notes.append(f"WARNING: {task}: no label in the split {name}")
    return notes


def note_shared_photos(lesions, photo_hashes):
    """Notes on identical photos, within a lesion and between lesions. photo_hashes (N, photos)."""
    cases_with = defaultdict(list)  # photo hash -> cases
    twice = []  # cases with the same photo twice
    for lesion, hashes in zip(lesions, photo_hashes):
        for photo_hash in set(hashes):
            cases_with[photo_hash].append(lesion.case)
        if len(set(hashes)) < len(hashes):
            twice.append(lesion.case)
    notes = []
    if twice:
        notes.append(f"WARNING: two photos of a lesion are one photo: {first_few(twice)}")
    shared = [" and ".join(cases) for cases in cases_with.values() if len(cases) > 1]
    if shared:
        notes.append(f"WARNING: several lesions have one photo: {first_few(shared)}")
    return notes


def metadata_of(lesions):
    """Column -> a text for each lesion, for the columns that are not empty."""
    metadata = {}
    for column in METADATA:
        texts = [lesion.about.get(column, "") for lesion in lesions]
        if any(texts):
            metadata[column] = texts
    return metadata


def fingerprint_of(tasks, lesions, file_hashes):
    """A hash of what results depend on, except for masks and split. file_hashes: (N, photos).

    Lesions that can only be predicted do not count. So a release has one fingerprint, to train and
    to predict, with and without masks (unless a lesion without its mask is left out). Runs with one
    fingerprint may still have different splits.
    """
    contents = [list(tasks.items())]
    can_train = ~(left_without_split(lesions) | left_without_label(lesions))
    for n in np.flatnonzero(can_train):
        lesion = lesions[n]
        contents.append([lesion.case, lesion.labels, lesion.about, file_hashes[n].tolist()])
    return hash_of(repr(contents).encode())


def count_masks(catalogue):
    """How many lesions name a mask; 0 if one of these masks is not on disk."""
    if "mask" not in catalogue.views:
        return 0
    lesions = [lesion for lesion in catalogue.lesions if lesion.pictures["mask"]]
    try:
        find_pictures(lesions, ("mask",), catalogue.folder)
    except DataError:
        return 0
    return len(lesions)


def read(path, size=128, cache="runs/cache", to_train=True, masks=False, vocabulary=None):
    """The Release at `path`, a folder or one of its tables, with pictures of size x size pixels.

    cache       the folder in which decoded pictures are kept
    to_train    demands labels (or masks, if these are all) and a split, or makes one;
                False: for lesions that will only be predicted
    masks       reads the lesions' masks too, if the release has them: to train, lesions without
                one are left out; to predict, none is read unless all lesions have one. As masks and
                photos are cached together, the photos are then decoded once more
    vocabulary  that of a run; without one the training lesions make it
    Raises DataError.
    """
    path = Path(path).expanduser().resolve()
    catalogue = read_tables(path)
    reads_masks = masks and (to_train or count_masks(catalogue) == len(catalogue.lesions))
    views = tuple(view for view in catalogue.views if view != "mask" or reads_masks)
    lesions, notes = choose_lesions(catalogue, views, to_train)
    require(lesions, f"{path}: no lesion can be used. {'; '.join(notes)}")
    if to_train:
        can_learn = catalogue.has_labels() or "mask" in views
        require(can_learn, f"{path}: no lesion with a label. {'; '.join(notes)}")
        check_class_counts(catalogue.tasks, len(lesions), path)
    check_texts(lesions)
    labels = number_labels(lesions, catalogue.tasks)

    pixels, photo_hashes, file_hashes = read_pictures(lesions, views, catalogue.folder, size, cache)
    if "mask" in views:
        notes += check_masks(pixels[:, views.index("mask")], lesions, path)

    split = np.array([lesion.split for lesion in lesions])
    groups = group_lesions(lesions, photo_hashes)
    if to_train and (split == "").all():
        split = make_split(labels, groups, catalogue.kind, path)
    published = is_published_spc(labels, split)
    if to_train:
        # derm7pt's split stays as published, so that results can be compared with the paper's. If
        # it leaks, that is only noted.
        if not published:
            check_split(split, groups, lesions, path)
        notes += check_tasks(catalogue.tasks, labels, split, path)
        notes += note_shared_photos(lesions, photo_hashes)
    if catalogue.kind == "spc" and not published:
        advice = "do not compare with the paper"
        notes.append(f"WARNING: not derm7pt's published labels and split; {advice}")
    words = [patient_words(lesion.about) for lesion in lesions]
    if vocabulary is None:
        vocabulary = make_vocabulary(words, split == "train")
    return Release(
        pixels=pixels,
        views=views,
        labels=labels,
        tasks=catalogue.tasks,
        split=split,
        words=number_words(words, vocabulary),
        vocabulary=vocabulary,
        kind=catalogue.kind,
        cases=[lesion.case for lesion in lesions],
        lesion_ids=[lesion.lesion_id for lesion in lesions],
        patients=[lesion.patient for lesion in lesions],
        invented_cases=catalogue.invented_cases,
        metadata=metadata_of(lesions),
        photo_hashes=photo_hashes,
        fingerprint=fingerprint_of(catalogue.tasks, lesions, file_hashes),
        published=published,
        notes=notes,
    )


# --------------------------------------------------------- Other lesions than a run's own


def match_labels(release, tasks):
    """The release with a run's tasks. Its labels are matched by the names of task and class.

    A label is -1 where the run has no such class; a note names these classes.
    """
    numbers_in_run = {}  # "task/class" -> number of the task, number of the class
    for t, (task, classes) in enumerate(tasks.items()):
        for number, name in enumerate(classes):
            numbers_in_run[normalise_text(f"{task}/{name}")] = (t, number)
    labels = torch.full((len(release.cases), len(tasks)), -1, device=release.labels.device)
    unmatched = []
    for t, (task, classes) in enumerate(release.tasks.items()):
        for number, name in enumerate(classes):
            key = normalise_text(f"{task}/{name}")
            if key in numbers_in_run:
                t_in_run, number_in_run = numbers_in_run[key]
                labels[release.labels[:, t] == number, t_in_run] = number_in_run
            else:
                unmatched.append(f"{task}/{name}")
    notes = list(release.notes)
    if unmatched:
        names = ", ".join(unmatched)
        notes.append(f"WARNING: the run has no class {names}; these labels are left out")
    return replace(release, tasks=tasks, labels=labels, notes=notes)


def release_of_one(photos, about, size, vocabulary):
    """A Release of one lesion without labels: photos, view -> path; about, column -> text."""
    views = tuple(view for view in VIEWS if view in photos)
    files = [photos[view] for view in views]
    pixels = decode_all(files, size)[None]  # (1, V, S, S, 3)
    photo_hashes = hash_photos(decode_all(files, THUMBNAIL_SIZE))[None]  # (1, V)
    notes = note_shared_photos([Lesion("", "this lesion", photos)], photo_hashes)
    for column, text in about.items():
        if column not in PATIENT_FACTS:  # also elevation: `read` makes no word of it
            word = patient_word(column, text)
            notes.append(f"WARNING: {word!r} is no fact that a run can learn; it is left out")
    words = patient_words(about)
    for word in words:
        if word not in vocabulary:
            notes.append(f"WARNING: the run has not learned the word {word!r}; it is left out")
    return Release(
        pixels=torch.from_numpy(pixels),
        views=views,
        labels=torch.empty((1, 0), dtype=torch.int64),
        tasks={},
        split=np.array([""]),
        words=number_words([words], vocabulary),
        vocabulary=vocabulary,
        kind="one",
        cases=["this lesion"],
        lesion_ids=[""],
        patients=[""],
        invented_cases={"this lesion"},
        photo_hashes=photo_hashes,
        notes=notes,
    )


def names_of(release, n):
    """The case, lesion id and patient of a lesion, as far as they mean the same in other releases.

    Mere numbers do not, because two tables may both count from 1, and invented cases do not. A
    lesion without such a name is recognised by its photos.
    """
    candidates = [release.lesion_ids[n], release.patients[n]]
    if release.cases[n] not in release.invented_cases:
        candidates.append(release.cases[n])
    names = set()
    for name in candidates:
        text = normalise_text(name)
        if text and not text.isdecimal():
            names.add(name)
    return names


def identities(release, rows):
    """By what the lesions with these numbers can be recognised, two sorted lists of texts.

    "ids" holds cases, lesion ids and patients (see `names_of`), "photos" the hashes of photos.
    """
    ids = set()
    photos = set()
    for n in rows.tolist():
        ids.update(names_of(release, n))
        photos.update(release.photo_hashes[n].tolist())
    return {"ids": sorted(ids), "photos": sorted(photos)}


ID_KINDS = ("IL_", "HAM_")  # how lesion ids of the ISIC Archive and of HAM10000 begin


def kinds_of(ids):
    """The kinds of lesion ids among these ids, by how they begin."""
    found = set()
    for name in ids:
        for prefix in ID_KINDS:
            if name.startswith(prefix):
                found.add(prefix)
    return found


def find_known(release, seen):
    """Which lesions have been seen before: (N,) bool, and sentences for the user, or "".

    `seen` comes from `identities`. A lesion is known if its case, lesion id or patient is among all
    the ids, or one of its photos among the photos.
    """
    seen_ids = set(map(normalise_text, seen["ids"]))
    seen_photos = set(seen["photos"])
    by_id = []
    by_photo = []
    for n in range(len(release.cases)):
        ids = map(normalise_text, names_of(release, n))
        by_id.append(not seen_ids.isdisjoint(ids))
        by_photo.append(not seen_photos.isdisjoint(release.photo_hashes[n]))
    known = np.array(by_id) | np.array(by_photo)
    sentences = []
    if known.any():
        counts = f"{sum(by_id)} by id, {sum(by_photo)} by photo"
        sentences.append(f"{known.sum()} of {len(known)} lesions have been seen before: {counts}.")
    here = kinds_of(release.lesion_ids)
    elsewhere = kinds_of(seen["ids"]) - here
    if here and elsewhere:
        pair = f"{', '.join(sorted(here))} with {', '.join(sorted(elsewhere))}"
        sentences.append(f"Lesion ids cannot be compared ({pair}): more may have been seen.")
    if any(normalise_text(name).isdecimal() for name in release.lesion_ids + release.patients):
        sentences.append("Lesion ids and patients that are mere numbers were not compared.")
    return known, " ".join(sentences)


# ------------------------------------------------------------------------- Drawn lesions
#
# A stand-in for derm7pt, whose photos must not be passed on: it shows that the machinery works. The
# colours, sizes and probabilities below were chosen so that a small network learns something in a
# minute, and from the clinical photos less than from the others. They mean nothing else.

SKIN = (232, 190, 170)
BODY = {  # colour of the spot, by diagnosis
    "NEV": (168, 112, 78),
    "MEL": (168, 112, 78),
    "BCC": (222, 150, 150),
    "SK": (140, 118, 96),
    "MISC": (190, 120, 105),
}
IRREGULAR = {  # criterion -> the class that points to a melanoma
    "PN": "ATP",
    "STR": "IR",
    "PIG": "IR",
    "RS": "PRS",
    "DaG": "IR",
    "BWV": "PRS",
    "VS": "IR",
}
MARKS = {  # colour of each criterion; they are drawn one over another in this order
    "PIG": (100, 62, 40),
    "RS": (240, 228, 224),
    "BWV": (100, 120, 165),
    "PN": (75, 45, 28),
    "STR": (55, 33, 25),
    "DaG": (45, 28, 24),
    "VS": (200, 30, 50),
}


def pattern_of(task, x, y):
    """Where a criterion has colour: a mesh, rays, dots, winding lines; None: everywhere."""
    if task == "PN":
        return np.maximum(np.cos(100 * x), np.cos(100 * y)) > 0.6
    if task == "STR":
        return np.cos(16 * np.arctan2(y, x)) > 0.4
    if task == "DaG":
        return np.cos(70 * x) + np.cos(70 * y) > 1.2
    if task == "VS":
        return np.abs(np.sin(30 * x + 2 * np.cos(35 * y))) < 0.2
    return None


def invent_signs(rng):
    """A class for each task. The more malignant a lesion, the more criteria are irregular.

    The seven-point rule makes a melanoma of the points of irregular criteria.
    """
    malignancy = rng.beta(0.6, 1.1)  # from 0 to 1
    signs = {}
    points = 0
    for task, irregular in IRREGULAR.items():
        harmless = ["absent", *SPC_TASKS[task]]  # so "absent" is twice as likely as "regular"
        harmless.remove(irregular)
        signs[task] = rng.choice(harmless)
        if rng.random() < 0.7 * malignancy:
            signs[task] = irregular
            points += 2 if task in ("PN", "BWV", "VS") else 1  # major and minor criteria
    mole = "MEL" if points >= 3 else "NEV"
    signs["DIAG"] = rng.choice([mole, "MISC", "SK", "BCC"], p=[0.82, 0.1, 0.04, 0.04])
    return signs


def draw_dermoscopy(signs, rng, height):
    """A dermoscopy photo (H, W, 3) and its mask (H, W), both uint8."""
    width = height * 3 // 2
    ys = np.linspace(-0.5, 0.5, height)  # lengths are in units of the height, from the centre
    xs = np.linspace(-0.75, 0.75, width)
    y, x = np.meshgrid(ys, xs, indexing="ij")
    radius = rng.uniform(0.32, 0.4)
    waves = rng.integers(2, 6) * np.arctan2(y, x) + rng.uniform(0, 6)
    depth = radius + 0.03 * np.cos(waves) - np.hypot(y, x)  # below the wavy outline; < 0 outside
    inside = np.clip(depth / 0.03, 0, 1)  # the mask with a soft edge
    photo = np.full((height, width, 3), SKIN) * rng.uniform(0.9, 1.04)
    photo += inside[..., None] * (BODY[signs["DIAG"]] - photo)
    for task, colour in MARKS.items():
        if signs[task] == "absent":
            continue
        centre, scale, strength = (0, 0), 1, 0.7
        if signs[task] == IRREGULAR[task]:  # off the centre, larger, stronger
            centre, scale, strength = rng.choice([-0.15, 0.15], 2), 1.5, 0.95
        squared_distance = (y - centre[0]) ** 2 + (x - centre[1]) ** 2
        blob = np.exp(-squared_distance / (0.15 * scale) ** 2)
        pattern = pattern_of(task, x / scale, y / scale)
        if pattern is not None:
            blob = blob**0.25 * pattern  # a blob of twice the scale
        photo += (strength * inside * blob)[..., None] * (colour - photo)
    return photo.clip(0, 255).astype(np.uint8), np.uint8(255 * (depth > 0))


def draw_clinical(dermoscopy, rng):
    """The same spot at half the size, anywhere, blurred, in uneven light, with grain."""
    height, width, _ = dermoscopy.shape
    top = rng.integers(height)
    left = rng.integers(width)
    margins = ((top, height - top), (left, width - left), (0, 0))
    wide = Image.fromarray(np.pad(dermoscopy, margins, "edge"))
    small = wide.resize((width, height))
    blurred = np.asarray(small.filter(ImageFilter.GaussianBlur(0.015 * height)))
    brightness = rng.uniform(0.85, 1.05)
    slope = rng.uniform(-0.15, 0.15)
    light = brightness + slope * np.linspace(-0.75, 0.75, width)[:, None]  # (W, 1)
    grain = rng.normal(0, 5, dermoscopy.shape)
    return (blurred * light + grain).clip(0, 255).astype(np.uint8)


def draw_release(folder, cases, height, seed):
    """Draws photos and masks, and writes the tables, in derm7pt's layout."""
    (folder / "images").mkdir(parents=True)
    (folder / "meta").mkdir()
    table = [["case_num", "clinic", "derm", *SPC_COLUMNS.values(), "sex", "notes"]]
    for n in progress(range(cases), "drawing lesions"):
        rng = np.random.default_rng([seed, n])
        signs = invent_signs(rng)
        dermoscopy, mask = draw_dermoscopy(signs, rng, height)
        clinical = draw_clinical(dermoscopy, rng)
        names = [f"clinic{n:04}.jpg", f"derm{n:04}.jpg", f"derm{n:04}_segmentation.png"]
        for name, picture in zip(names, (clinical, dermoscopy, mask)):
            Image.fromarray(picture).save(folder / "images" / name, quality=92)
        cells = [10_000 * seed + n + 1, names[0], names[1]]
        for task in SPC_COLUMNS:  # in the order of the header
            cells.append(rng.choice(SPC_TEXTS[task][signs[task]]))
        table.append([*cells, rng.choice(["female", "male"]), "synthetic"])
    np.savetxt(folder / "meta/meta.csv", table, "%s", ",")
    ends = [round(cases * 413 / 1011), round(cases * 616 / 1011)]  # the published shares
    for split, numbers in zip(SPLITS, np.split(np.arange(cases), ends)):
        path = folder / f"meta/{split}_indexes.csv"
        np.savetxt(path, numbers, "%d", header="indexes", comments="")


def synthesize(folder, cases=1011, height=256, seed=0):
    """Draws a synthetic SPC, with masks. The folder is complete or not there.

    If it is there already it stays: delete it after a change in this section or of SPC_TEXTS.
    """
    folder = Path(folder)
    if (folder / "meta/meta.csv").is_file():
        return
    temporary = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        draw_release(temporary, cases, height, seed)
        os.rename(temporary, folder)
    except OSError:
        if not (folder / "meta/meta.csv").is_file():  # nor has another process drawn it meanwhile
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ------------------------------------------------------------------- For the other files


@contextmanager
def atomic_write(path):
    """Yields a temporary path that becomes `path` at the end: a file is complete or not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


CLEAR_LINE = "\r\x1b[K"  # a terminal goes back to the line's beginning and empties it


def progress(items, title):
    """Yields the items of a sequence. On a terminal one line says what is done and the time left.

    The line is "decoding pictures: 12 of 90, 1:03 left". In a file or pipe nothing is written.
    """
    start = time.monotonic()
    last_update = start
    on_terminal = sys.stderr.isatty()
    for done, item in enumerate(items):
        now = time.monotonic()
        if on_terminal and done and now - last_update > 0.2:  # seconds
            seconds_left = (now - start) / done * (len(items) - done)
            minutes, seconds = divmod(round(seconds_left), 60)
            text = f"{title}: {done} of {len(items)}, {minutes}:{seconds:02} left"
            print(CLEAR_LINE + text, end="", file=sys.stderr, flush=True)
            last_update = now
        yield item
    if on_terminal:
        print(CLEAR_LINE, end="", file=sys.stderr, flush=True)


def run_main(main, *user_errors):
    """Runs main(). What a user can mend ends in one sentence and exit code 2, Ctrl-C in 130."""
    program = Path(sys.argv[0]).name
    before = CLEAR_LINE if sys.stderr.isatty() else ""  # progress may have left its line
    try:
        main()
    except KeyboardInterrupt as stop:
        print(f"{before}{program}: {str(stop) or 'stopped'}", file=sys.stderr)
        sys.exit(130)
    except (OSError, MemoryError, torch.OutOfMemoryError, *user_errors) as error:
        name = "not enough memory" if isinstance(error, MemoryError) else type(error).__name__
        print(f"{before}{program}: {str(error) or name}", file=sys.stderr)
        sys.exit(2)


# ----------------------------------------------------------------- What is in a release


def print_summary(release):
    """How a release was understood, and how many lesions of each class each split has."""
    photos = [view for view in release.views if view != "mask"]
    print(f"{release.kind}, {len(release.cases)} lesions with {' and '.join(photos)}")
    for note in release.notes:
        print(note)
    columns = {"split": release.split.tolist()}
    columns.update({"lesion_id": release.lesion_ids, "patient": release.patients})
    columns.update(release.metadata)
    for column, texts in columns.items():
        counts = Counter(texts)
        unknown = counts.pop("", 0)
        common = [f"{text} {count}" for text, count in counts.most_common(4)]
        shown = ", ".join(common) or "none"
        print(f"{column}: {len(counts)} different ({shown}), {unknown} lesions without")
    words = release.vocabulary[len(SPECIAL_WORDS) :]
    print(f"words of the training split: {', '.join(words) or 'none'}")
    if not release.tasks:
        print("no labels")
    print(f"{'task':12} {'class':16}   train   valid    test")
    for t, (task, classes) in enumerate(release.tasks.items()):
        for number, name in enumerate(classes):
            split = release.split[(release.labels[:, t] == number).numpy()]
            counts = "".join(f"{(split == split_name).sum():8}" for split_name in SPLITS)
            print(f"{task:12} {name:16}{counts}")


def contact_sheet(release):
    """A strip for each class (without classes: one): four lesions, all their pictures in a row."""
    rows_of_strips = []
    for t, classes in enumerate(release.tasks.values()):
        for number in range(len(classes)):
            rows_of_strips.append(torch.nonzero(release.labels[:, t] == number)[:4, 0])
    if not rows_of_strips:
        rows_of_strips.append(torch.arange(len(release.cases))[:4])
    _, V, S, _, _ = release.pixels.shape
    strips = []
    for rows in rows_of_strips:
        pictures = np.full((4, V, S, S, 3), 255, np.uint8)
        pictures[: len(rows)] = release.pixels[rows]
        side_by_side = pictures.transpose(2, 0, 1, 3, 4)  # (S, 4, V, S, 3)
        strips.append(side_by_side.reshape(S, 4 * V * S, 3))
    return Image.fromarray(np.concatenate(strips))


def main(argv=None):
    parser = argparse.ArgumentParser(description="Prints what is in a release of photos.")
    parser.add_argument("path", help="folder of a release, its table, or your own CSV file")
    path = Path(parser.parse_args(argv).path).expanduser().resolve()
    catalogue = read_tables(path)
    only_masks = "mask" in catalogue.views and not catalogue.has_labels()
    release = read(path, to_train=catalogue.has_labels() or only_masks, masks=only_masks)
    print_summary(release)
    print(f"masks: {count_masks(catalogue)} lesions (0 if some are missing)")
    sheet = f"runs/{path.stem}-contact-sheet.png"
    with atomic_write(sheet) as temporary:
        contact_sheet(release).save(temporary, format="PNG")
    print(f"contact sheet, a strip for each line above: {sheet}")


if __name__ == "__main__":
    run_main(main, DataError)
