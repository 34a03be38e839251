"""README and docs hold: tables are what the result files say, links lead somewhere, every block of code is right."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from itertools import pairwise
from pathlib import Path
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, LMSDiscreteScheduler
from optuna.storages import InMemoryStorage

import rwopt
from rwopt import config, export
from rwopt.cli import parser as cli
from rwopt.cli.runs import split_settings
from rwopt.config.settings import ProbeSettings, Settings
from rwopt.errors import UserError
from rwopt.models import Model
from rwopt.probes import PROBES
from rwopt.schedule import Schedule
from rwopt.schedule.samplers import Sampler
from rwopt.tuners.options import GradientOptions
from rwopt.tuners.optuna import OptunaTuner
from rwopt.tuners.samplers import choose_sampler
from rwopt.unet.sites import list_sites

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "data/README.md", "training/README.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
"""What the site shows, by its path in the repository."""

# --- tables and defaults

# result file, benchmark that prints it, page, its place there
TABLES = [("editing", "comparison", "docs/results.md", "editing"),
          ("generation", "comparison", "docs/results.md", "generation"),
          ("probes", "probes", "docs/probes.md", "probes"), ("snr", "snr", "docs/probes.md", "snr"),
          ("tuners", "tuners", "docs/tuners.md", "tuners"), ("variants", "variants", "docs/tuners.md", "variants"),
          ("overhead", "overhead", "docs/apply.md", "overhead"), ("hooks", "hooks", "docs/apply.md", "hooks"),
          ("memory", "memory", "docs/tuners.md", "memory"), ("gpu", "gpu", "docs/apply.md", "gpu"),
          ("few_steps", "few_steps_tables", "docs/few-steps.md", "few_steps"),
          ("few-steps-editing", "comparison", "docs/few-steps.md", "few-steps-editing"),
          ("few_steps", "few_steps_tables.carry_markdown", "docs/few-steps.md", "carry"),
          ("few_steps", "few_steps_tables.short", "README.md", "few-steps"),
          ("few_steps-emoji", "few_steps_tables", "docs/emoji.md", "few_steps-emoji"),
          ("probes-emoji", "probes", "docs/emoji.md", "probes-emoji"),
          ("editing-emoji", "comparison", "docs/emoji.md", "editing-emoji"),
          ("speed-emoji", "speed_tables", "docs/emoji.md", "speed-emoji"),
          ("speed-emoji", "speed_tables.stage_table", "docs/emoji.md", "stages-emoji"),
          ("across", "across", "docs/emoji.md", "across"),
          ("few_steps-emoji", "few_steps_tables.carry_markdown", "docs/emoji.md", "carry-emoji"),
          ("speed", "speed_tables", "docs/speed.md", "speed"),
          ("action_cost", "action_cost", "docs/speed.md", "action_cost"),
          ("speed", "speed_tables.stage_table", "docs/speed.md", "stages")]  # fmt: skip
"""Result file, module with its table (and which function, if not `markdown`), page, place."""


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def between(page: str, place: str) -> str:
    found = re.search(rf"<!-- {place} -->\n(.*?)\n<!-- /{place} -->", text_of(page), re.DOTALL)
    assert found is not None, f"{page} lacks <!-- {place} -->"
    return found[1]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module
    for name in {module.partition(".")[0] for _, module, _, _ in TABLES}:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("name", "module", "page", "place"), TABLES)
def test_a_table_is_its_result_file(benchmark: Any, name: str, module: str, page: str, place: str) -> None:
    module, _, function = module.partition(".")
    assert between(page, place) == getattr(benchmark(module), function or "markdown")(result(name))


def test_both_models_findings_are_their_result_files(benchmark: Any) -> None:
    assert between("docs/emoji.md", "findings") == benchmark("across").findings()


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_small_table_is_a_part_of_the_long_one(benchmark: Any) -> None:
    """README's rows and columns, cell by cell; under them the same line on cases, seeds and the command."""
    long = benchmark("comparison").markdown(result("editing")).split("\n")
    heads = [cells(row) for row in long if row.startswith("| difference")]
    rows = {cells(row)[0]: dict(zip(heads[0], cells(row), strict=True)) for row in long if " − " in row}
    head, _, *short, gap, note = between("README.md", "short").split("\n")
    columns = cells(head)
    assert columns == [columns[0], "objective", "judge.objective", "judge.success_accuracy", "truth.psnr"]
    assert [cells(row)[0] for row in short] == [
        f"learned − {other}" for other in ("plain", "best guidance", "analytic", "constant")
    ]
    for row in short:
        assert cells(row)[1:] == [rows[cells(row)[0]][column] for column in columns[1:]]
    assert (gap, note) == ("", long[-1])


