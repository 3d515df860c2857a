"""Print docs/cli.md, made from the commands themselves (`make docs`)."""

from typing import Any, Literal, get_args, get_origin

from ldmkit.cli import COMMANDS, EXTRA_SWITCHES, SWITCHES
from ldmkit.named_settings import PRESETS
from ldmkit.options import Leaf, leaves, shown_default

HEAD = """# The command line

Made from the commands by `make docs`; a test holds it to them. `ldmkit COMMAND --help` says the same.

Every option can also stand in a TOML file given with `--config` (`--unet.channels 64` is `channels = 64`
under `[unet]`). What is typed beats the file, the file beats the `--preset`, and that beats the default.
Standard output carries data only; everything said to people goes to standard error.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a bug in ldmkit |
| 2 | the command or its settings cannot be carried out |
| 3 | bad input data, files that do not belong together, or a result that misses a threshold |
| 4 | no space, or reading or writing failed |
| 5 | training met a number that is not finite |
| 6 | out of memory |
| 75 | interrupted and saved: run the same command again |
| 130, 143 | ended by Ctrl-C, by SIGTERM |
| 141 | the reader of the pipe went away |
"""


def main() -> None:
    """Print the page."""
    print(HEAD)
    for command, config in COMMANDS.items():
        everything = list(leaves(config))
        arguments = [leaf for leaf in everything if is_argument(leaf)]
        usage = " ".join(leaf.path[-1].upper() for leaf in arguments)
        print(f"## ldmkit {command} {usage}\n\n{config.__doc__}\n")
        print("| option | default | meaning |\n|---|---|---|")
        for leaf in everything:
            name = leaf.path[-1].upper() if is_argument(leaf) else leaf.option
            print(f"| `{name}`{choices(leaf)} | {default(leaf)} | {leaf.info.description} |")
        if command in PRESETS:
            print(f"| `--preset` | | Start from named settings: {', '.join(PRESETS[command])} |")
        print("| `--config` | | Read settings from a TOML file, such as a run's config.toml |")
        for switch in (SWITCHES | EXTRA_SWITCHES.get(command, {})).values():
            print(f"| `{switch.default}` | | {switch.help} |")
        print()


def is_argument(leaf: Leaf) -> bool:
    """Whether it is positional."""
    extra: Any = leaf.info.json_schema_extra or {}
    return bool(extra.get("argument"))


def choices(leaf: Leaf) -> str:
    """The words a choice allows."""
    if get_origin(leaf.info.annotation) is not Literal:
        return ""
    return " " + " \\| ".join(str(word) for word in get_args(leaf.info.annotation))


def default(leaf: Leaf) -> str:
    """The default as typed, or nothing."""
    text = shown_default(leaf.info)
    return f"`{text}`" if text else ""


if __name__ == "__main__":
    main()
