"""SoftMask++: multi-modal representation learning with text-driven soft masks, in one flat module.

Paper: Jaeyoo Park and Bohyung Han, CVPR 2023, pp. 2798-2807, https://arxiv.org/abs/2304.00719
Base:  ALBEF, Li et al., NeurIPS 2021, https://arxiv.org/abs/2107.07651, https://github.com/salesforce/ALBEF

Every formula and number carries the mark of its source:
  [paper]  said in the abstract or the caption of Fig. 2 of the SoftMask++ paper
  [ALBEF]  ALBEF's published code or paper, the stated base of the method
  [ours]   our choice, where those are silent, or where we leave ALBEF's way (which the mark then names)

Symbols
  B pairs in a batch     L text tokens       N image patches (an image is 1 + N tokens: [CLS] first)
  D width of a state     H attention heads   P width of the contrastive space   K entries of a queue
  R rows of a fusion pass (a row is one text with one image)   I images   V vocabulary   S side of an image, pixels
  image_embeds, text_embeds   token states (B, 1 + N, D), (B, L, D)        cam, G   Grad-CAM, of word_attention
  image_feat, text_feat       projected, L2-normalised [CLS] states (B, P); _m: of the momentum twin, the teacher
  sim_i2t, sim_t2i            similarities over temperature                word_ids (B, L)   a token's word, -1: none
Polarity: an attention mask is 1 (True) where a token may be attended; a soft mask is 1 where a patch is most
relevant, and so is hidden most; ITM label 1 is a match. "Copy with": what else of this file goes along; tasks need all.

Index
  Attention, Mlp                    building blocks
  VisionTransformer                 image encoder                     [ALBEF] models/vit.py
  TextEncoder, FusionEncoder        the two halves of BERT            [ALBEF] models/xbert.py
  MlmHead, AnswerDecoder            masked words; answers of VQA      [ALBEF] xbert.py BertForMaskedLM, BertLMHeadModel
  Encoders                          everything that has a twin        [ALBEF]; [paper] Fig. 2: image and text encoder
  write_queue, TaskModel            queues, momentum distillation     [ALBEF] models/model_pretrain.py
  focal_itc_loss                    focal loss for ITC                [paper] abstract
  hard_negatives, itm_loss          image-text matching               [ALBEF] models/model_pretrain.py
  mlm_loss                          masked words, distilled           [ALBEF] models/xbert.py
  words_loss                        for a ViT that starts fresh       [ours]
  word_attention                    word-conditional attention        [paper] abstract, Fig. 2
  pick_word, soft_mask              the text-driven soft mask         [paper] Section 4.1, by the caption of Fig. 2
  PretrainModel                     these in the order of Fig. 2      [paper] Fig. 2
                                    also for retrieval and grounding  [ALBEF] models/model_retrieval.py
  ClassifierModel                   SNLI-VE, NLVR2                    [ALBEF] models/model_ve.py, model_nlvr.py
  TextAssignmentModel               pre-training for NLVR2            [ALBEF] models/model_pretrain_nlvr.py
  VqaModel                          question answering                [ALBEF] models/model_vqa.py
  mask_text, distort_images         multi-modal augmentation          [paper] abstract, Fig. 2
  augment_image                     crop and RandAugment              [ALBEF] dataset/__init__.py, randaugment.py
  clean_caption, tokenize           text                              [ALBEF] dataset/utils.py, tokenization_bert.py
  rename_albef, export_albef        from and to ALBEF's names         [ALBEF] models/*.py
  load_deit, load_bert, load_start  what training starts from         [ALBEF] model_pretrain.py, Pretrain.py, VQA.py
  from_pretrained                   a trained model on your own image and sentence
"""

import contextlib
import copy
import functools
import math
import os
import re
import unicodedata

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from PIL import ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

