# SPDX-License-Identifier: MIT
"""Mask-GRPO: reinforcement learning for image models that paint by unmasking, in one file.

The method of "Reinforcement Learning Meets Masked Generative Models" (Luo et al., 2025, arXiv 2510.13418v2; `Eq. n`
below is its numbering). A picture is N tokens, all MASK at first. At every step the policy draws a token for each masked
position, keeps the few it is surest of, and masks the rest again; after T steps nothing is masked. One update is:

  1. take P prompts and paint G pictures for each; record what was revealed at which step        (section 4, rollout)
  2. give every picture a reward, and compare it with its group: the advantage                   (section 5, Eq. 12)
  3. resample groups whose rewards hardly differ, for they teach noise                           (section 5, filter)
  4. define the probability of a whole step, which is what the paper is about                    (section 3, Eq. 13-15)
  5. ratio = that probability under the weights now / under the weights that painted             (section 6, Eq. 11)
  6. climb min(ratio A, clip(ratio) A), averaged over pictures and steps                         (section 6, Eq. 10)

Where this differs from the paper, and why:
  a. Eq. 14 is scored under the noise the sampler used (`p1`); as printed, it ignores the noise (`p1_literal`) and
     scores transitions that did not happen.
  b. the old log-probabilities are recorded, never a detached copy of the new: the ratio is real and clipping can act.
  c. the last step is a transition like any other, so every token of the picture is credited.
  d. a group without any spread in its rewards is resampled with a new prompt, at most a few times, then skipped.

`python mask_grpo.py` runs all of it on the embedded *shapes* world (reward.py): pretrain a small base, then improve it.

Dims: B = P * G samples (P prompts, G pictures each), N image tokens, K codes, T unmasking steps, L sequence length.
`tokens` hold codes 0..K-1, or K for MASK; `t` runs 0..T-1.
"""
import argparse
import copy
import csv
import dataclasses
import inspect                                   # the comments of Config are its help texts
import math
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import reward as rewards

try:
    from transformers import PhiConfig, PhiForCausalLM
