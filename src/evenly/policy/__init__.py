"""Groups of rollouts: reward normalizers and the policy-gradient loss that takes their advantages.

A reward normalizer turns the rewards of a batch of rollouts, with a label that says which prompt each belongs to,
into advantages. :class:`BNPO`, :class:`GRPO`, :class:`RLOO` and :class:`Reinforce` are modules with the same call;
each has a function beside it. :mod:`evenly.policy.trl` puts any of them into TRL's trainers, and
:mod:`evenly.policy.math_rewards` has the 0/1 rewards that BNPO was trained with.

>>> import torch
>>> from evenly import policy
>>> rewards, prompts = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0]), torch.tensor([3, 3, 3, 8, 8])
>>> policy.RLOO()(rewards, prompts)
tensor([ 1.0000, -0.5000, -0.5000,  0.0000,  0.0000])
"""

from evenly.policy._common import RewardNormalizer
from evenly.policy.bnpo import BNPO, beta_parameters, bnpo_advantages
from evenly.policy.grpo import GRPO, grpo_advantages
from evenly.policy.policy_loss import PolicyLoss, policy_loss
from evenly.policy.reinforce import Reinforce, reinforce_advantages
from evenly.policy.rloo import RLOO, rloo_advantages

__all__ = [
    "RewardNormalizer",
    "BNPO",
    "bnpo_advantages",
    "beta_parameters",
    "GRPO",
    "grpo_advantages",
    "RLOO",
    "rloo_advantages",
    "Reinforce",
    "reinforce_advantages",
    "PolicyLoss",
    "policy_loss",
]
