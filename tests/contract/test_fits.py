"""What people do to a pipeline besides: threads, compile, LoRA, IP-Adapter, FreeU, slicing, offload, half precision."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.hooks import apply_group_offloading
from helpers.fits import LORA, bare, expected
from helpers.oracle import oracle_of
from helpers.pipelines import TASKS, Call, run
from helpers.samplers import SAMPLERS, close, meant, sampler
from helpers.twins import NETS, ids_of, make, state
from torch import Tensor

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.unet.apply import apply
from rwopt.unet.attachment import Attachment
from rwopt.unet.neighbours import freeu
from rwopt.unet.sites import SITE_KINDS, list_sites

ORDERS = pytest.mark.parametrize("order", ["before", "after"])
"""Whether a change comes before the schedule or after it."""


@pytest.fixture
def pipe() -> Any:
    return TASKS["text to image"]()


def check(pipe: Any, call: Call, schedule: Schedule, plain: Tensor) -> None:
    """With the schedule on: the oracle's pictures; taken off: the plain ones."""
    changed = run(pipe, call)
    assert not torch.allclose(changed, plain)
    apply(pipe, None)
    assert torch.equal(run(pipe, call), plain)
    unet = pipe.unet

    def weights(t: Any) -> dict[str, float]:
        return dict(zip(schedule.sites, schedule.at(meant(pipe.scheduler, t)).tolist(), strict=True))

    try:
        pipe.unet = oracle_of(unet, weights)
        close(run(pipe, call), changed)
    finally:
        pipe.unet = unet


# ------------------------------------------------------------------------------------------------- sharing


@pytest.mark.filterwarnings("ignore:Should have t")
def test_eight_threads_on_one_unet_each_see_their_own_schedule(pipe: Any) -> None:
    """Eight stock pipelines with eight samplers, started together; each as it is alone, to the last bit."""
    first, call = pipe
    parts = {name: part for name, part in first.components.items() if name != "scheduler"}
    pipes = []
    for how in list(SAMPLERS)[:8]:
        other = StableDiffusionPipeline(**parts, scheduler=sampler(how), requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        pipes.append(other)
    before, alone = state(first.unet), []
    for index, other in enumerate(pipes):
        with apply(other, bare(first.unet, index)):
            alone.append(run(other, call))
    assert not torch.equal(alone[0], alone[6])
    handles = [apply(other, bare(first.unet, index)) for index, other in enumerate(pipes)]
    together: dict[int, Tensor] = {}
    gate = threading.Barrier(8)

    def work(index: int) -> None:
        gate.wait()
        for _ in range(2):
            together[index] = run(pipes[index], call)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) == 8
    assert all(torch.equal(together[index], alone[index]) for index in range(8))
    twin = make("sd").double()
    with pytest.raises(UserError, match="8 pipelines put a schedule on this U-Net"):
        twin(unet=first.unet)
    for handle in handles:
        handle.remove()
    assert state(first.unet) == before


def test_pipelines_that_share_a_scheduler_too_are_refused() -> None:
    twin = make("sd")
    first = SimpleNamespace(unet=twin.unet, scheduler=sampler("euler"))
    second = copy.copy(first)
    with apply(first, bare(twin.unet)), pytest.raises(UserError, match="give each its own scheduler"):
        apply(second, bare(twin.unet, 1))


# ------------------------------------------------------------------------------------------------- adapters


@ORDERS
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_lora(order: str, fused: bool) -> None:
    twin, original = make("sd").double(), make("sd").double()
    schedule, before = bare(twin.unet), list_sites(twin.unet, SITE_KINDS)

    def adapt() -> None:
        torch.manual_seed(0)
        twin.unet.add_adapter(peft.LoraConfig(**LORA))
        twin.unet.double()
        if fused:
            twin.unet.fuse_lora()

    if order == "before":
        adapt()
    with apply(twin.unet, schedule):
        if order == "after":
            assert not torch.allclose(twin(), original())
            adapt()
        actual = twin()
        assert list_sites(twin.unet, SITE_KINDS) == before
    close(actual, expected(twin, schedule))
    assert not torch.allclose(actual, expected(original, schedule))
    if fused:
        twin.unet.unfuse_lora()
        close(actual, expected(twin, schedule))
    twin.unet.delete_adapters("default")
    torch.testing.assert_close(twin(), original())


@ORDERS
def test_a_lora_file_loaded_into_a_pipeline(pipe: Any, order: str, tmp_path: Path) -> None:
    pipe, call = pipe
    donor = make("sd").unet
    donor.add_adapter(peft.LoraConfig(**LORA))
    layers = peft.get_peft_model_state_dict(donor, adapter_name="default")
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    schedule, without = bare(pipe.unet), run(pipe, call)
    if order == "after":
        apply(pipe, schedule)
    pipe.load_lora_weights(tmp_path)
    pipe.unet.double()
    apply(pipe, None)
    plain = run(pipe, call)
    assert not torch.allclose(plain, without)
    apply(pipe, schedule)
    pipe.set_adapters(pipe.get_active_adapters(), 0.5)
    half = run(pipe, call)
    pipe.set_adapters(pipe.get_active_adapters(), 1.0)
    assert not torch.allclose(half, run(pipe, call))
    check(pipe, call, schedule, plain)