except (ImportError, RuntimeError) as error:    # transformers loads torchvision, and that fails beside a foreign torch
    if "torchvision" not in f"{error} {error.__cause__}":
        raise
    message = ("torch and torchvision come from different builds; reinstall both together: "
               "pip install --force-reinstall torch torchvision")
    if __name__ == "__main__":
        print(f"mask_grpo.py: {message}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(message) from None

# ---------------------------------------------------------------------------------------------------------------------
# 1. Settings. One field, one flag (`clip_low` is --clip-low), one comment that says what turning it does.


@dataclass
class Config:
    # task
    reward: str = "shapes"           # what a good picture is; a name in reward.REWARDS
    out: str = "out"                 # folder for checkpoint, base, metrics.csv and pictures
    resume: bool = False             # go on from the checkpoint in --out, with its settings where none are given
    device: str = "auto"             # cpu, cuda, mps, or auto for the fastest of them
    seed: int = 0                    # of the base, the prompts and every draw
    # the base policy
    width: int = 64                  # hidden size, a multiple of 16
    layers: int = 4                  # transformer blocks
    pretrain_steps: int = 2000       # masked-token prediction before the reinforcement learning
    pretrain_lr: float = 5e-3        # its peak learning rate
    prompt_dropout: float = 0.1      # share of pretraining captions emptied, which is what guidance needs
    # sampling
    steps: int = 11                  # T in training; fewer than --eval-steps is the unmasking reduction
    eval_steps: int = 11             # T in evaluation
    temperature: float = 1.0         # of the noise on the confidence; 0 keeps exactly the surest tokens
    guidance: float = 0.0            # g in evaluation, (1 + g) cond - g uncond; training never uses guidance
    # Mask-GRPO
    transition: str = "p1"           # p1 (Eq. 14), p1_literal (its noise ignored), p2 (Eq. 15) or ar (Eq. 13)
    updates: int = 100               # rollout-and-learn rounds
    prompts: int = 8                 # P, prompts per update
    group: int = 8                   # G, pictures per prompt; 2 at least, more is smoother and slower
    inner_epochs: int = 1            # passes over one rollout; from the second on, the ratio leaves 1
    length_normalize: bool = False   # ratio per token, not per step; wanted when --inner-epochs > 1
    clip_low: float = 0.1            # the ratio counts down to 1 - this
    clip_high: float = 0.2           # and up to 1 + this
    beta: float = 0.0                # weight of the KL to the frozen base; 0 keeps no copy of the base
    score_steps: int = 0             # computational reduction: the first k steps, the last -k, or all of them (0)
    filter_quantile: float = 0.1     # groups with a reward std below this running quantile are resampled; 0: never
    filter_tries: int = 2            # times that the missing groups are sampled again before going on without
    # optimisation
    lr: float = 1.5e-3                # peak learning rate
    warmup: int = 5                  # updates to reach it, before a cosine decay to zero
    weight_decay: float = 0.02       # AdamW's, on matrices only
    max_grad_norm: float = 1.0       # longer gradients are scaled down to this
    micro_batch: int = 192           # (picture, step) pairs per backward pass: memory only, never the result
    # evaluation
    eval_every: int = 25             # updates between evaluations, picture grids and checkpoints
    eval_pictures: int = 48          # pictures per category and side of the split


# ---------------------------------------------------------------------------------------------------------------------
# 2. The policy. Show-o (Xie et al., 2024): a Phi language model over one joint vocabulary, in which a picture is part of
#    the sentence. All that the rest of the file needs of it is `logits = policy(prompt_ids, tokens)`.


class Policy(nn.Module):
    """p(code | prompt, partly masked picture), for all positions of the picture at once.

    The vocabulary is [text | 10 special ids | K codes | MASK], the sequence [text, <soi>, N image tokens, <eoi>].
    `tokenize` maps a str to text ids; `decoder` maps codes (B, h, w) to pixels (B, 3, H, W) in [-1, 1].
    """

    def __init__(self, phi: PhiConfig, tokenize, bos_id, decoder, num_tokens, codebook_size, max_text=128):
        super().__init__()
        self.lm = PhiForCausalLM(phi)
        self.tokenize, self.decoder, self.max_text = tokenize, decoder, max_text
        self.num_tokens, self.codebook_size = num_tokens, codebook_size
        self.offset = phi.vocab_size - 1 - codebook_size                # id of code 0; MASK is code K
        self.bos_id, self.pad_id = bos_id, self.offset - 10             # Show-o uses one id for begin and end of text
        self.soi_id, self.eoi_id, self.t2i_id = self.pad_id + 1, self.pad_id + 2, self.pad_id + 5

    @property
    def device(self):
        """Where the weights are."""
        return self.lm.lm_head.weight.device

    def encode(self, prompts: list[str]):
        """Prompts as Show-o lays them out: [<t2i>, bos, words, eos], left padded to the longest -> (B, L_text) long."""
        rows = []
        for prompt in prompts:
            words = self.tokenize(prompt)
            row = [self.t2i_id] + [self.bos_id] * (words[:1] != [self.bos_id]) + words + [self.bos_id]
            rows.append(row if len(row) <= self.max_text + 1 else row[:self.max_text] + [self.bos_id])
        longest = max(map(len, rows))
        rows = [[self.pad_id] * (longest - len(row)) + row for row in rows]
        return torch.tensor(rows, device=self.device)

    def attention_mask(self, prompt_ids):
        """Omni-attention: text is causal and blind to the picture; the picture sees everything; pads are unseen.

        Additive, as PhiForCausalLM takes it: 0 where query may see key. prompt_ids (B, L_text) -> (B, 1, L, L)
        """
        B, L_text = prompt_ids.shape
        position = torch.arange(L_text + self.num_tokens + 2, device=prompt_ids.device)
        real = F.pad(prompt_ids != self.pad_id, (0, self.num_tokens + 2), value=True)     # (B, L)
        causal = position[:, None] >= position                                            # (L, L)
        in_picture = (position >= L_text)[:, None]                                        # (L, 1)
        allowed = real[:, None, :] & (causal | in_picture)                                # (B, L, L)
        allowed = allowed | (causal & ~real[:, :, None])        # pads see pads: a row that sees nothing would be NaN
        floor = torch.finfo(torch.float32).min
        return torch.zeros(allowed.shape, device=position.device).masked_fill(~allowed, floor)[:, None]

    def forward(self, prompt_ids, tokens):
        """Logits read at the image positions themselves, over the K codes only.

        prompt_ids (B, L_text) long, tokens (B, N) long with K for MASK -> (B, N, K)
        """
        edge = prompt_ids.new_tensor([self.soi_id, self.eoi_id]).expand(len(tokens), 2)
        ids = torch.cat([prompt_ids, edge[:, :1], tokens + self.offset, edge[:, 1:]], dim=1)                  # (B, L)
        hidden = self.lm.model(ids, attention_mask=self.attention_mask(prompt_ids), use_cache=False)[0]
        hidden = hidden[:, -self.num_tokens - 1:-1]                                                           # (B, N, D)
        codes = slice(self.offset, self.offset + self.codebook_size)            # the head's other rows are never needed
        return F.linear(hidden, self.lm.lm_head.weight[codes], self.lm.lm_head.bias[codes])                   # (B, N, K)

    @torch.no_grad()
    def decode(self, tokens):
        """Pixels of finished pictures: tokens (B, N) -> (B, H, W, 3) uint8"""
        side = math.isqrt(self.num_tokens)
        pixels = self.decoder(tokens.view(-1, side, side))
        return (((pixels + 1) / 2).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1)


# ---------------------------------------------------------------------------------------------------------------------
# 3. The transition probability. One step takes the state s_t to s_{t+1}: the positions U are revealed, the positions R
#    stay masked although a token was drawn for them too. What is the probability of that?
#
#    ar  (Eq. 13)  every draw counts, also those thrown away. It rewards R for tokens nobody ever saw.
#    p2  (Eq. 15)  only the revealed tokens count. Simple, but the choice of U is ignored: it is no probability.
#    p1  (Eq. 14)  the revealed tokens, and for each remasked position the chance that it stayed below the threshold, the
#                  least confidence in U, whatever it drew: the sum of p_j(k) over all codes k that would have lost.


def mask_schedule(T: int, N: int) -> list[int]:
    """Tokens still masked after each of T steps, by the cosine schedule: mask_schedule(4, 16) = [14, 11, 6, 0].

    The cosine is taken in float32 as in the published sampler: at a ratio of 2/3 it falls just below 1/2, and so does
    the floor. Every step reveals at least one token, and the last one all that are left.
    """
    masked, schedule = N, []
    for t in range(T):
        ratio = torch.tensor((t + 1) / T, dtype=torch.float32)
        wanted = int(torch.floor(N * torch.cos(ratio * math.pi * 0.5)))
        masked = max(T - 1 - t, min(masked - 1, wanted))        # the steps to come need a token each
        schedule.append(masked)
    return schedule


TRANSITIONS = ("p1", "p1_literal", "p2", "ar")
FLOOR = -60.0   # stands for log 0: e^-60 is far below anything float32 can add up, and still finite


def transition_logprob(logits, tokens, step, t, kind, noise=None, drawn=None):
    """log p(s_{t+1} | s_t), the log-probability of what step t did.

    `step` says when a position was revealed, so U is step == t and R is step > t. `noise` is what the sampler added to
    the log-confidences at step t (p1; None for no noise), `drawn` are the tokens drawn then at every masked position (ar).

    Example: p_0 = (0.7, 0.2, 0.1) revealed code 0, p_1 = (0.6, 0.3, 0.1) drew code 2 and stays masked; no noise.
      p2 = log 0.7        p1 = log 0.7 + log(0.6 + 0.3 + 0.1), since all of p_1 is below 0.7        ar = log 0.7 + log 0.1
      Had position 1 been kept instead, with its 0.6:  p1 = log 0.6 + log(0.2 + 0.1), since 0.7 would have won.

    logits (B, N, K), tokens (B, N), step (B, N), t int or (B,), noise (B, N), drawn (B, N) -> (B,), float32 at least
    """
    t = t[:, None] if torch.is_tensor(t) else t
    revealed, remasked = step == t, step > t                                              # (B, N) bool each
    logp = F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))      # (B, N, K)

    if kind == "ar":
        drawn_logp = logp.gather(-1, drawn[..., None]).squeeze(-1)                        # (B, N)
        return (drawn_logp * (revealed | remasked)).sum(-1)                               # (B,)

    token = tokens.masked_fill(~revealed, 0)                                              # MASK is no index into K
    confidence = logp.gather(-1, token[..., None]).squeeze(-1)                            # (B, N)  log cs_i
    p2 = (confidence * revealed).sum(-1)                                                  # (B,)
    if kind == "p2":
        return p2

    # p1: both sides of the comparison carry the noise the sampler ranked with, or the event scored is not the one that
    # happened. The noise is a constant here: p1 is the probability of the step given it.
    if noise is None or kind == "p1_literal":
        noise = torch.zeros_like(confidence)
    threshold = (confidence + noise).masked_fill(~revealed, math.inf).amin(-1)            # (B,)    the last to be kept
    loses = logp + noise[..., None] < threshold[:, None, None]                            # (B, N, K) bool
    stays = logp.masked_fill(~loses, FLOOR).logsumexp(-1)                                 # (B, N)  log sum_k p_j(k) 1[..]
    return p2 + (stays * remasked).sum(-1)                                                # (B,)


