"""train.py by its command line: several processes, kill and resume, bad input, the paper's scale."""
import dataclasses
import errno
import json
import math
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
import torch.distributed.run
from PIL import Image
from transformers import BertForMaskedLM

import commands
import data
import eval as evaluation
import paper
import softmask
import train
from commands import (
    FEW_LAYERS, NO_EVALUATION, SPY, TIMES, TINY, TORCHRUN, Command, assert_close, assert_same, assert_same_run,
    kill_at_lines, load, log_without_times, read_log, run,
)
from test_data import write_shard
from test_softmask import bert_config, make_model, random_deit, randomise

PAIR = ["pretrain.batch_size=4", "model.dropout=0.0", NO_EVALUATION]  # 12 steps of two processes with 4 pairs
WORDS = "method.words_first=0.4"  # 4 of 12 steps
WATCHED = ("txt_r1", "img_r1")  # fields of the log that eval_every_steps adds


# Schedule and parameter groups


def test_learning_rate_by_hand():
    task = types.SimpleNamespace(lr=1.0, warmup_lr=0.2, warmup_steps=4, min_lr=0.1)
    rates = [train.lr_at(step, 12, task) for step in (0, 1, 3, 4, 8, 12)]
    assert rates == pytest.approx([0.2, 0.4, 0.8, 1.0, 0.55, 0.1])
    assert train.lr_at(6, 12, task) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert train.lr_at(0, 12, types.SimpleNamespace(lr=1.0, warmup_lr=0.2, warmup_steps=0, min_lr=0.0)) == 1.0


def test_parameter_groups_spare_from_weight_decay_and_give_the_image_encoder_and_temperature_their_own_rates():
    rates = ["pretrain.vision_lr=1e-5", "pretrain.temp_lr=2e-5", "pretrain.lr=1e-4", "pretrain.muon_lr=3e-4"]
    config = data.load_config("scenes", [*TINY, *rates])
    settings = data.config_to_dict(config)
    model = softmask.build_model("pretrain", 30, settings["model"], settings["method"])
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("encoders_m") for name in trained)
    groups = train.parameter_groups(model, config.pretrain)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(found) == len(trained) == sum(len(group["params"]) for group in groups)
    for name, parameter in trained.items():
        spared = name == "temp" or re.search(r"(bias|pos_embed|cls_token|position\.weight|norm\d?\.weight)$", name)
        group, scale = found[id(parameter)], 0.2 if name == "temp" else 0.1 if ".vision." in name else 1.0
        muon = re.search(
            r"patch_embed\.weight$|\.(layers|blocks)\.\d+\.((self_|cross_)?att(n|ention)\.\w+|mlp\.fc\d)\.weight$", name
        )
        assert group["muon"] == bool(muon), name
        scale *= 3 if muon else 1
        assert group["weight_decay"] == (0.0 if spared else config.pretrain.weight_decay), name
        assert group["lr_scale"] == pytest.approx(scale), name
    alike = train.parameter_groups(model, dataclasses.replace(config.pretrain, vision_lr=None, muon_lr=None))
    assert sorted({group["lr_scale"] for group in alike}) == [pytest.approx(0.2), 1.0]
    assert not any(group["muon"] for group in alike)


