"""Metrics of the downstream tasks in eval.py against figures worked out by hand."""
import json
import math

import pytest
import torch

import data
import eval as evaluation

# VQA accuracy


@pytest.mark.parametrize(
    "count, accuracy", [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (5, 100), (9, 100), (10, 100)]
)
def test_vqa_accuracy_of_ten_answers(count, accuracy):
    # 3 of 10: left out once each, the three leave 2 / 3, the other seven 1: (3 * 2 / 3 + 7) / 10 = 0.9
    answers = ["dog"] * count + ["cat"] * (10 - count)
    assert evaluation.vqa_accuracy("dog", answers) == pytest.approx(accuracy)
    assert evaluation.vqa_accuracy("dog", answers[::-1]) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    "answer, normal",
    [
        ("The Dog", "dog"),
        ("an apple and a pear", "apple and pear"),
        ("a", ""),
        ("None", "0"),
        ("zero", "0"),
        ("two dogs", "2 dogs"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("Im", "im"),  # the official table has it in capitals, too late
        ("ive", "ive"),
        ("couldnt've", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),  # one apostrophe is put back, not two
        ("yall'd've", "y'all'd've"),
        ("y'all'dve", "y'all'd've"),
        ("oclock", "o'clock"),
        ("'owsat", "'owsat"),
        ("'ows'at", "'ow's'at"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),
        ("ill", "ill"),  # not in the table, nor is cannot
        ("well", "well"),
        ("t-shirt", "t shirt"),
        ("bar_of_soap", "bar of soap"),
        ("red,white", "red white"),
        ("red, white", "red white"),
        ("red, white,blue", "red whiteblue"),  # beside a space once: dropped everywhere
        ("5 - 6-7", "5 67"),
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # a comma between digits: every mark is dropped
        ("what?", "what"),
        ("(yes)", "yes"),
        ("50% & #1", "50% & #1"),
        ("it's 5:30", "it's 5:30"),
        ("St. John", "st john"),
        ("U.S.A.", "usa"),
        ("3.5", "3.5"),
        ("3.", "3"),
        (" .5 ", ".5"),
        ("no.5", "no.5"),
        ("yes\n", "yes"),
        ("hot\tdog\n\n", "hot dog"),
        ("", ""),
    ],
)
def test_answers_are_normalised_by_the_official_rule(answer, normal):
    assert evaluation.normalize_answer(answer) == normal
    assert evaluation.vqa_accuracy(answer, [normal]) == 100


def test_vqa_accuracy_normalises_both_sides():
    answers = ["two", "Two.", "the 2", "3", "three", "4", "none", "many", "lots", "a few"]
    assert evaluation.vqa_accuracy("2", answers) == pytest.approx(90)
    assert evaluation.vqa_accuracy("Three!", answers) == pytest.approx(60)
    assert evaluation.vqa_accuracy("zero", answers) == pytest.approx(30)
    assert evaluation.vqa_accuracy("5", answers) == 0


def test_answers_that_all_agree_are_compared_as_they_stand():
    assert evaluation.vqa_accuracy("none\n", ["none"] * 10) == 100
    assert evaluation.vqa_accuracy("0", ["none"] * 10) == 0
    assert evaluation.vqa_accuracy("0", ["none"] * 9 + ["None"]) == 100


def test_vqa_accuracy_of_few_answers():
    assert evaluation.vqa_accuracy("the garbage bin", ["garbage_bin"]) == 100
    assert evaluation.vqa_accuracy("garbage", ["garbage_bin"]) == 0
    assert evaluation.vqa_accuracy("lamp", ["box", "the lamp"]) == 100  # alternatives, not votes
    assert evaluation.vqa_accuracy("desk", ["box"] * 9) == 0
    with pytest.raises(ValueError, match="answers"):
        evaluation.vqa_accuracy("box", [])


# Boxes


