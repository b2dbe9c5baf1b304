# SPDX-License-Identifier: MIT
"""Mask-GRPO: reinforcement learning for image models that generate by unmasking, in one file.

GRPO is group relative policy optimisation. "Reinforcement Learning Meets Masked Generative Models"
(Luo et al., 2025, arXiv 2510.13418v2; `Eq. n` cites its equations) applies it to models that work
as follows. A picture is a grid of N tokens, the codes of small patches. All begin as MASK. Each of
T steps draws a token at every masked position, keeps the draws with the highest confidence, and
masks the other positions again. The confidence of a draw is its log-probability under the model,
and the sampler adds noise to it. One step that keeps two of four draws:

    position                    0       1       2       3
    drawn token y_i ~ p_i      sky     cat     sky     dog
    log p_i(y_i)               -0.5    -1.8    -1.2    -1.1
    noise_i                    +0.2    -0.3    +0.3    -0.5      random; it varies the order
    noisy confidence           -0.3    -2.1    -0.9    -1.6      the sum; the two highest are kept
    next state                 sky     MASK    sky     MASK      positions 0 and 2 are revealed

As a decision process, the *state* is the prompt and the partly masked picture. The *action* is the
set of draws at all masked positions. The *next state* keeps those that rank highest. There is one
*reward*, for the finished picture. Many actions lead to the same next state, because the draws at
positions 1 and 3 are discarded. GRPO needs the probability of a step. There are three definitions
(section 2). `ar`, as in autoregressive models, is the probability of the action. `p1` sums over all
actions with this next state. `p2` uses the revealed tokens only. One update:

  1. Sample G pictures for each of P prompts. Record each step. (section 1)
  2. Reward each picture. The filter replaces groups whose rewards hardly differ. (sections 3, 5)
  3. Compute each picture's advantage A within its group, Eq. 12. (section 3)
  4. Compute ratio = p(step) now / p(step) under the weights that sampled, Eq. 11. (section 2)
  5. Maximise min(ratio A, clip(ratio) A), averaged over pictures and steps, minus an optional KL
     penalty against the base, the model before this training, Eq. 10. (section 4)

Without the clip, the filter, the division by the std and the KL, this is REINFORCE with the group's
mean as its baseline. This code deviates from the paper in four ways. `p1` is Eq. 14 with the
sampler's noise (`p1_literal` is Eq. 14 as printed). Groups are replaced at most twice.
The gradient norm is clipped. The loss can use a random subset of the steps, without bias.

Dims: B = P * G pictures of P prompts (captions), N image tokens, K codes, T steps, L length of the
sequence (L_text for its text), D hidden size, M (picture, step) pairs, m of them in a
micro-batch. The code counts steps from 0. `python mask_grpo.py -h` explains every setting.
"""
import argparse
import contextlib
import copy
import dataclasses
import functools
import inspect                                      # -h shows the source of Config
import itertools
import json
import math
import os
import pathlib
import random
import shlex
import signal
import sys
import time
import typing
import zlib
from collections import deque

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, PhiConfig, PhiForCausalLM
from transformers.models.janus import modeling_janus as janus

import reward

bar = functools.partial(tqdm, disable=None, leave=False)    # progress; silent without a terminal

# --------------------------------------------------------------------------------------------------
# 1. The sampler and its record. Sections 1 and 2 use the policy only as the function
#
#        policy(prompt_ids (B, L_text), tokens (B, N)) -> logits (B, N, K)
#
#    with N = policy.num_tokens and K = policy.codebook_size. A token is a code (0 to K - 1) or MASK
#    (K). The sampler and the learner call it with different batches, so the logits of a picture
#    must not depend on the other pictures, on padding, or on chance (dropout).
#    Confidence sampling is a heuristic: it does not draw from a joint distribution of the model. So
#    what is trained is the model *as this sampler uses it*. The policy itself is in section 8.
#    Sections 1 to 4 can be copied. They need torch, F, math, itertools, typing and deque.

def mask_schedule(T: int, N: int) -> list[int]:
    """Tokens still masked after each of T steps: floor(N cos(pi (t + 1) / (2 T))), 0 at the end

    mask_schedule(4, 16) = [14, 11, 6, 0]. Each step reveals a token or more, so T > N is refused.
    In float32, as in Show-o (section 8), cos(pi/3) is below 0.5, so the floor can differ.
    """
    assert 1 <= T <= N, f"{T} steps: must be 1 to {N}, since each reveals at least one token"
    masked, schedule = N, []
    for t in range(T):
        progress = torch.tensor((t + 1) / T, dtype=torch.float32)
        wanted = int(torch.floor(N * torch.cos(progress * math.pi * 0.5)))
        masked = max(T - 1 - t, min(masked - 1, wanted))    # leave a token for each later step
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
    return noise.clamp_(1e-20, 1e20).log_().neg_()      # E = 0 would give inf, and 0 * inf is NaN

@torch.no_grad()
def rollout(policy, prompt_ids, steps, temperature=1.0, guidance=0.0, null_ids=None,
            generator=None) -> Trajectory:
    """Sample a picture for each prompt, all in parallel, in T = `steps` steps

    Codes are always drawn at temperature 1. `temperature` scales the ranking noise, which varies
    the order of revealing. As in Show-o, step t multiplies this scale by 1 - (t + 1) / T.
    For T = 12 and temperature 2 this gives 1.83, 1.53, 1.15, 0.76, 0.45, 0.22, ... 0.
    With guidance w, logits are (1 + w) cond - w uncond; uncond uses null_ids, the empty prompt.
    prompt_ids (B, L_text) long, null_ids (B, L_null) long
    """
    B, N, K = len(prompt_ids), policy.num_tokens, policy.codebook_size
    tokens = torch.full((B, N), K, device=prompt_ids.device)                # (B, N) all MASK
    revealed_at = torch.full_like(tokens, steps)                            # (B, N) T: not yet
    noises, draws, temperature_left = [], [], temperature
    masked = [N, *mask_schedule(steps, N)]
    for t, (masked_before, masked_after) in enumerate(itertools.pairwise(masked)):
        logits = policy(prompt_ids, tokens).float()                         # (B, N, K)
        assert logits.shape == (B, N, K), f"logits {(*logits.shape,)}, must be {(B, N, K)}"
        if guidance > 0:
            uncond = policy(null_ids, tokens).float()                       # (B, N, K)
            logits = (1 + guidance) * logits - guidance * uncond
        logp = F.log_softmax(logits, dim=-1)                                # (B, N, K)

        # draw a code everywhere: the argmax of log p + Gumbel noise is an exact sample of p
        drawn = (logp + gumbel(logp.shape, generator, logp.device)).argmax(-1)      # (B, N)
        token_logp = logp.gather(-1, drawn[..., None]).squeeze(-1)          # (B, N)

        # add the ranking noise, also Gumbel, which varies the order of revealing
        temperature_left *= 1 - (t + 1) / steps
        noise = temperature_left * gumbel((B, N), generator, logp.device)   # (B, N)
        noisy_confidence = token_logp + noise                               # (B, N)

        # keep the n_t masked positions with the highest noisy confidence
        candidates = noisy_confidence.masked_fill(revealed_at < t, -math.inf)       # (B, N)
        keep = candidates.topk(masked_before - masked_after).indices        # (B, n_t)
        tokens = tokens.scatter(1, keep, drawn.gather(1, keep))
        revealed_at = revealed_at.scatter(1, keep, t)
        noises.append(noise)
        draws.append(drawn)
    return Trajectory(tokens, revealed_at, torch.stack(noises, 1), torch.stack(draws, 1))

