"""data.py: settings, annotation files, images and batches, on hand-made files; every error names its file or key."""
import bz2
import dataclasses
import gzip
import io
import json
import lzma
import math
import os
import pickle
import resource
import struct
import sys
import tarfile
import warnings
import zlib

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import data
import softmask

VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue dog cat left right of the on".split()
NO_CROP = [f"{task}.crop_min_area=1.0" for task in data.TASKS]


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def write_config(path, change):
    """Copy the project's config.yaml to path with a change applied to the parsed document."""
    with open(f"{data.HERE}/config.yaml", encoding="utf-8") as file:
        document = yaml.safe_load(file)
    change(document)
    path.write_text(yaml.safe_dump(document), encoding="utf-8")


@pytest.fixture
def tokenizer(tmp_path):
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(VOCABULARY) + "\n")
    return softmask.load_tokenizer(str(vocabulary))


@pytest.fixture
def pairs(tmp_path):
    """Twelve images of noise, the left half brighter, and their records; the config is tiny and never crops."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(12):
        pixels = rng.integers(0, 100, (20, 24, 3), dtype=np.uint8)
        pixels[:, :12] += 150
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        captions = ["A red dog, left of the cat", "A red dog, left of a dog"]
        rows.append({"image": f"{number}.png", "caption": captions})
    roots = [f"data.{key}image_root={tmp_path}" for key in ("pretrain_", "vqa.", "nlvr2.", "entailment.", "grounding.")]
    config = data.load_config("scenes", [
        "data.scenes=null", "model.image_size=16", *NO_CROP, *roots, *(f"{task}.batch_size=2" for task in data.TASKS), f"data.vqa.vg_image_root={tmp_path}/vg",
        f"data.retrieval_sets.scenes.image_root={tmp_path}"])
    return rows, config


def make_dataset(rows, config, path, seed=0, task="pretrain"):
    same = path.exists() and json.loads(path.read_text()) == rows  # it may be in use: not written again
    records = data.Records([str(path) if same else write_json(path, rows)], task)
    return data.TrainingSet(records, task, dataclasses.replace(config, seed=seed))


# Settings

@pytest.mark.parametrize("scale", ["scenes", "flickr8k", "paper"])
def test_every_scale_loads_and_survives_the_checkpoint(scale):
    config = data.load_config(scale)
    assert config.scale == scale
    assert data.config_from_dict(json.loads(json.dumps(data.config_to_dict(config)))) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1


def test_scales_merge_but_replace_scenes_and_retrieval_sets():
    config = data.load_config("flickr8k")
    assert (config.model.vision_width, config.model.vision_layers) == (384, 12)  # one from the scale, one from base
    assert list(config.data.retrieval_sets) == ["flickr8k"]
    assert list(data.load_config("paper").data.retrieval_sets) == ["coco", "flickr30k"]


def test_sections_of_tasks_inherit_by_merge_keys_and_override_key_by_key():
    paper, scenes = data.load_config("paper"), data.load_config("scenes")
    settings = {task: data.task_settings(paper, task) for task in data.TASKS}
    assert list(settings) == ["pretrain", "retrieval", "vqa", "nlvr2_pretrain", "nlvr2", "entailment", "grounding"]
    for name, wanted in {  # ALBEF's configs/*.yaml, in the order above
        "image_size": [256, 384, 384, 256, 384, 384, 384], "max_tokens": [25, 30, 25, 25, 64, 64, 30],
        "epochs": [30, 5, 8, 1, 10, 5, 5], "batch_size": [64, 32, 32, 64, 16, 32, 32],
        "lr": [1e-4, 1e-5, 2e-5, 2e-5, 2e-5, 2e-5, 1e-5], "min_lr": [1e-5, 1e-6, 1e-6, 1e-5, 1e-6, 1e-6, 1e-6],
        "warmup_steps": [2000, 100, 400, 100, 100, 100, 100], "crop_min_area": [0.2, 0.5, 0.5, 0.2, 0.5, 0.5, 1.0],
        "ramp_alpha": [True] * 5 + [False, True], "flip": [True] * 4 + [False, True, True],
        "start": [None, "pretrain", "pretrain", "pretrain", "nlvr2_pretrain", "pretrain", "pretrain"],
    }.items():
        assert [getattr(part, name) for part in settings.values()] == wanted, name
    assert scenes.vqa.weight_decay == 0.02 and scenes.nlvr2.start == "nlvr2_pretrain" and not scenes.nlvr2.flip
    assert scenes.vqa.image_size is None and data.task_settings(scenes, "vqa").image_size == 64
    assert data.load_config("scenes", ["vqa.lr=1"]).entailment == scenes.entailment


def test_settings_of_a_task_must_fit_the_model():
    config = data.load_config("paper", ["model.patch_size=32", "model.max_positions=40", "nlvr2.image_size=100"])
    assert data.task_settings(config, "retrieval").image_size == 384
    with pytest.raises(data.InputError, match=r"nlvr2.image_size \(100\) must be a multiple of .*patch_size \(32\)"):
        data.task_settings(config, "nlvr2")
    with pytest.raises(data.InputError, match=r"entailment.max_tokens must be at most model.max_positions \(40\)"):
        data.task_settings(config, "entailment")


@pytest.mark.parametrize("task, key", [
    ("pretrain", "data.pretrain_files"), ("nlvr2_pretrain", "data.pretrain_files"),
    ("nlvr2_pretrain", "data.nlvr2_pretrain_files"), ("vqa", "data.vqa.train"),
    ("retrieval", "data.retrieval_sets.flickr8k.train"), ("grounding", "data.grounding.train")])
def test_a_task_without_files_says_which_key_to_set(task, key):
    config = data.load_config("flickr8k", [key + "=[]"])
    for call in (data.training_set, data.check):
        with pytest.raises(data.InputError, match=f"{key} names no file at scale flickr8k"):
            call(config, task)


def test_overrides():
    config = data.load_config("scenes", [
        "pretrain.batch_size=7", "pretrain.lr=1e-4", "pretrain.min_lr=0", "method.attention_layer=null",
        "model.dropout=1e-1", "data.pretrain_files=[a.json, b.json]", "data.retrieval_sets.scenes.image_root=/x",
        "data.scenes.train=500", "data.pretrain_image_root="])
    assert (config.pretrain.batch_size, config.pretrain.lr, config.pretrain.min_lr) == (7, 1e-4, 0.0)
    assert type(config.pretrain.min_lr) is float and config.model.dropout == 0.1
    assert config.method.attention_layer is None
    assert config.data.pretrain_files == ["a.json", "b.json"] and config.data.pretrain_image_root == ""
    assert config.data.retrieval_sets["scenes"].image_root == "/x"
    assert config.data.retrieval_sets["scenes"].val == "{scenes}/retrieval_val.json"
    assert (config.data.scenes.train, config.data.scenes.val) == (500, 1000)
    assert data.load_config("scenes", ["data.scenes=null"]).data.scenes is None


@pytest.mark.parametrize("override, message", [
    ("pretrain.batchsize=3", "pretrain.batchsize is no setting; the nearest is pretrain.batch_size"),
    ("modle.dropout=0.1", "modle is no setting; the nearest is model"),
    ("batch_size=3", "batch_size is no setting; the nearest is pretrain.batch_size or retrieval.batch_size or vqa.batch_size"),
    ("data.scenes.trian=3", "data.scenes.train"),
    ("data.retrieval_sets.new.image_root=/x", "data.retrieval_sets.new.train is missing"),
    ("pretrain.batch_size=3.0", "pretrain.batch_size: wanted int, got 3.0"),
    ("pretrain.batch_size=true", "pretrain.batch_size: wanted int, got True"),
    ("pretrain.lr=fast", "pretrain.lr: wanted float, got 'fast'"),
    ("pretrain.lr=.nan", "pretrain.lr: wanted float, got nan"),
    ("pretrain.epochs=null", "pretrain.epochs: wanted int, got None"),
    ("method.soft_mask=1", "method.soft_mask: wanted bool, got 1"),
    ("data.pretrain_files=[a, 1]", r"data.pretrain_files\[1\]: wanted str, got 1"),
    ("data.pretrain_files=a.json", r"data.pretrain_files: wanted list, got 'a.json'; write \['a.json'\]"),
    ("model=3", "model: wanted mapping, got 3"),
    ("seed.x=3", "seed: wanted int"),
    ("seed", "'seed': wanted key=value"),
    ("seed=[1", r"seed: '\[1' is not YAML"),
    ("scale=paper", "give it as --scale"),
    ("precision=fp16", "precision: 'fp16' is none of float32, bf16"),
    ("vqa.lr=0", "vqa.lr must be above 0"),
    ("method.mask_text_for=itc", "method.mask_text_for: 'itc' is none of all, mlm"),
    ("data.scenes.level=hard", "data.scenes.level: 'hard' is none of plain, rich"),
    ("pretrain.batch_size=0", "pretrain.batch_size: 0 is out of range"),
    ("seed=-1", "seed: -1 is out of range"),
    ("seed=9223372036854775808", "seed: 9223372036854775808 is out of range"),
    ("seed=0x" + "f" * 5000, "too many digits|4300 digits"),
    ("seed=" + "x" * 99, "seed: wanted int, got 'x{5,40}...x{5,40}'"),
    ("x" * 500 + "=1", "x{100} is no setting"),
    *((f"{section}.{name}=1.5", f"{section}.{name}: 1.5 is out of range; wanted 0 to 1.0") for section, name in [
        ("model", "dropout"), ("method", "momentum"), ("method", "alpha"), ("method", "words_first"),
        ("method", "mlm_probability"), ("method", "distort_brightness"), ("method", "distort_contrast"),
        ("method", "distort_blur"), ("method", "distort_grayscale")]),
    ("max_bad_image_share=1.5", "max_bad_image_share: 1.5 is out of range; wanted 0 to 1.0"),
    ("method.temp=0.0", "method.temp"),
    ("model.image_size=65", "model.image_size must be a multiple of model.patch_size"),
    ("model.vision_heads=3", "model.vision_width must be a multiple of model.vision_heads"),
    ("model.text_heads=3", "model.text_width must be a multiple of model.text_heads"),
    ("vqa.batchsize=3", "vqa.batchsize is no setting; the nearest is vqa.batch_size"),
    ("vqa.ramp_alpha=1", "vqa.ramp_alpha: wanted bool, got 1"),
    ("grounding.crop_min_area=1.1", "grounding.crop_min_area: 1.1 is out of range"),
    ("nlvr2.flip=true", "nlvr2.flip must be false"),
    ("data.vqa.train=a.json", "data.vqa.train: wanted list, got 'a.json'"),
    ("data.grounding.ref=x", "data.grounding.ref is no setting; the nearest is data.grounding.refs"),
    ("eval.answers_top_k=0", "eval.answers_top_k: 0 is out of range"),
    ("method.attention_layer=2", r"method.attention_layer \(2\) must be below model.fusion_layers - 1 \(2\)"),
    ("model.fusion_layers=1", r"method.attention_layer \(0\) must be below .* no gradient; method.soft_mask=false does without"),
    ("grounding.max_tokens=1", "grounding.max_tokens must be at least 2"),
    ("vqa.max_tokens=2", "vqa.max_tokens must be at least 3"),
    ("method.queue_size=2147483648", "method.queue_size: 2147483648 is out of range; wanted 0 to 2147483647"),
    ("data.retrieval=coco", r"data.retrieval: 'coco' is none of data.retrieval_sets \(scenes\)"),
])
def test_bad_override_names_its_key(override, message):
    with pytest.raises(data.InputError, match=message) as error:
        data.load_config("scenes", [override])
    assert "command line" in str(error.value) and "\n" not in str(error.value)


def test_paths_that_need_the_scenes_are_named_where_there_are_none():
    config = data.load_config("scenes", ["data.scenes=null", "data.pretrain_files=[a.json]", "data.foils=null"])
    message = "hold .{scenes}.: in data.tokenizer, data.nlvr2_pretrain_files, .*, data.grounding_boxes; set"
    with pytest.raises(data.InputError, match=message):
        data.resolve_scenes(config)


def test_last_fusion_layer_is_allowed_without_soft_mask():
    data.load_config("scenes", ["model.fusion_layers=1", "method.soft_mask=false"])


def test_the_word_embeddings_that_read_the_patches_have_their_width():
    data.load_config("scenes", ["method.words_first=0", "model.vision_width=64"])
    with pytest.raises(data.InputError, match="method.words_first needs a model.vision_width equal to model.text_width"):
        data.load_config("scenes", ["model.vision_width=64"])


LAUGHS = "lol"
for _ in range(9):
    LAUGHS = [LAUGHS] * 10  # a hundred bytes a level in YAML or a pickle, 10 ** 9 values written out
SHARED_KEYS = {"seed": 1}
for _ in range(8):
    SHARED_KEYS = {"<<": [SHARED_KEYS] * 10}


@pytest.mark.parametrize("text, message", [
    (yaml.safe_dump({"base": {}, "scales": {"x": LAUGHS}}), "over 100,000 values"),
    (yaml.safe_dump({"base": SHARED_KEYS, "scales": {}}).replace("'<<'", "<<"), "over 100,000 values"),
    ("base: " + "[" * 3000, "nested too deep"), ("base: &a [*a]", "nested too deep"),
    ("base:\n  seed: 1\n  seed: 2", "line 3: key 'seed' stands there twice"), ("base: \0", "unacceptable character"),
    ("base: !!python/object/apply:os.system [ls]", "line 1: could not determine a constructor"),
    *((f"base: {value}", "a value that is none of its kind") for value in (
        "!!timestamp abc", "!!int ''", "!!int abc", "!!bool abc", "!!float ''", "2001-99-99", "1" * 5000)),
])
def test_yaml_that_no_config_needs_is_refused(tmp_path, text, message):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(data.InputError, match=f"config.yaml: not YAML .*{message}") as error:
        data.load_config("scenes", path=tmp_path / "config.yaml")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    if "\n" not in text:
        with pytest.raises(data.InputError, match=f"command line: seed: .* is not YAML .*{message}"):
            data.load_config("scenes", ["seed=" + text.removeprefix("base: ")])


def test_bad_config_file_names_file_scale_and_key(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(data.InputError, match=r"scale 'huge' is not in .*config.yaml; it has scenes, flickr8k, paper"):
        data.load_config("huge")
    write_config(path, lambda document: document["scales"]["paper"]["model"].update(vision_weight="x"))
    with pytest.raises(data.InputError, match="yaml, scale paper: model.vision_weight is no .* model.vision_weights"):
        data.load_config("scenes", path=path)
    write_config(path, lambda document: document["base"]["pretrain"].pop("min_lr"))
    with pytest.raises(data.InputError, match="config.yaml, scale flickr8k: pretrain.min_lr is missing"):
        data.load_config("scenes", path=path)
    write_config(path, lambda document: document["scales"].update(tiny=None))
    with pytest.raises(data.InputError, match="config.yaml: scales.tiny: wanted a mapping, got None"):
        data.load_config("scenes", path=path)
    write_config(path, lambda document: document.pop("scales"))
    with pytest.raises(data.InputError, match="config.yaml: wanted the two mappings base and scales"):
        data.load_config("scenes", path=path)
    path.write_text("base:\n  seed: [1\n  model: 2\n")
    with pytest.raises(data.InputError, match="config.yaml: not YAML .line 3: "):
        data.load_config("scenes", path=path)
    with pytest.raises(data.InputError, match="none.yaml: cannot be read"):
        data.load_config("scenes", path=tmp_path / "none.yaml")


def test_exponent_without_a_dot_is_a_float_in_the_file_too(tmp_path):
    path = tmp_path / "config.yaml"
    write_config(path, lambda document: document["base"]["pretrain"].update(weight_decay="2e-2"))
    assert data.load_config("paper", path=path).pretrain.weight_decay == 0.02


def test_resolve_scenes(monkeypatch, tmp_path):
    calls = []

    def render_scenes(root, level, train, val, test, image_size, seed):
        calls.append((root, level, train, val, test, image_size, seed))
        return tmp_path / 'a "quoted" folder'

    monkeypatch.setattr(data, "render_scenes", render_scenes, raising=False)
    config = data.resolve_scenes(data.load_config("scenes", ["data.scenes.train=3"]))
    folder = str(tmp_path / 'a "quoted" folder')
    assert calls == [(f"{data.HERE}/data/scenes", "plain", 3, 1000, 1000, 64, 0)]
    assert config.data.tokenizer == f"{folder}/vocab.txt" and config.data.pretrain_files == [f"{folder}/pretrain.json"]
    assert config.data.retrieval_sets["scenes"].test == f"{folder}/retrieval_test.json"
    assert config.data.grounding.refs == f"{folder}/refs(unc).p"
    assert "{scenes}" not in json.dumps(data.config_to_dict(config))
    paper = data.load_config("paper")
    assert data.resolve_scenes(paper) == paper and len(calls) == 1
    with pytest.raises(data.InputError, match="data.scenes is null"):
        data.resolve_scenes(data.load_config("scenes", ["data.scenes=null"]))


# Annotation files and images

def test_records_hold_what_the_files_hold(tmp_path):
    rows = [{"image": "a.jpg", "caption": "Café \u2014 ünï", "extra": {"x": [1, 2.5, None]}},
            {"image": "b", "caption": ["x", ""]}]
    files = [write_json(tmp_path / "1.json", rows), str(tmp_path / "2.json")]
    (tmp_path / "2.json").write_text(json.dumps(rows[:1], ensure_ascii=False), encoding="utf-8-sig")
    records = data.Records(files, "pretrain")
    assert len(records) == 3 and list(records) == rows + rows[:1]
    assert list(pickle.loads(pickle.dumps(records))) == list(records)


@pytest.mark.parametrize("text, message", [
    ('[{"image": "a",\n "caption": }]', r"bad.json: not JSON \(line 2: "),
    ("[" * 100_000, "bad.json: not JSON"),
    ('{"image": "a"}', "bad.json: wanted a list"),
    ("[]", "bad.json: wanted a list of one or more records"),
    ('[{"image": "a", "caption": "x"}, 3]', r"bad.json: record 1 \(from 0\): wanted an object, got int"),
    ('[{"image": "a"}]', r"bad.json: record 0 \(from 0\): key 'caption' is missing; it has 'image'"),
    ('{"image": "a", "caption": "x"}\n', "got .*; of JSON lines make a list, of an object take the list in it"),
    ('[{"image": 3, "caption": "x"}]', r"record 0 \(from 0\): key 'image': wanted str, got int"),
    ('[{"image": "a", "caption": null}]', "key 'caption': wanted str or list, got NoneType"),
    ('[{"image": "a", "caption": ["x", 1]}]', "key 'caption': wanted a list of strings"),
    ('\n[\n{"image": "a", "caption": "x"}\n{"image"', r"bad.json: not JSON \(line 4: Expecting ',' delimiter"),
    ('[{"image": "a", "caption": "x"},\n {"image": "b"', r"bad.json: not JSON \(line 2: "),
    ('[{"image": "a", "caption": "x"}', r"bad.json: not JSON \(line 1: "),
    ('[{"image": "a", "caption": "x"},]', r"bad.json: not JSON \(line 1: "),
    ('[{"image": "a", "caption": "x"}]\n[]', r"bad.json: not JSON \(line 2: Extra data"),
    ('[{"image": "a", "caption": "x", "n": 1' + "0" * 5000 + "}]", r"bad.json: not JSON \(line 1 "),
    ("", r"bad.json: not JSON \(line 1: Expecting value"),
    (" \n [ \n ]", "bad.json: wanted a list of one or more records, got \\[\\]"),
    ("A photograph.\n" * 9, "bad.json: wanted a list of one or more records, got 'A ph"),
])
def test_bad_annotation_file_names_file_and_record(tmp_path, monkeypatch, text, message):
    (tmp_path / "bad.json").write_text(text)
    for chunk_bytes in (data.CHUNK_BYTES, 5):
        monkeypatch.setattr(data, "CHUNK_BYTES", chunk_bytes)
        with pytest.raises(data.InputError, match=message) as error:
            data.Records([str(tmp_path / "bad.json")], "pretrain")
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


TRICKY = [
    {"image": "a.jpg", "caption": 'said "]", \\ {[,\u2028 \U0001f600 caf\u00e9 \u00a0 \u0085',
     "extra": [[{}, [1e5, -0.5]], {"]": {"[": None}}]},
    {"image": "b", "caption": ["x", "", "\n\t\x7f \u4e2d\u6587"], "caf\u00e9": True}, {"image": "", "caption": []},
]


@pytest.mark.parametrize("chunk_bytes", [3, 4, 5, 7, 16, 61, 1 << 20])
@pytest.mark.parametrize("layout", [{}, {"ensure_ascii": False}, {"indent": 3}, {"separators": (",", ":")}])
def test_records_are_what_json_load_gives_wherever_chunks_end(tmp_path, monkeypatch, chunk_bytes, layout):
    monkeypatch.setattr(data, "CHUNK_BYTES", chunk_bytes)
    for mark in ("", "\ufeff"):
        (tmp_path / "a.json").write_text(mark + " \r\n" + json.dumps(TRICKY * 2, **layout) + "\n ", encoding="utf-8")
        assert list(data.Records([str(tmp_path / "a.json")], "pretrain")) == TRICKY * 2


def test_bad_records_show_their_texts_and_long_ones_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK_BYTES", 5)
    path = tmp_path / "a.json"
    path.write_text('[{"image": "a", "sentence": "x", "label": "n\u00e9"}]', encoding="utf-8")
    with pytest.raises(data.InputError, match="got 'n\u00e9'"):
        data.Records([str(path)], "entailment")
    path.write_bytes('[{"image": "\u00e9\u00e9", "caption": "x"}, '.encode() + b"\xe9]")
    with pytest.raises(data.InputError, match=r"a.json: not JSON \(no UTF-8 at byte 36\)"):
        data.Records([str(path)], "pretrain")
    path.write_bytes(b'[{"image": "a", "caption": "x\xc3')
    with pytest.raises(data.InputError, match=r"a.json: not JSON \(no UTF-8 at byte 29\)"):
        data.Records([str(path)], "pretrain")
    monkeypatch.setattr(data, "MAX_RECORD_BYTES", 50)
    write_json(path, [{"image": "a", "caption": "x"}, {"image": "a", "caption": "x" * 99}])
    with pytest.raises(data.InputError, match=r"a.json: not JSON \(line 1: .*\), or a record of over 50 bytes"):
        data.Records([str(path)], "pretrain")


@pytest.mark.parametrize("name", ["a.json", "a.tar"])
def test_compressed_files_are_told_from_broken_ones(name, tmp_path):
    for compress in (gzip.compress, bz2.compress, lzma.compress):
        (tmp_path / name).write_bytes(compress(b"[]"))
        with pytest.raises(data.InputError, match=f"{name} is compressed; unpack it first"):
            data.Records([str(tmp_path / name)], "pretrain")


@pytest.mark.parametrize("name", ["images", "shards.tar"])
def test_a_folder_in_the_place_of_a_file_is_named(name, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(data.InputError, match=f"{name} is a folder; name the files in it, as {tmp_path / name}/\\*.tar"):
        data.Records([str(tmp_path / name)], "pretrain")


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder of the test's own in which the index of every file is kept, however small."""
    monkeypatch.setattr(data, "INDEX_FOLDER", str(tmp_path / "index"))
    monkeypatch.setattr(data, "INDEX_KEPT_FROM", 0)
    return tmp_path / "index"


