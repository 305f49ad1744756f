"""Does the soft mask hide the evidence of a match? Losses of true and of false pairs under masks of several origins.

    python tests/mask_study.py out/scenes/pretrain [another folder] ...

Of the first 1,000 test images and captions of what the model was trained on, clean and undistorted, in batches of 100: a
word of each caption at random, its soft mask, a hard negative text of each image from its batch, all as in training.
Prints a Markdown table, of each kind of pair the match loss, which is that of a fair coin at 0.69, and the share that is
told rightly, in percent. The masks: that of the word; that of the pair before in the batch; everywhere its mean.
Where a word's own mask costs no more than another's, it hides nothing that mattered; where any mask makes matches of false
pairs, the model has learned to look for the mask.

A second table, of the scenes, has the foils of these images that change a word of an object, told apart in percent: in the
image as it is, and with the other object painted over in the colour of the ground, so that all that the caption says of
that is missing. Is a model that has met masks better at going by what is left?

The shares that are told rightly, and those of the foils alone, go into the metrics.json beside the checkpoint too, so that
`python eval.py table` has their means over seeds and what each setting does to them. train.py, called again there, writes
that file anew, without them.
"""

import argparse
import functools
import json
import os
import sys
import tempfile

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
import eval as evaluation
import softmask

KINDS = ("true", "true, its mask", "true, another's mask", "true, flat mask", "false", "false, the image's mask")


@functools.lru_cache(1)  # both tables are of the same
def load(folder, batch_size):
    """Model, tokenize, config and test files of a pre-training checkpoint."""
    model, tokenizer, checkpoint = evaluation.load_for("pretrain", folder, "cpu")
    settings = checkpoint["config"] | {"eval": checkpoint["config"]["eval"] | {"batch_size": batch_size}}
    config = data.resolve_scenes(data.config_from_dict(settings, folder))
    tokenize = functools.partial(softmask.tokenize, tokenizer, max_tokens=config.pretrain.max_tokens)
    return model.eval(), tokenize, config, config.data.retrieval_sets[config.data.retrieval]


def study(folder, count=1000, batch_size=100):
    """{kind: (loss, share told rightly, %)} of a pre-training checkpoint."""
    model, tokenize, config, files = load(folder, batch_size)
    rows = [row | {"caption": row["caption"][0]} for row in data.read_json(files.test)[:count]]
    encoders, generator = model.encoders, torch.Generator().manual_seed(0)
    logits = {kind: [] for kind in KINDS}
    for _, images, (tokens,) in evaluation.pair_batches(rows, files.image_root, tokenize, config, "cpu", ["caption"]):
        cam = evaluation.token_attention(model, images, tokens, config)
        nothing = torch.zeros_like(tokens["word_ids"], dtype=torch.bool)
        mask = softmask.soft_mask(cam, softmask.pick_word(tokens["word_ids"], nothing, generator))  # (B, N)
        with torch.no_grad():
            image_embeds = encoders.encode_image(images)
            text_embeds = encoders.encode_text(tokens["input_ids"], tokens["attention_mask"])
            sim = encoders.image_feat(image_embeds) @ encoders.text_feat(text_embeds).T / model.temp
            own = torch.arange(len(images))
            false, _ = softmask.hard_negatives(sim, own[:, None] != own[None], generator)
            keys_values = encoders.image_keys_values(image_embeds)

            def add(kind, texts, mask=None):
                read = keys_values if mask is None else encoders.fusion.soft_mask_keys_values(keys_values, mask)
                fused, _ = encoders.fuse(text_embeds[texts], tokens["attention_mask"][texts], read, cls_only=True)
                logits[kind].append(model.itm_head(fused[:, 0]).float())

            add("true", own)
            add("true, its mask", own, mask)
            add("true, another's mask", own, mask.roll(1, 0))
            add("true, flat mask", own, mask.mean(1, keepdim=True).expand_as(mask))
            add("false", false)
            add("false, the image's mask", false, mask)
    result = {}
    for kind, parts in logits.items():
        scores = torch.cat(parts)
        labels = torch.full((len(scores),), int(kind.startswith("true")))
        right = 100 * (scores.argmax(1) == labels).float().mean().item()
        result[kind] = softmask.itm_loss(scores, labels).item(), right
    return result


def other_boxes(foil, scene):
    """Boxes (x, y, width, height) of the objects that a foil says nothing false of; scene: its row of boxes_test.json."""
    changed = [i for i, words in enumerate(zip(foil["caption"].split(), foil["foil"].split())) if len(set(words)) > 1]
    return [item["box"] for item in scene["objects"] if not set(changed) & set(item["attribute_indices"].values())]


def paint_over(image, boxes):
    """An image (h, w, 3) uint8 with boxes filled in its median colour, that of the ground."""
    image, ground = image.copy(), np.median(image, axis=(0, 1))
    for x, y, width, height in boxes:
        image[y : y + height, x : x + width] = ground
    return image


def foils_alone(folder, count=1000):
    """{kind: (told apart, told apart with the other object painted over), %} of a pre-training checkpoint; {} where there are no foils."""
    model, tokenize, config, files = load(folder, 100)
    if config.data.foils is None or config.data.grounding_boxes is None:
        return {}
    scenes = {row["image"]: row for row in evaluation.scene_rows(config, "grounding_boxes")[:count]}
    rows = [row for row in evaluation.scene_rows(config, "foils") if row["image"] in scenes and row["kind"] != "relation"]
    whole = evaluation.foil_metrics(model, tokenize, rows, files.image_root, config)
    with tempfile.TemporaryDirectory() as painted:
        for i, row in enumerate(rows):
            image = np.asarray(data.read_image(data.join_image_path(files.image_root, row["image"])))
            image = paint_over(image, other_boxes(row, scenes[row["image"]]))
            rows[i] = row | {"image": f"{i}.png"}
            Image.fromarray(image).save(os.path.join(painted, rows[i]["image"]))
        alone = evaluation.foil_metrics(model, tokenize, rows, painted, config)
    return {kind: (whole[kind]["accuracy"], alone[kind]["accuracy"]) for kind in whole}


def add_to_metrics(folder, masks, foils):
    """Put the shares of study and foils_alone into the metrics.json of a run, where there is one, as figures of their own."""
    path = os.path.join(folder, "metrics.json")
    if os.path.exists(path):
        run = data.read_json(path)
        run["metrics"] |= {f"told: {kind}": share for kind, (_, share) in masks.items()}
        run["metrics"] |= {f"foils alone: {kind}": share for kind, (_, share) in foils.items()}
        data.write_atomically(path, json.dumps(run, indent=1).encode())


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", default=["out/scenes/pretrain"], help="output folders of pre-training")
    folders, lines, tables = parser.parse_args(arguments).folders, [], {}
    for folder in folders:
        softmask.checkpoint_path(folder)  # before the minutes that the others take
    for folder in folders:
        name, masks, foils = os.path.basename(os.path.normpath(folder)), study(folder), foils_alone(folder)
        lines.append([name] + [f"{loss:.3f}; {right:.1f}" for loss, right in masks.values()])
        if foils:
            header = "run", *(kind + end for kind in foils for end in ("", ", alone"))
            tables.setdefault(header, []).append([name] + [f"{share:.1f}" for shares in foils.values() for share in shares])
        add_to_metrics(folder, masks, foils)
    print(evaluation.markdown(["run", *KINDS], lines))
    for header, rows in tables.items():
        print("\n" + evaluation.markdown(list(header), rows))


if __name__ == "__main__":
    with evaluation.one_line_errors():
        main(sys.argv[1:])
