"""Our numbers against those of ALBEF's official code, at tiny size. golden/README.md says what each file holds.

GOLDEN=<folder> python -m pytest tests/test_golden.py checks against another set; every dimension is read from it.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import eval as evaluation
import softmask

GOLDEN = Path(os.environ.get("GOLDEN", Path(__file__).parent / "golden"))
torch.backends.cudnn.allow_tf32 = False


def assert_near(ours, golden, tolerance=1e-5):
    """max|a - b| <= tolerance * max|b|"""
    assert ours.shape == golden.shape
    error, scale = (ours.double() - golden.double()).abs().max(), golden.double().abs().max()
    assert error <= tolerance * scale, f"off by {error:.3g}, largest value {scale:.3g}"


def load(name):
    settings = json.loads((GOLDEN / f"{name}.json").read_text())
    state, io = load_file(GOLDEN / f"{name}.state.safetensors"), load_file(GOLDEN / f"{name}.io.safetensors")
    return settings, state, io


def build(settings, state, task="retrieval"):
    """The model of a task with every innovation off, at the golden set's dimensions and weights; "albef": pre-training."""
    embeddings = next(value for key, value in state.items() if key.endswith("position_embeddings.weight"))
    model = {
        "image_size": settings["image_size"],
        "patch_size": settings["patch"],
        "vision_width": settings["width"],
        "vision_layers": settings["vision_layers"],
        "vision_heads": settings["heads"],
        "text_width": settings["width"],
        "text_layers": settings["fusion_layer"],
        "fusion_layers": (settings["bert_layers"] - settings["fusion_layer"]) // (2 if task == "nlvr2" else 1),
        "text_heads": settings["heads"],
        "max_positions": len(embeddings),
        "embed_dim": settings["embed_dim"],
        "dropout": settings["dropout"],
    }
    method = {"queue_size": settings["queue"], "momentum": settings["momentum"], "temp": 0.07, "attention_layer": None}
    method |= {"soft_mask": False, "soft_mask_negatives": False, "focal_gamma": 0.0, "mask_text_for": "mlm"}
    if task == "vqa":  # its decoder has a number of layers of its own
        encoders = softmask.Encoders(settings["vocab"], **model)
        built = softmask.VqaModel(encoders, settings["decoder_layers"], settings["momentum"])
    else:
        built = softmask.build_model("pretrain" if task == "albef" else task, settings["vocab"], model, method)
    fresh, left = softmask.load_start(built, state)
    task_leaves_alone = tuple(f"encoders.{name}." for name in built.unused)
    assert not left and all(key.startswith(task_leaves_alone) for key in fresh), (left, fresh)
    if "image_queue" in state:
        built.image_queue.copy_(state["image_queue"].T)
        built.text_queue.copy_(state["text_queue"].T)
        built.queue_written.copy_(state["queue_ptr"][0] + settings["queue"])  # full, as ALBEF's queues always are
    if "idx_queue" in state:
        built.queue_ids.copy_(state["idx_queue"][0])
    return built


def word_ids(batch):
    return torch.where(batch["attention_mask"].bool(), torch.arange(batch["input_ids"].shape[1]), -1)


def step(model, io, alpha, monkeypatch, prefix="", clean_teacher=True):
    """EMA, one forward and backward pass on the golden batch with its masking and negatives, enqueue; the losses."""
    batch = {key.removeprefix(prefix): value for key, value in io.items() if key.startswith(prefix)}
    valid = torch.ones(len(batch["image"]), dtype=torch.bool)
    drawn = iter([(batch["negative_image"], valid), (batch["negative_text"], valid)])
    monkeypatch.setattr(softmask, "hard_negatives", lambda *_: next(drawn))
    ids = batch["input_ids"]
    unmasked = torch.full_like(ids, -100)
    model.train()
    model.clamp_temp()
    model.update_twin()
    losses, _, features = model(
        batch["image"],
        ids,
        batch["attention_mask"],
        batch.get("masked_ids", ids),
        batch.get("mlm_labels", unmasked),
        word_ids(batch),
        batch.get("image_id"),
        alpha,
        clean_image=batch["image"] if clean_teacher else None,
    )
    model.zero_grad()
    sum(losses.values()).backward()
    model.enqueue(*features)
    return losses


