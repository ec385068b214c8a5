"""Groups of people: classifiers whose decisions do not depend on the group, and rates a group to judge them by.

Estimators follow scikit-learn; group labels are the keyword ``sensitive_features=``, as in fairlearn.
"""

from evenly.fair.bias_scoring import BiasScoreClassifier, BiasScoreRule, Event, bias_scores
from evenly.fair.groups import joint_codes
from evenly.fair.metrics import (
    GroupRates,
    demographic_parity_difference,
    equal_opportunity_difference,
    equalized_odds_difference,
    group_rates,
)

__all__ = [
    "BiasScoreClassifier",
    "BiasScoreRule",
    "Event",
    "GroupRates",
    "bias_scores",
    "demographic_parity_difference",
    "equal_opportunity_difference",
    "equalized_odds_difference",
    "group_rates",
    "joint_codes",
]
