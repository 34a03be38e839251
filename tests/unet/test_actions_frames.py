"""When a call takes from earlier ones, what it saves, keys and values of the text, and what actions cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.embedded import stock_pipeline
from helpers.small import inputs, make_tiny_unet
from torch import Tensor

from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.sampling.backprop import GradientPath, unroll
from rwopt.sampling.batched import sample_batched
from rwopt.sampling.course import course_by_rule
from rwopt.sampling.denoise import condition
from rwopt.sampling.sample import sample
from rwopt.schedule import Schedule
from rwopt.schedule.actions import FULL, Action, Actions, Level, by_letters
from rwopt.schedule.noise import noise_table
from rwopt.unet.actions import Acts, Frame, Known, Line, Past, Texts, axis
from rwopt.unet.actions_patterns import Patterns, Place
from rwopt.unet.apply import apply
from rwopt.unet.attachment import Attachment
from rwopt.unet.call import Columns
from rwopt.unet.cost import CostTable, cost_table
from rwopt.unet.peers import tgate
from rwopt.unet.sites import list_sites

SIGMAS = (8.0, 5.0, 3.0, 2.0, 1.2, 0.6)


def known(*sigmas: float) -> tuple[Known, ...]:
    return tuple(Known(s, i, (torch.tensor([3 * axis(s) + 1]),)) for i, s in enumerate(sigmas))


def test_order_1_is_exact_for_a_straight_line_in_the_root_of_sigma() -> None:
    level = Actions.along(SIGMAS, "FFoFFF").levels[2]
    line = Past(2, 5.0, {"output": known(8.0, 5.0)}).line("output", 1, 3.0, level, 2)
    assert line is not None
    torch.testing.assert_close(line.value(0), torch.tensor([3 * math.sqrt(3.0) + 1]))


def acts_of(letters: str | Sequence[Action]) -> Acts:
    return Acts(Patterns(make_tiny_unet(), ()), Actions.along(SIGMAS, letters))


def kinds(acts: Acts, sigmas: tuple[float, ...], guided: bool = True) -> str:
    """The letters of what calls at `sigmas` really do."""
    past, letters = Past(), ""
    for sigma in sigmas:
        past, frame = acts.frame(past, sigma, guided)
        letters += frame.pattern.action.letter
        for name in frame.keep:
            frame.take(Place(name), torch.ones(1))
        past = acts.after(past, frame, sigma)
    return letters


@pytest.mark.parametrize(("letters", "sigmas", "expected"), [
    ("FFoFaF", SIGMAS, "FFoFaF"),
    ("FFoFaF", SIGMAS[2:], "FFaF"),  # an edit: nothing is stored at first
    ("FFoFaF", SIGMAS[3:], "FFF"),  # one value makes no line
    ("FF1F1F", SIGMAS[2:], "FF1F"),
    ("FFo1FF", SIGMAS + SIGMAS, "FFo1FF" * 2),  # a new picture
    ("FF1F1F", (8.0, 5.0, 3.0, 8.0, 5.0, 3.0), "FF1FF1"),
    ("FF1F1F", (8.0, 5.0, 3.0, 3.0, 2.0, 2.0), "FF1FFF"),  # the second call at a level runs
    ("FFhhFF", (8.0, 3.0, 2.0), "FFh"),  # 8 over 3 is more than 1.1 times 5 over 3
    ("FFhhFF", (8.0, 5.0, 2.9, 2.8, 2.7, 2.6), "FFhhFh"),  # a finer grid: at most two calls of one value
])  # fmt: skip
def test_what_is_missing_or_stale_is_computed(letters: str, sigmas: tuple[float, ...], expected: str) -> None:
    assert kinds(acts_of(letters), sigmas) == expected


def test_without_guidance_its_difference_is_no_action() -> None:
    assert kinds(acts_of("FFGFgF"), SIGMAS) == "FFGFgF"
    assert kinds(acts_of("FFGFgF"), SIGMAS, guided=False) == "FFFFFF"


CROSS, MEAN = ("cross", "reuse"), ("cross", "mean")


def of_side(side: str, *rules: tuple[str, str]) -> Action:
    return Action("sites", sites=rules, cfg_branch=side)


def test_the_mean_is_over_the_sides_and_a_side_has_its_own_rows() -> None:
    level, rows = Level(1.0, of_side("uncond", MEAN), 9.0), torch.tensor([1.0, 2.0, 10.0, 40.0])
    past = Past(2, 2.0, {"a": (Known(4.0, 0, (rows,)), Known(2.0, 1, (rows[:2] + 1,), "uncond"))})
    whole = Past(1, 4.0, {"a": past.known["a"][:1]})

    def value(of: Past, order: int = 0, side: str = "both", mean: bool = False) -> list[float] | None:
        line = of.line("a", order, 1.0, level, 2, side, mean)
        return None if line is None else line.value(0).tolist()

    assert [value(whole, side=side) for side in ("uncond", "cond", "both")] == [[1, 2], [10, 40], [1, 2, 10, 40]]
    assert value(whole, side="uncond", mean=True) == [5.5, 21]
    assert [value(past, side="uncond", mean=mean) for mean in (False, True)] == [[2, 3]] * 2
    assert [value(past, side=side, mean=side == "cond") for side in ("cond", "both")] == [None, None]
    share = (axis(1.0) - axis(2.0)) / (axis(2.0) - axis(4.0))
    assert value(past, 1, "uncond") == pytest.approx([2 + share, 3 + share])
    assert value(past, 1, "cond") is None


@pytest.mark.parametrize(("sigmas", "guided", "expected"), [
    (SIGMAS, True, "FFmoFF"),
    (SIGMAS[2:], True, "FoFF"),  # an edit that starts behind the gate: with the words, and guided
    (SIGMAS, False, "FFxxFF"),  # all rows are of one side
    ((8.0, 5.0, 3.0, 3.0, 2.0), True, "FFmFo"),  # the second call at a level
])  # fmt: skip
def test_a_call_of_one_side_that_lacks_a_value_computes_both(
    sigmas: tuple[float, ...], guided: bool, expected: str
) -> None:
    mean, other = of_side("uncond", MEAN), of_side("cond", CROSS)
    got = kinds(acts_of([FULL, FULL, mean, other, FULL, FULL]), sigmas, guided)
    assert got.replace(mean.letter, "m").replace(other.letter, "o") == expected


def test_what_one_side_computed_is_not_given_to_the_other() -> None:
    """Self-attention is computed at the third call of one side's rows: those take it, the other side computes all."""
    rules = (("self", "reuse"), MEAN)
    plan = [FULL, FULL, of_side("uncond", MEAN), of_side("uncond", *rules), of_side("cond", *rules), FULL]
    assert [kinds(acts_of(plan), SIGMAS).count(action.letter) for action in plan[2:5]] == [1, 1, 0]


