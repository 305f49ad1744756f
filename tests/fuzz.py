"""Drive the readers with generated bad files: python tests/fuzz.py [--files 2000] [--seed 0] [--case KIND NUMBER]

Writes mutated files one by one into a temporary folder and reads each as training and evaluation do, in forks:

  jpeg, png, other  images: cut, zeroed, bits flipped, text, headers of 50,000 x 50,000, 100 megapixels in a few KB,
                    CMYK, 16 bits, palettes, EXIF rotation, animations; other: GIF, WebP, BMP, TIFF, PPM, JPEG 2000
  json              annotations of every task, proposals, answer lists: cut, flipped, no UTF-8, wrong types, missing
                    keys, huge numbers, deep nesting
  captions          empty, one symbol, 10,000 words, emoji, right-to-left, special tokens, halves of surrogate pairs
  yaml              config.yaml and key=value: aliases, tags, wrong types, misspelt keys, cut
  shards            cut, flipped, links, devices, names that lead out, sizes and headers that lie
  pickles           RefCOCO's references: cut, flipped, with code to run, bombs
  commands          some such files by train.py and eval.py as commands

Each must end within SECONDS and MEMORY (peak resident set above the start) as one of: good (read, and where the file
says what it holds, read right), replaced (by another record, and reported), refused (one line, data.InputError). Prints
a row per kind and each failure; exit status 1 if there is one. --case repeats a single file.
"""
import argparse
import collections
import glob
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import time
import zlib

import numpy as np
import torch
import yaml
from PIL import Image

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import commands
import data
import eval as evaluation
import softmask

SECONDS, MEMORY, LONGEST_LINE = 20, 1.5e9, 1000
BATCH = 50  # cases a process
HANGS, DIED = "hangs beyond any signal", "the process died"
LOSSY = 12  # mean difference of pixels, of a wrongly turned picture 25 or more
SHARES = {"jpeg": 0.24, "png": 0.24, "other": 0.08, "json": 0.2, "captions": 0.04, "yaml": 0.09, "shards": 0.07,
          "pickles": 0.04}


class Wrong(Exception):
    """The result is not what the file holds."""


class OutOfTime(BaseException):
    """SECONDS are over."""


# Bytes

def cut(rng, content):
    return content[:rng.randrange(len(content))]


def zero(rng, content):
    begin, size = rng.randrange(len(content)), rng.choice((1, 4, 64, len(content)))
    return content[:begin] + bytes(min(size, len(content) - begin)) + content[begin + size:]


def flip(rng, content):
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 30))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def insert(rng, content):
    place = rng.randrange(len(content))
    return content[:place] + rng.randbytes(rng.choice((1, 2, 40))) + content[place:]


def repeat(rng, content):
    begin, end = sorted(rng.randrange(len(content)) for _ in "be")
    return content[:end] + content[begin:]


DAMAGE = (cut, zero, flip, insert, repeat)


# Images

