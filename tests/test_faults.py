"""Numbers that are not finite, full disks, too little memory, checkpoints that are none: each ends in one clear line."""
import contextlib
import errno
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
import types

import pytest
import torch

import commands
import data
import eval as evaluation
import softmask
import train
from commands import NO_EVALUATION, TINY, assert_same, assert_same_run, load, read_log, run

SETTINGS = [*TINY, NO_EVALUATION, "model.dropout=0.1"]  # 12 steps, a checkpoint every third


def start(*arguments):
    """train.py in this process."""
    with evaluation.one_line_errors():
        train.main([str(argument) for argument in arguments])


@pytest.fixture
def fails(capsys):
    """Call a function; the one line in which it fails, as train.py and eval.py do."""
    def call(function, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            function(*arguments)
        lines = [line for line in capsys.readouterr().err.splitlines() if "rror" in line]
        assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0].removeprefix("error: ")

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing went wrong in: its folder."""
    out = tmp_path_factory.mktemp("whole")
    start("--out", out, *SETTINGS)
    return out


def assert_finite(out):
    """The checkpoint and the log hold finite numbers alone, and no temporary file is left."""
    values = [value for value in commands.tensors(load(out)).values() if isinstance(value, torch.Tensor)]
    assert len(values) > 100 and all(value.isfinite().all() for value in values)
    assert all(math.isfinite(value) for line in read_log(out) for value in line.values())
    assert not [name for name in os.listdir(out) if name.endswith(".partial")]


# Numbers


def spoil_image(model, image, value):
    image[1, 2, 3, 4] = value


def spoil_weight(name):
    def spoil(model, image, value):
        model.state_dict()[name].view(-1)[-1] = value

    return spoil


def spoil_gradient(model, image, value):
    weight = model.encoders.text_proj.weight
    handle = weight.register_hook(lambda gradient: handle.remove() or gradient.index_fill(0, torch.tensor(0), value))


@pytest.fixture
def inject(monkeypatch):
    """Let a fault happen as a step's (numbered from 1) losses are computed: before the image is normalised, or part."""
    def prepare(faults):
        """faults: {step: (spoil, value)}, or {step: name of a loss part, which gains an infinite constant}."""
        monkeypatch.undo()
        task_losses, normalize, micro = train.task_losses, softmask.normalize, types.SimpleNamespace(fault=None)

        def faulty_losses(task_name, model, batch, config, special, alpha, seeds, words_only):
            micro.fault, micro.model = faults.get(seeds[1] + 1), model
            losses, *rest = task_losses(task_name, model, batch, config, special, alpha, seeds, words_only)
            if isinstance(micro.fault, str):
                losses[micro.fault] = losses[micro.fault] + math.inf  # its gradient stays finite
            return losses, *rest

        def faulty_normalize(image):
            image = normalize(image)
            if isinstance(micro.fault, tuple):
                spoil, value = micro.fault
                with torch.no_grad():
                    spoil(micro.model, image, value)
            return image

        monkeypatch.setattr(train, "task_losses", faulty_losses)
        monkeypatch.setattr(softmask, "normalize", faulty_normalize)

    return prepare


EVERY = "loss_itc, loss_itm, loss_soft_itm, loss_mlm"
FAULTS = {
    "image": (spoil_image, EVERY),
    "weight of the image encoder": (spoil_weight("encoders.vision.patch_embed.weight"), EVERY),
    "weight of the matching head": (spoil_weight("itm_head.weight"), "loss_itm, loss_soft_itm"),
    "weight of the MLM head": (spoil_weight("encoders.mlm_head.bias"), "loss_mlm"),
    "weight of the twin": (spoil_weight("encoders_m.image_proj.weight"), "loss_itc"),
    "temperature": (spoil_weight("temp"), "loss_itc, temp"),
    "gradient": (spoil_gradient, "gradient"),
}


@pytest.mark.parametrize("fault, value", [*((fault, math.nan) for fault in FAULTS), ("image", -math.inf),
                                          ("weight of the matching head", math.inf), ("gradient", math.inf)])
