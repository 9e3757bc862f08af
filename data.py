"""Data: a release of photos on disk becomes labelled, augmented batches.

    release = read("release_v0", size=224)      # its kind is found from its contents; photos are decoded once
    inputs = augment(torch.from_numpy(release.pixels[rows]), release.views, generator)      # view -> (B, 3, 224, 224)

Shapes: N lesions, V pictures of a lesion, T tasks, B lesions of a batch, S the side of the square photos.
Run `python data.py PATH` to see what is in a release. For the method alone read Release, as_inputs and augment.
"""
import argparse
import csv
import glob
import hashlib
import os
import shutil
import sys
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps, __version__ as PILLOW
from sklearn.model_selection import StratifiedGroupKFold

SPLITS = ("train", "valid", "test")
VIEWS = ("clinical", "dermoscopy")  # the photos; the `views` of a release may end with a "mask", 255 inside
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, in RGB: what the pretrained weights expect
UNKNOWN = ("?", "nan", "na", "n/a", "#n/a", "<na>", "null", "unknown")  # read as an empty cell
METADATA = ("age", "age_approx", "sex", "skin_tone_class", "fitzpatrick_skin_type", "site", "anatom_site_general",
            "localization", "location", "elevation", "level_of_diagnostic_difficulty")  # for subgroups, and MAT's words

class DataError(ValueError):
    """A release that cannot be read as it is. The message says what is wrong, where, and what to do."""

def require(condition, otherwise):
    if not condition:
        raise DataError(otherwise)

def speak(main, *mendable):
    """Runs main(). What a user can mend ends in one sentence and exit code 2, Ctrl-C in 130."""
    try:
        main()
    except (KeyboardInterrupt, OSError, torch.OutOfMemoryError, *mendable) as error:
        print(f"{Path(sys.argv[0]).name}: {str(error) or 'stopped'}", file=sys.stderr)
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 2)

@dataclass
class Release:
    """N lesions, each with V pictures and a label per task."""
    kind: str  # spc, synthetic, milk10k, isic, ham, isic17 or pairs
    views: tuple  # the names of the V pictures
    tasks: dict  # task -> its class names; a class "absent", or the first of two, is the negative one
    notes: list  # what a user should know
    cases: list  # N names
    patients: list  # N, "" unknown
    labels: np.ndarray  # (N, T) int64, -1 unknown
    split: np.ndarray  # (N,) strings of SPLITS; "" where none was given and none is made (to_train=False)
    metadata: dict  # column of METADATA -> N strings
    pixels: np.ndarray  # (N, V, S, S, 3) uint8, memory-mapped
    digests: np.ndarray  # (N, photos) hashes of the decoded photos, of every fourth pixel of every fourth row
    fingerprint: str  # a hash of all that a result depends on, but the split
    published: bool  # derm7pt with the published labels and split, row by row

    def rows(self, split):
        return np.flatnonzero(self.split == split)

