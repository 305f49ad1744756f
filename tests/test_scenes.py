"""The embedded scenes: a parser of its own checks what captions, foils and the tasks' texts say, pixels check boxes."""
import collections
import hashlib
import json
import re

import numpy as np
import pytest
from PIL import Image

import data
import softmask

COUNTS = {"train": 120, "val": 80, "test": 80}
TASK_COUNTS = COUNTS | {"train": 60}  # the first half: what the downstream tasks use
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
    said = [word for word in phrase.split() if word != "object"]
    return [thing for thing in scene["objects"] if all(thing[words[word]] == word for word in said)]


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


def verdict(caption, scene, loosely=False, first=False):
    """Parse a caption: (whether it is true of the scene, its noun phrases). first: "which" is read of the first object."""
    for pattern in PATTERNS:
        match = re.fullmatch(pattern, caption)
        if match:
            break
    else:
        raise AssertionError(f"not understood: {caption}")
    groups = list(match.groups())
    places = [i for i, group in enumerate(groups) if group in RELATIONS + ["next to"]]
    nouns = [group for i, group in enumerate(groups) if i not in places]
    said = [(groups[i], *((0, 1) if n == 0 else (0 if first else 1, 2))) for n, i in enumerate(places)]
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
    pairs = [(row["image"], row["caption"]) for row in load(folder, "pretrain.json")]
    train = load(folder, "retrieval_train.json")
    assert len(pairs) == COUNTS["train"]
    assert pairs[: TASK_COUNTS["train"]] == [(row["image"], row["caption"]) for row in train]
    assert len({row["image_id"] for row in train}) == TASK_COUNTS["train"]
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
            for first in (False, True):
                assert not verdict(row["foil"], scenes[row["image"]], loosely=True, first=first)[0], row
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
    assert again.stat().st_mode & 0o777 == 0o755  # others may read it, too
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
        if split == "test":  # another process finishes first
            monkeypatch.setattr(data, "write_split", write)
            data.render_scenes(tmp_path, level, 2, 2, 2, SIDE, 0)
        return write(folder, split, drawn)

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
    texts = [text for row in load(folder, "pretrain.json") for text in row["caption"]]
    texts += [row["foil"] for row in load(folder, "foils_test.json")] + load(folder, "answer_list.json")
    for task, key in (("vqa", "question"), ("nlvr2", "sentence"), ("entailment", "sentence"), ("grounding", "text")):
        texts += [row[key] for split in COUNTS for row in load(folder, f"{task}_{split}.json")]
    for word in {word for text in texts for word in text.split()}:
        plural = word in ("triangles", "diamonds", "crosses")  # spelt with a letter or two
        assert len(pieces(word, vocabulary)) <= 2 + plural and "[UNK]" not in pieces(word, vocabulary), word
    assert all(softmask.clean_question(text, 30) == softmask.clean_caption(text, 30) == text for text in texts)
    assert pieces("triangle", vocabulary) == ["tri", "##angle"] and pieces("yellow", vocabulary) == ["yel", "##low"]
    assert "[UNK]" not in pieces("zebra7x", vocabulary)


# What the version of the draws settles: scenes, captions, boxes and foils, as they were before there were tasks.
DRAWN = {"plain": "400ecdb06b316c7e", "rich": "bfcdab6b41cc2d8e"}


def test_draws_are_unchanged(rendered):
    level, folder = rendered
    names = ["pretrain", *(f"scenes_{split}" for split in COUNTS),
             *(f"{kind}_{split}" for kind in ("boxes", "foils", "retrieval") for split in ("val", "test"))]
    content = b"".join((folder / name).read_bytes() for name in sorted(f"{name}.json" for name in names))
    assert hashlib.sha256(content).hexdigest()[:16] == DRAWN[level]


PLAIN_NOUN = NOUN.removeprefix("an? ")
THE = PLAIN_NOUN[:-1].replace("circle|", "circle|object|") + ")"  # as in "the red object"
UNDECIDED = "(?:heavy|warm|old|soft|wet|cheap)"


def task_rows(folder, task):
    """Yield split, the scenes by image, and the rows of a task."""
    for split in COUNTS:
        scenes = {scene["image"]: scene for scene in load(folder, f"scenes_{split}.json")}
        yield split, scenes, load(folder, f"{task}_{split}.json")


def the_one(text, scene):
    """The one object that "the N" or "the N RELATION the N" means; without the leading "the"."""
    match = re.fullmatch(f"{THE}(?: {RELATION} the {PLAIN_NOUN})?", text)
    assert match, text
    noun, relation, other = match.groups()
    found = candidates(noun, scene)
    if relation:
        others = candidates(other, scene)
        assert len(others) == 1, text
        assert [thing for thing in found if relates(thing, relation, others[0], False)] == \
            [thing for thing in found if relates(thing, relation, others[0], True)], text
        found = [thing for thing in found if relates(thing, relation, others[0], False)]
    assert len(found) == 1, text
    return found[0]