# Building blocks
class Linear(nn.Linear):
    """nn.Linear; a large product on a CPU is made as a 1 x 1 convolution: oneDNN's, sooner than MKL's on AMD. [ours]"""

    least_rows = 1024 if torch.backends.mkl.is_available() else math.inf  # not measured elsewhere: ARM, a Mac

    @staticmethod
    def product(x, weight, bias=None):
        rows = x.shape[:-1].numel()
        if rows < Linear.least_rows or min(weight.shape) < 512 or x.device.type != "cpu" or x.dtype != torch.float32:
            return F.linear(x, weight, bias)
        pixels = x.reshape(1, rows, 1, -1).movedim(-1, 1)  # (..., D) -> (1, D, rows, 1), channels last
        return F.conv2d(pixels, weight[:, :, None, None], bias).movedim(1, -1).reshape(*x.shape[:-1], -1)

    def forward(self, x):
        return self.product(x, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head attention [ALBEF]; keys, values projected once an image, for many texts [ours]. Copy with: Linear."""

    def __init__(self, dim: int, num_heads: int, context_dim: int | None = None, dropout: float = 0.0):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not divisible by num_heads {num_heads}")
        self.num_heads, self.dropout = num_heads, dropout
        self.query, self.key = Linear(dim, dim), Linear(context_dim or dim, dim)
        self.value, self.out = Linear(context_dim or dim, dim), Linear(dim, dim)

    def split_heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, L, D) -> (B, H, L, D / H)

    def project(self, x, *layers):
        """What each of layers makes of x (B, L, D): (B, H, L, D / H) each; under autocast hooks are skipped. [ours]"""
        if not torch.is_autocast_enabled(x.device.type) or any(type(layer) is not Linear for layer in layers):
            return [self.split_heads(layer(x)) for layer in layers]
        # autocast copies weights: side by side they are one product, a third of the launches a GPU waits for
        weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
        return [self.split_heads(part) for part in F.linear(x, weight, bias).chunk(len(layers), -1)]

    def keys_values(self, context):
        """Keys and values, each (B, H, M, D / H), of context (B, M, context_dim)."""
        return self.project(context, self.key, self.value)

    def scale_keys_values(self, keys, values, scale):
        """Keys and values of scale * context, scale (B, M): 1 - m; no new projection: W(sx) + b = s(Wx) + b. [ours]"""
        scale = scale[:, None, :, None].to(keys.dtype)  # (B, M) -> (B, 1, M, 1)
        biases = (self.split_heads(layer.bias[None, None]).to(keys.dtype) for layer in (self.key, self.value))
        return [torch.lerp(bias, part, scale) for bias, part in zip(biases, (keys, values))]  # b + s(part - b)

    def forward(self, x, keys=None, values=None, mask=None, return_probs: bool = False):
        """Attend from x (B, L, D) to itself, or to given keys and values.

        mask: bool, broadcastable to (B, H, L, M), True where a key may be attended.
        Returns output (B, L, D) and, if return_probs, probabilities (B, H, L, M) before dropout, float32, with a graph.
        """
        if keys is None:
            keys, values, query = self.project(x, self.key, self.value, self.query)
        else:
            query = self.split_heads(self.query(x))
        dropout = self.dropout if self.training else 0.0
        if return_probs or dropout and x.device.type == "cpu":  # where SDPA with dropout is slower than this
            with torch.autocast(x.device.type, enabled=False):  # 8 bits of bf16 are too coarse for Grad-CAM
                scores = (query.float() / math.sqrt(query.shape[-1])) @ keys.float().transpose(-2, -1)
                probs = (scores if mask is None else scores.masked_fill(~mask, -1e38)).softmax(-1)  # -inf can give NaN
                context = (F.dropout(probs, dropout) @ values.float()).to(values.dtype)
        else:
            context = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, dropout_p=dropout)
        return self.out(context.transpose(1, 2).flatten(2)), probs if return_probs else None


class GeluLinear(torch.autograd.Function):
    """Linear of F.gelu(x) that keeps x alone; GELU's output is made again in backward. [ours] Copy with: Linear."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return Linear.product(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, weight_grad = grad.flatten(0, -2), None  # (..., D) -> (tokens, D)
        if ctx.needs_input_grad[1]:  # first: then GELU's output, large, is gone
            weight_grad = rows.T @ F.gelu(x).flatten(0, -2).to(grad.dtype)
        return torch.ops.aten.gelu_backward(grad @ weight.to(grad.dtype), x), weight_grad, rows.sum(0)


class Mlp(nn.Module):
    """Linear, GELU (erf), linear. [ALBEF] A plain fc2's hooks are skipped. Copy with: Linear, GeluLinear."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1, self.fc2 = Linear(dim, hidden_dim), Linear(hidden_dim, dim)

    def forward(self, x):
        if type(self.fc2) is not Linear:  # an adapter, a quantised layer
            return self.fc2(F.gelu(self.fc1(x)))
        return GeluLinear.apply(self.fc1(x), self.fc2.weight, self.fc2.bias)


# Image encoder
class VisionBlock(nn.Module):
    """Pre-norm transformer layer. [ALBEF] Copy with: Linear, Attention, GeluLinear, Mlp."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, num_heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, 4 * dim)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))[0]
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT: image (B, 3, S, S), normalised, to token states (B, 1 + N, D), [CLS] first, patches row by row. [ALBEF]

    Copy with: Linear, Attention, GeluLinear, Mlp, VisionBlock, sincos_pos_embed, init_weights.
    """

    def __init__(self, image_size: int, patch_size: int, width: int, num_layers: int, num_heads: int):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not divisible by patch_size {patch_size}")
        self.patch_size, self.grid = patch_size, image_size // patch_size  # grid: patches a side
        self.patch_embed = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, width))
        self.blocks = nn.Sequential(*(VisionBlock(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(functools.partial(init_weights, std=width**-0.5))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.pos_embed.data[:, 1:] = sincos_pos_embed(self.grid, width)

    def forward(self, image):
        side = self.grid * self.patch_size
        if image.shape[1:] != (3, side, side):
            raise ValueError(f"image has shape {tuple(image.shape)}, the model takes (B, 3, {side}, {side})")
        patches = self.patch_embed(image).flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, N, D)
        x = torch.cat([self.cls_token.expand(len(image), -1, -1), patches], dim=1) + self.pos_embed
        return self.norm(self.blocks(x))


def sincos_pos_embed(grid: int, width: int):
    """Position embedding of a fresh ViT, (grid * grid, width): sines and cosines of row and column. [ours]

    Wavelengths: four grids to four patches. ALBEF's faint noise drowned in the patch embedding: positions came late.
    """
    frequency = torch.linspace(math.log(math.pi / 2), math.log(math.pi * grid / 2), max(width // 4, 1)).exp() / grid
    angle = torch.arange(grid)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # (grid, D / 2)
    both = torch.cat([axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)], dim=2).flatten(0, 1)
    return F.pad(both, (0, width))[:, :width]  # widths not divisible by 4 end in zeros


def resize_pos_embed(pos_embed, grid: int):
    """Position embedding (1, 1 + n * n, D) resized to (1, 1 + grid * grid, D), bicubically; [CLS] unchanged. [ALBEF]"""
    old = math.isqrt(pos_embed.shape[1] - 1) if pos_embed.ndim == 3 else 0
    if not old or old * old != pos_embed.shape[1] - 1:
        raise ValueError(f"pos_embed of shape {tuple(pos_embed.shape)} is not [CLS] and a square grid")
    if old == grid:
        return pos_embed
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    patches = patches.unflatten(1, (old, old)).permute(0, 3, 1, 2)  # (1, n * n, D) -> (1, D, n, n)
    patches = F.interpolate(patches.float(), size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, patches.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)


def init_weights(module, std: float):
    """Fresh weights from N(0, std), biases 0. [ALBEF]: 0.02; text_init_std, ViT's width^-0.5, convolutions: [ours]"""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
        nn.init.trunc_normal_(module.weight, std=std)
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module.bias is not None:
        nn.init.zeros_(module.bias)


def text_init_std(width: int) -> float:
    """Deviation of fresh text layers: BERT's 0.02 at width 768 [ALBEF], with the inverse root of the width [ours]."""
    return 0.02 * math.sqrt(768 / width)


# Text encoder, fusion encoder
class TextLayer(nn.Module):
    """Post-norm BERT layer, image_dim: cross-attention too. [ALBEF] Copy with: Linear, Attention, GeluLinear, Mlp."""

    def __init__(self, dim: int, num_heads: int, dropout: float, image_dim: int | None = None):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.self_attention = Attention(dim, num_heads, dropout=dropout)
        self.self_norm = nn.LayerNorm(dim, eps=1e-12)
        if image_dim is not None:
            self.cross_attention = Attention(dim, num_heads, image_dim, dropout)
            self.cross_norm = nn.LayerNorm(dim, eps=1e-12)
        self.mlp, self.mlp_norm = Mlp(dim, 4 * dim), nn.LayerNorm(dim, eps=1e-12)

    def attend(self, x, keys_values, image_index, keys_mask, return_probs):
        """Cross-attention of x (R, L, D); the others: see FusionEncoder.forward. Returns output (R, L, D), probs."""
        keys, values, *soft_scale = keys_values  # soft_scale: 1 - m, where soft_mask_keys_values has put it
        if soft_scale:
            keys, values = self.cross_attention.scale_keys_values(keys, values, *soft_scale)
        ordered, attended = len(x) - len(image_index), []  # ordered: how many rows, the first, are grouped by image
        if ordered:  # an image's rows are one long query, since cross-attention treats queries apart; no copies
            query = x[:ordered].reshape(len(keys), -1, x.shape[-1])  # (I, rows * L, D)
            states, probs = self.cross_attention(query, keys, values, keys_mask, return_probs)
            attended.append(states.reshape(ordered, -1, x.shape[-1]))
        if len(image_index):
            keys, values = (part.index_select(0, image_index) for part in (keys, values))  # (rows, H, 1 + N, D / H)
            keys_mask = None if keys_mask is None else keys_mask[image_index]
            states, probs = self.cross_attention(x[ordered:], keys, values, keys_mask, return_probs)
            attended.append(states)
        return torch.cat(attended), probs

    def forward(self, x, mask, keys_values=None, image_index=None, keys_mask=None, return_probs=False, cls_only=False):
        """x (R, L, D), mask (R, 1, L or 1, L) bool; the others: see FusionEncoder.forward. Returns x, probs."""
        probs, own = None, ()  # own: keys and values of all tokens, where x does not stay all tokens
        if cls_only:
            own, x, mask = self.self_attention.keys_values(x), x[:, :1], mask[:, :, :1]  # (R, L, D) -> (R, 1, D)
        x = self.self_norm(x + self.dropout(self.self_attention(x, *own, mask=mask)[0]))
        if keys_values is not None:
            # On a CPU done again in backward: 1 % of a step for a sixth of its memory; on a GPU it cost a sixth of one
            again = x.device.type == "cpu" and torch.is_grad_enabled() and not return_probs
            attend = functools.partial(torch.utils.checkpoint.checkpoint, self.attend, use_reentrant=False)
            states, probs = (attend if again else self.attend)(x, keys_values, image_index, keys_mask, return_probs)
            x = self.cross_norm(x + self.dropout(states))
        return self.mlp_norm(x + self.dropout(self.mlp(x))), probs


class TextEncoder(nn.Module):
    """Embeddings and lower layers of BERT: input_ids (B, L) to token states (B, L, D). [ALBEF]

    Copy with: Linear, Attention, GeluLinear, Mlp, TextLayer, init_weights, text_init_std.
    """

    def __init__(self, vocab_size: int, positions: int, width: int, num_layers: int, num_heads: int, dropout: float):
        super().__init__()
        sizes = {"word": vocab_size, "position": positions, "token_type": 2}
        self.embeddings = nn.ModuleDict({name: nn.Embedding(size, width) for name, size in sizes.items()})
        self.embeddings["norm"] = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(TextLayer(width, num_heads, dropout) for _ in range(num_layers))
        self.apply(functools.partial(init_weights, std=text_init_std(width)))

    def forward(self, input_ids, attention_mask):
        positions = self.embeddings["position"].weight[: input_ids.shape[1]]
        if len(positions) < input_ids.shape[1]:
            raise ValueError(f"input_ids of shape {tuple(input_ids.shape)} is longer than {len(positions)} positions")
        x = self.embeddings["word"](input_ids) + positions + self.embeddings["token_type"].weight[0]
        x = self.dropout(self.embeddings["norm"](x))
        mask = attention_mask[:, None, None, :].bool()
        for layer in self.layers:
            x, _ = layer(x, mask)
        return x


class FusionEncoder(nn.Module):
    """Fusion encoder. [ALBEF] Copy with: Linear, Attention, GeluLinear, Mlp, TextLayer, init_weights, text_init_std."""

    def __init__(self, width: int, image_dim: int, num_layers: int, num_heads: int, dropout: float, images_per_text=1):
        """images_per_text: with 2 (NLVR2) each layer is a pair that shares its key and value projections. [ALBEF]"""
        super().__init__()
        self.images_per_text = images_per_text
        count = num_layers * images_per_text
        self.layers = nn.ModuleList(TextLayer(width, num_heads, dropout, image_dim) for _ in range(count))
        self.apply(functools.partial(init_weights, std=text_init_std(width)))
        for i, layer in enumerate(self.layers):
            first = self.layers[i - i % images_per_text].cross_attention
            layer.cross_attention.key, layer.cross_attention.value = first.key, first.value

    def keys_values(self, *image_embeds):
        """Keys, values (I, H, 1 + N, D / H) per layer i, of image_embeds[i % images_per_text] (I, 1 + N, D). [ALBEF]"""
        if len(image_embeds) != self.images_per_text:
            raise ValueError(f"{len(image_embeds)} images a text, the model takes {self.images_per_text}")
        pairs = (layer.cross_attention.keys_values(x) for layer, x in zip(self.layers, image_embeds * len(self.layers)))
        return [(keys.contiguous(), values.contiguous()) for keys, values in pairs]  # once, not in each product

    def soft_mask_keys_values(self, keys_values, mask):
        """Those of soft-masked images [paper], v~ = (1 - m) v per patch, [CLS] as it is [ours]: with 1 - m beside them.

        mask m (I, N) in [0, 1], 1 = most relevant = hidden most. TextLayer.attend scales by 1 - m (I, 1 + N).
        """
        scale = 1 - F.pad(mask, (1, 0))  # (I, N) -> (I, 1 + N); the image's [CLS] has m = 0
        return [(keys, values, scale) for keys, values in keys_values]

    def forward(self, text_embeds, mask, keys_values, image_index=None, attention_layer=None, cls_only=False,
                keys_mask=None):
        """Fuse R texts text_embeds (R, L, D) with the images they read.

        mask (R, L), or (R, L, L), a row for each query; keys_mask (I, 1 + N), of keys_values: what may be attended.
        image_index (n,) int64: images of the last n rows; those before (None: all): image by image, as many for each.
        cls_only: the last layer makes the state of [CLS] alone, all that a match score reads; the same number, sooner.
        Returns states (R, L, D) or (R, 1, D), and attention_layer's probabilities (R, H, L, 1 + N), float32, or None.
        """
        image_index = mask.new_empty(0, dtype=torch.int64) if image_index is None else image_index
        images, ordered = len(keys_values[0][0]), len(text_embeds) - len(image_index)
        if ordered % images:
            raise ValueError(f"{ordered} rows cannot be shared out evenly to {images} images")
        if attention_layer is not None and len(text_embeds) != images:  # probabilities come row by row
            first = torch.arange(images, device=mask.device).repeat_interleave(ordered // images)
            image_index = torch.cat([first, image_index])
        mask = (mask if mask.ndim == 3 else mask[:, None])[:, None].bool()
        keys_mask = None if keys_mask is None else keys_mask[:, None, None, :].bool()
        x, attention = text_embeds, None
        for i, layer in enumerate(self.layers):
            short = cls_only and i == len(self.layers) - 1
            x, probs = layer(x, mask, keys_values[i], image_index, keys_mask, i == attention_layer, short)
            attention = probs if i == attention_layer else attention
        return x, attention


class MlmHead(nn.Module):
    """Vocabulary logits, tied to the word embeddings. [ALBEF] Copy with: init_weights, text_init_std."""

    def __init__(self, width: int, vocab_size: int):
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.apply(functools.partial(init_weights, std=text_init_std(width)))

    def forward(self, states, word_embeddings):
        """states (..., D), word_embeddings (V, D) -> logits (..., V)."""
        return F.linear(self.norm(F.gelu(self.dense(states))), word_embeddings, self.bias)


class AnswerDecoder(nn.Module):
    """Answers, token by token, from the fused states of a question: causal, reading them by cross-attention. [ALBEF]

    Copy with: Linear, Attention, GeluLinear, Mlp, TextLayer, TextEncoder, FusionEncoder, MlmHead, init_weights,
    text_init_std.
    """

    def __init__(self, vocab_size: int, positions: int, width: int, num_layers: int, num_heads: int, dropout: float):
        super().__init__()
        self.text = TextEncoder(vocab_size, positions, width, 0, num_heads, dropout)  # the embeddings alone
        self.fusion = FusionEncoder(width, width, num_layers, num_heads, dropout)
        self.mlm_head = MlmHead(width, vocab_size)

    def forward(self, answer_ids, answer_mask, keys_values, question_mask, question_index=None):
        """answer_ids, answer_mask (A, L) -> states (A, L, D), of which logits makes those of the next token.

        keys_values: fusion.keys_values of I questions; question_mask (I, M); question_index (A,): image_index of fuse.
        """
        mask = answer_mask[:, None, :].bool().expand(-1, answer_ids.shape[1], -1).tril()  # (A, L, L), causal
        embeds = self.text(answer_ids, answer_mask)
        return self.fusion(embeds, mask, keys_values, question_index, keys_mask=question_mask)[0]

    def logits(self, states):
        """States (..., D) -> vocabulary logits (..., V) of the next token."""
        return self.mlm_head(states, self.text.embeddings["word"].weight)


class Encoders(nn.Module):
    """What has a momentum twin: image and text encoder [paper], the rest [ALBEF]; a task adds cls_head or decoder."""

    def __init__(self, vocab_size: int, image_size: int, patch_size: int, vision_width: int, vision_layers: int,
                 vision_heads: int, text_width: int, text_layers: int, fusion_layers: int, text_heads: int,
                 max_positions: int, embed_dim: int, dropout: float, images_per_text: int = 1):
        super().__init__()
        self.vision = VisionTransformer(image_size, patch_size, vision_width, vision_layers, vision_heads)
        self.text = TextEncoder(vocab_size, max_positions, text_width, text_layers, text_heads, dropout)
        self.fusion = FusionEncoder(text_width, vision_width, fusion_layers, text_heads, dropout, images_per_text)
        self.image_proj, self.text_proj = nn.Linear(vision_width, embed_dim), nn.Linear(text_width, embed_dim)
        self.mlm_head = MlmHead(text_width, vocab_size)

    def encode_image(self, image):
        """image (B, 3, S, S), normalised -> image_embeds (B, 1 + N, D): [CLS], then the patches row by row."""
        return self.vision(image)

    def encode_text(self, input_ids, attention_mask):
        """input_ids (B, L) int64, attention_mask (B, L) -> text_embeds (B, L, D)."""
        return self.text(input_ids, attention_mask)

    def image_feat(self, image_embeds):
        """image_embeds (B, 1 + N, D) -> image_feat (B, P), float32, of length 1."""
        return F.normalize(self.image_proj(image_embeds[:, 0]).float(), dim=-1)

    def text_feat(self, text_embeds):
        """text_embeds (B, L, D) -> text_feat (B, P), float32, of length 1."""
        return F.normalize(self.text_proj(text_embeds[:, 0]).float(), dim=-1)

    def image_keys_values(self, *image_embeds):
        """What the fusion layers read of each image, projected once: see FusionEncoder.keys_values."""
        return self.fusion.keys_values(*image_embeds)

    def fuse(self, text_embeds, attention_mask, keys_values, image_index=None, attention_layer=None, cls_only=False):
        """Fused states (R, L, D) and the cross-attention of attention_layer: see FusionEncoder.forward."""
        return self.fusion(text_embeds, attention_mask, keys_values, image_index, attention_layer, cls_only)

    def mlm_logits(self, states):
        """Fused states (..., D) -> vocabulary logits (..., V)."""
        return self.mlm_head(states, self.text.embeddings["word"].weight)


# Queue
@torch.no_grad()
def write_queue(queue, written, entries):
    """Write entries (n, ...) over the oldest of queue (K, ...), after `written` others [ALBEF], for any n [ours]."""
    if size := len(queue):
        index = (written + torch.arange(len(entries), device=queue.device)) % size
        queue[index[-size:]] = entries[-size:].to(queue.dtype)  # of more than K entries the last K stay


def gather(tensor):
    """tensor of every process, concatenated along the first axis in order of rank; itself without a process group."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


# Losses: pure functions of tensors
def focal_itc_loss(image_feat, text_feat, image_feat_m, text_feat_m, image_queue, text_queue, temp, alpha, gamma,
                   positives=None):
    """Contrastive loss with momentum distillation and a focal factor. [paper] abstract; [ALBEF] Eq. 6

        L = -sum_j q_j (1 - p_j)^gamma log p_j,  averaged over the batch and the two directions
        p = softmax of the student's feature against the twin's features of batch and queue, over temp
        q = alpha * the twin's softmax + (1 - alpha) * the positives, shared out evenly

    The factor of Lin et al. (arXiv 1708.02002) stands on every term of the soft-target cross-entropy [ours: the paper's
    form is unknown]. gamma 0 is exactly ALBEF's loss. The features (B, P) and queues (K, P), K >= 0, are float32 of
    length 1; temp: scalar > 0, takes a gradient from the student's p alone; alpha in [0, 1]; gamma >= 0.
    positives (B, B + K) bool: which of batch and queue show the same image as pair i; None: pair i alone.
    Returns the loss and the student's similarities over temp within the batch, sim_i2t and sim_t2i (B, B).
    """
    size = len(image_feat)
    if positives is None:
        positives = torch.eye(size, size + len(image_queue), dtype=torch.bool, device=image_feat.device)
    hard_targets = positives / positives.sum(1, keepdim=True)
    def one_direction(feat, feat_m, other_feat_m, other_queue):
        with torch.autocast(feat.device.type, enabled=False):
            sim = torch.cat([feat @ other_feat_m.T, feat @ other_queue.T], dim=1) / temp  # (B, B + K)
            with torch.no_grad():
                sim_m = torch.cat([feat_m @ other_feat_m.T, feat_m @ other_queue.T], dim=1) / temp
                targets = alpha * sim_m.softmax(1) + (1 - alpha) * hard_targets
            log_p = sim.log_softmax(1)
            # 1 - p, clamped: where p rounds to 1, a gamma below 1 would have an infinite slope
            focal = (-torch.expm1(log_p)).clamp_min(1e-12) ** gamma if gamma else 1.0
            return -(targets * focal * log_p).sum(1).mean(), sim[:, :size]
    loss_i2t, sim_i2t = one_direction(image_feat, image_feat_m, text_feat_m, text_queue)
    loss_t2i, sim_t2i = one_direction(text_feat, text_feat_m, image_feat_m, image_queue)
    return (loss_i2t + loss_t2i) / 2, sim_i2t, sim_t2i


@torch.no_grad()
def hard_negatives(sim, allowed, generator=None):
    """For each row of sim (B, B) draw one column with probability softmax(sim) among the allowed (B, B) bool. [ALBEF]

    Returns index (B,) and valid (B,) bool; a row with nothing allowed is not valid, its index is its own number [ours].
    """
    valid = allowed.any(1)
    # NaN would crash multinomial, and shows in the loss; masked before softmax, which may round a kept column to 0
    logits = sim.float().nan_to_num().masked_fill(~allowed, -math.inf)
    probs = torch.where(valid[:, None], logits, 0.0).softmax(1)
    index = torch.multinomial(probs, 1, generator=generator).squeeze(1)
    return torch.where(valid, index, torch.arange(len(sim), device=sim.device)), valid


def itm_loss(logits, labels):
    """Mean cross-entropy of logits (R, C), labels (R,), of ITM 1: match [ALBEF]; -100 left out, 0 if all are [ours]."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum")
    return total / (labels != -100).sum().clamp_min(1)


def distilled_cross_entropy(logits, logits_m, labels, alpha):
    """Cross-entropy with the labels and with the twin's softmax, weighted 1 - alpha and alpha. [ALBEF] Eq. 7

    logits, logits_m (..., V); labels (...) int64, -100 left out (0); alpha in [0, 1]. Returns (...).
    """
    log_p = logits.float().log_softmax(-1)
    soft = -(logits_m.float().softmax(-1) * log_p).sum(-1)
    hard = -log_p.gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    return ((1 - alpha) * hard + alpha * soft) * (labels != -100)


def mlm_loss(logits, logits_m, labels, alpha):
    """Mean where labels are not -100 [ALBEF], 0 without [ours]; logits (..., V). Copy with: distilled_cross_entropy."""
    return distilled_cross_entropy(logits, logits_m, labels, alpha).sum() / (labels != -100).sum().clamp_min(1)


def words_loss(logits, input_ids, word_ids, sharpness: float = 5.0):
    """Bag of words: which of the batch's does the caption have? Binary cross-entropy, sum over words, mean of B. [ours]

    logits (B, N, V): of each patch; a word's is their log-mean-exp, sharpened: nearly the highest, so that nothing is
    gained by spreading it over the background. input_ids, word_ids (B, L): of tokenize. Not the paper's.
    """
    said = torch.zeros_like(logits[:, 0]).scatter_reduce(1, input_ids, (word_ids >= 0).to(logits), "amax")  # (B, V)
    some = said.any(0)  # (V,): the words of no caption are left out: as negatives, so many, they would slow learning
    shown = (sharpness * logits[:, :, some].float()).logsumexp(1) - math.log(logits.shape[1])
    return F.binary_cross_entropy_with_logits(shown / sharpness, said[:, some].float(), reduction="sum") / len(logits)


def itm_accuracy(logits, labels):
    """Balanced accuracy: mean of matches' and non-matches', each in [0, 1], 0.5 for a kind that is absent. [ours]"""
    right = logits.argmax(1) == labels
    rates = [torch.where(kind.any(), (right & kind).sum() / kind.sum(), 0.5) for kind in (labels == 0, labels == 1)]
    return sum(rates) / 2


# Word attention and soft mask
def check_attention_layer(layer: int, fusion_layers: int):
    """ValueError unless it is a fusion layer, from 0, and not the last, where a word's row gets no gradient."""
    if not 0 <= layer < fusion_layers - 1:
        raise ValueError(f"attention_layer {layer} is none of {list(range(fusion_layers - 1))}: all but the last")


def word_attention(attention, match_logit):
    """Grad-CAM: where each token looks in the image for the evidence of a match. [paper] Fig. 2; the formula: [ALBEF]

        G = mean over heads of A * relu(ds/dA), patches only

    attention A (B, H, L, 1 + N), float32, with a graph, not compiled; match_logit s (B,), its pair's "match" logit.
    Returns G (B, L, N) float32, detached [ours], finite where ds/dA overflows (fp16). It fills no .grad, unseen by DDP.
    """
    with torch.autocast(attention.device.type, enabled=False):  # which else takes the gradient in bf16
        (gradient,) = torch.autograd.grad(match_logit.sum(), attention, retain_graph=True)
    return (attention * gradient.float().nan_to_num().clamp(0, 1e30)).mean(1)[:, :, 1:].detach()  # to (B, L, N)


@torch.no_grad()
def pick_word(word_ids, excluded, generator=None):
    """One word of each caption, picked at random [paper, caption of Fig. 2], evenly, whole, with all its pieces [ours].

    word_ids (B, L): see tokenize; excluded (B, L) bool: tokens whose words may not be picked, those chosen for MLM
    [ours]. Returns (B, L) bool: the pieces of the picked word; nothing where no word is left.
    """
    same_word = (word_ids[:, :, None] == word_ids[:, None, :]) & (word_ids >= 0)[:, :, None]  # (B, L, L)
    first_piece = same_word.int().argmax(2) == torch.arange(word_ids.shape[1], device=word_ids.device)
    free = first_piece & (word_ids >= 0) & ~(same_word & excluded[:, None, :]).any(2)
    has_word = free.any(1, keepdim=True)
    picked = torch.multinomial(torch.where(has_word, free.float(), 1.0), 1, generator=generator)
    return (word_ids == word_ids.gather(1, picked)) & has_word


@torch.no_grad()
def soft_mask(cam, picked):
    """The text-driven soft mask: one word's Grad-CAM, normalised [paper, caption of Fig. 2], by min and max [ours].

    cam G (B, L, N); picked (B, L) bool: the word's pieces, averaged [ours].
    Returns m (B, N) float32 in [0, 1], 1 = most relevant; 0 throughout where G is constant or no word is picked.
    """
    weight = picked.float() / picked.sum(1, keepdim=True).clamp_min(1)
    cam = (cam.float() * weight[:, :, None]).sum(1)
    low, high = cam.amin(1, keepdim=True), cam.amax(1, keepdim=True)
    return torch.where(high > low, (cam - low) / torch.where(high > low, high - low, 1.0), 0.0)


# Pre-training
class TaskModel(nn.Module):
    """What all tasks share: encoders, unused parts of them frozen [ours], and a twin if momentum is given. [ALBEF]"""

    def __init__(self, encoders: Encoders, momentum: float | None, unused=("image_proj", "text_proj", "mlm_head")):
        super().__init__()
        for name in unused:  # DistributedDataParallel would wait for their gradients
            getattr(encoders, name).requires_grad_(False)
        self.encoders, self.momentum, self.unused = encoders, momentum, unused
        if momentum is not None:
            self.encoders_m = copy.deepcopy(encoders).requires_grad_(False).eval()

    def train(self, mode: bool = True):
        super().train(mode)
        if self.momentum is not None:
            self.encoders_m.eval()  # the teacher has no dropout [ours; ALBEF's has]
        return self

    @torch.no_grad()
    def update_twin(self):
        """twin = momentum * twin + (1 - momentum) * student, in float32 weights: before each optimizer step. [ALBEF]"""
        if self.momentum is not None:
            torch._foreach_lerp_([*self.encoders_m.parameters()], [*self.encoders.parameters()], 1 - self.momentum)


class PretrainModel(TaskModel):
    """SoftMask++ pre-training: focal ITC, ITM, soft-masked ITM and MLM on one batch of pairs. [paper] Fig. 2

    With soft_mask False, focal_gamma 0, mask_text_for "mlm", no image_ids: ALBEF, but for queues, twin's dropout.
    soft_mask_negatives: no-match pairs with soft-masked images join the soft-masked ITM [ours]; without them it learns
    that a masked image is a match, and no more (RESULTS.md, The choices marked [ours]).
    attention_layer: of the word attention, from 0; None: (fusion_layers - 1) // 2 [ours], ALBEF's third of six.
    mask_text_for: "all": masked text enters ITC, ITM and MLM [paper]; "mlm": MLM alone [ALBEF]; None: there is no MLM,
    and ITC and ITM fine-tune for retrieval and grounding [ALBEF].
    The queues start empty, and what was never written is no negative [ours; ALBEF's start as random vectors].
    """

    def __init__(self, encoders: Encoders, queue_size: int, momentum: float, temp: float, soft_mask: bool,
                 soft_mask_negatives: bool, attention_layer: int | None, focal_gamma: float, mask_text_for: str | None):
        super().__init__(encoders, momentum, () if mask_text_for else ("mlm_head",))
        fusion_layers = len(encoders.fusion.layers)
        self.attention_layer = (fusion_layers - 1) // 2 if attention_layer is None else attention_layer
        if soft_mask:
            check_attention_layer(self.attention_layer, fusion_layers)
        if mask_text_for not in ("all", "mlm", None):
            raise ValueError(f'mask_text_for is {mask_text_for!r}, must be "all", "mlm" or None')
        self.soft_mask, self.soft_mask_negatives = soft_mask, soft_mask_negatives
        self.focal_gamma, self.mask_text_for = focal_gamma, mask_text_for
        self.itm_head = nn.Linear(encoders.text_proj.in_features, 2)
        self.temp = nn.Parameter(torch.tensor(temp))
        for name in ("image_queue", "text_queue"):
            self.register_buffer(name, torch.zeros(queue_size, encoders.image_proj.out_features))
        self.register_buffer("queue_ids", torch.full((queue_size,), -100))
        self.register_buffer("queue_written", torch.tensor(0))  # number of features ever written

    @torch.no_grad()
    def enqueue(self, image_feat_m, text_feat_m, image_ids):
        """Queue the twin's features (n, P) of all processes, image_ids (n,) or None. [ALBEF; after the step: ours]"""
        image_ids = image_feat_m.new_full(image_feat_m.shape[:1], -100).long() if image_ids is None else image_ids
        for name, entries in (("image_queue", image_feat_m), ("text_queue", text_feat_m), ("queue_ids", image_ids)):
            write_queue(self.get_buffer(name), self.queue_written, entries := gather(entries))
        self.queue_written += len(entries)

    @torch.no_grad()
    def clamp_temp(self):
        """Keep the temperature in [0.001, 0.5]: before each forward pass. [ALBEF] in pre-training, else [ours]"""
        self.temp.clamp_(0.001, 0.5)

    def words_losses(self, image, input_ids, word_ids):
        """{words}, for a fresh ViT [ours]; image (B, 3, S, S), normalised; input_ids, word_ids (B, L): of tokenize."""
        words = self.encoders.text.embeddings["word"].weight, self.encoders.mlm_head.bias  # its head
        return {"words": words_loss(F.linear(self.encoders.encode_image(image)[:, 1:], *words), input_ids, word_ids)}

    def forward(self, image, input_ids, attention_mask, masked_ids, mlm_labels, word_ids, image_ids, alpha,
                generator=None, clean_image=None):
        """Losses {itc, itm, soft_itm, mlm} and statistics of a batch, and the arguments for enqueue, after the step.

        image (B, 3, S, S), normalised, distorted; input_ids, attention_mask, word_ids (B, L): of tokenize; masked_ids,
        mlm_labels (B, L): of mask_text; image_ids (B,), or None: each pair its own; alpha: weight of twin's targets.
        clean_image (B, 3, S, S), normalised, undistorted: the twin reads it and clean text, masked text for MLM alone;
        None: it reads what the student reads [ours: the paper's way is unknown]. Not under no_grad with a soft mask.
        """
        student, twin = self.encoders, self.encoders_m
        own, masked = torch.arange(len(image), device=image.device), mlm_labels != -100
        # A GPU is waited for here, with little to do yet, and nowhere below. filled: queue entries; chosen: of masked
        filled, chosen = min(int(self.queue_written), len(self.queue_ids)), masked.nonzero(as_tuple=True)
        text_ids = masked_ids if self.mask_text_for == "all" else input_ids  # [paper] Fig. 2: the masked text enters
        image_m, text_ids_m = (image, text_ids) if clean_image is None else (clean_image, input_ids)

        # Image encoder and text encoder, and their momentum twins
        image_embeds = student.encode_image(image)  # (B, 1 + N, D)
        text_embeds = student.encode_text(text_ids, attention_mask).requires_grad_()  # so that all may be frozen
        image_feat, text_feat = student.image_feat(image_embeds), student.text_feat(text_embeds)  # (B, P)
        with torch.no_grad():
            image_embeds_m = twin.encode_image(image_m)
            text_embeds_m = twin.encode_text(text_ids_m, attention_mask)
            image_feat_m, text_feat_m = twin.image_feat(image_embeds_m), twin.text_feat(text_embeds_m)

        # Focal ITC, before fusion
        ids = own if image_ids is None else image_ids  # (B,), of images
        different = ids[:, None] != ids[None]  # (B, B)
        queues = self.image_queue[:filled].float(), self.text_queue[:filled].float()
        positives = None if image_ids is None else ids[:, None] == torch.cat([ids, self.queue_ids[:filled]])[None]
        loss_itc, sim_i2t, sim_t2i = focal_itc_loss(image_feat, text_feat, image_feat_m, text_feat_m, *queues,
                                                    self.temp, alpha, self.focal_gamma, positives)

        # Multi-modal encoder on the positive pairs
        keys_values = student.image_keys_values(image_embeds)
        attention_layer = self.attention_layer if self.soft_mask else None
        fused, attention = student.fuse(text_embeds, attention_mask, keys_values, attention_layer=attention_layer)
        match_logits = self.itm_head(fused[:, 0])  # (B, 2)

        # ITM: each image with a hard negative text, then each text with a hard negative image: fuse's order of rows
        negative_image, image_valid = hard_negatives(sim_t2i, different, generator)
        negative_text, text_valid = hard_negatives(sim_i2t, different, generator)
        def match_logits_of(texts, keys_values, image_index=None):
            """Match logits (R, 2) of the texts numbered texts (R,); keys_values, image_index: see fuse."""
            rows, rows_mask = text_embeds.index_select(0, texts), attention_mask[texts]
            return self.itm_head(student.fuse(rows, rows_mask, keys_values, image_index, cls_only=True)[0][:, 0])
        no_match = [torch.where(valid, 0, -100) for valid in (text_valid, image_valid)]
        labels = torch.cat([torch.ones_like(own), *no_match])
        negative_logits = match_logits_of(torch.cat([negative_text, own]), keys_values, negative_image)
        logits = torch.cat([match_logits, negative_logits])
        losses = {"itc": loss_itc, "itm": itm_loss(logits, labels)}
        stats = {"itm_accuracy": itm_accuracy(logits, labels), "temp": self.temp.detach().clone()}

        # Soft-masked ITM, with the same negatives
        if self.soft_mask:
            picked = pick_word(word_ids, masked, generator)
            mask = soft_mask(word_attention(attention, match_logits[:, 1]), picked)  # m (B, N)
            soft_keys_values, has_word = student.fusion.soft_mask_keys_values(keys_values, mask), picked.any(1)
            texts, image_index, labels = own, None, torch.where(has_word, 1, -100)
            if self.soft_mask_negatives:  # an image's own and negative text side by side, then negative images
                texts, image_index = torch.cat([torch.stack([own, negative_text], 1).flatten(), own]), negative_image
                own_and_negative = torch.stack([labels, torch.where(has_word, no_match[0], -100)], 1).flatten()
                labels = torch.cat([own_and_negative, torch.where(has_word[negative_image], no_match[1], -100)])
            logits = match_logits_of(texts, soft_keys_values, image_index)
            losses["soft_itm"] = itm_loss(logits, labels)
            stats |= {"soft_itm_accuracy": itm_accuracy(logits, labels), "mask_mean": mask.mean()}

        # MLM: the same pass, unless the text is masked for it alone
        if self.mask_text_for == "mlm":
            fused, _ = student.fuse(student.encode_text(masked_ids, attention_mask), attention_mask, keys_values)
        if self.mask_text_for is not None:
            with torch.no_grad():
                if text_ids_m is not masked_ids:
                    text_embeds_m = twin.encode_text(masked_ids, attention_mask)
                fused_m, _ = twin.fuse(text_embeds_m, attention_mask, twin.image_keys_values(image_embeds_m))
                mlm_logits_m = twin.mlm_logits(fused_m[chosen])  # (M, V)
            losses["mlm"] = mlm_loss(student.mlm_logits(fused[chosen]), mlm_logits_m, mlm_labels[chosen], alpha)

        return losses, stats, (image_feat_m, text_feat_m, image_ids)


# Downstream models: ALBEF's losses on clean text, no soft mask, no focal factor [ours: the paper's way is unknown]
class ClassifierModel(TaskModel):
    """The class of a text with one image (SNLI-VE) or with two (NLVR2). [ALBEF] model_ve.py, model_nlvr.py"""

    def __init__(self, encoders: Encoders, num_classes: int, momentum: float):
        width = encoders.text_proj.in_features
        encoders.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, num_classes))
        super().__init__(encoders, momentum)

    def logits(self, encoders, image, input_ids, attention_mask):
        """image (B, 3, S, S), or (B, 2, 3, S, S): left, right; returns (B, classes), float32."""
        images = image.unbind(1) if image.ndim == 5 else [image]
        keys_values = encoders.image_keys_values(*map(encoders.encode_image, images))
        text_embeds = encoders.encode_text(input_ids, attention_mask)
        fused, _ = encoders.fuse(text_embeds, attention_mask, keys_values, cls_only=True)
        return encoders.cls_head(fused[:, 0]).float()

    def forward(self, image, input_ids, attention_mask, labels, alpha: float):
        """labels (B,) int64; alpha: weight of the twin's targets. Returns the losses {cls} and statistics."""
        logits = self.logits(self.encoders, image, input_ids, attention_mask)
        with torch.no_grad():
            logits_m = self.logits(self.encoders_m, image, input_ids, attention_mask)
        loss = distilled_cross_entropy(logits, logits_m, labels, alpha).mean()
        return {"cls": loss}, {"accuracy": (logits.argmax(1) == labels).float().mean()}