def picture(rng):
    """Upright pixels (h, w, 3): a light corner on dark, so that every rotation and mirror image differs."""
    width, height = rng.randint(24, 200), rng.randint(24, 200)
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([60 * x / width, 60 * y / height, np.full(x.shape, 30)], 2)
    pixels[:height // 3, :width // 4] = (220, 200, 180)
    return pixels.astype(np.uint8)


def as_stored(pixels, orientation):
    """Upright pixels as a file of that EXIF orientation has them."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray({1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels,
                                 6: pixels[::-1], 7: pixels[::-1, ::-1], 8: pixels[:, ::-1]}[orientation])


def png_of(width, height, bits, color, row):
    """A PNG with that header, all of whose rows are `row`."""
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(b"\0" + row) for _ in range(height if row else 0)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def encode(rng, kind, pixels):
    """A valid file of a picture, in some mode and rotation. Returns its bytes, upright pixels, and how far off these
    may be on average."""
    orientation, exif, file = rng.choice((1, *range(1, 9))), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    turns = kind in ("jpeg", "png", "TIFF", "WEBP")
    image, options, off = Image.fromarray(as_stored(pixels, orientation if turns else 1)), {}, 0
    others = [Image.new("RGB", image.size, color) for color in ("white", "blue")]
    if turns and (orientation > 1 or rng.random() < 0.5):
        options["exif"] = exif
    if kind == "jpeg":
        image, off = image.convert(rng.choice(("RGB", "RGB", "CMYK", "L"))), LOSSY
        options |= {"quality": 95, "progressive": rng.random() < 0.3, "subsampling": rng.choice((0, 2))}
        if rng.random() < 0.1 and image.mode == "RGB":
            options |= {"save_all": True, "append_images": others[:1]}  # MPO, as of phones with two lenses
    elif kind == "png":
        mode = rng.choice(("RGB", "RGBA", "P", "L", "LA", "I;16", "animated"))
        if mode == "P":  # of colours that its palette has
            pixels = pixels // 51 * 51
            image = Image.fromarray(as_stored(pixels, orientation))
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        elif mode == "animated":
            options |= {"save_all": True, "append_images": others}
        else:
            image = image.convert(mode)
            if mode == "P" and rng.random() < 0.5:
                options["transparency"] = bytes(range(256))
    elif kind in ("GIF", "WEBP"):
        options |= {"save_all": True, "append_images": others} if rng.random() < 0.6 else {}
        off = LOSSY
    elif kind == "JPEG2000":
        off = LOSSY
    elif kind == "TIFF":
        options["compression"] = rng.choice((None, "tiff_lzw", "tiff_adobe_deflate"))
        image = image.convert(rng.choice(("RGB", "L", "CMYK")))
    name = "MPO" if options.get("save_all") and kind == "jpeg" else kind.upper()
    image.save(file, name, **options)
    grey = image.mode in ("L", "LA", "I;16")
    if grey:
        pixels = np.asarray(Image.fromarray(pixels).convert("L").convert("RGB"))
    return file.getvalue(), pixels, off


def image_file(rng, kind):
    """Bytes of an image file and what they must give: upright pixels and tolerance, None where nothing is known; and
    whether the file is whole, so that it must be good, or must be refused."""
    content, pixels, off = encode(rng, kind, picture(rng))
    way = rng.choice(("whole", "whole", "damage", "damage", "damage", "text", "size"))
    if way == "damage":
        damage = rng.choice(DAMAGE)
        changed = damage(rng, content)
        # PNG has checksums over all it holds; of a JPEG only a cut can be told
        known = kind == "png" or kind == "jpeg" and damage is cut
        return changed, (pixels, off) if known else None, None
    if way == "text":
        return rng.choice((b"", b"\0", "not an image \u2014".encode() * 20, b"<html></html>",
                           b"%!PS-Adobe-3.0\nshowpage", content[:2] * 50, content[::-1])), None, False
    if way == "size" and kind == "png":
        side, row = rng.choice(((50_000, b""), (100_000_000, b""), (9_999, b""), (2**31 - 1, b"")))
        if rng.random() < 0.15:  # 100 megapixels in a few KB
            bits, color, size = rng.choice(((8, 0, 1), (16, 0, 2), (8, 2, 3), (8, 6, 4)))
            return png_of(10_000, 10_000, bits, color, bytes(10_000 * size)), None, True
        return png_of(side, side, 8, 2, row), None, False
    if way == "size" and kind == "jpeg":
        side, place = rng.choice((50_000, 65_535, 9_999)), 2
        while content[place + 1] not in (0xC0, 0xC2):  # to the frame's header
            place += 2 + int.from_bytes(content[place + 2:place + 4])
        whole = None if side == 9_999 else False
        return content[:place + 5] + struct.pack(">HH", side, side) + content[place + 9:], None, whole
    return content, (pixels, off), True


def read_image_file(rng, folder, kind):
    """As training reads it, whole or reduced, then as evaluation does; the two must agree."""
    kind = kind if kind != "other" else rng.choice(("GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"))
    content, known, whole = image_file(rng, kind)
    path = os.path.join(folder, "a.jpg")
    with open(path, "wb") as file:
        file.write(content)
    task = rng.choice(("pretrain", "nlvr2"))
    row = {"image": "a.jpg", "images": ["a.jpg", "good.jpg"], "caption": "x", "sentence": "x", "label": "True"}
    good = row | {"image": "good.jpg", "images": ["good.jpg"] * 2}
    config = settings(folder, f"data.decode_reduced={rng.choice(('true', 'false'))}", "pretrain.randaugment_ops=2",
                      f"seed={rng.randrange(9)}")
    dataset = data.TrainingSet([row, *[good] * 9], task, config)

    def read():
        sample = dataset[0, 0]
        replaced = bool(sample["replaced"])
        for place, reason in sample["replaced"]:
            check_line(reason)
            if place != "a.jpg" or path not in reason:
                raise Wrong(f"replaced {place}: {reason}")
        try:
            pixels = np.asarray(data.read_image(path))
        except data.BadImage:
            pixels = None
            try:
                data.ImageDataset([path], 32)[0]
            except data.InputError as error:
                check_line(str(error))
            else:
                raise Wrong("evaluation takes what training refuses")
        if replaced != (pixels is None) and not (replaced and config.data.decode_reduced):
            raise Wrong(f"training: replaced {replaced}, evaluation: bad {pixels is None}")
        if whole not in (None, pixels is not None):
            raise Wrong(f"{'refused' if whole else 'taken'}: {sample['replaced']}")
        if pixels is not None and known and not (
                pixels.shape == known[0].shape and np.abs(pixels.astype(int) - known[0]).mean() <= known[1]):
            raise Wrong(f"{pixels.shape} instead of {known[0].shape}, or other pixels")
        return "replaced" if replaced else "good"
    return read


# Texts

ODD = ("", " ", "?", "...", "\u200b", "\u00a0", "\x00", "\x7f\x01", "\U0001f600", "\U0001f468\u200d\U0001f469",
       "\u05e9\u05dc\u05d5\u05dd \u202e olleh", "\u0645\u0631\u062d\u0628\u0627", "[CLS]", "[MASK] [MASK]", "[PAD]",
       "[SEP] [UNK]", "<person>", "word " * 10_000, "x" * 100_000, "a\u0301" * 5000, "\ud83d", "a dog \udc00",
       "\u4e2d\u6587" * 500, "##ing", "-/-", "\n\n", "'" * 999, "a" + " " * 9999 + "b", "\ufeffa dog", "\u0130\ufb03")


def read_captions(rng, folder, kind):
    rows = [{"image": "good.jpg", "caption": odd if rng.random() < 0.5 else [odd]}
            for odd in (rng.choice((rng.choice(ODD), "".join(rng.choices(ODD[:17], k=3)),
                                    "".join(chr(rng.randrange(0x110000)) for _ in range(9)))) for _ in range(4))]
    rows += [{"image": "good.jpg", "caption": "a red circle"}] * 20
    path = write_json(folder, "a.json", rows)
    gallery = write_json(folder, "b.json", [row | {"image": f"{number}.jpg"} for number, row in enumerate(rows)])
    config, tokenizer = settings(folder), softmask.load_tokenizer(os.path.join(folder, "vocab.txt"))

    def read():
        dataset = data.TrainingSet(data.Records([path], "pretrain"), "pretrain", config)
        batch = next(iter(data.make_loader(dataset, [[(0, index) for index in range(4)]], tokenizer, 12, 0)))
        _, captions, _ = data.load_retrieval(gallery, folder, 30)
        softmask.tokenize(tokenizer, captions, 12)
        ids, words, mask = batch["input_ids"], batch["word_ids"], batch["attention_mask"]
        if ids.shape != words.shape or ids.shape[1] > 12 or ids.max() >= len(tokenizer) or (ids[:, 0] != 2).any():
            raise Wrong(f"tokens {ids}")
        if (ids[:, 1:][mask[:, 1:] == 1] == 2).any() or (words[mask == 0] != -1).any():
            raise Wrong("a special token of the text was taken for one of ours")
        texts = [text for row in rows[:4] for text in data.texts_of(row, "pretrain")]
        empty = sum(not softmask.clean_caption(text, 30).strip() for text in texts)
        if len(batch["replaced"]) < empty or batch["replaced"] and not empty:  # one may be replaced by another of them
            raise Wrong(f"{len(batch['replaced'])} replaced, {empty} are empty")
        return "replaced" if batch["replaced"] else "good"
    return read


# Annotations

def annotations(folder):
    """A good file of every format: {layout: content}."""
    row = {"image": "good.jpg", "images": ["good.jpg", "good.jpg"], "caption": ["a red circle", "caf\u00e9"],
           "image_id": 7, "question": "is it red", "answer": ["yes", "no"], "dataset": "vqa", "sentence": "it is red",
           "label": "True", "text": "the red circle"}
    rows = [row | {"question_id": number, "ref_id": number} for number in range(3)]
    found = {layout: [{key: row[key] for key in keys} for row in rows] for layout, keys in data.FORMATS.items()}
    for row in found["entailment"]:
        row |= {"image": "good", "label": "neutral"}
    for number, row in enumerate(found["retrieval_eval"]):
        row |= {"image": f"{number}.jpg"}
    instances = {"images": [{"id": 1, "height": 20, "width": 20}],
                 "annotations": [{"id": number, "bbox": [1, 2, 3, 4]} for number in range(3)]}
    return found | {"answers": ["yes", "no"], "dets": {"1": [[1, 2, 3, 4, 0.5]]}, "instances": instances}


def nest(depth, closed=True):
    return "[" * depth + "]" * depth * closed


def wrong_value(rng):
    """A value of no type that a key may have, or its JSON."""
    return rng.choice((None, 1.5, {}, {"a": 1}, [1], [None], [[]], [{}], float("nan"), -1e308, [["x"]]))


def places(value, path=()):
    """The paths of all values within a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in [(*path, key), *places(item, (*path, key))]]


