"""Where mail for an address goes: aliases, lists, forward files, files; on a real host's side."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

import pytest
from support.addressing import NOBODY, Host
from support.sandbox import UIDS, Sandbox


@pytest.fixture
def host(sandbox: Sandbox) -> Iterator[Host]:
    yield Host(sandbox)
    script = "cd /home; for user in *; do find $user -mindepth 1 -delete; done; rm -rf /run/files"
    assert sandbox.run(["sh", "-c", script]).returncode == 0


FOUND = b"250 2.1.5"
NO_WAY_OUT = '[outbound]\nvia = "nothing"\n'
TAKEN = b"250 2."


def test_an_alias_leads_to_a_person(host: Host) -> None:
    host.alias("root: alice\n")
    rcpt, data = host.send("Root@mda.test")
    assert rcpt.startswith(FOUND)
    assert data.startswith(TAKEN)
    assert host.has("alice") == 1
    assert host.header("alice", "Delivered-To") == ["alice@mda.test"]
    assert host.header("alice", "X-Original-To") == ["Root@mda.test"]
    assert host.header("alice", "Return-Path") == ["<bob@mda.test>"], "an alias is no list"


def test_root_and_system_accounts_have_mail_only_by_an_alias(host: Host) -> None:
    host.alias("root: alice\n")
    assert host.send("daemon")[0].startswith(b"550 5.1.1")
    host.alias("")
    assert host.send("root")[0].startswith(b"550 5.1.1")


def test_a_list_gives_each_member_one_copy(host: Host) -> None:
    host.alias("staff: alice, bob, more\nmore: ALICE, \\carol@mda.test\n")
    assert host.send("staff", "carol")[-1].startswith(TAKEN)
    assert [host.has(user) for user in ("alice", "bob", "carol")] == [1, 1, 1]


def test_a_large_list_reaches_everybody(host: Host) -> None:
    paths = [f"/run/files/{number}" for number in range(250)]
    host.make("/run/files", uid=NOBODY)
    name = "everybody" * 6  # so that the broker's answer does not fit in one frame
    host.alias(f"{name}: {', '.join(paths)}\nowner-{name}: carol\n")
    assert host.send(name)[-1].startswith(b"250 2.1.5 Delivered to all 250 members")
    assert len(host.sandbox.run(["ls", "/run/files"]).stdout.split()) == 250


@pytest.mark.parametrize(
    ("aliases", "expected"),
    [
        ("alice: alice, carol\n", {"alice": 1, "carol": 1}),
        ("alice: \\alice, carol\n", {"alice": 1, "carol": 1}),
        ("alice: one\none: two\ntwo: alice, carol\n", {"alice": 1, "carol": 1}),
        ("alice: alice\n", {"alice": 1}),
        ("alice: a, a\na: b, b\nb: c, c\nc: carol, a\n", {"carol": 1}),
    ],
)
def test_an_alias_that_names_itself_is_the_account(
    host: Host, aliases: str, expected: dict[str, int]
) -> None:
    host.alias(aliases)
    assert host.send("alice")[-1].startswith(TAKEN)
    assert {user: host.has(user) for user in UIDS if host.has(user)} == expected


@pytest.mark.parametrize("aliases", ["a: b\nb: a\n", "a: b, c\nb: a\nc: b\n"])
def test_a_circle_that_leads_nowhere_defers(host: Host, aliases: str) -> None:
    host.alias(aliases)
    assert b"451 4.3.5 <a> Aliases and forward files that lead in a circle" in host.send("a")


def test_aliases_that_double_at_each_step_end(host: Host) -> None:
    steps = [f"a{n}: a{n + 1}, b{n + 1}\nb{n}: a{n + 1}, b{n + 1}\n" for n in range(20)]
    host.alias("".join(steps) + "a20: alice\nb20: carol\n")
    assert host.send("a0")[-1].startswith(TAKEN)
    assert (host.has("alice"), host.has("carol")) == (1, 1)


def test_a_chain_that_is_too_long_defers(host: Host) -> None:
    host.alias("".join(f"a{n}: a{n + 1}\n" for n in range(40)) + "a40: alice\n")
    assert host.send("a0")[0].startswith(b"451 4.3.5 <a0> Aliases and forward files are nested")
    assert host.send("a20")[0].startswith(FOUND)


def test_an_extension_is_an_alias_of_its_own_or_is_left_off(host: Host) -> None:
    host.alias("staff: alice\nstaff+night: carol\n")
    host.send("staff+night")
    host.send("staff+day")
    assert (host.has("alice"), host.has("carol")) == (1, 1)


def test_a_list_with_an_owner_is_sent_in_the_owners_name(host: Host) -> None:
    host.alias("staff: alice, carol\nowner-staff: bob\n")
    host.send("staff", sender="carol@mda.test")
    assert host.header("alice", "Return-Path") == ["<owner-staff@mda.test>"]
    assert (host.sandbox.mailbox("alice") or b"").startswith(b"From owner-staff@mda.test ")
    host.send("owner-staff", sender="carol@mda.test")
    assert host.header("bob", "Return-Path") == ["<carol@mda.test>"]


def test_a_member_that_is_not_here_is_told_to_the_owner(host: Host) -> None:
    host.alias("staff: alice, gone\nowner-staff: bob\n")
    rcpt, data = host.send("staff", sender="carol@mda.test")
    assert rcpt.startswith(FOUND)
    assert data == b"250 2.1.5 Delivered to 1 of 2 members, and a notice"
    assert host.has("alice") == 1
    notice = (host.sandbox.mailbox("bob") or b"").decode()
    assert "\nReturn-Path: <>\n" in notice
    assert "Final-Recipient: rfc822; gone@mda.test\nAction: failed\nStatus: 5.1.1\n" in notice
    assert "\nTo: <owner-staff@mda.test>\n" in notice
    assert host.sandbox.mailbox("carol") is None


def test_without_an_owner_the_sender_is_told_where_he_has_a_mailbox(host: Host) -> None:
    host.alias("staff: alice, gone\n")
    assert host.send("staff")[-1].startswith(b"250 2.1.5 Delivered to 1 of 2")
    assert "Undeliverable mail" in host.header("bob", "Subject")
    config = '[outbound]\nvia = "nothing"\n'
    assert host.send("staff", sender="bob@elsewhere.example", config=config)[-1] == (
        b"554 5.1.1 gone: No such user here"
    )
    assert host.send("staff", sender="")[-1].startswith(b"554 5.1.1")
    assert host.has("alice") == 3


def test_a_list_of_nobody_is_refused(host: Host) -> None:
    host.alias("staff: gone, gone-too\n")
    assert host.send("staff")[0].startswith(b"550 5.1.1")


def test_mail_for_other_hosts_waits_for_a_way_out(host: Host) -> None:
    host.alias("root: admin@elsewhere.example, alice\n")
    replies = host.send("root", config=NO_WAY_OUT)
    assert replies[0].startswith(b"451 4.4.0 <root> Mail for other hosts")
    assert host.sandbox.mailbox("alice") is None


def test_who_is_told_of_a_failure_may_be_among_those_who_have_a_copy(host: Host) -> None:
    host.alias("all: bob, alice, gone\n")
    assert host.send("all")[-1].startswith(b"250 2.1.5 Delivered to 2 of 3 members, and a notice")
    assert host.header("bob", "Subject")[0] == "x"
    assert host.header("bob", "Subject").count("Undeliverable mail") == 1


def test_each_lists_owner_hears_of_its_own_members(host: Host) -> None:
    host.alias(
        "outer: alice, inner, gone-out\nowner-outer: bob\ninner: gone-in\nowner-inner: carol\n"
    )
    assert host.send("outer")[-1].startswith(b"250 2.1.5 Delivered to 1 of 3 members")
    assert b"message to gone-out@mda.test lost" in (host.sandbox.mailbox("bob") or b"")
    assert b"message to gone-in@mda.test lost" not in (host.sandbox.mailbox("bob") or b"")
    assert b"message to gone-in@mda.test lost" in (host.sandbox.mailbox("carol") or b"")


def test_two_lists_with_failures_have_two_notices(host: Host) -> None:
    host.alias("one: alice, gone1\ntwo: carol, gone2\n")
    assert host.send("one", "two")[-1].startswith(b"250")
    kept = host.sandbox.mailbox("bob") or b""
    assert (kept.count(b"to gone1@mda.test lost"), kept.count(b"to gone2@mda.test lost")) == (1, 1)


@pytest.mark.parametrize("memory", [0, 1_048_576])
def test_a_notice_does_not_take_the_text_from_those_who_come_after(host: Host, memory: int) -> None:
    host.alias("staff: alice, gone\n")
    config = f"[delivery]\nmemory = {memory}\n"
    said = host.send("staff", "carol", protocol="lmtp", peer="postfix", config=config)
    assert [line[:3] for line in said[-2:]] == [b"250", b"250"]
    assert (host.has("alice"), host.has("carol")) == (1, 1)


def test_an_alias_that_means_an_account_that_is_not_there_says_so(host: Host) -> None:
    host.alias("dave: dave, carol\n")
    assert host.send("dave")[-1].startswith(b"250 2.1.5 Delivered to 1 of 2 members, and a notice")
    assert b"message to dave@mda.test lost" in (host.sandbox.mailbox("bob") or b"")


def test_the_aliases_that_debian_ships_work(host: Host) -> None:
    host.alias("mailer-daemon: postmaster\npostmaster: root\nabuse: postmaster\nnoc: root\n")
    for name in ("mailer-daemon", "abuse", "postmaster"):
        assert host.send(name)[-1].startswith(TAKEN), name
    assert host.has("root") == 3


def test_postmasters_mail_reaches_somebody_where_a_member_cannot_be_reached(host: Host) -> None:
    host.alias("postmaster: alice, bob\n")
    host.forward("alice", "x@elsewhere.example\n")
    assert host.send("postmaster", config=NO_WAY_OUT)[-1].startswith(TAKEN)
    assert (host.has("bob"), host.has("root")) == (1, 1)


def test_a_line_of_nothing_but_quotes_stops_no_mail(host: Host) -> None:
    host.alias('""\n"": bob\nroot: alice\n')
    assert host.send("root")[-1].startswith(TAKEN)
    assert host.send("bob")[-1].startswith(TAKEN)


# -- files that are included ------------------------------------------------------------


def test_an_included_file_is_a_list(host: Host) -> None:
    path = host.include("staff", "# the staff\nalice\nCarol L. <carol@mda.test>\n", uid=1002)
    host.alias(f"staff: :include:{path}, bob\n")
    assert host.send("staff")[-1].startswith(TAKEN)
    assert [host.has(user) for user in ("alice", "bob", "carol")] == [1, 1, 1]


@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_an_included_file_that_others_can_write_defers(host: Host, mode: int) -> None:
    path = host.include("staff", "mallory\n", mode=mode)
    host.alias(f"staff: :include:{path}\n")
    assert host.send("staff")[0].startswith(b"451 4.3.5")
    assert b"(chmod go-w " in host.send("staff")[0]


def test_an_included_file_that_cannot_be_read_defers(host: Host) -> None:
    path = host.include("staff", "alice\n", mode=0o600)
    host.alias(f"staff: :include:{path}\n")
    assert host.send("staff")[0].endswith(b"cannot be read: EACCES"), "it was read as root"
    host.alias(f"staff: :include:{path}-gone\n")
    assert host.send("staff")[0].endswith(b"cannot be read: ENOENT")


def test_only_root_puts_files_and_commands_into_a_list(host: Host) -> None:
    host.make("/run/files", uid=NOBODY)
    host.alias(f"staff: :include:{host.lists}/staff\n")
    host.include("staff", "/run/files/archive\n", uid=1002)
    assert b"files and commands count only in lists that root owns" in host.send("staff")[0]
    host.include("staff", "/run/files/archive\n")
    assert host.send("staff")[-1].startswith(TAKEN)
    assert b"\nSubject: x\n" in host.read("/run/files/archive")


def test_a_file_of_roots_that_others_led_to_is_not_roots_word(host: Host) -> None:
    """Who owns a list may name a file of root's that he has filled, or put it into a link."""
    host.make("/run/files", uid=NOBODY)
    roots = host.include("roots", "/run/files/archive\n")
    host.include("users", f":include:{roots}\n", uid=1002)
    host.alias(f"staff: :include:{host.lists}/users\n")
    assert b"files and commands count only in lists that root owns" in host.send("staff")[0]
    (host.lists / "link").symlink_to(roots)
    host.alias(f"staff: :include:{host.lists}/link\n")
    assert b"files and commands count only in lists that root owns" in host.send("staff")[0]
    os.chown(host.lists, 1002, 0)
    host.alias(f"staff: :include:{roots}\n")
    assert b"files and commands count only in lists that root owns" in host.send("staff")[0]
    os.chown(host.lists, 0, 0)
    host.alias(f"staff: :include:{host.lists}/../lists/roots\n")
    assert b"files and commands count only in lists that root owns" in host.send("staff")[0]