def test_a_number_that_is_not_finite_stops_the_run(fault, value, whole, inject, fails, tmp_path, monkeypatch):
    spoil, parts = FAULTS[fault]
    inject({5: (spoil, value)})
    line = fails(start, "--out", tmp_path, *SETTINGS)
    last = f"the last good checkpoint is {tmp_path / 'checkpoint.pt'}, of step 3"
    assert line.startswith(f"step 5: {parts} not finite; {last}; lower lr")
    assert len(read_log(tmp_path)) == 4 and load(tmp_path)["step"] == 3
    assert_finite(tmp_path)
    if fault == "image":
        monkeypatch.undo()
        start("--out", tmp_path, *SETTINGS)
        assert_same_run(tmp_path, whole)


def test_an_infinite_temperature_is_not_clamped_away(inject, fails, tmp_path):
    inject({5: (spoil_weight("temp"), math.inf)})  # for which all losses and gradients are finite
    assert fails(start, "--out", tmp_path, *SETTINGS).startswith("step 5: temp not finite")


def test_a_weight_that_no_loss_reads_does_not_enter_the_checkpoint(inject, fails, tmp_path):
    name = "encoders.text.embeddings.position.weight"  # of place 40, where no text reaches
    inject({5: (spoil_weight(name), math.nan)})
    line = fails(start, "--out", tmp_path, *SETTINGS)
    assert line.startswith(f"step 6: 2 weights or queues not finite, the first {name}; the last good checkpoint")
    assert load(tmp_path)["step"] == 3
    assert_finite(tmp_path)


@pytest.mark.parametrize("task", data.TASKS)
def test_every_task_names_its_losses(task, inject, fails, tmp_path):
    inject({2: (lambda model, image, value: image.fill_(value), math.nan)})
    line = fails(start, task, "--out", tmp_path, *SETTINGS, f"{task}.start=null", "data.retrieval_sets.scenes.test=null")
    parts = {"pretrain": EVERY, "vqa": "loss_vqa", "nlvr2_pretrain": "loss_ta", "nlvr2": "loss_cls", "entailment": "loss_cls"}
    assert line.startswith(f"step 2: {parts.get(task, 'loss_itc, loss_itm')} not finite; there is no "
                           "checkpoint yet; ")
    assert os.listdir(tmp_path) and not (tmp_path / "checkpoint.pt").exists() and len(read_log(tmp_path)) == 1


def test_skipped_steps_change_nothing_are_counted_and_resumed(inject, fails, tmp_path, monkeypatch, capsys):
    faults = {2: "itc", 5: (spoil_image, math.nan), 8: (spoil_gradient, math.inf)}
    settings = [*SETTINGS, "max_skipped_steps=3"]
    inject(faults)
    start("--out", tmp_path / "whole", *settings)
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if "skipped" in line] == [
        "step 2: loss_itc not finite: skipped", f"step 5: {EVERY} not finite: skipped", "step 8: gradient not finite: skipped"]
    log = read_log(tmp_path / "whole")
    assert [line["skipped_steps"] for line in log] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3]
    for line in log:
        assert ("loss" in line) == ("grad_norm" in line) == (line["step"] not in faults)
    assert_finite(tmp_path / "whole")
    assert load(tmp_path / "whole")["model"]["queue_written"] == 9 * 8
    assert [state["step"] for state in load(tmp_path / "whole")["optimizer"]["state"].values()] == [9] * len(
        load(tmp_path / "whole")["optimizer"]["state"])

    for limit in (2, 1):  # ends in step 8, resumed from 6
        line = fails(start, "--out", tmp_path / "killed", *SETTINGS, f"max_skipped_steps={limit}")
        assert line.startswith("step 8: gradient not finite; the last good") and len(read_log(tmp_path / "killed")) == 7
    start("--out", tmp_path / "killed", *settings)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert load(tmp_path / "killed")["skipped_steps"] == 3


