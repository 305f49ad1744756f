"""eval.py: retrieval against naive loops, pointing and foils by hand, and its commands on a small trained run."""
import dataclasses
import functools
import json
import math
import os
import pathlib
import types

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

import commands
import data
import eval as evaluation
import softmask
from commands import TINY, run

CAPTIONS = ["a small red circle left of a large blue star", "a star", "", "a large yellow diamond above a cyan cross"]


@pytest.fixture(scope="module")
def scene():
    """A small untrained model in evaluation mode, its tokenizer, config and the folder of the scenes."""
    config = data.resolve_scenes(data.load_config("scenes", TINY))
    tokenizer = softmask.load_tokenizer(config.data.tokenizer)
    settings = data.config_to_dict(config)
    torch.manual_seed(3)
    method = settings["method"] | {"queue_size": 0}
    model = softmask.build_model("pretrain", len(tokenizer), settings["model"], method).eval()
    with torch.no_grad():  # of a start from N(0, 0.02) all scores are alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model, tokenizer, config, commands.scenes_folder()


def tokenize_with(tokenizer, config):
    return functools.partial(softmask.tokenize, tokenizer, max_tokens=config.pretrain.max_tokens)


# Retrieval


def naive_recalls(scores, is_own):
    """Recall at 1, 5 and 10, query by query: the best own candidate stands behind all others not below it."""
    ranks = []
    for query, row in enumerate(scores):
        best = max((score for candidate, score in enumerate(row) if is_own(query, candidate)), default=-math.inf)
        ranks.append(sum(not score < best for candidate, score in enumerate(row) if not is_own(query, candidate)))
    return [100 * sum(rank < k for rank in ranks) / len(ranks) for k in (1, 5, 10)]


@pytest.mark.parametrize("distinct", [3, 1000])  # with few distinct scores most are ties
def test_retrieval_metrics_are_those_of_a_naive_loop(distinct):
    generator = torch.Generator().manual_seed(distinct)
    image_of_text = torch.randint(20, (47,), generator=generator)
    image_of_text[image_of_text == 7] = 8  # an image without a text
    sim = torch.randint(distinct, (20, 47), generator=generator).float()
    sim_i2t = sim.masked_fill(torch.rand(sim.shape, generator=generator) < 0.3, -torch.inf)
    sim_t2i = sim.T.masked_fill(torch.rand(sim.T.shape, generator=generator) < 0.3, -torch.inf)
    metrics = evaluation.retrieval_metrics(sim_i2t, sim_t2i, image_of_text)
    txt = naive_recalls(sim_i2t.tolist(), lambda image, text: image_of_text[text] == image)
    img = naive_recalls(sim_t2i.tolist(), lambda text, image: image_of_text[text] == image)
    assert [metrics[f"txt_r{k}"] for k in (1, 5, 10)] == pytest.approx(txt)
    assert [metrics[f"img_r{k}"] for k in (1, 5, 10)] == pytest.approx(img)
    assert metrics["txt_r_mean"] == pytest.approx(sum(txt) / 3) and metrics["img_r_mean"] == pytest.approx(sum(img) / 3)
    assert metrics["r_mean"] == pytest.approx(sum(txt + img) / 6)


@pytest.mark.parametrize("value", [0.0, -math.inf, math.nan])
def test_scores_that_tell_nothing_get_nothing(value):
    sim = torch.full((30, 30), value)
    metrics = evaluation.retrieval_metrics(sim, sim, torch.arange(30))
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize("top_k, batch_size", [(3, 4), (100, 4), (100, 1)])  # in the last an image's nine texts are split
def test_retrieval_scores_are_those_of_single_pairs(top_k, batch_size, scene):
    model, tokenizer, config, folder = scene
    config = dataclasses.replace(config, eval=data.EvalConfig(batch_size=batch_size, top_k=top_k, answers_top_k=1, pictures=1))
    paths = [str(folder / "images" / "val" / f"{number:05d}.jpg") for number in range(7)]
    captions = [*CAPTIONS, "a large green square below a small white triangle", *CAPTIONS[:2], "purple", "a cross"]
    sim, scores_i2t, scores_t2i = evaluation.retrieval_scores(model, tokenize_with(tokenizer, config), paths, captions, config)
    api = softmask.Pretrained(model, tokenizer, config.pretrain.max_tokens, config.data.max_words)
    images = [data.read_image(path) for path in paths]
    image_feat, text_feat = [api.encode_image(image) for image in images], [api.encode_text(text) for text in captions]
    for i, image in enumerate(images):
        for t, text in enumerate(captions):
            torch.testing.assert_close(sim[i, t], image_feat[i] @ text_feat[t], rtol=0, atol=1e-5)
            for rivals, score in ((sim[i], scores_i2t[i, t]), (sim[:, t], scores_t2i[t, i])):
                if (rivals > sim[i, t] - 1e-6).sum() <= top_k:
                    assert score.isfinite()
                if (rivals > sim[i, t] + 1e-6).sum() >= top_k:  # between the two it ties, and either will do
                    assert score == -math.inf
                if score.isfinite():
                    assert score.item() == pytest.approx(api.match(image, text)[1], rel=1e-5, abs=1e-5)
    assert scores_i2t.isfinite().sum(1).tolist() == [min(top_k, 9)] * 7 or top_k == 3  # equal captions tie
    assert scores_t2i.isfinite().sum(1).tolist() == [min(top_k, 7)] * 9


