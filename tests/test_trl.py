"""TRL's AsyncGRPO with this library's attention: the same attention, loss, gradients and training steps.

TRL's own attention needs a GPU kernel (FlashAttention 3). Here torch computes what that kernel promises, in its place,
so TRL's code around it runs as it is.
"""

from __future__ import annotations

import json
import queue
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tree_attn import TreeMask, pack

pytest.importorskip("trl", reason="TRL is not installed: pip install trl==1.16.0")
pytest.importorskip("transformers", reason="transformers is not installed")

import numpy as np
from hf_models import VOCAB, gradients, make_model, relative_error, with_attention
from transformers import AttentionInterface
from trl.experimental.async_grpo import async_grpo_trainer, packing
from trl.experimental.async_grpo.packing import TREE_ATTENTION, TreeRow

from tree_attn.integrations import trl as integration
from tree_attn.integrations.trl import accelerate_async_grpo, is_accelerated, mask_from_trl, restore_async_grpo


@pytest.fixture(autouse=True)
def _restored_and_one_thread() -> Iterator[None]:
    packing.register_tree_attention()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    restore_async_grpo()


# -- rollouts and TRL's attention ------------------------------------------------------------------------------------


def rollouts(seed: int) -> list[dict[str, Any]]:
    """Samples as TRL's planner sees them: groups of several turns that fork anywhere, duplicates and prefixes too."""
    rng = np.random.default_rng(seed)
    sequences: list[list[int]] = []
    system = rng.integers(1, 6, rng.integers(0, 4)).tolist()
    for _sample in range(rng.integers(1, 8)):
        begun = system if not sequences or rng.random() < 0.3 else sequences[rng.integers(len(sequences))]
        kept = begun[: rng.integers(0, len(begun) + 1)]
        # few token ids, so that sequences also meet by chance
        tokens = kept + rng.integers(1, 6, rng.integers(0, 7)).tolist()
        sequences.append(tokens or [1])
    return [
        {
            "input_ids": np.array(tokens),
            "completion_mask": rng.integers(0, 2, len(tokens)),
            "old_log_probs": -rng.random(len(tokens)) * 3,
            "advantage": float(rng.normal()),
            "group_id": 0,
        }
        for tokens in sequences
    ]


def trl_row(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    row = TreeRow()
    for sample in samples:
        row.add(sample)
    return row.pack()


def tree_arguments(row: dict[str, Tensor]) -> dict[str, Any]:
    """What ``compute_loss`` gives to the model."""
    longest = dict(zip(("tree_max_seqlen_q", "tree_max_seqlen_k"), row["tree_max_seqlens"].tolist(), strict=True))
    return {name: row[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k")} | longest


def flash_attn_3(q, k, v, cu_q, cu_k, max_q, max_k, *, causal, softmax_scale=None, window_size=(-1, -1), softcap=0.0):
    """FlashAttention 3's promise: every sequence by itself, the causal mask at the lower right corner."""
    assert causal
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out = []
    for i in range(len(cu_q) - 1):
        rows, keys = slice(*cu_q[i : i + 2].tolist()), slice(*cu_k[i : i + 2].tolist())
        kk, vv = (x[keys].repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows], kk) * scale
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        n, m = scores.shape[1:]
        distance = torch.arange(m - n, m)[:, None] - torch.arange(m)
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), vv))
    return torch.cat(out)


@pytest.fixture
def torch_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_flash_attn", lambda: types.SimpleNamespace(flash_attn_varlen_func=flash_attn_3))