def test_a_skipped_step_leaves_weights_and_queues_as_they_were(inject, tmp_path, monkeypatch):
    states, step_done = [], train.Run.step_done

    def spy(run, values, model, optimizer):
        states.append({name: value.clone() for name, value in model.state_dict().items() if not name.startswith("encoders_m")})
        step_done(run, values, model, optimizer)

    inject({2: (spoil_image, math.nan)})
    monkeypatch.setattr(train.Run, "step_done", spy)
    start("--out", tmp_path, *SETTINGS, "max_skipped_steps=1", "log_every_steps=3", "pretrain.accumulation=2")
    assert_same(states[0], states[1])
    assert not torch.equal(states[1]["itm_head.weight"], states[2]["itm_head.weight"])
    assert [line["skipped_steps"] for line in read_log(tmp_path)] == [1, 1]  # a line of steps 1 and 3
    assert_finite(tmp_path)


ONE_RANK = """
import math, sys, torch, train
def faulty(*arguments):
    losses, *rest = task_losses(*arguments)
    step, block = arguments[6][1:]
    if (step + 1, block) == (5, 1):
        losses["mlm"] = losses["mlm"] + math.inf
    return losses, *rest
task_losses, train.task_losses = train.task_losses, faulty
with train.evaluation.one_line_errors():
    train.main(sys.argv[1:])
"""
"""A train.py in which one micro-batch or process has, in step 5, an infinite part of the loss with a finite gradient."""


ONE_FAILS = """
import sys, time, torch, train
def failing(run, *arguments):
    if run.step == 2 and train.evaluation.rank() == 1:
        raise {error}("of one process")
    return step_done(run, *arguments)
step_done, train.Run.step_done = train.Run.step_done, failing
torch.distributed.destroy_process_group = lambda: time.sleep(1000)
with train.evaluation.one_line_errors():
    train.main(sys.argv[1:])
"""
"""A train.py of which process 1 fails, where the end of a process group waits for the other processes, as nccl's does."""


@pytest.mark.parametrize("error, status, line", [
    ("ValueError", 2, "error: of one process"), ("RuntimeError", 1, "RuntimeError: of one process"),
])
def test_a_process_that_fails_does_not_wait_for_the_others(error, status, line, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(ONE_FAILS.replace("{error}", error))
    arguments = ["--out", tmp_path / "out", *SETTINGS, "pretrain.batch_size=4"]
    result = run(tmp_path, program, *arguments, processes=2, timeout=60)
    assert result.status[1] == status and result.status[0] != 0
    assert line in result.err.splitlines(), result.err


def test_processes_agree_on_a_loss_that_is_not_finite_in_one(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(ONE_RANK)
    arguments = [program, "--out", tmp_path / "two", *SETTINGS, "pretrain.batch_size=4", "model.dropout=0.0"]
    result = run(tmp_path, *arguments, "--fresh", processes=2)
    line = f"error: step 5: loss_mlm not finite; the last good checkpoint is {tmp_path / 'two'}"
    assert result.status == [2, 2] and result.err.count(line) == 2, result.err
    assert_finite(tmp_path / "two")
    result = run(tmp_path, *arguments, "max_skipped_steps=1", processes=2)  # goes on from step 3
    assert result.status == [0, 0] and "goes on from step 3" in result.out, result.err
    assert result.err.count("step 5: loss_mlm not finite: skipped") == 1
    arguments[2] = tmp_path / "one"
    result = run(tmp_path, *arguments, "pretrain.accumulation=2", "max_skipped_steps=1")
    assert result.status == 0, result.err
    logs = [read_log(tmp_path / name) for name in ("one", "two")]
    for line, other in zip(*logs, strict=True):
        assert line["skipped_steps"] == other["skipped_steps"] == int(line["step"] >= 5)
        assert ("loss" in line) == ("loss" in other) == (line["step"] != 5)
        assert line.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 6e4])