def read_annotations(rng, folder, kind):
    contents = annotations(folder)
    layout = rng.choice(list(contents))
    value, refused = contents[layout], None
    way = rng.choice(("damage", "damage", "type", "type", "missing", "number", "deep", "encoding", "odd text", "whole"))
    rows = [place for place in places(value) if len(place) > 1 or layout in ("answers", "dets")]
    *parents, last = rng.choice(rows)
    holder = value
    for key in parents:
        holder = holder[key]
    required = layout in data.FORMATS and not parents[1:] and not (last == "answer" and layout == "vqa_eval")
    if way == "type":
        holder[last] = wrong_value(rng)
        refused = required or layout == "answers" or None
    elif way == "missing" and isinstance(last, str):
        del holder[last]
        refused = required or None
    elif way == "number":
        holder[last] = "NUMBER"
    elif way == "deep":
        holder["extra" if isinstance(holder, dict) else last] = "NUMBER"
    elif way == "odd text":
        holder[last] = rng.choice(ODD)
    text = json.dumps(value, ensure_ascii=way == "odd text" or rng.random() < 0.5, indent=rng.choice((None, 1)))
    number = rng.choice(("1" + "0" * 30, "1" + "0" * 400, "9" * 5000, "1e999", "-1e-999", "Infinity", "NaN", "-0"))
    deep = rng.choice((nest(rng.choice((50, 900, 940, 960, 980, 1000, 100_000))), nest(5000, False), '{"a":' * 3000))
    content = text.replace('"NUMBER"', deep if way == "deep" else number).encode()
    if way == "damage":
        content = rng.choice(DAMAGE)(rng, content)
    elif way == "encoding":
        content = rng.choice((text.encode("utf-16"), text.encode() + b"\xff", text.encode().replace(b"a", b"\xe9", 1),
                              b"\xef\xbb\xbf" + text.encode(), gzip_of(text)))
    path = os.path.join(folder, f"{layout}.json")
    for name, good in annotations(folder).items():
        write_json(folder, f"{name}.json", good)
    with open(path, "wb") as file:
        file.write(content)
    refs = [{"ref_id": number, "ann_id": number, "image_id": 1, "split": "val"} for number in range(3)]
    with open(os.path.join(folder, "refs.p"), "wb") as file:
        pickle.dump(refs, file, 2)
    names = {"refs": "refs.p", "dets": "dets.json", "instances": "instances.json"}
    paths = {key: os.path.join(folder, name) for key, name in names.items()}
    config = settings(folder, f"data.grounding={json.dumps(paths)}")

    def read():
        try:
            got = read_layout(layout, path, config, folder)
        except data.InputError:
            if way == "whole":
                raise Wrong("a good file is refused") from None
            raise
        if refused:
            raise Wrong(f"{way} of {last!r} in {layout} is not noticed")
        if layout in data.FORMATS:
            try:
                expected = json.loads(content.decode("utf-8-sig"))
            except (ValueError, RecursionError):
                raise Wrong("read although json does not read it") from None
            if repr(got) != repr(expected):
                raise Wrong("records differ from what json reads")
        return "good"
    return read


