"""A schedule under torch.compile: one graph, no operator of our own, other schedules without another graph, threads."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from helpers.fits import LORA, bare, expected
from helpers.samplers import sampler
from helpers.twins import ids_of, make, make_small
from torch._dynamo.testing import CompileCounter

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.unet.apply import apply
from rwopt.unet.attachment import Attachment
from rwopt.unet.follow import Followed
from rwopt.unet.sites import FREEU_KINDS, SITE_KINDS, list_sites

HOW = pytest.mark.parametrize("how", ["torch.compile", "unet.compile"])


def compiled(how: str, unet: Any, backend: Any) -> Any:
    """The U-Net compiled: wrapped, or in place."""
    torch._dynamo.reset()
    if how == "torch.compile":
        return torch.compile(unet, backend=backend, fullgraph=True)
    unet.compile(backend=backend, fullgraph=True)
    return unet


@pytest.mark.parametrize("how", ["a function around", "repeated blocks"])
@torch.no_grad()
def test_other_ways_to_compile(how: str) -> None:
    """More graphs than one, and the same numbers, at each step, with the schedule on and off."""
    twin, times = make_small(), torch.arange(900, 0, -200)
    plain = [twin(t) for t in times]
    with apply(twin.unet, bare(twin.unet)):
        weighed = [twin(t) for t in times]
        torch._dynamo.reset()
        unet = twin.unet
        if how == "repeated blocks":
            unet.compile_repeated_blocks(backend="eager")
        else:
            unet = torch.compile(lambda *args, **kwargs: twin.unet(*args, **kwargs), backend="eager")
        assert all(torch.equal(twin(t, unet), w) for t, w in zip(times, weighed, strict=True))
    assert all(torch.equal(twin(t, unet), p) for t, p in zip(times, plain, strict=True))
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("how", "kinds"), [("torch.compile", SITE_KINDS), ("unet.compile", ("transformer", *FREEU_KINDS))]
)
@torch.no_grad()
def test_compiled_is_one_graph_without_recompilation(how: str, kinds: tuple[str, ...]) -> None:
    twin, counter = make("sd"), CompileCounter()
    assert {site.kind for site in list_sites(make_small().unet, kinds)} == {*kinds}  # for the other tests
    times = torch.arange(990, 0, -20)  # 50 steps
    schedule = Schedule(**{**vars(bare(twin.unet, kinds=kinds)), "provenance": {}})
    with apply(twin.unet, schedule):
        plain = [twin(t) for t in times[::10]]
        torch._dynamo.reset()
        unet = twin.unet
        unet = compiled(how, unet, counter)
        actual = [twin(t, unet) for t in times][::10]
        assert counter.frame_count == 1
        assert all(torch.equal(a, b) for a, b in zip(actual, plain, strict=True))
        with pytest.raises(UserError, match="compiled and would ignore"):
            apply(unet, schedule)
    torch._dynamo.reset()


@HOW
@torch.no_grad()
def test_another_schedule_on_a_compiled_unet(how: str) -> None:
    """By `handle.schedule`, or taken off and put on again: never another graph, and none of it stays."""
    twin, counter = make_small(), CompileCounter()
    first = bare(twin.unet)
    longer = np.linspace(0.5, 1.5, 12)[:, None].repeat(len(first.sites), 1)
    others = [
        replace(first, weights=2 - first.weights),
        Schedule.constant(first.sites, [9.0], 1.2, noise=first.noise),
        replace(first, sigmas=np.linspace(9, 0.1, 12), weights=longer),
    ]
    plain = twin()
    expected = []
    for schedule in (first, *others):
        with apply(twin.unet, schedule):
            expected.append(twin())
    torch._dynamo.reset()
    handle = apply(twin.unet, first)
    unet = twin.unet
    unet = compiled(how, unet, counter)
    assert torch.equal(twin(unet=unet), expected[0])
    for schedule, wanted in zip(others, expected[1:], strict=True):
        handle.schedule = schedule
        assert handle.schedule is schedule
        assert torch.equal(twin(unet=unet), wanted)
    with pytest.raises(UserError, match="the same"):
        handle.schedule = replace(first, sites=first.sites[:-1], weights=first.weights[:, :-1])
    handle.remove()
    assert torch.equal(twin(unet=unet), plain)
    with pytest.raises(UserError, match="holds no schedule"):
        handle.schedule = first
    with apply(unet, others[0]) as again:
        handle.remove()  # the old handle has nothing left to take off
        assert torch.equal(twin(unet=unet), expected[1])
        again.schedule = first
        assert torch.equal(twin(unet=unet), expected[0])
    assert torch.equal(twin(unet=unet), plain)
    apply(unet, first)
    apply(unet, None)
    assert torch.equal(twin(unet=unet), plain)
    with pytest.raises(UserError, match="compiled and would ignore"):
        apply(unet, Schedule.constant(first.sites[:2], [9.0], 1.2, noise=first.noise))
    assert counter.frame_count == 1
    torch._dynamo.reset()


class Keep:
    """A backend that keeps the graphs it is given."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, example: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward


