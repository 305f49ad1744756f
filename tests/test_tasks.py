"""The downstream tasks: their commands, resumption, several processes, ranking, loading, and the paper's scale."""
import copy
import functools
import json
import math
import os
import re
import shutil
import signal
import types

import pytest
import torch

import commands
import data
import eval as evaluation
import paper
import softmask
import train
from commands import (
    NO_EVALUATION, SPY, TIMES, TINY, Command, assert_close, assert_same, assert_same_run, kill_at_lines, load, read_log, run,
)

FINE_TUNED = [task for task in data.TASKS if task != "pretrain"]
EVALUATED = [task for task in FINE_TUNED if task != "nlvr2_pretrain"]
EVERY_LINE = {"step", "epoch", "loss", "alpha", "lr", "grad_norm", "bad_images", "skipped_steps", "truncated", "pairs",
              *TIMES}
CONTRASTIVE = {"loss_itc", "loss_itm", "itm_accuracy", "temp"}
LOGGED = {
    "retrieval": CONTRASTIVE, "grounding": CONTRASTIVE, "vqa": {"loss_vqa"}, "nlvr2_pretrain": {"loss_ta", "accuracy"},
    "nlvr2": {"loss_cls", "accuracy"}, "entailment": {"loss_cls", "accuracy"},
}
CLASSIFIED = {"accuracy", "standard_error", "majority", "items"}
METRICS = {
    "retrieval": {"itc", "reranked"},
    "vqa": {"accuracy", "standard_error", "items", *(f"accuracy_{kind}" for kind in data.QUESTIONS)},
    "nlvr2": CLASSIFIED | {"accuracy_true", "accuracy_false"},
    "entailment": CLASSIFIED | {f"accuracy_{label}" for label in data.ENTAILMENT_LABELS},
    "grounding": {f"{kind}{split}_d" for kind in ("", "chance_", "uniform_") for split in ("testA", "testB")},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every task by its command as users type it, in a folder of its own: folder, out, arguments, results.

    Two processes cannot share out the test rows evenly: 13 images, 39 questions, 39 statements, 19 pairs, 25 texts.
    """
    folder = tmp_path_factory.mktemp("runs")
    arguments = [*TINY, "model.dropout=0.1"]
    for task, count in (("nlvr2", 19), ("grounding", 25)):
        rows = json.loads((commands.scenes_folder() / f"{task}_test.json").read_text())[:count]
        (folder / f"{task}.json").write_text(json.dumps(rows))
        arguments.append(f"data.{task}.test={folder / f'{task}.json'}")
    results = {"pretrain": run(folder, "train.py", *arguments, NO_EVALUATION, cwd=folder)}
    for tasks in ([task for task in FINE_TUNED if task != "nlvr2"], ["nlvr2"]):  # which starts from nlvr2_pretrain
        at_work = {task: Command(folder, "train.py", task, *arguments, cwd=folder) for task in tasks}
        results |= {task: command.wait() for task, command in at_work.items()}
    return types.SimpleNamespace(folder=folder, out=folder / "out" / "scenes", arguments=arguments, results=results)


def livelier(model):
    """Weights three times as large: of a start from N(0, 0.02) all scores are alike."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


# Each task as users type it


@pytest.mark.parametrize("task", FINE_TUNED)
def test_task_trains_and_writes_its_files(task, runs):
    result, out = runs.results[task], runs.out / task
    assert result.status == 0 and "Warning" not in result.err, result.err
    log, checkpoint = read_log(out), load(out)
    assert [line["step"] for line in log] == list(range(1, 13))
    for line in log:
        assert line.keys() == EVERY_LINE | LOGGED[task]
        assert all(math.isfinite(value) for value in line.values())
        parts = [value for name, value in line.items() if name.startswith("loss_")]
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-5)
    for name in LOGGED[task]:
        assert re.search(rf"\b{name}\b", train.__doc__), f"{name} of log.jsonl is not defined"
    alphas = [0.0, 0.4] if task != "entailment" else [0.4, 0.4]
    assert [log[0]["alpha"], log[-1]["alpha"]] == pytest.approx(alphas)
    assert (checkpoint["task"], checkpoint["epoch"], checkpoint["step"]) == (task, 2, 12)
    result_file = json.loads((out / "metrics.json").read_text())
    assert [result_file[key] for key in ("task", "scale", "seed", "step")] == [task, "scenes", 42, 12]
    metrics = result_file["metrics"]
    assert not [name for name in os.listdir(out) if name.endswith(".partial")]
    if task == "nlvr2_pretrain":
        assert metrics == {"val": {}, "test": {}} and not (out / "best.pt").exists()
        return
    assert metrics.keys() == {"val", "best_epoch", "test"} and metrics["test"].keys() == METRICS[task]
    scores = [float(text) for text in re.findall(r"^epoch \d: val ([\d.]+)$", result.out, re.MULTILINE)]
    best, step = load(out, "best.pt")["best"], load(out, "best.pt")["step"]
    assert len(scores) == 2 and best["epoch"] == metrics["best_epoch"] == scores.index(max(scores)) + 1
    assert step == 6 * best["epoch"] and best["metrics"] == metrics["val"]
    assert evaluation.score(task, metrics["val"]) == best["score"] == pytest.approx(max(scores), abs=0.01)


def test_a_mistake_in_what_is_evaluated_on_ends_the_run_before_it_trains(tmp_path):
    """It showed after an epoch, and the settings that mend it were refused with the run's checkpoint."""
    (tmp_path / "answers.json").write_text('{"red": 0}')
    (tmp_path / "rows.json").write_text('[{"image": "images/test/none.jpg", "caption": "a star"}]')
    (tmp_path / "vqa.json").write_text('[{"image": "images/val/00000.jpg", "question": "what?", "question_id": 1}]')
    retrieval = "data.retrieval_sets.scenes"
    for task, setting, message in (
        ("vqa", f"data.vqa.answers={tmp_path / 'answers.json'}", "wanted a JSON list of one or more strings"),
        ("vqa", f"data.vqa.val={tmp_path / 'vqa.json'}", "dataset"),
        ("vqa", "data.vqa.test=none.json", "data.vqa.test: none.json is missing"),
        ("retrieval", f"{retrieval}.test={tmp_path / 'rows.json'}", "none.jpg: no such file, the first image of"),
        ("pretrain", f"{retrieval}.image_root={tmp_path}", "images/test/00000.jpg: no such file, the first image of"),
        ("pretrain", f"data.foils={tmp_path / 'none.json'}", "none.json"),
    ):
        out = tmp_path / "out"
        result = run(tmp_path, "train.py", task, "--out", out, *TINY, f"{task}.start=null", setting)
        assert message in result.error and not (out / "log.jsonl").exists()


