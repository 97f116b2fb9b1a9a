"""STARTTLS (RFC 3207): a real certificate, real clients, and what attackers try."""

from __future__ import annotations

import contextlib
import os
import smtplib
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.sandbox import SESSION_UID, Sandbox
from support.serving import Served, connect, served

from mda.cli import check
from mda.config import Config

TEXT = b"Subject: x\r\n\r\nhello\r\n"


def make_certificate(folder: Path, name: str = "localhost") -> str:
    """A new certificate with its key in the same file, for the session's user alone; the
    configuration that names it.
    """
    file = folder / "tls.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"]
    words += ["-addext", "subjectAltName=DNS:localhost", "-keyout", f"{file}.new", "-out", "-"]
    made = subprocess.run(words, check=True, capture_output=True).stdout
    fresh = Path(f"{file}.new")
    with fresh.open("ab") as both:
        both.write(made)
    os.chown(fresh, 0, SESSION_UID)
    fresh.chmod(0o640)
    fresh.rename(file)
    return f'[receiver]\ntls_certificate = "{file}"\n'


@contextlib.contextmanager
def serving(sandbox: Sandbox, config: str, *places: str) -> Iterator[Served]:
    words = [f"--listen={each}" for each in places or ("127.0.0.1:0",)]
    with served(sandbox, "--config", sandbox.configure(config), *words) as daemon:
        yield daemon


@pytest.fixture
def config(sandbox: Sandbox) -> str:
    return make_certificate(sandbox.root)


def trusting(sandbox: Sandbox) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(sandbox.root / "tls.pem"))


def test_a_client_sends_in_tls(sandbox: Sandbox, config: str) -> None:
    with (
        serving(sandbox, config) as daemon,
        smtplib.SMTP("localhost", daemon.port, timeout=20) as client,
    ):
        client.ehlo("x")
        assert client.has_extn("starttls")
        assert client.starttls(context=trusting(sandbox))[0] == 220
        assert client.docmd("MAIL", "FROM:<joe@far.example>")[0] == 503, "say hello again"
        client.ehlo("x")
        assert not client.has_extn("starttls")
        assert client.has_extn("pipelining")
        assert client.docmd("STARTTLS")[0] == 503
        client.sendmail("joe@far.example", ["alice"], TEXT)
    kept = (sandbox.mailbox("alice") or b"").decode()
    assert "\tby mda.test with ESMTPS id " in kept
    assert kept.endswith("\nSubject: x\n\nhello\n\n")


def test_a_large_message_comes_through_whole(sandbox: Sandbox, config: str) -> None:
    body = b"".join(b"%d " % n * 12 + b"\r\n" for n in range(60_000))
    with (
        serving(sandbox, config) as daemon,
        smtplib.SMTP("localhost", daemon.port, timeout=60) as client,
    ):
        client.starttls(context=trusting(sandbox))
        client.sendmail("joe@far.example", ["alice"], TEXT + body)
    kept = sandbox.mailbox("alice") or b""
    assert kept.endswith(body.replace(b"\r\n", b"\n") + b"\n")


class Dripping:
    """A TLS client whose records come an octet at a time."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        self._connection = connection
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname="localhost")
        self._until_done(self._tls.do_handshake)

    def _drip(self) -> None:
        for octet in self._out.read():
            self._connection.sendall(bytes([octet]))

    def _until_done(self, step: object) -> bytes:
        while True:
            try:
                done = step()  # type: ignore[operator]
            except ssl.SSLWantReadError:
                self._drip()
                self._in.write(self._connection.recv(65_536))
                continue
            self._drip()
            return bytes(done or b"")

    def ask(self, line: bytes) -> bytes:
        self._tls.write(line)
        self._drip()
        return self._until_done(lambda: self._tls.read(65_536))


def test_records_may_come_octet_by_octet(sandbox: Sandbox, config: str) -> None:
    with serving(sandbox, config) as daemon, dial(daemon) as connection:
        say(connection, b"EHLO x\r\nSTARTTLS\r\n", b"220 2.0.0")
        client = Dripping(connection, trusting(sandbox))
        assert client.ask(b"EHLO x\r\n").startswith(b"250-mda.test\r\n")
        assert client.ask(b"NOOP\r\n") == b"250 2.0.0 OK\r\n"


def test_what_comes_with_the_end_of_the_handshake_is_read(sandbox: Sandbox, config: str) -> None:
    with serving(sandbox, config) as daemon, dial(daemon) as connection:
        say(connection, b"EHLO x\r\nSTARTTLS\r\n", b"220 2.0.0")
        context = trusting(sandbox)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
        with pytest.raises(ssl.SSLWantReadError):
            tls.do_handshake()
        connection.sendall(outgoing.read())
        while True:
            incoming.write(connection.recv(65_536))
            with contextlib.suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                break
        tls.write(b"NOOP\r\n")
        connection.sendall(outgoing.read())
        said = b""
        while b"250 2.0.0 OK\r\n" not in said:
            incoming.write(connection.recv(65_536))
            with contextlib.suppress(ssl.SSLWantReadError):
                said += tls.read(65_536)


def dial(daemon: Served) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", daemon.port), 20)
    connection.settimeout(20)
    return connection


def say(connection: socket.socket, octets: bytes, until: bytes) -> bytes:
    """Everything that is said up to a line that begins like `until`."""
    connection.sendall(octets)
    said = b""
    while until not in said or not said.endswith(b"\r\n"):
        more = connection.recv(65_536)
        assert more, said
        said += more
    return said


def test_what_is_put_behind_starttls_is_never_obeyed(sandbox: Sandbox, config: str) -> None:
    """A man in the middle puts commands there; in TLS they would be the client's."""
    injected = b"EHLO x\r\nMAIL FROM:<m@x>\r\nRCPT TO:<alice>\r\nDATA\r\nhi\r\n.\r\n"
    with serving(sandbox, config) as daemon, dial(daemon) as connection:
        say(connection, b"EHLO x\r\nSTARTTLS\r\n" + injected, b"220 2.0.0 Ready to start TLS")
        with trusting(sandbox).wrap_socket(connection, server_hostname="localhost") as secret:
            secret.sendall(b"NOOP\r\n")
            assert secret.recv(65_536) == b"250 2.0.0 OK\r\n"
            secret.sendall(b"MAIL FROM:<m@x>\r\n")
            assert secret.recv(65_536).startswith(b"503 5.5.1 Say hello first")
    assert sandbox.mailbox("alice") is None


