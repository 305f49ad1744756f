"""data.py: settings, annotation files, images and batches, on hand-made files; every error names its file or key."""
import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import data
import softmask

VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue dog cat left right of the on".split()


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
    config = data.load_config("scenes", ["model.image_size=16", "augment.crop_min_area=1.0"])
    return rows, str(tmp_path), config


def make_dataset(rows, root, config, path, seed=0):
    records = data.Records.from_json([write_json(path, rows)], data.FORMATS["pretrain"])
    return data.PairDataset(records, root, config, seed)


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
    ("data.scenes.trian=3", "data.scenes.train"),
    ("data.retrieval_sets.new.image_root=/x", "data.retrieval_sets.new.train is missing"),
    ("pretrain.batch_size=3.0", "pretrain.batch_size: wanted int, got 3.0"),
    ("pretrain.batch_size=true", "pretrain.batch_size: wanted int, got True"),
    ("pretrain.lr=fast", "pretrain.lr: wanted float, got 'fast'"),
    ("pretrain.lr=.nan", "pretrain.lr: wanted float, got nan"),
    ("pretrain.epochs=null", "pretrain.epochs: wanted int, got None"),
    ("method.soft_mask=1", "method.soft_mask: wanted bool, got 1"),
    ("data.pretrain_files=[a, 1]", r"data.pretrain_files\[1\]: wanted str, got 1"),
    ("data.pretrain_files=a.json", "data.pretrain_files: wanted list, got 'a.json'"),
    ("model=3", "model: wanted mapping, got 3"),
    ("seed.x=3", "seed: wanted int"),
    ("seed", "'seed': wanted key=value"),
    ("seed=[1", r"seed: '\[1' is not YAML"),
    ("scale=paper", "give it as --scale"),
    ("precision=fp16", "precision: 'fp16' is none of float32, bf16"),
    ("method.mask_text_for=itc", "method.mask_text_for: 'itc' is none of all, mlm"),
    ("data.scenes.level=hard", "data.scenes.level: 'hard' is none of plain, rich"),
    ("pretrain.batch_size=0", "pretrain.batch_size: 0 is out of range"),
    ("seed=-1", "seed: -1 is out of range"),
    ("model.dropout=1.5", "model.dropout: 1.5 is out of range"),
    ("method.temp=0.0", "method.temp"),
    ("model.image_size=65", "model.image_size must be a multiple of model.patch_size"),
    ("model.vision_heads=3", "model.vision_width must be a multiple of model.vision_heads"),
    ("model.text_heads=3", "model.text_width must be a multiple of model.text_heads"),
    ("data.max_tokens=41", "data.max_tokens must be at most model.max_positions"),
    ("method.attention_layer=2", r"method.attention_layer \(2\) must be below model.fusion_layers - 1 \(1\)"),
    ("model.fusion_layers=1", r"method.attention_layer \(0\)"),
    ("data.retrieval=coco", r"data.retrieval: 'coco' is none of data.retrieval_sets \(scenes\)"),
])
def test_bad_override_names_its_key(override, message):
    with pytest.raises(data.InputError, match=message) as error:
        data.load_config("scenes", [override])
    assert "command line" in str(error.value) and "\n" not in str(error.value)


def test_last_fusion_layer_is_allowed_without_soft_mask():
    data.load_config("scenes", ["model.fusion_layers=1", "method.soft_mask=false"])


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
    records = data.Records.from_json(files, data.FORMATS["pretrain"])
    assert len(records) == 3 and list(records) == rows + rows[:1]
    assert list(pickle.loads(pickle.dumps(records))) == list(records)
    assert records.buffer.dtype == np.uint8 and records.offsets.dtype == np.int64