class TextAssignmentModel(TaskModel):
    """Pre-training for NLVR2: does a text belong to the left image, the right one, or neither? No twin. [ALBEF]"""

    def __init__(self, encoders: Encoders, temp: float):
        super().__init__(encoders, momentum=None)
        self.temp, self.ta_head = temp, nn.Linear(encoders.text_proj.in_features, 3)

    def forward(self, image, input_ids, attention_mask, image_ids, generator=None):
        """The losses {ta} and statistics. Label 0: left, 1: right, 2: neither, each a third of the time.

        image (B, 3, S, S) and texts; beside them similar images of other image_ids (B,) [ours; ALBEF: any, temp 0.07].
        """
        encoders, own = self.encoders, torch.arange(len(image), device=image.device)
        image_embeds = encoders.encode_image(image)
        with torch.no_grad():
            image_feat = encoders.image_feat(image_embeds)
            different = image_ids[:, None] != image_ids[None]
            sim = image_feat @ image_feat.T / self.temp
            first, first_valid = hard_negatives(sim, different, generator)
            second, second_valid = hard_negatives(sim, different & (own[None] != first[:, None]), generator)
            labels = torch.randint(3, (len(image),), generator=generator, device=image.device)
            left = torch.where(labels == 0, own, first)
            right = torch.where(labels == 1, own, torch.where(labels == 0, first, second))
            labels = torch.where(first_valid & (second_valid | (labels < 2)), labels, -100)
        text_embeds = encoders.encode_text(input_ids, attention_mask)
        keys_values = encoders.image_keys_values(image_embeds[left], image_embeds[right])
        fused, _ = encoders.fuse(text_embeds, attention_mask, keys_values, cls_only=True)
        logits = self.ta_head(fused[:, 0])
        correct, kept = logits.argmax(1) == labels, (labels != -100).sum().clamp_min(1)
        return {"ta": itm_loss(logits, labels)}, {"accuracy": correct.sum() / kept}