@pytest.mark.parametrize(
    "a, b, iou",
    [
        ([3, 4, 10, 20], [3, 4, 10, 20], 1),
        ([0, 0, 10, 10], [5, 5, 10, 10], 25 / 175),  # pixels 5 to 9 each way
        ([0, 0, 10, 10], [5.5, 0, 10, 10], 45 / 155),
        ([0, 0, 10, 10], [0, 0, 10, 5], 1 / 2),
        ([0, 0, 10, 10], [2, 3, 4, 5], 20 / 100),
        ([0, 0, 10, 10], [8, 0, 10, 10], 20 / 180),
        ([0, 0, 10, 10], [9, 0, 10, 10], 0),  # an overlap of one pixel is none: 9 < 9 fails
        ([0, 0, 10, 10], [0, 9, 10, 10], 0),
        ([0, 0, 10, 10], [10, 0, 10, 10], 0),
        ([0, 0, 10, 10], [20, 30, 10, 10], 0),
        ([0, 0, 1, 10], [0, 0, 1, 10], 0),  # not even with itself
        ([0, 0, 0, 0], [0, 0, 0, 0], 0),
        ([0, 0, 10, 10], [5, 5, 10, 10, 0.9], 25 / 175),  # a detector's score behind the box
    ],
)
def test_box_iou_by_hand(a, b, iou):
    assert data.box_iou(a, b) == pytest.approx(iou) and data.box_iou(b, a) == pytest.approx(iou)


def test_pick_proposal_ranks_by_the_sum_over_the_root_of_the_area():
    cam = torch.zeros(6, 8)
    cam[1, 2], cam[4, 6] = 3.0, 4.0
    both, first, second, none = [0, 0, 8, 6], [2, 1, 2, 1], [5, 3, 3, 3, 0.7], [0, 5, 4, 1]
    # 7 / sqrt 48 = 1.01, 3 / sqrt 2 = 2.12, 4 / sqrt 9 = 1.33, 0
    assert evaluation.pick_proposal(cam, [both, second, first, none], 6, 8) == first
    assert evaluation.pick_proposal(cam, [both, second, none], 6, 8) == second[:4]
    assert evaluation.pick_proposal(cam, [none, both], 6, 8) == both
    assert evaluation.pick_proposal(cam, [[0, 0, 2, 1], [2, 1, 1, 1], [6, 4, 1, 1]], 6, 8) == [6, 4, 1, 1]
    assert evaluation.pick_proposal(cam, [[1, 0, 2, 2], [2, 1, 2, 2]], 6, 8) == [1, 0, 2, 2]  # the first of equals
    assert evaluation.pick_proposal(cam, [[1, 4, 2, 2]], 6, 8) is None  # x before y: (2, 1) is column 2, row 1


def test_pick_proposal_cuts_ends_down_to_whole_pixels():
    cam = torch.tensor([[0.0, 1.0, 5.0, 0.0]])
    # columns int(0.9) to int(0.9 + 1.2) - 1: 0 and 1
    assert evaluation.pick_proposal(cam, [[0.9, 0, 1.2, 1], [2, 0, 24, 1]], 1, 4) == [2, 0, 24, 1]  # 0.91 < 5 / sqrt 24
    assert evaluation.pick_proposal(cam, [[0.9, 0, 1.2, 1], [2, 0, 36, 1]], 1, 4) == [0.9, 0, 1.2, 1]  # 0.91 > 5 / 6
    assert evaluation.pick_proposal(cam, [[1.0, 0, 0.9, 1]], 1, 4) is None  # holds no pixel


def test_pick_proposal_resizes_bicubically_without_aligned_corners():
    # 1, 0 on four columns is 1.1055, 0.7734, 0.2266, -0.1055 (bilinear 1, 0.75, 0.25, 0; aligned 1, 0.6852, 0.3148, 0)
    cam, second = torch.tensor([[1.0, 0.0]]), [1, 0, 1, 1]
    first = [0, 0, 1.9, 1]  # bicubic 1.1055 / sqrt 1.9 = 0.802 > 0.773, bilinear 0.725 < 0.75
    assert evaluation.pick_proposal(cam, [first, second], 1, 4) == first
    first = [0, 0, 1.9, 1.1]  # 1.1055 / sqrt 2.09 = 0.765 < 0.773, aligned 0.692 > 0.685
    assert evaluation.pick_proposal(cam, [first, second], 1, 4) == second
    assert evaluation.pick_proposal(cam, [[3, 0, 1, 1]], 1, 4) is None


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_map_that_shows_nothing_picks_nothing(value):
    assert evaluation.pick_proposal(torch.full((3, 3), value), [[0, 0, 9, 9], [2, 2, 4, 4]], 9, 9) is None
    assert evaluation.pick_proposal(torch.ones(3, 3), [], 9, 9) is None