def test_grad_cam_in_half_precision_is_never_nan(dtype, scale):
    """Attention of exact zeros and ones; gradients of the match score that vanish, or overflow to infinity, in fp16."""
    generator = torch.Generator().manual_seed(0)
    scores = 200 * torch.randn(3, 2, 5, 1 + 9, generator=generator)
    scores[0, :, 1] = 0.0
    attention = scores.softmax(-1).requires_grad_()
    values = torch.randn(3, 2, 10, 4, generator=generator)
    weight = scale * torch.randn(4, 2, generator=generator)
    with torch.autocast("cpu", dtype):
        hidden = (attention @ values).sum((1, 2)) @ (scale * torch.eye(4))  # (B, 4)
        logits = hidden @ weight
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), attention, retain_graph=True)
    assert gradient.isfinite().all() == (dtype == torch.bfloat16 or scale < 1e3)
    cam = softmask.word_attention(attention, logits[:, 1].float())
    picked = torch.zeros(3, 5, dtype=torch.bool)
    picked[:, 1:3] = True
    mask = softmask.soft_mask(cam, picked)
    assert cam.dtype == mask.dtype == torch.float32
    assert (attention == 0).any() and cam.isfinite().all() and (cam >= 0).all()
    assert mask.isfinite().all() and (mask >= 0).all() and (mask <= 1).all()


@pytest.fixture(scope="module")
def tiny():
    """A small model of pre-training, its settings, and a batch of 6 pairs as task_losses takes it."""
    config = data.resolve_scenes(data.load_config("scenes", SETTINGS))
    tokenizer = softmask.load_tokenizer(config.data.tokenizer)
    sampler = data.ShuffledBatches(96, 6, 1, 0, 1, 0, 0)
    batch = next(iter(data.make_loader(data.training_set(config, "pretrain"), sampler, tokenizer, 25, 0)))
    batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return config, batch, (tokenizer.mask_token_id, torch.arange(5, len(tokenizer))), len(tokenizer)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("temp", [0.001, 0.5])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_losses_and_gradients_at_both_clamps_of_the_temperature(precision, temp, gamma, tiny):
    config, batch, special, vocab_size = tiny
    overrides = [*SETTINGS, f"method.focal_gamma={gamma}", f"method.temp={temp}", f"precision={precision}"]
    config = data.load_config("scenes", overrides)
    settings = data.config_to_dict(config)
    torch.manual_seed(0)
    model = softmask.build_model("pretrain", vocab_size, settings["model"], settings["method"]).train()
    with torch.no_grad():
        model.temp.copy_(10.0 if temp == 0.5 else -1.0)
        model.clamp_temp()
        assert model.temp.item() == pytest.approx(temp)
        for parameter in model.encoders.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)  # else all features are alike
        model.encoders_m.load_state_dict(model.encoders.state_dict())
    for step in range(3):  # the queues fill: features of this very batch, p rounds to 0 and to 1
        losses, _, features = train.task_losses("pretrain", model, batch, config, special, 0.4, (0, step, 0))
        model.zero_grad()
        sum(losses.values()).backward()
        model.enqueue(*features)
        assert all(value.isfinite() for value in losses.values()), losses
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("temp", [0.001, 0.5])
def test_focal_loss_at_both_clamps_where_features_agree_oppose_and_tie(temp, gamma):
    feats = torch.eye(4)[[0, 0, 1, 2]] * torch.tensor([1.0, 1.0, 1.0, -1.0])[:, None]
    for other in (feats, -feats, feats[:1].expand(4, -1)):
        image, text = feats.clone().requires_grad_(), other.clone().requires_grad_()
        clamped = torch.tensor(temp, requires_grad=True)
        loss, *_ = softmask.focal_itc_loss(image, text, feats, other, other, feats, clamped, 0.4, gamma)
        loss.backward()
        assert loss.isfinite() and loss >= 0
        assert all(part.grad.isfinite().all() for part in (image, text, clamped))


# Disk


