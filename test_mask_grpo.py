# SPDX-License-Identifier: MIT
"""The tests of mask_grpo.py and reward.py, in the sections and the order of the code.

`pytest -q` takes about a minute on a CPU. The tests double as explanations: each checks a claim
against a calculation by hand, an enumeration or a simulation.
"""
import collections
import contextlib
import csv
import dataclasses
import gc
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import weakref
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
TINY = {"width": 16, "layers": 1, "pretrain_steps": 2, "steps": 4, "eval_steps": 4, "updates": 2,
        "groups": 2, "group_size": 4, "warmup": 1, "eval_pictures": 4, "eval_every": 10,
        "device": "cpu"}
EVERY_CAPTION = list(R.WANTED)
CPU = torch.device("cpu")


def tiny(**settings):
    """A Config small enough to run in a second"""
    return M.Config(**{**TINY, **settings})


def seeded(seed):
    """A CPU generator"""
    return torch.Generator().manual_seed(seed)


def shapes(**settings):
    """The small policy of the shapes world with random weights, in evaluation mode"""
    return M.make_policy(tiny(**settings), CPU)


def same(one, two):
    """Whether two lists of tensors are bitwise equal"""
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, two, strict=True))


def record(monkeypatch, owner, name):
    """Let a function remember its calls -> the list of (arguments, result)"""
    calls = []
    usual = getattr(owner, name)

    def remembering(*arguments, **keywords):
        result = usual(*arguments, **keywords)
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(owner, name, remembering)
    return calls


class TablePolicy:
    """The least that a policy must provide. Its logits depend on the whole state."""

    def __init__(self, N=6, K=5, seed=0, scale=1.0):
        self.num_tokens = N
        self.codebook_size = K
        self.states = []
        self.own = scale * torch.randn(N, K, generator=seeded(seed))
        self.other = scale * torch.randn(N, K + 1, N, K, generator=seeded(seed)) / N ** 0.5

    def __call__(self, prompt_ids, tokens):
        """tokens (B, N) -> (B, N, K)"""
        self.states.append(tokens.clone())
        logits = self.own                                                       # (N, K)
        for i in range(self.num_tokens):
            logits = logits + self.other[i, tokens[:, i]]                       # (B, N, K)
        return logits


def sample(policy, B=8, steps=4, seed=0, **more):
    """A rollout of a policy that ignores its prompts"""
    nothing = torch.zeros(B, 1, dtype=torch.long)
    return M.rollout(policy, nothing, steps, generator=seeded(seed), **more)


@pytest.fixture(scope="module")
def policy():
    """A small Policy that the tests only read"""
    return shapes()


# ---- 1. The sampler and its record ---------------------------------------------------------------


def test_schedule_equals_the_published_samplers():
    """Show-o's numbers except the last step's, which leaves one masked; float32 decides at 2/3."""
    schedule = M.mask_schedule(50, 1024)
    assert schedule[:10] == [1023, 1021, 1019, 1015, 1011, 1005, 999, 991, 983, 973]
    assert schedule[-4:] == [96, 64, 32, 0]
    assert M.mask_schedule(16, 256) == [254, 251, 244, 236, 225, 212, 197, 181, 162, 142, 120, 97,
                                        74, 49, 25, 0]
    assert M.mask_schedule(12, 36)[7] == 17 and M.mask_schedule(4, 16) == [14, 11, 6, 0]
    assert M.mask_schedule(1, 9) == [0]


@pytest.mark.parametrize("N", [1, 5, 36, 256])
def test_every_step_of_every_schedule_reveals_a_token(N):
    """No token is revealed twice or left over. T = 0 and T > N are refused."""
    for T in range(1, min(N, 64) + 1):
        schedule = M.mask_schedule(T, N)
        assert len(schedule) == T and schedule[-1] == 0
        for before, after in itertools.pairwise([N, *schedule]):
            assert before > after
    for T in (0, N + 1):
        with pytest.raises(AssertionError, match=f"{T} steps"):
            M.mask_schedule(T, N)


@pytest.mark.parametrize("N, T", [(6, 1), (6, 3), (6, 6), (36, 14), (36, 18)])
def test_every_position_is_revealed_once_and_counts_follow_the_schedule(N, T):
    """The last token is no exception, and no noise is NaN."""
    path = sample(TablePolicy(N=N, K=4), steps=T)
    assert path.tokens.min() >= 0 and path.tokens.max() < 4
    masked = [N, *M.mask_schedule(T, N)]
    for t in range(T):
        assert ((path.revealed_at == t).sum(1) == masked[t] - masked[t + 1]).all()
    assert path.noise.isfinite().all()


def test_replayed_states_are_the_states_acted_in():
    """The policy remembers what it was shown, and the replay must show the same. Prompts are only
    counted and indexed, so embeddings (B, L, D) serve as well as ids (B, L)."""
    table = TablePolicy(N=8)
    prompts = torch.randn(5, 3, 4)
    path = M.rollout(table, prompts, 4, generator=seeded(0))
    acted = table.states
    table.states = []
    for t in range(4):
        M.replay_logprob(table, prompts, path, torch.arange(5), torch.full((5,), t), "ar")
    assert same(acted, table.states) and (acted[0] == 5).all()
    assert (acted[3] == 5).any()


def test_draws_follow_the_policy_and_the_highest_noisy_confidence_is_kept():
    """Frequencies of the first draws; the first step keeps the highest sums of log p and noise."""
    table = TablePolicy(N=3, K=3)
    path = sample(table, B=20_000, steps=3, temperature=3.0)
    logp = table(None, torch.full((1, 3), 3))[0].log_softmax(-1)                # (3, 3)
    frequency = F.one_hot(path.drawn[:, 0], 3).float().mean(0)                  # (3, 3)
    assert (frequency - logp.exp()).abs().max() < 0.02
    confidence = logp.expand(20_000, 3, 3).gather(-1, path.drawn[:, 0, :, None]).squeeze(-1)
    kept = (path.revealed_at == 0).int().argmax(1)                              # (20000,)
    assert torch.equal((confidence + path.noise[:, 0]).argmax(1), kept)
    share = (confidence.argmax(1) != kept).float().mean()
    assert 0.1 < share < 0.9


def test_noise_is_gumbel_and_its_temperature_compounds():
    """Temperature 2 falls to 1.5, .75, .1875, 0. Gumbel: mean .577, std pi / sqrt 6. Seeded."""
    one = sample(TablePolicy(4), 50_000, 4, seed=0, temperature=2)
    again = sample(TablePolicy(4), 50_000, 4, seed=0, temperature=2)
    other = sample(TablePolicy(4), 50_000, 4, seed=1, temperature=2)
    for t, temperature in enumerate([1.5, 0.75, 0.1875, 0.0]):
        noise = one.noise[:, t]
        assert noise.mean().item() == pytest.approx(0.5772 * temperature, abs=0.02)
        assert noise.std().item() == pytest.approx(math.pi / 6 ** 0.5 * temperature, abs=0.02)
    assert same(one, again) and not torch.equal(one.tokens, other.tokens)


def test_gumbel_noise_is_finite_at_both_ends(monkeypatch):
    """An exponential can be 0. Its log is clamped, but that of 1e-12 is not."""
    def ends(self, generator):
        return self.copy_(torch.tensor([0.0, 1e-12, 0.5, math.inf]))

    monkeypatch.setattr(torch.Tensor, "exponential_", ends)
    noise = M.gumbel((4,), None, "cpu")
    assert noise.isfinite().all() and noise[1].item() == pytest.approx(27.631, abs=1e-3)


def test_guidance_is_one_plus_w_conditional_minus_w_unconditional_in_float32():
    """From bf16 logits: a policy with these logits in float64 samples the same."""
    conditional = TablePolicy(36, 64, seed=1)
    empty = TablePolicy(36, 64, seed=2)

    def both(prompt_ids, tokens):
        if prompt_ids[0, 0] < 0:
            return empty(None, tokens).bfloat16()
        return conditional(None, tokens).bfloat16()

    def guided(prompt_ids, tokens):             # what guidance should make of the two
        one = conditional(None, tokens).bfloat16().double()
        two = empty(None, tokens).bfloat16().double()
        return (1 + w) * one - w * two

    for function in (both, guided):
        function.num_tokens = 36
        function.codebook_size = 64
    for w in (0.5, 5.0):
        path = sample(both, 50, guidance=w, null_ids=torch.full((50, 1), -1))
        assert path.noise.dtype == torch.float32 and same(path, sample(guided, 50))


@pytest.mark.parametrize("value, fails", [(math.nan, True), (math.inf, True), (-math.inf, False)])
def test_logits_that_are_not_finite_are_an_error_and_not_code_0(value, fails):
    """One of 8 x 6 x 5 logits; -inf is allowed, since a model may exclude codes."""
    table = TablePolicy()
    table.own[2, 3] = value
    if fails:
        with pytest.raises(FloatingPointError, match="step 0"):
            sample(table)
    else:
        assert (sample(table).tokens[:, 2] != 3).all()


def test_logits_are_freed_before_the_next_forward_pass():
    """With Show-o they are the largest tensors of a rollout."""
    table = TablePolicy()
    seen = []

    def watched(prompt_ids, tokens):
        assert all(reference() is None for reference in seen)
        logits = table(prompt_ids, tokens)
        seen.append(weakref.ref(logits))
        return logits

    watched.num_tokens = 6
    watched.codebook_size = 5
    sample(watched)
    assert len(seen) == 4


# ---- 2. The probability of a step ----------------------------------------------------------------

# The example in the comment of section 2: left and right, codes a and b, log 1.5 of noise right
EXAMPLE = torch.tensor([[[0.7, 0.3], [0.6, 0.4]]]).log()                        # (1, 2, 2)
LIFT_RIGHT = torch.tensor([[0.0, math.log(1.5)]])                               # (1, 2)
A = 0
B = 1
MASK = -1


def next_states(logits, n, noise=None):
    """The sampler by brute force: next state (MASK is -1) -> probability

    It is plain Python without a word of Eq. 14: go through all draws, rank them, keep the n best.
    """
    p = logits.softmax(-1).tolist()
    N, K = logits.shape
    outcome = collections.Counter()
    for draw in itertools.product(range(K), repeat=N):
        confidence = []
        chance = 1.0
        for j, code in enumerate(draw):
            confidence.append(math.log(p[j][code]))
            chance *= p[j][code]
            if noise is not None:
                confidence[j] += noise[j].item()
        best = sorted(range(N), key=confidence.__getitem__, reverse=True)[:n]
        state = [MASK] * N
        for j in best:
            state[j] = draw[j]
        outcome[tuple(state)] += chance
    return outcome


def log_probability(logits, states, transition, noise=None, drawn=None):
    """transition_logprob of reaching each state (MASK is -1) from an all-masked one: (S,)"""
    states = torch.tensor(states)                                               # (S, N)
    logits = logits.expand(len(states), *logits.shape[-2:])                     # (S, N, K)
    if noise is not None:
        noise = noise.expand(len(states), -1)                                   # (S, N)
    return M.transition_logprob(logits, states.clamp(min=0), (states < 0).long(), 0, transition,
                                noise, drawn)


@pytest.mark.parametrize("transition, noise, expected", [
    ("p1", None, [.70, .18, .12, 0]), ("p1", LIFT_RIGHT, [.28, .60, .12, 0]),
    ("p1_literal", LIFT_RIGHT, [.70, .18, .12, 0]), ("p2", LIFT_RIGHT, [.7, .6, .4, .3])])
def test_the_example_in_the_text(transition, noise, expected):
    """The columns of its table."""
    states = [(A, MASK), (MASK, A), (MASK, B), (B, MASK)]
    got = log_probability(EXAMPLE, states, transition, noise).exp()
    assert got.tolist() == pytest.approx(expected, abs=1e-6)


def test_what_was_revealed_earlier_does_not_count():
    """Position 0 was revealed in step 0, with a chance of .01; step 1 is that of the example, where
    `ar` counts the discarded draw, too. An unknown definition is refused."""
    first = torch.tensor([[[0.01, 0.99]]]).log()
    logits = torch.cat([first, EXAMPLE], dim=1)                                 # (1, 3, 2)
    codes = torch.tensor([[A, A, B]])
    revealed_at = torch.tensor([[0, 1, 2]])
    for name, expected in (("ar", .7 * .4), ("p1", .7), ("p2", .7)):
        logp = M.transition_logprob(logits, codes, revealed_at, 1, name, None, codes)
        assert logp.exp().item() == pytest.approx(expected)
    with pytest.raises(AssertionError, match="p3"):
        M.transition_logprob(logits, codes, revealed_at, 1, "p3")


def test_rao_blackwell_in_the_example():
    """Given [a, MASK] without noise: the gradients with respect to the right logits."""
    logits = EXAMPLE.clone().requires_grad_()
    for name, code, expected in (("ar", A, [.4, -.4]), ("ar", B, [-.6, .6]), ("p1", A, [0, 0])):
        drawn = torch.tensor([[A, code]])
        logp = log_probability(logits, [(A, MASK)], name, None, drawn)
        gradient, = torch.autograd.grad(logp.sum(), logits)                     # (1, 2, 2)
        assert gradient[0, 1].tolist() == pytest.approx(expected, abs=1e-6)


def test_grad_log_p_has_mean_0_for_p1_and_not_for_p2():
    """Over the next states of the example without noise; p2's is .7 * (.3, -.3) on the left. With
    the rewards of the text and their mean as the baseline, p2 gives .05 there, and p1 .17."""
    states = next_states(EXAMPLE[0], 1)
    logits = EXAMPLE.clone().requires_grad_()
    chances = torch.tensor(list(states.values()))
    rewards = torch.tensor([{(A, MASK): 1, (MASK, A): .3, (MASK, B): 0}[state] for state in states])
    centred = rewards - (chances * rewards).sum()
    for name, mean, learned in (("p1", [0, 0], .172), ("p2", [.21, -.21], .052)):
        logp = log_probability(logits, list(states), name)
        gradient, = torch.autograd.grad((chances * logp).sum(), logits, retain_graph=True)
        assert gradient[0, 0].tolist() == pytest.approx(mean, abs=1e-6)
        gradient, = torch.autograd.grad((chances * centred * logp).sum(), logits)
        assert gradient[0, 0, A].item() == pytest.approx(learned, abs=1e-3)


@pytest.mark.parametrize("scale, expected, given_the_noise", [
    (0.05, [.242, -.082], [.168, .016]), (2.62, [.128, .037], [.108, .030])])
def test_the_ranking_has_a_gradient_that_p1_leaves_out(scale, expected, given_the_noise):
    """[a, MASK] is worth 1, [MASK, a] .3. The difference of two Gumbel noises is logistic, so the
    left wins with a sigmoid of the difference in confidence. p1 holds the ranking fixed."""
    for moving, gradient in ((True, expected), (False, given_the_noise)):
        left = EXAMPLE[0, 0].double().requires_grad_()
        right = EXAMPLE[0, 1].double().requires_grad_()
        logp_left = left.log_softmax(0)
        logp_right = right.log_softmax(0)
        value = 0
        for y, x in itertools.product((A, B), repeat=2):
            wins = torch.sigmoid((logp_left[y] - logp_right[x]) / scale)
            if not moving:
                wins = wins.detach()
            reward = 1.0 * (y == A) * wins + 0.3 * (x == A) * (1 - wins)
            value = value + (logp_left[y] + logp_right[x]).exp() * reward
        got = torch.autograd.grad(value, (left, right))
        assert [got[0][A].item(), got[1][A].item()] == pytest.approx(gradient, abs=6e-4)

    # p1's own, over many noises and the draws of each
    noises = scale * M.gumbel((20_000, 2), seeded(0), "cpu")                    # (S, 2)
    logits = EXAMPLE.expand(20_000, 2, 2).clone().requires_grad_()
    drawn = EXAMPLE.exp()[0].multinomial(20_000, replacement=True, generator=seeded(1)).T   # (S, 2)
    confidence = EXAMPLE[0].gather(1, drawn.T).T + noises                       # (S, 2)
    revealed_at = (confidence < confidence.amax(1, keepdim=True)).long()        # (S, 2)
    worth = torch.tensor([1.0, 0.3]) * (drawn == A) * (revealed_at == 0)        # (S, 2)
    logp = M.transition_logprob(logits, drawn, revealed_at, 0, "p1", noises)    # (S,)
    gradient, = torch.autograd.grad((worth.sum(1) * logp).mean(), logits)
    assert gradient.sum(0)[:, A].tolist() == pytest.approx(given_the_noise, abs=0.01)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_p1_given_the_noise_is_the_frequency_of_the_step(n, seed):
    """Hold the noise, or have none; go through all 81 draws. p2 sums to above 1, and with noise the
    literal formula is far off somewhere."""
    generator = seeded(seed)
    logits = torch.randn(4, 3, generator=generator)
    noise = torch.randn(4, generator=generator)
    for held in (None, noise):
        truth = next_states(logits, n, held)
        states = list(truth)
        frequency = torch.tensor(list(truth.values()))
        p1 = log_probability(logits, states, "p1", held).exp()
        p2 = log_probability(logits, states, "p2", held).exp()
        literal = log_probability(logits, states, "p1_literal", held).exp()
        assert torch.allclose(p1, frequency, atol=1e-6) and p2.sum() > 1.01
        is_off = (literal - frequency).abs().max() > 0.02
        assert is_off == (held is not None)


@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_of_p1_is_the_mean_of_that_of_ar(seed):
    """Rao-Blackwell: over all draws that leave one picture behind, ar differs from p1 by chance."""
    generator = seeded(seed)
    logits = torch.randn(3, 3, generator=generator).double().repeat(27, 1, 1).requires_grad_()
    noise = torch.randn(3, generator=generator).double().expand(27, 3)
    codes = torch.arange(3)
    drawn = torch.cartesian_prod(codes, codes, codes)                           # (27, 3)
    logp = logits.detach().log_softmax(-1).gather(2, drawn[..., None])[..., 0]  # (27, 3)
    noisy = logp + noise                                                        # (27, 3)
    step = (noisy < noisy.amax(1, keepdim=True)).long()                         # keep the surest
    left = drawn.where(step == 0, 3)                                            # (27, 3)
    state = left.unique(dim=0, return_inverse=True)[1]                          # (27,) its number
    gradients = {}
    for name in ("ar", "p1"):
        total = M.transition_logprob(logits, drawn, step, 0, name, noise, drawn).sum()
        gradients[name] = torch.autograd.grad(total, logits)[0].flatten(1)      # (27, 9)
    chance = logp.sum(1).exp()[:, None]                                         # (27, 1)
    for number in range(int(state.max()) + 1):
        alike = state == number
        mean = (gradients["ar"][alike] * chance[alike]).sum(0) / chance[alike].sum()
        assert torch.allclose(mean, gradients["p1"][alike][0], atol=1e-10)
    size = {name: (chance * x.pow(2)).sum() for name, x in gradients.items()}
    assert size["ar"] > 1.2 * size["p1"]


def test_what_was_sampled_is_possible_under_p1_but_not_always_as_printed():
    """The inner sum of the literal formula can be empty, which shows as its floor."""
    table = TablePolicy(N=12, K=4, scale=2.0)
    path = sample(table, 200, 6)
    b, t = torch.cartesian_prod(torch.arange(200), torch.arange(6)).unbind(1)
    p1 = M.replay_logprob(table, path.tokens, path, b, t, "p1")
    literal = M.replay_logprob(table, path.tokens, path, b, t, "p1_literal")
    assert p1.min() > M.FLOOR / 2 and literal.min() < M.FLOOR / 2
    assert literal.isfinite().all()