class VqaModel(TaskModel):
    """Answers to questions about an image, by a decoder that reads the fused question. [ALBEF] model_vqa.py"""

    def __init__(self, encoders: Encoders, decoder_layers: int, momentum: float):
        width, bert = encoders.text_proj.in_features, encoders.fusion.layers[0]
        tables = (encoders.text.embeddings[name].num_embeddings for name in ("word", "position"))
        encoders.decoder = AnswerDecoder(*tables, width, decoder_layers, bert.self_attention.num_heads, bert.dropout.p)
        super().__init__(encoders, momentum)

    def question_keys_values(self, encoders, image, input_ids, attention_mask):
        """What the decoder reads of each question: keys and values of its fused states."""
        keys_values = encoders.image_keys_values(encoders.encode_image(image))
        fused, _ = encoders.fuse(encoders.encode_text(input_ids, attention_mask), attention_mask, keys_values)
        return encoders.decoder.fusion.keys_values(fused)

    def forward(self, image, input_ids, attention_mask, answer_ids, answer_mask, answer_question, weights, alpha):
        """The losses {vqa}, the weighted sum over all A answers to B questions, divided by B; and statistics. [ALBEF]

        answer_ids, answer_mask (A, L); answer_question (A,): the question of each; weights (A,).
        """
        kept = answer_mask[:, 1:].nonzero(as_tuple=True)  # answer and place (M,); a GPU is waited for here alone
        def next_logits(encoders):
            keys_values = self.question_keys_values(encoders, image, input_ids, attention_mask)
            states = encoders.decoder(answer_ids, answer_mask, keys_values, attention_mask, answer_question)
            return encoders.decoder.logits(states[kept])  # (A, L, D) -> (M, V)
        with torch.no_grad():
            logits_m = next_logits(self.encoders_m)
        losses = distilled_cross_entropy(next_logits(self.encoders), logits_m, answer_ids[:, 1:][kept], alpha)
        return {"vqa": (weights[kept[0]] * losses).sum() / len(image)}, {}

    @torch.no_grad()
    def rank_answers(self, image, input_ids, attention_mask, candidate_ids, candidate_mask, k: int):
        """The k best of a fixed list of answers to each question. [ALBEF] rank_answer

        candidate_ids, candidate_mask (C, L): [CLS] answer [SEP]. The k whose first token is likeliest are ranked by the
        likelihood of the whole, in which ALBEF counts that token twice; its figures depend on it. Returns index (B, k)
        of the candidates, best first, and their probabilities among the k.
        """
        decoder, questions = self.encoders.decoder, len(image)
        keys_values = self.question_keys_values(self.encoders, image, input_ids, attention_mask)
        start_ids = candidate_ids[:1, :1].expand(questions, 1)
        start = decoder(start_ids, torch.ones_like(start_ids), keys_values, attention_mask)[:, 0]
        first_log_p = decoder.logits(start).float().log_softmax(1)[:, candidate_ids[:, 1]]  # (B, C)
        first_log_p, index = first_log_p.topk(min(k, len(candidate_ids)), dim=1)
        ids, mask = candidate_ids[index].flatten(0, 1), candidate_mask[index].flatten(0, 1)  # (B * k, L), by question
        kept, nll = mask[:, 2:].nonzero(as_tuple=True), torch.zeros(ids[:, 2:].shape, device=ids.device)
        states = decoder(ids[:, :-1], mask[:, :-1], keys_values, attention_mask)[:, 1:][kept]  # (M, D)
        parts = zip(states.split(4096), ids[:, 2:][kept].split(4096))  # 4,096 x V logits at a time: 0.5 GB
        nll[kept] = torch.cat([F.cross_entropy(decoder.logits(x).float(), y, reduction="none") for x, y in parts])
        log_p = 2 * first_log_p - nll.sum(1).view_as(first_log_p)
        probs, order = log_p.softmax(1).sort(dim=1, descending=True)
        return index.gather(1, order), probs