@pytest.fixture
def file_limit():
    """Set the size in bytes that no file may grow beyond; None: no limit."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def before_step(monkeypatch):
    """Call a function as a step (from 1) begins."""
    def prepare(step, function):
        task_losses = train.task_losses

        def hooked(*arguments):
            if arguments[6][1] + 1 == step:
                function()
            return task_losses(*arguments)

        monkeypatch.setattr(train, "task_losses", hooked)

    return prepare


FULL = "[Errno 28] cannot be written: No space left on device: "
LARGE = "[Errno 27] cannot be written: File too large: "


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("kind", ["cut in the midst", "full at the end"])
def test_disk_full_during_a_checkpoint(kind, whole, before_step, file_limit, fails, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    limited = kind == "cut in the midst"
    before_step(6, lambda: file_limit(100_000) if limited else os.symlink("/dev/full", f"{path}.partial"))
    line = fails(start, "--out", tmp_path, *SETTINGS)
    file_limit(None)
    assert line == (LARGE if limited else FULL) + repr(str(path))
    assert path.stat().st_size > 200_000 and load(tmp_path)["step"] == 3
    assert sorted(os.listdir(tmp_path)) == [".lock", "checkpoint.pt", "log.jsonl"]
    monkeypatch.undo()
    start("--out", tmp_path, *SETTINGS)
    assert_same_run(tmp_path, whole)


def test_disk_full_during_a_line_of_the_log(whole, before_step, file_limit, fails, tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    before_step(5, lambda: file_limit(path.stat().st_size + 40))
    line = fails(start, "--out", tmp_path, *SETTINGS)
    file_limit(None)
    assert line == LARGE + repr(str(path))
    assert len(read_log(tmp_path)) == 4 and len(path.read_text().splitlines()[4]) == 40  # a line cut short
    monkeypatch.undo()
    start("--out", tmp_path, *SETTINGS)
    assert_same_run(tmp_path, whole)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_disk_full_during_the_metrics(whole, fails, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "metrics.json").unlink()
    os.symlink("/dev/full", tmp_path / "metrics.json.partial")
    assert fails(start, "--out", tmp_path, *SETTINGS) == FULL + repr(str(tmp_path / "metrics.json"))
    assert sorted(os.listdir(tmp_path)) == [".lock", "checkpoint.pt", "log.jsonl"]
    start("--out", tmp_path, *SETTINGS)
    assert (tmp_path / "metrics.json").read_text() == (whole / "metrics.json").read_text()
    assert_same_run(tmp_path, whole)


def test_disk_full_as_the_scenes_are_rendered(file_limit, fails, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "HERE", str(tmp_path))
    file_limit(300)  # a picture has more
    line = fails(start, "--out", tmp_path / "out", *SETTINGS)
    file_limit(None)  # pytest's own output may be a file, too
    assert line.startswith(LARGE) and str(tmp_path / "data" / "scenes" / "plain-") in line
    assert os.listdir(tmp_path / "data" / "scenes") == []


def test_read_only_output_folder(whole, fails, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    opened = open

    def read_only(path, mode="r", *arguments, **named):
        if str(path).startswith(str(tmp_path)) and mode[0] != "r":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, mode, *arguments, **named)

    monkeypatch.setattr("builtins.open", read_only)
    for more in ([], ["--fresh"]):
        line = fails(start, "--out", tmp_path / "out", *SETTINGS, *more)
        assert line == f"[Errno 30] Read-only file system: {str(tmp_path / 'out' / '.lock')!r}"
    monkeypatch.undo()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


# Memory


def allocate(*_, tokenizer=None, max_tokens=None):
    torch.empty(1 << 60, dtype=torch.uint8)


def out_of_gpu_memory(*_, tokenizer=None, max_tokens=None):
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.38 GiB is free."
    raise torch.OutOfMemoryError(f"{text}\nSee the documentation\n")


def refused_fork(*_, tokenizer=None, max_tokens=None):
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def no_memory(*_, tokenizer=None, max_tokens=None):
    raise MemoryError


def full_shared_memory(*_, tokenizer=None, max_tokens=None):  # as torch's DataLoader words it
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out "
                       "of shared memory. Please try to raise your shared memory limit.")


def killed_worker(*_, tokenizer=None, max_tokens=None):
    raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")


@pytest.mark.parametrize("fault", [full_shared_memory, killed_worker])
def test_a_loader_worker_without_memory_says_what_to_change(fault, fails, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "task_losses", fault)
    line = fails(start, "--out", tmp_path, *SETTINGS)
    assert line.startswith("out of memory (DataLoader worker (pid 7)") and line.endswith("--shm-size")


@pytest.fixture
def no_workers():
    """Ends loader workers that an error left, as train.py does: their loader's end, at any time later, waits for them."""
    yield
    train.Signals().__exit__(None, None, None)


