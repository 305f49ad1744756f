"""The variants of the method that tests/variants.py measures replace what they say, and nothing else."""

import pytest
import torch

import data
import softmask
import train
import variants
from commands import NO_EVALUATION, TINY, run
from test_softmask import make_batch, make_model, randn, seeded


@pytest.fixture
def restored(monkeypatch):
    """softmask.py as it was, once the test is over."""
    for name in ("soft_mask", "word_attention", "pick_word", "focal_itc_loss"):
        monkeypatch.setattr(softmask, name, getattr(softmask, name))


def losses_of(**changes):
    losses, stats, _ = make_model(**changes)(**make_batch(), generator=seeded())
    return {name: value.item() for name, value in (losses | stats).items()}


def test_a_variant_and_train_do_not_go_on_with_each_others_runs(restored, monkeypatch, tmp_path):
    plain, arguments = data.training_set, ["pretrain", *TINY, NO_EVALUATION, "--out", str(tmp_path)]
    for _ in range(2):  # trained, then finished
        monkeypatch.setattr(data, "training_set", plain)
        variants.main(["hard_mask", *arguments])
    monkeypatch.setattr(data, "training_set", plain)
    with pytest.raises(data.InputError, match="holds a run under other settings .content of the annotation files"):
        train.main(arguments)


@pytest.mark.parametrize("arguments, message", [
    ([], "variant '': wanted one of hard_mask, no_mask, top_word, focal_one_hot"),
    (["hard", "pretrain"], "variant 'hard': wanted one of"),
    (["hard_mask", "vqa"], "a variant of pretrain alone"),
    (["hard_mask", "check"], "a variant of pretrain alone"),
    (["hard_mask", "pretrain.lrr=1"], "pretrain.lrr"),
])
def test_what_is_no_variant_of_pretrain_is_one_line(tmp_path, arguments, message):
    assert message in run(tmp_path, "tests/variants.py", *arguments).error


def test_hard_mask_removes_whole_patches(restored):
    cam, picked = randn(2, 3, 4).abs(), torch.tensor([[False, True, False], [False, False, False]])
    plain = softmask.soft_mask(cam, picked)
    variants.hard_mask()
    assert softmask.soft_mask(cam, picked).tolist() == [[float(m > 0.5) for m in row] for row in plain.tolist()]


def test_no_mask_repeats_the_plain_itm(restored):
    variants.no_mask()
    batch = make_batch()
    batch["mlm_labels"] = torch.full_like(batch["mlm_labels"], -100)  # so that each caption has a word to pick
    losses, stats, _ = make_model()(**batch, generator=seeded())
    assert losses["soft_itm"].item() == pytest.approx(losses["itm"].item(), rel=1e-5) and stats["mask_mean"] == 0
    assert stats["soft_itm_accuracy"] == stats["itm_accuracy"]


def test_top_word_takes_the_largest_sum_among_words_that_are_free(restored):
    cam = torch.tensor([[0.0, 3.0, 5.0, 1.0, 9.0]]).expand(2, -1)[..., None]  # (B, L, N): one patch
    softmask.word_attention = lambda attention, match_logit: cam
    variants.top_word()
    softmask.word_attention(None, None)
    word_ids = torch.tensor([[-1, 0, 0, 1, 2], [-1, 0, 1, 1, 2]])  # means of words: 4, 1, 9 and 3, 3, 9
    excluded = torch.tensor([[False, False, False, False, True], [False, True, False, False, True]])
    picked = softmask.pick_word(word_ids, excluded)
    assert picked.tolist() == [[False, True, True, False, False], [False, False, True, True, False]]
    assert not softmask.pick_word(word_ids, torch.ones_like(excluded)).any()


def test_focal_one_hot_leaves_the_soft_part_as_it_is(restored):
    plain, focal = losses_of(focal_gamma=0.0), losses_of()
    batch = make_batch() | {"alpha": 0.0}
    with_no_soft_part = make_model()(**batch, generator=seeded())[0]["itc"].item()
    without_either = make_model(focal_gamma=0.0)(**batch, generator=seeded())[0]["itc"].item()
    variants.focal_one_hot()
    hard = losses_of()
    # L(alpha, gamma) = (1 - alpha) L(0, gamma) + alpha L(1, gamma), of which the second part now has gamma 0
    assert hard["itc"] == pytest.approx(plain["itc"] - 0.6 * (without_either - with_no_soft_part), rel=1e-5)
    assert hard["itc"] != pytest.approx(focal["itc"], rel=1e-3)
    assert {k: v for k, v in hard.items() if k != "itc"} == {k: v for k, v in focal.items() if k != "itc"}
