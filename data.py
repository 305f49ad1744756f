"""Settings, annotation files and images: everything between the disk and a batch.

Read top to bottom:
    InputError, BadImage                    what can be wrong with a user's input
    Config and its sections                 the settings of config.yaml, as frozen dataclasses
    load_config, config_to_dict, ...        config.yaml + scale + command line -> Config
    task_settings, task_files               the settings and the files of a task
    FORMATS, Records                        annotation files and tar shards of any size, read record by record
    open_index, scan_list, index_shard      where the records lie: found once, kept in data/index/
    image_paths, texts_of, clean_text       what a record says, whatever its task
    join_image_path, ShardImage, read_image from a record's path to an RGB image
    write_atomically, hash63                files that are whole or absent; the seeds of every draw
    TrainingSet, ShuffledBatches, make_loader    training batches, the same for any number of workers
    load_retrieval, load_vqa, ..., ImageDataset  evaluation
    read_refs                               RefCOCO's pickle, from which nothing but plain values is taken
    check                                   looks through a task's files before any training
    render_scenes                           the embedded scenes, with files for every task

The annotation formats are ALBEF's [ALBEF]; reading, checking and seeding are our choice [ours].
"""
import bisect
import codecs
import collections
import contextlib
import dataclasses
import difflib
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import random
import re
import reprlib
import signal
import sys
import tarfile
import tempfile
import types
import typing
import weakref
from array import array

import numpy as np
import torch
import yaml
from PIL import ExifTags, Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

import softmask

# A batch of captions takes a millisecond: threads for it, one per core in every loader worker, would only be in the way.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = os.path.dirname(os.path.abspath(__file__))
INDEX_FOLDER = os.path.join(HERE, "data", "index")  # may be deleted between runs: it is made again
INDEX_VERSION = 2  # raised with any change of what the folder holds
INDEX_KEPT_FROM = 1 << 24  # bytes; a smaller JSON file is indexed within a second, at every start
CHUNK_BYTES = 1 << 22  # what is read at a time of an annotation file
MAX_RECORD_BYTES = 1 << 24
MAX_YAML_NODES = 100_000  # config.yaml has 1,200
MAX_SHARD_IMAGE_BYTES = 1 << 28
MAX_TAR_HEADER_BYTES = 1 << 13  # beyond a member's own 512: a long name, say
MAX_PIXELS = 100_000_000  # a larger image is refused before it is decoded
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit: warnings from 89 million on, another message from 179 million
# What a photograph comes in (JPEG covers MPO). Pillow knows more, and one of them (EPS) starts an interpreter.
IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"]
MAX_TRIES = 20  # records tried for one place in a batch before the run stops
MAX_CHECKED_IMAGES = 2_000_000
MAX_CHECKED_TEXTS = 10_000
MAX_OPENED_IMAGES = 200
MAX_REFS_BYTES = 1 << 30
MAX_QUESTION_WORDS = 50  # at evaluation; in training data.max_words [ALBEF]
ENTAILMENT_LABELS = ("contradiction", "neutral", "entailment")  # in the order of the classes [ALBEF]


class InputError(ValueError):
    """Bad input of the user; the message is one line: what is wrong, where, what to do."""


class BadImage(Exception):
    """An image that cannot be read; the message names path and reason."""


# The settings. What each means stands in config.yaml; a field here says its name and type alone.

@dataclasses.dataclass(frozen=True)
class ModelConfig:
    image_size: int
    patch_size: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    text_width: int
    text_layers: int
    fusion_layers: int
    text_heads: int
    max_positions: int
    embed_dim: int
    dropout: float
    vision_weights: str | None
    text_weights: str | None


@dataclasses.dataclass(frozen=True)
class MethodConfig:
    soft_mask: bool
    soft_mask_negatives: bool
    attention_layer: int | None
    focal_gamma: float
    mask_text_for: str
    mlm_probability: float
    mlm_random_replacement: bool
    itm_weight: float
    distort_brightness: float
    distort_contrast: float
    distort_blur: float
    distort_hue: float
    distort_grayscale: float
    clean_teacher: bool
    words_first: float
    image_ids: bool
    queue_size: int
    momentum: float
    alpha: float
    temp: float


@dataclasses.dataclass(frozen=True)
class ScenesConfig:
    level: str
    train: int
    val: int
    test: int
    image_size: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Files:
    image_root: str
    train: list[str]
    val: str | None
    test: str | None


@dataclasses.dataclass(frozen=True)
class VqaFiles(Files):
    vg_image_root: str
    answers: str | None


@dataclasses.dataclass(frozen=True)
class GroundingFiles(Files):
    dets: str | None
    refs: str | None
    instances: str | None


@dataclasses.dataclass(frozen=True)
class DataConfig:
    tokenizer: str
    max_words: int
    scenes: ScenesConfig | None
    pretrain_files: list[str]
    nlvr2_pretrain_files: list[str] | None
    pretrain_image_root: str
    decode_reduced: bool
    retrieval: str
    retrieval_sets: dict[str, Files]
    vqa: VqaFiles
    nlvr2: Files
    entailment: Files
    grounding: GroundingFiles
    grounding_boxes: str | None
    foils: str | None


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    start: str | None
    image_size: int | None
    max_tokens: int
    crop_min_area: float
    flip: bool
    randaugment_ops: int
    ramp_alpha: bool
    epochs: int
    batch_size: int
    accumulation: int
    lr: float
    warmup_lr: float
    warmup_steps: int
    min_lr: float
    temp_lr: float
    vision_lr: float | None
    muon_lr: float | None
    weight_decay: float
    clip_norm: float


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    batch_size: int
    top_k: int
    answers_top_k: int
    pictures: int


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int
    precision: str
    device: str
    num_workers: int
    compile: bool
    checkpointing: bool
    log_every_steps: int
    checkpoint_every_steps: int
    eval_every_steps: int
    max_bad_image_share: float
    max_skipped_steps: int
    model: ModelConfig
    method: MethodConfig
    data: DataConfig
    pretrain: TaskConfig
    retrieval: TaskConfig
    vqa: TaskConfig
    nlvr2_pretrain: TaskConfig
    nlvr2: TaskConfig
    entailment: TaskConfig
    grounding: TaskConfig
    eval: EvalConfig
    scale: str


TASKS = tuple(field.name for field in dataclasses.fields(Config) if field.type is TaskConfig)

# A scale that gives one of these replaces it; every other mapping is merged key by key.
REPLACED_WHOLE = {"scenes", "retrieval_sets"}
# Limits, by the last part of the key. A whole number not named in MAY_BE_ZERO is at least 1, every number at least 0.
MAY_BE_ZERO = {"seed", "epochs", "num_workers", "attention_layer", "randaugment_ops", "warmup_steps", "pictures",
               "eval_every_steps", "max_skipped_steps", "queue_size"}
SHARES = ("max_bad_image_share", "dropout", "mlm_probability", "distort_brightness", "distort_contrast", "distort_blur",
          "distort_grayscale", "words_first", "momentum", "alpha", "crop_min_area")
LARGEST = dict.fromkeys(SHARES, 1.0) | {"distort_hue": 0.5, "temp": 0.5, "randaugment_ops": 10, "seed": 2**63 - 1}
CHOICES = {"precision": ("float32", "bf16"), "device": ("auto", "cpu", "cuda"), "mask_text_for": ("all", "mlm"),
           "level": ("plain", "rich")}


def load_config(scale, overrides=(), path=os.path.join(HERE, "config.yaml")):
    """Read the settings of one scale.

    scale: a key of the file's `scales`. overrides: strings "pretrain.batch_size=32", applied last; the value is YAML.
    Every scale of the file is checked, not the chosen one alone. Returns Config; anything wrong is an InputError.
    """
    try:
        document = parse_yaml(pathlib.Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    except ValueError as error:  # or no UTF-8
        raise InputError(f"{path}: not YAML ({error})") from None
    if not (isinstance(document, dict) and set(document) == {"base", "scales"}
            and all(isinstance(part, dict) for part in document.values())):
        raise InputError(f"{path}: wanted the two mappings base and scales, and nothing else")
    scales = {}
    for name, changes in document["scales"].items():
        if not isinstance(changes, dict):
            raise InputError(f"{path}: scales.{name}: wanted a mapping, got {short(changes)}")
        scales[name] = _merge(document["base"], changes, REPLACED_WHOLE)
        config_from_dict(scales[name] | {"scale": name}, f"{path}, scale {name}")
    if scale not in scales:
        raise InputError(f"scale {scale!r} is not in {path}; it has {', '.join(map(str, scales))}")
    settings = scales[scale]
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise InputError(f"command line: {override!r}: wanted key=value, such as pretrain.batch_size=32")
        try:
            value = parse_yaml(text) if text else ""
        except ValueError as error:
            raise InputError(f"command line: {key}: {short(text)} is not YAML ({error}); quote it") from None
        for part in reversed(key.split(".")):
            value = {part: value}
        settings = _merge(settings, value)
    if "scale" in settings:
        raise InputError("command line: scale is no setting; give it as --scale")
    return config_from_dict(settings | {"scale": scale}, "command line")


def config_to_dict(config):
    """Turn a Config into nested dicts of str, int, float, bool, None and lists, which checkpoints hold."""
    return dataclasses.asdict(config)


def config_from_dict(values, source="settings"):
    """Build a Config from nested dicts and check its values; source begins the message of an InputError."""
    try:
        config = _convert(values, Config, "")
        _check_values(config)
    except ValueError as error:  # InputError, or a number of too many digits to be shown
        raise InputError(f"{source}: {error}") from None
    return config


def resolve_scenes(config):
    """Render the embedded scenes, where the settings ask for them, and put their folder in place of "{scenes}"."""
    values = config_to_dict(config)["data"]
    text = json.dumps(values)
    if config.data.scenes is None:
        if "{scenes}" in text:
            keys = ", ".join(f"data.{key}" for key, value in values.items() if "{scenes}" in json.dumps(value))
            raise InputError(f'data.scenes is null, yet paths hold "{{scenes}}": in {keys}; set data.scenes or these')
        return config
    folder = render_scenes(os.path.join(HERE, "data", "scenes"), **dataclasses.asdict(config.data.scenes))
    data = json.loads(text.replace("{scenes}", json.dumps(str(folder))[1:-1]))
    return dataclasses.replace(config, data=_convert(data, DataConfig, "data"))


def parse_yaml(text):
    """The plain value that a YAML text stands for; ValueError says in one line what is wrong with it.

    Refused, beside what is malformed: tags beyond plain values, a key that stands twice in a mapping, and aliases that
    would make more than MAX_YAML_NODES values of it.
    """
    @functools.cache
    def count(node):
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, _ in parts:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"key {short(key.value)} stands there twice", key.start_mark)
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            parts = itertools.chain.from_iterable(parts)
        return 1 + sum(map(count, parts))

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if count(node) > MAX_YAML_NODES:
            raise yaml.YAMLError(f"with its aliases written out it has over {MAX_YAML_NODES:,} values")
        return loader.construct_document(node)
    except Exception as error:  # of a value that does not fit its tag PyYAML raises nearly every kind
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", error)
        problem = " ".join(str(problem).split())
        if not isinstance(error, yaml.YAMLError):
            problem = f"a value that is none of its kind, or nested too deep: {problem}"
        raise ValueError((f"line {mark.line + 1}: " if mark else "") + problem) from None


def short(value):
    """A value as messages show it: cut, however long or deep it is."""
    return reprlib.repr(value)[:60]


def _merge(settings, changes, whole=()):
    """Return settings with changes laid over them, mapping by mapping; those named in whole are replaced, not merged."""
    merged = dict(settings)
    for name, value in changes.items():
        old = merged.get(name)
        both = isinstance(old, dict) and isinstance(value, dict) and name not in whole
        merged[name] = _merge(old, value, whole) if both else value
    return merged