def test_match_scores_under_bf16_are_not_rounded_to_ties(scene):
    """With 8 bits many scores were equal, each a miss."""
    model, tokenizer, config, folder = scene
    config = dataclasses.replace(config, precision="bf16")
    tokenize = tokenize_with(tokenizer, config)
    paths = [str(folder / "images" / "val" / f"{number:05d}.jpg") for number in range(7)]
    _, scores, _ = evaluation.retrieval_scores(model, tokenize, paths, CAPTIONS, config)
    scores = scores[scores.isfinite()]
    assert (scores != scores.bfloat16().float()).float().mean() > 0.9

    foils = json.loads((folder / "foils_test.json").read_text())[:20]
    seen, match_scores = [], evaluation.match_scores
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "match_scores", lambda *given: seen.append(match_scores(*given)) or seen[-1])
        evaluation.foil_metrics(model, tokenize, foils, folder, config)
    scores = torch.cat(seen)
    assert len(scores) == 40 and (scores != scores.bfloat16().float()).float().mean() > 0.9
    assert not scores.requires_grad


def test_a_gpu_would_not_round_float32():
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_two_processes_have_the_figures_of_one(trained, tmp_path):
    rows = json.loads((commands.scenes_folder() / "retrieval_test.json").read_text())
    for row in rows[::3]:
        row["caption"] += ["a star", "a large cross"]
    (tmp_path / "rows.json").write_text(json.dumps(rows))  # 13 images with 1 or 3 captions
    arguments = ["eval.py", "pretrain", "--checkpoint", trained.out, *trained.arguments, "eval.pictures=0",
                 f"data.retrieval_sets.scenes.test={tmp_path / 'rows.json'}"]
    one, two = run(tmp_path, *arguments), run(tmp_path, *arguments, processes=2)
    assert one.status == 0 and two.status == [0, 0], two.err
    assert one.out == two.out and "re-ranked by ITM" in one.out


def test_out_is_for_pictures(tmp_path):
    with pytest.raises(data.InputError, match="--image and --text are for masks; retrieval is evaluated on the files of its scale"):
        evaluation.main(["retrieval", "--image", "photo.jpg", "--text", "a star"])
    with pytest.raises(data.InputError, match="--out is for masks; the figures of retrieval are printed"):
        evaluation.main(["retrieval", "--out", str(tmp_path)])


def test_evaluation_without_a_file_is_refused(trained, tmp_path):
    for value, message in (("null", "test is null; name the file"), ("none.json", "none.json is missing; name the file")):
        setting = f"data.retrieval_sets.scenes.test={value}"
        result = run(tmp_path, "eval.py", "pretrain", "--checkpoint", trained.out, *trained.arguments, setting)
        assert message in result.error and result.error.endswith(", or give --split val")


def test_a_gallery_of_ones_own_beside_the_scenes_boxes_and_foils(scene, tmp_path, monkeypatch):
    """These were looked for among its images. The picture has each image once, with its first caption."""
    model, tokenizer, config, folder = scene
    for name in ("one", "two"):
        Image.new("RGB", (40, 30), "red").save(tmp_path / f"{name}.jpg")
    rows = [{"image": f"{name}.jpg", "caption": [f"a {name}", "a star"]} for name in ("one", "two")]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    drawn = []
    monkeypatch.setattr(evaluation, "draw_masks", lambda api, pairs, path: drawn.extend(pairs))
    mine = data.Files(str(tmp_path), [], None, str(tmp_path / "rows.json"))
    settings = dataclasses.replace(config.data, retrieval="mine", retrieval_sets={"mine": mine})
    metrics = evaluation.evaluate_pretrained(model, tokenizer, dataclasses.replace(config, data=settings), str(tmp_path))
    assert metrics.keys() == {"zero_shot", "reranked", "pointing", "foils"}
    assert drawn == [(str(tmp_path / "one.jpg"), "a one"), (str(tmp_path / "two.jpg"), "a two")]


# Pointing


def test_pointing_by_hand():
    cam = torch.zeros(4, 4)
    cam[1, 2], cam[3, 0] = 3.0, 1.0  # patch centres at (x, y) = (0.625, 0.375) and (0.125, 0.875)
    right, left, all_of_it = (0.5, 0.25, 0.5, 0.25), (0.0, 0.75, 0.25, 0.25), (0.0, 0.0, 1.0, 1.0)
    hit = evaluation.pointing(cam, right, [left, all_of_it])
    assert hit == {"area_own": 2 / 16, "hit_own": 1.0, "hit_other": 0.5, "mass_own": 0.75, "mass_other": (0.25 + 1) / 2}
    miss = evaluation.pointing(cam, left, [right])
    assert miss == {"area_own": 1 / 16, "hit_own": 0.0, "hit_other": 1.0, "mass_own": 0.25, "mass_other": 0.75}
    alone = evaluation.pointing(cam, right, [])
    assert (alone["hit_other"], alone["mass_other"], alone["hit_own"]) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("value", [0.0, 0.7])
def test_constant_map_points_nowhere(value):
    result = evaluation.pointing(torch.full((4, 4), value), (0.0, 0.0, 1.0, 1.0), [(0.0, 0.0, 1.0, 1.0)])
    assert result.pop("area_own") == 1.0 and set(result.values()) == {0.0}


def test_box_at_the_border_takes_centres_from_its_left_and_upper_edge_on():
    cam = torch.zeros(4, 4)
    cam[3, 3] = 1.0  # centre at 0.875
    for box, own in [((0.875, 0.875, 0.125, 0.125), 1), ((0.88, 0.5, 0.12, 0.5), 0), ((0.5, 0.5, 0.375, 0.5), 0),
                     ((0.5, 0.5, 0.4, 0.4), 1), ((0.75, 0.75, 0.25, 0.25), 1)]:
        assert evaluation.pointing(cam, box, [])["hit_own"] == own, box


