"""Plans of published methods: their rules, and their pictures where the real thing installs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.hooks import HookRegistry
from helpers import pipelines
from torch import Tensor

from rwopt.errors import UserError
from rwopt.schedule import Schedule
from rwopt.schedule.actions import FULL, Action, Actions
from rwopt.unet import peers
from rwopt.unet.apply import apply
from rwopt.unet.cost import CostTable
from rwopt.unet.sites import list_sites

STEPS = 8


def pipeline(name: str = "text to image") -> tuple[Any, dict[str, Any]]:
    pipe, call = pipelines.TASKS[name]()
    call.pop("denoising_end", None)
    pipe.scheduler = DDIMScheduler(timestep_spacing="trailing")
    return pipe, {**call, "num_inference_steps": STEPS}


def picture(pipe: Any, call: dict[str, Any]) -> Tensor:
    return pipelines.run(pipe, call)


def planned(pipe: Any, call: dict[str, Any], peer: peers.Peer) -> Tensor:
    """The picture with rwopt's actions, by a schedule on the stock pipeline."""
    pipe.scheduler.set_timesteps(STEPS)
    kept = pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].double()
    sigmas = ((1 - kept) / kept).sqrt().tolist()
    sites = [s.id for s in list_sites(pipe.unet, ("self", "cross", "ff"))]
    with apply(pipe, Schedule.constant(sites, sigmas, actions=peer.along(sigmas))):
        return picture(pipe, call)


@pytest.mark.parametrize(("interval", "branch"), [(2, 0), (3, 1)])
def test_deep_cache_makes_the_pictures_of_deepcache(interval: int, branch: int) -> None:
    deepcache = pytest.importorskip("DeepCache", reason="pip install --no-deps DeepCache==0.1.1")
    pipe, call = pipeline()
    plain = picture(pipe, call)
    helper = deepcache.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    theirs = picture(pipe, call)
    helper.disable()
    assert not torch.equal(theirs, plain)
    pipe, call = pipeline()
    assert torch.equal(planned(pipe, call, peers.deep_cache(STEPS, interval, branch)), theirs)


def test_pyramid_attention_makes_the_pictures_of_diffusers_hook() -> None:
    pipe, call = pipeline()
    plain, times = picture(pipe, call), list[int]()
    pipe.scheduler.set_timesteps(STEPS)
    steps = pipe.scheduler.timesteps.tolist()
    feed = pipe.unet.register_forward_pre_hook(lambda module, args: times.append(int(args[1])))
    apply_pyramid_attention_broadcast(pipe.unet, PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, cross_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(100, 800), cross_attention_timestep_skip_range=(100, 800),
        spatial_attention_block_identifiers=("attn1",), cross_attention_block_identifiers=("attn2",),
        current_timestep_callback=lambda: times[-1],
    ))  # fmt: skip
    HookRegistry.check_if_exists_or_initialize(pipe.unet).reset_stateful_hooks()
    theirs = picture(pipe, call)
    feed.remove()
    assert not torch.equal(theirs, plain)
    pipe, call = pipeline()
    peer = peers.pyramid_attention(steps, {"self": 2, "cross": 3}, 100, 800)
    assert {kind for action in peer.actions for kind, _ in action.sites} == {"self", "cross"}
    assert torch.equal(planned(pipe, call, peer), theirs)


@pytest.mark.parametrize(("name", "loader"), [("text to image", "TgateSDLoader"), ("sdxl base", "TgateSDXLLoader")])
def test_tgate_makes_the_pictures_of_tgate(name: str, loader: str) -> None:
    """Two pictures at once; with self-attention as it is, and reused before the gate and behind it."""
    tgate = pytest.importorskip("tgate", reason="pip install --no-deps tgate==1.0.0")
    pipe, call = pipeline(name)
    call |= {"num_images_per_prompt": 2}
    plain = picture(pipe, call)
    for every, late, warm_up in ((1, 1, 2), (2, 1, 1), (3, 3, 0)):
        other, _ = pipeline(name)  # its forwards and caches stay on the U-Net
        getattr(tgate, loader)(other)
        dials = {"gate_step": 5, "sp_interval": every, "fi_interval": late, "warm_up": warm_up}
        theirs = other.tgate(**call, **dials, generator=torch.Generator().manual_seed(0)).images
        assert not torch.equal(theirs, plain)
        peer = peers.tgate(STEPS, 5, every, warm_up, "mean", late)
        assert torch.equal(planned(pipe, call, peer), theirs)
        assert not torch.equal(planned(pipe, call, peers.tgate(STEPS, 5, every, warm_up, "own", late)), theirs)
    with_words = tuple(replace(a, cfg_branch="cond") if a.cfg_branch != "both" else a for a in peer.actions)
    alike = torch.equal(planned(pipe, call, replace(peer, actions=with_words)), theirs)
    assert alike == (name == "text to image")  # SDXL's embedding of the other prompt, see `peers.tgate`


