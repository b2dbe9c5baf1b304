# SPDX-License-Identifier: MIT
"""Mask-GRPO: reinforcement learning for image models that generate by unmasking, in one file.

The method of "Reinforcement Learning Meets Masked Generative Models" (Luo et al., 2025, arXiv
2510.13418v2; `Eq. n` is its numbering): GRPO, group relative policy optimization, for models that
generate as follows. A picture is a grid of N tokens, all MASK at first. Each of T steps draws a
token for every masked position, keeps the tokens that the policy is most confident of, and masks
the others again. One step that keeps two of four masked positions:

    position                    0       1       2       3
    drawn token y_i ~ p_i      sky     cat     sky     dog
    noisy confidence           -0.3    -2.1    -0.9    -1.6      log p_i(y_i) + noise_i
    next state                 sky     MASK    sky     MASK      positions 0 and 2 are revealed

As a decision process: the *state* is the prompt and the partly masked picture; the *action* is the
draws at all masked positions; the *next state* is what survives the ranking; the reward comes once,
for the finished picture. Many actions lead to the same next state: the draws at positions 1 and 3
are discarded. The paper asks: what is the probability of such a step? There are three answers
(section 4): `ar`, as in autoregressive models, is the probability of the action; `p1` sums over all
actions with this outcome, given the noise; `p2` keeps only the revealed tokens. One update:

  1. sample G pictures for each of P prompts; record when each token was revealed      (section 3)
  2. score each picture with a reward; resample groups whose rewards hardly differ  (sections 5, 7)
  3. compare each picture with its group: the advantage A, Eq. 12                      (section 5)
  4. ratio = p(step) under the current weights / under the sampling weights, Eq. 11    (section 4)
  5. maximise min(ratio A, clip(ratio) A), averaged over pictures and steps, minus beta times the
     KL to the base (the policy before any reinforcement learning), Eq. 10             (section 6)

Run it: `python mask_grpo.py` trains in a toy world of shapes, in 5 minutes on two CPU cores; with
`--model showlab/show-o-512x512 --prompts FILE` the paper's own system, on a GPU. `-h` has the rest.
README lists the differences from the paper and from its released code, each with a test.
Dims: B = P * G samples of P prompts (captions), N image tokens, K codes, T steps, L length of the
sequence, D hidden size, M pairs of a picture and a step, m of them in a micro-batch.
"""
import argparse
import copy
import dataclasses
import inspect                                     # -h shows the source of Config
import json
import logging
import math
import os
import pathlib
import random
import sys
import tempfile
import time
import typing
import warnings
import zlib
from collections import deque

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM

import reward as rewards
from reward import MagvitDecoder, Stop, blame, find, finish_update_first, log_line, read_weights
from reward import replacing, save, save_grid, save_rows, score

# --------------------------------------------------------------------------------------------------
# 1. Settings. Each field is a flag (clip_low is --clip-low) and its comment is the help text.


@dataclasses.dataclass
class Config:
    """All settings of a run. The defaults are for the shapes world; SHOWO below has others."""
    # task
    model: str = ""                 # a Show-o (hub id or folder) or MODULE:FUNCTION; "": shapes
    vq_model: str = "showlab/magvitv2"   # Show-o's image decoder: hub id or folder
    weights: str = ""               # other weights for the policy: file, folder, hub id[/FILE]
    prompts: str = ""               # captions (.txt, .json, .jsonl); a tenth is held out
    reward: str = "shapes"          # shapes, clip[:MODEL:TAG], hpsv2, pickscore, MODULE:FUNCTION
    out: str = "out"                # folder for checkpoint, base, metrics.csv and pictures
    resume: bool = False            # continue the run in --out, with its settings
    generate: str = ""              # do not train: sample pictures of these captions (a file)
    samples: int = 4                # pictures per caption of --generate
    device: str = "auto"            # cpu, cuda, mps, ...; auto takes an accelerator if there is one
    seed: int = 0                   # seeds the base, the choice of prompts and every draw
    # the shapes world's base
    width: int = 64                 # hidden size, a multiple of 16
    layers: int = 4                 # transformer blocks
    pretrain_steps: int = 2500      # masked-token prediction before any reinforcement learning
    # sampling
    steps: int = 12                 # T in training; fewer than --eval-steps is cheaper
    eval_steps: int = 12            # T in evaluation
    temperature: float = 2.0        # of the ranking's noise, which decays to 0; 0: no noise
    guidance: float = 0.0           # w in evaluation, (1 + w) cond - w uncond; training has none
    # Mask-GRPO
    transition: str = "p1"          # p1 (Eq. 14), p1_literal (no noise), p2 (Eq. 15), ar (Eq. 13)
    updates: int = 54               # rounds of sampling and learning
    groups: int = 24                # P, prompts per update
    group_size: int = 4             # G, pictures per prompt, at least 2
    inner_epochs: int = 1           # passes over one rollout; from the second on the ratio leaves 1
    length_normalize: bool = False  # ratio per token, not per step; no gain in the shapes world
    clip_low: float = 0.1           # the ratio is clipped below 1 - this
    clip_high: float = 0.2          # the ratio is clipped above 1 + this
    beta: float = 0.0               # weight of the KL to the frozen base; 0 keeps no copy of it
    score_steps: int = 0            # k: learn from k of the T steps of each picture; 0 is all
    reduction: str = "random"       # which k: random, or (the paper's) the first, the last
    filter_quantile: float = 0.1    # groups whose reward std is below this quantile are resampled
    filter_tries: int = 2           # how often missing groups are resampled per update
    # optimisation
    optimizer: str = "adamw"        # adamw, or adafactor, which needs almost no memory of its own
    lr: float = 1.5e-3              # peak learning rate; smaller for larger policies
    warmup: int = 5                 # updates of linear warm-up, times a cosine to 0 over the run
    weight_decay: float = 0.02      # on matrices only, not on biases and norms
    max_grad_norm: float = 1.0      # gradients with a larger norm are scaled down to it
    rollout_batch: int = 1024       # pictures sampled at once, for memory; changes the draws
    micro_batch: int = 192          # (picture, step) pairs per backward pass: affects memory only
    checkpointing: bool = False     # recompute activations in the backward pass to save memory
    # evaluation
    eval_every: int = 9             # updates between evaluations, picture grids and checkpoints
    eval_pictures: int = 48         # pictures per category, for training and held-out captions


# --------------------------------------------------------------------------------------------------
# 2. The policy is Show-o (Xie et al., 2024): a Phi language model whose vocabulary also holds image
#    codes, so that text and picture form one sequence. The transformer is trained, the decoder from
#    codes to pixels is frozen. The method needs encode(prompts) -> ids, forward(ids, tokens) ->
#    logits, decode(tokens) -> pictures, num_tokens N, codebook_size K, device. MASK is token K.

NUM_SPECIAL = 10    # ids between the text and the codes: pad, <soi>, <eoi>, task tokens, ...


