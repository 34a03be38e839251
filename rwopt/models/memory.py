"""What tensors take, counted without computing, and what keeps it small.

Every figure comes from fake tensors, which have sizes and no numbers: a network's twin is called as the network would
be, and the bytes of all storages alive at a time are added up (each rounded up to 512, as PyTorch's CUDA allocator
does). They are made as CPU tensors, since PyTorch builds without CUDA cannot differentiate fake CUDA ones. Attention is
the fused CPU kernel's then, which keeps what flash and memory-efficient attention keep on a GPU: inputs, output and a
logarithm a row, no matrix of scores. Not counted: workspaces of cuDNN and cuBLAS, and gaps in the allocator's blocks.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from rwopt.unet.attachment import Attachment

LARGE = 4 * 2**20
"""From how many bytes of a `feature_map` on a decoder is large."""
_found: dict[tuple[Any, ...], int] = {}
"""What `call_bytes` found, by all that it looks at: U-Nets of one architecture take the same."""


def most_memory(device: torch.device) -> int:
    """Bytes that this process has held at its peak so far: of its tensors on a GPU, else all of it; 0 where a system
    does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Live(TorchDispatchMode):
    """Bytes of the storages that operations made while it was on and that are still alive: `now`, and `peak`.

    PyTorch's own tracker, `torch.distributed._tools.mem_tracker`, counts the same, but takes no frozen networks.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), -(-storage.nbytes() // 512) * 512
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextmanager
def counting() -> Iterator[Live]:
    """Fake tensors are made and counted. Real ones must not come near them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), Live() as live:
        yield live


def twin(net: Any) -> Any:
    """A network of the same class, configuration and number format as `net`, of fake tensors; inside `counting`.

    Of `net` only these are looked at: it may lie on the meta device. U-Nets with SDXL's additional embedding are given
    its inputs.
    """
    dtype = next(net.parameters()).dtype
    with torch.device("meta"):
        copy = type(net).from_config(net.config).eval()
    for module in copy.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, dtype=dtype, device="cpu"), False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device="cpu")
    if copy.config.get("addition_embed_type") == "text_time":
        copy.register_forward_pre_hook(_with_size_and_pooled_text, with_kwargs=True)
    return copy


def _with_size_and_pooled_text(unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    config, rows = unet.config, len(args[0])
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {"text_embeds": torch.empty(rows, pooled, dtype=args[0].dtype), "time_ids": torch.empty(rows, 6)}
    return args, {**kwargs, "added_cond_kwargs": added}


def configured(net: Any) -> str:
    """What a network is made of, as one text: its configuration without diffusers' own notes."""
    config = {name: value for name, value in net.config.items() if not name.startswith("_")}
    return json.dumps(config, sort_keys=True, default=str)


def call_bytes(unet: Any, sites: Sequence[str], mode: str, x: Sequence[int], text: Sequence[int]) -> int:
    """What a U-Net call with weights at `sites` and its backward pass take at their peak, beside the network itself.

    x: shape [B, C, h, w] of the call's input; text: [B, L, D]. Takes a second or two, once for each architecture; grows
    in proportion to B.
    """
    dtype = next(unet.parameters()).dtype
    key = (type(unet), configured(unet), dtype, tuple(sites), mode, tuple(x), tuple(text))
    if key not in _found:
        _found[key] = _count_call(unet, dtype, sites, mode, x, text)
    return _found[key]


def _count_call(
    unet: Any, dtype: torch.dtype, sites: Sequence[str], mode: str, x: Sequence[int], text: Sequence[int]
) -> int:
    with torch.enable_grad(), counting() as live:
        copy = twin(unet)
        live.peak = before = live.now
        weights = torch.ones(len(sites), requires_grad=True)
        with Attachment(copy, sites, mode) as attachment:
            latents = torch.empty(x, dtype=dtype, requires_grad=True)
            out = attachment(latents, 0, torch.empty(text, dtype=dtype), weights)
            torch.autograd.grad(out.float().sum(), [weights, latents], allow_unused=True)
        return live.peak - before


def feature_map(config: Any, height: int, width: int, itemsize: int) -> int:
    """Bytes of one picture's feature map at the last level of a decoder, for latents of `height` x `width`.

    config: the autoencoder's. The backward pass of a picture keeps about 45 of these alive in Stable Diffusion's
    decoder: 2.8 GiB in half precision at 512 x 512.
    """
    channels = config.get("block_out_channels") or config["decoder_block_out_channels"]
    return int(channels[0] * height * width * 4 ** (len(channels) - 1) * itemsize)


@contextmanager
def checkpointed_blocks(net: Any) -> Iterator[None]:
    """The blocks of `net` that run in here keep no activations: they are run again in the backward pass.

    Afterwards every block's own switch is as it was; while a block is run again, all are on as they were the first
    time, since a block may hold others. Not for two threads with one network.
    """
    with _switched(net, [module for module in net.modules() if hasattr(module, "gradient_checkpointing")]):
        yield


@contextmanager
def _switched(net: Any, parts: Sequence[Any]) -> Iterator[None]:
    """`checkpointed_blocks` of a network whose `parts` with a switch are known: a hundred blocks ask for them."""
    before = [(part.gradient_checkpointing, getattr(part, "_gradient_checkpointing_func", None)) for part in parts]
    if not all(on for on, _ in before):
        net.enable_gradient_checkpointing(partial(_checkpointed, net, parts))
    try:
        yield
    finally:
        for part, (on, function) in zip(parts, before, strict=True):
            part.gradient_checkpointing, part._gradient_checkpointing_func = on, function


def _checkpointed(net: Any, parts: Sequence[Any], part: Any, *args: Any) -> Any:
    """What diffusers calls in place of `part(*args)`."""

    def run(*args: Any) -> Any:
        with _switched(net, parts):
            return part(*args)

    return checkpoint(run, *args, use_reentrant=False)