def factors(step, t, kind):
    """How many probabilities the transition multiplies, the length to normalise by: step (B, N), t (B,) -> (B,) long"""
    counted = step == t[:, None] if kind == "p2" else step >= t[:, None]
    return counted.sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# 4. The sampler. A revealed token never changes, so a whole rollout is two tensors: the final tokens and the step that
#    revealed each. The state before step t is where(step < t, tokens, MASK), and any (picture, step) pair can be scored
#    later, in any order and any micro-batch.


@dataclass
class Trajectory:
    """What happened in a rollout, and all the loss needs to know of it."""
    tokens: torch.Tensor             # (B, N) long     the finished pictures
    step: torch.Tensor               # (B, N) long     when each token was revealed, 0..T-1
    noise: torch.Tensor              # (T, B, N)       added to the log-confidence before ranking
    drawn: torch.Tensor | None       # (T, B, N) long  tokens drawn at every position, kept for `ar` alone
    logp_old: torch.Tensor | None    # (T, B)          log-probability of each transition when it was made

    def select(self, keep):
        """The trajectories of some of the samples: keep (B,) bool"""
        time_major = (x if x is None else x[:, keep] for x in (self.noise, self.drawn, self.logp_old))
        return Trajectory(self.tokens[keep], self.step[keep], *time_major)

    @staticmethod
    def cat(parts):
        """Several rollouts of the same T as one."""
        columns = zip(*[dataclasses.astuple(part) for part in parts])
        return Trajectory(*[None if x[0] is None else torch.cat(x, dim=d) for x, d in zip(columns, (0, 0, 1, 1, 1))])


def gumbel(shape, generator, device):
    """Standard Gumbel noise. The clamp keeps both logs finite: a NaN would sort above +inf and remask known tokens."""
    uniform = torch.rand(shape, generator=generator, device=device).clamp(1e-20, 1 - 1e-7)
    return -(-uniform.log()).log()


@torch.no_grad()
def rollout(policy, prompt_ids, steps, temperature=1.0, guidance=0.0, null_ids=None, kind=None, generator=None):
    """Paint one picture per prompt, all in parallel, in `steps` steps.

    The noise of step t is temperature_t * Gumbel, and Show-o's temperature compounds: temperature_t = temperature_{t-1} *
    (1 - (t+1)/T). With guidance, logits are (1 + g) cond - g uncond, the latter under `null_ids`, the empty prompt; g = 5
    is 6 in the convention that weighs cond - uncond. `kind` names the transition whose log-probability is recorded.

    prompt_ids (B, L_text), null_ids (B, L_null) -> Trajectory
    """
    B, N, MASK, device = len(prompt_ids), policy.num_tokens, policy.codebook_size, prompt_ids.device
    tokens = torch.full((B, N), MASK, device=device)                                      # (B, N)
    step = torch.full((B, N), steps, device=device)                                       # (B, N)  `steps`: not yet
    record = {"noise": [], "drawn": [], "logp": []}
    for t, still_masked in enumerate(mask_schedule(steps, N)):
        logits = policy(prompt_ids, tokens)                                               # (B, N, K)
        if guidance > 0:
            logits = (1 + guidance) * logits - guidance * policy(null_ids, tokens)
        logp = F.log_softmax(logits.float(), dim=-1)                                      # (B, N, K)

        # draw a token everywhere; the argmax of log p + Gumbel is a sample of p, and needs no host synchronisation
        drawn = (logp + gumbel(logp.shape, generator, device)).argmax(-1)                 # (B, N)
        temperature = temperature * (1 - (t + 1) / steps)
        noise = temperature * gumbel((B, N), generator, device)                           # (B, N)
        confidence = logp.gather(-1, drawn[..., None]).squeeze(-1) + noise                # (B, N)

        # mask the least confident again; those revealed before can never be among them
        order = confidence.masked_fill(step < t, math.inf).argsort(-1)                    # (B, N)
        reveal = (step > t).scatter(1, order[:, :still_masked], False)                    # (B, N) bool
        tokens = torch.where(reveal, drawn, tokens)
        step = step.masked_fill(reveal, t)

        record["noise"].append(noise)
        record["drawn"].append(drawn if kind == "ar" else None)
        record["logp"].append(kind and transition_logprob(logits, tokens, step, t, kind, noise, drawn))
    noise, drawn, logp = (None if x[0] is None else torch.stack(x) for x in record.values())
    assert tokens.shape == step.shape == (B, N) and noise.shape == (steps, B, N)
    return Trajectory(tokens, step, noise, drawn, logp)