def lookup(model, name, gradient=False):
    """Our tensor of ALBEF's parameter name, or its gradient; query, key and value joined where ALBEF fuses them."""
    parameters = dict(model.named_parameters())
    marker = torch.empty(3, 1)  # a tensor that survives the cut of qkv
    ours = [parameters[key] for key in softmask.rename_albef({name: marker}, len(model.encoders.text.layers))]
    ours = [parameter.grad for parameter in ours] if gradient else ours
    return torch.cat(ours) if len(ours) > 1 else ours[0]


def test_pretrain_forward():
    settings, state, io = load("pretrain")
    model = build(settings, state, "albef").eval()
    encoders, mask = model.encoders, io["attention_mask"]
    with torch.no_grad():
        image_embeds = encoders.encode_image(io["image"])
        text_embeds = encoders.encode_text(io["input_ids"], mask)
        fused, _ = encoders.fuse(text_embeds, mask, encoders.image_keys_values(image_embeds))
        assert_near(image_embeds, io["image_embeds"])
        assert_near(text_embeds, io["text_embeds"])
        assert_near(fused, io["fusion"])
        assert_near(model.itm_head(fused[:, 0]), io["itm_logits"])
        masked_embeds = encoders.encode_text(io["masked_ids"], mask)
        masked_fused, _ = encoders.fuse(masked_embeds, mask, encoders.image_keys_values(image_embeds))
        assert_near(encoders.mlm_logits(masked_fused), io["mlm_logits"])


@pytest.mark.parametrize("clean_teacher", [True, False])  # the same, where no image is distorted
def test_pretrain_step(monkeypatch, clean_teacher):
    settings, state, io = load("pretrain")
    model = build(settings, state, "albef")
    losses = step(model, io, settings["alpha"], monkeypatch, clean_teacher=clean_teacher)
    for name in ("mlm", "itc", "itm"):
        assert_near(losses[name], io[f"loss_{name}"])
    gradients = [key for key in io if key.startswith("grad.")]
    assert gradients
    for key in gradients:
        assert_near(lookup(model, key.removeprefix("grad."), gradient=True), io[key], 1e-4)
    assert_near(model.image_queue.T, io["after.image_queue"])
    assert_near(model.text_queue.T, io["after.text_queue"])
    assert model.queue_written % len(model.image_queue) == io["after.queue_ptr"][0]
    twins = [key for key in io if key.startswith("after.") and "_m." in key]
    assert twins
    for key in twins:
        assert_near(lookup(model, key.removeprefix("after.")), io[key])


def test_gradcam_of_every_fusion_layer():
    settings, state, io = load("pretrain")
    model = build(settings, state, "albef").eval()
    encoders, mask = model.encoders, io["attention_mask"]
    for layer in range(settings["bert_layers"] - settings["fusion_layer"]):
        image_embeds = encoders.encode_image(io["image"])
        text_embeds = encoders.encode_text(io["input_ids"], mask)
        fused, attention = encoders.fuse(
            text_embeds, mask, encoders.image_keys_values(image_embeds), attention_layer=layer
        )
        match = model.itm_head(fused[:, 0])[:, 1]
        (gradient,) = torch.autograd.grad(match.sum(), attention, retain_graph=True)
        block = f"layer{settings['fusion_layer'] + layer}"
        golden_attention, golden_gradient = io[f"gradcam.attention.{block}"], io[f"gradcam.gradient.{block}"]
        cam = softmask.word_attention(attention, match)
        golden_cam = (golden_attention * golden_gradient.relu()).mean(1)[:, :, 1:]
        for rows in (slice(0, 1), slice(1, None)):  # [CLS], and the words, whose gradients are a hundred times smaller
            assert_near(attention[:, :, rows], golden_attention[:, :, rows])
            assert_near(gradient[:, :, rows], golden_gradient[:, :, rows])
            assert_near(cam[:, rows], golden_cam[:, rows])