def test_index_is_kept_until_the_file_or_its_format_changes(tmp_path, kept, monkeypatch):
    made, index_json = [], data.index_json
    monkeypatch.setattr(data, "index_json", lambda path, *rest: made.append(path) or index_json(path, *rest))
    rows = [{"image": "a.jpg", "caption": "x", "image_id": 3}, {"image": "b.jpg", "caption": "y", "image_id": 4}]
    path = write_json(tmp_path / "a.json", rows)
    first, second, other = (data.Records([path], layout) for layout in ("pretrain", "nlvr2_pretrain", "retrieval"))
    assert list(first) == list(second) == list(other) == rows and made == [path, path]  # the first two check the same
    assert isinstance(second.indices[0].offsets, np.memmap) and len(list(kept.iterdir())) == 2
    assert list(pickle.loads(pickle.dumps(first))) == rows and len(made) == 2
    assert first.digest == second.digest == other.digest
    write_json(tmp_path / "new.json", rows[:1])
    os.replace(tmp_path / "new.json", path)
    assert list(first) == rows  # still open
    changed = data.Records([path], "pretrain")
    assert list(changed) == rows[:1] and len(made) == 3 and changed.digest != first.digest
    write_json(tmp_path / "b.json", rows)
    assert data.Records([path, str(tmp_path / "b.json")], "pretrain").digest not in (first.digest, changed.digest)


