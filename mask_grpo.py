# SPDX-License-Identifier: MIT
"""Mask-GRPO: reinforcement learning for image models that generate by unmasking, in one file.

GRPO is group relative policy optimisation. "Reinforcement Learning Meets Masked Generative Models"
(Luo et al., 2025, arXiv 2510.13418v2; `Eq. n` cites its equations) applies it to models that work
as follows. A picture is a grid of N tokens, the codes of small patches. All begin as MASK. Each of
T steps draws a token at every masked position, keeps the draws with the highest confidence, and
masks the other positions again. The confidence of a draw is its log-probability under the model,
and the sampler adds noise to it. One step that keeps two of four draws, where p_i is the model's
distribution at position i:

    position                    0       1       2       3
    drawn token y_i ~ p_i      sky     cat     sky     dog
    log p_i(y_i)               -0.5    -1.8    -1.2    -1.1
    noise_i                    +0.2    -0.3    +0.3    -0.5      random; it varies the order
    noisy confidence           -0.3    -2.1    -0.9    -1.6      the sum; the two highest are kept
    next state                 sky     MASK    sky     MASK      positions 0 and 2 are revealed

As a decision process, the *state* is the prompt and the partly masked picture. The *action* is the
set of draws at all masked positions. The *next state* keeps those that rank highest. There is one
*reward*, for the finished picture. Many actions lead to the same next state, because the draws at
positions 1 and 3 are discarded. GRPO needs the probability of a step. The paper compares three
definitions (section 2). `ar` is the probability of the action, a product over all draws, like the
likelihood of an autoregressive model. `p1` sums over all actions that lead to this next state.
`p2` uses the revealed tokens only. One update:

  1. Sample a group of G pictures for each of P prompts. Record each step. (section 1)
  2. Reward each picture. A filter discards groups whose rewards hardly differ, and others are
     sampled in their place. (sections 3, 5)
  3. Compute each picture's advantage A within its group, Eq. 12. (section 3)
  4. Compute ratio = p(step) now / p(step) under the weights that sampled, Eq. 11. (sections 2, 4)
  5. Maximise min(ratio A, clip(ratio) A), averaged over pictures and steps, minus an optional KL
     penalty against the base, the model before this training, Eq. 10. (section 4)

With one optimizer step per update, and without the filter, the division by the std and the KL, `ar`
and `p1` are REINFORCE with the group's mean as its baseline, except that the order of revealing
gets no gradient of its own (section 2). The main deviation from the paper is the noise: `p1` is
Eq. 14 with the sampler's noise, and a fourth definition, `p1_literal`, is Eq. 14 as printed.
assets/paper.md lists the deviations.

Dims: B = P * G pictures of P prompts (captions), b of them in a batch, N image tokens, K codes, T
steps, L length of the sequence (L_text for its text, L_null for the empty prompt), D hidden size,
M (picture, step) pairs, m of them in a micro-batch. A picture has h x w tokens or H x W pixels. The
code counts steps from 0. `python mask_grpo.py -h` explains every setting.
"""
import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import inspect  # -h shows the source of Config
import io
import itertools
import json
import math
import numbers
import os
import pathlib
import random
import re
import shlex
import signal
import sys
import threading
import time
import typing
import zlib
from collections import deque

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM
from transformers.models.janus import modeling_janus as janus

import reward
from reward import InputError, blame

bar = functools.partial(tqdm, disable=None, leave=False)    # progress; silent without a terminal

# --------------------------------------------------------------------------------------------------
# 1. The sampler and its record. Sections 1 and 2 use the policy only as the function
#
#        policy(prompt_ids (B, L_text), tokens (B, N)) -> logits (B, N, K)
#
#    with N = policy.num_tokens and K = policy.codebook_size. A token is a code (0 to K - 1) or MASK
#    (K). The sampler and the learner call it with different batches, so the logits of a picture
#    must not depend on the other pictures, on padding, or on chance (dropout).
#    Confidence sampling is a heuristic. The model gives a distribution for each position, not a
#    joint one, and the tokens of a step are drawn independently. So the distribution of finished
#    pictures is determined by the model and the sampler together. It depends on the number of steps
#    and on the noise. What is trained is the model *as this sampler uses it*. The policy is in
#    section 8.
#    Sections 1 to 4 can be copied. They need torch, F, math, itertools, typing and deque.


def mask_schedule(T: int, N: int) -> list[int]:
    """Tokens still masked after each of T steps: floor(N cos(pi (t + 1) / (2 T))), 0 at the end

    Where the cosine would reveal no token in a step, one is revealed, so T > N is refused.
    mask_schedule(4, 16) = [14, 11, 6, 0]. In float32, as in Show-o (section 8), cos(pi/3) is below
    0.5. So if N is even, the floor is lower by 1 at the step with (t + 1) / T = 2/3.
    """
    assert 1 <= T <= N, f"{T} steps: must be 1 to {N}, since each reveals at least one token"
    schedule = []
    masked = N
    for t in range(T):
        progress = torch.tensor((t + 1) / T, dtype=torch.float32)
        wanted = int(torch.floor(N * torch.cos(progress * math.pi * 0.5)))
        masked = min(masked - 1, wanted)        # reveal at least one token,
        masked = max(masked, T - 1 - t)         # and leave at least one for each later step
        schedule.append(masked)
    return schedule


class Trajectory(typing.NamedTuple):
    """How B pictures were sampled in T steps: all that the learner needs besides the prompts

    A revealed token never changes again, so two tensors reproduce every intermediate state. Before
    step t, the picture is where(revealed_at < t, tokens, MASK).
    """
    tokens: torch.Tensor            # (B, N) long     the finished pictures
    revealed_at: torch.Tensor       # (B, N) long     the step that revealed each token, 0 .. T-1
    noise: torch.Tensor             # (B, T, N)       what was added to the confidences
    drawn: torch.Tensor             # (B, T, N) long  the draws at all positions, for `ar`


def gumbel(shape, generator, device):
    """Standard Gumbel noise, -log E where E is exponential with mean 1 -> tensor of this shape"""
    noise = torch.empty(shape, device=device).exponential_(generator=generator)
    return noise.clamp_(1e-20, 1e20).log_().neg_()      # E = 0: inf, and 0 * inf is NaN


@torch.no_grad()
def rollout(policy, prompt_ids, steps, temperature=1.0, guidance=0.0, null_ids=None,
            generator=None) -> Trajectory:
    """Sample a picture for each prompt, all in parallel, in T = `steps` steps

    Codes are always drawn at temperature 1. `temperature` scales the ranking noise, which varies
    the order of revealing. As in Show-o, each step t multiplies the current scale by
    1 - (t + 1) / T. For T = 8 and temperature 3: 2.62, 1.97, 1.23, 0.62, 0.23, 0.06, 0.01, 0.
    With classifier-free guidance w, logits are (1 + w) cond - w uncond; uncond uses null_ids, the
    empty prompt. FloatingPointError if a logit is NaN or inf. Without guidance it may be -inf, for
    a code that is never drawn.
    prompt_ids (B, L_text) long, null_ids (B, L_null) long
    """
    B, N, K = len(prompt_ids), policy.num_tokens, policy.codebook_size
    tokens = torch.full((B, N), K, device=prompt_ids.device)                # (B, N) all MASK
    revealed_at = torch.full_like(tokens, steps)                            # (B, N) T: not yet
    noises = []
    draws = []
    temperature_left = temperature
    masked = [N, *mask_schedule(steps, N)]
    for t, (masked_before, masked_after) in enumerate(itertools.pairwise(masked)):
        logits = policy(prompt_ids, tokens).float()                         # (B, N, K)
        assert logits.shape == (B, N, K), f"logits {(*logits.shape,)}, must be {(B, N, K)}"
        if guidance > 0:
            uncond = policy(null_ids, tokens).float()                       # (B, N, K)
            logits = (1 + guidance) * logits - guidance * uncond
        logp = F.log_softmax(logits, dim=-1)                                # (B, N, K)

        # draw a code at every position (those already revealed are ignored below): the argmax of
        # log p + Gumbel noise is an exact sample of p
        drawn = (logp + gumbel(logp.shape, generator, logp.device)).argmax(-1)      # (B, N)
        token_logp = logp.gather(-1, drawn[..., None]).squeeze(-1)          # (B, N)
        if token_logp.isnan().any():
            raise FloatingPointError(f"step {t}: logits are not finite; try a smaller --lr in "
                                     "a new run")

        # add the ranking noise, also Gumbel, which varies the order of revealing
        temperature_left *= 1 - (t + 1) / steps
        noise = temperature_left * gumbel((B, N), generator, logp.device)   # (B, N)
        noisy_confidence = token_logp + noise                               # (B, N)

        # of the masked positions, keep the n with the highest noisy confidence
        n = masked_before - masked_after
        candidates = noisy_confidence.masked_fill(revealed_at < t, -math.inf)       # (B, N)
        keep = candidates.topk(n).indices                                   # (B, n)
        tokens = tokens.scatter(1, keep, drawn.gather(1, keep))
        revealed_at = revealed_at.scatter(1, keep, t)
        noises.append(noise)
        draws.append(drawn)
        del logits, logp                # large; the next forward pass needs their memory
    return Trajectory(tokens, revealed_at, torch.stack(noises, 1), torch.stack(draws, 1))