def test_three_steps_with_a_queue_that_wraps(monkeypatch):
    settings, state, io = load("steps")
    model = build(settings, state, "albef")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=settings["learning_rate"])
    for n in range(3):
        losses = step(model, io, settings["alpha"], monkeypatch, f"{n}.")
        assert_near(torch.stack([losses["mlm"], losses["itc"], losses["itm"]]), io[f"{n}.losses"])
        assert_near(model.image_queue.T, io[f"{n}.image_queue"])
        assert model.queue_written % len(model.image_queue) == io[f"{n}.queue_ptr"][0]
        optimizer.step()
    assert_near(model.text_queue.T, io["end.text_queue"])
    for key in (key for key in io if key.startswith("end.") and key != "end.text_queue"):
        name = key.removeprefix("end.")
        assert_near(model.temp if name == "temp" else lookup(model, name), io[key])


def test_retrieval_losses_with_an_image_twice(monkeypatch):
    settings, state, io = load("retrieval")
    model = build(settings, state)
    losses = step(model, io, settings["alpha"], monkeypatch)
    assert_near(losses["itc"], io["loss_itc"])
    assert_near(losses["itm"], io["loss_itm"])
    assert losses.keys() == {"itc", "itm"}
    assert torch.equal(model.queue_ids, io["after.idx_queue"][0])
    assert model.queue_written % len(model.image_queue) == io["after.queue_ptr"][0]


@pytest.mark.parametrize("task", ["nlvr2", "entailment"])
def test_classification(task):
    settings, state, io = load(task)
    model = build(settings, state, task).eval()
    image = io["image"]
    if task == "nlvr2":
        image = torch.stack(image.chunk(2), dim=1)
    text = io["input_ids"], io["attention_mask"]
    assert_near(model.logits(model.encoders, image, *text), io["logits"])
    model.train().update_twin()
    losses, _ = model(image, *text, io["target"], settings["alpha"])
    assert_near(losses["cls"], io["loss"])


def test_vqa():
    settings, state, io = load("vqa")
    model = build(settings, state, "vqa").eval()
    question = io["image"], io["input_ids"], io["attention_mask"]
    index, probs = model.rank_answers(*question, io["candidate_ids"], io["candidate_mask"], settings["k_test"])
    assert torch.equal(index, io["topk_ids"])
    assert_near(probs, io["topk_probs"])
    model.train().update_twin()
    answer_question = torch.repeat_interleave(io["answers_per_question"])
    answers = io["answer_ids"], io["answer_mask"], answer_question, io["answer_weight"]
    losses, _ = model(*question, *answers, settings["alpha"])
    assert_near(losses["vqa"], io["loss"])


@pytest.mark.parametrize("task", ["pretrain", "retrieval", "vqa", "nlvr2", "entailment"])
def test_export_gives_back_albefs_checkpoint(task):
    settings, state, _ = load(task)
    exported = softmask.export_albef(build(settings, state, "albef" if task == "pretrain" else task))
    assert exported.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(exported[name], tensor), name


def test_position_embedding_resize():
    io = load_file(GOLDEN / "pos_embed.safetensors")
    grid = int((io["resized"].shape[1] - 1) ** 0.5)
    assert_near(softmask.resize_pos_embed(io["pos_embed"], grid), io["resized"])
    assert softmask.resize_pos_embed(io["pos_embed"], int((io["pos_embed"].shape[1] - 1) ** 0.5)) is io["pos_embed"]


@pytest.mark.parametrize("kind", ["caption", "question"])
def test_cleaning(kind):
    golden = json.loads((GOLDEN / "text.json").read_text())
    clean = {"caption": softmask.clean_caption, "question": softmask.clean_question}[kind]
    for raw, expected in golden[kind]:
        assert clean(raw, golden["max_words"]) == expected


def test_retrieval_metrics():
    golden = json.loads((GOLDEN / "retrieval_metrics.json").read_text())
    image_to_text, text_to_image = torch.tensor(golden["image_to_text"]), torch.tensor(golden["text_to_image"])
    image_of_text = torch.arange(len(text_to_image)) // golden["captions_per_image"]
    metrics = evaluation.retrieval_metrics(image_to_text, text_to_image, image_of_text)
    assert metrics.keys() == golden["metrics"].keys()
    for name, value in golden["metrics"].items():
        assert metrics[name] == pytest.approx(value, rel=1e-6)


def test_features_have_length_one():
    settings, state, io = load("pretrain")
    encoders = build(settings, state, "albef").encoders
    feat = encoders.text_feat(encoders.encode_text(io["input_ids"], io["attention_mask"]))
    assert_near(feat, F.normalize(feat, dim=1))
