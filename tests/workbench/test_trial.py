"""A trial is a pure function of its settings, and says what happened."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from evenly.models import recipe
from evenly.workbench import TrialResult, TrialSettings, run_trial
from evenly.workbench.sets import data_hash, evaluation_sets, load_data
from evenly.workbench.trial import _SavedBytes, build_model, code_version
from evenly.workbench.tune import TUNE_SEED, TUNE_STEPS, choose, default_lr, grid

TABLE = TrialSettings("batch", "breast_cancer", batch_size=32, seed=0, epochs=3, lr=0.005, model="mlp")
IMAGES = TrialSettings("group", "digits", batch_size=64, seed=0, epochs=1, lr=0.01, max_steps=8, severities=(1,))


@pytest.mark.parametrize("settings", [TABLE, IMAGES])
def test_the_same_scores_bit_for_bit(settings: TrialSettings, tmp_path: Path) -> None:
    first = run_trial(settings)
    torch.manual_seed(99)  # what others do to the global generator does not matter
    torch.rand(3)
    second = run_trial(settings, tmp_path)
    third = run_trial(settings, tmp_path)  # out of the file
    assert first.scores() == second.scores() == third.scores()
    assert run_trial(replace(settings, seed=1)).curve != first.curve


def test_the_global_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    run_trial(replace(IMAGES, purpose="tune", max_steps=1))
    assert torch.equal(torch.rand(2), expected)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()


def test_it_learns_and_measures() -> None:
    result = run_trial(TABLE)
    assert result.clean is not None
    assert result.clean > 0.9
    assert not result.diverged
    assert result.steps == 3 * (455 // 32)
    assert len(result.curve) <= 40
    assert result.curve[-1][0] == result.steps
    assert result.curve[-1][1] < result.curve[0][1]
    assert len(result.corruptions) >= 5
    assert all(len(row) == 5 for row in result.corruptions.values())
    assert result.domains
    assert result.seconds_per_step > 0
    # 30 features, two hidden layers of 64 with weight and bias of the normalization, 2 classes.
    assert result.parameters == 30 * 64 + 64 * 64 + 4 * 64 + 64 * 2 + 2
    assert TrialResult.from_json(result.to_json()) == result


def test_images_have_the_15_corruptions_at_5_severities() -> None:
    result = run_trial(replace(IMAGES, severities=(1, 2, 3, 4, 5), test_samples=16, max_steps=1))
    assert len(result.corruptions) == 15
    assert all(len(row) == 5 for row in result.corruptions.values())


def test_accuracies_are_those_of_the_model() -> None:
    # The one long batch of all changed sets gives what testing each set by itself gives.
    settings = replace(TABLE, epochs=1, test_samples=40)
    result = run_trial(settings)
    sets = evaluation_sets(settings)
    data = load_data("breast_cancer")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model("mlp", "tabular", (30,), 2, "batch")
    from evenly.workbench import trial

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=trial.WEIGHT_DECAY, fused=True)

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(x), y)

    trial._train(model, data.normalize(data.train_x), data.train_y, settings, 2, loss, optimizer)
    model.eval()
    for index, (name, severity) in enumerate(sets.shifts):
        with torch.no_grad():
            right = model(data.normalize(sets.shifted_x[index])).argmax(1) == sets.shifted_y[index]
        expected = right.double().mean().item()
        found = result.corruptions[name][severity - 1] if severity else result.domains[name]
        assert found == pytest.approx(expected, abs=1 / 40 + 1e-9), name


def test_second_data() -> None:
    result = run_trial(replace(TABLE, ood="breast_cancer", epochs=5))
    assert result.ood is not None
    assert result.ood > 0.9


def test_divergence_is_a_result() -> None:
    result = run_trial(replace(IMAGES, norm="workbench.factories:exploding", max_steps=5))
    assert result.diverged
    assert result.steps == 1
    assert result.clean == 0.0  # a prediction that is not finite is wrong
    assert result.curve == ()
    exploding = run_trial(replace(IMAGES, norm="none", lr=1e4, max_steps=40))
    assert exploding.diverged
    assert exploding.steps < 40


def test_tuning_trials_see_no_test_data() -> None:
    search = grid(replace(TABLE, lr=default_lr(32)))
    assert [s.purpose for s in search] == ["tune"] * 3
    assert {s.max_steps for s in search} == {TUNE_STEPS}
    assert {s.seed for s in search} == {TUNE_SEED}
    result = run_trial(search[1])
    assert result.clean is None
    assert result.corruptions == {}
    assert 0.8 < result.validation["accuracy"] <= 1
    # Four fifths of 455 samples make 11 batches of 32.
    assert result.steps == 3 * 11


def test_choosing_a_learning_rate() -> None:
    def result(accuracy: float, loss: float, diverged: bool = False) -> TrialResult:
        return TrialResult(diverged, 1, (), validation={"accuracy": accuracy, "loss": loss})

    assert choose({0.1: result(0.8, 1), 0.2: result(0.9, 1)}) == 0.2
    assert choose({0.1: result(0.9, 0.5), 0.2: result(0.9, 0.7)}) == 0.1
    assert choose({0.1: result(0.5, 1), 0.2: result(0.9, 1, diverged=True)}) == 0.1
    assert choose({0.1: result(0.5, math.nan), 0.2: result(0.5, 3.0)}) == 0.2
    assert choose({}) is None


def test_saved_bytes_by_hand() -> None:
    linear = nn.Linear(6, 4, bias=False)
    x = torch.randn(5, 6)
    counter = _SavedBytes(list(linear.parameters()))
    with counter:
        linear(x).relu()
    # The input of the linear layer (5 x 6) and the output of the ReLU (5 x 4), four bytes each; no weight.
    assert counter.bytes == 4 * (5 * 6 + 5 * 4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": math.inf}, "lr is inf"),
        ({"severities": (1, 6)}, "numbers out of 1..5"),
        ({"purpose": "fun"}, "purpose is 'fun'"),
    ],
)
def test_bad_settings(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(TABLE, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("resnet", "needs images"),
        ("vgg", "unknown model 'vgg': known are resnet, mlp and, for text, gpt"),
        ("no_such_module:make", "cannot be imported"),
        ("workbench.factories:nothing", "cannot be imported"),
        ("workbench.factories:no_norm", "takes no norm="),
    ],
)
def test_bad_models(model: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_model(model, "tabular", (30,), 2, "batch")


def test_factories() -> None:
    model = build_model("workbench.factories:make", "tabular", (30,), 2, "layer")
    assert type(model[2]) is type(recipe("layer").build(8))
    with pytest.raises(TypeError, match="returned str"):
        build_model("workbench.factories:no_module", "tabular", (30,), 2, "layer")


def test_batch_larger_than_the_data() -> None:
    with pytest.raises(ValueError, match="batch size 5000 is larger than the training set of 455"):
        run_trial(replace(TABLE, batch_size=5000))


def test_the_code_of_the_user_counts() -> None:
    assert code_version() != code_version("workbench.factories:make")
    assert data_hash("digits") != data_hash("breast_cancer")