def build_model(task: str, vocab_size: int, model: dict, method: dict):
    """The model of a task, from config.yaml's sections `model` and `method`, given as plain dicts."""
    sizes = {name: value for name, value in model.items() if not name.endswith("_weights")}
    encoders = Encoders(vocab_size, **sizes, images_per_text=2 if task.startswith("nlvr2") else 1)
    if task in ("retrieval", "grounding"):  # ALBEF's losses, without MLM
        method = method | {"soft_mask": False, "focal_gamma": 0.0, "mask_text_for": None}
    if task in ("pretrain", "retrieval", "grounding"):
        names = "queue_size momentum temp soft_mask soft_mask_negatives attention_layer focal_gamma mask_text_for"
        return PretrainModel(encoders, **{name: method[name] for name in names.split()})
    if task == "vqa":
        return VqaModel(encoders, model["fusion_layers"], method["momentum"])
    if task == "nlvr2_pretrain":
        return TextAssignmentModel(encoders, method["temp"])
    return ClassifierModel(encoders, {"nlvr2": 2, "entailment": 3}[task], method["momentum"])


# Multi-modal augmentation
def mask_text(input_ids, word_ids, mask_id: int, ordinary_ids, probability, random_replacement: bool, generator=None):
    """Mask tokens for MLM: 80 % [MASK], 10 % a random token, 10 % unchanged. [ALBEF], after BERT

    input_ids, word_ids (B, L): see tokenize; each token of a word is masked on its own, with probability in [0, 1].
    ordinary_ids (n,) int64: random ones, all but special tokens [ours; ALBEF: all]; random_replacement False: [MASK] in
    every case. Returns masked_ids (B, L) and mlm_labels (B, L): the id hidden, -100 where nothing is.
    """
    shape, device = input_ids.shape, input_ids.device
    chosen = (torch.rand(shape, generator=generator, device=device) < probability) & (word_ids >= 0)
    kind = torch.rand(shape, generator=generator, device=device) if random_replacement else torch.zeros_like(input_ids)
    drawn = torch.randint(len(ordinary_ids), shape, generator=generator, device=device)
    replacement = torch.where(kind < 0.8, mask_id, torch.where(kind < 0.9, ordinary_ids[drawn], input_ids))
    return torch.where(chosen, replacement, input_ids), torch.where(chosen, input_ids, -100)