def ip_adapter(unet: Any, embedding: int = 10, tokens: int = 4) -> dict[str, dict[str, Tensor]]:
    """Random weights in the layout of the published files."""
    draw = torch.Generator().manual_seed(5)
    width, layers = unet.config.cross_attention_dim, {}
    for number, (name, processor) in enumerate(unet.attn_processors.items()):
        if not name.endswith("attn1.processor"):
            inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            assert processor is not None
            for part in ("to_k_ip", "to_v_ip"):
                layers[f"{number}.{part}.weight"] = torch.randn(inner, width, generator=draw)
    projection = {
        "proj.weight": torch.randn(tokens * width, embedding, generator=draw),
        "proj.bias": torch.zeros(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": layers}


@ORDERS
def test_ip_adapter(pipe: Any, order: str) -> None:
    pipe, call = pipe
    schedule, without = bare(pipe.unet), run(pipe, call)
    look = torch.randn(2, 1, 10, generator=torch.Generator().manual_seed(6)).double()
    if order == "after":
        apply(pipe, schedule)
    pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    pipe.unet.double()
    call = call | {"ip_adapter_image_embeds": [look]}
    apply(pipe, None)
    plain = run(pipe, call)
    assert not torch.allclose(plain, without)
    apply(pipe, schedule)
    check(pipe, call, schedule, plain)


# ------------------------------------------------------------------------------------------------- switches


@ORDERS
def test_freeu_of_diffusers_and_a_schedule(pipe: Any, order: str) -> None:
    """FreeU comes first, at the join; then the skip's weight, the resnet's, the transformer's."""
    pipe, call = pipe
    schedule, without = bare(pipe.unet), run(pipe, call)
    constants = {"s1": 0.9, "s2": 0.2, "b1": 1.3, "b2": 1.4}
    if order == "before":
        pipe.enable_freeu(**constants)
    apply(pipe, schedule)
    if order == "after":
        pipe.enable_freeu(**constants)
    changed = run(pipe, call)
    apply(pipe, None)
    plain = run(pipe, call)
    assert not torch.allclose(plain, without)
    apply(pipe, schedule)
    assert torch.equal(run(pipe, call), changed)
    check(pipe, call, schedule, plain)
    apply(pipe, schedule)
    pipe.disable_freeu()
    apply(pipe, freeu(pipe.unet, **constants))  # and FreeU as a schedule of its own, on top
    assert not torch.allclose(run(pipe, call), plain)


@ORDERS
def test_attention_slicing(pipe: Any, order: str) -> None:
    pipe, call = pipe
    schedule = bare(pipe.unet)
    with apply(pipe, schedule):
        whole = run(pipe, call)
    if order == "before":
        pipe.enable_attention_slicing(1)
    with apply(pipe, schedule):
        if order == "after":
            pipe.enable_attention_slicing(1)
        close(run(pipe, call), whole)
    pipe.disable_attention_slicing()


OFFLOADS: dict[str, Any] = {
    # What enable_sequential_cpu_offload() and enable_model_cpu_offload() hang on; those two ask for a GPU.
    "sequential": lambda unet: accelerate.cpu_offload(unet, torch.device("cpu")),
    "model": lambda unet: accelerate.cpu_offload_with_hook(unet, torch.device("cpu")),
    "group, leaves": lambda unet: apply_group_offloading(unet, torch.device("cpu"), offload_type="leaf_level"),
    "group, blocks": lambda unet: apply_group_offloading(
        unet, torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
    ),
}


@ORDERS
@pytest.mark.parametrize("how", OFFLOADS)
@torch.no_grad()
def test_offload(order: str, how: str) -> None:
    twin = make("sd")
    schedule, plain = bare(twin.unet), twin()
    with apply(twin.unet, schedule):
        changed = twin()
    if order == "before":
        OFFLOADS[how](twin.unet)
    with apply(twin.unet, schedule):
        if order == "after":
            OFFLOADS[how](twin.unet)
        assert torch.equal(twin(), changed)
    assert torch.equal(twin(), plain)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    twin = make(name)
    schedule = bare(twin.unet)
    twin.to(dtype)
    plain = twin()
    with apply(twin.unet, schedule):
        actual = twin()
    assert actual.dtype == dtype
    reference = expected(twin, schedule)
    effect, rounding = (reference - plain).float(), (actual - reference).float()
    assert rounding.abs().mean() < 0.2 * effect.abs().mean()
    with apply(twin.unet, Schedule.constant(schedule.sites, [1.0], noise=schedule.noise)):
        assert torch.equal(twin(), plain)


@pytest.mark.parametrize("name", ["sd", "sdxl", "if"])
@torch.no_grad()
def test_channels_last_changes_no_bit_at_one(name: str) -> None:
    twin = make(name)
    twin.unet.to(memory_format=torch.channels_last)
    plain = twin()
    ids = ids_of(twin.unet, SITE_KINDS)
    with Attachment(twin.unet, ids) as attachment:
        assert torch.equal(attachment(twin.x, 500, weights=torch.ones(len(ids)), **twin.args()), plain)
        assert torch.equal(attachment(twin.x, 500, weights=torch.ones(2, len(ids)), **twin.args()), plain)


def test_a_controlnet_is_left_alone() -> None:
    pipe, _ = TASKS["controlnet"]()
    before = state(pipe.controlnet)
    with apply(pipe, bare(pipe.unet)):
        assert state(pipe.controlnet) == before
    with torch.device("meta"):
        net = diffusers.ControlNetModel(block_out_channels=(32, 32, 32, 32), cross_attention_dim=8)
    with pytest.raises(UserError, match="ControlNetModel has no up blocks"):
        list_sites(net)
