"""Train any task at any scale: one loop, one process or many.

    python train.py                                            # scenes: pre-train, evaluate, draw masks
    torchrun --nproc_per_node 8 train.py pretrain --scale paper
    python train.py check pretrain --scale flickr8k            # look through the files before any training
    python train.py pretrain model.vision_layers=6 pretrain.batch_size=32

Out (out/SCALE/TASK unless --out says otherwise): checkpoint.pt, log.jsonl, metrics.json, masks.png. The same command in
the same folder goes on where it stopped; --fresh starts over.

A line of log.jsonl, means over the steps since the line before and over all processes:
  step               optimizer steps done                    epoch             passes over the data, a fraction
  loss               sum of the parts                        loss_itc          (focal) image-text contrastive loss
  loss_itm           matching; 0.6365 is the floor of a constant answer at one match to two non-matches
  loss_soft_itm      matching on soft-masked images          loss_mlm          masked language modelling
  itm_accuracy       mean of the accuracy on matches and on non-matches: 0.5 is chance; soft_itm_accuracy likewise
  mask_mean          mean of the soft mask over patches, 0 to 1              temp   temperature of the contrastive loss
  alpha              weight of the twin's soft targets       lr                learning rate at this step
  grad_norm          length of the whole gradient, before clipping
  bad_images         records replaced so far, because their image or caption could not be used
  truncated          share of captions cut at data.max_tokens
  pairs_per_second   over all processes                      seconds           since this process started
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
import warnings

import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import eval as evaluation
import softmask

TASKS = ("pretrain",)
# Settings that do not change what a run computes: a run may go on under other values of them.
FREE_SETTINGS = {"num_workers", "device", "checkpoint_every_steps", "max_bad_image_share", "eval", "scale"}


def lr_at(step: int, total_steps: int, task) -> float:
    """Learning rate of a step, from 0: linear warm-up from warmup_lr, then a cosine from lr to min_lr. [ALBEF]"""
    if step < task.warmup_steps:
        return task.warmup_lr + (task.lr - task.warmup_lr) * step / task.warmup_steps
    done = (step - task.warmup_steps) / max(total_steps - task.warmup_steps, 1)
    return task.min_lr + (task.lr - task.min_lr) * (1 + math.cos(math.pi * done)) / 2


def parameter_groups(model, weight_decay: float) -> list[dict]:
    """Groups for AdamW: weight decay spares biases, norms, position and [CLS] embeddings; the temperature stands alone.

    [ours]: ALBEF decays temperature, position and [CLS] embeddings too.
    """
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name != "temp":
            spare = parameter.ndim < 2 or name.endswith(("pos_embed", "cls_token", "position.weight"))
            (spared if spare else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay, "name": "decayed"},
        {"params": spared, "weight_decay": 0.0, "name": "spared"},
        {"params": [model.temp], "weight_decay": 0.0, "name": "temp"},
    ]


def pretrain_losses(model, batch, config, special, alpha, seeds):
    """Augment a batch on its device and return the model's losses, statistics and features for the queue.

    special: mask_id and ordinary_ids of the tokenizer; seeds: what all draws for this micro-batch depend on.
    """
    method, device = config.method, batch["image"].device
    torch.manual_seed(data.hash63("dropout", *seeds))
    generator = torch.Generator(device).manual_seed(data.hash63("step", *seeds))
    masked_ids, mlm_labels = softmask.mask_text(
        batch["input_ids"], batch["word_ids"], *special, method.mlm_probability, method.mlm_random_replacement, generator
    )
    image = softmask.distort_images(
        batch["image"].float() / 255, method.distort_brightness, method.distort_contrast, method.distort_blur,
        method.distort_hue, method.distort_grayscale, generator,
    )  # fmt: skip
    with evaluation.autocast(config, device):
        return model(
            softmask.normalize(image), batch["input_ids"], batch["attention_mask"], masked_ids, mlm_labels,
            batch["word_ids"], batch["image_ids"] if method.image_ids else None, alpha, generator,
        )  # fmt: skip


def train(model, optimizer, loader, config, task, run):
    """Train from run.step to run.total_steps. run: the Run that logs, saves and counts."""
    device, world = evaluation.resolve_device(config), evaluation.world_size()
    wrapped = model
    if world > 1:
        device_ids = [device] if device.type == "cuda" else None
        # torch 2.13 has a new name for broadcast_buffers and warns of the old, the one that 2.11 knows
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        wrapped = DistributedDataParallel(model, device_ids, broadcast_buffers=False, gradient_as_bucket_view=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batches = iter(loader)
    model.train()
    for step in range(run.step, run.total_steps):
        lr = lr_at(step, run.total_steps, task)
        for group in optimizer.param_groups:
            group["lr"] = lr * task.temp_lr / task.lr if group["name"] == "temp" else lr
        alpha = config.method.alpha * min(1.0, step / run.steps_per_epoch)
        model.clamp_temp()
        model.update_twin()
        optimizer.zero_grad()
        features = []
        for micro in range(task.accumulation):
            batch = next(batches)
            run.count(batch)
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items() if isinstance(v, torch.Tensor)}
            seeds = (config.seed, step, evaluation.rank() * task.accumulation + micro)
            last = micro == task.accumulation - 1
            with contextlib.nullcontext() if last or world == 1 else wrapped.no_sync():
                losses, stats, features_m = pretrain_losses(wrapped, batch, config, run.special, alpha, seeds)
                loss = sum(losses.values())
                (loss / task.accumulation).backward()
            features.append(features_m)
            run.add({"loss": loss} | {f"loss_{name}": value for name, value in losses.items()} | stats)
        norm = torch.nn.utils.clip_grad_norm_(trained, task.clip_norm or math.inf)
        if not norm.isfinite():  # before it enters the weights
            raise data.InputError(
                f"gradient no longer finite in step {step + 1}; the last good state is {run.checkpoint_file}; lower "
                "lr, or set clip_norm"
            )
        optimizer.step()
        model.enqueue(*(None if part[0] is None else torch.cat(part) for part in zip(*features)))
        run.step_done({"alpha": alpha, "lr": lr, "grad_norm": norm}, model, optimizer)


class Run:
    """The output folder of a run: its log, its checkpoint, its counters. Process 0 alone writes."""

    def __init__(self, out, config, settings, task_name, task, steps_per_epoch, tokenizer):
        """settings: config as a dict, as it was before the scenes' folder went in: what the checkpoint holds."""
        self.out, self.config, self.settings, self.task_name = out, config, settings, task_name
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = task.epochs * steps_per_epoch
        self.step = 0
        self.global_batch = task.batch_size * task.accumulation * evaluation.world_size()
        self.vocab = softmask.vocabulary(tokenizer)
        ordinary = sorted(set(range(len(self.vocab))) - set(tokenizer.all_special_ids))
        device = evaluation.resolve_device(config)
        self.special = tokenizer.mask_token_id, torch.tensor(ordinary, device=device)
        self.bad_images, self.seen = 0, 0  # over all processes, up to the last line of the log
        self.sums, self.counts = {}, torch.zeros(3, dtype=torch.float64)  # of this process, since that line
        self.started = self.interval_started = time.perf_counter()
        self.bar = None

    @property
    def checkpoint_file(self):
        return os.path.join(self.out, "checkpoint.pt")

    def resume(self, model, optimizer):
        """Go on from the folder's checkpoint: weights, twin, queues, optimizer, step. Returns whether there is one.

        The log is cut to the checkpoint's step: a kill leaves lines beyond it, and may cut the last one.
        """
        found = os.path.isfile(self.checkpoint_file)
        if found:
            self.load(model, optimizer, softmask.read_checkpoint(self.checkpoint_file))
        steps = softmask.gather(torch.tensor([self.step], device=model.temp.device)).tolist()
        if len(set(steps)) > 1:
            raise data.InputError(
                f"the processes find checkpoints of steps {steps} in {self.out}; give --out a folder that all "
                "machines share"
            )
        log = os.path.join(self.out, "log.jsonl")
        if evaluation.rank() == 0 and os.path.isfile(log):
            with open(log, encoding="utf-8") as file:
                lines = [line for line in file if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            data.write_atomically(log, "".join(lines).encode())
        if found and self.step == self.total_steps:
            say(f"finished: {self.checkpoint_file} is at step {self.step} of {self.total_steps}; --fresh starts over")
        elif found:
            say(f"goes on from step {self.step} of {self.total_steps} in {self.checkpoint_file}")
        return found

    def load(self, model, optimizer, checkpoint):
        """Take over a checkpoint of this run; InputError where it was made under other settings."""
        changed = changed_settings(checkpoint["config"], self.settings)
        for name, key in (("pairs a step", "global_batch"), ("steps, from the number of records", "total_steps")):
            if checkpoint.get(key) != getattr(self, key):
                changed.append(f"{name}: {checkpoint.get(key)} then, {getattr(self, key)} now")
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

    def count(self, batch):
        """Count the records of a batch and those of them that were replaced; too many of these stop the run."""
        for path, reason in batch["replaced"]:
            tqdm.write(f"bad record, replaced by another: {path}: {reason}", file=sys.stderr)
        self.counts += torch.tensor([len(batch["replaced"]), len(batch["image"]), batch["truncated"]])
        bad = self.bad_images + int(self.counts[0])
        seen = self.seen + int(self.counts[1]) * evaluation.world_size()
        share = self.config.max_bad_image_share
        if bad > max(share * seen, 10 if share else 0):  # the first few are no share yet
            raise data.InputError(
                f"{bad} of {seen} records were bad, more than max_bad_image_share {share}; see the lines above, and "
                "python train.py check"
            )

    def add(self, values):
        """Add one micro-batch's values to the running means."""
        for name, value in values.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = (total + torch.as_tensor(value).detach(), count + 1)

    def step_done(self, values, model, optimizer):
        """After an optimizer step: log every log_every_steps, save every checkpoint_every_steps and at the end."""
        self.step += 1
        self.add(values)
        last = self.step == self.total_steps
        if self.bar is None and evaluation.rank() == 0:
            self.bar = tqdm(total=self.total_steps, initial=self.step - 1, unit="step", smoothing=0.1, mininterval=1.0)
        if self.bar is not None:
            self.bar.update()
        if self.step % self.config.log_every_steps == 0 or last:
            self.log()
        if self.step % self.config.checkpoint_every_steps == 0 or last:
            self.save(model, optimizer)

    def close(self):
        """End the line of the progress bar."""
        if self.bar is not None:
            self.bar.close()

    def log(self):
        """Write a line of log.jsonl."""
        means = torch.stack([total.double().cpu() / count for total, count in self.sums.values()])
        counts = self.counts
        if evaluation.world_size() > 1:
            device = evaluation.resolve_device(self.config)
            both = torch.cat([means / evaluation.world_size(), counts]).to(device)
            dist.all_reduce(both)
            means, counts = both[:-3].cpu(), both[-3:].cpu()
        bad, pairs, truncated = counts.tolist()
        self.bad_images, self.seen = self.bad_images + int(bad), self.seen + int(pairs)
        line = {"step": self.step, "epoch": self.step / self.steps_per_epoch}
        line |= {name: float(f"{mean:.6g}") for name, mean in zip(self.sums, means.tolist())}
        now = time.perf_counter()
        line |= {"bad_images": self.bad_images, "truncated": truncated / pairs}
        line |= {"pairs_per_second": round(pairs / (now - self.interval_started), 1)}
        line |= {"seconds": round(now - self.started, 1)}
        self.sums, self.counts, self.interval_started = {}, torch.zeros_like(self.counts), now
        if evaluation.rank() == 0:
            with open(os.path.join(self.out, "log.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            parts = ("itc", "itm", "soft_itm", "mlm")
            text = " ".join(f"{part} {line[f'loss_{part}']:.3f}" for part in parts if f"loss_{part}" in line)
            text += f" | itm acc {line['itm_accuracy']:.3f} temp {line['temp']:.3f} {line['pairs_per_second']:.0f} pairs/s"
            self.bar.set_postfix_str(text)

    def save(self, model, optimizer):
        """Write the checkpoint, whole or not at all."""
        if evaluation.rank() == 0:
            checkpoint = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": self.step,
                "total_steps": self.total_steps,
                "epoch": self.step / self.steps_per_epoch,
                "seen": self.seen,
                "bad_images": self.bad_images,
                "global_batch": self.global_batch,
                "task": self.task_name,
                "config": self.settings,
                "vocab": self.vocab,
                "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
                "commit": git_commit(),
            }
            data.write_atomically(self.checkpoint_file, lambda file: torch.save(checkpoint, file))


def changed_settings(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Settings that differ between two configs and change what the run computes, as "key: old then, new now"."""
    changed = []
    for key in sorted(old.keys() | new.keys()):
        name = prefix + key
        if name in FREE_SETTINGS or key == "accumulation":  # as good as processes; pairs a step are checked
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += changed_settings(before, after, name + ".")
        elif before != after:
            changed.append(f"{name}: {before} then, {after} now")
    return changed


def git_commit() -> str | None:
    """The commit of this checkout, with + where files differ from it; None outside one."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        command = ["git", "-C", here, "describe", "--always", "--abbrev=40", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def say(text: str):
    """Print once, whatever the number of processes."""
    if evaluation.rank() == 0:
        print(text, flush=True)


@contextlib.contextmanager
def weights_of(path):
    """The tensors of a file of weights; what does not fit the model is an InputError that names the file."""
    state = softmask.read_state(path)
    try:
        yield state
    except ValueError as error:
        raise data.InputError(f"{path}: {error}") from None


def load_initial_weights(model, config, task):
    """Start the model from task.start, or the encoders from DeiT and BERT, and its twin from them."""
    if task.start is not None:
        path = softmask.checkpoint_path(task.start)
        with weights_of(path) as state:
            fresh = softmask.load_start(model, state)
        say(f"starts from {path}" + (f"; fresh: {', '.join(fresh)}" if fresh else ""))
        return
    encoders, vision, text = model.encoders, config.model.vision_weights, config.model.text_weights
    if vision is not None:
        with weights_of(vision) as state:
            softmask.load_deit(encoders, state)
        say(f"image encoder starts from {vision}")
    elif config.scale == "paper":
        raise data.InputError("model.vision_weights is null: at scale paper the image encoder starts from DeiT; name its file")
    if text is not None:
        with weights_of(text) as state:
            fresh = softmask.load_bert(encoders, state)
        say(f"text and fusion encoder start from {text}; fresh: cross-attention"
            + (", MLM head" if any("mlm_head" in name for name in fresh) else ""))  # fmt: skip
    model.encoders_m.load_state_dict(encoders.state_dict())


def pretrain(config, settings, out):
    """Pre-train, then evaluate. Returns the steps done and the metrics; arguments as of Run."""
    task, device = config.pretrain, evaluation.resolve_device(config)
    tokenizer = softmask.load_tokenizer(config.data.tokenizer)
    records = data.Records.from_json(config.data.pretrain_files, data.FORMATS["pretrain"])
    dataset = data.PairDataset(records, config.data.pretrain_image_root, config, config.seed)
    method = data.config_to_dict(config)["method"]
    method["queue_size"] = min(method["queue_size"], len(records) // 4)  # a longer one holds an image too many times

    torch.manual_seed(data.hash63("weights", config.seed))
    model = softmask.build_pretrain_model(len(tokenizer), data.config_to_dict(config)["model"], method)
    world = evaluation.world_size()
    blocks = task.batch_size, world, evaluation.rank(), task.accumulation, config.seed
    steps_per_epoch = data.ShuffledBatches(len(records), *blocks, 0).steps_per_epoch
    run = Run(out, config, settings, "pretrain", task, steps_per_epoch, tokenizer)
    model.to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, task.weight_decay), lr=task.lr, fused=True)
    if not run.resume(model, optimizer):
        load_initial_weights(model, config, task)
    if run.step < run.total_steps:
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        say(f"pretrain: {count / 1e6:.1f}M parameters, {len(records)} records, {run.total_steps} steps of "
            f"{run.global_batch} pairs, {world} process{'es' * (world > 1)} on {device}, {config.precision}")  # fmt: skip
        sampler = data.ShuffledBatches(len(records), *blocks, run.step)
        loader = data.make_loader(dataset, sampler, tokenizer, config.data.max_tokens, config.num_workers)
        with contextlib.closing(run):
            train(model, optimizer, loader, config, task, run)
        del loader
    elif run.total_steps == 0:  # epochs=0: the start as it is, evaluated and in our format
        run.save(model, optimizer)
    metrics = evaluation.evaluate_pretrained(model, tokenizer, config, out)
    return run.step, metrics


@contextlib.contextmanager
def locked(out):
    """Hold the folder for this run alone; a second run in it is an InputError. Process 0 holds the lock for all."""
    with contextlib.ExitStack() as stack:
        if evaluation.rank() == 0:
            file = stack.enter_context(open(os.path.join(out, ".lock"), "w"))
            try:
                import fcntl  # not on Windows, where runs are not kept apart

                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would live on in loader workers after a kill
            except ImportError:
                pass
            except OSError:
                raise data.InputError(f"another run is at work in {out}; give --out another folder") from None
        yield


def parse(arguments):
    """The command line: task, action and settings."""
    parser = argparse.ArgumentParser(
        description="Train a task; see config.yaml for every setting.", usage=__doc__.split("\n\n")[1]
    )
    parser.add_argument("words", nargs="*", metavar="[check] TASK key=value", help="task, and settings to override")
    parser.add_argument("--scale", default="scenes", help="scale of config.yaml (default: scenes)")
    parser.add_argument("--start", help="folder or file of the checkpoint to start from")
    parser.add_argument("--out", help="output folder (default: out/SCALE/TASK)")
    parser.add_argument("--fresh", action="store_true", help="start over although the folder holds a run")
    options = parser.parse_intermixed_args(arguments)
    overrides = [word for word in options.words if "=" in word]
    words = [word for word in options.words if "=" not in word]
    options.check = words[:1] == ["check"]
    words = words[options.check :] or ["pretrain"]
    if len(words) > 1 or words[0] not in TASKS:
        raise data.InputError(f"task {' '.join(words)!r} is none of {', '.join(TASKS)}")
    options.task = words[0]
    if options.start is not None:
        overrides.append(f"{options.task}.start={json.dumps(options.start)}")
    options.config = data.load_config(options.scale, overrides)
    options.out = options.out or os.path.join("out", options.scale, options.task)
    return options


def main(arguments):
    options = parse(arguments)
    config = options.config
    evaluation.join_processes(config)
    config = evaluation.with_scenes(config)
    if options.check:
        return 0 if data.check(config, options.task) else 1
    os.makedirs(options.out, exist_ok=True)
    with locked(options.out):
        if options.fresh and evaluation.rank() == 0:
            for name in ("checkpoint.pt", "best.pt", "log.jsonl", "metrics.json"):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(options.out, name))
        if evaluation.world_size() > 1:
            dist.barrier()
        settings = data.config_to_dict(options.config)
        step, metrics = {"pretrain": pretrain}[options.task](config, settings, options.out)
        if evaluation.rank() == 0:
            result = {"task": options.task, "scale": config.scale, "seed": config.seed, "step": step}
            result |= {"settings": settings, "metrics": metrics}
            data.write_atomically(os.path.join(options.out, "metrics.json"), json.dumps(result, indent=1).encode())
            print(evaluation.format_metrics(metrics))
            print(f"all of it in {options.out}")
    return 0


if __name__ == "__main__":
    with evaluation.one_line_errors():
        sys.exit(main(sys.argv[1:]))