@pytest.mark.parametrize("transition", M.TRANSITIONS)
def test_extreme_logits_leave_value_and_gradient_finite(transition):
    """In bf16, up to 3000, and -inf (a user's top-k) at all three kinds of positions."""
    logits = (torch.randn(2, 6, 5, generator=seeded(0)) * 1000).bfloat16()
    step = torch.arange(6).expand(2, 6) % 3
    tokens = torch.full((2, 6), 4)
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
    ([[1, 2, 3], [10, 10, 16]], False, [[-1, 0, 1], [-2, -2, 4]])])         # Dr. GRPO
def test_advantage_by_hand(rewards, divide, expected):
    """Mean 2 and std 1 for [1, 2, 3]; mean 12 and std sqrt 12 for [10, 10, 16]."""
    got = M.group_advantage(torch.tensor(rewards, dtype=torch.float32), divide)
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float32), atol=1e-3)


def test_equal_rewards_have_an_advantage_of_exactly_0():
    """Six times 5.37 have a mean that differs from 5.37 in float32. The std is 0, too, so that the
    filter sees the group. A large offset changes nothing."""
    equal = torch.full((1, 6), 5.37)
    assert (equal - equal.mean()).abs().max() > 0 and (M.group_advantage(equal) == 0).all()
    assert M.group_std(equal).item() == 0
    assert M.group_advantage(torch.tensor([[0.0, 1e-6]])).abs().max() < 0.01    # rounding errors
    offset = torch.tensor([[1000.25, 1000.5, 1000.0]])
    assert torch.equal(M.group_advantage(offset), M.group_advantage(offset - 1000))


@pytest.mark.parametrize("history, quantile, std, expected", [
    ([5] * 9 + [*range(1, 92)], 0.1, [0, 0.5, 50], [False, False, True]),   # the 10th percentile: 5
    ([0] * 50, 0.1, [0, 0.5], [False, True]),               # nothing is below 0, but 0 vanishes
    ([1.0] * 31, 0.1, [0.1, 0.0], [True, True]),            # too short a history
    ([1.0] * 32, 0.1, [0.1, 0.0], [False, False]),          # long enough
    ([100] * 40 + [1] * 512, 0.95, [1.0], [True]),          # hundreds are forgotten, 1 is not below
    ([100] * 40 + [1] * 472, 0.95, [1.0], [False]),         # but not before
    ([5.0] * 50, 0.0, [0, 1], [True, True])])               # switched off
def test_the_filter_by_hand(history, quantile, std, expected):
    """Which groups are kept after a history of stds."""
    sample_filter = M.SampleFilter(quantile)
    for value in history:
        sample_filter.keep(torch.tensor([float(value)]))
    assert sample_filter.keep(torch.tensor(std)).tolist() == expected


# ---- 4. The loss ---------------------------------------------------------------------------------


def test_loss_is_zero_but_gradient_is_not():
    """A frequent question on GRPO. At ratio 1 the loss is -mean(A) = 0; its gradient is -A / M."""
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
    loss, details = M.grpo_loss(logp, torch.zeros(1), torch.tensor([float(advantage)]), 0.1, 0.2)
    loss.sum().backward()
    assert (logp.grad.abs().item() > 0) == flows and details["clip"].item() == (not flows)
    assert details["ratio"].item() == pytest.approx(ratio)


def test_the_minimum_is_taken_per_picture_and_step():
    """Ratios 2 and .5, A = 1: (1.2 + .5) / 2 = .85; the minimum of the means is 1.05."""
    loss, _ = M.grpo_loss(torch.tensor([2.0, 0.5]).log(), torch.zeros(2), torch.ones(2), 0.1, 0.2)
    assert loss.tolist() == pytest.approx([-1.2, -0.5])


def test_k3_is_zero_at_equality_and_a_kl_elsewhere():
    """Its mean under p is KL(p || q) = sum p log p/q, and its gradient is real."""
    p = torch.tensor([0.5, 0.3, 0.2])
    q = torch.tensor([0.2, 0.2, 0.6])
    assert (M.kl_k3(p.log(), p.log()) == 0).all()
    kl = (p * (p / q).log()).sum().item()
    assert (p * M.kl_k3(p.log(), q.log())).sum().item() == pytest.approx(kl, rel=1e-5)
    logp = p.log().requires_grad_()
    assert torch.autograd.grad(M.kl_k3(logp, q.log()).sum(), logp)[0].abs().min() > 0
    assert torch.autograd.grad(M.kl_k3(logp, p.log()).sum(), logp)[0].abs().max() < 1e-6


def test_the_gradient_of_k3_is_that_of_the_other_direction():
    """With respect to the logits of p, with its samples held fixed: grad KL(q || p) = p - q."""
    logits = torch.tensor([0.3, -0.2, 1.0], requires_grad=True)
    logp = logits.log_softmax(0)
    q = torch.tensor([0.2, 0.5, 0.3])
    mean = (logp.exp().detach() * M.kl_k3(logp, q.log())).sum()
    gradient, = torch.autograd.grad(mean, logits)
    assert torch.allclose(gradient, logp.exp() - q, atol=1e-6)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [120.0, 79.0, -79.0, -120.0])
def test_two_impossible_factors_do_not_overflow_the_loss(advantage, log_ratio):
    """exp(120) is infinite in float32: loss and penalty are finite, and so are their gradients.
    The penalty of an impossible step is no larger than that of a certain one."""
    logp = torch.tensor([log_ratio], requires_grad=True)
    loss, details = M.grpo_loss(logp, torch.zeros(1), torch.tensor([advantage]), 0.1, 0.2)
    kl = M.kl_k3(logp, torch.zeros(1))
    for value in (loss.sum(), kl.sum()):
        assert value.isfinite()
        assert torch.autograd.grad(value, logp)[0].pow(2).isfinite().all()
    assert 70 < kl.item() < 150 and details["ratio"].isfinite().all()


# ---- 5. One update -------------------------------------------------------------------------------


@pytest.fixture
def batch(policy):
    """Four pictures of two captions, and an advantage of each"""
    prompts = ["a star", "two circles"] * 2
    path = M.rollout(policy, policy.encode(prompts), 4, generator=seeded(0))
    return M.Groups(prompts, path, None, None), torch.tensor([1.0, -1.0, 0.5, -0.5])


def still(policy):
    """An optimizer that changes nothing"""
    return torch.optim.SGD(policy.parameters(), lr=0.0)


def gradient(policy, config, batch, reference=None):
    """What learn() leaves in .grad, as one vector, and its log"""
    policy.zero_grad()
    log = M.learn(policy, reference, still(policy), *batch, config, seeded(0))
    grads = [p.grad.flatten() for p in policy.parameters() if p.grad is not None]
    policy.zero_grad()
    return torch.cat(grads), log


def worthless(images, prompts):
    """A reward that is 0 for every picture"""
    return [0] * len(images)


