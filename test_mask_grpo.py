# SPDX-License-Identifier: MIT
"""The second half of the text: what mask_grpo.py and reward.py claim, checked.

`pytest -q`, on the CPU, about a minute. A formula is checked against something that is not that
formula: a calculation by hand, an enumeration, a simulation of the sampler, finite differences.
"""
import collections
import contextlib
import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import types
import warnings

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch._subclasses import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode
from transformers import PhiConfig, PreTrainedTokenizerFast

import mask_grpo as M
import reward as R

torch.set_num_threads(1)            # the tensors are tiny: a second thread would mostly wait

TINY = dict(width=16, layers=1, pretrain_steps=2, steps=4, eval_steps=4, updates=2, groups=2,
            group_size=4, warmup=1, eval_pictures=4, eval_every=10, device="cpu")
DEVICES = ["cpu", torch.accelerator.current_accelerator().type
           if torch.accelerator.is_available() else
           pytest.param("accelerator", marks=pytest.mark.skip(reason="there is none"))]


def read_rows(folder):
    """metrics.csv as a list of dicts."""
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def tiny(**settings):
    """A Config small enough to run in a second."""
    return M.Config(**{**TINY, **settings})


def seeded(seed):
    """A CPU generator."""
    return torch.Generator().manual_seed(seed)


class TablePolicy:
    """The least that a policy must answer to. Its logits depend on the whole state."""

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


def replay(policy, ids, path, transition):
    """The log-probability of every step of a trajectory: (B, T)"""
    B, T, _ = path.noise.shape
    b, t = torch.cartesian_prod(torch.arange(B), torch.arange(T)).unbind(1)
    with torch.no_grad():
        return M.replay_logprob(policy, ids, path, b, t, transition).view(B, T)


@pytest.fixture(scope="module")
def policy():
    """A small Policy of random weights with the shapes world's vocabulary."""
    return M.shapes_policy(tiny())


# --------------------------------------------------------------------------------------------------
# The policy


def sequence(policy, ids, tokens):
    """The ids of a whole sequence, put together by hand: (B, L)"""
    soi, eoi = (torch.full((len(ids), 1), edge) for edge in (policy.soi_id, policy.eoi_id))
    return torch.cat([ids, soi, tokens + policy.offset, eoi], dim=1)


def test_text_is_laid_out_as_in_show_o(policy):
    """[t2i, bos, words, eos], left padded; bos is never doubled; a cut text keeps its end token."""
    bos, pad, t2i = policy.bos_id, policy.pad_id, policy.t2i_id
    words = policy.tokenize("a red star and a circle")
    assert policy.encode(["a red star and a circle", ""]).tolist() == [[t2i, bos, *words, bos],
                                                                       [pad, pad, t2i, bos, bos]]
    assert policy.encode(["<|endoftext|> and a circle"])[0].tolist() == [t2i, bos, words[1], bos]
    with pytest.warns(UserWarning, match="captions of more than 126 tokens are cut"):
        long = policy.encode(["a star" + " and a star" * 200])[0].tolist()
    assert len(long) == policy.max_text + 1 and long[:2] == [t2i, bos] and long[-1] == bos
    assert (policy.soi_id, policy.eoi_id, t2i) == (pad + 1, pad + 2, pad + 5)
    assert policy.offset == pad + 10


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


def test_the_picture_sees_text_and_picture_but_text_sees_no_picture(policy):
    """Behaviour instead of masks: which outputs move when one input moves."""
    ids = policy.encode(["a red star"])
    tokens = torch.randint(policy.codebook_size + 1, (1, 36), generator=seeded(0))
    for changed in (0, 17, 35):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % policy.codebook_size
        assert ((policy(ids, tokens) - policy(ids, other)).abs().amax(-1) > 0).all()
    other_word = policy(policy.encode(["a blue star"]), tokens)
    assert ((policy(ids, tokens) - other_word).abs().amax(-1) > 0).all()

    def text_states(tokens):
        mask = policy.attention_mask(ids)
        whole = sequence(policy, ids, tokens)
        return policy.showo.model(whole, attention_mask=mask, use_cache=False)[0][:, :ids.shape[1]]

    assert torch.equal(text_states(tokens), text_states(tokens.flip(1)))


def test_pads_change_nothing(policy):
    """A short prompt gets the same logits alone and padded to a long one beside it."""
    tokens = torch.full((2, 36), policy.codebook_size)
    alone = policy(policy.encode(["a star"]), tokens[:1])
    padded = policy(policy.encode(["a star", "a red circle and a blue star"]), tokens)
    assert torch.allclose(padded[:1], alone, atol=1e-4)


def test_logits_are_the_whole_models_at_positions_and_codes_of_the_picture(policy):
    """Slicing before the head is applied equals slicing the logits of all ids at all positions."""
    ids, tokens = policy.encode(["a star"]), torch.full((1, 36), policy.codebook_size)
    whole = sequence(policy, ids, tokens)
    assert whole[0, -2] == policy.showo.config.vocab_size - 1                      # MASK is last
    logits = policy.showo(whole, attention_mask=policy.attention_mask(ids), use_cache=False).logits
    assert torch.allclose(policy(ids, tokens), logits[:, -37:-1, policy.offset:-1], atol=1e-5)


def test_learning_and_acting_modes_agree(policy):
    """With dropout the ratio would not start at 1."""
    ids, tokens = policy.encode(["a star"]), torch.full((1, 36), policy.codebook_size)
    assert torch.equal(policy.train()(ids, tokens), policy.eval()(ids, tokens))


def test_decoding_gives_the_tiles_back(policy):
    """Code c at row r, column q is tile c at pixels (8 r, 8 q), to the bit."""
    tokens = torch.arange(36)[None] + 13
    picture = policy.decode(tokens)[0]
    assert picture.shape == (48, 48, 3) and picture.dtype == torch.uint8
    for position, code in enumerate(tokens[0]):
        y, x = 8 * (position // 6), 8 * (position % 6)
        assert torch.equal(picture[y:y + 8, x:x + 8], R.tiles()[code])


# --------------------------------------------------------------------------------------------------
# The schedule and the probability of a step


def test_schedule_equals_the_published_samplers():
    """Show-o's numbers but for its last step, which leaves one masked; float32 decides at 2/3."""
    schedule = M.mask_schedule(50, 1024)
    assert schedule[:10] == [1023, 1021, 1019, 1015, 1011, 1005, 999, 991, 983, 973]
    assert schedule[-4:] == [96, 64, 32, 0]
    assert M.mask_schedule(16, 256) == [254, 251, 244, 236, 225, 212, 197, 181, 162, 142, 120, 97,
                                        74, 49, 25, 0]
    assert (M.mask_schedule(12, 36)[7], M.mask_schedule(18, 36)[11], M.mask_schedule(6, 16)[3]) == (
        17, 17, 7)
    assert M.mask_schedule(4, 16) == [14, 11, 6, 0] and M.mask_schedule(1, 9) == [0]
    assert M.mask_schedule(14, 36)[0] == 35 and M.mask_schedule(14, 36)[6] == 36 - 11


@pytest.mark.parametrize("N", [1, 5, 36, 256])
def test_every_step_of_every_schedule_reveals_a_token(N):
    """None is revealed twice, none is left over."""
    for T in range(1, min(N, 64) + 1):
        schedule = M.mask_schedule(T, N)
        assert len(schedule) == T and schedule[-1] == 0
        assert all(before > after for before, after in zip([N] + schedule, schedule))


HAND = torch.tensor([[[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]]]).log()                 # p_0 and p_1
LIFT_1 = [0.0, math.log(1.5)]                                                   # noise: .6 -> .9
LOWER_BOTH = [math.log(0.2), math.log(0.1)]                                     # .14 and .06


@pytest.mark.parametrize("transition, revealed, noise, expected", [
    # position 0 is kept with its .7; all of p_1 is below, so position 1 was sure to lose
    ("p2", 0, None, 0.7),
    ("p1", 0, None, 0.7 * (0.6 + 0.3 + 0.1)),
    ("ar", 0, None, 0.7 * 0.1),
    # position 1 is kept with its .6: position 0 drew .2 or .1, for its .7 would have won
    ("p2", 1, None, 0.6),
    ("p1", 1, None, 0.6 * (0.2 + 0.1)),
    ("ar", 1, None, 0.6 * 0.2),
    # noise lifts position 1 to .9: now even .7 loses, which Eq. 14 as printed does not see
    ("p1", 1, LIFT_1, 0.6 * (0.7 + 0.2 + 0.1)),
    ("p1_literal", 1, LIFT_1, 0.6 * (0.2 + 0.1)),
    # noise weighs on both sides: .06 is below .14
    ("p1", 0, LOWER_BOTH, 0.7 * (0.6 + 0.3 + 0.1)),
])
def test_transition_by_hand(transition, revealed, noise, expected):
    """Two positions, three codes: one reveals its code 0, the other drew another and stays."""
    step = torch.tensor([[0, 1]] if revealed == 0 else [[1, 0]])
    tokens = torch.where(step == 0, 0, 3)
    drawn = torch.tensor([[0, 2]] if revealed == 0 else [[1, 0]])
    noise = None if noise is None else torch.tensor([noise])
    got = M.transition_logprob(HAND, tokens, step, 0, transition, noise, drawn)
    assert got.shape == (1,) and got.exp().item() == pytest.approx(expected, rel=1e-5)


def next_states(logits, n):
    """The sampler by brute force, without noise: state (MASK is -1) -> probability.

    Plain Python, and not a word of Eq. 14: go through all draws, rank them, keep the n best.
    """
    p, outcome = logits.softmax(-1).tolist(), {}
    for draw in itertools.product(range(len(p[0])), repeat=len(p)):
        best = sorted(range(len(p)), key=lambda j: -p[j][draw[j]])[:n]
        state = tuple(k if j in best else -1 for j, k in enumerate(draw))
        chance = math.prod(p[j][k] for j, k in enumerate(draw))
        outcome[state] = outcome.get(state, 0) + chance
    return outcome


def probability(logits, states, transition, noise=None):
    """exp(transition_logprob) of reaching each state (MASK is -1) from an all-masked one: (S,)"""
    states = torch.tensor(states)                                               # (S, N)
    logits = logits.expand(len(states), *logits.shape)                          # (S, N, K)
    noise = None if noise is None else noise.expand(len(states), -1)            # (S, N)
    step = (states < 0).long()
    return M.transition_logprob(logits, states.clamp(min=0), step, 0, transition, noise).exp()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_p1_without_noise_is_a_probability_and_p2_is_none(n, seed):
    """3 tokens, 3 codes, all 27 draws: p1 is the chance of each next state. p2 sums to above 1."""
    logits = torch.randn(3, 3, generator=seeded(seed))
    truth = next_states(logits, n)
    p1, p2 = (probability(logits, list(truth), transition) for transition in ("p1", "p2"))
    assert torch.allclose(p1, torch.tensor(list(truth.values())), atol=1e-6)
    assert p1.sum().item() == pytest.approx(1, abs=1e-5)
    assert p2.sum().item() > 1.01


@pytest.mark.parametrize("seed", range(5))
def test_p1_given_the_noise_is_the_frequency_of_the_step(seed):
    """Hold the noise; draw, rank and count. The literal formula is far off somewhere."""
    generator, draws, n = seeded(seed), 200_000, 2
    logits, noise = torch.randn(4, 3, generator=generator), torch.randn(4, generator=generator)
    drawn = torch.multinomial(logits.softmax(-1), draws, True, generator=generator)
    confidence = logits.log_softmax(-1).gather(1, drawn).T + noise              # (draws, 4)
    loser = confidence.argsort(1, descending=True)[:, n:]
    states, counts = drawn.T.scatter(1, loser, -1).unique(dim=0, return_counts=True)
    frequency = counts / draws
    p1, literal = (probability(logits, states.tolist(), transition, noise)
                   for transition in ("p1", "p1_literal"))
    assert ((p1 - frequency).abs() < 5 * (p1 * (1 - p1) / draws).sqrt() + 1e-6).all()
    assert (literal - frequency).abs().max() > 0.02


@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_of_p1_is_the_mean_of_that_of_ar(seed):
    """Rao-Blackwell: over all draws that leave one picture behind, ar differs from p1 by noise."""
    generator = seeded(seed)
    logits = torch.randn(1, 3, 3, generator=generator).double().requires_grad_()
    noise = torch.randn(1, 3, generator=generator).double()
    drawn = torch.cartesian_prod(*[torch.arange(3)] * 3)                        # (27, 3)
    logp = logits.log_softmax(-1).expand(27, 3, 3).gather(2, drawn[..., None])[..., 0]
    step = (logp + noise < (logp + noise).amax(1, keepdim=True)).long()         # keep the surest
    state = drawn.where(step == 0, 3).unique(dim=0, return_inverse=True)[1]     # (27,) its number

    def gradient(i, transition):
        score = M.transition_logprob(logits, drawn[i:i + 1], step[i:i + 1], 0, transition, noise,
                                     drawn[i:i + 1])
        return torch.autograd.grad(score, logits)[0].flatten()

    ar, p1 = (torch.stack([gradient(i, transition) for i in range(27)])
              for transition in ("ar", "p1"))
    chance = logp.sum(1).exp().detach()[:, None]                                # (27, 1)
    for same in torch.nn.functional.one_hot(state).T.bool():                    # (27,) each
        mean = (ar[same] * chance[same]).sum(0) / chance[same].sum()
        assert torch.allclose(mean, p1[same][0], atol=1e-10)
    length = [(chance * g.pow(2)).sum() for g in (ar, p1)]
    assert length[0] > 1.2 * length[1]


def test_p1_is_not_p2():
    """A threshold stored as a bool makes every p < True, so the inner sum is 1."""
    path, table = sample(TablePolicy()), TablePolicy(seed=1)
    b, t = torch.arange(8), torch.ones(8, dtype=torch.long)
    p1, p2 = (M.replay_logprob(table, path.tokens, path, b, t, transition)
              for transition in ("p1", "p2"))
    assert (p1 < p2 - 1e-3).any() and (p1 <= p2 + 1e-6).all()


def test_what_was_sampled_is_possible_under_p1_but_not_always_as_printed():
    """The inner sum of the literal formula can be empty, which shows as its floor."""
    table = TablePolicy(N=12, K=4, scale=2.0)
    path = sample(table, 200, 6)
    p1, literal = (replay(table, path.tokens, path, transition)
                   for transition in ("p1", "p1_literal"))
    assert p1.min() > M.FLOOR / 2
    assert literal.min() < M.FLOOR / 2 and literal.isfinite().all()


def test_at_temperature_zero_p1_is_the_formula_as_printed():
    """No noise, nothing to take as given."""
    path = sample(TablePolicy(), temperature=0.0)
    p1, literal = (replay(TablePolicy(), path.tokens, path, transition)
                   for transition in ("p1", "p1_literal"))
    assert torch.equal(p1, literal)


def test_a_step_that_became_impossible_stays_finite_in_value_and_gradient():
    """Position 0 was kept, and under these logits anything that position 1 draws would have won."""
    logits = torch.tensor([[[0.0, 0.0, 0.0], [0.0, -200.0, -200.0]]], requires_grad=True)
    tokens, step = torch.tensor([[0, 3]]), torch.tensor([[0, 1]])
    noise = torch.tensor([[0.0, 300.0]])
    logp = M.transition_logprob(logits, tokens, step, 0, "p1", noise)
    logp.sum().backward()
    assert logp.isfinite().all() and logp < -40 and logits.grad.isfinite().all()


@pytest.mark.parametrize("transition", M.TRANSITIONS)
def test_extreme_logits_in_half_precision_stay_finite(transition):
    """Log(softmax), or any softmax in half precision, would give log 0."""
    logits = (torch.randn(4, 6, 50, generator=seeded(0)) * 1000).bfloat16()
    step, tokens = torch.arange(6).expand(4, 6) % 3, torch.zeros(4, 6, dtype=torch.long)
    logp = M.transition_logprob(logits, tokens, step, 1, transition, torch.zeros(4, 6), tokens)
    assert logp.dtype == torch.float32 and logp.isfinite().all()


@pytest.mark.parametrize("transition", M.TRANSITIONS)
def test_any_pictures_and_steps_form_a_batch(transition):
    """t may differ per sample: together, alone, and with t as an int, the scores agree."""
    table, b, t = TablePolicy(), torch.arange(4), torch.tensor([3, 0, 2, 1])
    path = sample(table, B=4)
    together = M.replay_logprob(table, path.tokens, path, b, t, transition)
    alone = [M.replay_logprob(table, path.tokens, path, b[i:i + 1], t[i:i + 1], transition)
             for i in b]
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    logits = table(None, path.tokens.masked_fill(path.revealed_at >= 2, 5))
    as_int = M.transition_logprob(logits, path.tokens, path.revealed_at, 2, transition,
                                  path.noise[:, 2], path.drawn[:, 2])
    assert torch.allclose(together[2], as_int[2], atol=1e-5)


def test_num_factors_counts_what_is_multiplied():
    """Step 1 of [0, 1, 1, 2, 2, 2] reveals two tokens; with those remasked it has five factors."""
    step, t = torch.tensor([[0, 1, 1, 2, 2, 2]]), torch.tensor([1])
    factors = [M.num_factors(step, t, transition).item() for transition in M.TRANSITIONS]
    assert factors == [5, 5, 2, 5]


# --------------------------------------------------------------------------------------------------
# The sampler


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
    """The policy remembers what it was shown, and the replay must show the same."""
    table = TablePolicy(N=8)
    path = sample(table, B=5)
    acted, table.states = table.states, []
    for t in range(4):
        M.replay_logprob(table, path.tokens, path, torch.arange(5), torch.full((5,), t), "ar")
    assert all(torch.equal(a, b) for a, b in zip(acted, table.states, strict=True))
    assert (acted[0] == 5).all() and (acted[3] == 5).any()


def test_draws_follow_the_policy_and_the_surest_are_kept():
    """At temperature 0: frequencies of the first draws, and which of them the first step keeps."""
    table = TablePolicy(N=3, K=3)
    path = sample(table, B=20_000, steps=3, temperature=0.0)
    p = table(None, torch.full((1, 3), 3))[0].softmax(-1)                       # (3, 3)
    frequency = torch.nn.functional.one_hot(path.drawn[:, 0], 3).float().mean(0)
    assert (frequency - p).abs().max() < 0.02
    chance = p.expand(20_000, 3, 3).gather(-1, path.drawn[:, 0, :, None]).squeeze(-1)
    assert (chance.argmax(1) == (path.revealed_at == 0).int().argmax(1)).all()


def test_noise_is_gumbel_and_its_temperature_compounds():
    """Temperature 2 falls to 1.5, .75, .1875, 0. Gumbel: mean .577, std pi / sqrt 6."""
    path = sample(TablePolicy(N=4), B=50_000, temperature=2.0)
    for t, temperature in enumerate([1.5, 0.75, 0.1875, 0.0]):
        mean, std = path.noise[:, t].mean().item(), path.noise[:, t].std().item()
        assert mean == pytest.approx(0.5772 * temperature, abs=0.02)
        assert std == pytest.approx(math.pi / 6 ** 0.5 * temperature, abs=0.02)


def test_gumbel_noise_is_finite_at_both_ends(monkeypatch):
    """An exponential can come out as 0; the log of it must not get through."""
    ends = torch.tensor([0.0, 0.5, math.inf])
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, **_: self.copy_(ends))
    assert M.gumbel((3,), None, "cpu").isfinite().all()


def test_guidance_is_one_plus_w_conditional_minus_w_unconditional():
    """At w = 1.5: a policy of these logits samples the same pictures without it."""
    conditional, empty = TablePolicy(seed=1), TablePolicy(seed=2)

    class Both(TablePolicy):
        """The one for prompt 0, the other for prompt -1."""

        def __call__(self, prompt_ids, tokens):
            return (empty if prompt_ids[0, 0] < 0 else conditional)(prompt_ids, tokens)

    class Guided(TablePolicy):
        """What guidance should make of the two."""

        def __call__(self, prompt_ids, tokens):
            return 2.5 * conditional(None, tokens) - 1.5 * empty(None, tokens)

    path = sample(Both(), 200, guidance=1.5, null_ids=torch.full((200, 1), -1))
    assert same(path, sample(Guided(), 200))
    assert not torch.equal(path.tokens, sample(conditional, 200).tokens)


def test_the_same_seed_samples_the_same_and_another_does_not():
    """All randomness comes from the generator."""
    one, same, other = (sample(TablePolicy(), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.tokens, same.tokens) and not torch.equal(one.tokens, other.tokens)


# --------------------------------------------------------------------------------------------------
# Advantage and filter


def test_advantage_by_hand():
    """[1, 2, 3]: mean 2, unbiased std 1. [0, 0, 6]: mean 2, std sqrt 12. Each group by its own."""
    got = M.group_advantage(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]]))
    root = 12 ** 0.5
    expected = torch.tensor([[-1.0, 0.0, 1.0], [-2 / root, -2 / root, 4 / root]])
    assert torch.allclose(got, expected, atol=1e-3)