OBJECT = {"box": [0, 0, 8.5, 8], "attribute_indices": {"color": 1, "shape": 2}}


@pytest.mark.parametrize("change, message", [
    ({"objects": [OBJECT | {"box": [0, 0, 8]}]}, r"a box is \[x, y, width, height\], got \[0, 0, 8\]"),
    ({"objects": [OBJECT | {"box": [0, 0, 8, "8"]}]}, "got .0, 0, 8, '8'."),
    ({"objects": [OBJECT | {"box": [0, 0, 8, True]}]}, "got .0, 0, 8, True."),
    ({"objects": [OBJECT | {"box": [0, 0, 8, 8, 8]}]}, "got .0, 0, 8, 8, 8."),
    ({"other_boxes": [[0, 0, 8, float("nan")]]}, "got .0, 0, 8, nan."),
    ({"objects": [{}]}, "got None"), ({"objects": ["red star"]}, "got None"),
    ({"other_boxes": [[0, 0, 8, 8], 7]}, "got 7"),
    ({"objects": [OBJECT | {"attribute_indices": {"color": 1}}]}, "the word of its \"shape\", and of others, got {'color': 1}"),
    ({"objects": [OBJECT | {"attribute_indices": {"shape": "star"}}]}, "got {'shape': 'star'}"),
    ({"objects": [OBJECT | {"attribute_indices": [1, 2]}]}, r"got \[1, 2\]"),
])
def test_boxes_that_pointing_cannot_use_are_named_before_training(scene, tmp_path, change, message):
    _, _, config, _ = scene
    path = tmp_path / "boxes.json"
    row = {"image": "a.jpg", "caption": "red star", "objects": [OBJECT], "other_boxes": [[1, 2, 3, 4]]}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, grounding_boxes=str(path)))
    path.write_text(json.dumps([row, row]))
    assert evaluation.scene_rows(config, "grounding_boxes") == [row, row]
    path.write_text(json.dumps([row, row | change]))
    with pytest.raises(data.InputError, match=f"boxes.json: record 1 .from 0.: .*{message}"):
        evaluation.scene_rows(config, "grounding_boxes")


def test_grounding_looks_at_the_pieces_of_the_shape_word(scene, monkeypatch):
    model, tokenizer, config, folder = scene
    row = json.loads((folder / "boxes_test.json").read_text())[0]
    row |= {"caption": "a small red diamond left of a large blue star", "other_boxes": []}
    row["objects"] = [{"attribute_indices": {"size": 1, "color": 2, "shape": 3}, "box": [0, 0, 8, 8]},
                      {"attribute_indices": {"color": 8, "shape": 9}, "box": [24, 16, 8, 8]}]
    tokens = softmask.tokenize(tokenizer, [row["caption"]], config.pretrain.max_tokens)
    diamond, star = ((tokens["word_ids"][0] == index).nonzero().flatten() for index in (3, 9))
    assert len(diamond) == 2 and len(star) == 1  # "diamond" has two pieces
    patches = {"diamond": 0, "star": 2 * 4 + 3}

    def fake_attention(attention, match_logit):
        cam = torch.zeros(len(match_logit), tokens["input_ids"].shape[1], 16)
        cam[:, :, 5] = 1.0  # all other words look elsewhere
        cam[:, diamond] = cam[:, star] = 0.0
        cam[:, diamond[1], patches["diamond"]] = 0.5  # one piece alone sees it: their average still does
        cam[:, star, patches["star"]] = 2.0
        blue = tokens["word_ids"][0] == 8
        cam[:, blue] = 0.0
        cam[:, blue, 2 * 4 + 3] = 1.0
        return cam

    monkeypatch.setattr(softmask, "word_attention", fake_attention)
    right = evaluation.pointing_metrics(model, tokenize_with(tokenizer, config), [row], folder, 32, config)
    assert (right["hit_own"], right["mass_own"], right["hit_other"], right["objects"]) == (100, 100, 0, 2)
    assert right["ratio"] is None and right["area_own"] == pytest.approx(100 / 16)
    assert (right["color"]["hit_own"], right["color"]["hit_other"], right["color"]["objects"]) == (50, 0, 2)  # red misses
    assert (right["size"]["hit_own"], right["size"]["objects"]) == (0, 1)
    assert right.keys() - {"color", "size"} == right["size"].keys()
    patches["diamond"], patches["star"] = patches["star"], patches["diamond"]
    wrong = evaluation.pointing_metrics(model, tokenize_with(tokenizer, config), [row] * 3, folder, 32, config)
    assert (wrong["hit_own"], wrong["mass_own"], wrong["hit_other"], wrong["ratio"]) == (0, 0, 100, 0)
    assert wrong["objects"] == 6
    row["other_boxes"] = [[0, 0, 8, 8]]  # of an object that the caption does not name, before the diamond
    patches["diamond"], patches["star"] = 0, 0  # so the diamond's word hits its own and one of two, the star's both others
    other = evaluation.pointing_metrics(model, tokenize_with(tokenizer, config), [row], folder, 32, config)
    assert (other["hit_own"], other["hit_other"]) == (50, 75)