def path_logprob(policy, prompt_ids, path, b, t, kind):
    """log p(s_{t+1} | s_t) of recorded transitions under a policy, the states rebuilt from the trajectory.

    prompt_ids (B, L_text), sample indices b (M,), steps t (M,) -> (M,) float32
    """
    state = path.tokens[b].masked_fill(path.step[b] >= t[:, None], policy.codebook_size)  # (M, N)
    logits = policy(prompt_ids[b], state)                                                 # (M, N, K)
    drawn = None if path.drawn is None else path.drawn[t, b]                              # (M, N)
    return transition_logprob(logits, path.tokens[b], path.step[b], t, kind, path.noise[t, b], drawn)


# ---------------------------------------------------------------------------------------------------------------------
# 5. The advantage: how much better than its siblings a picture is. And which groups are worth learning from.


def group_advantage(reward, eps=1e-4):
    """(R - mean) / std within each group (Eq. 12), the std unbiased: [[1, 0, 0, 1]] -> [[.87, -.87, -.87, .87]].

    Equal rewards give 0. eps keeps rounding noise in (nearly) equal rewards from becoming a full-size advantage.
    reward (P, G) -> (P, G)
    """
    return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + eps)


class SampleFilter:
    """Tells vanishing groups by a running quantile of the reward stds seen so far (section 3.3 of the paper).

    A group vanishes if its std is below that quantile, or zero. Until `warmup` groups have been seen all are kept.
    """

    def __init__(self, quantile, warmup=32, window=512):
        self.quantile, self.warmup, self.history = quantile, warmup, deque(maxlen=window)

    def keep(self, std):
        """Which groups to learn from; their stds join the history: std (P,) -> (P,) bool, on the CPU"""
        std, keep = std.cpu(), torch.ones(len(std), dtype=torch.bool)
        if self.quantile > 0 and len(self.history) >= self.warmup:
            keep = (std >= torch.tensor(self.history).quantile(self.quantile)) & (std > 0)
        self.history.extend(std.tolist())
        return keep


# ---------------------------------------------------------------------------------------------------------------------
# 6. The loss. At ratio 1 its value is the mean advantage, which is 0 by construction; its gradient is -A grad log p, and
#    that is all the learning there is. Watch the reward, not the loss.


def grpo_loss(logp, logp_old, advantage, clip_low, clip_high):
    """-E[min(ratio A, clip(ratio, 1 - low, 1 + high) A)] (Eq. 10, 11), the min per sample. All (M,) -> scalar, dict

    Clipping removes the gradient only where it would push a ratio further out: above for A > 0, below for A < 0.
    """
    assert logp.shape == logp_old.shape == advantage.shape and logp.dim() == 1
    ratio = (logp - logp_old).exp()                                                       # (M,)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
    clips = ratio * advantage > clipped * advantage                                       # (M,) bool
    return loss, {"ratio": ratio.detach(), "clip": clips.float()}


def kl_k3(logp, logp_ref):
    """KL(p || p_ref) from samples of p, by Schulman's k3: r - 1 - log r with r = p_ref / p. Never negative. (M,) -> (M,)"""
    log_ratio = logp_ref - logp
    return log_ratio.exp() - 1 - log_ratio


# ---------------------------------------------------------------------------------------------------------------------
# 7. One update: paint, judge, filter, learn.


def to_images(pixels):
    """(B, H, W, 3) uint8 -> list of B PIL images"""
    return [Image.fromarray(picture) for picture in pixels.cpu().numpy()]


def sample_groups(policy, reward, prompts, sample_filter, config, generator):
    """Paint and judge groups until `config.prompts` of them are worth learning from, or the tries are used up.

    -> prompts kept (list of B), their Trajectory, their rewards (P, G), and the rewards of all groups painted (P', G)
    """
    names, paths, kept, everything = [], [], [], []
    for _ in range(1 + config.filter_tries):
        missing = config.prompts - len(names) // config.group
        chosen = torch.randint(len(prompts), (missing,), generator=generator, device=generator.device)
        batch = [prompts[i] for i in chosen.tolist() for _ in range(config.group)]
        path = rollout(policy, policy.encode(batch), config.steps, config.temperature, kind=config.transition,
                       generator=generator)
        scores = reward(to_images(policy.decode(path.tokens)), batch).view(missing, config.group)         # (P', G)
        keep = sample_filter.keep(scores.std(1))                                                          # (P',) bool
        each = keep.repeat_interleave(config.group)                                                       # (P' * G,) bool
        names += [name for name, good in zip(batch, each.tolist()) if good]
        paths.append(path.select(each.to(path.tokens.device)))
        kept.append(scores[keep])
        everything.append(scores)
        if keep.all():
            break
    return names, Trajectory.cat(paths), torch.cat(kept), torch.cat(everything)


