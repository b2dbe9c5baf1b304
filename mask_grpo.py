# SPDX-License-Identifier: MIT
"""Mask-GRPO: reinforcement learning for image models that paint by unmasking, in one file.

The method of "Reinforcement Learning Meets Masked Generative Models" (Luo et al., 2025, arXiv
2510.13418v2; `Eq. n` is its numbering). A picture is N tokens, all MASK at first. At every step the
policy draws a token for each masked position, keeps the few it is surest of and masks the rest
again; after T steps none is masked. One update:

  1. paint G pictures for each of P prompts, and record which token was revealed when   (section 4)
  2. give each picture a reward; resample groups whose rewards hardly differ         (sections 5, 7)
  3. compare it with its group: the advantage, Eq. 12                                   (section 5)
  4. ratio = p(step) under the weights now / under those that painted, Eq. 11           (section 6)
     where p(step), the probability of a whole step, is what the paper redefines: Eq. 14 (section 3)
  5. climb min(ratio A, clip(ratio) A), averaged over pictures and steps, Eq. 10        (section 6)

Where this differs from the paper, and why:
  a. Eq. 14 is scored under the noise that the sampler ranked with (`p1`). As printed it ignores the
     noise (`p1_literal`) and scores steps that did not happen.
  b. The old log-probability is kept while the weights move: the ratio is real, clipping can act.
  c. The last step is a transition like any other: every token of the picture is credited.
  d. A vanishing group is replaced by another prompt's, a few times at most, then left out.

Run it: `python mask_grpo.py` (5 minutes on two CPU cores); `-h` explains every setting.
The paper's own system: `python mask_grpo.py --model showlab/show-o-512x512 --prompts FILE` (a GPU).
Dims: B = P * G samples of P prompts, N image tokens, K codes, T steps, L length of the sequence.
"""
import argparse
import copy
import csv
import dataclasses
import inspect                                     # the comments of Config are its help texts
import json
import logging
import math
import os
import pathlib
import pickle
import random
import re
import shutil
import signal
import sys
import tempfile
import textwrap
import time
import zlib
from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import reward as rewards

try:
    from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM
except (ImportError, RuntimeError) as error:    # transformers loads torchvision, which loads torch
    if "torchvision" not in f"{error} {error.__cause__}":
        raise
    mismatch = ("torch and torchvision come from different builds; reinstall both together: "
                "pip install --force-reinstall torch torchvision")
    if __name__ != "__main__":
        raise ImportError(mismatch) from None
    print(f"mask_grpo.py: {mismatch}", file=sys.stderr)
    sys.exit(2)

# --------------------------------------------------------------------------------------------------
# 1. Settings. A field is a flag (clip_low is --clip-low); its comment says what turning it does.


@dataclass
class Config:
    """All settings of a run. The defaults are the shapes world's; SHOWO, below, has Show-o's."""
    # task
    model: str = ""                 # a Show-o, hub id or folder; none is the shapes world's policy
    vq_model: str = "showlab/magvitv2"   # its decoder, hub id or folder
    weights: str = ""               # a policy's weights in place of the base: file, folder, hub id
    prompts: str = ""               # captions, .txt, .json or .jsonl; a tenth is only evaluated
    reward: str = "shapes"          # shapes, clip[:MODEL:TAG], hpsv2, pickscore, MODULE:FUNCTION
    out: str = "out"                # folder for base, checkpoint, metrics.csv and pictures
    resume: bool = False            # go on from --out, with its settings where no flag is given
    generate: str = ""              # do not train, paint these captions (a file as --prompts)
    samples: int = 4                # pictures per caption of --generate
    device: str = "auto"            # cpu, cuda or mps; auto takes the fastest there is
    seed: int = 0                   # of the base, the prompts and every draw
    # the shapes world's base
    width: int = 64                 # hidden size, a multiple of 16
    layers: int = 4                 # transformer blocks
    pretrain_steps: int = 3000      # masked-token prediction before any reinforcement learning
    pretrain_lr: float = 5e-3       # its peak learning rate
    prompt_dropout: float = 0.1     # share of its captions that are emptied; guidance needs some
    # sampling
    steps: int = 14                 # T in training; below --eval-steps: the unmasking reduction
    eval_steps: int = 14            # T in evaluation
    temperature: float = 1.0        # of the noise on confidences; 0 keeps exactly the surest tokens
    guidance: float = 0.0           # g in evaluation, (1 + g) cond - g uncond; training has none
    # Mask-GRPO
    transition: str = "p1"          # p1 (Eq. 14), p1_literal (no noise), p2 (Eq. 15), ar (Eq. 13)
    updates: int = 75               # rounds of painting and learning
    groups: int = 8                 # P, prompts per update
    group_size: int = 8             # G, pictures per prompt, 2 or more; many is smooth and slow
    inner_epochs: int = 1           # passes over one rollout; from the second on the ratio leaves 1
    length_normalize: bool = False  # ratio per token, not per step; wise if --inner-epochs > 1
    clip_low: float = 0.1           # the ratio counts down to 1 - this
    clip_high: float = 0.2          # the ratio counts up to 1 + this
    beta: float = 0.0               # weight of the KL to the frozen base; at 0 there is no copy
    score_steps: int = 0            # computational reduction: only the first k steps, or last -k
    filter_quantile: float = 0.1    # groups whose reward std is below this quantile are resampled
    filter_tries: int = 2           # times that missing groups are painted again
    # optimisation
    optimizer: str = "adamw"        # adamw, or adafactor, whose state is tiny: half the memory
    lr: float = 8e-4                # peak learning rate; smaller for larger policies
    warmup: int = 5                 # updates of linear warm-up, before the cosine to 0
    weight_decay: float = 0.02      # on matrices only
    max_grad_norm: float = 1.0      # longer gradients are scaled down to this
    rollout_batch: int = 1024       # pictures painted at once: memory only
    micro_batch: int = 192          # transitions per backward pass: memory only, never the result
    checkpointing: bool = False     # compute activations twice instead of keeping them
    # evaluation
    eval_every: int = 25            # updates between evaluations, picture grids and checkpoints
    eval_pictures: int = 48         # pictures per category, on either side of the split


# What --model changes where no flag is given: the paper's settings, for the 512 x 512 model.
SHOWO = dict(reward="clip", steps=50, eval_steps=50, guidance=5.0, updates=625, groups=16,
             group_size=6, lr=3e-6, warmup=62, rollout_batch=24, micro_batch=8, checkpointing=True,
             eval_every=10, eval_pictures=16)


# --------------------------------------------------------------------------------------------------
# 2. The policy is Show-o (Xie et al., 2024): a Phi language model whose vocabulary also holds image
#    codes, so that a picture is part of the sentence. The rest of this file asks it for one thing,
#    `logits = policy(prompt_ids, tokens)`, where tokens are codes 0..K-1, or K for MASK.