def _convert(value, kind, key):
    """Turn a value from YAML into kind: a dataclass, X | None, list[X], dict[str, X], str, int, float or bool."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, arguments[0], key)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        hints, prefix = typing.get_type_hints(kind), key and key + "."
        for name in value:
            if name not in hints:
                name = str(name)[:100]
                inside = [f"{part}.{name}" for part, hint in hints.items() if name in getattr(hint, "__annotations__", ())]
                near = inside or difflib.get_close_matches(name, hints, n=1, cutoff=0.0)
                raise InputError(f"{prefix}{name} is no setting; the nearest is {' or '.join(prefix + key for key in near)}")
        for name in hints:
            if name not in value:
                raise InputError(f"{prefix}{name} is missing")
        return kind(**{name: _convert(value[name], hint, prefix + name) for name, hint in hints.items()})
    if typing.get_origin(kind) is list and isinstance(value, list):
        return [_convert(item, arguments[0], f"{key}[{position}]") for position, item in enumerate(value)]
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return {_convert(name, str, key): _convert(item, arguments[1], f"{key}.{name}") for name, item in value.items()}
    if kind is float and type(value) in (int, str):  # PyYAML reads 1e-4 as a string
        try:
            value = float(value)
        except (ValueError, OverflowError):
            pass
    if type(value) is not kind or kind is float and not math.isfinite(value):  # type(): a bool is no int here
        wanted = "mapping" if dataclasses.is_dataclass(kind) or arguments[1:] else getattr(kind, "__name__", kind)
        write = f"; write [{short(value)}]" if wanted == "list" and type(value) is str else ""
        raise InputError(f"{key}: wanted {wanted}, got {short(value)}{write}")
    return value


def _check_values(config):
    """Raise InputError for a value outside its limits, or for two that do not fit together."""
    def check_limits(value, key):
        name = key.rpartition(".")[2]
        if isinstance(value, dict):
            for part, item in value.items():
                check_limits(item, f"{key}.{part}" if key else part)
        elif type(value) in (int, float):
            whole = type(value) is int
            smallest = int(whole and name not in MAY_BE_ZERO)
            largest = LARGEST.get(name, 2**31 - 1 if whole else math.inf)
            if not smallest <= value <= largest:
                raise InputError(f"{key}: {value} is out of range; wanted {smallest} to {largest}")
        elif name in CHOICES and value not in CHOICES[name]:
            raise InputError(f"{key}: {value!r} is none of {', '.join(CHOICES[name])}")

    check_limits(config_to_dict(config), "")
    model, method, data = config.model, config.method, config.data
    layer = (model.fusion_layers - 1) // 2 if method.attention_layer is None else method.attention_layer
    uses_attention = method.soft_mask or method.attention_layer is not None
    for good, message in [
        (config.eval_every_steps % config.log_every_steps == 0,
         f"eval_every_steps ({config.eval_every_steps}) must be a multiple of log_every_steps "
         f"({config.log_every_steps}): its figures stand in a line of the log"),
        (model.image_size % model.patch_size == 0, "model.image_size must be a multiple of model.patch_size"),
        (model.vision_width % model.vision_heads == 0, "model.vision_width must be a multiple of model.vision_heads"),
        (model.text_width % model.text_heads == 0, "model.text_width must be a multiple of model.text_heads"),
        (model.vision_width == model.text_width or not method.words_first,
         "method.words_first needs a model.vision_width equal to model.text_width; method.words_first=0 does without"),
        (not config.nlvr2.flip, "nlvr2.flip must be false: its sentences say left and right of the two images"),
        (method.temp >= 0.001, "method.temp must be at least 0.001"),
        *((getattr(config, task).lr > 0, f"{task}.lr must be above 0") for task in TASKS),
        *((getattr(config, task).max_tokens >= least, f"{task}.max_tokens must be at least {least}, or no word is left")
          for task, least in (dict.fromkeys(TASKS, 2) | {"vqa": 3}).items()),  # VQA's answers end in [SEP]
        (layer < model.fusion_layers - 1 or not uses_attention,
         f"method.attention_layer ({layer}) must be below model.fusion_layers - 1 ({model.fusion_layers - 1}): "
         "in the last layer words get no gradient"
         + "; method.soft_mask=false does without" * (method.attention_layer is None)),
        (data.retrieval in data.retrieval_sets,
         f"data.retrieval: {data.retrieval!r} is none of data.retrieval_sets ({', '.join(data.retrieval_sets)})"),
    ]:
        if not good:
            raise InputError(message)


def task_settings(config, task):
    """The section of a task, its image_size filled in; InputError where the task does not fit the model."""
    settings, model = getattr(config, task), config.model
    size = settings.image_size or model.image_size
    if size % model.patch_size:
        raise InputError(f"{task}.image_size ({size}) must be a multiple of model.patch_size ({model.patch_size})")
    if settings.max_tokens > model.max_positions:
        raise InputError(f"{task}.max_tokens must be at most model.max_positions ({model.max_positions})")
    return dataclasses.replace(settings, image_size=size)


def evaluation_max_tokens(config, task):
    """The number of tokens at which a task's texts are cut in evaluation: captions at max_tokens of pre-training [ours;
    ALBEF: retrieval's 30] or retrieval, other texts where the positions end [ALBEF]."""
    cut = task in ("pretrain", "retrieval")
    return getattr(config, task).max_tokens if cut else config.model.max_positions


def pretraining_key(config, task):
    """The setting that lists the files of pretrain or nlvr2_pretrain."""
    own = task == "nlvr2_pretrain" and config.data.nlvr2_pretrain_files is not None
    return "nlvr2_pretrain_files" if own else "pretrain_files"


def task_files(config, task):
    """The Files of a task."""
    data = config.data
    if task in ("pretrain", "nlvr2_pretrain"):
        return Files(data.pretrain_image_root, getattr(data, pretraining_key(config, task)), None, None)
    return data.retrieval_sets[data.retrieval] if task == "retrieval" else getattr(data, task)


def training_files(config, task):
    """The annotation files a task is trained on; InputError where there are none."""
    files = task_files(config, task).train
    if not files:
        key = pretraining_key(config, task) if "pretrain" in task else f"{task}.train"
        key = f"retrieval_sets.{config.data.retrieval}.train" if task == "retrieval" else key
        raise InputError(f"data.{key} names no file at scale {config.scale}; give it a list of annotation files")
    return files


# Keys that a record has, with the types or the very values allowed; None: may be absent [ALBEF; bool as label, str as
# question_id, captions as str and list alike, questions without an answer: ours]. Under the name of a task what it is
# trained on, under TASK_eval what it is evaluated on, where that differs.
FORMATS = {
    "pretrain": {"image": (str,), "caption": (str, list[str])},
    "nlvr2_pretrain": {"image": (str,), "caption": (str, list[str])},
    "retrieval": {"image": (str,), "caption": (str, list[str]), "image_id": (str, int)},
    "retrieval_eval": {"image": (str,), "caption": (str, list[str])},
    "vqa": {"image": (str,), "question": (str,), "answer": (str, list[str]), "dataset": ("vqa", "vg")},
    "vqa_eval": {"image": (str,), "question": (str,), "answer": (str, list[str], None), "dataset": ("vqa", "vg"),
                 "question_id": (int, str)},
    "nlvr2": {"images": (list[str],), "sentence": (str,), "label": ("True", "False", bool)},
    "entailment": {"image": (str,), "sentence": (str,), "label": ENTAILMENT_LABELS},
    "grounding": {"image": (str,), "text": (str,)},
    "grounding_eval": {"image": (str,), "text": (str,), "ref_id": (int,)},
}
TEXT_KEYS = {"vqa": "question", "nlvr2": "sentence", "entailment": "sentence", "grounding": "text"}  # else caption
SHARD_TASKS = ("pretrain", "nlvr2_pretrain")  # their records need no more than an image and a caption
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Records:
    """The records of annotation files and tar shards, in their order: a sequence of dicts, each read when asked for.

    A process holds no record, only where each begins: 8 bytes, which processes share where the index of a JSON file is
    kept. The records stay in the files and in the page cache. Works in forked and in spawned loader workers.
    """

    def __init__(self, files, layout):
        """files: paths of JSON lists of objects and, for SHARD_TASKS, of img2dataset's shards (.tar), or patterns such
        as "data/cc12m/*.tar", whose matches are sorted. layout: a key of FORMATS. InputError names file and record.

        digest: str, of the bytes of the JSON files and of what the indices of the shards hold (all but the pixels).
        left_out: samples of shards without a caption.
        """
        self.files, self.layout = [], layout
        for entry in files:
            found = matches(entry)
            if not found:
                raise InputError(f"{entry}: no file matches; see the paths in data")
            self.files += found
        shown = tqdm(self.files, "annotations", leave=False, disable=None, delay=2)
        self.indices = [open_index(path, layout) for path in shown]
        self.begins = [0, *itertools.accumulate(map(len, self.indices))]
        self.digest = digest_of("".join(index.digest for index in self.indices).encode()).hexdigest()
        self.left_out = sum(index.left_out for index in self.indices)

    def __reduce__(self):
        return Records, (self.files, self.layout)

    def __len__(self):
        return self.begins[-1]

    def __getitem__(self, number):
        if not 0 <= number < len(self):
            raise IndexError(f"record {number} of {len(self)}")
        file = bisect.bisect_right(self.begins, number) - 1
        return self.indices[file].read(number - self.begins[file])


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """Where the records of one annotation file or tar shard lie.

    path, stamp: the file, and its file_stamp; offsets: (records + 1,) int64, bytes, where each record begins in the
    file or, of a shard, in rows: JSON texts of {image: name of the member, offset, size, caption}, end to end, held as
    bytes or in a file; digest, left_out: as of Records.
    """

    path: str
    stamp: tuple[int, int]
    offsets: np.ndarray
    digest: str
    rows: bytes | str | None = None
    left_out: int = 0

    def __len__(self):
        return len(self.offsets) - 1

    def read(self, number):
        """Return the record of this number, a dict; of a shard image is a ShardImage."""
        begin, end = self.offsets[number:number + 2].tolist()
        if isinstance(self.rows, bytes):
            text = self.rows[begin:end]
        else:
            text = read_bytes(self.rows or self.path, None if self.rows else self.stamp, begin, end - begin)
        try:
            record = JSON.raw_decode(text.decode())[0]  # what parts it from the next record comes after it
        except RecursionError:  # which depends on the caller's depth, too
            raise InputError(f"{self.path}: record {number} (from 0): nested too deep") from None
        except ValueError:  # a change of the file itself read_bytes has told
            raise InputError(f"{self.path}: its index is damaged; delete {INDEX_FOLDER}, which is made again") from None
        if self.rows:
            place = record["image"], record["offset"], record["size"]
            record = {"image": ShardImage(self.path, self.stamp, self.digest, *place), "caption": record["caption"]}
        return record

    def save(self, folder):
        """Write what load_index reads. OSError: it cannot be written."""
        with whole_folder(folder) as partial:
            about = {"file": os.path.abspath(self.path), "digest": self.digest, "left_out": self.left_out}
            (partial / "about.json").write_text(json.dumps(about), encoding="utf-8")
            np.save(partial / "offsets.npy", self.offsets)
            if self.rows is not None:
                (partial / "rows").write_bytes(self.rows)


digest_of = functools.partial(hashlib.blake2b, digest_size=16)
JSON = json.JSONDecoder()
SPACE, SEPARATOR = re.compile(r"[ \t\n\r]*"), re.compile(r"[ \t\n\r]*([,\]])")


def matches(entry):
    """The files that an entry of the settings stands for: itself, or the sorted matches of its wildcards * ? [...] **."""
    entry = os.fspath(entry)
    whole = os.path.exists(entry) or not glob.has_magic(entry)
    return [entry] if whole else sorted(glob.glob(entry, recursive=True))