def test_a_list_that_includes_itself_is_read_once(host: Host) -> None:
    lines = f":include:{host.lists}/bomb\n" * 9000 + "alice\n" + " \n" * 100_000
    host.include("bomb", lines)
    host.alias(f"staff: :include:{host.lists}/bomb\n")
    assert host.send("staff")[-1].startswith(TAKEN)
    assert host.has("alice") == 1


# -- files ------------------------------------------------------------------------------


def test_a_file_is_written_as_nobody(host: Host) -> None:
    host.make("/run/files", uid=NOBODY)
    host.alias("archive: /run/files/archive, /run/files/Maildir/\n")
    assert host.send("archive")[-1].startswith(TAKEN)
    kept = host.read("/run/files/archive")
    assert kept.startswith(b"From bob@mda.test ")
    assert b"\nDelivered-To: archive@mda.test\n" in kept
    assert kept.endswith(b"\n\n>From me\n\n")
    owner = host.sandbox.run(["stat", "-c", "%u %a", "/run/files/archive"]).stdout
    assert owner == b"65534 600\n"
    (name,) = host.sandbox.run(["ls", "/run/files/Maildir/new"]).stdout.split()
    message = host.read(f"/run/files/Maildir/new/{name.decode()}")
    assert message.startswith(b"Return-Path: <bob@mda.test>\n")
    assert message.endswith(b"\n\nFrom me\n")