def test_weights_and_text_of_one_side() -> None:
    patterns, table = Patterns(make_tiny_unet(), ()), torch.tensor([[1.0], [2.0]])
    for side, row in (("uncond", 1.0), ("cond", 2.0)):
        weights = Frame(patterns[of_side(side, MEAN)]).weighed(Columns(table)).table()
        assert weights is not None
        assert weights.tolist() == [[row]]
    texts, text = Texts(vouched=True), torch.ones(2, 3)
    texts.put("to_k", text, table, "cond")
    assert texts.get("to_k", text.clone(), "cond") is table
    assert texts.get("to_k", text, "uncond") is None


def test_a_store_holds_no_more_than_two_values_and_nothing_at_the_end() -> None:
    acts, past, most = acts_of("FFFoFF"), Past(), 0
    for sigma in SIGMAS:
        past, frame = acts.frame(past, sigma, guided=False)
        for name in frame.keep:
            frame.take(Place(name), torch.ones(1))
        past = acts.after(past, frame, sigma)
        most = max(most, sum(map(len, past.known.values())))
    assert most == 2
    assert not past.known


def counted(unet: Any) -> dict[str, int]:
    """How often each leaf's forward really runs."""
    counts: dict[str, int] = {}
    for path, module in unet.named_modules():
        if not list(module.children()):
            def forward(*args: Any, m: Any = module, p: str = path, **kwargs: Any) -> Any:
                counts[p] = counts.get(p, 0) + 1
                return type(m).forward(m, *args, **kwargs)

            module.forward = forward
    return counts


@pytest.mark.parametrize(("action", "left"), [("1", ("conv_in", "up_blocks.2.resnets.1", "up_blocks.2.attentions.1")),
                                              ("o", ()), ("N", ("mid_block", "up_blocks"))])  # fmt: skip
