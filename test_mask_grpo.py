# SPDX-License-Identifier: MIT
"""The second half of the text: what mask_grpo.py and reward.py claim, checked against independent truths.

`pytest -q`, CPU. Sections follow mask_grpo.py. Where a formula is checked, it is checked against something that is not
that formula: a hand calculation, an enumeration, a simulation of the sampler, finite differences.
"""
import csv
import dataclasses
import itertools
import math
import os
import pathlib
import random
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import mask_grpo as M
import reward as R

HERE = pathlib.Path(__file__).parent
TINY = dict(width=16, layers=1, pretrain_steps=2, steps=4, eval_steps=4, updates=2, prompts=2, group=4, warmup=1,
            eval_pictures=4, eval_every=10, device="cpu")


class TablePolicy:
    """The least a policy must answer to: num_tokens, codebook_size and one call. Its logits depend on the whole state."""

    def __init__(self, N=6, K=5, seed=0, scale=1.0):
        generator = torch.Generator().manual_seed(seed)
        self.num_tokens, self.codebook_size, self.states = N, K, []
        self.own = scale * torch.randn(N, K, generator=generator)
        self.other = scale * torch.randn(N, K + 1, N, K, generator=generator) / N ** 0.5

    def __call__(self, prompt_ids, tokens):
        self.states.append(tokens.clone())
        return self.own + sum(self.other[i, tokens[:, i]] for i in range(self.num_tokens))            # (B, N, K)


@pytest.fixture(scope="module")
def policy():
    """A small Policy with random weights and the shapes world's vocabulary."""
    return M.shapes_policy(M.Config(**TINY))


def paint(policy, B=8, steps=4, kind="p1", seed=0, **more):
    """A rollout of a policy that ignores its prompts."""
    return M.rollout(policy, torch.zeros(B, 1, dtype=torch.long), steps, kind=kind,
                     generator=torch.Generator().manual_seed(seed), **more)


# ---------------------------------------------------------------------------------------------------------------------
# 1. The policy


def test_text_is_laid_out_as_in_show_o(policy):
    """[t2i, bos, words, eos], left padded to the longest; bos is not doubled; too long a text keeps its end token."""
    bos, pad, t2i = policy.bos_id, policy.pad_id, policy.t2i_id
    words = policy.tokenize("a red star")
    assert len(words) == 3
    assert policy.encode(["a red star", ""]).tolist() == [[t2i, bos, *words, bos], [pad, pad, pad, t2i, bos, bos]]
    long = policy.encode(["a " * 200])[0].tolist()
    assert len(long) == policy.max_text + 1 and long[:2] == [t2i, bos] and long[-1] == bos
    assert (policy.soi_id, policy.eoi_id, t2i, policy.offset) == (pad + 1, pad + 2, pad + 5, pad + 10)


def test_attention_mask_is_show_os_on_a_case_by_hand(policy):
    """Two texts of 1 and 2 ids, the first padded. Rows are queries, columns keys, x sees.

        pad  x . . ...      a pad sees pads before it, so that no row is empty
        txt  . x . ...      text is causal and blind to pads and picture
        img  . x x ...      the picture sees everything but pads
    """
    allowed = policy.attention_mask(torch.tensor([[policy.pad_id, 1], [1, 1]]))[:, 0] == 0            # (2, L, L)
    L = 2 + policy.num_tokens + 2
    assert allowed.shape == (2, L, L)
    assert allowed[0, 0].tolist() == [True] + [False] * (L - 1)
    assert allowed[0, 1].tolist() == [False, True] + [False] * (L - 2)
    assert allowed[0, 2:].all(0).tolist() == allowed[0, 2:].any(0).tolist() == [False] + [True] * (L - 1)
    assert allowed[1, 1].tolist() == [True, True] + [False] * (L - 2) and allowed[1, 2:].all()


def test_picture_sees_text_and_picture_but_text_sees_no_picture(policy):
    """Behaviour, not mask: which outputs move when one input moves."""
    ids = policy.encode(["a red star"])
    tokens = torch.randint(policy.codebook_size + 1, (1, 36), generator=torch.Generator().manual_seed(0))
    for changed in (0, 17, 35):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % policy.codebook_size
        assert ((policy(ids, tokens) - policy(ids, other)).abs().amax(-1) > 0).all()
    word = policy(policy.encode(["a blue star"]), tokens)
    assert ((policy(ids, tokens) - word).abs().amax(-1) > 0).all()

    def text_states(tokens):
        sequence = torch.cat([ids, torch.full((1, 1), policy.soi_id), tokens + policy.offset, torch.full((1, 1), policy.eoi_id)], 1)
        return policy.lm.model(sequence, attention_mask=policy.attention_mask(ids), use_cache=False)[0][:, :ids.shape[1]]

    assert torch.equal(text_states(tokens), text_states(tokens.flip(1)))


def test_pads_change_nothing(policy):
    """A short prompt gives the same logits alone and beside a long one; so does another id in the place of the pad."""
    tokens = torch.full((2, 36), policy.codebook_size)
    alone = policy(policy.encode(["a star"]), tokens[:1])
    ids = policy.encode(["a star", "a red circle and a blue star"])
    assert torch.allclose(policy(ids, tokens)[:1], alone, atol=1e-4)


def test_logits_are_the_heads_rows_of_the_codes(policy):
    """Slicing the head before it is applied equals applying all of it and slicing the logits."""
    ids, tokens = policy.encode(["a star"]), torch.full((1, 36), policy.codebook_size)
    sequence = torch.cat([ids, torch.full((1, 1), policy.soi_id), tokens + policy.offset, torch.full((1, 1), policy.eoi_id)], 1)
    assert sequence[0, -2] == policy.lm.config.vocab_size - 1                      # MASK is the last id of all
    whole = policy.lm(sequence, attention_mask=policy.attention_mask(ids), use_cache=False).logits
    assert torch.allclose(policy(ids, tokens), whole[:, -37:-1, policy.offset:-1], atol=1e-5)


def test_nothing_in_the_policy_is_random(policy):
    """No dropout: learning and acting modes agree, else the ratio would not start at 1."""
    ids, tokens = policy.encode(["a star"]), torch.full((1, 36), policy.codebook_size)
    assert torch.equal(policy.train()(ids, tokens), policy.eval()(ids, tokens))


