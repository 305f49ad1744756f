"""Run train.py and eval.py as commands, in processes that have torch and transformers imported already; look at runs.

The processes are forked off a server that imports train.py once: the real command line, less seconds of imports each.
"""
import contextlib
import dataclasses
import json
import multiprocessing
import multiprocessing.forkserver
import os
import pathlib
import runpy
import signal
import socket
import sys
import time

import torch

import data

SCENES = "data.scenes={level: plain, train: 96, val: 10, test: 13, image_size: 32, seed: 5}"
TINY = [
    SCENES, "device=cpu", "num_workers=0", "log_every_steps=1", "checkpoint_every_steps=3", "pretrain.batch_size=8",
    "pretrain.epochs=1", "pretrain.warmup_steps=2", "eval={batch_size: 5, top_k: 4, answers_top_k: 4, pictures: 2}",
    "model={image_size: 32, patch_size: 8, vision_width: 32, vision_layers: 2, vision_heads: 2, text_width: 32, "
    "text_layers: 1, fusion_layers: 3, text_heads: 2, max_positions: 40, embed_dim: 16}", "method.words_first=0",
    *(f"{task}={{batch_size: {4 if task == 'nlvr2' else 8}, epochs: 2, lr: 2.0e-3, warmup_steps: 2}}"
      for task in data.TASKS[1:]),  # which have rows for half of the scenes, NLVR2 one for two
]  # 12 steps of every task, of fine-tuning in two epochs
NO_EVALUATION = "data.retrieval_sets.scenes.test=none.json"  # where pre-training alone is looked at
FEW_LAYERS = ["model.vision_layers=1", "model.fusion_layers=2"]  # each takes torch.compile seconds
TIMES = ("pairs_per_second", "seconds")
# what train.py and softmask.load_tokenizer import
PRELOADED = ["train", "transformers.models.auto.tokenization_auto", "transformers.models.bert.tokenization_bert"]
SPY = """
import sys, time, torch, train
save = train.Run.save
def spy(run, model, optimizer):
    time.sleep(0.3 if optimizer is None and train.evaluation.rank() == 0 else 0)
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    torch.save({"model": model.state_dict(), "grads": grads}, f"{run.out}/{train.evaluation.rank()}-{run.step}.pt")
    save(run, model, optimizer)
train.Run.save = spy
sys.exit(train.main(sys.argv[1:]))
"""
"""A train.py that saves state and gradients with each checkpoint, by each process: RANK-STEP.pt. Slow at best.pt."""
COMPILED = """
import os, sys, torch, train
os.nice(10)
compiled = torch.compile
torch.compile = lambda f, **k: compiled(f, backend="eager", **k)
torch._dynamo.config.fail_on_recompile_limit_hit = True
sys.exit(train.main(sys.argv[1:]))
"""
"""A train.py that ends where an encoder's forms are too many to be compiled; else it would go on uncompiled."""
COMPILED_LOSSES = """
import json, os, torch, test_train
os.nice(10)
graphs, compiled = [], torch.compile
backend = "inductor" if os.environ.get("PAPER_SCALE") else "aot_eager"
torch.compile = lambda f, **k: graphs.append(f) or compiled(f, backend=backend, **k)
each = ["compile=true", "checkpointing=true"], ["compile=true"]
print(json.dumps([(test_train.losses_of_50_steps(options).tolist(), len(graphs)) for options in each]))
"""
"""Losses of 50 steps, compiled, and the number of graphs up to there. What is compiled under checkpointing serves without it,
too, since the code is the same: half the time."""
TORCHRUN = """
import os, sys, torch.distributed.run
os.environ["OMP_NUM_THREADS"] = "1"
torch.distributed.run.main(["--standalone", "--nproc_per_node", "2", *sys.argv[1:]])
"""
"""What `torchrun --standalone --nproc_per_node 2` does."""


def scenes_folder():
    """Where the scenes of the setting SCENES lie."""
    return pathlib.Path(data.resolve_scenes(data.load_config("scenes", TINY)).data.pretrain_image_root)


@dataclasses.dataclass
class Result:
    status: int | list[int]  # one for each process, where there are several
    out: str
    err: str

    @property
    def error(self):
        """The one line in which a command that failed says why."""
        assert self.status == 2 and "Traceback" not in self.err, self.err
        lines = [line for line in self.err.splitlines() if "error" in line.lower()]
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        return lines[0].removeprefix("error: ")