def file_stamp(path):
    """What tells versions of a file apart: size and time of change. path: or a file descriptor. InputError: no file."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise unreadable(path, error) from None
    return status.st_size, status.st_mtime_ns


def unreadable(path, error):
    """The InputError for a file on which the system reports an OSError."""
    return InputError(f"{path}: cannot be read ({error.strerror}); see the paths in data")


class OpenFile:
    """A file descriptor that closes with the object. Forked processes may share it: os.pread moves no position."""

    def __init__(self, path):
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)


@functools.lru_cache(maxsize=256)  # shards are more than the files that a process may have open
def open_file(path, stamp):
    """Open a file for read_bytes, and keep it open while it is in use: one put in its place does not harm this run."""
    return OpenFile(path)


def read_bytes(path, stamp, offset, size):
    """Read size bytes of a file from offset on; InputError where it has another file_stamp than stamp, unless None."""
    try:
        file = open_file(path, stamp)
        if stamp not in (None, file_stamp(file.descriptor)):
            raise InputError(f"{path} has changed since this run began; start the run again")
        return os.pread(file.descriptor, size, offset)
    except OSError as error:
        raise unreadable(path, error) from None


def open_index(path, layout):
    """The Index of a JSON list or a shard: read from INDEX_FOLDER if that holds it, else made; kept there if the file is
    a shard or has INDEX_KEPT_FROM bytes [ours].

    layout: a key of FORMATS, in which every record is checked. InputError: the file is not what it should be.
    """
    is_shard, stamp = path.endswith(".tar"), file_stamp(path)
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; name the files in it, as {os.path.join(path, '*.tar')}")
    if is_shard and layout not in SHARD_TASKS:
        raise InputError(f"{path}: tar shards are for data.pretrain_files alone; give a JSON list")
    if not is_shard:
        read_bytes(path, stamp, 0, 1)  # opened now, before another can take its place
    key = repr((INDEX_VERSION, os.path.abspath(path), stamp, FORMATS[layout]))
    folder = os.path.join(INDEX_FOLDER, digest_of(key.encode()).hexdigest())
    kept = is_shard or stamp[0] >= INDEX_KEPT_FROM
    if kept and os.path.exists(folder):
        return load_index(path, stamp, folder)
    if read_bytes(path, stamp, 0, 6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0")):
        raise InputError(f"{path} is compressed; unpack it first, with gunzip < FILE > NEW, bunzip2 or unxz")
    index = index_shard(path, stamp) if is_shard else index_json(path, stamp, FORMATS[layout])
    if not kept:
        return index
    try:
        index.save(folder)
    except OSError as error:
        print(f"{INDEX_FOLDER}: {error.strerror}; so {path} is indexed at every start", file=sys.stderr)
        return index
    return load_index(path, stamp, folder)


def load_index(path, stamp, folder):
    """The Index of path that Index.save wrote to a folder."""
    rows = os.path.join(folder, "rows") if path.endswith(".tar") else None
    try:
        about = json.loads(pathlib.Path(folder, "about.json").read_bytes())
        # Processes share a map. But it costs a file descriptor, so shards have none: they are many, their offsets few.
        offsets = np.load(os.path.join(folder, "offsets.npy"), mmap_mode=None if rows else "r")
        return Index(path, stamp, offsets, about["digest"], rows, about["left_out"])
    except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: cannot be read ({error}); delete it") from None


def index_json(path, stamp, required):
    """Make the Index of a JSON list of objects; memory: 8 bytes a record and a few times MAX_RECORD_BYTES.

    stamp: file_stamp; required: as in FORMATS. InputError names file and record or line.
    """
    offsets, end, digest = array("q"), 0, digest_of()
    for begin, end, row in scan_list(path, read_chunks(path, stamp, digest)):
        if _record_problem(row, required):
            text = read_bytes(path, stamp, begin, end - begin)  # once more, for its texts as UTF-8
            raise InputError(f"{path}: record {len(offsets)} (from 0): {_record_problem(json.loads(text), required)}")
        offsets.append(begin)
    offsets.append(end)
    return Index(path, stamp, np.frombuffer(offsets, np.int64), digest.hexdigest())


def read_chunks(path, stamp, digest):
    """Yield the text of a UTF-8 file, CHUNK_BYTES at a time, as a character for each byte; feeds the digest."""
    utf8, position = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        while chunk := read_bytes(path, stamp, position, CHUNK_BYTES):
            position += len(chunk)
            utf8.decode(chunk)
            digest.update(chunk)
            yield chunk.decode("latin-1")
        utf8.decode(b"", final=True)
    except UnicodeDecodeError as error:
        place = position - len(error.object) + error.start
        raise InputError(f"{path}: not JSON (no UTF-8 at byte {place})") from None


def scan_list(path, chunks):
    """Yield (begin, end, element) for every element of a JSON list, whose text comes in chunks, all as of read_chunks.

    begin, end: bytes; in the element a byte of its texts is a character, too. InputError: no list, empty, or malformed.
    """
    text, sign, position, passed, lines = "", "", 0, 0, 0  # sign: the last of [ , ] that was met
    for chunk in itertools.chain(chunks, [""]):
        lines, passed = lines + text.count("\n", 0, position), passed + position
        text, position = text[position:] + chunk, 0
        if not sign:
            position = SPACE.match(text, 3 * text.startswith("\xef\xbb\xbf")).end()  # after a byte order mark
            sign = text[position:position + 1]
            if sign not in ("", "["):
                head = text[position:position + 40].encode("latin-1").decode(errors="replace")
                hint = "; of JSON lines make a list, of an object take the list in it" * (sign == "{")
                raise InputError(f"{path}: wanted a list of one or more records, got {head!r}{hint}")
            position += len(sign)
        try:
            while sign != "]":
                position = SPACE.match(text, position).end()
                element, end = JSON.raw_decode(text, position)
                separator = SEPARATOR.match(text, end)
                if not separator:
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, SPACE.match(text, end).end())
                yield passed + position, passed + end, element
                sign, position = separator[1], separator.end()
            position = SPACE.match(text, position).end()
            if position < len(text):
                raise json.JSONDecodeError("Extra data", text, position)
        except json.JSONDecodeError as error:  # or the text goes on in the next chunk
            if sign == "[" and text.startswith("]", position):
                raise InputError(f"{path}: wanted a list of one or more records, got []") from None
            if not chunk or len(text) - position > MAX_RECORD_BYTES:
                limit = f", or a record of over {MAX_RECORD_BYTES:,} bytes" if chunk else ""
                raise InputError(f"{path}: not JSON (line {lines + error.lineno}: {error.msg}){limit}") from None
        except (ValueError, RecursionError) as error:  # too long a number, too deep a list
            raise InputError(f"{path}: not JSON (line {lines + 1} or after: {error})") from None


class ShardHeader(tarfile.TarInfo):
    """A tar header; a long one of the extended kinds is refused, in which Python before 3.11.10 and 3.12.6 searches for
    minutes."""

    @classmethod
    def frombuf(cls, *arguments):
        header = super().frombuf(*arguments)
        if not header.isreg() and header.size > MAX_TAR_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


def index_shard(path, stamp):
    """Make the Index of a tar shard such as img2dataset writes: NAME.jpg with its caption in NAME.txt or NAME.json.

    Only plain files count, no links, nor ._NAME, which macOS adds; names are never used as paths. InputError: no tar file,
    or not a whole one.
    """
    images, captions = {}, {".txt": {}, ".json": {}}
    try:
        with tarfile.open(path, "r:", tarinfo=ShardHeader, encoding="utf-8", errors="backslashreplace") as shard:
            for member in shard:
                if shard.offset < member.offset_data:  # tarfile would go back, and round for ever
                    raise tarfile.ReadError(f"a negative size at byte {member.offset}")
                name, kind = os.path.splitext(member.name)
                found = images if kind.lower() in IMAGE_SUFFIXES else captions.get(kind.lower())
                hidden = os.path.basename(name).startswith("._")
                if found is not None and member.isreg() and not member.issparse() and not hidden:
                    found[name] = {"image": member.name, "offset": member.offset_data, "size": member.size}
            shard.fileobj.seek(shard.offset)
            if shard.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile stops without a word
                raise tarfile.ReadError(f"cut off or damaged at byte {shard.offset}")
            rows, offsets = bytearray(), array("q", [0])
            for name, row in images.items():
                caption = read_caption(shard.fileobj, name, captions)
                if caption:
                    rows += json.dumps(row | {"caption": caption}).encode() + b"\n"
                    offsets.append(len(rows))
    except OSError as error:
        raise unreadable(path, error) from None
    except Exception as error:  # a broken file raises several kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: not a whole tar file ({reason}); fetch it again, or take it from the list") from None
    left_out = len(images) - len(offsets) + 1
    return Index(path, stamp, np.frombuffer(offsets, np.int64), digest_of(rows).hexdigest(), bytes(rows), left_out)


def read_caption(file, name, places):
    """The caption of a shard's sample, from its .txt, else its .json; None where there is none.

    file: the shard, open; places: {".txt": {name: dict(offset, size)}, ".json": ...}.
    """
    for kind in (".txt", ".json"):
        place = places[kind].get(name)
        if place and place["size"] <= MAX_RECORD_BYTES:
            file.seek(place["offset"])
            content = file.read(place["size"])
            try:
                caption = content.decode("utf-8-sig") if kind == ".txt" else json.loads(content)["caption"]
            except (ValueError, RecursionError, TypeError, KeyError):
                continue
            if isinstance(caption, str) and caption.strip():
                return caption.strip()
    return None


def read_json(path):
    """The value a JSON file holds; InputError where it cannot be read."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:  # ValueError: malformed JSON, or no UTF-8
        line = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"{path}: not JSON ({line}{getattr(error, 'msg', error)})") from None


def check_rows(path, rows, required):
    """Return rows, a list of dicts that each hold what is required (as in FORMATS); else InputError."""
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: wanted a list of one or more records, got {short(rows)}")
    for number, row in enumerate(rows):
        problem = _record_problem(row, required)
        if problem:
            raise InputError(f"{path}: record {number} (from 0): {problem}")
    return rows


def _record_problem(row, required):
    """Say what a record lacks, or None."""
    if not isinstance(row, dict):
        return f"wanted an object, got {type(row).__name__}"
    for key, kinds in required.items():
        if key not in row and None not in kinds:
            return f"key {key!r} is missing; it has {', '.join(map(repr, list(row)[:6])) or 'none'}"
        value = row.get(key)
        strings = type(value) is list and list[str] in kinds
        if not (strings or type(value) in kinds or isinstance(value, str | None) and value in kinds):
            wanted = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
            got = short(value) if str in map(type, kinds) else type(value).__name__
            return f"key {key!r}: wanted {wanted}, got {got}"
        if strings and not all(isinstance(item, str) for item in value):
            return f"key {key!r}: wanted a list of strings"
        if key == "images" and len(value) != 2:
            return f"key 'images': wanted two paths, got {len(value)}"
    return None


def image_paths(record, task, files):
    """The paths of a record's images, one or (NLVR2) left and right, below the image_root of files [ALBEF].

    A ShardImage is its own path.
    """
    if isinstance(record.get("image"), ShardImage):
        return [record["image"]]
    root = files.vg_image_root if task == "vqa" and record["dataset"] == "vg" else files.image_root
    names = record["images"] if task == "nlvr2" else [record["image"]]
    if task == "entailment":  # SNLI-VE's names have no suffix
        names = [name if name.lower().endswith(IMAGE_SUFFIXES) else name + ".jpg" for name in names]
    return [join_image_path(root, name) for name in names]


def texts_of(record, task):
    """The raw texts of a record: its captions, or its one question, sentence or expression."""
    value = record[TEXT_KEYS.get(task, "caption")]
    return [valid_text(text) for text in ([value] if isinstance(value, str) else value)]


def answers_of(record):
    """The answers of a VQA record, a list of str; None where it has none, as in a test file, or empty ones alone."""
    answers = record.get("answer") or []
    answers = [valid_text(answer) for answer in ([answers] if isinstance(answers, str) else answers)]
    return answers if any(map(str.strip, answers)) else None


def valid_text(text):
    """A text of JSON with ? for each half of a surrogate pair, as where an emoji was cut: no tokenizer takes these."""
    return text.encode(errors="replace").decode()


def clean_text(text, task, max_words):
    """A raw text as the model reads it."""
    return (softmask.clean_question if task == "vqa" else softmask.clean_caption)(text, max_words)


def label_of(record, task):
    """The class a record is labelled with: NLVR2 0 or 1 (true), entailment as in ENTAILMENT_LABELS. [ALBEF; True: ours]"""
    return int(record["label"] in (True, "True")) if task == "nlvr2" else ENTAILMENT_LABELS.index(record["label"])


@contextlib.contextmanager
def naming(path, number):
    """An InputError within is about this record of the file path, and says so."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: record {number} (from 0): {error}") from None


def join_image_path(image_root, path):
    """Join a record's image path to image_root, below which it must stay, links aside; with "" any path is allowed."""
    full = os.path.join(image_root, path)
    root = os.path.abspath(image_root)
    if image_root and os.path.commonpath([root, os.path.abspath(full)]) != root:
        raise InputError(f"image {path!r} lies outside image_root {image_root!r}; correct the record or the root")
    return full


class ShardImage(typing.NamedTuple):
    """An image inside a tar shard: what stands for its path."""

    shard: str
    stamp: tuple[int, int]  # file_stamp of the shard
    digest: str  # of the shard, as of Index
    name: str
    offset: int
    size: int

    def __str__(self):
        return f"{self.shard}/{self.name}"

    def open(self):
        """Its bytes, as a binary file."""
        if self.size > MAX_SHARD_IMAGE_BYTES:
            raise ValueError(f"{self.size:,} bytes are over {MAX_SHARD_IMAGE_BYTES:,}")
        return io.BytesIO(read_bytes(self.shard, self.stamp, self.offset, self.size))


