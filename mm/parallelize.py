"""From a single-device model to a sharded one. The model itself knows nothing of this."""

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from mm.common import dist
from mm.common.errors import UserError

# Methods that training calls besides forward: each gathers the root's weights as forward does.
ENTRIES = ("loss", "image_embeds", "text_embeds", "region_losses")


def blocks(model: nn.Module) -> list[nn.Module]:
    """The members of every ModuleList (the layers of towers and decoder), innermost lists left whole."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return [block for members in lists for block in members]


def parallelize(
    model: nn.Module, *, device: torch.device, precision: str = "fp32", sharding: str = "full"
) -> nn.Module:
    """Spread `model` over all ranks and move it to `device`.

    sharding "full": FSDP2, one group per block, one for the rest. "replicate": every rank keeps all weights, for
    models so small that gathering costs more than it saves; the engine then calls `average_gradients`.
    Every rank passes the same weights, with what is frozen already frozen. One rank gets its module back
    untouched. precision "bf16": weights are gathered and multiplied in bf16, kept and reduced in fp32.
    Activation checkpointing is the model's own (its config), inside each block's group.
    Raises UserError where ranks hold different weights.
    """
    if dist.world_size() == 1:
        return model.to(device)
    _same_everywhere(model)
    if sharding == "replicate":
        return model.to(device)
    mesh = init_device_mesh(device.type, (dist.world_size(),))
    half = torch.bfloat16 if precision == "bf16" else None
    # Inputs are left alone: rotary tables stay fp32 whatever the weights are gathered in.
    policy = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
    )
    for block in blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # The root stays whole from forward to backward: the loss uses its weights (lm_head, scales) outside forward.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for name in ENTRIES:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    return model


@torch.no_grad()
def average_gradients(grads: list[torch.Tensor]) -> None:
    """The mean over ranks of whole gradients, in place, in one message (sharded ones have theirs already)."""
    if dist.world_size() == 1 or not grads or isinstance(grads[0], DTensor):
        return
    flat = dist.sum_tensor(torch.cat([g.reshape(-1) for g in grads])) / dist.world_size()
    for g, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        g.copy_(mean.view_as(g))


def _same_everywhere(model: nn.Module) -> None:
    """Sharding takes each rank's own piece, so a rank built from another seed would go unnoticed."""
    sums = [float(p.detach().double().sum()) for p in model.parameters()]
    if any(other != sums for other in dist.gather_objects(sums)):
        raise UserError("ranks hold different weights: build the model from one seed or one folder on all of them")


def shell(model: nn.Module) -> nn.Module:
    """A copy of an unsharded model without memory (meta device): what a gathered state is later laid into."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.to("meta"), requires_grad=p.requires_grad)
    return copy.deepcopy(model, memo)


def gathered(model: nn.Module, into: nn.Module) -> nn.Module | None:
    """The whole model in the CPU memory of rank 0 (None on the others); `into` is its `shell`.

    With one rank the model itself, on its device. Weights are gathered one at a time.
    """
    if dist.world_size() == 1:
        return model
    state = {}
    for name, value in model.state_dict().items():
        full = value.full_tensor() if hasattr(value, "full_tensor") else value
        if dist.is_main():
            state[name] = full.cpu()
    if not dist.is_main():
        return None
    into.load_state_dict(state, assign=True)
    return into