def read(path, size=128, cache="runs/cache", to_train=True, masks=False):
    """The Release at `path`, its photos decoded to `size` x `size` pixels and kept in the folder `cache`. Lesions that
    will only be predicted (to_train=False) need neither labels nor a split. With `masks` these are read too."""
    path = Path(path).expanduser().resolve()
    kind, folder, views, tasks, rows, notes = read_tables(path)
    views = tuple(view for view in views if masks or view != "mask")
    find_photos(rows, views, folder)
    split_given = any(row["split"] for row in rows)
    usable = [row for row in rows if any(row[task] for task in tasks) and (row["split"] or not split_given)]
    if to_train and len(usable) < len(rows):
        notes.append(f"WARNING: {len(rows) - len(usable)} lesions have no label or no split and are left out")
        rows = usable
    require(rows, f"{path}: no lesion with all its photos and a label. {'; '.join(notes)}")
    cases = [row["case"] for row in rows]
    twice = [case for case, count in Counter(cases).items() if count > 1]
    require(not twice, f"{path}: several lesions are called {listed(twice)}; remove rows or give a column case")
    patients = [row.get("patient_id") or row.get("patient", "") for row in rows]
    metadata = {column: [row[column] for row in rows] for column in METADATA if column in rows[0]}
    split = np.array([row["split"] for row in rows])
    labels = np.empty((len(rows), len(tasks)), int)
    for t, (task, classes) in enumerate(tasks.items()):
        names = ["", *classes]
        wrong = [f"{row['where']} {row[task]!r}" for row in rows if row[task] not in names]
        require(not wrong, f"{task} is none of {', '.join(classes)}; correct or empty it: {listed(wrong)}")
        labels[:, t] = [names.index(row[task]) - 1 for row in rows]  # an empty one becomes -1
    code = np.column_stack([labels, [(*SPLITS, "").index(name) for name in split]]).astype(np.int8)
    published = hashlib.sha256(code.tobytes()).hexdigest() == PUBLISHED_SPC

    pixels, hashes = decode_all([row[view] for row in rows for view in views], size, cache)
    pixels = pixels.reshape(len(rows), len(views), size, size, 3)
    if "mask" in views:
        require(pixels[:, views.index("mask")].max() > 127, f"{path}: empty masks; they must be 255 inside the lesion")
    photos = [v for v, view in enumerate(views) if view != "mask"]
    digests = np.array([[digest(lesion[v, ::4, ::4].tobytes()) for v in photos] for lesion in pixels])
    files = [[hashes[row[view]] for view in views] for row in usable]  # usable: the same with to_train=False
    texts = [[row[column] for column in ("case", *tasks, *metadata)] for row in usable]
    fingerprint = digest(repr((files, texts, list(tasks.items()), list(metadata))).encode())
    release = Release(kind, views, tasks, notes, cases, patients, labels, split, metadata,
                      pixels, digests, fingerprint, published)
    if to_train:
        check(release, path)
    return release

# ----------------------------------- the readers. A row has keys: case, split, each view (a photo), each task (a class)

# The Seven-Point Checklist, in the order of the paper's tables: task -> its column of meta.csv, class -> strings in it.
SPC = {
    "DIAG": ("diagnosis", {"BCC": ["basal cell carcinoma"],
        "NEV": [f"{kind} nevus" for kind in ("blue", "clark", "combined", "congenital", "dermal", "recurrent",
                                             "reed or spitz")],
        "MEL": ["melanoma", "melanoma (in situ)", "melanoma (less than 0.76 mm)", "melanoma (0.76 to 1.5 mm)",
                "melanoma (more than 1.5 mm)", "melanoma metastasis"],
        "MISC": ["dermatofibroma", "lentigo", "melanosis", "miscellaneous", "vascular lesion"],
        "SK": ["seborrheic keratosis"]}),
    "PN": ("pigment_network", {"absent": ["absent"], "TYP": ["typical"], "ATP": ["atypical"]}),
    "STR": ("streaks", {"absent": ["absent"], "REG": ["regular"], "IR": ["irregular"]}),
    "PIG": ("pigmentation", {"absent": ["absent"], "REG": ["diffuse regular", "localized regular"],
                             "IR": ["diffuse irregular", "localized irregular"]}),
    "RS": ("regression_structures", {"absent": ["absent"], "PRS": ["blue areas", "white areas", "combinations"]}),
    "DaG": ("dots_and_globules", {"absent": ["absent"], "REG": ["regular"], "IR": ["irregular"]}),
    "BWV": ("blue_whitish_veil", {"absent": ["absent"], "PRS": ["present"]}),
    "VS": ("vascular_structures", {"absent": ["absent"], "REG": ["arborizing", "comma", "hairpin", "within regression",
                                                                 "wreath"], "IR": ["dotted", "linear irregular"]}),
}
SPC_TASKS = {task: tuple(classes) for task, (_, classes) in SPC.items()}
# sha256 of the published labels and split, (1011, 9) int8 in meta.csv's order: it tells derm7pt from any other table.
PUBLISHED_SPC = "6730bba642bdc2aa22b7e6244294d1a8b3c62dbff424ae3927454110b54887a6"
HAM10000 = ("AKIEC", "BCC", "BKL", "DF", "MEL", "NV", "VASC")
MILK10K = ("AKIEC", "BCC", "BEN_OTH", "BKL", "DF", "INF", "MAL_OTH", "MEL", "NV", "SCCKA", "VASC")

