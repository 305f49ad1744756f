"""softmask.py against other implementations, naive loops in double precision, and hand-computed cases."""

import ast
import collections
import copy
import io
import math
import os
import random
import re
import struct
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer, ViTConfig, ViTModel

import softmask

CLS, MASK, VOCAB_SIZE = 2, 4, 30  # ids 0 to 4 are special
SIZES = dict(
    vocab_size=VOCAB_SIZE,
    image_size=12,
    patch_size=4,
    vision_width=16,
    vision_layers=2,
    vision_heads=2,
    text_width=24,
    text_layers=2,
    fusion_layers=3,
    text_heads=3,
    max_positions=12,
    embed_dim=8,
    dropout=0.0,
)
METHOD = dict(
    queue_size=5,
    momentum=0.9,
    temp=0.2,
    soft_mask=True,
    soft_mask_negatives=True,
    attention_layer=None,
    focal_gamma=2.0,
    mask_text_for="all",
)
VOCABULARY = "[PAD] [UNK] [CLS] [SEP] [MASK] a red dog cat ##s on left of the sofa".split()


def read_state(path):
    """The tensors of a file."""
    return softmask.state_of(softmask.read_dict(path), path)


# Builders


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=seeded(seed))


@torch.no_grad()
def randomise(module, seed=0):
    """Every parameter random: biases, norms and heads too, whose usual start hides mistakes. Returns module in eval."""
    generator = seeded(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim:
            is_norm = "norm" in name.lower() and name.endswith("weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + is_norm)
    return module.eval()


def make_encoders(seed=0, **changes):
    return randomise(softmask.Encoders(**(SIZES | changes)), seed)


def make_model(seed=0, sizes=None, **changes):
    """A pre-training model whose twin differs from the student, with images 7 and 50 to 53 in the queue."""
    model = softmask.PretrainModel(softmask.Encoders(**(SIZES | (sizes or {}))), **(METHOD | changes))
    randomise(model, seed)
    model.image_queue.copy_(F.normalize(randn(*model.image_queue.shape, seed=3), dim=1))
    model.text_queue.copy_(F.normalize(randn(*model.text_queue.shape, seed=4), dim=1))
    known = torch.tensor([50, 7, 51, 52, 53])[: len(model.queue_ids)]
    model.queue_ids[: len(known)] = known
    model.queue_written.fill_(len(model.image_queue))
    return model


def make_batch(image_ids=True):
    """Four pairs: in caption 0 a piece of word 0 is [MASK], in 1 a word is another, in 3 the only word is kept."""
    word_ids = torch.tensor([
        [-1, 0, 0, 1, 2, 3],
        [-1, 0, 1, 1, 2, -1],
        [-1, 0, 1, 2, -1, -1],
        [-1, 0, -1, -1, -1, -1],
    ])
    attention_mask = (word_ids >= 0).long()
    attention_mask[:, 0] = 1
    input_ids = torch.randint(5, VOCAB_SIZE, word_ids.shape, generator=seeded(1)) * attention_mask
    input_ids[:, 0] = CLS
    masked_ids, mlm_labels = input_ids.clone(), torch.full_like(input_ids, -100)
    for row, column, new in ((0, 2, MASK), (1, 4, 5 + (int(input_ids[1, 4]) - 4) % 25), (3, 1, int(input_ids[3, 1]))):
        masked_ids[row, column] = new
        mlm_labels[row, column] = input_ids[row, column]
    return {
        "image": randn(4, 3, 12, 12, seed=2),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "masked_ids": masked_ids,
        "mlm_labels": mlm_labels,
        "word_ids": word_ids,
        "image_ids": torch.tensor([7, 8, 7, 9]) if image_ids else None,
        "alpha": 0.4,
    }


def assert_near(ours, expected, tolerance=1e-5):
    """max|a - b| <= tolerance * max|b|"""
    assert ours.shape == expected.shape
    error, scale = (ours.double() - expected.double()).abs().max(), expected.double().abs().max()
    assert error <= tolerance * scale, f"off by {error:.3g}, largest value {scale:.3g}"


# Oracles: one text, one image, one head at a time


def naive_attention(attention, x, context, keep=None, delta=None):
    """Output (L, D) and probabilities (H, L, M) of x (L, D) over context (M, C); delta is added to the latter."""
    width = len(attention.query.weight) // attention.num_heads
    outputs, all_probs = [], []
    for head in range(attention.num_heads):
        rows = slice(head * width, (head + 1) * width)
        query, key, value = (
            source @ layer.weight[rows].T + layer.bias[rows]
            for source, layer in ((x, attention.query), (context, attention.key), (context, attention.value))
        )
        scores = (query @ key.T / math.sqrt(width)).exp()
        if keep is not None:
            scores = scores * keep
        probs = scores / scores.sum(1, keepdim=True)
        if delta is not None:
            probs = probs + delta[head]
        outputs.append(probs @ value)
        all_probs.append(probs)
    return torch.cat(outputs, 1) @ attention.out.weight.T + attention.out.bias, torch.stack(all_probs)


def naive_norm(norm, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def naive_mlp(mlp, x):
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    return hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2 @ mlp.fc2.weight.T + mlp.fc2.bias


def naive_fuse(fusion, text, image, keep=None, attention_layer=None, delta=None):
    """Fused states (L, D) of text (L, D) and image (M, C), and attention_layer's probabilities plus delta."""
    attention = None
    for i, layer in enumerate(fusion.layers):
        text = naive_norm(layer.self_norm, text + naive_attention(layer.self_attention, text, text, keep)[0])
        out, probs = naive_attention(layer.cross_attention, text, image, None, delta if i == attention_layer else None)
        attention = probs if i == attention_layer else attention
        text = naive_norm(layer.cross_norm, text + out)
        text = naive_norm(layer.mlp_norm, text + naive_mlp(layer.mlp, text))
    return text, attention


def naive_cam(model, text, image, layer):
    """G (L, N) of one pair, by the gradient with respect to an addition to the attention; model in double."""
    heads, length = model.encoders.fusion.layers[0].cross_attention.num_heads, len(text)
    delta = torch.zeros(heads, length, len(image), dtype=torch.float64, requires_grad=True)
    fused, attention = naive_fuse(model.encoders.fusion, text, image, None, layer, delta)
    (gradient,) = torch.autograd.grad(model.itm_head(fused[0])[1], delta)
    return sum(attention[h].detach() * gradient[h].clamp_min(0) for h in range(heads))[:, 1:] / heads


def naive_soft_mask(cam, picked):
    """m (N,) of G (L, N) and the list of the word's tokens."""
    if not picked:
        return torch.zeros(cam.shape[1], dtype=cam.dtype)
    values = sum(cam[i] for i in picked) / len(picked)
    return (values - values.min()) / (values.max() - values.min())


def naive_itc(feats, feats_m, queues, temp, alpha, gamma, positives):
    """ITC of (image, text) pairs of features, row by row and column by column."""
    size, total = len(feats[0]), 0.0
    for here, there in ((0, 1), (1, 0)):
        others = torch.cat([feats_m[there], queues[there]])
        for i in range(size):
            p = torch.stack([(feats[here][i] * other).sum() / temp for other in others]).exp()
            p = p / p.sum()
            p_m = torch.stack([(feats_m[here][i] * other).sum() / temp.detach() for other in others]).exp()
            p_m = (p_m / p_m.sum()).detach()
            count = sum(positives[i].tolist())
            for j in range(len(others)):
                q = alpha * p_m[j] + (1 - alpha) * (1 / count if positives[i, j] else 0.0)
                total = total - q * (1 - p[j]) ** gamma * p[j].log()
    return total / (2 * size)


def naive_losses(model, batch, negatives, picked):
    """PretrainModel.forward in double, pair by pair, without padding, soft masks on the image states themselves.

    negatives: index and valid of the negative images, then of the negative texts. Also returns the double model.
    """
    model = copy.deepcopy(model).double()
    (negative_image, image_valid), (negative_text, text_valid) = negatives
    student, twin, size = model.encoders, model.encoders_m, len(batch["image"])
    lengths = batch["attention_mask"].sum(1).tolist()

    clean_teacher = "clean_image" in batch

    def encode(encoders, ids):
        images = encoders.encode_image(batch["clean_image" if clean_teacher and encoders is twin else "image"].double())
        texts = [encoders.encode_text(ids[i : i + 1, :n], torch.ones(1, n))[0] for i, n in enumerate(lengths)]
        return images, texts

    def features(encoders, images, texts):
        image_feat = F.normalize(encoders.image_proj(images[:, 0]), dim=1)
        return image_feat, F.normalize(encoders.text_proj(torch.stack([text[0] for text in texts])), dim=1)

    ids = batch["masked_ids"] if model.mask_text_for == "all" else batch["input_ids"]
    images, texts = encode(student, ids)
    images_m, texts_m = encode(twin, batch["input_ids"] if clean_teacher else ids)
    positives = torch.eye(size, size + len(model.image_queue)).bool()
    if batch["image_ids"] is not None:
        known = batch["image_ids"].tolist() + model.queue_ids.tolist()
        positives = torch.tensor([[known[i] == known[j] for j in range(len(known))] for i in range(size)])
    losses = {
        "itc": naive_itc(
            features(student, images, texts),
            features(twin, images_m, texts_m),
            (model.image_queue, model.text_queue),
            model.temp,
            batch["alpha"],
            model.focal_gamma,
            positives,
        )
    }

    def match_loss(pairs):
        """pairs of text number, image states, label"""
        terms = [
            -model.itm_head(naive_fuse(student.fusion, texts[i], image)[0][0]).log_softmax(0)[label]
            for i, image, label in pairs
        ]
        return sum(terms) / len(terms)

    plain = [(i, images[i], 1) for i in range(size)]
    plain += [(i, images[negative_image[i]], 0) for i in range(size) if image_valid[i]]
    plain += [(int(negative_text[i]), images[i], 0) for i in range(size) if text_valid[i]]
    losses["itm"] = match_loss(plain)

    words = [picked[i].nonzero().flatten().tolist() for i in range(size)]
    masks = [
        naive_soft_mask(naive_cam(model, texts[i], images[i], model.attention_layer), words[i]) for i in range(size)
    ]
    soft_images = [torch.cat([images[i, :1], (1 - masks[i])[:, None] * images[i, 1:]]) for i in range(size)]
    soft = [(i, soft_images[i], 1) for i in range(size) if words[i]]
    if model.soft_mask_negatives:
        soft += [(int(negative_text[i]), soft_images[i], 0) for i in range(size) if words[i] and text_valid[i]]
        soft += [
            (i, soft_images[negative_image[i]], 0)
            for i in range(size)
            if image_valid[i] and words[int(negative_image[i])]
        ]
    losses["soft_itm"] = match_loss(soft)

    logits = []
    for encoders in (student, twin):
        images, texts = encode(encoders, batch["masked_ids"])
        fused = [naive_fuse(encoders.fusion, text, image)[0] for text, image in zip(texts, images)]
        chosen = [fused[i][j] for i, j in (batch["mlm_labels"] != -100).nonzero().tolist()]
        logits.append([encoders.mlm_logits(state) for state in chosen])
    terms = []
    for ours, teacher, label in zip(*logits, batch["mlm_labels"][batch["mlm_labels"] != -100]):
        target = batch["alpha"] * teacher.softmax(0).detach()
        target[label] += 1 - batch["alpha"]
        terms.append(-(target * ours.log_softmax(0)).sum())
    losses["mlm"] = sum(terms) / len(terms)
    return losses, torch.stack(masks), model


# Weights of BERT, DeiT and ALBEF


def bert_config(**changes):
    return BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        num_hidden_layers=5,
        num_attention_heads=3,
        intermediate_size=96,
        max_position_embeddings=12,
        **changes,
    )


def deit_from_transformers(state):
    """A ViTModel's safetensors names -> DeiT's, query, key and value fused."""
    deit = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": state["layernorm.weight"],
        "norm.bias": state["layernorm.bias"],
    }
    names = {
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    layers = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.layer."))
    for i in range(layers):
        for kind in ("weight", "bias"):
            for theirs, name in names.items():
                deit[f"blocks.{i}.{name}.{kind}"] = state[f"encoder.layer.{i}.{theirs}.{kind}"]
            parts = [state[f"encoder.layer.{i}.attention.attention.{x}.{kind}"] for x in ("query", "key", "value")]
            deit[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    return deit


def random_deit(grid=3, seed=0):
    """A random state with DeiT's names and shapes, its classifier included."""
    shapes = {
        "cls_token": (1, 1, 16),
        "pos_embed": (1, 1 + grid**2, 16),
        "patch_embed.proj.weight": (16, 3, 4, 4),
        "patch_embed.proj.bias": (16,),
        "norm.weight": (16,),
        "norm.bias": (16,),
        "head.weight": (10, 16),
        "head.bias": (10,),
    }
    for i in range(2):
        linear = {"attn.qkv": (48, 16), "attn.proj": (16, 16), "mlp.fc1": (64, 16), "mlp.fc2": (16, 64)}
        for name, shape in linear.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (16,), f"blocks.{i}.{name}.bias": (16,)}
    return {key: randn(*shape, seed=seed + n) for n, (key, shape) in enumerate(shapes.items())}


def random_albef(grid=3, twin=True):
    """A random state with the names of ALBEF's pre-training checkpoint; queues, constants and poolers included."""
    bert = randomise(BertForMaskedLM(bert_config())).state_dict()
    state = {"temp": torch.tensor(0.05), "itm_head.weight": randn(2, 24), "itm_head.bias": randn(2)}
    state |= {"image_queue": randn(8, 6), "text_queue": randn(8, 6), "queue_ptr": torch.zeros(1, dtype=torch.int64)}
    for n, mark in enumerate(("", "_m") if twin else ("",)):
        own = {f"visual_encoder{mark}.{key}": value for key, value in random_deit(grid).items()}
        own |= {f"text_encoder{mark}.{key}": value for key, value in bert.items() if "decoder" not in key}
        for i in (2, 3, 4):
            layer = f"text_encoder{mark}.bert.encoder.layer.{i}.crossattention."
            for name, columns in (("self.query", 24), ("self.key", 16), ("self.value", 16), ("output.dense", 24)):
                own |= {f"{layer}{name}.weight": randn(24, columns, seed=i), f"{layer}{name}.bias": randn(24, seed=i)}
            own |= {f"{layer}output.LayerNorm.{kind}": randn(24, seed=i) for kind in ("weight", "bias")}
        own[f"text_encoder{mark}.bert.embeddings.position_ids"] = torch.arange(12)[None]
        own[f"text_encoder{mark}.cls.predictions.decoder.weight"] = bert["bert.embeddings.word_embeddings.weight"]
        own |= {f"vision_proj{mark}.weight": randn(8, 16), f"vision_proj{mark}.bias": randn(8)}
        own |= {f"text_proj{mark}.weight": randn(8, 24), f"text_proj{mark}.bias": randn(8)}
        state |= {key: value + n if value.is_floating_point() else value for key, value in own.items()}
    return state


@pytest.fixture(scope="module")
def saved_bert(tmp_path_factory):
    """A random BertForMaskedLM, the state saved by its save_pretrained as state_of reads it, and a padded text."""
    folder = tmp_path_factory.mktemp("bert")
    bert = randomise(BertForMaskedLM(bert_config()))
    bert.save_pretrained(folder)
    batch = make_batch()
    return bert, read_state(folder / "model.safetensors"), batch["input_ids"], batch["attention_mask"]


def load_bert_layers(encoders, text_embeds, mask):
    """The fusion layers on text alone: what BERT's upper layers do."""
    for layer in encoders.fusion.layers:
        text_embeds, _ = layer(text_embeds, mask[:, None, None, :].bool())
    return text_embeds


@torch.no_grad()
@pytest.mark.parametrize("names", ["as saved", "without bert.", "gamma and beta"])
def test_text_encoder_and_mlm_head_equal_transformers(saved_bert, names):
    bert, state, ids, mask = saved_bert
    if names == "without bert.":
        state = {key.removeprefix("bert."): value for key, value in state.items()}
    if names == "gamma and beta":
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        for new_end, old_end in old.items():
            state = {key.replace(new_end, old_end): value for key, value in state.items()}
        assert any(key.endswith("gamma") for key in state)
    encoders = make_encoders(seed=5)
    fresh = softmask.load_bert(encoders, state)
    assert fresh and all(key.startswith(("image_proj", "text_proj", "fusion")) for key in fresh)  # no word of the ViT's
    theirs = bert(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    kept = mask.bool()
    text_embeds = encoders.encode_text(ids, mask)
    assert (text_embeds - theirs.hidden_states[2])[kept].abs().max() <= 1e-5
    last = load_bert_layers(encoders, text_embeds, mask)
    assert (last - theirs.hidden_states[-1])[kept].abs().max() <= 1e-5
    assert (encoders.mlm_logits(last) - theirs.logits)[kept].abs().max() <= 2e-5


@torch.no_grad()
def test_bert_model_without_mlm_head(tmp_path):
    bert = randomise(BertModel(bert_config()))
    bert.save_pretrained(tmp_path)
    encoders = make_encoders(seed=5)
    head = encoders.mlm_head.dense.weight.clone()
    fresh = softmask.load_bert(encoders, read_state(tmp_path / "model.safetensors"))
    assert "mlm_head.dense.weight" in fresh and torch.equal(encoders.mlm_head.dense.weight, head)
    batch = make_batch()
    theirs = bert(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    kept = batch["attention_mask"].bool()
    ours = encoders.encode_text(batch["input_ids"], batch["attention_mask"])
    assert (ours - theirs.hidden_states[2])[kept].abs().max() <= 1e-5


@torch.no_grad()
def test_fusion_layers_equal_transformers(tmp_path):
    """Cross-attention layers of a BERT decoder, whose image states are as wide as the text's."""
    bert = randomise(BertModel(bert_config(is_decoder=True, add_cross_attention=True)))
    bert.save_pretrained(tmp_path)
    state = read_state(tmp_path / "model.safetensors")
    lower = ("encoder.layer.0.crossattention.", "encoder.layer.1.crossattention.")
    encoders = make_encoders(seed=5, vision_width=24)
    softmask.load_bert(encoders, {key: value for key, value in state.items() if not key.startswith(lower)})
    mask = make_batch()["attention_mask"]
    text_embeds, image_embeds = randn(4, 6, 24), randn(4, 10, 24, seed=1)
    ours, _ = encoders.fuse(text_embeds, mask, encoders.image_keys_values(image_embeds))
    hidden = text_embeds
    for layer in bert.encoder.layer[2:]:
        additive = torch.where(mask.bool(), 0.0, -1e9)[:, None, None].expand(-1, 1, 6, -1)
        hidden = layer(hidden, attention_mask=additive, encoder_hidden_states=image_embeds)
    assert (ours - hidden)[mask.bool()].abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("wrap", ["plain", "model", "state_dict", "module."])
def test_image_encoder_equals_transformers(tmp_path, wrap):
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=12,
        patch_size=4,
        layer_norm_eps=1e-6,
    )
    vit = randomise(ViTModel(config, add_pooling_layer=False))
    vit.save_pretrained(tmp_path)
    state = deit_from_transformers(load_file(tmp_path / "model.safetensors"))
    state |= {"head.weight": torch.zeros(10, 16), "head.bias": torch.zeros(10)}
    if wrap == "module.":
        state = {f"module.{key}": value for key, value in state.items()}
    torch.save({wrap: state} if wrap in ("model", "state_dict") else state, tmp_path / "deit.pth")
    encoders = make_encoders(seed=5)
    softmask.load_deit(encoders, read_state(tmp_path / "deit.pth"))
    image = make_batch()["image"]
    assert (encoders.encode_image(image) - vit(pixel_values=image).last_hidden_state).abs().max() <= 1e-5


def expected_pos_embed(pos_embed, grid):
    patches = pos_embed[0, 1:].T.reshape(1, 16, math.isqrt(pos_embed.shape[1]), -1)
    patches = F.interpolate(patches, (grid, grid), mode="bicubic")[0].reshape(16, -1).T
    return torch.cat([pos_embed[0, :1], patches])[None]


@pytest.mark.parametrize("grid", [2, 5])
def test_deit_of_another_resolution(grid):
    state, encoders = random_deit(grid), make_encoders()
    softmask.load_deit(encoders, state)
    assert_near(encoders.vision.pos_embed, expected_pos_embed(state["pos_embed"], 3))
    assert torch.equal(encoders.vision.blocks[1].attn.value.bias, state["blocks.1.attn.qkv.bias"][32:])


@pytest.mark.parametrize("wrap", ["plain", "model"])
def test_albef_checkpoint_of_another_resolution(tmp_path, wrap):
    state = random_albef(grid=5)
    torch.save({"model": state, "epoch": 3} if wrap == "model" else state, tmp_path / "ALBEF.pth")
    model = make_model(seed=5)
    queue = model.image_queue.clone()
    assert softmask.load_start(model, read_state(tmp_path / "ALBEF.pth")) == ([], [])
    for encoders, mark in ((model.encoders, ""), (model.encoders_m, "_m")):
        assert_near(encoders.vision.pos_embed, expected_pos_embed(state[f"visual_encoder{mark}.pos_embed"], 3))
        bert = f"text_encoder{mark}.bert.encoder.layer."
        assert torch.equal(
            encoders.text.layers[1].self_attention.key.weight, state[f"{bert}1.attention.self.key.weight"]
        )
        assert torch.equal(
            encoders.fusion.layers[0].cross_attention.value.weight, state[f"{bert}2.crossattention.self.value.weight"]
        )
        assert torch.equal(encoders.fusion.layers[2].mlp.fc2.bias, state[f"{bert}4.output.dense.bias"])
        assert torch.equal(encoders.image_proj.weight, state[f"vision_proj{mark}.weight"])
        assert torch.equal(encoders.mlm_head.bias, state[f"text_encoder{mark}.cls.predictions.bias"])
    assert model.temp == state["temp"] and torch.equal(model.itm_head.weight, state["itm_head.weight"])
    assert torch.equal(model.image_queue, queue)  # queues start anew


def parameters_differ(model):
    return any(not torch.equal(a, b) for a, b in zip(model.encoders.parameters(), model.encoders_m.parameters()))


def test_twin_comes_from_the_checkpoint_else_from_the_loaded_student():
    model = make_model(seed=5)
    softmask.load_start(model, random_albef(twin=True))
    assert parameters_differ(model)
    softmask.load_start(model, random_albef(twin=False))
    assert not parameters_differ(model)
    ours = make_model(seed=6, queue_size=9)
    assert parameters_differ(ours)
    softmask.load_start(model, ours.state_dict())
    assert all(
        torch.equal(value, ours.state_dict()[key]) for key, value in model.state_dict().items() if "queue" not in key
    )
    softmask.load_start(model, {k: v for k, v in ours.state_dict().items() if not k.startswith("encoders_m")})
    assert not parameters_differ(model) and torch.equal(model.itm_head.bias, ours.itm_head.bias)
    assert not any(p.requires_grad for p in model.encoders_m.parameters())
    assert all(p.requires_grad for p in model.encoders.parameters())


@pytest.mark.parametrize(
    "change, name",
    [
        (lambda state: state.pop("visual_encoder.blocks.1.norm2.bias"), "vision.blocks.1.norm2.bias is missing"),
        (lambda state: state.pop("itm_head.weight"), "itm_head.weight is missing"),
        (lambda state: state.update({"visual_encoder.x": torch.ones(1)}), "vision.x is left over"),
        (lambda state: state.update({"visual_encoder.blocks.2.norm1.bias": torch.ones(16)}), "blocks.2.* is left"),
        (lambda state: state.update({"temp": torch.ones(2)}), r"temp has shape \(2,\), the model's has \(\)"),
        (lambda state: state.update({"vision_proj.bias": torch.ones(9)}), r"image_proj.bias has shape \(9,\).*\(8,\)"),
    ],
)
def test_weights_that_do_not_fit_name_the_key(change, name):
    state = random_albef()
    change(state)
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=name):
        softmask.load_start(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_decoder_started_from_bert_is_not_called_fresh(saved_bert):
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    encoders = softmask.build_model("vqa", VOCAB_SIZE, sizes, METHOD).encoders
    fresh = softmask.load_bert(encoders, saved_bert[1])
    assert fresh and all(key.startswith(("image_proj", "text_proj", "fusion")) and "self" not in key for key in fresh)
    assert torch.equal(encoders.decoder.mlm_head.dense.weight, encoders.mlm_head.dense.weight)


def test_deit_and_bert_that_do_not_fit_name_the_key(saved_bert):
    deit = random_deit()
    del deit["norm.weight"]
    with pytest.raises(ValueError, match="norm.weight is missing"):
        softmask.load_deit(make_encoders(), deit)
    with pytest.raises(ValueError, match="patch_embed.weight has shape"):
        softmask.load_deit(make_encoders(patch_size=2, image_size=6), random_deit())
    bert = dict(saved_bert[1])
    with pytest.raises(ValueError, match="fusion.layers.2.* is left over"):
        softmask.load_bert(make_encoders(fusion_layers=2), bert)
    with pytest.raises(ValueError, match="fusion.layers.3.* is missing"):
        softmask.load_bert(make_encoders(fusion_layers=4), bert)
    del bert["cls.predictions.bias"]
    with pytest.raises(ValueError, match="mlm_head.bias is missing"):  # half a head is no head
        softmask.load_bert(make_encoders(), bert)


def test_position_embedding_of_no_square_grid():
    for shape in ((1, 7, 4), (1, 1, 4), (5,)):
        with pytest.raises(ValueError, match=re.escape(f"pos_embed of shape {shape} is not [CLS] and a square grid")):
            softmask.resize_pos_embed(torch.zeros(shape), 3)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("read", [read_state, softmask.read_checkpoint, softmask.from_pretrained])
def test_a_pickle_payload_is_refused_and_not_run(tmp_path, read):
    content = {"model": {"weight": torch.ones(1)}, "config": Payload(tmp_path / "made"), "vocab": ["a"], "step": 1}
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="bad.pth"):
        read(tmp_path / "bad.pth")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 not a zip", b"no checkpoint", [1, 2], {"model": {"a": 3}}, {0: torch.ones(1)}]
)
@pytest.mark.parametrize("name", ["state.pth", "state.safetensors"])
def test_files_that_are_no_state(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=name):
        read_state(path)
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / f"none.{name}")