def read_layout(layout, path, config, folder):
    """Read an annotation file as its task does; returns its records."""
    tokenizer = softmask.load_tokenizer(os.path.join(folder, "vocab.txt"))
    if layout == "answers":
        softmask.tokenize(tokenizer, data.load_answers(path), 9, end=True)
    elif layout in ("dets", "instances"):
        data.load_grounding(f"{folder}/grounding_eval.json", config)
    if layout not in data.FORMATS:
        return None
    task = layout.removesuffix("_eval")
    records = data.Records([path], layout)
    if layout == task:
        dataset = data.TrainingSet(records, task, config)
        try:
            next(iter(data.make_loader(dataset, [[(0, index) for index in range(len(records))]], tokenizer, 9, 0)))
        except data.InputError as error:
            if "records in a row are bad" not in str(error):  # all of them: as it should be
                raise
    if layout == "retrieval_eval":
        softmask.tokenize(tokenizer, data.load_retrieval(path, folder, 9)[1], 9)
    elif layout == data.evaluation_layout(task) and "pretrain" not in task:
        softmask.tokenize(tokenizer, [row["text"] for row in evaluation.load_rows(task, path, config)], 9)
    return list(records)


def gzip_of(text):
    packer = zlib.compressobj(wbits=31)
    return packer.compress(text.encode()) + packer.flush()


# Settings

