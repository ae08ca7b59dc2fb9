"""verl on trees: the sequences of a micro-batch are merged on their shared prefixes before the model runs.

Put this file where Python finds it and name it in the configuration (docs/integrations.md has all the lines):

    actor_rollout_ref.model.external_lib=verl_trees
    +actor_rollout_ref.model.override_config.attn_implementation=tree_attn

verl imports it in every worker. Its FSDP engine makes a model's inputs in one method and reads the outputs in another;
the first now merges, the second hands the logits of every sequence back, so that log-probabilities, entropies and
losses stay verl's own.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from tree_attn import pack
from tree_attn.integrations.transformers import model_inputs, register


def use_trees() -> None:
    """Patch the engine. Idempotent."""
    register()
    make, read = FSDPEngineWithLMHead.prepare_model_inputs, FSDPEngineWithLMHead.prepare_model_outputs
    if hasattr(make, "__wrapped__"):
        return

    @wraps(make)
    def prepare_model_inputs(self: Any, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        if type(self).prepare_model_outputs is not prepare_model_outputs:
            return make(self, micro_batch=micro_batch)  # a critic reads its outputs in its own way: packed, not merged
        refused = NotImplementedError(
            "trees need use_remove_padding=True, ulysses_sequence_parallel_size=1, a model of text alone, and neither "
            "use_fused_kernels nor pad_to_length"
        )
        if self.use_ulysses_sp:
            raise refused
        inputs, output_args = make(self, micro_batch=micro_batch)
        other_rows = inputs.keys() != {"input_ids", "attention_mask", "position_ids"} or output_args.get("pad_size")
        if other_rows or inputs["attention_mask"] is not None or inputs["position_ids"].dim() != 2:
            raise refused
        packed = pack(list(micro_batch["input_ids"].unbind()))
        merged = model_inputs(packed)
        del merged["use_cache"]  # verl says that itself
        output_args["rows_of_sequences"] = packed.flat_index
        return {**inputs, **merged}, output_args

    @wraps(read)
    def prepare_model_outputs(self: Any, output: Any, output_args: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        output.logits = output.logits.index_select(1, output_args["rows_of_sequences"])
        return read(self, output, output_args, *args, **kwargs)

    FSDPEngineWithLMHead.prepare_model_inputs = prepare_model_inputs
    FSDPEngineWithLMHead.prepare_model_outputs = prepare_model_outputs


use_trees()