def test_vanished_groups_are_replaced_and_the_tries_are_bounded(policy):
    """Every second group gets equal rewards: 4 are sampled, then 2, then 1. Or all of them do."""
    sample_filter = M.SampleFilter(0.1, at_least=0)
    sample_filter.history.extend([0.0, 0.5])
    calls = []
    texts = set()

    def half_vanish(images, prompts):
        calls.append(len(prompts) // 4)
        texts.update(prompts)
        picture = torch.arange(len(prompts))
        is_live = picture // 4 % 2 == 0
        return is_live * (picture % 2).float()

    config = tiny(groups=4, filter_tries=3)
    captions = EVERY_CAPTION[-2:]
    for reward_fn, kept, sampled in ((half_vanish, 4, 7), (worthless, 0, 16)):
        got = M.sample_groups(policy, reward_fn, captions, sample_filter, config, seeded(1))
        assert len(got.rewards) == kept and len(got.all_rewards) == sampled
        assert len(got.prompts) == len(got.trajectory.noise) == 4 * kept
    assert calls == [4, 2, 1] and texts == set(captions)


def test_the_filter_sees_that_rounded_rewards_are_equal(policy):
    """5.37 for each picture: the group has vanished, although its mean is rounded."""
    sample_filter = M.SampleFilter(0.1, at_least=0)
    sample_filter.history.extend([0.0] * 99)

    def constant(images, prompts):
        return torch.full((len(images),), 5.37)

    config = tiny(group_size=6, filter_tries=0)
    got = M.sample_groups(policy, constant, EVERY_CAPTION, sample_filter, config, seeded(0))
    assert got.prompts == []


def test_prompts_pictures_and_rewards_of_kept_groups_belong_together(policy, monkeypatch):
    """Two of three groups are dropped and replaced. All is compared with what the sampler gave."""
    answers = iter([[False, True, False], [True, True]])

    class Sieve:
        """A filter with given answers"""

        def keep(self, std):
            return torch.tensor(next(answers))

    weights = np.random.default_rng(0).random((48, 48, 3))

    def own(images, prompts):                   # tells every picture and every caption apart
        values = []
        for image, text in zip(images, prompts):
            values.append((np.asarray(image) * weights).mean() + 1000 * EVERY_CAPTION.index(text))
        return torch.tensor(values)

    calls = record(monkeypatch, M, "sample")
    got = M.sample_groups(policy, own, EVERY_CAPTION, Sieve(), tiny(groups=3), seeded(0))
    again = R.rate(own, policy.decode(got.trajectory.tokens), got.prompts)
    assert torch.equal(again.view(3, 4), got.rewards) and len(again.unique()) == 12
    assert torch.equal(got.rewards, got.all_rewards[[1, 3, 4]])
    assert len(got.all_rewards) == 5
    for i in (0, 4, 8):
        assert len(set(got.prompts[i:i + 4])) == 1
    first, second = [result for _, result in calls]
    assert same(got.trajectory, M.concatenate([M.select(first, torch.arange(4, 8)), second]))


def test_rollout_batches_are_parts_of_one_rollout(policy, monkeypatch):
    """5 pictures, 2 at a time, in order; the empty prompt beside each, and only with guidance."""
    prompts = ["a star", "two circles", "a star", "a red star", "a star and a circle"]
    calls = record(monkeypatch, M, "rollout")
    path = M.sample(policy, prompts, tiny(rollout_batch=2), 4, seeded(0), 1.0)
    assert [len(arguments[1]) for arguments, _ in calls] == [2, 2, 1]
    assert torch.equal(torch.cat([arguments[1] for arguments, _ in calls]), policy.encode(prompts))
    null_ids = torch.cat([arguments[5] for arguments, _ in calls])
    assert torch.equal(null_ids, policy.encode([""] * 5))
    assert torch.equal(path.tokens, torch.cat([result.tokens for _, result in calls]))
    assert torch.equal(path.noise, torch.cat([result.noise for _, result in calls]))
    encoded = record(monkeypatch, policy, "encode")
    M.sample(policy, prompts, tiny(), 4, seeded(0))
    assert [arguments for arguments, _ in encoded] == [(prompts,)]


def test_random_steps_differ_between_pictures_and_updates():
    """Two of five steps: never one twice, every pair equally often."""
    config = tiny(score_steps=2)
    generator = seeded(0)
    first = M.choose_steps(1000, 5, config, generator)                          # (2000, 2)
    second = M.choose_steps(1000, 5, config, generator)                         # (2000, 2)
    assert not torch.equal(first, second)
    assert torch.equal(first, M.choose_steps(1000, 5, config, seeded(0)))
    twice = torch.arange(1000).repeat_interleave(2).tolist()
    for pairs in (first, second):
        assert pairs[:, 0].tolist() == twice
    steps = torch.cat([first, second])[:, 1].view(-1, 2)                        # (2000, 2)
    counts = collections.Counter(tuple(pair) for pair in steps.tolist())
    assert set(counts) == set(itertools.combinations(range(5), 2))
    for n in counts.values():
        assert abs(n - 200) < 5 * (200 * 0.9) ** 0.5


@pytest.mark.parametrize("transition", M.TRANSITIONS)
def test_ratio_is_one_before_the_first_update_for_every_step(transition):
    """In other batches, in any order and with gradients, the learner finds what the sampler did."""
    policy = shapes()
    seen = []

    def remember(module, inputs, logits):
        seen.append(logits)

    policy.register_forward_hook(remember)
    ids = policy.encode(["a red star", "two circles"] * 2)
    path = M.rollout(policy, ids, 4, generator=seeded(0))
    old = []
    for t, logits in enumerate(seen):
        old.append(M.transition_logprob(logits, path.tokens, path.revealed_at, t, transition,
                                        path.noise[:, t], path.drawn[:, t]))    # (B,)
    pairs = M.choose_steps(4, 4, tiny(), seeded(0)).flip(0)                     # (16, 2)
    for chunk in pairs.split(3):
        b, t = chunk.unbind(1)
        logp = M.replay_logprob(policy, ids, path, b, t, transition)
        assert logp.requires_grad and (logp - torch.stack(old)[t, b]).abs().max() < 1e-4


@pytest.mark.parametrize("transition, beta, k, reduction, size", [
    ("p1", 0, 0, "random", 1), ("p1", 0, 0, "random", 999), ("p2", 0.7, 0, "random", 5),
    ("p2", 0.7, 2, "first", 3), ("ar", 0, 1, "last", 3), ("p1_literal", 0, 0, "first", 7)])
def test_the_gradient_at_ratio_one_is_the_one_derived_by_hand(policy, batch, transition, beta, k,
                                                              reduction, size):
    """Eq. 10, with one group kept of two asked for: each pair weighs 1 / (2 * 4 * steps used)."""
    config = tiny(transition=transition, beta=beta, max_grad_norm=1e9, micro_batch=size,
                  score_steps=k, reduction=reduction)
    groups, advantage = batch
    reference = shapes(seed=5)
    ids = policy.encode(groups.prompts)
    pictures = torch.arange(4)
    used = {"random": range(4), "first": range(k or 4), "last": range(4 - (k or 4), 4)}[reduction]
    total = 0
    kls = []
    for t in used:
        step = torch.full((4,), t)
        now = M.replay_logprob(policy, ids, groups.trajectory, pictures, step, transition)
        was = M.replay_logprob(reference, ids, groups.trajectory, pictures, step, transition)
        difference = was.detach() - now                                         # (4,)
        kls.append(difference.exp() - 1 - difference)
        total = total + (beta * kls[-1] - advantage * now).sum() / (2 * 4 * len(used))
    parts = torch.autograd.grad(total, list(policy.parameters()), allow_unused=True)
    by_hand = torch.cat([part.flatten() for part in parts if part is not None])
    if beta == 0:
        reference = None
    got, log = gradient(policy, config, batch, reference)
    assert torch.allclose(got, by_hand, rtol=1e-3, atol=1e-5 * by_hand.abs().max().item())
    assert by_hand.abs().max() > 1e-3
    assert log["grad"] == pytest.approx(by_hand.norm().item(), rel=1e-3)
    kl = 0
    if beta > 0:
        kl = torch.stack(kls).mean().item()
    loss = (beta * kl - advantage.mean().item()) / 2
    assert log["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-6)
    assert log["kl"] == pytest.approx(kl, rel=1e-3) and log["ratio"] == pytest.approx(1)


def test_the_gradient_is_clipped_to_its_largest_norm(policy, batch):
    """To .01; the norm in the log is that before."""
    whole, log = gradient(policy, tiny(max_grad_norm=1e9), batch)
    clipped, again = gradient(policy, tiny(max_grad_norm=0.01), batch)
    assert clipped.norm().item() == pytest.approx(0.01, rel=0.01)
    assert torch.allclose(clipped / clipped.norm(), whole / whole.norm(), atol=1e-5)
    assert again["grad"] == pytest.approx(log["grad"]) and log["grad"] > 0.02


def test_the_ratio_moves_away_from_one_in_later_epochs_and_clipping_acts(batch):
    """Against a detached copy of itself a log-probability always has ratio 1."""
    fresh = shapes()
    config = tiny(inner_epochs=2, groups=1, micro_batch=3)
    log = M.learn(fresh, None, torch.optim.SGD(fresh.parameters(), 1.0), *batch, config, seeded(0))
    assert abs(log["ratio"] - 1) > 1e-3 and log["clip"] > 0
    groups, advantage = batch
    for low, high in ((0.0, 1e9), (1e9, 0.0)):                  # good pictures: above only
        config = tiny(inner_epochs=2, clip_low=low, clip_high=high)
        log = M.learn(fresh, None, torch.optim.SGD(fresh.parameters(), 1.0), groups,
                      advantage.abs(), config, seeded(0))
        assert (log["clip"] > 0) == (high == 0.0)


def test_inner_epochs_have_a_step_between_them_and_none_after_the_last(batch, monkeypatch):
    """With three: two steps, and a gradient that waits for the third. It is that of the last epoch
    alone, and so are the numbers of the log. All epochs share their random pairs."""
    fresh = shapes()
    config = tiny(inner_epochs=3, score_steps=2, micro_batch=999)
    optimizer = torch.optim.SGD(fresh.parameters(), lr=1e-2)
    steps = record(monkeypatch, optimizer, "step")
    choices = record(monkeypatch, M, "choose_steps")
    losses = record(monkeypatch, M, "grpo_loss")
    log = M.learn(fresh, None, optimizer, *batch, config, seeded(0))
    assert len(steps) == 2 and len(choices) == 1 and len(losses) == 3
    _, details = losses[2][1]
    assert log["ratio"] == pytest.approx(details["ratio"].mean().item())
    assert log["ratio"] != pytest.approx(1, abs=1e-4)
    once, _ = gradient(shapes(), tiny(max_grad_norm=1e9), batch)
    thrice, _ = gradient(shapes(), tiny(max_grad_norm=1e9, inner_epochs=3), batch)  # at a rate of 0
    assert torch.allclose(once, thrice)


@pytest.mark.parametrize("what", ["loss", "grad"])
def test_a_number_that_is_not_finite_stops_before_the_weights_move(batch, what):
    """A NaN in the loss whose gradients are 0, and a finite loss whose gradient is infinite."""
    fresh = shapes()
    groups, advantage = batch
    value = 0.0
    if what == "loss":
        advantage = advantage * math.nan
    else:
        value = math.inf

    def replace(grad):
        return torch.full_like(grad, value)

    for p in fresh.parameters():
        p.register_hook(replace)
    before = [x.clone() for x in fresh.state_dict().values()]
    with pytest.raises(FloatingPointError, match="(nan|inf).*--lr in a new run"):
        M.learn(fresh, None, torch.optim.SGD(fresh.parameters(), 1.0), groups, advantage, tiny(),
                seeded(0))
    assert same(before, fresh.state_dict().values())


# ---- 6. The training loop ------------------------------------------------------------------------


def red(images, prompts):
    """A reward that any policy can raise: the share of red pixels"""
    pixels = np.stack([np.asarray(image) for image in images]).astype(int)      # (B, H, W, 3)
    is_red = pixels[..., 0] - pixels[..., 2] > 100                              # (B, H, W)
    return torch.tensor(is_red.mean((1, 2)), dtype=torch.float32)


def small_decoder():
    """MAGVIT-v2's decoder with a width of 32"""
    return Decoder(32)


save_grid = M.save_grid


def no_grid(path, captions, before, after):
    """An empty file in place of a grid, which takes a third of the time of a tiny run"""
    path.touch()


@pytest.fixture(autouse=True)
def prepared(monkeypatch, tmp_path):
    """Every test has a folder of its own, may name this reward, and writes no grids"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(R.REWARDS, "red", red)
    monkeypatch.setattr(M, "MagvitDecoder", small_decoder)
    monkeypatch.setattr(M, "save_grid", no_grid)


def flags(**settings):
    """TINY and these settings as a command line"""
    words = []
    for name, value in {**TINY, **settings}.items():
        words += [M.flag(name), str(value)]
    return words


def saved(folder):
    """The checkpoint of an output folder"""
    return torch.load(pathlib.Path(folder, "checkpoint.pt"), weights_only=True)


def read_rows(folder):
    """metrics.csv as a list of dicts"""
    return list(csv.DictReader(pathlib.Path(folder, "metrics.csv").read_text().splitlines()))


def run(folder, **settings):
    """Train at TINY settings -> checkpoint, rows of metrics.csv"""
    M.train(tiny(out=str(folder), **settings))
    return saved(folder), read_rows(folder)


def timeless(rows):
    """Rows of a log without what a clock says"""
    return [{**row, "seconds": None} for row in rows]


def red_but(action, call):
    """The red reward; before the given one of its calls it performs an action"""
    calls = itertools.count(1)

    def reward_fn(images, prompts):
        if next(calls) == call:
            action()
        return red(images, prompts)
    return reward_fn


BEFORE = 3                          # calls of the reward before update 1: two trials, an evaluation


def test_a_run_leaves_what_it_promises(tmp_path, capsys, monkeypatch):
    """Checkpoint, base, table of updates and pictures; lines of at most 100 columns in ASCII."""
    monkeypatch.setattr(M, "save_grid", save_grid)
    replaced = record(monkeypatch, M, "replacing")
    _, rows = run(tmp_path, eval_every=1)
    assert {arguments[0].name for arguments, _ in replaced} == {
        "base-0-16-1-2-0.0.pt", "checkpoint.pt", "metrics.csv"}
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert left == ["base-0-16-1-2-0.0.pt", "checkpoint.pt", "comparison.png", "metrics.csv",
                    "samples/update_00001.png", "samples/update_00002.png"]
    assert [int(row["update"]) for row in rows] == [1, 2] and tuple(rows[0]) == M.COLUMNS
    out, err = capsys.readouterr()              # err: no progress bars, as there is no terminal
    assert err == "" and out.isascii()
    lines = out.splitlines()
    assert max(len(line) for line in lines) <= 100 and lines[0] == "device cpu, 1 threads"
    assert lines[1] == f"{len(EVERY_CAPTION)} captions, such as {R.captions(False)['single'][0]!r}"
    starts = [re.split(r" \|| \.", line)[0] for line in lines[2:]]
    base = ["base training", "base held-out"]
    last = ["update 2 training", "update 2 held-out"]
    assert starts == [*base, "update   1/2", "update 1 training", "update 1 held-out",
                      "update   2/2", *last, *base, *last]


def test_training_draws_all_training_captions_and_no_others(tmp_path, monkeypatch):
    """All training captions and no other, every category equally often, without guidance."""
    groups = record(monkeypatch, M, "sample_groups")
    rollouts = record(monkeypatch, M, "rollout")
    run(tmp_path, guidance=2.5, eval_steps=3)
    assert len(groups) == 2
    trained = R.captions(False)
    every = set()
    for texts in trained.values():
        every.update(texts)
    for arguments, _ in groups:
        assert arguments[1] is R.shapes_reward
        captions = arguments[2]
        assert set(captions) == every
        for texts in trained.values():
            drawn = sum(captions.count(text) for text in texts)
            assert drawn == max(len(texts) for texts in trained.values())
    settings = [arguments[2:5] for arguments, _ in rollouts if len(arguments) > 3]
    assert set(settings) == {(1, 3.0, 2.5), (3, 3.0, 2.5), (4, 3.0, 0.0)}   # trial, evaluation, ...
    assert settings[-1] == (3, 3.0, 2.5)


def test_a_row_says_what_was_sampled_and_what_was_kept():
    """Mean and standard error of all groups, live ones of those kept, by hand. One has no error."""
    kept = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    every = torch.cat([kept, torch.zeros(2, 4)])                # the means of groups: .75 .5 0 0
    row = M.summary(M.Groups([], None, kept, every))
    assert row["reward_se"] == pytest.approx(0.1875)            # std .375 / the root of 4
    assert (row["reward"], row["live"], row["sampled"]) == (0.3125, 1, 4)
    assert M.summary(M.Groups([], None, kept[:1], kept[:1]))["reward_se"] == ""


def test_a_run_of_single_groups_reports_no_error(tmp_path, capsys):
    """--groups 1: no NaN in the table, and no +- in the line."""
    _, rows = run(tmp_path, reward="red", groups=1, filter_tries=0)
    assert [row["reward_se"] for row in rows] == ["", ""]
    assert "nan" not in (tmp_path / "metrics.csv").read_text()
    assert "+-" not in capsys.readouterr().out


def test_the_row_of_an_evaluated_update_has_the_held_out_mean(tmp_path, monkeypatch):
    """Of all held-out scores: here .75, except one of 24, which is 0."""
    def made_up_evaluation(policy, measure, splits, config, update):
        scores = torch.stack([torch.full((6, 4), 0.25), torch.full((6, 4), 0.75)])
        scores[1, 0, 0] = 0.0
        pictures = torch.zeros(2, 6, 4, 8, 8, 3, dtype=torch.uint8)
        return {"update": update, "scores": scores, "pictures": pictures}

    monkeypatch.setattr(M, "evaluate", made_up_evaluation)
    _, rows = run(tmp_path, eval_every=2)
    assert rows[0]["heldout"] == ""
    assert float(rows[1]["heldout"]) == pytest.approx(0.75 - 0.75 / 24)


@pytest.mark.parametrize("settings, shown, hidden", [
    ({}, "grad", "ratio|clip|kl"), ({"beta": 0.1}, r"kl \d\.\d", "ratio"),
    ({"inner_epochs": 2}, r"ratio \d\.\d+ clip \d+%", "kl")])
def test_the_log_leaves_constants_out_and_time_left_falls(tmp_path, monkeypatch, capsys, settings,
                                                          shown, hidden):
    """By the clock of this test, each of 8 updates takes ten seconds. Evaluations do not count."""
    clock = itertools.count(0, 10)
    evaluate = M.evaluate

    def evaluate_slowly(*arguments):
        next(clock)
        return evaluate(*arguments)

    monkeypatch.setattr(M.time, "time", clock.__next__)
    monkeypatch.setattr(M, "evaluate", evaluate_slowly)
    run(tmp_path, updates=8, **settings)
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("update   ")]
    left = []
    for line in lines:
        assert re.search(shown, line) and not re.search(hidden, line)
        parts = line.split(" | ")
        assert parts[-2] == "10.0 s"
        left.append(parts[-1])
    assert left == ["left 1:10", "left 1:00", "left 0:50", "left 0:40", "left 0:30", "left 0:20",
                    "left 0:10", "left 0:00"]


def test_the_time_left_is_that_of_the_mean_update(capsys):
    """After 10 and 30 seconds, two more take 40."""
    row = {"update": 2, "reward": 0.5, "reward_se": "", "live": 1, "sampled": 1, "grad": 0.0,
           "seconds": 30.0}
    M.print_update([{**row, "seconds": 10.0}, row], tiny(updates=4))
    assert capsys.readouterr().out.endswith("| 30.0 s | left 0:40\n")


def test_training_raises_the_reward(tmp_path):
    """The slow one: from random weights to more red, on captions that it never trained on."""
    checkpoint, rows = run(tmp_path, reward="red", updates=25, groups=4, lr=3e-3, eval_pictures=8)
    before = checkpoint["state"]["base"]["scores"][1].mean()
    after = checkpoint["state"]["latest"]["scores"][1].mean()
    assert after > before + 0.1
    assert float(rows[-1]["reward"]) > float(rows[0]["reward"]) + 0.1


@pytest.mark.parametrize("reward, measure, trained, reported", [
    ("red", "", red, red), ("shapes", "", R.shapes_reward, R.shapes_correct),
    ("red", "correct", red, R.shapes_correct), ("shapes", "red", R.shapes_reward, red)])
def test_evaluation_reports_a_measure(tmp_path, monkeypatch, reward, measure, trained, reported):
    """--measure is another reward than the one trained on; for shapes the share of correct ones."""
    calls = record(monkeypatch, R, "rate")
    run(tmp_path, reward=reward, measure=measure, updates=1, filter_tries=0)
    used = [arguments[0] for arguments, _ in calls]
    assert used == [trained, reported, reported, trained, reported]     # the first two are trials


def test_a_reward_that_is_also_the_measure_is_made_once(tmp_path, monkeypatch):
    """A CLIP takes 3.7 GiB."""
    calls = record(monkeypatch, R, "load_reward")
    run(tmp_path, reward="red", updates=1)
    assert [arguments[0] for arguments, _ in calls] == ["red"]


def test_an_update_without_a_live_group_changes_nothing_and_goes_on(tmp_path, monkeypatch):
    """In updates 2 and 3 all pictures are worth the same, and the filter is warm: rows of zeros,
    and no step, not even of weight decay or of the momentum from update 1."""
    class Warm(M.SampleFilter):
        """A filter with a history"""

        def __init__(self, quantile):
            super().__init__(quantile)
            self.history.extend([1e-9] * 40)

    seen = []
    calls = itertools.count(1)

    def red_once(images, prompts):
        if next(calls) <= BEFORE + 1:
            return red(images, prompts)
        seen.append([p.detach().clone() for p in policies[0][1].parameters()])
        return worthless(images, prompts)

    policies = record(monkeypatch, M, "make_policy")
    monkeypatch.setattr(M, "SampleFilter", Warm)
    monkeypatch.setitem(R.REWARDS, "red", red_once)
    checkpoint, rows = run(tmp_path, reward="red", weight_decay=0.5, updates=3)
    assert same(seen[0], seen[-1])
    base = torch.load(tmp_path / "base-0-16-1-2-0.0.pt")
    assert not same(base.values(), checkpoint["policy"].values())
    for row in rows[1:]:
        assert (row["live"], row["sampled"], float(row["reward"])) == ("0", "6", 0.0)
        assert float(row["loss"]) == float(row["grad"]) == float(row["reward_se"]) == 0


def test_every_update_has_its_learning_rate(tmp_path):
    """Warm-up times cosine, for five updates and their base. Two more have the rates of seven."""
    rates = {}

    def remember(optimizer, arguments, keywords):
        for group in optimizer.param_groups[:1]:
            rates.setdefault(id(optimizer), []).append(group["lr"])

    def rate(i, total, peak=1e-3, warmup=2):
        return peak * min(1, (i + 1) / (warmup + 1)) * (1 + math.cos(math.pi * i / total)) / 2

    settings = {"reward": "red", "warmup": 2, "lr": 1e-3, "pretrain_steps": 20}
    hook = register_optimizer_step_pre_hook(remember)
    run(tmp_path, updates=5, **settings)
    _, rows = run(tmp_path, updates=7, resume=True, **settings)
    hook.remove()
    base = [rate(i, 20, 4e-3, 100) for i in range(20)]
    first = [rate(i, 5) for i in range(5)]
    longer = [rate(5, 7), rate(6, 7)]
    steps = []
    for used in rates.values():
        steps += used
    assert steps == pytest.approx([*base, 0, *first, 0, *longer])       # 0 allocates the state
    assert [float(row["lr"]) for row in rows] == pytest.approx([*first, *longer])


# A value of each setting that must change the outcome of a run, if the setting is not ignored ...
OTHER = {
    "reward": "shapes", "seed": 1, "width": 32, "layers": 2, "pretrain_steps": 3,
    "caption_noise": 1.0, "steps": 3, "eval_steps": 3, "temperature": 0.0, "guidance": 3.0,
    "transition": "p2", "updates": 3, "groups": 3, "group_size": 3, "divide_by_std": False,
    "inner_epochs": 2, "clip_low": 0.5, "clip_high": 0.0, "beta": 1.0, "score_steps": 1,
    "reduction": "last", "filter_quantile": 0.0, "filter_tries": 0, "lr": 1e-3, "warmup": 3,
    "optimizer": "adafactor", "weight_decay": 0.9, "max_grad_norm": 0.01, "eval_pictures": 5}
# ... and the test of each that changes none.
ELSEWHERE = {
    "out": "test_a_run_leaves_what_it_promises",
    "eval_every": "test_a_run_leaves_what_it_promises",
    "measure": "test_evaluation_reports_a_measure",
    "resume": "test_a_stop_anywhere_and_a_resume_equal_a_run_that_never_stopped",
    "device": "test_a_run_on_every_device_that_is_there",
    "micro_batch": "test_the_gradient_at_ratio_one_is_the_one_derived_by_hand",
    "rollout_batch": "test_rollout_batches_are_parts_of_one_rollout",
    "checkpointing": "test_checkpointing_computes_twice_and_changes_nothing",
    "model": "test_show_o_from_folders_end_to_end",
    "vq_model": "test_show_o_from_folders_end_to_end",
    "prompts": "test_show_o_from_folders_end_to_end",
    "weights": "test_other_weights_replace_the_base",
    "generate": "test_generating_in_genevals_layout"}
# Clipping acts in later epochs only, a KL matters in later updates, the filter after 32 groups.
OCCASION = {
    "clip_low": {"inner_epochs": 3, "lr": 3e-2},
    "clip_high": {"inner_epochs": 4, "lr": 0.1, "updates": 3},
    "reduction": {"score_steps": 1},
    "filter_quantile": {"updates": 8, "groups": 16, "group_size": 2},
    "filter_tries": {"updates": 8, "groups": 16, "group_size": 2}}


def outcome(folder, settings):
    """Final weights and evaluation of a run on the red reward, as a list of tensors"""
    checkpoint, _ = run(folder, **{"reward": "red", **settings})
    return [*checkpoint["policy"].values(), checkpoint["state"]["latest"]["scores"]]


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The outcome without a change, made once per occasion"""
    made = {}

    def of(occasion):
        name = str(occasion)
        if name not in made:
            made[name] = outcome(tmp_path_factory.mktemp("usual"), occasion)
        return made[name]
    return of


def test_every_setting_has_a_test():
    """Whoever adds a field must say what it changes."""
    assert {field.name for field in dataclasses.fields(M.Config)} == {*OTHER, *ELSEWHERE}
    for name in ELSEWHERE.values():
        assert name in globals()


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
    settings = {"reward": "red", "device": device, "beta": 0.1, "guidance": 1.0, "inner_epochs": 2}
    first, _ = run(tmp_path, **settings)
    last, rows = run(tmp_path, **settings, resume=True, updates=4)
    assert first["state"]["latest"]["scores"].isfinite().all() and len(rows) == 4
    assert not same(first["policy"].values(), last["policy"].values())


RESUMED = {"reward": "red", "updates": 4, "filter_tries": 0, "beta": 0.1, "eval_every": 2,
           "score_steps": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint and table of a run of four updates that was not stopped"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(R.REWARDS, "red", red)
        return run(tmp_path_factory.mktemp("whole"), **RESUMED)


def test_the_kl_is_measured_against_the_base(whole):
    """It is 0 before the first step, and not after it."""
    _, rows = whole
    assert abs(float(rows[0]["kl"])) < 1e-6 and float(rows[1]["kl"]) > 1e-6


def check_equal(checkpoint, rows, whole):
    """Weights, optimizer, random state, filter and log are those of the run that did not stop"""
    expected, expected_rows = whole
    assert same(checkpoint["policy"].values(), expected["policy"].values())
    for one, two in zip(checkpoint["optimizer"].values(), expected["optimizer"].values(),
                        strict=True):
        assert same(one.values(), two.values())
    assert torch.equal(checkpoint["state"]["generator"], expected["state"]["generator"])
    assert checkpoint["state"]["filter"] == expected["state"]["filter"]
    assert timeless(checkpoint["state"]["rows"]) == timeless(expected["state"]["rows"])
    assert timeless(rows) == timeless(expected_rows)
    for name in ("base", "latest"):
        assert torch.equal(checkpoint["state"][name]["scores"], expected["state"][name]["scores"])


@pytest.fixture
def stoppable():
    """Signals as in a terminal, whatever the tests were started with, such as nohup"""
    usual = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    for number in (signal.SIGTERM, signal.SIGHUP):
        usual[number] = signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in usual.items():
        signal.signal(number, handler)


# where a stop comes: a function and its owner, its call in that run, the updates that were done
PLACES = {
    "sampling": (M, "rollout", 7, 2),           # a trial without a name, two, the base, 1, 2; 3
    "learning": (M, "replay_logprob", 7, 2),    # a trial; policy and reference in 1, 2, and 3
    "step": (torch.optim.AdamW, "step", 6, 3),  # two of pretraining, the state, 1, 2, and 3
    "evaluation": (M, "evaluate", 4, 2),        # two trials, the base, after 2
    "save": (torch, "save", 3, 2)}              # of the base, after the base, after 2


@pytest.mark.parametrize("place, number", [
    *((place, signal.SIGINT) for place in PLACES),
    ("sampling", signal.SIGTERM), ("sampling", signal.SIGHUP)])
def test_a_stop_anywhere_and_a_resume_equal_a_run_that_never_stopped(place, number, stoppable,
                                                                     monkeypatch, whole):
    """The log is one row ahead of the checkpoint, as after a kill. In the middle of a step, a stop
    waits until the step has a row."""
    owner, name, call, done = PLACES[place]
    calls = itertools.count(1)
    usual_function = getattr(owner, name)

    def stopping(*arguments, **keywords):
        if next(calls) == call:
            signal.raise_signal(number)
        return usual_function(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopping)
        with pytest.raises(SystemExit, match="stopped; to continue: .* --resume"):
            M.main(flags(out="cut", **RESUMED))
    assert len(saved("cut")["state"]["rows"]) == done
    with open("cut/metrics.csv", "a") as file:
        file.write("3,0.5\n")
    M.main(["--resume", "--out", "cut"])
    check_equal(saved("cut"), read_rows("cut"), whole)
    assert sorted(os.listdir("cut")) == ["base-0-16-1-2-0.0.pt", "checkpoint.pt", "comparison.png",
                                         "metrics.csv", "samples"]


def test_a_stop_before_there_is_a_checkpoint_does_not_promise_one(stoppable, monkeypatch):
    """Ctrl-C in the trial."""
    def stop():
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setitem(R.REWARDS, "red", red_but(stop, 1))
    with pytest.raises(SystemExit, match="stopped$"):
        M.main(flags(out="out", reward="red"))
    assert not pathlib.Path("out").exists()


def test_a_second_stop_waits_for_the_save_of_the_first(stoppable, monkeypatch, whole):
    """Ctrl-C in update 4, and again while the state after update 3 is written."""
    save = torch.save

    def impatient(state, path):
        if len(state.get("state", {}).get("rows", [])) == 3:
            signal.raise_signal(signal.SIGINT)
        save(state, path)

    def stop():
        monkeypatch.setattr(torch, "save", impatient)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setitem(R.REWARDS, "red", red_but(stop, BEFORE + 5))
        with pytest.raises(SystemExit, match="stopped"):
            M.main(flags(out="cut", **RESUMED))
    assert len(saved("cut")["state"]["rows"]) == 3
    monkeypatch.setattr(torch, "save", save)
    M.main(["--resume", "--out", "cut"])
    check_equal(saved("cut"), read_rows("cut"), whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are not forked")
def test_workers_of_a_reward_are_ended_as_usual_and_save_nothing(stoppable, monkeypatch, capfd):
    """Process.terminate() ends one. Another exits by itself, and writes no checkpoint."""
    process = os.getpid()
    statuses = []
    started = multiprocessing.get_context("fork").Event()

    def work():
        started.set()
        time.sleep(60)

    def fork():
        worker = multiprocessing.get_context("fork").Process(target=work)
        worker.start()
        started.wait(10)
        worker.terminate()
        worker.join(10)
        statuses.append(worker.exitcode)
        os.remove("out/checkpoint.pt")
        child = os.fork()
        if child == 0:
            sys.exit(3)
        statuses.append(os.waitpid(child, 0)[1] >> 8)
        statuses.append(os.path.exists("out/checkpoint.pt"))

    monkeypatch.setitem(R.REWARDS, "red", red_but(fork, BEFORE + 1))
    try:
        M.main(flags(out="out", reward="red"))
    except SystemExit as stop:
        if os.getpid() != process:
            os._exit(stop.code)
        raise
    assert statuses == [-signal.SIGTERM, 3, False]
    assert "stopped" not in capfd.readouterr().err


def test_signals_are_left_as_they_were(stoppable, monkeypatch):
    """Handlers are put back, and what is ignored, as SIGHUP is under nohup, stays ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = [signal.getsignal(number) for number in M.STOPS]
    seen = []

    def look():
        seen.append(signal.getsignal(signal.SIGHUP))

    monkeypatch.setitem(R.REWARDS, "red", red_but(look, BEFORE))
    M.main(flags(out="out", reward="red"))
    assert seen == [signal.SIG_IGN]
    assert [signal.getsignal(number) for number in M.STOPS] == before


def test_a_run_in_a_thread_and_without_stdout(tmp_path, monkeypatch):
    """Python allows signal handlers in the main thread only; a service may have no stdout."""
    monkeypatch.setattr(sys, "stdout", None)
    thread = threading.Thread(target=M.main, args=[flags(out="out", reward="red")])
    thread.start()
    thread.join()
    assert len(saved("out")["state"]["rows"]) == 2


@pytest.mark.parametrize("call, done, error", [
    (0, 0, KeyError), (1, 0, KeyError), (2, 1, KeyError), (3, 2, KeyError), (2, 1, SystemExit)])
def test_a_failure_keeps_its_traceback_and_the_last_whole_update(tmp_path, monkeypatch, call, done,
                                                                 error):
    """The reward fails in the base's evaluation, in update 1 or 2, or in the last evaluation. A
    resumed run repeats a failed evaluation, even when all updates are done."""
    def bug():
        if call in (1, 2):
            assert len(read_rows("cut")) == done        # what a kill would leave
        raise error("a bug of the user's")

    settings = {"reward": "red", "filter_tries": 0}
    with monkeypatch.context() as patch:
        patch.setitem(R.REWARDS, "red", red_but(bug, BEFORE + call))
        with pytest.raises(error, match="a bug of the user's"):
            run(tmp_path / "cut", **settings)
    assert len(saved("cut")["state"]["rows"]) == done
    checkpoint, rows = run(tmp_path / "cut", resume=True, **settings)
    check_equal(checkpoint, rows, run(tmp_path / "whole", **settings))
    assert rows[-1]["heldout"] != ""


def test_a_failing_message_loses_no_update(tmp_path, monkeypatch):
    """The reader of stdout is gone in update 2, as if Ctrl-C had killed a `tee`."""
    class Pipe:
        """A stdout that nobody reads any more"""

        def write(self, text):
            return len(text)

        def flush(self):
            raise BrokenPipeError

    def close():
        monkeypatch.setattr(sys, "stdout", Pipe())

    monkeypatch.setitem(R.REWARDS, "red", red_but(close, BEFORE + 2))
    with pytest.raises(BrokenPipeError):
        M.main(flags(out="out", reward="red", updates=5, filter_tries=0))
    assert len(saved("out")["state"]["rows"]) == len(read_rows("out")) == 2


def test_divergence_leaves_the_last_sound_checkpoint(tmp_path, monkeypatch):
    """A step makes a weight NaN after update 2; the evaluation after update 1 was saved."""
    step = torch.optim.AdamW.step
    calls = itertools.count(1)

    def diverge(self, *arguments):
        step(self, *arguments)
        if next(calls) == 2 + 1 + 2:            # pretraining, the state, update 2
            for p in self.param_groups[0]["params"][:1]:
                p.data[0, 0] = math.nan

    monkeypatch.setattr(torch.optim.AdamW, "step", diverge)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        run(tmp_path, reward="red", eval_every=1, updates=3)
    assert len(saved(tmp_path)["state"]["rows"]) == 1
    for weight in saved(tmp_path)["policy"].values():
        assert weight.isfinite().all()


def test_a_finished_run_that_is_resumed_reports_the_same(tmp_path, monkeypatch, capsys):
    """Its last four lines and the last grid; grids show base and policy on held-out captions."""
    grids = record(monkeypatch, M, "save_grid")
    checkpoint, _ = run(tmp_path, reward="red", lr=0.1, eval_every=1)
    lines = capsys.readouterr().out.splitlines()[-4:]
    M.main(["--resume", "--out", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[2:] == lines
    names = [arguments[0].name for arguments, _ in grids]
    assert names == ["update_00001.png", "update_00002.png", "comparison.png", "comparison.png"]
    state = checkpoint["state"]
    for arguments, _ in grids[1:]:
        assert arguments[1] == R.captions(True)
        assert torch.equal(arguments[2]["pictures"], state["base"]["pictures"])
        assert torch.equal(arguments[3]["pictures"], state["latest"]["pictures"])
    assert not torch.equal(state["base"]["scores"], state["latest"]["scores"])


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    """Half of it has been written when the end comes; the name of that half is always the same."""
    path = tmp_path / "file"
    path.write_text("old")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), M.replacing(path) as partial:
            partial.write_text("ha")
            raise KeyboardInterrupt
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    with M.replacing(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_resumed_run_keeps_no_second_copy_of_its_checkpoint(tmp_path, monkeypatch):
    """In update 3, the tensors of a weight's size are the weight and its two moments."""
    run(tmp_path, reward="red")
    size = saved(tmp_path)["policy"]["showo.model.embed_tokens.place"].shape
    found = []

    def count():
        gc.collect()
        tensors = [x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
        found.append(sum(x.shape == size for x in tensors))

    count()                                     # those of other tests
    monkeypatch.setitem(R.REWARDS, "red", red_but(count, 2 + 1))
    run(tmp_path, reward="red", updates=3, resume=True)
    assert found[1] == found[0] + 3


def test_a_reward_cannot_change_the_run(tmp_path, monkeypatch, usual):
    """It empties its arguments, disables gradients, moves to another folder, and returns a
    result that requires a gradient."""
    def rude(images, prompts):
        result = red(images, prompts).requires_grad_()
        images.clear()
        prompts.clear()
        torch.set_grad_enabled(False)
        os.chdir(tmp_path.parent)
        return result

    monkeypatch.setitem(R.REWARDS, "red", rude)
    M.train(tiny(out="rude", reward="red", micro_batch=8))
    expected = usual({"micro_batch": 8})[:-1]
    assert same(expected, saved(tmp_path / "rude")["policy"].values())
    assert torch.is_grad_enabled()


# ---- 7. Settings ---------------------------------------------------------------------------------


def test_whatever_is_saved_can_be_read_again(tmp_path):
    """A Path, numpy's numbers and an int for a float are turned into the types of the fields."""
    config = tiny(out=tmp_path / "out", lr=np.float64(1e-3), seed=np.int64(3), beta=0)
    for field in dataclasses.fields(config):
        assert type(getattr(config, field.name)) is field.type


@pytest.mark.parametrize("settings, named", [
    ({"optimizer": "sgd"}, "--optimizer sgd: must be one of adamw, adafactor"),
    ({"reduction": "frist"}, "--reduction frist: must be one of random, first, last"),
    ({"divide_by_std": "False"}, "--divide-by-std 'False': must be true or false"),
    ({"groups": 2.9}, "--groups 2.9: must be a whole number"),
    ({"groups": True}, "--groups True"), ({"lr": "1e-3"}, "--lr '1e-3': must be a number"),
    ({"model": 3}, "--model 3: must be text"), ({"updates": 0}, "--updates 0: must be at least 1"),
    ({"score_steps": 9}, "--score-steps 9: must be at most --steps")])
def test_settings_are_checked_from_python_too(settings, named):
    """A ValueError in the words of the command line."""
    with pytest.raises(ValueError, match=re.escape(named)):
        M.Config(**settings)


def test_what_evaluation_reports_by_default():
    """For the graded reward of the shapes world, whether a picture is entirely correct."""
    assert M.Config().measure == "correct" and M.Config(reward="clip").measure == "clip"
    assert M.Config(measure="shapes").measure == "shapes"
    assert M.Config(out="~/x").out == os.path.expanduser("~/x")


def test_what_names_show_o():
    """A hub id or a folder, on Windows too; not MODULE:FUNCTION, and not the shapes world."""
    for model in ("showlab/show-o-512x512", "./showo", "C:\\models\\showo", "D:/showo"):
        assert M.is_showo(model)
    for model in ("", "my_model:make", "package.module:make"):
        assert not M.is_showo(model)


def test_show_o_has_settings_of_its_own():
    """The paper's and the released code's; a flag overrides each; user models have none."""
    words = ["--model", "showlab/show-o-512x512", "--prompts", "x"]
    paper = {"group_size": 6, "groups": 16, "steps": 50, "eval_steps": 50, "lr": 3e-6,
             "weight_decay": 0.02, "clip_low": 0.1, "clip_high": 0.2, "transition": "p1",
             "beta": 0, "guidance": 5, "temperature": 1, "reward": "clip", "filter_quantile": 0.1,
             "eval_pictures": 64}               # as many as are held out
    assert vars(M.parse(words)).items() >= paper.items()
    assert vars(M.parse([*words, "--lr", "1e-6"])).items() >= {**paper, "lr": 1e-6}.items()
    shapes_world = {"group_size": 6, "groups": 16, "steps": 8, "eval_steps": 8, "lr": 1.5e-3,
                    "warmup": 5, "updates": 81, "max_grad_norm": 1, "filter_tries": 2,
                    "temperature": 3, "guidance": 0}
    assert vars(M.parse(["--model", "my:make", "--prompts", "y"])).items() >= shapes_world.items()


# ---- 8. The policy -------------------------------------------------------------------------------


def test_text_is_laid_out_as_in_show_o(policy, monkeypatch):
    """[t2i, bos, words, bos], left padded; bos is never doubled; a cut text keeps its end token."""
    bos, pad, t2i = policy.bos_id, policy.pad_id, policy.t2i_id
    word, = policy.tokenize("a star")
    assert policy.encode(["a star", ""]).tolist() == [[t2i, bos, word, bos], [pad, t2i, bos, bos]]

    def tokenize(text):
        return {"bos": [bos, 3], "long": [3] * 300}[text]

    monkeypatch.setattr(policy, "tokenize", tokenize)
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
    for row in allowed[0, 2:]:
        assert row.tolist() == [False, True] + [True] * rest
    assert allowed[1, 1].tolist() == [True, True] + [False] * rest and allowed[1, 2:].all()


def test_logits_are_the_heads_at_the_picture(policy, monkeypatch):
    """The model's own, at the image's positions and codes."""
    ids = policy.encode(["a star"])
    tokens = torch.full((1, 36), 34)
    soi = torch.tensor([[policy.soi_id]])
    eoi = torch.tensor([[policy.eoi_id]])
    whole = torch.cat([ids, soi, tokens + policy.offset, eoi], dim=1)           # (1, L)
    mask = policy.attention_mask(ids)
    logits = policy.showo(whole, attention_mask=mask, use_cache=False).logits   # (1, L, vocabulary)
    expected = logits[:, -37:-1, policy.offset:-1]
    calls = record(monkeypatch, policy.showo.model, "forward")
    assert torch.allclose(policy(ids, tokens), expected, atol=1e-5)
    assert calls[0][1].past_key_values is None                  # no cache, which takes memory


def test_logits_are_float32_under_autocast():
    """With bf16 products, as on a GPU, states are rounded, but not the logits, even inside a
    caller's autocast. No copy of the weights in bf16 is kept."""
    half = shapes()
    ids = half.encode(["a star"])
    tokens = torch.full((1, 36), 34)
    exact = half(ids, tokens)
    seen = {}

    def inner(module, inputs, output):
        seen["inner"] = output
        seen["cached"] = torch.is_autocast_cache_enabled()

    def outer(module, inputs, output):
        seen["states"] = output[0]

    half.showo.model.layers[0].mlp.fc1.register_forward_hook(inner)
    half.showo.model.register_forward_hook(outer)
    half.dtype = torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        rounded = half(ids, tokens)
    assert seen["inner"].dtype == torch.bfloat16 and not seen["cached"]
    assert 1e-4 < (rounded - exact).abs().max() < 1
    head = half.showo.lm_head
    whole = seen["states"][:, -37:-1].float() @ head.weight.T + head.bias
    assert rounded.dtype == torch.float32
    assert torch.allclose(rounded, whole[..., half.offset:-1], atol=1e-6)


def test_decoding_gives_the_tiles_back(policy):
    """Code c at row r, column q is tile c at pixels (8 r, 8 q), to the bit."""
    tokens = (torch.arange(36)[None] + 13) % 34
    picture = policy.decode(tokens)
    assert picture.shape == (1, 48, 48, 3) and picture.dtype == torch.uint8
    assert (picture[0].numpy() == np.asarray(images_of(tokens.tolist())[0])).all()


def test_decoding_in_chunks_changes_nothing():
    """300 pictures, 113 at a time. Codes 0 and 1 are black, 2 is grey, all others are white."""
    fresh = shapes()
    chunks = []

    def levels_as_pixels(codes):
        chunks.append(len(codes))
        return codes[:, None].repeat(1, 3, 1, 1) - 2

    fresh.decoder = levels_as_pixels
    tokens = torch.randint(6, (300, 36), generator=seeded(0))
    levels = torch.tensor([0, 0, 127, 255, 255, 255])[tokens]                   # (300, 36)
    assert torch.equal(fresh.decode(tokens)[..., 0].flatten(1).long(), levels)
    assert chunks == [113, 113, 74]


def test_checkpointing_computes_twice_and_changes_nothing(batch):
    """The same gradient; each layer runs a second time in the backward pass."""
    vectors = []
    counts = []
    for checkpointing in (False, True):
        fresh = shapes(checkpointing=checkpointing)
        runs = []

        def count(module, inputs, output, runs=runs):
            runs.append(1)

        fresh.showo.model.layers[0].mlp.fc1.register_forward_hook(count)
        vectors.append(gradient(fresh, tiny(), batch)[0])
        counts.append(len(runs))
    assert torch.allclose(vectors[0], vectors[1], atol=1e-6) and counts[1] == 2 * counts[0]


# ---- 9. The shapes world's policy and base -------------------------------------------------------


def test_places_are_counted_from_the_end_and_learned():
    """By hand on three ids; trained, and saved under its name."""
    fresh = shapes()
    ids = torch.tensor([[3, 0, 3], [1, 2, 4]])
    embedding = fresh.showo.model.embed_tokens
    expected = torch.stack([embedding.weight[row] + embedding.place[-3:] for row in ids])
    assert torch.equal(embedding(ids), expected)
    assert torch.equal(embedding(ids[:, 1:]), expected[:, 1:])
    M.pretrain(fresh, tiny())
    place = fresh.state_dict()["showo.model.embed_tokens.place"]
    assert not torch.equal(place, shapes().showo.model.embed_tokens.place)


def test_each_part_of_a_run_depends_on_the_seed(tmp_path, monkeypatch):
    """Initial weights; captions, pictures and masks of pretraining; draws of a run."""
    found = []
    torch.save(shapes().state_dict(), tmp_path / "base.pt")             # the same for both runs
    for seed in (0, 1):
        fresh = shapes(seed=seed)
        parts = {"weight": fresh.showo.lm_head.weight.detach().clone()}
        with monkeypatch.context() as patch:
            pairs = record(patch, R, "draw_pairs")
            passes = record(patch, fresh, "forward")
            M.pretrain(fresh, tiny(seed=seed))
        parts["captions"], parts["pictures"] = pairs[0][1]
        parts["masks"] = torch.cat([arguments[1] == 34 for arguments, _ in passes])
        checkpoint, rows = run(tmp_path / str(seed), reward="red", seed=seed,
                               weights=tmp_path / "base.pt")
        parts["draws"] = checkpoint["state"]["generator"]
        parts["reward"] = rows[0]["reward"]
        parts["evaluation"] = checkpoint["state"]["base"]["pictures"]
        found.append(parts)
    for name, value in found[0].items():
        if torch.is_tensor(value):
            assert not torch.equal(value, found[1][name]), name
        else:
            assert value != found[1][name], name


def test_the_base_learns_from_masked_tokens_only(monkeypatch):
    """On pictures of one code each, numbered by their captions. 2 / pi of all tokens are masked."""
    def numbered_pairs(n, rng, caption_noise):
        captions = [str(i) for i in range(n)]
        return captions, torch.arange(n)[:, None].expand(n, 36) % 34

    encode = M.Policy.encode
    texts = []

    def encode_a_star(self, prompts):
        texts.extend(prompts)
        return encode(self, ["a star"] * len(prompts))

    monkeypatch.setattr(M.Policy, "encode", encode_a_star)
    monkeypatch.setattr(R, "draw_pairs", numbered_pairs)
    fresh = shapes()
    passes = record(monkeypatch, fresh, "forward")
    losses = record(monkeypatch, M.F, "cross_entropy")
    norms = []

    def remember(optimizer, arguments, keywords):
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in fresh.parameters()]).item())

    hook = register_optimizer_step_pre_hook(remember)
    M.pretrain(fresh, tiny(pretrain_steps=60))
    hook.remove()
    assert max(norms) == pytest.approx(1, abs=1e-3)                             # clipped
    assert all(p.grad is None for p in fresh.parameters())
    shown = torch.stack([arguments[1] for arguments, _ in passes])              # (60, 32, 36)
    masked = shown == 34
    numbers = torch.tensor([int(text or 0) for text in texts]).view(60, 32, 1)
    codes = (numbers % 34).expand(-1, -1, 36)                                   # (60, 32, 36)
    known = torch.tensor([text != "" for text in texts]).view(60, 32, 1).expand(-1, -1, 36)
    visible = known & ~masked
    assert torch.equal(shown[visible], codes[visible]) and masked.any(2).all()
    assert masked.float().mean().item() == pytest.approx(2 / math.pi, abs=0.05)
    for i, (arguments, _) in enumerate(losses):
        logits, target = arguments
        assert logits.shape == (int(masked[i].sum()), 34)
        has_text = known[i][masked[i]]
        assert torch.equal(target[has_text], codes[i][masked[i]][has_text])
    assert texts.count("") / len(texts) == pytest.approx(0.1, abs=0.03)
    assert len(set(texts)) > 1000


def test_a_base_is_reused_only_for_the_same_settings(tmp_path, monkeypatch):
    """Its file is named by all that it depends on; half of a file gives a one-line error."""
    made = record(monkeypatch, M, "pretrain")
    for settings in ({}, {}, {"seed": 1}, {"width": 32}, {"layers": 2}, {"pretrain_steps": 3},
                     {"caption_noise": 0.5}):
        M.load_base(shapes(**settings), tiny(**settings), tmp_path)
    assert len(made) == 6
    path = tmp_path / "base-0-16-1-2-0.0.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(R.InputError, match="base-0-16-1-2-0.0.pt"):
        M.load_base(shapes(), tiny(), tmp_path)


# ---- 10. Show-o: small ones in the published layout, made here -----------------------------------

WORDS = ["<|endoftext|>", "a", "cat", "dog", "house", "of", "bread", "and", "red", "tall", "old"]
CAPTIONS = ["a cat", "a dog", "a red cat", "a tall house of bread", "a cat and an old dog"]
Decoder = M.MagvitDecoder


@pytest.fixture(scope="module")
def showo(tmp_path_factory):
    """Language model, Show-o, MAGVIT-v2 and a CLIP of random weights -> dict of paths as str"""
    import open_clip
    folder = tmp_path_factory.mktemp("published")
    paths = {"llm": folder / "llm", "showo": folder / "showo", "magvit": folder / "magvit",
             "clip": folder / "clip.pt", "config": folder / "tiny-clip.json",
             "prompts": folder / "captions.txt"}
    for name in ("llm", "showo", "magvit"):
        paths[name].mkdir()
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=WORDS[0], eos_token=WORDS[0],
                            unk_token=WORDS[0]).save_pretrained(paths["llm"])
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}
    PhiConfig(vocab_size=64, resid_pdrop=0.5, **sizes).save_pretrained(paths["llm"])
    torch.manual_seed(0)
    codebook_size = 32
    size = len(WORDS) + 10 + codebook_size + 1
    phi = PhiConfig(vocab_size=size, qk_layernorm=True, initializer_range=0.3, **sizes)
    save_file(M.Policy(phi, None, 0, None, 16, codebook_size).state_dict(),
              paths["showo"] / "pytorch_model.safetensors")
    (paths["showo"] / "config.json").write_text(json.dumps({
        "vocab_size": size, "llm_vocab_size": len(WORDS), "llm_model_path": str(paths["llm"]),
        "codebook_size": codebook_size, "num_vq_tokens": 16}))
    decoder = {f"decoder.{name}": x for name, x in Decoder(32).state_dict().items()}
    save_file({**decoder, "encoder.conv_in.bias": torch.zeros(3), "quantize.x": torch.zeros(8)},
              paths["magvit"] / "pytorch_model.safetensors")
    paths["config"].write_text(json.dumps({
        "embed_dim": 16,
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1,
                     "layers": 1},
        "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "head_width": 16,
                       "layers": 1}}))
    open_clip.add_model_config(paths["config"])
    torch.save(open_clip.create_model("tiny-clip").state_dict(), paths["clip"])
    paths["prompts"].write_text("\n".join(CAPTIONS) + "\n")
    return {name: str(path) for name, path in paths.items()}


