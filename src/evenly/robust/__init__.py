"""Groups of samples: losses, samplers and metrics that look at the worst group.

A group is an integer a sample. :func:`group_ids` makes it from columns of attributes,
:class:`GroupBalancedSampler` draws groups equally often, :class:`GroupDROLoss` trains for the worst of them, and
:class:`WorstGroupAccuracy` measures it.
"""

from evenly.robust.group_dro import GroupCVaRLoss, GroupDROLoss
from evenly.robust.group_loss import ERMLoss, GroupLoss
from evenly.robust.groups import GroupIds, group_ids
from evenly.robust.metrics import GroupAccuracy, WorstGroupAccuracy, worst_group_accuracy
from evenly.robust.samplers import GroupBalancedSampler

__all__ = [
    "GroupDROLoss",
    "GroupCVaRLoss",
    "ERMLoss",
    "GroupLoss",
    "GroupBalancedSampler",
    "GroupIds",
    "group_ids",
    "GroupAccuracy",
    "WorstGroupAccuracy",
    "worst_group_accuracy",
]
