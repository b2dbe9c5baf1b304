# SPDX-License-Identifier: MIT
"""A reward that can be hacked: `--reward assets.hacking:recall --measure correct`"""
import torch

import reward


def recall(images, prompts):
    """The share of the requested objects that are present. Extra objects cost nothing."""
    shares = []
    for cells, prompt in zip(reward.look(images).tolist(), prompts):
        wanted, _ = reward.WANTED[prompt]
        there = [reward.OBJECTS[o] for o in cells if o >= 0]
        found = [min(count, sum(s == shape and color in (None, c) for s, c in there))
                 for count, color, shape in wanted]
        shares.append(sum(found) / sum(count for count, _, _ in wanted))
    return torch.tensor(shares)