def showo_flags(showo, out, **more):
    """A short run of it on the CPU"""
    return flags(**{"model": showo["showo"], "vq_model": showo["magvit"], "out": out,
                    "prompts": showo["prompts"], "reward": f"clip:tiny-clip:{showo['clip']}",
                    "group_size": 2, "lr": 1e-3, **more})


def published(showo, name):
    """The tensors of a published file"""
    return load_file(pathlib.Path(showo[name], "pytorch_model.safetensors"))


def test_show_o_from_folders_end_to_end(showo, tmp_path):
    """2 updates, and --resume for another with files that have been moved."""
    M.main(showo_flags(showo, tmp_path / "out"))
    words = ["--resume", "--out", str(tmp_path / "out"), "--updates", "3"]
    for flag, part in (("--model", "showo"), ("--vq-model", "magvit"), ("--prompts", "prompts")):
        os.symlink(showo[part], tmp_path / part)
        words += [flag, str(tmp_path / part)]
    M.main(words)
    trained = saved(tmp_path / "out")["policy"]
    assert len(saved(tmp_path / "out")["state"]["rows"]) == 3
    before = published(showo, "showo")
    decoder = published(showo, "magvit")
    frozen = {name: x for name, x in decoder.items() if name.startswith("decoder.")}
    assert trained.keys() == {*before, *frozen}
    assert same(frozen.values(), [trained[name] for name in frozen])
    assert not same(before.values(), [trained[name] for name in before])


