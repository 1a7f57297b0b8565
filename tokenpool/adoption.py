"""How pooled modules take the places of timm's modules, and give them back with whatever stands in them by then."""

import itertools

import torch
from torch import Tensor, nn

# Hooks of PyTorch's modules. A hook on a module that is exchanged would be lost, or be given what it does not expect.
_HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_state_dict_hooks": "state-dict hook",
    "_state_dict_pre_hooks": "state-dict pre-hook",
    "_load_state_dict_pre_hooks": "load-state-dict pre-hook",
    "_load_state_dict_post_hooks": "load-state-dict post-hook",
}


def adopt(guest: nn.Module, host: nn.Module) -> None:
    """Give a guest the host's children, under their names, and the host's mode (training or evaluation).

    Each child has two parents then. Only the guest counts: what replaces a child there is what stands in the model.
    """
    for name, child in host._modules.items():  # named_children leaves out a module that has two names
        guest.add_module(name, child)
    guest.training = host.training


def give_back(guest: nn.Module, host: nn.Module, but: tuple[str, ...] = ()) -> None:
    """Give the host the children that the guest has now, except those named in `but`, and the guest's mode."""
    for name, child in guest._modules.items():
        if name not in but:
            host.add_module(name, child)
    host.training = guest.training


def check_exchangeable(module: nn.Module, name: str, own: tuple[str, ...] = ()) -> None:
    """Check that nothing would be lost if another module took the place of this one and adopted its children.

    Args:
        module: one of the modules that `patch` and `unpatch` exchange.
        name: its name in the model.
        own: parameters that belong to the module's class.

    Raises:
        ValueError: if the module has hooks, parameters, buffers or a forward method that users have given it.
    """
    found = [kind for attribute, kind in _HOOKS.items() if getattr(module, attribute)]
    tensors = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    found += [f"parameter or buffer {key!r} of its own" for key, _ in tensors if key not in own]
    found += ["forward method of its own"] if "forward" in vars(module) else []
    if found:
        raise ValueError(
            f"{name} has a {found[0]}, which would be lost: patch and unpatch exchange this module. Remove it first, "
            "or put it on a module inside, such as norm1, attn.qkv, attn.proj or mlp: those stay"
        )


def reference(module: nn.Module) -> Tensor:
    """An empty tensor on the device and of the dtype of a module, whatever its parameters are called.

    The dtype is that of the first parameter or buffer of floating point, or PyTorch's default one. The device is that
    of the first parameter or buffer, or the CPU: modules that PyTorch has quantised have neither.
    """
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())
    return torch.empty(0, device=device, dtype=dtype)
