"""What one peer may do with people's terminals, in the order in which it is decided.

The host's configuration, the user's own rules, the rates, and last the terminals
themselves (`sessions` finds them, `tty` proves them). A refusal says "not logged in" or
"not accepting messages", unless the user or the host hides which.
"""

from __future__ import annotations

import os
import pwd
import time

from mda import log
from mda.config import RUN_DIRECTORY
from mda.model import Account, Outcome, classify_os_error
from mda.terminal import consent, record, sessions, tty
from mda.terminal.consent import Rules, Sender
from mda.terminal.rates import take

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from mda.broker import Identities
    from mda.config import Config
    from mda.model import Peer, Target
    from mda.terminal.sessions import Terminal

    IsOurs = Callable[[bytes], bool]

_CANNOT_TELL = Outcome(451, "4.3.0", "Cannot tell who is logged in on this host")
_NO_TERMINALS = Outcome(451, "4.3.5", "Terminals cannot be written to on this host")
_NOT_FOR_PEER = Outcome(550, "5.7.1", "Terminals are not for this peer")
_NOT_FOR_ACCOUNT = Outcome(550, "5.7.1", "No terminal messages for this account")
_NO_PERSON = Outcome(550, "5.3.3", "No person, and so no terminal")
_NOT_ACCEPTING = Outcome(450, "4.2.1", "User is not accepting messages")
_HIDDEN = "User cannot be reached now"
_TOO_MANY = Outcome(450, "4.7.1", "Too many messages in one minute")
_RATES_FILE = "terminal-rates"