def test_a_file_of_somebody_else_is_not_written(host: Host) -> None:
    host.make("/run/files", uid=NOBODY, mode="777")
    host.sandbox.run(["sh", "-c", "echo x > /run/files/roots"])
    host.alias("archive: /run/files/roots\n")
    rcpt, data = host.send("archive")
    assert rcpt.startswith(FOUND)
    assert data.startswith(b"451 4.2.0 ")
    assert host.read("/run/files/roots") == b"x\n"


@pytest.mark.parametrize("user", ["root", "nobody-here", "daemon2"])
def test_files_and_lists_never_belong_to_root(host: Host, user: str) -> None:
    host.alias("archive: /run/archive\n")
    passwd = host.sandbox.root / "etc/passwd"
    whole = passwd.read_text()
    passwd.write_text(whole + "daemon2:x:0:0::/:/bin/sh\n")
    try:
        said = host.send("archive", config=f"[delivery]\nalias_user = {user!r}\n")
    finally:
        passwd.write_text(whole)
    assert all(not line.startswith(b"25") for line in said[:1]) or said == []
    assert host.read("/run/archive") == b""


def test_dev_null_swallows(host: Host) -> None:
    host.alias("noreply: /dev/null\n")
    assert host.send("noreply")[-1].startswith(b"250 2.0.0")
    assert host.sandbox.run(["ls", "/dev/null.lock"]).returncode != 0