@contextlib.contextmanager
def open_image(path):
    """Open an image file, a path or ShardImage, without decoding it: a PIL image, for use in a with statement.

    BadImage for anything that goes wrong up to the end of that statement, for over MAX_PIXELS pixels, for cut files and for
    PNGs whose checksums do not fit [ours; ALBEF reads as far as they go].
    """
    def opened():
        return Image.open(path.open() if isinstance(path, ShardImage) else path, formats=IMAGE_FORMATS)

    try:
        with opened() as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are over {MAX_PIXELS:,}")
            if image.format == "PNG":  # its checksums, which decoding leaves out; no other format has any
                with opened() as twin:
                    twin.verify()
            image.filename = ""  # else uncompressed files are mapped: turned TIFFs garbled, the process killed by a cut
            yield image
    except Exception as error:  # decoders raise nearly every kind
        raise BadImage(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from None


def exif_orientation(image):
    """The orientation, 1 to 8, that an opened image's EXIF says; None where it says none, or cannot be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a damaged one raises many kinds
        return None


def turn_size(image, size):
    """size (width, height) of an opened image, as EXIF says it lies in the file or stands upright: one to the other."""
    turned = exif_orientation(image) in (5, 6, 7, 8)
    return size[::-1] if turned and image.format != "TIFF" else size  # Pillow gives a TIFF's upright size


def decode_image(image, least_size=None):
    """Decode an opened image as 8-bit RGB, upright (EXIF) [ours; ALBEF as stored], its first frame where it has several.

    16 bits are scaled to 8 [ours; ALBEF clips], CMYK and palettes converted [ALBEF], floats, and 32 bits of a TIFF, refused
    [ours]. Transparency is dropped, not laid over a background: the colour below shows, often black or white [ALBEF].
    least_size: None, or a width and height that suffice: a JPEG is decoded at 1/2, 1/4 or 1/8 where that has as many.
    """
    if least_size:
        image.draft(None, turn_size(image, least_size))
    exif_orientation(image)  # read and kept, so that EXIF can go: written anew after a turn, it fails on odd tags
    for name in ("exif", "Raw profile type exif"):
        image.info.pop(name, None)
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode == "I" and image.format == "TIFF":
        raise ValueError("its pixels are floats, or of 32 bits: nothing says what is white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert would clip at 255
        image = Image.fromarray(np.clip(np.asarray(image) // 257, 0, 255).astype(np.uint8))
    image.info.pop("transparency", None)  # of a palette convert would warn
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(path):
    """Decode an image file: decode_image of a path or ShardImage. Raises BadImage for anything unreadable."""
    with open_image(path) as image:
        return decode_image(image)


def write_atomically(path, content):
    """Write a file whole or not at all: to a temporary file beside it, to the disk, then renamed.

    content: bytes, or a function that writes to the open binary file it is given.
    """
    partial = f"{path}.partial"
    try:
        with writing(path), open(partial, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):  # that of a full disk would stay in the way
            os.remove(partial)


@contextlib.contextmanager
def writing(path):
    """An OSError within names path: of a full disk it names no file, and torch.save hides it behind one of its own."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, f"cannot be written: {cause.strerror or cause}", str(path)) from None


@contextlib.contextmanager
def whole_folder(folder):
    """A new folder to write into, renamed to `folder` at the end: that is whole by its existence, and processes may race.
    A kill leaves what is unfinished, .NAME-... beside it."""
    folder = pathlib.Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True) as partial:
        with writing(folder):
            yield pathlib.Path(partial)
        os.chmod(partial, 0o755)
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.exists():  # else another process was faster, with the same content
                raise


def hash63(*parts):
    """Hash strings and numbers to 63 bits, the same on every machine: image ids, and seeds of generators [ours]."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1


class TrainingSet(Dataset):
    """Samples of a task, augmented; every draw is seeded by (seed, epoch, index), so no worker's state enters it."""

    def __init__(self, records, task, config):
        """records: Records of this task; task: one of TASKS; config: Config."""
        self.records, self.task, self.seed = records, task, config.seed
        self.settings, self.files = task_settings(config, task), task_files(config, task)
        self.max_words, self.decode_reduced = config.data.max_words, config.data.decode_reduced

    def __len__(self):
        return len(self.records)

    def __getitem__(self, key):
        """Return the sample of key = (epoch, index), or of another record drawn in its place if that one is bad.

        dict: image (3, S, S) uint8, of NLVR2 (2, 3, S, S), left first; text str, cleaned; replaced [(path, reason)] of
        the bad records passed over; and what _targets adds. InputError after MAX_TRIES bad ones.
        """
        epoch, index = key
        purpose = "pair" if self.task == "pretrain" else self.task  # another name would change every run's draws
        generator = torch.Generator().manual_seed(hash63(purpose, self.seed, epoch, index))
        replaced = []
        for _ in range(MAX_TRIES):
            record = self.records[index]
            index = int(torch.randint(len(self.records), (), generator=generator))  # read if this one is bad
            texts = texts_of(record, self.task)
            choice = int(torch.randint(max(len(texts), 1), (), generator=generator))
            try:
                text = clean_text(texts[choice], self.task, self.max_words) if texts else ""
                if not text.strip():
                    raise InputError(f"empty {TEXT_KEYS.get(self.task, 'caption')}")
                targets = self._targets(record)
                images = image_paths(record, self.task, self.files)
                if not self.decode_reduced:  # else decoded once their crops are drawn, since these say how small
                    images = [read_image(path) for path in images]
                flip = self.settings.flip and float(torch.rand((), generator=generator)) < 0.5
                images = [self._augment(image, flip, generator) for image in images]
            except (BadImage, InputError) as error:
                replaced.append((str(record["images"][0] if self.task == "nlvr2" else record["image"]), str(error)))
                bad_image = isinstance(error, BadImage)
                continue
            if flip:
                text = softmask.flip_words(text)
                if "answers" in targets:
                    targets["answers"] = [softmask.flip_words(answer) for answer in targets["answers"]]
            tensors = [TF.pil_to_tensor(image) for image in images]
            image = torch.stack(tensors) if self.task == "nlvr2" else tensors[0]
            return {"image": image, "text": text, "replaced": replaced} | targets
        path, reason = replaced[-1]
        hint = f"is the image_root {self.files.image_root!r} the right one? " * bad_image
        raise InputError(f"{MAX_TRIES} records in a row are bad, the last {path!r} ({reason}); {hint}see "
                         "train.py check")

    def _augment(self, image, flip, generator):
        """Crop and augment a PIL image or, with data.decode_reduced, the image of a path, decoded at no more than its
        crop needs: the same crop, of pixels that differ slightly [ours]."""
        settings, box = self.settings, None
        if self.decode_reduced:
            with open_image(image) as opened:
                width, height = turn_size(opened, opened.size)
                left, top, w, h = softmask.crop_box(width, height, settings.crop_min_area, generator)
                least = [math.ceil(full * settings.image_size / kept) for full, kept in ((width, w), (height, h))]
                image = decode_image(opened, least)
            x, y = image.width / width, image.height / height
            left, top, right, bottom = round(left * x), round(top * y), round((left + w) * x), round((top + h) * y)
            box = left, top, right - left, bottom - top
        return softmask.augment_image(image, settings.image_size, settings.crop_min_area, flip,
                                      settings.randaugment_ops, generator, box)

    def _targets(self, record):
        """What a record is trained towards. [ALBEF]

        dict of VQA: answers, distinct, and answer_weights, the share of the record's answers, without empty ones [ours],
        that are this one, of Visual Genome half of it; of NLVR2 and entailment: label; else image_id: 63 bits of the
        record's image_id in retrieval, else of its path, since files may number their images alike [ours; in grounding
        ALBEF: file name], in a shard of the shard's digest and the name in it [ours].
        """
        if self.task == "vqa":
            answers = [answer for answer in answers_of(record) or [] if answer.strip()]
            if not answers:
                raise InputError("no answer")
            scale = (0.5 if record["dataset"] == "vg" else 1.0) / len(answers)
            distinct = list(dict.fromkeys(answers))
            return {"answers": distinct, "answer_weights": [scale * answers.count(answer) for answer in distinct]}
        if self.task in ("nlvr2", "entailment"):
            return {"label": label_of(record, self.task)}
        if self.task == "retrieval":
            return {"image_id": hash63(str(record["image_id"]))}
        image = record["image"]
        return {"image_id": hash63(f"{image.digest}/{image.name}" if isinstance(image, ShardImage) else image)}


def training_set(config, task):
    """Read the annotation files of a task; returns its TrainingSet."""
    return TrainingSet(Records(training_files(config, task), task), task, config)


class ShuffledBatches:
    """Batch sampler without end: the order of the data depends on the step alone, not on workers or resumption.

    An epoch is a permutation drawn from (seed, epoch), without its last incomplete global batch. A step takes
    world_size * accumulation blocks of batch_size records; block rank * accumulation + i is micro-batch i of a rank.
    """

    def __init__(self, size, batch_size, world_size, rank, accumulation, seed, start_step):
        """size: number of records; start_step: the optimizer step, from 0 on, whose batch comes first."""
        self.size, self.batch_size, self.seed, self.start_step = size, batch_size, seed, start_step
        self.blocks = range(rank * accumulation, (rank + 1) * accumulation)
        self.global_batch = batch_size * accumulation * world_size
        self.steps_per_epoch = size // self.global_batch
        if not size:
            raise InputError("the training files hold no record with an image and a text; see train.py check")
        if not self.steps_per_epoch:
            raise InputError(f"{size} records are fewer than the {self.global_batch} of one step "
                             "(batch_size x accumulation x processes); lower batch_size")

    def __iter__(self):
        """Yield lists of batch_size tuples (epoch, index), accumulation of them a step, for ever."""
        epoch, step = divmod(self.start_step, self.steps_per_epoch)
        while True:
            generator = torch.Generator().manual_seed(hash63("order", self.seed, epoch))
            order = torch.randperm(self.size, dtype=torch.int32, generator=generator)  # half the memory of int64
            for step in range(step, self.steps_per_epoch):
                for block in self.blocks:
                    start = step * self.global_batch + block * self.batch_size
                    yield [(epoch, index) for index in order[start:start + self.batch_size].tolist()]
            epoch, step = epoch + 1, 0


def make_loader(dataset, batch_sampler, tokenizer, max_tokens, num_workers, pin_memory=False):
    """Make a DataLoader of dict(image (B, 3, S, S) uint8, of NLVR2 (B, 2, 3, S, S); input_ids, attention_mask, word_ids
    (B, L) int64; replaced [(path, reason)]; truncated int, texts cut at max_tokens) and, as the task has them:
    image_ids or labels (B,) int64; answer_ids, answer_mask (A, M) int64 of all answers, answer_question (A,) int64, the
    place of an answer's question in the batch, answer_weights (A,) float32."""
    return DataLoader(dataset, batch_sampler=batch_sampler, num_workers=num_workers, persistent_workers=num_workers > 0,
                      collate_fn=functools.partial(_collate, tokenizer=tokenizer, max_tokens=max_tokens),
                      worker_init_fn=outlive_signals, pin_memory=pin_memory)


