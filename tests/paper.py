"""Files for runs at the paper's scale: weights under the names and with the shapes of those that users have."""
import json
import os
import pickle
import re
import subprocess
import sys
import time

import torch
from PIL import Image
from safetensors.torch import save_file

import data
import softmask


def normal(*shape):
    return torch.empty(shape).normal_(std=0.02)


def affine(name, out_features, in_features=None):
    """Weight and bias; without in_features those of a norm."""
    weight = torch.ones(out_features) if in_features is None else normal(out_features, in_features)
    return {f"{name}.weight": weight, f"{name}.bias": torch.zeros(out_features)}


def deit_state(patches):
    """Names and shapes of DeiT-B/16 (and of ALBEF's visual encoder)."""
    state = {"cls_token": normal(1, 1, 768), "pos_embed": normal(1, 1 + patches, 768)}
    state |= {"patch_embed.proj.weight": normal(768, 3, 16, 16), "patch_embed.proj.bias": torch.zeros(768)}
    for i in range(12):
        block = f"blocks.{i}."
        state |= affine(block + "norm1", 768) | affine(block + "norm2", 768)
        state |= affine(block + "attn.qkv", 2304, 768) | affine(block + "attn.proj", 768, 768)
        state |= affine(block + "mlp.fc1", 3072, 768) | affine(block + "mlp.fc2", 768, 3072)
    return state | affine("norm", 768)


def bert_state(cross_from=12):
    """Names and shapes of bert-base-uncased with its MLM head, and with cross-attention from a layer on."""
    state = {f"bert.embeddings.{name}_embeddings.weight": normal(rows, 768)
             for name, rows in (("word", 30522), ("position", 512), ("token_type", 2))}
    state |= affine("bert.embeddings.LayerNorm", 768)
    for i in range(12):
        layer = f"bert.encoder.layer.{i}."
        for attention in ("attention", "crossattention")[: 1 + (i >= cross_from)]:
            for part in ("self.query", "self.key", "self.value", "output.dense"):
                state |= affine(f"{layer}{attention}.{part}", 768, 768)
            state |= affine(f"{layer}{attention}.output.LayerNorm", 768)
        state |= affine(layer + "intermediate.dense", 3072, 768) | affine(layer + "output.dense", 768, 3072)
        state |= affine(layer + "output.LayerNorm", 768)
    state |= affine("cls.predictions.transform.dense", 768, 768) | affine("cls.predictions.transform.LayerNorm", 768)
    return state | {"cls.predictions.bias": torch.zeros(30522)}


def albef_state():
    """Names and shapes of ALBEF.pth: the model, its momentum twin, queues."""
    bert = bert_state(cross_from=6)
    bert |= {"cls.predictions.decoder.weight": bert["bert.embeddings.word_embeddings.weight"],
             "cls.predictions.decoder.bias": torch.zeros(30522),
             "bert.embeddings.position_ids": torch.arange(512)[None]}
    state = {"temp": torch.tensor(0.07), "image_queue": normal(256, 65536), "text_queue": normal(256, 65536),
             "queue_ptr": torch.zeros(1, dtype=torch.int64)} | affine("itm_head", 2, 768)
    for twin in ("", "_m"):
        state |= {f"visual_encoder{twin}.{name}": value for name, value in deit_state(256).items()}
        state |= {f"text_encoder{twin}.{name}": value for name, value in bert.items()}
        state |= affine(f"vision_proj{twin}", 256, 768) | affine(f"text_proj{twin}", 256, 768)
    return state


def write_files(folder):
    """Generate four images, a vocabulary of BERT's size, the weights of DeiT and BERT, and the files of every task.

    Returns the settings that name them.
    """
    captions = ["A man rides a horse.", ["Two dogs on a red sofa", "dogs"], "an old street, at night", ["sea / sky"]]
    for number, size in enumerate([(64, 48), (40, 70), (30, 30), (300, 200)]):
        Image.effect_noise(size, 80).convert("RGB").save(folder / f"{number}.jpg")
    rows = [{"image": f"{number}.jpg", "caption": caption} for number, caption in enumerate(captions)]
    (folder / "pretrain.json").write_text(json.dumps(rows))
    texts = [[caption] if isinstance(caption, str) else caption for caption in captions]
    eval_rows = [row | {"caption": row_texts} for row, row_texts in zip(rows, texts)]
    (folder / "test.json").write_text(json.dumps(eval_rows))
    rows = [row | {"image_id": number} for number, row in enumerate(rows)]
    (folder / "retrieval.json").write_text(json.dumps(rows))
    others = "how many dogs are there what is on the sofa two pair both images show outside left"
    words = sorted(set(softmask.clean_caption(" ".join([*sum(texts, []), others]), 100).split()))
    words += [piece + str(digit) for piece in ("", "##") for digit in range(10)]
    vocabulary = [f"[unused{number}]" for number in range(30522)]
    for position, entry in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}.items():
        vocabulary[position] = entry
    vocabulary[2000 : 2000 + len(words)] = words
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    torch.save({"model": deit_state(196) | affine("head", 1000, 768)}, folder / "deit.pth")
    bert = bert_state() | affine("bert.pooler.dense", 768, 768) | affine("cls.seq_relationship", 2, 768)
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    save_file({re.sub("|".join(names), lambda old: names[old[0]], key): value for key, value in bert.items()},
              folder / "bert.safetensors")
    settings = [
        f"data.pretrain_files=[{folder / 'pretrain.json'}]", f"data.pretrain_image_root={folder}",
        f"data.tokenizer={folder / 'vocab.txt'}", "num_workers=1", "log_every_steps=1",
        f"model.vision_weights={folder / 'deit.pth'}", f"model.text_weights={folder / 'bert.safetensors'}",
        "pretrain.batch_size=2", "pretrain.epochs=1", "precision=float32", "device=cpu",  # many CPUs make bf16 slowly
    ]
    return settings + write_tasks(folder)


