"""Shares of a call: exact operations by the counter's own module tree, time by a part that is made slow."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from helpers.small import hooks_of, inputs, make_tiny_unet
from helpers.twins import NETS, make
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rwopt.errors import UserError
from rwopt.unet.cost import operation_counter
from rwopt.unet.example import check_plain, example_inputs, keywords
from rwopt.unet.shares import KINDS, shares


@pytest.mark.parametrize("name", NETS)
def test_shares_of_every_family_sum_to_one_and_leave_no_hooks(name: str) -> None:
    twin = make(name)
    found = shares(twin.unet, twin.x.shape, twin.args(), rounds=2 if name == "sd" else 1)
    assert sum(share.operations for share in found) == pytest.approx(1)
    assert sum(share.time for share in found) == pytest.approx(1)
    assert all(0 <= share.operations <= 1 and 0 <= share.time <= 1 for share in found)
    assert len({(share.place, share.kind) for share in found}) == len(found)
    places = list(dict.fromkeys(share.place for share in found))
    middle = ["mid_block"] * (getattr(twin.unet, "mid_block", None) is not None)
    down, up = ([f"{side}.{i}" for i in range(len(getattr(twin.unet, side)))] for side in ("down_blocks", "up_blocks"))
    assert places == ["in", *down, *middle, *up, "out"]
    assert hooks_of(twin.unet) == []


@pytest.mark.parametrize("name", ["sd", "sdxl"])
def test_operations_are_those_of_the_modules(name: str) -> None:
    """PyTorch's own tree of modules, which knows nothing of parts; attention by its formula."""
    twin = make(name)
    with operation_counter() as counter, torch.no_grad():
        twin()
    tree: dict[str, int] = {path: sum(counts.values()) for path, counts in counter.get_flop_counts().items()}
    root = type(twin.unet).__name__

    def counted(path: str) -> int:
        return tree.get(f"{root}.{path}", 0)

    found = {(s.place, s.kind): s.operations for s in shares(twin.unet, twin.x.shape, twin.args(), rounds=1)}
    expected: dict[tuple[str, str], int] = {}
    for path, module in twin.unet.named_modules():
        place = ".".join(path.split(".")[: 1 if path.startswith("mid") else 2])
        last = path.split(".")[-1]
        kind = {"attn1": "self", "attn2": "cross", "ff": "ff", "resnets": "resnet"}.get(last)
        if kind is None and path.split(".")[-2:-1] in (["resnets"], ["downsamplers"], ["upsamplers"]):
            kind = "resnet" if "resnets" in path else "sampling"
        if kind and not isinstance(module, nn.ModuleList):
            expected[place, kind] = expected.get((place, kind), 0) + counted(path)
        if path.split(".")[-2:-1] == ["attentions"]:
            inner = [f"{path}.{n}" for n, _ in module.named_modules() if n.split(".")[-1] in ("attn1", "attn2", "ff")]
            rest = counted(path) - sum(map(counted, inner))
            expected[place, "transformer"] = expected.get((place, "transformer"), 0) + rest
    assert len(expected) > 10
    for part, operations in expected.items():
        assert found[part] == pytest.approx(operations / tree["Global"]), part
    assert found["out", "other"] == pytest.approx(counted("conv_out") / tree["Global"])
    assert {kind for _, kind in found} == set(KINDS)


def test_fused_attention_counts_as_much_as_the_plain_one() -> None:
    """Two products of queries x keys x channels, which PyTorch's counter leaves out on processors."""
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8)
    with operation_counter() as counter, torch.no_grad():
        nn.functional.scaled_dot_product_attention(q, k, k)
    assert counter.get_total_flops() == 2 * 2 * (2 * 3) * 5 * 7 * 8
    with FlopCounterMode(display=False) as bare, torch.no_grad():
        (q @ k.mT).softmax(-1) @ k
    assert bare.get_total_flops() == counter.get_total_flops()


SLOW = {
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_q": ("mid_block", "cross"),
    "up_blocks.1.attentions.0.transformer_blocks.1.ff.net.0": ("up_blocks.1", "ff"),
    "mid_block.attentions.0.transformer_blocks.0.norm2": ("mid_block", "transformer"),
    "down_blocks.1.resnets.0.conv1": ("down_blocks.1", "resnet"),
    "down_blocks.0.downsamplers.0.conv": ("down_blocks.0", "sampling"),
    "time_embedding.linear_1": ("in", "other"),
    "conv_norm_out": ("out", "other"),
}


def test_time_goes_to_the_innermost_part(tiny_unet: Any) -> None:
    """One layer of each part burns the processor, each longer than the last; else a call takes some milliseconds."""

    def slow(plain: Any, seconds: float) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            end = time.thread_time() + seconds
            while time.thread_time() < end:
                pass
            return plain(*args, **kwargs)

        return forward

    for i, path in enumerate(SLOW):
        layer = tiny_unet.get_submodule(path)
        layer.forward = slow(layer.forward, 0.005 * (i + 1))
    x, _, text = inputs()
    found = shares(tiny_unet, x.shape, {"encoder_hidden_states": text}, rounds=3)
    largest = sorted(found, key=lambda share: share.time)[-len(SLOW) :]
    assert [(share.place, share.kind) for share in largest] == list(SLOW.values())


def test_a_call_that_fails_leaves_no_hooks(tiny_unet: Any) -> None:
    with pytest.raises(RuntimeError):
        shares(tiny_unet, (2, 4, 8, 8), {"encoder_hidden_states": torch.randn(2, 5, 13)}, rounds=1)
    assert hooks_of(tiny_unet) == []


def test_what_has_no_sites_is_refused() -> None:
    with pytest.raises(UserError, match="no up blocks"):
        shares(nn.Conv2d(4, 4, 1), (1, 4, 8, 8), {})


@pytest.mark.parametrize("changes", [{}, {"in_channels": 8}, {"in_channels": 9}, {"time_cond_proj_dim": 6}])
def test_example_inputs_fit_their_unet(changes: dict[str, Any]) -> None:
    unet = make_tiny_unet(**changes).double()
    made = example_inputs(unet.config, (8, 12), rows=3, tokens=6)
    x = made["sample"].double()
    assert x.shape == (3, changes.get("in_channels", 4), 8, 12)
    assert made["encoder_hidden_states"].shape == (3, 6, 12)
    assert unet(x, made["timestep"], **keywords(made, x)).sample.shape == (3, 4, 8, 12)
    assert ("timestep_cond" in made) == ("time_cond_proj_dim" in changes)


def test_example_inputs_of_sdxl_stand_where_it_looks_for_them() -> None:
    unet = make("sdxl").unet
    rest = keywords(made := example_inputs(unet.config, (8, 8)), made["sample"])
    assert set(rest["added_cond_kwargs"]) == {"text_embeds", "time_ids"}
    assert unet(made["sample"], made["timestep"], **rest).sample.shape == (2, 4, 8, 8)


@pytest.mark.parametrize("name", ["ddpm", "kandinsky", "svd", "3d"])
def test_other_inputs_are_not_made_up(name: str) -> None:
    with pytest.raises(UserError, match=r"unet=UNet.*: this takes a UNet2DConditionModel"):
        check_plain(make(name).unet, "this takes")
    with pytest.raises(UserError, match="class_embed_type is 'timestep': this takes one without"):
        check_plain(make("sd", class_embed_type="timestep").unet, "this takes")