@pytest.mark.parametrize("in_worker, fault, said", [
    (False, allocate, "allocate memory: you tried to allocate 1152921504606846976 bytes"),
    (True, allocate, "allocate memory: you tried to allocate 1152921504606846976 bytes"),
    (False, out_of_gpu_memory, "CUDA out of memory. Tried to allocate 2.00 GiB"),
    (False, refused_fork, "Cannot allocate memory"),
    (True, no_memory, "MemoryError"),
])
def test_out_of_memory_says_what_to_lower(in_worker, fault, said, fails, no_workers, tmp_path, monkeypatch):
    monkeypatch.setattr(*((data, "_collate") if in_worker else (train, "task_losses")), fault)
    line = fails(start, "--out", tmp_path, *SETTINGS, f"num_workers={int(in_worker)}")
    assert re.match(r"out of memory \(.*\); lower batch_size, and raise accumulation instead, or set checkpointing=true", line)
    assert said in line and len(line) < 400


def test_out_of_memory_for_the_whole_process(tmp_path, monkeypatch):
    """The system's own limit, in a process of its own: 16 MB more than it has as training begins."""
    pytest.importorskip("resource")
    program = tmp_path / "program.py"
    program.write_text(
        "import re, resource, sys, train\n"
        "def limited(*arguments):\n"
        "    used = int(re.search(r'VmSize:\\s+(\\d+) kB', open('/proc/self/status').read())[1]) << 10\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))\n"
        "    return whole(*arguments)\n"
        "whole, train.train = train.train, limited\n"
        "with train.evaluation.one_line_errors():\n"
        "    train.main(sys.argv[1:])\n"
    )
    sizes = "model={vision_width: 256, vision_heads: 4}"
    monkeypatch.setenv("RAYON_NUM_THREADS", "64")  # as on a large machine: the tokenizer must not start so many
    result = run(tmp_path, program, "--out", tmp_path / "out", *SETTINGS, sizes, "pretrain.batch_size=96")
    assert result.error.startswith("out of memory (") and "checkpointing=true" in result.error


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_the_containers_first_process_hands_on_a_signal_and_waits_for_the_checkpoint(sent, tmp_path):
    """The shell line of the Dockerfile, with a `python` that takes a second to write its checkpoint."""
    with open(os.path.join(data.HERE, "Dockerfile"), encoding="utf-8") as file:
        shell = json.loads(re.search(r"^CMD (.*)$", file.read(), re.MULTILINE)[1])
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\ntrap 'sleep 1; echo $1 >> saved; exit 143' TERM\necho $1 >> begun\nsleep 20 & wait\n")
    python.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background starts deaf to it
    process = subprocess.Popen(shell, cwd=tmp_path, env=os.environ | {"PATH": path}, preexec_fn=heard)
    for _ in range(100):
        time.sleep(0.1)
        if (tmp_path / "begun").exists():
            break
    process.send_signal(sent)
    assert process.wait(10) != 0 and (tmp_path / "saved").read_text() == "train.py\n"
    assert (tmp_path / "begun").read_text() == "train.py\n"  # nothing is checked of a run that was stopped


def test_an_error_of_our_own_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"), evaluation.one_line_errors():
        raise RuntimeError("shapes do not fit")


def test_compilation_without_a_compiler_is_one_line(capsys):
    error = RuntimeError("backend='inductor' raised:\nInvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE")
    with pytest.raises(SystemExit), evaluation.one_line_errors():
        raise error
    assert capsys.readouterr().err == "error: compile=true needs a C++ compiler; install one, or give compile=false\n"


