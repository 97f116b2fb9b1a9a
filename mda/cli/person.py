"""Whoever runs a command, and the host that it runs on."""

from __future__ import annotations

import functools
import os
import pwd

import click

from mda.config import Config, ConfigError, load, official_name
from mda.receiver.grammar import spell_path


def own_account() -> pwd.struct_passwd:
    """The account of whoever runs this; ClickException if there is none."""
    try:
        return pwd.getpwuid(os.getuid())
    except KeyError:
        raise click.ClickException("you have no account on this host") from None


@functools.cache
def host_config() -> Config:
    """The host's configuration; its defaults where that is broken, as the receiver will say."""
    try:
        return load()
    except ConfigError:
        return Config()


def own_host() -> str:
    """The name of this host, as the receiver gives it."""
    return official_name(host_config())


def own_path() -> str:
    """The reverse-path of whoever runs this."""
    return spell_path(f"{own_account().pw_name}@{own_host()}")
