"""Evaluate: metrics of every task, and pictures of soft masks.

    python eval.py pretrain                                    # the figures that end pre-training, from its output
    python eval.py pretrain --scale flickr8k --checkpoint DIR --split val
    python eval.py masks --checkpoint DIR --image photo.jpg --text "a dog on a red sofa"
    python eval.py table DIR...                                # finished runs side by side, what each setting does
    python eval.py curve DIR...                                # losses and R@1 while training: a picture in DIR
    python eval.py check DIR                                   # is a quick start's output what it should be

Metrics, percentages from 0 to 100 unless said otherwise:
  zero_shot, reranked   retrieval by ITC alone (itc once fine-tuned), and with the top k re-ranked by ITM, under ALBEF's
                        names: txt_r1, ... images whose caption is among the first 1, 5, 10; img_r1, ... captions whose
                        image is
  pointing              word attention against the boxes of named objects (scenes alone): of the words of shape, and by
                        name of those of each other attribute, see pointing_metrics
  foils                 per kind, captions whose ITM score is above that of a version made false in one word; chance 50
  accuracy              VQA: the official accuracy, or matches where a question has fewer than ten answers; NLVR2,
                        entailment: right classes; accuracy_KIND: of one kind or class; majority: of the commonest class
  val_d, testA_d, ...   grounding: expressions whose picked proposal has an IoU of at least 0.5, see grounding_accuracy
"""

import argparse
import contextlib
import datetime
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import platform
import re
import shlex
import signal
import sys
import traceback

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C: nothing is to be saved, and no traceback of use

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont

import data
import softmask

torch.backends.cudnn.allow_tf32 = False  # of train.py and eval.py: cuDNN would round the patch embedding's float32 to 10 bits
RECORD = os.path.join(data.HERE, "tests", "quick_start.json")  # figures of the quick start, see check


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduced(values):
    """values, made their sum over all processes; where rows are dealt out, the rows of others are 0 before."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def resolve_device(config) -> torch.device:
    """The device of this process: under torchrun each process of a machine has its own GPU."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise data.InputError("device: cuda was asked for, but torch finds no GPU; set device=cpu or auto")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name == "cuda" and local >= torch.cuda.device_count():
        raise data.InputError(f"process {local} has no GPU of its own, torch finds {torch.cuda.device_count()}; start as many")
    return torch.device(name, local) if name == "cuda" else torch.device(name)


def join_processes(config):
    """Start the process group where torchrun started this process."""
    if "RANK" in os.environ:
        device, patience = resolve_device(config), datetime.timedelta(hours=1)  # nccl's 10 minutes may be one's indexing
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", timeout=patience, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=patience)


def leave_processes(error):
    """End loader workers and process group. error: what ends this process, or None.

    Workers outlive SIGTERM for a while, with which multiprocessing would end them, and hold the connections of this process,
    whose end the others have to see. The end of nccl's group waits for the other processes, and these may be waiting for one
    that fails: it leaves at once.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises an error for each worker that ends
    for process in multiprocessing.active_children():
        if process.daemon:  # as loader workers are
            process.kill()
    status = 0 if error is None else error.code if isinstance(error, SystemExit) else 1
    if status and world_size() > 1:
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if dist.is_initialized():
        dist.destroy_process_group()


def with_scenes(config):
    """data.resolve_scenes, by process 0 first, which renders them for all."""
    if rank() == 0:
        data.resolve_scenes(config)
    if world_size() > 1:
        dist.barrier()
    return data.resolve_scenes(config)


def autocast(config, device):
    """bf16 autocast where precision asks for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def match_scores(model, fused):
    """"Match" logits (R,), float32, of fused states (R, L, D): in bf16 many are equal, and a tie counts against us."""
    with torch.autocast(fused.device.type, enabled=False):
        return model.itm_head(fused[:, 0].float())[:, 1]


# Retrieval