class Policy(nn.Module):
    """p(code | prompt, partly masked picture), for all positions of the picture at once.

    Vocabulary [text | 10 special | K codes | MASK], sequence [text, <soi>, N image tokens, <eoi>].
    tokenize: str -> text ids. decoder: codes (B, h, w) -> pixels (B, 3, H, W) in [-1, 1].
    """

    def __init__(self, phi: PhiConfig, tokenize, bos_id, decoder, num_tokens, codebook_size,
                 max_text=128):
        super().__init__()
        self.lm = PhiForCausalLM(phi)
        self.tokenize, self.decoder, self.max_text = tokenize, decoder, max_text
        self.num_tokens, self.codebook_size = num_tokens, codebook_size
        self.offset = phi.vocab_size - 1 - codebook_size       # id of code 0, and with K of MASK
        self.bos_id, self.pad_id = bos_id, self.offset - 10    # bos is also the end of text
        self.soi_id, self.eoi_id, self.t2i_id = (self.pad_id + i for i in (1, 2, 5))
        self.mixed = False      # whether to compute in bf16 on a GPU; pays for large policies only

    @property
    def device(self):
        """Where the weights are."""
        return self.lm.lm_head.weight.device

    @property
    def dtype(self):
        """What the forward pass computes in. The weights are float32 always."""
        return torch.bfloat16 if self.mixed and self.device.type == "cuda" else torch.float32

    def encode(self, prompts: list[str]):
        """Prompts in Show-o's layout [<t2i>, bos, words, bos], left padded -> (B, L_text) long"""
        rows = []
        for prompt in prompts:
            words = self.tokenize(prompt)
            bos = [] if words[:1] == [self.bos_id] else [self.bos_id]
            row = [self.t2i_id, *bos, *words, self.bos_id]
            if len(row) > self.max_text + 1:
                row = row[:self.max_text] + [self.bos_id]
            rows.append(row)
        longest = max(map(len, rows))                          # Show-o pads to 129, to no effect
        rows = [[self.pad_id] * (longest - len(row)) + row for row in rows]
        return torch.tensor(rows, device=self.device)

    def attention_mask(self, prompt_ids):
        """Omni-attention: text is causal and blind to the picture, the picture sees everything.

        0 where a query may look, very negative elsewhere: prompt_ids (B, L_text) -> (B, 1, L, L)
        """
        after = self.num_tokens + 2                                             # picture, edges
        position = torch.arange(prompt_ids.shape[1] + after, device=prompt_ids.device)
        in_picture = (position >= prompt_ids.shape[1])[:, None]                 # (L, 1)
        causal = position[:, None] >= position                                  # (L, L)
        real = F.pad(prompt_ids != self.pad_id, (0, after), value=True)         # (B, L)
        allowed = real[:, None, :] & (causal | in_picture)                      # (B, L, L)
        allowed |= causal & ~real[:, :, None]     # pads see pads: a row that sees nothing is NaN
        mask = torch.zeros(allowed.shape, device=position.device)
        return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)[:, None]

    def forward(self, prompt_ids, tokens):
        """Logits read at the image positions themselves, of the codes alone.

        prompt_ids (B, L_text) long, tokens (B, N) long, K for MASK -> (B, N, K)
        """
        soi, eoi = (prompt_ids.new_full((len(tokens), 1), i) for i in (self.soi_id, self.eoi_id))
        ids = torch.cat([prompt_ids, soi, tokens + self.offset, eoi], dim=1)    # (B, L)
        mask = self.attention_mask(prompt_ids)                                  # (B, 1, L, L)
        codes = slice(self.offset, self.offset + self.codebook_size)            # the rows in use
        mixed = self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
            hidden = self.lm.model(ids, attention_mask=mask, use_cache=False)[0]        # (B, L, D)
            hidden = hidden[:, -self.num_tokens - 1:-1]                         # (B, N, D)
            return F.linear(hidden, self.lm.lm_head.weight[codes], self.lm.lm_head.bias[codes])

    @torch.no_grad()
    def decode(self, tokens):
        """The pixels of finished pictures: tokens (B, N) -> (B, H, W, 3) uint8"""
        side, pictures = math.isqrt(self.num_tokens), []
        at_once = max(1, 4096 // self.num_tokens)           # 4 pictures of 512 x 512, for memory
        for codes in tokens.view(-1, side, side).split(at_once):
            pixels = self.decoder(codes)                                        # (b, 3, H, W)
            pixels = (((pixels + 1) / 2).clamp(0, 1) * 255).to(torch.uint8)
            pictures.append(pixels.permute(0, 2, 3, 1))                         # (b, H, W, 3)
        return torch.cat(pictures)


# --------------------------------------------------------------------------------------------------
# 3. The probability of a step. In step t the positions U are revealed and the positions R stay
#    masked, although a token was drawn for them too. What is the probability that this happens?
#
#    ar  Eq. 13  All draws count, as in a language model. But those of R were thrown away, 35 of 36
#                in the first of 14 steps: the picture does not contain them, and its reward cannot
#                tell one from another.
#    p2  Eq. 15  Only the revealed tokens count. No probability (over all outcomes it sums to more
#                than 1, for the choice of U is ignored), but no noise from R either.
#    p1  Eq. 14  The revealed tokens; and for each position of R the chance that it loses, that is,
#                draws any token less confident than the least confident of U. The sampler adds
#                noise before it compares, and so must we; printed, Eq. 14 has none (p1_literal).
#
#    What learning will use of log p is its gradient (section 6). That of p1 is that of ar, averaged
#    over all draws that would have lost: both pull the same way on average, and what ar adds is the
#    accident of which was drawn. In the shapes world this noise makes its gradient four times as
#    long, and its learning slow (README).


def mask_schedule(T: int, N: int) -> list[int]:
    """Tokens still masked after each of T steps: floor(N cos(pi/2 (t + 1) / T)), and 0 at the end.

    mask_schedule(4, 16) = [14, 11, 6, 0]. Every step reveals at least one token. The cosine is
    float32's, as in the published sampler: at a ratio of 2/3 it, and so the floor, is below 1/2.
    """
    masked, schedule = N, []
    for t in range(T):
        ratio = torch.tensor((t + 1) / T, dtype=torch.float32)
        wanted = int(torch.floor(N * torch.cos(ratio * math.pi * 0.5)))
        masked = max(T - 1 - t, min(masked - 1, wanted))       # later steps need tokens too
        schedule.append(masked)
    return schedule


TRANSITIONS = ("p1", "p1_literal", "p2", "ar")
FLOOR = -60.0   # in place of log 0: too small to count in a float32 sum, and still finite


def transition_logprob(logits, tokens, step, t, kind, noise=None, drawn=None):
    """log p(s_{t+1} | s_t): the log-probability of what step t did to the picture.

    step: when each position is revealed, so U is step == t and R is step > t. noise: what the
    sampler added to the log-confidences (None is no noise). drawn: its draws at all of U and R.

    Let p_0 = (.7, .2, .1) reveal its code 0, while p_1 = (.6, .3, .1) draws its code 2 and stays
    masked. Then ar = .7 * .1, p2 = .7, and p1 = .7 * (.6 + .3 + .1), for all of p_1 is below .7.
    If instead position 1 reveals its code 0, p1 = .6 * (.2 + .1): p_0 cannot have drawn its .7.
    Unless noise of log 1.5 lifts position 1: its .6 ranks as .9, so p1 = .6 * (.7 + .2 + .1), while
    p1_literal stays at .6 * (.2 + .1) and gives no chance to p_0 = .7, which may have happened.

    logits (B, N, K), tokens (B, N), step (B, N), t int or (B,), noise (B, N), drawn (B, N) -> (B,)
    """
    t = t[:, None] if torch.is_tensor(t) else t
    revealed, remasked = step == t, step > t                                    # (B, N) bool each
    at_least_float32 = torch.promote_types(logits.dtype, torch.float32)
    logp = F.log_softmax(logits, dim=-1, dtype=at_least_float32)                # (B, N, K)

    if kind == "ar":
        confidence = logp.gather(-1, drawn[..., None]).squeeze(-1)              # (B, N)
        return (confidence * (revealed | remasked)).sum(-1)                     # (B,)

    token = tokens.masked_fill(~revealed, 0)                                    # (B, N) no MASK
    confidence = logp.gather(-1, token[..., None]).squeeze(-1)                  # (B, N) log cs_i
    p2 = (confidence * revealed).sum(-1)                                        # (B,)
    if kind == "p2":
        return p2

    # Both sides of the comparison carry the noise, or another event is scored than the one that
    # happened. The noise is taken as given: p1 is the probability of the step under this noise.
    if noise is None or kind == "p1_literal":
        noise = torch.zeros_like(confidence)
    threshold = (confidence + noise).masked_fill(~revealed, math.inf).amin(-1)  # (B,) least of U
    loses = logp + noise[..., None] < threshold[:, None, None]                  # (B, N, K) bool
    stays_masked = logp.masked_fill(~loses, FLOOR).logsumexp(-1)                # (B, N)
    return p2 + (stays_masked * remasked).sum(-1)                               # (B,)


def num_factors(step, t, kind):
    """How many probabilities a transition multiplies: step (B, N), t (B,) -> (B,) long"""
    return (step == t[:, None] if kind == "p2" else step >= t[:, None]).sum(-1)


# --------------------------------------------------------------------------------------------------
# 4. The sampler. A revealed token never changes again, so a rollout is known by its final tokens
#    and the step that revealed each: before step t a picture is where(step < t, tokens, MASK). Any
#    step of any picture can be scored later, in any order and any micro-batch.


@dataclass
class Trajectory:
    """A rollout of B pictures in T steps, and all that the loss needs to know of it."""
    tokens: torch.Tensor            # (B, N) long     the finished pictures
    step: torch.Tensor              # (B, N) long     when each token was revealed, 0..T-1
    noise: torch.Tensor             # (T, B, N)       what was added to the log-confidences
    drawn: torch.Tensor | None      # (T, B, N) long  the draws at all positions; for `ar` only
    logp_old: torch.Tensor | None   # (T, B)          log-probability of each step when it was taken

    def select(self, keep):
        """Some of the pictures: keep (B,) bool"""
        by_time = (x if x is None else x[:, keep] for x in (self.noise, self.drawn, self.logp_old))
        return Trajectory(self.tokens[keep], self.step[keep], *by_time)

    @staticmethod
    def cat(paths):
        """Several rollouts of equal T as one, pictures side by side: (B_1), (B_2), ... -> (B)"""
        dims = {"tokens": 0, "step": 0, "noise": 1, "drawn": 1, "logp_old": 1}
        parts = {name: [getattr(path, name) for path in paths] for name in dims}
        return Trajectory(**{name: None if part[0] is None else torch.cat(part, dims[name])
                             for name, part in parts.items()})


def gumbel(shape, generator, device):
    """Standard Gumbel noise of a shape: -log E, E exponential with mean 1. In place, for memory.

    Clamped, for one infinity can become a NaN, and a NaN sorts above everything.
    """
    noise = torch.empty(shape, device=device).exponential_(generator=generator)
    return noise.clamp_(1e-20, 1e20).log_().neg_()


@torch.no_grad()
def rollout(policy, prompt_ids, steps, temperature=1.0, guidance=0.0, null_ids=None, kind=None,
            generator=None):
    """Paint a picture for each prompt, all in parallel. `kind` names the log-probability recorded.

    Noise is temperature * Gumbel, and Show-o's temperature compounds: step t multiplies what is
    left of it by 1 - (t + 1) / T. Guidance g makes the logits (1 + g) cond - g uncond, the latter
    under null_ids, the empty prompt; Show-o's g = 5 is 6 in the other convention.

    prompt_ids (B, L_text) long, null_ids (B, L_null) long -> Trajectory
    """
    (B, _), N, MASK = prompt_ids.shape, policy.num_tokens, policy.codebook_size
    tokens = torch.full((B, N), MASK, device=prompt_ids.device)                 # (B, N)
    step = torch.full_like(tokens, steps)                                       # (B, N) T: not yet
    noises, draws, logps = [], [], []
    for t, num_masked in enumerate(mask_schedule(steps, N)):
        logits = policy(prompt_ids, tokens)                                     # (B, N, K)
        if guidance > 0:
            logits = (1 + guidance) * logits - guidance * policy(null_ids, tokens)
        logp = F.log_softmax(logits.float(), dim=-1)                            # (B, N, K)

        # draw a token everywhere: argmax(log p + Gumbel) samples p, and nothing waits for the GPU
        drawn = (logp + gumbel(logp.shape, generator, logp.device)).argmax(-1)  # (B, N)
        temperature *= 1 - (t + 1) / steps
        noise = temperature * gumbel((B, N), generator, logp.device)            # (B, N)
        confidence = logp.gather(-1, drawn[..., None]).squeeze(-1) + noise      # (B, N)

        # mask the least confident again; what was revealed earlier is beyond doubt
        order = confidence.masked_fill(step < t, math.inf).argsort(-1)          # (B, N)
        reveal = (step > t).scatter(1, order[:, :num_masked], False)            # (B, N) bool
        tokens = torch.where(reveal, drawn, tokens)
        step = step.masked_fill(reveal, t)

        noises.append(noise)
        if kind == "ar":
            draws.append(drawn)
        if kind:
            logps.append(transition_logprob(logits, tokens, step, t, kind, noise, drawn))
    noise = torch.stack(noises)                                                 # (T, B, N)
    assert tokens.shape == step.shape == noise.shape[1:]
    drawn, logp = (torch.stack(x) if x else None for x in (draws, logps))       # (T, B, N), (T, B)
    return Trajectory(tokens, step, noise, drawn, logp)


def path_logprob(policy, prompt_ids, path, b, t, kind):
    """transition_logprob of recorded steps under a policy: the learner's side of the ratio.

    prompt_ids (B, L_text), pictures b (M,), their steps t (M,) -> (M,)
    """
    state = path.tokens[b].masked_fill(path.step[b] >= t[:, None], policy.codebook_size)
    logits = policy(prompt_ids[b], state)                                       # (M, N, K)
    drawn = path.drawn[t, b] if kind == "ar" else None                          # (M, N)
    return transition_logprob(logits, path.tokens[b], path.step[b], t, kind, path.noise[t, b],
                              drawn)


# --------------------------------------------------------------------------------------------------
# 5. The advantage: how much better a picture is than its siblings. No value network is needed, for
#    the group is the baseline; and where a whole group is equally good there is nothing to learn.


def group_advantage(reward, eps=1e-4):
    """(R - mean) / std within each group (Eq. 12): [[1, 0, 0, 1]] -> [[.87, -.87, -.87, .87]].

    The std is unbiased. eps keeps rounding in equal rewards from becoming a full-size advantage.
    reward (P, G) -> (P, G)
    """
    return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + eps)