def read_tables(path):
    """kind, folder of the photos, views, tasks, rows, notes: of the first reader that fits `path`, folder or table."""
    readers = {"meta/meta.csv": read_spc, "ISIC-2017_Training_Part3_GroundTruth.csv": read_isic17,
               "HAM10000_metadata.csv": read_ham, "*GroundTruth.csv": read_milk10k, "metadata.csv": read_isic,
               "*.csv": read_pairs}
    for pattern, reader in readers.items():
        tables = [path] if path.is_file() and path.match(pattern) else list(path.glob(pattern))
        require(len(tables) < 2, f"{path}: several tables, name one as the path: {listed(tables)}")
        if tables:
            return reader(tables[0])
    raise DataError(f"{path}: no meta/meta.csv (derm7pt), *GroundTruth.csv (MILK10k), metadata.csv (ISIC) or other CSV")

def read_spc(table):
    """derm7pt: `meta/meta.csv` has the labels, `meta/{train,valid,test}_indexes.csv` the published split."""
    rows = read_table(table, "case_num", "clinic", "derm", *(column for column, _ in SPC.values()))
    for row in rows:
        row |= {"case": row["case_num"], "split": "", "clinical": row["clinic"], "dermoscopy": row["derm"]}
        row["mask"] = Path(row["derm"]).stem + "_segmentation"  # drawn lesions have one
        for task, (column, classes) in SPC.items():
            names = {string: name for name, strings in classes.items() for string in strings}
            row[task] = names.get(row[column].lower(), row[column])  # an unknown string is refused later
    waiting = {str(number): row for number, row in enumerate(rows)}  # for their split
    for split in SPLITS:
        for index in read_table(table.with_name(f"{split}_indexes.csv"), "indexes"):
            row = waiting.pop(index["indexes"], None)
            require(row, f"{index['where']}: {index['indexes']!r} is no row of meta.csv, or in a split already")
            row["split"] = split
    kind, views, notes = "spc", ("clinical", "dermoscopy"), []
    if rows[0].get("notes") == "synthetic":  # drawn by synthesize
        kind, views, notes = "synthetic", (*views, "mask"), ["drawn lesions: they show the machinery, not the method"]
    return kind, table.parent.parent / "images", views, SPC_TASKS, rows, notes

def read_milk10k(table):
    """MILK10k: `*GroundTruth.csv` marks each lesion's class with 1, `*Metadata.csv` names its photos."""
    truth = {}  # lesion -> class
    for row in read_table(table, "lesion_id", *map(str.lower, MILK10K)):
        marked = [name for name in MILK10K if row[name.lower()] in ("1", "1.0")]
        fits = len(marked) == 1 and row["lesion_id"] not in truth and len(row) == 13  # lesion_id, 11 classes, where
        require(fits, f"{row['where']}: each lesion needs one row with one of MILK10k's 11 classes marked 1")
        truth[row["lesion_id"]] = marked[0]
    _, folder, views, _, rows, notes = read_isic(table.with_name(table.name.replace("GroundTruth", "Metadata")))
    for row in rows:
        row["DIAG"] = truth.pop(row["case"], "")
    if truth:
        notes.append(f"WARNING: lesions of the ground truth without two photos: {listed(list(truth))}")
    return "milk10k", folder, views, {"DIAG": MILK10K}, rows, notes

def read_isic(table):
    """An ISIC Archive download (paper, Sec. 4.2), a row an image. Close-ups go before other clinical photos."""
    images = read_table(table, "isic_id", "lesion_id", "image_type")
    images.sort(key=lambda image: (image["image_type"].lower() != "clinical: close-up", image["isic_id"]))
    lesions = defaultdict(dict)  # lesion -> view -> its image
    for image in images:
        view = {"clin": "clinical", "derm": "dermoscopy"}.get(image["image_type"].lower()[:4])
        if image["lesion_id"] and view:
            lesions[image["lesion_id"]].setdefault(view, image)
    rows = []
    for case, pair in sorted(lesions.items()):
        if len(pair) == 2:
            label = pair["dermoscopy"].get("diagnosis_1", "").lower().replace("indeterminate", "")
            photos = {view: image["isic_id"] for view, image in pair.items()}
            rows.append(pair["dermoscopy"] | photos | {"case": case, "split": "", "DIAG": label})
    notes = [f"{len(rows)} lesions with both photos; {len(images) - 2 * len(rows)} other images are not used"]
    return "isic", table.parent, ("clinical", "dermoscopy"), {"DIAG": ("benign", "malignant")}, rows, notes