def test_what_was_said_in_the_clear_counts_no_more(sandbox: Sandbox, config: str) -> None:
    with serving(sandbox, config) as daemon, dial(daemon) as connection:
        say(connection, b"EHLO x\r\nMAIL FROM:<m@x>\r\nSTARTTLS\r\n", b"503 5.5.1 Not in a")
        say(connection, b"RSET\r\nSTARTTLS\r\n", b"220 2.0.0 Ready")
        with trusting(sandbox).wrap_socket(connection, server_hostname="localhost") as secret:
            secret.sendall(b"RCPT TO:<alice>\r\n")
            assert secret.recv(65_536).startswith(b"503 ")


def test_where_tls_is_demanded_nothing_else_is_done_before(sandbox: Sandbox, config: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    config += f'starttls_required = ["{port}"]\n'
    places = (f"127.0.0.1:{port}", "unix:/run/mda/smtp.sock")
    with serving(sandbox, config, *places) as daemon:
        with smtplib.SMTP("localhost", daemon.port, timeout=20) as client:
            client.ehlo("x")
            for command in ("MAIL FROM:<a@b>", "VRFY alice", "EXPN alice", "SEND FROM:<a>", "DATA"):
                assert client.docmd(command)[:1] == (530,), command
            assert [client.docmd(each)[0] for each in ("NOOP", "HELP", "RSET")] == [250, 214, 250]
            client.starttls(context=trusting(sandbox))
            client.sendmail("joe@far.example", ["alice"], TEXT)
        with connect(sandbox, "/run/mda/smtp.sock", "bob") as local:
            say(local, b"EHLO x\r\nMAIL FROM:<bob@x>\r\n", b"250 2.1.0")
    assert sandbox.mailbox("alice") is not None


def test_a_renewed_certificate_is_taken_at_once(sandbox: Sandbox, config: str) -> None:
    def shown(daemon: Served) -> bytes:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with dial(daemon) as connection:
            say(connection, b"EHLO x\r\nSTARTTLS\r\n", b"220 2.0.0")
            with context.wrap_socket(connection) as secret:
                return secret.getpeercert(binary_form=True) or b""

    with serving(sandbox, config) as daemon:
        first = shown(daemon)
        assert shown(daemon) == first
        make_certificate(sandbox.root, "renewed")
        assert shown(daemon) != first


@pytest.mark.parametrize("fault", ["gone", "unreadable", "no certificate", "another's key"])
def test_without_a_good_certificate_the_session_goes_on_in_the_clear(
    sandbox: Sandbox, config: str, fault: str
) -> None:
    file = sandbox.root / "tls.pem"
    if fault == "gone":
        file.unlink()
    elif fault == "unreadable":
        os.chown(file, 0, 0)
        file.chmod(0o600)
    elif fault == "no certificate":
        file.write_text("nothing\n")
    else:
        both = file.read_bytes()
        make_certificate(sandbox.root, "another")
        other = file.read_bytes()
        key, certificate = other.partition(b"-----BEGIN CERT")[0], both.partition(b"KEY-----\n")[2]
        file.write_bytes(key + certificate.partition(b"KEY-----\n")[2])
    with serving(sandbox, config) as daemon, dial(daemon) as connection:
        say(connection, b"EHLO x\r\nSTARTTLS\r\n", b"454 4.7.0 TLS not available")
        say(connection, b"MAIL FROM:<a@b>\r\n", b"250 2.1.0")
        daemon.expect_in_log("tls")


def test_what_is_no_tls_ends_the_session(sandbox: Sandbox, config: str) -> None:
    with serving(sandbox, config) as daemon:
        for garbage in (b"EHLO x\r\n" * 50, b"\x16\x03\x01\xff\xff" + b"x" * 70_000, b""):
            with dial(daemon) as connection:
                say(connection, b"EHLO x\r\nSTARTTLS\r\n", b"220 2.0.0")
                with contextlib.suppress(ConnectionError):
                    connection.sendall(garbage)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65_536):
                        pass
        with dial(daemon) as connection:
            assert say(connection, b"NOOP\r\n", b"250 2.0.0").endswith(b"250 2.0.0 OK\r\n")