class SampleFilter:
    """Finds vanishing groups (section 3.3 of the paper) by a running quantile of all reward stds.

    A group vanishes if its std is below the quantile, or 0. The first `warmup` groups are all kept.
    """

    def __init__(self, quantile, warmup=32, window=512):
        self.quantile, self.warmup, self.history = quantile, warmup, deque(maxlen=window)

    def keep(self, std):
        """Which groups to learn from; their stds join the history: std (P,) -> (P,) bool"""
        keep = torch.ones_like(std, dtype=torch.bool)
        if self.quantile > 0 and len(self.history) >= self.warmup:
            keep = (std >= torch.tensor(self.history).quantile(self.quantile)) & (std > 0)
        self.history.extend(std.tolist())
        return keep


# --------------------------------------------------------------------------------------------------
# 6. The loss. At ratio 1 its value is minus the mean advantage, 0 by construction, but its gradient
#    is -A grad log p, which is all the learning there is. So watch the reward, not the loss.


def grpo_loss(logp, logp_old, advantage, clip_low, clip_high):
    """-mean of min(ratio A, clip(ratio, 1 - low, 1 + high) A), Eq. 10 and 11: all (M,) -> (), dict

    Clipping stops only what would push a ratio further out: up for A > 0, down for A < 0.
    """
    assert logp.shape == logp_old.shape == advantage.shape and logp.dim() == 1
    ratio = (logp - logp_old).exp()                                             # (M,)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()        # ()
    stopped = ratio * advantage > clipped * advantage                           # (M,) bool
    return loss, {"ratio": ratio.detach(), "clip": stopped.float()}


def kl_k3(logp, logp_ref):
    """Schulman's k3 estimate of KL(p || p_ref): r - 1 - log r, r = p_ref / p. (M,) -> (M,), >= 0"""
    log_ratio = logp_ref - logp
    return log_ratio.exp() - 1 - log_ratio


# --------------------------------------------------------------------------------------------------
# 7. One update: paint and judge groups, then learn from them.


class UsageError(ValueError):
    """The user's mistake, told in one line, before any work where possible. Exit status 2."""


class RunError(RuntimeError):
    """A run that must not go on, told in one line. Exit status 1."""


def to_images(pixels):
    """(B, H, W, 3) uint8 -> list of B PIL images"""
    return [Image.fromarray(picture) for picture in pixels.cpu().numpy()]


def judge(reward, images, prompts):
    """Rewards, once they are known to be usable -> (B,) float32 on the CPU

    UsageError if the reward raises, has another shape or is not finite: it may be the reader's own.
    """
    try:
        scores = torch.as_tensor(reward(images, prompts)).detach().float().cpu()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UsageError(f"the reward failed, {type(error).__name__}: {error} (the first of its "
                         f"{len(prompts)} prompts: {prompts[0]!r})") from error
    if scores.shape != (len(images),):
        raise UsageError(f"the reward must give one number per picture, a tensor of shape "
                         f"({len(images)},); it gave {tuple(scores.shape)} (the first of its "
                         f"prompts: {prompts[0]!r})")
    if not scores.isfinite().all():
        i = int(scores.isfinite().int().argmin())
        raise UsageError(f"the reward is {scores[i]} for the prompt {prompts[i]!r}")
    return scores