def test_decoding_gives_the_tiles_back_exactly(policy):
    tokens = torch.arange(36)[None] + 13
    picture = policy.decode(tokens)[0]
    assert picture.shape == (48, 48, 3) and picture.dtype == torch.uint8
    for position, code in enumerate(tokens[0]):
        y, x = 8 * (position // 6), 8 * (position % 6)
        assert torch.equal(picture[y:y + 8, x:x + 8], R.tiles()[code])


# ---------------------------------------------------------------------------------------------------------------------
# 2. Schedule and transition probabilities


def test_schedule_equals_the_published_samplers():
    """Numbers of Show-o's sampler, but for its last step, which leaves one token masked. At ratio 2/3 float32 decides."""
    assert M.mask_schedule(50, 1024)[:12] == [1023, 1021, 1019, 1015, 1011, 1005, 999, 991, 983, 973, 963, 952]
    assert M.mask_schedule(50, 1024)[-4:] == [96, 64, 32, 0]
    assert M.mask_schedule(16, 256) == [254, 251, 244, 236, 225, 212, 197, 181, 162, 142, 120, 97, 74, 49, 25, 0]
    assert M.mask_schedule(12, 36)[7] == 17 and M.mask_schedule(18, 36)[11] == 17 and M.mask_schedule(6, 16)[3] == 7
    assert M.mask_schedule(4, 16) == [14, 11, 6, 0] and M.mask_schedule(1, 9) == [0]


@pytest.mark.parametrize("N", [1, 5, 36, 256])
def test_every_step_of_every_schedule_reveals_a_token(N):
    for T in range(1, min(N, 64) + 1):
        schedule = M.mask_schedule(T, N)
        assert len(schedule) == T and schedule[-1] == 0
        assert all(before > after for before, after in zip([N] + schedule, schedule))


# p_0 = (0.7, 0.2, 0.1) and p_1 = (0.6, 0.3, 0.1)
HAND = torch.tensor([[[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]]]).log()


@pytest.mark.parametrize("kind, revealed, noise, expected", [
    # position 0 is kept with its 0.7; all of p_1 lies below 0.7, so it was sure to lose
    ("p2", 0, None, 0.7), ("p1", 0, None, 0.7 * (0.6 + 0.3 + 0.1)), ("ar", 0, None, 0.7 * 0.1),
    # position 1 is kept with its 0.6: position 0 must have drawn 0.2 or 0.1, for 0.7 would have won
    ("p2", 1, None, 0.6), ("p1", 1, None, 0.6 * (0.2 + 0.1)), ("ar", 1, None, 0.6 * 0.2),
    # noise lifts position 1 by log 1.5 to 0.9: now even 0.7 loses. As printed, Eq. 14 does not see that
    ("p1", 1, [0.0, math.log(1.5)], 0.6 * (0.7 + 0.2 + 0.1)), ("p1_literal", 1, [0.0, math.log(1.5)], 0.6 * (0.2 + 0.1)),
    # noise lowers position 0 to 0.14 and it is kept all the same, position 1 at 0.06 .. 0.01: p1 = 0.7
    ("p1", 0, [math.log(0.2), math.log(0.1)], 0.7 * (0.6 + 0.3 + 0.1)),
])
def test_transition_by_hand(kind, revealed, noise, expected):
    """Two positions, three codes: one position reveals its code 0, the other stays masked.

    The last case changes sides under noise: raw, 0.6 < 0.7, and noisy, 0.06 < 0.14.
    """
    step = torch.tensor([[0, 1]] if revealed == 0 else [[1, 0]])
    tokens = torch.where(step == 0, 0, 3)
    drawn = torch.tensor([[0, 2]] if revealed == 0 else [[1, 0]])
    noise = None if noise is None else torch.tensor([noise])
    got = M.transition_logprob(HAND, tokens, step, 0, kind, noise, drawn)
    assert got.shape == (1,) and got.exp().item() == pytest.approx(expected, rel=1e-5)


def next_states(logits, n, noise):
    """The sampler by brute force: all K^N draws, each kept or remasked by rank -> dict (tokens, MASK as -1) -> probability.

    Plain Python on purpose, and no word of Eq. 14: draw, rank, keep the n best.
    """
    p = logits.softmax(-1).tolist()
    outcome = {}
    for draw in itertools.product(range(len(p[0])), repeat=len(p)):
        score = [math.log(p[j][k]) + noise[j] for j, k in enumerate(draw)]
        best = sorted(range(len(p)), key=lambda j: -score[j])[:n]
        state = tuple(k if j in best else -1 for j, k in enumerate(draw))
        outcome[state] = outcome.get(state, 0) + math.prod(p[j][k] for j, k in enumerate(draw))
    return outcome


def score_states(logits, states, kind, noise):
    """exp(transition_logprob) of reaching each of the states from an all-masked one."""
    tokens = torch.tensor(states)
    step = (tokens < 0).long()
    rows = len(states)
    return M.transition_logprob(logits.expand(rows, *logits.shape), tokens.clamp(min=0), step, 0, kind,
                                torch.tensor(noise).expand(rows, -1)).exp()


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_p1_without_noise_is_a_probability_and_p2_is_none(n, seed):
    """3 tokens, 3 codes, all 27 draws: p1 is the probability of each next state and sums to 1; p2 sums to more."""
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))
    truth = next_states(logits, n, [0.0] * 3)
    p1, p2 = (score_states(logits, list(truth), kind, [0.0] * 3) for kind in ("p1", "p2"))
    assert torch.allclose(p1, torch.tensor(list(truth.values())), atol=1e-6)
    assert p1.sum().item() == pytest.approx(1, abs=1e-5)
    assert p2.sum().item() > 1.01


@pytest.mark.parametrize("seed", range(5))
def test_p1_given_the_noise_is_the_frequency_of_the_transition(seed):
    """Hold the noise, draw 200,000 times, rank, count. The literal formula misses some state by far."""
    generator = torch.Generator().manual_seed(seed)
    logits, noise = torch.randn(4, 3, generator=generator), torch.randn(4, generator=generator)
    draws, n = 200_000, 2
    drawn = torch.multinomial(logits.softmax(-1), draws, replacement=True, generator=generator).T     # (draws, 4)
    rank = (logits.log_softmax(-1).gather(1, drawn.T).T + noise).argsort(1, descending=True)          # (draws, 4)
    state = drawn.scatter(1, rank[:, n:], -1)
    states, counts = state.unique(dim=0, return_counts=True)
    frequency = counts / draws
    p1 = score_states(logits, states.tolist(), "p1", noise.tolist())
    literal = score_states(logits, states.tolist(), "p1_literal", noise.tolist())
    sigma = (p1 * (1 - p1) / draws).sqrt()
    assert ((p1 - frequency).abs() < 5 * sigma + 1e-6).all()
    assert (literal - frequency).abs().max() > 0.02


def test_p1_differs_from_p2_unless_the_threshold_has_become_a_bool():
    """Pitfall 1: `p < True` is p < 1, the inner sum is 1, and p1 silently equals p2."""
    path = paint(TablePolicy())
    args = (path.tokens, path.step, 1)
    logits = TablePolicy(seed=1)(None, path.tokens)
    p1, p2 = (M.transition_logprob(logits, *args, kind, path.noise[1]) for kind in ("p1", "p2"))
    assert (p1 < p2 - 1e-3).any() and (p1 <= p2 + 1e-6).all()