def test_loss_of_answers_falls(runs):
    losses = [line["loss"] for line in read_log(runs.out / "vqa")]
    assert sum(losses[-6:]) < 0.95 * sum(losses[:6])


def test_answers_are_written_for_every_question_once(runs):
    folder = commands.scenes_folder()
    rows = json.loads((folder / "vqa_test.json").read_text())
    answers = json.loads((runs.out / "vqa" / "answers_test.json").read_text())
    assert [row["question_id"] for row in answers] == [row["question_id"] for row in rows]
    assert all(row.keys() == {"question_id", "answer"} for row in answers)
    assert {row["answer"] for row in answers} <= set(json.loads((folder / "answer_list.json").read_text()))
    share = sum(row["answer"] == own["answer"][0] for row, own in zip(answers, rows)) / len(rows)
    metrics = json.loads((runs.out / "vqa" / "metrics.json").read_text())["metrics"]
    assert metrics["test"]["accuracy"] == pytest.approx(100 * share)


def test_vqa_metrics_of_rows_as_vqa_has_them():
    """Without kinds, some without answers, some with ten."""
    rows = [{"answers": ["two"]}, {"answers": None}, {"answers": ["two"] * 3 + ["red"] * 7}]
    metrics = evaluation.vqa_metrics(rows, ["2", "yes", "2"])
    assert metrics == {"accuracy": pytest.approx(95), "standard_error": pytest.approx(5 / math.sqrt(2)), "items": 2}
    assert evaluation.vqa_metrics(rows[1:2], ["yes"]) == {}
    kinds = evaluation.vqa_metrics([rows[0] | {"kind": "count"}, rows[2]], ["3", "2"])
    assert (kinds["accuracy"], kinds["accuracy_count"]) == pytest.approx((45, 0))


@pytest.mark.parametrize("task, line", [
    ("retrieval", "pretrain/checkpoint.pt"),
    ("grounding", "pretrain/checkpoint.pt"),
    ("vqa", "pretrain/checkpoint.pt; left over: itm_head, temp"),
    ("entailment", "pretrain/checkpoint.pt; fresh: encoders.cls_head; left over: itm_head, temp"),
    ("nlvr2_pretrain", "pretrain/checkpoint.pt; fresh: ta_head; left over: encoders_m, itm_head, temp"),
    ("nlvr2", "nlvr2_pretrain/checkpoint.pt; fresh: encoders.cls_head; left over: ta_head"),
])
def test_task_says_what_it_starts_from(task, line, runs):
    said = [line for line in runs.results[task].out.splitlines() if line.startswith("starts from")]
    assert said == [f"starts from {os.path.join('out', 'scenes')}{os.sep}{line}"]


def test_start_is_a_task_a_file_a_folder_or_nothing(runs, tmp_path):
    """With epochs=0 the start itself is evaluated, and is the checkpoint; no training file is needed."""
    start, settings = runs.out / "pretrain", [*runs.arguments, "vqa.epochs=0", "data.vqa={train: [no.json], val: null}"]
    for name, more in (("task", []), ("file", ["--start", start / "checkpoint.pt"]), ("folder", ["--start", start]),
                       ("nothing", ["vqa.start=null"])):
        result = run(tmp_path, "train.py", "vqa", "--out", tmp_path / name, *settings, *more, cwd=runs.folder)
        assert result.status == 0 and "starts from" in result.out, result.err
        assert ("starts from nothing" in result.out) == (name == "nothing")
        assert json.loads((tmp_path / name / "metrics.json").read_text())["metrics"]["test"]["items"] == 39
    models = {name: load(tmp_path / name)["model"] for name in ("task", "file", "folder", "nothing")}
    assert_same(models["task"], models["file"])
    assert_same(models["task"], models["folder"])
    word = "encoders.decoder.text.embeddings.word.weight"
    assert torch.equal(models["task"][word], load(start)["model"]["encoders.text.embeddings.word.weight"])
    assert not torch.equal(models["task"][word], models["nothing"][word])


def test_fine_tuning_at_an_image_size_of_its_own(runs, tmp_path):
    arguments = [*runs.arguments, "entailment.image_size=48", "entailment.epochs=1"]
    start = "--start", runs.out / "pretrain"
    result = run(tmp_path, "train.py", "entailment", *start, "--out", tmp_path, *arguments)
    assert result.status == 0, result.err
    assert load(tmp_path)["model"]["encoders_m.vision.pos_embed"].shape == (1, 1 + 36, 32)
    for split in ("val", "test"):  # eval.py takes the size from the checkpoint
        again = run(tmp_path, "eval.py", "entailment", "--checkpoint", tmp_path, "--split", split, *runs.arguments)
        figures = "".join(f"  {line}\n" for line in again.out.splitlines())
        assert f"{split}:\n{figures}" in result.out and figures, again.err


def test_evaluation_cuts_texts_where_the_run_cut_them_and_says_what_it_reads(runs, tmp_path):
    settings = ["retrieval.max_tokens=4", "retrieval.epochs=1", "data.retrieval_sets.scenes.val=null"]
    result = run(tmp_path, "train.py", "retrieval", "--start", runs.out / "pretrain", "--out", tmp_path,
                 *runs.arguments, *settings)
    again = run(tmp_path, "eval.py", "retrieval", "--checkpoint", tmp_path, *runs.arguments)
    figures = "".join(f"  {line}\n" for line in again.out.splitlines())
    assert figures and f"test:\n{figures}" in result.out, again.err
    said, read = again.err.splitlines()
    assert "retrieval_train.json of scale scenes" in said
    assert read.startswith("evaluated on ") and read.endswith("retrieval_test.json of scale scenes, float32")


def test_figures_of_a_file_that_is_trained_on_are_told_from_others(runs, tmp_path):
    file = commands.scenes_folder() / "vqa_train.json"
    for files, trained_on in (("val", file), ("test", file.parent / "vqa_t?ain.json")):
        result = run(tmp_path, "train.py", "vqa", "--start", runs.out / "pretrain", "--out", tmp_path / files,
                     *runs.arguments, "vqa.epochs=0", f"data.vqa={{train: ['{trained_on}'], val: null, test: null}}",
                     f"data.vqa.{files}={file}")
        assert result.err.count(f"{file}, for {files}, is among the files trained on") == 1, result.err