# --------------------------------------------------------------------------------------------------
# 2. The probability of a step. Step t reveals the positions U and masks the positions R again,
#    although a code was drawn there, too. The noise does not depend on the weights, so it counts as
#    part of the environment. It is recorded, and the probability is the one *given the noise*.
#
#        formula      factor for U  factor for R                           the probability of
#        ar           p_i(y_i)      p_j(y_j) of the discarded draw         the action      (Eq. 13)
#        p1           p_i(y_i)      the chance of ranking below all of U   the next state  (Eq. 14)
#        p1_literal   p_i(y_i)      the same chance without the noise      (Eq. 14 as printed)
#        p2           p_i(y_i)      1                                      the codes at U  (Eq. 15)
#
#    As an example, take two positions, two codes a and b, p_0 = (.7, .3) and p_1 = (.6, .4), where
#    p_1 is the distribution at position 1. One position is kept. In the last column the noise is
#    log 1.5 at position 1, so the ranking multiplies its probabilities by 1.5.
#
#        draws    probability   kept, no noise        kept, with noise
#        (a, a)   .7 * .6       0: a   (.7 > .6)      1: a   (.7 < .9)
#        (a, b)   .7 * .4       0: a   (.7 > .4)      0: a   (.7 > .6)
#        (b, a)   .3 * .6       1: a   (.3 < .6)      1: a   (.3 < .9)
#        (b, b)   .3 * .4       1: b   (.3 < .4)      1: b   (.3 < .6)
#
#        next state   p1, no noise     p1, with noise   p1_literal   p2
#        [a, MASK]    .70              .7 * .4 = .28    .70          .7
#        [MASK, a]    .6 * .3 = .18    .60              .18          .6
#        [MASK, b]    .4 * .3 = .12    .12              .12          .4
#        [b, MASK]    0                0                0            .3
#        sum          1.00             1.00             1.00         2.0
#
#    p1 adds up all draws with the same next state. The printed formula is right for a sampler
#    without noise. Here it prefers [a, MASK], but the noise favours [MASK, a]. p2 is not a
#    distribution over next states: the draws (a, a) count for both [a, MASK] and [MASK, a].
#
#    Averaged over the draws with one next state, the gradient of log ar is that of log p1 (Rao-
#    Blackwell). Without noise, given [a, MASK], every draw at position 1 loses, so log p1 has
#    gradient 0 in its logits. That of log ar is (.4, -.4) with probability .6, when a was drawn,
#    and (-.6, .6) with .4. So `ar` reinforces discarded codes: at ratio 1 more variance, no bias.
#
#    At fixed noise the ranking has no gradient (averaged over the noise it has; p1 leaves it out).
#    Yet training can change the order, because confidence *is* log p. Tokens of good pictures rank
#    higher as they become more probable, and p1's factor for R lowers codes that would outrank U.

TRANSITIONS = ("p1", "p1_literal", "p2", "ar")
FLOOR = -60.0       # stands in for log 0 when no code would lose; exp(-60) is negligible

def transition_logprob(logits, tokens, revealed_at, t, transition, noise=None, drawn=None):
    """log p(s_{t+1} | s_t), the log-probability of step t; `transition` is one of TRANSITIONS

    U is revealed_at == t, R is revealed_at > t. noise: what the sampler added to the confidences of
    this step; None is no noise. drawn: its draws, for `ar`.
    logits (B, N, K), tokens, revealed_at, noise, drawn (B, N), t int or (B,) -> (B,)
    """
    assert transition in TRANSITIONS, f"{transition!r}: must be one of {TRANSITIONS}"
    t = t[:, None] if torch.is_tensor(t) else t                             # (B, 1) or int
    revealed = revealed_at == t                                             # (B, N) bool: U
    remasked = revealed_at > t                                              # (B, N) bool: R
    dtype = torch.promote_types(logits.dtype, torch.float32)                # at least float32
    logp = F.log_softmax(logits, dim=-1, dtype=dtype)                       # (B, N, K)

    # masked_fill, not mask * logp: a model may give codes a logit of -inf, and 0 * inf is NaN
    if transition == "ar":
        token_logp = logp.gather(-1, drawn[..., None]).squeeze(-1)          # (B, N)
        return token_logp.masked_fill(revealed_at < t, 0).sum(-1)           # (B,)

    token = tokens.masked_fill(~revealed, 0)            # (B, N) MASK (K) is not a valid index
    token_logp = logp.gather(-1, token[..., None]).squeeze(-1)              # (B, N)
    logp_revealed = token_logp.masked_fill(~revealed, 0).sum(-1)            # (B,)
    if transition == "p2":
        return logp_revealed
    # The sampler compared noisy confidences, so both sides of this comparison carry the noise. The
    # threshold, the lowest one kept, is recomputed with the weights behind these logits.
    if noise is None or transition == "p1_literal":
        noise = torch.zeros_like(token_logp)                                # (B, N)
    threshold = (token_logp + noise).masked_fill(~revealed, math.inf).amin(-1)      # (B,)
    loses = logp + noise[..., None] < threshold[:, None, None]              # (B, N, K) bool
    logp_loses = logp.masked_fill(~loses, FLOOR).logsumexp(-1)              # (B, N)
    return logp_revealed + logp_loses.masked_fill(~remasked, 0).sum(-1)     # (B,)

def replay_logprob(policy, prompt_ids, trajectory, b, t, transition):
    """transition_logprob of recorded steps under a policy, in any order and any batch
    prompt_ids (B, L_text), pictures b (M,) long, their steps t (M,) long -> (M,)
    """
    tokens, revealed_at = trajectory.tokens[b], trajectory.revealed_at[b]   # (M, N) each
    state = tokens.masked_fill(revealed_at >= t[:, None], policy.codebook_size)     # (M, N)
    logits = policy(prompt_ids[b], state)                                   # (M, N, K)
    return transition_logprob(logits, tokens, revealed_at, t, transition,
                              trajectory.noise[b, t], trajectory.drawn[b, t])

