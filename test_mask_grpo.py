# SPDX-License-Identifier: MIT
"""The tests of mask_grpo.py and reward.py, in the sections and the order of the code.

`pytest -q` takes about a minute on a CPU. The tests double as explanations: each checks a claim
against a calculation by hand, an enumeration or a simulation.
"""
import collections
import csv
import dataclasses
import inspect
import itertools
import json
import math
import os
import pathlib
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import types
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._subclasses import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PhiConfig, PreTrainedTokenizerFast

import mask_grpo as M
import reward as R

torch.set_num_threads(1)            # the tensors are tiny: a second thread would mostly wait

HERE = pathlib.Path(M.__file__).parent
TINY = dict(width=16, layers=1, pretrain_steps=2, steps=4, eval_steps=4, updates=2, groups=2,
            group_size=4, warmup=1, eval_pictures=4, eval_every=10, device="cpu")
EVERY_CAPTION = list(R.WANTED)

def tiny(**settings):
    """A Config small enough to run in a second."""
    return M.Config(**{**TINY, **settings})

def seeded(seed):
    """A CPU generator."""
    return torch.Generator().manual_seed(seed)

def shapes(**settings):
    """The small policy of the shapes world with random weights, in evaluation mode."""
    return M.make_policy(tiny(**settings), torch.device("cpu"))

def same(one, two):
    """Whether two lists of tensors are bitwise equal."""
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, two, strict=True))

class TablePolicy:
    """The least that a policy must provide. Its logits depend on the whole state."""
    def __init__(self, N=6, K=5, seed=0, scale=1.0):
        self.num_tokens, self.codebook_size, self.states = N, K, []
        self.own = scale * torch.randn(N, K, generator=seeded(seed))
        self.other = scale * torch.randn(N, K + 1, N, K, generator=seeded(seed)) / N ** 0.5

    def __call__(self, prompt_ids, tokens):
        """tokens (B, N) -> (B, N, K)"""
        self.states.append(tokens.clone())
        return self.own + sum(self.other[i, tokens[:, i]] for i in range(self.num_tokens))

def sample(policy, B=8, steps=4, seed=0, **more):
    """A rollout of a policy that ignores its prompts."""
    nothing = torch.zeros(B, 1, dtype=torch.long)
    return M.rollout(policy, nothing, steps, generator=seeded(seed), **more)

@pytest.fixture(scope="module")
def policy():
    """A small Policy that the tests only read."""
    return shapes()

# ---- 1. The sampler and its record ---------------------------------------------------------------

def test_schedule_equals_the_published_samplers():
    """Show-o's numbers but for its last step, which leaves one masked; float32 decides at 2/3."""
    schedule = M.mask_schedule(50, 1024)
    assert schedule[:10] == [1023, 1021, 1019, 1015, 1011, 1005, 999, 991, 983, 973]
    assert schedule[-4:] == [96, 64, 32, 0]
    assert M.mask_schedule(16, 256) == [254, 251, 244, 236, 225, 212, 197, 181, 162, 142, 120, 97,
                                        74, 49, 25, 0]
    assert M.mask_schedule(12, 36)[7] == 17
    assert M.mask_schedule(4, 16) == [14, 11, 6, 0] and M.mask_schedule(1, 9) == [0]

@pytest.mark.parametrize("N", [1, 5, 36, 256])
def test_every_step_of_every_schedule_reveals_a_token(N):
    """None is revealed twice, none is left over; no steps, or more than tokens, are refused."""
    for T in range(1, min(N, 64) + 1):
        schedule = M.mask_schedule(T, N)
        assert len(schedule) == T and schedule[-1] == 0
        assert all(before > after for before, after in zip([N] + schedule, schedule))
    for T in (0, N + 1):
        with pytest.raises(AssertionError, match=f"{T} steps"):
            M.mask_schedule(T, N)

@pytest.mark.parametrize("N, T", [(6, 1), (6, 3), (6, 6), (36, 14), (36, 18)])
def test_every_position_is_revealed_once_and_counts_follow_the_schedule(N, T):
    """The last token is no exception, and no noise is NaN."""
    path = sample(TablePolicy(N=N, K=4), steps=T)
    assert path.tokens.min() >= 0 and path.tokens.max() < 4
    masked = [N] + M.mask_schedule(T, N)
    for t in range(T):
        assert ((path.revealed_at == t).sum(1) == masked[t] - masked[t + 1]).all()
    assert path.noise.isfinite().all()

def test_replayed_states_are_the_states_acted_in():
    """The policy remembers what it was shown, and the replay must show the same. Prompts are only
    counted and indexed, so embeddings (B, L, D) serve as well as ids (B, L)."""
    table, prompts = TablePolicy(N=8), torch.randn(5, 3, 4)
    path = M.rollout(table, prompts, 4, generator=seeded(0))
    acted, table.states = table.states, []
    for t in range(4):
        M.replay_logprob(table, prompts, path, torch.arange(5), torch.full((5,), t), "ar")
    assert all(torch.equal(a, b) for a, b in zip(acted, table.states, strict=True))
    assert (acted[0] == 5).all() and (acted[3] == 5).any()

def test_draws_follow_the_policy_and_the_highest_noisy_confidence_is_kept():
    """Frequencies of the first draws; the first step keeps the highest sums of log p and noise."""
    table = TablePolicy(N=3, K=3)
    path = sample(table, B=20_000, steps=3, temperature=3.0)
    logp = table(None, torch.full((1, 3), 3))[0].log_softmax(-1)                # (3, 3)
    frequency = torch.nn.functional.one_hot(path.drawn[:, 0], 3).float().mean(0)
    assert (frequency - logp.exp()).abs().max() < 0.02
    sure = logp.expand(20_000, 3, 3).gather(-1, path.drawn[:, 0, :, None]).squeeze(-1)
    kept = (path.revealed_at == 0).int().argmax(1)
    assert torch.equal((sure + path.noise[:, 0]).argmax(1), kept)
    assert 0.1 < (sure.argmax(1) != kept).float().mean() < 0.9

def test_noise_is_gumbel_and_its_temperature_compounds():
    """Temperature 2 falls to 1.5, .75, .1875, 0. Gumbel: mean .577, std pi / sqrt 6. Seeded."""
    one, again, other = (sample(TablePolicy(4), 50_000, 4, i, temperature=2) for i in (0, 0, 1))
    for t, temperature in enumerate([1.5, 0.75, 0.1875, 0.0]):
        mean, std = one.noise[:, t].mean().item(), one.noise[:, t].std().item()
        assert mean == pytest.approx(0.5772 * temperature, abs=0.02)
        assert std == pytest.approx(math.pi / 6 ** 0.5 * temperature, abs=0.02)
    assert same(one, again) and not torch.equal(one.tokens, other.tokens)

def test_gumbel_noise_is_finite_at_both_ends(monkeypatch):
    """An exponential can be 0. Its log is clamped, but that of 1e-12 is not."""
    ends = torch.tensor([0.0, 1e-12, 0.5, math.inf])
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, **_: self.copy_(ends))
    noise = M.gumbel((4,), None, "cpu")
    assert noise.isfinite().all() and noise[1].item() == pytest.approx(27.631, abs=1e-3)

def test_guidance_is_one_plus_w_conditional_minus_w_unconditional_in_float32():
    """From bf16 logits: a policy with these logits in float64 samples the same."""
    conditional, empty = TablePolicy(36, 64, seed=1), TablePolicy(36, 64, seed=2)
    def both(prompt_ids, tokens):
        return (empty if prompt_ids[0, 0] < 0 else conditional)(prompt_ids, tokens).bfloat16()

    def guided(prompt_ids, tokens):             # what guidance should make of the two
        one, two = (x(None, tokens).bfloat16().double() for x in (conditional, empty))
        return (1 + w) * one - w * two

    for function in (both, guided):
        function.num_tokens, function.codebook_size = 36, 64
    for w in (0.5, 5.0):
        path = sample(both, 50, guidance=w, null_ids=torch.full((50, 1), -1))
        assert path.noise.dtype == torch.float32 and same(path, sample(guided, 50))

# ---- 2. The probability of a step ----------------------------------------------------------------

# The example in the comment of section 2: p_0 and p_1 over the codes a and b, log 1.5 of noise
EXAMPLE = torch.tensor([[[0.7, 0.3], [0.6, 0.4]]]).log()                        # (1, 2, 2)
LIFT_1 = torch.tensor([[0.0, math.log(1.5)]])                                   # (1, 2)
A, B, MASK = 0, 1, -1

def next_states(logits, n, noise=None):
    """The sampler by brute force: next state (MASK is -1) -> probability

    It is plain Python without a word of Eq. 14: go through all draws, rank them, keep the n best.
    """
    p, outcome = logits.softmax(-1).tolist(), {}
    noise = [0] * len(p) if noise is None else noise.tolist()
    for draw in itertools.product(range(len(p[0])), repeat=len(p)):
        best = sorted(range(len(p)), key=lambda j: -math.log(p[j][draw[j]]) - noise[j])[:n]
        state = tuple(k if j in best else MASK for j, k in enumerate(draw))
        chance = math.prod(p[j][k] for j, k in enumerate(draw))
        outcome[state] = outcome.get(state, 0) + chance
    return outcome

def probability(logits, states, transition, noise=None, drawn=None):
    """exp(transition_logprob) of reaching each state (MASK is -1) from an all-masked one: (S,)"""
    states = torch.tensor(states)                                               # (S, N)
    logits = logits.expand(len(states), *logits.shape[-2:])                     # (S, N, K)
    noise = None if noise is None else noise.expand(len(states), -1)            # (S, N)
    return M.transition_logprob(logits, states.clamp(min=0), (states < 0).long(), 0, transition,
                                noise, drawn).exp()

@pytest.mark.parametrize("transition, noise, expected", [
    ("p1", None, [.70, .18, .12, 0]), ("p1", LIFT_1, [.28, .60, .12, 0]),
    ("p1_literal", LIFT_1, [.70, .18, .12, 0]), ("p2", LIFT_1, [.7, .6, .4, .3])])
def test_the_example_in_the_text(transition, noise, expected):
    """The columns of its table."""
    got = probability(EXAMPLE, [(A, MASK), (MASK, A), (MASK, B), (B, MASK)], transition, noise)
    assert got.tolist() == pytest.approx(expected, abs=1e-6)

def test_what_was_revealed_earlier_does_not_count():
    """Position 0 was revealed in step 0, with a chance of .01; step 1 is that of the example, where
    `ar` counts the discarded draw, too. A fourth formula is refused."""
    logits = torch.cat([torch.tensor([[[0.01, 0.99]]]).log(), EXAMPLE], dim=1)  # (1, 3, 2)
    codes, step = torch.tensor([[A, A, B]]), torch.tensor([[0, 1, 2]])
    got = [M.transition_logprob(logits, codes, step, 1, name, None, codes).exp().item()
           for name in ("ar", "p1", "p2")]
    assert got == pytest.approx([.7 * .4, .7, .7])
    with pytest.raises(AssertionError, match="p3"):
        M.transition_logprob(logits, codes, step, 1, "p3")

def test_rao_blackwell_in_the_example():
    """Given [a, MASK] without noise: the gradients on the logits of position 1."""
    logits = EXAMPLE.clone().requires_grad_()
    for name, code, expected in (("ar", A, [.4, -.4]), ("ar", B, [-.6, .6]), ("p1", A, [0, 0])):
        chance = probability(logits, [(A, MASK)], name, None, torch.tensor([[A, code]]))
        gradient, = torch.autograd.grad(chance.log().sum(), logits)             # (1, 2, 2)
        assert gradient[0, 1].tolist() == pytest.approx(expected, abs=1e-6)

@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_p1_given_the_noise_is_the_frequency_of_the_step(n, seed):
    """Hold the noise, or have none; go through all 81 draws. p2 sums to above 1, and with noise the
    literal formula is far off somewhere."""
    generator = seeded(seed)
    logits, noise = torch.randn(4, 3, generator=generator), torch.randn(4, generator=generator)
    for held in (None, noise):
        truth = next_states(logits, n, held)
        frequency = torch.tensor(list(truth.values()))
        p1, p2, literal = (probability(logits, list(truth), transition, held)
                           for transition in ("p1", "p2", "p1_literal"))
        assert torch.allclose(p1, frequency, atol=1e-6) and p2.sum() > 1.01
        assert ((literal - frequency).abs().max() > 0.02) == (held is not None)

@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_of_p1_is_the_mean_of_that_of_ar(seed):
    """Rao-Blackwell: over all draws that leave one picture behind, ar differs from p1 by noise."""
    generator = seeded(seed)
    logits = torch.randn(3, 3, generator=generator).double().repeat(27, 1, 1).requires_grad_()
    noise = torch.randn(3, generator=generator).double().expand(27, 3)
    drawn = torch.cartesian_prod(*[torch.arange(3)] * 3)                        # (27, 3)
    logp = logits.detach().log_softmax(-1).gather(2, drawn[..., None])[..., 0]  # (27, 3)
    step = (logp + noise < (logp + noise).amax(1, keepdim=True)).long()         # keep the surest
    state = drawn.where(step == 0, 3).unique(dim=0, return_inverse=True)[1]     # (27,) its number
    ar, p1 = (torch.autograd.grad(M.transition_logprob(
        logits, drawn, step, 0, name, noise, drawn).sum(), logits)[0].flatten(1)
        for name in ("ar", "p1"))                                               # (27, 9) each
    chance = logp.sum(1).exp()[:, None]                                         # (27, 1)
    for alike in torch.nn.functional.one_hot(state).T.bool():                    # (27,) each
        mean = (ar[alike] * chance[alike]).sum(0) / chance[alike].sum()
        assert torch.allclose(mean, p1[alike][0], atol=1e-10)
    assert (chance * ar.pow(2)).sum() > 1.2 * (chance * p1.pow(2)).sum()

def test_what_was_sampled_is_possible_under_p1_but_not_always_as_printed():
    """The inner sum of the literal formula can be empty, which shows as its floor."""
    table = TablePolicy(N=12, K=4, scale=2.0)
    path = sample(table, 200, 6)
    b, t = torch.cartesian_prod(torch.arange(200), torch.arange(6)).unbind(1)
    p1, literal = (M.replay_logprob(table, path.tokens, path, b, t, transition)
                   for transition in ("p1", "p1_literal"))
    assert p1.min() > M.FLOOR / 2
    assert literal.min() < M.FLOOR / 2 and literal.isfinite().all()