def test_answers_on_val_are_those_of_the_best_epoch(runs, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import itertools, sys, torch, train\n"
        "whole, worse = train.evaluation.evaluate, itertools.count(0, -1)\n"
        "def spy(task, model, tokenizer, config, split, out):\n"
        "    torch.save(model.state_dict(), f'{out}/{split}.pt')\n"
        "    return whole(task, model, tokenizer, config, split, out)\n"
        "train.evaluation.evaluate, train.evaluation.score = spy, lambda *_: float(next(worse))\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    out = tmp_path / "out"
    result = run(tmp_path, program, "vqa", "--start", runs.out / "pretrain", "--out", out, *runs.arguments)
    assert result.status == 0 and load(out)["best"]["epoch"] == 1 and load(out)["epoch"] == 2, result.err
    best = load(out, "best.pt")["model"]
    assert_same(load(out, "val.pt"), best)
    assert_same(load(out, "test.pt"), best)


def test_questions_without_answers_are_answered_and_not_judged(runs, tmp_path):
    file = tmp_path / "questions.json"
    rows = json.loads((commands.scenes_folder() / "vqa_test.json").read_text())
    file.write_text(json.dumps([{key: value for key, value in row.items() if key != "answer"} for row in rows]))
    result = run(tmp_path, "eval.py", "vqa", "--checkpoint", runs.out / "vqa" / "best.pt", *runs.arguments,
                 f"data.vqa.test={file}")
    answers = runs.out / "vqa" / "answers_test.json"
    assert result.err.endswith(f"no question of {file} has answers to judge by; ours: {answers}\n")
    assert [row["question_id"] for row in json.loads(answers.read_text())] == [row["question_id"] for row in rows]


def test_answers_that_cannot_be_written_cost_no_figures(runs, tmp_path):
    shutil.copy(runs.out / "vqa" / "best.pt", tmp_path)
    (tmp_path / "answers_test.json").mkdir()
    result = run(tmp_path, "eval.py", "vqa", "--checkpoint", tmp_path, *runs.arguments)
    assert result.status == 0 and "no answers for the server: " in result.err, result.err
    figures = json.loads((runs.out / "vqa" / "metrics.json").read_text())["metrics"]["test"]
    assert evaluation.format_metrics(figures) in result.out


def test_finished_run_gives_its_figures_again(runs):
    before = (runs.out / "vqa" / "metrics.json").read_text()
    result = run(runs.folder, "train.py", "vqa", *runs.arguments, cwd=runs.folder)
    assert result.status == 0 and "finished:" in result.out and "12 of 12" in result.out, result.err
    assert (runs.out / "vqa" / "metrics.json").read_text() == before and len(read_log(runs.out / "vqa")) == 12


@pytest.mark.parametrize("task, start", [("vqa", "pretrain"), ("nlvr2", "nlvr2_pretrain")])
def test_missing_start_is_one_line(task, start, tmp_path):
    result = run(tmp_path, "train.py", task, *TINY, cwd=tmp_path)
    folder = os.path.join("out", "scenes", start)
    assert result.error == (
        f"{task} starts from {start}, of which {folder} holds no checkpoint; run python train.py {start} "
        f"--scale scenes first, or give {task}.start=FILE, or {task}.start=null"
    )
    result = run(tmp_path, "train.py", task, "--start", "none.pt", *TINY, cwd=tmp_path)
    assert result.error == "none.pt: no such file, and no folder with best.pt or checkpoint.pt of train.py"


# Killed and resumed


def test_killed_between_best_and_checkpoint(runs, tmp_path):
    """At the end of each of two epochs: best.pt is written, the checkpoint beside it does not know of it yet."""
    out, program = tmp_path / "out", tmp_path / "program.py"
    program.write_text(
        "import os, signal, sys, train\n"
        "calls = []\n"
        "def die(source, target):\n"
        "    calls.append(target)\n"
        "    if sum(path.endswith('checkpoint.pt') for path in calls) == int(os.environ['CHECKPOINTS']):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return replace(source, target)\n"
        "replace, os.replace = os.replace, die\n"
        "os.environ['CHECKPOINTS'], *arguments = sys.argv[1:]\n"
        "train.main(arguments)\n"
    )
    arguments = ["vqa", "--out", out, *runs.arguments]
    assert run(tmp_path, program, 3, *arguments, cwd=runs.folder).status == -signal.SIGKILL  # of steps 3, 6, 6 again
    assert load(out)["step"] == 6 and load(out)["best"] is None and load(out, "best.pt")["step"] == 6
    assert run(tmp_path, program, 4, *arguments, cwd=runs.folder).status == -signal.SIGKILL  # of 6, 9, 12, 12 again
    assert load(out)["step"] == 12 and load(out)["best"]["epoch"] == 1 and len(read_log(out)) == 12
    result = run(tmp_path, "train.py", *arguments, cwd=runs.folder)
    assert result.status == 0 and "epoch 2: val" in result.out and "epoch 1" not in result.out, result.err
    assert_same_run(out, runs.out / "vqa")
    assert_same(*(json.loads((folder / "metrics.json").read_text()) for folder in (out, runs.out / "vqa")))


@pytest.mark.parametrize("task, lines", [("retrieval", [4, 10]), ("nlvr2", [8])])
def test_killed_and_resumed(task, lines, runs, tmp_path):
    result = kill_at_lines(tmp_path, [task, *runs.arguments], lines, cwd=runs.folder)
    assert result.status == 0 and "goes on from step" in result.out, result.err
    assert_same_run(tmp_path, runs.out / task)
    if task == "retrieval":
        assert load(tmp_path)["model"]["queue_written"] == 12 * 8


# Two processes


@pytest.mark.parametrize("task", EVALUATED)
def test_two_processes_have_the_figures_of_one(task, runs, tmp_path, monkeypatch, capsys):
    result = run(tmp_path, "eval.py", task, "--checkpoint", runs.out / task, *runs.arguments)
    figures = runs.results[task].out.split("test:\n")[1].splitlines()[:-1]  # as training ended
    assert result.status == 0 and result.out.splitlines() == [line.removeprefix("  ") for line in figures], result.err

    logits, classify = [], softmask.ClassifierModel.logits
    monkeypatch.setattr(softmask.ClassifierModel, "logits", lambda *rest: logits.append(classify(*rest)) or logits[-1])
    monkeypatch.setattr(evaluation, "format_metrics", json.dumps)
    (tmp_path / "one").mkdir()
    checkpoint = load(runs.out / task, "best.pt")  # says the same of nearly all rows: here it shall say more
    for name, value in checkpoint["model"].items():
        checkpoint["model"][name] = 3 * value if value.ndim > 1 and name.startswith("encoders.") else value
    if task in ("nlvr2", "entailment"):  # no class ahead of the others
        torch.save(checkpoint, tmp_path / "one" / "best.pt")
        evaluation.main([task, "--checkpoint", str(tmp_path / "one"), *runs.arguments])
        checkpoint["model"]["encoders.cls_head.2.bias"] -= torch.cat(logits).median(0).values
        logits.clear(), capsys.readouterr()
    torch.save(checkpoint, tmp_path / "one" / "best.pt")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    program = tmp_path / "program.py"
    program.write_text("import json, sys, eval\neval.format_metrics = json.dumps\neval.main(sys.argv[1:])\n")
    two = run(tmp_path, program, task, "--checkpoint", tmp_path / "two", *runs.arguments, processes=2)
    assert two.status == [0, 0], two.err
    evaluation.main([task, "--checkpoint", str(tmp_path / "one"), *runs.arguments])
    one = json.loads(capsys.readouterr().out)
    assert one == json.loads(two.out) and one.keys() == METRICS[task]
    if task == "vqa":
        answers = [(tmp_path / folder / "answers_test.json").read_text() for folder in ("one", "two")]
        assert answers[0] == answers[1] and len({row["answer"] for row in json.loads(answers[0])}) > 2
    if logits:
        predictions = torch.cat(logits).argmax(1)
        assert len(predictions) == one["items"] and predictions.unique().numel() > 1


def test_fewer_rows_than_processes(runs, tmp_path):
    (tmp_path / "row.json").write_text(json.dumps(json.loads((runs.folder / "nlvr2.json").read_text())[:1]))
    result = run(tmp_path, "eval.py", "nlvr2", "--checkpoint", runs.out / "nlvr2", *runs.arguments,
                 f"data.nlvr2.test={tmp_path / 'row.json'}", processes=2)
    assert result.status == [0, 0] and re.search(r"^items +1$", result.out, re.MULTILINE), result.err


@pytest.mark.parametrize("task", ["retrieval", "vqa", "nlvr2_pretrain", "nlvr2", "entailment"])
def test_two_processes_have_the_gradients_of_two_micro_batches(task, runs, tmp_path):
    """Three steps of 8 records under DistributedDataParallel, which waits for ever where a parameter is unused."""
    folder, spy = commands.scenes_folder(), tmp_path / "spy.py"
    spy.write_text(SPY)
    keys = {"retrieval": "data.retrieval_sets.scenes", "nlvr2_pretrain": "data.nlvr2_pretrain_files"}
    key = keys.get(task, f"data.{task}")
    name = "pretrain.json" if task == "nlvr2_pretrain" else f"{task}_train.json"
    (tmp_path / name).write_text(json.dumps(json.loads((folder / name).read_text())[:24]))
    settings = [f"{key}=[{tmp_path / name}]"]
    if task != "nlvr2_pretrain":
        settings = [f"{key}.train=[{tmp_path / name}]"]
        settings += [f"{key}.{split}=null" for split in ("val", "test") if task != "entailment"]
    settings += ["model.dropout=0.0", "checkpoint_every_steps=1", f"{task}.batch_size=4", f"{task}.epochs=1"]
    start = runs.out / ("nlvr2_pretrain" if task == "nlvr2" else "pretrain")
    outs = tmp_path / "two", tmp_path / "one"
    for out, processes, accumulation in zip(outs, (2, 1), (1, 2)):
        result = run(tmp_path, spy, task, "--start", start, "--out", out, *runs.arguments, *settings,
                     f"{task}.accumulation={accumulation}", processes=processes)
        assert result.status in (0, [0, 0]) and "Warning" not in result.err, result.err
    for step in (1, 2, 3):
        first, second, alone = (torch.load(path) for path in (
            outs[0] / f"0-{step}.pt", outs[0] / f"1-{step}.pt", outs[1] / f"0-{step}.pt"))
        assert_same(first, second)
        # The key's bias cancels in the softmax: its gradient is rounding noise, which Adam blows up to whole steps.
        for part, tolerance in (("grads", 1e-5 if step == 1 else 1e-4), ("model", 1e-5 if step == 1 else 1e-4)):
            assert_close(first[part], alone[part], [n for n in alone[part] if not n.endswith("key.bias")], tolerance)
    lines = ({name: torch.tensor(value) for name, value in read_log(out)[-1].items()} for out in outs)
    assert_close(*lines, LOGGED[task] | {"loss", "grad_norm"}, 1e-4)
    metrics = [json.loads((out / "metrics.json").read_text())["metrics"] for out in outs]
    assert metrics[0] == metrics[1] and bool(metrics[0]["test"]) == (task == "entailment")


# Ranking


@torch.no_grad()
def test_reranking_equals_the_loop_over_pairs(runs, tmp_path):
    model, tokenizer, _ = softmask.load_trained(runs.out / "retrieval")
    livelier(model)
    config, folder = data.resolve_scenes(data.load_config("scenes", TINY)), commands.scenes_folder()
    rows = json.loads((folder / "retrieval_test.json").read_text())[:7]
    said = [row["caption"][0] for row in rows]
    others = [row["caption"][0] for row in json.loads((folder / "retrieval_train.json").read_text())]
    others = iter([text for text in dict.fromkeys(others) if text not in said])  # alike ones would tie
    for number, row in enumerate(rows):
        row["caption"] += [next(others) for _ in range(number % 3)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    tokenize = functools.partial(softmask.tokenize, tokenizer, max_tokens=config.retrieval.max_tokens)
    found = evaluation.retrieval(model, tokenize, tmp_path / "rows.json", folder, config)
    paths, captions, image_of_text = data.load_retrieval(tmp_path / "rows.json", folder, config.data.max_words)
    _, scores_i2t, scores_t2i = evaluation.retrieval_scores(model, tokenize, paths, captions, config)
    assert len(captions) == 13 and config.eval.top_k == 4

    api = softmask.Pretrained(model, tokenizer, config.retrieval.max_tokens, config.data.max_words)
    images = [data.read_image(path) for path in paths]
    sim = [[float(api.encode_image(image) @ api.encode_text(text)) for text in captions] for image in images]
    match = [[api.match(image, text)[1] for text in captions] for image in images]
    naive_i2t, naive_t2i = torch.full((7, 13), -math.inf), torch.full((13, 7), -math.inf)
    for i in range(7):
        for t in sorted(range(13), key=lambda t: -sim[i][t])[:4]:
            naive_i2t[i, t] = match[i][t]
    for t in range(13):
        for i in sorted(range(7), key=lambda i: -sim[i][t])[:4]:
            naive_t2i[t, i] = match[i][t]
    assert torch.tensor(match).std() > 0.01
    torch.testing.assert_close(scores_i2t, naive_i2t, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores_t2i, naive_t2i, rtol=1e-5, atol=1e-5)
    assert found["reranked"] == evaluation.retrieval_metrics(naive_i2t, naive_t2i, torch.from_numpy(image_of_text))


def random_model(task, seed=0, vocab_size=40, queue_size=6, **sizes):
    """A small model, all of whose weights are random and its twin's differ; sizes: settings of the section model."""
    config = data.config_to_dict(load_config())
    torch.manual_seed(seed)
    model = softmask.build_model(task, vocab_size, config["model"] | sizes, config["method"] | {"queue_size": queue_size})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


@functools.cache
def load_config():
    return data.load_config("scenes", TINY)


def naive_ranking(model, image, question, candidates):
    """Log of each candidate's first-token probability, and of that times its likelihood: alone, token by token."""
    encoders, decoder = model.encoders, model.encoders.decoder
    mask = torch.ones_like(question)[None]
    image_keys_values = encoders.image_keys_values(encoders.encode_image(image[None]))
    fused, _ = encoders.fuse(encoders.encode_text(question[None], mask), mask, image_keys_values)
    keys_values = decoder.fusion.keys_values(fused)
    firsts, wholes = [], []
    for candidate in candidates:
        log_p = []
        for length in range(1, len(candidate)):  # no mask of the future: it is not there
            prefix = torch.tensor([candidate[:length]])
            states = decoder(prefix, torch.ones_like(prefix), keys_values, mask)
            log_p.append(decoder.logits(states)[0, -1].log_softmax(0)[candidate[length]].item())
        firsts.append(log_p[0])
        wholes.append(log_p[0] + sum(log_p))
    return firsts, wholes


@torch.no_grad()
@pytest.mark.parametrize("k, bias", [(4, 0), (100, 0), (4, -120)])  # exp(-120) is 0 in float32
def test_answers_are_ranked_as_one_by_one(k, bias):
    model = livelier(random_model("vqa")).double()
    model.encoders.decoder.mlm_head.bias[20:28] += bias
    generator = torch.Generator().manual_seed(k)
    image = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    questions = [[2, 7, 8, 9, 10], [2, 11], [2, 12, 13, 14]]
    answers = [[20], [21, 30], [22, 31, 32], [23], [24, 30], [25, 33, 34, 35], [26], [27, 36, 36]]
    answers += [[20, 37], [21, 30, 30]] if k == 100 else []  # these share their first token with others: all are ranked
    candidates = [[2, *answer, 3] for answer in answers]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    ids, mask = pad([torch.tensor(q) for q in questions]), pad([torch.ones(len(q)).long() for q in questions])
    candidate_ids = pad([torch.tensor(c) for c in candidates])
    candidate_mask = pad([torch.ones(len(c)).long() for c in candidates])
    index, probs = model.rank_answers(image, ids, mask, candidate_ids, candidate_mask, k)
    assert index.shape == probs.shape == (3, min(k, len(answers)))
    for row in range(3):
        firsts, wholes = naive_ranking(model, image[row], torch.tensor(questions[row]), candidates)
        likeliest = sorted(range(len(answers)), key=lambda c: -firsts[c])[:k]
        ranked = sorted(likeliest, key=lambda c: -wholes[c])
        assert index[row].tolist() == ranked
        expected = torch.tensor([wholes[c] for c in ranked], dtype=torch.float64).softmax(0)
        torch.testing.assert_close(probs[row].double(), expected, rtol=1e-4 if bias else 1e-5, atol=0)
    assert len({tuple(row) for row in index.tolist()}) > 1


# Text assignment, before NLVR2


def assign(monkeypatch, image_ids, seed):
    """A forward and backward pass of images all different: left and right image and label of each text, the loss."""
    model, size, seen = random_model("nlvr2_pretrain"), len(image_ids), {}
    project, itm_loss = model.encoders.image_keys_values, softmask.itm_loss

    def spy_images(left, right):
        for name, side in (("left", left), ("right", right)):
            seen[name] = [int((states == own).all((1, 2)).nonzero()) for own in side]
        return project(left, right)

    def spy_labels(logits, labels):
        seen["labels"] = labels.tolist()
        return itm_loss(logits, labels)

    states = torch.randn(size, 1 + 16, 32, generator=torch.Generator().manual_seed(seed))
    monkeypatch.setattr(model.encoders, "encode_image", lambda image: states)
    monkeypatch.setattr(model.encoders, "image_keys_values", spy_images)
    monkeypatch.setattr(softmask, "itm_loss", spy_labels)
    text = torch.full((size, 3), 7), torch.ones(size, 3, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    losses, _ = model(torch.zeros(size, 3, 32, 32), *text, torch.tensor(image_ids), generator)
    losses["ta"].backward()
    monkeypatch.undo()
    grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)
    return seen["left"], seen["right"], seen["labels"], losses["ta"].item()


def test_labels_of_text_assignment_say_where_the_image_is(monkeypatch):
    image_ids, counts = [1, 1, 2, 3, 4, 4, 5, 6], {0: 0, 1: 0, 2: 0}
    for seed in range(30):
        left, right, labels, loss = assign(monkeypatch, image_ids, seed)
        assert 0.5 < loss < 4
        for own, (a, b, label) in enumerate(zip(left, right, labels)):
            counts[label] += 1
            assert a != b and (a == own) == (label == 0) and (b == own) == (label == 1)
            assert all(image_ids[other] != image_ids[own] for other in (a, b) if other != own)
    assert all(abs(count / 240 - 1 / 3) < 0.1 for count in counts.values()), counts


def test_text_assignment_sets_similar_images_side_by_side(monkeypatch):
    model, seen, hard_negatives = random_model("nlvr2_pretrain"), [], softmask.hard_negatives
    feats = torch.tensor([[1.0, 0.0], [0.98, 0.2], [-0.98, 0.2], [-1.0, 0.0]])  # 0 and 1 are alike, 2 and 3 are
    monkeypatch.setattr(model.encoders, "image_feat", lambda _: feats)
    monkeypatch.setattr(softmask, "hard_negatives", lambda *given: seen.append(hard_negatives(*given)) or seen[-1])
    text = torch.full((4, 3), 7), torch.ones(4, 3, dtype=torch.int64)
    for seed in range(20):
        model(torch.zeros(4, 3, 32, 32), *text, torch.arange(4), torch.Generator().manual_seed(seed))
    assert all(index.tolist() == [1, 0, 3, 2] for index, _ in seen[::2]) and len(seen) == 40


def test_text_assignment_without_enough_images(monkeypatch):
    assert assign(monkeypatch, [5], 0)[2:] == ([-100], 0.0)
    assert assign(monkeypatch, [5, 5, 5], 0)[2:] == ([-100] * 3, 0.0)
    labels = sum((assign(monkeypatch, [5, 6], seed)[2] for seed in range(10)), [])
    assert set(labels) == {0, 1, -100}  # for "neither" there is no second image


def test_accuracy_counts_what_has_a_label(monkeypatch):
    model, seen, itm_loss = random_model("nlvr2_pretrain"), [], softmask.itm_loss
    with torch.no_grad():
        model.ta_head.weight.zero_(), model.ta_head.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))  # always "left"
    monkeypatch.setattr(softmask, "itm_loss", lambda logits, labels: seen.append(labels.tolist()) or itm_loss(logits, labels))
    text = torch.full((2, 3), 7), torch.ones(2, 3, dtype=torch.int64)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        _, stats = model(torch.zeros(2, 3, 32, 32), *text, torch.arange(2), generator)
        assert stats["accuracy"] == seen[-1].count(0) / max(2 - seen[-1].count(-100), 1)
    assert any(set(labels) == {0, -100} for labels in seen)