class Policy(nn.Module):
    """p(code | prompt, partly masked picture), for all positions of the picture at once.

    Vocabulary [text | 10 special | K codes | MASK], sequence [text, <soi>, N image tokens, <eoi>].
    tokenize: str -> text ids. decoder: codes (B, h, w) -> pixels (B, 3, H, W) in [-1, 1].
    state_dict() has the names under which Show-o (showo.*) and MAGVIT-v2 (decoder.*) are published.
    """

    def __init__(self, phi: PhiConfig, tokenize, bos_id, decoder, num_tokens, codebook_size,
                 max_text=128):
        super().__init__()
        self.showo, self.decoder = PhiForCausalLM(phi), decoder
        self.tokenize, self.max_text = tokenize, max_text
        self.num_tokens, self.codebook_size = num_tokens, codebook_size
        self.offset = phi.vocab_size - 1 - codebook_size    # id of code 0; MASK is the last
        self.bos_id, self.pad_id = bos_id, self.offset - NUM_SPECIAL    # bos also ends the text
        self.soi_id, self.eoi_id, self.t2i_id = self.pad_id + 1, self.pad_id + 2, self.pad_id + 5
        self.dtype = torch.float32      # of the forward pass; the weights are always float32

    @property
    def device(self):
        """Where the weights are."""
        return self.showo.lm_head.weight.device

    def encode(self, prompts: list[str]):
        """Prompts in Show-o's layout [<t2i>, bos, words, bos], left padded -> (B, L_text) long"""
        rows = []
        for prompt in prompts:
            words = self.tokenize(prompt)
            bos = [] if words[:1] == [self.bos_id] else [self.bos_id]
            row = [self.t2i_id, *bos, *words, self.bos_id]
            if len(row) > self.max_text + 1:
                warnings.warn(f"captions of more than {self.max_text - 2} tokens are cut")
                row = row[:self.max_text] + [self.bos_id]
            rows.append(row)
        longest = max(map(len, rows))           # Show-o pads to 129; pads have no influence
        rows = [[self.pad_id] * (longest - len(row)) + row for row in rows]
        return torch.tensor(rows, device=self.device)

    def attention_mask(self, prompt_ids):
        """Omni-attention: text is causal and sees no picture; the picture sees all but pads.

        0 where a query may look, very negative elsewhere: prompt_ids (B, L_text) -> (B, 1, L, L)
        """
        after = self.num_tokens + 2                             # <soi>, the picture, <eoi>
        position = torch.arange(prompt_ids.shape[1] + after, device=prompt_ids.device)  # (L,)
        in_picture = (position >= prompt_ids.shape[1])[:, None]                 # (L, 1)
        causal = position[:, None] >= position                                  # (L, L)
        real = F.pad(prompt_ids != self.pad_id, (0, after), value=True)         # (B, L)
        allowed = real[:, None, :] & (causal | in_picture)                      # (B, L, L)
        allowed |= causal & ~real[:, :, None]   # pads see pads: in bf16 an empty row may give NaN
        mask = torch.zeros(allowed.shape, device=position.device)
        return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)[:, None]

    def forward(self, prompt_ids, tokens):
        """Logits of the codes, read at the image positions themselves (no next-token shift).

        prompt_ids (B, L_text) long, tokens (B, N) long, K for MASK -> (B, N, K)
        """
        soi = prompt_ids.new_full((len(tokens), 1), self.soi_id)                # (B, 1)
        eoi = prompt_ids.new_full((len(tokens), 1), self.eoi_id)                # (B, 1)
        ids = torch.cat([prompt_ids, soi, tokens + self.offset, eoi], dim=1)    # (B, L)
        mask = self.attention_mask(prompt_ids)                                  # (B, 1, L, L)
        codes = slice(self.offset, self.offset + self.codebook_size)            # rows of the head
        head = self.showo.lm_head
        with torch.autocast(self.device.type, torch.bfloat16, self.dtype == torch.bfloat16):
            hidden = self.showo.model(ids, attention_mask=mask, use_cache=False)[0]     # (B, L, D)
            hidden = hidden[:, -self.num_tokens - 1:-1]                         # (B, N, D)
            return F.linear(hidden, head.weight[codes], head.bias[codes])       # (B, N, K)

    @torch.no_grad()
    def decode(self, tokens):
        """The pixels of finished pictures: tokens (B, N) -> (B, H, W, 3) uint8"""
        side, pictures = math.isqrt(self.num_tokens), []
        at_once = max(1, 4096 // self.num_tokens)           # 4 pictures of 512 x 512, for memory
        for codes in tokens.view(-1, side, side).split(at_once):                # (b, h, w)
            pixels = self.decoder(codes)                                        # (b, 3, H, W)
            pixels = (((pixels + 1) / 2).clamp(0, 1) * 255).to(torch.uint8)  # truncates, as Show-o
            pictures.append(pixels.permute(0, 2, 3, 1))                         # (b, H, W, 3)
        return torch.cat(pictures)


# --------------------------------------------------------------------------------------------------
# 3. The sampler. A token is a code of the decoder, or MASK. A step draws a code at every masked
#    position and ranks the positions by confidence; Show-o adds Gumbel noise to the ranking, so
#    that pictures differ in their order, too. Guidance is classifier-free guidance.
#    Sections 3 to 6 need torch, F, math, typing, deque, and a policy as section 2 describes it.


def mask_schedule(T: int, N: int) -> list[int]:
    """Tokens still masked after each of T steps: floor(N cos(pi/2 (t + 1) / T)), and 0 at the end.

    mask_schedule(4, 16) = [14, 11, 6, 0]. Every step reveals at least one token, so T > N is
    a ValueError. Float32, as in Show-o: cos(pi/3) rounds below 0.5, which changes the floor.
    """
    if not 1 <= T <= N:
        raise ValueError(f"{T} steps: must be 1 to {N}, each reveals at least one of {N} tokens")
    masked, schedule = N, []
    for t in range(T):
        ratio = torch.tensor((t + 1) / T, dtype=torch.float32)
        wanted = int(torch.floor(N * torch.cos(ratio * math.pi * 0.5)))
        masked = max(T - 1 - t, min(masked - 1, wanted))    # leave a token for each later step
        schedule.append(masked)
    return schedule


class Trajectory(typing.NamedTuple):
    """How B pictures were sampled in T steps: all that the learner needs to know.

    A revealed token never changes again, so the final tokens and the step that revealed each give
    every state: before step t the picture is where(revealed_at < t, tokens, MASK).
    """
    tokens: torch.Tensor            # (B, N) long     the finished pictures
    revealed_at: torch.Tensor       # (B, N) long     the step that revealed each token, 0..T-1
    noise: torch.Tensor             # (B, T, N)       what was added to the confidences
    drawn: torch.Tensor             # (B, T, N) long  the draws at all positions, for `ar`


def gumbel(shape, generator, device):
    """Standard Gumbel noise: -log E, E exponential with mean 1. In place, to save memory.

    Clamped: E = 0 gives inf, and inf - inf is NaN, which sorts above everything.
    """
    noise = torch.empty(shape, device=device).exponential_(generator=generator)
    return noise.clamp_(1e-20, 1e20).log_().neg_()


@torch.no_grad()
def rollout(policy, prompt_ids, steps, temperature=1.0, guidance=0.0, null_ids=None,
            generator=None) -> Trajectory:
    """Sample a picture for each prompt, all in parallel, in T = `steps` steps.

    The noise is temperature * Gumbel, and Show-o's temperature compounds: step t multiplies what is
    left of it by 1 - (t + 1) / T. Guidance w makes the logits (1 + w) cond - w uncond, that is,
    uncond + (1 + w) (cond - uncond), where uncond has null_ids, the empty prompt. ValueError if the
    policy's logits are not (B, N, K).

    prompt_ids (B, L_text) long, null_ids (B, L_null) long
    """
    (B, _), N, K = prompt_ids.shape, policy.num_tokens, policy.codebook_size
    tokens = torch.full((B, N), K, device=prompt_ids.device)                    # (B, N) all MASK
    revealed_at = torch.full_like(tokens, steps)                                # (B, N) T: not yet
    noises, draws = [], []
    for t, num_masked in enumerate(mask_schedule(steps, N)):
        logits = policy(prompt_ids, tokens)                                     # (B, N, K)
        if logits.shape != (B, N, K):
            raise ValueError(f"logits of shape {(*logits.shape,)}: must be {(B, N, K)}")
        if guidance > 0:
            logits = (1 + guidance) * logits - guidance * policy(null_ids, tokens)
        logp = F.log_softmax(logits.float(), dim=-1)                            # (B, N, K)

        # draw a code everywhere by the Gumbel-max trick, an exact sample of p without a host
        # synchronisation; then the noise of the ranking, which is another Gumbel noise
        drawn = (logp + gumbel(logp.shape, generator, logp.device)).argmax(-1)  # (B, N)
        temperature *= 1 - (t + 1) / steps
        noise = temperature * gumbel((B, N), generator, logp.device)            # (B, N)
        confidence = logp.gather(-1, drawn[..., None]).squeeze(-1) + noise      # (B, N)

        # mask the least confident again; +inf where revealed before, so never masked again
        order = confidence.masked_fill(revealed_at < t, math.inf).argsort(-1)   # (B, N)
        masked = revealed_at > t                                                # (B, N) bool
        reveal = masked.scatter(1, order[:, :num_masked], False)                # (B, N) bool
        tokens = torch.where(reveal, drawn, tokens)
        revealed_at = revealed_at.masked_fill(reveal, t)
        noises.append(noise)
        draws.append(drawn)
    return Trajectory(tokens, revealed_at, torch.stack(noises, 1), torch.stack(draws, 1))


# --------------------------------------------------------------------------------------------------
# 4. The probability of a step. Step t reveals the positions U and masks the positions R again,
#    although a code was drawn there, too. What is the probability of this step?
#
#        transition   revealed U    masked again R                        is the probability of
#        ar           p_i(y_i)      p_j(y_j) of the discarded draw        the action       (Eq. 13)
#        p2           p_i(y_i)      -                                     no event, see *  (Eq. 15)
#        p1           p_i(y_i)      the chance that j ranks below U       the next state   (Eq. 14)
#        p1_literal   p_i(y_i)      the same, but without the noise       the same, without noise
#
#    * It sums to more than 1 over all next states, as it ignores which positions were chosen.
#    `ar` also includes the discarded draws: 35 of 36 in the first of 12 steps.
#    The gradient of log p1 is the expected gradient of log ar over the discarded draws, given
#    outcome and noise (Rao-Blackwell): the same mean, less variance. In the shapes world the
#    gradient of `ar` has over three times the norm, and it learns less (README).
#    None of these gradients is the whole policy gradient: how the weights move the ranking is not
#    credited, as the noise is taken as given and a comparison has no gradient.

TRANSITIONS = ("p1", "p1_literal", "p2", "ar")
FLOOR = -60.0       # in place of log 0: too small to count in a float32 sum, and still finite


def transition_logprob(logits, tokens, revealed_at, t, transition, noise=None, drawn=None):
    """log p(s_{t+1} | s_t), the log-probability of step t; `transition` is one of TRANSITIONS.

    U is revealed_at == t, R is revealed_at > t. noise: what the sampler added to the
    confidences (None: no noise). drawn: its draws, for `ar`. ValueError for another transition.

    Let position 0, with q_0 = (.7, .2, .1), reveal code 0, and position 1, with q_1 = (.6, .3, .1),
    draw code 2 and stay masked: ar = .7 * .1, p2 = .7, p1 = .7 * (.6 + .3 + .1), as all of q_1 is
    below .7. If position 1 reveals code 0 instead, p1 = .6 * (.2 + .1): position 0 cannot have
    drawn code 0. But it can if noise of log 1.5 lifts position 1, whose .6 then ranks as .9:
    p1 = .6 * (.7 + .2 + .1), while p1_literal, still .6 * (.2 + .1), rules out what may have been.

    logits (B, N, K), tokens, revealed_at, noise, drawn (B, N), t int or (B,) -> (B,)
    """
    if transition not in TRANSITIONS:
        raise ValueError(f"transition {transition!r}: must be one of {', '.join(TRANSITIONS)}")
    t = t[:, None] if torch.is_tensor(t) else t                                 # (B, 1)
    revealed = revealed_at == t                                                 # (B, N) bool: U
    remasked = revealed_at > t                                                  # (B, N) bool: R
    at_least_float32 = torch.promote_types(logits.dtype, torch.float32)
    logp = F.log_softmax(logits, dim=-1, dtype=at_least_float32)                # (B, N, K)

    if transition == "ar":
        confidence = logp.gather(-1, drawn[..., None]).squeeze(-1)              # (B, N)
        return (confidence * (revealed | remasked)).sum(-1)                     # (B,)

    token = tokens.masked_fill(~revealed, 0)            # (B, N) MASK, if any, is not a valid index
    confidence = logp.gather(-1, token[..., None]).squeeze(-1)                  # (B, N)
    p2 = (confidence * revealed).sum(-1)                                        # (B,)
    if transition == "p2":
        return p2

    # The sampler compared noisy confidences, so both sides of this comparison carry the noise, too.
    # It is taken as given: p1 is the probability of the step under this noise.
    if noise is None or transition == "p1_literal":
        noise = torch.zeros_like(confidence)                                    # (B, N)
    # the lowest noisy confidence among the kept tokens
    threshold = (confidence + noise).masked_fill(~revealed, math.inf).amin(-1)  # (B,)
    loses = logp + noise[..., None] < threshold[:, None, None]                  # (B, N, K) bool
    stays_masked = logp.masked_fill(~loses, FLOOR).logsumexp(-1)                # (B, N)
    return p2 + (stays_masked * remasked).sum(-1)                               # (B,)


def num_factors(revealed_at, t, transition):
    """How many probabilities a step multiplies: revealed_at (B, N), t (B,) -> (B,) long"""
    t = t[:, None]                                                              # (B, 1)
    return (revealed_at == t if transition == "p2" else revealed_at >= t).sum(-1)


def replay_logprob(policy, prompt_ids, trajectory, b, t, transition):
    """transition_logprob of recorded steps under a policy, in any order and any batch.

    prompt_ids (B, L_text), pictures b (M,) long, their steps t (M,) long -> (M,)
    """
    tokens, revealed_at = trajectory.tokens[b], trajectory.revealed_at[b]       # (M, N) each
    state = tokens.masked_fill(revealed_at >= t[:, None], policy.codebook_size)     # (M, N)
    logits = policy(prompt_ids[b], state)                                       # (M, N, K)
    return transition_logprob(logits, tokens, revealed_at, t, transition,
                              trajectory.noise[b, t], trajectory.drawn[b, t])


# --------------------------------------------------------------------------------------------------
# 5. The advantage: how much better a picture is than the others of its group, for each of its steps
#    alike. The group is the baseline, so no value network is needed; equal rewards teach nothing.


def group_advantage(reward, eps=1e-4):
    """(reward - mean) / std in each group (Eq. 12): [[1, 0, 0, 1]] -> [[.87, -.87, -.87, .87]].

    The std is unbiased. eps keeps rounding in equal rewards from becoming a full-size advantage.
    reward (P, G) -> (P, G)
    """
    return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + eps)