class Terminals:
    """The terminals of this host, as one peer meets them."""

    def __init__(self, config: Config, peer: Peer, identities: Identities, is_ours: IsOurs) -> None:
        self._config = config
        self._peer = peer
        self._identities = identities
        self._is_ours = is_ours

    def probe(self, target: Target, address: bytes) -> tuple[Outcome, int]:
        """Would a terminal of the target's take the peer's message now, and how wide is it.

        `address` is the reverse-path without brackets. 250, 450, 451 or 550.
        """
        try:
            found = self._find(target, address)
            if isinstance(found, Outcome):
                return found, 0
            account, rules, terminals = found
            if not self._take(account, is_trial=True):
                return _TOO_MANY, 0
            outcome, width = self._look(account, terminals)
            return self._hide(outcome, rules), width
        except OSError as error:
            return classify_os_error(error, "asking for terminals"), 0

    def show(self, target: Target, address: bytes, block: bytes) -> Outcome:
        """Write the block to the target's terminals, as `probe` would find them now.

        An error here is an outcome too: the mailbox may have the message already.
        """
        try:
            found = self._find(target, address)
            if isinstance(found, Outcome):
                return found
            account, rules, terminals = found
            block = adapt(block, rules)
            outcome = self._write(account, terminals, block)
        except OSError as error:
            return classify_os_error(error, "writing to a terminal")
        if outcome.is_done and rules.switches["keep"]:
            self._keep(account, address, block)
        return self._hide(outcome, rules)

    def _find(
        self, target: Target, address: bytes
    ) -> tuple[Account, Rules, list[Terminal]] | Outcome:
        """Whose terminals these are, the user's rules and the candidates; or the refusal."""
        account = target.account
        if target.kind != "mailbox" or account is None:
            return target.outcome or _NO_PERSON
        refusal = self._judge_account(account)
        if refusal is not None:
            return refusal
        rules = self.read_rules(account)
        if not rules.let(self._sender(address)):
            return self._hide(_NOT_ACCEPTING, rules)
        section = self._config.terminal
        logins = sessions.find_terminals(
            account.uid, section.scan_minutes * 60 if section.scan else 0
        )
        return (account, rules, logins.terminals) if logins.is_available else _CANNOT_TELL

    def _judge_account(self, account: Account) -> Outcome | None:
        """What the host has against this peer, or against any message for this account."""
        if not self._peer.may_use_terminals:
            return _NOT_FOR_PEER
        recipients = self._config.recipients
        is_person = recipients.uid_min <= account.uid <= recipients.uid_max
        if not is_person and account.uid != self._identities.only_uid:
            return _NOT_FOR_ACCOUNT
        # By uid too: an account may have a second name.
        never = self._config.terminal.never
        if account.user in never or account.uid in map(sessions.look_up_uid, never):
            return _NOT_FOR_ACCOUNT
        return _NO_TERMINALS if self._identities.terminal_gid == -1 else None

    def read_rules(self, account: Account) -> Rules:
        """The user's rules, with the user's rights; raises OSError if they cannot be had."""
        with self._identities.as_user(account):
            return consent.read_rules(account.home, account.uid)

    def _sender(self, address: bytes) -> Sender:
        """Who sends, for the rules; what is claimed is taken apart as far as they need it."""
        text = address.decode("utf-8", "replace")
        mailbox = text.partition(":")[2] if text.startswith("@") else text
        local_part, at, domain = mailbox.rpartition("@")
        is_ours = not at or self._is_ours(domain.encode())
        claimed = (local_part if at else mailbox).strip('"').replace("\\", "")
        local_name = claimed if is_ours else ""
        return Sender(self._peer.user, mailbox, local_name)

    def _take(self, account: Account, *, is_trial: bool) -> bool:
        """Is one more message within the rates; root's own are not counted as a sender's."""
        peer, section = self._peer, self._config.terminal
        limits = [(f"to-{account.uid}", section.recipient_rate)]
        if peer.uid != 0:
            limits.append((f"from-{peer.address.replace(' ', '-')}", section.sender_rate))
        is_host = self._identities.only_uid is None
        folder = RUN_DIRECTORY if is_host else self._config.delivery.spool
        return take(os.path.join(folder, _RATES_FILE), limits, is_trial=is_trial)

    def _look(self, account: Account, terminals: list[Terminal]) -> tuple[Outcome, int]:
        gid, is_for_all = self._identities.terminal_gid, self._config.terminal.choose == "all"
        with self._identities.as_terminal_writer():
            return tty.probe(terminals, account.uid, gid, is_for_all=is_for_all)

    def _write(self, account: Account, terminals: list[Terminal], block: bytes) -> Outcome:
        section = self._config.terminal
        if not self._take(account, is_trial=False):
            return _TOO_MANY
        with self._identities.as_terminal_writer():
            return tty.show(
                terminals,
                account.uid,
                self._identities.terminal_gid,
                block,
                patience=section.wait_milliseconds / 1000,
                is_for_all=section.choose == "all",
            )

    def _keep(self, account: Account, address: bytes, block: bytes) -> None:
        """For `mda messages`; the message was shown, whether or not that can be done."""
        most = self._config.terminal.keep
        if not most:
            return
        sender = self._peer.user or address.decode("utf-8", "replace")
        is_verified = bool(self._peer.user)
        entry = record.Entry(int(time.time()), sender, block, is_verified=is_verified)
        try:
            with self._identities.as_user(account):
                record.append(account.home, account.uid, entry, most)
        except OSError as error:
            log.write("not kept", log.INFO, user=account.user, error=str(error))

    def _hide(self, outcome: Outcome, rules: Rules) -> Outcome:
        """The refusal without its reason, where the user or the host wants it so."""
        is_hidden = self._config.terminal.hide or not rules.switches["reason"]
        if outcome.enhanced == "4.2.1" and is_hidden:
            return Outcome(outcome.code, outcome.enhanced, _HIDDEN)
        return outcome

    def list_logins(self) -> tuple[Outcome, list[bytes]]:
        """Each terminal that somebody sits at: user, device, idle seconds, and y or n.

        y where the terminal and the user's rules would let this peer's message in.
        """
        gid = self._identities.terminal_gid
        if gid == -1:
            return _NO_TERMINALS, []
        rows = []
        try:
            found, is_available = sessions.list_logins()
            with self._identities.as_terminal_writer():
                for uid, terminal in found:
                    state = tty.describe(terminal, uid, gid)
                    if state is not None:
                        rows.append((uid, terminal.device, *state))
            willing = {uid: self._is_willing(uid) for uid, *_ in rows}
        except OSError as error:
            return classify_os_error(error, "asking for terminals"), []
        if not is_available:
            return _CANNOT_TELL, []
        lines = []
        for uid, device, idle, takes in rows:
            user, lets = willing[uid]
            answer = b"y" if takes == "y" and lets else b"n"
            if user:
                lines.append(b"%s %s %d %s" % (user, os.fsencode(device), idle, answer))
        return Outcome(250, "2.0.0", f"{len(lines)} terminals"), lines

    def _is_willing(self, uid: int) -> tuple[bytes, bool]:
        """The login name, and whether the user's rules let this peer write."""
        try:
            entry = pwd.getpwuid(uid)
        except KeyError:
            return b"", False
        account = Account(entry.pw_name, uid, entry.pw_gid, entry.pw_dir, "")
        is_refused = self._judge_account(account) is not None
        lets = not is_refused and self.read_rules(account).let(self._sender(b""))
        return os.fsencode(entry.pw_name), lets


def adapt(block: bytes, rules: Rules) -> bytes:
    """The block as the user's rules want it: without its bell, or in ASCII."""
    if not rules.switches["bell"]:
        block = block.replace(b"\a", b"")
    if rules.switches["utf8"] or block.isascii():
        return block
    from unicodedata import category  # here, since few ask for it

    # A mark has no column of its own, and "?" has one: the row would grow past its end.
    text = block.decode("utf-8", "replace")
    return "".join(c for c in text if category(c)[0] != "M").encode("ascii", "replace")