def test_grounding_leaves_no_gradient(scene):
    model, tokenizer, config, folder = scene
    rows = json.loads((folder / "boxes_test.json").read_text())
    metrics = evaluation.pointing_metrics(model, tokenize_with(tokenizer, config), rows, folder, 32, config)
    assert metrics["objects"] == 26 and 0 <= metrics["hit_own"] <= 100
    assert all(parameter.grad is None for parameter in model.parameters())


def test_foils_by_hand(scene, monkeypatch):
    model, tokenizer, config, folder = scene
    image = json.loads((folder / "foils_test.json").read_text())[0]["image"]
    kinds = ["color"] * 4 + ["shape"] * 3
    rows = [{"image": image, "caption": "a red star", "foil": "a blue star", "kind": kind} for kind in kinds]
    true, false = [1.0, 2.0, 0.0, 5.0, 1.0, 1.0, 1.0], [0.0, 1.0, 3.0, 5.0, 2.0, 1.0, 7.0]  # the fourth is a tie
    batches = iter([true[:5], false[:5], true[5:], false[5:]])  # batches of five: captions, then foils

    class Scores(nn.Module):
        def forward(self, states):
            scores = torch.tensor(next(batches))
            assert states.shape == (len(scores), 32)
            return torch.stack([-scores, scores], dim=1)

    monkeypatch.setitem(model._modules, "itm_head", Scores())  # setattr would not put the head back: scene is shared
    metrics = evaluation.foil_metrics(model, tokenize_with(tokenizer, config), rows, folder, config)
    assert metrics["color"] == {"accuracy": 50.0, "standard_error": pytest.approx(25.0), "foils": 4}
    assert metrics["shape"]["accuracy"] == 0 and metrics["shape"]["foils"] == 3


def test_foils_and_maps_are_those_of_single_pairs(scene, monkeypatch):
    model, tokenizer, config, folder = scene
    tokenize = tokenize_with(tokenizer, config)
    api = softmask.Pretrained(model, tokenizer, config.pretrain.max_tokens, config.data.max_words)
    rows, above = json.loads((folder / "foils_test.json").read_text())[:16], {}
    for row in rows:
        image = data.read_image(folder / row["image"])
        above.setdefault(row["kind"], []).append(api.match(image, row["caption"])[1] > api.match(image, row["foil"])[1])
    metrics = evaluation.foil_metrics(model, tokenize, rows, folder, config)
    assert {kind: values["accuracy"] for kind, values in metrics.items()} == {
        kind: 100 * sum(values) / len(values) for kind, values in above.items()
    }
    assert {value for values in above.values() for value in values} == {True, False}

    rows, seen = rows[::4], []
    rows[1]["caption"] = "a star"  # shorter than the others: padded
    monkeypatch.setattr(evaluation, "grounding_accuracy", lambda rows, cams: seen.append(cams))
    pairs = [{"image": folder / row["image"], "text": row["caption"]} for row in rows]
    evaluation.ground(model, pairs, tokenize, config)
    tokens = evaluation.to_device(tokenize([pair["text"] for pair in pairs]), "cpu")
    images = torch.cat([images for _, images in evaluation.image_batches([p["image"] for p in pairs], range(4), config, "cpu")])
    cams = evaluation.token_attention(model, images, tokens, config)
    for cam, averaged, pair, word_ids, mask in zip(cams, seen[0], pairs, tokens["word_ids"], tokens["attention_mask"]):
        _, maps = api.word_attention(data.read_image(pair["image"]), pair["text"])
        of_words = torch.stack([cam[word_ids == word].mean(0) for word in range(len(maps))]).unflatten(1, (4, 4))
        torch.testing.assert_close(of_words, maps, rtol=1e-3, atol=1e-3 * maps.max().item())
        mean = cam[mask.bool()].mean(0).view(4, 4)
        torch.testing.assert_close(averaged, mean, rtol=1e-3, atol=1e-3 * mean.max().item())


def test_figures_of_the_printed_table_stand_below_their_names():
    pointing = {"hit_own": 1.0, "hit_other": 0.0, "ratio": None, "area_own": 3.0, "mass_own": 4.0, "mass_other": 5.0}
    pointing["size"] = {"hit_own": 6.0, "hit_other": 8.0, "ratio": 0.75, "area_own": 9.0}
    recalls = {f"{way}_r{k}": 10.0 * n + i for n, way in enumerate(("txt", "img")) for i, k in enumerate((1, 5, 10))}
    text = evaluation.format_metrics({
        "zero_shot": recalls, "reranked": {name: value + 50 for name, value in recalls.items()}, "pointing": pointing,
        "foils": {"color": {"accuracy": 60.0, "standard_error": 1.5}}})
    assert [" ".join(line.split()) for line in text.splitlines()] == [
        "retrieval, % txt_r1 txt_r5 txt_r10 img_r1 img_r5 img_r10 mean R@1",
        "by ITC 0.0 1.0 2.0 10.0 11.0 12.0 5.0",
        "re-ranked by ITM 50.0 51.0 52.0 60.0 61.0 62.0 55.0",
        "word attention, % own box others ratio box area",
        "shape, largest patch 1.0 0.0 inf 3.0",
        "size, largest patch 6.0 8.0 0.75 9.0",
        "shape, mass 4.0 5.0",
        "foils told apart, % color",
        "chance 50, ± 1 s.e. 60.0 ± 1.5",
    ]