# --------------------------------------------------------------------------------------------------
# 3. The advantage: how much better a picture is than the others of its group. Subtracting a number
#    that does not depend on the picture leaves the expected gradient as it is, because grad log p
#    has mean 0 (for `ar` and p1). The group's mean is nearly such a number. It estimates how hard
#    the caption is, so no value network is needed. All T steps share the picture's advantage.

def group_advantage(rewards, divide_by_std=True, eps=1e-4):
    """(reward - mean) / std in each group, Eq. 12: [[1, 0, 0, 1]] -> [[.87, -.87, -.87, .87]]

    Dividing by the std (with G - 1) weights captions equally, but it turns tiny differences into
    large ones. Dr. GRPO (arXiv 2503.20783) does not divide. eps keeps rounding errors small.
    rewards (P, G) -> (P, G)
    """
    centred = rewards - rewards.mean(1, keepdim=True)                       # (P, G)
    return centred / (rewards.std(1, keepdim=True) + eps) if divide_by_std else centred

class SampleFilter:
    """Finds vanishing groups, those without a usable signal (section 3.3 of the paper)

    A group vanishes if the std of its rewards is 0, or below this quantile of the last `window`
    stds. No group does at quantile 0, or until `at_least` stds have been recorded.
    """

    def __init__(self, quantile, at_least=32, window=512):
        self.quantile, self.at_least, self.history = quantile, at_least, deque(maxlen=window)

    def keep(self, std):
        """Which groups to learn from. All stds are recorded. std (P,) -> (P,) bool"""
        keep = torch.ones_like(std, dtype=torch.bool)                       # (P,)
        if self.quantile > 0 and len(self.history) >= self.at_least:
            keep = (std >= torch.tensor(self.history).quantile(self.quantile)) & (std > 0)
        self.history.extend(std.tolist())
        return keep

# --------------------------------------------------------------------------------------------------
# 4. The loss. There is one ratio and one clip per step, as in PPO. With one inner epoch the ratio
#    is always 1, and the loss (without a KL) is minus the mean advantage, 0 by construction. But
#    logp_old is a constant, so the gradient is -A grad log p, not 0. Watch the reward instead.

