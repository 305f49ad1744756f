"""Train any task at any scale: one loop, one process or many.

    python train.py                                            # scenes: pre-train, evaluate, draw masks
    python train.py vqa                                        # fine-tune its output; likewise the other tasks
    torchrun --nproc_per_node 8 train.py pretrain --scale paper
    torchrun --nproc_per_node 8 train.py retrieval --scale paper retrieval.start=ALBEF.pth data.retrieval=flickr30k
    python train.py check pretrain --scale flickr8k            # look through the files before any training
    python train.py pretrain model.vision_layers=6 pretrain.batch_size=32

Tasks: pretrain, retrieval, vqa, nlvr2_pretrain, nlvr2, entailment, grounding. Pre-training ends with its evaluation;
fine-tuning is evaluated on val after each epoch, the best epoch is kept as best.pt and tested once, at the end.
Out (out/SCALE/TASK unless --out says otherwise): checkpoint.pt, best.pt, log.jsonl, metrics.json, and masks.png,
masks_STEP.png of pre-training, answers_val.json and answers_test.json of VQA. The same command in the same folder goes
on where it stopped; --fresh starts over.
SIGTERM and ctrl-C: a step under way is finished and a checkpoint written, else the run ends at once.

A line of log.jsonl, means over the steps since the line before and over all processes:
  step               steps done, skipped ones too            epoch             passes over the data, a fraction
  loss               sum of the parts, in pre-training those of ITM times method.itm_weight
  loss_itc           (focal) image-text contrastive loss
  loss_itm           matching; 0.6365, what a constant answer has at one match to two non-matches, until the encoders tell
                     pairs apart: on the scenes within a hundred steps after those of loss_words
  loss_soft_itm      matching on soft-masked images          loss_mlm          masked language modelling
  loss_words         the caption's words, read off the patches, alone in the first steps: method.words_first
  loss_vqa           answers, weighted, per question         loss_cls          NLVR2, entailment
  loss_ta            text assignment, before NLVR2           accuracy          of cls and ta on a batch, 0 to 1
  itm_accuracy       mean of the accuracy on matches and on non-matches: 0.5 is chance; soft_itm_accuracy likewise
  mask_mean          mean of the soft mask over patches, 0 to 1: how much of an image it hides
  temp               temperature of the contrastive loss; on the scenes it falls slowly from 0.07
  alpha              weight of the twin's soft targets       lr                learning rate
  grad_norm          length of the whole gradient, before clipping
  bad_images         records replaced so far, because their image, text or answers could not be used
  skipped_steps      steps left out so far, their loss or gradient not being finite; the means of what depends on the
                     batch are without them, but for truncated
  truncated          share of texts cut at the task's max_tokens; of VQA its questions
  pairs              records seen so far, over all processes
  txt_r1, img_r1     R@1 by ITC on val, 0 to 100: in pre-training every eval_every_steps, and then at its end too
  pairs_per_second   over all processes, but for evaluation  seconds           since the model was built
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import warnings

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl-C in the seconds of imports: no traceback

import torch
import torch.distributed as dist
import torch.utils.checkpoint
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import eval as evaluation
import softmask

# Settings that do not change what a run computes: a run may go on under other values of them.
FREE_SETTINGS = evaluation.CHANGES_NO_FIGURE - {"seed"} | {
    "compile", "checkpointing", "eval.batch_size", "scale", "data.grounding_boxes", "data.foils",
    "data.tokenizer"}  # its entries are compared
# Likewise, wherever they stand: accumulation is as good as processes, pairs a step are checked; test is read after the
# training; annotation files are compared by content, and they and the images may have moved.
FREE_KEYS = {"accumulation", "test", "train", "pretrain_files", "nlvr2_pretrain_files", "image_root", "vg_image_root",
             "pretrain_image_root"}
# Parts of a setting's name that the training of these tasks alone, or their choice of the best epoch, reads.
READERS = {task: (task,) for task in data.TASKS} | {
    "retrieval_sets": ("retrieval",), "top_k": ("retrieval",), "answers_top_k": ("vqa",),
    "queue_size": ("pretrain", "retrieval", "grounding"), "attention_layer": ("pretrain", "grounding"),
} | dict.fromkeys(("soft_mask", "soft_mask_negatives", "focal_gamma", "mask_text_for", "mlm_probability",
                   "mlm_random_replacement", "itm_weight", "distort_brightness", "distort_contrast", "distort_blur",
                   "distort_hue", "distort_grayscale", "clean_teacher", "words_first", "image_ids"), ("pretrain",))


def lr_at(step: int, total_steps: int, task) -> float:
    """Learning rate of a step, from 0: linear warm-up from warmup_lr, then a cosine from lr to min_lr. [ALBEF]

    Both move at every step [ours]; ALBEF's warm-up moves once in 100 steps, its cosine once an epoch, after a first epoch
    at lr: a higher mean rate, by 2 % in pre-training, by 7 % to a third in fine-tuning.
    """
    if step < task.warmup_steps:
        return task.warmup_lr + (task.lr - task.warmup_lr) * step / task.warmup_steps
    done = (step - task.warmup_steps) / max(total_steps - task.warmup_steps, 1)
    return task.min_lr + (task.lr - task.min_lr) * (1 + math.cos(math.pi * done)) / 2


def parameter_groups(model, task) -> list[dict]:
    """Groups for Optimizer: biases, norms [ALBEF], temperature, position and [CLS] embeddings [ours] are spared weight
    decay; the image encoder, the temperature and, if task.muon_lr is not None, the weight matrices of the layers and of
    the patch embedding have learning rates of their own, lr_scale times the schedule's [ours; ALBEF: one for all].
    """
    scales = {"temp": task.temp_lr / task.lr, "vision": 1.0 if task.vision_lr is None else task.vision_lr / task.lr}
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spare = parameter.ndim < 2 or name.endswith(("pos_embed", "cls_token", "position.weight"))
            part = "temp" if name == "temp" else "vision" if name.startswith("encoders.vision.") else "others"
            matrix = parameter.ndim > 1 and any(kind in name for kind in (".blocks.", ".layers.", ".patch_embed."))
            muon = task.muon_lr is not None and matrix
            groups.setdefault((part, 0.0 if spare else task.weight_decay, muon), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, "muon": muon,
         "lr_scale": scales.get(part, 1.0) * (task.muon_lr / task.lr if muon else 1.0)}
        for (part, decay, muon), parameters in groups.items()
    ]


class Optimizer(torch.optim.AdamW):
    """AdamW [ALBEF]; groups with "muon" true, weight matrices, are updated by Muon instead [ours].

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): the momentum, made orthogonal by five steps of
    a Newton-Schulz iteration, at the length of an AdamW update (Liu et al., arXiv 2502.16982). torch.optim.Muon iterates
    in bfloat16, for which a CPU without such products takes tens of times as long.
    """

    def make_moments(self):
        """AdamW's state as before its first step, where there is none: made between a step's activations, it would keep
        their memory in pieces too small for the next step's."""
        for group in self.param_groups if not self.state else []:
            for parameter in group["params"] if not group["muon"] else []:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros((), device=parameter.device)} | moments

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}  # matrices of one shape are a batch
            for parameter in group["params"] if group["muon"] else []:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in alike.items():
                states = [self.state[parameter] for parameter in parameters]
                for state, parameter in zip(states, parameters):
                    state["step"] = state.get("step", torch.tensor(0.0)) + 1  # AdamW's load_state_dict looks for it
                    state.setdefault("momentum", torch.zeros_like(parameter))
                grads, momenta = [parameter.grad for parameter in parameters], [state["momentum"] for state in states]
                torch._foreach_lerp_(momenta, grads, 0.05)
                updates = torch.stack(torch._foreach_lerp(grads, momenta, 0.95))  # Nesterov's
                updates = orthogonal(updates.flatten(2)).view_as(updates)  # the patch embedding's kernels are rows
                length = 0.2 * math.sqrt(max(shape[0], shape[1:].numel()))
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, updates.unbind(), alpha=-group["lr"] * length)
        every, self.param_groups = self.param_groups, [group for group in self.param_groups if not group["muon"]]
        super().step()  # AdamW's, of its own groups
        self.param_groups = every