def test_the_sheet_is_bright_where_the_mask_hides_and_has_each_pairs_score(tmp_path):
    Image.new("RGB", (40, 40), (100, 100, 100)).save(tmp_path / "0.png")
    cam, asked = torch.zeros(1, 4, 4), []
    cam[0, 1, 2] = 3.0
    api = types.SimpleNamespace(word_attention=lambda image, text: ([text], cam),
                                match=lambda image, text: asked.append(text) or (0.5, 0.0))
    evaluation.draw_masks(api, [(tmp_path / "0.png", "a"), (tmp_path / "0.png", "b")], tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"), dtype=float)
    patches = sheet[24 : 24 + 192, 200 : 200 + 192].reshape(4, 48, 4, 48).mean((1, 3))  # of the first row's second cell
    assert patches.argmax() == 1 * 4 + 2 and patches[1, 2] > 2 * patches[3, 0]
    assert asked == ["a", "b"]


# Commands


def test_evaluation_repeats_the_figures_at_the_end_of_training(trained, tmp_path):
    result = run(tmp_path, "eval.py", "pretrain", "--checkpoint", trained.out, *trained.arguments)
    assert result.status == 0, result.err
    table = trained.stdout[trained.stdout.index("retrieval, %") : trained.stdout.index("all of it in")]
    assert table == result.out
    assert "step 60" in result.err and "seed 42" in result.err


def test_scale_and_precision_of_a_run_of_another_scale(trained, tmp_path):
    """Nor does a sheet that cannot be written cost the figures."""
    checkpoint = torch.load(os.path.join(trained.out, "checkpoint.pt"))
    checkpoint["config"] |= {"scale": "flickr8k", "precision": "bf16"}
    torch.save(checkpoint, tmp_path / "checkpoint.pt")
    (tmp_path / "masks.png" / "full").mkdir(parents=True)
    command = ["eval.py", "pretrain", "--checkpoint", tmp_path, *trained.arguments]
    assert "Give --scale flickr8k, of its training, or --scale scenes" in run(tmp_path, *command).error
    result = run(tmp_path, *command, "--scale", "scenes")
    assert result.status == 0 and "of scale scenes, bf16" in result.err and "no picture of masks: " in result.err, result.err
    assert "retrieval, %" in result.out and "foils" in result.out
    result = run(tmp_path, *command, "--scale", "scenes", "precision=float32", "eval.pictures=0")
    assert "of scale scenes, float32" in result.err and result.out in trained.stdout


@pytest.mark.parametrize("processes", [1, 2])
def test_masks_of_scenes(processes, trained, tmp_path):
    target = tmp_path / "sheet.png"
    arguments = ["masks", "--checkpoint", trained.out, "--out", target, *trained.arguments]
    result = run(tmp_path, "eval.py", *arguments, processes=processes)
    assert result.status in (0, [0, 0]) and result.out.strip() == str(target), result.err
    rows = json.loads((commands.scenes_folder() / "boxes_test.json").read_text())[:2]
    words = max(len(row["caption"].split()) for row in rows)
    with Image.open(target) as sheet:
        assert sheet.format == "PNG" and sheet.size == ((words + 1) * 196 + 4, 2 * 236 + 4)
        assert len(sheet.convert("RGB").getcolors(2**20)) > 100


@pytest.mark.parametrize("mode, size, name, text, words", [
    ("RGBA", (40, 90), "tall.png", "A dog, on a SOFA!", 5),
    ("L", (301, 17), "wide.jpg", "red", 1),
    ("P", (16, 16), "small.gif", "a large red diamond — ünïcode 狗", 7),
])
def test_masks_of_an_image_of_ones_own(mode, size, name, text, words, trained, tmp_path):
    Image.effect_noise(size, 90).convert("RGB").convert(mode).save(tmp_path / name)
    rendered = set(os.listdir(os.path.join(data.HERE, "data", "scenes")))
    target = tmp_path / "sheet.png"
    result = run(tmp_path, "eval.py", "masks", "--checkpoint", os.path.join(trained.out, "checkpoint.pt"), "--image",
                 tmp_path / name, "--text", text, "--out", target, "data.scenes.seed=9876", "device=cpu")
    assert result.status == 0, result.err
    assert set(os.listdir(os.path.join(data.HERE, "data", "scenes"))) == rendered  # no scenes are needed
    with Image.open(target) as sheet:
        assert sheet.format == "PNG" and sheet.size == ((words + 1) * 196 + 4, 236 + 4)


@pytest.mark.parametrize("arguments, message", [
    (["masks", "--image", "photo.jpg"], "--image and --text go together"),
    (["masks", "--text", "a dog"], "--image and --text go together"),
    (["masks", "--image", "none.jpg", "--text", "a dog"], "none.jpg: [Errno 2] No such file"),
    (["masks", "--image", "config.yaml", "--text", "a dog"], "config.yaml: cannot identify image file"),
    (["masks", "--image", "photo.jpg", "--text", " ... "], "--text ' ... ' has no word"),
    (["masks", "--image", "no\nphoto.jpg", "--text", "a dog"], "error: no photo.jpg: [Errno 2] No such file"),
    (["masks", "eval.pictures=0"], "masks: eval.pictures is 0, so nothing is to be drawn"),
    (["masks", "--out", "none/sheet.png"], "none/sheet.png"),
    (["masks", "--out", "tests"], "masks: --out tests must be the name of a .png file"),
    (["masks", "--out", "sheet.jpg"], "masks: --out sheet.jpg must be the name of a .png file"),
    (["masks", "--split", "val"], "--split is for tasks, masks has none"),
    (["pretrain", "data.grounding_boxes=none.json"], "none.json: cannot be read"),
    (["dream"], "'dream' is none of pretrain, retrieval"),
    (["pretrain", "masks"], "'pretrain masks' is none of"),
    (["pretrain", "model.widht=3"], "model.widht is no setting"),
    (["pretrain", "model.vision_width=64"], "has model.vision_width 32; under another evaluates python train.py pretrain"),
    (["pretrain", "pretrain.image_size=64"], "has pretrain.image_size "),
    (["pretrain", "--checkpoint", "none"], "none: no such file, and no folder with best.pt or checkpoint.pt"),
    (["pretrain", "model={vision_width: 64}"], "has model.vision_width 32; under another evaluates"),
    (["pretrain", "model={vision_width: 64}"], "pretrain.epochs=0 'model={vision_width: 64}' --out NEW"),
    (["pretrain", "model={vision_width: 32}", "model.vision_width=64"], "pretrain.epochs=0 model.vision_width=64 --out NEW"),
    (["pretrain", "data.max_words=2"], "has data.max_words 30; under another evaluates"),
    (["pretrain", "data.tokenizer=vocab.txt"], "has data.tokenizer {scenes}/vocab.txt; under another evaluates"),
    (["retrieval", "retrieval.image_size=384"], "has retrieval.image_size 32; under another evaluates python train.py retrieval"),
    (["retrieval", "--text", "a dog"], "--image and --text are for masks"),
    (["pretrain", "--record"], "--record is for check"),
    (["pretrain", "--checkpoint", "config.yaml"], "config.yaml is no checkpoint that can be read safely"),
    (["check", "none"], "check takes folders of runs, not data.scenes"),
    (["table", "--record"], "table takes folders of runs, not data.scenes"),
])
def test_bad_command_line_is_one_line(arguments, message, trained, tmp_path):
    result = run(tmp_path, "eval.py", "--checkpoint", trained.out, *trained.arguments, "eval.pictures=1", *arguments)
    line = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.status == 2 and len(line) == 1 and message in line[0] and "Traceback" not in result.err, result.err


def test_boxes_and_foils_of_another_form_are_named_before_training_too(trained, tmp_path):
    (tmp_path / "rows.json").write_text('[{"image": "a.png", "caption": "a star"}]')
    for name, key in (("grounding_boxes", "objects"), ("foils", "foil")):
        setting, message = f"data.{name}={tmp_path / 'rows.json'}", f"rows.json: record 0 (from 0): key '{key}' is missing"
        for command in (["eval.py", "pretrain", "--checkpoint", trained.out, "eval.pictures=0"], ["train.py", "--out", tmp_path / "out"]):
            assert message in run(tmp_path, *command, *trained.arguments, setting).error
    assert not (tmp_path / "out" / "log.jsonl").exists()


@pytest.mark.parametrize("arguments, message", [
    (["check", "none"], "none: no metrics.json there, which a run of train.py leaves"),
    (["curve", "none"], "none: no log.jsonl there, which a run of train.py leaves"),
    (["check", "lr=none"], "check takes folders of runs, not lr=none"),
    (["curve", "none", "--scale", "paper"], "curve takes folders of runs, not --scale"),
    (["table", "none", "--record"], "table takes folders of runs, not --record"),
    (["table", "none", "--split", "test"], "table takes folders of runs, not --split"),
])
def test_bad_folders_of_runs_are_one_line(arguments, message, tmp_path):
    result = run(tmp_path, "eval.py", *arguments)
    line = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.status == 2 and len(line) == 1 and message in line[0] and "Traceback" not in result.err, result.err


def test_image_that_cannot_be_read_stops_evaluation(trained, tmp_path):
    rows = json.loads((commands.scenes_folder() / "retrieval_test.json").read_text())
    rows[4]["image"] = "images/none.jpg"
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    result = run(tmp_path, "eval.py", "pretrain", "--checkpoint", trained.out, *trained.arguments, "num_workers=1",
                 f"data.retrieval_sets.scenes.test={tmp_path / 'rows.json'}", timeout=15)  # workers outlive SIGTERM by 20 s
    assert "images/none.jpg" in result.err.splitlines()[-1] and "evaluation needs every image" in result.err
    assert result.status == 2 and "Traceback" not in result.err and result.err.splitlines()[-1].startswith("error: ")


# The recorded quick start


@pytest.fixture
def runs(tmp_path, trained):
    """write(name, seed, r1, torch) makes a finished run with R@1 r1, in tmp_path/name; and record.json of five."""
    def write(name, seed, r1, torch="2.0", **changes):
        run = json.loads(pathlib.Path(trained.out, "metrics.json").read_text()) | {"seed": seed}
        run["settings"] |= {"seed": seed} | changes
        run["platform"] |= {"torch": torch}
        run["metrics"]["zero_shot"] |= {"txt_r1": r1, "img_r1": r1}
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(run))
        return tmp_path / name

    evaluation.record([write(f"seed{seed}", seed, 20.0 + seed) for seed in range(5)], tmp_path / "record.json")
    return write, tmp_path / "record.json"