# Two factors at FLOOR in logp_old would give over exp(100), inf in float32. Beyond this limit the
# gradient is 0, even for A < 0, where the ratio should be pushed down.
MAX_LOG_RATIO = 20.0

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
    samples are held fixed, its expected gradient is that of the reverse, KL(p_ref || p).
    logp, logp_ref (M,) -> (M,)
    """
    log_ratio = (logp_ref - logp).clamp(max=MAX_LOG_RATIO)                  # (M,)
    return log_ratio.exp() - 1 - log_ratio

# --------------------------------------------------------------------------------------------------
# 5. One update. It samples P * G pictures or more, by T forward passes each. Then it runs a forward
#    and a backward pass for each of P * G * T steps, 16 * 6 * 50 = 4,800 with the paper's settings.
#    Training uses no guidance. With it, a guided policy would sample, but the plain one would be
#    trained (issue 224 of the repository flow_grpo reports a collapse).

class Groups(typing.NamedTuple):
    """What an update learns from. Prompts and pictures are ordered group by group."""
    prompts: list[str]              # B
    trajectory: Trajectory          # of B pictures
    rewards: torch.Tensor           # (P, G)   of the groups that were kept
    sampled: torch.Tensor           # (P', G)  rewards of all P' groups that were sampled

def sample(policy, prompts, config, steps, generator, guidance=0.0) -> Trajectory:
    """A rollout of B prompts, `rollout_batch` pictures at a time -> Trajectory of B pictures"""
    null_ids = policy.encode([""])                                          # (1, L_null)
    parts = []
    for ids in bar(policy.encode(prompts).split(config.rollout_batch), "sampling"):
        parts.append(rollout(policy, ids, steps, config.temperature, guidance,
                             null_ids.expand(len(ids), *null_ids.shape[1:]), generator))
    return Trajectory(*map(torch.cat, zip(*parts)))

def sample_groups(policy, reward_fn, captions, sample_filter, config, generator) -> Groups:
    """Sample groups until P of them are worth learning from, or the tries are used up"""
    G, missing, rounds = config.group_size, config.groups, []
    for _ in range(1 + config.filter_tries):
        chosen = torch.randint(len(captions), (missing,), generator=generator,
                               device=generator.device)                     # (missing,)
        prompts = [captions[i] for i in chosen.tolist() for _ in range(G)]
        trajectory = sample(policy, prompts, config, config.steps, generator)
        pixels = policy.decode(trajectory.tokens)                           # (missing * G, H, W, 3)
        rewards = reward.rate(reward_fn, pixels, prompts).view(missing, G)
        keep = sample_filter.keep(rewards.std(1))                           # (missing,) bool
        b = keep.repeat_interleave(G).nonzero()[:, 0]                       # (kept * G,) pictures
        kept = Trajectory(*(x[b.to(x.device)] for x in trajectory))
        rounds.append(Groups([prompts[i] for i in b.tolist()], kept, rewards[keep], rewards))
        missing -= int(keep.sum())
        if missing == 0:
            break
    prompts, trajectories, *both = zip(*rounds)         # both kinds of rewards
    return Groups([*itertools.chain(*prompts)], Trajectory(*map(torch.cat, zip(*trajectories))),
                  *map(torch.cat, both))

def choose_steps(B, T, config, generator):
    """The steps that the loss uses -> (M, 2) long, pairs of a picture and a step

    k random steps per picture, new in every update, estimate Eq. 10's mean over all T without bias.
    With the first or last k (the paper's computational reduction), only those steps are optimised.
    """
    k, device = config.score_steps or T, generator.device
    steps = torch.arange(T, device=device).expand(B, T)                     # (B, T)
    if k < T and config.reduction == "random":
        steps = torch.rand(B, T, generator=generator, device=device).argsort(1)     # (B, T)
    steps = steps[:, -k:] if config.reduction == "last" else steps[:, :k]   # (B, k)
    pictures = torch.arange(B, device=device)[:, None].expand(B, k)         # (B, k)
    return torch.stack([pictures, steps.sort(1).values], dim=-1).flatten(0, 1)      # (B * k, 2)

def learn(policy, reference, optimizer, groups, advantage, config, generator):
    """An optimizer step per inner epoch; advantage (B,) -> means of the last epoch for the log"""
    trajectory, prompt_ids = groups.trajectory, policy.encode(groups.prompts)
    B, T, _ = trajectory.noise.shape
    pairs = choose_steps(B, T, config, generator)                           # (M, 2) b and t
    # the mean of Eq. 10 is over all P groups; those still missing count as 0
    weight = 1 / (config.groups * config.group_size * (config.score_steps or T))
    logp_old = []
    for epoch in range(config.inner_epochs):
        parts = []
        for i, chunk in enumerate(bar(pairs.split(config.micro_batch), "learning")):
            b, t = chunk.unbind(1)                                          # (m,) each
            logp = replay_logprob(policy, prompt_ids, trajectory, b, t, config.transition)
            if epoch == 0:      # the weights have not moved since sampling, so this is p_old
                logp_old.append(logp.detach())
            loss, numbers = grpo_loss(logp, logp_old[i], advantage[b], config.clip_low,
                                      config.clip_high)                     # (m,)
            if reference is not None:
                with torch.no_grad():
                    logp_ref = replay_logprob(reference, prompt_ids, trajectory, b, t,
                                              config.transition)            # (m,)
                numbers["kl"] = kl_k3(logp, logp_ref)                       # (m,)
                loss = loss + config.beta * numbers["kl"]
            (loss.sum() * weight).backward()
            parts.append({name: x.detach() for name, x in {"loss": loss, **numbers}.items()})
        log = {name: torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}
        log["loss"] *= len(pairs) * weight         # of all P groups, as above
        log["grad"] = nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm).item()
        if not math.isfinite(log["loss"] + log["grad"]):
            sys.exit(f"mask_grpo.py: the loss is {log['loss']} and the norm of its gradient "
                     f"{log['grad']}; try a smaller --lr")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return log

# --------------------------------------------------------------------------------------------------
# 6. The training loop, after its set-up. Mistakes in the input show before any long work.

def train(config: "Config"):
    """Load or make the base, then train it -> the rows of metrics.csv"""
    out = pathlib.Path(config.out).absolute()   # a reward may call os.chdir
    device = torch.device(config.device)

    # the captions to train on, all categories equally often, and those to hold out
    splits = reward.split_captions(config.prompts)              # 2 dicts, category -> captions
    most = max(map(len, splits[0].values()))
    captions = [texts[i % len(texts)] for texts in splits[0].values() for i in range(most)]

    # the reward, what evaluation reports, and the policy
    reward_fn = reward.load_reward(config.reward, device)
    measure = reward.load_reward(config.measure, device) if config.measure else reward_fn
    measure = reward.STRICT.get(measure, measure)       # ungraded, if there is such a version
    policy = make_policy(config, device)
    try_out(policy, (reward_fn, measure), splits, config)

    # the base, its frozen copy if there is a KL, and the other state of a run
    with reward.blame(f"--out {config.out}"):
        (out / "samples").mkdir(parents=True, exist_ok=True)
    if not (config.model or config.weights):
        load_base(policy, config, out)
    reference = copy.deepcopy(policy).requires_grad_(False) if config.beta > 0 else None
    optimizer = make_optimizer(policy, config)
    generator = torch.Generator(device).manual_seed(config.seed)
    sample_filter = SampleFilter(config.filter_quantile)
    if config.resume:
        saved = torch.load(out / "checkpoint.pt", "cpu", weights_only=True)
        if saved["captions"] != splits:
            sys.exit(f"mask_grpo.py: --prompts: the captions differ from those of {out}")
        policy.load_state_dict(saved["policy"])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["optimizer"]})  # not lr
        with reward.blame(f"--device {device}: the run was on a device of another kind"):
            generator.set_state(saved["draws"])
        sample_filter.history.extend(saved["filter"])
        before, after, rows = saved["before"], saved["after"], saved["rows"]
    else:
        before = after = evaluate(policy, measure, splits, config, "base")
        rows = []
        print("\n".join(before["lines"]), flush=True)

    def save():
        """Write checkpoint.pt, all that --resume needs. A kill at any moment leaves the old one."""
        partial = out / f"checkpoint.{os.getpid()}.partial"
        torch.save({"config": dataclasses.asdict(config), "captions": splits, "rows": rows,
                    "before": before, "after": after, "policy": policy.state_dict(),
                    "optimizer": optimizer.state_dict()["state"], "draws": generator.get_state(),
                    "filter": [*sample_filter.history]}, partial)
        os.replace(partial, out / "checkpoint.pt")

    save()                                      # from now on a new run in this folder is refused
    with finish_update_first(save) as signals:
        for update in range(len(rows) + 1, config.updates + 1):
            start = time.time()
            lr = set_lr(optimizer, config.lr, update - 1, config.warmup, config.updates)

            # sample groups of pictures; learn from them, unless every group vanished
            groups = sample_groups(policy, reward_fn, captions, sample_filter, config, generator)
            numbers = {"ratio": 1.0, "clip": 0.0, "kl": 0.0, "grad": 0.0, "loss": 0.0}
            if groups.prompts:
                advantage = group_advantage(groups.rewards, config.divide_by_std)   # (P, G)
                numbers |= learn(policy, reference, optimizer, groups,
                                 advantage.flatten().to(device), config, generator)
            rows.append({
                "update": update, "reward": groups.sampled.mean().item(),
                "reward_se": groups.sampled.mean(1).std().item() / len(groups.sampled) ** 0.5,
                "live": sum(len(set(group)) > 1 for group in groups.rewards.tolist()),
                "sampled": len(groups.sampled), **numbers, "lr": lr,
                "seconds": time.time() - start, "heldout": ""})

            # evaluate and save, and print only then: a broken pipe must not cost an update
            evaluated = update % config.eval_every == 0 or update == config.updates
            if evaluated:
                after = evaluate(policy, measure, splits, config, f"update {update}")
                rows[-1]["heldout"] = after["scores"][1].mean().item()
            stop = bool(signals)                # a later signal acts one update later
            if evaluated or stop:
                save()
            lines = [",".join(map(str, x)) for x in (rows[0].keys(), *(r.values() for r in rows))]
            (out / "metrics.csv").write_text("\n".join(lines) + "\n")
            if stop:
                break
            row = rows[-1]
            left = int(sum(r["seconds"] for r in rows) / update * (config.updates - update))
            more = f"ratio {row['ratio']:.3f} clip {row['clip']:.0%} | " * (config.inner_epochs > 1)
            more += f"kl {row['kl']:.4f} | " * (config.beta > 0)
            print(f"update {update:3d}/{config.updates} | reward {row['reward']:.4f} "
                  f"+-{row['reward_se']:.4f} | groups {row['live']:2d}/{row['sampled']:2d} | "
                  f"{more}grad {row['grad']:.2f} | {row['seconds']:.1f} s | "
                  f"left {left // 60}:{left % 60:02d}", flush=True)
            if evaluated:
                print("\n".join(after["lines"]), flush=True)
                reward.save_grid(out / "samples" / f"update_{update:05d}.png",
                                 f"base | update {update}", splits[1], before, after)
    if len(rows) < config.updates:
        sys.exit(f"mask_grpo.py: stopped after update {len(rows)}; to continue: "
                 f"python mask_grpo.py --resume --out {shlex.quote(config.out)}")
    print("\n".join([*before["lines"], *after["lines"]]), flush=True)
    reward.save_grid(out / "comparison.png", "base | trained", splits[1], before, after)
    return rows

# --------------------------------------------------------------------------------------------------
# 7. Settings. Each field is a flag (clip_low is --clip-low), and its comment is the help text.

@dataclasses.dataclass
class Config:
    """All settings of a run. The defaults are for the shapes world; SHOWO has those of Show-o."""
    # task
    model: str = ""                 # Show-o (hub id or folder) or MODULE:FUNCTION; "": shapes
    vq_model: str = "showlab/magvitv2"   # Show-o's image decoder: hub id, folder or file
    weights: str = ""               # other weights for the policy: file, folder, hub id[/FILE]
    prompts: str = ""               # captions (.txt, .json, .jsonl); a tenth is held out
    reward: str = "shapes"          # shapes, clip[:MODEL:TAG], hpsv2, pickscore, MODULE:FUNCTION
    measure: str = ""               # the reward that evaluation reports; "": that of --reward
    out: str = "out"                # folder for checkpoint, metrics.csv and pictures
    resume: bool = False            # continue the run in --out, with its settings
    generate: str = ""              # do not train; sample 4 pictures per caption in this file
    device: str = ""                # cpu, cuda, mps, ...; "": an accelerator if there is one
    seed: int = 0                   # seeds the base, the choice of prompts and every draw
    # the shapes world's base
    width: int = 64                 # hidden size, a multiple of 16
    layers: int = 4                 # transformer blocks
    pretrain_steps: int = 2500      # steps of masked-token prediction before any RL
    # sampling
    steps: int = 12                 # T in training; fewer than --eval-steps is cheaper
    eval_steps: int = 12            # T in evaluation
    temperature: float = 2.0        # scale of the ranking noise, which decays to 0; 0: no noise
    guidance: float = 0.0           # w in evaluation, (1 + w) cond - w uncond; training has none
    # Mask-GRPO
    transition: str = "p1"          # p1 (Eq. 14), p1_literal (no noise), p2 (Eq. 15), ar (Eq. 13)
    updates: int = 54               # rounds of sampling and learning
    groups: int = 16                # P, prompts per update; this and G are the paper's
    group_size: int = 6             # G, pictures per prompt, at least 2
    divide_by_std: bool = True      # divide advantages by the std (Eq. 12), or not (Dr. GRPO)
    inner_epochs: int = 1           # passes over each rollout; after the first, the ratio is not 1
    clip_low: float = 0.1           # the ratio is clipped below 1 - this
    clip_high: float = 0.2          # the ratio is clipped above 1 + this
    beta: float = 0.0               # weight of the KL to the frozen base; 0 keeps no copy of it
    score_steps: int = 0            # k, how many of each picture's T steps the loss uses; 0: all
    reduction: str = "random"       # which k steps: random, or the paper's first or last
    filter_quantile: float = 0.1    # groups whose reward std is below this quantile are replaced
    filter_tries: int = 2           # maximum rounds of replacing vanished groups per update
    # optimisation and evaluation
    optimizer: str = "adamw"        # adamw, or adafactor with almost no optimizer state
    lr: float = 1.5e-3              # peak learning rate; smaller for larger policies
    warmup: int = 5                 # updates of linear warm-up; a cosine takes lr to 0 over the run
    weight_decay: float = 0.02      # on matrices only, not on biases and norms
    max_grad_norm: float = 1.0      # gradients with a larger norm are scaled down to it
    rollout_batch: int = 1024       # pictures sampled at once; limits memory, changes the draws
    micro_batch: int = 192          # (picture, step) pairs per backward pass: affects memory only
    checkpointing: bool = False     # recompute activations to save memory (built-in models only)
    eval_every: int = 9             # updates between evaluations, picture grids and checkpoints
    eval_pictures: int = 48         # pictures per category, for training and held-out captions

    def __post_init__(self):
        here = torch.accelerator.is_available() and torch.accelerator.current_accelerator().type
        self.device = self.device or here or "cpu"
        for field in dataclasses.fields(self):      # torch.load refuses a Path or a numpy number
            setattr(self, field.name, field.type(getattr(self, field.name)))

# --------------------------------------------------------------------------------------------------
# 8. The policy is Show-o (Xie et al., 2024) or a small model like it. It is a Phi language model
#    whose vocabulary also holds image codes, so that text and picture are one sequence. The decoder
#    from codes to pixels is frozen. A policy of your own comes from a function (config, device). It
#    is an nn.Module with num_tokens N, codebook_size K, device, and with encode, forward and decode
#    as below; its logits must have the property of section 1.

NUM_SPECIAL = 10    # ids between text and codes: pad, start and end of image (soi, eoi), tasks, ...

class Policy(nn.Module):
    """p(code | prompt, partly masked picture), for all positions of the picture at once

    Vocabulary [text | 10 special | K codes | MASK], sequence [text, <soi>, N image tokens, <eoi>].
    tokenize: str -> text ids. decoder: codes (B, h, w) -> pixels (B, 3, H, W) in [-1, 1].
    The names in state_dict() are those under which Show-o and MAGVIT-v2 are published.
    """

    def __init__(self, phi: PhiConfig, tokenize, bos_id, decoder, num_tokens, codebook_size):
        super().__init__()
        self.showo, self.decoder, self.tokenize = PhiForCausalLM(phi), decoder, tokenize
        self.num_tokens, self.codebook_size, self.max_text = num_tokens, codebook_size, 128
        self.offset = phi.vocab_size - 1 - codebook_size    # id of code 0; MASK is the last
        self.bos_id, self.pad_id = bos_id, self.offset - NUM_SPECIAL    # bos also ends the text
        self.soi_id, self.eoi_id, self.t2i_id = self.pad_id + 1, self.pad_id + 2, self.pad_id + 5
        self.dtype = torch.float32      # of the transformer's matmuls; weights are always float32

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
            if len(row) > self.max_text + 1:        # cut, but with its last bos, as in Show-o
                row = row[:self.max_text] + [self.bos_id]
            rows.append(row)
        longest = max(map(len, rows))   # Show-o pads to 129; pads are masked, and RoPE is relative
        rows = [[self.pad_id] * (longest - len(row)) + row for row in rows]
        return torch.tensor(rows, device=self.device)

    def attention_mask(self, prompt_ids):
        """Omni-attention: text is causal; the picture sees everything except pads

        0 where a query may look, very negative elsewhere: prompt_ids (B, L_text) -> (B, 1, L, L)
        """
        after = self.num_tokens + 2                             # <soi>, the picture, <eoi>
        position = torch.arange(prompt_ids.shape[1] + after, device=prompt_ids.device)  # (L,)
        in_picture = (position >= prompt_ids.shape[1])[:, None]                 # (L, 1)
        causal = position[:, None] >= position                                  # (L, L)
        real = F.pad(prompt_ids != self.pad_id, (0, after), value=True)         # (B, L)
        allowed = real[:, None, :] & (causal | in_picture)                      # (B, L, L)
        allowed |= causal & ~real[:, :, None]   # pads see pads: an empty row may give NaN
        return torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]

    def forward(self, prompt_ids, tokens):
        """Logits of the codes, read at the image positions themselves (no next-token shift)

        prompt_ids (B, L_text) long, tokens (B, N) long, K for MASK -> (B, N, K) float32
        """
        edge = prompt_ids.new_ones(len(tokens), 1)                              # (B, 1)
        image = [edge * self.soi_id, tokens + self.offset, edge * self.eoi_id]
        ids, mask = torch.cat([prompt_ids, *image], dim=1), self.attention_mask(prompt_ids)
        with torch.autocast(self.device.type, torch.bfloat16, self.dtype == torch.bfloat16):
            hidden = self.showo.model(ids, attention_mask=mask, use_cache=False)[0]     # (B, L, D)
        hidden = hidden[:, -self.num_tokens - 1:-1].float()                     # (B, N, D)
        codes, head = slice(self.offset, self.offset + self.codebook_size), self.showo.lm_head
        with torch.autocast(self.device.type, enabled=False):   # bf16 would change the draws
            return F.linear(hidden, head.weight[codes], head.bias[codes])       # (B, N, K)

    @torch.no_grad()
    def decode(self, tokens):
        """The pixels of finished pictures: tokens (B, N) -> (B, H, W, 3) uint8"""
        side, pictures = math.isqrt(self.num_tokens), []
        at_once = max(1, 4096 // self.num_tokens)           # 4 pictures of 512 x 512, for memory
        for codes in tokens.view(-1, side, side).split(at_once):                # (b, h, w)
            pixels = ((self.decoder(codes) + 1) / 2).clamp(0, 1) * 255          # (b, 3, H, W)
            pictures.append(pixels.to(torch.uint8).permute(0, 2, 3, 1))     # Show-o truncates
        return torch.cat(pictures)

# --------------------------------------------------------------------------------------------------
# 9. The shapes world: a small Phi, a decoder of tiles, and a base trained from scratch. The base is
#    most confident about the background. It begins over 80% of the objects in its last three
#    steps, which reveal 4 or 5 tokens each, drawn independently. After RL, this share is 7%, and
#    the first step reveals a tile of an object, which all later draws see (assets/study.md).

def shapes_policy(config) -> Policy:
    """A Policy with random weights. Its text tokens are the phrases of the shapes world."""
    phi = PhiConfig(
        vocab_size=1 + len(reward.PHRASES) + NUM_SPECIAL + reward.CODEBOOK_SIZE + 1,
        hidden_size=config.width, intermediate_size=config.width, hidden_act="relu",
        num_hidden_layers=config.layers, num_attention_heads=config.width // 16, qk_layernorm=True,
        initializer_range=0.1,              # Phi's 0.02 suits a width of 2048, not of 64
        attn_implementation="eager",        # faster than sdpa for so few tokens on a CPU
        # neighbours are only 1 or 6 apart, so RoPE rotates the whole head, at higher frequencies
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0})

    def tokenize(caption):
        if caption and caption not in reward.WANTED:
            sys.exit(f"mask_grpo.py: {caption!r} is not in the shapes world; use --model")
        return [1 + reward.PHRASES.index(phrase) for phrase in reward.phrases(caption)]

    def paint(codes):                       # p x p pixels per tile; + 0.5 because decode truncates
        tiles = (reward.TILES.to(codes.device)[codes] + 0.5) / 127.5 - 1    # (B, h, w, p, p, 3)
        tiles = tiles.movedim(-1, 3).flatten(3).movedim(-1, 1)              # (B, 3 * p * p, h, w)
        return F.pixel_shuffle(tiles, reward.TILE)                          # (B, 3, h * p, w * p)

    policy = Policy(phi, tokenize, 0, paint, reward.GRID ** 2, reward.CODEBOOK_SIZE)
    # a learned position embedding, counted from the end, because prompts vary in length; with RoPE
    # alone, a model this small takes longer to learn where each object belongs
    embedding = policy.showo.model.embed_tokens = nn.Embedding(phi.vocab_size, config.width)
    embedding.place = nn.Parameter(torch.empty(192, config.width))
    for weight in embedding.parameters():
        nn.init.normal_(weight, std=0.1)
    embedding.register_forward_hook(lambda module, _, x: x + module.place[-x.shape[1]:])
    return policy

def pretrain(policy, config, batch=32, lr=4e-3, prompt_dropout=0.1):
    """Masked-token prediction on correct pictures, including those of held-out captions

    A share of the prompts is replaced by "", so that guidance has an unconditional model.
    """
    rng, generator = random.Random(config.seed), torch.Generator().manual_seed(config.seed)
    N, MASK, total = policy.num_tokens, policy.codebook_size, config.pretrain_steps
    prompts, pictures = reward.draw_pairs(min(20_000, batch * total), rng)      # (n,), (n, N)
    optimizer = torch.optim.AdamW(policy.parameters(), lr, (0.9, 0.98), fused=True)
    for i in bar(range(total), "pretraining"):
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
        if (i + 1) % 500 == 0:
            print(f"pretrain {i + 1}/{total} | cross-entropy {loss.item():.3f}", flush=True)

def load_base(policy, config, folder):
    """Load the base from a folder, or pretrain it. Its file name lists all that it depends on."""
    path = folder / f"base-{config.seed}-{config.width}-{config.layers}-{config.pretrain_steps}.pt"
    if not path.exists():
        pretrain(policy, config)
        torch.save(policy.state_dict(), path)
    fill(policy, read_weights(path), path)

# --------------------------------------------------------------------------------------------------
# 10. Show-o as a policy: the published weights in the class of section 8, and MAGVIT-v2's decoder.

# Defaults for Show-o, 512 x 512: the paper's T and learning rate, the released code's reward,
# warm-up and guidance. w = 5 is 6 in the other convention, uncond + w (cond - uncond). 625 updates
# draw 10,000 captions, the size of the paper's file. Prompts are not rewritten.
SHOWO = dict(reward="clip", steps=50, eval_steps=50, temperature=1.0, guidance=5.0, updates=625,
             lr=3e-6, warmup=62, rollout_batch=24, micro_batch=8, checkpointing=True,
             eval_every=10, eval_pictures=64)

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
        for level, (c, count) in enumerate(zip(channels, (4, 4, 3, 4, 3))):
            before = [channels[min(level + 1, 4)]] + [c] * (count - 1)          # input channels
            blocks = [janus.JanusVQVAEResnetBlock(config, b, c) for b in before]
            self.up.append(nn.ModuleDict({"block": nn.Sequential(*blocks)}))
            if level > 0:
                self.up[level]["upsample"] = janus.JanusVQVAEConvUpsample(c)    # twice the side
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, codes):
        """codes (B, h, w) long -> (B, 3, 16 h, 16 w), in [-1, 1] but for overshoot"""
        bits = self.conv_in.in_channels
        shifts = torch.arange(bits - 1, -1, -1, device=codes.device)            # highest bit first
        x = ((codes[:, None] >> shifts[:, None, None]) & 1).float() * 2 - 1     # (B, 13, h, w)
        x = self.mid(self.conv_in(self.post_quant_conv(x)))                     # (B, 4 width, h, w)
        for level in reversed(self.up):
            for part in level.values():                                         # block, upsample
                x = part(x)
        return self.conv_out(F.silu(self.norm_out(x)))                          # (B, 3, 16 h, 16 w)

def read_weights(source):
    """A state dict from a file (or a checkpoint's policy), from pytorch_model.safetensors in a
    folder or a hub repository OWNER/NAME, or from OWNER/NAME/FILE -> dict
    """
    path, usual = str(source), "pytorch_model.safetensors"
    with reward.blame(f"weights {source}" + " (no file or folder)" * (not os.path.exists(path))):
        if os.path.isdir(path):
            path = os.path.join(path, usual)
        elif not os.path.isfile(path):
            owner, name, file = (path + "//").split("/", 2)
            path = hf_hub_download(f"{owner}/{name}", file.strip("/") or usual)
        if path.endswith(".safetensors"):
            return load_file(path)
        with open(path, "rb") as file:          # torch's format before 1.6 cannot be mapped
            mapped = file.read(2) == b"PK"
        state = torch.load(path, "cpu", weights_only=True, mmap=mapped)
        return state.get("policy", state)

def fill(policy, weights, source, assign=False):
    """Load a state dict by name, strictly. An error shows what names the file has."""
    with reward.blame(f"weights {source} ({', '.join([*weights][:2])}, ...)"):
        policy.load_state_dict(weights, assign=assign)

def load_showo(model, vq_model="showlab/magvitv2", weights="", device="cpu") -> Policy:
    """Show-o and its decoder from hub ids or local folders. weights: in place of the model's own"""
    with reward.blame(f"--model {model}"):
        config, _ = PhiConfig.get_config_dict(model)
        llm, text, K = config["llm_model_path"], config["llm_vocab_size"], config["codebook_size"]
        tokenizer = AutoTokenizer.from_pretrained(llm)
        if not len(tokenizer) == text == config["vocab_size"] - NUM_SPECIAL - K - 1:
            raise ValueError(f"{llm} has {len(tokenizer)} tokens, which does not fit {config}")
        phi = PhiConfig.from_pretrained(
            llm, vocab_size=config["vocab_size"], qk_layernorm=True, tie_word_embeddings=False,
            hidden_act="gelu_pytorch_tanh",     # Phi's gelu_new, in one kernel
            attention_dropout=0.0, embd_pdrop=0.0, resid_pdrop=0.0)     # sampler and learner agree

    tokenize = functools.partial(tokenizer.encode, add_special_tokens=False, verbose=False)
    vq = {name: x for name, x in read_weights(vq_model).items() if name.startswith("decoder.")}
    with torch.device("meta"):                  # no storage; the loaded weights replace it
        policy = Policy(phi, tokenize, tokenizer.bos_token_id,
                        MagvitDecoder().requires_grad_(False), config["num_vq_tokens"], K)
    policy.showo.model.rotary_emb = type(policy.showo.model.rotary_emb)(phi)    # is in no file
    fill(policy, {**read_weights(weights or model), **vq}, weights or model, assign=True)
    if torch.device(device).type == "cuda":
        policy.dtype = torch.bfloat16
        torch.set_float32_matmul_precision("high")      # TF32 for the head
    return policy.float().to(device)

def make_policy(config, device):
    """The policy that --model names, with --weights if given; for shapes, random weights"""
    torch.manual_seed(config.seed)
    if config.model and ":" not in config.model:
        policy = load_showo(config.model, config.vq_model, config.weights, device)
    else:                                       # MODULE:FUNCTION of your own, or the shapes world
        own = config.model and reward.find_function(config.model)
        policy = own(config, device) if own else shapes_policy(config).to(device)
        if config.weights:
            fill(policy, read_weights(config.weights), config.weights)
    policy.eval()                               # no dropout: sampler and learner must agree
    if config.checkpointing and isinstance(policy, Policy):
        policy.showo.train()                    # else transformers ignores it; Phi has no dropout
        enable = getattr(policy.showo, "activation_checkpointing_enable", None)     # newer name
        (enable or policy.showo.gradient_checkpointing_enable)()
    if max(config.steps, config.eval_steps) > policy.num_tokens:
        sys.exit(f"mask_grpo.py: --steps, --eval-steps: at most {policy.num_tokens}, one per token")
    return policy

# --------------------------------------------------------------------------------------------------
# 11. Around the loop: the optimizer, a trial, evaluation, signals, pictures for GenEval.

def make_optimizer(policy, config):
    """AdamW, or torch's Adafactor with a learning rate on the same scale -> Optimizer"""
    trained = [p for p in policy.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() > 1]},
              {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0}]
    common = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "adafactor":     # with this eps, steps do not scale with the weights
        return torch.optim.Adafactor(groups, eps=(None, 1.0), foreach=False, **common)
    on_gpu = policy.device.type == "cuda"
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=on_gpu, **common)