def test_index_stays_in_memory_where_it_cannot_be_kept(tmp_path, kept, capsys):
    rows = [{"image": "a.jpg", "caption": "x"}]
    path = write_json(tmp_path / "a.json", rows)
    kept.write_text("a file where the folder would be")
    assert list(data.Records([path], "pretrain")) == rows
    assert "a.json is indexed at every start" in capsys.readouterr().err
    kept.unlink()
    data.Records([path], "pretrain")
    (offsets,) = kept.glob("*/offsets.npy")
    offsets.write_bytes(b"")
    with pytest.raises(data.InputError, match=f"{offsets.parent}: cannot be read .*; delete it"):
        data.Records([path], "pretrain")
    about = offsets.with_name("about.json")
    about.write_text("{}")
    with pytest.raises(data.InputError, match=f"{about.parent}: cannot be read .*; delete it"):
        data.Records([path], "pretrain")
    offsets.unlink()
    shard = data.Records([write_shard(tmp_path / "0.tar", SAMPLES)], "pretrain")
    (rows,) = kept.glob("*/rows")
    rows.write_bytes(bytes(rows.stat().st_size))  # as after a power cut
    with pytest.raises(data.InputError, match=f"0.tar: its index is damaged; delete {kept}, which is made again"):
        shard[0]
    path = write_json(tmp_path / "c.json", [{"image": "a.jpg", "caption": "x"}] * 9)
    data.Records([path], "pretrain")
    offsets = max(kept.glob("*/offsets.npy"), key=lambda file: file.stat().st_mtime_ns)
    offsets.write_bytes(offsets.read_bytes()[:-40] + bytes(40))  # or in part
    with pytest.raises(data.InputError, match="c.json: its index is damaged"):
        data.Records([path], "pretrain")[8]


def test_records_nested_nearly_too_deep_are_refused_when_read_too(tmp_path):
    def read(depth):
        return records[0] if depth == 0 else read(depth - 1)

    nested = "[" * 900 + "]" * 900
    (tmp_path / "a.json").write_text('[{"image": "a", "caption": "x", "extra": ' + nested + "}]")
    records = data.Records([str(tmp_path / "a.json")], "pretrain")
    if sys.version_info >= (3, 12):  # which counts the depth of its C code apart from the caller's
        assert read(90)["caption"] == "x"
    else:
        with pytest.raises(data.InputError, match=r"a.json: record 0 \(from 0\): nested too deep"):
            read(90)


def test_half_surrogate_pairs_become_question_marks(pairs, tmp_path, tokenizer):
    rows, config = pairs
    rows = [row | {"question": "is it\ud83d left", "answer": "no\udc00"} for row in task_rows(rows, "vqa")]
    dataset = make_dataset(rows, config, tmp_path / "r.json", task="vqa")
    dataset.decode_reduced, dataset.settings = False, dataclasses.replace(dataset.settings, flip=False)
    item = dataset[0, 0]
    assert item["text"] == "is it left" and item["answers"] == ["no?"]  # cleaning drops question marks
    next(iter(data.make_loader(dataset, [[(0, 0)]], tokenizer, 6, 0)))
    assert data.load_answers(write_json(tmp_path / "a.json", ["no\udc00"])) == ["no?"]


def test_files_that_change_during_a_run_stop_it(tmp_path):
    path = write_json(tmp_path / "a.json", [{"image": "a.jpg", "caption": "x"}] * 3)
    records = data.Records([path], "pretrain")
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(data.InputError, match="a.json has changed since this run began"):
        records[1]
    path = write_json(tmp_path / "b.json", [{"image": "a.jpg", "caption": "x"}] * 3)
    records = data.Records([path], "pretrain")
    assert records[0]["caption"] == "x"
    write_json(tmp_path / "b.json", [{"image": "a.jpg", "caption": "y"}] * 3)  # while it is open, and as long as before
    with pytest.raises(data.InputError, match="b.json has changed since this run began"):
        records[1]
    for number in (-1, 3):
        with pytest.raises(IndexError):
            records[number]


# Tar shards

def write_shard(path, members, links=()):
    """Write a tar file of members {name: bytes} and of links {name: target}."""
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE) if links else ():
            for name, target in dict(links).items():
                member = tarfile.TarInfo(f"{kind.decode()}{name}")
                member.type, member.linkname = kind, target
                shard.addfile(member)
    return str(path)


def jpeg(color, size=(24, 20)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "JPEG")
    return file.getvalue()


RED, BLUE = jpeg("red"), jpeg("blue")


def test_limits_of_a_shard_s_members(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "INDEX_FOLDER", str(tmp_path))
    shard = write_shard(tmp_path / "0.tar", {"a.jpg": RED, "a.txt": b"a long caption", "a.json": b'{"caption": "b"}'})
    image = data.Records([shard], "pretrain")[0]["image"]
    monkeypatch.setattr(data, "MAX_SHARD_IMAGE_BYTES", len(RED))
    assert data.read_image(image).size == (24, 20)
    monkeypatch.setattr(data, "MAX_SHARD_IMAGE_BYTES", len(RED) - 1)
    with pytest.raises(data.BadImage, match="bytes are over"):
        data.read_image(image)
    places = {".txt": {"a": {"offset": 0, "size": 14}}, ".json": {}}
    for limit, caption in ((14, "a long caption"), (13, None)):
        monkeypatch.setattr(data, "MAX_RECORD_BYTES", limit)
        assert data.read_caption(io.BytesIO(b"a long caption"), "a", places) == caption


def test_a_sparse_member_is_no_sample(tmp_path, monkeypatch):
    """What it holds does not lie in the shard as it is."""
    monkeypatch.setattr(data, "INDEX_FOLDER", str(tmp_path))
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.GNU_FORMAT) as shard:
        for name, content, kind in (("a.jpg", RED, tarfile.GNUTYPE_SPARSE), ("a.txt", b"a dog", tarfile.REGTYPE),
                                    ("b.jpg", RED, tarfile.REGTYPE), ("b.txt", b"a cat", tarfile.REGTYPE)):
            member = tarfile.TarInfo(name)
            member.size, member.type = len(content), kind
            shard.addfile(member, io.BytesIO(content))
    records = data.Records([str(tmp_path / "0.tar")], "pretrain")
    assert [row["caption"] for row in records] == ["a cat"]


def test_a_file_with_brackets_in_its_name_is_itself(tmp_path):
    path = write_json(tmp_path / "a[1].json", [])
    assert data.matches(path) == [path] == data.matches(str(tmp_path / "a[[]1].json"))
    (tmp_path / "b" / "c").mkdir(parents=True)
    nested = [path, write_json(tmp_path / "b" / "c" / "d.json", []), write_json(tmp_path / "b" / "e.json", [])]
    assert data.matches(str(tmp_path / "**" / "*.json")) == nested


SAMPLES = {"000.jpg": RED, "000.txt": b"\xef\xbb\xbfa red dog\n", "000.json": b'{"caption": "not this one"}',
           "b/../../001.PNG": BLUE, "b/../../001.json": '{"caption": "a caf\u00e9", "sha256": null}'.encode(),
           "002.webp": BLUE, "003.jpeg": RED, "003.json": b'{"caption": null}', "004.jpg": RED, "004.txt": b" \n",
           "005.jpg": RED, "005.json": b"[", "006.jpg": RED, "006.txt": b"\xe9", "006.json": b'{"caption": "a cat"}',
           "007.txt": b"no image", "008.npy": b"x", "._000.jpg": b"Mac OS X", "._000.txt": b"Mac OS X"}
SHARD_NAMES = ["000.jpg", "b/../../001.PNG", "006.jpg"]  # those with a caption


@pytest.mark.parametrize("keep", [False, True])
def test_shards_hold_the_samples_that_have_a_caption(tmp_path, kept, monkeypatch, keep):
    monkeypatch.setattr(data, "INDEX_KEPT_FROM", 1 << 24)  # which is for lists: of shards, small ones are many
    if not keep:
        kept.write_text("a file where the folder would be")
    secret = write_shard(tmp_path / "secret.jpg", {})
    shard = write_shard(tmp_path / "0.tar", SAMPLES, {"x.jpg": secret, "x.txt": secret, "000.jpg": "000.jpg"})
    empty = write_shard(tmp_path / "1.tar", {})
    for _ in range(2):
        records = data.Records([empty, shard, empty], "pretrain")
        assert [(str(row["image"]), row["caption"]) for row in records] == [
            (f"{shard}/{name}", caption) for name, caption in zip(SHARD_NAMES, ("a red dog", "a caf\u00e9", "a cat"))]
        assert records.left_out == 4  # 002 to 005
        assert [row["image"].open().read() for row in records] == [RED, BLUE, RED]
        assert data.read_image(records[1]["image"]).getpixel((3, 3))[2] > 250
        assert [row["image"] for row in pickle.loads(pickle.dumps(records))] == [row["image"] for row in records]
    assert kept.is_dir() == keep
    changed = write_shard(tmp_path / "2.tar", SAMPLES | {"000.txt": b"a red cat\n"})
    digests = [data.Records([path], "pretrain").digest for path in (shard, changed)]
    assert len(set(digests)) == 2


def test_shards_that_are_not_whole_are_named(tmp_path):
    noise = np.random.default_rng(0).bytes(5000)
    path = tmp_path / "0.tar"
    write_shard(path, {f"{number}.{kind}": noise if kind == "jpg" else b"x"
                       for number in range(3) for kind in ("jpg", "txt")})
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    damaged = bytearray(whole)
    damaged[7000:8000] = bytes(range(250)) * 4
    for content in (whole[:end], whole[:end - 300], whole[:end - 600], whole[:7000], whole[:100], b"", damaged, noise):
        path.write_bytes(content)
        with pytest.raises(data.InputError, match="0.tar: not a whole tar file .*; fetch it again") as error:
            data.Records([str(path)], "pretrain")
        assert "\n" not in str(error.value)
    with pytest.raises(data.InputError, match="none.tar: cannot be read"):
        data.Records([str(tmp_path / "none.tar")], "pretrain")
    with pytest.raises(data.InputError, match="0.tar: tar shards are for data.pretrain_files alone"):
        data.Records([str(path)], "retrieval_eval")
    with pytest.raises(data.InputError, match=r"x\*.tar: no file matches"):
        data.Records([str(tmp_path / "x*.tar")], "pretrain")


def test_shards_that_would_go_round_for_ever_or_search_for_hours_are_refused(tmp_path):
    def header(size, kind=tarfile.REGTYPE):
        member = tarfile.TarInfo("a.jpg")
        member.size, member.type = size, kind
        return member.tobuf(tarfile.GNU_FORMAT)

    pax, refused = b"14 size=-1024\n", "a negative size at byte"
    if sys.version_info >= (3, 12):  # whose tarfile stops there without a word
        refused = "(a negative size|cut off or damaged) at byte"
    for content, message in (
        (header(0) + header(-1024), f"{refused} 512"),
        (header(0) + header(-512, tarfile.GNUTYPE_SPARSE), f"{refused} 512"),
        (header(0) + header(len(pax), tarfile.XHDTYPE) + pax.ljust(512, b"\0") + header(0), refused),
        (header(1 << 20, tarfile.XHDTYPE) + b"1" * (1 << 20), "a header of 1,048,576 bytes"),
    ):
        (tmp_path / "0.tar").write_bytes(content + bytes(1024))
        with pytest.raises(data.InputError, match=f"0.tar: not a whole tar file .{message}"):
            data.Records([str(tmp_path / "0.tar")], "pretrain")


