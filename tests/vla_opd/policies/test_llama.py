"""TinyVLA's Llama beside transformers' own."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel

from vla_opd.policies.llama import Llama

WIDTH = 32
LAYERS = 2
HEADS = 4


def make_both() -> tuple[Llama, LlamaModel]:
    """Make both with random weights, from one seed each."""
    torch.manual_seed(7)
    ours = Llama(WIDTH, LAYERS, HEADS)
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=1,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return ours, LlamaModel(config)


def test_initial_weights_and_their_names_are_those_of_transformers() -> None:
    ours, theirs = make_both()
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize("last", [11, 4])
def test_hidden_states_and_gradients_are_those_of_transformers_with_full_attention(
    last: int,
) -> None:
    ours, theirs = make_both()
    sequence = torch.randn(3, 11, WIDTH)
    read_by_ours = sequence.clone().requires_grad_()
    read_by_theirs = sequence.clone().requires_grad_()
    everything = torch.zeros(3, 1, 11, 11)  # an additive mask

    hidden = ours(read_by_ours, last=last)
    expected = theirs(inputs_embeds=read_by_theirs, attention_mask=everything).last_hidden_state
    expected = expected[:, -last:]
    torch.testing.assert_close(hidden, expected)
    hidden.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(read_by_ours.grad, read_by_theirs.grad)


def test_recomputed_blocks_have_the_same_gradient() -> None:
    ours, _ = make_both()
    sequence = torch.randn(3, 11, WIDTH)
    ours(sequence, last=4).square().sum().backward()
    gradients = {name: weight.grad for name, weight in ours.named_parameters()}
    ours.zero_grad()
    passes: list[object] = []
    ours.layers[0].register_forward_pre_hook(lambda _module, inputs: passes.append(inputs))
    ours.activation_checkpointing_enable()
    ours(sequence, last=4).square().sum().backward()
    for name, weight in ours.named_parameters():
        if gradients[name] is not None:
            torch.testing.assert_close(weight.grad, gradients[name])
    assert len(passes) == 2
    assert gradients["embed_tokens.weight"] is None


def test_frozen_weights_have_the_same_bits() -> None:
    """A checkpoint is read with and without an adapter; torch picks kernels by `requires_grad`."""
    ours, _ = make_both()
    sequence = torch.randn(3, 11, WIDTH)
    for weight in ours.parameters():
        nn.init.normal_(weight)
    with torch.inference_mode():
        trainable = ours(sequence, last=1)
        frozen = ours.requires_grad_(False)(sequence, last=1)
    assert torch.equal(frozen, trainable)