def read_ham(table):
    """HAM10000: a row a photo; photos of one lesion go to one split. dx_type, left out, tells the diagnosis."""
    rows = read_table(table, "lesion_id", "image_id", "dx")
    for row in rows:
        row |= {"case": row["image_id"], "split": "", "patient": row["lesion_id"], "DIAG": row["dx"].upper()}
        row |= {"dermoscopy": row["image_id"], "mask": row["image_id"] + "_segmentation"}
    return "ham", table.parent, ("dermoscopy", "mask"), {"DIAG": HAM10000}, rows, []

def read_isic17(table):
    """The ISIC 2017 challenge: a table for each of its three splits, two tasks."""
    tasks, rows = {"melanoma": ("absent", "present"), "seborrheic_keratosis": ("absent", "present")}, []
    for split, part in zip(SPLITS, ("Training", "Validation", "Test_v2")):
        for row in read_table(table.with_name(f"ISIC-2017_{part}_Part3_GroundTruth.csv"), "image_id", *tasks):
            labels = {task: {"0.0": "absent", "1.0": "present"}.get(row[task], row[task]) for task in tasks}
            photos = {"dermoscopy": row["image_id"], "mask": row["image_id"] + "_segmentation"}
            rows.append(row | labels | photos | {"case": row["image_id"], "split": split})
    return "isic17", table.parent, ("dermoscopy", "mask"), tasks, rows, []

def read_pairs(table):
    """Your own CSV: a column a photo (paths from its folder); case, split, patient, METADATA; all others are tasks."""
    rows = read_table(table)
    views = tuple(view for view in (*VIEWS, "mask") if view in rows[0])
    require(set(views) & set(VIEWS), f"{table}: no column clinical or dermoscopy; it has {', '.join(rows[0])}")
    tasks = {}
    for column in rows[0]:
        if column not in (*VIEWS, "mask", "case", "split", "patient", "patient_id", "where", *METADATA):
            classes = {row[column] for row in rows} - {""}
            clear = len(classes) == len(set(map(same_text, classes))) and "/" not in column
            require(clear, f"{table}, {column}: a / in the name, or classes that differ only in case, spaces or .0")
            tasks[column] = tuple(sorted(classes, key=lambda name: (name != "absent", name)))
    for row in rows:
        row["split"] = row.get("split", "").lower()
        require(row["split"] in ("", *SPLITS), f"{row['where']}: split is {row['split']!r}; write train, valid or test")
        row["case"] = row.get("case") or " ".join(row[view] for view in views)
    return "pairs", table.parent, views, tasks, rows, []

def read_table(path, *required):
    """Rows of a CSV file in UTF-8: dicts from column, in lower case, to text; "where" is a row's place in the file."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)  # strict: a quotation mark left open is an error
            reader.fieldnames = columns = [name.strip().lower() for name in reader.fieldnames or []]
            rows = [row | {"where": f"{path} line {reader.line_num}"} for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a CSV file in UTF-8 ({error})") from error
    missing = [name for name in required if name not in columns]
    require(not missing, f"{path}: no column {', '.join(missing)}; it has {', '.join(columns)}")
    require(rows and len(columns) == len(set(columns)), f"{path}: no rows, or two columns of one name")
    for row in rows:
        require(None not in row and None not in row.values(), f"{row['where']}: not {len(columns)} values")
        for column, text in row.items():
            row[column] = "" if text.strip().lower() in UNKNOWN else text.strip()
    return rows

def find_photos(rows, views, folder):
    """The names in the rows become files: paths from `folder`, or ISIC ids, whatever the case of their letters."""
    files = defaultdict(list)  # path from the folder, or bare name of a photo, in lower case -> its files
    for name in sorted(glob.glob("**", root_dir=folder, recursive=True)):  # linked folders too
        files[Path(name).as_posix().lower()].append(folder / name)
        if name.lower().endswith((".jpg", ".jpeg", ".png")):
            files[Path(name).stem.lower()].append(folder / name)
    for row in rows:
        for view in views:
            require(row[view], f"{row['where']}: no {view} photo")
            found = [folder / row[view]]
            if not found[0].is_file():
                found = files.get(row[view].lower(), found)
            require(len(found) == 1, f"several photos have one name, keep one: {listed(found)}")
            row[view] = found[0]

def listed(texts):
    """The first few of the texts, and how many there are."""
    return ", ".join(map(str, texts[:4])) + f" ({len(texts)} in all)"

def same_text(text):
    """The text as people compare it: case, spaces, Unicode form and an ending .0 make no difference."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".0")