# --------------------------------------------------------------------------------------------------
# 2. The probability of a step. Step t reveals the positions U (unmasked) and masks the positions R
#    (remasked) again, although a code was drawn there, too. The noise does not depend on the
#    weights, so it counts as part of the environment. It is recorded, and the probability is the
#    one *given the noise*. It is a product over positions, i in U and j in R:
#
#        definition   factor for U  factor for R                           the probability of
#        ar           p_i(y_i)      p_j(y_j) of the discarded draw         the action      (Eq. 13)
#        p1           p_i(y_i)      the chance of ranking below all of U   the next state  (Eq. 14)
#        p1_literal   p_i(y_i)      the same chance without the noise      (Eq. 14 as printed)
#        p2           p_i(y_i)      1                                      the codes at U  (Eq. 15)
#
#    As an example, take two positions, left and right, and two codes, a and b. The probabilities of
#    a and b are (.7, .3) on the left and (.6, .4) on the right. One position is kept. In the last
#    column the noise is 0 on the left and log 1.5 on the right, so the ranking multiplies the
#    probabilities on the right by 1.5.
#
#        draws    probability   kept, no noise            kept, with noise
#        (a, a)   .7 * .6       left, a    (.7 > .6)      right, a   (.7 < .9)
#        (a, b)   .7 * .4       left, a    (.7 > .4)      left, a    (.7 > .6)
#        (b, a)   .3 * .6       right, a   (.3 < .6)      right, a   (.3 < .9)
#        (b, b)   .3 * .4       right, b   (.3 < .4)      right, b   (.3 < .6)
#
#        next state   p1, no noise     p1, with noise   p1_literal   p2
#        [a, MASK]    .70              .7 * .4 = .28    .70          .7
#        [MASK, a]    .6 * .3 = .18    .60              .18          .6
#        [MASK, b]    .4 * .3 = .12    .12              .12          .4
#        [b, MASK]    0                0                0            .3
#        sum          1.00             1.00             1.00         2.0
#
#    p1 adds up the probabilities of all draws that lead to one next state. It depends on the noise:
#    [a, MASK] has .28 with it and .70 without. It is 0 for [b, MASK], because both codes on the
#    right would outrank the b. Eq. 14 is right for a sampler without noise. Here it prefers
#    [a, MASK], but the noise favours [MASK, a]. p2 is not a distribution over next states: the
#    draws (a, a) count for both [a, MASK] and [MASK, a]. Each pair of draws counts twice, once for
#    its left code and once for its right one.
#
#    For a given next state, the mean of grad log ar over the draws that lead to it is grad log p1
#    (Rao-Blackwell; at fixed noise and at ratio 1). Take [a, MASK] without noise. Whatever is drawn
#    on the right loses, so log p1 has gradient 0 with respect to the right logits. If a was drawn
#    there (probability .6), the gradient of log ar is (.4, -.4), 1 for the drawn code and 0 for the
#    other, minus their probabilities. If b was drawn, it is (-.6, .6). The mean is 0, too. The
#    reward depends on the next state, not on what was discarded. So `ar` raises or lowers discarded
#    codes by chance, which adds variance to the gradient, but no bias.
#
#    Averaged over all that can happen in a step, the gradients of log ar and log p1 are 0, because
#    their probabilities sum to 1. The gradient of log p2 is not. Without noise, [a, MASK]
#    contributes .7 * (.3, -.3) to the gradient of the left logits, and the next states that reveal
#    the right contribute nothing. Subtracting the group's mean (section 3) removes this part. What
#    remains is that p2 ignores R. Take the rewards 1 for [a, MASK], .3 for [MASK, a] and 0
#    otherwise, .754 on average. A next state contributes its probability times (reward - .754)
#    times the gradient of its log-probability. For the left logit of a, p2 gives
#    .7 * .246 * .3 = .05. p1 adds the next states [MASK, a] and [MASK, b], which need a b on the
#    left: .18 * -.454 * -.7 + .12 * -.754 * -.7 = .12.
#
#    No definition gives the whole gradient of the expected reward, because the ranking depends on
#    the weights, too. At fixed noise the kept positions change abruptly, so this part has the
#    derivative 0 almost everywhere. Averaged over the noise, the probability of a ranking is smooth
#    and has a gradient. With the rewards above and Gumbel noise of scale .05, the expected reward
#    has the gradient (.242, -.082) with respect to the logits of a (left, right): a more confident
#    a on the right is kept more often, and is worth only .3. p1, and `ar` on average, give
#    (.168, .016), with the wrong sign on the right. At scale 2.62, that of the first of 8 steps,
#    they are closer: (.128, .037) and (.108, .030).
#
#    p1 is used nevertheless, because it is the exact probability of the next state given the noise.
#    An earlier version that integrated out the noise learned no better (its runs are not kept). And
#    training can still change the order, because confidence *is* log p: tokens of good pictures
#    rank higher as they become more probable, and for A > 0 p1's factor for R lowers codes that
#    would outrank U.
#
#    In the shapes world, p1 and p2 cannot be told apart by the pictures that are right after
#    training, either with right captions or with wrong ones. Why the part that p2 lacks does not
#    show there was not examined. With right captions `ar` ends lower, and p1_literal at 0
#    (assets/study.md).

TRANSITIONS = ("p1", "p1_literal", "p2", "ar")
FLOOR = -60.0       # replaces log p of codes that would not lose, so that no sum is empty


def transition_logprob(logits, tokens, revealed_at, t, transition, noise=None, drawn=None):
    """log p(s_{t+1} | s_t), the log-probability of step t; `transition` is one of TRANSITIONS

    s_t is the picture before step t, and logits are the policy's for it. U is revealed_at == t, R
    is revealed_at > t. tokens: the picture after step t or any later one. noise: what the sampler
    added to the confidences of this step; None means no noise. drawn: its draws, for `ar`.
    logits (B, N, K), tokens, revealed_at, noise, drawn (B, N), t int or (B,) -> (B,)
    """
    assert transition in TRANSITIONS, f"{transition!r}: must be one of {TRANSITIONS}"
    if torch.is_tensor(t):
        t = t[:, None]                                                      # (B, 1)
    revealed = revealed_at == t                                             # (B, N) bool: U
    remasked = revealed_at > t                                              # (B, N) bool: R
    dtype = torch.promote_types(logits.dtype, torch.float32)                # at least float32
    logp = F.log_softmax(logits, dim=-1, dtype=dtype)                       # (B, N, K)

    # masked_fill, not mask * logp: a model may give codes a logit of -inf, and 0 * inf is NaN
    if transition == "ar":
        token_logp = logp.gather(-1, drawn[..., None]).squeeze(-1)          # (B, N)
        return token_logp.masked_fill(revealed_at < t, 0).sum(-1)           # (B,)

    token = tokens.masked_fill(~revealed, 0)            # (B, N) MASK (K) is not an index
    token_logp = logp.gather(-1, token[..., None]).squeeze(-1)              # (B, N)
    logp_revealed = token_logp.masked_fill(~revealed, 0).sum(-1)            # (B,)
    if transition == "p2":
        return logp_revealed

    # The sampler compared noisy confidences, so both sides of this comparison carry the noise. The
    # threshold, the lowest one kept, is recomputed from these logits. No gradient flows through it,
    # because it only enters a comparison.
    if noise is None or transition == "p1_literal":
        noise = torch.zeros_like(token_logp)                                # (B, N)
    threshold = (token_logp + noise).masked_fill(~revealed, math.inf).amin(-1)      # (B,)
    noisy = logp + noise[..., None]                                         # (B, N, K)
    loses = noisy < threshold[:, None, None]                                # (B, N, K) bool
    logp_loses = logp.masked_fill(~loses, FLOOR).logsumexp(-1)              # (B, N)
    return logp_revealed + logp_loses.masked_fill(~remasked, 0).sum(-1)     # (B,)


def replay_logprob(policy, prompt_ids, trajectory, pictures, steps, transition):
    """transition_logprob of recorded steps under a policy; the pairs may come in any order

    prompt_ids (B, L_text); pictures, steps (M,) long, the pairs of a picture and a step -> (M,)
    """
    tokens = trajectory.tokens[pictures]                                    # (M, N)
    revealed_at = trajectory.revealed_at[pictures]                          # (M, N)
    masked = revealed_at >= steps[:, None]                                  # (M, N) bool
    state = tokens.masked_fill(masked, policy.codebook_size)                # (M, N)
    logits = policy(prompt_ids[pictures], state)                            # (M, N, K)
    noise = trajectory.noise[pictures, steps]                               # (M, N)
    drawn = trajectory.drawn[pictures, steps]                               # (M, N)
    return transition_logprob(logits, tokens, revealed_at, steps, transition, noise, drawn)


# --------------------------------------------------------------------------------------------------
# 3. The advantage: how much better a picture is than the others in its group. Subtracting a number
#    that does not depend on the picture leaves the expected gradient unchanged, as grad log p
#    has mean 0 (for `ar` and p1, section 2). The group's mean is nearly such a number. It estimates
#    how hard the caption is, so no value network is needed. It does contain the picture's own
#    reward: r - mean = (1 - 1/G) (r - mean of the others). This only scales all gradients, by the
#    factor 5/6 in groups of six. All T steps share the picture's advantage.


def group_std(rewards):
    """The std within each group (dividing by G - 1): (P, G) -> (P,)"""
    return (rewards - rewards[:, :1]).std(1)    # shifted, so that equal rewards give exactly 0


def group_advantage(rewards, divide_by_std=True, eps=1e-4):
    """(reward - mean) / std in each group, Eq. 12: [[1, 0, 0, 1]] -> [[.87, -.87, -.87, .87]]

    Without the division (Dr. GRPO, arXiv 2503.20783), all captions have the same weight. With it,
    the gradient of each caption is divided by about its std, so that tiny differences in reward
    count as much as large ones. eps keeps a std of the size of rounding errors from doing so.
    rewards (P, G) -> (P, G)
    """
    shifted = rewards - rewards[:, :1]          # (P, G) exactly 0 if all rewards are equal
    centred = shifted - shifted.mean(1, keepdim=True)                       # (P, G)
    if divide_by_std:
        return centred / (group_std(rewards)[:, None] + eps)
    return centred


