"""A transformers model on split tokens trains as it does in one process, with FSDP2 beside it too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from distributed_ranks import Ranks, fsdp_step, model_step
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.4")

from hf_models import SEQUENCES, make_model

from tree_attn import pack
from tree_attn.integrations.transformers import model_inputs, register

TOLERANCE = 1e-5  # the models compute norms and rotary angles in float32 whatever their dtype


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(request.param)
    yield ranks
    ranks.close()


def step(model: nn.Module, sequences: list[list[int]]) -> float:
    """Adds to the gradients of ``model``."""
    batch = pack(sequences)
    loss = batch.loss(model(**model_inputs(batch)).logits)
    loss.backward()
    return loss.item()


def assert_gradients(model: nn.Module, got: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(
            got[name], expected, rtol=TOLERANCE, atol=TOLERANCE * float(expected.abs().max() + 1)
        )


@pytest.mark.parametrize("mode", ["ring", "ulysses"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt_oss"])
def test_loss_and_gradients_of_one_process(ranks: Ranks, model_type: str, mode: str) -> None:
    register()
    model = make_model(model_type, "tree_attn").double()
    loss = step(model, SEQUENCES)
    for answer in ranks.run(model_step, model_type, mode):
        assert not isinstance(answer, Exception), answer
        assert answer[0] == pytest.approx(loss, rel=TOLERANCE)
        assert_gradients(model, answer[1])


@pytest.mark.parametrize("loss", ["local", "log_probs"])
def test_fsdp_on_a_mesh_of_two_dimensions(loss: str) -> None:
    register()
    groups = [SEQUENCES[:4], SEQUENCES[4:]]
    model = make_model("llama", "tree_attn").double()
    for sequences in groups:
        step(model, sequences)
    ranks = Ranks(4)
    try:
        answers = ranks.run(fsdp_step, groups, loss)
    finally:
        ranks.close()
    for answer in answers:
        assert not isinstance(answer, Exception), answer
        assert_gradients(model, answer)