def test_safetensors_drop_module_prefix(tmp_path):
    save_file({"module.a.module.b": torch.ones(2)}, tmp_path / "x.safetensors")
    assert list(read_state(str(tmp_path / "x.safetensors"))) == ["a.module.b"]


# Losses


def itc_inputs(size=4, queue=5):
    feats = [F.normalize(randn(n, 3, seed=seed), dim=1) for seed, n in enumerate((size,) * 4 + (queue,) * 2)]
    return [feat.requires_grad_() for feat in feats[:2]] + feats[2:]


POSITIVES = torch.tensor([
    [1, 0, 1, 0, 0, 1, 0, 0, 0],
    [0, 1, 0, 0, 0, 0, 0, 0, 0],
    [1, 0, 1, 0, 0, 1, 0, 0, 0],
    [0, 0, 0, 1, 1, 0, 1, 0, 1],
]).bool()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("positives, queue", [(None, 5), (POSITIVES, 5), (None, 0)])
def test_itc_equals_the_loops(gamma, alpha, positives, queue):
    """Loss and gradients, of the features and of the temperature, which the targets give none."""
    feats, temp = itc_inputs(queue=queue), torch.tensor(0.3, requires_grad=True)
    loss, sim_i2t, sim_t2i = softmask.focal_itc_loss(*feats, temp, alpha, gamma, positives)
    wide = [feat.detach().double() for feat in feats] + [temp.detach().double()]
    for i in (0, 1, 6):
        wide[i].requires_grad_()
    target = torch.eye(4, 4 + queue).bool() if positives is None else positives
    naive = naive_itc(wide[:2], wide[2:4], wide[4:6], wide[6], alpha, gamma, target)
    assert_near(loss, naive)
    ours = torch.autograd.grad(loss, (*feats[:2], temp))
    for a, b in zip(ours, torch.autograd.grad(naive, (*wide[:2], wide[6]))):
        assert_near(a, b, 1e-4)
    for sim, own, other in ((sim_i2t, 0, 3), (sim_t2i, 1, 2)):
        expected = [[(a @ b).item() / 0.3 for b in feats[other]] for a in feats[own]]
        assert_near(sim, torch.tensor(expected))


def test_itc_with_hard_targets_is_cross_entropy():
    feats = itc_inputs()
    loss, _, _ = softmask.focal_itc_loss(*feats, 0.1, 0.0, 0.0)
    labels = torch.arange(4)
    to_text = F.cross_entropy(feats[0] @ torch.cat([feats[3], feats[5]]).T / 0.1, labels)
    to_image = F.cross_entropy(feats[1] @ torch.cat([feats[2], feats[4]]).T / 0.1, labels)
    assert_near(loss, (to_text + to_image) / 2)