class SampleFilter:
    """Says which groups to keep, those with a usable signal (section 3.3 of the paper)

    Every group is kept until `at_least` stds have been recorded (two updates by default), and if
    `quantile` is 0. After that a group vanishes if the std of its rewards is 0, or below a
    threshold: the `quantile` of the last `window` stds. If more than a `quantile` of them are 0,
    the threshold is 0, and only groups of equal rewards vanish. Keeping such a group would do no
    harm, because its gradient is 0. Replacing it divides the expected gradient by the share of the
    other groups, and leaves its direction as it is. Replacing groups of a small std above 0 also
    favours captions whose rewards vary.
    """

    def __init__(self, quantile, at_least=32, window=512):
        self.quantile = quantile
        self.at_least = at_least
        self.history = deque(maxlen=window)

    def keep(self, std):
        """Which groups to learn from. All stds are recorded. std (P,) -> (P,) bool"""
        keep = torch.ones_like(std, dtype=torch.bool)                       # (P,)
        if self.quantile > 0 and len(self.history) >= self.at_least:
            lowest = torch.tensor(self.history).quantile(self.quantile)
            keep = (std >= lowest) & (std > 0)
        self.history.extend(std.tolist())
        return keep


# --------------------------------------------------------------------------------------------------
# 4. The loss. There is one ratio and one clip per step, as in PPO. An inner epoch is one pass over
#    the sampled pictures, with one optimizer step. If an update has one inner epoch, the ratio is
#    always 1, and the loss (without a KL) is minus the mean advantage, 0 by construction. But
#    logp_old is a constant, so the gradient is -A grad log p, not 0. Watch the reward instead.

# A position of R at which no code would lose counts as FLOOR + log K, which is -56 for K = 34. When
# the pictures are sampled, the drawn code itself loses, so with p1 this can happen only after the
# weights have moved. p1_literal ignores the noise that made it lose, so its logp_old can have such
# positions. With two of them, and none in logp, the ratio is near exp(112), inf in float32. Beyond
# this limit the gradient is 0, even for A < 0, where the ratio should be pushed down.
MAX_LOG_RATIO = 20.0
# The KL has a smaller limit, because exp(20) would dominate every other gradient. In a later inner
# epoch, a step can have a probability near 0. Its KL is then cut to exp(5) - 6 = 142, and has no
# gradient.
# If p_ref is near 0 instead, the KL of a step may be 50, but its gradient is at most grad log p.
MAX_KL_LOG_RATIO = 5.0


def grpo_loss(logp, logp_old, advantage, clip_low, clip_high):
    """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), Eq. 10 and 11, for each pair; to be averaged

    Clipping stops only gradients that push a ratio further out (up if A > 0, down if A < 0).
    all (M,) -> loss (M,), dict of the ratio (M,) and of whether the clip stopped a gradient (M,)
    """
    assert logp.shape == logp_old.shape == advantage.shape and logp.dim() == 1
    ratio = (logp - logp_old).clamp(max=MAX_LOG_RATIO).exp()                # (M,)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)                      # (M,)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)           # (M,)
    stopped = ratio * advantage > clipped * advantage                       # (M,) bool
    return loss, {"ratio": ratio.detach(), "clip": stopped.float()}


def kl_k3(logp, logp_ref):
    """Schulman's k3 estimate of KL(p || p_ref): r - 1 - log r with r = p_ref / p. It is never < 0

    For p2 and p1_literal, which are not sampling probabilities, it is only a penalty. Because the
    samples are held fixed, its expected gradient is -E_ref[grad log p], that of the other
    direction, KL(p_ref || p). This needs p > 0 wherever p_ref > 0, which p1 at fixed noise does not
    guarantee.
    logp, logp_ref (M,) -> (M,)
    """
    log_ratio = (logp_ref - logp).clamp(max=MAX_KL_LOG_RATIO)               # (M,)
    return log_ratio.exp() - 1 - log_ratio


# --------------------------------------------------------------------------------------------------
# 5. One update. It samples P * G pictures or more, T forward passes each. Then it runs a forward
#    and a backward pass for each of P * G * T steps, 16 * 6 * 50 = 4,800 with the paper's settings.
#    Training uses no guidance. With it, a guided policy would sample, but the plain one would be
#    trained. Issue 198 of the repository flow_grpo recommends training without guidance, but with
#    a KL. Without a KL, it reports, RL teaches the plain policy what guidance would add, and
#    guidance on top of it in evaluation is too strong. The paper's settings, used for Show-o here,
#    have no KL; if pictures become too sharp, evaluate with a smaller --guidance.


class Groups(typing.NamedTuple):
    """What an update learns from. Prompts and pictures are ordered group by group."""
    prompts: list[str]              # B
    trajectory: Trajectory          # of B pictures
    rewards: torch.Tensor           # (P, G)   of the groups that were kept, P of them or fewer
    all_rewards: torch.Tensor       # (P', G)  of all P' groups that were sampled


def select(trajectory, pictures):
    """The trajectory of some of the pictures; pictures (n,) long"""
    return Trajectory(trajectory.tokens[pictures], trajectory.revealed_at[pictures],
                      trajectory.noise[pictures], trajectory.drawn[pictures])


def concatenate(parts):
    """A list of trajectories as one"""
    return Trajectory(torch.cat([part.tokens for part in parts]),
                      torch.cat([part.revealed_at for part in parts]),
                      torch.cat([part.noise for part in parts]),
                      torch.cat([part.drawn for part in parts]))


def sample(policy, prompts, config, steps, generator, guidance=0.0) -> Trajectory:
    """A rollout of B prompts, `rollout_batch` pictures at a time -> Trajectory of B pictures"""
    prompt_ids = policy.encode(prompts)                                     # (B, L_text)
    null_ids = None
    parts = []
    for ids in bar(prompt_ids.split(config.rollout_batch), "sampling"):
        if guidance > 0:
            null_ids = policy.encode([""] * len(ids))                       # (b, L_null)
        parts.append(rollout(policy, ids, steps, config.temperature, guidance, null_ids, generator))
    return concatenate(parts)


def sample_groups(policy, reward_fn, captions, sample_filter, config, generator) -> Groups:
    """Sample groups until P of them are worth learning from, or the tries are used up"""
    G = config.group_size
    missing = config.groups
    kept_prompts = []
    kept = []
    kept_rewards = []
    all_rewards = []
    for _ in range(1 + config.filter_tries):
        chosen = torch.randint(len(captions), (missing,), generator=generator,
                               device=generator.device)         # (missing,) with replacement
        prompts = []
        for i in chosen.tolist():
            prompts += [captions[i]] * G
        trajectory = sample(policy, prompts, config, config.steps, generator)
        pixels = policy.decode(trajectory.tokens)                           # (missing * G, H, W, 3)
        rewards = reward.rate(reward_fn, pixels, prompts).view(missing, G)

        keep = sample_filter.keep(group_std(rewards))                       # (missing,) bool
        pictures = torch.arange(missing * G).view(missing, G)[keep].flatten()       # those kept
        kept_prompts += [prompts[i] for i in pictures.tolist()]
        kept.append(select(trajectory, pictures.to(trajectory.tokens.device)))
        kept_rewards.append(rewards[keep])
        all_rewards.append(rewards)
        missing -= int(keep.sum())
        if missing == 0:
            break
    return Groups(kept_prompts, concatenate(kept), torch.cat(kept_rewards), torch.cat(all_rewards))


def choose_steps(B, T, config, generator):
    """The steps that the loss uses -> (M, 2) long, pairs of a picture and a step

    k random steps per picture, new in every update, estimate Eq. 10's mean over all T without bias.
    With the first or last k (the paper's computational reduction), only those steps are optimised.
    """
    k = config.score_steps or T
    device = generator.device
    if k == T or config.reduction == "first":
        steps = torch.arange(k, device=device).expand(B, k)                 # (B, k)
    elif config.reduction == "last":
        steps = torch.arange(T - k, T, device=device).expand(B, k)          # (B, k)
    else:
        order = torch.rand(B, T, generator=generator, device=device).argsort(1)     # (B, T)
        steps = order[:, :k].sort(1).values                                 # (B, k)
    pictures = torch.arange(B, device=device)[:, None].expand(B, k)         # (B, k)
    return torch.stack([pictures, steps], dim=-1).flatten(0, 1)             # (B * k, 2)


@torch.enable_grad()
def learn(policy, reference, optimizer, groups, advantage, config, generator):
    """All inner epochs of an update except the last optimizer step, which is left to the caller

    It leaves the clipped gradient of the last epoch in .grad, and returns that epoch's means for
    the log. Each epoch recomputes the logits, log p, the threshold, the ratio and the clip. All
    epochs share the pairs of picture and step, the states, the noise, the draws, logp_old and A.
    FloatingPointError if the loss or its gradient is not finite. advantage (B,) -> dict
    """
    trajectory = groups.trajectory
    prompt_ids = policy.encode(groups.prompts)                              # (B, L_text)
    B, T, _ = trajectory.noise.shape
    pairs = choose_steps(B, T, config, generator)                           # (M, 2)
    # the mean of Eq. 10 is over all P groups; those still missing count as 0
    weight = 1 / (config.groups * config.group_size * (config.score_steps or T))
    logp_old = []
    for epoch in range(config.inner_epochs):
        if epoch > 0:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        parts = {"loss": [], "ratio": [], "clip": [], "kl": []}
        for i, chunk in enumerate(bar(pairs.split(config.micro_batch), "learning")):
            pictures, steps = chunk.unbind(1)                               # (m,) each
            logp = replay_logprob(policy, prompt_ids, trajectory, pictures, steps,
                                  config.transition)                        # (m,)
            if epoch == 0:      # the weights have not moved since sampling, so this is p_old
                logp_old.append(logp.detach())
            loss, details = grpo_loss(logp, logp_old[i], advantage[pictures],
                                      config.clip_low, config.clip_high)    # (m,)
            kl = torch.zeros_like(loss)                                     # (m,)
            if reference is not None:
                with torch.no_grad():
                    logp_ref = replay_logprob(reference, prompt_ids, trajectory, pictures,
                                              steps, config.transition)     # (m,)
                kl = kl_k3(logp, logp_ref)                                  # (m,)
                loss = loss + config.beta * kl
            (loss.sum() * weight).backward()
            parts["loss"].append(loss.detach())
            parts["ratio"].append(details["ratio"])
            parts["clip"].append(details["clip"])
            parts["kl"].append(kl.detach())
        means = {name: torch.cat(values).mean().item() for name, values in parts.items()}
        means["loss"] *= len(pairs) * weight    # sum * weight, of which the gradient was taken
        norm = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
        means["grad"] = norm.item()             # before it was clipped
        if not math.isfinite(means["loss"] + means["grad"]):
            raise FloatingPointError(f"the loss is {means['loss']} and the norm of its gradient "
                                     f"{means['grad']}; try a smaller --lr in a new run")
    return means