# -- postmaster -------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["", "no colon\n", "postmaster: gone\n", "postmaster: |x\n"])
def test_postmaster_always_has_a_mailbox(host: Host, broken: str) -> None:
    host.alias(broken)
    assert host.send("PostMaster@mda.test")[-1].startswith(TAKEN)
    assert host.has("root") == 1
    host.aliases.chmod(0o666)
    assert host.send("postmaster")[-1].startswith(TAKEN)
    assert host.has("root") == 2


@pytest.mark.parametrize(("protocol", "peer"), [("smtp", "bob"), ("lmtp", "postfix")])
def test_postmaster_is_an_alias_where_that_leads_somewhere(
    host: Host, protocol: str, peer: str
) -> None:
    host.alias("postmaster: root\nroot: alice\n")
    host.send("postmaster", protocol=protocol, peer=peer)
    assert (host.has("alice"), host.sandbox.mailbox("root")) == (1, None)


# -- what is wrong with the aliases -----------------------------------------------------


def test_broken_aliases_defer_and_never_bounce(host: Host) -> None:
    host.alias("staff alice\n")
    assert host.send("staff")[0].startswith(b"451 4.3.5 <staff> Alias staff: no colon")
    host.aliases.chmod(0o666)
    for name in ("staff", "alice", "nobody-at-all"):
        assert re.match(rb"451 4\.3\.5 .* \(chmod go-w ", host.send(name)[0])


# -- forward files ----------------------------------------------------------------------


def test_a_forward_file_leads_on(host: Host) -> None:
    host.forward("alice", "bob, \\alice\n")
    assert host.send("alice")[-1].startswith(TAKEN)
    assert (host.has("alice"), host.has("bob")) == (1, 1)
    assert host.header("bob", "Return-Path") == ["<bob@mda.test>"]


def test_forward_files_that_lead_in_a_circle_defer(host: Host) -> None:
    host.forward("alice", "bob\n")
    host.forward("bob", "alice\n")
    assert host.send("alice")[-1].startswith(TAKEN)
    assert host.has("alice") == 1, "who is named by the own forward file has the mailbox"