def learn(policy, reference, optimizer, prompt_ids, path, advantage, config):
    """The inner epochs over one rollout, one optimizer step each, over all (picture, step) pairs that count.

    prompt_ids (B, L_text), path of B samples, advantage (B,) -> dict of numbers for the log
    """
    T, B = path.logp_old.shape
    kind, k = config.transition, config.score_steps
    steps = torch.arange(T)[:k] if k > 0 else torch.arange(T)[k:]   # computational reduction; [0:] is all of them
    pairs = torch.cartesian_prod(torch.arange(B), steps).to(prompt_ids.device)                            # (M, 2)
    weight = 1 / (config.prompts * config.group * len(steps))       # a group given up counts as one of advantage 0
    log = {}
    for epoch in range(config.inner_epochs):
        parts = []
        for b, t in (chunk.unbind(1) for chunk in pairs.split(config.micro_batch)):
            length = factors(path.step[b], t, kind) if config.length_normalize else 1
            logp = path_logprob(policy, prompt_ids, path, b, t, kind) / length                            # (m,)
            loss, part = grpo_loss(logp, path.logp_old[t, b] / length, advantage[b], config.clip_low, config.clip_high)
            if reference is not None:
                with torch.no_grad():
                    logp_ref = path_logprob(reference, prompt_ids, path, b, t, kind) / length             # (m,)
                kl = kl_k3(logp, logp_ref)                                                                # (m,)
                loss, part["kl"] = loss + config.beta * kl.mean(), kl.detach()
            loss = loss * len(b) * weight
            loss.backward()
            parts.append({"loss": loss.detach()[None], **part})
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}                    # (M,) each

        # nothing has moved yet in the first epoch: scoring must repeat what acting computed, or the ratio means nothing.
        # A quantile, for a single p1 may jump by rounding alone: Eq. 14 has a hard threshold, and a code may sit on it
        if epoch == 0:
            log["ratio_first"] = float(whole["ratio"].mean())
            off = float((whole["ratio"] - 1).abs().quantile(0.95))
            if off > 1e-3:
                raise RunError(f"the ratio is off 1 by {off:.1e} before any change of the weights: acting and learning "
                               "compute different log-probabilities (dropout, precision or prompts differ)")
        grad = float(nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm))
        log |= {"loss": float(whole["loss"].sum()), "grad": grad}
        for name in ("loss", "grad"):
            if not math.isfinite(log[name]):
                raise RunError(f"the {name} is {log[name]}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log |= {name: float(whole[name].mean()) for name in ("ratio", "clip", "kl") if name in whole}
    return log


# ---------------------------------------------------------------------------------------------------------------------
# 8. The shapes world as a policy: a small Phi of Show-o's layout, a codebook of fixed tiles, a base trained from scratch.


class TileDecoder(nn.Module):
    """The shapes world's decoder: every code is a tile. codes (B, h, w) -> (B, 3, H, W) in [-1, 1]"""

    def __init__(self):
        super().__init__()
        tiles = (rewards.tiles() + 0.5) / 127.5 - 1         # + 0.5: truncation to uint8 gives the very tile back
        self.register_buffer("tiles", tiles.clamp(max=1), persistent=False)                               # (K, p, p, 3)

    def forward(self, codes):
        pixels = self.tiles[codes]                                                                        # (B, h, w, p, p, 3)
        return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)                               # (B, 3, hp, wp)


def shapes_policy(config):
    """A policy of random weights for the shapes world, its text vocabulary the words of the captions."""
    words = ["<|endoftext|>"] + sorted({word for *_, caption in rewards.all_captions() for word in caption.split()})
    torch.manual_seed(config.seed)
    phi = PhiConfig(
        vocab_size=len(words) + 10 + rewards.CODEBOOK_SIZE + 1, hidden_size=config.width,
        intermediate_size=2 * config.width, num_hidden_layers=config.layers, num_attention_heads=config.width // 16,
        qk_layernorm=True, hidden_act="gelu_pytorch_tanh",  # Show-o's gelu_new, the same formula in one fused kernel
        initializer_range=0.1,                              # 0.02 suits a width of 2048; about 1 / sqrt(width) suits any
        # a grid of 6 rows needs rotations of period 6 to 36, so all of a head is rotated, and by a small base
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0})
    return Policy(phi, lambda text: [words.index(word) for word in text.split()], 0, TileDecoder(),
                  rewards.GRID ** 2, rewards.CODEBOOK_SIZE)


def warmup_cosine(warmup, total):
    """Learning-rate factor of update i: linear warm-up, then a cosine to zero, as a function for LambdaLR."""
    return lambda i: min(1.0, (i + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * min(i / total, 1.0)))


CATEGORY_WEIGHTS = (1, 1, 2, 1, 3, 2)   # of the pretraining captions: relations and counts take longest to learn


def pretrain(policy, config, batch=32):
    """Masked-token prediction on right pictures: mask a random share of the tokens and predict them, as in MaskGIT.

    Held-out captions take part: the base has seen the whole world, and only the RL updates are denied a part of it.
    """
    rng, generator = random.Random(config.seed), torch.Generator().manual_seed(config.seed)
    pool = min(20_000, batch * config.pretrain_steps)
    both = [rewards.captions(heldout) for heldout in (False, True)]
    prompts = [rng.choice([c for side in both for c in side[category]])
               for category in rng.choices(rewards.CATEGORIES, CATEGORY_WEIGHTS, k=pool)]
    pictures = torch.tensor([rewards.draw_scene(prompt, rng) for prompt in prompts])      # (pool, N)
    N, MASK, device = policy.num_tokens, policy.codebook_size, policy.device
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.pretrain_lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(100, config.pretrain_steps))
    for i in range(config.pretrain_steps):
        index = torch.randint(pool, (batch,), generator=generator)                        # (batch,)
        text = ["" if rng.random() < config.prompt_dropout else prompts[j] for j in index.tolist()]
        share = torch.cos(torch.rand(batch, 1, generator=generator) * math.pi / 2)        # (batch, 1)  of tokens masked
        order = torch.rand(batch, N, generator=generator).argsort(-1)                     # (batch, N)  a permutation
        masked = (order < (share * N).ceil()).to(device)                                  # (batch, N)  bool
        tokens = pictures[index].to(device)                                               # (batch, N)
        logits = policy(policy.encode(text), tokens.masked_fill(masked, MASK))            # (batch, N, K)
        loss = F.cross_entropy(logits[masked], tokens[masked])
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if (i + 1) % 500 == 0 or i + 1 == config.pretrain_steps:
            print(f"pretrain {i + 1:5d}/{config.pretrain_steps} | cross-entropy {loss.item():.3f}", flush=True)


