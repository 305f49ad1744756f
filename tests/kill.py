"""Kill training at random moments, go on, compare: python tests/kill.py [--kills 30] [--seed 0] [--runs one epochs two rank]

Copies the code into a temporary folder, so that a run renders its scenes anew, and starts the real commands there at the
tests' size: `one`, python train.py; `epochs`, retrieval, evaluated after each of two epochs; `two`, torchrun with two
processes and --max-restarts 3; `rank`, the same, of which one process alone is killed. Each first goes uninterrupted.
Then a signal comes at a random moment of a phase that is drawn too: imports, rendering, loading, steps, while a
checkpoint is written, evaluation. SIGKILL goes to the whole tree of processes, under `one` to the main process alone;
SIGTERM and SIGINT to the group, as from timeout(1) and a terminal. The checkpoint on the disk has to load; the same command, started
again (not by us for `rank`), has to end with the same bits: whole checkpoint, best.pt, log less times and rates,
metrics.json. A JSON line per kill: signal, phase, the step on the disk, seconds until all processes had ended, exit
status, equal; wrong: what else was not as promised; missed: the phase before whose drawn moment a faster run had ended.
Then a summary; exit status 1 if anything was wrong. 30 kills take about 20 minutes.
"""
import argparse
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import commands
import data

SETTINGS = [
    *commands.TINY, "data.scenes={train: 320, test: 60}", "log_every_steps=3", "checkpoint_every_steps=5",
    "model.dropout=0.1", "num_workers=2",
]  # 40 steps; checkpoints between the lines of the log
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "3"]
RUNS = {
    "one": ["train.py", *SETTINGS],
    "epochs": ["train.py", "retrieval", *SETTINGS, "retrieval.start=null"],
    "two": [*TORCHRUN, "train.py", *SETTINGS, "pretrain.batch_size=4"],
    "rank": [*TORCHRUN, "train.py", *SETTINGS, "pretrain.batch_size=4"],
}
PHASES = ["imports", "rendering", "loading", "steps", "checkpoint", "evaluation"]
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
# torchrun of torch 2.15 keeps one store over its restarts, in which new processes may find the addresses of dead ones
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
STEPS = 40
TIMEOUT = 300


@dataclasses.dataclass
class Process:
    """A command at work in the folder `code`, with what it writes: out, its output folder, and code/data."""

    code: pathlib.Path
    out: pathlib.Path
    arguments: list

    def __post_init__(self):
        command = [sys.executable, *self.arguments, "--out", str(self.out)]
        self.err = self.out.with_suffix(f".{time.monotonic_ns()}.err")
        with open(self.err, "w") as err:
            self.process = subprocess.Popen(
                command, cwd=self.code, env=os.environ | ENVIRONMENT, stdout=err, stderr=err, start_new_session=True,
            )
        self.started = time.monotonic()

    def phase(self):
        """Where it is, seen from outside."""
        scenes = self.code / "data" / "scenes"
        if (self.out / "checkpoint.pt.partial").exists():
            return "checkpoint"
        if not list(scenes.glob("plain-*")):
            return "rendering" if list(scenes.glob(".plain-*")) else "imports"
        log, checkpoint = self.out / "log.jsonl", self.out / "checkpoint.pt"  # of the last step written in this order
        lines = log.read_text().count("\n") if log.exists() else 0
        if not lines:
            return "loading"
        if (self.out / "metrics.json").exists():
            return "end"
        step = json.loads(log.read_text().splitlines()[lines - 1])["step"]
        saved = checkpoint.exists() and checkpoint.stat().st_mtime_ns > log.stat().st_mtime_ns
        return "evaluation" if step == STEPS and saved else "steps"

    def tree(self):
        """The process and all that descend from it."""
        parents = {}
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    if fields[0] != "Z":
                        parents.setdefault(int(fields[1]), []).append(int(entry.name))
        found = [self.process.pid]
        for pid in found:
            found += parents.get(pid, [])
        return found

    def workers(self):
        """Under torchrun, its two training processes in order of rank."""
        children = [pid for pid in self.tree() if b"train.py" in cmdline(pid) and b"torch.distributed.run" not in cmdline(pid)]
        return sorted(pid for pid in children if os.getsid(pid) == pid)

    def wait(self, timeout=TIMEOUT):
        return self.process.wait(timeout)