def test_an_interrupted_indexing_goes_on_with_the_next_shard(tmp_path, kept, monkeypatch):
    for number in range(3):
        write_shard(tmp_path / f"{number}.tar", SAMPLES if number < 2 else {"0.jpg": RED})
    (tmp_path / "2.tar").write_bytes(b"cut")
    with pytest.raises(data.InputError, match="2.tar"):
        data.Records([str(tmp_path / "*.tar")], "pretrain")
    write_shard(tmp_path / "2.tar", SAMPLES)
    made, index_shard = [], data.index_shard
    monkeypatch.setattr(data, "index_shard", lambda path, *rest: made.append(path) or index_shard(path, *rest))
    assert len(data.Records([str(tmp_path / "*.tar")], "nlvr2_pretrain")) == 9 and made == [str(tmp_path / "2.tar")]


def test_unreadable_annotation_files(tmp_path):
    pipe, end = os.pipe()
    os.close(end)
    with pytest.raises(data.InputError, match=f"/dev/fd/{pipe}: cannot be read .Illegal seek"):  # as of <(zcat a.json.gz)
        data.Records([f"/dev/fd/{pipe}"], "pretrain")
    os.close(pipe)
    with pytest.raises(data.InputError, match="none.json: cannot be read"):
        data.Records([str(tmp_path / "none.json")], "pretrain")
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(data.InputError, match="latin.json: not JSON"):
        data.Records([str(tmp_path / "latin.json")], "pretrain")
    path = write_json(tmp_path / "ids.json", [{"image": "a", "caption": "x", "image_id": True}])
    with pytest.raises(data.InputError, match="ids.json: .*'image_id': wanted str or int, got bool"):
        data.Records([path], "retrieval")


PAIR = {"images": ["a", "b"], "sentence": "x", "label": "True"}
QUESTION = {"image": "a", "question": "x", "answer": ["y"], "dataset": "vqa", "question_id": 3}


@pytest.mark.parametrize("layout, row, message", [
    ("entailment", {"image": "a", "sentence": "x", "label": "-"},
     "record 1 .from 0.: key 'label': wanted contradiction or neutral or entailment, got '-'"),
    ("entailment", {"image": "a", "sentence": "x", "label": 1}, "'label': .*got 1"),
    ("entailment", {"image": "a", "label": "neutral"}, "key 'sentence' is missing"),
    ("nlvr2", PAIR | {"label": "true"}, "key 'label': wanted True or False or bool, got 'true'"),
    ("nlvr2", PAIR | {"label": 1}, "key 'label': .*got 1"),
    ("nlvr2", PAIR | {"images": ["a"]}, "key 'images': wanted two paths, got 1"),
    ("nlvr2", PAIR | {"images": "ab"}, "key 'images': wanted list, got str"),
    ("nlvr2", PAIR | {"images": ["a", 2]}, "key 'images': wanted a list of strings"),
    ("vqa", QUESTION | {"dataset": "coco"}, "key 'dataset': wanted vqa or vg, got 'coco'"),
    ("vqa", QUESTION | {"answer": None}, "key 'answer': wanted str or list, got NoneType"),
    ("vqa_eval", QUESTION | {"answer": 3}, "key 'answer': wanted str or list or None, got int"),
    ("vqa_eval", QUESTION | {"answer": ["y", 3]}, "key 'answer': wanted a list of strings"),
    ("vqa_eval", QUESTION | {"question_id": 1.5}, "key 'question_id': wanted int or str, got float"),
    ("grounding", {"image": "a"}, "key 'text' is missing"),
    ("grounding_eval", {"image": "a", "text": "x"}, "key 'ref_id' is missing"),
])
def test_bad_record_of_a_task_names_its_key(tmp_path, layout, row, message):
    good = {"image": "a", "text": "x", "ref_id": 1, "sentence": "x", "label": "neutral"} | QUESTION
    good |= PAIR if layout == "nlvr2" else {}
    path = write_json(tmp_path / "bad.json", [good, row])
    with pytest.raises(data.InputError, match=message) as error:
        data.Records([path], layout)
    assert path in str(error.value) and "\n" not in str(error.value)


def test_image_paths_stay_below_the_root():
    assert data.join_image_path("", "/abs/a.jpg") == "/abs/a.jpg" and data.join_image_path("", "../a.jpg") == "../a.jpg"
    assert data.join_image_path("root", "x/../a.jpg") == "root/x/../a.jpg"
    assert data.join_image_path("/root", "/root/a.jpg") == "/root/a.jpg" and data.join_image_path("/", "a") == "/a"
    for path in ("../a.jpg", "x/../../a.jpg", "/etc/passwd", "../root2/a.jpg"):
        with pytest.raises(data.InputError, match="lies outside image_root '/root'"):
            data.join_image_path("/root", path)


def test_read_image_converts_every_mode_to_upright_rgb(tmp_path):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / name)
        assert (np.array(data.read_image(tmp_path / name)) == ramp[..., None]).all()
    Image.fromarray(ramp.astype(np.int32) * 257).save(tmp_path / "deep.pgm")  # mode I
    assert (np.array(data.read_image(tmp_path / "deep.pgm")) == ramp[..., None]).all()
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "long.tif")  # which scaling would make black
    for name in ("float.tif", "long.tif"):
        with pytest.raises(data.BadImage, match=f"{name}: its pixels are floats, or of 32 bits"):
            data.read_image(tmp_path / name)
    red = Image.new("RGB", (8, 4), (250, 10, 20))
    red.convert("CMYK").save(tmp_path / "cmyk.jpg")
    red.convert("P").save(tmp_path / "palette.png")
    red.convert("P").save(tmp_path / "clear.png", transparency=bytes(256))
    clear = red.copy()
    clear.putalpha(0)  # dropped, not laid over a background
    clear.save(tmp_path / "alpha.png")
    red.convert("LA").save(tmp_path / "grey_alpha.png")
    red.convert("1").save(tmp_path / "bits.png")
    for name in ("frames.gif", "frames.webp", "frames.png"):
        red.save(tmp_path / name, save_all=True, append_images=[Image.new("RGB", (8, 4), "blue")])
    red.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[red])
    for name in ("cmyk.jpg", "palette.png", "clear.png", "alpha.png", "grey_alpha.png", "bits.png", "frames.gif",
                 "frames.webp", "frames.png", "phone.jpg"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            image = data.read_image(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (8, 4)), name
        if name not in ("grey_alpha.png", "bits.png"):
            assert np.abs(np.array(image)[0, 0].astype(int) - (250, 10, 20)).max() < 26, name  # coarse palettes


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "deep.png"])
def test_exif_rotation_is_applied_once_in_every_format(tmp_path, name):
    corner = np.zeros((32, 48), np.uint8)
    corner[:16, :16] = 255  # at the upper left
    picture = Image.fromarray(corner.astype(np.uint16) * 257 if name == "deep.png" else corner)
    for orientation, back in enumerate([  # from upright to how the file has it, by EXIF's definition
        lambda a: a, lambda a: a[:, ::-1], lambda a: a[::-1, ::-1], lambda a: a[::-1], lambda a: a.T,
        lambda a: np.rot90(a), lambda a: a[::-1, ::-1].T, lambda a: np.rot90(a, -1)], 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.ascontiguousarray(back(np.asarray(picture)))).save(tmp_path / name, exif=exif)
        image = data.read_image(tmp_path / name)
        assert image.size == (48, 32) and np.abs(np.asarray(image)[..., 0].astype(int) - corner).max() < 40, orientation
        with data.open_image(tmp_path / name) as opened:
            assert data.turn_size(opened, opened.size) == (48, 32), orientation  # known before it is decoded


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
@pytest.mark.parametrize("tag, kind, turned", [
    (0x0128, b"\2\0\2\0\0\0" b"2\0\0\0", True),  # the unit of the resolution as text
    (0x0100, b"\2\0\4\0\0\0" b"640\0", True),  # the width as text
    (0x8825, b"\4\0\1\0\0\0" b"\2\0\0\0", True),  # places that lie in the header
    (None, None, False),
])
def test_exif_that_is_not_well_formed_spoils_no_image(tmp_path, name, tag, kind, turned):
    """Bytes by hand: no writer makes them. Orientation 6, then a tag of a type that it should not have, or garbage."""
    rows = struct.pack("<HHHLL", 2, 0x0112, 3, 1, 6) + struct.pack("<H", tag or 0) + (kind or b"") + bytes(4)
    exif = b"Exif\0\0" + (b"II*\0\10\0\0\0" + rows if turned else b"garbage")
    Image.new("RGB", (48, 32), "red").save(tmp_path / name, exif=exif)
    assert data.read_image(tmp_path / name).size == ((32, 48) if turned else (48, 32))
    with data.open_image(tmp_path / name) as opened:
        assert data.turn_size(opened, opened.size) == ((32, 48) if turned else (48, 32))


@pytest.mark.parametrize("width, height", [(50_000, 50_000), (20_000, 10_000), (10_001, 10_000), (10_000, 10_000)])
def test_over_100_megapixels_are_refused_by_one_message_before_decoding(tmp_path, width, height):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "a.png").write_bytes(content)
    refused = f"{width} x {height} pixels are over 100,000,000$"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(data.BadImage, match=refused if width * height > 1e8 else "truncated"):
            data.read_image(tmp_path / "a.png")


def test_bad_images_name_path_and_reason(tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("not an image")
    Image.open(tmp_path / "whole.jpg").save(tmp_path / "zeros.png")
    whole = (tmp_path / "zeros.png").read_bytes()
    (tmp_path / "zeros.png").write_bytes(whole[:-1000] + bytes(1000))  # which Pillow decodes, to other pixels
    (tmp_path / "flip.png").write_bytes(whole[:-13] + bytes([whole[-13] ^ 1]) + whole[-12:])  # in the checksum alone
    (tmp_path / "figure.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    for name, reason in (("cut.jpg", "truncated"), ("text.jpg", "identify"), ("none.jpg", "No such file"),
                         ("zeros.png", "broken|checksum"), ("flip.png", "checksum"),
                         ("figure.jpg", "identify"), ("nul\0.jpg", "null")):
        with pytest.raises(data.BadImage, match=reason) as error:
            data.read_image(str(tmp_path / name))
        assert name in str(error.value)
    with pytest.raises(data.InputError, match="cut.jpg.*truncated"):
        data.ImageDataset([str(tmp_path / "cut.jpg")], 8)[0]
    monkeypatch.setattr(data, "MAX_PIXELS", 1599)
    with pytest.raises(data.BadImage, match="whole.jpg: 40 x 40 pixels are over"):
        data.read_image(str(tmp_path / "whole.jpg"))


# Training batches

def test_draws_depend_on_seed_epoch_and_index_alone(pairs, tmp_path):
    rows, config = pairs
    dataset, other = (make_dataset(rows, config, tmp_path / "r.json", seed) for seed in (0, 1))
    first, *rest = (dataset[0, 3], dataset[0, 3], dataset[1, 3], other[0, 3])
    assert first["image"].shape == (3, 16, 16) and first["image"].dtype == torch.uint8 and first["replaced"] == []
    assert torch.equal(first["image"], rest[0]["image"]) and first["text"] == rest[0]["text"]
    texts = [dataset[epoch, 3]["text"] for epoch in range(20)]
    assert len(set(texts)) == 4  # two captions, flipped or not
    drawn = "".join(str(2 * ("a dog" in text) + ("right" in text)) for text in texts)
    assert drawn == "20312112131230222130"  # another purpose or order of the draws would change every run
    assert texts != [other[epoch, 3]["text"] for epoch in range(20)]
    dataset = make_dataset(rows, config, tmp_path / "r.json", task="nlvr2_pretrain")
    assert texts != [dataset[epoch, 3]["text"] for epoch in range(20)]


def test_text_and_image_are_flipped_together(pairs, tmp_path):
    rows, config = pairs
    dataset = make_dataset(rows, config, tmp_path / "r.json")
    seen = set()
    for epoch in range(10):
        item = dataset[epoch, 0]
        left_brighter = bool(item["image"][..., :6].float().mean() > item["image"][..., 10:].float().mean())
        assert ("left" in item["text"], "right" in item["text"]) == (left_brighter, not left_brighter)
        seen.add(left_brighter)
    assert seen == {True, False}
    still = dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, flip=False))
    dataset = make_dataset(rows, still, tmp_path / "r.json")
    assert all("left" in dataset[epoch, 0]["text"] for epoch in range(10))