def test_accuracy_of_classes():
    model = random_model("entailment")
    model.logits = lambda *_: torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert model(None, None, None, torch.tensor([0, 1, 2, 0]), 0.4)[1]["accuracy"] == 0.75


# Evaluation


def pixels(path):
    """An image (1, 3, 32, 32) as the model takes it, made apart from eval.py."""
    image = softmask.TF.to_dtype(softmask.TF.to_image(softmask.square(data.read_image(path), 32)), scale=True)
    return softmask.normalize(image[None])


@torch.no_grad()
@pytest.mark.parametrize("task", ["nlvr2", "entailment", "vqa"])
def test_rows_are_evaluated_as_one_by_one(task, monkeypatch):
    """Each image with its own text, left before right, answers ended by [SEP], the best of them."""
    config, folder = data.resolve_scenes(load_config()), commands.scenes_folder()
    tokenizer = softmask.load_tokenizer(config.data.tokenizer)
    model = livelier(random_model(task, seed=3, vocab_size=len(tokenizer)))
    tokenize = functools.partial(softmask.tokenize, tokenizer, max_tokens=config.model.max_positions)
    rows = evaluation.load_rows(task, str(folder / f"{task}_test.json"), config)[:12]
    answers, found, seen = data.load_answers(folder / "answer_list.json")[::4], [], []
    candidates = tokenize(answers, end=True)
    candidates = candidates["input_ids"], candidates["attention_mask"]
    for row in rows:
        image = torch.cat([pixels(path) for path in row.get("images", [row.get("image")])])
        text = tokenize([row["text"]])
        text = text["input_ids"], text["attention_mask"]
        if task == "vqa":
            found.append(answers[model.rank_answers(image, *text, *candidates, 4)[0][0, 0]])
        else:
            found.append(model.logits(model.encoders, image[None] if task == "nlvr2" else image, *text)[0])
    if task == "vqa":
        rank = model.rank_answers
        monkeypatch.setattr(model, "rank_answers", lambda *given: seen.append(given[3:5]) or rank(*given))
        assert evaluation.answer_questions(model, rows, answers, tokenize, config) == found and len(set(found)) > 1
        assert all(torch.equal(one, other) for given in seen for one, other in zip(given, candidates, strict=True))
        return
    middle = torch.stack(found).median(0).values  # no class ahead of the others
    model.encoders.cls_head[2].bias -= middle
    predictions, metrics = [int((logits - middle).argmax()) for logits in found], evaluation.classification_metrics
    monkeypatch.setattr(evaluation, "classification_metrics", lambda *given: seen.append(given[:2]) or metrics(*given))
    evaluation.classify(model, rows, ("a", "b", "c"), tokenize, config)
    assert [*map(list, seen[0])] == [predictions, [row["label"] for row in rows]] and len(set(predictions)) > 1