def test_what_was_sampled_is_possible_under_p1_but_not_always_under_the_literal_formula():
    """Pitfall 2. The empty inner sums of the literal formula show as log-probabilities near its floor."""
    table = TablePolicy(N=12, K=4, scale=2.0)
    assert paint(table, B=200, steps=6, kind="p1").logp_old.min() > M.FLOOR / 2
    literal = paint(table, B=200, steps=6, kind="p1_literal").logp_old
    assert literal.min() < M.FLOOR / 2 and literal.isfinite().all()


def test_temperature_zero_makes_p1_and_the_literal_formula_equal():
    table = TablePolicy()
    one, literal = (paint(table, kind=kind, temperature=0.0).logp_old for kind in ("p1", "p1_literal"))
    assert torch.equal(one, literal)


def test_an_event_that_became_impossible_stays_finite_in_value_and_gradient():
    """Position 0 was kept over position 1; under these logits whatever position 1 draws would have won."""
    logits = torch.tensor([[[0.0, 0.0, 0.0], [0.0, -200.0, -200.0]]], requires_grad=True)
    noise = torch.tensor([[0.0, 300.0]])
    logp = M.transition_logprob(logits, torch.tensor([[0, 3]]), torch.tensor([[0, 1]]), 0, "p1", noise)
    logp.sum().backward()
    assert logp.isfinite().all() and logp < -40 and logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", M.TRANSITIONS)
def test_extreme_half_precision_logits_stay_finite(kind):
    """Pitfall 8: log(softmax) in half precision would be log 0."""
    logits = (torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(0)) * 1000).bfloat16()
    step = torch.arange(6).expand(4, 6) % 3
    logp = M.transition_logprob(logits, torch.zeros(4, 6, dtype=torch.long), step, 1, kind,
                                torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.long))
    assert logp.dtype == torch.float32 and logp.isfinite().all()


def test_a_step_per_sample_scores_like_one_step_for_all():
    """Any (picture, step) pairs form a micro-batch: t as a vector equals t as an int, row by row."""
    table = TablePolicy()
    path = paint(table, B=4, steps=4, kind="ar")
    t, b = torch.tensor([3, 0, 2, 1]), torch.arange(4)
    for kind in M.TRANSITIONS:
        together = M.path_logprob(table, path.tokens, path, b, t, kind)
        alone = [M.path_logprob(table, path.tokens, path, b[i:i + 1], t[i:i + 1], kind) for i in range(4)]
        assert torch.allclose(together, torch.cat(alone), atol=1e-5)
        state = path.tokens.masked_fill(path.step >= 2, 5)
        as_int = M.transition_logprob(table(None, state), path.tokens, path.step, 2, kind, path.noise[2], path.drawn[2])
        assert torch.allclose(together[2], as_int[2], atol=1e-5)


def test_factors_counts_what_is_multiplied():
    """step 1 of [0, 1, 1, 2, 2, 2]: two tokens revealed; with the three remasked ones, five factors in p1 and ar."""
    step, t = torch.tensor([[0, 1, 1, 2, 2, 2]]), torch.tensor([1])
    assert [M.factors(step, t, kind).item() for kind in M.TRANSITIONS] == [5, 5, 2, 5]


# ---------------------------------------------------------------------------------------------------------------------
# 3. The sampler


@pytest.mark.parametrize("N, T", [(6, 1), (6, 3), (6, 6), (36, 12), (36, 18)])
def test_every_position_is_revealed_once_and_counts_follow_the_schedule(N, T):
    path = paint(TablePolicy(N=N, K=4), steps=T)
    assert ((path.tokens >= 0) & (path.tokens < 4)).all() and ((path.step >= 0) & (path.step < T)).all()
    masked = [N] + M.mask_schedule(T, N)
    for t in range(T):
        assert ((path.step == t).sum(1) == masked[t] - masked[t + 1]).all()
    assert path.noise.isfinite().all()


def test_replayed_states_are_the_states_acted_in():
    """Pitfall 16. The policy remembers what it was shown; the replay must show the same."""
    table = TablePolicy(N=8)
    path = paint(table, B=5, steps=4, kind="ar")
    acted, table.states = table.states, []
    for t in range(4):
        M.path_logprob(table, path.tokens, path, torch.arange(5), torch.full((5,), t), "ar")
    assert all(torch.equal(a, b) for a, b in zip(acted, table.states, strict=True))
    assert (acted[0] == table.codebook_size).all() and (acted[3] == table.codebook_size).any()


def test_draws_follow_the_policy_and_kept_tokens_are_the_most_confident():
    """At temperature 0 with one step's choice: the first step keeps the draw of highest probability."""
    table = TablePolicy(N=3, K=3)
    path = paint(table, B=20_000, steps=3, kind="ar", temperature=0.0)
    p = table(None, torch.full((1, 3), 3))[0].softmax(-1)                                             # (3, 3)
    frequency = torch.nn.functional.one_hot(path.drawn[0], 3).float().mean(0)
    assert (frequency - p).abs().max() < 0.02
    chosen = p.log().expand(20_000, 3, 3).gather(-1, path.drawn[0][..., None]).squeeze(-1)
    assert (chosen.argmax(1) == (path.step == 0).int().argmax(1)).all()


def test_the_noise_is_gumbel_and_its_temperature_compounds():
    """Pitfall 14: temperature_t = temperature * prod (1 - (j + 1) / T); mean .577 and variance pi^2 / 6 of Gumbel noise."""
    path = paint(TablePolicy(N=4), B=50_000, steps=4, temperature=2.0)
    for t, expected in enumerate([2 * 0.75, 2 * 0.75 * 0.5, 2 * 0.75 * 0.5 * 0.25, 0.0]):
        assert path.noise[t].mean().item() == pytest.approx(0.5772 * expected, abs=0.02)
        assert path.noise[t].std().item() == pytest.approx(math.pi / 6 ** 0.5 * expected, abs=0.02)
    assert M.gumbel((10 ** 6,), None, "cpu").isfinite().all()


def test_guidance_is_one_plus_g_conditional_minus_g_unconditional():
    """Show-o's convention, where g = 5 is 6 in the other. Read off the recorded log-probability of the first step."""
    conditional, empty = TablePolicy(seed=1), TablePolicy(seed=2)

    class Both(TablePolicy):
        def __call__(self, prompt_ids, tokens):
            return (empty if prompt_ids[0, 0] < 0 else conditional)(prompt_ids, tokens)

    path = paint(Both(), guidance=1.5, null_ids=torch.full((8, 1), -1), kind="p2", steps=3)
    start = torch.full((8, 6), 5)
    guided = 2.5 * conditional(None, start) - 1.5 * empty(None, start)
    assert torch.allclose(path.logp_old[0], M.transition_logprob(guided, path.tokens, path.step, 0, "p2"), atol=1e-5)