@pytest.mark.parametrize("transition", M.TRANSITIONS)
def test_extreme_logits_leave_value_and_gradient_finite(transition):
    """In bf16, up to 3000, and -inf (a user's top-k) at all three kinds of positions."""
    logits = (torch.randn(2, 6, 5, generator=seeded(0)) * 1000).bfloat16()
    step, tokens = torch.arange(6).expand(2, 6) % 3, torch.full((2, 6), 4)
    logits[:, :, 1:3] = -math.inf
    logits[:, step[0] == 0, 0] = -math.inf                      # the index that stands for MASK
    logits.requires_grad_()
    logp = M.transition_logprob(logits, tokens, step, 1, transition, torch.zeros(2, 6), tokens)
    logp.sum().backward()
    assert logp.dtype == torch.float32 and logp.isfinite().all()
    assert logits.grad.isfinite().all() and logits.grad.abs().max() > 0

# ---- 3. The advantage and the filter -------------------------------------------------------------

@pytest.mark.parametrize("rewards, divide, expected", [
    ([[1, 0, 0, 1]], True, [[.866, -.866, -.866, .866]]),                   # the docstring's
    ([[1, 2, 3], [10, 10, 16]], True, [[-1, 0, 1], [-.577, -.577, 1.155]]), # unbiased
    ([[1, 2, 3], [10, 10, 16]], False, [[-1, 0, 1], [-2, -2, 4]]),          # Dr. GRPO
    ([[.3] * 6], True, [[0] * 6])])                                         # nothing to learn
def test_advantage_by_hand(rewards, divide, expected):
    """Mean 2 and std 1 for [1, 2, 3]; mean 12 and std sqrt 12 for [10, 10, 16]."""
    got = M.group_advantage(torch.tensor(rewards, dtype=torch.float32), divide)
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float32), atol=1e-3)

@pytest.mark.parametrize("history, quantile, std, expected", [
    ([5] * 9 + [*range(1, 92)], 0.1, [0, 0.5, 50], [False, False, True]),   # the 10th percentile: 5
    ([0] * 50, 0.1, [0, 0.5], [False, True]),               # nothing is below 0, but 0 vanishes
    ([1.0] * 31, 0.1, [0.1, 0.0], [True, True]),            # too short a history
    ([100] * 40 + [1] * 512, 0.95, [1.0], [True]),          # hundreds are forgotten, 1 is not below
    ([100] * 40 + [1] * 472, 0.95, [1.0], [False]),         # but not before
    ([5.0] * 50, 0.0, [0, 1], [True, True])])               # switched off
def test_the_filter_by_hand(history, quantile, std, expected):
    """Which groups are kept after a history of stds."""
    sieve = M.SampleFilter(quantile)
    for value in history:
        sieve.keep(torch.tensor([float(value)]))
    assert sieve.keep(torch.tensor(std)).tolist() == expected

# ---- 4. The loss ---------------------------------------------------------------------------------

def test_loss_is_zero_but_gradient_is_not():
    """The most asked GRPO question. At ratio 1 the loss is -mean(A) = 0; its gradient is -A / M."""
    advantage = M.group_advantage(torch.tensor([[1.0, 0.0, 0.0, 1.0]])).flatten()
    logp = torch.full((4,), -3.0, requires_grad=True)
    loss, _ = M.grpo_loss(logp, logp.detach(), advantage, 0.1, 0.2)
    loss.mean().backward()
    assert loss.mean().item() == pytest.approx(0, abs=1e-6)
    assert torch.allclose(logp.grad, -advantage / 4) and logp.grad.abs().min() > 0.2

@pytest.mark.parametrize("advantage, ratio, flows", [
    (1, 1.3, False), (1, 1.15, True), (1, 0.5, True),
    (-1, 0.5, False), (-1, 0.95, True), (-1, 1.3, True)])
def test_clipping_stops_only_what_would_push_further_out(advantage, ratio, flows):
    """Bounds .9 and 1.2: A > 0 is not pushed above, A < 0 not below; moving back is allowed."""
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, numbers = M.grpo_loss(logp, torch.zeros(1), torch.tensor([float(advantage)]), 0.1, 0.2)
    loss.sum().backward()
    assert (logp.grad.abs().item() > 0) == flows and numbers["clip"].item() == (not flows)
    assert numbers["ratio"].item() == pytest.approx(ratio)

def test_the_minimum_is_taken_per_picture_and_step():
    """Ratios 2 and .5, A = 1: (1.2 + .5) / 2 = .85; the least of the means is 1.05."""
    loss, _ = M.grpo_loss(torch.tensor([2.0, 0.5]).log(), torch.zeros(2), torch.ones(2), 0.1, 0.2)
    assert loss.tolist() == pytest.approx([-1.2, -0.5])

def test_k3_is_zero_at_equality_and_a_kl_elsewhere():
    """Its mean under p is KL(p || q) = sum p log p/q, and its gradient is real."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    assert (M.kl_k3(p.log(), p.log()) == 0).all()
    kl = (p * (p / q).log()).sum().item()
    assert (p * M.kl_k3(p.log(), q.log())).sum().item() == pytest.approx(kl, rel=1e-5)
    logp = p.log().requires_grad_()
    assert torch.autograd.grad(M.kl_k3(logp, q.log()).sum(), logp)[0].abs().min() > 0
    assert torch.autograd.grad(M.kl_k3(logp, p.log()).sum(), logp)[0].abs().max() < 1e-6

@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [120.0, 79.0, -79.0, -120.0])
def test_two_impossible_factors_do_not_overflow_the_loss(advantage, log_ratio):
    """exp(120) is infinite in float32: loss and penalty are finite, and so are their gradients."""
    logp = torch.tensor([log_ratio], requires_grad=True)
    loss, numbers = M.grpo_loss(logp, torch.zeros(1), torch.tensor([advantage]), 0.1, 0.2)
    kl = M.kl_k3(logp, torch.zeros(1))
    for value in (loss.sum(), kl.sum()):
        assert value.isfinite() and torch.autograd.grad(value, logp)[0].pow(2).isfinite().all()
    assert kl.item() > 70 and numbers["ratio"].isfinite().all()

# ---- 5. One update -------------------------------------------------------------------------------

@pytest.fixture
def batch(policy):
    """Four pictures of two captions, and an advantage of each."""
    prompts = ["a star", "two circles"] * 2
    path = M.rollout(policy, policy.encode(prompts), 4, generator=seeded(0))
    return M.Groups(prompts, path, None, None), torch.tensor([1.0, -1.0, 0.5, -0.5])

def gradient(policy, config, batch, reference=None):
    """What learn() hands to an optimizer that changes nothing, as one vector, and its log."""
    optimizer, seen = torch.optim.SGD(policy.parameters(), lr=0.0), []
    optimizer.register_step_pre_hook(lambda *_: seen.extend(
        p.grad.flatten() for p in policy.parameters() if p.grad is not None))
    log = M.learn(policy, reference, optimizer, *batch, config, seeded(0))
    return torch.cat(seen), log

def test_vanished_groups_are_replaced_and_the_tries_are_bounded(policy):
    """Every second group gets equal rewards: 4 are sampled, then 2, then 1. Or all of them do."""
    sieve, calls, texts = M.SampleFilter(0.1, at_least=0), [], set()
    sieve.history.extend([0.0, 0.5])
    def half_vanish(images, prompts):
        calls.append(len(prompts) // 4)
        texts.update(prompts)
        index = torch.arange(len(prompts))
        return (index // 4 % 2 == 0) * (index % 2).float()

    config = tiny(groups=4, filter_tries=3)
    for reward_fn, kept, sampled in ((half_vanish, 4, 7), (lambda _, x: [0] * len(x), 0, 16)):
        got = M.sample_groups(policy, reward_fn, EVERY_CAPTION[-2:], sieve, config, seeded(1))
        assert len(got.rewards) == kept and len(got.sampled) == sampled
        assert len(got.prompts) == len(got.trajectory.noise) == 4 * kept
    assert calls == [4, 2, 1] and texts == {*EVERY_CAPTION[-2:]}

def test_prompts_pictures_and_rewards_of_kept_groups_belong_together(policy, monkeypatch):
    """Two of three groups are dropped and replaced. All is compared with what the sampler gave."""
    answers, drawn = iter([[False, True, False], [True, True]]), {}
    sieve = types.SimpleNamespace(keep=lambda std: torch.tensor(next(answers)))
    weights = np.random.default_rng(0).random((48, 48, 3))
    def own(images, prompts):
        return torch.tensor([(np.asarray(image) * weights).mean() + 1000 * EVERY_CAPTION.index(text)
                             for image, text in zip(images, prompts)])

    def noting(policy, prompts, *more, sample=M.sample):
        path = sample(policy, prompts, *more)
        drawn.update({str(x[0]): (text, *x) for text, *x in zip(prompts, *path)})
        return path

    monkeypatch.setattr(M, "sample", noting)
    got = M.sample_groups(policy, own, EVERY_CAPTION, sieve, tiny(groups=3), seeded(0))
    again = R.rate(own, policy.decode(got.trajectory.tokens), got.prompts)
    assert torch.equal(again.view(3, 4), got.rewards) and len(again.unique()) == 12
    assert torch.equal(got.rewards, got.sampled[[1, 3, 4]]) and len(got.sampled) == 5
    assert [len({*got.prompts[i:i + 4]}) for i in (0, 4, 8)] == [1, 1, 1]
    for text, *kept in zip(got.prompts, *got.trajectory, strict=True):
        assert drawn[str(kept[0])][0] == text and same(drawn[str(kept[0])][1:], kept)

def test_rollout_batches_are_parts_of_one_rollout(policy, monkeypatch):
    """5 pictures, 2 at a time, in order, with the empty prompt beside each."""
    calls, prompts = [], ["a star", "two circles", "a star", "a red star", "a star and a circle"]
    monkeypatch.setattr(M, "rollout", lambda *a, rollout=M.rollout: calls.append(
        (a[1], a[5], rollout(*a))) or calls[-1][-1])
    path = M.sample(policy, prompts, tiny(rollout_batch=2), 4, seeded(0), 1.0)
    ids, null_ids, paths = zip(*calls)
    assert torch.equal(torch.cat(ids), policy.encode(prompts)) and [*map(len, ids)] == [2, 2, 1]
    assert torch.equal(torch.cat(null_ids), policy.encode([""] * 5))
    assert same(path, [torch.cat(parts) for parts in zip(*paths)])

def test_random_steps_differ_between_pictures_and_updates():
    """Two of five steps: never one twice, every pair equally often."""
    config, generator = tiny(score_steps=2), seeded(0)
    pairs = [M.choose_steps(1000, 5, config, generator) for _ in range(2)]      # (2000, 2) each
    assert not torch.equal(*pairs)
    assert all(x[:, 0].tolist() == sorted([*range(1000)] * 2) for x in pairs)
    counts = collections.Counter(map(tuple, torch.cat(pairs)[:, 1].view(-1, 2).tolist()))
    assert set(counts) == {*itertools.combinations(range(5), 2)}
    assert max(abs(n - 200) for n in counts.values()) < 5 * (200 * 0.9) ** 0.5

@pytest.mark.parametrize("transition", M.TRANSITIONS)
def test_ratio_is_one_before_the_first_update_for_every_step(transition):
    """In other batches, in any order and with gradients, the learner finds what the sampler did."""
    policy, seen = shapes(), []
    ids = policy.encode(["a red star", "two circles"] * 2)
    policy.register_forward_hook(lambda *call: seen.append(call[-1]))
    path = M.rollout(policy, ids, 4, generator=seeded(0))
    old = torch.stack([M.transition_logprob(logits, path.tokens, path.revealed_at, t, transition,
                                            path.noise[:, t], path.drawn[:, t])
                       for t, logits in enumerate(seen)])                       # (T, B)
    pairs = M.choose_steps(4, 4, tiny(), seeded(0)).flip(0)                     # (16, 2)
    for b, t in (chunk.unbind(1) for chunk in pairs.split(3)):
        logp = M.replay_logprob(policy, ids, path, b, t, transition)
        assert logp.requires_grad and (logp - old[t, b]).abs().max() < 1e-4

@pytest.mark.parametrize("transition, beta, k, reduction, size", [
    ("p1", 0, 0, "random", 1), ("p1", 0, 0, "random", 999), ("p2", 0.7, 0, "random", 5),
    ("p2", 0.7, 2, "first", 3), ("ar", 0, 1, "last", 3), ("p1_literal", 0, 0, "first", 7)])
def test_the_gradient_at_ratio_one_is_the_one_derived_by_hand(policy, batch, transition, beta, k,
                                                              reduction, size):
    """Eq. 10, with one group kept of two asked for: each pair weighs 1 / (2 * 4 * steps used)."""
    config = tiny(transition=transition, beta=beta, max_grad_norm=1e9, micro_batch=size,
                  score_steps=k, reduction=reduction)
    (groups, advantage), reference = batch, shapes(seed=5)
    ids, path = policy.encode(groups.prompts), groups.trajectory
    used = {"random": [0, 1, 2, 3], "first": [*range(k or 4)], "last": [*range(4 - (k or 4), 4)]}
    total, kls = 0, []
    for t in used[reduction]:
        now, was = (M.replay_logprob(model, ids, path, torch.arange(4), torch.full((4,), t),
                                     transition) for model in (policy, reference))
        kls.append((was.detach() - now).exp() - 1 - (was.detach() - now))
        total = total + (beta * kls[-1] - advantage * now).sum() / (2 * 4 * len(used[reduction]))
    parts = torch.autograd.grad(total, list(policy.parameters()), allow_unused=True)
    by_hand = torch.cat([part.flatten() for part in parts if part is not None])
    got, log = gradient(policy, config, (groups, advantage), reference if beta else None)
    assert torch.allclose(got, by_hand, rtol=1e-3, atol=1e-5 * by_hand.abs().max().item())
    assert by_hand.abs().max() > 1e-3
    assert log["grad"] == pytest.approx(by_hand.norm().item(), rel=1e-3)
    kl = torch.stack(kls).mean().item() if beta else 0
    loss = (beta * kl - advantage.mean().item()) / 2
    assert log["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-6)
    assert log.get("kl", 0) == pytest.approx(kl, rel=1e-3) and log["ratio"] == pytest.approx(1)

def test_the_gradient_is_clipped_to_its_largest_norm(policy, batch):
    """To .01; the norm in the log is that before."""
    whole, log = gradient(policy, tiny(max_grad_norm=1e9), batch)
    clipped, again = gradient(policy, tiny(max_grad_norm=0.01), batch)
    assert clipped.norm().item() == pytest.approx(0.01, rel=0.01)
    assert torch.allclose(clipped / clipped.norm(), whole / whole.norm(), atol=1e-5)
    assert again["grad"] == pytest.approx(log["grad"]) and log["grad"] > 0.02

def test_later_epochs_leave_ratio_one_and_clipping_acts(batch):
    """Against a detached copy of itself a log-probability has ratio 1 for ever."""
    fresh = shapes()
    log = M.learn(fresh, None, torch.optim.SGD(fresh.parameters(), lr=1.0), *batch,
                  tiny(inner_epochs=2, groups=1, micro_batch=3), seeded(0))
    assert abs(log["ratio"] - 1) > 1e-3 and log["clip"] > 0
    for low, high in ((0.0, 1e9), (1e9, 0.0)):                  # good pictures: above only
        log = M.learn(fresh, None, torch.optim.SGD(fresh.parameters(), lr=1.0), batch[0],
                      batch[1].abs(), tiny(inner_epochs=2, clip_low=low, clip_high=high), seeded(0))
        assert (log["clip"] > 0) == (high == 0.0)

@pytest.mark.parametrize("what", ["loss", "grad"])
def test_a_number_that_is_not_finite_stops_before_the_weights_move(batch, what):
    """A NaN in the loss whose gradients are 0, and a finite loss whose gradient is infinite."""
    fresh, (groups, advantage) = shapes(), batch
    before = [x.clone() for x in fresh.state_dict().values()]
    for p in fresh.parameters():
        p.register_hook(lambda g: torch.full_like(g, math.inf if what == "grad" else 0))
    advantage = advantage * (math.nan if what == "loss" else 1)
    with pytest.raises(SystemExit, match="(nan|inf).*--lr"):
        M.learn(fresh, None, torch.optim.SGD(fresh.parameters(), 1.0), groups, advantage, tiny(),
                seeded(0))
    assert same(before, fresh.state_dict().values())

# ---- 6. The training loop ------------------------------------------------------------------------

def red(images, prompts):
    """A reward that any policy can raise: the share of red pixels."""
    pixels = np.stack([np.asarray(image) for image in images]).astype(int)      # (B, H, W, 3)
    return torch.tensor((pixels[..., 0] - pixels[..., 2] > 100).mean((1, 2)), dtype=torch.float32)

@pytest.fixture(autouse=True)
def prepared(monkeypatch, tmp_path):
    """Every test has a folder of its own, may name this reward, and has a decoder of width 32."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(R.REWARDS, "red", lambda device: red)
    monkeypatch.setattr(M, "MagvitDecoder", lambda: Decoder(32))