class SampleFilter:
    """Finds vanishing groups (section 3.3 of the paper) by their standard deviations.

    A group vanishes if the std of its rewards is 0, or below the quantile of the last `window`
    groups' stds. All are kept at quantile 0, and until `warmup` stds have been recorded.
    """

    def __init__(self, quantile, warmup=32, window=512):
        self.quantile, self.warmup, self.history = quantile, warmup, deque(maxlen=window)

    def keep(self, std):
        """Which groups to learn from, recording their stds: std (P,) -> (P,) bool"""
        keep = torch.ones_like(std, dtype=torch.bool)
        if self.quantile > 0 and len(self.history) >= self.warmup:
            keep = (std >= torch.tensor(self.history).quantile(self.quantile)) & (std > 0)
        self.history.extend(std.tolist())
        return keep


# --------------------------------------------------------------------------------------------------
# 6. The loss. At ratio 1 its value is minus the mean advantage, 0 by construction, but its gradient
#    is -A grad log p, which is all the learning there is. So watch the reward, not the loss.

MAX_LOG_RATIO = 20.0    # two factors at FLOOR in one step would give exp(120): inf in float32


def grpo_loss(logp, logp_old, advantage, clip_low, clip_high):
    """-mean of min(ratio A, clip(ratio, 1 - low, 1 + high) A), Eq. 10 and 11: all (M,) -> (), dict

    Clipping stops only what would push a ratio further out: up for A > 0, down for A < 0.
    """
    assert logp.shape == logp_old.shape == advantage.shape and logp.dim() == 1
    ratio = (logp - logp_old).clamp(max=MAX_LOG_RATIO).exp()                    # (M,)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)                          # (M,)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()        # ()
    stopped = ratio * advantage > clipped * advantage                           # (M,) bool
    return loss, {"ratio": ratio.detach(), "clip": stopped.float()}