def orthogonal(matrices):
    """Nearly the nearest orthogonal matrix to each of matrices (n, rows, columns), by the Newton-Schulz iteration with Jordan
    et al.'s coefficients: singular values of 0.7 to 1.2, but for those below a 700th of the matrix's norm, which stay less."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide else x.mT


def prepare(model, config):
    """Activation checkpointing and torch.compile, where config has them on: no result changes beyond rounding. [ours]

    The image encoder is compiled as a whole, so that a GPU need not wait for the calls of its layers; text layers, whose
    sizes vary, one by one: as wholes they take twice as long to compile. The layer of the word attention is not compiled:
    torch.autograd.grad takes a gradient in its midst.
    """
    if config.compile:
        torch._functorch.config.donated_buffer = False  # backward passes run twice: for the word attention, for the loss
        torch._inductor.config.fallback_random = True  # the dropout of a run that is not compiled
        torch._dynamo.config.specialize_float = True  # dropout is a constant: as a variable all was traced twice
        torch._dynamo.config.optimize_ddp = False  # it would cut each layer at the ends of DDP's buckets
        torch._dynamo.config.recompile_limit = 64  # TextLayer is used in a dozen ways; beyond the limit of 8 it ran as is
        if torch.__version__ < "2.12":  # its choice of tiles fails on lengths that vary: pytorch issue 181563
            torch._inductor.config.triton.coalesce_tiling_analysis = False
    attending = None
    if isinstance(model, softmask.PretrainModel):  # also where evaluation alone has word attention
        attending = model.encoders.fusion.layers[model.attention_layer]
    for part in model.modules():
        text = isinstance(part, softmask.TextLayer)
        if config.compile and (isinstance(part, softmask.VisionTransformer) or (text and part is not attending)):
            part.forward = torch.compile(part.forward, dynamic=True if text else None)  # None: once a second size comes
        if config.checkpointing and (text or isinstance(part, softmask.VisionBlock)):
            part.forward = functools.partial(torch.utils.checkpoint.checkpoint, part.forward, use_reentrant=False)


def pretrain_losses(model, image, batch, config, special, alpha, generator):
    """Mask the text, distort the images; what task_losses returns.

    image (B, 3, S, S), in [0, 1]; batch: of make_loader; special: mask_id and ordinary_ids of softmask.mask_text.
    """
    method = config.method
    masked_ids, mlm_labels = softmask.mask_text(
        batch["input_ids"], batch["word_ids"], *special, method.mlm_probability, method.mlm_random_replacement, generator
    )
    clean_image = softmask.normalize(image) if method.clean_teacher else None
    image = softmask.distort_images(
        image, method.distort_brightness, method.distort_contrast, method.distort_blur,
        method.distort_hue, method.distort_grayscale, generator,
    )
    with evaluation.autocast(config, image.device):
        return model(
            softmask.normalize(image), batch["input_ids"], batch["attention_mask"], masked_ids, mlm_labels,
            batch["word_ids"], batch["image_ids"] if method.image_ids else None, alpha, generator, clean_image,
        )


def task_losses(task_name, model, batch, config, special, alpha, seeds, words_only=False):
    """The losses of a batch on its device, statistics for the log, and features for the queue, or None.

    seeds: what all draws for this micro-batch depend on. words_only: those of PretrainModel.words_losses.
    """
    device = batch["image"].device
    torch.manual_seed(data.hash63("dropout", *seeds))
    generator = torch.Generator(device).manual_seed(data.hash63("step", *seeds))
    image = batch["image"].float().div_(255)
    if task_name == "pretrain" and not words_only:
        return pretrain_losses(model, image, batch, config, special, alpha, generator)
    image, text = softmask.normalize(image), (batch["input_ids"], batch["attention_mask"])
    with evaluation.autocast(config, device):
        if words_only:
            return model.words_losses(image, batch["input_ids"], batch["word_ids"]), {}, None
        if task_name in ("retrieval", "grounding"):
            nothing_masked = torch.full_like(batch["input_ids"], -100)
            masking = batch["input_ids"], nothing_masked, batch["word_ids"]
            return model(image, *text, *masking, batch["image_ids"], alpha, generator)
        if task_name == "vqa":
            answers = (batch[f"answer_{name}"] for name in ("ids", "mask", "question", "weights"))
            return *model(image, *text, *answers, alpha), None
        if task_name == "nlvr2_pretrain":
            return *model(image, *text, batch["image_ids"], generator), None
        return *model(image, *text, batch["labels"], alpha), None


def train(model, optimizer, loader, config, task, run):
    """Train from run.step to run.total_steps. run: the Run that logs, saves and counts."""
    device, world = evaluation.resolve_device(config), evaluation.world_size()
    pretraining, has_queue = run.task_name == "pretrain", isinstance(model, softmask.PretrainModel)
    itm_weight = config.method.itm_weight if pretraining else 1.0
    wrapped = model
    if world > 1:
        device_ids = [device] if device.type == "cuda" else None
        # torch 2.13 has a new name for broadcast_buffers and warns of the old, the one that 2.11 knows
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        wrapped = DistributedDataParallel(model, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer.make_moments()
    batches = iter(loader)
    model.train()
    for step in range(run.step, run.total_steps):
        words_only = step < run.words_steps  # a training of its own, with warm-up and cosine
        begin, end = (0, run.words_steps) if words_only else (run.words_steps, run.total_steps)
        lr = lr_at(step - begin, end - begin, task)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        alpha = config.method.alpha * (min(1.0, step / run.steps_per_epoch) if task.ramp_alpha else 1.0)
        if has_queue:
            model.clamp_temp()
        model.update_twin()
        optimizer.zero_grad()
        features, values = [], []
        for micro in range(task.accumulation):
            batch = next(batches)
            run.count(batch)
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, torch.Tensor)}
            seeds = (config.seed, step, evaluation.rank() * task.accumulation + micro)
            last = micro == task.accumulation - 1
            called = model if words_only else wrapped
            with contextlib.nullcontext() if last or world == 1 else wrapped.no_sync():
                losses, stats, features_m = task_losses(
                    run.task_name, called, batch, config, run.special, alpha, seeds, words_only
                )
                loss = sum(value * (itm_weight if name.endswith("itm") else 1.0) for name, value in losses.items())
                values.append({"loss": loss} | {f"loss_{name}": value for name, value in losses.items()} | stats)
                # one that is not finite makes the whole gradient NaN: so the other processes learn of it
                finite = sum(values[-1].values()).isfinite()
                (loss / task.accumulation * torch.where(finite, 1.0, math.nan)).backward()
            features.append(features_m)
        if words_only and world > 1:  # without DistributedDataParallel: it would wait for the gradients of the rest
            for parameter in trained:
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad.div_(world))
        norm = torch.nn.utils.clip_grad_norm_(trained, task.clip_norm or math.inf)
        if norm.isfinite():
            optimizer.step()
            if has_queue and not words_only:
                model.enqueue(*(None if part[0] is None else torch.cat(part) for part in zip(*features)))
            for part in [*values, {"grad_norm": norm}]:
                run.add(part)
        else:  # before it enters weights, queues and log
            run.skip(values)
        run.step_done({"alpha": alpha, "lr": lr}, model, optimizer)


class Signals:
    """SIGTERM and SIGINT end the process, as a context around all of it: during training after the step under way, with a
    checkpoint, else at once. [ours]

    A second one ends it whatever it does, unless it comes within a second: timeout(1) sends every signal twice.
    """

    def __init__(self):
        self.caught, self.caught_at = 0, 0.0  # the first one's number and time
        self.at_once, self.place, self.command = True, "", "the same command"

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if not self.caught:
            self.caught, self.caught_at = number, time.monotonic()
            self.end(number, frame)
        elif time.monotonic() > self.caught_at + 1:
            os._exit(128 + number)

    def end(self, number, frame):
        """End by an exception where that may be now; in a destructor, which would swallow it, a moment later."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises an error for each loader worker that ends
        while frame and frame.f_code.co_name != "__del__":
            frame = frame.f_back
        if self.at_once and frame:
            signal.signal(signal.SIGALRM, self.end)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        elif self.at_once:
            signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + self.caught))
            signal.alarm(10)  # where the end hangs
            sys.exit(128 + self.caught)

    def end_at_once(self, at_once):
        """From here on a signal ends the process at once, or else waits for agree; one that waited ends it here."""
        self.at_once = at_once
        if self.caught:
            self.end(self.caught, None)

    def agree(self, device):
        """Whether any process had caught one after this step: the same answer in all of them."""
        if evaluation.world_size() == 1:
            return self.caught
        agreed = int(softmask.gather(torch.tensor([self.caught], device=device)).max())
        self.caught = self.caught or agreed
        return agreed

    def __exit__(self, kind, error, trace):
        """Say that a signal ended it: also where a lost loader worker or process, which got one too, was noticed first."""
        if isinstance(error, RuntimeError) and evaluation.world_size() > 1:
            self.at_once = False
            time.sleep(1)  # in which the signal that ended another process comes here, too
        if self.caught and isinstance(error, (SystemExit, RuntimeError)):
            if evaluation.rank() == 0:
                name = signal.Signals(self.caught).name
                there = " from there" if self.place else ""
                print(f"stopped by {name}{self.place}; {self.command} goes on{there}", file=sys.stderr)
            sys.exit(128 + self.caught)


