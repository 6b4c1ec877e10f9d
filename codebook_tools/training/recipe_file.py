"""Recipe files: surgeries in order and the options that they share, in YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from inspect import signature
from pathlib import Path
from reprlib import repr as short
from typing import Any

from codebook_tools.codebook import Strategy
from codebook_tools.errors import CodebookError
from codebook_tools.runtime.safe_io import read_text
from codebook_tools.runtime.type_checks import check_kinds, kinds_of
from codebook_tools.strategies import find_strategy
from codebook_tools.training.finetune import FineTune

SURGERIES = "surgeries"
FINETUNE = "finetune"

_OF_RECIPE = {entry.name for entry in fields(FineTune)} - {"batch_size"}
_LONGEST = 256 << 10  # bytes: a parser of YAML takes a second for so many
_BY_THE_RUN = {"device", "watch"}  # fields of strategies that no recipe sets


@dataclass(frozen=True)
class Step:
    """One surgery of a chain.

    Attributes:
        command: As the command line has it.
        strategy: None fine-tunes the codebooks as they are.
        recipe: The fine-tuning after it; of 0 steps for none.
    """

    command: str
    strategy: Strategy | None
    recipe: FineTune


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it is read or written.

    Attributes:
        options: What all surgeries share, by the name of the command line's option, with underscores.
        surgeries: Each command and its own settings, in order.
    """

    options: Mapping[str, Any]
    surgeries: tuple[tuple[str, Mapping[str, Any]], ...]

    def text(self) -> str:
        """As YAML, in the order that a person would write it."""
        import yaml

        surgeries = [{command: dict(settings)} if settings else command for command, settings in self.surgeries]
        options = {name.replace("_", "-"): value for name, value in self.options.items()}
        written: str = yaml.safe_dump({**options, SURGERIES: surgeries}, sort_keys=False, allow_unicode=True)
        return written


def read_recipe(path: Path) -> RecipeFile:
    """Read a recipe.

    Raises:
        CodebookError: It cannot be read, or is no recipe.
    """
    import yaml

    try:
        content = _parsed(read_text(path, _LONGEST))
    except OSError as error:
        raise CodebookError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CodebookError(f"{path}: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise CodebookError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get(SURGERIES), list):
        raise CodebookError(f"{path} has no list of {SURGERIES}, such as `{SURGERIES}: [prune, {{refit: {{k: 128}}}}]`")
    options = {str(name).replace("-", "_"): value for name, value in content.items() if name != SURGERIES}
    return RecipeFile(options, tuple(_surgery(path, entry) for entry in content[SURGERIES]))


def _parsed(text: str) -> object:
    """As yaml.safe_load, but without aliases, of which a few lines can be gigabytes, and without duplicate keys."""
    import yaml

    loader = yaml.SafeLoader(text)
    root = loader.get_single_node()
    nodes, met = [root] if root else [], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in met:
            problem = "an anchor with an alias, which no recipe needs; write it out where it is meant"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        met.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        if isinstance(node, yaml.MappingNode):
            nodes += [child for pair in node.value for child in pair]
            names = set[str]()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in names:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
                names.add(key.value)
    return loader.construct_document(root) if root else None


def _surgery(path: Path, entry: object) -> tuple[str, Mapping[str, Any]]:
    """A command alone, or one with its settings."""
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, dict) and len(entry) == 1:
        ((command, settings),) = entry.items()
        if isinstance(command, str) and (settings is None or isinstance(settings, dict)):
            return command, {str(name).replace("-", "_"): value for name, value in (settings or {}).items()}
    raise CodebookError(f"{path}: {short(entry)} is no surgery; write `prune` or `refit: {{k: 128}}`")


def steps_of(recipe: RecipeFile, *, batch_size: int, seed: int) -> tuple[Step, ...]:
    """The surgeries as steps of a chain.

    A setting is of the strategy or of the fine-tuning after it, which has no steps unless they are set; `finetune`
    alone has 1,000.

    Raises:
        CodebookError: A setting is neither, or not of its type.
    """
    return tuple(_step(command, settings, batch_size, seed) for command, settings in recipe.surgeries)


def _step(command: str, settings: Mapping[str, Any], batch_size: int, seed: int) -> Step:
    make = None if command == FINETUNE else find_strategy(command)
    own = set(signature(make).parameters) - _BY_THE_RUN if make else set()
    unknown = set(settings) - own - _OF_RECIPE
    if unknown:
        known = ", ".join(sorted(own | _OF_RECIPE))
        raise CodebookError(f"{command} has no {', '.join(sorted(unknown))}; it has {known}")
    try:
        training = {name: value for name, value in settings.items() if name in _OF_RECIPE}
        check_kinds(command, training, kinds_of(FineTune))
        tuned = FineTune(**{"steps": 0 if make else FineTune.steps, "batch_size": batch_size, **training})
        if make is None:
            return Step(command, None, tuned)
        asked = {name: value for name, value in settings.items() if name in own}
        check_kinds(command, asked, kinds_of(make))
        return Step(command, make(**({"seed": seed} if "seed" in own else {}), **asked), tuned)
    except TypeError as error:
        raise CodebookError(f"{command} cannot be made of {short(dict(settings))}: {error}") from error


def without_nothing(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a recipe stores them: those that are set, of types that YAML has. 0 is set: no workers, say."""
    nothing = (value is None or value is False or value in ((), []) for value in options.values())
    return {name: _plain(options[name]) for name, empty in zip(options, nothing, strict=True) if not empty}


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(one) for one in value]
    return value