def kl_k3(logp, logp_ref):
    """Schulman's k3 estimate of KL(p || p_ref): r - 1 - log r, r = p_ref / p. (M,) -> (M,), >= 0

    It estimates the KL for `p1` and `ar` only; p2 and p1_literal are not probabilities of what was
    sampled, so for them it is a mere penalty. Its expected gradient is that of KL(p_ref || p).
    """
    log_ratio = (logp_ref - logp).clamp(max=MAX_LOG_RATIO)                      # (M,)
    return log_ratio.exp() - 1 - log_ratio


# --------------------------------------------------------------------------------------------------
# 7. One update. It costs P * G pictures of T forward passes each, and then a forward and a backward
#    pass for each of the P * G * T steps (with the paper's settings, 4,800 of each).


def sample(policy, prompts, config, steps, generator, guidance=0.0) -> Trajectory:
    """A rollout of B prompts, `rollout_batch` pictures at a time."""
    null_ids = policy.encode([""])                                              # (1, L_null)
    parts = [rollout(policy, ids, steps, config.temperature, guidance,
                     null_ids.expand(len(ids), -1), generator)
             for ids in policy.encode(prompts).split(config.rollout_batch)]
    return Trajectory(*map(torch.cat, zip(*parts)))


def sample_groups(policy, reward, captions, sample_filter, config, generator):
    """Sample groups until `config.groups` are worth learning from, or the tries are used up.

    -> prompts (list of B), Trajectory and rewards (P, G) of those kept; rewards (P', G) of all
    """
    G, kept_prompts, kept_parts, kept_rewards, all_rewards = config.group_size, [], [], [], []
    for _ in range(1 + config.filter_tries):
        missing = config.groups - len(kept_prompts) // G
        chosen = torch.randint(len(captions), (missing,), generator=generator,
                               device=generator.device)                         # (missing,)
        prompts = [captions[i] for i in chosen.tolist() for _ in range(G)]
        trajectory = sample(policy, prompts, config, config.steps, generator)
        scores = score(reward, policy.decode(trajectory.tokens), prompts)       # (missing * G,)
        scores = scores.view(missing, G)                                        # (missing, G)
        keep = sample_filter.keep(scores.std(1))                                # (missing,) bool
        keep_picture = keep.repeat_interleave(G)                                # (missing * G,)
        kept_prompts += [prompt for prompt, good in zip(prompts, keep_picture.tolist()) if good]
        kept_parts.append([x[keep_picture.to(x.device)] for x in trajectory])
        kept_rewards.append(scores[keep])
        all_rewards.append(scores)
        if keep.all():
            break
    trajectory = Trajectory(*map(torch.cat, zip(*kept_parts)))
    return kept_prompts, trajectory, torch.cat(kept_rewards), torch.cat(all_rewards)


def scored_steps(B, T, config, generator):
    """Which steps of which pictures to learn from -> (M, 2) long, pairs of a picture and a step

    k random steps, new in every update, estimate Eq. 10's mean over all T without bias. The first
    or last k (the paper's computational reduction) are another objective.
    """
    k, steps = config.score_steps or T, torch.arange(T, device=generator.device).expand(B, T)
    if k < T and config.reduction == "random":
        steps = torch.rand(B, T, generator=generator, device=steps.device).argsort(1)   # (B, T)
    span = {"random": slice(k), "first": slice(k), "last": slice(T - k, T)}[config.reduction]
    steps = steps[:, span].sort(1).values                                       # (B, k)
    pictures = torch.arange(B, device=steps.device)[:, None].expand(B, k)       # (B, k)
    return torch.stack([pictures, steps], dim=-1).flatten(0, 1)                 # (B * k, 2)