@pytest.mark.parametrize("text, message", [
    ('[{"image": "a",\n "caption": }]', r"bad.json: not JSON \(line 2: "),
    ("[" * 100_000, "bad.json: not JSON"),
    ('{"image": "a"}', "bad.json: wanted a JSON list"),
    ("[]", "bad.json: wanted a JSON list of one or more records"),
    ('[{"image": "a", "caption": "x"}, 3]', r"bad.json: record 1 \(from 0\): wanted an object, got int"),
    ('[{"image": "a"}]', r"bad.json: record 0 \(from 0\): key 'caption' is missing"),
    ('[{"image": 3, "caption": "x"}]', r"record 0 \(from 0\): key 'image': wanted str, got int"),
    ('[{"image": "a", "caption": null}]', "key 'caption': wanted str or list, got NoneType"),
    ('[{"image": "a", "caption": ["x", 1]}]', "key 'caption': wanted a list of strings"),
])
def test_bad_annotation_file_names_file_and_record(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(data.InputError, match=message) as error:
        data.Records.from_json([str(tmp_path / "bad.json")], data.FORMATS["pretrain"])
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_unreadable_annotation_files(tmp_path):
    with pytest.raises(data.InputError, match="none.json: cannot be read"):
        data.Records.from_json([str(tmp_path / "none.json")], {})
    (tmp_path / "latin.json").write_bytes('["é"]'.encode("latin-1"))
    with pytest.raises(data.InputError, match="latin.json: not JSON"):
        data.Records.from_json([str(tmp_path / "latin.json")], {})
    path = write_json(tmp_path / "ids.json", [{"image": "a", "caption": "x", "image_id": True}])
    with pytest.raises(data.InputError, match="ids.json: .*'image_id': wanted str or int, got bool"):
        data.Records.from_json([path], data.FORMATS["retrieval_train"])


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
    red = Image.new("RGB", (8, 4), (250, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    red.save(tmp_path / "turned.png", exif=exif)
    assert data.read_image(tmp_path / "turned.png").size == (4, 8)
    red.convert("CMYK").save(tmp_path / "cmyk.jpg")
    red.convert("P").save(tmp_path / "palette.png")
    red.convert("RGBA").save(tmp_path / "alpha.png")
    red.convert("LA").save(tmp_path / "grey_alpha.png")
    red.convert("1").save(tmp_path / "bits.png")
    red.save(tmp_path / "frames.gif", save_all=True, append_images=[Image.new("RGB", (8, 4), "blue")])
    red.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[red])
    for name in ("cmyk.jpg", "palette.png", "alpha.png", "grey_alpha.png", "bits.png", "frames.gif", "phone.jpg"):
        image = data.read_image(tmp_path / name)
        assert (image.mode, image.size) == ("RGB", (8, 4)), name
        if name not in ("grey_alpha.png", "bits.png"):
            assert np.abs(np.array(image)[0, 0].astype(int) - (250, 10, 20)).max() < 26, name  # coarse palettes


def test_bad_images_name_path_and_reason(tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "figure.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    for name, reason in (("cut.jpg", "truncated"), ("text.jpg", "identify"), ("none.jpg", "No such file"),
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
    rows, root, config = pairs
    dataset, other = (make_dataset(rows, root, config, tmp_path / "r.json", seed) for seed in (0, 1))
    first, *rest = (dataset[0, 3], dataset[0, 3], dataset[1, 3], other[0, 3])
    assert first["image"].shape == (3, 16, 16) and first["image"].dtype == torch.uint8 and first["replaced"] == []
    assert torch.equal(first["image"], rest[0]["image"]) and first["caption"] == rest[0]["caption"]
    assert len({dataset[epoch, 3]["caption"] for epoch in range(20)}) == 4  # two captions, flipped or not
    assert [dataset[epoch, 3]["caption"] for epoch in range(20)] != [other[epoch, 3]["caption"] for epoch in range(20)]


def test_text_and_image_are_flipped_together(pairs, tmp_path):
    rows, root, config = pairs
    dataset = make_dataset(rows, root, config, tmp_path / "r.json")
    seen = set()
    for epoch in range(10):
        item = dataset[epoch, 0]
        left_brighter = bool(item["image"][..., :6].float().mean() > item["image"][..., 10:].float().mean())
        assert ("left" in item["caption"], "right" in item["caption"]) == (left_brighter, not left_brighter)
        seen.add(left_brighter)
    assert seen == {True, False}
    still = dataclasses.replace(config, augment=dataclasses.replace(config.augment, flip=False))
    dataset = make_dataset(rows, root, still, tmp_path / "r.json")
    assert all("left" in dataset[epoch, 0]["caption"] for epoch in range(10))


def test_bad_records_are_replaced_and_reported(pairs, tmp_path):
    rows, root, config = pairs
    rows[0]["image"], rows[1]["caption"], rows[2]["caption"], rows[3]["image"] = "none.png", "?!", [], "../0.png"
    dataset = make_dataset(rows, root, config, tmp_path / "r.json")
    for index, path, reason in ((0, "none.png", "No such file"), (1, "1.png", "empty caption"),
                                (2, "2.png", "empty caption"), (3, "../0.png", "outside image_root")):
        item = dataset[0, index]
        assert item["replaced"][0][0] == path and reason in item["replaced"][0][1]
        assert item["caption"] and item["image_id"] in [data.hash63(row["image"]) for row in rows[4:]]
        assert torch.equal(item["image"], dataset[0, index]["image"])
    with pytest.raises(data.InputError, match="20 records in a row are bad, the last '1.png' .empty caption."):
        make_dataset(rows[1:2], root, config, tmp_path / "r.json")[0, 0]


def test_image_ids(pairs, tmp_path):
    rows, root, config = pairs
    rows[0]["image_id"], rows[1]["image_id"], rows[2]["image_id"] = 7, "7", "coco_7"
    dataset = make_dataset(rows, root, config, tmp_path / "r.json")
    ids = [dataset[0, index]["image_id"] for index in range(4)]
    assert ids[0] == ids[1] and len(set(ids)) == 3 and all(0 <= number < 2 ** 63 for number in ids)
    assert ids[3] == data.hash63("3.png") == 82346550029423253  # half of b2sum -l 64, the same everywhere


def take(batches, count):
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


def test_order_of_the_data_depends_on_the_step_alone():
    whole = take(data.ShuffledBatches(50, 12, 1, 0, 1, 0, 0), 9)  # four steps an epoch, two records dropped
    assert whole[4][0][0] == 1 and whole[3][0][0] == 0
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


def test_batches_are_the_same_for_any_number_of_workers(pairs, tmp_path, tokenizer):
    rows, root, config = pairs
    rows[5]["image"] = "none.png"
    dataset = make_dataset(rows, root, config, tmp_path / "r.json")
    runs = []
    for workers in (0, 2):
        loader = data.make_loader(dataset, data.ShuffledBatches(12, 4, 1, 0, 1, 0, 1), tokenizer, 5, workers)
        runs.append(take(loader, 4))
    for batch, other in zip(*runs):
        assert batch["replaced"] == other["replaced"] and batch["truncated"] == other["truncated"] == 4
        for name in ("image", "input_ids", "attention_mask", "word_ids", "image_ids"):
            assert torch.equal(batch[name], other[name])
        assert batch["image"].shape == (4, 3, 16, 16) and batch["image"].dtype == torch.uint8
        assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["word_ids"].shape == (4, 5)
        assert batch["input_ids"][0, :4].tolist() == [VOCABULARY.index(word) for word in ("[CLS]", "a", "red", "dog")]
        assert batch["image_ids"].dtype == batch["word_ids"].dtype == torch.int64
    assert [path for batch in runs[0] for path, _ in batch["replaced"]].count("none.png") in (1, 2)


# Evaluation

def test_load_retrieval(tmp_path):
    rows = [{"image": "a.jpg", "caption": ["One, two!", "three four five"]}, {"image": "b.jpg", "caption": "Six"}]
    images, captions, image_of_caption = data.load_retrieval(write_json(tmp_path / "r.json", rows), "root", 2)
    assert images == ["root/a.jpg", "root/b.jpg"] and captions == ["one two", "three four", "six"]
    assert image_of_caption.tolist() == [0, 0, 1] and image_of_caption.dtype == np.int64
    rows[1]["image"] = "../b.jpg"
    with pytest.raises(data.InputError, match="'../b.jpg' lies outside image_root 'root'"):
        data.load_retrieval(write_json(tmp_path / "r.json", rows), "root", 2)


def test_evaluation_resizes_to_a_square_without_cropping(tmp_path):
    halves = np.tile(np.repeat(np.array([0, 255], np.uint8), 8), (4, 1))  # 4 high, 16 wide
    Image.fromarray(halves).save(tmp_path / "halves.png")
    image = data.ImageDataset([str(tmp_path / "halves.png")], 8)[0]
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8
    assert image[:, :, 0].max() < 5 and image[:, :, 7].min() > 250


def test_check_counts_what_is_missing_and_cut(pairs, tmp_path, tokenizer, capsys):
    rows, root, config = pairs
    pretrain = write_json(tmp_path / "p.json", rows)
    evaluation = write_json(tmp_path / "e.json", rows[:2])
    sets = {"tiny": data.RetrievalSet(root, pretrain, evaluation, evaluation)}
    files = dataclasses.replace(
        config.data, scenes=None, tokenizer=str(tmp_path / "vocab.txt"), max_tokens=5, max_words=3,
        pretrain_files=[pretrain], pretrain_image_root=root, retrieval="tiny", retrieval_sets=sets,
        grounding_boxes=None, foils=None)
    config = dataclasses.replace(config, data=files)
    assert data.check(config, "pretrain")
    out = capsys.readouterr().out
    assert f"{pretrain}: 12 records; 0 of 12 images missing" in out and out.count("2 records; 0 of 2") == 2
    assert "of 24 captions 0 are empty, 100.0% cut at 3 words, 0.0% cut at 5 tokens" in out
    assert not data.check(config, "retrieval")  # its rows need an image_id
    assert f"{pretrain}: record 0 (from 0): key 'image_id' is missing" in capsys.readouterr().out

    rows[0]["image"], rows[1]["caption"] = "none.png", ["a", "..."]
    write_json(tmp_path / "p.json", rows)
    (tmp_path / "e.json").write_text("[")
    files = dataclasses.replace(files, foils=str(tmp_path / "foils.json"), max_tokens=3, max_words=30)
    assert not data.check(dataclasses.replace(config, data=files), "pretrain")
    out = capsys.readouterr().out
    assert "1 of 12 images missing" in out and f"  missing: {root}/none.png" in out
    assert "1 are empty, 0.0% cut at 30 words, 91.7% cut at 3 tokens" in out
    assert f"{evaluation}: not JSON" in out and f"data.foils: {tmp_path}/foils.json is missing" in out