def paint(policy, prompts, config, steps, generator, guidance=0.0, kind=None):
    """A rollout of B prompts, `rollout_batch` pictures at a time -> Trajectory"""
    null_ids = policy.encode([""])
    return Trajectory.cat([
        rollout(policy, ids, steps, config.temperature, guidance, null_ids.expand(len(ids), -1),
                kind, generator) for ids in policy.encode(prompts).split(config.rollout_batch)])


def sample_groups(policy, reward, prompts, sample_filter, config, generator):
    """Paint groups until `config.groups` of them are worth learning from, or the tries are used up.

    -> prompts (list of B), Trajectory and rewards (P, G) of those kept; rewards (P', G) of all
    """
    texts, paths, kept, painted = [], [], [], []
    for _ in range(1 + config.filter_tries):
        missing = config.groups - len(texts) // config.group_size
        chosen = torch.randint(len(prompts), (missing,), generator=generator,
                               device=generator.device)
        batch = [prompts[i] for i in chosen.tolist() for _ in range(config.group_size)]
        path = paint(policy, batch, config, config.steps, generator, kind=config.transition)
        scores = judge(reward, to_images(policy.decode(path.tokens)), batch)    # (missing * G,)
        scores = scores.view(missing, config.group_size)                        # (missing, G)
        keep = sample_filter.keep(scores.std(1))                                # (missing,) bool
        each = keep.repeat_interleave(config.group_size)                        # (missing * G,)
        texts += [text for text, good in zip(batch, each.tolist()) if good]
        paths.append(path.select(each.to(path.tokens.device)))
        kept.append(scores[keep])
        painted.append(scores)
        if keep.all():
            break
    return texts, Trajectory.cat(paths), torch.cat(kept), torch.cat(painted)


def check_ratio(logp, path, b, t, kind, dtype):
    """The ratio of learner to sampler per factor, before the weights have moved. RunError if not 1.

    Not every step has to agree, though: p1 has a hard threshold, and rounding can put a code on its
    other side. In bf16 logits keep 8 bits: batches of other sizes may round otherwise, and n
    factors that are off by rounding make a product that is off by sqrt(n) times as much.
    logp (M,), the learner's, of pictures b (M,) and steps t (M,) -> float
    """
    n = num_factors(path.step[b], t, kind)                                      # (M,)
    log_ratio = logp - path.logp_old[t, b]                                      # (M,)
    off = float((log_ratio.abs() / n ** 0.5).quantile(0.95))
    if not off < (0.1 if dtype == torch.bfloat16 else 1e-3):
        raise RunError(f"sampler and learner differ by {off:.1e} per factor of a log-probability "
                       "before any change of the weights (dropout, precision or prompts differ?)")
    return float((log_ratio / n).mean().exp())