# --------------------------------------------------------------------------------------------------
# 6. The training loop. It knows what has been done, what is due, and how to do one update. Whatever
#    ends it, Ctrl-C or a bug in a reward, the state after the last complete update is saved. A
#    resumed run samples the interrupted update again, with the same captions and noise, and so has
#    the same result as a run that never stopped. One exception is a stop between the inner epochs
#    of an update: the optimizer steps made so far stay in the weights, and the update is sampled
#    again from there.


def train(config: "Config"):
    """Load or make the base, then train it -> the rows of metrics.csv"""
    # set up; mistakes in the input show here, before any long work
    out = pathlib.Path(config.out).absolute()   # a reward may call os.chdir
    checkpoint = out / "checkpoint.pt"
    splits = load_captions(config.prompts)      # training and held out: category -> captions
    check_folder(config, checkpoint, splits)
    device = open_device(config)
    reward_fn = reward.load_reward(config.reward, device)
    measure = reward_fn
    if config.measure != config.reward:
        measure = reward.load_reward(config.measure, device)
    policy = make_policy(config, device)
    try_out(policy, reward_fn, measure, splits, config)

    # the base, its frozen copy if there is a KL, and the rest of a run's state
    with blame(f"--out {config.out}"):
        (out / "samples").mkdir(parents=True, exist_ok=True)
    if not config.model and not config.weights:
        load_base(policy, config, out)
    reference = None
    if config.beta > 0:
        reference = copy.deepcopy(policy).requires_grad_(False)
    captions = balanced(splits[0])
    optimizer = make_optimizer(policy, config)
    generator = torch.Generator(device).manual_seed(config.seed)
    sample_filter = SampleFilter(config.filter_quantile)
    state = {"rows": [], "generator": generator.get_state(), "filter": [],
             "base": None, "latest": {"update": None}}          # the first and last evaluation
    if config.resume:
        state = load_checkpoint(checkpoint, policy, optimizer)
        with blame(f"--device {device}: resume on the kind of device that the run used"):
            generator.set_state(state["generator"])
        sample_filter.history.extend(state["filter"])
    rows = state["rows"]
    process = os.getpid()

    try:
        while True:
            # evaluate: the base, every `eval_every` updates, and the last
            done = len(rows)
            due = done % config.eval_every == 0 or done == config.updates
            if due and state["latest"]["update"] != done:           # not again after --resume
                latest = evaluate(policy, measure, splits, config, done)
                if done == 0:
                    state["base"] = latest
                else:
                    rows[-1]["heldout"] = latest["scores"][1].mean().item()
                    grid = out / "samples" / f"update_{done:05d}.png"
                    save_grid(grid, splits[1], state["base"], latest)
                state["latest"] = latest
                save_checkpoint(checkpoint, config, splits, policy, optimizer, state)
                print_scores(state["latest"], splits)
            write_rows(out / "metrics.csv", rows)
            if done >= config.updates:
                break

            # sample groups of pictures; learn from them, unless every group vanished
            start = time.time()
            lr = set_lr(optimizer, config.lr, done, config.warmup, config.updates)
            groups = sample_groups(policy, reward_fn, captions, sample_filter, config, generator)
            means = {"ratio": 1.0, "clip": 0.0, "kl": 0.0, "grad": 0.0, "loss": 0.0}
            if groups.prompts:
                advantage = group_advantage(groups.rewards, config.divide_by_std)   # (P, G)
                means = learn(policy, reference, optimizer, groups, advantage.flatten().to(device),
                              config, generator)
            row = {"update": done + 1, **summary(groups), **means, "lr": lr,
                   "seconds": time.time() - start, "heldout": ""}

            # the weights and the record of the run change together: a stop comes before or after
            with uninterrupted():
                optimizer.step()                # nothing moves if every group vanished
                optimizer.zero_grad(set_to_none=True)
                rows.append(row)
                state["generator"] = generator.get_state()
                state["filter"] = list(sample_filter.history)
            print_update(rows, config)
    except BaseException:
        if os.getpid() == process:              # not in a worker that a reward has forked
            with uninterrupted():
                save_checkpoint(checkpoint, config, splits, policy, optimizer, state)
                write_rows(out / "metrics.csv", rows)
        raise
    print_scores(state["base"], splits)
    print_scores(state["latest"], splits)
    save_grid(out / "comparison.png", splits[1], state["base"], state["latest"])
    return rows


# --------------------------------------------------------------------------------------------------
# 7. Settings. Each field is a flag (clip_low is --clip-low), and its comment is the help text.


@dataclasses.dataclass
class Config:
    """All settings of a run. The defaults are for the shapes world; SHOWO has those of Show-o.

    Raises InputError (a ValueError) if one has the wrong type, is out of range, or conflicts with
    another.
    """
    # task
    model: str = ""                 # Show-o (hub id or folder) or MODULE:FUNCTION; "": shapes world
    vq_model: str = "showlab/magvitv2"   # Show-o's image decoder: hub id, folder or file
    weights: str = ""               # other weights for the policy: file, folder, hub id[/FILE]
    prompts: str = ""               # captions (.txt, .json, .jsonl); a tenth is held out
    reward: str = "shapes"          # correct, clip[:MODEL:TAG], hpsv2, pickscore or MODULE:FUNCTION
    measure: str = ""               # reward for evaluation; "": --reward, or correct for shapes
    out: str = "out"                # folder for checkpoint, metrics.csv and pictures
    resume: bool = False            # continue the run in --out, with its settings
    generate: str = ""              # a caption file: sample 4 pictures per caption, do not train
    device: str = ""                # cpu, cuda, mps, ...; "": an accelerator if there is one
    seed: int = 0                   # seeds the base, the choice of prompts and every draw
    # the shapes world's base
    width: int = 64                 # hidden size, a multiple of 16
    layers: int = 4                 # transformer blocks
    pretrain_steps: int = 2500      # steps of masked-token prediction before any RL
    caption_noise: float = 0.0      # share of its pairs whose picture is for a random caption
    # sampling
    steps: int = 8                  # T in training; fewer than --eval-steps is cheaper
    eval_steps: int = 8             # T in evaluation
    temperature: float = 3.0        # scale of the ranking noise, which decays to 0; 0: no noise
    guidance: float = 0.0           # w in evaluation, (1 + w) cond - w uncond; training has none
    # Mask-GRPO
    transition: str = "p1"          # p1 (Eq. 14), p1_literal (no noise), p2 (Eq. 15), ar (Eq. 13)
    updates: int = 81               # rounds of sampling and learning
    groups: int = 16                # P, prompts per update; P and G have the paper's values
    group_size: int = 6             # G, pictures per prompt, at least 2
    divide_by_std: bool = True      # divide advantages by the std (Eq. 12), or not (Dr. GRPO)
    inner_epochs: int = 1           # passes over each rollout; after the first, the ratio is not 1
    clip_low: float = 0.1           # the ratio is clipped to at least 1 - clip_low
    clip_high: float = 0.2          # the ratio is clipped to at most 1 + clip_high
    beta: float = 0.0               # weight of the KL to the frozen base; 0 keeps no copy of it
    score_steps: int = 0            # k, how many of each picture's T steps the loss uses; 0: all
    reduction: str = "random"       # which k steps: random, or the paper's first or last
    filter_quantile: float = 0.1    # replace groups whose std is below this quantile of recent stds
    filter_tries: int = 2           # maximum rounds of replacing vanished groups per update
    # optimisation and evaluation
    optimizer: str = "adamw"        # adamw, or adafactor with almost no optimizer state
    lr: float = 1.5e-3              # peak learning rate; larger policies need a smaller one
    warmup: int = 5                 # updates of linear warm-up; a cosine takes lr to 0 over the run
    weight_decay: float = 0.02      # on matrices only, not on biases or norms
    max_grad_norm: float = 1.0      # gradients with a larger norm are scaled down to it
    rollout_batch: int = 1024       # pictures sampled at once; limits memory, changes the draws
    micro_batch: int = 96           # (picture, step) pairs per backward pass: affects memory only
    checkpointing: bool = False     # recompute activations to save memory (built-in models only)
    eval_every: int = 9             # updates between evaluations, picture grids and checkpoints
    eval_pictures: int = 48         # pictures per category, for training and held-out captions

    def __post_init__(self):
        for field in dataclasses.fields(self):
            setattr(self, field.name, checked(field, getattr(self, field.name)))
        if not self.device:
            self.device = "cpu"
            if torch.accelerator.is_available():
                self.device = torch.accelerator.current_accelerator().type
        if not self.measure:
            self.measure = "correct" if self.reward == "shapes" else self.reward
        if self.width % 16 != 0:
            raise InputError(f"--width {self.width}: must be a multiple of 16")
        if self.caption_noise > 1:
            raise InputError(f"--caption-noise {self.caption_noise}: must be at most 1")
        if self.caption_noise > 0 and self.model:
            raise InputError("--caption-noise is for the base of the shapes world; leave it out "
                             "with --model")
        if self.score_steps > self.steps:
            raise InputError(f"--score-steps {self.score_steps}: must be at most --steps")
        if self.filter_quantile > 1:
            raise InputError(f"--filter-quantile {self.filter_quantile}: must be at most 1")
        if self.max_grad_norm == 0:
            raise InputError("--max-grad-norm 0: must be above 0, or nothing is learned")
        if self.generate and not self.model and not self.weights:
            raise InputError("--generate needs --model, or --weights such as out/checkpoint.pt")
        if self.model and not self.prompts and not self.generate:
            raise InputError("--model needs --prompts, a file of captions")