# Loading


def where_from(name, images):
    """The parameter of pre-training that one of a task starts from; images: fusion layers made of each."""
    name = name.replace(".decoder.", ".")
    return re.sub(r"fusion\.layers\.(\d+)", lambda match: f"fusion.layers.{int(match[1]) // images}", name)


def assert_started(model, source, fresh):
    """All of model but queues and fresh parts equals what it starts from in source, the twin's in the twin."""
    own, given = model.state_dict(), source.state_dict()
    images = model.encoders.fusion.images_per_text // source.encoders.fusion.images_per_text
    for name, value in own.items():
        if "queue" not in name and softmask.task_part(name) not in fresh:
            same = name in given and ".decoder." in name
            assert torch.equal(value, given[name if same else where_from(name, images)]), name
    for part in fresh:
        for name in (name for name in own if softmask.task_part(name) == part and name.startswith("encoders_m.")):
            assert torch.equal(own[name], own[name.replace("encoders_m.", "encoders.")]), name


HEADS = {"retrieval": set(), "grounding": set(), "vqa": {"itm_head", "temp"}, "entailment": {"itm_head", "temp"},
         "nlvr2": {"itm_head", "temp"}, "nlvr2_pretrain": {"itm_head", "temp"}}  # what pre-training alone has
FRESH = {"entailment": {"encoders.cls_head"}, "nlvr2": {"encoders.cls_head"}, "nlvr2_pretrain": {"ta_head"}}