def set_lr(optimizer, peak, i, warmup, total):
    """The learning rate of update i = 0, 1, ...: a linear warm-up times a cosine to 0 -> float"""
    cosine = (1 + math.cos(math.pi * min(1.0, i / total))) / 2
    lr = peak * (min(1.0, (i + 1) / (warmup + 1)) * cosine)
    for group in optimizer.param_groups:        # by hand, so that no scheduler has to be restored
        group["lr"] = lr
    return lr

def try_out(policy, functions, splits, config):
    """Pictures of two captions, so that a bug in a reward or model shows before any long work"""
    prompts = [caption for split in splits for texts in split.values() for caption in texts]
    print(f"{len(prompts)} captions, such as {prompts[0]!r}", flush=True)
    for i in range(0, len(prompts), 64):
        policy.encode(prompts[i:i + 64])        # a word may be unknown
    small = dataclasses.replace(config, eval_pictures=2, eval_steps=1)
    for function in functions:
        evaluate(policy, function, [{"": prompts}], small, "")
    ids = policy.encode(prompts[:2])                                            # (2, L_text)
    masks = torch.full((2, policy.num_tokens), policy.codebook_size, device=ids.device)     # (2, N)
    with torch.no_grad():
        if not torch.allclose(policy(ids, masks), policy(ids, masks), 1e-3, 1e-3):
            sys.exit("mask_grpo.py: --model: two passes over one input differ; is dropout on?")