CHOICES = {"transition": TRANSITIONS, "optimizer": ("adamw", "adafactor"),
           "reduction": ("random", "first", "last")}
LEAST = {"seed": 0, "pretrain_steps": 0, "score_steps": 0, "filter_tries": 0, "warmup": 0,
         "group_size": 2}           # the smallest value; for other integers 1, for floats 0
KINDS = {bool: (bool, "true or false"), int: (numbers.Integral, "a whole number"),
         float: (numbers.Real, "a number"), str: ((str, os.PathLike), "text")}
MAY_CHANGE = {"updates", "device", "out", "resume", "rollout_batch", "micro_batch", "checkpointing",
              "model", "vq_model", "weights", "prompts"}        # on --resume; files may have moved


def flag(name):
    """The command line's name of a field: clip_low -> --clip-low"""
    return "--" + name.replace("_", "-")


def checked(field, value):
    """The value of a field as its type, one that torch.load accepts; InputError if it is wrong"""
    kind, name = KINDS[field.type]
    if not isinstance(value, kind) or (isinstance(value, bool) and field.type is not bool):
        raise InputError(f"{flag(field.name)} {value!r}: must be {name}")
    if field.type is str:
        value = os.path.expanduser(value)
    value = field.type(value)
    if field.name in CHOICES and value not in CHOICES[field.name]:
        choices = ", ".join(CHOICES[field.name])
        raise InputError(f"{flag(field.name)} {value}: must be one of {choices}")
    if field.type in (int, float):
        least = 0
        if field.type is int:
            least = LEAST.get(field.name, 1)
        if not least <= value < 2 ** 31:
            raise InputError(f"{flag(field.name)} {value}: must be at least {least}, and below "
                             "2 ** 31")
    return value


# --------------------------------------------------------------------------------------------------
# 8. The policy is Show-o (Xie et al., 2024) or a small model like it: a Phi language model whose
#    vocabulary also holds image codes, so that text and picture are one sequence. The decoder from
#    codes to pixels is frozen. A policy of your own comes from a function (config, device). It must
#    be an nn.Module with float32 parameters, num_tokens N, codebook_size K, device, and with
#    encode, forward and decode as below. encode gets "" only with guidance. The logits of a picture
#    must not depend on the rest of the batch, on padding, or on chance (section 1).

NUM_SPECIAL = 10    # ids between text and codes: pad, start and end of image (soi, eoi), tasks, ...


class Policy(nn.Module):
    """p(code | prompt, partly masked picture), for all positions of the picture at once

    Vocabulary [text | 10 special | K codes | MASK], sequence [text, <soi>, N image tokens, <eoi>].
    tokenize: str -> text ids. decoder: codes (B, h, w) -> pixels (B, 3, H, W) in [-1, 1].
    The names in state_dict() are those under which Show-o and MAGVIT-v2 are published.
    """

    def __init__(self, phi: PhiConfig, tokenize, bos_id, decoder, num_tokens, codebook_size):
        super().__init__()
        self.showo = PhiForCausalLM(phi)
        self.decoder = decoder
        self.tokenize = tokenize
        self.num_tokens = num_tokens
        self.codebook_size = codebook_size
        self.max_text = 128
        self.offset = phi.vocab_size - 1 - codebook_size    # id of code 0; MASK is the last
        self.bos_id = bos_id                                # also ends the text
        self.pad_id = self.offset - NUM_SPECIAL
        self.soi_id = self.pad_id + 1
        self.eoi_id = self.pad_id + 2
        self.t2i_id = self.pad_id + 5
        self.dtype = torch.float32      # of the transformer's matmuls; weights are always float32

    @property
    def device(self):
        """Where the weights are"""
        return self.showo.lm_head.weight.device

    def encode(self, prompts: list[str]):
        """Prompts in Show-o's layout [<t2i>, bos, words, bos], left padded -> (B, L_text) long"""
        rows = []
        for prompt in prompts:
            words = self.tokenize(prompt)
            if words[:1] != [self.bos_id]:
                words = [self.bos_id, *words]
            row = [self.t2i_id, *words, self.bos_id]
            if len(row) > self.max_text + 1:        # cut, but with its last bos, as in Show-o
                row = row[:self.max_text] + [self.bos_id]
            rows.append(row)
        # Show-o pads to 129. Pads are masked and RoPE is relative, so fewer give the same logits.
        longest = max(len(row) for row in rows)
        rows = [[self.pad_id] * (longest - len(row)) + row for row in rows]
        return torch.tensor(rows, device=self.device)

    def attention_mask(self, prompt_ids):
        """Omni-attention: text is causal; the picture sees everything except pads

        0 where a query may attend, very negative elsewhere: prompt_ids (B, L_text) -> (B, 1, L, L)
        """
        after = self.num_tokens + 2                             # <soi>, the picture, <eoi>
        position = torch.arange(prompt_ids.shape[1] + after, device=prompt_ids.device)  # (L,)
        in_picture = (position >= prompt_ids.shape[1])[:, None]                 # (L, 1)
        causal = position[:, None] >= position                                  # (L, L)
        real = F.pad(prompt_ids != self.pad_id, (0, after), value=True)         # (B, L)
        allowed = real[:, None, :] & (causal | in_picture)                      # (B, L, L)
        # pads see themselves and earlier pads, since a softmax over nothing may give NaN
        allowed |= causal & ~real[:, :, None]
        return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]

    def forward(self, prompt_ids, tokens):
        """Logits of the codes, read at the image positions themselves (no next-token shift)

        prompt_ids (B, L_text) long, tokens (B, N) long, K for MASK -> (B, N, K) float32
        """
        edge = torch.ones_like(tokens[:, :1])                                   # (B, 1)
        ids = torch.cat([prompt_ids, edge * self.soi_id, tokens + self.offset,
                         edge * self.eoi_id], dim=1)                            # (B, L)
        mask = self.attention_mask(prompt_ids)                                  # (B, 1, L, L)
        # cache_enabled would keep a copy of all weights in bf16 for a single use
        with torch.autocast(self.device.type, torch.bfloat16, self.dtype == torch.bfloat16,
                            cache_enabled=False):
            hidden = self.showo.model(ids, attention_mask=mask, use_cache=False)[0]     # (B, L, D)
        hidden = hidden[:, -self.num_tokens - 1:-1].float()                     # (B, N, D)
        codes = slice(self.offset, self.offset + self.codebook_size)
        head = self.showo.lm_head
        with torch.autocast(self.device.type, enabled=False):   # bf16 would change the draws
            return F.linear(hidden, head.weight[codes], head.bias[codes])       # (B, N, K)

    @torch.no_grad()
    def decode(self, tokens):
        """The pixels of finished pictures: tokens (B, N) -> (B, H, W, 3) uint8"""
        side = math.isqrt(self.num_tokens)
        at_once = max(1, 4096 // self.num_tokens)           # 4 pictures of 512 x 512, for memory
        pictures = []
        for codes in tokens.view(-1, side, side).split(at_once):                # (b, h, w)
            pixels = ((self.decoder(codes) + 1) / 2).clamp(0, 1) * 255          # (b, 3, H, W)
            pictures.append(pixels.to(torch.uint8).permute(0, 2, 3, 1))     # Show-o truncates
        return torch.cat(pictures)


# --------------------------------------------------------------------------------------------------
# 9. The shapes world: a small Phi, a decoder of tiles, and a base trained from scratch. The base is
#    most confident about the background: 61% of a picture is revealed before an object gets its
#    first tile, and 40% of the objects begin with several tiles in one step, drawn independently.
#    After training these are 14% and 5% (assets/study.md). With 36 steps the same base reveals one
#    token at a time, and gets 91% of the pictures right instead of 29%.


class PlacedEmbedding(nn.Embedding):
    """Embeddings of ids, plus a learned one of their position: (B, L) -> (B, L, D)

    Places are counted from the end, because prompts vary in length. With RoPE alone, a model this
    small takes longer to learn where each object belongs.
    """

    def __init__(self, vocabulary, width, longest=192):
        super().__init__(vocabulary, width)
        self.place = nn.Parameter(torch.empty(longest, width))
        nn.init.normal_(self.weight, std=0.1)
        nn.init.normal_(self.place, std=0.1)

    def forward(self, ids):
        """ids (B, L) long -> (B, L, D)"""
        return super().forward(ids) + self.place[-ids.shape[1]:]


def shapes_policy(config) -> Policy:
    """A Policy with random weights. Its text tokens are the phrases of the shapes world."""
    phi = PhiConfig(
        vocab_size=1 + len(reward.PHRASES) + NUM_SPECIAL + reward.CODEBOOK_SIZE + 1,    # id 0: bos
        hidden_size=config.width, intermediate_size=config.width, hidden_act="relu",
        num_hidden_layers=config.layers, num_attention_heads=config.width // 16, qk_layernorm=True,
        initializer_range=0.1,              # Phi's 0.02 suits a width of 2048, not of 64
        attn_implementation="eager",        # faster than sdpa for so few tokens on a CPU
        # neighbours are only 1 or 6 apart, which slow rotations cannot tell: RoPE rotates the whole
        # head, at higher frequencies
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0})

    def tokenize(caption):
        if caption and caption not in reward.WANTED:
            raise InputError(f"{caption!r} is not a caption of the shapes world; use --model")
        return [1 + reward.PHRASES.index(phrase) for phrase in reward.phrases(caption)]

    def paint(codes):                       # p = reward.TILE; + 0.5 because decode truncates
        tiles = (reward.TILES.to(codes.device)[codes] + 0.5) / 127.5 - 1    # (B, h, w, p, p, 3)
        tiles = tiles.movedim(-1, 3).flatten(3).movedim(-1, 1)              # (B, 3 * p * p, h, w)
        return F.pixel_shuffle(tiles, reward.TILE)                          # (B, 3, h * p, w * p)

    policy = Policy(phi, tokenize, 0, paint, reward.GRID ** 2, reward.CODEBOOK_SIZE)
    policy.showo.model.embed_tokens = PlacedEmbedding(phi.vocab_size, config.width)
    return policy