def outlive_signals(worker):
    """In a loader worker: ignore ctrl-C, and SIGTERM for 20 s, in which the main process, whose group often gets them
    too, ends its step. [ours]"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(20))


def _collate(samples, tokenizer, max_tokens):
    """Make one batch of samples of a TrainingSet."""
    tokens = softmask.tokenize(tokenizer, [sample["text"] for sample in samples], max_tokens)
    batch = {"image": torch.stack([sample["image"] for sample in samples]),
             **{name: tokens[name] for name in ("input_ids", "attention_mask", "word_ids")},
             "replaced": [bad for sample in samples for bad in sample["replaced"]],
             "truncated": tokens["truncated"]}
    for name in ("image_id", "label"):
        if name in samples[0]:
            batch[f"{name}s"] = torch.tensor([sample[name] for sample in samples])
    if "answers" in samples[0]:
        answers = softmask.tokenize(
            tokenizer, [answer for sample in samples for answer in sample["answers"]], max_tokens, end=True)
        counts = torch.tensor([len(sample["answers"]) for sample in samples])
        batch |= {"answer_ids": answers["input_ids"], "answer_mask": answers["attention_mask"],
                  "answer_question": torch.arange(len(samples)).repeat_interleave(counts),
                  "answer_weights": torch.tensor([weight for sample in samples for weight in sample["answer_weights"]])}
    return batch


def load_retrieval(path, image_root, max_words):
    """Read a retrieval evaluation file.

    Returns image paths (list of I, joined to image_root), captions (list of C, cleaned) and the image of each caption
    ((C,) int64, index into the paths).
    """
    images, captions, image_of_caption = [], [], []
    for number, record in enumerate(Records([path], "retrieval_eval")):
        texts = texts_of(record, "retrieval")
        captions += [softmask.clean_caption(text, max_words) for text in texts]
        image_of_caption += [len(images)] * len(texts)
        with naming(path, number):
            if not texts:
                raise InputError("no caption, yet each image is searched by one")
            images.append(join_image_path(image_root, record["image"]))
    image, count = collections.Counter(map(os.path.normpath, images)).most_common(1)[0]
    if count > 1:  # copies would be told apart, and all but one be wrong
        raise InputError(f"{path}: {image} is in {count} records; for retrieval give each image once, with all its captions")
    return images, captions, np.array(image_of_caption, np.int64)


def evaluation_layout(task):
    """The key of FORMATS that a task is evaluated on."""
    return f"{task}_eval" if f"{task}_eval" in FORMATS else task


def evaluation_rows(task, path, config):
    """Yield the records of an evaluation file in its order, each with the row that the task's reader completes.

    row: dict(image, path, or of NLVR2 images, [left, right]; text, cleaned; label, where the task has one).
    """
    files = getattr(config.data, task)
    max_words = MAX_QUESTION_WORDS if task == "vqa" else config.data.max_words
    for number, record in enumerate(Records([path], evaluation_layout(task))):
        with naming(path, number):
            paths = image_paths(record, task, files)
        row = {"images": paths} if task == "nlvr2" else {"image": paths[0]}
        row["text"] = clean_text(texts_of(record, task)[0], task, max_words)
        if "label" in FORMATS[task]:
            row["label"] = label_of(record, task)
        yield record, row


def load_labelled(task, path, config):
    """Rows of an NLVR2 file: dict(images [left, right], text, label: 1 true, 0 false), or of one of SNLI-VE (task
    entailment): dict(image, text, label: place in ENTAILMENT_LABELS)."""
    return [row for _, row in evaluation_rows(task, path, config)]


def load_vqa(path, config):
    """Rows of a VQA file: dict(image, text, question_id, answers list of str or None, kind where the record says it).

    InputError where a question_id stands twice: the evaluation server takes each once.
    """
    rows, seen = [], set()
    for number, (record, row) in enumerate(evaluation_rows("vqa", path, config)):
        question_id = record["question_id"]
        if question_id in seen:
            raise InputError(f"{path}: record {number} (from 0): question_id {question_id!r} was there before")
        seen.add(question_id)
        row |= {"question_id": question_id, "answers": answers_of(record)}
        if isinstance(record.get("kind"), str):
            row["kind"] = record["kind"]
        rows.append(row)
    return rows


def load_answers(path):
    """The answers that VQA ranks, data.vqa.answers: a JSON list of distinct strings."""
    if path is None:
        raise InputError("data.vqa.answers is null; name the JSON list of answers to rank")
    answers = read_json(path)
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"{path}: wanted a JSON list of one or more strings, got {short(answers)}")
    answers = list(map(valid_text, answers))
    answer, count = collections.Counter(answers).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path}: answer {answer!r} is there twice; each must be ranked once")
    return answers


class PlainUnpickler(pickle._Unpickler):  # the one in C makes a table of 64 GB if seven bytes of the file say so
    """Reads lists, dicts, numbers, strings and None; a pickle that names or holds anything else is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}, and only plain values are taken")

    def refuse(self):
        raise pickle.UnpicklingError("it holds tuples, sets or the like, and only plain values are taken")

    # nested tuples take for ever as keys; LONG4 is a number of any length
    dispatch = pickle._Unpickler.dispatch | dict.fromkeys((code[0] for code in (
        pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_TUPLE, pickle.EMPTY_SET,
        pickle.FROZENSET, pickle.BYTEARRAY8, pickle.LONG4, pickle.BUILD)), refuse)


def read_refs(path):
    """Read RefCOCO's refs(unc).p, a pickle of Python 2: a list of dict(ref_id, ann_id, image_id, split, ...).

    No code of the file is run. [ours; ALBEF unpickles whatever it says]
    """
    try:
        if os.path.getsize(path) > MAX_REFS_BYTES:
            raise ValueError(f"over {MAX_REFS_BYTES:,} bytes")
        refs = PlainUnpickler(io.BytesIO(pathlib.Path(path).read_bytes()), encoding="latin1").load()
    except Exception as error:  # a broken pickle raises nearly every kind
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path}: no pickle of RefCOCO's references ({reason})") from None
    return check_rows(path, refs, {"ref_id": (int,), "ann_id": (int,), "image_id": (int,), "split": (str,)})


def load_grounding(path, config):
    """Rows of a RefCOCO+ file, joined with its references, COCO's boxes and the proposals.

    dict: image, text, ref_id int; split val, testA or testB; image_id int; bbox [x, y, width, height]; height, width of
    the image; dets: proposals like bbox, [] where there are none. All in pixels. InputError where a row lacks one.
    """
    files = config.data.grounding
    for key in ("dets", "refs", "instances"):
        if getattr(files, key) is None:
            raise InputError(f"data.grounding.{key} is null; name the file, without which no box can be judged")
    refs = {ref["ref_id"]: ref for ref in read_refs(files.refs)}
    instances, dets = read_json(files.instances), read_json(files.dets)
    if not isinstance(instances, dict) or not isinstance(dets, dict):
        raise InputError(f"{files.instances} and {files.dets}: wanted a JSON object in each")
    required = {"images": {"id": (int,), "height": (int,), "width": (int,)}, "annotations": {"id": (int,)}}
    images, annotations = (
        {item["id"]: item for item in check_rows(f"{files.instances}: {key}", instances.get(key), keys)}
        for key, keys in required.items())
    rows = []
    for number, (record, row) in enumerate(evaluation_rows("grounding", path, config)):
        ref = refs.get(record["ref_id"], {"ann_id": None, "image_id": None})
        annotation, image = annotations.get(ref["ann_id"], {}), images.get(ref["image_id"])
        boxes, name = dets.get(str(ref["image_id"]), []), str((image or {}).get("file_name", record["image"]))
        for good, problem in [
            ("split" in ref, f"ref_id {record['ref_id']} is not in {files.refs}"),
            (is_box(annotation.get("bbox")), f"annotation {ref['ann_id']} has no bbox in {files.instances}"),
            (image and min(image["height"], image["width"]) > 0 and image["height"] * image["width"] <= MAX_PIXELS,
             f"image {ref['image_id']} has no size in {files.instances}, or one over {MAX_PIXELS:,} pixels"),
            (os.path.basename(name) == os.path.basename(record["image"]),
             f"image {ref['image_id']} is {name} in {files.instances}, not {record['image']}"),
            (isinstance(boxes, list) and all(map(is_box, boxes)),
             f"the proposals of image {ref['image_id']} in {files.dets} are no boxes [x, y, width, height]"),
        ]:
            if not good:
                raise InputError(f"{path}: record {number} (from 0): {problem}; are these files of one data set?")
        rows.append(row | {
            "ref_id": record["ref_id"], "split": ref["split"], "image_id": ref["image_id"],
            "bbox": annotation["bbox"][:4], "height": image["height"], "width": image["width"],
            "dets": [box[:4] for box in boxes if min(box[2:4]) > 0]})  # one without an area is never the best [ALBEF]
    if not any(row["dets"] for row in rows):
        raise InputError(f"{files.dets} has no proposal for any image of {path}; its keys are image ids, as '581857'")
    return rows


def is_box(value):
    """Whether a value from JSON begins with x, y, width and height."""
    return (isinstance(value, list) and len(value) >= 4
            and all(type(number) in (int, float) and abs(number) < 1e9 for number in value[:4]))


def box_iou(a, b) -> float:
    """Intersection over union of two boxes, in [0, 1]. [ALBEF] dataset/utils.py computeIoU

    a, b: [x, y, width, height, ...], pixels. A box ends in its last pixel, x + width - 1, so an overlap of one pixel or
    less in either direction is none.
    """
    left, top = max(a[0], b[0]), max(a[1], b[1])
    right, bottom = min(a[0] + a[2], b[0] + b[2]) - 1, min(a[1] + a[3], b[1] + b[3]) - 1
    if left >= right or top >= bottom:
        return 0.0
    intersection = (right - left + 1) * (bottom - top + 1)
    return intersection / (a[2] * a[3] + b[2] * b[3] - intersection)


class ImageDataset(Dataset):
    """Images for evaluation: bicubic resize to a square [ALBEF]; a bad image is an InputError, never replaced."""

    def __init__(self, paths, image_size):
        self.paths, self.image_size = paths, image_size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        """Return (3, S, S) uint8; of a list of n paths (n, 3, S, S)."""
        path = self.paths[index]
        if isinstance(path, list):
            return torch.stack(list(ImageDataset(path, self.image_size)))
        try:
            image = read_image(path)
        except BadImage as error:
            raise InputError(f"{error}; evaluation needs every image: mend it, and the same command goes on") from None
        return TF.pil_to_tensor(softmask.square(image, self.image_size))


def check(config, task):
    """Look through the files of a task and print what they hold.

    Per annotation file: records, images that are missing or empty, and of some drawn at random those that cannot be
    read; texts that are empty or cut, word pieces that the vocabulary lacks; of retrieval an image_id of several images,
    of VQA the share of the answers in the list that is ranked, of grounding the expressions without proposals.
    Pre-training's evaluation is zero-shot retrieval. Returns True when nothing is missing, malformed, too little to train
    on, or so often bad or unknown that training would stop or learn nothing. config: Config after resolve_scenes.
    """
    data, settings, found, total = config.data, task_settings(config, task), True, 0
    evaluated = "retrieval" if task == "pretrain" else task
    trained, evaluation = training_files(config, task), task_files(config, evaluated)
    listed = [(path, task, task_files(config, task), task, settings.max_tokens) for path in trained]
    val = None if task == "pretrain" and not config.eval_every_steps else evaluation.val  # which then is not read
    listed += [(path, evaluated, evaluation, evaluation_layout(evaluated), evaluation_max_tokens(config, task))
               for path in (val, evaluation.test) if path is not None]
    others = {f"{task}.start": None if settings.start in TASKS else settings.start}
    if settings.start is None:
        others |= {"model.vision_weights": config.model.vision_weights, "model.text_weights": config.model.text_weights}
    if task == "pretrain":
        others |= {"data.grounding_boxes": data.grounding_boxes, "data.foils": data.foils}
    for key, path in others.items():
        if path is not None and not (os.path.isfile(path) or key.endswith(".start") and os.path.exists(path)):
            print(f"{key}: {path} is missing, or no file")
            found = False
    try:
        tokenizer = softmask.load_tokenizer(data.tokenizer)
        entries = softmask.vocabulary(tokenizer)
        cased = sum(entry != entry.lower() and entry[:1] != "[" for entry in entries)
        if cased > len(entries) / 10:
            print(f"data.tokenizer: {cased} of {len(entries)} entries have capitals, which no text has here; take an uncased one")
    except ValueError as error:
        print(f"data.tokenizer: {error}")
        tokenizer, found = None, False

    image_of = {}  # of each image_id that retrieval is trained on: the first image
    places = [os.path.realpath(path) for entry in trained for path in matches(entry)]
    for path, count in collections.Counter(places).items():
        if count > 1:
            print(f"{path} is listed {count} times, and trained on as often")
    for number, (path, kind, files, layout, max_tokens) in enumerate(listed):
        training = number < len(trained)
        try:
            records = Records([path], layout)
            images, shared = {}, {}  # images: as keys; those in shards are there, since they are in the index
            for index, record in enumerate(itertools.islice(records, MAX_CHECKED_IMAGES)):
                with naming(path, index):
                    paths = image_paths(record, kind, files)
                images |= dict.fromkeys(image for image in paths if not isinstance(image, ShardImage))
                if layout == "retrieval" and image_of.setdefault(str(record["image_id"]), paths[0]) != paths[0]:
                    shared.setdefault(str(record["image_id"]), paths[0])
            ranked = kind == "vqa" and (files.val or files.test or files.answers)
            answers = set(load_answers(files.answers)) if ranked else None
            rows = load_grounding(path, config) if layout == "grounding_eval" else None
            if layout == "vqa_eval":
                load_vqa(path, config)
            if layout == "retrieval_eval":
                load_retrieval(path, files.image_root, data.max_words)
        except InputError as error:
            print(valid_text(str(error)))
            found = False
            continue
        total += len(records) * training
        missing = [image for image in images if not os.path.isfile(image) or not os.path.getsize(image)]
        state = f"{len(missing)} of {len(images)} images missing or empty" if images else "images in the shards"
        if records.left_out:
            state += f"; {records.left_out} samples left out, without NAME.txt, or NAME.json with a caption"
        print(f"{path}: {len(records)} records; {state}")
        for image in missing[:5]:
            print(f"  missing or empty: {valid_text(image)}")
        found = found and not missing
        if shared:
            image_id, image = next(iter(shared.items()))
            more = f" (and {len(shared) - 1} more)" * (len(shared) > 1)
            print(f"  image_id {short(image_id)} is of {valid_text(image)}, and of {valid_text(image_of[image_id])} above{more}: "
                  "training takes their pairs for one image's")
        generator = torch.Generator().manual_seed(hash63("check", config.seed))
        order = torch.randperm(len(records), generator=generator)[:MAX_CHECKED_TEXTS].tolist()
        sample = [records[index] for index in order]
        lost, unreadable = set(missing), []
        drawn = (image for record in sample for image in image_paths(record, kind, files) if image not in lost)
        opened = list(itertools.islice(drawn, MAX_OPENED_IMAGES))
        for image in opened:
            try:
                read_image(image)
            except BadImage as error:
                unreadable.append(valid_text(str(error)))
        print(f"  of {len(opened)} images opened {len(unreadable)} cannot be read", *list(dict.fromkeys(unreadable))[:5], sep="\n    ")
        found = found and (training or not unreadable)  # training takes others in their place, evaluation needs every image
        texts = [text for record in sample for text in texts_of(record, kind)][:MAX_CHECKED_TEXTS]
        max_words = MAX_QUESTION_WORDS if layout == "vqa_eval" else data.max_words
        lengths = [[len(clean_text(text, kind, sys.maxsize).split()) for text in texts_of(record, kind)] for record in sample]
        words = [length for record in lengths for length in record][:MAX_CHECKED_TEXTS]
        tokens, empty = "", words.count(0) + lengths.count([])
        unusable = sum(record.count(0) / len(record) if record else 1 for record in lengths)  # one of its texts is drawn
        unanswered = [answers_of(record) is None for record in sample if kind == "vqa"]
        if tokenizer is not None and texts:
            tokenized = softmask.tokenize(tokenizer, [clean_text(text, kind, max_words) for text in texts], max_tokens)
            pieces = tokenized["input_ids"][tokenized["word_ids"] >= 0]
            unknown = (pieces == tokenizer.unk_token_id).float().mean().item() if len(pieces) else 0.0
            tokens = f", {tokenized['truncated'] / len(texts):.1%} cut at {max_tokens} tokens; {unknown:.1%} of their word "
            tokens += f"pieces are not in {data.tokenizer}"
            found = found and unknown < 0.5
        cut = sum(count > max_words for count in words)
        print(f"  of {len(texts)} {TEXT_KEYS.get(kind, 'caption')}s {empty} are empty, "
              f"{cut / max(len(texts), 1):.1%} cut at {max_words} words{tokens}")
        if answers is not None:
            known = [answer in answers for record in sample for answer in answers_of(record) or []]
            print(f"  of {len(known)} answers {np.mean(known or [0]):.1%} are in {files.answers}; {sum(unanswered)} of "
                  f"{len(sample)} records have none")
        elif kind == "vqa":
            print(f"  {sum(unanswered)} of {len(sample)} records have no answer")
        bad = max(part * len(records) / max(seen, 1) for part, seen in (
            (len(unreadable), len(opened)), (unusable + sum(unanswered), len(sample))))  # of all records, by the sample
        share = config.max_bad_image_share
        if training and bad > max(share * len(records), 10 if share else 0):
            print(f"  what cannot be read or used is more than max_bad_image_share ({share}) of the records: it would stop training")
            found = False
        if rows is not None:
            print(f"  {sum(not row['dets'] for row in rows)} of {len(rows)} texts have no proposals in {files.dets}")
    if found and total < settings.batch_size * settings.accumulation:
        print(f"{total} records are fewer than the {settings.batch_size * settings.accumulation} of one step of one process; "
              "lower batch_size")
        found = False
    return found


