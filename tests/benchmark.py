"""Measure speed and memory: one JSON line per measurement.

    python tests/benchmark.py                                   # all of it at the paper's dimensions
    python tests/benchmark.py step --batch 64 --dtype bf16 --device cuda compile=true
    python tests/benchmark.py rerank vqa --steps 20
    python tests/benchmark.py images --images FOLDER

  step     optimizer steps of train.py on random data, every caption of full length; then the same with each innovation
           switched off, all of them (ALBEF), and a clean teacher on. They take turns step by step, on the same weights.
  rerank   ITM scores of one image with 64 and 128 texts, projection of its keys and values included
  vqa      ranking of 128 out of 3,128 answers of 5 tokens, from the question's fused states on
  images   decoding and augmentation on one core (CPU time, files in the page cache), whole and with
           data.decode_reduced, of a folder's JPEGs or of synthetic ones; distortions on the batch

key=value overrides config.yaml: model.image_size=224, retrieval.image_size=256, pretrain.max_tokens=30, ...
OMP_NUM_THREADS sets the threads. Seconds are medians. Fields of step:
  cost                share by which the full method's step is longer, median over rounds
  peak_memory_gb      CUDA: largest allocation; CPU: peak resident set of a process of its own; import_memory_gb of it
                      was there before the model was
  fixed_state_gb      weights, twin, gradients, the optimizer's moments, queues
  gflop_per_pair      matrix products by formula, see pair_flops; nothing that is computed twice by checkpointing, and
                      nothing of Muon's
  share_of_matmul     of the rate that one large product reaches in this process (matmul_gflop_s, same dtype)
  operations          handed to the device one by one in a step, less views and empty tensors; not under compile=true.
                      At few pairs a step a GPU waits for these.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import pathlib
import resource
import statistics
import sys
import tempfile
import time
import types

import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data
import eval as evaluation
import softmask
import train

NO_DISTORTIONS = [f"method.distort_{name}=0.0" for name in ("brightness", "contrast", "blur", "hue", "grayscale")]
VARIANTS = {  # what is switched off, or on
    "full": [],
    "no soft mask": ["method.soft_mask=false"],
    "no soft-masked negatives": ["method.soft_mask_negatives=false"],
    "no focal factor": ["method.focal_gamma=0.0"],
    "text masked for MLM alone": ["method.mask_text_for=mlm"],
    "no distortions": NO_DISTORTIONS,
    "clean teacher": ["method.clean_teacher=true"],
    "ALBEF": ["method.soft_mask=false", "method.focal_gamma=0.0", "method.mask_text_for=mlm", "method.image_ids=false"]
    + NO_DISTORTIONS,
}
SWITCHES = ("soft_mask", "soft_mask_negatives", "focal_gamma", "mask_text_for")  # attributes of PretrainModel
WARM_UP = 2  # rounds: the first makes the optimizer's moments
TEXTS, ANSWERS, ANSWER_TOKENS = (64, 128), 3128, 5
SIDES, FILES = (224, 1280, 2500), 16  # pixels of the longer side, and number of the synthetic photographs


def configure(options, changes=()):
    """Config of the command line, with further overrides."""
    given = [f"pretrain.batch_size={options.batch}", f"precision={options.dtype}", f"device={options.device}"]
    return data.load_config(options.scale, [*given, *options.overrides, *changes])


def build(task, config, vocab_size):
    """A task's model with random weights, on its device."""
    torch.manual_seed(0)
    sizes = dataclasses.asdict(config.model) | {"image_size": data.task_settings(config, task).image_size}
    model = softmask.build_model(task, vocab_size, sizes, dataclasses.asdict(config.method))
    return model.to(evaluation.resolve_device(config))


def seconds_of(function, device):
    """Wall time of a call, with the work that it leaves to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def median_seconds(function, device, steps):
    """Median wall time of several calls after one to warm up."""
    return statistics.median([seconds_of(function, device) for _ in range(steps + 1)][1:])


def matmul_rate(device, dtype):
    """FLOP/s of one large matrix product."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / median_seconds(lambda: a @ b, device, 5)