BASE_FIELDS = ("width", "layers", "pretrain_steps", "pretrain_lr", "prompt_dropout", "seed")   # what makes a base


def load_base(policy, config):
    """Give the policy its base weights: those in the output folder if made with these settings, else new ones."""
    path, settings = pathlib.Path(config.out) / "base.pt", {name: getattr(config, name) for name in BASE_FIELDS}
    if path.exists():
        saved = read_checkpoint(path)
        if saved["settings"] == settings:
            policy.lm.load_state_dict(saved["policy"])
            print(f"base: {path}, pretrained before")
            return saved["seconds"]
    start = time.time()
    pretrain(policy, config)
    seconds = time.time() - start
    write_checkpoint(path, {"settings": settings, "policy": policy.lm.state_dict(), "seconds": seconds})
    return seconds


# ---------------------------------------------------------------------------------------------------------------------
# 9. What a run leaves behind: scores, pictures, checkpoints.


@torch.no_grad()
def evaluate(policy, reward, sides, config):
    """Paint and judge a fixed list of captions from fixed noise, so that two policies differ by their weights alone.

    sides: list of S dicts, category -> captions
    -> scores (S, C, n) float32, and the pixels of the first few of each: (S, C, GRID_COLUMNS, H, W, 3) uint8
    """
    n = config.eval_pictures
    prompts = [captions[i % len(captions)] for side in sides for captions in side.values() for i in range(n)]
    generator = torch.Generator(policy.device).manual_seed(config.seed + 1)
    path = rollout(policy, policy.encode(prompts), config.eval_steps, config.temperature, config.guidance,
                   policy.encode([""] * len(prompts)), generator=generator)
    pixels = policy.decode(path.tokens).cpu()                                             # (S * C * n, H, W, 3)
    scores = reward(to_images(pixels), prompts)                                           # (S * C * n,)
    shape = (len(sides), len(sides[0]), n)
    return scores.view(shape), pixels.view(*shape, *pixels.shape[1:])[:, :, :GRID_COLUMNS].clone()


GRID_COLUMNS = 4   # captions per row of the picture grid


def save_grid(path, title, side, before, after, scale=2):
    """A PNG of pairs, before | after, one row of captions per category, the reward below each picture.

    side: category -> captions; before, after: (scores (C, n), pixels (C, n, H, W, 3)) of the same prompts and noise
    """
    height, width = (scale * x for x in before[1].shape[2:4])
    cell_w, cell_h, top, font = 2 * width + 28, height + 48, 30, ImageFont.load_default(size=13)
    sheet = Image.new("RGB", (GRID_COLUMNS * cell_w + 12, len(side) * cell_h + top), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((12, 8), title, fill="black", font=font)
    for row, captions in enumerate(side.values()):
        for column in range(GRID_COLUMNS):
            x, y = 12 + column * cell_w, top + row * cell_h
            draw.text((x, y), captions[column % len(captions)], fill="black", font=font)
            for scores, pixels in (before, after):
                picture = Image.fromarray(pixels[row, column].numpy())
                sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y + 18))
                draw.rectangle((x, y + 18, x + width - 1, y + 17 + height), outline="gray")
                draw.text((x, y + 19 + height), f"{scores[row, column]:.2f}", fill="gray", font=font)
                x += width + 4
    path.parent.mkdir(exist_ok=True)
    sheet.save(path)


def write_checkpoint(path, state):
    """Save under a temporary name, then rename: whoever is killed here leaves the last good file as it was."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def read_checkpoint(path):
    """The dict that write_checkpoint saved. UsageError if the file is missing or damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"there is no {path} to read; start a run without --resume, or name its folder with --out") from None
    except Exception as error:      # torch raises half a dozen kinds for a file that is cut short or no checkpoint
        raise UsageError(f"{path} cannot be read ({type(error).__name__}): it is truncated or no checkpoint; "
                         "delete it or choose another --out") from None


# ---------------------------------------------------------------------------------------------------------------------
# 10. The run.


class UsageError(ValueError):
    """A mistake of the user's, told in one line before any work starts; exit status 2."""


class RunError(RuntimeError):
    """A run that must not go on, told in one line; exit status 1."""