def test_orthogonal_keeps_the_singular_vectors_and_makes_the_singular_values_alike():
    torch.manual_seed(0)
    for rows, columns in ((16, 16), (16, 48), (48, 16)):
        left, right = (torch.linalg.qr(torch.randn(3, size, 16))[0] for size in (rows, columns))
        values = torch.logspace(-1.5, 1, 16)
        found = train.orthogonal(left * values @ right.mT)
        inner = left.mT @ found @ right
        found_values = inner.diagonal(dim1=1, dim2=2)
        assert found_values.min() > 0.6 and found_values.max() < 1.25
        torch.testing.assert_close(inner, torch.diag_embed(found_values), rtol=0, atol=1e-4)
        torch.testing.assert_close(left @ inner @ right.mT, found, rtol=0, atol=1e-4)
    assert torch.equal(train.orthogonal(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_the_optimizer_is_muon_for_its_matrices_and_adamw_for_the_rest():
    """Against torch's own, whose Muon iterates in bfloat16 and takes no kernels: flat ones are given to it."""
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 24), (8, 8), (24, 8), (24, 2, 2, 2), (5,), (6, 8), (8, 8)]
    start = [torch.randn(shape) for shape in shapes]
    ours = [torch.nn.Parameter(value.clone()) for value in start]
    theirs = [torch.nn.Parameter(value.flatten(1).clone() if value.ndim == 4 else value.clone()) for value in start]
    groups = [{"params": ours[:5], "muon": True, "weight_decay": 0.1, "lr": 0.02},
              {"params": ours[5:], "muon": False, "weight_decay": 0.2, "lr": 0.01}]
    optimizer = train.Optimizer(groups, fused=True)
    optimizer.make_moments()
    assert [parameter in optimizer.state for parameter in ours] == [False] * 5 + [True] * 3
    muon = torch.optim.Muon(theirs[:5], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(theirs[5:], lr=0.01, weight_decay=0.2, fused=True)
    for step in range(6):
        if step == 3:  # by way of a checkpoint
            state = optimizer.state_dict()
            optimizer = train.Optimizer(groups, fused=True)
            optimizer.load_state_dict(state)
            optimizer.make_moments()  # leaves what is there
        before = [parameter.detach().clone() for parameter in theirs[:5]]
        for one, other in zip(ours, theirs):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.view(other.shape).clone()
        ours[2].grad = theirs[2].grad = None if step == 4 else ours[2].grad  # a part that took no part
        for one in (optimizer, muon, adamw):
            one.step()
        for one, other, start in zip(ours[:5], theirs[:5], before):
            other, start = other.view(one.shape), start.view(one.shape)
            assert (one - other).norm() <= 0.05 * (other - start).norm() + 1e-7
            with torch.no_grad():
                one.copy_(other)
        assert all(map(torch.equal, ours[5:], theirs[5:]))


# A short run, as users type it


def test_loss_falls_and_files_are_whole(trained):
    log = read_log(trained.out)
    assert [line["step"] for line in log] == [10, 20, 30, 40, 50, 60]
    assert log[-1]["loss_mlm"] < 0.8 * log[0]["loss_mlm"] and log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["epoch"] == 5 and log[-1]["bad_images"] == 0 and 0 < log[-1]["mask_mean"] < 1
    for name in log[-1]:
        assert re.search(rf"\b{name}\b", train.__doc__), f"{name} of log.jsonl is not defined"
    metrics = json.loads(pathlib.Path(trained.out, "metrics.json").read_text())
    assert metrics.keys() == {"task", "scale", "seed", "step", "settings", "platform", "metrics"}
    assert (metrics["task"], metrics["scale"], metrics["seed"], metrics["step"]) == ("pretrain", "scenes", 42, 60)
    assert metrics["metrics"].keys() == {"zero_shot", "reranked", "pointing", "foils"}
    assert metrics["metrics"]["zero_shot"].keys() >= {"txt_r1", "txt_r5", "txt_r10", "img_r1", "img_r5", "img_r10"}
    assert data.config_from_dict(metrics["settings"]).pretrain.epochs == 5
    checkpoint = load(trained.out)  # with weights_only
    assert {"model", "optimizer", "step", "epoch", "config", "vocab", "versions", "commit"} <= checkpoint.keys()
    assert checkpoint["model"].keys() >= {"image_queue", "text_queue", "queue_ids", "queue_written", "temp"}
    assert "re-ranked by ITM" in trained.stdout and "Traceback" not in trained.stderr
    assert not [name for name in os.listdir(trained.out) if name.endswith(".partial")]
    with Image.open(os.path.join(trained.out, "masks.png")) as sheet:
        assert sheet.format == "PNG"


def test_masks_are_drawn_of_files_without_boxes_too(tmp_path):
    """Of the user's own: a row of the sheet is as wide as its caption has words."""
    arguments = [*TINY, "pretrain.epochs=0", "data.pretrain_files=[no.json]", "data.grounding_boxes=null",
                 "data.foils=null", "eval.pictures=2"]
    assert run(tmp_path, "train.py", "--out", tmp_path, *arguments).status == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"].keys() == {"zero_shot", "reranked"}
    config = data.resolve_scenes(data.load_config("scenes", TINY)).data
    _, captions, image_of_text = data.load_retrieval(config.retrieval_sets["scenes"].test, config.pretrain_image_root, 30)
    firsts = [captions[list(image_of_text).index(image)] for image in range(2)]
    with Image.open(tmp_path / "masks.png") as sheet:
        assert sheet.size[0] == max(1 + len(text.split()) for text in firsts) * (192 + 4) + 4


@pytest.mark.parametrize("vision_lr", ["1e-7", "null"])
def test_an_image_encoder_held_still_without_weights_is_named(vision_lr, tmp_path):
    arguments = [*TINY, NO_EVALUATION, "pretrain.epochs=0", f"pretrain.vision_lr={vision_lr}"]
    out = run(tmp_path, "train.py", "--out", tmp_path, *arguments).out
    warning = "image encoder starts from nothing, with a learning rate of 1e-07: give model.vision_weights, or "
    assert (warning in out) == (vision_lr != "null")


@pytest.mark.parametrize("setting, line", [
    ("method.words_first=0.75", "pretrain.warmup_steps (3) are no fewer than its steps (9, then 3): lr is never reached"),
    ("method.words_first=0.5", None),
    ("method.words_first=0", None),
    ("pretrain.batch_size=1", "pretrain.batch_size is 1: without another pair in the batch ITM learns from matches alone"),
])
def test_a_schedule_or_batch_that_can_hardly_be_meant_is_named(setting, line, tmp_path):
    arguments = [*TINY, NO_EVALUATION, "data.scenes.train=12" if "batch" in setting else "pretrain.warmup_steps=3", setting]
    result = run(tmp_path, "train.py", "--out", tmp_path, *arguments)
    assert result.status == 0
    said = [text for text in result.out.splitlines() if text.startswith("pretrain.")]
    assert said == ([] if line is None else [line])


@pytest.mark.parametrize("setting, said", [(WORDS, True), ("method.words_first=0", False)])
def test_words_first_from_trained_weights_is_named(setting, said, finished, tmp_path):
    out = tmp_path / "out"
    command = ["train.py", "--start", finished, "--out", out, *TINY, NO_EVALUATION, setting]
    line = "method.words_first: the first 4 steps train a trained image encoder on words alone; method.words_first=0 leaves them out"
    assert (line in run(tmp_path, *command).out) == said
    assert "method.words_first:" not in run(tmp_path, *command).out  # finished


def test_finished_run_says_so_and_fresh_starts_over(trained, tmp_path):
    log, temp = pathlib.Path(trained.out, "log.jsonl").read_text(), load(trained.out)["model"]["temp"]
    again = run(tmp_path, "train.py", "--out", trained.out, *trained.arguments)
    assert again.status == 0 and "finished:" in again.out and "60 of 60" in again.out
    assert log == pathlib.Path(trained.out, "log.jsonl").read_text() and temp == load(trained.out)["model"]["temp"]
    assert trained.stdout[trained.stdout.index("retrieval"):] in again.out  # the same figures
    out = tmp_path / "out"
    short = ["train.py", "--out", out, *TINY, NO_EVALUATION, "checkpoint_every_steps=12"]
    assert run(tmp_path, *short).status == 0
    log, written = pathlib.Path(out, "log.jsonl"), pathlib.Path(out, "checkpoint.pt").stat().st_mtime_ns
    log.write_text(log.read_text().replace('"step": 1,', '"step": 1, "old": true,'))
    result = run(tmp_path, *short, "--fresh")
    assert result.status == 0 and "finished:" not in result.out and "goes on" not in result.out
    assert len(read_log(out)) == 12 and "old" not in read_log(out)[0]  # it did train
    assert pathlib.Path(out, "checkpoint.pt").stat().st_mtime_ns > written


@pytest.mark.parametrize("settings", [
    ["method.soft_mask=false", "method.focal_gamma=0", "method.mask_text_for=mlm", "method.distort_brightness=0",
     "method.distort_contrast=0", "method.distort_blur=0", "method.image_ids=false"],  # ALBEF
    ["method.soft_mask_negatives=false", "method.distort_hue=0.1", "method.distort_grayscale=0.3",
     "pretrain.randaugment_ops=2", "precision=bf16", "pretrain.accumulation=2", "model.dropout=0.1"],
    ["method.queue_size=0", WORDS, "pretrain.vision_lr=2e-3", "pretrain.muon_lr=null"],
    ["method.soft_mask=false", "model.fusion_layers=1", "method.queue_size=3"],  # no layer with word attention
])
def test_other_settings_run(settings, tmp_path):
    result = run(tmp_path, "train.py", "--out", tmp_path, *TINY, *settings)
    assert result.status == 0, result.err
    lines = read_log(tmp_path)
    words_only = 4 if WORDS in settings else 0
    for i, line in enumerate(lines):
        assert ("loss_words" in line) == (i < words_only) and ("loss_itc" in line) == (i >= words_only)
        assert ("loss_soft_itm" in line) == (i >= words_only and "method.soft_mask=false" not in settings)
        assert all(math.isfinite(value) for value in line.values())


@pytest.mark.parametrize("clean", [True, False])
def test_a_clean_teacher_is_given_the_image_before_its_distortion(clean):
    config = data.load_config("scenes", [f"method.clean_teacher={str(clean).lower()}"])
    images, shape = torch.rand(4, 3, 16, 16), (4, 6)
    batch = {"input_ids": torch.full(shape, 7), "attention_mask": torch.ones(shape), "image_ids": torch.arange(4),
             "word_ids": torch.arange(6).expand(shape)}
    seen = train.pretrain_losses(lambda *given: given, images, batch, config, (4, torch.tensor([8])), 0.4, None)
    assert not torch.allclose(seen[0], softmask.normalize(images), atol=0.01)
    assert torch.equal(seen[-1], softmask.normalize(images)) if clean else seen[-1] is None


# What the loop does, written out once more


def test_the_loop_by_hand(tmp_path):
    """Words first, rates of the groups, clipping, temperature, twin before the step, queue: to the bit."""
    arguments = [*TINY, NO_EVALUATION, WORDS, "pretrain.clip_norm=0.1", "pretrain.vision_lr=1e-4", "pretrain.temp_lr=0.3",
                 "pretrain.max_tokens=5", "method.momentum=0.9", "method.queue_size=2000", "method.itm_weight=0.3", "seed=7",
                 "checkpoint_every_steps=1000"]  # so that the end of the epoch is what saves it
    train.main(["--out", str(tmp_path), *arguments])
    config = data.resolve_scenes(data.load_config("scenes", arguments))
    task, settings = data.task_settings(config, "pretrain"), data.config_to_dict(config)
    tokenizer = softmask.load_tokenizer(config.data.tokenizer)
    torch.manual_seed(data.hash63("weights", 7))
    method = settings["method"] | {"queue_size": 24}  # a quarter of the records
    model = softmask.build_model("pretrain", len(tokenizer), settings["model"], method).train()
    optimizer = train.Optimizer(train.parameter_groups(model, task), lr=task.lr, fused=True)
    order = data.ShuffledBatches(96, 8, 1, 0, 1, 7, 0)
    loader = data.make_loader(data.training_set(config, "pretrain"), order, tokenizer, task.max_tokens, 0)
    special = tokenizer.mask_token_id, torch.arange(5, len(tokenizer))
    for step, batch in zip(range(12), loader):
        words, temp = step < 4, model.temp.item()
        rate = train.lr_at(step, 4, task) if words else train.lr_at(step - 4, 8, task)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        model.temp.data.clamp_(0.001, 0.5)
        for twin, student in zip(model.encoders_m.parameters(), model.encoders.parameters()):
            twin.data.lerp_(student.data, 1 - 0.9)
        optimizer.zero_grad()
        alpha = 0.4 * step / 12
        losses, _, features = train.task_losses("pretrain", model, batch, config, special, alpha, (7, step, 0), words)
        if not words:
            losses["itm"], losses["soft_itm"] = 0.3 * losses["itm"], 0.3 * losses["soft_itm"]
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.1)
        optimizer.step()
        if not words:
            model.enqueue(*features)
    assert temp != model.temp.clamp(0.001, 0.5)  # there was something to clamp
    assert_same(dict(model.state_dict()), load(tmp_path)["model"])
    assert all(line["truncated"] == 1 for line in read_log(tmp_path))