def learn(policy, reference, optimizer, prompt_ids, trajectory, advantage, config, generator):
    """The inner epochs over one rollout, an optimizer step each -> dict of numbers for the log

    prompt_ids (B, L_text), trajectory of B pictures, advantage (B,). Raises Stop at NaN or inf.
    """
    (B, T, _), transition = trajectory.noise.shape, config.transition
    pairs = scored_steps(B, T, config, generator)                               # (M, 2) b and t
    # the mean of Eq. 10 is over all P groups: one that the filter left out counts as 0
    weight = 1 / (config.groups * config.group_size * (config.score_steps or T))
    logp_old = []
    for epoch in range(config.inner_epochs):
        parts = []
        for i, (b, t) in enumerate(chunk.unbind(1) for chunk in pairs.split(config.micro_batch)):
            logp = replay_logprob(policy, prompt_ids, trajectory, b, t, transition)     # (m,)
            if epoch == 0:                      # the weights are still those that sampled
                logp_old.append(logp.detach())
            per_token = config.length_normalize
            length = num_factors(trajectory.revealed_at[b], t, transition) if per_token else 1
            loss, part = grpo_loss(logp / length, logp_old[i] / length, advantage[b],
                                   config.clip_low, config.clip_high)
            if reference is not None:
                with torch.no_grad():
                    logp_ref = replay_logprob(reference, prompt_ids, trajectory, b, t, transition)
                kl = kl_k3(logp / length, logp_ref / length)                    # (m,)
                loss, part["kl"] = loss + config.beta * kl.mean(), kl.detach()
            loss = loss * len(b) * weight       # the micro-batch's part of Eq. 10's mean
            loss.backward()
            parts.append({"loss": loss.detach()[None], **part})
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}   # (M,) each
        log = {name: float(x.sum() if name == "loss" else x.mean()) for name, x in whole.items()}
        log["grad"] = float(nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
        if not math.isfinite(log["loss"] + log["grad"]):
            raise Stop(f"the loss is {log['loss']}, its gradient {log['grad']}; try a smaller --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return log


# --------------------------------------------------------------------------------------------------
# 8. The training loop. `set_up` (section 12) checks all input and prepares what `run` holds.


def set_lr(optimizer, peak, i, warmup, total):
    """The learning rate of update i = 0, 1, ...: a linear warm-up times a cosine to 0 -> float"""
    cosine = (1 + math.cos(math.pi * min(1.0, i / total))) / 2
    lr = peak * (min(1.0, (i + 1) / (warmup + 1)) * cosine)
    for group in optimizer.param_groups:        # by hand: there is no scheduler to restore wrongly
        group["lr"] = lr
    return lr


def train(config: Config):
    """Base, Mask-GRPO, comparison -> the closing numbers; None if Ctrl-C or SIGTERM ended it"""
    run, trained = set_up(config), None
    with finish_update_first() as asked_to_stop:        # the signals so far: Ctrl-C, SIGTERM
        for update in range(len(run.rows) + 1, config.updates + 1):
            start = time.time()
            lr = set_lr(run.optimizer, config.lr, update - 1, config.warmup, config.updates)

            # sample groups of pictures and score them; learn, unless every group vanished
            with blame(f"update {update}", Stop):           # a Stop in here names the update
                prompts, trajectory, kept, all_rewards = sample_groups(
                    run.policy, run.reward, run.captions, run.sample_filter, config, run.generator)
                numbers = {"ratio": 1.0, "clip": 0.0, "kl": 0.0, "grad": 0.0, "loss": 0.0}
                if prompts:
                    advantage = group_advantage(kept).flatten().to(run.policy.device)   # (B,)
                    numbers |= learn(run.policy, run.reference, run.optimizer,
                                     run.policy.encode(prompts), trajectory, advantage, config,
                                     run.generator)
            row = {"update": update, "reward": float(all_rewards.mean()),
                   "reward_se": float(all_rewards.std() / all_rewards.numel() ** 0.5),
                   "live": sum(len(set(group)) > 1 for group in kept.tolist()),
                   "sampled": len(all_rewards),
                   **numbers, "lr": lr, "seconds": time.time() - start, "heldout": ""}

            # evaluate (shapes: 1 if correct, else 0); save what --resume needs before the pictures
            evaluated = update % config.eval_every == 0 or update == config.updates
            if evaluated:
                trained = evaluate(run.policy, run.measure, run.splits, config)
                row["heldout"] = float(trained[0][1].mean())        # split 1: held out
            run.rows.append(row)
            stop = bool(asked_to_stop)          # a signal from here on waits for the next update
            print(log_line(run.rows, config.updates), flush=True)
            if evaluated or stop:
                save_checkpoint(run, config)
            save_rows(run.rows, f"{config.out}/metrics.csv")
            if evaluated:
                save_grid(f"{config.out}/samples/update_{update:05d}.png",
                          f"base | update {update}", run.splits[1], run.base, trained)
            if stop:
                print(f"stopped after update {update}; resume with: "
                      f"python mask_grpo.py --resume --out {config.out}")
                return None
    return report(run, trained or evaluate(run.policy, run.measure, run.splits, config), config)


# --------------------------------------------------------------------------------------------------
# 9. That was the whole method. From here on: two policies to run it on, the shapes world's (9) and
#    Show-o (10), then evaluation and checkpoints (11), the set-up (12) and the command line (13).
#    The shapes world has a small Phi, a decoder of tiles, and a base trained from scratch. Its text
#    tokens are phrases ("left of a star"): a model this small learns late how words combine.
#    The base is most confident of the background and leaves the objects for its last steps, which
#    reveal 4 or 5 tokens at once, blind to each other. Mask-GRPO learns to place the objects first.
#    The noise, --temperature 2, reveals some objects early, which it can learn from: without noise
#    the training captions improve, the held-out ones far less (README).


class PlacedEmbedding(nn.Embedding):
    """Token embeddings plus a learned vector per place, from the end, as prompts are padded left.

    With RoPE alone a model this small learns later where each object belongs.
    """

    def __init__(self, vocab_size, width, places=192):
        super().__init__(vocab_size, width)
        self.place = nn.Parameter(torch.empty(places, width))
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.1)

    def forward(self, ids):
        """ids (B, L) -> (B, L, D)"""
        return super().forward(ids) + self.place[-ids.shape[1]:]


def shapes_policy(config) -> Policy:
    """A Policy with random weights whose text vocabulary is the phrases of the shapes world."""
    words = ["<|endoftext|>", *rewards.PHRASES]
    torch.manual_seed(config.seed)
    phi = PhiConfig(
        vocab_size=len(words) + NUM_SPECIAL + rewards.CODEBOOK_SIZE + 1,
        hidden_size=config.width, intermediate_size=config.width, hidden_act="relu",
        num_hidden_layers=config.layers, num_attention_heads=config.width // 16, qk_layernorm=True,
        initializer_range=0.1,              # Phi's 0.02 suits a width of 2048, not of 64
        attn_implementation="eager",        # for so few tokens faster than sdpa on a CPU
        # distances are short (neighbours are 1 and 6 apart): rotate all of a head, and faster
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0})

    def tokenize(prompt):
        for word in set(rewards.phrases(prompt)) - set(words):
            raise Stop(f"the shapes world does not know {word!r}; "
                       "--model takes a policy with a larger vocabulary")
        return [words.index(word) for word in rewards.phrases(prompt)]

    policy = Policy(phi, tokenize, 0, rewards.TileDecoder(), rewards.GRID ** 2,
                    rewards.CODEBOOK_SIZE)
    policy.showo.model.embed_tokens = PlacedEmbedding(phi.vocab_size, config.width)
    return policy


