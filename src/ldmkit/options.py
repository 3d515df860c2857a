"""A config class as command-line options, and what was typed as a config again.

Typer builds its options from a function's signature, so one is made: a parameter for each leaf of
the config, without default, so that what was typed can be told from what was not. Precedence: the
field's default < `--preset` < `--config FILE` < what was typed.
"""

import difflib
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import typer
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ldmkit.configfile import config_state, read_toml
from ldmkit.errors import DataError, UsageError
from ldmkit.fields import Config
from ldmkit.named_settings import PRESETS
from ldmkit.terminal import say

AnyConfig = TypeVar("AnyConfig", bound=Config)
NESTING = "__"  # between the parts of a nested parameter's Python name


class Leaf(NamedTuple):
    """One field that is an option."""

    path: tuple[str, ...]
    info: FieldInfo

    @property
    def option(self) -> str:
        """As typed: `--unet.attention-factors`; `from_` of Python is `--from`."""
        return "--" + ".".join(part.rstrip("_") for part in self.path).replace("_", "-")


def command_function(
    name: str, config_class: type[Config], body: Callable[..., None], switches: Mapping[str, Any]
) -> Callable[..., None]:
    """A function that Typer turns into a command.

    Args:
        name: of the command; its presets are offered.
        config_class: whose leaves become arguments and options.
        body: called with the config's typed values (nested) and each switch by name.
        switches: further boolean options, name -> `typer.Option`.
    """
    fields = list(leaves(config_class))
    parameters = [_parameter(leaf) for leaf in fields]
    if PRESETS.get(name):
        text = f"Start from named settings: {', '.join(PRESETS[name])}"
        parameters.append(_keyword("preset", str, typer.Option("--preset", help=text)))
    text = "Read settings from a TOML file, such as a run's config.toml"
    parameters.append(_keyword("config", Path, typer.Option("--config", help=text)))
    parameters += [
        inspect.Parameter(
            switch,
            inspect.Parameter.KEYWORD_ONLY,
            default=False,
            annotation=Annotated[bool, option],
        )
        for switch, option in switches.items()
    ]

    def run(**values: Any) -> None:  # noqa: ANN401 - Typer passes what the options' types say
        given = {switch: values.pop(switch) for switch in switches}
        preset, file = values.pop("preset", None), values.pop("config", None)
        typed: dict[str, Any] = {}
        for key, value in values.items():
            if value is not None and value != []:
                _put(typed, key.split(NESTING), value)
        body(lambda: resolve(name, config_class, preset, file, typed), **given)

    run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    run.__doc__ = config_class.__doc__
    return run


def resolve(
    name: str,
    config_class: type[AnyConfig],
    preset: str | None,
    file: Path | None,
    typed: Mapping[str, Any],
) -> AnyConfig:
    """The config of a command from all its sources.

    Raises:
        UsageError: an unknown preset or key, or a value that does not fit; the message names it.
    """
    settings: dict[str, Any] = {}
    if preset is not None:
        presets = PRESETS.get(name, {})
        if preset not in presets:
            raise UsageError(f"--preset {preset}: unknown{_nearest(preset, presets)}")
        settings = _merged(settings, presets[preset].settings)
    if file is not None:
        settings = _merged(settings, read_toml(file))
        _say_if_edited(file)
    settings = _merged(settings, typed)
    try:
        return config_class.model_validate(_split_lists(config_class, settings))
    except ValidationError as error:
        raise UsageError(_sentence(error, config_class)) from error


def _say_if_edited(file: Path) -> None:
    try:
        config_state(file)
    except DataError:
        say(f"note: {file} was changed since ldmkit wrote it; it is taken as it is now")