def test_proposals_without_area_or_outside_the_image():
    cam = torch.ones(4, 4)
    empty = [[1, 1, 0, 3], [1, 1, 3, 0], [3, 3, -2, -2], [3, 1, -2, 3]]
    assert evaluation.pick_proposal(cam, empty, 4, 4) is None
    assert evaluation.pick_proposal(cam, [*empty, [0, 0, 2, 2]], 4, 4) == [0, 0, 2, 2]
    assert evaluation.pick_proposal(cam, [[-3, 0, 2, 4], [0, 9, 4, 4]], 4, 4) is None  # wholly outside
    # 8 pixels inside / sqrt 12 = 2.31 > 4 / 2
    assert evaluation.pick_proposal(cam, [[0, 0, 2, 2], [-1, 0, 3, 4]], 4, 4) == [-1, 0, 3, 4]


def test_grounding_accuracy_by_hand():
    left, right, half, whole = [0, 0, 4, 4], [4, 0, 4, 4], [0, 0, 4, 2], [0, 0, 8, 4]
    on_left = torch.tensor([[1.0, 0.0]])
    size = {"height": 4, "width": 8}
    rows = [
        {"split": "val", "bbox": left, "dets": [left, right, whole, half], **size},  # IoU 1, 0, 1/2, 1/2
        {"split": "val", "bbox": right, "dets": [left, right], **size},
        {"split": "testA", "bbox": left, "dets": [right, left, [6, 0, 1, 1]], **size},
        {"split": "testA", "bbox": left, "dets": [], **size},
        {"split": "val", "bbox": left, "dets": [left], **size},
    ]
    cams = [on_left, on_left, on_left, on_left, torch.zeros(2, 3)]
    metrics = evaluation.grounding_accuracy(rows, cams)
    # a constant map picks the largest box, of equals the first: in val whole (right), left (wrong), left (right);
    # in testA right (wrong) and nothing
    assert metrics == pytest.approx(
        {
            "val_d": 100 / 3, "chance_val_d": 100 * (3 / 4 + 1 / 2 + 1) / 3, "uniform_val_d": 200 / 3,
            "testA_d": 50, "chance_testA_d": 100 * (1 / 3 + 0) / 2, "uniform_testA_d": 0,
        }
    )
    with pytest.raises(ValueError):
        evaluation.grounding_accuracy(rows, cams[1:])


def test_the_figure_that_chooses_the_best_epoch():
    assert evaluation.score("retrieval", {"itc": {"r_mean": 1.0}, "reranked": {"r_mean": 2.0}}) == 2
    floors = {"chance_val_d": 9.0, "uniform_val_d": 9.0}
    assert evaluation.score("grounding", {"val_d": 3.0, "testA_d": 5.0, **floors}) == 4
    assert evaluation.score("grounding", {"test_d": 3.0, **floors}) == 3  # RefCOCOg's name
    assert evaluation.score("vqa", {"accuracy": 6.0, "accuracy_count": 9.0, "standard_error": 1.0}) == 6


# Classification


def test_classification_metrics_by_hand():
    labels, names = [0, 1, 1, 2, 1, 2, 1, 0], ("contradiction", "neutral", "entailment")
    predictions = torch.tensor([0, 1, 1, 2, 0, 1, 1, 0])
    assert evaluation.classification_metrics(predictions, torch.tensor(labels), names) == pytest.approx(
        {
            "accuracy": 75, "standard_error": 100 * math.sqrt(3 / 128), "majority": 50, "items": 8,
            "accuracy_contradiction": 100, "accuracy_neutral": 75, "accuracy_entailment": 50,
        }
    )
    alone = evaluation.classification_metrics([1, 1], [0, 0], ("False", "True"))
    assert alone == {"accuracy": 0, "standard_error": 0, "majority": 100, "accuracy_False": 0, "items": 2}
    for predictions, labels in (([], []), ([1], [1, 0])):
        with pytest.raises(ValueError, match="predictions"):
            evaluation.classification_metrics(predictions, labels, ("False", "True"))


# Tables of runs


def write_run(folder, seed, r1, **method):
    """A metrics.json as train.py writes it."""
    settings = {"seed": seed, "method": {"focal_gamma": 2.0, "soft_mask": True} | method, "vqa": {"lr": seed}}
    metrics = {"zero_shot": {"txt_r1": r1 - 1, "img_r1": r1 + 1}, "foils": {"shape": {"accuracy": 2 * r1}}}
    folder.mkdir(parents=True)
    content = {"task": "pretrain", "scale": "scenes", "seed": seed, "step": 1, "settings": settings, "metrics": metrics}
    (folder / "metrics.json").write_text(json.dumps(content))