def test_compute_is_really_saved(action: str, left: tuple[str, ...]) -> None:
    """Convolutions and linear layers that a cheap call runs: only those of the parts named (and of the timestep)."""
    unet = make_tiny_unet()
    counts = counted(unet)
    x, t, text = inputs()
    with Attachment(unet, ()) as attachment, torch.no_grad():
        acts, past = attachment.acts(Actions.along(SIGMAS[:3], f"FF{action}")), Past()
        for sigma in SIGMAS[:3]:
            counts.clear()
            past, frame = acts.frame(past, sigma, guided=True)
            attachment.with_frame(frame)(x, t, text)
            past = acts.after(past, frame, sigma)
    ends = ("conv_norm_out", "conv_out", "conv_act", *left) if left else ("conv_act",)
    allowed = (*ends, "time_")
    assert counts
    assert all(path.startswith(allowed) for path in counts), counts
    assert all(any(path.startswith(part) for path in counts) for part in left)


def test_keys_and_values_are_made_once_and_change_no_bit(avatars: Model) -> None:
    course = course_by_rule(avatars, 3)
    cond = condition(avatars, ["a face", "a hat"], 3.0)
    x = torch.randn(2, *avatars.latent_shape, generator=torch.Generator().manual_seed(0))
    keys = [p for p in dict(avatars.unet.named_modules()) if p.endswith(("attn2.to_k", "attn2.to_v"))]
    with Attachment(avatars.unet, ()) as attachment:
        plain = sample(avatars, attachment, x, cond, course)
        counts = counted_layers(avatars.unet, keys)
        again = sample(avatars, attachment, x, cond, course)
        assert set(counts.values()) == {1}
        assert len(counts) == len(keys)
        other = sample(avatars, attachment, x, condition(avatars, ["a man", "a hat"], 3.0), course)
    restore(avatars.unet, keys)
    assert torch.equal(plain, again)
    assert not torch.equal(plain, other)
    stock = avatars.unet(torch.cat([x, x]), 999, torch.cat([cond.negative, cond.positive])).sample
    with Attachment(avatars.unet, ()) as attachment, torch.no_grad():
        acts = attachment.acts(None, texts=True)
        _, frame = acts.frame(Past(), 1.0, guided=True)
        text = torch.cat([cond.negative, cond.positive])
        assert torch.equal(attachment.with_frame(frame)(torch.cat([x, x]), 999, text), stock)


def counted_layers(unet: Any, paths: list[str]) -> dict[str, int]:
    """Counts of the layers' own work, under whatever stands in their forward."""
    counts: dict[str, int] = {}
    for path in paths:
        actor = unet.get_submodule(path).__dict__["forward"]

        def before(x: Tensor, p: str = path, m: Any = actor.module) -> Tensor:
            counts[p] = counts.get(p, 0) + 1
            return type(m).forward(m, x)

        actor.before = before
    return counts


def restore(unet: Any, paths: list[str]) -> None:
    for path in paths:
        unet.get_submodule(path).__dict__.pop("forward", None)


@pytest.mark.parametrize("letters", ["FFoaF", "FFgNF", tgate(5, 2, sides="mean", late_interval=2).actions],
                         ids=lambda of: of if isinstance(of, str) else "T-GATE")  # fmt: skip
def test_a_search_runs_actions_in_its_loops(avatars: Model, letters: str | Sequence[Action]) -> None:
    """One loop as the other: a picture alone, several candidates in one batch, and with gradient."""
    course = course_by_rule(avatars, 5)
    cond = condition(avatars, ["a face"], 3.0)
    x = torch.randn(1, *avatars.latent_shape, generator=torch.Generator().manual_seed(0))
    ids = [site.id for site in list_sites(avatars.unet)]
    actions = Actions.along(course.sigmas, letters, max_gap=3)
    rows = [torch.linspace(a, 1.1, len(ids)) for a in (0.9, 1.2)]
    with Attachment(avatars.unet, ids) as attachment:
        before = avatars.calls
        alone = [sample(avatars, attachment, x, cond, course, lambda _, r=r: r, actions=actions) for r in rows]
        assert avatars.calls - before == 2 * (5 - actions.text.count("o") * (letters == "FFoaF"))  # stored: no call
        plain = sample(avatars, attachment, x, cond, course, lambda _: rows[0])
        assert (alone[0] - plain).abs().max() > 1e-4
        two = sample_batched(avatars, attachment, x, cond, course, [(3.0, lambda _, r=r: r) for r in rows], 8, actions)
        for one, other in zip(alone, two, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        gradients = []
        for checkpointing in ("auto", "on"):  # activations kept; steps and blocks run again
            avatars.checkpointing, kept = checkpointing, avatars.checkpointing
            w = rows[0].clone().requires_grad_()
            end = unroll(avatars, attachment, x, cond, course, lambda _, w=w: w, GradientPath("full"), actions=actions)
            avatars.checkpointing = kept
            torch.testing.assert_close(end, alone[0], rtol=1e-4, atol=1e-4)
            gradients.append(torch.autograd.grad(end.square().sum(), w)[0])
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=1e-3)
        assert gradients[0].abs().min() > 0