signals = Signals()  # of this process


class Run:
    """The output folder of a run: its log, its checkpoint, its counters. Process 0 alone writes."""

    def __init__(self, out, config, settings, task_name, task, steps_per_epoch, digest, tokenizer, validate, watch):
        """settings: config as a dict, as it was before the scenes' folder went in: what the checkpoint holds.

        digest: of the annotation files, if any is read. validate: after each epoch it takes the model and returns metrics,
        {} where there is nothing to evaluate on. watch: takes the model and the step, every eval_every_steps, and returns
        fields for the log; None: never.
        """
        self.out, self.config, self.settings, self.task_name = out, config, settings, task_name
        self.checkpoint_file, self.best_file = os.path.join(out, "checkpoint.pt"), os.path.join(out, "best.pt")
        self.validate, self.watch, self.digest, self.commit = validate, watch, digest, git_commit()
        self.best, self.validated = None, 0  # {epoch, score, metrics} of the best epoch on val; epochs evaluated on it
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = task.epochs * steps_per_epoch
        self.words_steps = int(config.method.words_first * self.total_steps) if task_name == "pretrain" else 0  # the first
        self.step = 0
        self.global_batch = task.batch_size * task.accumulation * evaluation.world_size()
        self.vocab = softmask.vocabulary(tokenizer)
        ordinary = sorted(set(range(len(self.vocab))) - set(tokenizer.all_special_ids))
        self.device = evaluation.resolve_device(config)
        self.special = tokenizer.mask_token_id, torch.tensor(ordinary, device=self.device)
        self.saved = None  # step of the last checkpoint
        self.skipped_steps = 0
        self.bad_images, self.seen = 0, 0  # over all processes, up to the last call of collect
        self.counts = torch.zeros(2, dtype=torch.float64)  # the same two, of this process, since then
        self.sums = {}  # name: (sum, how many), since the last line of the log
        self.started = time.perf_counter()
        self.interval = self.started, 0  # when it began, and what was seen until then
        self.bar = None  # tqdm's, while it trains

    def resume(self, model, optimizer):
        """Go on from the folder's checkpoint: weights, twin, queues, optimizer, step. Returns whether there is one.

        InputError where the files of a run are there without one: a new run would take their place bit by bit. The log is
        cut to the checkpoint's step: a kill leaves lines beyond it, and may cut the last one.
        """
        found = os.path.exists(self.checkpoint_file)
        if found:
            checkpoint = softmask.read_checkpoint(self.checkpoint_file)
            try:
                self.load(model, optimizer, checkpoint)
            except data.InputError:
                raise
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise data.InputError(
                    f"{self.checkpoint_file} is no checkpoint of this version ({error!r}); give --out another folder, or "
                    "--fresh to start over"
                ) from None
        elif any(os.path.exists(path) for path in (self.best_file, os.path.join(self.out, "metrics.json"))):
            raise data.InputError(f"{self.out} holds a run without its checkpoint.pt; give --out another folder, or --fresh "
                                  "to start over")
        steps = softmask.gather(torch.tensor([self.step], device=self.device)).tolist()
        if len(set(steps)) > 1:
            raise data.InputError(
                f"the processes find checkpoints of steps {steps} in {self.out}; give --out a folder that all "
                "machines share"
            )
        log = os.path.join(self.out, "log.jsonl")
        if evaluation.rank() == 0 and os.path.isfile(log):
            try:
                with open(log, encoding="utf-8") as file:
                    lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            except (KeyError, TypeError, ValueError):
                raise data.InputError(f"{log} is damaged; move it away, and the same command goes on without it") from None
            data.write_atomically(log, "".join(lines).encode())
        if found and self.step == self.total_steps:
            say(f"finished: {self.checkpoint_file} is at step {self.step} of {self.total_steps}; --fresh starts over")
        elif found:
            say(f"goes on from step {self.step} of {self.total_steps} in {self.checkpoint_file}")
        return found

    def load(self, model, optimizer, checkpoint):
        """Take over a checkpoint of this run; InputError where it was made under other settings."""
        then, now = (training_settings(settings, self.task_name) for settings in (checkpoint["config"], self.settings))
        then |= {"task": checkpoint["task"], "pairs a step": checkpoint.get("global_batch"),
                 "steps, from the number of records": checkpoint.get("total_steps")}
        now |= {"task": self.task_name, "pairs a step": self.global_batch,
                "steps, from the number of records": self.total_steps}
        changed = evaluation.differences(then, now, ("then", "now"))
        if checkpoint.get("digest") != self.digest:
            changed.append("content of the annotation files")
        if checkpoint["vocab"] != self.vocab:
            changed.append("entries of the tokenizer")
        if changed:
            raise data.InputError(
                f"{self.out} holds a run under other settings ({'; '.join(changed[:4])}); give --out another folder, or "
                "--fresh to start over"
            )
        softmask.load_weights(model, checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        self.step, self.bad_images, self.seen = checkpoint["step"], checkpoint["bad_images"], checkpoint["seen"]
        self.interval = self.started, self.seen
        self.best, self.validated = checkpoint["best"], checkpoint["validated"]
        self.sums = checkpoint["sums"] if evaluation.rank() == 0 else dict.fromkeys(checkpoint["sums"], (0.0, 0))
        self.saved, self.skipped_steps = self.step, checkpoint["skipped_steps"]

    def start_over(self):
        """Delete what a run before left in the folder: only once data, model and start are known to be good."""
        if evaluation.world_size() > 1:
            dist.barrier()  # a process may still read them
        if evaluation.rank() == 0:
            names = ["checkpoint.pt", "best.pt", "log.jsonl", "metrics.json", "answers_val.json", "answers_test.json"]
            pictures = re.compile(r"(masks(_\d+|_val|_over_training)?|curve)\.png")  # of a run, none of the user's
            names += filter(pictures.fullmatch, os.listdir(self.out))
            for name in [*names, ".fresh"]:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(self.out, name))
        signals.command += " without --fresh"

    def count(self, batch):
        """Count the records of a batch and those of them that were replaced; too many of these stop the run."""
        for path, reason in batch["replaced"]:
            tqdm.write(f"bad record, replaced by another: {path}: {reason}", file=sys.stderr)
        self.counts += torch.tensor([len(batch["replaced"]), len(batch["image"])])
        self.add({"truncated": batch["truncated"] / len(batch["image"])})
        bad = self.bad_images + int(self.counts[0])
        seen = self.seen + int(self.counts[1]) * evaluation.world_size()
        share = self.config.max_bad_image_share
        if bad > max(share * (seen + bad), 10 if share else 0):  # the first few are no share yet
            raise data.InputError(
                f"{bad} records were bad while {seen} were read, more than max_bad_image_share {share}; see the lines "
                "above, and python train.py check"
            )

    def add(self, values):
        """Add one micro-batch's values to the running means."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + torch.as_tensor(value).detach().double(), count + 1)

    def skip(self, values):
        """Count a step whose gradient is not finite, named after those of the values, of each micro-batch and process,
        that are not; more than max_skipped_steps stop the run."""
        names = [name for name in values[0] if name != "loss"]
        sums = torch.stack([sum(part[name] for part in values) for name in names])
        infinite = evaluation.all_reduced((~sums.isfinite()).float())
        what = ", ".join(name for name, flag in zip(names, infinite.tolist()) if flag) or "gradient"
        what = f"step {self.step + 1}: {what} not finite"
        if self.skipped_steps >= self.config.max_skipped_steps:
            raise data.InputError(f"{what}; {self.last_good()}; lower lr, set clip_norm, or raise max_skipped_steps")
        self.skipped_steps += 1
        if evaluation.rank() == 0:
            tqdm.write(f"{what}: skipped", file=sys.stderr)

    def last_good(self):
        """What a run that stops leaves behind, in words."""
        found = f"the last good checkpoint is {self.checkpoint_file}, of step {self.saved}"
        return "there is no checkpoint yet" if self.saved is None else found

    def step_done(self, values, model, optimizer):
        """After an optimizer step, whose alpha and lr are values: log every log_every_steps; save every checkpoint_every_steps,
        after each epoch, which is then evaluated, and where a signal asks the run to stop."""
        self.step += 1
        self.add(values)
        self.bar.update()
        last = self.step == self.total_steps
        if self.step % self.config.log_every_steps == 0 or last:
            self.log(model, last)
        stop = signals.agree(self.device)
        epoch_ends = self.step % self.steps_per_epoch == 0
        if stop or epoch_ends or self.step % self.config.checkpoint_every_steps == 0:
            self.save(model, optimizer)
        if stop:
            if evaluation.world_size() > 1:
                dist.barrier()  # none ends before process 0 has saved: torchrun would end that, too
            signals.place = f" at step {self.step} of {self.total_steps}"
            signals.end_at_once(True)
        if epoch_ends:
            signals.end_at_once(True)
            self.keep_best(model, optimizer)
            signals.end_at_once(False)

    def keep_best(self, model, optimizer):
        """At the end of an epoch not evaluated yet: evaluate on val; keep the model as best.pt if none was as good."""
        epoch = self.step // self.steps_per_epoch
        if epoch == self.validated:
            return
        began = time.perf_counter()
        metrics = self.validate(model)
        self.interval = self.interval[0] + time.perf_counter() - began, self.interval[1]
        model.train()
        self.validated = epoch
        if metrics:
            score = evaluation.score(self.task_name, metrics)
            say(f"epoch {epoch}: val {score:.2f}")
            if self.best is None or score > self.best["score"]:
                self.best = {"epoch": epoch, "score": score, "metrics": metrics}
                self.save(model, None)
            self.save(model, optimizer)

    def collect(self):
        """Add up counts and sums over all processes, the sums in process 0 alone: so a checkpoint can hold them."""
        values = [float(part) for pair in self.sums.values() for part in pair]
        values = torch.tensor(values + self.counts.tolist(), dtype=torch.float64, device=self.device)
        *values, bad, seen = evaluation.all_reduced(values).tolist()
        self.bad_images, self.seen = self.bad_images + int(bad), self.seen + int(seen)
        self.counts.zero_()
        pairs = zip(values[::2], values[1::2]) if evaluation.rank() == 0 else itertools.repeat((0.0, 0))
        self.sums = dict(zip(self.sums, pairs))

    def log(self, model, last):
        """Write a line of log.jsonl, with the figures of watch where they are due."""
        self.collect()
        now, (started, seen), watched = time.perf_counter(), self.interval, {}
        if self.watch and (last or self.step % self.config.eval_every_steps == 0):
            watched = self.watch(model, self.step)
            model.train()
        if evaluation.rank() == 0:
            means = {name: float(f"{total / number:.6g}") for name, (total, number) in self.sums.items()}
            line = {"step": self.step, "epoch": self.step / self.steps_per_epoch, **means, "bad_images": self.bad_images,
                    "skipped_steps": self.skipped_steps, "pairs": self.seen,
                    "pairs_per_second": round((self.seen - seen) / (now - started), 1),
                    "seconds": round(now - self.started, 1), **watched}
            path = os.path.join(self.out, "log.jsonl")
            with data.writing(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            shown = {name.removeprefix("loss_"): value for name, value in line.items()
                     if name.startswith("loss_") or name in ("itm_accuracy", "accuracy", "temp")}
            text = " ".join(f"{name} {value:.3f}" for name, value in shown.items())
            self.bar.set_postfix_str(f"{text} {line['pairs_per_second']:.0f} pairs/s")
        self.sums, self.interval = {}, (time.perf_counter(), self.seen)

    def save(self, model, optimizer):
        """Write the checkpoint, whole or not at all; without an optimizer as best.pt."""
        state = model.state_dict()
        broken = [name for name, value in state.items() if not value.isfinite().all()]
        if broken:
            what = f"step {self.step}: {len(broken)} weights or queues not finite, the first {broken[0]}"
            raise data.InputError(f"{what}; {self.last_good()}")
        if optimizer:
            self.collect()
        if evaluation.rank() == 0:
            checkpoint = {
                "model": state,
                "optimizer": optimizer and optimizer.state_dict(),
                "best": self.best,
                "validated": self.validated,
                "sums": self.sums,
                "step": self.step,
                "total_steps": self.total_steps,
                "epoch": self.step / self.steps_per_epoch,
                "seen": self.seen,
                "bad_images": self.bad_images,
                "skipped_steps": self.skipped_steps,
                "global_batch": self.global_batch,
                "task": self.task_name,
                "config": self.settings,
                "digest": self.digest,
                "vocab": self.vocab,
                "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
                "commit": self.commit,
            }
            path = self.checkpoint_file if optimizer else self.best_file
            data.write_atomically(path, lambda file: torch.save(checkpoint, file))
        if optimizer:
            self.saved = self.step


def training_settings(settings: dict, task: str) -> dict:
    """The settings, flat, that decide what the training of a task computes."""
    chosen = settings["data"]["retrieval"]
    files = settings["data"] | {"retrieval_sets": {chosen: settings["data"]["retrieval_sets"][chosen]}}
    return {
        name: value for name, value in evaluation.flatten(settings | {"data": files}).items()
        if name not in FREE_SETTINGS and name.rpartition(".")[2] not in FREE_KEYS
        and all(task in READERS.get(part, data.TASKS) for part in name.split("."))
    }


def git_commit() -> str | None:
    """The commit of this checkout, with + where files differ from it; None outside one."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        command = ["git", "-C", here, "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def say(text: str):
    """Print once, whatever the number of processes."""
    if evaluation.rank() == 0:
        print(text, flush=True)


