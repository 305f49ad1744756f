"""The embedded scenes: what captions and foils say is checked by a parser of its own, boxes by the pixels."""
import json
import re

import numpy as np
import pytest
from PIL import Image

import data

COUNTS = {"train": 60, "val": 80, "test": 80}
SIDE = 64
WORDS = {"size": ["small", "large"], "texture": ["striped", "dotted", "checkered"],
         "color": ["red", "green", "blue", "yellow", "purple", "orange", "white", "cyan"],
         "shape": ["circle", "square", "triangle", "star", "cross", "diamond"]}
RELATIONS = ["left of", "right of", "above", "below"]
NOUN = r"an? ((?:(?:%s) )?(?:(?:%s) )?(?:(?:%s) )?(?:%s))" % tuple("|".join(members) for members in WORDS.values())
RELATION = "(%s|next to)" % "|".join(RELATIONS)
PATTERNS = [rf"(?:there is |a picture of )?{NOUN}", rf"(?:there is |a picture of )?{NOUN} and {NOUN}",
            rf"{NOUN} with {NOUN} and {NOUN}", rf"(?:there is )?{NOUN} (?:is )?{RELATION} {NOUN}",
            rf"{NOUN} {RELATION} {NOUN} which is {RELATION} {NOUN}", rf"{NOUN} {RELATION} both {NOUN} and {NOUN}"]