@torch.enable_grad()
def pretrain(policy, config, batch=32, lr=4e-3, prompt_dropout=0.1):
    """Masked-token prediction on correct pictures, including those of held-out captions

    A share of the prompts is replaced by "", so that guidance has an unconditional model. With
    --caption-noise, a share of the pictures is that of another caption.
    """
    rng = random.Random(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    N = policy.num_tokens
    MASK = policy.codebook_size
    total = config.pretrain_steps
    n = min(20_000, batch * total)
    prompts, pictures = reward.draw_pairs(n, rng, config.caption_noise)         # (n,), (n, N)
    optimizer = torch.optim.AdamW(policy.parameters(), lr, (0.9, 0.98), fused=True)
    for i in bar(range(total), "pretraining"):
        set_lr(optimizer, lr, i, 100, total)
        index = torch.randint(len(prompts), (batch,), generator=generator)      # (batch,)
        texts = []
        for j in index.tolist():
            dropped = rng.random() <= prompt_dropout
            texts.append("" if dropped else prompts[j])
        share = torch.cos(torch.rand(batch, 1, generator=generator) * math.pi / 2)   # as in MaskGIT
        order = torch.rand(batch, N, generator=generator).argsort(-1)           # (batch, N)
        masked = (order < (share * N).ceil()).to(policy.device)                 # (batch, N) bool
        tokens = pictures[index].to(policy.device)                              # (batch, N)
        logits = policy(policy.encode(texts), tokens.masked_fill(masked, MASK))     # (batch, N, K)
        loss = F.cross_entropy(logits[masked], tokens[masked])
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (i + 1) % 500 == 0:
            print(f"pretrain {i + 1}/{total} | cross-entropy {loss.item():.3f}", flush=True)


def load_base(policy, config, folder):
    """Give the policy the base's weights, from a file of an earlier run, or by pretraining

    The file is named by the settings that the base depends on.
    """
    path = folder / (f"base-{config.seed}-{config.width}-{config.layers}-{config.pretrain_steps}-"
                     f"{config.caption_noise}.pt")
    if path.exists():
        fill(policy, read_weights(path), path)
        return
    pretrain(policy, config)
    with replacing(path) as partial:
        torch.save(policy.state_dict(), partial)


# --------------------------------------------------------------------------------------------------
# 10. Show-o as a policy: the published weights in the class of section 8, and MAGVIT-v2's decoder.

# Defaults for Show-o, 512 x 512: the paper's learning rate; the released code's T, temperature,
# reward and guidance; a warm-up of 1,000 / 16 = 62, inferred from its scheduler and 16 processes.
# w = 5 is 6 in the other convention, uncond + w (cond - uncond). 625 updates draw 10,000 captions,
# the size of the paper's file.
SHOWO = dict(reward="clip", steps=50, eval_steps=50, temperature=1.0, guidance=5.0, updates=625,
             lr=3e-6, warmup=62, rollout_batch=24, micro_batch=8, checkpointing=True,
             eval_every=10, eval_pictures=64)
WEIGHTS = "pytorch_model.safetensors"       # the usual name of the file


class MagvitDecoder(nn.Module):
    """The decoder of MAGVIT-v2 (Yu et al., 2023) as Show-o publishes it, names of modules included

    Its blocks are those of Janus, so they come from transformers. There is no codebook (lookup-free
    quantisation): a code's vector is its 13 bits as -1 and 1. The width varies only in tests.
    """

    def __init__(self, width=128, bits=13):
        super().__init__()
        config = janus.JanusVQVAEConfig()
        channels = [width * factor for factor in (1, 1, 2, 2, 4)]               # fine to coarse
        self.post_quant_conv = nn.Conv2d(bits, bits, 1)
        self.conv_in = nn.Conv2d(bits, channels[-1], 3, padding=1)
        self.mid = janus.JanusVQVAEMidBlock(config, channels[-1])
        self.up = nn.ModuleList()
        for level, count in enumerate((4, 4, 3, 4, 3)):
            outputs = channels[level]
            inputs = channels[min(level + 1, 4)]                                # of the first block
            blocks = nn.Sequential()
            for _ in range(count):
                blocks.append(janus.JanusVQVAEResnetBlock(config, inputs, outputs))
                inputs = outputs
            parts = nn.ModuleDict({"block": blocks})
            if level > 0:
                parts["upsample"] = janus.JanusVQVAEConvUpsample(outputs)       # twice the side
            self.up.append(parts)
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, codes):
        """codes (B, h, w) long -> (B, 3, 16 h, 16 w), in [-1, 1] except for overshoot"""
        bits = self.conv_in.in_channels
        shifts = torch.arange(bits - 1, -1, -1, device=codes.device)            # highest bit first
        x = (codes[:, None] >> shifts[:, None, None]) & 1                       # (B, 13, h, w)
        x = x.float() * 2 - 1
        x = self.mid(self.conv_in(self.post_quant_conv(x)))                     # (B, 4 width, h, w)
        for level in reversed(self.up):
            for part in level.values():                                         # block, upsample
                x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))                          # (B, 3, 16 h, 16 w)


def read_weights(source):
    """A state dict (or that in a checkpoint) from a file, a folder, or a hub repository -> dict

    OWNER/NAME and a folder hold it in pytorch_model.safetensors; OWNER/NAME/FILE names a file.
    """
    path = str(source)
    what = f"weights {path}"
    if not os.path.exists(path):
        what += " (no such file or folder; a hub id is OWNER/NAME or OWNER/NAME/FILE)"
    with blame(what):
        if os.path.isdir(path):
            path = os.path.join(path, WEIGHTS)
        elif not os.path.isfile(path):
            parts = path.split("/", 2)
            owner, name = parts[:2]
            file = WEIGHTS
            if len(parts) == 3:
                file = parts[2]
            path = hf_hub_download(f"{owner}/{name}", file)
        if path.endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, "cpu", weights_only=True, mmap=True)
        return state.get("policy", state)


def fill(policy, weights, source, assign=False):
    """Load a state dict by name, strictly. An error shows the first names in the file."""
    names = ", ".join(list(weights)[:2])
    with blame(f"weights {source} (with the names {names}, ...)"):
        policy.load_state_dict(weights, assign=assign)


def load_showo(model, vq_model="showlab/magvitv2", weights="", device="cpu") -> Policy:
    """Show-o and its decoder from hub ids or local folders. weights: in place of the model's own"""
    with blame(f"--model {model}"):
        config, _ = PhiConfig.get_config_dict(model)
        llm = config["llm_model_path"]
        text = config["llm_vocab_size"]
        codebook_size = config["codebook_size"]
        tokenizer = AutoTokenizer.from_pretrained(llm)
        expected = config["vocab_size"] - NUM_SPECIAL - codebook_size - 1
        if not len(tokenizer) == text == expected:
            raise ValueError(f"{llm} has {len(tokenizer)} tokens; llm_vocab_size in config.json is "
                             f"{text}, and vocab_size leaves {expected}")
        phi = PhiConfig.from_pretrained(
            llm, vocab_size=config["vocab_size"], qk_layernorm=True, tie_word_embeddings=False,
            hidden_act="gelu_pytorch_tanh",     # Phi's gelu_new, in one kernel
            attention_dropout=0.0, embd_pdrop=0.0, resid_pdrop=0.0)     # sampler and learner agree

    state = read_weights(weights or model)
    for name, x in read_weights(vq_model).items():
        if name.startswith("decoder."):         # the encoder is not needed
            state[name] = x
    tokenize = functools.partial(tokenizer.encode, add_special_tokens=False, verbose=False)
    with torch.device("meta"):                  # no storage; the loaded weights replace it
        decoder = MagvitDecoder().requires_grad_(False)
        policy = Policy(phi, tokenize, tokenizer.bos_token_id, decoder, config["num_vq_tokens"],
                        codebook_size)
    policy.showo.model.rotary_emb = type(policy.showo.model.rotary_emb)(phi)    # is in no file
    fill(policy, state, weights or model, assign=True)
    if torch.device(device).type == "cuda":
        policy.dtype = torch.bfloat16
        torch.set_float32_matmul_precision("high")      # TF32 for the head
    return policy.float().to(device)


def is_showo(model):
    """Whether --model is a folder or a hub id of Show-o, not MODULE:FUNCTION of your own"""
    is_windows_path = re.match(r"[A-Za-z]:[\\/]", model) is not None          # such as C:\models
    return model != "" and (":" not in model or is_windows_path)


def make_policy(config, device):
    """The policy of --model with --weights, if they are given; random weights for shapes"""
    torch.manual_seed(config.seed)
    if is_showo(config.model):
        policy = load_showo(config.model, config.vq_model, config.weights, device)
    else:
        if config.model:
            policy = reward.find_function(config.model)(config, device)
        else:
            policy = shapes_policy(config).to(device)
        if config.weights:
            fill(policy, read_weights(config.weights), config.weights)
    policy.eval()                               # no dropout: sampler and learner must agree
    if config.checkpointing and isinstance(policy, Policy):
        policy.showo.train()                    # else transformers ignores it; all dropouts are 0
        policy.showo.gradient_checkpointing_enable()
    longest = config.eval_steps
    if not config.generate:
        longest = max(longest, config.steps)
    if longest > policy.num_tokens:
        raise InputError(f"--steps, --eval-steps: must be at most {policy.num_tokens}, the number "
                         "of image tokens")
    return policy