@pytest.mark.parametrize("layout", ["ours", "ALBEF.pth"])
@pytest.mark.parametrize("task", FINE_TUNED)
def test_every_task_starts_from_pre_training(task, layout):
    source, model = random_model("pretrain", 1), random_model(task, 2)
    state = source.state_dict() if layout == "ours" else softmask.export_albef(source)
    if layout == "ALBEF.pth":
        assert {"text_encoder.bert.encoder.layer.0.output.LayerNorm.bias", "visual_encoder_m.blocks.1.attn.qkv.weight",
                "text_encoder_m.bert.encoder.layer.3.crossattention.self.key.weight", "vision_proj_m.bias",
                "text_encoder.cls.predictions.decoder.weight", "image_queue", "queue_ptr"} < state.keys()
    fresh, left = softmask.load_start(model, state)
    assert {softmask.task_part(name) for name in fresh} == FRESH.get(task, set())
    left_twin = {name for name in left if name.startswith("encoders_m.")}
    assert {softmask.task_part(name) for name in set(left) - left_twin} == HEADS[task]
    assert bool(left_twin) == (task == "nlvr2_pretrain")
    assert_started(model, source, FRESH.get(task, set()))
    if hasattr(model, "queue_written"):
        assert model.queue_written == 0 and not model.image_queue.any()


