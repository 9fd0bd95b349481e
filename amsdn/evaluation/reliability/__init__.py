"""Can a robust accuracy be believed? Checks that run by themselves and mark a number that cannot.

A low number from a broken attack looks like a strong defence. The checks are those that adaptive evaluations of the literature
found missing (Carlini et al. 2019, On Evaluating Adversarial Robustness; Tramer et al. 2020, On Adaptive Attacks; Pintor et al. 2022,
Indicators of Attack Failure; Zimmermann et al. 2022, the binarization test). Each gives one ``Finding``.
"""

from amsdn.evaluation.reliability.finding import FILE, MODEL, Finding, Reliability, read_checks, verdict

__all__ = ["FILE", "MODEL", "Finding", "Reliability", "read_checks", "verdict"]