@pytest.fixture(scope="module")
def one_batch():
    """A config of the scenes, a function that makes six records of a task a batch, and what mask_text needs."""
    config = data.resolve_scenes(data.load_config("scenes", TINY))
    tokenizer = softmask.load_tokenizer(config.data.tokenizer)

    def make(task):
        loader = data.make_loader(data.training_set(config, task), [[(0, i) for i in range(6)]], tokenizer, 25, 0)
        return {name: value for name, value in next(iter(loader)).items() if isinstance(value, torch.Tensor)}

    return config, make, (tokenizer.mask_token_id, torch.arange(5, len(tokenizer)))


def test_what_pre_training_is_given(one_batch):
    """Draws that depend on seed, step and micro-batch; pixels from 0 to 1, normalised; precision; ids if asked for."""
    _, make, special = one_batch
    batch, casts = make("pretrain"), []

    def model(*arguments):
        casts.append(torch.is_autocast_enabled("cpu"))
        return arguments

    def given(seeds, *overrides):
        config = data.load_config("scenes", [*TINY, "method.mlm_probability=0.5", *overrides])
        image, _, mask, masked_ids, labels, word_ids, image_ids, alpha, *_ = train.task_losses(
            "pretrain", model, batch, config, special, 0.3, seeds
        )
        assert alpha == 0.3 and mask is batch["attention_mask"] and word_ids is batch["word_ids"]
        return image, masked_ids, labels, image_ids

    first, again, *others = map(given, [(1, 2, 3), (1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0)])
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not any(torch.equal(first[0], other[0]) or torch.equal(first[1], other[1]) for other in others)
    assert 0.3 < (first[2] != -100).sum() / (batch["word_ids"] >= 0).sum() < 0.7
    assert first[3] is batch["image_ids"]
    distorted_not = [f"method.distort_{name}=0" for name in ("brightness", "contrast", "blur")]
    plain = given((1, 2, 3), *distorted_not, "method.image_ids=false", "precision=bf16")
    assert torch.equal(plain[0], softmask.normalize(batch["image"] / 255)) and plain[3] is None
    assert casts == [False] * 5 + [True]


def test_every_distortion_has_its_own_setting(monkeypatch, one_batch):
    _, make, special = one_batch
    names, seen = ("brightness", "contrast", "blur", "hue", "grayscale"), []
    config = data.load_config("scenes", [f"method.distort_{name}={0.1 * i}" for i, name in enumerate(names, 1)])
    monkeypatch.setattr(softmask, "distort_images", lambda images, *given: seen.append(given[:5]) or images)
    train.task_losses("pretrain", lambda *given: given, make("pretrain"), config, special, 0.3, (0, 0, 0))
    assert seen[0] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("task", [task for task in data.TASKS if task != "pretrain"])
def test_what_fine_tuning_is_given(task, one_batch):
    _, make, special = one_batch
    batch, seen = make(task), []

    def model(*arguments):
        seen.append((arguments, torch.is_autocast_enabled("cpu")))
        return ({}, {}, None) if task in ("retrieval", "grounding") else ({}, {})

    for precision in ("float32", "bf16"):
        config = data.load_config("scenes", [*TINY, f"precision={precision}"])
        train.task_losses(task, model, batch, config, special, 0.3, (0, 0, 0))
    (given, cast), (_, recast) = seen
    assert not cast and recast
    assert torch.equal(given[0].flatten(0, -4), softmask.normalize(batch["image"].flatten(0, -4) / 255))
    assert given[1] is batch["input_ids"] and given[2] is batch["attention_mask"]
    assert task == "nlvr2_pretrain" or 0.3 in [value for value in given if isinstance(value, float)]  # alpha
    for name in ("image_ids", "labels", "answer_ids", "answer_weights"):
        assert name not in batch or any(value is batch[name] for value in given), name


# What it starts from


def test_the_encoders_start_from_deit_and_bert_and_the_twin_from_them(tmp_path):
    bert = randomise(BertForMaskedLM(bert_config()))
    bert.save_pretrained(tmp_path)
    torch.save(random_deit(), tmp_path / "deit.pth")
    config = data.load_config("scenes", [f"model.vision_weights={tmp_path / 'deit.pth'}",
                                         f"model.text_weights={tmp_path / 'model.safetensors'}"])
    model = make_model(seed=5)
    train.load_initial_weights(model, config, "pretrain", [])
    for encoders in (model.encoders, model.encoders_m):
        assert torch.equal(encoders.vision.cls_token, random_deit()["cls_token"])
        assert torch.equal(encoders.text.embeddings["word"].weight, bert.bert.embeddings.word_embeddings.weight)
    assert_same(dict(model.encoders.state_dict()), dict(model.encoders_m.state_dict()))


def test_a_start_with_other_sizes_names_them(tmp_path):
    """Of another number of heads the weights would fit."""
    model, config = make_model(), data.load_config("scenes", [f"pretrain.start={tmp_path / 'start.pt'}"])
    sizes = data.config_to_dict(config)["model"] | {"text_heads": 2, "image_size": 32, "dropout": 0.5}
    torch.save({"model": model.state_dict(), "vocab": ["a", "b"], "config": {"model": sizes}}, tmp_path / "start.pt")
    with pytest.raises(data.InputError, match="start.pt: its model has other sizes; give model.text_heads=2$"):
        train.load_initial_weights(model, config, "pretrain", ["a", "b"])


def test_a_start_with_another_vocabulary_is_refused(tmp_path):
    model = make_model()
    torch.save({"model": model.state_dict(), "vocab": ["a", "b"]}, tmp_path / "start.pt")
    config = data.load_config("scenes", [f"pretrain.start={tmp_path / 'start.pt'}"])
    train.load_initial_weights(model, config, "pretrain", ["a", "b"])
    with pytest.raises(data.InputError, match="start.pt: it was trained with another vocabulary"):
        train.load_initial_weights(model, config, "pretrain", ["b", "a"])


# Options that change no result

def losses_of_50_steps(options):
    """Losses (50, 4) of pre-training on one batch after the other, dropout and all innovations on."""
    config = data.resolve_scenes(data.load_config("scenes", [*TINY, *FEW_LAYERS, "model.dropout=0.1", *options]))
    task, settings = data.task_settings(config, "pretrain"), data.config_to_dict(config)
    tokenizer = softmask.load_tokenizer(config.data.tokenizer)
    torch.manual_seed(0)
    model = softmask.build_model("pretrain", len(tokenizer), settings["model"], settings["method"]).train()
    train.prepare(model, config)
    optimizer = torch.optim.AdamW(train.parameter_groups(model, task), lr=1e-4)
    loader = iter(data.make_loader(
        data.training_set(config, "pretrain"), data.ShuffledBatches(96, 8, 1, 0, 1, 0, 0), tokenizer, task.max_tokens, 0
    ))
    special = tokenizer.mask_token_id, torch.arange(5, len(tokenizer))
    found = []
    for step in range(50):
        model.update_twin()
        optimizer.zero_grad()
        losses, _, features = train.task_losses("pretrain", model, next(loader), config, special, 0.4, (0, step, 0))
        sum(losses.values()).backward()
        optimizer.step()
        model.enqueue(*features)
        found.append([losses[name].item() for name in ("itc", "itm", "soft_itm", "mlm")])
    return torch.tensor(found)


@pytest.fixture(scope="session")
def plain_losses():
    return losses_of_50_steps([])


