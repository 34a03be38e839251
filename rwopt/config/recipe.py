"""From a recipe (YAML) and `key=value` overrides to `Settings`, or one clear error.

Composition is OmegaConf's: groups, the recipe over them, both over defaults, overrides over all. Unknown keys are
refused with the nearest valid one, values are converted to the declared types, ranges are checked by the dataclasses.
Nothing behind this module sees OmegaConf.
"""

from __future__ import annotations

import difflib
import fnmatch
import io
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from rwopt.config.groups import FREE, groups, heading, is_choice, merged, read_group
from rwopt.config.settings import Settings
from rwopt.errors import UserError
from rwopt.files import package_folder


def recipes() -> dict[str, tuple[Path, str]]:
    """Recipes that ship with the package: name -> (file, first comment line)."""
    return {path.stem: (path, heading(path)) for path in sorted(package_folder("recipes").glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """A recipe by name, or a path to one's own."""
    known = recipes()
    if name in known:
        return known[name][0]
    path = Path(name)
    if path.is_file():
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(f"recipe={name}: a recipe file's name ends in .yaml")
        return path
    near = difflib.get_close_matches(path.stem, list(known), 1, 0)
    remedy = f"did you mean {near[0]}? (or the path of a .yaml file)" if near else "give the path of a .yaml file"
    raise UserError(f"recipe={name} is neither a file nor one of {', '.join(known)}: {remedy}")


def load(recipe: str, overrides: Sequence[str] = ()) -> Settings:
    """Settings of a recipe with `key=value` overrides. Raises `UserError` for a key, type or range that is wrong."""
    path = find_recipe(recipe)
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return parse(text, str(path), overrides)


def parse(text: str, where: str, overrides: Sequence[str] = ()) -> Settings:
    """`load` of a recipe's text; errors name it as `where`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    place = where
    try:
        whole = _composed(OmegaConf.load(io.StringIO(text)), where, [o for o in overrides if is_choice(o)])
        config = OmegaConf.merge(OmegaConf.structured(Settings), _known(whole, where))
        for place in (o for o in overrides if not is_choice(o)):
            if not _dropped(config, place):
                config.merge_with(_known(OmegaConf.create(_nested(place)), place))  # `merge` would copy all each time
        place = where
        settings = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{place}: {f'{key}: ' if key else ''}{str(error).splitlines()[0]}") from None
    except UserError:
        raise
    except Exception as error:  # YAML syntax: the parser's own classes
        raise UserError(f"{place} cannot be read: {' '.join(str(error).split())}") from None
    assert isinstance(settings, Settings)
    if not settings.objective.terms:
        raise UserError(f"{where}: objective.terms is empty: name at least one objective")
    return settings


def _composed(config: Any, where: str, choices: Sequence[str]) -> Any:
    """A recipe with the groups that it is made of under it, and those that were chosen over it."""
    from omegaconf import OmegaConf

    if config is None or not hasattr(config, "keys"):
        return config
    own = OmegaConf.to_container(config)
    assert isinstance(own, dict)
    use = own.pop("use", [])
    if not isinstance(use, list) or not all(isinstance(name, str) for name in use):
        raise UserError(f"{where}: use is a list of groups, as [model/sdxl, budget/card-8gb]")
    whole: dict[str, Any] = {}
    for part in (*(read_group(name, where) for name in use), {str(key): value for key, value in own.items()}):
        whole = merged(whole, part)
    for choice in choices:
        whole = merged(whole, read_group(choice.replace("=", "/", 1), choice))
    return OmegaConf.create(whole)


def to_yaml(settings: Settings) -> str:
    """The resolved recipe, which `load` reads again."""
    from omegaconf import OmegaConf

    return str(OmegaConf.to_yaml(OmegaConf.structured(settings)))


def read_value(text: str) -> Any:
    """What stands behind key=, as YAML has it: numbers, true, [1, 2], text."""
    from omegaconf import OmegaConf

    value = OmegaConf.from_dotlist([f"value={text}"])["value"]
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _nested(item: str) -> dict[str, Any]:
    """An override as nested mappings. In a mapping of free names the rest is one name: objective.terms.judge.kept=2."""
    key, sign, text = item.partition("=")
    parts = key.split(".")
    if not sign or not all(parts):
        raise UserError(f"override {item!r} is not key=value, for example tuner.trials=80")
    node: Any = Settings()
    for depth, part in enumerate(parts):
        if isinstance(node, dict):
            parts[depth:] = [".".join(parts[depth:])]
            break
        node = getattr(node, part, None)
    value: Any = text if isinstance(node, str) else read_value(text)
    for part in reversed(parts):
        value = {part: value}
    return dict(value)


def _dropped(config: Any, item: str) -> bool:
    """Whether an override drops entries of a mapping of free names, as objective.report.face.*=null: done in place."""
    node, path, inner = config, "", _nested(item)
    while isinstance(inner, dict):
        ((name, inner),) = inner.items()
        if inner is None and path in FREE:
            found = [known for known in node if fnmatch.fnmatchcase(known, name)]
            if not found:
                raise UserError(f"{item}: {path[:-1]} has no {name}: choose from {', '.join(node) or 'nothing'}")
            for known in found:
                del node[known]
            return True
        if not isinstance(inner, dict) or name not in node:
            return False
        node, path = node[name], f"{path}{name}."
    return False


def _known(config: Any, where: str) -> Any:
    """The same config, after every key was found in the dataclasses."""

    def walk(node: Any, schema: Any, prefix: str) -> None:
        names = [f.name for f in fields(schema)]
        for key in node:
            if key not in names:
                near = difflib.get_close_matches(str(key), names, 1, 0)
                raise UserError(f"{where}: key {prefix}{key} is unknown: did you mean {prefix}{near[0]}?")
            default, child = getattr(schema(), str(key)), node[key]
            if is_dataclass(default):
                if not hasattr(child, "keys"):
                    example = f"{prefix}{key}.{fields(default)[0].name}=..."
                    parts = [name.partition("/")[2] for name in groups() if name.startswith(f"{key}/")]
                    remedy = f"set one of its keys, as {example}" + f", or choose {', '.join(parts)}" * bool(parts)
                    raise UserError(f"{where}: {prefix}{key} is a group: {remedy}")
                walk(child, type(default), f"{prefix}{key}.")
            elif isinstance(default, str) and isinstance(child, bool):
                node[key] = "on" if child else "off"  # what YAML takes for a boolean was meant as a word

    if config is None or not hasattr(config, "keys"):
        raise UserError(f"{where}: a recipe is a mapping of keys to values")
    walk(config, Settings, "")
    return config