def test_the_same_seed_paints_the_same_and_another_does_not():
    table = TablePolicy()
    one, same, other = (paint(table, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.tokens, same.tokens) and not torch.equal(one.tokens, other.tokens)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Advantage and filter


def test_advantage_by_hand():
    """[1, 2, 3]: mean 2, unbiased std 1. [0, 0, 6]: mean 2, unbiased std sqrt(12). Each group by its own."""
    got = M.group_advantage(torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0]]))
    expected = torch.tensor([[-1.0, 0.0, 1.0], [-2 / 12 ** 0.5, -2 / 12 ** 0.5, 4 / 12 ** 0.5]])
    assert torch.allclose(got, expected, atol=1e-3)


def test_a_group_of_equal_rewards_teaches_nothing():
    """Pitfall 10: exactly 0 where rewards are equal, and small where they differ by rounding."""
    assert (M.group_advantage(torch.full((1, 6), 0.3)).abs() < 1e-3).all()
    assert M.group_advantage(torch.tensor([[1.0, 1.0 + 1e-6, 1.0]])).abs().max() < 0.05


def test_the_filter_accepts_all_until_it_has_seen_enough_and_then_cuts_at_its_quantile():
    sieve = M.SampleFilter(quantile=0.1, warmup=10)
    assert sieve.keep(torch.zeros(9)).all()                                         # nothing to compare with yet
    assert sieve.keep(torch.arange(1.0, 92.0)).all()                                # 9 seen: still too few
    # history: nine zeros and 1..91; its 10th percentile lies near 1
    assert sieve.keep(torch.tensor([0.0, 0.5, 50.0])).tolist() == [False, False, True]
    assert M.SampleFilter(quantile=0.0, warmup=0).keep(torch.zeros(5)).all()        # 0 turns it off


def test_a_group_without_spread_vanishes_even_when_the_quantile_is_zero():
    """With binary rewards the 10th percentile soon is 0, and nothing is below it; yet such groups teach nothing."""
    sieve = M.SampleFilter(quantile=0.1, warmup=10)
    sieve.keep(torch.zeros(50))
    assert sieve.keep(torch.tensor([0.0, 0.5])).tolist() == [False, True]


def test_resampling_is_bounded_and_replaces_only_the_vanished(policy):
    """A reward that gives half of the groups no spread: those are painted again, the others kept."""
    config = M.Config(**{**TINY, "prompts": 4, "filter_tries": 3})
    sieve = M.SampleFilter(0.1, warmup=0)
    sieve.history.extend([0.0, 0.5])
    calls = []

    def reward(images, prompts):
        calls.append(len(prompts) // 4)
        groups = torch.arange(len(prompts)) // 4
        return (groups % 2 == 0) * (torch.arange(len(prompts)) % 2).float()

    names, path, kept, painted = M.sample_groups(policy, reward, ["a star"], sieve, config, torch.Generator())
    assert calls == [4, 2, 1] and len(names) == len(path.tokens) == 16 and len(kept) == 4 and len(painted) == 7
    assert (kept.std(1) > 0).all() and path.logp_old.shape == (4, 16)

    never = lambda images, prompts: torch.zeros(len(prompts))
    names, path, kept, painted = M.sample_groups(policy, never, ["a star"], sieve, config, torch.Generator())
    assert names == [] and len(kept) == len(path.tokens) == 0 and len(painted) == 4 * (1 + 3)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Loss


def test_loss_is_zero_but_gradient_is_not():
    """The most asked GRPO question. At ratio 1 the loss is -mean(A) = 0, and its gradient is -A / M."""
    advantage = M.group_advantage(torch.tensor([[1.0, 0.0, 0.0, 1.0]])).flatten()
    logp = torch.full((4,), -3.0, requires_grad=True)
    loss, _ = M.grpo_loss(logp, logp.detach(), advantage, 0.1, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert torch.allclose(logp.grad, -advantage / 4)


@pytest.mark.parametrize("advantage, ratio, flows", [(1, 1.3, False), (1, 0.5, True), (-1, 0.5, False), (-1, 1.3, True),
                                                     (1, 1.15, True), (-1, 0.95, True)])
def test_clipping_stops_only_what_would_push_further_out(advantage, ratio, flows):
    """Bounds 0.9 and 1.2: a good sample is not pushed above 1.2, a bad one not below 0.9; ways back stay open."""
    logp = torch.tensor([math.log(ratio)], requires_grad=True)
    loss, numbers = M.grpo_loss(logp, torch.zeros(1), torch.tensor([float(advantage)]), 0.1, 0.2)
    loss.backward()
    assert (logp.grad.abs().item() > 0) == flows and numbers["clip"].item() == (not flows)
    assert numbers["ratio"].item() == pytest.approx(ratio)


def test_the_minimum_is_taken_per_sample():
    """Pitfall 5. Ratios 2 and 0.5, advantages 1 and 1: min per sample (1.2 + 0.5) / 2, min of means min(1.25, 1.05)."""
    loss, _ = M.grpo_loss(torch.tensor([2.0, 0.5]).log(), torch.zeros(2), torch.ones(2), 0.1, 0.2)
    assert loss.item() == pytest.approx(-0.85)


@pytest.mark.parametrize("kind", M.TRANSITIONS)
def test_gradient_agrees_with_finite_differences_in_float64(kind):
    """d loss / d logits for 2 positions and 3 codes, away from ratio 1, against central differences."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    noise, drawn = torch.randn(2, 2, generator=generator, dtype=torch.float64), torch.tensor([[0, 2], [1, 1]])
    tokens, step = torch.tensor([[0, 2], [1, 1]]), torch.tensor([[0, 1], [1, 0]])

    def loss(logits):
        logp = M.transition_logprob(logits, tokens, step, 0, kind, noise, drawn)
        return M.grpo_loss(logp, logp.detach() + torch.tensor([0.05, -0.05]), torch.tensor([1.0, -2.0]), 0.1, 0.2)[0]

    old = M.transition_logprob(logits.detach(), tokens, step, 0, kind, noise, drawn) + torch.tensor([0.05, -0.05])
    fixed = lambda x: M.grpo_loss(M.transition_logprob(x, tokens, step, 0, kind, noise, drawn), old,
                                  torch.tensor([1.0, -2.0]).double(), 0.1, 0.2)[0]
    assert torch.autograd.gradcheck(fixed, (logits,), eps=1e-6, atol=1e-7)
    assert torch.autograd.grad(fixed(logits), logits)[0].abs().max() > 1e-3


def test_k3_is_zero_at_equality_and_a_kl_elsewhere():
    """Its mean under p is KL(p || q): sum p (q/p - 1 - log q/p) = 0 + sum p log p/q. And its gradient is real."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    assert (M.kl_k3(p.log(), p.log()) == 0).all()
    assert (p * M.kl_k3(p.log(), q.log())).sum().item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)
    logp = p.log().requires_grad_()
    assert torch.autograd.grad(M.kl_k3(logp, q.log()).sum(), logp)[0].abs().min() > 0
    assert torch.autograd.grad(M.kl_k3(logp, p.log()).sum(), logp)[0].abs().max() < 1e-6


# ---------------------------------------------------------------------------------------------------------------------
# 6. One update


@pytest.fixture
def rollout_of(policy):
    """(prompt ids, trajectory, advantage) of 4 pictures, for a given Config."""
    def make(config, seed=0):
        ids = policy.encode(["a red star", "two circles"] * 2)
        path = M.rollout(policy, ids, config.steps, kind=config.transition, generator=torch.Generator().manual_seed(seed))
        return ids, path, torch.tensor([1.0, -1.0, 0.5, -0.5])
    return make


class Gradient(torch.optim.SGD):
    """An optimizer that keeps the gradients it was given and, at learning rate 0, changes nothing."""
    seen = None

    def step(self, closure=None):
        self.seen = torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"] if p.grad is not None])
        return super().step(closure)


def gradient(policy, config, batch, reference=None):
    """The gradient that learn() hands to the optimizer."""
    optimizer = Gradient(policy.parameters(), lr=0.0)
    log = M.learn(policy, reference, optimizer, *batch, config)
    return optimizer.seen, log


@pytest.mark.parametrize("kind", M.TRANSITIONS)
def test_ratio_is_one_before_the_first_update_for_every_transition(policy, rollout_of, kind):
    """Pitfall 7: the learner, in other batches and with gradients, computes what the rollout recorded."""
    config = M.Config(**{**TINY, "transition": kind})
    ids, path, _ = rollout_of(config)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(config.steps)).flip(0)
    for b, t in (chunk.unbind(1) for chunk in pairs.split(3)):
        logp = M.path_logprob(policy, ids, path, b, t, kind)
        assert logp.requires_grad and (logp - path.logp_old[t, b]).abs().max() < 1e-4