def check(config, N):
    """UsageError for the first setting that cannot work, with the cause and the mend."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type is float and not math.isfinite(value):
            raise UsageError(f"{flag(field.name)} {value} is not a finite number")
    c = config
    for good, name, why in (
            (c.reward in rewards.REWARDS, "reward", f"is unknown; choose from: {', '.join(rewards.REWARDS)}"),
            (c.transition in TRANSITIONS, "transition", f"is unknown; choose from: {', '.join(TRANSITIONS)}"),
            (c.group >= 2, "group", "is too small: an advantage compares at least 2 pictures of a prompt"),
            (1 <= c.steps <= N, "steps", f"is out of range: every step reveals a token, so take 1 to {N}, the tokens of a picture"),
            (1 <= c.eval_steps <= N, "eval_steps", f"is out of range: take 1 to {N}, the tokens of a picture"),
            (abs(c.score_steps) <= c.steps, "score_steps", f"is longer than the {c.steps} steps of --steps"),
            (c.width >= 16 and c.width % 16 == 0, "width", "must be a positive multiple of 16, the size of a head"),
            (0 < c.lr < 1, "lr", "must lie between 0 and 1; 3e-6 for Show-o, about 1e-3 for a small policy"),
            (0 < c.pretrain_lr < 1, "pretrain_lr", "must lie between 0 and 1"),
            (0 <= c.prompt_dropout < 1, "prompt_dropout", "must be at least 0 and below 1"),
            (0 <= c.filter_quantile < 1, "filter_quantile", "must be at least 0 and below 1"),
            (0 <= c.clip_low < 1, "clip_low", "must be at least 0 and below 1: a ratio is never negative"),
            (c.max_grad_norm > 0, "max_grad_norm", "must be positive"),
            (c.eval_pictures >= GRID_COLUMNS, "eval_pictures", f"must be at least {GRID_COLUMNS}, the width of the picture grid"),
            *((getattr(c, name) >= 0, name, "must not be negative") for name in (
                "temperature", "guidance", "clip_high", "beta", "weight_decay", "filter_tries", "warmup", "seed")),
            *((getattr(c, name) >= 1, name, "must be at least 1") for name in (
                "layers", "pretrain_steps", "updates", "prompts", "inner_epochs", "micro_batch", "eval_every"))):
        if not good:
            raise UsageError(f"{flag(name)} {getattr(c, name)} {why}")


def pick_device(name):
    """The torch device of that name, `auto` being the fastest there is. UsageError if there is none."""
    here = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name != "auto" and name not in here:
        raise UsageError(f"--device {name} is not on this machine; choose from: auto, {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)


def claim_folder(config):
    """Make sure that the output folder is writable and ours -> the checkpoint to go on from, or None."""
    path = pathlib.Path(config.out) / "checkpoint.pt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UsageError(f"--out {config.out} cannot be written ({error.strerror}); choose another folder") from None
    if config.resume:
        return read_checkpoint(path)
    if path.exists():
        held, ours = read_checkpoint(path)["config"], dataclasses.asdict(config)
        other = [flag(name) + f" {held.get(name)}" for name in ours
                 if name not in ("out", "resume", "device") and ours[name] != held.get(name)]
        if other:
            raise UsageError(f"--out {config.out} holds a run with other settings ({', '.join(other)}); choose another "
                             "--out, or go on with that run by --resume")
    return None


def check_sizes(policy, saved):
    """UsageError if a checkpoint's tensors do not fit the policy."""
    ours = {name: tensor.shape for name, tensor in policy.lm.state_dict().items()}
    theirs = {name: tensor.shape for name, tensor in saved["policy"].items()} if saved else ours
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            raise UsageError(f"the checkpoint's policy has other sizes ({name} {tuple(theirs.get(name, ()))}, not "
                             f"{tuple(ours.get(name, ()))}); resume without --width and --layers")


