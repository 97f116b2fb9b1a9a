"""The hosts themselves: people can log in, and what the tests see is what they see."""

from __future__ import annotations

from typing import Literal, get_args

import pytest

from hosts.host import InstalledHost, LoginKind


@pytest.mark.parametrize("kind", get_args(LoginKind))
def test_user_logs_in_on_a_terminal_of_her_own(host: InstalledHost, kind: LoginKind) -> None:
    login = host.login("alice", kind)

    assert f"alice@{host.name}" in login.screen()
    assert login.tty in host.terminals("alice")
    login.type("id -u > ~/id; echo sum-$((40 + 2))\n")
    login.wait_for("sum-42")
    assert host.path("/home/alice/id").read_text() == "1000\n"

    login.logout()
    assert login.tty not in host.terminals("alice")


def test_user_says_whether_she_takes_messages(host: InstalledHost) -> None:
    login = host.login("bob", "console")
    steps: list[tuple[Literal["y", "n"], int]] = [("y", 0o620), ("n", 0o600), ("y", 0o620)]
    for answer, mode in steps:
        login.mesg(answer)
        assert int(host.run(["stat", "-c", "%a", login.tty]).stdout, 8) == mode
    login.logout()


def test_line_that_is_lost_ends_the_login(host: InstalledHost) -> None:
    login = host.login("carol", "ssh")

    login.hang_up()

    assert login.tty not in host.terminals("carol")