def test_gradient_is_hand_derived_one(policy, rollout_of):
    """At ratio 1: -(1 / (B T)) sum of A grad log p over all pictures and steps, with 1 / T applied once (pitfall 18)."""
    config = M.Config(**{**TINY, "max_grad_norm": 1e9, "prompts": 1, "group": 4})
    ids, path, advantage = rollout_of(config)
    policy.zero_grad()
    total = 0
    for t in range(config.steps):
        logp = M.path_logprob(policy, ids, path, torch.arange(4), torch.full((4,), t), "p1")
        total = total - (advantage * logp).sum() / (4 * config.steps)
    total.backward()
    by_hand = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad(set_to_none=True)
    got, log = gradient(policy, config, (ids, path, advantage))
    assert torch.allclose(got, by_hand, atol=1e-5) and by_hand.abs().max() > 1e-3
    assert log["grad"] == pytest.approx(by_hand.norm().item(), rel=1e-3)
    clipped, log = gradient(policy, dataclasses.replace(config, max_grad_norm=0.01), (ids, path, advantage))
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-2)


def test_micro_batches_never_change_the_gradient(policy, rollout_of):
    config = M.Config(**TINY)
    batch = rollout_of(config)
    reference, _ = gradient(policy, config, batch)
    for size in (1, 3, 7, 16):
        split, _ = gradient(policy, dataclasses.replace(config, micro_batch=size), batch)
        assert torch.allclose(split, reference, atol=1e-6)


def test_both_ends_of_the_computational_reduction_choose_their_steps(policy, rollout_of, monkeypatch):
    config, scored, original = M.Config(**TINY), [], M.path_logprob
    batch = rollout_of(config)
    monkeypatch.setattr(M, "path_logprob", lambda *a: scored.extend(a[4].tolist()) or original(*a))
    for k, expected in ((0, [0, 1, 2, 3]), (2, [0, 1]), (-1, [3]), (4, [0, 1, 2, 3])):
        scored.clear()
        gradient(policy, dataclasses.replace(config, score_steps=k), batch)
        assert sorted(scored) == sorted(expected * 4)


def test_later_epochs_leave_ratio_one_and_clipping_acts(rollout_of):
    """Pitfall 4: with a detached copy of the new log-probability the ratio would stay 1 and clip at 0 for ever."""
    fresh = M.shapes_policy(M.Config(**TINY))
    config = M.Config(**{**TINY, "inner_epochs": 2, "prompts": 1})
    batch = rollout_of(config)
    log = M.learn(fresh, None, torch.optim.SGD(fresh.parameters(), lr=1.0), *batch, config)
    assert log["ratio_first"] == pytest.approx(1, abs=1e-4) and log["clip"] > 0
    ids, path, _ = batch
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    assert abs(log["ratio"] - 1) > 1e-3


def test_the_length_normalised_ratio_is_the_geometric_mean_per_factor(policy, rollout_of, monkeypatch):
    config = M.Config(**{**TINY, "length_normalize": True, "micro_batch": 999})
    ids, path, advantage = rollout_of(config)
    seen, original = [], M.grpo_loss
    monkeypatch.setattr(M, "grpo_loss", lambda *a: seen.append(a) or original(*a))
    gradient(policy, config, (ids, path, advantage))
    b, t = torch.cartesian_prod(torch.arange(4), torch.arange(4)).unbind(1)
    masked_before = torch.tensor([36] + M.mask_schedule(4, 36)[:-1])[t]                              # all that p1 multiplies
    assert torch.allclose(seen[0][1], path.logp_old[t, b] / masked_before)


def test_kl_changes_the_gradient_once_the_policy_has_left_its_reference(policy, rollout_of):
    """Pitfall 3. At equality beta does nothing; against other weights it does."""
    config = M.Config(**TINY)
    batch = rollout_of(config)
    plain, log = gradient(policy, config, batch)
    assert "kl" not in log
    with_kl = dataclasses.replace(config, beta=1.0)
    same, log = gradient(policy, with_kl, batch, reference=policy)
    assert torch.allclose(plain, same, atol=1e-5) and log["kl"] == pytest.approx(0, abs=1e-6)
    other, log = gradient(policy, with_kl, batch, reference=M.shapes_policy(M.Config(**{**TINY, "seed": 5})))
    assert (plain - other).abs().max() > 1e-4 and log["kl"] > 0