def answer_to(question, scene):
    """Answer a question anew: (kind, answer)."""
    if match := re.fullmatch("what (color|shape) is the (.*)", question):
        return match[1], the_one(match[2], scene)[match[1]]
    if match := re.fullmatch("how many (.*) are there", question):
        nouns = {"circles": "circle", "crosses": "cross"} | {f"{shape}s": shape for shape in WORDS["shape"]}
        noun = nouns.get(match[1], match[1].removesuffix("s"))
        return "count", "zero one two three four".split()[len(candidates(noun, scene))]
    if match := re.fullmatch(f"where is the {PLAIN_NOUN} seen from the {PLAIN_NOUN}", question):
        a, b = (the_one(noun, scene) for noun in match.groups())
        return "relation", *(name.split()[0] for name in RELATIONS if relates(a, name, b, False))
    match = re.fullmatch(f"is the {PLAIN_NOUN} {RELATION} the {PLAIN_NOUN}", question)
    assert match, question
    a, b = the_one(match[1], scene), the_one(match[3], scene)
    assert relates(a, match[2], b, False) == relates(a, match[2], b, True)
    return "relation", "yes" if relates(a, match[2], b, False) else "no"


def mirrored(scene):
    return {"objects": [thing | {"box": [SIDE - thing["box"][0] - thing["box"][2], *thing["box"][1:]]}
                        for thing in scene["objects"]]}


def test_vqa(rendered):
    level, folder = rendered
    ids, answers = [], set()
    for split, scenes, rows in task_rows(folder, "vqa"):
        wanted = (1 if split == "train" else 3) * TASK_COUNTS[split]
        assert wanted - (level == "rich") * wanted // 100 <= len(rows) <= wanted
        assert len({(row["image"], row["question"]) for row in rows}) == len(rows)
        kinds = collections.defaultdict(collections.Counter)
        for row in rows:
            scene, (answer,) = scenes[row["image"]], row["answer"]
            assert (row["kind"], answer) == answer_to(row["question"], scene), row
            turned = softmask.flip_words(row["question"]), softmask.flip_words(answer)
            assert answer_to(turned[0], mirrored(scene)) == (row["kind"], turned[1]), row
            assert row["dataset"] == "vqa"
            kinds[row["kind"]][answer] += 1
        assert set(kinds) == {"color", "shape", "count", "relation"}
        sizes = [sum(said.values()) for said in kinds.values()]
        assert max(sizes) - min(sizes) <= 1 + (wanted - len(rows))
        assert all(max(said.values()) <= 0.5 * sum(said.values()) for said in kinds.values()), kinds
        assert abs(kinds["relation"]["yes"] - kinds["relation"]["no"]) <= 3 and kinds["relation"]["yes"] >= 3
        assert set(kinds["color"]) == set(WORDS["color"]) and set(kinds["shape"]) == set(WORDS["shape"])
        assert {"zero", "one", "two"} <= set(kinds["count"])
        ids += [row["question_id"] for row in rows]
        answers |= {answer for said in kinds.values() for answer in said}
    assert len(set(ids)) == len(ids)
    assert load(folder, "answer_list.json") == sorted(answers)


def judged(sentence, left, right):
    """Whether a sentence about two images is true."""
    if match := re.fullmatch(rf"(?:an? {THE} is in both images or none|exactly one image has an? {THE})", sentence):
        both = bool(candidates(match[1] or match[2], left)) == bool(candidates(match[1] or match[2], right))
        return both == bool(match[1])
    if match := re.fullmatch(f"both images have an? {THE}", sentence):
        return all(candidates(match[1], scene) for scene in (left, right))
    match = re.fullmatch(f"the (.*) has (?:the (same)|a different) ([a-z]+) in (?:both images|each image)", sentence)
    assert match, sentence
    things = [candidates(match[1], scene) for scene in (left, right)]
    assert all(len(found) == 1 for found in things), sentence
    return (things[0][0][match[3]] == things[1][0][match[3]]) == bool(match[2])


def test_nlvr2_is_decided_by_both_images_together(rendered):
    level, folder = rendered
    for split, scenes, rows in task_rows(folder, "nlvr2"):
        assert len(rows) == {"train": 28, "val": 160, "test": 160}[split]  # half or twice the scenes, in groups of four
        balance = collections.Counter()
        for row in rows:
            assert type(row["label"]) is (str if split == "train" else bool)
            label = row["label"] in (True, "True")
            assert label or row["label"] in (False, "False")
            left, right = row["images"]
            assert left != right and label == judged(row["sentence"], scenes[left], scenes[right]), row
            alone = [("left", left, row["sentence"]), ("right", right, row["sentence"])]
            for given in [("", row["sentence"])] + alone * (row["kind"] != "both"):
                balance[given] += 1 if label else -1
        assert not any(balance.values())
        kinds = collections.Counter(row["kind"] for row in rows)
        assert abs(4 * kinds.pop("both") - 3 * len(rows)) <= 12
        assert set(kinds) <= {"color", "shape", "size", "same"} | ({"texture"} if level == "rich" else set())
        assert max(kinds.values()) - min(kinds.values()) <= 4
        assert len({image for row in rows for image in row["images"]}) > 0.9 * min(TASK_COUNTS[split], len(rows))