def test_a_group_of_equal_rewards_teaches_nothing():
    """0 where rewards are equal, small where they differ by rounding only."""
    assert M.group_advantage(torch.full((1, 6), 0.3)).abs().max() < 1e-3
    assert M.group_advantage(torch.tensor([[1.0, 1.0 + 1e-6, 1.0]])).abs().max() < 0.05


def test_the_filter_keeps_all_at_first_and_then_cuts_at_its_quantile():
    """History after 100 groups: nine fives and 1..91, the 10th percentile near 5."""
    sieve = M.SampleFilter(quantile=0.1, warmup=10)
    assert sieve.keep(torch.full((9,), 5.0)).all()
    assert sieve.keep(torch.arange(1.0, 92.0)).all()
    assert sieve.keep(torch.tensor([0.0, 0.5, 50.0])).tolist() == [False, False, True]
    assert M.SampleFilter(quantile=0.0, warmup=0).keep(torch.zeros(5)).all()    # switched off


def test_a_group_without_spread_vanishes_even_if_nothing_is_below_the_quantile():
    """Binary rewards soon make the 10th percentile 0, and no std is less than 0."""
    sieve = M.SampleFilter(quantile=0.1, warmup=10)
    sieve.keep(torch.zeros(50))
    assert sieve.keep(torch.tensor([0.0, 0.5])).tolist() == [False, True]


