"""`mda who`: who is logged in here, on which terminals, and whether they take messages."""

from __future__ import annotations

import json

import click

from mda.cli import handover, paint


@click.command("who")
@click.option("--json", "as_json", is_flag=True, help="One JSON list for programs.")
def command(as_json: bool) -> None:
    """List who is logged in, on which terminal, idle how long, and who takes messages."""
    try:
        rows = handover.list_logins()
    except handover.Refused as refused:
        click.echo(f"mda who: {refused.outcome.text}", err=True)
        raise SystemExit(1) from refused
    rows.sort(key=lambda row: (row[0], row[2]))
    if as_json:
        keys = ("user", "terminal", "idle_seconds", "takes_messages")
        objects = [dict(zip(keys, (*row[:3], row[3] == "y"), strict=True)) for row in rows]
        click.echo(json.dumps(objects, indent=2))
        return
    for user, device, idle, takes in rows:
        terminal = device.removeprefix("/dev/")
        answer = paint(f"messages {takes}", "green" if takes == "y" else "red")
        click.echo(f"{user:<16} {terminal:<10} {spell_idle(idle):>8}  {answer}")


def spell_idle(seconds: int) -> str:
    """`active`, `5m`, `3h07m` or `2d04h`: a terminal's clock is good to some 8 seconds."""
    if seconds < 60:
        return "active"
    minutes, hours = seconds // 60 % 60, seconds // 3600 % 24
    days = seconds // 86_400
    if days:
        return f"{days}d{hours:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m"