def test_checkpointing_changes_no_bit(plain_losses, monkeypatch):
    calls, recomputed = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(0) or recomputed(*a, **k))
    assert torch.equal(losses_of_50_steps(["checkpointing=true"]), plain_losses)
    assert len(calls) > 50


def test_compilation_changes_rounding_alone(plain_losses, compiled):
    """With the compiler's own backend where PAPER_SCALE is set: that takes minutes and a C++ compiler."""
    result = compiled["losses"].wait(600)
    assert result.status == 0, result
    for runs, (losses, graphs) in enumerate(json.loads(result.out), 1):
        torch.testing.assert_close(torch.tensor(losses), plain_losses, rtol=1e-3, atol=1e-4)
        assert graphs == runs * (2 * (1 + 1 + 2) - 1)  # of model and twin, less the layer of the word attention


@pytest.mark.parametrize("task", ["pretrain", "vqa"])
def test_encoders_stay_compiled_through_training_and_evaluation(task, compiled):
    result = compiled[task].wait(600)
    assert result.status == 0, result


def test_a_compiled_encoder_is_one_graph_under_ddp_too(monkeypatch):
    graphs, compiled = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiled(f, backend=count, **k))
    monkeypatch.setattr(torch._dynamo.config, "optimize_ddp", True)  # as it is before train.prepare
    torch.compiler.reset()

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = softmask.VisionTransformer(8, 4, 192, 1, 2)  # 1.9 MB, above the 1 MB of DDP's first bucket
    train.prepare(model, data.load_config("scenes", ["compile=true"]))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        torch.nn.parallel.DistributedDataParallel(model)(torch.randn(2, 3, 8, 8)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(graphs) == 1


def test_word_attention_of_a_compiled_model_that_is_trained_without_it(monkeypatch):
    """Grounding has no soft mask, and is scored by word attention."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiled(f, backend="aot_eager", **k))
    torch.compiler.reset()
    config = data.load_config("scenes", [*TINY, *FEW_LAYERS, "compile=true"])
    settings = data.config_to_dict(config)
    torch.manual_seed(0)
    model = softmask.build_model("grounding", 50, settings["model"], settings["method"]).eval()
    text_embeds, image_embeds, mask = torch.randn(3, 7, 32), torch.randn(3, 17, 32), torch.ones(3, 7)

    def attention():
        encoders = model.encoders
        states = text_embeds, mask, encoders.image_keys_values(image_embeds)
        fused, attention = encoders.fuse(*states, attention_layer=model.attention_layer)
        return softmask.word_attention(attention, model.itm_head(fused[:, 0])[:, 1])

    plain = attention()
    train.prepare(model, config)
    torch.testing.assert_close(attention(), plain)
    assert (plain > 0).any()


# Two processes are one process with two micro-batches


@pytest.fixture(scope="module")
def spied(tmp_path_factory):
    """States and gradients after each of 3 steps, of every process: by two of two micro-batches each, and by four.

    The one process goes on from the two's states after each step: float32 rounds the gradients of weights that differ in
    their last bits differently, by 1e-5 of the largest.
    """
    folder = tmp_path_factory.mktemp("spied")
    (folder / "two.py").write_text(SPY)
    saving, follow = "    save(run, model, optimizer)\n", "    model.load_state_dict(torch.load(f'two/0-{run.step}.pt')['model'])\n"
    (folder / "one.py").write_text(SPY.replace(saving, saving + follow))
    arguments = [*TINY, *PAIR, "checkpoint_every_steps=1", "method.queue_size=20", "data.scenes.train=30",
                 "pretrain.batch_size=2"]
    outs = folder / "two", folder / "one"
    for out, processes, accumulation in zip(outs, (2, 1), (2, 4)):
        accumulate = f"pretrain.accumulation={accumulation}"
        result = run(folder, f"{out}.py", "--out", out, *arguments, accumulate, processes=processes, cwd=folder)
        assert result.status in (0, [0, 0]), result.err
    return outs


def test_two_processes_have_the_gradients_of_one_with_twice_the_micro_batches(spied):
    two, one = spied
    for step in (1, 2, 3):
        first, second = (torch.load(two / f"{rank}-{step}.pt") for rank in (0, 1))
        alone = torch.load(one / f"0-{step}.pt")
        for part in ("model", "grads"):  # among the model: queues and their pointer
            assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())
        # The key's bias cancels in the softmax: its gradient is rounding noise, which Adam blows up to whole steps.
        grads = [name for name in alone["grads"] if not name.endswith("key.bias")]
        states = [name for name in alone["model"] if not name.endswith("key.bias")]
        assert_close(first["grads"], alone["grads"], grads, 1e-6)
        assert_close(first["model"], alone["model"], states)
        assert first["model"]["queue_written"] == 8 * step
    assert_close(*({name: torch.tensor(value) for name, value in read_log(out)[-1].items()} for out in spied),
                 [name for name in read_log(one)[-1] if name not in TIMES])


def test_torchrun_equals_one_process_with_two_micro_batches(tmp_path):
    two, one = str(tmp_path / "two"), str(tmp_path / "one")
    program = tmp_path / "torchrun.py"
    program.write_text(TORCHRUN)
    arguments = [*TINY, *PAIR, "pretrain.lr=1e-4", WORDS]
    torchrun = Command(tmp_path, program, "train.py", "--out", two, *arguments)
    assert run(tmp_path, "train.py", "--out", one, *arguments, "pretrain.accumulation=2").status == 0
    result = torchrun.wait(200)
    assert result.status == 0 and "Warning" not in result.err, result.err
    for line, other in zip(log_without_times(two), log_without_times(one), strict=True):
        assert line == pytest.approx(other, rel=1e-4)


def test_the_rate_is_that_of_training_alone(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time, train\n"
        "def slow(*arguments):\n"
        "    time.sleep(3 * (not calls.append(1) and len(calls) == 1))\n"
        "    return whole(*arguments)\n"
        "calls, whole, train.evaluation.evaluate = [], train.evaluation.evaluate, slow\n"
        "train.main(sys.argv[1:])\n"
    )
    result = run(tmp_path, program, "retrieval", "--out", tmp_path, *TINY, "retrieval.start=null")
    assert result.status == 0, result.err
    assert read_log(tmp_path)[6]["pairs_per_second"] > 8 / 3  # 8 pairs a step; after the sixth validation waits 3 s


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_no_tag(tmp_path, monkeypatch):
    names = ["-c", "user.name=test", "-c", "user.email=test@test"]
    for command in (["init"], ["commit", "--allow-empty", "-m", "one"], ["tag", "-a", "v1", "-m", "one"]):
        subprocess.run(["git", "-C", tmp_path, *names, *command], check=True, capture_output=True)
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    assert re.fullmatch("[0-9a-f]{40}", train.git_commit())


# Killed and resumed


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """12 steps, dropout on, in one process without loader workers: the folder."""
    out = tmp_path_factory.mktemp("uninterrupted")
    assert run(out, "train.py", "--out", out, *TINY, NO_EVALUATION, "model.dropout=0.1", WORDS).status == 0
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_again_and_again(workers, uninterrupted, tmp_path):
    lines = sorted(random.Random(workers).sample(range(2, 12), 3))
    arguments = [*TINY, NO_EVALUATION, "model.dropout=0.1", WORDS, f"num_workers={workers}"]
    result = kill_at_lines(tmp_path, arguments, lines)
    assert result.status == 0 and "goes on from step" in result.out, result.err
    assert_same_run(tmp_path, uninterrupted)


def test_two_processes_killed(tmp_path):
    arguments = [*TINY, NO_EVALUATION, "pretrain.batch_size=4", "model.dropout=0.1", WORDS]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    uncut = Command(tmp_path, "train.py", "--out", whole, *arguments, processes=2)
    result = kill_at_lines(killed, [*arguments, "eval_every_steps=4"], [2, 8], processes=2)
    assert result.status == uncut.wait().status == [0, 0], result.err
    assert_same_run(killed, whole, WATCHED)


def test_evaluation_while_training_changes_no_bit(uninterrupted, tmp_path):
    arguments = [*TINY, NO_EVALUATION, "model.dropout=0.1", WORDS, "eval_every_steps=5"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    uncut = Command(tmp_path, "train.py", "--out", whole, *arguments)
    assert kill_at_lines(killed, [*arguments, "num_workers=2"], [8]).status == uncut.wait().status == 0
    assert_same_run(killed, whole)
    assert_same_run(killed, uninterrupted, WATCHED)
    assert [line["step"] for line in read_log(killed) if line.keys() >= set(WATCHED)] == [5, 10, 12]
    assert sorted(path.name for path in killed.glob("masks_*")) == ["masks_10.png", "masks_12.png", "masks_5.png"]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_same_command_twice_gives_the_same_bits_and_figures(processes, tmp_path, capsys):
    outs = tmp_path / "first", tmp_path / "second"
    at_work = [Command(tmp_path, "train.py", "--out", out, *TINY, "model.dropout=0.1", f"num_workers={workers}",
                       processes=processes) for out, workers in zip(outs, (0, 4))]
    assert [command.wait().status for command in at_work] in ([0] * 2, [[0, 0]] * 2)
    assert_same_run(*outs)
    evaluation.record([outs[0]], tmp_path / "record.json")
    assert evaluation.check(outs[1], tmp_path / "record.json") == 0
    assert capsys.readouterr().out.startswith("exact: ")


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_killed_while_a_checkpoint_is_written(moment, uninterrupted, tmp_path):
    arguments = ["--out", tmp_path, *TINY, NO_EVALUATION, "model.dropout=0.1", WORDS]
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys, train\n"
        "calls = []\n"
        "def die(*arguments):\n"
        "    calls.append(arguments) or len(calls) == 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return whole(*arguments)\n"
        f"whole, os.{moment} = os.{moment}, die\n"
        "train.main(sys.argv[1:])\n"
    )
    assert run(tmp_path, program, *arguments).status == -signal.SIGKILL
    assert load(tmp_path)["step"] == 3 and len(read_log(tmp_path)) == 6  # the second checkpoint, of step 6, was lost
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 7, "ep')  # and a line cut short
    result = run(tmp_path, "train.py", *arguments)
    assert result.status == 0 and "goes on from step 3 of 12" in result.out, result.err
    assert_same_run(tmp_path, uninterrupted)


# Stopped by a signal

LONG = [*TINY, NO_EVALUATION, "model.dropout=0.1", "pretrain.epochs=2", "log_every_steps=5", "checkpoint_every_steps=9"]
STOPPABLE = "with train.evaluation.one_line_errors(), train.signals:\n    sys.exit(train.main(sys.argv[1:]))\n"


def children(pid):
    return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def stop(command, number):
    """Send a signal to the first process of a command and its loader workers, as torchrun and a terminal do."""
    first = command.processes[0].pid
    for pid in [first, *children(first)]:
        os.kill(pid, number)


def stopped_lines(result):
    assert "Traceback" not in result.err, result.err
    return re.findall("^stopped by .*$", result.err, re.MULTILINE)


@pytest.mark.parametrize("number, processes, workers", [
    (signal.SIGTERM, 1, 0), (signal.SIGTERM, 1, 2), (signal.SIGINT, 1, 2), (signal.SIGTERM, 2, 1)
])
def test_signal_ends_the_step_and_the_run_goes_on_to_the_same_bits(number, processes, workers, tmp_path):
    """Of two processes the signal goes to one alone. The checkpoint lies between two lines of the log."""
    whole, out, size = tmp_path / "whole", tmp_path / "out", f"pretrain.batch_size={8 // processes}"
    arguments, fresh = [*LONG, size, f"num_workers={workers}"], ["--fresh"] * (number == signal.SIGINT)
    uncut = Command(tmp_path, "train.py", "--out", whole, *arguments, processes=processes)
    command = Command(tmp_path, "train.py", "--out", out, *arguments, *fresh, processes=processes)
    while not read_log(out):
        assert command.processes[0].is_alive(), command.result()
    stop(command, number)
    result = command.wait(20)
    assert result.status in (128 + number, [128 + number] * 2), result.err
    step = load(out)["step"]
    copy = run(tmp_path, "train.py", "--out", tmp_path / "copy", "--start", out, *arguments, "pretrain.epochs=0")
    assert f"starts from {out / 'checkpoint.pt'}, of step {step} of 24" in copy.out
    place = f"at step {step} of 24; the same command{' without --fresh' if fresh else ''} goes on from there"
    assert stopped_lines(result) == [f"stopped by {signal.Signals(number).name} {place}"] and step < 24
    result = run(tmp_path, "train.py", "--out", out, *arguments, processes=processes)
    assert result.status in (0, [0, 0]) and f"goes on from step {step} of 24" in result.out, result.err
    assert uncut.wait().status == result.status
    commands.assert_same(load(out), load(whole))
    assert log_without_times(out) == log_without_times(whole)


@pytest.mark.parametrize("function, arguments, step", [
    ("data.write_tasks", [], None), ("train.evaluation.evaluate", ["retrieval", "retrieval.start=null"], 6),
    ("train.evaluation.evaluate_pretrained", ["num_workers=1"], 12),
])
def test_signal_outside_of_steps_ends_at_once(function, arguments, step, tmp_path):
    """It comes in a destructor, such as that of a loader, out of which no exception gets, and ends loader workers too."""
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, os, signal, sys, time, torch, data, train\n"
        f"data.HERE = {str(tmp_path)!r}\n"
        "class Dying:\n"
        "    def __del__(self):\n"
        "        loader = iter(torch.utils.data.DataLoader(range(9), num_workers=1))\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        for worker in multiprocessing.active_children():\n"
        "            worker.kill()\n"
        "        time.sleep(1)\n"
        "def die(*arguments):\n"
        "    Dying()\n"
        "    time.sleep(1)\n"
        "    return whole(*arguments)\n"
        f"whole, {function} = {function}, die\n" + STOPPABLE
    )
    out, arguments = tmp_path / "out", [*TINY, *arguments]
    result = run(tmp_path, program, "--out", out, *arguments)
    assert result.status == 143 and stopped_lines(result) == ["stopped by SIGTERM; the same command goes on"]
    scenes = list((tmp_path / "data" / "scenes").iterdir())
    if step is None:
        assert not scenes and not out.exists()  # nothing half rendered
    else:
        assert load(out)["step"] == step and "epoch 1: val" not in result.out
    assert run(tmp_path, "train.py", "--out", out, *arguments).status == 0
    assert "retrieval" not in arguments or load(out)["best"] and load(out)["validated"] == 2


def test_signal_while_an_evaluation_watches_ends_the_step_with_a_checkpoint(tmp_path):
    """It goes to the loader workers of the evaluation, too, as that of timeout(1) and of batch systems does."""
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing, os, signal, sys, data, train\n"
        "whole, sent = train.evaluation.image_batches, []\n"
        "def spy(*arguments):\n"
        "    for batch in whole(*arguments):\n"
        "        for process in [*multiprocessing.active_children(), multiprocessing.current_process()] * (not sent):\n"
        "            os.kill(process.pid, signal.SIGTERM)\n"
        "        sent.append(0)\n"
        "        yield batch\n"
        "train.evaluation.image_batches = spy\n" + STOPPABLE
    )
    result = run(tmp_path, program, "--out", tmp_path / "out", *TINY, "num_workers=2", "eval_every_steps=1")
    assert result.status == 143, result.err
    assert stopped_lines(result) == ["stopped by SIGTERM at step 1 of 12; the same command goes on from there"]
    assert load(tmp_path / "out")["step"] == 1 and "txt_r1" in read_log(tmp_path / "out")[0]


def test_signal_while_one_process_has_not_begun_to_train(tmp_path):
    """It ends at once; the other notices that before its own signal comes."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys, time, data, train\n"
        "make = data.make_loader\n"
        "def wait(*arguments):\n"
        "    if train.evaluation.rank() == 0:\n"
        "        time.sleep(1)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return make(*arguments)\n"
        "data.make_loader = wait\n" + STOPPABLE
    )
    command = Command(tmp_path, program, "--out", tmp_path / "out", *TINY, *PAIR, processes=2)
    command.processes[0].join()
    os.kill(command.processes[1].pid, signal.SIGTERM)
    result = command.wait(20)
    assert result.status == [143, 143] and len(stopped_lines(result)) == 1