def test_focal_loss_by_hand():
    """Two orthogonal pairs: p = sigmoid(1 / temp), the loss of one-hot targets (1 - p)^2 * -log p."""
    eye, none = torch.eye(2), torch.zeros(0, 2)
    loss, _, _ = softmask.focal_itc_loss(eye, eye, eye, eye, none, none, torch.tensor(0.5), 0.0, 2.0)
    p = 1 / (1 + math.exp(-2))
    assert loss.item() == pytest.approx(-((1 - p) ** 2) * math.log(p), rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_itc_gradients_are_finite_where_p_rounds_to_one(gamma, alpha):
    eye, none = torch.eye(3, requires_grad=True), torch.zeros(0, 3)
    temp = torch.tensor(0.001, requires_grad=True)
    fixed = eye.detach()
    loss, _, _ = softmask.focal_itc_loss(eye, eye, fixed, fixed, none, none, temp, alpha, gamma)
    loss.backward()
    assert loss.isfinite() and eye.grad.isfinite().all() and temp.grad.isfinite()


def test_hard_negatives_follow_the_softmax():
    sim = torch.tensor([[9.0, 0.0, 1.0, 2.0], [0.0, 9.0, 0.0, 0.0], [3.0, 1.0, 9.0, 0.0], [0.0, 1.0, 9.0, 9.0]])
    allowed = ~torch.eye(4).bool()
    allowed[3, 2] = False
    counts, generator = torch.zeros(4, 4), seeded()
    for _ in range(4000):
        index, valid = softmask.hard_negatives(sim, allowed, generator)
        assert valid.all() and allowed[torch.arange(4), index].all()
        counts[torch.arange(4), index] += 1
    weights = sim.exp() * allowed
    assert (counts / 4000 - weights / weights.sum(1, keepdim=True)).abs().max() < 0.03


def test_hard_negatives_are_never_positives_at_the_least_temperature():
    """Cosines 1 and -0.1 over 0.001: the allowed columns have probability 0 unless the others are masked first."""
    sim = torch.full((6, 6), -0.1)
    same = torch.tensor([0, 0, 1, 1, 2, 3])[:, None] == torch.tensor([0, 0, 1, 1, 2, 3])
    sim = torch.where(same, 1.0, sim) / 0.001
    sim[4, 5] += 1100
    generator, seen = seeded(), collections.Counter()
    for _ in range(300):
        index, valid = softmask.hard_negatives(sim, ~same, generator)
        assert valid.all() and not same[torch.arange(6), index].any() and index[4] == 5
        seen[int(index[0])] += 1
    assert set(seen) == {2, 3, 4, 5}


def test_rows_without_a_negative_are_not_valid():
    index, valid = softmask.hard_negatives(torch.zeros(1, 1), torch.zeros(1, 1).bool())
    assert index.tolist() == [0] and valid.tolist() == [False]
    allowed = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 0]]).bool()
    index, valid = softmask.hard_negatives(torch.zeros(3, 3), allowed)
    assert index.tolist() == [0, 0, 2] and valid.tolist() == [False, True, False]


def test_hard_negatives_of_a_diverged_model_do_not_crash():
    """The loss is NaN by then, which says more than an error of the draw."""
    allowed = ~torch.eye(4).bool()
    index, valid = softmask.hard_negatives(torch.full((4, 4), math.nan), allowed, seeded())
    assert valid.all() and allowed[torch.arange(4), index].all()


def test_hard_negatives_repeat_with_the_seed():
    sim, allowed = randn(8, 8), ~torch.eye(8).bool()
    draws = [[softmask.hard_negatives(sim, allowed, g)[0].tolist() for _ in range(3)] for g in (seeded(1), seeded(1))]
    assert draws[0] == draws[1] and draws[0][0] != draws[0][1]


def test_itm_loss():
    logits, labels = randn(5, 2).requires_grad_(), torch.tensor([1, -100, 0, 0, -100])
    loss = softmask.itm_loss(logits, labels)
    terms = [-math.log(logits[i].softmax(0)[labels[i]].item()) for i in (0, 2, 3)]
    assert loss.item() == pytest.approx(sum(terms) / 3, rel=1e-5)
    loss.backward()
    assert (logits.grad[[1, 4]] == 0).all() and (logits.grad[[0, 2, 3]] != 0).all()


@pytest.mark.parametrize("rows", [0, 3])
def test_itm_loss_of_no_row(rows):
    logits = randn(rows, 2).requires_grad_()
    loss = softmask.itm_loss(logits, torch.full((rows,), -100))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_words_loss_by_hand():
    """Two captions of two patches: one says words 2 (twice) and 3, the other 1; 0 is no word, and nobody says 4."""
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 5, requires_grad=True)
    input_ids = torch.tensor([[0, 2, 3, 2, 0], [0, 1, 0, 0, 0]])
    word_ids = torch.tensor([[-1, 0, 1, 2, -1], [-1, 0, -1, -1, -1]])
    expected = 0.0
    for (one, other), said in zip(logits.tolist(), ({2, 3}, {1})):
        for word in (1, 2, 3):
            mean = (math.exp(2 * one[word]) + math.exp(2 * other[word])) / 2
            p = 1 / (1 + math.exp(-math.log(mean) / 2))
            expected -= math.log(p if word in said else 1 - p) / 2
    assert softmask.words_loss(logits, input_ids, word_ids) == softmask.words_loss(logits, input_ids, word_ids, 5.0)
    loss = softmask.words_loss(logits, input_ids, word_ids, sharpness=2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert (gradient[0, :, 2:4] < 0).all() and (gradient[0, :, 1] > 0).all() and (gradient[1, :, 1] < 0).all()
    assert (gradient[:, :, [0, 4]] == 0).all()


def test_words_losses_teach_the_image_encoder_and_the_word_embeddings_alone():
    model, batch = make_model(sizes={"vision_width": 24}), make_batch()
    losses = model.words_losses(batch["image"], batch["input_ids"], batch["word_ids"])
    assert list(losses) == ["words"]
    losses["words"].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    vision = {name for name, _ in model.named_parameters() if name.startswith("encoders.vision.")}
    assert reached == vision | {"encoders.text.embeddings.word.weight", "encoders.mlm_head.bias"}


def test_words_losses_are_of_the_patches_alone(monkeypatch):
    """Were they of [CLS] too, it could say the words in their place."""
    model, batch, states = make_model(sizes={"vision_width": 24}), make_batch(), randn(4, 10, 24)
    monkeypatch.setattr(model.encoders, "encode_image", lambda _: states)
    before = model.words_losses(batch["image"], batch["input_ids"], batch["word_ids"])
    states[:, 0] = 9.0
    assert model.words_losses(batch["image"], batch["input_ids"], batch["word_ids"]) == before


def test_words_loss_of_captions_without_a_word():
    logits = randn(2, 3, 5).requires_grad_()
    loss = softmask.words_loss(logits, torch.zeros(2, 4, dtype=torch.long), torch.full((2, 4), -1))
    loss.backward()
    assert loss == 0 and (logits.grad == 0).all()


def test_itm_accuracy():
    labels = torch.tensor([1, 0, 0, 1, 0, -100])
    for constant in ([0.0, 1.0], [1.0, 0.0]):
        assert softmask.itm_accuracy(torch.tensor([constant] * 6), labels) == 0.5
    predicted = F.one_hot(torch.tensor([1, 1, 0, 0, 0, 1]), 2).float()
    assert softmask.itm_accuracy(predicted, labels).item() == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert softmask.itm_accuracy(predicted[[0]], labels[[0]]) == 0.75  # no non-match: that kind counts as 0.5
    assert softmask.itm_accuracy(predicted[[5]], labels[[5]]) == 0.5


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_mlm_loss(alpha):
    logits, logits_m, labels = randn(3, 7), randn(3, 7, seed=1), torch.tensor([0, 6, 3])
    expected = 0.0
    for i in range(3):
        for j in range(7):
            q = alpha * logits_m[i].softmax(0)[j].item() + (1 - alpha) * (j == labels[i].item())
            expected -= q * math.log(logits[i].softmax(0)[j].item()) / 3
    assert softmask.mlm_loss(logits, logits_m, labels, alpha).item() == pytest.approx(expected, rel=1e-5)
    among = torch.tensor([[-100, 0, -100], [6, 3, -100]])  # of positions (B, L) those that are not masked do not count
    spread = [torch.zeros(2, 3, 7).masked_scatter((among >= 0)[:, :, None], part) for part in (logits, logits_m)]
    assert softmask.mlm_loss(*spread, among, alpha).item() == pytest.approx(expected, rel=1e-5)


def test_mlm_loss_of_no_masked_token_gives_zero_gradients():
    model, batch = make_model().train(), make_batch()
    batch["masked_ids"], batch["mlm_labels"] = batch["input_ids"], torch.full_like(batch["input_ids"], -100)
    losses, _, _ = model(**batch)
    losses["mlm"].backward()
    assert losses["mlm"] == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())
    assert model.encoders.text.layers[0].mlp.fc1.weight.grad is not None


# Word attention and soft mask


def positive_pass(model, batch, layer):
    encoders, mask = model.encoders, batch["attention_mask"]
    image_embeds = encoders.encode_image(batch["image"])
    text_embeds = encoders.encode_text(batch["input_ids"], mask)
    keys_values = encoders.image_keys_values(image_embeds)
    fused, attention = encoders.fuse(text_embeds, mask, keys_values, attention_layer=layer)
    return image_embeds, text_embeds, attention, model.itm_head(fused[:, 0])[:, 1]


@pytest.mark.parametrize("layer", [0, 1])
def test_word_attention_equals_finite_differences(layer):
    model, batch = make_model(), make_batch()
    image_embeds, text_embeds, attention, match = positive_pass(model, batch, layer)
    cam = softmask.word_attention(attention, match)
    assert cam.shape == (4, 6, 9) and cam.dtype == torch.float32 and not cam.requires_grad
    wide = copy.deepcopy(model).double()
    row, length, step = 1, 5, 1e-4  # caption 1 has a padded token
    text, image = text_embeds[row, :length].detach().double(), image_embeds[row].detach().double()
    expected = torch.zeros(length, 9)
    with torch.no_grad():
        probs = naive_fuse(wide.encoders.fusion, text, image, None, layer)[1]
        for head in range(3):
            for token in range(length):
                for patch in range(9):
                    scores = []
                    for sign in (1, -1):
                        delta = torch.zeros(3, length, 10, dtype=torch.float64)
                        delta[head, token, 1 + patch] = sign * step
                        fused, _ = naive_fuse(wide.encoders.fusion, text, image, None, layer, delta)
                        scores.append(wide.itm_head(fused[0])[1].item())
                    slope = max((scores[0] - scores[1]) / (2 * step), 0)
                    expected[token, patch] += probs[head, token, 1 + patch] * slope / 3
    for rows in (slice(0, 1), slice(1, length)):  # the words' values are far smaller than [CLS]'s
        assert_near(cam[row, rows], expected[rows], 1e-4)
        assert expected[rows].max() > 0


def test_word_attention_touches_no_grad_and_leaves_the_graph_usable():
    model, batch = make_model(), make_batch()
    _, _, attention, match = positive_pass(model, batch, 1)
    softmask.word_attention(attention, match)
    assert all(p.grad is None for p in model.parameters())
    match.sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert len(before) > 20
    _, _, attention, match = positive_pass(model, batch, 1)
    softmask.word_attention(attention, match)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if name in before)


def test_the_last_fusion_layer_has_no_word_attention():
    """Which is why it is refused: every word's row is exactly zero there."""
    _, _, attention, match = positive_pass(make_model(), make_batch(), 2)
    cam = softmask.word_attention(attention, match)
    assert (cam[:, 1:] == 0).all() and cam[:, 0].max() > 0


def test_word_attention_is_finite_where_all_heads_overflow():
    attention = torch.full((1, 4, 2, 1 + 3), 1.0, requires_grad=True)
    match = (attention * torch.finfo(torch.float32).max * 2).sum().reshape(1)  # its gradient is infinite
    assert softmask.word_attention(attention, match).isfinite().all()


@pytest.mark.parametrize("layer", [2, 3, -1])
def test_layers_without_word_attention_are_refused(layer):
    with pytest.raises(ValueError, match=f"attention_layer {layer}"):
        softmask.check_attention_layer(layer, 3)
    with pytest.raises(ValueError, match=f"attention_layer {layer}"):
        make_model(attention_layer=layer)
    pretrained = softmask.Pretrained(make_model(), softmask.load_tokenizer(VOCABULARY), 9, 9)
    with pytest.raises(ValueError, match=f"attention_layer {layer}"):
        pretrained.word_attention(Image.new("RGB", (12, 12)), "a dog", layer)


def test_attention_layer_default():
    assert [make_model(sizes={"fusion_layers": n}).attention_layer for n in (2, 3, 4, 6)] == [0, 1, 1, 2]
    assert make_model(attention_layer=0).attention_layer == 0
    with pytest.raises(ValueError, match="attention_layer"):
        make_model(sizes={"fusion_layers": 1})
    assert make_model(sizes={"fusion_layers": 1}, soft_mask=False).attention_layer == 0
    with pytest.raises(ValueError, match="mask_text_for is 'itc'"):
        make_model(mask_text_for="itc")


@pytest.mark.parametrize("value", [0.0, 0.3, 1e-30])
def test_constant_cam_masks_nothing(value):
    assert (softmask.soft_mask(torch.full((2, 4, 9), value), torch.ones(2, 4).bool()) == 0).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-6, 1.0, 1e6])
def test_soft_mask_reaches_exactly_0_and_1_and_averages_pieces(scale):
    cam = randn(5, 6, 9).abs() * scale
    picked = torch.tensor([[0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0] * 6, [0, 0, 0, 0, 0, 1]])
    mask = softmask.soft_mask(cam, picked.bool())
    assert mask.dtype == torch.float32
    for i in (0, 1, 2, 4):
        assert mask[i].min() == 0 and mask[i].max() == 1
        assert_near(mask[i], naive_soft_mask(cam[i].double(), picked[i].nonzero().flatten().tolist()))
        assert mask[i].argmax() == (cam[i] * picked[i][:, None]).sum(0).argmax()
    assert (mask[3] == 0).all()


def test_pick_word_is_even_over_words_not_pieces():
    word_ids = torch.tensor([-1, 0, 1, 1, 1, 2, 3, 3, -1]).expand(6000, -1)
    excluded = torch.zeros(9).bool()
    excluded[7] = True  # the second piece of word 3
    picked = softmask.pick_word(word_ids, excluded.expand(6000, -1), seeded())
    counts = collections.Counter(tuple(row.nonzero().flatten().tolist()) for row in picked)
    assert set(counts) == {(1,), (2, 3, 4), (5,)}  # whole words; never [CLS], padding or word 3
    assert all(abs(count / 6000 - 1 / 3) < 0.02 for count in counts.values())