def test_the_default_tuner_is_the_one_that_won() -> None:
    found = result("tuners")
    assert found["default"] == f"gradient {GradientOptions().mode}"
    ends = {s["tuner"]: s["gain"] for s in found["starts"] if s["task"] == "editing" and "gradient full" in s["tuner"]}
    assert max(ends, key=ends.__getitem__) == "gradient full from gauss_newton"  # what `probe.start=auto` takes
    assert found["without_gradient"] == {"table": "spsa", "9 numbers": f"{choose_sampler('auto', 9, 40)}, 9 numbers"}


def test_the_default_probe_is_the_one_that_won() -> None:
    assert result("probes")["default"].partition(",")[0] == ProbeSettings().name


def test_readme_is_short() -> None:
    assert len(text_of("README.md").split("\n")) - 1 <= 110


# --- links

FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r'\]\(([^)\s]+)\)|src="([^"]+)"')


def text_of(page: str | Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str | Path) -> str:
    """Without blocks of code."""
    return FENCE.sub("", text_of(page))


def anchors(page: str | Path) -> set[str]:
    """What GitHub makes of headings, and mkdocs.yml asks for as well."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page: str) -> None:
    for link in (a or b for a, b in LINK.findall(re.sub(r"`[^`\n]+`", "", prose(page)))):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert target.resolve().is_relative_to(ROOT), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_lists_and_tables_have_room() -> None:
    """GitHub takes them right under a line of text, the site does not."""
    for page in PAGES:
        for above, line in pairwise(prose(page).split("\n")):
            starts = re.match(r"- |\d+\. |\|", line) and above and not above.startswith(("#", "<!--"))
            assert not starts or re.match(r"\s|- |\d+\. |\|", above), f"{page}: an empty line before {line[:40]!r}"


def test_what_the_text_names_exists() -> None:
    """Names, files, verbs and settings in `code`, wherever they stand."""
    groups = {name for name, value in vars(Settings()).items() if is_dataclass(value)}
    verbs = next(a.choices for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    for page in PAGES:
        for code in re.findall(r"`([^`\n]+)`", prose(page)):
            where = f"{page}: {code}"
            name = re.match(r"(rwopt(?:\.\w+)+)", code)
            if name:
                resolve_name(name[1])
            if re.fullmatch(r"(rwopt|tests|benchmarks|recipes|data|docs)/[\w/.]*", code):
                assert (ROOT / code).exists(), where
            if re.match(r"rwopt \w", code):
                assert code.split()[1] in verbs, where
            if re.match(r"python \w+/", code):
                assert (ROOT / code.split()[1]).exists(), where
            for group, key in re.findall(rf"(?<![\w./])({'|'.join(groups)})\.(\w+)\b(?!/)", code):
                assert "/" in code or hasattr(getattr(Settings(), group), key), where


# --- blocks of code


def blocks(page: str) -> Iterator[tuple[str, str, str]]:
    """(language, title, code)."""
    for language, info, code in FENCE.findall(text_of(page)):
        title = re.search(r'title="([^"]+)"', info)
        yield language, title[1] if title else "", code


def test_every_block_has_a_language_that_is_checked() -> None:
    for page in PAGES:
        assert text_of(page).count("\n```") == 2 * len(list(blocks(page))), page
        assert {language for language, _, _ in blocks(page)} <= {"python", "sh", "json", "yaml"}, page


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_right(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    checks = {"python": check_python, "sh": check_shell, "json": check_json, "yaml": check_yaml}
    for language, title, code in blocks(page):
        checks[language](code, title or page)


def check_python(code: str, where: str) -> None:
    """It compiles, and every name of the package in it exists."""
    tree = ast.parse(compile_only(code, where))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rwopt":
            for alias in node.names:
                resolve_name(f"{node.module}.{alias.name}")  # also of modules that nobody has imported yet
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if re.fullmatch(r"rwopt(\.\w+)+", name):
                resolve_name(name)


def compile_only(code: str, where: str) -> str:
    compile(code, where, "exec")
    return code


def check_json(code: str, where: str) -> None:
    Schedule.from_dict(json.loads(code))


def check_yaml(code: str, where: str) -> None:
    assert isinstance(yaml.safe_load(code), dict), where
    config.parse(code, where)


def check_shell(code: str, where: str) -> None:
    for line in code.replace("\\\n", " ").split("\n"):
        words = shlex.split(line, comments=True)
        if words:
            check_command([words[0].rpartition("/")[2], *words[1:]], f"{where}: {line}")


def check_command(words: list[str], where: str) -> None:
    program, *rest = words
    if program == "rwopt":
        check_verb(rest, where)
    elif program == "make":
        targets = re.findall(r"^(\w+):", text_of("Makefile"), re.MULTILINE)
        assert all(word in targets or "=" in word for word in rest), where
    elif program == "python":
        assert (ROOT / rest[0]).exists(), where
    else:
        assert program in ("pip", "optuna-dashboard"), f"{where}: nobody checks what {program} does"


def check_verb(words: list[str], where: str) -> None:
    args = cli.parse(words)
    if args.verb in ("search", "probe"):
        recipe, resume, settings = split_settings(args.settings)
        assert recipe or resume, where
        config.load(recipe or "editing", settings)
    elif args.verb == "compare":
        config.load(args.recipe, args.set)
    elif args.verb == "worker":
        settings = [s for s in args.settings if not s.startswith("storage=")]
        assert all(s.startswith("model.") for s in settings), where
        config.load("editing", settings)


@pytest.mark.parametrize(
    ("language", "code", "error"),
    [("python", "import rwopt\nrwopt.aply(None, None)", AttributeError),
     ("python", "from rwopt.probes import Prob", AttributeError), ("python", "x = (", SyntaxError),
     ("sh", "rwopt search recipe=editing tuner.together=4", UserError), ("sh", "rwopt find x", SystemExit),
     ("sh", ".venv/bin/rwopt show", SystemExit), ("sh", "make tests", AssertionError),
     ("sh", "python benchmarks/edit.py --seeds 5", AssertionError), ("sh", "curl x", AssertionError),
     ("json", '{"format": "rwopt.schedule"}', UserError), ("yaml", "tuner: {together: 2}", UserError)],
)  # fmt: skip
def test_the_checks_find_mistakes(language: str, code: str, error: type[BaseException]) -> None:
    checks = {"python": check_python, "sh": check_shell, "json": check_json, "yaml": check_yaml}
    with pytest.raises(error):
        checks[language](code, "here")


# --- the site


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = built.stdout + built.stderr
    assert built.returncode == 0, said
    assert not re.search("warning|error", said, re.IGNORECASE), said
    api = (tmp_path / "site" / "api.html").read_text()
    assert all(f'id="rwopt.{name}"' in api for name in rwopt.__all__)
    for page in (tmp_path / "site").glob("*.html"):
        elsewhere = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//[^"]*', page.read_text())
        assert not elsewhere, page.name


# --- how to add: the examples of that page, each in its place and run by the suite that it must pass


def suite(path: str) -> ModuleType:
    """A test module of its own, so that what an example changes in it stays here."""
    spec = importlib.util.spec_from_file_location(f"docs_{Path(path).stem}", ROOT / "tests" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`example("rwopt.probes.slope")`: the block of that file as a module."""

    def make(name: str) -> ModuleType:
        title = f"{name.replace('.', '/')}.py"
        (code,) = (code for _, found, code in blocks("docs/how-to-add.md") if found == title)
        module = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(code, title, "exec"), module.__dict__)
        return module

    return make


