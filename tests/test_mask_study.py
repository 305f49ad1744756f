"""tests/mask_study.py scores the pairs and masks that it says."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import data
import eval as evaluation
import mask_study
import softmask
from commands import scenes_folder


def test_plain_losses_are_those_of_match_and_a_mask_of_nothing_changes_nothing(trained, monkeypatch):
    found = mask_study.study(trained.out, count=10, batch_size=10)
    assert list(found) == list(mask_study.KINDS)
    api, rows = softmask.from_pretrained(trained.out), data.read_json(str(scenes_folder() / "retrieval_test.json"))[:10]
    chances = [api.match(data.read_image(str(scenes_folder() / row["image"])), row["caption"][0])[0] for row in rows]
    assert found["true"][0] == pytest.approx(-torch.tensor(chances).log().mean().item(), rel=1e-4)
    assert found["true"][1] == pytest.approx(100 * sum(chance > 0.5 for chance in chances) / 10)
    assert len({loss for loss, _ in found.values()}) == 6  # six kinds of pair, no two of them alike

    monkeypatch.setattr(softmask, "soft_mask", lambda cam, picked: torch.zeros(cam.shape[0], cam.shape[2]))
    nothing = mask_study.study(trained.out, count=10, batch_size=10)
    for kind in mask_study.KINDS[:4]:
        assert nothing[kind] == pytest.approx(found["true"], rel=1e-5)
    assert nothing["false, the image's mask"] == pytest.approx(nothing["false"], rel=1e-5)

    monkeypatch.setattr(softmask, "soft_mask", lambda cam, picked: torch.ones(cam.shape[0], cam.shape[2]))
    everything = mask_study.study(trained.out, count=10, batch_size=10)
    assert everything["true, its mask"] == everything["true, another's mask"] == everything["true, flat mask"]
    assert everything["true, its mask"][0] != pytest.approx(found["true"][0], rel=1e-3)


def test_foils_alone_paint_over_the_object_that_stays_true(trained):
    scene = {"objects": [{"attribute_indices": {"size": 1, "shape": 3}, "box": [1, 0, 2, 1]},
                         {"attribute_indices": {"size": 6, "shape": 8}, "box": [0, 2, 1, 2]}]}
    foil = {"caption": "a small red ring above a large blue star", "foil": "a small red ring above a small blue star"}
    assert mask_study.other_boxes(foil, scene) == [[1, 0, 2, 1]]
    image = np.zeros((4, 4, 3), np.uint8) + 9
    image[0, 1:3], image[2:4, 0] = 200, 100
    painted = mask_study.paint_over(image, [[1, 0, 2, 1]])
    assert (painted[0] == 9).all() and (painted[2:4, 0] == 100).all() and (image[0, 1:3] == 200).all()
    found = mask_study.foils_alone(trained.out, count=10)
    assert set(found) == {"color", "shape", "size"}
    assert all(0 <= share <= 100 for shares in found.values() for share in shares)


def test_without_foils_there_is_no_second_table(trained, monkeypatch):
    model, tokenize, config, files = mask_study.load(trained.out, 100)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, foils=None))
    monkeypatch.setattr(mask_study, "load", lambda *_: (model, tokenize, config, files))
    assert mask_study.foils_alone(trained.out) == {}


def test_the_shares_stand_in_the_table_of_runs(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained.out, tmp_path / "run")
    before = json.loads((tmp_path / "run" / "metrics.json").read_text())
    monkeypatch.setattr(mask_study, "study", lambda folder: {"true": (0.5, 87.5), "false": (0.7, 62.5)})
    monkeypatch.setattr(mask_study, "foils_alone", lambda folder: {"shape": (91.0, 71.0)})
    mask_study.main([str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "| run | 0.500; 87.5 | 0.700; 62.5 |" in printed and "| run | 91.0 | 71.0 |" in printed
    after = json.loads((tmp_path / "run" / "metrics.json").read_text())
    added = {"told: true": 87.5, "told: false": 62.5, "foils alone: shape": 71.0}
    assert after["metrics"] == before["metrics"] | added and after["settings"] == before["settings"]
    [(_, _, figures)] = evaluation.read_runs([tmp_path])["pretrain"]
    assert figures["foils alone: shape"] == 71.0 and figures["told: true"] == 87.5