@torch.no_grad()
def test_weights_are_data_at_a_fixed_place_for_a_graph() -> None:
    """What CUDA graphs need: no operator of our own, and inputs that keep their address from call to call."""
    twin, keep = make_small(), Keep()
    torch._dynamo.reset()
    with apply(twin.unet, bare(twin.unet)) as handle:
        unet = compiled("torch.compile", twin.unet, keep)
        twin(torch.tensor(500), unet)
        assert handle.attachment is not None
        place = handle.attachment._scope.place
        assert place is not None
        address, before = place.data_ptr(), place.clone()
        twin(torch.tensor(100), unet)
        assert handle.attachment._scope.place is place
        assert place.data_ptr() == address
        assert not torch.equal(place, before)  # written before the call
        assert place._dynamo_static_input_type  # type: ignore[attr-defined] # a CUDA graph reads it there
    (graph,) = keep.graphs
    operators = [n.target for n in graph.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert all(operator.namespace == "aten" for operator in operators)
    assert not [n for n in graph.graph.nodes if "rwopt" in str(n.target)]
    torch._dynamo.reset()


@torch.no_grad()
def test_threads_on_a_compiled_unet_take_turns() -> None:
    twin = make_small()
    explicit = Attachment(twin.unet, ids_of(twin.unet, SITE_KINDS))
    weights = [torch.full((len(explicit.sites),), value) for value in (0.5, 1.0, 1.3, 1.7)]
    call = {"weights": None, **twin.args()}
    alone = [explicit(twin.x, 500, **{**call, "weights": w}) for w in weights]
    torch._dynamo.reset()
    explicit.unet = torch.compile(twin.unet, backend="eager")
    explicit(twin.x, 500, **{**call, "weights": weights[0]})
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(6):
            with torch.no_grad():
                if not torch.equal(explicit(twin.x, 500, **{**call, "weights": weights[index]}), alone[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    torch._dynamo.reset()


@torch.no_grad()
def test_hooks_that_a_compiled_graph_ignores_are_noticed() -> None:
    """Of the U-Net itself. Once there was a schedule in the process torch looks at hooks, and makes the graph anew."""
    twin = make_small()
    torch._dynamo.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # as it is before there is a schedule
    compiled = torch.compile(twin.unet, backend="eager")
    twin(unet=compiled)
    with apply(twin.unet, bare(twin.unet)), pytest.raises(UserError, match="compiled without the weights"):
        twin(unet=compiled)
    torch._dynamo.reset()


@HOW
@torch.no_grad()
def test_lora_between_schedule_and_compile(how: str) -> None:
    """It wraps layers that are weighed: they are followed to their new place."""
    twin = make_small()
    schedule, unet = bare(twin.unet), twin.unet
    torch._dynamo.reset()
    with apply(unet, schedule):
        unet.add_adapter(peft.LoraConfig(**LORA))
        unet = compiled(how, unet, "eager")
        torch.testing.assert_close(twin(unet=unet), expected(twin, schedule), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_a_replaced_layer_is_followed() -> None:
    twin = make_small()
    resnet = twin.unet.down_blocks[0].resnets[0]
    followed = Followed(resnet, "conv2", lambda *_: None)
    old, resnet.conv2 = resnet.conv2, copy.deepcopy(resnet.conv2)
    resnet.conv2._forward_hooks.clear()
    followed.follow()
    assert (len(old._forward_hooks), len(resnet.conv2._forward_hooks)) == (0, 1)
    followed.remove()
    assert not resnet.conv2._forward_hooks


def test_a_compiled_unet_passes_no_gradient_to_the_weights() -> None:
    twin = make_small()
    explicit = Attachment(twin.unet, ids_of(twin.unet, SITE_KINDS))
    weights = torch.ones(len(explicit.sites), requires_grad=True)
    torch._dynamo.reset()
    explicit.unet = torch.compile(twin.unet, backend="eager")
    with torch.no_grad():
        plain = explicit(twin.x, 500, **twin.args(), weights=weights.detach())
    with pytest.raises(UserError, match="passes no gradient to the weights"):
        explicit(twin.x, 500, **twin.args(), weights=weights)
    with torch.no_grad():  # and it goes on working
        assert torch.equal(explicit(twin.x, 500, **twin.args(), weights=weights.detach()), plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("first", ["weighed", "plain"])
@torch.no_grad()
def test_a_plain_unet_beside_a_weighed_one(first: str) -> None:
    """Graphs are shared by U-Nets that look alike: torch must look at the hooks, and does once there were some."""
    twin, counter = make_small(), CompileCounter()
    other, t = copy.deepcopy(twin.unet), torch.tensor(500)
    plain = twin(t, other)
    with apply(twin.unet, bare(twin.unet)):
        wanted = twin(t)
        torch._dynamo.reset()
        nets = {"weighed": (torch.compile(twin.unet, backend=counter), wanted)}
        nets["plain"] = torch.compile(other, backend=counter), plain
        for _ in range(3):
            for name in sorted(nets, key=first.__ne__):
                net, right = nets[name]
                assert torch.equal(twin(t, net), right), name
    assert counter.frame_count == 2
    assert torch.equal(twin(t, nets["weighed"][0]), plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["torch.compile", "unet.compile", "repeated blocks"])
@torch.no_grad()
def test_the_graph_of_a_plain_unet_that_was_compiled_before_is_noticed(how: str) -> None:
    twin, t = make_small(), torch.tensor(500)
    other = copy.deepcopy(twin.unet)
    torch._dynamo.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # as it is before there is a schedule

    def built(unet: Any) -> Any:
        if how == "torch.compile":
            return torch.compile(unet, backend="eager")
        if how == "unet.compile":
            unet.compile(backend="eager")
        else:
            unet.compile_repeated_blocks(backend="eager")
        return unet

    twin(t, built(other))
    with apply(twin.unet, replace(bare(twin.unet, kinds=("self", "cross", "ff")), provenance={"seen": []})):
        wanted = twin(t)
        net = built(twin.unet)
        with pytest.raises(UserError, match=r"call torch\._dynamo\.reset\(\)"):
            twin(t, net)
        torch._dynamo.reset()  # the remedy
        assert torch.equal(twin(t, net), wanted)
    torch._dynamo.reset()


@torch.no_grad()
def test_a_resting_schedule_of_another_pipeline_is_in_nobodys_way() -> None:
    twin, scheduler = make_small(), sampler("euler")
    first, second = (SimpleNamespace(unet=twin.unet, scheduler=scheduler) for _ in range(2))
    schedule = bare(twin.unet)
    torch._dynamo.reset()
    handle = apply(first, schedule)
    compiled = torch.compile(twin.unet, backend="eager")
    weighed = twin(torch.tensor(500), compiled)
    with pytest.raises(UserError, match="give each its own scheduler"):
        apply(second, schedule)
    handle.remove()
    second.unet = compiled
    with pytest.raises(UserError, match="order of guidance"):  # and nothing is half done
        apply(second, replace(schedule, cfg_branch="cond"))
    plain = twin(torch.tensor(500), compiled)
    assert not torch.equal(plain, weighed)
    with apply(second, schedule):
        assert torch.equal(twin(torch.tensor(500), compiled), weighed)
    assert torch.equal(twin(torch.tensor(500), compiled), plain)
    torch._dynamo.reset()