@pytest.fixture(scope="module", params=["plain", "rich"])
def rendered(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    return request.param, data.render_scenes(root, request.param, **COUNTS, image_size=SIDE, seed=3)


def load(folder, name):
    return json.loads((folder / name).read_text())


def candidates(phrase, scene):
    words = {word: kind for kind, members in WORDS.items() for word in members}
    return [thing for thing in scene["objects"] if all(thing[words[word]] == word for word in phrase.split())]


def relates(a, name, b, loosely):
    """The margin rule, written anew; loosely: the centres differ in that direction at all."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a["box"], b["box"]
    if name == "next to":
        gap = max(ax - bx - bw, bx - ax - aw, ay - by - bh, by - ay - ah)
        return gap <= 0.5 * min(a["pixels"], b["pixels"])
    right, down = ax + aw / 2 - bx - bw / 2, ay + ah / 2 - by - bh / 2
    along, across, free = {"left of": (-right, down, bx - ax - aw), "right of": (right, down, ax - bx - bw),
                           "above": (-down, right, by - ay - ah), "below": (down, right, ay - by - bh)}[name]
    return along > 0 if loosely else free >= 0 and along >= 1.5 * abs(across)


def verdict(caption, scene, loosely=False):
    """Parse a caption: (whether it is true of the scene, its noun phrases)."""
    for pattern in PATTERNS:
        match = re.fullmatch(pattern, caption)
        if match:
            break
    else:
        raise AssertionError(f"not understood: {caption}")
    groups = list(match.groups())
    places = [i for i, group in enumerate(groups) if group in RELATIONS + ["next to"]]
    nouns = [group for i, group in enumerate(groups) if i not in places]
    said = [(groups[i], *((0, 1) if n == 0 else (1, 2))) for n, i in enumerate(places)]
    if " both " in caption:
        said.append((said[0][0], 0, 2))
    found = [candidates(noun, scene) for noun in nouns]
    if not all(found):
        return False, nouns

    def any_true(chosen):
        if len(chosen) < len(found):
            return any(any_true(chosen + [thing]) for thing in found[len(chosen)])
        return all(relates(chosen[i], name, chosen[j], loosely) for name, i, j in said)

    return any_true([]), nouns


def test_captions_are_true_and_name_one_object_each(rendered):
    level, folder = rendered
    for split in COUNTS:
        scenes = {scene["image"]: scene for scene in load(folder, f"scenes_{split}.json")}
        assert len(scenes) == COUNTS[split]
        for row in load(folder, "pretrain.json" if split == "train" else f"retrieval_{split}.json"):
            scene = scenes[row["image"]]
            if split == "train":
                assert len(row["caption"]) in ([2] if level == "plain" else [2, 3, 4])
                assert len(set(row["caption"])) == len(row["caption"])
            for caption in row["caption"]:
                true, nouns = verdict(caption, scene)
                assert true, caption
                assert all(len(candidates(noun, scene)) == 1 for noun in nouns), caption
                if split != "train":
                    others = [other for other in scenes.values() if other is not scene]
                    assert not any(verdict(caption, other)[0] for other in others), caption


def test_retrieval_files(rendered):
    _, folder = rendered
    pairs = [(row["image"], text) for row in load(folder, "pretrain.json") for text in row["caption"]]
    train = load(folder, "retrieval_train.json")
    assert pairs == [(row["image"], row["caption"]) for row in train]
    assert len({row["image_id"] for row in train}) == COUNTS["train"]
    for split in ("val", "test"):
        rows = load(folder, f"retrieval_{split}.json")
        assert all(len(row["caption"]) == 1 for row in rows)
        assert len({row["caption"][0] for row in rows}) == len(rows) == COUNTS[split]


def test_foils_are_false_and_differ_in_one_attribute(rendered):
    level, folder = rendered
    for split in ("val", "test"):
        scenes = {scene["image"]: scene for scene in load(folder, f"scenes_{split}.json")}
        captions = {row["image"]: row["caption"][0] for row in load(folder, f"retrieval_{split}.json")}
        rows = load(folder, f"foils_{split}.json")
        kinds = {"color", "shape", "size", "relation"} | ({"texture"} if level == "rich" else set())
        assert {(row["image"], row["kind"]) for row in rows} == {(image, kind) for image in scenes for kind in kinds}
        assert len(rows) == len(scenes) * len(kinds)
        for row in rows:
            assert row["caption"] == captions[row["image"]]
            assert not verdict(row["foil"], scenes[row["image"]], loosely=True)[0], row
            members = RELATIONS if row["kind"] == "relation" else WORDS[row["kind"]]
            old, new = (re.split(r"\b(%s)\b" % "|".join(members), row[name]) for name in ("caption", "foil"))
            changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
            assert len(changed) == 1 and changed[0] % 2 == 1, row
        turned = [row for row in rows if row["kind"] == "relation" and
                  ("of" in row["foil"].split()) != ("of" in row["caption"].split())]
        assert len(turned) > len(scenes) / 10  # right angles as well as opposites


def test_boxes_name_every_noun_phrase(rendered):
    _, folder = rendered
    for split in ("val", "test"):
        scenes = load(folder, f"scenes_{split}.json")
        for row, scene in zip(load(folder, f"boxes_{split}.json"), scenes, strict=True):
            words = row["caption"].split()
            assert [thing["phrase"] for thing in row["objects"]] == verdict(row["caption"], scene)[1]
            for thing in row["objects"]:
                assert words[thing["word_index"]] == thing["word"] == thing["attributes"]["shape"]
                assert {name: words[i] for name, i in thing["attribute_indices"].items()} == thing["attributes"]
                start = min(thing["attribute_indices"].values())
                assert " ".join(words[start:thing["word_index"] + 1]) == thing["phrase"]
                assert [thing["box"]] == [other["box"] for other in candidates(thing["phrase"], scene)]
            boxes = [thing["box"] for thing in row["objects"]] + row["other_boxes"]
            assert sorted(boxes) == sorted(thing["box"] for thing in scene["objects"])
            assert all(0 <= x and 0 <= y and x + w <= SIDE and y + h <= SIDE for x, y, w, h in boxes)


def test_boxes_hold_the_colour_and_are_tight(rendered):
    level, folder = rendered
    for scene in load(folder, "scenes_val.json"):
        pixels = np.asarray(Image.open(folder / scene["image"]).convert("RGB")).astype(int)
        assert pixels.shape == (SIDE, SIDE, 3)
        for thing in scene["objects"]:
            x, y, w, h = thing["box"]
            near = np.abs(pixels[y:y + h, x:x + w] - data.COLORS[thing["color"]]).max(-1) < 60
            assert near.mean() > (0.2 if level == "plain" else 0.05), thing
            if level == "plain":
                others = [other for other in scene["objects"] if other is not thing]
                drawn = np.abs(pixels - np.median(pixels, (0, 1))).max(-1) > 60
                for other in others:
                    a, b, c, d = other["box"]
                    drawn[max(b - 1, 0):b + d + 1, max(a - 1, 0):a + c + 1] = False
                columns, rows = np.flatnonzero(drawn.any(0)), np.flatnonzero(drawn.any(1))
                found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                assert np.abs(np.subtract(found, [x, y, x + w, y + h])).max() <= 2, (thing, found)


def test_splits_share_no_layout(rendered):
    _, folder = rendered
    layouts = [json.dumps(sorted([thing["color"], thing["shape"], thing["box"]] for thing in scene["objects"]))
               for split in COUNTS for scene in load(folder, f"scenes_{split}.json")]
    assert len(set(layouts)) == len(layouts) == sum(COUNTS.values())


def test_same_seed_same_bytes_and_rendered_once(rendered, tmp_path, monkeypatch):
    level, folder = rendered
    again = data.render_scenes(tmp_path, level, **COUNTS, image_size=SIDE, seed=3)
    assert again.name == folder.name and [path.name for path in tmp_path.iterdir()] == [again.name]
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((folder / file).read_bytes() == (again / file).read_bytes() for file in files)
    monkeypatch.setattr(data, "draw_split", None)  # a second rendering would now fail
    assert data.render_scenes(tmp_path, level, **COUNTS, image_size=SIDE, seed=3) == again
    with pytest.raises(TypeError):
        data.render_scenes(tmp_path, level, **COUNTS, image_size=SIDE, seed=4)
    assert [path.name for path in tmp_path.iterdir()] == [again.name]  # nothing half-written is left


def test_a_scene_does_not_depend_on_the_counts(rendered):
    level, folder = rendered
    few = [scene for scene, _, _ in data.draw_split(level, "val", 5, SIDE, 3)]
    assert few == [{key: value for key, value in scene.items() if key != "image"}
                   for scene in load(folder, "scenes_val.json")[:5]]


def test_losing_the_race_keeps_the_winner(rendered, tmp_path, monkeypatch):
    level, _ = rendered
    write = data.write_split

    def slow_write(folder, split, drawn):
        write(folder, split, drawn)
        if split == "test":  # another process finishes first
            monkeypatch.setattr(data, "write_split", write)
            data.render_scenes(tmp_path, level, 2, 2, 2, SIDE, 0)

    monkeypatch.setattr(data, "write_split", slow_write)
    folder = data.render_scenes(tmp_path, level, 2, 2, 2, SIDE, 0)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert (folder / "images" / "test" / "00001.jpg").exists()


def test_bad_settings(tmp_path):
    for level, count, side in (("poor", 1, 64), ("plain", -1, 64), ("plain", 1, 8)):
        with pytest.raises(data.InputError):
            data.render_scenes(tmp_path, level, count, 1, 1, side, 0)


def pieces(word, vocabulary):
    """WordPiece: the longest piece from the left, again and again."""
    found, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocabulary:
                break
        else:
            return ["[UNK]"]
        found.append(piece)
        start = end
    return found


def test_vocabulary(rendered):
    _, folder = rendered
    lines = (folder / "vocab.txt").read_text().split("\n")
    assert lines[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"] and lines.pop() == ""
    assert len(set(lines)) == len(lines) and "" not in lines
    vocabulary = set(lines)
    texts = [row["caption"] for row in load(folder, "retrieval_train.json")]
    texts += [row["foil"] for row in load(folder, "foils_test.json")]
    questions = "what color is the object left of there are exactly two more than how many in each both images yes no"
    for word in {word for text in texts + [questions] for word in text.split()}:
        assert len(pieces(word, vocabulary)) <= 2 and "[UNK]" not in pieces(word, vocabulary), word
    assert pieces("triangle", vocabulary) == ["tri", "##angle"] and pieces("yellow", vocabulary) == ["yel", "##low"]
    assert "[UNK]" not in pieces("zebra7x", vocabulary)