SIGMAS = [14.6, 8.0, 5.0, 3.0, 2.0, 1.2, 0.7, 0.4, 0.2, 0.05]
CHANGES = {"self": [[9.0, 9.0]] + [[0.1, 0.3]] * 9, "ff": [[9.0, 9.0]] + [[0.5, 0.9]] * 9}
EVERY = (
    peers.fewer_steps(10), peers.deep_cache(10, 3, 1), peers.tgate(10, 4, 2), peers.faster_diffusion(10),
    peers.tgate(10, 4, 2, 2, "mean", 3),
    peers.pyramid_attention(range(999, 0, -100), {"self": 2, "cross": 4}, 100, 800), peers.hurry(10, 4),
    peers.eliminated(10, ["ff"], 6, 9), peers.extrapolated(10, 3), peers.guidance_interval(SIGMAS, 0.3, 4.0),
    peers.adaptive_guidance(10, 6), peers.guidance_reuse(10, 2), peers.smooth_cache(CHANGES, 0.2),
    peers.block_wise({"mid_block.attentions.0.self": (0, 4), "mid_block.attentions.0.ff": (0, 6)}, 10),
)  # fmt: skip


@pytest.mark.parametrize("peer", EVERY, ids=lambda peer: peer.name)
def test_every_peer_is_a_plan_that_never_lacks_a_value(peer: peers.Peer) -> None:
    """By a run of its own: what a call takes was computed, and not longer ago than the plan allows."""
    actions = peer.along(SIGMAS)
    if actions is None:
        assert all(action == FULL for action in peer.actions)
    else:
        assert [level.action for level in actions.levels] == list(peer.actions)
    fresh: dict[str, list[int]] = {}
    for i, action in enumerate(peer.actions):
        for name, rule in action.sites:
            if rule != "skip":
                kind = name.rpartition(".")[2]
                known = fresh.get(name, fresh.get(kind, fresh.get("all", [])))
                assert i - known[-1] <= peer.max_gap
        if action.place:
            assert len(fresh["all"]) >= action.takes
            assert i - fresh["all"][-1] <= peer.max_gap
        ruled = {name for name, _ in action.sites}
        if action == FULL:
            fresh.setdefault("all", []).append(i)
            for values in fresh.values():
                values.append(i)
        elif action.sites:
            for name in ("self", "cross", "ff"):
                if not any(r.rpartition(".")[2] == name for r in ruled):
                    fresh.setdefault(name, list(fresh.get("all", []))).append(i)
            for name in fresh.keys() - ruled:
                if "." in name:
                    fresh[name].append(i)
            for name in ruled:
                fresh.setdefault(name, list(fresh.get("all", [])))
    assert len(peer) == 10
    assert not peer.guided or len(peer.guided) == 10


def test_the_rules_by_hand() -> None:
    assert peers.deep_cache(7, 3).text == "F11F11F"
    assert peers.extrapolated(9, 3, 1, 2).text == "FFFoFoFoF"
    assert peers.extrapolated(9, 2, 2, 3, 0).text == "FFhhFhhFF"
    assert peers.guidance_reuse(5, 2).text == "FGFGF"
    assert peers.adaptive_guidance(4, 2).text == "FFF.F."
    assert peers.guidance_interval([9.0, 3.0, 1.0, 0.2], 0.5, 3.0).guided == (False, True, True, False)
    assert peers.hurry(6, 2).actions[3:] == (FULL, *peers.by_vector([False, True]).actions[1:] * 2)
    keys = [i for i, action in enumerate(peers.faster_diffusion(50).actions) if action == FULL]
    assert keys == [0, 1, 2, 3, 5, 10, 15, 25, 35]
    skip = peers.eliminated(4, ["cross"], 1, 3).actions
    assert [action.sites for action in skip] == [(), (("cross", "skip"),), (("cross", "skip"),), ()]