def test_bad_records_are_replaced_and_reported(pairs, tmp_path):
    rows, config = pairs
    rows[0]["image"], rows[1]["caption"], rows[2]["caption"], rows[3]["image"] = "none.png", "?!", [], "../0.png"
    dataset = make_dataset(rows, config, tmp_path / "r.json")
    for index, path, reason in ((0, "none.png", "No such file"), (1, "1.png", "empty caption"),
                                (2, "2.png", "empty caption"), (3, "../0.png", "outside image_root")):
        item = dataset[0, index]
        assert item["replaced"][0][0] == path and reason in item["replaced"][0][1]
        assert item["text"] and item["image_id"] in [data.hash63(row["image"]) for row in rows[4:]]
        assert torch.equal(item["image"], dataset[0, index]["image"])
    with pytest.raises(data.InputError, match="20 records in a row are bad, the last '1.png' .empty caption."):
        make_dataset(rows[1:2], config, tmp_path / "r.json")[0, 0]


def task_rows(rows, task):
    """The rows of the fixture in the format of a task."""
    names = [row["image"] for row in rows]
    if task == "vqa":
        answers = [["left", "right", "left", "cat"], ["dog"], "dog"] * 4
        return [{"image": name, "question": "Is it  left?", "answer": answer, "question_id": i,
                 "dataset": "vqa" if isinstance(answer, list) else "vg"}
                for i, (name, answer) in enumerate(zip(names, answers))]
    if task == "nlvr2":
        return [{"images": [name, names[-1]], "sentence": "The left, a dog.", "label": label}
                for name, label in zip(names, ("True", "False", True, False) * 3)]
    if task == "entailment":
        labels = ("entailment", "neutral", "contradiction") * 4
        return [{"image": name[:-4], "sentence": "A dog.", "label": label} for name, label in zip(names, labels)]
    if task == "grounding":
        return [{"image": name, "text": "the left dog", "ref_id": i} for i, name in enumerate(names)]
    return [row | {"image_id": i // 2} for i, row in enumerate(rows)]


def test_vqa_samples_weigh_answers_and_flip_them_with_the_question(pairs, tmp_path):
    rows, config = pairs
    (tmp_path / "vg").mkdir()
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "vg" / "2.png")
    rows = task_rows(rows, "vqa")
    rows[3]["answer"], rows[4]["answer"], rows[5]["question"] = [], [" ", ""], "?!"
    dataset = make_dataset(rows, config, tmp_path / "r.json", task="vqa")
    seen = set()
    for epoch in range(10):
        item = dataset[epoch, 0]
        side = "left" if item["image"][..., :6].float().mean() > item["image"][..., 10:].float().mean() else "right"
        other = {"left": "right", "right": "left"}[side]
        assert item["text"] == f"is it  {side}"  # spaces within a question stay [ALBEF]
        assert item["answers"] == [side, other, "cat"] and item["answer_weights"] == [0.5, 0.25, 0.25]
        seen.add(side)
    assert seen == {"left", "right"}
    item = dataset[0, 2]
    assert (item["answers"], item["answer_weights"]) == (["dog"], [0.5]) and "image_id" not in item
    assert item["image"][2].min() > 250 and item["image"][0].max() < 5  # below vg_image_root
    for index, reason in ((3, "no answer"), (4, "no answer"), (5, "empty question")):
        assert dataset[0, index]["replaced"][0] == (f"{index}.png", reason)


def test_nlvr2_samples_have_two_images_in_order_and_are_never_flipped(pairs, tmp_path):
    rows, config = pairs
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "11.png")
    rows = task_rows(rows, "nlvr2")
    rows[7]["images"][1], rows[8]["sentence"] = "none.png", "."
    dataset = make_dataset(rows, config, tmp_path / "r.json", task="nlvr2")
    for epoch in range(5):
        item = dataset[epoch, 0]
        assert item["image"].shape == (2, 3, 16, 16) and item["image"].dtype == torch.uint8
        assert item["image"][1, 2].min() > 250 and item["image"][1, 0].max() < 5
        assert item["image"][0, :, :, :6].float().mean() > item["image"][0, :, :, 10:].float().mean()
        assert item["text"] == "the left a dog"
    assert [dataset[0, index]["label"] for index in range(4)] == [1, 0, 1, 0]
    assert "none.png: " in dataset[0, 7]["replaced"][0][1] and dataset[0, 8]["replaced"][0][1] == "empty sentence"


def test_samples_of_entailment_retrieval_and_grounding(pairs, tmp_path):
    rows, config = pairs
    for number in range(12):
        (tmp_path / f"{number}.png").rename(tmp_path / f"{number}.jpg")
    dataset = make_dataset(task_rows(rows, "entailment"), config, tmp_path / "r.json", task="entailment")
    assert [dataset[0, index]["label"] for index in range(3)] == [2, 1, 0]
    assert dataset[0, 0].keys() == {"image", "text", "replaced", "label"} and not dataset[0, 0]["replaced"]
    rows = [row | {"image": row["image"].replace("png", "jpg")} for row in rows]
    dataset = make_dataset(task_rows(rows, "grounding"), config, tmp_path / "r.json", task="grounding")
    assert {dataset[epoch, 5]["text"] for epoch in range(10)} == {"the left dog", "the right dog"}
    assert dataset[0, 5]["image_id"] == data.hash63("5.jpg")
    dataset = make_dataset(task_rows(rows, "retrieval"), config, tmp_path / "r.json", task="retrieval")
    ids = [dataset[0, index]["image_id"] for index in range(4)]
    assert ids[0] == ids[1] == data.hash63("0") and ids[2] == ids[3] != ids[0]


def test_image_ids(pairs, tmp_path):
    rows, config = pairs
    rows[0]["image_id"], rows[1]["image_id"], rows[2]["image_id"] = 7, "7", "coco_7"
    rows = [row | {"image_id": row.get("image_id", row["image"])} for row in rows]
    dataset = make_dataset(rows, config, tmp_path / "r.json", task="retrieval")
    ids = [dataset[0, index]["image_id"] for index in range(4)]
    assert ids[0] == ids[1] and len(set(ids)) == 3 and all(0 <= number < 2 ** 63 for number in ids)
    assert ids[3] == data.hash63("3.png") == 82346550029423253  # half of b2sum -l 64, the same everywhere


def test_files_of_pre_training_may_number_their_images_alike(pairs, tmp_path):
    rows, config = pairs
    files = [write_json(tmp_path / f"{i}.json", [rows[i] | {"image_id": 7}]) for i in (0, 1)]
    dataset = data.TrainingSet(data.Records(files, "pretrain"), "pretrain", config)
    assert [dataset[0, index]["image_id"] for index in (0, 1)] == [data.hash63(rows[i]["image"]) for i in (0, 1)]


def take(batches, count):
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


def test_order_of_the_data_depends_on_the_step_alone():
    whole = take(data.ShuffledBatches(50, 12, 1, 0, 1, 0, 0), 9)  # four steps an epoch, two records dropped
    assert whole[4][0][0] == 1 and whole[3][0][0] == 0
    order = torch.randperm(50, generator=torch.Generator().manual_seed(data.hash63("order", 0, 0)))  # of 64 bits
    assert [index for batch in whole[:4] for _, index in batch] == order[:48].tolist()
    for epoch in (0, 1):
        assert len({index for batch in whole[4 * epoch:4 * epoch + 4] for _, index in batch}) == 48
    assert [index for _, index in whole[0]] != [index for _, index in whole[4]]
    assert take(data.ShuffledBatches(50, 12, 1, 0, 1, 0, 6), 3) == whole[6:]  # resumed
    assert take(data.ShuffledBatches(50, 12, 1, 0, 1, 1, 0), 1) != whole[:1]  # another seed
    # Two ranks of two micro-batches of three see the same records of a step as one rank with one batch of twelve.
    ranks = [take(data.ShuffledBatches(50, 3, 2, rank, 2, 0, 5), 4) for rank in (0, 1)]
    for step in (0, 1):
        blocks = [block for rank in ranks for block in rank[2 * step:2 * step + 2]]
        assert [key for block in blocks for key in block] == whole[5 + step]


def test_fewer_records_than_one_step():
    assert data.ShuffledBatches(8, 2, 2, 0, 2, 0, 0).steps_per_epoch == 1
    with pytest.raises(data.InputError, match="7 records are fewer than the 8 of one step"):
        data.ShuffledBatches(7, 2, 2, 0, 2, 0, 0)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
def test_batches_are_the_same_for_any_number_of_workers(pairs, tmp_path, tokenizer):
    rows, config = pairs
    rows[5]["image"] = "none.png"
    dataset = make_dataset(rows, config, tmp_path / "r.json")
    runs = []
    for workers in (0, 2, 4):
        loader = data.make_loader(dataset, data.ShuffledBatches(12, 4, 1, 0, 1, 0, 1), tokenizer, 5, workers)
        runs.append(take(loader, 4))
    for batch, other in [*zip(runs[0], runs[1]), *zip(runs[0], runs[2])]:
        assert batch["replaced"] == other["replaced"] and batch["truncated"] == other["truncated"] == 4
        for name in ("image", "input_ids", "attention_mask", "word_ids", "image_ids"):
            assert torch.equal(batch[name], other[name])
        assert batch["image"].shape == (4, 3, 16, 16) and batch["image"].dtype == torch.uint8
        assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["word_ids"].shape == (4, 5)
        assert batch["input_ids"][0, :4].tolist() == [VOCABULARY.index(word) for word in ("[CLS]", "a", "red", "dog")]
        assert batch["image_ids"].dtype == batch["word_ids"].dtype == torch.int64
    assert [path for batch in runs[0] for path, _ in batch["replaced"]].count("none.png") in (1, 2)


def test_batches_of_shards_and_lists_are_the_same_for_any_number_of_workers(pairs, tmp_path, tokenizer, kept):
    rows, config = pairs
    shards = [write_shard(tmp_path / f"{number}.tar", SAMPLES) for number in (1, 0)]
    write_shard(tmp_path / "0.tar", SAMPLES | {"000.jpg": RED[:300]})
    lists = [write_json(tmp_path / f"{part.start}.json", rows[part]) for part in (slice(0, 3), slice(3, 5))]
    files = [lists[0], str(tmp_path / "?.tar"), lists[1]]
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, pretrain_files=files))
    dataset = data.training_set(config, "pretrain")
    ids = [data.hash63(row["image"]) for row in rows]
    digests = (index.digest for index in dataset.records.indices[1:3])  # wherever the shards lie
    cut, *good = (data.hash63(f"{digest}/{name}") for digest in digests for name in SHARD_NAMES)
    seen = [dataset[0, index]["image_id"] for index in range(11)]
    assert seen[:3] + seen[4:] == ids[:3] + good + ids[3:5] and cut not in seen
    ((path, reason),) = dataset[0, 3]["replaced"]
    assert path == f"{shards[1]}/000.jpg" and reason.startswith(f"{path}: ")
    runs = [take(data.make_loader(dataset, data.ShuffledBatches(11, 4, 1, 0, 1, 0, 0), tokenizer, 5, workers), 4)
            for workers in (0, 2)]
    for batch, other in zip(*runs):
        assert batch["replaced"] == other["replaced"] and all(
            torch.equal(batch[name], other[name]) for name in ("image", "input_ids", "word_ids", "image_ids"))