def pretrain(policy, config, batch=32, lr=4e-3, prompt_dropout=0.1):
    """Masked-token prediction on correct pictures: mask a random share of tokens, predict them.

    The base sees the held-out captions, too; the RL updates never do.
    A share of the prompts is replaced by "", so that guidance has an unconditional model.
    """
    rng, generator = random.Random(config.seed), torch.Generator().manual_seed(config.seed)
    N, MASK, total = policy.num_tokens, policy.codebook_size, config.pretrain_steps
    prompts, pictures = rewards.draw_pairs(min(20_000, batch * total), rng)     # (n,), (n, N)
    optimizer = torch.optim.AdamW(policy.parameters(), lr, (0.9, 0.98), fused=True)
    for i in range(total):
        set_lr(optimizer, lr, i, 100, total)
        index = torch.randint(len(prompts), (batch,), generator=generator)      # (batch,)
        text = [prompts[j] if rng.random() > prompt_dropout else "" for j in index.tolist()]
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
        if (i + 1) % 500 == 0 or i + 1 == total:
            print(f"pretrain {i + 1:5d}/{total} | cross-entropy {loss.item():.3f}", flush=True)


def load_base(policy, config):
    """Load the base from --out/base.pt, or pretrain and save it -> its seconds of pretraining"""
    path, start = pathlib.Path(config.out, "base.pt"), time.time()
    settings = [config.width, config.layers, config.pretrain_steps, config.seed]
    if not path.exists():
        pretrain(policy, config)
        save({"policy": policy.state_dict(), "settings": settings, "seconds": time.time() - start},
             path)
    with blame(f"{path} cannot be used; delete it or choose another --out"):
        base = torch.load(path, "cpu", weights_only=True)
        if base["settings"] != settings:
            raise Stop(f"it has other settings (width, layers, steps, seed: {base['settings']})")
        load_weights(policy, base["policy"], path)
        return base["seconds"]


# --------------------------------------------------------------------------------------------------
# 10. Show-o as a policy: the published weights in the class of section 2 (the decoder: reward.py).

# Defaults for Show-o, 512 x 512: the paper's group size, T, learning rate and batch, the released
# code's reward, guidance and warm-up. 625 updates draw 10,000 captions, as many as its file has.
SHOWO = dict(reward="clip", steps=50, eval_steps=50, temperature=1.0, guidance=5.0, updates=625,
             groups=16, group_size=6, lr=3e-6, warmup=62, rollout_batch=24, micro_batch=8,
             checkpointing=True, eval_every=10, eval_pictures=16)


def load_weights(policy, weights, source):
    """Fill a policy by name, strictly; other modules (an encoder) are left out by their prefix."""
    own = policy.state_dict()
    parts = {name.split(".")[0] for name in own}
    without_storage = any(x.is_meta for x in own.values())
    with blame(f"the weights of {source} do not fit"):
        weights = {name: x.to(own[name].dtype) if name in own else x
                   for name, x in weights.items() if name.split(".")[0] in parts}
        policy.load_state_dict(weights, assign=without_storage)     # assigned: no second copy


def load_showo(model, vq_model="showlab/magvitv2", weights=None, device="cpu") -> Policy:
    """Show-o and its decoder from hub ids or local folders. `weights`: in place of the model's own.

    Built without storage, then filled from the files. Raises Stop if anything does not fit.
    """
    path, device = find(model, "config.json"), torch.device(device)
    with blame(f"{path} is not Show-o's"):
        config = json.loads(path.read_text())
        llm, text, vocab_size, K, N = (config[name] for name in (
            "llm_model_path", "llm_vocab_size", "vocab_size", "codebook_size", "num_vq_tokens"))
    with blame(f"{llm}, the language model of {model}, has no tokenizer or config here"):
        tokenizer = AutoTokenizer.from_pretrained(llm)
        # no dropout: sampler and learner must agree
        phi = PhiConfig.from_pretrained(
            llm, vocab_size=vocab_size, qk_layernorm=True, tie_word_embeddings=False,
            attention_dropout=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    if len(tokenizer) != text or vocab_size != text + NUM_SPECIAL + K + 1:
        raise Stop(f"{model}: its {vocab_size} ids are not {text} of text, {NUM_SPECIAL} special, "
                   f"{K} codes and MASK, or {llm} has a tokenizer of {len(tokenizer)}, not {text}")
    if phi.hidden_act == "gelu_new":
        phi.hidden_act = "gelu_pytorch_tanh"            # the same formula in one kernel

    def tokenize(prompt):
        return tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]

    vq, source = read_weights(vq_model), weights or model
    width = vq.get("decoder.conv_out.weight", torch.empty(3, 128)).shape[1]
    with torch.device("meta"):
        decoder = MagvitDecoder(width).requires_grad_(False)
        policy = Policy(phi, tokenize, tokenizer.bos_token_id, decoder, N, K)
    policy.showo.model.rotary_emb = type(policy.showo.model.rotary_emb)(phi)    # is not in the file
    load_weights(policy, {**read_weights(source), **vq}, f"{source} and {vq_model}")
    policy.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return policy.to(device)


# --------------------------------------------------------------------------------------------------
# 11. Evaluation, the checkpoint and the report.


@torch.no_grad()
def evaluate(policy, measure, splits, config):
    """Sample and score fixed captions with fixed noise: only the weights can make a difference.

    splits: S dicts of C categories -> scores (S, C, n), the first pictures (S, C, 4, H, W, 3)
    """
    n = config.eval_pictures
    prompts = [captions[i % len(captions)]
               for split in splits for captions in split.values() for i in range(n)]
    generator = torch.Generator(policy.device).manual_seed(config.seed + 1)
    trajectory = sample(policy, prompts, config, config.eval_steps, generator, config.guidance)
    pixels = policy.decode(trajectory.tokens).cpu()                             # (S*C*n, H, W, 3)
    scores = score(measure, pixels, prompts).view(len(splits), -1, n)           # (S, C, n)
    pictures = pixels.reshape(*scores.shape, *pixels.shape[1:])[:, :, :rewards.GRID_COLUMNS]
    return scores, pictures.clone()