def test_tgate_stores_self_attention_before_its_gate_and_freezes_cross_attention_after() -> None:
    peer = peers.tgate(10, 6, 3, 1)
    kinds = ["".join(kind[0] for kind, _ in action.sites) or "-" for action in peer.actions]
    assert "".join(kinds) == "--s-s-cccc"  # stored at 0, 1, 3 and, both, at 5
    assert peer.guided == (True,) * 6 + (False,) * 4
    late = peers.tgate(10, 6, 3, 1, late_interval=4)
    assert late.actions[:6] == peer.actions[:6]
    assert ["self" in dict(action.sites) for action in late.actions[6:]] == [True, True, False, True]
    mean = peers.tgate(10, 6, 3, 1, "mean")
    assert mean.actions == (*peer.actions[:6], *[Action("sites", sites=(("cross", "mean"),), cfg_branch="uncond")] * 4)
    assert mean.scales(4.0) == ()  # however it is guided, the one side comes out
    with pytest.raises(UserError, match=r"sides=middle: did you mean"):
        peers.tgate(10, 6, sides="middle")
    with pytest.raises(UserError, match=r"gate=11 is outside 1 \.\. 10"):
        peers.tgate(10, 11)


def test_smooth_cache_reuses_while_the_change_is_small() -> None:
    actions = peers.smooth_cache(CHANGES, 0.2).actions
    assert [dict(a.sites).keys() for a in actions[:5]] == [set(), {"self"}, set(), {"self"}, set()]
    longer = peers.smooth_cache(CHANGES, 0.3).actions
    assert [bool(a.sites) for a in longer[:7]] == [False, True, True, False, True, True, False]
    assert all(a == FULL for a in peers.smooth_cache(CHANGES, 0.01).actions)


def test_a_refreshed_feed_forward_refreshes_its_block() -> None:
    names = [f"mid_block.attentions.0.{kind}" for kind in ("self", "cross", "ff")]
    peer = peers.block_wise({names[0]: (0,), names[1]: (0, 2), names[2]: (0, 3)}, 5)
    reused = [{name for name, _ in action.sites} for action in peer.actions]
    assert reused == [set(), set(names), {names[0], names[2]}, set(), set(names)]


def test_phast_keeps_swaps_that_score_better() -> None:
    """The score wants call 2 reused: HURRY reuses 4 and 5, and one of them moves there."""
    found = peers.phast(6, 2, lambda peer: float(peer.actions[2] != FULL) - 0.1 * float(peer.actions[4] != FULL), 3)
    assert sum(action != FULL for action in found.actions) == 2
    assert found.actions[2] != FULL
    assert found.name == "PHAST"


def test_a_call_without_guidance_costs_half_the_rows() -> None:
    peer = peers.tgate(4, 2)
    cost = {FULL: 1.0, Action("sites", sites=(("cross", "reuse"),)): 0.9}
    assert peer.price(cost.__getitem__, 0.6) == pytest.approx(1 + 1 + 2 * 0.9 * 0.6)
    table = CostTable({}, {"G": 0.6}, 1.0, 1.0, (2, 4, 8, 8), True, "cpu", "float32", 1, {"cross": 0.1})
    by_itself = peers.tgate(4, 2, sides="mean")
    assert by_itself.price(table.of, 0.1) == pytest.approx(1 + 1 + 2 * 0.9 * 0.6)
    assert by_itself.price(replace(table, guided=False).of, 0.1) == pytest.approx(1 + 1 + 2 * 0.9)
    assert peer.scales(4.0) == (4.0, 4.0, peers.UNGUIDED, peers.UNGUIDED)
    assert Actions.along([3.0, 2.0, 1.0, 0.5], peer.actions, peer.max_gap).patterns == (FULL, peer.actions[2])