def report(measure, config, task, **values):
    """Print a measurement with all that it depends on."""
    device, settings = evaluation.resolve_device(config), data.task_settings(config, task)
    line = {"measure": measure}
    line |= {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in values.items()}
    line["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    line |= {"threads": torch.get_num_threads(), "dtype": config.precision, "torch": str(torch.__version__)}
    line |= {"compile": config.compile, "checkpointing": config.checkpointing, "max_tokens": settings.max_tokens}
    sizes = dataclasses.asdict(config.model) | {"image_size": settings.image_size}
    print(json.dumps(line | {key: size for key, size in sizes.items() if not key.endswith("_weights")}), flush=True)


def pair_flops(config, vocab_size):
    """FLOPs of one pair in a pre-training step: matrix products alone, 2abc for (a, b) @ (b, c).

    What is trained counts three times its forward pass: forward, gradient of the input, gradient of the weight.
    """
    model, method, length = config.model, config.method, config.pretrain.max_tokens
    width, vision_width = model.text_width, model.vision_width
    patches = (data.task_settings(config, "pretrain").image_size // model.patch_size) ** 2

    def layer(queries, keys, dim):  # queries: tokens whose state is made; keys: tokens they attend to
        return 2 * (10 * queries + 2 * keys) * dim**2 + 4 * queries * keys * dim

    def fusion_layer(queries):  # with the cross-attention's query, output and products, less keys and values
        return layer(queries, length, width) + 2 * queries * 2 * width**2 + 4 * queries * (1 + patches) * width

    patch_embedding = 2 * patches * 3 * model.patch_size**2 * vision_width
    image = patch_embedding + model.vision_layers * layer(1 + patches, 1 + patches, vision_width)
    image += model.fusion_layers * 2 * (1 + patches) * 2 * vision_width * width  # keys and values, once per image
    text = model.text_layers * layer(length, length, width)
    whole_row = model.fusion_layers * fusion_layer(length)
    match_row = (model.fusion_layers - 1) * fusion_layer(length) + fusion_layer(1)  # the last layer makes [CLS] alone
    words = method.mlm_probability * (length - 1) * 2 * (width**2 + width * vocab_size)
    contrast = 2 * (vision_width + width) * model.embed_dim
    contrast += 2 * 2 * (config.pretrain.batch_size + method.queue_size) * model.embed_dim

    soft_rows = (1 + 2 * method.soft_mask_negatives) * method.soft_mask
    passes = 1 + (method.mask_text_for == "mlm")  # of the text and of positive pairs: one for all losses, or MLM's own
    student = image + passes * (text + whole_row) + (2 + soft_rows) * match_row + words + contrast
    twin_passes = 1 + (method.mask_text_for == "mlm" or method.clean_teacher)
    twin = image + twin_passes * text + whole_row + words + contrast
    word_attention = 0
    if method.soft_mask:  # gradient of the input alone, down to the attention of one layer
        layer_number = (model.fusion_layers - 1) // 2 if method.attention_layer is None else method.attention_layer
        word_attention = (model.fusion_layers - 1 - layer_number) * (fusion_layer(length) + 4 * length**2 * width)
        word_attention += 2 * length * 9 * width**2 + 2 * length * (1 + patches) * width
        # GeluLinear makes the gradient of its weight too
        word_attention += (model.fusion_layers - layer_number) * 2 * length * 4 * width**2
    # pixels and queues take no gradient
    without_gradient = patch_embedding + 4 * (config.pretrain.batch_size + method.queue_size) * model.embed_dim
    return 3 * student + twin + word_attention - without_gradient


class Steps:
    """Optimizer steps of train.py on one random batch, under settings that may change from step to step."""

    def __init__(self, config, vocab_size):
        device, task = evaluation.resolve_device(config), config.pretrain
        shape = task.batch_size, task.max_tokens
        self.model = build("pretrain", config, vocab_size)
        self.optimizer = train.Optimizer(train.parameter_groups(self.model, task), lr=task.lr, fused=True)
        train.prepare(self.model, config)
        for queue in (self.model.image_queue, self.model.text_queue):  # full
            queue.copy_(torch.nn.functional.normalize(torch.randn(queue.shape), dim=1))
        self.model.queue_written.fill_(config.method.queue_size)
        size = data.task_settings(config, "pretrain").image_size
        self.batch = {
            "image": torch.randint(256, (task.batch_size, 3, size, size), dtype=torch.uint8),
            "input_ids": torch.randint(5, vocab_size, shape),
            "attention_mask": torch.ones(shape, dtype=torch.int64),
            "word_ids": (torch.arange(task.max_tokens) - 1).repeat(task.batch_size, 1),
            "image_ids": torch.arange(task.batch_size),
        }
        if device.type == "cuda":  # as the loader's are
            self.batch = {name: values.pin_memory() for name, values in self.batch.items()}
        self.run = types.SimpleNamespace(  # in the place of train.Run: logs nothing, saves nothing
            step=0, words_steps=0, steps_per_epoch=1, task_name="pretrain", checkpoint_file="none",
            special=(4, torch.arange(5, vocab_size, device=device)),  # [MASK] and the ordinary tokens
            count=lambda *_: None, add=lambda *_: None, step_done=lambda *_: None,
        )

    def __call__(self, config):
        """One step under config, which differs in `method` alone from that of the model."""
        for name in SWITCHES:
            setattr(self.model, name, getattr(config.method, name))
        self.run.step, self.run.total_steps = self.run.step + 1, self.run.step + 2
        train.train(self.model, self.optimizer, [self.batch], config, config.pretrain, self.run)

    def fixed_state(self):
        """Bytes of weights, twin, queues, gradients and the optimizer's moments."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [p.grad for p in self.model.parameters() if p.grad is not None]
        tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Operations(TorchDispatchMode):
    """Counts the operations that do work, as a context around them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.count += not (operation.is_view or "empty" in name or name == "_unsafe_view")
        return operation(*args, **(kwargs or {}))


def peak_resident(config, vocab_size):
    """Peak resident set of this process, bytes, before and after two steps. Run in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps = Steps(config, vocab_size)
    for _ in range(2):
        steps(config)
    return before * 1024, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def measure_step(options):
    """Optimizer steps, whole and with each innovation switched off."""
    wanted = ["full", *(name for name in options.variants or VARIANTS if name != "full")]
    configs = {name: configure(options, VARIANTS[name]) for name in wanted}
    config, device = configs["full"], evaluation.resolve_device(configs["full"])
    batch = config.pretrain.batch_size
    memory = dict.fromkeys(configs, (0, 0))
    if device.type == "cpu":  # first, while this process is small
        for name in configs:
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                memory[name] = pool.submit(peak_resident, configs[name], options.vocab_size).result()
    rate = matmul_rate(device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    steps, seconds = Steps(config, options.vocab_size), {name: [] for name in configs}
    for _ in range(WARM_UP + options.steps):
        for name in configs:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds[name].append(seconds_of(lambda: steps(configs[name]), device))
            if device.type == "cuda":
                memory[name] = 0, torch.cuda.max_memory_allocated()
    seconds, operations = {name: values[WARM_UP:] for name, values in seconds.items()}, dict.fromkeys(configs)
    for name in [] if config.compile else configs:
        with Operations() as counted:
            steps(configs[name])
        operations[name] = counted.count
    for name in configs:
        took, flops = statistics.median(seconds[name]), pair_flops(configs[name], options.vocab_size)
        achieved = flops * batch / took
        report(
            "step", configs[name], "pretrain", variant=name, batch=batch, seconds=took, pairs_per_second=batch / took,
            cost=statistics.median(full / own - 1 for full, own in zip(seconds["full"], seconds[name])),
            peak_memory_gb=memory[name][1] / 1e9, import_memory_gb=memory[name][0] / 1e9,
            fixed_state_gb=steps.fixed_state() / 1e9, gflop_per_pair=flops / 1e9, gflop_s=achieved / 1e9,
            matmul_gflop_s=rate / 1e9, share_of_matmul=achieved / rate, operations=operations[name],
        )


@torch.no_grad()
def measure_rerank(options):
    """Pairs per second of eval.retrieval_scores' ITM, encoders aside."""
    config = configure(options)
    model, device = build("retrieval", config, options.vocab_size).eval(), evaluation.resolve_device(config)
    encoders, length = model.encoders, config.retrieval.max_tokens
    image_embeds = torch.randn(encoders.vision.pos_embed.shape, device=device)
    for texts in TEXTS:
        states = torch.randn(texts, length, config.model.text_width, device=device)
        chosen, lengths = torch.arange(texts, device=device), torch.full((texts,), length, device=device)

        def score():
            with evaluation.autocast(config, device):
                keys_values = encoders.image_keys_values(image_embeds)
                mask = torch.arange(lengths[chosen].max(), device=device) < lengths[chosen, None]
                fused, _ = encoders.fuse(states[chosen, : mask.shape[1]], mask, keys_values, cls_only=True)
                return evaluation.match_scores(model, fused)

        took = median_seconds(score, device, options.steps)
        report("rerank", config, "retrieval", texts=texts, seconds=took, pairs_per_second=texts / took)


@torch.no_grad()
def measure_vqa(options):
    """Questions per second of VqaModel.rank_answers, from the questions' fused states on."""
    config = configure(options)
    model, device = build("vqa", config, options.vocab_size).eval(), evaluation.resolve_device(config)
    k, length = config.eval.answers_top_k, config.vqa.max_tokens
    states = torch.randn(options.batch, length, config.model.text_width, device=device)
    model.question_keys_values = lambda encoders, *question: encoders.decoder.fusion.keys_values(states)
    mask = torch.ones(options.batch, length, dtype=torch.int64, device=device)
    answers = torch.randint(5, options.vocab_size, (ANSWERS, ANSWER_TOKENS), device=device)
    answers[:, 0] = 2  # [CLS]

    def rank():
        with evaluation.autocast(config, device):
            return model.rank_answers(states, mask, mask, answers, torch.ones_like(answers), k)

    took = median_seconds(rank, device, options.steps)
    report("vqa", config, "vqa", batch=options.batch, answers=ANSWERS, ranked=k, seconds=took,
           questions_per_second=options.batch / took)


def write_photographs(folder, side):
    """Synthetic JPEGs, side x 3/4 side pixels: smooth colours and some grain."""
    generator, size = torch.Generator().manual_seed(0), (side * 3 // 4, side)
    for number in range(FILES):
        image = 128
        for cells, scale in ((2, 40), (8, 20), (32, 10), (128, 5)):
            colours = torch.randn(1, 3, 3 * cells, 4 * cells, generator=generator)
            image = image + scale * torch.nn.functional.interpolate(colours, size, mode="bicubic")[0]
        pixels = image.clamp(0, 255).byte().permute(1, 2, 0).numpy()  # (3, h, w) -> (h, w, 3)
        Image.fromarray(pixels).save(os.path.join(folder, f"{number}.jpg"), quality=90)


def measure_pipeline(options, folder, files):
    """Images per second of CPU time of data.TrainingSet; files: what to call those of the folder."""
    paths = [path for path in sorted(pathlib.Path(folder).iterdir()) if path.suffix.lower() in (".jpg", ".jpeg")]
    records = [{"image": str(path), "caption": "a"} for path in paths[:200]]
    if not records:
        raise data.InputError(f"--images {folder}: no .jpg or .jpeg there")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader worker
    for reduced in ("false", "true"):
        config = configure(options, ["data.pretrain_image_root=", f"data.decode_reduced={reduced}"])
        dataset, seconds = data.TrainingSet(records, "pretrain", config), []
        for epoch in range(1 + options.steps):
            start = time.process_time()
            for index in range(len(records)):
                dataset[epoch, index]
            seconds.append(time.process_time() - start)
        rate = len(records) / statistics.median(seconds[1:])
        report("images", config, "pretrain", files=files, number=len(records), decode_reduced=reduced == "true",
               images_per_second_and_core=rate)
    torch.set_num_threads(threads)


def measure_images(options):
    """Decoding and augmentation; distortions, per image of a batch."""
    if options.images:
        measure_pipeline(options, options.images, options.images)
    for side in () if options.images else SIDES:
        with tempfile.TemporaryDirectory() as folder:
            write_photographs(folder, side)
            measure_pipeline(options, folder, f"synthetic, {side} pixels")
    config = configure(options)
    device, size = evaluation.resolve_device(config), data.task_settings(config, "pretrain").image_size
    images = torch.rand(options.batch, 3, size, size, device=device)
    kinds = ("brightness", "contrast", "blur", "hue", "grayscale")
    strengths = [getattr(config.method, f"distort_{kind}") for kind in kinds]
    took = median_seconds(lambda: softmask.distort_images(images, *strengths), device, options.steps)
    report("distortions", config, "pretrain", batch=options.batch, milliseconds_per_image=1000 * took / options.batch)


MEASURES = {"step": measure_step, "rerank": measure_rerank, "vqa": measure_vqa, "images": measure_images}


def main(arguments):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="MEASURE key=value", help=f"{', '.join(MEASURES)} (default: all)")
    parser.add_argument("--scale", default="paper", help="of config.yaml")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step, questions, images distorted at once")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bf16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=5, help="repetitions measured, after those to warm up")
    parser.add_argument("--vocab-size", type=int, default=30522, help="BERT's")
    parser.add_argument("--variants", nargs="+", metavar="VARIANT", help=f"of step, beside full: {', '.join(VARIANTS)}")
    parser.add_argument("--images", help="folder of JPEG files (default: synthetic ones)")
    options = parser.parse_intermixed_args(arguments)
    if min(options.steps, options.batch) < 1:
        parser.error("--steps and --batch are at least 1")
    variants = options.variants or []  # settings may follow them
    options.overrides = [word for word in options.words + variants if "=" in word]
    options.variants = [word for word in variants if "=" not in word]
    wanted = [word for word in options.words if "=" not in word] or list(MEASURES)
    for given, known in ((wanted, MEASURES), (options.variants, VARIANTS)):
        if not set(given) <= known.keys():
            raise data.InputError(f"{' '.join(given)}: wanted some of {', '.join(known)}")
    for name in wanted:
        MEASURES[name](options)


if __name__ == "__main__":
    with evaluation.one_line_errors():
        main(sys.argv[1:])