def flags(**settings):
    """TINY and these settings as a command line."""
    return [word for name, value in {**TINY, **settings}.items()
            for word in ("--" + name.replace("_", "-"), str(value))]

def saved(folder):
    """The checkpoint of an output folder."""
    return torch.load(pathlib.Path(folder, "checkpoint.pt"), weights_only=True)

def read_rows(folder):
    """metrics.csv as a list of dicts."""
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))

def run(folder, **settings):
    """Train at TINY settings -> checkpoint, rows of metrics.csv"""
    M.train(tiny(out=str(folder), **settings))
    return saved(folder), read_rows(folder)

def timeless(rows):
    """Rows of a log without what a clock says."""
    return [{**row, "seconds": None} for row in rows]

def after_calls(n, action):
    """The red reward, which does something when it is called for the n-th time."""
    count = itertools.count(1)
    return lambda images, prompts: (action() if next(count) == n else None, red(images, prompts))[1]

BEFORE = 3                          # calls of the reward before update 1: two trials, an evaluation

def test_a_run_leaves_what_it_promises(tmp_path, capsys):
    """Checkpoint, base, table of updates and pictures; lines of at most 100 columns in ASCII."""
    _, rows = run(tmp_path, eval_every=1)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert left == ["base-0-16-1-2.pt", "checkpoint.pt", "comparison.png", "metrics.csv",
                    "samples/update_00001.png", "samples/update_00002.png"]
    assert [int(row["update"]) for row in rows] == [1, 2] and list(rows[0]) == [
        "update", "reward", "reward_se", "live", "sampled", "ratio", "clip", "kl", "grad", "loss",
        "lr", "seconds", "heldout"]
    out, err = capsys.readouterr()              # err: no progress bars, as there is no terminal
    assert out.isascii() and max(map(len, out.splitlines())) <= 100 and err == ""
    assert f"{len(EVERY_CAPTION)} captions" in out and repr(R.captions(False)["single"][0]) in out
    starts = [re.split(r" \|| \.", line)[0] for line in out.splitlines()[1:]]
    evaluations = [[f"{title} {split}" for split in ("training", "held-out")]
                   for title in ("base", "update 1", "update 2")]
    assert starts == [*evaluations[0], "update   1/2", *evaluations[1], "update   2/2",
                      *evaluations[2], *evaluations[0], *evaluations[2]]

def test_what_is_trained_on(tmp_path, monkeypatch):
    """All training captions and no other, every category equally often, without guidance."""
    seen, rollouts = [], []
    monkeypatch.setattr(M, "rollout", lambda *a, rollout=M.rollout: rollouts.append(a[2:5])
                        or rollout(*a))
    monkeypatch.setattr(M, "sample_groups", lambda *a, sample_groups=M.sample_groups: (
        rollouts.clear(), sample_groups(*a), seen.append((a[1], a[2], {*rollouts})))[1])
    run(tmp_path, guidance=2.0, eval_steps=3)
    trained = R.captions(False)
    for reward_fn, captions, settings in seen:
        assert reward_fn is R.shapes_reward and settings == {(4, 2.0, 0.0)}
        assert set(captions) == {text for texts in trained.values() for text in texts}
        counts = [sum(captions.count(text) for text in texts) for texts in trained.values()]
        assert set(counts) == {max(map(len, trained.values()))}
    assert len(seen) == 2 and rollouts[-1] == (3, 2.0, 2.0)

def test_a_row_says_what_was_sampled_and_what_was_kept(tmp_path, monkeypatch, capsys):
    """Mean and standard error of all groups, live ones of those kept, held-out mean, by hand."""
    advantages, kept = [], torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    every = torch.cat([kept, torch.zeros(2, 4)])                # the means of groups: .75 .5 0 0
    def made_up_evaluation(policy, measure, splits, config, title):
        scores = torch.stack([torch.full((6, 4), 0.25), torch.full((6, 4), 0.75)])
        scores[1, 0, 0] = 0.0                                                   # mean .75 - .75/24
        return {"scores": scores, "pictures": torch.zeros(2, 6, 4, 8, 8, 3).byte(), "lines": []}

    monkeypatch.setattr(M, "sample_groups", lambda *a, sample_groups=M.sample_groups:
                        sample_groups(*a)._replace(rewards=kept, sampled=every))
    monkeypatch.setattr(M, "evaluate", made_up_evaluation)
    monkeypatch.setattr(M, "learn", lambda *a: advantages.append(a[4]) or {})
    _, rows = run(tmp_path, eval_every=2)
    assert all(torch.equal(x, M.group_advantage(kept).flatten()) for x in advantages)
    for row in rows:
        assert float(row["reward_se"]) == pytest.approx(0.1875)     # std .375 / the root of 4
        assert (float(row["reward"]), row["live"], row["sampled"]) == (0.3125, "1", "4")
    assert rows[0]["heldout"] == "" and float(rows[1]["heldout"]) == pytest.approx(0.71875)
    assert "| reward 0.3125 +-0.1875 | groups  1/ 4 |" in capsys.readouterr().out

def test_the_log_leaves_constants_out_and_time_left_falls(tmp_path, monkeypatch, capsys):
    """By the clock of this test, each of 8 updates takes ten seconds."""
    for i, (settings, shown, hidden) in enumerate((
            ({}, "grad", "ratio|clip|kl"), (dict(beta=0.1), r"kl \d\.\d", "ratio"),
            (dict(inner_epochs=2), r"ratio \d\.\d+ clip \d+%", "kl"))):
        clock = itertools.count(0, 10)
        monkeypatch.setattr(M.time, "time", lambda: next(clock))
        run(tmp_path / str(i), updates=8, **settings)
        lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("update   ")]
        assert all(re.search(shown, x) and not re.search(hidden, x) for x in lines)
        assert [x.split(" | ")[-2:] for x in lines] == [
            ["10.0 s", f"left {x}"] for x in "1:10 1:00 0:50 0:40 0:30 0:20 0:10 0:00".split()]

def test_training_raises_the_reward(tmp_path):
    """The slow one: from random weights to more red, on captions that it never trained on."""
    checkpoint, rows = run(tmp_path, reward="red", updates=25, groups=4, lr=3e-3, eval_pictures=8)
    before, after = (checkpoint[name]["scores"][1].mean() for name in ("before", "after"))
    assert after > before + 0.1 and float(rows[-1]["reward"]) > float(rows[0]["reward"]) + 0.1

@pytest.mark.parametrize("reward, measure, trained, reported", [
    ("red", "", red, red), ("shapes", "", R.shapes_reward, R.shapes_correct),
    ("red", "shapes", red, R.shapes_correct), ("shapes", "red", R.shapes_reward, red)])
def test_evaluation_reports_a_measure(tmp_path, monkeypatch, reward, measure, trained, reported):
    """--measure is another reward than the one trained on; for shapes the share of correct ones."""
    used = []
    monkeypatch.setattr(R, "rate", lambda function, *more, rate=R.rate: used.append(function)
                        or rate(function, *more))
    run(tmp_path, reward=reward, measure=measure, updates=1, filter_tries=0)
    assert used == [trained, reported, reported, trained, reported]     # the first two are trials

def test_an_update_without_a_live_group_changes_nothing_and_goes_on(tmp_path, monkeypatch):
    """All pictures are worth the same and the filter is warm: no step, a row of zeros."""
    monkeypatch.setattr(M, "deque", lambda maxlen, deque=M.deque: deque([1.0] * 40, maxlen))
    monkeypatch.setitem(R.REWARDS, "red", lambda device: lambda images, _: torch.ones(len(images)))
    checkpoint, rows = run(tmp_path, reward="red", weight_decay=0.5)
    base = torch.load(tmp_path / "base-0-16-1-2.pt")
    assert same(base.values(), checkpoint["policy"].values())
    for row in rows:
        assert (row["live"], row["sampled"], float(row["reward"])) == ("0", "6", 1.0)
        assert float(row["loss"]) == float(row["grad"]) == float(row["reward_se"]) == 0

def test_every_update_has_its_learning_rate(tmp_path):
    """Warm-up times cosine, for five updates and their base. Two more have the rates of seven."""
    rates, settings = {}, dict(reward="red", updates=5, warmup=2, lr=1e-3, pretrain_steps=20)
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.setdefault(
        optimizer, []).extend({group["lr"] for group in optimizer.param_groups}))
    M.train(tiny(out=str(tmp_path), **settings))
    M.train(tiny(out=str(tmp_path), **{**settings, "updates": 7, "resume": True}))
    hook.remove()
    def rate(i, total, peak=1e-3, warmup=2):
        return peak * min(1, (i + 1) / (warmup + 1)) * (1 + math.cos(math.pi * i / total)) / 2

    base, first, longer = rates.values()
    assert first == pytest.approx([rate(i, 5) for i in range(5)])
    assert longer == pytest.approx([rate(5, 7), rate(6, 7)])
    assert base == pytest.approx([rate(i, 20, 4e-3, 100) for i in range(20)])
    assert [float(row["lr"]) for row in read_rows(tmp_path)] == pytest.approx(first + longer)

# A value of each setting that must change the outcome of a run, if the setting is not ignored ...
OTHER = dict(
    reward="shapes", seed=1, width=32, layers=2, pretrain_steps=3, steps=3, eval_steps=3,
    temperature=0.0, guidance=3.0, transition="p2", updates=3, groups=3, group_size=3,
    divide_by_std=False, inner_epochs=2, clip_low=0.5, clip_high=0.0, beta=1.0, score_steps=1,
    reduction="last", filter_quantile=0.0, filter_tries=0, lr=1e-3, warmup=3,
    optimizer="adafactor", weight_decay=0.9, max_grad_norm=0.01, eval_pictures=5)
# ... and the test of each that changes none.
ELSEWHERE = dict(
    out="test_a_run_leaves_what_it_promises", eval_every="test_a_run_leaves_what_it_promises",
    measure="test_evaluation_reports_a_measure", resume="test_resuming_equals_never_having_stopped",
    device="test_a_run_on_every_device_that_is_there",
    micro_batch="test_the_gradient_at_ratio_one_is_the_one_derived_by_hand",
    rollout_batch="test_rollout_batches_are_parts_of_one_rollout",
    checkpointing="test_checkpointing_computes_twice_and_changes_nothing",
    model="test_show_o_from_folders_end_to_end", vq_model="test_show_o_from_folders_end_to_end",
    prompts="test_show_o_from_folders_end_to_end", weights="test_other_weights_replace_the_base",
    generate="test_generating_in_genevals_layout")
# Clipping acts in later epochs only, a KL matters in later updates, the filter after 32 groups.
OCCASION = dict(
    clip_low=dict(inner_epochs=3, lr=3e-2), clip_high=dict(inner_epochs=4, lr=0.1, updates=3),
    reduction=dict(score_steps=1),
    filter_quantile=dict(updates=8, groups=16, group_size=2),
    filter_tries=dict(updates=8, groups=16, group_size=2))

def outcome(folder, settings):
    """Final weights and evaluation of a run on the red reward, as a list of tensors."""
    checkpoint, _ = run(folder, **{"reward": "red", **settings})
    return [*checkpoint["policy"].values(), checkpoint["after"]["scores"]]