def write_tasks(folder):
    """Write four records a task in ALBEF's formats, on images 0.jpg to 3.jpg; returns the settings that name them."""
    ten = ["two"] * 3 + ["2"] * 3 + ["a pair", "pair", "dogs", "red sofa"]
    vqa = [{"question_id": number, "question": "How many dogs are there?", "answer": ten, "image": f"{number}.jpg",
            "dataset": "vqa"} for number in range(2)]
    vg = [{"question": "What is on the sofa?", "answer": "a dog", "image": f"{number}.jpg", "dataset": "vg"}
          for number in (2, 3)]
    nlvr2 = [{"images": [f"{number}.jpg", f"{3 - number}.jpg"], "sentence": "Both images show dogs.", "label": label}
             for number, label in enumerate(["True", "False", True, False])]
    entailment = [{"image": f"{number}", "sentence": "A man is outside.", "label": label} for number, label in
                  enumerate(["entailment", "neutral", "contradiction", "neutral"])]
    grounding = [{"image": f"{number}.jpg", "text": "man on the left", "ref_id": 10 + number} for number in range(4)]
    box = [5.5, 3.25, 20.0, 15.5]
    refs = [{"ref_id": 10 + number, "ann_id": 20 + number, "image_id": number, "split": ("testA", "testB")[number % 2],
             "sentences": [{"raw": "man on the left", "sent_id": number}]} for number in range(4)]
    instances = {"images": [{"id": number, "height": 48, "width": 64} for number in range(4)],
                 "annotations": [{"id": 20 + number, "bbox": box} for number in range(4)]}
    content = {
        "vqa": vqa, "vg": vg,
        "vqa_test": [{"question_id": 9, "question": "Two dogs?", "image": "0.jpg", "dataset": "vqa"}, *vqa],
        "answer_list": [*dict.fromkeys(ten), *map(str, range(3, 130))],  # more than are ranked in full
        "nlvr2": nlvr2, "entailment": entailment, "grounding": grounding, "instances": instances,
        "dets": {str(number): [[*box, 0.9], [30, 20, 12.5, 8]] for number in range(4)},
    }
    for name, rows in content.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "refs.p").write_bytes(pickle.dumps(refs, protocol=2))

    def files(name, **others):
        named = {"image_root": folder, "train": f"[{folder / f'{name}.json'}]", "val": "null",
                 "test": folder / f"{name}.json"} | others
        return "{" + ", ".join(f"{key}: {value}" for key, value in named.items()) + "}"

    return [
        f"data.retrieval_sets.coco={files('retrieval', test=folder / 'test.json')}",
        "data.vqa=" + files("vqa", train=f"[{folder / 'vqa.json'}, {folder / 'vg.json'}]", vg_image_root=folder,
                            test=folder / "vqa_test.json", answers=folder / "answer_list.json"),
        f"data.nlvr2={files('nlvr2', val=folder / 'nlvr2.json')}",
        f"data.entailment={files('entailment', val=folder / 'entailment.json')}",
        "data.grounding=" + files("grounding", dets=folder / "dets.json", refs=folder / "refs.p",
                                  instances=folder / "instances.json"),
    ]


def run(folder, program, *arguments):
    """Run a program in a process of its own, as users do; returns what it printed. Prints its time and memory."""
    out, err, start = folder / "stdout.txt", folder / "stderr.txt", time.monotonic()
    with open(out, "w") as out_file, open(err, "w") as err_file:
        command = [sys.executable, program, *arguments]
        process = subprocess.Popen(command, cwd=data.HERE, stdout=out_file, stderr=err_file)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, err.read_text()
    print(out.read_text(), f"{time.monotonic() - start:.0f} s, at most {usage.ru_maxrss / 2**20:.1f} GB")
    return out.read_text()