def test_check_is_exact_on_a_recorded_platform(runs, capsys):
    write, record = runs
    same = write("same", 3, 23.0, num_workers=4, checkpoint_every_steps=3)
    run = json.loads((same / "metrics.json").read_text())
    run["metrics"]["pointing"]["texture"] = {"hit_own": 1.0}  # a figure that was not recorded
    (same / "metrics.json").write_text(json.dumps(run))
    assert evaluation.check(same, record) == 0
    assert capsys.readouterr().out.startswith("exact: ")
    assert evaluation.check(write("other", 3, 23.0 + 1e-9), record) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == ["exact", "zero_shot.txt_r1", "zero_shot.img_r1"]
    assert lines[1] == "zero_shot.txt_r1: 23.0 recorded, 23.000000001 here" and lines[-1].endswith("figures agree")


def test_check_of_several_folders_fails_where_one_does(monkeypatch):
    monkeypatch.setattr(evaluation, "check", {"as recorded": 0, "other": 1}.get)
    assert evaluation.main(["check", "as recorded", "as recorded"]) == 0
    assert evaluation.main(["check", "other", "as recorded"]) == evaluation.main(["check", "as recorded", "other"]) == 1


@pytest.mark.parametrize("r1, inside", [(10.6, True), (33.4, True), (10.5, False), (33.5, False), (math.nan, False)])
def test_check_elsewhere_takes_the_seeds_spread(r1, inside, runs, capsys):
    # 20 to 24: 22 +- 6.62 * sqrt(2.5) * sqrt(6 / 5) = 22 +- 11.47; the other figures are the same five times
    write, record = runs
    assert evaluation.check(write("other", 3, r1, "2.1"), record) == (0 if inside else 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("within the spread of 5 runs") and lines[0].endswith("(torch: 2.0 recorded, 2.1 here)")
    assert [line for line in lines[1:-1]] == ([] if inside else [f"R@1 by ITC: 10.5 to 33.5 expected, {r1} here"])
    assert evaluation.check(write("seed7", 7, r1), record) == (0 if inside else 1)
    assert "(seed: " in capsys.readouterr().out


@pytest.mark.parametrize("shift, inside", [(0.7, True), (0.8, False)])
def test_check_elsewhere_allows_for_a_figure_that_never_varied(shift, inside, runs, capsys):
    """As if it had varied by 0.1: 6.62 * 0.1 * sqrt(6 / 5) = 0.73."""
    write, record = runs
    folder = write("other", 3, 22.0, "2.1")
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["metrics"]["foils"]["shape"]["accuracy"] += shift
    (folder / "metrics.json").write_text(json.dumps(metrics))
    assert evaluation.check(folder, record) == (0 if inside else 1), capsys.readouterr().out


@pytest.mark.parametrize("hit_own, inside", [(20.1, True), (19.9, False)])
def test_check_elsewhere_wants_words_that_point(hit_own, inside, trained, tmp_path, capsys):
    """The spread of 40 to 80 would let 0 pass; twice a box's share, of 10 %, does not."""
    def write(name, hit_own, torch):
        run = json.loads(pathlib.Path(trained.out, "metrics.json").read_text())
        ratio = None if hit_own == 80.0 else 3.0  # None: its words never look at the other object
        run["metrics"]["pointing"] |= {"area_own": 10.0, "hit_own": hit_own, "ratio": ratio}
        run["platform"]["torch"] = torch
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(run))
        return tmp_path / name

    evaluation.record([write(f"{value}", value, "2.0") for value in (40.0, 60.0, 80.0)], tmp_path / "record.json")
    assert evaluation.check(write("other", hit_own, "2.1"), tmp_path / "record.json") == (0 if inside else 1)
    assert ("pointing: hit_own: 20.0 to " in capsys.readouterr().out) == (not inside)