class Command:
    """A program at work in one process, or in several with gloo between them, as torchrun would start it."""

    def __init__(self, folder, program, *arguments, processes=1, cwd=data.HERE):
        """folder: where its output is kept; program: path of a Python file, below the checkout or absolute; cwd: where
        it runs."""
        self.outputs = [os.path.join(folder, f"output{time.monotonic_ns()}-{rank}") for rank in range(processes)]
        environments = [{}]
        if processes > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environments = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
        program, context = os.path.join(data.HERE, program), multiprocessing.get_context("forkserver")
        start_server()
        self.processes = [
            context.Process(target=run_program, args=(program, list(map(str, arguments)), environment, output, cwd))
            for environment, output in zip(environments, self.outputs)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout=120):
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(end - time.monotonic())
            if process.exitcode is None:
                self.kill()
                raise AssertionError(f"still at work after {timeout} s: {self.result()}")
        return self.result()

    def result(self):
        status = [process.exitcode for process in self.processes]
        files = [[pathlib.Path(path + kind) for path in self.outputs] for kind in (".out", ".err")]
        out, err = ("".join(file.read_text() for file in kind) for kind in files)
        return Result(status if len(status) > 1 else status[0], out, err)

    def kill(self):
        """SIGKILL, to all processes at once."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    def kill_when(self, condition, timeout=120):
        """Kill it as soon as condition() holds, which must be before its end."""
        end = time.monotonic() + timeout
        while not condition():
            assert all(process.is_alive() for process in self.processes) and time.monotonic() < end, self.result()
            time.sleep(0.002)
        self.kill()


def start_server():
    """Start the server of forks, where it does not run yet; it takes seconds of imports, for which nothing waits here."""
    with python_path():
        multiprocessing.set_forkserver_preload(PRELOADED)
        multiprocessing.forkserver.ensure_running()


@contextlib.contextmanager
def python_path():
    """The server of forks finds our modules by PYTHONPATH: Python before 3.14 does not hand it sys.path in time."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def run_program(program, arguments, environment, output, cwd):
    """In the new process: what `python program arguments` does."""
    for descriptor, kind in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output + kind, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)  # for loader workers, as in a process of one's own
    torch.set_num_threads(1)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")


def run(folder, program, *arguments, processes=1, timeout=120, cwd=data.HERE):
    """Run a program to its end."""
    return Command(folder, program, *arguments, processes=processes, cwd=cwd).wait(timeout)


def kill_at_lines(out, arguments, lines, processes=1, cwd=data.HERE):
    """Run the same train.py again and again, killed as soon as the log has so many lines, and at last to its end."""
    for count in lines:
        command = Command(out, "train.py", "--out", out, *arguments, processes=processes, cwd=cwd)
        command.kill_when(lambda: len(read_log(out)) >= count)
    return run(out, "train.py", "--out", out, *arguments, processes=processes, cwd=cwd)


def read_log(out):
    """The lines of a log that were written whole."""
    path = os.path.join(out, "log.jsonl")
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith("\n")]


def log_without_times(out, others=()):
    return [{name: value for name, value in line.items() if name not in (*TIMES, *others)} for line in read_log(out)]


def load(out, name="checkpoint.pt"):
    return torch.load(os.path.join(out, name), weights_only=True)


def tensors(tree, prefix=""):
    """{path: tensor} of nested dicts and lists, what is no tensor as it is."""
    if isinstance(tree, (dict, list)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {name: value for key, item in items for name, value in tensors(item, f"{prefix}/{key}").items()}
    return {prefix: tree}


def assert_same(one, two):
    """Two nested dicts and lists hold the same, tensors to the bit."""
    one, two = tensors(one), tensors(two)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name], name


def assert_same_run(out, other, left_out=()):
    """Weights, twin, queues, optimizer, best epoch and log, but for its fields left_out, are the same to the bit."""
    one, two = load(out), load(other)
    assert one["step"] == two["step"] == one["total_steps"]
    for part in ("model", "optimizer", "seen", "bad_images", "best"):
        assert_same({part: one[part]}, {part: two[part]})
    if one["best"]:
        best = [load(folder, "best.pt") for folder in (out, other)]
        assert_same(*({part: file[part] for part in ("model", "best", "step")} for file in best))
    assert log_without_times(out, left_out) == log_without_times(other, left_out)
    assert [line["step"] for line in read_log(out)] == list(range(1, one["step"] + 1))


def assert_close(one, two, names, tolerance=1e-5):
    """max|a - b| <= tolerance max|b| for every name."""
    for name in names:
        a, b = one[name].double(), two[name].double()
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-30), f"{name}: {(a - b).abs().max()}"