def test_table_groups_seeds_and_pairs_runs_that_differ_in_one_setting(tmp_path, capsys):
    write_run(tmp_path / "x" / "a", 1, 10.0)
    write_run(tmp_path / "x" / "b", 2, 14.0)
    write_run(tmp_path / "c", 1, 7.0, focal_gamma=0.0)
    write_run(tmp_path / "d", 2, 9.0, focal_gamma=0.0)
    write_run(tmp_path / "e", 3, 1.0, focal_gamma=0.0, soft_mask=False)  # shares its seed with none
    write_run(tmp_path / "x" / "copy", 1, 10.0)  # counts once
    evaluation.main(["table", str(tmp_path / "x"), *(str(tmp_path / name) for name in "cde")])
    assert capsys.readouterr().out.splitlines() == [
        "pretrain",
        "",
        "| method.focal_gamma | method.soft_mask | runs | R@1 by ITC | foils: shape |",
        "| --- | --- | --- | --- | --- |",
        "| 0.0 | True | 2 | 8.0 ± 1.4 | 16.0 ± 2.8 |",
        "| 0.0 | False | 1 | 1.0 | 2.0 |",
        "| 2.0 | True | 2 | 12.0 ± 2.8 | 24.0 ± 5.7 |",
        "",
        "| setting | from | to | pairs | seeds | R@1 by ITC | foils: shape |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| method.focal_gamma | 0.0 | 2.0 | 2 | 2 | 4.0 ± 1.0 | 8.0 ± 2.0 |",
    ]


