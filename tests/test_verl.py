"""The verl recipe: verl's own engine, on merged sequences, gives the numbers it gives on packed ones."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tree-attn[transformers]'")
pytest.importorskip("verl", reason="verl is not installed: pip install verl")
pytest.importorskip("verl.workers.engine.fsdp", reason="verl's engine does not import here", exc_type=ImportError)

import hydra
from hf_models import SEQUENCES, gradients, make_model, relative_error, with_attention
from tensordict import TensorDict
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils import tensordict_utils
from verl.utils.torch_functional import entropy_from_logits
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead, FSDPEngineWithValueHead

from tree_attn.integrations.transformers import register

EXAMPLES = Path(__file__).parent.parent / "examples"
if not EXAMPLES.is_dir():
    pytest.skip(f"{EXAMPLES} is not here: the tests run outside a checkout", allow_module_level=True)

Numbers = tuple[dict[str, Any], dict[str, torch.Tensor]]


@pytest.fixture
def trees(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recipe, undone afterwards."""
    before = {name: getattr(FSDPEngineWithLMHead, name) for name in ("prepare_model_inputs", "prepare_model_outputs")}
    monkeypatch.syspath_prepend(str(EXAMPLES))
    importlib.import_module("verl_trees").use_trees()
    yield
    for name, function in before.items():
        setattr(FSDPEngineWithLMHead, name, function)


def engine(**changes: Any) -> FSDPEngineWithLMHead:
    """verl's engine without its processes and its GPU: what its two methods read."""
    self = object.__new__(FSDPEngineWithLMHead)
    settings = {"entropy_checkpointing": False, "entropy_from_logits_with_chunking": False}
    attributes = {"use_ulysses_sp": False, "ulysses_sequence_parallel_size": 1, "pad_to_length": False}
    attributes |= {"engine_config": SimpleNamespace(**settings), "compute_entropy_from_logits": entropy_from_logits}
    for name, value in {**attributes, **changes}.items():
        setattr(self, name, value)
    return self


def micro_batch() -> TensorDict:
    def nested(rows: list[torch.Tensor]) -> torch.Tensor:
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    batch = TensorDict(
        {
            "input_ids": nested([torch.tensor(s) for s in SEQUENCES]),
            "position_ids": nested([torch.arange(len(s)) for s in SEQUENCES]),
            "temperature": torch.full((len(SEQUENCES),), 0.7),
        },
        batch_size=[len(SEQUENCES)],
    )
    tensordict_utils.assign_non_tensor(batch, calculate_entropy=True)
    return batch


def step(model: nn.Module) -> Numbers:
    """Log-probabilities and entropies of every sequence, and the gradients of a loss of both."""
    self, batch = engine(), micro_batch()
    inputs, output_args = self.prepare_model_inputs(micro_batch=batch)
    output = self.prepare_model_outputs(
        output=model(**inputs, use_cache=False), output_args=output_args, micro_batch=batch, logits_processor_func=None
    )
    values = {name: list(output[name].unbind()) for name in ("log_probs", "entropy")}
    loss = sum(i * x[:-1].sum() for i, x in enumerate(values["log_probs"], 1)) + sum(x.sum() for x in values["entropy"])
    return values, gradients(model, loss)


def assert_same(found: Numbers, expected: Numbers) -> None:
    for name, rows in expected[0].items():
        assert [len(row) for row in found[0][name]] == [len(s) for s in SEQUENCES]
        assert relative_error(torch.cat(found[0][name]), torch.cat(rows)) < 1e-5  # float32
    assert max(relative_error(found[1][name], value) for name, value in expected[1].items()) < 1e-5


def test_merged_sequences_have_the_log_probabilities_entropies_and_gradients_of_packed_ones(trees):
    eager = make_model("qwen3")
    tree = with_attention(eager, "tree_attn")
    apply_monkey_patch(tree, use_remove_padding=True)  # what verl does to a model, its attention hook among it
    found = step(tree)
    unpatched = {
        name: getattr(FSDPEngineWithLMHead, name) for name in ("prepare_model_inputs", "prepare_model_outputs")
    }
    for name, function in unpatched.items():
        setattr(FSDPEngineWithLMHead, name, function.__wrapped__)
    assert_same(found, step(eager))


def test_the_model_runs_on_the_merged_tokens(trees):
    inputs, _ = engine().prepare_model_inputs(micro_batch=micro_batch())
    assert inputs["input_ids"].shape == (1, inputs["tree_mask"].total)
    assert inputs["tree_mask"].total < sum(map(len, SEQUENCES))


def test_an_engine_that_reads_outputs_its_own_way_is_left_alone(trees):
    critic = engine()
    critic.__class__ = FSDPEngineWithValueHead
    inputs, output_args = critic.prepare_model_inputs(micro_batch=micro_batch())
    assert inputs.keys() == {"input_ids", "attention_mask", "position_ids"}
    assert "rows_of_sequences" not in output_args


def test_the_configuration_lines_of_the_documentation_are_verls():
    page = (EXAMPLES.parent / "docs" / "integrations.md").read_text(encoding="utf-8")
    lines = re.findall(r"^    (\+?[\w.]+=\w+)", page.split("## verl")[1].split("\n## ")[0], flags=re.MULTILINE)
    assert len(lines) == 6
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("ppo_trainer", overrides=lines)
    assert config.actor_rollout_ref.model.external_lib == "verl_trees"
    assert config.actor_rollout_ref.model.override_config.attn_implementation == "tree_attn"
    assert config.actor_rollout_ref.model.use_remove_padding
    assert not config.actor_rollout_ref.actor.use_dynamic_bsz
    assert not config.actor_rollout_ref.rollout.log_prob_use_dynamic_bsz
    sizes = config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu, config.actor_rollout_ref.rollout
    assert sizes[0] == sizes[1].log_prob_micro_batch_size_per_gpu == 16


def test_without_the_recipe_packed_sequences_run_causally_on_tree_attn():
    register()
    eager = make_model("qwen3")
    assert_same(step(with_attention(eager, "tree_attn")), step(eager))


def test_what_would_need_other_rows_of_logits_is_refused(trees):
    with pytest.raises(NotImplementedError, match="ulysses_sequence_parallel_size=1"):
        engine(use_ulysses_sp=True).prepare_model_inputs(micro_batch=micro_batch())
    for name, value in (("use_remove_padding", False), ("use_fused_kernels", True)):
        batch = micro_batch()
        tensordict_utils.assign_non_tensor(batch, **{name: value})
        if name == "use_fused_kernels":  # which take one temperature
            tensordict_utils.assign_non_tensor(batch.exclude("temperature", inplace=True), temperature=0.7)
        with pytest.raises(NotImplementedError, match="use_remove_padding=True"):
            engine().prepare_model_inputs(micro_batch=batch)