def test_resampling_replaces_the_vanished_and_is_bounded(policy):
    """Every second group gets equal rewards: 4 are sampled, then 2, then 1, and all are found."""
    config, sieve, calls = tiny(groups=4, filter_tries=3), M.SampleFilter(0.1, warmup=0), []
    sieve.history.extend([0.0, 0.5])

    def half_vanish(images, prompts):
        calls.append(len(prompts) // 4)
        index = torch.arange(len(prompts))
        return (index // 4 % 2 == 0) * (index % 2).float()

    texts, path, kept, every = M.sample_groups(policy, half_vanish, ["a star"], sieve, config,
                                               seeded(0))
    assert calls == [4, 2, 1] and len(every) == 7
    assert len(texts) == len(path.tokens) == kept.numel() == 16 and path.noise.shape == (16, 4, 36)
    assert (kept.std(1) > 0).all()

    def all_vanish(images, prompts):
        return torch.zeros(len(prompts))

    texts, path, kept, every = M.sample_groups(policy, all_vanish, ["a star"], sieve, config,
                                               seeded(0))
    assert len(texts) == len(path.tokens) == len(kept) == 0 and len(every) == 4 * (1 + 3)


# --------------------------------------------------------------------------------------------------
# The loss


def test_loss_is_zero_but_gradient_is_not():
    """The most asked GRPO question. At ratio 1 the loss is -mean(A) = 0; its gradient is -A / M."""
    advantage = M.group_advantage(torch.tensor([[1.0, 0.0, 0.0, 1.0]])).flatten()
    logp = torch.full((4,), -3.0, requires_grad=True)
    loss, _ = M.grpo_loss(logp, logp.detach(), advantage, 0.1, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.allclose(logp.grad, -advantage / 4) and logp.grad.abs().min() > 0.2


@pytest.mark.parametrize("advantage, ratio, flows", [
    (1, 1.3, False), (1, 1.15, True), (1, 0.5, True),
    (-1, 0.5, False), (-1, 0.95, True), (-1, 1.3, True)])
def test_clipping_stops_only_what_would_push_further_out(advantage, ratio, flows):
    """Bounds .9 and 1.2: a good sample is not pushed above, a bad one not below; back is free."""
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, numbers = M.grpo_loss(logp, torch.zeros(1), torch.tensor([float(advantage)]), 0.1, 0.2)
    loss.backward()
    assert (logp.grad.abs().item() > 0) == flows and numbers["clip"].item() == (not flows)
    assert numbers["ratio"].item() == pytest.approx(ratio)


def test_the_minimum_is_taken_per_sample():
    """Ratios 2 and .5, A = 1: (1.2 + .5) / 2 = .85; the least of the means is 1.05."""
    loss, _ = M.grpo_loss(torch.tensor([2.0, 0.5]).log(), torch.zeros(2), torch.ones(2), 0.1, 0.2)
    assert loss.item() == pytest.approx(-0.85)


@pytest.mark.parametrize("transition", M.TRANSITIONS)
def test_gradient_agrees_with_finite_differences(transition):
    """d loss / d logits for 2 pictures of 2 tokens and 3 codes in float64, away from ratio 1."""
    generator = seeded(3)
    logits = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(2, 2, generator=generator, dtype=torch.float64)
    tokens, step = torch.tensor([[0, 2], [1, 1]]), torch.tensor([[0, 1], [1, 0]])
    drawn, advantage = torch.tensor([[0, 2], [1, 1]]), torch.tensor([1.0, -2.0]).double()

    def logp(logits):
        return M.transition_logprob(logits, tokens, step, 0, transition, noise, drawn)

    old = logp(logits.detach()) + torch.tensor([0.05, -0.05])

    def loss(logits):
        return M.grpo_loss(logp(logits), old, advantage, 0.1, 0.2)[0]

    assert torch.autograd.gradcheck(loss, (logits,), eps=1e-6, atol=1e-7)
    assert torch.autograd.grad(loss(logits), logits)[0].abs().max() > 1e-3


def test_k3_is_zero_at_equality_and_a_kl_elsewhere():
    """Its mean under p is KL(p || q) = sum p log p/q, and its gradient is real."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    assert (M.kl_k3(p.log(), p.log()) == 0).all()
    kl = (p * (p / q).log()).sum().item()
    assert (p * M.kl_k3(p.log(), q.log())).sum().item() == pytest.approx(kl, rel=1e-5)
    logp = p.log().requires_grad_()
    assert torch.autograd.grad(M.kl_k3(logp, q.log()).sum(), logp)[0].abs().min() > 0
    assert torch.autograd.grad(M.kl_k3(logp, p.log()).sum(), logp)[0].abs().max() < 1e-6


# --------------------------------------------------------------------------------------------------
# One update


@pytest.fixture
def batch_of(policy):
    """Prompt ids, trajectory and advantage of 4 pictures, for a given Config."""
    def make(config):
        ids = policy.encode(["a red star", "two circles"] * 2)
        path = M.rollout(policy, ids, config.steps, generator=seeded(0))
        return ids, path, torch.tensor([1.0, -1.0, 0.5, -0.5])
    return make


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradient it is given, and at learning rate 0 changes nothing."""

    def step(self, closure=None):
        """Note the gradient as one vector."""
        parameters = self.param_groups[0]["params"]
        self.seen = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        return super().step(closure)


def gradient(policy, config, batch, reference=None):
    """What learn() hands to the optimizer, and its log."""
    optimizer = Recorder(policy.parameters(), lr=0.0)
    log = M.learn(policy, reference, optimizer, *batch, config, seeded(0))
    return optimizer.seen, log


@pytest.mark.parametrize("transition", M.TRANSITIONS)
def test_ratio_is_one_before_the_first_update_for_every_step(policy, batch_of, transition):
    """In other batches and with gradients the learner finds what the sampler did."""
    config, seen = tiny(transition=transition), []
    hook = policy.register_forward_hook(lambda *call: seen.append(call[-1]))
    ids, path, _ = batch_of(config)
    hook.remove()
    old = torch.stack([
        M.transition_logprob(logits, path.tokens, path.revealed_at, t, transition,
                             path.noise[:, t], path.drawn[:, t])
        for t, logits in enumerate(seen)])                                      # (T, B)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(config.steps)).flip(0)
    for b, t in (chunk.unbind(1) for chunk in pairs.split(3)):
        logp = M.replay_logprob(policy, ids, path, b, t, transition)
        assert logp.requires_grad and (logp - old[t, b]).abs().max() < 1e-4


def test_the_gradient_at_ratio_one_is_the_one_derived_by_hand(policy, batch_of):
    """-(1 / (B T)) sum of A grad log p over pictures and steps, with 1 / T once."""
    config = tiny(max_grad_norm=1e9, groups=1)
    ids, path, advantage = batch_of(config)
    total = 0
    for t in range(config.steps):
        logp = M.replay_logprob(policy, ids, path, torch.arange(4), torch.full((4,), t), "p1")
        total = total - (advantage * logp).sum() / (4 * config.steps)
    parameters = list(policy.parameters())
    parts = torch.autograd.grad(total, parameters, allow_unused=True)
    by_hand = torch.cat([part.flatten() for part in parts if part is not None])
    got, log = gradient(policy, config, (ids, path, advantage))
    assert torch.allclose(got, by_hand, atol=1e-5) and by_hand.abs().max() > 1e-3
    assert log["grad"] == pytest.approx(by_hand.norm().item(), rel=1e-3)
    config.max_grad_norm = 0.01
    clipped, _ = gradient(policy, config, (ids, path, advantage))
    assert clipped.norm().item() == pytest.approx(0.01, rel=0.01)


def test_micro_batches_never_change_the_gradient(policy, batch_of):
    """Memory is a knob that leaves the mathematics alone."""
    batch, whole = batch_of(tiny()), None
    for size in (999, 1, 3, 7, 16):
        got, _ = gradient(policy, tiny(micro_batch=size), batch)
        whole = got if whole is None else whole
        assert torch.allclose(got, whole, atol=1e-6)


@pytest.mark.parametrize("k, reduction, expected", [
    (0, "random", [0, 1, 2, 3]), (4, "random", [0, 1, 2, 3]), (0, "last", [0, 1, 2, 3]),
    (2, "first", [0, 1]), (2, "last", [2, 3]), (1, "last", [3])])
def test_score_steps_scores_every_step_or_the_first_or_the_last(policy, batch_of, monkeypatch, k,
                                                                reduction, expected):
    """Of T = 4, for each of four pictures."""
    scored, original = [], M.replay_logprob
    monkeypatch.setattr(M, "replay_logprob",
                        lambda *a: scored.extend(zip(*map(torch.Tensor.tolist, a[3:5])))
                        or original(*a))
    gradient(policy, tiny(score_steps=k, reduction=reduction), batch_of(tiny()))
    assert sorted(scored) == [*itertools.product(range(4), expected)]
    with pytest.raises(KeyError, match="middle"):       # from Python; the command line has its line
        gradient(policy, tiny(score_steps=k, reduction="middle"), batch_of(tiny()))


def test_random_steps_differ_between_pictures_and_updates():
    """Two of five steps: never one twice, every pair equally often, the same ones for a seed."""
    config, generator = tiny(score_steps=2), seeded(0)
    pairs = [M.scored_steps(1000, 5, config, generator) for _ in range(2)]      # (2000, 2) each
    assert not torch.equal(*pairs)
    assert torch.equal(pairs[0], M.scored_steps(1000, 5, config, seeded(0)))
    assert all(x[:, 0].tolist() == sorted([*range(1000)] * 2) for x in pairs)
    counts = collections.Counter(map(tuple, torch.cat(pairs)[:, 1].view(-1, 2).tolist()))
    assert set(counts) == {*itertools.combinations(range(5), 2)}
    assert max(abs(n - 200) for n in counts.values()) < 5 * (200 * 0.9) ** 0.5


def test_random_steps_give_the_full_gradient_on_average(policy, batch_of, monkeypatch):
    """Over all six choices of two of T = 4 steps. One choice alone gives another one."""
    batch = batch_of(tiny())
    whole, _ = gradient(policy, tiny(max_grad_norm=1e9), batch)
    config, parts = tiny(score_steps=2, max_grad_norm=1e9), []
    for choice in itertools.combinations(range(4), 2):
        monkeypatch.setattr(M, "scored_steps", lambda B, *_: torch.cartesian_prod(
            torch.arange(B), torch.tensor(choice)))
        parts.append(gradient(policy, config, batch)[0])
    mean = torch.stack(parts).mean(0)
    assert torch.allclose(mean, whole, rtol=1e-3, atol=1e-5 * whole.abs().max().item())
    assert (parts[0] - whole).norm() > 0.05 * whole.norm()


def test_later_epochs_leave_ratio_one_and_clipping_acts(batch_of):
    """Against a detached copy of itself a log-probability has ratio 1 for ever."""
    fresh, config = M.shapes_policy(tiny()), tiny(inner_epochs=2, groups=1)
    optimizer, batch = torch.optim.SGD(fresh.parameters(), lr=1.0), batch_of(config)
    assert gradient(fresh, tiny(groups=1), batch)[1]["ratio"] == pytest.approx(1, abs=1e-4)
    log = M.learn(fresh, None, optimizer, *batch, config, seeded(0))
    assert abs(log["ratio"] - 1) > 1e-3 and log["clip"] > 0


def test_the_length_normalised_ratio_is_the_mean_per_factor(policy, batch_of, monkeypatch):
    """p1 multiplies over all positions that were masked before the step, so by their number."""
    config = tiny(length_normalize=True, micro_batch=999)
    ids, path, advantage = batch_of(config)
    seen, original = [], M.grpo_loss
    monkeypatch.setattr(M, "grpo_loss", lambda *a: seen.append(a) or original(*a))
    gradient(policy, config, (ids, path, advantage))
    t = torch.arange(4).repeat(4)
    masked_before = torch.tensor([36] + M.mask_schedule(4, 36)[:-1])
    old = replay(policy, ids, path, "p1").flatten()                             # (B * T,)
    assert torch.allclose(seen[0][1], old / masked_before[t], atol=1e-5)
    assert torch.allclose(seen[0][0], seen[0][1], atol=1e-4)


def test_kl_changes_the_gradient_once_the_policy_has_left_its_reference(policy, batch_of):
    """Against itself beta does nothing; against other weights it does."""
    batch = batch_of(tiny())
    plain, log = gradient(policy, tiny(), batch)
    assert "kl" not in log
    same, log = gradient(policy, tiny(beta=1.0), batch, reference=policy)
    assert torch.allclose(plain, same, atol=1e-5) and log["kl"] == pytest.approx(0, abs=1e-6)
    other, log = gradient(policy, tiny(beta=1.0), batch, reference=M.shapes_policy(tiny(seed=5)))
    assert (plain - other).abs().max() > 1e-4 and log["kl"] > 0


def test_warmup_and_cosine():
    """Warm-up of 2: a third, two thirds, all. Half of it at half time, nothing at the end."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)

    def lr(i):
        got = M.set_lr(optimizer, 3.0, i, 2, 100)
        assert optimizer.param_groups[0]["lr"] == got
        return got / 3.0

    assert [lr(i) for i in range(3)] == pytest.approx([1 / 3, 2 / 3, 1], rel=1e-2)
    assert lr(50) == pytest.approx(0.5) and lr(100) == 0


# --------------------------------------------------------------------------------------------------
# The shapes world


def images_of(scenes):
    """Scenes (lists of 36 codes) as PIL images, pasted tile by tile."""
    images, tiles = [], R.tiles().numpy()
    for codes in scenes:
        images.append(Image.new("RGB", (48, 48)))
        for position, code in enumerate(codes):
            row, column = divmod(position, 6)
            images[-1].paste(Image.fromarray(tiles[code]), (8 * column, 8 * row))
    return images


def scene(*objects):
    """36 codes from (shape, colour, row, column)."""
    codes = [0] * 36
    for shape, color, row, column in objects:
        for quarter in range(4):
            position = 6 * (2 * row + quarter // 2) + 2 * column + quarter % 2
            codes[position] = 1 + 4 * R.OBJECTS.index((shape, color)) + quarter
    return codes


def test_the_world_is_large_enough_and_its_tiles_differ():
    """At least 36 tokens and 40 codes, no two of which look alike."""
    assert R.GRID ** 2 >= 36 and R.CODEBOOK_SIZE >= 40
    assert len(R.tiles()) == len(R.tiles().unique(dim=0)) == R.CODEBOOK_SIZE


def test_held_out_captions_share_no_meaning_with_the_others():
    """"a star and a circle" is never opposite "a circle and a star"."""
    trained, heldout = R.captions(False), R.captions(True)
    assert list(trained) == list(heldout) == list(R.CATEGORIES)
    every = [text for side in (trained, heldout) for texts in side.values() for text in texts]
    assert sorted(every) == sorted(caption for *_, caption in R.all_captions())
    assert len(every) == len(set(every))
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above",
                "and": "and"}
    for side in (trained, heldout):
        assert all(side.values())
        for caption in side["two"] + side["position"] + side["attribution"]:
            word = next(word for word in mirrored if f" {word} " in caption)
            first, second = caption.split(f" {word} ")
            reworded = f"{second} {mirrored[word]} {first}"
            assert any(reworded in texts for texts in side.values())


def test_every_drawing_is_right_for_its_caption_and_for_no_other_count():
    """The pretraining data, three of each caption, under the reward."""
    rng, texts = random.Random(0), [caption for *_, caption in R.all_captions()] * 3
    images = images_of([R.draw_scene(caption, rng) for caption in texts])
    assert R.shapes_correct(images, texts).eq(1).all()
    three = R.shapes_correct(images, ["three stars"] * len(texts))
    assert three.sum() == texts.count("three stars")


def test_all_objects_of_a_drawing_are_in_one_row_or_one_above_the_other():
    """Of every caption; among 20 drawings of each there are more than one such place."""
    rng = random.Random(0)
    for *_, caption in R.all_captions():
        above = "above" in caption or "below" in caption
        cells = R.look(images_of([R.draw_scene(caption, rng) for _ in range(20)])) >= 0   # (20, 9)
        places = {tuple(row.nonzero()[:, 0].tolist()) for row in cells}
        assert len(places) > 1
        for place in places:
            rows, columns = {cell // 3 for cell in place}, {cell % 3 for cell in place}
            assert len(columns if above else rows) == 1


def test_both_numbers_are_held_out_and_trained_on():
    """A base that only ever draws three of a kind must not pass on either side."""
    for heldout in (False, True):
        numbers = {caption.split()[0] for caption in R.captions(heldout)["counting"]}
        assert numbers == {"two", "three"}


def test_half_of_the_colours_left_open_are_red():
    """The rest are green and blue alike; a colour asked for is the one drawn."""
    rng, n = random.Random(0), 3000
    cells = R.look(images_of([R.draw_scene("a star", rng) for _ in range(n)])).amax(1)      # (n,)
    colors = [R.OBJECTS[o][1] for o in cells.tolist()]
    assert abs(colors.count("red") / n - 0.5) < 0.03
    assert abs(colors.count("green") / n - 0.25) < 0.03
    blue = R.look(images_of([R.draw_scene("a blue star", rng) for _ in range(20)])).amax(1)
    assert blue.eq(R.OBJECTS.index(("star", "blue"))).all()


def test_the_small_policys_words_are_phrases():
    """By hand; the vocabulary holds every phrase of every caption; the empty prompt has none."""
    assert R.phrases("a red star and a blue circle") == ["a red star", "and a blue circle"]
    assert R.phrases("a star left of a circle") == ["a star", "left of a circle"]
    assert R.phrases("two stars") == ["two stars"] and R.phrases("") == []
    policy = M.shapes_policy(tiny(layers=1))
    rows = [policy.tokenize(caption) for *_, caption in R.all_captions()]
    assert max(map(len, rows)) == 2 and len(set(map(tuple, rows))) == len(rows)
    assert sorted({id for row in rows for id in row}) == list(range(1, policy.pad_id))


def test_a_placed_embedding_adds_a_vector_per_place_counted_from_the_end():
    """By hand on three ids; all of it is trained, and the shapes policy has one."""
    embedding = M.PlacedEmbedding(5, 2, places=4)
    ids = torch.tensor([[3, 0, 3], [1, 2, 4]])
    expected = torch.stack([embedding.weight[row] + embedding.place[1:] for row in ids])
    assert torch.equal(embedding(ids), expected)
    assert torch.equal(embedding(ids[:, 1:]), expected[:, 1:])
    assert embedding.place.requires_grad and 0.02 < embedding.place.std() < 0.2
    own = M.shapes_policy(tiny(layers=1))
    assert isinstance(own.showo.model.embed_tokens, M.PlacedEmbedding)
    assert "showo.model.embed_tokens.place" in own.state_dict()


def test_show_o_has_show_os_temperature():
    """The shapes world's noise is for the shapes world."""
    assert M.Config().temperature == 2.0
    assert M.parse(["--model", "showlab/show-o-512x512"]).temperature == 1.0


@pytest.mark.parametrize("caption, objects, right", [
    ("a star", [("star", "red", 0, 0)], True),
    ("a star", [], False),
    ("a star", [("circle", "red", 0, 0)], False),
    ("a star", [("star", "red", 0, 0), ("star", "red", 2, 2)], False),           # one too many
    ("a star", [("star", "red", 0, 0), ("circle", "red", 1, 1)], False),         # uncalled for
    ("two stars", [("star", "red", 0, 0), ("star", "blue", 1, 1)], True),        # of any colours
    ("three stars", [("star", "red", 0, 0), ("star", "blue", 1, 1)], False),
    ("a red star", [("star", "blue", 0, 0)], False),
    ("a circle and a star", [("star", "red", 0, 0), ("circle", "red", 0, 1)], True),
    ("a circle and a star", [("circle", "red", 0, 0), ("circle", "red", 0, 1)], False),
    ("a circle left of a star", [("circle", "red", 2, 0), ("star", "red", 0, 1)], True),
    ("a circle left of a star", [("circle", "red", 0, 1), ("star", "red", 0, 0)], False),
    ("a circle left of a star", [("circle", "red", 0, 1), ("star", "red", 2, 1)], False),
    ("a circle right of a star", [("circle", "red", 0, 1), ("star", "red", 0, 0)], True),
    ("a circle above a star", [("circle", "red", 0, 2), ("star", "red", 1, 0)], True),
    ("a circle below a star", [("circle", "red", 0, 2), ("star", "red", 1, 0)], False),
    ("a red circle and a blue star", [("star", "blue", 0, 0), ("circle", "red", 1, 1)], True),
    ("a red circle and a blue star", [("star", "red", 0, 0), ("circle", "blue", 1, 1)], False)])
def test_shapes_reward_on_correct_and_subtly_wrong_pictures(caption, objects, right):
    """Number, shape, colour, relation and binding; rows are free when the columns decide."""
    assert R.shapes_correct(images_of([scene(*objects)]), [caption]).item() == right


@pytest.mark.parametrize("caption, objects, expected", [
    ("two stars", [], 0), ("two stars", [("star", "red", 0, 0)], 1 / 2),
    ("two stars", [("star", "red", 0, i) for i in range(2)], 1),
    ("two stars", [("star", "red", 0, i) for i in range(3)], 2 / 3),             # one too many
    ("two stars", [("star", "red", 0, 0), ("circle", "red", 0, 1)], 1 / 2),
    ("a red circle and a blue star", [("star", "red", 0, 0), ("circle", "red", 1, 1)], 1 / 2),
    ("a circle left of a star", [("circle", "red", 0, 1), ("star", "red", 0, 0)], 1 / 2)])
def test_reward_by_hand(caption, objects, expected):
    """What is right, in parts of what was asked for or drawn; half for the wrong relation."""
    reward = R.shapes_reward(images_of([scene(*objects)]), [caption])
    assert reward.item() == pytest.approx(expected) and reward.dtype == torch.float32


def test_shapes_reward_sees_a_misplaced_tile_and_tolerates_noise():
    """Two quarters exchanged, one of another colour, one missing, one stray: each is wrong."""
    good = scene(("star", "red", 1, 1))                             # at positions 14, 15, 20, 21
    exchanged, recolored, missing, stray = (list(good) for _ in range(4))
    exchanged[14], exchanged[15] = good[15], good[14]
    recolored[21] = 1 + 4 * R.OBJECTS.index(("star", "blue")) + 3
    missing[20] = 0
    stray[0] = 1
    images = images_of([good, exchanged, recolored, missing, stray])
    assert R.shapes_correct(images, ["a star"] * 5).tolist() == [1, 0, 0, 0, 0]
    assert R.shapes_reward(images, ["a star"] * 5).tolist() == [1, 0, 0, 0, 0.5]
    noise = np.random.default_rng(0).integers(-20, 21, (48, 48, 3))
    noisy = Image.fromarray((np.asarray(images[0]) + noise).clip(0, 255).astype(np.uint8))
    assert R.shapes_correct([noisy], ["a star"]).item() == 1


def test_the_shapes_reward_refuses_pictures_of_another_size():
    """Another size of picture, another caption."""
    with pytest.raises(ValueError, match="48 x 48"):
        R.shapes_reward([Image.new("RGB", (64, 64))], ["a star"])
    for caption in ("a dragon", "", "a very red star", "a star and"):
        with pytest.raises(ValueError, match="no caption"):
            R.shapes_reward(images_of([scene()]), [caption])


def test_pretraining_masks_by_the_cosine_law_and_empties_some_prompts(monkeypatch):
    """The mean share of masked tokens is 2 / pi; at dropout .5 half of the texts are empty."""
    policy, shares, texts = M.shapes_policy(tiny()), [], []
    forward, encode = M.Policy.forward, M.Policy.encode

    def noting_forward(self, ids, tokens):
        shares.append((tokens == self.codebook_size).float().mean())
        return forward(self, ids, tokens)

    def noting_encode(self, prompts):
        texts.extend(prompts)
        return encode(self, prompts)

    monkeypatch.setattr(M.Policy, "forward", noting_forward)
    monkeypatch.setattr(M.Policy, "encode", noting_encode)
    M.pretrain(policy, tiny(pretrain_steps=60), prompt_dropout=0.5)
    assert torch.stack(shares).mean().item() == pytest.approx(2 / math.pi, abs=0.05)
    assert texts.count("") / len(texts) == pytest.approx(0.5, abs=0.05)


# --------------------------------------------------------------------------------------------------
# The run


def red(images, prompts):
    """A reward that any policy can raise: the share of red pixels."""
    pixels = np.stack([np.asarray(image) for image in images]).astype(int)      # (B, H, W, 3)
    return torch.tensor((pixels[..., 0] - pixels[..., 2] > 100).mean((1, 2)), dtype=torch.float32)


@pytest.fixture(autouse=True)
def red_reward(monkeypatch):
    """Let every test of this file use it by name."""
    monkeypatch.setitem(R.REWARDS, "red", lambda device: red)


@pytest.fixture
def grids():
    """A test that asks for this has its picture grids drawn."""


@pytest.fixture(autouse=True)
def no_grids(monkeypatch, request):
    """All others do without, for they are a third of so short a run."""
    if "grids" not in request.fixturenames:
        monkeypatch.setattr(M, "save_grid", lambda *_: None)


def flags(**settings):
    """TINY and these settings as a command line."""
    settings = {**TINY, **settings}
    return [word for name in settings for word in (M.flag(name), str(settings[name]))]


def saved(folder):
    """The checkpoint of an output folder."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def run(folder, **settings):
    """Train at TINY settings -> closing numbers, checkpoint, rows of metrics.csv."""
    numbers = M.train(tiny(out=str(folder), **settings))
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return numbers, saved(folder), rows


def test_a_run_leaves_what_it_promises(tmp_path, capsys, grids):
    """Checkpoint, table of updates, pictures; a line per update, a table, a closing block."""
    numbers, _, rows = run(tmp_path, eval_every=1)
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert left == ["base.pt", "checkpoint.pt", "comparison.png", "metrics.csv",
                    "samples/update_00001.png", "samples/update_00002.png"]
    size = Image.open(tmp_path / "comparison.png").size             # 6 rows of 4 pairs of 96 x 96
    assert size == (4 * (2 * 96 + 28) + 12, 6 * (96 + 48) + 30)
    assert [int(row["update"]) for row in rows] == [1, 2] and list(rows[0]) == [
        "update", "reward", "reward_se", "live", "sampled", "ratio", "clip", "kl", "grad", "loss",
        "lr", "seconds", "heldout"]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    assert [float(row["lr"]) for row in rows] == [
        M.set_lr(optimizer, M.Config.lr, i, 1, 2) for i in range(2)]

    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("update ")]
    assert len(lines) == 2 and len(set(map(len, lines))) == 1 and "ratio 1.000" in lines[0]
    assert out.isascii()
    assert out.count("held-out captions") == 2 and all(name in out for name in R.CATEGORIES)
    block = dict(line.split(": ") for line in out.split("---\n")[1].splitlines())
    assert list(block) == list(numbers) == [
        "seed", "updates", "base", "trained", "heldout_base", "heldout_trained",
        "pretrain_seconds", "train_seconds", "peak_gpu_memory_mb"]
    assert float(block["peak_gpu_memory_mb"]) == 0 or torch.cuda.is_available()


def test_captions_in_the_grid_are_whole_and_only_long_ones_are_cut(tmp_path, monkeypatch):
    """The longest of the shapes world fits above two pictures, 200 words do not."""
    longest = max((caption for *_, caption in R.all_captions()), key=len)
    written, original = [], R.ImageDraw.ImageDraw.text
    monkeypatch.setattr(R.ImageDraw.ImageDraw, "text", lambda self, at, text, *more: written.append(
        (text, self.textlength(text, more[1]))) or original(self, at, text, *more))
    shown = torch.zeros(2, 1, 4), torch.zeros(2, 1, 4, 48, 48, 3, dtype=torch.uint8)
    captions = {"a": [longest, "cat " * 200, "a", "b"]}
    R.save_grid(tmp_path / "samples" / "x.png", "title", captions, shown, shown)
    assert (tmp_path / "samples" / "x.png").exists()
    texts = dict(written)
    assert texts[longest] < 2 * 96 + 28 and "cat " * 200 not in texts
    assert any(text.startswith("cat cat") and text.endswith(" ...") for text in texts)


def test_evaluation_repeats_its_noise(policy):
    """Twice the same policy, twice the same pictures: only weights can make a difference."""
    one, two = (M.evaluate(policy, red, [R.captions(True)], tiny()) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_training_raises_the_reward(tmp_path):
    """The slow one: from random weights to more red, on captions that it never trained on."""
    numbers, _, rows = run(tmp_path, reward="red", updates=25, groups=4, lr=3e-3, eval_pictures=8)
    assert numbers["heldout_trained"] > numbers["heldout_base"] + 0.1
    assert float(rows[-1]["reward"]) > float(rows[0]["reward"]) + 0.1


# A value of each setting that must change the outcome of a run, if the setting is not ignored ...
OTHER = dict(
    reward="shapes", seed=1, width=32, layers=2, pretrain_steps=3, steps=3,
    eval_steps=3, temperature=0.0, guidance=3.0, transition="p2", updates=3, groups=3,
    group_size=3, inner_epochs=2, length_normalize=True, clip_low=0.5, clip_high=0.0, beta=1.0,
    score_steps=1, reduction="last", filter_quantile=0.0, filter_tries=0, lr=1e-3, warmup=3,
    optimizer="adafactor", weight_decay=0.9, max_grad_norm=0.01, eval_pictures=5)
# ... and the test of each that changes none.
ELSEWHERE = dict(
    out="test_a_run_leaves_what_it_promises", eval_every="test_a_run_leaves_what_it_promises",
    resume="test_resuming_equals_never_having_stopped", device="test_bad_input_is_one_line",
    micro_batch="test_micro_batches_never_change_the_gradient",
    rollout_batch="test_rollout_batches_never_change_the_pictures",
    checkpointing="test_checkpointing_computes_twice_and_changes_nothing",
    model="test_show_o_from_folders_end_to_end", vq_model="test_show_o_from_folders_end_to_end",
    prompts="test_show_o_from_folders_end_to_end", weights="test_other_weights_replace_the_base",
    generate="test_generating_in_genevals_layout", samples="test_generating_in_genevals_layout")
# Clipping acts in later epochs only, a KL matters in later updates, the filter after 32 groups.
OCCASION = dict(
    clip_low=dict(inner_epochs=3, lr=3e-2), clip_high=dict(inner_epochs=4, lr=0.1, updates=3),
    reduction=dict(score_steps=1),
    filter_quantile=dict(updates=8, groups=16, group_size=2),
    filter_tries=dict(updates=8, groups=16, group_size=2))


def outcome(folder, settings):
    """Final weights and evaluation of a run on the red reward, as a list of tensors."""
    numbers, checkpoint, _ = run(folder, **{"reward": "red", **settings})
    return [*checkpoint["policy"].values(), torch.tensor(numbers["heldout_trained"])]


def same(one, two):
    """Whether two outcomes are equal, bit by bit."""
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The outcome without a change, made once per occasion."""
    made = {}

    def get(occasion):
        key = str(occasion)
        if key not in made:
            made[key] = outcome(tmp_path_factory.mktemp("usual"), occasion)
        return made[key]
    return get


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


def test_the_same_run_twice_has_the_same_outcome(tmp_path, usual, capsys):
    """Which is what gives the test above its meaning. The second time the base is reused."""
    assert same(outcome(tmp_path, {}), usual({}))
    assert "pretrain " in capsys.readouterr().out
    (tmp_path / "checkpoint.pt").unlink()
    assert same(outcome(tmp_path, {}), usual({}))
    assert "pretrain " not in capsys.readouterr().out


def test_a_base_of_other_settings_is_not_reused(tmp_path, capsys):
    """One that was trained for another number of steps is refused, and so is half of a file."""
    times = []
    for reused in (False, True):
        config = tiny(out=str(tmp_path), pretrain_steps=2)
        times.append(M.load_base(M.shapes_policy(config), config))
        assert ("pretrain " not in capsys.readouterr().out) == reused
    assert times[0] == times[1] > 0
    for name, value in dict(pretrain_steps=3, width=32, layers=2, seed=1).items():
        config = tiny(**{"out": str(tmp_path), "pretrain_steps": 2, name: value})
        with pytest.raises(M.Stop, match=r"base.pt .*delete it.* \[16, 1, 2, 0\]"):
            M.load_base(M.shapes_policy(config), config)
    path = tmp_path / "base.pt"
    path.write_bytes(path.read_bytes()[:1000])
    config = tiny(out=str(tmp_path), pretrain_steps=2)
    with pytest.raises(M.Stop, match="base.pt .*delete it or choose another --out"):
        M.load_base(M.shapes_policy(config), config)


# --------------------------------------------------------------------------------------------------
# Stopping and going on


def timeless(rows):
    """Rows of a log without what a clock says."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_resuming_equals_never_having_stopped(tmp_path, monkeypatch, capsys):
    """4 updates; and 2, Ctrl-C, --resume, 2 more: weights, optimizer, filter and log are equal.

    Before it is resumed, the log gets a row later than the checkpoint, as a killed run leaves it.
    """
    settings, cut = dict(reward="red", updates=4, filter_tries=0, beta=0.1), tmp_path / "cut"
    _, whole, rows = run(tmp_path / "whole", **settings)

    count = itertools.count(1)

    def red_and_ctrl_c(images, prompts):
        if next(count) == 4:                            # a trial, an evaluation and 2 updates
            signal.raise_signal(signal.SIGINT)
        return red(images, prompts)

    monkeypatch.setitem(R.REWARDS, "red", lambda device: red_and_ctrl_c)
    assert M.main(flags(out=cut, **settings)) == 130
    out = capsys.readouterr().out
    assert "stopped after update 2; resume with: python mask_grpo.py --resume --out" in out
    with open(cut / "metrics.csv", "a") as file:
        file.write("3,0.5\r\n")

    monkeypatch.setitem(R.REWARDS, "red", lambda device: red)
    assert M.main(["--resume", "--out", str(cut)]) == 0
    resumed = saved(cut)
    assert same(whole["policy"].values(), resumed["policy"].values())
    states = (checkpoint["optimizer"].values() for checkpoint in (whole, resumed))
    assert all(same(one.values(), two.values()) for one, two in zip(*states, strict=True))
    assert whole["filter"] == resumed["filter"]
    assert torch.equal(whole["generator"], resumed["generator"])
    assert timeless(whole["rows"]) == timeless(resumed["rows"])
    with open(cut / "metrics.csv", newline="") as file:
        assert timeless(csv.DictReader(file)) == timeless(rows)


def test_resume_keeps_the_saved_settings_but_where_a_flag_is_given(tmp_path):
    """So that the command to resume is short, and a run can be made longer."""
    run(tmp_path)
    config = M.parse(["--resume", "--out", str(tmp_path), "--updates", "7"])
    assert config == tiny(out=str(tmp_path), resume=True, updates=7, device="auto")
    with pytest.raises(M.Stop, match="--updates 1: 2 are already done"):
        M.parse(["--resume", "--out", str(tmp_path), "--updates", "1"])


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch, capsys):
    """And one line says what is kept."""
    before, count = signal.getsignal(signal.SIGINT), itertools.count(1)

    def impatient(images, prompts):
        if next(count) == 3:                            # a trial, an evaluation and an update
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return red(images, prompts)

    monkeypatch.setitem(R.REWARDS, "red", lambda device: impatient)
    assert M.main(flags(out=tmp_path, reward="red")) == 130
    assert next(count) == 4 and not (tmp_path / "checkpoint.pt").exists()
    assert "what was saved before is intact" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_a_reward_out_of_memory_is_no_fault_of_the_reward(tmp_path, monkeypatch, capsys):
    """While it is loaded, and while it scores: the same line about the memory settings."""
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for make in (too_large, lambda device: too_large):
        monkeypatch.setitem(R.REWARDS, "red", make)
        assert M.main(flags(out=tmp_path, reward="red")) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "--rollout-batch and --micro-batch" in error


def test_a_killed_save_leaves_the_last_checkpoint_readable(tmp_path, monkeypatch):
    """Half a file has been written when the end comes: it had another name, and is taken away."""
    def state(number):
        return {"config": dataclasses.asdict(tiny(updates=number)),
                "policy": M.shapes_policy(tiny(seed=number)).state_dict()}

    def is_the(number):
        read, wanted = M.read_checkpoint(tmp_path), state(number)
        return (read["config"] == wanted["config"] and read["policy"].keys()
                == wanted["policy"].keys() and same(read["policy"].values(),
                                                    wanted["policy"].values()))

    def killed(_, target):
        pathlib.Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    path = tmp_path / "checkpoint.pt"
    R.save(state(1), path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            R.save(state(2), path)
    assert is_the(1) and [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    R.save(state(3), path)
    assert is_the(3) and [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("update", [1, 2])
def test_a_number_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, capsys, update):
    """Update and quantity are named; the checkpoint is the one of the update before."""
    count, original = itertools.count(1), M.group_advantage
    monkeypatch.setattr(M, "group_advantage", lambda reward: original(reward) * (
        math.nan if next(count) == update else 1))
    error = refused(capsys, *flags(out=tmp_path, reward="red", eval_every=1))
    assert f"update {update}: the loss is nan" in error
    assert (tmp_path / "checkpoint.pt").exists() == (update == 2)
    assert update == 1 or len(saved(tmp_path)["rows"]) == 1


def test_out_of_memory_says_which_knobs_to_turn(tmp_path, monkeypatch, capsys):
    """One line, and the checkpoint of the update before is whole."""
    count, original = itertools.count(1), M.learn

    def too_large(*arguments):
        if next(count) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    monkeypatch.setattr(M, "learn", too_large)
    assert M.main(flags(out=tmp_path, reward="red", eval_every=1)) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--rollout-batch and --micro-batch" in error
    monkeypatch.setattr(M, "learn", original)
    assert len(saved(tmp_path)["rows"]) == 1
    assert M.main(["--resume", "--out", str(tmp_path)]) == 0


# --------------------------------------------------------------------------------------------------
# Show-o: small ones in the published layout, made here


WORDS = ["<|endoftext|>", "a", "cat", "dog", "house", "of", "bread", "and", "red", "tall", "old"]
CAPTIONS = ["a cat", "a dog", "a house", "a red cat", "a tall house of bread", "a cat and a dog",
            "an old dog", "a red house and a tall dog", "bread", "a dog of bread"]


def showo_tensors(policy):
    """The part of its state dict that Show-o publishes."""
    return {n: tensor for n, tensor in policy.state_dict().items() if n.startswith("showo.")}


def write_showo(folder, codebook_size=32):
    """Language model, Show-o, MAGVIT-v2 and a CLIP of random weights -> dict of paths as str."""
    import open_clip
    paths = {name: folder / name for name in ("llm", "showo", "magvit")}
    for path in paths.values():
        path.mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)},
                                           unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=WORDS[0], eos_token=WORDS[0],
                            unk_token=WORDS[0]).save_pretrained(paths["llm"])
    PhiConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
              num_attention_heads=2).save_pretrained(paths["llm"])

    torch.manual_seed(0)
    vocabulary = len(WORDS) + 10 + codebook_size + 1
    phi = PhiConfig(vocab_size=vocabulary, hidden_size=32, intermediate_size=64,
                    num_hidden_layers=2, num_attention_heads=2, qk_layernorm=True,
                    initializer_range=0.3)
    policy = M.Policy(phi, None, 0, None, 16, codebook_size)
    (paths["showo"] / "config.json").write_text(json.dumps(dict(
        _class_name="Showo", w_clip_vit=False, vocab_size=vocabulary, llm_vocab_size=len(WORDS),
        llm_model_path=str(paths["llm"]), codebook_size=codebook_size, num_vq_tokens=16)))
    save_file(showo_tensors(policy), paths["showo"] / "pytorch_model.safetensors")

    decoder = {f"decoder.{n}": t for n, t in R.MagvitDecoder(width=32).state_dict().items()}
    torch.save({**decoder, "encoder.conv_in.bias": torch.zeros(3),
                "quantize.embedding": torch.zeros(8, 3)}, paths["magvit"] / "pytorch_model.bin")

    paths["clip"], paths["config"] = folder / "clip.pt", folder / "tiny-clip.json"
    paths["config"].write_text(json.dumps(dict(
        embed_dim=16,
        text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=1, layers=1),
        vision_cfg=dict(image_size=32, patch_size=16, width=32, head_width=16, layers=1))))
    open_clip.add_model_config(paths["config"])
    torch.save(open_clip.create_model("tiny-clip").state_dict(), paths["clip"])
    paths["prompts"] = folder / "captions.txt"
    paths["prompts"].write_text("\n".join(CAPTIONS) + "\n")
    return {name: str(path) for name, path in paths.items()}


@pytest.fixture(scope="module")
def showo(tmp_path_factory):
    """One for the tests that only read it."""
    return write_showo(tmp_path_factory.mktemp("published"))


def showo_flags(showo, out, *more):
    """A short run of it on the CPU."""
    return ["--model", showo["showo"], "--vq-model", showo["magvit"], "--prompts", showo["prompts"],
            "--reward", f"clip:tiny-clip:{showo['clip']}", "--steps", "4", "--eval-steps", "4",
            "--updates", "2", "--groups", "2", "--group-size", "2", "--lr", "1e-3", "--warmup", "1",
            "--eval-pictures", "4", "--device", "cpu", "--out", str(out), *more]


def refused(capsys, *words):
    """The one line with which a command is refused."""
    capsys.readouterr()
    assert M.main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("mask_grpo.py: ")
    return error


def test_show_o_from_folders_end_to_end(showo, tmp_path, monkeypatch, capsys):
    """4 updates; and 2, Ctrl-C, --resume: equal. What was saved are --weights of equal logits."""
    assert M.main(showo_flags(showo, tmp_path / "whole", "--updates", "4")) == 0
    out = capsys.readouterr().out
    assert "captions" in out and "heldout_trained: " in out
    count, original = itertools.count(1), R.ClipReward.__call__

    def stop(self, images, prompts):
        if next(count) == 4:                            # a trial, an evaluation and 2 updates
            signal.raise_signal(signal.SIGINT)
        return original(self, images, prompts)

    monkeypatch.setattr(R.ClipReward, "__call__", stop)
    assert M.main(showo_flags(showo, tmp_path / "cut", "--updates", "4")) == 130
    monkeypatch.undo()
    assert M.main(["--resume", "--device", "cpu", "--out", str(tmp_path / "cut")]) == 0
    whole, cut = saved(tmp_path / "whole"), saved(tmp_path / "cut")
    assert same(whole["policy"].values(), cut["policy"].values())
    assert timeless(whole["rows"]) == timeless(cut["rows"]) and len(cut["rows"]) == 4

    published = load_file(pathlib.Path(showo["showo"], "pytorch_model.safetensors"))
    names = {name for name in cut["policy"] if name.startswith("showo.")}
    assert published.keys() == names and not same(
        published.values(), [cut["policy"][name] for name in published])
    decoder = torch.load(pathlib.Path(showo["magvit"], "pytorch_model.bin"))
    rest = cut["policy"].keys() - names
    assert rest == {name for name in decoder if name.startswith("decoder.")}
    assert all(torch.equal(cut["policy"][name], decoder[name]) for name in rest)    # is frozen
    again = M.load_showo(showo["showo"], showo["magvit"], str(tmp_path / "cut" / "checkpoint.pt"))
    trained = M.load_showo(showo["showo"], showo["magvit"])
    ids, tokens = again.encode(["a red cat"]), torch.full((1, 16), 32)
    assert not torch.equal(again(ids, tokens), trained(ids, tokens))
    trained.load_state_dict(cut["policy"])
    assert torch.equal(again(ids, tokens), trained(ids, tokens))


def test_with_a_model_the_defaults_are_the_papers(showo):
    """And a flag overrides each."""
    config = M.parse(["--model", "showlab/show-o-512x512", "--prompts", "x.txt"])
    assert (config.group_size, config.groups, config.steps, config.eval_steps, config.lr,
            config.weight_decay, config.clip_low, config.clip_high, config.transition, config.beta,
            config.guidance, config.temperature, config.reward, config.filter_quantile) == (
                6, 16, 50, 50, 3e-6, 0.02, 0.1, 0.2, "p1", 0, 5, 1, "clip", 0.1)
    config = M.parse(["--model", "x", "--group-size", "4", "--no-checkpointing"])
    assert config.group_size == 4 and not config.checkpointing and config.steps == 50


def test_full_size_has_the_published_names_shapes_and_counts():
    """Without storage: 437 tensors and 1,448,176,770 numbers, 190 and 39,947,833 in the decoder."""
    with torch.device("meta"):
        policy = M.Policy(PhiConfig(vocab_size=58498, qk_layernorm=True), None, 50256,
                          R.MagvitDecoder(), 1024, 8192)
    weights, decoder = showo_tensors(policy), policy.decoder.state_dict()
    assert len(weights) == 437 and sum(t.numel() for t in weights.values()) == 1_448_176_770
    assert len(decoder) == 190 and sum(t.numel() for t in decoder.values()) == 39_947_833
    for name, shape in {
            "showo.model.embed_tokens.weight": (58498, 2048), "showo.lm_head.bias": (58498,),
            "showo.model.layers.23.self_attn.q_layernorm.weight": (64,),
            "showo.model.layers.0.self_attn.dense.weight": (2048, 2048),
            "showo.model.layers.11.mlp.fc2.weight": (2048, 8192),
            "showo.model.final_layernorm.bias": (2048,)}.items():
        assert weights[name].shape == shape
    for name, shape in {
            "post_quant_conv.weight": (13, 13, 1, 1), "conv_in.weight": (512, 13, 3, 3),
            "mid.attn_1.proj_out.weight": (512, 512, 1, 1), "up.4.upsample.conv.bias": (512,),
            "up.3.block.0.nin_shortcut.weight": (256, 512, 1, 1), "up.0.block.3.norm2.bias": (128,),
            "up.1.block.0.conv1.weight": (128, 256, 3, 3),
            "conv_out.weight": (3, 128, 3, 3)}.items():
        assert decoder[name].shape == shape
    assert sum("nin_shortcut" in name for name in decoder) == 4     # two weights and their biases
    assert (policy.pad_id, policy.soi_id, policy.eoi_id, policy.t2i_id, policy.offset) == (
        50295, 50296, 50297, 50300, 50305)


def test_prompts_of_show_o_are_laid_out_and_padded_to_the_longest(showo):
    """llm_vocab_size 11: pad is 11, t2i 16; bos and end are the tokenizer's."""
    policy = M.load_showo(showo["showo"], showo["magvit"])
    assert policy.encode(["a cat", ""]).tolist() == [[16, 0, 1, 2, 0], [11, 11, 16, 0, 0]]
    with pytest.warns(UserWarning, match="captions of more than 126 tokens are cut"):
        assert len(policy.encode(["cat " * 300])[0]) == 129


def test_only_show_o_on_a_gpu_computes_in_bf16(policy, showo, monkeypatch):
    """Not on the CPU, and not the small policy of the shapes world."""
    large = M.load_showo(showo["showo"], showo["magvit"])
    assert large.dtype == policy.dtype == torch.float32
    monkeypatch.setattr(M.Policy, "to", lambda self, device: self)      # there may be no GPU
    assert M.load_showo(showo["showo"], showo["magvit"], device="cuda").dtype == torch.bfloat16
    assert M.make_policy(tiny(), torch.device("cuda")).dtype == torch.float32


def test_codes_become_bits_highest_first_and_grids_need_not_be_square():
    """0 is all -1, 1 ends in 1, 4096 begins with it; 2 x 3 codes become 32 x 48 pixels."""
    decoder, seen = R.MagvitDecoder(width=32), []
    decoder.post_quant_conv.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    codes = torch.tensor([[[0, 1, 4096], [8191, 5, 0]]])
    picture = decoder(codes)
    assert picture.shape == (1, 3, 32, 48)
    bits = seen[0][0].permute(1, 2, 0)                                          # (2, 3, 13)
    expected = [[f"{code:013b}" for code in row] for row in codes[0].tolist()]
    for i, j in itertools.product(range(2), range(3)):
        assert bits[i, j].tolist() == [1 if bit == "1" else -1 for bit in expected[i][j]]
    moved = decoder(torch.tensor([[[0, 1, 4096], [8191, 5, 1]]]))
    assert not torch.equal(moved, picture)


def test_decoding_in_chunks_changes_nothing(showo, monkeypatch):
    """300 pictures of 16 tokens do not fit into one chunk."""
    policy, chunks = M.load_showo(showo["showo"], showo["magvit"]), []

    class White(torch.nn.Module):
        """Code 0 is gray, all others are white."""

        def forward(self, codes):
            """codes (B, h, w) -> (B, 3, h, w)"""
            chunks.append(len(codes))
            return codes[:, None].expand(-1, 3, -1, -1).float()

    policy.decoder = White()
    tokens = torch.randint(32, (300, 16), generator=seeded(0))
    pictures = policy.decode(tokens)
    assert chunks == [256, 44] and torch.equal(pictures[..., 0].flatten(1) == 255, tokens >= 1)


@pytest.mark.parametrize("name", [
    "pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin", "diffusion_pytorch_model.bin"])
def test_every_published_file_name_is_read(showo, tmp_path, name):
    """Half precision on disk is float32 here."""
    weights = load_file(pathlib.Path(showo["showo"], "pytorch_model.safetensors"))
    policy = M.load_showo(showo["showo"], showo["magvit"])
    write = save_file if name.endswith("safetensors") else torch.save
    write({key: tensor.bfloat16() for key, tensor in weights.items()}, tmp_path / name)
    weights = {key: tensor.bfloat16().float() for key, tensor in weights.items()}
    rest = {f"decoder.{key}": tensor for key, tensor in policy.decoder.state_dict().items()}
    M.load_weights(policy, {**R.read_weights(str(tmp_path)), **rest}, tmp_path)
    assert same([*showo_tensors(policy).values()], [weights[key] for key in showo_tensors(policy)])
    assert policy.showo.lm_head.weight.dtype == torch.float32


def test_safetensors_are_preferred_to_pickles(tmp_path):
    """Both are there."""
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file({"x": torch.ones(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    assert R.read_weights(str(tmp_path))["x"] == 1


def test_offline_the_cache_is_searched_for_every_name(tmp_path, monkeypatch):
    """The repository has a .bin only, and nobody can be asked; one file can be named, too."""
    root = tmp_path / "models--showlab--show-o"
    folder = root / "snapshots" / "abc"
    (folder / "deep").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    torch.save({"x": torch.ones(1)}, folder / "pytorch_model.bin")
    torch.save({"x": torch.zeros(1)}, folder / "deep" / "other.pt")
    monkeypatch.setattr(R, "snapshot_download", functools.partial(
        R.snapshot_download, cache_dir=tmp_path, local_files_only=True))
    assert R.find("showlab/show-o", "*.safetensors", "*.bin") == folder / "pytorch_model.bin"
    assert R.read_weights("showlab/show-o")["x"] == 1
    assert R.read_weights("showlab/show-o/deep/other.pt")["x"] == 0
    with pytest.raises(M.Stop, match="holds no config.json"):
        R.find("showlab/show-o", "config.json")


def test_other_weights_replace_the_base(showo, tmp_path):
    """A plain state dict in the same names: what Mask-GRPO's authors published is one."""
    weights = load_file(pathlib.Path(showo["showo"], "pytorch_model.safetensors"))
    torch.save({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "mine.pth")
    config = M.parse(showo_flags(showo, tmp_path, "--weights", str(tmp_path / "mine.pth")))
    policy = M.make_policy(config, torch.device("cpu"))
    assert torch.equal(policy.showo.lm_head.bias, weights["showo.lm_head.bias"] + 1)
    run(tmp_path)                                       # and of the shapes world the same way
    config = tiny(out=str(tmp_path), weights=str(tmp_path / "checkpoint.pt"))
    policy = M.make_policy(config, torch.device("cpu"))
    assert same(saved(tmp_path)["policy"].values(), [
        policy.state_dict()[name] for name in saved(tmp_path)["policy"]])


def test_a_show_o_that_cannot_be_loaded(tmp_path, capsys, monkeypatch):
    """Each in one line, with the first tensors that differ where it is a matter of tensors."""
    showo, out = write_showo(tmp_path / "published"), tmp_path / "out"
    folder = pathlib.Path(showo["showo"])
    weights, config = load_file(folder / "pytorch_model.safetensors"), folder / "config.json"
    words = showo_flags(showo, out)

    def save(tensors):
        save_file(tensors, folder / "pytorch_model.safetensors")

    bias = "showo.lm_head.bias"
    save({name: tensor for name, tensor in weights.items() if name != bias})
    error = refused(capsys, *words)
    assert "do not fit" in error and f'Missing key(s) in state_dict: "{bias}"' in error
    save({**weights, bias: torch.zeros(7), "showo.foreign": torch.zeros(2)})
    error = refused(capsys, *words)
    assert 'Unexpected key(s) in state_dict: "showo.foreign"' in error
    assert f"size mismatch for {bias}" in error and "[7]" in error and "[54]" in error
    whole = (folder / "pytorch_model.safetensors").read_bytes()
    (folder / "pytorch_model.safetensors").write_bytes(whole[:1000])
    assert "pytorch_model.safetensors is damaged" in refused(capsys, *words)
    (folder / "pytorch_model.safetensors").unlink()
    assert "holds no pytorch_model.safetensors or " in refused(capsys, *words)
    torch.save({"model": weights}, folder / "pytorch_model.bin")
    error = refused(capsys, *words)
    assert "do not fit" in error and "Missing key(s) in state_dict" in error
    torch.save(print, folder / "pytorch_model.bin")     # a pickle that is no tensor runs nothing
    assert "UnpicklingError" in refused(capsys, *words)

    good = json.loads(config.read_text())
    config.write_text(json.dumps({**good, "llm_vocab_size": 12, "vocab_size": 55}))
    assert re.search(r" 11( tokens)?, not 12\b", refused(capsys, *words))
    config.write_text(json.dumps({**good, "llm_model_path": str(tmp_path / "nowhere")}))
    assert "has no tokenizer or config" in refused(capsys, *words)
    config.write_text(json.dumps({"vocab_size": 3}))
    assert "is not Show-o's" in refused(capsys, *words)
    config.write_text("{")
    assert "is not Show-o's" in refused(capsys, *words)
    config.unlink()
    assert "holds no config.json" in refused(capsys, *words)
    assert not list(out.rglob("*.*"))


@pytest.mark.parametrize("error, named", [
    (LocalEntryNotFoundError("offline"), "LocalEntryNotFoundError: offline"),
    (ValueError("Repo id must be in the form ..."), "ValueError: Repo id"),
    (OSError("401 Client Error\nRepository Not Found"), "OSError: 401")])
def test_no_network_and_nothing_cached(tmp_path, capsys, monkeypatch, error, named):
    """What the hub's client raises becomes one line."""
    (tmp_path / "captions.txt").write_text("a cat\na dog\n")

    def unreachable(*_, **__):
        raise error

    monkeypatch.setattr(R, "snapshot_download", unreachable)
    said = refused(capsys, "--model", "showlab/show-o-512x512", "--out", tmp_path / "out",
                   "--prompts", tmp_path / "captions.txt", "--reward", "shapes")
    assert f"cannot be downloaded: {named}" in said and "showlab/show-o-512x512" in said


def test_rollout_batches_never_change_the_pictures(monkeypatch):
    """Given the same noise, 5 pictures sampled at once and 2, 2, 1 at a time, and gradients too."""
    policy = M.shapes_policy(tiny())
    noise = {t: torch.rand(5, 36, 50, generator=seeded(t)) for t in range(8)}
    calls = itertools.count()

    def fixed(shape, generator, device):
        call = next(calls)
        start = call // 8 * fixed.size                  # two draws in each of four steps
        part = noise[call % 8][start:start + shape[0]]
        return part[:, :, :shape[2]] if len(shape) == 3 else part[:, :, 0]

    monkeypatch.setattr(M, "gumbel", fixed)
    seen = []
    for size in (1024, 2, 1):
        calls, fixed.size = itertools.count(), size
        config = tiny(rollout_batch=size, micro_batch=3)
        prompts = ["a star", "two circles", "a star", "a red star", "a star and a circle"]
        path = M.sample(policy, prompts, config, 4, None)
        advantage = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.2])
        vector, _ = gradient(policy, config, (policy.encode(prompts), path, advantage))
        seen.append((path, vector))
    for path, vector in seen[1:]:
        assert torch.equal(path.tokens, seen[0][0].tokens)
        assert torch.equal(path.revealed_at, seen[0][0].revealed_at)
        assert torch.allclose(vector, seen[0][1], atol=1e-6)


def test_checkpointing_computes_twice_and_changes_nothing(policy, batch_of, monkeypatch):
    """The same gradient; each layer runs a second time in the backward pass."""
    batch, runs = batch_of(tiny(groups=1)), []
    layer = policy.showo.model.layers[0].self_attn.q_proj
    hook = layer.register_forward_hook(lambda *_: runs.append(1))
    plain, _ = gradient(policy, tiny(groups=1), batch)
    once = len(runs)
    hook.remove()
    again = M.make_policy(tiny(checkpointing=True), torch.device("cpu"))
    layer = again.showo.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda *_: runs.append(1))
    twice, _ = gradient(again, tiny(groups=1), batch)
    assert torch.allclose(plain, twice, atol=1e-6) and len(runs) == 3 * once


def test_adafactor_steps_are_of_the_size_of_the_learning_rate(policy):
    """Not of lr times the size of the weight, as is usual for it: so --lr means the same."""
    fresh = M.shapes_policy(tiny())
    optimizer = M.make_optimizer(fresh, tiny(optimizer="adafactor", lr=1e-3, weight_decay=0.0))
    before = fresh.showo.lm_head.weight.detach().clone()
    fresh(fresh.encode(["a star"]), torch.full((1, 36), 49)).logsumexp(-1).sum().backward()
    optimizer.step()
    moved = (fresh.showo.lm_head.weight - before)[fresh.offset:-1]
    assert 3e-4 < moved.pow(2).mean().sqrt() < 3e-3
    assert all(state["row_var"].numel() < before.numel() / 8
               for p, state in optimizer.state.items() if p is fresh.showo.lm_head.weight)


# --------------------------------------------------------------------------------------------------
# Files of captions, and pictures for other people's evaluators


@pytest.mark.parametrize("name, text", [
    ("a.txt", "a cat\n\n  a dog \n"), ("a.json", '["a cat", {"caption": "a dog"}]'),
    ("a.jsonl", '{"prompt": "a cat", "tag": "x"}\n"a dog"\n'), ("bom.txt", "\ufeffa cat\na dog")])
def test_captions_are_read_from_text_and_json(tmp_path, name, text):
    """Blank lines and a byte order mark are no captions; what else a record holds is kept."""
    (tmp_path / name).write_text(text, encoding="utf-8")
    records = R.read_captions(str(tmp_path / name))
    assert [record["prompt"] for record in records] == ["a cat", "a dog"]
    assert ("tag" in records[0]) == (name == "a.jsonl")


@pytest.mark.parametrize("name, data, named", [
    ("empty.txt", b"\n \n", "holds no caption"), ("binary.txt", b"\xff\x00", "UnicodeDecodeError"),
    ("broken.json", b"[", "JSONDecodeError"), ("fields.json", b'[{"text": "x"}]', "`caption`"),
    ("number.jsonl", b"3\n", "`caption`"), ("number.json", b"3", "`caption`"),
    ("nested.json", b'[{"prompt": ["a"]}]', "`caption`"),
    ("one.txt", b"a cat\na cat\n", "needs two captions"), (None, b"", "cannot be read")])
def test_captions_that_cannot_be_used(showo, tmp_path, capsys, monkeypatch, name, data, named):
    """Said before any weights are loaded."""
    monkeypatch.setattr(M, "load_showo", None)
    path = tmp_path / (name or "nowhere.txt")
    if name:
        path.write_bytes(data)
    words = showo_flags(showo, tmp_path / "out")
    words[words.index("--prompts") + 1] = str(path)
    assert named in refused(capsys, *words) and not list((tmp_path / "out").rglob("*.*"))


def test_a_fixed_tenth_of_the_captions_is_held_out(tmp_path):
    """The same whatever their order, in no common with the rest, and doubles count once."""
    captions = [f"picture {i}" for i in range(50)]
    sides = []
    for i, texts in enumerate((captions, captions[::-1] + captions[:7])):
        (tmp_path / f"{i}.txt").write_text("\n".join(texts))
        sides.append(R.split_captions(str(tmp_path / f"{i}.txt")))
    trained, held = (side["captions"] for side in sides[0])
    assert sides[0] == sides[1] and len(held) == 5 and sorted(trained + held) == sorted(captions)


def test_captions_that_are_too_long_are_cut_with_a_warning(showo):
    """126 tokens fit; one Python warning, however many do not."""
    policy = M.load_showo(showo["showo"], showo["magvit"])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        fits = policy.encode(["cat " * 126])
        assert not seen
        cut = policy.encode(["cat " * 127, "cat " * 300])
    assert [str(warning.message) for warning in seen] == [
        "captions of more than 126 tokens are cut"]
    assert torch.equal(cut, fits.expand(2, -1))


def test_a_model_needs_captions_and_the_shapes_world_its_own_words(showo, tmp_path, capsys):
    """--model without --prompts; captions of cats without --model."""
    assert "needs --prompts" in refused(capsys, "--model", showo["showo"], "--out", tmp_path)
    error = refused(capsys, *flags(out=tmp_path, prompts=showo["prompts"], reward="red"))
    assert "the shapes world does not know 'a " in error and "--model" in error


def test_generating_in_genevals_layout(showo, tmp_path, capsys):
    """Folders, metadata and pictures; what is there stays; what is missing comes back the same."""
    lines = [{"tag": "single", "include": [{"class": "cat"}], "prompt": "a cat"},
             {"tag": "again", "include": [{"class": "cat"}], "prompt": "a cat"}]
    metadata, folder = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out" / "generated"
    metadata.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert M.main(showo_flags(showo, tmp_path / "out")) == 0
    words = ["--resume", "--out", tmp_path / "out", "--device", "cpu", "--generate", metadata]
    words = [str(word) for word in words]
    assert M.main([*words, "--samples", "3"]) == 0
    root, = folder.iterdir()
    assert re.fullmatch(r"update_00002-[0-9a-f]{8}", root.name)
    assert f"sampled by update_00002 of {tmp_path / 'out'}, in {root}" in capsys.readouterr().out
    found = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.*"))
    assert found == [f"0000{i}/{name}" for i in range(2) for name in (
        "metadata.jsonl", *(f"samples/000{j}.png" for j in range(3)))]
    assert [json.loads((root / f"0000{i}/metadata.jsonl").read_text()) for i in (0, 1)] == lines
    pictures = {path: path.read_bytes() for path in root.rglob("*.png")}
    assert len(set(pictures.values())) == 6 and Image.open(next(iter(pictures))).size == (64, 64)

    (root / "00001/samples/0002.png").unlink()          # as if stopped in the second caption
    (root / "00001/metadata.jsonl").unlink()
    finished = {path: path.stat().st_mtime_ns for path in root.glob("00000/samples/*")}
    assert M.generate(M.parse([*words, "--samples", "3"])) == root
    assert {path: path.read_bytes() for path in root.rglob("*.png")} == pictures
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert json.loads((root / "00001/metadata.jsonl").read_text()) == lines[1]

    assert M.main([*words, "--samples", "3", "--seed", "0", "--guidance", "0"]) == 0
    other, = set(folder.iterdir()) - {root}             # other settings, another folder
    assert other.name.startswith("update_00002-")
    assert {path: path.read_bytes() for path in root.rglob("*.png")} == pictures
    others = [{path.read_bytes() for path in other.rglob("*.png")}]
    weights = str(tmp_path / "out" / "checkpoint.pt")
    for name, guidance, more in (("base", "5", []), ("base", "0", []),
                                 ("weights", "5", ["--weights", weights])):
        words = ["--model", showo["showo"], "--vq-model", showo["magvit"], "--device", "cpu",
                 "--generate", metadata, "--samples", "3", "--steps", "4", "--eval-steps", "4",
                 "--guidance", guidance, "--out", tmp_path / "other", *more]
        made = M.generate(M.parse([str(word) for word in words]))
        assert made.parent == tmp_path / "other" / "generated"
        assert made.name.startswith(f"{name}-")
        others.append({path.read_bytes() for path in made.rglob("*.png")})
    assert others.pop() == set(pictures.values())       # the checkpoint's, without a --resume
    assert all(len(these) == 6 and not these & set(pictures.values()) for these in others)
    assert not others[1] & others[2] and others[0] != others[2] and M.Config.samples == 4


# --------------------------------------------------------------------------------------------------
# Rewards for real pictures


def noise_images(n, size=64):
    """n PIL images of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


def test_clip_is_open_clips_scaled_cosine(showo):
    """By open_clip's own transform and forward; hpsv2 is the same without the scale."""
    import open_clip
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-clip", showo["clip"])
    images, prompts = noise_images(40), [f"picture number {i}" for i in range(40)]
    with torch.no_grad():
        pair = model.eval()(torch.stack([preprocess(image) for image in images]),
                            open_clip.get_tokenizer("tiny-clip")(prompts))
    cosine = (pair[0] * pair[1]).sum(-1)
    clip = R.load_reward(f"clip:tiny-clip:{showo['clip']}")
    assert torch.allclose(clip(images, prompts), cosine * model.logit_scale.exp(), atol=1e-4)
    hps = R.load_reward(f"hpsv2:tiny-clip:{showo['clip']}")
    assert torch.allclose(hps(images, prompts), cosine, atol=1e-5)
    assert not clip(images, prompts).requires_grad


def test_clip_cuts_long_texts_and_scores_in_float32(showo):
    """200 words; beyond 77 tokens nothing counts. In bf16 scores are float32 still."""
    clip, images = R.load_reward(f"clip:tiny-clip:{showo['clip']}"), noise_images(2)
    scores = clip(images, ["cat " * 200, "cat " * 199 + "dog"])
    assert scores.isfinite().all()
    assert torch.allclose(clip(images[:1], ["cat " * 150]), scores[:1], atol=1e-5)
    full = clip(images, ["a cat", "a dog"])
    clip.model.bfloat16()
    clip.dtype = torch.bfloat16
    half = clip(images, ["a cat", "a dog"])
    assert half.dtype == torch.float32 and torch.allclose(half, full, atol=0.3)


def test_pickscore_is_transformers_clip(tmp_path):
    """A small CLIPModel and its processor in a folder, against its own logits per image."""
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
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images, prompts = noise_images(3), ["a cat", "a dog " * 100, "dog"]
    inputs = processor(text=prompts, images=images, return_tensors="pt", truncation=True,
                       max_length=77, padding="max_length")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal()
    reward = R.load_reward(f"pickscore:{tmp_path}:{tmp_path}")
    assert torch.allclose(reward(images, prompts), expected, atol=1e-4)


def test_a_reward_of_the_readers_own(tmp_path, monkeypatch):
    """MODULE:FUNCTION, in a file beside the run."""
    (tmp_path / "my_taste.py").write_text("import torch\n"
                                          "def short(images, prompts):\n"
                                          "    return torch.tensor([-len(p) for p in prompts])\n")
    monkeypatch.chdir(tmp_path)
    reward = R.load_reward("my_taste:short")
    pixels = torch.zeros(2, 64, 64, 3, dtype=torch.uint8)
    scores = R.score(reward, pixels, ["abc", "a"])
    assert scores.tolist() == [-3, -1] and scores.dtype == torch.float32


@pytest.mark.parametrize("spec, named", [
    ("beauty", "choose from shapes, clip"), ("no_such_module:f", "No module named"),
    ("math:no_such_function", "no_such_function"), ("broken_reward:f", "ZeroDivisionError"),
    ("clip:ViT-Z:openai", "no model 'ViT-Z'"), ("clip:ViT-B-32:no-such-tag", "laion2b_s34b_b79k"),
    ("clip:tiny-clip:FILE", "cannot be loaded"), ("shapes:more", "cannot be loaded"),
    ("pickscore:/no/such/folder:/nor/this", "cannot be loaded")])
def test_a_reward_that_cannot_be_found_or_loaded(showo, tmp_path, capsys, monkeypatch, spec, named):
    """One line, before the policy is loaded."""
    monkeypatch.setattr(M, "load_showo", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_reward.py").write_text("1 / 0")
    (tmp_path / "clip.pt").write_bytes(b"no weights")
    words = showo_flags(showo, tmp_path / "out")
    words[words.index("--reward") + 1] = spec.replace("FILE", str(tmp_path / "clip.pt"))
    error = refused(capsys, *words)
    assert named in error and "--reward" in error


@pytest.mark.parametrize("answer, named", [
    ("torch.zeros(3)", "it returned (3,)"),
    ("torch.zeros(len(images), 1)", "one number per picture"),
    ("'good'", "the reward failed"), ("1 / 0", "ZeroDivisionError: division by zero"),
    ("torch.tensor([1.0] * (len(images) - 1) + [float('nan')])", "the reward is nan")])
def test_a_reward_that_answers_wrongly_is_named_with_the_prompt(
        showo, tmp_path, capsys, monkeypatch, answer, named):
    """Tried on two pictures before anything is trained."""
    name = f"wrong_{abs(hash(answer))}"
    (tmp_path / f"{name}.py").write_text("import torch\ndef f(images, prompts):\n"
                                         f"    return {answer}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(M, "evaluate", None)
    words = showo_flags(showo, tmp_path / "out")
    words[words.index("--reward") + 1] = f"{name}:f"
    error = refused(capsys, *words)
    assert named in error and any(repr(caption) in error for caption in CAPTIONS)


def test_a_reward_that_fails_later_names_the_update(tmp_path, monkeypatch, capsys):
    """NaN in the second update: the checkpoint of the first is intact."""
    count = itertools.count(1)

    def sometimes_nan(images, prompts):
        return red(images, prompts) * (math.nan if next(count) == 5 else 1)

    monkeypatch.setitem(R.REWARDS, "red", lambda device: sometimes_nan)
    error = refused(capsys, *flags(out=tmp_path, reward="red", eval_every=1))
    assert "update 2: the reward is nan for the prompt" in error
    assert len(saved(tmp_path)["rows"]) == 1


# --------------------------------------------------------------------------------------------------
# Bad input: one line, exit status 2, before any work


@pytest.mark.parametrize("words, named", [
    ("--group-size 1", "--group-size 1"), ("--steps 0", "--steps 0"),
    ("--eval-steps 0", "--eval-steps 0"), ("--steps 4 --score-steps 5", "--score-steps 5"),
    ("--score-steps -1", "--score-steps -1"), ("--reduction middle", "'random', 'first'"),
    ("--transition p3", "p1_literal"),
    ("--reward beauty", "shapes"), ("--device tpu", "cpu"), ("--lr 0", "--lr 0"),
    ("--lr nan", "--lr nan"), ("--lr 3", "--lr 3"),
    ("--clip-low 1", "--clip-low 1"), ("--clip-high -0.1", "--clip-high -0.1"),
    ("--beta -1", "--beta -1"), ("--beta inf", "--beta inf"), ("--width 40", "--width 40"),
    ("--filter-quantile 1", "--filter-quantile 1"),
    ("--temperature -1", "--temperature -1"), ("--max-grad-norm 0", "--max-grad-norm 0"),
    ("--eval-pictures 3", "--eval-pictures 3"), ("--updates 0", "--updates 0"),
    ("--updates many", "invalid int value: 'many'"), ("--no-such-flag 1", "--no-such-flag"),
    ("--resume", "no run can be resumed from")])
def test_bad_input_is_one_line(words, named, tmp_path, capsys, monkeypatch):
    """It names the flag and the fix, and nothing was begun."""
    monkeypatch.setattr(M, "shapes_policy", None)
    assert M.main(["--out", str(tmp_path / "out"), *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("mask_grpo.py: ") and named in error
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("words, named", [("--steps 37", "37"), ("--eval-steps 99", "99")])
def test_more_steps_than_tokens_are_refused(words, named, tmp_path, capsys, monkeypatch):
    """Before the base is trained: each step must reveal a token."""
    monkeypatch.setattr(M, "pretrain", None)
    error = refused(capsys, "--out", tmp_path / "out", *words.split())
    assert "--steps" in error and "--eval-steps" in error
    assert f"{named} steps: must be 1 to 36" in error
    assert not list(tmp_path.rglob("*.*"))


def test_a_folder_that_cannot_be_written_or_is_taken(tmp_path, capsys):
    """A file stands in its place; or it holds a run, of the same settings or of others."""
    (tmp_path / "file").write_text("not a folder")
    assert "cannot be written" in refused(capsys, "--out", tmp_path / "file" / "out")
    run(tmp_path / "taken")
    for settings in ({}, {"lr": 1e-5}):
        error = refused(capsys, *flags(out=tmp_path / "taken", **settings))
        assert "holds a run" in error and "--resume" in error
    assert len(saved(tmp_path / "taken")["rows"]) == 2


def test_a_checkpoint_that_is_damaged_or_of_other_sizes(tmp_path, capsys):
    """Resumed with another width; files cut in half, empty, text, or of something else."""
    run(tmp_path)
    resume = ["--resume", "--out", tmp_path]
    assert "--width 32: a resumed run keeps its settings, here 16" in refused(
        capsys, *resume, "--width", "32")
    assert f"--lr 1e-05: a resumed run keeps its settings, here {M.Config.lr}" in refused(
        capsys, *resume, "--lr", "1e-5")
    path, state = tmp_path / "checkpoint.pt", saved(tmp_path)
    whole = path.read_bytes()
    for damaged in (whole[:len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        assert "no run can be resumed from" in refused(capsys, *resume)
    torch.save({"something": "else"}, path)
    assert "no run can be resumed from" in refused(capsys, *resume)
    torch.save({**state, "policy": M.shapes_policy(tiny(width=32)).state_dict()}, path)
    assert "the weights of the checkpoint do not fit" in refused(capsys, *resume)
    path.write_bytes(whole)
    assert M.main([str(word) for word in resume]) == 0


def test_help_explains_every_setting(capsys):
    """One flag, one comment, one default for each field."""
    with pytest.raises(SystemExit) as end:
        M.parse(["-h"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and "clip_low is --clip-low" in text and text.isascii()
    for field in dataclasses.fields(M.Config):
        line, = re.findall(rf"^ +{field.name}: {field.type.__name__} = (.+?) +# .+", text,
                           re.MULTILINE)
        assert eval(line) == field.default


# --------------------------------------------------------------------------------------------------
# The probability of a step, the sampler


def test_what_is_not_there_to_choose_is_a_value_error():
    """Five steps for three tokens, none at all, and a fifth kind of transition."""
    for T in (5, 0):
        with pytest.raises(ValueError, match=f"{T} steps"):
            M.mask_schedule(T, 3)
    some = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="p3"):
        M.transition_logprob(torch.zeros(1, 3, 4), some, some, 0, "p3")


def test_a_policy_that_gives_mask_a_logit_is_refused():
    """With K + 1 logits MASK could be drawn, and what is drawn would not be a picture."""
    table = TablePolicy(K=5)
    table.codebook_size = 4
    with pytest.raises(ValueError, match=r"\(8, 6, 5\).*\(8, 6, 4\)"):
        sample(table)


def test_half_precision_logits_are_ranked_in_float32():
    """256 codes of bf16 logits: log p near -5.5, where bf16 knows 32 numbers per unit. All pictures
    keep the positions that are the surest in float64, which bf16 ties would shuffle."""
    logits = torch.randn(36, 256, generator=seeded(0)).bfloat16()

    class Half(TablePolicy):
        """The same logits whatever the state."""

        def __call__(self, prompt_ids, tokens):
            return logits.expand(len(tokens), -1, -1)

    half = Half(N=36, K=2)
    half.codebook_size = 256
    path = sample(half, B=64, steps=2, temperature=0.0)
    logp = logits.double().log_softmax(-1).expand(64, -1, -1)
    sure = logp.gather(-1, path.drawn[:, 0, :, None]).squeeze(-1)               # (64, 36)
    kept = path.revealed_at == 0
    lowest, highest = sure.where(kept, math.inf).amin(1), sure.where(~kept, -math.inf).amax(1)
    assert (lowest > highest - 1e-5).all() and path.noise.dtype == torch.float32


# --------------------------------------------------------------------------------------------------
# Advantage, filter, groups


def test_a_group_is_compared_with_itself_alone():
    """Two prompts, one far easier: [1, 2, 3] and [11, 12, 13] are the same advantages."""
    got = M.group_advantage(torch.tensor([[1.0, 2.0, 3.0], [11.0, 12.0, 13.0]]))
    assert torch.allclose(got, torch.tensor([[-1.0, 0.0, 1.0]] * 2), atol=1e-3)


def test_the_filter_keeps_what_lies_on_its_quantile():
    """If all groups spread alike, the quantile is that spread, and none of them vanished."""
    sieve = M.SampleFilter(0.1)
    sieve.history.extend([0.5] * 40)
    assert sieve.keep(torch.tensor([0.5, 0.25])).tolist() == [True, False]


def test_the_filter_forgets_what_is_512_groups_ago():
    """40 groups of spread 100 hold the 95th percentile of 552, but are not of the last 512."""
    sieve = M.SampleFilter(0.95)
    sieve.keep(torch.full((40,), 100.0))
    sieve.keep(torch.ones(512))
    assert sieve.keep(torch.ones(1)).all() and len(sieve.history) == 512


def test_the_filter_remembers_the_groups_that_it_drops():
    """30 ones after 10 fives all fall below 5; but then the 10th percentile is 1, and ones pass."""
    sieve = M.SampleFilter(0.1, warmup=10)
    assert sieve.keep(torch.full((10,), 5.0)).all()
    assert not sieve.keep(torch.ones(30)).any()
    assert sieve.keep(torch.ones(1)).all()


def test_prompts_pictures_and_rewards_of_kept_groups_belong_together(policy):
    """The first and third group of three are dropped, two resampled. What comes back is scored once
    more, by a reward that no two pictures share; a group has one prompt."""
    captions = sorted({caption for *_, caption in R.all_captions()})
    answers = iter([[False, True, False], [True, True]])
    sieve = types.SimpleNamespace(keep=lambda std: torch.tensor(next(answers)))
    weights = np.random.default_rng(0).random((48, 48, 3))

    def own(images, prompts):
        return torch.tensor([(np.asarray(image) * weights).mean() + 1000 * captions.index(prompt)
                             for image, prompt in zip(images, prompts)])

    config = tiny(groups=3, group_size=4)
    prompts, path, kept, every = M.sample_groups(policy, own, captions, sieve, config, seeded(0))
    assert kept.shape == (3, 4) and every.shape == (5, 4) and len(prompts) == len(path.tokens) == 12
    again = M.score(own, policy.decode(path.tokens), prompts)
    assert torch.equal(again.view(3, 4), kept) and len(again.unique()) == 12
    assert torch.equal(kept, every[[1, 3, 4]])
    groups = [set(prompts[i:i + 4]) for i in (0, 4, 8)]
    assert all(len(group) == 1 for group in groups) and len(set.union(*groups)) == 3
    assert torch.equal(path.drawn.gather(1, path.revealed_at[:, None])[:, 0], path.tokens)
    ids, b = policy.encode(prompts), torch.arange(12)       # the prompt that each was drawn for
    last = path.tokens.masked_fill(path.revealed_at >= 3, policy.codebook_size)
    assert torch.allclose(M.replay_logprob(policy, ids, path, b, torch.full((12,), 3), "p2"),
                          (policy(ids, last).log_softmax(-1).gather(-1, path.tokens[..., None])
                           .squeeze(-1) * (path.revealed_at == 3)).sum(1), atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Loss and update


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [120.0, -120.0])
def test_two_impossible_factors_do_not_overflow_the_loss(advantage, log_ratio):
    """exp(120) is infinite in float32: loss and penalty are finite, and so are their gradients."""
    logp = torch.tensor([log_ratio], requires_grad=True)
    loss, numbers = M.grpo_loss(logp, torch.zeros(1), torch.tensor([advantage]), 0.1, 0.2)
    kl = M.kl_k3(logp, torch.zeros(1))
    for value in (loss, kl.sum()):
        assert value.isfinite() and torch.autograd.grad(value, logp)[0].isfinite().all()
    assert kl.item() > 100 and numbers["ratio"].isfinite().all()


@pytest.mark.parametrize("reduction, scored", [("first", [0, 1, 2, 3]), ("first", [0, 1]),
                                               ("last", [3])])
@pytest.mark.parametrize("per_token", [False, True])
def test_the_gradient_with_a_kl_is_the_one_derived_by_hand(policy, reduction, scored, per_token):
    """Eq. 10 at ratio 1 with the k3 penalty, for p2: two groups kept of three asked for, and
    1 / (3 * 4 * scored steps) for each transition, whether it belongs to a kept group or not."""
    config = tiny(transition="p2", groups=3, beta=0.7, max_grad_norm=1e9, micro_batch=5,
                  score_steps=len(scored), reduction=reduction, length_normalize=per_token)
    reference, ids = M.shapes_policy(tiny(seed=5)), policy.encode(["a red star", "two circles"] * 4)
    path = M.rollout(policy, ids, 4, generator=seeded(0))
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.8, -0.2, -0.3, -0.3])

    def logp(model, t):
        state = path.tokens.masked_fill(path.revealed_at >= t, policy.codebook_size)
        kept = path.revealed_at == t
        each = model(ids, state).log_softmax(-1).gather(-1, path.tokens[..., None]).squeeze(-1)
        return (each * kept).sum(1) / (kept.sum(1) if per_token else 1)         # (8,)

    total = kls = 0
    for t in scored:
        now, was = logp(policy, t), logp(reference, t).detach()
        kl = (was - now).exp() - 1 - (was - now)
        total = total + (0.7 * kl - advantage * now).sum() / (3 * 4 * len(scored))
        kls = kls + kl.mean().item() / len(scored)
    parts = torch.autograd.grad(total, list(policy.parameters()), allow_unused=True)
    by_hand = torch.cat([part.flatten() for part in parts if part is not None])
    got, log = gradient(policy, config, (ids, path, advantage), reference)
    assert torch.allclose(got, by_hand, rtol=1e-3, atol=1e-5 * by_hand.abs().max().item())
    assert by_hand.abs().max() > 1e-3 and log["kl"] == pytest.approx(kls, rel=1e-3)


@pytest.mark.parametrize("what", ["loss", "grad"])
def test_a_number_that_is_not_finite_stops_before_the_weights_move(batch_of, what):
    """A NaN in the loss whose gradients are 0, and a finite loss whose gradient is infinite."""
    fresh = M.shapes_policy(tiny())
    before = {name: x.clone() for name, x in fresh.state_dict().items()}
    ids, path, advantage = batch_of(tiny())
    for p in fresh.parameters():
        if p.requires_grad:
            p.register_hook(lambda g: torch.full_like(g, math.inf if what == "grad" else 0))
    if what == "loss":
        advantage = advantage * math.nan
    with pytest.raises(M.Stop, match="the loss is .*(nan|inf).*try a smaller --lr"):
        M.learn(fresh, None, torch.optim.SGD(fresh.parameters(), 1.0), ids, path, advantage, tiny(),
                seeded(0))
    assert all(torch.equal(x, before[name]) for name, x in fresh.state_dict().items())


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_weight_decay_shrinks_matrices_and_nothing_else(name):
    """One step at gradient 0, rate .1 and decay .5: matrices shrink by a twentieth; biases and
    norms stay as they are."""
    fresh, config = M.shapes_policy(tiny()), tiny(optimizer=name, lr=0.1, weight_decay=0.5)
    optimizer, before = M.make_optimizer(fresh, config), {}
    for key, p in fresh.named_parameters():
        p.data += 1                                         # biases begin at 0, which cannot shrink
        p.grad, before[key] = torch.zeros_like(p), p.detach().clone()
    optimizer.step()
    matrices = [key for key, p in fresh.named_parameters() if p.dim() == 2]
    assert 0 < len(matrices) < len(before)
    for key, p in fresh.named_parameters():
        assert torch.allclose(p, before[key] * (0.95 if key in matrices else 1), atol=1e-6), key


def test_every_update_has_its_learning_rate(tmp_path):
    """What the optimizers hold when they step: warm-up times cosine, for the five updates of a run
    and the 20 steps of its base."""
    rates = {}
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.setdefault(optimizer, []).append(
            [group["lr"] for group in optimizer.param_groups]))
    try:
        M.train(tiny(out=str(tmp_path), reward="red", updates=5, warmup=2, lr=1e-3,
                     pretrain_steps=20))
    finally:
        hook.remove()
    base, run = rates.values()
    assert run == [pytest.approx([1e-3 * min(1, (i + 1) / 3) * (1 + math.cos(math.pi * i / 5)) / 2]
                                 * len(run[0])) for i in range(5)]
    assert base == [pytest.approx([4e-3 * (i + 1) / 101 * (1 + math.cos(math.pi * i / 20)) / 2])
                    for i in range(20)]
    assert [float(row["lr"]) for row in read_rows(tmp_path)] == [pytest.approx(r[0]) for r in run]


def test_an_update_without_a_live_group_changes_nothing_and_goes_on(tmp_path, monkeypatch):
    """All pictures are worth the same and the filter is warm: no warning, no step, a row of 0."""
    class Warm(M.SampleFilter):
        """It has seen 40 groups of spread 1."""

        def __init__(self, *more):
            super().__init__(*more)
            self.history.extend([1.0] * 40)

    monkeypatch.setattr(M, "SampleFilter", Warm)
    monkeypatch.setitem(R.REWARDS, "red", lambda device: lambda images, _: torch.ones(len(images)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        M.train(tiny(out=str(tmp_path), reward="red", weight_decay=0.5))
    base, last = (torch.load(tmp_path / name)["policy"] for name in ("base.pt", "checkpoint.pt"))
    assert base.keys() == last.keys() and all(torch.equal(base[name], last[name]) for name in base)
    for row in read_rows(tmp_path):
        assert (row["live"], row["sampled"], float(row["reward"])) == ("0", "6", 1.0)
        assert float(row["loss"]) == float(row["grad"]) == float(row["reward_se"]) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_on_every_device_that_is_there(device, tmp_path):
    """Two updates with a KL, guidance and two inner epochs, and as many again after a resume."""
    settings = dict(out=str(tmp_path), reward="red", device=device, beta=0.1, guidance=1.0,
                    inner_epochs=2, eval_every=1)
    assert math.isfinite(M.train(tiny(**settings))["heldout_trained"])
    assert math.isfinite(M.train(tiny(**settings, resume=True, updates=4))["heldout_trained"])
    base, last = (torch.load(tmp_path / name, "cpu")["policy"]
                  for name in ("base.pt", "checkpoint.pt"))
    assert any(not torch.equal(base[name], last[name]) for name in base)
    assert len(read_rows(tmp_path)) == 4


def test_full_size_show_o_stays_on_its_device():
    """Tensors without storage that claim to be on a GPU: a rollout with guidance, all transitions
    and the decoder at published widths; one layer, as each does what the others do. A tensor left
    on the CPU raises, or is an answer on the CPU."""
    try:
        with FakeTensorMode():
            torch.arange(2, device="cuda")[:, None].expand(2, 3).float().uniform_()
    except RuntimeError as error:
        pytest.skip(f"for fake CUDA tensors this torch needs a driver: {error}")
    with FakeTensorMode():
        with torch.device("cuda"):
            phi = PhiConfig(vocab_size=58498, qk_layernorm=True, num_hidden_layers=1)
            whole = M.Policy(phi, lambda text: [1] * len(text), 0, M.MagvitDecoder(), 1024, 8192)
        ids = whole.encode(["a cat", "a tall house"])
        path = M.rollout(whole, ids, 2, 1.0, 5.0, whole.encode([""]).expand(2, -1))
        pairs = torch.arange(2, device="cuda")
        logp = [M.replay_logprob(whole, ids, path, pairs, pairs, name) for name in M.TRANSITIONS]
        pixels = whole.decode(path.tokens)
        assert {x.device.type for x in (ids, *path, *logp, pixels)} == {"cuda"}
        assert pixels.shape == (2, 512, 512, 3) and path.noise.shape == (2, 2, 1024)
        assert all(x.shape == (2,) for x in logp)


# FLOPs of Show-o 512 x 512 (width 2048, 24 layers, N = 1024, K = 8192), two per multiply-add, with
# a caption of 16 tokens: 16 + 3 in the text, <soi>, <eoi> and N.
WIDTH, LENGTH = 2048, 16 + 3 + 2 + 1024
ATTENTION = 4 * LENGTH ** 2 * WIDTH                 # queries times keys, weights times values


def forward_flops(layers=24):
    """Of one picture. A backward pass costs two forward passes."""
    return layers * (24 * LENGTH * WIDTH ** 2 + ATTENTION) + 2 * 1024 * WIDTH * 8192


def recomputed_flops(layers=24):
    """What checkpointing runs again: each layer but for the last product of its MLP."""
    return layers * (16 * LENGTH * WIDTH ** 2 + ATTENTION)


DECODER, CLIP_H = 1_205_062_682_624, 334_590_279_680 + 47_091_384_320


def test_what_show_o_costs_is_counted(monkeypatch):
    """The formulas above, against torch's own counter, without storage; two of the 24 layers."""
    def count(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())    # knows no meta
    with torch.device("meta"):
        phi = PhiConfig(vocab_size=58498, qk_layernorm=True, num_hidden_layers=2)
        whole = M.Policy(phi, None, 0, R.MagvitDecoder(), 1024, 8192)
        ids, tokens = torch.zeros(2, 19).long(), torch.zeros(2, 1024).long()
        pixels, words = torch.zeros(1, 3, 224, 224), torch.zeros(1, 77).long()
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    def same(function, flops):          # older transformers multiply in the rotary embedding, too
        return count(function) == pytest.approx(flops, rel=1e-7)

    assert same(lambda: whole(ids, tokens), 2 * forward_flops(2))
    assert same(lambda: whole(ids, tokens).sum().backward(), 6 * forward_flops(2))
    monkeypatch.setattr(M, "shapes_policy", lambda config: whole)
    M.make_policy(M.Config(checkpointing=True, steps=1, eval_steps=1), "meta").train()
    assert same(lambda: whole(ids, tokens).sum().backward(),
                6 * forward_flops(2) + 2 * recomputed_flops(2))
    assert same(lambda: whole.decode(tokens[:1]), DECODER)
    assert same(lambda: (clip.encode_image(pixels), clip.encode_text(words)), CLIP_H)


def test_the_readmes_costs_follow_from_the_formulas():
    """PFLOP of sampling, of learning and of an update; seconds and hours at 40 % of three peaks."""
    readme = (pathlib.Path(M.__file__).parent / "README.md").read_text(encoding="utf-8")
    found = 0
    for row, steps, scored in (("the paper's setting", 50, 50), ("`--score-steps 10`", 50, 10),
                               ("`--steps 20`", 20, 20)):
        sampling = 96 * steps * forward_flops()
        learning = 96 * scored * (3 * forward_flops() + recomputed_flops())
        update = sampling + learning + 96 * (DECODER + CLIP_H)
        seconds = [update / (0.4 * peak * 1e12) for peak in (165, 312, 989)]
        cells = [f"{flops / 1e15:.1f}" for flops in (sampling, learning, update)]
        cells += [f"{s:.0f} s, {s * 625 / 3600:.0f} h" for s in seconds]
        found += f"| {row} | {' | '.join(cells)} |" in readme
    assert found == 3
    # memory in GiB: float32 but for CLIP; activations and bf16 copies are a count that is not here
    weights, clip, decoder = 1_448_176_770 / 2 ** 28, 986_109_441 / 2 ** 29, 39_947_833 / 2 ** 28
    adafactor = 2 * weights + clip + decoder + 4.21
    assert (f"weights {weights:.1f}, gradients {weights:.1f}, AdamW {2 * weights:.1f} (Adafactor "
            "0.01), activations 4.2 (`--micro-batch 2`: 2.7), "
            f"CLIP {clip:.1f}, decoder {decoder:.2f}: together {adafactor + 2 * weights:.1f} "
            f"({adafactor:.1f} with Adafactor)") in readme


# --------------------------------------------------------------------------------------------------
# The base


@pytest.fixture(scope="module")
def watched():
    """60 steps of pretraining on one picture, code i at position i: texts, and what was shown and
    asked for at each step."""
    seen = types.SimpleNamespace(texts=[], shown=[], asked=[])
    forward, encode = M.Policy.forward, M.Policy.encode
    cross_entropy = torch.nn.functional.cross_entropy

    def noting_forward(self, ids, tokens):
        seen.shown.append(tokens)
        return forward(self, ids, tokens)

    def noting_encode(self, prompts):
        seen.texts += prompts
        return encode(self, prompts)

    def noting_cross_entropy(logits, target, *more, **named):
        seen.asked.append((logits.shape, target, more, named))
        return cross_entropy(logits, target, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(M.Policy, "forward", noting_forward)
        patch.setattr(M.Policy, "encode", noting_encode)
        patch.setattr(M.F, "cross_entropy", noting_cross_entropy)
        patch.setattr(R, "draw_pairs", lambda n, _: (["a star"] * n, torch.arange(36).repeat(n, 1)))
        M.pretrain(M.shapes_policy(tiny()), tiny(pretrain_steps=60))
    return seen


def test_a_tenth_of_the_prompts_is_empty_in_pretraining(watched):
    """For guidance; not nine tenths, which a share of one half would not tell apart."""
    assert len(watched.texts) == 60 * 32 and set(watched.texts) == {"a star", ""}
    assert watched.texts.count("") / len(watched.texts) == pytest.approx(0.1, abs=0.03)


def test_the_base_learns_from_masked_tokens_only(watched):
    """Visible tokens are shown as they are; what is asked for is what stood at the masked ones."""
    assert len(watched.shown) == len(watched.asked) == 60
    for shown, (shape, target, more, named) in zip(watched.shown, watched.asked):
        masked = shown == 49
        truth = torch.arange(36).expand_as(shown)
        assert torch.equal(shown[~masked], truth[~masked]) and torch.equal(target, truth[masked])
        assert shape == (len(target), 49) and not more and not named
        assert masked.any(1).all()
    assert sum((shown != 49).sum() for shown in watched.shown) > 1000


def test_a_base_of_another_seed_is_refused(tmp_path):
    """Its weights would be those of a run that cannot be repeated."""
    def load(seed):
        config = tiny(out=str(tmp_path), seed=seed)
        fresh = M.shapes_policy(config)
        M.load_base(fresh, config)
        return fresh.state_dict()

    first, again = load(0), load(0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    with pytest.raises(M.Stop, match="other settings"):
        load(1)


def test_pretraining_pictures_are_right_for_their_captions():
    """300 pairs under the reward; captions of all categories, of both splits."""
    prompts, pictures = R.draw_pairs(300, random.Random(0))
    assert pictures.shape == (300, 36) and len(set(prompts)) > 50
    assert R.shapes_correct(images_of(pictures.tolist()), prompts).eq(1).all()
    for part in (R.captions(False), R.captions(True)):
        assert all(set(texts) & set(prompts) for texts in part.values())


# --------------------------------------------------------------------------------------------------
# Evaluation and reports


def test_a_row_of_metrics_and_the_evaluation_say_what_they_are(tmp_path, monkeypatch):
    """The row's reward is of all pictures, not of those kept; its evaluation is the held-out
    half; the shapes world is trained by a graded reward and measured by right or wrong."""
    sample_groups, used = M.sample_groups, {}
    kept = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    every = torch.cat([kept, torch.zeros(2, 4)])

    def made_up_groups(policy, reward, *more):
        used["reward"] = reward
        return (*sample_groups(policy, reward, *more)[:2], kept, every)

    def made_up_evaluation(policy, measure, splits, config):
        used["measure"] = measure
        scores = torch.stack([torch.full((6, 4), 0.25), torch.full((6, 4), 0.75)])
        scores[1, 0, 0] = 0.0                                                   # mean .75 - .75/24
        return scores, torch.zeros(2, 6, 4, 48, 48, 3, dtype=torch.uint8)

    monkeypatch.setattr(M, "sample_groups", made_up_groups)
    monkeypatch.setattr(M, "evaluate", made_up_evaluation)
    M.train(tiny(out=str(tmp_path), eval_every=2))
    first, second = read_rows(tmp_path)
    for row in (first, second):
        assert float(row["reward"]) == pytest.approx(5 / 16)
        variance = (3 * (11 / 16) ** 2 + 4 * (3 / 16) ** 2 + 9 * (5 / 16) ** 2) / 15
        assert float(row["reward_se"]) == pytest.approx((variance / 16) ** 0.5, rel=1e-4)
        assert (row["live"], row["sampled"]) == ("1", "4")
    assert first["heldout"] == "" and float(second["heldout"]) == pytest.approx(0.71875)
    half = images_of([scene(("star", "red", 0, 0))]), ["two stars"]
    assert (used["reward"](*half).item(), used["measure"](*half).item()) == (0.5, 0.0)


def test_the_table_holds_each_mean_in_its_own_cell(tmp_path, capsys, monkeypatch, grids):
    """Made-up scores, a different mean in each of 2 x 2 x 3 cells. Held-out pictures are green
    before and blue after; in comparison.png green stands left of blue, each with its score below,
    and no red is seen."""
    written, draw_text = [], ImageDraw.ImageDraw.text
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, at, text, *more: written.append(
        text) or draw_text(self, at, text, *more))

    def made_up(start, color):
        scores = start + 0.01 * torch.arange(24.0).view(2, 3, 4) ** 1.5
        pictures = torch.zeros(2, 3, 4, 8, 8, 3, dtype=torch.uint8)
        pictures[0, ..., 0] = pictures[1, ..., color] = 255
        return scores, pictures

    base, trained = made_up(0.1, 1), made_up(0.3, 2)
    captions = {"one": ["x"], "two": ["y"], "three": ["z"]}
    run = types.SimpleNamespace(splits=[captions, captions], base=base, pretrain_seconds=1.5,
                                rows=[{"seconds": 2.0}, {"seconds": 3.0}])
    numbers = M.report(run, trained, tiny(out=str(tmp_path), seed=3, updates=2))
    table, block = capsys.readouterr().out.split("---\n")
    header, *lines = [line.split() for line in table.strip().splitlines()]
    assert header == ["one", "two", "three", "all"]
    expected, b, a = [], base[0].double().numpy(), trained[0].double().numpy()
    for i, part in enumerate(("training", "held-out")):
        for when, scores in (("base", b), ("trained", a)):
            means = [sum(scores[i, c]) / 4 for c in range(3)]
            means.append(sum(means) / 3)
            expected.append([part, "captions", when, *(f"{mean:.3f}" for mean in means)])
    assert lines == expected and len({cell for line in lines for cell in line[3:]}) == 16
    truth = {"seed": 3, "updates": 2, "base": b[0].mean(), "trained": a[0].mean(),
             "heldout_base": b[1].mean(), "heldout_trained": a[1].mean(), "pretrain_seconds": 1.5,
             "train_seconds": 5.0}
    assert {name: numbers[name] for name in truth} == pytest.approx(truth)
    printed = dict(line.split(": ") for line in block.splitlines())
    assert {name: float(printed[name]) for name in truth} == pytest.approx(truth, abs=1e-4)

    assert [text for text in written if text.count(".") == 1] == [
        f"{scores[1, c, j]:.2f}" for c in range(3) for j in range(4) for scores in (b, a)]
    sheet = np.array(Image.open(tmp_path / "comparison.png"))                   # (H, W, 3)
    where = [np.nonzero((sheet == color).all(2))[1]
             for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    assert len(where[0]) == 0 and len(where[1]) == len(where[2]) > 10_000
    assert where[1].min() < where[2].min() and where[1].max() < where[2].max()


# --------------------------------------------------------------------------------------------------
# Show-o


def test_gelu_new_is_the_tanh_formula(showo):
    """Phi's gelu_new, under the name that torch has a kernel for; exact gelu differs by more."""
    loaded = M.load_showo(showo["showo"], showo["magvit"])
    assert PhiConfig.from_pretrained(showo["llm"]).hidden_act == "gelu_new"
    assert loaded.showo.config.hidden_act == "gelu_pytorch_tanh"
    x = torch.linspace(-6, 6, 1001)
    formula = 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x ** 3)))
    exact = x * (1 + torch.erf(x / 2 ** 0.5)) / 2
    assert (formula - exact).abs().max() > 1e-4
    for layer in loaded.showo.model.layers:
        assert torch.allclose(layer.mlp.activation_fn(x), formula, atol=1e-6)


def magvit_by_hand(weights, codes):
    """MAGVIT-v2's decoder from its published names, convolutions aside in elementary operations.

    weights: state dict, codes (B, h, w) -> (B, 3, 16 h, 16 w)
    """
    def conv(x, name):
        weight = weights[name + ".weight"]
        return torch.conv2d(x, weight, weights[name + ".bias"], padding=weight.shape[-1] // 2)

    def norm(x, name):
        groups = x.reshape(len(x), 32, -1)
        spread = groups - groups.mean(2, keepdim=True)
        groups = spread / (spread.pow(2).mean(2, keepdim=True) + 1e-6).sqrt()
        return (groups.view_as(x) * weights[name + ".weight"][:, None, None]
                + weights[name + ".bias"][:, None, None])

    def swish(x):
        return x * torch.sigmoid(x)

    def block(x, name):
        inner = conv(swish(norm(x, name + ".norm1")), name + ".conv1")
        inner = conv(swish(norm(inner, name + ".norm2")), name + ".conv2")
        return inner + (conv(x, name + ".nin_shortcut")
                        if name + ".nin_shortcut.weight" in weights else x)

    def attention(x, name):
        inner = norm(x, name + ".norm")
        q, k, v = (conv(inner, f"{name}.{part}").flatten(2) for part in "qkv")  # (B, C, h * w)
        share = (torch.einsum("bci,bcj->bij", q, k) / q.shape[1] ** 0.5).softmax(2)
        return x + conv(torch.einsum("bij,bcj->bci", share, v).view_as(x), name + ".proj_out")

    bits = [[[[1.0 if code >> bit & 1 else -1.0 for code in row] for row in picture]
             for bit in range(12, -1, -1)] for picture in codes.tolist()]
    x = conv(conv(torch.tensor(bits, dtype=torch.float64), "post_quant_conv"), "conv_in")
    x = block(attention(block(x, "mid.block_1"), "mid.attn_1"), "mid.block_2")
    for level, blocks in ((4, 3), (3, 4), (2, 3), (1, 4), (0, 4)):              # coarse to fine
        for i in range(blocks):
            x = block(x, f"up.{level}.block.{i}")
        if level > 0:
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"up.{level}.upsample.conv")
    return conv(swish(norm(x, "norm_out")), "conv_out")


def test_the_decoder_computes_what_magvit_v2_does():
    """Random weights, biases and norms: small where the first norm looks, so that its eps counts,
    and large in the attention, so that it attends to something."""
    torch.manual_seed(0)
    decoder = M.MagvitDecoder(width=32)
    with torch.no_grad():
        for name, p in decoder.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
            elif name.startswith("conv_in"):
                p.mul_(0.005)
            elif ".q." in name or ".k." in name:
                p.mul_(8)
    codes = torch.randint(8192, (2, 3, 2))
    with torch.no_grad():
        got = decoder(codes)
        expected = magvit_by_hand({n: x.double() for n, x in decoder.state_dict().items()}, codes)
    assert got.shape == expected.shape == (2, 3, 48, 32)
    assert (got - expected).abs().max() < 1e-4 and expected.std() > 0.1


# --------------------------------------------------------------------------------------------------
# reward.py


def test_a_quarter_of_any_other_colour_is_broken():
    """All shapes, colours and quarters: also green for blue, which are the nearest."""
    scenes = []
    for shape, (color, other), quarter in itertools.product(
            R.SHAPES, itertools.permutations(R.COLORS, 2), range(4)):
        codes = scene((shape, color, 1, 1))
        position = 14 + 6 * (quarter // 2) + quarter % 2
        codes[position] = scene((shape, other, 1, 1))[position]
        scenes.append(codes)
    assert len(scenes) == 96
    cells = R.look(images_of(scenes))
    assert (cells[:, 4] == R.BROKEN).all() and (cells.ne(R.EMPTY).sum(1) == 1).all()


def test_a_quarter_of_the_meanings_of_each_category_is_held_out():
    """Rounded up. By hand: 1 of 4 shapes; 2 of 6 pairs, in two wordings; 2 of 8 counts; 3 of 12
    colours; 6 of 24 ordered pairs on 2 axes, in two wordings; 14 of 54 pairs, in two wordings."""
    heldout, trained = ([*map(len, R.captions(part).values())] for part in (True, False))
    assert heldout == [1, 2 * 2, 2, 3, 6 * 2, 14 * 2]
    assert trained == [3, 4 * 2, 6, 9, 18 * 2, 40 * 2]


@pytest.mark.parametrize("n, held", [(2, 1), (10, 1), (11, 2), (640, 64), (641, 64), (2000, 64)])
def test_a_tenth_of_a_file_is_held_out_rounded_up_and_at_most_64(tmp_path, n, held):
    """What is held out is not trained on, and together they are the file."""
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(f"caption {i}" for i in range(n)))
    trained, heldout = ([*part.values()] for part in R.split_captions(str(path)))
    assert len(trained) == len(heldout) == 1 and len(heldout[0]) == held
    assert {*trained[0], *heldout[0]} == {f"caption {i}" for i in range(n)}
    assert len(trained[0]) == n - held


# --------------------------------------------------------------------------------------------------
# The edges of the command line


def files(folder):
    """Name and content of every file."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_start_in_a_folder_that_holds_a_run_is_refused(tmp_path, capsys):
    """With the same settings or others; the folder is unchanged."""
    run(tmp_path)
    before = files(tmp_path)
    for more in ({}, {"lr": 1e-5}, {"seed": 3}):
        error = refused(capsys, *flags(out=tmp_path, **more))
        assert "holds a run; continue it with --resume" in error
    assert files(tmp_path) == before


@pytest.mark.parametrize("name, value", [
    ("lr", 1e-5), ("weight_decay", 0.5), ("reward", "red"), ("eval_pictures", 5), ("eval_steps", 3),
    ("guidance", 1.0), ("temperature", 0.5), ("seed", 4), ("width", 32), ("optimizer", "adafactor"),
    ("samples", 9), ("beta", 0.1), ("eval_every", 1), ("prompts", "x.txt"), ("updates", 1)])
def test_a_resumed_run_keeps_its_settings(name, value, tmp_path_factory, capsys, finished):
    """Any other value is refused, updates below those that are done as well."""
    before = files(finished)
    error = refused(capsys, "--resume", "--out", finished, M.flag(name), value)
    assert f"{M.flag(name)} {value}: " in error
    assert ("already done" if name == "updates" else "keeps its settings") in error
    assert files(finished) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two updates that the tests only read."""
    folder = tmp_path_factory.mktemp("finished")
    M.train(tiny(out=str(folder)))
    return folder


def test_a_resumed_run_takes_what_changes_no_result(finished):
    """Updates, device and the memory settings; its own settings may be repeated."""
    words = (f"--resume --out {finished} --updates 7 --device cpu --micro-batch 3 "
             "--rollout-batch 5 --checkpointing --lr 1.5e-3 --seed 0")
    assert M.parse(words.split()) == tiny(out=str(finished), resume=True, updates=7, micro_batch=3,
                                          rollout_batch=5, checkpointing=True)
    words = f"--resume --out {finished} --generate x.txt --seed 5 --samples 2 --temperature 0"
    config = M.parse([*words.split(), "--guidance", "1", "--eval-steps", "9"])
    assert (config.seed, config.samples, config.guidance, config.eval_steps) == (5, 2, 1.0, 9)
    assert config.generate == os.path.abspath("x.txt")


def test_edited_captions_are_refused(showo, tmp_path, capsys):
    """The base was evaluated with those that the run began with."""
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(CAPTIONS))
    words = showo_flags(showo, tmp_path / "out", "--prompts", str(captions))
    assert M.main(words) == 0
    captions.write_text("\n".join(CAPTIONS[:-1]))
    error = refused(capsys, "--resume", "--out", tmp_path / "out", "--updates", "3")
    assert "not those that the run began with" in error


def test_a_longer_run_has_the_rates_of_one_that_was_that_long_from_the_start(tmp_path):
    """Two updates, made four: the third and fourth have the rates of four, none of them is 0."""
    *_, whole = run(tmp_path / "whole", updates=4)
    run(tmp_path / "longer", updates=2)
    words = ["--resume", "--out", str(tmp_path / "longer"), "--updates", "4", "--device", "cpu"]
    assert M.main(words) == 0
    rates = [float(row["lr"]) for row in M.read_checkpoint(tmp_path / "longer")["rows"]]
    assert rates[2:] == [float(row["lr"]) for row in whole][2:] and min(rates) > 0


def test_a_checkpoint_of_another_device_continues_and_says_so(tmp_path, capsys):
    """As if it had been saved on a GPU, whose generator has a state of 16 bytes."""
    run(tmp_path, reward="red")
    state = M.read_checkpoint(tmp_path)
    state |= {"device": "cuda", "generator": torch.zeros(16, dtype=torch.uint8)}
    torch.save(state, tmp_path / "checkpoint.pt")
    words = ["--resume", "--out", str(tmp_path), "--updates", "3", "--device", "cpu"]
    assert M.main(words) == 0
    assert "saved on cuda: draws differ from here on" in capsys.readouterr().out
    assert len(M.read_checkpoint(tmp_path)["rows"]) == 3


def test_all_that_is_printed_is_ascii(tmp_path, monkeypatch):
    """A Windows pipe or an ASCII terminal must not end the run, whatever the folder is called."""
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, "ascii"))
    assert M.main(flags(out=tmp_path / "f\u00fcnf")) == 0
    (tmp_path / "captions.txt").write_text("a star\n")
    words = ["--resume", "--out", tmp_path / "f\u00fcnf", "--generate", tmp_path / "captions.txt"]
    assert M.main([*map(str, words), "--device", "cpu"]) == 0
    assert printed.getvalue().isascii() and b"+-" in printed.getvalue()
    for name in ("mask_grpo.py", "reward.py"):
        assert pathlib.Path(M.__file__).with_name(name).read_text(encoding="utf-8").isascii()


def test_sigterm_finishes_the_update(tmp_path, monkeypatch, capsys):
    """Saved, and told how to resume, as with Ctrl-C."""
    count = itertools.count(1)

    def red_and_sigterm(images, prompts):
        if next(count) == 3:                            # a trial, an evaluation and an update
            signal.raise_signal(signal.SIGTERM)
        return red(images, prompts)

    monkeypatch.setitem(R.REWARDS, "red", lambda device: red_and_sigterm)
    before = signal.getsignal(signal.SIGTERM)
    assert M.main(flags(out=tmp_path, reward="red")) == 130
    assert "resume with: python mask_grpo.py --resume --out" in capsys.readouterr().out
    assert len(M.read_checkpoint(tmp_path)["rows"]) == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_files_are_written_loses_no_update(tmp_path, monkeypatch):
    """It comes when the checkpoint of update 1 is no longer due: that of update 2 is saved."""
    count, original = itertools.count(1), M.save_rows

    def interrupted(rows, path):
        if next(count) == 1:
            signal.raise_signal(signal.SIGINT)
        original(rows, path)

    monkeypatch.setattr(M, "save_rows", interrupted)
    assert M.main(flags(out=tmp_path, reward="red", updates=5)) == 130
    assert len(M.read_checkpoint(tmp_path)["rows"]) == 2
    assert len(read_rows(tmp_path)) == 2


def test_a_closed_pipe_is_no_traceback_and_the_checkpoint_is_intact(tmp_path, monkeypatch, capfd):
    """The reader of the output leaves during the second update, as `head` does."""
    end, start = os.pipe()
    count = itertools.count(1)

    def red_and_gone(images, prompts):
        if next(count) == 5:                            # a trial, two evaluations and two updates
            os.close(end)
        return red(images, prompts)

    monkeypatch.setitem(R.REWARDS, "red", lambda device: red_and_gone)
    monkeypatch.setattr(sys, "stdout", open(start, "w"))
    assert M.main(flags(out=tmp_path, reward="red", eval_every=1)) == 141
    assert capfd.readouterr().err == "" and len(M.read_checkpoint(tmp_path)["rows"]) == 1


def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_intact(tmp_path, monkeypatch, capsys):
    """Half of the second checkpoint fits; the checkpoint is written before the pictures."""
    saved, original = [], torch.save

    def full(state, path):
        if "rows" in state and len(state["rows"]) == 2:
            pathlib.Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        saved.append(path)
        original(state, path)

    monkeypatch.setattr(torch, "save", full)
    error = refused(capsys, *flags(out=tmp_path, reward="red", eval_every=1))
    assert "checkpoint.pt cannot be written" in error and "No space left" in error
    assert len(M.read_checkpoint(tmp_path)["rows"]) == 1
    assert not list(tmp_path.rglob("*.partial"))
    assert not (tmp_path / "samples" / "update_00002.png").exists()


def test_metrics_are_whole_at_every_moment(tmp_path, monkeypatch):
    """A run that is killed while it writes them leaves the rows of the update before."""
    original, count = pathlib.Path.write_text, itertools.count(1)

    def killed(self, text, *more):
        if self.name.startswith("metrics") and next(count) == 2:
            original(self, text[:30])
            raise KeyboardInterrupt
        return original(self, text, *more)

    monkeypatch.setattr(pathlib.Path, "write_text", killed)
    assert M.main(flags(out=tmp_path, reward="red")) == 130
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["update"] for row in rows] == ["1"] and None not in rows[0].values()


@pytest.mark.parametrize("name, data", [
    ("coco.json", b'{"info": {}, "annotations": [{"caption": "a cat"}, {"caption": "a dog"}]}'),
    ("text.json", b'"a cat and a dog"'), ("nested.json", b'[["a cat"], ["a dog"]]')])
def test_other_json_is_no_list_of_captions(tmp_path, capsys, name, data):
    """An object or a text could be read letter by letter, or by its keys."""
    (tmp_path / name).write_bytes(data)
    error = refused(capsys, *flags(out=tmp_path / "out", prompts=tmp_path / name, reward="red"))
    assert "a list of them (.json)" in error


def test_a_line_separator_inside_a_caption_stays(tmp_path):
    """Lines end at a line feed, with or without a carriage return, and at nothing else."""
    (tmp_path / "a.txt").write_bytes("a cat\u2028on a\x85mat\r\na dog\n".encode())
    assert [r["prompt"] for r in R.read_captions(tmp_path / "a.txt")] == [
        "a cat\u2028on a\x85mat", "a dog"]


def test_two_captions_suffice_and_a_reward_gets_copies(showo, tmp_path, monkeypatch):
    """One is trained on, one held out; a reward that pops its prompts changes nothing."""
    (tmp_path / "two.txt").write_text("a cat\na dog\n")

    def greedy(images, prompts):
        result = torch.tensor([float(len(prompt)) + i for i, prompt in enumerate(prompts)])
        prompts.clear()
        images.clear()
        return result

    monkeypatch.setitem(R.REWARDS, "red", lambda device: greedy)
    words = showo_flags(showo, tmp_path / "out", "--prompts", str(tmp_path / "two.txt"))
    words[words.index("--reward") + 1] = "red"
    assert M.main(words) == 0
    words = showo_flags(showo, tmp_path / "clip", "--prompts", str(tmp_path / "two.txt"))
    assert M.main([*words, "--updates", "1"]) == 0


def test_relative_paths_hold_when_a_run_is_resumed_elsewhere(showo, tmp_path, monkeypatch):
    """Captions, a reward of one's own and the folder itself are named from the first directory."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (first / "captions.txt").write_text("\n".join(CAPTIONS))
    (first / "taste_of_first.py").write_text(
        "import torch\ndef f(images, prompts):\n    return torch.arange(len(images))\n")
    monkeypatch.chdir(first)
    words = showo_flags(showo, "out", "--prompts", "captions.txt", "--updates", "1")
    words[words.index("--reward") + 1] = "taste_of_first:f"
    assert M.main(words) == 0
    monkeypatch.chdir(second)
    assert M.main(["--resume", "--out", "../first/out", "--updates", "2", "--device", "cpu"]) == 0
    assert len(M.read_checkpoint(first / "out")["rows"]) == 2 and not list(second.iterdir())


def test_what_samples_is_printed_and_named_and_policies_never_mix(tmp_path, capsys):
    """The base, the trained policy, other weights, another seed: each has a folder of its own."""
    (tmp_path / "captions.txt").write_text("a red star\n")
    out = tmp_path / "out"
    M.train(tiny(out=str(out), reward="red"))
    words = flags(out=out, generate=tmp_path / "captions.txt", samples=2)
    found = []
    for more in ([], ["--weights", "8"], ["--weights", "9"], ["--guidance", "1"]):
        if "--weights" in more:             # one file, whose content changes
            state = M.shapes_policy(tiny(seed=int(more[1]))).state_dict()
            torch.save(state, tmp_path / "other.pt")
            more = ["--weights", str(tmp_path / "other.pt")]
        capsys.readouterr()
        assert M.main(words + more) == 0
        found.append(capsys.readouterr().out.split(", in ")[1].split("\n")[0])
    resumed = ["--resume", "--out", str(out), "--generate", str(tmp_path / "captions.txt")]
    assert M.main([*resumed, "--samples", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "sampled by update_00002 of" in printed
    found.append(printed.split(", in ")[1].split("\n")[0])
    assert len(set(found)) == 5
    assert [pathlib.Path(f).name.rsplit("-", 1)[0] for f in found] == [
        "base", "weights", "weights", "base", "update_00002"]
    assert all(len(list(pathlib.Path(f).rglob("*.png"))) == 2 for f in found)
    pictures = files(out / "generated")
    assert M.main(words) == 0 and files(out / "generated") == pictures


def test_one_file_of_a_hub_repository(tmp_path, monkeypatch):
    """OWNER/NAME/FILE asks the hub for this file alone; OWNER/NAME for the usual names."""
    asked = []

    def snapshot(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        (tmp_path / "mycheckpoint.pth").touch()
        (tmp_path / "pytorch_model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(R, "snapshot_download", snapshot)
    assert R.find("happyyifu/Mask-GRPO/mycheckpoint.pth", "*.bin").name == "mycheckpoint.pth"
    assert R.find("showlab/show-o", "*.safetensors", "*.bin").name == "pytorch_model.safetensors"
    assert asked == [("happyyifu/Mask-GRPO", ["mycheckpoint.pth"]),
                     ("showlab/show-o", ["*.safetensors", "*.bin"])]


def test_a_model_with_a_logit_for_mask_is_refused(tmp_path, monkeypatch, capsys):
    """And a bug in it keeps its type, message, file and line."""
    (tmp_path / "wide.py").write_text(OWN_MODEL.replace("self.codebook_size)",
                                                        "self.codebook_size + 1)"))
    (tmp_path / "buggy.py").write_text(OWN_MODEL.replace("return logits", "raise KeyError('x')"))
    (tmp_path / "captions.txt").write_text("a cat\na dog\n")
    monkeypatch.chdir(tmp_path)
    for name, words in (("wide", ["logits of shape", "must be"]),
                        ("buggy", ["KeyError: 'x'", "buggy.py, line 17"])):
        error = refused(capsys, *flags(model=f"{name}:make", prompts="captions.txt", reward="red",
                                       out=tmp_path / "out"))
        assert all(word in error for word in words)


def test_seeds_that_do_not_fit_are_refused(tmp_path, capsys):
    """Each caption of --generate has the seed times 2 ** 32 plus its number."""
    assert "--seed 2147483648" in refused(capsys, "--seed", 2 ** 31, "--out", tmp_path / "out")


OWN_MODEL = '''
import torch


class Tiny(torch.nn.Module):
    num_tokens, codebook_size, device = 9, 4, torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.zeros(9, self.codebook_size))

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


def test_the_readmes_reward_and_the_model_above_run(tmp_path, monkeypatch, capsys):
    """Both from the command line: trained, evaluated, resumed, and sampled from."""
    readme = pathlib.Path(M.__file__).with_name("README.md").read_text(encoding="utf-8")
    (tmp_path / "my_taste.py").write_text(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1])
    (tmp_path / "my_model.py").write_text(OWN_MODEL)
    (tmp_path / "captions.txt").write_text("a cat\na dog\na bird\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_taste", "my_model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    command = re.search(r"`(--model my_model:make .*?)`", readme, re.DOTALL)[1].split()
    assert M.parse(command) == M.Config(model="my_model:make", prompts="captions.txt",
                                        reward="my_taste:warm")
    words = flags(model="my_model:make", reward="my_taste:warm", prompts="captions.txt", out="out",
                  updates=6, lr=0.1, groups=4)
    assert M.main(words) == 0
    rows = M.read_checkpoint("out")["rows"]
    assert len(rows) == 6 and rows[-1]["grad"] > 0
    assert M.main(["--resume", "--out", "out", "--updates", "7", "--device", "cpu"]) == 0
    before, after = (M.read_checkpoint("out")["policy"], M.make_policy(
        tiny(model="my_model:make"), torch.device("cpu")).state_dict())
    assert before.keys() == after.keys() and not same(before.values(), after.values())
    words = ["--resume", "--out", "out", "--generate", "captions.txt", "--device", "cpu"]
    assert M.main(words) == 0
    assert len(list((tmp_path / "out" / "generated").rglob("*.png"))) == 3 * 4


def test_a_trained_show_o_opens_in_show_os_own_code(showo, tmp_path, monkeypatch):
    """The README's line, beside the published config: names and shapes; and it loads here."""
    monkeypatch.chdir(tmp_path)
    assert M.main(showo_flags(showo, "out")) == 0
    readme = pathlib.Path(M.__file__).with_name("README.md").read_text(encoding="utf-8")
    exec(re.search(r'`python -c "(.*?)"`', readme)[1], {})
    os.mkdir("trained")
    for path in ("pytorch_model.safetensors", pathlib.Path(showo["showo"], "config.json")):
        shutil.copy(path, "trained")
    published = load_file(pathlib.Path(showo["showo"], "pytorch_model.safetensors"))
    trained = load_file("trained/pytorch_model.safetensors")
    assert {name: x.shape for name, x in trained.items()} == {
        name: x.shape for name, x in published.items()}
    assert not same(trained.values(), [published[name] for name in trained])
    policy = M.load_showo("trained", showo["magvit"])
    assert torch.equal(policy.showo.lm_head.bias, trained["showo.lm_head.bias"])


# --------------------------------------------------------------------------------------------------
# The README


def test_the_readme_names_what_there_is():
    """Lines of sections, flags, Show-o's preset, what a run printed, files, tests."""
    folder = pathlib.Path(M.__file__).parent
    lines = (folder / "mask_grpo.py").read_text(encoding="utf-8").splitlines()
    starts = [i for i, line in enumerate(lines, 1)
              if re.match(r"# \d+\. ", line) and lines[i - 2].startswith("# ----")]
    ends = [start - 3 for start in starts[1:]] + [len(lines)]
    readme = (folder / "README.md").read_text(encoding="utf-8")
    paragraph = readme.split("Sections and lines: ")[1].split("\n")[0]
    sections = re.findall(r"\b(\d+) [^();]*\((\d+)-(\d+)\)", paragraph)
    assert [tuple(map(int, row)) for row in sections] == [*zip(itertools.count(1), starts, ends)]
    fields = {M.flag(field.name) for field in dataclasses.fields(M.Config)}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", readme)) <= {*fields, "--force-reinstall"}
    for name in ("rollout_batch", "micro_batch"):
        assert f"`{M.flag(name)} {M.SHOWO[name]}`" in readme
    printed = (folder / "assets" / "run.txt").read_text(encoding="utf-8").splitlines()
    shown = readme.split("```text\n")[1].split("\n```")[0].splitlines()
    assert len(shown) == 10 and set(shown) <= {*printed, "..."}
    paths = re.findall(r'\]\((?!http)(.+?)\)|src="(.+?)"', readme)
    assert len(paths) > 5 and all((folder / "".join(path)).exists() for path in paths)
    named = re.findall(r"`(test_\w+)`", readme)
    assert len(named) > 10 and set(named) <= globals().keys()


def test_the_figures_are_drawn_from_what_is_kept():
    """By their script, as they are in the README; one step has the numbers of the docstring."""
    folder = pathlib.Path(M.__file__).parent / "assets"
    script = runpy.run_path(str(folder / "figures.py"))
    for name, figure in script["FIGURES"].items():
        drawn, kept = np.asarray(figure()), np.asarray(Image.open(folder / name))
        assert drawn.shape == kept.shape and (drawn == kept).mean() > 0.99   # fonts may differ
    text = " ".join(M.__doc__.split())
    assert " ".join(script["DRAWN"]) in text
    assert " ".join(map(str, script["NOISY_CONFIDENCE"])) in text
    kept_tokens = [token if value >= script["THRESHOLD"] else "MASK"
                   for token, value in zip(script["DRAWN"], script["NOISY_CONFIDENCE"])]
    assert f"next state {' '.join(kept_tokens)}" in text
    assert script["THRESHOLD"] in script["NOISY_CONFIDENCE"]


def test_objects_come_last_in_the_base_and_first_in_the_trained_policy():
    """In the six pictures of the README: the step that reveals the first tile of an object."""
    folder = pathlib.Path(M.__file__).parent
    kept = json.loads((folder / "assets" / "pictures.json").read_text(encoding="utf-8"))
    first = {}
    for name in ("base", "trained"):
        tokens, revealed_at = (torch.tensor(kept[name][part]) for part in ("tokens", "revealed_at"))
        first[name] = 1 + revealed_at.masked_fill(tokens == 0, 99).amin(1)                  # (6,)
    assert kept["seed"] == 0 and first["trained"].tolist() == [1] * 6
    late = first["base"] >= 10
    right, better = (R.shapes_correct(images_of(kept[name]["tokens"]), kept["captions"])
                     for name in ("base", "trained"))
    assert late.sum() == 4 and right[late].eq(0).all() and first["base"].max() == M.Config.steps
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert (better > right).nonzero().max() == 4 and "*The fifth caption above, with" in readme
    assert ("In four of the six pictures above the base reveals its first tile of an object in "
            f"step 10 to 12 of {M.Config.steps}, and all four are wrong; the trained policy does "
            "so in step 1 in all") in readme


@pytest.mark.parametrize("kept, missing", [
    ((), "study.tar.xz is missing; the loop in README makes it"),
    (("study.tar.xz",), "pictures.json is missing; name the folder of a run")])
def test_the_figures_need_what_is_kept(tmp_path, monkeypatch, kept, missing):
    """Without it: one line, and no figure."""
    folder = pathlib.Path(M.__file__).parent / "assets"
    for name in ("figures.py", *kept):
        shutil.copy(folder / name, tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    with pytest.raises(SystemExit, match=re.escape(missing)):
        runpy.run_path(str(tmp_path / "figures.py"), run_name="__main__")
    assert not list(tmp_path.glob("*.png"))


def test_the_figures_say_that_a_folder_holds_no_run(tmp_path, monkeypatch):
    """One line, and what was kept is as it was."""
    shutil.copy(pathlib.Path(M.__file__).parent / "assets" / "figures.py", tmp_path)
    monkeypatch.setattr(sys, "argv", ["figures.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="none holds no run: .*checkpoint.pt is missing"):
        runpy.run_path(str(tmp_path / "figures.py"), run_name="__main__")
    assert not (tmp_path / "pictures.json").exists()


def test_the_figures_show_a_run(tmp_path, monkeypatch):
    """The first held-out caption of each category, by the base and the policy of a run."""
    folder, out = pathlib.Path(M.__file__).parent / "assets", tmp_path / "out"
    for name in ("figures.py", "study.tar.xz"):
        shutil.copy(folder / name, tmp_path)
    M.train(tiny(out=str(out), reward="red", updates=2, lr=0.1))
    monkeypatch.setattr(sys, "argv", ["figures.py", str(out)])
    runpy.run_path(str(tmp_path / "figures.py"), run_name="__main__")
    kept = json.loads((tmp_path / "pictures.json").read_text())
    assert kept["captions"] == [captions[0] for captions in R.captions(True).values()]
    assert kept["updates"] == 2 and kept["base"]["tokens"] != kept["trained"]["tokens"]
    assert all(len(kept[name][part]) == 6 and len(kept[name][part][0]) == 36
               for name in ("base", "trained") for part in ("tokens", "revealed_at"))
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "step.png", "pictures.png", "curves.png", "unmasking.png"}


@functools.cache
def study_runs(folder):
    """The runs that the README's loop leaves, study/SEED/FLAGS/ each: flags -> list of dicts"""
    runs, parse = {}, functools.cache(lambda flags: M.parse(flags.split()))
    with tarfile.open(folder / "assets" / "study.tar.xz") as tar:
        files = {member.name: tar.extractfile(member).read().decode() for member in tar}
    for name in sorted(name for name in files if name.endswith("/log.txt")):
        _, seed, flags, _ = name.split("/")
        flags = "" if flags == "default" else flags.replace("=", " ")
        block = (line.split(": ") for line in files[name].split("---\n")[1].splitlines())
        rows = list(csv.DictReader(files[name.replace("log.txt", "metrics.csv")].splitlines()))
        run = {key: float(value) for key, value in block}
        config = parse(flags)                                                   # they are flags
        assert (run["seed"], run["updates"]) == (int(seed), config.updates)
        assert len(rows) == config.updates
        assert float(rows[-1]["heldout"]) == pytest.approx(run["heldout_trained"], abs=1e-4)
        reached = [int(row["update"]) for row in rows if float(row["heldout"] or 0) >= 0.7]
        run |= {"pictures": sum(int(row["sampled"]) for row in rows) * config.group_size,
                "to": reached[0] if reached else None,
                "heldout": {int(row["update"]): float(row["heldout"] or 0) for row in rows},
                "first_grad": float(rows[0]["grad"]),
                "clipped": sum(float(row["grad"]) > 1 for row in rows) / len(rows),
                "categories": dict(zip(R.CATEGORIES, map(float, re.search(
                    r"held-out captions +trained (.*)", files[name])[1].split())))}
        runs.setdefault(flags, []).append(run)
    return runs


def values(runs, name):
    """One of the numbers of S runs -> (S,) float64"""
    return torch.tensor([run[name] for run in runs], dtype=torch.float64)       # (S,)


def table_cells(text):
    """The rows of a Markdown table whose header's first cells are cut off -> lists of cells"""
    rows = itertools.takewhile(lambda line: line.startswith("|"), text.splitlines()[2:])
    return [[cell.strip("` ") for cell in row.split("|")[1:-1]] for row in rows]


def test_the_study_in_the_readme_is_the_one_in_assets():
    """Every row of its tables, recomputed from the runs that were kept."""
    folder = pathlib.Path(M.__file__).parent
    runs = study_runs(folder)

    def spread(x):
        return f"{x.mean():.2f}±{x.std():.2f}"

    readme = (folder / "README.md").read_text(encoding="utf-8")
    found = {}
    for table in readme.split("| run | flags |")[1:]:
        for _, flags, seeds, *cells in table_cells(table):
            mine = [run for run in runs[flags] if run["seed"] < int(seeds)]
            base, heldout = values(mine, "heldout_base"), values(mine, "heldout_trained")
            to = [run["to"] for run in mine if run["to"]]
            reached = f"{sum(to) / len(to):.0f}" if to else "-"
            found[flags] = max(int(seeds), found.get(flags, 0))
            assert len(mine) == int(seeds) and cells == [
                spread(base), spread(heldout), str(int((heldout < base).sum())),
                reached + (f" ({len(to)})" if 0 < len(to) < len(mine) else ""),
                f"{values(mine, 'pictures').mean():.0f}"]
    assert found.keys() == runs.keys()
    assert all(len(runs[flags]) == seeds for flags, seeds in found.items() if flags)
    table = readme[readme.index("| seed |"):]
    base, trained = (row[1:] for row in table_cells(table))
    assert len(runs[""]) == len(base) - 1 == 8
    for row, name in ((base, "heldout_base"), (trained, "heldout_trained")):
        each = values(runs[""], name)
        assert row == [f"{x:.2f}" for x in [*each.tolist(), each.mean()]]


@pytest.mark.skipif(not shutil.which("awk"), reason="the loop is for a shell with awk")
def test_the_loop_in_the_readme_runs_the_rows_of_its_seed():
    """What the loop hands to mask_grpo.py: for each seed, the flags of the runs that are kept."""
    folder = pathlib.Path(M.__file__).parent
    readme = (folder / "README.md").read_text(encoding="utf-8")
    rows = re.search(r"^  (awk .*) \| while read -r flags; do$", readme, re.MULTILINE)[1]
    for seed in range(8):
        printed = subprocess.run(["sh", "-c", f"seed={seed}; {rows}"], cwd=folder, check=True,
                                 capture_output=True, text=True).stdout.splitlines()
        assert sorted(line.strip() for line in printed) == sorted(
            flags for flags, runs in study_runs(folder).items()
            if flags and seed in [run["seed"] for run in runs])


def test_other_t_in_the_readme_are_those_in_assets():
    """The table is what assets/over_t.py printed, and the runs it names are those of the study."""
    folder = pathlib.Path(M.__file__).parent
    printed = (folder / "assets" / "over_t.txt").read_text(encoding="utf-8").strip()
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert printed in readme
    runs = {int(run["seed"]): run for run in study_runs(folder)[""]}
    column = printed.split("\n")[0].split(" | ").index(str(M.Config.eval_steps))
    rows = table_cells(printed)
    assert [title for title, *_ in rows] == ["seed 0", "seed 1", "seed 2"]
    for T, a, b in ((15, 11, 7), (18, 9, 6)):
        assert M.mask_schedule(T, R.GRID ** 2)[-4:] == [a, b, 3, 0]
        assert f" leave {a}, {b}, 3 and 0" in readme
    assert all(M.mask_schedule(T, R.GRID ** 2)[-2] in (4, 5) for T in range(10, 15))
    for seed, (_, *cells) in enumerate(rows):
        percent = [100 * runs[seed][f"heldout_{name}"] for name in ("base", "trained")]
        assert cells[column - 1] == f"{percent[0]:.0f} → {percent[1]:.0f}"
        trained = [int(cell.split(" → ")[1]) for cell in cells[column - 1:]]    # T = 12, 13, ...
        assert min(trained[1:3]) >= trained[0] - 1 and min(trained[3:]) > trained[0]
    assert "lose at most one percentage point at 13 and 14, and gain from 15 on." in readme


def test_over_t_evaluates_the_base_and_the_policy_of_a_run(tmp_path, monkeypatch, capsys):
    """Each at every T of its table; a folder without a run is one line."""
    path, out = pathlib.Path(M.__file__).parent / "assets" / "over_t.py", str(tmp_path / "out")
    M.train(tiny(out=out, lr=0.1))
    capsys.readouterr()
    monkeypatch.setattr(R, "shapes_correct", lambda images, _: torch.tensor(
        [np.asarray(image, np.float32)[..., 1].std() / 50 for image in images]))
    monkeypatch.setattr(sys, "argv", ["over_t.py", out])
    script = runpy.run_path(str(path), run_name="__main__")
    saved = M.read_checkpoint(out)
    policy = M.shapes_policy(tiny())
    (title, *cells), = table_cells(capsys.readouterr().out)
    found = []
    for weights in (torch.load(out + "/base.pt")["policy"], saved["policy"]):
        policy.load_state_dict(weights)
        scores = [M.evaluate(policy, R.shapes_correct, saved["splits"], tiny(eval_steps=T))[0]
                  for T in script["TIMES"]]                                     # 8 x (2, C, n)
        found.append([f"{100 * each[1].mean():.0f}" for each in scores])
    assert title == "seed 0" and cells == [" → ".join(pair) for pair in zip(*found, strict=True)]
    assert found[0] != found[1] and all(len(set(row)) > 1 for row in found)
    monkeypatch.setattr(sys, "argv", ["over_t.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="none holds no run: .*checkpoint.pt is missing"):
        runpy.run_path(str(path), run_name="__main__")


def test_what_the_text_says_of_the_study_is_what_it_measured():
    """Lengths of gradients in update 1, which samples the same pictures; extremes; categories."""
    folder = pathlib.Path(M.__file__).parent
    runs, readme = study_runs(folder), (folder / "README.md").read_text(encoding="utf-8")
    longer = [ar["first_grad"] / p1["first_grad"]
              for ar, p1 in zip(runs["--transition ar"], runs[""])]
    assert len(longer) == 5 and 3.45 < sum(longer) / 5 < 3.55
    assert f"its gradient has {sum(longer) / 5:.1f} times the norm, the mean of five" in readme

    def mean_at(update, flags):
        return sum(run["heldout"][update] for run in runs[flags][:5]) / 5

    for update in (9, 18):
        assert (f"t update {update} they are at {mean_at(update, ''):.2f} and "
                f"{mean_at(update, '--transition p2'):.2f} held-out on average") in readme
    p1, p2, ar = (values(runs[flags], "heldout_trained")[:5]
                  for flags in ("", "--transition p2", "--transition ar"))
    gap = p1 - p2
    assert gap[:4].min() > 0 > gap[4]
    assert (f"by {gap[:4].min():.2f} to {gap[:4].max():.2f}; on seed 4 it ends {-gap[4]:.2f} "
            "below") in readme
    assert f"AR-style ends between {ar.min():.2f} and {ar.max():.2f}" in readme
    assert (ar > values(runs["--transition ar"], "heldout_base")).all() and (ar < p2).all()
    literal = values(runs["--transition p1_literal"], "heldout_trained")
    assert len(literal) == 5 and [*literal[:4]] == [0.0] * 4 and f"{literal[4]:.2f}" == "0.01"
    assert "ends at 0.00 or 0.01" in readme and "ends at 0.01 or less" in readme
    clipped = [values(runs[flags][:5], "clipped").mean() for flags in (
        "", "--transition p2", "--transition ar")]
    assert clipped[:2] == [0, 0] and f"In {clipped[2]:.0%}".replace("%", " %") in readme
    for flags, said in (("--max-grad-norm 1000", "without it, seeds 0 to 2 end at {}"),
                        ("", "with it at {}"), ("--updates 108", "twice the updates at {}")):
        each = values(runs[f"--transition ar {flags}".strip()][:3], "heldout_trained").tolist()
        assert said.format(", ".join(f"{x:.2f}" for x in each)) in readme
    lines = readme.splitlines()
    tables, text = ("\n".join(line for line in lines if line.startswith("|") == inside)
                    for inside in (True, False))
    quoted = re.findall(r"\d\.\d\d±\d\.\d\d", text)
    assert len(quoted) > 5 and all(f"| {x} |" in tables for x in quoted)
    for said, flags in (
            ("without it, in training and in evaluation, `p1` ends at {}", "--temperature 0"),
            ("`p2` at {}.", "--transition p2 --temperature 0"),
            ("{} at random", "--score-steps 6"), ("(all: {})", ""),
            ("{} the first", "--score-steps 6 --reduction first"),
            ("{} the last", "--score-steps 6 --reduction last"),
            ("A quarter ends at {}", "--score-steps 3"),
            ("instead of 12 at {}", "--steps 6"), ("groups of 4 at {}", ""),
            ("more updates, `p1` ends at {}", "--filter-quantile 0 --updates 102"),
            ("Groups of 16 end at {}", "--group-size 16 --groups 6"),
            ("A third of the learning rate ends at {}", "--lr 5e-4"),
            ("three times as much at {}", "--lr 4.5e-3"),
            ("no difference that is seen here ({})", "--beta 0.01"),
            ("at 0.1 each seed ends lower ({})", "--beta 0.1"),
            ("do not end higher ({})", "--inner-epochs 2"),
            ("with the ratio per token each seed ends lower ({})",
             "--inner-epochs 2 --length-normalize")):
        each = values(runs[flags][:3], "heldout_trained")
        assert said.format(f"{each.mean():.2f}±{each.std():.2f}") in readme, said
    for flags in ("--beta 0.1", "--inner-epochs 2 --length-normalize"):
        assert (values(runs[flags], "heldout_trained") < p1[:3]).all()
    for flags in ("--beta 0.01", "--inner-epochs 2"):
        assert abs(values(runs[flags], "heldout_trained").mean() - p1[:3].mean()) < 0.02
    noiseless = runs["--temperature 0"]
    assert (f"the training captions rise from {values(noiseless, 'base').mean():.2f} to "
            f"{values(noiseless, 'trained').mean():.2f} all the same") in readme
    for which in ("", " --reduction first", " --reduction last"):
        half = values(runs[f"--score-steps 6{which}"], "heldout_trained")
        assert (half > p1[:3]).tolist() == [False, False, True]
    unfiltered, larger = (values(runs[flags], "heldout_trained").mean() for flags in (
        "--filter-quantile 0 --updates 102", "--group-size 16 --groups 6"))
    assert abs(unfiltered - p1[:3].mean()) < 0.01 and abs(larger - p1[:3].mean()) < 0.01
    assert (values(runs["--group-size 16 --groups 6"], "pictures").mean()
            < values(runs[""][:3], "pictures").mean())
    every = values(runs[""], "heldout_trained")
    assert f"to {every.min():.2f} to {every.max():.2f}.**" in readme
    twice = values(runs["--updates 108"], "heldout_trained")
    more = twice - every
    assert (f"on seeds 2 to 7, by {more[2:].min():.2f} to {more[2:].max():.2f}, equal on seed 0 "
            f"and {-more[1]:.2f} lower on seed 1; the mean of all eight rises from "
            f"{every.mean():.2f} to {twice.mean():.2f}.") in readme
    assert more[0] == 0 < more[2:].min()
    means = {name: sum(run["categories"][name] for run in runs[""]) / 8 for name in R.CATEGORIES}
    assert (f"end at {means['position']:.2f} and {means['attribution']:.2f} on average over the "
            f"eight seeds, `counting` at {means['counting']:.2f}, all others above") in readme
    assert all(means[name] > 0.85 for name in ("single", "two", "color"))
    trained_on = {phrase for captions in R.captions(False).values() for caption in captions
                  for phrase in R.phrases(caption)}
    new = {name: sum(not trained_on.issuperset(R.phrases(caption)) for caption in captions)
           for name, captions in R.captions(True).items()}
    assert {name: count for name, count in new.items() if count} == {"counting": 2, "position": 3}
    assert "of `counting` and 3 of 12 of `position` contain a token that no training" in readme
