import torch


def retrieval_metrics(sim_i2t, sim_t2i, image_of_text):
    """Recall at 1, 5 and 10 in both directions, in percent, under ALBEF's names. [ALBEF] Retrieval.py itm_eval

    sim_i2t (I, T), sim_t2i (T, I): scores, higher is better; image_of_text (T,) int64.
    txt_r*: images whose best-ranked own text is among the first k; img_r*: texts whose image is.
    A tie counts against us: a constant score ranks last, not first. [ours]
    """
    own = image_of_text[None] == torch.arange(len(sim_i2t), device=image_of_text.device)[:, None]  # (I, T)
    best_own = sim_i2t.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    txt_rank = ((sim_i2t >= best_own) & ~own).sum(1)
    img_rank = ((sim_t2i >= sim_t2i.gather(1, image_of_text[:, None])) & ~own.T).sum(1)
    metrics = {f"txt_r{k}": 100 * (txt_rank < k).double().mean().item() for k in (1, 5, 10)}
    metrics["txt_r_mean"] = sum(metrics.values()) / 3
    img = {f"img_r{k}": 100 * (img_rank < k).double().mean().item() for k in (1, 5, 10)}
    metrics |= img | {"img_r_mean": sum(img.values()) / 3}
    return metrics | {"r_mean": (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2}