def read_yaml(rng, folder, kind):
    with open(os.path.join(data.HERE, "config.yaml"), encoding="utf-8") as file:
        text = file.read()
    document, refused, override = yaml.safe_load(text), False, None
    way = rng.choice(("damage", "damage", "key", "type", "alias", "tag", "override", "lines"))
    laughs, merges = "&l0 x", "m0: &m0 {a: 1}\n"
    for n in range(1, rng.randint(4, 13)):
        laughs += f", &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]"
        merges += f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n"
    tags = ("!!python/object/apply:os.system [touch trace]", "!!python/name:os.system", "!!python/object/new:dict {}",
            "!!int ''", "!!timestamp x", "!!bool maybe", "!!binary '*'", "!!omap [1]", "!!pairs [a: b]", "!!set [a]",
            "!x y", "2001-13-45", "0x" + "f" * rng.choice((20, 5000)), "1" * 5000, "&a [*a]", "*nobody", "[" * 4000,
            "{" * 300, "'", "? [a]\n: b", "\t", "%YAML 9", "---\n---", "\x00", "@", "`", "1:2:3", ".nan", "1e400",
            f"[{laughs}]")
    if way == "damage":
        content = rng.choice(DAMAGE)(rng, text.encode())
    elif way == "lines":  # a line dropped, or moved
        lines = text.split("\n")
        line = lines.pop(rng.randrange(len(lines)))
        if rng.random() < 0.5:
            lines.insert(rng.randrange(len(lines)), line)
        content = "\n".join(lines).encode()
    else:
        section = document["base"][rng.choice(("model", "method", "pretrain", "eval"))]
        key = rng.choice([name for name, old in section.items() if old is not None])
        refused = True
        if way == "key":
            old = section.pop(key)
            section[rng.choice((key[:-1], key + "s", key.upper(), 3, None, True, key * 500))] = old
        elif way == "type":
            right = type(section[key])
            section[key] = rng.choice([bad for bad in ([], {}, [1], {"a": 1}, None, "x y", True, "1,5", -1)
                                       if type(bad) is not right or bad == -1])
        content = yaml.safe_dump(document).encode()
        if way == "alias":
            content = rng.choice((f"x: [{laughs}]\n".encode() + content, merges.encode() + content,
                                  content.replace(b"seed: 42", f"seed: [{laughs}]".encode())))
        elif way == "tag":
            content = content.replace(b"\n  seed: 42", b"\n  seed: " + rng.choice(tags).encode())
        elif way == "override":
            refused, content = None, text.encode()
            size = rng.choice(("1e3", "0x10", "1_0", "010", "9" * 30, "-1", "~"))
            noise = "".join(chr(rng.randrange(32, 300)) for _ in range(20))
            override = rng.choice((f"seed={rng.choice(tags)}", f"{'a.' * 3000}b=1", "=", "=1", "seed.=1", ".=",
                                   "data={}", "model=[]", f"pretrain.batch_size={size}", f"{noise}=1"))
    path = os.path.join(folder, "config.yaml")
    with open(path, "wb") as file:
        file.write(content)
    scale = rng.choice(("scenes", "flickr8k", "paper"))
    allowed = {"1:2:3"}  # is a number in YAML 1.1, in sixties

    def read():
        config = data.load_config(scale, [override] if override else [], path=path)
        if refused and not any(f"seed: {value}".encode() in content for value in allowed):
            raise Wrong(f"{way} is not noticed")
        if data.config_from_dict(json.loads(json.dumps(data.config_to_dict(config)))) != config:
            raise Wrong("does not survive a checkpoint")
        return "good"
    return read


# Shards