def test_a_file_of_the_user_is_written_as_the_user(host: Host) -> None:
    host.forward("alice", "/home/alice/mail, /home/alice/Maildir/, /home/bob/mail\n")
    host.send("alice")
    assert host.read("/home/bob/mail") == b"", "bob's home is not alice's"
    host.forward("alice", "/home/alice/mail, /home/alice/Maildir/\n")
    host.sandbox.run(["rm", "-f", "/home/alice/mail"])
    assert host.send("alice")[-1].startswith(TAKEN)
    assert host.read("/home/alice/mail").endswith(b"\n\n>From me\n\n")
    ls = ["stat", "-c", "%U %a", "/home/alice/mail", "/home/alice/Maildir"]
    assert host.sandbox.run(ls).stdout == b"alice 600\nalice 700\n"
    assert host.sandbox.mailbox("alice") is None


def test_a_file_of_the_user_leads_nowhere_else(host: Host) -> None:
    host.sandbox.run(["ln", "-s", "/home/bob/mail", "/home/alice/mail"])
    host.forward("alice", "/home/alice/mail\n")
    assert host.send("alice")[-1].startswith(b"451 4.2.0")
    assert host.sandbox.run(["ls", "/home/bob"]).stdout == b""


def test_an_extension_has_its_own_forward_file(host: Host) -> None:
    host.forward("alice", "bob\n", name=".forward+lists")
    host.send("alice+lists")
    host.send("alice+other")
    assert (host.has("alice"), host.has("bob")) == (1, 1)


def test_each_forward_file_of_a_person_is_followed(host: Host) -> None:
    host.forward("alice", "/home/alice/a\n", name=".forward+a")
    host.forward("alice", "/home/alice/b\n", name=".forward+b")
    host.forward("alice", "bob\n")
    host.alias("list: alice+a, alice+b, alice\n")
    assert host.send("list")[-1].startswith(TAKEN)
    assert host.read("/home/alice/a").count(b"\nSubject: x\n") == 1
    assert host.read("/home/alice/b").count(b"\nSubject: x\n") == 1
    assert (host.has("alice"), host.has("bob")) == (0, 1)


def test_saml_to_a_person_and_to_the_mailbox_itself_are_two_places(host: Host) -> None:
    host.forward("alice", "bob\n")
    host.alias("x: \\alice\n")
    assert host.send("alice", "x", verb="SAML")[-1].startswith(TAKEN)
    assert (host.has("alice"), host.has("bob")) == (1, 1)


def test_a_stranger_does_not_learn_what_is_in_a_users_file(host: Host) -> None:
    host.forward("alice", "secret lover\n", mode="600")
    (rcpt,) = host.send("alice")[:1]
    assert rcpt.startswith(b"451 4.3.5")
    assert b"secret" not in rcpt


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        ("bob", "666", b"can be written by others (chmod go-w /home/alice/.forward)"),
        ("bob jones", "600", b"/home/alice/.forward: an entry that is no mailbox"),
        ("bob@elsewhere.example", "600", b"Mail for other hosts cannot be forwarded from here"),
        ('"|/bin/cat"', "600", b"Commands are not run on this host (delivery.commands)"),
    ],
)
def test_a_forward_file_that_cannot_be_followed_defers(
    host: Host, text: str, mode: str, reason: bytes
) -> None:
    host.forward("alice", f"{text}\n", mode=mode)
    (rcpt,) = host.send("alice", config=NO_WAY_OUT)[:1]
    assert rcpt.startswith(b"451 4.")
    assert rcpt.endswith(reason)
    assert host.sandbox.mailbox("alice") is None


def test_a_home_that_is_gone_defers(host: Host) -> None:
    move = ["sh", "-c", "mount -t tmpfs -o mode=700 tmpfs /home/alice"]
    assert host.sandbox.run(move).returncode == 0
    try:
        assert host.send("alice")[0].endswith(b"/home/alice/.forward cannot be read: EACCES")
        assert host.sandbox.mailbox("alice") is None
    finally:
        host.sandbox.run(["umount", "/home/alice"])


def test_forward_files_can_be_switched_off(host: Host) -> None:
    host.forward("alice", "bob\n")
    host.send("alice", config="forward = false\n")
    assert (host.has("alice"), host.has("bob")) == (1, 0)