def save_checkpoint(run, config):
    """checkpoint.pt: all that --resume needs."""
    save({"config": dataclasses.asdict(config), "directory": os.getcwd(),
          "policy": run.policy.state_dict(), "optimizer": run.optimizer.state_dict()["state"],
          "generator": run.generator.get_state(), "device": run.policy.device.type,
          "filter": list(run.sample_filter.history), "splits": run.splits, "base": run.base,
          "rows": run.rows}, pathlib.Path(config.out, "checkpoint.pt"))


def read_checkpoint(out, mmap=False):
    """The checkpoint of a folder -> dict. Raises Stop if it is missing or damaged."""
    path = pathlib.Path(out, "checkpoint.pt")
    with blame(f"no run can be resumed from {path}; name a run's folder with --out"):
        state = torch.load(path, "cpu", weights_only=True, mmap=mmap)
        Config(**state["config"])
        return state


def report(run, trained, config):
    """Print the table per category and the closing block, save comparison.png -> its numbers"""
    print("\n" + " " * 28 + "".join(f"{name:>12}" for name in [*run.splits[0], "all"]))
    for i, name in enumerate(("training captions", "held-out captions")):
        for when, scores in (("base", run.base[0]), ("trained", trained[0])):   # (2, C, n)
            means = [*scores[i].mean(1).tolist(), float(scores[i].mean())]
            print(f"{name:20}{when:>8}" + "".join(f"{mean:12.3f}" for mean in means))
    numbers = {"seed": config.seed, "updates": config.updates}
    for i, name in enumerate(("", "heldout_")):
        numbers |= {f"{name}base": float(run.base[0][i].mean()),
                    f"{name}trained": float(trained[0][i].mean())}
    numbers |= {"pretrain_seconds": run.pretrain_seconds,
                "train_seconds": sum(row["seconds"] for row in run.rows),
                "peak_gpu_memory_mb": torch.cuda.max_memory_allocated() / 2 ** 20}
    print("---")
    for name, value in numbers.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")
    save_grid(f"{config.out}/comparison.png", "base | trained", run.splits[1], run.base, trained)
    return numbers


# --------------------------------------------------------------------------------------------------
# 12. The set-up: whatever can be wrong is found here, before any long work.

LIMITS = {          # (least, most); other counts are at least 1, other numbers at least 0
    "seed": (0, 2 ** 31 - 1), "width": (16, 4096), "group_size": (2, 10 ** 9), "lr": (1e-9, 1),
    "clip_low": (0, 0.99), "filter_quantile": (0, 0.99), "max_grad_norm": (1e-9, 10 ** 9),
    "filter_tries": (0, 10 ** 9), "warmup": (0, 10 ** 9), "score_steps": (0, 10 ** 9),
    "eval_pictures": (rewards.GRID_COLUMNS, 10 ** 9)}


def flag(name):
    """How a field of Config is spelled on the command line: clip_low -> --clip-low"""
    return "--" + name.replace("_", "-")


def check(config):
    """Raises Stop at the first setting that cannot work -> the torch device"""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        least, most = LIMITS.get(field.name, (int(field.type is int), 10 ** 9))
        if field.type in (int, float) and not least <= value <= most:       # NaN fails, too
            raise Stop(f"{flag(field.name)} {value}: must lie in {least}..{most}")
    if config.width % 16:
        raise Stop(f"--width {config.width}: must be a multiple of 16, the size of a head")
    if config.score_steps > config.steps:
        raise Stop(f"--score-steps {config.score_steps}: there are only --steps {config.steps}")
    if config.model and not (config.prompts or config.generate):
        raise Stop(f"--model {config.model} needs --prompts, a file of captions")
    here = ["auto", "cpu"]
    if torch.accelerator.is_available():
        here.append(torch.accelerator.current_accelerator().type)
    if config.device not in here:
        raise Stop(f"--device {config.device} is not available; choose from {', '.join(here)}")
    with blame(f"--out {config.out} cannot be written; choose another folder"):
        os.makedirs(config.out, exist_ok=True)
        tempfile.TemporaryFile(dir=config.out).close()
    return torch.device(here[-1] if config.device == "auto" else config.device)


def make_policy(config, device):
    """The policy that --model names, with --weights if given -> Policy, or the reader's own"""
    own = rewards.names_function(config.model)
    if own:
        with blame(f"--model {config.model}"):
            policy = rewards.load_function(config.model)(config, device)
    elif config.model:
        policy = load_showo(config.model, config.vq_model, config.weights or None, device)
    else:
        policy = shapes_policy(config).to(device)
    if config.weights and (own or not config.model):
        load_weights(policy, read_weights(config.weights), config.weights)
    if config.checkpointing and not own:            # your own function sees the config itself
        enable = getattr(policy.showo, "activation_checkpointing_enable", None)     # newer name
        (enable or policy.showo.gradient_checkpointing_enable)()
    with blame("--steps and --eval-steps", ValueError):
        mask_schedule(max(config.steps, config.eval_steps), policy.num_tokens)
    return policy


def make_optimizer(policy, config):
    """AdamW, or torch's Adafactor with a learning rate on the same scale -> Optimizer"""
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1]},
              {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}]
    if config.optimizer == "adafactor":     # eps: steps of size lr, not of lr * size of the weight
        return torch.optim.Adafactor(groups, config.lr, eps=(None, 1.0), foreach=False,
                                     weight_decay=config.weight_decay)
    return torch.optim.AdamW(groups, config.lr, (0.9, 0.95), weight_decay=config.weight_decay,
                             fused=policy.device.type == "cuda")


def restore(run, saved, config):
    """Continue where a checkpoint was saved, on whatever device that was."""
    load_weights(run.policy, saved["policy"], "the checkpoint")
    groups = run.optimizer.state_dict()["param_groups"]         # their settings are not restored
    run.optimizer.load_state_dict({"state": saved["optimizer"], "param_groups": groups})
    run.sample_filter.history.extend(saved["filter"])
    run.base, run.rows = saved["base"], saved["rows"]
    if saved["device"] == run.policy.device.type:
        run.generator.set_state(saved["generator"])
    else:
        run.generator.manual_seed(config.seed + len(run.rows))
        print(f"the checkpoint was saved on {saved['device']}: draws differ from here on")


def try_out(policy, reward, splits, config):
    """Sample and score two captions in one step. Raises Stop if policy or reward fail."""
    prompts = [caption for split in splits for texts in split.values() for caption in texts]
    ours = isinstance(policy, Policy)           # then all captions are encoded: a word may be new
    with blame(f"--model {config.model or 'shapes'}", Stop if ours else Exception):
        prompt_ids = policy.encode(prompts if ours else prompts[:2])            # (., L_text)
        pixels = policy.decode(rollout(policy, prompt_ids[:2], 1).tokens)       # (2, H, W, 3)
    score(reward, pixels, prompts[:2])


