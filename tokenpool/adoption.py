"""Replace a module of a model by a pooled module with the same children, and undo this.

The model's own module is called *host*. The pooled module is called *guest*.
"""

import itertools

import torch
from torch import Tensor, nn

# Hooks of PyTorch's modules. A hook on a replaced module would be lost, or would get other arguments.
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
    """Give a guest the host's children, parameters and buffers under the same names, and the host's mode.

    Each child then has two parents. Only the guest is in the model, so a user replaces children in the guest.

    Args:
        guest: the pooled module.
        host: the model's own module.
    """
    _copy(host, guest)


def give_back(guest: nn.Module, host: nn.Module, but: tuple[str, ...] = ()) -> None:
    """Give a host the guest's current children, parameters and buffers, and the guest's mode.

    Args:
        guest: the pooled module.
        host: the model's own module.
        but: names of children and parameters that belong to the guest alone.
    """
    _copy(guest, host, but)


def _copy(source: nn.Module, target: nn.Module, but: tuple[str, ...] = ()) -> None:
    for name, child in source._modules.items():  # named_children would skip a module that has two names
        if name not in but:
            target.add_module(name, child)
    for name, parameter in source._parameters.items():
        if name not in but:
            target.register_parameter(name, parameter)
    for name, buffer in source._buffers.items():
        if name not in but:
            target.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)
    target.training = source.training


def check_exchangeable(module: nn.Module, name: str, own: tuple[str, ...] = ()) -> None:
    """Check that nothing is lost if another module replaces this module and adopts its children.

    Args:
        module: a module that `patch` and `unpatch` replace.
        name: name of the module in the model.
        own: names of parameters that the module's class defines.

    Raises:
        ValueError: if the module has hooks, parameters, buffers or a forward method that a user has given to it.
    """
    found = [kind for attribute, kind in _HOOKS.items() if getattr(module, attribute)]
    tensors = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
    found += [f"parameter or buffer {key!r} of its own" for key, _ in tensors if key not in own]
    found += ["forward method of its own"] if "forward" in vars(module) else []
    if found:
        raise ValueError(
            f"{name} has a {found[0]}, which would be lost: patch and unpatch replace this module. Remove it first, "
            "or put it on a module inside that stays, such as norm1, attn.qkv, attn.proj or mlp"
        )


def reference(module: nn.Module) -> Tensor:
    """Return an empty tensor that has the device and the dtype of a module.

    The dtype is the dtype of the first floating-point parameter or buffer, or else PyTorch's default dtype. The device
    is the device of the first parameter or buffer, or else the CPU. (Modules that PyTorch has quantised have neither
    parameters nor buffers.)
    """
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), torch.get_default_dtype())
    return torch.empty(0, device=device, dtype=dtype)