def test_platform_is_all_that_decides_how_a_run_rounds():
    found = evaluation.platform_of(data.load_config("scenes", ["device=cpu"]))
    assert found.keys() == {"torch", "machine", "processor", "capability", "threads", "processes", "device"}
    assert (found["threads"], found["processes"], found["device"]) == (torch.get_num_threads(), 1, "cpu")


def test_check_refuses_other_settings_and_too_few_runs(runs, tmp_path, trained):
    write, record = runs
    with pytest.raises(data.InputError, match="precision: float32 recorded, bf16 here"):
        evaluation.check(write("other", 3, 23.0, precision="bf16"), record)
    with pytest.raises(data.InputError, match="other is a run under other settings than .*seed1: precision"):
        evaluation.record([tmp_path / "seed1", tmp_path / "other"], record)
    evaluation.record([tmp_path / "seed1", tmp_path / "seed2"], record)
    with pytest.raises(data.InputError, match="has 2 runs, none of this platform and seed"):
        evaluation.check(tmp_path / "seed3", record)
    result = run(tmp_path, "eval.py", "check", trained.out)  # against the quick start's
    assert f"{trained.out} is a run under other settings than the recorded: " in result.error
    steps = data.read_json(evaluation.RECORD)["settings"]["step"]
    assert f"step: {steps} recorded, 60 here" in result.error


@pytest.mark.parametrize("runs, t", evaluation.STUDENT.items())
def test_quantiles_of_students_distribution(runs, t):
    # with x = sqrt(n) tan(angle) its density is cos(angle)^(n - 1), n degrees of freedom
    angle = torch.linspace(0, math.pi / 2, 1_000_001, dtype=torch.float64)
    density = angle.cos() ** (runs - 2)
    inside = density[angle <= math.atan(t / math.sqrt(runs - 1))].sum() / density.sum()
    assert inside == pytest.approx(math.erf(3 / math.sqrt(2)), abs=2e-5)


def test_recorded_figures_are_of_the_present_settings(tmp_path):
    settings = data.config_to_dict(data.load_config("scenes"))
    recorded = data.read_json(evaluation.RECORD)["settings"]
    run = {"task": "pretrain", "seed": 42, "step": recorded["step"], "settings": settings, "metrics": {}}
    (tmp_path / "metrics.json").write_text(json.dumps(run))
    assert evaluation.computed(evaluation.read_run(tmp_path / "metrics.json")) == recorded


