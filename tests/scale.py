"""Measure reading at the scale of 14 million pairs: python tests/scale.py [--records N] [--workers 0 1 2 4]

Writes JSON lists and tar shards into a temporary folder (14 million records: 1.5 GB; 1 million samples: 3.6 GB) that is
removed at the end, and prints a JSON line per measurement: seconds to index and to start once indexed, with what the
peak memory grew by; records read a second, at random; and for each number of loader workers the memory of the loader,
MB of PSS of main process and workers together, beyond that of the same loader over few records. The loader reads
records, of shards also the bytes of the image, and decodes nothing.
"""
import argparse
import concurrent.futures
import io
import json
import multiprocessing
import os
import random
import resource
import sys
import tarfile
import tempfile
import time

from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import data

BATCH = 64
FEW = 10_000
CAPTION = "a photograph of a red dog on a sofa beside a window, {:09d}"  # about 60 characters


def write_lists(folder, records, files):
    """Write JSON lists of {image, caption} with that many records together; returns their paths."""
    paths = [os.path.join(folder, f"{number}.json") for number in range(files)]
    for number, path in enumerate(paths):
        with open(path, "w", encoding="utf-8") as file:
            for index in range(number * records // files, (number + 1) * records // files):
                file.write(", " if file.tell() else "[")
                row = {"image": f"{index % 100}/{index % 7}/{index:09d}.jpg", "caption": CAPTION.format(index)}
                file.write(json.dumps(row))
            file.write("]")
    return paths


def write_shards(folder, shards, samples):
    """Write tar shards as img2dataset does, NAME.jpg, .json and .txt, the image 1 KB of noise; returns a pattern."""
    for shard in range(shards):
        with tarfile.open(os.path.join(folder, f"{shard:05d}.tar"), "w:", format=tarfile.GNU_FORMAT) as file:
            for index in range(shard * samples, (shard + 1) * samples):
                caption = CAPTION.format(index)
                for kind, content in (("jpg", random.randbytes(1024)), ("txt", caption.encode()),
                                      ("json", json.dumps({"caption": caption, "status": "success"}).encode())):
                    member = tarfile.TarInfo(f"{index:09d}.{kind}")
                    member.size = len(content)
                    file.addfile(member, io.BytesIO(content))
                file.members.clear()  # which TarFile keeps for nothing here
    return [os.path.join(folder, "*.tar")]


def open_records(files, index_folder):
    data.INDEX_FOLDER = index_folder
    return data.Records(files, "pretrain")


def start(files, index_folder):
    """Seconds to open the records, MB of this process at its peak beyond those before, and the number of records."""
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    records = open_records(files, index_folder)
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"records": len(records), "seconds": round(seconds, 2), "peak_mb": round(peak / 1024)}


def random_access(files, index_folder, reads):
    """Records a second that one process reads at random places."""
    records, rng = open_records(files, index_folder), random.Random(0)
    order = [rng.randrange(len(records)) for _ in range(reads)]
    begun = time.perf_counter()
    for index in order:
        records[index]
    return {"records_a_second": round(reads / (time.perf_counter() - begun))}


class RecordsAlone(Dataset):
    """Reads records for the (epoch, index) of ShuffledBatches, and nothing else but the bytes of images in shards."""

    def __init__(self, records):
        self.records = records

    def __getitem__(self, key):
        image = self.records[key[1]]["image"]
        return len(image if isinstance(image, str) else image.open().getvalue())


def memory(files, index_folder, reads, workers):
    """Largest PSS, MB, of the main process and its workers while the loader reads."""
    records = open_records(files, index_folder)
    batches = data.ShuffledBatches(len(records), BATCH, 1, 0, 1, 0, 0)
    # This process was spawned, so that its own workers would be too; train.py's are forked on Linux.
    loader = DataLoader(RecordsAlone(records), batch_sampler=batches, num_workers=workers,
                        multiprocessing_context="fork" if workers else None)
    most = 0
    for number, _ in zip(range(1, reads // BATCH + 1), loader):
        if number % (reads // BATCH // 4) == 0:
            pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            most = max(most, sum(map(pss, pids)))
    return most


def pss(pid):
    """MB of a process, each page shared by n of them counted as 1/n (Linux)."""
    with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1024


def alone(function, *arguments):
    """The result of a function in a fresh process, so that no memory of another measurement is counted."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(kind, files, few, index_folder, reads, workers):
    """Print the measurements of one kind of files; few: a small file, for comparison."""
    for name, function, arguments in (("index", start, ()), ("start", start, ()), ("read", random_access, (reads,))):
        result = alone(function, files, index_folder, *arguments)
        print(json.dumps({"files": kind, "measure": name} | result), flush=True)
    for count in workers:
        total, base = (alone(memory, paths, index_folder, reads, count) for paths in (files, few))
        print(json.dumps({"files": kind, "measure": "memory", "workers": count, "pss_mb": round(total),
                          "pss_of_few_mb": round(base), "more_mb": round(total - base)}), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=14_000_000, help="in JSON lists")
    parser.add_argument("--lists", type=int, default=7, help="JSON lists that these are spread over")
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--samples", type=int, default=10_000, help="in each shard")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--reads", type=int, default=200_000, help="records read per measurement")
    parser.add_argument("--folder", help="where the temporary folder is made (default: the system's)")
    options = parser.parse_args()
    if options.reads < 4 * BATCH:
        parser.error(f"--reads is at least {4 * BATCH}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        os.makedirs(os.path.join(folder, "few"))
        few = write_lists(os.path.join(folder, "few"), FEW, 1)
        kinds = {"json": lambda: write_lists(folder, options.records, options.lists),
                 "tar": lambda: write_shards(folder, options.shards, options.samples)}
        for kind, write in kinds.items():
            measure(kind, write(), few, os.path.join(folder, "index"), options.reads, options.workers)


if __name__ == "__main__":
    from eval import one_line_errors  # here, since it would count as memory of the measured processes

    with one_line_errors():
        main()