def read_shard(rng, folder, kind):
    way, links = rng.choice(("damage", "damage", "cut", "names", "links", "lies", "whole")), []
    good, file = image_bytes(), io.BytesIO()
    secret = os.path.join(folder, "secret.txt")
    with open(secret, "w") as out:
        out.write("SECRET")
    escapes = ("../x", "/etc/x", "a/../../x", "C:\\x", "x" * 300, "\u05e9/\U0001f600", "", ".", "a\nb", "x\udcff")
    form = rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    form = tarfile.GNU_FORMAT if way in ("names", "links") else form
    with tarfile.open(fileobj=file, mode="w", format=form, errors="surrogateescape") as shard:
        for number in range(rng.randint(1, 5)):
            name = rng.choice(escapes) + str(number) if way == "names" else f"{number:03d}"
            caption = rng.choice(ODD) if rng.random() < 0.3 else "a red circle"
            parts = {".jpg": rng.choice(DAMAGE)(rng, good) if rng.random() < 0.3 else good}
            if rng.random() < 0.7:
                about = rng.choice(({"caption": caption}, [caption], {"caption": wrong_value(rng)}))
                parts[".json"] = rng.choice((json.dumps(about), json.dumps(about), nest(2000))).encode()
            parts[".txt"] = caption.encode(errors="replace") if rng.random() < 0.8 else rng.randbytes(20)
            for kind_of, content in rng.sample(sorted(parts.items()), len(parts)):
                member = tarfile.TarInfo(name + kind_of)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
            if way == "links":
                for kind_of in (".jpg", ".txt"):
                    member = tarfile.TarInfo(f"link{number}{kind_of}")
                    member.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE,
                                              tarfile.FIFOTYPE, tarfile.DIRTYPE))
                    member.linkname = rng.choice((secret, "../secret.txt", "000.jpg", member.name, "/dev/zero"))
                    member.devmajor, member.devminor = 1, 5
                    shard.addfile(member)
                    links.append(member.name)
            if way == "lies":
                member = tarfile.TarInfo("lie.jpg")
                member.size = rng.choice((-1, -512, -1024, 2**33, 2**62, 10**6, 0))
                member.type = rng.choice((tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE,
                                          tarfile.GNUTYPE_SPARSE))
                file.write(member.tobuf(tarfile.GNU_FORMAT) + rng.choice((b"", b"1" * 99_840, bytes(512))))
                shard.offset = file.tell()
    content = file.getvalue()
    end = len(content.rstrip(b"\0"))
    if way == "damage":
        content = rng.choice(DAMAGE)(rng, content)
    elif way == "cut":
        content = content[:rng.randrange(end)]
    path = os.path.join(folder, "0.tar")
    with open(path, "wb") as out:
        out.write(content)
    config, tokenizer = settings(folder), softmask.load_tokenizer(os.path.join(folder, "vocab.txt"))
    before = sorted(glob.glob(f"{folder}/*") + glob.glob(f"{folder}/../*"))

    def read():
        records = data.Records([path], "pretrain")
        if way == "cut":
            raise Wrong("the cut is not noticed")
        rows, replaced = list(records), 0
        if any(row["caption"] == "SECRET" or row["image"].name in links for row in rows):
            raise Wrong("a link was followed")
        if rows:
            dataset = data.TrainingSet([*rows, *[{"image": "good.jpg", "caption": "x"}] * 20], "pretrain", config)
            batch = next(iter(data.make_loader(dataset, [[(0, index) for index in range(len(rows))]], tokenizer, 9, 0)))
            replaced = len(batch["replaced"])
        if sorted(glob.glob(f"{folder}/*") + glob.glob(f"{folder}/../*")) != before:
            raise Wrong("a file was written")
        return "replaced" if replaced or records.left_out else "good"
    return read


def image_bytes():
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "JPEG")
    return file.getvalue()


# Pickles

class Call:
    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced[0], self.reduced[1:]


def read_pickle(rng, folder, kind):
    trace = os.path.join(folder, "trace")
    ref = {"ref_id": 1, "ann_id": 1, "image_id": 1, "split": "val", "sentences": [{"raw": "the r\xe9d"}]}
    refs = [ref | {"ref_id": number} for number in range(9)]
    laughs = ["x"]
    for _ in range(60):
        laughs = [laughs] * 9
    protocol, way = rng.randrange(6), rng.choice(("damage", "damage", "code", "bomb", "whole"))
    if way == "code":
        write = f"open({trace!r}, 'w')"
        payload = rng.choice((Call(os.system, f"touch {trace}"), Call(eval, write), Call(exec, write), np.float64(1),
                              np.zeros(2), bytearray(b"x"), {1}, (1, 2), object(), os.system))
        content = pickle.dumps(rng.choice(([ref | {"x": payload}], payload, [payload])), protocol)
    elif way == "bomb":
        deep = b"]" * 10**5 + b"a" * (10**5 - 1) + b"."
        tuples = b"\x80\x02}K\x01\x85" + b"q\x00h\x00h\x00\x87" * 60 + b"Ns."
        size = struct.pack("<Q", 1 << rng.randrange(30, 63))
        content = rng.choice((
            b"]r\xff\xff\xff\xff.", b"]p4294967295\n.", b"\x80\x04\x8e" + size + b".", b"\x80\x05\x96" + size + b".",
            b"\x80\x04\x95" + size + b".", deep, tuples, pickle.dumps(laughs, 2), pickle.dumps({"x": laughs}, 2),
            pickle.dumps([{"ref_id": laughs}], 2), pickle.dumps([ref | {"image_id": 1 << 99_999}], 2),
            b"I" + b"9" * 10**6 + b"\n.", b"(" * 10**6 + b"."))
    else:
        content = pickle.dumps(refs, protocol)
        content = rng.choice(DAMAGE)(rng, content) if way == "damage" else content
    path = os.path.join(folder, "refs.p")
    with open(path, "wb") as file:
        file.write(content)

    def read():
        try:
            got = data.read_refs(path)
        except data.InputError:
            if way == "whole":
                raise Wrong("a good file is refused") from None
            raise
        finally:
            if os.path.exists(trace):
                raise Wrong("code of the file was run")
        if way == "code" or way == "whole" and got != refs:
            raise Wrong(f"gave {str(got)[:99]}")
        return "good"
    return read


READERS = {"jpeg": read_image_file, "png": read_image_file, "other": read_image_file, "json": read_annotations,
           "captions": read_captions, "yaml": read_yaml, "shards": read_shard, "pickles": read_pickle}


# Running

