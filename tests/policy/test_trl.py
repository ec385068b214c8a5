"""Reward normalizers in TRL's trainers, with a tiny random model; nothing is downloaded. Skips where TRL is missing."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from evenly.policy import BNPO, GRPO, RLOO, bnpo_advantages
from evenly.policy.trl import STATE_FILE, NormalizedAdvantages, grpo_trainer

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="TRL is not installed: pip install evenly[trl]"
)

WORDS = ["<pad>", "<eos>", "<unk>", *"abcdefgh"]
PROMPTS, SAMPLES = 3, 4


class FakeTrainer:
    """What the mixin needs of TRL's trainer: two hooks, and what they leave behind."""

    def __init__(self, rewards, advantages=None, calls=1):
        self.rewards, self.returned, self.calls = rewards, advantages, calls
        self.reward_funcs = [None] * rewards.shape[1]
        self.reward_weights = torch.ones(rewards.shape[1])
        self.num_generations = SAMPLES
        self.model = torch.nn.Linear(1, 1)
        self.accelerator = type("Accelerator", (), {"process_index": 1})()
        self.callbacks = []

    def add_callback(self, callback):
        self.callbacks.append(callback)

    def _calculate_rewards(self, *_):
        return self.rewards

    def _generate_and_score_completions(self, inputs):
        for _ in range(self.calls):
            self._calculate_rewards(inputs, None, None, None)
        return {"advantages": torch.zeros(len(inputs)) if self.returned is None else self.returned, "other": 1}


class Hooked(NormalizedAdvantages, FakeTrainer):
    pass