@torch.no_grad()
def evaluate(policy, measure, splits, config, title):
    """Measure pictures of fixed captions from fixed noise: only the weights can make a difference

    splits: S dicts of C categories -> dict of scores (S, C, n), pictures (S, C, 4, H, W, 3), lines
    """
    n = config.eval_pictures
    prompts = [captions[i % len(captions)]
               for split in splits for captions in split.values() for i in range(n)]
    generator = torch.Generator(policy.device).manual_seed(config.seed + 1)
    trajectory = sample(policy, prompts, config, config.eval_steps, generator, config.guidance)
    pixels = policy.decode(trajectory.tokens).cpu()                             # (S*C*n, H, W, 3)
    scores = reward.rate(measure, pixels, prompts).view(len(splits), -1, n)     # (S, C, n)
    pictures = pixels.view(*scores.shape, *pixels.shape[1:])[:, :, :4]          # (S, C, 4, H, W, 3)
    lines = []
    for name, split, means in zip(("training", "held-out"), splits, scores.mean(2)):
        cells = " ".join(f"{category} {mean:.2f}" for category, mean in zip(split, means.tolist()))
        lines.append(f"{title} {name} {means.mean():.3f} | {cells}".replace(" 0.", " ."))
    return {"scores": scores, "pictures": pictures.clone(), "lines": lines}