def test_other_weights_replace_the_base(showo, tmp_path, monkeypatch):
    """Of Show-o (in half precision), of the shapes world, of a user model."""
    before = published(showo, "showo")
    torch.save({name: (x + 1).half() for name, x in before.items()}, tmp_path / "mine.pth")
    config = M.parse(showo_flags(showo, tmp_path, weights=tmp_path / "mine.pth"))
    bias = M.make_policy(config, CPU).showo.lm_head.bias
    assert torch.equal(bias, (before["showo.lm_head.bias"] + 1).half().float())
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
    own = shapes(model="own_weights:make", prompts="x", weights=tmp_path / "table.pt")
    assert torch.equal(own.table, table) and own.table.dtype == torch.float32


def test_where_weights_are_looked_for(tmp_path, monkeypatch):
    """A file, a folder, OWNER/NAME on the hub, and another file there, OWNER/NAME/FILE."""
    save_file({"x": torch.ones(1)}, tmp_path / "pytorch_model.safetensors")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    asked = []

    def download(repository, name):
        asked.append(f"{repository}/{name}")
        return str(tmp_path / name.split("/")[-1])

    monkeypatch.setattr(M, "hf_hub_download", download)
    for source, value in (("owner/name", 1), ("owner/name/a/other.pth", 0), (tmp_path, 1),
                          (tmp_path / "other.pth", 0)):
        assert M.read_weights(source)["x"] == value
    assert asked == ["owner/name/pytorch_model.safetensors", "owner/name/a/other.pth"]
    torch.save(Code(), tmp_path / "code.pth")
    with pytest.raises(R.InputError, match="code.pth"):
        M.read_weights(tmp_path / "code.pth")
    assert not pathlib.Path("written by code").exists()


def test_full_size_has_the_published_names_and_shapes():
    """Without storage: those of the published files, as a checksum of their sorted list."""
    with torch.device("meta"):
        phi = PhiConfig(vocab_size=58498, qk_layernorm=True)
        whole = M.Policy(phi, None, 50256, Decoder(), 1024, 8192)
    for prefix, count, size, checksum in (("showo.", 437, 1_448_176_770, 735684579),
                                          ("decoder.", 190, 39_947_833, 907638121)):
        part = {}
        for name, x in whole.state_dict().items():
            if name.startswith(prefix):
                part[name] = list(x.shape)
        assert len(part) == count
        assert sum(math.prod(shape) for shape in part.values()) == size
        assert zlib.crc32(repr(sorted(part.items())).encode()) == checksum
    assert (whole.pad_id, whole.soi_id, whole.eoi_id, whole.t2i_id, whole.offset) == (
        50295, 50296, 50297, 50300, 50305)


def test_a_loaded_show_o(showo, monkeypatch):
    """Its layout of prompts, Phi's gelu_new in one kernel, and bf16 only on a GPU."""
    large = M.load_showo(showo["showo"], showo["magvit"])
    assert large.encode(["a cat", ""]).tolist() == [[16, 0, 1, 2, 0], [11, 11, 16, 0, 0]]
    x = torch.linspace(-6, 6, 1001)
    formula = 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x ** 3)))
    for layer in large.showo.model.layers:
        assert torch.allclose(layer.mlp.activation_fn(x), formula, atol=1e-6)
    assert large.dtype == torch.float32 and not large.decoder.conv_in.weight.requires_grad
    assert large.showo.config.resid_pdrop == 0          # sampler and learner must agree

    def stay(self, device):                             # there may be no GPU
        return self

    precisions = []
    monkeypatch.setattr(M.Policy, "to", stay)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    assert M.load_showo(showo["showo"], showo["magvit"], device="cuda").dtype == torch.bfloat16
    assert precisions == ["high"]