@contextlib.contextmanager
def weights_of(path):
    """The tensors of a file of weights, and all that it holds: of train.py's `vocab` and `config`, too.

    What does not fit the model is an InputError that names the file.
    """
    content = softmask.read_dict(path)
    state = softmask.state_of(content, path)
    try:
        yield state, content
    except ValueError as error:
        raise data.InputError(f"{path}: {error}") from None


def start_file(config, task_name):
    """The checkpoint a task starts from: of the task that its setting `start` names, at the same scale, or a path."""
    start = getattr(config, task_name).start
    if start in data.TASKS:
        folder = os.path.join("out", config.scale, start)
        try:
            return softmask.checkpoint_path(folder)
        except FileNotFoundError:
            raise data.InputError(
                f"{task_name} starts from {start}, of which {folder} holds no checkpoint; run python train.py {start} "
                f"--scale {config.scale} first, or give {task_name}.start=FILE, or {task_name}.start=null"
            ) from None
    return None if start is None else softmask.checkpoint_path(start)


def load_initial_weights(model, config, task_name, vocab):
    """Start the model from its task's start, or the encoders from DeiT and BERT, and its twin from them."""
    path = start_file(config, task_name)
    if path is not None:
        with weights_of(path) as (state, content):
            if content.get("vocab") not in (None, vocab):
                raise ValueError("it was trained with another vocabulary; give data.tokenizer the same")
            sizes = content.get("config")  # ALBEF's has no part `model`
            sizes = sizes.get("model") if isinstance(sizes, dict) else None
            free = ("image_size", "dropout", "vision_weights", "text_weights")
            other = [f"model.{name}={value}" for name, value in (sizes or {}).items()
                     if name not in free and value != getattr(config.model, name, value)]
            if other:  # of which the numbers of heads would not be noticed
                raise ValueError(f"its model has other sizes; give {' '.join(other)}")
            fresh, left = softmask.load_start(model, state)

        def part(key):  # one name for all parameters of a part
            no_twin = key.startswith("encoders_m.") and not hasattr(model, "encoders_m")
            return "encoders_m" if no_twin else softmask.task_part(key) or key

        done, total = content.get("step"), content.get("total_steps")  # neither in ALBEF's
        say(f"starts from {path}" + f", of step {done} of {total}" * (done != total) + "".join(
            f"; {what}: {', '.join(sorted({part(key) for key in keys}))}"
            for what, keys in (("fresh", fresh), ("left over", left)) if keys))
        return
    encoders, vision, text = model.encoders, config.model.vision_weights, config.model.text_weights
    for name, file in (("vision_weights", vision), ("text_weights", text)):
        if file is not None and not os.path.isfile(file):
            raise data.InputError(f"model.{name}: {file} is missing")
    task = getattr(config, task_name)
    if vision is not None:
        with weights_of(vision) as (state, _):
            softmask.load_deit(encoders, state)
        say(f"image encoder starts from {vision}")
    elif config.scale == "paper":
        raise data.InputError("model.vision_weights is null: at scale paper the image encoder starts from DeiT; name its file")
    elif task.vision_lr is not None and task.vision_lr < task.lr:
        say(f"image encoder starts from nothing, with a learning rate of {task.vision_lr}: give model.vision_weights, or "
            f"{task_name}.vision_lr=null")
    if text is not None:
        with weights_of(text) as (state, _):
            fresh = softmask.load_bert(encoders, state)
        say(f"text and fusion encoder start from {text}; fresh: cross-attention"
            + (", MLM head" if any("mlm_head" in name for name in fresh) else ""))
    if vision is None and text is None:
        say("starts from nothing")
    if hasattr(model, "encoders_m"):
        model.encoders_m.load_state_dict(encoders.state_dict())