def test_a_private_group_may_write_what_is_its_users(host: Host) -> None:
    host.forward("alice", "bob\n", mode="664")
    assert host.send("alice")[-1].startswith(TAKEN)
    assert host.has("bob") == 1


# -- what an MTA hands over -------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "peer"), [("lmtp", "postfix"), ("smtp", "postfix"), ("lmtp", "root")]
)
def test_what_an_mta_hands_over_is_not_expanded_twice(host: Host, protocol: str, peer: str) -> None:
    host.alias("alice: carol\nroot: alice\n")
    host.forward("alice", "bob\n")
    host.send("alice", "root", protocol=protocol, peer=peer)
    assert [host.has(user) for user in ("alice", "bob", "carol")] == [1, 0, 0]


def test_a_person_is_no_mta_but_for_his_own_mail(host: Host) -> None:
    host.alias("root: alice\n")
    host.forward("alice", "carol\n")
    host.forward("bob", "carol\n")
    host.send("alice", "root", protocol="lmtp", peer="bob")
    assert (host.has("alice"), host.has("carol")) == (0, 1)
    host.send("bob", protocol="lmtp", peer="bob")
    assert (host.has("bob"), host.has("carol")) == (1, 1)


def test_an_mta_that_follows_no_aliases_leaves_them_to_us(host: Host) -> None:
    host.alias("alice: carol, \\alice\n")
    host.send("alice", protocol="lmtp", peer="postfix", config="mta_expands = false\n")
    assert (host.has("alice"), host.has("carol")) == (1, 1)


def test_mda_deliver_takes_a_person_as_the_last_word(
    host: Host, deliver: Callable[..., int]
) -> None:
    host.forward("alice", "bob\n")
    assert deliver(host.config, "-d", "alice") == 0
    assert (host.has("alice"), host.has("bob")) == (1, 0)


@pytest.fixture
def deliver(sandbox: Sandbox) -> Callable[..., int]:
    from support.sandbox import start_command

    def run(config: str, *arguments: str) -> int:
        file = sandbox.configure(config)
        command = [*start_command(), "deliver", "--config", file, *arguments]
        return sandbox.run(command, input=b"Subject: x\n\nhello\n").returncode

    return run


# -- EXPN and VRFY ----------------------------------------------------------------------


def ask(host: Host, *questions: str, peer: str = "bob") -> list[bytes]:
    lines = "".join(f"{question}\r\n" for question in questions).encode()
    return host.sandbox.converse(lines + b"QUIT\r\n", config=host.config, peer=peer)[1:-1]


def test_a_list_is_told_one_mailbox_a_line(host: Host) -> None:
    path = host.include("more", "carol\n")
    host.alias(
        f"staff: alice, Bob <bob@mda.test>, night, x@elsewhere.example, :include:{path}\n"
        "night: carol, bob\n"
    )
    assert ask(host, "EXPN staff") == [
        b"250-2.1.5 Alice Liddell <alice@mda.test>",
        b"250-2.1.5 Bob <bob@mda.test>",
        b"250-2.1.5 <night@mda.test>",
        b"250-2.1.5 <x@elsewhere.example>",
        b"250 2.1.5 Carol <carol@mda.test>",
    ]


def test_files_and_commands_of_a_list_are_not_told(host: Host) -> None:
    host.alias('ticket: "|/usr/bin/ticket", /var/secret\nmixed: alice, /var/secret\n')
    assert ask(host, "EXPN ticket", "EXPN mixed") == [
        b"250 2.1.5 <ticket@mda.test>",
        b"250 2.1.5 Alice Liddell <alice@mda.test>",
    ]


def test_a_list_is_not_verified_and_an_alias_is(host: Host) -> None:
    host.alias(
        "staff: alice, bob\nchief: alice\nowned: alice\nowner-owned: bob\nfar: x@e.example\n"
    )
    assert ask(host, "VRFY staff", "VRFY chief", "VRFY owned", "VRFY far", "EXPN nobody") == [
        b"550 5.1.4 That is a list and no user; EXPN shows its members",
        b"250 2.1.5 Alice Liddell <alice@mda.test>",
        b"550 5.1.4 That is a list and no user; EXPN shows its members",
        b"251 2.1.5 User not local; will forward to <x@e.example>",
        b"550 5.1.1 No such user here",
    ]


def test_a_forward_file_is_nobodys_business(host: Host) -> None:
    host.forward("alice", "bob, carol\n")
    expected = [b"250 2.1.5 Alice Liddell <alice@mda.test>"] * 2
    assert ask(host, "VRFY alice", "EXPN alice") == expected