class Module(torch.nn.Module):
    """As much of an attention layer as an attention function looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.linear, self.is_causal = types.SimpleNamespace(), torch.nn.Linear(1, 1), True


# -- the same attention ----------------------------------------------------------------------------------------------


def test_attention_equals_trls_on_300_random_sets_of_rollouts(torch_kernel):
    options = [{}, {"scaling": 0.4}, {"sliding_window": 3}, {"softcap": 2.0, "sliding_window": 5}]
    trees = 0
    for seed in range(300):
        row = trl_row(rollouts(seed))
        n = len(row["input_ids"])
        trees += len(row["tree_cu_seqlens_q"]) > 2
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (
            torch.randn(1, h, n, 8, dtype=torch.float64, generator=generator).requires_grad_() for h in (4, 2, 2)
        )
        cotangent = torch.randn(1, n, 4, 8, dtype=torch.float64, generator=generator)
        arguments = {**tree_arguments(row), "position_ids": row["position_ids"][None], **options[seed % 4]}
        results = []
        for attention in (integration._TRL_ATTENTION, integration.tree_attention):
            out, _ = attention(Module(), q, k, v, None, **arguments)
            results.append((out, *torch.autograd.grad(out, (q, k, v), cotangent)))
        for theirs, ours in zip(*results, strict=True):
            # float64 sums of at most 40 terms
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert trees > 200


def test_the_mask_of_a_row_lets_every_token_see_its_samples_prefix_alone():
    for seed in range(50):
        samples = rollouts(seed)
        row = trl_row(samples)
        mask = mask_from_trl(row["tree_kv_index"], row["tree_cu_seqlens_q"], row["tree_cu_seqlens_k"])
        assert torch.equal(mask.depth, row["position_ids"].int())
        seen = mask.dense()
        tokens = row["input_ids"]
        for i in range(mask.total):
            assert int(seen[i].sum()) == int(mask.depth[i]) + 1
        paths = {tuple(tokens[seen[i]].tolist()) for i in range(mask.total)}
        assert {tuple(s["input_ids"].tolist()) for s in samples} <= paths


def test_a_model_with_sinks_runs_when_trls_check_lets_it_through():
    # The check is in the trainer's constructor, not in the attention.
    samples = rollouts(3)
    row = trl_row(samples)
    eager = make_model("gpt_oss")
    accelerate_async_grpo()
    model = with_attention(eager, TREE_ATTENTION)
    inputs = {"input_ids": row["input_ids"][None], "position_ids": row["position_ids"][None], "use_cache": False}
    logits = model(**inputs, **tree_arguments(row)).logits[0]
    seen = mask_from_trl(row["tree_kv_index"], row["tree_cu_seqlens_q"], row["tree_cu_seqlens_k"]).dense()
    for sample in samples:
        ids = sample["input_ids"].tolist()
        alone = eager(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        path = next(p for p in range(len(seen)) if row["input_ids"][seen[p]].tolist() == ids)
        assert relative_error(logits[seen[path]], alone) < 1e-5  # float32, the bound the project promises


# -- the same loss and gradients, TRL's rows or ours -----------------------------------------------------------------


def clipped_loss(log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    ratio = (log_probs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum() / max(len(old), 1)


@pytest.mark.parametrize("branch", ["fork", "gather"])
@pytest.mark.parametrize("model_type", ["qwen3", "mistral"])
def test_trls_rows_and_ours_give_the_same_loss_and_gradients(model_type, branch, torch_kernel):
    from tree_attn.integrations.transformers import model_inputs, register

    register()
    for seed in range(6):
        samples = rollouts(seed)
        row = trl_row(samples)
        model = make_model(model_type, TREE_ATTENTION, seed=seed).double()

        def loss_on_trls_row(row: dict[str, Tensor] = row, model: torch.nn.Module = model) -> Tensor:
            inputs = {"input_ids": row["input_ids"][None], "position_ids": row["position_ids"][None]}
            logits = model(**inputs, use_cache=False, **tree_arguments(row)).logits[0]
            picked = logits[row["token_index"]].log_softmax(-1)
            labels = row["shift_labels"][row["token_index"]]
            log_probs = picked.gather(-1, labels[:, None])[:, 0]
            return clipped_loss(log_probs, row["old_log_probs"], row["advantages"])

        restore_async_grpo()
        theirs = loss_on_trls_row()
        expected = gradients(model, theirs)
        accelerate_async_grpo()
        mixed = loss_on_trls_row()
        found_mixed = gradients(model, mixed)

        batch = pack([s["input_ids"] for s in samples], branch=branch)
        if branch == "fork":
            assert batch.num_tokens == len(row["input_ids"])
        ours = with_attention(model, "tree_attn")
        log_probs = batch.log_probs(ours(**model_inputs(batch)).logits)
        kept = [torch.tensor(s["completion_mask"][1:]).bool() for s in samples]
        old = torch.cat([torch.tensor(s["old_log_probs"][1:])[m] for s, m in zip(samples, kept, strict=True)]).float()
        counts = torch.tensor([int(m.sum()) for m in kept])
        advantages = torch.tensor([s["advantage"] for s in samples]).float().repeat_interleave(counts)
        picked = torch.cat([values[m] for values, m in zip(log_probs, kept, strict=True)])
        loss = clipped_loss(picked, old, advantages)
        found = gradients(ours, loss)
        for other, gradient in ((mixed, found_mixed), (loss, found)):
            # float64 but for the norms of these models, which round to float32 (6e-8)
            assert relative_error(other, theirs) < 1e-6
            assert max(relative_error(gradient[n], expected[n]) for n in expected if expected[n].any()) < 1e-6


# -- registration ----------------------------------------------------------------------------------------------------


def test_it_survives_the_registration_of_the_trainers_constructor_and_can_be_undone():
    registered = AttentionInterface._global_mapping
    async_grpo_trainer.register_tree_attention()
    assert registered[TREE_ATTENTION] is integration._TRL_ATTENTION
    for _again in range(2):
        accelerate_async_grpo()
        assert is_accelerated()
        async_grpo_trainer.register_tree_attention()
        assert is_accelerated()
    restore_async_grpo()
    assert not is_accelerated()
    assert registered[TREE_ATTENTION] is integration._TRL_ATTENTION is packing.tree_attention


def test_the_mask_is_derived_once_a_micro_batch_for_all_layers(monkeypatch):
    derived = []
    original = integration.mask_from_trl
    monkeypatch.setattr(integration, "mask_from_trl", lambda *a: derived.append(1) or original(*a))
    accelerate_async_grpo()
    model = make_model("llama", TREE_ATTENTION, num_hidden_layers=5)
    model.gradient_checkpointing_enable()
    for seed in range(2):
        derived.clear()
        row = trl_row(rollouts(seed))
        inputs = {"input_ids": row["input_ids"][None], "position_ids": row["position_ids"][None], "use_cache": False}
        model(**inputs, **tree_arguments(row)).logits.sum().backward()
        assert len(derived) == 1


def test_another_version_of_trl_warns_with_the_range(monkeypatch):
    monkeypatch.setattr(integration.trl, "__version__", "1.17.0")
    with pytest.warns(UserWarning, match=r"tested with trl 1.16 to 1.16; found 1.17.0"):
        accelerate_async_grpo()


def test_tensors_that_are_no_trie_are_an_error():
    row = trl_row(rollouts(0))
    index, cu_q, cu_k = (row[name] for name in ("tree_kv_index", "tree_cu_seqlens_q", "tree_cu_seqlens_k"))
    assert len(cu_q) > 3
    assert isinstance(mask_from_trl(index, cu_q, cu_k, len(row["input_ids"])), TreeMask)
    longer = torch.cat([index[: cu_k[-2]], index[:1], index[cu_k[-2] :]])  # the last path holds its root twice
    with pytest.raises(ValueError, match=r"TreeRow.pack"):
        mask_from_trl(longer, cu_q, torch.cat([cu_k[:-1], cu_k[-1:] + 1]))
    for wrong in ((index[1:], cu_q, cu_k), (index, cu_q, cu_q), (index, cu_q[:-1], cu_k), (index + 1, cu_q, cu_k)):
        with pytest.raises(ValueError, match=r"TreeRow.pack|depth-first|cu_seqlens|total"):
            mask_from_trl(*wrong)
    with pytest.raises(ValueError, match="total"):
        mask_from_trl(index, cu_q, cu_k, len(row["input_ids"]) + 1)


# -- TRL's trainer ---------------------------------------------------------------------------------------------------


class Worker:
    """Rollouts made beforehand, in place of a vLLM server."""

    def __init__(self, samples: list[Any]) -> None:
        self.rollout_buffer: queue.Queue = queue.Queue()
        self.metrics_queue: queue.Queue = queue.Queue()
        for sample in samples:
            self.rollout_buffer.put(sample)

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def update_model_version(self, model_version: int) -> None: ...
    def check_health(self, stale_after_s: float) -> None:
        raise RuntimeError("the prepared rollouts are used up")


class NoTransfer:
    def init_weight_transfer(self) -> None: ...
    def pause(self) -> None: ...
    def send_weights(self, iterator: Any) -> None: ...
    def resume(self) -> None: ...
    def destroy(self) -> None: ...


def train(path: Path, steps: int) -> dict[str, Tensor]:
    """The parameters after some steps of AsyncGRPOTrainer on prepared rollouts."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer
    from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

    tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(VOCAB)}, unk_token="0"))
    samples = [
        RolloutSample(prompt=[], completion=[], model_version=0, metrics={"reward": 0.0}, **{**s, "group_id": seed})
        for seed in range(steps + 2)  # the loader reads ahead
        for s in (rollouts(seed) * 4)[:4]
    ]
    arguments = AsyncGRPOConfig(
        output_dir=str(path / "out"),
        use_cpu=True,
        bf16=False,
        dtype="float32",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        token_budget=-1,
        max_steps=steps,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_staleness=1000,
    )
    trainer = AsyncGRPOTrainer(
        str(path / "model"),
        reward_funcs=[],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["1"] * 8}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="0", eos_token="1"),
        rollout_worker=Worker(samples),
        weight_transfer=NoTransfer(),
    )
    trainer.train()
    assert trainer.state.global_step == steps
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_trls_trainer_takes_the_same_steps(torch_kernel, tmp_path, monkeypatch):
    pytest.importorskip("requests", reason="requests is not installed; TRL's trainer needs it")
    # The trainer asks the GPU how fast it is, to log a utilisation.
    monkeypatch.setattr(async_grpo_trainer, "get_peak_flops_per_device", lambda *_: 1.0)
    model = make_model("qwen3")
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "qwen3"
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    theirs = train(tmp_path, 4)
    monkeypatch.setattr(packing, "_flash_attn", lambda: pytest.fail("TRL's kernel was asked for"))
    accelerate_async_grpo()
    ours = train(tmp_path, 4)
    assert is_accelerated()
    for name, parameter in theirs.items():
        assert relative_error(ours[name], parameter) < 1e-4  # the bound the project promises for 20 steps
    assert max(relative_error(theirs[name], start[name]) for name in start) > 1e-2


def test_trls_trainer_still_refuses_sinks_by_itself(tmp_path):
    # docs/integrations.md says so; when this fails, TRL has let them through and the page can say that.
    pytest.importorskip("requests", reason="requests is not installed; TRL's trainer needs it")
    make_model("gpt_oss").save_pretrained(tmp_path / "model")
    accelerate_async_grpo()
    with pytest.raises(ValueError, match="attention sinks"):
        train(tmp_path, 1)