def distort_images(images, brightness, contrast, blur, hue, grayscale, generator=None):
    """Render distortions on a batch. [paper] abstract names "rendering distortions on images"; which ones: [ours]

    images (B, 3, S, S), uint8 or float in [0, 1] -> float32 in [0, 1]; each has its own draws. brightness, contrast: a
    factor from [1 - x, 1 + x]; blur: probability of a Gaussian blur, sigma from 0.1 pixels to 1/128 of the side; hue: a
    turn of the colour wheel from [-x, x], x at most 0.5; grayscale: a probability. 0 leaves that distortion out.
    """
    def draw(low, high):
        return low + (high - low) * torch.rand((len(images), 1, 1, 1), generator=generator, device=images.device)
    images = TF.to_dtype(images, scale=True)
    if brightness:
        images = (images * draw(1 - brightness, 1 + brightness)).clamp(0, 1)
    if contrast:
        mean = TF.rgb_to_grayscale(images).mean((1, 2, 3), keepdim=True)
        images = ((images - mean) * draw(1 - contrast, 1 + contrast) + mean).clamp(0, 1)
    if blur:
        limit, radius = images.shape[-1] / 128, max(1, math.ceil(images.shape[-1] / 64))
        sigma = torch.where(draw(0, 1) < blur, draw(0.1, max(limit, 0.1)), 0.01).flatten()  # 0.01: the identity
        offsets = torch.arange(-radius, radius + 1, device=images.device)
        kernel = (-0.5 * (offsets / sigma[:, None]) ** 2).softmax(1)  # (B, k)
        kernel = kernel.repeat_interleave(3, 0)[:, None, None]  # (3B, 1, 1, k)
        flat = F.pad(images, [radius] * 4, mode="reflect").flatten(0, 1)[None]  # (B, 3, S, S) -> (1, 3B, S, S)
        flat = F.conv2d(F.conv2d(flat, kernel, groups=flat.shape[1]), kernel.transpose(2, 3), groups=flat.shape[1])
        images = flat[0].unflatten(0, (-1, 3))
    if hue:
        images = torch.stack([TF.adjust_hue(image, turn.item()) for image, turn in zip(images, draw(-hue, hue))])
    if grayscale:
        images = torch.where(draw(0, 1) < grayscale, TF.rgb_to_grayscale(images, num_output_channels=3), images)
    return images


PHOTOMETRIC_OPS = {
    "identity": nn.Identity(), "autocontrast": TF.autocontrast, "equalize": TF.equalize,
    "brightness": functools.partial(TF.adjust_brightness, brightness_factor=1.36),
    "sharpness": functools.partial(TF.adjust_sharpness, sharpness_factor=1.36),
}
GEOMETRIC_OPS = {  # angle in degrees, shift in pixels, shear as slopes, and the point that stays (None: the centre)
    "shear_x": (0, [0, 0], [0.21, 0], [0, 0]), "shear_y": (0, [0, 0], [0, 0.21], [0, 0]),
    "translate_x": (0, [7, 0], [0, 0], None), "translate_y": (0, [0, 7], [0, 0], None),
    "rotate": (21, [0, 0], [0, 0], None),
}
RANDAUGMENT_OPS = (*PHOTOMETRIC_OPS, *GEOMETRIC_OPS)  # [ALBEF] at level 7 of 10; sharpness clips [ours; ALBEF's wraps]


def randaugment_op(image, name: str, sign: int):
    """Apply one to RGB; sign 1 or -1: direction. [ALBEF] Copy with: PHOTOMETRIC_OPS, GEOMETRIC_OPS, RANDAUGMENT_OPS."""
    if name in PHOTOMETRIC_OPS:
        return PHOTOMETRIC_OPS[name](image)
    if name not in GEOMETRIC_OPS:
        raise ValueError(f"no operation {name!r}; there are {', '.join(RANDAUGMENT_OPS)}")
    (angle, shift, slopes, center), grey = GEOMETRIC_OPS[name], [128] * 3
    if any(shift):  # TF.affine makes the same pixels many times slower
        (x, y), (width, height), edge = shift, image.size, max(shift)
        return TF.crop(TF.pad(image, edge, fill=grey), edge - sign * y, edge - sign * x, height, width)
    shear = [math.degrees(math.atan(sign * slope)) for slope in slopes]
    return TF.affine(image, sign * angle, [0, 0], 1.0, shear, InterpolationMode.BILINEAR, grey, center)


def uniform(low, high, generator):
    """A number drawn evenly between low and high."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def crop_box(width: int, height: int, crop_min_area: float, generator=None):
    """A crop: left, top, width, height; see augment_image. [ALBEF; edges at half the rate: ours] Copy with: uniform."""
    if crop_min_area == 1:
        return 0, 0, width, height
    for _ in range(10):
        area = width * height * uniform(crop_min_area, 1.0, generator)
        ratio = math.exp(uniform(math.log(3 / 4), math.log(4 / 3), generator))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return round(uniform(0, width - w, generator)), round(uniform(0, height - h, generator)), w, h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))  # too elongated for any: its centre
    return (width - w) // 2, (height - h) // 2, w, h


def augment_image(image, size: int, crop_min_area: float, flip: bool, randaugment_ops: int, generator=None, box=None):
    """Random resized crop, flip, and RandAugment: an RGB PIL image to size x size. [ALBEF] dataset/__init__.py

    crop_min_area: least share of the area kept (of long images less), 1: all, at ratios from 3/4 to 4/3; flip: mirror
    it (drawn by the caller, for flip_words too); randaugment_ops: how many are drawn, each applied half the time; box:
    a crop_box, if known. Copy with: uniform, crop_box, PHOTOMETRIC_OPS, GEOMETRIC_OPS, RANDAUGMENT_OPS, randaugment_op.
    """
    left, top, w, h = box or crop_box(*image.size, crop_min_area, generator)
    crop, small = TF.crop(image, top, left, h, w), w * h < 2**23  # which a tensor resizes sooner, to rounding [ours]
    crop = TF.resize(TF.pil_to_tensor(crop) if small else crop, [size, size], InterpolationMode.BICUBIC)
    image = TF.to_pil_image(crop) if small else crop
    image = TF.horizontal_flip(image) if flip else image
    for _ in range(randaugment_ops):
        name = RANDAUGMENT_OPS[int(uniform(0, len(RANDAUGMENT_OPS), generator))]
        apply, sign = uniform(0, 1, generator) < 0.5, 1 if uniform(0, 1, generator) < 0.5 else -1
        image = randaugment_op(image, name, sign) if apply else image
    return image


def flip_words(text: str) -> str:
    """Swap left and right, leftmost and rightmost, as the mirror image needs; also the verb. [ours; ALBEF does not]"""
    swap = {"left": "right", "right": "left", "Left": "Right", "Right": "Left", "LEFT": "RIGHT", "RIGHT": "LEFT"}
    return re.sub(rf"\b({'|'.join(swap)})(?=(most)?\b)", lambda match: swap[match[0]], text)


# Images and text as the model takes them
IMAGE_MEAN, IMAGE_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # [ALBEF]: CLIP's


def normalize(images):
    """images (B, 3, S, S) in [0, 1] -> what encode_image takes. [ALBEF] Copy with: IMAGE_MEAN, IMAGE_STD."""
    return TF.normalize(images, IMAGE_MEAN, IMAGE_STD)


def square(image, size: int):
    """An RGB PIL image resized to size x size, bicubically, whatever its aspect: that of every evaluation. [ALBEF]"""
    return TF.resize(image, [size, size], InterpolationMode.BICUBIC)


def clean_caption(caption: str, max_words: int) -> str:
    """Lower case, less punctuation; -, / to spaces, <person> to person; at most max_words words. [ALBEF] pre_caption"""
    caption = re.sub(r"[,.'!?\"()*#:;~]", "", caption.lower()).replace("-", " ").replace("/", " ")
    caption = re.sub(r"\s{2,}", " ", caption.replace("<person>", "person")).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:max_words])


def clean_question(question: str, max_words: int) -> str:
    """As clean_caption, but spaces within and in front, and <person>, stay. [ALBEF] pre_question"""
    question = re.sub(r"[,.'!?\"()*#:;~]", "", question.lower()).replace("-", " ").replace("/", " ").rstrip(" ")
    return " ".join(question.split(" ")[:max_words])


def load_tokenizer(name):
    """Lower-case BERT tokenizer of a vocab.txt, its folder, entries or hub name; ValueError. Copy with: vocabulary."""
    from transformers import AutoTokenizer, BertTokenizer  # here, so that the rest of this module does without
    if not isinstance(name, (str, os.PathLike)):
        entries, name = sorted(name, key=name.get) if isinstance(name, dict) else list(name), "vocabulary"
    elif os.path.isfile(path := f"{name}/vocab.txt") or os.path.isfile(path := name):
        try:
            with open(path, encoding="utf-8-sig") as file:
                entries = [line.rstrip("\n") for line in file]
        except UnicodeDecodeError:
            raise ValueError(f"{path} is no BERT vocabulary: it is not in UTF-8") from None
    elif str(name).endswith(".txt"):  # no name on the hub, where a look-up may take minutes
        raise ValueError(f"tokenizer {name!r}: no such file")
    else:
        try:
            entries = vocabulary(AutoTokenizer.from_pretrained(name))  # lower-cased below, as from a checkpoint
        except Exception as error:  # the hub's client raises many kinds
            reason = f"no file here, nor loaded from the hub ({type(error).__name__}); name a vocab.txt"
            raise ValueError(f"tokenizer {name!r}: {reason}") from None
    lack = sorted({"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"} - set(entries))
    if lack or len(entries) < 6:
        raise ValueError(f"{name} is no BERT vocabulary: it lacks {', '.join(lack or ['words'])}")
    ids = {entry: i for i, entry in enumerate(entries)}
    if twice := [entry for i, entry in enumerate(entries) if ids[entry] != i]:
        raise ValueError(f"{name}: the entry {twice[0]!r} stands there twice, so ids are not clear; remove one")
    accents = any(map(unicodedata.combining, unicodedata.normalize("NFD", "".join(entries))))  # then they stay in texts
    return BertTokenizer(vocab=ids, strip_accents=not accents)  # transformers 5 ignores vocab_file=: all is [UNK]


def vocabulary(tokenizer) -> list[str]:
    """The tokenizer's entries in the order of their ids: kept in every checkpoint, read by load_tokenizer."""
    return [entry for entry, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]