@pytest.mark.parametrize(
    ("version", "is_taken"),
    [("-tls1", False), ("-tls1_1", False), ("-tls1_2", True), ("-tls1_3", True)],
)
def test_only_versions_that_are_still_good_are_spoken(
    sandbox: Sandbox, config: str, version: str, is_taken: bool
) -> None:
    with serving(sandbox, config) as daemon:
        words = ["openssl", "s_client", "-starttls", "smtp", version, "-cipher", "ALL:@SECLEVEL=0"]
        words += ["-connect", f"127.0.0.1:{daemon.port}", "-quiet"]
        done = subprocess.run(
            words, input=b"EHLO x\r\nQUIT\r\n", capture_output=True, timeout=30, check=False
        )
    assert (b"250-PIPELINING" in done.stdout) == is_taken, done
    assert b"RENEGOTIATING" not in done.stderr


@pytest.mark.parametrize("cipher", ["NULL", "aNULL", "EXPORT", "RC4", "3DES", "MD5"])
def test_no_weak_cipher_is_taken(sandbox: Sandbox, config: str, cipher: str) -> None:
    with serving(sandbox, config) as daemon:
        words = ["openssl", "s_client", "-starttls", "smtp", "-tls1_2"]
        words += ["-cipher", f"{cipher}:@SECLEVEL=0", "-connect", f"127.0.0.1:{daemon.port}"]
        done = subprocess.run(
            words, input=b"QUIT\r\n", capture_output=True, timeout=30, check=False
        )
    assert done.returncode != 0


def test_a_session_that_begins_anew_in_tls_stays_in_it(sandbox: Sandbox, config: str) -> None:
    config += 'xclient_peers = ["127.0.0.0/8"]\n'
    with serving(sandbox, config) as daemon, dial(daemon) as connection:
        say(connection, b"EHLO x\r\nSTARTTLS\r\n", b"220 2.0.0")
        with trusting(sandbox).wrap_socket(connection, server_hostname="localhost") as secret:
            secret.sendall(b"EHLO x\r\nXCLIENT ADDR=192.0.2.7\r\n")
            said = b""
            while b"220 mda.test" not in said:
                said += secret.recv(65_536)
            secret.sendall(b"EHLO x\r\nQUIT\r\n")
            said = b"".join(iter(lambda: secret.recv(65_536), b""))
    assert b"250-PIPELINING" in said
    assert b"STARTTLS" not in said


def test_by_lmtp_it_is_lmtps(sandbox: Sandbox, config: str) -> None:
    with serving(sandbox, config, "lmtp+127.0.0.1:0") as daemon, dial(daemon) as connection:
        say(connection, b"LHLO x\r\nSTARTTLS\r\n", b"220 2.0.0")
        with trusting(sandbox).wrap_socket(connection, server_hostname="localhost") as secret:
            lines = b"LHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<alice>\r\nDATA\r\n"
            secret.sendall(lines + TEXT + b".\r\nQUIT\r\n")
            said = b"".join(iter(lambda: secret.recv(65_536), b""))
    assert b"250 2.0.0 <alice> Delivered to mailbox" in said
    assert b"\tby mda.test with LMTPS id " in (sandbox.mailbox("alice") or b"")


def test_without_a_certificate_it_is_not_offered(sandbox: Sandbox) -> None:
    with serving(sandbox, "") as daemon, dial(daemon) as connection:
        assert b"STARTTLS" not in say(connection, b"EHLO x\r\n", b"250 SAML")
        say(connection, b"STARTTLS\r\n", b"502 5.5.1")


def test_check_finds_a_key_that_others_can_read_and_what_is_no_certificate(tmp_path: Path) -> None:
    make_certificate(tmp_path)
    file = tmp_path / "tls.pem"
    config = Config().with_values("receiver", tls_certificate=str(file))
    whats = [finding.what for finding in check.check_certificate(config)]
    assert [what for what in whats if "mda-net" not in what] == []
    file.chmod(0o644)
    assert f"{file}: others can read the key" in [
        finding.what for finding in check.check_certificate(config)
    ]
    file.write_text("nothing\n")
    assert any(str(file) in each.what for each in check.check_outbound(config))
    assert list(check.check_certificate(Config())) == []
