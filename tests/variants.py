"""Pre-training with one part of the method replaced: the choices marked [ours] that have no setting of their own.

    python tests/variants.py hard_mask pretrain --out out/hard_mask pretrain.epochs=1

The first word names the variant, all others are train.py's; metrics.json has it as the setting `variant`, so that
`python eval.py table` tells the runs apart. Each variant is a few lines on top of softmask.py, which has none of them:
  hard_mask      patches with m above 0.5 are zero, all others kept whole; softmask.py: scaled by 1 - m
  no_mask        nothing is hidden, so that the soft-masked ITM repeats the plain one: is it the mask, or ITM counted twice?
  top_word       the word whose attention has the largest sum over the image; softmask.py: one drawn at random
  focal_one_hot  the focal factor on the one-hot part of the target alone; softmask.py: on every term
"""

import json
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
import eval as evaluation
import softmask
import train


def hard_mask():
    soft_mask = softmask.soft_mask
    softmask.soft_mask = lambda cam, picked: (soft_mask(cam, picked) > 0.5).float()


def no_mask():
    softmask.soft_mask = lambda cam, picked: torch.zeros_like(cam[:, 0])


def top_word():
    word_attention, seen = softmask.word_attention, {}

    def remember(attention, match_logit):
        seen["cam"] = word_attention(attention, match_logit)
        return seen["cam"]

    def pick_word(word_ids, excluded, generator=None):
        same_word = (word_ids[:, :, None] == word_ids[:, None, :]) & (word_ids >= 0)[:, :, None]  # (B, L, L)
        free = (word_ids >= 0) & ~(same_word & excluded[:, None, :]).any(2)
        mass = (same_word * seen["cam"].sum(2)[:, None, :]).sum(2) / same_word.sum(2).clamp_min(1)  # pieces averaged
        picked = torch.where(free, mass, -1.0).argmax(1, keepdim=True)
        return (word_ids == word_ids.gather(1, picked)) & free.any(1, keepdim=True)

    softmask.word_attention, softmask.pick_word = remember, pick_word


def focal_one_hot():
    focal_itc_loss = softmask.focal_itc_loss

    def split(*features_and_temp, alpha, gamma, positives=None):  # the loss is linear in the target
        soft, *_ = focal_itc_loss(*features_and_temp, 1.0, 0.0, positives)
        one_hot, *sims = focal_itc_loss(*features_and_temp, 0.0, gamma, positives)
        return alpha * soft + (1 - alpha) * one_hot, *sims

    softmask.focal_itc_loss = lambda *arguments: split(
        *arguments[:7], alpha=arguments[7], gamma=arguments[8], positives=arguments[9]
    )


VARIANTS = {f.__name__: f for f in (hard_mask, no_mask, top_word, focal_one_hot)}


def main(arguments):
    variant, *arguments = arguments or [""]
    if variant not in VARIANTS:
        raise data.InputError(f"variant {variant!r}: wanted one of {', '.join(VARIANTS)}, and then arguments of train.py")
    options, training_set = train.parse(arguments), data.training_set
    if options.check or options.task != "pretrain":
        raise data.InputError(f"{variant}: a variant of pretrain alone")
    VARIANTS[variant]()

    def marked(config, task):  # so that neither a variant goes on with a run of train.py nor that with a variant
        dataset = training_set(config, task)
        dataset.records.digest += variant
        return dataset

    data.training_set = marked
    status = train.main(arguments)
    if evaluation.rank() == 0:
        path = os.path.join(options.out, "metrics.json")
        result = data.read_json(path)
        result["settings"]["variant"] = variant
        data.write_atomically(path, json.dumps(result, indent=1).encode())
    return status


if __name__ == "__main__":
    with evaluation.one_line_errors(), train.signals:
        sys.exit(main(sys.argv[1:]))