def tokenize(tokenizer, texts: list[str], max_tokens: int, end: bool = False) -> dict:
    """[CLS] and the word pieces of each text, then [SEP] if end asks for it (answers), padded to the longest. [ALBEF]

    Returns input_ids, attention_mask, word_ids (B, L) int64 (word_ids: number of the word a token is a piece of, -1 for
    [CLS], [SEP] and padding), L at most max_tokens (1 + end or more); truncated: how many of 1 or more texts are cut.
    """
    room = max(max_tokens - 1 - end, 0)
    texts = [unicodedata.normalize("NFC", text) for text in ([texts] if isinstance(texts, str) else texts)]
    pieces = tokenizer(texts, add_special_tokens=False)
    ids = [[tokenizer.cls_token_id, *row[:room], *[tokenizer.sep_token_id] * end] for row in pieces["input_ids"]]
    input_ids = torch.full((len(ids), max(map(len, ids))), tokenizer.pad_token_id)
    word_ids, attention_mask = torch.full_like(input_ids, -1), torch.zeros_like(input_ids)
    for i, row in enumerate(ids):
        input_ids[i, : len(row)], attention_mask[i, : len(row)] = torch.tensor(row), 1
        words = pieces.word_ids(i)[:room]
        word_ids[i, 1 : 1 + len(words)] = torch.tensor(words, dtype=torch.int64)
    truncated = sum(len(row) > room for row in pieces["input_ids"])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "word_ids": word_ids, "truncated": truncated}


# Weights of DeiT, BERT and ALBEF
ALBEF_VISION_NAMES = ("visual_encoder.", "vision."), ("patch_embed.proj.", "patch_embed."), ("attn.proj.", "attn.out.")
ALBEF_TEXT_NAMES = (
    ("vision_proj.", "image_proj."), ("text_encoder.cls.predictions.bias", "mlm_head.bias"),
    ("text_encoder.cls.predictions.transform.dense.", "mlm_head.dense."),
    ("text_encoder.cls.predictions.transform.LayerNorm.", "mlm_head.norm."),
    ("text_encoder.embeddings.word_embeddings.", "text.embeddings.word."),
    ("text_encoder.embeddings.position_embeddings.", "text.embeddings.position."),
    ("text_encoder.embeddings.token_type_embeddings.", "text.embeddings.token_type."),
    ("text_encoder.embeddings.LayerNorm.", "text.embeddings.norm."), ("text_encoder.encoder.layer.", "bert.layers."),
    ("crossattention.self.", "cross_attention."), ("crossattention.output.dense.", "cross_attention.out."),
    ("crossattention.output.LayerNorm.", "cross_norm."), (".attention.self.", ".self_attention."),
    (".attention.output.dense.", ".self_attention.out."), (".attention.output.LayerNorm.", ".self_norm."),
    (".intermediate.dense.", ".mlp.fc1."), (".output.dense.", ".mlp.fc2."), (".output.LayerNorm.", ".mlp_norm."),
)
"""Part of ALBEF's parameter name -> ours, in this order; text_decoder. and text_encoder.bert. are as text_encoder."""

NOT_OURS = re.compile(r"position_ids$|cls\.predictions\.decoder\.|pooler\.|seq_relationship\."
                      r"|visual_encoder(_m)?\.head\.|^(image_queue|text_queue|idx_queue|queue_ptr)$")
"""What those checkpoints hold and we expect to leave: constants, tied copies, heads of other tasks, queues."""

TASK_PARTS = ("temp", "itm_head", "ta_head", "encoders.cls_head", "encoders.decoder", "encoders.mlm_head",
              "encoders.image_proj", "encoders.text_proj")  # what one task's model has and another's may lack


def task_part(key: str) -> str | None:
    """The one of TASK_PARTS that a parameter belongs to, or None. Copy with: TASK_PARTS."""
    name = key.replace("encoders_m.", "encoders.")
    return next((part for part in TASK_PARTS if name == part or name.startswith(part + ".")), None)


def rename_albef(state: dict, text_layers: int) -> dict:
    """ALBEF's names -> ours; text_layers: below fusion. Copy with: NOT_OURS, ALBEF_VISION_NAMES, ALBEF_TEXT_NAMES."""
    renamed = {}
    for key, tensor in state.items():
        if NOT_OURS.search(key):
            continue
        name = re.sub(r"^(visual_encoder|text_encoder|text_decoder|vision_proj|text_proj|cls_head)_m\.", r"\1.", key)
        decoder = name.startswith("text_decoder.")
        prefix = ("encoders_m." if name != key else "encoders.") + "decoder." * decoder
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        name = name.replace("text_decoder.", "text_encoder.").replace("text_encoder.bert.", "text_encoder.")
        for theirs, ours in ALBEF_VISION_NAMES + ALBEF_TEXT_NAMES:
            name = name.replace(theirs, ours)
        if layer := re.match(r"bert\.layers\.(\d+)\.(.*)", name):
            i = int(layer[1]) - (0 if decoder else text_layers)
            name = f"fusion.layers.{i}.{layer[2]}" if i >= 0 else f"text.layers.{i + text_layers}.{layer[2]}"
        prefix = "" if name.startswith(("temp", "itm_head.", "ta_head.")) else prefix
        if ".attn.qkv." in name:
            for part, chunk in zip(("query", "key", "value"), tensor.chunk(3)):
                renamed[prefix + name.replace("qkv", part)] = chunk
        else:
            renamed[prefix + name] = tensor
    return renamed


def export_albef(model) -> dict:
    """The state of any task's model as ALBEF's own checkpoints have it, less what the task leaves alone. [ALBEF]"""
    has_mlm = isinstance(model, PretrainModel) and model.mask_text_for  # BertForMaskedLM there, else BertModel
    left_out = ("mlm_head",) if isinstance(model, TextAssignmentModel) else model.unused
    exported = {}
    for key, tensor in model.state_dict().items():
        part, _, name = key.partition(".")
        if part in ("image_queue", "text_queue"):
            exported |= {part: tensor.T} if len(tensor) else {}  # from_pretrained's are empty: no shape of ALBEF's
        elif part == "queue_ids":
            exported |= {} if has_mlm or not len(tensor) else {"idx_queue": tensor[None]}
        elif part == "queue_written":
            exported["queue_ptr"] = tensor[None] % max(len(model.queue_ids), 1)
        elif part not in ("encoders", "encoders_m"):
            exported[key] = tensor
        elif not name.startswith(left_out):
            decoder = name.startswith("decoder.")
            name, first = name.removeprefix("decoder."), 0 if decoder else len(model.encoders.text.layers)
            name = re.sub(r"^fusion\.layers\.(\d+)", lambda match: f"bert.layers.{int(match[1]) + first}", name)
            name = re.sub(r"^text\.layers", "bert.layers", name)
            for theirs, ours in reversed(ALBEF_VISION_NAMES if name.startswith("vision.") else ALBEF_TEXT_NAMES):
                name = name.replace(ours, theirs)
            if has_mlm or decoder:
                name = re.sub(r"^text_encoder\.(?!cls)", "text_encoder.bert.", name)
            name = re.sub("^text_encoder", "text_decoder", name) if decoder else name
            name = re.sub(r"^(\w+)", r"\1_m", name) if part == "encoders_m" else name
            name, fused = re.subn(r"\.attn\.(query|key|value)\.", ".attn.qkv.", name)
            exported[name] = torch.cat([exported[name], tensor]) if fused and name in exported else tensor
    for name, tensor in list(exported.items()):  # constants and tied copies
        if name.endswith("position_embeddings.weight"):
            exported[name.replace("position_embeddings.weight", "position_ids")] = torch.arange(len(tensor))[None]
        if name.endswith("cls.predictions.bias"):
            word = name.replace("cls.predictions.bias", "bert.embeddings.word_embeddings.weight")
            exported[name.replace("bias", "decoder.bias")] = tensor
            exported[name.replace("bias", "decoder.weight")] = exported[word]
    return exported


def pair_layers(state: dict, encoders: Encoders) -> dict:
    """state with each fusion layer i as layers 2i and 2i + 1, if encoders have pairs of them and it has not. [ALBEF]"""
    pattern = re.compile(r"^(.*fusion\.layers\.)(\d+)(\..*)$")
    layers = {int(match[2]) for match in map(pattern.fullmatch, state) if match and "decoder" not in match[1]}
    images = encoders.fusion.images_per_text
    if images == 1 or len(layers) * images != len(encoders.fusion.layers):
        return state
    return {pattern.sub(lambda match: f"{match[1]}{images * int(match[2]) + i}{match[3]}", key): tensor
            for key, tensor in state.items() for i in range(images)}  # sub leaves the names of other parts as they are


def start_decoder(encoders: Encoders):
    """Start the answer decoder from embeddings, fusion layers, as shapes agree [ours], and MLM head. [ALBEF] VQA.py"""
    decoder = encoders.decoder
    decoder.text.embeddings.load_state_dict(encoders.text.embeddings.state_dict())
    decoder.mlm_head.load_state_dict(encoders.mlm_head.state_dict())
    for layer, source in zip(decoder.fusion.layers, encoders.fusion.layers):
        own = layer.state_dict()
        fitting = {key: value for key, value in source.state_dict().items() if value.shape == own[key].shape}
        layer.load_state_dict(fitting, strict=False)


def load_weights(module, state: dict, missing_ok: tuple[str, ...] = ()) -> list[str]:
    """Copy state into module, position embeddings resized; ValueError for keys left over, missing or of another shape.

    missing_ok: regular expressions of names that may be missing. Returns the names that were.
    """
    own = module.state_dict()
    grids = {f"{name}.pos_embed".removeprefix("."): m.grid for name, m in module.named_modules() if hasattr(m, "grid")}
    state = {k: resize_pos_embed(v, grids[k]) if k in grids else v for k, v in state.items()}
    missing = [k for k in own if k not in state]
    faults = [f"{k} is missing" for k in missing if not any(re.search(pattern, k) for pattern in missing_ok)]
    faults += [f"{k} is left over" for k in state if k not in own]
    differing = (k for k, v in state.items() if k in own and v.shape != own[k].shape)
    faults += [f"{k} has shape {tuple(state[k].shape)}, the model's has {tuple(own[k].shape)}" for k in differing]
    if faults:
        more = f" (and {len(faults) - 6} more)" if len(faults) > 6 else ""
        raise ValueError("the weights do not fit the model's layers and sizes: " + "; ".join(faults[:6]) + more)
    module.load_state_dict(state, strict=False)
    return missing