def test_pick_word_without_a_word_left():
    word_ids = torch.tensor([[-1, 0, 0, -1], [-1, -1, -1, -1], [-1, 0, 1, -1], [-1, 0, -1, -1]])
    excluded = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 1]]).bool()
    picked = softmask.pick_word(word_ids, excluded, seeded())
    assert picked.int().tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]]


def test_soft_masked_keys_and_values_equal_a_fresh_projection():
    fusion, image_embeds = make_encoders().fusion, randn(4, 10, 16)
    mask = torch.rand(4, 9, generator=seeded())
    mask[0], mask[1] = 0, 1
    plain = fusion.keys_values(image_embeds)
    scaled = zip(fusion.layers, fusion.soft_mask_keys_values(plain, mask))  # where they are read
    soft = [layer.cross_attention.scale_keys_values(*reading) for layer, reading in scaled]
    fresh = fusion.keys_values(torch.cat([image_embeds[:, :1], (1 - mask)[..., None] * image_embeds[:, 1:]], 1))
    assert len(soft) == 3
    for ours, expected, unmasked in zip(soft, fresh, plain):
        for a, b, c in zip(ours, expected, unmasked):
            assert_near(a, b)
            assert torch.equal(a[:, :, 0], c[:, :, 0]) and torch.equal(a[0], c[0])


# Encoders


def test_fuse_with_image_index_equals_single_pairs():
    encoders, mask = make_encoders(), make_batch()["attention_mask"][[0, 1, 2, 3, 1]]
    text_embeds, image_embeds, index = randn(5, 6, 24), randn(3, 10, 16, seed=1), torch.tensor([2, 0, 0, 1, 2])
    fused, attention = encoders.fuse(text_embeds, mask, encoders.image_keys_values(image_embeds), index, 1)
    assert attention.shape == (5, 3, 6, 10)
    wide = copy.deepcopy(encoders.fusion).double()
    for row in range(5):
        keep = mask[row].double()
        one, probs = naive_fuse(wide, text_embeds[row].double(), image_embeds[index[row]].double(), keep, 1)
        assert_near(fused[row], one)
        assert_near(attention[row], probs)


def test_rows_of_one_image_as_one_long_query_equal_single_pairs():
    encoders, mask = make_encoders(), make_batch()["attention_mask"][[0, 1, 2, 3, 1, 2]]
    text_embeds, image_embeds = randn(6, 6, 24), randn(2, 10, 16, seed=1)
    keys_values = encoders.image_keys_values(image_embeds)
    index = torch.tensor([0, 0, 0, 1, 1, 1])
    expected, _ = encoders.fuse(text_embeds, mask, keys_values, index)
    for layer in (None, 1):
        assert_near(encoders.fuse(text_embeds, mask, keys_values, attention_layer=layer)[0], expected)


@pytest.mark.parametrize("layer", [None, 1])
def test_rows_in_order_before_rows_with_an_index_equal_single_pairs(layer):
    encoders, mask = make_encoders(), make_batch()["attention_mask"][[0, 1, 2, 3, 1, 2]]
    text_embeds, keys_values = randn(6, 6, 24), encoders.image_keys_values(randn(2, 10, 16, seed=1))
    expected = encoders.fuse(text_embeds, mask, keys_values, torch.tensor([0, 0, 1, 1, 1, 0]), layer)
    found = encoders.fuse(text_embeds, mask, keys_values, torch.tensor([1, 0]), layer)
    assert_near(found[0], expected[0])
    if layer is not None:
        assert_near(found[1], expected[1])
    with pytest.raises(ValueError, match="5 rows cannot be shared out evenly to 2 images"):
        encoders.fuse(text_embeds, mask, keys_values, torch.tensor([1]), layer)


def test_cls_alone_under_a_mask_of_each_token():
    encoders, mask = make_encoders(), torch.ones(2, 6, 6, dtype=torch.bool).triu()
    text_embeds, keys_values = randn(2, 6, 24), encoders.image_keys_values(randn(2, 10, 16, seed=1))
    every, first = (encoders.fusion(text_embeds, mask, keys_values, cls_only=alone)[0] for alone in (False, True))
    assert_near(first, every[:, :1])


def test_attention_of_a_long_query_has_a_row_a_text():
    """(R, H, L, 1 + N) here too, as FusionEncoder.forward says."""
    encoders, mask, index = make_encoders(), torch.ones(4, 6), torch.tensor([0, 0, 1, 1])
    text_embeds, keys_values = randn(4, 6, 24), encoders.image_keys_values(randn(2, 10, 16, seed=1))
    _, expected = encoders.fuse(text_embeds, mask, keys_values, index, 1)
    assert_near(encoders.fuse(text_embeds, mask, keys_values, attention_layer=1)[1], expected)


@pytest.mark.parametrize("rows", [3, 5])
def test_rows_that_cannot_be_shared_out_are_refused(rows):
    encoders = make_encoders()
    keys_values = encoders.image_keys_values(randn(2, 10, 16))
    with pytest.raises(ValueError, match=f"{rows} rows cannot be shared out evenly to 2 images"):
        encoders.fuse(randn(rows, 6, 24), torch.ones(rows, 6), keys_values)


@torch.no_grad()
def test_batched_equals_single_with_padding():
    encoders, batch = make_encoders(), make_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    image_embeds, text_embeds = encoders.encode_image(batch["image"]), encoders.encode_text(ids, mask)
    fused, _ = encoders.fuse(text_embeds, mask, encoders.image_keys_values(image_embeds))
    other_padding = torch.where(mask.bool(), ids, 9)
    for i, length in enumerate(mask.sum(1).tolist()):
        one = slice(i, i + 1)
        assert_near(encoders.encode_image(batch["image"][one]), image_embeds[one])
        text = encoders.encode_text(ids[one, :length], mask[one, :length])
        assert_near(text, text_embeds[one, :length])
        assert_near(encoders.encode_text(other_padding[one], mask[one].bool())[:, :length], text)
        single, _ = encoders.fuse(text, mask[one, :length], encoders.image_keys_values(image_embeds[one]))
        assert_near(single, fused[one, :length])
        for feat, states in ((encoders.image_feat, image_embeds), (encoders.text_feat, text_embeds)):
            assert_near(feat(states[one]), feat(states)[one])
            assert feat(states)[i].norm().item() == pytest.approx(1)


def test_a_text_of_padding_alone_spoils_no_other():
    """A batch that was filled up: with dropout on a CPU, where attention is ours, and without it, where it is torch's."""
    model, batch = make_model(sizes={"dropout": 0.1}), make_batch()
    batch["attention_mask"][1], batch["word_ids"][1], batch["mlm_labels"][1] = 0, -1, -100
    for mode in (False, True):
        losses = model.train(mode)(**batch, generator=seeded())[0]
        assert all(value.isfinite() for value in losses.values())
        gradients = torch.autograd.grad(sum(losses.values()), [*model.encoders.text.parameters()])
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("frozen", ["all encoders", "all below the attention"])
def test_the_soft_mask_of_frozen_encoders(frozen):
    """The same losses, and gradients of what is not frozen."""
    model, batch = make_model(), make_batch()
    expected = model(**batch, generator=seeded())[0]
    parts = model.encoders.vision, model.encoders.text, *model.encoders.fusion.layers[:2]
    for part in [model.encoders] if frozen == "all encoders" else parts:
        part.requires_grad_(False)
    losses = model(**batch, generator=seeded())[0]
    assert losses == expected
    sum(losses.values()).backward()
    left = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert left and all(parameter.grad is not None for parameter in left)
    with torch.no_grad():
        model.soft_mask = False
        assert not any(value.requires_grad for value in model(**batch)[0].values())


@torch.no_grad()
def test_text_layers_equal_the_loops():
    encoders, ids = make_encoders(), make_batch()["input_ids"][:1]
    wide = copy.deepcopy(encoders.text).double()
    tables = wide.embeddings
    x = torch.stack([
        tables["word"].weight[i] + tables["position"].weight[n] + tables["token_type"].weight[0]
        for n, i in enumerate(ids[0].tolist())
    ])
    x = naive_norm(tables["norm"], x)
    for layer in wide.layers:
        x = naive_norm(layer.self_norm, x + naive_attention(layer.self_attention, x, x)[0])
        x = naive_norm(layer.mlp_norm, x + naive_mlp(layer.mlp, x))
    assert_near(encoders.encode_text(ids, torch.ones_like(ids))[0], x)


def test_returning_the_attention_changes_nothing():
    """The explicit attention against scaled_dot_product_attention: states, and the gradients through them."""
    encoders, batch = make_encoders(), make_batch()
    mask, text_embeds = batch["attention_mask"], randn(4, 6, 24)
    results = []
    for layer in (None, 0, 1, 2):
        image_embeds = randn(4, 10, 16, seed=1).requires_grad_()
        keys_values = encoders.image_keys_values(image_embeds)
        fused, attention = encoders.fuse(text_embeds, mask, keys_values, attention_layer=layer)
        (gradient,) = torch.autograd.grad(fused.square().sum(), image_embeds)
        results.append((fused, gradient))
        if layer is None:
            assert attention is None
        else:
            assert attention.dtype == torch.float32
            assert_near(attention.sum(-1), torch.ones(4, 3, 6))
            assert_near(fused, results[0][0])
            assert_near(gradient, results[0][1], 1e-4)


def test_shapes_that_do_not_fit_are_refused():
    encoders = make_encoders()
    with pytest.raises(ValueError, match=r"\(2, 3, 12, 8\).*\(B, 3, 12, 12\)"):
        encoders.encode_image(torch.zeros(2, 3, 12, 8))
    with pytest.raises(ValueError, match=r"\(2, 13\) is longer than 12 positions"):
        encoders.encode_text(torch.zeros(2, 13).long(), torch.ones(2, 13))
    with pytest.raises(ValueError, match="dim 24 is not divisible by num_heads 5"):
        make_encoders(text_heads=5)
    with pytest.raises(ValueError, match="image_size 13 is not divisible by patch_size 4"):
        make_encoders(image_size=13)


# The pre-training model


def fix_draws(monkeypatch, negatives, picked):
    drawn = iter(negatives)
    monkeypatch.setattr(softmask, "hard_negatives", lambda *_: next(drawn))
    monkeypatch.setattr(softmask, "pick_word", lambda *_: picked)


NEGATIVES = (  # images, then texts; text 2 and image 1 have none
    (torch.tensor([1, 3, 2, 0]), torch.tensor([True, True, False, True])),
    (torch.tensor([3, 1, 1, 2]), torch.tensor([True, False, True, True])),
)
PICKED = torch.tensor([[0, 0, 0, 0, 0, 1], [0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0] * 6]).bool()


@pytest.mark.parametrize("soft_mask_negatives", [True, False])
@pytest.mark.parametrize("mask_text_for", ["all", "mlm"])
@pytest.mark.parametrize("image_ids", [True, False])
@pytest.mark.parametrize("clean_teacher", [True, False])
def test_forward_equals_the_loops(monkeypatch, soft_mask_negatives, mask_text_for, image_ids, clean_teacher):
    """Every loss, and the gradients of the soft ITM, in which the mask is a constant; caption 3 has no word left."""
    model = make_model(soft_mask_negatives=soft_mask_negatives, mask_text_for=mask_text_for).train()
    batch = make_batch(image_ids)
    if clean_teacher:
        batch["clean_image"] = batch["image"] / 2 + 0.1
    fix_draws(monkeypatch, NEGATIVES, PICKED)
    taken, accuracy = {}, softmask.itm_accuracy  # the accuracies by their number of rows: plain, then soft-masked
    monkeypatch.setattr(softmask, "itm_accuracy", lambda *rows: taken.setdefault((len(taken), len(rows[0])), accuracy(*rows)))
    losses, stats, features = model(**batch)
    assert list(taken) == [(0, 12), (1, 12 if soft_mask_negatives else 4)]
    assert stats["itm_accuracy"] is taken[0, 12] and stats["soft_itm_accuracy"] is list(taken.values())[1]
    naive, masks, wide = naive_losses(model, batch, NEGATIVES, PICKED)
    assert losses.keys() == naive.keys()
    for name, loss in losses.items():
        assert_near(loss, naive[name])
    assert (masks[3] == 0).all() and stats["mask_mean"].item() == pytest.approx(masks.mean().item(), rel=1e-3)
    assert stats["temp"] == model.temp and not any(value.requires_grad for value in stats.values())
    assert not features[0].requires_grad and not features[1].requires_grad and features[2] is batch["image_ids"]

    names = ["vision.patch_embed.weight", "text.layers.0.mlp.fc1.weight", "fusion.layers.0.cross_attention.key.weight"]
    names += ["vision.blocks.0.attn.query.bias", "fusion.layers.2.cross_attention.value.bias"]
    ours = torch.autograd.grad(losses["soft_itm"], [model.encoders.get_parameter(name) for name in names])
    expected = torch.autograd.grad(naive["soft_itm"], [wide.encoders.get_parameter(name) for name in names])
    for a, b in zip(ours, expected):
        assert b.abs().max() > 0
        assert_near(a, b, 1e-4)