@needs_trl
def test_second_process_gets_its_part():
    rewards = torch.bernoulli(torch.rand(8, 1))
    trainer = Hooked(rewards, normalizer=BNPO())
    output = trainer._generate_and_score_completions([{}] * 4)
    want = bnpo_advantages(rewards[:, 0], torch.arange(8) // SAMPLES)
    assert torch.equal(output["advantages"], want[4:])
    assert output["other"] == 1


@needs_trl
def test_unscorable_completions():
    rewards = torch.tensor([[1.0], [0.0], [float("nan")], [0.0], [1.0], [1.0], [0.0], [0.0]])
    trainer = Hooked(rewards, normalizer=BNPO())
    got = trainer._normalized(rewards)
    counts = ~rewards[:, 0].isnan()
    want = bnpo_advantages(rewards[counts, 0], (torch.arange(8) // SAMPLES)[counts])
    assert got[2] == 0
    torch.testing.assert_close(got[counts], want)


@needs_trl
@pytest.mark.parametrize(
    ("options", "size"),
    [({"calls": 0}, 4), ({"advantages": torch.zeros(3)}, 4), ({"advantages": [0.0] * 4}, 4), ({}, 6)],
    ids=["no rewards", "too few advantages", "not a tensor", "too few rewards"],
)
def test_another_trl_is_refused(options, size):
    trainer = Hooked(torch.zeros(8, 1), normalizer=GRPO(), **options)
    with pytest.raises(RuntimeError, match=r"did not return one advantage for each completion.*TRL .* is installed"):
        trainer._generate_and_score_completions([{}] * size)


@needs_trl
def test_rewards_that_come_twice_are_refused():
    trainer = Hooked(torch.zeros(8, 1), normalizer=GRPO(), calls=2)
    with pytest.raises(RuntimeError, match="rewards twice for one batch"):
        trainer._generate_and_score_completions([{}] * 4)
    trainer = Hooked(torch.zeros(7, 1), normalizer=GRPO())
    with pytest.raises(RuntimeError, match="7 rewards, which is not a multiple of the 4 completions"):
        trainer._normalized(torch.zeros(7, 1))


@needs_trl
def test_a_normalizer_that_does_not_fit():
    with pytest.raises(ValueError, match=r"2 reward functions and normalizer has num_rewards=1: .*num_rewards=2"):
        Hooked(torch.zeros(8, 2), normalizer=BNPO())


def test_refused_without_trl(monkeypatch):
    with pytest.raises(TypeError, match="normalizer is a Linear, expected a reward normalizer"):
        grpo_trainer(normalizer=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="normalizer has sync=True"):
        grpo_trainer(normalizer=BNPO(sync=True))
    with pytest.raises(RuntimeError, match=r"has no _calculate_rewards.*Put NormalizedAdvantages before"):
        grpo_trainer(normalizer=BNPO(), base=object)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"needs TRL, which is not installed .*pip install evenly\[trl\]"):
        grpo_trainer(normalizer=BNPO())


def parts():
    """A tokenizer of 11 words and a model of one layer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def settings(folder, steps, **more):
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": PROMPTS * SAMPLES,
        "num_generations": SAMPLES,
        "max_completion_length": 3,
        "max_steps": steps,
        "learning_rate": 0.1,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 0,
        **more,
    }


def has_a(completions, **_):
    return [float("a" in text) for text in completions]


def has_b(completions, **_):
    return [None if "c" in text else float("b" in text) for text in completions]


def make(tmp_path, normalizer, rewards, *, base=None, config=None, steps=2, **more):
    import trl
    from datasets import Dataset

    base = base or trl.GRPOTrainer
    kept = []

    class Watched(base):
        def _compute_loss(self, model, inputs):
            kept.append(inputs["advantages"].clone())
            return super()._compute_loss(model, inputs)

        def compute_loss(self, model, inputs, *arguments, **options):
            if not hasattr(base, "_compute_loss"):
                kept.append(inputs["advantages"].clone())
            return super().compute_loss(model, inputs, *arguments, **options)

    model, tokenizer = parts()
    data = Dataset.from_dict({"prompt": ["a b", "c d e", "f", "g h", "b", "d a"]})
    arguments = (config or trl.GRPOConfig)(**settings(tmp_path, steps, **more))
    trainer = grpo_trainer(
        model, rewards, args=arguments, train_dataset=data, processing_class=tokenizer, normalizer=normalizer,
        base=Watched,
    )  # fmt: skip
    return trainer, kept


@needs_trl
def test_grpo_trainer_trains_on_our_advantages(tmp_path):
    normalizer = BNPO(num_rewards=2, decay=0.5, singletons="zero")
    trainer, kept = make(
        tmp_path, normalizer, [has_a, has_b], reward_weights=[1.0, 0.5], save_strategy="steps", save_steps=1
    )
    scored, before = [], trainer.model.state_dict()["lm_head.weight"].clone()
    trainer._normalized = lambda rewards, inner=trainer._normalized: (
        scored.append((rewards, inner(rewards))) or scored[-1][1]
    )
    trainer.train()
    assert len(scored) == len(kept) == 2
    again = BNPO(num_rewards=2, decay=0.5, singletons="zero")
    for (rewards, ours), used in zip(scored, kept, strict=True):
        assert rewards.shape == (PROMPTS * SAMPLES, 2)
        counts = ~rewards.isnan()
        want = again(rewards, torch.arange(12) // SAMPLES, mask=counts, reward_weights=[1.0, 0.5])
        torch.testing.assert_close(ours, want)
        torch.testing.assert_close(used.sort().values, want.sort().values)  # TRL shuffles the rows
        assert want.abs().max() > 0
    assert not torch.equal(trainer.model.state_dict()["lm_head.weight"], before)
    assert list(trainer._logs["advantages"])[-12:] == pytest.approx(scored[-1][1].tolist())
    # The state is beside each checkpoint, and a trainer that resumes gets it back.
    held = torch.load(tmp_path / "checkpoint-1" / STATE_FILE, weights_only=True)
    first, counts = scored[0][0], ~scored[0][0].isnan()
    known = [(counts.view(PROMPTS, SAMPLES, 2)[..., k].sum(1) > 1).sum().item() for k in range(2)]
    assert held["count"].tolist() == known and first.shape == (12, 2)
    resumed, _ = make(tmp_path, BNPO(num_rewards=2, decay=0.5, singletons="zero"), [has_a, has_b], save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))  # nothing is left to do
    for name, value in normalizer.state_dict().items():
        assert torch.equal(resumed.normalizer.state_dict()[name], value)
    (tmp_path / "checkpoint-2" / STATE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="was not written with a normalizer that has state"):
        resumed.train(resume_from_checkpoint=True)


@needs_trl
def test_rloo_trainer(tmp_path):
    import trl

    trainer, kept = make(tmp_path, RLOO(), has_a, base=trl.RLOOTrainer, config=trl.RLOOConfig, steps=1, beta=0.0)
    trainer.train()
    (used,) = kept
    assert used.shape == (12,) and used.abs().max() > 0
    assert set((3 * used).round(decimals=4).tolist()) <= {-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0}