def read_dict(path) -> dict:
    """What a .safetensors file or one of torch.save holds; {} if no dict. ValueError where it cannot be read safely."""
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file  # comes with transformers
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)  # tensors and plain containers alone
    except OSError:
        raise
    except Exception as error:  # a broken file raises many kinds
        raise ValueError(f"{path} is no checkpoint that can be read safely ({type(error).__name__})") from None
    return content if isinstance(content, dict) else {}


def state_of(state: dict, path) -> dict:
    """The tensors of what path holds, raw or under "model" or "state_dict", less "module."; ValueError if none."""
    for name in ("model", "state_dict"):
        state = state[name] if isinstance(state.get(name), dict) else state
    if not state or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        raise ValueError(f"{path} holds no state dict of tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def load_deit(encoders: Encoders, state: dict):
    """Start the image encoder, not its twin, from a DeiT state (blocks.0.attn.qkv.weight, ...). [ALBEF]"""
    state = rename_albef({f"visual_encoder.{key}": value for key, value in state.items()}, text_layers=0)
    load_weights(encoders.vision, {key.removeprefix("encoders.vision."): value for key, value in state.items()})


def load_bert(encoders: Encoders, state: dict) -> list[str]:
    """Start the rest of encoders, no twin, from a Hugging Face BERT state; returns names left fresh. [ALBEF]"""
    state = {f"text_encoder.{key.removeprefix('bert.')}": value for key, value in state.items()}
    state = rename_albef(state, text_layers=len(encoders.text.layers))
    state = pair_layers({key.removeprefix("encoders."): value for key, value in state.items()}, encoders)
    fresh = ("^vision", "^image_proj", "^text_proj", "cross_attention", "cross_norm", "^cls_head", "^decoder")
    fresh += () if any("mlm_head" in key for key in state) else ("^mlm_head",)
    missing = load_weights(encoders, state, fresh)
    if hasattr(encoders, "decoder"):
        start_decoder(encoders)
    return [name for name in missing if not name.startswith(("vision.", "decoder."))]


def load_start(model, state: dict) -> tuple[list[str], list[str]]:
    """Start the model of any task from a checkpoint of ours or of ALBEF, of that task or another; queues start anew.

    The twin comes from the checkpoint; what that lacks of it is a copy of the student, made afterwards [ours; ALBEF:
    before]. Returns the names left fresh, and those of no use here. ValueError where a common part does not fit.
    """
    if not any(key.startswith("encoders.") for key in state):
        state = rename_albef(state, text_layers=len(model.encoders.text.layers))
    own, state, head = model.state_dict(), pair_layers(state, model.encoders), "encoders.cls_head.2.bias"
    parts = {task_part(key) for key in own}
    if head in own and head in state and own[head].shape != state[head].shape:  # of another task, with other classes
        parts.remove("encoders.cls_head")
    unused = re.compile("queue" if hasattr(model, "encoders_m") else "queue|^encoders_m")
    used = {key: value for key, value in state.items() if task_part(key) in parts and not unused.search(key)}
    absent = set(TASK_PARTS) - {task_part(key) for key in used}  # whole parts, not pieces of them
    missing = load_weights(model, used, ("queue", "^encoders_m", *(f"^{re.escape(part)}" for part in absent)))
    twin = [key.removeprefix("encoders_m.") for key in missing if key.startswith("encoders_m.")]
    if twin:
        student = model.encoders.state_dict()
        model.encoders_m.load_state_dict({name: student[name] for name in twin}, strict=False)
    if "encoders.decoder.mlm_head.bias" in missing:
        start_decoder(model.encoders)
        start_decoder(model.encoders_m)  # the twin's own from its own layers
        missing = [key for key in missing if not key.startswith("encoders.decoder.")]
    fresh = [key for key in missing if "queue" not in key and not key.startswith("encoders_m.")]
    return fresh, [key for key in state if key not in used and "queue" not in key]


# A trained model on your own image and sentence
class Pretrained:
    """A trained model that takes PIL images, of 8 bits a channel, and strings. Made by from_pretrained."""

    def __init__(self, model: PretrainModel, tokenizer, max_tokens: int, max_words: int):
        self.model, self.encoders = model.eval(), model.encoders
        self.tokenizer, self.max_tokens, self.max_words = tokenizer, max_tokens, max_words

    @torch.no_grad()
    def image_embeds(self, image):
        """image_embeds (1, 1 + N, D) of a PIL image of 8 bits a channel, which is turned as its EXIF says."""
        vision, image = self.encoders.vision, image.copy()
        if image.mode[0] in "IF":  # which convert would clip
            raise ValueError(f"image of mode {image.mode}: give one of 8 bits a channel")
        with contextlib.suppress(Exception):  # of a damaged EXIF
            image.getexif()
        image.info.clear()  # EXIF is read; after a turn it would be written anew, which odd tags make fail
        image = ImageOps.exif_transpose(image).convert("RGB")
        pixels = TF.to_dtype(TF.to_image(square(image, vision.grid * vision.patch_size)), scale=True)
        return self.encoders.encode_image(normalize(pixels[None].to(self.model.temp)))  # its device and dtype

    @torch.no_grad()
    def text_embeds(self, text):
        """text_embeds (1, L, D) of a string, their attention mask, and what tokenize makes of it."""
        tokens = tokenize(self.tokenizer, [clean_caption(text, self.max_words)], self.max_tokens)
        input_ids, mask = (tokens[name].to(self.model.temp.device) for name in ("input_ids", "attention_mask"))
        return self.encoders.encode_text(input_ids, mask), mask, tokens

    @torch.no_grad()
    def encode_image(self, image):
        """image_feat (P,), no token states; float32, of length 1: its dot product with a text's is their similarity."""
        return self.encoders.image_feat(self.image_embeds(image))[0]

    @torch.no_grad()
    def encode_text(self, text: str):
        """text_feat (P,), no token states; float32, of length 1."""
        return self.encoders.text_feat(self.text_embeds(text)[0])[0]

    def match_pass(self, image, text, attention_layer=None):
        text_embeds, mask, tokens = self.text_embeds(text)
        image_embeds = self.image_embeds(image).requires_grad_()  # so that a frozen model has a graph too
        keys_values = self.encoders.image_keys_values(image_embeds)
        fused, attention = self.encoders.fuse(text_embeds, mask, keys_values, attention_layer=attention_layer)
        with torch.autocast(fused.device.type, enabled=False):  # rounded to 8 bits, images would tie
            return self.model.itm_head(fused[:, 0].to(self.model.temp)).float(), attention, tokens

    @torch.no_grad()
    def match(self, image, text: str):
        """Does the text describe the image: probability in [0, 1], and the "match" logit that rankings use. [ALBEF]"""
        logits, _, _ = self.match_pass(image, text)
        return logits.softmax(-1)[0, 1].item(), logits[0, 1].item()

    def word_attention(self, image, text: str, attention_layer: int | None = None):
        """The text's words, G of each (words, h, w) float32; attention_layer None: the model's; last: ValueError."""
        layer = self.model.attention_layer if attention_layer is None else attention_layer
        check_attention_layer(layer, len(self.encoders.fusion.layers))
        with torch.inference_mode(False), torch.enable_grad():
            logits, attention, tokens = self.match_pass(image, text, layer)
            cam = word_attention(attention, logits[:, 1])[0]  # (L, N)
        pieces, word_ids = self.tokenizer.convert_ids_to_tokens(tokens["input_ids"][0].tolist()), tokens["word_ids"][0]
        own = [(word_ids == word).nonzero().flatten().tolist() for word in range(int(word_ids.max()) + 1)]  # its pieces
        words = ["".join(pieces[i].removeprefix("##") for i in word) for word in own]
        maps, grid = [cam[word].mean(0) for word in own], self.encoders.vision.grid
        return words, torch.stack(maps).unflatten(1, (grid, grid)) if maps else cam.new_zeros(0, grid, grid)


def checkpoint_path(path) -> str:
    """A checkpoint file: path itself, or in the folder path best.pt, else checkpoint.pt. FileNotFoundError if none."""
    for file in (str(path), os.path.join(path, "best.pt"), os.path.join(path, "checkpoint.pt")):
        if os.path.isfile(file):
            return file
    raise FileNotFoundError(f"{path}: no such file, and no folder with best.pt or checkpoint.pt of train.py")


def read_checkpoint(path) -> dict:
    """A checkpoint that train.py wrote, a plain dict; ValueError for any other file. Copy with: read_dict."""
    checkpoint = read_dict(path)
    if lack := ", ".join(sorted({"model", "config", "vocab", "step", "task"} - checkpoint.keys())):
        raise ValueError(f"{path} was not written by train.py: it lacks {lack}; ALBEF's are for train.py --start")
    return checkpoint


@torch.inference_mode(False)  # weights made in it would have no graph for word_attention
def load_trained(path, device: str = "cpu"):
    """The model of any task, its queues empty, the tokenizer, and all of train.py's checkpoint; else ValueError."""
    checkpoint = read_checkpoint(checkpoint_path(path))
    task, config, vocab = checkpoint["task"], checkpoint["config"], checkpoint["vocab"]
    try:
        sizes = config["model"] | {"image_size": config[task]["image_size"] or config["model"]["image_size"]}
        model = build_model(task, len(vocab), sizes, config["method"] | {"queue_size": 0})
        load_weights(model, {k: v for k, v in checkpoint["model"].items() if "queue" not in k}, ("queue",))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint of this version: {error}") from None
    return model.to(device).eval(), load_tokenizer(vocab), checkpoint


def from_pretrained(path, device: str = "cpu") -> Pretrained:
    """The model of train.py's checkpoint (a file or its folder), ready for use; ValueError or FileNotFoundError."""
    model, tokenizer, checkpoint = load_trained(path, device)
    task, config = checkpoint["task"], checkpoint["config"]
    if not isinstance(model, PretrainModel):
        raise ValueError(f"{path} is a model for {task}: no match score; take one of pretrain, retrieval or grounding")
    return Pretrained(model, tokenizer, config[task]["max_tokens"], config["data"]["max_words"])