def test_no_loss_reaches_the_model_through_the_mask(monkeypatch):
    """word_attention's graph takes no gradient: a mask from elsewhere gives the same gradients, bit for bit."""
    model, batch, gradients = make_model(), make_batch(), []
    real, seen = softmask.soft_mask, []
    for use in (lambda *args: seen.append(real(*args)) or seen[-1], lambda *_: seen[0].clone()):
        fix_draws(monkeypatch, NEGATIVES, PICKED)
        monkeypatch.setattr(softmask, "soft_mask", use)
        model.zero_grad()
        losses, _, _ = model(**batch)
        sum(losses.values()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert not seen[0].requires_grad
    assert all(torch.equal(a, gradients[1][name]) for name, a in gradients[0].items())
    assert all((grad != 0).any() for name, grad in gradients[0].items() if "key.bias" not in name)
    assert all(p.grad is None for p in model.encoders_m.parameters())


@pytest.mark.parametrize("mask_text_for", ["all", "mlm"])
def test_which_text_enters_which_loss(monkeypatch, mask_text_for):
    model = make_model(mask_text_for=mask_text_for)

    def losses(**changes):
        fix_draws(monkeypatch, NEGATIVES, PICKED)
        batch = make_batch() | changes
        return {name: loss.item() for name, loss in model(**batch)[0].items()}

    plain, batch = losses(), make_batch()
    other_ids = torch.where(batch["word_ids"] >= 0, 34 - batch["input_ids"], batch["input_ids"])
    other_clean, other_masked = losses(input_ids=other_ids), losses(masked_ids=other_ids)
    if mask_text_for == "all":
        assert other_clean == plain  # the masked text feeds ITC, ITM and MLM at once
        assert all(other_masked[name] != plain[name] for name in plain)
    else:
        assert other_clean["mlm"] == plain["mlm"] and other_masked["mlm"] != plain["mlm"]
        for name in ("itc", "itm", "soft_itm"):
            assert other_masked[name] == plain[name] and other_clean[name] != plain[name]


def test_draws_respect_image_ids_and_mlm(monkeypatch):
    """What the model hands to hard_negatives and pick_word, over many seeds."""
    model, batch = make_model(), make_batch()
    real_negatives, real_pick, calls = softmask.hard_negatives, softmask.pick_word, collections.defaultdict(list)

    def record(name, function):
        return lambda *args: calls[name].append(function(*args)) or calls[name][-1]

    monkeypatch.setattr(softmask, "hard_negatives", record("negatives", real_negatives))
    monkeypatch.setattr(softmask, "pick_word", record("picked", real_pick))
    with torch.random.fork_rng():
        for seed in range(60):
            model(**batch, generator=seeded(seed))
    for index, valid in calls["negatives"]:
        assert valid.all() and (batch["image_ids"][index] != batch["image_ids"]).all()
    words = [{tuple(picked[i].nonzero().flatten().tolist()) for picked in calls["picked"]} for i in range(4)]
    assert words == [{(3,), (4,), (5,)}, {(1,), (2, 3)}, {(1,), (2,), (3,)}, {()}]


def test_the_negative_is_drawn_by_its_own_direction(monkeypatch):
    """Images for texts by sim_t2i, texts for images by sim_i2t, in this order."""
    model, batch, seen = make_model(), make_batch(False), []
    real = softmask.hard_negatives
    monkeypatch.setattr(softmask, "hard_negatives", lambda *args: seen.append(args[:2]) or real(*args))
    model(**batch)
    student, twin, mask = model.encoders, model.encoders_m, batch["attention_mask"]
    image, text = student.encode_image(batch["image"]), student.encode_text(batch["masked_ids"], mask)
    image_m, text_m = twin.encode_image(batch["image"]), twin.encode_text(batch["masked_ids"], mask)
    assert_near(seen[0][0], student.text_feat(text) @ twin.image_feat(image_m).T / 0.2, 1e-4)
    assert_near(seen[1][0], student.image_feat(image) @ twin.text_feat(text_m).T / 0.2, 1e-4)
    assert all(torch.equal(allowed, ~torch.eye(4).bool()) for _, allowed in seen)


@pytest.mark.parametrize("queue_size", [0, 5])
def test_a_batch_without_any_negative(queue_size):
    """One image four times: ITM has positives alone, every loss and gradient stays finite."""
    model, batch = make_model(queue_size=queue_size), make_batch()
    batch["image_ids"] = torch.full((4,), 7)
    losses, _, _ = model(**batch)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_batch_of_one():
    model = make_model()
    batch = {key: value[:1] if isinstance(value, torch.Tensor) else value for key, value in make_batch().items()}
    losses, _, _ = model(**batch)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


class Operations(TorchDispatchMode):
    """Names of the operations of a with statement, "wait" for one whose result's size, or a number, a GPU has to tell."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        indices = args[1] if name.startswith(("index", "_index")) and isinstance(args[1], (list, tuple)) else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        sized = name in ("_local_scalar_dense", "nonzero", "repeat_interleave")
        self.names.append("wait" if by_mask or sized else name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("mask_text_for", ["all", "mlm"])
def test_sizes_that_a_gpu_is_waited_for_are_read_before_the_encoders(mask_text_for):
    """A wait in the midst of a step would let the GPU run dry."""
    model, batch = make_model(mask_text_for=mask_text_for), make_batch()
    with Operations() as operations:
        losses, _, _ = model(**batch)
        sum(losses.values()).backward()
    assert "wait" in operations.names and "wait" not in operations.names[operations.names.index("convolution"):]


def test_no_caption_with_a_word_left():
    model, batch = make_model(), make_batch()
    batch["mlm_labels"] = torch.where(batch["word_ids"] >= 0, batch["input_ids"], -100)
    losses, stats, _ = model(**batch)
    losses["soft_itm"].backward()
    assert losses["soft_itm"] == 0 and stats["mask_mean"] == 0
    assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())


def test_everything_off_leaves_out_the_soft_loss_alone(monkeypatch):
    """The soft mask changes no other loss."""
    kept = []
    for soft_mask in (True, False):
        fix_draws(monkeypatch, NEGATIVES, PICKED)
        losses, stats, _ = make_model(soft_mask=soft_mask)(**make_batch())
        assert ("soft_itm" in losses) == ("mask_mean" in stats) == soft_mask
        kept.append([losses[name] for name in ("itc", "itm", "mlm")])
    for a, b in zip(*kept):
        assert_near(a, b)


def test_forward_repeats_with_the_seed_and_changes_no_state():
    model = make_model().train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    first = model(**make_batch(), generator=seeded(3))[0]
    torch.manual_seed(2)
    again = model(**make_batch(), generator=seeded(3))[0]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_train_keeps_the_twin_in_eval_mode():
    model = make_model(sizes={"dropout": 0.5}).train()
    assert model.encoders.training and not any(module.training for module in model.encoders_m.modules())
    batch = make_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert torch.equal(model.encoders_m.encode_text(ids, mask), model.encoders_m.encode_text(ids, mask))
    assert not torch.equal(model.encoders.encode_text(ids, mask), model.encoders.encode_text(ids, mask))
    assert torch.equal(model.encoders.encode_image(batch["image"]), model.encoders.encode_image(batch["image"]))
    model.eval()
    assert torch.equal(model.encoders.encode_text(ids, mask), model.encoders.encode_text(ids, mask))


@pytest.mark.parametrize("names", [("query",), ("key", "value"), ("key", "value", "query")])
def test_projections_under_autocast_are_one_product(monkeypatch, names):
    """Of weights side by side: the same as one by one, and so the gradients, to bfloat16's rounding."""
    attention, x = make_encoders().vision.blocks[0].attn, randn(2, 10, 16)
    layers = [getattr(attention, name) for name in names]
    for layer in layers:
        torch.nn.init.normal_(layer.bias, generator=seeded(1))
    linear, products = F.linear, []
    monkeypatch.setattr(F, "linear", lambda *args: products.append(args) or linear(*args))

    def projections(project):
        attention.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            found = project(x, *layers)
            sum(((i + 1) * part.float() ** 2).sum() for i, part in enumerate(found)).backward()
        return found, [parameter.grad for layer in layers for parameter in (layer.weight, layer.bias)]

    found, gradients = projections(attention.project)
    assert len(products) == 1
    expected, expected_gradients = projections(lambda x, *layers: [attention.split_heads(f(x)) for f in layers])
    assert [part.dtype for part in found] == [torch.bfloat16] * len(names)
    for ours, theirs in zip([*found, *gradients], [*expected, *expected_gradients], strict=True):
        assert ours.shape == theirs.shape and (ours.float() - theirs.float()).abs().max() < 0.02 * theirs.abs().max()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_layers_put_in_place_of_projections_are_called(precision):
    """As adapters are (LoRA), which show the weight of the layer that they wrap."""
    class Adapter(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.weight, self.bias, self.low = layer, layer.weight, layer.bias, torch.nn.Linear(16, 16)

        def forward(self, x):
            return self.layer(x) + self.low(x)

    attention = make_encoders().vision.blocks[0].attn
    attention.query = Adapter(attention.query)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        attention(randn(2, 10, 16))[0].sum().backward()
    assert attention.query.low.weight.grad.abs().max() > 0


def test_what_is_done_again_in_backward_drops_the_same(monkeypatch):
    fusion = make_encoders(dropout=0.5).fusion.train()
    image, text, mask, cross = randn(2, 10, 16), randn(2, 5, 24, seed=1), torch.ones(2, 5), fusion.layers[0].cross_attention

    def gradients():
        torch.manual_seed(0)
        loss = fusion(text, mask, fusion.keys_values(image))[0].square().sum()
        return torch.autograd.grad(loss, [cross.query.weight, cross.value.weight])

    again = gradients()
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda f, *given, use_reentrant: f(*given))
    for ours, expected in zip(again, gradients()):
        assert_near(ours, expected)


@pytest.mark.parametrize("return_probs", [True, False])
def test_both_attention_paths_drop_probabilities(return_probs):
    attention = make_encoders(dropout=0.5).fusion.layers[0].cross_attention
    x, keys_values = randn(1, 6, 24), attention.keys_values(randn(1, 10, 16))

    def twice():
        return [attention(x, *keys_values, return_probs=return_probs) for _ in range(2)]

    (first, probs), (second, _) = twice()
    assert torch.equal(first, second)
    attention.train()
    (first, dropped), (second, _) = twice()
    assert not torch.equal(first, second)
    assert probs is dropped is None or torch.equal(probs, dropped)  # they are returned as before dropout


def test_where_the_student_drops():
    """BERT's places: the embeddings, and in each layer what attention, cross-attention and MLP add."""
    model, calls, batch = make_model(sizes={"dropout": 0.5}).train(), collections.Counter(), make_batch()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    image_embeds = model.encoders.encode_image(batch["image"])
    text_embeds = model.encoders.encode_text(batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        model.encoders.fuse(text_embeds, batch["attention_mask"], model.encoders.image_keys_values(image_embeds))
    layers = {"text": 2, "fusion": 3}
    expected = {f"encoders.{name}.layers.{i}.dropout": n for name, n in layers.items() for i in range(SIZES[f"{name}_layers"])}
    assert calls == {"encoders.text.dropout": 1} | expected


def test_update_twin():
    model = make_model(momentum=0.75)
    student = [p.detach().clone() for p in model.encoders.parameters()]
    expected = [0.75 * p + 0.25 * q for p, q in zip(model.encoders_m.parameters(), student)]
    model.update_twin()
    for twin, value, p, q in zip(model.encoders_m.parameters(), expected, model.encoders.parameters(), student):
        assert torch.allclose(twin, value, atol=1e-7) and torch.equal(p, q)
    assert not any(p.requires_grad for p in model.encoders_m.parameters())


def test_the_twin_is_a_copy_without_gradients():
    model = softmask.TaskModel(make_encoders(), 0.9, unused=()).train()
    twin, student = model.encoders_m, model.encoders
    assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), student.parameters(), strict=True))
    twin.image_proj.bias += 1
    assert not torch.equal(twin.image_proj.bias, student.image_proj.bias)
    assert not twin.training and not any(p.requires_grad for p in twin.parameters())
    assert student.training and all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("size", [0, 1, 3, 5, 8])
def test_write_queue_wraps_at_any_length(size):
    """Against a deque that drops its oldest entries; the queue is one in a circle."""
    queue, written, oracle = torch.zeros(size, 2), 0, collections.deque([0] * size, maxlen=size)
    draw = random.Random(size)
    for _ in range(40):
        count = draw.choice([0, 1, 2, 3, 5, 8, 11])
        entries = torch.arange(written + 1, written + count + 1)[:, None].expand(-1, 2)
        oracle.extend(entries[:, 0].tolist())
        softmask.write_queue(queue, written, entries)
        written += count
        oldest = written % max(size, 1)
        assert queue.roll(-oldest, 0)[:, 0].tolist() == list(oracle) and torch.equal(queue[:, 0], queue[:, 1])


def test_enqueue_keeps_the_three_queues_together():
    model = make_model(queue_size=5)
    image_feat, text_feat = randn(3, 8, seed=1), randn(3, 8, seed=2)
    model.enqueue(image_feat, text_feat, torch.tensor([1, 2, 3]))
    assert model.queue_written == 5 + 3
    model.enqueue(image_feat, text_feat, torch.tensor([4, 5, 6]))
    assert model.queue_written == 5 + 6 and model.queue_ids.tolist() == [6, 2, 3, 4, 5]
    assert torch.equal(model.image_queue, image_feat[[2, 1, 2, 0, 1]])
    assert torch.equal(model.text_queue, text_feat[[2, 1, 2, 0, 1]])
    model.enqueue(image_feat, text_feat, None)
    assert model.queue_ids.tolist() == [6, -100, -100, -100, 5]
    empty = make_model(queue_size=0)
    empty.enqueue(image_feat, text_feat, None)
    assert empty.image_queue.shape == (0, 8)
    assert softmask.gather(image_feat) is image_feat  # no process group


def test_what_was_never_written_in_the_queues_is_no_negative():
    """With 3 of 5 entries written the losses are those of a queue of 3, whatever lies in the other two."""
    batch = make_batch()
    full, part = make_model(queue_size=3), make_model(queue_size=5)
    part.load_state_dict({k: v for k, v in full.state_dict().items() if "queue" not in k}, strict=False)
    for name in ("image_queue", "text_queue", "queue_ids"):
        getattr(part, name)[:3] = getattr(full, name)
    part.queue_ids[3:] = batch["image_ids"][0]
    part.queue_written.fill_(3)
    losses = [model(**batch, generator=seeded(0))[0] for model in (full, part)]
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])
    fresh = softmask.PretrainModel(softmask.Encoders(**SIZES), **METHOD)
    assert fresh.queue_written == 0 and (fresh.queue_ids == -100).all()


def test_fresh_weights():
    """Deviations: of the text layers 0.02 at width 768 and inversely as its root, of the ViT width^-0.5."""
    torch.manual_seed(0)
    encoders = softmask.Encoders(**(SIZES | {"vision_width": 64, "vision_heads": 2, "text_width": 192}))
    for name, parameter in encoders.named_parameters():
        std = 0.04 if name.startswith(("text.", "fusion.", "mlm_head.")) else 0.125 if name.startswith("vision.") else None
        if std and parameter.ndim > 1 and parameter.numel() > 2000 and "pos_embed" not in name:
            assert parameter.std().item() == pytest.approx(std, rel=0.1), name
    assert torch.equal(encoders.vision.pos_embed[0, 1:], softmask.sincos_pos_embed(3, 64))
    assert not encoders.vision.pos_embed[0, 0].any() and 0.01 < encoders.vision.cls_token.std() < 0.03