def test_a_loop_of_ones_own_makes_the_pictures_of_the_stock_pipeline_behind_the_gate(avatars: Model) -> None:
    stock = stock_pipeline(avatars)
    course, prompts = course_by_rule(avatars, 5), ["a face", "a hat"]
    x = torch.randn(2, *avatars.latent_shape, generator=torch.Generator().manual_seed(0))
    actions = tgate(5, 2, sides="mean", late_interval=2).along(course.sigmas)
    with apply(stock, Schedule.constant([s.id for s in list_sites(avatars.unet)], [1.0], actions=actions)):
        expected = stock(prompts, num_inference_steps=5, guidance_scale=4.0, latents=x.clone(), output_type="latent")
    with Attachment(avatars.unet, ()) as attachment:
        cond = condition(avatars, prompts, 4.0)
        got = sample(avatars, attachment, x, cond, course, actions=actions)
        assert (got - sample(avatars, attachment, x, cond, course)).abs().max() > 1e-2
    torch.testing.assert_close(got, expected.images, rtol=1e-3, atol=1e-3)


def test_a_bare_unet_needs_no_pipeline_but_for_guidance() -> None:
    unet = make_tiny_unet()
    ids = [site.id for site in list_sites(unet)]
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
    x, _, text = inputs()
    times = [900, 800, 700, 600]
    plan = Actions.along(noise_table(noise)[times], "FFhF")
    with apply(unet, Schedule.constant(ids, [1.0], noise=noise, actions=plan)):
        outs = [unet(x, t, text).sample for t in times]
        assert torch.equal(outs[2], outs[1])
        assert not torch.equal(outs[3], outs[2])
        for t in times[:2]:
            unet(x, t, text)
        other = text.clone()  # the other half of split guidance, or another picture
        assert not torch.equal(unet(x, 700, other).sample, outs[1])
        assert torch.equal(unet(x, 700, text).sample, outs[1])
    with pytest.raises(UserError, match="order of guidance"):
        apply(unet, Schedule.constant(ids, [1.0], noise=noise, actions=Actions.along(SIGMAS, "FFgFFF")))
    assert not [m for m in unet.modules() if "forward" in m.__dict__]


def test_a_cost_table_prices_plans(tmp_path: Any) -> None:
    unet = make_tiny_unet()
    x, _, text = inputs()
    alone = of_side("uncond", MEAN)
    letters = [*by_letters("14GNx"), Action("sites", sites=(("ff", "reuse"),)), alone]
    table = cost_table(unet, x.shape, {"encoder_hidden_states": text}, actions=letters, rounds=3)
    assert CostTable.from_json(table.to_json()) == table
    assert 0 < table.operations["1"] < table.operations["4"] < 1
    assert table.operations["G"] == pytest.approx(0.5)
    assert table.price(by_letters("FFoh")) == 2
    assert table.price(by_letters("Fa1")) == pytest.approx(1 + 2 * table.time["1"])
    assert table.operations[of_side("cond", CROSS).letter] == pytest.approx(table.operations["x"] / 2)
    assert table.of(alone) == table.of(of_side("cond", CROSS)) == table.time[of_side("cond", CROSS).letter]
    pair = (1 - table.sites["cross"] - table.sites["ff"]) * table.time["G"]
    assert table.of(of_side("cond", MEAN, ("ff", "reuse"))) == pytest.approx(pair)
    both = Action("sites", sites=(("cross", "extrapolate"), ("ff", "reuse")))
    assert table.of(both) == pytest.approx(1 - table.sites["cross"] - table.sites["ff"])
    with pytest.raises(UserError, match="not measured"):
        table.of(Action("cut", 2))
    with pytest.raises(UserError, match="no cost table"):
        CostTable.from_json({"shape": [1]})


def test_a_line_without_an_old_value_is_the_value_itself() -> None:
    value = torch.randn(3)
    assert Line((value,)).value(0) is value
    assert FULL.place == ""
