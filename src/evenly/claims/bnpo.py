"""Beta normalization gives the steadier gradient, and a policy that is at least as good.

A bandit: 64 prompts, for each a categorical policy over 8 answers (a table of logits), one of which is right; the
initial success rates are drawn from Beta(0.5, 2). A step samples 16 answers to each of 32 prompts and follows the
policy gradient with advantages of REINFORCE with the mean of the group as baseline, of GRPO, or of BNPO. Each of the
three has the best of the same five learning rates, chosen with seeds of their own. A factor that all advantages of a
method share is a learning rate in disguise, so each method's are scaled, once, to the mean |A| that REINFORCE has on
the run's first batch. In this bandit success rises with the learning rate without end (each prompt has logits of its
own, and a rewarded answer is always right); the five rates end where training is still under way after 300 steps.

Reference: C. Xiao, M. Zhang and Y. Cao, "BNPO: Beta Normalization Policy Optimization", 2025, arXiv 2506.02864 (the
theorem on the variance of the gradient, and the gradient norms over training).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from evenly import policy
from evenly.claims._harness import Check, Claim, Judgement, Metric, Results, Trial
from evenly.claims._picture import BASELINE, METHOD, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CLAIM"]

PROMPTS, ANSWERS = 64, 8
BATCH, SAMPLES = 32, 16  # prompts a step, answers to each
LEARNING_RATES = (1.0, 3.0, 10.0, 30.0, 100.0)  # of REINFORCE; the others' are matched to it by mean |A|
STEPS = {"small": 20, "full": 300}
REPEATS = {"small": 10, "full": 200}  # gradient estimates behind a variance
TUNING = {"small": (100,), "full": tuple(range(100, 105))}
EVERY = 10  # steps between points of the curve
EPS = 1e-4

ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "REINFORCE": lambda rewards, ids: policy.reinforce_advantages(rewards, ids, num_groups=BATCH),
    "GRPO": lambda rewards, ids: policy.grpo_advantages(rewards, ids, eps=EPS, num_groups=BATCH),
    "BNPO": lambda rewards, ids: policy.bnpo_advantages(rewards, ids, num_groups=BATCH),
}
ARMS: dict[str, dict[str, Any]] = {
    f"{name} lr={lr:g}": {"method": name, "lr": lr} for name in ESTIMATORS for lr in LEARNING_RATES
}
_ROWS = torch.arange(BATCH).repeat_interleave(SAMPLES)


def trial(settings: Mapping[str, Any], seed: int, budget: str) -> dict[str, Any]:
    """Train one policy; return its success over the steps and each estimator's variance at three of its stages."""
    logits = _start().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=settings["lr"])
    advantages = ESTIMATORS[settings["method"]]
    scale = 1.0
    steps = STEPS[budget]
    stages = (0, steps // 3, steps)
    curve, variances = [], {name: [] for name in ESTIMATORS}  # type: ignore[var-annotated]
    measured = seed not in TUNING[budget]
    for step in range(steps + 1):
        if step % EVERY == 0:
            curve.append(round(_success(logits), 5))
        if step in stages and measured:
            for name, values in _variances(logits.detach(), REPEATS[budget]).items():
                variances[name].append(values)
        if step == steps:
            break
        prompts, answers = _sample(logits.detach())
        rewards = (answers == 0).to(logits.dtype)
        log_probs = torch.log_softmax(logits[prompts], 1).gather(1, answers.unsqueeze(1)).squeeze(1)
        if step == 0:  # the methods' advantages differ by a factor, which is a learning rate in disguise
            plain, own = (one(rewards, _ROWS).abs().mean() for one in (ESTIMATORS["REINFORCE"], advantages))
            scale = (plain / own).item()
        optimizer.zero_grad()
        policy.policy_loss(log_probs, scale * advantages(rewards, _ROWS)).backward()
        optimizer.step()
    return {"curve": curve, "success": curve[-1], "variances": variances if measured else {}}


def plan(budget: str, results: Results) -> list[Trial]:
    """First every learning rate with the tuning seeds; then each method's best with the test seeds."""
    tuning = [Trial(arm, seed) for seed in TUNING[budget] for arm in ARMS]
    if any(one not in results for one in tuning):
        return tuning
    best = [_arm(name, _best(results, name)) for name in ESTIMATORS]
    return tuning + [Trial(arm, seed) for seed in CLAIM.seeds[budget] for arm in best]


def judge(results: Results) -> Judgement:
    """Apply the criterion: ratios of variances on the same policies at three stages, and the final success."""
    tests = {name: _tests(results, name) for name in ESTIMATORS}
    success = {name: [run["success"] for run in runs] for name, runs in tests.items()}
    ratios = {other: _ratios(tests, other) for other in ("REINFORCE", "GRPO")}  # (runs, stages) each
    # "The smaller of the other two" is the one that BNPO's mean ratio to is larger.
    worst = [max(math.exp(np.log(ratios[other][:, k]).mean()) for other in ratios) for k in range(3)]
    means = {name: statistics.mean(values) for name, values in success.items()}
    leader = max(means, key=lambda name: means[name])
    error = statistics.stdev(success[leader]) / math.sqrt(len(success[leader])) if len(success[leader]) > 1 else 0.0
    behind = means[leader] - means["BNPO"]
    start = {other: float(np.exp(np.log(values[:, 0]).mean())) for other, values in ratios.items()}
    if max(worst) > 1.05:
        why = (
            "The theorem minimizes the variance for weights that are scaled to a density, not the variance over the "
            "squared norm of the gradient, and the second can be smaller for weights that are flatter in p."
        )
    else:
        least = [stage for stage, value in zip(_STAGES, worst, strict=True) if value < 1]
        why = (
            "BNPO's normalized variance is within 5 % of the smaller of the others at every stage (below both "
            f"{' and '.join(least) if least else 'at none'}), but {leader} weights prompts that are rarely solved "
            f"more, and that is where success is left to gain in this bandit (mean success {means['BNPO']:.3f} against "
            f"{means[leader]:.3f}, standard error {error:.3f})."
        )
    rates = {name: _best(results, name) for name in ESTIMATORS}
    own = {name: [[run["variances"][name][k] for run in runs] for k in range(3)] for name, runs in tests.items()}
    return Judgement(
        metrics=[
            Metric(
                "success at the end",
                f"{other}, lr {rates[other]:g}",
                success[other],
                f"BNPO, lr {rates['BNPO']:g}",
                success["BNPO"],
            )
            for other in ("REINFORCE", "GRPO")
        ]
        + [
            Metric(
                f"normalized gradient variance, {stage}, on BNPO's policies",
                other,
                [run["variances"][other][k] for run in tests["BNPO"]],
                "BNPO",
                [run["variances"]["BNPO"][k] for run in tests["BNPO"]],
            )
            for k, stage in enumerate(_STAGES)
            for other in ("REINFORCE", "GRPO")
        ],
        checks=[
            *(
                Check(f"normalized variance {stage}, BNPO / smaller of the others", value, "<=", 1.05)
                for stage, value in zip(_STAGES, worst, strict=True)
            ),
            Check("success at the end, behind the best, in standard errors of the best", _over(behind, error), "<=", 1),
        ],
        effect=(
            "normalized variance at the start, BNPO / GRPO (geometric mean); spread: range over runs",
            start["GRPO"],
            float(ratios["GRPO"][:, 0].min()),
            float(ratios["GRPO"][:, 0].max()),
        ),
        why=why,
        notes={
            "BNPO's normalized variance over the other's, geometric mean at the three stages": {
                other: [round(float(value), 4) for value in np.exp(np.log(values).mean(0))]
                for other, values in ratios.items()
            },
            "normalized variance of each method on its own policies, median at the three stages": {
                name: [round(statistics.median(values), 3) for values in stages] for name, stages in own.items()
            },
            "mean success at the end, test seeds": {name: round(value, 5) for name, value in means.items()},
            "standard error of the best": round(error, 5),
            "mean success at the end, tuning seeds": {
                arm: round(_tuned(results, settings["method"], settings["lr"]), 4) for arm, settings in ARMS.items()
            },
        },
    )


def draw(figure: Figure, results: Results, judgement: Judgement) -> None:
    """Left: success over the steps. Right: BNPO's normalized variance over the others', at the three stages."""
    left, right = figure.subplots(1, 2)
    colours = {"REINFORCE": BASELINE, "GRPO": "#7a7a7a", "BNPO": METHOD}
    tests = {name: _tests(results, name) for name in ESTIMATORS}
    for name, runs in tests.items():
        curves = np.array([run["curve"] for run in runs])
        steps = EVERY * np.arange(curves.shape[1])
        left.plot(steps, curves.mean(0), color=colours[name], label=f"{name}, lr {_best(results, name):g}")
        left.fill_between(steps, *np.percentile(curves, [25, 75], axis=0), color=colours[name], alpha=0.15, lw=0)
    left.set_xlabel("step")
    left.set_ylabel("success rate (shaded: quartiles over seeds)")
    left.legend(frameon=False, fontsize=8)
    tidy(left)
    for shift, other in ((-0.12, "REINFORCE"), (0.12, "GRPO")):
        values = _ratios(tests, other)
        for k in range(3):
            right.plot(
                np.full(len(values), k + shift), values[:, k], "o", color=colours[other], alpha=0.3, markersize=3
            )
        right.plot(
            np.arange(3) + shift, np.exp(np.log(values).mean(0)), "_", color=colours[other], markersize=18, label=other
        )
    right.axhline(1, color="#999999", linewidth=0.8)
    right.set_yscale("log")
    right.set_xticks(range(3), _STAGES)
    right.set_ylabel("normalized gradient variance, BNPO / other")
    right.legend(frameon=False, fontsize=8)
    tidy(right)


_STAGES = ("at the start", "after a third", "at the end")


def _start() -> Tensor:
    # Answer 0 is the right one, with a success rate drawn from Beta(0.5, 2); the others share the rest.
    rate = torch.from_numpy(np.random.default_rng(torch.initial_seed()).beta(0.5, 2, PROMPTS)).clamp(min=1e-12)
    others = ((1 - rate) / (ANSWERS - 1)).unsqueeze(1).expand(-1, ANSWERS - 1)
    return torch.cat([rate.unsqueeze(1), others], 1).log()


def _success(logits: Tensor) -> float:
    return logits.detach().softmax(1)[:, 0].mean().item()


def _sample(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts and answers of one batch of rollouts, a row a rollout."""
    prompts = torch.randperm(PROMPTS)[:BATCH]
    answers = torch.multinomial(logits[prompts].softmax(1), SAMPLES, replacement=True)
    return prompts.repeat_interleave(SAMPLES), answers.flatten()


def _variances(logits: Tensor, repeats: int) -> dict[str, float]:
    """Each estimator's trace of the covariance over the squared norm of the mean, on the same samples."""
    gradients: dict[str, list[Tensor]] = {name: [] for name in ESTIMATORS}
    for _ in range(repeats):
        prompts, answers = _sample(logits)
        rewards = (answers == 0).to(logits.dtype)
        for name, advantages in ESTIMATORS.items():
            # Advantages of a prompt add up to 0, so the gradient of log softmax leaves them at the sampled answers.
            gradient = logits.new_zeros(logits.numel())
            gradient.index_add_(0, prompts * ANSWERS + answers, advantages(rewards, _ROWS) / BATCH / SAMPLES)
            gradients[name].append(gradient)
    found = {}
    for name, every in gradients.items():
        stacked = torch.stack(every)
        variance = stacked.var(0).sum()
        squared = stacked.mean(0).square().sum() - variance / repeats  # unbiased
        found[name] = (variance / squared).item()
    return found


def _arm(method: str, lr: float) -> str:
    return next(arm for arm, settings in ARMS.items() if settings == {"method": method, "lr": lr})


def _of(results: Results, method: str, lr: float, tuning: bool) -> list[dict[str, Any]]:
    seeds = {seed for budget in TUNING.values() for seed in budget}
    arm = _arm(method, lr)
    return [outcome for one, outcome in results.items() if one.arm == arm and (one.seed in seeds) == tuning]


def _tuned(results: Results, method: str, lr: float) -> float:
    return statistics.mean(run["success"] for run in _of(results, method, lr, tuning=True))


def _best(results: Results, method: str) -> float:
    return max(LEARNING_RATES, key=lambda lr: _tuned(results, method, lr))


def _tests(results: Results, method: str) -> list[dict[str, Any]]:
    return _of(results, method, _best(results, method), tuning=False)


def _ratios(tests: Mapping[str, list[dict[str, Any]]], other: str) -> np.ndarray:
    """(runs, stages): BNPO's variance over another's, on every policy that was trained, whatever trained it."""
    runs = [run["variances"] for every in tests.values() for run in every]
    return np.array([[a / b for a, b in zip(run["BNPO"], run[other], strict=True)] for run in runs])


def _over(behind: float, error: float) -> float:
    return behind / error if error > 0 else (0.0 if behind <= 0 else math.inf)


CLAIM = Claim(
    id="bnpo",
    statement=(
        "Dividing by a Beta density that is fitted to each batch gives a policy gradient of smaller normalized "
        "variance than GRPO or REINFORCE with a mean baseline, at every stage, and a policy at least as good."
    ),
    criterion=(
        "BNPO's normalized gradient variance is not above the smaller of the other two by more than 5 % at each "
        "checkpoint, and its final success is within one standard error of the best or better. Refuted at this scale "
        "if its normalized variance is above GRPO's and REINFORCE's at two of the three checkpoints. Measured so: "
        "normalized variance is the trace of the covariance of the gradient of one step, over the squared norm of its "
        "mean, from 200 batches; at steps 0, 100 and 300 of every test run all three estimators are measured on the "
        "same policy and the same samples, and the ratios are averaged over the runs of all three methods (geometric "
        "mean), so that no method is judged by how far it has trained. Final success is the mean over the prompts of "
        "the probability of the right answer after 300 steps of SGD; the standard error is that of the best method's "
        "mean over 20 seeds. Learning rates: the best of 1, 3, 10, 30, 100 for each method, by mean final success over "
        "5 other seeds, with the advantages of each method scaled to the mean |A| of REINFORCE on the run's first "
        "batch."
    ),
    data="synthetic: 64 prompts with 8 answers each, initial success rates from Beta(0.5, 2), new each seed",
    arms=ARMS,
    seeds={"small": (0,), "full": tuple(range(20))},
    trial=trial,
    judge=judge,
    plan=plan,
    draw=draw,
)