@contextlib.contextmanager
def finish_update_first(save):
    """Ctrl-C and SIGTERM let the update finish; a second one acts as usual -> list of the signals

    It saves on errors, too. With several inner epochs, a failed update may be partly applied.
    """
    signals, usual = [], {}

    def note(number, _):
        signals.append(number)
        signal.signal(number, usual[number])
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping after this update; repeat to stop at once\n")

    try:
        with contextlib.suppress(ValueError):   # only the main thread may set handlers
            usual |= {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
        yield signals
    except (Exception, SystemExit):             # a bug in a reward or a model, NaN, no memory
        save()
        raise
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)

def generate(config: Config):
    """4 pictures per caption in a file, in GenEval's layout. Each caption has its own noise."""
    out, records = pathlib.Path(config.out).absolute(), reward.read_captions(config.generate)
    if out.exists() and not config.resume:
        sys.exit(f"mask_grpo.py: {out} exists; --resume continues it, another --out starts anew")
    policy = make_policy(config, torch.device(config.device))
    print(f"{len(records)} captions; the first is {records[0]['prompt']!r}", flush=True)
    policy.encode([record["prompt"] for record in records])     # a word may be unknown
    for i, record in enumerate(bar(records, "captions")):
        folder = out / f"{i:05d}"
        if (folder / "metadata.jsonl").exists():    # written last, so this caption is done
            continue
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        seed = zlib.crc32(f"{config.seed} {i}".encode())        # on a CPU seeds have 32 bits
        trajectory = sample(policy, [record["prompt"]] * 4, config, config.eval_steps,
                            torch.Generator(policy.device).manual_seed(seed), config.guidance)
        for j, picture in enumerate(policy.decode(trajectory.tokens).cpu().numpy()):
            Image.fromarray(picture).save(folder / "samples" / f"{j:04d}.png")
        (folder / "metadata.jsonl").write_text(json.dumps(record) + "\n")