def peak_memory_mb():
    """The most memory the run has held at once: the GPU's where there is one, else the process's."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2 ** 20
    if sys.platform == "win32":
        return math.nan                                     # no `resource` module there
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


class Interrupt:
    """Ctrl-C, made polite: the first sets `asked`, the second stops at once."""

    def __enter__(self):
        self.asked, self.previous = False, signal.signal(signal.SIGINT, self.ask)
        return self

    def ask(self, *_):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this update; Ctrl-C again to stop at once", flush=True)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.previous)


COLUMNS = ("update", "reward", "reward_se", "live", "painted", "ratio_first", "ratio", "clip", "kl", "grad", "loss",
           "lr", "seconds", "heldout")


def log_line(row, config, seconds_left):
    """One update as one line of fixed width, the reward first: it is what should move."""
    return (f"update {row['update']:4d}/{config.updates} | reward {row['reward']:.4f} ±{row['reward_se']:.4f} | "
            f"live groups {row['live']:2d}/{row['painted']:2d} | ratio {row['ratio_first']:.3f}→{row['ratio']:.3f} | "
            f"clip {row['clip']:4.0%} | kl {row['kl']:.4f} | grad {row['grad']:5.2f} | loss {row['loss']:+.4f} | "
            f"{row['seconds']:4.1f} s | left {int(seconds_left) // 60:2d}:{int(seconds_left) % 60:02d}")


def report(base, trained, sides, numbers):
    """The table, per category, and the closing block of `key: value` lines. base, trained: scores (2, C, n)"""
    print("\n" + " " * 22 + "".join(f"{category:>12}" for category in sides[0]) + f"{'all':>12}")
    for side, name in enumerate(("trained-on captions", "held-out captions")):
        for scores, when in ((base, "base"), (trained, "trained")):
            means = [*scores[side].mean(1), scores[side].mean()]
            print(f"{name if when == 'base' else '':20}{when:>8}"[:28] + "".join(f"{float(x):12.3f}" for x in means))
    print("---")
    for name, value in numbers.items():
        print(f"{name}: {value:.4f}" if isinstance(value, float) else f"{name}: {value}")


def train(config: Config):
    """Base, Mask-GRPO, comparison. Returns the numbers of the closing block, or None if Ctrl-C ended the run early."""
    check(config, N=rewards.GRID ** 2)
    device, saved, out = pick_device(config.device), claim_folder(config), pathlib.Path(config.out)
    reward = rewards.REWARDS[config.reward]
    sides = [rewards.captions(heldout=False), rewards.captions(heldout=True)]
    longest = max(map(len, sides[0].values()))      # every category equally often, however many captions it has
    prompts = [captions[i % len(captions)] for captions in sides[0].values() for i in range(longest)]

    policy = shapes_policy(config).to(device)
    check_sizes(policy, saved)
    generator = torch.Generator(device).manual_seed(config.seed)
    print(f"{sum(p.numel() for p in policy.parameters()):,} parameters | {device} | seed {config.seed} | "
          f"{config.prompts * config.group} pictures and {config.inner_epochs} optimizer step(s) per update | "
          f"{config.prompts * config.group * (abs(config.score_steps) or config.steps)} transitions scored")

    pretrain_seconds = load_base(policy, config)
    reference = copy.deepcopy(policy).requires_grad_(False) if config.beta > 0 else None
    matrices = [p for p in policy.parameters() if p.dim() > 1]
    vectors = [p for p in policy.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": config.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}], lr=config.lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(config.warmup, config.updates))
    sample_filter = SampleFilter(config.filter_quantile)
    if saved:
        policy.lm.load_state_dict(saved["policy"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        generator.set_state(saved["generator"])
        sample_filter.history.extend(saved["filter"])
        base, rows = saved["base"], saved["rows"]
    else:
        base, rows = evaluate(policy, reward, sides, config), []
    print(f"base: {base[0][0].mean():.3f} right on trained-on captions, {base[0][1].mean():.3f} on held-out ones")

    def save():
        write_checkpoint(out / "checkpoint.pt", {
            "config": dataclasses.asdict(config), "policy": policy.lm.state_dict(), "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(), "generator": generator.get_state(), "filter": list(sample_filter.history),
            "base": base, "rows": rows})

    with Interrupt() as interrupt, open(out / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
        for update in range(len(rows) + 1, config.updates + 1):
            start = time.time()

            # 1-3: paint groups, judge them, resample those that teach nothing
            names, path, kept, painted = sample_groups(policy, reward, prompts, sample_filter, config, generator)
            # 4-6: weigh each picture against its group and learn; without a single live group there is nothing to learn
            row = {"ratio_first": 1.0, "ratio": 1.0, "clip": 0.0, "kl": 0.0, "grad": 0.0, "loss": 0.0}
            try:
                if names:
                    advantage = group_advantage(kept).flatten().to(device)                # (B,)
                    row |= learn(policy, reference, optimizer, policy.encode(names), path, advantage, config)
            except RunError as error:
                raise RunError(f"update {update}: {error}; the last good state is "
                               f"{out / 'checkpoint.pt' if (out / 'checkpoint.pt').exists() else 'the base alone'}") from None
            row |= {"update": update, "lr": schedule.get_last_lr()[0], "live": int((kept.std(1) > 0).sum()), "painted": len(painted),
                    "reward": float(painted.mean()), "reward_se": float(painted.std() / painted.numel() ** 0.5),
                    "seconds": time.time() - start}
            schedule.step()

            evaluated = update % config.eval_every == 0 or update == config.updates
            if evaluated:
                trained = evaluate(policy, reward, sides, config)
                row["heldout"] = float(trained[0][1].mean())
                save_grid(out / "samples" / f"update_{update:05d}.png", f"held-out captions: base | update {update}",
                          sides[1], *((scores[1], pixels[1]) for scores, pixels in (base, trained)))
            rows.append(row)
            writer.writerow(row)
            file.flush()
            left = sum(r["seconds"] for r in rows) / len(rows) * (config.updates - update)
            print(log_line(row, config, left), flush=True)
            if evaluated or interrupt.asked:
                save()
            if interrupt.asked:
                print(f"stopped after update {update}; go on with: python mask_grpo.py --resume --out {config.out}")
                return None

    # the end: the same captions and the same noise, before and after
    trained = evaluate(policy, reward, sides, config)
    save_grid(out / "comparison.png", "held-out captions, same noise: base | trained", sides[1],
              *((scores[1], pixels[1]) for scores, pixels in (base, trained)))
    numbers = {"seed": config.seed, "updates": config.updates,
               "base": float(base[0][0].mean()), "trained": float(trained[0][0].mean()),
               "heldout_base": float(base[0][1].mean()), "heldout_trained": float(trained[0][1].mean()),
               "pretrain_seconds": pretrain_seconds, "train_seconds": sum(row["seconds"] for row in rows),
               "peak_memory_mb": peak_memory_mb()}
    report(base[0], trained[0], sides, numbers)
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# 11. The command line: a flag per field of Config, its comment the help.


def flag(name):
    """The command-line spelling of a Config field: clip_low -> --clip-low"""
    return "--" + name.replace("_", "-")


def parse(argv) -> Config:
    """The Config that a command line asks for. With --resume, the saved settings hold wherever no flag is given."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Config), re.MULTILINE))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for field in dataclasses.fields(Config):
        how = {"action": "store_true"} if field.type is bool else {"type": field.type, "metavar": field.type.__name__}
        parser.add_argument(flag(field.name), default=argparse.SUPPRESS, **how,
                            help=f"{comments[field.name]} (default: {field.default})".replace("%", "%%"))
    parser.error = lambda message: (_ for _ in ()).throw(UsageError(f"{message}; -h lists the flags"))
    given = vars(parser.parse_args(argv))
    if given.get("resume"):
        folder = given.get("out", Config.out)
        saved = read_checkpoint(pathlib.Path(folder) / "checkpoint.pt")["config"]
        given = {**saved, "device": Config.device, "out": folder, **given}
    return Config(**given)


def main(argv=None):
    """Run the command line; the exit status is 0, 1 for a run that broke, 2 for a mistake in the command, 130 for Ctrl-C."""
    try:
        return 0 if train(parse(argv)) else 130
    except (UsageError, RunError) as error:
        print(f"mask_grpo.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("\nmask_grpo.py: stopped; a finished base and the last checkpoint stay in the output folder", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