def test_wavelengths_of_sincos_pos_embed():
    """From four grids, of 8 patches here, to four patches."""
    columns = softmask.sincos_pos_embed(8, 16).unflatten(0, (8, 8))[0, :, 8:]  # of a row: 4 sines, 4 cosines
    for i, wavelength in ((0, 32), (3, 4)):
        angle = torch.arange(8) * 2 * math.pi / wavelength
        assert_near(columns[:, [i, 4 + i]], torch.stack([angle.sin(), angle.cos()], 1))


def test_sincos_pos_embed_tells_rows_and_columns_apart():
    """Patches of one row share half the columns, those of one column the other; no two patches are alike."""
    for grid, width in ((4, 16), (3, 10), (8, 128)):
        embed = softmask.sincos_pos_embed(grid, width).unflatten(0, (grid, grid))
        half = 2 * (width // 4)
        assert embed.shape == (grid, grid, width)
        assert (embed[:, :1, :half] == embed[..., :half]).all()
        assert (embed[:1, :, half : 2 * half] == embed[..., half : 2 * half]).all()
        assert len({tuple(patch) for patch in embed.flatten(0, 1).tolist()}) == grid * grid


@pytest.mark.parametrize("value, clamped", [(0.9, 0.5), (0.0, 0.001), (-1.0, 0.001), (0.07, 0.07)])
def test_clamp_temp(value, clamped):
    model = make_model(temp=value)
    model.clamp_temp()
    assert model.temp.item() == pytest.approx(clamped) and model.temp.requires_grad


def test_bf16_autocast_stays_near_float32(monkeypatch):
    model, batch, cams, runs = make_model().train(), make_batch(), [], []
    real = softmask.word_attention
    monkeypatch.setattr(softmask, "word_attention", lambda *args: cams.append(real(*args)) or cams[-1])
    for enabled in (False, True):
        fix_draws(monkeypatch, NEGATIVES, PICKED)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses, _, _ = model(**batch)
        runs.append(losses)
        model.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert model.encoders.fusion.layers[0].cross_attention.key.weight.grad.abs().max() > 0
    for name, loss in runs[0].items():
        assert runs[1][name].dtype == torch.float32
        assert runs[1][name].item() == pytest.approx(loss.item(), rel=0.05), name
    assert all(cam.dtype == torch.float32 and cam.isfinite().all() for cam in cams)
    assert (cams[0] - cams[1]).abs().max() <= 0.1 * cams[0].abs().max()


def test_the_gradient_of_word_attention_is_float32_under_bf16_autocast(monkeypatch):
    found, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: found.append(grad(*args, **kwargs)) or found[-1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        make_model()(**make_batch())
    ((gradient,),) = found
    assert gradient.dtype == torch.float32 and not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_word_attention_of_half_precision(dtype):
    attention = randn(2, 2, 3, 5).to(dtype).requires_grad_()
    slopes = randn(2, 2, 3, 5, seed=1)
    slopes[0, 0, 0, 1] = math.inf
    cam = softmask.word_attention(attention, (attention * slopes.to(dtype)).nan_to_num().float().sum((1, 2, 3)))
    assert cam.dtype == torch.float32 and cam.isfinite().all()
    expected = (attention.float() * slopes.clamp(0)).mean(1)[:, :, 1:]
    assert_near(cam[1], expected[1].detach(), 0.02)


# Augmentation

ORDINARY = torch.arange(5, 1005)


def masking_case():
    """400 captions of 50 tokens: [CLS], 45 pieces, padding."""
    word_ids = torch.full((400, 50), -1)
    word_ids[:, 1:46] = torch.arange(45) // 2
    input_ids = torch.randint(5, 1005, (400, 50), generator=seeded(9))
    input_ids[:, 0], input_ids[:, 46:] = CLS, 0
    return input_ids, word_ids


def test_mask_text_shares():
    input_ids, word_ids = masking_case()
    before = input_ids.clone()
    masked_ids, labels = softmask.mask_text(input_ids, word_ids, MASK, ORDINARY, 0.15, True, seeded())
    chosen, ordinary = labels != -100, word_ids >= 0
    assert torch.equal(input_ids, before)
    assert not (chosen & ~ordinary).any()  # special tokens are never masked
    assert torch.equal(labels[chosen], input_ids[chosen]) and torch.equal(masked_ids[~chosen], input_ids[~chosen])
    assert abs(chosen[ordinary].float().mean() - 0.15) < 0.01
    new, old = masked_ids[chosen], input_ids[chosen]
    drawn = (new != MASK) & (new != old)
    assert abs((new == MASK).float().mean() - 0.8) < 0.03
    assert abs((new == old).float().mean() - 0.1) < 0.03
    assert abs(drawn.float().mean() - 0.1) < 0.03
    assert new[drawn].min() >= 5 and len(new[drawn].unique()) > 0.7 * drawn.sum()


def test_mask_text_draws_from_the_ordinary_ids_alone():
    input_ids, word_ids = masking_case()
    masked_ids, labels = softmask.mask_text(input_ids, word_ids, MASK, torch.tensor([11, 13]), 1.0, True, seeded())
    assert torch.equal(labels != -100, word_ids >= 0)
    changed = masked_ids[masked_ids != input_ids]
    assert set(changed.tolist()) == {MASK, 11, 13}


def test_mask_text_settings():
    input_ids, word_ids = masking_case()
    masked_ids, labels = softmask.mask_text(input_ids, word_ids, MASK, ORDINARY, 0.15, False, seeded())
    assert (masked_ids[labels != -100] == MASK).all() and (labels != -100).any()
    masked_ids, labels = softmask.mask_text(input_ids, word_ids, MASK, ORDINARY, 0.0, True, seeded())
    assert torch.equal(masked_ids, input_ids) and (labels == -100).all()
    draws = [softmask.mask_text(input_ids, word_ids, MASK, ORDINARY, 0.15, True, seeded(s))[0] for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def distort(images, brightness=0.0, contrast=0.0, blur=0.0, hue=0.0, grayscale=0.0, seed=0):
    return softmask.distort_images(images, brightness, contrast, blur, hue, grayscale, seeded(seed))


def test_contrast_is_about_each_images_own_mean_and_hue_turns_both_ways():
    images = torch.full((40, 3, 4, 4), 0.3)
    images[20:] = 0.7
    assert torch.allclose(softmask.distort_images(images, 0, 0.4, 0, 0, 0, seeded()), images, atol=1e-3)
    red = torch.zeros(60, 3, 2, 2)
    red[:, 0] = 1
    turned = softmask.distort_images(red, 0, 0, 0, 0.1, 0, seeded())[:, :, 0, 0]
    assert (turned[:, 1] > 0.1).any() and (turned[:, 2] > 0.1).any()  # towards yellow, towards magenta
    assert turned[:, 1:].max() <= 0.6 + 1e-4  # a tenth of a turn is 36 degrees, yellow is at 60


def test_distortions_off_are_the_identity():
    images = torch.rand(3, 3, 32, 32, generator=seeded())
    assert torch.equal(distort(images), images)


def test_distortions_take_pixels_of_8_bits_and_doubles():
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    settings = {"brightness": 0.4, "contrast": 0.4, "blur": 0.9, "hue": 0.1, "grayscale": 0.5}
    expected = distort(images / 255, **settings)
    for same in (images, images.double() / 255):
        assert_near(distort(same, **settings), expected)


@pytest.mark.parametrize("name", ["brightness", "contrast", "blur", "hue", "grayscale", "all"])
def test_every_distortion(name):
    """Stays in [0, 1], differs from image to image, repeats with the seed, leaves its input alone."""
    images = torch.rand(1, 3, 256, 256, generator=seeded()).expand(6, -1, -1, -1)
    settings = {"brightness": 0.9, "contrast": 0.9, "blur": 0.9, "hue": 0.5, "grayscale": 0.5}
    settings = settings if name == "all" else {name: settings[name]}
    before = images.clone()
    first, again, other = distort(images, **settings), distort(images, **settings), distort(images, **settings, seed=1)
    assert first.shape == images.shape and first.dtype == torch.float32 and torch.equal(images, before)
    assert first.min() >= 0 and first.max() <= 1 + 1e-5
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len({tuple(image.flatten()[:1000].tolist()) for image in first}) >= (2 if name == "grayscale" else 3)


def test_brightness_and_contrast_factors():
    halves = torch.full((300, 3, 4, 4), 0.4)
    halves[..., 2:] = 0.5
    factor = distort(halves, brightness=0.4) / halves
    assert_near(factor, factor[:, :1, :1, :1].expand_as(factor))
    factor = factor[:, 0, 0, 0]
    assert 0.6 <= factor.min() < 0.62 and 1.38 < factor.max() <= 1.4 and abs(factor.mean() - 1) < 0.05
    changed = distort(halves, contrast=0.4)
    assert_near(changed.mean((1, 2, 3)), halves.mean((1, 2, 3)), 1e-3)  # about the mean grey
    factor = (changed[:, 0, 0, 3] - changed[:, 0, 0, 0]) / 0.1
    assert 0.59 <= factor.min() < 0.63 and 1.37 < factor.max() <= 1.41


def test_blur_is_a_gaussian_of_the_stated_widths():
    images = torch.zeros(100, 3, 256, 256)
    images[:, :, 128, 128] = 1
    blurred = distort(images, blur=0.5)
    same = torch.tensor([torch.equal(a, b) for a, b in zip(blurred, images)])
    assert 0.4 < same.float().mean() < 0.65  # half are left out; the least sigmas leave a point a point
    assert torch.allclose(blurred.sum((2, 3)), torch.ones(100, 3), atol=1e-4)
    assert torch.allclose(blurred, blurred.transpose(2, 3), atol=1e-6) and torch.equal(blurred[:, 0], blurred[:, 2])
    row = blurred[:, 0, 128]
    ratio = row[:, 129] / row[:, 128]
    sigma = (-0.5 / ratio[ratio > 1e-6].log()).sqrt()
    assert 0.1 <= sigma.min() and 1.9 < sigma.max() <= 2.001
    wide = ratio > 0.5
    assert torch.allclose(row[wide, 130] / row[wide, 128], ratio[wide] ** 4, rtol=1e-3)
    assert torch.allclose(row[wide, 132] / row[wide, 128], ratio[wide] ** 16, rtol=2e-3)  # where the kernel ends
    flat = torch.full((20, 3, 64, 64), 0.6)  # also at the border
    assert torch.allclose(distort(flat, blur=1.0), flat, atol=1e-5)


def test_hue_and_grayscale():
    gray = torch.rand(4, 1, 8, 8, generator=seeded()).expand(-1, 3, -1, -1)
    assert torch.allclose(distort(gray, hue=0.5), gray, atol=1e-5)
    images = torch.rand(50, 3, 8, 8, generator=seeded())
    turned = distort(images, hue=0.5)
    for extreme in (torch.amax, torch.amin):
        assert torch.allclose(extreme(turned, 1), extreme(images, 1), atol=1e-5)
    flat = (distort(images, grayscale=0.5).amax(1) == distort(images, grayscale=0.5).amin(1)).flatten(1).all(1)
    assert 0.3 < flat.float().mean() < 0.7
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert torch.allclose(distort(images, grayscale=1.0)[:, 0], (images * weights).sum(1), atol=1e-3)


def waves(width=64, height=64):
    """A smooth colour image."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = [128 + 100 * np.sin(x / 9 + k) * np.cos(y / 13 - k) for k in range(3)]
    return Image.fromarray(np.stack(channels, 2).astype(np.uint8))


def warp(image, matrix):
    """OpenCV's warpAffine: pixel p goes to matrix p, bilinear, 128 outside; matrix (2, 3)."""
    source = np.pad(np.array(image, dtype=float), ((1, 1), (1, 1), (0, 0)), constant_values=128)
    height, width = source.shape[0] - 2, source.shape[1] - 2
    grid = np.stack([*np.meshgrid(np.arange(width), np.arange(height)), np.ones((height, width))])
    x, y = np.tensordot(np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2], grid, 1)
    x, y = np.clip(x + 1, 0, width + 0.999), np.clip(y + 1, 0, height + 0.999)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    u, v = (x - left)[..., None], (y - top)[..., None]
    upper = (1 - u) * source[top, left] + u * source[top, left + 1]
    return (1 - v) * upper + v * ((1 - u) * source[top + 1, left] + u * source[top + 1, left + 1])


def rotation(degrees, centre=31.5):
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return [[c, s, centre * (1 - c - s)], [-s, c, centre * (1 - c + s)]]


@pytest.mark.parametrize(
    "name, matrix",
    [
        ("shear_x", lambda sign: [[1, sign * 0.21, 0], [0, 1, 0]]),
        ("shear_y", lambda sign: [[1, 0, 0], [sign * 0.21, 1, 0]]),
        ("translate_x", lambda sign: [[1, 0, sign * 7], [0, 1, 0]]),
        ("translate_y", lambda sign: [[1, 0, 0], [0, 1, sign * 7]]),
        ("rotate", lambda sign: rotation(sign * 21)),
    ],
)
def test_geometric_randaugment_operations(name, matrix):
    """The two directions are ALBEF's two, at level 7 of 10, in either order."""
    image = waves()
    ours = [np.array(softmask.randaugment_op(image, name, sign), dtype=float) for sign in (1, -1)]
    theirs = [warp(image, np.array(matrix(sign), dtype=float)) for sign in (1, -1)]
    distance = np.array([[np.abs(a - b).mean() for b in theirs] for a in ours])
    assert min(distance[0, 0] + distance[1, 1], distance[0, 1] + distance[1, 0]) < 3, distance
    assert distance.max() > 8
    assert all((np.abs(a - 128).max(2) == 0).mean() > 0.05 for a in ours)  # new pixels are grey


def test_photometric_randaugment_operations():
    image = waves()
    pixels = np.array(image, dtype=float)

    def apply(name):
        return np.array(softmask.randaugment_op(image, name, 1), dtype=float)

    assert (apply("identity") == pixels).all()
    assert np.abs(apply("brightness") - np.minimum(pixels * 1.36, 255)).max() <= 1
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(float)
    sharp = np.array(softmask.randaugment_op(Image.fromarray(noise.astype(np.uint8)), "sharpness", 1), dtype=float)
    shifts = [np.roll(noise, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    smooth = (sum(shifts) + 4 * noise) / 13
    expected = np.clip(noise * 1.36 - smooth * 0.36, 0, 255)
    assert np.abs(sharp - expected)[1:-1, 1:-1].max() <= 1.5
    assert (apply("autocontrast").min((0, 1)) == 0).all() and (apply("autocontrast").max((0, 1)) == 255).all()
    dark = Image.fromarray((pixels / 4).astype(np.uint8))
    flat = np.array(softmask.randaugment_op(dark, "equalize", 1))
    shares = np.histogram(flat, bins=4, range=(0, 256))[0] / flat.size
    assert np.abs(shares - 0.25).max() < 0.06
    with pytest.raises(ValueError, match="'solarize'"):
        softmask.randaugment_op(image, "solarize", 1)


@pytest.mark.parametrize("name", softmask.RANDAUGMENT_OPS)
@pytest.mark.parametrize("sign", [1, -1])
def test_every_randaugment_operation_keeps_the_size(name, sign):
    result = softmask.randaugment_op(waves(21, 17), name, sign)
    assert result.size == (21, 17) and result.mode == "RGB"


def augment(image, seed, size=24, crop_min_area=0.2, flip=False, randaugment_ops=2):
    return softmask.augment_image(image, size, crop_min_area, flip, randaugment_ops, seeded(seed))


def test_augment_image_repeats_with_the_seed():
    image = waves(50, 37)
    runs = [[augment(image, seed).tobytes() for seed in range(12)] for _ in range(2)]
    assert runs[0] == runs[1] and len(set(runs[0])) == 12
    assert augment(image, 0).size == (24, 24) and image.size == (50, 37)


def test_augment_image_flip_is_the_mirror_image():
    ramp = Image.fromarray(np.tile(np.arange(0, 250, 5, dtype=np.uint8), (37, 1))).convert("RGB")
    for seed in range(5):
        plain, flipped = (
            np.array(augment(ramp, seed, flip=flip, randaugment_ops=0), dtype=int) for flip in (False, True)
        )
        assert (plain[:, ::-1] == flipped).all() and (plain[:, -1] > plain[:, 0]).all()


def test_augment_image_crops_within_its_bounds(monkeypatch):
    crops, real = [], softmask.TF.crop
    monkeypatch.setattr(softmask.TF, "crop", lambda image, *box: crops.append(box) or real(image, *box))
    image = waves(80, 60)
    for seed in range(400):
        augment(image, seed, crop_min_area=0.5, randaugment_ops=0)
    top, left, height, width = np.array(crops, dtype=float).T
    area, ratio = height * width / 4800, width / height
    assert 0.49 < area.min() < 0.55 and 0.9 < area.max() <= 1
    assert 0.73 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.36
    assert (top >= 0).all() and (left >= 0).all() and (top + height <= 60).all() and (left + width <= 80).all()
    assert len(set(left)) > 10 and len(set(top)) > 5
    squared = augment(Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("RGB"), 0, 4, 1.0, False, 0)
    assert squared.size == (4, 4)


@pytest.mark.parametrize("size", [24, 80, 100])
def test_augment_image_resizes_as_pillow_but_for_rounding(size):
    image = waves(80, 60)
    ours = np.array(augment(image, 0, size, 1.0, False, 0), dtype=int)
    pillow = np.array(image.resize((size, size), Image.Resampling.BICUBIC), dtype=int)
    assert abs(ours - pillow).max() <= 1 and (ours != pillow).mean() < 0.02


def test_augment_image_makes_no_tensor_of_a_large_image(monkeypatch):  # as much memory again, and longer
    made, real = [], softmask.TF.pil_to_tensor
    monkeypatch.setattr(softmask.TF, "pil_to_tensor", lambda image: made.append(image.size) or real(image))
    for image in (waves(1000, 800), large := waves(4000, 3000)):
        result = augment(image, 0, 24, 1.0, False, 0)
    assert made == [(1000, 800)]
    assert result.tobytes() == large.resize((24, 24), Image.Resampling.BICUBIC).tobytes()


def test_crops_lie_anywhere_at_ratios_even_in_their_logarithm():
    left, top, w, h = np.array([softmask.crop_box(80, 60, 0.2, seeded(i)) for i in range(2000)], dtype=float).T
    for place, room in ((left, 80 - w), (top, 60 - h)):
        free = room > 10
        assert abs((place[free] / room[free]).mean() - 0.5) < 0.03
    small = w * h < 0.5 * 4800  # where every ratio fits
    assert abs(np.log(w / h)[small].mean()) < 0.015
    whole = [softmask.crop_box(60, 60, 0.5, seeded(i)) for i in range(400)].count((0, 0, 60, 60))
    assert whole < 20  # where ten tries failed


@pytest.mark.parametrize("size", [(400, 10), (10, 400), (1, 300), (1, 1)])
def test_augment_image_takes_the_centre_of_an_elongated_image(size):
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    image = Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8))
    results = [np.array(augment(image, seed, randaugment_ops=0), dtype=float) for seed in range(6)]
    assert all(result.shape == (24, 24, 3) for result in results)
    if size != (1, 1):
        long_side = results[0][..., 0 if size[0] > size[1] else 1]
        assert abs(long_side.mean() - 127.5) < 3  # no crop fits: the centre, as torchvision's, which ALBEF uses
        assert all((result == results[0]).all() for result in results)


def test_augment_image_applies_half_of_the_operations_drawn(monkeypatch):
    calls = collections.Counter()
    monkeypatch.setattr(softmask, "randaugment_op", lambda image, name, sign: calls.update([(name, sign)]) or image)
    for seed in range(2000):
        augment(waves(8, 8), seed, size=8)
    total = sum(calls.values())
    assert abs(total / 4000 - 0.5) < 0.03
    assert len(calls) == 20 and all(abs(count / total - 0.05) < 0.02 for count in calls.values())


def test_flip_words():
    assert softmask.flip_words("left of the right dog") == "right of the left dog"
    assert softmask.flip_words("leftover bright aright copyright") == "leftover bright aright copyright"
    assert softmask.flip_words("left, right; (left) left-hand") == "right, left; (right) right-hand"
    assert softmask.flip_words("the leftmost dog, not the Rightmost") == "the rightmost dog, not the Leftmost"
    assert softmask.flip_words("LEFT of it, the Right one") == "RIGHT of it, the Left one" and softmask.flip_words("") == ""


# Text


def test_load_tokenizer_reads_a_list_a_file_a_folder_and_ids_by_entry(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (tmp_path / "bom.txt").write_text("\n".join(VOCABULARY), encoding="utf-8-sig")
    for source in (VOCABULARY, str(tmp_path / "vocab.txt"), tmp_path / "vocab.txt", str(tmp_path), tmp_path,
                   str(tmp_path / "bom.txt"), {entry: VOCABULARY.index(entry) for entry in sorted(VOCABULARY)}):
        tokenizer = softmask.load_tokenizer(source)
        assert softmask.vocabulary(tokenizer) == VOCABULARY
        assert softmask.tokenize(tokenizer, ["red dogs"], 9)["input_ids"].tolist() == [[2, 6, 7, 9]]
        assert (tokenizer.pad_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id) == (0, 2, 4)
    tokenizer.save_pretrained(tmp_path / "saved")  # transformers 5 writes no vocab.txt
    assert softmask.vocabulary(softmask.load_tokenizer(str(tmp_path / "saved"))) == VOCABULARY


def test_a_tokenizer_of_the_hub_is_the_one_that_its_checkpoint_gives(monkeypatch):
    cased = BertTokenizer(vocab={entry: i for i, entry in enumerate(VOCABULARY)}, do_lower_case=False)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: cased)
    tokenizer = softmask.load_tokenizer("bert-of-the-hub")
    again = softmask.load_tokenizer(softmask.vocabulary(tokenizer))
    for one in (tokenizer, again):
        assert softmask.tokenize(one, ["Réd dogs"], 9)["input_ids"].tolist() == [[2, 6, 7, 9]]
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda name: types.SimpleNamespace(
        get_vocab=lambda: {"<s>": 0, "<mask>": 1}))
    with pytest.raises(ValueError, match=r"roberta-base is no BERT vocabulary: it lacks .*\[CLS\]"):
        softmask.load_tokenizer("roberta-base")


@pytest.mark.parametrize("absent", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
def test_vocabulary_that_lacks_a_special_token(absent):
    with pytest.raises(ValueError, match=absent.replace("[", r"\[")):
        softmask.load_tokenizer([entry for entry in VOCABULARY if entry != absent])


def test_vocabulary_without_a_word():
    with pytest.raises(ValueError, match="it lacks words"):
        softmask.load_tokenizer([entry for entry in VOCABULARY if entry.startswith("[")])


def test_accents_stay_where_the_vocabulary_has_some():
    for word in ("läuft", "lauft"):
        tokenizer = softmask.load_tokenizer([*VOCABULARY, word])
        assert softmask.tokenize(tokenizer, ["Läuft", "La\u0308uft"], 9)["input_ids"].tolist() == [[2, len(VOCABULARY)]] * 2


def test_tokenizer_that_is_nowhere(monkeypatch):
    def fail(name):
        raise OSError("no network")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(ValueError, match="'no-such-model'.*vocab.txt"):
        softmask.load_tokenizer("no-such-model")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="none.txt': no such file"):
        softmask.load_tokenizer("none.txt")


def test_a_vocabulary_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("\n".join([*VOCABULARY, "läuft"]).encode("latin-1"))
    with pytest.raises(ValueError, match="vocab.txt is no BERT vocabulary: it is not in UTF-8$"):
        softmask.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "entries",
    [
        [entry for entry in VOCABULARY if entry != "[SEP]"],
        VOCABULARY[::-1],
        VOCABULARY + [""],
        VOCABULARY[:8] + ["red"] + VOCABULARY[8:],
    ],
    ids=["no [SEP]", "special tokens last", "empty entry", "an entry twice"],
)
def test_a_checkpoint_keeps_the_ids_of_its_vocabulary(entries):
    """vocabulary and load_tokenizer are inverse, or the vocabulary is refused."""
    try:
        tokenizer = softmask.load_tokenizer(entries)
    except ValueError:
        return
    again = softmask.load_tokenizer(softmask.vocabulary(tokenizer))
    text = " ".join(entry for entry in VOCABULARY if entry.isalpha())
    ids = [softmask.tokenize(t, [text], 99)["input_ids"].tolist() for t in (tokenizer, again)]
    assert ids[0] == ids[1]
    assert max(ids[0][0]) < len(softmask.vocabulary(tokenizer))