@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The outcome without a change, made once per occasion."""
    made = {}
    return lambda occasion: made.setdefault(str(occasion), None) or made.update({
        str(occasion): outcome(tmp_path_factory.mktemp("usual"), occasion)}) or made[str(occasion)]

def test_every_setting_has_a_test():
    """Whoever adds a field must say what it changes."""
    assert {field.name for field in dataclasses.fields(M.Config)} == {*OTHER, *ELSEWHERE}
    assert all(name in globals() for name in ELSEWHERE.values())

@pytest.mark.parametrize("name", OTHER)
def test_no_setting_is_ignored(name, tmp_path, usual):
    """Another value, another outcome."""
    occasion = OCCASION.get(name, {})
    changed = outcome(tmp_path, {**occasion, name: OTHER[name]})
    unchanged = usual(occasion)
    assert len(changed) != len(unchanged) or not same(changed, unchanged)

def test_the_same_run_twice_has_the_same_outcome(tmp_path, usual):
    """Otherwise the test above would mean nothing."""
    assert same(outcome(tmp_path, {}), usual({}))

@pytest.mark.parametrize("device", sorted({"cpu", M.Config().device}))       # and an accelerator
def test_a_run_on_every_device_that_is_there(device, tmp_path):
    """Two updates with a KL, guidance and two inner epochs, and as many again after a resume."""
    settings = dict(reward="red", device=device, beta=0.1, guidance=1.0, inner_epochs=2)
    first, _ = run(tmp_path, **settings)
    last, rows = run(tmp_path, **settings, resume=True, updates=4)
    assert first["after"]["scores"].isfinite().all() and len(rows) == 4
    assert not same(first["policy"].values(), last["policy"].values())

def test_resuming_equals_never_having_stopped(tmp_path, monkeypatch, capsys):
    """4 updates; and 2, Ctrl-C, --resume, 2 more: weights, optimizer, filter and log are equal. The
    log got a row later than the checkpoint, as if killed. The base is not evaluated again."""
    settings, cut = dict(reward="red", updates=4, filter_tries=0, beta=0.1), tmp_path / "it's cut"
    whole, rows = run(tmp_path / "whole", **settings)
    stopping = after_calls(BEFORE + 2, lambda: signal.raise_signal(signal.SIGINT))
    with monkeypatch.context() as patch:
        patch.setitem(R.REWARDS, "red", lambda device: stopping)
        with pytest.raises(SystemExit, match="stopped after update 2") as stop:
            M.main(flags(out=cut, **settings))
    assert len(saved(cut)["rows"]) == 2
    (cut / "metrics.csv").write_text((cut / "metrics.csv").read_text() + "3,0.5\n")
    capsys.readouterr()
    M.main(shlex.split(stop.value.code.split("python mask_grpo.py ")[1]))       # as a shell would
    out, resumed = capsys.readouterr().out, saved(cut)
    assert whole["filter"] == resumed["filter"]
    assert same(whole["policy"].values(), resumed["policy"].values())
    for one, two in zip(whole["optimizer"].values(), resumed["optimizer"].values(), strict=True):
        assert same(one.values(), two.values())
    assert torch.equal(whole["draws"], resumed["draws"])
    assert timeless(whole["rows"]) == timeless(resumed["rows"])
    assert timeless(read_rows(cut)) == timeless(rows)
    assert out.count("base held-out") == 1 and "update   3/4" in out and "update   2/4" not in out

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_finishes_the_update_and_a_second_does_not(tmp_path, monkeypatch, number, times):
    """In update 1. The previous handlers act the second time, and are restored."""
    usual = signal.signal(number, signal.default_int_handler)       # raises KeyboardInterrupt
    handlers = [*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))]
    monkeypatch.setattr(os, "write", lambda *_: os.close(-1))       # an OSError: stderr is gone
    stopping = after_calls(BEFORE + 1, lambda: [*map(signal.raise_signal, [number] * times)])
    monkeypatch.setitem(R.REWARDS, "red", lambda device: stopping)
    try:
        with pytest.raises(SystemExit if times == 1 else KeyboardInterrupt) as stop:
            M.main(flags(out=tmp_path, reward="red"))
        assert handlers == [*map(signal.getsignal, (signal.SIGINT, signal.SIGTERM))]
        assert len(saved(tmp_path)["rows"]) == 2 - times
        assert times == 2 or "stopped after update 1" in stop.value.code
    finally:
        signal.signal(number, usual)

def test_a_run_in_a_thread_and_without_stdout(tmp_path, monkeypatch):
    """Python allows signal handlers in the main thread only; a service may have no stdout."""
    monkeypatch.setattr(sys, "stdout", None)
    thread = threading.Thread(target=lambda: run(tmp_path, reward="red"))
    thread.start()
    thread.join()
    assert len(saved(tmp_path)["rows"]) == 2

@pytest.mark.parametrize("call, error, done", [
    (1, KeyError, 0), (2, KeyError, 1), (3, KeyError, 2), (2, SystemExit, 1)])
def test_a_failure_keeps_its_traceback_and_the_last_whole_update(tmp_path, monkeypatch, call, error,
                                                                 done):
    """In update 1, in update 2, in the evaluation after it; or an exit in update 2, as for NaN."""
    def bug():
        assert saved(tmp_path)["captions"]      # the folder is taken before the first update
        raise error("a bug of the user's")

    with monkeypatch.context() as patch:
        patch.setitem(R.REWARDS, "red", lambda device: after_calls(BEFORE + call, bug))
        with pytest.raises(error, match="a bug of the user's"):
            run(tmp_path, reward="red", filter_tries=0)
    assert len(saved(tmp_path)["rows"]) == done
    run(tmp_path, reward="red", filter_tries=0, resume=True, updates=3)
    assert len(read_rows(tmp_path)) == 3

def test_a_failing_message_loses_no_update(tmp_path, monkeypatch):
    """The reader of stdout is gone in update 2, as if Ctrl-C had killed a `tee`."""
    pipe = types.SimpleNamespace(write=len, flush=lambda: os.close(-1))         # an OSError
    gone = after_calls(BEFORE + 2, lambda: monkeypatch.setattr(sys, "stdout", pipe))
    monkeypatch.setitem(R.REWARDS, "red", lambda device: gone)
    with pytest.raises(OSError):
        M.main(flags(out=tmp_path, reward="red", updates=5, filter_tries=0))
    assert len(saved(tmp_path)["rows"]) == 2

def test_grids_show_the_base_and_the_policy_on_held_out_captions(tmp_path, monkeypatch, capsys):
    """In this order, with the pictures and scores of their evaluations. A finished run that is
    resumed reports the same once more: its last four lines and the last grid."""
    seen = []
    monkeypatch.setattr(R, "save_grid", lambda path, *more: seen.append((path.name, *more)))
    checkpoint, _ = run(tmp_path, reward="red", lr=0.1, eval_every=1)
    lines = capsys.readouterr().out.splitlines()[-4:]
    M.main(["--resume", "--out", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[1:] == lines
    assert [x[0] for x in seen] == ["update_00001.png", "update_00002.png", *["comparison.png"] * 2]
    shown = [str(x) for x in (R.captions(True), checkpoint["before"], checkpoint["after"])]
    assert [[*map(str, x[2:])] for x in seen[1:]] == [shown] * 3 and shown[1] != shown[2]

def test_a_killed_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """Half a file has been written when the end comes. Its name has the process's number."""
    def killed(state, path, save=torch.save):
        if len(state.get("rows", [])) < 2:
            return save(state, path)
        assert str(os.getpid()) in path.name
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, reward="red", eval_every=1)
    assert len(saved(tmp_path)["rows"]) == 1

def test_a_reward_cannot_change_the_run(tmp_path, monkeypatch, usual):
    """It empties its arguments, disables gradients and moves to another folder."""
    def rude(images, prompts):
        result = red(images, prompts)
        images.clear()
        prompts.clear()
        torch.set_grad_enabled(False)
        os.chdir(tmp_path.parent)
        return result

    monkeypatch.setitem(R.REWARDS, "red", lambda device: rude)
    M.train(tiny(out="rude", reward="red"))
    assert same(usual({})[:-1], saved(tmp_path / "rude")["policy"].values())
    assert torch.is_grad_enabled()

# ---- 7. Settings ---------------------------------------------------------------------------------

def test_whatever_is_saved_can_be_read_again(tmp_path):
    """A Path, numpy's numbers and an int for a float are turned into the types of the fields."""
    config = tiny(out=tmp_path / "out", lr=np.float64(1e-3), seed=np.int64(3), beta=0)
    for field in dataclasses.fields(config):
        assert type(getattr(config, field.name)) is field.type

def test_show_o_has_settings_of_its_own():
    """The paper's and the released code's; a flag overrides each; user models have none."""
    words = ["--model", "showlab/show-o-512x512", "--prompts", "x"]
    paper = dict(group_size=6, groups=16, steps=50, eval_steps=50, lr=3e-6, weight_decay=0.02,
                 clip_low=0.1, clip_high=0.2, transition="p1", beta=0, guidance=5, temperature=1,
                 reward="clip", filter_quantile=0.1, eval_pictures=64)  # as many as are held out
    assert vars(M.parse(words)).items() >= paper.items()
    assert vars(M.parse([*words, "--lr", "1e-6"])).items() >= {**paper, "lr": 1e-6}.items()
    shapes_world = dict(group_size=6, groups=16, steps=12, eval_steps=12, lr=1.5e-3, warmup=5,
                        updates=54, max_grad_norm=1, filter_tries=2, temperature=2, guidance=0)
    assert vars(M.parse(["--model", "my:make", "--prompts", "y"])).items() >= shapes_world.items()

# ---- 8. The policy -------------------------------------------------------------------------------

def test_text_is_laid_out_as_in_show_o(policy, monkeypatch):
    """[t2i, bos, words, bos], left padded; bos is never doubled; a cut text keeps its end token."""
    bos, pad, t2i, (word,) = policy.bos_id, policy.pad_id, policy.t2i_id, policy.tokenize("a star")
    assert policy.encode(["a star", ""]).tolist() == [[t2i, bos, word, bos], [pad, t2i, bos, bos]]
    monkeypatch.setattr(policy, "tokenize", lambda text: [bos, 3] if text == "bos" else [3] * 300)
    assert policy.encode(["bos"]).tolist() == [[t2i, bos, 3, bos]]
    assert policy.encode(["long"]).tolist() == [[t2i, bos, *[3] * 126, bos]]

def test_attention_mask_by_hand(policy):
    """Two texts of 1 and 2 ids, the first padded. Rows are queries, columns keys, x may be seen.

        pad  x . . ...      a pad sees pads, so that no row is empty
        txt  . x . ...      text is causal, and blind to pads and picture
        img  . x x ...      the picture sees everything but pads
    """
    ids = torch.tensor([[policy.pad_id, 1], [1, 1]])
    allowed = policy.attention_mask(ids)[:, 0] == 0                             # (2, L, L)
    rest = policy.num_tokens + 2
    assert allowed[0, 0].tolist() == [True, False] + [False] * rest
    assert allowed[0, 1].tolist() == [False, True] + [False] * rest
    assert all(row.tolist() == [False, True] + [True] * rest for row in allowed[0, 2:])
    assert allowed[1, 1].tolist() == [True, True] + [False] * rest and allowed[1, 2:].all()

def test_logits_are_the_heads_at_the_picture_and_float32_under_autocast(policy):
    """The model's own, at the image's positions and codes. With bf16 products, as on a GPU, states
    are rounded, but not the logits, even inside a caller's autocast."""
    half, seen = shapes(), []
    ids, tokens = half.encode(["a star"]), torch.full((1, 36), 49)
    edges = [torch.tensor([[half.pad_id + i]]) for i in (1, 2)]                 # <soi>, <eoi>
    whole = torch.cat([ids, edges[0], tokens + half.offset, edges[1]], dim=1)   # (1, L)
    logits = half.showo(whole, attention_mask=half.attention_mask(ids), use_cache=False).logits
    exact = half(ids, tokens)
    assert torch.allclose(exact, logits[:, -37:-1, half.offset:-1], atol=1e-5)
    half.showo.model.register_forward_hook(lambda *call: seen.append(call[-1][0]))
    half.showo.model.layers[0].mlp.fc1.register_forward_hook(lambda *call: seen.append(call[-1]))
    half.dtype, head = torch.bfloat16, half.showo.lm_head
    with torch.autocast("cpu", torch.bfloat16):
        rounded = half(ids, tokens)
    assert seen[0].dtype == torch.bfloat16 and 1e-4 < (rounded - exact).abs().max() < 1
    whole = seen[1][:, -37:-1].float() @ head.weight.T + head.bias
    assert rounded.dtype == torch.float32
    assert torch.allclose(rounded, whole[..., half.offset:-1], atol=1e-6)

def test_decoding_gives_the_tiles_back(policy):
    """Code c at row r, column q is tile c at pixels (8 r, 8 q), to the bit."""
    tokens = torch.arange(36)[None] + 13
    picture = policy.decode(tokens)
    assert picture.shape == (1, 48, 48, 3) and picture.dtype == torch.uint8
    assert (picture[0].numpy() == np.asarray(images_of(tokens.tolist())[0])).all()

def test_decoding_in_chunks_changes_nothing(monkeypatch):
    """300 pictures, 113 at a time. Codes 0 and 1 are black, 2 is gray, all others are white."""
    fresh, chunks = shapes(), []
    fresh.decoder = lambda codes: chunks.append(len(codes)) or codes[:, None].repeat(1, 3, 1, 1) - 2
    tokens = torch.randint(6, (300, 36), generator=seeded(0))
    levels = torch.tensor([0, 0, 127, 255, 255, 255])[tokens]                   # (300, 36)
    assert torch.equal(fresh.decode(tokens)[..., 0].flatten(1).long(), levels)
    assert chunks == [113, 113, 74]

def test_checkpointing_computes_twice_and_changes_nothing(batch):
    """The same gradient; each layer runs a second time in the backward pass."""
    vectors, counts = [], []
    for checkpointing in (False, True):
        fresh, runs = shapes(checkpointing=checkpointing), []
        fresh.showo.model.layers[0].mlp.fc1.register_forward_hook(lambda *_: runs.append(1))
        vectors.append(gradient(fresh, tiny(), batch)[0])
        counts.append(len(runs))
    assert torch.allclose(*vectors, atol=1e-6) and counts[1] == 2 * counts[0]

# ---- 9. The shapes world's policy and base -------------------------------------------------------

def test_places_are_counted_from_the_end_and_learned():
    """By hand on three ids; trained, and saved under its name."""
    fresh, ids = shapes(), torch.tensor([[3, 0, 3], [1, 2, 4]])
    embedding = fresh.showo.model.embed_tokens
    expected = torch.stack([embedding.weight[row] + embedding.place[-3:] for row in ids])
    assert torch.equal(embedding(ids), expected)
    assert torch.equal(embedding(ids[:, 1:]), expected[:, 1:])
    M.pretrain(fresh, tiny())
    assert not torch.equal(fresh.state_dict()["showo.model.embed_tokens.place"],
                           shapes().showo.model.embed_tokens.place)