def magvit_by_hand(weights, codes):
    """MAGVIT-v2's decoder in functions of torch alone: codes (B, h, w) -> (B, 3, 16 h, 16 w)"""
    def conv(x, name):
        weight = weights[name + ".weight"]
        return F.conv2d(x, weight, weights[name + ".bias"], padding=weight.shape[-1] // 2)

    def norm(x, name):
        return F.group_norm(x, 32, weights[name + ".weight"], weights[name + ".bias"], 1e-6)

    def block(x, name):
        inner = conv(F.silu(norm(x, name + ".norm1")), name + ".conv1")
        inner = conv(F.silu(norm(inner, name + ".norm2")), name + ".conv2")
        if name + ".nin_shortcut.weight" in weights:
            x = conv(x, name + ".nin_shortcut")
        return x + inner

    def attention(x, name):
        inner = norm(x, name + ".norm")
        q = conv(inner, name + ".q").flatten(2)
        k = conv(inner, name + ".k").flatten(2)
        v = conv(inner, name + ".v").flatten(2)
        share = (torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5).softmax(2)
        return x + conv(torch.einsum("bij,bcj->bci", share, v).view_as(x), name + ".proj_out")

    bits = []
    for bit in range(12, -1, -1):                                               # the highest first
        bits.append((codes // 2 ** bit % 2).double() * 2 - 1)                   # (B, h, w)
    x = conv(conv(torch.stack(bits, 1), "post_quant_conv"), "conv_in")
    x = block(attention(block(x, "mid.block_1"), "mid.attn_1"), "mid.block_2")
    for level, blocks in ((4, 3), (3, 4), (2, 3), (1, 4), (0, 4)):              # coarse to fine
        for i in range(blocks):
            x = block(x, f"up.{level}.block.{i}")
        if level > 0:
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"up.{level}.upsample.conv")
    return conv(F.silu(norm(x, "norm_out")), "conv_out")


def test_the_decoder_computes_what_magvit_v2_does():
    """Random weights, larger where attention would otherwise be uniform; the eps of its norms."""
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
        weights = {name: x.double() for name, x in decoder.state_dict().items()}
        expected = magvit_by_hand(weights, codes)
    assert got.shape == expected.shape == (2, 3, 48, 32)
    assert (got - expected).abs().max() < 1e-4 and expected.std() > 0.1
    norms = [module for module in decoder.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {module.eps for module in norms} == {1e-6}


@pytest.fixture
def broken(showo, tmp_path):
    """Copies of Show-o whose files a test may change -> dict of paths, folder of the model"""
    folder = pathlib.Path(shutil.copytree(showo["showo"], tmp_path / "copy"))
    return {**showo, "showo": str(folder)}, folder


@pytest.mark.parametrize("damage, why", [
    ("missing", 'Missing key(s) in state_dict: "showo.lm_head.bias"'), ("none", "No such"),
    ("renamed", "(with the names module.showo.")])
def test_weights_of_show_o_that_do_not_fit(broken, damage, why, tmp_path, capsys):
    """One line, which shows some of the file's own names."""
    showo, folder = broken
    path = folder / "pytorch_model.safetensors"
    whole = load_file(path)
    path.unlink()
    if damage == "missing":
        whole.pop("showo.lm_head.bias")
        save_file(whole, path)
    if damage == "renamed":
        save_file({f"module.{name}": x for name, x in whole.items()}, path)
    assert why in refused(capsys, *showo_flags(showo, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("old, new, why", [
    (": 11", ": 12", "has 11 tokens"), ('{"vocab_size": 54', '{"vocab_size": 55', "leaves 12"),
    ("}", "", "JSON"), ("/llm", "/no", "/no"),
    ("llm_model_path", "x", "KeyError")])
def test_a_config_of_show_o_that_does_not_fit(broken, old, new, why, tmp_path, capsys):
    """One line, and before the folder of the run is made."""
    showo, folder = broken
    config = folder / "config.json"
    config.write_text(config.read_text().replace(old, new))
    error = refused(capsys, *showo_flags(showo, tmp_path / "out"))
    assert why in error and f"--model {showo['showo']}: " in error
    assert not (tmp_path / "out").exists()


def test_full_size_show_o_stays_on_its_device():
    """Tensors without storage that claim to be on a GPU: a rollout with guidance, all transitions,
    the decoder, at published widths. A tensor left on the CPU raises, or is an answer there."""
    try:
        with FakeTensorMode():
            torch.arange(2, device="cuda")[:, None].expand(2, 3).float().uniform_()
    except RuntimeError as error:
        pytest.skip(f"for fake CUDA tensors this torch needs a driver: {error}")

    def ones(text):
        return [1] * len(text)

    def no(self):                               # these tensors have no values; none is NaN
        return False

    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__bool__", no)
        with torch.device("cuda"):
            phi = PhiConfig(vocab_size=58498, qk_layernorm=True, num_hidden_layers=1)
            whole = M.Policy(phi, ones, 0, Decoder(), 1024, 8192)
        ids = whole.encode(["a cat", "a tall house"])
        pairs = torch.arange(2, device="cuda")
        path = M.rollout(whole, ids, 2, 1.0, 5.0, whole.encode(["", ""]))
        pixels = whole.decode(path.tokens)
        found = [ids, *path, pixels]
        for name in M.TRANSITIONS:
            found.append(M.replay_logprob(whole, ids, path, pairs, pairs, name))
        assert {x.device.type for x in found} == {"cuda"}
        assert pixels.shape == (2, 512, 512, 3) and path.noise.shape == (2, 2, 1024)


# ---- 11. Around the loop -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weight_decay_shrinks_matrices_and_nothing_else(name):
    """A step at gradient 0, rate .1 and decay .5: matrices shrink by a twentieth, nothing else."""
    fresh = shapes()
    optimizer = M.make_optimizer(fresh, tiny(optimizer=name, weight_decay=0.5))
    M.set_lr(optimizer, 0.1, 0, 0, 1)
    before = []
    for p in fresh.parameters():
        p.data.add_(1)                                      # biases begin at 0, which cannot shrink
        p.grad = torch.zeros_like(p)
        before.append(p.detach().clone())
    optimizer.step()
    for p, old in zip(fresh.parameters(), before, strict=True):
        factor = 1
        if p.dim() == 2:
            factor = 0.95
        assert torch.allclose(p, old * factor, atol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_the_optimizers_state_is_there_before_any_work_and_is_that_of_no_step(name):
    """Too little memory shows at once. No weight has moved, and no step has been counted."""
    fresh = shapes()
    start = [p.detach().clone() for p in fresh.parameters()]
    optimizer = M.make_optimizer(fresh, tiny(optimizer=name))
    assert same(start, list(fresh.parameters())) and len(optimizer.state) == len(start)
    for p in fresh.parameters():
        assert p.grad is None
        for value in optimizer.state[p].values():
            assert not torch.is_tensor(value) or (value == 0).all()


def test_on_an_accelerator_adamw_is_fused():
    """Wherever the device, which may be a str, is not the CPU."""
    own = torch.nn.Linear(2, 2)
    for device, fused in (("cpu", False), ("cuda:0", True), (torch.device("xpu"), True)):
        own.device = device
        assert M.make_optimizer(own, tiny()).defaults["fused"] == fused


def test_adafactor_steps_are_of_the_size_of_the_learning_rate():
    """Its default is lr times the size of the weight. Here --lr means the same as for AdamW."""
    fresh = shapes()
    optimizer = M.make_optimizer(fresh, tiny(optimizer="adafactor", weight_decay=0.0))
    M.set_lr(optimizer, 1e-3, 0, 0, 1)
    weight = fresh.showo.lm_head.weight
    before = weight.detach().clone()
    fresh(fresh.encode(["a star"]), torch.full((1, 36), 34)).logsumexp(-1).sum().backward()
    optimizer.step()
    assert 3e-4 < (weight - before)[fresh.offset:-1].pow(2).mean().sqrt() < 3e-3
    assert optimizer.state[weight]["row_var"].numel() < before.numel() / 8


def test_evaluation_measures_each_caption_in_its_own_category(policy, capsys):
    """A measure that returns the caption's number. The noise is fixed whatever is trained."""
    splits = [R.captions(False), R.captions(True)]
    seen = []

    def number(images, prompts):
        seen.append(torch.from_numpy(np.stack([np.asarray(image) for image in images])))
        return torch.tensor([100.0 + EVERY_CAPTION.index(text) for text in prompts])

    M.evaluate(policy, number, splits, tiny(eval_pictures=5), 0)
    other = tiny(eval_pictures=5, lr=0.1, groups=7, group_size=3, steps=2)
    result = M.evaluate(policy, number, splits, other, 7)
    assert torch.equal(seen[0], seen[1])
    pictures = result["pictures"]
    assert torch.equal(pictures, seen[0].view(2, 6, 5, 48, 48, 3)[:, :, :4])
    assert pictures.untyped_storage().nbytes() == pictures.numel()      # saved without the others
    for split, scores in zip(splits, result["scores"]):
        for texts, row in zip(split.values(), scores.tolist()):
            assert [EVERY_CAPTION[int(x) - 100] for x in row] == (texts * 5)[:5]

    M.print_scores(result, splits)
    lines = capsys.readouterr().out.splitlines()
    for line, name, means in zip(lines, ("training", "held-out"), result["scores"].mean(2)):
        cells = [f"{c} {mean:.2f}" for c, mean in zip(R.CATEGORIES, means.tolist())]
        assert line == f"update 7 {name} {means.mean():.3f} | {' '.join(cells)}"


OWN_MODEL = '''
import torch
class Tiny(torch.nn.Module):
    num_tokens = 9
    codebook_size = 4

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(9, self.codebook_size))

    @property
    def device(self):
        return self.table.device

    def encode(self, prompts):
        return torch.zeros(len(prompts), 1, dtype=torch.long, device=self.device)

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
def own_model(tmp_path):
    """Write a variant of OWN_MODEL as a module -> the flags that train it"""
    def write(name, old="", new=""):
        assert old in OWN_MODEL
        (tmp_path / f"{name}.py").write_text(OWN_MODEL.replace(old, new))
        (tmp_path / "captions.txt").write_text("a cat\na dog\na bird\n")
        return flags(model=f"{name}:make", prompts=tmp_path / "captions.txt", reward="red",
                     out=tmp_path / "out")
    return write


@pytest.mark.parametrize("name, old, new, why", [
    ("noisy", "return logits", "return torch.nn.functional.dropout(logits, 0.5)", "dropout"),
    ("frozen", "randn(9, self.codebook_size))", "randn(9, self.codebook_size), False)", "frozen"),
    ("unregistered", "torch.nn.Parameter(torch.randn(9, self.codebook_size))",
     "torch.randn(9, self.codebook_size, requires_grad=True)", "registered"),
    ("detached", "self.table.expand", "self.table.detach().expand", "no_grad"),
    ("half", "torch.randn(9, self.codebook_size)",
     "torch.randn(9, self.codebook_size, dtype=torch.bfloat16)", "float32 weights"),
    ("infinite", "return logits", "return logits + (self.table - self.table.detach()).sqrt()",
     "finite")])
def test_a_model_that_cannot_learn_shows_before_any_work(own_model, tmp_path, capsys, name, old,
                                                         new, why):
    """One line, and no folder is made."""
    error = refused(capsys, *own_model(name, old, new))
    assert why in error and "--model" in error
    assert not (tmp_path / "out").exists()


def test_a_bug_in_a_model_keeps_its_traceback(own_model):
    """A logit for MASK, and an error of its own."""
    with pytest.raises(AssertionError, match=r"logits \(\d+, 9, 5\), must be \(\d+, 9, 4\)"):
        M.main(own_model("wide", "self.codebook_size)", "self.codebook_size + 1)"))
    with pytest.raises(KeyError, match="'x'"):
        M.main(own_model("buggy", "return logits", "raise KeyError('x')"))


@pytest.mark.parametrize("name, old, new", [
    ("calm", "return logits", "return torch.nn.functional.dropout(logits, 0.5, self.training)"),
    ("nearly", "return logits", "return logits + 1e-6 * torch.rand(())"),     # as on a GPU
    ("named", "return self.table.device", "return str(self.table.device)"),
    ("switched_off", "import torch", "import torch\ntorch.set_grad_enabled(False)"),
    ("test", "torch.randn(9", "2 * torch.randn(9"),         # Python has a package of this name
    ("no_empty_prompt", "return torch.zeros", "assert prompts[0]\n        return torch.zeros")])
def test_models_that_are_trained(own_model, tmp_path, name, old, new):
    """Dropout is switched off; a device may be a str; gradients are switched on again; the current
    folder comes first; the empty prompt is asked for only with guidance."""
    try:
        M.main([*own_model(name, old, new), "--checkpointing"])     # has no effect on them
    finally:
        torch.set_grad_enabled(True)
        sys.modules.pop("test", None)
    rows = saved(tmp_path / "out")["state"]["rows"]
    assert len(rows) == 2 and rows[-1]["grad"] > 0


def test_a_users_model_is_seeded(own_model):
    """Its random weights depend on --seed."""
    own_model("seeded_model")
    sys.path.insert(0, os.getcwd())
    tables = [shapes(model="seeded_model:make", prompts="x", seed=s).table for s in (1, 1, 2)]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


@pytest.mark.parametrize("answer, error", [
    ("torch.zeros(3)", ValueError), ("torch.zeros(len(images), 1)", ValueError),
    ("torch.zeros(1)", ValueError),
    ("[1.0, 1e999]", ValueError), ("[1.0, 1e999 * 0]", ValueError), ("'good'", TypeError),
    ("0\nimport no_such_package", ModuleNotFoundError), ("0\ntorch.no_name", AttributeError)])
def test_a_wrong_reward_shows_before_any_work(tmp_path, monkeypatch, answer, error):
    """With its traceback, before the base is trained or a folder made; so do bugs in its module."""
    name = f"wrong_{zlib.crc32(answer.encode())}"
    text = f"import torch\ndef f(images, prompts):\n    return {answer}\n"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(M, "pretrain", None)
    with pytest.raises(error) as failed:
        M.main(flags(reward=f"{name}:f", out="out"))
    assert not isinstance(failed.value, R.InputError) and not (tmp_path / "out").exists()


@pytest.fixture
def generated(showo, tmp_path):
    """Generate pictures of two captions -> dict of their files' contents"""
    lines = [{"tag": tag, "include": [{"class": "cat"}], "prompt": "a cat"} for tag in "xy"]
    metadata = tmp_path / "evaluation_metadata.jsonl"
    metadata.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def pictures(name, *more, **settings):
        M.main([*showo_flags(showo, tmp_path / name, generate=metadata, **settings), *more])
        found = {}
        for path in (tmp_path / name).rglob("*.png"):
            found[path.relative_to(tmp_path / name).as_posix()] = path.read_bytes()
        return found
    return pictures


def test_generating_in_genevals_layout(generated, tmp_path, monkeypatch):
    """Folders, metadata, four pictures each. Only a folder whose metadata is empty, incomplete or
    of another caption is made again."""
    calls = record(monkeypatch, M, "sample")
    replaced = record(monkeypatch, M, "replacing")
    first = generated("first")
    assert {arguments[0].name for arguments, _ in replaced} == {"settings.json", "metadata.jsonl"}
    expected = []
    for folder in ("00000", "00001"):
        expected += [f"{folder}/samples/000{j}.png" for j in range(4)]
    assert sorted(first) == expected
    assert len(set(first.values())) == 8
    assert [arguments[1] for arguments, _ in calls] == [["a cat"] * 4] * 2
    texts = [(tmp_path / f"first/0000{i}/metadata.jsonl").read_text() for i in (0, 1)]
    assert "".join(texts) == (tmp_path / "evaluation_metadata.jsonl").read_text()
    assert Image.open(tmp_path / "first/00000/samples/0000.png").size == (64, 64)
    for half in ("", texts[0], texts[1][:20]):
        (tmp_path / "first/00001/samples/0002.png").unlink()
        (tmp_path / "first/00001/metadata.jsonl").write_text(half)
        calls.clear()
        assert generated("first", "--resume") == first
        assert len(calls) == 1
    assert generated("again", steps=99) == first            # more than tokens, but not used here


def test_a_stop_while_pictures_are_made(generated, tmp_path, stoppable, monkeypatch):
    """SIGTERM before the third picture of the second caption: it is made again on --resume."""
    save = Image.Image.save
    calls = itertools.count(1)

    def stop(self, path):
        if next(calls) == 7:
            signal.raise_signal(signal.SIGTERM)
        save(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stop)
        with pytest.raises(SystemExit, match="stopped; to continue: .* --resume"):
            generated("cut")
    assert (tmp_path / "cut/00000/metadata.jsonl").exists()
    assert not (tmp_path / "cut/00001/metadata.jsonl").exists()
    assert generated("cut", "--resume") == generated("whole")


def test_pictures_of_other_settings_are_not_mixed(generated, showo, tmp_path, monkeypatch, capsys):
    """Other settings and weights give other pictures, each in a folder of its own; so does a list
    with fewer captions."""
    first = generated("first")
    path = tmp_path / "other.pt"
    other = M.load_showo(showo["showo"], showo["magvit"]).state_dict()
    torch.save({name: x + 0.1 for name, x in other.items()}, path)
    for settings in ({"guidance": 3}, {"seed": 1}, {"weights": path}, {"temperature": 9.0},
                     {"eval_steps": 3}):
        with pytest.raises(SystemExit, match="choose another --out"):
            generated("first", "--resume", **settings)
        others = generated(f"other{list(settings)}", **settings)
        assert not set(first.values()) & set(others.values())
    (tmp_path / "first" / "settings.json").rename(tmp_path / "settings.json")
    with pytest.raises(SystemExit, match="without settings.json"):
        generated("first", "--resume")
    (tmp_path / "settings.json").rename(tmp_path / "first" / "settings.json")
    lines = (tmp_path / "evaluation_metadata.jsonl").read_text().splitlines()
    (tmp_path / "evaluation_metadata.jsonl").write_text(lines[0] + "\n")
    with pytest.raises(SystemExit, match="holds more than 1 captions"):
        generated("first", "--resume")
    assert generated("short", "--resume").keys() == {f"00000/samples/000{i}.png" for i in range(4)}


def test_weights_of_a_run_bring_its_settings(tmp_path):
    """Width, layers, temperature, steps and guidance of evaluation; a flag overrides each."""
    run(tmp_path / "run", reward="red", width=32, temperature=0.5, guidance=2.0)
    weights = str(tmp_path / "run" / "checkpoint.pt")
    config = M.parse(["--weights", weights, "--guidance", "1"])
    assert (config.width, config.layers, config.temperature) == (32, 1, 0.5)
    assert (config.eval_steps, config.guidance, config.steps) == (4, 1.0, 8)
    config = M.parse(["--weights", weights, "--model", "owner/name", "--prompts", "x"])
    assert (config.guidance, config.steps) == (2.0, 50)
    save_file({"x": torch.zeros(1)}, "other.safetensors")
    assert M.parse(["--weights", "other.safetensors"]).temperature == 3.0
    (tmp_path / "captions.txt").write_text("a star\n")
    M.main(["--weights", weights, "--generate", "captions.txt", "--out", "pictures"])
    M.main([*flags(out="next", width=32), "--weights", weights])
    assert saved("next")["config"]["temperature"] == 0.5


# ---- 12. The command line ------------------------------------------------------------------------


def refused(capsys, *words):
    """The one line with which a command is refused, whose exit status is not 0"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        M.main([str(word) for word in words])
    error = capsys.readouterr().err
    if isinstance(stop.value.code, str):
        error += stop.value.code
    assert stop.value.code and error.strip().count("\n") == 0
    assert error.startswith("mask_grpo.py: ")
    return error


class Code:
    """Unpickled, it writes a file"""

    def __reduce__(self):
        return open, ("written by code", "w")


def files(folder):
    """Name and content of every file"""
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
    ("--caption-noise 1.5", "--caption-noise 1.5: must be at most 1"),
    ("--caption-noise -1", "--caption-noise -1.0: must be at least 0"),
    ("--caption-noise 0.5 --model x --prompts y", "leave it out with --model"),
    ("--max-grad-norm 0", "above 0"), ("--out good.txt/out", "--out good"),
    (f"--out {'x' * 300}", "too long"),
    ("--width 40", "--width"), ("--device tpu", "--device tpu"), ("--model x", "--prompts"),
    ("--generate x.txt", "--weights"), ("--resume", "--resume"),
    ("--reward math:no", "a function no;"),
    ("--reward my_taste.py:warm", "write my_taste:warm"), ("--reward ./a/my:f", "write my:f"),
    ("--reward beauty", "choices: shapes, correct"), ("--measure clip:ViT-B-32:FILE", "clip:"),
    ("--model no_such_module:f --prompts good.txt", "no_such_module"), ("--prompts one.txt", "two"),
    ("--weights code.pt", "code.pt"), ("--weights no_such_file.pt", "(no such file or folder"),
    ("--weights cat.pt --width 32", "cat.pt (with the names showo."),
    ("--prompts empty.txt", "no captions"),
    ("--weights cat.pt --generate good.txt", "shapes world"),
    ("--prompts x.csv", ".txt"), ("--prompts x.TSV", ".txt"), ("--prompts list.txt", ".txt"),
    ("--prompts dict.txt", ".txt"), ("--prompts late.txt", "dragon 9"),
    ("--prompts coco.json", "must be a list"), ("--prompts number.jsonl", "record 2"),
    ("--prompts broken.JSON", "JSONDecodeError"), ("--prompts half.json", "surrogates")])
def test_bad_input_gives_a_one_line_error(words, named, tmp_path, capsys, monkeypatch):
    """It names what is wrong, and nothing is begun."""
    (tmp_path / "FILE").write_bytes(b"\xff\x00 is neither text nor weights")
    torch.save(Code(), tmp_path / "code.pt")
    dragons = [f"a dragon {i}" for i in range(20)]
    texts = {
        "good.txt": "a cat\na dog\n", "empty.txt": " \n\n", "one.txt": "a cat\na cat\n\n",
        "x.csv": "a cat\na dog", "x.TSV": "a cat\na dog", "list.txt": '["a cat", "a dog"]',
        "dict.txt": '{"prompt": "a cat"}\n{"prompt": "a dog"}\n', "broken.JSON": "[",
        "coco.json": '{"annotations": [{"caption": "a cat"}, {"caption": "a dog"}]}',
        "number.jsonl": '{"prompt": "a cat"}\n3\n', "half.json": '["a \\ud800", "b"]',
        "late.txt": "\n".join([*EVERY_CAPTION, *dragons])}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    torch.save(M.shapes_policy(M.Config()).state_dict(), "cat.pt")
    monkeypatch.setattr(M, "pretrain", None)
    before = files(tmp_path)
    error = refused(capsys, "--out", "out", *words.split())
    assert named in error and files(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two updates that the tests only read"""
    folder = tmp_path_factory.mktemp("finished")
    M.train(tiny(out=str(folder)))
    return folder


@pytest.mark.parametrize("words, named", [
    ("--resume --lr 1e-5", "--lr 1e-05: the run has 0.0015"), ("", "use --resume to continue it"),
    ("--resume --no-divide-by-std", "--divide-by-std"), ("--resume --measure shapes", "--measure"),
    ("--resume --updates 1", "must be at least 2"),
    ("--resume --prompts stars.txt", "captions"), ("--generate stars.txt --weights x", "exists")])
def test_a_folder_that_holds_a_run_stays_as_it_is(words, named, finished, capsys, monkeypatch):
    """A second start in it, and a resume with other settings or captions, are refused."""
    before = files(finished)
    (finished.parent / "stars.txt").write_text("a star\ntwo stars\n")
    monkeypatch.chdir(finished.parent)
    monkeypatch.setattr(M, "make_policy", None)             # no run begins, even if not refused
    error = refused(capsys, "--out", finished, *words.split())
    assert named in error and files(finished) == before


def test_a_second_run_from_python_is_refused_too(finished, monkeypatch):
    """A ValueError in the words of the command line, and no file is touched."""
    before = files(finished)
    monkeypatch.setattr(M, "make_policy", None)             # no run begins, even if not refused
    with pytest.raises(ValueError, match="use --resume to continue it"):
        M.train(tiny(out=str(finished)))
    with pytest.raises(ValueError, match=r"--lr 0.1: the run has 0.0015"):
        M.train(tiny(out=str(finished), resume=True, lr=0.1))
    assert files(finished) == before


def test_a_resumed_run_keeps_all_but_a_few_settings(finished):
    """These may change: updates, device, --out, the memory settings, and where files lie."""
    words = (f"--resume --out {finished} --updates 7 --device cpu --micro-batch 3 --seed 0 "
             "--rollout-batch 5 --checkpointing --lr 1.5e-3 --vq-model x --weights y")
    config = M.parse(words.split())
    assert config == tiny(out=str(finished), resume=True, updates=7, micro_batch=3,
                          rollout_batch=5, checkpointing=True, vq_model="x", weights="y")
    M.check_folder(config, finished / "checkpoint.pt", M.load_captions())
    assert M.MAY_CHANGE & {*OTHER} == {"updates"}       # of all that changes the outcome of a run
    for name in ("seed", "pretrain_steps", "score_steps", "filter_tries", "warmup"):
        assert getattr(M.parse([M.flag(name), "0"]), name) == 0
    assert M.parse(["--score-steps", "8"]).score_steps == 8


@pytest.mark.parametrize("damage", ["half", "older", "weights", "code", "device"])
def test_a_checkpoint_that_cannot_be_resumed_gives_a_one_line_error(damage, finished, tmp_path,
                                                                     capsys):
    """Cut in half, of an older version, weights alone, with code, of another device."""
    path = tmp_path / "checkpoint.pt"
    checkpoint = saved(finished)
    if damage == "older":
        checkpoint["config"] = {"length_normalize": True}
    if damage == "weights":
        checkpoint.pop("state")
    if damage == "device":
        checkpoint["state"]["generator"] = torch.zeros(16).byte()
    if damage == "code":
        checkpoint = Code()
    torch.save(checkpoint, path)
    if damage == "half":
        path.write_bytes(path.read_bytes()[:1000])
    error = refused(capsys, "--resume", "--out", tmp_path, "--updates", 3)
    assert not pathlib.Path("written by code").exists()
    named = str(path)
    if damage == "device":
        named = "--device"
    assert named in error


def test_help_explains_every_setting(capsys):
    """One flag, one comment, one default for each field, in ASCII and 100 columns."""
    with pytest.raises(SystemExit) as end:
        M.parse(["-h"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "clip_low is --clip-low" in text and "def " not in text
    assert text.isascii() and max(len(line) for line in text.splitlines()) <= 100
    for field in dataclasses.fields(M.Config):
        pattern = rf"^ +{field.name}: {field.type.__name__} = (.+?) +# .+"
        default, = re.findall(pattern, text, re.MULTILINE)
        assert eval(default) == field.default


def test_captions_are_printed_where_stdout_is_ascii(tmp_path):
    """As under LANG=C: other letters are escaped."""
    text = "ein h\u00fcbscher Stern\nein sch\u00f6ner Stern\n"
    (tmp_path / "captions.txt").write_text(text, encoding="utf-8")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit, match="of the shapes world"):
        M.main(flags(prompts="captions.txt", out="out"))
    out.flush()
    assert "2 captions, such as 'ein " in out.buffer.getvalue().decode("ascii")


def test_duplicate_captions_are_counted(tmp_path, capsys):
    """Each is used once."""
    (tmp_path / "captions.txt").write_text("a star\na star\ntwo stars\na star\n")
    splits = M.load_captions("captions.txt")
    assert "2 captions are duplicates" in capsys.readouterr().out
    assert sum(len(split["captions"]) for split in splits) == 2


# ---- reward.py -----------------------------------------------------------------------------------


def images_of(scenes):
    """Scenes (lists of 36 codes) as PIL images, put together from tiles"""
    tiles = R.TILES[torch.tensor(scenes)].view(-1, 6, 6, 8, 8, 3).transpose(2, 3)
    return [Image.fromarray(picture) for picture in tiles.reshape(-1, 48, 48, 3).numpy()]


# the codes of each shape, by hand: those of the red one, and how many tiles it has
CODES = {"circle": ([[1, 2], [3, 4]], 4), "dot": ([[0, 0], [13, 0]], 1),
         "rectangle": ([[0, 0], [16, 17]], 2), "star": ([[22, 23], [24, 25]], 4)}


def scene(*objects):
    """36 codes from (shape, colour, row, column)"""
    codes = np.zeros((6, 6), int)
    for shape, color, row, column in objects:
        red, count = CODES[shape]
        red = np.array(red)
        later = count * list(R.COLORS).index(color)
        y = 2 * row
        x = 2 * column
        codes[y:y + 2, x:x + 2] = np.where(red > 0, red + later, 0)
    return codes.flatten().tolist()


def test_the_rewards_can_be_imported_alone():
    """Without mask_grpo, transformers or open_clip."""
    code = ("import sys, reward; assert not {'mask_grpo', 'transformers', 'open_clip'} & set("
            "sys.modules); print(reward.load_reward('shapes').__name__)")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout == "shapes_reward\n", done.stderr


def test_tiles_differ_and_are_cut_in_reading_order():
    """34 codes, no two alike. The tiles of an object, put together, are its drawing, which stands
    at the lower left of its cell."""
    assert R.CODEBOOK_SIZE == 34
    assert R.TILES.shape == (34, 8, 8, 3) and len(R.TILES.unique(dim=0)) == 34
    assert (R.TILES[0] == torch.tensor(R.BACKGROUND)).all()
    sides = {"circle": (16, 16), "dot": (8, 8), "rectangle": (8, 16), "star": (16, 16)}
    for i, (shape, color) in enumerate(R.OBJECTS):
        first, second = images_of([scene((shape, color, 0, 0)), scene((shape, color, 1, 2))])
        assert (np.asarray(first)[:16, :16] == R.draw_object(shape, color)).all()
        assert R.look([second])[0, 5] == i
        is_drawn = (np.asarray(first)[:16, :16] != R.BACKGROUND).any(2)         # (16, 16)
        height, width = sides[shape]
        rows = np.nonzero(is_drawn.any(1))[0]
        columns = np.nonzero(is_drawn.any(0))[0]
        assert rows[0] >= 16 - height and columns[-1] < width
        # in the middle of its own tiles
        assert abs(rows[0] - (16 - height) - (15 - rows[-1])) <= 1
        assert abs(columns[0] - (width - 1 - columns[-1])) <= 1
        assert is_drawn.sum() > 0.3 * height * width


def phrases_of(split):
    """All text tokens of the captions of a split"""
    found = set()
    for texts in split.values():
        for text in texts:
            found.update(R.phrases(text))
    return found


def test_a_fifth_of_the_meanings_of_each_category_is_held_out():
    """Rounded up, with all wordings: 1 of 4 shapes; 2 of 6 pairs; 2 of 8 counts; 3 of 12 colours;
    5 of 24 ordered pairs on 2 axes; 11 of 54 pairs. No text token is in held-out captions only."""
    trained = R.captions(False)
    heldout = R.captions(True)
    assert [len(texts) for texts in heldout.values()] == [1, 2 * 2, 2, 3, 5 * 2, 11 * 2]
    assert [len(texts) for texts in trained.values()] == [3, 4 * 2, 6, 9, 19 * 2, 43 * 2]
    assert heldout["single"] == ["a circle"]
    assert heldout["counting"] == ["two circles", "three rectangles"]
    assert phrases_of(heldout) <= phrases_of(trained)
    every = []
    for split in (trained, heldout):
        for texts in split.values():
            every += texts
    assert sorted(every) == sorted(set(EVERY_CAPTION))
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above",
                "and": "and"}
    for split in (trained, heldout):
        for category in ("two", "position", "attribution"):
            for caption in split[category]:
                first, word, second = re.split(f" ({'|'.join(mirrored)}) ", caption)
                assert f"{second} {mirrored[word]} {first}" in split[category]


def test_text_tokens_are_phrases(policy):
    """By hand; no two captions have the same ones, and every phrase is used."""
    assert R.phrases("a red star and a blue circle") == ["a red star", "and a blue circle"]
    assert R.phrases("a star left of a circle") == ["a star", "left of a circle"]
    assert R.PHRASES == sorted(R.PHRASES)               # the same ids in every process
    assert R.phrases("two stars") == ["two", "stars"]
    assert R.phrases("") == []
    rows = [policy.tokenize(caption) for caption in EVERY_CAPTION]
    assert max(len(row) for row in rows) == 2
    assert len({tuple(row) for row in rows}) == len(rows)
    assert set(itertools.chain(*rows)) == set(range(1, policy.pad_id))


def test_drawings_are_correct_and_follow_their_conventions():
    """20 of each caption: one row, or one column if one is above the other; half of them red."""
    rng = random.Random(0)
    colors = collections.Counter()
    for caption in EVERY_CAPTION:
        images = images_of([R.draw_scene(caption, rng) for _ in range(20)])
        assert (R.shapes_correct(images, [caption] * 20) == 1).all()
        cells = R.look(images)                                                  # (20, 9)
        seen = set()
        for row in cells:
            places = (row >= 0).nonzero()[:, 0]
            seen.add(tuple(places.tolist()))
            lines = places // 3
            if "above" in caption or "below" in caption:
                lines = places % 3
            assert len(lines.unique()) == 1
        assert len(seen) > 1
        if not any(color in caption for color in R.COLORS):
            colors.update(R.OBJECTS[o][1] for o in cells[cells >= 0].tolist())
    shares = [colors[color] / sum(colors.values()) for color in R.COLORS]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.03)


def test_pairs_come_from_both_splits_and_are_correct():
    """Every category, and positions as often as CATEGORIES says: 6 of 15, a fifth of them held
    out."""
    prompts, pictures = R.draw_pairs(300, random.Random(0))
    assert (R.shapes_correct(images_of(pictures.tolist()), prompts) == 1).all()
    for heldout, share in ((False, 0.31), (True, 0.07)):
        split = R.captions(heldout)
        for texts in split.values():
            assert set(texts) & set(prompts)
        positions = [prompt for prompt in prompts if prompt in split["position"]]
        assert len(positions) / 300 > 0.8 * share


@pytest.mark.parametrize("noise", [0.3, 1.0])
def test_a_share_of_the_pairs_has_the_picture_of_another_caption(noise):
    """One of the same category, which may by chance be the same, or fit as well. That happens to 8%
    (of .5, 46% stay wrong), and hardly to captions of an attribution, because they are many."""
    prompts, pictures = R.draw_pairs(2000, random.Random(0), noise)
    right = R.shapes_correct(images_of(pictures.tolist()), prompts)             # (2000,)
    numbers = R.look(images_of(pictures.tolist())).ge(0).sum(1)                 # (2000,)
    kinds = {caption.text: caption.category for caption in R.all_captions()}
    outcomes = collections.defaultdict(list)
    for prompt, is_right, number in zip(prompts, right.tolist(), numbers.tolist(), strict=True):
        outcomes[kinds[prompt]].append(is_right)
        expected = {"single": (1,), "color": (1,), "counting": (2, 3)}
        assert number in expected.get(kinds[prompt], (2,))
    share = sum(outcomes["attribution"]) / len(outcomes["attribution"])
    assert share == pytest.approx(1 - noise, abs=0.06)
    assert right.eq(1).float().mean().item() == pytest.approx(1 - 0.92 * noise, abs=0.03)


STAR = ("star", "red", 0, 0)
BLUE_STAR = ("star", "blue", 1, 1)
LEFT_RIGHT = [("circle", "red", 2, 0), ("star", "red", 0, 1)]       # the circle is lower, too


@pytest.mark.parametrize("caption, objects, expected", [
    ("a star", [STAR], 1), ("a star", [], 0), ("a star", [("circle", "red", 0, 0)], 0),
    ("a star", [STAR, ("star", "red", 2, 2)], 1 / 2),                       # one too many
    ("a star", [STAR, ("circle", "red", 1, 1)], 1 / 2),                     # not asked for
    ("two stars", [STAR, BLUE_STAR], 1), ("three stars", [STAR, BLUE_STAR], 2 / 3),
    ("a red star", [BLUE_STAR], 0),
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
    """Quarters exchanged, missing, or stray; and noise of 20 of 255 levels."""
    good = scene(("star", "red", 1, 1))                             # at positions 14, 15, 20, 21
    exchanged = list(good)
    exchanged[14] = good[15]
    exchanged[15] = good[14]
    missing = list(good)
    missing[20] = 0
    stray = list(good)
    stray[0] = 1
    images = images_of([good, exchanged, missing, stray])
    assert R.shapes_reward(images, ["a star"] * 4).tolist() == [1, 0, 0, 0.5]
    noise = np.random.default_rng(0).integers(-20, 21, (48, 48, 3))
    noisy = Image.fromarray((np.asarray(images[0]) + noise).clip(0, 255).astype(np.uint8))
    assert R.shapes_correct([noisy], ["a star"]).item() == 1
    darker = Image.fromarray((np.asarray(images[0]).astype(int) - 60).clip(0).astype(np.uint8))
    assert (R.look([darker]) == R.BROKEN).all()


@pytest.mark.parametrize("shape", R.SHAPES)
def test_a_tile_of_another_colour_is_seen(shape):
    """Each of them, in every pair of colours. A dot has one, so it is another dot."""
    for color, other in itertools.permutations(R.COLORS, 2):
        whole = scene((shape, color, 1, 1))
        recolored = scene((shape, other, 1, 1))
        for i in np.flatnonzero(whole):
            codes = list(whole)
            codes[i] = recolored[i]
            cells = R.look(images_of([codes]))[0]
            expected = R.BROKEN
            if shape == "dot":
                expected = R.OBJECTS.index(("dot", other))
            assert cells[4] == expected and (cells != R.EMPTY).sum() == 1


def noise_images(n, size=64):
    """n PIL images of noise"""
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def test_clip_is_open_clips_scaled_cosine(showo, tmp_path):
    """By open_clip's own forward; 77 tokens of 200 count; from a file, a folder; with no scale."""
    import open_clip
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-clip", showo["clip"])
    images = noise_images(40)
    prompts = [f"picture number {i}" for i in range(38)] + ["cat " * 200, "cat " * 199 + "dog"]
    pixels = torch.stack([preprocess(image) for image in images])
    with torch.no_grad():
        of_images, of_texts, _ = model.eval()(pixels, open_clip.get_tokenizer("tiny-clip")(prompts))
    cosine = (of_images * of_texts).sum(-1)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({
        "model_cfg": json.loads(pathlib.Path(showo["config"]).read_text()), "preprocess_cfg": {}}))
    shutil.copy(showo["clip"], tmp_path / "open_clip_pytorch_model.bin")
    for name, scale in ((f"clip:tiny-clip:{showo['clip']}", model.logit_scale.exp()),
                        (f"clip:local-dir:{tmp_path}", model.logit_scale.exp()),
                        (f"hpsv2:tiny-clip:{showo['clip']}", 1)):
        scores = R.load_reward(name)(images, prompts)
        assert torch.allclose(scores, cosine * scale, atol=1e-4)
        assert scores.dtype == torch.float32 and not scores.requires_grad


def test_where_clips_are_looked_for(tmp_path, monkeypatch):
    """The names of rewards, as open_clip and the hub are asked for them."""
    import open_clip
    asked = []
    made = []

    class Net(torch.nn.Identity):
        """What a CLIP needs to be made"""

        logit_scale = torch.zeros(())

    def download(repository, name):
        asked.append(f"{repository}/{name}")
        return str(tmp_path / name)

    def create(model, pretrained, device):
        made.append((model, pretrained))
        return Net(), None

    def tokenizer(model):
        return None

    monkeypatch.setattr(R, "hf_hub_download", download)
    monkeypatch.setattr(open_clip, "create_model_from_pretrained", create)
    monkeypatch.setattr(open_clip, "get_tokenizer", tokenizer)
    for spec in ("clip", "clip:ViT-B-32:openai", "clip:ViT-B-32:C:\\mine.pt",
                 "clip:hf-hub:owner/name", "hpsv2"):
        R.load_reward(spec)
    assert made == [("ViT-H-14", "laion2b_s32b_b79k"), ("ViT-B-32", "openai"),
                    ("ViT-B-32", "C:\\mine.pt"), ("hf-hub:owner/name", None),
                    ("ViT-H-14", str(tmp_path / "HPS_v2.1_compressed.pt"))]
    assert asked == ["xswu/HPSv2/HPS_v2.1_compressed.pt"]


def test_pickscore_is_transformers_clip(tmp_path):
    """Against a small CLIPModel's own logits. A file that lacks a tensor is refused by its name."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 1}
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{c}</w>" for c in "acdgot"), *"acdgot"]
    vocabulary = {word: i for i, word in enumerate(words)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    text_config = {**sizes, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1}
    vision_config = {**sizes, "image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text_config, vision_config=vision_config,
                                 projection_dim=8)).eval()
    crop = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(crop, tokenizer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images = noise_images(3)
    prompts = ["a cat", "a dog " * 100, "dog"]
    inputs = processor(text=prompts, images=images, return_tensors="pt", truncation=True,
                       max_length=77, padding="max_length")
    expected = model(**inputs).logits_per_image.diagonal()
    scores = R.load_reward(f"pickscore:{tmp_path}")(images, prompts)
    assert torch.allclose(scores, expected, atol=1e-4)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("text_projection.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(R.InputError, match="lack text_projection.weight"):
        R.load_reward(f"pickscore:{tmp_path}")


# ---- captions and grids (section 11) -------------------------------------------------------------


@pytest.mark.parametrize("name, text", [
    ("a.txt", "a cat\n\n  a dog \n"), ("A.JSON", '["a cat", {"caption": "a dog"}, " "]'),
    ("a.jsonl", '{"prompt": "a cat", "tag": "x"}\n\n"a dog"\n{"caption": ""}'),
    ("bom.txt", "\ufeffa cat\na dog"), ("lines", "a cat\r\na dog")])
def test_captions_are_read_from_text_and_json(tmp_path, name, text):
    """Blank lines, empty captions and a byte order mark are not captions."""
    (tmp_path / name).write_bytes(text.encode())
    records = M.read_captions(tmp_path / name)
    assert [record["prompt"] for record in records] == ["a cat", "a dog"]
    assert ("tag" in records[0]) == (name == "a.jsonl")


def test_only_a_line_feed_ends_a_caption(tmp_path):
    """Not the line separators of Unicode; brackets within a text do not make it JSON."""
    text = "a cat\u2028on a\x85mat\n[brackets] and {braces}\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert len(M.read_captions(tmp_path / "a.txt")) == 2


@pytest.mark.parametrize("n, held", [(2, 1), (10, 1), (11, 2), (640, 64), (641, 64), (2000, 64)])
def test_a_fixed_tenth_of_the_captions_is_held_out(tmp_path, n, held):
    """Rounded up, at most 64; the same in any order. Duplicates count once."""
    captions = [f"caption {i}" for i in range(n)]
    splits = []
    for texts in (captions, captions[::-1] + captions[:7]):
        (tmp_path / "captions.txt").write_text("\n".join(texts))
        splits.append(M.load_captions(str(tmp_path / "captions.txt")))
    assert splits[0] == splits[1]
    trained, heldout = splits[0]
    assert len(heldout["captions"]) == held

    def checksum(text):
        return zlib.crc32(text.encode())

    assert heldout["captions"] + trained["captions"] == sorted(captions, key=checksum)


def test_a_grid_shows_each_picture_under_its_caption_with_its_score(tmp_path, monkeypatch):
    """Held-out pictures are green before and blue after: green stands left of blue; none is red."""
    written = []

    def write(self, at, text, *more):
        written.append(text)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", write)

    def made_up(update, first_score, color):
        pictures = torch.zeros(2, 3, 4, 8, 8, 3, dtype=torch.uint8)
        pictures[0, ..., 0] = 255
        pictures[1, ..., color] = 255
        scores = first_score + 0.01 * torch.arange(24.0).view(2, 3, 4)
        return {"update": update, "scores": scores, "pictures": pictures}

    base = made_up(0, 0.1, 1)
    trained = made_up(7, 0.5, 2)
    captions = {"one": ["x", "y"], "two": ["z"], "three": [max(EVERY_CAPTION, key=len)]}
    save_grid(tmp_path / "grid.png", captions, base, trained)
    expected = []
    for c, texts in enumerate(captions.values()):
        for j in range(4):
            expected.append(texts[j % len(texts)])
            for evaluation in (base, trained):
                expected.append(f"{evaluation['scores'][1, c, j]:.2f}")
    assert written[0].endswith("base | update 7") and written[1:] == expected
    sheet = np.array(Image.open(tmp_path / "grid.png"))                         # (H, W, 3)
    columns = {}
    for name, color in (("red", (255, 0, 0)), ("green", (0, 255, 0)), ("blue", (0, 0, 255))):
        columns[name] = np.nonzero((sheet == color).all(2))[1]
    assert len(columns["red"]) == 0
    assert len(columns["green"]) == len(columns["blue"]) == 12 * (96 - 2) ** 2      # and outlined
    assert columns["green"].min() < columns["blue"].min()
    assert columns["green"].max() < columns["blue"].max()

    large = torch.zeros(2, 1, 4, 300, 300, 3, dtype=torch.uint8)
    evaluation = {"update": 0, "scores": torch.zeros(2, 1, 4), "pictures": large}
    save_grid(tmp_path / "large.png", {"one": ["x"]}, evaluation, evaluation)
    assert Image.open(tmp_path / "large.png").width == 12 + 4 * (2 * 256 + 28)


# ---- README.md and assets/ -----------------------------------------------------------------------

README = (HERE / "README.md").read_text(encoding="utf-8")
STUDY = (HERE / "assets" / "study.md").read_text(encoding="utf-8")
PAPER = (HERE / "assets" / "paper.md").read_text(encoding="utf-8")
SHOW_O = (HERE / "assets" / "show-o.md").read_text(encoding="utf-8")
CORE, TASTE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)     # its two pieces of code


def test_the_readmes_reward_and_the_model_above_run(own_model, tmp_path):
    """Its code block and its command: trained, resumed, and sampled from."""
    own_model("my_model")
    (tmp_path / "my_taste.py").write_text(TASTE)
    command = re.search(r"`(--model my_model:make .*?)`", README)[1].split()
    M.main([*flags(updates=6, lr=0.1, groups=4, out="out"), *command])
    assert saved("out")["state"]["rows"][-1]["grad"] > 0 and "my_taste:taste" in command
    M.main(["--resume", "--out", "out", "--updates", "7"])
    M.main([*flags(out="pictures", generate="captions.txt", weights="out/checkpoint.pt"), *command])
    assert len(list((tmp_path / "pictures").rglob("*.png"))) == 3 * 4


def test_the_readmes_reward_in_the_shapes_world(tmp_path):
    """Its other command."""
    (tmp_path / "my_taste.py").write_text(TASTE)
    words = re.search(r"`python mask_grpo.py (--reward my_taste:.*?)`", README)[1].split()
    M.main([*flags(out="out"), *words])
    assert saved("out")["config"]["measure"] == "correct"


@pytest.mark.parametrize("copied", [False, True])
def test_the_core_in_the_readme_trains_a_model(copied, capsys):
    """As it stands; and with sections 1 to 4 pasted, below the imports that their text names."""
    code = CORE
    if copied:
        text = (HERE / "mask_grpo.py").read_text(encoding="utf-8")
        pasted = text[text.index("# 1. The sampler"):text.index("# 5. One update")]
        needed = re.search(r"They need (.*?)\.", pasted)[1].replace(" and ", ", ").split(", ")
        special = {"F": "import torch.nn.functional as F", "deque": "from collections import deque"}
        imports = [special.get(name, f"import {name}") for name in needed]
        first, second = re.split(r"from mask_grpo import .*\n", CORE)
        code = first + "\n".join(imports) + "\n" + pasted + second
    assert 25 <= len([line for line in CORE.splitlines() if line]) <= 35
    torch.manual_seed(0)
    exec(code, {"__name__": "core"})
    word, reward = capsys.readouterr().out.split()
    assert word == "reward" and float(reward) > 0.9


def test_a_trained_show_o_opens_in_show_os_own_code(showo):
    """The lines of show-o.md, beside the published config: names and shapes; and it loads here."""
    M.main(showo_flags(showo, "out"))
    exec(re.search(r"```python\n(.*?)```", SHOW_O, re.DOTALL)[1], {})
    before = published(showo, "showo")
    trained = load_file("pytorch_model.safetensors")
    assert trained.keys() == before.keys()
    for name, x in before.items():
        assert trained[name].shape == x.shape
    assert not same(trained.values(), [before[name] for name in trained])
    M.load_showo(showo["showo"], showo["magvit"], "pytorch_model.safetensors")


PAGES = {"README.md": README, "assets/study.md": STUDY, "assets/paper.md": PAPER,
         "assets/show-o.md": SHOW_O}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_names_what_there_is(name):
    """Flags, files and tests."""
    page = PAGES[name]
    fields = {M.flag(field.name) for field in dataclasses.fields(M.Config)}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", page))
    assert named - fields <= {"--force-reinstall", "--no-divide-by-std", "--nproc-per-node",
                              "--shutdown-timeout", "--no-checkpointing", "--no-build-isolation"}
    assert named
    paths = re.findall(r'\]\((?!http|#)(.+?)[)#]|src="(.+?)"', page)
    assert paths
    for path in paths:
        assert ((HERE / name).parent / "".join(path)).exists()
    assert set(re.findall(r"`(test_\w+)`", page)) <= globals().keys()


def quoted(text):
    """The shares in a text as whole percentages: "0.78", ".78", "78%" and "78" in a table"""
    found = {round(100 * float(number)) for number in re.findall(r"(?<![\d.])0?(\.\d\d)\b", text)}
    found.update(int(number) for number in re.findall(r"\b(\d+)%", text))
    return found


def test_the_shares_in_the_study_stand_in_a_table_of_their_section():
    """Those that its sentences quote, and means with their deviations or standard errors."""
    for section in re.split(r"^## ", STUDY, flags=re.MULTILINE)[1:]:
        tables = "\n".join(table_rows(section))
        cells = {int(cell) for cell in re.findall(r"[| (-](\d{1,3})(?=[ )-])", tables)}
        for line in section.splitlines():
            if not line.startswith("|"):
                assert quoted(line) <= quoted(tables) | cells, line
            for number in re.findall(r"[+-]?\d?\.\d+ ± \d?\.\d+", line):
                assert number in tables, line


def test_the_shares_in_the_readme_are_means_of_the_study():
    """The first line of numbers is that of the eight seeds; every other share is a mean of a table,
    or of one seed in steps.txt or schedules.txt."""
    rows = table_rows(STUDY)
    base, trained = re.findall(r"0\.\d\d ± 0\.\d\d", README)[:2]
    assert any(row.startswith("| base |") and row.endswith(f" {base} |") for row in rows)
    assert any(row.startswith("| trained |") and row.endswith(f" {trained} |") for row in rows)
    means = quoted("\n".join(re.findall(r"0\.\d\d(?= ±)", "\n".join(rows))))
    for file in ("steps", "schedules"):
        text = (HERE / "assets" / f"{file}.txt").read_text(encoding="utf-8")
        means.update(int(cell) for cell in re.findall(r"\| (\d{1,3})(?= \|)", text))
    changes = (HERE / "assets" / "changes.txt").read_text(encoding="utf-8")
    means.update(int(cell) for cell in re.findall(r"\| (\d{1,3})(?= \()", changes))
    assert quoted(re.sub(r"```.*?```", "", README, flags=re.DOTALL)) <= means
    for number in re.findall(r"[+-]?0\.\d+ ± 0\.\d+", README):
        assert any(number in row for row in rows), number


def test_the_figures_are_what_their_script_draws():
    """Of what is kept. Fonts may differ by a little, and a GIF has few colours."""
    figures = runpy.run_path(str(HERE / "assets" / "figures.py"))["FIGURES"]
    for name, figure in figures.items():
        drawn = figure()
        if not isinstance(drawn, list):
            drawn = [drawn]
        kept = Image.open(HERE / "assets" / name)
        assert getattr(kept, "n_frames", 1) == len(drawn)
        for i, image in enumerate(drawn):
            kept.seek(i)
            difference = np.asarray(kept.convert("RGB")).astype(int) - np.asarray(image)
            assert (abs(difference) < 12).mean() > 0.99


def test_what_training_changes_is_measured_as_described(monkeypatch):
    """Six held-out pictures, the first three of two circles; T = 12. By hand."""
    mixed = scene(("circle", "red", 0, 0), ("circle", "blue", 0, 2))
    alike = scene(("circle", "red", 0, 0), ("circle", "red", 0, 2))
    two_colors = scene(("circle", "red", 0, 0), ("star", "blue", 0, 2))
    revealed_at = torch.zeros(12, 6, 6).long()                      # background at once, in step 0
    revealed_at[6, :2, :2] = torch.tensor([[3, 5], [1, 6]])         # a circle from step 1 to 6
    revealed_at[6, :2, 4:] = 8                                      # all of a circle in step 8
    for place in (slice(0, 2), slice(4, 6)):
        revealed_at[7:10, :2, place] = torch.tensor([[9, 11], [10, 11]])
    scenes = [mixed] * 7 + [alike] * 2 + [two_colors] + [scene()] * 2
    zeros = torch.zeros(12, 12, 36)
    path = M.Trajectory(torch.tensor(scenes), revealed_at.flatten(1), zeros, zeros.long())

    def made_up_sample(*arguments):
        return path

    monkeypatch.setattr(M, "sample", made_up_sample)
    measure = runpy.run_path(str(HERE / "assets" / "study.py"))["measure"]
    splits = [{"counting": ["two circles"], "attribution": ["a red circle and a blue star"]}] * 2
    found, kinds, right = measure(shapes(), splits, tiny(eval_pictures=3), 12)
    # revealed before steps 1, 8 and 9, and before steps 6, 8 and 11, by the first picture
    expected = {"right": 400 / 6, "blind": 100 / 8, "first": 100 * (28 + 32 + 6 * 36) / (8 * 36),
                "last": 100 * (31 + 32 + 6 * 36) / (8 * 36), "distinct": 400 / 6,
                "commonest": 500 / 6, "attribution": 100 / 3}
    assert found == pytest.approx(expected, rel=1e-5)
    assert (6 * kinds).round().int().tolist() == [
        [28 * 4 + 72] + [0] * 11, [0, 1, 0, 0, 0, 0, 0, 0, 1, 6, 0, 0],
        [0, 0, 0, 1, 0, 1, 1, 0, 3, 0, 6, 12]]
    assert [bool(x) for _, x in right] == [True] * 4 + [False] * 2


def test_the_error_over_captions_is_that_of_a_sample_of_meanings():
    """Two meanings, one always right, the other never: their variance is 1/2, that of their mean
    1/4, and that of the mean of both categories 1/16. A single meaning has none."""
    names = runpy.run_path(str(HERE / "assets" / "study.py"))
    outcomes = [("two circles", True)] * 8 + [("three dots", False)] * 2 + [("a dot", True)]
    assert names["error_over_captions"](outcomes) == pytest.approx(1 / 4)


def test_a_paired_difference_has_the_standard_error_of_its_mean():
    """Differences of .1, .2 and .3 have a standard deviation of .1. The star is a t test at 5%."""
    difference = runpy.run_path(str(HERE / "assets" / "study.py"))["difference"]
    assert difference([0.5, 0.7, 0.9], [0.4, 0.5, 0.6]) == "+0.200 ± 0.058"
    assert difference([0.5, 0.7, 0.9], [0.4, 0.5, 0.7]) == "+0.167 ± 0.033 *"
    assert difference([0.2, 0.4, 0.5], [0.3, 0.6, 0.7]) == "-0.167 ± 0.033 *"


def test_speed_is_the_mean_reward_of_all_updates():
    """Two updates of .2 and .6 in a run, and of .1 more in another; two seeds of each."""
    names = runpy.run_path(str(HERE / "assets" / "study.py"))
    log = ["base training .3 |", "base held-out .3 |", "update 2 training .5 |",
           "update 2 held-out .5 |"]
    runs = {}
    for flags, rewards in (("", (0.2, 0.6)), ("--lr=1", (0.3, 0.7))):
        rows = [{"reward": str(x), "grad": "1", "sampled": "2", "seconds": "1"} for x in rewards]
        for seed in (0, 1):
            runs[seed, flags] = names["summary"](rows, log)
    variant = names["Variant"]("another", "--lr=1", (0, 1))
    expected = "| another | 2 | 0.500 ± 0.000 | +0.100 ± 0.000 * |"
    assert names["speed_row"](variant, runs, "") == expected


def test_the_search_tries_valid_schedules_only():
    """A neighbour reveals at least one token in each step, and one or two counts have moved, or the
    noise has. While a schedule is tried it takes the place of the cosine."""
    names = runpy.run_path(str(HERE / "assets" / "study.py"))
    rng = random.Random(0)
    schedule = [30, 20, 12, 5, 2, 0]
    seen = set()
    for _ in range(500):
        moved, noise = names["neighbour"](schedule, 3.0, 36, rng)
        changes = [abs(a - b) for a, b in zip(schedule, moved, strict=True) if a != b]
        assert len(changes) <= 2 and max(changes, default=0) <= 6 and moved[-1] == 0
        assert 36 > moved[0] and moved == sorted(set(moved), reverse=True)
        seen.add((len(changes), noise))
    assert seen == {(0, 1.5), (0, 6.0), (0, 3.0), (1, 3.0), (2, 3.0)}

    def ask():
        return M.mask_schedule(2, 36)

    assert names["with_schedule"]([9, 0], ask) == [9, 0]
    assert M.mask_schedule(2, 36) == [25, 0]
    for first in names["schedules_at_first"](36, rng):
        assert len(first) == 8 and first == sorted(set(first), reverse=True) and first[-1] == 0


def test_rivals_are_chosen_on_training_captions_and_measured_on_held_out_ones(monkeypatch):
    """Each with its own noise; the schedule replaces the cosine."""
    names = runpy.run_path(str(HERE / "assets" / "study.py"))
    shared = names["rivals"].__globals__
    splits = [{"single": ["a dot"]}, {"single": ["a circle"]}]
    schedule = [28, 24, 20, 16, 12, 8, 4, 0]

    def best_noise(policy, split, config):
        assert split == splits[0]
        return 5.0

    def best_schedule(policy, split, config, noise):
        assert split == splits[0] and noise == 5.0
        return schedule, 7.0

    def best_objects_first(policy, split, config):
        assert split == splits[0]
        return schedule, 3.0

    def share_objects_first(policy, split, config, schedule, noise):
        assert split == splits[1] and noise == 3.0
        return 0.25

    measured = []

    def sampled(policy, given, config, T):
        assert given == splits
        measured.append((M.mask_schedule(T, 36), config.temperature))
        return None, ["a circle"], images_of([scene(("circle", "red", 0, 0))])

    for function in (best_noise, best_schedule, best_objects_first, share_objects_first, sampled):
        monkeypatch.setitem(shared, function.__name__, function)
    found = names["rivals"](shapes(), splits, tiny())
    assert measured == [(M.mask_schedule(8, 36), 5.0), (schedule, 7.0)]
    assert found == {"noise": "100", "schedule": "100", "objects first": "25", "the noise": "5",
                     "the schedule": "28 24 20 16 12 8 4 0", "its noise": "7"}


class Unsure(TablePolicy):
    """At every position, the background with .9, or one of two others"""

    def encode(self, prompts):
        return torch.zeros(len(prompts), 1).long()

    def __call__(self, prompt_ids, tokens):
        logits = torch.tensor([0.9, 0.05, 0.05]).log()
        return logits.expand(*tokens.shape, 3)


def test_objects_first_reveals_what_is_not_background_first():
    """Of 40 positions 4 are drawn as objects, on average, and half are revealed by the first step.
    If only half of all objects drawn were kept, there would be as many as in one draw."""
    names = runpy.run_path(str(HERE / "assets" / "study.py"))
    policy = Unsure(40, 3)
    tokens = names["objects_first"](policy, ["x"] * 2000, [20, 0], 3.0, seeded(0))
    assert tokens.shape == (2000, 40) and tokens.max() < 3
    # all objects of the first draw stay, and the other 20 positions or more are drawn again
    expected = 40 * 0.1 + 20 * 0.1
    assert (tokens > 0).sum(1).float().mean().item() == pytest.approx(expected, abs=0.2)


def test_the_study_runs_and_prints_its_tables(tmp_path, monkeypatch, capsys):
    """Two seeds of two variants, two updates each; a base is made once per seed, and a run that has
    ended is not made again. Schedules have as many steps as the cosine, and may be better."""
    names = runpy.run_path(str(HERE / "assets" / "study.py"))
    small = "--updates=2 --pretrain-steps=30 --groups=2 --eval-pictures=2 --width=16 --layers=1"
    default = names["Variant"]("the default", small, (0, 1))
    other = names["Variant"]("another", f"{small} --temperature=30", (0, 1))
    again = names["Variant"]("again", names["TWO_THREADS"], (0, 1))
    second = names["Variant"]("a second machine", f"{names['SECOND']} {other.flags}", (0, 1))
    shared = names["make_run"].__globals__
    tables = {"default": [default, again], "parts": [other], "repeated": [second]}
    monkeypatch.setitem(shared, "TABLES", tables)
    monkeypatch.setitem(shared, "COMPARED", {"repeated": second.flags})
    monkeypatch.setitem(shared, "SPEED", {small: [other]})
    monkeypatch.setitem(shared, "TIMES", (1, 8))
    monkeypatch.setitem(shared, "TRIALS", 2)
    for name in ("SEARCH", "FINAL"):
        monkeypatch.setitem(shared, name, {"seeds": (0,), "pictures": 1})
    started = []

    def run_here(command, cwd, env, stdout, stderr, check):
        assert command[1] == "mask_grpo.py"
        started.append(env["OMP_NUM_THREADS"])
        words = command[2:]
        if env["OMP_NUM_THREADS"] == "2":
            words += small.split()                  # it has no flags of its own
        with contextlib.redirect_stdout(stdout):
            M.main(words)

    monkeypatch.setattr(subprocess, "run", run_here)
    pretrained = record(monkeypatch, M, "pretrain")
    names["main"](["runs", "study"])
    assert started == ["1", "1", "2", "2", "1", "1", "1", "1"] and len(pretrained) == 4
    names["main"](["runs", "study"])
    assert len(started) == 8

    capsys.readouterr()
    names["main"](["tables", "study"])
    tables = capsys.readouterr().out
    ended = {}
    for seed in (0, 1):
        for flags in (small, other.flags):
            ended[seed, flags] = float(read_rows(f"study/{seed}/{flags}")[-1]["heldout"])
    differences = [ended[seed, other.flags] - ended[seed, small] for seed in (0, 1)]
    trained = f"{ended[0, small]:.2f} | {ended[1, small]:.2f} | "
    assert f"| trained | {trained}{sum(ended[seed, small] for seed in (0, 1)) / 2:.2f} ±" in tables
    error = abs(differences[0] - differences[1]) / 2
    assert f" | {sum(differences) / 2:+.3f} ± {error:.3f} | " in tables
    assert tables.count("| a second machine |") == 1
    repeated = tables.split("| a second machine |")[1].split(" | ")
    assert repeated[3].strip() == ""                # it is what the table compares with
    there = timeless(read_rows(f"study/0/{second.flags}"))
    assert there == timeless(read_rows(f"study/0/{other.flags}"))
    assert "| another | 2 | " in tables.split("| speed |")[1]

    paths = [f"study/{seed}/{small}" for seed in (0, 1)]
    for which, policy, config, splits in names["policies"](paths[0]):
        _, _, images = names["sampled"](policy, splits, config, 8)
        seen = saved(paths[0])["state"]["base" if which == "base" else "latest"]["pictures"][1]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        assert torch.equal(pixels, seen.flatten(0, 1))      # those of the run's own evaluation
    names["main"](["steps", *paths])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 4 and lines[0] == "| run, %, at T = | 1 | 8 |"
    for seed in (0, 1):
        assert lines[3 + 2 * seed].split(" | ")[0] == f"| seed {seed}, p1, trained"
        share = float(lines[3 + 2 * seed].strip(" |").split(" | ")[-1])
        assert share == pytest.approx(100 * ended[seed, small], abs=0.5)
    names["main"](["schedules", paths[0]])
    cells = capsys.readouterr().out.splitlines()[2].split(" | ")
    counts = [int(count) for count in cells[7].split()]
    assert cells[0] == "| seed 0" and len(counts) == 8 and counts[-1] == 0
    assert counts == sorted(set(counts), reverse=True) and counts[0] < 36
    names["main"](["changes", *paths])
    assert "trained: standard error over captions" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="python assets/study.py runs FOLDER"):
        names["main"]([])


def table_rows(text):
    """The lines of the tables in a text"""
    return [line for line in text.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("command, page", [("costs", SHOW_O), ("study tables", STUDY)])
def test_tables_are_what_their_scripts_print(command, page, capsys, monkeypatch):
    """Every row of them stands on the page."""
    monkeypatch.setattr(M, "MagvitDecoder", Decoder)
    script, *words = command.split()
    monkeypatch.setattr(sys, "argv", [script, *words])
    runpy.run_path(str(HERE / "assets" / f"{script}.py"), run_name="__main__")
    printed = table_rows(capsys.readouterr().out)
    assert len(printed) >= 3 and set(printed) <= set(page.splitlines())


@pytest.mark.parametrize("name", ["changes", "steps", "schedules"])
def test_tables_of_runs_that_are_too_large_to_keep_stand_on_the_page(name):
    """As they were printed."""
    kept = table_rows((HERE / "assets" / f"{name}.txt").read_text(encoding="utf-8"))
    assert len(kept) >= 3 and set(kept) <= set(STUDY.splitlines())


@pytest.mark.parametrize("command", ["study tables", "study changes", "study steps",
                                     "study schedules", "figures"])
def test_a_folder_without_runs_gives_a_one_line_error(command, tmp_path, monkeypatch):
    """It says how to make them."""
    script, *words = command.split()
    monkeypatch.setattr(sys, "argv", [script, *words, str(tmp_path)])
    mend = "holds no run.*python assets/study.py runs FOLDER"
    with pytest.raises(SystemExit, match=mend) as stop:
        runpy.run_path(str(HERE / "assets" / f"{script}.py"), run_name="__main__")
    assert "\n" not in stop.value.code


# ---- assets/several_gpus.patch -------------------------------------------------------------------

WORKER = """
import os, signal, sys
import numpy as np
import torch
import mask_grpo as M

RED
M.reward.REWARDS["red"] = red
make_policy = M.make_policy
sample_groups = M.sample_groups
policy = None
update = 0


def remember(config, device):
    global policy
    policy = make_policy(config, device)
    return policy


def sample_or_not(*arguments):      # in update 2 all groups of rank 1 vanish; in 3 it is stopped
    global update
    groups = sample_groups(*arguments)
    update += 1
    if M.RANK == 1 and update == 3 and "--resume" not in sys.argv:
        signal.raise_signal(signal.SIGTERM)
    if M.RANK == 1 and update == 2 and "--resume" not in sys.argv:
        none = M.select(groups.trajectory, torch.arange(0))
        return groups._replace(prompts=[], rewards=groups.rewards[:0], trajectory=none)
    return groups


M.make_policy = remember
M.sample_groups = sample_or_not
try:
    M.main(sys.argv[1:])
finally:
    torch.save(policy.state_dict(), f"rank{M.RANK}.pt")
"""


def processes(words):
    """Run the worker as two processes on the CPU -> their exit statuses, outputs, and weights"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    running = []
    for rank in "01":
        environment = {**os.environ, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank,
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        running.append(subprocess.Popen([sys.executable, "worker.py", *words], env=environment,
                                        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    try:
        outputs = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()
    weights = [torch.load(f"rank{rank}.pt") for rank in "01"]
    return [process.returncode for process in running], outputs, weights


def joined(one, other):
    """The groups of two ranks as those of one process"""
    return M.Groups(one.prompts + other.prompts, M.concatenate([one.trajectory, other.trajectory]),
                    torch.cat([one.rewards, other.rewards]),
                    torch.cat([one.all_rewards, other.all_rewards]))


def distance(one, two):
    """The squared distance of two state dicts"""
    return sum((one[name] - two[name]).square().sum() for name in one)


def test_two_processes_learn_as_one_does_from_the_groups_of_both(tmp_path, monkeypatch):
    """Three updates, the third interrupted by a signal to rank 1, and resumed. The ranks' weights
    are equal bit by bit."""
    for file in ("mask_grpo.py", "reward.py"):
        shutil.copy(HERE / file, tmp_path)
    subprocess.run(["git", "apply", HERE / "assets" / "several_gpus.patch"], check=True)
    settings = {"reward": "red", "updates": 3, "groups": 8, "max_grad_norm": 0.1}
    (tmp_path / "worker.py").write_text(WORKER.replace("RED", inspect.getsource(red)))
    status, outputs, (one, two) = processes(flags(out="two", **settings))
    assert 0 not in status and "stopped" in outputs[1][1]
    assert outputs[1][0] == "" and len(saved("two")["state"]["rows"]) == 2
    assert same(one.values(), two.values())
    status, outputs, (one, two) = processes(["--resume", "--out", "two"])
    assert status == [0, 0], outputs
    assert "update   3/3" in outputs[0][0]
    assert outputs[1][0] == "" and same(one.values(), two.values())

    sample_groups = M.sample_groups
    updates = itertools.count(1)
    filter_of_rank_1 = M.SampleFilter(0.1)

    def sample_both(policy, reward_fn, captions, sample_filter, config, generator):
        update = next(updates)
        half = dataclasses.replace(config, groups=config.groups // 2)
        mine = sample_groups(policy, reward_fn, captions, sample_filter, half, generator)
        of_rank_1 = seeded(zlib.crc32(f"0 1 {update}".encode()))
        other = sample_groups(policy, reward_fn, captions, filter_of_rank_1, half, of_rank_1)
        if update == 2:
            return mine
        return joined(mine, other)

    monkeypatch.setattr(M, "sample_groups", sample_both)
    together, rows = run(tmp_path / "one", **{**settings, "groups": 16})
    start = M.read_weights(next((tmp_path / "one").glob("base*")))
    assert distance(one, together["policy"]) < 1e-6 * distance(start, together["policy"])
    for row, alone in zip(read_rows(tmp_path / "two"), rows, strict=True):
        assert float(row["grad"]) == pytest.approx(float(alone["grad"]), rel=1e-3)