def test_entailment(rendered):
    _, folder = rendered
    forms = {rf"(?P<claim>.*) or an object is {UNDECIDED}": ("entailment", "neutral"),
             rf"an object is {UNDECIDED} or (?P<claim>.*)": ("entailment", "neutral"),
             rf"(?P<claim>{NOUN} is as {UNDECIDED} as {NOUN})": ("neutral", "contradiction"),
             rf"(?P<claim>.*) is {UNDECIDED}": ("neutral", "contradiction"),
             r"(?P<claim>.*)": ("entailment", "contradiction")}
    for split, scenes, rows in task_rows(folder, "entailment"):
        assert len(rows) == (1 if split == "train" else 3) * TASK_COUNTS[split]
        told = collections.Counter()
        for row in rows:
            match, labels = next((match, labels) for form, labels in forms.items()
                                 if (match := re.fullmatch(form, row["sentence"])))
            claim, scene = re.sub(f" is as {UNDECIDED} as ", " and ", match["claim"]), scenes[row["image"] + ".jpg"]
            true = verdict(claim, scene)[0]
            assert true or not verdict(claim, scene, loosely=True)[0], row
            assert row["label"] == labels[0 if true else 1], row
            told[labels, row["label"]] += 1
        # Each wording has its two labels equally often, and so have the three labels among all.
        assert len(told) == 6 and set(told.values()) == {len(rows) // 6}


def overlap(a, b):
    """IoU of two boxes, by painting them."""
    painted = np.zeros((2, SIDE, SIDE), bool)
    for canvas, (x, y, w, h) in zip(painted, (a[:4], b[:4])):
        canvas[y:y + h, x:x + w] = True
    return (painted[0] & painted[1]).sum() / (painted[0] | painted[1]).sum()


def test_grounding(rendered):
    _, folder = rendered
    refs = {ref["ref_id"]: ref for ref in data.read_refs(folder / "refs(unc).p")}
    instances, dets = load(folder, "instances.json"), load(folder, "dets.json")
    images = {image["id"]: image for image in instances["images"]}
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    assert len(images) == len(instances["images"]) == sum(TASK_COUNTS.values())
    assert len(refs) == len(annotations) == len(instances["annotations"])
    seen, related = set(), collections.Counter()
    for split, scenes, rows in task_rows(folder, "grounding"):
        objects = sum(len(scene["objects"]) for scene in scenes.values())
        assert len(rows) == (TASK_COUNTS[split] if split == "train" else objects)
        for row in rows:
            ref, scene = refs[row["ref_id"]], scenes[row["image"]]
            image, annotation = images[ref["image_id"]], annotations[ref["ann_id"]]
            assert annotation["image_id"] == image["id"] and image["file_name"] == row["image"]
            assert (image["width"], image["height"]) == (SIDE, SIDE)
            text = row["text"].removeprefix("the ")
            assert annotation["bbox"] == the_one(text, scene)["box"], row
            by_relation = bool(re.search(RELATION, text))
            assert ref["split"] == (split if split != "test" else "testB" if by_relation else "testA")
            related[by_relation] += 1
            seen.add(ref["ann_id"])
    assert seen == set(annotations)  # every object is referred to
    assert related[True] > 0.2 * related[False]
    evaluated = {str(ref["image_id"]) for ref in refs.values() if ref["split"] != "train"}
    assert set(dets) == evaluated
    first = collections.Counter()
    for key, proposals in dets.items():
        boxes = [box["bbox"] for box in instances["annotations"] if box["image_id"] == int(key)]
        assert all(0 <= x and 0 <= y and x + w <= SIDE and y + h <= SIDE for x, y, w, h, _ in proposals)
        found = [[overlap(proposal, box) for box in boxes] for proposal in proposals]
        for x, y, w, h in boxes:  # one of the proposals is the box, each of its sides moved by up to a pixel
            moved = [(abs(a - x), abs(b - y), abs(a + c - x - w), abs(b + d - y - h)) for a, b, c, d, _ in proposals]
            assert min(map(max, moved)) <= 1
        assert all(max(column) >= 0.6 for column in zip(*found))
        assert 2 <= sum(max(row) < 0.5 for row in found) <= 3
        first[max(found[0]) < 0.5] += 1
    assert min(first[False], first[True]) > 0.2 * len(dets)  # in random order


def test_tasks_of_a_split_use_its_own_images(rendered):
    _, folder = rendered
    for task in ("vqa", "nlvr2", "entailment", "grounding"):
        for split, scenes, rows in task_rows(folder, task):
            named = {image.removesuffix(".jpg") for row in rows for image in row.get("images", [row.get("image")])}
            assert named <= {image.removesuffix(".jpg") for image in scenes}
            assert task == "nlvr2" or len(named) == TASK_COUNTS[split]