def test_each_part_of_a_run_depends_on_the_seed(tmp_path, monkeypatch):
    """Initial weights; captions, pictures and masks of pretraining; draws of a run."""
    seen = []
    for seed in (0, 1):
        masks = []
        with monkeypatch.context() as patch:
            patch.setattr(R, "draw_pairs", lambda *a, pairs=R.draw_pairs: seen.extend(pairs(*a))
                          or seen[-2:])
            patch.setattr(M.Policy, "forward", lambda self, ids, tokens, forward=M.Policy.forward:
                          masks.append(tokens == 49) or forward(self, ids, tokens))
            fresh = shapes(seed=seed)
            weight = fresh.showo.lm_head.weight.detach().clone()
            M.pretrain(fresh, tiny(seed=seed))
        torch.save(shapes().state_dict(), tmp_path / "base.pt")         # the same for both runs
        checkpoint, rows = run(tmp_path / str(seed), reward="red", seed=seed,
                               weights=tmp_path / "base.pt")
        seen += [weight, torch.cat(masks), checkpoint["draws"], rows[0]["reward"],
                 checkpoint["before"]["pictures"]]
    for a, b in zip(seen[:7], seen[7:], strict=True):
        assert not (torch.equal(a, b) if torch.is_tensor(a) else a == b)

def test_the_base_learns_from_masked_tokens_only(monkeypatch):
    """On pictures of one code each, numbered by their captions. 2 / pi of all tokens are masked."""
    texts, shown, asked, forward, encode = [], [], [], M.Policy.forward, M.Policy.encode
    monkeypatch.setattr(M.Policy, "forward", lambda self, ids, tokens: shown.append(tokens)
                        or forward(self, ids, tokens))
    monkeypatch.setattr(M.Policy, "encode", lambda self, prompts: texts.extend(prompts)
                        or encode(self, ["a star"] * len(prompts)))
    monkeypatch.setattr(M.F, "cross_entropy", lambda logits, target, loss=M.F.cross_entropy:
                        asked.append((logits.shape, target)) or loss(logits, target))
    monkeypatch.setattr(R, "draw_pairs", lambda n, _: (
        [str(i) for i in range(n)], torch.arange(n)[:, None].expand(n, 36) % 49))
    M.pretrain(shapes(), tiny(pretrain_steps=60))
    codes = torch.tensor([int(text or 0) % 49 for text in texts]).view(60, 32, 1).expand(-1, -1, 36)
    shown, known = torch.stack(shown), torch.tensor([text != "" for text in texts]).view(60, 32, 1)
    visible, masked = (shown != 49) & known, shown == 49
    assert torch.equal(shown[visible], codes[visible]) and masked.any(2).all()
    assert masked.float().mean().item() == pytest.approx(2 / math.pi, abs=0.05)
    for (shape, target), hidden, truth, has_text in zip(asked, masked, codes, known, strict=True):
        assert shape == (int(hidden.sum()), 49)
        assert torch.equal(target[has_text.expand_as(hidden)[hidden]], truth[hidden & has_text])
    assert texts.count("") / len(texts) == pytest.approx(0.1, abs=0.03) and len(set(texts)) > 1000

def test_a_base_is_reused_only_for_the_same_settings(tmp_path, monkeypatch):
    """Its file is named by seed, width, layers and steps; half of a file is one line."""
    made = []
    monkeypatch.setattr(M, "pretrain", lambda policy, config: made.append(config))
    for settings in ({}, {}, {"seed": 1}, {"width": 32}, {"layers": 2}, {"pretrain_steps": 3}):
        M.load_base(shapes(**settings), tiny(**settings), tmp_path)
    assert len(made) == 5
    path = tmp_path / "base-0-16-1-2.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SystemExit, match="base-0-16-1-2.pt"):
        M.load_base(shapes(), tiny(), tmp_path)

# ---- 10. Show-o: small ones in the published layout, made here -----------------------------------

WORDS = ["<|endoftext|>", "a", "cat", "dog", "house", "of", "bread", "and", "red", "tall", "old"]
CAPTIONS = ["a cat", "a dog", "a red cat", "a tall house of bread", "a cat and an old dog"]
Decoder = M.MagvitDecoder

@pytest.fixture(scope="module")
def showo(tmp_path_factory):
    """Language model, Show-o, MAGVIT-v2 and a CLIP of random weights -> dict of paths as str."""
    import open_clip
    folder, codebook_size = tmp_path_factory.mktemp("published"), 32
    names = dict(llm="llm", showo="showo", magvit="magvit", clip="clip.pt", config="tiny-clip.json",
                 prompts="captions.txt")
    paths = {name: folder / path for name, path in names.items()}
    for name in ("llm", "showo", "magvit"):
        paths[name].mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)},
                                           unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=WORDS[0], eos_token=WORDS[0],
                            unk_token=WORDS[0]).save_pretrained(paths["llm"])
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    PhiConfig(vocab_size=64, resid_pdrop=0.5, **sizes).save_pretrained(paths["llm"])
    torch.manual_seed(0)
    vocabulary = len(WORDS) + 10 + codebook_size + 1
    phi = PhiConfig(vocab_size=vocabulary, qk_layernorm=True, initializer_range=0.3, **sizes)
    save_file(M.Policy(phi, None, 0, None, 16, codebook_size).state_dict(),
              paths["showo"] / "pytorch_model.safetensors")
    (paths["showo"] / "config.json").write_text(json.dumps(dict(
        vocab_size=vocabulary, llm_vocab_size=len(WORDS), llm_model_path=str(paths["llm"]),
        codebook_size=codebook_size, num_vq_tokens=16)))
    decoder = {f"decoder.{n}": t for n, t in Decoder(32).state_dict().items()}
    save_file({**decoder, "encoder.conv_in.bias": torch.zeros(3), "quantize.x": torch.zeros(8)},
              paths["magvit"] / "pytorch_model.safetensors")
    paths["config"].write_text(json.dumps(dict(
        embed_dim=16,
        text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=1, layers=1),
        vision_cfg=dict(image_size=32, patch_size=16, width=32, head_width=16, layers=1))))
    open_clip.add_model_config(paths["config"])
    torch.save(open_clip.create_model("tiny-clip").state_dict(), paths["clip"])
    paths["prompts"].write_text("\n".join(CAPTIONS) + "\n")
    return {name: str(path) for name, path in paths.items()}

def showo_flags(showo, out, **more):
    """A short run of it on the CPU."""
    return flags(**{"model": showo["showo"], "vq_model": showo["magvit"], "out": out,
                    "prompts": showo["prompts"], "reward": f"clip:tiny-clip:{showo['clip']}",
                    "group_size": 2, "lr": 1e-3, **more})

def test_show_o_from_folders_end_to_end(showo, tmp_path):
    """2 updates, and --resume for another with files that have been moved."""
    M.main(showo_flags(showo, tmp_path / "out"))
    words = ["--resume", "--out", str(tmp_path / "out"), "--updates", "3"]
    for flag, part in (("--model", "showo"), ("--vq-model", "magvit"), ("--prompts", "prompts")):
        os.symlink(showo[part], tmp_path / part)
        words += [flag, str(tmp_path / part)]
    M.main(words)
    trained = saved(tmp_path / "out")["policy"]
    assert len(saved(tmp_path / "out")["rows"]) == 3
    published, decoder = (load_file(pathlib.Path(showo[name], "pytorch_model.safetensors"))
                          for name in ("showo", "magvit"))
    frozen = {name: x for name, x in decoder.items() if name.startswith("decoder.")}
    assert trained.keys() == {*published, *frozen}
    assert same(frozen.values(), [trained[name] for name in frozen])
    assert not same(published.values(), [trained[name] for name in published])

def test_other_weights_replace_the_base(showo, tmp_path, monkeypatch):
    """Of Show-o (half precision, in torch's old format), of the shapes world, of a user model."""
    published = load_file(pathlib.Path(showo["showo"], "pytorch_model.safetensors"))
    torch.save({name: (tensor + 1).half() for name, tensor in published.items()},
               tmp_path / "mine.pth", _use_new_zipfile_serialization=False)
    config = M.parse(showo_flags(showo, tmp_path, weights=tmp_path / "mine.pth"))
    bias = M.make_policy(config, torch.device("cpu")).showo.lm_head.bias
    assert torch.equal(bias, (published["showo.lm_head.bias"] + 1).half().float())
    assert bias.dtype == torch.float32
    monkeypatch.setattr(M, "load_base", None)
    trained = shapes(seed=9)
    torch.save({"policy": trained.state_dict(), "rows": []}, tmp_path / "checkpoint.pth")
    checkpoint, _ = run(tmp_path / "run", weights=tmp_path / "checkpoint.pth", lr=0.0)
    assert same(checkpoint["policy"].values(), trained.state_dict().values())
    (tmp_path / "own_weights.py").write_text(OWN_MODEL)
    table = torch.tensor([0.0, 0.0, 0.0, 50.0]).expand(9, 4)                    # code 3 everywhere
    torch.save({"table": table.half()}, tmp_path / "table.pt")
    monkeypatch.syspath_prepend(tmp_path)
    own = dict(model="own_weights:make", weights=tmp_path / "table.pt")
    assert torch.equal(shapes(**own).table, table) and shapes(**own).table.dtype == torch.float32

def test_where_weights_are_looked_for(tmp_path, monkeypatch):
    """A file, a folder, OWNER/NAME on the hub, and another file there, OWNER/NAME/FILE."""
    import open_clip
    save_file({"x": torch.ones(1)}, tmp_path / "pytorch_model.safetensors")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    asked, made = [], []
    for module in (M, R):
        monkeypatch.setattr(module, "hf_hub_download", lambda repository, name: asked.append(
            f"{repository}/{name}") or str(tmp_path / name.split("/")[-1]))
    for source, value in (("owner/name", 1), ("owner/name/a/other.pth", 0), (tmp_path, 1),
                          (tmp_path / "other.pth", 0)):
        assert M.read_weights(source)["x"] == value
    monkeypatch.setattr(open_clip, "create_model_from_pretrained", lambda model, pretrained, **_:
                        made.append((model, pretrained)) or (torch.nn.Identity(), None))
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda model: None)
    monkeypatch.setattr(torch.nn.Identity, "logit_scale", torch.zeros(()), raising=False)
    for spec in ("clip", "clip:ViT-B-32:openai", "clip:hf-hub:owner/name", "hpsv2"):
        R.load_reward(spec)
    assert made == [("ViT-H-14", "laion2b_s32b_b79k"), ("ViT-B-32", "openai"),
                    ("hf-hub:owner/name", None),
                    ("ViT-H-14", str(tmp_path / "HPS_v2.1_compressed.pt"))]
    assert asked == ["owner/name/pytorch_model.safetensors", "owner/name/a/other.pth",
                     "xswu/HPSv2/HPS_v2.1_compressed.pt"]

def test_full_size_has_the_published_names_and_shapes():
    """Without storage: those of the published files, as a checksum of their sorted list."""
    with torch.device("meta"):
        phi = PhiConfig(vocab_size=58498, qk_layernorm=True)
        whole = M.Policy(phi, None, 50256, Decoder(), 1024, 8192)
    for prefix, count, numbers, checksum in (("showo.", 437, 1_448_176_770, 735684579),
                                             ("decoder.", 190, 39_947_833, 907638121)):
        part = {n: list(x.shape) for n, x in whole.state_dict().items() if n.startswith(prefix)}
        assert len(part) == count and sum(map(math.prod, part.values())) == numbers
        assert zlib.crc32(repr(sorted(part.items())).encode()) == checksum
    assert (whole.pad_id, whole.soi_id, whole.eoi_id, whole.t2i_id, whole.offset) == (
        50295, 50296, 50297, 50300, 50305)

def test_a_loaded_show_o(showo, monkeypatch):
    """Its layout of prompts, Phi's gelu_new in one kernel, and bf16 on a GPU alone."""
    large, x = M.load_showo(showo["showo"], showo["magvit"]), torch.linspace(-6, 6, 1001)
    assert large.encode(["a cat", ""]).tolist() == [[16, 0, 1, 2, 0], [11, 11, 16, 0, 0]]
    formula = 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x ** 3)))
    assert all(torch.allclose(layer.mlp.activation_fn(x), formula, atol=1e-6)
               for layer in large.showo.model.layers)
    assert large.dtype == torch.float32 and not large.decoder.conv_in.weight.requires_grad
    assert large.showo.config.resid_pdrop == 0          # sampler and learner must agree
    monkeypatch.setattr(M.Policy, "to", lambda self, device: self)      # there may be no GPU
    monkeypatch.setattr(torch, "set_float32_matmul_precision", (seen := []).append)
    assert M.load_showo(showo["showo"], showo["magvit"], device="cuda").dtype == torch.bfloat16
    assert seen == ["high"]

def magvit_by_hand(weights, codes):
    """MAGVIT-v2's decoder in functions of torch alone: codes (B, h, w) -> (B, 3, 16 h, 16 w)"""
    F = torch.nn.functional
    def conv(x, name):
        weight = weights[name + ".weight"]
        return F.conv2d(x, weight, weights[name + ".bias"], padding=weight.shape[-1] // 2)

    def norm(x, name):
        return F.group_norm(x, 32, weights[name + ".weight"], weights[name + ".bias"], 1e-6)

    def block(x, name):
        inner = conv(F.silu(norm(x, name + ".norm1")), name + ".conv1")
        inner = conv(F.silu(norm(inner, name + ".norm2")), name + ".conv2")
        return inner + (conv(x, name + ".nin_shortcut")
                        if name + ".nin_shortcut.weight" in weights else x)

    def attention(x, name):
        q, k, v = (conv(norm(x, name + ".norm"), f"{name}.{part}").flatten(2) for part in "qkv")
        share = (torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5).softmax(2)
        return x + conv(torch.einsum("bij,bcj->bci", share, v).view_as(x), name + ".proj_out")

    bits = [[[[1.0 if code >> bit & 1 else -1.0 for code in row] for row in picture]
             for bit in range(12, -1, -1)] for picture in codes.tolist()]       # the highest first
    x = conv(conv(torch.tensor(bits, dtype=torch.float64), "post_quant_conv"), "conv_in")
    x = block(attention(block(x, "mid.block_1"), "mid.attn_1"), "mid.block_2")
    for level, blocks in ((4, 3), (3, 4), (2, 3), (1, 4), (0, 4)):              # coarse to fine
        for i in range(blocks):
            x = block(x, f"up.{level}.block.{i}")
        if level > 0:
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"up.{level}.upsample.conv")
    return conv(F.silu(norm(x, "norm_out")), "conv_out")

def test_the_decoder_computes_what_magvit_v2_does():
    """Random weights, larger where attention would else be even; the eps of its norms."""
    torch.manual_seed(0)
    decoder = Decoder(width=32)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
            elif ".q." in name or ".k." in name:
                p.mul_(8)
    codes = torch.randint(8192, (2, 3, 2))
    with torch.no_grad():
        got = decoder(codes)
        expected = magvit_by_hand({n: x.double() for n, x in decoder.state_dict().items()}, codes)
    assert got.shape == expected.shape == (2, 3, 48, 32)
    assert (got - expected).abs().max() < 1e-4 and expected.std() > 0.1
    assert {m.eps for m in decoder.modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-6}