# The embedded scenes [ours]: pictures with captions, drawn from a seed. Any change of the output raises the version.
SCENES_VERSION = 7
DRAW_VERSION = 1  # seeds the draws; raised with SCENES_VERSION alone where scenes and captions may change, too
SIZES = {"small": (0.19, 0.22), "large": (0.34, 0.38)}  # least and greatest part of the picture's side
COLORS = {"red": (225, 35, 40), "green": (35, 165, 55), "blue": (40, 80, 235), "yellow": (250, 225, 45),
          "purple": (155, 45, 195), "orange": (250, 135, 15), "white": (248, 248, 248), "cyan": (60, 220, 230)}
SHAPES = {  # corners in the unit square, y downwards; the circle has none
    "circle": (), "square": ((0, 0), (1, 0), (1, 1), (0, 1)), "triangle": ((0.5, 0), (1, 1), (0, 1)),
    "diamond": ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "cross": ((.33, 0), (.67, 0), (.67, .33), (1, .33), (1, .67), (.67, .67), (.67, 1), (.33, 1), (.33, .67), (0, .67),
              (0, .33), (.33, .33)),
    "star": ((.5, 0), (.63, .36), (1, .38), (.71, .62), (.81, 1), (.5, .79), (.19, 1),
             (.29, .62), (0, .38), (.37, .36))}
TEXTURES = ("striped", "dotted", "checkered")  # an object may be "solid" too, which captions leave unsaid
VALUES = {"color": tuple(COLORS), "shape": tuple(SHAPES), "size": tuple(SIZES), "texture": TEXTURES}
NAMING = {"A": 1, "there is A": 1, "a picture of A": 1, "A and B": 2, "there is A and B": 2, "a picture of A and B": 2,
          "A with B and C": 3}  # templates and their numbers of objects
RELATING = ("A R B", "A is R B", "there is A R B")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
ATTRIBUTES = ("size", "texture", "color", "shape")  # in the order in which a phrase says them
EDGE = 0.04  # free border, as part of the side: a crop to 0.8 of the area (0.89 of the side) leaves most of any object
OVERLAP = 0.15  # rich: greatest overlap of two objects' squares, as part of the smaller one's area
SHADE = 0.5  # brightness of a texture's second tone against the object's colour
SPLIT_WORDS = {"triangle": ("tri", "##angle"), "diamond": ("dia", "##mond"), "yellow": ("yel", "##low"),
               "purple": ("pur", "##ple"), "checkered": ("check", "##ered"), "picture": ("pic", "##ture")}
QUESTIONS = ("color", "shape", "count", "relation")  # kinds
NUMBERS = ("zero", "one", "two", "three", "four")
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}
UNDECIDED = ("heavy", "warm", "old", "soft", "wet", "cheap")  # what no picture shows; the U of a template
# Templates of statements, by their labels: the first where the claim is true, the second where one word makes it false.
# Of three labels each kind of wording has two, equally often: the text alone is right half of the time.
STATEMENTS = {
    ("entailment", "contradiction"): ("there is A", "there is A and B", "A is R B"),
    ("neutral", "contradiction"): ("A is U", "A is as U as B", "A R B is U"),
    ("entailment", "neutral"): ("there is A or an object is U", "an object is U or there is A",
                                "A is R B or an object is U")}
OTHER_WORDS = """a an the is are there it on of and or not no yes true false what color shape size texture how many
    object objects which that in both image images pictures than more fewer as left right above below next to each other
    same different zero one two three four five six seven eight nine has have contains with does do at top bottom side
    pair first second exactly least most only all any some every none background dark light plain solid where seen from
    heavy warm old soft wet cheap"""


@functools.cache
def shape_mask(shape, side):
    """The outline of a shape as an alpha mask, smoothed at its edges.

    Args: shape: a key of SHAPES; side: pixels. Returns: PIL image of mode L, (side, side), 255 = object.
    """
    mask = Image.new("L", (4 * side, 4 * side))
    draw, end = ImageDraw.Draw(mask), 4 * side - 1
    if shape == "circle":
        draw.ellipse((0, 0, end, end), fill=255)
    else:
        draw.polygon([(x * end, y * end) for x, y in SHAPES[shape]], fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)


@functools.cache
def texture_mask(texture, side):
    """Where an object shows its second, darker tone. Arguments and result as in shape_mask."""
    y, x = (np.mgrid[:4 * side, :4 * side] + 0.5) / (4 * side)
    if texture == "striped":
        dark = (y * 3.5) % 1 >= 0.5
    elif texture == "checkered":
        dark = (np.floor(x * 4) + np.floor(y * 4)) % 2 == 1
    else:  # dotted: rows of dots, so placed that one lies in the centre
        dark = ((x * 3) % 1 - 0.5) ** 2 + ((y * 3) % 1 - 0.5) ** 2 < 0.09
    return Image.fromarray(dark.astype(np.uint8) * 255).resize((side, side), Image.Resampling.BOX)


@functools.cache
def gradient_mask(direction, side):
    """A ramp from 0 to 255 over the picture: direction is down, across or radial; result as in shape_mask."""
    mask = Image.radial_gradient("L") if direction == "radial" else Image.linear_gradient("L")
    if direction == "across":
        mask = mask.transpose(Image.Transpose.ROTATE_90)
    return mask.resize((side, side))


def draw_picture(scene):
    """Render a scene from its symbolic description alone. Returns: PIL image of mode RGB, (side, side)."""
    side, background = scene["side"], scene["background"]
    colors = [tuple(color) for color in background["colors"]]
    picture = Image.new("RGB", (side, side), colors[0])
    if background["kind"] == "gradient":
        picture.paste(colors[1], mask=gradient_mask(background["direction"], side))
    elif background["kind"] == "noise":
        noise = Image.frombytes("RGB", (16, 16), random.Random(background["noise_seed"]).randbytes(16 * 16 * 3))
        picture = Image.blend(picture, noise.resize((side, side), Image.Resampling.BILINEAR), 0.15)
    for thing in scene["objects"]:
        pixels, color = thing["pixels"], COLORS[thing["color"]]
        sprite = Image.new("RGB", (pixels, pixels), color)
        if thing["texture"] != "solid":
            sprite.paste(shade(color), mask=texture_mask(thing["texture"], pixels))
        picture.paste(sprite, tuple(thing["corner"]), shape_mask(thing["shape"], pixels))
    return picture


def shade(color):
    """The second tone of a textured object."""
    return tuple(round(SHADE * channel) for channel in color)


def draw_background(rng, level, objects):
    """Draw a background from which every object stands out: {kind, tone: dark|light, colors, ...}."""
    if level == "plain":
        grey = rng.randint(12, 36)
        return {"kind": "plain", "tone": "dark", "colors": [[grey + rng.randint(-4, 4) for _ in "rgb"]]}
    tones = [COLORS[thing["color"]] for thing in objects]
    shades = [shade(COLORS[thing["color"]]) for thing in objects if thing["texture"] != "solid"]
    kind = rng.choice(("plain", "gradient", "noise"))
    while True:
        tone = rng.choice(("dark", "light"))
        colors = []
        for _ in range(1 + (kind == "gradient")):
            grey = rng.randint(25, 80) if tone == "dark" else rng.randint(155, 205)
            colors.append([grey + rng.randint(-20, 20) for _ in "rgb"])
        if all(math.dist(color, other) >= least
               for color in colors for others, least in ((tones, 110), (shades, 40)) for other in others):
            break
    background = {"kind": kind, "tone": tone, "colors": colors}
    if kind == "gradient":
        background["direction"] = rng.choice(("down", "across", "radial"))
    elif kind == "noise":
        background["noise_seed"] = rng.getrandbits(32)
    return background


def overlap(a, b):
    """Area shared by two objects' drawn squares, as part of the smaller one's."""
    width, height = (min(p + a["pixels"], q + b["pixels"]) - max(p, q) for p, q in zip(a["corner"], b["corner"]))
    return max(width, 0) * max(height, 0) / min(a["pixels"], b["pixels"]) ** 2


def place(rng, objects, side, allowed):
    """Give every object a random corner, and the box of what is seen of it; False if that did not come out."""
    edge = round(EDGE * side)
    for count, thing in enumerate(objects):
        for _ in range(20):
            thing["corner"] = [rng.randint(edge, side - edge - thing["pixels"]) for _ in "xy"]
            if all(overlap(thing, other) <= allowed for other in objects[:count]):
                break
        else:
            return False
    masks = [np.asarray(shape_mask(thing["shape"], thing["pixels"])) >= 96 for thing in objects]
    shown = np.zeros((side, side), np.int8)  # number of the object seen at each pixel, from 1
    for number, (thing, mask) in enumerate(zip(objects, masks), 1):
        (x, y), pixels = thing["corner"], thing["pixels"]
        shown[y:y + pixels, x:x + pixels][mask] = number
    for number, (thing, mask) in enumerate(zip(objects, masks), 1):
        seen = shown == number
        if np.count_nonzero(seen) < 0.7 * np.count_nonzero(mask):  # a star fills little of its box
            return False
        (x, right), (y, bottom) = (np.flatnonzero(seen.any(axis))[[0, -1]].tolist() for axis in (0, 1))
        thing["box"] = [x, y, right - x + 1, bottom - y + 1]
        thing["center"] = [(x + right + 1) / 2, (y + bottom + 1) / 2]
    return True