BERT_LEFT_OUT = {"encoders.mlm_head"}
NOT_IN_VQA = {"encoders.mlm_head", "encoders.image_proj", "encoders.text_proj"}


@pytest.mark.parametrize("file, source_task, task, fresh, left", [
    ("vqa.pth", "vqa", "vqa", NOT_IN_VQA, set()),
    ("mscoco.pth", "retrieval", "retrieval", BERT_LEFT_OUT, set()),
    ("refcoco.pth", "grounding", "grounding", BERT_LEFT_OUT, set()),
    ("refcoco.pth", "grounding", "vqa", BERT_LEFT_OUT, {"itm_head", "temp"}),
    ("mscoco.pth", "retrieval", "entailment", BERT_LEFT_OUT | {"encoders.cls_head"}, {"itm_head", "temp"}),
    ("pretrain_model_nlvr.pth", "nlvr2_pretrain", "nlvr2_pretrain", BERT_LEFT_OUT, {"temp"}),
    ("pretrain_model_nlvr.pth", "nlvr2_pretrain", "nlvr2", BERT_LEFT_OUT | {"encoders.cls_head"}, {"ta_head", "temp"}),
])
def test_albefs_other_checkpoints_are_read(file, source_task, task, fresh, left):
    source, model = random_model(source_task, 1), random_model(task, 2)
    state = softmask.export_albef(source)
    if file == "pretrain_model_nlvr.pth":
        state["temp"] = torch.tensor(0.07)  # ALBEF's has one, that nothing reads
    names = {
        "vqa.pth": {
            "text_encoder.encoder.layer.3.crossattention.self.value.bias", "visual_encoder_m.pos_embed",
            "text_decoder.bert.encoder.layer.0.crossattention.self.key.weight",
            "text_decoder_m.cls.predictions.transform.dense.weight", "text_decoder.bert.embeddings.LayerNorm.bias",
        },
        "pretrain_model_nlvr.pth": {
            "text_encoder.encoder.layer.6.output.dense.bias", "ta_head.weight", "vision_proj.bias", "text_proj.weight",
        },
    }.get(file, {
        "text_encoder.encoder.layer.3.output.dense.bias", "itm_head.bias", "temp", "text_proj_m.bias", "image_queue",
        "text_queue", "idx_queue", "queue_ptr", "text_encoder_m.embeddings.word_embeddings.weight",
    })
    assert names < state.keys() and not any(name.startswith("encoders") for name in state)
    assert any("_m." in name for name in state) == (file != "pretrain_model_nlvr.pth")
    found = softmask.load_start(model, state)
    assert [{softmask.task_part(name) for name in names} for names in found] == [fresh, left]
    if task in (source_task, "entailment"):
        assert_started(model, source, fresh)
    if task == "nlvr2":  # the layers are paired already, there is no twin
        for twin in (model.encoders, model.encoders_m):
            for name, value in source.encoders.state_dict().items():
                assert "mlm_head" in name or torch.equal(twin.state_dict()[name], value), name
    if task == "vqa" and source_task != "vqa":
        layers, decoder = source.encoders.fusion.layers.state_dict(), model.encoders.decoder.fusion.layers.state_dict()
        assert_same(dict(layers), dict(decoder))


@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_empty_queues_are_not_exported(task):
    """As those of from_pretrained: ALBEF would refuse them, whose own have another shape."""
    full, empty = (set(softmask.export_albef(random_model(task, 1, queue_size=size))) for size in (4, 0))
    assert full - empty == {"image_queue", "text_queue"} | ({"idx_queue"} if task == "retrieval" else set())
    assert empty < full


@pytest.mark.parametrize("task", ["retrieval", "grounding"])
def test_a_checkpoint_without_twin_and_queues_is_read(task):
    """As ALBEF's mscoco.pth and refcoco.pth were released."""
    source, model = random_model(task, 1), random_model(task, 2)
    state = softmask.export_albef(source)
    state = {name: value for name, value in state.items() if not re.search(r"_m\.|queue", name)}
    fresh, left = softmask.load_start(model, state)
    assert {softmask.task_part(name) for name in fresh} == BERT_LEFT_OUT and left == []
    student = model.encoders.state_dict()
    for name, value in model.encoders_m.state_dict().items():
        assert torch.equal(value, student[name]), name
        assert "mlm_head" in name or torch.equal(value, source.encoders.state_dict()[name]), name


def test_layers_of_nlvr2_and_of_the_decoder_under_albefs_names():
    """Block 6 + i goes to 6 + 2i and 7 + 2i; the decoder equals the fusion layers, the embeddings and the MLM head."""
    sizes = {"text_layers": 6, "fusion_layers": 6}
    state = softmask.export_albef(random_model("pretrain", 1, **sizes))
    models = {task: random_model(task, 2, **sizes) for task in ("nlvr2", "vqa")}
    for model in models.values():
        softmask.load_start(model, state)
    nlvr2, vqa = (softmask.export_albef(model) for model in models.values())
    for twin in ("", "_m"):
        bert = f"text_encoder{twin}.bert."
        seen = set()
        for name, value in ((name, value) for name, value in state.items() if name.startswith(bert)):
            rest = name.removeprefix(bert)
            layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.*)", rest)
            number = int(layer[1]) if layer else 0
            targets = [number] if number < 6 else [6 + 2 * (number - 6), 7 + 2 * (number - 6)]
            for target in targets:
                own = f"text_encoder{twin}." + (f"encoder.layer.{target}.{layer[2]}" if layer else rest)
                assert torch.equal(nlvr2[own], value), own
                seen.add(own)
            if number >= 6 or not layer:
                decoder = f"text_decoder{twin}.bert." + (f"encoder.layer.{number - 6}.{layer[2]}" if layer else rest)
                assert torch.equal(vqa[decoder], value), decoder
        assert seen == {name for name in nlvr2 if name.startswith(f"text_encoder{twin}.")}
        for name, value in state.items():
            if name.startswith(f"text_encoder{twin}.cls"):
                assert torch.equal(vqa[name.replace("encoder", "decoder")], value), name