def test_effect_of_a_setting_has_one_sign_in_whatever_order_runs_come():
    before, after = {"x": 0}, {"x": 1}
    runs = [(before, 1, {"m": 1.0}), (after, 1, {"m": 3.0}), (after, 2, {"m": 13.0}), (before, 2, {"m": 11.0})]
    assert "| x | 0 | 1 | 2 | 2 | 2.0 ± 0.0 |" in evaluation.tabulate(runs)


def test_headline_has_no_floors():
    figures = {"val_d": 1.0, "chance_val_d": 2.0, "uniform_val_d": 3.0, "majority": 4.0, "standard_error": 5.0}
    assert evaluation.headline({"test": figures}) == {"val_d": 1.0}


# Curves


def test_curve_of_runs_with_other_fields(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the picture says the runs' names, and its few colours depend on their length
    fields = {"a": [{"loss_itc": 8.0, "loss_soft_itm": 0.5}, {"loss_itc": 2.0, "loss_soft_itm": 0.5}],
              "b": 2 * [{"loss_itc": 4.0, "txt_r1": 3.0, "img_r1": 4.0}]}
    for name, lines in fields.items():
        (tmp_path / name).mkdir()
        stride = 1 if name == "a" else 2  # of other batches; the axis has the pairs
        lines = [json.dumps({"step": stride * i, "pairs": 32 * i} | line) + "\n" for i, line in enumerate(lines, 1)]
        (tmp_path / name / "log.jsonl").write_text("".join(lines))
    evaluation.curve(list(fields))
    with Image.open(tmp_path / "a" / "curve.png") as picture:
        pixels = picture.convert("RGB")
    # between two lines of the log: (x, y) halfway, from a plot of 380 x 220 pixels below and right of (50 or 500, 35)
    for point, color in {(335, 90): (31, 119, 180),  # 8 to 2 of 0.5 to 8, logarithmic
                         (360, 90): (104, 163, 204), (785, 90): (104, 163, 204), (785, 35): (227, 109, 110)}.items():
        assert np.abs(np.subtract(pixels.getpixel(point), color)).max() < 20, (point, pixels.getpixel(point))


def test_what_watches_a_training_has_no_dropout(scene, monkeypatch, tmp_path):
    model, tokenizer, config, _ = scene
    seen, similarities = [], evaluation.similarities

    def spy(model, *arguments, **named):
        seen.append(model.training)
        return similarities(model, *arguments, **named)

    monkeypatch.setattr(evaluation, "similarities", spy)
    assert evaluation.watch_pretraining(tokenizer, config, tmp_path)(model.train(), 7).keys() == {"txt_r1", "img_r1"}
    assert seen == [False]


def test_curve_of_a_run(trained, tmp_path):
    log = commands.read_log(trained.out)
    assert [line["step"] for line in log if "txt_r1" in line] == [30, 60]
    result = run(tmp_path, "eval.py", "pretrain", "--checkpoint", trained.out, "--split", "val", *trained.arguments)
    assert "word attention" not in result.out and "foils" not in result.out  # whose files are of test
    by_itc = result.out.splitlines()[1].split()  # by ITC, then txt_r1 to img_r10
    assert [by_itc[2], by_itc[5]] == [f"{log[-1][name]:.1f}" for name in ("txt_r1", "img_r1")]
    result = run(tmp_path, "eval.py", "curve", trained.out)
    assert result.status == 0 and result.out.split() == [
        os.path.join(trained.out, name) for name in ("curve.png", "masks_over_training.png")
    ], result.err
    with Image.open(os.path.join(trained.out, "curve.png")) as picture:
        assert picture.size == (900, 330)
    with Image.open(os.path.join(trained.out, "masks_over_training.png")) as sheet:
        rows = [np.asarray(Image.open(os.path.join(trained.out, f"masks_{step}.png")).convert("RGB"), float) for step in (30, 60)]
        assert sheet.size == (rows[1].shape[1], 2 * rows[1].shape[0])
        parts = np.split(np.asarray(sheet.convert("RGB"), float), 2)
        assert [min((0, 1), key=lambda i: np.abs(rows[i] - part).sum()) for part in parts] == [0, 1]


def test_curve_of_two_fine_tuning_runs_and_of_none(tmp_path):
    for name, losses in (("one", [0.5, 0.0]), ("two", [3.0])):
        (tmp_path / name).mkdir()
        lines = [{"step": i + 1, "pairs": 8 * i + 8, "loss": loss, "loss_cls": loss} for i, loss in enumerate(losses)]
        (tmp_path / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "e')
    result = run(tmp_path, "eval.py", "curve", "one", "two", cwd=tmp_path)
    assert result.status == 0 and result.out == os.path.join("one", "curve.png") + "\n", result.err
    os.rename(tmp_path / "one", tmp_path / "lr=1")
    result = run(tmp_path, "eval.py", "curve", "lr=1", "two", cwd=tmp_path)
    assert result.status == 0 and result.out == os.path.join("lr=1", "curve.png") + "\n", result.err  # the first of them
    assert not (tmp_path / "two" / "curve.png").exists()
    for content, message in (('{"step": 1}\n', "none that says"), ("{\n", "not JSON"), ("", "no line yet"), ("1\n", "none that says")):
        (tmp_path / "two" / "log.jsonl").write_text(content)
        assert message in run(tmp_path, "eval.py", "curve", "two", cwd=tmp_path).error
    assert "log.jsonl" in run(tmp_path, "eval.py", "curve", "three", cwd=tmp_path).error
