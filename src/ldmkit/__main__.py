"""`python -m ldmkit`, and the `ldmkit` command."""

from ldmkit.cli import app


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
