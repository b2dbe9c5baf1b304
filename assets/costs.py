# SPDX-License-Identifier: MIT
"""Counts what Show-o 512 x 512 costs: `python assets/costs.py` prints the table of show-o.md.

The FLOPs are those of matrix products, two per multiply-add, counted by torch on meta tensors for a
caption of 16 tokens. The counts for one and two layers are extrapolated to all 24.
"""
import contextlib
import pathlib
import sys
from unittest import mock

import open_clip
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PhiConfig

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import mask_grpo as M  # noqa: E402

PEAKS = {"RTX 4090": 165, "A100": 312, "H100": 989}         # bf16, TFLOP/s
SHARE = 0.4                                                 # of the peak
# title, T, steps that the loss uses, cards that share the groups of an update
ROWS = (("the paper's setting", 50, 50, 1), ("`--score-steps 10`", 50, 10, 1),
        ("`--steps 20`", 20, 20, 1), ("8 cards, `--groups 2` on each", 50, 50, 8))


def show_o(layers):
    """FLOPs of one picture: a forward pass, a forward and a backward pass, and the decoder"""
    with torch.device("meta"):
        phi = PhiConfig(vocab_size=58498, qk_layernorm=True, num_hidden_layers=layers)
        policy = M.Policy(phi, None, 0, M.MagvitDecoder(), 1024, 8192)
        ids = torch.zeros(1, 16 + 3).long()
        tokens = torch.zeros(1, 1024).long()
    policy.showo.gradient_checkpointing_enable()
    with FlopCounterMode(display=False) as forward:
        policy(ids, tokens)
    with FlopCounterMode(display=False) as learning:
        policy(ids, tokens).sum().backward()
    with FlopCounterMode(display=False) as decoding:
        policy.decode(tokens)
    return forward.get_total_flops(), learning.get_total_flops(), decoding.get_total_flops()


def clip():
    """FLOPs of the reward of one picture"""
    with torch.device("meta"):
        net = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
        pixels = torch.zeros(1, 3, 224, 224)
        words = torch.zeros(1, 77).long()
    with FlopCounterMode(display=False) as counter:
        net.encode_image(pixels)
        net.encode_text(words)
    return counter.get_total_flops()


def no_autocast(*arguments, **keywords):
    """In place of torch.autocast, which does not know meta tensors"""
    return contextlib.nullcontext()


@mock.patch("torch.autocast", no_autocast)
def main():
    """Print the table"""
    forward_1, learned_1, decoded = show_o(layers=1)
    forward_2, learned_2, _ = show_o(layers=2)
    forward = forward_1 + 23 * (forward_2 - forward_1)
    learned = learned_1 + 23 * (learned_2 - learned_1)
    finished = decoded + clip()                             # a picture decoded and rewarded
    evaluation = 2 * 64 * (2 * 50 * forward + finished)     # both splits, with guidance
    print(f"| | sampling | learning | update | evaluation | {' | '.join(PEAKS)} |")
    print("|---" * (5 + len(PEAKS)) + "|")
    for name, steps, used, cards in ROWS:
        pictures = 96 / cards                               # only one card evaluates
        sampling = pictures * steps * forward
        learning = pictures * used * learned
        update = sampling + learning + pictures * finished
        cells = [f"{flops / 1e15:.1f}" for flops in (sampling, learning, update, evaluation)]
        for peak in PEAKS.values():
            rate = SHARE * peak * 1e12
            hours = (625 * update + 64 * evaluation) / rate / 3600   # the base, then every 10
            cells.append(f"{update / rate:.0f} s, {hours:.0f} h")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
