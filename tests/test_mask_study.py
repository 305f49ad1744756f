"""tests/mask_study.py scores the pairs and masks that it says."""

import pytest
import torch

import data
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