def set_up(config):
    """All that the loop needs -> a namespace. Raises Stop before any long work if it is wrong."""
    device, splits = check(config), rewards.split_captions(config.prompts)
    saved = read_checkpoint(config.out) if config.resume else None
    if not saved and pathlib.Path(config.out, "checkpoint.pt").exists():
        raise Stop(f"--out {config.out} holds a run; continue it with --resume, or choose another")
    if saved and saved["splits"] != splits:
        raise Stop(f"--prompts {config.prompts}: its captions are not those that the run began "
                   "with; put them back, or start a new run")
    most = max(map(len, splits[0].values()))    # all categories equally often, whatever their size
    captions = [texts[i % len(texts)] for texts in splits[0].values() for i in range(most)]
    reward = rewards.load_reward(config.reward, device)
    policy = make_policy(config, device)

    try_out(policy, reward, splits, config)

    pictures, scored = config.groups * config.group_size, config.score_steps or config.steps
    print(f"{sum(p.numel() for p in policy.parameters() if p.requires_grad):,} parameters | "
          f"{device} | seed {config.seed} | per update {pictures} pictures, {pictures * scored} "
          f"scored steps, {config.inner_epochs} optimizer step(s)", flush=True)
    seconds = 0.0 if config.model or config.weights else load_base(policy, config)
    run = argparse.Namespace(
        policy=policy, reward=reward, measure=rewards.MEASURES.get(config.reward, reward),
        reference=copy.deepcopy(policy).requires_grad_(False) if config.beta > 0 else None,
        optimizer=make_optimizer(policy, config), generator=torch.Generator(device),
        sample_filter=SampleFilter(config.filter_quantile), captions=captions, splits=splits,
        pretrain_seconds=seconds, rows=[])
    if saved:
        restore(run, saved, config)
    else:
        run.generator.manual_seed(config.seed)
        run.base = evaluate(policy, run.measure, splits, config)
    print(f"base: {run.base[0][0].mean():.3f} on training captions, "
          f"{run.base[0][1].mean():.3f} on held-out ones", flush=True)
    return run


def generate(config: Config):
    """Sample pictures of a file's captions in the layout that GenEval's evaluator reads -> Path

    out/generated/POLICY-DIGEST/00000/samples/0000.png, ... and last metadata.jsonl, which means
    done. The digest is of weights, captions and settings: pictures of two policies never mix. Each
    caption has its own noise: stopped and started again, the outcome is the same.
    """
    device, records = check(config), rewards.read_captions(config.generate)
    saved = read_checkpoint(config.out) if config.resume else None
    policy, name = make_policy(config, device), "weights" if config.weights else "base"
    if saved:
        load_weights(policy, saved["policy"], "the checkpoint")
        name = f"update_{len(saved['rows']):05d}"
    elif not config.model and not config.weights:
        load_base(policy, config)
    digest = zlib.crc32(repr((config.seed, config.samples, config.eval_steps, config.guidance,
                              config.temperature, config.rollout_batch, records)).encode())
    for x in policy.state_dict().values():
        digest = zlib.crc32(x.float().cpu().contiguous().numpy(), digest)
    root = pathlib.Path(config.out, "generated", f"{name}-{digest:08x}")
    print(f"sampled by {name} of {config.out}, in {root}", flush=True)
    for i, record in enumerate(tqdm(records, unit="caption")):
        folder = root / f"{i:05d}"
        if (folder / "metadata.jsonl").exists():
            continue
        generator = torch.Generator(device).manual_seed(config.seed * 2 ** 32 + i)
        trajectory = sample(policy, [record["prompt"]] * config.samples, config, config.eval_steps,
                            generator, config.guidance)
        for j, picture in enumerate(policy.decode(trajectory.tokens).cpu().numpy()):
            with replacing(folder / "samples" / f"{j:04d}.png") as partial:
                Image.fromarray(picture).save(partial, "png")
        with replacing(folder / "metadata.jsonl") as partial:
            partial.write_text(json.dumps(record) + "\n")
    return root


# --------------------------------------------------------------------------------------------------
# 13. The command line.

MAY_CHANGE = {"updates", "device", "out", "resume", "rollout_batch", "micro_batch",
              "checkpointing"}          # on --resume
SAMPLING = {"generate", "samples", "seed", "eval_steps", "guidance", "temperature"}


def parse(argv) -> Config:
    """The settings of a command line. With --resume they are the checkpoint's, except a few."""
    parser = argparse.ArgumentParser(
        usage="python mask_grpo.py [--FLAG VALUE ...]", argument_default=argparse.SUPPRESS,
        description=__doc__.splitlines()[0], allow_abbrev=False,
        epilog=f"The flags are the fields of Config: clip_low is --clip-low.\n\n"
               f"{inspect.getsource(Config)}\nFor Show-o:\n{SHOWO}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = {"transition": TRANSITIONS, "optimizer": ("adamw", "adafactor"),
               "reduction": ("random", "first", "last")}
    for field in dataclasses.fields(Config):
        how = {"type": field.type, "choices": choices.get(field.name)}
        if field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flag(field.name), help=argparse.SUPPRESS, **how)

    def one_line(message):
        raise Stop(f"{message}; -h lists the flags")

    parser.error = one_line                 # instead of a page of usage
    given = vars(parser.parse_args(argv))
    if not given.get("resume"):
        is_showo = given.get("model") and not rewards.names_function(given["model"])
        return Config(**{**(SHOWO if is_showo else {}), **given})

    given = {"out": Config.out, **given}
    given |= {key: os.path.abspath(given[key]) for key in ("out", "generate") if given.get(key)}
    state = read_checkpoint(given["out"], mmap=True)        # reads the settings, not the weights
    saved, done = state["config"], len(state["rows"])
    for name in given.keys() - MAY_CHANGE - (SAMPLING if given.get("generate") else set()):
        if given[name] != saved[name]:
            raise Stop(f"{flag(name)} {given[name]}: a resumed run keeps its settings, here "
                       f"{saved[name]!r}; leave the flag out, or start a new run")
    if given.get("updates", done) < done:
        raise Stop(f"--updates {given['updates']}: {done} are already done")
    if os.path.isdir(state["directory"]):   # where the relative paths of its settings start
        os.chdir(state["directory"])
    return Config(**{**saved, "device": Config.device, **given})


def main(argv=None):
    """Run a command line -> exit status: 0 done, 1 memory, 2 Stop, 130 signal, 141 closed pipe"""
    logging.disable(logging.ERROR)          # of libraries; what matters is raised, and told below
    sys.stdout.reconfigure(errors="backslashreplace")   # names of files may not be ASCII
    try:
        config = parse(argv)
        done = generate(config) if config.generate else train(config)
        sys.stdout.flush()
        return 0 if done else 130
    except torch.OutOfMemoryError:
        print("mask_grpo.py: out of memory; lower --rollout-batch and --micro-batch, or add "
              "--checkpointing (with --resume, too; what was saved is intact)", file=sys.stderr)
        return 1
    except Stop as error:
        print("mask_grpo.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except BrokenPipeError:                 # `| head` has read enough; the checkpoint is intact
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("\nmask_grpo.py: stopped; what was saved before is intact", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