def test_a_show_o_that_cannot_be_loaded(showo, tmp_path, capsys):
    """Each in one line and before the folder of the run is made."""
    copy, out = shutil.copytree(showo["showo"], tmp_path / "copy"), tmp_path / "out"
    showo, weights = {**showo, "showo": str(copy)}, copy / "pytorch_model.safetensors"
    config, whole = copy / "config.json", load_file(weights)
    text = config.read_text()
    for tensors, why in (({n: x for n, x in whole.items() if n != "showo.lm_head.bias"},
                          'Missing key(s) in state_dict: "showo.lm_head.bias"'), (None, "No such"),
                         ({f"module.{n}": x for n, x in whole.items()}, "(module.showo.")):
        weights.unlink(missing_ok=True)
        _ = tensors and save_file(tensors, weights)     # an error shows some of the file's names
        assert why in refused(capsys, *showo_flags(showo, out))
    for content, why in ((text.replace(": 11", ": 12"), "has 11 tokens"), ("{", "JSON"),
                         (text.replace("/llm", "/no"), "/no"), ('{"vocab_size": 3}', "KeyError")):
        config.write_text(content)
        error = refused(capsys, *showo_flags(showo, out))
        assert why in error and f"--model {showo['showo']}: " in error and not out.exists()

def test_full_size_show_o_stays_on_its_device():
    """Tensors without storage that claim to be on a GPU: a rollout with guidance, all transitions,
    the decoder, at published widths. A tensor left on the CPU raises, or is an answer there."""
    try:
        with FakeTensorMode():
            torch.arange(2, device="cuda")[:, None].expand(2, 3).float().uniform_()
    except RuntimeError as error:
        pytest.skip(f"for fake CUDA tensors this torch needs a driver: {error}")
    with FakeTensorMode():
        with torch.device("cuda"):
            phi = PhiConfig(vocab_size=58498, qk_layernorm=True, num_hidden_layers=1)
            whole = M.Policy(phi, lambda text: [1] * len(text), 0, Decoder(), 1024, 8192)
        ids, pairs = whole.encode(["a cat", "a tall house"]), torch.arange(2, device="cuda")
        path = M.rollout(whole, ids, 2, 1.0, 5.0, whole.encode([""]).expand(2, -1))
        logp = [M.replay_logprob(whole, ids, path, pairs, pairs, name) for name in M.TRANSITIONS]
        pixels = whole.decode(path.tokens)
        assert {x.device.type for x in (ids, *path, *logp, pixels)} == {"cuda"}
        assert pixels.shape == (2, 512, 512, 3) and path.noise.shape == (2, 2, 1024)

# ---- 11. Around the loop -------------------------------------------------------------------------

def test_weight_decay_shrinks_matrices_and_nothing_else():
    """A step at gradient 0, rate .1 and decay .5: matrices shrink by a twentieth, nothing else."""
    for name in ("adamw", "adafactor"):
        fresh = shapes()
        optimizer = M.make_optimizer(fresh, tiny(optimizer=name, lr=0.1, weight_decay=0.5))
        for p in fresh.parameters():
            p.data.add_(1)                                  # biases begin at 0, which cannot shrink
            p.grad, p.before = torch.zeros_like(p), p.detach().clone()
        optimizer.step()
        for p in fresh.parameters():
            assert torch.allclose(p, p.before * (0.95 if p.dim() == 2 else 1), atol=1e-6)

def test_adafactor_steps_are_of_the_size_of_the_learning_rate():
    """Not of lr times the size of the weight, as is usual for it: so --lr means the same."""
    fresh = shapes()
    optimizer = M.make_optimizer(fresh, tiny(optimizer="adafactor", lr=1e-3, weight_decay=0.0))
    weight = fresh.showo.lm_head.weight
    before = weight.detach().clone()
    fresh(fresh.encode(["a star"]), torch.full((1, 36), 49)).logsumexp(-1).sum().backward()
    optimizer.step()
    assert 3e-4 < (weight - before)[fresh.offset:-1].pow(2).mean().sqrt() < 3e-3
    assert optimizer.state[weight]["row_var"].numel() < before.numel() / 8

def test_evaluation_measures_each_caption_in_its_own_category(policy):
    """A measure that returns the caption's number. The noise is fixed whatever is trained."""
    splits, seen = [R.captions(False), R.captions(True)], []
    def number(images, prompts):
        seen.append(torch.from_numpy(np.stack([*map(np.asarray, images)])))
        return torch.tensor([100.0 + EVERY_CAPTION.index(text) for text in prompts])

    for name, settings in (("y", {}), ("x", dict(lr=0.1, groups=7, group_size=3, steps=2))):
        result = M.evaluate(policy, number, splits, tiny(eval_pictures=5, **settings), name)
    assert torch.equal(*seen)
    assert torch.equal(result["pictures"], seen[0].view(2, 6, 5, 48, 48, 3)[:, :, :4])
    for split, scores in zip(splits, result["scores"]):
        for texts, row in zip(split.values(), scores.tolist()):
            assert [EVERY_CAPTION[int(x) - 100] for x in row] == (texts * 5)[:5]
    for line, name, row in zip(result["lines"], ("training", "held-out"), result["scores"].mean(2)):
        cells = " ".join(f"{c} {mean:.2f}" for c, mean in zip(R.CATEGORIES, row.tolist()))
        assert line == f"x {name} {row.mean():.3f} | {cells}"

OWN_MODEL = '''
import torch
class Tiny(torch.nn.Module):
    num_tokens, codebook_size, device = 9, 4, torch.device("cpu")
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(9, self.codebook_size))

    def encode(self, prompts):
        return torch.zeros(len(prompts), 1, dtype=torch.long)

    def forward(self, prompt_ids, tokens):
        logits = self.table.expand(len(tokens), -1, -1)
        return logits

    def decode(self, tokens):
        red = (tokens.view(-1, 3, 3) * 80).repeat_interleave(8, 1).repeat_interleave(8, 2)
        return torch.stack([red, 0 * red, 255 - red], dim=-1).to(torch.uint8)

def make(config, device):
    return Tiny().to(device)
'''

@pytest.fixture
def own_model(tmp_path, monkeypatch):
    """Write a variant of OWN_MODEL as a module -> the flags that train it."""
    def write(name, old="", new=""):
        (tmp_path / f"{name}.py").write_text(OWN_MODEL.replace(old, new))
        (tmp_path / "captions.txt").write_text("a cat\na dog\na bird\n")
        monkeypatch.syspath_prepend(tmp_path)
        return flags(model=f"{name}:make", prompts=tmp_path / "captions.txt", reward="red",
                     out=tmp_path / "out")
    return write

def test_a_wrong_model_shows_before_any_work(own_model, tmp_path, capsys):
    """A logit for MASK and a bug keep their tracebacks; dropout is off; `make` is seeded."""
    with pytest.raises(AssertionError, match=r"logits \(\d+, 9, 5\), must be \(\d+, 9, 4\)"):
        M.main(own_model("wide", "self.codebook_size)", "self.codebook_size + 1)"))
    with pytest.raises(KeyError, match="'x'"):
        M.main(own_model("buggy", "return logits", "raise KeyError('x')"))
    noisy = "return torch.nn.functional.dropout(logits, 0.5, training={})"
    words = own_model("noisy", "return logits", noisy.format("True"))
    assert "dropout" in refused(capsys, *words) and not (tmp_path / "out").exists()
    M.main(own_model("calm", "return logits", noisy.format("self.training")))
    assert len(saved(tmp_path / "out")["rows"]) == 2
    one, again, other = (shapes(model="calm:make", seed=seed).table for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)

@pytest.mark.parametrize("answer, error", [
    ("torch.zeros(3)", ValueError), ("torch.zeros(len(images), 1)", ValueError),
    ("[1.0, 1e999]", ValueError), ("[1.0, 1e999 * 0]", ValueError), ("'good'", TypeError),
    ("0\nimport no_such_package", ModuleNotFoundError), ("0\ntorch.no_name", AttributeError)])
def test_a_wrong_reward_shows_before_any_work(tmp_path, monkeypatch, answer, error):
    """With its traceback, before the base is trained or a folder made; so do bugs in its module."""
    name = f"wrong_{abs(hash(answer))}"
    text = f"import torch\ndef f(images, prompts):\n    return {answer}\n"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(M, "pretrain", None)
    with pytest.raises(error):
        M.main(flags(reward=f"{name}:f", out="out"))
    assert not (tmp_path / "out").exists()

def test_generating_in_genevals_layout(showo, tmp_path, monkeypatch):
    """Folders, metadata, four pictures each; a stopped one continues; seeds and weights count."""
    lines = [{"tag": tag, "include": [{"class": "cat"}], "prompt": "a cat"} for tag in "xy"]
    metadata, calls = tmp_path / "evaluation_metadata.jsonl", []
    metadata.write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(M, "sample", lambda *a, sample=M.sample: calls.append(a[1]) or sample(*a))
    def pictures(name, *more, **settings):
        M.main([*showo_flags(showo, tmp_path / name, generate=metadata, **settings), *more])
        return {path.relative_to(tmp_path / name).as_posix(): path.read_bytes()
                for path in (tmp_path / name).rglob("*.png")}

    first = pictures("first")
    assert sorted(first) == [f"0000{i}/samples/000{j}.png" for i in range(2) for j in range(4)]
    assert len(set(first.values())) == 8 and calls == [["a cat"] * 4] * 2
    found = [json.loads((tmp_path / f"first/0000{i}/metadata.jsonl").read_text()) for i in (0, 1)]
    assert found == lines and Image.open(tmp_path / "first/00000/samples/0000.png").size == (64, 64)
    (tmp_path / "first/00001/samples/0002.png").unlink()            # as if stopped in the second
    (tmp_path / "first/00001/metadata.jsonl").unlink()
    assert pictures("first", "--resume") == first and len(calls) == 3
    assert pictures("again", steps=2) == first
    other, path = M.load_showo(showo["showo"], showo["magvit"]).state_dict(), tmp_path / "other.pt"
    torch.save({name: x + 0.1 for name, x in other.items()}, path)
    for i, settings in enumerate((dict(guidance=3), dict(seed=1), dict(weights=path))):
        assert not set(first.values()) & set(pictures(f"other{i}", **settings).values())

# ---- 12. The command line ------------------------------------------------------------------------

def refused(capsys, *words):
    """The one line with which a command is refused, whose exit status is not 0."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        M.main([str(word) for word in words])
    error = capsys.readouterr().err + (stop.value.code if isinstance(stop.value.code, str) else "")
    assert stop.value.code and error.strip().count("\n") == 0 and error.startswith("mask_grpo.py: ")
    return error

class Code:
    """Unpickled, it writes a file."""
    def __reduce__(self):
        return open, ("written by code", "w")

def files(folder):
    """Name and content of every file."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

@pytest.mark.parametrize("words, named", [
    ("--no-such-flag 1", "--no-such-flag"), ("--updates many", "invalid int value: 'many'"),
    ("--transition p3", "p1_literal"), ("--updates 0", "--updates 0"), ("--lr -1", "--lr -1"),
    ("--eval-every 0", "least 1"), ("--eval-steps 0", "least 1"), ("--micro-batch 0", "least 1"),
    ("--reduction middle", "random"), ("--optimizer sgd", "adafactor"), ("--steps 0", "--steps 0"),
    ("--group-size 1", "--group-size 1: must be at least 2"), ("--prompts no.txt", "no.txt"),
    ("--lr nan", "--lr nan"), ("--score-steps -1", "--score-steps -1"), ("--steps 37", "--steps"),
    (f"--seed {2 ** 70}", "below 2 ** 31"), ("--steps 4 --score-steps 5", "--score-steps"),
    ("--eval-steps 99", "at most 36"), ("--filter-quantile 2", "at most 1"),
    ("--width 40", "--width"), ("--device tpu", "--device tpu"), ("--model x", "--prompts"),
    ("--generate x.txt", "--weights"), ("--resume", "--resume"), ("--reward math:no", "with a no"),
    ("--reward beauty", "shapes, clip"), ("--measure clip:ViT-B-32:FILE", "clip:"),
    ("--model no_such_module:f --prompts good.txt", "no_such_module"), ("--prompts one.txt", "two"),
    ("--weights code.pt", "code.pt"), ("--weights no_such_file.pt", "(no file or folder)"),
    ("--weights cat.pt --width 32", "cat.pt (showo."), ("--prompts empty.txt", "there are none"),
    ("--weights cat.pt --generate good.txt", "shapes world"), ("--out good.txt/out", "--out good"),
    ("--prompts x.csv", ".txt"), ("--prompts x.TSV", ".txt"), ("--prompts list.txt", ".txt"),
    ("--prompts dict.txt", ".txt"), ("--prompts late.txt", "dragon 9"),
    ("--prompts coco.json", "must be a list"), ("--prompts number.jsonl", "record 2"),
    ("--prompts broken.JSON", "JSONDecodeError"), ("--prompts half.json", "surrogates")])