@pytest.fixture
def model(tiny_unet: Any) -> Model:
    scheduler = DDIMScheduler(prediction_type="v_prediction")  # type: ignore[no-untyped-call]
    return Model("tiny", tiny_unet, None, None, None, scheduler, torch.device("cpu"))


def test_how_to_add_shows_new_files_only() -> None:
    titles = [title for _, title, _ in blocks("docs/how-to-add.md")]
    assert len(titles) == 5
    assert not any((ROOT / title).exists() for title in titles)


@pytest.mark.parametrize("guided", [True, False])
def test_the_example_probe(
    example: Any, model: Model, guided: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    example("rwopt.probes.slope")
    contract = suite("probes/test_probes.py")
    monkeypatch.setitem(PROBES, "slope", "rwopt.probes.slope:Slope")
    contract.SMALL["slope"], contract.PRICE["slope"] = {}, contract.K * (1 + 2 * contract.S)
    contract.test_contract("slope", None, guided, model, tmp_path)


def test_the_example_objective(example: Any) -> None:
    module, contract = example("rwopt.objectives.colour"), suite("objectives/test_objectives.py")
    contract.make_objective = module.make
    pictures, n = contract.pictures, contract.N
    for name in module.specs():
        for method in methods(contract.TestContract):
            known = contract.Batch(
                pictures(1), pictures(2), pictures(3), pictures(4), contract.latents(5), contract.latents(6), ["a"] * n,
                [{}] * n, [[]] * n, [[]] * n,
            )  # fmt: skip
            getattr(contract.TestContract(), method)(name, known)


def methods(tests: type) -> list[str]:
    found = [name for name in vars(tests) if name.startswith("test_")]
    assert len(found) > 4
    return found


def test_the_example_tuner(example: Any, tmp_path: Path) -> None:
    climb, contract = example("rwopt.tuners.climb").ClimbTuner, suite("tuners/test_tuners.py")

    def maker(folder: Path) -> Any:
        def make(kind: str = "climb", **changes: Any) -> Any:
            options = {"study": "s", "space": contract.BOX, "seed": 3, "starts": contract.STARTS, "fingerprint": "f"}
            options |= changes
            if kind == "climb":
                return climb(folder=folder, **options)
            return OptunaTuner(storage=InMemoryStorage(), trials=10, sampler=kind, **options)

        return make

    ran = 0
    for i, method in enumerate(methods(contract.TestContract)):
        test = getattr(contract.TestContract(), method)
        given = inspect.signature(test).parameters
        if "make" in given:
            for case in [{"done": done} for done in (0, 1, 3)] if "done" in given else [{}]:
                test(make=maker(tmp_path / f"{i} {case}"), sampler="climb", **case)
                ran += 1
    assert ran >= 8
    contract.test_models_beat_random_search_on_a_quadratic(maker(tmp_path / "quadratic"), "climb")

    loop = suite("tuners/test_loop.py")
    for test in (
        loop.test_every_trial_is_told_once_also_those_of_before,
        loop.test_what_fails_is_replaced_until_it_is_too_much,
    ):
        test(lambda name=test.__name__: climb("s", loop.BOX, tmp_path / name, 0, loop.STARTS, "f"))


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_the_example_sampler(example: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contract = suite("sampling/test_solvers.py")
    monkeypatch.setitem(contract.SOLVERS, "lms", example("rwopt.sampling.lms").lms)
    monkeypatch.setitem(contract.SAMPLERS, "lms", Sampler("LMSDiscreteScheduler", whole=False, scaled=True))

    class Second(LMSDiscreteScheduler):  # type: ignore[misc, no-untyped-call]
        def step(self, *args: Any) -> Any:
            return super().step(*args, order=2)  # type: ignore[no-untyped-call]

    stock = Second(**contract.SD, prediction_type=kind)  # type: ignore[no-untyped-call]
    stock.set_timesteps(8)
    contract.agrees("lms", stock, kind, 2e-3)  # stock integrates its coefficients numerically, to 1e-4
    contract.test_order_of_convergence("lms", 2)
    contract.test_gradient_of_the_levels_equals_finite_differences("lms")


def test_the_example_export(example: Any, tiny_unet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = example("rwopt.export.spreadsheet")
    monkeypatch.setitem(export.TARGETS, "spreadsheet", "rwopt.export.spreadsheet")
    sites = [site.id for site in list_sites(tiny_unet)]
    weights = np.random.default_rng(0).uniform(0.5, 1.5, (3, len(sites)))
    schedule = Schedule(tuple(sites), np.array([14.6, 1.6, 1 / 3]), weights)
    (path,) = export.export(schedule, "spreadsheet", tmp_path / "table.csv")
    assert path.read_text().split("\n")[1].startswith("down_blocks.0.attentions.0,")
    again = room.read(path)
    assert again == schedule
    assert (again.weights == schedule.weights).all()
    with pytest.raises(UserError, match="interp=previous"):
        room.export(Schedule(tuple(sites), [1.0], weights[:1], interp="previous"), tmp_path / "other.csv")