def settings(folder, *overrides):
    """A Config whose every image_root is the folder, with overrides key=value, of which a mapping is merged."""
    settings = data.config_to_dict(BASE)
    section = settings["data"]
    section["pretrain_image_root"] = section["vqa"]["vg_image_root"] = folder
    tasks = (section[name] for name in ("vqa", "nlvr2", "entailment", "grounding"))
    for files in (*section["retrieval_sets"].values(), *tasks):
        files["image_root"] = folder
    for override in overrides:
        key, _, text = override.partition("=")
        value, holder = yaml.safe_load(text), settings
        *parents, last = key.split(".")
        for parent in parents:
            holder = holder[parent]
        holder[last] = holder[last] | value if isinstance(value, dict) else value
    return data.config_from_dict(settings)


BASE = data.load_config("scenes", ["data.scenes=null", "model.image_size=32"])


def write_json(folder, name, value):
    path = os.path.join(folder, name)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file)
    return path


def check_line(text):
    if "\n" in text or len(text) > LONGEST_LINE or not text.strip():
        raise Wrong(f"not one clear line: {len(text)} characters, {text[:200]!r}")


def resident(field):
    """Bytes of VmRSS or VmHWM of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def run_case(seed, kind, number, folder):
    """Write and read one file. Returns how it ended, what is wrong with that (or None), seconds and peak bytes."""
    rng = random.Random(f"{seed} {kind} {number}")
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    with open(os.path.join(folder, "good.jpg"), "wb") as file:
        file.write(image_bytes())
    with open(os.path.join(folder, "vocab.txt"), "w") as file:
        file.write("\n".join(data.scene_vocabulary()) + "\n")
    read = READERS[kind](rng, folder, kind)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    before, begun, problem = resident("VmRSS"), time.monotonic(), None
    signal.alarm(SECONDS)
    try:
        outcome = read()
    except data.InputError as error:
        outcome = "refused"
        try:
            check_line(str(error))
        except Wrong as wrong:
            problem = str(wrong)
    except OutOfTime:
        outcome, problem = "failure", f"still at work after {SECONDS} s"
    except Exception as error:
        outcome, problem = "failure", f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    seconds, peak = time.monotonic() - begun, resident("VmHWM") - before
    if problem is None and peak > MEMORY:
        problem = f"{peak / 1e6:.0f} MB"
    return "failure" if problem else outcome, problem, seconds, peak


def work(seed, cases, folder, connection):
    """In a process of its own: run cases, and send what came of each."""
    def out_of_time(*_):
        raise OutOfTime

    signal.signal(signal.SIGALRM, out_of_time)
    torch.set_num_threads(1)
    torch.cuda.is_available = lambda: False  # CUDA, where this process's parent uses it, does not survive the fork
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 30),) * 2)  # so that no failure takes the machine down
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings of Pillow
    for kind, number in cases:
        connection.send(run_case(seed, kind, number, folder))


def run_cases(seed, cases, folder):
    """Yield (kind, number, outcome, problem, seconds, peak) of every case."""
    context, place = multiprocessing.get_context("fork"), 0
    while place < len(cases):
        receive, send = context.Pipe(duplex=False)
        batch = cases[place:place + BATCH]
        process = context.Process(target=work, args=(seed, batch, os.path.join(folder, "case"), send))
        process.start()
        send.close()
        for kind, number in batch:
            place += 1
            try:
                result = receive.recv() if receive.poll(3 * SECONDS) else ("failure", HANGS, SECONDS, 0)
            except EOFError:
                result = "failure", DIED, 0, 0
            yield kind, number, *result
            if result[1] in (HANGS, DIED):
                break
        process.kill()
        process.join()


def all_cases(files):
    return [(kind, number) for kind, share in SHARES.items() for number in range(max(1, round(share * files)))]


# Commands

def run_commands(folder):
    """Yield (outcome, problem, seconds) of train.py and eval.py on bad files, the real commands."""
    good, exif = image_bytes(), Image.Exif()
    exif[0x0112] = 6
    files = {"good.jpg": good, "cut.jpg": good[:300], "huge.png": png_of(50_000, 50_000, 8, 2, b""), "none.tar": b"cut"}
    for name, content in files.items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    Image.new("I;16", (30, 20), 40_000).save(os.path.join(folder, "deep.png"), exif=exif)
    whole = [{"image": "good.jpg", "caption": "a red circle"}] * 16
    odd = write_json(folder, "odd.json", [{"image": "good.jpg", "caption": [text]} for text in ODD] + whole)
    damaged = write_json(folder, "damaged.json", whole + [{"image": "cut.jpg", "caption": "a red circle"}] * 4)
    odd_set = write_json(folder, "odd_set.json", [{"image": "good.jpg", "caption": ODD}, {"image": "deep.png", "caption": "a"}])
    damaged_set = write_json(folder, "damaged_set.json", [whole[0], {"image": "cut.jpg", "caption": "a red circle"}])
    silent = write_json(folder, "silent.json", [{"image": "good.jpg", "caption": []}])
    missing = write_json(folder, "missing.json", [{"image": "\udc80 \ud83d.jpg", "caption": "x"}] * 9)
    with open(os.path.join(folder, "cut.json"), "w") as file:
        file.write(json.dumps(whole)[:-30])
    out = os.path.join(folder, "out")
    train = ["train.py", "pretrain", "--out", out, *commands.TINY, f"data.pretrain_image_root={folder}"]
    check = ["train.py", "check", *train[1:]]
    evaluate = ["eval.py", "retrieval", "--checkpoint", out, *commands.TINY,
                f"data.retrieval_sets.scenes.image_root={folder}"]
    masks = ["eval.py", "masks", "--checkpoint", out, *commands.TINY, "--text", "a red circle", "--image"]
    for arguments, status, wanted in [
        ([*check, f"data.pretrain_files=[{folder}/cut.json]"], 1, "not JSON"),
        ([*check, f"data.pretrain_files=[{missing}]"], 1, "1 of 1 images missing"),
        ([*train, f"data.pretrain_files=[{folder}/cut.json]"], 2, "not JSON"),
        ([*train, f"data.pretrain_files=[{folder}/*.tar]"], 2, "not a whole tar file"),
        ([*train, f"data.pretrain_files=[{damaged}]", "max_bad_image_share=0.0"], 2, "more than max_bad_image_share"),
        ([*train, "seed=!!int ''"], 2, "is not YAML"),
        ([*train, f"data.pretrain_files=[{damaged}]", "max_bad_image_share=0.5", "--fresh"], 0, "bad record, replaced"),
        ([*train, f"data.pretrain_files=[{odd}]", "max_bad_image_share=0.5", "--fresh"], 0, "empty caption"),
        ([*evaluate, f"data.retrieval_sets.scenes.test={odd_set}"], 0, "txt_r1"),
        ([*evaluate, f"data.retrieval_sets.scenes.test={odd}"], 2, "give each image once"),
        ([*evaluate, f"data.retrieval_sets.scenes.test={silent}"], 2, "record 0 (from 0): no caption"),
        ([*evaluate, f"data.retrieval_sets.scenes.test={damaged_set}"], 2, "evaluation needs every image"),
        ([*masks, os.path.join(folder, "huge.png")], 2, "50000 x 50000 pixels are over 100,000,000"),
        ([*masks, os.path.join(folder, "deep.png")], 0, "masks.png"),
    ]:
        begun, problem = time.monotonic(), None
        result = commands.run(folder, *arguments, timeout=6 * SECONDS)
        said = (result.out + result.err).replace(folder, "")
        if result.status != status or wanted not in said or "Traceback" in said or "nan" in said:
            problem = f"{' '.join(arguments[:2])} ... {arguments[-1]}: status {result.status}, {said[-1500:]}"
        outcome = ("good", "refused", "refused")[status] if wanted[:3] not in ("bad", "emp") else "replaced"
        yield "failure" if problem else outcome, problem, time.monotonic() - begun


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", nargs=2, metavar=("KIND", "NUMBER"), help="run this one file alone")
    options = parser.parse_args()
    rows, failures = collections.defaultdict(collections.Counter), 0
    with tempfile.TemporaryDirectory() as folder:
        if options.case:
            kind, number = options.case
            if kind not in SHARES or not number.isdecimal():
                parser.error(f"--case {kind} {number}: wanted one of {', '.join(SHARES)}, and a number")
            results = run_cases(options.seed, [(kind, int(number))], folder)
        else:
            results = itertools.chain(
                run_cases(options.seed, all_cases(options.files), folder),
                (("commands", number, *result, 0) for number, result in enumerate(run_commands(folder))))
        for kind, number, outcome, problem, seconds, peak in results:
            rows[kind].update(["files", outcome])
            rows[kind]["seconds"] = max(rows[kind]["seconds"], seconds)
            rows[kind]["MB"] = max(rows[kind]["MB"], peak / 1e6)
            if problem:
                failures += 1
                print(f"FAILURE {kind} {number}: {problem[:2000]}", flush=True)
    columns = ("files", "good", "replaced", "refused", "failure", "seconds", "MB")
    print(f"{'':10}" + "".join(f"{name:>10}" for name in columns) + "   (seconds, MB above the start: the worst file)")
    for kind, row in rows.items():
        print(f"{kind:10}" + "".join(f"{row[name]:10.{int(name == 'seconds')}f}" for name in columns))
    total = sum(rows.values(), collections.Counter())
    print(f"{'all':10}" + "".join(f"{total[name]:10.0f}" for name in columns[:5]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
