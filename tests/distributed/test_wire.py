"""What goes over the wire, and a check that the ranks agree."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

pytest.importorskip("transformers")

import velora_torch as velora
from tests.distributed.launch import on_ranks
from tests.distributed.training import Setup, batches, build, distribute
from velora_torch.memory.wire import Wire
from velora_torch.model import compressed_layers

SIGNS = {"init": "rademacher", "vectors": "per_group", "num_groups": 3}


def hook(counted: list[int], bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook of DDP that counts the bytes it is given."""
    counted.append(bucket.buffer().numel() * bucket.buffer().element_size())
    return allreduce_hook(dist.group.WORLD, bucket)


def numbers(strategy, config):
    """Bytes of a step's gradients on the wire, and those of the gradients themselves."""
    model = build(Setup(strategy, config=config or SIGNS))
    model = model if config else velora.restore(model)
    wrapped = distribute(model, strategy)
    counted: list[int] = []
    if strategy == "ddp":
        wrapped.register_comm_hook(counted, hook)
    tokens = batches(Setup())[0, 0].chunk(dist.get_world_size())[dist.get_rank()]
    for _ in range(2):  # the first step chooses vectors, and DDP rebuilds its buckets after it
        counted.clear()
        with Wire() as wire:
            wrapped(input_ids=tokens, labels=tokens).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    ranks = dist.get_world_size() if strategy == "fsdp2" else 1  # FSDP pads to as many rows
    layers = compressed_layers(model).values()
    return {
        "wire": sum(counted) if strategy == "ddp" else wire.reduced,
        "trained": sum(-(-len(p) // ranks) * ranks * p[0].numel() * 8 for p in trained),
        "coefficients": sum(layer.coef.numel() for layer in layers) * 8,
        "weights": sum(layer.raw_weight.numel() for layer in layers) * 8,
        "groups": sum(layer.outputs * layer.velora.groups for layer in layers) * 8,
    }


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def sent(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    both = partial(_both, request.param)
    return request.param, on_ranks(2, both, folder)[0]


def _both(strategy):
    return numbers(strategy, None), numbers(strategy, SIGNS)


def test_gradients_on_the_wire_are_factors(sent):
    strategy, (plain, compressed) = sent
    assert plain["wire"] == plain["trained"]
    assert compressed["wire"] == compressed["trained"]
    assert compressed["coefficients"] == compressed["groups"]
    if strategy == "ddp":
        saved = compressed["weights"] - compressed["groups"]
        assert plain["wire"] - compressed["wire"] == saved


def unequal(which):
    """Change something on the last rank, and ask."""
    model = build(Setup(config=SIGNS))
    velora.check_ranks(model)
    if dist.get_rank() == dist.get_world_size() - 1:
        layer = compressed_layers(model)["model.layers.1.mlp.up_proj"]
        if which == "vector":
            layer.velora_vectors = -layer.velora_vectors
        else:
            layer.velora.folds += 1
    try:
        velora.check_ranks(model)
    except RuntimeError as error:
        return str(error)
    return "equal"


@pytest.mark.parametrize("which", ["vector", "counter"])
def test_ranks_that_differ_are_told_the_layer(tmp_path, which):
    for told in on_ranks(3, unequal, tmp_path, which):
        assert told.startswith("VeLoRA: layer 'model.layers.1.mlp.up_proj' of 14 has other vectors")


def test_a_single_process_agrees_with_itself():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    velora.check_ranks(velora.compress(model, velora.VeloraConfig(num_groups=2)))


def otherwise():
    """Call a part of the model by itself, then everything after choosing vectors by hand."""
    model = build(Setup(config={"num_groups": 3}))
    part = model.model.layers[0].mlp
    x = torch.randn(2, 3, 12, dtype=torch.float64) + dist.get_rank()
    with pytest.warns(UserWarning, match="takes random ones, which are equal on every rank"):
        part(x)
    tokens = torch.full((2, 5), dist.get_rank())
    layer = compressed_layers(model)["model.layers.1.mlp.up_proj"]
    velora.choose_vectors(model, input_ids=tokens)
    assert layer.velora.drawn
    assert layer._unchecked
    before = layer.velora_vectors
    model(input_ids=tokens)
    assert layer.velora_vectors is before
    velora.check_ranks(model)
    model.eval()
    with pytest.raises(ValueError, match="evaluation mode"):
        velora.choose_vectors(model, input_ids=tokens)
    return before


def test_parts_called_by_themselves_and_vectors_chosen_by_hand(tmp_path):
    first, second = on_ranks(2, otherwise, tmp_path)
    assert torch.equal(first, second)