@pytest.mark.parametrize("name, exif_orientation", [("a.jpg", 1), ("a.jpg", 6), ("a.png", 8), ("a.tif", 6)])
def test_reduced_decoding_keeps_crop_and_content(pairs, tmp_path, name, exif_orientation):
    rows, config = pairs
    y, x = np.mgrid[:600, :900]
    waves = [np.sin(x / 40) * np.cos(y / 70), np.cos(x / 90 + y / 60), (x + 2 * y) / 1000 - 1]
    exif = Image.Exif()
    exif[0x0112] = exif_orientation
    picture = Image.fromarray(np.uint8(127.5 + 120 * np.stack(waves, 2)))
    picture.save(tmp_path / name, exif=exif, **{"quality": 95} if name == "a.jpg" else {})
    assert not config.data.decode_reduced and data.load_config("paper").data.decode_reduced
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, image_size=64, patch_size=16))
    config = dataclasses.replace(config, pretrain=dataclasses.replace(config.pretrain, crop_min_area=0.2))
    reduced = dataclasses.replace(config, data=dataclasses.replace(config.data, decode_reduced=True))
    row = [{"image": name, "caption": "a red dog"}]
    plain, small = (make_dataset(row, settings, tmp_path / "r.json") for settings in (config, reduced))
    differences = []
    for epoch in range(12):
        one, two = plain[epoch, 0], small[epoch, 0]
        assert one["text"] == two["text"] and one["image"].shape == two["image"].shape == (3, 64, 64)
        differences.append((one["image"].float() - two["image"].float()).abs().mean().item())
    assert 0 < max(differences) < 3 if name == "a.jpg" else max(differences) == 0, differences
    least, size = ((100, 200), (600, 900)) if exif_orientation > 4 else ((200, 100), (900, 600))
    with data.open_image(str(tmp_path / name)) as image:
        assert data.turn_size(image, image.size) == size
        assert data.decode_image(image, least).size == tuple(side // (4 if name == "a.jpg" else 1) for side in size)


def test_reduced_decoding_asks_for_what_the_crop_needs_of_each_side(tmp_path, monkeypatch):
    asked, decode = [], data.decode_image
    monkeypatch.setattr(data, "decode_image", lambda image, least: asked.append(least) or decode(image, least))
    monkeypatch.setattr(softmask, "crop_box", lambda *_: (10, 20, 400, 300))
    Image.new("RGB", (900, 600)).save(tmp_path / "0.jpg")
    config = data.load_config("scenes", [f"data.pretrain_image_root={tmp_path}", "data.decode_reduced=true"])
    make_dataset([{"image": "0.jpg", "caption": "x"}], config, tmp_path / "r.json")[0, 0]
    assert asked == [[144, 128]]  # 64 pixels of the crop's 400 and 300: 900 * 64 / 400 and 600 * 64 / 300


def test_reduced_decoding_without_a_reduction_changes_nothing_and_reports_bad_images(pairs, tmp_path):
    rows, config = pairs
    rows[3]["image"] = "none.png"
    reduced = dataclasses.replace(config, data=dataclasses.replace(config.data, decode_reduced=True))
    plain, small = (make_dataset(rows, settings, tmp_path / "r.json") for settings in (config, reduced))
    for index in (0, 1, 2):
        assert torch.equal(plain[0, index]["image"], small[0, index]["image"])
    assert small[0, 3]["replaced"][0][0] == "none.png"


@pytest.mark.parametrize("task", data.TASKS)
def test_training_set_reads_the_files_of_its_task_and_makes_its_batches(pairs, tmp_path, tokenizer, task):
    rows, config = pairs
    os.symlink(tmp_path, tmp_path / "vg")
    if task == "entailment":
        for number in range(12):
            (tmp_path / f"{number}.png").rename(tmp_path / f"{number}.jpg")
    files = [write_json(tmp_path / "1.json", task_rows(rows, task)[:5]),
             write_json(tmp_path / "2.json", task_rows(rows, task)[5:])]
    key = {"retrieval": "retrieval_sets.scenes.train"} | {name: f"{name}_files" for name in ("pretrain", "nlvr2_pretrain")}
    settings = data.config_to_dict(config)
    section = settings["data"]
    *parts, last = key.get(task, f"{task}.train").split(".")
    for part in parts:
        section = section[part]
    section[last] = files
    dataset = data.training_set(data.config_from_dict(settings), task)
    assert len(dataset) == 12 and not any(dataset[0, index]["replaced"] for index in range(12))
    batch = next(iter(data.make_loader(dataset, [[(0, 0), (0, 1), (0, 2)]], tokenizer, 6, 0)))
    assert batch["image"].shape == ((3, 2, 3, 16, 16) if task == "nlvr2" else (3, 3, 16, 16))
    own = {"vqa": {"answer_ids", "answer_mask", "answer_question", "answer_weights"}, "nlvr2": {"labels"},
           "entailment": {"labels"}}.get(task, {"image_ids"})
    shared = {"image", "input_ids", "attention_mask", "word_ids", "replaced", "truncated"}
    assert batch.keys() == shared | own
    for name in own - {"answer_weights"}:
        assert batch[name].dtype == torch.int64
    if task == "nlvr2":
        assert batch["labels"].tolist() == [1, 0, 1]
    if task == "entailment":
        assert batch["labels"].tolist() == [2, 1, 0]
    if task == "vqa":
        answers = [*dataset[0, 0]["answers"], "dog", "dog"]
        ids = [[VOCABULARY.index(word) for word in ("[CLS]", answer, "[SEP]")] for answer in answers]
        assert batch["answer_ids"].tolist() == ids and batch["answer_mask"].tolist() == [[1, 1, 1]] * 5
        assert batch["answer_question"].tolist() == [0, 0, 0, 1, 2]
        assert batch["answer_weights"].dtype == torch.float32
        assert batch["answer_weights"].tolist() == [0.5, 0.25, 0.25, 1.0, 0.5]


# Evaluation

def test_load_retrieval(tmp_path):
    rows = [{"image": "a.jpg", "caption": ["One, two!", "three four five"]}, {"image": "b.jpg", "caption": "Six"}]
    images, captions, image_of_caption = data.load_retrieval(write_json(tmp_path / "r.json", rows), "root", 2)
    assert images == ["root/a.jpg", "root/b.jpg"] and captions == ["one two", "three four", "six"]
    assert image_of_caption.tolist() == [0, 0, 1] and image_of_caption.dtype == np.int64
    spelt = write_json(tmp_path / "spelt.json", [rows[1], {"image": "a.jpg", "caption": "one"}, {"image": "./a.jpg", "caption": "two"}])
    with pytest.raises(data.InputError, match="spelt.json: root/a.jpg is in 2 records"):
        data.load_retrieval(spelt, "root", 2)
    flat = write_json(tmp_path / "flat.json", [rows[1], {"image": "a.jpg", "caption": "one"}, {"image": "a.jpg", "caption": "two"}])
    with pytest.raises(data.InputError, match="flat.json: root/a.jpg is in 2 records; .* each image once, with all its captions"):
        data.load_retrieval(flat, "root", 2)
    rows[1]["image"] = "../b.jpg"
    with pytest.raises(data.InputError, match="'../b.jpg' lies outside image_root 'root'"):
        data.load_retrieval(write_json(tmp_path / "r.json", rows), "root", 2)
    rows[1]["caption"] = []
    with pytest.raises(data.InputError, match=r"r.json: record 1 \(from 0\): no caption"):
        data.load_retrieval(write_json(tmp_path / "r.json", rows), "root", 2)


def test_evaluation_resizes_to_a_square_without_cropping(tmp_path):
    halves = np.tile(np.repeat(np.array([0, 255], np.uint8), 8), (4, 1))  # 4 high, 16 wide
    Image.fromarray(halves).save(tmp_path / "halves.png")
    image = data.ImageDataset([str(tmp_path / "halves.png")], 8)[0]
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8
    assert image[:, :, 0].max() < 5 and image[:, :, 7].min() > 250


def test_check_counts_what_is_missing_and_cut(pairs, tmp_path, tokenizer, capsys):
    rows, config = pairs
    root = str(tmp_path)
    pretrain = write_json(tmp_path / "p.json", rows)
    evaluation = write_json(tmp_path / "e.json", rows[:2])
    sets = {"tiny": data.Files(root, [pretrain], evaluation, evaluation)}
    files = dataclasses.replace(
        config.data, tokenizer=str(tmp_path / "vocab.txt"), max_words=3, pretrain_files=[pretrain], retrieval="tiny",
        retrieval_sets=sets, grounding_boxes=None, foils=None)
    config = dataclasses.replace(config, data=files, pretrain=dataclasses.replace(config.pretrain, max_tokens=5))
    assert data.check(config, "pretrain") and capsys.readouterr().out.count("2 records; 0 of 2") == 1  # val is not read
    config = dataclasses.replace(config, eval_every_steps=1)
    assert data.check(config, "pretrain")
    out = capsys.readouterr().out
    assert f"{pretrain}: 12 records; 0 of 12 images missing" in out and out.count("2 records; 0 of 2") == 2
    assert "of 24 captions 0 are empty, 100.0% cut at 3 words, 0.0% cut at 5 tokens" in out
    assert not data.check(config, "retrieval")  # its rows need an image_id
    assert f"{pretrain}: record 0 (from 0): key 'image_id' is missing" in capsys.readouterr().out
    write_json(tmp_path / "e.json", [rows[0], rows[1] | {"caption": []}])
    assert not data.check(config, "pretrain")
    assert f"{evaluation}: record 1 (from 0): no caption" in capsys.readouterr().out
    write_json(tmp_path / "e.json", rows[:2])

    rows[0]["image"], rows[1]["caption"] = "none.png", ["a", "..."]
    shards = dataclasses.replace(files, pretrain_files=[write_shard(tmp_path / "0.tar", SAMPLES)], max_words=30)
    assert data.check(dataclasses.replace(config, data=shards), "pretrain")
    out = capsys.readouterr().out
    assert "0.tar: 3 records; images in the shards; 4 samples left out, without NAME.txt, or NAME.json with a caption" in out
    assert "of 3 captions 0 are empty" in out

    write_json(tmp_path / "p.json", rows)
    (tmp_path / "e.json").write_text("[")
    files = dataclasses.replace(files, foils=str(tmp_path / "foils.json"), max_words=30)
    pretrain = dataclasses.replace(config.pretrain, max_tokens=3)
    assert not data.check(dataclasses.replace(config, data=files, pretrain=pretrain), "pretrain")
    out = capsys.readouterr().out
    assert "1 of 12 images missing" in out and f"  missing or empty: {root}/none.png" in out
    assert "1 are empty, 0.0% cut at 30 words, 91.7% cut at 3 tokens" in out and "capitals" not in out
    assert f"{evaluation}: not JSON" in out and f"data.foils: {tmp_path}/foils.json is missing" in out
    files = dataclasses.replace(files, tokenizer=str(tmp_path / "none.txt"))
    open(f"{root}/11.png", "w").close()
    assert not data.check(dataclasses.replace(config, data=files), "pretrain")  # the files are looked through all the same
    out = capsys.readouterr().out
    assert f"data.tokenizer: tokenizer '{tmp_path}/none.txt': no such file" in out and "2 of 12 images missing" in out
    assert "1 are empty, 0.0% cut at 30 words\n" in out and "tokens" not in out
    (tmp_path / "cased.txt").write_text("\n".join([*VOCABULARY, "Hund", "Katze", "Haus", "Baum"]))
    files = dataclasses.replace(files, tokenizer=str(tmp_path / "cased.txt"))
    assert not data.check(dataclasses.replace(config, data=files), "pretrain")
    assert f"data.tokenizer: 4 of {len(VOCABULARY) + 4} entries have capitals" in capsys.readouterr().out


def files_to_check(config, folder, listed, evaluated):
    """The files of pre-training on those listed, evaluated by retrieval from one file, all of them in the folder."""
    sets = {"tiny": data.Files(str(folder), [], None, evaluated)}
    return dataclasses.replace(config.data, tokenizer=str(folder / "vocab.txt"), pretrain_files=listed, retrieval="tiny",
                               retrieval_sets=sets, grounding_boxes=None, foils=None)


def test_check_opens_images(pairs, tmp_path, capsys):
    """One cut in two: too many of those trained on or, alone, one of those evaluated on."""
    rows, config = pairs
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    (tmp_path / "11.png").write_bytes((tmp_path / "11.png").read_bytes()[:300])
    for test, share, passes in ((2, 0.1, True), (2, 0.0, False), (12, 0.1, False)):
        evaluation = write_json(tmp_path / "e.json", rows[:test])
        files = files_to_check(config, tmp_path, [write_json(tmp_path / "p.json", rows)], evaluation)
        assert data.check(dataclasses.replace(config, data=files, max_bad_image_share=share), "pretrain") == passes
        out = capsys.readouterr().out
        assert f"of 12 images opened 1 cannot be read\n    {tmp_path}/11.png: " in out, out
        assert out.count("of 2 images opened 0 cannot be read\n") == (test == 2)


def test_check_scales_what_it_finds_to_all_images(pairs, tmp_path, capsys, monkeypatch):
    """Of 2,400 images 20 are opened; a third of them are damaged, which training would find too many."""
    rows, config = pairs
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes((tmp_path / f"{number}.png").read_bytes()[: 300 if number < 4 else None])
    monkeypatch.setattr(data, "MAX_OPENED_IMAGES", 20)
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    evaluation = write_json(tmp_path / "e.json", rows[4:6])
    files = files_to_check(config, tmp_path, [write_json(tmp_path / "p.json", rows * 200)], evaluation)
    assert not data.check(dataclasses.replace(config, data=files, max_bad_image_share=0.01), "pretrain")
    bad = capsys.readouterr().out.split("of 20 images opened ")[1].split()[0]
    assert 0 < int(bad) <= 10  # so that they alone would be too few


def test_check_finds_what_training_would_refuse_or_learn_nothing_from(pairs, tmp_path, capsys):
    rows, config = pairs
    evaluation = write_json(tmp_path / "e.json", rows[:2])

    def check(rows, vocabulary=VOCABULARY, batch_size=2, more=()):
        """Whether all is well, and what check prints."""
        (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
        listed = [write_json(tmp_path / "p.json", rows), *more]
        files = files_to_check(config, tmp_path, listed, evaluation)
        pretrain = dataclasses.replace(config.pretrain, batch_size=batch_size)
        found = data.check(dataclasses.replace(config, data=files, pretrain=pretrain), "pretrain")
        return found, capsys.readouterr().out

    found, out = check(rows)
    assert "is listed" not in out
    assert f"{tmp_path}/p.json is listed 2 times, and trained on as often" in check(rows, more=[f"{tmp_path}/p*n"])[1]
    assert found and "0.0% of their word pieces are not in" in out
    found, out = check(rows, [*VOCABULARY[:5], "red"])
    assert not found and "85.7% of their word pieces are not in" in out  # 12 of 14
    found, out = check(rows, batch_size=13)
    assert not found and "12 records are fewer than the 13 of one step" in out
    found, out = check([*rows[:2], *(row | {"caption": []} for row in rows[2:7]), *(row | {"caption": ["..."]} for row in rows[7:])])
    assert found and "10 are empty" in out and "max_bad_image_share" not in out  # which training stands, from the eleventh on not
    found, out = check([rows[0], *(row | {"caption": ["...", "..."]} for row in rows[1:])])
    assert not found and "22 are empty" in out and "more than max_bad_image_share (0.01) of the records" in out


def test_check_names_an_image_id_of_two_images(pairs, tmp_path, tokenizer, capsys):
    """Two files that both number from 0: retrieval would take pairs of different images for one image's, and no negatives."""
    rows, config = pairs
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    one, other = ([row | {"caption": text, "image_id": [i, str(i)][n]} for i, row in enumerate(part) for text in row["caption"]]
                  for n, part in enumerate((rows[:6], rows[6:])))  # "0" is 0 in training
    paths = [write_json(tmp_path / "one.json", one), write_json(tmp_path / "other.json", other)]
    sets = {"tiny": data.Files(str(tmp_path), paths[:1], None, None)}
    files = dataclasses.replace(config.data, tokenizer=str(tmp_path / "vocab.txt"), retrieval="tiny", retrieval_sets=sets)
    settings = dataclasses.replace(config.retrieval, batch_size=2)
    config = dataclasses.replace(config, data=files, retrieval=settings)
    assert data.check(config, "retrieval") and " is of " not in capsys.readouterr().out  # an image has several captions
    sets["tiny"] = data.Files(str(tmp_path), paths, None, None)
    assert data.check(config, "retrieval")  # which may be meant
    out = capsys.readouterr().out
    assert out.count("is of") == 1 and f"  image_id '0' is of {tmp_path}/6.png, and of {tmp_path}/0.png above" in out
    assert "(and 5 more): training takes their pairs for one image's" in out


def test_load_nlvr2_and_entailment(pairs, tmp_path):
    rows, config = pairs
    root = str(tmp_path)
    loaded = data.load_labelled("nlvr2", write_json(tmp_path / "r.json", task_rows(rows, "nlvr2")), config)
    assert len(loaded) == 12 and [row["label"] for row in loaded[:4]] == [1, 0, 1, 0]
    assert loaded[1] == {"images": [f"{root}/1.png", f"{root}/11.png"], "text": "the left a dog", "label": 0}
    entailment = task_rows(rows, "entailment")
    entailment[2]["image"] = "2.PNG"
    loaded = data.load_labelled("entailment", write_json(tmp_path / "r.json", entailment), config)
    assert len(loaded) == 12 and loaded[1] == {"image": f"{root}/1.jpg", "text": "a dog", "label": 1}
    assert loaded[2]["image"] == f"{root}/2.PNG"


def test_load_vqa_and_its_answers(pairs, tmp_path):
    rows, config = pairs
    rows = task_rows(rows, "vqa")
    rows[0] |= {"question": "word " * 60, "kind": "count"}
    del rows[1]["answer"]
    rows[3] |= {"kind": 3, "answer": None}
    rows[4]["answer"], rows[5]["answer"] = [" ", ""], ["", "two"]
    loaded = data.load_vqa(write_json(tmp_path / "r.json", rows), config)
    assert loaded[0] == {"image": f"{tmp_path}/0.png", "text": " ".join(["word"] * 50), "question_id": 0,
                         "kind": "count", "answers": ["left", "right", "left", "cat"]}
    assert loaded[1]["answers"] is None and loaded[3]["answers"] is None and "kind" not in loaded[3]
    assert loaded[4]["answers"] is None and loaded[5]["answers"] == ["", "two"]
    assert loaded[2]["answers"] == ["dog"] and loaded[2]["image"] == f"{tmp_path}/vg/2.png"
    rows[4]["question_id"] = 2
    with pytest.raises(data.InputError, match="r.json: record 4 .from 0.: question_id 2 was there before"):
        data.load_vqa(write_json(tmp_path / "r.json", rows), config)

    assert data.load_answers(write_json(tmp_path / "a.json", ["yes", "no"])) == ["yes", "no"]
    for value, message in ([], "one or more strings, got \\[\\]"), (["yes", 3], "strings"), ({"yes": 1}, "strings"), \
            (["yes", "no", "yes"], "answer 'yes' is there twice"):
        with pytest.raises(data.InputError, match=f"a.json: .*{message}"):
            data.load_answers(write_json(tmp_path / "a.json", value))
    with pytest.raises(data.InputError, match="data.vqa.answers is null"):
        data.load_answers(None)


# References of RefCOCO: a pickle from outside

REFS = [
    {"ref_id": 7, "ann_id": 70, "image_id": 700, "split": "testA", "sentences": [{"tokens": ["red"], "raw": "r\xe9d"}]},
    {"ref_id": 8, "ann_id": 80, "image_id": 800, "split": "val", "sentences": [], "weight": 0.5, "x": [None, True]}]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_are_read(tmp_path, protocol):
    refs = REFS + ([REFS[0] | {"raw": b"\xe9"}] if protocol > 3 else [])
    (tmp_path / "refs.p").write_bytes(pickle.dumps(refs, protocol))
    assert data.read_refs(tmp_path / "refs.p") == refs


def test_pickles_of_python_2_are_read(tmp_path):
    # What Python 2's cPickle.dump([{'ref_id': 7, ...}], file, protocol=2 and 0) writes: byte strings, not unicode.
    two = b"\x80\x02]q\x01}q\x02(U\x06ref_idq\x03K\x07U\x06ann_idK\x08U\x08image_idK\x09U\x05splitU\x04va\xe9l" b"ua."
    zero = b"(lp1\n(dp2\nS'ref_id'\np3\nI7\nsS'ann_id'\nL8L\nsS'image_id'\nI9\nsS'split'\nS'va\\xe9l'\nsa."
    for content in (two, zero):
        (tmp_path / "refs.p").write_bytes(content)
        assert data.read_refs(tmp_path / "refs.p") == [{"ref_id": 7, "ann_id": 8, "image_id": 9, "split": "va\xe9l"}]


class Payload:
    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_that_would_run_code_are_refused(tmp_path, protocol):
    trace = tmp_path / "trace"
    payloads = [Payload(os.system, f"touch {trace}"), Payload(eval, f"open({str(trace)!r}, 'w')"),
                Payload(getattr, os, "getcwd"), Payload(print, "x"), np.float64(1.0), np.zeros(3), bytearray(b"x"),
                torch.zeros(2), pytest.raises]
    for payload in payloads:
        try:
            content = pickle.dumps([REFS[0] | {"extra": payload}], protocol)
        except TypeError:  # modules are not pickled: named by hand instead
            content = b"cos\nsystem\n(S'touch " + str(trace).encode() + b"'\ntR."
        (tmp_path / "refs.p").write_bytes(content)
        with pytest.raises(data.InputError, match="refs.p: no pickle of RefCOCO's references .it names ") as error:
            data.read_refs(tmp_path / "refs.p")
        assert "\n" not in str(error.value) and not trace.exists()


@pytest.mark.parametrize("content", [
    b"]r\xff\xff\xff\xff.",  # for which the unpickler in C makes a table of 64 GB
    b"]p4294967295\n.", b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b".",
    b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
    b"\x80\x02}K\x01\x85" + b"q\x00h\x00h\x00\x87" * 40 + b"Ns.",  # nested tuples, as a key
    pickle.dumps([REFS[0] | {"image_id": 1 << 9999}], 2), pickle.dumps({"a": LAUGHS}, 2), pickle.dumps([{1, 2}], 4),
    pickle.dumps([frozenset()], 4), pickle.dumps([bytearray(b"x")], 5), pickle.dumps([REFS[0] | {"x": (1, 2)}], 2)])
def test_pickles_cannot_take_memory_or_time(tmp_path, content):
    (tmp_path / "refs.p").write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(data.InputError, match="refs.p: ") as error:
        data.read_refs(tmp_path / "refs.p")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KB


def test_calls_through_other_opcodes_are_refused(tmp_path):
    trace = tmp_path / "trace"
    command = f"touch {trace}".encode()
    for content in (
        b"(S'" + command + b"'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'" + command + b"'\no.",  # OBJ
        b"\x80\x02cos\nsystem\nX" + struct.pack("<I", len(command)) + command + b"\x85\x81.",  # NEWOBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(command)]) + command + b"\x85R.",  # STACK_GLOBAL
        b"\x80\x02\x82\x01.", b"Px\n.", b"\x80\x02K\x01Q.",  # EXT1, persistent ids
        b"\x80\x02]}b.", b"\x80\x02]K\x01K\x02s.",  # BUILD and SETITEM on a list
    ):
        (tmp_path / "refs.p").write_bytes(content)
        with pytest.raises(data.InputError, match="refs.p: no pickle of RefCOCO's references"):
            data.read_refs(tmp_path / "refs.p")
        assert not trace.exists()


def test_broken_pickles_are_refused(tmp_path, monkeypatch):
    whole = pickle.dumps(REFS, 2)
    path = tmp_path / "refs.p"
    for content in [whole[:length] for length in range(0, len(whole), 7)] + [b"[]", b"\x80\xff.", b"\x80\x02J", b"}]s.",
                                                                           b"\x80\x04\x8e" + b"\xff" * 8 + b"."]:
        path.write_bytes(content)
        with pytest.raises(data.InputError, match="refs.p: no pickle of RefCOCO's references .") as error:
            data.read_refs(path)
        assert "\n" not in str(error.value)
    for value, message in ({}, "wanted a list of one or more records"), ([3], "record 0 .from 0.: wanted an object"), \
            ([REFS[0], {"ref_id": 1}], "record 1 .from 0.: key 'ann_id' is missing"), \
            ([REFS[0] | {"image_id": True}], "key 'image_id': wanted int, got bool"):
        path.write_bytes(pickle.dumps(value, 2))
        with pytest.raises(data.InputError, match=f"refs.p: .*{message}"):
            data.read_refs(path)
    with pytest.raises(data.InputError, match="none.p: .*No such file"):
        data.read_refs(tmp_path / "none.p")
    with pytest.raises(data.InputError, match="no pickle .*directory"):
        data.read_refs(tmp_path)
    path.write_bytes(whole)
    monkeypatch.setattr(data, "MAX_REFS_BYTES", len(whole) - 1)
    with pytest.raises(data.InputError, match="refs.p: .*over .* bytes"):
        data.read_refs(path)


@pytest.fixture
def grounding(pairs, tmp_path, tokenizer):
    """Two expressions with all the files that belong to them: rows, the files' contents, config."""
    rows, config = pairs
    rows = [row | {"ref_id": 7 + i} for i, row in enumerate(task_rows(rows, "grounding")[:2])]
    contents = {
        "rows": rows, "dets": {"700": [[1, 2.5, 3, 4, 0.9], [0, 0, 0, 5], [5, 6, 7, 8]]},
        "instances": {"images": [{"id": 700, "height": 20, "width": 24}, {"id": 800, "height": 9, "width": 8}],
                      "annotations": [{"id": 70, "image_id": 700, "bbox": [1, 2, 3.5, 4]},
                                      {"id": 80, "image_id": 800, "bbox": [0, 0, 2, 2]}]}}
    (tmp_path / "refs.p").write_bytes(pickle.dumps(REFS, 2))
    paths = {name: str(tmp_path / f"{name}.json") for name in contents}
    files = data.GroundingFiles(str(tmp_path), [paths["rows"]], paths["rows"], None, dets=paths["dets"],
                                refs=str(tmp_path / "refs.p"), instances=paths["instances"])
    files = dataclasses.replace(config.data, grounding=files, tokenizer=str(tmp_path / "vocab.txt"),
                                grounding_boxes=None, foils=None)
    return contents, paths, dataclasses.replace(config, data=files)


def test_load_grounding_joins_references_boxes_and_proposals(grounding, tmp_path):
    contents, paths, config = grounding
    for name, content in contents.items():
        write_json(tmp_path / f"{name}.json", content)
    assert data.load_grounding(paths["rows"], config) == [
        {"image": f"{tmp_path}/0.png", "text": "the left dog", "ref_id": 7, "split": "testA", "image_id": 700,
         "bbox": [1, 2, 3.5, 4], "height": 20, "width": 24, "dets": [[1, 2.5, 3, 4], [5, 6, 7, 8]]},
        {"image": f"{tmp_path}/1.png", "text": "the left dog", "ref_id": 8, "split": "val", "image_id": 800,
         "bbox": [0, 0, 2, 2], "height": 9, "width": 8, "dets": []}]
    null = dataclasses.replace(config.data, grounding=dataclasses.replace(config.data.grounding, dets=None))
    with pytest.raises(data.InputError, match="data.grounding.dets is null"):
        data.load_grounding(paths["rows"], dataclasses.replace(config, data=null))


@pytest.mark.parametrize("spoil, message", [
    (lambda files: files["rows"][1].update(ref_id=9), "rows.json: record 1 .from 0.: ref_id 9 is not in .*refs.p"),
    (lambda files: files["instances"]["annotations"].pop(), "rows.json: record 1 .*annotation 80 has no bbox in .*"),
    (lambda files: files["instances"]["annotations"][0].update(bbox=[1, 2, 3]), "record 0 .*annotation 70 has no bbox"),
    (lambda files: files["instances"]["annotations"][0].update(bbox=[1, 2, 3, math.nan]), "annotation 70 has no bbox"),
    (lambda files: files["instances"]["images"].pop(), "record 1 .*image 800 has no size in .*instances.json"),
    (lambda files: files["instances"]["images"][0].update(height=0), "record 0 .*image 700 has no size"),
    (lambda files: files["instances"]["images"][1].update(file_name="b/0.png"),
     "record 1 .*image 800 is b/0.png in .*instances.json, not 1.png; are these files of one data set"),
    (lambda files: files["instances"]["images"][0].update(height=10 ** 9), "image 700 has no size .*, or one over"),
    (lambda files: files["instances"]["images"][0].update(height="9"), "images: record 0 .*'height': wanted int"),
    (lambda files: files["instances"].pop("images"), "instances.json: images: wanted a list of one or more records"),
    (lambda files: files.update(instances=[]), "instances.json and .*dets.json: wanted a JSON object in each"),
    (lambda files: files.update(dets=[]), "wanted a JSON object in each"),
    (lambda files: files["dets"].update({"700": [[1, 2, 3]]}), "record 0 .*image 700 in .*dets.json are no boxes"),
    (lambda files: files["dets"].update({"700": 3}), "image 700 in .*dets.json are no boxes"),
    (lambda files: files.update(dets={"0.png": [[1, 2, 3, 4]]}), "dets.json has no proposal for any image of .*rows.json"),
])
def test_files_of_grounding_that_do_not_fit_name_row_and_file(grounding, tmp_path, spoil, message):
    contents, paths, config = grounding
    spoil(contents)
    for name, content in contents.items():
        write_json(tmp_path / f"{name}.json", content)
    with pytest.raises(data.InputError, match=message) as error:
        data.load_grounding(paths["rows"], config)
    assert "\n" not in str(error.value)


def test_check_of_grounding_counts_expressions_without_proposals(grounding, tmp_path, capsys):
    contents, paths, config = grounding
    for name, content in contents.items():
        write_json(tmp_path / f"{name}.json", content)
    assert data.check(config, "grounding")
    out = capsys.readouterr().out
    assert out.count("2 records; 0 of 2 images missing") == 2 and out.count("of 2 texts 0 are empty") == 2
    assert out.count(f"1 of 2 texts have no proposals in {paths['dets']}") == 1
    os.remove(paths["dets"])
    assert not data.check(config, "grounding") and "dets.json: cannot be read" in capsys.readouterr().out


def test_check_of_the_other_tasks(pairs, tmp_path, tokenizer, capsys):
    rows, config = pairs
    os.symlink(tmp_path, tmp_path / "vg")
    root, files = str(tmp_path), {}
    for task in ("vqa", "nlvr2", "entailment"):
        contents = task_rows(rows, task)
        parts = contents, contents[:4]
        files[task] = [write_json(tmp_path / f"{task}{i}.json", part) for i, part in enumerate(parts)]
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, "is", "it"]))
    answers = write_json(tmp_path / "answers.json", ["left", "right"])
    settings = dataclasses.replace(
        config.data, tokenizer=str(tmp_path / "vocab.txt"), grounding_boxes=None, foils=None,
        vqa=data.VqaFiles(root, files["vqa"][:1], files["vqa"][1], None, f"{root}/vg", answers),
        nlvr2=data.Files(root, files["nlvr2"][:1], None, files["nlvr2"][1]),
        entailment=data.Files(root, files["entailment"][:1], files["entailment"][1], None))
    config = dataclasses.replace(config, data=settings, vqa=dataclasses.replace(config.vqa, max_tokens=3))
    assert data.check(config, "vqa")
    out = capsys.readouterr().out
    assert "12 records; 0 of 12 images missing" in out and "4 records; 0 of 4 images missing" in out
    assert "of 12 questions 0 are empty, 0.0% cut at 30 words, 100.0% cut at 3 tokens" in out
    assert f"of 4 questions 0 are empty, 0.0% cut at 50 words, 0.0% cut at {config.model.max_positions} tokens" in out
    assert out.count("of 24 answers 50.0% are in ") == 1  # 3 of 4 answers, then none of 2, four times
    assert "; 0 of 12 records have none" in out
    questions = task_rows(rows, "vqa")
    write_json(tmp_path / "vqa0.json", [questions[0], *(row | {"answer": [[], " "][i % 2]} for i, row in enumerate(questions[1:]))])
    assert not data.check(config, "vqa")
    out = capsys.readouterr().out
    assert "; 11 of 12 records have none" in out and "more than max_bad_image_share (0.01) of the records" in out
    write_json(tmp_path / "vqa0.json", [questions[0], questions[1] | {"image": "/export/1.jpg"}])
    assert not data.check(config, "vqa")
    assert "vqa0.json: record 1 (from 0): image '/export/1.jpg' lies outside image_root" in capsys.readouterr().out
    write_json(tmp_path / "vqa0.json", [row | {"question": " " + row["question"]} for row in questions])
    assert data.check(config, "vqa")  # a space in front, which cleaning leaves, makes no empty question
    write_json(tmp_path / "vqa0.json", questions)
    assert data.check(config, "nlvr2")
    assert "of 12 sentences 0 are empty" in capsys.readouterr().out
    unread = dataclasses.replace(config, data=dataclasses.replace(settings, foils="none.json"),
                                 model=dataclasses.replace(config.model, text_weights="none.pth"))
    assert data.check(unread, "nlvr2"), capsys.readouterr().out  # it starts from a checkpoint
    assert not data.check(dataclasses.replace(unread, nlvr2=dataclasses.replace(config.nlvr2, start=None)), "nlvr2")
    out = capsys.readouterr().out
    assert "model.text_weights: none.pth is missing" in out and "data.foils" not in out
    assert not data.check(config, "entailment")
    out = capsys.readouterr().out
    assert "12 of 12 images missing" in out and f"  missing or empty: {root}/0.jpg" in out
    unranked = dataclasses.replace(settings, vqa=dataclasses.replace(settings.vqa, val=None, answers=None))
    assert data.check(dataclasses.replace(config, data=unranked), "vqa")  # nothing is ranked; it is looked through all the same
    out = capsys.readouterr().out
    assert "of 12 questions 0 are empty" in out and "  0 of 12 records have no answer" in out
    write_json(tmp_path / "vqa1.json", task_rows(rows, "vqa")[:2] * 2)
    assert not data.check(config, "vqa") and "question_id 0 was there before" in capsys.readouterr().out
    write_json(tmp_path / "answers.json", [])
    assert not data.check(config, "vqa") and "answers.json: wanted a JSON list" in capsys.readouterr().out


# How long texts may be


def test_training_texts_are_cut_at_max_words(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    config = data.load_config("scenes", [f"data.pretrain_image_root={tmp_path}", "data.max_words=2"])
    dataset = make_dataset([{"image": "0.png", "caption": "One, two three"}], config, tmp_path / "r.json")
    assert dataset[0, 0]["text"] == "one two"


def test_texts_of_evaluation_are_cut_as_in_training_in_pre_training_and_retrieval_alone():
    config = data.load_config("paper")
    cuts = {task: data.evaluation_max_tokens(config, task) for task in data.TASKS}
    assert (cuts.pop("pretrain"), cuts.pop("retrieval")) == (25, 30) and set(cuts.values()) == {512}
