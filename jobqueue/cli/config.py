"""`jobqueue config`: the settings in use."""

import click

from jobqueue.cli.options import output_option
from jobqueue.cli.output import emit_rows


@click.group()
def group() -> None:
    """The settings in use: flag > environment > credential file > jobqueue.toml > default."""


@group.command()
@output_option
def show(output: str) -> None:
    """Print every setting, its value and where it comes from. Passwords are masked."""
    from jobqueue.settings import describe, load_settings, variable_of

    rows = [
        {
            "name": setting.name,
            "value": setting.value,
            "source": setting.source,
            "variable": variable_of(setting.name),
            "description": setting.description,
        }
        for setting in describe(load_settings())
    ]
    emit_rows(rows, ("name", "value", "source"), output)