# Checkpoints that are none


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def newer(checkpoint, folder):
    checkpoint["config"]["method"]["sharper"] = 1.5
    checkpoint["secret"] = {"of": "a newer version"}


def renamed(checkpoint, folder):
    for name in ("optimizer", "best", "epoch", "model"):
        checkpoint[f"new_{name}"] = checkpoint.pop(name)


def unknown_part(checkpoint, folder):
    checkpoint["model"]["encoders.fusion.gate.weight"] = torch.ones(2)


def another_shape(checkpoint, folder):
    checkpoint["model"]["itm_head.weight"] = torch.ones(2, 7)
    checkpoint["model"].pop("temp")


def another_task(checkpoint, folder):
    checkpoint["task"] = "dream"


def no_config(checkpoint, folder):
    checkpoint["config"] = ["nothing"]


def payload(checkpoint, folder):
    checkpoint["config"]["seed"] = Payload(folder / "made")


UNSAFE = "checkpoint.pt is no checkpoint that can be read safely"
LACKS = "checkpoint.pt was not written by train.py: it lacks model; ALBEF's are for train.py --start"
NONE = "no such file, and no folder with best.pt or checkpoint.pt"
CHECKPOINTS = {  # what each of resume, --start, eval.py and from_pretrained says; "": it takes it
    newer: ("method.sharper: 1.5 then, None now", "", "checkpoint.pt: method.sharper is no setting; the nearest is", ""),
    renamed: (LACKS, "checkpoint.pt holds no state dict of tensors", LACKS, LACKS),
    unknown_part: ("checkpoint.pt is no checkpoint of this version (.*encoders.fusion.gate.weight is left over",)
    + ("checkpoint.pt: .*encoders.fusion.gate.weight is left over",)
    + ("checkpoint.pt is no checkpoint of this version: .*encoders.fusion.gate.weight is left over",) * 2,
    another_shape: ("checkpoint.pt is no checkpoint of this version (.*temp is missing; itm_head.weight has shape (2, 7)",)
    + ("checkpoint.pt: .*itm_head.weight has shape (2, 7)",)
    + ("checkpoint.pt is no checkpoint of this version: .*itm_head.weight has shape (2, 7)",) * 2,
    another_task: ("task: dream then, pretrain now", "", *["checkpoint.pt is no checkpoint of this version: 'dream'"] * 2),
    no_config: ("checkpoint.pt is no checkpoint of this version (", "", *["checkpoint.pt is no checkpoint of this version"] * 2),
    payload: (UNSAFE,) * 4,
    "cut": (UNSAFE,) * 4,
    "empty": (UNSAFE,) * 4,
    "folder": ("Is a directory: .*checkpoint.pt", *[NONE] * 3),
}