def cmdline(pid):
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def alive(pids):
    """Those that still run, zombies not among them."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(pid)
    return found


def uninterrupted(code, out, arguments):
    """Run to the end; returns the seconds that each phase took."""
    shutil.rmtree(code / "data", ignore_errors=True)
    run, seconds, before = Process(code, out, arguments), collections.Counter(), time.monotonic()
    while run.process.poll() is None:
        time.sleep(0.001)
        phase, now = run.phase(), time.monotonic()
        seconds[phase] += now - before
        before = now
    if run.process.returncode:
        sys.exit(f"the uninterrupted run failed: {run.err.read_text()}")
    return seconds


def send(name, run, number, rng):
    """Send the signal as such a run gets it; returns the processes that have to end of it."""
    tree = run.tree()
    if name == "rank":
        workers = run.workers()
        victim = rng.randrange(2)
        os.kill(workers[victim], signal.SIGKILL)
        return workers
    if number == signal.SIGKILL and name != "one":
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
    elif number == signal.SIGKILL:
        os.kill(run.process.pid, number)
    else:
        os.killpg(run.process.pid, number)
    return tree


def kill_once(code, out, name, number, phase, seconds, rng):
    """One kill and what came of it, as a dict."""
    shutil.rmtree(code / "data", ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    run = Process(code, out, RUNS[name])
    occurrence = rng.randrange(8) if phase == "checkpoint" else 0
    delay = 0 if phase == "checkpoint" else rng.random() * seconds[phase]
    seen, within = 0, False
    while run.process.poll() is None:  # until the phase begins, of checkpoints one of the first 8
        now = run.phase() == phase
        seen, within = seen + (now and not within), now
        if now and seen > occurrence:
            break
        time.sleep(0.0002 if phase == "checkpoint" else 0.001)
    time.sleep(delay)
    found, wrong = run.phase(), []
    if run.process.poll() is not None:  # the run was faster than the uninterrupted one
        return {"run": name, "missed": phase, "seconds": 0.0, "wrong": [run.err.read_text()] if run.process.returncode else []}
    sent = time.monotonic()
    pids = send(name, run, number, rng)
    result = {"run": name, "signal": number.name, "phase": found, "second": round(sent - run.started, 2)}
    while alive(pids[:1] if number == signal.SIGKILL and name == "one" else pids):  # its loader workers look every 5 s
        run.process.poll()
        if time.monotonic() > sent + TIMEOUT:
            wrong.append(f"processes {alive(pids)} did not end")
            break
        time.sleep(0.005)
    result["seconds"] = round(time.monotonic() - sent, 2)
    path = out / "checkpoint.pt"
    try:
        result["step"] = commands.load(out)["step"] if path.exists() else None
    except Exception as error:  # whatever it is, the checkpoint does not load
        wrong.append(f"checkpoint.pt does not load: {error}")
    if name != "rank":
        result["status"] = run.wait()
        wrong += complaints(name, number, found, result, run.err.read_text(), out)
        run = Process(code, out, RUNS[name])
    try:
        status = run.wait()
    except subprocess.TimeoutExpired:
        status = "hangs"
        for pid in run.tree():
            os.kill(pid, signal.SIGKILL)
    if status != 0:
        wrong.append(f"started again, it ended with {status}: {run.err.read_text()[-500:]}")
    if name == "rank":
        result["status"] = status
    return result | {"wrong": wrong}


def complaints(name, number, phase, result, err, out):
    """What a stop by SIGTERM or SIGINT promises, and was not kept."""
    if number == signal.SIGKILL:
        return []
    found, lines = [], [line for line in err.replace("\r", "\n").splitlines() if "stopped by" in line]
    if name in ("one", "epochs"):
        if result["status"] not in (128 + number, -number):
            found.append(f"status {result['status']}")
        if result["status"] > 0 and len(lines) != 1:
            found.append(f"{len(lines)} lines say why it stopped")
        if "Traceback" in err:
            found.append("traceback: " + err[err.index("Traceback"):][:500])
    elif 'train.py", line' in err:  # torchrun has a traceback of its own for every signal
        found.append("traceback: " + err[err.index('train.py", line') - 200:][:700])
    if result["seconds"] > 10:
        found.append("took more than 10 s")
    if phase in ("steps", "checkpoint") and lines and " at step " in lines[0]:
        said = int(lines[0].partition(" at step ")[2].split()[0])
        if said != result.get("step"):
            found.append(f"said step {said}, saved {result.get('step')}")
    elif phase in ("steps", "checkpoint") and commands.read_log(out)[-1:] and not lines:
        found.append("no line says at which step it stopped")
    return found


def differences(out, reference):
    """The first difference between two finished runs, else nothing."""
    names = [name for name in ("checkpoint.pt", "best.pt") if (reference / name).exists()]
    try:
        for name in names:
            commands.assert_same(commands.load(out, name), commands.load(reference, name))
        assert commands.log_without_times(out) == commands.log_without_times(reference), "log.jsonl"
        assert (out / "metrics.json").read_bytes() == (reference / "metrics.json").read_bytes(), "metrics.json"
    except (AssertionError, OSError) as error:
        return [f"differs: {error}"]
    return []


def plan(kills, names, rng):
    """(run, signal, phase) of each kill: of every run all phases and signals before one comes again, in drawn order."""

    def drawn(values):
        while True:
            yield from rng.sample(values, len(values))

    phases = {name: drawn(PHASES[3:] if name == "rank" else PHASES) for name in names}  # imports and so on wait for nobody
    kinds = {name: drawn(SIGNALS[:1] if name == "rank" else SIGNALS) for name in names}
    turns = itertools.islice(itertools.cycle(names), kills)
    return [(name, next(kinds[name]), next(phases[name])) for name in turns]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="how many (default: 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="which (default: all)")
    options = parser.parse_args()
    rng, failed, slowest = random.Random(options.seed), 0, {}
    with tempfile.TemporaryDirectory() as folder:
        code = pathlib.Path(folder, "code")
        code.mkdir()
        for name in ("softmask.py", "data.py", "eval.py", "train.py", "config.yaml"):
            shutil.copy(os.path.join(data.HERE, name), code)
        seconds, references = {}, {}
        for name in options.runs:
            same = "two" if name == "rank" and "two" in references else name
            references[name] = references.get(same, pathlib.Path(folder, f"whole-{name}"))
            if name == same:
                seconds[name] = uninterrupted(code, references[name], RUNS[name])
                phases = {phase: round(value, 2) for phase, value in seconds[name].items()}
                print(json.dumps({"run": name, "uninterrupted": phases}), flush=True)
            seconds[name] = seconds[same]
        kills, missed = plan(options.kills, options.runs, rng), 0
        for number, (name, kind, phase) in enumerate(kills, 1):
            out = pathlib.Path(folder, f"kill-{number}")
            result = kill_once(code, out, name, kind, phase, seconds[name], rng)
            unequal = differences(out, references[name])
            wrong = result.pop("wrong") + unequal
            print(json.dumps({"kill": number} | result | {"equal": not unequal} | ({"wrong": wrong} if wrong else {})), flush=True)
            failed += bool(wrong)
            missed += "missed" in result
            key = f"{kind.name} of one rank" if name == "rank" else kind.name
            slowest[key] = max(slowest.get(key, 0), result["seconds"])
            shutil.rmtree(out)
    print(json.dumps({"kills": len(kills) - missed, "missed": missed, "wrong": failed, "slowest_end_seconds": slowest}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