# ----------------------------------------------------------------------------------------------- splits without a leak

def group_lesions(release):
    """Lesions of one patient or with one photo belong together. Each lesion's group, named after its first lesion."""
    lesions_with = defaultdict(list)  # photo or patient -> its lesions
    for n, patient in enumerate(release.patients):
        for shared in (*release.digests[n], patient):
            lesions_with[shared].append(n)
    lesions_with.pop("", None)  # unknown patients
    group, twins = np.arange(len(release.cases)), []
    for shared, lesions in lesions_with.items():
        if len(lesions) > 1:
            group[np.isin(group, group[lesions])] = group[lesions].min()  # all their groups become one
            if shared not in release.patients:  # a photo
                twins.append(" and ".join(release.cases[n] for n in lesions))
    if twins:
        release.notes.append(f"WARNING: one photo stands for two, in {listed(twins)}")
    return group

def make_split(release, group, path):
    """Stratified by the first task, always the same; groups stay together. 7 or 8 of ten folds are for training."""
    classes = release.labels[:, 0]
    enough = len(set(group)) >= 10 and np.bincount(classes + 1).max() >= 10
    require(enough, f"{path}: fewer than 10 independent lesions, or no class has 10; give a column split")
    tenths = ("test", "valid") if release.kind == "ham" else ("test", "test", "valid")  # MAT, 3.1; paper, Sec. 4.2
    folds = StratifiedGroupKFold(10, shuffle=True, random_state=0).split(classes, classes, group)
    release.split = np.full(len(classes), "train")
    for name, (_, rows) in zip(tenths, folds):
        release.split[rows] = name