def run_task(task_name, config, settings, out, fresh):
    """Train a task, then evaluate. Returns the steps done and the metrics; fresh: start over; others as of Run."""
    task, device = data.task_settings(config, task_name), evaluation.resolve_device(config)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, image_size=task.image_size))
    tokenizer = softmask.load_tokenizer(config.data.tokenizer)
    as_dict = data.config_to_dict(config)
    method, world = as_dict["method"], evaluation.world_size()
    blocks = task.batch_size, world, evaluation.rank(), task.accumulation, config.seed
    digest, steps_per_epoch = None, 1
    evaluation.look_ahead(task_name, config)
    if task.epochs:  # 0: the start is evaluated, no training file is needed
        dataset = data.training_set(config, task_name)
        digest, steps_per_epoch = dataset.records.digest, data.ShuffledBatches(len(dataset), *blocks, 0).steps_per_epoch
        if len(set(softmask.gather(torch.tensor([int(digest[:15], 16)], device=device)).tolist())) > 1:
            raise data.InputError("the processes read annotation files that differ; give all machines the same")
        method["queue_size"] = min(method["queue_size"], len(dataset) // 4)  # a longer one holds a pair too many times

    torch.manual_seed(data.hash63("weights", config.seed))
    model = softmask.build_model(task_name, len(tokenizer), as_dict["model"], method)

    def evaluate(model, split="val"):
        return evaluation.evaluate(task_name, model, tokenizer, config, split, out)

    watch = None
    if task_name == "pretrain" and config.eval_every_steps:
        watch = evaluation.watch_pretraining(tokenizer, config, out)
    run = Run(out, config, settings, task_name, task, steps_per_epoch, digest, tokenizer, evaluate, watch)
    model.to(device)
    optimizer = Optimizer(parameter_groups(model, task), lr=task.lr, fused=True)
    if fresh or not run.resume(model, optimizer):
        load_initial_weights(model, config, task_name, run.vocab)
    if fresh:
        run.start_over()
    prepare(model, config)
    if run.step and run.step % run.steps_per_epoch == 0:
        run.keep_best(model, optimizer)  # where it ended before that
    if run.step < run.total_steps:
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(f"{task_name}: {count / 1e6:.1f}M parameters, {len(dataset)} records, {run.total_steps} steps of "
            f"{run.global_batch} pairs, {world} process{'es' * (world > 1)} on {device}, {config.precision}"
            + f"; {dataset.records.left_out} samples without a caption left out" * bool(dataset.records.left_out))
        schedules = [steps for steps in (run.words_steps, run.total_steps - run.words_steps) if steps]
        if task.warmup_steps >= min(schedules):
            say(f"{task_name}.warmup_steps ({task.warmup_steps}) are no fewer than its steps "
                f"({', then '.join(map(str, schedules))}): lr is never reached")
        if run.step < run.words_steps and (task.start or config.model.vision_weights):
            say(f"method.words_first: the first {run.words_steps} steps train a trained image encoder on words alone; "
                "method.words_first=0 leaves them out")
        if task.batch_size == 1 and isinstance(model, softmask.PretrainModel):
            say(f"{task_name}.batch_size is 1: without another pair in the batch ITM learns from matches alone")
        sampler = data.ShuffledBatches(len(dataset), *blocks, run.step)
        pinned = device.type == "cuda"
        loader = data.make_loader(dataset, sampler, tokenizer, task.max_tokens, config.num_workers, pinned)
        signals.end_at_once(False)
        with tqdm(total=run.total_steps, initial=run.step, unit="step", smoothing=0.1, mininterval=1.0,
                  disable=evaluation.rank() > 0) as run.bar:
            train(model, optimizer, loader, config, task, run)
        signals.end_at_once(True)
        del loader
    elif run.total_steps == 0:  # epochs=0: the start as it is, evaluated and in our format
        run.save(model, optimizer)
    if task_name == "pretrain":
        return run.step, evaluation.evaluate_pretrained(model, tokenizer, config, out)
    if run.best:
        if world > 1:
            dist.barrier()  # process 0 may still be writing it
        softmask.load_weights(model, softmask.read_checkpoint(run.best_file)["model"])
    metrics = {"val": run.best["metrics"], "best_epoch": run.best["epoch"]} if run.best else {"val": evaluate(model)}
    if task_name == "vqa" and run.best and run.best["epoch"] < task.epochs:
        evaluate(model)  # answers_val.json are those of the best epoch, as the metrics are
    return run.step, metrics | {"test": evaluate(model, "test")}


@contextlib.contextmanager
def locked(out):
    """Hold the folder for this run alone; a second run in it is an InputError. Process 0 holds the lock for all."""
    with contextlib.ExitStack() as stack:
        if evaluation.rank() == 0:
            file = stack.enter_context(open(os.path.join(out, ".lock"), "w"))
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would live on in loader workers after a kill
            except (BlockingIOError, PermissionError):
                raise data.InputError(f"another run is at work in {out}; give --out another folder") from None
            except OSError as error:
                print(f"{out}: its file system has no locks ({error}), so a second run would not be noticed", file=sys.stderr)
        yield


def parse(arguments):
    """The command line: its options, with check, task, config and out filled in."""
    parser = argparse.ArgumentParser(
        description="Train a task; see config.yaml for every setting.", usage=__doc__.split("\n\n")[1]
    )
    parser.add_argument("words", nargs="*", metavar="[check] TASK key=value", help="task, and settings to override")
    parser.add_argument("--scale", default="scenes", help="scale of config.yaml (default: scenes)")
    parser.add_argument("--start", help="folder or file of the checkpoint to start from: TASK.start=, as "
                        "it must be written under torchrun, which takes --start for an option of its own")
    parser.add_argument("--out", help="output folder (default: out/SCALE/TASK)")
    parser.add_argument("--fresh", action="store_true", help="start over although the folder holds a run")
    options = parser.parse_intermixed_args(arguments)
    overrides = [word for word in options.words if "=" in word]
    words = [word for word in options.words if "=" not in word]
    options.check = words[:1] == ["check"]
    words = words[options.check :] or ["pretrain"]
    if len(words) > 1 or words[0] not in data.TASKS:
        raise data.InputError(f"task {' '.join(words)!r} is none of {', '.join(data.TASKS)}")
    options.task = words[0]
    if options.start is not None:
        overrides.append(f"{options.task}.start={json.dumps(options.start, ensure_ascii=False)}")
    options.config = data.load_config(options.scale, overrides)
    options.out = options.out or os.path.join("out", options.scale, options.task)
    return options


def main(arguments):
    options = parse(arguments)
    config = options.config
    evaluation.join_processes(config)
    config = evaluation.with_scenes(config)
    if options.check:
        return 0 if evaluation.rank() or data.check(config, options.task) else 1  # once
    if os.path.isfile(options.out):
        raise data.InputError(f"--out {options.out} is a file; give it a folder")
    os.makedirs(options.out, exist_ok=True)
    with locked(options.out):
        marker = os.path.join(options.out, ".fresh")  # there until one of torchrun's starts has started over
        starts = os.environ.get("TORCHELASTIC_RESTART_COUNT")  # of torchrun; those after the one that did go on
        fresh = options.fresh and (starts in (None, "0") or os.path.exists(marker))
        if fresh and starts and evaluation.rank() == 0:
            pathlib.Path(marker).touch()
        if evaluation.world_size() > 1:
            dist.barrier()
        if not os.path.exists(os.path.join(options.out, ".lock")):  # process 0 has made it
            raise data.InputError(f"--out {options.out} is not shared; give a folder that all machines see")
        settings = data.config_to_dict(options.config)
        step, metrics = run_task(options.task, config, settings, options.out, fresh)
        if evaluation.rank() == 0:
            result = {"task": options.task, "scale": config.scale, "seed": config.seed, "step": step,
                      "settings": settings, "platform": evaluation.platform_of(config), "metrics": metrics}
            data.write_atomically(os.path.join(options.out, "metrics.json"), json.dumps(result, indent=1).encode())
            if metrics:  # nlvr2_pretrain has none
                print(evaluation.format_metrics(metrics))
            print(f"all of it in {options.out}")
    return 0


if __name__ == "__main__":
    with evaluation.one_line_errors(), signals:
        sys.exit(main(sys.argv[1:]))