def draw_scene(rng, level, image_size):
    """Draw a scene without rendering it.

    Every object is singled out by its full phrase, and related_pairs is never empty.
    Args: rng: random.Random; level: plain or rich; image_size: side of the picture, pixels.
    Returns: {side, background, objects: [{size, texture, color, shape, pixels, corner, box, center}]}; later objects
        cover earlier ones; box [x, y, width, height] holds what is seen of the object; corner is the drawn square's.
    """
    while True:
        objects = []
        for _ in range(2 if level == "plain" else rng.randint(2, 4)):
            thing = {"size": rng.choice(tuple(SIZES)), "texture": "solid", "color": rng.choice(tuple(COLORS)),
                     "shape": rng.choice(tuple(SHAPES))}
            if level == "rich":
                thing["texture"] = rng.choice(("solid",) + TEXTURES)
                if objects and rng.random() < 0.3:  # like another but for one attribute: a single word tells them apart
                    kept = rng.choice(ATTRIBUTES)
                    thing = {name: (thing if name == kept else objects[-1])[name] for name in ATTRIBUTES}
            objects.append(thing)
        for thing in objects:
            thing["pixels"] = round(rng.uniform(*SIZES[thing["size"]]) * image_size)
        if not all(sum(fits(full_words(thing), other) for other in objects) == 1 for thing in objects):
            continue
        # The same objects are tried in several places: else large objects, hard to place, would be rare.
        for _ in range(50):
            if place(rng, objects, image_size, OVERLAP if level == "rich" else 0) and related_pairs(objects):
                return {"side": image_size, "background": draw_background(rng, level, objects), "objects": objects}


def relation(a, b):
    """Where a lies seen from b: left of, right of, above or below; None where it is not clear.

    A relation holds where the boxes are apart along its axis and the centres differ along it at least 1.5 times as much
    as along the other axis; so at most one holds, and a crop's change of aspect up to 4:3 leaves it the larger.
    """
    offset = [a["center"][axis] - b["center"][axis] for axis in (0, 1)]
    for axis, (before, after) in enumerate((("left of", "right of"), ("above", "below"))):
        apart = abs(offset[axis]) >= (a["box"][2 + axis] + b["box"][2 + axis]) / 2
        if apart and abs(offset[axis]) >= 1.5 * abs(offset[1 - axis]):
            return before if offset[axis] < 0 else after
    return None


def stands(a, name, b):
    """Whether anyone could call "a NAME b" true: centres only, by any amount. What relation says always stands."""
    if name == "next to":
        gap = max(max(a["box"][i], b["box"][i]) - min(a["box"][i] + a["box"][i + 2], b["box"][i] + b["box"][i + 2])
                  for i in (0, 1))
        return a is not b and gap <= min(a["pixels"], b["pixels"]) / 2
    axis, sign = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}[name]
    return sign * (a["center"][axis] - b["center"][axis]) > 0


def related_pairs(objects):
    """Pairs (i, j) of objects in a clear relation; in scenes with textures one of the two has one."""
    textured = [thing["texture"] != "solid" for thing in objects]
    return [(i, j) for i, j in itertools.permutations(range(len(objects)), 2)
            if relation(objects[i], objects[j]) and (textured[i] or textured[j] or not any(textured))]


def fits(words, thing):
    """Whether a noun phrase, as worded ({attribute: word}), fits an object: "red circle" fits a striped one too."""
    return all(thing[name] == word for name, word in words.items())


def full_words(thing):
    """All that can be said of an object: {attribute: word} in the order of a phrase."""
    return {name: thing[name] for name in ATTRIBUTES if thing[name] != "solid"}


def short_words(thing, scene, rng):
    """full_words without one attribute, where the rest still singles the object out.

    Not without more: "a circle" is true of too many pictures, which would then serve as negatives of each other.
    """
    full = full_words(thing)
    for dropped in rng.sample(ATTRIBUTES[:3], 3):
        words = {name: word for name, word in full.items() if name != dropped}
        if words != full and sum(fits(words, other) for other in scene["objects"]) == 1:
            return words
    return full


def phrase(words):
    """{attribute: word} as a noun phrase without its article."""
    return " ".join([*words.values()] + ["object"] * ("shape" not in words))


def make_claim(template, things, words, relations=()):
    """What a caption says, apart from its wording; foils and answers are judged by it, never by text.

    Args: template: words, among them A, B, C for the objects and R, S for the relations; things: the objects meant;
        words: their phrases as {attribute: word}; relations: (name, subject, others), places in `things`.
    """
    return {"template": template, "things": list(things), "words": list(words), "relations": list(relations)}


def say(claim):
    """Word a claim. Returns: the caption, and for each object named the index of its phrase's first word in it."""
    words, starts = [], [0] * len(claim["words"])
    for token in claim["template"].split():
        if token in ("A", "B", "C"):
            text = phrase(claim["words"]["ABC".index(token)])
            if words[-1:] != ["the"]:
                words.append("an" if text[0] in "aeiou" else "a")
            starts["ABC".index(token)] = len(words)
            words += text.split()
        else:
            words += claim["relations"]["RS".index(token)][0].split() if token in ("R", "S") else [token]
    return " ".join(words), starts


def holds(claim, scene):
    """Whether some objects of the scene make the claim true, as loosely read as in stands: where not, it is surely false."""
    candidates = [[thing for thing in scene["objects"] if fits(words, thing)] for words in claim["words"]]
    return any(all(stands(chosen[subject], name, chosen[other])
                   for name, subject, others in claim["relations"] for other in others)
               for chosen in itertools.product(*candidates))


def captions(scene, level, rng):
    """True claims about a scene.

    Returns: plain: two, from either object. Rich: 2 to 4 of different templates; the first is the longest, names two
        or three objects by their full phrases and has a relation.
    """
    objects = scene["objects"]

    def claim(template, chosen, worded, *relations):
        things = [objects[i] for i in chosen]
        return make_claim(template, things, [worded(thing) for thing in things], relations)

    a, b = rng.choice(related_pairs(objects)) if level == "rich" else (0, 1)
    name = relation(objects[a], objects[b])
    if level == "plain":
        return [claim("A R B", (a, b), full_words, (name, 0, (1,))),
                claim("A R B", (b, a), full_words, (OPPOSITE[name], 0, (1,)))]
    longest = [claim(template, (a, b), full_words, (name, 0, (1,))) for template in RELATING]
    three = []
    for c in set(range(len(objects))) - {a, b}:
        further = relation(objects[b], objects[c])
        if further:
            three.append(claim("A R B which is S C", (a, b, c), full_words, (name, 0, (1,)), (further, 1, (2,))))
        if relation(objects[a], objects[c]) == name:
            three.append(claim("A R both B and C", (a, b, c), full_words, (name, 0, (1, 2))))
    claims = [rng.choice(three if three and rng.random() < 0.7 else longest)]

    order = rng.sample(range(len(objects)), len(objects))
    worded = functools.partial(short_words, scene=scene, rng=rng)
    others = [claim(template, order[:count], worded if count > 1 else full_words)
              for template, count in NAMING.items() if count <= len(order)]
    pairs = [(i, j, relation(objects[i], objects[j])) for i, j in rng.sample(related_pairs(objects), 1)]
    pairs += [(i, j, "next to") for i, j in itertools.permutations(order, 2)
              if stands(objects[i], "next to", objects[j])]
    others += [claim(template, (i, j), worded, (word, 0, (1,))) for i, j, word in pairs[:2] for template in RELATING]
    wanted, length = rng.randint(2, 4), len(say(claims[0])[0].split())
    for other in rng.sample(others, len(others)):
        taken = [said["template"] for said in claims]
        if len(claims) < wanted and other["template"] not in taken and len(say(other)[0].split()) < length:
            claims.append(other)
    return claims


def make_foils(claim, scene, rng):
    """Change exactly one word of a claim (or its relation) so that it is false, even loosely read.

    Returns: {kind: claim}, kind among color, shape, size, texture, relation; a kind is absent where the claim says
        nothing of it or no change makes it false. At level rich, whose objects are often alike, a linear model of the words
        alone tells up to 58 % of a kind.
    """
    def false(foil):  # nor may "A R B which is S C" be true where C is what A, not B, stands to
        of_first = foil | {"relations": [(name, 0, others) for name, _, others in foil["relations"]]}
        return not holds(foil, scene) and not holds(of_first, scene)

    foils = {}
    for kind, words in VALUES.items():
        for i in rng.sample(range(len(claim["words"])), len(claim["words"])):
            for word in rng.sample(words, len(words)):
                if kind not in foils and claim["words"][i].get(kind, word) != word:
                    changed = claim["words"][:i] + [claim["words"][i] | {kind: word}] + claim["words"][i + 1:]
                    foil = claim | {"words": changed}
                    if false(foil):
                        foils[kind] = foil
    if not claim["relations"]:
        return foils
    i = rng.randrange(len(claim["relations"]))
    name, subject, others = claim["relations"][i]
    aside = [word for word in OPPOSITE if word not in (name, OPPOSITE[name])]
    # Half of the foils turn the relation by a right angle, where that is plainly false.
    for word in (rng.sample(aside, 2) if rng.random() < 0.5 else []) + [OPPOSITE[name]]:
        relations = claim["relations"][:i] + [(word, subject, others)] + claim["relations"][i + 1:]
        foil = claim | {"relations": relations}
        if "relation" not in foils and false(foil):
            foils["relation"] = foil
    return foils


def draw_split(level, split, count, image_size, seed):
    """Draw the scenes of a split: [(scene, claims, foils)]; claims as from captions, foils of the first ({} in train).

    Scene i is the same whatever `count` and the other splits' counts. Outside train, no first caption is true, even
    loosely, of another scene of the split (so retrieval has one right answer), and each kind of foil exists.
    """
    kinds = 4 + (level == "rich")
    drawn, alike = [], {}
    for index in range(count):
        rng = random.Random(f"{DRAW_VERSION} {seed} {level} {split} {index}")
        for _ in range(1000):
            scene = draw_scene(rng, level, image_size)
            claims, foils = captions(scene, level, rng), {}
            if split == "train":
                break
            foils = make_foils(claims[0], scene, rng)
            # A caption can only be true of scenes that share the objects it names: look among these alone.
            keys = {(thing["size"], thing["color"], thing["shape"]) for thing in scene["objects"]}
            rivals = {number for key in keys for number in alike.get(key, ())}
            if len(foils) == kinds and not any(holds(claims[0], drawn[number][0]) or holds(drawn[number][1][0], scene)
                                               for number in rivals):
                for key in keys:
                    alike.setdefault(key, []).append(index)
                break
        else:
            raise InputError(f"{split}: no {level} scene with a caption of its own after {index}; ask for fewer scenes")
        drawn.append((scene, claims, foils))
    return drawn


def named_boxes(image, claim, scene):
    """The boxes of every noun phrase of a claim, as in boxes_val.json; indices count the words of caption.split()."""
    caption, starts = say(claim)
    objects = []
    for thing, words, start in zip(claim["things"], claim["words"], starts):
        indices = {name: start + place for place, name in enumerate(words)}
        objects.append({"phrase": phrase(words), "word": words["shape"], "word_index": indices["shape"],
                        "attributes": words, "attribute_indices": indices, "box": thing["box"]})
    others = [thing["box"] for thing in scene["objects"] if not any(thing is named for named in claim["things"])]
    return {"image": image, "caption": caption, "objects": objects, "other_boxes": others}


def refer(thing, scene, rng, words, related=False):
    """Single out one object of a scene.

    Args: words: what to say of it, {attribute: word}; related: say also where it lies seen from another object, as is
        done in any case where the words fit more objects than this one.
    Returns: a claim, "the A" or "the A R the B"; None where no relation is clear and true of it alone.
    """
    alike = [other for other in scene["objects"] if other is not thing and fits(words, other)]
    if not alike and not related:
        return make_claim("the A", [thing], [words])
    for other in rng.sample(scene["objects"], len(scene["objects"])):
        name = relation(thing, other)
        if name and not any(stands(rival, name, other) for rival in alike):
            said = [words, short_words(other, scene, rng)]
            return make_claim("the A R the B", [thing, other], said, [(name, 0, (1,))])
    return None