def test_decoder_of_another_width_keeps_its_own_cross_attention():
    source, model = random_model("pretrain", 1, vision_width=48), random_model("vqa", 2, vision_width=48)
    before = copy.deepcopy(model.encoders.decoder.state_dict())
    softmask.load_start(model, source.state_dict())
    for name, value in model.encoders.decoder.state_dict().items():
        if re.search(r"cross_attention\.(key|value)\.weight", name):
            assert torch.equal(value, before[name])
        else:
            assert torch.equal(value, source.encoders.state_dict()[name]), name


@pytest.mark.parametrize("task", sorted(set(FINE_TUNED) - {"nlvr2_pretrain"}))
def test_twin_is_a_copy_where_the_checkpoint_has_none(task):
    source, model = random_model("pretrain", 1), random_model(task, 2)
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("encoders_m.")}
    softmask.load_start(model, state)
    assert_same(dict(model.encoders.state_dict()), dict(model.encoders_m.state_dict()))
    assert not any(parameter.requires_grad for parameter in model.encoders_m.parameters())
    assert torch.equal(model.encoders.text_proj.weight, source.encoders.text_proj.weight)


@pytest.mark.parametrize("task, missing, in_albef", [
    ("retrieval", "itm_head.bias", None),
    ("vqa", "encoders.decoder.fusion.layers.2.mlp.fc1.weight", None),
    ("vqa", "encoders.decoder.mlm_head.bias", "text_decoder.cls.predictions.bias"),
    ("nlvr2_pretrain", "ta_head.weight", None),
    ("nlvr2", "encoders.cls_head.0.weight", None),
    ("entailment", "encoders.cls_head.2.bias", None),
    ("entailment", "encoders.fusion.layers.2.cross_norm.bias",
     "text_encoder.encoder.layer.3.crossattention.output.LayerNorm.bias"),
])
def test_half_of_a_head_is_refused(task, missing, in_albef):
    source, model = random_model(task, 1), random_model(task, 2)
    state = softmask.export_albef(source) if in_albef else dict(source.state_dict())
    del state[in_albef or missing]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f"do not fit the model's layers and sizes: {re.escape(missing)} is missing"):
        softmask.load_start(model, state)
    assert_same(dict(before), dict(model.state_dict()))


def test_a_head_of_other_classes_is_left_and_named():
    entailment, pretrain = random_model("entailment", 1), random_model("pretrain", 1)
    model = random_model("nlvr2", 2)
    before = model.encoders.cls_head[2].weight.clone()
    fresh, left = softmask.load_start(model, pretrain.state_dict() | entailment.state_dict())
    assert {softmask.task_part(name) for name in fresh} == {"encoders.cls_head"}
    assert {softmask.task_part(name) for name in left} == {"encoders.cls_head", "itm_head", "temp"}
    assert torch.equal(model.encoders.cls_head[2].weight, before)
    assert_same(dict(model.encoders.cls_head.state_dict()), dict(model.encoders_m.cls_head.state_dict()))


def test_checkpoint_of_another_task_is_one_line(runs, tmp_path):
    result = run(tmp_path, "eval.py", "entailment", "--checkpoint", runs.out / "vqa", *runs.arguments)
    line = "best.pt is of task vqa; entailment wants one of its own: python train.py entailment"
    assert result.error.endswith(line) and str(runs.out) in result.error
    others = [("vqa", "pretrain"), ("nlvr2", "nlvr2_pretrain"), ("grounding", "nlvr2"), ("masks", "entailment")]
    for task, own in others:
        line = f"is of task {own}; {task} wants one of its own: python train.py {task}"
        if task in ("grounding", "masks"):
            line = f"is of task {own}; wanted is one of pretrain, retrieval or grounding"
        with pytest.raises(data.InputError, match=line):
            evaluation.main([task, "--checkpoint", str(runs.out / own), *runs.arguments])


def test_a_model_of_pre_training_is_evaluated_in_what_it_can_do(runs, capsys):
    for task in ("retrieval", "grounding"):
        evaluation.main([task, "--checkpoint", str(runs.out / "pretrain"), *runs.arguments])
        assert ("re-ranked by ITM" if task == "retrieval" else "testA_d") in capsys.readouterr().out
    api = softmask.from_pretrained(runs.out / "grounding")
    image = data.read_image(commands.scenes_folder() / "images" / "test" / "00000.jpg")
    words, cams = api.word_attention(image, "a red star")
    assert words == ["a", "red", "star"] and cams.shape == (3, 4, 4) and 0 < api.match(image, "a red star")[0] < 1


@pytest.mark.parametrize("task", ["vqa", "nlvr2_pretrain", "nlvr2", "entailment"])
def test_from_pretrained_refuses_a_model_without_a_match_score(task, runs):
    message = f"is a model for {task}: no match score; take "
    with pytest.raises(ValueError, match=f"{re.escape(str(runs.out / task))}.* {message}"):
        softmask.from_pretrained(runs.out / task)


# The paper's scale


@pytest.mark.skipif(not os.environ.get("PAPER_SCALE"), reason="10 minutes, 8 GB: PAPER_SCALE=1 pytest -k paper_scale")
@pytest.mark.parametrize("task", FINE_TUNED)
def test_paper_scale_takes_two_steps(task, paper_files, tmp_path):
    arguments = ["--scale", "paper", *paper_files.settings, f"{task}.batch_size=2", f"{task}.epochs=1"]
    stdout = paper.run(tmp_path, "train.py", task, "--start", paper_files.albef, "--out", str(tmp_path), *arguments)
    log, checkpoint = read_log(tmp_path), load(tmp_path)
    assert [line["step"] for line in log] == [1, 2] and f"starts from {paper_files.albef}" in stdout
    assert all(math.isfinite(value) for line in log for value in line.values())
    grid = 16 if task == "nlvr2_pretrain" else 24
    assert checkpoint["model"]["encoders.vision.pos_embed"].shape == (1, 1 + grid**2, 768)
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert metrics["test"].keys() == {
        "retrieval": {"itc", "reranked"}, "vqa": {"accuracy", "standard_error", "items"}, "nlvr2_pretrain": set(),
    }.get(task, METRICS.get(task))
    assert (tmp_path / "best.pt").exists() == (task in ("nlvr2", "entailment"))  # the only ones with a val
    if task == "vqa":
        answers = json.loads((tmp_path / "answers_test.json").read_text())
        assert [row["question_id"] for row in answers] == [9, 0, 1] and metrics["test"]["items"] == 2
    shutil.rmtree(tmp_path)  # up to 7 GB