def test_a_wrong_old_log_probability_stops_the_run(policy, rollout_of):
    config = M.Config(**TINY)
    ids, path, advantage = rollout_of(config)
    path.logp_old += 0.01
    with pytest.raises(M.RunError, match="off 1 by 1.0e-02"):
        M.learn(policy, None, Gradient(policy.parameters(), lr=0.0), ids, path, advantage, config)


def test_warmup_and_cosine():
    """Linear to 1, then down to 0 at the end: factor(0) = 1/3 for 2 updates of warm-up, half of the peak at half time."""
    factor = M.warmup_cosine(2, 100)
    assert factor(0) == pytest.approx(1 / 3, rel=1e-3) and factor(50) == pytest.approx(0.5) and factor(100) == 0


# ---------------------------------------------------------------------------------------------------------------------
# 7. The shapes world


def images_of(scenes):
    """Scenes (lists of codes) as PIL images, by the codebook alone."""
    tiles = R.tiles()[torch.tensor(scenes)].reshape(-1, 6, 6, 8, 8, 3).transpose(2, 3).reshape(-1, 48, 48, 3)
    return [Image.fromarray(picture.numpy()) for picture in tiles]


def scene(*objects):
    """A scene from (shape, colour, row, column)."""
    codes = [0] * 36
    for shape, color, row, column in objects:
        first = 1 + 4 * R.OBJECTS.index((shape, color))
        for quarter in range(4):
            codes[6 * (2 * row + quarter // 2) + 2 * column + quarter % 2] = first + quarter
    return codes


def test_the_world_is_large_enough_and_its_tiles_differ():
    assert R.GRID ** 2 >= 36 and R.CODEBOOK_SIZE >= 40
    assert len(R.tiles().unique(dim=0)) == R.CODEBOOK_SIZE == len(R.tiles())


def test_held_out_captions_share_no_meaning_with_the_others():
    """All six categories on both sides; "a star and a circle" never opposite "a circle and a star"."""
    trained, heldout = R.captions(False), R.captions(True)
    assert list(trained) == list(heldout) == list(R.CATEGORIES)
    meaning = {caption: (category, what) for category, what, caption in R.all_captions()}
    for category in R.CATEGORIES:
        assert trained[category] and heldout[category]
        assert not {meaning[c] for c in trained[category]} & {meaning[c] for c in heldout[category]}
    assert sum(map(len, trained.values())) + sum(map(len, heldout.values())) == len(meaning) == len(list(R.all_captions()))
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "and": "and"}
    for side in (trained, heldout):
        for caption in side["position"] + side["two"]:
            word = next(w for w in opposite if f" {w} " in caption)
            first, second = caption.split(f" {word} ")
            assert f"{second} {opposite[word]} {first}" in side["position"] + side["two"]


def test_every_drawing_is_right_and_right_for_its_own_caption_only():
    rng = random.Random(0)
    captions = [caption for *_, caption in R.all_captions()] * 3
    images = images_of([R.draw_scene(caption, rng) for caption in captions])
    assert R.shapes_reward(images, captions).eq(1).all()
    assert R.shapes_reward(images, ["four stars"] * len(images)).sum() == captions.count("four stars")


@pytest.mark.parametrize("caption, objects, right", [
    ("a star", [("star", "red", 0, 0)], True),
    ("a star", [("star", "red", 0, 0), ("star", "red", 2, 2)], False),                                  # one too many
    ("a star", [], False),
    ("a star", [("circle", "red", 0, 0)], False),
    ("a star", [("star", "red", 0, 0), ("circle", "red", 1, 1)], False),                                # uncalled for
    ("three stars", [("star", "red", 0, 0), ("star", "blue", 1, 1), ("star", "red", 2, 2)], True),      # any colours
    ("three stars", [("star", "red", 0, 0), ("star", "blue", 1, 1)], False),
    ("a red star", [("star", "blue", 0, 0)], False),
    ("a circle and a star", [("star", "red", 0, 0), ("circle", "red", 0, 1)], True),
    ("a circle and a star", [("circle", "red", 0, 0), ("circle", "red", 0, 1)], False),
    ("a circle left of a star", [("circle", "red", 2, 0), ("star", "red", 0, 1)], True),                # rows are free
    ("a circle left of a star", [("circle", "red", 0, 1), ("star", "red", 0, 1 - 1)], False),
    ("a circle left of a star", [("circle", "red", 0, 1), ("star", "red", 2, 1)], False),               # same column
    ("a circle right of a star", [("circle", "red", 0, 1), ("star", "red", 0, 0)], True),
    ("a circle above a star", [("circle", "red", 0, 2), ("star", "red", 1, 0)], True),
    ("a circle below a star", [("circle", "red", 0, 2), ("star", "red", 1, 0)], False),
    ("a red circle and a blue star", [("star", "blue", 0, 0), ("circle", "red", 1, 1)], True),
    ("a red circle and a blue star", [("star", "red", 0, 0), ("circle", "blue", 1, 1)], False),         # colours exchanged
])
def test_judge_on_right_and_subtly_wrong_pictures(caption, objects, right):
    assert R.shapes_reward(images_of([scene(*objects)]), [caption]).item() == right


def test_judge_sees_broken_objects_and_forgives_rounding():
    """Two quarters exchanged, one quarter of another colour, one missing: each is wrong. A little noise is not."""
    good = scene(("star", "red", 1, 1))
    at = [14, 15, 20, 21]
    assert [good[i] for i in at] == list(range(good[14], good[14] + 4))
    swapped, recolored, missing, stray = (list(good) for _ in range(4))
    swapped[14], swapped[15] = good[15], good[14]
    recolored[21] = 1 + 4 * R.OBJECTS.index(("star", "blue")) + 3
    missing[20] = 0
    stray[0] = 1
    pictures = images_of([good, swapped, recolored, missing, stray])
    assert R.shapes_reward(pictures, ["a star"] * 5).tolist() == [1, 0, 0, 0, 0]
    noisy = np.asarray(pictures[0]).astype(int) + np.random.default_rng(0).integers(-20, 21, (48, 48, 3))
    assert R.shapes_reward([Image.fromarray(noisy.clip(0, 255).astype(np.uint8))], ["a star"]).item() == 1
    with pytest.raises(ValueError, match="48 x 48"):
        R.shapes_reward([Image.new("RGB", (64, 64))], ["a star"])
    with pytest.raises(ValueError, match="no caption 'a dragon'"):
        R.shapes_reward(pictures[:1], ["a dragon"])


def test_pretraining_masks_by_the_cosine_law_and_empties_some_prompts(monkeypatch):
    """The mean share of masked tokens is 2 / pi; with prompt_dropout 0.5 half of the prompts are empty."""
    tiny, shares, texts = M.shapes_policy(M.Config(**TINY)), [], []
    forward, encode = M.Policy.forward, M.Policy.encode
    monkeypatch.setattr(M.Policy, "forward", lambda self, ids, x: shares.append((x == 49).float().mean()) or forward(self, ids, x))
    monkeypatch.setattr(M.Policy, "encode", lambda self, prompts: texts.extend(prompts) or encode(self, prompts))
    M.pretrain(tiny, M.Config(**{**TINY, "pretrain_steps": 60, "prompt_dropout": 0.5}))
    assert torch.stack(shares).mean().item() == pytest.approx(2 / math.pi, abs=0.05)
    assert texts.count("") / len(texts) == pytest.approx(0.5, abs=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# 8. The run


def run(tmp_path, **settings):
    """Train a tiny policy -> (closing numbers, checkpoint, rows of metrics.csv)."""
    config = M.Config(**{**TINY, "out": str(tmp_path), **settings})
    numbers = M.train(config)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return numbers, torch.load(tmp_path / "checkpoint.pt", weights_only=True), rows


def red(images, prompts):
    """A reward any policy can raise: the share of red pixels."""
    return torch.tensor([float((np.asarray(i)[..., 0].astype(int) - np.asarray(i)[..., 2] > 100).mean()) for i in images])


@pytest.fixture
def red_reward(monkeypatch):
    monkeypatch.setitem(R.REWARDS, "red", red)


def test_a_run_leaves_what_it_promises(tmp_path, capsys):
    numbers, checkpoint, rows = run(tmp_path, eval_every=1)
    assert [int(row["update"]) for row in rows] == [1, 2] and list(rows[0]) == list(M.COLUMNS)
    assert [float(row["lr"]) for row in rows] == [M.Config.lr * M.warmup_cosine(1, 2)(i) for i in range(2)]
    # 6 rows of 4 pairs of pictures of 96 pixels
    assert Image.open(tmp_path / "comparison.png").size == (4 * (2 * 96 + 28) + 12, 6 * (96 + 48) + 30)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["update_00001.png", "update_00002.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.pt", "checkpoint.pt", "comparison.png", "metrics.csv", "samples"]
    out = capsys.readouterr().out
    block = dict(line.split(": ") for line in out.split("---\n")[1].splitlines())
    assert list(block) == ["seed", "updates", "base", "trained", "heldout_base", "heldout_trained", "pretrain_seconds",
                           "train_seconds", "peak_memory_mb"] and float(block["peak_memory_mb"]) > 50
    lines = [line for line in out.splitlines() if line.startswith("update ")]
    assert len(lines) == 2 and len(set(map(len, lines))) == 1 and "ratio 1.000→1.000" in lines[0]
    assert all(category in out for category in R.CATEGORIES)


def test_training_raises_the_reward(tmp_path, red_reward):
    """The slow one: from random weights to more red, on captions it was not trained on."""
    numbers, _, rows = run(tmp_path, reward="red", updates=15, prompts=4, lr=3e-3, eval_pictures=8)
    assert numbers["heldout_trained"] > numbers["heldout_base"] + 0.1
    assert float(rows[-1]["reward"]) > float(rows[0]["reward"]) + 0.1


# every field of Config, and a value that must change the run's outcome if the field is not ignored
OTHER = dict(seed=1, width=32, layers=2, pretrain_steps=3, pretrain_lr=1e-3, prompt_dropout=0.9, steps=3, eval_steps=3,
             temperature=0.0, guidance=3.0, transition="p2", updates=3, prompts=3, group=3, inner_epochs=2,
             length_normalize=True, clip_low=0.5, clip_high=0.0, beta=1.0, score_steps=1, filter_quantile=0.0,
             filter_tries=0, lr=1e-3, warmup=3, weight_decay=0.9, max_grad_norm=0.01, eval_pictures=5, reward="red")
# those that change no result, and the test that exercises each instead
ELSEWHERE = dict(out="test_a_run_leaves_what_it_promises", eval_every="test_a_run_leaves_what_it_promises",
                 resume="test_resuming_equals_never_having_stopped", device="test_bad_input_is_one_line",
                 micro_batch="test_micro_batches_never_change_the_gradient")


def fingerprint(folder, **settings):
    """What a run comes to: final weights and evaluation."""
    # clipping and the filter act in later epochs and later updates only: give them the occasion
    lively = {"inner_epochs": 3, "lr": 3e-2} if set(settings) & {"clip_low", "clip_high"} else {}
    if set(settings) & {"filter_quantile", "filter_tries"}:
        lively = {"updates": 8, "prompts": 16, "group": 2}
    if set(settings) == {"reference"}:
        settings = {}
    _, checkpoint, rows = run(folder, **{"reward": "red", **lively, **settings})
    return [checkpoint["policy"][name] for name in sorted(checkpoint["policy"])] + [torch.tensor([float(rows[-1]["heldout"])])], lively


def test_every_field_has_a_test():
    assert {field.name for field in dataclasses.fields(M.Config)} == {*OTHER, *ELSEWHERE}
    assert all(name in globals() for name in ELSEWHERE.values())


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Fingerprints of runs at TINY settings, by the liveliness they need."""
    made = {}

    def get(lively):
        key = tuple(sorted(lively.items()))
        if key not in made:
            R.REWARDS["red"] = red
            made[key] = fingerprint(tmp_path_factory.mktemp("usual"), **(lively or {"reference": 1}))[0]
            del R.REWARDS["red"]
        return made[key]
    return get


@pytest.mark.parametrize("name", OTHER)
def test_no_field_is_ignored(name, tmp_path, red_reward, usual):
    value = OTHER[name] if name != "reward" else "shapes"
    got, lively = fingerprint(tmp_path, **{name: value})
    expected = usual(lively)
    assert [x.shape for x in got] != [x.shape for x in expected] or any(not torch.equal(a, b) for a, b in zip(got, expected))


def test_the_same_run_twice_is_the_same_bit_by_bit(tmp_path, red_reward):
    """What makes test_no_field_is_ignored mean something. The second time the base is reused."""
    one, two = (fingerprint(tmp_path)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_the_base_is_reused_only_when_its_settings_match(tmp_path, capsys):
    config = M.Config(**{**TINY, "out": str(tmp_path)})
    M.load_base(M.shapes_policy(config), config)
    capsys.readouterr()
    M.load_base(M.shapes_policy(config), config)
    assert "pretrained before" in capsys.readouterr().out
    M.load_base(M.shapes_policy(config), dataclasses.replace(config, pretrain_steps=3))
    assert "pretrained before" not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# 9. Stopping and going on


def interrupt_after(calls):
    """The red reward, which presses Ctrl-C when it has judged this many batches."""
    count = itertools.count(1)

    def reward(images, prompts):
        if next(count) == calls:
            signal.raise_signal(signal.SIGINT)
        return red(images, prompts)
    return reward


def test_resuming_equals_never_having_stopped(tmp_path, monkeypatch, capsys, red_reward):
    """4 updates, against 2, Ctrl-C, --resume, 2 more: weights, optimizer, filter and log agree bit by bit.

    The interrupted run also leaves rows of updates after its checkpoint, as a killed one would: they are dropped.
    """
    settings = dict(reward="red", updates=4, filter_tries=0, beta=0.1)
    _, whole, rows = run(tmp_path / "whole", **settings)
    monkeypatch.setitem(R.REWARDS, "red", interrupt_after(3))                       # 1 evaluation, 2 updates
    assert M.main(["--out", str(tmp_path / "cut")] + [x for k, v in {**TINY, **settings}.items() for x in (M.flag(k), str(v))]) == 130
    assert "stopped after update 2; go on with: python mask_grpo.py --resume" in capsys.readouterr().out
    with open(tmp_path / "cut" / "metrics.csv", "a") as file:
        file.write("3,0.5\r\n")
    monkeypatch.setitem(R.REWARDS, "red", red)
    assert M.main(["--resume", "--out", str(tmp_path / "cut")]) == 0
    resumed = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    for name, tensor in whole["policy"].items():
        assert torch.equal(tensor, resumed["policy"][name]), name
    for key, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(value, resumed["optimizer"]["state"][key][name]) for name, value in state.items())
    assert whole["filter"] == resumed["filter"] and torch.equal(whole["generator"], resumed["generator"])
    timeless = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
    assert timeless(whole["rows"]) == timeless(resumed["rows"])
    with open(tmp_path / "cut" / "metrics.csv", newline="") as file:
        assert timeless(csv.DictReader(file)) == timeless(rows)


def test_a_flag_beside_resume_overrides_the_saved_setting(tmp_path):
    run(tmp_path)
    config = M.parse(["--resume", "--out", str(tmp_path), "--updates", "7"])
    assert config.updates == 7 and config.group == TINY["group"] and config.resume


def test_a_killed_save_leaves_the_last_checkpoint_readable(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    M.write_checkpoint(path, {"update": 1})

    def killed(state, target):
        pathlib.Path(target).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        M.write_checkpoint(path, {"update": 2})
    assert M.read_checkpoint(path) == {"update": 1}


@pytest.mark.parametrize("bad_update, bad_batch", [(1, 1), (2, 3)])                  # batches 0 and 2 are evaluations
def test_a_number_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, capsys, bad_update, bad_batch):
    """Update, quantity and last checkpoint are named, the exit status is 1, and the weights saved last are good."""
    count = itertools.count()
    monkeypatch.setitem(R.REWARDS, "red", lambda images, prompts: red(images, prompts) / float(next(count) != bad_batch or "nan"))
    status = M.main(["--out", str(tmp_path)] + [x for k, v in {**TINY, "reward": "red", "eval_every": 1}.items() for x in (M.flag(k), str(v))])
    error = capsys.readouterr().err
    assert status == 1 and error.count("\n") == 1 and f"update {bad_update}: the loss is nan" in error
    assert ("the base alone" if bad_update == 1 else "checkpoint.pt") in error


# ---------------------------------------------------------------------------------------------------------------------
# 10. Bad input


@pytest.mark.parametrize("flags, names", [
    ("--group 1", "--group 1"), ("--steps 37", "--steps 37"), ("--steps 0", "--steps 0"), ("--eval-steps 99", "--eval-steps 99"),
    ("--steps 4 --score-steps 5", "--score-steps 5"), ("--steps 4 --score-steps -5", "--score-steps -5"),
    ("--transition p3", "p1, p1_literal, p2, ar"), ("--reward beauty", "shapes"), ("--device tpu", "cpu"),
    ("--lr 0", "--lr 0"), ("--lr nan", "--lr nan"), ("--lr 3", "--lr 3"), ("--clip-low 1", "--clip-low 1"),
    ("--clip-high -0.1", "--clip-high -0.1"), ("--beta -1", "--beta -1"), ("--beta inf", "--beta inf"),
    ("--filter-quantile 1", "--filter-quantile 1"), ("--width 40", "--width 40"), ("--updates 0", "--updates 0"),
    ("--temperature -1", "--temperature -1"), ("--prompt-dropout 1", "--prompt-dropout 1"), ("--updates many", "--updates"),
    ("--max-grad-norm 0", "--max-grad-norm 0"), ("--eval-pictures 3", "--eval-pictures 3"), ("--pretrain-lr 2", "--pretrain-lr 2"),
    ("--no-such-flag 1", "--no-such-flag"), ("--resume", "there is no"),
])
def test_bad_input_is_one_line(flags, names, tmp_path, capsys, monkeypatch):
    """Exit status 2, the flag and the mend named, and nothing was begun."""
    monkeypatch.setattr(M, "shapes_policy", None)
    assert M.main(["--out", str(tmp_path / "out"), *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and names in error and "Traceback" not in error
    assert not (tmp_path / "out" / "base.pt").exists()


def test_a_folder_that_cannot_be_written_or_is_taken(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert M.main(["--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    run(tmp_path / "taken")
    capsys.readouterr()
    same = ["--out", str(tmp_path / "taken")] + [x for k, v in TINY.items() for x in (M.flag(k), str(v))]
    assert M.main(same + ["--lr", "1e-5"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "other settings (--lr 0.0015)" in error and "--resume" in error


def test_a_resume_file_that_is_damaged_or_of_other_sizes(tmp_path, capsys):
    run(tmp_path)
    capsys.readouterr()
    assert M.main(["--resume", "--out", str(tmp_path), "--width", "32"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "other sizes" in error and "without --width" in error
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    for damaged in (whole[:len(whole) // 2], b"", b"not a checkpoint"):
        (tmp_path / "checkpoint.pt").write_bytes(damaged)
        assert M.main(["--resume", "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "truncated" in error


def test_torch_and_torchvision_of_different_builds_is_one_sentence(tmp_path):
    """A torchvision that fails on import as a foreign build does, put before the real one."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    answer = subprocess.run([sys.executable, str(HERE / "mask_grpo.py"), "-h"], capture_output=True, text=True,
                            env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert answer.returncode == 2 and answer.stderr.count("\n") == 1
    assert "different builds; reinstall both together" in answer.stderr


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as leaving:
        M.parse(["-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert leaving.value.code == 0
    for field in dataclasses.fields(M.Config):
        assert f"{M.flag(field.name)} " in text
    assert text.count("(default: ") == len(dataclasses.fields(M.Config))