def questions(kind, scene, values, rng):
    """Ask what the picture answers, and one answer alone: [(question, answer)] of a kind of QUESTIONS.

    values: the attributes that are asked for and their words, as VALUES.
    """
    objects = scene["objects"]
    if kind == "count":
        return [(f"how many {PLURALS.get(word, word + ' objects')} are there",
                 NUMBERS[sum(thing[name] == word for thing in objects)]) for name in values for word in values[name]]
    if kind == "relation":
        a, b = (objects[i] for i in rng.choice(related_pairs(objects)))
        words, name = [short_words(thing, scene, rng) for thing in (a, b)], relation(a, b)
        false = rng.choice([other for other in OPPOSITE if not stands(a, other, b)])
        return [(say(make_claim(template, (a, b), words, [(said, 0, (1,))]))[0], answer) for template, said, answer in (
            ("where is the A seen from the B", name, name.split()[0]),
            ("is the A R the B", name, "yes"), ("is the A R the B", false, "no"))]
    found = []
    for thing in objects:
        rest = {name: word for name, word in full_words(thing).items() if name != kind}
        parts = [dict(part) for size in range(len(rest)) for part in itertools.combinations(rest.items(), size + 1)]
        single = [words for words in parts if sum(fits(words, other) for other in objects) == 1]
        claims = [refer(thing, scene, rng, words) for words in single or [rest]]
        found += [(f"what {kind} is {say(claim)[0]}", thing[kind]) for claim in claims if claim]
    return found


def vqa_rows(scenes, values, each, ids, rng):
    """Ask `each` questions about every scene, of kinds in turn; by preference what was asked and answered so least.

    A question is left out where nothing singles an object out (one in a thousand at level rich).
    """
    rows, told = [], collections.Counter()
    for turn in range(each * len(scenes)):
        scene, kind = scenes[turn // each], QUESTIONS[turn % len(QUESTIONS)]
        found = questions(kind, scene, values, rng)
        if found:
            question, answer = min(rng.sample(found, len(found)), key=lambda pair: (told[pair], told[pair[1]]))
            told.update([(question, answer), answer])
            rows.append({"question_id": next(ids), "image": scene["image"], "question": question, "answer": [answer],
                         "dataset": "vqa", "kind": kind})
    return rows


def nlvr2_rows(scenes, values, count, rng):
    """Write sentences about two images: about `count`, in groups of four, half of them true.

    Three of four sentences (kind both) say that both images have something: in half of their rows one image alone decides.
    The others say that the images agree in something, or differ. Each side has one image of either value, and each of
    these stands with both of the other side: so given the sentence and one image, true and false are equally frequent.
    """
    rows, kinds, order = [], [*values, "same"], rng.sample(scenes, len(scenes))
    for _ in range(count):  # more than groups, since a few scenes may not have what is drawn
        number = len(rows) // 4
        if number == count // 4:
            break
        kind = "both" if number % 4 else kinds[number // 4 % len(kinds)]
        named = rng.choice([*values]) if kind == "both" else kind
        named, asked = rng.sample([*values], 2) if kind == "same" else (named, None)
        words = {named: rng.choice(values[named])}
        if asked:
            agree, differ = f"the A has the same {asked} in both images", f"the A has a different {asked} in each image"
        else:
            agree, differ = "A is in both images or none", "exactly one image has A"
            if named != "shape" and rng.random() < 0.5:
                words["shape"] = rng.choice(values["shape"])
        template = "both images have A" if kind == "both" else rng.choice((agree, differ))
        sentence, alike = say(make_claim(template, (), [words]))[0], {}
        for scene in order:
            found = [thing for thing in scene["objects"] if fits(words, thing)]
            if not asked or len(found) == 1:
                alike.setdefault(found[0][asked] if asked else bool(found), []).append(scene)
            pairs = [group[:2] for group in alike.values() if len(group) > 1]
            if len(pairs) == 2:
                chosen = [(left[0], right[1], (left is right) == (template == agree))
                          for left, right in itertools.product(pairs, repeat=2)]
                if kind == "both":
                    has, lacks = alike[True][:2], alike[False][:2]
                    chosen = [(*has, True), (*has[::-1], True), (has[0], lacks[1], False), (lacks[0], has[1], False)]
                rows += [{"images": [left["image"], right["image"]], "sentence": sentence, "label": label, "kind": kind}
                         for left, right, label in chosen]
                for used in pairs[0] + pairs[1]:  # to the end: all images are used about equally often
                    order.remove(used)
                    order.append(used)
                break
    return rows


def entailment_rows(scenes, each, rng):
    """Make `each` statements about every scene, of wordings and labels in turn; see STATEMENTS."""
    rows = []
    for turn in range(each * len(scenes)):
        scene, labels, false = scenes[turn // each], [*STATEMENTS][turn % 3], turn % 2
        statement = None
        while not statement:
            template = rng.choice(STATEMENTS[labels])
            things = [scene["objects"][i] for i in rng.choice(related_pairs(scene["objects"]))]
            relations = [(relation(*things), 0, (1,))] if " R " in template else []
            things = things if " B" in template else things[:1]
            words = [rng.choice((full_words(thing), short_words(thing, scene, rng))) for thing in things]
            claim = make_claim(template.replace("U", rng.choice(UNDECIDED)), things, words, relations)
            foils = [*make_foils(claim, scene, rng).values()] if false else [claim]
            statement = foils and say(rng.choice(foils))[0]
        rows.append({"image": scene["image"].removesuffix(".jpg"), "sentence": statement, "label": labels[false]})
    return rows


def propose(scene, rng):
    """Draw proposals as a detector makes them: [[x, y, width, height, score]] in random order, the score meaningless.

    Each object's box, moved by up to a pixel a side, and two or three of an object's size where there is none.
    """
    proposals, boxes, side = [], [thing["box"] for thing in scene["objects"]], scene["side"]
    for x, y, width, height in boxes:
        moved = [0, 0, 0, 0]
        while box_iou(moved, (x, y, width, height)) < 0.6:
            left, top, right, bottom = (rng.randint(-1, 1) for _ in range(4))
            moved = [x + left, y + top, width - left + right, height - top + bottom]
        proposals.append(moved)
    wanted = len(boxes) + rng.randint(2, 3)
    while len(proposals) < wanted:
        pixels = round(rng.uniform(*SIZES[rng.choice(tuple(SIZES))]) * side)
        other = [rng.randint(0, side - pixels), rng.randint(0, side - pixels), pixels, pixels]
        if all(box_iou(other, box) < 0.5 for box in boxes):
            proposals.append(other)
    return [[*box, round(rng.random(), 3)] for box in rng.sample(proposals, wanted)]


def grounding_rows(split, scenes, refs, instances, rng):
    """Refer to every object of every scene, in train to one, every third time by its relation to another where clear.

    Appends to refs (RefCOCO's list; testA: by attributes alone, testB: by a relation) and instances (COCO's lists).
    """
    rows = []
    for scene in scenes:
        image_id = len(instances["images"]) + 1
        instances["images"].append({"id": image_id, "file_name": scene["image"], "height": scene["side"],
                                    "width": scene["side"]})
        for thing in rng.sample(scene["objects"], 1) if split == "train" else scene["objects"]:
            claim = refer(thing, scene, rng, {"shape": thing["shape"]}, related=True) if len(refs) % 3 == 2 else None
            claim = claim or refer(thing, scene, rng, short_words(thing, scene, rng))
            ref_id, part = len(refs), "AB"[len(claim["relations"])] if split == "test" else ""
            rows.append({"image": scene["image"], "text": say(claim)[0], "ref_id": ref_id})
            refs.append({"ref_id": ref_id, "ann_id": ref_id + 1, "image_id": image_id, "split": split + part})
            instances["annotations"].append({"id": ref_id + 1, "image_id": image_id, "bbox": thing["box"]})
    return rows


def for_fine_tuning(rows):
    """The first half of the training scenes, or of their rows: a task takes minutes on two cores."""
    return rows[: len(rows) // 2]


def write_tasks(folder, scenes, level, seed):
    """Write the files of the downstream tasks; scenes: {split: what write_split returned}."""
    values = {name: words for name, words in VALUES.items() if name != "texture" or level == "rich"}
    content, dets, refs, instances = {}, {}, [], {"images": [], "annotations": []}
    ids = itertools.count()
    for split, drawn in scenes.items():
        train = split == "train"
        drawn = for_fine_tuning(drawn) if train else drawn
        vqa, nlvr2, entailment, grounding = (random.Random(f"{DRAW_VERSION} {seed} {level} {split} {task}")
                                             for task in ("vqa", "nlvr2", "entailment", "grounding"))
        content[f"vqa_{split}"] = vqa_rows(drawn, values, 1 if train else 3, ids, vqa)
        content[f"nlvr2_{split}"] = nlvr2_rows(drawn, values, len(drawn) // 2 if train else len(drawn) * 2, nlvr2)
        content[f"entailment_{split}"] = entailment_rows(drawn, 1 if train else 3, entailment)
        first = len(instances["images"]) + 1
        content[f"grounding_{split}"] = grounding_rows(split, drawn, refs, instances, grounding)
        if not train:
            dets |= {first + number: propose(scene, grounding) for number, scene in enumerate(drawn)}
    for row in content["nlvr2_train"]:
        row["label"] = str(row["label"])  # NLVR2's files come with strings and with booleans
    answers = sorted({row["answer"][0] for split in scenes for row in content[f"vqa_{split}"]})
    for name, rows in (content | {"answer_list": answers, "dets": dets, "instances": instances}).items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))


def scene_vocabulary():
    """BERT's word pieces for the words of the scenes and their tasks; single letters spell plurals and any other word."""
    words = OTHER_WORDS.split() + [*SIZES, *COLORS, *SHAPES, *TEXTURES]
    pieces = [word for word in words if word not in SPLIT_WORDS]
    pieces += [piece for pair in SPLIT_WORDS.values() for piece in pair]
    signs = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces += [*signs, *("##" + sign for sign in signs), *".,?!'-"]
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(pieces)]


def render_scenes(root, level, train, val, test, image_size, seed):
    """Render the embedded scenes once, as JPEG and JSON files in the formats of real data [ours].

    The splits never share a scene: each scene has a generator seeded by (seed, level, split, index). Texts and sets of
    objects recur from split to split, as there are few words; a layout (objects with their places) does not.
    Args: root: folder for all renderings; level: plain or rich; train, val, test: numbers of scenes; image_size:
        side, pixels, 32 or more (64 to tell the textures of small objects apart); seed: int.
    Returns: the folder root/LEVEL-HASH, pathlib.Path, whole by its existence: it is renamed into place at the end, so
        processes may race.
    """
    if level not in CHOICES["level"] or image_size < 32 or min(train, val, test) < 0:
        raise InputError(f"{level} scenes of {image_size} px, {train}, {val}, {test} of them: need one of "
                         f"{', '.join(CHOICES['level'])}, 32 px and counts from 0")
    settings = json.dumps([SCENES_VERSION, level, train, val, test, image_size, seed])
    folder = pathlib.Path(root) / f"{level}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    if folder.exists():
        return folder
    with whole_folder(folder) as partial:
        scenes = {split: write_split(partial, split, draw_split(level, split, count, image_size, seed))
                  for split, count in (("train", train), ("val", val), ("test", test))}
        write_tasks(partial, scenes, level, seed)
        (partial / "vocab.txt").write_text("\n".join(scene_vocabulary()) + "\n", encoding="utf-8")
    return folder


def write_split(folder, split, drawn):
    """Write the pictures of one split, given as from draw_split, and its captions; returns the rows of its scenes."""
    (folder / "images" / split).mkdir(parents=True)
    images = [f"images/{split}/{index:05d}.jpg" for index in range(len(drawn))]
    rows = {"scenes": [{"image": image} | scene for image, (scene, _, _) in zip(images, drawn)]}
    for image, (scene, _, _) in zip(images, drawn):
        draw_picture(scene).save(folder / image, quality=90, subsampling=0)
    texts = [[say(claim)[0] for claim in claims] for _, claims, _ in drawn]
    if split == "train":
        rows["pretrain"] = [{"image": image, "caption": said} for image, said in zip(images, texts)]
        rows["retrieval"] = [row | {"image_id": i} for i, row in enumerate(for_fine_tuning(rows["pretrain"]))]
    else:
        rows["retrieval"] = [{"image": image, "caption": said[:1]} for image, said in zip(images, texts)]
        rows["boxes"] = [named_boxes(image, claims[0], scene) for image, (scene, claims, _) in zip(images, drawn)]
        rows["foils"] = [{"image": image, "caption": said[0], "foil": say(foil)[0], "kind": kind}
                         for image, said, (_, _, foils) in zip(images, texts, drawn) for kind, foil in foils.items()]
    for name, content in rows.items():
        file = "pretrain.json" if name == "pretrain" else f"{name}_{split}.json"
        (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return rows["scenes"]