def retrieval_metrics(sim_i2t, sim_t2i, image_of_text):
    """Recall at 1, 5 and 10 in both directions, in percent, under ALBEF's names. [ALBEF] Retrieval.py itm_eval

    sim_i2t (I, T), sim_t2i (T, I): scores, higher is better; image_of_text (T,) int64.
    txt_r*: images whose best-ranked own text is among the first k; img_r*: texts whose image is.
    A tie counts against us: a constant score ranks last, not first. [ours]
    """
    own = image_of_text[None] == torch.arange(len(sim_i2t), device=image_of_text.device)[:, None]  # (I, T)
    best_own = sim_i2t.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    txt_rank = (~(sim_i2t < best_own) & ~own).sum(1)  # not >=: NaN would rank first
    img_rank = (~(sim_t2i < sim_t2i.gather(1, image_of_text[:, None])) & ~own.T).sum(1)
    txt = {f"txt_r{k}": 100 * (txt_rank < k).double().mean().item() for k in (1, 5, 10)}
    img = {f"img_r{k}": 100 * (img_rank < k).double().mean().item() for k in (1, 5, 10)}
    metrics = txt | {"txt_r_mean": sum(txt.values()) / 3} | img | {"img_r_mean": sum(img.values()) / 3}
    return metrics | {"r_mean": (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2}


def image_batches(paths, indices, config, device):
    """Yield (indices, images (b, 3, S, S) normalised, on device) of paths[i] for i in indices, in order.

    Where each of paths is a list of n, images are (b, n, 3, S, S).
    """
    dataset, size = data.ImageDataset([paths[i] for i in indices], config.model.image_size), config.eval.batch_size
    loader = torch.utils.data.DataLoader(dataset, size, num_workers=config.num_workers,
                                         worker_init_fn=data.outlive_signals)  # in the midst of a training
    for start, images in zip(range(0, len(indices), size), loader):
        yield indices[start : start + size], softmask.normalize(images.to(device).float().div_(255))


def to_device(tokens, device):
    """The three tensors of softmask.tokenize on device."""
    return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask", "word_ids")}


@torch.no_grad()
def similarities(model, tokenize, paths, captions, config, keep_states=True):
    """Similarities of a gallery by ITC, sim (I, T) float32; the states (T, L, D) of its texts and their lengths (T,).

    keep_states: without, None for the states, which of COCO 5K are 2.3 GB on the device.
    Images are dealt out to the processes, each encoded once; every process returns all.
    """
    device, encoders, size = model.temp.device, model.encoders, config.eval.batch_size
    mine = list(range(rank(), len(paths), world_size()))
    image_feat = torch.zeros(len(paths), encoders.image_proj.out_features, device=device)
    tokens = to_device(tokenize(captions), device)
    lengths, text_feat, text_embeds = tokens["attention_mask"].sum(1), [], []
    with autocast(config, device):
        for indices, images in image_batches(paths, mine, config, device):
            image_feat[indices] = encoders.image_feat(encoders.encode_image(images))
        for ids, mask, length in zip(*(x.split(size) for x in (tokens["input_ids"], tokens["attention_mask"], lengths))):
            longest = int(length.max())
            embeds = encoders.encode_text(ids[:, :longest], mask[:, :longest])
            text_feat.append(encoders.text_feat(embeds))
            if keep_states:
                text_embeds.append(torch.nn.functional.pad(embeds, (0, 0, 0, ids.shape[1] - longest)))
    return all_reduced(image_feat) @ torch.cat(text_feat).T, torch.cat(text_embeds) if keep_states else None, lengths


@torch.no_grad()
def retrieval_scores(model, tokenize, paths, captions, config):
    """Similarities of a gallery by ITC, and the ITM scores of the top k in both directions.

    Returns sim (I, T) float32, and scores_i2t (I, T), scores_t2i (T, I): "match" logits of the pairs in the top k of
    their image or text by ITC, -inf elsewhere. k is eval.top_k, at most the gallery. [ALBEF] Retrieval.py, but for the
    bound and the -inf, there -100.
    The pairs of both directions are grouped by image, whose keys and values are projected once. No image state is kept
    (COCO 5K at 384 pixels: 8.9 GB); each image is encoded once for ITC and once for ITM. Images are dealt out to the
    processes; every process returns all scores.
    """
    device, encoders = model.temp.device, model.encoders
    mine = list(range(rank(), len(paths), world_size()))
    sim, text_embeds, lengths = similarities(model, tokenize, paths, captions, config)
    k_text, k_image = min(config.eval.top_k, len(captions)), min(config.eval.top_k, len(paths))
    wanted_i2t = torch.zeros_like(sim, dtype=torch.bool).scatter_(1, sim.topk(k_text, 1).indices, True)
    wanted_t2i = torch.zeros_like(sim, dtype=torch.bool).scatter_(0, sim.topk(k_image, 0).indices, True)
    scores = torch.full_like(sim, -torch.inf)
    with autocast(config, device):
        for indices, images in image_batches(paths, mine, config, device):
            image_embeds = encoders.encode_image(images)
            for i, embeds in zip(indices, image_embeds):
                keys_values = encoders.image_keys_values(embeds[None])
                wanted = (wanted_i2t[i] | wanted_t2i[i]).nonzero().flatten()
                for texts in wanted.split(8 * config.eval.batch_size):  # an image may be in the top k of all texts
                    mask = torch.arange(lengths[texts].max(), device=device) < lengths[texts, None]
                    states = text_embeds[texts, : mask.shape[1]]
                    fused, _ = encoders.fuse(states, mask, keys_values, cls_only=True)
                    scores[i, texts] = match_scores(model, fused)
    if world_size() > 1:
        dist.all_reduce(scores, dist.ReduceOp.MAX)
    return sim, scores.masked_fill(~wanted_i2t, -torch.inf), scores.masked_fill(~wanted_t2i, -torch.inf).T


def retrieval(model, tokenize, file, image_root, config):
    """Retrieval on one file: metrics by ITC alone (itc) and re-ranked by ITM (reranked)."""
    paths, captions, image_of_text = data.load_retrieval(file, image_root, config.data.max_words)
    sim, scores_i2t, scores_t2i = retrieval_scores(model, tokenize, paths, captions, config)
    image_of_text = torch.from_numpy(image_of_text).to(sim.device)
    return {
        "itc": retrieval_metrics(sim, sim.T, image_of_text),
        "reranked": retrieval_metrics(scores_i2t, scores_t2i, image_of_text),
    }


# The embedded scenes: do words look at their objects, are false captions told apart


def pair_batches(rows, image_root, tokenize, config, device, texts):
    """Yield (rows, images, tokens per name in texts) of batches of annotation rows."""
    paths = [data.join_image_path(image_root, row["image"]) for row in rows]
    for indices, images in image_batches(paths, list(range(len(rows))), config, device):
        batch = [rows[i] for i in indices]
        cleaned = [[softmask.clean_caption(row[name], config.data.max_words) for row in batch] for name in texts]
        yield batch, images, [to_device(tokenize(c), device) for c in cleaned]


def pointing(cam, own_box, other_boxes):
    """Where one word's attention map points. [ours], after the pointing game

    cam (h, w) float; boxes (x, y, w, h) as shares of the side, so in [0, 1].
    Returns hit_own (is the centre of the largest patch in its own box), hit_other (mean over the other boxes, 0 without one),
    mass_own, mass_other (share of the map's sum in patches whose centre is in the box), area_own (share of patch centres in
    the own box: what a random map gets). A constant map is a miss of every kind.
    """
    h, w = cam.shape
    y, x = (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w

    def inside(box):
        left, top, width, height = box
        return ((y >= top) & (y < top + height))[:, None] & ((x >= left) & (x < left + width))[None]

    boxes = [inside(box) for box in [own_box, *other_boxes]]
    result = {"area_own": boxes[0].float().mean().item(), "hit_own": 0.0, "hit_other": 0.0, "mass_own": 0.0, "mass_other": 0.0}
    if cam.max() > cam.min():
        peak = cam.flatten().argmax()
        hits = [box.flatten()[peak].float().item() for box in boxes]
        masses = [(cam[box].sum() / cam.sum()).item() for box in boxes]
        result |= {"hit_own": hits[0], "mass_own": masses[0]}
        if other_boxes:
            result |= {"hit_other": np.mean(hits[1:]).item(), "mass_other": np.mean(masses[1:]).item()}
    return result


def token_attention(model, images, tokens, config):
    """Grad-CAM G (B, L, N) of each token on its image: softmask.word_attention of the pairs' match scores."""
    encoders = model.encoders
    with autocast(config, images.device), torch.enable_grad():
        with torch.no_grad():
            image_embeds = encoders.encode_image(images)
            text_embeds = encoders.encode_text(tokens["input_ids"], tokens["attention_mask"])
        keys_values = encoders.image_keys_values(image_embeds)
        fused, attention = encoders.fuse(
            text_embeds, tokens["attention_mask"], keys_values, attention_layer=model.attention_layer
        )
        return softmask.word_attention(attention, match_scores(model, fused))


def pointing_metrics(model, tokenize, rows, image_root, side, config):
    """Word attention of the words that name an object's shape, colour, size against the boxes of its scene. [ours]

    rows: of boxes_test.json; side: of the pictures, pixels. Returns of the words of shape the means of pointing() over
    objects, in percent, objects (their number), and ratio: hit_own / hit_other, None where that is 0; and the same of
    other attributes, by name.
    """
    device, grid, results = model.temp.device, model.encoders.vision.grid, {"shape": []}
    for batch, images, (tokens,) in pair_batches(rows, image_root, tokenize, config, device, ["caption"]):
        cam = token_attention(model, images, tokens, config).cpu()
        for row, row_cam, word_ids in zip(batch, cam, tokens["word_ids"].cpu()):
            boxes = [np.array(item["box"]) / side for item in row["objects"]]
            unnamed = [np.array(box) / side for box in row["other_boxes"]]
            for i, item in enumerate(row["objects"]):
                for attribute, index in item["attribute_indices"].items():
                    pieces = word_ids == index
                    word_cam = row_cam[pieces].mean(0) if pieces.any() else torch.zeros(grid * grid)
                    found = pointing(word_cam.view(grid, grid), boxes[i], boxes[:i] + boxes[i + 1 :] + unnamed)
                    results.setdefault(attribute, []).append(found)
    metrics = {}
    for attribute, found in results.items():
        means = {name: 100 * float(np.mean([result[name] for result in found])) for name in found[0]}
        means["ratio"] = means["hit_own"] / means["hit_other"] if means["hit_other"] else None
        metrics |= {attribute: means | {"objects": len(found)}}
    return metrics.pop("shape") | metrics


@torch.no_grad()
def foil_metrics(model, tokenize, rows, image_root, config):
    """Is the true caption's ITM score above its foil's: percent per kind, its standard error and the number. [ours]

    rows: of foils_test.json. A tie is a miss.
    """
    encoders, device, right = model.encoders, model.temp.device, {}
    for batch, images, tokens in pair_batches(rows, image_root, tokenize, config, device, ["caption", "foil"]):
        with autocast(config, device):
            keys_values = encoders.image_keys_values(encoders.encode_image(images))
            scores = []
            for text in tokens:
                embeds = encoders.encode_text(text["input_ids"], text["attention_mask"])
                fused, _ = encoders.fuse(embeds, text["attention_mask"], keys_values, cls_only=True)
                scores.append(match_scores(model, fused))
        for row, above in zip(batch, (scores[0] > scores[1]).tolist()):
            right.setdefault(row["kind"], []).append(above)
    return {kind: accuracy(answers) | {"foils": len(answers)} for kind, answers in sorted(right.items())}


# Downstream tasks


NUMBER_WORDS = {"none": "0"} | {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
}
# written with one apostrophe missing, whichever, these words get it back (the official table's I'm and I've are never
# reached: words are lower case by then)
APOSTROPHES = """
    ain't aren't can't couldn't couldn't've could've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've shouldn't shouldn't've should've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've weren't
    we've what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
    why're why's won't wouldn't wouldn't've would've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word for word in APOSTROPHES for i, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # the other way round in the official table


def normalize_answer(answer: str) -> str:
    """An answer as VQA accuracy compares it: lower case, without articles and punctuation, numbers to ten as digits.

    The rule of the official evaluation (processPunctuation and processDigitArticle of vqaEval.py in GT-Vision-Lab/VQA,
    commit a013f00; Antol et al., VQA, ICCV 2015). A mark of punctuation becomes a space, unless it stands beside a
    space somewhere in the answer, or the answer has a comma between digits: then it is dropped. Colon and apostrophe
    stay, and so does a period before a digit.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    text, has_thousands = answer, re.search(r"\d,\d", answer)
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        dropped = has_thousands or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if dropped else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(answer: str, answers: list[str]) -> float:
    """How far one answer agrees with people's, in percent: the official VQA accuracy, see normalize_answer.

    answers: of the annotators, ten in VQA. Each in turn is left out; min(1, matches among the others / 3) is averaged:
    1, 2, 3, 4 of 10 give 30, 60, 90, 100. As in the official script, answers that are all the same letter by letter are
    not normalised, nor is the given one. Fewer than ten answers: 100 for a match with any of them after normalisation,
    else 0 [ours: they are alternatives then, not votes]. ValueError without answers.
    """
    if not answers:
        raise ValueError("answers: there is none to compare with")
    answer, *answers = [text.replace("\n", " ").replace("\t", " ").strip() for text in (answer, *answers)]
    if len(set(answers)) > 1 or len(answers) < 10:
        answer, *answers = map(normalize_answer, (answer, *answers))
    matches = [other == answer for other in answers]
    if len(answers) < 10:
        return 100.0 * any(matches)
    return 100 * float(np.mean([min(1, (sum(matches) - own) / 3) for own in matches]))


def pick_proposal(cam, proposals, height: int, width: int):
    """The proposal that holds most of an attention map for its size: sum inside / sqrt(area). [ALBEF] grounding_eval

    cam (h, w) float, any grid, brought to (height, width) pixels bicubically; proposals: [x, y, width, height, ...],
    pixels. Returns the four numbers of the best box, the first of equals; None where no score is above 0 [ours: ALBEF
    keeps the box of the picture before]. A box without area is passed over [ALBEF], and what lies outside the image
    counts 0 [ours].
    """
    if cam.shape != (height, width):  # the greater part of the time
        cam = torch.nn.functional.interpolate(cam[None, None].float(), (height, width), mode="bicubic")[0, 0]
    cam = cam.cpu()
    best, best_score = None, 0.0
    for x, y, w, h in (proposal[:4] for proposal in proposals):
        if w > 0 and h > 0:
            # a negative end of a slice would count from the far side
            left, right, top, bottom = (max(0, int(end)) for end in (x, x + w, y, y + h))
            score = cam[top:bottom, left:right].sum().item() / (w * h) ** 0.5
            if score > best_score:
                best, best_score = [x, y, w, h], score
    return best


def grounding_accuracy(rows, cams) -> dict[str, float]:
    """Of each split that occurs, the percentage of expressions whose picked proposal has an IoU of at least 0.5.

    rows: dicts with split, bbox (the true one, [x, y, width, height]), dets (proposals), height, width (pixels); cams: for each
    row its map (h, w). Returns SPLIT_d under ALBEF's names (val_d, testA_d, testB_d), and two floors [ours]:
    chance_SPLIT_d, a proposal drawn at random (the mean share of right ones), and uniform_SPLIT_d, a map that is the
    same everywhere.
    """

    def is_right(row, box):
        return box is not None and data.box_iou(row["bbox"], box) >= 0.5

    splits = {}
    for row, cam in zip(rows, cams, strict=True):
        maps = (cam, torch.ones(row["height"], row["width"]))
        picked, uniform = (pick_proposal(m, row["dets"], row["height"], row["width"]) for m in maps)
        chance = np.mean([is_right(row, box) for box in row["dets"] or [None]])
        splits.setdefault(row["split"], []).append((is_right(row, picked), chance, is_right(row, uniform)))
    metrics = {}
    for split, results in splits.items():
        names = (f"{split}_d", f"chance_{split}_d", f"uniform_{split}_d")
        metrics |= dict(zip(names, (100 * np.mean(results, axis=0)).tolist()))
    return metrics


def accuracy(right) -> dict[str, float]:
    """Of right, a bool per item: the share of true ones and its standard error, in percent."""
    share = float(np.mean(right))
    return {"accuracy": 100 * share, "standard_error": 100 * math.sqrt(share * (1 - share) / len(right))}


def classification_metrics(predictions, labels, names) -> dict[str, float]:
    """Accuracy of NLVR2 and entailment, in percent.

    predictions, labels (N,): class numbers, N > 0; names: of the classes, by number. Returns accuracy, its
    standard_error, majority (share of the most frequent label), accuracy_NAME of each class that occurs, and items (N).
    ValueError for other sizes.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or not labels.size:
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} are not of one size above 0")
    right, counts = predictions == labels, np.bincount(labels, minlength=len(names))
    metrics = accuracy(right) | {"majority": 100 * float(counts.max()) / len(labels)}
    for number, name in enumerate(names):
        if counts[number]:
            metrics[f"accuracy_{name}"] = 100 * float(right[labels == number].mean())
    return metrics | {"items": len(labels)}


def task_batches(rows, tokenize, config, device):
    """Yield (indices, image, tokens) of batches of this process's share of rows, under autocast.

    rows: dicts with text and image or, of NLVR2, images; image (B, 3, S, S) or (B, 2, 3, S, S), normalised, on device.
    """
    mine = list(range(rank(), len(rows), world_size()))
    paths = [row.get("images") or row["image"] for row in rows]
    with autocast(config, device):
        for indices, image in image_batches(paths, mine, config, device):
            yield indices, image, to_device(tokenize([rows[i]["text"] for i in indices]), device)


@torch.no_grad()
def classify(model, rows, names, tokenize, config):
    """NLVR2 and entailment: classification_metrics of data.load_labelled's rows."""
    device = next(model.parameters()).device
    predictions = torch.zeros(len(rows), dtype=torch.int64, device=device)
    for indices, image, text in task_batches(rows, tokenize, config, device):
        logits = model.logits(model.encoders, image, text["input_ids"], text["attention_mask"])
        predictions[indices] = logits.argmax(1)
    return classification_metrics(all_reduced(predictions).tolist(), [row["label"] for row in rows], names)


@torch.no_grad()
def answer_questions(model, rows, answers, tokenize, config):
    """VQA: the best of a list of answers to each of data.load_vqa's rows, a list of strings. [ALBEF]"""
    device = next(model.parameters()).device
    best = torch.zeros(len(rows), dtype=torch.int64, device=device)
    candidates = tokenize(answers, end=True)
    candidates = candidates["input_ids"].to(device), candidates["attention_mask"].to(device)
    for indices, image, text in task_batches(rows, tokenize, config, device):
        question = image, text["input_ids"], text["attention_mask"]
        best[indices] = model.rank_answers(*question, *candidates, config.eval.answers_top_k)[0][:, 0]
    return [answers[i] for i in all_reduced(best).tolist()]


def vqa_metrics(rows, chosen):
    """Mean vqa_accuracy of the rows that have answers, its standard error, and the mean of each kind of question."""
    scores = {}
    for row, answer in zip(rows, chosen):
        if row["answers"]:
            kinds = [f"accuracy_{row['kind']}"] if "kind" in row else []
            for kind in ["accuracy", *kinds]:
                scores.setdefault(kind, []).append(vqa_accuracy(answer, row["answers"]))
    if not scores:
        return {}
    error = float(np.std(scores["accuracy"])) / math.sqrt(len(scores["accuracy"]))
    means = {kind: float(np.mean(values)) for kind, values in sorted(scores.items())}
    return means | {"standard_error": error, "items": len(scores["accuracy"])}


def ground(model, rows, tokenize, config):
    """RefCOCO+: grounding_accuracy of data.load_grounding's rows, by G averaged over all attended tokens. [ALBEF]"""
    device, grid = model.temp.device, model.encoders.vision.grid
    cams = torch.zeros(len(rows), grid * grid, device=device)
    for indices, image, text in task_batches(rows, tokenize, config, device):
        mask = text["attention_mask"][:, :, None]
        cams[indices] = (token_attention(model, image, text, config) * mask).sum(1) / mask.sum(1)
    return grounding_accuracy(rows, all_reduced(cams).cpu().unflatten(1, (grid, grid)))


def load_rows(task, file, config):
    """The rows of an annotation file that VQA, NLVR2, entailment or grounding is evaluated on."""
    if task in ("nlvr2", "entailment"):
        return data.load_labelled(task, file, config)
    return (data.load_vqa if task == "vqa" else data.load_grounding)(file, config)


def scene_rows(config, name):
    """What data.grounding_boxes or data.foils, by name, lists: dicts with image, caption, and the keys named here."""
    more = {"objects": (list,), "other_boxes": (list,)} if name == "grounding_boxes" else {"foil": (str,), "kind": (str,)}
    path = getattr(config.data, name)
    rows = data.check_rows(path, data.read_json(path), {"image": (str,), "caption": (str,)} | more)
    for number, row in enumerate(rows if name == "grounding_boxes" else ()):
        items = [item if isinstance(item, dict) else {} for item in row["objects"]]
        for box in [item.get("box") for item in items] + row["other_boxes"]:
            if not data.is_box(box) or len(box) > 4:
                raise data.InputError(f"{path}: record {number} (from 0): a box is [x, y, width, height], got {data.short(box)}")
        for words in (item.get("attribute_indices") for item in items):
            if not isinstance(words, dict) or "shape" not in words or {type(index) for index in words.values()} != {int}:
                raise data.InputError(f"{path}: record {number} (from 0): attribute_indices of an object gives the number of "
                                      f'the word of its "shape", and of others, got {data.short(words)}')
    return rows


def evaluation_files(task, config):
    """The files of a task's evaluation; of pre-training those of retrieval."""
    return data.task_files(config, "retrieval" if task == "pretrain" else task)


def lacking(task, config, split) -> str | None:
    """What a task's evaluation on a split lacks, named after its setting; None where the file is there."""
    part = f"retrieval_sets.{config.data.retrieval}" if task in ("pretrain", "retrieval") else task
    file = getattr(evaluation_files(task, config), split)
    if file is None:
        return f"data.{part}.{split} is null"
    return None if os.path.isfile(file) else f"data.{part}.{split}: {file} is missing"


def find_first(images, file):
    """InputError where the first of the images of a file, if any, is not there."""
    if images and not os.path.isfile(images[0]):
        raise data.InputError(f"{images[0]}: no such file, the first image of {file}; see the image_root beside it")


def look_ahead(task, config):
    """Read what a task will be evaluated on, and look for the first image, so that a mistake there costs no training.

    InputError for what could not be evaluated; where pre-training has no file for it, a line says so.
    """
    files = evaluation_files(task, config)
    listed = data.task_files(config, task).train
    trained_on = {os.path.realpath(path) for entry in listed for path in data.matches(entry)}
    for split in ("test",) if task == "pretrain" else ("val", "test"):
        file = getattr(files, split)
        if file is not None and os.path.realpath(file) in trained_on and rank() == 0:
            print(f"{file}, for {split}, is among the files trained on: its figures will say little", file=sys.stderr)
        if lack := lacking(task, config, split):
            if task == "pretrain" and rank() == 0:
                print(f"no evaluation at the end: {lack}", file=sys.stderr)
            elif task != "pretrain" and file is not None:
                raise data.InputError(lack)
            continue
        if task in ("pretrain", "retrieval"):
            images, _, _ = data.load_retrieval(file, files.image_root, config.data.max_words)
        else:
            images = [image for row in load_rows(task, file, config)[:1] for image in row.get("images", [row.get("image")])]
        find_first(images, file)
    if task == "vqa" and (files.val or files.test):
        data.load_answers(files.answers)
    for name in ("grounding_boxes", "foils") if task == "pretrain" else ():
        if getattr(config.data, name) is not None:
            scene_rows(config, name)


def evaluate(task, model, tokenizer, config, split, out):
    """The figures of a fine-tuned model on one split, "val" or "test"; {} where the settings name no file for it.

    config: with the task's image size as the model's, see data.task_settings. VQA also writes out/answers_SPLIT.json,
    every question once, as the evaluation server takes it.
    """
    model.eval()
    files = data.task_files(config, task)
    file = getattr(files, split)
    if file is None:
        return {}
    tokenize = functools.partial(softmask.tokenize, tokenizer, max_tokens=data.evaluation_max_tokens(config, task))
    if task == "retrieval":
        return retrieval(model, tokenize, file, files.image_root, config)
    rows = load_rows(task, file, config)
    if task == "grounding":
        return ground(model, rows, tokenize, config)
    if task == "vqa":
        chosen = answer_questions(model, rows, data.load_answers(files.answers), tokenize, config)
        target, metrics = os.path.join(out, f"answers_{split}.json"), vqa_metrics(rows, chosen)
        if rank() == 0:
            results = [{"question_id": row["question_id"], "answer": answer} for row, answer in zip(rows, chosen)]
            try:
                data.write_atomically(target, json.dumps(results).encode())
            except OSError as error:  # beside a checkpoint that may only be read; the figures are worth more
                if not metrics:
                    raise
                print(f"no answers for the server: {error}", file=sys.stderr)
            if not metrics:
                print(f"no question of {file} has answers to judge by; ours: {target}", file=sys.stderr)
        return metrics
    if task == "nlvr2":
        return classify(model, rows, ("false", "true"), tokenize, config)
    return classify(model, rows, data.ENTAILMENT_LABELS, tokenize, config)


def score(task, metrics) -> float:
    """The figure that chooses the best epoch: r_mean of the re-ranked, accuracy [ALBEF; of VQA: ours], of grounding the mean
    of the file's splits [ours; ALBEF: val]."""
    if task == "retrieval":
        return metrics["reranked"]["r_mean"]
    if task == "grounding":
        floors = ("chance_", "uniform_")
        return float(np.mean([value for name, value in metrics.items() if not name.startswith(floors)]))
    return metrics["accuracy"]


def evaluate_pretrained(model, tokenizer, config, out, split="test"):
    """All figures of a pre-trained model, and a sheet of soft masks, out/masks.png (of val: out/masks_val.png), of the
    first images and captions.

    Process 0 alone measures pointing and foils, whose files are of test, and draws; all processes share the retrieval.
    """
    model.eval()
    files = evaluation_files("pretrain", config)
    file = getattr(files, split)
    if lack := lacking("pretrain", config, split):
        if rank() == 0:
            print(f"no evaluation: {lack}", file=sys.stderr)
        return {}
    max_tokens = data.evaluation_max_tokens(config, "pretrain")
    tokenize = functools.partial(softmask.tokenize, tokenizer, max_tokens=max_tokens)
    found = retrieval(model, tokenize, file, files.image_root, config)
    metrics = {"zero_shot": found["itc"], "reranked": found["reranked"]}
    if rank() > 0:
        return metrics
    has_attention = len(model.encoders.fusion.layers) > 1  # the last fusion layer has none, so an only one has none either
    boxes, scenes = config.data.grounding_boxes, config.data.scenes
    if boxes is not None and scenes is not None and has_attention and split == "test":
        rows, side = scene_rows(config, "grounding_boxes"), scenes.image_size
        metrics["pointing"] = pointing_metrics(model, tokenize, rows, os.path.dirname(boxes), side, config)
    if config.eval.pictures and has_attention:
        paths, captions, image_of_text = data.load_retrieval(file, files.image_root, config.data.max_words)
        firsts = np.unique(image_of_text, return_index=True)[1][: config.eval.pictures]  # the first caption of an image
        api = softmask.Pretrained(model, tokenizer, max_tokens, config.data.max_words)
        try:
            sheet = os.path.join(out, "masks.png" if split == "test" else f"masks_{split}.png")
            draw_masks(api, [(paths[image_of_text[t]], captions[t]) for t in firsts], sheet)
        except OSError as error:  # the figures are worth more
            print(f"no picture of masks: {error}", file=sys.stderr)
    if config.data.foils is not None and split == "test":
        rows = scene_rows(config, "foils")
        metrics["foils"] = foil_metrics(model, tokenize, rows, os.path.dirname(config.data.foils), config)
    return metrics


def watch_pretraining(tokenizer, config, out):
    """A function of a model and its step: it returns R@1 by ITC on val, {txt_r1, img_r1}, and draws out/masks_STEP.png,
    the soft masks of val's first caption. Random numbers of training are left as they are."""
    files = evaluation_files("pretrain", config)
    if files.val is None:
        raise data.InputError(f"eval_every_steps: data.retrieval_sets.{config.data.retrieval}.val is null; name a file")
    paths, captions, image_of_text = data.load_retrieval(files.val, files.image_root, config.data.max_words)
    find_first(paths, files.val)
    max_tokens = data.evaluation_max_tokens(config, "pretrain")
    tokenize = functools.partial(softmask.tokenize, tokenizer, max_tokens=max_tokens)

    def watch(model, step):
        model.eval()
        sim, *_ = similarities(model, tokenize, paths, captions, config, keep_states=False)  # beside a training's memory
        metrics = retrieval_metrics(sim, sim.T, torch.from_numpy(image_of_text).to(sim.device))
        if rank() == 0 and len(model.encoders.fusion.layers) > 1:
            api = softmask.Pretrained(model, tokenizer, max_tokens, config.data.max_words)
            draw_masks(api, [(paths[0], captions[0])], os.path.join(out, f"masks_{step}.png"), 78, f"step {step}: ")
        return {name: metrics[name] for name in ("txt_r1", "img_r1")}

    return watch


def format_metrics(metrics: dict) -> str:
    """The results as a table to read."""
    lines = []
    if "reranked" in metrics:
        names = ("txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10")
        lines.append(f"{'retrieval, %':26}" + "".join(f"{name:>9}" for name in names) + f"{'mean R@1':>10}")
        by_itc = metrics.get("zero_shot") or metrics["itc"]
        for title, values in (("by ITC", by_itc), ("re-ranked by ITM", metrics["reranked"])):
            mean = (values["txt_r1"] + values["img_r1"]) / 2
            lines.append(f"  {title:24}" + "".join(f"{values[name]:9.1f}" for name in names) + f"{mean:10.1f}")
    if "pointing" in metrics:
        g = metrics["pointing"]
        lines.append(f"{'word attention, %':26}{'own box':>9}{'others':>9}{'ratio':>9}{'box area':>10}")
        for name, value in [("shape", g), *g.items()]:
            if isinstance(value, dict):
                ratio = math.inf if value["ratio"] is None else value["ratio"]
                hits = f"{value['hit_own']:9.1f}{value['hit_other']:9.1f}{ratio:9.2f}{value['area_own']:10.1f}"
                lines.append(f"  {name + ', largest patch':24}{hits}")
        lines.append(f"  {'shape, mass':24}{g['mass_own']:9.1f}{g['mass_other']:9.1f}")
    if "foils" in metrics:
        lines.append(f"{'foils told apart, %':26}" + "".join(f"{kind:>14}" for kind in metrics["foils"]))
        values = "".join(f"{v['accuracy']:8.1f} ± {v['standard_error']:3.1f}" for v in metrics["foils"].values())
        lines.append(f"  {'chance 50, ± 1 s.e.':24}{values}")
    plain = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    lines += [f"{name:26}{value:9.1f}" if isinstance(value, float) else f"{name:26}{value:9}" for name, value in plain.items()]
    for name in ("val", "test"):
        if metrics.get(name):
            lines += [f"{name}:", *("  " + line for line in format_metrics(metrics[name]).splitlines())]
    return "\n".join(lines)


# Pictures


def heat(value):
    """A colour (..., 3) uint8 for values in [0, 1]: black, red, yellow, white."""
    return (np.clip(np.stack([3 * value, 3 * value - 1, 3 * value - 2], -1), 0, 1) * 255).astype(np.uint8)


def draw_masks(api, pairs, path, side=192, title=""):
    """A sheet of pictures: a row a pair, the image, then for each word its soft mask laid over the image.

    api: softmask.Pretrained; pairs: (image path, text); title: stands before each text. Bright = relevant = hidden
    most in the soft-masked image. Written as PNG to path.
    """
    rows = []
    font = ImageFont.load_default(14)
    for image_path, text in pairs:
        try:
            original = data.read_image(image_path)
        except data.BadImage as error:
            raise data.InputError(str(error)) from None
        image = softmask.square(original, side)
        words, cams = api.word_attention(original, text)
        probability, _ = api.match(original, text)
        cells = [(image, f"match {probability:.2f}")]
        for word, cam in zip(words, cams.cpu()):
            mask = softmask.soft_mask(cam.view(1, 1, -1), torch.ones(1, 1, dtype=torch.bool)).view(cam.shape)
            overlay = Image.fromarray((mask.numpy() * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
            glow = Image.fromarray(heat(np.asarray(overlay) / 255))
            cells.append((Image.blend(image.convert("L").convert("RGB"), glow, 0.55), word))
        rows.append((title + text, cells))
    caption_height, label_height, gap = 20, 20, 4
    width = max(len(cells) for _, cells in rows) * (side + gap) + gap
    row_height = caption_height + side + label_height + gap
    sheet = Image.new("RGB", (width, len(rows) * row_height + gap), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (text, cells) in enumerate(rows):
        top = i * row_height + gap
        pen.text((gap, top), text, fill="black", font=font)
        for j, (picture, label) in enumerate(cells):
            left = gap + j * (side + gap)
            sheet.paste(picture, (left, top + caption_height))
            pen.text((left + 2, top + caption_height + side + 1), label, fill="black", font=font)
    data.write_atomically(path, lambda file: sheet.save(file, "PNG"))


def draw_curves(logs, names, path, width=900, height=330):
    """Training as a picture: loss parts, and R@1 by ITC on val where the logs have it, against pairs seen.

    logs: of each run the lines of its log.jsonl; names: of the runs, each lighter than the one before. Written as PNG.
    """
    sheet, font = Image.new("RGB", (2 * width, 2 * height), "white"), ImageFont.load_default(26)  # halved at the end
    pen = ImageDraw.Draw(sheet)
    colors = (31, 119, 180), (214, 39, 40), (255, 127, 14), (44, 160, 44), (148, 103, 189)
    rounds = [digit * 10.0**power for power in range(-4, 15) for digit in (1, 2, 5)]
    fields = dict.fromkeys(name for log in logs for line in log for name in line)
    panels = [("loss, logarithmic", [name for name in fields if name.startswith("loss_")]),
              ("R@1 by ITC on val, %", [name for name in ("txt_r1", "img_r1") if name in fields])]
    panels = [panel for panel in panels if panel[1]]
    for number, (title, shown) in enumerate(panels):
        left, right = (2 * width * (number + end) // len(panels) for end in (0, 1))
        left, right, top, bottom = left + 100, right - 40, 70, 2 * height - 150
        curves = [(i, run, [(line["pairs"], line[name]) for line in log if name in line])
                  for i, name in enumerate(shown) for run, log in enumerate(logs)]
        curves = [curve for curve in curves if curve[2]]
        xs, ys = zip(*(point for *_, points in curves for point in points))
        logarithmic = title.startswith("loss")  # the parts differ tenfold
        low, high = max(min(ys), 1e-4) if logarithmic else 0, max(*ys, 1e-3)

        def place(x, y):
            up = math.log(max(y, low) / low) / max(math.log(high / low), 1e-9) if logarithmic else y / high
            return left + (right - left) * x / max(xs), bottom - (bottom - top) * up

        x_step, y_step = (next(step for step in rounds if largest < 7 * step) for largest in (max(xs), high))
        for y in [y for y in rounds if low <= y <= high] if logarithmic else np.arange(0, high, y_step):
            pen.line([place(0, y), place(max(xs), y)], (221, 221, 221), 2)
            pen.text((left - 12, place(0, y)[1]), f"{y:g}", "black", font, "rm")
        for x in np.arange(0, max(xs), x_step):
            pen.text((place(x, high)[0], bottom + 14), f"{x:g}", "black", font, "mt")
        pen.line([(left, top), (left, bottom), (right, bottom)], "black", 2)
        pen.text(((left + right) / 2, bottom + 52), "pairs seen", "black", font, "mt")
        pen.text((left, 18), title, "black", font)
        for i, run, points in reversed(curves):
            color = tuple(round(255 - (255 - part) * (1 - 0.65 * run / len(logs))) for part in colors[i % 5])
            parts = np.array_split(points, min(len(points), 200))  # more would be a band, not a line
            points = [place(*np.mean(part, axis=0)) for part in parts]
            pen.line(points, color, 5, "curve")
            for x, y in points if len(points) < 40 and not logarithmic else []:
                pen.ellipse([x - 6, y - 6, x + 6, y + 6], color)
        legend = right
        for i, name in reversed(list(enumerate(shown))):
            pen.text((legend, 18), name.removeprefix("loss_"), colors[i % 5], font, "ra")
            legend -= pen.textlength(name.removeprefix("loss_"), font) + 30
    if len(logs) > 1:
        pen.text((20, 2 * height - 40), f"dark to light: {', '.join(names)}", "black", font)
    sheet = sheet.resize((width, height), Image.Resampling.LANCZOS).quantize(256)
    data.write_atomically(path, lambda file: sheet.save(file, "PNG"))


def curve(folders):
    """Draw curve.png, and masks_over_training.png of the masks_STEP.png that there are, both in the first of folders."""
    logs = []
    for folder in folders:
        file = file_of_run(folder, "log.jsonl")
        with open(file, encoding="utf-8") as lines:
            try:
                log = [json.loads(line) for line in lines if line.endswith("\n")]
            except ValueError as error:
                raise data.InputError(f"{file}: not JSON ({error})") from None
        if not log or not all(isinstance(line, dict) and "pairs" in line for line in log):
            raise data.InputError(f"{file} has no line yet, or none that says how many pairs were seen")
        logs.append(log)
    target = os.path.join(folders[0], "curve.png")
    draw_curves(logs, folders, target)
    print(target)
    rows = [os.path.join(folders[0], f"masks_{line['step']}.png") for line in logs[0] if "txt_r1" in line]
    rows = [Image.open(row) for row in rows if os.path.isfile(row)]
    if rows:
        rows = [rows[int(i)] for i in np.linspace(0, len(rows) - 1, min(len(rows), 8))]
        sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
        for i, row in enumerate(rows):
            sheet.paste(row, (0, i * row.height))
        target = os.path.join(folders[0], "masks_over_training.png")
        data.write_atomically(target, lambda file: sheet.quantize(256).save(file, "PNG"))
        print(target)


# Tables of runs


def flatten(settings: dict, prefix: str = "") -> dict:
    """Nested settings as one dict: {"method.focal_gamma": 2.0, ...}; lists become JSON."""
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value) if isinstance(value, list) else value
    return flat


def headline(metrics: dict) -> dict[str, float]:
    """The figures a table shows, of the metrics of a run; where there are splits, those on test, else on val."""
    metrics = metrics.get("test") or metrics.get("val") or metrics
    found = {}
    for name, kind in (("R@1 by ITC", "zero_shot"), ("R@1 by ITC", "itc"), ("R@1 re-ranked", "reranked")):
        if kind in metrics:
            found[name] = (metrics[kind]["txt_r1"] + metrics[kind]["img_r1"]) / 2
    found |= {f"foils: {kind}": values["accuracy"] for kind, values in metrics.get("foils", {}).items()}
    pointing = metrics.get("pointing", {})
    shown = ("hit_own", "hit_other", "ratio", "mass_own", "mass_other")
    found |= {f"pointing: {name}": pointing[name] for name in shown if pointing.get(name) is not None}
    for kind in ("size", "color"):  # above: the words that name the shape
        found |= {f"pointing: {kind} {name}": pointing[kind][name] for name in shown[:2] if kind in pointing}
    aside = re.compile("standard_error|majority|chance|uniform")  # that say how good a figure is
    return found | {name: value for name, value in metrics.items() if isinstance(value, float) and not aside.search(name)}


def file_of_run(folder, name) -> str:
    """The path of what train.py has written in folder under that name; InputError where it is not there."""
    path = os.path.join(folder, name)
    if not os.path.isfile(path):
        raise data.InputError(f"{folder}: no {name} there, which a run of train.py leaves; name the folder of one")
    return path


def read_run(file) -> dict:
    """What a metrics.json holds, settings flat and without those of other tasks; a start that ends a part in the seed: SEED."""
    run = data.read_json(file)
    if not isinstance(run, dict) or not {"task", "seed", "step", "settings", "metrics"} <= run.keys():
        raise data.InputError(f"{file} was not written by train.py: it lacks task, seed, step, settings or metrics")
    if not isinstance(run["settings"], dict):
        raise data.InputError(f"{file} is no metrics.json of this version: its settings are {data.short(run['settings'])}")
    others = set(data.TASKS) - {run["task"]}
    settings = flatten({name: part for name, part in run["settings"].items() if name not in others})
    if isinstance(start := settings.get(f"{run['task']}.start"), str):
        settings[f"{run['task']}.start"] = re.sub(rf"(seed|[-_]){run['seed']}(?=/|$)", r"\1SEED", start)
    return run | {"settings": settings}


def read_runs(folders) -> dict:
    """The metrics.json in and below folders, {task: [(settings, seed, figures)]}; of the settings those that differ.

    Settings that only ever change together are one: {"method.distort_blur, method.distort_hue": "0.5, 0.1"}. Of many, such
    as those that older runs lack, seven are named.
    """
    found = {folder: list(pathlib.Path(folder).rglob("metrics.json")) for folder in folders}
    files = sorted(set(itertools.chain(*found.values())))
    lack = ", ".join(str(folder) for folder in folders if not found[folder])
    lack = f"no metrics.json in {lack}, which a run writes at its end"
    if not files:
        raise data.InputError(lack)
    if not all(found.values()):
        print(lack, file=sys.stderr)
    runs = {}
    for file in files:
        run = read_run(file)
        try:
            settings, figures = run["settings"], headline(run["metrics"])
            entry = settings, settings.pop("seed"), figures
        except (AttributeError, KeyError, TypeError) as error:
            raise data.InputError(f"{file} is no metrics.json of this version ({error!r})") from None
        if not figures:
            print(f"{file} has no figures to compare", file=sys.stderr)
        elif entry not in runs.get(run["task"], []):  # a copy is no second run
            runs.setdefault(run["task"], []).append(entry)
    if not runs:
        raise data.InputError(f"{files[0]} has no figures to compare, nor has another; was there a file to evaluate on?")
    for task, found in runs.items():
        keys = dict.fromkeys(key for settings, _, _ in found for key in settings)
        together = {}  # which runs share a value of it -> the settings of which the same runs do
        for key in keys:
            values = [settings.get(key) for settings, _, _ in found]
            together.setdefault(tuple(values.index(value) for value in values), []).append(key)
        differing = [names for pattern, names in together.items() if any(pattern)]
        runs[task] = [
            ({listed(names): listed([row.get(name) for name in names]) for names in differing}, seed, figures)
            for row, seed, figures in found
        ]
    return runs


def listed(values: list) -> str:
    """Eight values at most, else seven and how many more there are."""
    shown = values if len(values) <= 8 else [*values[:7], f"{len(values) - 7} more"]
    return ", ".join(map(str, shown))


def markdown(header, rows) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def mean_cells(names, rows, error) -> list[str]:
    """For each name the mean of its values in rows, which are dicts of figures, and ± error(values) of two or more."""
    cells = []
    for name in names:
        values = [row[name] for row in rows if name in row]
        spread = f" ± {error(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.1f}{spread}" if values else "")
    return cells


def tabulate(runs) -> str:
    """Markdown of one task's runs: those that differ in the seed alone as one row, mean ± standard deviation.

    A second table says what each setting does: the differences of all pairs of runs that share the seed and all settings but
    that one, averaged for each seed, then mean ± standard error over seeds, since pairs of one seed are alike. runs: of
    read_runs.
    """
    names = list(dict.fromkeys(name for _, _, figures in runs for name in figures))
    groups, effects = {}, {}
    for settings, _, figures in runs:
        groups.setdefault(tuple(settings.values()), []).append(figures)
    deviation = functools.partial(np.std, ddof=1)
    rows = [[*values, len(group), *mean_cells(names, group, deviation)] for values, group in groups.items()]
    tables = [markdown([*runs[0][0], "runs", *names], rows)]
    for (first, seed, before), (second, other_seed, after) in itertools.combinations(runs, 2):
        changed = [key for key in first if first[key] != second[key]]
        if seed == other_seed and len(changed) == 1:
            change = changed[0], first[changed[0]], second[changed[0]]
            if (change[0], change[2], change[1]) in effects:  # the same change, always in the same direction
                change, before, after = (change[0], change[2], change[1]), after, before
            difference = {name: after[name] - before[name] for name in after if name in before}
            effects.setdefault(change, {}).setdefault(seed, []).append(difference)
    rows = []
    for change, pairs in effects.items():
        means = [{name: np.mean([pair[name] for pair in of_seed if name in pair]) for name in set().union(*of_seed)}
                 for of_seed in pairs.values()]
        cells = mean_cells(names, means, lambda values: deviation(values) / math.sqrt(len(values)))
        rows.append([*change, sum(map(len, pairs.values())), len(pairs), *cells])
    if rows:
        tables.append(markdown(["setting", "from", "to", "pairs", "seeds", *names], rows))
    return "\n\n".join(tables)


# The recorded quick start


# Settings that change no figure of a run, and the seed, which is compared apart.
CHANGES_NO_FIGURE = {"seed", "device", "num_workers", "log_every_steps", "checkpoint_every_steps", "eval_every_steps",
                     "max_bad_image_share", "max_skipped_steps", "eval.pictures"}
# What stands for 3 standard deviations, by the number of runs n that these are estimated from: the quantile of Student's
# t with n - 1 degrees of freedom that leaves as much outside, 0.27 %.
STUDENT = {3: 19.21, 4: 9.219, 5: 6.620, 6: 5.507, 7: 4.904, 8: 4.530, 9: 4.277, 10: 4.094}


def platform_of(config) -> dict:
    """What decides how a run rounds: where it is the same, the same command gives the same bits on the CPU."""
    device, processor = resolve_device(config), platform.processor()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:  # Linux
        processor = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), processor)
    return {
        "torch": str(torch.__version__), "machine": platform.machine(), "processor": processor,
        "capability": torch.backends.cpu.get_cpu_capability(),  # the instructions that kernels use
        "threads": torch.get_num_threads(), "processes": world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def differences(before: dict, now: dict, words=("recorded", "here")) -> list[str]:
    """What differs between two dicts, as "key: VALUE recorded, VALUE here", or in other words."""
    keys = [key for key in before | now if before.get(key) != now.get(key)]
    return [f"{key}: {before.get(key)} {words[0]}, {now.get(key)} {words[1]}" for key in keys]


def computed(run) -> dict:
    """The settings, flat, that decide the figures of a run of read_run, and its task and number of steps."""
    settings = {name: value for name, value in run["settings"].items() if name not in CHANGES_NO_FIGURE}
    return {"task": run["task"], "step": run["step"]} | settings


def record(folders, path=RECORD):
    """Write the figures of finished runs, which may differ in seed and platform, as those that check compares with."""
    runs = [read_run(file_of_run(folder, "metrics.json")) for folder in folders]
    for folder, run in zip(folders, runs):
        if other := differences(computed(runs[0]), computed(run)):
            raise data.InputError(f"{folder} is a run under other settings than {folders[0]}: {'; '.join(other[:4])}")
    kept = [{name: run.get(name, {}) for name in ("seed", "platform", "metrics")} for run in runs]
    content = json.dumps({"settings": computed(runs[0]), "runs": kept}, indent=1)
    data.write_atomically(path, content.encode())


def check(folder, path=RECORD) -> int:
    """Print how a finished run compares with the recorded ones; 0 where it agrees with them, 1 where it does not.

    On a recorded platform with a recorded seed every recorded figure must be equal. Elsewhere the figures of headline must lie
    within mean ± 3 standard deviations s of the n recorded runs, widened for so few: t s sqrt(1 + 1 / n), where t is
    STUDENT's. s is at least 0.1, one item of 1,000. Pointing varies so much with the seed that this alone asks nothing of it:
    where the recorded words look at their own box for more than twice its share of the image, words have to. [ours]
    InputError for a run under other settings.
    """
    run, recorded = read_run(file_of_run(folder, "metrics.json")), data.read_json(path)
    if other := differences(recorded["settings"], computed(run)):
        raise data.InputError(f"{folder} is a run under other settings than the recorded: {'; '.join(other[:4])}")
    runs = recorded["runs"]
    own = {"seed": run["seed"]} | run.get("platform", {})
    apart = [differences({"seed": known["seed"]} | known["platform"], own) for known in runs]
    nearest = min(range(len(runs)), key=lambda i: len(apart[i]))
    if not apart[nearest]:
        print("exact: platform and seed are recorded ones, so every figure must be equal")
        before, now = flatten(runs[nearest]["metrics"]), flatten(run["metrics"])
        figures = {name: now.get(name) for name in before}
        outside = differences(before, figures)
    elif len(runs) < 3:
        raise data.InputError(f"{path} has {len(runs)} runs, none of this platform and seed; a spread takes 3")
    else:
        print(f"within the spread of {len(runs)} runs, none of this platform and seed ({'; '.join(apart[nearest])})")
        rows, figures, outside = [headline(known["metrics"]) for known in runs], headline(run["metrics"]), []
        floor = 2 * runs[0]["metrics"].get("pointing", {}).get("area_own", 0)
        for name in (name for name in rows[0] if all(name in row for row in rows)):  # a ratio to none is absent
            values = [row[name] for row in rows]
            mean, spread = np.mean(values), max(np.std(values, ddof=1), 0.1)
            reach = STUDENT[min(len(runs), 10)] * spread * math.sqrt(1 + 1 / len(runs))
            low, high = mean - reach, mean + reach
            if name.endswith("_own") and min(values) > floor:
                low = max(low, floor)
            if not low <= figures.get(name, math.nan) <= high:
                outside.append(f"{name}: {low:.1f} to {high:.1f} expected, {figures.get(name)} here")
    print(*outside, f"{len(figures) - len(outside)} of {len(figures)} figures agree", sep="\n")
    return int(bool(outside))


# The command line


def describe(path, checkpoint):
    """Print a line that says what a checkpoint is; InputError where it is of another version."""
    missing = {"epoch", "commit"} - checkpoint.keys()
    if missing:
        raise data.InputError(f"{path} is no checkpoint of this version: it lacks {', '.join(sorted(missing))}")
    config, task = checkpoint["config"], checkpoint["task"]
    files = ", ".join(data.task_files(data.config_from_dict(config, path), task).train)
    if rank() == 0:
        print(
            f"{path}: {task}, step {checkpoint['step']}, epoch {checkpoint['epoch']:.1f}, "
            f"{config[task]['image_size'] or config['model']['image_size']} px, seed {config['seed']}, commit "
            f"{checkpoint['commit']}, trained on {files} of scale {config['scale']}",
            file=sys.stderr,
        )


def load_for(task, path, device):
    """softmask.load_trained's model, tokenizer and checkpoint; InputError where the model is of no use for the task.

    A task wants a model of its own; pretrain, retrieval and grounding, whose models have the same parts, any of the three.
    """
    path = softmask.checkpoint_path(path)
    model, tokenizer, checkpoint = softmask.load_trained(path, device)
    describe(path, checkpoint)
    if task != checkpoint["task"] and not (
        task in ("pretrain", "retrieval", "grounding") and isinstance(model, softmask.PretrainModel)
    ):
        wanted = f"{task} wants one of its own: python train.py {task}"
        if task in ("pretrain", "retrieval", "grounding"):
            wanted = "wanted is one of pretrain, retrieval or grounding"
        raise data.InputError(f"{path} is of task {checkpoint['task']}; {wanted}")
    return model, tokenizer, checkpoint


def as_trained(config, checkpoint, model, evaluated, overrides, path):
    """config, with what the checkpoint at path says of its model, how its own texts are cut, and the precision.

    evaluated: the task, of which max_tokens is config's, where it is another than the checkpoint's. overrides: of the
    command line; their precision goes before, and one that would change the rest is an InputError.
    """
    asked, known, task = data.config_to_dict(config), checkpoint["config"], checkpoint["task"]
    size = {"image_size": model.encoders.vision.grid * model.encoders.vision.patch_size}
    fixed = {name: known[name] for name in ("model", "method", task)}
    fixed["model"] = fixed["model"] | size
    fixed["data"] = asked["data"] | {"max_words": known["data"]["max_words"]}
    counting = [f"{part}.{name}" for part in ("model", "method") for name in fixed[part]]
    counting += [f"{task}.max_tokens", f"{task}.image_size", f"{evaluated}.image_size", "data.max_words", "data.tokenizer"]
    has = flatten(fixed | {name: fixed.get(name, {}) | size for name in (task, evaluated)})
    has, wanted, trained = has | {"data.tokenizer": known["data"]["tokenizer"]}, flatten(asked), flatten(known)
    for word in reversed(overrides):
        key, _, text = word.partition("=")
        for name in flatten({key: data.parse_yaml(text)}):
            if name in counting and wanted[name] not in (None, has[name], trained.get(name)):
                command = ["python", "train.py", evaluated, "--start", path, f"{evaluated}.epochs=0", word, "--out", "NEW"]
                raise data.InputError(f"{path} has {name} {has[name]}; under another evaluates {shlex.join(command)}")
    if not any(word.startswith("precision=") for word in overrides):
        fixed["precision"] = known["precision"]
    return data.config_from_dict(asked | fixed, path)


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage=__doc__.split("\n\n")[1])
    parser.add_argument("words", nargs="+", metavar="TASK|masks|table|curve|check key=value",
                        help="what to evaluate; settings to override")
    parser.add_argument("--scale", help="scale of config.yaml (default: scenes)")
    parser.add_argument("--checkpoint", help="folder or file (default: out/SCALE/TASK)")
    parser.add_argument("--image", help="masks: your own image")
    parser.add_argument("--text", help="masks: your own sentence")
    parser.add_argument("--split", choices=("val", "test"), help="split to evaluate on (default: test)")
    parser.add_argument("--out", help="masks: the PNG to write (default: beside the checkpoint IMAGE_masks.png, or "
                        "scenes_masks.png)")
    parser.add_argument("--record", action="store_true", help="check: write the figures of DIR... as the recorded ones")
    options = parser.parse_intermixed_args(arguments)
    overrides = [word for word in options.words if "=" in word]
    task, *rest = [word for word in options.words if "=" not in word] or [""]
    if task in ("table", "curve", "check"):
        rest = [word for word in options.words if "=" not in word or os.path.isdir(word)]
        rest.remove(task)
        unread = [word for word in overrides if not os.path.isdir(word)]
        unread += [f"--{name}" for name, value in vars(options).items()
                   if name != "words" and value and (name, task) != ("record", "check")]
        if unread:
            raise data.InputError(f"{task} takes folders of runs, not {', '.join(unread)}")
    if task == "table":
        print("\n\n".join(f"{name}\n\n{tabulate(runs)}" for name, runs in read_runs(rest or ["out"]).items()))
        return 0
    if task == "curve":
        return curve(rest or ["out/scenes/pretrain"])
    if task == "check":
        folders = rest or ["out/scenes/pretrain"]
        return record(folders) if options.record else max(check(folder) for folder in folders)
    tasks = [name for name in data.TASKS if name != "nlvr2_pretrain"] + ["masks"]
    if rest or task not in tasks:
        raise data.InputError(f"{' '.join([task, *rest])!r} is none of {', '.join([*tasks, 'table', 'curve', 'check'])}")
    if options.out is not None and task != "masks":
        raise data.InputError(f"--out is for masks; the figures of {task} are printed, its answers lie beside the checkpoint")
    if (options.image, options.text) != (None, None) and task != "masks":
        raise data.InputError(f"--image and --text are for masks; {task} is evaluated on the files of its scale")
    if options.split is not None and task == "masks":
        raise data.InputError("--split is for tasks, masks has none")
    if options.record:
        raise data.InputError("--record is for check")
    scale = options.scale or "scenes"
    config = data.load_config(scale, overrides)
    join_processes(config)
    path = options.checkpoint or os.path.join("out", scale, "pretrain" if task == "masks" else task)
    model, tokenizer, checkpoint = load_for("pretrain" if task == "masks" else task, path, resolve_device(config))
    if options.image is None:  # one's own needs no scenes
        if options.scale is None and checkpoint["config"]["scale"] != scale:
            wanted = f"--scale {checkpoint['config']['scale']}, of its training, or --scale {scale}"
            raise data.InputError(f"{path}: on the files of which scale? Give {wanted}")
        config = with_scenes(config)
    config = as_trained(config, checkpoint, model, checkpoint["task"] if task == "masks" else task, overrides, path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if task == "masks":
        name = f"{os.path.splitext(os.path.basename(options.image or 'scenes'))[0]}_masks.png"
        target = options.out or os.path.join(folder, name)
        if os.path.isdir(target) or not target.lower().endswith(".png"):
            raise data.InputError(f"masks: --out {target} must be the name of a .png file")
        if (options.image is None) != (options.text is None):
            raise data.InputError("masks: --image and --text go together; without both, scenes are drawn")
        if options.text is not None and not softmask.clean_caption(options.text, config.data.max_words):
            raise data.InputError(f"masks: --text {options.text!r} has no word")
        if options.image is not None:
            pairs = [(options.image, options.text)]
        elif config.data.grounding_boxes is None:
            raise data.InputError(f"masks: scale {scale} has no scenes; give --image and --text")
        else:
            root = os.path.dirname(config.data.grounding_boxes)
            rows = scene_rows(config, "grounding_boxes")[: config.eval.pictures]
            pairs = [(data.join_image_path(root, row["image"]), row["caption"]) for row in rows]
        if not pairs:
            raise data.InputError("masks: eval.pictures is 0, so nothing is to be drawn; give how many")
        max_tokens = checkpoint["config"][checkpoint["task"]]["max_tokens"]
        if rank() == 0:
            draw_masks(softmask.Pretrained(model, tokenizer, max_tokens, config.data.max_words), pairs, target)
            print(target)
        return
    split, other = ("val", "test") if options.split == "val" else ("test", "val")
    if lack := lacking(task, config, split):
        instead = f", or give --split {other}" * (not lacking(task, config, other))
        raise data.InputError(f"{lack}; name the file to evaluate on{instead}")
    if rank() == 0:
        print(f"evaluated on {getattr(evaluation_files(task, config), split)} of scale {scale}, {config.precision}",
              file=sys.stderr)
    if task == "pretrain":
        metrics = evaluate_pretrained(model, tokenizer, config, folder, split)
    else:
        metrics = evaluate(task, model, tokenizer, config, split, folder)
    if rank() == 0:
        print(format_metrics(metrics))


# how torch and CUDA say it; what oneDNN says has other causes, too
OUT_OF_MEMORY = ("out of (shared )?memory|allocate (shared )?memory|alloc_failed|bad_alloc|could not create a primitive"
                 r"|DataLoader worker .* killed by signal: (Bus error|Killed)")


@contextlib.contextmanager
def one_line_errors():
    """Turn a user's mistake, or a lack of memory, into one line on stderr and exit status 2; end the process group."""
    try:
        yield
    except (ValueError, OSError, MemoryError, RuntimeError) as error:  # InputError is a ValueError
        # an error from a loader worker carries that worker's traceback and its class in front of its own line
        lines = (str(error).strip() or type(error).__name__).splitlines()
        from_worker = "DataLoader worker" in lines[0]
        line = lines[-1].removeprefix("data.InputError: ") if from_worker else " ".join(lines)  # a path may have two
        if not isinstance(error, ValueError):
            lack = [text for text in lines if re.search(OUT_OF_MEMORY, text, re.IGNORECASE)]
            if lack or isinstance(error, MemoryError):
                line = f"out of memory ({(lack or lines)[-1][:200]}); lower batch_size, and raise accumulation instead, or "
                line += "set checkpointing=true; in evaluation lower eval.batch_size"
                if "worker" in line or "shared memory" in line:
                    line += "; of a loader worker: lower num_workers, or in Docker raise --shm-size"
            elif "InvalidCxxCompiler" in str(error):
                line = "compile=true needs a C++ compiler; install one, or give compile=false"
            elif isinstance(error, RuntimeError):
                raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    finally:
        leave_processes(sys.exc_info()[1])


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(sys.argv[1:]))