def test_second_signal_ends_what_hangs(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import os, sys, time, train\nos.fsync = lambda _: print('writes', time.sleep(100))\n" + STOPPABLE)
    command = Command(tmp_path, program, "--out", tmp_path / "out", *TINY, NO_EVALUATION)
    while len(read_log(tmp_path / "out")) < 3:
        assert command.processes[0].is_alive(), command.result()
    for pause in (0.1, 1.2, 0):  # timeout(1) sends two at a time
        stop(command, signal.SIGTERM)
        command.processes[0].join(pause)
        assert command.processes[0].is_alive() or not pause
    assert command.wait(5).status == 143 and not os.path.exists(tmp_path / "out" / "checkpoint.pt")


# Resumption that cannot be, starts from elsewhere


def test_a_run_without_its_checkpoint_is_not_written_over(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    os.remove(tmp_path / "out" / "checkpoint.pt")
    (tmp_path / "out" / "masks_3.png").touch()
    command = ["train.py", "--out", tmp_path / "out", *TINY, NO_EVALUATION]
    assert "holds a run without its checkpoint.pt" in run(tmp_path, *command).error
    assert len(read_log(tmp_path / "out")) == 12 and (tmp_path / "out" / "metrics.json").exists()
    result = run(tmp_path, *command, "--fresh", "pretrain.warmup_steps=12")
    assert result.status == 0 and "pretrain.warmup_steps (12) are no fewer than its steps" in result.out
    assert load(tmp_path / "out")["step"] == 12 and not (tmp_path / "out" / "masks_3.png").exists()


def test_a_damaged_line_of_the_log_is_named(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    for line in ("{}", "[", "\0"):
        (tmp_path / "out" / "log.jsonl").write_text(line + "\n")
        error = run(tmp_path, "train.py", "--out", tmp_path / "out", *TINY, NO_EVALUATION).error
        assert error.startswith(f"{tmp_path / 'out' / 'log.jsonl'} is damaged")


def test_a_folder_that_machines_do_not_share_is_found_at_once(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import os, sys, train\nsys.argv[2] += os.environ['RANK']\n" + STOPPABLE)
    result = run(tmp_path, program, "--out", tmp_path / "out", *TINY, *PAIR, processes=2, timeout=30)
    assert f"error: --out {tmp_path / 'out1'} is not shared" in result.err and 0 not in result.status
    assert not read_log(tmp_path / "out0")


@pytest.mark.parametrize("change, named", [
    (["method.focal_gamma=1.0"], "method.focal_gamma: 2.0 then, 1.0 now"),
    (["model.dropout=0.1", "pretrain.epochs=2"], "pretrain.epochs: 1 then, 2 now"),
    (["pretrain.batch_size=4", "pretrain.accumulation=2"], "pretrain.batch_size: 8 then, 4 now"),  # other contrast
    (["pretrain.accumulation=2"], "pairs a step: 8 then, 16 now"),
    (["data.scenes.seed=6"], "data.scenes.seed: 5 then, 6 now"),
    (["seed=1"], "seed: 42 then, 1 now"),
    (["precision=bf16"], "precision: float32 then, bf16 now"),
])
def test_resumption_under_changed_settings_is_refused(change, named, finished, tmp_path):
    result = run(tmp_path, "train.py", "--out", finished, *TINY, NO_EVALUATION, *change)
    assert named in result.error and "--fresh" in result.error and str(finished) in result.error


def test_what_the_best_epoch_is_chosen_by_may_not_change(tmp_path):
    command = ["train.py", "retrieval", "--out", tmp_path, *TINY, "retrieval.start=null", "retrieval.epochs=1"]
    assert run(tmp_path, *command).status == 0
    assert "eval.top_k: 4 then, 2 now" in run(tmp_path, *command, "eval.top_k=2").error
    sets = "data.retrieval_sets.{}={{image_root: '', train: [], val: {}, test: null}}".format
    assert "method.momentum: 0.99 then, 0.9 now" in run(tmp_path, *command, "method.momentum=0.9").error
    assert "data.retrieval_sets.scenes.val" in run(tmp_path, *command, sets("scenes", "other.json")).error
    result = run(tmp_path, *command, "eval.batch_size=3", "eval.answers_top_k=2", sets("another", "null"),
                 "method.words_first=0.5", "method.soft_mask=false", "method.itm_weight=0.25")  # of pre-training alone
    assert result.status == 0 and "finished: " in result.out, result.err


def test_files_of_other_tasks_may_change_before_a_resumption(finished, tmp_path):
    shutil.copy(commands.scenes_folder() / "vocab.txt", tmp_path)  # the same entries elsewhere
    others = ["data.vqa.test=null", "data.grounding.image_root=elsewhere", "vqa.lr=1e-3", f"data.tokenizer={tmp_path / 'vocab.txt'}",
              "data.retrieval_sets.scenes.val=null", "log_every_steps=2"]
    result = run(finished, "train.py", "--out", finished, *TINY, NO_EVALUATION, *others)
    assert result.status == 0, result.err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """12 steps: the folder."""
    out = tmp_path_factory.mktemp("finished")
    assert run(out, "train.py", "--out", out, *TINY, NO_EVALUATION).status == 0
    return out


def test_resumption_with_other_files_is_refused(tmp_path):
    folder, out = commands.scenes_folder(), tmp_path / "out"
    rows, words = json.loads((folder / "pretrain.json").read_text()), (folder / "vocab.txt").read_text().split()
    file, vocabulary = tmp_path / "pretrain.json", tmp_path / "vocab.txt"
    command = ["train.py", "--out", out, *TINY, NO_EVALUATION]
    command += [f"data.pretrain_files=[{file}]", f"data.tokenizer={vocabulary}"]
    file.write_text(json.dumps(rows[:16]))
    vocabulary.write_text("\n".join(words))
    assert run(tmp_path, *command).status == 0
    moved = tmp_path / "moved"
    moved.symlink_to(folder)
    shutil.copy(file, tmp_path / "copy.json")
    result = run(tmp_path, *command, f"data.pretrain_files=[{tmp_path / 'copy.json'}]", f"data.pretrain_image_root={moved}")
    assert result.status == 0 and "finished: " in result.out, result.err
    file.write_text(json.dumps(rows[:32]))
    assert "steps, from the number of records: 2 then, 4 now" in run(tmp_path, *command).error
    file.write_text(json.dumps(rows[1:17]))
    assert "content of the annotation files" in run(tmp_path, *command).error
    file.write_text(json.dumps(rows[:16]))
    vocabulary.write_text("\n".join(words[:-2] + words[:-3:-1]))
    assert "entries of the tokenizer" in run(tmp_path, *command).error


def test_a_run_may_move_and_goes_on_under_settings_that_change_no_bit():
    moved = {"image_root": "a", "vg_image_root": "a", "train": ["a"], "test": "a", "val": "a"}
    settings = {"num_workers": 0, "device": "cpu", "compile": False, "seed": 1, "eval": {"batch_size": 1, "top_k": 1},
                "data": {"vqa": moved, "pretrain_files": ["a"], "nlvr2_pretrain_files": None, "pretrain_image_root": "a",
                         "retrieval": "a", "retrieval_sets": {"a": moved, "b": moved}}}
    assert train.training_settings(settings, "vqa").keys() == {"data.vqa.val", "seed"}
    assert train.training_settings(settings, "retrieval").keys() == {
        "data.retrieval", "data.retrieval_sets.a.val", "eval.top_k", "seed"}


def test_free_settings_may_change_and_processes_stand_in_for_accumulation(tmp_path):
    arguments = ["train.py", "--out", tmp_path, *TINY, *PAIR]
    command = Command(tmp_path, *arguments, "pretrain.accumulation=2")
    command.kill_when(lambda: len(read_log(tmp_path)) == 5)
    result = run(tmp_path, *arguments, "num_workers=1", "checkpoint_every_steps=2", "eval.top_k=3",
                 "data.foils=null", processes=2)
    assert result.status == [0, 0] and "goes on from step 3" in result.out, result.err
    assert [line["step"] for line in read_log(tmp_path)] == list(range(1, 13))


def test_start_from_another_run_at_another_image_size(finished, tmp_path):
    start = os.path.join(finished, "checkpoint.pt")
    program = tmp_path / "program.py"  # looks at the model before its first step
    program.write_text(
        "import sys, torch, train\n"
        "def look(model, *rest):\n"
        f"    torch.save(model.state_dict(), {str(tmp_path / 'state.pt')!r})\n"
        "    raise ValueError('enough')\n"
        "train.train = look\n"
        "train.main(sys.argv[1:])\n"
    )
    size = ["model.image_size=48", "seed=7"]
    run(tmp_path, program, "--start", finished, "--out", tmp_path / "look", *TINY, *size)
    old, new = load(finished)["model"], torch.load(tmp_path / "state.pt")
    for name, value in new.items():
        if name.endswith("vision.pos_embed"):
            assert torch.equal(value, softmask.resize_pos_embed(old[name], 6)) and value.shape[1] == 37
        elif name in ("image_queue", "text_queue", "queue_ids", "queue_written"):
            assert not torch.equal(value, old[name]), name
        else:
            assert torch.equal(value, old[name]), name  # the twin's own, too
    assert new["queue_written"] == 0 and (new["queue_ids"] == -100).all()
    assert not torch.equal(new["encoders_m.text_proj.weight"], new["encoders.text_proj.weight"])
    result = run(tmp_path, "train.py", "--start", start, "--out", tmp_path / "out", *TINY, NO_EVALUATION, *size)
    assert result.status == 0 and f"starts from {start}" in result.out, result.err
    again = run(tmp_path, "train.py", "--out", tmp_path / "out", *TINY, NO_EVALUATION, *size)
    assert "pretrain.start" in again.error


def test_second_run_in_a_folder_is_refused(tmp_path):
    arguments = ["train.py", "--out", tmp_path, *TINY, NO_EVALUATION, "pretrain.epochs=50"]
    first = Command(tmp_path, *arguments)
    while not read_log(tmp_path):
        assert first.processes[0].is_alive(), first.result()
    second = run(tmp_path, *arguments, "--fresh")
    assert first.processes[0].is_alive()
    first.kill()
    assert "another run is at work in" in second.error and str(tmp_path) in second.error
    assert read_log(tmp_path)  # --fresh took nothing away


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    with train.locked(tmp_path):
        assert f"{tmp_path}: its file system has no locks" in capsys.readouterr().err


# Bad input


@pytest.mark.parametrize("arguments, message", [
    (["model.widht=3"], "model.widht is no setting"),
    (["pretrain.batch_size=many"], "pretrain.batch_size: wanted int, got 'many'"),
    (["log_every_steps=3", "eval_every_steps=4"], "eval_every_steps (4) must be a multiple of log_every_steps (3)"),
    (["eval_every_steps=1", "data.retrieval_sets.scenes.val=none.json"], "none.json: cannot be read"),
    (["eval_every_steps=1", "data.retrieval_sets.scenes.val=null"], "data.retrieval_sets.scenes.val is null"),
    (["eval_every_steps=1", "data.retrieval_sets.scenes.image_root=/none"], "no such file, the first image of"),
    (["pretrain.batch_size=500"], "96 records are fewer than the 500 of one step"),
    (["pretrain", "retrieve"], "task 'pretrain retrieve' is none of pretrain"),
    (["dream"], "task 'dream' is none of pretrain"),
    (["--scale", "moon"], "scale 'moon' is not in"),
    (["data.pretrain_files=[none.json]"], "none.json: cannot be read (No such file or directory)"),
    (["data.tokenizer=none/vocab.txt"], "tokenizer 'none/vocab.txt': no such file"),
    (["data.tokenizer=config.yaml"], "config.yaml is no BERT vocabulary"),
    (["--start", "none.pt"], "none.pt: no such file"),
    (["--start", "\U0001f600.pt"], "\U0001f600.pt: no such file"),
    (["--start", "config.yaml"], "config.yaml is no checkpoint that can be read safely"),
    (["model.vision_weights=config.yaml"], "config.yaml is no checkpoint that can be read safely"),
    (["model.text_weights=none.safetensors"], "model.text_weights: none.safetensors is missing"),
    (["--out", "config.yaml"], "config.yaml"),
])
def test_bad_command_line_is_one_line(arguments, message, tmp_path):
    result = run(tmp_path, "train.py", "--out", tmp_path, *TINY, *arguments)
    assert message in result.error


def test_a_process_without_a_gpu_of_its_own_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert evaluation.resolve_device(types.SimpleNamespace(device="auto")) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(data.InputError, match="process 2 .* 2"):
        evaluation.resolve_device(types.SimpleNamespace(device="auto"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_missing_gpu_is_one_line(tmp_path):
    result = run(tmp_path, "train.py", "--out", tmp_path, *TINY, "device=cuda")
    assert "torch finds no GPU" in result.error


def test_loss_that_is_not_finite_stops_the_run(tmp_path):
    result = run(tmp_path, "train.py", "--out", tmp_path, *TINY, "pretrain.lr=1e30", "pretrain.clip_norm=0")
    assert "step 3: loss_itc, loss_itm, loss_soft_itm, loss_mlm not finite" in result.error
    assert "there is no checkpoint yet" in result.error
    assert len(read_log(tmp_path)) == 2
    assert all(math.isfinite(value) for line in read_log(tmp_path) for value in line.values())


@pytest.fixture
def own_files(tmp_path):
    """48 pairs of one's own, among them a missing image, a broken one and an empty caption: settings, rows, folder."""
    folder, root = commands.scenes_folder(), tmp_path / "images"
    root.mkdir()
    rows = json.loads((folder / "pretrain.json").read_text())[:48]
    for number, row in enumerate(rows):
        content = (folder / row["image"]).read_bytes()
        row["image"] = f"{number}.jpg"
        (root / row["image"]).write_bytes(content[: len(content) // 2] if number == 5 else content)
    (root / "9.jpg").unlink()
    rows[20]["caption"] = ["", " ... "]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = [*TINY, f"data.pretrain_files=[{tmp_path / 'rows.json'}]", f"data.pretrain_image_root={root}"]
    return [*settings, NO_EVALUATION, "pretrain.batch_size=4"], rows, root


def test_bad_records_are_replaced_counted_and_named(own_files, tmp_path):
    settings, _, _ = own_files
    totals = []
    for name, processes, accumulation in (("one", 1, 2), ("two", 2, 1)):
        out = tmp_path / name
        more = [f"pretrain.accumulation={accumulation}", "max_bad_image_share=0.5", f"num_workers={accumulation - 1}"]
        result = run(tmp_path, "train.py", "--out", out, *settings, *more, processes=processes)
        assert result.status in (0, [0, 0]), result.err
        named = re.findall(r"bad record, replaced by another: (\S+): (.*)", result.err)
        reasons = dict(named)
        assert reasons.keys() == {"5.jpg", "9.jpg", "20.jpg"} and reasons["20.jpg"] == "empty caption"
        assert "No such file" in reasons["9.jpg"] and "truncated" in reasons["5.jpg"].lower()
        assert read_log(out)[-1]["bad_images"] == len(named)
        totals.append([line["bad_images"] for line in read_log(out)])
    assert totals[0] == totals[1]


def test_bad_records_of_one_process_are_a_share_of_what_all_read(monkeypatch):
    run = types.SimpleNamespace(bad_images=0, seen=0, counts=torch.zeros(2), add=lambda values: None,
                                config=types.SimpleNamespace(max_bad_image_share=0.25))
    batch = {"replaced": [("0.jpg", "cut off")] * 12, "image": torch.zeros(30), "truncated": 0}
    monkeypatch.setattr(train.evaluation, "world_size", lambda: 2)
    train.Run.count(run, batch)  # 12 of 72
    monkeypatch.setattr(train.evaluation, "world_size", lambda: 1)
    with pytest.raises(data.InputError, match="24 records were bad while 60 were read"):
        train.Run.count(run, batch)
    batch["replaced"], run.counts, run.config.max_bad_image_share = [("0.jpg", "cut off")] * 90, torch.zeros(2), 1.0
    train.Run.count(run, batch)  # 90 of 120
    run.counts, run.config.max_bad_image_share = torch.zeros(2), 0.7
    with pytest.raises(data.InputError, match="90 records were bad while 30 were read"):
        train.Run.count(run, batch)


def test_of_equal_epochs_the_first_is_kept():
    saved, model = [], torch.nn.Identity()
    run = types.SimpleNamespace(steps_per_epoch=2, validated=0, best=None, task_name="nlvr2", interval=(0.0, 0),
                                save=lambda *given: saved.append(given), validate=lambda model: {"accuracy": 50.0})
    for run.step in (2, 4):
        train.Run.keep_best(run, model, "optimizer")
    assert run.best["epoch"] == 1 and saved == [(model, None), (model, "optimizer"), (model, "optimizer")]


def test_a_run_on_shards_says_what_it_leaves_out(tmp_path):
    images = sorted((commands.scenes_folder() / "images" / "train").iterdir())[:20]
    members = {path.name: path.read_bytes() for path in images}
    members |= {f"{path.stem}.txt": b"a red star" for path in images[2:]}
    shard = write_shard(tmp_path / "0.tar", members)
    result = run(tmp_path, "train.py", "--out", tmp_path / "out", *TINY, NO_EVALUATION, f"data.pretrain_files=[{shard}]")
    assert result.status == 0 and len(read_log(tmp_path / "out")) == 2, result.err  # two steps of 8
    assert "18 records, 2 steps of 8 pairs, 1 process on cpu, float32; 2 samples without a caption left out" in result.out


def test_too_many_bad_records_stop_the_run(own_files, tmp_path):
    settings, rows, root = own_files
    for number in range(0, 48, 2):
        (root / f"{number}.jpg").unlink()
    result = run(tmp_path, "train.py", "--out", tmp_path / "out", *settings, "max_bad_image_share=0.2")
    assert re.match(r"\d+ records were bad while \d+ were read, more than max_bad_image_share 0.2", result.error)
    result = run(tmp_path, "train.py", "--out", tmp_path / "out", *settings, "max_bad_image_share=0.0")
    assert re.match(r"\d records were bad while 4 were read, more than max_bad_image_share 0.0", result.error)
    for path in root.iterdir():
        path.unlink()
    command = Command(tmp_path, "train.py", "--out", tmp_path / "out", *settings, "num_workers=1")  # raised in the worker
    said, end = pathlib.Path(command.outputs[0] + ".err"), time.monotonic() + 60
    while not (said.exists() and "error: " in said.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    result = command.wait(timeout=10)  # the worker, which outlives SIGTERM for 20 s, does not hold it up
    assert result.error.startswith("20 records in a row are bad, the last '")
    assert ".jpg" in result.error and "No such file" in result.error


def test_processes_that_read_other_files_are_refused(tmp_path):
    """As of two machines, of which one has an older copy."""
    rows = json.loads((commands.scenes_folder() / "pretrain.json").read_text())[:32]
    for rank, order in enumerate((1, -1)):
        (tmp_path / f"{rank}.json").write_text(json.dumps(rows[::order]))
    program = tmp_path / "program.py"
    program.write_text("import os, sys, train\nwith train.evaluation.one_line_errors():\n"
                       f"    train.main([*sys.argv[1:], 'data.pretrain_files=[{tmp_path}/' + os.environ['RANK'] + '.json]'])\n")
    result = run(tmp_path, program, "--out", tmp_path / "out", *TINY, NO_EVALUATION, processes=2)
    assert result.status == [2, 2], result.err
    assert result.err.count("error: the processes read annotation files that differ") == 2
    assert not (tmp_path / "out" / "log.jsonl").exists()


def test_torchrun_takes_the_commands_that_are_said_of_it():
    """Its parser looks for its own options in all of the line, also shortened."""
    text = "".join(pathlib.Path(data.HERE, name).read_text() for name in ("README.md", "train.py")).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in re.findall(r"^ *torchrun (.*)", text, re.MULTILINE)]
    assert len(lines) > 4
    for words in lines:
        parsed = torch.distributed.run.get_args_parser().parse_args(words)
        assert parsed.training_script == "train.py" and parsed.nproc_per_node in "28"
        assert train.parse(parsed.training_script_args).task in data.TASKS


def test_torchrun_ends_when_one_process_fails(own_files, tmp_path):
    settings, rows, root = own_files
    sampler = data.ShuffledBatches(len(rows), 4, 2, 1, 1, 42, 2)
    _, index = next(iter(sampler))[0]  # read by process 1 alone, in the third step
    for number in (5, 9, 20, index):
        (root / f"{number}.jpg").write_bytes((commands.scenes_folder() / "images/train/00000.jpg").read_bytes())
        rows[number]["caption"] = rows[0]["caption"]
    (root / f"{index}.jpg").unlink()
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    program = tmp_path / "torchrun.py"
    program.write_text(TORCHRUN)
    result = run(tmp_path, program, "train.py", "--out", tmp_path / "out", *settings, "max_bad_image_share=0.0",
                 timeout=100)
    assert result.status != 0
    assert "error: 1 records were bad while 24 were read" in result.err, result.err
    assert len(read_log(tmp_path / "out")) == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_check_is_printed_once(processes, tmp_path):
    result = run(tmp_path, "train.py", "check", "pretrain", *TINY, processes=processes)
    assert result.status in (0, [0, 0]) and result.out.count("pretrain.json: 96 records") == 1, result.out


def test_check_counts_and_names_what_is_missing(own_files, tmp_path):
    result = run(tmp_path, "train.py", "check", "pretrain", *TINY)
    assert result.status == 0 and "pretrain.json: 96 records; 0 of 96 images missing" in result.out
    assert "retrieval_test.json: 13 records" in result.out and "0 are empty" in result.out
    settings = [setting for setting in own_files[0] if setting != NO_EVALUATION]
    result = run(tmp_path, "train.py", "check", "pretrain", *settings)
    assert result.status == 1 and "rows.json: 48 records; 1 of 48 images missing" in result.out
    assert f"missing or empty: {own_files[2] / '9.jpg'}" in result.out and "2 are empty" in result.out
    result = run(tmp_path, "train.py", "check", *TINY, NO_EVALUATION)
    assert result.status == 1 and "none.json: cannot be read" in result.out
    result = run(tmp_path, "train.py", "check", *TINY, "--start", tmp_path / "none.pt")
    assert result.status == 1 and f"pretrain.start: {tmp_path / 'none.pt'} is missing" in result.out
    assert not os.path.exists(tmp_path / "out")


# The paper's scale


@pytest.mark.skipif(not os.environ.get("PAPER_SCALE"), reason="3 minutes, 6 GB: PAPER_SCALE=1 pytest -k paper_scale")
@pytest.mark.parametrize("start", ["deit and bert", "albef"])
def test_paper_scale_takes_two_steps(start, paper_files, tmp_path):
    arguments = ["--scale", "paper", "--out", str(tmp_path), *paper_files.settings]
    if start == "albef":
        arguments += ["--start", paper_files.albef]
    stdout = paper.run(tmp_path, "train.py", *arguments)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]
    assert all(math.isfinite(value) for line in read_log(tmp_path) for value in line.values())
    checkpoint = load(tmp_path)
    assert checkpoint["model"]["encoders.text.embeddings.word.weight"].shape == (30522, 768)
    assert checkpoint["model"]["image_queue"].shape == (1, 256)  # 65,536, but at most a quarter of the images
    assert checkpoint["model"]["encoders.vision.pos_embed"].shape == (1, 257, 768)
    assert ("starts from" in stdout) and ("fresh: cross-attention" in stdout) == (start != "albef")
    assert "re-ranked by ITM" in stdout