# --------------------------------------------------------------------------------------------------
# 11. Around the loop: captions, the optimizer, a trial, evaluation, files, stops, GenEval.


def read_captions(path):
    """The captions of a file -> list of dicts with a "prompt", and whatever else a record holds

    .json holds a list and .jsonl a record per line. A record is a string, or an object with a
    `caption` (the paper's file) or a `prompt` (GenEval's). Any other file holds a caption per line.
    """
    kind = pathlib.Path(path).suffix.lower()
    records = []
    with blame(f"captions in {path}"):
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
        lines = [line for line in text.split("\n") if line.strip()]
        if kind == ".json":
            lines = json.loads(text)
        elif kind == ".jsonl":
            lines = [json.loads(line) for line in lines]
        elif kind in (".csv", ".tsv") or text[:1] in ("[", "{"):
            raise ValueError("must be a .txt with one caption per line, or a .json or .jsonl file")
        if not isinstance(lines, list):
            raise ValueError("must be a list of captions or of objects")
        for i, record in enumerate(lines, 1):
            if not isinstance(record, dict):
                record = {"prompt": record}
            prompt = record.get("prompt", record.get("caption"))
            if not isinstance(prompt, str):
                raise ValueError(f"record {i} must be a string, or hold a `caption` or a `prompt`")
            prompt.encode()                         # raises for a lone surrogate
            if prompt.strip():
                records.append({**record, "prompt": prompt.strip()})
        if not records:
            raise ValueError("the file has no captions")
    return records


def load_captions(path=""):
    """The training captions and the held-out captions -> 2 dicts, category -> list[str]

    A tenth of a file is held out, at most 64 captions, chosen by a checksum: the same ones in every
    run. Without a file they are the captions of the shapes world.
    """
    if not path:
        return [reward.captions(heldout=False), reward.captions(heldout=True)]
    prompts = [record["prompt"] for record in read_captions(path)]
    distinct = sorted(set(prompts), key=lambda prompt: (zlib.crc32(prompt.encode()), prompt))
    if len(distinct) < 2:
        raise InputError(f"captions in {path}: training needs at least two distinct ones")
    if len(distinct) < len(prompts):
        print(f"{len(prompts) - len(distinct)} captions are duplicates; each is used once")
    held = min(64, math.ceil(len(distinct) / 10))
    return [{"captions": distinct[held:]}, {"captions": distinct[:held]}]


def balanced(captions):
    """All captions, those of small categories repeated: categories are drawn equally often"""
    most = max(len(texts) for texts in captions.values())
    result = []
    for texts in captions.values():
        result += [texts[i % len(texts)] for i in range(most)]
    return result


def open_device(config):
    """The device of --device, which is printed, so that one sees whether a GPU is used"""
    with blame(f"--device {config.device}"):
        device = torch.device(config.device)
        torch.zeros(1, device=device)
    line = f"device {device}"
    if device.type == "cpu":
        line += f", {torch.get_num_threads()} threads"
    elif device.type == "cuda":
        line += f", {torch.cuda.get_device_name(device)}"
    print(line, flush=True)
    return device


def make_optimizer(policy, config):
    """AdamW, or torch's Adafactor with a learning rate on the same scale -> Optimizer

    Its state is allocated here, so that too little memory shows before any work.
    """
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1], "weight_decay": config.weight_decay},
              {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}]
    if config.optimizer == "adafactor":
        # with this eps, a step does not scale with the weight, as long as the weight's RMS is
        # at most 1
        optimizer = torch.optim.Adafactor(groups, lr=0.0, eps=(None, 1.0), foreach=False)
    else:
        fused = torch.device(policy.device).type != "cpu"
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=fused)
    for p in trained:                       # a step that moves nothing and leaves a state of zeros
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for moments in optimizer.state.values():
        moments["step"].zero_()
    return optimizer


def set_lr(optimizer, peak, i, warmup, total):
    """The learning rate of update i = 0, 1, ...: a linear warm-up times a cosine to 0 -> float"""
    cosine = (1 + math.cos(math.pi * min(1.0, i / total))) / 2
    lr = peak * (min(1.0, (i + 1) / (warmup + 1)) * cosine)
    for group in optimizer.param_groups:        # by hand, so that no scheduler has to be restored
        group["lr"] = lr
    return lr


def try_out(policy, reward_fn, measure, splits, config):
    """Try captions, rewards and policy, so that a mistake shows before any long work

    Every caption is encoded, pictures of two captions are rated, and one picture is learned from.
    """
    prompts = []
    for split in splits:
        for texts in split.values():
            prompts += texts
    print(f"{len(prompts)} captions, such as {prompts[0]!r}", flush=True)
    for i in range(0, len(prompts), 64):
        policy.encode(prompts[i:i + 64])        # a word may be unknown
    small = dataclasses.replace(config, eval_pictures=2, eval_steps=1)
    evaluate(policy, reward_fn, [{"": prompts}], small, 0)
    evaluate(policy, measure, [{"": prompts}], small, 0)

    ids = policy.encode(prompts[:2])                                            # (2, L_text)
    masks = torch.full((2, policy.num_tokens), policy.codebook_size, device=ids.device)     # (2, N)
    with torch.no_grad():
        once = policy(ids, masks)                                               # (2, N, K)
        again = policy(ids, masks)                                              # (2, N, K)
    if not torch.allclose(once, again, 1e-3, 1e-3):
        raise InputError("--model: two forward passes over one input differ; dropout and other "
                         "randomness must be off after eval()")

    torch.set_grad_enabled(True)                # a module of the user's may have switched it off
    trajectory = rollout(policy, ids, 1)
    first = torch.zeros(1, dtype=torch.long, device=ids.device)                 # picture 0, step 0
    logp = replay_logprob(policy, ids, trajectory, first, first, config.transition)     # (1,)
    if logp.requires_grad:
        logp.sum().backward()
    reached = [p for p in policy.parameters() if p.grad is not None]
    if not reached:
        raise InputError("--model: no gradient reaches its parameters; they must be registered, "
                         "not frozen, and used in forward outside no_grad")
    for p in reached:
        if p.dtype != torch.float32 or not p.grad.isfinite().all():
            raise InputError(f"--model: a weight is {p.dtype} with a gradient of norm "
                             f"{p.grad.norm()}; it needs float32 weights and finite gradients")
    policy.zero_grad(set_to_none=True)


@torch.no_grad()
def evaluate(policy, measure, splits, config, update):
    """Measure pictures of fixed captions from fixed noise: only the weights can make a difference

    splits: S dicts of C categories. Returns a dict of `update`, the number of updates done,
    `scores` (S, C, n) and `pictures` (S, C, 4, H, W, 3) uint8, the first four of each category.
    """
    n = config.eval_pictures
    prompts = []
    for split in splits:
        for captions in split.values():
            prompts += [captions[i % len(captions)] for i in range(n)]
    generator = torch.Generator(policy.device).manual_seed(config.seed + 1)
    trajectory = sample(policy, prompts, config, config.eval_steps, generator, config.guidance)
    pixels = policy.decode(trajectory.tokens).cpu()                             # (S*C*n, H, W, 3)
    scores = reward.rate(measure, pixels, prompts).view(len(splits), -1, n)     # (S, C, n)
    pictures = pixels.view(*scores.shape, *pixels.shape[1:])[:, :, :4]          # (S, C, 4, H, W, 3)
    return {"update": update, "scores": scores, "pictures": pictures.clone()}


def print_scores(evaluation, splits):
    """Two lines, training and held-out captions: the mean, and the mean of each category"""
    title = "base" if evaluation["update"] == 0 else f"update {evaluation['update']}"
    for name, split, scores in zip(("training", "held-out"), splits, evaluation["scores"]):
        means = scores.mean(1)                                                  # (C,)
        line = f"{title} {name} {means.mean():.3f} |"
        for category, mean in zip(split, means.tolist()):
            line += f" {category} {mean:.2f}"
        print(line.replace(" 0.", " ."), flush=True)


COLUMNS = ("update", "reward", "reward_se", "live", "sampled", "ratio", "clip", "kl", "grad",
           "loss", "lr", "seconds", "heldout")


def summary(groups):
    """What was sampled and kept in an update, for its row of metrics.csv -> dict

    `live` counts the kept groups whose rewards differ, `sampled` all groups.
    """
    means = groups.all_rewards.mean(1)                                          # (P',)
    error = ""                                  # a single group has none
    if len(means) > 1:
        error = means.std().item() / len(means) ** 0.5
    differ = [len(set(rewards)) > 1 for rewards in groups.rewards.tolist()]
    return {"reward": groups.all_rewards.mean().item(), "reward_se": error, "live": sum(differ),
            "sampled": len(means)}


def print_update(rows, config):
    """The line of the last update"""
    row = rows[-1]
    parts = [f"update {row['update']:3d}/{config.updates}", f"reward {row['reward']:.4f}"]
    if row["reward_se"] != "":
        parts[-1] += f" +-{row['reward_se']:.4f}"
    parts.append(f"groups {row['live']:2d}/{row['sampled']:2d}")
    if config.inner_epochs > 1:
        parts.append(f"ratio {row['ratio']:.3f} clip {row['clip']:.0%}")
    if config.beta > 0:
        parts.append(f"kl {row['kl']:.4f}")
    parts.append(f"grad {row['grad']:.2f}")
    parts.append(f"{row['seconds']:.1f} s")
    mean = sum(r["seconds"] for r in rows) / len(rows)
    left = int(mean * (config.updates - row["update"]))
    parts.append(f"left {left // 60}:{left % 60:02d}")
    print(" | ".join(parts), flush=True)


@contextlib.contextmanager
def replacing(path):
    """Write a file as a whole or not at all: yields a path beside it, which then takes its place"""
    partial = path.with_name(path.name + ".partial")
    yield partial
    os.replace(partial, path)