def check(release, path):
    """Makes the split, or refuses a given one that leaks; refuses a task with nothing to learn."""
    group = group_lesions(release)
    if not release.split.any():
        make_split(release, group, path)
    names = [f"{case} ({split})" for case, split in zip(release.cases, release.split)]
    leaks = [f"{names[n]} and {names[group[n]]}" for n in np.flatnonzero(release.split != release.split[group])]
    require(release.published or not leaks, f"{path}: a patient or photo in two splits, move a lesion: {listed(leaks)}")
    require(set(release.split) == set(SPLITS), f"{path}: no lesion in one of {', '.join(SPLITS)}")
    for t, (task, classes) in enumerate(release.tasks.items()):
        require(len(classes) <= max(20, len(release.cases) // 10), f"{path}: {task}: {len(classes)} classes? Remove it")
        learned = set(release.labels[release.rows("train"), t]) - {-1}
        require(len(learned) > 1, f"{path}: {task} has fewer than two classes in the training split")
    if release.kind == "spc" and not release.published:
        release.notes.append("WARNING: not derm7pt's published labels and split; do not compare with the paper")

# ---------------------------------------------------------------------------------- photos: decoded once, kept as uint8

def digest(contents):
    """Hash of a file's bytes, or of decoded pixels: ISIC writes its id into each file, so copies differ in bytes."""
    return hashlib.blake2b(contents, digest_size=16).hexdigest()

def decode(path, size):
    """A photo as (size, size, 3) uint8 RGB: upright, resized to a square without cropping (paper, Sec. 4.1)."""
    try:
        with Image.open(path) as image:
            require(image.mode[0] not in "IF", "not 8 bits a channel; save it as an 8-bit JPEG or PNG")
            image.draft(None, (2 * size, 2 * size))  # a JPEG's decoder halves it while it stays above that size
            image.load()
            with suppress(Exception):  # it turns the photo, then rewrites its EXIF, which may fail
                ImageOps.exif_transpose(image, in_place=True)
            return np.array(image.convert("RGB").resize((size, size), Image.BILINEAR))
    except Exception as error:  # a damaged file can make a decoder raise nearly anything
        raise DataError(f"{path}: {error}") from error

def decode_all(files, size, cache):
    """All photos, (len(files), size, size, 3) uint8, and file -> hash of its bytes. They are kept in `cache`, in one
    file named after a hash of all their contents: if one photo changes, all are decoded anew."""
    hashes = [digest(file.read_bytes()) if file.is_file() else "" for file in files]
    path = Path(cache) / f"{size}-{digest(f'{PILLOW} {hashes}'.encode())}.npy"
    if not path.exists():
        print(f"decoding {len(files)} photos", file=sys.stderr)
        pixels = np.empty((len(files), size, size, 3), np.uint8)
        def fill(n):
            try:
                pixels[n] = decode(files[n], size)
            except DataError as error:
                return str(error)
        with ThreadPoolExecutor() as threads:
            problems = sorted(filter(None, threads.map(fill, range(len(files)))))
        require(not problems, "\n".join(["photos are missing or broken, restore or remove them:", *problems]))
        with whole(path) as temporary, open(temporary, "wb") as file:
            np.save(file, pixels)
    return np.load(path, mmap_mode="c"), dict(zip(files, hashes))  # "c": read when used; writable, as torch wants it

@contextmanager
def whole(path):
    """A temporary path that becomes `path` when the block ends well: a file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

# ------------------------------------------------------------------------------------------------- what a network reads

def as_inputs(pixels, views):
    """Pixels (B, V, S, S, 3) -> view -> (B, 3, S, S) float32, normalised; for a mask (B, 1, S, S), 1 in the lesion."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    x = pixels.permute(0, 1, 4, 2, 3) / 255  # (B, V, 3, S, S)
    inputs = {view: (x[:, v] - mean) / std for v, view in enumerate(views)}
    if "mask" in inputs:
        inputs["mask"] = (x[:, list(views).index("mask"), :1] > 0.5).float()
    return inputs

def augment(pixels, views, generator):
    """as_inputs after the paper's augmentation (Sec. 4.1), the whole batch at once. `generator` is on the CPU. All
    pictures of a lesion share the geometry; each has its own light. Ranges: the authors' earlier code, FusionM4Net."""
    B, V, S = pixels.shape[:3]
    def coin(*shape):
        return torch.randint(0, 2, shape, generator=generator)
    def between(low, high, *shape):
        return torch.empty(shape).uniform_(low, high, generator=generator)

    # From a place in the new picture to the place in the photo that it shows: flip, turn, zoom, shift.
    flips = torch.diag_embed(1 - 2.0 * coin(B, 2))  # (B, 2, 2)
    quarters = coin(B) * between(0, 4, B).floor()
    moved = coin(B)  # one coin for rotation, zoom and shift together
    angle = quarters * np.pi / 2 + moved * between(-np.pi / 4, np.pi / 4, B)
    turn = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1).view(B, 2, 2)
    zoom = 1 + moved * between(-0.5, 0.5, B)
    shift = moved.view(B, 1) * between(-1 / 8, 1 / 8, B, 2)  # up to 1/16 of the side: the grid's side is 2 long
    affine = torch.cat((turn @ flips / zoom.view(B, 1, 1), shift.view(B, 2, 1)), 2).to(pixels.device)  # (B, 2, 3)
    x = pixels.permute(0, 1, 4, 2, 3).reshape(B, 3 * V, S, S).float()  # all pictures as one image of 3V channels
    grid = F.affine_grid(affine, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False).view(B, V, 3, S, S)

    lit = coin(B, V, 1, 1, 1)
    if "mask" in views:
        lit[:, views.index("mask")] = 0
    contrast = 1 + lit * between(-0.2, 0.2, B, V, 1, 1, 1)
    brightness = 255 * lit * between(-0.2, 0.2, B, V, 1, 1, 1)
    x = (x * contrast.to(x.device) + brightness.to(x.device)).clamp(0, 255)
    return as_inputs(x.permute(0, 1, 3, 4, 2), views)

def word(column, text):
    """One thing known of a patient, the same in every release: "age from 40", "site lower extremity"."""
    column = "site" if column in ("localization", "location", "anatom_site_general") else column.removesuffix("_approx")
    text = same_text(text.replace("_", " "))
    if column == "age" and text.replace(".", "", 1).isdecimal():
        text = f"from {int(float(text)) // 20 * 20}"  # bands of 20 years (ours)
    return f"{column} {text}"

def make_vocabulary(release):
    """The words of the training split, sorted. Number 0 is no word, number 1 begins the words of every lesion."""
    rows = release.rows("train")
    learned = {word(column, texts[n]) for column, texts in release.metadata.items() for n in rows if texts[n]}
    return ["", "begin", *sorted(learned)]

def as_words(metadata, vocabulary, N):
    """The numbers (N, m) int64 of each lesion's words: those that the vocabulary has, then zeros."""
    words = np.zeros((N, 1 + len(metadata)), np.int64)
    for n in range(N):
        known = [word(column, texts[n]) for column, texts in metadata.items() if texts[n]]
        numbers = [1, *(vocabulary.index(each) for each in known if each in vocabulary)]
        words[n, :len(numbers)] = numbers
    return words

# --------------------------------------------------------------------------------------------------- the synthetic SPC

def synthesize(folder, cases=1011, height=256, seed=0):
    """Draw a synthetic SPC in derm7pt's layout, with masks, into a folder that appears whole or not at all."""
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    for part in ("images", "meta"):
        (temporary / part).mkdir(parents=True)
    table = [["case_num", "clinic", "derm", *(column for column, _ in SPC.values()), "sex", "notes"]]
    for n in range(cases):
        rng = np.random.default_rng([seed, n])
        signs = invent_signs(rng)
        names = [f"clinic{n:04}.jpg", f"derm{n:04}.jpg", f"derm{n:04}_segmentation.png"]
        for name, picture in zip(names, draw_lesion(signs, rng, height)):
            Image.fromarray(picture).save(temporary / "images" / name, quality=92)
        labels = [rng.choice(classes[signs[task]]) for task, (_, classes) in SPC.items()]  # one of the class's strings
        table.append([10_000 * seed + n + 1, *names[:2], *labels, rng.choice(["female", "male"]), "synthetic"])
    np.savetxt(temporary / "meta/meta.csv", table, "%s", ",")
    ends = [round(cases * 413 / 1011), round(cases * 616 / 1011)]  # the published shares
    for split, numbers in zip(SPLITS, np.split(np.arange(cases), ends)):
        np.savetxt(temporary / f"meta/{split}_indexes.csv", numbers, "%d", header="indexes", comments="")
    with suppress(OSError):  # a folder that is there stays: another run may have drawn it meanwhile
        os.rename(temporary, folder)
    shutil.rmtree(temporary, ignore_errors=True)

def invent_signs(rng):
    """A class for each task, irregular ones where the lesion is malignant; the seven-point rule makes a melanoma."""
    malignant = rng.beta(0.6, 1.1)  # how malignant the lesion is, from 0 to 1
    signs, points = {}, 0
    for task in list(SPC)[1:]:
        absent, *regular, irregular = SPC_TASKS[task]
        signs[task] = rng.choice([absent, absent, *regular])
        if rng.random() < 0.7 * malignant:
            signs[task] = irregular
            points += 2 if task in ("PN", "BWV", "VS") else 1  # major and minor criteria
    mole = "MEL" if points >= 3 else "NEV"
    return signs | {"DIAG": rng.choice([mole, "MISC", "SK", "BCC"], p=[0.82, 0.1, 0.04, 0.04])}

def draw_lesion(signs, rng, height):
    """Clinical and dermoscopy photo, both (H, W, 3), and the mask (H, W) of the lesion in the second, all uint8."""
    H, W = height, height * 3 // 2  # y, x and all lengths are in units of H, places are from the centre
    y, x = np.meshgrid(np.linspace(-0.5, 0.5, H), np.linspace(-0.75, 0.75, W), indexing="ij")
    body = {"NEV": (168, 112, 78), "MEL": (168, 112, 78), "BCC": (222, 150, 150), "SK": (140, 118, 96),
            "MISC": (190, 120, 105)}  # colours of the diagnoses
    marks = {"PIG": (100, 62, 40), "RS": (240, 228, 224), "BWV": (100, 120, 165), "PN": (75, 45, 28),
             "STR": (55, 33, 25), "DaG": (45, 28, 24), "VS": (200, 30, 50)}  # and of the criteria
    patterns = {"PN": lambda x, y: np.maximum(np.cos(100 * x), np.cos(100 * y)) > 0.6,  # a mesh
                "STR": lambda x, y: np.cos(16 * np.arctan2(y, x)) > 0.4,  # rays
                "DaG": lambda x, y: np.cos(70 * x) + np.cos(70 * y) > 1.2,  # dots
                "VS": lambda x, y: np.abs(np.sin(30 * x + 2 * np.cos(35 * y))) < 0.2}  # winding lines
    radius = rng.uniform(0.32, 0.4) + 0.03 * np.cos(rng.integers(2, 6) * np.arctan2(y, x) + rng.uniform(0, 6))
    depth = radius - np.hypot(y, x)  # to the wavy outline; > 0 inside
    lesion = np.clip(depth / 0.03, 0, 1)  # the mask with a soft edge
    image = np.full((H, W, 3), (232, 190, 170)) * rng.uniform(0.9, 1.04)  # skin
    image += lesion[..., None] * (body[signs["DIAG"]] - image)
    for task, colour in marks.items():  # patches, then patterns, over one another
        if signs[task] != "absent":
            place, scale, strength = (0, 0), 1, 0.7
            if signs[task] in ("ATP", "IR", "PRS"):  # irregular: off the centre, larger, stronger
                place, scale, strength = rng.choice([-0.15, 0.15], 2), 1.5, 0.95
            blob = np.exp(-((y - place[0]) ** 2 + (x - place[1]) ** 2) / (0.15 * scale) ** 2)
            if task in patterns:  # the blob grows to twice the scale
                blob = blob ** 0.25 * patterns[task](x / scale, y / scale)
            image += (strength * lesion * blob)[..., None] * (colour - image)
    dermoscopy = image.clip(0, 255).astype(np.uint8)

    # The clinical photo: the same lesion at half the size, anywhere, blurred, in uneven light, with grain.
    top, left = rng.integers(H), rng.integers(W)
    wide = np.pad(dermoscopy, ((top, H - top), (left, W - left), (0, 0)), "edge")
    blurred = np.asarray(Image.fromarray(wide).resize((W, H)).filter(ImageFilter.GaussianBlur(0.015 * H)))
    light = rng.uniform(0.85, 1.05) + rng.uniform(-0.15, 0.15) * x[..., None]
    clinical = blurred * light + rng.normal(0, 5, image.shape)
    return clinical.clip(0, 255).astype(np.uint8), dermoscopy, np.uint8(255 * (depth > 0))

def main(argv=None):
    parser = argparse.ArgumentParser(description="What is in a release of photos.")
    parser.add_argument("path", help="folder of a release, its table, or the CSV file of your own pairs")
    args = parser.parse_args(argv)
    release = read(args.path)
    print(f"{args.path}: {release.kind}, {len(release.cases)} lesions with {' and '.join(release.views)}",
          *release.notes, sep="\n")
    print(f"{'task':12} {'class':16}   train   valid    test")
    strips = []  # four lesions of each class, all their pictures side by side
    for t, (task, classes) in enumerate(release.tasks.items()):
        for k, name in enumerate(classes):
            lesions = np.flatnonzero(release.labels[:, t] == k)
            counts = [(release.split[lesions] == split).sum() for split in SPLITS]
            print(f"{task:12} {name:16}" + "".join(f"{count:8}" for count in counts))
            strip = np.full_like(release.pixels[:4], 255)  # (4, V, S, S, 3)
            strip[:len(lesions)] = release.pixels[lesions[:4]]
            strips.append(np.hstack(strip.reshape(-1, *strip.shape[2:])))
    path = f"runs/{Path(args.path).resolve().stem}-contact-sheet.png"
    Image.fromarray(np.vstack(strips)).save(path)
    print(f"lesions of each class, a row for each line above: {path}")

if __name__ == "__main__":
    speak(main, DataError)