def leaves(config_class: type[Config], path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    """All fields of a config and of the configs in it, in order of declaration."""
    for name, info in config_class.model_fields.items():
        if _is_config(info.annotation):
            yield from leaves(info.annotation, (*path, name))  # pyright: ignore[reportArgumentType]
        else:
            yield Leaf((*path, name), info)


def _is_config(annotation: Any) -> bool:  # noqa: ANN401
    return isinstance(annotation, type) and issubclass(annotation, Config)


def _parameter(leaf: Leaf) -> inspect.Parameter:
    extra: Any = leaf.info.json_schema_extra or {}
    kind, metavar = _typer_type(leaf.info.annotation)
    python_name = NESTING.join(leaf.path)
    if extra.get("argument"):
        argument = typer.Argument(
            metavar=leaf.path[-1].upper(), help=leaf.info.description, show_default=False
        )
        return _keyword(python_name, kind, argument)
    names = [f"{leaf.option}/--no-{leaf.option[2:]}" if kind is bool else leaf.option]
    option = typer.Option(
        *names,
        *([extra["short"]] if "short" in extra else []),
        help=leaf.info.description,
        metavar=metavar,
        show_default=shown_default(leaf.info) or False,
        rich_help_panel=f"Options of {leaf.path[0]}" if len(leaf.path) > 1 else "Options",
    )
    return _keyword(python_name, kind, option)


def _keyword(name: str, kind: Any, option: Any) -> inspect.Parameter:  # noqa: ANN401
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _typer_type(annotation: Any) -> tuple[Any, str | None]:  # noqa: ANN401
    """The type Typer parses, and what to show for it."""
    if words := _words_beside_a_value(annotation):
        value = "INTEGER" if _plain(annotation) is int else "FILE"
        return str, "|".join((value, *words))
    annotation = _plain(annotation)
    if get_origin(annotation) is tuple:
        parts = get_args(annotation)
        if parts[0] is Path:
            return list[Path], None
        if parts[0] is str or get_origin(_plain(parts[0])) is Literal:
            return list[str], None
        name = _plain(parts[0]).__name__.upper()
        return str, f"{name},{name},..." if parts[-1] is Ellipsis else f"{name},{name}"
    if get_origin(annotation) is Literal and isinstance(get_args(annotation)[0], int):
        return int, "|".join(str(choice) for choice in get_args(annotation))
    return annotation, None


def _words_beside_a_value(annotation: Any) -> tuple[str, ...]:  # noqa: ANN401
    """The words that a field takes which takes a number or a file too; () for any other field."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()
    words = next((get_args(part) for part in parts if get_origin(part) is Literal), ())
    return words if _plain(annotation) in (int, Path) else ()


def _plain(annotation: Any) -> Any:  # noqa: ANN401
    """A type without `| None` and without bounds."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def shown_default(info: FieldInfo) -> str:
    """A field's default as one would type it; "" where there is none."""
    if info.is_required() or info.default is None or info.default == ():
        return ""
    if isinstance(info.default, tuple):
        return ",".join(str(part) for part in info.default)
    if isinstance(info.default, float):
        return f"{info.default:.6g}"
    return str(info.default)


def _put(nested: dict[str, Any], path: list[str], value: Any) -> None:  # noqa: ANN401
    for part in path[:-1]:
        nested = nested.setdefault(part, {})
    nested[path[-1]] = value


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for name, value in over.items():
        below = result.get(name)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            value = _merged(below, value)
        result[name] = value
    return result


def _split_lists(config_class: type[Config], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Turn "1,2,4" into its parts where the field is a tuple of numbers."""
    result = dict(settings)
    for name, info in config_class.model_fields.items():
        value = result.get(name)
        if _is_config(info.annotation) and isinstance(value, Mapping):
            result[name] = _split_lists(info.annotation, value)  # pyright: ignore[reportArgumentType]
        elif get_origin(_plain(info.annotation)) is tuple and isinstance(value, str):
            result[name] = [part.strip() for part in value.split(",") if part.strip()]
    return result


def _sentence(error: ValidationError, config_class: type[Config]) -> str:
    problem = error.errors()[0]
    words = problem["msg"].removeprefix("Value error, ")  # pydantic's, before a check of our own
    path = [str(part) for part in problem["loc"]]
    known = {".".join(leaf.path): leaf for leaf in leaves(config_class)}
    dotted = ".".join(path)
    if problem["type"] == "extra_forbidden":
        return f"{dotted}: unknown setting{_nearest(dotted, known)}"
    field = next(
        (leaf for name, leaf in known.items() if f"{dotted}.".startswith(f"{name}.")), None
    )
    if problem["type"] == "missing" and field and dotted not in known:  # a part of a list
        return f"{field.option}: too few values (got {','.join(map(str, problem['input']))})"
    if problem["type"] == "missing":
        return f"{path[-1].upper()} is missing: {field.info.description if field else dotted}"
    if field is None:  # a check of a whole config, whose message names what it is about
        return words
    words = ", or ".join((words, *_words_beside_a_value(field.info.annotation)))
    return f"{field.option}: {words} (got {problem['input']!r})"


def _nearest(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else f" (known: {', '.join(known)})"