def write_rows(path, rows):
    """metrics.csv: a line per update"""
    with replacing(path) as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def save_checkpoint(path, config, splits, policy, optimizer, state):
    """Write all that --resume needs. Weights that are not finite never replace a checkpoint."""
    for p in policy.parameters():
        if not p.isfinite().all():
            return
    with replacing(path) as partial:
        torch.save({"config": dataclasses.asdict(config), "captions": splits, "state": state,
                    "policy": policy.state_dict(), "optimizer": optimizer.state_dict()["state"]},
                   partial)


def read_checkpoint(path, mmap):
    """A checkpoint -> dict; with mmap its tensors stay on disk until they are used"""
    with blame(f"--resume: cannot read {path} with this version"):
        saved = torch.load(path, "cpu", weights_only=True, mmap=mmap)
        if "state" not in saved:
            raise ValueError("it has no state of a run")
        Config(**saved["config"])               # fails if a setting is unknown
        return saved


def check_folder(config, checkpoint, splits):
    """Refuse a new run where one exists, and a --resume that does not fit the run there"""
    with blame(f"--out {config.out}"):          # it may be too long, or closed to this user
        try:
            exists = bool(checkpoint.stat())
        except FileNotFoundError:
            exists = False
    if exists and not config.resume:
        raise InputError(f"{checkpoint} exists; use --resume to continue it, or another --out to "
                         "start a new run")
    if config.resume:
        saved = read_checkpoint(checkpoint, mmap=True)
        for name, before in saved["config"].items():
            value = getattr(config, name)
            if value != before and name not in MAY_CHANGE:
                raise InputError(f"{flag(name)} {value}: the run has {before!r}; omit the flag, or "
                                 "start a new run with another --out")
        done = len(saved["state"]["rows"])
        if config.updates < done:
            raise InputError(f"--updates {config.updates}: must be at least {done}, the "
                             "number done")
        if saved["captions"] != splits:
            raise InputError(f"--prompts: the captions differ from those of {checkpoint}; restore "
                             "them, or start a new run with another --out")


def load_checkpoint(path, policy, optimizer):
    """Restore weights and optimizer -> the rest of a run's state, a dict"""
    saved = read_checkpoint(path, mmap=False)
    policy.load_state_dict(saved["policy"])
    # the settings of the optimizer's groups are those of this run
    optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["optimizer"]})
    return saved["state"]


STOPS = [signal.SIGINT, signal.SIGTERM]         # Ctrl-C, the end of a job,
if hasattr(signal, "SIGHUP"):                   # and a lost terminal, which Windows does not report
    STOPS.append(signal.SIGHUP)


@contextlib.contextmanager
def handling(stops, handler):
    """Inside, these signals go to a handler, except those that are ignored, as under nohup"""
    usual = {}
    if threading.current_thread() is threading.main_thread():       # others may not set handlers
        for number in stops:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                usual[number] = signal.signal(number, handler)
    try:
        yield usual
    finally:
        for number, before in usual.items():
            signal.signal(number, before)


@contextlib.contextmanager
def uninterrupted():
    """Inside, a stop waits until the end"""
    held = []

    def hold(number, frame):
        held.append(number)

    with handling(STOPS, hold):
        yield
    for number in held:
        signal.raise_signal(number)


@contextlib.contextmanager
def stops_interrupt():
    """Inside, SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does"""
    process = os.getpid()

    def interrupt(number, frame):
        if os.getpid() == process:
            raise KeyboardInterrupt
        signal.signal(number, usual[number])    # in a worker that a reward has forked
        signal.raise_signal(number)

    with handling(STOPS[1:], interrupt) as usual:       # SIGINT does so anyway
        yield


def save_grid(path, captions, before, after):
    """A PNG of pairs of held-out pictures, before | after, a category per row, with their scores

    captions: category -> list. before, after: evaluations
    """
    size = before["pictures"].shape[4]
    size = min(max(size, 96), 256)              # of a picture on the sheet, in pixels
    columns = before["pictures"].shape[2]
    width = 2 * size + 28
    height = size + 48
    font = ImageFont.load_default(size=13)
    sheet = Image.new("RGB", (columns * width + 12, len(captions) * height + 30), "white")
    draw = ImageDraw.Draw(sheet)
    title = f"held-out captions, same noise: base | update {after['update']}"
    draw.text((12, 8), title, "black", font)
    for i, texts in enumerate(captions.values()):
        for j in range(columns):
            x = 12 + j * width
            y = 30 + i * height
            draw.text((x, y), texts[j % len(texts)][:width // 6], "black", font)
            for evaluation in (before, after):
                picture = Image.fromarray(evaluation["pictures"][1, i, j].numpy())
                sheet.paste(picture.resize((size, size), Image.Resampling.BOX), (x, y + 18))
                draw.rectangle((x, y + 18, x + size - 1, y + 17 + size), outline="gray")
                score = evaluation["scores"][1, i, j]
                draw.text((x, y + 19 + size), f"{score:.2f}", "gray", font)
                x += size + 4
    sheet.save(path)


def checksum(policy):
    """A number that tells sets of weights apart -> int"""
    result = 0
    for x in policy.state_dict().values():
        bytes_of_x = x.cpu().contiguous().flatten().view(torch.uint8)
        result = zlib.crc32(bytes_of_x.numpy(), result)
    return result


def generate(config: Config):
    """4 pictures per caption in a file, in GenEval's layout. Each caption has its own noise.

    metadata.jsonl is written last: a folder in which it holds the caption's record is finished.
    """
    out = pathlib.Path(config.out).absolute()
    records = read_captions(config.generate)
    if out.exists() and not config.resume:
        raise InputError(f"{out} exists; use --resume to continue it, or choose another --out")
    device = open_device(config)
    policy = make_policy(config, device)
    print(f"{len(records)} captions; the first is {records[0]['prompt']!r}", flush=True)
    policy.encode([record["prompt"] for record in records])     # a word may be unknown
    settings = {"seed": config.seed, "eval_steps": config.eval_steps, "guidance": config.guidance,
                "temperature": config.temperature, "weights": checksum(policy)}
    path = out / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise InputError(f"{out} holds pictures with the settings {path.read_text().strip()}, not "
                         f"{json.dumps(settings)}; choose another --out")
    if not path.exists() and (out / "00000").exists():
        raise InputError(f"{out} holds pictures without settings.json; choose another --out")
    if (out / f"{len(records):05d}").exists():
        raise InputError(f"{out} holds more than {len(records)} captions; choose another --out")
    with blame(f"--out {out}"):
        out.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(settings) + "\n")

    for i, record in enumerate(bar(records, "captions")):
        folder = out / f"{i:05d}"
        metadata = folder / "metadata.jsonl"
        line = json.dumps(record) + "\n"
        if metadata.exists() and metadata.read_text() == line:
            continue
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        seed = zlib.crc32(f"{config.seed} {i}".encode())        # on a CPU seeds have 32 bits
        generator = torch.Generator(policy.device).manual_seed(seed)
        trajectory = sample(policy, [record["prompt"]] * 4, config, config.eval_steps, generator,
                            config.guidance)
        for j, picture in enumerate(policy.decode(trajectory.tokens).cpu().numpy()):
            Image.fromarray(picture).save(folder / "samples" / f"{j:04d}.png")
        with replacing(metadata) as partial:
            partial.write_text(line)


# --------------------------------------------------------------------------------------------------
# 12. The command line.


def help_text():
    """What -h prints: the fields of Config as they stand in the source"""
    fields, _, _ = inspect.getsource(Config).partition("    def __post_init__")
    return (f"python mask_grpo.py [--FLAG VALUE ...]\n\n{__doc__.splitlines()[0]}\nThe flags are "
            f"fields of Config: clip_low is --clip-low.\n\n{fields}"
            "Show-o's defaults are in SHOWO, section 10. --resume takes the settings from the\n"
            "checkpoint. --weights takes those named in OF_WEIGHTS, section 12, from a checkpoint.")


# the settings that --weights takes over from a checkpoint, as defaults
OF_WEIGHTS = ("width", "layers", "temperature", "eval_steps", "guidance")


def default_settings(given):
    """Defaults that replace Config's for this command line -> dict"""
    if given.get("resume") and not given.get("generate"):
        checkpoint = pathlib.Path(given.get("out", Config.out)).expanduser() / "checkpoint.pt"
        return read_checkpoint(checkpoint, mmap=True)["config"]
    settings = {}
    if is_showo(given.get("model", "")):
        settings.update(SHOWO)
    weights = os.path.expanduser(given.get("weights", ""))
    if os.path.isfile(weights) and not weights.endswith(".safetensors"):
        with blame(f"weights {weights}"):
            saved = torch.load(weights, "cpu", weights_only=True, mmap=True)
        before = saved.get("config", {})
        settings.update({name: before[name] for name in OF_WEIGHTS if name in before})
    return settings


def parse(argv=None) -> Config:
    """The settings of a command line"""
    parser = argparse.ArgumentParser("mask_grpo.py", argparse.SUPPRESS, add_help=False,
                                     argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    for field in dataclasses.fields(Config):
        if field.type is bool:
            parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction)
        else:
            parser.add_argument(flag(field.name), type=field.type)
    given = vars(parser.parse_args(argv))
    if given.pop("help", False):
        print(help_text())
        sys.exit(0)
    return Config(**{**default_settings(given), **given})


def main(argv=None):
    """Run a command line"""
    sys.path.insert(0, os.getcwd())             # where a MODULE:FUNCTION of your own may be
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")       # captions need not be ASCII
    config = None
    try:
        config = parse(argv)
        with stops_interrupt():
            if config.generate:
                generate(config)
            else:
                train(config)
    except InputError as error:
        sys.exit(f"mask_grpo.py: {error}")
    except KeyboardInterrupt:
        line = "mask_grpo.py: stopped"
        if config and (config.generate or pathlib.Path(config.out, "checkpoint.pt").exists()):
            line += f"; to continue: {shlex.join(['python', *sys.argv, '--resume'])}"
        sys.exit(line)


if __name__ == "__main__":
    main()
