"""The benchmark runs, and its count of floating-point operations is what torch counts."""
import argparse
import json
import types

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmark

SETTINGS = [
    "method={queue_size: 16, mlm_probability: 1.0, distort_blur: 0.0, clean_teacher: false}",  # all tokens masked
    "model={image_size: 64, patch_size: 8, vision_width: 48, vision_layers: 3, vision_heads: 2, text_width: 32, "
    "text_layers: 2, fusion_layers: 4, text_heads: 2, embed_dim: 16, dropout: 0.1}", "pretrain.muon_lr=null",
    "method.words_first=0", "pretrain.max_tokens=14",
]
VOCAB, BATCH = 90, 6


def lines_of(capsys, *words):
    """What the command prints."""
    tiny = ["--scale", "scenes", "--device", "cpu", "--batch", str(BATCH), "--steps", "1", "--vocab-size", str(VOCAB)]
    benchmark.main([*words, *tiny, *SETTINGS])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("variant", benchmark.VARIANTS)
def test_flops_by_formula(variant, monkeypatch):
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda function, *values, **options: function(*values))
    options = argparse.Namespace(scale="scenes", batch=BATCH, dtype="float32", device="cpu", overrides=SETTINGS)
    config = benchmark.configure(options, benchmark.VARIANTS[variant])
    steps = benchmark.Steps(config, VOCAB)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the others compute scores twice
        steps(config)
    assert benchmark.pair_flops(config, VOCAB) == pytest.approx(counter.get_total_flops() / BATCH, rel=1e-3)


def test_steps(capsys):
    (line,) = lines_of(capsys, "step", "--variants", "full", "checkpointing=true")
    assert (line["variant"], line["cost"], line["checkpointing"]) == ("full", 0, True)
    assert line["peak_memory_gb"] >= line["import_memory_gb"] > line["fixed_state_gb"] > 0
    assert line["pairs_per_second"] > 0 and line["operations"] > 100


def test_variants_take_turns(capsys, monkeypatch):
    peaks = types.SimpleNamespace(result=lambda: (1, 2))
    monkeypatch.setattr(benchmark.concurrent.futures.ProcessPoolExecutor, "submit", lambda *_: peaks)
    seconds = iter([1.0] * 6 + [9.0] * 4 + [3.0, 2.0])  # the large product, two rounds to warm up, one that counts
    monkeypatch.setattr(benchmark, "seconds_of", lambda function, device: next(seconds))
    full, albef = lines_of(capsys, "step", "--variants", "ALBEF")
    assert (full["variant"], full["seconds"], full["cost"]) == ("full", 3, 0)
    assert (albef["variant"], albef["seconds"], albef["cost"]) == ("ALBEF", 2, 0.5)
    assert albef["pairs_per_second"] > 0 and full["operations"] > albef["operations"] > 100


def test_operations_are_counted_and_views_are_not():
    weight, x = torch.ones(3, 2, requires_grad=True), torch.ones(2, 2)
    with benchmark.Operations() as counted:
        loss = F.linear(x, weight).view(6).sum()  # a product and a sum
        loss.backward()  # the slope of the loss itself (ones), and one product
    assert counted.count == 4


def test_ranking_and_images(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "SIDES", (64,))
    monkeypatch.setattr(benchmark, "FILES", 2)
    lines = lines_of(capsys, "rerank", "vqa", "images")
    assert [line["measure"] for line in lines] == ["rerank"] * 2 + ["vqa"] + ["images"] * 2 + ["distortions"]
    assert all(value > 0 for line in lines for key, value in line.items() if "_per_" in key)