# --------------------------------------------------------------------------------------------------
# 12. The command line.

MAY_CHANGE = {"updates", "device", "out", "resume", "rollout_batch", "micro_batch", "checkpointing",
              "model", "vq_model", "weights", "prompts"}        # on --resume; files may have moved
MAY_BE_0 = {"seed", "pretrain_steps", "score_steps", "filter_tries", "warmup"}  # other ints: 1

def parse(argv=None) -> Config:
    """The settings of a command line. With --resume, most are those of the checkpoint."""
    flags = {field: "--" + field.replace("_", "-") for field in Config.__dataclass_fields__}
    text = (f"python mask_grpo.py [--FLAG VALUE ...]\n\n{__doc__.splitlines()[0]}\nThe flags are "
            f"fields of Config: clip_low is --clip-low.\n\n{inspect.getsource(Config)}\n"
            "Show-o's defaults are SHOWO, in section 10.")
    parser = argparse.ArgumentParser(
        "mask_grpo.py", argparse.SUPPRESS, text, argument_default=argparse.SUPPRESS,
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = {"transition": TRANSITIONS, "optimizer": ("adamw", "adafactor"),
               "reduction": ("random", "first", "last")}
    for field in dataclasses.fields(Config):
        how = {"type": field.type, "choices": choices.get(field.name)}
        if field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        parser.add_argument(flags[field.name], help=argparse.SUPPRESS, **how)
    given = {"out": Config.out, **vars(parser.parse_args(argv))}
    checkpoint = pathlib.Path(given["out"], "checkpoint.pt")
    defaults = SHOWO if given.get("model") and ":" not in given["model"] else {}
    if given.get("generate"):
        if not (given.get("model") or given.get("weights")):
            parser.error("--generate needs --model, or --weights such as out/checkpoint.pt")
    elif given.get("resume"):
        with reward.blame(f"--resume: {checkpoint}"):
            saved = torch.load(checkpoint, "cpu", weights_only=True, mmap=True)
            defaults, done = dataclasses.asdict(Config(**saved["config"])), len(saved["rows"])
        for name in given:
            if name not in MAY_CHANGE and given[name] != defaults[name]:
                parser.error(f"{flags[name]} {given[name]}: the run has {defaults[name]!r}; leave "
                             "it out, or start a new run with another --out")
        if given.get("updates", done) < done:
            parser.error(f"--updates {given['updates']}: {done} are already done")
    elif checkpoint.exists():
        parser.error(f"{checkpoint} exists; --resume continues it, another --out starts a new run")
    config = Config(**{**defaults, **given})
    for name, field in Config.__dataclass_fields__.items():
        least = 0 if field.type is float or name in MAY_BE_0 else 2 if name == "group_size" else 1
        if field.type in (int, float) and not least <= getattr(config, name) < 2 ** 31:
            parser.error(f"{flags[name]} {getattr(config, name)}: must be at least {least}, and "
                         "below 2 ** 31")
    if config.width % 16 or config.score_steps > config.steps or config.filter_quantile > 1:
        parser.error("--width must be a multiple of 16, --score-steps at most --steps, and "
                     "--filter-quantile at most 1")
    if config.model and not (config.prompts or config.generate):
        parser.error("--model needs --prompts, a file of captions")
    with reward.blame(f"--device {config.device}"):
        torch.zeros(1, device=config.device)
    return config

def main(argv=None):
    """Run a command line."""
    sys.path.append(os.getcwd())                # where a MODULE:FUNCTION of your own may be
    config = parse(argv)
    (generate if config.generate else train)(config)

if __name__ == "__main__":
    main()