def test_bad_input_is_one_line(words, named, tmp_path, capsys, monkeypatch):
    """It names what is wrong, and nothing was begun."""
    (tmp_path / "FILE").write_bytes(b"\xff\x00 is neither text nor weights")
    torch.save(Code(), tmp_path / "code.pt")
    for name, text in {
            "good.txt": "a cat\na dog\n", "empty.txt": " \n\n", "one.txt": "a cat\na cat\n\n",
            "x.csv": "a cat\na dog", "x.TSV": "a cat\na dog", "list.txt": '["a cat", "a dog"]',
            "dict.txt": '{"prompt": "a cat"}\n{"prompt": "a dog"}\n', "broken.JSON": "[",
            "coco.json": '{"annotations": [{"caption": "a cat"}, {"caption": "a dog"}]}',
            "number.jsonl": '{"prompt": "a cat"}\n3\n', "half.json": '["a \\ud800", "b"]',
            "late.txt": "\n".join([*EVERY_CAPTION, *(f"a dragon {i}" for i in range(20))])}.items():
        (tmp_path / name).write_text(text)
    torch.save(M.shapes_policy(M.Config()).state_dict(), "cat.pt")
    monkeypatch.setattr(M, "pretrain", None)
    before = files(tmp_path)
    error = refused(capsys, "--out", "out", *words.split())
    assert named in error and files(tmp_path) == before and not (tmp_path / "out").exists()

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two updates that the tests only read."""
    folder = tmp_path_factory.mktemp("finished")
    M.train(tiny(out=str(folder)))
    return folder

@pytest.mark.parametrize("words, named", [
    ("--resume --lr 1e-5", "--lr 1e-05: the run has 0.0015"), ("", "--resume continues it"),
    ("--resume --no-divide-by-std", "--divide-by-std"), ("--resume --updates 1", "2 are already"),
    ("--resume --prompts stars.txt", "captions"), ("--generate stars.txt --weights x", "exists")])
def test_a_folder_that_holds_a_run_stays_as_it_is(words, named, finished, capsys, monkeypatch):
    """A second start in it, and a resume with other settings or captions, are refused."""
    before = files(finished)
    (finished.parent / "stars.txt").write_text("a star\ntwo stars\n")
    monkeypatch.chdir(finished.parent)
    error = refused(capsys, "--out", finished, *words.split())
    assert named in error and files(finished) == before

def test_a_resumed_run_keeps_its_settings_but_a_few(finished):
    """Its length, its device, its place, the memory settings, and where its files lie."""
    words = (f"--resume --out {finished} --updates 7 --device cpu --micro-batch 3 --seed 0 "
             "--rollout-batch 5 --checkpointing --lr 1.5e-3 --vq-model x --weights y")
    assert M.parse(words.split()) == tiny(
        out=str(finished), resume=True, updates=7, micro_batch=3, rollout_batch=5,
        checkpointing=True, vq_model="x", weights="y")
    assert M.parse(["--resume", "--out", str(finished), "--device", "meta"]).device == "meta"
    assert M.MAY_CHANGE & {*OTHER} == {"updates"}       # of all that changes the outcome of a run
    zeros = [word for name in M.MAY_BE_0 for word in ("--" + name.replace("_", "-"), "0")]
    assert M.parse(zeros).warmup == 0 and M.parse(["--score-steps", "12"]).score_steps == 12

@pytest.mark.parametrize("damage", ["half", "older", "code", "device"])
def test_a_checkpoint_that_cannot_be_resumed_is_one_line(damage, finished, tmp_path, capsys):
    """Cut in half, of an older version, with code, of another device."""
    path, checkpoint = tmp_path / "checkpoint.pt", saved(finished)
    changed = {"half": checkpoint, "older": {**checkpoint, "config": {"length_normalize": True}},
               "code": Code(), "device": {**checkpoint, "draws": torch.zeros(16).byte()}}
    torch.save(changed[damage], path)
    if damage == "half":
        path.write_bytes(path.read_bytes()[:1000])
    error = refused(capsys, "--resume", "--out", tmp_path, "--updates", 3)
    assert not pathlib.Path("written by code").exists()
    assert ("--device" if damage == "device" else str(path)) in error

def test_help_explains_every_setting(capsys):
    """One flag, one comment, one default for each field, in ASCII and 100 columns."""
    with pytest.raises(SystemExit) as end:
        M.parse(["-h"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "clip_low is --clip-low" in text and text.isascii()
    assert max(map(len, text.splitlines())) <= 100
    for field in dataclasses.fields(M.Config):
        line, = re.findall(rf"^ +{field.name}: {field.type.__name__} = (.+?) +# .+", text,
                           re.MULTILINE)
        assert eval(line) == field.default

# ---- reward.py -----------------------------------------------------------------------------------

def images_of(scenes):
    """Scenes (lists of 36 codes) as PIL images, put together from tiles."""
    tiles = R.TILES[torch.tensor(scenes)].view(-1, 6, 6, 8, 8, 3).transpose(2, 3)
    return [Image.fromarray(picture) for picture in tiles.reshape(-1, 48, 48, 3).numpy()]

def scene(*objects):
    """36 codes from (shape, colour, row, column)."""
    codes = np.zeros((6, 6), int)
    for shape, color, row, column in objects:
        first, y, x = 1 + 4 * R.OBJECTS.index((shape, color)), 2 * row, 2 * column
        codes[y:y + 2, x:x + 2] = [[first, first + 1], [first + 2, first + 3]]
    return codes.flatten().tolist()

def test_tiles_differ_and_are_cut_in_reading_order():
    """49 codes, no two alike. An object's four tiles, put together, are its drawing."""
    assert R.TILES.shape == (49, 8, 8, 3) and len(R.TILES.unique(dim=0)) == 49
    assert (R.TILES[0] == torch.tensor(R.BACKGROUND)).all()
    assert tuple(R.draw_object("square", "red")[3, 3]) == R.COLORS["red"]       # it lies on a side
    for i, (shape, color) in enumerate(R.OBJECTS):
        cell = np.asarray(images_of([scene((shape, color, 0, 0))])[0])[:16, :16]
        assert (cell == R.draw_object(shape, color)).all() and i == R.look(
            images_of([scene((shape, color, 1, 2))]))[0, 5]

def test_a_fifth_of_the_meanings_of_each_category_is_held_out():
    """Rounded up, with all wordings: 1 of 4 shapes; 2 of 6 pairs; 2 of 8 counts; 3 of 12 colours;
    5 of 24 ordered pairs on 2 axes; 11 of 54 pairs. No text token is in held-out captions only."""
    trained, heldout = R.captions(False), R.captions(True)
    assert [*map(len, heldout.values())] == [1, 2 * 2, 2, 3, 5 * 2, 11 * 2]
    assert [*map(len, trained.values())] == [3, 4 * 2, 6, 9, 19 * 2, 43 * 2]
    assert heldout["single"] + heldout["counting"] == ["a circle", "two circles", "three stars"]
    seen, new = ({phrase for texts in side.values() for text in texts for phrase in R.phrases(text)}
                 for side in (trained, heldout))
    assert new <= seen
    assert sorted(sum([*trained.values(), *heldout.values()], [])) == sorted(set(EVERY_CAPTION))
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above",
                "and": "and"}
    for side in (trained, heldout):
        for caption in side["two"] + side["position"] + side["attribution"]:
            first, word, second = re.split(f" ({'|'.join(mirrored)}) ", caption)
            assert any(f"{second} {mirrored[word]} {first}" in texts for texts in side.values())

def test_text_tokens_are_phrases():
    """By hand; no two captions have the same ones, and every phrase is used."""
    assert R.phrases("a red star and a blue circle") == ["a red star", "and a blue circle"]
    assert R.phrases("a star left of a circle") == ["a star", "left of a circle"]
    assert R.phrases("two stars") == ["two", "stars"] and R.phrases("") == []
    fresh = shapes()
    rows = [fresh.tokenize(caption) for caption in EVERY_CAPTION]
    assert max(map(len, rows)) == 2 and len(set(map(tuple, rows))) == len(rows)
    assert sorted({id for row in rows for id in row}) == list(range(1, fresh.pad_id))

