"""FSDP2 and activation checkpointing on trees: two processes train the model that one process trains.

Every process has its own tree batch (data parallel); parameters, gradients and optimiser state are sharded. A mask goes
through the hooks of both as it is. For the tokens of ONE batch split over processes see test_distributed_model.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from distributed_ranks import Ranks
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tree_attn import PackedBatch, pack, tree_attention
from tree_attn.cli.model import SmallTransformer

VOCAB = 40
# What each of two processes trains on: a tree that branches twice, and two trees.
BATCHES = [
    [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 8, 13, 14, 9, 3], [5, 6, 7, 8, 13, 14, 20, 21, 22], [5, 6]],
    [[1, 2, 3, 4, 30, 31], [1, 2, 3, 4, 32], [35, 36, 37, 38], [35, 36, 39]],
]
STEPS = 4


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


# -- the small model of this package ---------------------------------------------------------------------------------


def train(
    mesh: DeviceMesh | None,
    checkpointing: bool,
    dtype: torch.dtype = torch.float64,
    backend: str | None = None,
    device: str = "cpu",
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and parameters of some steps of AdamW: on all batches, or on this process's alone with FSDP2."""
    torch.manual_seed(0)
    model = SmallTransformer(VOCAB, width=32, heads=4, kv_heads=2, head_dim=64).to(device, dtype)
    if checkpointing:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = checkpoint_wrapper(block, preserve_rng_state=False)
    if mesh is not None:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    groups = BATCHES if mesh is None else [BATCHES[mesh.get_local_rank()]]
    batches = [pack(sequences).to(device) for sequences in groups]
    scale = 1 if mesh is None else mesh.size()  # FSDP takes the mean over processes, and the loss is a sum
    losses = []
    for _step in range(STEPS):
        optimizer.zero_grad()
        total = sum(small_loss(model, batch, backend) for batch in batches)
        (scale * total).backward()
        optimizer.step()
        losses.append(float(total.detach()))
    parameters = {name.replace("_checkpoint_wrapped_module.", ""): p for name, p in model.named_parameters()}
    return losses, {name: whole(p).detach().cpu() for name, p in parameters.items()}


def small_loss(model: nn.Module, batch: PackedBatch, backend: str | None) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tree_attention(q, k, v, batch.mask, backend=backend)

    return batch.loss(model(batch.input_ids, batch.position_ids, attend))


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def assert_same(answers: list[Any], expected: tuple[list[float], dict[str, Tensor]], tolerance: float) -> None:
    losses, parameters = expected
    for answer in answers:
        assert not isinstance(answer, Exception), answer
    for step, loss in enumerate(losses):
        assert sum(answer[0][step] for answer in answers) == pytest.approx(loss, rel=tolerance)
    for _, found in answers:
        assert found.keys() == parameters.keys()
        for name, value in parameters.items():
            assert (found[name] - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_two_processes_train_what_one_trains(ranks, checkpointing):
    expected = train(None, checkpointing=False)
    assert expected[0][-1] < 0.9 * expected[0][0]  # it learns
    # float64; two processes add the same two gradients as one
    assert_same(ranks.run(train, checkpointing), expected, 1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason=f"needs 2 GPUs; torch.cuda.device_count() is {torch.cuda.device_count()}"
)
@pytest.mark.parametrize(
    ("dtype", "backend", "tolerance"),
    # AdamW moves every parameter by about the same amount, also where a gradient is all rounding: bfloat16 parameters
    # then differ by some of their own roundings.
    [(torch.float32, "sdpa", 1e-3), (torch.bfloat16, None, 0.05)],
    ids=["float32", "bfloat16"],
)
def test_two_gpus_train_what_one_trains(dtype, backend, tolerance):
    expected = train(None, False, dtype, backend, "cuda")
    two = Ranks(2, device="cuda")
    try:
        answers = two.run(train, True, dtype, backend, "cuda")
    finally:
        two.close()
    assert_same(answers, expected, tolerance)


# -- a model of transformers -----------------------------------------------------------------------------------------


def transformers_gradients(
    mesh: DeviceMesh | None, model_type: str, mixed: bool
) -> tuple[list[float], dict[str, Tensor]]:
    """Loss and gradients of one step, with activation checkpointing where there is a mesh."""
    from hf_models import make_model

    from tree_attn.integrations.transformers import model_inputs, register

    register()
    model = make_model(model_type, "tree_attn")
    model = model if mixed else model.double()
    groups = BATCHES if mesh is None else [BATCHES[mesh.get_local_rank()]]
    scale = 1
    if mesh is not None:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        policy = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, **(policy if mixed else {}))
        fully_shard(model, mesh=mesh, **(policy if mixed else {}))
        scale = mesh.size()
    total = 0.0
    for sequences in groups:
        batch = pack(sequences)
        loss = batch.loss(model(**model_inputs(batch)).logits)
        (scale * loss).backward()
        total += float(loss.detach())
    return [total], {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("model_type", ["qwen3", "gpt_oss"])
def test_a_model_of_transformers_too(ranks, model_type):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tree-attn[transformers]'")
    expected = transformers_gradients(None, model_type, mixed=False)
    # float64, but norms and rotary angles are float32 whatever the dtype of the model
    assert_same(ranks.run(transformers_gradients, model_type, False), expected, 1e-5)


def test_mixed_precision_of_fsdp_casts_the_model_and_leaves_the_mask(ranks):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'tree-attn[transformers]'")
    expected = transformers_gradients(None, "qwen3", mixed=True)
    # the model in float32; bfloat16 rounds every activation (2**-9) in a few dozen operations
    assert_same(ranks.run(transformers_gradients, "qwen3", True), expected, 0.1)