def test_tokenize():
    tokenizer = softmask.load_tokenizer(VOCABULARY)
    batch = softmask.tokenize(tokenizer, ["A red dogs", "zebra on the sofas of cats", "", "cat"], 6)
    assert batch["input_ids"].tolist() == [
        [2, 5, 6, 7, 9, 0], [2, 1, 10, 13, 14, 9], [2, 0, 0, 0, 0, 0], [2, 8, 0, 0, 0, 0],
    ]
    assert batch["word_ids"].tolist() == [
        [-1, 0, 1, 2, 2, -1], [-1, 0, 1, 2, 3, 3], [-1] * 6, [-1, 0, -1, -1, -1, -1],
    ]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0], [1] * 6, [1] + [0] * 5, [1, 1] + [0] * 4]
    assert batch["truncated"] == 1
    assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "word_ids", "attention_mask"))


def test_tokenize_at_the_edges():
    tokenizer = softmask.load_tokenizer(VOCABULARY)
    empty = softmask.tokenize(tokenizer, ["", " "], 6)
    assert empty["input_ids"].tolist() == [[2], [2]] and empty["attention_mask"].tolist() == [[1], [1]]
    assert empty["word_ids"].tolist() == [[-1], [-1]] and empty["truncated"] == 0
    assert softmask.tokenize(tokenizer, "a dog", 6)["input_ids"].tolist() == [[2, 5, 7]]  # one text, not its letters
    assert softmask.tokenize(tokenizer, ["a red dog"], 4)["truncated"] == 0
    cut = softmask.tokenize(tokenizer, ["a red dogs"], 4)
    assert cut["input_ids"].tolist() == [[2, 5, 6, 7]] and cut["word_ids"].tolist() == [[-1, 0, 1, 2]]
    assert softmask.tokenize(tokenizer, ["a dog"], 1)["input_ids"].tolist() == [[2]]
    assert softmask.tokenize(tokenizer, ["a red dog"], 1, end=True)["input_ids"].tolist() == [[2, 3]]
    typed = softmask.tokenize(tokenizer, [softmask.clean_caption("A [SEP] [MASK] dog", 9)], 20)["input_ids"]
    assert not {0, 3, 4} & set(typed[0].tolist())  # a caption cannot type special tokens


# A trained model on one's own image and sentence

IMAGE = waves(50, 37)
SENTENCE = "Red dogs, on a SOFA of the left!"  # red, dog ##s, on, a, sofa; cut at 5 words


def write_checkpoint(path, model, **changes):
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    config = {"model": sizes, "method": METHOD, "data": {"max_words": 5}, "pretrain": {"image_size": None, "max_tokens": 9}}
    content = {"model": model.state_dict(), "config": config, "vocab": VOCABULARY, "step": 3, "task": "pretrain", "optimizer": {}}
    torch.save(content | changes, path)


@pytest.fixture
def trained(tmp_path):
    """The model, and what from_pretrained makes of its checkpoint."""
    model = make_model(sizes={"vocab_size": len(VOCABULARY)})
    write_checkpoint(tmp_path / "checkpoint.pt", model)
    return model, softmask.from_pretrained(tmp_path)