@pytest.mark.parametrize("kind", CHECKPOINTS, ids=lambda kind: getattr(kind, "__name__", kind))
def test_a_checkpoint_that_is_none_of_ours(kind, whole, fails, tmp_path):
    """For resuming, for --start, for eval.py --checkpoint and for softmask.from_pretrained."""
    path, broken = tmp_path / "broken" / "checkpoint.pt", tmp_path / "broken"
    broken.mkdir()
    content = (whole / "checkpoint.pt").read_bytes()
    if kind == "folder":
        path.mkdir()
    elif isinstance(kind, str):
        path.write_bytes(content[: len(content) * 2 // 3 if kind == "cut" else 0])
    else:
        checkpoint = load(whole)
        kind(checkpoint, tmp_path)
        torch.save(checkpoint, path)
    before = path.is_file() and path.read_bytes()
    calls = [
        (start, "--out", broken, *SETTINGS),
        (start, "--out", tmp_path / "out", "--start", broken, *SETTINGS, "pretrain.epochs=0"),
        (evaluate, "masks", "--checkpoint", broken, *SETTINGS),
    ]
    for call, said in zip(calls, CHECKPOINTS[kind]):
        if said:
            assert re.search(pattern(said), fails(*call)), call
        else:
            call[0](*call[1:])
    said = CHECKPOINTS[kind][3]
    wanted = pytest.raises((ValueError, OSError), match=pattern(said)) if said else contextlib.nullcontext()
    with wanted:
        softmask.from_pretrained(path if path.is_file() else broken)
    assert not (tmp_path / "made").exists()
    assert before == (path.is_file() and path.read_bytes())


def pattern(text):
    """A regular expression of a text in which .* stands for anything."""
    return ".*".join(map(re.escape, text.split(".*")))


def evaluate(*arguments):
    """eval.py in this process."""
    with evaluation.one_line_errors():
        evaluation.main([str(argument) for argument in arguments])


def test_a_checkpoint_of_another_task_is_not_resumed(whole, fails, tmp_path):
    shutil.copy(whole / "checkpoint.pt", tmp_path)
    line = fails(start, "vqa", "--out", tmp_path, *SETTINGS, "vqa.start=null")
    assert "task: pretrain then, vqa now" in line and "--fresh to start over" in line


def test_best_pt_in_the_place_of_the_checkpoint_is_one_line(whole, fails, tmp_path):
    torch.save(load(whole) | {"optimizer": None}, tmp_path / "checkpoint.pt")
    assert "checkpoint.pt is no checkpoint of this version" in fails(start, "--out", tmp_path, *SETTINGS)


# --fresh


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("typo", [
    ["data.pretrain_files=[none.json]"], ["data.tokenizer=none/vocab.txt"], ["--start", "none.pt"],
    ["model.vision_weights=none.pth"], ["pretrain.batch_size=500"], ["--start", "broken.pt"], ["pretrain.max_tokens=41"],
])
def test_fresh_deletes_nothing_where_the_new_run_cannot_begin(typo, whole, fails, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "out")
    before = snapshot(tmp_path / "out")
    (tmp_path / "broken.pt").write_bytes((whole / "checkpoint.pt").read_bytes()[:5000])
    monkeypatch.chdir(tmp_path)
    fails(start, "--fresh", "--out", tmp_path / "out", *SETTINGS, *typo)
    assert snapshot(tmp_path / "out") == before


def test_fresh_starts_over_before_its_first_step(whole, before_step, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for name in ("best.pt", "answers_val.json", "answers_test.json", "masks_7.png", "curve.png", ".fresh"):
        (tmp_path / name).write_bytes(b"of the run before")
    (tmp_path / "masks_photo.png").write_bytes(b"the user's own")
    seen = []
    before_step(1, lambda: seen.append(sorted(os.listdir(tmp_path))))
    start("--fresh", "--out", tmp_path, *SETTINGS)
    assert seen == [[".lock", "masks_photo.png"]]
    assert_same_run(tmp_path, whole)


def test_fresh_may_start_from_what_it_replaces(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    start("--fresh", "--out", tmp_path, "--start", tmp_path / "checkpoint.pt", *SETTINGS, "pretrain.epochs=0")
    assert re.search(f"starts from {tmp_path / 'checkpoint.pt'}$", capsys.readouterr().out, re.MULTILINE)  # a whole run
    old, new = load(whole), load(tmp_path)
    assert new["step"] == 0 and torch.equal(old["model"]["itm_head.weight"], new["model"]["itm_head.weight"])


def test_fresh_holds_for_the_first_of_torchruns_starts(whole, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # as torchrun sets it after it has started a lost process again
    start("--fresh", "--out", tmp_path, *SETTINGS)
    assert "finished:" in capsys.readouterr().out
    assert_same_run(tmp_path, whole)


def test_fresh_holds_until_one_of_torchruns_starts_has_got_as_far(whole, fails, tmp_path, monkeypatch, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "none.pt" in fails(start, "--fresh", "--out", tmp_path, *SETTINGS, "--start", "none.pt")
    assert load(tmp_path)["step"] == load(whole)["step"]  # as it was
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    start("--fresh", "--out", tmp_path, *SETTINGS, "pretrain.epochs=0")
    assert load(tmp_path)["step"] == 0
    start("--fresh", "--out", tmp_path, *SETTINGS, "pretrain.epochs=0")
    assert "finished:" in capsys.readouterr().out