def test_drawings_are_correct_and_follow_their_conventions():
    """20 of each caption: one row, or one column if one is above the other; half of them red."""
    rng, colors = random.Random(0), collections.Counter()
    for caption in EVERY_CAPTION:
        images = images_of([R.draw_scene(caption, rng) for _ in range(20)])
        assert R.shapes_correct(images, [caption] * 20).eq(1).all()
        cells = R.look(images)                                                  # (20, 9)
        places = [row.nonzero()[:, 0] for row in cells >= 0]
        above = "above" in caption or "below" in caption
        assert all(len((place % 3 if above else place // 3).unique()) == 1 for place in places)
        assert len({tuple(place.tolist()) for place in places}) > 1
        if not any(color in caption for color in R.COLORS):
            colors.update(R.OBJECTS[o][1] for o in cells[cells >= 0].tolist())
    shares = [colors[color] / colors.total() for color in R.COLORS]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.03)
    prompts, pictures = R.draw_pairs(300, rng)
    assert R.shapes_correct(images_of(pictures.tolist()), prompts).eq(1).all()
    for part, share in ((R.captions(False), 0.31), (R.captions(True), 0.07)):   # of 6 / 15 in all
        assert all(set(texts) & set(prompts) for texts in part.values())
        assert sum(prompt in part["position"] for prompt in prompts) / 300 > 0.8 * share

STAR, PAIR = ("star", "red", 0, 0), [("star", "red", 0, 0), ("star", "blue", 1, 1)]
LEFT_RIGHT = [("circle", "red", 2, 0), ("star", "red", 0, 1)]       # the circle is lower, too

@pytest.mark.parametrize("caption, objects, expected", [
    ("a star", [STAR], 1), ("a star", [], 0), ("a star", [("circle", "red", 0, 0)], 0),
    ("a star", [STAR, ("star", "red", 2, 2)], 1 / 2),                       # one too many
    ("a star", [STAR, ("circle", "red", 1, 1)], 1 / 2),                     # uncalled for
    ("two stars", PAIR, 1), ("three stars", PAIR, 2 / 3), ("a red star", [PAIR[1]], 0),
    ("a circle and a star", LEFT_RIGHT, 1), ("a circle left of a star", LEFT_RIGHT, 1),
    ("a circle right of a star", LEFT_RIGHT, 1 / 2), ("a circle below a star", LEFT_RIGHT, 1),
    ("a circle above a star", LEFT_RIGHT, 1 / 2),
    ("a circle left of a star", [("circle", "red", 0, 0), ("star", "red", 1, 0)], 1 / 2),
    ("a red circle and a blue star", [("star", "blue", 0, 0), ("circle", "red", 1, 1)], 1),
    ("a red circle and a blue star", [("star", "red", 0, 0), ("circle", "blue", 1, 1)], 0),
    ("a red circle and a blue star", [("star", "red", 0, 0), ("circle", "red", 1, 1)], 1 / 2)])
def test_the_shapes_reward_by_hand(caption, objects, expected):
    """Number, shape, colour, relation and binding: parts of what was asked for or drawn."""
    picture = images_of([scene(*objects)])
    assert R.shapes_reward(picture, [caption]).item() == pytest.approx(expected)
    assert R.shapes_correct(picture, [caption]).item() == (expected == 1)

def test_a_misplaced_tile_is_seen_and_noise_is_not():
    """Quarters exchanged, missing, stray, or of any other colour; and noise of 20 of 255 levels."""
    good = scene(("star", "red", 1, 1))                             # at positions 14, 15, 20, 21
    exchanged, missing, stray = good[:], good[:], good[:]
    exchanged[14], exchanged[15], missing[20], stray[0] = good[15], good[14], 0, 1
    images = images_of([good, exchanged, missing, stray])
    assert R.shapes_reward(images, ["a star"] * 4).tolist() == [1, 0, 0, 0.5]
    noise = np.random.default_rng(0).integers(-20, 21, (48, 48, 3))
    noisy = Image.fromarray((np.asarray(images[0]) + noise).clip(0, 255).astype(np.uint8))
    assert R.shapes_correct([noisy], ["a star"]).item() == 1
    for shape, colors, i in itertools.product(R.SHAPES, itertools.permutations(R.COLORS, 2),
                                              (14, 15, 20, 21)):
        codes, other = (scene((shape, color, 1, 1)) for color in colors)
        codes[i] = other[i]
        cells = R.look(images_of([codes]))[0]
        assert cells[4] == R.BROKEN and cells.ne(R.EMPTY).sum() == 1

def noise_images(n, size=64):
    """n PIL images of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]

def test_clip_is_open_clips_scaled_cosine(showo, tmp_path):
    """By open_clip's own forward; 77 tokens of 200 count; from a file, a folder; with no scale."""
    import open_clip
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-clip", showo["clip"])
    images = noise_images(40)
    prompts = [f"picture number {i}" for i in range(38)] + ["cat " * 200, "cat " * 199 + "dog"]
    with torch.no_grad():
        pair = model.eval()(torch.stack([preprocess(image) for image in images]),
                            open_clip.get_tokenizer("tiny-clip")(prompts))
    cosine = (pair[0] * pair[1]).sum(-1)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({
        "model_cfg": json.loads(pathlib.Path(showo["config"]).read_text()), "preprocess_cfg": {}}))
    shutil.copy(showo["clip"], tmp_path / "open_clip_pytorch_model.bin")
    for name, scale in ((f"clip:tiny-clip:{showo['clip']}", model.logit_scale.exp()),
                        (f"clip:local-dir:{tmp_path}", model.logit_scale.exp()),
                        (f"hpsv2:tiny-clip:{showo['clip']}", 1)):
        scores = R.load_reward(name)(images, prompts)
        assert torch.allclose(scores, cosine * scale, atol=1e-4)
        assert scores.dtype == torch.float32 and not scores.requires_grad
    half = R.cosine(lambda *_: [x.bfloat16() for x in pair[:2]], 1, torch.device("cpu"))
    assert half([None] * 9, [""] * 9).dtype == torch.float32        # as autocast on a GPU

def test_pickscore_is_transformers_clip(tmp_path):
    """Against a small CLIPModel's own logits. A file that lacks a tensor is refused by its name."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{c}</w>" for c in "acdgot"), *"acdgot"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    model = CLIPModel(CLIPConfig(
        text_config=dict(sizes, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1),
        vision_config=dict(sizes, image_size=32, patch_size=16), projection_dim=8)).eval()
    processor = CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32},
                                                 crop_size={"height": 32, "width": 32}), tokenizer)
    for part in (model, processor):
        part.save_pretrained(tmp_path)
    images, prompts = noise_images(3), ["a cat", "a dog " * 100, "dog"]
    inputs = processor(text=prompts, images=images, return_tensors="pt", truncation=True,
                       max_length=77, padding="max_length")
    expected = model(**inputs).logits_per_image.diagonal()
    scores = R.load_reward(f"pickscore:{tmp_path}")(images, prompts)
    assert torch.allclose(scores, expected, atol=1e-4)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("text_projection.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit, match="lack text_projection.weight"):
        R.load_reward(f"pickscore:{tmp_path}")

def test_captions_are_read_from_text_and_json(tmp_path):
    """Blank lines, empty captions and a byte order mark are none; only a line feed ends a line."""
    for name, text in {
            "a.txt": "a cat\n\n  a dog \n", "A.JSON": '["a cat", {"caption": "a dog"}, " "]',
            "a.jsonl": '{"prompt": "a cat", "tag": "x"}\n\n"a dog"\n{"caption": ""}',
            "bom.txt": "\ufeffa cat\na dog", "lines": "a cat\r\na dog"}.items():
        (tmp_path / name).write_bytes(text.encode())
        records = R.read_captions(tmp_path / name)
        assert [record["prompt"] for record in records] == ["a cat", "a dog"]
        assert ("tag" in records[0]) == (name == "a.jsonl")
    (tmp_path / "a.txt").write_bytes("a cat\u2028on a\x85mat\n[brackets] and {braces}\n".encode())
    assert len(R.read_captions(tmp_path / "a.txt")) == 2

@pytest.mark.parametrize("n, held", [(2, 1), (10, 1), (11, 2), (640, 64), (641, 64), (2000, 64)])
def test_a_fixed_tenth_of_the_captions_is_held_out(tmp_path, n, held):
    """Rounded up, at most 64; the same in any order. Duplicates count once."""
    captions, sides = [f"caption {i}" for i in range(n)], []
    for texts in (captions, captions[::-1] + captions[:7]):
        (tmp_path / "captions.txt").write_text("\n".join(texts))
        sides.append(R.split_captions(str(tmp_path / "captions.txt")))
    (trained,), (heldout,) = (part.values() for part in sides[0])
    assert sides[0] == sides[1] and len(heldout) == held
    assert heldout + trained == sorted(captions, key=lambda text: zlib.crc32(text.encode()))

def test_a_grid_shows_each_picture_under_its_caption_with_its_score(tmp_path, monkeypatch):
    """Held-out pictures are green before and blue after: green stands left of blue; none is red."""
    written = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda _, at, text, *__: written.append(text))
    def made_up(start, color):
        pictures = torch.zeros(2, 3, 4, 8, 8, 3, dtype=torch.uint8)
        pictures[0, ..., 0] = pictures[1, ..., color] = 255
        return {"scores": start + 0.01 * torch.arange(24.0).view(2, 3, 4), "pictures": pictures}

    base, trained = made_up(0.1, 1), made_up(0.5, 2)
    captions = {"one": ["x", "y"], "two": ["z"], "three": [max(EVERY_CAPTION, key=len)]}
    R.save_grid(tmp_path / "grid.png", "base | trained", captions, base, trained)
    assert written[0].endswith("base | trained") and written[1:] == [
        text for c, texts in enumerate(captions.values()) for j in range(4) for text in (
            texts[j % len(texts)], *(f"{x['scores'][1, c, j]:.2f}" for x in (base, trained)))]
    sheet = np.array(Image.open(tmp_path / "grid.png"))                         # (H, W, 3)
    red, green, blue = (np.nonzero((sheet == color).all(2))[1]
                        for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    assert len(red) == 0 and len(green) == len(blue) == 12 * (96 - 2) ** 2     # and outlined
    assert green.min() < blue.min() and green.max() < blue.max()

# ---- README.md and assets/ -----------------------------------------------------------------------

README, STUDY, SHOW_O = ((HERE / name).read_text(encoding="utf-8")
                         for name in ("README.md", "assets/study.md", "assets/show-o.md"))

def test_the_readmes_reward_and_the_model_above_run(own_model, tmp_path, monkeypatch):
    """Its code block and its command: trained, resumed, and sampled from."""
    own_model("my_model")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    (tmp_path / "my_taste.py").write_text(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1])
    command = re.search(r"`(--model my_model:make .*?)`", README)[1].split()
    M.main([*flags(updates=6, lr=0.1, groups=4, out="out"), *command])
    assert saved("out")["rows"][-1]["grad"] > 0 and "my_taste:warm" in command
    M.main(["--resume", "--out", "out", "--updates", "7"])
    M.main([*flags(out="pictures", generate="captions.txt", weights="out/checkpoint.pt"), *command])
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 3 * 4

def test_sections_1_to_4_can_be_copied():
    """Below the imports that their text names, they train a model of another kind: a reward rises.

    Two prompts, six tokens, four codes. The reward is the share of tokens equal to the prompt + 1.
    """
    text = (HERE / "mask_grpo.py").read_text(encoding="utf-8")
    pasted = text[text.index("# 1. The sampler"):text.index("# 5. One update")]
    needed = re.search(r"They need (.*?)\.", pasted)[1].replace(" and ", ", ").split(", ")
    special = {"F": "import torch.nn.functional as F", "deque": "from collections import deque"}
    copied = types.SimpleNamespace()
    exec("\n".join(special.get(name, f"import {name}") for name in needed) + "\n" + pasted,
         vars(copied))

    class Model(torch.nn.Sequential):
        num_tokens, codebook_size = 6, 4
        def forward(self, prompt_ids, tokens):
            inputs = torch.cat([prompt_ids, tokens], 1)                         # (B, 7)
            return super().forward(F.one_hot(inputs, 5).flatten(1).float()).view(-1, 6, 4)

    torch.manual_seed(0)
    model = Model(torch.nn.Linear(35, 64), torch.nn.ReLU(), torch.nn.Linear(64, 24))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    ids, rewards = torch.tensor([[0], [1]]).repeat_interleave(8, 0), []         # (16, 1)
    b, t = torch.cartesian_prod(torch.arange(16), torch.arange(3)).unbind(1)    # (48,) each
    for _ in range(60):
        path = copied.rollout(model, ids, 3, generator=seeded(len(rewards)))
        reward = (path.tokens == ids + 1).float().mean(1)                       # (16,)
        advantage = copied.group_advantage(reward.view(2, 8)).flatten()         # (16,)
        logp = copied.replay_logprob(model, ids, path, b, t, "p1")              # (48,)
        loss, _ = copied.grpo_loss(logp, logp.detach(), advantage[b], 0.1, 0.2)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        rewards.append(reward.mean().item())
    assert rewards[0] < 0.5 and sum(rewards[-5:]) / 5 > 0.9

def test_a_trained_show_o_opens_in_show_os_own_code(showo, tmp_path, monkeypatch):
    """The line of show-o.md, beside the published config: names and shapes; and it loads here."""
    M.main(showo_flags(showo, "out"))
    exec(re.search(r'^python -c "(.*?)"$', SHOW_O, re.MULTILINE)[1], {})
    published, trained = (load_file(pathlib.Path(folder, "pytorch_model.safetensors"))
                          for folder in (showo["showo"], "."))
    assert {n: x.shape for n, x in trained.items()} == {n: x.shape for n, x in published.items()}
    assert not same(trained.values(), [published[name] for name in trained])
    M.load_showo(showo["showo"], showo["magvit"], "pytorch_model.safetensors")

@pytest.mark.parametrize("page, folder", [(README, HERE), (STUDY, HERE / "assets"),
                                          (SHOW_O, HERE / "assets")])
def test_a_page_names_what_there_is(page, folder):
    """Flags, files and tests. Means with a deviation stand in a table of study.md."""
    fields = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(M.Config)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page))
    assert named - fields <= {"--force-reinstall", "--no-divide-by-std", "--nproc-per-node",
                              "--shutdown-timeout"} and len(named) > 3
    paths = re.findall(r'\]\((?!http|#)(.+?)[)#]|src="(.+?)"', page)
    assert paths and all((folder / "".join(path)).exists() for path in paths)
    assert set(re.findall(r"`(test_\w+)`", page)) <= globals().keys()
    tables = "\n".join(line for line in STUDY.splitlines() if line.startswith("|"))
    numbers = re.findall(r"\d\.\d\d ± \d\.\d\d", page)
    assert all(number in tables for number in numbers)
    if page is README:              # its headline, and its rows, whose flags are left out
        assert f"default |  | 8 | {numbers[0]} | {numbers[1]} |" in tables
        for title, rest in re.findall(r"^(\| `.+?) \| (\d .*±.*)$", page, re.MULTILINE):
            assert re.search(re.escape(title) + r" \| [^|]*\| " + re.escape(rest[:-2]), tables)

def test_the_figures_are_what_their_script_draws():
    """Of what is kept. Fonts may differ by a little."""
    for name, figure in runpy.run_path(str(HERE / "assets" / "figures.py"))["FIGURES"].items():
        drawn, kept = np.asarray(figure()), np.asarray(Image.open(HERE / "assets" / name))
        assert drawn.shape == kept.shape and (drawn == kept).mean() > 0.99

def test_what_training_changes_is_measured_as_described(monkeypatch):
    """Three held-out pictures of two circles. Steps count from 1; two pictures begin both late."""
    mixed, alike = (scene(("circle", "red", 0, 0), ("circle", c, 0, 2)) for c in ("blue", "red"))
    revealed_at = torch.zeros(6, 6, 6).long()                       # background at once, in step 1
    revealed_at[3, :2, :2] = torch.tensor([[3, 5], [1, 6]])         # a circle from step 2 to 7
    revealed_at[3, :2, 4:] = 8                                      # a circle in step 9
    revealed_at[4:, :2, :2] = revealed_at[4:, :2, 4:] = torch.tensor([[9, 11], [10, 11]])
    path = M.Trajectory(torch.tensor([mixed] * 4 + [alike] * 2), revealed_at.flatten(1), None, None)
    monkeypatch.setattr(M, "sample", lambda *_: path)
    fresh = shapes()
    for weight in fresh.showo.lm_head.parameters():
        weight.data.zero_()                                         # a draw is one of 49, equally
    measure = runpy.run_path(str(HERE / "assets" / "changes.py"))["measure"]
    numbers, kinds = measure(fresh, [{"counting": ["two circles"]}] * 2,
                             tiny(eval_pictures=3, eval_steps=12))
    assert numbers == pytest.approx(dict(
        right=100, first=(2 + 9 + 4 * 10) / 6, last=(7 + 9 + 4 * 12) / 6, late=200 / 3,
        together=200 / 3, distinct=200 / 3, commonest=500 / 6, entropy=math.log2(49)), rel=1e-5)
    assert (3 * kinds).round().int().tolist() == [
        [84] + [0] * 11, [0, 1, 0, 0, 0, 0, 0, 0, 1, 4, 0, 0], [0, 0, 0, 1, 0, 1, 1, 0, 3, 0, 4, 8]]

@pytest.mark.parametrize("script, page", [("costs", SHOW_O), ("study", STUDY), ("over_t", STUDY),
                                          ("changes", STUDY), ("figures", None)])
def test_tables_are_what_their_scripts_print(script, page, tmp_path, capsys, monkeypatch):
    """Or printed once, where runs are too large to keep. A folder without runs is one line."""
    kept, path = HERE / "assets" / f"{script}.txt", str(HERE / "assets" / f"{script}.py")
    monkeypatch.setattr(M, "MagvitDecoder", Decoder)
    if script != "costs":
        monkeypatch.setattr(sys, "argv", [script, str(tmp_path)])
        with pytest.raises(SystemExit, match="holds no run") as stop:
            runpy.run_path(path, run_name="__main__")
        assert "\n" not in stop.value.code
        capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [script])
    if page and not kept.exists():
        runpy.run_path(path, run_name="__main__")
    text = kept.read_text(encoding="utf-8") if kept.exists() else capsys.readouterr().out
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert not page or len(table) >= 3 and not set(table) - set(page.splitlines())

# ---- assets/several_gpus.patch -------------------------------------------------------------------

WORKER = """
import signal, sys
import numpy as np
import torch
import mask_grpo as M

RED
M.reward.REWARDS["red"] = lambda device: red
make, sample, rank, update = M.make_policy, M.sample_groups, M.RANK, iter(range(1, 9))
def remember(*arguments):
    global policy
    return (policy := make(*arguments))

def sample_or_not(*arguments):          # in update 2 all groups of rank 1 vanish, and it is stopped
    groups = sample(*arguments)
    if (next(update), rank, len(sys.argv)) != (2, 1, LENGTH):
        return groups
    signal.raise_signal(signal.SIGINT)
    return groups._replace(prompts=[], rewards=groups.rewards[:0],
                           trajectory=M.Trajectory(*(x[:0] for x in groups.trajectory)))

M.make_policy, M.sample_groups = remember, sample_or_not
try:
    M.main(sys.argv[1:])
finally:
    torch.save(policy.state_dict(), f"rank{rank}.pt")
"""

def processes(words):
    """Run the worker as two processes -> their exit statuses, outputs, and weights"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    usual = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
             "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([sys.executable, "worker.py", *words], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={**os.environ, **usual, "RANK": rank, "LOCAL_RANK": rank})
               for rank in "01"]
    outputs = [process.communicate(timeout=300) for process in running]
    return ([process.returncode for process in running], outputs,
            [torch.load(f"rank{rank}.pt") for rank in "01"])

def test_two_processes_learn_as_one_does_from_the_groups_of_both(tmp_path, monkeypatch):
    """Three updates, interrupted by a signal to rank 1. The ranks' weights are equal bit by bit."""
    for file in ("mask_grpo.py", "reward.py"):
        shutil.copy(HERE / file, tmp_path)
    subprocess.run(["git", "apply", HERE / "assets" / "several_gpus.patch"], check=True)
    settings = dict(reward="red", updates=3, groups=8, max_grad_norm=0.1)
    words = flags(out="two", **settings)
    (tmp_path / "worker.py").write_text(WORKER.replace("LENGTH", str(1 + len(words))).replace(
        "RED", inspect.getsource(red)))
    status, outputs, (one, two) = processes(words)
    assert status == [1, 0] and "stopped after update 2" in outputs[0][1] and not outputs[1][0]
    assert len(saved("two")["rows"]) == 2 and same(one.values(), two.values())
    status, outputs, (one, two) = processes(["--resume", "--out", "two"])
    assert status == [0, 0] and "update   3/3" in outputs[0][0] and not outputs[1][0]
    assert same(one.values(), two.values())

    sample, update, filters = M.sample_groups, itertools.count(1), [None, M.SampleFilter(0.1)]
    def sample_both(policy, reward_fn, captions, sieve, config, generator):
        half, u = dataclasses.replace(config, groups=config.groups // 2), next(update)
        mine = sample(policy, reward_fn, captions, sieve, half, generator)
        other = sample(policy, reward_fn, captions, filters[1], half,
                       seeded(zlib.crc32(f"0 1 {u}".encode())))
        if u == 2:
            return mine
        return M.Groups(mine.prompts + other.prompts,
                        M.Trajectory(*map(torch.cat, zip(mine.trajectory, other.trajectory))),
                        *map(torch.cat, zip(mine[2:], other[2:])))

    monkeypatch.setattr(M, "sample_groups", sample_both)
    together, rows = run(tmp_path / "one", **{**settings, "groups": 16})
    start = M.read_weights(next((tmp_path / "one").glob("base*")))
    moved, apart = (sum((x[name] - together["policy"][name]).square().sum() for name in start)
                    for x in (start, one))
    assert apart < 1e-6 * moved
    for row, alone in zip(read_rows(tmp_path / "two"), rows, strict=True):
        assert float(row["grad"]) == pytest.approx(float(alone["grad"]), rel=1e-3)