def model_inputs():
    """IMAGE and SENTENCE as the model takes them, by hand."""
    pixels = np.array(IMAGE.resize((12, 12), Image.Resampling.BICUBIC), dtype=np.float64) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    image = torch.tensor((pixels - mean) / std).float().permute(2, 0, 1)[None]
    ids = torch.tensor([[2, 6, 7, 9, 10, 5, 14]])
    return {"image": image, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_an_image_of_the_user_stays_as_it_was(trained):
    image = IMAGE.copy()
    image.info["exif"] = b"Exif\0\0"
    trained[1].encode_image(image)
    assert image.info == {"exif": b"Exif\0\0"}


def test_texts_are_cut_at_the_task_s_own_length(tmp_path):
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    tasks = {task: {"image_size": None, "max_tokens": number} for task, number in (("pretrain", 4), ("retrieval", 9))}
    config = {"model": sizes, "method": METHOD, "data": {"max_words": 5}} | tasks
    for task in tasks:
        write_checkpoint(tmp_path / task, make_model(sizes={"vocab_size": len(VOCABULARY)}), config=config, task=task)
        assert softmask.from_pretrained(tmp_path / task).max_tokens == tasks[task]["max_tokens"]


def test_pretrained_features(trained):
    model, pretrained = trained
    inputs = model_inputs()
    image_feat, text_feat = pretrained.encode_image(IMAGE), pretrained.encode_text(SENTENCE)
    text_embeds = model.encoders.encode_text(inputs["input_ids"], inputs["attention_mask"])
    assert_near(image_feat, model.encoders.image_feat(model.encoders.encode_image(inputs["image"]))[0])
    assert_near(text_feat, model.encoders.text_feat(text_embeds)[0])
    for feat in (image_feat, text_feat):
        assert feat.shape == (8,) and feat.norm().item() == pytest.approx(1) and not feat.requires_grad
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # as a phone held upright: stored turned by 90 degrees
    IMAGE.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    assert_near(pretrained.encode_image(Image.open(file)), image_feat)
    rows = struct.pack("<HHHLLHHL4sL", 2, 0x0112, 3, 1, 6, 0x0128, 2, 2, b"2", 0)  # the unit of resolution as text, too
    turned = IMAGE.transpose(Image.Transpose.ROTATE_90)
    for image, exif in ((turned, b"II*\0\10\0\0\0" + rows), (IMAGE, b"garbage")):
        image.save(file := io.BytesIO(), "PNG", exif=b"Exif\0\0" + exif)
        assert_near(pretrained.encode_image(Image.open(file)), image_feat)
    for mode in ("L", "RGBA", "P", "CMYK"):
        assert pretrained.encode_image(IMAGE.convert(mode)).isfinite().all()
    for mode in ("I;16", "I", "F"):  # convert("RGB") would clip them, white or black
        with pytest.raises(ValueError, match=f"image of mode {mode}: give one of 8 bits a channel"):
            pretrained.encode_image(Image.fromarray(np.asarray(IMAGE.convert("L")).astype(
                {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])))


def test_exif_in_the_text_of_a_png_turns_it_whatever_else_it_holds(trained):
    raw = b"Exif\0\0II*\0\10\0\0\0" + struct.pack("<HHHLLHHL4sL", 2, 0x0112, 3, 1, 6, 0x0128, 2, 2, b"2", 0)
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", f"\nexif\n{len(raw):8d}\n{raw.hex()}\n")  # as ImageMagick writes it
    IMAGE.transpose(Image.Transpose.ROTATE_90).save(file := io.BytesIO(), "PNG", pnginfo=text)
    assert_near(trained[1].encode_image(Image.open(file)), trained[1].encode_image(IMAGE))


def test_pretrained_match(trained):
    model, pretrained = trained
    inputs = model_inputs()
    probability, logit = pretrained.match(IMAGE, SENTENCE)
    image_embeds, text_embeds, _, match = positive_pass(model, inputs, None)
    keys_values = model.encoders.image_keys_values(image_embeds)
    fused, _ = model.encoders.fuse(text_embeds, inputs["attention_mask"], keys_values)
    no_match, expected = model.itm_head(fused[0, 0]).tolist()
    assert logit == pytest.approx(expected, rel=1e-4) == pytest.approx(match.item(), rel=1e-4)
    assert probability == pytest.approx(1 / (1 + math.exp(no_match - expected)), rel=1e-4)


def test_match_logits_are_not_rounded_under_autocast(trained):
    """Else those of a hundred images tie, by which images are ranked."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = [trained[1].match(IMAGE, SENTENCE[:end])[1] for end in (3, 8, 14)]
    assert all(torch.tensor(logit).bfloat16().item() != logit for logit in logits)


def test_a_model_loaded_in_inference_mode_has_word_attention(trained, tmp_path):
    with torch.inference_mode():
        _, maps = softmask.from_pretrained(tmp_path).word_attention(IMAGE, SENTENCE)
    assert_near(maps, trained[1].word_attention(IMAGE, SENTENCE)[1])


@pytest.mark.parametrize("layer", [None, 0, 1])
@pytest.mark.parametrize("surrounding", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_pretrained_word_attention(trained, layer, surrounding):
    model, pretrained = trained
    with surrounding():
        words, maps = pretrained.word_attention(IMAGE, SENTENCE, layer)
    assert words == ["red", "dogs", "on", "a", "sofa"]
    assert maps.shape == (5, 3, 3) and maps.dtype == torch.float32 and not maps.requires_grad
    _, _, attention, match = positive_pass(model, model_inputs(), 1 if layer is None else layer)
    cam = softmask.word_attention(attention, match)[0]
    expected = torch.stack([cam[1], (cam[2] + cam[3]) / 2, cam[4], cam[5], cam[6]])
    assert_near(maps, expected.reshape(5, 3, 3), 1e-4)
    assert all(p.grad is None for p in pretrained.model.parameters())


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="PyTorch without MKL")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("turned", [False, True])  # not contiguous: copied
def test_a_large_linear_layer_is_a_convolution_and_gives_the_same(bias, turned):
    layer, x = softmask.Linear(512, 520, bias=bias), randn(4, 256, 512).requires_grad_()
    inputs, weights = x.transpose(0, 1) if turned else x, list(layer.parameters())
    with Operations() as operations:
        out = layer(inputs)
    assert "convolution" in operations.names and not {"mm", "addmm"} & set(operations.names)
    plain, out_grad = F.linear(inputs, layer.weight, layer.bias), randn(*out.shape)
    assert out.is_contiguous() and out.shape == plain.shape
    assert_near(out, plain, 1e-5)
    for found, expected in zip(*(torch.autograd.grad(y, [x, *weights], out_grad) for y in (out, plain)), strict=True):
        assert found.stride() == expected.stride()
        assert_near(found, expected, 1e-5)


@pytest.mark.parametrize("rows, width, new_width, dtype", [
    (1023, 512, 512, torch.float32), (1024, 511, 512, torch.float32), (1024, 512, 511, torch.float32),
    (1024, 512, 512, torch.bfloat16),
])
def test_any_other_linear_layer_is_pytorch_s(rows, width, new_width, dtype):
    layer, x = softmask.Linear(width, new_width).to(dtype), randn(rows, width).to(dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with Operations() as operations:
        layer(x)
    assert "addmm" in operations.names and "convolution" not in operations.names


def test_gelu_linear_of_float32_states_under_autocast():
    x, weight, bias = (randn(*shape).requires_grad_() for shape in ((2, 3, 8), (4, 8), (4,)))
    expected = torch.autograd.grad(F.linear(F.gelu(x), weight, bias).square().sum(), (x, weight, bias))
    with torch.autocast("cpu", torch.bfloat16):
        out = softmask.GeluLinear.apply(x, weight, bias)
    found = torch.autograd.grad(out.float().square().sum(), (x, weight, bias))
    for gradient, other in zip(found, expected):
        assert_near(gradient, other, 0.03)


def test_a_frozen_mlp_makes_no_gradient_of_its_weights():
    mlp, x = softmask.Mlp(8, 32).requires_grad_(False), randn(3, 8).requires_grad_()
    out = mlp(x)
    with Operations() as operations:
        (found,) = torch.autograd.grad(out.square().sum(), x)
    assert operations.names.count("mm") == 2  # of the two layers' inputs
    plain = F.linear(F.gelu(mlp.fc1(x)), mlp.fc2.weight, mlp.fc2.bias)
    assert_near(found, torch.autograd.grad(plain.square().sum(), x)[0])


def test_an_adapter_in_the_place_of_a_linear_layer_is_called():
    class Adapter(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.low = layer, torch.nn.Linear(layer.in_features, layer.out_features)

        def forward(self, x):
            return self.layer(x) + self.low(x)

    block, x = softmask.TextLayer(8, 2, 0.0, image_dim=8), randn(2, 3, 8)
    for name in ("fc1", "fc2"):
        setattr(block.mlp, name, Adapter(getattr(block.mlp, name)))
    for name in ("query", "key", "value", "out"):
        setattr(block.self_attention, name, Adapter(getattr(block.self_attention, name)))
    out, _ = block(x, torch.ones(2, 1, 1, 3, dtype=torch.bool))
    out.square().sum().backward()
    for module in block.modules():
        if isinstance(module, Adapter):
            assert module.low.weight.grad.abs().max() > 0


def test_fresh_weights_of_layers_without_bias():
    layer = torch.nn.Linear(40, 50, bias=False)
    softmask.init_weights(layer, std=0.01)
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes(trained, dtype):
    _, pretrained = trained
    model, batch, expected = make_model(), make_batch(), pretrained.encode_image(IMAGE)
    losses = [model.to(kind)(**batch | {"image": batch["image"].to(kind)}, generator=seeded())[0]["itc"].item()
              for kind in (torch.float32, dtype)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if dtype == torch.float64 else 0.05)
    pretrained.model.to(dtype)
    assert_near(pretrained.encode_image(IMAGE), expected, 1e-5 if dtype == torch.float64 else 0.05)


def test_pretrained_with_an_empty_text(trained):
    _, pretrained = trained
    words, maps = pretrained.word_attention(IMAGE, "?!")
    assert words == [] and maps.shape == (0, 3, 3)
    assert 0 <= pretrained.match(IMAGE, "")[0] <= 1 and pretrained.encode_text("").isfinite().all()


def test_from_pretrained_reads_every_weight_and_prefers_the_best(tmp_path, trained):
    model, pretrained = trained
    assert not pretrained.model.training
    loaded = pretrained.model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items() if "queue" not in key)
    best = make_model(seed=8, sizes={"vocab_size": len(VOCABULARY)})
    write_checkpoint(tmp_path / "best.pt", best)
    for path, expected in ((tmp_path, best), (str(tmp_path), best), (tmp_path / "checkpoint.pt", model)):
        assert torch.equal(softmask.from_pretrained(path).model.itm_head.weight, expected.itm_head.weight)


def test_word_attention_of_a_model_trained_without_soft_mask(tmp_path):
    model = make_model(sizes={"vocab_size": len(VOCABULARY)}, soft_mask=False)
    method = METHOD | {"soft_mask": False}
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    config = {"model": sizes, "method": method, "data": {"max_words": 5}, "pretrain": {"image_size": None, "max_tokens": 9}}
    write_checkpoint(tmp_path / "x.pt", model, config=config)
    pretrained = softmask.from_pretrained(tmp_path / "x.pt")
    words, maps = pretrained.word_attention(IMAGE, SENTENCE)
    assert len(words) == 5 and maps.max() > 0


def test_checkpoints_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="best.pt or checkpoint.pt"):
        softmask.from_pretrained(tmp_path)
    for content in (b"", b"no checkpoint"):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(ValueError, match="bad.pt"):
            softmask.from_pretrained(tmp_path / "bad.pt")
    torch.save({"model": {}}, tmp_path / "albef.pt")
    with pytest.raises(ValueError, match="it lacks config, step, task, vocab; .* train.py --start"):
        softmask.from_pretrained(tmp_path / "albef.pt")
    write_checkpoint(tmp_path / "other.pt", make_model(seed=1))  # the vocabulary is shorter than the embedding
    with pytest.raises(ValueError, match=r"text.embeddings.word.weight has shape \(30, 24\)"):
        softmask.from_pretrained(tmp_path / "other.pt")


@pytest.mark.parametrize("task", ["retrieval", "grounding"])
def test_fine_tuning_has_albefs_losses(task):
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    model = softmask.build_model(task, VOCAB_SIZE, sizes, METHOD)
    assert (model.focal_gamma, model.soft_mask, model.mask_text_for) == (0.0, False, None)


@pytest.mark.parametrize("images_per_text, images", [(1, 2), (2, 1), (2, 3)])
def test_another_number_of_images_is_refused(images_per_text, images):
    model = softmask.ClassifierModel(softmask.Encoders(**SIZES, images_per_text=images_per_text), 2, momentum=0.9)
    batch = make_batch()
    with pytest.raises(ValueError, match=f"^{images} images a text, the model takes {images_per_text}$"):
        images = torch.stack([batch["image"]] * images, 1)
        model.logits(model.encoders, images, batch["input_ids"], batch["attention_mask"])


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 1, 12, 12), (2, 3, 12, 8)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"image has shape {shape}, the model takes (B, 3, 12, 12)")):
        make_encoders().encode_image(torch.zeros(shape))


def test_paired_layers_share_keys_and_values_in_student_and_twin():
    model = softmask.ClassifierModel(softmask.Encoders(**SIZES, images_per_text=2), 2, momentum=0.9)
    for encoders in (model.encoders, model.encoders_m):
        layers = [layer.cross_attention for layer in encoders.fusion.layers]
        for first, second in zip(layers[::2], layers[1::2]):
            assert first.key is second.key and first.value is second.value and first.query is not second.query
        assert len({id(layer.key) for layer in layers}) == len(layers) // 2


def test_vqa_loss_reaches_every_part():
    model = softmask.VqaModel(make_encoders(dropout=0.0), 2, momentum=0.9)
    batch, answers = make_batch(), torch.tensor([[CLS, 7, 3], [CLS, 9, 3], [CLS, 8, 3]])
    question = batch["image"], batch["input_ids"], batch["attention_mask"]
    rest = answers, torch.ones_like(answers), torch.tensor([0, 2, 3]), torch.tensor([1.0, 0.5, 0.5])
    with torch.enable_grad(), Operations() as operations:
        losses, _ = model(*question, *rest, 0.4)
        losses["vqa"].backward()
    assert "wait" in operations.names and "wait" not in operations.names[operations.names.index("convolution"):]
    for part in ("vision", "text", "fusion", "decoder"):
        gradients = [p.grad for p in getattr(model.encoders, part).parameters() if p.grad is not None]
        assert gradients and max(gradient.abs().max() for gradient in gradients) > 0, part
    assert all(p.grad is None for name in model.unused for p in getattr(model.encoders, name).parameters())


def test_what_a_docstring_says_to_copy_is_all_that_is_needed():
    with open(softmask.__file__, encoding="utf-8") as file:
        nodes = ast.parse(file.read()).body
    defined = {node.name: node for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in nodes:
        if isinstance(node, ast.Assign):
            defined |= {name.id: node for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}

    def needed(name):
        found, new = set(), {name}
        while new:
            found |= new
            parts = [part.id for known in new for part in ast.walk(defined[known]) if isinstance(part, ast.Name)]
            new = (set(parts) & set(defined)) - found
        return found - {name}

    whole = {  # models, and what makes, reads or writes them: these need the module
        "Encoders", "TaskModel", "PretrainModel", "ClassifierModel", "TextAssignmentModel", "VqaModel", "build_model",
        "export_albef", "pair_layers", "start_decoder", "load_weights", "load_deit", "load_bert", "load_start",
        "Pretrained", "load_trained", "from_pretrained",
    }
    documented = {name: node for name, node in defined.items() if not isinstance(node, ast.Assign)}
    assert whole < documented.keys()
    for name in documented.keys() - whole:
        lists = re.search(r"Copy with: ([^.]*)\.", " ".join((ast.get_docstring(documented[name]) or "").split()))
        assert needed(name) == set(lists[1].split(", ") if lists else ()), name