def learn(policy, reference, optimizer, prompt_ids, path, advantage, config):
    """The inner epochs over one rollout, an optimizer step each -> dict of numbers for the log

    prompt_ids (B, L_text), path of B pictures, advantage (B,)
    """
    (T, B), kind, k, log, old = path.logp_old.shape, config.transition, config.score_steps, {}, []
    steps = torch.arange(T)[:k] if k > 0 else torch.arange(T)[k:]               # [0:] is all
    pairs = torch.cartesian_prod(torch.arange(B), steps).to(prompt_ids.device)  # (M, 2) b and t
    # the mean of Eq. 10 runs over all groups asked for: one left out counts as one of advantage 0
    weight = 1 / (config.groups * config.group_size * len(steps))
    for epoch in range(config.inner_epochs):
        parts = []
        for i, (b, t) in enumerate(chunk.unbind(1) for chunk in pairs.split(config.micro_batch)):
            length = num_factors(path.step[b], t, kind) if config.length_normalize else 1
            logp = path_logprob(policy, prompt_ids, path, b, t, kind)           # (m,)
            if epoch == 0:      # the weights are still the old ones; the sampler's own record may
                old.append(logp.detach())       # be rounded otherwise, enough in bf16 to be clipped
            loss, part = grpo_loss(logp / length, old[i] / length, advantage[b],
                                   config.clip_low, config.clip_high)
            if reference is not None:
                with torch.no_grad():
                    logp_ref = path_logprob(reference, prompt_ids, path, b, t, kind)
                kl = kl_k3(logp / length, logp_ref / length)                    # (m,)
                loss, part["kl"] = loss + config.beta * kl.mean(), kl.detach()
            loss = loss * len(b) * weight
            loss.backward()
            parts.append({"loss": loss.detach()[None], **part})
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}   # (M,) each
        if epoch == 0:
            log["ratio_first"] = check_ratio(torch.cat(old), path, *pairs.unbind(1), kind,
                                             policy.dtype)
        log["grad"] = float(nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
        log |= {"loss": float(whole["loss"].sum()), "ratio": float(whole["ratio"].mean()),
                "clip": float(whole["clip"].mean())}
        if reference is not None:
            log["kl"] = float(whole["kl"].mean())
        for name in ("loss", "grad"):
            if not math.isfinite(log[name]):
                raise RunError(f"the {name} is {log[name]}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return log


# --------------------------------------------------------------------------------------------------
# 8. The shapes world as a policy: a small Phi, a decoder of tiles, a base trained from scratch.
#    Most bases are surest of the background, and leave the objects for their last steps, where many
#    tokens are drawn at once, blind to each other. Mask-GRPO then finds: place the objects first.


class TileDecoder(nn.Module):
    """The shapes world's decoder, where each code is a tile of pixels."""

    def __init__(self):
        super().__init__()
        tiles = (rewards.tiles() + 0.5) / 127.5 - 1      # + 0.5: truncating to uint8 gives it back
        self.register_buffer("tiles", tiles, persistent=False)                  # (K, p, p, 3)

    def forward(self, codes):
        """codes (B, h, w) -> (B, 3, h * p, w * p) in [-1, 1]"""
        pixels = self.tiles[codes].permute(0, 5, 1, 3, 2, 4)                    # (B, 3, h, p, w, p)
        return pixels.flatten(4, 5).flatten(2, 3)


def shapes_policy(config):
    """A Policy of random weights whose text vocabulary are the words of the shapes world."""
    words = sorted({word for *_, caption in rewards.all_captions() for word in caption.split()})
    words.insert(0, "<|endoftext|>")
    torch.manual_seed(config.seed)
    phi = PhiConfig(
        vocab_size=len(words) + 10 + rewards.CODEBOOK_SIZE + 1, hidden_size=config.width,
        intermediate_size=2 * config.width, num_hidden_layers=config.layers,
        num_attention_heads=config.width // 16, qk_layernorm=True,
        hidden_act="gelu_pytorch_tanh",     # the formula of Show-o's gelu_new, in one kernel
        initializer_range=0.1,              # Phi's 0.02 suits a width of 2048, not of 64
        # neighbours in a 6 x 6 grid are 1 and 6 apart: rotate whole heads, and faster than for text
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0})
    phi.name_or_path = "shapes"

    def tokenize(prompt):
        unknown = set(prompt.split()) - set(words)
        if unknown:
            raise UsageError(f"the shapes world does not know the words {sorted(unknown)}; "
                             "--model names a policy that knows more")
        return [words.index(word) for word in prompt.split()]

    return Policy(phi, tokenize, 0, TileDecoder(), rewards.GRID ** 2, rewards.CODEBOOK_SIZE)


def warmup_cosine(warmup, total):
    """The learning rate's factor at update i, for LambdaLR: a linear warm-up times a cosine to 0"""
    def factor(i):
        return min(1.0, (i + 1) / (warmup + 1)) * (1 + math.cos(math.pi * min(1.0, i / total))) / 2
    return factor


CATEGORY_WEIGHTS = (1, 1, 2, 1, 3, 2)   # in pretraining: counts and relations are learned last


def pretrain(policy, config, batch=32):
    """Masked-token prediction on right pictures: mask a random share of tokens, predict them.

    Held-out captions take part: the base knows the whole world, only the RL updates see less of it.
    """
    rng, generator = random.Random(config.seed), torch.Generator().manual_seed(config.seed)
    N, MASK, total = policy.num_tokens, policy.codebook_size, config.pretrain_steps
    both = [rewards.captions(heldout) for heldout in (False, True)]
    prompts = [rng.choice([caption for side in both for caption in side[category]]) for category in
               rng.choices(rewards.CATEGORIES, CATEGORY_WEIGHTS, k=min(20_000, batch * total))]
    pictures = torch.tensor([rewards.draw_scene(prompt, rng) for prompt in prompts])
    optimizer = torch.optim.AdamW(policy.parameters(), config.pretrain_lr, (0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(100, total))
    for i in range(1, total + 1):
        index = torch.randint(len(prompts), (batch,), generator=generator)      # (batch,)
        text = [prompts[j] if rng.random() > config.prompt_dropout else "" for j in index.tolist()]
        share = torch.cos(torch.rand(batch, 1, generator=generator) * math.pi / 2)   # as in MaskGIT
        order = torch.rand(batch, N, generator=generator).argsort(-1)           # (batch, N)
        masked = (order < (share * N).ceil()).to(policy.device)                 # (batch, N) bool
        tokens = pictures[index].to(policy.device)                              # (batch, N)
        logits = policy(policy.encode(text), tokens.masked_fill(masked, MASK))  # (batch, N, K)
        loss = F.cross_entropy(logits[masked], tokens[masked])
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if i % 500 == 0 or i == total:
            print(f"pretrain {i:5d}/{total} | cross-entropy {loss.item():.3f}", flush=True)


BASE_SETTINGS = ("width", "layers", "pretrain_steps", "pretrain_lr", "prompt_dropout", "seed")


def load_base(policy, config):
    """Give the policy the base's weights, kept in the output folder -> seconds of training"""
    path = pathlib.Path(config.out) / "base"
    settings = {name: getattr(config, name) for name in BASE_SETTINGS}
    if path.exists():
        base = read_checkpoint(path)
        if base["settings"] == settings:
            load_weights(policy.lm, read_tensors(path), "showo.", path)
            print(f"base: {path}, pretrained before")
            return base["seconds"]
    start = time.time()
    pretrain(policy, config)
    seconds = time.time() - start
    write_checkpoint(path, policy, {"settings": settings, "seconds": seconds})
    return seconds


# --------------------------------------------------------------------------------------------------
# 9. Show-o as a policy: the published weights in the class of section 2, and MAGVIT-v2's decoder.


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1 x 1 shortcut if channels change."""

    def __init__(self, before, after):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(32, c, eps=1e-6) for c in (before, after))
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x):
        """(B, before, h, w) -> (B, after, h, w)"""
        inner = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(inner)))


class AttnBlock(nn.Module):
    """x + attention of one head over all h * w positions."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        """(B, C, h, w) -> the same"""
        inner = self.norm(x)
        q, k, v = (f(inner).flatten(2).mT for f in (self.q, self.k, self.v))    # (B, h * w, C)
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).mT.view_as(x))


class MagvitDecoder(nn.Module):
    """The decoder of MAGVIT-v2 (Yu et al., 2023) as Show-o publishes it, names of modules included.

    There is no codebook: a code is its own vector, its 13 bits as -1 and 1. Only `width` is free,
    for tests; published is 128.
    """

    def __init__(self, width=128, bits=13):
        super().__init__()
        channels = [width * factor for factor in (1, 1, 2, 2, 4)]               # fine to coarse
        self.post_quant_conv = nn.Conv2d(bits, bits, 1)
        self.conv_in = nn.Conv2d(bits, channels[-1], 3, padding=1)
        self.mid = nn.ModuleDict({
            "block_1": ResBlock(channels[-1], channels[-1]), "attn_1": AttnBlock(channels[-1]),
            "block_2": ResBlock(channels[-1], channels[-1])})
        self.up = nn.ModuleList()
        for level, (c, blocks) in enumerate(zip(channels, (4, 4, 3, 4, 3))):
            before = channels[min(level + 1, 4)]                                # from the coarser
            self.up.append(nn.ModuleDict({"block": nn.ModuleList(
                ResBlock(before if i == 0 else c, c) for i in range(blocks))}))
            if level > 0:
                self.up[level]["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(c, c, 3, padding=1)})
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, codes):
        """codes (B, h, w) long -> (B, 3, 16 h, 16 w), in [-1, 1] but for overshoot"""
        bits = self.conv_in.in_channels
        shifts = torch.arange(bits - 1, -1, -1, device=codes.device)            # highest bit first
        x = ((codes[:, None] >> shifts[:, None, None]) & 1).float() * 2 - 1     # (B, 13, h, w)
        x = self.conv_in(self.post_quant_conv(x))                               # (B, 4 width, h, w)
        for name in ("block_1", "attn_1", "block_2"):
            x = self.mid[name](x)
        for level in reversed(self.up):
            for block in level["block"]:
                x = block(x)
            if "upsample" in level:
                x = level["upsample"]["conv"](F.interpolate(x, scale_factor=2))     # 2 h, 2 w
        return self.conv_out(F.silu(self.norm_out(x)))


# File names under which weights are published, the preferred first; an index names the shards.
WEIGHT_FILES = [stem + kind + index for kind in (".safetensors", ".bin")
                for index in ("", ".index.json")
                for stem in ("pytorch_model", "model", "diffusion_pytorch_model")]


def fetch(source, *names):
    """The first of these files that a local folder or a hub repository has -> Path. UsageError."""
    local, why = os.path.isdir(source), "it holds none of them"
    for name in names:
        try:
            path = os.path.join(source, name) if local else hf_hub_download(source, name)
            if os.path.isfile(path):
                return pathlib.Path(path)
        except LocalEntryNotFoundError:             # offline; another name may be in the cache
            why = "it is no local folder, and the hub cannot be reached; check name and network"
        except EntryNotFoundError:
            pass
        except (OSError, ValueError) as error:      # no such repository, no such kind of name, ...
            why = f"it is no local folder and cannot be downloaded: {error}"
            break
    others = " (or another usual name)" if len(names) > 1 else ""
    raise UsageError(f"{source} gives no {names[0]}{others}: {why}")


def one_tensor(file, name):
    """Of a safetensors file, which is opened anew each time, to let go of what was read before."""
    with safe_open(file, "pt") as tensors:
        return tensors.get_tensor(name)


def read_tensors(source):
    """A checkpoint, file, folder or hub id -> (name, tensor), one by one. UsageError if damaged."""
    files = [pathlib.Path(source)]
    if not files[0].is_file():
        files = [fetch(source, *WEIGHT_FILES)]
        if files[0].suffix == ".json":              # an index of shards
            try:
                shards = set(json.loads(files[0].read_text())["weight_map"].values())
            except (ValueError, KeyError, TypeError, AttributeError):
                raise UsageError(f"{files[0]} is no index of shards; download it anew") from None
            files = [fetch(source, shard) for shard in sorted(shards)]
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as tensors:
                    names = tensors.keys()
                yield from ((name, one_tensor(file, name)) for name in names)
            else:                                   # mmap: nothing is read before it is copied
                yield from torch.load(file, "cpu", weights_only=True, mmap=True).items()
        except (SafetensorError, RuntimeError, OSError, EOFError, AttributeError, ValueError,
                pickle.UnpicklingError) as error:
            raise UsageError(f"{file} is truncated or holds no tensors ({type(error).__name__}); "
                             "download or save it anew") from None


def load_weights(module, tensors, prefix, source):
    """Copy (name, tensor) pairs into a module, strictly but for the prefix; else a UsageError."""
    ours, wrong = module.state_dict(), []
    missing = {prefix + name for name in ours}
    for name, tensor in tensors:
        mine = ours.get(name.removeprefix(prefix)) if name in missing else None
        shape = getattr(tensor, "shape", ())
        missing.discard(name)
        if mine is None or mine.shape != shape:
            needs = "unknown here" if mine is None else f"{(*mine.shape,)} here"
            wrong.append(f"{name} {(*shape,)} is {needs}")
        else:
            mine.copy_(tensor)                      # in place, and to the module's type and device
    wrong += [f"{name} is missing" for name in missing]
    if wrong:
        raise UsageError(f"{source} does not fit, {len(wrong)} tensors differ: "
                         f"{'; '.join(sorted(wrong)[:3])}")


def showo_config(model):
    """config.json of a Show-o folder or hub id -> dict. UsageError."""
    try:
        config = json.loads(fetch(model, "config.json").read_text())
        return {name: config[name] for name in ("vocab_size", "llm_vocab_size", "llm_model_path",
                                                "codebook_size", "num_vq_tokens")}
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"config.json of {model} is not Show-o's: {error!r}") from None


def load_showo(model, vq_model="showlab/magvitv2", weights=None, device="cpu") -> Policy:
    """Show-o and its decoder from hub ids or local folders. `weights`: others than the model's own.

    Built without storage, then filled tensor by tensor: there is never a second copy in memory.
    UsageError if anything is missing or does not fit.
    """
    sizes, device = showo_config(model), torch.device(device)
    llm, text, K = sizes["llm_model_path"], sizes["llm_vocab_size"], sizes["codebook_size"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(llm)
        phi = PhiConfig.from_pretrained(
            llm, vocab_size=sizes["vocab_size"], qk_layernorm=True, tie_word_embeddings=False,
            attention_dropout=0.0, embd_pdrop=0.0, resid_pdrop=0.0)     # for acting = learning
    except (OSError, ValueError) as error:
        raise UsageError(f"{llm}, the language model of {model}, has no tokenizer or config that "
                         f"can be loaded: {textwrap.shorten(str(error), 200)}") from None
    if len(tokenizer) != text or sizes["vocab_size"] != text + 10 + K + 1:
        raise UsageError(f"{model} needs a tokenizer of {text} tokens ({llm} has {len(tokenizer)}) "
                         f"and a vocabulary of these, 10 special ones, {K} codes and MASK (it has "
                         f"{sizes['vocab_size']})")
    phi.name_or_path = llm
    if phi.hidden_act == "gelu_new":
        phi.hidden_act = "gelu_pytorch_tanh"        # the same formula in one kernel

    vq = [(name, tensor) for name, tensor in read_tensors(vq_model) if name.startswith("decoder.")]
    width = dict(vq).get("decoder.conv_out.weight", torch.empty(3, 128)).shape[1]
    decoder = MagvitDecoder(width).to(device).requires_grad_(False)
    load_weights(decoder, vq, "decoder.", vq_model)

    def tokenize(prompt):
        return tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]

    with torch.device("meta"):
        policy = Policy(phi, tokenize, tokenizer.bos_token_id, None, sizes["num_vq_tokens"], K)
    rotary = type(policy.lm.model.rotary_emb)(phi)  # its buffers are computed, not stored
    policy.lm.to_empty(device=device).model.rotary_emb = rotary.to(device)
    policy.decoder, policy.mixed = decoder, True
    load_weights(policy.lm, read_tensors(weights or model), "showo.", weights or model)
    return policy


# --------------------------------------------------------------------------------------------------
# 10. What a run leaves behind: scores, pictures, checkpoints.

GRID_COLUMNS = 4   # captions per category that are shown


@torch.no_grad()
def evaluate(policy, measure, sides, config):
    """Paint and measure fixed captions from fixed noise: only the weights can make a difference.

    sides: S dicts of C categories -> scores (S, C, n), first pictures (S, C, GRID_COLUMNS, H, W, 3)
    """
    n = config.eval_pictures
    prompts = [captions[i % len(captions)]
               for side in sides for captions in side.values() for i in range(n)]
    generator = torch.Generator(policy.device).manual_seed(config.seed + 1)
    path = paint(policy, prompts, config, config.eval_steps, generator, config.guidance)
    pixels = policy.decode(path.tokens).cpu()                                   # (S*C*n, H, W, 3)
    scores = judge(measure, to_images(pixels), prompts).view(len(sides), -1, n)  # (S, C, n)
    return scores, pixels.view(*scores.shape, *pixels.shape[1:])[:, :, :GRID_COLUMNS].clone()


def save_grid(path, title, captions, before, after, shown=(96, 256)):
    """A PNG of pairs of pictures, before | after, a category per row, with captions and scores.

    captions: category -> list; before, after: scores (C, n) and pictures (C, GRID_COLUMNS, H, W, 3)
    """
    side = min(max(before[1].shape[2], shown[0]), shown[1])     # of a picture in the PNG
    column, row, top, font = 2 * side + 28, side + 48, 30, ImageFont.load_default(size=13)
    sheet = Image.new("RGB", (GRID_COLUMNS * column + 12, len(captions) * row + top), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((12, 8), title, "black", font)
    for i, texts in enumerate(captions.values()):
        for j in range(GRID_COLUMNS):
            x, y = 12 + j * column, top + i * row
            caption = textwrap.shorten(texts[j % len(texts)], column // 6, placeholder=" ...")
            draw.text((x, y), caption, "black", font)
            for scores, pictures in (before, after):
                picture = Image.fromarray(pictures[i, j].numpy())
                sheet.paste(picture.resize((side, side), Image.Resampling.BOX), (x, y + 18))
                draw.rectangle((x, y + 18, x + side - 1, y + 17 + side), outline="gray")
                draw.text((x, y + 19 + side), f"{scores[i, j]:.2f}", "gray", font)
                x += side + 4
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)


def write_checkpoint(path, policy, state):
    """A folder in Show-o's own layout, and beside the weights what a run needs to go on: state.pt

    Written under another name, then renamed: who is killed in between keeps the last good one.
    """
    partial, old = path.with_suffix(".partial"), path.with_suffix(".old")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps({
        "_class_name": "Showo", "w_clip_vit": False, "load_from_showo": True,
        "vocab_size": policy.lm.config.vocab_size, "llm_vocab_size": policy.pad_id,
        "llm_model_path": policy.lm.config.name_or_path, "codebook_size": policy.codebook_size,
        "num_vq_tokens": policy.num_tokens}, indent=2))
    weights = {f"showo.{name}": tensor for name, tensor in policy.lm.state_dict().items()}
    save_file(weights, partial / "pytorch_model.safetensors", {"format": "pt"})
    torch.save(state, partial / "state.pt")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    os.replace(partial, path)
    shutil.rmtree(old, ignore_errors=True)


def last_checkpoint(out):
    """Where the last good checkpoint of an output folder is -> Path, that may not exist"""
    path = pathlib.Path(out) / "checkpoint"
    old = path.with_suffix(".old")              # killed between the two renames
    return old if old.exists() and not path.exists() else path


def read_checkpoint(path):
    """The state.pt of write_checkpoint -> dict. UsageError if it is missing or damaged."""
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        assert state.keys() & {"config", "settings"}        # torch saves other things, too
        return state
    except FileNotFoundError:
        raise UsageError(f"there is no {path} to go on from; name a run's folder with --out"
                         ) from None
    except Exception as error:                  # torch has half a dozen kinds for a damaged file
        raise UsageError(f"{path / 'state.pt'} is truncated or no checkpoint "
                         f"({type(error).__name__}); delete {path} or choose another --out"
                         ) from None


def peak_memory_mb():
    """The most memory held at once: the GPU's where there is one, else that of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2 ** 20
    if sys.platform == "win32":
        return math.nan                     # Windows has no `resource` module
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (20 if sys.platform == "darwin" else 10)


COLUMNS = ("update", "reward", "reward_se", "live", "painted", "ratio_first", "ratio", "clip", "kl",
           "grad", "loss", "lr", "seconds", "heldout")


def log_line(row, config, seconds_left):
    """One update in one line of fixed width. The reward comes first: it is what should move."""
    left = f"{int(seconds_left) // 60:3d}:{int(seconds_left) % 60:02d}"
    return (f"update {row['update']:4d}/{config.updates} | reward {row['reward']:.4f} "
            f"±{row['reward_se']:.4f} | live groups {row['live']:2d}/{row['painted']:2d} | "
            f"ratio {row['ratio_first']:.3f}→{row['ratio']:.3f} | clip {row['clip']:4.0%} | "
            f"kl {row['kl']:.4f} | grad {row['grad']:5.2f} | loss {row['loss']:+.4f} | "
            f"{row['seconds']:4.1f} s | left {left}")


def report(base, trained, categories, numbers):
    """Print the table per category and the closing block. base, trained: scores (2, C, n)"""
    print("\n" + " " * 28 + "".join(f"{name:>12}" for name in [*categories, "all"]))
    for side, name in enumerate(("trained-on captions", "held-out captions")):
        for when, scores in (("base", base[side]), ("trained", trained[side])):
            means = [*scores.mean(1).tolist(), float(scores.mean())]
            print(f"{name:20}{when:>8}" + "".join(f"{mean:12.3f}" for mean in means))
    print("---")
    for name, value in numbers.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


# --------------------------------------------------------------------------------------------------
# 11. The run. First everything that can be wrong with the command, then the loop.


def flag(name):
    """How a field of Config is spelled on the command line: clip_low -> --clip-low"""
    return "--" + name.replace("_", "-")


def check(config):
    """UsageError for the first setting that cannot work, naming the cause and the mend."""
    c, rules = config, []
    for field in dataclasses.fields(c):
        if field.type is float:
            rules.append((field.name, math.isfinite(getattr(c, field.name)), "is no finite number"))
    for name in ("layers", "pretrain_steps", "updates", "groups", "inner_epochs", "rollout_batch",
                 "micro_batch", "eval_every", "samples"):
        rules.append((name, getattr(c, name) >= 1, "must be at least 1"))
    for name in ("seed", "temperature", "guidance", "clip_high", "beta", "weight_decay",
                 "filter_tries", "warmup"):
        rules.append((name, getattr(c, name) >= 0, "must not be negative"))
    for name in ("clip_low", "prompt_dropout", "filter_quantile"):
        rules.append((name, 0 <= getattr(c, name) < 1, "must be at least 0 and below 1"))
    for name, known in (("transition", TRANSITIONS), ("optimizer", OPTIMIZERS)):
        rules.append((name, getattr(c, name) in known, f"is unknown; choose of {[*known]}"))
    rules += [
        ("group_size", c.group_size >= 2, "is too small: an advantage compares 2 pictures or more"),
        ("score_steps", abs(c.score_steps) <= c.steps, f"is more than the {c.steps} of --steps"),
        ("width", c.width > 0 and c.width % 16 == 0, "must be a multiple of 16, the head size"),
        ("lr", 0 < c.lr < 1, "must lie between 0 and 1; 1e-3 suits a small policy, 3e-6 Show-o"),
        ("pretrain_lr", 0 < c.pretrain_lr < 1, "must lie between 0 and 1"),
        ("max_grad_norm", c.max_grad_norm > 0, "must be positive"),
        ("eval_pictures", c.eval_pictures >= GRID_COLUMNS, f"must be at least {GRID_COLUMNS}"),
        ("model", not c.model or c.prompts or c.generate, "needs --prompts, a file of captions")]
    for name, good, why in rules:
        if not good:
            raise UsageError(f"{flag(name)} {getattr(c, name)} {why}")
    N = showo_config(c.model)["num_vq_tokens"] if c.model else rewards.GRID ** 2
    for name in ("steps", "eval_steps"):
        if not 1 <= getattr(c, name) <= N:
            raise UsageError(f"{flag(name)} {getattr(c, name)} must lie in 1..{N}: every step "
                             f"reveals a token, and there are {N}")


def pick_device(name):
    """The torch device of that name; auto is the fastest there is. UsageError if it is not here."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    here = [kind for kind, available in has.items() if available]
    if name not in ("auto", *here):
        raise UsageError(f"--device {name} is not here; choose of: auto, {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)


def claim_folder(config):
    """Make sure of the output folder -> state of the checkpoint to go on from, or None"""
    out, ours = pathlib.Path(config.out), dataclasses.asdict(config)
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written ({error.strerror}); "
                         "choose another folder") from None
    path = last_checkpoint(out)
    if config.resume:
        saved = read_checkpoint(path)
        for name in (*BASE_SETTINGS, "model", "vq_model", "weights", "prompts", "optimizer"):
            if ours[name] != saved["config"][name]:
                raise UsageError(f"{flag(name)} {ours[name]} cannot be resumed, the run in {out} "
                                 f"has {saved['config'][name]!r}; leave the flag out")
        return saved
    if path.exists() and not config.generate:
        held = read_checkpoint(path)["config"]
        other = [f"{flag(name)} {held.get(name)}" for name in ours
                 if name not in ("out", "resume", "device") and ours[name] != held.get(name)]
        if other:
            raise UsageError(f"--out {out} holds a run with other settings "
                             f"({', '.join(other)}); choose another --out, or --resume that run")
    return None


def read_prompts(path):
    """The captions of a file -> list of dicts that have a "prompt" and keep what else was there

    .txt has one per line; .json is a list, .jsonl a line each, of texts or of objects with a
    `caption` or `prompt`. UsageError if there are none.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if path.endswith(".json"):
            items = json.loads(text)
        else:
            items = [json.loads(line) for line in lines] if path.endswith(".jsonl") else lines
        records = [{"prompt": item} if isinstance(item, str) else
                   {**item, "prompt": item["prompt" if "prompt" in item else "caption"]}
                   for item in items]
        if not all(isinstance(record["prompt"], str) for record in records):
            raise TypeError
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text in UTF-8; give .txt, .json or .jsonl") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is no valid JSON ({error})") from None
    except (KeyError, TypeError):
        raise UsageError(f"{path} must hold texts, or objects with a text `caption` or `prompt`"
                         ) from None
    if not records:
        raise UsageError(f"{path} holds no caption")
    return records


def caption_sides(config):
    """The captions trained on, and those held out -> 2 dicts, category -> list[str]

    Of a file a tenth is held out, 64 at most, chosen by a checksum: the same ones in every run.
    """
    if not config.prompts:
        return [rewards.captions(heldout=False), rewards.captions(heldout=True)]
    prompts = list(dict.fromkeys(record["prompt"] for record in read_prompts(config.prompts)))
    if len(prompts) < 2:
        raise UsageError(f"{config.prompts} needs two captions: one to train on, one to hold out")
    prompts.sort(key=lambda prompt: zlib.crc32(prompt.encode()))
    held = min(64, -(-len(prompts) // 10))
    return [{"captions": prompts[held:]}, {"captions": prompts[:held]}]


def base_policy(config, device, prompts):
    """The policy before any reinforcement learning -> Policy, seconds of pretraining"""
    if config.model:
        policy = load_showo(config.model, config.vq_model, config.weights or None, device)
    else:
        policy = shapes_policy(config).to(device)
        if config.weights:
            load_weights(policy.lm, read_tensors(config.weights), "showo.", config.weights)
    room = policy.max_text - 2                      # for words, beside task, begin and end
    cut = sum(len(policy.tokenize(prompt)) > room for prompt in prompts)
    if cut:
        print(f"{cut} of {len(prompts)} captions are longer than {room} tokens, and are cut")
    if config.checkpointing:
        enable = getattr(policy.lm, "activation_checkpointing_enable", None)    # its newer name
        (enable or policy.lm.gradient_checkpointing_enable)()
    return policy, 0.0 if config.model or config.weights else load_base(policy, config)


OPTIMIZERS = ("adamw", "adafactor")


def make_optimizer(policy, config):
    """AdamW, or torch's Adafactor with a learning rate of the same meaning -> Optimizer"""
    groups = [{"params": [p for p in policy.lm.parameters() if p.dim() > 1]},
              {"params": [p for p in policy.lm.parameters() if p.dim() <= 1], "weight_decay": 0.0}]
    if config.optimizer == "adafactor":     # eps: steps of size lr, not of lr * size of the weight
        return torch.optim.Adafactor(groups, config.lr, eps=(None, 1.0), foreach=False,
                                     weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, config.lr, (0.9, 0.95), weight_decay=config.weight_decay,
                             fused=policy.device.type == "cuda")


class Interrupt:
    """Ctrl-C, made polite: the first one is noted in `asked`, the second stops at once."""

    def __enter__(self):
        self.asked, self.previous = False, signal.signal(signal.SIGINT, self.ask)
        return self

    def ask(self, *_):
        """The signal handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this update; Ctrl-C again to stop at once", flush=True)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.previous)


def train(config: Config):
    """Base, Mask-GRPO, comparison -> the closing numbers, or None if Ctrl-C ended the run early"""
    check(config)
    device, saved, out = pick_device(config.device), claim_folder(config), pathlib.Path(config.out)
    sides = caption_sides(config)
    most = max(map(len, sides[0].values()))     # all categories equally often, whatever their size
    prompts = [captions[i % len(captions)] for captions in sides[0].values() for i in range(most)]
    try:
        reward = rewards.load_reward(config.reward, device)
    except ValueError as error:
        raise UsageError(f"--reward {error}") from None
    measure = rewards.MEASURES.get(config.reward, reward)

    # the base, and a frozen copy of it for the KL; the reward is tried before it costs anything
    policy, pretrain_seconds = base_policy(config, device, prompts)
    tried = policy.decode(torch.zeros(2, policy.num_tokens, dtype=torch.long, device=device))
    judge(reward, to_images(tried), prompts[:2])
    reference = copy.deepcopy(policy).requires_grad_(False) if config.beta > 0 else None
    pictures, scored = config.groups * config.group_size, abs(config.score_steps) or config.steps
    print(f"{sum(p.numel() for p in policy.lm.parameters()):,} parameters | {device} | "
          f"{policy.dtype} | seed {config.seed} | per update {pictures} pictures, "
          f"{pictures * scored} transitions, {config.inner_epochs} optimizer step(s)", flush=True)
    optimizer = make_optimizer(policy, config)
    factor = warmup_cosine(config.warmup, config.updates)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    generator = torch.Generator(device).manual_seed(config.seed)
    sample_filter = SampleFilter(config.filter_quantile)
    if saved:
        path = last_checkpoint(out)
        load_weights(policy.lm, read_tensors(path), "showo.", path)
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        generator.set_state(saved["generator"])
        sample_filter.history.extend(saved["filter"])
        base, rows = saved["base"], saved["rows"]
    else:
        base, rows = evaluate(policy, measure, sides, config), []
    trained = None
    print(f"base: {base[0][0].mean():.3f} on trained-on captions, "
          f"{base[0][1].mean():.3f} on held-out ones", flush=True)

    with Interrupt() as interrupt, open(out / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
        for update in range(len(rows) + 1, config.updates + 1):
            start = time.time()
            row = {"update": update, "lr": schedule.get_last_lr()[0], "ratio_first": 1.0,
                   "ratio": 1.0, "clip": 0.0, "kl": 0.0, "grad": 0.0, "loss": 0.0}

            # paint and judge; then, unless every group vanished, weigh each picture and learn
            try:
                texts, path, kept, painted = sample_groups(
                    policy, reward, prompts, sample_filter, config, generator)
                advantage = group_advantage(kept).flatten().to(device)          # (B,)
                if texts:
                    prompt_ids = policy.encode(texts)                           # (B, L_text)
                    row |= learn(policy, reference, optimizer, prompt_ids, path, advantage, config)
            except (RunError, UsageError) as error:
                last = last_checkpoint(out)
                raise type(error)(f"update {update}: {error}; the last good state is "
                                  f"{last if last.exists() else 'the base'}") from None
            schedule.step()
            row |= {"reward": float(painted.mean()), "live": int((kept.std(1) > 0).sum()),
                    "reward_se": float(painted.std() / painted.numel() ** 0.5),
                    "painted": len(painted), "seconds": time.time() - start}

            # look at it, on captions that it never trained on
            look = update % config.eval_every == 0 or update == config.updates
            if look:
                trained = evaluate(policy, measure, sides, config)
                row["heldout"] = float(trained[0][1].mean())
                save_grid(out / "samples" / f"update_{update:05d}.png", f"held-out captions, same "
                          f"noise: base | update {update}", sides[1],
                          *((scores[1], pictures[1]) for scores, pictures in (base, trained)))
            rows.append(row)
            writer.writerow(row)
            file.flush()
            mean_seconds = sum(done["seconds"] for done in rows) / len(rows)
            print(log_line(row, config, mean_seconds * (config.updates - update)), flush=True)

            if look or interrupt.asked:
                write_checkpoint(out / "checkpoint", policy, {
                    "config": dataclasses.asdict(config), "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(), "generator": generator.get_state(),
                    "filter": list(sample_filter.history), "base": base, "rows": rows})
            if interrupt.asked:
                print(f"stopped after update {update}; go on with: "
                      f"python mask_grpo.py --resume --out {config.out}")
                return None

    trained = trained or evaluate(policy, measure, sides, config)
    save_grid(out / "comparison.png", "held-out captions, same noise: base | trained", sides[1],
              *((scores[1], pictures[1]) for scores, pictures in (base, trained)))
    numbers = {"seed": config.seed, "updates": config.updates,
               "base": float(base[0][0].mean()), "trained": float(trained[0][0].mean()),
               "heldout_base": float(base[0][1].mean()),
               "heldout_trained": float(trained[0][1].mean()), "pretrain_seconds": pretrain_seconds,
               "train_seconds": sum(row["seconds"] for row in rows),
               "peak_memory_mb": peak_memory_mb()}
    report(base[0], trained[0], sides[0], numbers)
    return numbers


def generate(config: Config):
    """Paint the captions of a file in the layout that GenEval's evaluator reads -> pictures painted

    out/generated/00000/metadata.jsonl, .../00000/samples/0000.png, ... Pictures that are there
    already stay, and each has its own noise: stopped and started again, the outcome is the same.
    """
    check(config)
    device, saved = pick_device(config.device), claim_folder(config)
    records, folder = read_prompts(config.generate), pathlib.Path(config.out) / "generated"
    names = ("model", "weights", "seed", "samples", "eval_steps", "guidance", "temperature")
    settings = {name: getattr(config, name) for name in names}
    settings |= {"captions": zlib.crc32(json.dumps(records).encode()),
                 "update": len(saved["rows"]) if saved else 0}
    note = folder / "settings.json"
    if note.exists() and json.loads(note.read_text()) != settings:
        raise UsageError(f"{folder} holds pictures of other settings (see {note}); "
                         "choose another --out, or move them away")
    policy, _ = base_policy(config, device, [record["prompt"] for record in records])
    if saved:
        path = last_checkpoint(config.out)
        load_weights(policy.lm, read_tensors(path), "showo.", path)
    folder.mkdir(exist_ok=True)
    note.write_text(json.dumps(settings))
    painted = 0
    for i, record in enumerate(tqdm(records, unit="caption")):
        samples = folder / f"{i:05d}" / "samples"
        files = [samples / f"{j:04d}.png" for j in range(config.samples)]
        if all(file.exists() for file in files):
            continue
        samples.mkdir(parents=True, exist_ok=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(record) + "\n")
        generator = torch.Generator(device).manual_seed(config.seed * 2 ** 32 + i)
        path = paint(policy, [record["prompt"]] * config.samples, config, config.eval_steps,
                     generator, config.guidance)
        for file, image in zip(files, to_images(policy.decode(path.tokens))):
            image.save(file.with_suffix(".partial"), "png")
            os.replace(file.with_suffix(".partial"), file)
        painted += len(files)
    print(f"{painted} pictures painted, {config.samples * len(records)} in {folder}")
    return painted


# --------------------------------------------------------------------------------------------------
# 12. The command line.


def parse(argv) -> Config:
    """The settings that a command line asks for; with --resume, those saved where it is silent."""
    source = inspect.getsource(Config)
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", source, re.MULTILINE))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for field in dataclasses.fields(Config):
        how = {"type": field.type, "metavar": field.type.__name__}
        if field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        preset = f"; with --model: {SHOWO[field.name]}" if field.name in SHOWO else ""
        default = "none" if field.default == "" else field.default
        text = f"{comments[field.name]} (default: {default}{preset})".replace("%", "%%")
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS, help=text, **how)

    def one_line(message):
        raise UsageError(f"{message}; -h lists the flags")

    parser.error = one_line                 # instead of a page of usage
    given = vars(parser.parse_args(argv))
    if given.get("resume"):
        out = given.get("out", Config.out)
        saved = read_checkpoint(last_checkpoint(out))["config"]
        given = {**saved, "device": Config.device, "out": out, **given}
    elif given.get("model"):
        given = {**SHOWO, **given}
    return Config(**given)


def main(argv=None):
    """Run a command line -> exit status: 0 done, 1 broken, 2 wrong command, 130 Ctrl-C"""
    logging.disable(logging.ERROR)          # of libraries; what matters is raised, and told below
    try:
        config = parse(argv)
        if config.generate:
            generate(config)
            return 0
        return 0 if train(config) else 130
    except torch.OutOfMemoryError:
        print("mask_grpo.py: out of memory; lower --rollout-batch and --micro-batch, add "
              "--checkpointing, or try --optimizer adafactor; what was saved is intact, go on "
              "with --resume", file=sys.stderr)
        return 1
    except (UsageError, RunError) as error:
        print("mask_grpo.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("\nmask_grpo.py: stopped; what was finished before is kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