def test_table_averages_the_pairs_of_a_seed_before_their_error_since_they_are_alike(tmp_path, capsys):
    for seed, gains in enumerate(((1, 3), (7, 5))):
        for soft_mask, gain in zip((True, False), gains):
            write_run(tmp_path / f"{seed}{soft_mask}0", seed, 10.0, soft_mask=soft_mask, focal_gamma=0.0)
            write_run(tmp_path / f"{seed}{soft_mask}2", seed, 10.0 + gain, soft_mask=soft_mask)
    evaluation.main(["table", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert "| method.focal_gamma | 0.0 | 2.0 | 4 | 2 | 4.0 ± 2.0 | 8.0 ± 4.0 |" in lines  # of 2 and 6, not of 1, 3, 7 and 5


def test_table_takes_settings_that_change_together_as_one(tmp_path, capsys):
    write_run(tmp_path / "a", 1, 10.0, mask_text_for="all", distort_blur=0.5)
    write_run(tmp_path / "b", 1, 7.0, mask_text_for="mlm", distort_blur=0.0)
    write_run(tmp_path / "c", 1, 6.0, mask_text_for="mlm", distort_blur=0.0, focal_gamma=0.0)
    evaluation.main(["table", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| method.focal_gamma | method.mask_text_for, method.distort_blur | runs |")
    assert lines[-2].startswith("| method.mask_text_for, method.distort_blur | all, 0.5 | mlm, 0.0 | 1 | 1 | -3.0 | ")
    assert lines[-1].startswith("| method.focal_gamma | 2.0 | 0.0 | 1 | 1 | -1.0 | ")


def test_table_names_seven_of_many_settings_that_change_together(tmp_path, capsys):
    write_run(tmp_path / "a", 1, 10.0)
    write_run(tmp_path / "b", 1, 7.0, **dict.fromkeys("abcdefgh", 5))
    write_run(tmp_path / "c", 1, 7.0, **dict.fromkeys("abcdefghi", 5))
    evaluation.main(["table", str(tmp_path / "a"), str(tmp_path / "b")])
    assert capsys.readouterr().out.splitlines()[2].startswith("| " + ", ".join(f"method.{c}" for c in "abcdefgh") + " | runs |")
    evaluation.main(["table", str(tmp_path / "a"), str(tmp_path / "c")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| " + ", ".join(f"method.{c}" for c in "abcdefg") + ", 2 more | runs |")
    assert lines[-1].split(" | ")[1:3] == ["None, None, None, None, None, None, None, 2 more", "5, 5, 5, 5, 5, 5, 5, 2 more"]


@pytest.mark.parametrize("start, taken_for", [
    ("out/words-1", "out/words-SEED"), ("out/seed1/best.pt", "out/seedSEED/best.pt"), ("v1/words_1", "v1/words_SEED"),
    ("/mnt/disk1/ALBEF.pth", None), ("ALBEF_1M.pth", None), ("words-12", None),
])
def test_a_start_of_the_seed_is_told_from_one_with_its_digit(start, taken_for, tmp_path):
    write_run(tmp_path / "run", 1, 10.0)
    file = tmp_path / "run" / "metrics.json"
    run = json.loads(file.read_text())
    run["settings"]["pretrain"] = {"start": start}
    file.write_text(json.dumps(run))
    assert evaluation.read_run(file)["settings"]["pretrain.start"] == taken_for or start


def test_table_names_runs_without_figures(tmp_path, capsys):
    for seed in (1, 2):
        write_run(tmp_path / str(seed), seed, 10.0)
    run = json.loads((tmp_path / "2" / "metrics.json").read_text())
    (tmp_path / "2" / "metrics.json").write_text(json.dumps(run | {"metrics": {}}))
    evaluation.main(["table", str(tmp_path)])
    assert capsys.readouterr().err == f"{tmp_path / '2' / 'metrics.json'} has no figures to compare\n"


def test_table_takes_runs_that_start_from_their_own_seed_as_alike(tmp_path, capsys):
    for seed, r1 in ((1, 10.0), (2, 14.0), (12, 3.0)):
        write_run(tmp_path / str(seed), seed, r1)
        file = tmp_path / str(seed) / "metrics.json"
        run = json.loads(file.read_text())
        run["settings"]["pretrain"] = {"start": "out/words-12" if seed == 2 else f"out/words-{seed}"}  # 12 is not 2
        file.write_text(json.dumps(run))
    evaluation.main(["table", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| pretrain.start | runs | R@1 by ITC | foils: shape |",
        "| --- | --- | --- | --- |",
        "| out/words-SEED | 2 | 6.5 ± 4.9 | 13.0 ± 9.9 |",
        "| out/words-12 | 1 | 14.0 | 28.0 |",
    ]


def test_table_of_runs_without_figures_is_refused(tmp_path):
    write_run(tmp_path / "a", 1, 10.0)
    file = tmp_path / "a" / "metrics.json"
    run = json.loads(file.read_text()) | {"metrics": {"val": {}, "test": {}}}
    file.write_text(json.dumps(run))
    with pytest.raises(data.InputError, match="metrics.json has no figures to compare"):
        evaluation.main(["table", str(tmp_path)])


def test_table_takes_val_where_there_is_no_test():
    val = {"accuracy": 50.0, "items": 4}
    assert evaluation.headline({"val": val, "best_epoch": 2, "test": {}}) == {"accuracy": 50.0}
    assert evaluation.headline({"val": val, "best_epoch": 2, "test": {"accuracy": 40.0}}) == {"accuracy": 40.0}


def test_table_has_where_words_of_every_kind_point():
    shape = {"hit_own": 50.0, "hit_other": 20.0, "ratio": None, "mass_own": 8.0, "mass_other": 4.0, "area_own": 9.0}
    color = {"hit_own": 60.0, "hit_other": 0.0, "ratio": None, "mass_own": 7.0, "mass_other": 3.0}
    figures = evaluation.headline({"pointing": shape | {"objects": 10, "color": color}})
    assert figures == {
        "pointing: hit_own": 50.0, "pointing: hit_other": 20.0, "pointing: mass_own": 8.0, "pointing: mass_other": 4.0,
        "pointing: color hit_own": 60.0, "pointing: color hit_other": 0.0,
    }


def test_table_refuses_what_is_no_run(tmp_path):
    with pytest.raises(data.InputError, match="no metrics.json in"):
        evaluation.main(["table", str(tmp_path)])
    (tmp_path / "metrics.json").write_text("[]")
    with pytest.raises(data.InputError, match="was not written by train.py"):
        evaluation.main(["table", str(tmp_path)])
    run = {"task": "pretrain", "seed": 1, "step": 2, "settings": {"seed": 1}, "metrics": {"zero_shot": {}}}
    for fault in ({}, {"settings": {}}, {"settings": None}, {"metrics": []}):
        (tmp_path / "metrics.json").write_text(json.dumps(run | fault))
        with pytest.raises(data.InputError, match="metrics.json is no metrics.json of this version"):
            evaluation.main(["table", str(tmp_path)])


def test_table_names_folders_without_a_run_and_takes_names_with_an_equals_sign(tmp_path, capsys):
    write_run(tmp_path / "lr=1", 1, 10.0)
    evaluation.main(["table", str(tmp_path / "lr=1"), str(tmp_path / "lr2")])
    printed = capsys.readouterr()
    assert "| 1 | 10.0 |" in printed.out and printed.err == f"no metrics.json in {tmp_path / 'lr2'}, which a run writes at its end\n"
